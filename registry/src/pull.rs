//! From a registry into the store.
//!
//! A pull goes these steps: the reference's document (one request; of an unchanged tag nothing else follows);
//! in an index, the manifest of the wanted platform; the config; then the layers, several at a time. Each layer streams
//! from the connection through its digest (on this thread) and its decompressor into the store (on a thread of its own);
//! a bounded channel between them keeps memory small and lets the slower side set the pace.
//! The store acknowledges a layer only at the end of its tar, and that end is given only after the compressed
//! digest was right ([`crate::download`]).

use std::collections::HashSet;
use std::sync::atomic::{AtomicI64, AtomicU64, AtomicUsize, Ordering};
use std::thread;

use futures_util::{StreamExt as _, TryStreamExt as _};
use kiln_contract::{Digest, Platform, Progress, Step};
use kiln_store::{Image, ImageName, ImportLimits, Store, StoreError};
use oci_spec::image::{Descriptor, ImageManifest};
use tokio::sync::{mpsc, oneshot};

use crate::chunked::read;
use crate::document;
use crate::download::{self, Blob};
use crate::endpoint::Endpoint;
use crate::layer_stream::Pieces;
use crate::manifest::{self, CONFIG_LIMIT, Document, MANIFEST_LIMIT};
use crate::registry::{Registry, Session, full_name};
use crate::unpack::unpack;
use crate::{RegistryError, Result};

/// When a pull may use what is in the store, and when the network.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum PullPolicy {
    /// The registry is asked; what is in the store already is not transferred again.
    Always,
    /// The registry is asked only if the store has no such image.
    #[default]
    Missing,
    /// The registry is never asked.
    Never,
    /// The registry is asked, but what the store has will do if the registry cannot answer.
    Newer,
}

/// How to pull.
#[derive(Debug, Clone, Default)]
pub struct PullOptions {
    /// Which image of an index; this host's own unless set.
    pub platform: Option<Platform>,
    /// When to ask the registry.
    pub policy: PullPolicy,
    /// What each layer may be, unpacked.
    pub limits: ImportLimits,
    /// How many layers are pulled at a time; 3 unless set.
    pub parallel: Option<usize>,
    /// Of layers of zstd:chunked only what their trees take: files come when they are opened. Without it, an image that
    /// was pulled so is made whole.
    pub lazy: bool,
}

/// What a pull did.
#[derive(Debug, Clone)]
pub struct Pulled {
    /// The image, now in the store.
    pub image: Image,
    /// It was there before: nothing but the reference's manifest or index had to be transferred, if that.
    pub up_to_date: bool,
    /// Bytes that were transferred: manifests, configs and compressed layers.
    pub bytes: u64,
    /// Layers that were transferred.
    pub layers_pulled: usize,
    /// Layers of which only what their trees take was transferred.
    pub layers_lazy: usize,
}

const PARALLEL: usize = 3;
/// Pieces between a download and its unpacking. A piece is what one read of a socket gave, at most some 400 KiB.
pub(crate) const QUEUE: usize = 32;

impl Registry {
    /// Brings an image into the store and tags it with `name`, if that has a tag.
    ///
    /// # Errors
    /// As [`RegistryError`] tells; then the store is as it was, except for layers that had arrived whole, which
    /// the next attempt finds.
    pub fn pull(
        &self,
        store: &Store,
        name: &ImageName,
        options: &PullOptions,
        progress: &dyn Progress,
    ) -> Result<Pulled> {
        let local = local_image(store, name, options.platform.as_ref())?;
        let local = local.filter(|image| image.whole || options.lazy);
        let kept = |image| Pulled { image, up_to_date: true, bytes: 0, layers_pulled: 0, layers_lazy: 0 };
        match (options.policy, local) {
            (PullPolicy::Missing | PullPolicy::Never, Some(image)) => Ok(kept(image)),
            (PullPolicy::Never, None) => Err(RegistryError::NotLocal { name: name.familiar() }),
            (PullPolicy::Newer, Some(image)) => match self.pull_from_registry(store, name, options, progress)
            {
                Err(error) if error.other_endpoint_may_help() => {
                    progress.note(&format!("using the image in the store: {error}"));
                    Ok(kept(image))
                }
                outcome => outcome,
            },
            _ => self.pull_from_registry(store, name, options, progress),
        }
    }

