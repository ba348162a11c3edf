//! Messages that make, link, rename and remove names, and those for extended attributes.

use std::fs;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::MetadataExt as _;

use nix::libc::{
    EBADF, EBUSY, EEXIST, EINVAL, EISDIR, ENODATA, ENOENT, ENOSPC, ENOTDIR, ENOTEMPTY, EOPNOTSUPP, EPERM,
    ESTALE,
};

use crate::client::*;
use crate::messages::{read, shared};

#[test]
fn directories_links_and_nodes_are_made() {
    let (host, mut client) = shared();
    let directory = client.fid("directory").unwrap();
    let made = client.call(MKDIR, &Body::new().u32(directory).string("new").u32(0o41_753).u32(0)).unwrap();
    let found = host.path().join("directory/new").metadata().unwrap();
    assert_eq!((Parsed(&made).qid().path, found.mode()), (found.ino(), 0o41_753));
    for target in ["../../../../etc/passwd", "/", "x", &"l".repeat(4000)] {
        let body = Body::new().u32(directory).string("pointer").string(target).u32(0);
        client.call(SYMLINK, &body).unwrap();
        let path = host.path().join("directory/pointer");
        assert_eq!(path.read_link().unwrap().as_os_str(), target);
        let fid = client.fid("directory/pointer").unwrap();
        let reply = client.call(READLINK, &Body::new().u32(fid)).unwrap();
        assert_eq!(Parsed(&reply).string(), target.as_bytes());
        fs::remove_file(path).unwrap();
    }
    let file = client.fid("file").unwrap();
    assert_eq!(client.call(READLINK, &Body::new().u32(file)), Err(EINVAL));
    for (mode, expected) in [
        (0o010_644, Ok(())),
        (0o140_600, Ok(())),
        (0o100_640, Ok(())),
        (0o000_640, Ok(())),
        (0o020_644, Err(EPERM)),
        (0o060_644, Err(EPERM)),
        (0o040_755, Err(EPERM)),
    ] {
        let name = format!("node-{mode:o}");
        let body = Body::new().u32(directory).string(&name).u32(mode).u32(1).u32(3).u32(0);
        assert_eq!(client.call(MKNOD, &body).map(|_| ()), expected, "{name}");
        let path = host.path().join("directory").join(&name);
        assert_eq!(path.exists(), expected.is_ok(), "{name}");
        if expected.is_ok() {
            let kind = if mode < 0o10_000 { 0o100_000 } else { 0 };
            assert_eq!(path.metadata().unwrap().mode(), mode | kind, "{name}");
        }
    }
    for (kind, name, body) in [
        (MKDIR, "mkdir", Body::new().u32(ROOT).string("file").u32(0o755).u32(0)),
        (SYMLINK, "symlink", Body::new().u32(ROOT).string("file").string("x").u32(0)),
        (MKNOD, "mknod", Body::new().u32(ROOT).string("file").u32(0o100_644).u32(0).u32(0).u32(0)),
    ] {
        assert_eq!(client.call(kind, &body), Err(EEXIST), "{name}");
    }
    let body = Body::new().u32(file).string("x").u32(0o755).u32(0);
    assert_eq!(client.call(MKDIR, &body), Err(ENOTDIR));
    let body = Body::new().u32(ROOT).string("empty").string("").u32(0);
    assert_eq!(client.call(SYMLINK, &body), Err(ENOENT), "a link to nothing");
    let body = Body::new().u32(ROOT).string("nul").string("a\0b").u32(0);
    assert_eq!(client.call(SYMLINK, &body), Err(EINVAL));
}

#[test]
fn names_may_have_any_bytes() {
    let (host, mut client) = shared();
    let name = b"\xff\xfe \n\x01\\'";
    let body = Body::new().u32(ROOT).string(name).u32(0o755).u32(0);
    client.call(MKDIR, &body).unwrap();
    assert!(host.path().join(std::ffi::OsStr::from_bytes(name)).is_dir());
    client.walk(ROOT, 5, &[name]).unwrap();
    let listing = client.open("", O_RDONLY).unwrap();
    let entries = client.readdir(listing, 0, 8192).unwrap();
    assert!(entries.iter().any(|entry| entry.name == name));
}

