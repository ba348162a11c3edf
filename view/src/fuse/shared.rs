//! Many trees on one connection: whose root is seen depends on who asks.
//!
//! A request for the root, or for a name in it, goes to the tree of the process that makes it. Everything below has a
//! number that says of which tree it is ([`Space`]), so that nobody is asked for again, and the kernel may keep it for ever.
//! Of the root it keeps nothing. Who has no tree sees an empty directory.
//!
//! What the kernel is never told here: that it need not ask again (`ENOSYS`) where one tree has no use for a request but another
//! has. Such an answer holds for the whole connection.

mod requests;

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, RwLock, RwLockReadGuard};

use fuser::{BackgroundSession, Errno, Filesystem, INodeNo, Session};
use kiln_contract::{BackendError, ErrorKind, Scratch};
use kiln_erofs::Image;
use memmap2::Mmap;

use self::requests::Shared;
use super::Owners;
use super::edit::{Among, Editable, Upper};
use super::server::{Served, session};
use super::space::{Share, Space};
use super::state::{Changes, State};
use crate::mounting::{Host, Kind, Mounting as _};
use crate::objects::{Fetcher, Objects};

/// Who asks.
pub(crate) trait Callers: Send + Sync + 'static {
    /// The tree that a process or thread sees.
    fn tree_of(&self, pid: u32) -> Option<Share>;
}

/// A tree to be shown.
#[derive(Debug, Clone, Copy)]
pub(crate) struct NewTree<'a> {
    pub(crate) tree: &'a Path,
    pub(crate) objects: &'a Path,
    pub(crate) scratch: Option<&'a Scratch>,
    pub(crate) owners: Owners,
    pub(crate) fetcher: Option<&'a Fetcher>,
    /// Whether nothing is to be changed in it at present.
    pub(crate) frozen: bool,
    /// What had the scratch before.
    pub(crate) earlier: &'a [Share],
}

/// A mount that many trees share. Dropping it takes it away.
pub(crate) struct SharedMount {
    target: PathBuf,
    trees: Arc<Trees>,
    session: Option<BackgroundSession>,
}

impl SharedMount {
    /// Mounts at a directory. Nobody sees anything there yet.
    pub(crate) fn mount(target: &Path, callers: Arc<dyn Callers>) -> Result<Self, BackendError> {
        let device = Host.attach(target, Kind::Shared)?;
        let trees = Arc::new(Trees { shown: RwLock::default(), last: Mutex::new(None) });
        let shared = Shared { trees: Arc::clone(&trees), callers };
        let session = session(shared, device).and_then(Session::spawn).map_err(|error| {
            let _ = Host.detach(target);
            BackendError::caused(format!("cannot serve views at {}", target.display()), error)
        })?;
        Host.read_far_ahead(target);
        Ok(Self { target: target.to_owned(), trees, session: Some(session) })
    }

    /// Where it is.
    pub(crate) fn target(&self) -> &Path {
        &self.target
    }

    /// Adds a tree. Nobody sees it before [`Callers`] say so.
    pub(crate) fn add(&self, new: &NewTree<'_>) -> Result<Share, BackendError> {
        let mut last = self.trees.last.lock().unwrap_or_else(PoisonError::into_inner);
        let next = last.map_or(Some(Share::FIRST), Share::next).ok_or_else(|| {
            let what = format!("the mount at {} has shown as many views as it can", self.target.display());
            BackendError::new(ErrorKind::State, what)
                .hint("`kiln fs service stop` ends the service; the next view starts another one")
        })?;
        let tree = Tree::open(new, Space::Share(next), &self.trees.all(new.earlier))?;
        *last = Some(next);
        self.trees.shown.write().unwrap_or_else(PoisonError::into_inner).insert(next, Arc::new(tree));
        Ok(next)
    }

    /// Another tree has the scratch of this one from now on, and will be seen instead. Whoever has something of it open, or is
    /// in a directory of it, still has that; nothing but what is open to be written is changed through it any more. `replace`
    /// has the other one be seen, while nobody who wants to change something gets an answer.
    pub(crate) fn retire(&self, share: Share, replace: impl FnOnce()) {
        let trees = self.trees.all(&[share]);
        let held: Vec<_> = trees.iter().map(|tree| (tree.changes.decide(), tree)).collect();
        replace();
        for (mut state, tree) in held {
            *state = State::Retired;
            if let Server::Editable(editable) = &tree.server {
                editable.retire();
            }
        }
    }

