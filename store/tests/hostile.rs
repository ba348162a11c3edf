//! Tars that somebody made to do harm, or by mistake.

mod common;

use std::io::{Read, repeat};

use common::{Tar, fixture, header, seal};
use kiln_contract::Digest;
use kiln_erofs::{Content, Image, NodeId};
use kiln_store::{ImportLimits, StoreError};

/// What is at a path of a layer's tree.
fn content(fixture: &common::Fixture, layer: &Digest, path: &str) -> Option<Content> {
    let bytes = std::fs::read(fixture.store.layer_path(layer)).unwrap();
    let tree = Image::open(&bytes).unwrap().to_tree().unwrap();
    let mut here = NodeId::ROOT;
    for name in path.split('/') {
        here = tree.child(here, name.as_bytes())?;
    }
    Some(tree.node(here).content.clone())
}

#[test]
fn names_that_lead_out_are_refused_and_leave_nothing() {
    let secret = tempfile::tempdir().unwrap();
    let outside = secret.path().join("x");
    let deep = format!("{}{}", "../".repeat(20), outside.display());
    for (tar, expected) in [
        (Tar::new().file("../x", b"1"), "refused tar entry `../x`: it leads out of the layer"),
        (Tar::new().file(&deep, b"1"), "it leads out of the layer"),
        (Tar::new().file("a/../../x", b"1"), "it leads out of the layer"),
        (
            Tar::new().entry("l", b'1', "../../etc/passwd"),
            "its link target `../../etc/passwd` leads out of the layer",
        ),
        (Tar::new().entry("l", b'1', "/etc/passwd"), "its link target `/etc/passwd` is not in the layer"),
        (Tar::new().dir("d").entry("l", b'1', "d"), "its link target `d` is a directory"),
        (Tar::new().file("f", b"1").file("f/x", b"1"), "`f` on its way is not a directory"),
        (Tar::new().entry("l", b'2', ""), "its link target has 0 bytes"),
        (Tar::new().entry("z", b'Z', ""), "its type is `Z`, which is not known"),
    ] {
        let fixture = fixture();
        let error = fixture.import(&tar.end()).unwrap_err().to_string();
        assert!(error.contains(expected), "{error} / {expected}");
        assert!(fixture.is_untouched() && !outside.exists());
    }
}

#[test]
fn absolute_names_and_links_on_the_way_stay_inside() {
    let fixture = fixture();
    let data = [7; 100];
    let tar = Tar::new()
        .file("/etc/x", &data)
        .entry("l", b'2', "/srv")
        .file("l/y", &data)
        .entry("up", b'2', "../..");
    let layer = fixture.round_trip(&tar.file("up/z", &data).end()).layer;
    for path in ["etc/x", "srv/y", "z"] {
        assert!(matches!(content(&fixture, &layer, path), Some(Content::Regular(_))), "{path}");
    }
    assert!(!std::path::Path::new("/srv/y").exists());
}

#[test]
fn devices_are_kept_in_the_tree_and_never_made() {
    let fixture = fixture();
    let mut null = header(b"dev/null", b'3', 0, b"");
    null[329..337].copy_from_slice(b"0000001\0");
    null[337..345].copy_from_slice(b"0000003\0");
    seal(&mut null);
    let layer = fixture.round_trip(&Tar::new().raw(&null).entry("pipe", b'6', "").end()).layer;
    let device = kiln_erofs::Device { major: 1, minor: 3 };
    assert_eq!(content(&fixture, &layer, "dev/null"), Some(Content::CharDevice(device)));
    assert_eq!(content(&fixture, &layer, "pipe"), Some(Content::Fifo));
}

