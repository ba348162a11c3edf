//! Images: a manifest, a config, and the layers that they name.

use std::str::FromStr as _;

use kiln_contract::Digest;
use oci_spec::image::{
    Descriptor, DescriptorBuilder, ImageConfiguration, ImageIndex, ImageManifest, ImageManifestBuilder,
    MediaType,
};

use crate::error::Context as _;
use crate::{ImageName, Result, Store, StoreError, lines};

/// What the lines of an image's record begin with that do not name a manifest.
const FROM: &str = "from ";
const INDEX: &str = "index ";

/// Which repositories have or had an image, the latest first, and by which indexes it was asked for.
#[derive(Debug, Default)]
pub(crate) struct Origin {
    pub(crate) repositories: Vec<String>,
    pub(crate) indexes: Vec<Digest>,
}

/// An image in the store.
#[derive(Debug, Clone)]
pub struct Image {
    /// Docker's image id: the digest of the config.
    pub id: Digest,
    /// What tags point to: the digest of the manifest.
    pub manifest_digest: Digest,
    /// The manifest, of OCI's or of Docker's media type.
    pub manifest: ImageManifest,
    /// The config.
    pub config: ImageConfiguration,
    /// The layers, bottom first: as many as `config` has diff_ids.
    pub layers: Vec<Digest>,
    /// Whether all layers came whole. Of others only the trees are here, and what was read of their files.
    pub whole: bool,
}

impl Image {
    /// The digests of the layers' tars, bottom first.
    pub fn diff_ids(&self) -> Vec<Digest> {
        self.config.rootfs().diff_ids().iter().filter_map(|text| text.parse().ok()).collect()
    }
}

impl Store {
    /// Registers an image whose layers are in the store, and keeps both blobs.
    ///
    /// # Errors
    /// One of the blobs makes no sense, they do not belong together, or a layer is missing.
    pub fn put_image(&self, manifest: &[u8], config: &[u8]) -> Result<Image> {
        let manifest_digest = Digest::of(manifest);
        let image = self.assemble(manifest_digest, manifest, config)?;
        self.put_blob(config)?;
        self.put_blob(manifest)?;
        self.record_image(&image)?;
        Ok(image)
    }

    /// Makes the config and manifest of a stack, with uncompressed layers, and registers the image. The config's
    /// `rootfs` is replaced.
    ///
    /// # Errors
    /// A layer is missing.
    pub fn make_image(&self, config: &ImageConfiguration, layers: &[Digest]) -> Result<Image> {
        let mut config = config.clone();
        let mut diff_ids = Vec::with_capacity(layers.len());
        let mut descriptors = Vec::with_capacity(layers.len());
        for (index, layer) in layers.iter().enumerate() {
            let split = self.split_of_layer(layer)?;
            // A second tar that gives the same tree stays the one that this image knows.
            let before = config.rootfs().diff_ids().get(index).and_then(|text| text.parse::<Digest>().ok());
            let (diff_id, size) = match before {
                Some(before)
                    if before != split.diff_id && self.layer_of_diff_id(&before)? == Some(*layer) =>
                {
                    (before, self.split_of_diff(&before)?.map_or(split.tar_size, |split| split.tar_size))
                }
                _ => (split.diff_id, split.tar_size),
            };
            descriptors.push(descriptor(MediaType::ImageLayer, &diff_id, size));
            diff_ids.push(diff_id.to_string());
        }
        let mut rootfs = config.rootfs().clone();
        rootfs.set_typ("layers".to_owned());
        rootfs.set_diff_ids(diff_ids);
        config.set_rootfs(rootfs);
        let config = serde_json::to_vec(&config).map_err(|error| bad("config", &error))?;
        let manifest = ImageManifestBuilder::default()
            .schema_version(2_u32)
            .media_type(MediaType::ImageManifest)
            .config(descriptor(MediaType::ImageConfig, &Digest::of(&config), config.len() as u64))
            .layers(descriptors)
            .build()
            .map_err(|error| bad("manifest", &error))?;
        let manifest = serde_json::to_vec(&manifest).map_err(|error| bad("manifest", &error))?;
        self.put_image(&manifest, &config)
    }

    /// An image by the digest of its manifest, of an index that lists one that is in the store, or by its id.
    ///
    /// # Errors
    /// A blob cannot be read, or is damaged.
    pub fn image(&self, digest: &Digest) -> Result<Option<Image>> {
        if let Some(manifest) = self.manifests_of(digest)?.pop() {
            return self.image_of_manifest(&manifest);
        }
        self.image_of_manifest(digest)
    }

