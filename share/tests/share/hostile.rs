//! Streams that are no 9P, and guests that want everything.

use std::fs;
use std::io::{Read as _, Write as _};
use std::os::unix::fs::symlink;
use std::time::Duration;

use kiln_share::{Options, Share, ShareError};
use nix::libc::{EBADF, EBUSY, EMFILE, ENOBUFS, EOPNOTSUPP, EPROTO};

use crate::client::*;

fn empty() -> (tempfile::TempDir, Share) {
    let host = tempfile::tempdir().unwrap();
    let share = Share::directory(host.path(), Options::default()).unwrap();
    (host, share)
}

#[test]
fn broken_framing_ends_the_session_with_an_error() {
    let (_host, share) = empty();
    for (name, bytes, expected) in [
        ("a size below the header's", &[6, 0, 0, 0][..], "6 bytes"),
        ("no size at all", &[0, 0, 0, 0, 100, 0, 0], "0 bytes"),
        ("four gigabytes", &[0xff, 0xff, 0xff, 0xff, 118, 0, 0], "4294967295 bytes"),
        ("more than was agreed on", &[1, 0, 16, 0, 118, 0, 0], "1048577 bytes"),
        ("the end within a size", &[7, 0], "reading a request"),
        ("the end within a header", &[7, 0, 0, 0, 120], "reading a request"),
        ("the end within a body", &[11, 0, 0, 0, 120, 0, 0, 1], "reading a request"),
    ] {
        let mut client = Client::new(&share);
        client.stream.write_all(bytes).unwrap();
        client.stream.shutdown(std::net::Shutdown::Write).unwrap();
        assert_eq!(client.try_receive(), None, "{name}");
        let message = client.ended().unwrap_err().to_string();
        assert!(message.contains(expected), "{name}: {message}");
    }
    let mut client = Client::silent(&share);
    client.stream.write_all(&[1, 32, 0, 0, 100, 0xff, 0xff]).unwrap();
    assert!(matches!(client.ended(), Err(ShareError::Framing { size: 8193, limit: 8192, .. })));
    let client = Client::silent(&share);
    client.stream.shutdown(std::net::Shutdown::Write).unwrap();
    client.ended().unwrap();
}

#[test]
fn what_is_not_understood_is_refused_and_the_session_goes_on() {
    let (_host, share) = empty();
    let mut client = Client::new(&share);
    for kind in 0..=u8::MAX {
        if kind == VERSION {
            continue;
        }
        client.send(kind, 3, &Body::new());
        let reply = client.receive();
        assert_eq!((reply.kind, reply.tag), (7, 3), "{kind}");
        let known = [
            STATFS,
            LOPEN,
            LCREATE,
            SYMLINK,
            MKNOD,
            RENAME,
            READLINK,
            GETATTR,
            SETATTR,
            XATTRWALK,
            XATTRCREATE,
            READDIR,
            FSYNC,
            LOCK,
            GETLOCK,
            LINK,
            MKDIR,
            RENAMEAT,
            UNLINKAT,
            AUTH,
            ATTACH,
            FLUSH,
            WALK,
            READ,
            WRITE,
            CLUNK,
            REMOVE,
        ];
        let expected = if known.contains(&kind) { EPROTO } else { EOPNOTSUPP };
        assert_eq!(Parsed(&reply.body).u32(), expected as u32, "{kind}");
    }
    let long = Body::new().u32(ROOT).u8(0);
    assert_eq!(client.call(CLUNK, &long), Err(EPROTO), "a byte too many");
    let lying = Body::new().u32(ROOT).u64(0).u32(1000).bytes(b"not a thousand");
    assert_eq!(client.call(WRITE, &lying), Err(EPROTO));
    let seventeen = ["a"; 17];
    assert_eq!(client.walk(ROOT, 1, &seventeen), Err(EPROTO));
    assert_eq!(client.clunk(12345), Err(EBADF));
    assert!(client.getattr(ROOT).is_ok());
    client.close().unwrap();
}

