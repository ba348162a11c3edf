//! What a hostile guest tries, and that nothing outside is read or changed.

use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, symlink};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use kiln_fixtures::require_root;
use kiln_share::{Options, Share, ShareError};
use nix::libc::{EACCES, EBADF, EINVAL, EISDIR, ELOOP, ENODATA, ENOENT, ENOTDIR, EPERM, EROFS};

use crate::client::*;

/// `shared/` with a file, a directory, and links that lead out, beside `secret` and `outside/`.
struct Host {
    directory: tempfile::TempDir,
}

impl Host {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let at = |path: &str| directory.path().join(path);
        fs::create_dir_all(at("shared/directory")).unwrap();
        fs::create_dir(at("outside")).unwrap();
        fs::write(at("secret"), "secret").unwrap();
        fs::write(at("outside/secret"), "secret").unwrap();
        fs::write(at("shared/file"), "content").unwrap();
        fs::write(at("shared/directory/inner"), "inside").unwrap();
        symlink("../secret", at("shared/to-secret")).unwrap();
        symlink("../outside", at("shared/to-outside")).unwrap();
        symlink(at("secret"), at("shared/absolute")).unwrap();
        symlink("/proc/self/fd", at("shared/magic")).unwrap();
        Self { directory }
    }

    fn at(&self, path: &str) -> PathBuf {
        self.directory.path().join(path)
    }

    fn share(&self, options: Options) -> Share {
        Share::directory(self.at("shared"), options).unwrap()
    }

    /// Everything below: path, kind and mode, owner, links, times, content.
    fn state(&self) -> Vec<String> {
        let mut all = Vec::new();
        describe(self.directory.path(), &mut all);
        all
    }
}

fn describe(path: &Path, all: &mut Vec<String>) {
    let found = path.symlink_metadata().unwrap();
    let content = match found.file_type() {
        kind if kind.is_file() => fs::read_to_string(path).unwrap(),
        kind if kind.is_symlink() => path.read_link().unwrap().display().to_string(),
        _ => String::new(),
    };
    let attributes: Vec<_> = xattr::list(path).unwrap().map(|name| name.display().to_string()).collect();
    all.push(format!(
        "{} {:o} {}:{} {} {}.{} {attributes:?} {content}",
        path.display(),
        found.mode(),
        found.uid(),
        found.gid(),
        found.nlink(),
        found.mtime(),
        found.mtime_nsec(),
    ));
    if found.is_dir() {
        let mut names: Vec<PathBuf> =
            fs::read_dir(path).unwrap().map(|entry| entry.unwrap().path()).collect();
        names.sort();
        names.iter().for_each(|path| describe(path, all));
    }
}

/// Every message that would change something, aimed at the fids of a directory and of a file in it.
fn mutations(directory: u32, file: u32) -> Vec<(&'static str, u8, Body)> {
    let b = Body::new;
    vec![
        ("create", LCREATE, b().u32(directory).string("new").u32(O_RDWR).u32(0o644).u32(0)),
        ("create for reading", LCREATE, b().u32(directory).string("file").u32(O_RDONLY).u32(0o644).u32(0)),
        ("symlink", SYMLINK, b().u32(directory).string("new").string("x").u32(0)),
        ("mknod", MKNOD, b().u32(directory).string("new").u32(0o100_644).u32(0).u32(0).u32(0)),
        ("mkfifo", MKNOD, b().u32(directory).string("new").u32(0o010_644).u32(0).u32(0).u32(0)),
        ("rename", RENAME, b().u32(file).u32(directory).string("new")),
        ("chmod", SETATTR, setattr(file, 1)),
        ("chown", SETATTR, setattr(file, 2 | 4)),
        ("truncate", SETATTR, setattr(file, 8)),
        ("utimes", SETATTR, setattr(file, 16 | 32)),
        ("touch ctime", SETATTR, setattr(file, 64)),
        ("set nothing", SETATTR, setattr(file, 0)),
        ("setxattr", XATTRCREATE, b().u32(file).string("user.x").u64(1).u32(0)),
        ("link", LINK, b().u32(directory).u32(file).string("new")),
        ("mkdir", MKDIR, b().u32(directory).string("new").u32(0o755).u32(0)),
        ("renameat", RENAMEAT, b().u32(directory).string("file").u32(directory).string("new")),
        ("unlinkat", UNLINKAT, b().u32(directory).string("file").u32(0)),
        ("rmdir", UNLINKAT, b().u32(directory).string("directory").u32(0x200)),
        ("open to write", LOPEN, b().u32(file).u32(O_WRONLY)),
        ("open to read and write", LOPEN, b().u32(file).u32(O_RDWR)),
        ("open to truncate", LOPEN, b().u32(file).u32(O_RDONLY | O_TRUNC)),
        ("open to create", LOPEN, b().u32(file).u32(O_RDONLY | O_CREAT)),
        ("open for both", LOPEN, b().u32(file).u32(3)),
    ]
}

