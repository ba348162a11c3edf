//! The server of an editable view: a tree below a scratch, without overlayfs.
//!
//! What a request goes through:
//! 1. Whatever is asked by name is looked up in the scratch, and where that has nothing, in the tree.
//! 2. What is to be changed is first copied to the scratch ([`copy_up`]), by a rename of what was made whole, with all
//!    directories above it. It keeps its number, and who has it open reads from the copy from then on. What is not here is
//!    fetched before ([`Editable::change`]), while everybody else goes on.
//! 3. The change is made in the scratch. Before it is answered it is there: a server that is killed loses nothing that was
//!    answered, and the next one finds everything on disk and nowhere else.
//!
//! Nothing changes but through this server, so that the kernel may keep everything for ever here too: it drops itself
//! what its own requests change. Locks are the kernel's own business.

mod change;
mod copy_up;
mod handles;
mod leaving;
mod listings;
mod nodes;
mod parents;
mod place;
mod rename;
mod requests;
mod union;
mod upper;

use std::ops::Deref;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use fuser::{FileAttr, FopenFlags, InitFlags, KernelConfig};
use kiln_erofs::Image;
use memmap2::Mmap;
use rustix::io::{Errno, Result};

use self::handles::Handles;
use self::union::Union;
pub(super) use self::upper::Upper;
use super::Owners;
use super::server::ask_for_usual;
use super::space::Space;
use super::state::{Changes, State};
use crate::mounting::LARGEST_REQUEST;
use crate::objects::Objects;

/// A tree below a scratch. A clone is the same: one goes with each request that waits for an object.
#[derive(Clone)]
pub(super) struct Editable(Arc<Edited>);

pub(super) struct Edited {
    union: Mutex<Union>,
    handles: Arc<Handles>,
    among: Among,
}

/// What else a connection shows.
pub(super) struct Among {
    space: Space,
    /// What is open of those that had the scratch before, under other numbers.
    earlier: Vec<Arc<Handles>>,
    changes: Arc<Changes>,
    /// Keeps the tree.
    _mapping: Option<Arc<Mmap>>,
}

impl Among {
    /// Nothing: and the tree is there for ever.
    pub(super) fn nobody() -> Self {
        let changes = Arc::new(Changes::new(State::Changing));
        Self { space: Space::Whole, earlier: Vec::new(), changes, _mapping: None }
    }

    /// Other trees; those that had the scratch `earlier` may still have files open.
    pub(super) fn others<'a>(
        space: Space,
        earlier: impl Iterator<Item = &'a Editable>,
        changes: Arc<Changes>,
        mapping: Arc<Mmap>,
    ) -> Self {
        let earlier = earlier.map(|editable| Arc::clone(&editable.handles)).collect();
        Self { space, earlier, changes, _mapping: Some(mapping) }
    }
}

impl Deref for Editable {
    type Target = Edited;

    fn deref(&self) -> &Edited {
        &self.0
    }
}

impl Editable {
    pub(super) fn new(
        image: Image<'static>,
        objects: Objects,
        upper: Upper,
        owners: Owners,
        among: Among,
    ) -> std::io::Result<Self> {
        let handles = Arc::new(Handles::default());
        let union = Union::new(image, objects, upper, owners, Arc::clone(&handles))?;
        Ok(Self(Arc::new(Edited { union: Mutex::new(union), handles, among })))
    }

    /// What the kernel is asked for.
    pub(super) fn ask_for(config: &mut KernelConfig) {
        ask_for_usual(config);
        // A file that is opened to be written anew is not copied.
        let _ = config.add_capabilities(InitFlags::FUSE_ATOMIC_O_TRUNC);
        let _ = config.set_max_write(LARGEST_REQUEST);
    }

    /// Changes something, and answers. What is to be copied to the scratch for it may have to be fetched: then this returns, and
    /// both are done afterwards, by another thread. Nothing is locked meanwhile, so that `change` begins anew then, if things may
    /// still be changed.
    fn change<T: 'static>(
        &self,
        change: impl Fn(&mut Union) -> Result<T> + Send + 'static,
        answer: impl FnOnce(&Edited, &mut Union, Result<T>) + Send + 'static,
    ) {
        let mut union = self.union();
        let changed = change(&mut union);
        let (Err(_), Some((digest, size))) = (&changed, union.missing.take()) else {
            return answer(self, &mut union, changed);
        };
        let (objects, editable) = (Arc::clone(&union.objects), self.clone());
        drop(union);
        objects.fetch(&digest, size, move |file| {
            let allowed = file.ok_or(Errno::IO).and_then(|_| editable.among.changes.are_allowed());
            match allowed {
                Ok(_held) => editable.change(change, answer),
                Err(error) => answer(&editable, &mut editable.union(), Err(error)),
            }
        });
    }
}

impl Edited {
    /// Another server has the scratch from now on.
    pub(super) fn retire(&self) {
        self.union().is_retired = true;
    }

    /// Whether something is open.
    pub(super) fn is_used(&self) -> bool {
        !self.handles.is_empty()
    }

    /// Whether something, or this file, is open to be written.
    pub(super) fn is_written(&self, file: Option<u64>) -> bool {
        self.handles.is_written(file)
    }

    /// Whether files of the scratch are changed in a way that the kernel does not connect with the numbers that it has from
    /// here.
    fn is_written_elsewhere(&self) -> bool {
        self.among.earlier.iter().any(|handles| handles.is_written(None))
    }

    /// How long the kernel may remember attributes that it usually remembers so long.
    fn while_certain(&self, usual: &'static Duration) -> &'static Duration {
        if self.is_written_elsewhere() { &Duration::ZERO } else { usual }
    }

    /// How a file is opened: whether what the kernel has of it is what it is.
    fn opened(&self, union: &mut Union, id: u64) -> FopenFlags {
        let doubtful = if self.is_written_elsewhere() {
            union.doubtful.insert(id);
            true
        } else {
            union.doubtful.remove(&id)
        };
        if doubtful { FopenFlags::empty() } else { FopenFlags::FOPEN_KEEP_CACHE }
    }

    /// As the kernel is told.
    fn told(&self, attributes: FileAttr) -> FileAttr {
        FileAttr { ino: self.among.space.number(attributes.ino.0), ..attributes }
    }

    /// How long the kernel may remember what a name in a directory stands for.
    fn remembered(&self, union: &mut Union, parent: u64, name: &[u8]) -> &'static Duration {
        if union.leaving.may_be_remembered(parent, name) {
            self.among.space.remembered(parent)
        } else {
            &Duration::ZERO
        }
    }

    fn union(&self) -> MutexGuard<'_, Union> {
        self.union.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
