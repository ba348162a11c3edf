//! `kiln ps`.

use std::collections::BTreeMap;
use std::net::IpAddr;

use jiff::Timestamp;
use kiln_contract::{
    ByteSize, HealthState, InstanceRecord, InstanceStatus, Isolation, PublishSpec, RuntimeBackend,
};
use kiln_store::{ImageName, Store};
use serde::Serialize;

use crate::context::Context;
use crate::error::Result;
use crate::exit::Exit;
use crate::output::{Filters, FormatArgs, Out, Table, clip, print_rows};
use crate::resolve::{ago, show_ports, span};

/// List instances: those that run, or all of them
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Those that do not run, too
    #[arg(short, long)]
    all: bool,
    /// Only what fits: name, id, status, label, ancestor, health, exited, network, volume
    #[arg(short, long, value_name = "KEY=VALUE")]
    filter: Vec<String>,
    /// Only the newest so many, running or not
    #[arg(short = 'n', long, value_name = "NUMBER")]
    last: Option<usize>,
    /// Only the newest one, running or not
    #[arg(short, long, conflicts_with = "last")]
    latest: bool,
    /// Ids and commands in full
    #[arg(long)]
    no_trunc: bool,
    /// Only ids
    #[arg(short, long)]
    quiet: bool,
    /// How much each wrote to its root, too
    #[arg(short, long)]
    size: bool,
    #[command(flatten)]
    format: FormatArgs,
}

const FILTERS: [&str; 9] =
    ["name", "id", "status", "label", "ancestor", "health", "exited", "network", "volume"];

/// An instance as the JSON forms write it.
#[derive(Debug, Serialize)]
struct Row {
    /// 64 hex digits.
    id: String,
    /// Its name.
    name: String,
    /// The image as it was named.
    image: String,
    /// `sha256:…`, the digest of the image's config.
    image_id: String,
    /// The command and its arguments.
    command: Vec<String>,
    /// When it was made (RFC 3339).
    created: Timestamp,
    /// When it was last started.
    started: Option<Timestamp>,
    /// `created`, `running`, `paused`, `restarting`, `exited`.
    status: InstanceStatus,
    /// How it ended, if it did: 0 to 255.
    exit_code: Option<u8>,
    /// `starting`, `healthy`, `unhealthy`.
    health: Option<HealthState>,
    /// `container` or `machine`.
    isolation: Isolation,
    /// The number of its first process on the host.
    pid: Option<u32>,
    /// What it is connected to.
    network: String,
    /// Its addresses.
    addresses: Vec<IpAddr>,
    /// Its published ports.
    ports: Vec<PublishSpec>,
    /// Its labels.
    labels: BTreeMap<String, String>,
    /// Bytes that it wrote to its root, with `--size`.
    #[serde(skip_serializing_if = "Option::is_none")]
    size: Option<u64>,
    #[serde(skip)]
    state: String,
}

impl Args {
    pub(crate) fn run(self, context: &Context) -> Result<Exit> {
        let filters = Filters::parse(&self.filter, &FILTERS)?;
        let instances = context.instances()?;
        let mut records = instances.list()?;
        records.sort_by_key(|record| std::cmp::Reverse(record.created));
        let last = if self.latest { Some(1) } else { self.last };
        // As in Docker: a filter by state, or a number, means that those that do not run are asked for too.
        let all = self.all
            || last.is_some()
            || ["status", "exited"].iter().any(|key| filters.values(key).next().is_some());
        let ancestors = Ancestors::new(context, &filters)?;
        records.retain(|record| (all || runs(record.status)) && fits(record, &filters));
        records.retain(|record| ancestors.as_ref().is_none_or(|ancestors| ancestors.fits(record)));
        records.truncate(last.unwrap_or(usize::MAX));
        if self.quiet {
            let mut out = Out::new();
            for record in &records {
                out.line(if self.no_trunc { record.id.as_str() } else { record.id.short() })?;
            }
            out.flush()?;
            return Ok(Exit::SUCCESS);
        }
        let now = Timestamp::now();
        let size = |record: &InstanceRecord| {
            self.size.then(|| crate::usage::disk_usage(&context.home().instance(&record.id).upper()))
        };
        let rows: Vec<Row> = records.into_iter().map(|record| row(size(&record), record, now)).collect();
        print_rows(self.format.format, &rows, |rows| self.table(rows, now))?;
        Ok(Exit::SUCCESS)
    }

    fn table(&self, rows: &[Row], now: Timestamp) -> Table {
        let mut titles = vec!["ID", "NAME", "IMAGE", "COMMAND", "CREATED", "STATUS", "PORTS"];
        if self.size {
            titles.push("SIZE");
        }
        let mut table = Table::new(titles).right("SIZE");
        for row in rows {
            let command = row.command.join(" ");
            let mut cells = if self.no_trunc {
                vec![row.id.clone(), row.name.clone(), row.image.clone(), command]
            } else {
                vec![row.id[..12].to_owned(), row.name.clone(), clip(&row.image, 40), clip(&command, 30)]
            };
            cells.extend([ago(row.created, now), row.state.clone(), show_ports(&row.ports)]);
            cells.extend(row.size.map(|size| ByteSize(size).to_string()));
            table.row(cells);
        }
        table
    }
}

