//! Copying out of the root and into it, as tar archives.
//!
//! The agent is in the root itself, so no link of the workload's can lead out of it.

mod large;

use std::ffi::OsStr;
use std::io::{self, Read, Write};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

use kiln_link::message::{self, Answer, MAX_CHUNK};
use kiln_link::{LinkError, Stream};
use rustix::fs::{Mode, OFlags};
use tar::EntryType;
use tokio::sync::mpsc;

use crate::agent::aside;
use crate::failure::{Failure, on_path};

/// Chunks under way between the archive's thread and the link.
const DEPTH: usize = 4;

/// Gives an archive of `path`.
pub(crate) async fn pack(path: Vec<u8>, follow: bool, stream: &mut Stream) -> Result<(), LinkError> {
    let at = PathBuf::from(OsStr::from_bytes(&path));
    let looking = at.clone();
    let looked = aside(move || {
        let looked = if follow { looking.metadata() } else { looking.symlink_metadata() };
        looked.map(drop).map_err(|error| on_path("read", &path, &error))
    });
    if let Err(failure) = looked.await {
        return message::send(stream, &Answer::Failed(failure)).await;
    }
    message::send(stream, &Answer::Done).await?;
    give(stream, move |out| {
        let mut archive = tar::Builder::new(out);
        archive.follow_symlinks(false);
        archive.sparse(false);
        let at = if follow { at.canonicalize()? } else { at.clone() };
        let name = at.file_name().map_or_else(|| PathBuf::from("."), PathBuf::from);
        if at.symlink_metadata()?.is_dir() {
            archive.append_dir_all(&name, &at)?;
        } else {
            archive.append_path_with_name(&at, &name)?;
        }
        archive.into_inner()?.flush()
    })
    .await
}

/// Sends what `write` writes, as a body, and whether that went well.
pub(crate) async fn give(
    stream: &mut Stream,
    write: impl FnOnce(&mut dyn Write) -> io::Result<()> + Send + 'static,
) -> Result<(), LinkError> {
    let (chunks, mut written) = mpsc::channel(DEPTH);
    let writing = tokio::task::spawn_blocking(move || {
        let mut out = Chunks { chunks, buffer: Vec::with_capacity(MAX_CHUNK) };
        write(&mut out).and_then(|()| out.flush())
    });
    while let Some(chunk) = written.recv().await {
        message::send_chunk(stream, &chunk).await?;
    }
    message::send_chunk(stream, &[]).await?;
    message::send(stream, &outcome("read", b"/", writing.await)).await
}

/// Unpacks an archive below the directory `path`.
pub(crate) async fn unpack(path: Vec<u8>, stream: &mut Stream) -> Result<(), LinkError> {
    let (chunks, arriving) = mpsc::channel(DEPTH);
    let at = PathBuf::from(OsStr::from_bytes(&path));
    let reading = tokio::task::spawn_blocking(move || {
        let mut input = Arriving { chunks: arriving, chunk: io::Cursor::default() };
        let unpacked = unpack_at(&at, &mut input);
        // The rest is taken even after a failure: the host sends all before it listens.
        let _ = io::copy(&mut input, &mut io::sink());
        unpacked
    });
    loop {
        let chunk = message::receive_chunk(stream).await?;
        if chunk.is_empty() {
            break;
        }
        if chunks.send(chunk).await.is_err() {
            break;
        }
    }
    drop(chunks);
    let answer = outcome("write", &path, reading.await);
    message::send(stream, &answer).await
}

fn unpack_at(at: &Path, input: &mut dyn Read) -> io::Result<()> {
    if !at.metadata()?.is_dir() {
        return Err(io::ErrorKind::NotADirectory.into());
    }
    let mut archive = tar::Archive::new(input);
    archive.set_preserve_permissions(true);
    archive.set_preserve_ownerships(true);
    archive.set_preserve_mtime(true);
    archive.set_unpack_xattrs(false);
    archive.set_overwrite(true);
    let at = at.canonicalize()?;
    let open = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let directory = rustix::fs::open(&at, open, Mode::empty())?;
    // Their modes may keep what is in them from being made, and their times do not outlast it.
    let mut directories = Vec::new();
    for entry in archive.entries()? {
        let mut entry = entry?;
        if entry.header().entry_type() == EntryType::Directory {
            directories.push(entry);
        } else if !large::unpack(&mut entry, &directory)? {
            entry.unpack_in(&at)?;
        }
    }
    // Those that are in another first.
    directories.sort_by(|one, other| other.path_bytes().cmp(&one.path_bytes()));
    directories.iter_mut().try_for_each(|entry| entry.unpack_in(&at).map(drop))
}

fn outcome(doing: &str, path: &[u8], done: Result<io::Result<()>, tokio::task::JoinError>) -> Answer {
    match done {
        Ok(Ok(())) => Answer::Done,
        Ok(Err(error)) => Answer::Failed(on_path(doing, path, &error)),
        Err(error) => Answer::Failed(Failure {
            kind: crate::failure::FailureKind::Failed,
            what: format!("cannot {doing} {}: {error}", String::from_utf8_lossy(path)),
        }),
    }
}

/// Writes to the link's thread.
struct Chunks {
    chunks: mpsc::Sender<Vec<u8>>,
    buffer: Vec<u8>,
}

impl Write for Chunks {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let count = bytes.len().min(MAX_CHUNK - self.buffer.len());
        self.buffer.extend_from_slice(&bytes[..count]);
        if self.buffer.len() == MAX_CHUNK {
            self.flush()?;
        }
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        if self.buffer.is_empty() {
            return Ok(());
        }
        let full = std::mem::replace(&mut self.buffer, Vec::with_capacity(MAX_CHUNK));
        self.chunks.blocking_send(full).map_err(|_| io::ErrorKind::BrokenPipe.into())
    }
}

/// Reads from the link's thread.
struct Arriving {
    chunks: mpsc::Receiver<Vec<u8>>,
    chunk: io::Cursor<Vec<u8>>,
}

impl Read for Arriving {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            match self.chunk.read(buffer)? {
                0 => match self.chunks.blocking_recv() {
                    Some(chunk) => self.chunk = io::Cursor::new(chunk),
                    None => return Ok(0),
                },
                count => return Ok(count),
            }
        }
    }
}
