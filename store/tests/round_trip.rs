//! Tars come back byte for byte: those of real programs, and odd ones made by hand.

mod common;

use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::Command;

use common::{Tar, fixture, header, seal};
use kiln_contract::Digest;
use kiln_erofs::{Data, Image, NodeId};

/// A tree with all that tars have a form for and an ordinary file system can hold.
fn odd_tree(root: &Path) {
    use std::os::unix::ffi::OsStrExt as _;
    std::fs::create_dir_all(root.join("dir/sub")).unwrap();
    std::fs::write(root.join("dir/small"), "small").unwrap();
    std::fs::write(root.join("dir/large"), vec![b'x'; 3_000_001]).unwrap();
    std::fs::write(root.join("dir/empty"), "").unwrap();
    std::fs::hard_link(root.join("dir/large"), root.join("dir/sub/link")).unwrap();
    symlink("../dir/small", root.join("sym")).unwrap();
    symlink("t".repeat(300), root.join("long-sym")).unwrap();
    std::fs::write(root.join("n".repeat(200)), "long name").unwrap();
    std::fs::write(root.join(std::ffi::OsStr::from_bytes(b"bad\xff\xfeutf8")), "invalid UTF-8").unwrap();
    let sparse = std::fs::File::create(root.join("sparse")).unwrap();
    for offset in [0, 1 << 20, 3 << 20] {
        std::os::unix::fs::FileExt::write_all_at(&sparse, &[b's'; 5000], offset).unwrap();
    }
    sparse.set_len(5 << 20).unwrap();
    let _ = xattr::set(root.join("dir/small"), "user.kiln", b"binary\0=\nvalue");
}

fn sparse_content() -> Vec<u8> {
    let mut content = vec![0; 5 << 20];
    for offset in [0, 1 << 20, 3 << 20] {
        content[offset..offset + 5000].fill(b's');
    }
    content
}

fn digest_at(fixture: &common::Fixture, layer: &Digest, path: &str) -> Digest {
    let bytes = std::fs::read(fixture.store.layer_path(layer)).unwrap();
    let image = Image::open(&bytes).unwrap();
    let mut here = image.root().unwrap();
    for name in path.split('/') {
        here = image.inode(here.lookup(name.as_bytes()).unwrap().unwrap().nid).unwrap();
    }
    match here.data().unwrap() {
        Data::Object { digest, .. } => digest,
        Data::Inline(bytes) => Digest::of(&bytes),
    }
}

#[test]
fn tars_of_gnu_tar_come_back_and_sparse_files_are_whole() {
    let Some(tar) = kiln_fixtures::require("tar") else { return };
    let dir = tempfile::tempdir().unwrap();
    odd_tree(dir.path());
    let fixture = fixture();
    let sparse = Digest::of(&sparse_content());
    for options in [
        &["--format=gnu"][..],
        &["--format=gnu", "--sparse"],
        &["--format=pax", "--xattrs", "--xattrs-include=*"],
        &["--format=pax", "--sparse", "--sparse-version=0.0"],
        &["--format=pax", "--sparse", "--sparse-version=0.1"],
        &["--format=pax", "--sparse", "--sparse-version=1.0", "--xattrs"],
        &["--format=pax", "--pax-option=exthdr.name=%d/x/%f,delete=atime"],
        &["--format=oldgnu", "--sparse", "-b", "1"],
        &["--format=gnu", "-V", "a volume label"],
    ] {
        let output =
            Command::new(&tar).args(options).args(["-C"]).arg(dir.path()).args(["-cf", "-", "."]).output();
        let output = output.unwrap();
        assert!(output.status.success(), "{options:?}: {}", String::from_utf8_lossy(&output.stderr));
        let layer = fixture.round_trip(&output.stdout).layer;
        assert_eq!(digest_at(&fixture, &layer, "sparse"), sparse, "{options:?}");
        assert_eq!(digest_at(&fixture, &layer, "dir/sub/link"), Digest::of(&vec![b'x'; 3_000_001]));
    }
}

