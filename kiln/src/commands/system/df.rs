//! `kiln system df`.

use kiln_contract::{BackendError, ByteSize, DiskId, DiskUsage, DisksUsage, InstanceRecord, RuntimeBackend};
use serde::Serialize;

use crate::context::Context;
use crate::error::Result;
use crate::exit::Exit;
use crate::output::{Format, FormatArgs, Out, Table, print_json};
use crate::usage::disk_usage;

/// Show what takes how much space, and how much is saved by sharing
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Each instance and each volume, too
    #[arg(short, long)]
    verbose: bool,
    #[command(flatten)]
    format: FormatArgs,
}

/// What takes how much space, as the JSON forms write it. Sizes are bytes.
#[derive(Debug, Serialize)]
struct Usage {
    /// How many images there are.
    images: u64,
    /// How many layers.
    layers: u64,
    /// How many different files.
    objects: u64,
    /// What the files take, each once.
    object_bytes: u64,
    /// What the images would take unpacked one by one.
    logical_bytes: u64,
    /// What layers, manifests and tags take.
    metadata_bytes: u64,
    /// What caches take, which can be removed at any time.
    render_bytes: u64,
    /// What instances wrote to their roots.
    instances: Vec<Named>,
    /// What is in volumes.
    volumes: Vec<Named>,
    /// The writable disks of machines.
    disks: Vec<Disk>,
    /// What they take together: what several of them share is counted once.
    disk_bytes: u64,
    /// Machines saved when their guest was ready.
    templates: Vec<Named>,
}

/// Something with a name and a size.
#[derive(Debug, Serialize)]
struct Named {
    /// Its name.
    name: String,
    /// Allocated bytes.
    bytes: u64,
}

/// A writable disk.
#[derive(Debug, Serialize)]
struct Disk {
    /// Its machine's name, or its own if it is no machine's.
    name: String,
    /// Its own name.
    id: String,
    /// What it takes by itself: what it shares with others is counted with each.
    bytes: u64,
    /// The size that the machine sees.
    logical_bytes: u64,
    /// What would be freed if only this disk were removed, with its snapshots.
    exclusive_bytes: u64,
    /// What other disks need as well.
    shared_bytes: u64,
}

impl Disk {
    fn new(id: &DiskId, usage: &DiskUsage, machines: &[InstanceRecord]) -> Self {
        let machine = machines.iter().find(|record| DiskId::from(&record.id) == *id);
        Self {
            name: machine.map_or_else(|| id.to_string(), |record| record.spec.name.clone()),
            id: id.to_string(),
            bytes: usage.exclusive + usage.shared,
            logical_bytes: usage.logical,
            exclusive_bytes: usage.exclusive,
            shared_bytes: usage.shared,
        }
    }
}

impl Args {
    pub(crate) fn run(self, context: &Context) -> Result<Exit> {
        let instances = context.instances()?;
        let stored = context.store()?.usage()?;
        let records = instances.list()?;
        let instances = records.iter().map(|record| Named {
            bytes: disk_usage(&context.home().instance(&record.id).upper()),
            name: record.spec.name.clone(),
        });
        let volumes = context.volumes()?.list()?;
        let volumes =
            volumes.into_iter().map(|volume| Named { bytes: disk_usage(&volume.path), name: volume.name });
        let (disks, templates) = if context.home().disks().exists() {
            let backend = kiln_disk::open(context.home(), &kiln_disk::Choice::Auto)
                .map_err(BackendError::from)?
                .backend;
            (backend.usage()?, kiln_machine::Templates::open(context.home(), &*backend).list()?)
        } else {
            (DisksUsage::default(), Vec::new())
        };
        let usage = Usage {
            disk_bytes: disks.taken,
            disks: disks.disks.iter().map(|(id, usage)| Disk::new(id, usage, &records)).collect(),
            templates: templates
                .iter()
                .map(|template| Named { name: template.record().key.short(), bytes: template.size() })
                .collect(),
            images: stored.images,
            layers: stored.layers,
            objects: stored.objects,
            object_bytes: stored.object_bytes,
            logical_bytes: stored.logical_bytes,
            metadata_bytes: stored.metadata_bytes,
            render_bytes: stored.render_bytes,
            instances: instances.collect(),
            volumes: volumes.collect(),
        };
        if self.format.format == Format::Table {
            self.print(&usage)?;
        } else {
            print_json(self.format.format, &usage)?;
        }
        Ok(Exit::SUCCESS)
    }

    fn print(&self, usage: &Usage) -> Result<()> {
        let mut out = Out::new();
        let size = |bytes| ByteSize(bytes).to_string();
        let sum = |all: &[Named]| all.iter().map(|one| one.bytes).sum::<u64>();
        let mut table = Table::new(["WHAT", "NUMBER", "SIZE", "NOTE"]).right("NUMBER").right("SIZE");
        let shared = usage.logical_bytes.saturating_sub(usage.object_bytes);
        let saved = match usage.logical_bytes {
            0 => String::new(),
            all => format!("would be {} unpacked one by one; {}% is shared", size(all), shared * 100 / all),
        };
        table.row(["Images".to_owned(), usage.images.to_string(), size(usage.object_bytes), saved]);
        let trees = format!("{} different files, trees and manifests", usage.objects);
        table.row(["Layers".to_owned(), usage.layers.to_string(), size(usage.metadata_bytes), trees]);
        let cache = "removed by `kiln system prune`, made again when needed".to_owned();
        table.row(["Caches".to_owned(), String::new(), size(usage.render_bytes), cache]);
        let (instances, volumes) = (&usage.instances, &usage.volumes);
        table.row([
            "Instances".to_owned(),
            instances.len().to_string(),
            size(sum(instances)),
            "what they wrote to their roots".to_owned(),
        ]);
        table.row(["Volumes".to_owned(), volumes.len().to_string(), size(sum(volumes)), String::new()]);
        let (disks, templates) = (&usage.disks, &usage.templates);
        let shared = "disks of machines; what they share is counted once".to_owned();
        table.row(["Disks".to_owned(), disks.len().to_string(), size(usage.disk_bytes), shared]);
        let made = "machines start from them; made again when needed".to_owned();
        table.row(["Templates".to_owned(), templates.len().to_string(), size(sum(templates)), made]);
        out.table(&table)?;
        let all = [("INSTANCE", instances), ("VOLUME", volumes), ("TEMPLATE", templates)];
        for (title, all) in all {
            if self.verbose && !all.is_empty() {
                let mut table = Table::new([title, "SIZE"]).right("SIZE");
                for one in all {
                    table.row([one.name.clone(), size(one.bytes)]);
                }
                out.line("")?;
                out.table(&table)?;
            }
        }
        if self.verbose && !disks.is_empty() {
            let mut table = Table::new(["DISK", "LOGICAL", "EXCLUSIVE", "SHARED"]);
            for right in ["LOGICAL", "EXCLUSIVE", "SHARED"] {
                table = table.right(right);
            }
            for disk in disks {
                let sizes = [disk.logical_bytes, disk.exclusive_bytes, disk.shared_bytes].map(size);
                let [logical, exclusive, shared] = sizes;
                table.row([disk.name.clone(), logical, exclusive, shared]);
            }
            out.line("")?;
            out.table(&table)?;
        }
        out.flush()
    }
}