#[test]
fn files_are_linked_renamed_and_removed() {
    let (host, mut client) = shared();
    let at = |path: &str| host.path().join(path);
    let directory = client.fid("directory").unwrap();
    let file = client.fid("file").unwrap();
    let link = client.fid("link").unwrap();

    client.call(LINK, &Body::new().u32(directory).u32(file).string("second")).unwrap();
    assert_eq!(at("directory/second").metadata().unwrap().ino(), at("file").metadata().unwrap().ino());
    client.call(LINK, &Body::new().u32(directory).u32(link).string("link")).unwrap();
    assert!(at("directory/link").is_symlink(), "the link, not what it points to");
    let again = Body::new().u32(directory).u32(file).string("second");
    assert_eq!(client.call(LINK, &again), Err(EEXIST));

    let renameat =
        |from: u32, old: &str, to: u32, new: &str| Body::new().u32(from).string(old).u32(to).string(new);
    client.call(RENAMEAT, &renameat(directory, "second", ROOT, "moved")).unwrap();
    assert!(at("moved").exists() && !at("directory/second").exists());
    fs::write(at("target"), "old").unwrap();
    fs::write(at("source"), "new").unwrap();
    client.call(RENAMEAT, &renameat(ROOT, "source", ROOT, "target")).unwrap();
    assert_eq!(read(&at("target")), "new", "over what was there");
    for (from, old, to, new, expected) in [
        (ROOT, "none", ROOT, "x", ENOENT),
        (ROOT, "directory", ROOT, "file", ENOTDIR),
        (ROOT, "file", ROOT, "directory", EISDIR),
        (ROOT, "directory", directory, "inside", EINVAL),
        (ROOT, "file", file, "x", ENOTDIR),
        (ROOT, "..", ROOT, "x", EINVAL),
        (ROOT, "file", ROOT, "../x", EINVAL),
        (88, "file", ROOT, "x", EBADF),
    ] {
        let renamed = client.call(RENAMEAT, &renameat(from, old, to, new));
        assert_eq!(renamed, Err(expected), "{old} to {new}");
    }

    // By fid: the name is the one that it was found by, and goes with it.
    client.call(RENAME, &Body::new().u32(file).u32(directory).string("by-fid")).unwrap();
    client.call(RENAME, &Body::new().u32(file).u32(ROOT).string("by-fid-again")).unwrap();
    assert_eq!(read(&at("by-fid-again")), "content");
    assert_eq!(client.call(RENAME, &Body::new().u32(ROOT).u32(directory).string("root")), Err(EBUSY));
    fs::rename(at("by-fid-again"), at("elsewhere")).unwrap();
    fs::write(at("by-fid-again"), "somebody else's").unwrap();
    let rename = Body::new().u32(file).u32(ROOT).string("taken");
    assert_eq!(client.call(RENAME, &rename), Err(ESTALE), "another file has that name now");

    let unlinkat =
        |directory: u32, name: &str, flags: u32| Body::new().u32(directory).string(name).u32(flags);
    for (name, flags, expected) in [
        ("none", 0, Err(ENOENT)),
        ("directory", 0, Err(EISDIR)),
        ("directory", 0x200, Err(ENOTEMPTY)),
        ("target", 0x200, Err(ENOTDIR)),
        ("target", 1, Err(EINVAL)),
        ("target", 0, Ok(())),
        ("link", 0, Ok(())),
        ("..", 0x200, Err(EINVAL)),
    ] {
        let removed = client.call(UNLINKAT, &unlinkat(ROOT, name, flags)).map(|_| ());
        assert_eq!(removed, expected, "{name} {flags:x}");
    }
    assert_eq!(read(&at("directory/inner")), "inside", "the link's target is still there");

    // By fid, which is gone whatever comes of it.
    for (path, expected) in
        [("directory/inner", Ok(())), ("directory/deep/deeper", Ok(())), ("directory", Err(ENOTEMPTY))]
    {
        let fid = client.fid(path).unwrap();
        assert_eq!(client.call(REMOVE, &Body::new().u32(fid)).map(|_| ()), expected, "{path}");
        assert_eq!(at(path).exists(), expected.is_err(), "{path}");
        assert_eq!(client.clunk(fid), Err(EBADF), "{path}");
    }
    assert_eq!(client.call(REMOVE, &Body::new().u32(file)), Err(ESTALE));
    assert_eq!(read(&at("by-fid-again")), "somebody else's");
    let root = client.fid("").unwrap();
    assert_eq!(client.call(REMOVE, &Body::new().u32(root)), Err(EBUSY));
}

