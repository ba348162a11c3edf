//! Files of the host that may be changed while they are read: each is staged as it was at one moment.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{Read as _, Seek as _};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt as _;
use std::path::PathBuf;

use kiln_erofs::{Data, INLINE_LIMIT, Xattrs};
use rustix::fs::{Mode, OFlags, Stat};
use rustix::io::Errno;

use super::{ObjectWriter, SeenFile};
use crate::error::Context as _;
use crate::host_xattrs::xattrs_of;
use crate::stamp::{Stamp, await_writes, pause};
use crate::{Result, StoreError};

/// What is read at once, in bytes.
const BUFFER: usize = 256 << 10;
/// How often a file is read that is being changed meanwhile.
const READS: u32 = 6;

/// An open directory, and its path for messages.
#[derive(Debug)]
pub(crate) struct HostDirectory {
    pub(crate) handle: OwnedFd,
    pub(crate) path: PathBuf,
}

/// What a file of the host was when it was read.
#[derive(Debug)]
pub(crate) struct HostFile {
    pub(crate) stat: Stat,
    pub(crate) xattrs: Xattrs,
}

impl ObjectWriter<'_> {
    /// Stages a file of the host that the walker has seen, as it was at one moment. If that was a later one, what the file
    /// was then is told too.
    pub(super) fn host_file(
        &self,
        directory: &HostDirectory,
        SeenFile { slot, name, stamp: seen }: &SeenFile,
        buffer: &mut Vec<u8>,
    ) -> Result<(Data, Option<Box<HostFile>>)> {
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW | OFlags::NONBLOCK;
        let path = || directory.path.join(OsStr::from_bytes(name));
        let changing = |attempts| StoreError::Changing { path: path(), attempts };
        let mut file = match rustix::fs::openat(&directory.handle, name.as_slice(), flags, Mode::empty()) {
            Ok(file) => File::from(file),
            // It has another name now, or none, or is another file: only the walker can tell.
            Err(Errno::NOENT | Errno::LOOP | Errno::NXIO) => return Err(changing(1)),
            Err(error) => return Err(error).doing("open", path()),
        };
        let stat = |file: &File| rustix::fs::fstat(file).doing("read", path());
        let mut before = Stamp::of(&stat(&file)?);
        if !before.is_same_file(seen) {
            return Err(changing(1));
        }
        for attempt in 1..=READS {
            before.settle();
            await_writes(&file);
            file.rewind().doing("read", path())?;
            let xattrs = if before == *seen { None } else { Some(xattrs_of(&file).doing("read", path())?) };
            let read = self.read(*slot, (&mut file, before.size()), buffer, path, |file| {
                let now = stat(file)?;
                Ok((Stamp::of(&now) == before).then_some(now))
            })?;
            if let Some((data, stat)) = read {
                return Ok((data, xattrs.map(|xattrs| Box::new(HostFile { stat, xattrs }))));
            }
            pause(attempt);
            before = Stamp::of(&stat(&file)?);
        }
        Err(changing(READS))
    }

    /// Stages what is in a file of some size, if `same` says when all of it has been read that it is what it was.
    fn read(
        &self,
        slot: u32,
        (file, size): (&mut File, u64),
        buffer: &mut Vec<u8>,
        path: impl Fn() -> PathBuf,
        same: impl FnOnce(&File) -> Result<Option<Stat>>,
    ) -> Result<Option<(Data, Stat)>> {
        buffer.resize(BUFFER, 0);
        // One byte more, to see whether it is longer than it says, as files of some file systems are.
        let most = size.saturating_add(1).min(BUFFER as u64) as usize;
        let mut have = fill(file, &mut buffer[..most]).doing("read", path())?;
        if have == most && most < BUFFER {
            have += fill(file, &mut buffer[most..]).doing("read", path())?;
        }
        if have < BUFFER {
            let Some(stat) = same(file)? else { return Ok(None) };
            let data = if have <= INLINE_LIMIT {
                Data::Inline(buffer[..have].to_vec())
            } else {
                self.put_and_keep(&buffer[..have])?
            };
            return Ok(Some((data, stat)));
        }
        let mut incoming = self.incoming(slot)?;
        while have > 0 {
            if buffer[..have].iter().all(|byte| *byte == 0) {
                incoming.zeros(have as u64);
            } else {
                incoming.data(&buffer[..have])?;
            }
            have = fill(file, buffer).doing("read", path())?;
        }
        match same(file)? {
            Some(stat) => incoming.end().map(|data| Some((data, stat))),
            None => incoming.discard().map(|()| None),
        }
    }
}

/// Reads until `buffer` is full or the file ends.
fn fill(file: &mut File, buffer: &mut [u8]) -> std::io::Result<usize> {
    let mut have = 0;
    while have < buffer.len() {
        match file.read(&mut buffer[have..]) {
            Ok(0) => break,
            Ok(count) => have += count,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(have)
}