    fn pull_from_registry(
        &self,
        store: &Store,
        name: &ImageName,
        options: &PullOptions,
        progress: &dyn Progress,
    ) -> Result<Pulled> {
        let session = self.session()?;
        let mut endpoints =
            session.conf.pull_endpoints(&name.repository, name.digest.is_some())?.into_iter().peekable();
        while let Some(endpoint) = endpoints.next() {
            let pull = Pull {
                session: &session,
                endpoint: &endpoint,
                store,
                name,
                options,
                progress,
                bytes: AtomicU64::new(0),
                lazy: AtomicUsize::new(0),
            };
            match pull.run() {
                Err(error) if endpoints.peek().is_some() && error.other_endpoint_may_help() => {
                    progress.note(&format!("mirror {}: {error}; trying the next", endpoint.host));
                }
                outcome => return outcome,
            }
        }
        unreachable!("there is always an endpoint: the registry itself")
    }
}

/// What the store has under this name, if it is for the platform that is asked for.
fn local_image(store: &Store, name: &ImageName, platform: Option<&Platform>) -> Result<Option<Image>> {
    let image = match (&name.digest, &name.tag) {
        (Some(digest), _) => local_by_digest(store, name, digest, platform)?,
        (None, Some(_)) => match store.tag_history(name)?.last() {
            Some(entry) => in_store(store, &entry.target)?,
            None => None,
        },
        (None, None) => None,
    };
    Ok(image
        .filter(|image| platform.is_none_or(|wanted| manifest::platform_of(&image.config).satisfies(wanted))))
}

/// An image in the store. One that lacks something is pulled as if it were not there.
fn in_store(store: &Store, digest: &Digest) -> Result<Option<Image>> {
    match store.image(digest) {
        Err(StoreError::Missing { .. }) => Ok(None),
        found => Ok(found?),
    }
}

/// A digest may be that of an index, which then is in the store as a blob.
fn local_by_digest(
    store: &Store,
    name: &ImageName,
    digest: &Digest,
    platform: Option<&Platform>,
) -> Result<Option<Image>> {
    let Some(bytes) = store.blob(digest)? else { return Ok(None) };
    let name = full_name(name);
    match Document::parse(&bytes, &name) {
        Ok(Document::Manifest(_)) => in_store(store, digest),
        Ok(Document::Index(index)) => {
            let wanted = platform.cloned().unwrap_or_else(Platform::host);
            match manifest::choose(&index, &wanted, &name) {
                Ok(chosen) => in_store(store, &manifest::descriptor_digest(chosen, &name)?),
                Err(_) => Ok(None),
            }
        }
        Err(_) => Ok(None),
    }
}

/// The manifest that a reference led to.
struct Found {
    digest: Digest,
    bytes: Vec<u8>,
    /// The index that it was chosen from, if the reference was that index's digest.
    index: Option<Digest>,
}

/// One pull from one endpoint.
struct Pull<'a> {
    session: &'a Session,
    endpoint: &'a Endpoint,
    store: &'a Store,
    name: &'a ImageName,
    options: &'a PullOptions,
    progress: &'a dyn Progress,
    bytes: AtomicU64,
    /// Layers that came lazily.
    lazy: AtomicUsize,
}

