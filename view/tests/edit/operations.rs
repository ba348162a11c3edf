//! Operations on a file system, as values: what happens in one directory can be compared with what happens in another.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use nix::fcntl::{FcntlArg, fcntl};
use rustix::fs::{CWD, RenameFlags};

/// How many files are open at once at most.
pub(crate) const SLOTS: usize = 6;

#[derive(Debug, Clone)]
pub(crate) enum Op {
    Create(String, u32, Vec<u8>),
    Overwrite(String, Vec<u8>),
    WriteAt(String, u64, Vec<u8>),
    Append(String, Vec<u8>),
    Truncate(String, u64),
    Read(String),
    List(String),
    Chmod(String, u32),
    Chown(String, u32, u32),
    Times(String, i64),
    Unlink(String),
    Rmdir(String),
    Mkdir(String, u32),
    Rename(String, String),
    RenameNew(String, String),
    Exchange(String, String),
    Link(String, String),
    Symlink(String, String),
    ReadLink(String),
    Fifo(String),
    /// What mknod(2) makes: its kind, its mode, and of a device the major and minor number.
    Node(String, rustix::fs::FileType, u32, (u32, u32)),
    /// A socket that somebody binds, and another connects to.
    Socket(String),
    SetXattr(String, String, Vec<u8>),
    GetXattr(String, String),
    RemoveXattr(String, String),
    Stat(String),
    Open(usize, String, bool),
    HandleRead(usize, u64, usize),
    HandleWrite(usize, u64, Vec<u8>),
    HandleTruncate(usize, u64),
    HandleChmod(usize, u32),
    HandleAllocate(usize, u64, u64),
    HandlePunch(usize, u64, u64),
    HandleStat(usize),
    HandleSync(usize),
    /// Where data (or else a hole) begins from an offset on.
    HandleSeek(usize, u64, bool),
    /// flock(2), without waiting.
    Flock(usize, Lock),
    /// fcntl(2): a lock of some bytes, without waiting.
    LockRange(usize, Owner, Lock, std::ops::Range<i64>),
    /// fcntl(2): which lock is in the way.
    InTheWay(usize, Owner, Lock, std::ops::Range<i64>),
    /// How many names what is open has.
    HandleLinks(usize),
    /// How many names something has that is no directory.
    Links(String),
    SyncDirectory(String),
    Statfs(String),
    Map(String, u64, Vec<u8>),
    CopyRange(String, String),
    Close(usize),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Lock {
    Shared,
    Exclusive,
    Released,
}

/// Whose a lock of bytes is: the process's (POSIX) or the open file's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Owner {
    Process,
    OpenFile,
}

/// A directory in which operations are done, and the files that they have open.
pub(crate) struct Place {
    pub(crate) top: PathBuf,
    open: [Option<File>; SLOTS],
}

/// What an operation tells: bytes, or an error's number.
pub(crate) type Told = Result<Vec<u8>, i32>;

impl Place {
    pub(crate) fn new(top: &Path) -> Self {
        Self { top: top.to_owned(), open: Default::default() }
    }

    pub(crate) fn close_all(&mut self) {
        self.open = Default::default();
    }

    pub(crate) fn apply(&mut self, op: &Op) -> Told {
        self.try_apply(op).map_err(|error| error.raw_os_error().unwrap_or(-1))
    }

    fn at(&self, path: &str) -> PathBuf {
        self.top.join(path)
    }

    fn handle(&self, slot: usize) -> io::Result<&File> {
        self.open[slot].as_ref().ok_or_else(|| io::Error::from_raw_os_error(libc::EBADF))
    }

