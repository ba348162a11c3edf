//! Stacks as the one tar that a root filesystem is.

mod common;

use std::process::Command;

use common::{Fixture, Tar, fixture, header, seal};
use kiln_contract::Digest;
use kiln_store::StoreError;

const CAPABILITY: &[u8] = b"\x01\0\0\x02\0\x04\0\0\0\0\0\0\0\0\0\0\0\0\0\0";

fn device(name: &str, kind: u8, major: u32, minor: u32) -> [u8; 512] {
    let mut block = header(name.as_bytes(), kind, 0, b"");
    block[329..337].copy_from_slice(format!("{major:07o}\0").as_bytes());
    block[337..345].copy_from_slice(format!("{minor:07o}\0").as_bytes());
    seal(&mut block);
    block
}

/// Three layers with all that a root filesystem can have, and all that a layer can take away.
fn stack(fixture: &Fixture) -> Vec<Digest> {
    let long = format!("long/{}", "n".repeat(200));
    let below = Tar::new()
        .pax(&[("uid", b"4000000000"), ("mtime", b"-1.25")])
        .dir("./")
        .dir("etc/")
        .file("etc/kept", &[1; 100_000])
        .file("etc/gone", &[2; 1000])
        .file("etc/small", b"small")
        .entry("etc/linked", b'1', "etc/kept")
        .entry("broken", b'1', "etc/kept")
        .dir("emptied/")
        .file("emptied/old", &[3; 1000])
        .dir("gone/")
        .file("gone/x", &[4; 1000])
        .raw(&device("null", b'3', 1, 3))
        .raw(&device("disk", b'4', 259, 65_537))
        .entry("pipe", b'6', "")
        .entry("link", b'2', "etc/kept")
        .pax(&[("path", long.as_bytes())])
        .file("x", &[5; 500]);
    let middle = Tar::new()
        .file(".wh.gone", b"")
        .file("etc/.wh.gone", b"")
        .file("emptied/.wh..wh..opq", b"")
        .file("emptied/new", &[6; 2000])
        .file("broken", b"no link any more")
        .pax(&[("SCHILY.xattr.security.capability", CAPABILITY), ("SCHILY.xattr.user.a", b"=\n\0")])
        .file("ping", &[7; 3000])
        .entry("ping6", b'1', "ping")
        .pax(&[
            ("SCHILY.xattr.trusted.overlay.opaque", b"y"),
            ("SCHILY.xattr.trusted.overlay.redirect", b"/x"),
        ])
        .dir("not-opaque/");
    let above = Tar::new()
        .pax(&[("GNU.sparse.realsize", b"5000000"), ("GNU.sparse.map", b"0,3,4999999,1")])
        .file("sparse", b"abcd")
        .file(".wh.never-was", b"");
    [below, middle, above].map(|tar| fixture.round_trip(&tar.end()).layer).into()
}

fn rootfs(fixture: &Fixture, layers: &[Digest]) -> Vec<u8> {
    let mut tar = Vec::new();
    fixture.store.export_rootfs(layers, &mut tar).unwrap();
    tar
}

#[test]
fn a_stack_becomes_one_tar_that_is_the_same_tree() {
    let fixture = fixture();
    let layers = stack(&fixture);
    let tar = rootfs(&fixture, &layers);
    // A layer that states all and removes nothing is its own merged tree: every attribute, link and byte is in this name.
    let merged = Digest::of(&std::fs::read(fixture.store.merged_tree(&layers).unwrap()).unwrap());
    let elsewhere = common::fixture();
    assert_eq!(elsewhere.import(&tar).unwrap().layer, merged);
    assert!(rootfs(&fixture, &layers) == tar, "the same stack gave another tar");
    let again = stack(&elsewhere);
    assert!(rootfs(&elsewhere, &again) == tar, "the same stack gave another tar in another store");
}

