//! Everything in the store against its digest, and whether everything is there that something needs.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::thread;

use kiln_contract::{Digest, Hasher};

use crate::error::Context as _;
use crate::gc::{digest_of_name, object_of_path, objects_of};
use crate::lazy::Record;
use crate::needs::Needs;
use crate::repair::Repair;
use crate::split::Split;
use crate::tag::files_below;
use crate::{Result, Store, StoreError};

/// What a check found.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CheckReport {
    /// Objects that were read.
    pub objects: u64,
    /// Layers.
    pub layers: u64,
    /// Images.
    pub images: u64,
    /// Bytes that were read to verify objects.
    pub bytes: u64,
    /// What is missing or damaged, a line each: the path, and what it should be and is.
    pub damaged: Vec<String>,
    /// What of that was brought back, or was not needed and removed.
    pub repaired: Vec<String>,
    /// Layers whose files are not all here yet, a line each: that is no damage.
    pub absent: Vec<String>,
}

/// What is wrong, by kind, so that it can be asked for again.
#[derive(Debug, Default)]
pub(crate) struct Findings {
    /// For the user, by path.
    lines: BTreeMap<PathBuf, String>,
    /// Damaged or missing.
    pub(crate) objects: BTreeSet<Digest>,
    /// Layers whose trees are damaged or missing.
    pub(crate) trees: BTreeSet<Digest>,
    /// Split streams that are damaged or missing, and whose layers they belong to.
    pub(crate) splits: BTreeMap<PathBuf, Digest>,
    /// Tars of which the store does not know what they became.
    pub(crate) tars: BTreeSet<Digest>,
    /// Merged trees that are not what their layers make.
    pub(crate) renders: Vec<PathBuf>,
    /// Which layers need which object.
    pub(crate) users: HashMap<Digest, Vec<Digest>>,
    /// By tars, the layers that they became.
    pub(crate) layer_of: BTreeMap<Digest, Digest>,
    /// By tars that have not come whole, the lazy layers that there are of them.
    pub(crate) lazy: BTreeMap<Digest, BTreeSet<Digest>>,
    /// Lazy layers of tars that have come whole since, and are other layers.
    superseded: BTreeSet<Digest>,
}

impl Findings {
    pub(crate) fn add(&mut self, path: &Path, what: impl std::fmt::Display) {
        self.lines.entry(path.to_owned()).or_insert_with(|| format!("{}: {what}", path.display()));
    }

    /// What was wrong is put right, or was not needed and is gone.
    pub(crate) fn forget(&mut self, path: &Path) {
        self.lines.remove(path);
    }

    /// Whether it is a layer whose files need not be here.
    fn is_lazy(&self, layer: &Digest) -> bool {
        self.superseded.contains(layer) || self.lazy.values().any(|layers| layers.contains(layer))
    }

    /// Whether all layers that there are could say which objects they need.
    pub(crate) fn knows_all_users(&self) -> bool {
        self.trees.is_empty() && self.splits.is_empty() && self.tars.is_empty()
    }
}

impl Store {
    /// Verifies every object, tree, blob and split stream by its digest, that images, tags and trees have all that they
    /// name, and that merged trees and image disks are what their layers make.
    ///
    /// With `repair`, what is missing or damaged is asked for again: manifests, indexes and configs first, then the layers
    /// that lack something, which are imported anew. What is there stays until what replaces it has come and has the
    /// right digest. What the store can make again from what else it has, it does first. At last, damaged files that nothing needs, and wrong merged trees and disks, are removed.
    ///
    /// What stays wrong is remembered: whatever brings in an image afterwards brings that in again.
    ///
    /// # Errors
    /// The store cannot be read at all; what is wrong *in* it is in the report.
    pub fn check(&self, repair: Option<&dyn Repair>) -> Result<CheckReport> {
        let (mut report, mut findings) = self.inspect()?;
        // A repair makes lazy layers whole.
        let nothing = findings.lines.is_empty() && findings.lazy.is_empty();
        let Some(repair) = repair.filter(|_| !nothing) else {
            self.remember_damage(&findings)?;
            report.damaged = findings.lines.into_values().collect();
            return Ok(report);
        };
        findings.tars.extend(findings.lazy.keys());
        let failed = self.repair(repair, &mut findings)?;
        let (again, mut left) = self.inspect()?;
        report.absent = again.absent;
        self.remove_useless(&mut left)?;
        self.remember_damage(&left)?;
        findings.lines.retain(|path, _| !left.lines.contains_key(path));
        report.repaired = findings.lines.into_values().collect();
        report.damaged = left.lines.into_values().chain(failed).collect();
        Ok(report)
    }

