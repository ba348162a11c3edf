//! Lazy layers: their trees are here, their objects come when somebody opens them.
//!
//! A layer of zstd:chunked has, beside its tar, a table of what is in that tar, and every file is compressed by itself. So the
//! tree can be made from the table alone ([`LazyLayer`], [`Store::put_lazy`]); it is the one that the whole tar makes, with
//! the same digest. Where each object lies in the compressed blob stands in a [record](record), and
//! [`Store::fetch_object`] brings it from there.
//!
//! A table is believed no further than the manifest that names it: the digest of the table is in the manifest, but that the
//! table tells what the tar holds is known only when the whole tar has come. So a lazy layer is never what `diffs/` says of a
//! tar: it belongs to the pair of blob and table, and only images whose manifests name both have it
//! ([`Store::lazy_layer_of`]). Whoever pulls another image with that diff_id pulls its tar. What an object holds is
//! compared with the digest in the tree before it gets its name, wherever it came from.

mod fetch;
mod record;

use std::collections::HashSet;
use std::hash::{BuildHasher as _, RandomState};
use std::path::PathBuf;

use kiln_contract::Digest;
use kiln_erofs::{Attributes, Content, Data, INLINE_LIMIT, Tree};
use oci_spec::image::{Descriptor, ImageManifest};

use crate::error::Context as _;
use crate::format::stack_key;
use crate::image::digest_of;
use crate::import::{Hashing, disk_full, write_tree};
use crate::layer_tree::{LayerTree, Name};
use crate::limits::{Budget, ImportLimits};
use crate::staging::Staging;
use crate::tag::files_below;
use crate::tar::entry::{EntryKind, LayerEntry};
use crate::{Result, Store, StoreError, overlay};

pub(crate) use self::record::{Lookup, Record};

/// The annotation of a layer's descriptor that has the digest of its table of contents, as it is in the blob: compressed.
pub const TOC_DIGEST: &str = "io.github.containers.zstd-chunked.manifest-checksum";

/// The annotation that says where that table is: `offset:length:uncompressed length:type`, decimal.
pub const TOC_POSITION: &str = "io.github.containers.zstd-chunked.manifest-position";

/// How far back a zstd frame may refer, as a power of two of bytes, for whoever reads layers or parts of them. What RFC 8878
/// asks every decoder to accept is 8 MiB; zstd's own `--long` default is 128 MiB. A frame that wants more could make us
/// allocate gigabytes.
pub const ZSTD_WINDOW_LOG: u32 = 27;

/// What a table knows of the bytes of a file that is not empty.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FileBytes {
    /// All of them: of files that a tree holds itself, of at most [`INLINE_LIMIT`] bytes.
    Here(Vec<u8>),
    /// Where they are.
    There {
        /// Their SHA-256.
        digest: Digest,
        /// Where their zstd frames begin in the blob.
        offset: u64,
        /// How many bytes these frames have together.
        length: u64,
    },
}

/// An object, and where it lies in a blob.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Placed {
    pub(crate) digest: Digest,
    pub(crate) size: u64,
    pub(crate) offset: u64,
    pub(crate) length: u64,
}

impl Placed {
    pub(crate) fn end(&self) -> u64 {
        self.offset.saturating_add(self.length)
    }
}

/// A layer that is made from a table of contents.
#[derive(Debug)]
pub struct LazyLayer {
    tree: LayerTree,
    /// Names that were told, by a hash that nobody can choose.
    names: HashSet<u64>,
    hasher: RandomState,
    files: Vec<Placed>,
}

/// What a lazy layer came from.
#[derive(Debug, Clone)]
pub struct LazySource {
    /// The digest of its tar, as the image's config promises it.
    pub diff_id: Digest,
    /// The blob.
    pub blob: Descriptor,
    /// The digest of the table of contents, compressed as it is in the blob.
    pub toc: Digest,
    /// Where files end and the table begins, in bytes from the blob's start.
    pub files_end: u64,
}