fn setattr(fid: u32, valid: u32) -> Body {
    Body::new().u32(fid).u32(valid).u32(0o777).u32(12345).u32(12345).u64(0).u64(0).u64(0).u64(0).u64(0)
}

#[test]
fn no_name_leads_up_or_over_a_slash() {
    let host = Host::new();
    let mut client = Client::new(&host.share(Options::default()));
    let before = host.state();
    let directory = client.fid("directory").unwrap();
    for name in ["..", "../secret", "directory/inner", "/", "/etc/passwd", ".", "a\0b"] {
        for from in [ROOT, directory] {
            assert_eq!(client.walk(from, 900, &[name]), Err(EINVAL), "walk {name}");
            let b = Body::new;
            for (what, kind, body) in [
                ("create", LCREATE, b().u32(from).string(name).u32(O_RDWR).u32(0o644).u32(0)),
                ("symlink", SYMLINK, b().u32(from).string(name).string("x").u32(0)),
                ("mknod", MKNOD, b().u32(from).string(name).u32(0o100_644).u32(0).u32(0).u32(0)),
                ("mkfifo", MKNOD, b().u32(from).string(name).u32(0o010_644).u32(0).u32(0).u32(0)),
                ("rename", RENAME, b().u32(directory).u32(from).string(name)),
                ("link", LINK, b().u32(from).u32(directory).string(name)),
                ("mkdir", MKDIR, b().u32(from).string(name).u32(0o755).u32(0)),
                ("renameat from", RENAMEAT, b().u32(from).string(name).u32(ROOT).string("x")),
                ("renameat to", RENAMEAT, b().u32(ROOT).string("file").u32(from).string(name)),
                ("unlinkat", UNLINKAT, b().u32(from).string(name).u32(0)),
                ("rmdir", UNLINKAT, b().u32(from).string(name).u32(0x200)),
            ] {
                assert_eq!(client.call(kind, &body), Err(EINVAL), "{what} {name:?}");
            }
        }
    }
    // Deep down first and then up as often.
    let ups = ["directory", "..", "..", "secret"];
    assert_eq!(client.walk(ROOT, 900, &ups).map(|qids| qids.len()), Ok(1));
    assert_eq!(client.getattr(900), Err(EBADF));
    assert_eq!(host.state(), before);
}

