//! What lands where: Docker's rules for `cp`.

use std::path::{Path, PathBuf};

use crate::error::{CliError, Result};

/// What is at a path; symbolic links are what they point to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Directory,
    File,
}

/// What is copied.
#[derive(Debug, Clone)]
pub(super) struct Source {
    /// Without a final `/.`.
    pub(super) path: PathBuf,
    /// It ended in `/.`: what is in it, not it.
    pub(super) entries_only: bool,
}

impl Source {
    pub(super) fn new(path: &Path) -> Self {
        use std::os::unix::ffi::OsStrExt;
        let bytes = path.as_os_str().as_bytes();
        let entries_only = bytes.ends_with(b"/.") || bytes == b".";
        let path = match bytes.strip_suffix(b"/.") {
            Some(b"") => PathBuf::from("/"),
            Some(rest) => PathBuf::from(std::ffi::OsStr::from_bytes(rest)),
            None => path.to_owned(),
        };
        Self { path, entries_only }
    }
}

/// Where the archive is unpacked, and what its topmost entry is called there. Without a name its entries are put
/// into the directory themselves.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Placement {
    pub(super) directory: PathBuf,
    pub(super) name: Option<PathBuf>,
}

/// Decides where `source` of this kind goes, if `there` is what is at `to`.
pub(super) fn place(source: &Source, kind: Kind, to: &Path, there: Option<Kind>) -> Result<Placement> {
    use std::os::unix::ffi::OsStrExt;
    let shown = to.display();
    let wants_directory =
        to.as_os_str().as_bytes().ends_with(b"/") || to.as_os_str().as_bytes().ends_with(b"/.");
    match (kind, there) {
        (Kind::Directory, Some(Kind::File)) => {
            Err(CliError::failed(format!("cannot copy a directory to {shown}, which is a file")))
        }
        (Kind::File, Some(Kind::File)) if wants_directory => {
            Err(CliError::failed(format!("{shown} is not a directory")))
        }
        (Kind::File, None) if wants_directory => {
            Err(CliError::failed(format!("there is no directory {shown}"))
                .with_hint("leave out the trailing `/` to copy the file under that name"))
        }
        (Kind::Directory, Some(Kind::Directory)) if source.entries_only => {
            Ok(Placement { directory: to.to_owned(), name: None })
        }
        (_, Some(Kind::Directory)) => {
            let name = source.path.file_name().map(PathBuf::from);
            Ok(Placement { directory: to.to_owned(), name })
        }
        (_, Some(Kind::File) | None) => {
            let name = to.file_name().map(PathBuf::from);
            let name = name
                .ok_or_else(|| CliError::failed(format!("{shown} has no last part to name the copy by")))?;
            let directory = match to.parent() {
                Some(parent) if parent.as_os_str().is_empty() => PathBuf::from("."),
                Some(parent) => parent.to_owned(),
                None => PathBuf::from("/"),
            };
            Ok(Placement { directory, name: Some(name) })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copies_land_where_docker_puts_them() {
        use Kind::{Directory, File};
        // source, its kind, destination, what is there, directory and name
        let table = [
            ("/a/f", File, "new", None, Some((".", Some("new")))),
            ("/a/f", File, "/x/new", None, Some(("/x", Some("new")))),
            ("/a/f", File, "/x/new/", None, None),
            ("/a/f", File, "/x/old", Some(File), Some(("/x", Some("old")))),
            ("/a/f", File, "/x/old/", Some(File), None),
            ("/a/f", File, "/x", Some(Directory), Some(("/x", Some("f")))),
            ("/a/f", File, ".", Some(Directory), Some((".", Some("f")))),
            ("/a/d", Directory, "/x/new", None, Some(("/x", Some("new")))),
            ("/a/d", Directory, "/x/new/", None, Some(("/x", Some("new")))),
            ("/a/d", Directory, "/x/old", Some(File), None),
            ("/a/d", Directory, "/x", Some(Directory), Some(("/x", Some("d")))),
            ("/a/d/.", Directory, "/x", Some(Directory), Some(("/x", None))),
            ("/a/d/.", Directory, "/x/new", None, Some(("/x", Some("new")))),
            ("/a/d/.", Directory, "/x/old", Some(File), None),
            ("/.", Directory, "/x", Some(Directory), Some(("/x", None))),
        ];
        for (from, kind, to, there, expected) in table {
            let got = place(&Source::new(Path::new(from)), kind, Path::new(to), there).ok();
            let expected = expected.map(|(directory, name)| Placement {
                directory: directory.into(),
                name: name.map(PathBuf::from),
            });
            assert_eq!(got, expected, "{from} {kind:?} {to} {there:?}");
        }
    }
}