impl Pull<'_> {
    fn run(&self) -> Result<Pulled> {
        let runtime = &self.session.runtime;
        let found = runtime.block_on(self.manifest())?;
        let before = in_store(self.store, &found.digest)?;
        if let Some(image) = &before
            && (image.whole || self.options.lazy)
            && self.store.are_sound(&image.layers)?
        {
            let image = image.clone();
            self.check_platform(&manifest::platform_of(&image.config))?;
            self.record(&image, &found)?;
            return Ok(self.done(image, true, 0));
        }
        let name = full_name(self.name);
        let Document::Manifest(manifest) = Document::parse(&found.bytes, &name)? else {
            return Err(RegistryError::Unsupported {
                name,
                reason: "its index leads to another index".into(),
            });
        };
        let config_bytes = runtime.block_on(self.config(&manifest))?;
        let (config, diff_ids) =
            manifest::parse_config(&config_bytes, &manifest, self.options.platform.as_ref(), &name)?;
        self.check_platform(&manifest::platform_of(&config))?;
        let layers_pulled = self.layers(&manifest, &diff_ids)?;
        let image = self.store.put_image(&found.bytes, &config_bytes)?;
        if before.is_some_and(|before| !before.whole && image.whole && before.layers != image.layers) {
            self.progress.note(&format!(
                "what was shown of {} until now was not what its layers hold: a table of contents in it is wrong",
                self.name.familiar()
            ));
        }
        self.record(&image, &found)?;
        Ok(self.done(image, false, layers_pulled))
    }

    fn done(&self, image: Image, up_to_date: bool, layers_pulled: usize) -> Pulled {
        let layers_lazy = self.lazy.load(Ordering::Relaxed);
        let layers_pulled = layers_pulled - layers_lazy;
        Pulled { image, up_to_date, bytes: self.bytes.load(Ordering::Relaxed), layers_pulled, layers_lazy }
    }

    fn check_platform(&self, is: &Platform) -> Result<()> {
        match &self.options.platform {
            Some(wanted) if !is.satisfies(wanted) => Err(RegistryError::NoPlatform {
                name: full_name(self.name),
                wanted: wanted.clone(),
                available: vec![is.to_string()],
            }),
            None if !is.satisfies(&Platform::host()) => {
                self.progress.note(&format!(
                    "{} is for {is}, and this host is {}",
                    self.name.familiar(),
                    Platform::host()
                ));
                Ok(())
            }
            _ => Ok(()),
        }
    }

    /// Remembers where the image came from, and its name. Only a change is written to the tag's history.
    fn record(&self, image: &Image, found: &Found) -> Result<()> {
        self.store.remember_origin(&image.id, &self.name.repository, found.index.as_ref())?;
        if self.name.tag.is_none() || self.name.digest.is_some() {
            return Ok(());
        }
        let history = self.store.tag_history(self.name)?;
        if history.last().is_none_or(|entry| entry.target != image.manifest_digest) {
            self.store.tag(
                self.name,
                &image.manifest_digest,
                &format!("pulled from {}", self.endpoint.host),
            )?;
        }
        Ok(())
    }

    /// The manifest that the reference leads to on this platform.
    async fn manifest(&self) -> Result<Found> {
        let name = full_name(self.name);
        let (digest, bytes) = match (&self.name.digest, &self.name.tag) {
            (Some(digest), _) => self.document_by_digest(digest, None).await?,
            (None, tag) => self.document(tag.as_deref().unwrap_or("latest"), None).await?,
        };
        let Document::Index(index) = Document::parse(&bytes, &name)? else {
            return Ok(Found { digest, bytes, index: None });
        };
        let asked_for = self.name.digest.is_some();
        if asked_for {
            // So that the same digest is found in the store the next time.
            self.store.put_blob(&bytes)?;
        }
        let wanted = self.options.platform.clone().unwrap_or_else(Platform::host);
        let chosen = manifest::choose(&index, &wanted, &name)?;
        let chosen_digest = manifest::descriptor_digest(chosen, &name)?;
        let (chosen, bytes) = self.document_by_digest(&chosen_digest, Some(chosen.size())).await?;
        Ok(Found { digest: chosen, bytes, index: asked_for.then_some(digest) })
    }

    async fn document_by_digest(&self, digest: &Digest, size: Option<u64>) -> Result<(Digest, Vec<u8>)> {
        match self.store.blob(digest)? {
            Some(bytes) => Ok((*digest, bytes)),
            None => {
                self.document(&digest.to_string(), size.map(|size| (*digest, size)).or(Some((*digest, 0))))
                    .await
            }
        }
    }

    /// A manifest or index from the registry; `expected` is its digest and, unless 0, its size.
    async fn document(&self, reference: &str, expected: Option<(Digest, u64)>) -> Result<(Digest, Vec<u8>)> {
        let name = full_name(self.name);
        let limit = MANIFEST_LIMIT;
        if let Some((_, size)) = expected.filter(|(_, size)| *size > limit) {
            return Err(RegistryError::TooLarge { what: "manifest", name, size: Some(size), limit });
        }
        let sent = document::manifest(&self.session.transport, self.endpoint, reference, &name).await;
        let (headers, bytes) = sent.map_err(|error| match error {
            RegistryError::NotFound { registry, .. } => {
                RegistryError::NotFound { name: self.name.familiar(), registry }
            }
            error => error,
        })?;
        let actual = Digest::of(&bytes);
        self.bytes.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        // Of a tag, the registry's own word is all there is to check against.
        let said = headers
            .get("docker-content-digest")
            .and_then(|digest| digest.to_str().ok()?.parse::<Digest>().ok());
        for expected in [expected.map(|(digest, _)| digest), said].into_iter().flatten() {
            if expected != actual {
                return Err(RegistryError::WrongDigest { what: "manifest", name, expected, actual });
            }
        }
        Ok((actual, bytes.to_vec()))
    }

    async fn config(&self, manifest: &ImageManifest) -> Result<Vec<u8>> {
        let name = full_name(self.name);
        let digest = manifest::descriptor_digest(manifest.config(), &name)?;
        if let Some(bytes) = self.store.blob(&digest)? {
            return Ok(bytes);
        }
        let blob = Blob { what: "config", name, digest, size: manifest.config().size() };
        let bytes =
            download::download_small(&self.session.transport, self.endpoint, &blob, CONFIG_LIMIT).await?;
        self.bytes.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        Ok(bytes)
    }

    /// Brings in the layers that the store does not have. How many that were.
    fn layers(&self, manifest: &ImageManifest, diff_ids: &[Digest]) -> Result<usize> {
        let mut wanted = Vec::new();
        let mut seen = HashSet::new();
        for (descriptor, diff_id) in manifest.layers().iter().zip(diff_ids) {
            let name = full_name(self.name);
            let digest = manifest::descriptor_digest(descriptor, &name)?;
            // Lazily, each blob has a table of contents of its own.
            if !seen.insert((*diff_id, self.options.lazy.then_some(digest))) {
                continue;
            }
            if self.store.has_sound_layer(diff_id)? || self.has_lazy_layer(descriptor)? {
                let step = self.progress.begin(Step { name: digest.short(), verb: "pull", total: Some(0) });
                self.progress.end(step, "exists");
                continue;
            }
            let blob = Blob { what: "layer", name, digest, size: descriptor.size() };
            wanted.push((descriptor, *diff_id, blob));
        }
        let count = wanted.len();
        let parallel = self.options.parallel.unwrap_or(PARALLEL).max(1);
        thread::scope(|scope| {
            self.session.runtime.block_on(
                futures_util::stream::iter(wanted)
                    .map(|(descriptor, diff_id, blob)| self.layer(scope, descriptor, diff_id, blob))
                    .buffer_unordered(parallel)
                    .try_collect::<()>(),
            )
        })?;
        Ok(count)
    }

    fn has_lazy_layer(&self, descriptor: &Descriptor) -> Result<bool> {
        if !self.options.lazy {
            return Ok(false);
        }
        let layer = self.store.lazy_layer_of(descriptor)?;
        layer.map_or(Ok(false), |layer| Ok(self.store.are_sound(&[layer])?))
    }

    /// Makes a layer's tree from its table of contents. In words why not, if it has to be taken whole.
    async fn lazy_layer<'scope>(
        &'scope self,
        scope: &'scope thread::Scope<'scope, '_>,
        descriptor: &Descriptor,
        diff_id: Digest,
        blob: &Blob,
    ) -> Result<std::result::Result<(), String>> {
        let came = AtomicI64::new(0);
        let advance = |bytes: i64| {
            came.fetch_add(bytes, Ordering::Relaxed);
        };
        let table = read::fetch(&self.session.transport, self.endpoint, blob, descriptor, &advance).await;
        self.bytes.fetch_add(u64::try_from(came.into_inner()).unwrap_or(0), Ordering::Relaxed);
        let table = match table? {
            Ok(table) => table,
            Err(why) => return Ok(Err(why)),
        };
        let step = self.progress.begin(Step { name: blob.digest.short(), verb: "pull", total: Some(0) });
        let (told, put) = oneshot::channel();
        let (store, limits) = (self.store, self.options.limits);
        let (of, descriptor) = (blob.clone(), descriptor.clone());
        scope.spawn(move || {
            // Nobody listens if the pull has failed elsewhere.
            let _ = told.send(read::put(store, &table, &descriptor, &diff_id, limits, &of));
        });
        let put = put.await.unwrap_or_else(|_| Err(unpacking_died(blob)));
        self.progress.end(step, if put.is_ok() { "lazy" } else { "failed" });
        put?;
        self.lazy.fetch_add(1, Ordering::Relaxed);
        Ok(Ok(()))
    }

    async fn layer<'scope>(
        &'scope self,
        scope: &'scope thread::Scope<'scope, '_>,
        descriptor: &Descriptor,
        diff_id: Digest,
        blob: Blob,
    ) -> Result<()> {
        // One that is here and was whole is to be whole again.
        if self.options.lazy && self.store.layer_of_diff_id(&diff_id)?.is_none() {
            match self.lazy_layer(scope, descriptor, diff_id, &blob).await? {
                Ok(()) => return Ok(()),
                Err(why) => {
                    self.progress.note(&format!("layer {} is taken whole: {why}", blob.digest.short()));
                }
            }
        }
        let step =
            self.progress.begin(Step { name: blob.digest.short(), verb: "pull", total: Some(blob.size) });
        let (sender, receiver) = mpsc::channel(QUEUE);
        let (told, imported) = oneshot::channel();
        let (store, limits) = (self.store, self.options.limits);
        let label = (blob.name.clone(), blob.digest.to_string());
        scope.spawn(move || {
            // Nobody listens if the pull has failed elsewhere.
            let mut pieces = Pieces::new(receiver);
            let _ = told.send(unpack(store, &mut pieces, Some(&diff_id), limits, &label.0, &label.1));
        });
        let came = AtomicI64::new(0);
        let advance = |bytes: i64| {
            came.fetch_add(bytes, Ordering::Relaxed);
            self.progress.advance(step, bytes);
        };
        let downloaded =
            download::download(&self.session.transport, self.endpoint, &blob, &advance, &sender).await;
        drop(sender);
        self.bytes.fetch_add(u64::try_from(came.into_inner()).unwrap_or(0), Ordering::Relaxed);
        let imported = imported.await.unwrap_or_else(|_| Err(unpacking_died(&blob)));
        // A wrong digest explains whatever unpacking complained of.
        let outcome = downloaded.and(imported);
        self.progress.end(step, if outcome.is_ok() { "done" } else { "failed" });
        outcome?;
        self.store.remember_blob(&diff_id, descriptor)?;
        Ok(())
    }
}

fn unpacking_died(blob: &Blob) -> RegistryError {
    RegistryError::Decompress {
        name: blob.name.clone(),
        digest: blob.digest.to_string(),
        reason: "the thread that unpacked it ended".into(),
    }
}
