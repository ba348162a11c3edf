//! Every driver of a hypervisor does what the contract says: one table of tests, run by each.
//!
//! QEMU is run as it is, with what Kiln chooses on this host: its machines have the processors of their host, and are executed
//! by KVM wherever that can be. Firecracker is no program that distributions package, and needs KVM. A driver that cannot be run
//! here is listed as not run, with the reason. That of Firecracker is tested against a strict stand-in for its documented API
//! too, which is this very program, started by the driver: see [`fake`].

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
    for driver in Driver::ALL {
        let missing = driver.missing();
        if let Some(reason) = &missing {
            let title = format!("{}: each of {} tests", driver.name(), conformance::TABLE.len());
            kiln_fixtures::not_run(&title, reason);
        }
        for (name, test) in conformance::TABLE {
            let title = format!("{}: {name}", driver.name());
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
