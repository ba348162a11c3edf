//! `kiln stats`.

use std::collections::HashMap;
use std::io::{self, IsTerminal};
use std::thread;
use std::time::{Duration, Instant};

use clap_complete::engine::ArgValueCompleter;
use kiln_contract::{ByteSize, InstanceId, InstanceRecord, InstanceStatus, RuntimeBackend, Stats};
use serde::Serialize;

use crate::backends::Backends;
use crate::complete;
use crate::context::Context;
use crate::error::Result;
use crate::exit::Exit;
use crate::output::{Format, FormatArgs, Out, Table, print_rows};

/// Show what instances use: processor, memory, network, disks, processes
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Names or ids; all that run otherwise
    #[arg(value_name = "INSTANCE", add = ArgValueCompleter::new(complete::instances))]
    instances: Vec<String>,
    /// Show one result instead of a table that goes on
    #[arg(long)]
    no_stream: bool,
    /// Ids in full
    #[arg(long)]
    no_trunc: bool,
    #[command(flatten)]
    format: FormatArgs,
}

/// What an instance uses, as the JSON forms write it.
#[derive(Debug, Serialize)]
struct Row {
    /// 64 hex digits.
    id: String,
    /// Its name.
    name: String,
    /// Processor time since the last sample, in percent of one processor.
    cpu_percent: f64,
    /// Of its limit, or of the host's memory.
    memory_percent: f64,
    #[serde(flatten)]
    stats: Stats,
}

/// Between two samples, and between two pictures.
const INTERVAL: Duration = Duration::from_secs(1);
/// The first sample needs another one before it; that one need not be so long ago.
const FIRST: Duration = Duration::from_millis(200);

type Samples = HashMap<InstanceId, (Instant, Duration)>;

impl Args {
    pub(crate) fn run(self, context: &Context) -> Result<Exit> {
        let instances = context.instances()?;
        let mut before = Samples::new();
        self.sample(context, &instances, &mut before)?;
        thread::sleep(FIRST);
        let live = !self.no_stream && self.format.format == Format::Table;
        loop {
            let rows = self.sample(context, &instances, &mut before)?;
            if live && io::stdout().is_terminal() {
                let mut out = Out::new();
                out.bytes(b"\x1b[H\x1b[J")?;
                out.flush()?;
            }
            print_rows(self.format.format, &rows, |rows| self.table(rows))?;
            if self.no_stream || (!self.instances.is_empty() && rows.is_empty()) {
                return Ok(Exit::SUCCESS);
            }
            thread::sleep(INTERVAL);
        }
    }

    fn sample(&self, context: &Context, instances: &Backends, before: &mut Samples) -> Result<Vec<Row>> {
        let records = if self.instances.is_empty() {
            instances.list()?
        } else {
            self.instances.iter().map(|name| context.instance(instances, name)).collect::<Result<Vec<_>>>()?
        };
        let running = |record: &InstanceRecord| {
            matches!(record.status, InstanceStatus::Running | InstanceStatus::Paused)
        };
        let mut rows = Vec::new();
        for record in records.into_iter().filter(running) {
            let stats = match instances.stats(&record.id) {
                Ok(stats) => stats,
                // It ended between the list and now: no row, as for the others that do not run.
                Err(_) if instances.find(record.id.as_str()).is_ok_and(|now| running(&now)).eq(&false) => {
                    continue;
                }
                Err(error) => return Err(error.into()),
            };
            let now = Instant::now();
            let last = before.insert(record.id.clone(), (now, stats.cpu));
            let cpu_percent =
                last.map_or(0.0, |(then, cpu)| percent(stats.cpu.saturating_sub(cpu), now - then));
            let memory = stats.memory_limit.filter(|limit| *limit > 0).unwrap_or_else(host_memory);
            let memory_percent = stats.memory as f64 * 100.0 / memory.max(1) as f64;
            let name = record.spec.name;
            rows.push(Row { id: record.id.to_string(), name, cpu_percent, memory_percent, stats });
        }
        Ok(rows)
    }

    fn table(&self, rows: &[Row]) -> Table {
        let mut table = Table::new([
            "ID",
            "NAME",
            "CPU %",
            "MEMORY / LIMIT",
            "MEM %",
            "NET IN / OUT",
            "BLOCK R / W",
            "PIDS",
        ])
        .right("CPU %")
        .right("MEM %")
        .right("PIDS");
        for row in rows {
            let stats = &row.stats;
            let limit = stats.memory_limit.unwrap_or_else(host_memory);
            let two = |a, b| format!("{} / {}", ByteSize(a), ByteSize(b));
            table.row([
                if self.no_trunc { row.id.clone() } else { row.id[..12].to_owned() },
                row.name.clone(),
                format!("{:.2}%", row.cpu_percent),
                two(stats.memory, limit),
                format!("{:.2}%", row.memory_percent),
                two(stats.network_received, stats.network_sent),
                two(stats.block_read, stats.block_written),
                stats.pids.to_string(),
            ]);
        }
        table
    }
}

fn percent(cpu: Duration, elapsed: Duration) -> f64 {
    if elapsed.is_zero() { 0.0 } else { cpu.as_secs_f64() * 100.0 / elapsed.as_secs_f64() }
}

/// The host's memory in bytes: the limit of those that have none.
fn host_memory() -> u64 {
    #[cfg(target_os = "linux")]
    {
        let info = rustix::system::sysinfo();
        info.totalram as u64 * u64::from(info.mem_unit)
    }
    #[cfg(not(target_os = "linux"))]
    {
        0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_busy_processors_are_200_percent() {
        assert_eq!(percent(Duration::from_secs(2), Duration::from_secs(1)), 200.0);
        assert_eq!(percent(Duration::from_secs(2), Duration::ZERO), 0.0);
    }
}
