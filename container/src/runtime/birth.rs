//! How the first process of a native container comes to be: forked into a new PID namespace, prepared by our own code,
//! then by `libcontainer`, until it waits for its start.

use std::error::Error;
use std::fs;
use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, IntoRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::rc::Rc;

use kiln_contract::ProcessId;
use libcontainer::notify_socket::NotifyListener;
use libcontainer::process::args::{ContainerArgs, ContainerType};
use libcontainer::process::channel::{self, InitReceiver, MainSender};
use libcontainer::process::init::container_init_process;
use libcontainer::syscall::syscall::SyscallType;
use oci_spec::runtime::Spec;
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SocketFlags, SocketType,
};
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{Pid, WaitOptions};
use rustix::termios::Winsize;
use rustix::thread::UnshareFlags;

use super::executor::{Workload, WorkloadExecutor};
use super::privileges::{self, exit};
use super::surroundings::set_streams;
use super::{NATIVE, RuntimeError, Streams};
use crate::cgroup::Prepared;
use crate::host;
use crate::seccomp;
use crate::spec::{ProcessPlan, UMASK};

/// Everything that a first process is made from.
pub(super) struct Birth<'a> {
    /// What `libcontainer` is to do.
    pub(super) spec: Spec,
    /// Who and what it is.
    pub(super) plan: &'a ProcessPlan,
    /// Its system call filter.
    pub(super) seccomp: Option<seccomp::Program>,
    /// The control group that it joins.
    pub(super) group: Option<&'a Prepared>,
    /// Its streams.
    pub(super) streams: Streams,
    /// Where a socket may be made for a moment.
    pub(super) directory: &'a Path,
    /// With an init of ours above the command.
    pub(super) init: bool,
    /// With a network of its own, in which nothing is up yet.
    pub(super) own_network: bool,
}

/// A process that waits for a byte.
pub(super) struct Born {
    /// By its number in this process's PID namespace.
    pub(super) process: ProcessId,
    /// The terminal's master.
    pub(super) terminal: Option<OwnedFd>,
    /// Where the byte goes.
    pub(super) go: OwnedFd,
    /// Where its last errors come from.
    pub(super) report: OwnedFd,
}

fn system(doing: &'static str) -> impl Fn(Errno) -> RuntimeError {
    move |errno| RuntimeError::System { doing, source: errno.into() }
}

fn failed(reason: impl std::fmt::Display) -> RuntimeError {
    RuntimeError::Runtime { runtime: NATIVE.into(), doing: "create", reason: reason.to_string() }
}

impl Birth<'_> {
    /// Makes the process. To be called from a thread that lives as long as the process should.
    pub(super) fn give(self) -> Result<Born, RuntimeError> {
        let pipe = || pipe_with(PipeFlags::CLOEXEC).map_err(system("make a pipe"));
        let (go_reader, go) = pipe()?;
        let (report, report_writer) = pipe()?;
        let mut workload = Workload::new(self.plan, self.seccomp, go_reader, report_writer)?;
        workload.init = self.init;
        workload.loopback = self.own_network;
        let (console, container_console) = match self.streams {
            Streams::Terminal { .. } => {
                rustix::net::socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)
                    .map(|(ours, its)| (Some(ours), Some(its)))
                    .map_err(system("make a socket"))?
            }
            Streams::Pipes { .. } => (None, None),
        };
        let size = match self.streams {
            Streams::Terminal { size } => size,
            Streams::Pipes { .. } => None,
        };
        let (mut main_sender, mut main_receiver) = channel::main_channel().map_err(failed)?;
        let (init_sender, mut init_receiver) = channel::init_channel().map_err(failed)?;
        let child = Child {
            group: self.group,
            plan: self.plan,
            streams: self.streams,
            unused: [go.as_raw_fd(), report.as_raw_fd()],
            spec: self.spec,
            console: container_console,
            directory: self.directory,
            workload,
        };
        // The child's ends are closed with what this takes, so that the end of either side is seen by the other.
        let pid = fork_into_new_namespace(|| child.live(&mut main_sender, &mut init_receiver))?;
        let _ = (main_sender.close(), init_receiver.close(), init_sender.close());
        let ready = main_receiver.wait_for_init_ready();
        let _ = main_receiver.close();
        let born = ready.map_err(in_its_own_words).and_then(|()| {
            let terminal =
                console.as_ref().map(|console| receive_terminal(console.as_fd(), size)).transpose()?;
            let process = host::process_id(pid).ok_or_else(|| failed("its process ended at once"))?;
            Ok(Born { process, terminal, go, report })
        });
        if born.is_err() {
            kill(pid);
        }
        born
    }
}

