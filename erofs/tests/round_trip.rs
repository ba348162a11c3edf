//! Trees through images and back.

use std::collections::BTreeMap;
use std::io::{Cursor, Read};

use kiln_contract::Digest;
use kiln_erofs::{
    Attributes, Content, Data, Device, FullImage, INLINE_LIMIT, Image, NodeId, ObjectSource, Time, Tree,
    Xattrs, write_full, write_metadata,
};
use proptest::collection::{btree_map, vec};
use proptest::prelude::*;

/// A tree as a value that can be compared: every path, with the first path of the same node.
type Listing = BTreeMap<Vec<u8>, (Content, Attributes, u32, Vec<u8>)>;

fn listing(tree: &Tree) -> Listing {
    let mut listing = Listing::new();
    let mut first: BTreeMap<NodeId, Vec<u8>> = BTreeMap::new();
    let mut stack = vec![(NodeId::ROOT, Vec::new())];
    while let Some((id, path)) = stack.pop() {
        let node = tree.node(id);
        let same = first.entry(id).or_insert_with(|| path.clone()).clone();
        for (name, child) in tree.children(id) {
            stack.push((child, [&path, &b"/"[..], name].concat()));
        }
        listing.insert(path, (node.content.clone(), node.attributes.clone(), node.links, same));
    }
    listing
}

fn metadata(tree: &Tree) -> Vec<u8> {
    let mut bytes = Vec::new();
    let length = write_metadata(tree, &mut bytes).unwrap();
    assert_eq!(length, bytes.len() as u64);
    assert_eq!(length % 4096, 0);
    bytes
}

fn assert_comes_back(tree: &Tree) {
    let bytes = metadata(tree);
    assert_eq!(bytes, metadata(tree), "the same tree gives the same bytes");
    let image = Image::open(&bytes).unwrap();
    assert_eq!(image.inode_count(), tree.len() as u64);
    let back = image.to_tree().unwrap();
    assert_eq!(back.len(), tree.len());
    assert_eq!(listing(&back), listing(tree));
    assert_eq!(metadata(&back), bytes, "the tree that comes back gives the same bytes again");
}

struct Objects(BTreeMap<Digest, Vec<u8>>);

impl ObjectSource for Objects {
    fn open(&self, digest: &Digest) -> std::io::Result<Box<dyn Read + '_>> {
        let bytes = self.0.get(digest).ok_or(std::io::ErrorKind::NotFound)?;
        Ok(Box::new(Cursor::new(bytes)))
    }
}

fn name() -> impl Strategy<Value = Vec<u8>> {
    let byte = any::<u8>().prop_filter("names", |byte| !matches!(byte, 0 | b'/'));
    prop_oneof![
        8 => vec(byte.clone(), 1..12),
        2 => "[!-.]{1,3}".prop_map(String::into_bytes),
        1 => vec(byte, 255),
    ]
    .prop_filter("dots", |name| name != b"." && name != b"..")
}

fn attributes() -> impl Strategy<Value = Attributes> {
    let ids = || prop_oneof![Just(0), Just(1000), Just(65_535), Just(65_536), any::<u32>()];
    let time = prop_oneof![
        3 => Just(Time { seconds: 1_700_000_000, nanoseconds: 0 }),
        1 => (any::<i64>(), 0..1_000_000_000_u32).prop_map(|(seconds, nanoseconds)| Time { seconds, nanoseconds }),
    ];
    let xattr_name = prop_oneof![
        "(user|trusted|security|system|odd)[.][a-z.]{1,20}",
        "trusted[.]overlay[.](overlay[.]){0,2}(metacopy|redirect|opaque|x)",
        Just("system.posix_acl_access".to_owned()),
        Just("security.capability".to_owned()),
    ];
    let value = prop_oneof![9 => vec(any::<u8>(), 0..30), 1 => vec(any::<u8>(), 3000..9000)];
    let xattrs = prop_oneof![3 => Just(Xattrs::new()), 1 => btree_map(xattr_name.prop_map(String::into_bytes), value, 0..4)];
    (0..=0o7777_u32, ids(), ids(), time, xattrs).prop_map(|(mode, uid, gid, mtime, xattrs)| Attributes {
        mode,
        uid,
        gid,
        mtime,
        xattrs,
    })
}

fn content() -> impl Strategy<Value = Content> {
    let device = || (0..4096_u32, 0..(1_u32 << 20)).prop_map(|(major, minor)| Device { major, minor });
    let byte = 1..=255_u8;
    prop_oneof![
        4 => Just(Content::Directory),
        2 => vec(any::<u8>(), 0..=INLINE_LIMIT).prop_map(|bytes| Content::Regular(Data::Inline(bytes))),
        2 => (any::<[u8; 32]>(), 65..i64::MAX as u64 >> 18).prop_map(|(digest, size)| {
            Content::Regular(Data::Object { digest: Digest::from_bytes(digest), size })
        }),
        2 => prop_oneof![vec(byte.clone(), 1..40), vec(byte, 3900..=4095)].prop_map(Content::Symlink),
        1 => device().prop_map(Content::CharDevice),
        1 => device().prop_map(Content::BlockDevice),
        1 => Just(Content::Fifo),
        1 => Just(Content::Socket),
    ]
}

