//! From the store into a registry, sending only what is missing there.
//!
//! The store keeps layers unpacked, so the compressed blobs that a manifest names are no longer at hand. For each
//! layer, in this order: a blob that is known to hold it and is in the repository already; the same, taken over from
//! another repository of that registry (a mount); a new blob, packed while it is sent. If every layer turned out to
//! be the one that the image's own manifest names, that manifest is pushed as it is, and the digest stays; otherwise one
//! with the new blobs. What was packed is remembered, so that a second push finds it.

use std::collections::HashMap;
use std::io::{self, Write};
use std::thread;

use bytes::Bytes;
use futures_util::{StreamExt as _, TryStreamExt as _};
use kiln_contract::{Digest, Hasher, Progress, Step, StepId};
use kiln_store::{Image, ImageName, Store};
use oci_spec::image::Descriptor;
use reqwest::header::{ACCEPT, CONTENT_TYPE, HeaderValue};
use reqwest::{Method, StatusCode};
use tokio::sync::mpsc;

use crate::challenge::Scopes;
use crate::compression::{Compression, Compressor};
use crate::manifest;
use crate::registry::{Registry, full_name};
use crate::retry::Retry;
use crate::transport::Call;
use crate::upload::{UploadError, Uploads};
use crate::{RegistryError, Result};

/// How to push.
#[derive(Debug, Clone, Default)]
pub struct PushOptions {
    /// How layers are packed that the registry does not have.
    pub compression: Compression,
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
        let uploads = Uploads { transport: &session.transport, endpoint: &endpoint, name };
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
        self.store.remember_blob(&layer.diff_id, &descriptor)?;
        let bytes = descriptor.size();
        Ok(placed(descriptor, How::Pushed, bytes))
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
            if !known && manifest::compression_of(descriptor.media_type()).is_some() {
                candidates.push((digest, descriptor.clone()));
            }
        }
        let original = manifest::descriptor_digest(&layer.original, "").ok();
        let wanted = self.options.compression;
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

    /// Packs and sends a layer. A lost upload begins anew.
    async fn send<'scope>(
        &'scope self,
        scope: &'scope thread::Scope<'scope, '_>,
        layer: &Layer,
        step: StepId,
    ) -> Result<Descriptor> {
        let mut retry = Retry::new(self.uploads.transport.config.retries());
        loop {
            match self.send_once(scope, layer, step).await {
                Ok(descriptor) => return Ok(descriptor),
                Err(UploadError::Failed(error)) => return Err(error),
                Err(lost @ UploadError::Lost(_)) => match retry.failed(None) {
                    Some(pause) => tokio::time::sleep(pause).await,
                    None => return Err(lost.into_error()),
                },
            }
        }
    }

    async fn send_once<'scope>(
        &'scope self,
        scope: &'scope thread::Scope<'scope, '_>,
        layer: &Layer,
        step: StepId,
    ) -> std::result::Result<Descriptor, UploadError> {
        let mut session = self.uploads.begin().await?;
        let (sender, mut chunks) = mpsc::channel(1);
        let (store, compression, size, diff_id) =
            (self.store, self.options.compression, session.chunk, layer.diff_id);
        scope.spawn(move || pack(store, &diff_id, compression, size, &sender));
        let sent = |bytes: u64| self.progress.advance(step, i64::try_from(bytes).unwrap_or(i64::MAX));
        let mut total = 0;
        loop {
            match chunks.recv().await {
                Some(Packed::Chunk(chunk)) => {
                    total += chunk.len() as u64;
                    self.uploads.add(&mut session, chunk, &sent).await?;
                }
                Some(Packed::Last(rest, digest)) => {
                    total += rest.len() as u64;
                    self.uploads.finish(session, rest, &digest, &sent).await?;
                    return Ok(manifest::descriptor(manifest::layer_media_type(compression), &digest, total));
                }
                Some(Packed::Failed(error)) => return Err(error.into()),
                None => {
                    return Err(UploadError::Failed(RegistryError::Invalid {
                        what: "layer",
                        name: self.uploads.name.clone(),
                        reason: "the thread that packed it ended".into(),
                    }));
                }
            }
        }
    }

    /// Gives the tag its manifest, unless it has it. How many bytes were sent.
    async fn put_manifest(&self, media_type: &str, bytes: Vec<u8>, digest: &Digest) -> Result<u64> {
        let Uploads { transport, endpoint, name } = &self.uploads;
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
        call.body = Some(bytes.into());
        let response = transport.send(&call).await?;
        if !response.status().is_success() {
            return Err(transport.refusal(&call, response).await);
        }
        Ok(length)
    }
}

/// What the packing thread gives.
enum Packed {
    Chunk(Bytes),
    /// The last bytes, and the digest of all.
    Last(Bytes, Digest),
    Failed(RegistryError),
}

/// Packs a layer into chunks of `size` bytes.
fn pack(
    store: &Store,
    diff_id: &Digest,
    compression: Compression,
    size: usize,
    sender: &mpsc::Sender<Packed>,
) {
    let chunks = Chunks { size, filling: Vec::new(), hasher: Hasher::new(), sender };
    let packed = Compressor::new(compression, chunks).map_err(packing).and_then(|mut compressor| {
        store.export_diff(diff_id, &mut compressor)?;
        compressor.finish().map_err(packing)
    });
    // Nobody listens if the push has failed elsewhere.
    let _ = sender.blocking_send(match packed {
        Ok(chunks) => Packed::Last(chunks.filling.into(), chunks.hasher.finish()),
        Err(error) => Packed::Failed(error),
    });
}

fn packing(source: io::Error) -> RegistryError {
    RegistryError::Io { doing: "pack", path: "a layer".into(), source }
}

struct Chunks<'a> {
    size: usize,
    filling: Vec<u8>,
    hasher: Hasher,
    sender: &'a mpsc::Sender<Packed>,
}

impl Write for Chunks<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        // A full chunk goes only when more follows: the last one travels with the closing request.
        if self.filling.len() >= self.size && !bytes.is_empty() {
            let full = std::mem::replace(&mut self.filling, Vec::with_capacity(self.size));
            self.sender
                .blocking_send(Packed::Chunk(full.into()))
                .map_err(|_| io::Error::other("the upload failed"))?;
        }
        let n = bytes.len().min(self.size - self.filling.len());
        self.filling.extend_from_slice(&bytes[..n]);
        self.hasher.update(&bytes[..n]);
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
