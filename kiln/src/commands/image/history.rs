//! `kiln image history`.

use clap_complete::engine::ArgValueCompleter;
use jiff::Timestamp;
use kiln_contract::{ByteSize, Digest};
use kiln_store::ImageName;
use serde::Serialize;

use crate::complete;
use crate::context::Context;
use crate::error::{CliError, Result};
use crate::exit::Exit;
use crate::output::{Format, FormatArgs, Table, clip, print_rows};
use crate::resolve::ago;

/// Show how an image was made, newest step first; or with --tag, what its name pointed to
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Its name or id
    #[arg(add = ArgValueCompleter::new(complete::images))]
    image: String,
    /// What this name pointed to over time, as `name:tag~N`
    #[arg(long)]
    tag: bool,
    /// Steps and ids in full
    #[arg(long)]
    no_trunc: bool,
    #[command(flatten)]
    format: FormatArgs,
}

/// A step as the JSON forms write it.
#[derive(Debug, Serialize)]
struct Step {
    /// When (RFC 3339).
    created: Option<Timestamp>,
    /// The instruction.
    created_by: String,
    /// What the author says.
    comment: String,
    /// Bytes of its layer as the manifest states them; 0 for a step without a layer.
    size: u64,
    /// Its layer in the store.
    layer: Option<Digest>,
}

/// What a name pointed to, as the JSON forms write it.
#[derive(Debug, Serialize)]
struct Target {
    /// `name:tag~N`.
    name: String,
    /// When the name was given (RFC 3339).
    time: Timestamp,
    /// The digest of the manifest.
    target: Digest,
    /// By what.
    note: String,
}

impl Args {
    pub(crate) fn run(self, context: &Context) -> Result<Exit> {
        if self.tag {
            targets(context, &self.image, self.no_trunc, self.format.format)?;
        } else {
            self.steps(context)?;
        }
        Ok(Exit::SUCCESS)
    }

    fn steps(&self, context: &Context) -> Result<()> {
        let store = context.store()?;
        let image = context.image(&store, &self.image)?;
        let mut layers = image.layers.iter().zip(image.manifest.layers());
        let mut steps = Vec::new();
        for entry in image.config.history().as_deref().unwrap_or_default() {
            let layer = if entry.empty_layer().unwrap_or(false) { None } else { layers.next() };
            steps.push(Step {
                created: entry.created().as_deref().and_then(|text| text.parse().ok()),
                created_by: entry.created_by().clone().unwrap_or_default(),
                comment: entry.comment().clone().unwrap_or_default(),
                size: layer.map_or(0, |(_, descriptor)| descriptor.size()),
                layer: layer.map(|(layer, _)| *layer),
            });
        }
        // Layers that the history does not tell of.
        let untold = layers.map(|(layer, descriptor)| Step {
            created: None,
            created_by: String::new(),
            comment: String::new(),
            size: descriptor.size(),
            layer: Some(*layer),
        });
        steps.extend(untold);
        steps.reverse();
        let now = Timestamp::now();
        print_rows(self.format.format, &steps, |steps| {
            let mut table = Table::new(["LAYER", "CREATED", "CREATED BY", "SIZE", "COMMENT"]).right("SIZE");
            for step in steps {
                let by = step.created_by.split_whitespace().collect::<Vec<_>>().join(" ");
                table.row([
                    step.layer.map_or("-".to_owned(), |layer| self.digest(layer)),
                    step.created.map_or("-".to_owned(), |time| ago(time, now)),
                    if self.no_trunc { by } else { clip(&by, 45) },
                    ByteSize(step.size).to_string(),
                    step.comment.clone(),
                ]);
            }
            table
        })
    }

    fn digest(&self, digest: Digest) -> String {
        shown(digest, self.no_trunc)
    }
}

fn shown(digest: Digest, whole: bool) -> String {
    if whole { digest.to_string() } else { digest.short() }
}

/// Prints what a name pointed to, newest first.
pub(crate) fn targets(context: &Context, name: &str, no_trunc: bool, format: Format) -> Result<()> {
    let store = context.store()?;
    let name = ImageName::parse(name)?;
    let entries = store.tag_history(&name)?;
    if entries.is_empty() {
        return Err(CliError::failed(format!("there is no tag `{}`", name.familiar())));
    }
    let rows: Vec<Target> = entries
        .into_iter()
        .rev()
        .enumerate()
        .map(|(back, entry)| Target {
            name: if back == 0 { name.familiar() } else { format!("{}~{back}", name.familiar()) },
            time: entry.time,
            target: entry.target,
            note: entry.note,
        })
        .collect();
    let now = Timestamp::now();
    print_rows(format, &rows, |rows| {
        let mut table = Table::new(["NAME", "DIGEST", "WHEN", "BY"]);
        for row in rows {
            table.row([row.name.clone(), shown(row.target, no_trunc), ago(row.time, now), row.note.clone()]);
        }
        table
    })
}
