//! A tar archive, into a directory.

use std::ffi::OsStr;
use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Component, Path, PathBuf};

use rustix::fs::{
    AtFlags, FileType, Gid, Mode, OFlags, Timespec, Timestamps, Uid, chownat, fchmod, linkat, mkdirat,
    openat, statat, symlinkat, unlinkat, utimensat,
};
use rustix::io::Errno;

use super::base::split;
use super::entries::{Entries, Entry, EntryType};
use super::{ArchiveError, Base, Top};

type Result<T> = std::result::Result<T, ArchiveError>;

/// What is taken from an archive besides names, data, modes and times.
#[derive(Debug, Clone, Copy, Default)]
pub struct Unpack<'a> {
    /// Owners, capabilities and set-user-id bits; else everything belongs to the caller, and attributes that the
    /// filesystem has no room for are left out.
    pub owners: bool,
    /// What becomes of device nodes.
    pub devices: Devices<'a>,
    /// What the topmost entry becomes; its own name stays if there is none.
    pub top: Option<Top<'a>>,
}

/// What becomes of device nodes.
#[derive(Clone, Copy, Default)]
pub enum Devices<'a> {
    /// They are an error.
    #[default]
    Refused,
    /// They are made.
    Made,
    /// They are left out, and this is told of each.
    LeftOut(&'a dyn Fn(&Path)),
}

impl Devices<'_> {
    /// Root makes them; others may not, nor may root of a user namespace, whom the kernel tells so.
    pub fn as_caller() -> Self {
        if rustix::process::geteuid().is_root() { Self::Made } else { Self::Refused }
    }
}

impl fmt::Debug for Devices<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Refused => "Refused",
            Self::Made => "Made",
            Self::LeftOut(_) => "LeftOut",
        })
    }
}

/// An archive of which the first entry has been read.
pub struct Archive<'r> {
    entries: Entries<'r>,
    first: Option<Entry>,
}

impl<'r> Archive<'r> {
    /// Reads as far as the first entry's name.
    ///
    /// # Errors
    /// If this is no archive.
    pub fn open(reader: &'r mut dyn Read) -> Result<Self> {
        let mut entries = Entries::new(reader);
        let first = entries.next().map_err(unreadable)?;
        Ok(Self { entries, first })
    }

    /// Whether the topmost entry is a directory, and what it is called: nothing for `.`. `None` if there is no entry.
    pub fn top(&self) -> Option<(bool, &OsStr)> {
        let first = self.first.as_ref()?;
        let name = first.path.components().find_map(|part| match part {
            Component::Normal(name) => Some(name),
            _ => None,
        });
        Some((first.kind == EntryType::Directory, name.unwrap_or_default()))
    }

    /// Unpacks everything into the directory `into` below `base`. Leading slashes of names are dropped; existing files
    /// are replaced, existing directories filled.
    ///
    /// # Errors
    /// At the first entry that would leave the base, that would replace a directory by something else or something else
    /// by a directory, or that cannot be written. What came before it stays.
    pub fn unpack(mut self, base: &Base, into: &Path, options: &Unpack<'_>) -> Result<()> {
        // `.` has no name of its own: what is in it has what is below.
        let named = self.top().is_some_and(|(_, name)| !name.is_empty());
        let names = Names { top: options.top, named };
        let mut directories: Vec<(PathBuf, Mode, Timespec)> = Vec::new();
        let mut next = self.first.take();
        while let Some(entry) = next {
            let failed = |error| ArchiveError::new(&entry.path, "unpack", error);
            let relative = names.below(&entry.path).map_err(failed)?;
            let place = Place { base, into, relative: &relative, names, options };
            place.write(&mut self.entries, &entry).map_err(failed)?;
            if entry.kind == EntryType::Directory {
                directories.push((into.join(&relative), mode(&entry, options), mtime(&entry)));
            }
            next = self.entries.next().map_err(unreadable)?;
        }
        // From the deepest up: giving a directory its mode may make it unwritable, and writing into it changes its time.
        directories.sort_by(|(a, ..), (b, ..)| b.cmp(a));
        for (path, mode, time) in directories {
            let failed = |error| ArchiveError::new(&path, "set the mode of", error);
            let directory = base.resolve(&path, OFlags::RDONLY | OFlags::DIRECTORY).map_err(failed)?;
            fchmod(&directory, mode).map_err(|error| failed(error.into()))?;
            let times = Timestamps { last_access: time, last_modification: time };
            rustix::fs::futimens(&directory, &times).map_err(|error| failed(error.into()))?;
        }
        Ok(())
    }
}