impl LazyLayer {
    /// An empty one.
    #[must_use]
    pub fn new(limits: ImportLimits) -> Self {
        let tree = LayerTree::new(Budget::of_layer(limits));
        Self { tree, names: HashSet::new(), hasher: RandomState::new(), files: Vec::new() }
    }

    /// Adds an entry; a file that is not empty needs its `bytes`.
    ///
    /// # Errors
    /// [`StoreError::Entry`] for what no tar could have, what the tree cannot hold, and names that were told before;
    /// [`StoreError::TooLarge`].
    pub fn add(&mut self, entry: LayerEntry, bytes: Option<FileBytes>) -> Result<()> {
        let LayerEntry { path, kind, mode, uid, gid, mtime, xattrs } = entry;
        let refuse = |path: Vec<u8>, what: &str| StoreError::Entry { path, what: what.to_owned() };
        self.tree.budget().entry()?;
        self.tree.budget().segments(1)?;
        if !self.names.insert(self.hasher.hash_one(LayerTree::components(&path)?)) {
            // In a tar the last one counts; a table need not be in the tar's order.
            return Err(refuse(path, "it is listed twice"));
        }
        let xattrs = xattrs.into_iter().map(|(name, value)| (overlay::own_xattr(&name), value)).collect();
        let attributes = Attributes { mode: mode & 0o7777, uid, gid, mtime, xattrs };
        let content = match kind {
            EntryKind::Regular { sparse: Some(_), .. } => return Err(refuse(path, "it is sparse")),
            EntryKind::Regular { size, sparse: None } => {
                self.tree.budget().bytes(&path, size, 0)?;
                if LayerTree::classify(&path)? != Name::Entry {
                    self.tree.add(&path, Content::Fifo, Attributes::default())?;
                    return Ok(());
                }
                match bytes {
                    None if size == 0 => Content::Regular(Data::Inline(Vec::new())),
                    Some(FileBytes::Here(bytes))
                        if bytes.len() as u64 == size && bytes.len() <= INLINE_LIMIT =>
                    {
                        Content::Regular(Data::Inline(bytes))
                    }
                    Some(FileBytes::There { digest, offset, length }) if size > INLINE_LIMIT as u64 => {
                        self.files.push(Placed { digest, size, offset, length });
                        Content::Regular(Data::Object { digest, size })
                    }
                    _ => return Err(refuse(path, "what is told of its bytes does not fit its size")),
                }
            }
            EntryKind::HardLink(target) => return self.tree.hard_link(&path, &target),
            EntryKind::Symlink(target) => {
                if target.is_empty() || target.len() > 4095 {
                    let what = format!("its link target has {} bytes (1 to 4095 are possible)", target.len());
                    return Err(refuse(path, &what));
                }
                Content::Symlink(target)
            }
            EntryKind::Directory => Content::Directory,
            EntryKind::CharDevice(device) => Content::CharDevice(device),
            EntryKind::BlockDevice(device) => Content::BlockDevice(device),
            EntryKind::Fifo => Content::Fifo,
        };
        self.tree.add(&path, content, attributes).map(drop)
    }

    /// The layer that it makes.
    ///
    /// # Errors
    /// No tree can be written of it.
    pub fn digest(self) -> Result<Digest> {
        let mut out = Hashing::new(std::io::sink());
        kiln_erofs::write_metadata(&self.tree.into_tree(), &mut out)?;
        Ok(out.digest())
    }

