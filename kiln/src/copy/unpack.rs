//! A tar archive unpacked on the host. It comes from a workload that nobody need trust: no entry of it is written
//! outside of the destination, whatever names, links and orders it holds.
//!
//! Every entry is reached from a descriptor of the destination, in steps that cannot leave it (`openat2(2)` with
//! `RESOLVE_BENEATH`; component by component without following links where that call is missing), and is made with
//! calls that do not follow a link at its own name. Devices are left out.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};

use rustix::fs::{self as rfs, AtFlags, Gid, Mode, OFlags, Timespec, Timestamps, Uid};
use rustix::io::Errno;
use tar::{Archive, Entry, EntryType, Header};

use super::place::{Kind, Placement};
use crate::error::{CliError, Result};
use crate::exit;

/// Unpacks `archive` where `place` says, once it has seen what the topmost entry is and what it is called.
pub(super) fn unpack(
    archive: &mut dyn Read,
    owners: bool,
    place: impl FnOnce(Kind, &OsStr) -> Result<Placement>,
) -> Result<()> {
    let mut archive = Archive::new(archive);
    let entries = archive.entries().map_err(damaged)?;
    let mut place = Some(place);
    let mut destination: Option<Destination> = None;
    for entry in entries {
        let mut entry = entry.map_err(damaged)?;
        let parts = parts(&entry.path().map_err(damaged)?)?;
        if let Some(place) = place.take() {
            let kind = if entry.header().entry_type().is_dir() { Kind::Directory } else { Kind::File };
            let placement = place(kind, parts.first().map_or(OsStr::new(""), OsString::as_os_str))?;
            // `/` of an instance is called `.`: then names begin with what is in it.
            let named = usize::from(!parts.is_empty());
            destination = Some(Destination::open(placement, named, owners)?);
        }
        if let Some(destination) = &mut destination {
            destination.write(&parts, &mut entry)?;
        }
    }
    destination.map_or(Ok(()), Destination::finish)
}

fn damaged(error: io::Error) -> CliError {
    CliError::file("the archive is damaged", error)
}

/// The components of an entry's name: no `..`, nothing absolute.
fn parts(path: &Path) -> Result<Vec<OsString>> {
    let mut parts = Vec::new();
    for part in path.components() {
        match part {
            Component::Normal(name) => parts.push(name.to_owned()),
            Component::CurDir | Component::RootDir => {}
            Component::ParentDir | Component::Prefix(_) => {
                return Err(CliError::failed(format!(
                    "the archive's entry `{}` leads out of the destination",
                    path.display()
                )));
            }
        }
    }
    Ok(parts)
}

struct Destination {
    placement: Placement,
    root: OwnedFd,
    /// How many parts of a name are the topmost entry's own: one, or none if that is `.`.
    named: usize,
    owners: bool,
    /// Modes and times of directories are set last: a read-only one would refuse what comes into it.
    directories: Vec<(PathBuf, Header)>,
}

impl Destination {
    fn open(placement: Placement, named: usize, owners: bool) -> Result<Self> {
        let flags = OFlags::DIRECTORY | OFlags::RDONLY | OFlags::CLOEXEC;
        let root = rfs::open(&placement.directory, flags, Mode::empty()).map_err(|error| {
            CliError::file(format!("cannot open the directory {}", placement.directory.display()), error)
        })?;
        Ok(Self { placement, root, named, owners, directories: Vec::new() })
    }

    /// An entry's name below the root: its first part is replaced by the name that the copy gets.
    fn below(&self, parts: &[OsString]) -> PathBuf {
        let rest = parts.get(self.named..).unwrap_or_default().iter();
        self.placement.name.iter().map(|name| name.as_os_str()).chain(rest.map(OsString::as_os_str)).collect()
    }

