//! Tar archives of directories that somebody else controls.
//!
//! Both directions of `kiln cp`, and the first filling of a volume, read or write a tree whose owner is not trusted: a
//! container may swap a directory for a symbolic link at any moment, and an archive may say any name. Every path is
//! therefore resolved by the kernel below a directory that is held open (`openat2(2)`), never by string.

mod entries;
mod pack;
mod unpack;

use std::fmt;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Component, Path, PathBuf};

use rustix::fs::{Mode, OFlags, ResolveFlags, openat2};

pub use pack::pack;
pub use unpack::{Unpack, unpack};

/// A failure that names the entry it happened at.
#[derive(Debug)]
pub struct ArchiveError {
    entry: PathBuf,
    doing: &'static str,
    source: io::Error,
}

impl ArchiveError {
    fn new(entry: impl Into<PathBuf>, doing: &'static str, source: impl Into<io::Error>) -> Self {
        Self { entry: entry.into(), doing, source: source.into() }
    }

    /// What kind of I/O error it was.
    pub fn kind(&self) -> io::ErrorKind {
        self.source.kind()
    }
}

impl fmt::Display for ArchiveError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "cannot {} `{}`", self.doing, self.entry.display())
    }
}

impl std::error::Error for ArchiveError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        Some(&self.source)
    }
}

/// How a path is resolved.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Confine {
    /// As a process sees it whose root is the directory: `..` and absolute links end at it.
    InRoot,
    /// What would leave the directory is an error.
    Beneath,
}

/// A directory below which every path is resolved.
#[derive(Debug)]
pub struct Base {
    directory: OwnedFd,
    confine: Confine,
}

impl Base {
    /// A base at `directory`, which is opened as the calling process sees it.
    ///
    /// # Errors
    /// If it is not there or is no directory.
    pub fn open(directory: &Path, confine: Confine) -> io::Result<Self> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        Ok(Self { directory: rustix::fs::open(directory, flags, Mode::empty())?, confine })
    }

    /// A base at the directory `path` below another base.
    ///
    /// # Errors
    /// As [`resolve`](Self::resolve); `ENOTDIR`.
    pub fn open_below(other: &Self, path: &Path) -> io::Result<Self> {
        Ok(Self { directory: other.directory(path)?, confine: other.confine })
    }

    /// Opens `path` below the base. With `O_NOFOLLOW` the last part is not followed.
    ///
    /// # Errors
    /// `EXDEV` where `path` leads out of the base (`Beneath` only), else as openat2(2).
    pub fn resolve(&self, path: &Path, flags: OFlags) -> io::Result<OwnedFd> {
        let confine = match self.confine {
            Confine::InRoot => ResolveFlags::IN_ROOT,
            Confine::Beneath => ResolveFlags::BENEATH,
        };
        let relative = path.strip_prefix("/").unwrap_or(path);
        let path = if relative.as_os_str().is_empty() { Path::new(".") } else { relative };
        // The kernel asks to try again when a rename raced with `..`.
        for _ in 0..64 {
            let resolve = confine | ResolveFlags::NO_MAGICLINKS;
            match openat2(&self.directory, path, flags | OFlags::CLOEXEC, Mode::empty(), resolve) {
                Err(rustix::io::Errno::AGAIN) => {}
                other => return Ok(other?),
            }
        }
        Err(rustix::io::Errno::AGAIN.into())
    }

    /// Opens the directory `path` below the base.
    ///
    /// # Errors
    /// As [`resolve`](Self::resolve); `ENOTDIR`.
    pub fn directory(&self, path: &Path) -> io::Result<OwnedFd> {
        self.resolve(path, OFlags::PATH | OFlags::DIRECTORY)
    }
}

impl AsFd for Base {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.directory.as_fd()
    }
}

