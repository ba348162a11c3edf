//! How a further process comes into a container that runs.
//!
//! What runs in the container sees a process from the moment when it is in the container's PID namespace, and may then
//! look into it or stop it, as far as its own capabilities go. So all is done before that moment, by a process that the
//! container does not see:
//!
//! 1. It is forked from the caller, and hides from processes of the same user (`PR_SET_DUMPABLE`).
//! 2. It joins the control group and all namespaces at once. Of its own namespaces that of processes is not changed by
//!    this: only its children will be in the container's.
//! 3. It becomes the workload's user, with its limits, groups, streams and directory, and gives up its capabilities.
//! 4. It becomes the [`Launcher`], which closes all else: its memory, program and descriptors are nothing of the host's.
//! 5. The launcher loads the system call filter and only then makes the process that is seen: a child not of itself but of
//!    the caller (`CLONE_PARENT`), which becomes the command.
//!
//! With a filter of the user's own, that must allow `clone` and `setsid`, besides `execve`.

use std::fs;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::path::Path;

use rustix::fs::{FileType, Mode, OFlags, ResolveFlags};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recvmsg, socketpair, sockopt,
};
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{DumpableBehavior, set_dumpable_behavior};
use rustix::pty::{OpenptFlags, ioctl_tiocgptpeer, unlockpt};
use rustix::thread::{ThreadNameSpaceType, move_into_thread_name_spaces, set_no_new_privs};

use super::birth::{kill, reap, receive_terminal};
use super::launcher::{self, Launcher, Part, read_report};
use super::privileges::{self, exit};
use super::surroundings::{enter_directory, own_streams, set_streams};
use super::{Executed, NATIVE, RuntimeError, Streams};
use crate::cgroup::Prepared;
use crate::host;
use crate::seccomp::Program;
use crate::spec::{ProcessPlan, UMASK};

/// Everything that a further process is made from.
pub(super) struct Further<'a> {
    /// Who and what it is.
    pub(super) plan: &'a ProcessPlan,
    /// Its system call filter.
    pub(super) seccomp: Option<Program>,
    /// The control group that it joins.
    pub(super) group: Option<&'a Prepared>,
    /// Its streams.
    pub(super) streams: Streams,
    /// A process of the container, from `pidfd_open`.
    pub(super) pidfd: &'a OwnedFd,
    /// Those of its namespaces that are not the caller's own.
    pub(super) namespaces: ThreadNameSpaceType,
}

fn system<E: Into<io::Error>>(doing: &'static str) -> impl Fn(E) -> RuntimeError {
    move |error| RuntimeError::System { doing, source: error.into() }
}

impl Further<'_> {
    /// Makes the process; returns when it runs its command.
    pub(super) fn run(mut self) -> Result<Executed, RuntimeError> {
        let pipe = || pipe_with(PipeFlags::CLOEXEC).map_err(system("make a pipe"));
        let (report, its_report) = pipe()?;
        let (told, its_told) =
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
                .and_then(|(ours, its)| sockopt::set_socket_passcred(&ours, true).map(|()| (ours, its)))
                .map_err(system("make a socket"))?;
        let launcher = Launcher::new(self.plan, self.seccomp.take())?;
        let (terminal, its_terminal) = match self.streams {
            Streams::Terminal { .. } => {
                socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)
                    .map(|(ours, its)| (Some(ours), Some(its)))
                    .map_err(system("make a socket"))?
            }
            Streams::Pipes { .. } => (None, None),
        };
        // SAFETY: the C library's own fork leaves its locks usable in the child, which does what any program may do, and
        // never returns into the code of its caller.
        let between = match unsafe { libc::fork() } {
            -1 => return Err(system("fork")(io::Error::last_os_error())),
            0 => {
                let unused = [report.as_raw_fd(), told.as_raw_fd()];
                let Err(text) = self.enter(&unused, its_terminal.as_ref()) else {
                    let terminal = its_terminal.is_some();
                    let part = Part::Child { report: its_report.as_fd(), told: its_told.as_fd(), terminal };
                    launcher.run(part, self.plan.capabilities)
                };
                launcher::report(its_report.as_fd(), &text);
                exit(126)
            }
            pid => pid.cast_unsigned(),
        };
        // The other ends are closed here, so that the end of either side is seen by the other.
        drop((its_report, its_told, its_terminal));
        reap(between);
        let told = told_by(&told, between);
        let command = &self.plan.args[0];
        let failed = |reason: &str| RuntimeError::Runtime {
            runtime: NATIVE.into(),
            doing: ENTER,
            reason: reason.to_owned(),
        };
        let Some(pid) = told else {
            read_report(report, command, ENTER)?;
            return Err(failed("the process that was to make its process ended"));
        };
        let size = match self.streams {
            Streams::Terminal { size } => size,
            Streams::Pipes { .. } => None,
        };
        let executed = read_report(report, command, ENTER).and_then(|()| {
            let terminal =
                terminal.as_ref().map(|socket| receive_terminal(socket.as_fd(), size)).transpose()?;
            let process = host::process_id(pid).ok_or_else(|| failed("its process ended at once"))?;
            Ok(Executed { process, terminal })
        });
        if executed.is_err() {
            kill(pid);
        }
        executed
    }

    /// Moves the calling process, which has one thread, into the container, but for its PID namespace.
    fn enter(&self, unused: &[RawFd], terminal: Option<&OwnedFd>) -> Result<(), String> {
        set_dumpable_behavior(DumpableBehavior::NotDumpable).map_err(cannot("hide from the container"))?;
        for descriptor in unused {
            // SAFETY: this copy of the parent's descriptors is not used by anything in this process.
            unsafe { libc::close(*descriptor) };
        }
        rustix::process::umask(Mode::from_raw_mode(UMASK));
        privileges::reset_signals();
        if let Some(group) = self.group {
            group.join().map_err(cannot("join the control group"))?;
        }
        if let Streams::Pipes { stdin, stdout, stderr } = &self.streams {
            set_streams([stdin.as_fd(), stdout.as_fd(), stderr.as_fd()])
                .map_err(cannot("set the standard streams"))?;
        }
        let user_namespace = host::in_user_namespace();
        move_into_thread_name_spaces(self.pidfd.as_fd(), self.namespaces)
            .map_err(cannot("enter the container's namespaces"))?;
        if let Some(socket) = terminal {
            open_terminal(socket).map_err(cannot("open a terminal in the container"))?;
        }
        privileges::set_limits(self.plan)?;
        let user = &self.plan.user;
        privileges::set_groups(&user.groups, user_namespace)
            .map_err(cannot("set the supplementary groups"))?;
        own_streams(user.uid, terminal.is_some());
        privileges::become_user(user.uid, user.gid).map_err(cannot("become its user"))?;
        enter_directory(Path::new(&self.plan.cwd), false)?;
        if self.plan.no_new_privileges {
            set_no_new_privs(true).map_err(cannot("renounce new privileges"))?;
        }
        Ok(())
    }
}

