//! Blobs into a registry (distribution-spec 1.1, "Pushing blobs").
//!
//! An upload is a session: `POST` opens it, `PATCH` adds a chunk, `PUT` with the digest closes it. What fits
//! one chunk goes with the `PUT` alone. After a chunk that failed, the registry is asked how much of it has arrived
//! (`GET` on the session), and the rest is sent; a registry that has lost the session makes the upload begin anew.
//!
//! Not every registry takes chunks. One that refuses a `PATCH` (and does not only fail, ask for patience or deny access)
//! gets this blob and all others with one `PUT` each.

use std::sync::atomic::{AtomicBool, Ordering};

use bytes::Bytes;
use kiln_contract::Digest;
use reqwest::header::{CONTENT_RANGE, CONTENT_TYPE, HeaderMap, HeaderValue, LOCATION, RANGE};
use reqwest::{Method, Response, StatusCode, Url};

use crate::challenge::Scopes;
use crate::endpoint::Endpoint;
use crate::retry::Retry;
use crate::transport::{Call, Payload, Target, Transport};
use crate::{RegistryError, Result};

/// Bytes of a chunk: the smallest that object stores behind registries take as a part is 5 MiB.
pub(crate) const CHUNK: usize = 8 << 20;
/// A registry that wants larger chunks gets them up to this size.
const LARGEST_CHUNK: usize = 64 << 20;

/// Where blobs go.
pub(crate) struct Uploads<'a> {
    pub(crate) transport: &'a Transport,
    pub(crate) endpoint: &'a Endpoint,
    /// The image, for errors.
    pub(crate) name: String,
    /// The registry has refused a chunk.
    no_chunks: AtomicBool,
}

/// An open upload.
pub(crate) struct Session {
    url: Url,
    /// Bytes that the registry has.
    position: u64,
    /// Bytes that a chunk should have.
    pub(crate) chunk: usize,
}

/// How a step of an upload can fail.
pub(crate) enum UploadError {
    /// The session is gone; the blob can be sent again from its beginning.
    Lost(RegistryError),
    /// The registry takes no chunks; the blob can be sent whole.
    Refused(RegistryError),
    Failed(RegistryError),
}

impl From<RegistryError> for UploadError {
    fn from(error: RegistryError) -> Self {
        Self::Failed(error)
    }
}

impl<'a> Uploads<'a> {
    pub(crate) fn new(transport: &'a Transport, endpoint: &'a Endpoint, name: String) -> Self {
        Self { transport, endpoint, name, no_chunks: AtomicBool::new(false) }
    }

    /// Whether the registry takes blobs in chunks, as far as is known.
    pub(crate) fn takes_chunks(&self) -> bool {
        !self.no_chunks.load(Ordering::Relaxed)
    }

    /// Takes note that it does not.
    pub(crate) fn send_no_chunks(&self) {
        self.no_chunks.store(true, Ordering::Relaxed);
    }

    fn scopes(&self) -> Scopes {
        Scopes::push(&self.endpoint.repository)
    }

    fn doing(&self, what: &str) -> String {
        format!("push {what} of `{}`", self.name)
    }

    /// Whether the repository has the blob.
    pub(crate) async fn exists(&self, digest: &Digest) -> Result<bool> {
        let path = format!("blobs/{digest}");
        let call = Call::new(
            self.endpoint,
            Method::HEAD,
            &path,
            self.scopes(),
            self.doing(&format!("blob {digest}")),
        );
        let response = self.transport.send(&call).await?;
        match response.status() {
            StatusCode::OK => Ok(true),
            StatusCode::NOT_FOUND => Ok(false),
            _ => Err(self.transport.refusal(&call, response).await),
        }
    }

    /// Asks the registry to take the blob over from another of its repositories. Whether it did.
    pub(crate) async fn mount(&self, digest: &Digest, from: &str) -> Result<bool> {
        let path = format!("blobs/uploads/?mount={digest}&from={from}");
        let scopes = self.scopes().and_pull(from);
        let call =
            Call::new(self.endpoint, Method::POST, &path, scopes, self.doing(&format!("blob {digest}")));
        let response = match self.transport.send(&call).await {
            Ok(response) => response,
            // No access to the other repository: the blob has to be sent.
            Err(RegistryError::Denied { .. }) => return Ok(false),
            Err(error) => return Err(error),
        };
        match response.status() {
            StatusCode::CREATED => Ok(true),
            StatusCode::ACCEPTED => {
                // An upload was opened instead.
                if let Some(url) = self.location(&response) {
                    self.cancel_at(url).await;
                }
                Ok(false)
            }
            _ => Ok(false),
        }
    }

