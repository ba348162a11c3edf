//! Bytes that must not change by accident, and bytes that were changed on purpose.

use std::fs;
use std::io::{Cursor, Read};
use std::path::Path;

use kiln_contract::Digest;
use kiln_erofs::{
    Attributes, Content, Data, Device, Image, ImageError, NodeId, ObjectSource, Time, Tree, fuzzing,
    write_full, write_metadata,
};

const OBJECT: &[u8] = &[b'k'; 5000];

struct OneObject;

impl ObjectSource for OneObject {
    fn open(&self, _: &Digest) -> std::io::Result<Box<dyn Read + '_>> {
        Ok(Box::new(Cursor::new(OBJECT)))
    }
}

/// Small, and one of everything that has a form of its own on disk.
fn sample() -> Tree {
    let common = Time { seconds: 1_700_000_000, nanoseconds: 5 };
    let plain = |mode| Attributes { mode, mtime: common, ..Attributes::default() };
    let odd = Attributes {
        mode: 0o4755,
        uid: 100_000,
        gid: 7,
        mtime: Time { seconds: -1, nanoseconds: 999_999_999 },
        xattrs: [
            (b"user.mime".to_vec(), b"text/plain".to_vec()),
            (b"trusted.overlay.origin".to_vec(), b"mine".to_vec()),
            (b"odd".to_vec(), Vec::new()),
        ]
        .into(),
    };
    let mut tree = Tree::new(plain(0o755));
    let mut add = |parent, name: &str, content, attributes| {
        tree.add(parent, name.as_bytes(), content, attributes).unwrap()
    };
    let dir = add(NodeId::ROOT, "dir", Content::Directory, plain(0o700));
    let object = Data::Object { digest: Digest::of(OBJECT), size: OBJECT.len() as u64 };
    let file = add(dir, "object", Content::Regular(object.clone()), plain(0o644));
    add(dir, "odd object", Content::Regular(object), odd);
    add(dir, "inline", Content::Regular(Data::Inline(b"hello\n".to_vec())), plain(0o644));
    add(dir, "empty", Content::Regular(Data::Inline(Vec::new())), plain(0o644));
    add(dir, "link", Content::Symlink(b"inline".to_vec()), plain(0o777));
    add(dir, "whiteout", Content::CharDevice(Device { major: 0, minor: 0 }), plain(0));
    add(dir, "disk", Content::BlockDevice(Device { major: 259, minor: 65_537 }), plain(0o660));
    add(dir, "pipe", Content::Fifo, plain(0o600));
    add(dir, "socket", Content::Socket, plain(0o600));
    let opaque = [(b"trusted.overlay.opaque".to_vec(), b"y".to_vec())].into();
    add(NodeId::ROOT, "opaque", Content::Directory, Attributes { xattrs: opaque, ..plain(0o755) });
    let many = add(NodeId::ROOT, "many", Content::Directory, plain(0o755));
    tree.link(many, b"object too", file).unwrap();
    for number in 0..40 {
        tree.link(many, format!("{number}{}", "long".repeat(25)).as_bytes(), file).unwrap();
    }
    tree
}

fn written() -> [(&'static str, Vec<u8>); 2] {
    let (mut lean, mut full) = (Vec::new(), Vec::new());
    write_metadata(&sample(), &mut lean).unwrap();
    write_full(&sample(), &OneObject, &mut full).unwrap();
    [("v1-metadata.erofs", lean), ("v1-full.erofs", full)]
}

fn samples() -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/samples")
}

/// A layer's digest is its identity: when this fails, every store and every commit made before changes its meaning.
/// Raise `format::VERSION`, keep the old samples for reading, and set KILN_BLESS to write new ones.
#[test]
fn the_same_tree_gives_the_bytes_it_gave_at_first() {
    let digests = [
        "bdc5bbb7e6802acfae0fc6255a0e18a826ace0152c1caf2f96a82bb84065b855",
        "4a95476341db59952bcfcc8916a83f58d26526b8934485b0062f4061a12d0086",
    ];
    for ((name, bytes), digest) in written().into_iter().zip(digests) {
        let path = samples().join(name);
        if std::env::var_os("KILN_BLESS").is_some() {
            fs::write(&path, &bytes).unwrap();
        }
        assert!(fs::read(&path).unwrap() == bytes, "{name} is written with other bytes than before");
        assert_eq!(Digest::of(&bytes).hex(), digest, "{name}");
    }
}

#[test]
fn a_newer_version_is_refused_by_its_number() {
    let [(_, mut bytes), _] = written();
    bytes[8] = 2;
    assert_eq!(Image::open(&bytes).unwrap_err(), ImageError::Version { found: 2, known: 1 });
}

#[test]
fn a_changed_first_block_is_noticed() {
    let [(_, mut bytes), _] = written();
    bytes[3000] ^= 1;
    assert!(matches!(Image::open(&bytes), Err(ImageError::Checksum { .. })));
}

#[test]
fn no_changed_byte_makes_the_reader_panic_or_hang() {
    let [(_, sound), _] = written();
    let length = fuzzing::walk(&sound).unwrap();
    assert_eq!(length, sample().len());
    let changes: [fn(u8) -> u8; 5] =
        [|byte| byte ^ 1, |byte| byte ^ 0x80, |_| 0, |_| 0xff, |byte| byte.wrapping_add(1)];
    let mut refused = 0;
    let mut bytes = sound.clone();
    // Nobody reads what is between Kiln's header and the superblock.
    for at in (0..32).chain(1024..sound.len()) {
        for change in &changes[at % 3..at % 3 + 3] {
            bytes[at] = change(sound[at]);
            if bytes[at] != sound[at] {
                refused += usize::from(fuzzing::walk(&bytes).is_err());
            }
        }
        bytes[at] = sound[at];
    }
    assert!(refused > 1000, "only {refused} changes were noticed");
    for length in (0..sound.len()).step_by(61) {
        let _ = fuzzing::walk(&sound[..length]);
    }
}

