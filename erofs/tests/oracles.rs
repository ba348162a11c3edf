//! Images before judges that are not ours: the kernel, `fsck.erofs` and `dump.erofs`.
#![cfg(target_os = "linux")]

use std::collections::BTreeMap;
use std::ffi::CString;
use std::fs::{self, File};
use std::io::Read;
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use kiln_contract::Digest;
use kiln_erofs::{
    Attributes, Content, Data, Device, Image, NodeId, ObjectSource, Time, Tree, Xattrs, object_redirect,
    write_full, write_metadata,
};
use kiln_fixtures::{require, require_root};
use rustix::fs::CWD;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, UnmountFlags, fsconfig_create,
    fsconfig_set_flag, fsconfig_set_string, fsmount, fsopen, move_mount, unmount,
};

struct Objects(PathBuf);

impl Objects {
    fn path(&self, digest: &Digest) -> PathBuf {
        let redirect = object_redirect(digest);
        self.0.join(std::str::from_utf8(&redirect[1..]).unwrap())
    }

    fn add(&self, bytes: &[u8]) -> Data {
        let digest = Digest::of(bytes);
        let path = self.path(&digest);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, bytes).unwrap();
        Data::Object { digest, size: bytes.len() as u64 }
    }
}

impl ObjectSource for Objects {
    fn open(&self, digest: &Digest) -> std::io::Result<Box<dyn Read + '_>> {
        Ok(Box::new(File::open(self.path(digest))?))
    }
}

const TIME: Time = Time { seconds: 1_600_000_000, nanoseconds: 123_456_789 };

fn owned(mode: u32, uid: u32, gid: u32) -> Attributes {
    Attributes { mode, uid, gid, mtime: TIME, xattrs: Xattrs::new() }
}

fn with_xattrs(mode: u32, xattrs: &[(&str, &[u8])]) -> Attributes {
    let xattrs = xattrs.iter().map(|(name, value)| (name.as_bytes().to_vec(), value.to_vec())).collect();
    Attributes { mode, xattrs, ..Attributes::default() }
}

/// One of everything.
fn zoo(objects: &Objects) -> Tree {
    let mut tree = Tree::new(owned(0o755, 0, 0));
    let mut add =
        |parent, name: &[u8], content, attributes| tree.add(parent, name, content, attributes).unwrap();
    let root = NodeId::ROOT;
    let dir = add(root, b"dir", Content::Directory, owned(0o1777, 70_000, 5));
    let big = Content::Regular(objects.add(&b"0123456789abcdef".repeat(9999)));
    // Another inode with the same object: its data are the same blocks.
    add(dir, b"as big", big.clone(), owned(0o600, 7, 7));
    let big = add(dir, b"big", big, owned(0o4755, 0, 80_000));
    add(dir, b"empty", Content::Regular(Data::Inline(Vec::new())), owned(0o600, 1, 2));
    add(dir, b"small", Content::Regular(Data::Inline(vec![b'x'; 64])), owned(0o644, 0, 0));
    add(dir, b"bytes \xff\xfe\n", Content::Regular(objects.add(&[7; 65])), owned(0o444, 0, 0));
    add(root, b"link", Content::Symlink(b"dir/small".to_vec()), owned(0o777, 0, 0));
    let long = [b"/".as_slice(), &[b'y'; 200]].concat().repeat(20);
    add(root, b"long link", Content::Symlink(long[..4000].to_vec()), owned(0o777, 0, 0));
    add(root, b"null", Content::CharDevice(Device { major: 1, minor: 3 }), owned(0o666, 0, 0));
    add(root, b"disk", Content::BlockDevice(Device { major: 259, minor: 70_000 }), owned(0o660, 0, 6));
    add(root, b"pipe", Content::Fifo, owned(0o644, 0, 0));
    add(root, b"socket", Content::Socket, owned(0o755, 0, 0));
    let value = [0xab; 9000];
    let xattrs: &[(&str, &[u8])] = &[
        ("user.large", &value),
        ("user.empty", b""),
        ("trusted.mine", b"1"),
        ("trusted.overlay.redirect", b"/etc/shadow"),
        ("trusted.overlay.overlay.x", b"nested"),
        ("security.capability", b"\x01\0\0\x02\x20\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0"),
        ("odd.namespace", b"not for kernels"),
    ];
    add(root, b"xattrs", Content::Regular(objects.add(&[9; 5000])), with_xattrs(0o755, xattrs));
    add(
        root,
        b"xattr link",
        Content::Symlink(b"target".to_vec()),
        with_xattrs(0o777, &[("trusted.t", &value)]),
    );
    let opaque = [("trusted.overlay.opaque", b"y".as_slice()), ("user.u", b"v")];
    add(root, b"opaque", Content::Directory, with_xattrs(0o755, &opaque));
    let many = add(root, b"many", Content::Directory, owned(0o755, 0, 0));
    for number in 0..3000 {
        let name =
            format!("{}entry with a rather long name {number}", if number % 2 == 0 { "+" } else { "" });
        add(many, name.as_bytes(), Content::Directory, owned(0o700, number, number));
    }
    tree.link(dir, b"big again", big).unwrap();
    tree.link(many, b"!big", big).unwrap();
    tree
}