    fn try_apply(&mut self, op: &Op) -> io::Result<Vec<u8>> {
        let nothing = Ok(Vec::new());
        match op {
            Op::Create(path, mode, bytes) => {
                let file = options().write(true).create_new(true).mode(*mode).open(self.at(path))?;
                file.write_all_at(bytes, 0)?;
            }
            Op::Overwrite(path, bytes) => {
                let file = options().write(true).create(true).truncate(true).open(self.at(path))?;
                file.write_all_at(bytes, 0)?;
            }
            Op::WriteAt(path, offset, bytes) => {
                options().write(true).open(self.at(path))?.write_all_at(bytes, *offset)?;
            }
            Op::Append(path, bytes) => {
                let mut file = options().append(true).open(self.at(path))?;
                io::Write::write_all(&mut file, bytes)?;
            }
            Op::Truncate(path, size) => {
                options().write(true).open(self.at(path))?.set_len(*size)?;
            }
            Op::Read(path) => return read(&self.at(path)),
            Op::List(path) => {
                let mut names = Vec::new();
                for entry in fs::read_dir(self.at(path))? {
                    let entry = entry?;
                    names.push(format!("{:?} {:?}", entry.file_name(), entry.file_type()?));
                }
                names.sort();
                return Ok(names.join("\n").into_bytes());
            }
            Op::Chmod(path, mode) => fs::set_permissions(self.at(path), fs::Permissions::from_mode(*mode))?,
            Op::Chown(path, uid, gid) => {
                std::os::unix::fs::lchown(self.at(path), Some(*uid), Some(*gid))?;
                return stat(&self.at(path));
            }
            Op::Times(path, seconds) => {
                let time = rustix::fs::Timespec { tv_sec: *seconds, tv_nsec: 5 };
                let times = rustix::fs::Timestamps { last_access: time, last_modification: time };
                let nofollow = rustix::fs::AtFlags::SYMLINK_NOFOLLOW;
                rustix::fs::utimensat(CWD, self.at(path), &times, nofollow)?;
                let told = fs::symlink_metadata(self.at(path))?;
                return Ok(format!("{} {}", told.mtime(), told.mtime_nsec()).into_bytes());
            }
            Op::Unlink(path) => fs::remove_file(self.at(path))?,
            Op::Rmdir(path) => fs::remove_dir(self.at(path))?,
            Op::Mkdir(path, mode) => fs::DirBuilder::new().mode(*mode).create(self.at(path))?,
            Op::Rename(from, to) => fs::rename(self.at(from), self.at(to))?,
            Op::RenameNew(from, to) => self.rename(from, to, RenameFlags::NOREPLACE)?,
            Op::Exchange(from, to) => self.rename(from, to, RenameFlags::EXCHANGE)?,
            Op::Link(from, to) => {
                fs::hard_link(self.at(from), self.at(to))?;
                return stat(&self.at(to));
            }
            Op::Symlink(target, path) => std::os::unix::fs::symlink(target, self.at(path))?,
            Op::ReadLink(path) => {
                return Ok(fs::read_link(self.at(path))?.into_os_string().into_encoded_bytes());
            }
            Op::Fifo(path) => {
                let (kind, mode) = (rustix::fs::FileType::Fifo, rustix::fs::Mode::from_raw_mode(0o640));
                rustix::fs::mknodat(CWD, self.at(path), kind, mode, 0)?;
            }
            Op::Node(path, kind, mode, (major, minor)) => {
                let device = rustix::fs::makedev(*major, *minor);
                let mode = rustix::fs::Mode::from_raw_mode(*mode);
                rustix::fs::mknodat(CWD, self.at(path), *kind, mode, device)?;
                return stat(&self.at(path));
            }
            Op::Socket(path) => {
                let path = self.at(path);
                let listener = std::os::unix::net::UnixListener::bind(&path)?;
                let mut connected = std::os::unix::net::UnixStream::connect(&path)?;
                let mut accepted = listener.accept()?.0;
                io::Write::write_all(&mut connected, b"heard")?;
                drop(connected);
                let mut heard = Vec::new();
                io::Read::read_to_end(&mut accepted, &mut heard)?;
                return Ok(heard);
            }
            Op::SetXattr(path, name, value) => xattr::set(self.at(path), name, value)?,
            Op::GetXattr(path, name) => {
                let value = xattr::get(self.at(path), name)?;
                return Ok(value.unwrap_or_else(|| b"(none)".to_vec()));
            }
            Op::RemoveXattr(path, name) => xattr::remove(self.at(path), name)?,
            Op::Stat(path) => return stat(&self.at(path)),
            Op::Open(slot, path, write) => {
                if !fs::metadata(self.at(path))?.is_file() {
                    return Err(io::Error::from_raw_os_error(libc::EISDIR));
                }
                let file = options().read(true).write(*write).open(self.at(path))?;
                self.open[*slot] = Some(file);
            }
            Op::HandleRead(slot, offset, size) => {
                let mut bytes = vec![0; *size];
                let length = self.handle(*slot)?.read_at(&mut bytes, *offset)?;
                bytes.truncate(length);
                return Ok(bytes);
            }
            Op::HandleWrite(slot, offset, bytes) => self.handle(*slot)?.write_all_at(bytes, *offset)?,
            Op::HandleTruncate(slot, size) => self.handle(*slot)?.set_len(*size)?,
            Op::HandleChmod(slot, mode) => {
                self.handle(*slot)?.set_permissions(fs::Permissions::from_mode(*mode))?;
            }
            Op::HandleAllocate(slot, offset, length) => {
                let file = self.handle(*slot)?;
                rustix::fs::fallocate(file, rustix::fs::FallocateFlags::empty(), *offset, *length)?;
            }
            Op::HandlePunch(slot, offset, length) => {
                use rustix::fs::FallocateFlags as Flags;
                let file = self.handle(*slot)?;
                rustix::fs::fallocate(file, Flags::PUNCH_HOLE | Flags::KEEP_SIZE, *offset, *length)?;
            }
            Op::HandleStat(slot) => {
                let told = self.handle(*slot)?.metadata()?;
                return Ok(format!("{} {:o}", told.len(), told.mode()).into_bytes());
            }
            Op::HandleSeek(slot, offset, data) => {
                use rustix::fs::SeekFrom::{Data, Hole};
                let from = if *data { Data(*offset) } else { Hole(*offset) };
                return Ok(rustix::fs::seek(self.handle(*slot)?, from)?.to_string().into_bytes());
            }
            Op::Flock(slot, lock) => {
                use rustix::fs::FlockOperation as Flock;
                let operation = match lock {
                    Lock::Shared => Flock::NonBlockingLockShared,
                    Lock::Exclusive => Flock::NonBlockingLockExclusive,
                    Lock::Released => Flock::NonBlockingUnlock,
                };
                rustix::fs::flock(self.handle(*slot)?, operation)?;
            }
            Op::LockRange(slot, owner, lock, range) => {
                let lock = of_range(*lock, range);
                let argument = match owner {
                    Owner::Process => FcntlArg::F_SETLK(&lock),
                    Owner::OpenFile => FcntlArg::F_OFD_SETLK(&lock),
                };
                fcntl(self.handle(*slot)?, argument)?;
            }
            Op::InTheWay(slot, owner, lock, range) => {
                let mut lock = of_range(*lock, range);
                let argument = match owner {
                    Owner::Process => FcntlArg::F_GETLK(&mut lock),
                    Owner::OpenFile => FcntlArg::F_OFD_GETLK(&mut lock),
                };
                fcntl(self.handle(*slot)?, argument)?;
                // The rest means nothing if there is none.
                let told = match i32::from(lock.l_type) {
                    libc::F_UNLCK => "none".to_owned(),
                    kind => format!("{kind} {} {} {}", lock.l_start, lock.l_len, lock.l_pid),
                };
                return Ok(told.into_bytes());
            }
            Op::HandleLinks(slot) => {
                return Ok(self.handle(*slot)?.metadata()?.nlink().to_string().into_bytes());
            }
            Op::Links(path) => {
                return Ok(fs::symlink_metadata(self.at(path))?.nlink().to_string().into_bytes());
            }
            Op::SyncDirectory(path) => {
                let directory = options().read(true).custom_flags(libc::O_DIRECTORY).open(self.at(path))?;
                directory.sync_all()?;
                directory.sync_data()?;
            }
            Op::Statfs(path) => return space(&self.at(path)),
            Op::HandleSync(slot) => self.handle(*slot)?.sync_all()?,
            Op::Map(path, offset, bytes) => {
                let file = options().read(true).write(true).open(self.at(path))?;
                // SAFETY: nobody shortens the file meanwhile.
                let mut map = unsafe { memmap2::MmapMut::map_mut(&file) }?;
                let from = usize::try_from(*offset).unwrap().min(map.len());
                let length = bytes.len().min(map.len() - from);
                map[from..from + length].copy_from_slice(&bytes[..length]);
                map.flush()?;
                return Ok(map.to_vec());
            }
            Op::CopyRange(from, to) => {
                let from = File::open(self.at(from))?;
                let to = options().write(true).open(self.at(to))?;
                rustix::fs::copy_file_range(&from, Some(&mut 3), &to, Some(&mut 1), 5000)?;
            }
            Op::Close(slot) => self.open[*slot] = None,
        }
        nothing
    }

