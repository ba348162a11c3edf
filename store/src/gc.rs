//! Garbage collection: mark from images and instances, sweep the rest.

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};

use kiln_contract::{Digest, Home};

use crate::error::Context as _;
use crate::extents::exclusive_bytes;
use crate::format::stack_key;
use crate::image::listed_manifests;
use crate::lazy::Record;
use crate::split::Split;
use crate::tag::files_below;
use crate::{ImageName, Result, Store, StoreError, VersionPolicy, staging};

/// What a collection may take beyond what nothing needs any more.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct GcOptions {
    /// Images without a tag that no instance uses, too. Older versions in the history of a tag (`~1`) count as untagged,
    /// unless `versions` says which of them stay.
    pub untagged: bool,
    /// Which older versions go out of the histories of tags. Those that stay keep their images, except with `all`.
    pub versions: Option<VersionPolicy>,
    /// All images that no instance uses, with their tags.
    pub all: bool,
    /// A layer that instances have below those of their images: it stays, and so do merged trees that stand on it.
    pub below: Option<Digest>,
    /// Only tell what would be removed.
    pub dry_run: bool,
}

/// What a collection removed.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct GcReport {
    /// Older versions that went out of the histories of tags: `name:tag~N` as they were called before.
    pub versions: Vec<String>,
    /// Images: their names, or their short ids.
    pub images: Vec<String>,
    /// Objects.
    pub objects: u64,
    /// Layers.
    pub layers: u64,
    /// Manifests, configs and indexes.
    pub blobs: u64,
    /// Merged trees and image disks.
    pub renders: u64,
    /// Bytes of all of them.
    pub bytes: u64,
}

impl Store {
    /// Removes what no image and no instance needs; and image disks, which may take as much as their images and can be
    /// made again, unless an instance has the image. `in_use` gives the images (by id or manifest) and layers of
    /// instances; it is asked when nobody else has the store open, so that what was being made meanwhile is seen. It must
    /// not open the store itself.
    ///
    /// Takes the store's lock exclusively: it waits until nobody has the store open, so also for a pull in progress, and
    /// the caller must not have it open itself.
    ///
    /// # Errors
    /// `in_use` fails; the store cannot be read or changed. What was removed until then stays so; nothing that is needed is.
    pub fn gc<E: From<StoreError>>(
        home: &Home,
        in_use: impl FnOnce() -> std::result::Result<Vec<Digest>, E>,
        options: &GcOptions,
    ) -> std::result::Result<GcReport, E> {
        let store = Store::open_alone(home)?;
        let mut report = GcReport::default();
        let in_use = in_use()?.into_iter().collect();
        let mut kept = HashSet::new();
        if let Some(policy) = &options.versions {
            (report.versions, kept) = store.thin_histories(policy, options.dry_run)?;
        }
        let live = store.mark(&in_use, &kept, options, &mut report)?;
        let mut sweep = Sweep { dry_run: options.dry_run, bytes: 0, names: HashMap::new() };
        store.sweep(&live, &mut sweep, &mut report)?;
        report.bytes = sweep.bytes + staging::sweep(&store.layout, options.dry_run)?;
        Ok(report)
    }

