//! Merged trees: the bytes are those of the same tree made in memory, and memory does not grow with them.

use std::collections::HashMap;

use kiln_contract::Digest;
use kiln_erofs::{
    Attributes, Content, Data, Device, Image, ImageError, Layers, MergeError, Met, NodeId, Time, Tree,
    WriteError, merge, write_metadata,
};
use kiln_fixtures::CountingAllocator;
use proptest::prelude::*;

#[global_allocator]
static MEMORY: CountingAllocator = CountingAllocator::new();

/// One test at a time, so that memory is that of one merge.
static ALONE: std::sync::Mutex<()> = std::sync::Mutex::new(());

const IMPLIED: &[u8] = b"trusted.kiln.implied";
const OPAQUE: &[u8] = b"trusted.overlay.opaque";

fn merged(layers: &[Vec<u8>]) -> Result<Vec<u8>, MergeError> {
    let images: Vec<_> = layers.iter().map(|bytes| Image::open(bytes).unwrap()).collect();
    let mut out = Vec::new();
    let mut charge = |_: usize, _: &[u8], _: Met<'_>| Ok(());
    let layers = Layers { images: &images, implied: IMPLIED };
    merge::<MergeError>(layers, &tempfile::tempfile, &mut charge, &mut out)?;
    Ok(out)
}

fn image_of(tree: &Tree) -> Vec<u8> {
    let mut bytes = Vec::new();
    write_metadata(tree, &mut bytes).unwrap();
    bytes
}

/// What the merge must make, by putting one layer after the other on a tree in memory.
fn in_memory(layers: &[Vec<u8>]) -> Tree {
    let mut merged = Tree::default();
    for bytes in layers {
        let layer = Image::open(bytes).unwrap().to_tree().unwrap();
        let mut linked = HashMap::new();
        put_directory(&mut merged, NodeId::ROOT, layer.node(NodeId::ROOT).attributes.clone());
        let mut stack = vec![(NodeId::ROOT, NodeId::ROOT)];
        while let Some((from, here)) = stack.pop() {
            for (name, id) in layer.children(from) {
                let node = layer.node(id);
                let below = merged.child(here, name);
                if *node.content == Content::Directory {
                    let below = below.filter(|below| *merged.node(*below).content == Content::Directory);
                    let directory = below.unwrap_or_else(|| {
                        merged.remove(here, name);
                        let fresh = without_marks(node.attributes.clone());
                        merged.add(here, name, Content::Directory, fresh).unwrap()
                    });
                    if below.is_some() {
                        put_directory(&mut merged, directory, node.attributes.clone());
                    }
                    stack.push((id, directory));
                    continue;
                }
                merged.remove(here, name);
                if *node.content == Content::CharDevice(Device { major: 0, minor: 0 }) {
                    continue;
                }
                if let Some(first) = linked.get(&id) {
                    merged.link(here, name, *first).unwrap();
                    continue;
                }
                let (content, attributes) = (node.content.clone(), node.attributes.clone());
                linked.insert(id, merged.add(here, name, content, attributes).unwrap());
            }
        }
    }
    merged
}

fn put_directory(tree: &mut Tree, node: NodeId, attributes: Attributes) {
    if attributes.xattrs.get(OPAQUE).is_some_and(|value| value == b"y") {
        let hidden: Vec<Vec<u8>> = tree.children(node).map(|(name, _)| name.to_vec()).collect();
        hidden.iter().for_each(|name| assert!(tree.remove(node, name)));
    }
    if !attributes.xattrs.contains_key(IMPLIED) {
        tree.set_attributes(node, without_marks(attributes));
    }
}

fn without_marks(mut attributes: Attributes) -> Attributes {
    attributes.xattrs.remove(OPAQUE);
    attributes.xattrs.remove(IMPLIED);
    attributes
}

/// What one step does to a layer: where, under which name, what, with which of few attributes.
type Step = (u8, u8, u8, u8);

