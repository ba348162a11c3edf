//! One blob from a registry, as a stream that survives broken connections.
//!
//! The bytes are hashed as they come and handed on at once; when a connection breaks or hangs, the next one
//! asks for what is missing (`Range: bytes=N-`) and the stream goes on where it was, so that its reader notices nothing.
//! The stream is *ended* only when size and digest are right: a reader that has seen the end has seen the blob,
//! and one that has not must keep nothing.

use bytes::Bytes;
use kiln_contract::{Digest, Hasher};
use reqwest::header::{CONTENT_RANGE, HeaderMap, HeaderValue, RANGE};
use reqwest::{Method, Response, StatusCode};
use tokio::sync::mpsc;

use crate::challenge::Scopes;
use crate::endpoint::Endpoint;
use crate::retry::Retry;
use crate::transport::{Call, Transport};
use crate::{RegistryError, Result};

/// So much between two failures counts as progress: the attempts are counted anew.
const PROGRESS: u64 = 1 << 20;

/// A blob that is wanted.
#[derive(Debug, Clone)]
pub(crate) struct Blob {
    /// `layer` or `config`.
    pub(crate) what: &'static str,
    /// The image that it is wanted for.
    pub(crate) name: String,
    pub(crate) digest: Digest,
    pub(crate) size: u64,
}

/// What a stream of a blob is made of.
#[derive(Debug)]
pub(crate) enum Piece {
    Data(Bytes),
    /// All was there, and its digest is right.
    End,
}

/// Downloads `blob` into `out`. `advance` is told of every byte that came. `false` if nobody reads any more.
pub(crate) async fn download(
    transport: &Transport,
    endpoint: &Endpoint,
    blob: &Blob,
    advance: &(dyn Fn(u64) + Sync),
    out: &mpsc::Sender<Piece>,
) -> Result<bool> {
    let mut state = State { position: 0, hasher: Hasher::new() };
    let mut retry = Retry::new(transport.config.retries());
    let mut last_failure = 0;
    while state.position < blob.size || state.position == 0 {
        let broken = match state.once(transport, endpoint, blob, advance, out).await? {
            Once::Complete => break,
            Once::NobodyReads => return Ok(false),
            Once::Broken(error) => error,
        };
        if state.position - last_failure >= PROGRESS {
            retry.progress();
        }
        last_failure = state.position;
        match retry.failed(None) {
            Some(pause) => {
                tracing::debug!(%broken, position = state.position, "resuming {}", blob.digest);
                tokio::time::sleep(pause).await;
            }
            None => return Err(given_up(broken, retry.attempts(), state.position, endpoint, blob)),
        }
    }
    let actual = state.hasher.finish();
    if actual != blob.digest {
        return Err(RegistryError::WrongDigest {
            what: blob.what,
            name: blob.name.clone(),
            expected: blob.digest,
            actual,
        });
    }
    Ok(out.send(Piece::End).await.is_ok())
}

/// Downloads a small blob whole.
pub(crate) async fn download_small(
    transport: &Transport,
    endpoint: &Endpoint,
    blob: &Blob,
    limit: u64,
) -> Result<Vec<u8>> {
    if blob.size > limit {
        return Err(RegistryError::TooLarge {
            what: blob.what,
            name: blob.name.clone(),
            size: Some(blob.size),
            limit,
        });
    }
    let (out, mut pieces) = mpsc::channel(4);
    let collect = async {
        let mut bytes = Vec::new();
        while let Some(Piece::Data(data)) = pieces.recv().await {
            bytes.extend_from_slice(&data);
        }
        bytes
    };
    let fetch = async move {
        // Whether it succeeds or fails, the channel is closed then, and collecting comes to its end.
        let out = out;
        download(transport, endpoint, blob, &|_| (), &out).await
    };
    let (outcome, bytes) = tokio::join!(fetch, collect);
    outcome?;
    Ok(bytes)
}

struct State {
    /// Bytes that were handed on.
    position: u64,
    hasher: Hasher,
}

enum Once {
    Complete,
    NobodyReads,
    /// Worth another connection.
    Broken(RegistryError),
}

