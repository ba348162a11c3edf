//! Processes of the host, told apart for good: a number is used again, a number with its start time is not.

#[cfg(target_os = "linux")]
mod linux;
#[cfg(target_os = "macos")]
mod macos;

use std::os::fd::OwnedFd;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use kiln_contract::ProcessId;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, Signal, WaitOptions, waitpid};

#[cfg(target_os = "linux")]
use linux as platform;
#[cfg(target_os = "macos")]
use macos as platform;

/// The highest number of a signal.
const SIGNALS: i32 = if cfg!(target_os = "linux") { 64 } else { 31 };

/// The process that has the number `pid` now; `None` if there is none, or only what is left of one (a zombie).
pub fn identify(pid: u32) -> Option<ProcessId> {
    platform::identify(pid)
}

/// This program, to be executed again: the very file, even if another was put in its place.
///
/// # Errors
/// If the system does not tell.
pub fn program() -> std::io::Result<std::path::PathBuf> {
    platform::program()
}

/// Has the calling process ended when `parent` ends, where the system can do that; otherwise it has to notice by itself that
/// what connects them is closed. For between fork and exec: system calls only.
///
/// # Errors
/// If the parent has ended already.
pub fn end_with(parent: Pid) -> std::io::Result<()> {
    platform::end_with_parent()?;
    // It may have ended before that was said.
    if rustix::process::getppid() == Some(parent) {
        Ok(())
    } else {
        Err(std::io::ErrorKind::BrokenPipe.into())
    }
}

/// Makes whatever outlives its parent below this process a child of it, where the system can do that.
pub(crate) fn adopt_orphans() -> std::io::Result<()> {
    platform::adopt_orphans()
}

/// This process.
pub fn this() -> ProcessId {
    let pid = std::process::id();
    // Where nothing is told of processes the number alone must do; nothing else of Kiln works there either.
    identify(pid).unwrap_or(ProcessId { pid, start: 0 })
}

/// Whether it still runs.
pub fn alive(process: ProcessId) -> bool {
    identify(process.pid) == Some(process)
}

/// A handle that stays with this process whatever becomes of its number; `None` if it does not run.
pub fn open(process: ProcessId) -> Option<OwnedFd> {
    let handle = platform::handle(raw(process.pid)?)?;
    // Looked at after the handle is there: if it is the right one now, it was when the handle was made.
    alive(process).then_some(handle)
}