fn unreadable(error: io::Error) -> ArchiveError {
    ArchiveError::new("archive", "read", error)
}

/// How names of the archive become names below the destination.
#[derive(Clone, Copy)]
struct Names<'a> {
    top: Option<Top<'a>>,
    named: bool,
}

impl Names<'_> {
    /// A name of an archive as a path below some directory: without leading slashes and dots, the topmost part changed.
    fn below(self, name: &Path) -> io::Result<PathBuf> {
        if name.components().any(|part| part == Component::ParentDir) {
            return Err(io::Error::other(format!("`{}` has `..` in it", name.display())));
        }
        let mut parts = name.components().filter(|part| matches!(part, Component::Normal(_)));
        let new = match self.top {
            None | Some(Top::Own) => return Ok(parts.collect()),
            Some(Top::Left) => Path::new(""),
            Some(Top::Named(new)) => new,
        };
        if self.named {
            parts.next();
        }
        // Joined only to something: a trailing slash would ask for a directory.
        let rest: PathBuf = parts.collect();
        Ok(if rest.as_os_str().is_empty() { new.to_owned() } else { new.join(rest) })
    }
}

/// Where an entry goes.
struct Place<'a> {
    base: &'a Base,
    into: &'a Path,
    relative: &'a Path,
    names: Names<'a>,
    options: &'a Unpack<'a>,
}

/// An open directory and a name in it.
struct Spot {
    parent: OwnedFd,
    name: PathBuf,
}

