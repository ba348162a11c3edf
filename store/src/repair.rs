//! Getting back what a check found missing or damaged.
//!
//! First documents, for only they say which layers there must be; then layers; then the records of images. Nothing is
//! removed for the sake of what is to come: an import replaces objects, trees and split streams by renames, after all of
//! it has come and has the right digest, and documents go the same way. What is left damaged at the end and is needed
//! by nothing is removed, so that it is in nobody's way.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufWriter, PipeWriter, Read};
use std::path::{Path, PathBuf};

use kiln_contract::Digest;
use oci_spec::image::Descriptor;

use crate::check::Findings;
use crate::error::Context as _;
use crate::gc::digest_of_name;
use crate::import::Replaced;
use crate::lazy::Record;
use crate::limits::ImportLimits;
use crate::mount_points::mount_points;
use crate::needs::{DocumentKind, Needs};
use crate::split::Split;
use crate::tag::files_below;
use crate::tar::write::write_tree;
use crate::{Result, Store};

/// A manifest, index or config that is asked for again.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WantedDocument {
    /// Its digest.
    pub digest: Digest,
    /// What it is.
    pub kind: DocumentKind,
    /// Repositories (`registry/path`) that may have it, the most likely first.
    pub repositories: Vec<String>,
}

/// A layer that is asked for again.
#[derive(Debug, Clone, PartialEq)]
pub struct WantedLayer {
    /// The digest of its uncompressed tar.
    pub diff_id: Digest,
    /// Forms of that tar that registries have or had.
    pub blobs: Vec<Descriptor>,
    /// Repositories (`registry/path`) that may have one of them, the most likely first.
    pub repositories: Vec<String>,
}

/// A part of a blob that is asked for.
#[derive(Debug, Clone, PartialEq)]
pub struct WantedRange {
    /// The blob.
    pub blob: Descriptor,
    /// Repositories (`registry/path`) that may have it, the most likely first.
    pub repositories: Vec<String>,
    /// Where the part begins.
    pub offset: u64,
    /// How many bytes it has.
    pub length: u64,
}

/// Gives back what a check found missing or damaged. What it gives is not believed: it replaces nothing unless its digest
/// is the wanted one.
pub trait Repair {
    /// A document's bytes.
    ///
    /// # Errors
    /// It cannot be had.
    fn document(&self, wanted: &WantedDocument) -> std::io::Result<Vec<u8>>;

    /// The uncompressed tar of a layer.
    ///
    /// # Errors
    /// It cannot be had.
    fn layer(&self, wanted: &WantedLayer) -> std::io::Result<Box<dyn Read + Send>>;

    /// A part of a blob, as it is there.
    ///
    /// # Errors
    /// It cannot be had; nobody gives parts unless this is said otherwise.
    fn range(&self, wanted: &WantedRange) -> std::io::Result<Box<dyn Read + Send>> {
        let what = format!("nobody is known to give parts of {}", wanted.blob.digest());
        Err(std::io::Error::new(std::io::ErrorKind::Unsupported, what))
    }
}

/// A layer to be imported again: any one of some tars will do.
struct Want {
    /// For messages.
    what: String,
    diff_ids: Vec<Digest>,
    /// A split stream that is to be replaced, with the layer that it is of.
    split: Option<(Digest, PathBuf)>,
}

impl Store {
    /// Asks for what is wrong, and puts it right. Returns what could not be had, a line each. What turns out to be missing
    /// once documents are back is added to `findings`.
    pub(crate) fn repair(&self, repair: &dyn Repair, findings: &mut Findings) -> Result<Vec<String>> {
        let mut failed = self.repair_documents(repair)?;
        let needs = self.needs()?;
        self.check_needs(&needs, findings)?;
        self.repair_layers(repair, findings, &needs, &mut failed)?;
        for (manifest, id) in &needs.unregistered {
            if let (Ok(Some(manifest)), Ok(Some(config))) = (self.blob(manifest), self.blob(id))
                && let Err(error) = self.put_image(&manifest, &config)
            {
                failed.push(format!("image {id} could not be registered again: {error}"));
            }
        }
        Ok(failed)
    }

