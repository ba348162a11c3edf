//! `kiln system check`.

use std::io::{self, Read, Seek};

use kiln_contract::{ByteSize, Digest, Home};
use kiln_registry::{PullOptions, PullPolicy, Registry};
use kiln_store::{CheckReport, Image, ImageName, Repair, Store};
use oci_spec::image::Descriptor;
use serde::Serialize;

use crate::commands::RegistryArgs;
use crate::context::Context;
use crate::error::{CliError, Result};
use crate::exit::Exit;
use crate::output::{Format, FormatArgs, Out, print_json};
use crate::progress;

/// Verify every file and every tree of the store by its digest
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Bring back what is missing or damaged from the registries that the images came from
    #[arg(long)]
    repair: bool,
    #[command(flatten)]
    registry: RegistryArgs,
    #[command(flatten)]
    format: FormatArgs,
}

/// What was found, as the JSON forms write it.
#[derive(Debug, Serialize)]
struct Report {
    /// Files that were verified.
    objects: u64,
    /// Layers that were verified.
    layers: u64,
    /// Images that were verified.
    images: u64,
    /// Bytes that were read.
    bytes: u64,
    /// What is wrong, a sentence each; after a repair, what still is.
    damaged: Vec<String>,
    /// What was put right.
    repaired: Vec<String>,
}

impl Args {
    pub(crate) fn run(self, context: &Context) -> Result<Exit> {
        let store = context.store()?;
        let source =
            if self.repair { Some(FromRegistries::new(context, &store, &self.registry)?) } else { None };
        let report = store.check(source.as_ref().map(|source| source as &dyn Repair))?;
        let CheckReport { objects, layers, images, bytes, damaged, repaired } = report;
        let report = Report { objects, layers, images, bytes, damaged, repaired };
        if self.format.format == Format::Table {
            let mut out = Out::new();
            for line in &report.damaged {
                out.line(format!("damaged: {line}"))?;
            }
            for line in &report.repaired {
                out.line(format!("repaired: {line}"))?;
            }
            let Report { objects, layers, images, bytes, .. } = report;
            out.line(format!(
                "verified {images} images, {layers} layers, {objects} files, {}",
                ByteSize(bytes)
            ))?;
            out.flush()?;
        } else {
            print_json(self.format.format, &report)?;
        }
        let left = report.damaged.len();
        if left == 0 {
            return Ok(Exit::SUCCESS);
        }
        let error = CliError::failed(format!("the store is damaged in {left} places"));
        Err(if self.repair {
            error
        } else {
            error.with_hint("`kiln system check --repair` fetches what can be fetched")
        })
    }
}

/// Layers from the registries that the images came from. Each image is pulled anew, into a store of its own that is
/// removed afterwards: nothing of a damaged store is trusted to be what it says.
struct FromRegistries {
    registry: Registry,
    images: Vec<(ImageName, Image)>,
    home: tempfile::TempDir,
    store: Store,
}

impl FromRegistries {
    fn new(context: &Context, damaged: &Store, options: &RegistryArgs) -> Result<Self> {
        let mut images = Vec::new();
        for (name, entry) in damaged.tags()? {
            // An image whose manifest is damaged cannot say which layers it has.
            if let Ok(Some(image)) = damaged.image(&entry.target) {
                images.push((name, image));
            }
        }
        let place = context.home().path();
        let home = tempfile::Builder::new().prefix("repair-").tempdir_in(place);
        let home = home.map_err(|error| {
            CliError::file(format!("cannot make a directory in {}", place.display()), error)
        })?;
        let store = Store::open(&Home::at(home.path()))?;
        Ok(Self { registry: Registry::new(options.config())?, images, home, store })
    }

    fn fetch(&self, diff_id: &Digest) -> Result<std::fs::File> {
        let progress = progress::new(false);
        let mut last = CliError::failed(format!("no image that has a name has the layer {diff_id}"));
        for (name, image) in self.images.iter().filter(|(_, image)| image.diff_ids().contains(diff_id)) {
            let exact = ImageName {
                repository: name.repository.clone(),
                tag: None,
                digest: Some(image.manifest_digest),
            };
            progress.note(&format!("pulling {} to repair the layer {}", exact.familiar(), diff_id.short()));
            let options = PullOptions { policy: PullPolicy::Missing, ..Default::default() };
            match self.registry.pull(&self.store, &exact, &options, &*progress) {
                Ok(_) => return self.unpacked(diff_id),
                Err(error) => last = error.into(),
            }
        }
        Err(last)
    }

    fn unpacked(&self, diff_id: &Digest) -> Result<std::fs::File> {
        let bad = |error| CliError::file("cannot keep a layer in a temporary file", error);
        let mut file = tempfile::tempfile_in(self.home.path()).map_err(bad)?;
        self.store.export_diff(diff_id, &mut file)?;
        file.rewind().map_err(bad)?;
        Ok(file)
    }
}

impl Repair for FromRegistries {
    fn layer(&self, diff_id: &Digest, _blobs: &[Descriptor]) -> io::Result<Box<dyn Read + Send>> {
        match self.fetch(diff_id) {
            Ok(file) => Ok(Box::new(file)),
            Err(error) => {
                let text =
                    error.lines().into_iter().filter(|(label, _)| *label != "hint").map(|(_, text)| text);
                Err(io::Error::other(text.collect::<Vec<_>>().join(": ")))
            }
        }
    }
}
