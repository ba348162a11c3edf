//! Files of the host as a tar archive.

use std::fs::{self, File, Metadata};
use std::io::{self, Write};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use tar::{Builder, EntryType, Header};

use super::Options;
use crate::error::{CliError, Result};

/// Writes an archive of `source`. Its topmost entry is called `name`; without one only what is in the directory is
/// written. Owners are root's unless they are kept; sockets are left out. Names may be any bytes.
pub(super) fn pack(source: &Path, name: Option<&Path>, options: Options, out: impl Write) -> Result<()> {
    let mut archive = Builder::new(out);
    archive.follow_symlinks(false);
    let metadata = if options.follow { source.metadata() } else { source.symlink_metadata() };
    let metadata = metadata.map_err(|error| cannot_read(source, error))?;
    match name {
        Some(name) => append(&mut archive, source, name, &metadata, options)?,
        None => append_entries(&mut archive, source, Path::new(""), options)?,
    }
    let mut out = archive.into_inner().map_err(|error| cannot_read(source, error))?;
    out.flush().map_err(|error| cannot_read(source, error))
}

fn append(
    archive: &mut Builder<impl Write>,
    path: &Path,
    name: &Path,
    metadata: &Metadata,
    options: Options,
) -> Result<()> {
    let bad = |error| cannot_read(path, error);
    let mut header = Header::new_gnu();
    header.set_metadata(metadata);
    header.set_mode(metadata.mode() & 0o7777);
    if !options.owners {
        header.set_uid(0);
        header.set_gid(0);
    }
    let kind = metadata.file_type();
    if kind.is_dir() {
        header.set_size(0);
        archive.append_data(&mut header, name, io::empty()).map_err(bad)?;
        append_entries(archive, path, name, options)?;
    } else if kind.is_symlink() {
        header.set_size(0);
        header.set_entry_type(EntryType::Symlink);
        let target = fs::read_link(path).map_err(bad)?;
        archive.append_link(&mut header, name, target).map_err(bad)?;
    } else if kind.is_file() {
        let file = File::open(path).map_err(bad)?;
        // A file that shrinks meanwhile would end the archive early; one that grows is cut here.
        let data = io::Read::take(file, metadata.len());
        archive.append_data(&mut header, name, Padded { data, left: metadata.len() }).map_err(bad)?;
    } else if !kind.is_socket() {
        header.set_size(0);
        archive.append_data(&mut header, name, io::empty()).map_err(bad)?;
    }
    Ok(())
}

fn append_entries(
    archive: &mut Builder<impl Write>,
    directory: &Path,
    name: &Path,
    options: Options,
) -> Result<()> {
    let bad = |error| cannot_read(directory, error);
    let mut paths: Vec<PathBuf> = fs::read_dir(directory)
        .map_err(bad)?
        .map(|entry| entry.map(|entry| entry.path()))
        .collect::<io::Result<_>>()
        .map_err(bad)?;
    paths.sort();
    for path in paths {
        let metadata = path.symlink_metadata().map_err(|error| cannot_read(&path, error))?;
        let below = name.join(path.file_name().unwrap_or_default());
        append(archive, &path, &below, &metadata, options)?;
    }
    Ok(())
}

fn cannot_read(path: &Path, error: io::Error) -> CliError {
    CliError::file(format!("cannot pack {}", path.display()), error)
}

/// As many bytes as the header promised, whatever happens to the file: zeros for what is missing.
struct Padded<R> {
    data: R,
    left: u64,
}

impl<R: io::Read> io::Read for Padded<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let most = usize::try_from(self.left).unwrap_or(usize::MAX).min(buffer.len());
        let buffer = &mut buffer[..most];
        let mut got = self.data.read(buffer)?;
        if got == 0 {
            buffer.fill(0);
            got = buffer.len();
        }
        self.left -= got as u64;
        Ok(got)
    }
}