    fn repair_documents(&self, repair: &dyn Repair) -> Result<Vec<String>> {
        let mut failed = Vec::new();
        let mut asked = BTreeSet::new();
        loop {
            // One that is back may name others.
            let needs = self.needs()?;
            let mut wanted: Vec<WantedDocument> = needs
                .documents
                .iter()
                .map(|(digest, document)| {
                    let (kind, repositories) = (document.kind, document.repositories.clone());
                    WantedDocument { digest: *digest, kind, repositories }
                })
                .collect();
            for path in files_below(&self.layout.blobs())? {
                // What nothing is known to need may be an index by whose digest an image was asked for.
                if let Some(digest) =
                    digest_of_name(&path).filter(|digest| !needs.documents.contains_key(digest))
                {
                    let (kind, repositories) = (DocumentKind::Index, needs.repositories.clone());
                    wanted.push(WantedDocument { digest, kind, repositories });
                }
            }
            wanted.retain(|wanted| !asked.contains(&wanted.digest) && !self.readable_blob(&wanted.digest));
            if wanted.is_empty() {
                return Ok(failed);
            }
            for wanted in wanted {
                asked.insert(wanted.digest);
                let is_needed = needs.documents.contains_key(&wanted.digest);
                let (kind, digest) = (wanted.kind, wanted.digest);
                match repair.document(&wanted) {
                    Ok(bytes) if Digest::of(&bytes) == digest => self.replace_blob(&bytes)?,
                    Ok(bytes) => failed.push(format!(
                        "the {kind} {digest} could not be fetched: what came has digest {}",
                        Digest::of(&bytes)
                    )),
                    Err(error) if is_needed => {
                        failed.push(format!("the {kind} {digest} could not be fetched: {error}"));
                    }
                    Err(_) => {}
                }
            }
        }
    }

    fn repair_layers(
        &self,
        repair: &dyn Repair,
        findings: &Findings,
        needs: &Needs,
        failed: &mut Vec<String>,
    ) -> Result<()> {
        let mut replaced = Replaced { objects: findings.objects.clone(), ..Replaced::default() };
        let mut done = BTreeSet::new();
        let mut errors: BTreeMap<Digest, String> = BTreeMap::new();
        let mut lines = BTreeSet::new();
        for Want { what, diff_ids, split } in self.wants(findings) {
            if split.is_none() && diff_ids.iter().any(|diff_id| done.contains(diff_id)) {
                continue;
            }
            replaced.split = split;
            // What could not be had once is not asked for again.
            let left: Vec<_> = diff_ids.iter().filter(|diff_id| !errors.contains_key(diff_id)).collect();
            let mut repaired = false;
            for diff_id in left {
                match self.import_again(repair, needs, findings, diff_id, &replaced) {
                    Ok(()) => {
                        done.insert(*diff_id);
                        repaired = true;
                        break;
                    }
                    Err(error) => {
                        errors.insert(*diff_id, error);
                    }
                }
            }
            if !repaired {
                let why = diff_ids.iter().rev().find_map(|diff_id| errors.get(diff_id));
                let why = why.map_or("could not be fetched: nobody is known to have it", String::as_str);
                lines.insert(format!("{what} {why}"));
            }
        }
        failed.extend(lines);
        Ok(())
    }

    /// What has to be imported again. Split streams come first: what brings one of them back brings trees and objects, too.
    fn wants(&self, findings: &Findings) -> Vec<Want> {
        let mut tars: BTreeMap<Digest, Vec<Digest>> = BTreeMap::new();
        for (diff_id, layer) in &findings.layer_of {
            tars.entry(*layer).or_default().push(*diff_id);
        }
        let tars_of = |layer: &Digest| tars.get(layer).cloned().unwrap_or_default();
        let mut wants = Vec::new();
        for (path, layer) in &findings.splits {
            wants.push(Want {
                what: format!("the split stream of layer {layer}"),
                diff_ids: self.tars_of_split(path, tars_of(layer), findings),
                split: Some((*layer, path.clone())),
            });
        }
        let mut want = |what, diff_ids| wants.push(Want { what, diff_ids, split: None });
        for diff_id in &findings.tars {
            want(format!("the layer of the tar {diff_id}"), vec![*diff_id]);
        }
        for layer in &findings.trees {
            want(format!("layer {layer}"), tars_of(layer));
        }
        for object in &findings.objects {
            // One of the layers that have it is enough; and of one that cannot be had it is said once.
            let users = findings.users.get(object).map_or(&[][..], Vec::as_slice);
            if let Some(first) = users.first() {
                want(format!("layer {first}"), users.iter().flat_map(tars_of).collect());
            }
        }
        wants
    }

    /// Which of the tars that became one layer a damaged split stream gave back: the one that it says itself, or else one
    /// that has no stream of its own elsewhere, damaged or not.
    fn tars_of_split(&self, path: &Path, tars: Vec<Digest>, findings: &Findings) -> Vec<Digest> {
        if path.parent() == Some(&*self.layout.diffs()) {
            return digest_of_name(path).into_iter().collect();
        }
        let said = Split::open(path).ok().flatten().map(|split| split.info().diff_id);
        if let Some(said) = said.filter(|said| tars.contains(said)) {
            return vec![said];
        }
        let has_own = |tar: &Digest| {
            let own = self.layout.diff_split(tar);
            own.exists() || findings.splits.contains_key(&own)
        };
        let without: Vec<_> = tars.iter().copied().filter(|tar| !has_own(tar)).collect();
        if without.is_empty() { tars } else { without }
    }

