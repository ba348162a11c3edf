//! One blob from a registry, as a stream that survives broken connections.
//!
//! The bytes are hashed as they come and handed on at once; when a connection breaks or hangs, the next one
//! asks for what is missing (`Range: bytes=N-`) and the stream goes on where it was, so that its reader notices nothing.
//! A large blob comes in parts over several connections at once, each asked for and repeated by itself and handed on in
//! order; a server without ranges is noticed by its first answer, which then is the stream.
//!
//! The stream is *ended* only when size and digest are right: a reader that has seen the end has seen the blob,
//! and one that has not must keep nothing.

use std::sync::atomic::{AtomicI64, Ordering};

use bytes::{Bytes, BytesMut};
use futures_util::StreamExt as _;
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

/// From this size on a blob is fetched in parts.
const LARGE: u64 = 16 << 20;
/// Bytes of a part. A part is held in memory until those before it have been handed on.
const PART: u64 = 4 << 20;
/// In such pieces a part is handed on.
const PIECE: usize = 128 << 10;
/// Parts on their way at the same time.
const PARTS: usize = 3;

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

/// Downloads `blob` into `out`. `advance` is told of all bytes that came, and takes back what has to come again. `false` if nobody reads any more.
pub(crate) async fn download(
    transport: &Transport,
    endpoint: &Endpoint,
    blob: &Blob,
    advance: &(dyn Fn(i64) + Sync),
    out: &mpsc::Sender<Piece>,
) -> Result<bool> {
    let mut state = State { position: 0, hasher: Hasher::new() };
    let mut retry = Retry::new(transport.config.retries());
    let mut last_failure = 0;
    if blob.size >= LARGE && !state.parts(transport, endpoint, blob, advance, out).await? {
        return Ok(false);
    }
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
    /// Fetches in parts what can be fetched so; what is missing afterwards is left to [`State::once`]. `false` if nobody reads.
    async fn parts(
        &mut self,
        transport: &Transport,
        endpoint: &Endpoint,
        blob: &Blob,
        advance: &(dyn Fn(i64) + Sync),
        out: &mpsc::Sender<Piece>,
    ) -> Result<bool> {
        let came = AtomicI64::new(0);
        let counted = |bytes: i64| {
            came.fetch_add(bytes, Ordering::Relaxed);
            advance(bytes);
        };
        let starts = (0..blob.size).step_by(PART as usize);
        let mut parts = futures_util::stream::iter(starts)
            .map(|start| part(transport, endpoint, blob, start, (start + PART).min(blob.size), &counted))
            .buffered(if serves_ranges(transport, endpoint, blob).await? { PARTS } else { return Ok(true) });
        while let Some(part) = parts.next().await {
            // A part that cannot be had is no end: the stream goes on from here over one connection, which tells why.
            let Some(mut data) = part? else {
                advance(self.position as i64 - came.load(Ordering::Relaxed));
                return Ok(true);
            };
            self.hasher.update(&data);
            self.position += data.len() as u64;
            // In small pieces: the queue to the unpacking thread is bounded by their number.
            while !data.is_empty() {
                let piece = data.split_to(data.len().min(PIECE));
                if out.send(Piece::Data(piece)).await.is_err() {
                    return Ok(false);
                }
            }
        }
        Ok(true)
    }

    /// One connection.
    async fn once(
        &mut self,
        transport: &Transport,
        endpoint: &Endpoint,
        blob: &Blob,
        advance: &(dyn Fn(i64) + Sync),
        out: &mpsc::Sender<Piece>,
    ) -> Result<Once> {
        let range = (self.position > 0).then(|| format!("bytes={}-", self.position));
        let call = get(endpoint, blob, range);
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
            let mut data = match transport.chunk(&mut response, &call.doing, &endpoint.host).await {
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
            advance(length as i64);
            if out.send(Piece::Data(data)).await.is_err() {
                return Ok(Once::NobodyReads);
            }
        }
    }
}

/// Whether the server gives parts of a blob: asked for one byte, it gives one byte.
async fn serves_ranges(transport: &Transport, endpoint: &Endpoint, blob: &Blob) -> Result<bool> {
    let response = transport.send(&get(endpoint, blob, Some("bytes=0-0".into()))).await?;
    // Whatever else this is, the request for the whole blob finds out.
    Ok(response.status() == StatusCode::PARTIAL_CONTENT && response.content_length() == Some(1))
}

/// A stretch of a blob into `out`, in parts over several connections at once. What comes is not verified: the digest is
/// that of the whole blob.
pub(crate) async fn range(
    transport: &Transport,
    endpoint: &Endpoint,
    blob: &Blob,
    (start, end): (u64, u64),
    advance: &(dyn Fn(i64) + Sync),
    out: &mpsc::Sender<Piece>,
) -> Result<()> {
    let starts = (start..end).step_by(PART as usize);
    let mut parts = futures_util::stream::iter(starts)
        .map(|from| part(transport, endpoint, blob, from, (from + PART).min(end), advance))
        .buffered(PARTS);
    while let Some(part) = parts.next().await {
        let Some(data) = part? else {
            return Err(RegistryError::NoParts { digest: blob.digest, registry: endpoint.host.clone() });
        };
        if out.send(Piece::Data(data)).await.is_err() {
            return Ok(());
        }
    }
    let _ = out.send(Piece::End).await;
    Ok(())
}

/// One part of a blob, from `start` to before `end`; `None` if it cannot be had, although it was tried again.
pub(crate) async fn part(
    transport: &Transport,
    endpoint: &Endpoint,
    blob: &Blob,
    start: u64,
    end: u64,
    advance: &(dyn Fn(i64) + Sync),
) -> Result<Option<Bytes>> {
    let mut data = BytesMut::with_capacity((end - start).min(PART) as usize);
    let mut retry = Retry::new(transport.config.retries());
    while (data.len() as u64) < end - start {
        let at = start + data.len() as u64;
        let call = get(endpoint, blob, Some(format!("bytes={at}-{}", end - 1)));
        let mut response = transport.send(&call).await?;
        if response.status() != StatusCode::PARTIAL_CONTENT || range_start(response.headers()) != Some(at) {
            return Ok(None);
        }
        while let Ok(Some(bytes)) = transport.chunk(&mut response, &call.doing, &endpoint.host).await {
            let taken = bytes.len().min((end - start) as usize - data.len());
            data.extend_from_slice(&bytes[..taken]);
            advance(taken as i64);
        }
        if (data.len() as u64) < end - start {
            match retry.failed(None) {
                Some(pause) => tokio::time::sleep(pause).await,
                None => return Ok(None),
            }
        }
    }
    Ok(Some(data.freeze()))
}

/// A request for a blob or a part of it.
fn get<'a>(endpoint: &'a Endpoint, blob: &Blob, range: Option<String>) -> Call<'a> {
    let doing = format!("download {} {} of `{}`", blob.what, blob.digest, blob.name);
    let scopes = Scopes::pull(&endpoint.repository);
    let mut call = Call::new(endpoint, Method::GET, &format!("blobs/{}", blob.digest), scopes, doing);
    if let Some(range) = range {
        let range = HeaderValue::from_str(&range);
        call.headers.insert(RANGE, range.unwrap_or_else(|_| unreachable!("digits are a header's value")));
    }
    call
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
