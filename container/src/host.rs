//! What this process is on this host.

use std::fs;

/// Whether this process is root of the host's own user namespace.
pub(crate) fn is_host_root() -> bool {
    rustix::process::geteuid().is_root() && !in_user_namespace()
}

/// Whether this process is in a user namespace other than the host's own, which alone maps every number to itself.
pub(crate) fn in_user_namespace() -> bool {
    fs::read_to_string("/proc/self/uid_map")
        .is_ok_and(|map| map.split_whitespace().ne(["0", "0", "4294967295"]))
}

/// How many group numbers from 0 on, without a gap, this process's user namespace maps.
pub(crate) fn mapped_groups() -> u32 {
    let map = fs::read_to_string("/proc/self/gid_map").unwrap_or_default();
    let mut extents: Vec<(u64, u64)> = map
        .lines()
        .filter_map(|line| {
            let mut numbers = line.split_whitespace().map(str::parse);
            let inside = numbers.next()?.ok()?;
            Some((inside, numbers.nth(1)?.ok()?))
        })
        .collect();
    extents.sort_unstable();
    let mut next = 0;
    for (inside, count) in extents {
        if inside > next {
            break;
        }
        next = next.max(inside + count);
    }
    u32::try_from(next).unwrap_or(u32::MAX)
}

/// The process `pid`, told from later ones with that number; `None` if there is none.
pub(crate) fn process_id(pid: u32) -> Option<kiln_contract::ProcessId> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // Field 22; the name, field 2, may hold anything, brackets too.
    let start = stat.rsplit_once(") ")?.1.split_whitespace().nth(19)?.parse().ok()?;
    Some(kiln_contract::ProcessId { pid, start })
}