fn layer(steps: &[Step]) -> Vec<u8> {
    let mut tree = Tree::default();
    let mut directories = vec![NodeId::ROOT];
    let mut files = Vec::new();
    for (place, name, what, how) in steps {
        let parent = directories[usize::from(*place) % directories.len()];
        // Few names, on both sides of the dots, and some long ones, so that directories have several blocks.
        let name = match name % 16 {
            0 => b"!".to_vec(),
            1 => b"..x".to_vec(),
            2 => vec![b'l'; 250],
            3 => vec![b'm'; 250],
            other => format!("n{other}").into_bytes(),
        };
        let mut attributes = Attributes {
            mode: 0o700 + u32::from(how % 8),
            uid: if how % 5 == 0 { 100_000 } else { 0 },
            mtime: Time { seconds: i64::from(how % 3), nanoseconds: u32::from(how % 2) },
            ..Attributes::default()
        };
        if how % 7 == 0 {
            attributes.xattrs.insert(b"user.note".to_vec(), vec![*how; usize::from(*how)]);
        }
        let content = match what % 10 {
            0..=3 => {
                for (mark, value) in [(IMPLIED, &b""[..]), (OPAQUE, b"y")] {
                    if (how / 8) % 4 == u8::from(mark == OPAQUE) {
                        attributes.xattrs.insert(mark.to_vec(), value.to_vec());
                    }
                }
                Content::Directory
            }
            4 => Content::Regular(Data::Inline(vec![*how; usize::from(how % 65)])),
            5 => Content::Regular(Data::Object { digest: Digest::of(&[*how]), size: 65 << (how % 40) }),
            6 => Content::Symlink(vec![b't'; 1 + usize::from(*how) * 16]),
            7 => Content::CharDevice(Device { major: 0, minor: 0 }),
            8 => Content::Fifo,
            _ => {
                if let Some(file) = files.get(usize::from(*how) % files.len().max(1)) {
                    // A name that is taken stays what it is.
                    let _ = tree.link(parent, &name, *file);
                }
                continue;
            }
        };
        let is_directory = content == Content::Directory;
        if let Ok(node) = tree.add(parent, &name, content, attributes) {
            if is_directory {
                directories.push(node);
            } else if what % 10 != 7 {
                files.push(node);
            }
        }
    }
    image_of(&tree)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn the_bytes_are_those_of_the_tree_made_in_memory(
        layers in prop::collection::vec(prop::collection::vec(any::<Step>(), 0..60), 1..7),
    ) {
        let _alone = ALONE.lock();
        let layers: Vec<_> = layers.iter().map(|steps| layer(steps)).collect();
        prop_assert_eq!(merged(&layers).unwrap(), image_of(&in_memory(&layers)));
    }
}

/// A layer of `count` files with times of their own in directories of a hundred, which begin at `first`.
fn large_layer(first: usize, count: usize) -> Vec<u8> {
    let mut tree = Tree::default();
    let mut directory = NodeId::ROOT;
    for number in first..first + count {
        let mtime = Time { seconds: number as i64, nanoseconds: 0 };
        let attributes = Attributes { mode: 0o644, mtime, ..Attributes::default() };
        if number % 100 == 0 || number == first {
            let name = format!("directory-{}", number / 100);
            directory =
                tree.add(NodeId::ROOT, name.as_bytes(), Content::Directory, attributes.clone()).unwrap();
        }
        let object = Data::Object { digest: Digest::of(&number.to_le_bytes()), size: 65 + number as u64 };
        let name = format!("file-{number}");
        let file = tree.add(directory, name.as_bytes(), Content::Regular(object), attributes).unwrap();
        if number % 10 == 0 {
            tree.link(directory, format!("link-{number}").as_bytes(), file).unwrap();
        }
    }
    image_of(&tree)
}

