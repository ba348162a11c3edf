//! Opening a store, and where things are in it.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use kiln_contract::{Digest, Home};
use rustix::fs::FlockOperation;

use crate::error::Context as _;
use crate::format::{Layout, VERSION};
use crate::staging;
use crate::{Result, StoreError};

/// The store of one home.
///
/// Opening it costs a handful of system calls. While it lives it holds the store's lock shared, so that nothing is
/// collected that it sees; so a process that collects ([`Store::gc`]) must not hold one, and a process that lives
/// long should not keep one that it does not use.
#[derive(Debug)]
pub struct Store {
    pub(crate) layout: Layout,
    /// Held while this lives.
    _lock: File,
}

impl Store {
    /// Opens the store of `home`, and makes it if there is none. Removes what killed writers left in `tmp/`. Waits
    /// while somebody collects.
    ///
    /// # Errors
    /// The store cannot be made or read, or a newer program wrote it.
    pub fn open(home: &Home) -> Result<Self> {
        let store = Self::locked(home, FlockOperation::LockShared)?;
        if !is_empty(&store.layout.tmp())? {
            staging::sweep(&store.layout, false)?;
        }
        Ok(store)
    }

    /// Opens a store that nobody else has open; waits until that is so.
    pub(crate) fn open_alone(home: &Home) -> Result<Self> {
        Self::locked(home, FlockOperation::LockExclusive)
    }

    fn locked(home: &Home, operation: FlockOperation) -> Result<Self> {
        let layout = Layout::new(home.store());
        let lock = lock(&layout, operation)?;
        Ok(Self { layout, _lock: lock })
    }

    /// The store's directory.
    pub fn path(&self) -> &Path {
        self.layout.root()
    }

    /// The directory of all objects: what a mount gives an overlay as its data-only lower.
    pub fn objects_dir(&self) -> PathBuf {
        self.layout.objects()
    }

    /// Where an object is, if it is there.
    pub fn object_path(&self, digest: &Digest) -> PathBuf {
        self.layout.object(digest)
    }

    /// Where a layer's tree is, if it is there.
    pub fn layer_path(&self, layer: &Digest) -> PathBuf {
        self.layout.layer(layer)
    }

    /// Opens an object for reading.
    ///
    /// # Errors
    /// [`StoreError::Missing`] if the store has it not.
    pub fn open_object(&self, digest: &Digest) -> Result<File> {
        let path = self.layout.object(digest);
        match File::open(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                Err(StoreError::Missing { what: "object", digest: *digest })
            }
            opened => opened.doing("open", &path),
        }
    }
}

/// Takes the lock of a store, which is made if it is not there.
fn lock(layout: &Layout, operation: FlockOperation) -> Result<File> {
    let version = layout.version();
    match std::fs::read_to_string(&version) {
        Ok(text) => check_version(layout, &text)?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => make(layout)?,
        Err(error) => return Err(error).doing("read", &version),
    }
    let path = layout.lock();
    let lock = File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(&path)
        .doing("open", &path)?;
    rustix::fs::flock(&lock, operation).doing("lock", &path)?;
    Ok(lock)
}

fn check_version(layout: &Layout, text: &str) -> Result<()> {
    let found: u32 = text.trim_end().parse().map_err(|_| StoreError::Damaged {
        path: layout.version(),
        what: format!("`{}` is no version", text.trim_end().escape_debug()),
    })?;
    if found > VERSION {
        return Err(StoreError::NewerFormat { path: layout.root().to_owned(), found, known: VERSION });
    }
    Ok(())
}

fn make(layout: &Layout) -> Result<()> {
    use std::os::unix::fs::DirBuilderExt as _;
    let mut builder = std::fs::DirBuilder::new();
    // Images may hold what is not for everybody.
    builder.recursive(true).mode(0o700).create(layout.root()).doing("create", layout.root())?;
    builder.mode(0o755);
    for name in Layout::DIRECTORIES {
        let path = layout.root().join(name);
        builder.create(&path).doing("create", &path)?;
    }
    // Last: what has a version has everything else.
    let (version, new) = (layout.version(), layout.root().join(format!("tmp/FORMAT-{}", std::process::id())));
    std::fs::write(&new, format!("{VERSION}\n")).doing("write", &new)?;
    std::fs::rename(&new, &version).doing("rename to", &version)
}

fn is_empty(directory: &Path) -> Result<bool> {
    let mut entries = std::fs::read_dir(directory).doing("read", directory)?;
    Ok(entries.next().is_none())
}