    fn rename(&self, from: &str, to: &str, flags: RenameFlags) -> io::Result<()> {
        Ok(rustix::fs::renameat_with(CWD, self.at(from), CWD, self.at(to), flags)?)
    }
}

fn of_range(lock: Lock, range: &std::ops::Range<i64>) -> libc::flock {
    let kind = match lock {
        Lock::Shared => libc::F_RDLCK,
        Lock::Exclusive => libc::F_WRLCK,
        Lock::Released => libc::F_UNLCK,
    };
    libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: range.start,
        l_len: range.end - range.start,
        l_pid: 0,
    }
}

/// What statfs(2) tells. The room that is left changes from one call to the next: of it only what must hold everywhere.
fn space(path: &Path) -> io::Result<Vec<u8>> {
    let told = rustix::fs::statvfs(path)?;
    let holds =
        told.f_bavail <= told.f_bfree && told.f_bfree <= told.f_blocks && told.f_ffree <= told.f_files;
    let total = told.f_blocks * told.f_frsize;
    let text = format!("{total} {} {} {} {holds}", told.f_bsize, told.f_files, told.f_namemax);
    Ok(text.into_bytes())
}

/// Never waits for the other end of a pipe.
fn options() -> OpenOptions {
    let mut options = OpenOptions::new();
    options.custom_flags(libc::O_NONBLOCK);
    options
}