    /// `kept`: manifests to which a tag points or pointed.
    fn mark(
        &self,
        in_use: &HashSet<Digest>,
        kept: &HashSet<Digest>,
        options: &GcOptions,
        report: &mut GcReport,
    ) -> Result<Live> {
        let mut live = Live { layers: in_use.clone(), ..Live::default() };
        if let Some(below) = options.below {
            live.layers.insert(below);
            live.diffs.insert(self.diff_id_of_layer(&below)?);
        }
        for id in self.image_ids()? {
            let manifests = self.manifests_of(&id)?;
            let used = in_use.contains(&id) || manifests.iter().any(|manifest| in_use.contains(manifest));
            let names = self.names_of(&id)?;
            let named = !names.is_empty() || manifests.iter().any(|manifest| kept.contains(manifest));
            let dropped = options.all || (options.untagged && !named);
            if dropped && !used {
                let familiar: Vec<_> = names.iter().map(ImageName::familiar).collect();
                report.images.push(if names.is_empty() { id.short() } else { familiar.join(", ") });
                if !options.dry_run {
                    for name in &names {
                        self.untag(name)?;
                    }
                    self.forget_image(&id)?;
                }
                continue;
            }
            live.blobs.insert(id);
            live.blobs.extend(&manifests);
            live.blobs.extend(self.origin_of(&id)?.indexes);
            // A damaged image keeps what can still be told of it; `check` has the word on it.
            for diff_id in self.promised(&id)? {
                live.diffs.insert(diff_id);
                live.layers.extend(self.layer_of_diff_id(&diff_id)?);
            }
            for manifest in &manifests {
                live.lazy.extend(self.lazy_keys_of(manifest)?);
            }
            if let Ok(Some(image)) = self.image(&id) {
                live.diffs.extend(image.diff_ids());
                live.renders.insert(stack_key(&image.layers));
                if used {
                    live.disks.insert(stack_key(&image.layers));
                }
                if let Some(below) = options.below {
                    live.renders.insert(stack_key(&[&[below], &image.layers[..]].concat()));
                }
                live.layers.extend(image.layers);
            }
        }
        for path in self.lazy_paths()? {
            let (Some(key), Some(head)) = (digest_of_name(&path), Record::head(&path)?) else { continue };
            // Also of layers that something uses whose images have gone: their files come from there.
            if live.lazy.contains(&key) || live.layers.contains(&head.layer) {
                live.lazy.insert(key);
                if self.layer_of_diff_id(&head.diff_id)?.is_none() {
                    live.layers.insert(head.layer);
                }
            }
        }
        for layer in live.layers.clone() {
            // All that its tar had: also files that a later entry replaced, and so what it takes to make a lost tree again.
            live.objects.extend(self.split_objects(&self.layout.layer_split(&layer))?);
            let file = match self.layer_tree(&layer) {
                Err(StoreError::Missing { .. }) => continue,
                // Whatever else it is, its objects are not known: nothing may be taken for unneeded.
                other => other?,
            };
            for object in objects_of(&file)? {
                live.objects.insert(object.0);
            }
        }
        for diff_id in live.diffs.clone() {
            live.objects.extend(self.split_objects(&self.layout.diff_split(&diff_id))?);
        }
        Ok(live)
    }

    /// The layers that an image's config names, as far as it can be read.
    fn promised(&self, id: &Digest) -> Result<Vec<Digest>> {
        let Some(config) = self.blob(id)? else { return Ok(Vec::new()) };
        let config = serde_json::from_slice::<oci_spec::image::ImageConfiguration>(&config);
        let texts = config.map(|config| config.rootfs().diff_ids().clone()).unwrap_or_default();
        Ok(texts.iter().filter_map(|text| text.parse().ok()).collect())
    }

    fn split_objects(&self, path: &Path) -> Result<Vec<Digest>> {
        Split::open(path)?.map_or_else(|| Ok(Vec::new()), |split| split.objects())
    }

    fn sweep(&self, live: &Live, sweep: &mut Sweep, report: &mut GcReport) -> Result<()> {
        let layout = &self.layout;
        if !sweep.dry_run {
            self.forget_stacks()?;
        }
        // In this order: whoever is killed in between leaves no layer without its objects.
        for path in self.image_disks()? {
            if !digest_of_name(&path).is_some_and(|key| live.disks.contains(&key)) {
                report.renders += 1;
                sweep.remove_disk(&path)?;
            }
        }
        for path in files_below(&layout.merged())? {
            if !digest_of_name(&path).is_some_and(|key| live.renders.contains(&key)) {
                report.renders += 1;
                sweep.remove(&path)?;
            }
        }
        for path in files_below(&layout.diffs())? {
            let is_blob = path.parent() == Some(&layout.diff_blobs());
            let digest = digest_of_name(&path);
            let keep = if is_blob {
                let diff_id = digest.map(|blob| self.diff_id_of_blob(&blob)).transpose()?.flatten();
                diff_id.is_some_and(|diff_id| live.diffs.contains(&diff_id))
            } else {
                match digest {
                    Some(diff_id) if live.diffs.contains(&diff_id) => true,
                    // A layer that only an instance needs keeps its own tar.
                    Some(diff_id) => {
                        self.layer_of_diff_id(&diff_id)?.is_some_and(|layer| live.layers.contains(&layer))
                    }
                    None => false,
                }
            };
            if !keep {
                sweep.remove(&path)?;
            }
        }
        for path in self.lazy_paths()? {
            let live = digest_of_name(&path).is_some_and(|key| live.lazy.contains(&key));
            // What came whole is told by its own records.
            let came = match Record::head(&path)? {
                Some(head) => self.layer_of_diff_id(&head.diff_id)?.is_some(),
                None => false,
            };
            if !live || came {
                sweep.remove(&path)?;
            }
        }
        for path in files_below(&layout.layers())? {
            if !digest_of_name(&path).is_some_and(|layer| live.layers.contains(&layer)) {
                report.layers += u64::from(path.extension().is_some_and(|extension| extension == "erofs"));
                sweep.remove(&path)?;
            }
        }
        for path in files_below(&layout.blobs())? {
            let digest = digest_of_name(&path);
            if digest.is_some_and(|digest| live.blobs.contains(&digest)) {
                continue;
            }
            // An index stays as long as one of its images.
            let listed = std::fs::read(&path).ok().and_then(|bytes| listed_manifests(&bytes));
            if !listed.is_some_and(|listed| listed.iter().any(|manifest| live.blobs.contains(manifest))) {
                report.blobs += 1;
                sweep.remove(&path)?;
            }
        }
        for path in files_below(&layout.objects())? {
            if !object_of_path(&path).is_some_and(|object| live.objects.contains(&object)) {
                report.objects += 1;
                sweep.remove(&path)?;
            }
        }
        Ok(())
    }
}