#[test]
fn a_tag_in_use_is_refused_and_the_request_that_has_it_goes_on() {
    let (host, share) = empty();
    fs::write(host.path().join("file"), "").unwrap();
    let other = fs::File::options().write(true).open(host.path().join("file")).unwrap();
    let lock = |kind| {
        let whole = nix::libc::flock { l_type: kind, l_whence: 0, l_start: 0, l_len: 0, l_pid: 0 };
        nix::fcntl::fcntl(&other, nix::fcntl::FcntlArg::F_OFD_SETLK(&whole)).unwrap();
    };
    lock(nix::libc::F_WRLCK as i16);
    let mut client = Client::new(&share);
    let fid = client.open("file", O_RDWR).unwrap();
    client.send(LOCK, 1, &lock_body(fid, 1, 1, 0, 0));
    client.send(GETATTR, 1, &Body::new().u32(ROOT).u64(0));
    let reply = client.receive();
    assert_eq!((reply.kind, reply.tag, Parsed(&reply.body).u32()), (7, 1, EBUSY as u32));
    lock(nix::libc::F_UNLCK as i16);
    let reply = client.receive();
    assert_eq!((reply.kind, reply.tag, &*reply.body), (LOCK + 1, 1, &[0][..]));
}

#[test]
fn fids_and_values_are_only_so_many() {
    let host = tempfile::tempdir().unwrap();
    fs::write(host.path().join("file"), "").unwrap();
    xattr::set(host.path().join("file"), "user.large", &[7; 2048]).unwrap();
    let options = Options { fids: 16, ..Options::default() };
    let mut client = Client::new(&Share::directory(host.path(), options).unwrap());
    for fid in 1..16 {
        client.walk(ROOT, fid, &["file"]).unwrap();
    }
    assert_eq!(client.walk(ROOT, 16, &["file"]), Err(EMFILE));
    assert_eq!(client.attach(16, 0), Err(EMFILE));
    client.clunk(1).unwrap();
    client.walk(ROOT, 16, &["file"]).unwrap();

    let mut client = Client::new(&Share::directory(host.path(), Options::default()).unwrap());
    client.walk(ROOT, 1, &["file"]).unwrap();
    let walk = |new: u32| Body::new().u32(1).u32(new).string("user.large");
    let mut values = 0;
    let refused = loop {
        match client.call(XATTRWALK, &walk(2 + values)) {
            Ok(_) => values += 1,
            Err(error) => break error,
        }
    };
    assert_eq!((values, refused), (2048, ENOBUFS), "four megabytes of values");
    client.clunk(2).unwrap();
    client.call(XATTRWALK, &walk(2)).unwrap();
    let promise = |fid: u32| Body::new().u32(fid).string("user.x").u64(65536).u32(0);
    client.walk(ROOT, 1 << 16, &["file"]).unwrap();
    assert_eq!(client.call(XATTRCREATE, &promise(1 << 16)), Err(ENOBUFS), "promised ones count too");
}

#[test]
fn a_guest_that_reads_no_replies_is_not_read_from_either() {
    let (host, share) = empty();
    fs::write(host.path().join("file"), vec![1; 1 << 20]).unwrap();
    let mut client = Client::new(&share);
    let fid = client.open("file", O_RDONLY).unwrap();
    client.stream.set_write_timeout(Some(Duration::from_millis(300))).unwrap();
    let body = Body::new().u32(fid).u64(0).u32(1 << 20);
    let mut frame = 23_u32.to_le_bytes().to_vec();
    frame.extend([READ, 0, 0]);
    frame.extend(&body.0);
    let mut sent = 0;
    while client.stream.write_all(&frame).is_ok() {
        sent += 1;
        assert!(sent < 1 << 20, "the server reads without end");
    }
    client.close().unwrap_err();
}