    /// Gives an upload up.
    pub(crate) async fn cancel(&self, session: Session) {
        self.cancel_at(session.url).await;
    }

    /// An upload is not left lying about; whether that works does not matter.
    async fn cancel_at(&self, url: Url) {
        let mut cancel = Call::new(self.endpoint, Method::DELETE, "", self.scopes(), "cancel an upload");
        cancel.target = Target::Url(url);
        cancel.repeat = false;
        let _ = self.transport.send(&cancel).await;
    }

    /// Opens an upload.
    pub(crate) async fn begin(&self) -> Result<Session> {
        let call =
            Call::new(self.endpoint, Method::POST, "blobs/uploads/", self.scopes(), self.doing("a blob"));
        let response = self.transport.send(&call).await?;
        if response.status() != StatusCode::ACCEPTED {
            return Err(self.transport.refusal(&call, response).await);
        }
        let least =
            header(response.headers(), "oci-chunk-min-length").and_then(|text| text.parse::<usize>().ok());
        let chunk = least.unwrap_or(0).clamp(CHUNK, LARGEST_CHUNK);
        let url = self.location(&response).ok_or_else(|| self.no_location(&response))?;
        Ok(Session { url, position: 0, chunk })
    }

    /// Adds `chunk` to an upload.
    pub(crate) async fn add(
        &self,
        session: &mut Session,
        mut chunk: Bytes,
        sent: &(dyn Fn(u64) + Sync),
    ) -> std::result::Result<(), UploadError> {
        let mut retry = Retry::new(self.transport.config.retries());
        while !chunk.is_empty() {
            let call = self.step(session, Method::PATCH, session.url.clone(), chunk.clone().into(), sent);
            // An answer to the very first bytes is about chunks as such, and not about this upload.
            let first = session.position == 0 && retry.attempts() == 0;
            let (error, asked) = match self.transport.send(&call).await {
                Ok(response) if matches!(response.status().as_u16(), 201 | 202 | 204) => {
                    session.position += chunk.len() as u64;
                    session.url = self.location(&response).unwrap_or_else(|| session.url.clone());
                    return Ok(());
                }
                Ok(response) => {
                    let status = response.status();
                    let error = self.transport.refusal(&call, response).await;
                    match status {
                        StatusCode::RANGE_NOT_SATISFIABLE if !first => (error, None),
                        StatusCode::NOT_FOUND if !first => return Err(UploadError::Lost(error)),
                        status if refuses_chunks(status) => return Err(UploadError::Refused(error)),
                        _ => return Err(error.into()),
                    }
                }
                Err(error) if may_pass(&error) => {
                    let asked = match &error {
                        RegistryError::RateLimited { retry_after, .. } => *retry_after,
                        _ => None,
                    };
                    (error, asked)
                }
                Err(error) => return Err(error.into()),
            };
            // A registry that will not have the next chunk, whatever it says of those before, is spared them.
            let refused = matches!(error, RegistryError::Status { status: 416, .. });
            let Some(pause) = retry.failed(asked) else {
                return Err(if refused { UploadError::Refused(error) } else { error.into() });
            };
            tokio::time::sleep(pause).await;
            let lost = |error| if refused { UploadError::Refused(error) } else { UploadError::Lost(error) };
            let arrived = match self.arrived(session).await {
                Err(UploadError::Lost(error)) => return Err(lost(error)),
                arrived => arrived?,
            };
            match arrived.checked_sub(session.position) {
                Some(more) if more <= chunk.len() as u64 => {
                    // At most the chunk's length.
                    let _ = chunk.split_to(more as usize);
                    session.position = arrived;
                }
                _ => return Err(lost(error)),
            }
        }
        Ok(())
    }

