//! Every message but those that change names and extended attributes, and what it does on the host.

use std::fs;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, PermissionsExt as _, symlink};
use std::path::Path;

use kiln_share::{Options, Share};
use nix::libc::{
    EBADF, EBUSY, EEXIST, EINVAL, EISDIR, ELOOP, EMSGSIZE, ENAMETOOLONG, ENOENT, ENOTDIR, EOPNOTSUPP, EPROTO,
};

use crate::client::*;

/// A directory with one of each, shared.
pub(crate) fn shared() -> (tempfile::TempDir, Client) {
    let host = tempfile::tempdir().unwrap();
    fs::create_dir_all(host.path().join("directory/deep/deeper")).unwrap();
    fs::write(host.path().join("file"), "content").unwrap();
    fs::write(host.path().join("directory/inner"), "inside").unwrap();
    symlink("directory/inner", host.path().join("link")).unwrap();
    let share = Share::directory(host.path(), Options::default()).unwrap();
    let client = Client::new(&share);
    (host, client)
}

pub(crate) fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap()
}

#[test]
fn the_version_is_agreed_on_and_begins_a_session_anew() {
    let host = tempfile::tempdir().unwrap();
    let options = Options { message_size: 65536, ..Options::default() };
    let mut client = Client::silent(&Share::directory(host.path(), options).unwrap());
    assert_eq!(client.attach(ROOT, 0), Err(EPROTO), "before a version");
    for (size, version, expected) in [
        (1 << 20, "9P2000.L", Ok((65536, "9P2000.L"))),
        (8192, "9P2000.L", Ok((8192, "9P2000.L"))),
        (u32::MAX, "9P2000.L", Ok((65536, "9P2000.L"))),
        (8192, "9P2000.u", Ok((8192, "unknown"))),
        (8192, "9P2000", Ok((8192, "unknown"))),
        (8192, "", Ok((8192, "unknown"))),
        (4095, "9P2000.L", Err(EMSGSIZE)),
        (0, "9P2000.L", Err(EMSGSIZE)),
    ] {
        let expected = expected.map(|(size, version)| (size, version.as_bytes().to_vec()));
        assert_eq!(client.version(size, version.as_bytes()), expected, "{size} {version}");
        let attached = client.attach(ROOT, 0).is_ok();
        assert_eq!(attached, expected.is_ok_and(|(_, version)| version == b"9P2000.L"), "{size} {version}");
    }
    client.version(8192, b"9P2000.L").unwrap();
    assert_eq!(client.getattr(ROOT), Err(EBADF), "fids do not outlive it");
    client.close().unwrap();
}

#[test]
fn attaching_gives_the_root_and_needs_no_authentication() {
    let (host, mut client) = shared();
    let body =
        |fid: u32, auth: u32, tree: &str| Body::new().u32(fid).u32(auth).string("u").string(tree).u32(0);
    for (fid, auth, tree, expected) in [
        (1, NONE, "", Ok(())),
        (2, NONE, "/", Ok(())),
        (2, NONE, "/", Err(EBADF)),
        (3, 1, "", Err(EOPNOTSUPP)),
        (3, NONE, "/etc", Err(ENOENT)),
        (3, NONE, "..", Err(ENOENT)),
    ] {
        let attached = client.call(ATTACH, &body(fid, auth, tree)).map(|reply| {
            let qid = Parsed(&reply).qid();
            assert_eq!((qid.kind, qid.path), (0x80, host.path().metadata().unwrap().ino()));
        });
        assert_eq!(attached, expected, "{fid} {auth} {tree}");
    }
    let auth = Body::new().u32(5).string("u").string("").u32(0);
    assert_eq!(client.call(AUTH, &auth), Err(EOPNOTSUPP));
}

