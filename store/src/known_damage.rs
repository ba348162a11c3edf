//! What the last check found damaged, so that it is not taken for good by what comes in.
//!
//! An import does not write what is there, and there is what is damaged, too. So a check leaves a list: layers on it count
//! as missing for whoever brings an image in, and objects on it are written again. That is how what no registry has is
//! repaired: by importing its image once more. The list is made anew by each check, and may be removed at any time.

use std::collections::BTreeSet;

use kiln_contract::Digest;

use crate::check::Findings;
use crate::error::Context as _;
use crate::import::Replaced;
use crate::{Result, Store, lines};

impl Store {
    /// Whether the store has the layer that came from the tar with this digest, and the last check found nothing wrong
    /// with it: then it need not be brought in.
    ///
    /// # Errors
    /// The records cannot be read.
    pub fn has_sound_layer(&self, diff_id: &Digest) -> Result<bool> {
        Ok(match self.layer_of_diff_id(diff_id)? {
            Some(layer) => self.are_sound(&[layer])?,
            None => false,
        })
    }

    /// Whether the last check found nothing wrong with any of these layers.
    ///
    /// # Errors
    /// The list cannot be read.
    pub fn are_sound(&self, layers: &[Digest]) -> Result<bool> {
        let damaged = lines::read(&self.layout.known_damage())?;
        Ok(damaged.is_empty() || !layers.iter().any(|layer| damaged.contains(&layer_line(layer))))
    }

    /// What an import must write although it is there.
    pub(crate) fn known_damage(&self) -> Result<Replaced> {
        let lines = lines::read(&self.layout.known_damage())?;
        let objects = lines.iter().filter_map(|line| line.strip_prefix("object ")?.parse().ok()).collect();
        let layers = lines.iter().filter_map(|line| line.strip_prefix("split ")?.parse().ok());
        let splits = layers.map(|layer| self.layout.layer_split(&layer)).collect();
        Ok(Replaced { objects, split: None, splits })
    }

    /// Takes a layer that was brought in again from the list.
    pub(crate) fn forget_damage(&self, layer: &Digest) -> Result<()> {
        let path = self.layout.known_damage();
        let (mut lines, gone) = (lines::read(&path)?, [layer_line(layer), format!("split {layer}")]);
        if !lines.iter().any(|line| gone.contains(line)) {
            return Ok(());
        }
        lines.retain(|line| !gone.contains(line));
        self.write_damage(lines.into_iter())
    }

    /// Leaves the list of what a check has found, and could not repair.
    pub(crate) fn remember_damage(&self, findings: &Findings) -> Result<()> {
        let users = findings.objects.iter().filter_map(|object| findings.users.get(object)).flatten();
        let layers: BTreeSet<&Digest> =
            findings.trees.iter().chain(findings.splits.values()).chain(users).collect();
        let objects = findings.objects.iter().map(|object| format!("object {object}"));
        let own = findings.splits.iter().filter(|(path, layer)| **path == self.layout.layer_split(layer));
        let splits = own.map(|(_, layer)| format!("split {layer}"));
        self.write_damage(objects.chain(splits).chain(layers.into_iter().map(layer_line)))
    }

    fn write_damage(&self, lines: impl Iterator<Item = String>) -> Result<()> {
        let path = self.layout.known_damage();
        let text: String = lines.flat_map(|line| [line, "\n".to_owned()]).collect();
        if text.is_empty() {
            return match std::fs::remove_file(&path) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                    Err(error).doing("remove", path)
                }
                _ => Ok(()),
            };
        }
        let staging = crate::staging::Staging::new(&self.layout)?;
        let new = staging.path("damage");
        std::fs::write(&new, text).doing("write", &new)?;
        std::fs::rename(&new, &path).doing("rename to", &path)
    }
}

fn layer_line(layer: &Digest) -> String {
    format!("layer {layer}")
}
