//! Upper directories as the kernel's overlayfs leaves them become layers.

mod common;

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;

use common::mounted::{Mounted, run};
use common::{Fixture, Tar, fixture};
use kiln_contract::Digest;
use kiln_erofs::{Content, Data, NodeId};

/// What a walk over a directory sees: modes, owners, times, sizes, links, contents.
fn listing(root: &Path) -> Vec<u8> {
    let output = Command::new("sh")
        .args(["-ec", "find . -mindepth 1 -printf '%p %y %m %U:%G %T@ %l\\n' | sort; find . -type f | sort | xargs -d '\\n' sha256sum; find etc -type f -links +1 -printf '%p %n\\n' | sort"])
        .current_dir(root)
        .output()
        .unwrap();
    assert!(output.status.success());
    // Links only where both names are in the upper directory: overlayfs still counts those that a copy-up broke.
    output.stdout
}

fn base_layer(fixture: &Fixture) -> Digest {
    let large = vec![b'L'; 100_000];
    let tar = Tar::new()
        .dir("etc")
        .file("etc/conf", &large)
        .file("etc/mode", &[b'm'; 5000])
        .file("etc/small", b"s")
        .dir("dir")
        .file("dir/a", &[b'a'; 300])
        .file("dir/b", &[b'b'; 300])
        .dir("dir/sub")
        .file("dir/sub/c", &[b'c'; 300])
        .dir("gone")
        .file("gone/x", b"1")
        .dir("again")
        .file("again/old", b"1")
        .file("renamed", &[b'r'; 7000])
        .file("h1", &[b'h'; 900])
        .entry("h2", b'1', "h1")
        .entry("sym", b'2', "etc/conf");
    fixture.import(&tar.end()).unwrap().layer
}

#[test]
fn a_commit_shows_what_the_container_saw() {
    if !kiln_fixtures::require_root() {
        return;
    }
    let fixture = fixture();
    let base = base_layer(&fixture);
    let mounted = Mounted::new(&fixture, &[base]);
    mounted.sh(
        "echo changed >> etc/conf; chmod 0600 etc/mode; rm etc/small; rm -r gone; rm -r again; mkdir again; echo new > again/new
         mv dir moved; echo added > moved/added; rm moved/a; chown 5:6 moved/sub/c; mv renamed etc/other; chmod 0700 etc/other
         ln etc/conf etc/conf-link; mkfifo pipe; mknod null c 1 3; mkdir -p deep/er; head -c 200000 /dev/zero > deep/er/zeros
         chmod 4755 h1; setfattr -n user.x -v y moved/b; setfattr -n trusted.x -v z moved/b; touch -d @7.25 deep/er/zeros",
    );
    let imported = mounted.commit(&fixture, &[base]);
    let seen = listing(&mounted.base.join("root"));
    // Only what changed is written: the changed file and the zeros, not what was renamed or only changed its mode.
    assert_eq!(imported.new_object_bytes, 100_008 + 200_000);
    drop(mounted);
    let layers = [base, imported.layer];
    std::fs::remove_dir_all(fixture.dir.path().join("mounts")).unwrap();
    let again = Mounted::new(&fixture, &layers);
    let expected = String::from_utf8_lossy(&seen).into_owned();
    assert_eq!(String::from_utf8_lossy(&listing(&again.base.join("root"))), expected);
    run(Command::new("sh")
        .args(["-ec", "test \"$(getfattr --only-values -n trusted.x moved/b)\" = z"])
        .current_dir(again.base.join("root")));
    drop(again);
    // Through a registry and back: the tar is the same layer.
    let tar = fixture.export(&imported.layer);
    assert_eq!(Digest::of(&tar), imported.diff_id);
    assert_eq!(fixture.import(&tar).unwrap().layer, imported.layer);
    assert_eq!(fixture.store.check(None).unwrap().damaged, [""; 0]);
}

