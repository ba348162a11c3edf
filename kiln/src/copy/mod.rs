//! `kiln cp`: between the host's files and an instance, as tar streams in between.
//!
//! The instance's side is the back end's business. The host's side is here: [`pack`] reads files into an archive,
//! [`unpack`] writes an archive into a directory that no entry of it leaves, and this file decides, as Docker does,
//! what lands where:
//!
//! | source | destination is missing | is a file | is a directory |
//! |---|---|---|---|
//! | a file | becomes it (an error with a trailing `/`) | replaces it | goes into it |
//! | a directory | becomes it | an error | goes into it |
//! | `directory/.` | becomes it | an error | its entries go into it |

mod pack;
mod place;
mod unpack;

use std::io::{self, BufWriter, Read, Write};
use std::path::{Path, PathBuf};
use std::thread;

use kiln_contract::{BackendError, ErrorKind, InstanceId, RuntimeBackend};

use crate::backends::Backends;
use crate::error::{CliError, Result};
use place::{Kind, Placement, Source, place};

/// How files are copied.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Options {
    /// Keep owners.
    pub(crate) owners: bool,
    /// Copy what a symbolic link at the source points to.
    pub(crate) follow: bool,
}

const BUFFER: usize = 128 << 10;

/// Copies `from` in an instance to `to` on the host.
pub(crate) fn to_host(
    instances: &Backends,
    id: &InstanceId,
    from: &Path,
    to: &Path,
    options: Options,
) -> Result<()> {
    let source = Source::new(from);
    let there = kind_on_host(to)?;
    receive(instances, id, &source.path, options.follow, |archive| {
        unpack::unpack(archive, options.owners, |kind, name| {
            // `/` in an instance has no name of its own.
            let named = source.path.file_name().map_or_else(|| PathBuf::from(name), PathBuf::from);
            place(&Source { path: named, ..source.clone() }, kind, to, there)
        })
    })
}

/// Writes an archive of `from` in an instance to standard output.
pub(crate) fn to_stream(instances: &Backends, id: &InstanceId, from: &Path, options: Options) -> Result<()> {
    use std::io::IsTerminal;
    if io::stdout().is_terminal() {
        return Err(CliError::usage("standard output is a terminal, and an archive is not text")
            .with_hint("redirect it to a file or a pipe"));
    }
    let mut out = BufWriter::with_capacity(BUFFER, io::stdout().lock());
    instances.copy_out(id, &Source::new(from).path, options.follow, &mut out)?;
    out.flush().map_err(CliError::Output)
}

/// Copies `from` on the host to `to` in an instance.
pub(crate) fn from_host(
    instances: &Backends,
    id: &InstanceId,
    from: &Path,
    to: &Path,
    options: Options,
) -> Result<()> {
    let source = Source::new(from);
    let metadata = if options.follow { source.path.metadata() } else { source.path.symlink_metadata() };
    let metadata =
        metadata.map_err(|error| CliError::file(format!("cannot read {}", from.display()), error))?;
    let kind = if metadata.is_dir() { Kind::Directory } else { Kind::File };
    // `.` and `..` are named by what they are.
    let named = match source.path.file_name() {
        Some(_) => source.path.clone(),
        None => source.path.canonicalize().unwrap_or_else(|_| source.path.clone()),
    };
    let there = kind_in_instance(instances, id, to)?;
    let Placement { directory, name } = place(&Source { path: named, ..source.clone() }, kind, to, there)?;
    let (mut reader, writer) = pipe()?;
    thread::scope(|scope| {
        let packer = scope.spawn(|| {
            pack::pack(&source.path, name.as_deref(), options, BufWriter::with_capacity(BUFFER, writer))
        });
        let sent = instances.copy_in(id, &directory, &mut reader);
        drop(reader);
        let packed = packer.join().unwrap_or_else(|_| Err(CliError::failed("packing ended unexpectedly")));
        match (sent, packed) {
            // The archive ended early because a file could not be read: that is the reason.
            (Err(_), Err(packing)) if !is_pipe(&packing) => Err(packing),
            (Err(error), _) => Err(error.into()),
            (Ok(()), packed) => packed,
        }
    })
}

