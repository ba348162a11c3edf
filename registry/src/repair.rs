//! What registries give back of a damaged store ([`kiln_store::Store::check`]).
//!
//! Every repository that the store names is asked, and each of its mirrors, until one of them has what is wanted.
//! Compressed layers are spooled to a file first: what unpacks them takes its time, and only whole ones are of use.
//! A registry that cannot be reached is not asked a second time: waiting for it once is enough.

use std::cell::RefCell;
use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read, Seek as _};
use std::thread;

use kiln_contract::{Digest, Progress, Step};
use kiln_store::{DocumentKind, Repair, Store, WantedDocument, WantedLayer, WantedRange};
use oci_spec::image::Descriptor;
use tokio::sync::mpsc;

use crate::compression::decompress;
use crate::document;
use crate::download::{self, Blob};
use crate::endpoint::Endpoint;
use crate::layer_stream::Pieces;
use crate::manifest;
use crate::pull::QUEUE;
use crate::registry::{Registry, Session};
use crate::unpack::scratch_file;
use crate::{RegistryError, Result};

/// A source for [`Store::check`]: the registries that images came from.
pub struct FromRegistries<'a> {
    registry: &'a Registry,
    store: &'a Store,
    progress: &'a dyn Progress,
    /// Hosts that gave no answer, and what was said then.
    silent: RefCell<HashMap<String, String>>,
}

impl std::fmt::Debug for FromRegistries<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("FromRegistries").field("registry", self.registry).finish_non_exhaustive()
    }
}

impl Registry {
    /// What these registries have of `store`, to repair it. Nothing is asked before something is wanted.
    pub fn repair<'a>(&'a self, store: &'a Store, progress: &'a dyn Progress) -> FromRegistries<'a> {
        FromRegistries { registry: self, store, progress, silent: RefCell::default() }
    }
}

impl Repair for FromRegistries<'_> {
    fn document(&self, wanted: &WantedDocument) -> io::Result<Vec<u8>> {
        let WantedDocument { digest, kind, repositories } = wanted;
        self.progress.note(&format!("fetching the {kind} {} again", digest.short()));
        self.first(repositories, |session, endpoint| {
            session.runtime.block_on(self.fetch(session, endpoint, digest, *kind))
        })
    }

    fn layer(&self, wanted: &WantedLayer) -> io::Result<Box<dyn Read + Send>> {
        self.progress.note(&format!("fetching the layer {} again", wanted.diff_id.short()));
        if wanted.blobs.is_empty() {
            return Err(io::Error::other("no form is known in which a registry may have it"));
        }
        let file = self.first(&wanted.repositories, |session, endpoint| {
            let mut spooled = Err(RegistryError::NotFound {
                name: format!("layer {}", wanted.diff_id),
                registry: endpoint.host.clone(),
            });
            for blob in &wanted.blobs {
                spooled = self.spool(session, endpoint, blob, None);
                if spooled.as_ref().map_or_else(is_silence, |_| true) {
                    break;
                }
            }
            spooled
        })?;
        Ok(decompress(file)?.1)
    }

    fn range(&self, wanted: &WantedRange) -> io::Result<Box<dyn Read + Send>> {
        let WantedRange { blob, repositories, offset, length } = wanted;
        let file = self.first(repositories, |session, endpoint| {
            self.spool(session, endpoint, blob, Some((*offset, offset.saturating_add(*length))))
        })?;
        Ok(Box::new(file))
    }
}

impl FromRegistries<'_> {
    /// What the first repository gives that has it.
    fn first<T>(
        &self,
        repositories: &[String],
        fetch: impl Fn(&Session, &Endpoint) -> Result<T>,
    ) -> io::Result<T> {
        let failed = |error: RegistryError| io::Error::other(error.to_string());
        let session = self.registry.session().map_err(failed)?;
        let mut last = "no repository is known to have it".to_owned();
        for repository in repositories {
            let endpoints = match session.conf.pull_endpoints(repository, true) {
                Ok(endpoints) => endpoints,
                Err(error) => {
                    last = error.to_string();
                    continue;
                }
            };
            for endpoint in endpoints {
                if let Some(silence) = self.silent.borrow().get(&endpoint.host) {
                    last.clone_from(silence);
                    continue;
                }
                match fetch(&session, &endpoint) {
                    Ok(fetched) => return Ok(fetched),
                    Err(error) => {
                        last = error.to_string();
                        if is_silence(&error) {
                            self.silent.borrow_mut().insert(endpoint.host.clone(), last.clone());
                        }
                    }
                }
            }
        }
        Err(io::Error::other(last))
    }

    async fn fetch(
        &self,
        session: &Session,
        endpoint: &Endpoint,
        digest: &Digest,
        kind: DocumentKind,
    ) -> Result<Vec<u8>> {
        let name = format!("{}@{digest}", endpoint.full_name());
        let (what, (_, bytes)) = match kind {
            DocumentKind::Config => {
                ("config", document::config(&session.transport, endpoint, digest, &name).await?)
            }
            DocumentKind::Manifest | DocumentKind::Index => (
                "manifest",
                document::manifest(&session.transport, endpoint, &digest.to_string(), &name).await?,
            ),
        };
        let actual = Digest::of(&bytes);
        if actual != *digest {
            return Err(RegistryError::WrongDigest { what, name, expected: *digest, actual });
        }
        Ok(bytes.into())
    }

    /// Downloads a blob, or the part of it between two offsets, into a file without a name.
    fn spool(
        &self,
        session: &Session,
        endpoint: &Endpoint,
        descriptor: &Descriptor,
        part: Option<(u64, u64)>,
    ) -> Result<File> {
        let name = endpoint.full_name();
        let digest = manifest::descriptor_digest(descriptor, &name)?;
        let blob = Blob { what: "layer", name, digest, size: descriptor.size() };
        let failed =
            |source| RegistryError::Io { doing: "write below", path: self.store.path().join("tmp"), source };
        let mut file = scratch_file(self.store)?;
        let size = part.map_or(blob.size, |(start, end)| end.saturating_sub(start));
        let step = self.progress.begin(Step { name: digest.short(), verb: "fetch", total: Some(size) });
        let advance = |bytes: i64| self.progress.advance(step, bytes);
        let (sender, receiver) = mpsc::channel(QUEUE);
        let (downloaded, written) = thread::scope(|scope| {
            let out = &mut file;
            let writer = scope.spawn(move || io::copy(&mut Pieces::new(receiver), out));
            let download = async move {
                // The channel is closed at its end: the writer then comes to its own.
                let sender = sender;
                let transport = &session.transport;
                match part {
                    Some(part) => download::range(transport, endpoint, &blob, part, &advance, &sender).await,
                    None => download::download(transport, endpoint, &blob, &advance, &sender).await.map(drop),
                }
            };
            let downloaded = session.runtime.block_on(download);
            (downloaded, writer.join())
        });
        // Why a download failed is the better message.
        let outcome = downloaded.and_then(|()| match written {
            Ok(written) => written.map_err(failed),
            Err(panic) => std::panic::resume_unwind(panic),
        });
        self.progress.end(step, if outcome.is_ok() { "done" } else { "failed" });
        outcome?;
        file.rewind().map_err(failed)?;
        Ok(file)
    }
}

/// Whether an error says that nobody answers there.
fn is_silence(error: &RegistryError) -> bool {
    matches!(
        error,
        RegistryError::Unreachable { .. } | RegistryError::TimedOut { .. } | RegistryError::Tls { .. }
    )
}