/// Sends a signal (any number, real-time ones too) to exactly this process. `false` if it does not run any more.
pub fn signal(process: ProcessId, number: i32) -> std::io::Result<bool> {
    let (Some(handle), Some(signal)) = (open(process), named(number)) else {
        return if named(number).is_none() {
            Err(std::io::Error::from(rustix::io::Errno::INVAL))
        } else {
            Ok(false)
        };
    };
    match platform::send(&handle, process, signal) {
        Ok(()) => Ok(true),
        Err(rustix::io::Errno::SRCH) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// Kills it and waits until it is gone, but no longer than `limit`. `true` if it is gone.
pub fn kill_and_wait(process: ProcessId, limit: Duration) -> bool {
    let Some(handle) = open(process) else { return true };
    if platform::send(&handle, process, Signal::KILL).is_err() {
        return !alive(process);
    }
    wait_for(&handle, limit)
}

/// Waits until the process behind a handle has ended, but no longer than `limit`. `true` if it has.
pub fn wait_for(handle: &OwnedFd, limit: Duration) -> bool {
    let end = Instant::now() + limit;
    loop {
        let left = timespec(end.saturating_duration_since(Instant::now()));
        match poll(&mut [PollFd::new(handle, PollFlags::IN)], Some(&left)) {
            Ok(0) => return false,
            Ok(_) => return true,
            Err(rustix::io::Errno::INTR) => {}
            Err(_) => return false,
        }
    }
}

/// Collects the exit status of a child that has ended or is just about to, so that nothing of it is left.
pub fn reap(pid: u32) {
    // Never `None`, which is every child.
    if let Some(pid) = raw(pid) {
        let _ = rustix::io::retry_on_intr(|| waitpid(Some(pid), WaitOptions::empty()));
    }
}

/// All descendants of a process, children before grandchildren. What appears meanwhile may be missed.
pub fn descendants(pid: u32) -> Vec<u32> {
    let mut found = vec![pid];
    let mut next = 0;
    while let Some(parent) = found.get(next).copied() {
        found.extend(platform::children(parent));
        next += 1;
    }
    found.remove(0);
    found
}

/// Whether a process neither handles nor ignores nor blocks a signal. `false` if that cannot be told.
pub(crate) fn leaves_to_the_kernel(pid: u32, signal: i32) -> bool {
    let Ok(status) = std::fs::read_to_string(format!("/proc/{pid}/status")) else { return false };
    let set = |name: &str| {
        let bits = status.lines().find_map(|line| line.strip_prefix(name))?;
        u64::from_str_radix(bits.trim(), 16).ok()
    };
    let Some(sets) = ["SigBlk:", "SigIgn:", "SigCgt:"].map(set).into_iter().collect::<Option<Vec<_>>>()
    else {
        return false;
    };
    (1..=64).contains(&signal) && sets.iter().all(|bits| bits & 1 << (signal - 1) == 0)
}

/// A `pid` as rustix has it.
pub fn raw(pid: u32) -> Option<Pid> {
    Pid::from_raw(i32::try_from(pid).ok()?)
}

/// A signal's number as rustix has it; `None` if there is no such signal.
pub fn named(number: i32) -> Option<Signal> {
    if !(1..=SIGNALS).contains(&number) {
        return None;
    }
    // SAFETY: any number from 1 to the highest is a signal to the kernel. On Linux 32 and 33 belong to the C library within a process
    // of its own; here they are only ever sent to the process of a workload.
    Some(unsafe { Signal::from_raw_unchecked(number) })
}

/// A duration as the kernel takes it.
pub fn timespec(duration: Duration) -> Timespec {
    Timespec {
        tv_sec: duration.as_secs().try_into().unwrap_or(i64::MAX),
        tv_nsec: duration.subsec_nanos().into(),
    }
}

/// The name of this boot of the host.
pub fn boot_id() -> &'static str {
    static BOOT: OnceLock<String> = OnceLock::new();
    BOOT.get_or_init(|| platform::boot_id().unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn a_number_with_another_start_time_is_another_process() {
        let me = this();
        assert!(alive(me));
        assert!(!alive(ProcessId { start: me.start + 1, ..me }));
        assert!(open(ProcessId { start: me.start + 1, ..me }).is_none());
    }

    #[test]
    fn a_dead_child_does_not_count_as_running_even_before_it_is_reaped() {
        let mut child = Command::new("sleep").arg("1000").spawn().unwrap();
        let process = identify(child.id()).unwrap();
        assert!(kill_and_wait(process, Duration::from_secs(10)));
        assert!(!alive(process));
        assert!(!signal(process, 15).unwrap());
        child.wait().unwrap();
    }

    #[test]
    fn descendants_are_found_through_several_generations() {
        let mut child = Command::new("sh")
            .args(["-c", "sh -c 'sleep 1000; true' & read line; kill $!"])
            .stdin(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let end = Instant::now() + Duration::from_secs(10);
        while descendants(child.id()).len() < 2 && Instant::now() < end {
            std::thread::sleep(Duration::from_millis(5));
        }
        let found = descendants(child.id());
        assert_eq!(found.len(), 2, "{found:?}");
        for pid in found {
            kill_and_wait(identify(pid).unwrap(), Duration::from_secs(10));
        }
        drop(child.stdin.take());
        child.wait().unwrap();
    }

    #[test]
    fn what_a_process_does_with_a_signal_is_told() {
        let mut child = Command::new("sh")
            .args(["-c", "trap : INT; trap '' HUP; echo; read line"])
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        std::io::Read::read_exact(child.stdout.as_mut().unwrap(), &mut [0]).unwrap();
        let left = [libc::SIGINT, libc::SIGHUP, libc::SIGTERM]
            .map(|signal| leaves_to_the_kernel(child.id(), signal));
        assert_eq!(left, [false, false, true]);
        drop(child.stdin.take());
        child.wait().unwrap();
        assert!(!leaves_to_the_kernel(child.id(), libc::SIGTERM));
    }

    #[test]
    fn numbers_that_are_no_signals_are_refused() {
        for number in [-1, 0, 65, 1000] {
            assert!(signal(this(), number).is_err(), "{number}");
        }
    }
}
