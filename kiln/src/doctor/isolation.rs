//! What isolates and limits: namespaces, subordinate ids, cgroups, seccomp.

use std::fs;
use std::path::Path;

use super::Finding;

pub(super) fn examine(root: bool) -> Vec<Finding> {
    let mut findings = vec![user_namespaces(root)];
    findings.push(subordinate_ids(root));
    findings.extend(cgroups(Path::new("/sys/fs/cgroup"), root));
    findings.push(seccomp());
    findings.push(programs_in_memory(&fs::read_to_string("/proc/sys/vm/memfd_noexec").unwrap_or_default()));
    findings
}

fn user_namespaces(root: bool) -> Finding {
    let what = "user namespaces";
    let number = |path: &str| fs::read_to_string(path).ok().and_then(|text| text.trim().parse::<u64>().ok());
    let limit = number("/proc/sys/user/max_user_namespaces");
    let off = |why: String, advice: &str| {
        if root {
            Finding::warn(what, format!("{why}; ordinary users cannot run containers"), advice)
        } else {
            Finding::fail(what, why, advice)
        }
    };
    if !Path::new("/proc/self/ns/user").exists() {
        return off("the kernel has none".to_owned(), "use a kernel with CONFIG_USER_NS");
    }
    if limit == Some(0) {
        return off(
            "none may be made: user.max_user_namespaces is 0".to_owned(),
            "sysctl user.max_user_namespaces=15000",
        );
    }
    if number("/proc/sys/kernel/unprivileged_userns_clone") == Some(0) {
        return off(
            "ordinary users may not make any".to_owned(),
            "sysctl kernel.unprivileged_userns_clone=1",
        );
    }
    if number("/proc/sys/kernel/apparmor_restrict_unprivileged_userns") == Some(1) {
        return off(
            "AppArmor keeps ordinary users from using them".to_owned(),
            "sysctl kernel.apparmor_restrict_unprivileged_userns=0",
        );
    }
    Finding::ok(what, limit.map_or("can be made".to_owned(), |limit| format!("up to {limit} can be made")))
}

fn subordinate_ids(root: bool) -> Finding {
    let what = "subordinate ids";
    if root {
        return Finding::ok(what, "root needs none");
    }
    let uid = rustix::process::getuid().as_raw();
    let name = user_name(&fs::read_to_string("/etc/passwd").unwrap_or_default(), uid);
    let count = |path: &str| subordinate(&fs::read_to_string(path).unwrap_or_default(), &name, uid);
    let (uids, gids) = (count("/etc/subuid"), count("/etc/subgid"));
    let tools = ["newuidmap", "newgidmap"].iter().all(|tool| in_path(tool));
    if uids == 0 || gids == 0 {
        Finding::warn(
            what,
            format!(
                "{name} has {uids} users and {gids} groups in /etc/subuid and /etc/subgid: files in containers belong to one user only"
            ),
            format!("as root: usermod --add-subuids 100000-165535 --add-subgids 100000-165535 {name}"),
        )
    } else if !tools {
        Finding::warn(
            what,
            "newuidmap and newgidmap are missing: files in containers belong to one user only",
            "install the package uidmap",
        )
    } else {
        Finding::ok(what, format!("{name} has {uids} users and {gids} groups"))
    }
}

fn in_path(program: &str) -> bool {
    std::env::var_os("PATH")
        .is_some_and(|path| std::env::split_paths(&path).any(|directory| directory.join(program).is_file()))
}

fn user_name(passwd: &str, uid: u32) -> String {
    let fields = passwd.lines().map(|line| line.split(':').collect::<Vec<_>>());
    let mut named = fields.filter(|fields| fields.get(2).and_then(|id| id.parse().ok()) == Some(uid));
    named.next().map_or_else(|| uid.to_string(), |fields| fields[0].to_owned())
}

/// How many ids `/etc/subuid` gives to a user, by name or number (subuid(5)).
fn subordinate(text: &str, name: &str, uid: u32) -> u64 {
    text.lines()
        .filter_map(|line| {
            let mut fields = line.split(':');
            let owner = fields.next()?;
            let count = fields.nth(1)?.trim().parse::<u64>().ok()?;
            (owner == name || owner == uid.to_string()).then_some(count)
        })
        .sum()
}

