//! `kiln cp`: between the host's files and an instance, as tar streams in between.
//!
//! The instance's side is the back end's business. The host's side is here; both read and write archives with
//! [`kiln_instance::archive`], which no entry leaves. What lands where is decided as Docker does:
//!
//! | source | destination is missing | is a file | is a directory |
//! |---|---|---|---|
//! | a file | becomes it (an error with a trailing `/`) | replaces it | goes into it |
//! | a directory | becomes it | an error | goes into it |
//! | `directory/.` | becomes it | an error | its entries go into it |

mod place;

use std::ffi::OsStr;
use std::io::{self, BufWriter, Read, Write};
use std::path::{Path, PathBuf};
use std::thread;

use kiln_contract::{BackendError, ErrorKind, InstanceId, RuntimeBackend};
use kiln_instance::archive::{Archive, Base, Confine, Devices, Pack, Top, Unpack, pack};

use crate::backends::Backends;
use crate::error::{CliError, Result};
use crate::exit;
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
        unpack(archive, options.owners, |kind, name| {
            // `/` in an instance has no name of its own.
            let named = source.path.file_name().map_or_else(|| PathBuf::from(name), PathBuf::from);
            place(&Source { path: named, ..source.clone() }, kind, to, there)
        })
    })
}

/// Unpacks an archive on the host, where `place` says, once it has seen what the topmost entry is and what it is called.
fn unpack(
    archive: &mut dyn Read,
    owners: bool,
    place: impl FnOnce(Kind, &OsStr) -> Result<Placement>,
) -> Result<()> {
    let archive = Archive::open(archive).map_err(CliError::archive("cannot read what the instance sends"))?;
    let Some((is_directory, name)) = archive.top() else { return Ok(()) };
    let Placement { directory, name } = place(if is_directory { Kind::Directory } else { Kind::File }, name)?;
    let base = Base::open(&directory, Confine::Beneath).map_err(|error| {
        CliError::file(format!("cannot open the directory {}", directory.display()), error)
    })?;
    let left_out = |path: &Path| {
        let path = directory.join(path);
        exit::print_line("warning", &format!("{} is left out: it is a device node", path.display()));
    };
    let options = Unpack {
        owners,
        devices: Devices::LeftOut(&left_out),
        top: Some(name.as_deref().map_or(Top::Left, Top::Named)),
    };
    archive
        .unpack(&base, Path::new(""), &options)
        .map_err(CliError::archive(format!("cannot copy to {}", directory.display())))
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
    let cannot_read = |error| CliError::file(format!("cannot read {}", from.display()), error);
    // What is in a link can only be what is in the directory that it leads to.
    let follow = options.follow || source.entries_only || from.as_os_str().as_encoded_bytes().ends_with(b"/");
    let metadata = if follow { source.path.metadata() } else { source.path.symlink_metadata() };
    let kind = if metadata.map_err(cannot_read)?.is_dir() { Kind::Directory } else { Kind::File };
    // Where a link leads to is found out first; `.` and `..` are named by what they are.
    let real = match source.path.file_name() {
        Some(_) if !follow => source.path.clone(),
        _ => source.path.canonicalize().map_err(cannot_read)?,
    };
    let named = if source.path.file_name().is_some() { source.path.clone() } else { real.clone() };
    let there = kind_in_instance(instances, id, to)?;
    let Placement { directory, name } = place(&Source { path: named, ..source }, kind, to, there)?;
    let top = name.as_deref().map_or(Top::Left, Top::Named);
    let (parent, own) = parent_and_name(&real);
    let base = Base::open(parent, Confine::InRoot).map_err(cannot_read)?;
    let what = Pack { path: own, top, follow: false, owners: options.owners };
    let (mut reader, writer) = pipe()?;
    thread::scope(|scope| {
        let packer = scope.spawn(|| {
            let mut writer = BufWriter::with_capacity(BUFFER, writer);
            pack(&base, &what, &mut writer)
                .map_err(CliError::archive(format!("cannot copy {}", from.display())))?;
            writer.flush().map_err(|error| CliError::file("cannot hand over the archive", error))
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

/// The directory that something is in, and what it is called there. The root of all is in itself.
fn parent_and_name(path: &Path) -> (&Path, &Path) {
    match (path.parent(), path.file_name()) {
        (Some(parent), Some(name)) if parent.as_os_str().is_empty() => (Path::new("."), Path::new(name)),
        (Some(parent), Some(name)) => (parent, Path::new(name)),
        _ => (Path::new("/"), Path::new("")),
    }
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
    let mut head = &head[..];
    let first = Archive::open(&mut head).ok();
    match (first.as_ref().and_then(Archive::top), sent) {
        (Some((true, _)), _) => Ok(Some(Kind::Directory)),
        (Some((false, _)), _) => Ok(Some(Kind::File)),
        (None, Err(error)) if error.kind() != ErrorKind::NotFound => Err(error.into()),
        (None, _) => Ok(None),
    }
}
