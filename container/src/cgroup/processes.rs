//! The processes of a container as `ps -ef` on the host shows them, and what its network has carried.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;

use jiff::{SignedDuration, Timestamp, tz::TimeZone};
use kiln_contract::ProcessTable;

use super::Cgroup;
use crate::runtime::RuntimeError;

/// Titles as procps-ng has them.
const TITLES: [&str; 8] = ["UID", "PID", "PPID", "C", "STIME", "TTY", "TIME", "CMD"];

/// The processes of a container: those of its cgroup, or else those of its PID namespace and the ones below.
///
/// # Errors
/// If `/proc` or the group cannot be read.
pub(crate) fn process_table(cgroup: Option<&Cgroup>, init: u32) -> Result<ProcessTable, RuntimeError> {
    let pids = match cgroup {
        Some(cgroup) => cgroup.processes()?,
        None => in_namespace_of(init)?,
    };
    let clock = Clock::read()?;
    let mut users = HashMap::new();
    // A process that has ended since is passed over.
    let rows = pids.into_iter().filter_map(|pid| row(pid, &clock, &mut users)).collect();
    Ok(ProcessTable { titles: TITLES.map(str::to_owned).to_vec(), rows })
}

/// All processes whose PID namespace is that of `init`, or, as far as they can be told, was made from within it.
fn in_namespace_of(init: u32) -> Result<Vec<u32>, RuntimeError> {
    let inode = |pid: u32| fs::metadata(format!("/proc/{pid}/ns/pid")).map(|namespace| namespace.ino());
    let path = format!("/proc/{init}/ns/pid");
    let wanted =
        inode(init).map_err(|source| RuntimeError::Io { doing: "read", path: path.into(), source })?;
    let entries = fs::read_dir("/proc").map_err(|source| RuntimeError::Io {
        doing: "list",
        path: "/proc".into(),
        source,
    })?;
    let mut pids: Vec<u32> = entries
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter(|pid| inode(*pid).is_ok_and(|inode| inode == wanted))
        .collect();
    pids.sort_unstable();
    Ok(pids)
}

/// What turns the kernel's ticks into times.
struct Clock {
    boot: Timestamp,
    now: Timestamp,
    ticks: u64,
}

impl Clock {
    fn read() -> Result<Self, RuntimeError> {
        let path = "/proc/stat";
        let text = fs::read_to_string(path).map_err(|source| RuntimeError::Io {
            doing: "read",
            path: path.into(),
            source,
        })?;
        let boot = text
            .lines()
            .find_map(|line| line.strip_prefix("btime ")?.trim().parse().ok())
            .and_then(|seconds| Timestamp::from_second(seconds).ok())
            .ok_or_else(|| {
                let source = io::Error::from(io::ErrorKind::InvalidData);
                RuntimeError::Io { doing: "find the time of boot in", path: path.into(), source }
            })?;
        Ok(Self { boot, now: Timestamp::now(), ticks: rustix::param::clock_ticks_per_second() })
    }

    /// As `ps` shows it: the time of today, the day of other days.
    fn start(&self, ticks: u64) -> (Timestamp, String) {
        let since_boot = SignedDuration::from_millis((ticks * 1000 / self.ticks).cast_signed());
        let start = self.boot.checked_add(since_boot).unwrap_or(self.boot);
        let zone = TimeZone::system();
        let (local, today) = (start.to_zoned(zone.clone()), self.now.to_zoned(zone));
        let format = if local.date() == today.date() { "%H:%M" } else { "%b%d" };
        (start, local.strftime(format).to_string())
    }
}