#[test]
fn a_guest_that_only_stops_reading_ends_the_session_with_the_next_request() {
    let (_host, share) = empty();
    let mut client = Client::new(&share);
    client.stream.shutdown(std::net::Shutdown::Read).unwrap();
    client.send(GETATTR, 1, &Body::new().u32(ROOT).u64(0));
    // It may be gone after the first.
    while client.stream.write_all(&[11, 0, 0, 0, CLUNK, 3, 0, 0, 0, 0, 0]).is_ok() {}
    let error = client.ended().unwrap_err();
    assert!(matches!(error, ShareError::Stream { action: "writing a reply", .. }), "{error}");
}

/// A generator of numbers that gives the same ones every time (xorshift64*).
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }

    fn one_of<T: Copy>(&mut self, all: &[T]) -> T {
        all[self.below(all.len() as u64) as usize]
    }
}

/// A request that is right in form and anything in content: few fids and names, so that they meet.
fn request(numbers: &mut Numbers) -> (u8, Body) {
    const NAMES: [&[u8]; 10] = [b"a", b"b", b"c", b"d", b"out", b"..", b".", b"", b"a/b", b"user.x"];
    let kind = numbers.one_of(&[
        STATFS,
        LOPEN,
        LCREATE,
        SYMLINK,
        MKNOD,
        RENAME,
        READLINK,
        GETATTR,
        SETATTR,
        XATTRWALK,
        XATTRCREATE,
        READDIR,
        FSYNC,
        LOCK,
        GETLOCK,
        LINK,
        MKDIR,
        RENAMEAT,
        UNLINKAT,
        ATTACH,
        WALK,
        WALK,
        WALK,
        READ,
        WRITE,
        CLUNK,
        REMOVE,
        FLUSH,
    ]);
    let fid = numbers.below(12) as u32;
    let other = numbers.below(12) as u32;
    let name = numbers.one_of(&NAMES);
    let any = numbers.next();
    let flags = numbers.one_of(&[0, 1, 2, 3, 0o1001, 0o1002, 0o102, 0o302, 0o2001, any as u32]);
    let small = numbers.one_of(&[0, 1, 7, 4096, 65536, 1 << 33, u64::MAX, any]);
    let mode = numbers.one_of(&[0o644, 0o100_755, 0o10_644, 0o20_666, 0o140_600, any as u32]);
    let b = Body::new();
    let body = match kind {
        SETATTR => {
            // Any combination, but sizes that hold on any disk.
            let size = numbers.below(1 << 20);
            let bits = any as u32 & 0x1ff;
            let (uid, gid) = (numbers.below(3) as u32, numbers.below(3) as u32);
            b.u32(fid).u32(bits).u32(mode).u32(uid).u32(gid).u64(size).u64(any).u64(small).u64(any).u64(small)
        }
        LOPEN => b.u32(fid).u32(flags),
        LCREATE => b.u32(fid).string(name).u32(flags).u32(mode).u32(0),
        SYMLINK => {
            let target = numbers.one_of(&[&b"../outside"[..], b"/", b"a", b".."]);
            b.u32(fid).string(name).string(target).u32(0)
        }
        MKNOD => b.u32(fid).string(name).u32(mode).u32(1).u32(3).u32(0),
        RENAME => b.u32(fid).u32(other).string(name),
        GETATTR => b.u32(fid).u64(any),
        XATTRWALK => b.u32(fid).u32(other).string(name),
        XATTRCREATE => {
            b.u32(fid).string(name).u64(numbers.one_of(&[0, 1, 7, 65536, any])).u32(any as u32 & 3)
        }
        READDIR | READ => b.u32(fid).u64(small).u32(numbers.one_of(&[0, 30, 4096, u32::MAX])),
        FSYNC => b.u32(fid).u32(1),
        LOCK => b.u32(fid).u8(any as u8 & 3).u32(0).u64(small).u64(any >> 40).u32(1).string(name),
        GETLOCK => b.u32(fid).u8(any as u8 & 3).u64(small).u64(any >> 40).u32(1).string(name),
        LINK => b.u32(fid).u32(other).string(name),
        MKDIR => b.u32(fid).string(name).u32(mode).u32(0),
        RENAMEAT => b.u32(fid).string(name).u32(other).string(numbers.one_of(&NAMES)),
        UNLINKAT => b.u32(fid).string(name).u32(numbers.one_of(&[0, 0x200, any as u32])),
        ATTACH => b.u32(fid).u32(NONE).string("").string("").u32(numbers.below(3) as u32),
        WALK => {
            let names: Vec<_> = (0..numbers.below(4)).map(|_| numbers.one_of(&NAMES)).collect();
            names.iter().fold(b.u32(fid).u32(other).u16(names.len() as u16), Body::string)
        }
        WRITE => b.u32(fid).u64(small & 0xfffff).data(&vec![any as u8; numbers.below(9000) as usize]),
        FLUSH => b.u16(any as u16 & 7),
        _ => b.u32(fid),
    };
    (kind, body)
}

