//! `kiln fs ls`.

use clap_complete::engine::ArgValueCompleter;
use jiff::Timestamp;
use serde::Serialize;

use super::contents;
use crate::complete;
use crate::context::Context;
use crate::error::Result;
use crate::exit::Exit;
use crate::output::{FormatArgs, Table, print_rows};

/// List a directory of an image, without mounting it
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Its name; several may be joined by `+`
    #[arg(value_name = "REF[+REF…]", add = ArgValueCompleter::new(complete::images))]
    reference: String,
    /// The directory, or a file
    #[arg(default_value = "/")]
    path: String,
    #[command(flatten)]
    format: FormatArgs,
}

/// An entry as the JSON forms write it.
#[derive(Debug, Serialize)]
struct Row {
    /// Bytes that are not UTF-8 are replaced.
    name: String,
    /// `directory`, `file`, `link`, `char_device`, `block_device`, `pipe`, `socket`.
    kind: &'static str,
    /// Permission bits, octal.
    mode: String,
    uid: u32,
    gid: u32,
    /// Of a file, in bytes.
    size: u64,
    /// When it was changed (RFC 3339), where that can be told.
    modified: Option<Timestamp>,
    /// Where a symbolic link points to.
    target: Option<String>,
}

impl Args {
    pub(crate) fn run(self, context: &Context) -> Result<Exit> {
        let listed = contents(context, &self.reference)?.list(self.path.as_bytes())?;
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let rows: Vec<Row> = listed
            .iter()
            .map(|entry| Row {
                name: text(&entry.name),
                kind: entry.kind(),
                mode: format!("{:04o}", entry.attributes.mode),
                uid: entry.attributes.uid,
                gid: entry.attributes.gid,
                size: entry.size,
                modified: {
                    let time = entry.attributes.mtime;
                    Timestamp::new(time.seconds, time.nanoseconds.cast_signed()).ok()
                },
                target: entry.target.as_deref().map(text),
            })
            .collect();
        print_rows(self.format.format, &rows, |rows| {
            let mut table = Table::new(["MODE", "OWNER", "SIZE", "MODIFIED", "NAME"]).right("SIZE");
            for row in rows {
                let letter = match row.kind {
                    "file" => "-",
                    kind => &kind[..1],
                };
                let name = match (&row.target, row.kind) {
                    (Some(target), _) => format!("{} -> {target}", row.name),
                    (None, "directory") => format!("{}/", row.name),
                    (None, _) => row.name.clone(),
                };
                table.row([
                    format!("{letter}{}", row.mode),
                    format!("{}:{}", row.uid, row.gid),
                    row.size.to_string(),
                    row.modified.map_or_else(String::new, |time| time.strftime("%Y-%m-%d %H:%M").to_string()),
                    name,
                ]);
            }
            table
        })?;
        Ok(Exit::SUCCESS)
    }
}
