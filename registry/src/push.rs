//! From the store into a registry, sending only what is missing there.
//!
//! The store keeps layers unpacked, so the compressed blobs that a manifest names are no longer at hand. For each
//! layer, in this order: a blob that is known to hold it and is in the repository already; the same, taken over from
//! another repository of that registry (a mount); a new blob, packed while it is sent. If every layer turned out to
//! be the one that the image's own manifest names, that manifest is pushed as it is, and the digest stays; otherwise one
//! with the new blobs. What was packed is remembered, so that a second push finds it.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::thread;

use bytes::Bytes;
use futures_util::{StreamExt as _, TryStreamExt as _};
use kiln_contract::{Digest, Progress, Step, StepId};
use kiln_store::{Image, ImageName, Store};
use oci_spec::image::Descriptor;
use reqwest::header::{ACCEPT, CONTENT_TYPE, HeaderValue};
use reqwest::{Method, StatusCode};
use tokio::sync::{mpsc, oneshot};

use crate::challenge::Scopes;
use crate::chunked::TocPlace;
use crate::compression::Compression;
use crate::manifest;
use crate::pack::{self, Packed, Packing, Spooled, Table};
use crate::registry::{Registry, full_name};
use crate::retry::Retry;
use crate::transport::{Call, Payload};
use crate::upload::{UploadError, Uploads};
use crate::{RegistryError, Result};

/// How to push.
#[derive(Debug, Clone, Default)]
pub struct PushOptions {
    /// How layers are packed that the registry does not have.
    pub packing: Packing,
    /// How many layers are pushed at a time; 3 unless set.
    pub parallel: Option<usize>,
}

/// What a push did.
#[derive(Debug, Clone)]
pub struct Pushed {
    /// Digest of the manifest that the tag now names in the registry.
    pub manifest: Digest,
    /// Bytes of blobs and manifests that were sent.
    pub bytes: u64,
    /// Layers that were sent.
    pub layers_pushed: usize,
    /// Layers that the registry took over from another repository.
    pub layers_mounted: usize,
    /// Layers that were there.
    pub layers_present: usize,
}

const PARALLEL: usize = 3;
/// So many other repositories are asked for a layer before it is sent.
const MOUNT_SOURCES: usize = 4;

impl Registry {
    /// Sends `image` to the repository and tag of `to`.
    ///
    /// # Errors
    /// As [`RegistryError`] tells; the tag in the registry is then as it was.
    pub fn push(
        &self,
        store: &Store,
        image: &Image,
        to: &ImageName,
        options: &PushOptions,
        progress: &dyn Progress,
    ) -> Result<Pushed> {
        let name = full_name(to);
        let Some(tag) = to.tag.clone().filter(|_| to.digest.is_none()) else {
            return Err(RegistryError::BadName { doing: "push to", name, reason: "it is no tag".into() });
        };
        let session = self.session()?;
        let endpoint = session.conf.push_endpoint(&to.repository)?;
        let uploads = Uploads::new(&session.transport, &endpoint, name);
        let push = Push { uploads, store, image, to, tag, options, progress };
        thread::scope(|scope| session.runtime.block_on(push.run(scope)))
    }
}

struct Push<'a> {
    uploads: Uploads<'a>,
    store: &'a Store,
    image: &'a Image,
    to: &'a ImageName,
    tag: String,
    options: &'a PushOptions,
    progress: &'a dyn Progress,
}

/// One layer of the image.
#[derive(Clone)]
struct Layer {
    digest: Digest,
    diff_id: Digest,
    original: Descriptor,
}

/// How a layer came to be in the repository.
#[derive(Clone, Copy, PartialEq, Eq)]
enum How {
    Present,
    Mounted,
    Pushed,
}

/// A packed layer to be sent with one request.
struct Whole {
    payload: Payload,
    digest: Digest,
    table: Table,
}

struct Placed {
    diff_id: Digest,
    descriptor: Descriptor,
    how: How,
    bytes: u64,
}

