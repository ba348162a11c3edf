//! How much memory hostile tars get: what they are made of does not matter, and how long they are neither.

mod common;

use std::io::Read;

use common::{Tar, fixture};
use kiln_fixtures::CountingAllocator;
use kiln_store::{ImportLimits, ImportedLayer, StoreError};

#[global_allocator]
static MEMORY: CountingAllocator = CountingAllocator::new();

/// A tar that is made as it is read, a part at a time, and has no end.
struct Endless<F> {
    part: F,
    next: usize,
    bytes: Vec<u8>,
    at: usize,
}

impl<F: FnMut(usize) -> Tar> Endless<F> {
    fn new(part: F) -> Self {
        Self { part, next: 0, bytes: Vec::new(), at: 0 }
    }
}

impl<F: FnMut(usize) -> Tar> Read for Endless<F> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        if self.at == self.bytes.len() {
            self.bytes = (self.part)(self.next).0;
            (self.next, self.at) = (self.next + 1, 0);
        }
        let count = buffer.len().min(self.bytes.len() - self.at);
        buffer[..count].copy_from_slice(&self.bytes[self.at..self.at + count]);
        self.at += count;
        Ok(count)
    }
}

const LIMIT: u64 = 32 << 20;
/// Chunks, queues, compressors, and what is made of a single entry on the way.
const BUFFERS: usize = 32 << 20;

fn import(tar: impl Read + Send, limits: ImportLimits) -> (Result<ImportedLayer, StoreError>, usize) {
    let fixture = fixture();
    let (outcome, taken) = MEMORY.peak_of(|| fixture.store.import_tar(tar, None, limits));
    assert_eq!(fixture.is_untouched(), outcome.is_err());
    (outcome, taken)
}

fn many_xattrs(count: usize) -> Vec<(String, Vec<u8>)> {
    (0..count).map(|at| (format!("SCHILY.xattr.user.{at:x}"), Vec::new())).collect()
}

/// Charged to all but a few MiB of the limit: what becomes a layer is also stored, laid out and written.
const FITTING: usize = 8000;

#[test]
fn a_tar_gets_the_memory_that_its_limit_says_and_no_more() {
    let one_xattr = [("SCHILY.xattr.user.a", &b"1"[..])];
    let xattrs = many_xattrs(5000);
    let many: Vec<(&str, &[u8])> = xattrs.iter().map(|(key, value)| (key.as_str(), &value[..])).collect();
    let (deep, target) = ("d/".repeat(15_000), "t".repeat(4095));
    let sparse = (0..15_000).map(|at| format!("{},1", at * 2)).collect::<Vec<_>>().join(",");
    let sparse = [("GNU.sparse.realsize", &b"1000000"[..]), ("GNU.sparse.map", sparse.as_bytes())];
    type Part<'a> = Box<dyn FnMut(usize) -> Tar + Send + 'a>;
    let parts: [(&str, Part<'_>); 13] = [
        ("files", Box::new(|at| Tar::new().file(&at.to_string(), &[0; 65]))),
        ("different files", Box::new(|at| Tar::new().file(&at.to_string(), format!("{at:0100}").as_bytes()))),
        ("small files", Box::new(|at| Tar::new().file(&at.to_string(), &[0; 64]))),
        ("directories", Box::new(|at| Tar::new().dir(&at.to_string()))),
        ("directories on the way", Box::new(|at| Tar::new().file(&format!("{at}/{}/f", at % 7), b""))),
        (
            "a deep tree an entry",
            Box::new(|at| Tar::new().pax(&[("path", format!("{at}/{deep}").as_bytes())]).dir("x")),
        ),
        ("one name again and again", Box::new(|_| Tar::new().file("again", b"1"))),
        (
            "long names",
            Box::new(|at| Tar::new().pax(&[("path", format!("{at:0255}").as_bytes())]).file("x", b"")),
        ),
        (
            "hard links",
            Box::new(|at| {
                if at == 0 { Tar::new().file("f", b"") } else { Tar::new().entry(&at.to_string(), b'1', "f") }
            }),
        ),
        (
            "symbolic links",
            Box::new(|at| {
                Tar::new().pax(&[("linkpath", target.as_bytes())]).entry(&at.to_string(), b'2', "x")
            }),
        ),
        ("an attribute each", Box::new(|at| Tar::new().pax(&one_xattr).file(&at.to_string(), b""))),
        ("thousands of attributes each", Box::new(|at| Tar::new().pax(&many).file(&at.to_string(), b""))),
        (
            "pieces of sparse files",
            Box::new(|at| Tar::new().pax(&sparse).file(&at.to_string(), &[1; 15_000])),
        ),
    ];
    let limits = ImportLimits { max_memory: LIMIT, max_entries: u64::MAX, max_size: Some(u64::MAX) };
    for (what, part) in parts {
        let (outcome, taken) = import(Endless::new(part), limits);
        let error = outcome.unwrap_err();
        assert!(taken <= LIMIT as usize + BUFFERS, "{what}: {taken} bytes");
        assert!(matches!(error, StoreError::TooLarge { .. }), "{what}: {error}");
        assert_eq!(
            error.to_string(),
            "the layer is too large: its names, links and attributes need more than 32.0 MiB of memory",
            "{what}"
        );
    }
    let all = |at: usize| {
        if at >= FITTING {
            return Tar::new();
        }
        let tar = Tar::new().dir(&format!("{at}/")).pax(&one_xattr).file(&format!("{at}/a"), b"");
        let tar = tar.entry(&format!("{at}/l"), b'2', "target").file(&format!("{at}/s"), &[1; 64]);
        tar.file(&format!("{at}/f"), format!("{at:0100}").as_bytes())
    };
    let (outcome, taken) = import(Endless::new(all), limits);
    assert_eq!(outcome.unwrap().entries, 5 * FITTING as u64);
    assert!(taken <= LIMIT as usize + BUFFERS, "{taken} bytes");
}
