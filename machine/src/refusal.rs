//! What machines do not have, refused before anything is made: a flag that does nothing would be a false promise.

use kiln_contract::{BackendError, ErrorKind, InstanceSpec, RuntimeChoice};

use crate::{plan, rights};

/// Refuses what a machine cannot have.
///
/// # Errors
/// [`ErrorKind::Unsupported`] names the flag; [`ErrorKind::Invalid`] for a value that is none.
pub(crate) fn check(spec: &InstanceSpec) -> Result<(), BackendError> {
    plan::shape(spec)?;
    rights::capabilities(spec)?;
    rights::limits(spec)?;
    let refuse = |what: &str| Err(BackendError::unsupported(format!("a machine cannot have {what}")));
    let hinted = |what: &str, hint: &str| refuse(what).map_err(|error| error.hint(hint));
    let (security, resources) = (&spec.security, &spec.resources);
    if !security.devices.is_empty() {
        return refuse("devices of the host (--device)");
    }
    if security.options.iter().any(|option| option.starts_with("seccomp=") && option != "seccomp=unconfined")
    {
        return refuse("a filter of system calls (--security-opt seccomp=FILE): its kernel is its own");
    }
    if resources.cpuset.is_some() {
        return hinted(
            "processors of the host chosen for it (--cpuset-cpus)",
            "give it a number with --cpus",
        );
    }
    if resources.cpu_shares.is_some() {
        return hinted("a weight of processor time (--cpu-shares)", "give it a number with --cpus");
    }
    if resources.memory_swap.is_some() {
        return hinted("swap (--memory-swap)", "give it memory with --memory: the host may swap that");
    }
    if resources.pids.is_some() {
        return hinted(
            "a limit of all its processes (--pids-limit)",
            "--ulimit nproc=NUMBER limits those of each user but root",
        );
    }
    if let RuntimeChoice::External(_) = spec.runtime {
        return hinted("an OCI runtime (--runtime)", "--hypervisor chooses what runs it");
    }
    check_system(spec)?;
    let mode = spec.network.mode.as_str();
    if matches!(mode, "host" | "pasta") || mode.starts_with("container:") {
        return refuse(&format!("the network `{mode}`"));
    }
    if plan::network_of(spec).is_none() && spec.network.address.is_some() {
        return refuse("a fixed address (--ip) without a network that was made (kiln network create)");
    }
    if !spec.ports.is_empty() && spec.network.mode == "none" {
        return refuse("published ports without a network");
    }
    Ok(())
}

/// A system's init is the machine's first process, and whatever it starts has what it gives them.
fn check_system(spec: &InstanceSpec) -> Result<(), BackendError> {
    if !spec.machine.system {
        return Ok(());
    }
    let flags = [
        (!spec.security.cap_drop.is_empty(), "--cap-drop"),
        (!spec.resources.ulimits.is_empty(), "--ulimit"),
        (rights::no_new_privileges(spec), "--security-opt no-new-privileges"),
    ];
    match flags.iter().find(|(given, _)| *given) {
        None => Ok(()),
        Some((_, flag)) => Err(BackendError::new(
            ErrorKind::Unsupported,
            format!("an init that is its machine's first process cannot be held to {flag}"),
        )
        .hint("set it in the system, for instance in a unit of systemd's")),
    }
}

#[cfg(test)]
mod tests {
    use kiln_contract::{ByteSize, Ulimit};

    use super::*;

    type Change = fn(&mut InstanceSpec);

    #[test]
    fn what_a_machine_cannot_have_is_refused_by_the_name_of_its_flag() {
        let cases: [(&str, Change); 12] = [
            ("--device", |spec| spec.security.devices = vec!["/dev/fuse".into()]),
            ("--security-opt seccomp=FILE", |spec| spec.security.options = vec!["seccomp=/p.json".into()]),
            ("--cpuset-cpus", |spec| spec.resources.cpuset = Some("0".into())),
            ("--cpu-shares", |spec| spec.resources.cpu_shares = Some(512)),
            ("--memory-swap", |spec| spec.resources.memory_swap = Some(ByteSize(1 << 30))),
            ("--pids-limit", |spec| spec.resources.pids = Some(10)),
            ("--runtime", |spec| spec.runtime = RuntimeChoice::External("/usr/bin/runc".into())),
            ("--ip", |spec| spec.network.address = Some([10, 0, 0, 2].into())),
            ("`pasta`", |spec| spec.network.mode = "pasta".into()),
            ("--cap-drop", |spec| {
                spec.machine.system = true;
                spec.security.cap_drop = vec!["NET_RAW".into()];
            }),
            ("--ulimit", |spec| {
                spec.machine.system = true;
                spec.resources.ulimits = vec![Ulimit { name: "nofile".into(), soft: 1, hard: 1 }];
            }),
            ("no-new-privileges", |spec| {
                spec.machine.system = true;
                spec.security.options = vec!["no-new-privileges".into()];
            }),
        ];
        for (flag, change) in cases {
            let mut spec = kiln_fixtures::instance_spec("m");
            check(&spec).unwrap();
            change(&mut spec);
            let error = check(&spec).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Unsupported, "{flag}");
            assert!(error.to_string().contains(flag), "{flag}: {error}");
        }
    }

    #[test]
    fn what_a_machine_has_anyway_or_can_have_is_not_refused() {
        let cases: [Change; 5] = [
            |spec| spec.security.privileged = true,
            |spec| spec.security.cap_drop = vec!["ALL".into()],
            |spec| spec.security.options = vec!["seccomp=unconfined".into(), "systempaths=unconfined".into()],
            |spec| spec.resources.ulimits = vec![Ulimit { name: "nofile".into(), soft: 1, hard: 2 }],
            |spec| {
                spec.machine.system = true;
                spec.security.cap_add = vec!["SYS_ADMIN".into()];
            },
        ];
        for (number, change) in cases.into_iter().enumerate() {
            let mut spec = kiln_fixtures::instance_spec("m");
            change(&mut spec);
            check(&spec).unwrap_or_else(|error| panic!("case {number}: {error}"));
        }
        let mut wrong = kiln_fixtures::instance_spec("m");
        wrong.security.cap_add = vec!["EVERYTHING".into()];
        assert_eq!(check(&wrong).unwrap_err().kind(), ErrorKind::Invalid);
    }
}