fn cgroups(mounted: &Path, root: bool) -> Vec<Finding> {
    let what = "cgroups";
    let wanted = ["cpu", "memory", "pids"];
    if mounted.join("cgroup.controllers").exists() {
        let text = fs::read_to_string(mounted.join("cgroup.controllers")).unwrap_or_default();
        let there: Vec<&str> = text.split_whitespace().collect();
        let missing: Vec<&str> = wanted.into_iter().filter(|name| !there.contains(name)).collect();
        return vec![if missing.is_empty() {
            Finding::ok(what, format!("version 2 with {}", there.join(", ")))
        } else {
            Finding::warn(
                what,
                format!("version 2 lacks {}: their limits have no effect", missing.join(", ")),
                "boot with these controllers enabled",
            )
        }];
    }
    let there: Vec<&str> = wanted.into_iter().filter(|name| mounted.join(name).is_dir()).collect();
    let hybrid = if mounted.join("unified/cgroup.procs").exists() {
        "1 with an empty version 2 beside it"
    } else {
        "1"
    };
    if there.is_empty() {
        return vec![Finding::warn(
            what,
            "none is mounted below /sys/fs/cgroup: containers run without limits",
            "mount -t cgroup2 none /sys/fs/cgroup",
        )];
    }
    let mut findings = Vec::new();
    if there.len() < wanted.len() {
        let missing: Vec<&str> = wanted.into_iter().filter(|name| !there.contains(name)).collect();
        findings.push(Finding::warn(
            what,
            format!("version {hybrid}, without {}", missing.join(", ")),
            "boot with systemd.unified_cgroup_hierarchy=1",
        ));
    } else {
        findings.push(Finding::ok(what, format!("version {hybrid}: {}", there.join(", "))));
    }
    if !root {
        findings.push(Finding::warn(
            "cgroup delegation",
            "version 1 gives ordinary users no cgroups: limits, pause and stats have no effect",
            "boot with systemd.unified_cgroup_hierarchy=1",
        ));
    }
    findings
}

fn seccomp() -> Finding {
    let what = "seccomp";
    match fs::read_to_string("/proc/sys/kernel/seccomp/actions_avail") {
        Ok(actions) if actions.contains("errno") => Finding::ok(what, "system calls can be filtered"),
        Ok(_) => Finding::fail(
            what,
            "the kernel filters no system calls",
            "use a kernel with CONFIG_SECCOMP_FILTER, or --security-opt seccomp=unconfined",
        ),
        Err(error) => Finding::warn(
            what,
            format!("cannot be examined: {error}"),
            "use a kernel with CONFIG_SECCOMP_FILTER",
        ),
    }
}

/// `setting` is `vm.memfd_noexec`; nothing before Linux 6.3.
fn programs_in_memory(setting: &str) -> Finding {
    let what = "programs in memory";
    match setting.trim() {
        "2" => Finding::fail(
            what,
            "none may be run: vm.memfd_noexec is 2, and every container begins with one",
            "sysctl vm.memfd_noexec=1",
        ),
        _ => Finding::ok(what, "can be run: containers never run Kiln's own file"),
    }
}

#[cfg(test)]
mod tests {
    use super::super::Verdict;
    use super::*;

    #[test]
    fn subordinate_ids_are_counted_by_name_and_number() {
        let text = "me:100000:65536\nother:200000:65536\n1000:300000:10\nbroken\nme:x:y\n";
        assert_eq!(subordinate(text, "me", 1000), 65546);
        assert_eq!(subordinate(text, "nobody", 5), 0);
        assert_eq!(user_name("root:x:0:0::/root:/bin/sh\nme:x:1000:1000::/:/bin/sh\n", 1000), "me");
        assert_eq!(user_name("", 7), "7");
    }

    #[test]
    fn hosts_that_run_no_programs_from_memory_are_told() {
        for (setting, verdict) in
            [("", Verdict::Ok), ("0\n", Verdict::Ok), ("1\n", Verdict::Ok), ("2\n", Verdict::Fail)]
        {
            assert_eq!(programs_in_memory(setting).verdict, verdict, "{setting}");
        }
    }

    #[test]
    fn cgroups_of_every_kind_are_told_apart() {
        type Files<'a> = &'a [(&'a str, &'a str)];
        let table: [(&[&str], Files<'_>, Verdict, &str); 5] = [
            (&[], &[("cgroup.controllers", "cpu memory pids io")], Verdict::Ok, "version 2 with"),
            (&[], &[("cgroup.controllers", "cpu")], Verdict::Warn, "lacks memory, pids"),
            (
                &["cpu", "memory", "pids", "unified"],
                &[("unified/cgroup.procs", "")],
                Verdict::Ok,
                "version 1 with",
            ),
            (&["cpu"], &[], Verdict::Warn, "without memory, pids"),
            (&[], &[], Verdict::Warn, "none is mounted"),
        ];
        for (directories, files, verdict, says) in table {
            let root = tempfile::tempdir().unwrap();
            directories.iter().for_each(|name| fs::create_dir(root.path().join(name)).unwrap());
            files.iter().for_each(|(name, text)| fs::write(root.path().join(name), text).unwrap());
            let found = cgroups(root.path(), true);
            assert_eq!(found[0].verdict, verdict, "{found:?}");
            assert!(found[0].why.contains(says), "{found:?}");
        }
    }
}