    /// Sends what is left and closes the upload.
    pub(crate) async fn finish(
        &self,
        session: Session,
        rest: Payload,
        digest: &Digest,
        sent: &(dyn Fn(u64) + Sync),
    ) -> std::result::Result<(), UploadError> {
        let mut url = session.url.clone();
        url.query_pairs_mut().append_pair("digest", &digest.to_string());
        let call = self.step(&session, Method::PUT, url, rest, sent);
        match self.transport.send(&call).await {
            Ok(response) if matches!(response.status().as_u16(), 201 | 204) => Ok(()),
            Ok(response) if matches!(response.status().as_u16(), 404 | 416) => {
                Err(UploadError::Lost(self.transport.refusal(&call, response).await))
            }
            Ok(response) => Err(self.transport.refusal(&call, response).await.into()),
            // The answer may have been lost, and not the blob.
            Err(error) if may_pass(&error) => match self.exists(digest).await {
                Ok(true) => Ok(()),
                _ => Err(UploadError::Lost(error)),
            },
            Err(error) => Err(error.into()),
        }
    }

    /// Sends a small blob unless it is there. Whether it had to be sent.
    pub(crate) async fn put_small(&self, bytes: &Bytes, digest: &Digest) -> Result<bool> {
        if self.exists(digest).await? {
            return Ok(false);
        }
        let mut retry = Retry::new(self.transport.config.retries());
        loop {
            let session = self.begin().await?;
            match self.finish(session, bytes.clone().into(), digest, &|_| ()).await {
                Ok(()) => return Ok(true),
                Err(UploadError::Failed(error) | UploadError::Refused(error)) => return Err(error),
                Err(UploadError::Lost(error)) => match retry.failed(None) {
                    Some(pause) => tokio::time::sleep(pause).await,
                    None => return Err(error),
                },
            }
        }
    }

    fn step<'b>(
        &'b self,
        session: &Session,
        method: Method,
        url: Url,
        body: Payload,
        sent: &'b (dyn Fn(u64) + Sync),
    ) -> Call<'b> {
        let mut call = Call::new(self.endpoint, method, "", self.scopes(), self.doing("a blob"));
        call.target = Target::Url(url);
        call.repeat = false;
        call.sent = Some(sent);
        call.headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/octet-stream"));
        if body.length() > 0 && (session.position > 0 || call.method == Method::PATCH) {
            let range = format!("{}-{}", session.position, session.position + body.length() - 1);
            if let Ok(range) = HeaderValue::from_str(&range) {
                call.headers.insert(CONTENT_RANGE, range);
            }
        }
        call.body = Some(body);
        call
    }

    /// How many bytes of an upload the registry has.
    async fn arrived(&self, session: &mut Session) -> std::result::Result<u64, UploadError> {
        let mut call = Call::new(self.endpoint, Method::GET, "", self.scopes(), self.doing("a blob"));
        call.target = Target::Url(session.url.clone());
        let response = self.transport.send(&call).await?;
        if !response.status().is_success() {
            return Err(UploadError::Lost(self.transport.refusal(&call, response).await));
        }
        session.url = self.location(&response).unwrap_or_else(|| session.url.clone());
        let end = header(response.headers(), RANGE.as_str())
            .and_then(|range| range.trim_start_matches("bytes=").split_once('-')?.1.parse::<u64>().ok());
        // `0-0` is what registries say of an upload that has nothing yet; nobody sends chunks of one byte.
        Ok(match end {
            None | Some(0) => 0,
            Some(end) => end + 1,
        })
    }

    fn location(&self, response: &Response) -> Option<Url> {
        self.transport.absolute(self.endpoint, response.headers().get(LOCATION)?.to_str().ok()?)
    }

    fn no_location(&self, response: &Response) -> RegistryError {
        RegistryError::Status {
            doing: self.doing("a blob"),
            registry: self.endpoint.registry.clone(),
            status: response.status().as_u16(),
            message: "it does not say where to upload to".into(),
        }
    }
}

fn header(headers: &HeaderMap, name: &str) -> Option<String> {
    headers.get(name)?.to_str().ok().map(str::to_owned)
}

/// Whether an answer to a chunk says that there is no use in sending any: what a server says of a method or a header that
/// it does not know, or of a request that it does not understand. Not among them: 413, for the whole blob is larger still.
fn refuses_chunks(status: StatusCode) -> bool {
    matches!(status.as_u16(), 400 | 404 | 405 | 406 | 409 | 411 | 415 | 416 | 422 | 501 | 505)
}

/// Whether the same may succeed later.
fn may_pass(error: &RegistryError) -> bool {
    match error {
        RegistryError::TimedOut { .. }
        | RegistryError::Unreachable { .. }
        | RegistryError::RateLimited { .. } => true,
        RegistryError::Status { status, .. } => crate::retry::is_transient(*status),
        _ => false,
    }
}
