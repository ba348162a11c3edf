//! What a reboot of the host leaves: records that say that an instance runs, of a boot that is over.

use std::fs;

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use super::common::{Home, IMAGE, until};
use super::{HOME, sleeper};

/// Kills all that runs an instance at once, as a host does that loses its power, and has its record tell of an earlier boot.
fn reboot(home: &Home, id: &str) {
    let path = home.path().join("instances").join(id).join("instance.json");
    let mut record: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    assert_eq!(record["status"], "running", "{record}");
    let pid = |field: &str| i32::try_from(record[field]["pid"].as_u64().unwrap()).unwrap();
    let children = format!("/proc/{0}/task/{0}/children", pid("process"));
    let children = fs::read_to_string(children).unwrap();
    let children = children.split_whitespace().map(|pid| pid.parse().unwrap());
    let pids: Vec<i32> = [pid("supervisor"), pid("process")].into_iter().chain(children).collect();
    for pid in &pids {
        let _ = kill_process(Pid::from_raw(*pid).unwrap(), Signal::KILL);
    }
    until("nothing of it runs", || {
        pids.iter().all(|pid| !std::path::Path::new(&format!("/proc/{pid}/exe")).exists())
    });
    record["boot"] = "00000000-0000-4000-8000-000000000000".into();
    // Whoever has the number now is somebody else, and is to live.
    for field in ["supervisor", "process"] {
        record[field]["pid"] = std::process::id().into();
    }
    fs::write(&path, serde_json::to_vec(&record).unwrap()).unwrap();
}

#[test]
fn what_ran_when_the_host_went_down_has_ended_and_starts_again() {
    let Some(home) = &*HOME else { return };
    home.sleeper("box");
    sleeper(home, "vm");
    for name in ["box", "vm"] {
        home.ok(["exec", name, "sh", "-c", "echo kept > /kept; sync"]);
        let id = home.json(["inspect", name])[0]["id"].as_str().unwrap().to_owned();
        reboot(home, &id);
        // Whichever command comes first sets it right.
        let listed = home.json(["ps", "-a", "--format", "json", "--filter", &format!("name={name}")]);
        assert_eq!(listed[0]["status"], "exited", "{listed}");
        let shown = home.json(["inspect", name])[0].clone();
        let exit = &shown["exit"];
        assert_eq!((exit["code"].as_u64(), &shown["status"]), (Some(255), &Value::from("exited")), "{shown}");
        assert_eq!(exit["error"], "the host was restarted while it ran", "{shown}");
        assert_eq!(home.ok(["wait", name]), "255");
        let refused = home.kiln(["exec", name, "true"]);
        assert!(refused.code != 0 && refused.stderr.contains("exited"), "{refused:?}");
        home.ok(["start", name]);
        assert_eq!(home.ok(["exec", name, "cat", "/kept"]), "kept", "{name}");

        // And a start may be the first.
        reboot(home, &id);
        home.ok(["start", name]);
        assert_eq!(home.ok(["exec", name, "cat", "/kept"]), "kept", "{name}");
        reboot(home, &id);
        home.ok(["rm", name]);
        assert!(!home.path().join("instances").join(&id).exists());
    }
    // What was to vanish at its end has.
    let id =
        home.ok(["run", "-d", "--rm", "--vm", "--memory", "256m", "--name", "once", IMAGE, "sleep", "600"]);
    reboot(home, &id);
    assert_eq!(home.kiln(["inspect", "once"]).code, 1);
    for directory in ["instances", "disks"] {
        let entries = fs::read_dir(home.path().join(directory)).unwrap().flatten();
        let left: Vec<_> = entries.map(|entry| entry.file_name()).collect();
        assert!(!left.iter().any(|name| name.to_string_lossy().contains(&id)), "{directory}: {left:?}");
    }
}

#[test]
fn doctor_says_what_executes_machines_and_why() {
    let Some(home) = &*HOME else { return };
    let said = home.kiln(["system", "doctor"]).stdout;
    let line = said.lines().find(|line| line.contains("machines: accelerator"));
    let line = line.unwrap_or_else(|| panic!("{said}"));
    let opened = fs::File::options().read(true).write(true).open("/dev/kvm");
    let cpu = fs::read_to_string("/proc/cpuinfo").unwrap();
    let has =
        cpu.split_whitespace().any(|flag| flag == "vmx" || flag == "svm") || !cfg!(target_arch = "x86_64");
    match opened {
        Err(error) => {
            assert!(line.contains("TCG, software emulation: /dev/kvm cannot be opened"), "{line}");
            assert!(line.contains(&error.to_string()), "{line}");
        }
        Ok(_) if has => assert!(line.contains("KVM") && !line.contains("TCG"), "{line}"),
        Ok(_) => {
            let why =
                "TCG, software emulation: /dev/kvm is there, but the processor shows neither vmx nor svm";
            assert!(line.contains(why), "{line}");
        }
    }
    // And so it is done: the hypervisor of a machine was told.
    let id = sleeper(home, "told");
    let directory = home.path().join("instances").join(&id);
    let told = fs::read_dir("/proc").unwrap().flatten().find_map(|entry| {
        let of_it = fs::read_link(entry.path().join("cwd")).is_ok_and(|cwd| cwd == directory);
        let words = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let words = String::from_utf8_lossy(&words).replace('\0', " ");
        (of_it && words.contains("qemu-system")).then_some(words)
    });
    let told = told.unwrap();
    let accelerator = if line.contains("TCG") { "tcg" } else { "kvm" };
    let other = if line.contains("TCG") { "kvm" } else { "tcg" };
    assert!(told.contains(accelerator) && !told.contains(&format!("accel={other}")), "{told}");
    home.ok(["rm", "-f", "told"]);
}