fn runs(status: InstanceStatus) -> bool {
    matches!(status, InstanceStatus::Running | InstanceStatus::Paused | InstanceStatus::Restarting)
}

fn fits(record: &InstanceRecord, filters: &Filters) -> bool {
    let spec = &record.spec;
    let health = record.health.as_ref().map_or("none".to_owned(), |health| word(health.state));
    filters.any("name", |part| spec.name.contains(part))
        && filters.any("id", |start| record.id.as_str().starts_with(start))
        && filters.any("status", |status| record.status.to_string() == status)
        && filters.any("health", |state| health == state)
        && filters.any("network", |network| spec.network.mode == network)
        && filters.any("volume", |volume| uses_volume(record, volume))
        && filters.any("exited", |code| {
            record.status == InstanceStatus::Exited
                && record.exit.as_ref().is_some_and(|exit| exit.code.to_string() == code)
        })
        && filters.labels(&spec.labels)
}

fn uses_volume(record: &InstanceRecord, wanted: &str) -> bool {
    record.volumes.iter().any(|name| name == wanted)
        || record.spec.mounts.iter().any(|mount| {
            mount.target == wanted
                || matches!(&mount.kind, kiln_contract::MountKind::Volume { name: Some(name), .. } if name == wanted)
        })
}

fn word(state: HealthState) -> String {
    match state {
        HealthState::Starting => "starting",
        HealthState::Healthy => "healthy",
        HealthState::Unhealthy => "unhealthy",
    }
    .to_owned()
}

/// `ancestor=IMAGE`: instances of an image, by its name or its id.
struct Ancestors {
    names: Vec<String>,
    ids: Vec<kiln_contract::Digest>,
}

impl Ancestors {
    fn new(context: &Context, filters: &Filters) -> Result<Option<Self>> {
        let names: Vec<String> = filters.values("ancestor").map(str::to_owned).collect();
        if names.is_empty() {
            return Ok(None);
        }
        let store: Store = context.store()?;
        let ids = names.iter().filter_map(|name| store.resolve(name).ok()).map(|image| image.id).collect();
        Ok(Some(Self { names, ids }))
    }
}

impl Ancestors {
    fn fits(&self, record: &InstanceRecord) -> bool {
        let familiar = |name: &str| ImageName::parse(name).map(|name| name.familiar()).ok();
        let named = familiar(&record.spec.image);
        self.ids.contains(&record.spec.image_id)
            || named
                .is_some_and(|named| self.names.iter().any(|name| familiar(name).as_ref() == Some(&named)))
    }
}

fn row(size: Option<u64>, record: InstanceRecord, now: Timestamp) -> Row {
    let state = state(&record, now);
    let alive = runs(record.status);
    let ports = if alive && !record.ports.is_empty() { record.ports } else { record.spec.ports.clone() };
    Row {
        state,
        id: record.id.to_string(),
        name: record.spec.name,
        image: record.spec.image,
        image_id: record.spec.image_id.to_string(),
        command: record.spec.process.args,
        created: record.created,
        started: record.started,
        status: record.status,
        exit_code: record.exit.filter(|_| !alive).map(|exit| exit.code),
        health: record.health.filter(|_| alive).map(|health| health.state),
        isolation: record.spec.isolation,
        pid: record.process.filter(|_| alive).map(|process| process.pid),
        network: record.spec.network.mode,
        addresses: record.addresses,
        ports,
        labels: record.spec.labels,
        size,
    }
}

/// As tables say it: `Up 3 minutes (healthy)`, `Exited (1) 2 hours ago`.
fn state(record: &InstanceRecord, now: Timestamp) -> String {
    let code = record.exit.as_ref().map_or(0, |exit| exit.code);
    let when = |time: Option<Timestamp>| time.map_or(String::new(), |time| format!(" {}", ago(time, now)));
    let up = || format!("Up {}", record.started.map_or_else(|| "?".to_owned(), |time| span(time, now)));
    match record.status {
        InstanceStatus::Created => "Created".to_owned(),
        InstanceStatus::Running => match &record.health {
            Some(health) => format!("{} ({})", up(), word(health.state)),
            None => up(),
        },
        InstanceStatus::Paused => format!("{} (paused)", up()),
        InstanceStatus::Restarting => {
            format!("Restarting ({code}){}", when(record.exit.as_ref().map(|exit| exit.at)))
        }
        InstanceStatus::Exited => {
            format!("Exited ({code}){}", when(record.exit.as_ref().map(|exit| exit.at)))
        }
    }
}