#[test]
fn ten_gigabytes_of_zeros_are_refused_before_they_are_read() {
    let fixture = fixture();
    let size = 10_u64 << 30;
    let head = header(b"bomb", b'0', size, b"");
    let limits = ImportLimits { max_size: Some(1 << 20), ..ImportLimits::default() };
    let tar = head.chain(repeat(0).take(size));
    let error = fixture.store.import_tar(tar, None, limits).unwrap_err();
    assert!(matches!(error, StoreError::TooLarge { .. }), "{error}");
    assert!(error.to_string().contains("10737418240 bytes with `bomb`, at most 1048576"), "{error}");
    assert!(fixture.is_untouched());
    // Behind the end of the archive, too.
    let tar = Tar::new().end();
    let error = fixture.store.import_tar(tar.chain(repeat(7).take(size)), None, limits).unwrap_err();
    assert!(matches!(error, StoreError::TooLarge { .. }), "{error}");
}

#[test]
fn a_sparse_file_of_a_petabyte_is_refused() {
    let fixture = fixture();
    let size = (1_u64 << 50).to_string();
    let tar = Tar::new().pax(&[("GNU.sparse.realsize", size.as_bytes()), ("GNU.sparse.map", b"0,1")]);
    let error = fixture.import(&tar.file("holes", b"1").end()).unwrap_err();
    assert!(matches!(error, StoreError::TooLarge { .. }), "{error}");
}

#[test]
fn a_million_entries_are_imported_or_refused_by_number() {
    let fixture = fixture();
    let tar = Headers { next: 0, count: 1_000_000, block: [0; 512], at: 512 };
    let limits = ImportLimits { max_entries: 9_999, ..ImportLimits::default() };
    let error = fixture.store.import_tar(tar.clone(), None, limits).unwrap_err();
    assert_eq!(error.to_string(), "the layer is too large: it has more than 9999 entries");
    let imported = fixture.store.import_tar(tar, None, ImportLimits::default()).unwrap();
    assert_eq!(imported.entries, 1_000_000);
    assert!(content(&fixture, &imported.layer, "d7/f7").is_some());
}

/// A tar of empty files, made as it is read.
#[derive(Clone)]
struct Headers {
    next: u32,
    count: u32,
    block: [u8; 512],
    at: usize,
}

impl Read for Headers {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        if self.at == 512 {
            if self.next == self.count {
                return Ok(0);
            }
            self.block = header(format!("d{}/f{}", self.next % 1000, self.next).as_bytes(), b'0', 0, b"");
            (self.next, self.at) = (self.next + 1, 0);
        }
        let count = buffer.len().min(512 - self.at);
        buffer[..count].copy_from_slice(&self.block[self.at..self.at + count]);
        self.at += count;
        Ok(count)
    }
}

#[test]
fn long_names_and_deep_trees_have_their_limits() {
    let fixture = fixture();
    let long_path = format!("{}/{}", vec!["p".repeat(200); 20].join("/"), "q".repeat(75));
    assert_eq!(long_path.len(), 4096 - 1);
    for path in [long_path.clone(), format!("{long_path}y"), "d/".repeat(30_000) + "f"] {
        let tar = Tar::new().pax(&[("path", path.as_bytes())]).file("short", b"1").end();
        let layer = fixture.round_trip(&tar).layer;
        assert!(content(&fixture, &layer, &path).is_some());
        fixture.store.merged_tree(&[layer]).unwrap();
    }
    for (path, expected) in
        [("n".repeat(256), "cannot be the name"), ("d/".repeat(40_000), "a name of 80000 bytes")]
    {
        let tar = Tar::new().pax(&[("path", path.as_bytes())]).file("short", b"1").end();
        let error = fixture.import(&tar).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }
}

