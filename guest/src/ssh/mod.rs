//! The machine's SSH server.
//!
//! ```text
//! host's ssh ... door ... link ... agent ---socket--- one process a connection: the server
//!                                                       |-- shells and commands, as the user
//!                                                       `-- files (SFTP), as the user
//! ```
//!
//! The agent only carries. A stream brings along who the server is and who may enter ([`SshServer`]), so that nothing is kept
//! in the guest: a fork cannot pass for its original. Processes are started as the agent starts them, by the same code.

mod forward;
mod session;

use std::collections::HashMap;
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::os::unix::net::UnixStream as Blocking;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{ExitCode, Stdio};
use std::sync::Arc;
use std::time::Duration;

use kiln_link::message::{self, Process, SshServer};
use kiln_ssh::{Channel, Handler, Identity, KeyPair, Opener, Opening, PublicKey};
use rustix::io::FdFlags;
use tokio::net::UnixStream;
use tokio::task::AbortHandle;

use crate::agent::Machine;
use crate::failure::{Doing as _, Failure, invalid, say};

/// What makes this program the server of one connection. Its standard input is the connection, its standard output the
/// directory of the workload's control group.
pub(crate) const ARGUMENT: &str = "ssh";
/// What makes this program carry files between its standard input and output.
pub(crate) const FILES_ARGUMENT: &str = "files";
/// This program, wherever the root is.
pub(crate) const ITSELF: &str = "/proc/self/exe";
/// How long a server may take to end when its connection has.
const TO_END: Duration = Duration::from_secs(5);

/// Serves one stream to the SSH service, in the agent.
pub(crate) async fn carry(machine: &Machine, mut stream: kiln_link::Stream) {
    if let Err(failure) = serve_in_a_process(machine, &mut stream).await {
        say(failure);
    }
}

async fn serve_in_a_process(machine: &Machine, stream: &mut kiln_link::Stream) -> Result<(), Failure> {
    if machine.root().is_none() {
        return Err(invalid("there is nothing to log in to yet"));
    }
    let (mut ours, theirs) = UnixStream::pair().doing("make a socket for an SSH server")?;
    let theirs = theirs.into_std().doing("make a socket for an SSH server")?;
    let group = machine.workload.group().try_clone_to_owned().doing("keep the control group")?;
    let mut command = std::process::Command::new(ITSELF);
    command.arg0("kiln-ssh").arg(ARGUMENT).env_clear();
    command.stdin(Stdio::from(OwnedFd::from(theirs))).stdout(Stdio::from(group));
    if let Some(namespace) = machine.workload.namespace() {
        let namespace = namespace.as_raw_fd();
        // SAFETY: one system call, on a descriptor that lives as long as the machine.
        unsafe {
            command.pre_exec(move || match libc::setns(namespace, libc::CLONE_NEWCGROUP) {
                0 => Ok(()),
                _ => Err(std::io::Error::last_os_error()),
            });
        }
    }
    let mut server =
        tokio::process::Command::from(command).kill_on_drop(true).spawn().doing("start an SSH server")?;
    // The stream ends, or the server does.
    let _ = tokio::io::copy_bidirectional(stream, &mut ours).await;
    drop(ours);
    if tokio::time::timeout(TO_END, server.wait()).await.is_err() {
        let _ = server.start_kill();
    }
    Ok(())
}

/// Serves the connection at standard input until it ends.
pub(crate) fn main() -> ExitCode {
    let ended = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(8)
        .build()
        .doing("start")
        .and_then(|runtime| {
            let ended = runtime.block_on(run());
            // Nobody waits for what a command still writes.
            runtime.shutdown_background();
            ended
        });
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            say(failure);
            ExitCode::FAILURE
        }
    }
}

async fn run() -> Result<(), Failure> {
    let own = |end: std::os::fd::BorrowedFd<'_>| end.try_clone_to_owned().doing("keep what was inherited");
    let (socket, group) = (own(std::io::stdin().as_fd())?, own(std::io::stdout().as_fd())?);
    for inherited in [&socket, &group] {
        rustix::io::fcntl_setfd(inherited, FdFlags::CLOEXEC).doing("keep what was inherited")?;
    }
    let socket = Blocking::from(socket);
    socket.set_nonblocking(true).doing("use the connection")?;
    let mut stream = UnixStream::from_std(socket).doing("use the connection")?;
    let Some(server) =
        message::receive::<_, SshServer>(&mut stream).await.doing("hear who this server is")?
    else {
        return Ok(());
    };
    let seed = server.host_key.try_into().map_err(|_| invalid("a host key's seed has 32 bytes"))?;
    let identity = Identity {
        host_key: KeyPair::from_seed(seed).doing("use the host key")?,
        authorised: server.authorised.into_iter().map(|key| PublicKey::from_blob(key.into())).collect(),
    };
    let sessions = Sessions {
        group: Arc::new(group),
        process: Arc::new(server.process),
        user: String::new(),
        listeners: HashMap::new(),
    };
    // What a client does wrong is said to the client.
    let _ = kiln_ssh::serve(stream, &identity, sessions).await;
    Ok(())
}

/// Carries files: SFTP on standard input and output.
pub(crate) fn serve_files() -> ExitCode {
    match kiln_ssh::sftp::serve(std::io::stdin().lock(), std::io::stdout().lock()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            say(error);
            ExitCode::FAILURE
        }
    }
}

/// What the clients of one connection may do.
struct Sessions {
    group: Arc<OwnedFd>,
    process: Arc<Process>,
    user: String,
    listeners: HashMap<(String, u16), AbortHandle>,
}

impl Handler for Sessions {
    fn knows(&mut self, user: &str) -> bool {
        user.clone_into(&mut self.user);
        !user.is_empty() && kiln_accounts::resolve(Path::new("/"), user, &self.process.groups).is_ok()
    }

    fn session(&mut self, user: &str, channel: Channel) {
        let session = session::Session {
            user: user.to_owned(),
            process: Arc::clone(&self.process),
            group: Arc::clone(&self.group),
        };
        tokio::spawn(session.serve(channel));
    }

    fn connect(&mut self, host: &str, port: u16, opening: Opening) {
        let names = forward::Names {
            user: self.user.clone(),
            process: Arc::clone(&self.process),
            group: Arc::clone(&self.group),
        };
        tokio::spawn(forward::connect(names, host.to_owned(), port, opening));
    }

    fn listen(&mut self, address: &str, port: u16, opener: Opener) -> Option<u16> {
        let (port, listener) = forward::listen(address, port, opener)?;
        self.listeners.insert((address.to_owned(), port), listener);
        Some(port)
    }

    fn unlisten(&mut self, address: &str, port: u16) -> bool {
        self.listeners.remove(&(address.to_owned(), port)).inspect(AbortHandle::abort).is_some()
    }
}