#[test]
fn tars_of_python_come_back() {
    let Some(python) = kiln_fixtures::require("python3") else { return };
    let dir = tempfile::tempdir().unwrap();
    odd_tree(dir.path());
    let fixture = fixture();
    for format in ["USTAR_FORMAT", "GNU_FORMAT", "PAX_FORMAT"] {
        // ustar has no place for the long names.
        let skip = if format == "USTAR_FORMAT" { "len(t.name)<90 and len(t.linkname)<90" } else { "True" };
        let script = format!(
            "import sys,tarfile\nwith tarfile.open(fileobj=sys.stdout.buffer,mode='w|',format=tarfile.{format}) as t:\n \
             t.add(sys.argv[1],arcname='.',filter=lambda t:t if {skip} else None)"
        );
        let output = Command::new(&python).arg("-c").arg(script).arg(dir.path()).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let layer = fixture.round_trip(&output.stdout).layer;
        assert_eq!(digest_at(&fixture, &layer, "dir/small"), Digest::of(b"small"));
    }
}

#[test]
fn tars_of_bsdtar_come_back() {
    let Some(bsdtar) = kiln_fixtures::require("bsdtar") else { return };
    let dir = tempfile::tempdir().unwrap();
    odd_tree(dir.path());
    let fixture = fixture();
    for format in ["pax", "gnutar"] {
        let arguments = ["--format", format, "-cf", "-", "-C"];
        let output = Command::new(&bsdtar).args(arguments).arg(dir.path()).arg(".").output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let layer = fixture.round_trip(&output.stdout).layer;
        assert_eq!(digest_at(&fixture, &layer, "sparse"), Digest::of(&sparse_content()));
    }
}

