//! `kiln system prune`, and the collecting of garbage for `image prune` too.

use kiln_contract::{Digest, InstanceStatus, RemoveOptions, RuntimeBackend};
use kiln_store::{GcOptions, GcReport, Store};
use serde::Serialize;

use super::collected::Collected;
use crate::backends::{Backends, in_views};
use crate::context::Context;
use crate::error::Result;
use crate::exit::{self, Exit};
use crate::output::{Format, FormatArgs, print_json};

/// Remove what nobody needs: instances that do not run, unused networks, images without a name, unreachable data
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// All images that no instance uses, named or not, and the templates of machines
    #[arg(short, long)]
    all: bool,
    /// Volumes that no instance uses, too: anonymous ones, with --all named ones as well
    #[arg(long)]
    volumes: bool,
    /// Keep instances that do not run
    #[arg(long)]
    keep_instances: bool,
    /// Only show what would be removed
    #[arg(long)]
    dry_run: bool,
    /// Accepted for Docker's sake: nothing is asked
    #[arg(short, long, hide = true)]
    force: bool,
    #[command(flatten)]
    format: FormatArgs,
}

/// What was removed, as the JSON forms write it.
#[derive(Debug, Serialize)]
pub(crate) struct Removed {
    /// Names of instances.
    instances: Vec<String>,
    /// Names of networks.
    networks: Vec<String>,
    /// Names of volumes.
    volumes: Vec<String>,
    /// How many writable disks that no machine has.
    disks: u64,
    /// How many templates of machines.
    templates: u64,
    #[serde(flatten)]
    collected: Collected,
}

impl Args {
    pub(crate) fn run(self, context: &Context) -> Result<Exit> {
        let instances = context.instances()?;
        let removed = match self.keep_instances {
            true => Vec::new(),
            false => remove_instances(&instances, self.volumes, self.dry_run)?,
        };
        let (mut networks, mut volumes, mut templates, mut bytes) = (Vec::new(), Vec::new(), 0, 0);
        if !self.dry_run {
            networks = context.networks()?.prune()?;
            if self.volumes {
                for (name, size) in context.volumes()?.prune(self.all)? {
                    volumes.push(name);
                    bytes += size;
                }
            }
        }
        let disks = kiln_machine::prune_disks(context.home(), self.dry_run)?.len() as u64;
        if self.all {
            let pruned = kiln_machine::prune_templates(context.home(), self.dry_run)?;
            templates = pruned.len() as u64;
            bytes += pruned.iter().map(kiln_machine::Saved::size).sum::<u64>();
        }
        // Last, so that what those needed goes too.
        let mut collected = collect(context, &instances, self.all, self.dry_run)?.collected;
        collected.bytes += bytes;
        Removed { instances: removed, networks, volumes, disks, templates, collected }
            .print(self.format.format)?;
        Ok(Exit::SUCCESS)
    }
}

fn remove_instances(instances: &Backends, volumes: bool, dry_run: bool) -> Result<Vec<String>> {
    let mut removed = Vec::new();
    for record in instances.list()? {
        if !matches!(record.status, InstanceStatus::Created | InstanceStatus::Exited) {
            continue;
        }
        if !dry_run {
            // One that was started meanwhile stays, and so do the others' images.
            if let Err(error) = instances.remove(&record.id, RemoveOptions { force: false, volumes }) {
                exit::print_line("warning", &format!("{} stays: {error}", record.spec.name));
                continue;
            }
        }
        removed.push(record.spec.name);
    }
    Ok(removed)
}

/// Removes images without a name (`all`: those that no instance uses), and what of the store nobody needs then.
pub(crate) fn collect(context: &Context, instances: &Backends, all: bool, dry_run: bool) -> Result<Removed> {
    let options = GcOptions { untagged: true, all, dry_run, ..GcOptions::default() };
    let report = collect_with(context, instances, &options)?;
    Ok(Removed {
        instances: Vec::new(),
        networks: Vec::new(),
        volumes: Vec::new(),
        disks: 0,
        templates: 0,
        collected: Collected::of(report, dry_run),
    })
}

/// Removes of the store what the options say and nobody needs then. Instances and views need theirs.
pub(crate) fn collect_with(context: &Context, instances: &Backends, options: &GcOptions) -> Result<GcReport> {
    let below = Store::open(context.home())?.mount_point_layer()?;
    let in_use = || -> Result<Vec<Digest>> {
        let instances = instances.list()?.into_iter();
        let of_instances = instances.map(|record| [vec![record.spec.image_id], record.spec.layers].concat());
        let of_views = in_views(context.home())?;
        Ok(of_instances.flatten().chain(of_views).collect())
    };
    Store::gc(context.home(), in_use, &GcOptions { below, ..options.clone() })
}

impl Removed {
    pub(crate) fn print(&self, format: Format) -> Result<()> {
        if format != Format::Table {
            return print_json(format, self);
        }
        let names = [("instance", &self.instances), ("network", &self.networks), ("volume", &self.volumes)];
        self.collected.print(&names, &[("disks", self.disks), ("templates", self.templates)])
    }
}
