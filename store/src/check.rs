//! Everything in the store against its digest.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::thread;

use kiln_contract::{Digest, Hasher};
use oci_spec::image::Descriptor;

use crate::error::Context as _;
use crate::gc::{digest_of_name, object_of_path, objects_of};
use crate::limits::ImportLimits;
use crate::split::Split;
use crate::tag::files_below;
use crate::{Result, Store, lines};

/// Gives back what a check found missing or damaged.
pub trait Repair {
    /// The uncompressed tar with this digest. `blobs` are compressed forms of it that registries are known to have.
    ///
    /// # Errors
    /// It cannot be had.
    fn layer(&self, diff_id: &Digest, blobs: &[Descriptor]) -> std::io::Result<Box<dyn Read + Send>>;
}

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
}

/// What is wrong, by layer and object, so that it can be asked for again.
#[derive(Default)]
struct Findings {
    lines: BTreeMap<PathBuf, String>,
    objects: HashSet<Digest>,
    layers: HashSet<Digest>,
}

impl Findings {
    fn add(&mut self, path: &Path, what: impl std::fmt::Display) {
        self.lines.entry(path.to_owned()).or_insert_with(|| format!("{}: {what}", path.display()));
    }
}

impl Store {
    /// Verifies every object, tree, blob and split stream by its digest, that trees and images have all that they name,
    /// and that merged trees are what their layers make. With `repair`, layers that lack something are imported
    /// again; damaged objects that no layer needs, and damaged merged trees, are removed.
    ///
    /// # Errors
    /// The store cannot be read at all; what is wrong *in* it is in the report.
    pub fn check(&self, repair: Option<&dyn Repair>) -> Result<CheckReport> {
        let mut report = CheckReport::default();
        let mut findings = Findings::default();
        self.check_objects(&mut report, &mut findings)?;
        let needed = self.check_layers(&mut report, &mut findings)?;
        self.check_blobs(&mut findings)?;
        self.check_images(&mut report, &mut findings)?;
        let renders = self.check_renders(&mut findings)?;
        report.damaged = findings.lines.values().cloned().collect();
        if let Some(repair) = repair
            && !report.damaged.is_empty()
        {
            for path in &renders {
                std::fs::remove_file(path).doing("remove", path)?;
            }
            for object in findings.objects.iter().filter(|object| !needed.contains_key(object)) {
                let path = self.layout.object(object);
                std::fs::remove_file(&path).doing("remove", &path)?;
            }
            let failed = self.repair_layers(repair, &findings, &needed)?;
            let left = self.check(None)?;
            let was = std::mem::take(&mut report.damaged);
            let key = |line: &String| line.split(": ").next().map(str::to_owned);
            let still: HashSet<_> = left.damaged.iter().map(key).collect();
            report.repaired = was.into_iter().filter(|line| !still.contains(&key(line))).collect();
            report.damaged = left.damaged;
            report.damaged.extend(failed);
        }
        Ok(report)
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

    /// Returns which layers need which object.
    fn check_layers(
        &self,
        report: &mut CheckReport,
        findings: &mut Findings,
    ) -> Result<HashMap<Digest, Vec<Digest>>> {
        let mut needed: HashMap<Digest, Vec<Digest>> = HashMap::new();
        let mut buffer = vec![0; 256 << 10];
        for path in files_below(&self.layout.layers())? {
            let Some(layer) = digest_of_name(&path) else {
                findings.add(&path, "it is no layer");
                continue;
            };
            if path.extension().is_some_and(|extension| extension == "split") {
                if !self.layout.layer(&layer).exists() {
                    findings.add(&self.layout.layer(&layer), format!("layer {layer} is missing"));
                    findings.layers.insert(layer);
                }
                continue;
            }
            report.layers += 1;
            let found = digest_of_file(&path, &mut buffer, &AtomicU64::new(0)).doing("read", &path)?;
            if found != layer {
                findings.add(&path, format!("it has digest {found}, expected {layer}"));
                findings.layers.insert(layer);
                continue;
            }
            let objects = match self.layer_tree(&layer).and_then(|file| objects_of(&file)) {
                Ok(objects) => objects,
                Err(error) => {
                    findings.add(&path, error);
                    findings.layers.insert(layer);
                    continue;
                }
            };
            for (object, size) in objects {
                let at = self.layout.object(&object);
                match std::fs::metadata(&at) {
                    Ok(there) if there.len() == size => {}
                    Ok(there) => {
                        findings.add(&at, format!("it has {} bytes, layer {layer} says {size}", there.len()));
                        findings.objects.insert(object);
                    }
                    Err(_) => {
                        findings.add(&at, format!("object {object} is missing, layer {layer} needs it"));
                        findings.objects.insert(object);
                    }
                }
                needed.entry(object).or_default().push(layer);
            }
            self.check_split(&self.layout.layer_split(&layer), &layer, findings, &mut needed);
        }
        for path in files_below(&self.layout.diffs())? {
            if path.extension().is_some_and(|extension| extension == "split")
                && let Some(layer) = digest_of_name(&path).and_then(|id| self.layer_of_diff_id(&id).ok()?)
            {
                self.check_split(&path, &layer, findings, &mut needed);
            }
        }
        Ok(needed)
    }

    fn check_split(
        &self,
        path: &Path,
        layer: &Digest,
        findings: &mut Findings,
        needed: &mut HashMap<Digest, Vec<Digest>>,
    ) {
        let mut check = || {
            let Some(split) = Split::open(path)? else {
                findings.add(path, format!("the split stream of layer {layer} is missing"));
                return Ok(false);
            };
            for object in split.objects()? {
                needed.entry(object).or_default().push(*layer);
                if findings.objects.contains(&object) {
                    // Told already, and the tar would be wrong for no fault of the stream.
                    return Ok(true);
                }
            }
            let mut hasher = Hasher::new();
            self.export(layer, &split, &mut hasher)?;
            let (found, expected) = (hasher.finish(), split.info().diff_id);
            if found != expected {
                findings.add(path, format!("its tar has digest {found}, expected {expected}"));
            }
            Ok::<_, crate::StoreError>(found == expected)
        };
        match check() {
            Ok(true) => {}
            Ok(false) => {
                findings.layers.insert(*layer);
            }
            Err(error) => {
                findings.add(path, error);
                findings.layers.insert(*layer);
            }
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

    fn check_images(&self, report: &mut CheckReport, findings: &mut Findings) -> Result<()> {
        for id in self.image_ids()? {
            report.images += 1;
            let path = self.layout.image(&id);
            for manifest in self.manifests_of(&id)? {
                match self.image(&manifest) {
                    Ok(Some(image)) if image.id == id => {}
                    Ok(_) => findings.add(&path, format!("its manifest {manifest} is missing")),
                    Err(error) => findings.add(&path, error),
                }
            }
        }
        for (name, entry) in self.tags()? {
            if !self.layout.blob(&entry.target).exists() {
                let path = self.layout.blob(&entry.target);
                findings.add(&path, format!("the manifest of {name} is missing"));
            }
        }
        Ok(())
    }

    /// Returns the merged trees that are wrong.
    fn check_renders(&self, findings: &mut Findings) -> Result<Vec<PathBuf>> {
        let mut wrong = Vec::new();
        let mut buffer = vec![0; 256 << 10];
        for id in self.image_ids()? {
            let Ok(Some(image)) = self.image(&id) else { continue };
            let path = self.layout.merged_tree(&crate::format::stack_key(&image.layers));
            let Ok(found) = digest_of_file(&path, &mut buffer, &AtomicU64::new(0)) else { continue };
            let Ok(expected) = self.merged_digest(&image.layers) else { continue };
            if found != expected {
                findings.add(&path, format!("it has digest {found}, its layers make {expected}"));
                wrong.push(path);
            }
        }
        Ok(wrong)
    }

    /// Imports again what lacks something. Returns what could not be had, a line each.
    fn repair_layers(
        &self,
        repair: &dyn Repair,
        findings: &Findings,
        needed: &HashMap<Digest, Vec<Digest>>,
    ) -> Result<Vec<String>> {
        let mut layers = findings.layers.clone();
        for object in &findings.objects {
            // One of the layers that have it is enough.
            if let Some(of) = needed.get(object)
                && !of.iter().any(|layer| layers.contains(layer))
            {
                layers.extend(of.first());
            }
        }
        let mut failed = Vec::new();
        for path in files_below(&self.layout.diffs())? {
            let Some(diff_id) = digest_of_name(&path).filter(|_| path.extension().is_none()) else {
                continue;
            };
            if path.parent() != Some(&self.layout.diffs()) {
                continue;
            }
            let record = lines::read(&path)?;
            let layer: Option<Digest> =
                record.iter().rev().find_map(|line| line.strip_prefix("layer ")?.parse().ok());
            let Some(layer) = layer.filter(|layer| layers.contains(layer)) else { continue };
            let tar = match repair.layer(&diff_id, &self.blobs_of_diff_id(&diff_id)?) {
                Ok(tar) => tar,
                Err(error) => {
                    failed.push(format!("layer {layer} could not be fetched: {error}"));
                    continue;
                }
            };
            // A stream or tree that is damaged must not be taken for another one's.
            if findings.layers.contains(&layer) {
                for path in [self.layout.layer(&layer), self.layout.layer_split(&layer)] {
                    let _ = std::fs::remove_file(path);
                }
            }
            let imported =
                self.import_tar_rewriting(tar, Some(&diff_id), ImportLimits::default(), &findings.objects);
            if let Err(error) = imported {
                failed.push(format!("layer {layer} could not be imported: {error}"));
            }
        }
        Ok(failed)
    }
}

fn digest_of_file(path: &Path, buffer: &mut [u8], bytes: &AtomicU64) -> std::io::Result<Digest> {
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
