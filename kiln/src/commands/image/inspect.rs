//! `kiln image inspect`.

use clap_complete::engine::ArgValueCompleter;
use jiff::Timestamp;
use kiln_contract::Digest;
use kiln_store::{Image, Store};
use oci_spec::image::{ImageConfiguration, ImageManifest};
use serde::Serialize;

use super::ls::{created, size};
use crate::complete;
use crate::context::Context;
use crate::error::Result;
use crate::exit::Exit;
use crate::output::{Format, Table, print_json, print_rows};

/// Show everything that is known of images, as JSON
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Names or ids
    #[arg(required = true, value_name = "IMAGE", add = ArgValueCompleter::new(complete::images))]
    images: Vec<String>,
    /// The form of the output
    #[arg(long, value_name = "FORMAT", default_value = "json")]
    format: Format,
}

/// An image, as the JSON forms write it.
#[derive(Debug, Serialize)]
pub(crate) struct Details {
    /// `sha256:…`: the digest of its config.
    id: Digest,
    /// `sha256:…`: the digest of its manifest.
    digest: Digest,
    /// Its names, as Docker shows them.
    names: Vec<String>,
    /// When it was made, by its config (RFC 3339).
    created: Option<Timestamp>,
    /// `linux`.
    os: String,
    /// `amd64`, `arm64`, …
    architecture: String,
    /// Bytes of its layers as its manifest states them.
    size: u64,
    /// Its layers in the store, bottom first.
    layers: Vec<Digest>,
    /// Whether all of it is here: of an image that was pulled lazily, files come when they are opened.
    whole: bool,
    /// Files that are not here.
    absent_files: u64,
    /// Bytes of those files.
    absent_size: u64,
    /// Its OCI config.
    config: ImageConfiguration,
    /// Its OCI manifest.
    manifest: ImageManifest,
}

impl Args {
    pub(crate) fn run(self, context: &Context) -> Result<Exit> {
        let store = context.store()?;
        let all = self.images.iter().map(|name| details(&store, &context.image(&store, name)?));
        let all = all.collect::<Result<Vec<_>>>()?;
        match self.format {
            Format::Jsonl => print_rows(Format::Jsonl, &all, |_| Table::default())?,
            _ => print_json(Format::Json, &all)?,
        }
        Ok(Exit::SUCCESS)
    }
}

/// Everything that is known of an image.
pub(crate) fn details(store: &Store, image: &Image) -> Result<Details> {
    let (mut absent_files, mut absent_size) = (0, 0_u64);
    if !image.whole {
        for layer in &image.layers {
            let contents = store.layer_contents(layer)?;
            absent_files += contents.absent_objects;
            absent_size = absent_size.saturating_add(contents.absent_bytes);
        }
    }
    let tags = store.tags()?.into_iter().filter(|(_, entry)| entry.target == image.manifest_digest);
    Ok(Details {
        id: image.id,
        digest: image.manifest_digest,
        names: tags.map(|(name, _)| name.familiar()).collect(),
        created: created(image),
        os: image.config.os().to_string(),
        architecture: image.config.architecture().to_string(),
        size: size(image),
        layers: image.layers.clone(),
        whole: image.whole,
        absent_files,
        absent_size,
        config: image.config.clone(),
        manifest: image.manifest.clone(),
    })
}
