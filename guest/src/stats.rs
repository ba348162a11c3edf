//! What the machine uses, as its kernel counts it.

use std::fs;

use kiln_link::message::Stats;

use crate::agent::Machine;
use crate::failure::{Doing as _, Failure};

/// Measures.
pub(crate) fn measure(machine: &Machine) -> Result<Stats, Failure> {
    let memory = read("/proc/meminfo")?;
    let memory = |name: &str| {
        let line = memory.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        number(line.unwrap_or_default().trim().trim_end_matches(" kB")) * 1024
    };
    let (cpu, tasks) = machine.workload.usage();
    let (received, sent) = network();
    let (read, written) = disks();
    let guest = ["1", "self"].iter().map(|process| resident(process)).sum();
    let (total, available) = (memory("MemTotal"), memory("MemAvailable"));
    Ok(Stats {
        cpu,
        memory: total.saturating_sub(available),
        memory_total: total,
        tasks,
        received,
        sent,
        read,
        written,
        guest,
    })
}

fn read(path: &str) -> Result<String, Failure> {
    fs::read_to_string(path).doing(format_args!("read {path}"))
}

fn number(text: &str) -> u64 {
    text.trim().parse().unwrap_or(0)
}

/// Bytes received and sent by all interfaces but loopback.
fn network() -> (u64, u64) {
    let text = fs::read_to_string("/proc/net/dev").unwrap_or_default();
    text.lines().filter_map(|line| line.trim().split_once(':')).filter(|(name, _)| *name != "lo").fold(
        (0, 0),
        |(received, sent), (_, counts)| {
            let mut counts = counts.split_whitespace();
            (received + counts.next().map_or(0, number), sent + counts.nth(7).map_or(0, number))
        },
    )
}

/// Bytes read from and written to the virtual disks (`Documentation/admin-guide/iostats.rst`: sectors of 512 bytes).
fn disks() -> (u64, u64) {
    let text = fs::read_to_string("/proc/diskstats").unwrap_or_default();
    text.lines().fold((0, 0), |(read, written), line| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        match fields[..] {
            [_, _, name, _, _, sectors_read, _, _, _, sectors_written, ..] if name.starts_with("vd") => {
                (read + number(sectors_read) * 512, written + number(sectors_written) * 512)
            }
            _ => (read, written),
        }
    })
}

/// Resident bytes of a process of this program that it does not share.
fn resident(process: &str) -> u64 {
    let text = fs::read_to_string(format!("/proc/{process}/smaps_rollup")).unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("Pss:"));
    number(line.unwrap_or_default().trim().trim_end_matches(" kB")) * 1024
}

/// A title row, then a row a process of the workload.
pub(crate) fn processes() -> Result<Vec<Vec<String>>, Failure> {
    let mut rows = vec![["UID", "PID", "PPID", "STATE", "TIME", "CMD"].map(str::to_owned).to_vec()];
    // Ticks are hundredths of a second to user space on every architecture that machines run on.
    let ticks = 100;
    for entry in fs::read_dir("/proc").doing("list the processes")?.flatten() {
        let Some(pid) =
            entry.file_name().to_str().filter(|name| name.parse::<u32>().is_ok()).map(str::to_owned)
        else {
            continue;
        };
        // A process may end while it is looked at.
        let Some(row) = row(&pid, ticks) else { continue };
        rows.push(row);
    }
    rows[1..].sort_by_key(|row| row[1].parse::<u32>().unwrap_or(0));
    Ok(rows)
}

fn row(pid: &str, ticks: u64) -> Option<Vec<String>> {
    let command = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
    // Threads of the kernel have none; the guest's own two are not the workload's.
    if command.is_empty() || command.starts_with(b"@kiln-guest\0") || command.starts_with(b"/init\0") {
        return None;
    }
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (_, after_name) = stat.rsplit_once(") ")?;
    let fields: Vec<&str> = after_name.split(' ').collect();
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let uid =
        status.lines().find_map(|line| line.strip_prefix("Uid:"))?.split_whitespace().next()?.to_owned();
    let seconds = (number(fields.get(11)?) + number(fields.get(12)?)) / ticks;
    let time = format!("{:02}:{:02}:{:02}", seconds / 3600, seconds / 60 % 60, seconds % 60);
    let words: Vec<_> = command
        .split(|byte| *byte == 0)
        .filter(|word| !word.is_empty())
        .map(String::from_utf8_lossy)
        .collect();
    Some(vec![
        uid,
        pid.to_owned(),
        (*fields.get(1)?).to_owned(),
        (*fields.first()?).to_owned(),
        time,
        words.join(" "),
    ])
}
