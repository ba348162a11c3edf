//! Image disks: before the kernel, on file systems that share blocks and on others, made at once, interrupted, collected
//! and checked.

#[path = "../common/mod.rs"]
mod common;
mod file_system;
mod kernel;
mod life;
mod listing;
mod sharing;

use std::io::Read;
use std::sync::Mutex;

use common::Tar;
use kiln_contract::{Digest, Home, Progress, Step, StepId};
use kiln_erofs::{Image as Erofs, ObjectSource};
use kiln_fixtures::noise;
use kiln_store::{Image, ImageName, ImportLimits, Store};

/// Objects as a writer of images reads them.
struct Objects<'s>(&'s Store);

impl ObjectSource for Objects<'_> {
    fn open(&self, digest: &Digest) -> std::io::Result<Box<dyn Read + '_>> {
        Ok(Box::new(self.0.open_object(digest).map_err(std::io::Error::other)?))
    }
}

/// The bytes that a disk must have: written strictly in order, every byte through memory.
fn expected(store: &Store, layers: &[Digest]) -> Vec<u8> {
    let merged = std::fs::read(store.merged_tree(layers).unwrap()).unwrap();
    let tree = Erofs::open(&merged).unwrap().to_tree().unwrap();
    let mut bytes = Vec::new();
    kiln_erofs::write_full(&tree, &Objects(store), &mut bytes).unwrap();
    bytes
}

/// Two layers: files of all lengths that are treated in a way of their own, the same ones again, and some that go.
fn make(store: &Store, tag: &str) -> Image {
    let mut below = Tar::new().dir("./").dir("d").dir("gone");
    for (number, length) in
        [0, 64, 65, 4095, 4096, 4097, 8192, 12_000, 100_000, (1 << 20) - 1, (2 << 20) + 5, 9_000_000]
            .into_iter()
            .enumerate()
    {
        below = below.file(&format!("d/{number}"), &noise(length, number as u64));
    }
    let below = below
        .file("same", &noise(100_000, 8))
        .entry("link", b'1', "same")
        .file("zeros", &[0; 50_000])
        .file("gone/a", &noise(5000, 90))
        .file("gone-too", &noise(5000, 91));
    let above = Tar::new()
        .dir("./")
        .dir("gone")
        .file("gone/.wh..wh..opq", b"")
        .file(".wh.gone-too", b"")
        .file("new", &noise(700_000, 92));
    let layers: Vec<_> = [below, above]
        .map(|tar| store.import_tar(&tar.end()[..], None, ImportLimits::default()).unwrap().layer)
        .into();
    let image = store.make_image(&Default::default(), &layers).unwrap();
    store.tag(&ImageName::parse(tag).unwrap(), &image.manifest_digest, "made").unwrap();
    image
}

/// Remembers what it was told.
#[derive(Default)]
struct Heard(Mutex<Vec<String>>);

impl Heard {
    fn say(&self, what: String) {
        self.0.lock().unwrap().push(what);
    }

    fn all(&self) -> Vec<String> {
        self.0.lock().unwrap().clone()
    }
}

impl Progress for Heard {
    fn begin(&self, step: Step) -> StepId {
        self.say(format!("{} {}", step.verb, step.total.unwrap()));
        StepId(7)
    }

    fn advance(&self, step: StepId, bytes: i64) {
        assert_eq!(step, StepId(7));
        self.say(bytes.to_string());
    }

    fn end(&self, _: StepId, outcome: &str) {
        self.say(outcome.to_owned());
    }

    fn note(&self, text: &str) {
        self.say(text.to_owned());
    }
}

fn open(directory: &std::path::Path) -> (Home, Store) {
    let home = Home::at(directory);
    let store = Store::open(&home).unwrap();
    (home, store)
}
