//! User namespaces of unprivileged users (user_namespaces(7), newuidmap(1), subuid(5)).
//!
//! An ordinary user becomes root in a namespace where id 0 is the user and ids from 1 on are the subordinate ids that
//! `/etc/subuid` and `/etc/subgid` give. Without such a line, or without the set-uid helpers, only id 0 exists: images
//! run, but nothing in them can become another user.

use std::fs;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::process::Command;

use kiln_contract::{BackendError, ErrorKind};
use nix::sched::{CloneFlags, unshare};
use nix::sys::wait::waitpid;
use nix::unistd::{ForkResult, Uid, User, fork, getegid, geteuid, getgid, getpid, getuid, setgroups};

/// How ids in the namespace are ids outside: (inside, outside, count).
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Mapping {
    /// Users.
    pub uids: Vec<(u32, u32, u32)>,
    /// Groups.
    pub gids: Vec<(u32, u32, u32)>,
}

/// Whether this process is in a user namespace other than the first one.
pub fn entered() -> bool {
    !matches!(current().uids[..], [(0, 0, u32::MAX)])
}

/// Whether this process is root, and not only in a user namespace: who may have `trusted.` xattrs.
pub fn is_root_of_host() -> bool {
    geteuid().is_root() && !entered()
}

/// The mapping that is in force for this process.
pub fn current() -> Mapping {
    let read = |path: &str| parse_map(&fs::read_to_string(path).unwrap_or_default());
    Mapping { uids: read("/proc/self/uid_map"), gids: read("/proc/self/gid_map") }
}

/// The mapping that [`enter`] would make for the calling user.
///
/// # Errors
/// If the user's name cannot be looked up.
pub fn planned() -> Result<Mapping, BackendError> {
    let (uid, gid) = (getuid().as_raw(), getgid().as_raw());
    let name = User::from_uid(Uid::from_raw(uid))
        .map_err(|error| BackendError::caused(format!("cannot look up user {uid}"), error))?
        .map(|user| user.name);
    let subordinate = |path: &str, own: u32| {
        let mut map = vec![(0, own, 1)];
        let mut inside = 1;
        for (first, count) in
            parse_subordinate(&fs::read_to_string(path).unwrap_or_default(), name.as_deref(), uid)
        {
            map.push((inside, first, count));
            inside += count;
        }
        map
    };
    Ok(Mapping { uids: subordinate("/etc/subuid", uid), gids: subordinate("/etc/subgid", gid) })
}

/// Moves this process into a new user and mount namespace if it is not root already. It must have one thread only.
///
/// # Errors
/// With [`ErrorKind::Unsupported`] if the host forbids user namespaces; the hint says how to allow them.
pub fn enter() -> Result<(), BackendError> {
    if geteuid().is_root() {
        return Ok(());
    }
    let plan = planned()?;
    let helped = plan.uids.len() > 1 && plan.gids.len() > 1;
    let mapped = if helped { Some(map_from_outside(&plan)?) } else { None };
    let (uid, gid) = (getuid(), getgid());
    unshare(CloneFlags::CLONE_NEWUSER | CloneFlags::CLONE_NEWNS).map_err(forbidden)?;
    match mapped {
        Some(helper) => helper.finish()?,
        None => map_one((0, uid.as_raw()), (0, gid.as_raw()))?,
    }
    if helped {
        // The user's other groups have no number in here, and would show as `nogroup` in every container.
        let _ = setgroups(&[]);
    }
    Ok(())
}

/// Moves this process into a new user namespace in which it is the user that it was, with all rights over what is that
/// user's. Programs that it executes have none of these rights. It must have one thread only.
///
/// # Errors
/// With [`ErrorKind::Unsupported`] if the host forbids user namespaces; the hint says how to allow them.
pub fn enter_as_self() -> Result<(), BackendError> {
    let (uid, gid) = (geteuid(), getegid());
    unshare(CloneFlags::CLONE_NEWUSER).map_err(forbidden)?;
    map_one((uid.as_raw(), uid.as_raw()), (gid.as_raw(), gid.as_raw()))
}

fn forbidden(error: nix::errno::Errno) -> BackendError {
    BackendError::caused("cannot make a user namespace", error)
        .of_kind(ErrorKind::Unsupported)
        .hint("unprivileged user namespaces are off on this host: see `kiln system doctor`")
}