    fn write(&mut self, parts: &[OsString], entry: &mut Entry<'_, &mut dyn Read>) -> Result<()> {
        let path = self.below(parts);
        let Some(name) = path.file_name() else { return Ok(()) };
        let shown = self.placement.directory.join(&path);
        let bad = |error: Errno| CliError::file(format!("cannot write {}", shown.display()), error);
        let parent = self.directory(path.parent().unwrap_or(Path::new(""))).map_err(bad)?;
        let kind = entry.header().entry_type();
        if !kind.is_dir() {
            match rfs::unlinkat(&parent, name, AtFlags::empty()) {
                Ok(()) | Err(Errno::NOENT) => {}
                // Some systems say EPERM for a directory.
                Err(Errno::ISDIR | Errno::PERM) => return Err(bad(Errno::ISDIR)),
                Err(error) => return Err(bad(error)),
            }
        }
        match kind {
            EntryType::Directory => {
                make_directory(parent.as_fd(), name).map_err(bad)?;
                self.directories.push((path.clone(), entry.header().clone()));
                return Ok(());
            }
            EntryType::Regular | EntryType::Continuous | EntryType::GNUSparse => {
                let flags =
                    OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                let file = rfs::openat(&parent, name, flags, Mode::from_raw_mode(0o600)).map_err(bad)?;
                io::copy(entry, &mut File::from(file))
                    .map_err(|error| CliError::file(format!("cannot write {}", shown.display()), error))?;
            }
            EntryType::Symlink | EntryType::Link => {
                let target = entry.link_name_bytes().unwrap_or_default();
                let target = OsStr::from_bytes(&target);
                if kind == EntryType::Symlink {
                    rfs::symlinkat(target, &parent, name).map_err(bad)?;
                } else {
                    let source = self.below(&self::parts(Path::new(target))?);
                    let from = self.directory(source.parent().unwrap_or(Path::new(""))).map_err(bad)?;
                    let file = source.file_name().unwrap_or_default();
                    rfs::linkat(&from, file, &parent, name, AtFlags::empty()).map_err(bad)?;
                    return Ok(());
                }
            }
            EntryType::Fifo => {
                #[cfg(target_os = "linux")]
                rfs::mkfifoat(&parent, name, Mode::from_raw_mode(0o600)).map_err(bad)?;
            }
            _ => {
                exit::print_line(
                    "warning",
                    &format!("{} is left out: it is neither a file nor a link", shown.display()),
                );
                return Ok(());
            }
        }
        self.set_attributes(&parent, name, entry.header()).map_err(bad)
    }

    /// Opens a directory below the root; missing ones are made.
    fn directory(&self, path: &Path) -> std::result::Result<OwnedFd, Errno> {
        match open_beneath(self.root.as_fd(), path) {
            Err(Errno::NOENT) => {
                let mut current = open_beneath(self.root.as_fd(), Path::new(""))?;
                for part in path.components() {
                    make_directory(current.as_fd(), part.as_os_str())?;
                    current = open_beneath(current.as_fd(), Path::new(part.as_os_str()))?;
                }
                Ok(current)
            }
            other => other,
        }
    }

    fn set_attributes(
        &self,
        parent: &OwnedFd,
        name: &OsStr,
        header: &Header,
    ) -> std::result::Result<(), Errno> {
        let number = |value: io::Result<u64>| value.ok().and_then(|value| u32::try_from(value).ok());
        if self.owners
            && let (Some(uid), Some(gid)) = (number(header.uid()), number(header.gid()))
        {
            let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
            rfs::chownat(parent, name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)?;
        }
        if header.entry_type() != EntryType::Symlink {
            // A set-user-id file must not become one of whoever copies it.
            let allowed = if self.owners { 0o7777 } else { 0o1777 };
            let mode = header.mode().unwrap_or(0o644) & allowed;
            // The name was made by us just now and is no link; chmodat(2) could not be told not to follow one.
            let flags = OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK;
            match rfs::openat(parent, name, flags | OFlags::RDONLY, Mode::empty()) {
                Ok(file) => rfs::fchmod(&file, Mode::from_raw_mode(mode as rustix::fs::RawMode))?,
                Err(error) => return Err(error),
            }
        }
        let seconds = header.mtime().ok().and_then(|seconds| i64::try_from(seconds).ok()).unwrap_or_default();
        let time = Timespec { tv_sec: seconds, tv_nsec: 0 };
        rfs::utimensat(
            parent,
            name,
            &Timestamps { last_access: time, last_modification: time },
            AtFlags::SYMLINK_NOFOLLOW,
        )
    }