    /// The tree, and where its objects lie: sorted by their digests, each once.
    fn finish(self, end: u64) -> Result<(Tree, Vec<Placed>)> {
        let Self { tree, mut files, .. } = self;
        let wrong = |what: String| StoreError::BadImage { what: "table of contents", why: what };
        files.sort_by_key(|file| file.offset);
        for file in &files {
            // Compression adds little to what it cannot make smaller, also in many frames.
            let most = file.size.saturating_add(file.size / 2).saturating_add(64 << 10);
            if file.length == 0 || file.length > most || file.end() > end {
                return Err(wrong(format!(
                    "the object {} lies at {} and {} bytes on, where no files are",
                    file.digest, file.offset, file.length
                )));
            }
        }
        if let Some(pair) = files.windows(2).find(|pair| pair[1].offset < pair[0].end()) {
            return Err(wrong(format!("the objects {} and {} overlap", pair[0].digest, pair[1].digest)));
        }
        files.sort();
        files.dedup_by_key(|file| file.digest);
        Ok((tree.into_tree(), files))
    }
}

impl Store {
    /// Keeps a lazy layer. Returns its digest: that of the layer which the whole tar makes.
    ///
    /// # Errors
    /// [`StoreError::BadImage`] if files lie beside the blob or over each other; the store cannot be written. Nothing is
    /// kept then.
    pub fn put_lazy(&self, layer: LazyLayer, source: &LazySource) -> Result<Digest> {
        let (tree, objects) = layer.finish(source.files_end)?;
        let staging = Staging::new(&self.layout)?;
        let put = || {
            let (tree_at, record_at) = (staging.path("tree"), staging.path("record"));
            let layer = write_tree(&tree, &tree_at)?;
            let record = Record::new(layer, source, objects)?;
            std::fs::write(&record_at, record.to_bytes()?).doing("write", &record_at)?;
            staging.sync()?;
            let directory = self.layout.lazy();
            std::fs::create_dir_all(&directory).doing("create", &directory)?;
            let (tree_to, record_to) = (self.layout.layer(&layer), self.layout.lazy_record(&record.key()));
            std::fs::rename(&tree_at, &tree_to).doing("rename to", &tree_to)?;
            std::fs::rename(&record_at, &record_to).doing("rename to", &record_to)?;
            // What is said of one that was whole is true until it is again.
            if !self.layout.layer_split(&layer).exists() {
                self.forget_damage(&layer)?;
            }
            Ok::<_, StoreError>(layer)
        };
        match put() {
            Err(error) if error.is_disk_full() => {
                staging.clear();
                Err(disk_full(&self.layout, 2, 0))
            }
            put => put,
        }
    }

    /// The lazy layer of a blob whose descriptor names a table of contents, if its tree is here.
    ///
    /// # Errors
    /// Its record cannot be read.
    pub fn lazy_layer_of(&self, descriptor: &Descriptor) -> Result<Option<Digest>> {
        let Some(key) = key_of(descriptor) else { return Ok(None) };
        let Some(head) = Record::head(&self.layout.lazy_record(&key))? else { return Ok(None) };
        Ok(Some(head.layer).filter(|layer| self.layout.layer(layer).exists()))
    }

    /// What the records of the lazy layers of a manifest are named by, as far as it can be read.
    pub(crate) fn lazy_keys_of(&self, manifest: &Digest) -> Result<Vec<Digest>> {
        let manifest =
            self.blob(manifest)?.and_then(|bytes| serde_json::from_slice::<ImageManifest>(&bytes).ok());
        Ok(manifest.iter().flat_map(ImageManifest::layers).filter_map(key_of).collect())
    }

    pub(crate) fn lazy_paths(&self) -> Result<Vec<PathBuf>> {
        let directory = self.layout.lazy();
        if directory.exists() { files_below(&directory) } else { Ok(Vec::new()) }
    }
}

/// What the record of a descriptor's lazy layer is named by; `None` if it names no table of contents.
pub(crate) fn key_of(descriptor: &Descriptor) -> Option<Digest> {
    let toc: Digest = descriptor.annotations().as_ref()?.get(TOC_DIGEST)?.parse().ok()?;
    Some(key(&digest_of(descriptor).ok()?, &toc))
}

fn key(blob: &Digest, toc: &Digest) -> Digest {
    stack_key(&[*blob, *toc])
}
