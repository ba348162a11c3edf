//! What a control group has counted.

use std::fs;
use std::path::Path;
use std::time::Duration;

use kiln_contract::Stats;

use super::Cgroup;
use super::hierarchies::{Hierarchies, v1_directory, v2_directory};
use crate::runtime::RuntimeError;

/// Limits from here on are the kernel's way of saying «none» (v1: the largest multiple of a page).
const NO_LIMIT: u64 = 1 << 62;

/// Reads what is there; what the host does not count is 0.
pub(super) fn read(cgroup: &Cgroup) -> Result<Stats, RuntimeError> {
    if !cgroup.directory().exists() {
        let source = std::io::ErrorKind::NotFound.into();
        return Err(RuntimeError::Io { doing: "measure", path: cgroup.directory(), source });
    }
    Ok(match cgroup.hierarchies {
        Hierarchies::V2 => read_v2(&v2_directory(cgroup.path())),
        _ => read_v1(cgroup.path()),
    })
}

fn number(path: &Path) -> Option<u64> {
    fs::read_to_string(path).ok()?.trim().parse().ok()
}

fn limit(path: &Path) -> Option<u64> {
    number(path).filter(|limit| *limit < NO_LIMIT)
}

/// The value of the line `key value`.
fn keyed(text: &str, key: &str) -> u64 {
    text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(' ')?.trim().parse().ok()).unwrap_or(0)
}

fn read_v1(group: &str) -> Stats {
    let file = |controller: &str, name: &str| v1_directory(controller, group).join(name);
    let text = |controller: &str, name: &str| fs::read_to_string(file(controller, name)).unwrap_or_default();
    let inactive = keyed(&text("memory", "memory.stat"), "total_inactive_file");
    let blocks = text("blkio", "blkio.throttle.io_service_bytes_recursive");
    let (block_read, block_written) = v1_blocks(&blocks);
    Stats {
        cpu: Duration::from_nanos(number(&file("cpuacct", "cpuacct.usage")).unwrap_or(0)),
        memory: number(&file("memory", "memory.usage_in_bytes")).unwrap_or(0).saturating_sub(inactive),
        memory_limit: limit(&file("memory", "memory.limit_in_bytes")),
        pids: number(&file("pids", "pids.current")).unwrap_or(0),
        pids_limit: limit(&file("pids", "pids.max")),
        block_read,
        block_written,
        ..Stats::default()
    }
}

/// Sums lines such as `8:0 Read 4096`.
fn v1_blocks(text: &str) -> (u64, u64) {
    let sum = |kind: &str| {
        text.lines()
            .filter_map(|line| {
                let mut words = line.split_whitespace().skip(1);
                (words.next()? == kind).then(|| words.next()?.parse::<u64>().ok())?
            })
            .sum()
    };
    (sum("Read"), sum("Write"))
}

fn read_v2(directory: &Path) -> Stats {
    let text = |name: &str| fs::read_to_string(directory.join(name)).unwrap_or_default();
    let inactive = keyed(&text("memory.stat"), "inactive_file");
    let (block_read, block_written) = v2_blocks(&text("io.stat"));
    Stats {
        cpu: Duration::from_micros(keyed(&text("cpu.stat"), "usage_usec")),
        memory: number(&directory.join("memory.current")).unwrap_or(0).saturating_sub(inactive),
        memory_limit: limit(&directory.join("memory.max")),
        pids: number(&directory.join("pids.current")).unwrap_or(0),
        pids_limit: limit(&directory.join("pids.max")),
        block_read,
        block_written,
        ..Stats::default()
    }
}

/// Sums lines such as `8:0 rbytes=4096 wbytes=0 rios=1 wios=0`.
fn v2_blocks(text: &str) -> (u64, u64) {
    let sum = |key: &str| {
        text.split_whitespace()
            .filter_map(|word| word.strip_prefix(key)?.strip_prefix('=')?.parse::<u64>().ok())
            .sum()
    };
    (sum("rbytes"), sum("wbytes"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn block_counters_of_both_versions_are_summed_over_devices() {
        let v1 = "8:0 Read 100\n8:0 Write 7\n8:0 Sync 1\n8:16 Read 20\n8:0 Total 107\nTotal 127\n";
        assert_eq!(v1_blocks(v1), (120, 7));
        let v2 = "8:0 rbytes=100 wbytes=7 rios=1 wios=1 dbytes=0 dios=0\n8:16 rbytes=20 wbytes=0\n";
        assert_eq!(v2_blocks(v2), (120, 7));
    }

    #[test]
    fn keyed_lines_match_whole_keys_only() {
        assert_eq!(keyed("total_inactive_file 9\ninactive_file 5\n", "inactive_file"), 5);
        assert_eq!(keyed("usage_usec x\n", "usage_usec"), 0);
    }
}
