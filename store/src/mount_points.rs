//! A layer of the places where something is mounted in every workload.
//!
//! At the bottom of a root's stack they are there without a change that a commit would see, even if an image has not got them.

use std::collections::BTreeMap;
use std::io;
use std::path::Path;

use kiln_contract::Digest;

use crate::{ImportLimits, Result, Store, StoreError};

/// Names as in an archive; whether they are directories; their modes.
const MOUNT_POINTS: [(&str, bool, u32); 9] = [
    ("dev/", true, 0o755),
    ("etc/", true, 0o755),
    ("etc/hostname", false, 0o644),
    ("etc/hosts", false, 0o644),
    ("etc/resolv.conf", false, 0o644),
    ("proc/", true, 0o755),
    ("run/", true, 0o755),
    ("sys/", true, 0o755),
    ("tmp/", true, 0o1777),
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
        let places = names.iter().map(|(name, directory)| {
            let mode = if *directory { 0o755 } else { 0o644 };
            (name.as_path(), *directory, mode)
        });
        let archive = archive(places)
            .map_err(|source| StoreError::Stream { doing: "make a layer of mount points", source })?;
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
    let places = MOUNT_POINTS.map(|(name, directory, mode)| (Path::new(name), directory, mode));
    #[expect(clippy::expect_used, reason = "the names above fit a header, and memory takes all writes")]
    archive(places).expect("a constant archive can be written")
}

/// A tar of directories and empty files, with their modes.
fn archive<'a>(places: impl IntoIterator<Item = (&'a Path, bool, u32)>) -> io::Result<Vec<u8>> {
    let mut archive = tar::Builder::new(Vec::new());
    for (name, directory, mode) in places {
        let mut header = tar::Header::new_ustar();
        header.set_entry_type(if directory { tar::EntryType::Directory } else { tar::EntryType::Regular });
        header.set_mode(mode);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(0);
        header.set_size(0);
        archive.append_data(&mut header, name, io::empty())?;
    }
    archive.into_inner()
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