#[test]
fn real_tar_reads_it_and_sees_no_whiteouts() {
    let Some(tar) = kiln_fixtures::require("tar") else { return };
    let fixture = fixture();
    let file = fixture.dir.path().join("root.tar");
    std::fs::write(&file, rootfs(&fixture, &stack(&fixture))).unwrap();
    let list = Command::new(&tar).args(["--numeric-owner", "-tvf"]).arg(&file).output().unwrap();
    assert!(list.status.success(), "{}", String::from_utf8_lossy(&list.stderr));
    let told: Vec<String> = String::from_utf8(list.stdout)
        .unwrap()
        .lines()
        // Without sizes and times: kind and mode, owner, number of a device, name.
        .map(|line| {
            let words: Vec<&str> = line.split_whitespace().collect();
            let device = if line.starts_with(['b', 'c']) { format!(" {}", words[2]) } else { String::new() };
            format!("{} {}{device} {}", words[0], words[1], words[5..].join(" "))
        })
        .collect();
    let long = format!("-rw-r--r-- 1000/1000 long/{}", "n".repeat(200));
    assert_eq!(
        told,
        [
            "drw-r--r-- 4000000000/1000 ./",
            "-rw-r--r-- 1000/1000 broken",
            "brw-r--r-- 1000/1000 259,65537 disk",
            "drw-r--r-- 1000/1000 emptied/",
            "-rw-r--r-- 1000/1000 emptied/new",
            "drw-r--r-- 1000/1000 etc/",
            "-rw-r--r-- 1000/1000 etc/kept",
            "hrw-r--r-- 1000/1000 etc/linked link to etc/kept",
            "-rw-r--r-- 1000/1000 etc/small",
            "lrw-r--r-- 1000/1000 link -> etc/kept",
            "drwxr-xr-x 0/0 long/",
            &long,
            "drw-r--r-- 1000/1000 not-opaque/",
            "crw-r--r-- 1000/1000 1,3 null",
            "-rw-r--r-- 1000/1000 ping",
            "hrw-r--r-- 1000/1000 ping6 link to ping",
            "prw-r--r-- 1000/1000 pipe",
            "-rw-r--r-- 1000/1000 sparse",
        ]
    );
}

#[test]
fn one_layer_gives_its_own_tar_unless_it_removes_something() {
    let fixture = fixture();
    // Not in order, with an owner's name and without an entry for its root: no writer of ours would make it.
    let mut named = header(b"z", b'0', 0, b"");
    named[265..269].copy_from_slice(b"user");
    seal(&mut named);
    let own = Tar::new().raw(&named).file("d/a", &[1; 100]).end();
    let layer = fixture.import(&own).unwrap().layer;
    assert!(rootfs(&fixture, &[layer]) == own);
    let removes = fixture.import(&Tar::new().file("d/.wh.b", b"").file("d/a", b"1").end()).unwrap().layer;
    let tar = rootfs(&fixture, &[removes]);
    assert!(!tar.windows(4).any(|part| part == b".wh."));
    let elsewhere = common::fixture();
    let merged = std::fs::read(fixture.store.merged_tree(&[removes]).unwrap()).unwrap();
    assert_eq!(elsewhere.import(&tar).unwrap().layer, Digest::of(&merged));
    // A stack of no layers is an empty directory.
    assert_eq!(elsewhere.import(&rootfs(&fixture, &[])).unwrap().entries, 1);
}

#[test]
fn a_tree_too_deep_for_a_tar_is_refused_before_the_tar_grows_without_end() {
    let fixture = fixture();
    let down = "d/".repeat(2000);
    let mut tar = Tar::new();
    for level in 0..20 {
        let above = if level == 0 { String::new() } else { format!("l{}/", level - 1) };
        let target = format!("{above}{down}");
        tar = tar.pax(&[("linkpath", target.as_bytes())]).entry(&format!("l{level}"), b'2', "x");
    }
    let layer = fixture.import(&tar.file("l19/f", b"1").end()).unwrap().layer;
    let error = fixture.store.export_rootfs(&[layer, layer], std::io::sink()).unwrap_err();
    assert!(matches!(error, StoreError::Entry { .. }), "{error}");
    assert!(
        error.to_string().ends_with("a name of 65538 bytes (at most 65536 are read from a tar)"),
        "{error}"
    );
}
