//! Trees of the store, mapped.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use kiln_contract::Digest;
use kiln_erofs::{Image, ImageError, Tree};
use memmap2::Mmap;

use crate::error::Context as _;
use crate::{Result, Store, StoreError};

/// A mapped tree.
#[derive(Debug)]
pub(crate) struct TreeFile {
    path: PathBuf,
    map: Mmap,
}

impl TreeFile {
    /// Maps a tree. `None` if there is no such file.
    pub(crate) fn open(path: &Path) -> Result<Option<Self>> {
        let file = match File::open(path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error).doing("open", path),
        };
        // SAFETY: files of the store are complete when they get their names, and are replaced and removed, but never
        // written to or truncated; who may do that to a file in here may also do anything to this process's user.
        let map = unsafe { Mmap::map(&file) }.doing("map", path)?;
        Ok(Some(Self { path: path.to_owned(), map }))
    }

    /// The bytes of the image.
    pub(crate) fn bytes(&self) -> &[u8] {
        &self.map
    }

    pub(crate) fn image(&self) -> Result<Image<'_>> {
        Image::open(&self.map).map_err(|source| self.damaged(source))
    }

    pub(crate) fn to_tree(&self) -> Result<Tree> {
        self.image()?.to_tree().map_err(|source| self.damaged(source))
    }

    /// Says of which file an error is.
    pub(crate) fn damaged(&self, source: ImageError) -> StoreError {
        StoreError::Tree { path: self.path.clone(), source }
    }
}

impl Store {
    /// The tree of a layer.
    pub(crate) fn layer_tree(&self, layer: &Digest) -> Result<TreeFile> {
        TreeFile::open(&self.layout.layer(layer))?
            .ok_or(StoreError::Missing { what: "layer", digest: *layer })
    }
}
