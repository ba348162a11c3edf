//! Large files of archives, written past the page cache: where the kernel is translated, filling its pages takes several times
//! as long as all that brings the bytes here.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt as _;
use std::path::{Component, Path};

use rustix::fs::{
    AtFlags, Gid, Mode, OFlags, ResolveFlags, Timespec, Timestamps, UTIME_OMIT, Uid, fchmod, fchown,
    fcntl_getfl, fcntl_setfl, futimens, openat, openat2, unlinkat,
};
use rustix::io::Errno;
use tar::{Entry, EntryType};

/// Files from this size on, in bytes, are large.
const LARGE: u64 = 1 << 20;
/// What is written at once, in bytes.
const PIECE: usize = 1 << 20;
/// What the addresses, places and lengths of such writes are multiples of, in bytes: no file system here asks for more.
const ALIGNMENT: usize = 4096;

/// Writes an entry below the directory `at`, if it is a large file whose place is there already and can be reached without
/// leaving `at`. Whether it did.
pub(super) fn unpack<R: Read>(entry: &mut Entry<'_, R>, at: &OwnedFd) -> io::Result<bool> {
    if entry.header().entry_type() != EntryType::Regular || entry.size() < LARGE {
        return Ok(false);
    }
    let path = entry.path()?.into_owned();
    let is_plain = |part: Component<'_>| matches!(part, Component::Normal(_) | Component::CurDir);
    let (Some(parent), Some(name), true) = (path.parent(), path.file_name(), path.components().all(is_plain))
    else {
        return Ok(false);
    };
    let parent = if parent.as_os_str().is_empty() { Path::new(".") } else { parent };
    let (flags, beneath) = (OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, ResolveFlags::BENEATH);
    let Ok(parent) = openat2(at, parent, flags, Mode::empty(), beneath) else { return Ok(false) };
    match unlinkat(&parent, name, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => {}
        Err(_) => return Ok(false),
    }
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let own = Mode::RUSR | Mode::WUSR;
    let file = match openat(&parent, name, flags | OFlags::DIRECT, own) {
        // A file system that has nothing but its page cache.
        Err(Errno::INVAL) => openat(&parent, name, flags, own),
        opened => opened,
    };
    let file = File::from(file?);
    let size = entry.size();
    let written = write(entry, &file)?;
    if written != size {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    let header = entry.header();
    let (uid, gid) = (id(header.uid()?)?, id(header.gid()?)?);
    fchown(&file, Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)))?;
    fchmod(&file, Mode::from_raw_mode(header.mode()?))?;
    let modified = Timespec { tv_sec: header.mtime()?.cast_signed(), tv_nsec: 0 };
    let omitted = Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT };
    futimens(&file, &Timestamps { last_access: omitted, last_modification: modified })?;
    Ok(true)
}

fn id(number: u64) -> io::Result<u32> {
    number.try_into().map_err(|_| io::Error::new(io::ErrorKind::InvalidData, "an id has 32 bits"))
}

/// Copies all that there is. Returns how many bytes that was.
fn write(from: &mut dyn Read, file: &File) -> io::Result<u64> {
    let mut space = vec![0; PIECE + ALIGNMENT];
    let start = space.as_ptr().align_offset(ALIGNMENT);
    let piece = &mut space[start..start + PIECE];
    let mut written = 0;
    loop {
        let count = fill(from, piece)?;
        // The end of the file.
        if count % ALIGNMENT != 0 {
            go_through_the_cache(file)?;
        }
        match file.write_all_at(&piece[..count], written) {
            // It asks for more.
            Err(error) if error.raw_os_error() == Some(Errno::INVAL.raw_os_error()) => {
                go_through_the_cache(file)?;
                file.write_all_at(&piece[..count], written)?;
            }
            wrote => wrote?,
        }
        written += count as u64;
        if count < PIECE {
            return Ok(written);
        }
    }
}

fn go_through_the_cache(file: &File) -> io::Result<()> {
    Ok(fcntl_setfl(file, fcntl_getfl(file)? - OFlags::DIRECT)?)
}

/// Reads until `piece` is full or there is no more.
fn fill(from: &mut dyn Read, piece: &mut [u8]) -> io::Result<usize> {
    let mut count = 0;
    while count < piece.len() {
        match from.read(&mut piece[count..]) {
            Ok(0) => break,
            Ok(read) => count += read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(count)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::{MetadataExt as _, symlink};

    use super::super::unpack_at;
    use super::*;

    const SIZES: [usize; 6] =
        [PIECE, PIECE + 1, PIECE + ALIGNMENT, 2 * PIECE, 2 * PIECE - 1, 3 * PIECE + 513];

    fn archive(files: &[(&str, usize)]) -> Vec<u8> {
        let mut archive = tar::Builder::new(Vec::new());
        for (name, size) in files {
            let mut header = tar::Header::new_gnu();
            header.set_size(*size as u64);
            header.set_mode(0o4751);
            header.set_uid(rustix::process::geteuid().as_raw().into());
            header.set_gid(rustix::process::getegid().as_raw().into());
            header.set_mtime(1_000_000_007);
            header.as_gnu_mut().unwrap().name[..name.len()].copy_from_slice(name.as_bytes());
            header.set_cksum();
            archive.append(&header, &content(*size)[..]).unwrap();
        }
        archive.into_inner().unwrap()
    }

    fn content(size: usize) -> Vec<u8> {
        (0..size).map(|index| (index / 7 % 251) as u8).collect()
    }

    #[test]
    fn large_files_arrive_as_they_are_on_disks_and_in_memory() {
        for place in [std::env::current_dir().unwrap(), "/dev/shm".into()] {
            let directory = tempfile::tempdir_in(place).unwrap();
            let names: Vec<_> = SIZES.iter().map(|size| format!("file{size}")).collect();
            let files: Vec<_> = names.iter().map(String::as_str).zip(SIZES).collect();
            // Over what is there, too.
            fs::write(directory.path().join(&names[0]), "before").unwrap();
            unpack_at(directory.path(), &mut &archive(&files)[..]).unwrap();
            for (name, size) in files {
                let path = directory.path().join(name);
                let metadata = path.symlink_metadata().unwrap();
                assert_eq!((metadata.mode() & 0o7777, metadata.mtime()), (0o4751, 1_000_000_007), "{name}");
                assert!(fs::read(&path).unwrap() == content(size), "{name}");
            }
        }
    }

    #[test]
    fn large_files_stay_below_and_an_archive_that_ends_early_is_an_error() {
        let (outside, directory) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        symlink(outside.path(), directory.path().join("out")).unwrap();
        fs::write(outside.path().join("victim"), "mine").unwrap();
        symlink(outside.path().join("victim"), directory.path().join("link")).unwrap();
        for name in ["out/new", "out/victim"] {
            assert!(unpack_at(directory.path(), &mut &archive(&[(name, PIECE)])[..]).is_err(), "{name}");
        }
        for name in ["../new", "link", "sub/new", "/rooted"] {
            unpack_at(directory.path(), &mut &archive(&[(name, PIECE)])[..]).unwrap();
        }
        assert_eq!(fs::read(outside.path().join("victim")).unwrap(), b"mine");
        assert_eq!(fs::read_dir(outside.path()).unwrap().count(), 1);
        assert!(!directory.path().join("../new").exists());
        for name in ["link", "sub/new", "rooted"] {
            assert_eq!(directory.path().join(name).symlink_metadata().unwrap().len(), PIECE as u64, "{name}");
        }
        let whole = archive(&[("short", 2 * PIECE)]);
        assert!(unpack_at(directory.path(), &mut &whole[..PIECE]).is_err());
    }
}