#[test]
fn a_tree_of_a_hundred_thousand_levels_overflows_no_stack() {
    // Deeper than any name may say: each link leads further down.
    let fixture = fixture();
    let step = "d/".repeat(2040);
    let mut tar = Tar::new();
    for level in 0..39 {
        let above = if level == 0 { String::new() } else { format!("l{}/", level - 1) };
        let target = format!("{above}{step}");
        tar = tar.pax(&[("linkpath", target.as_bytes())]).entry(&format!("l{level}"), b'2', "x");
    }
    let path = format!("l38/{}f", "d/".repeat(30_000));
    let tar = tar.pax(&[("path", path.as_bytes())]).file("x", &[1; 100]).end();
    let layer = fixture.round_trip(&tar).layer;
    let levels = 39 * 2040 + 30_000;
    assert!(content(&fixture, &layer, &format!("{}f", "d/".repeat(levels))).is_some());
    fixture.store.merged_tree(&[layer, layer]).unwrap();
}

#[test]
fn extended_headers_are_bounded() {
    let fixture = fixture();
    for kind in [b'x', b'L', b'K'] {
        let tar = header(b"huge", kind, 1 << 40, b"");
        let error = fixture.import(&tar).unwrap_err().to_string();
        assert!(error.contains("an extended header of 1099511627776 bytes"), "{error}");
    }
}

#[test]
fn sizes_that_are_negative_or_overflow_are_refused() {
    for (field, expected) in [
        (*b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff", "an entry has the size -1"),
        (*b"\xbf\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff", "a header's size is no number"),
        (*b"zzzzzzzzzzzz", "a header's size is no number"),
    ] {
        let fixture = fixture();
        let mut block = header(b"f", b'0', 0, b"");
        block[124..136].copy_from_slice(&field);
        seal(&mut block);
        let error = fixture.import(&block).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }
    let fixture = fixture();
    let tar = Tar::new().pax(&[("size", b"18446744073709551615")]).file("f", b"1").end();
    assert!(fixture.import(&tar).unwrap_err().to_string().contains("its size is 18446744073709551615"));
}

#[test]
fn damaged_archives_are_told_by_their_place() {
    let good = Tar::new().file("a", &[1; 2000]).file("b", &[2; 2000]).end();
    let mut bad_sum = good.clone();
    bad_sum[512 * 5] ^= 1;
    let mut lone = good[..512 * 5].to_vec();
    lone.extend_from_slice(&[0; 512]);
    lone.extend_from_slice(&header(b"c", b'0', 0, b""));
    let pending = Tar::new().pax(&[("path", b"x")]).end();
    for (tar, expected) in [
        (&good[..700], "bad tar archive at byte 700: it is truncated"),
        (&good[..100], "bad tar archive at byte 100: it is truncated"),
        (&bad_sum, "bad tar archive at byte 2560: a header has a wrong checksum"),
        (&lone, "a lone block of zeros"),
        (&pending, "it ends after an extended header"),
    ] {
        let fixture = fixture();
        let error = fixture.import(tar).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
        assert!(fixture.is_untouched());
    }
}

#[test]
fn a_wrong_digest_names_both_and_keeps_nothing() {
    let fixture = fixture();
    let expected = Digest::of(b"what was promised");
    let good = Tar::new().file("a", &[1; 100_000]).end();
    let garbage = vec![0x55; 100_000];
    for tar in [&good, &garbage] {
        let error = fixture.store.import_tar(&tar[..], Some(&expected), ImportLimits::default()).unwrap_err();
        let found = Digest::of(tar);
        assert_eq!(error.to_string(), format!("the layer's tar has digest {found}, expected {expected}"));
        assert!(fixture.is_untouched());
    }
}

#[test]
fn a_stream_that_fails_is_an_error_and_keeps_nothing() {
    struct Failing;
    impl Read for Failing {
        fn read(&mut self, _: &mut [u8]) -> std::io::Result<usize> {
            Err(std::io::Error::other("the network is gone"))
        }
    }
    let fixture = fixture();
    let tar = Tar::new().file("a", &[1; 3_000_000]).0;
    let error =
        fixture.store.import_tar(tar[..2_000_000].chain(Failing), None, ImportLimits::default()).unwrap_err();
    assert_eq!(error.to_string(), "cannot read the layer: the network is gone");
    assert!(fixture.is_untouched());
}