    fn finish(self) -> Result<()> {
        for (path, header) in self.directories.iter().rev() {
            let Some(name) = path.file_name() else { continue };
            let bad =
                |error: Errno| CliError::file(format!("cannot set the mode of {}", path.display()), error);
            let parent = self.directory(path.parent().unwrap_or(Path::new(""))).map_err(bad)?;
            self.set_attributes(&parent, name, header).map_err(bad)?;
        }
        Ok(())
    }
}

/// A directory at this name, made if nothing is there. A link to one is as good: it is followed later, beneath the root.
fn make_directory(parent: impl AsFd, name: &OsStr) -> std::result::Result<(), Errno> {
    match rfs::mkdirat(parent, name, Mode::from_raw_mode(0o755)) {
        Err(Errno::EXIST) => Ok(()),
        other => other,
    }
}

/// Opens a directory, never outside of `root`.
fn open_beneath(root: impl AsFd, path: &Path) -> std::result::Result<OwnedFd, Errno> {
    let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
    let flags = OFlags::DIRECTORY | OFlags::RDONLY | OFlags::CLOEXEC;
    #[cfg(target_os = "linux")]
    {
        let resolve = rfs::ResolveFlags::BENEATH | rfs::ResolveFlags::NO_MAGICLINKS;
        match rfs::openat2(root.as_fd(), path, flags, Mode::empty(), resolve) {
            Err(Errno::NOSYS) => {}
            other => return other,
        }
    }
    let mut current = rfs::openat(root, ".", flags, Mode::empty())?;
    for part in path.components() {
        current = rfs::openat(&current, part.as_os_str(), flags | OFlags::NOFOLLOW, Mode::empty())?;
    }
    Ok(current)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};

    use super::super::Options;
    use super::super::pack::pack;
    use super::*;

    enum Item<'a> {
        File(&'a str),
        Dir,
        Symlink(&'a str),
        Link(&'a str),
        Device,
    }

    fn archive(items: &[(&str, Item<'_>)]) -> Vec<u8> {
        let mut builder = tar::Builder::new(Vec::new());
        for (name, item) in items {
            let mut header = Header::new_gnu();
            let data = if let Item::File(text) = item { text.as_bytes() } else { b"" };
            header.set_size(data.len() as u64);
            header.set_mode(0o640);
            header.set_mtime(1_000_000_000);
            let (kind, link) = match item {
                Item::File(_) => (EntryType::Regular, None),
                Item::Dir => (EntryType::Directory, None),
                Item::Symlink(target) => (EntryType::Symlink, Some(target)),
                Item::Link(target) => (EntryType::Link, Some(target)),
                Item::Device => (EntryType::Char, None),
            };
            header.set_entry_type(kind);
            if kind == EntryType::Directory {
                header.set_mode(0o750);
            }
            // Written past the crate's own checks: the names are meant to be bad.
            let bytes = header.as_gnu_mut().unwrap();
            bytes.name[..name.len()].copy_from_slice(name.as_bytes());
            if let Some(target) = link {
                bytes.linkname[..target.len()].copy_from_slice(target.as_bytes());
            }
            header.set_cksum();
            builder.append(&header, data).unwrap();
        }
        builder.into_inner().unwrap()
    }

    fn into(directory: &Path, name: Option<&str>, items: &[(&str, Item<'_>)]) -> Result<()> {
        let bytes = archive(items);
        let placement = Placement { directory: directory.to_owned(), name: name.map(PathBuf::from) };
        unpack(&mut &bytes[..], false, |_, _| Ok(placement))
    }

    #[test]
    fn an_archive_lands_under_its_new_name_with_modes_and_times() {
        let directory = tempfile::tempdir().unwrap();
        let items = [
            ("d", Item::Dir),
            ("d/f", Item::File("hello")),
            ("d/l", Item::Symlink("f")),
            ("d/h", Item::Link("d/f")),
            ("d/deep/g", Item::File("x")),
        ];
        into(directory.path(), Some("new"), &items).unwrap();
        let at = |name: &str| directory.path().join("new").join(name);
        assert_eq!(fs::read_to_string(at("f")).unwrap(), "hello");
        assert_eq!(fs::read_link(at("l")).unwrap(), Path::new("f"));
        assert_eq!(fs::metadata(at("h")).unwrap().nlink(), 2);
        assert_eq!(fs::metadata(at("f")).unwrap().permissions().mode() & 0o7777, 0o640);
        assert_eq!(fs::metadata(at("")).unwrap().permissions().mode() & 0o7777, 0o750);
        assert_eq!(fs::metadata(at("")).unwrap().mtime(), 1_000_000_000);
        assert_eq!(fs::read_to_string(at("deep/g")).unwrap(), "x");
    }

    #[test]
    fn entries_alone_go_into_the_directory() {
        let directory = tempfile::tempdir().unwrap();
        into(directory.path(), None, &[("d", Item::Dir), ("d/f", Item::File("1"))]).unwrap();
        assert!(directory.path().join("f").exists());
    }

    #[test]
    fn nothing_is_written_outside_of_the_destination() {
        let outside = tempfile::tempdir().unwrap();
        let target = outside.path().to_str().unwrap();
        fs::write(outside.path().join("victim"), "safe").unwrap();
        let dotted = "d/../../victim";
        let table: Vec<Vec<(&str, Item<'_>)>> = vec![
            vec![("d", Item::Dir), (dotted, Item::File("evil"))],
            vec![("d", Item::Dir), ("d/link", Item::Symlink(target)), ("d/link/victim", Item::File("evil"))],
            vec![("d", Item::Dir), ("d/link", Item::Symlink("../../..")), ("d/link/x", Item::File("evil"))],
            vec![("d", Item::Dir), ("d/h", Item::Link("../../../etc/passwd"))],
            vec![("d", Item::Dir), ("d/link", Item::Symlink(target)), ("d/h", Item::Link("d/link/victim"))],
        ];
        for items in table {
            let directory = tempfile::tempdir().unwrap();
            assert!(into(directory.path(), Some("d"), &items).is_err());
            assert_eq!(fs::read_to_string(outside.path().join("victim")).unwrap(), "safe");
            assert_eq!(fs::read_dir(outside.path()).unwrap().count(), 1);
        }
    }

    #[test]
    fn a_link_at_a_files_own_name_is_replaced_and_not_followed() {
        let outside = tempfile::tempdir().unwrap();
        let victim = outside.path().join("victim");
        fs::write(&victim, "safe").unwrap();
        let directory = tempfile::tempdir().unwrap();
        symlink(&victim, directory.path().join("f")).unwrap();
        into(directory.path(), Some("f"), &[("f", Item::File("new"))]).unwrap();
        assert_eq!(fs::read_to_string(victim).unwrap(), "safe");
        assert_eq!(fs::read_to_string(directory.path().join("f")).unwrap(), "new");
    }

    #[test]
    fn devices_are_left_out_and_truncated_archives_are_errors() {
        let directory = tempfile::tempdir().unwrap();
        into(directory.path(), Some("null"), &[("null", Item::Device)]).unwrap();
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0);
        let bytes = archive(&[("f", Item::File(&"x".repeat(5000)))]);
        let placement = Placement { directory: directory.path().to_owned(), name: Some("f".into()) };
        assert!(unpack(&mut &bytes[..2000], false, |_, _| Ok(placement)).is_err());
    }

    #[test]
    fn what_is_packed_unpacks_the_same() {
        let directory = tempfile::tempdir().unwrap();
        let (from, to) = (directory.path().join("from"), directory.path().join("to"));
        fs::create_dir_all(from.join("sub")).unwrap();
        fs::create_dir(&to).unwrap();
        let odd = OsStr::from_bytes(b"sub/odd\xff name");
        fs::write(from.join(odd), "data").unwrap();
        let long = "n".repeat(200);
        fs::write(from.join(&long), "long").unwrap();
        symlink("nowhere", from.join("dangling")).unwrap();
        let mut bytes = Vec::new();
        let options = Options { owners: false, follow: false };
        pack(&from, Some(Path::new("x")), options, &mut bytes).unwrap();
        let placement = Placement { directory: to.clone(), name: Some("y".into()) };
        unpack(&mut &bytes[..], false, |kind, name| {
            assert_eq!((kind, name), (Kind::Directory, OsStr::new("x")));
            Ok(placement)
        })
        .unwrap();
        assert_eq!(fs::read_to_string(to.join("y").join(odd)).unwrap(), "data");
        assert_eq!(fs::read_to_string(to.join("y").join(&long)).unwrap(), "long");
        assert_eq!(fs::read_link(to.join("y/dangling")).unwrap(), Path::new("nowhere"));
    }
}
