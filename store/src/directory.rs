//! Directories of the host become layers: plain ones, and the upper directories of overlays.
//!
//! Whoever owns such a directory may change it meanwhile. Directories are opened below the root without following any
//! symbolic link (`openat2`), and files relative to them, so that nothing outside can be read.

use std::borrow::Cow;
use std::collections::HashMap;
use std::ffi::OsStr;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;

use kiln_contract::Digest;
use kiln_erofs::{Attributes, Content, Data, Device, NodeId, Time, Tree, Xattrs};
use rustix::fs::{AtFlags, FileType, Mode, OFlags, Stat};
use rustix::io::Errno;

use crate::error::Context as _;
use crate::host_xattrs::xattrs_at;
use crate::import::{ImportedLayer, StagedLayer, collect, join};
use crate::limits::{Budget, ImportLimits};
use crate::object_writer::{HostDirectory, Job, Queue, SeenFile};
use crate::selection::Selection;
use crate::source_date::SourceDate;
use crate::stamp::{Stamp, pause};
use crate::upper::{IdKind, Lower, Upper};
use crate::{Result, Store, StoreError, overlay};

impl Store {
    /// A directory of the host as a layer: a plain root file system. Sockets are left out. If `SOURCE_DATE_EPOCH` is
    /// set, no time is later than that (<https://reproducible-builds.org/specs/source-date-epoch/>).
    ///
    /// # Errors
    /// Something in it cannot be read, or the store not be written; [`StoreError::TooLarge`] beyond the [`ImportLimits`]
    /// that there are by default.
    pub fn import_directory(&self, root: &Path) -> Result<ImportedLayer> {
        self.import_directory_within(root, ImportLimits::default())
    }

    /// [`Store::import_directory`] with other limits.
    ///
    /// # Errors
    /// As there; [`StoreError::TooLarge`] beyond `limits`.
    pub fn import_directory_within(&self, root: &Path, limits: ImportLimits) -> Result<ImportedLayer> {
        self.import_host(root, None, &HostOptions { limits, ..HostOptions::new()? })
    }

    /// An overlay's upper directory as a layer; only what is in it is read.
    ///
    /// Whiteouts and opaque directories may be in any of overlayfs's forms. A file of which the upper directory has only
    /// the attributes (`metacopy`), and a directory that was renamed (`redirect`), are looked up in `lower`, the layers
    /// below, bottom first. `map` turns the ids on disk into those in the image (rootless containers); for root
    /// it is the identity. `SOURCE_DATE_EPOCH` is heeded as by [`Store::import_directory`].
    ///
    /// # Errors
    /// Something in it cannot be read, needs a lower file that is not there, or the store cannot be written;
    /// [`StoreError::TooLarge`] as from [`Store::import_directory`].
    pub fn import_upper(
        &self,
        upper: &Path,
        lower: &[Digest],
        map: &dyn Fn(u32, IdKind) -> u32,
    ) -> Result<ImportedLayer> {
        let upper_rules = Upper::new(Lower::new(self, lower), map);
        self.import_host(upper, Some(&upper_rules), &HostOptions::new()?)
    }

    /// Makes a layer of a directory that others may be changing: what it has when the walk is at its end.
    pub(crate) fn import_host(
        &self,
        root: &Path,
        upper: Option<&Upper<'_>>,
        options: &HostOptions<'_>,
    ) -> Result<ImportedLayer> {
        let damaged = self.known_damage()?;
        let staged = StagedLayer::new(self, &damaged)?;
        let mut attempt = 1;
        let mut tree = loop {
            match walk(&staged, root, upper, options) {
                // Objects that were staged already are not written once more.
                Err(StoreError::Changing { attempts: 1, .. }) if attempt < WALKS => {
                    pause(attempt);
                    attempt += 1;
                }
                Err(StoreError::Changing { path, attempts: 1 }) => {
                    return Err(StoreError::Changing { path, attempts: WALKS });
                }
                walked => break walked?,
            }
        };
        options.selection.apply(&mut tree)?;
        if staged.objects().is_full() {
            return Err(staged.disk_full());
        }
        staged.publish_tree(tree)
    }
}

