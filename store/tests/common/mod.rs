//! What the tests of this room share: a store of their own, and tars made by hand, as wrong as they are wanted.
#![allow(dead_code, unreachable_pub, reason = "each program of tests uses a part")]

pub mod mounted;

use kiln_contract::{Digest, Home};
use kiln_store::{ImportLimits, ImportedLayer, Result, Store};
use tempfile::TempDir;

pub struct Fixture {
    pub dir: TempDir,
    pub home: Home,
    pub store: Store,
}

pub fn fixture() -> Fixture {
    let dir = tempfile::tempdir().unwrap();
    let home = Home::at(dir.path());
    let store = Store::open(&home).unwrap();
    Fixture { dir, home, store }
}

impl Fixture {
    pub fn import(&self, tar: &[u8]) -> Result<ImportedLayer> {
        self.store.import_tar(tar, None, ImportLimits::default())
    }

    pub fn export(&self, layer: &Digest) -> Vec<u8> {
        let mut out = Vec::new();
        self.store.export_tar(layer, &mut out).unwrap();
        out
    }

    /// Imports a tar and checks that the same bytes come back.
    pub fn round_trip(&self, tar: &[u8]) -> ImportedLayer {
        let imported = self.import(tar).unwrap();
        assert_eq!(imported.diff_id, Digest::of(tar));
        let mut out = Vec::new();
        self.store.export_diff(&imported.diff_id, &mut out).unwrap();
        assert!(out == tar, "another tar came back");
        imported
    }

    /// Whether nothing is left of an import that failed.
    pub fn is_untouched(&self) -> bool {
        ["objects", "layers", "tmp"]
            .iter()
            .all(|name| std::fs::read_dir(self.store.path().join(name)).unwrap().next().is_none())
    }
}

/// A header, with its checksum.
pub fn header(name: &[u8], kind: u8, size: u64, link: &[u8]) -> [u8; 512] {
    let mut block = [0; 512];
    block[..name.len().min(100)].copy_from_slice(&name[..name.len().min(100)]);
    block[100..108].copy_from_slice(b"0000644\0");
    block[108..116].copy_from_slice(b"0001750\0");
    block[116..124].copy_from_slice(b"0001750\0");
    if size < 1 << 33 {
        block[124..136].copy_from_slice(format!("{size:011o}\0").as_bytes());
    } else {
        // Base 256, as GNU tar writes what octal digits have no room for.
        block[124] = 0x80;
        block[128..136].copy_from_slice(&size.to_be_bytes());
    }
    block[136..148].copy_from_slice(b"14000000000\0");
    block[156] = kind;
    block[157..157 + link.len()].copy_from_slice(link);
    block[257..265].copy_from_slice(b"ustar\x0000");
    seal(&mut block);
    block
}

pub fn seal(block: &mut [u8; 512]) {
    block[148..156].fill(b' ');
    let sum: u64 = block.iter().map(|byte| u64::from(*byte)).sum();
    block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
}

/// A tar that is put together.
#[derive(Default)]
pub struct Tar(pub Vec<u8>);

impl Tar {
    pub fn new() -> Self {
        Self::default()
    }

    pub fn entry(mut self, name: &str, kind: u8, link: &str) -> Self {
        self.0.extend_from_slice(&header(name.as_bytes(), kind, 0, link.as_bytes()));
        self
    }

    pub fn file(self, name: &str, data: &[u8]) -> Self {
        self.file_bytes(name.as_bytes(), data)
    }

    pub fn file_bytes(mut self, name: &[u8], data: &[u8]) -> Self {
        self.0.extend_from_slice(&header(name, b'0', data.len() as u64, b""));
        self.data(data)
    }

    pub fn dir(self, name: &str) -> Self {
        self.entry(name, b'5', "")
    }

    pub fn data(mut self, data: &[u8]) -> Self {
        self.0.extend_from_slice(data);
        self.0.resize(self.0.len().next_multiple_of(512), 0);
        self
    }

    pub fn pax(mut self, records: &[(&str, &[u8])]) -> Self {
        let mut data = Vec::new();
        for (key, value) in records {
            let body = key.len() + value.len() + 3;
            let length = (body..).find(|length| *length == body + length.to_string().len()).unwrap();
            data.extend_from_slice(format!("{length} {key}=").as_bytes());
            data.extend_from_slice(value);
            data.push(b'\n');
        }
        self.0.extend_from_slice(&header(b"PaxHeaders", b'x', data.len() as u64, b""));
        self.data(&data)
    }

    pub fn raw(mut self, bytes: &[u8]) -> Self {
        self.0.extend_from_slice(bytes);
        self
    }

    pub fn end(mut self) -> Vec<u8> {
        self.0.extend_from_slice(&[0; 1024]);
        self.0
    }
}