/// The directory part and the last part of a path, after `.` and doubled slashes are gone. `None` for the root itself
/// and for paths that end in `..`.
fn split(path: &Path) -> Option<(PathBuf, PathBuf)> {
    let mut parts: Vec<&std::ffi::OsStr> = Vec::new();
    let mut last_is_name = false;
    for component in path.components() {
        match component {
            Component::Normal(name) => {
                parts.push(name);
                last_is_name = true;
            }
            Component::ParentDir => {
                parts.push("..".as_ref());
                last_is_name = false;
            }
            Component::RootDir | Component::CurDir | Component::Prefix(_) => {}
        }
    }
    let name = parts.pop().filter(|_| last_is_name)?;
    Some((parts.iter().collect(), name.into()))
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::io::Read as _;
    use std::os::unix::ffi::OsStrExt as _;
    use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, symlink};

    use super::*;

    fn archive_of(build: impl FnOnce(&mut tar::Builder<Vec<u8>>)) -> Vec<u8> {
        let mut builder = tar::Builder::new(Vec::new());
        build(&mut builder);
        builder.into_inner().unwrap()
    }

    fn entry(
        builder: &mut tar::Builder<Vec<u8>>,
        name: &[u8],
        kind: tar::EntryType,
        link: &str,
        data: &[u8],
    ) {
        let mut header = tar::Header::new_gnu();
        header.as_mut_bytes()[..name.len()].copy_from_slice(name);
        header.set_entry_type(kind);
        header.set_size(data.len() as u64);
        header.set_mode(0o644);
        header.set_uid(rustix::process::geteuid().as_raw().into());
        header.set_gid(rustix::process::getegid().as_raw().into());
        if !link.is_empty() {
            header.as_mut_bytes()[157..157 + link.len()].copy_from_slice(link.as_bytes());
        }
        header.set_cksum();
        builder.append(&header, data).unwrap();
    }

    #[test]
    fn no_entry_leaves_the_directory() {
        use tar::EntryType::{Link, Regular, Symlink};
        let table: [(&str, Vec<u8>); 6] = [
            ("dot dot", archive_of(|b| entry(b, b"../outside", Regular, "", b"x"))),
            ("dot dot inside", archive_of(|b| entry(b, b"a/../../outside", Regular, "", b"x"))),
            (
                "through a link",
                archive_of(|b| {
                    entry(b, b"l", Symlink, "..", b"");
                    entry(b, b"l/outside", Regular, "", b"x");
                }),
            ),
            (
                "through an absolute link",
                archive_of(|b| {
                    entry(b, b"l", Symlink, "/", b"");
                    entry(b, b"l/kiln-outside", Regular, "", b"x");
                }),
            ),
            ("hard link out", archive_of(|b| entry(b, b"h", Link, "../secret", b""))),
            (
                "hard link out through a link",
                archive_of(|b| {
                    entry(b, b"l", Symlink, "..", b"");
                    entry(b, b"h", Link, "l/secret", b"");
                }),
            ),
        ];
        for (what, archive) in table {
            let directory = tempfile::tempdir().unwrap();
            fs::create_dir(directory.path().join("in")).unwrap();
            fs::write(directory.path().join("secret"), "s").unwrap();
            let base = Base::open(&directory.path().join("in"), Confine::Beneath).unwrap();
            let result = unpack(&base, Path::new(""), &mut &archive[..], &Unpack::default());
            assert!(result.is_err(), "{what}");
            assert!(!directory.path().join("outside").exists(), "{what}");
            assert!(!Path::new("/kiln-outside").exists(), "{what}");
            assert_eq!(fs::metadata(directory.path().join("secret")).unwrap().nlink(), 1, "{what}");
        }
    }

    #[test]
    fn an_absolute_name_is_taken_as_one_below_the_directory() {
        let archive = archive_of(|b| entry(b, b"/etc/f", tar::EntryType::Regular, "", b"x"));
        let directory = tempfile::tempdir().unwrap();
        let base = Base::open(directory.path(), Confine::Beneath).unwrap();
        unpack(&base, Path::new(""), &mut &archive[..], &Unpack::default()).unwrap();
        assert_eq!(fs::read(directory.path().join("etc/f")).unwrap(), b"x");
    }

    #[test]
    fn links_of_a_root_are_followed_inside_it() {
        let directory = tempfile::tempdir().unwrap();
        fs::create_dir_all(directory.path().join("usr/lib")).unwrap();
        symlink("/usr/lib", directory.path().join("lib")).unwrap();
        let archive = archive_of(|b| entry(b, b"f", tar::EntryType::Regular, "", b"x"));
        let base = Base::open(directory.path(), Confine::InRoot).unwrap();
        unpack(&base, Path::new("/lib"), &mut &archive[..], &Unpack::default()).unwrap();
        assert_eq!(fs::read(directory.path().join("usr/lib/f")).unwrap(), b"x");
    }

    #[test]
    fn a_directory_is_not_replaced_by_a_file_nor_a_file_by_a_directory() {
        use tar::EntryType::{Directory, Regular};
        let directory = tempfile::tempdir().unwrap();
        fs::create_dir(directory.path().join("d")).unwrap();
        fs::write(directory.path().join("f"), "old").unwrap();
        let base = Base::open(directory.path(), Confine::Beneath).unwrap();
        for archive in [
            archive_of(|b| entry(b, b"d", Regular, "", b"x")),
            archive_of(|b| entry(b, b"f", Directory, "", b"")),
        ] {
            assert!(unpack(&base, Path::new(""), &mut &archive[..], &Unpack::default()).is_err());
        }
        assert!(directory.path().join("d").is_dir());
        assert_eq!(fs::read(directory.path().join("f")).unwrap(), b"old");
    }

    #[test]
    fn what_is_packed_unpacks_the_same() {
        let from = tempfile::tempdir().unwrap();
        let long = "n".repeat(200);
        let odd = std::ffi::OsStr::from_bytes(b"odd-\xff\n");
        let top = from.path().join("top");
        fs::create_dir(&top).unwrap();
        fs::write(top.join("file"), vec![7; 100_000]).unwrap();
        fs::set_permissions(top.join("file"), fs::Permissions::from_mode(0o4751)).unwrap();
        fs::write(top.join(&long), "long").unwrap();
        fs::write(top.join(odd), "odd").unwrap();
        fs::hard_link(top.join("file"), top.join("hard")).unwrap();
        symlink("../elsewhere", top.join("soft")).unwrap();
        xattr::set(top.join("file"), "user.note", b"\0\xffn\n").unwrap();
        fs::create_dir(top.join("sub")).unwrap();
        fs::set_permissions(top.join("sub"), fs::Permissions::from_mode(0o1500)).unwrap();

        let mut archive = Vec::new();
        let base = Base::open(from.path(), Confine::InRoot).unwrap();
        pack(&base, Path::new("/top"), false, &mut archive).unwrap();

        let to = tempfile::tempdir().unwrap();
        let base = Base::open(to.path(), Confine::Beneath).unwrap();
        unpack(&base, Path::new(""), &mut &archive[..], &Unpack { owners: true, devices: true }).unwrap();
        let top_after = to.path().join("top");
        for name in ["file".as_ref(), long.as_ref(), odd, "hard".as_ref(), "soft".as_ref(), "sub".as_ref()] {
            let (before, after) = (
                fs::symlink_metadata(top.join(name)).unwrap(),
                fs::symlink_metadata(top_after.join(name)).unwrap(),
            );
            let facts = |m: &fs::Metadata| (m.mode(), m.uid(), m.gid(), m.mtime(), m.nlink());
            assert_eq!(facts(&before), facts(&after), "{}", name.display());
        }
        assert_eq!(fs::read(top_after.join("hard")).unwrap(), vec![7; 100_000]);
        assert_eq!(fs::read_link(top_after.join("soft")).unwrap(), Path::new("../elsewhere"));
        assert_eq!(xattr::get(top_after.join("file"), "user.note").unwrap().unwrap(), b"\0\xffn\n");
        fs::set_permissions(top.join("sub"), fs::Permissions::from_mode(0o700)).unwrap();
        fs::set_permissions(top_after.join("sub"), fs::Permissions::from_mode(0o700)).unwrap();
    }

    #[test]
    fn a_link_is_packed_as_itself_or_as_what_it_points_to() {
        let from = tempfile::tempdir().unwrap();
        fs::write(from.path().join("file"), "data").unwrap();
        symlink("/file", from.path().join("link")).unwrap();
        let base = Base::open(from.path(), Confine::InRoot).unwrap();
        for (follow, kind) in [(false, tar::EntryType::Symlink), (true, tar::EntryType::Regular)] {
            let mut archive = Vec::new();
            pack(&base, Path::new("link"), follow, &mut archive).unwrap();
            let mut reader = tar::Archive::new(&archive[..]);
            let mut first = reader.entries().unwrap().next().unwrap().unwrap();
            assert_eq!(first.header().entry_type(), kind);
            assert_eq!(first.path().unwrap(), Path::new("link"));
            let mut data = String::new();
            first.read_to_string(&mut data).unwrap();
            assert_eq!(data, if follow { "data" } else { "" });
        }
    }

    #[test]
    fn paths_split_into_directory_and_name() {
        let table = [
            ("/a/b", Some(("a", "b"))),
            ("b", Some(("", "b"))),
            ("/a//./b/.", Some(("a", "b"))),
            ("../b", Some(("..", "b"))),
            ("/", None),
            ("a/..", None),
        ];
        for (path, parts) in table {
            assert_eq!(split(Path::new(path)), parts.map(|(d, n)| (d.into(), n.into())), "{path}");
        }
    }
}