impl Place<'_> {
    fn spot(&self) -> io::Result<Spot> {
        let Some((parent, name)) = split(self.relative) else {
            return Ok(Spot { parent: self.base.directory(self.into)?, name: PathBuf::from(".") });
        };
        // Missing parents are made one by one: an archive need not name them.
        let mut path = self.into.to_owned();
        let mut directory = self.base.directory(&path)?;
        for part in parent.components() {
            path.push(part);
            directory = match self.base.directory(&path) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    match mkdirat(&directory, part.as_os_str(), Mode::from_raw_mode(0o755)) {
                        Ok(()) | Err(Errno::EXIST) => self.base.directory(&path)?,
                        Err(error) => return Err(error.into()),
                    }
                }
                other => other?,
            };
        }
        Ok(Spot { parent: directory, name })
    }

    fn write(&self, entries: &mut Entries<'_>, entry: &Entry) -> io::Result<()> {
        let spot = self.spot()?;
        if let (EntryType::Char | EntryType::Block, Devices::LeftOut(tell)) =
            (entry.kind, self.options.devices)
        {
            tell(&self.into.join(self.relative));
            return Ok(());
        }
        self.make_room(&spot, entry.kind == EntryType::Directory)?;
        let Spot { parent, name } = &spot;
        let mut file = None;
        match entry.kind {
            EntryType::Directory => match mkdirat(parent, name, Mode::from_raw_mode(0o700)) {
                Ok(()) | Err(Errno::EXIST) => {}
                Err(error) => return Err(error.into()),
            },
            EntryType::Symlink => {
                symlinkat(entry.link.as_deref().ok_or_else(no_target)?, parent, name)?;
            }
            EntryType::Link => {
                return self.link(&spot, Path::new(entry.link.as_deref().ok_or_else(no_target)?));
            }
            EntryType::Char | EntryType::Block | EntryType::Fifo => self.node(&spot, entry)?,
            EntryType::Regular | EntryType::Continuous | EntryType::GnuSparse => {
                let flags =
                    OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                let mut opened: File = openat(parent, name, flags, Mode::from_raw_mode(0o600))?.into();
                entries.copy_to(entry, &mut opened)?;
                file = Some(opened);
            }
            // Vendors' own kinds have nothing to unpack.
            _ => return Ok(()),
        }
        self.finish(&spot, entry, file.as_ref())
    }

    /// Takes away what stands in the way, unless it is a directory (or must become one; a link to one below the base is
    /// as good).
    fn make_room(&self, spot: &Spot, for_directory: bool) -> io::Result<()> {
        let Ok(there) = statat(&spot.parent, &spot.name, AtFlags::SYMLINK_NOFOLLOW) else {
            return Ok(());
        };
        match (FileType::from_raw_mode(there.st_mode), for_directory) {
            (FileType::Directory, true) => Ok(()),
            (FileType::Directory, false) => {
                Err(io::Error::other("a directory is there, and is not replaced by something else"))
            }
            (FileType::Symlink, true) if self.base.directory(&self.into.join(self.relative)).is_ok() => {
                Ok(())
            }
            (_, true) => Err(io::Error::other("something else is there, and is not replaced by a directory")),
            (_, false) => Ok(unlinkat(&spot.parent, &spot.name, AtFlags::empty())?),
        }
    }

    fn link(&self, spot: &Spot, target: &Path) -> io::Result<()> {
        let (parent, name) = split(&self.names.below(target)?).ok_or_else(no_target)?;
        let directory = self.base.directory(&self.into.join(parent))?;
        Ok(linkat(&directory, name, &spot.parent, &spot.name, AtFlags::empty())?)
    }

    fn node(&self, spot: &Spot, entry: &Entry) -> io::Result<()> {
        let kind = match entry.kind {
            EntryType::Char => FileType::CharacterDevice,
            EntryType::Block => FileType::BlockDevice,
            _ => FileType::Fifo,
        };
        if kind != FileType::Fifo && !matches!(self.options.devices, Devices::Made) {
            return Err(io::Error::other("it is a device node, and those are not made here"));
        }
        make_node(spot, kind, mode(entry, self.options), entry.device)
    }

    /// Owner first: a change of owner takes set-user-ID bits and capabilities away.
    fn finish(&self, Spot { parent, name }: &Spot, entry: &Entry, file: Option<&File>) -> io::Result<()> {
        let Unpack { owners, .. } = *self.options;
        if owners {
            let id = |number| {
                u32::try_from(number).map_err(|_| io::Error::other("its owner's number is too large"))
            };
            let (uid, gid) = (Uid::from_raw(id(entry.uid)?), Gid::from_raw(id(entry.gid)?));
            chownat(parent, name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)?;
        }
        if let Some(file) = file {
            fchmod(file.as_fd(), mode(entry, self.options))?;
            for (name, value) in &entry.xattrs {
                use xattr::FileExt as _;
                let of_user = name.as_encoded_bytes().starts_with(b"user.");
                if of_user || (owners && name == "security.capability") {
                    match file.set_xattr(name, value) {
                        Err(error) if !owners && error.kind() == io::ErrorKind::Unsupported => {}
                        other => other?,
                    }
                }
            }
        }
        if entry.kind == EntryType::Directory {
            return Ok(());
        }
        let times = Timestamps { last_access: mtime(entry), last_modification: mtime(entry) };
        Ok(utimensat(parent, name, &times, AtFlags::SYMLINK_NOFOLLOW)?)
    }
}

#[cfg(target_os = "linux")]
fn make_node(spot: &Spot, kind: FileType, mode: Mode, device: (u32, u32)) -> io::Result<()> {
    let device = rustix::fs::makedev(device.0, device.1);
    Ok(rustix::fs::mknodat(&spot.parent, &spot.name, kind, mode, device)?)
}

#[cfg(not(target_os = "linux"))]
fn make_node(_: &Spot, _: FileType, _: Mode, _: (u32, u32)) -> io::Result<()> {
    Err(io::Error::other("it is neither a file nor a link, and this system makes nothing else"))
}

/// A set-user-id file must not become one of whoever unpacks it.
fn mode(entry: &Entry, options: &Unpack<'_>) -> Mode {
    let trusted = if options.owners { 0o7777 } else { 0o1777 };
    Mode::from_bits_truncate((entry.mode & trusted) as rustix::fs::RawMode)
}

fn mtime(entry: &Entry) -> Timespec {
    Timespec { tv_sec: i64::try_from(entry.mtime).unwrap_or(0), tv_nsec: 0 }
}

fn no_target() -> io::Error {
    io::Error::other("it is a link to nothing")
}