#[test]
fn a_walk_goes_as_far_as_there_are_names() {
    let (host, mut client) = shared();
    let inode = |path: &str| host.path().join(path).symlink_metadata().unwrap().ino();
    let long = "x".repeat(256);
    let found = client.walk(ROOT, 1, &["directory", "deep", "deeper"]).unwrap();
    let paths: Vec<(u8, u64)> = found.iter().map(|qid| (qid.kind, qid.path)).collect();
    assert_eq!(
        paths,
        [(0x80, inode("directory")), (0x80, inode("directory/deep")), (0x80, inode("directory/deep/deeper"))]
    );
    assert_eq!(client.walk(ROOT, 2, &["link"]).unwrap()[0].kind, 2, "a symbolic link itself");
    assert_eq!(client.walk(ROOT, 3, &["file"]).unwrap()[0].kind, 0);
    for (from, new, names, expected) in [
        (ROOT, 10, &["none"][..], Err(ENOENT)),
        (ROOT, 10, &["directory", "none", "x"], Ok(1)),
        (ROOT, 10, &["link", "inner"], Ok(1)),
        (ROOT, 10, &["file", "x"], Ok(1)),
        (3, 10, &["x"], Err(ENOTDIR)),
        (ROOT, 10, &[""], Err(ENOENT)),
        (ROOT, 10, &["."], Err(EINVAL)),
        (ROOT, 10, &[&long], Err(ENAMETOOLONG)),
        (99, 10, &["file"], Err(EBADF)),
        (ROOT, 3, &["file"], Err(EBADF)),
    ] {
        let walked = client.walk(from, new, names).map(|qids| qids.len());
        assert_eq!(walked, expected, "{from} {new} {names:?}");
        assert_eq!(client.getattr(10), Err(EBADF), "{names:?} leaves no fid");
    }
    assert_eq!(client.walk::<&str>(1, 11, &[]).unwrap(), [], "a copy");
    assert_eq!(client.getattr(11).unwrap().qid, found[2]);
    client.walk(1, 1, &["none"]).unwrap_err();
    assert_eq!(client.getattr(1).unwrap().qid, found[2], "a failed walk onto itself moves nothing");
    client.walk(ROOT, 12, &["directory"]).unwrap();
    client.walk(12, 12, &["deep"]).unwrap();
    assert_eq!(client.getattr(12).unwrap().qid.path, inode("directory/deep"));
    client.lopen(12, O_RDONLY).unwrap();
    assert_eq!(client.walk(12, 12, &["deeper"]), Err(EBUSY), "an open fid stays where it is");
    assert_eq!(client.walk(12, 13, &["deeper"]).map(|qids| qids.len()), Ok(1));
}

#[test]
fn files_are_opened_as_the_flags_say() {
    let (_host, mut client) = shared();
    for (path, flags, expected) in [
        ("file", O_RDONLY, Ok(())),
        ("file", O_RDWR, Ok(())),
        ("file", O_WRONLY | O_APPEND, Ok(())),
        ("file", 3, Err(EINVAL)),
        ("file", O_RDONLY | O_DIRECTORY, Err(ENOTDIR)),
        ("directory", O_RDONLY, Ok(())),
        ("directory", O_RDONLY | O_DIRECTORY, Ok(())),
        ("directory", O_WRONLY, Err(EISDIR)),
        ("link", O_RDONLY, Err(ELOOP)),
    ] {
        assert_eq!(client.open(path, flags).map(|_| ()), expected, "{path} {flags:o}");
    }
    let fid = client.fid("file").unwrap();
    let (qid, unit) = client.lopen(fid, O_RDONLY).unwrap();
    assert_eq!(qid, client.getattr(fid).unwrap().qid);
    assert_eq!(unit, (1 << 20) - 4096, "whole pages");
    assert_eq!(client.lopen(fid, O_RDONLY), Err(EBUSY), "twice");
}

#[test]
fn data_are_read_and_written_where_the_offset_says() {
    let (host, mut client) = shared();
    let file = client.open("file", O_RDWR).unwrap();
    assert_eq!(client.read(file, 0, 100).unwrap(), b"content");
    assert_eq!(client.read(file, 3, 2).unwrap(), b"te");
    assert_eq!(client.read(file, 7, 1).unwrap(), b"", "the end");
    assert_eq!(client.read(file, u64::MAX, 1), Err(EINVAL));
    assert_eq!(client.write(file, 3, b"TENT AND MORE"), Ok(13));
    assert_eq!(read(&host.path().join("file")), "conTENT AND MORE");
    let large: Vec<u8> = (0..(1 << 20) - 4096_u32).map(|number| (number % 251) as u8).collect();
    assert_eq!(client.write(file, 0, &large), Ok(large.len() as u32));
    assert_eq!(
        client.read(file, 0, u32::MAX).unwrap(),
        large,
        "as much as fits, not as much as is asked for"
    );

    let only_read = client.open("file", O_RDONLY).unwrap();
    assert_eq!(client.write(only_read, 0, b"x"), Err(EBADF));
    let only_write = client.open("file", O_WRONLY | O_TRUNC).unwrap();
    assert_eq!(client.read(only_write, 0, 1), Err(EBADF));
    assert_eq!(read(&host.path().join("file")), "");
    let directory = client.open("directory", O_RDONLY).unwrap();
    assert_eq!(client.read(directory, 0, 1), Err(EISDIR));
    let unopened = client.fid("file").unwrap();
    assert_eq!(client.read(unopened, 0, 1), Err(EBADF));
    assert_eq!(client.write(unopened, 0, b"x"), Err(EBADF));
}

