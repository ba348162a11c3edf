//! A packed layer into the store.

use std::fs::File;
use std::io::{self, Read};

use kiln_contract::{Digest, Hasher};
use kiln_store::{ImportLimits, ImportedLayer, Store, StoreError};

use crate::compression::decompress;
use crate::{RegistryError, Result};

/// A packed layer's bytes. Its end is given only if all of it was there and its digest was right.
pub(crate) trait PackedLayer: Read + Send {
    /// Takes in all that still comes, so that a wrong digest is found even if unpacking failed before.
    fn drain(&mut self);
}

/// Unpacks a layer into the store, which keeps it only if it is whole and its digest is `diff_id`.
/// `image` and `blob` are for errors.
pub(crate) fn unpack(
    store: &Store,
    packed: &mut impl PackedLayer,
    diff_id: Option<&Digest>,
    limits: ImportLimits,
    image: &str,
    blob: &str,
) -> Result<ImportedLayer> {
    let mut broken = None;
    let outcome = match decompress(&mut *packed) {
        Ok((_, tar)) => {
            let tar = Watched { inner: tar, broken: &mut broken };
            store.import_tar(tar, diff_id, limits).map_err(RegistryError::from)
        }
        Err(error) => Err(cannot_decompress(image, blob, &error)),
    };
    match (outcome, broken) {
        (Ok(layer), _) => Ok(layer),
        (Err(error), broken) => {
            // What is too large need not be read to its end.
            if !matches!(
                error,
                RegistryError::Store(StoreError::TooLarge { .. } | StoreError::DiskFull { .. })
            ) {
                packed.drain();
            }
            Err(broken.map_or(error, |error| cannot_decompress(image, blob, &error)))
        }
    }
}

fn cannot_decompress(image: &str, blob: &str, error: &io::Error) -> RegistryError {
    RegistryError::Decompress { name: image.into(), digest: blob.into(), reason: error.to_string() }
}

/// Keeps a read error apart from what the store makes of it.
struct Watched<'a, R> {
    inner: R,
    broken: &'a mut Option<io::Error>,
}

impl<R: Read> Read for Watched<'_, R> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        self.inner.read(into).map_err(|error| {
            let copy = io::Error::new(error.kind(), error.to_string());
            *self.broken = Some(error);
            copy
        })
    }
}

/// A packed layer from a file, checked against its digest where it has one.
pub(crate) struct LocalLayer<R> {
    inner: R,
    hasher: Hasher,
    expected: Option<Digest>,
    /// What it turned out to be; known at its end.
    pub(crate) actual: Option<Digest>,
    pub(crate) length: u64,
}

impl<R: Read> LocalLayer<R> {
    pub(crate) fn new(inner: R, expected: Option<Digest>) -> Self {
        Self { inner, hasher: Hasher::new(), expected, actual: None, length: 0 }
    }

    /// The digest that it should have and the one it has, if they differ.
    pub(crate) fn mismatch(&self) -> Option<(Digest, Digest)> {
        let (expected, actual) = (self.expected?, self.actual?);
        (expected != actual).then_some((expected, actual))
    }
}

impl<R: Read> Read for LocalLayer<R> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let n = self.inner.read(into)?;
        if n == 0 && !into.is_empty() {
            let actual = *self.actual.get_or_insert_with(|| std::mem::take(&mut self.hasher).finish());
            if self.expected.is_some_and(|expected| expected != actual) {
                return Err(io::Error::new(io::ErrorKind::InvalidData, "its digest is wrong"));
            }
        }
        self.hasher.update(&into[..n]);
        self.length += n as u64;
        Ok(n)
    }
}

impl<R: Read + Send> PackedLayer for LocalLayer<R> {
    fn drain(&mut self) {
        // An error ends it as well; what it was has been told by whoever read before.
        let _ = io::copy(self, &mut io::sink());
    }
}

/// A file without a name in the store's own staging directory: nothing is left of it, whatever happens.
pub(crate) fn scratch_file(store: &Store) -> Result<File> {
    let dir = store.path().join("tmp");
    let failed = |source| RegistryError::Io { doing: "write below", path: dir.clone(), source };
    std::fs::create_dir_all(&dir).map_err(failed)?;
    tempfile::tempfile_in(&dir).map_err(failed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_with_another_digest_has_no_end() {
        let right = Digest::of(b"abc");
        let mut text = String::new();
        LocalLayer::new(&b"abc"[..], Some(right)).read_to_string(&mut text).unwrap();
        assert_eq!(text, "abc");
        let mut wrong = LocalLayer::new(&b"abd"[..], Some(right));
        assert!(wrong.read_to_end(&mut Vec::new()).is_err());
        assert_eq!(wrong.mismatch(), Some((right, Digest::of(b"abd"))));
    }
}