/// Whatever comes, the server answers or ends, in time, with nothing changed outside. Seeded, so that a failure can be
/// had again: the seed is in the message.
#[test]
fn random_and_mutated_streams_neither_panic_nor_hang_nor_leave_the_share() {
    let host = tempfile::tempdir().unwrap();
    let shared = host.path().join("shared");
    fs::create_dir(&shared).unwrap();
    fs::create_dir(host.path().join("outside")).unwrap();
    fs::write(host.path().join("outside/a"), "untouched").unwrap();
    let mut answers = [0_u64; 2];
    for seed in 1..=60_u64 {
        let mut numbers = Numbers(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        symlink("../outside", shared.join("out")).ok();
        let options = Options { requests: 1 + (seed % 4) as usize, fids: 16, ..Options::default() };
        let share = Share::directory(&shared, options).unwrap();
        let client = Client::new(&share);
        // Every third stream is broken in some byte, sizes included.
        let broken = seed % 3 == 0;
        let mut stream = Vec::new();
        for number in 0..800_u32 {
            let (kind, body) = request(&mut numbers);
            let size = u32::try_from(body.0.len() + 7).unwrap();
            let from = stream.len();
            stream.extend(size.to_le_bytes());
            stream.push(kind);
            stream.extend((number as u16 & 7).to_le_bytes());
            stream.extend(body.0);
            if broken && numbers.below(20) == 0 {
                let place = from + 4 + numbers.below((stream.len() - from - 4) as u64) as usize;
                stream[place] ^= 1 << numbers.below(8);
            }
        }
        if broken {
            let place = numbers.below(stream.len() as u64) as usize;
            stream[place] = numbers.next() as u8;
        }
        let mut reading = client.stream.try_clone().unwrap();
        reading.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
        let writing = client.stream.try_clone().unwrap();
        let replies = std::thread::scope(|scope| {
            scope.spawn(move || {
                let mut writing = writing;
                // The server may have ended it.
                let _ = writing.write_all(&stream);
                let _ = writing.shutdown(std::net::Shutdown::Write);
            });
            let mut replies = Vec::new();
            // A reset is an end too; only silence is not.
            if let Err(error) = reading.read_to_end(&mut replies) {
                assert_ne!(error.kind(), std::io::ErrorKind::WouldBlock, "seed {seed}: no end");
            }
            replies
        });
        let ended = client.ended();
        assert!(ended.is_ok() || broken, "seed {seed}: {ended:?}");
        let mut rest = &replies[..];
        while let [a, b, c, d, kind, ..] = *rest {
            let size = u32::from_le_bytes([a, b, c, d]) as usize;
            if size > rest.len() {
                assert!(broken, "seed {seed}: a reply of {size} bytes, of which {} came", rest.len());
                break;
            }
            answers[usize::from(kind == 7)] += 1;
            rest = &rest[size..];
        }
        assert_eq!(fs::read_to_string(host.path().join("outside/a")).unwrap(), "untouched", "seed {seed}");
        assert_eq!(fs::read_dir(host.path().join("outside")).unwrap().count(), 1, "seed {seed}");
        assert_eq!(fs::read_dir(host.path()).unwrap().count(), 2, "seed {seed}");
    }
    assert!(answers.iter().all(|count| *count > 3000), "both kinds of answers were met: {answers:?}");
}
