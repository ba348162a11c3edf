//! Linux: `/proc`, and pidfds, which are never another process's.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use super::{Ancestry, Found, Process};

/// `PIDFD_THREAD` (Linux 6.9): a pidfd of a thread that leads no process.
const THREAD: PidfdFlags = PidfdFlags::from_bits_retain(libc::O_EXCL.cast_unsigned());

/// The processes that this process's `/proc` and PID namespace have.
#[derive(Debug, Clone, Copy, Default)]
pub struct Host;

/// How a process or a thread is known again.
#[derive(Debug)]
pub enum Watch {
    /// By a descriptor that becomes readable when it ends.
    Pidfd(OwnedFd),
    /// By its start, where there is no descriptor to be had: an older kernel's threads, or too many open files.
    Start(u64),
}

impl Host {
    /// A name for the time since this system was started: starts of processes are counted from there. Empty if not known.
    pub fn boot() -> String {
        fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default().trim().to_owned()
    }
}

impl Ancestry for Host {
    type Watch = Watch;

    fn find(&self, number: u32) -> io::Result<Option<Found<Watch>>> {
        let Some(pid) = i32::try_from(number).ok().and_then(Pid::from_raw) else { return Ok(None) };
        // Opened first: what is read afterwards is of this process, if that still lives then.
        let leader = pidfd_open(pid, PidfdFlags::empty());
        if matches!(leader, Err(rustix::io::Errno::SRCH)) {
            return Ok(None);
        }
        let is_thread = matches!(leader, Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOENT));
        let pidfd = if is_thread { pidfd_open(pid, THREAD) } else { leader };
        let Some(own) = stat(number)? else { return Ok(None) };
        let (process, parent) = if is_thread {
            let Some(leader) = leader_of(number)? else { return Ok(None) };
            let Some(stat) = stat(leader)? else { return Ok(None) };
            (Process { pid: leader, start: stat.start }, stat.parent)
        } else {
            (Process { pid: number, start: own.start }, own.parent)
        };
        let watch = pidfd.map_or(Watch::Start(own.start), Watch::Pidfd);
        Ok(self.lives(number, &watch).then_some(Found { process, parent, watch }))
    }

    fn lives(&self, number: u32, watch: &Watch) -> bool {
        match watch {
            Watch::Pidfd(pidfd) => {
                let mut polled = [PollFd::new(pidfd, PollFlags::IN)];
                matches!(poll(&mut polled, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })), Ok(0))
            }
            Watch::Start(start) => matches!(stat(number), Ok(Some(stat)) if stat.start == *start),
        }
    }
}

/// What of `/proc/PID/stat` matters here.
#[derive(Debug, PartialEq, Eq)]
struct Stat {
    parent: u32,
    start: u64,
}

/// `None`: there is no such process or thread.
fn stat(number: u32) -> io::Result<Option<Stat>> {
    let Some(text) = read(number, "stat")? else { return Ok(None) };
    parse(&text).map(Some).ok_or_else(|| {
        io::Error::new(
            io::ErrorKind::InvalidData,
            format!("/proc/{number}/stat is not as proc_pid_stat(5) says"),
        )
    })
}

/// The process that a thread belongs to.
fn leader_of(thread: u32) -> io::Result<Option<u32>> {
    let Some(text) = read(thread, "status")? else { return Ok(None) };
    let mut lines = text.split(|byte| *byte == b'\n');
    let value = lines.find_map(|line| line.strip_prefix(b"Tgid:"));
    Ok(value.and_then(|value| std::str::from_utf8(value).ok()?.trim().parse().ok()))
}

fn read(number: u32, file: &str) -> io::Result<Option<Vec<u8>>> {
    match fs::read(format!("/proc/{number}/{file}")) {
        Ok(text) => Ok(Some(text)),
        // ESRCH: it ended after the file was opened.
        Err(error)
            if error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(libc::ESRCH) =>
        {
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

/// Fields 4 and 22. The name before them may contain anything, also what looks like its end.
fn parse(text: &[u8]) -> Option<Stat> {
    let name_end = text.iter().rposition(|byte| *byte == b')')?;
    let fields = std::str::from_utf8(text.get(name_end + 1..)?).ok()?;
    let mut fields = fields.split_ascii_whitespace();
    let parent = fields.nth(1)?.parse().ok()?;
    let start = fields.nth(17)?.parse().ok()?;
    Some(Stat { parent, start })
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use super::*;

    #[test]
    fn a_name_that_looks_like_fields_deceives_nobody() {
        let rest = "S 77 1 1 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 123456 1000 200";
        for name in ["sh", "a) S 1 1", ") R 9 9 9 9 9 (", "\u{fffd}"] {
            let text = format!("42 ({name}) {rest}");
            assert_eq!(parse(text.as_bytes()), Some(Stat { parent: 77, start: 123_456 }), "{name}");
        }
        for text in ["", "42 (sh", "42 (sh) S", "42 (sh) S x 1", "42 (sh) S 1 2 3"] {
            assert_eq!(parse(text.as_bytes()), None, "{text}");
        }
    }

    #[test]
    fn processes_and_threads_are_found_and_their_ends_noticed() {
        let own = Host.find(std::process::id()).unwrap().unwrap();
        assert_eq!(own.process.pid, std::process::id());
        assert!(Host.lives(own.process.pid, &own.watch));
        let (told, thread) = std::sync::mpsc::channel();
        let (end, ended) = std::sync::mpsc::channel::<()>();
        let handle = std::thread::spawn(move || {
            told.send(rustix::thread::gettid().as_raw_nonzero().get().cast_unsigned()).unwrap();
            let _ = ended.recv();
        });
        let thread = thread.recv().unwrap();
        let found = Host.find(thread).unwrap().unwrap();
        assert_eq!((found.process, found.parent), (own.process, own.parent));
        assert!(Host.lives(thread, &found.watch));
        drop(end);
        handle.join().unwrap();
        // The kernel lets a joined thread go a moment later.
        for _ in 0..1000 {
            if !Host.lives(thread, &found.watch) {
                break;
            }
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        assert!(!Host.lives(thread, &found.watch));

        let mut child = Command::new("cat").stdin(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap();
        let found = Host.find(child.id()).unwrap().unwrap();
        assert_eq!((found.process.pid, found.parent), (child.id(), std::process::id()));
        let by_start = Watch::Start(found.process.start);
        assert!(Host.lives(child.id(), &by_start));
        assert!(!Host.lives(child.id(), &Watch::Start(found.process.start + 1)));
        drop(child.stdin.take());
        child.wait().unwrap();
        assert!(!Host.lives(child.id(), &found.watch) && !Host.lives(child.id(), &by_start));
        assert!(Host.find(child.id()).unwrap().is_none());
        assert!(Host.find(0).unwrap().is_none() && Host.find(u32::MAX).unwrap().is_none());
    }
}
