//! Every driver of a hypervisor does what the contract says: one table of tests, run by each.
//!
//! QEMU is run as it is. Firecracker is no program that distributions package, and needs KVM: where it cannot be run, its tests
//! are listed as not run. Its driver is tested against a strict stand-in for its documented API instead, which is this very
//! program, started by the driver: see [`fake`].

#[cfg(not(target_os = "linux"))]
fn main() {}

#[cfg(target_os = "linux")]
mod api;
#[cfg(target_os = "linux")]
mod bed;
#[cfg(target_os = "linux")]
mod conformance;
#[cfg(target_os = "linux")]
mod fake;

#[cfg(target_os = "linux")]
fn main() -> std::process::ExitCode {
    use bed::Driver;
    use libtest_mimic::Trial;

    if let Some(code) = fake::main() {
        return code;
    }
    let mut trials = Vec::new();
    for driver in [Driver::Qemu, Driver::Firecracker, Driver::Fake] {
        let missing = driver.missing();
        for (name, test) in conformance::TABLE {
            let title = format!("{}: {name}", driver.name());
            if let Some(reason) = &missing {
                kiln_fixtures::not_run(&title, reason);
            }
            let trial = Trial::test(title, move || {
                let _ = bed::of(driver).map(test);
                Ok(())
            });
            trials.push(trial.with_ignored_flag(missing.is_some()));
        }
    }
    trials.extend(api::TABLE.iter().map(|(name, test)| {
        Trial::test(format!("api: {name}"), || {
            test();
            Ok(())
        })
    }));
    libtest_mimic::run(&libtest_mimic::Arguments::from_args(), trials).exit_code()
}
