//! Trees served over FUSE, as root, in a user namespace, and by an ordinary user.
#![cfg(target_os = "linux")]

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use kiln_contract::{Digest, Scratch, ViewBackend, ViewRequest};
use kiln_erofs::{
    Attributes, Content, Data, Device, NodeId, ObjectSource, Time, Tree, Xattrs, object_redirect, write_full,
    write_metadata,
};
use kiln_fixtures::{OrdinaryUser, require, require_root, with_private_mounts};
use kiln_view::Overlay;
use kiln_view::fuse::{self, Owners, Served};

/// Set for the processes that the tests start again as somebody else.
const DIRECTORY: &str = "KILN_TEST_DIRECTORY";

const TIME: Time = Time { seconds: -1_000, nanoseconds: 5 };

fn owned(mode: u32, uid: u32, gid: u32) -> Attributes {
    Attributes { mode, uid, gid, mtime: TIME, xattrs: Xattrs::new() }
}

struct Files {
    directory: PathBuf,
    objects: PathBuf,
    tree: PathBuf,
    target: PathBuf,
}

impl Files {
    fn new(directory: &Path) -> Self {
        let at = |name: &str| directory.join(name);
        for name in ["objects", "target", "upper", "work"] {
            fs::create_dir(at(name)).unwrap();
        }
        Self {
            directory: directory.to_owned(),
            objects: at("objects"),
            tree: at("tree.erofs"),
            target: at("target"),
        }
    }

    fn object_path(&self, digest: &Digest) -> PathBuf {
        self.objects.join(OsStr::from_bytes(&object_redirect(digest)[1..]))
    }

    fn object(&self, bytes: &[u8]) -> Content {
        let digest = Digest::of(bytes);
        let path = self.object_path(&digest);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, bytes).unwrap();
        Content::Regular(Data::Object { digest, size: bytes.len() as u64 })
    }

    fn write(&self, tree: &Tree) {
        write_metadata(tree, File::create(&self.tree).unwrap()).unwrap();
    }
}

impl ObjectSource for Files {
    fn open(&self, digest: &Digest) -> std::io::Result<Box<dyn Read + '_>> {
        Ok(Box::new(File::open(self.object_path(digest))?))
    }
}