    /// All images, an entry for each id, sorted by id.
    ///
    /// # Errors
    /// A blob cannot be read, or is damaged.
    pub fn images(&self) -> Result<Vec<Image>> {
        let mut images = Vec::new();
        for id in self.image_ids()? {
            images.extend(self.image(&id)?);
        }
        Ok(images)
    }

    /// Removes an image by a name (then the image itself only if that was its last one), or, by id, with all its
    /// names. Its blobs and layers go at the next collection. Returns the names that were removed.
    ///
    /// # Errors
    /// [`StoreError::NotFound`]; [`StoreError::SeveralNames`] by id, unless `force`.
    pub fn remove_image(&self, text: &str, force: bool) -> Result<Vec<String>> {
        let image = self.resolve(text)?;
        let names = self.names_of(&image.id)?;
        let by_name =
            ImageName::parse(text).ok().filter(|name| name.digest.is_none() && names.contains(name));
        match by_name {
            Some(name) => {
                self.untag(&name)?;
                if names.len() == 1 {
                    self.forget_image(&image.id)?;
                }
                Ok(vec![name.familiar()])
            }
            None => {
                let familiar: Vec<_> = names.iter().map(ImageName::familiar).collect();
                if names.len() > 1 && !force {
                    return Err(StoreError::SeveralNames { id: image.id, names: familiar });
                }
                for name in &names {
                    self.untag(name)?;
                }
                self.forget_image(&image.id)?;
                Ok(familiar)
            }
        }
    }

    /// The tags that point to an image.
    ///
    /// # Errors
    /// Tags or blobs cannot be read.
    pub fn names_of(&self, id: &Digest) -> Result<Vec<ImageName>> {
        let manifests = self.manifests_of(id)?;
        let tags = self.tags()?;
        Ok(tags
            .into_iter()
            .filter(|(_, entry)| manifests.contains(&entry.target))
            .map(|(name, _)| name)
            .collect())
    }

    /// Remembers that a repository (`registry/path`) has an image, and from which index there it was chosen if it was asked
    /// for by that index's digest: where a damaged store may get it back from.
    ///
    /// # Errors
    /// The record cannot be written; [`StoreError::BadName`] for what is no repository.
    pub fn remember_origin(&self, id: &Digest, repository: &str, index: Option<&Digest>) -> Result<()> {
        if repository.is_empty() || repository.contains(|c: char| c.is_whitespace() || c.is_control()) {
            return Err(StoreError::BadName { text: repository.to_owned(), why: "it is no repository" });
        }
        let path = self.layout.image(id);
        if !path.exists() {
            // Somebody has removed it meanwhile.
            return Ok(());
        }
        lines::add(&path, &format!("{FROM}{repository}"))?;
        index.map_or(Ok(()), |index| lines::add(&path, &format!("{INDEX}{index}")))
    }

    /// The repositories (`registry/path`) that have or had an image, as far as is known, the latest first.
    ///
    /// # Errors
    /// Records or tags cannot be read.
    pub fn repositories_of(&self, id: &Digest) -> Result<Vec<String>> {
        let mut repositories = self.origin_of(id)?.repositories;
        for name in self.names_of(id)? {
            if !repositories.contains(&name.repository) {
                repositories.push(name.repository);
            }
        }
        Ok(repositories)
    }

    pub(crate) fn origin_of(&self, id: &Digest) -> Result<Origin> {
        let mut origin = Origin::default();
        for line in lines::read(&self.layout.image(id))?.iter().rev() {
            if let Some(repository) = line.strip_prefix(FROM) {
                origin.repositories.push(repository.to_owned());
            } else if let Some(index) = line.strip_prefix(INDEX) {
                origin.indexes.extend(index.parse::<Digest>());
            }
        }
        Ok(origin)
    }

    /// The ids of all images.
    pub(crate) fn image_ids(&self) -> Result<Vec<Digest>> {
        let path = self.layout.images();
        let mut ids = Vec::new();
        for entry in std::fs::read_dir(&path).doing("read", &path)? {
            let name = entry.doing("read", &path)?.file_name();
            ids.extend(name.to_str().and_then(|name| Digest::from_hex(name).ok()));
        }
        ids.sort();
        Ok(ids)
    }

