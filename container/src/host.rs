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

/// Whether this process's user namespace maps a user or group number.
pub(crate) fn maps(kind: Id, number: u32) -> bool {
    let path = match kind {
        Id::User => "/proc/self/uid_map",
        Id::Group => "/proc/self/gid_map",
    };
    // What cannot be told is left to the kernel.
    fs::read_to_string(path).map_or(true, |map| is_in(&map, number))
}

/// What a number stands for.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Id {
    User,
    Group,
}

/// By lines of `inside outside count` (user_namespaces(7)).
fn is_in(map: &str, number: u32) -> bool {
    map.lines().any(|line| {
        let mut numbers = line.split_whitespace().map(|word| word.parse::<u64>().unwrap_or(0));
        let (Some(inside), Some(count)) = (numbers.next(), numbers.nth(1)) else { return false };
        (inside..inside + count).contains(&number.into())
    })
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_found_in_maps() {
        let map = "         0       1000          1\n         1     100000      65536\n";
        let table = [(0, true), (1, true), (65536, true), (65537, false), (u32::MAX, false)];
        for (number, mapped) in table {
            assert_eq!(is_in(map, number), mapped, "{number}");
        }
        assert!(is_in("0 0 4294967295", u32::MAX - 1) && !is_in("", 0) && !is_in("nonsense", 0));
    }
}