fn read(path: &Path) -> io::Result<Vec<u8>> {
    // A pipe would be waited for.
    if fs::symlink_metadata(path)?.is_file() { fs::read(path) } else { Ok(b"(no file)".to_vec()) }
}

/// What must be the same everywhere. How many names something has is not: what a view has not changed has as many as the
/// tree says.
fn stat(path: &Path) -> io::Result<Vec<u8>> {
    let told = fs::symlink_metadata(path)?;
    let size = if told.is_dir() { 0 } else { told.len() };
    let text = format!("{:o} {}:{} {size} {}", told.mode(), told.uid(), told.gid(), told.rdev());
    Ok(text.into_bytes())
}

/// Everything below a directory, a line each.
pub(crate) fn snapshot(top: &Path) -> Vec<String> {
    let mut lines = Vec::new();
    let mut linked = std::collections::BTreeMap::new();
    let mut pending = vec![top.to_owned()];
    while let Some(path) = pending.pop() {
        let told = fs::symlink_metadata(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        let name = path.strip_prefix(top).unwrap().to_owned();
        let mut line = format!("{} {}", name.display(), String::from_utf8(stat(&path).unwrap()).unwrap());
        let mut xattrs: Vec<_> = xattr::list(&path)
            .unwrap()
            .filter(|name| name.to_string_lossy().starts_with("user."))
            .map(|name| {
                let value = xattr::get(&path, &name);
                let value = value.unwrap_or_else(|error| panic!("{line}: {name:?}: {error}"));
                (name, value)
            })
            .collect();
        xattrs.sort();
        line += &format!(" {xattrs:?}");
        if told.is_dir() {
            let mut entries: Vec<_> =
                fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()).collect();
            entries.sort();
            pending.extend(entries);
        } else if told.is_symlink() {
            line += &format!(" -> {:?}", fs::read_link(&path).unwrap());
        } else if told.is_file() {
            line += &format!(" {}", kiln_contract::Digest::of(&fs::read(&path).unwrap()).hex());
        }
        if !told.is_dir() {
            linked.entry(told.ino()).or_insert_with(Vec::new).push(name.display().to_string());
        }
        lines.push(line);
    }
    for mut names in linked.into_values().filter(|names| names.len() > 1) {
        names.sort();
        lines.push(format!("one file: {}", names.join(" ")));
    }
    lines.sort();
    lines
}