#[test]
fn a_file_that_is_removed_or_replaced_while_open_goes_on() {
    let (host, mut client) = shared();
    let open = client.open("file", O_RDWR).unwrap();
    let known = client.fid("file").unwrap();
    let unlink = Body::new().u32(ROOT).string("file").u32(0);
    client.call(UNLINKAT, &unlink).unwrap();
    fs::write(host.path().join("file"), "another").unwrap();
    assert_eq!(client.write(open, 0, b"CON"), Ok(3));
    assert_eq!(client.read(open, 0, 100).unwrap(), b"CONtent");
    assert_eq!(client.getattr(open).unwrap().links, 0);
    client.setattr(open, Change::size(2)).unwrap();
    client.setattr(known, Change::mode(0o600)).unwrap();
    client.lopen(known, O_RDONLY).unwrap();
    assert_eq!(client.read(known, 0, 100).unwrap(), b"CO", "even one that was only known can be opened");
    assert_eq!(client.call(LINK, &Body::new().u32(ROOT).u32(known).string("back")), Err(ENOENT));
    client.clunk(open).unwrap();
    client.clunk(known).unwrap();
    assert_eq!(read(&host.path().join("file")), "another");
}

#[test]
fn extended_attributes_are_read_set_listed_and_removed() {
    let (host, mut client) = shared();
    let path = host.path().join("file");
    xattr::set(&path, "user.one", b"first").unwrap();
    assert_eq!(client.xattr("file", "user.one").unwrap(), b"first");
    client.set_xattr("file", "user.two", b"second", 0).unwrap();
    assert_eq!(xattr::get(&path, "user.two").unwrap().unwrap(), b"second");
    client.set_xattr("directory", "user.empty", b"", 0).unwrap();
    assert_eq!(xattr::get(host.path().join("directory"), "user.empty").unwrap().unwrap(), b"");
    assert_eq!(client.xattr("directory", "user.empty").unwrap(), b"");
    let listed = client.xattr("file", "").unwrap();
    let mut names: Vec<&[u8]> = listed.split_inclusive(|byte| *byte == 0).collect();
    names.sort_unstable();
    assert_eq!(names, [&b"user.one\0"[..], b"user.two\0"]);
    for (name, value, flags, expected) in [
        ("user.one", &b"x"[..], 1, Err(EEXIST)),
        ("user.none", b"x", 2, Err(ENODATA)),
        ("user.one", b"replaced", 2, Ok(())),
        ("user.two", b"", 2, Ok(())),
        ("user.two", b"", 2, Err(ENODATA)),
        ("user.one", b"x", 4, Err(EINVAL)),
        ("user.", b"x", 0, Err(EOPNOTSUPP)),
        ("", b"x", 0, Err(EOPNOTSUPP)),
        ("trusted.overlay.opaque", b"y", 0, Err(EOPNOTSUPP)),
        ("security.selinux", b"y", 0, Err(EOPNOTSUPP)),
        ("system.other", b"y", 0, Err(EOPNOTSUPP)),
    ] {
        assert_eq!(client.set_xattr("file", name, value, flags), expected, "{name} {flags}");
    }
    assert_eq!(xattr::get(&path, "user.one").unwrap().unwrap(), b"replaced");
    assert_eq!(xattr::get(&path, "user.two").unwrap(), None);
    for name in ["user.none", "trusted.overlay.opaque", "security.capability"] {
        assert_eq!(client.xattr("file", name), Err(ENODATA), "{name}");
    }
    assert_eq!(client.set_xattr("link", "user.x", b"x", 0), Err(EPERM), "links have none");
    assert_eq!(xattr::get(host.path().join("directory/inner"), "user.x").unwrap(), None);
}

#[test]
fn a_value_that_comes_in_part_or_out_of_order_is_not_set() {
    let (host, mut client) = shared();
    let path = host.path().join("file");
    let begin = |client: &mut Client, size: u64| {
        let fid = client.fid("file").unwrap();
        let body = Body::new().u32(fid).string("user.x").u64(size).u32(0);
        client.call(XATTRCREATE, &body).map(|_| fid)
    };
    let fid = begin(&mut client, 4).unwrap();
    assert_eq!(client.write(fid, 1, b"x"), Err(EINVAL));
    assert_eq!(client.write(fid, 0, b"ab"), Ok(2));
    assert_eq!(client.write(fid, 2, b"cde"), Err(ENOSPC));
    assert_eq!(client.clunk(fid), Err(EINVAL));
    assert_eq!(client.clunk(fid), Err(EBADF), "gone all the same");
    assert_eq!(xattr::get(&path, "user.x").unwrap(), None);
    let fid = begin(&mut client, 4).unwrap();
    client.write(fid, 0, b"ab").unwrap();
    client.write(fid, 2, b"cd").unwrap();
    client.clunk(fid).unwrap();
    assert_eq!(xattr::get(&path, "user.x").unwrap().unwrap(), b"abcd");
    assert_eq!(begin(&mut client, 65537), Err(nix::libc::E2BIG));
    assert_eq!(begin(&mut client, u64::MAX), Err(nix::libc::E2BIG));
}
