//! `kiln fs clean`.

use jiff::{SignedDuration, Timestamp};
use kiln_contract::HumanDuration;
use kiln_store::{GcOptions, VersionPolicy};
use kiln_view::views::Views;
use serde::Serialize;

use crate::commands::system::collected::Collected;
use crate::commands::system::prune::collect_with;
use crate::context::Context;
use crate::error::{CliError, Result};
use crate::exit::Exit;
use crate::output::{Format, FormatArgs, print_json};

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
    #[serde(flatten)]
    collected: Collected,
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
        let mut report = collect_with(context, &instances, &options)?;
        let versions = std::mem::take(&mut report.versions);
        Removed { views, versions, collected: Collected::of(report, self.dry_run) }
            .print(self.format.format)?;
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
        self.collected.print(&[("view", &self.views), ("version", &self.versions)], &[])
    }
}