const ENTER: &str = "enter";

/// The number that the process `sender`, which has ended, sent. The process that it made had the same socket for a moment,
/// and so may have had whoever may look into that: what others send is passed over.
fn told_by(socket: &OwnedFd, sender: u32) -> Option<u32> {
    // More than the socket holds.
    for _ in 0..1024 {
        let mut number = [0; 4];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmCredentials(1))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
        let received = recvmsg(socket, &mut [IoSliceMut::new(&mut number)], &mut control, flags).ok()?;
        let by_sender = control.drain().any(|message| {
            matches!(message, RecvAncillaryMessage::ScmCredentials(who)
                if who.pid.as_raw_nonzero().get().cast_unsigned() == sender)
        });
        match received.bytes {
            0 => return None,
            4 if by_sender => return Some(u32::from_ne_bytes(number)),
            _ => {}
        }
    }
    None
}

fn cannot<E: Into<io::Error>>(doing: &'static str) -> impl Fn(E) -> String {
    move |error| format!("cannot {doing}: {}", error.into())
}

/// Makes a new terminal of the container this process's standard streams, and sends its master.
///
/// What is at its path is up to the container: it is used only if it is what it should be.
fn open_terminal(socket: &OwnedFd) -> io::Result<()> {
    /// `DEVPTS_SUPER_MAGIC` (linux/magic.h).
    const DEVPTS: u64 = 0x1cd1;
    let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let root = rustix::fs::CWD;
    let resolve = ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    let master = rustix::fs::openat2(root, "/dev/pts/ptmx", flags, Mode::empty(), resolve)?;
    let (stat, system) = (rustix::fs::fstat(&master)?, rustix::fs::fstatfs(&master)?);
    let is_multiplexer = FileType::from_raw_mode(stat.st_mode) == FileType::CharacterDevice
        && stat.st_rdev == rustix::fs::makedev(5, 2)
        && system.f_type as u64 == DEVPTS;
    if !is_multiplexer {
        return Err(io::Error::other("its /dev/pts/ptmx is not that of a devpts filesystem"));
    }
    rustix::fs::fcntl_setfl(&master, OFlags::RDWR)?;
    unlockpt(&master)?;
    // By the master itself, and not by a path.
    let slave = ioctl_tiocgptpeer(&master, OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
    set_streams([slave.as_fd(); 3])?;
    let descriptors = [master.as_fd()];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    control.push(SendAncillaryMessage::ScmRights(&descriptors));
    rustix::net::sendmsg(socket, &[IoSlice::new(b"t")], &mut control, SendFlags::NOSIGNAL)?;
    Ok(())
}

/// Those of the namespaces of the process `pid` that are not this process's own. One's own can be entered only by who
/// owns them, which root of a user namespace is not of the host's.
pub(super) fn foreign_namespaces(pid: u32) -> io::Result<ThreadNameSpaceType> {
    use ThreadNameSpaceType as Kind;
    let kinds = [
        ("mnt", Kind::MOUNT),
        ("pid", Kind::PROCESS_ID),
        ("net", Kind::NETWORK),
        ("ipc", Kind::INTER_PROCESS_COMMUNICATION),
        ("uts", Kind::HOST_NAME_AND_NIS_DOMAIN_NAME),
        ("cgroup", Kind::CONTROL_GROUP),
    ];
    let mut foreign = Kind::empty();
    for (name, kind) in kinds {
        if fs::read_link(format!("/proc/{pid}/ns/{name}"))? != fs::read_link(format!("/proc/self/ns/{name}"))?
        {
            foreign |= kind;
        }
    }
    Ok(foreign)
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use super::*;

    #[test]
    fn the_number_of_the_new_process_is_taken_from_who_made_it_only() {
        let (ours, its) =
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
        sockopt::set_socket_passcred(&ours, true).unwrap();
        rustix::io::write(&its, &7_u32.to_ne_bytes()).unwrap();
        let mut sender =
            Command::new("printf").arg(r"\001\002\003\004").stdout(Stdio::from(its)).spawn().unwrap();
        sender.wait().unwrap();
        let expected = u32::from_ne_bytes([1, 2, 3, 4]);
        assert_eq!(told_by(&ours, sender.id()), Some(expected));
        assert_eq!(told_by(&ours, sender.id()), None);
    }
}