/// Maps one user and one group, which needs no help: each as (inside, outside).
fn map_one(uid: (u32, u32), gid: (u32, u32)) -> Result<(), BackendError> {
    let write = |path: &str, text: String| {
        fs::write(path, text).map_err(|error| BackendError::caused(format!("cannot write {path}"), error))
    };
    write("/proc/self/setgroups", "deny".into())?;
    write("/proc/self/uid_map", format!("{} {} 1", uid.0, uid.1))?;
    write("/proc/self/gid_map", format!("{} {} 1", gid.0, gid.1))
}

/// A child that stays outside to write the maps, since only a process outside, with the set-uid helpers, may.
struct Outside {
    start: OwnedFd,
    result: OwnedFd,
    child: nix::unistd::Pid,
}

fn map_from_outside(plan: &Mapping) -> Result<Outside, BackendError> {
    let failed = |error| BackendError::caused("cannot start the helper that maps ids", error);
    let (start_read, start) = nix::unistd::pipe().map_err(failed)?;
    let (result, result_write) = nix::unistd::pipe().map_err(failed)?;
    let parent = getpid();
    // SAFETY: the caller has one thread only, so the child may use anything.
    match unsafe { fork() }.map_err(failed)? {
        ForkResult::Parent { child } => Ok(Outside { start, result, child }),
        ForkResult::Child => {
            drop((start, result));
            let mut go = [0];
            let told = fs::File::from(start_read).read(&mut go).is_ok_and(|n| n == 1);
            if told {
                let outcome = run_helper("newuidmap", parent, &plan.uids)
                    .and_then(|()| run_helper("newgidmap", parent, &plan.gids));
                if let Err(why) = outcome {
                    let _ = fs::File::from(result_write).write_all(why.as_bytes());
                }
            }
            // SAFETY: ends the child without running what the parent has registered for its own end.
            unsafe { libc::_exit(0) }
        }
    }
}

fn run_helper(program: &str, parent: nix::unistd::Pid, map: &[(u32, u32, u32)]) -> Result<(), String> {
    let mut command = Command::new(program);
    command.arg(parent.to_string());
    for (inside, outside, count) in map {
        command.args([inside.to_string(), outside.to_string(), count.to_string()]);
    }
    match command.output() {
        Ok(output) if output.status.success() => Ok(()),
        Ok(output) => Err(format!("{program}: {}", String::from_utf8_lossy(&output.stderr).trim())),
        Err(error) => Err(format!("{program}: {error}")),
    }
}

impl Outside {
    fn finish(self) -> Result<(), BackendError> {
        let failed = |error: std::io::Error| BackendError::caused("cannot map subordinate ids", error);
        fs::File::from(self.start).write_all(&[1]).map_err(failed)?;
        let mut why = String::new();
        fs::File::from(self.result).read_to_string(&mut why).map_err(failed)?;
        let _ = waitpid(self.child, None);
        if why.is_empty() {
            return Ok(());
        }
        Err(BackendError::new(ErrorKind::Failed, format!("cannot map subordinate ids: {why}"))
            .hint("install the package `uidmap`, and give the user a line in /etc/subuid and /etc/subgid"))
    }
}

fn parse_map(text: &str) -> Vec<(u32, u32, u32)> {
    text.lines()
        .filter_map(|line| {
            let mut fields = line.split_whitespace().map(str::parse);
            Some((fields.next()?.ok()?, fields.next()?.ok()?, fields.next()?.ok()?))
        })
        .collect()
}

/// Lines `name-or-uid:first:count`; those of other users, and ranges that do not fit 32 bits, are passed over.
fn parse_subordinate(text: &str, name: Option<&str>, uid: u32) -> Vec<(u32, u32)> {
    let number = uid.to_string();
    text.lines()
        .filter_map(|line| {
            let mut fields = line.trim().split(':');
            let owner = fields.next()?;
            let first: u32 = fields.next()?.parse().ok()?;
            let count: u32 = fields.next()?.parse().ok()?;
            let mine = Some(owner) == name || owner == number;
            (mine && count > 0 && first.checked_add(count).is_some()).then_some((first, count))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn subordinate_ranges_are_those_of_the_user_by_name_or_number() {
        let text =
            "root:1:2\nann:100000:65536\n1000:200000:10\nann:x:1\nann:4294967295:2\nann:5:0\n# ann:1:1\n";
        assert_eq!(parse_subordinate(text, Some("ann"), 1000), [(100_000, 65_536), (200_000, 10)]);
        assert_eq!(parse_subordinate(text, None, 7), []);
    }

    #[test]
    fn maps_read_as_the_kernel_writes_them() {
        assert_eq!(
            parse_map("         0       1000          1\n         1     100000      65536\n"),
            [(0, 1000, 1), (1, 100_000, 65_536)]
        );
    }
}