#[test]
fn the_fuzzers_corpus_is_walked() {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus/walk");
    let mut count = 0;
    for directory in [corpus, samples()] {
        for file in fs::read_dir(directory).unwrap() {
            let _ = fuzzing::walk(&fs::read(file.unwrap().path()).unwrap());
            count += 1;
        }
    }
    assert!(count >= 4);
}

/// Images that are made to unfold: the sizes are what they are, so that an answer must come at once.
#[test]
fn hostile_images_are_errors() {
    let find = |bytes: &[u8], path: &[&str]| {
        let image = Image::open(bytes).unwrap();
        let mut inode = image.root().unwrap();
        for name in path {
            inode = image.inode(inode.lookup(name.as_bytes()).unwrap().unwrap().nid).unwrap();
        }
        inode.nid() as usize * 32
    };
    let [(_, sound), _] = written();
    let dirent = |bytes: &[u8], name: &[u8]| {
        // In this image every name stands once, before no other occurrence of it.
        let image = Image::open(bytes).unwrap();
        let nid = image.root().unwrap().lookup(name).unwrap().unwrap().nid;
        let needle = nid.to_le_bytes();
        bytes.windows(8).position(|window| window == needle).unwrap()
    };
    type Damage<'d> = &'d dyn Fn(&mut Vec<u8>);
    let root = Image::open(&sound).unwrap().root_nid();
    let table: [(&str, Damage<'_>, &str); 6] = [
        (
            "a directory in itself",
            &|bytes| {
                let at = dirent(bytes, b"opaque");
                bytes[at..at + 8].copy_from_slice(&root.to_le_bytes());
            },
            "more than one name",
        ),
        (
            "a directory with two names",
            &|bytes| {
                let other = dirent(bytes, b"dir");
                let nid = bytes[other..other + 8].to_vec();
                let at = dirent(bytes, b"opaque");
                bytes[at..at + 8].copy_from_slice(&nid);
            },
            "more than one name",
        ),
        (
            "a directory larger than the image",
            &|bytes| {
                let at = find(bytes, &["many"]);
                bytes[at + 8..at + 12].copy_from_slice(&0x7fff_ffff_u32.to_le_bytes());
            },
            "beyond its end",
        ),
        (
            "xattrs that go beyond the end",
            &|bytes| {
                let at = find(bytes, &["opaque"]);
                bytes[at + 2..at + 4].copy_from_slice(&[0xff, 0xff]);
            },
            "beyond its end",
        ),
        (
            "compressed data",
            &|bytes| {
                let at = find(bytes, &["dir", "object"]);
                bytes[at] = 1 << 1;
            },
            "not supported",
        ),
        (
            "a redirect out of the objects",
            &|bytes| {
                let at = bytes.windows(8).position(|window| window == b"redirect").unwrap();
                bytes[at + 8..at + 12].copy_from_slice(b"/../");
            },
            "does not name an object",
        ),
    ];
    for (what, damage, expected) in table {
        let mut bytes = sound.clone();
        damage(&mut bytes);
        fuzzing::reseal(&mut bytes);
        let error = Image::open(&bytes).and_then(|image| image.to_tree()).unwrap_err().to_string();
        assert!(error.contains(expected), "{what}: {error}");
    }
}

/// A thousand directories that all have the same blocks would be a hundred thousand entries from a small image.
#[test]
fn directories_that_overlap_are_refused_before_they_unfold() {
    let mut tree = Tree::default();
    let plain = || Attributes { mode: 0o755, ..Attributes::default() };
    let file = tree.add(NodeId::ROOT, b"file", Content::Fifo, plain()).unwrap();
    let big = tree.add(NodeId::ROOT, b"big", Content::Directory, plain()).unwrap();
    for number in 0..2000 {
        tree.link(big, format!("name {number}").as_bytes(), file).unwrap();
    }
    for number in 0..1000 {
        tree.add(NodeId::ROOT, format!("d{number}").as_bytes(), Content::Directory, plain()).unwrap();
    }
    let mut bytes = Vec::new();
    write_metadata(&tree, &mut bytes).unwrap();
    let inode_at = |name: &str| {
        let image = Image::open(&bytes).unwrap();
        image.root().unwrap().lookup(name.as_bytes()).unwrap().unwrap().nid as usize * 32
    };
    let from = inode_at("big");
    let others: Vec<usize> = (0..1000).map(|number| inode_at(&format!("d{number}"))).collect();
    // All are compact: size at 8, first block at 16. Whole blocks only, for what is inline cannot be shared.
    let location = bytes[from + 16..from + 20].to_vec();
    for at in others {
        bytes[at] = 0;
        bytes[at + 8..at + 12].copy_from_slice(&(8 * 4096_u32).to_le_bytes());
        bytes[at + 16..at + 20].copy_from_slice(&location);
    }
    fuzzing::reseal(&mut bytes);
    let result = Image::open(&bytes).and_then(|image| image.to_tree());
    assert_eq!(result.unwrap_err(), ImageError::Overlap);
}
