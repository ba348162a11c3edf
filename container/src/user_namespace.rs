//! One user namespace for all containers of an ordinary user.
//!
//! A process may only look into a container (`exec`, `cp`, `top`) from the user namespace in which it was made. So
//! commands do not each make their own: `$KILN_HOME/userns` lists the processes that are in the namespace of this home,
//! a line `pid start` each, and a command joins that of the first one that still lives. Only where none does, it makes
//! a new one. The file is changed under an exclusive `flock(2)` on it; supervisors are in their commands' namespace, and
//! are found by the instances' records when their commands have ended.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, Write};

use kiln_contract::{BackendError, Home, ProcessId};
use kiln_instance::{Instances, failed, is_supervised, process};
use nix::sched::{CloneFlags, setns, unshare};
use rustix::fs::{FlockOperation, flock};

/// Moves this process, which has one thread and is not root, into the user namespace of a home, and into a mount
/// namespace of its own.
pub(crate) fn enter(home: &Home) -> Result<(), BackendError> {
    let path = home.path().join("userns");
    let fail = |error| failed("use", &path, error);
    fs::create_dir_all(home.path()).map_err(|error| failed("make", home.path(), error))?;
    let mut file =
        OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&path).map_err(fail)?;
    rustix::io::retry_on_intr(|| flock(&file, FlockOperation::LockExclusive))
        .map_err(|error| fail(error.into()))?;
    let mut text = String::new();
    file.read_to_string(&mut text).map_err(fail)?;
    let mut living = parse(&text);
    living.retain(|member| process::alive(*member));
    let supervisors = || {
        let instances = Instances::of(home);
        let ids = instances.ids().unwrap_or_default().into_iter();
        ids.filter_map(move |id| instances.read(&id).ok())
            .filter(is_supervised)
            .filter_map(|record| record.supervisor)
    };
    // One that has just ended, or is not in a namespace of ours, cannot be joined: the next one may.
    if !living.iter().copied().any(join) && !supervisors().any(join) {
        kiln_view::userns::enter()?;
    }
    living.push(process::this());
    let lines: String = living.iter().map(|member| format!("{} {}\n", member.pid, member.start)).collect();
    file.set_len(0).and_then(|()| file.rewind()).and_then(|()| file.write_all(lines.as_bytes())).map_err(fail)
}

fn parse(text: &str) -> Vec<ProcessId> {
    text.lines()
        .filter_map(|line| {
            let (pid, start) = line.split_once(' ')?;
            Some(ProcessId { pid: pid.parse().ok()?, start: start.parse().ok()? })
        })
        .collect()
}

/// Joins the user namespace of a process. `false` if that cannot be; then nothing has changed.
fn join(member: ProcessId) -> bool {
    let own = fs::read_link("/proc/self/ns/user").ok();
    let path = format!("/proc/{}/ns/user", member.pid);
    let Ok(namespace) = File::open(&path) else { return false };
    // Only what was made by this program: never the one that this process is in already.
    if own.is_none() || fs::read_link(&path).ok() == own || !process::alive(member) {
        return false;
    }
    let joined =
        setns(&namespace, CloneFlags::CLONE_NEWUSER).is_ok() && unshare(CloneFlags::CLONE_NEWNS).is_ok();
    if joined {
        // As in a new one: the user's other groups have no number in here. Where groups cannot be set, they stay.
        let _ = nix::unistd::setgroups(&[]);
    }
    joined
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_that_make_no_sense_are_passed_over() {
        assert_eq!(
            parse("12 345\nx\n7\n8 9\n"),
            [ProcessId { pid: 12, start: 345 }, ProcessId { pid: 8, start: 9 }]
        );
    }
}