fn new_mount(
    kind: &str,
    options: &[(&str, &Path)],
    flags: &[(&str, &str)],
) -> rustix::io::Result<std::os::fd::OwnedFd> {
    let fs = fsopen(kind, FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_set_flag(fs.as_fd(), "ro")?;
    for (key, value) in options {
        fsconfig_set_string(fs.as_fd(), *key, CString::new(value.as_os_str().as_bytes()).unwrap())?;
    }
    for (key, value) in flags {
        fsconfig_set_string(fs.as_fd(), *key, *value)?;
    }
    fsconfig_create(fs.as_fd())?;
    fsmount(fs.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::MOUNT_ATTR_RDONLY)
}

/// A mount that goes when the test does, however that ends.
struct Mounted(PathBuf);

impl Mounted {
    fn new(target: PathBuf, kind: &str, options: &[(&str, &Path)], flags: &[(&str, &str)]) -> Self {
        fs::create_dir_all(&target).unwrap();
        let mount =
            new_mount(kind, options, flags).unwrap_or_else(|error| panic!("cannot mount {kind}: {error}"));
        move_mount(mount.as_fd(), "", CWD, &target, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH).unwrap();
        Self(target)
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        unmount(&self.0, UnmountFlags::DETACH).unwrap();
    }
}

/// Compares what the kernel shows below `path` with a node and everything below it.
fn assert_shows(
    tree: &Tree,
    objects: &Objects,
    id: NodeId,
    path: &Path,
    inodes: &mut BTreeMap<NodeId, u64>,
) -> usize {
    let node = tree.node(id);
    let at = path.display();
    let metadata = fs::symlink_metadata(path).unwrap();
    let attributes = node.attributes;
    assert_eq!(metadata.mode() & 0o7777, attributes.mode, "{at}");
    assert_eq!((metadata.uid(), metadata.gid()), (attributes.uid, attributes.gid), "{at}");
    let time = (metadata.mtime(), metadata.mtime_nsec());
    assert_eq!(time, (attributes.mtime.seconds, attributes.mtime.nanoseconds.into()), "{at}");
    assert_eq!(*inodes.entry(id).or_insert(metadata.ino()), metadata.ino(), "{at}: hard links are one inode");
    for (name, value) in &attributes.xattrs {
        let name = std::str::from_utf8(name).unwrap();
        let shown = xattr::get(path, name);
        match name {
            "odd.namespace" => assert!(shown.is_err()),
            "trusted.overlay.opaque" => assert_eq!(shown.unwrap(), None, "overlayfs keeps its own"),
            _ => assert_eq!(shown.unwrap().as_deref(), Some(&value[..]), "{at} {name}"),
        }
    }
    let kind = metadata.file_type();
    match node.content {
        Content::Directory => {
            // Overlays count no subdirectories.
            let mut count = 1;
            for (name, child) in tree.children(id) {
                count +=
                    assert_shows(tree, objects, child, &path.join(std::ffi::OsStr::from_bytes(name)), inodes);
            }
            assert_eq!(fs::read_dir(path).unwrap().count(), tree.children(id).count(), "{at}");
            return count;
        }
        Content::Regular(data) => {
            let expected = match data {
                Data::Inline(bytes) => bytes.clone(),
                Data::Object { digest, .. } => fs::read(objects.path(digest)).unwrap(),
            };
            assert_eq!(metadata.len(), expected.len() as u64, "{at}");
            assert_eq!(fs::read(path).unwrap(), expected, "{at}");
            assert_eq!(metadata.nlink(), u64::from(node.links), "{at}");
        }
        Content::Symlink(target) => {
            assert_eq!(fs::read_link(path).unwrap().as_os_str().as_bytes(), target, "{at}");
        }
        Content::CharDevice(device) | Content::BlockDevice(device) => {
            assert_eq!(kind.is_char_device(), matches!(node.content, Content::CharDevice(_)));
            let expected = rustix::fs::makedev(device.major, device.minor);
            assert_eq!(metadata.rdev(), expected, "{at}");
        }
        Content::Fifo => assert!(kind.is_fifo()),
        Content::Socket => assert!(kind.is_socket()),
    }
    1
}

fn write_zoo(directory: &Path) -> (Objects, Tree, PathBuf, PathBuf) {
    let objects = Objects(directory.join("objects"));
    let tree = zoo(&objects);
    let (lean, full) = (directory.join("lean.erofs"), directory.join("full.erofs"));
    write_metadata(&tree, File::create(&lean).unwrap()).unwrap();
    write_full(&tree, &objects, File::create(&full).unwrap()).unwrap();
    (objects, tree, lean, full)
}

#[test]
fn the_kernel_shows_what_was_written() {
    if !require_root() {
        return;
    }
    let directory = tempfile::Builder::new().prefix("kiln-erofs-").tempdir().unwrap();
    let (objects, tree, lean, full) = write_zoo(directory.path());
    let lean_at = Mounted::new(directory.path().join("lean"), "erofs", &[("source", &lean)], &[]);
    let root = Mounted::new(
        directory.path().join("root"),
        "overlay",
        &[("lowerdir+", &lean_at.0), ("datadir+", &objects.0)],
        &[("metacopy", "on"), ("redirect_dir", "on")],
    );
    let mut inodes = BTreeMap::new();
    assert_eq!(assert_shows(&tree, &objects, NodeId::ROOT, &root.0, &mut inodes), tree.len() + 2);

    // The image with data needs neither overlay nor objects, but shows overlayfs's names as they are written.
    let full_at = Mounted::new(directory.path().join("full"), "erofs", &[("source", &full)], &[]);
    inodes.clear();
    for name in [b"dir".as_slice(), b"link", b"long link", b"many"] {
        let node = tree.child(NodeId::ROOT, name).unwrap();
        let path = full_at.0.join(std::ffi::OsStr::from_bytes(name));
        assert_shows(&tree, &objects, node, &path, &mut inodes);
    }
    let opaque = xattr::get(full_at.0.join("opaque"), "trusted.overlay.opaque").unwrap();
    assert_eq!(opaque.as_deref(), Some(&b"y"[..]));
}

#[test]
fn erofs_utils_accept_what_was_written() {
    let (Some(fsck), Some(dump)) = (require("fsck.erofs"), require("dump.erofs")) else { return };
    let directory = tempfile::Builder::new().prefix("kiln-erofs-").tempdir().unwrap();
    let (_, tree, lean, full) = write_zoo(directory.path());
    for image in [&lean, &full] {
        let output = Command::new(&fsck).args(["-d3", "--extract"]).arg(image).output().unwrap();
        let text =
            String::from_utf8_lossy(&output.stderr).into_owned() + &String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success(), "{}: {text}", image.display());
        let output = Command::new(&dump).arg("-s").arg(image).output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success(), "{text}");
        assert!(text.contains(&format!("{}", tree.len())), "{text}");
        assert!(text.contains("sb_csum"), "{text}");
    }
}

