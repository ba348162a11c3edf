//! A layer of the places where something is mounted in every workload.
//!
//! At the bottom of a root's stack they are there without a change that a commit would see, even if an image has not got them.

use std::collections::BTreeMap;
use std::io;
use std::path::Path;

use kiln_contract::Digest;

use crate::{ImportLimits, Result, Store, StoreError};

/// Names as in an archive; whether they are directories.
const MOUNT_POINTS: [(&str, bool); 9] = [
    ("dev/", true),
    ("etc/", true),
    ("etc/hostname", false),
    ("etc/hosts", false),
    ("etc/resolv.conf", false),
    ("proc/", true),
    ("run/", true),
    ("sys/", true),
    ("tmp/", true),
];

impl Store {
    /// The stack of a workload's root: the layer of mount points, and on it `layers`, bottom first.
    ///
    /// # Errors
    /// The layer is not there yet and cannot be imported.
    pub fn with_mount_points(&self, layers: &[Digest]) -> Result<Vec<Digest>> {
        let base = self.layer_of_places(&mount_points())?;
        Ok([&[base], layers].concat())
    }

    /// A layer with directories, and empty files, on which something is to be mounted; and with the directories that lead to
    /// them. Each is a relative path without `..`, and whether it is a directory.
    ///
    /// # Errors
    /// A path is none or too long; the store cannot be written.
    pub fn layer_of_mount_points<'a>(
        &self,
        places: impl IntoIterator<Item = (&'a Path, bool)>,
    ) -> Result<Digest> {
        let mut names = BTreeMap::new();
        for (path, directory) in places {
            let above = path.ancestors().skip(1).filter(|above| !above.as_os_str().is_empty());
            for above in above {
                names.insert(above.to_owned(), true);
            }
            names.entry(path.to_owned()).or_insert(directory);
        }
        let write = || -> io::Result<Vec<u8>> {
            let mut archive = tar::Builder::new(Vec::new());
            for (name, directory) in &names {
                let mode = if *directory { 0o755 } else { 0o644 };
                archive.append_data(&mut header(*directory, mode), name, io::empty())?;
            }
            archive.into_inner()
        };
        let archive =
            write().map_err(|source| StoreError::Stream { doing: "make a layer of mount points", source })?;
        self.layer_of_places(&archive)
    }

    fn layer_of_places(&self, archive: &[u8]) -> Result<Digest> {
        let diff_id = Digest::of(archive);
        match self.layer_of_diff_id(&diff_id)? {
            Some(layer) => Ok(layer),
            None => Ok(self.import_tar(archive, Some(&diff_id), ImportLimits::default())?.layer),
        }
    }

    /// The layer of mount points, if it is there: a collection must leave it.
    ///
    /// # Errors
    /// If the store cannot be read.
    pub fn mount_point_layer(&self) -> Result<Option<Digest>> {
        self.layer_of_diff_id(&Digest::of(&mount_points()))
    }
}

/// A tar archive whose bytes are always the same.
pub(crate) fn mount_points() -> Vec<u8> {
    let mut archive = tar::Builder::new(Vec::new());
    for (name, directory) in MOUNT_POINTS {
        let mut header = header(
            directory,
            match name {
                "tmp/" => 0o1777,
                _ if directory => 0o755,
                _ => 0o644,
            },
        );
        #[expect(clippy::expect_used, reason = "the names above fit a header, and memory takes all writes")]
        archive.append_data(&mut header, name, io::empty()).expect("a constant archive can be written");
    }
    #[expect(clippy::expect_used, reason = "memory takes all writes")]
    archive.into_inner().expect("a constant archive can be written")
}

fn header(directory: bool, mode: u32) -> tar::Header {
    let mut header = tar::Header::new_ustar();
    header.set_entry_type(if directory { tar::EntryType::Directory } else { tar::EntryType::Regular });
    header.set_mode(mode);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(0);
    header.set_size(0);
    header
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_layer_of_mount_points_never_changes() {
        // Its digest is part of the name of every rendered tree: a change makes every image render anew.
        assert_eq!(
            Digest::of(&mount_points()).hex(),
            "a1ccec4357235765774f7fc4750fecdfaf2b09368f42f1b35dd0affa148b96d5"
        );
    }
}