    /// Lets a tree not be changed any more, or again.
    ///
    /// # Errors
    /// [`ErrorKind::State`] if files of it, or of those that were there `earlier`, are open to be written.
    pub(crate) fn freeze(&self, share: Share, earlier: &[Share], frozen: bool) -> Result<(), BackendError> {
        for tree in self.trees.all(&[share]) {
            // Nobody opens a file to write to it meanwhile.
            let mut state = tree.changes.decide();
            if frozen && self.trees.all(earlier).iter().chain([&tree]).any(|tree| tree.is_written(None)) {
                let what = format!("files at {} are open for writing", self.target.display());
                return Err(BackendError::new(ErrorKind::State, what).hint("end what writes to them first"));
            }
            *state = if frozen { State::Frozen } else { State::Changing };
        }
        Ok(())
    }

    /// Whether a file of a tree is open.
    pub(crate) fn is_used(&self, share: Share) -> bool {
        self.trees.all(&[share]).iter().any(|tree| match &tree.server {
            Server::ReadOnly(served) => served.is_used(),
            Server::Editable(editable) => editable.is_used(),
        })
    }

    /// Takes a tree away. Who still uses something of it is told that it is stale.
    pub(crate) fn remove(&self, share: Share) {
        self.trees.shown.write().unwrap_or_else(PoisonError::into_inner).remove(&share);
    }
}

impl Drop for SharedMount {
    fn drop(&mut self) {
        if let Err(error) = Host.detach(&self.target) {
            tracing::warn!(%error, "a mount stays");
        }
        // It ends when the last user of the mount is gone: nobody waits for that.
        drop(self.session.take());
    }
}

struct Trees {
    shown: RwLock<HashMap<Share, Arc<Tree>>>,
    last: Mutex<Option<Share>>,
}

impl Trees {
    fn all(&self, shares: &[Share]) -> Vec<Arc<Tree>> {
        let shown = self.shown.read().unwrap_or_else(PoisonError::into_inner);
        shares.iter().filter_map(|share| shown.get(share).cloned()).collect()
    }
}

/// One tree. Its parts go in this order.
struct Tree {
    server: Server,
    changes: Arc<Changes>,
    _mapping: Arc<Mmap>,
}

enum Server {
    ReadOnly(Box<Served>),
    Editable(Editable),
}

impl Tree {
    fn open(new: &NewTree<'_>, space: Space, earlier: &[Arc<Self>]) -> Result<Self, BackendError> {
        let NewTree { tree, objects, scratch, owners, fetcher, frozen, earlier: _ } = *new;
        let mapping = Arc::new(crate::tree::map(tree)?);
        // SAFETY: what is mapped stays where it is until the mapping is dropped, which is after the server that reads it:
        // the order of the fields says so, here and in what of the server goes with requests that wait for objects.
        let bytes: &'static [u8] = unsafe { std::slice::from_raw_parts(mapping.as_ptr(), mapping.len()) };
        let image = Image::open(bytes).map_err(|error| {
            BackendError::caused(format!("cannot read the tree {}", tree.display()), error)
        })?;
        let objects = Objects::of(objects, fetcher.cloned())?;
        let changes = Arc::new(Changes::new(if frozen { State::Frozen } else { State::Changing }));
        let server = match scratch {
            None => Server::ReadOnly(Box::new(Served::among_others(image, objects, owners, space))),
            Some(scratch) => {
                let upper = Upper::open(scratch, crate::userns::is_root_of_host())?;
                let earlier = earlier.iter().filter_map(|tree| tree.editable().ok());
                let (changes, mapping) = (Arc::clone(&changes), Arc::clone(&mapping));
                let among = Among::others(space, earlier, changes, mapping);
                let editable = Editable::new(image, objects, upper, owners, among).map_err(|error| {
                    let what = format!("cannot open the scratch {}", scratch.upper.display());
                    BackendError::caused(what, error)
                })?;
                Server::Editable(editable)
            }
        };
        Ok(Self { server, changes, _mapping: mapping })
    }

    fn server(&self) -> &dyn Filesystem {
        match &self.server {
            Server::ReadOnly(served) => &**served,
            Server::Editable(editable) => editable,
        }
    }

    /// Held, what may be changed stays as it is.
    fn is_changing(&self) -> Result<RwLockReadGuard<'_, State>, Errno> {
        let state = self.changes.are_allowed().map_err(|error| Errno::from_i32(error.raw_os_error()))?;
        self.editable().map(|_| state)
    }

    /// Whether something, or this file, is open to be written.
    fn is_written(&self, file: Option<INodeNo>) -> bool {
        self.editable().is_ok_and(|editable| editable.is_written(file.map(|file| file.0)))
    }

    /// What has a scratch; else `EROFS`.
    fn editable(&self) -> Result<&Editable, Errno> {
        match &self.server {
            Server::ReadOnly(_) => Err(Errno::EROFS),
            Server::Editable(editable) => Ok(editable),
        }
    }
}
