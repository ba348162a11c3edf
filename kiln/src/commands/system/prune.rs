//! `kiln system prune`, and the collecting of garbage for `image prune` too.

use kiln_contract::{ByteSize, Digest, InstanceStatus, RemoveOptions, RuntimeBackend};
use kiln_store::{GcOptions, GcReport, Store};
use serde::Serialize;

use crate::backends::{Backends, in_views};
use crate::context::Context;
use crate::error::Result;
use crate::exit::{self, Exit};
use crate::output::{Format, FormatArgs, Table, print_json};

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
#[derive(Debug, Default, Serialize)]
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
    /// Bytes given back, in the store and in volumes.
    bytes: u64,
    /// Nothing was removed: this is what would be.
    dry_run: bool,
}

impl Args {
    pub(crate) fn run(self, context: &Context) -> Result<Exit> {
        let instances = context.instances()?;
        let mut before = Removed::default();
        if !self.keep_instances {
            before.instances = remove_instances(&instances, self.volumes, self.dry_run)?;
        }
        if !self.dry_run {
            before.networks = context.networks()?.prune()?;
            if self.volumes {
                for (name, bytes) in context.volumes()?.prune(self.all)? {
                    before.volumes.push(name);
                    before.bytes += bytes;
                }
            }
        }
        before.disks = kiln_machine::prune_disks(context.home(), self.dry_run)?.len() as u64;
        if self.all {
            let templates = kiln_machine::prune_templates(context.home(), self.dry_run)?;
            before.templates = templates.len() as u64;
            before.bytes += templates.iter().map(kiln_machine::Saved::size).sum::<u64>();
        }
        let collected = collect(context, &instances, self.all, self.dry_run)?;
        let all = Removed {
            instances: before.instances,
            networks: before.networks,
            volumes: before.volumes,
            disks: before.disks,
            templates: before.templates,
            bytes: before.bytes + collected.bytes,
            ..collected
        };
        all.print(self.format.format)?;
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
        images: report.images,
        layers: report.layers,
        objects: report.objects,
        blobs: report.blobs,
        renders: report.renders,
        bytes: report.bytes,
        dry_run,
        ..Default::default()
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
        let mut table = Table::new(["WHAT", if self.dry_run { "WOULD BE REMOVED" } else { "REMOVED" }]);
        for (what, names) in [
            ("instance", &self.instances),
            ("network", &self.networks),
            ("volume", &self.volumes),
            ("image", &self.images),
        ] {
            for name in names {
                table.row([what, name]);
            }
        }
        for (what, number) in [
            ("disks", self.disks),
            ("templates", self.templates),
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
        let mut out = crate::output::Out::new();
        out.table(&table)?;
        out.flush()
    }
}
