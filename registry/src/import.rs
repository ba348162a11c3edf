//! Images from files, directories and standard input.
//!
//! The format is told by the content: `manifest.json` that is a list makes a `docker save` archive, `index.json` and
//! `oci-layout` an OCI layout or archive; everything else is a root filesystem. What comes compressed or on standard
//! input is first written to an unnamed file in the store's staging directory, because the parts of an archive come in any
//! order and nothing else can be read twice. The exception is a root filesystem that is declared to be one: it streams.

use std::fs::File;
use std::io::{self, Read, Seek as _, Write as _};
use std::path::Path;

use kiln_contract::{Digest, Platform, Progress, Step};
use kiln_store::{Image, ImageName, ImportLimits, Store};
use oci_spec::image::{
    Arch, Descriptor, HistoryBuilder, ImageConfigurationBuilder, ImageIndex, Os, RootFsBuilder,
};

use crate::archive::Archive;
use crate::compression::{Compression, decompress, detect, read_full};
use crate::manifest::{self, CONFIG_LIMIT, Document, MANIFEST_LIMIT};
use crate::saved::Saved;
use crate::unpack::{LocalLayer, scratch_file, unpack};
use crate::{Format, RegistryError, Result};

/// The annotation that names an image of a layout (image-spec 1.1, annotations.md).
pub(crate) const REF_NAME: &str = "org.opencontainers.image.ref.name";
/// Docker's and containerd's, always a full reference.
pub(crate) const IMAGE_NAME: &str = "io.containerd.image.name";

/// Images with the names that they were given.
pub type Named = Vec<(Option<ImageName>, Image)>;

/// Reads images from a file, a directory or standard input (`-`) into the store, and tags them.
///
/// The format is detected unless it is told; archives may be compressed with gzip or zstd. An image of an archive keeps the
/// name it has there; `name` is for one that has none. `platform` chooses from an index; for a root filesystem it says what
/// the programs in it run on (this host's unless told). `limits` bound each layer.
///
/// # Errors
/// As [`RegistryError`] tells. Images that were read before the failing one of an archive stay in the store.
pub fn import(
    store: &Store,
    source: &Path,
    format: Option<Format>,
    name: Option<&ImageName>,
    platform: Option<&Platform>,
    limits: ImportLimits,
    progress: &dyn Progress,
) -> Result<Named> {
    let import = Import { store, source, name, platform, limits, progress };
    if source == Path::new("-") {
        if format == Some(Format::Rootfs) {
            return import.rootfs_tar(io::stdin());
        }
        return import.stream(io::stdin(), format);
    }
    let failed = |error| RegistryError::Io { doing: "read", path: source.to_owned(), source: error };
    if source.metadata().map_err(failed)?.is_dir() {
        return import.archive(&Archive::Directory(source.to_owned()), format);
    }
    let mut file = File::open(source).map_err(failed)?;
    if format == Some(Format::Rootfs) {
        return import.rootfs_tar(file);
    }
    let mut head = [0; 4];
    // A pipe or a device cannot be read again from its beginning.
    let seekable = file.stream_position().is_ok() && file.metadata().is_ok_and(|metadata| metadata.is_file());
    if !seekable {
        return import.stream(file, format);
    }
    let got = read_full(&mut file, &mut head).map_err(failed)?;
    file.rewind().map_err(failed)?;
    if detect(&head[..got]) != Compression::None {
        return import.stream(file, format);
    }
    import.archive(&Archive::of_tar(source, file)?, format)
}

pub(crate) struct Import<'a> {
    pub(crate) store: &'a Store,
    pub(crate) source: &'a Path,
    pub(crate) name: Option<&'a ImageName>,
    pub(crate) platform: Option<&'a Platform>,
    pub(crate) limits: ImportLimits,
    pub(crate) progress: &'a dyn Progress,
}

