//! `docker save`: an archive without manifests, in which `manifest.json` lists configs, tags and layer files.

use std::collections::HashMap;
use std::io::{self, Read as _};

use kiln_contract::{Digest, Step};
use kiln_store::{Image, ImageName};
use oci_spec::image::{Descriptor, ImageManifestBuilder, MediaType};
use serde::Deserialize;

use crate::archive::Archive;
use crate::compression::{detect, read_full};
use crate::import::{Import, Named};
use crate::manifest::{self, CONFIG_LIMIT};
use crate::unpack::{LocalLayer, unpack};
use crate::{RegistryError, Result};

/// One image of `manifest.json` (docker save).
#[derive(Deserialize)]
pub(crate) struct Saved {
    #[serde(rename = "Config")]
    config: String,
    #[serde(rename = "RepoTags", default)]
    tags: Option<Vec<String>>,
    #[serde(rename = "Layers", default)]
    layers: Vec<String>,
}

impl Import<'_> {
    /// The images of `docker save`.
    pub(crate) fn saved(&self, archive: &Archive, saved: Vec<Saved>) -> Result<Named> {
        let label = self.label();
        let alone = saved.len() == 1;
        let mut images = Vec::new();
        for entry in saved {
            let config_bytes = archive
                .read(&entry.config, CONFIG_LIMIT)?
                .ok_or_else(|| self.missing("config", &entry.config))?;
            let image = self.saved_image(archive, &entry, &config_bytes, &label)?;
            let tags = entry.tags.unwrap_or_default();
            if tags.is_empty() {
                let name = self.name_for(None, alone)?;
                self.tag(name.as_ref(), &image)?;
                images.push((name, image));
                continue;
            }
            for tag in tags {
                let name = ImageName::parse(&tag)?;
                self.tag(Some(&name), &image)?;
                images.push((Some(name), image.clone()));
            }
        }
        if images.is_empty() {
            return Err(RegistryError::Unsupported { name: label, reason: "there is no image in it".into() });
        }
        Ok(images)
    }

    /// `docker save` keeps no manifest: one is made, and the config, so the id, stays as it is.
    fn saved_image(
        &self,
        archive: &Archive,
        entry: &Saved,
        config_bytes: &[u8],
        label: &str,
    ) -> Result<Image> {
        let id = Digest::of(config_bytes);
        let config = manifest::descriptor(MediaType::ImageConfig, &id, config_bytes.len() as u64);
        // As many layers as there are, for the check of their number; what they are is known once they are read.
        let unread = manifest::descriptor(MediaType::ImageLayer, &id, 0);
        let mut document = ImageManifestBuilder::default()
            .schema_version(2_u32)
            .media_type(MediaType::ImageManifest)
            .config(config)
            .layers(vec![unread; entry.layers.len()])
            .build()
            .map_err(|error| RegistryError::Invalid {
                what: "manifest",
                name: label.into(),
                reason: error.to_string(),
            })?;
        let (_, diff_ids) = manifest::parse_config(config_bytes, &document, self.platform, label)?;
        let mut layers = Vec::new();
        let mut sizes: HashMap<Digest, Descriptor> = HashMap::new();
        for (path, diff_id) in entry.layers.iter().zip(&diff_ids) {
            if !sizes.contains_key(diff_id) {
                let descriptor = self.saved_layer(archive, path, diff_id)?;
                sizes.insert(*diff_id, descriptor);
            }
            layers.extend(sizes.get(diff_id).cloned());
        }
        document.set_layers(layers);
        let bytes = serde_json::to_vec(&document).map_err(|error| RegistryError::Invalid {
            what: "manifest",
            name: label.into(),
            reason: error.to_string(),
        })?;
        Ok(self.store.put_image(&bytes, config_bytes)?)
    }

    fn saved_layer(&self, archive: &Archive, path: &str, diff_id: &Digest) -> Result<Descriptor> {
        let described = |digest: Digest, size: u64| {
            let media_type =
                if digest == *diff_id { MediaType::ImageLayer } else { MediaType::ImageLayerGzip };
            manifest::descriptor(media_type, &digest, size)
        };
        // The descriptor needs digest and size of the file even if the store has the layer.
        let failed = |source| RegistryError::Io { doing: "read", path: self.source.to_owned(), source };
        let mut head = [0; 4];
        let mut file = archive.open(path)?.ok_or_else(|| self.missing("layer", path))?;
        let got = read_full(&mut file, &mut head).map_err(failed)?;
        let kind = manifest::layer_media_type(detect(&head[..got]));
        let mut whole = LocalLayer::new(io::Cursor::new(head[..got].to_vec()).chain(file), None);
        if !self.store.has_sound_layer(diff_id)? {
            let step = self.progress.begin(Step { name: diff_id.short(), verb: "unpack", total: None });
            let outcome = unpack(self.store, &mut whole, Some(diff_id), self.limits, &self.label(), path);
            self.progress.end(step, if outcome.is_ok() { "done" } else { "failed" });
            outcome?;
        } else {
            io::copy(&mut whole, &mut io::sink()).map_err(failed)?;
        }
        let actual = whole.actual.unwrap_or(*diff_id);
        let mut descriptor = described(actual, whole.length);
        descriptor.set_media_type(kind);
        if actual != *diff_id {
            self.store.remember_blob(diff_id, &descriptor)?;
        }
        Ok(descriptor)
    }
}