#[test]
fn images_of_mkfs_erofs_are_read() {
    let Some(mkfs) = require("mkfs.erofs") else { return };
    let directory = tempfile::Builder::new().prefix("kiln-erofs-").tempdir().unwrap();
    let source = directory.path().join("source");
    fs::create_dir_all(source.join("sub")).unwrap();
    let large: Vec<u8> = (0..10_000_u32).map(|number| (number % 251) as u8).collect();
    fs::write(source.join("large"), &large).unwrap();
    fs::hard_link(source.join("large"), source.join("sub/large too")).unwrap();
    fs::write(source.join("small"), b"small").unwrap();
    std::os::unix::fs::symlink("small", source.join("link")).unwrap();
    for number in 0..500 {
        fs::write(source.join(format!("sub/{number}")), b"").unwrap();
    }
    let mut with_xattrs = true;
    for name in ["large", "small", "sub"] {
        // Not every file system that holds temporary files has them.
        with_xattrs &= xattr::set(source.join(name), "user.shared", &[b'x'; 300]).is_ok();
    }
    for options in [&["-x1"][..], &["-x1", "-Eforce-inode-extended"], &["-Enoinline_data"]] {
        let image = directory.path().join("image");
        let _ = fs::remove_file(&image);
        let output = Command::new(&mkfs).args(options).arg(&image).arg(&source).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let bytes = fs::read(&image).unwrap();
        let tree = Image::open(&bytes).unwrap().to_tree().unwrap();
        assert_eq!(tree.len(), 505, "{options:?}");
        let file = tree.node(tree.child(NodeId::ROOT, b"large").unwrap());
        let expected = Data::Object { digest: Digest::of(&large), size: large.len() as u64 };
        assert_eq!(*file.content, Content::Regular(expected), "{options:?}");
        assert_eq!(file.links, 2);
        for name in [b"large".as_slice(), b"small", b"sub"] {
            let xattrs = &tree.node(tree.child(NodeId::ROOT, name).unwrap()).attributes.xattrs;
            let value = xattrs.get(b"user.shared".as_slice()).map(Vec::as_slice);
            assert_eq!(value, with_xattrs.then_some(&[b'x'; 300][..]), "{options:?}");
        }
        let sub = tree.child(NodeId::ROOT, b"sub").unwrap();
        assert_eq!(tree.children(sub).count(), 501);
    }
}