#[derive(Default)]
struct Live {
    layers: HashSet<Digest>,
    /// What records of lazy layers are named by.
    lazy: HashSet<Digest>,
    diffs: HashSet<Digest>,
    blobs: HashSet<Digest>,
    objects: HashSet<Digest>,
    renders: HashSet<Digest>,
    /// Image disks may be as large as their images: one stays only while an instance may need it.
    disks: HashSet<Digest>,
}

struct Sweep {
    dry_run: bool,
    bytes: u64,
    /// How many names are left of each inode that lost one.
    names: HashMap<u64, u64>,
}

impl Sweep {
    fn remove(&mut self, path: &PathBuf) -> Result<()> {
        use std::os::unix::fs::MetadataExt as _;
        let metadata = std::fs::symlink_metadata(path).doing("read", path)?;
        // A merged tree may be another name of a layer: its bytes go with the last name.
        let names = self.names.entry(metadata.ino()).or_insert(metadata.nlink());
        *names -= 1;
        if *names == 0 {
            self.bytes += metadata.len();
        }
        self.unlink(path)
    }

    /// A disk gives back what it does not share with objects.
    fn remove_disk(&mut self, path: &Path) -> Result<()> {
        self.bytes += exclusive_bytes(path)?;
        self.unlink(path)
    }

    fn unlink(&self, path: &Path) -> Result<()> {
        if self.dry_run { Ok(()) } else { std::fs::remove_file(path).doing("remove", path) }
    }
}

/// The digest that a file is named by, without its extension.
pub(crate) fn digest_of_name(path: &Path) -> Option<Digest> {
    Digest::from_hex(path.file_stem()?.to_str()?).ok()
}

/// The digest of the object at a path `…/ab/cdef…`.
pub(crate) fn object_of_path(path: &Path) -> Option<Digest> {
    let (directory, name) = (path.parent()?.file_name()?.to_str()?, path.file_name()?.to_str()?);
    Digest::from_hex(&format!("{directory}{name}")).ok()
}

/// The objects of a tree, with their sizes.
pub(crate) fn objects_of(file: &crate::tree_file::TreeFile) -> Result<Vec<(Digest, u64)>> {
    let image = file.image()?;
    let collect = || {
        let mut objects = Vec::new();
        let mut stack = vec![image.root()?];
        while let Some(directory) = stack.pop() {
            for entry in directory.entries(0) {
                let entry = entry?;
                match entry.file_type {
                    kiln_erofs::FileType::Directory => stack.push(image.inode(entry.nid)?),
                    kiln_erofs::FileType::Regular => {
                        if let kiln_erofs::Data::Object { digest, size } = image.inode(entry.nid)?.data()? {
                            objects.push((digest, size));
                        }
                    }
                    _ => {}
                }
            }
        }
        Ok(objects)
    };
    collect().map_err(|source| file.damaged(source))
}