impl Import<'_> {
    /// From something that can be read only once.
    fn stream(&self, input: impl Read + Send, format: Option<Format>) -> Result<Named> {
        let failed = |source| RegistryError::Io { doing: "read", path: self.source.to_owned(), source };
        let mut spool = scratch_file(self.store)?;
        let step = self.progress.begin(Step { name: self.label(), verb: "read", total: None });
        let (_, mut plain) = decompress(input).map_err(failed)?;
        // Headers and padding come on top of the files; an archive of many small files is mostly those.
        let limit = self.limits.max_size.map(|size| size.saturating_mul(2).saturating_add(64 << 20));
        let mut buffer = vec![0; 256 << 10];
        let mut total = 0_u64;
        loop {
            let n = read_full(&mut plain, &mut buffer).map_err(failed)?;
            if n == 0 {
                break;
            }
            total += n as u64;
            if let Some(limit) = limit.filter(|limit| total > *limit) {
                return Err(RegistryError::TooLarge {
                    what: "content",
                    name: self.label(),
                    size: None,
                    limit,
                });
            }
            spool.write_all(&buffer[..n]).map_err(|source| RegistryError::Io {
                doing: "write below",
                path: self.store.path().join("tmp"),
                source,
            })?;
            self.progress.advance(step, n as i64);
        }
        self.progress.end(step, "done");
        self.archive(&Archive::of_tar(self.source, spool)?, format)
    }

    fn archive(&self, archive: &Archive, format: Option<Format>) -> Result<Named> {
        let saved = || -> Result<Option<Vec<Saved>>> {
            let text = archive.read("manifest.json", MANIFEST_LIMIT)?;
            Ok(text.and_then(|text| serde_json::from_slice(&text).ok()))
        };
        let missing = |what: &str| RegistryError::Unsupported {
            name: self.label(),
            reason: format!("it has no {what}"),
        };
        match format {
            Some(Format::DockerArchive) => {
                self.saved(archive, saved()?.ok_or_else(|| missing("manifest.json of docker save"))?)
            }
            Some(Format::OciLayout | Format::OciArchive) => {
                let index = archive.read("index.json", MANIFEST_LIMIT)?;
                self.layout(archive, &index.ok_or_else(|| missing("index.json"))?)
            }
            Some(Format::Rootfs) => self.rootfs(archive),
            None => {
                if let Some(saved) = saved()? {
                    return self.saved(archive, saved);
                }
                match (
                    archive.read("oci-layout", MANIFEST_LIMIT)?,
                    archive.read("index.json", MANIFEST_LIMIT)?,
                ) {
                    (Some(_), Some(index)) => self.layout(archive, &index),
                    _ => self.rootfs(archive),
                }
            }
        }
    }

    pub(crate) fn label(&self) -> String {
        if self.source == Path::new("-") {
            "standard input".into()
        } else {
            self.source.display().to_string()
        }
    }

    /// An OCI layout.
    fn layout(&self, archive: &Archive, index: &[u8]) -> Result<Named> {
        let label = self.label();
        let invalid = |error: serde_json::Error| RegistryError::Invalid {
            what: "index.json",
            name: label.clone(),
            reason: error.to_string(),
        };
        let index: ImageIndex = serde_json::from_slice(index).map_err(invalid)?;
        // Images of one name are one image for several platforms.
        let mut groups: Vec<(Option<String>, Vec<Descriptor>)> = Vec::new();
        for descriptor in index.manifests() {
            let name = name_in_layout(descriptor);
            match groups.iter_mut().find(|(other, _)| *other == name) {
                Some((_, members)) => members.push(descriptor.clone()),
                None => groups.push((name, vec![descriptor.clone()])),
            }
        }
        let alone = groups.len() == 1;
        let mut images = Vec::new();
        for (own, members) in groups {
            let descriptor = match &members[..] {
                [one] => one.clone(),
                _ => {
                    let mut several = index.clone();
                    several.set_manifests(members);
                    manifest::choose(&several, &self.wanted(), &label)?.clone()
                }
            };
            let name = self.name_for(own.as_deref(), alone)?;
            let image = self.manifest_of_layout(archive, &descriptor, 0)?;
            self.tag(name.as_ref(), &image)?;
            images.push((name, image));
        }
        if images.is_empty() {
            return Err(RegistryError::Unsupported { name: label, reason: "there is no image in it".into() });
        }
        Ok(images)
    }

    fn wanted(&self) -> Platform {
        self.platform.cloned().unwrap_or_else(Platform::host)
    }

    fn manifest_of_layout(&self, archive: &Archive, descriptor: &Descriptor, depth: usize) -> Result<Image> {
        let label = self.label();
        let bytes = self.blob(archive, descriptor, "manifest", MANIFEST_LIMIT)?;
        match Document::parse(&bytes, &label)? {
            Document::Index(index) if depth == 0 => {
                let chosen = manifest::choose(&index, &self.wanted(), &label)?;
                self.manifest_of_layout(archive, chosen, 1)
            }
            Document::Index(_) => Err(RegistryError::Unsupported {
                name: label,
                reason: "its index leads to another index".into(),
            }),
            Document::Manifest(manifest) => {
                let config_bytes = self.blob(archive, manifest.config(), "config", CONFIG_LIMIT)?;
                let (_, diff_ids) = manifest::parse_config(&config_bytes, &manifest, self.platform, &label)?;
                for (layer, diff_id) in manifest.layers().iter().zip(&diff_ids) {
                    let digest = manifest::descriptor_digest(layer, &label)?;
                    self.layer(archive, &blob_path(&digest), Some(digest), diff_id, |_, _| layer.clone())?;
                }
                Ok(self.store.put_image(&bytes, &config_bytes)?)
            }
        }
    }

    fn blob(
        &self,
        archive: &Archive,
        descriptor: &Descriptor,
        what: &'static str,
        limit: u64,
    ) -> Result<Vec<u8>> {
        let name = self.label();
        let expected = manifest::descriptor_digest(descriptor, &name)?;
        let bytes = archive
            .read(&blob_path(&expected), limit)?
            .ok_or_else(|| self.missing(what, &expected.to_string()))?;
        let actual = Digest::of(&bytes);
        if actual != expected {
            return Err(RegistryError::WrongDigest { what, name, expected, actual });
        }
        Ok(bytes)
    }

    pub(crate) fn missing(&self, what: &'static str, which: &str) -> RegistryError {
        RegistryError::Invalid { what, name: self.label(), reason: format!("`{which}` is not in it") }
    }

    /// Brings in one layer unless the store has it. `remembered` makes the descriptor of the file from its digest and length.
    fn layer(
        &self,
        archive: &Archive,
        path: &str,
        digest: Option<Digest>,
        diff_id: &Digest,
        remembered: impl FnOnce(Digest, u64) -> Descriptor,
    ) -> Result<()> {
        let step = self.progress.begin(Step { name: diff_id.short(), verb: "unpack", total: None });
        if self.store.has_sound_layer(diff_id)? {
            self.progress.end(step, "exists");
            return Ok(());
        }
        let file = archive.open(path)?.ok_or_else(|| self.missing("layer", path))?;
        let mut packed = LocalLayer::new(file, digest);
        let label = self.label();
        let outcome = unpack(self.store, &mut packed, Some(diff_id), self.limits, &label, path);
        self.progress.end(step, if outcome.is_ok() { "done" } else { "failed" });
        if let (Err(_), Some((expected, actual))) = (&outcome, packed.mismatch()) {
            return Err(RegistryError::WrongDigest { what: "layer", name: label, expected, actual });
        }
        outcome?;
        if let Some(actual) = packed.actual.filter(|actual| actual != diff_id) {
            self.store.remember_blob(diff_id, &remembered(actual, packed.length))?;
        }
        Ok(())
    }

    /// A root filesystem: a directory, or a tar that is no image.
    fn rootfs(&self, archive: &Archive) -> Result<Named> {
        match archive {
            Archive::Directory(dir) => {
                let step = self.progress.begin(Step { name: self.label(), verb: "read", total: None });
                let layer = self.store.import_directory_within(dir, self.limits)?;
                self.progress.end(step, "done");
                self.image_of_layer(&layer.layer)
            }
            Archive::Tar { file, .. } => {
                let mut file = file.try_clone().map_err(|source| RegistryError::Io {
                    doing: "read",
                    path: self.source.to_owned(),
                    source,
                })?;
                file.rewind().map_err(|source| RegistryError::Io {
                    doing: "read",
                    path: self.source.to_owned(),
                    source,
                })?;
                self.rootfs_tar(file)
            }
        }
    }

    fn rootfs_tar(&self, input: impl Read + Send) -> Result<Named> {
        let label = self.label();
        let step = self.progress.begin(Step { name: label.clone(), verb: "unpack", total: None });
        let mut packed = LocalLayer::new(input, None);
        let outcome = unpack(self.store, &mut packed, None, self.limits, &label, &label);
        self.progress.end(step, if outcome.is_ok() { "done" } else { "failed" });
        self.image_of_layer(&outcome?.layer)
    }

    fn image_of_layer(&self, layer: &Digest) -> Result<Named> {
        let platform = self.wanted();
        let now =
            jiff::Timestamp::from_second(jiff::Timestamp::now().as_second()).unwrap_or_default().to_string();
        let incomplete = |error: oci_spec::OciSpecError| RegistryError::Invalid {
            what: "config",
            name: self.label(),
            reason: error.to_string(),
        };
        let rootfs =
            RootFsBuilder::default().typ("layers").diff_ids(Vec::new()).build().map_err(incomplete)?;
        let history = HistoryBuilder::default()
            .created(now.clone())
            .created_by("kiln image import")
            .comment(format!("imported from {}", self.label()))
            .build()
            .map_err(incomplete)?;
        let mut config = ImageConfigurationBuilder::default()
            .created(now)
            .os(Os::from(platform.os.as_str()))
            .architecture(Arch::from(platform.architecture.as_str()))
            .rootfs(rootfs)
            .history(vec![history]);
        if let Some(variant) = platform.variant {
            config = config.variant(variant);
        }
        let image = self.store.make_image(&config.build().map_err(incomplete)?, &[*layer])?;
        self.tag(self.name, &image)?;
        Ok(vec![(self.name.cloned(), image)])
    }

    /// The name of an image: its own if that is a full reference; else the one that was given, with its own tag if several
    /// images must share it.
    pub(crate) fn name_for(&self, own: Option<&str>, alone: bool) -> Result<Option<ImageName>> {
        match (own, self.name) {
            (Some(own), _) if own.contains(['/', ':']) => Ok(Some(ImageName::parse(own)?)),
            (_, Some(given)) if alone => Ok(Some(given.clone())),
            (Some(own), Some(given)) => Ok(Some(ImageName {
                repository: given.repository.clone(),
                tag: Some(own.to_owned()),
                digest: None,
            })),
            _ => Ok(None),
        }
    }

    pub(crate) fn tag(&self, name: Option<&ImageName>, image: &Image) -> Result<()> {
        match name.filter(|name| name.tag.is_some()) {
            Some(name) => Ok(self.store.tag(
                name,
                &image.manifest_digest,
                &format!("imported from {}", self.label()),
            )?),
            None => Ok(()),
        }
    }
}

fn name_in_layout(descriptor: &Descriptor) -> Option<String> {
    let annotations = descriptor.annotations().as_ref()?;
    let full = annotations.get(IMAGE_NAME);
    full.or_else(|| annotations.get(REF_NAME)).filter(|name| !name.is_empty()).cloned()
}

pub(crate) fn blob_path(digest: &Digest) -> String {
    format!("blobs/sha256/{}", digest.hex())
}
