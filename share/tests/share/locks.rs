//! Locks against others on the host.

use std::fs::File;
use std::os::fd::AsFd as _;
use std::path::Path;
use std::time::{Duration, Instant};

use kiln_share::{Options, Share};
use nix::fcntl::{FcntlArg, fcntl};
use nix::libc::{self, EBADF, EINTR, EINVAL, EISDIR, ENOLCK};

use crate::client::*;

const SHARED: u8 = 0;
const EXCLUSIVE: u8 = 1;
const UNLOCK: u8 = 2;
const WAIT: u32 = 1;

/// Somebody else on the host.
struct Other(File);

impl Other {
    fn new(path: &Path) -> Self {
        Self(File::options().read(true).write(true).open(path).unwrap())
    }

    fn set(&self, kind: libc::c_int, start: i64, length: i64) -> bool {
        let lock = libc::flock {
            l_type: kind as libc::c_short,
            l_whence: libc::SEEK_SET as libc::c_short,
            l_start: start,
            l_len: length,
            l_pid: 0,
        };
        fcntl(self.0.as_fd(), FcntlArg::F_OFD_SETLK(&lock)).is_ok()
    }

    /// Whether it could be locked; it is not.
    fn free(&self, kind: libc::c_int, start: i64, length: i64) -> bool {
        let free = self.set(kind, start, length);
        if free {
            assert!(self.set(libc::F_UNLCK, start, length));
        }
        free
    }
}

fn locked() -> (tempfile::TempDir, Client, Other) {
    let host = tempfile::tempdir().unwrap();
    std::fs::write(host.path().join("file"), "content").unwrap();
    let client = Client::new(&Share::directory(host.path(), Options::default()).unwrap());
    let other = Other::new(&host.path().join("file"));
    (host, client, other)
}

#[test]
fn what_the_guest_locks_nobody_on_the_host_can() {
    let (_host, mut client, other) = locked();
    let fid = client.open("file", O_RDWR).unwrap();
    assert_eq!(client.lock(fid, EXCLUSIVE, 0, 10, 10), Ok(0));
    assert!(!other.free(libc::F_RDLCK, 15, 1));
    assert!(other.free(libc::F_WRLCK, 0, 10) && other.free(libc::F_WRLCK, 20, 0), "only those bytes");
    assert_eq!(client.lock(fid, SHARED, 0, 12, 2), Ok(0));
    assert!(other.free(libc::F_RDLCK, 12, 2) && !other.free(libc::F_WRLCK, 12, 2), "weaker in the middle");
    assert!(!other.free(libc::F_RDLCK, 11, 1) && !other.free(libc::F_RDLCK, 14, 1));
    assert_eq!(client.lock(fid, UNLOCK, 0, 0, 15), Ok(0));
    assert!(other.free(libc::F_WRLCK, 0, 15) && !other.free(libc::F_WRLCK, 15, 1));
    client.clunk(fid).unwrap();
    assert!(other.free(libc::F_WRLCK, 0, 0), "a fid takes its locks along");
}

#[test]
fn what_others_have_locked_is_told() {
    let (_host, mut client, other) = locked();
    let fid = client.open("file", O_RDWR).unwrap();
    assert!(other.set(libc::F_WRLCK, 5, 5));
    assert_eq!(client.lock(fid, SHARED, 0, 0, 0), Ok(1), "blocked");
    assert!(other.free(libc::F_WRLCK, 0, 5), "and nothing of it is held");
    assert_eq!(client.lock(fid, SHARED, 0, 0, 5), Ok(0));
    let getlock = |kind: u8, start: u64, length: u64| {
        Body::new().u32(fid).u8(kind).u64(start).u64(length).u32(77).string("guest")
    };
    for (kind, start, length, expected) in [
        (SHARED, 0, 0, (EXCLUSIVE, 5, 5, 0, &b"host"[..])),
        (EXCLUSIVE, 7, 1, (EXCLUSIVE, 5, 5, 0, b"host")),
        (UNLOCK, 0, 0, (EXCLUSIVE, 5, 5, 0, b"host")),
        (EXCLUSIVE, 0, 5, (UNLOCK, 0, 5, 77, b"guest")),
        (EXCLUSIVE, 10, 0, (UNLOCK, 10, 0, 77, b"guest")),
    ] {
        let reply = client.call(GETLOCK, &getlock(kind, start, length)).unwrap();
        let mut reply = Parsed(&reply);
        let found = (reply.u8(), reply.u64(), reply.u64(), reply.u32(), reply.string());
        assert_eq!(found, expected, "{kind} {start} {length}");
    }
    assert!(other.set(libc::F_RDLCK, 5, 5));
    assert_eq!(client.lock(fid, SHARED, 0, 0, 0), Ok(0), "shared with the other");
    assert_eq!(client.lock(fid, EXCLUSIVE, 0, 0, 0), Ok(1));
    assert!(!other.set(libc::F_WRLCK, 5, 5), "the shared one is still held");
}