    fn inspect(&self) -> Result<(CheckReport, Findings)> {
        let mut report = CheckReport::default();
        let mut findings = Findings::default();
        self.check_lazy(&mut findings)?;
        self.check_objects(&mut report, &mut findings)?;
        self.check_layers(&mut report, &mut findings)?;
        self.check_blobs(&mut findings)?;
        self.check_needs(&self.needs()?, &mut findings)?;
        self.check_images(&mut report, &mut findings)?;
        self.check_renders(&mut findings)?;
        Ok((report, findings))
    }

    /// Which layers need not have all their files here.
    fn check_lazy(&self, findings: &mut Findings) -> Result<()> {
        for path in self.lazy_paths()? {
            let head = Record::head(&path)?;
            if let Some(head) = &head {
                if self.layer_of_diff_id(&head.diff_id)?.is_some() {
                    findings.superseded.insert(head.layer);
                    continue;
                }
                findings.lazy.entry(head.diff_id).or_default().insert(head.layer);
                findings.layer_of.insert(head.diff_id, head.layer);
            }
            if let Err(error) = Record::open(&path) {
                findings.add(&path, error);
                // It is made again with the tree.
                findings.trees.extend(head.map(|head| head.layer));
            }
        }
        Ok(())
    }

    fn check_objects(&self, report: &mut CheckReport, findings: &mut Findings) -> Result<()> {
        let paths = files_below(&self.layout.objects())?;
        let (next, bytes, bad) = (AtomicUsize::new(0), AtomicU64::new(0), Mutex::new(Vec::new()));
        let work = || {
            let mut buffer = vec![0; 256 << 10];
            while let Some(path) = paths.get(next.fetch_add(1, Ordering::Relaxed)) {
                let what = match (object_of_path(path), digest_of_file(path, &mut buffer, &bytes)) {
                    (None, _) => "it is no object".to_owned(),
                    (Some(expected), Ok(found)) if expected == found => continue,
                    (Some(expected), Ok(found)) => format!("it has digest {found}, expected {expected}"),
                    (Some(expected), Err(error)) => format!("{expected} cannot be read: {error}"),
                };
                bad.lock().expect("no check panics").push((path, what));
            }
        };
        let threads = thread::available_parallelism().map_or(1, usize::from).min(8);
        thread::scope(|scope| {
            for _ in 0..threads {
                scope.spawn(work);
            }
        });
        for (path, what) in bad.into_inner().expect("no check panics") {
            findings.add(path, what);
            findings.objects.extend(object_of_path(path));
        }
        report.objects = paths.len() as u64;
        report.bytes = bytes.into_inner();
        Ok(())
    }