/// What a merge takes, in bytes, and how many inodes its output has.
fn memory_of_a_merge(layers: &[Vec<u8>]) -> (usize, u64) {
    let images: Vec<_> = layers.iter().map(|bytes| Image::open(bytes).unwrap()).collect();
    let mut nodes = 0;
    let mut charge = |_: usize, _: &[u8], met: Met<'_>| {
        nodes += u64::from(matches!(met, Met::Node(_)));
        Ok(())
    };
    let layers = Layers { images: &images, implied: IMPLIED };
    let merging = || merge::<MergeError>(layers, &tempfile::tempfile, &mut charge, std::io::sink());
    let (merged, peak) = MEMORY.peak_of(merging);
    merged.unwrap();
    (peak, nodes)
}

#[test]
fn memory_does_not_grow_with_the_number_of_entries() {
    let _alone = ALONE.lock();
    let stack = |files: usize| -> Vec<_> {
        // Each layer half over the one before.
        (0..20).map(|layer| large_layer(layer * files / 2, files)).collect()
    };
    let (small, few) = memory_of_a_merge(&stack(1_000));
    let (large, many) = memory_of_a_merge(&stack(10_000));
    assert!(many >= 9 * few, "{few} and {many} nodes");
    // Pages of tables, and times being counted.
    assert!(small < 16 << 20, "{small} bytes for {few} nodes");
    assert!(large < 16 << 20, "{large} bytes for {many} nodes");
}

/// A layer whose superblock has no checksum, so that it can be damaged.
fn open_to_damage(mut image: Vec<u8>) -> Vec<u8> {
    image[1024 + 8] &= !1;
    image
}

fn nid_at(image: &[u8], path: &[&[u8]]) -> u64 {
    let image = Image::open(image).unwrap();
    path.iter()
        .fold(image.root_nid(), |nid, name| image.inode(nid).unwrap().lookup(name).unwrap().unwrap().nid)
}

#[test]
fn what_cannot_be_merged_is_said_with_its_layer() {
    let _alone = ALONE.lock();
    let good = open_to_damage(layer(&[(0, 5, 4, 1), (0, 6, 0, 3), (1, 7, 0, 3)]));
    // A file's inode that says it is a pipe.
    let mut wrong = good.clone();
    let file = nid_at(&good, &[b"n5"]);
    wrong[file as usize * 32 + 5] = 0x10 | (wrong[file as usize * 32 + 5] & 0x0f);
    // A directory that is in itself.
    let mut looped = good.clone();
    let (outer, inner) = (nid_at(&good, &[b"n6"]), nid_at(&good, &[b"n6", b"n7"]));
    for at in 0..looped.len() - 8 {
        if looped[at..at + 8] == inner.to_le_bytes() {
            looped[at..at + 8].copy_from_slice(&outer.to_le_bytes());
        }
    }
    let other = ImageError::Inode { nid: file, what: "an entry has another type" };
    for (bad, expected) in [(wrong, other), (looped, ImageError::Overlap)] {
        let error = merged(&[good.clone(), bad]).unwrap_err();
        assert!(matches!(&error, MergeError::Image { layer: 1, source } if *source == expected), "{error}");
    }
    let images = [Image::open(&good).unwrap()];
    let layers = Layers { images: &images, implied: IMPLIED };
    let mut charge = |_: usize, _: &[u8], _: Met<'_>| Ok(());
    let error = merge::<MergeError>(layers, &tempfile::tempfile, &mut charge, &mut [0; 16][..]).unwrap_err();
    assert!(matches!(error, MergeError::Write(WriteError::Io(_))), "{error}");
    let mut refuse = |_: usize, name: &[u8], _: Met<'_>| {
        Err(MergeError::Scratch(std::io::Error::other(name.escape_ascii().to_string())))
    };
    let error = merge(layers, &tempfile::tempfile, &mut refuse, std::io::sink()).unwrap_err().to_string();
    assert_eq!(error, "cannot use a temporary file: n5");
}