#[test]
fn symbolic_links_that_lead_out_are_text() {
    let host = Host::new();
    let mut client = Client::new(&host.share(Options::default()));
    let before = host.state();
    for link in ["to-secret", "to-outside", "absolute", "magic"] {
        for flags in [O_RDONLY, O_RDWR, O_WRONLY | O_TRUNC, O_RDONLY | O_DIRECTORY] {
            let opened = client.open(link, flags);
            assert!(matches!(opened, Err(ELOOP | ENOTDIR)), "{link} {flags:o}: {opened:?}");
        }
        for flags in [O_RDWR | O_CREAT, O_WRONLY | O_CREAT | O_TRUNC] {
            assert_eq!(client.create("", link, flags, 0o644), Err(ELOOP), "{link}");
        }
        let fid = client.fid(link).unwrap();
        assert_eq!(client.walk(fid, 901, &["secret"]), Err(ENOTDIR), "{link}");
        assert_eq!(client.walk(ROOT, 901, &[link, "secret"]).map(|qids| qids.len()), Ok(1), "{link}");
        for (what, kind, body) in [
            ("create", LCREATE, Body::new().u32(fid).string("new").u32(O_RDWR).u32(0o644).u32(0)),
            ("mkdir", MKDIR, Body::new().u32(fid).string("new").u32(0o755).u32(0)),
            ("unlink", UNLINKAT, Body::new().u32(fid).string("secret").u32(0)),
            ("rename", RENAMEAT, Body::new().u32(fid).string("secret").u32(ROOT).string("stolen")),
        ] {
            assert_eq!(client.call(kind, &body), Err(ENOTDIR), "{what} in {link}");
        }
        assert!(client.setattr(fid, Change::mode(0o777)).is_err(), "{link}");
        assert!(client.setattr(fid, Change::size(0)).is_err(), "{link}");
        assert!(client.set_xattr(link, "user.x", b"x", 0).is_err(), "{link}");
        assert!(client.xattr(link, "user.x").is_err(), "{link}");
    }
    assert_eq!(host.state(), before);
}

/// The guest's second connection, or anybody on the host, swaps a directory and a link that leads out as fast as it can, while the
/// guest walks, opens, creates, removes and renames through that name.
#[test]
fn a_directory_that_becomes_a_link_in_between_leads_nowhere() {
    let host = Host::new();
    let share = host.share(Options::default());
    let stop = AtomicBool::new(false);
    let (shared, outside) = (host.at("shared"), host.at("outside"));
    fs::create_dir(shared.join("swap")).unwrap();
    fs::write(shared.join("swap/secret"), "harmless").unwrap();
    symlink(&outside, shared.join("swap-link")).unwrap();
    let mut reached = [0; 2];
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let at = |name: &str| shared.join(name);
            while !stop.load(Ordering::Relaxed) {
                rustix::fs::renameat_with(
                    rustix::fs::CWD,
                    at("swap"),
                    rustix::fs::CWD,
                    at("swap-link"),
                    rustix::fs::RenameFlags::EXCHANGE,
                )
                .unwrap();
            }
        });
        let mut client = Client::new(&share);
        let until = Instant::now() + Duration::from_secs(2);
        while Instant::now() < until {
            if let Ok(fid) = client.open("swap/secret", O_RDWR) {
                assert_eq!(client.read(fid, 0, 100).unwrap(), b"harmless");
                client.clunk(fid).unwrap();
                reached[0] += 1;
            }
            // Two steps, so that the swap falls between them.
            let directory = client.fid("swap").unwrap();
            let qid = client.getattr(directory).unwrap().qid;
            match client.walk(directory, 902, &["secret"]) {
                Ok(_) => {
                    client.lopen(902, O_RDONLY).unwrap();
                    assert_eq!(client.read(902, 0, 100).unwrap(), b"harmless");
                    client.clunk(902).unwrap();
                }
                Err(error) => {
                    assert_eq!((error, qid.kind), (ENOTDIR, 2));
                    reached[1] += 1;
                }
            }
            for (kind, body) in [
                (MKDIR, Body::new().u32(directory).string("made").u32(0o755).u32(0)),
                (UNLINKAT, Body::new().u32(directory).string("made").u32(0x200)),
                (SYMLINK, Body::new().u32(directory).string("s").string("x").u32(0)),
                (RENAMEAT, Body::new().u32(directory).string("s").u32(directory).string("t")),
                (UNLINKAT, Body::new().u32(directory).string("t").u32(0)),
            ] {
                let _ = client.call(kind, &body);
            }
            client.clunk(directory).unwrap();
            if let Ok(fid) = client.create("", "swap", O_WRONLY | O_CREAT | O_TRUNC, 0o644) {
                panic!("neither a directory nor a link can be written to, but fid {fid} is");
            }
        }
        stop.store(true, Ordering::Relaxed);
    });
    assert!(reached.iter().all(|count| *count > 10), "both were met: {reached:?}");
    assert_eq!(fs::read_to_string(outside.join("secret")).unwrap(), "secret");
    assert_eq!(fs::read_dir(&outside).unwrap().count(), 1);
}

