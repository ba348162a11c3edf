//! Limits: `--memory`, `--memory-swap`, `--pids-limit`, `--ulimit`, `--cpuset-cpus`.

use kiln_contract::{ByteSize, Ulimit};

use super::{ResolveError, Result};

const ULIMITS: [&str; 16] = [
    "as",
    "core",
    "cpu",
    "data",
    "fsize",
    "locks",
    "memlock",
    "msgqueue",
    "nice",
    "nofile",
    "nproc",
    "rss",
    "rtprio",
    "rttime",
    "sigpending",
    "stack",
];

/// `name=soft[:hard]`; -1 and `unlimited` are no limit.
pub(crate) fn ulimit(text: &str) -> Result<Ulimit> {
    let bad = |why: String| ResolveError::value("--ulimit", text, why);
    let (name, limits) = text.split_once('=').ok_or_else(|| bad("it is name=soft[:hard]".into()))?;
    if !ULIMITS.contains(&name) {
        return Err(bad(format!("`{name}` is not a limit ({})", ULIMITS.join(", "))));
    }
    let one = |text: &str| match text {
        "-1" | "unlimited" => Ok(u64::MAX),
        _ => text.parse().map_err(|_| bad(format!("`{text}` is not a number"))),
    };
    let (soft, hard) = limits.split_once(':').unwrap_or((limits, limits));
    let (soft, hard) = (one(soft)?, one(hard)?);
    if soft > hard {
        return Err(bad("the soft limit is above the hard one".into()));
    }
    Ok(Ulimit { name: name.to_owned(), soft, hard })
}

/// What a container needs at the least to be made at all; Docker's limit too.
const LEAST_MEMORY: ByteSize = ByteSize(6 << 20);

/// `--memory`: 0 is no limit.
pub(crate) fn memory(memory: Option<ByteSize>) -> Result<Option<ByteSize>> {
    match memory {
        Some(ByteSize(0)) | None => Ok(None),
        Some(memory) if memory < LEAST_MEMORY => {
            let why = format!("a container needs {LEAST_MEMORY} at the least");
            Err(ResolveError::value("--memory", memory.to_string(), why))
        }
        enough => Ok(enough),
    }
}

/// `--memory-swap`: memory and swap together; -1 is no limit ([`u64::MAX`]), 0 is «not said».
pub(crate) fn memory_swap(memory: Option<ByteSize>, text: Option<&str>) -> Result<Option<ByteSize>> {
    let Some(text) = text else { return Ok(None) };
    if text == "-1" {
        return Ok(Some(ByteSize(u64::MAX)));
    }
    let bad = |why: String| ResolveError::value("--memory-swap", text, why);
    let swap: ByteSize = text.parse().map_err(|error| bad(format!("{error}, or -1")))?;
    match memory {
        _ if swap.bytes() == 0 => Ok(None),
        None => Err(bad("it needs --memory too".into())),
        Some(memory) if swap < memory => {
            Err(bad(format!("it is memory and swap together, and --memory is {memory}")))
        }
        Some(_) => Ok(Some(swap)),
    }
}

/// `--pids-limit`: 0 and -1 are no limit.
pub(crate) fn pids(limit: Option<i64>) -> Option<i64> {
    limit.filter(|limit| *limit > 0)
}

/// `--cpuset-cpus`: `0-2,4`.
pub(crate) fn cpuset(text: &str) -> Result<String> {
    let number = |text: &str| text.parse::<u16>().ok();
    let good = text.split(',').all(|part| match part.split_once('-') {
        Some((first, last)) => matches!((number(first), number(last)), (Some(a), Some(b)) if a <= b),
        None => number(part).is_some(),
    });
    let bad = || ResolveError::value("--cpuset-cpus", text, "it is a list of processors such as 0-2,4");
    if good { Ok(text.to_owned()) } else { Err(bad()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ulimits_read_as_docker_reads_them() {
        let table = [
            ("nofile=1024", Some((1024, 1024))),
            ("nofile=1024:2048", Some((1024, 2048))),
            ("core=-1", Some((u64::MAX, u64::MAX))),
            ("core=0:unlimited", Some((0, u64::MAX))),
            ("nofile=2:1", None),
            ("nofile", None),
            ("shoes=3", None),
            ("nofile=x", None),
        ];
        for (text, expected) in table {
            assert_eq!(ulimit(text).ok().map(|limit| (limit.soft, limit.hard)), expected, "{text}");
        }
    }

    #[test]
    fn less_memory_than_a_container_needs_is_refused() {
        assert_eq!(memory(None).unwrap(), None);
        assert_eq!(memory(Some(ByteSize(0))).unwrap(), None);
        assert_eq!(memory(Some(LEAST_MEMORY)).unwrap(), Some(LEAST_MEMORY));
        assert!(memory(Some(ByteSize(1024))).unwrap_err().to_string().contains("6.0 MiB"));
    }

    #[test]
    fn swap_is_with_memory_and_never_below_it() {
        let memory = Some(ByteSize(64 << 20));
        let table = [
            (memory, None, Some(None)),
            (memory, Some("128m"), Some(Some(ByteSize(128 << 20)))),
            (memory, Some("-1"), Some(Some(ByteSize(u64::MAX)))),
            (memory, Some("0"), Some(None)),
            (memory, Some("1m"), None),
            (None, Some("1m"), None),
            (memory, Some("x"), None),
        ];
        for (memory, text, expected) in table {
            assert_eq!(memory_swap(memory, text).ok(), expected, "{text:?}");
        }
    }

    #[test]
    fn cpusets_are_lists_of_processors() {
        for (text, good) in
            [("0", true), ("0-2,4", true), ("", false), ("2-0", false), ("a", false), ("0-", false)]
        {
            assert_eq!(cpuset(text).is_ok(), good, "{text}");
        }
        assert_eq!([pids(Some(-1)), pids(Some(0)), pids(Some(5)), pids(None)], [None, None, Some(5), None]);
    }
}