    /// The manifests of an image, newest last.
    pub(crate) fn manifests_of(&self, id: &Digest) -> Result<Vec<Digest>> {
        let lines = lines::read(&self.layout.image(id))?;
        Ok(lines.iter().filter_map(|line| line.parse().ok()).collect())
    }

    pub(crate) fn forget_image(&self, id: &Digest) -> Result<()> {
        let path = self.layout.image(id);
        match std::fs::remove_file(&path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
            removed => removed.doing("remove", &path),
        }
    }

    fn record_image(&self, image: &Image) -> Result<()> {
        // The newest is last, also if it was there before.
        if self.manifests_of(&image.id)?.last() == Some(&image.manifest_digest) {
            return Ok(());
        }
        lines::append(&self.layout.image(&image.id), &image.manifest_digest.to_string())
    }

    pub(crate) fn image_of_manifest(&self, digest: &Digest) -> Result<Option<Image>> {
        let Some(bytes) = self.blob(digest)? else { return Ok(None) };
        if let Some(listed) = listed_manifests(&bytes) {
            for manifest in listed {
                if manifest != *digest
                    && let Some(bytes) = self.blob(&manifest)?
                    && let Some(image) = self.registered(manifest, &bytes)?
                {
                    return Ok(Some(image));
                }
            }
            return Ok(None);
        }
        self.registered(*digest, &bytes)
    }

    /// The image of a manifest, if it was registered and not removed.
    fn registered(&self, digest: Digest, bytes: &[u8]) -> Result<Option<Image>> {
        let Ok(manifest) = serde_json::from_slice::<ImageManifest>(bytes) else { return Ok(None) };
        let id = digest_of(manifest.config())?;
        if !self.layout.image(&id).exists() {
            return Ok(None);
        }
        let config = self.blob(&id)?.ok_or(StoreError::Missing { what: "config", digest: id })?;
        self.assemble(digest, bytes, &config).map(Some)
    }

    fn assemble(&self, manifest_digest: Digest, manifest: &[u8], config: &[u8]) -> Result<Image> {
        let manifest: ImageManifest =
            serde_json::from_slice(manifest).map_err(|error| bad("manifest", &error))?;
        let id = Digest::of(config);
        let expected = digest_of(manifest.config())?;
        if id != expected {
            return Err(StoreError::DigestMismatch { what: "the config".to_owned(), expected, found: id });
        }
        let config: ImageConfiguration =
            serde_json::from_slice(config).map_err(|error| bad("config", &error))?;
        let diff_ids = config.rootfs().diff_ids();
        if diff_ids.len() != manifest.layers().len() {
            let (layers, diff_ids) = (manifest.layers().len(), diff_ids.len());
            let why = format!("it has {layers} layers, and its config {diff_ids}");
            return Err(StoreError::BadImage { what: "manifest", why });
        }
        let mut layers = Vec::with_capacity(diff_ids.len());
        let mut whole = true;
        for (diff_id, descriptor) in diff_ids.iter().zip(manifest.layers()) {
            let diff_id: Digest = diff_id.parse()?;
            let mut layer = self.layer_of_diff_id(&diff_id)?;
            if layer.is_none() {
                whole = false;
                layer = self.lazy_layer_of(descriptor)?;
            }
            layers.push(layer.ok_or(StoreError::Missing { what: "layer with diff_id", digest: diff_id })?);
        }
        Ok(Image { id, manifest_digest, manifest, config, layers, whole })
    }
}

/// The manifests that an index lists; `None` if it is none.
pub(crate) fn listed_manifests(bytes: &[u8]) -> Option<Vec<Digest>> {
    let index: ImageIndex = serde_json::from_slice(bytes).ok()?;
    Some(index.manifests().iter().filter_map(|descriptor| digest_of(descriptor).ok()).collect())
}

/// A descriptor's digest as ours.
pub(crate) fn digest_of(descriptor: &Descriptor) -> Result<Digest> {
    Ok(descriptor.digest().to_string().parse()?)
}

fn descriptor(media_type: MediaType, digest: &Digest, size: u64) -> Descriptor {
    let digest =
        oci_spec::image::Digest::from_str(&digest.to_string()).expect("a SHA-256 digest is one of OCI's");
    DescriptorBuilder::default()
        .media_type(media_type)
        .digest(digest)
        .size(size)
        .build()
        .expect("all that a descriptor needs is there")
}

fn bad(what: &'static str, why: &dyn std::fmt::Display) -> StoreError {
    StoreError::BadImage { what, why: why.to_string() }
}