/// So many files, or bytes of them, are a worker's job: waking one costs as much as reading a small file.
const BATCH: usize = 32;
const BATCH_BYTES: u64 = 1 << 20;

/// How often a directory is walked in which something comes, goes or is replaced meanwhile.
const WALKS: u32 = 6;

/// What of a directory is to become a layer.
#[derive(Debug)]
pub(crate) struct HostOptions<'o> {
    pub(crate) limits: ImportLimits,
    pub(crate) date: SourceDate,
    pub(crate) selection: Cow<'o, Selection>,
}

impl HostOptions<'_> {
    /// All of it, with the times that the environment allows.
    pub(crate) fn new() -> Result<Self> {
        Ok(Self {
            limits: ImportLimits::default(),
            date: SourceDate::from_environment()?,
            selection: Cow::Owned(Selection::default()),
        })
    }
}

/// Walks over a directory once while others read its files. [`StoreError::Changing`] with one attempt says that its names
/// were not the same all the time.
fn walk(
    staged: &StagedLayer<'_>,
    root: &Path,
    upper: Option<&Upper<'_>>,
    options: &HostOptions<'_>,
) -> Result<Tree> {
    let queue = Queue::new();
    let (walked, worked) = thread::scope(|scope| {
        let workers = staged.spawn_workers(scope, &queue);
        let walked = Walk::new(root, &queue, upper, options).and_then(Walk::run);
        if walked.is_err() {
            queue.abandon();
        }
        queue.close();
        (walked, workers.into_iter().map(join).collect())
    });
    let stored = collect(worked)?;
    let (mut tree, files) = walked?;
    for (slot, data) in stored.files {
        tree.set_content(files[slot as usize], Content::Regular(data));
    }
    for (slot, now) in stored.changed {
        let attributes = attributes(upper, options.date, &now.stat, now.xattrs);
        tree.set_attributes(files[slot as usize], attributes);
    }
    Ok(tree)
}

/// A walk over a directory that makes its tree.
struct Walk<'w> {
    queue: &'w Queue,
    root: OwnedFd,
    root_path: &'w Path,
    upper: Option<&'w Upper<'w>>,
    options: &'w HostOptions<'w>,
    tree: Tree,
    /// The directories that were read, and what they were then.
    directories: Vec<(PathBuf, Stamp)>,
    /// What the tree may still take: a container may have filled its upper directory.
    budget: Budget,
    /// Nodes whose content is known by slot only.
    files: Vec<NodeId>,
    /// Those in the directory that is being read for which nobody has been asked yet, and their bytes.
    seen: Vec<SeenFile>,
    seen_bytes: u64,
    /// Files with several names, by device and inode.
    linked: HashMap<(u64, u64), NodeId>,
}

/// A directory that is still to be read.
struct Pending {
    /// Below the root of the walk.
    path: PathBuf,
    node: NodeId,
    /// Where it lies in the lower tree, if anything of that shows.
    lower: Option<Vec<u8>>,
    /// Whether `node` already has what the lower tree has, as the layer has it all itself.
    has_lower: bool,
}

/// A name in a directory of the host.
pub(crate) struct HostEntry<'e> {
    pub(crate) name: &'e [u8],
    pub(crate) stat: &'e Stat,
    pub(crate) xattrs: Xattrs,
}

