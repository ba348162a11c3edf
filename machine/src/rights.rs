//! What a workload may do in its machine: all that root may, unless flags say less.
//!
//! The machine is the wall; what is in here is for workloads that want another one inside of it, as in a container.

use kiln_contract::{BackendError, ErrorKind, InstanceSpec, SecuritySpec};

/// Limits by their names, at Linux's numbers for x86-64 and aarch64 (`asm-generic/resource.h`). The host's own may be others.
const LIMITS: [&str; 16] = [
    "cpu",
    "fsize",
    "data",
    "stack",
    "core",
    "rss",
    "nproc",
    "nofile",
    "memlock",
    "as",
    "locks",
    "sigpending",
    "msgqueue",
    "nice",
    "rtprio",
    "rttime",
];

/// The capabilities of its processes, a bit each; `None` is all that the guest's kernel has.
///
/// # Errors
/// [`ErrorKind::Invalid`] for a name that is none.
pub(crate) fn capabilities(spec: &InstanceSpec) -> Result<Option<u64>, BackendError> {
    let all = SecuritySpec::ALL_CAPABILITIES;
    let asked = spec.security.capabilities(all);
    let asked = asked.map_err(|unknown| BackendError::new(ErrorKind::Invalid, unknown.to_string()))?;
    Ok((asked != all).then_some(asked))
}

/// The limits of its processes: number, soft, hard.
///
/// # Errors
/// [`ErrorKind::Invalid`] for a name that is none.
pub(crate) fn limits(spec: &InstanceSpec) -> Result<Vec<(u32, u64, u64)>, BackendError> {
    let limit = |limit: &kiln_contract::Ulimit| {
        let number = (0..).zip(LIMITS).find_map(|(number, name)| (name == limit.name).then_some(number));
        let number = number.ok_or_else(|| {
            let what = format!("`{}` is not a resource limit (getrlimit(2))", limit.name);
            BackendError::new(ErrorKind::Invalid, what)
        })?;
        Ok((number, limit.soft, limit.hard))
    };
    spec.resources.ulimits.iter().map(limit).collect()
}

/// Whether programs gain no privileges by set-user-id bits and file capabilities: if that is asked for.
pub(crate) fn no_new_privileges(spec: &InstanceSpec) -> bool {
    const WAYS: [&str; 3] = ["no-new-privileges", "no-new-privileges=true", "no-new-privileges:true"];
    spec.security.options.iter().any(|option| WAYS.contains(&option.as_str()))
}

#[cfg(test)]
mod tests {
    use kiln_contract::Ulimit;

    use super::*;

    #[test]
    fn a_workload_has_every_capability_that_flags_do_not_take() {
        let cases: [(&[&str], &[&str], Option<u64>); 5] = [
            (&[], &[], None),
            (&["NET_ADMIN"], &[], None),
            (&[], &["NET_RAW"], Some(0x1ff_ffff_ffff & !(1 << 13))),
            (&["chown"], &["ALL"], Some(1)),
            (&["ALL"], &["ALL"], None),
        ];
        let own = |names: &[&str]| names.iter().map(|&name| name.to_owned()).collect();
        for (add, drop, expected) in cases {
            let mut spec = kiln_fixtures::instance_spec("m");
            (spec.security.cap_add, spec.security.cap_drop) = (own(add), own(drop));
            assert_eq!(capabilities(&spec).unwrap(), expected, "+{add:?} -{drop:?}");
        }
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn limits_have_the_kernels_numbers() {
        let mut spec = kiln_fixtures::instance_spec("m");
        let one = |name: &str, soft, hard| Ulimit { name: name.to_owned(), soft, hard };
        spec.resources.ulimits =
            vec![one("nofile", 64, 128), one("core", 0, u64::MAX), one("rttime", 1, 1), one("nproc", 7, 7)];
        let expected = vec![
            (libc::RLIMIT_NOFILE, 64, 128),
            (libc::RLIMIT_CORE, 0, libc::RLIM_INFINITY),
            (libc::RLIMIT_RTTIME, 1, 1),
            (libc::RLIMIT_NPROC, 7, 7),
        ];
        assert_eq!(limits(&spec).unwrap(), expected);
        spec.resources.ulimits = vec![one("luck", 1, 1)];
        assert!(limits(&spec).unwrap_err().to_string().contains("`luck`"));
    }
}
