//! Templates that are damaged: a start does not depend on them.

mod common;

use std::fs::{self, File};
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::PathBuf;
use std::process::Stdio;
use std::time::{Duration, Instant};

use common::{Ended, Home, IMAGE, finish_within};
use rustix::process::{Pid, Signal, kill_process};

/// The memory files of the templates that there are, each once.
fn memories(home: &Home) -> Vec<(u64, PathBuf)> {
    let entries = fs::read_dir(home.path().join("templates")).unwrap().flatten();
    let files = entries.map(|entry| entry.path().join("memory")).filter(|path| path.exists());
    let mut found: Vec<_> = files.map(|path| (fs::metadata(&path).unwrap().ino(), path)).collect();
    found.sort();
    found.dedup_by_key(|(inode, _)| *inode);
    found
}

fn zeroed(file: &File) {
    let zeros = vec![0; 1 << 20];
    for at in (0..file.metadata().unwrap().len()).step_by(zeros.len()) {
        file.write_all_at(&zeros, at).unwrap();
    }
}

fn run(home: &Home, flags: &[&str]) -> Ended {
    let words =
        [&["run", "--vm", "--memory", "256m"][..], flags, &[IMAGE, "sh", "-c", "echo works > /it; cat /it"]];
    finish_within(home.command(words.concat()), Duration::from_secs(240))
}

#[test]
fn a_template_whose_memory_is_damaged_is_discarded_the_start_boots_and_the_next_makes_another() {
    let Some(home) = Home::with_kernel() else { return };
    type Damage = fn(&File);
    let damages: [(&str, Damage, bool); 2] =
        [("zeros", zeroed, true), ("cut", |file| file.set_len(1 << 20).unwrap(), false)];
    for (what, damage, boots) in damages {
        let before = memories(&home);
        assert!(!before.is_empty(), "{what}");
        for (_, path) in &before {
            damage(&File::options().write(true).open(path).unwrap());
        }
        let kept = format!("kept-{what}");
        let ended = run(&home, &["--name", &kept]);
        assert_eq!((ended.code, ended.stdout.as_str()), (0, "works\n"), "{what}: {ended:?}");
        // What is too short is seen before anything is restored, and made again at once.
        assert_eq!(
            ended.stderr.contains("is damaged: this start boots the kernel"),
            boots,
            "{what}: {ended:?}"
        );
        assert_eq!(memories(&home).is_empty(), boots, "{what}");
        let ended = run(&home, &["--rm"]);
        assert_eq!((ended.code, ended.stdout.as_str()), (0, "works\n"), "{what}: {ended:?}");
        assert!(!ended.stderr.contains("damaged"), "{what}: {ended:?}");
        let after = memories(&home);
        // Templates that these starts do not begin with are not looked at.
        assert!(after.iter().any(|new| !before.contains(new)), "{what}: {after:?}");
        // The one that booted has a disk like any other.
        let again = finish_within(home.command(["start", "--attach", &kept]), Duration::from_secs(240));
        assert_eq!((again.code, again.stdout.as_str()), (0, "works\n"), "{what}: {again:?}");
        home.ok(["rm", &kept]);
    }
}

/// The hypervisor of a machine of this home, as soon as there is one.
fn hypervisor(home: &Home) -> Pid {
    let instances = home.path().join("instances");
    let begun = Instant::now();
    while begun.elapsed() < Duration::from_secs(60) {
        for entry in fs::read_dir("/proc").unwrap().flatten() {
            let Ok(pid) = entry.file_name().to_string_lossy().parse::<i32>() else { continue };
            let is_qemu = || {
                fs::read(entry.path().join("cmdline")).is_ok_and(|words| {
                    words.starts_with(b"/") && {
                        let program = words.split(|byte| *byte == 0).next().unwrap_or_default();
                        String::from_utf8_lossy(program).contains("qemu-system")
                    }
                })
            };
            if fs::read_link(entry.path().join("cwd")).is_ok_and(|cwd| cwd.starts_with(&instances))
                && is_qemu()
            {
                return Pid::from_raw(pid).unwrap();
            }
        }
    }
    panic!("no hypervisor comes");
}

#[test]
fn a_hypervisor_that_is_killed_while_it_restores_throws_no_template_away() {
    let Some(home) = Home::with_kernel() else { return };
    let before = memories(&home);
    let words = ["run", "--vm", "--rm", "--memory", "256m", IMAGE, "sleep", "20"];
    let run = home.command(words).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    kill_process(hypervisor(&home), Signal::KILL).unwrap();
    let ended: Ended = run.wait_with_output().unwrap().into();
    assert_eq!(ended.code, 125, "{ended:?}");
    assert!(!ended.stderr.contains("damaged"), "{ended:?}");
    assert_eq!(memories(&home), before);
}
