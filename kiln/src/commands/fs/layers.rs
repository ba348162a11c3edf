//! `kiln fs layers`.

use std::collections::BTreeMap;

use clap_complete::engine::ArgValueCompleter;
use kiln_contract::{ByteSize, Digest};
use kiln_store::ImageName;
use serde::Serialize;

use super::stack;
use crate::complete;
use crate::context::Context;
use crate::error::Result;
use crate::exit::Exit;
use crate::output::{FormatArgs, Out, Table, clip, print_rows};

/// List all layers, or those of an image, the bottom first
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Only those of this image; several may be joined by `+`
    #[arg(value_name = "REF[+REF…]", add = ArgValueCompleter::new(complete::images))]
    reference: Option<String>,
    /// Only digests
    #[arg(short, long)]
    quiet: bool,
    /// Digests and names in full
    #[arg(long)]
    no_trunc: bool,
    #[command(flatten)]
    format: FormatArgs,
}

/// A layer as the JSON forms write it.
#[derive(Debug, Serialize)]
struct Row {
    /// The digest of its tree.
    layer: Digest,
    /// The digest of its uncompressed tar, by which registries know it.
    diff_id: Option<Digest>,
    /// Files whose bytes are in the store by themselves: those that are larger than a few words.
    files: u64,
    /// Bytes of these.
    size: u64,
    /// How many of these files are not here: of a layer that was pulled lazily, they come when they are opened.
    absent_files: u64,
    /// Bytes of those that are not here.
    absent_size: u64,
    /// Names, or ids, of the images that have it.
    images: Vec<String>,
}

impl Args {
    pub(crate) fn run(self, context: &Context) -> Result<Exit> {
        let store = context.store()?;
        let layers = match &self.reference {
            Some(reference) => stack(&store, reference)?.layers,
            None => store.layers()?,
        };
        if self.quiet {
            let mut out = Out::new();
            for layer in &layers {
                out.line(layer.to_string())?;
            }
            out.flush()?;
            return Ok(Exit::SUCCESS);
        }
        let mut images: BTreeMap<Digest, Vec<String>> = BTreeMap::new();
        for image in store.images()? {
            let names: Vec<String> = store.names_of(&image.id)?.iter().map(ImageName::familiar).collect();
            let names = if names.is_empty() { vec![image.id.short()] } else { names };
            for layer in &image.layers {
                images.entry(*layer).or_default().extend(names.iter().cloned());
            }
        }
        let mut rows = Vec::new();
        for layer in layers {
            let contents = store.layer_contents(&layer)?;
            let mut names = images.remove(&layer).unwrap_or_default();
            names.sort();
            names.dedup();
            let diff_id = store.diff_id_of_layer(&layer).ok();
            rows.push(Row {
                layer,
                diff_id,
                files: contents.objects,
                size: contents.bytes,
                absent_files: contents.absent_objects,
                absent_size: contents.absent_bytes,
                images: names,
            });
        }
        print_rows(self.format.format, &rows, |rows| {
            let mut table = Table::new(["LAYER", "FILES", "SIZE", "IMAGES"]).right("FILES").right("SIZE");
            for row in rows {
                let names = row.images.join(", ");
                table.row([
                    if self.no_trunc { row.layer.to_string() } else { row.layer.short() },
                    row.files.to_string(),
                    match row.absent_size {
                        0 => ByteSize(row.size).to_string(),
                        absent => format!("{} ({} not here)", ByteSize(row.size), ByteSize(absent)),
                    },
                    if self.no_trunc { names } else { clip(&names, 60) },
                ]);
            }
            table
        })?;
        Ok(Exit::SUCCESS)
    }
}