/// Nodes are put into any directory made before them; some are second names of earlier ones.
fn tree() -> impl Strategy<Value = Tree> {
    let step = (any::<prop::sample::Index>(), name(), content(), attributes(), 0..8_u8);
    (attributes(), vec(step, 0..60)).prop_map(|(root, steps)| {
        let mut tree = Tree::new(root);
        let mut directories = vec![NodeId::ROOT];
        let mut others = Vec::new();
        for (parent, name, content, attributes, dice) in steps {
            let parent = *parent.get(&directories);
            if dice == 0 && !others.is_empty() {
                let node = others[name.len() % others.len()];
                let _ = tree.link(parent, &name, node);
            } else if dice == 1 {
                tree.remove(parent, &name);
            } else if let Ok(id) = tree.add(parent, &name, content.clone(), attributes) {
                if content == Content::Directory { directories.push(id) } else { others.push(id) }
            }
        }
        tree
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_tree_comes_back_from_its_image(tree in tree()) {
        assert_comes_back(&tree);
    }
}

#[test]
fn directories_of_any_size_come_back_and_find_their_entries() {
    for count in [0, 1, 40, 127, 128, 300, 5_000, 100_000] {
        let mut tree = Tree::default();
        for number in 0..count {
            // Not in order, and on both sides of the dots.
            let name = format!("{}{:x}", if number % 3 == 0 { "!" } else { "f" }, number * 7919 % 100_003);
            tree.add(NodeId::ROOT, name.as_bytes(), Content::Fifo, Attributes::default()).unwrap();
        }
        let bytes = metadata(&tree);
        let image = Image::open(&bytes).unwrap();
        let root = image.root().unwrap();
        let names: Vec<_> = root.entries(0).map(|entry| entry.unwrap().name).collect();
        assert_eq!(names, tree.children(NodeId::ROOT).map(|(name, _)| name).collect::<Vec<_>>());
        for (position, name) in names.iter().enumerate().step_by(1 + count / 500) {
            assert_eq!(root.lookup(name).unwrap().unwrap().name, *name);
            assert_eq!(root.entries(position).next().unwrap().unwrap().name, *name, "{position} of {count}");
        }
        assert_eq!(root.lookup(b"absent").unwrap(), None);
        assert_eq!(root.lookup(b"").unwrap(), None);
        assert_eq!(root.lookup(&[255; 255]).unwrap(), None);
        assert!(root.entries(count).next().is_none());
        assert_eq!(root.parent().unwrap(), root.nid());
    }
}

#[test]
fn a_directory_deeper_than_any_stack_comes_back() {
    let mut tree = Tree::default();
    let mut at = NodeId::ROOT;
    for _ in 0..50_000 {
        at = tree.add(at, b"d", Content::Directory, Attributes::default()).unwrap();
    }
    let bytes = metadata(&tree);
    assert_eq!(Image::open(&bytes).unwrap().to_tree().unwrap().len(), 50_001);
    assert!(tree.remove(NodeId::ROOT, b"d"));
    assert_eq!(tree.len(), 1);
}

#[test]
fn an_image_with_data_holds_every_object_once_at_the_start_of_a_block() {
    let mut objects = Objects(BTreeMap::new());
    let mut tree = Tree::default();
    for (number, length) in [65, 4095, 4096, 4097, 300_000, 65].into_iter().enumerate() {
        let bytes: Vec<u8> = (0..length).map(|at| (at * 31 % 251) as u8).collect();
        let digest = Digest::of(&bytes);
        let content = Content::Regular(Data::Object { digest, size: length as u64 });
        let name = format!("file{number}");
        tree.add(NodeId::ROOT, name.as_bytes(), content, Attributes::default()).unwrap();
        objects.0.insert(digest, bytes);
    }
    let mut bytes = Vec::new();
    let length = write_full(&tree, &objects, &mut bytes).unwrap();
    assert_eq!(length, bytes.len() as u64);
    let image = Image::open(&bytes).unwrap();
    assert_eq!(listing(&image.to_tree().unwrap()), listing(&tree));
    for entry in image.root().unwrap().entries(0) {
        let inode = image.inode(entry.unwrap().nid).unwrap();
        let embedded = inode.embedded().unwrap();
        assert_eq!((embedded.as_ptr() as usize - bytes.as_ptr() as usize) % 4096, 0);
        let Data::Object { digest, .. } = inode.data().unwrap() else { panic!("all are larger than inline") };
        assert_eq!(*embedded, *objects.0[&digest]);
    }
    let data: usize = objects.0.values().map(|bytes| bytes.len().next_multiple_of(4096)).sum();
    assert_eq!(length as usize, 4096 + data);

    let mut wrong = objects;
    let first = *wrong.0.keys().next().unwrap();
    let damages: [fn(&mut Vec<u8>); 3] =
        [|bytes| bytes[3] ^= 1, |bytes| bytes.push(0), |bytes| bytes.truncate(bytes.len() - 1)];
    for damage in damages {
        let sound = wrong.0[&first].clone();
        damage(wrong.0.get_mut(&first).unwrap());
        let error = write_full(&tree, &wrong, &mut Vec::new()).unwrap_err().to_string();
        assert!(error.contains(&first.to_string()), "{error}");
        wrong.0.insert(first, sound);
    }
    wrong.0.remove(&first);
    assert!(write_full(&tree, &wrong, &mut Vec::new()).unwrap_err().to_string().contains("cannot read"));
}

#[test]
fn a_plan_says_where_a_writer_puts_every_object() {
    let mut objects = Objects(BTreeMap::new());
    let mut tree = Tree::default();
    for (number, length) in [9000, 65, 4096, 9000, 12_289].into_iter().enumerate() {
        let bytes = vec![length as u8; length];
        let data = Data::Object { digest: Digest::of(&bytes), size: length as u64 };
        let name = format!("file{number}");
        let content = Content::Regular(data);
        tree.add(NodeId::ROOT, name.as_bytes(), content, Attributes::default()).unwrap();
        objects.0.insert(Digest::of(&bytes), bytes);
    }
    let mut expected = Vec::new();
    write_full(&tree, &objects, &mut expected).unwrap();
    let plan = FullImage::new(&tree).unwrap();
    let mut bytes = Vec::new();
    let head = plan.write_metadata(&mut bytes).unwrap();
    assert_eq!((head, plan.length()), (bytes.len() as u64, expected.len() as u64));
    bytes.resize(expected.len(), 0);
    let mut next = head;
    for place in plan.objects() {
        assert_eq!(place.offset, next);
        next += place.size.next_multiple_of(4096);
        bytes[place.offset as usize..][..place.size as usize].copy_from_slice(&objects.0[&place.digest]);
    }
    assert_eq!((plan.objects().count(), next), (4, plan.length()));
    assert!(bytes == expected, "a plan and a writer differ");
}

#[test]
fn an_object_with_two_sizes_is_refused() {
    let mut tree = Tree::default();
    for (name, size) in [(b"a", 5000), (b"b", 1 << 40)] {
        let data = Data::Object { digest: Digest::of(b"the same"), size };
        tree.add(NodeId::ROOT, name, Content::Regular(data), Attributes::default()).unwrap();
    }
    let error = FullImage::new(&tree).err().unwrap().to_string();
    assert!(error.contains("/b") && error.contains("1099511627776 bytes, and 5000"), "{error}");
}

#[test]
fn what_the_format_has_no_place_for_is_named() {
    let file = || Content::Regular(Data::Inline(Vec::new()));
    let xattr = |name: &[u8], length| Attributes {
        xattrs: [(name.to_vec(), vec![7; length])].into(),
        ..Attributes::default()
    };
    let many = (0..5).map(|n| (format!("user.{n}").into_bytes(), vec![0; 65_000])).collect();
    let table = [
        (file(), xattr(b"user.x", 65_536), "65535 is the most"),
        (file(), xattr(&[b"user.".as_slice(), &[b'x'; 251]].concat(), 1), "longer than 255"),
        (file(), xattr(b"", 1), "cannot be the name"),
        (file(), Attributes { xattrs: many, ..Attributes::default() }, "the most"),
        (file(), Attributes { mode: 0o10_000, ..Attributes::default() }, "mode"),
        (Content::Regular(Data::Inline(vec![0; 65])), Attributes::default(), "inline"),
        (Content::Symlink(Vec::new()), Attributes::default(), "symlink"),
        (Content::Symlink(vec![b'x'; 4096]), Attributes::default(), "symlink"),
        (Content::CharDevice(Device { major: 4096, minor: 0 }), Attributes::default(), "4096:0"),
    ];
    for (content, attributes, expected) in table {
        let mut tree = Tree::default();
        let dir = tree.add(NodeId::ROOT, b"dir", Content::Directory, Attributes::default()).unwrap();
        tree.add(dir, b"odd", content, attributes).unwrap();
        let mut out = Vec::new();
        let error = write_metadata(&tree, &mut out).unwrap_err().to_string();
        assert!(error.contains("/dir/odd") && error.contains(expected), "{error}");
        assert!(out.is_empty());
    }
    let mut tree = Tree::default();
    tree.add(NodeId::ROOT, b"large", file(), xattr(b"user.large", 65_535)).unwrap();
    assert_comes_back(&tree);
}
