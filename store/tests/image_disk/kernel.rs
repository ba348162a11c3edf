//! Disks before the kernel: what it shows of a disk is what it shows of the layers.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use kiln_contract::{Digest, Silent};
use kiln_fixtures::{debian_rootfs, require, require_root};
use kiln_store::{ImportLimits, Store};

use crate::file_system::{Mounted, run};
use crate::listing::listing;
use crate::open;

/// Layers as the kernel stacks them itself, without a merged tree of ours.
struct Stacked {
    // Dropped in this order.
    overlay: Mounted,
    _layers: Vec<Mounted>,
}

impl Stacked {
    fn new(store: &Store, layers: &[Digest], at: &Path) -> Self {
        let mounted: Vec<_> = layers
            .iter()
            .enumerate()
            .map(|(number, layer)| {
                Mounted::new("erofs", "ro", &store.layer_path(layer), at.join(number.to_string()))
            })
            .collect();
        let lower: Vec<_> = mounted.iter().rev().map(|layer| layer.0.display().to_string()).collect();
        let options = format!(
            "ro,metacopy=on,redirect_dir=on,lowerdir={}::{}",
            lower.join(":"),
            store.objects_dir().display()
        );
        let overlay = Mounted::new("overlay", &options, Path::new("overlay"), at.join("stacked"));
        Self { overlay, _layers: mounted }
    }
}

fn import(store: &Store, root: &Path) -> Digest {
    let mut tar = Command::new("tar")
        .args([
            "--create",
            "--xattrs",
            "--xattrs-include=*",
            "--acls",
            "--numeric-owner",
            "--format=posix",
            "-C",
        ])
        .arg(root)
        .arg(".")
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let layer = store.import_tar(tar.stdout.take().unwrap(), None, ImportLimits::default()).unwrap().layer;
    assert!(tar.wait().unwrap().success());
    layer
}

/// A layer over Debian with everything that a tree can have.
fn odd_things(at: &Path) -> PathBuf {
    let root = at.join("odd");
    std::fs::create_dir_all(&root).unwrap();
    run(Command::new("bash").current_dir(&root).args([
        "-ec",
        "mkdir -p etc usr/share var/lib usr/bin sticky dev
         touch etc/.wh.debian_version etc/.wh.apt var/lib/.wh..wh..opq .wh.media
         echo changed > etc/issue; cp /bin/true usr/bin/capable; cp /bin/true 'usr/bin/also capable'
         setcap cap_net_raw+ep usr/bin/capable
         head -c 300000 /dev/urandom > big; ln big big-too; ln big etc/big-three; cp big equal; chown 70000:80000 equal
         setfattr -n user.note -v hello big; setfattr -n trusted.note -v secret big; setfattr -n user.large -v $(printf %03000d 0) etc/issue
         setfattr -n user.u -v 1 sticky; chmod 1777 sticky; chmod 6755 'usr/bin/also capable'
         mknod dev/null c 1 3; mknod dev/disk b 259 70000; mkfifo dev/pipe
         ln -s /nowhere dangling; ln -s $(printf 'x%.0s' {1..3000}) long
         truncate -s 1M hollow; printf end >> hollow; : > empty; printf %064d 0 > inline; printf %065d 0 > object
         touch -h -d '1965-04-03 02:01:00.123456789Z' etc/issue dangling; touch -d '2150-01-01 00:00:00.5Z' equal
         mkdir many; cd many; for i in {1..700}; do echo $i > a-name-that-is-somewhat-long-$i; done",
    ]));
    root
}

#[test]
fn a_kernel_shows_of_a_disk_what_it_shows_of_the_layers() {
    if !require_root() {
        return;
    }
    let (Some(debian), Some(fsck), Some(dump)) =
        (debian_rootfs(), require("fsck.erofs"), require("dump.erofs"))
    else {
        return;
    };
    let directory = tempfile::Builder::new().tempdir_in("/var/tmp").unwrap();
    let (_home, store) = open(&directory.path().join("home"));
    let layers = [import(&store, &debian), import(&store, &odd_things(directory.path()))];
    let disk = store.image_disk(&layers, &Silent).unwrap();

    let output = Command::new(fsck).arg("--extract").arg(&disk).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let features = run(Command::new(dump).arg("-s").arg(&disk));
    let features =
        features.lines().find_map(|line| line.strip_prefix("Filesystem features:")).unwrap().trim();
    assert_eq!(features, "sb_csum mtime", "nothing that Linux 6.1 does not know");

    let stacked = Stacked::new(&store, &layers, directory.path());
    // A loop device: the kernel sees blocks, not the file.
    let mounted = Mounted::new("erofs", "ro,loop", &disk, directory.path().join("disk"));
    let (expected, shown) = (listing(&stacked.overlay.0), listing(&mounted.0));
    for (path, expected) in &expected {
        assert_eq!(shown.get(path), Some(expected), "{}", path.escape_ascii());
    }
    assert_eq!(expected.len(), shown.len());
    assert!(shown.len() > 9000, "{} entries", shown.len());
    let kinds: std::collections::BTreeSet<_> = shown.values().map(|one| one.kind).collect();
    assert_eq!(kinds.len(), 6, "{kinds:?}");
    assert!(!shown.contains_key(&b"/media"[..]) && !shown.contains_key(&b"/var/lib/dpkg"[..]));
    for (path, one) in &shown {
        let marks = one.xattrs.keys().filter(|name| name.starts_with(b"trusted.overlay."));
        assert_eq!(marks.count(), 0, "{}", path.escape_ascii());
    }
}
