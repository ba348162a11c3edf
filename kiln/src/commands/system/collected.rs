//! What a collection of garbage has removed, for the verbs that do one.

use kiln_contract::ByteSize;
use kiln_store::GcReport;
use serde::Serialize;

use crate::error::Result;
use crate::output::{Out, Table};

/// What of the store was removed, as the JSON forms write it.
#[derive(Debug, Serialize)]
pub(crate) struct Collected {
    /// Names or ids of images.
    images: Vec<String>,
    /// How many layers.
    layers: u64,
    /// How many files of images.
    objects: u64,
    /// How many manifests and configs.
    blobs: u64,
    /// How many caches.
    renders: u64,
    /// Bytes given back, in the store and wherever else the verb has removed something.
    pub(crate) bytes: u64,
    /// Nothing was removed: this is what would be.
    dry_run: bool,
}

impl Collected {
    pub(crate) fn of(report: GcReport, dry_run: bool) -> Self {
        let GcReport { images, layers, objects, blobs, renders, bytes, .. } = report;
        Self { images, layers, objects, blobs, renders, bytes, dry_run }
    }

    /// Prints a table of it, with the names and numbers of what else was removed before it.
    pub(crate) fn print(&self, names: &[(&str, &Vec<String>)], numbers: &[(&str, u64)]) -> Result<()> {
        let mut table = Table::new(["WHAT", if self.dry_run { "WOULD BE REMOVED" } else { "REMOVED" }]);
        for (what, names) in names.iter().chain(&[("image", &self.images)]) {
            for name in *names {
                table.row([what, name.as_str()]);
            }
        }
        let own = [
            ("layers", self.layers),
            ("files", self.objects),
            ("manifests and configs", self.blobs),
            ("caches", self.renders),
        ];
        for (what, number) in numbers.iter().chain(&own).filter(|(_, number)| *number > 0) {
            table.row([what.to_string(), number.to_string()]);
        }
        table.row(["space".to_owned(), ByteSize(self.bytes).to_string()]);
        let mut out = Out::new();
        out.table(&table)?;
        out.flush()
    }
}