#[test]
fn nothing_is_changed_through_a_read_only_share() {
    let host = Host::new();
    let before = host.state();
    let access = || host.at("shared/file").metadata().unwrap().atime();
    let long_ago = fs::FileTimes::new().set_accessed(std::time::SystemTime::UNIX_EPOCH);
    fs::File::open(host.at("shared/file")).unwrap().set_times(long_ago).unwrap();
    let options = Options { read_only: true, ..Options::default() };
    let mut client = Client::new(&host.share(options));
    let file = client.fid("file").unwrap();
    for (what, kind, body) in mutations(ROOT, file) {
        assert_eq!(client.call(kind, &body), Err(EROFS), "{what}");
    }
    let open = client.open("file", O_RDONLY).unwrap();
    assert_eq!(client.read(open, 0, 100).unwrap(), b"content");
    for (what, kind, body) in mutations(ROOT, open) {
        assert_eq!(client.call(kind, &body), Err(EROFS), "{what} of an open file");
    }
    assert_eq!(client.write(open, 0, b"x"), Err(EROFS));
    assert_eq!(client.lock(open, 1, 0, 0, 0), Err(EROFS), "to keep others from writing");
    assert_eq!(client.lock(open, 0, 0, 0, 0), Ok(0), "but reading undisturbed is");
    assert_eq!(client.call(FSYNC, &Body::new().u32(open).u32(0)), Ok(vec![]));
    assert_eq!(client.list("").unwrap().len(), 6);
    // What only fails where nothing may be changed, after what was asked for is done: the fid is gone.
    assert_eq!(client.call(REMOVE, &Body::new().u32(file)), Err(EROFS));
    assert_eq!(client.clunk(file), Err(EBADF));
    client.close().unwrap();
    assert_eq!(access(), 0, "not even the time of its last access");
    fs::File::open(host.at("shared/file")).unwrap();
    assert_eq!(host.state(), before);
}

#[test]
fn devices_pipes_and_sockets_of_the_host_are_never_opened() {
    let host = Host::new();
    let pipe = host.at("shared/pipe");
    rustix::fs::mkfifoat(rustix::fs::CWD, &pipe, rustix::fs::Mode::from_raw_mode(0o666)).unwrap();
    let _listening = UnixListener::bind(host.at("shared/socket")).unwrap();
    let mut client = Client::new(&host.share(Options::default()));
    for path in ["pipe", "socket"] {
        for flags in [O_RDONLY, O_WRONLY, O_RDWR, O_RDONLY | O_TRUNC] {
            assert_eq!(client.open(path, flags), Err(EPERM), "{path} {flags:o}");
        }
        assert_eq!(client.create("", path, O_RDWR | O_CREAT, 0o644), Err(EPERM), "{path}");
        let fid = client.fid(path).unwrap();
        assert_eq!(client.setattr(fid, Change::size(0)), Err(EINVAL), "{path}");
    }
    let mut devices = Client::new(&Share::directory("/dev", Options::default()).unwrap());
    for path in ["null", "zero", "tty", "full"] {
        assert_eq!(devices.open(path, O_RDWR), Err(EPERM), "{path}");
        assert_eq!(devices.create("", path, O_RDWR | O_CREAT, 0o644), Err(EPERM), "{path}");
    }
}