/// Unpacks the archive on standard input into the directory `to` of an instance.
pub(crate) fn from_stream(instances: &Backends, id: &InstanceId, to: &Path) -> Result<()> {
    Ok(instances.copy_in(id, to, &mut io::stdin().lock())?)
}

fn pipe() -> Result<(io::PipeReader, io::PipeWriter)> {
    io::pipe().map_err(|error| CliError::file("cannot make a pipe", error))
}

/// Gives the archive that an instance writes to `read`, which works in another thread meanwhile.
fn receive<T: Send>(
    instances: &Backends,
    id: &InstanceId,
    path: &Path,
    follow: bool,
    read: impl FnOnce(&mut dyn Read) -> Result<T> + Send,
) -> Result<T> {
    let (mut reader, writer) = pipe()?;
    thread::scope(|scope| {
        let receiver = scope.spawn(move || {
            let got = read(&mut reader)?;
            // The archive's end marks: the writing side must not see a closed pipe.
            io::copy(&mut reader, &mut io::sink())
                .map_err(|error| CliError::file("cannot read the archive", error))?;
            Ok(got)
        });
        let mut writer = BufWriter::with_capacity(BUFFER, writer);
        let sent = instances.copy_out(id, path, follow, &mut writer);
        let sent = sent.and_then(|()| {
            writer.flush().map_err(|error| BackendError::caused("cannot hand over the archive", error))
        });
        drop(writer);
        let received =
            receiver.join().unwrap_or_else(|_| Err(CliError::failed("unpacking ended unexpectedly")));
        match (sent, received) {
            // The pipe was closed because the receiving side failed: that failure is the reason.
            (Err(error), Err(failure)) if is_pipe(&error) => Err(failure),
            (Err(error), _) => Err(error.into()),
            (Ok(()), received) => received,
        }
    })
}

fn is_pipe(error: &(dyn std::error::Error + 'static)) -> bool {
    let mut next = Some(error);
    while let Some(error) = next {
        if error.downcast_ref::<io::Error>().is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe) {
            return true;
        }
        next = error.source();
    }
    false
}

fn kind_on_host(path: &Path) -> Result<Option<Kind>> {
    match path.metadata() {
        Ok(metadata) if metadata.is_dir() => Ok(Some(Kind::Directory)),
        Ok(_) => Ok(Some(Kind::File)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(CliError::file(format!("cannot look at {}", path.display()), error)),
    }
}

/// What is at a path in an instance: the first header of an archive of it tells; the rest is not read.
fn kind_in_instance(instances: &Backends, id: &InstanceId, path: &Path) -> Result<Option<Kind>> {
    struct FirstBlocks<'a>(&'a mut Vec<u8>);
    impl Write for FirstBlocks<'_> {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.extend_from_slice(bytes);
            // Enough for a long name's extension headers and the header itself.
            if self.0.len() > 64 << 10 { Err(io::ErrorKind::BrokenPipe.into()) } else { Ok(bytes.len()) }
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    let mut head = Vec::new();
    let sent = instances.copy_out(id, path, true, &mut FirstBlocks(&mut head));
    let mut archive = tar::Archive::new(&head[..]);
    let first =
        archive.entries().ok().and_then(|mut entries| entries.next()).and_then(std::result::Result::ok);
    match (first, sent) {
        (Some(entry), _) if entry.header().entry_type().is_dir() => Ok(Some(Kind::Directory)),
        (Some(_), _) => Ok(Some(Kind::File)),
        (None, Err(error)) if error.kind() != ErrorKind::NotFound => Err(error.into()),
        (None, _) => Ok(None),
    }
}
