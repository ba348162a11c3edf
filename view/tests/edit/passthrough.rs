//! Who reads the bytes of a file: the kernel by itself, or the server. A server that is stopped answers nothing.

use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::process::Command;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};

use crate::ground::{Backend, Edited, Ground, as_ordinary_user, with_ground};

/// A server that answers nothing until this is dropped.
struct Stopped(Pid);

impl Stopped {
    fn of(mounted: &Edited) -> Self {
        let pid = mounted.server().unwrap();
        let stopped = Self(Pid::from_raw(pid.cast_signed()).unwrap());
        kill_process(stopped.0, Signal::STOP).unwrap();
        let stat = || fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
        while !stat().contains(") T ") {
            std::thread::sleep(Duration::from_millis(5));
        }
        stopped
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        kill_process(self.0, Signal::CONT).unwrap();
    }
}

/// What a file has, by read(2) or through a mapping.
fn read(file: File, length: usize, mapped: bool) -> Receiver<Vec<u8>> {
    let (told, bytes) = channel();
    std::thread::spawn(move || {
        let read = if mapped {
            // SAFETY: nobody shortens the file.
            unsafe { memmap2::MmapOptions::new().len(length).map(&file) }.unwrap().to_vec()
        } else {
            let mut bytes = vec![0; length];
            file.read_exact_at(&mut bytes, 0).unwrap();
            bytes
        };
        let _ = told.send(read);
    });
    bytes
}

/// Whether this kernel can read objects by itself.
fn kernel_passes_through() -> bool {
    let release = rustix::system::uname().release().to_string_lossy().into_owned();
    let numbers: Vec<u32> = release.split(['.', '-']).map_while(|part| part.parse().ok()).collect();
    if numbers < vec![6, 9] {
        kiln_fixtures::skip("FUSE passthrough needs Linux 6.9");
        return false;
    }
    // Where it is not told, it is as by default.
    let config = Command::new("zcat").arg("/proc/config.gz").output().unwrap();
    let without = config.status.success()
        && !String::from_utf8_lossy(&config.stdout).contains("CONFIG_FUSE_PASSTHROUGH=y");
    if without {
        kiln_fixtures::skip("this kernel was built without FUSE passthrough");
    }
    !without
}

fn large(ground: &Ground) -> Vec<u8> {
    fs::read(ground.at("plain/a/large")).unwrap()
}

#[test]
fn the_kernel_reads_the_files_of_roots_views_without_the_server() {
    if !kernel_passes_through() {
        return;
    }
    with_ground(|ground| {
        let mounted = Edited::Fuse(ground.serve(None));
        for (name, mapped) in [("a/large", false), ("b/large", true)] {
            let file = File::open(ground.at("view").join(name)).unwrap();
            let (stopped, bytes) = (Stopped::of(&mounted), large(ground));
            let read = read(file, bytes.len(), mapped).recv_timeout(Duration::from_secs(20));
            drop(stopped);
            assert!(read.unwrap_or_else(|_| panic!("{name} is read by the server")) == bytes, "{name}");
        }
        mounted.unmount().unwrap();
    });
}

#[test]
fn the_server_reads_the_same_for_an_ordinary_user() {
    as_ordinary_user("passthrough::the_server_reads_the_same_for_an_ordinary_user", |directory| {
        let ground = Ground::new(directory, true, 0, Backend::Fuse);
        let mounted = Edited::Fuse(ground.serve(None));
        for (name, mapped) in [("a/large", false), ("b/large", true)] {
            let file = File::open(ground.at("view").join(name)).unwrap();
            let (stopped, bytes) = (Stopped::of(&mounted), large(&ground));
            let read = read(file, bytes.len(), mapped);
            assert_eq!(
                read.recv_timeout(Duration::from_millis(300)),
                Err(RecvTimeoutError::Timeout),
                "{name}"
            );
            drop(stopped);
            assert!(read.recv_timeout(Duration::from_secs(20)).unwrap() == bytes, "{name}");
        }
        mounted.unmount().unwrap();
    });
}
