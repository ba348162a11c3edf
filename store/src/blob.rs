//! OCI manifests, configs and indexes, byte for byte as they were received.

use std::io;

use kiln_contract::Digest;

use crate::error::Context as _;
use crate::{Result, Store, StoreError, staging};

impl Store {
    /// Keeps a blob. It is on the disk when this returns.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn put_blob(&self, bytes: &[u8]) -> Result<Digest> {
        let digest = Digest::of(bytes);
        let path = self.layout.blob(&digest);
        if std::fs::metadata(&path).is_ok_and(|there| there.len() == bytes.len() as u64) {
            return Ok(digest);
        }
        staging::publish_file(&self.layout, bytes, &path)?;
        Ok(digest)
    }

    /// Puts a blob in the place of one that is damaged or missing, in one step.
    pub(crate) fn replace_blob(&self, bytes: &[u8]) -> Result<()> {
        staging::publish_file(&self.layout, bytes, &self.layout.blob(&Digest::of(bytes)))
    }

    /// A blob's bytes, checked against its digest.
    ///
    /// # Errors
    /// It cannot be read, or is damaged.
    pub fn blob(&self, digest: &Digest) -> Result<Option<Vec<u8>>> {
        let path = self.layout.blob(digest);
        let bytes = match std::fs::read(&path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error).doing("read", &path),
        };
        let found = Digest::of(&bytes);
        if found != *digest {
            return Err(StoreError::Damaged { path, what: format!("it has digest {found}") });
        }
        Ok(Some(bytes))
    }
}
