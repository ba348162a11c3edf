//! What the workload changed, as the tar of an OCI layer (image-spec 1.1, layer.md).
//!
//! Read from the overlay's upper directory: a character device 0/0 is a whiteout, `trusted.overlay.opaque=y` hides all that
//! is below; in the archive they are `.wh.NAME` and `.wh..wh..opq`.

use std::collections::HashMap;
use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

use kiln_link::message::{self, Answer};
use kiln_link::{LinkError, Stream};
use tar::{Builder, EntryType, Header};

use crate::agent::Machine;
use crate::archive;
use crate::root::descriptor;

/// Gives the layer.
pub(crate) async fn give(machine: &Machine, stream: &mut Stream) -> Result<(), LinkError> {
    let upper = machine.root().as_ref().map(|root| format!("{}/.", descriptor(&root.upper)));
    let Some(upper) = upper else {
        let failure = crate::failure::invalid("this machine has no root yet");
        return message::send(stream, &Answer::Failed(failure)).await;
    };
    message::send(stream, &Answer::Done).await?;
    archive::give(stream, move |out| write(Path::new(&upper), out)).await
}

fn write(upper: &Path, out: &mut dyn Write) -> io::Result<()> {
    let mut layer = Layer { archive: Builder::new(out), links: HashMap::new() };
    layer.directory(upper, Path::new(""))?;
    layer.archive.into_inner()?.flush()
}

struct Layer<'a> {
    archive: Builder<&'a mut dyn Write>,
    /// Where a file with several names was put first: by device and inode.
    links: HashMap<(u64, u64), PathBuf>,
}

impl Layer<'_> {
    /// A directory and all below it. `name` is empty for the root.
    fn directory(&mut self, at: &Path, name: &Path) -> io::Result<()> {
        let metadata = fs::metadata(at)?;
        self.entry(
            at,
            if name.as_os_str().is_empty() { Path::new("./") } else { name },
            &metadata,
            EntryType::Directory,
        )?;
        if attribute(at, c"trusted.overlay.opaque")?.as_deref() == Some(b"y") {
            self.marker(&name.join(".wh..wh..opq"))?;
        }
        let mut entries: Vec<OsString> =
            fs::read_dir(at)?.map(|entry| Ok(entry?.file_name())).collect::<io::Result<_>>()?;
        entries.sort();
        for entry in entries {
            let (below, name) = (at.join(&entry), name.join(&entry));
            let metadata = below.symlink_metadata()?;
            let kind = metadata.file_type();
            if kind.is_dir() {
                self.directory(&below, &name)?;
            } else if kind.is_char_device() && metadata.rdev() == 0 {
                let mut marker = OsString::from(".wh.");
                marker.push(&entry);
                self.marker(&name.with_file_name(marker))?;
            } else if let Some(first) = self.links.get(&(metadata.dev(), metadata.ino())) {
                let (mut header, target) = (header(&metadata, EntryType::Link), first.clone());
                self.archive.append_link(&mut header, &name, target)?;
            } else {
                if metadata.nlink() > 1 {
                    self.links.insert((metadata.dev(), metadata.ino()), name.clone());
                }
                self.other(&below, &name, &metadata)?;
            }
        }
        Ok(())
    }

    fn other(&mut self, at: &Path, name: &Path, metadata: &fs::Metadata) -> io::Result<()> {
        let kind = metadata.file_type();
        if kind.is_symlink() {
            let target = fs::read_link(at)?;
            return self.archive.append_link(&mut header(metadata, EntryType::Symlink), name, target);
        }
        if kind.is_file() {
            return self.entry(at, name, metadata, EntryType::Regular);
        }
        let entry = match kind {
            _ if kind.is_char_device() => EntryType::Char,
            _ if kind.is_block_device() => EntryType::Block,
            _ if kind.is_fifo() => EntryType::Fifo,
            // Sockets are of a process, and no archive has them.
            _ => return Ok(()),
        };
        let mut header = header(metadata, entry);
        let device = metadata.rdev();
        header.set_device_major(libc::major(device))?;
        header.set_device_minor(libc::minor(device))?;
        self.archive.append_data(&mut header, name, io::empty())
    }

    /// A file or directory with its attributes and content.
    fn entry(&mut self, at: &Path, name: &Path, metadata: &fs::Metadata, kind: EntryType) -> io::Result<()> {
        let attributes = attributes(at)?;
        if !attributes.is_empty() {
            self.archive.append_pax_extensions(
                attributes.iter().map(|(key, value)| (key.as_str(), value.as_slice())),
            )?;
        }
        let mut header = header(metadata, kind);
        if kind == EntryType::Directory {
            return self.archive.append_data(&mut header, name, io::empty());
        }
        header.set_size(metadata.len());
        // What grows meanwhile is cut, what shrinks is filled: the archive stays one.
        let content = File::open(at)?.take(metadata.len()).chain(io::repeat(0)).take(metadata.len());
        self.archive.append_data(&mut header, name, content)
    }

    fn marker(&mut self, name: &Path) -> io::Result<()> {
        let mut header = Header::new_gnu();
        header.set_entry_type(EntryType::Regular);
        header.set_mode(0o644);
        header.set_size(0);
        self.archive.append_data(&mut header, name, io::empty())
    }
}

fn header(metadata: &fs::Metadata, kind: EntryType) -> Header {
    let mut header = Header::new_gnu();
    header.set_entry_type(kind);
    header.set_mode(metadata.mode() & 0o7777);
    header.set_uid(metadata.uid().into());
    header.set_gid(metadata.gid().into());
    header.set_mtime(u64::try_from(metadata.mtime()).unwrap_or(0));
    header.set_size(0);
    header
}

/// Extended attributes as PAX records, without the overlay's own.
fn attributes(at: &Path) -> io::Result<Vec<(String, Vec<u8>)>> {
    let mut names = vec![0; 64 << 10];
    let count = match rustix::fs::llistxattr(at, &mut names[..]) {
        Ok(count) => count,
        Err(rustix::io::Errno::OPNOTSUPP) => return Ok(Vec::new()),
        Err(errno) => return Err(errno.into()),
    };
    let mut found = Vec::new();
    for name in names[..count].split(|byte| *byte == 0).filter(|name| !name.is_empty()) {
        if name.starts_with(b"trusted.overlay.") {
            continue;
        }
        let name_c = std::ffi::CString::new(name)?;
        let Some(value) = attribute(at, &name_c)? else { continue };
        let Ok(name) = OsStr::from_bytes(name).to_os_string().into_string() else { continue };
        found.push((format!("SCHILY.xattr.{name}"), value));
    }
    Ok(found)
}

fn attribute(at: &Path, name: &std::ffi::CStr) -> io::Result<Option<Vec<u8>>> {
    let mut value = vec![0; 64 << 10];
    match rustix::fs::lgetxattr(at, name, &mut value[..]) {
        Ok(count) => {
            value.truncate(count);
            Ok(Some(value))
        }
        Err(rustix::io::Errno::NODATA | rustix::io::Errno::OPNOTSUPP) => Ok(None),
        Err(errno) => Err(errno.into()),
    }
}