#[test]
fn files_of_procfs_that_wait_do_not_hold_up_the_server() {
    if !require_root() {
        return;
    }
    let mut client = Client::new(&Share::directory("/proc", Options::default()).unwrap());
    let Ok(fid) = client.open("kmsg", O_RDONLY) else { return kiln_fixtures::skip("no /proc/kmsg") };
    // What is there, and then nothing to wait for.
    while client.read(fid, 0, 4096).is_ok_and(|read| !read.is_empty()) {}
    assert_eq!(client.read(fid, 0, 4096), Err(nix::libc::EAGAIN));
}

#[test]
fn a_single_file_is_alone_in_its_directory() {
    let host = Host::new();
    let before = host.state();
    let share = Share::file(host.at("shared/directory/inner"), Options::default()).unwrap();
    assert_eq!(share.file_name().unwrap(), "inner");
    let mut client = Client::new(&share);
    assert_eq!(client.getattr(ROOT).unwrap().mode, 0o040_555);
    assert_eq!(client.list("").unwrap(), ["inner"]);
    let listing = client.open("", O_RDONLY).unwrap();
    let entries = client.readdir(listing, 0, 8192).unwrap();
    let file = client.fid("inner").unwrap();
    let root_qid = client.getattr(ROOT).unwrap().qid;
    let file_qid = client.getattr(file).unwrap().qid;
    let qids: Vec<(&[u8], Qid)> = entries.iter().map(|entry| (&*entry.name, entry.qid)).collect();
    assert_eq!(qids, [(&b"."[..], root_qid), (b"..", root_qid), (b"inner", file_qid)]);
    assert_eq!(client.readdir(listing, 2, 8192).unwrap(), entries[2..]);
    for name in ["deep", "..", "file", "secret", "inner/x", ""] {
        let walked = client.walk(ROOT, 903, &[name]);
        assert!(matches!(walked, Err(ENOENT | EINVAL)), "{name}: {walked:?}");
    }
    assert_eq!(client.walk(ROOT, 903, &["inner", ".."]).map(|qids| qids.len()), Ok(1));
    assert_eq!(client.open("", O_RDWR), Err(EISDIR));
    assert_eq!(client.xattr("", "user.x"), Err(ENODATA));
    assert!(client.call(STATFS, &Body::new().u32(ROOT)).is_ok());
    for (what, kind, body) in mutations(ROOT, ROOT) {
        let done = client.call(kind, &body);
        assert!(matches!(done, Err(EPERM | EISDIR | EINVAL)), "{what}: {done:?}");
    }
    for (what, kind, body) in [
        ("remove", REMOVE, Body::new().u32(client.fid("inner").unwrap())),
        ("rename", RENAME, Body::new().u32(file).u32(ROOT).string("x")),
        ("renameat", RENAMEAT, Body::new().u32(ROOT).string("inner").u32(ROOT).string("x")),
        ("unlinkat", UNLINKAT, Body::new().u32(ROOT).string("inner").u32(0)),
        ("link", LINK, Body::new().u32(ROOT).u32(file).string("x")),
    ] {
        assert_eq!(client.call(kind, &body), Err(EPERM), "{what}");
    }
    for (what, kind, body) in [
        ("create", LCREATE, Body::new().u32(file).string("x").u32(O_RDWR).u32(0o644).u32(0)),
        ("mkdir", MKDIR, Body::new().u32(file).string("x").u32(0o755).u32(0)),
    ] {
        assert_eq!(client.call(kind, &body), Err(ENOTDIR), "{what} in the file");
    }
    assert_eq!(host.state(), before);
    // The file itself is an ordinary one.
    let open = client.open("inner", O_RDWR | O_TRUNC).unwrap();
    assert_eq!(client.write(open, 0, b"by the guest"), Ok(12));
    assert_eq!(fs::read_to_string(host.at("shared/directory/inner")).unwrap(), "by the guest");
}

