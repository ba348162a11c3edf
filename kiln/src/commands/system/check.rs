//! `kiln system check`.

use std::io::{self, Read};

use kiln_contract::ByteSize;
use kiln_registry::{FromRegistries, Registry};
use kiln_store::{CheckReport, Repair, WantedDocument, WantedLayer, WantedRange};
use serde::Serialize;

use crate::commands::RegistryArgs;
use crate::commands::image::image_name;
use crate::context::Context;
use crate::error::{CliError, Result};
use crate::exit::Exit;
use crate::output::{Format, FormatArgs, Out, print_json};
use crate::progress;

/// Verify every file and every tree of the store by its digest
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Bring back what is missing or damaged, from what else is there and the registries that the images came from; of
    /// these FROM is asked first (`localhost:5000/me/tools`)
    #[arg(long, value_name = "FROM", num_args = 0..=1)]
    repair: Option<Option<String>>,
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
    /// Layers of which not all files are here, because they were pulled lazily: no damage. A repair fetches them.
    absent: Vec<String>,
}

/// Registries that images came from, and one that is asked before them.
struct Preferring<'a> {
    registries: FromRegistries<'a>,
    /// `registry/path`.
    first: Option<String>,
}

impl Preferring<'_> {
    fn repositories(&self, known: &[String]) -> Vec<String> {
        self.first.iter().chain(known).cloned().collect()
    }
}

impl Repair for Preferring<'_> {
    fn document(&self, wanted: &WantedDocument) -> io::Result<Vec<u8>> {
        let repositories = self.repositories(&wanted.repositories);
        self.registries.document(&WantedDocument { repositories, ..wanted.clone() })
    }

    fn layer(&self, wanted: &WantedLayer) -> io::Result<Box<dyn Read + Send>> {
        let repositories = self.repositories(&wanted.repositories);
        self.registries.layer(&WantedLayer { repositories, ..wanted.clone() })
    }

    fn range(&self, wanted: &WantedRange) -> io::Result<Box<dyn Read + Send>> {
        let repositories = self.repositories(&wanted.repositories);
        self.registries.range(&WantedRange { repositories, ..wanted.clone() })
    }
}

impl Args {
    pub(crate) fn run(self, context: &Context) -> Result<Exit> {
        let store = context.store()?;
        let (registry, progress) = (Registry::new(self.registry.config())?, progress::new(false));
        let first = self.repair.iter().flatten().next();
        let first = first.map(|name| image_name(name)).transpose()?.map(|name| name.repository);
        let source = self
            .repair
            .is_some()
            .then(|| Preferring { registries: registry.repair(&store, &*progress), first });
        let report = store.check(source.as_ref().map(|source| source as &dyn Repair))?;
        let CheckReport { objects, layers, images, bytes, damaged, repaired, absent } = report;
        let report = Report { objects, layers, images, bytes, damaged, repaired, absent };
        if self.format.format == Format::Table {
            let mut out = Out::new();
            for line in &report.damaged {
                out.line(format!("damaged: {line}"))?;
            }
            for line in &report.repaired {
                out.line(format!("repaired: {line}"))?;
            }
            for line in &report.absent {
                out.line(format!("not here yet: {line}"))?;
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
        Err(error.with_hint(if self.repair.is_some() {
            "bring in the images that need it again, with `kiln pull` or `kiln image import`: what is damaged is replaced"
        } else {
            "`kiln system check --repair` makes again, or fetches, what can be"
        }))
    }
}