    fn check_layers(&self, report: &mut CheckReport, findings: &mut Findings) -> Result<()> {
        let mut buffer = vec![0; 256 << 10];
        for path in files_below(&self.layout.layers())? {
            let Some(layer) = digest_of_name(&path) else {
                findings.add(&path, "it is no layer");
                continue;
            };
            if path.extension().is_some_and(|extension| extension == "split") {
                // One without its tree is what an import left that was killed between two renames; what needs the tree
                // tells that it is missing.
                if !self.layout.layer(&layer).exists()
                    && let Some(objects) =
                        Split::open(&path).ok().flatten().and_then(|split| split.objects().ok())
                {
                    for object in objects {
                        findings.users.entry(object).or_default().push(layer);
                    }
                }
                continue;
            }
            report.layers += 1;
            let found = digest_of_file(&path, &mut buffer, &AtomicU64::new(0)).doing("read", &path)?;
            if found != layer {
                findings.add(&path, format!("it has digest {found}, expected {layer}"));
                findings.trees.insert(layer);
                continue;
            }
            let objects = match self.layer_tree(&layer).and_then(|file| objects_of(&file)) {
                Ok(objects) => objects,
                Err(error) => {
                    findings.add(&path, error);
                    findings.trees.insert(layer);
                    continue;
                }
            };
            let is_lazy = findings.is_lazy(&layer) && !self.layout.layer_split(&layer).exists();
            let (mut here, all) = (0, objects.len());
            for (object, size) in objects {
                let at = self.layout.object(&object);
                match std::fs::metadata(&at) {
                    Ok(there) if there.len() == size => here += 1,
                    Ok(there) => {
                        findings.add(&at, format!("it has {} bytes, layer {layer} says {size}", there.len()));
                        findings.objects.insert(object);
                    }
                    Err(_) if is_lazy => {}
                    Err(_) => {
                        findings.add(&at, format!("object {object} is missing, layer {layer} needs it"));
                        findings.objects.insert(object);
                    }
                }
                findings.users.entry(object).or_default().push(layer);
            }
            if is_lazy {
                if !findings.superseded.contains(&layer) {
                    report.absent.push(format!("layer {layer}: {here} of {all} files are here"));
                }
                continue;
            }
            self.check_split(&self.layout.layer_split(&layer), &layer, findings);
        }
        for layer in findings.lazy.values().flatten().copied().collect::<Vec<_>>() {
            let path = self.layout.layer(&layer);
            if !path.exists() {
                findings.add(&path, format!("layer {layer} is missing"));
            }
        }
        self.check_diffs(findings)
    }

    /// What is known of tars, and the split streams of those that became a layer that another one became before.
    fn check_diffs(&self, findings: &mut Findings) -> Result<()> {
        let diffs = self.layout.diffs();
        for path in files_below(&diffs)?.iter().filter(|path| path.parent() == Some(&*diffs)) {
            let Some(diff_id) = digest_of_name(path) else { continue };
            let Some(layer) = self.recorded_layer(&diff_id)? else { continue };
            if path.extension().is_none() {
                findings.layer_of.insert(diff_id, layer);
                let tree = self.layout.layer(&layer);
                if !tree.exists() {
                    findings.add(&tree, format!("layer {layer} is missing"));
                    findings.trees.insert(layer);
                }
            } else if path.extension().is_some_and(|extension| extension == "split")
                && self.layout.layer(&layer).exists()
            {
                self.check_split(path, &layer, findings);
            }
        }
        Ok(())
    }

    fn check_split(&self, path: &Path, layer: &Digest, findings: &mut Findings) {
        let mut check = || {
            let Some(split) = Split::open(path)? else {
                findings.add(path, format!("the split stream of layer {layer} is missing"));
                return Ok(false);
            };
            let mut is_told = false;
            for object in split.objects()? {
                findings.users.entry(object).or_default().push(*layer);
                is_told |= findings.objects.contains(&object);
            }
            if is_told {
                // The tar would be wrong for no fault of the stream.
                return Ok(true);
            }
            let mut hasher = Hasher::new();
            self.export(layer, &split, &mut hasher)?;
            let (found, expected) = (hasher.finish(), split.info().diff_id);
            if found != expected {
                findings.add(path, format!("its tar has digest {found}, expected {expected}"));
            }
            Ok::<_, crate::StoreError>(found == expected)
        };
        let sound = check().unwrap_or_else(|error| {
            findings.add(path, error);
            false
        });
        if !sound {
            findings.splits.insert(path.to_owned(), *layer);
        }
    }

    fn check_blobs(&self, findings: &mut Findings) -> Result<()> {
        for path in files_below(&self.layout.blobs())? {
            match digest_of_name(&path).map(|digest| self.blob(&digest)) {
                Some(Ok(_)) => {}
                Some(Err(error)) => findings.add(&path, error),
                None => findings.add(&path, "it is no blob"),
            }
        }
        Ok(())
    }