impl<'w> Walk<'w> {
    fn new(
        root_path: &'w Path,
        queue: &'w Queue,
        upper: Option<&'w Upper<'w>>,
        options: &'w HostOptions<'w>,
    ) -> Result<Self> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let root = rustix::fs::open(root_path, flags, Mode::empty()).doing("open", root_path)?;
        Ok(Self {
            queue,
            root,
            root_path,
            upper,
            options,
            tree: Tree::default(),
            directories: Vec::new(),
            budget: Budget::of_layer(options.limits),
            files: Vec::new(),
            seen: Vec::new(),
            seen_bytes: 0,
            linked: HashMap::new(),
        })
    }

    fn run(mut self) -> Result<(Tree, Vec<NodeId>)> {
        let stat = rustix::fs::fstat(&self.root).doing("read", self.root_path)?;
        let xattrs = xattrs_at(&self.root, b".", self.root_path)?;
        let mut opaque_style = self.upper.map_or_else(Vec::new, |upper| upper.opaque(&xattrs).to_vec());
        let attributes = attributes(self.upper, self.options.date, &stat, xattrs);
        self.tree.set_attributes(NodeId::ROOT, attributes);
        let lower = self.upper.map(|_| Vec::new());
        let mut stack = vec![(
            Pending { path: PathBuf::new(), node: NodeId::ROOT, lower, has_lower: false },
            std::mem::take(&mut opaque_style),
        )];
        while let Some((directory, opaque)) = stack.pop() {
            if self.queue.has_failed() {
                // The worker's own error is what counts.
                break;
            }
            self.directory(directory, &opaque, &mut stack)?;
        }
        self.check_directories()?;
        Ok((self.tree, self.files))
    }

    /// Looks at all directories once more: something that was renamed from one that was read late to one that was read
    /// early would be in neither. If none has changed, each had the names that were read in it at this moment.
    fn check_directories(&self) -> Result<()> {
        for (below, seen) in &self.directories {
            let path = self.root_path.join(below);
            let now = open_below(&self.root, self.root_path, below)
                .and_then(|directory| Ok(Stamp::of(&rustix::fs::fstat(&directory)?)));
            match now {
                Ok(now) if now == *seen => {}
                Ok(_) => return Err(StoreError::Changing { path, attempts: 1 }),
                Err(error) => return Err(unless_changing(error, "open", path)),
            }
        }
        Ok(())
    }

    fn directory(
        &mut self,
        directory: Pending,
        opaque: &[u8],
        stack: &mut Vec<(Pending, Vec<u8>)>,
    ) -> Result<()> {
        let path = self.root_path.join(&directory.path);
        let handle = open_below(&self.root, self.root_path, &directory.path)
            .map_err(|error| unless_changing(error, "open", path.clone()))?;
        let stamp = Stamp::of(&rustix::fs::fstat(&handle).doing("read", &path)?);
        stamp.settle();
        let names = names_in(&handle).doing("read", &path)?;
        let handle = Arc::new(HostDirectory { handle, path });
        for name in names {
            let (path, below) =
                (handle.path.join(OsStr::from_bytes(&name)), directory.path.join(OsStr::from_bytes(&name)));
            if self.options.selection.leaves_out(&below) {
                continue;
            }
            let stat = match rustix::fs::statat(&handle.handle, name.as_slice(), AtFlags::SYMLINK_NOFOLLOW) {
                Err(rustix::io::Errno::NOENT) => continue,
                stat => stat.doing("read", &path)?,
            };
            let xattrs = xattrs_at(&handle.handle, &name, &path)?;
            let entry = HostEntry { name: &name, stat: &stat, xattrs };
            if self.upper.is_some_and(|upper| upper.is_whiteout(&entry, opaque)) {
                self.tree.remove(directory.node, &name);
                // Below a directory that is wholly in the layer there is nothing to hide.
                if !directory.has_lower {
                    self.add(directory.node, &entry, &path, overlay::whiteout(), Attributes::default())?;
                }
                continue;
            }
            if name.starts_with(overlay::WHITEOUT_PREFIX) {
                let what = "names that begin with `.wh.` mean removals in layers".to_owned();
                return Err(StoreError::Entry { path: path.into_os_string().into_vec(), what });
            }
            if FileType::from_raw_mode(stat.st_mode) == FileType::Directory {
                stack.push(self.subdirectory(&directory, entry, &path)?);
            } else if self.options.selection.takes(&below) {
                self.file(&directory, &handle, entry, &path)?;
            }
        }
        self.hand_over(&handle);
        self.directories.push((directory.path, stamp));
        Ok(())
    }

    fn subdirectory(
        &mut self,
        parent: &Pending,
        mut entry: HostEntry<'_>,
        path: &Path,
    ) -> Result<(Pending, Vec<u8>)> {
        let name = entry.name;
        let opaque = self.upper.map_or_else(Vec::new, |upper| upper.opaque(&entry.xattrs).to_vec());
        let redirect =
            self.upper.and_then(|upper| upper.redirect(&entry.xattrs, name, parent.lower.as_deref()));
        let is_opaque = opaque == b"y";
        let attributes =
            attributes(self.upper, self.options.date, entry.stat, std::mem::take(&mut entry.xattrs));
        let existing = self.tree.child(parent.node, name).filter(|node| {
            parent.has_lower
                && !is_opaque
                && redirect.is_none()
                && *self.tree.node(*node).content == Content::Directory
        });
        let node = match existing {
            Some(node) => {
                self.budget.attributes(&attributes)?;
                self.tree.set_attributes(node, attributes.clone());
                node
            }
            None => {
                self.tree.remove(parent.node, name);
                self.add(parent.node, &entry, path, Content::Directory, attributes.clone())?
            }
        };
        let mut has_lower = parent.has_lower;
        let mut lower = None;
        if let (Some(upper), Some(from), false) = (self.upper, &redirect, is_opaque) {
            upper.lower.copy_directory(from, &mut self.tree, node, &mut self.budget)?;
            has_lower = true;
        }
        if !is_opaque {
            lower = redirect.or_else(|| Some([parent.lower.as_deref()?, b"/", name].concat()));
        }
        // What lies below in the stack must not show where the layer has everything.
        if (is_opaque || has_lower) && !parent.has_lower {
            let mut attributes = attributes;
            attributes.xattrs.insert(overlay::OPAQUE.to_vec(), b"y".to_vec());
            self.tree.set_attributes(node, attributes);
        }
        let path = parent.path.join(OsStr::from_bytes(name));
        self.budget.path(path.as_os_str().len() + lower.as_ref().map_or(0, Vec::len))?;
        Ok((Pending { path, node, lower, has_lower }, opaque))
    }

    fn file(
        &mut self,
        parent: &Pending,
        directory: &Arc<HostDirectory>,
        mut entry: HostEntry<'_>,
        path: &Path,
    ) -> Result<()> {
        let (stat, name) = (entry.stat, entry.name);
        self.tree.remove(parent.node, name);
        // Signed and narrower on some platforms; only equality counts.
        #[allow(clippy::unnecessary_cast)]
        let identity = (stat.st_dev as u64, stat.st_ino);
        if let Some(node) = self.linked.get(&identity) {
            let node = *node;
            self.budget.link(name)?;
            return self.tree.link(parent.node, name, node).map_err(|error| refused(path, &error));
        }
        let mut slot = None;
        let content = match FileType::from_raw_mode(stat.st_mode) {
            FileType::RegularFile => {
                let lower = self.upper.map(|upper| upper.lower_data(&entry, parent.lower.as_deref(), path));
                match lower.transpose()?.flatten() {
                    Some(data) => Content::Regular(data),
                    None if stat.st_size == 0 => Content::Regular(Data::Inline(Vec::new())),
                    None => {
                        let size = u64::try_from(stat.st_size).unwrap_or(0);
                        self.budget.bytes(path.as_os_str().as_bytes(), size, 0)?;
                        slot = Some(self.files.len() as u32);
                        Content::Regular(Data::Inline(Vec::new()))
                    }
                }
            }
            FileType::Symlink => {
                let target = rustix::fs::readlinkat(&directory.handle, name, Vec::new())
                    .map_err(|error| unless_changing(error.into(), "read", path.to_owned()))?;
                Content::Symlink(target.into_bytes())
            }
            FileType::CharacterDevice => Content::CharDevice(device(stat)),
            FileType::BlockDevice => Content::BlockDevice(device(stat)),
            FileType::Fifo => Content::Fifo,
            // A socket means nothing without its process.
            _ => return Ok(()),
        };
        let attributes = attributes(self.upper, self.options.date, stat, std::mem::take(&mut entry.xattrs));
        let node = self.add(parent.node, &entry, path, content, attributes)?;
        if stat.st_nlink > 1 {
            self.linked.insert(identity, node);
        }
        if let Some(slot) = slot {
            self.files.push(node);
            self.seen.push(SeenFile { slot, name: name.to_owned(), stamp: Stamp::of(stat) });
            self.seen_bytes += self.seen.last().map_or(0, |file| file.stamp.size());
            if self.seen.len() >= BATCH || self.seen_bytes >= BATCH_BYTES {
                self.hand_over(directory);
            }
        }
        Ok(())
    }

    /// Has the files read that were seen in a directory.
    fn hand_over(&mut self, directory: &Arc<HostDirectory>) {
        self.seen_bytes = 0;
        if !self.seen.is_empty() {
            let files = std::mem::take(&mut self.seen);
            self.queue.push(Job::HostFiles { directory: Arc::clone(directory), files });
        }
    }

    fn add(
        &mut self,
        parent: NodeId,
        entry: &HostEntry<'_>,
        path: &Path,
        content: Content,
        attributes: Attributes,
    ) -> Result<NodeId> {
        self.budget.entry()?;
        self.budget.node(entry.name, &content, &attributes)?;
        self.tree.add(parent, entry.name, content, attributes).map_err(|error| refused(path, &error))
    }
}

