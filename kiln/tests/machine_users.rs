//! Machines of an ordinary user, who has no rights at all on this host: real kernels under QEMU (with TCG where there is no KVM).

mod common;

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::time::Duration;

use common::place::Place;
use common::{Ended, IMAGE, finish_within, until};

const VM: [&str; 3] = ["--vm", "--memory", "256m"];

/// Runs a command that must succeed, and may have to make a template first.
#[track_caller]
fn patiently(place: &Place, words: &[&str]) -> Ended {
    let ended = finish_within(place.command(words), Duration::from_secs(240));
    assert_eq!(ended.code, 0, "{words:?}: {ended:?}");
    ended
}

#[test]
fn an_ordinary_user_has_machines_with_forks_snapshots_ports_and_volumes() {
    if kiln_fixtures::require("qemu-system-x86_64").is_none() {
        return;
    }
    let (Some(package), Some(place)) = (kiln_fixtures::debian_kernel(), Place::of_user()) else { return };
    let user = place.user.as_ref().unwrap().0.clone();

    // Without a kernel the one command to run is named, and nothing is left of the try.
    let run = |flags: &[&'static str], command: &[&'static str]| -> Vec<&'static str> {
        [&["run"], &VM[..], flags, &[IMAGE], command].concat()
    };
    let refused = place.kiln(&run(&["--rm"], &["true"]));
    assert_eq!(refused.code, 125, "{refused:?}");
    assert!(refused.stderr.ends_with("hint: install one: kiln kernel install\n"), "{refused:?}");
    assert_eq!(place.ok(&["ps", "-a", "-q"]), "");
    patiently(&place, &["kernel", "install", "--from", package.to_str().unwrap()]);
    let first = patiently(&place, &run(&["--rm"], &["sh", "-c", "id -u; touch /of-root; uname -s"]));
    assert_eq!(first.stdout, "0\nLinux\n", "whoever made it, root in it is root");

    let shared = place.beside("shared");
    fs::create_dir(&shared).unwrap();
    std::os::unix::fs::chown(&shared, Some(user.uid), Some(user.gid)).unwrap();
    let secret = place.root.beside("secret");
    fs::write(&secret, "of root\n").unwrap();
    fs::set_permissions(&secret, std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
    let share = format!("{}:/shared", shared.display());
    let words = ["-d", "--name", "dev", "-v", &share, "-v", "named:/named", "-p", "127.0.0.1:0:8080"];
    let script = "mkdir /www; echo published > /www/index.html; httpd -p 8080 -h /www; exec sleep 600";
    place.ok(&[&["run"], &VM[..], &words, &[IMAGE, "sh", "-c", script]].concat());
    let sh = |name: &str, script: &str| place.ok(&["exec", name, "sh", "-c", script]);

    // What root in the machine writes to a directory of the user is the user's, and no more can be done than he could.
    assert_eq!(
        sh("dev", "echo written > /shared/f; echo kept > /named/f; cat /shared/f /named/f"),
        "written\nkept"
    );
    assert_eq!(fs::read_to_string(shared.join("f")).unwrap(), "written\n");
    assert_eq!(shared.join("f").metadata().unwrap().uid(), user.uid);
    std::os::unix::fs::symlink(&secret, shared.join("link")).unwrap();
    let peek = place.kiln(&["exec", "dev", "cat", "/shared/link"]);
    assert!(peek.code != 0 && peek.stdout.is_empty(), "{peek:?}");

    let port = place.ok(&["port", "dev"]);
    let address = format!("http://{}/", port.rsplit(' ').next().unwrap());
    until("the port answers", || {
        let answer = std::process::Command::new("curl").args(["-s", &address]).output().unwrap();
        answer.stdout == b"published\n"
    });

    // Copies: with memory, of the disk, and of a moment.
    sh("dev", "echo first > /kept; echo first > /dev/shm/kept");
    place.ok(&["snapshot", "create", "--memory", "dev", "moment"]);
    place.ok(&["fork", "dev", "live"]);
    assert_eq!(sh("live", "cat /kept /dev/shm/kept /named/f"), "first\nfirst\nkept");
    assert_ne!(sh("live", "hostname"), sh("dev", "hostname"));
    place.ok(&["stop", "-t", "0", "dev"]);
    place.ok(&["fork", "dev", "still"]);
    place.ok(&["start", "still"]);
    assert_eq!(sh("still", "cat /kept; ls /dev/shm"), "first");
    place.ok(&["start", "dev"]);
    sh("dev", "echo second > /kept");
    place.ok(&["snapshot", "restore", "--force", "dev", "moment"]);
    place.ok(&["start", "dev"]);
    assert_eq!(sh("dev", "cat /kept /dev/shm/kept"), "first\nfirst");
    place.ok(&["pause", "dev"]);
    place.ok(&["resume", "dev"]);
    place.ok(&["resize", "dev", "--disk", "20g"]);
    place.ok(&["commit", "dev", "localhost/made:1"]);
    assert_eq!(place.ok(&["run", "--rm", "--network", "none", "localhost/made:1", "cat", "/kept"]), "first");
    place.ok(&["rm", "-f", "dev", "live", "still"]);
    place.ok(&["volume", "rm", "named"]);
    let left = fs::read_dir(place.home().join("instances")).unwrap().flatten().map(|entry| entry.file_name());
    let left: Vec<_> = left.filter(|name| name.len() == 64).collect();
    assert!(left.is_empty(), "{left:?}");
}