#[test]
fn appending_goes_to_the_end_wherever_it_is() {
    let (host, mut client) = shared();
    let one = client.open("file", O_WRONLY | O_APPEND).unwrap();
    client.write(one, 0, b"-one").unwrap();
    fs::write(host.path().join("file"), "longer than before").unwrap();
    client.write(one, 4, b"-two").unwrap();
    assert_eq!(read(&host.path().join("file")), "longer than before-two");
}

#[test]
fn files_are_made_with_their_mode_and_exclusively_if_so_asked() {
    let (host, mut client) = shared();
    for (name, flags, mode) in [
        ("new", O_RDWR | O_CREAT | O_EXCL, 0o666),
        ("read-only", O_WRONLY | O_CREAT, 0o444),
        ("sticky", O_RDWR | O_CREAT, 0o1640),
    ] {
        let fid = client.create("", name, flags, mode | 0o100_000).unwrap();
        assert_eq!(client.write(fid, 0, b"written"), Ok(7), "{name}");
        let made = host.path().join(name).metadata().unwrap();
        assert_eq!(made.mode() & 0o7777, mode, "{name}: whatever this process's umask is");
        assert_eq!(client.getattr(fid).unwrap().qid.path, made.ino(), "the fid is the file's now");
    }
    for (name, flags, expected) in [
        ("file", O_RDWR | O_CREAT | O_EXCL, Err(EEXIST)),
        ("file", O_RDWR | O_CREAT, Ok(())),
        ("file", O_RDWR | O_CREAT | O_TRUNC, Ok(())),
        ("link", O_RDWR | O_CREAT, Err(ELOOP)),
        ("directory", O_RDONLY | O_CREAT, Err(EISDIR)),
        ("a/b", O_RDWR | O_CREAT, Err(EINVAL)),
        ("..", O_RDWR | O_CREAT, Err(EINVAL)),
    ] {
        let before = read(&host.path().join("file"));
        assert_eq!(client.create("", name, flags, 0o600).map(|_| ()), expected, "{name} {flags:o}");
        let kept = if name == "file" && flags & O_TRUNC != 0 { "" } else { &before };
        assert_eq!(read(&host.path().join("file")), kept, "{name} {flags:o}");
    }
    assert_eq!(read(&host.path().join("directory/inner")), "inside", "the link was not followed");
    assert_eq!(client.create("file", "x", O_RDWR, 0o600).map(|_| ()), Err(ENOTDIR));
}

#[test]
fn attributes_are_those_of_the_host() {
    let (host, mut client) = shared();
    fs::set_permissions(host.path().join("file"), fs::Permissions::from_mode(0o640)).unwrap();
    for path in ["", "file", "directory", "link"] {
        let found = client.stat(path).unwrap();
        let expected = host.path().join(path).symlink_metadata().unwrap();
        assert_eq!(found.valid & 0x17ff, 0x17ff, "{path}: basic attributes and generation");
        assert_eq!(
            (found.mode, found.uid, found.gid, found.links, found.size, found.blocks),
            (
                expected.mode(),
                expected.uid(),
                expected.gid(),
                expected.nlink(),
                expected.size(),
                expected.blocks()
            ),
            "{path}"
        );
        let time = |seconds: i64, nanoseconds: i64| (seconds as u64, nanoseconds as u64);
        assert_eq!(found.mtime, time(expected.mtime(), expected.mtime_nsec()), "{path}");
        assert_eq!(found.ctime, time(expected.ctime(), expected.ctime_nsec()), "{path}");
        assert_eq!(found.block, (1 << 20) - 4096, "{path}");
        assert_ne!(found.qid.version, 0, "{path}");
    }
}

#[test]
fn the_qid_of_a_file_changes_with_it() {
    let (host, mut client) = shared();
    let before = client.stat("file").unwrap();
    assert_eq!(client.stat("file").unwrap().qid, before.qid);
    fs::write(host.path().join("file"), "changed").unwrap();
    let file = fs::File::options().write(true).open(host.path().join("file")).unwrap();
    file.set_modified(std::time::SystemTime::UNIX_EPOCH).unwrap();
    let after = client.stat("file").unwrap();
    assert_eq!((after.qid.path, after.generation), (before.qid.path, before.generation));
    assert_ne!(after.qid.version, before.qid.version);
}