/// Kills a child that has not been waited for, and waits for it.
pub(super) fn kill(pid: u32) {
    if let Some(pid) = Pid::from_raw(pid.cast_signed()) {
        // ESRCH: it has ended by itself.
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
    }
    reap(pid);
}

/// What the child said, without what the channel says about itself.
fn in_its_own_words(error: channel::ChannelError) -> RuntimeError {
    match error {
        channel::ChannelError::ExecError(text) => {
            failed(text.strip_prefix("error in executing process : ").unwrap_or(&text))
        }
        channel::ChannelError::ReceiveError { .. } => failed("its process ended before it was ready"),
        other => failed(other),
    }
}

/// Waits for a child that is known to end.
pub(super) fn reap(pid: u32) {
    if let Some(pid) = Pid::from_raw(pid.cast_signed()) {
        while matches!(rustix::process::waitpid(Some(pid), WaitOptions::empty()), Err(Errno::INTR)) {}
    }
}

/// `libcontainer` waits for a connection to a socket before it calls the executor's `exec`. The executor waits by
/// itself, so this one is made at once. To be called by a process of one thread: the working directory changes
/// meanwhile.
fn notified_listener(directory: &Path) -> io::Result<NotifyListener> {
    let path = directory.join("notify");
    // One that is here is of a process that was killed before it came to remove it.
    let _ = fs::remove_file(&path);
    let listener = NotifyListener::new(&path).map_err(io::Error::other)?;
    // A socket's path may have 107 bytes; through a descriptor every path is short.
    let handle =
        rustix::fs::open(directory, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    let short = Path::new("/proc/self/fd").join(handle.as_raw_fd().to_string()).join("notify");
    let connected = UnixStream::connect(short);
    fs::remove_file(&path)?;
    connected?;
    Ok(listener)
}

/// Forks into a new PID namespace.
///
/// A process chooses such a namespace for its next children, and only root of the host could choose its own again.
/// So a process in between makes the choice, and makes the new process a child not of itself but of its own parent.
fn fork_into_new_namespace(child: impl FnOnce()) -> Result<u32, RuntimeError> {
    let (reader, writer) = pipe_with(PipeFlags::CLOEXEC).map_err(system("make a pipe"))?;
    // SAFETY: the C library's own fork leaves its locks usable in the child, which does what any program may do, and
    // never returns into the code of its caller.
    let between = match unsafe { libc::fork() } {
        -1 => return Err(RuntimeError::System { doing: "fork", source: io::Error::last_os_error() }),
        0 => {
            drop(reader);
            let message = match fork_sibling() {
                Ok(0) => {
                    drop(writer);
                    child();
                    exit(1)
                }
                Ok(pid) => pid,
                Err(error) => -error.raw_os_error().unwrap_or(libc::EIO),
            };
            let _ = rustix::io::write(&writer, &message.to_ne_bytes());
            exit(0)
        }
        pid => pid.cast_unsigned(),
    };
    drop(writer);
    let mut message = [0; 4];
    let told = rustix::io::retry_on_intr(|| rustix::io::read(&reader, &mut message));
    reap(between);
    match (told, i32::from_ne_bytes(message)) {
        (Ok(4), pid @ 1..) => Ok(pid.cast_unsigned()),
        (Ok(4), errno) => Err(RuntimeError::System {
            doing: "fork into the container's PID namespace",
            source: io::Error::from_raw_os_error(-errno),
        }),
        _ => Err(failed("the process that was to make its process ended")),
    }
}

/// To be called by a process of one thread. Returns 0 in the new process.
fn fork_sibling() -> io::Result<libc::pid_t> {
    // SAFETY: only children to come are in the new namespace.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWPID) }?;
    // SAFETY: without a stack and without shared memory this is `fork`, in a process of one thread that holds no locks.
    match unsafe { libc::syscall(libc::SYS_clone, libc::CLONE_PARENT | libc::SIGCHLD, 0, 0, 0, 0) } {
        -1 => Err(io::Error::last_os_error()),
        pid => Ok(pid as libc::pid_t),
    }
}

/// Takes the master that `libcontainer` sends through the console socket.
pub(super) fn receive_terminal(
    socket: BorrowedFd<'_>,
    size: Option<(u16, u16)>,
) -> Result<OwnedFd, RuntimeError> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut text = [0; 64];
    rustix::net::recvmsg(socket, &mut [IoSliceMut::new(&mut text)], &mut control, RecvFlags::CMSG_CLOEXEC)
        .map_err(system("receive the container's terminal"))?;
    let terminal = control
        .drain()
        .find_map(|message| match message {
            RecvAncillaryMessage::ScmRights(mut descriptors) => descriptors.next(),
            _ => None,
        })
        .ok_or_else(|| failed("its terminal did not come"))?;
    if let Some((rows, columns)) = size {
        let size = Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
        rustix::termios::tcsetwinsize(&terminal, size).map_err(system("set the size of the terminal"))?;
    }
    Ok(terminal)
}

