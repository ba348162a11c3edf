//! What is shared, and how it is opened on the host.

use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::path::Path;
use std::sync::Arc;

use rustix::fs::{CWD, FileType, Mode, OFlags, Statx, openat};
use rustix::io::Errno;
use rustix::process::{Resource, Rlimit, geteuid, getrlimit, setrlimit};

use crate::node::{HostNode, Node};
use crate::qid::Paths;
use crate::{Options, Ownership, ShareError};

/// A directory or a file of the host, ready to be served to a guest.
///
/// One value serves one mount, as often as the guest connects anew; every connection begins without any fids. Cloning it is
/// cheap and gives the same share.
#[derive(Debug, Clone)]
pub struct Share {
    pub(crate) tree: Arc<Tree>,
}

/// What all sessions of a share have in common.
#[derive(Debug)]
pub(crate) struct Tree {
    pub(crate) root: Root,
    pub(crate) paths: Paths,
    pub(crate) options: Options,
    /// The path as it was asked for, for messages.
    pub(crate) name: String,
    /// Files are given to the guest's users who make them.
    pub(crate) gives_away: bool,
}

#[derive(Debug)]
pub(crate) enum Root {
    Directory(Arc<Node>),
    /// One file: the directory that it is in, and its name there. The directory itself is never shown.
    File {
        directory: HostNode,
        name: Box<[u8]>,
    },
}

impl Share {
    /// Shares a directory and everything below it, mounts of the host included. Symbolic links in `path` itself are
    /// followed, now and never again: if the directory is renamed, it stays shared.
    ///
    /// # Errors
    /// There is no such directory, it may not be opened, or an option is outside of its range.
    pub fn directory(path: impl AsRef<Path>, options: Options) -> Result<Self, ShareError> {
        let path = path.as_ref();
        options.check()?;
        let open = |source: io::Error| ShareError::Open { path: path.to_owned(), source };
        let wrong = ShareError::WrongKind { path: path.to_owned(), wanted: "directory" };
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let descriptor = openat(CWD, path, flags, Mode::empty()).map_err(|error| match error {
            Errno::NOTDIR if path.symlink_metadata().is_ok() => wrong,
            error => open(error.into()),
        })?;
        let (node, stat) = HostNode::new(descriptor).map_err(|error| open(error.into()))?;
        check_proc(&node, path)?;
        Ok(Self::new(Root::Directory(Arc::new(Node::Host(node))), &stat, path, options))
    }

    /// Shares a single regular file. The guest gets a directory with that one file in it, under the name that it has
    /// on the host behind all symbolic links ([`Share::file_name`]); it can neither be renamed nor removed.
    ///
    /// The file is looked up by that name each time the guest does, so that one that is replaced on the
    /// host, as editors do it, is seen.
    ///
    /// # Errors
    /// There is no such file, it is not a regular one, or an option is outside of its range.
    pub fn file(path: impl AsRef<Path>, options: Options) -> Result<Self, ShareError> {
        let path = path.as_ref();
        options.check()?;
        let open = |source: io::Error| ShareError::Open { path: path.to_owned(), source };
        let wrong = || ShareError::WrongKind { path: path.to_owned(), wanted: "regular file" };
        let real = path.canonicalize().map_err(open)?;
        let (Some(parent), Some(name)) = (real.parent(), real.file_name()) else { return Err(wrong()) };
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let descriptor = openat(CWD, parent, flags, Mode::empty()).map_err(|error| open(error.into()))?;
        let (directory, _) = HostNode::new(descriptor).map_err(|error| open(error.into()))?;
        let (file, stat) = directory.child(name.as_bytes()).map_err(|error| open(error.into()))?;
        if file.kind != FileType::RegularFile {
            return Err(wrong());
        }
        check_proc(&directory, path)?;
        let root = Root::File { directory, name: name.as_bytes().into() };
        Ok(Self::new(root, &stat, path, options))
    }

    fn new(root: Root, stat: &Statx, path: &Path, options: Options) -> Self {
        let gives_away = options.ownership == Ownership::Host && geteuid().is_root();
        let device = crate::qid::Identity::of(stat).device;
        let name = path.display().to_string();
        Self { tree: Arc::new(Tree { root, paths: Paths::new(device), options, name, gives_away }) }
    }

    /// The name of a single file in the directory that the guest mounts; `None` for a shared directory.
    #[must_use]
    pub fn file_name(&self) -> Option<OsString> {
        match &self.tree.root {
            Root::Directory(_) => None,
            Root::File { name, .. } => Some(OsString::from_vec(name.to_vec())),
        }
    }
}

impl Tree {
    /// The one file of a share of a single file. What is not a regular file any more is not there.
    pub(crate) fn single(&self) -> Result<(HostNode, Statx), Errno> {
        match &self.root {
            Root::File { directory, name } => {
                let (file, stat) = directory.child(name)?;
                if file.kind == FileType::RegularFile { Ok((file, stat)) } else { Err(Errno::NOENT) }
            }
            Root::Directory(_) => Err(Errno::NOENT),
        }
    }

    /// Whether this directory is the root, above which the guest sees nothing.
    pub(crate) fn is_root(&self, node: &HostNode) -> bool {
        match &self.root {
            Root::Directory(root) => root.host().is_ok_and(|root| root.identity == node.identity),
            Root::File { .. } => false,
        }
    }
}

/// Files are opened through `/proc/self/fd`: it must lead to this process's own descriptors.
fn check_proc(node: &HostNode, path: &Path) -> Result<(), ShareError> {
    let missing = || ShareError::NoProc { path: path.to_owned() };
    let found = rustix::fs::open(node.path(), OFlags::PATH | OFlags::CLOEXEC, Mode::empty());
    let (found, _) = found.and_then(HostNode::new).map_err(|_| missing())?;
    let proc = File::open("/proc/self/fd").map_err(|_| missing())?;
    let kind = rustix::fs::fstatfs(proc.as_fd()).map_err(|_| missing())?;
    // Whoever could mount something else over it could give us any file for any other.
    if found.identity == node.identity && kind.f_type == rustix::fs::PROC_SUPER_MAGIC {
        Ok(())
    } else {
        Err(missing())
    }
}

/// Raises this process's limit of open descriptors to the highest that it may set. Guests that keep large trees in their caches
/// need it: each file that they know takes up to two descriptors.
///
/// Programs that this process starts inherit it.
pub fn raise_descriptor_limit() {
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    // A refusal leaves the limit as it was, which guests with few files never see.
    if current != maximum && setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum }).is_err() {
        tracing::debug!("the limit of open descriptors stays at {current:?}");
    }
}
