//! Disks on a real pool of ZFS, where this host can have one: its module is in no kernel of Debian's, and is compiled for the
//! kernel that runs (`zfs-dkms`). Elsewhere this is listed as not run; what is asked of `zfs`, command by command, is tested in
//! `src/zfs/tests.rs`.

#[cfg(not(target_os = "linux"))]
fn main() {}

#[cfg(target_os = "linux")]
#[path = "common/mod.rs"]
mod common;

#[cfg(target_os = "linux")]
fn main() -> std::process::ExitCode {
    use libtest_mimic::{Arguments, Trial};

    let title = "a disk is copied, saved, put back and removed in a pool of ZFS";
    let missing = pool::missing();
    if let Some(reason) = &missing {
        kiln_fixtures::not_run(title, reason);
    }
    let trial = Trial::test(title, || {
        pool::a_disk_is_copied_saved_put_back_and_removed();
        Ok(())
    });
    libtest_mimic::run(&Arguments::from_args(), vec![trial.with_ignored_flag(missing.is_some())]).exit_code()
}

#[cfg(target_os = "linux")]
mod pool {
    use std::fs::File;
    use std::path::Path;
    use std::process::Command;

    use kiln_contract::Home;
    use kiln_disk::{Choice, open};

    use super::common::{disk, has_scribble, run_program, scribble, snapshot};

    const GIB: u64 = 1 << 30;
    const MIB: usize = 1 << 20;

    /// What this host lacks for a pool.
    pub(super) fn missing() -> Option<String> {
        if !rustix::process::geteuid().is_root() {
            return Some("a pool needs root".to_owned());
        }
        for program in ["zpool", "zfs"] {
            if kiln_fixtures::find_program(program).is_none() {
                return Some(format!(
                    "{program} is not installed (Debian: zfsutils-linux and zfs-dkms, in contrib)"
                ));
            }
        }
        let _ = Command::new("modprobe").arg("zfs").status();
        let is_there = Path::new("/sys/module/zfs").exists();
        (!is_there)
            .then(|| "the kernel that runs has no module zfs (Debian: zfs-dkms, in contrib)".to_owned())
    }

    /// A pool in a file, which goes with this.
    struct Pool(String);

    impl Drop for Pool {
        fn drop(&mut self) {
            let _ = Command::new("zpool").args(["destroy", "-f", &self.0]).status();
        }
    }

    pub(super) fn a_disk_is_copied_saved_put_back_and_removed() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("pool");
        File::create(&file).unwrap().set_len(2 * GIB).unwrap();
        let pool = Pool(format!("kilntest{}", std::process::id()));
        run_program(Command::new("zpool").args(["create", "-m", "none", &pool.0]).arg(&file));
        let dataset = format!("{}/disks", pool.0);
        run_program(Command::new("zfs").args(["create", &dataset]));
        let home = Home::at(directory.path().join("home"));
        std::fs::create_dir(home.path()).unwrap();
        let disks = open(&home, &Choice::Zfs { dataset: dataset.clone() }).unwrap().backend;

        let (web, fork, before) = (disk("web"), disk("fork"), snapshot("before"));
        let path = disks.create(&web, GIB).unwrap();
        scribble(&path, 500 << 20, MIB, 1);
        disks.flush(&web).unwrap();
        disks.snapshot(&web, &before).unwrap();
        let copy = disks.clone_disk(&web, None, &fork).unwrap();
        assert!(has_scribble(&copy, 500 << 20, MIB, 1));
        scribble(&copy, 500 << 20, MIB, 2);
        assert!(has_scribble(&path, 500 << 20, MIB, 1), "the original changed with its copy");
        scribble(&path, 500 << 20, MIB, 3);
        disks.restore(&web, &before).unwrap();
        assert!(has_scribble(&disks.path(&web).unwrap(), 500 << 20, MIB, 1));
        disks.resize(&fork, 2 * GIB).unwrap();
        assert_eq!((disks.size(&web).unwrap(), disks.size(&fork).unwrap()), (GIB, 2 * GIB));
        disks.remove(&web).unwrap();
        assert!(has_scribble(&disks.path(&fork).unwrap(), 500 << 20, MIB, 2));
        disks.remove(&fork).unwrap();
        assert_eq!(disks.list().unwrap(), []);
        drop(disks);
        let left =
            run_program(Command::new("zfs").args(["list", "-H", "-r", "-o", "name", "-t", "all", &dataset]));
        assert_eq!(left.trim(), dataset, "volumes are left");
    }
}
