//! Whether a machine fits on this host: asked before anything of it is made.

use std::fs;

use kiln_contract::{BackendError, ByteSize, ErrorKind, InstanceSpec};

use crate::{Shape, plan};

/// Memory that must be there for a start: what a machine touches until its workload runs, and room for the host.
const LEAST: u64 = 96 << 20;
/// Of its memory, the part that must be there: machines share most of what they have, and seldom use all of it.
const PART: u64 = 4;

/// What the host has, in bytes.
#[derive(Debug, Clone, Copy)]
struct Host {
    /// Memory.
    total: u64,
    /// Memory that can be had without swapping others out.
    available: u64,
    /// Processors that this process may use.
    processors: u32,
}

impl Host {
    /// `None` where it cannot be told.
    fn look() -> Option<Self> {
        // `proc_meminfo(5)`: kibibytes.
        let text = fs::read_to_string("/proc/meminfo").ok()?;
        let find = |name: &str| {
            let line = text.lines().find(|line| line.starts_with(name))?;
            line.split_whitespace().nth(1)?.parse::<u64>().ok().map(|kib| kib * 1024)
        };
        let processors = std::thread::available_parallelism().ok()?.get();
        Some(Self {
            total: find("MemTotal:")?,
            available: find("MemAvailable:")?,
            processors: u32::try_from(processors).unwrap_or(u32::MAX),
        })
    }
}

/// Refuses a machine that cannot run here, or not now.
///
/// # Errors
/// [`ErrorKind::Invalid`] for more than the host has at all, [`ErrorKind::State`] for more than it has now.
pub(crate) fn check(spec: &InstanceSpec) -> Result<(), BackendError> {
    match Host::look() {
        Some(host) => fits(spec, host),
        None => Ok(()),
    }
}

/// Whether a machine that nobody has asked for may be made: there is room for it and for one that is.
pub(crate) fn has_room(shape: Shape) -> bool {
    Host::look().is_none_or(|host| host.available / 2 >= needed(shape))
}

/// What must be there for a start, in bytes.
fn needed(shape: Shape) -> u64 {
    (shape.memory / PART).max(LEAST)
}

fn fits(spec: &InstanceSpec, host: Host) -> Result<(), BackendError> {
    let (name, shape) = (&spec.name, plan::shape(spec)?);
    let size = |bytes| ByteSize(bytes).to_string();
    if shape.memory > host.total {
        return Err(BackendError::new(
            ErrorKind::Invalid,
            format!(
                "machine {name} does not fit: it wants {} of memory, and this host has {}",
                size(shape.memory),
                size(host.total)
            ),
        )
        .hint("give it less with --memory"));
    }
    if shape.cpus > host.processors {
        return Err(BackendError::new(
            ErrorKind::Invalid,
            format!(
                "machine {name} does not fit: it wants {} processors, and this host has {}",
                shape.cpus, host.processors
            ),
        )
        .hint("give it fewer with --cpus"));
    }
    let needed = needed(shape);
    if host.available < needed {
        return Err(BackendError::new(
            ErrorKind::State,
            format!(
                "machine {name} does not fit now: a machine of {} needs {} of memory to begin with, and {} are available",
                size(shape.memory),
                size(needed),
                size(host.available)
            ),
        )
        .hint("stop something else, or give it less with --memory"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use kiln_contract::CpuLimit;
    use kiln_fixtures::instance_spec;

    #[test]
    fn what_does_not_fit_is_refused_and_it_is_said_why() {
        let host = Host { total: 8 << 30, available: 1 << 30, processors: 4 };
        let crowded = Host { available: 100 << 20, ..host };
        let table = [
            (512_u64 << 20, 1, host, None),
            (8 << 30, 1, Host { available: 3 << 30, ..host }, None),
            (16 << 30, 1, host, Some("16.0 GiB of memory, and this host has 8.0 GiB")),
            (512 << 20, 5, host, Some("5 processors, and this host has 4")),
            (8 << 30, 1, host, Some("needs 2.0 GiB of memory to begin with, and 1.0 GiB are available")),
            (256 << 20, 1, crowded, None),
            (512 << 20, 1, crowded, Some("needs 128.0 MiB")),
        ];
        for (memory, cpus, host, refused) in table {
            let mut spec = instance_spec("dev");
            spec.resources.memory = Some(ByteSize(memory));
            spec.resources.cpus = Some(CpuLimit { millis: cpus * 1000 });
            match (fits(&spec, host), refused) {
                (Ok(()), None) => {}
                (Err(error), Some(words)) => assert!(error.to_string().contains(words), "{error}"),
                (outcome, _) => panic!("{memory} {cpus} {host:?}: {outcome:?}"),
            }
        }
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn this_host_is_looked_at() {
        let host = Host::look().unwrap();
        assert!(host.total >= host.available && host.available > 0 && host.processors > 0, "{host:?}");
    }
}
