//! What images need: the documents and layers that must be there, and the repositories that may have them.

use std::collections::BTreeMap;

use kiln_contract::Digest;
use oci_spec::image::{Descriptor, ImageConfiguration, ImageManifest};

use crate::image::digest_of;
use crate::{Result, Store};

/// What a blob is that is no layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum DocumentKind {
    /// A manifest.
    Manifest,
    /// An index of manifests.
    Index,
    /// A config.
    Config,
}

impl std::fmt::Display for DocumentKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Manifest => "manifest",
            Self::Index => "index",
            Self::Config => "config",
        })
    }
}

/// A document that something needs.
#[derive(Debug)]
pub(crate) struct NeededDocument {
    pub(crate) kind: DocumentKind,
    /// By what, in words.
    pub(crate) by: String,
    pub(crate) repositories: Vec<String>,
}

/// A layer that an image needs.
#[derive(Debug, Default)]
pub(crate) struct NeededLayer {
    /// By which image, in words.
    pub(crate) by: String,
    /// Compressed forms of its tar that manifests name.
    pub(crate) blobs: Vec<Descriptor>,
    pub(crate) repositories: Vec<String>,
}

/// What all images and tags need, as far as what is there can tell: a manifest that is damaged does not say which
/// layers it has.
#[derive(Debug, Default)]
pub(crate) struct Needs {
    pub(crate) documents: BTreeMap<Digest, NeededDocument>,
    /// By the digests of their tars.
    pub(crate) layers: BTreeMap<Digest, NeededLayer>,
    /// Manifests that tags name, and the images that they are of, where these have no record.
    pub(crate) unregistered: Vec<(Digest, Digest)>,
    /// All repositories that anything came from.
    pub(crate) repositories: Vec<String>,
}

impl Needs {
    fn document(&mut self, digest: Digest, kind: DocumentKind, by: &str, repositories: &[String]) {
        let document = self.documents.entry(digest).or_insert_with(|| NeededDocument {
            kind,
            by: by.to_owned(),
            repositories: Vec::new(),
        });
        add(&mut document.repositories, repositories);
    }

    fn image(&mut self, manifest: &ImageManifest, config: &ImageConfiguration, by: &str, from: &[String]) {
        let diff_ids = config.rootfs().diff_ids();
        for (at, diff_id) in diff_ids.iter().enumerate() {
            let Ok(diff_id) = diff_id.parse() else { continue };
            let layer = self.layers.entry(diff_id).or_default();
            if layer.by.is_empty() {
                layer.by = by.to_owned();
            }
            add(&mut layer.repositories, from);
            // Which of another number is which cannot be told.
            if let Some(blob) =
                manifest.layers().get(at).filter(|_| manifest.layers().len() == diff_ids.len())
                && !layer.blobs.contains(blob)
            {
                layer.blobs.push(blob.clone());
            }
        }
    }
}

fn add(list: &mut Vec<String>, more: &[String]) {
    for text in more {
        if !list.contains(text) {
            list.push(text.clone());
        }
    }
}

impl Store {
    /// Looks through all images and tags.
    pub(crate) fn needs(&self) -> Result<Needs> {
        let mut needs = Needs::default();
        let mut tags = Vec::new();
        for (name, last) in self.tags()? {
            add(&mut needs.repositories, std::slice::from_ref(&name.repository));
            tags.push((self.tag_history(&name)?, name, last));
        }
        for id in self.image_ids()? {
            let manifests = self.manifests_of(&id)?;
            let origin = self.origin_of(&id)?;
            let mut from = origin.repositories;
            let named =
                |history: &[crate::TagEntry]| history.iter().any(|entry| manifests.contains(&entry.target));
            for (_, name, _) in tags.iter().filter(|(history, ..)| named(history)) {
                add(&mut from, std::slice::from_ref(&name.repository));
            }
            add(&mut needs.repositories, &from);
            let by = format!("image {}", id.short());
            needs.document(id, DocumentKind::Config, &by, &from);
            for index in &origin.indexes {
                needs.document(*index, DocumentKind::Index, &by, &from);
            }
            for manifest in &manifests {
                needs.document(*manifest, DocumentKind::Manifest, &by, &from);
                if let (Some(manifest), Some(config)) = (self.readable(manifest), self.readable(&id)) {
                    needs.image(&manifest, &config, &by, &from);
                }
            }
        }
        for (_, name, last) in tags {
            let (by, from) = (name.familiar(), [name.repository]);
            let Some(manifest) = self.readable::<ImageManifest>(&last.target) else {
                // What it is cannot be told; most tags name manifests.
                if !self.readable_blob(&last.target) {
                    needs.document(last.target, DocumentKind::Manifest, &by, &from);
                }
                continue;
            };
            let Ok(id) = digest_of(manifest.config()) else { continue };
            if self.layout.image(&id).exists() {
                continue;
            }
            needs.document(last.target, DocumentKind::Manifest, &by, &from);
            needs.document(id, DocumentKind::Config, &by, &from);
            if let Some(config) = self.readable(&id) {
                needs.image(&manifest, &config, &by, &from);
            }
            needs.unregistered.push((last.target, id));
        }
        Ok(needs)
    }

    /// A document, if it is there, whole and what it should be. What is wrong with it, others tell.
    fn readable<T: serde::de::DeserializeOwned>(&self, digest: &Digest) -> Option<T> {
        serde_json::from_slice(&self.blob(digest).ok()??).ok()
    }

    /// Whether a blob is there and whole.
    pub(crate) fn readable_blob(&self, digest: &Digest) -> bool {
        self.blob(digest).is_ok_and(|blob| blob.is_some())
    }
}