#[test]
fn odd_archives_come_back_bit_for_bit() {
    let fixture = fixture();
    let mut v7 = header(b"v7", b'\0', 3, b"");
    v7[257..].fill(0);
    seal(&mut v7);
    let mut base256 = header(b"ids", b'0', 0, b"");
    base256[108..116].copy_from_slice(b"\x80\0\0\0\x7f\xff\xff\xff");
    base256[136..148].copy_from_slice(b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xfe");
    seal(&mut base256);
    let mut spaces = header(b"spaces", b'0', 0, b"");
    spaces[100..108].copy_from_slice(b"   644 \0");
    seal(&mut spaces);
    let data = [9; 777];
    let cases = [
        Vec::new(),
        vec![0; 1024],
        vec![0; 512],
        Tar::new().file("no-end", &data).0,
        [Tar::new().file("a", &data).end(), vec![0; 9216], b"and garbage after it".to_vec()].concat(),
        [Tar::new().file("a", &data).end(), Tar::new().file("never read", b"1").end()].concat(),
        Tar::new().raw(&v7).data(b"old").end(),
        Tar::new().raw(&base256).raw(&spaces).end(),
        Tar::new().file_bytes(b"\xff\xfe\x80", &data).end(),
        Tar::new().file("twice", &data).file("twice", &[8; 900]).end(),
        Tar::new().pax(&[("path", b"second wins")]).pax(&[("path", b"this")]).file("x", &data).end(),
        Tar::new()
            .pax(&[("mtime", b"-1.25"), ("SCHILY.xattr.security.capability", b"\x01\0\0\x02=\n\0")])
            .file("x", &data)
            .end(),
        Tar::new()
            .pax(&[("GNU.sparse.realsize", b"40"), ("GNU.sparse.map", b"3,2,30,1")])
            .file("tiny", b"abc")
            .end(),
    ];
    for tar in &cases {
        fixture.round_trip(tar);
    }
    let report = fixture.store.check(None).unwrap();
    assert!(report.damaged.is_empty(), "{:?}", report.damaged);
    assert!(report.layers > 5);
}

#[test]
fn attributes_reach_the_tree() {
    let fixture = fixture();
    let capability = b"\x01\0\0\x02\0\x04\0\0\0\0\0\0\0\0\0\0\0\0\0\0";
    let tar = Tar::new()
        .pax(&[
            ("mtime", b"-1.25"),
            ("uid", b"4000000000"),
            ("SCHILY.xattr.security.capability", capability),
            ("SCHILY.xattr.trusted.overlay.opaque", b"y"),
            ("SCHILY.xattr.trusted.overlay.redirect", b"/etc"),
        ])
        .dir("d")
        .pax(&[("GNU.sparse.realsize", b"40"), ("GNU.sparse.map", b"3,2,30,1"), ("GNU.sparse.name", b"tiny")])
        .file("x", b"abc");
    let layer = fixture.round_trip(&tar.end()).layer;
    let bytes = std::fs::read(fixture.store.layer_path(&layer)).unwrap();
    let tree = Image::open(&bytes).unwrap().to_tree().unwrap();
    let node = tree.node(tree.child(NodeId::ROOT, b"d").unwrap());
    assert_eq!((node.attributes.uid, node.attributes.gid), (4_000_000_000, 1000));
    assert_eq!((node.attributes.mtime.seconds, node.attributes.mtime.nanoseconds), (-2, 750_000_000));
    assert_eq!(node.attributes.xattrs[&b"security.capability"[..]], capability);
    // The image's own marks must not be taken for the layer's.
    assert!(!node.attributes.xattrs.contains_key(&b"trusted.overlay.opaque"[..]));
    assert_eq!(node.attributes.xattrs[&b"trusted.overlay.overlay.opaque"[..]], b"y");
    let mut expected = vec![0; 40];
    (expected[3], expected[4], expected[30]) = (b'a', b'b', b'c');
    assert_eq!(digest_at(&fixture, &layer, "tiny"), Digest::of(&expected));
}

#[test]
fn two_tars_of_one_tree_both_come_back() {
    let fixture = fixture();
    let (a, b) = ([1; 100], [2; 100]);
    let one = Tar::new().file("a", &a).file("b", &b).end();
    let two = Tar::new().file("b", &b).file("a", &a).end();
    let (first, second) = (fixture.import(&one).unwrap(), fixture.import(&two).unwrap());
    assert_eq!(first.layer, second.layer);
    assert_eq!(second.new_object_bytes, 0);
    for tar in [&one, &two] {
        let mut out = Vec::new();
        fixture.store.export_diff(&Digest::of(tar), &mut out).unwrap();
        assert!(out == *tar);
    }
}

#[test]
fn a_tar_becomes_the_same_layer_in_every_version() {
    let fixture = fixture();
    for (tar, layer) in [
        (
            Tar::new().dir("./").dir("d/").file("d/x", &[1; 100]),
            "6002aa85fbb6898c8179341858a57286a16bb7a26c595b9d2954cd5907fe5952",
        ),
        (
            Tar::new().dir("d/").file("d/x", &[1; 100]),
            "e15ca8dbe2099bedad9b0593cd3bdf93af04411297b71cd3214a3dc91a85f5e5",
        ),
        (
            Tar::new().dir("./").file("d/x", &[1; 100]),
            "70848e5026fc3aaf22342c985c8b49813d85d24d88c3ba260260e2fb00725c8b",
        ),
        (
            Tar::new().dir("./").file(".wh.x", b"").file("d/.wh..wh..opq", b"").dir("d/"),
            "7a47c5094b270736338a4ad8932f9c1d176f4d78f43a9fdcc83b98dca3e112ef",
        ),
    ] {
        // A change here is a change of the format: what old stores hold is then known by other names.
        assert_eq!(fixture.import(&tar.end()).unwrap().layer.hex(), layer);
    }
}

#[test]
fn a_directory_has_one_tar_that_real_tar_reads() {
    let Some(tar) = kiln_fixtures::require("tar") else { return };
    let dir = tempfile::tempdir().unwrap();
    let (from, to) = (dir.path().join("from"), dir.path().join("to"));
    odd_tree(&from);
    std::fs::create_dir(&to).unwrap();
    let fixture = fixture();
    let imported = fixture.store.import_directory(&from).unwrap();
    let bytes = fixture.export(&imported.layer);
    assert_eq!((Digest::of(&bytes), bytes.len() as u64), (imported.diff_id, imported.tar_size));
    let file = dir.path().join("x.tar");
    std::fs::write(&file, &bytes).unwrap();
    let output = Command::new(tar).args(["--xattrs", "-C"]).arg(&to).arg("-xf").arg(&file).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    // What was unpacked is the same layer again: names, contents, times to the nanosecond, links and xattrs.
    let again = fixture.store.import_directory(&to).unwrap();
    assert_eq!((again.layer, again.diff_id, again.new_object_bytes), (imported.layer, imported.diff_id, 0));
    // And so is the tar itself.
    assert_eq!(fixture.import(&bytes).unwrap().layer, imported.layer);
}