/// What a layer says of a file of the host.
fn attributes(upper: Option<&Upper<'_>>, date: SourceDate, stat: &Stat, xattrs: Xattrs) -> Attributes {
    let mtime = date.clamp(Time { seconds: stat.st_mtime, nanoseconds: stat.st_mtime_nsec as u32 });
    let (mut uid, mut gid) = (stat.st_uid, stat.st_gid);
    let xattrs = match upper {
        Some(upper) => {
            uid = (upper.map)(uid, IdKind::User);
            gid = (upper.map)(gid, IdKind::Group);
            upper.own_xattrs(xattrs)
        }
        None => xattrs.into_iter().map(|(name, value)| (overlay::own_xattr(&name), value)).collect(),
    };
    #[allow(clippy::useless_conversion)] // 16 bits on some platforms.
    let mode = u32::from(stat.st_mode) & 0o7777;
    Attributes { mode, uid, gid, mtime, xattrs }
}

/// What it means that something cannot be looked at that was there a moment ago.
fn unless_changing(source: std::io::Error, doing: &'static str, path: PathBuf) -> StoreError {
    match rustix::io::Errno::from_io_error(&source) {
        Some(Errno::NOENT | Errno::NOTDIR | Errno::LOOP | Errno::INVAL) => {
            StoreError::Changing { path, attempts: 1 }
        }
        _ => StoreError::Io { doing, path, source },
    }
}