fn sample(files: &Files) -> Tree {
    let mut tree = Tree::new(owned(0o755, 0, 0));
    let mut add =
        |parent, name: &[u8], content, attributes| tree.add(parent, name, content, attributes).unwrap();
    let root = NodeId::ROOT;
    let dir = add(root, b"dir", Content::Directory, owned(0o1777, 33, 34));
    let large: Vec<u8> =
        (0..3_000_000_u32).map(|number| (number.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    let large = add(dir, b"large", files.object(&large), owned(0o4755, 7, 8));
    add(dir, b"private", files.object(&[1; 100]), owned(0o600, 1000, 1000));
    add(dir, b"small", Content::Regular(Data::Inline(b"small".to_vec())), owned(0o644, 0, 0));
    add(dir, b"empty", Content::Regular(Data::Inline(Vec::new())), owned(0o640, 0, 42));
    add(dir, b"odd \xff name\n", Content::Regular(Data::Inline(b"odd".to_vec())), owned(0o644, 0, 0));
    add(root, b"link", Content::Symlink(b"dir/small".to_vec()), owned(0o777, 0, 0));
    add(root, b"null", Content::CharDevice(Device { major: 1, minor: 3 }), owned(0o666, 0, 0));
    add(root, b"disk", Content::BlockDevice(Device { major: 259, minor: 70_000 }), owned(0o660, 0, 6));
    add(root, b"pipe", Content::Fifo, owned(0o644, 0, 0));
    add(root, b"socket", Content::Socket, owned(0o755, 0, 0));
    let xattrs = [
        (b"user.mime".to_vec(), b"text/plain".to_vec()),
        (b"user.overlay.opaque".to_vec(), b"y".to_vec()),
        (b"user.large".to_vec(), vec![7; 5000]),
    ];
    let with_xattrs = Attributes { xattrs: xattrs.into(), ..owned(0o755, 0, 0) };
    let named = add(root, b"xattrs", Content::Directory, with_xattrs);
    add(named, b"below", Content::Regular(Data::Inline(b"seen".to_vec())), owned(0o644, 0, 0));
    let many = add(root, b"many", Content::Directory, owned(0o755, 0, 0));
    for number in 0..2500_u32 {
        let name = format!("{}{number} of many", if number % 2 == 0 { "!" } else { "f" });
        add(many, name.as_bytes(), Content::Regular(Data::Inline(vec![1; 3])), owned(0o644, number, number));
    }
    for number in 0..500 {
        let below = add(many, format!("d{number}").as_bytes(), Content::Directory, owned(0o700, 0, 0));
        add(below, b"leaf", Content::Fifo, owned(0o600, 0, 0));
    }
    tree.link(dir, b"large again", large).unwrap();
    tree
}

/// Compares everything below a path with a tree, and says how much that was. `overlay` is what hides `user.overlay.`.
fn compare(files: &Files, tree: &Tree, top: &Path, overlay: bool) -> usize {
    let mut count = 0;
    let mut inodes: BTreeMap<NodeId, u64> = BTreeMap::new();
    let mut stack = vec![(NodeId::ROOT, top.to_owned())];
    while let Some((id, path)) = stack.pop() {
        count += 1;
        let at = path.display();
        let node = tree.node(id);
        let metadata = fs::symlink_metadata(&path).unwrap_or_else(|error| panic!("{at}: {error}"));
        let Attributes { mode, uid, gid, mtime, xattrs } = node.attributes;
        // An overlay's root is its upper directory.
        if !overlay || id != NodeId::ROOT {
            assert_eq!(metadata.mode() & 0o7777, *mode, "{at}");
            assert_eq!((metadata.uid(), metadata.gid()), (*uid, *gid), "{at}");
            assert_eq!(
                (metadata.mtime(), metadata.mtime_nsec()),
                (mtime.seconds, mtime.nanoseconds.into()),
                "{at}"
            );
        }
        assert_eq!(*inodes.entry(id).or_insert(metadata.ino()), metadata.ino(), "{at}");
        for (name, value) in xattrs {
            let name = String::from_utf8(name.clone()).unwrap();
            let shown = match name.strip_prefix("user.overlay.") {
                // What an overlay of this namespace will show as it was.
                Some(rest) if !overlay && kiln_view::userns::entered() => {
                    format!("user.overlay.overlay.{rest}")
                }
                _ => name,
            };
            assert_eq!(xattr::get(&path, &shown).unwrap().as_ref(), Some(value), "{at}: {shown}");
            assert!(xattr::list(&path).unwrap().any(|listed| listed == *shown), "{at}: {shown}");
        }
        assert_eq!(xattr::get(&path, "user.absent").unwrap_or(None), None);
        let kind = metadata.file_type();
        match node.content {
            Content::Directory => {
                let mut listed: Vec<Vec<u8>> = fs::read_dir(&path)
                    .unwrap()
                    .map(|entry| entry.unwrap().file_name().as_bytes().to_vec())
                    .collect();
                listed.sort();
                let expected: Vec<_> = tree.children(id).map(|(name, _)| name.to_vec()).collect();
                assert_eq!(listed, expected, "{at}");
                stack.extend(
                    tree.children(id).map(|(name, child)| (child, path.join(OsStr::from_bytes(name)))),
                );
            }
            Content::Regular(data) => {
                let expected = match data {
                    Data::Inline(bytes) => bytes.clone(),
                    Data::Object { digest, .. } => fs::read(files.object_path(digest)).unwrap(),
                };
                assert!(fs::read(&path).unwrap() == expected, "{at} has other bytes");
                assert_eq!(metadata.nlink(), u64::from(node.links), "{at}");
            }
            Content::Symlink(target) => {
                assert_eq!(fs::read_link(&path).unwrap().as_os_str().as_bytes(), target, "{at}");
            }
            Content::CharDevice(device) | Content::BlockDevice(device) => {
                assert_eq!(metadata.rdev(), rustix::fs::makedev(device.major, device.minor), "{at}");
            }
            Content::Fifo => assert!(kind.is_fifo(), "{at}"),
            Content::Socket => assert!(kind.is_socket(), "{at}"),
        }
    }
    count
}

fn assert_gone(target: &Path) {
    assert_eq!(fs::read_dir(target).unwrap().count(), 0, "the mount is gone");
    let stat = fs::read_to_string("/proc/thread-self/children").unwrap_or_default();
    for child in stat.split_whitespace() {
        let name = fs::read_to_string(format!("/proc/{child}/comm")).unwrap_or_default();
        assert_ne!(name.trim(), "kiln-view", "the server is gone");
    }
}

fn shows_the_tree(directory: &Path) {
    let files = Files::new(directory);
    let tree = sample(&files);
    files.write(&tree);
    let mounted = fuse::mount(&files.tree, &files.objects, &files.target).unwrap();
    // Twice: asked for, and from what the kernel keeps.
    for _ in 0..2 {
        assert_eq!(compare(&files, &tree, &files.target, false), tree.len() + 1);
    }
    assert!(!files.target.join("absent").exists());
    let found = Command::new("find").arg(&files.target).output().unwrap();
    assert!(found.status.success());
    // One name has a line end in it.
    assert_eq!(found.stdout.split(|byte| *byte == b'\n').count() - 1, tree.len() + 2);
    assert_eq!(fs::write(files.target.join("dir/small"), "x").unwrap_err().raw_os_error(), Some(libc::EROFS));
    mounted.unmount().unwrap();
    assert_gone(&files.target);
}

/// Gives the ordinary user `/dev/fuse` as udev does everywhere, where this host has no udev: in a namespace of its own.
const AS_USER: &str = r#"mount --bind "$1" /dev/fuse && shift && exec setpriv "$@""#;

/// Runs the test of this name again as the ordinary user, through `prefix`, with a directory that is that user's.
fn again(test: &str, prefix: &[&str], user: &OrdinaryUser, directory: &Path) -> std::process::Child {
    // The user may not be let in to where the build is.
    let program = directory.join("test");
    fs::copy(std::env::current_exe().unwrap(), &program).unwrap();
    fs::set_permissions(directory, fs::Permissions::from_mode(0o755)).unwrap();
    let device = directory.join("fuse");
    let number = fs::metadata("/dev/fuse").unwrap().rdev();
    let (kind, mode) = (rustix::fs::FileType::CharacterDevice, rustix::fs::Mode::empty());
    rustix::fs::mknodat(rustix::fs::CWD, &device, kind, mode, number).unwrap();
    fs::set_permissions(&device, fs::Permissions::from_mode(0o666)).unwrap();
    let own = directory.join("own");
    fs::create_dir(&own).unwrap();
    std::os::unix::fs::chown(&own, Some(user.uid), Some(user.gid)).unwrap();
    let (uid, gid) = (format!("--reuid={}", user.uid), format!("--regid={}", user.gid));
    Command::new("unshare")
        .args(["--mount", "--propagation", "private", "sh", "-c", AS_USER, "sh"])
        .arg(&device)
        .args([&uid, &gid, "--clear-groups"])
        .args(prefix)
        .arg(&program)
        .args(["--exact", test, "--nocapture", "--test-threads=1"])
        .env_clear()
        .env("PATH", "/usr/bin:/bin:/usr/sbin:/sbin")
        .env("RUST_BACKTRACE", "0")
        .env(DIRECTORY, &own)
        .current_dir("/")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

fn finish(child: std::process::Child) -> String {
    let output = child.wait_with_output().unwrap();
    let text =
        String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && text.contains("1 passed"), "{text}");
    text
}

/// Runs a test in a user namespace whose root is an ordinary user, as rootless containers have it. What it printed is
/// returned, or `None` from within.
fn in_user_namespace(test: &str, body: fn(&Path)) -> Option<String> {
    if let Some(directory) = std::env::var_os(DIRECTORY) {
        body(Path::new(&directory));
        return None;
    }
    let (true, Some(unshare), Some(user)) = (require_root(), require("unshare"), OrdinaryUser::get()) else {
        return None;
    };
    let directory = tempfile::Builder::new().prefix("kiln-view-").tempdir().unwrap();
    let unshare = unshare.to_str().unwrap();
    let prefix = [unshare, "--user", "--mount", "sh", "-c", "echo ready; read go; exec \"$@\"", "sh"];
    let mut child = again(test, &prefix, &user, directory.path());
    let mut ready = [0; 6];
    child.stdout.as_mut().unwrap().read_exact(&mut ready).unwrap();
    assert_eq!(&ready, b"ready\n");
    for (map, own) in [("uid_map", user.uid), ("gid_map", user.gid)] {
        // Only a process outside may map more than the user itself.
        fs::write(format!("/proc/{}/{map}", child.id()), format!("0 {own} 1\n1 200000 65535\n")).unwrap();
    }
    child.stdin.take().unwrap().write_all(b"go\n").unwrap();
    Some(finish(child))
}

#[test]
fn root_sees_the_tree() {
    with_private_mounts(shows_the_tree);
}

#[test]
fn a_tree_with_its_data_needs_no_objects() {
    with_private_mounts(|directory| {
        let files = Files::new(directory);
        let tree = sample(&files);
        write_full(&tree, &files, File::create(&files.tree).unwrap()).unwrap();
        let none = directory.join("none");
        fs::create_dir(&none).unwrap();
        let mounted = fuse::mount(&files.tree, &none, &files.target).unwrap();
        assert_eq!(compare(&files, &tree, &files.target, false), tree.len() + 1);
        mounted.unmount().unwrap();
    });
}

#[test]
fn objects_on_an_overlay_are_read_by_the_server() {
    with_private_mounts(|directory| {
        let files = Files::new(directory);
        let mut tree = Tree::default();
        for name in ["one", "two"] {
            let object = files.object(name.repeat(5000).as_bytes());
            tree.add(NodeId::ROOT, name.as_bytes(), object, owned(0o644, 0, 0)).unwrap();
        }
        files.write(&tree);
        let overlaid = directory.join("overlaid");
        fs::create_dir(&overlaid).unwrap();
        let options = format!("lowerdir={}:{}", files.objects.display(), directory.join("upper").display());
        let options = std::ffi::CString::new(options).unwrap();
        let flags = rustix::mount::MountFlags::RDONLY;
        rustix::mount::mount("overlay", &overlaid, "overlay", flags, &*options).unwrap();
        let mounted = fuse::mount(&files.tree, &overlaid, &files.target).unwrap();
        for _ in 0..2 {
            assert_eq!(compare(&files, &tree, &files.target, false), 3);
        }
        mounted.unmount().unwrap();
        rustix::mount::unmount(&overlaid, rustix::mount::UnmountFlags::empty()).unwrap();
    });
}

#[test]
fn the_server_dies_with_whom_it_serves() {
    const TEST: &str = "the_server_dies_with_whom_it_serves";
    if let Some(directory) = std::env::var_os(DIRECTORY) {
        let files = Files::new(Path::new(&directory));
        files.write(&Tree::default());
        let _mounted = fuse::mount(&files.tree, &files.objects, &files.target).unwrap();
        let server = fs::read_to_string("/proc/thread-self/children").unwrap();
        fs::write(files.directory.join("server"), server.trim()).unwrap();
        rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL).unwrap();
    }
    let (true, Some(user)) = (require_root(), OrdinaryUser::get()) else { return };
    let directory = tempfile::Builder::new().prefix("kiln-view-").tempdir().unwrap();
    let child = again(TEST, &["unshare", "--user", "--map-root-user", "--mount"], &user, directory.path());
    let output = child.wait_with_output().unwrap();
    assert!(!output.status.success());
    let server = fs::read_to_string(directory.path().join("own/server"));
    let server = server.unwrap_or_else(|_| panic!("{}", String::from_utf8_lossy(&output.stderr)));
    for _ in 0..1000 {
        let name = fs::read_to_string(format!("/proc/{server}/comm")).unwrap_or_default();
        if name.trim() != "kiln-view" {
            return;
        }
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    panic!("the server {server} goes on");
}

#[test]
fn the_root_of_a_user_namespace_sees_the_tree() {
    in_user_namespace("the_root_of_a_user_namespace_sees_the_tree", shows_the_tree);
}

#[test]
fn an_ordinary_user_sees_the_tree_through_fusermount3() {
    if let Some(directory) = std::env::var_os(DIRECTORY) {
        return shows_the_tree_to_its_owner(Path::new(&directory));
    }
    let (true, Some(_), Some(user)) = (require_root(), require("fusermount3"), OrdinaryUser::get()) else {
        return;
    };
    let directory = tempfile::Builder::new().prefix("kiln-view-").tempdir().unwrap();
    finish(again("an_ordinary_user_sees_the_tree_through_fusermount3", &["env"], &user, directory.path()));
}

#[test]
fn an_ordinary_user_without_fusermount3_is_told_the_package() {
    const TEST: &str = "an_ordinary_user_without_fusermount3_is_told_the_package";
    if let Some(directory) = std::env::var_os(DIRECTORY) {
        let files = Files::new(Path::new(&directory));
        files.write(&Tree::default());
        let error = fuse::mount(&files.tree, &files.objects, &files.target).unwrap_err();
        assert_eq!(error.kind(), kiln_contract::ErrorKind::Unsupported);
        let (said, hints) = (error.to_string(), format!("{error:?}"));
        assert!(said.contains("cannot run fusermount3") && hints.contains("`fuse3`"), "{hints}");
        return assert_gone(&files.target);
    }
    let (true, Some(user)) = (require_root(), OrdinaryUser::get()) else { return };
    let directory = tempfile::Builder::new().prefix("kiln-view-").tempdir().unwrap();
    finish(again(TEST, &["env", "PATH=/none"], &user, directory.path()));
}

/// Who is not root may not read all of the sample.
fn shows_the_tree_to_its_owner(directory: &Path) {
    let files = Files::new(directory);
    let mut tree = Tree::new(owned(0o755, 5, 5));
    let object = files.object(&[3; 200_000]);
    tree.add(NodeId::ROOT, b"object", object, owned(0o644, 0, 70_000)).unwrap();
    tree.add(NodeId::ROOT, b"inline", Content::Regular(Data::Inline(b"x".to_vec())), owned(0o644, 0, 0))
        .unwrap();
    let closed = Content::Regular(Data::Inline(b"x".to_vec()));
    tree.add(NodeId::ROOT, b"link", Content::Symlink(b"inline".to_vec()), owned(0o777, 0, 0)).unwrap();
    files.write(&tree);
    let mounted = fuse::mount(&files.tree, &files.objects, &files.target).unwrap();
    assert_eq!(compare(&files, &tree, &files.target, false), 4);
    mounted.unmount().unwrap();
    assert_gone(&files.target);

    tree.add(NodeId::ROOT, b"closed", closed, owned(0o600, 0, 0)).unwrap();
    files.write(&tree);
    let mounted = fuse::mount(&files.tree, &files.objects, &files.target).unwrap();
    let error = fs::read(files.target.join("closed")).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::PermissionDenied);
    mounted.unmount().unwrap();
}

#[test]
fn an_overlay_of_a_user_namespace_shows_and_changes_the_tree() {
    in_user_namespace("an_overlay_of_a_user_namespace_shows_and_changes_the_tree", |directory| {
        let files = Files::new(directory);
        let tree = sample(&files);
        files.write(&tree);
        let overlay = Overlay::new();
        let request = ViewRequest {
            tree: files.tree.clone(),
            objects: files.objects.clone(),
            target: files.target.clone(),
            scratch: Some(Scratch {
                upper: files.directory.join("upper"),
                work: files.directory.join("work"),
                volatile: false,
            }),
        };
        overlay.mount(&request).unwrap();
        assert_eq!(compare(&files, &tree, &files.target, true), tree.len() + 1);
        let at = |name: &str| files.target.join(name);
        let mut file = File::options().append(true).open(at("dir/large")).unwrap();
        file.write_all(b"more").unwrap();
        drop(file);
        let changed = fs::metadata(at("dir/large")).unwrap();
        assert_eq!((changed.len(), changed.uid(), changed.gid()), (3_000_004, 7, 8));
        std::os::unix::fs::chown(at("dir/private"), Some(1234), None).unwrap();
        let changed = fs::metadata(at("dir/private")).unwrap();
        assert_eq!((changed.uid(), changed.gid(), changed.mode() & 0o7777), (1234, 1000, 0o600));
        fs::remove_file(at("dir/small")).unwrap();
        fs::rename(at("pipe"), at("dir/pipe")).unwrap();
        assert!(!at("dir/small").exists() && !at("pipe").exists());
        overlay.unmount(&files.target).unwrap();
        drop(overlay);
        assert_gone(&files.target);
    });
}

#[test]
fn a_missing_or_damaged_object_is_an_error_that_names_it() {
    const TEST: &str = "a_missing_or_damaged_object_is_an_error_that_names_it";
    let (missing, short) = (Digest::of(&[1; 100]), Digest::of(&[2; 100]));
    let body = |directory: &Path| {
        tracing_subscriber::fmt().with_writer(std::io::stderr).init();
        let files = Files::new(directory);
        let mut tree = Tree::default();
        for (name, byte) in [("missing", 1), ("short", 2), ("sound", 3)] {
            let object = files.object(&[byte; 100]);
            tree.add(NodeId::ROOT, name.as_bytes(), object, owned(0o644, 0, 0)).unwrap();
        }
        fs::remove_file(files.object_path(&Digest::of(&[1; 100]))).unwrap();
        fs::write(files.object_path(&Digest::of(&[2; 100])), b"short").unwrap();
        files.write(&tree);
        let mounted = fuse::mount(&files.tree, &files.objects, &files.target).unwrap();
        for name in ["missing", "short"] {
            let error = fs::read(files.target.join(name)).unwrap_err();
            assert_eq!(error.raw_os_error(), Some(libc::EIO), "{name}");
        }
        assert_eq!(fs::read(files.target.join("sound")).unwrap(), [3; 100]);
        mounted.unmount().unwrap();
    };
    if let Some(said) = in_user_namespace(TEST, body) {
        for digest in [missing, short] {
            assert!(said.contains(&digest.hex()[2..]), "{digest} is not named in {said}");
        }
    }
}

#[test]
fn what_is_no_tree_is_refused_before_anything_is_mounted() {
    let directory = tempfile::tempdir().unwrap();
    let files = Files::new(directory.path());
    fs::write(&files.tree, vec![0; 8192]).unwrap();
    let error = fuse::mount(&files.tree, &files.objects, &files.target).unwrap_err();
    assert!(error.to_string().contains("tree.erofs"), "{error}");
    assert!(fuse::mount(&files.directory.join("absent"), &files.objects, &files.target).is_err());
}

/// Edits a view with a scratch of this user's own, and finds everything again.
fn edits(directory: &Path) {
    let files = Files::new(directory);
    let mut tree = Tree::new(owned(0o755, 0, 0));
    let add = |tree: &mut Tree, parent, name: &[u8], content, mode| {
        tree.add(parent, name, content, owned(mode, 0, 0)).unwrap()
    };
    // What may not be changed itself, with something in it that may.
    let closed = add(&mut tree, NodeId::ROOT, b"closed", Content::Directory, 0o555);
    let object = files.object(&[3; 200_000]);
    add(&mut tree, closed, b"object", object, 0o644);
    add(&mut tree, closed, b"inline", Content::Regular(Data::Inline(b"x".to_vec())), 0o444);
    let below = add(&mut tree, NodeId::ROOT, b"below", Content::Directory, 0o755);
    add(&mut tree, below, b"gone", Content::Symlink(b"nowhere".to_vec()), 0o777);
    files.write(&tree);
    let scratch = Scratch { upper: directory.join("upper"), work: directory.join("work"), volatile: false };
    let (uid, gid) = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
    let serve = || {
        let served = Served {
            tree: &files.tree,
            objects: &files.objects,
            scratch: Some(&scratch),
            owners: Owners::One { uid, gid },
            below_overlay: false,
            bound: true,
            log: None,
            fetcher: None,
        };
        fuse::start(&served).unwrap().mount(&files.target).unwrap()
    };
    let at = |name: &str| files.target.join(name);
    let mounted = serve();
    let metadata = fs::metadata(at("closed/object")).unwrap();
    assert_eq!((metadata.uid(), metadata.gid()), (uid, gid));
    let mut file = File::options().append(true).open(at("closed/object")).unwrap();
    file.write_all(b"more").unwrap();
    drop(file);
    if uid != 0 {
        for refused in [fs::write(at("closed/inline"), "y"), fs::write(at("closed/new"), "y")] {
            assert_eq!(refused.unwrap_err().kind(), std::io::ErrorKind::PermissionDenied);
        }
    }
    assert_eq!(fs::metadata(at("closed")).unwrap().mode() & 0o7777, 0o555);
    fs::remove_file(at("below/gone")).unwrap();
    fs::rename(at("below"), at("renamed")).unwrap();
    fs::create_dir(at("below")).unwrap();
    fs::write(at("renamed/new"), "new").unwrap();
    std::os::unix::fs::symlink("new", at("renamed/link")).unwrap();
    xattr::set(at("renamed/new"), "user.overlay.opaque", b"y").unwrap();
    mounted.unmount().unwrap();
    assert_gone(&files.target);

    let mounted = serve();
    assert_eq!(fs::metadata(at("closed/object")).unwrap().len(), 200_004);
    assert_eq!(fs::read(at("closed/inline")).unwrap(), b"x");
    assert_eq!(fs::read(at("renamed/link")).unwrap(), b"new");
    assert_eq!(xattr::get(at("renamed/new"), "user.overlay.opaque").unwrap().unwrap(), b"y");
    assert_eq!(fs::read_dir(at("renamed")).unwrap().count(), 2);
    assert_eq!(fs::read_dir(at("below")).unwrap().count(), 0);
    assert_eq!(fs::metadata(at("renamed/new")).unwrap().uid(), uid);
    mounted.unmount().unwrap();
}

#[test]
fn the_root_of_a_user_namespace_edits_a_view_without_overlayfs() {
    in_user_namespace("the_root_of_a_user_namespace_edits_a_view_without_overlayfs", edits);
}

#[test]
fn an_ordinary_user_edits_a_view_through_fusermount3() {
    const TEST: &str = "an_ordinary_user_edits_a_view_through_fusermount3";
    if let Some(directory) = std::env::var_os(DIRECTORY) {
        return edits(Path::new(&directory));
    }
    let (true, Some(_), Some(user)) = (require_root(), require("fusermount3"), OrdinaryUser::get()) else {
        return;
    };
    let directory = tempfile::Builder::new().prefix("kiln-view-").tempdir().unwrap();
    finish(again(TEST, &["env"], &user, directory.path()));
}
