//! Disks on a real pool of ZFS. No kernel of Debian's has its module, so that a machine is booted which loads it: this very
//! program is its workload, and does there what [`pool`] holds. That needs OpenZFS, compiled for the machine's kernel once
//! (`cargo xtask zfs`), and is listed as not run where it is not there.
#![allow(clippy::print_stderr, reason = "`--nocapture` shows how long each part took")]

#[cfg(not(target_os = "linux"))]
fn main() {}

#[cfg(target_os = "linux")]
#[path = "../common/mod.rs"]
mod common;
#[cfg(target_os = "linux")]
mod crash;
#[cfg(target_os = "linux")]
mod pool;
#[cfg(target_os = "linux")]
mod table;

#[cfg(target_os = "linux")]
fn main() -> std::process::ExitCode {
    use libtest_mimic::{Arguments, Trial};

    if let Some(code) = pool::main() {
        return code;
    }
    let title = "disks_live_in_a_real_pool_of_zfs";
    let missing = if !rustix::process::geteuid().is_root() {
        Some("it needs root")
    } else if kiln_fixtures::zfs().is_none() {
        Some("OpenZFS was not compiled for the kernel of machines (`cargo xtask zfs` does that)")
    } else {
        None
    };
    if let Some(reason) = missing {
        kiln_fixtures::not_run(title, reason);
    }
    let trial = Trial::test(title, || {
        host::disks_live_in_a_real_pool_of_zfs();
        Ok(())
    });
    libtest_mimic::run(&Arguments::from_args(), vec![trial.with_ignored_flag(missing.is_some())]).exit_code()
}

#[cfg(target_os = "linux")]
mod host {
    use std::time::Duration;

    use kiln_boot::{Kernels, Source};
    use kiln_contract::Silent;
    use kiln_store::{ImageName, Store};
    use oci_spec::image::ImageConfiguration;

    use super::common::{Home, finish_within};
    use super::{pool, table};

    const IMAGE: &str = "localhost/zfs:test";

    pub(super) fn disks_live_in_a_real_pool_of_zfs() {
        let (Some(zfs), Some(package)) = (kiln_fixtures::zfs(), kiln_fixtures::debian_kernel()) else {
            return;
        };
        let Some(system) = kiln_fixtures::debian_system_rootfs() else { return };
        let Some(_) = kiln_fixtures::require("qemu-system-x86_64") else { return };
        let home = Home::new();
        let kiln_home = kiln_contract::Home::at(home.path());
        Kernels::open(&kiln_home).install(&Source::Packages(vec![package]), None, &Silent).unwrap();
        // Debian, and over it the programs and modules of ZFS.
        let store = Store::open(&kiln_home).unwrap();
        let layers = [system, zfs].map(|directory| store.import_directory(&directory).unwrap().layer);
        let image = store.make_image(&ImageConfiguration::default(), &layers).unwrap();
        store.tag(&ImageName::parse(IMAGE).unwrap(), &image.manifest_digest, "test").unwrap();

        let program = std::env::current_exe().unwrap();
        let share = format!("{}:{}:ro", program.display(), pool::PROGRAM);
        // A machine of one life: a template would be saved for nobody.
        let run = ["run", "--vm", "--cold", "--rm", "--quiet", "--memory", "768m", "-v", &share];
        let inside = ["-e", pool::INSIDE, IMAGE, pool::PROGRAM];
        let ended = finish_within(home.command(run.into_iter().chain(inside)), Duration::from_secs(400));
        eprintln!("{}", ended.stdout);
        assert_eq!(ended.code, 0, "{}\n{}", ended.stdout, ended.stderr);
        let passed = ended.stdout.lines().filter(|line| line.starts_with("passed: ")).count();
        assert_eq!(passed, table::TESTS.len() + table::WITH_UDEV.len(), "{}", ended.stdout);
    }
}