    /// Whether what images and tags need is there; whether it is sound is found where it lies.
    pub(crate) fn check_needs(&self, needs: &Needs, findings: &mut Findings) -> Result<()> {
        for (digest, document) in &needs.documents {
            let path = self.layout.blob(digest);
            if !path.exists() {
                findings.add(
                    &path,
                    format!("the {} {digest} is missing, {} needs it", document.kind, document.by),
                );
            }
        }
        for (manifest, id) in &needs.unregistered {
            findings.add(&self.layout.image(id), format!("the record of the image of {manifest} is missing"));
        }
        for (diff_id, needed) in &needs.layers {
            let by = &needed.by;
            let Some(layer) = self.recorded_layer(diff_id)? else {
                if findings.lazy.contains_key(diff_id) {
                    continue;
                }
                let path = self.layout.diff(diff_id);
                findings.add(&path, format!("no layer is known for the tar {diff_id}, {by} needs it"));
                findings.tars.insert(*diff_id);
                continue;
            };
            // Missing trees are found by their records.
            let split = self.layout.layer_split(&layer);
            let is_own =
                self.split_info(&layer).is_ok_and(|info| info.is_some_and(|i| i.diff_id == *diff_id));
            let other = self.layout.diff_split(diff_id);
            if !is_own && !other.exists() && !findings.splits.contains_key(&split) && split.exists() {
                findings
                    .add(&other, format!("the split stream of the tar {diff_id} is missing, {by} needs it"));
                findings.splits.insert(other, layer);
            }
        }
        Ok(())
    }

    /// Whether documents that are there make sense together.
    fn check_images(&self, report: &mut CheckReport, findings: &mut Findings) -> Result<()> {
        for id in self.image_ids()? {
            report.images += 1;
            let path = self.layout.image(&id);
            for manifest in self.manifests_of(&id)? {
                match self.image_of_manifest(&manifest) {
                    Ok(Some(image)) if image.id == id => {}
                    Ok(None) if self.readable_blob(&manifest) => {
                        findings.add(&path, format!("its manifest {manifest} is none"));
                    }
                    // What is missing or damaged is told by its own name.
                    Ok(None) | Err(StoreError::Missing { .. } | StoreError::Damaged { .. }) => {}
                    Ok(Some(image)) => {
                        findings.add(&path, format!("its manifest {manifest} is of image {}", image.id));
                    }
                    Err(error) => findings.add(&path, error),
                }
            }
        }
        Ok(())
    }

    /// Finds merged trees, image disks and what is kept of stacks that are wrong.
    fn check_renders(&self, findings: &mut Findings) -> Result<()> {
        for path in self.wrong_stacks()? {
            findings.add(&path, "it is not what its image says");
            findings.renders.push(path);
        }
        let mut buffer = vec![0; 256 << 10];
        for id in self.image_ids()? {
            let Ok(Some(image)) = self.image(&id) else { continue };
            if let Ok(Some((path, what))) = self.check_image_disk(&image.layers) {
                findings.add(&path, what);
                findings.renders.push(path);
            }
            let path = self.layout.merged_tree(&crate::format::stack_key(&image.layers));
            let Ok(found) = digest_of_file(&path, &mut buffer, &AtomicU64::new(0)) else { continue };
            let Ok(expected) = self.merged_digest(&image.layers) else { continue };
            if found != expected {
                findings.add(&path, format!("it has digest {found}, its layers make {expected}"));
                findings.renders.push(path);
            }
        }
        Ok(())
    }
}

/// Reads a file to its end; `bytes` counts what was read.
pub(crate) fn digest_of_file(path: &Path, buffer: &mut [u8], bytes: &AtomicU64) -> std::io::Result<Digest> {
    let mut file = File::open(path)?;
    let mut hasher = Hasher::new();
    loop {
        match file.read(buffer) {
            Ok(0) => return Ok(hasher.finish()),
            Ok(count) => {
                hasher.update(&buffer[..count]);
                bytes.fetch_add(count as u64, Ordering::Relaxed);
            }
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}