#[test]
fn attributes_are_set_each_by_itself_and_together() {
    let (host, mut client) = shared();
    let path = host.path().join("file");
    let fid = client.fid("file").unwrap();
    client.setattr(fid, Change::mode(0o100_604)).unwrap();
    assert_eq!(path.metadata().unwrap().mode() & 0o7777, 0o604);
    client.setattr(fid, Change::size(3)).unwrap();
    assert_eq!(read(&path), "con");
    client.setattr(fid, Change::size(1 << 40)).unwrap();
    assert_eq!(path.metadata().unwrap().len(), 1 << 40);
    // Everything at once: the times that are given outlast the truncation.
    let change = Change {
        valid: 1 | 8 | 16 | 32 | 64 | 128 | 256,
        mode: 0o600,
        size: 5,
        atime: (1_000_000_000, 123_456_789),
        mtime: ((-5_i64) as u64, 999_999_999),
        ..Change::default()
    };
    client.setattr(fid, change).unwrap();
    let found = path.metadata().unwrap();
    assert_eq!((found.len(), found.mode() & 0o7777), (5, 0o600));
    assert_eq!((found.atime(), found.atime_nsec()), (1_000_000_000, 123_456_789));
    assert_eq!((found.mtime(), found.mtime_nsec()), (-5, 999_999_999));
    // The present, for one of them.
    client.setattr(fid, Change { valid: 32, ..Change::default() }).unwrap();
    let found = path.metadata().unwrap();
    assert_eq!(found.atime(), 1_000_000_000);
    assert!(found.mtime() > 1_700_000_000);
    // The time of the last change of attributes, which only the kernel sets.
    let before = (found.ctime(), found.ctime_nsec());
    std::thread::sleep(std::time::Duration::from_millis(20));
    client.setattr(fid, Change { valid: 64, ..Change::default() }).unwrap();
    let found = path.metadata().unwrap();
    assert!((found.ctime(), found.ctime_nsec()) > before);

    let link = client.fid("link").unwrap();
    client.setattr(link, Change { valid: 32 | 256, mtime: (7, 0), ..Change::default() }).unwrap();
    assert_eq!(host.path().join("link").symlink_metadata().unwrap().mtime(), 7);
    assert_ne!(host.path().join("directory/inner").metadata().unwrap().mtime(), 7);
    let directory = client.fid("directory").unwrap();
    for (fid, change, expected) in [
        (link, Change::mode(0o777), EOPNOTSUPP),
        (link, Change::size(0), EINVAL),
        (directory, Change::size(0), EISDIR),
        (fid, Change { valid: 1 << 9, ..Change::default() }, EINVAL),
        (fid, Change { valid: 16 | 128, atime: (0, 1_000_000_000), ..Change::default() }, EINVAL),
        (fid, Change { valid: 16 | 128, atime: (0, (1 << 30) - 1), ..Change::default() }, EINVAL),
        (fid, Change::size(u64::MAX), EINVAL),
        (77, Change::mode(0), EBADF),
    ] {
        assert_eq!(client.setattr(fid, change), Err(expected), "{change:?}");
    }
    assert_eq!(read(&host.path().join("directory/inner")), "inside");
}

#[test]
fn a_file_open_for_writing_is_truncated_whatever_its_mode_is_now() {
    let (host, mut client) = shared();
    let fid = client.open("file", O_RDWR).unwrap();
    client.setattr(fid, Change::mode(0)).unwrap();
    client.setattr(fid, Change::size(1)).unwrap();
    assert_eq!(host.path().join("file").metadata().unwrap().len(), 1);
    let reading = client.create("", "other", O_RDONLY | O_CREAT, 0o600).unwrap();
    client.setattr(reading, Change::size(9)).unwrap();
    assert_eq!(host.path().join("other").metadata().unwrap().len(), 9);
}

