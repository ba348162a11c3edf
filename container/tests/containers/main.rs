//! Containers made of real images, by this very program: it is the tests, the commands that they run, and the
//! supervisors that those commands start.

#[cfg(not(target_os = "linux"))]
fn main() {}

#[cfg(target_os = "linux")]
mod bed;
#[cfg(target_os = "linux")]
mod commands;
#[cfg(target_os = "linux")]
mod crashes;
#[cfg(target_os = "linux")]
mod health;
#[cfg(target_os = "linux")]
mod lifecycle;
#[cfg(target_os = "linux")]
mod restarts;
#[cfg(target_os = "linux")]
mod streams;
#[cfg(target_os = "linux")]
mod terminal;

#[cfg(target_os = "linux")]
fn main() -> std::process::ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if let Some(code) = commands::dispatch(&arguments) {
        return code;
    }
    if !kiln_fixtures::require_root() || kiln_fixtures::busybox_rootfs().is_none() {
        return std::process::ExitCode::SUCCESS;
    }
    let tests: Vec<bed::Test> =
        [lifecycle::TESTS, crashes::TESTS, health::TESTS, restarts::TESTS, streams::TESTS, terminal::TESTS]
            .concat();
    let trials = tests
        .into_iter()
        .map(|(name, test)| {
            libtest_mimic::Trial::test(name, move || {
                test();
                Ok(())
            })
        })
        .collect();
    libtest_mimic::run(&libtest_mimic::Arguments::from_args(), trials).exit_code()
}
