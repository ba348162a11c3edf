//! A process's streams between this process and the guest.
//!
//! What this process has may be anything that a user redirected: a terminal, a file, a pipe that others have open too. None of
//! it is made non-blocking, which others would notice; threads read and write it.

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::os::fd::OwnedFd;
use std::thread::JoinHandle;

use kiln_contract::{BackendError, Stdio};
use kiln_instance::DetachKeys;
use kiln_link::message::{self, Input, MAX_CHUNK, Output, TerminalSize};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::mpsc;

use crate::life::{lost, refused};

/// Pieces that wait for a slow reader or writer.
const DEPTH: usize = 8;

/// How carrying ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum End {
    /// The process did.
    Exited(u8),
    /// The user typed the keys that detach.
    Detached,
}

/// What happens besides streams.
#[derive(Debug)]
pub(crate) enum Event {
    /// The terminal has another size.
    Resized(TerminalSize),
}

/// Reads input on a thread, which ends when nobody wants more.
pub(crate) fn reader(from: OwnedFd, mut keys: DetachKeys) -> mpsc::Receiver<Option<Vec<u8>>> {
    let (pieces, read) = mpsc::channel(DEPTH);
    std::thread::spawn(move || {
        let mut from = File::from(from);
        let mut buffer = vec![0; MAX_CHUNK];
        loop {
            let count = match from.read(&mut buffer) {
                Ok(count) => count,
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
                Err(_) => 0,
            };
            let (typed, detach) = keys.filter(&buffer[..count]);
            if count == 0 || !typed.is_empty() {
                let _ = pieces.blocking_send(Some(typed));
            }
            if detach {
                let _ = pieces.blocking_send(None);
            }
            if count == 0 || detach || pieces.is_closed() {
                return;
            }
        }
    });
    read
}

/// Writes output on a thread. What nobody reads any more is dropped: the process goes on.
pub(crate) fn writer(to: OwnedFd) -> (mpsc::Sender<Vec<u8>>, JoinHandle<()>) {
    let (pieces, mut written) = mpsc::channel::<Vec<u8>>(DEPTH);
    let thread = std::thread::spawn(move || {
        let mut to = File::from(to);
        let mut broken = false;
        while let Some(piece) = written.blocking_recv() {
            broken = broken || to.write_all(&piece).is_err();
        }
    });
    (pieces, thread)
}

/// Carries streams until the process has ended or the user detached. `stdin`: send input. `keys`: what detaches.
pub(crate) async fn carry<S: AsyncRead + AsyncWrite + Unpin + Send + 'static>(
    stream: S,
    stdio: Stdio,
    stdin: bool,
    keys: DetachKeys,
    mut events: mpsc::Receiver<Event>,
) -> Result<End, BackendError> {
    let (mut from_guest, mut to_guest) = tokio::io::split(stream);
    let mut input = if stdin { Some(reader(stdio.stdin, keys)) } else { None };
    let (stdout, stdout_thread) = writer(stdio.stdout);
    let (stderr, stderr_thread) = writer(stdio.stderr);
    // A message must be read whole, so its reading is a task of its own.
    let (outputs, mut output) = mpsc::channel(DEPTH);
    let listening = tokio::spawn(async move {
        loop {
            let message = message::receive::<_, Output>(&mut from_guest).await;
            let last = !matches!(message, Ok(Some(_)));
            if outputs.send(message).await.is_err() || last {
                return;
            }
        }
    });
    let ended = loop {
        tokio::select! {
            message = output.recv() => match message {
                Some(Ok(Some(Output::Stdout(bytes)))) => drop(stdout.send(bytes).await),
                Some(Ok(Some(Output::Stderr(bytes)))) => drop(stderr.send(bytes).await),
                Some(Ok(Some(Output::Exited(code)))) => break Ok(End::Exited(code)),
                Some(Ok(Some(Output::Failed(failure)))) => break Err(refused(&failure)),
                Some(Ok(Some(Output::Started))) => {}
                Some(Err(error)) => break Err(lost(error)),
                Some(Ok(None)) | None => break Err(lost(kiln_link::LinkError::Closed)),
            },
            piece = next(&mut input) => {
                let message = match piece {
                    Some(Some(bytes)) if !bytes.is_empty() => Input::Bytes(bytes),
                    Some(None) => break Ok(End::Detached),
                    _ => { input = None; Input::Close }
                };
                message::send(&mut to_guest, &message).await.map_err(lost)?;
            },
            Some(Event::Resized(size)) = events.recv() => {
                message::send(&mut to_guest, &Input::Resize(size)).await.map_err(lost)?;
            }
        }
    };
    listening.abort();
    drop((stdout, stderr));
    // What was written must be out before anybody hears that the process ended.
    for thread in [stdout_thread, stderr_thread] {
        let _ = tokio::task::spawn_blocking(move || thread.join()).await;
    }
    ended
}

/// The next piece of input; never, if there is none.
pub(crate) async fn next(input: &mut Option<mpsc::Receiver<Option<Vec<u8>>>>) -> Option<Option<Vec<u8>>> {
    match input {
        Some(input) => input.recv().await,
        None => std::future::pending().await,
    }
}
