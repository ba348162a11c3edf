//! `kiln fs clean`.

use jiff::{SignedDuration, Timestamp};
use kiln_contract::{ByteSize, HumanDuration};
use kiln_store::{GcOptions, VersionPolicy};
use kiln_view::views::Views;
use serde::Serialize;

use crate::commands::system::prune::collect_with;
use crate::context::Context;
use crate::error::{CliError, Result};
use crate::exit::Exit;
use crate::output::{Format, FormatArgs, Out, Table, print_json};

/// Remove what killed processes left of views, versions of names beyond a policy, and what nobody needs then
///
/// The latest version of a name always stays, and so does what a view or an instance has. Without --keep and --older-than
/// all versions stay, as `NAME~N`; with both, a version goes only if both let it go. Images that no name ever had go.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Examples:\n  kiln fs clean --dry-run --keep 5\n  kiln fs clean --keep 3 --older-than 30d"
)]
pub(crate) struct Args {
    /// Let the latest so many versions of each name stay
    #[arg(long, value_name = "NUMBER", value_parser = clap::value_parser!(u32).range(1..))]
    keep: Option<u32>,
    /// Let versions stay that were replaced less than so long ago (30d)
    #[arg(long, value_name = "DURATION")]
    older_than: Option<HumanDuration>,
    /// Views that were to be kept and in which nobody is, too
    #[arg(long)]
    kept_views: bool,
    /// Only show what would be removed
    #[arg(long)]
    dry_run: bool,
    #[command(flatten)]
    format: FormatArgs,
}

/// What was removed, as the JSON forms write it.
#[derive(Debug, Serialize)]
struct Removed {
    /// Names of views.
    views: Vec<String>,
    /// Versions, as they were called before: `name:tag~N`.
    versions: Vec<String>,
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
    /// Bytes given back in the store.
    bytes: u64,
    /// Nothing was removed: this is what would be.
    dry_run: bool,
}

impl Args {
    pub(crate) fn run(self, context: &Context) -> Result<Exit> {
        let instances = context.instances()?;
        let views = Views::open(context.home());
        let views =
            if self.dry_run { views.unused(self.kept_views)? } else { views.prune(self.kept_views)? };
        let replaced_before = self.older_than.map(|age| before(age, Timestamp::now())).transpose()?;
        let versions = VersionPolicy { keep: self.keep.map(|keep| keep as usize), replaced_before };
        let options = GcOptions {
            untagged: true,
            versions: Some(versions),
            dry_run: self.dry_run,
            ..GcOptions::default()
        };
        let report = collect_with(context, &instances, &options)?;
        let removed = Removed {
            views,
            versions: report.versions,
            images: report.images,
            layers: report.layers,
            objects: report.objects,
            blobs: report.blobs,
            renders: report.renders,
            bytes: report.bytes,
            dry_run: self.dry_run,
        };
        removed.print(self.format.format)?;
        Ok(Exit::SUCCESS)
    }
}

/// The moment that lies so long back.
fn before(age: HumanDuration, now: Timestamp) -> Result<Timestamp> {
    SignedDuration::try_from(age.0)
        .and_then(|age| now.checked_sub(age))
        .map_err(|_| CliError::usage(format!("there was nothing {age} ago")))
}

impl Removed {
    fn print(&self, format: Format) -> Result<()> {
        if format != Format::Table {
            return print_json(format, self);
        }
        let mut table = Table::new(["WHAT", if self.dry_run { "WOULD BE REMOVED" } else { "REMOVED" }]);
        for (what, names) in [("view", &self.views), ("version", &self.versions), ("image", &self.images)] {
            for name in names {
                table.row([what, name]);
            }
        }
        for (what, number) in [
            ("layers", self.layers),
            ("files", self.objects),
            ("manifests and configs", self.blobs),
            ("caches", self.renders),
        ] {
            if number > 0 {
                table.row([what.to_owned(), number.to_string()]);
            }
        }
        table.row(["space".to_owned(), ByteSize(self.bytes).to_string()]);
        let mut out = Out::new();
        out.table(&table)?;
        out.flush()
    }
}