/// The new process, before `libcontainer` takes it over.
struct Child<'a> {
    group: Option<&'a Prepared>,
    plan: &'a ProcessPlan,
    streams: Streams,
    /// Descriptors of the parent.
    unused: [RawFd; 2],
    spec: Spec,
    /// Where the terminal's master is sent to.
    console: Option<OwnedFd>,
    directory: &'a Path,
    workload: Workload,
}

impl Child<'_> {
    fn live(self, main: &mut MainSender, init: &mut InitReceiver) -> ! {
        // What `libcontainer` logs would go to the workload's standard error.
        let quiet = tracing::subscriber::NoSubscriber::default();
        let ended = tracing::subscriber::with_default(quiet, || {
            catch_unwind(AssertUnwindSafe(|| {
                let args = match self.prepare().and_then(|()| self.into_arguments()) {
                    Ok(args) => args,
                    Err(text) => return text,
                };
                match container_init_process(&args, main, init) {
                    Ok(()) => "its process went on without a command".to_owned(),
                    Err(error) => with_causes(&error),
                }
            }))
        });
        let text = ended.unwrap_or_else(|_| "its process failed unexpectedly".to_owned());
        let _ = main.exec_failed(text);
        exit(1)
    }

    fn prepare(&self) -> Result<(), String> {
        for descriptor in self.unused {
            // SAFETY: this copy of the parent's descriptors is not used by anything in this process.
            unsafe { libc::close(descriptor) };
        }
        let say = |doing: &str| {
            let doing = doing.to_owned();
            move |error: io::Error| format!("cannot {doing}: {error}")
        };
        rustix::process::umask(Mode::from_raw_mode(UMASK));
        privileges::reset_signals();
        if let Some(group) = self.group {
            group.join().map_err(say("join the control group"))?;
        }
        privileges::set_limits(self.plan)?;
        privileges::set_groups(&self.plan.user.groups, host::in_user_namespace())
            .map_err(say("set the supplementary groups"))?;
        if let Streams::Pipes { stdin, stdout, stderr } = &self.streams {
            set_streams([stdin.as_fd(), stdout.as_fd(), stderr.as_fd()])
                .map_err(say("set the standard streams"))?;
        }
        Ok(())
    }

    fn into_arguments(self) -> Result<ContainerArgs, String> {
        let notify_listener = notified_listener(self.directory)
            .map_err(|error| format!("cannot make a socket in {}: {error}", self.directory.display()))?;
        // They may be 0, 1 or 2 themselves, which the workload has.
        std::mem::forget(self.streams);
        Ok(ContainerArgs {
            container_type: ContainerType::InitContainer,
            syscall: SyscallType::Linux,
            rootfs: self.spec.root().as_ref().map(|root| root.path().clone()).unwrap_or_default(),
            spec: Rc::new(self.spec),
            // `libcontainer` closes it.
            console_socket: self.console.map(IntoRawFd::into_raw_fd),
            notify_listener,
            preserve_fds: 0,
            container: None,
            user_ns_config: None,
            cgroup_config: libcgroups::common::CgroupConfig {
                cgroup_path: PathBuf::new(),
                systemd_cgroup: false,
                container_name: String::new(),
            },
            detached: false,
            executor: Box::new(WorkloadExecutor(Rc::new(self.workload))),
            no_pivot: false,
            // Set by our own child, which copes with descriptors that are 0, 1 or 2 themselves.
            stdin: None,
            stdout: None,
            stderr: None,
            as_sibling: false,
            pid_file: None,
        })
    }
}

fn with_causes(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let part = error.to_string();
        if !text.ends_with(&part) {
            text = format!("{text}: {part}");
        }
        cause = error.source();
    }
    text
}