fn row(pid: u32, clock: &Clock, users: &mut HashMap<u32, String>) -> Option<Vec<String>> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let name = stat.get(stat.find('(')? + 1..stat.rfind(')')?)?;
    // Numbered from 3 on, as proc_pid_stat(5) does.
    let fields: Vec<&str> = stat.get(stat.rfind(')')? + 1..)?.split_whitespace().collect();
    let field = |number: usize| fields.get(number - 3)?.parse::<u64>().ok();
    let parent = field(4)?;
    let used = field(14)? + field(15)?;
    let (start, started) = clock.start(field(22)?);
    let terminal = field(7)?;
    let uid = fs::metadata(format!("/proc/{pid}")).ok()?.uid();
    let user = users.entry(uid).or_insert_with(|| user_name(uid)).clone();
    let command = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let command = command.strip_suffix(b"\0").unwrap_or(&command);
    let command = if command.is_empty() {
        format!("[{name}]")
    } else {
        String::from_utf8_lossy(command).replace('\0', " ")
    };
    let seconds = used / clock.ticks;
    let lived = clock.now.duration_since(start).as_secs().max(1).cast_unsigned();
    Some(vec![
        user,
        pid.to_string(),
        parent.to_string(),
        (seconds * 100 / lived).min(99).to_string(),
        started,
        terminal_name(terminal),
        format!("{:02}:{:02}:{:02}", seconds / 3600, seconds / 60 % 60, seconds % 60),
        command,
    ])
}

/// `tty_nr` of `proc_pid_stat(5)` as a name.
fn terminal_name(number: u64) -> String {
    let major = number >> 8 & 0xfff;
    let minor = number & 0xff | number >> 12 & 0xfff00;
    match major {
        0 => "?".into(),
        136..=143 => format!("pts/{}", (major - 136) * 256 + minor),
        4 if minor < 64 => format!("tty{minor}"),
        4 => format!("ttyS{}", minor - 64),
        _ => format!("{major}:{minor}"),
    }
}

/// The host's name for a user, from its own file: a lookup over the network is not worth it in a table.
fn user_name(uid: u32) -> String {
    let passwd = fs::read_to_string("/etc/passwd").unwrap_or_default();
    passwd
        .lines()
        .find_map(|line| {
            let mut fields = line.split(':');
            let name = fields.next()?;
            (fields.nth(1)?.parse() == Ok(uid)).then(|| name.to_owned())
        })
        .unwrap_or_else(|| uid.to_string())
}

/// Bytes received and sent by all interfaces but `lo` of the network namespace of `pid`.
///
/// # Errors
/// If there is no such process.
pub(crate) fn network_bytes(pid: u32) -> Result<(u64, u64), RuntimeError> {
    let path = format!("/proc/{pid}/net/dev");
    let text = fs::read_to_string(&path).map_err(|source| RuntimeError::Io {
        doing: "read",
        path: path.into(),
        source,
    })?;
    Ok(sum_interfaces(&text))
}

fn sum_interfaces(text: &str) -> (u64, u64) {
    text.lines()
        .filter_map(|line| line.split_once(':'))
        .filter(|(name, _)| name.trim() != "lo")
        .filter_map(|(_, counters)| {
            let mut counters = counters.split_whitespace().map(str::parse::<u64>);
            Some((counters.next()?.ok()?, counters.nth(7)?.ok()?))
        })
        .fold((0, 0), |(received, sent), (r, s)| (received + r, sent + s))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn interfaces_other_than_loopback_are_summed() {
        let text = "Inter-|   Receive  |  Transmit\n face |bytes packets|bytes\n    \
            lo: 99 1 0 0 0 0 0 0 99 1 0 0 0 0 0 0\n  eth0: 10 1 0 0 0 0 0 0 20 1 0 0 0 0 0 0\n  \
            eth1:1 1 0 0 0 0 0 0 2 1 0 0 0 0 0 0\n";
        assert_eq!(sum_interfaces(text), (11, 22));
    }

    #[test]
    fn terminals_have_the_names_that_ps_gives_them() {
        for (number, name) in
            [(0, "?"), (136 << 8 | 3, "pts/3"), (4 << 8 | 1, "tty1"), (4 << 8 | 65, "ttyS1")]
        {
            assert_eq!(terminal_name(number), name);
        }
    }

    #[test]
    fn this_process_is_in_its_own_table() {
        let pid = std::process::id();
        let table = process_table(None, pid).unwrap();
        let row = table.rows.iter().find(|row| row[1] == pid.to_string()).unwrap();
        assert_eq!(row.len(), table.titles.len());
        assert!(row[7].starts_with(&std::env::args().next().unwrap()), "{row:?}");
    }
}