impl Push<'_> {
    async fn run<'scope>(&'scope self, scope: &'scope thread::Scope<'scope, '_>) -> Result<Pushed> {
        let layers = self.layers()?;
        let mut distinct: Vec<Layer> = Vec::new();
        for layer in &layers {
            if !distinct.iter().any(|other| other.diff_id == layer.diff_id) {
                distinct.push(layer.clone());
            }
        }
        let placed: Vec<Placed> = futures_util::stream::iter(distinct)
            .map(|layer| self.layer(scope, layer))
            .buffer_unordered(self.options.parallel.unwrap_or(PARALLEL).max(1))
            .try_collect()
            .await?;
        let count = |how| placed.iter().filter(|placed| placed.how == how).count();
        let mut pushed = Pushed {
            manifest: self.image.manifest_digest,
            bytes: placed.iter().map(|placed| placed.bytes).sum(),
            layers_pushed: count(How::Pushed),
            layers_mounted: count(How::Mounted),
            layers_present: count(How::Present),
        };
        let by_diff_id: HashMap<Digest, &Descriptor> =
            placed.iter().map(|placed| (placed.diff_id, &placed.descriptor)).collect();
        let descriptors: Vec<Descriptor> =
            layers.iter().filter_map(|layer| Some((*by_diff_id.get(&layer.diff_id)?).clone())).collect();

        let config = Bytes::from(self.blob(&self.image.id)?);
        if self.uploads.put_small(&config, &self.image.id).await? {
            pushed.bytes += config.len() as u64;
        }
        let (media_type, bytes) =
            manifest::with_layers(self.store, self.image, &descriptors, config.len() as u64)?;
        pushed.manifest = Digest::of(&bytes);
        pushed.bytes += self.put_manifest(&media_type, bytes, &pushed.manifest).await?;
        self.store.remember_origin(&self.image.id, &self.to.repository, None)?;
        Ok(pushed)
    }

    fn layers(&self) -> Result<Vec<Layer>> {
        let name = &self.uploads.name;
        let texts = self.image.config.rootfs().diff_ids();
        let layers = self.image.layers.iter().zip(self.image.manifest.layers()).zip(texts);
        layers
            .map(|((digest, original), diff_id)| {
                let diff_id = manifest::digest(diff_id, "diff_id", name)?;
                Ok(Layer { digest: *digest, diff_id, original: original.clone() })
            })
            .collect()
    }

    fn blob(&self, digest: &Digest) -> Result<Vec<u8>> {
        self.store.blob(digest)?.ok_or_else(|| RegistryError::Invalid {
            what: "image",
            name: self.uploads.name.clone(),
            reason: format!("blob {digest} is not in the store"),
        })
    }

    async fn layer<'scope>(
        &'scope self,
        scope: &'scope thread::Scope<'scope, '_>,
        layer: Layer,
    ) -> Result<Placed> {
        let step = self.progress.begin(Step { name: layer.diff_id.short(), verb: "push", total: None });
        let outcome = self.place(scope, &layer, step).await;
        self.progress.end(
            step,
            match &outcome {
                Ok(Placed { how: How::Present, .. }) => "exists",
                Ok(Placed { how: How::Mounted, .. }) => "mounted",
                Ok(Placed { how: How::Pushed, .. }) => "done",
                Err(_) => "failed",
            },
        );
        outcome
    }

    async fn place<'scope>(
        &'scope self,
        scope: &'scope thread::Scope<'scope, '_>,
        layer: &Layer,
        step: StepId,
    ) -> Result<Placed> {
        let candidates = self.candidates(layer)?;
        let placed =
            |descriptor: Descriptor, how, bytes| Placed { diff_id: layer.diff_id, descriptor, how, bytes };
        for (digest, descriptor) in &candidates {
            if self.uploads.exists(digest).await? {
                return Ok(placed(descriptor.clone(), How::Present, 0));
            }
        }
        for source in self.repositories_with(layer)? {
            for (digest, descriptor) in &candidates {
                if self.uploads.mount(digest, &source).await? {
                    return Ok(placed(descriptor.clone(), How::Mounted, 0));
                }
            }
        }
        let descriptor = self.send(scope, layer, step).await?;
        self.store.remember_packed_blob(&layer.diff_id, &descriptor)?;
        let bytes = descriptor.size();
        Ok(placed(descriptor, How::Pushed, bytes))
    }

    /// The descriptor of a layer that was packed and sent.
    fn described(&self, layer: &Layer, digest: &Digest, length: u64, table: &Table) -> Descriptor {
        let media_type = manifest::layer_media_type(self.options.packing.compression());
        let mut descriptor = manifest::descriptor(media_type, digest, length);
        match table {
            Some(Ok(place)) => place.annotate(&mut descriptor),
            Some(Err(why)) => self.progress.note(&format!(
                "layer {} has no table of contents, and can be pulled whole only: {why}",
                layer.diff_id.short()
            )),
            None => {}
        }
        descriptor
    }

    /// Blobs that are known to hold the layer: the original first if it is packed at all, then those packed as is asked for, then
    /// others.
    fn candidates(&self, layer: &Layer) -> Result<Vec<(Digest, Descriptor)>> {
        let mut candidates: Vec<(Digest, Descriptor)> = Vec::new();
        for descriptor in
            std::iter::once(&layer.original).chain(&self.store.blobs_of_diff_id(&layer.diff_id)?)
        {
            let Ok(digest) = manifest::descriptor_digest(descriptor, "") else { continue };
            let known = candidates.iter().any(|(other, _)| *other == digest);
            let fits =
                self.options.packing != Packing::Chunked || matches!(TocPlace::of(descriptor), Ok(Some(_)));
            if !known && fits && manifest::compression_of(descriptor.media_type()).is_some() {
                candidates.push((digest, descriptor.clone()));
            }
        }
        let original = manifest::descriptor_digest(&layer.original, "").ok();
        let wanted = self.options.packing.compression();
        candidates.sort_by_key(|(digest, descriptor)| {
            let packed = manifest::compression_of(descriptor.media_type());
            let unpacked = packed == Some(Compression::None) && wanted != Compression::None;
            (unpacked, Some(*digest) != original, packed != Some(wanted))
        });
        Ok(candidates)
    }

    /// Other repositories of the same registry whose images have the layer, as far as the store's tags tell.
    fn repositories_with(&self, layer: &Layer) -> Result<Vec<String>> {
        let mut repositories = Vec::new();
        for (name, entry) in self.store.tags()? {
            let path = name.path();
            if name.registry() != self.to.registry()
                || path == self.to.path()
                || repositories.iter().any(|known| known == path)
            {
                continue;
            }
            if self.store.image(&entry.target)?.is_some_and(|image| image.layers.contains(&layer.digest)) {
                repositories.push(path.to_owned());
            }
        }
        repositories.truncate(MOUNT_SOURCES);
        Ok(repositories)
    }

    /// Packs and sends a layer: in chunks, or whole if the registry takes none. A lost upload begins anew.
    async fn send<'scope>(
        &'scope self,
        scope: &'scope thread::Scope<'scope, '_>,
        layer: &Layer,
        step: StepId,
    ) -> Result<Descriptor> {
        let mut retry = Retry::new(self.uploads.transport.config.retries());
        let mut spooled = None;
        loop {
            let counted = AtomicI64::new(0);
            let sent = |bytes: u64| {
                let bytes = i64::try_from(bytes).unwrap_or(i64::MAX);
                counted.fetch_add(bytes, Ordering::Relaxed);
                self.progress.advance(step, bytes);
            };
            let outcome = if self.uploads.takes_chunks() {
                self.send_in_chunks(scope, layer, &sent).await
            } else {
                self.send_whole(scope, layer, &mut spooled, &sent).await
            };
            let error = match outcome {
                Ok(descriptor) => return Ok(descriptor),
                Err(error) => error,
            };
            // All of it has to be sent again.
            self.progress.advance(step, -counted.into_inner());
            match error {
                UploadError::Failed(error) => return Err(error),
                UploadError::Refused(error) => {
                    tracing::debug!(%error, "the registry takes no chunks: blobs go whole");
                    self.uploads.send_no_chunks();
                }
                UploadError::Lost(error) => match retry.failed(None) {
                    Some(pause) => tokio::time::sleep(pause).await,
                    None => return Err(error),
                },
            }
        }
    }

    async fn send_in_chunks<'scope>(
        &'scope self,
        scope: &'scope thread::Scope<'scope, '_>,
        layer: &Layer,
        sent: &(dyn Fn(u64) + Sync),
    ) -> std::result::Result<Descriptor, UploadError> {
        let mut session = self.uploads.begin().await?;
        let (sender, mut chunks) = mpsc::channel(1);
        let (store, packing, size, diff_id) =
            (self.store, self.options.packing, session.chunk, layer.diff_id);
        scope.spawn(move || pack::in_chunks(store, &diff_id, packing, size, &sender));
        let mut total = 0;
        loop {
            match chunks.recv().await {
                Some(Packed::Chunk(chunk)) => {
                    total += chunk.len() as u64;
                    if let Err(error) = self.uploads.add(&mut session, chunk, sent).await {
                        if matches!(error, UploadError::Refused(_)) {
                            self.uploads.cancel(session).await;
                        }
                        return Err(error);
                    }
                }
                Some(Packed::Last(rest, digest, table)) => {
                    total += rest.len() as u64;
                    self.uploads.finish(session, rest.into(), &digest, sent).await?;
                    return Ok(self.described(layer, &digest, total, &table));
                }
                Some(Packed::Failed(error)) => return Err(error.into()),
                None => return Err(self.packing_died().into()),
            }
        }
    }

    /// Sends a layer with one request, which has to name its digest and length first: the layer is packed into a file,
    /// which stays for another attempt.
    async fn send_whole<'scope>(
        &'scope self,
        scope: &'scope thread::Scope<'scope, '_>,
        layer: &Layer,
        spooled: &mut Option<Whole>,
        sent: &(dyn Fn(u64) + Sync),
    ) -> std::result::Result<Descriptor, UploadError> {
        let (store, packing, diff_id) = (self.store, self.options.packing, layer.diff_id);
        let whole = match spooled {
            Some(whole) => whole,
            None => {
                let (told, packed) = oneshot::channel();
                scope.spawn(move || {
                    // Nobody listens if the push has failed elsewhere.
                    let _ = told.send(pack::into_file(store, &diff_id, packing));
                });
                let Spooled { file, digest, length, table } =
                    packed.await.unwrap_or_else(|_| Err(self.packing_died()))?;
                let payload = Payload::File { file: Arc::new(file), length };
                spooled.insert(Whole { payload, digest, table })
            }
        };
        let session = self.uploads.begin().await?;
        self.uploads.finish(session, whole.payload.clone(), &whole.digest, sent).await?;
        Ok(self.described(layer, &whole.digest, whole.payload.length(), &whole.table))
    }

    fn packing_died(&self) -> RegistryError {
        RegistryError::Invalid {
            what: "layer",
            name: self.uploads.name.clone(),
            reason: "the thread that packed it ended".into(),
        }
    }

    /// Gives the tag its manifest, unless it has it. How many bytes were sent.
    async fn put_manifest(&self, media_type: &str, bytes: Vec<u8>, digest: &Digest) -> Result<u64> {
        let Uploads { transport, endpoint, name, .. } = &self.uploads;
        let scopes = Scopes::push(&endpoint.repository);
        let path = format!("manifests/{}", self.tag);
        let doing = format!("push the manifest of `{name}`");
        let mut head = Call::new(endpoint, Method::HEAD, &path, scopes.clone(), doing.clone());
        let accept = HeaderValue::from_str(&manifest::ACCEPT.join(", "));
        head.headers
            .insert(ACCEPT, accept.unwrap_or_else(|_| unreachable!("media types are a header's value")));
        let response = transport.send(&head).await?;
        let there = response
            .headers()
            .get("docker-content-digest")
            .and_then(|digest| digest.to_str().ok()?.parse().ok());
        if response.status() == StatusCode::OK && there == Some(*digest) {
            return Ok(0);
        }
        let length = bytes.len() as u64;
        let mut call = Call::new(endpoint, Method::PUT, &path, scopes, doing);
        let content_type = HeaderValue::from_str(media_type).map_err(|_| RegistryError::Invalid {
            what: "manifest",
            name: name.clone(),
            reason: "its media type is no text".into(),
        })?;
        call.headers.insert(CONTENT_TYPE, content_type);
        call.body = Some(Bytes::from(bytes).into());
        let response = transport.send(&call).await?;
        if !response.status().is_success() {
            return Err(transport.refusal(&call, response).await);
        }
        Ok(length)
    }
}
