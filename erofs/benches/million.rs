//! A million entries in and out: `cargo bench -p kiln-erofs`.
#![allow(clippy::print_stdout)]

use std::io::Write;
use std::time::Instant;

use kiln_contract::Digest;
use kiln_erofs::{Attributes, Content, Data, Image, NodeId, Time, Tree, write_metadata};

fn resident() -> String {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    status.lines().find(|line| line.starts_with("VmHWM")).unwrap_or("VmHWM: unknown").to_owned()
}

fn main() {
    let start = Instant::now();
    let mut tree = Tree::default();
    let mut directory = NodeId::ROOT;
    for number in 0..1_000_000_u32 {
        let mtime = Time { seconds: 1_700_000_000 + i64::from(number % 5000), nanoseconds: 0 };
        let attributes = Attributes { mode: 0o644, mtime, ..Attributes::default() };
        if number % 20 == 0 {
            let name = format!("directory-{number}");
            directory = tree.add(NodeId::ROOT, name.as_bytes(), Content::Directory, attributes).unwrap();
        } else {
            let mut digest = [number as u8; 32];
            digest[..4].copy_from_slice(&number.wrapping_mul(0x9e37_79b9).to_le_bytes());
            let object = Data::Object { digest: Digest::from_bytes(digest), size: u64::from(number) + 65 };
            let name = format!("file-{number}.txt");
            tree.add(directory, name.as_bytes(), Content::Regular(object), attributes).unwrap();
        }
    }
    println!("tree built in {:?}, {}", start.elapsed(), resident());

    let start = Instant::now();
    let length = write_metadata(&tree, std::io::sink()).unwrap();
    println!("{length} bytes written in {:?}, {}", start.elapsed(), resident());

    let mut bytes = Vec::new();
    write_metadata(&tree, &mut bytes).unwrap();
    bytes.flush().unwrap();
    let image = Image::open(&bytes).unwrap();
    let start = Instant::now();
    let root = image.root().unwrap();
    let mut found = 0;
    for entry in root.entries(0) {
        found += usize::from(root.lookup(entry.unwrap().name).unwrap().is_some());
    }
    println!("{found} names of the root listed and looked up in {:?}", start.elapsed());
    drop(tree);
    let start = Instant::now();
    println!("{} nodes read in {:?}", image.to_tree().unwrap().len(), start.elapsed());
}