#[test]
fn a_single_file_is_followed_when_it_is_replaced_but_not_to_anything_else() {
    let host = Host::new();
    let path = host.at("shared/directory/inner");
    let mut client = Client::new(&Share::file(&path, Options::default()).unwrap());
    let old = client.open("inner", O_RDONLY).unwrap();
    fs::write(host.at("new"), "replaced").unwrap();
    fs::rename(host.at("new"), &path).unwrap();
    let new = client.open("inner", O_RDONLY).unwrap();
    assert_eq!(client.read(new, 0, 100).unwrap(), b"replaced");
    assert_eq!(client.read(old, 0, 100).unwrap(), b"inside");
    fs::remove_file(&path).unwrap();
    symlink("../../secret", &path).unwrap();
    assert_eq!(client.fid("inner"), Err(ENOENT), "a link is no regular file");
    fs::remove_file(&path).unwrap();
    fs::create_dir(&path).unwrap();
    assert_eq!(client.fid("inner"), Err(ENOENT));
    fs::remove_dir(&path).unwrap();
    assert_eq!(client.getattr(ROOT), Err(ENOENT));
    assert_eq!(client.list(""), Err(ENOENT));
}

#[test]
fn a_single_file_that_is_read_only_is_only_read() {
    let host = Host::new();
    let before = host.state();
    let options = Options { read_only: true, ..Options::default() };
    let mut client = Client::new(&Share::file(host.at("shared/file"), options).unwrap());
    let file = client.fid("file").unwrap();
    for (what, kind, body) in mutations(ROOT, file) {
        assert_eq!(client.call(kind, &body), Err(EROFS), "{what}");
    }
    let open = client.open("file", O_RDONLY).unwrap();
    assert_eq!(client.read(open, 0, 100).unwrap(), b"content");
    assert_eq!(host.state(), before);
}

#[test]
fn what_cannot_be_shared_is_told_with_its_path() {
    let host = Host::new();
    let directory = |path: &str| Share::directory(host.at(path), Options::default()).unwrap_err();
    let file = |path: &str| Share::file(host.at(path), Options::default()).unwrap_err();
    for (error, kind) in [
        (directory("none"), "No such file"),
        (directory("shared/file"), "not a directory"),
        (file("none"), "No such file"),
        (file("shared/directory"), "not a regular file"),
        (file("shared/to-outside"), "not a regular file"),
    ] {
        let message = error.to_string();
        assert!(message.contains(kind), "{message}");
        assert!(message.contains(&host.directory.path().display().to_string()), "{message}");
    }
    let error = Share::file("/dev/null", Options::default()).unwrap_err();
    assert!(matches!(error, ShareError::WrongKind { .. }), "{error}");
    // The path itself is the user's own: its links are followed, once.
    let linked = Share::directory(host.at("shared/to-outside"), Options::default()).unwrap();
    assert_eq!(Client::new(&linked).list("").unwrap(), ["secret"]);
    let linked = Share::file(host.at("shared/to-secret"), Options::default()).unwrap();
    assert_eq!(linked.file_name().unwrap(), "secret");
}

#[test]
fn files_that_this_process_may_not_open_are_refused_by_the_kernel() {
    let prepare = |directory: &Path| {
        fs::write(directory.join("closed"), "x").unwrap();
        fs::set_permissions(directory.join("closed"), fs::Permissions::from_mode(0o000)).unwrap();
    };
    let name = "confinement::files_that_this_process_may_not_open_are_refused_by_the_kernel";
    crate::ownership::as_user(name, prepare, |directory| {
        let mut client = Client::new(&Share::directory(directory, Options::default()).unwrap());
        assert_eq!(client.open("closed", O_RDONLY), Err(EACCES));
        assert_eq!(client.stat("closed").unwrap().mode & 0o7777, 0);
    });
}