#[test]
fn forms_of_upper_directories_are_understood() {
    if !kiln_fixtures::require_root() {
        return;
    }
    let fixture = fixture();
    let base = base_layer(&fixture);
    let upper = fixture.dir.path().join("upper");
    std::fs::create_dir_all(upper.join("xattr-whiteouts")).unwrap();
    std::fs::create_dir_all(upper.join("opaque")).unwrap();
    std::fs::write(upper.join("xattr-whiteouts/gone"), "").unwrap();
    std::fs::write(upper.join("own"), "own").unwrap();
    run(Command::new("mknod").arg(upper.join("removed")).args(["c", "0", "0"]));
    for (path, name, value) in [
        ("opaque", "trusted.overlay.opaque", "y"),
        ("opaque", "trusted.overlay.origin", "x"),
        ("xattr-whiteouts", "trusted.overlay.opaque", "x"),
        ("xattr-whiteouts/gone", "trusted.overlay.whiteout", "y"),
        ("own", "trusted.overlay.overlay.redirect", "/theirs"),
        ("own", "user.overlay.metacopy", ""),
    ] {
        xattr::set(upper.join(path), name, value.as_bytes()).unwrap();
    }
    // File capabilities that are bound to a user namespace whose root is 1000.
    let mut capability = vec![1, 0, 0, 3, 0, 4, 0, 0];
    capability.resize(20, 0);
    capability.extend_from_slice(&1000_u32.to_le_bytes());
    xattr::set(upper.join("own"), "security.capability", &capability).unwrap();
    std::os::unix::fs::chown(upper.join("own"), Some(1007), Some(1008)).unwrap();
    xattr::set(upper.join("own"), "security.capability", &capability).unwrap();
    let map = |id: u32, _| id.saturating_sub(1000);
    let imported = fixture.store.import_upper(&upper, &[base], &map).unwrap();
    let bytes = std::fs::read(fixture.store.layer_path(&imported.layer)).unwrap();
    let tree = kiln_erofs::Image::open(&bytes).unwrap().to_tree().unwrap();
    let at = |path: &str| {
        let id = path.split('/').fold(NodeId::ROOT, |here, name| tree.child(here, name.as_bytes()).unwrap());
        tree.node(id)
    };
    let whiteout = Content::CharDevice(kiln_erofs::Device { major: 0, minor: 0 });
    assert_eq!((at("removed").content, at("xattr-whiteouts/gone").content), (&whiteout, &whiteout));
    let xattrs = |path| {
        at(path)
            .attributes
            .xattrs
            .iter()
            .map(|(k, v)| (String::from_utf8_lossy(k).into_owned(), v.clone()))
            .collect::<BTreeMap<_, _>>()
    };
    assert_eq!(xattrs("opaque"), [("trusted.overlay.opaque".to_owned(), b"y".to_vec())].into());
    assert!(xattrs("xattr-whiteouts").is_empty());
    let own = xattrs("own");
    assert_eq!(own["trusted.overlay.redirect"], b"/theirs");
    assert_eq!(own["user.overlay.metacopy"], b"");
    assert_eq!(own["security.capability"], [&[1, 0, 0, 2][..], &capability[4..20]].concat());
    assert_eq!((at("own").attributes.uid, at("own").attributes.gid), (7, 8));
    assert_eq!(at("own").content, &Content::Regular(Data::Inline(b"own".to_vec())));
}

#[test]
fn links_in_an_upper_directory_lead_nowhere() {
    let fixture = fixture();
    let upper = fixture.dir.path().join("upper");
    std::fs::create_dir_all(upper.join("dir")).unwrap();
    std::os::unix::fs::symlink("/etc", upper.join("etc")).unwrap();
    std::os::unix::fs::symlink("/etc/passwd", upper.join("dir/passwd")).unwrap();
    let imported = fixture.store.import_upper(&upper, &[], &|id, _| id).unwrap();
    assert_eq!((imported.entries, imported.new_object_bytes), (4, 0));
}