#[test]
fn two_fids_of_one_guest_never_lock_each_other_out_and_each_gives_up_its_own() {
    let (_host, mut client, other) = locked();
    let one = client.open("file", O_RDWR).unwrap();
    let two = client.open("file", O_RDONLY).unwrap();
    assert_eq!(client.lock(one, EXCLUSIVE, 0, 0, 100), Ok(0));
    assert_eq!(
        client.lock(two, EXCLUSIVE, 0, 50, 100),
        Ok(0),
        "even through one that only reads, as flock does it"
    );
    assert_eq!(client.lock(one, UNLOCK, 0, 0, 0), Ok(0));
    assert!(other.free(libc::F_WRLCK, 0, 50) && !other.free(libc::F_RDLCK, 50, 100));
    client.clunk(one).unwrap();
    assert!(!other.free(libc::F_RDLCK, 50, 100));
    client.clunk(two).unwrap();
    assert!(other.free(libc::F_WRLCK, 0, 0));
}

#[test]
fn a_lock_that_is_waited_for_comes_when_it_is_free() {
    let (_host, mut client, other) = locked();
    let fid = client.open("file", O_RDWR).unwrap();
    assert!(other.set(libc::F_WRLCK, 0, 0));
    client.send(LOCK, 1, &lock_body(fid, EXCLUSIVE, WAIT, 0, 0));
    // Others are served meanwhile.
    for _ in 0..20 {
        assert_eq!(client.read(fid, 0, 100).unwrap(), b"content");
    }
    assert!(other.set(libc::F_UNLCK, 0, 0));
    let reply = client.receive();
    assert_eq!((reply.tag, outcome(LOCK, reply).unwrap()), (1, vec![0]));
    assert!(!other.free(libc::F_RDLCK, 0, 0));
}

#[test]
fn waiting_ends_with_a_flush_a_new_version_and_the_stream() {
    let (_host, mut client, other) = locked();
    let fid = client.open("file", O_RDWR).unwrap();
    assert!(other.set(libc::F_WRLCK, 0, 0));
    let begun = Instant::now();
    client.send(LOCK, 1, &lock_body(fid, EXCLUSIVE, WAIT, 0, 0));
    client.send(FLUSH, 2, &Body::new().u16(1));
    client.send(FLUSH, 3, &Body::new().u16(2));
    let replies: Vec<Message> = (0..3).map(|_| client.receive()).collect();
    assert_eq!(replies.iter().map(|reply| reply.tag).collect::<Vec<_>>(), [1, 2, 3], "in this order");
    assert!(matches!(outcome(LOCK, replies[0].clone()), Err(EINTR)) || replies[0].body == [1]);
    assert_eq!(replies[2].kind, FLUSH + 1);
    client.send(LOCK, 4, &lock_body(fid, EXCLUSIVE, WAIT, 0, 0));
    client.send(VERSION, u16::MAX, &Body::new().u32(8192).string("9P2000.L"));
    assert_eq!([client.receive().tag, client.receive().tag], [4, u16::MAX]);
    client.attach(ROOT, 0).unwrap();
    let fid = client.open("file", O_RDWR).unwrap();
    client.send(LOCK, 5, &lock_body(fid, EXCLUSIVE, WAIT, 0, 0));
    client.close().unwrap();
    assert!(begun.elapsed() < Duration::from_secs(10), "nothing waited for its time to run out");
    assert!(other.set(libc::F_UNLCK, 0, 0) && other.free(libc::F_WRLCK, 0, 0), "and nothing is held");
}

#[test]
fn as_many_waits_as_there_are_do_not_hold_up_the_rest() {
    let (_host, mut client, other) = locked();
    let fid = client.open("file", O_RDWR).unwrap();
    assert!(other.set(libc::F_WRLCK, 0, 0));
    for tag in 100..140 {
        client.send(LOCK, tag, &lock_body(fid, EXCLUSIVE, WAIT, 0, 0));
    }
    client.send(READ, 1, &Body::new().u32(fid).u64(0).u32(100));
    let mut blocked = 0;
    while client.receive().tag != 1 {
        blocked += 1;
    }
    assert!(blocked >= 30, "those that may not wait are told so at once, not {blocked}");
    for tag in 100..140 {
        client.send(FLUSH, tag + 100, &Body::new().u16(tag));
    }
    let mut rest = 80 - blocked;
    while rest > 0 {
        client.receive();
        rest -= 1;
    }
}

#[test]
fn what_cannot_be_locked_is_refused_and_there_are_only_so_many() {
    let (host, mut client, other) = locked();
    std::fs::create_dir(host.path().join("directory")).unwrap();
    let file = client.open("file", O_RDWR).unwrap();
    let directory = client.open("directory", O_RDONLY).unwrap();
    for (fid, kind, start, length, expected) in [
        (ROOT, SHARED, 0, 0, EBADF),
        (99, SHARED, 0, 0, EBADF),
        (directory, SHARED, 0, 0, EISDIR),
        (file, 3, 0, 0, EINVAL),
        (file, SHARED, 1 << 63, 1, EINVAL),
        (file, SHARED, u64::MAX, u64::MAX, libc::EOVERFLOW),
    ] {
        let done = client.lock(fid, kind, 0, start, length);
        assert_eq!(done, Err(expected), "{fid} {kind} {start} {length}");
    }
    let mut held = 0;
    let refused = loop {
        match client.lock(file, SHARED, 0, held * 2, 1) {
            Ok(0) => held += 1,
            other => break other,
        }
    };
    assert_eq!((held, refused), (4096, Err(ENOLCK)));
    assert_eq!(client.lock(file, UNLOCK, 0, 0, 0), Ok(0), "giving up always goes");
    assert!(other.free(libc::F_WRLCK, 0, 0));
}
