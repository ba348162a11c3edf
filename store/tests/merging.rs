//! Merged trees of as many layers, with as many entries, as the largest environments have.

mod common;

use std::io::Read;

use common::{Fixture, Tar, fixture, seal};
use kiln_contract::Digest;
use kiln_erofs::Image;
use kiln_fixtures::CountingAllocator;
use kiln_store::ImportLimits;

#[global_allocator]
static MEMORY: CountingAllocator = CountingAllocator::new();

const LAYERS: usize = 200;
/// Of each layer, one entry of so many is of the layer before, too.
const AGAIN: usize = 10;

/// A tar that is made as it is read, a part at a time.
struct Parts<I> {
    parts: I,
    bytes: Vec<u8>,
    at: usize,
}

impl<I: Iterator<Item = Vec<u8>>> Read for Parts<I> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        while self.at == self.bytes.len() {
            let Some(bytes) = self.parts.next() else { return Ok(0) };
            (self.bytes, self.at) = (bytes, 0);
        }
        let count = buffer.len().min(self.bytes.len() - self.at);
        buffer[..count].copy_from_slice(&self.bytes[self.at..self.at + count]);
        self.at += count;
        Ok(count)
    }
}

/// The number of a layer's first file.
fn first_of(layer: usize, files: usize) -> usize {
    layer * (files - files / AGAIN)
}

/// A layer's tar: files in directories of a hundred, each with a time of its own and some with an object; and in a directory
/// that all layers have a name, in place of that of the layer before.
fn tar_of(layer: usize, files: usize) -> impl Read + Send {
    let first = first_of(layer, files);
    let part = move |number: usize| {
        let mut tar = Tar::new();
        if number.is_multiple_of(100) || number == first {
            tar = tar.dir(&format!("d{}/", number / 100));
        }
        let length = if number.is_multiple_of(1000) { 100 } else { 8 };
        let start = tar.0.len();
        let mut bytes = tar.file(&format!("d{}/f{number}", number / 100), &vec![b'x'; length]).0;
        bytes[start + 136..start + 148].copy_from_slice(format!("{number:011o}\0").as_bytes());
        seal((&mut bytes[start..start + 512]).try_into().unwrap());
        bytes
    };
    let mut shared = Tar::new().dir("shared/").file(&format!("shared/of-{layer}"), b"");
    if let Some(before) = layer.checked_sub(1) {
        shared = shared.file(&format!("shared/.wh.of-{before}"), b"");
    }
    let parts = (first..first + files).map(part).chain([shared.end()]);
    Parts { parts, bytes: Vec::new(), at: 0 }
}

fn stack(fixture: &Fixture, files: usize) -> Vec<Digest> {
    let import = |layer| fixture.store.import_tar(tar_of(layer, files), None, ImportLimits::default());
    (0..LAYERS).map(|layer| import(layer).unwrap().layer).collect()
}

/// Merges a stack whose layers together have so many files. Returns the most bytes of memory that it took.
fn merged(files: usize) -> usize {
    let fixture = fixture();
    let each = files / LAYERS;
    let layers = stack(&fixture, each);
    let (path, peak) = MEMORY.peak_of(|| fixture.store.merged_tree(&layers).unwrap());

    let bytes = std::fs::read(&path).unwrap();
    let image = Image::open(&bytes).unwrap();
    let names = |name: &str| {
        let found = image.root().unwrap().lookup(name.as_bytes()).unwrap().unwrap();
        let directory = image.inode(found.nid).unwrap();
        directory.entries(0).map(|entry| String::from_utf8_lossy(entry.unwrap().name).into_owned()).collect()
    };
    let shared: Vec<String> = names("shared");
    assert_eq!(shared, [format!("of-{}", LAYERS - 1)]);
    let different = first_of(LAYERS - 1, each) + each;
    let found: usize =
        (0..different.div_ceil(100)).map(|directory| names(&format!("d{directory}")).len()).sum();
    assert_eq!(found, different);

    // It is found by what the stack is, also where no layer could be read; and in another order it is another.
    std::fs::remove_dir_all(fixture.store.path().join("layers")).unwrap();
    let written = std::fs::metadata(&path).unwrap().modified().unwrap();
    assert_eq!(fixture.store.merged_tree(&layers).unwrap(), path);
    assert_eq!(std::fs::metadata(&path).unwrap().modified().unwrap(), written);
    assert!(fixture.store.merged_tree(&layers[1..]).is_err());
    peak
}

#[test]
fn two_hundred_layers_with_a_million_entries_are_merged_in_memory_that_is_the_same_for_fewer() {
    let (fewer, many) = (merged(100_000), merged(1_000_000));
    // Pages of tables, and times being counted.
    assert!(many < 16 << 20, "{many} bytes");
    assert!(many < fewer + fewer / 10, "{many} bytes for ten times what took {fewer}");
}
