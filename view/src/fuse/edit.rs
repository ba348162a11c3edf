//! The server of an editable view: a tree below a scratch, without overlayfs.
//!
//! What a request goes through:
//! 1. Whatever is asked by name is looked up in the scratch, and where that has nothing, in the tree.
//! 2. What is to be changed is first copied to the scratch ([`copy_up`]), by a rename of what was made whole, with all
//!    directories above it. It keeps its number, and who has it open reads from the copy from then on.
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

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use fuser::{FileAttr, FopenFlags, InitFlags, KernelConfig};
use kiln_erofs::Image;

use self::handles::Handles;
use self::union::Union;
pub(super) use self::upper::Upper;
use super::Owners;
use super::server::ask_for_usual;
use super::space::Space;
use crate::mounting::LARGEST_REQUEST;
use crate::objects::Objects;

pub(super) struct Editable {
    union: Mutex<Union>,
    handles: Arc<Handles>,
    space: Space,
    /// What is open of those that had the scratch before, under other numbers.
    earlier: Vec<Arc<Handles>>,
}

impl Editable {
    pub(super) fn new(
        image: Image<'static>,
        objects: Objects,
        upper: Upper,
        owners: Owners,
        space: Space,
    ) -> std::io::Result<Self> {
        let handles = Arc::new(Handles::default());
        let union = Union::new(image, objects, upper, owners, Arc::clone(&handles))?;
        Ok(Self { union: Mutex::new(union), handles, space, earlier: Vec::new() })
    }

    /// The same, where others had the scratch before and their files may still be open.
    pub(super) fn after<'a>(self, earlier: impl Iterator<Item = &'a Self>) -> Self {
        Self { earlier: earlier.map(|editable| Arc::clone(&editable.handles)).collect(), ..self }
    }

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
        self.earlier.iter().any(|handles| handles.is_written(None))
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

    /// What the kernel is asked for.
    pub(super) fn ask_for(config: &mut KernelConfig) {
        ask_for_usual(config);
        // A file that is opened to be written anew is not copied.
        let _ = config.add_capabilities(InitFlags::FUSE_ATOMIC_O_TRUNC);
        let _ = config.set_max_write(LARGEST_REQUEST);
    }

    /// As the kernel is told.
    fn told(&self, attributes: FileAttr) -> FileAttr {
        FileAttr { ino: self.space.number(attributes.ino.0), ..attributes }
    }

    /// How long the kernel may remember what a name in a directory stands for.
    fn remembered(&self, union: &mut Union, parent: u64, name: &[u8]) -> &'static Duration {
        if union.leaving.may_be_remembered(parent, name) {
            self.space.remembered(parent)
        } else {
            &Duration::ZERO
        }
    }

    fn union(&self) -> MutexGuard<'_, Union> {
        self.union.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