fn refused(path: &Path, error: &kiln_erofs::TreeError) -> StoreError {
    StoreError::Entry { path: path.as_os_str().as_bytes().to_owned(), what: error.to_string() }
}

fn names_in(directory: &OwnedFd) -> std::io::Result<Vec<Vec<u8>>> {
    let mut names = Vec::new();
    for entry in rustix::fs::Dir::read_from(directory)? {
        let entry = entry?;
        let name = entry.file_name().to_bytes();
        if name != b"." && name != b".." {
            names.push(name.to_owned());
        }
    }
    Ok(names)
}

/// Opens a directory below another one, without following links.
fn open_below(root: &OwnedFd, root_path: &Path, path: &Path) -> std::io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
    #[cfg(target_os = "linux")]
    {
        let _ = root_path;
        let resolve = rustix::fs::ResolveFlags::BENEATH | rustix::fs::ResolveFlags::NO_SYMLINKS;
        Ok(rustix::fs::openat2(root, path, flags, Mode::empty(), resolve)?)
    }
    #[cfg(not(target_os = "linux"))]
    {
        let _ = root;
        Ok(rustix::fs::open(root_path.join(path), flags, Mode::empty())?)
    }
}

fn device(stat: &Stat) -> Device {
    #[cfg(target_os = "linux")]
    let (major, minor) = (rustix::fs::major(stat.st_rdev), rustix::fs::minor(stat.st_rdev));
    // As <sys/types.h> of macOS has it.
    #[cfg(not(target_os = "linux"))]
    let (major, minor) = ((stat.st_rdev as u32) >> 24, (stat.st_rdev as u32) & 0xff_ffff);
    Device { major, minor }
}