    pub(crate) fn import_again(
        &self,
        repair: &dyn Repair,
        needs: &Needs,
        findings: &Findings,
        diff_id: &Digest,
        replaced: &Replaced,
    ) -> std::result::Result<(), String> {
        if self.import_from_here(diff_id, findings, replaced).is_ok_and(|imported| imported) {
            return Ok(());
        }
        let needed = needs.layers.get(diff_id);
        let mut blobs = needed.map_or_else(Vec::new, |needed| needed.blobs.clone());
        for blob in self.blobs_of_diff_id(diff_id).unwrap_or_default() {
            if !blobs.iter().any(|known| known.digest() == blob.digest()) {
                blobs.push(blob);
            }
        }
        let repositories = needed.map_or(&needs.repositories, |needed| &needed.repositories).clone();
        let tar = repair
            .layer(&WantedLayer { diff_id: *diff_id, blobs, repositories })
            .map_err(|error| format!("could not be fetched: {error}"))?;
        self.import_tar_replacing(tar, Some(diff_id), ImportLimits::default(), replaced)
            .map(drop)
            .map_err(|error| format!("could not be imported: {error}"))
    }

    /// Imports a tar again that the store itself can make, and whether it could: from its split stream and objects where
    /// the tree or the record is lost; from the tree where the stream is; or because Kiln writes it.
    fn import_from_here(&self, diff_id: &Digest, findings: &Findings, replaced: &Replaced) -> Result<bool> {
        // It was let in once.
        let limits = ImportLimits { max_size: None, max_entries: u64::MAX, max_memory: u64::MAX };
        let tar = mount_points();
        if *diff_id == Digest::of(&tar) {
            return self.import_tar_replacing(&tar[..], Some(diff_id), limits, replaced).map(|_| true);
        }
        let own = self.layout.diff_split(diff_id);
        for path in [own].into_iter().chain(files_below(&self.layout.layers())?) {
            if let Ok(Some(split)) = Split::open(&path)
                && split.info().diff_id == *diff_id
                && !split.info().from_tree
                && split.objects().is_ok_and(|all| all.iter().all(|one| !findings.objects.contains(one)))
                && self.import_written(diff_id, limits, replaced, |out| {
                    split.write(out, |digest| self.open_object(digest))
                })
            {
                return Ok(true);
            }
        }
        let Some(layer) = findings.layer_of.get(diff_id).filter(|layer| !findings.trees.contains(layer))
        else {
            return Ok(false);
        };
        let tree = self.layer_tree(layer)?.to_tree()?;
        Ok(self.import_written(diff_id, limits, replaced, |out| {
            write_tree(&tree, out, |digest| self.open_object(digest)).map(drop)
        }))
    }

    /// Imports what `write` writes, if it is the tar that is wanted.
    fn import_written(
        &self,
        diff_id: &Digest,
        limits: ImportLimits,
        replaced: &Replaced,
        write: impl FnOnce(&mut BufWriter<PipeWriter>) -> Result<()> + Send,
    ) -> bool {
        let Ok((reader, writer)) = std::io::pipe() else { return false };
        std::thread::scope(|scope| {
            // Where writing fails the tar ends early, and is another.
            scope.spawn(move || {
                let mut out = BufWriter::with_capacity(256 << 10, writer);
                let _ = write(&mut out);
            });
            self.import_tar_replacing(reader, Some(diff_id), limits, replaced).is_ok()
        })
    }

    /// Removes what is damaged and needed by nothing, and merged trees that are wrong: they are made again.
    pub(crate) fn remove_useless(&self, findings: &mut Findings) -> Result<()> {
        let mut useless = std::mem::take(&mut findings.renders);
        if findings.knows_all_users() {
            let unused = findings.objects.iter().filter(|object| !findings.users.contains_key(object));
            useless.extend(unused.map(|object| self.layout.object(object)));
        }
        let needs = self.needs()?;
        for path in files_below(&self.layout.blobs())? {
            if let Some(digest) = digest_of_name(&path)
                && !needs.documents.contains_key(&digest)
                && !self.readable_blob(&digest)
            {
                useless.push(path);
            }
        }
        for path in self.lazy_paths()? {
            if Record::head(&path)?.is_none() {
                useless.push(path);
            }
        }
        for path in useless {
            std::fs::remove_file(&path).doing("remove", &path)?;
            findings.forget(&path);
        }
        Ok(())
    }
}