impl State {
    /// One connection.
    async fn once(
        &mut self,
        transport: &Transport,
        endpoint: &Endpoint,
        blob: &Blob,
        advance: &(dyn Fn(u64) + Sync),
        out: &mpsc::Sender<Piece>,
    ) -> Result<Once> {
        let doing = format!("download {} {} of `{}`", blob.what, blob.digest, blob.name);
        let scopes = Scopes::pull(&endpoint.repository);
        let mut call =
            Call::new(endpoint, Method::GET, &format!("blobs/{}", blob.digest), scopes, doing.clone());
        if self.position > 0 {
            let range = HeaderValue::from_str(&format!("bytes={}-", self.position));
            call.headers.insert(RANGE, range.unwrap_or_else(|_| unreachable!("digits are a header's value")));
        }
        let response = transport.send(&call).await?;
        let mut skip = match response.status() {
            // It knows no ranges: what we have is read over.
            StatusCode::OK => self.position,
            StatusCode::PARTIAL_CONTENT if range_start(response.headers()) == Some(self.position) => 0,
            StatusCode::NOT_FOUND => {
                return Err(RegistryError::NotFound {
                    name: format!("{} {} of {}", blob.what, blob.digest, blob.name),
                    registry: endpoint.host.clone(),
                });
            }
            _ => return Err(transport.refusal(&call, response).await),
        };
        check_length(&response, blob, blob.size - self.position + skip, endpoint)?;
        let mut response = response;
        loop {
            let mut data = match transport.chunk(&mut response, &doing, &endpoint.host).await {
                Ok(Some(data)) => data,
                Ok(None) if self.position == blob.size => return Ok(Once::Complete),
                Ok(None) => {
                    return Ok(Once::Broken(truncated(self.position, endpoint, blob)));
                }
                Err(error) => return Ok(Once::Broken(error)),
            };
            if skip > 0 {
                let over = skip.min(data.len() as u64);
                // At most the length of `data`.
                let _ = data.split_to(over as usize);
                skip -= over;
            }
            if data.is_empty() {
                continue;
            }
            let length = data.len() as u64;
            if self.position + length > blob.size {
                return Err(wrong_size(blob, self.position + length, endpoint));
            }
            self.hasher.update(&data);
            self.position += length;
            advance(length);
            if out.send(Piece::Data(data)).await.is_err() {
                return Ok(Once::NobodyReads);
            }
        }
    }
}

/// A length that is announced and is not what the descriptor says needs no download to be wrong.
fn check_length(response: &Response, blob: &Blob, expected: u64, endpoint: &Endpoint) -> Result<()> {
    match response.content_length() {
        Some(length) if length != expected => {
            Err(wrong_size(blob, length.saturating_add(blob.size - expected.min(blob.size)), endpoint))
        }
        _ => Ok(()),
    }
}

fn range_start(headers: &HeaderMap) -> Option<u64> {
    let range = headers.get(CONTENT_RANGE)?.to_str().ok()?;
    range.strip_prefix("bytes ")?.split('-').next()?.trim().parse().ok()
}

fn wrong_size(blob: &Blob, actual: u64, endpoint: &Endpoint) -> RegistryError {
    RegistryError::WrongSize {
        what: blob.what,
        name: blob.name.clone(),
        digest: blob.digest,
        registry: endpoint.host.clone(),
        expected: blob.size,
        actual,
    }
}

fn truncated(got: u64, endpoint: &Endpoint, blob: &Blob) -> RegistryError {
    RegistryError::Truncated {
        what: blob.what,
        name: blob.name.clone(),
        digest: blob.digest,
        registry: endpoint.host.clone(),
        got,
        expected: blob.size,
    }
}

fn given_up(
    broken: RegistryError,
    attempts: u32,
    got: u64,
    endpoint: &Endpoint,
    blob: &Blob,
) -> RegistryError {
    match broken {
        RegistryError::TimedOut { doing, registry, waited, .. } => {
            RegistryError::TimedOut { doing, registry, waited, attempts }
        }
        // A connection that breaks in the middle is what a truncated blob looks like.
        RegistryError::Unreachable { .. } => truncated(got, endpoint, blob),
        other => other,
    }
}