#[test]
fn a_large_directory_is_listed_whole_while_names_come_and_go() {
    let host = tempfile::tempdir().unwrap();
    for number in 0..3000 {
        fs::write(host.path().join(format!("file-{number:04}")), "").unwrap();
    }
    let mut client = Client::new(&Share::directory(host.path(), Options::default()).unwrap());
    let fid = client.open("", O_RDONLY).unwrap();
    let (mut entries, mut offset, mut requests) = (Vec::new(), 0, 0);
    loop {
        let some = client.readdir(fid, offset, 1500).unwrap();
        let Some(last) = some.last() else { break };
        offset = last.offset;
        entries.extend(some);
        requests += 1;
        // What was seen goes, and others come.
        let seen = String::from_utf8(entries.last().unwrap().name.clone()).unwrap();
        if seen.starts_with("file-") {
            fs::remove_file(host.path().join(&seen)).unwrap();
            fs::write(host.path().join(format!("late-{requests}")), "").unwrap();
        }
    }
    assert!(requests > 50, "{requests}");
    let mut names: Vec<&[u8]> = entries.iter().map(|entry| &*entry.name).collect();
    names.sort_unstable();
    names.retain(|name| !name.starts_with(b"late-"));
    assert_eq!(names.len(), 3002, "each once, with `.` and `..`");
    assert!(names.windows(2).all(|pair| pair[0] != pair[1]));

    // From any offset that was given, at any later time: what follows in the same order.
    let first = client.readdir(fid, 0, 4000).unwrap();
    for (position, entry) in first.iter().enumerate().step_by(17) {
        let rest = client.readdir(fid, entry.offset, 4000).unwrap();
        let expected = &first[position + 1..];
        assert_eq!(&rest[..expected.len().min(rest.len())], expected, "from {position}");
    }
}

#[test]
fn listings_tell_kinds_and_numbers_and_nothing_from_above() {
    let (host, mut client) = shared();
    let fid = client.open("", O_RDONLY).unwrap();
    let entries = client.readdir(fid, 0, 8192).unwrap();
    let root = host.path().metadata().unwrap().ino();
    for (name, kind) in [(".", 4), ("..", 4), ("file", 8), ("directory", 4), ("link", 10)] {
        let entry = entries.iter().find(|entry| entry.name == name.as_bytes()).unwrap();
        let inode = host.path().join(name).symlink_metadata().unwrap().ino();
        let expected = if name == ".." { root } else { inode };
        assert_eq!((entry.kind, entry.qid.path), (kind, expected), "{name}");
    }
    assert_eq!(client.readdir(fid, 0, 10), Err(EINVAL), "not room for one");
    let file = client.open("file", O_RDONLY).unwrap();
    assert_eq!(client.readdir(file, 0, 8192), Err(ENOTDIR));
    let unopened = client.fid("directory").unwrap();
    assert_eq!(client.readdir(unopened, 0, 8192), Err(EBADF));
}

#[test]
fn files_and_directories_are_synced() {
    let (_host, mut client) = shared();
    let file = client.open("file", O_RDWR).unwrap();
    let directory = client.open("directory", O_RDONLY).unwrap();
    for (fid, only_data, expected) in [
        (file, 0, Ok(())),
        (file, 1, Ok(())),
        (directory, 0, Ok(())),
        (ROOT, 0, Err(EBADF)),
        (55, 0, Err(EBADF)),
    ] {
        let synced = client.call(FSYNC, &Body::new().u32(fid).u32(only_data)).map(|_| ());
        assert_eq!(synced, expected, "{fid} {only_data}");
    }
}

#[test]
fn the_filesystem_is_the_hosts_under_the_name_of_9p() {
    let (host, mut client) = shared();
    let reply = client.call(STATFS, &Body::new().u32(ROOT)).unwrap();
    let mut reply = Parsed(&reply);
    let expected = rustix::fs::statvfs(host.path()).unwrap();
    assert_eq!(reply.u32(), 0x0102_1997);
    assert_eq!(u64::from(reply.u32()), expected.f_frsize);
    assert_eq!(reply.u64(), expected.f_blocks);
    reply.take(16);
    assert_eq!(reply.u64(), expected.f_files);
    reply.take(16);
    assert_eq!((u64::from(reply.u32()), reply.0), (expected.f_namemax, &[][..]));
}

#[test]
fn special_files_are_shown_with_their_kind_and_number() {
    let (host, mut client) = shared();
    rustix::fs::mkfifoat(rustix::fs::CWD, host.path().join("pipe"), rustix::fs::Mode::RUSR).unwrap();
    assert!(host.path().join("pipe").metadata().unwrap().file_type().is_fifo());
    let found = client.stat("pipe").unwrap();
    assert_eq!((found.mode, found.device, found.qid.kind), (0o010_400, 0, 0));
    let mut devices = Client::new(&Share::directory("/dev", Options::default()).unwrap());
    let null = devices.stat("null").unwrap();
    assert_eq!((null.mode & 0o170_000, null.device), (0o020_000, 0x103));
}
