//! Requests to registries: which scheme, which certificates, whose credentials, where redirects lead, what is
//! tried again.
//!
//! One request goes these steps:
//! 1. *Origin.* HTTPS, unless the host is loopback or declared insecure: then the first request finds out
//!    which of HTTPS and HTTP it speaks.
//! 2. *Authorisation.* A host that has once answered 401 gets its token or password with every request; one that
//!    answers 401 the first time, or whose token has run out, is asked again with a fresh one.
//! 3. *Redirects* are followed here and not in `reqwest`, so that `Authorization` goes to no other host and
//!    HTTPS never turns into HTTP.
//! 4. *Time.* There is no limit for a whole request, but one for the time without any byte, sent or received.
//! 5. *Repetition.* What failed in passing (no connection, no byte, 408, 429, 5xx) is tried again after a pause or
//!    after `Retry-After`.

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use reqwest::header::{AUTHORIZATION, CONTENT_LENGTH, HeaderMap, HeaderValue, LOCATION};
use reqwest::{Body, Client, Method, Response, StatusCode, Url};

use crate::challenge::{Challenge, Scopes};
use crate::endpoint::Endpoint;
use crate::origin::{Mode, Origin};
use crate::retry::{self, Retry};
use crate::token::Tokens;
use crate::{Config, RegistryError, Result, answer};

const REDIRECTS: usize = 10;
/// What is read of an answer that is no success.
const ERROR_BODY: u64 = 64 << 10;
/// How finely an upload's progress is watched.
const SLICE: usize = 64 << 10;
const TICK: Duration = Duration::from_millis(200);

/// One request, which may be sent several times.
#[derive(Clone)]
pub(crate) struct Call<'a> {
    pub(crate) endpoint: &'a Endpoint,
    pub(crate) method: Method,
    pub(crate) target: Target,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Option<Payload>,
    pub(crate) scopes: Scopes,
    /// For errors: `read the manifest of …`.
    pub(crate) doing: String,
    /// Whether it may be sent again after it failed in passing.
    pub(crate) repeat: bool,
    /// Told how many bytes of the body were sent.
    pub(crate) sent: Option<&'a (dyn Fn(u64) + Sync)>,
}

/// What a request carries. It can be sent as often as it takes.
#[derive(Clone)]
pub(crate) enum Payload {
    Bytes(Bytes),
    /// The first `length` bytes of a file.
    File {
        file: Arc<File>,
        length: u64,
    },
}

impl From<Bytes> for Payload {
    fn from(bytes: Bytes) -> Self {
        Self::Bytes(bytes)
    }
}

impl Payload {
    pub(crate) fn length(&self) -> u64 {
        match self {
            Self::Bytes(bytes) => bytes.len() as u64,
            Self::File { length, .. } => *length,
        }
    }

    /// A part of it, from `at` on.
    async fn slice(self, at: u64) -> io::Result<Bytes> {
        match self {
            Self::Bytes(bytes) => {
                let at = at as usize;
                Ok(bytes.slice(at..bytes.len().min(at + SLICE)))
            }
            Self::File { file, length } => {
                let read = move || {
                    let mut slice = vec![0; (length - at).min(SLICE as u64) as usize];
                    file.read_exact_at(&mut slice, at)?;
                    Ok(Bytes::from(slice))
                };
                tokio::task::spawn_blocking(read).await.unwrap_or_else(|error| Err(io::Error::other(error)))
            }
        }
    }
}

#[derive(Clone)]
pub(crate) enum Target {
    /// Below `/v2/` of the endpoint's host.
    Api(String),
    /// Where the registry itself sent us: an upload's location.
    Url(Url),
}

impl<'a> Call<'a> {
    /// A request below `/v2/<repository>/`.
    pub(crate) fn new(
        endpoint: &'a Endpoint,
        method: Method,
        path: &str,
        scopes: Scopes,
        doing: impl Into<String>,
    ) -> Self {
        Self {
            endpoint,
            method,
            target: Target::Api(format!("{}/{path}", endpoint.repository)),
            headers: HeaderMap::new(),
            body: None,
            scopes,
            doing: doing.into(),
            repeat: true,
            sent: None,
        }
    }
}

/// How an attempt ended that gave no answer.
pub(crate) enum Failure {
    /// The same may succeed later.
    Passing(RegistryError),
    Final(RegistryError),
}

impl From<RegistryError> for Failure {
    fn from(error: RegistryError) -> Self {
        Self::Final(error)
    }
}

#[derive(Default)]
pub(crate) struct State {
    pub(crate) clients: HashMap<(String, Mode), Client>,
    pub(crate) origins: HashMap<String, Origin>,
    pub(crate) challenges: HashMap<String, Challenge>,
    /// Hosts that have answered: a refused connection is then worth another attempt.
    pub(crate) contacted: HashSet<String>,
}

/// Sends requests; see the module.
pub(crate) struct Transport {
    pub(crate) config: Config,
    pub(crate) tokens: Tokens,
    state: Mutex<State>,
}

impl Transport {
    pub(crate) fn new(config: Config, helpers: Vec<String>) -> Self {
        // The process may have chosen a provider already; then that one is used.
        let _ = rustls::crypto::ring::default_provider().install_default();
        Self { tokens: Tokens::new(helpers), config, state: Mutex::default() }
    }

    pub(crate) fn state<T>(&self, with: impl FnOnce(&mut State) -> T) -> T {
        with(&mut self.state.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Sends `call`, as often as it takes. Any answer that is not worth another attempt is given back, also
    /// 404; only 401 and 403 are errors here.
    pub(crate) async fn send(&self, call: &Call<'_>) -> Result<Response> {
        let mut retry = Retry::new(if call.repeat { self.config.retries() } else { 0 });
        loop {
            let (error, asked) = match self.attempt(call).await {
                Ok(response) if retry::is_transient(response.status().as_u16()) => {
                    let asked = answer::retry_after(response.headers());
                    (self.refusal(call, response).await, asked)
                }
                Ok(response)
                    if matches!(response.status(), StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN) =>
                {
                    return Err(self.refusal(call, response).await);
                }
                Ok(response) => return Ok(response),
                Err(Failure::Final(error)) => return Err(error),
                Err(Failure::Passing(error)) => (error, None),
            };
            match retry.failed(asked) {
                Some(pause) => {
                    tracing::debug!(%error, ?pause, "trying again");
                    tokio::time::sleep(pause).await;
                }
                None => return Err(with_attempts(error, retry.attempts())),
            }
        }
    }

    /// Sends `call` and reads its whole answer, at most `limit` bytes.
    pub(crate) async fn fetch(
        &self,
        call: &Call<'_>,
        limit: u64,
        what: &'static str,
        name: &str,
    ) -> Result<(StatusCode, HeaderMap, Bytes)> {
        let mut retry = Retry::new(if call.repeat { self.config.retries() } else { 0 });
        loop {
            let response = self.send(call).await?;
            let (status, headers) = (response.status(), response.headers().clone());
            match self.body(call, response, limit).await {
                Ok(Some(body)) => return Ok((status, headers, body)),
                Ok(None) => {
                    let size = headers.get(CONTENT_LENGTH).and_then(|size| size.to_str().ok()?.parse().ok());
                    return Err(RegistryError::TooLarge { what, name: name.into(), size, limit });
                }
                Err(error) => match retry.failed(None) {
                    Some(pause) => tokio::time::sleep(pause).await,
                    None => return Err(with_attempts(error, retry.attempts())),
                },
            }
        }
    }

    /// `None` if there is more than `limit`.
    async fn body(&self, call: &Call<'_>, mut response: Response, limit: u64) -> Result<Option<Bytes>> {
        if response.content_length().is_some_and(|length| length > limit) {
            return Ok(None);
        }
        let mut body = BytesMut::new();
        while let Some(chunk) = self.chunk(&mut response, &call.doing, &call.endpoint.host).await? {
            if (body.len() + chunk.len()) as u64 > limit {
                return Ok(None);
            }
            body.extend_from_slice(&chunk);
        }
        Ok(Some(body.freeze()))
    }

    /// The next bytes of an answer; an error if none come for too long.
    pub(crate) async fn chunk(
        &self,
        response: &mut Response,
        doing: &str,
        host: &str,
    ) -> Result<Option<Bytes>> {
        let idle = self.config.idle_timeout();
        match tokio::time::timeout(idle, response.chunk()).await {
            Ok(Ok(chunk)) => Ok(chunk),
            Ok(Err(error)) => Err(unreachable(doing, host, &error)),
            Err(_) => Err(RegistryError::TimedOut {
                doing: doing.into(),
                registry: host.into(),
                waited: idle,
                attempts: 1,
            }),
        }
    }

    /// The error that an answer without success means.
    pub(crate) async fn refusal(&self, call: &Call<'_>, response: Response) -> RegistryError {
        let status = response.status().as_u16();
        let registry = call.endpoint.registry.clone();
        let asked = answer::retry_after(response.headers());
        let body = self.body(call, response, ERROR_BODY).await.ok().flatten().unwrap_or_default();
        let message = answer::message(&body);
        let doing = call.doing.clone();
        match status {
            401 | 403 => RegistryError::Denied {
                doing,
                registry,
                repository: call.endpoint.repository.clone(),
                reason: message,
                with_credentials: self.tokens.has_credentials(&self.config, call.endpoint),
            },
            429 => RegistryError::RateLimited { doing, registry, retry_after: asked },
            _ => RegistryError::Status { doing, registry, status, message },
        }
    }

    /// One request with its authorisation and redirects.
    async fn attempt(&self, call: &Call<'_>) -> std::result::Result<Response, Failure> {
        let host = &call.endpoint.host;
        let origin = self.origin(call.endpoint, &call.doing).await?;
        let url = match &call.target {
            Target::Url(url) => url.clone(),
            Target::Api(path) => {
                origin.base.join(&format!("/v2/{path}")).map_err(|error| RegistryError::Unreachable {
                    doing: call.doing.clone(),
                    registry: host.clone(),
                    reason: error.to_string(),
                })?
            }
        };
        let mut authorization = None;
        if let Some(challenge) = self.state(|state| state.challenges.get(host).cloned()) {
            authorization = self.tokens.authorization(self, call, &challenge, false).await?;
        }
        let mut fresh = false;
        loop {
            let response = self.follow(call, &origin, url.clone(), authorization.as_ref()).await?;
            let ours = same_origin(response.url(), &origin.base);
            if response.status() != StatusCode::UNAUTHORIZED || fresh || !ours {
                return Ok(response);
            }
            let Some(challenge) = Challenge::of(response.headers()) else { return Ok(response) };
            self.state(|state| state.challenges.insert(host.clone(), challenge.clone()));
            authorization = self.tokens.authorization(self, call, &challenge, true).await?;
            if authorization.is_none() {
                return Ok(response);
            }
            fresh = true;
        }
    }

    async fn follow(
        &self,
        call: &Call<'_>,
        origin: &Origin,
        mut url: Url,
        authorization: Option<&HeaderValue>,
    ) -> std::result::Result<Response, Failure> {
        let insecure = call.endpoint.insecure || self.config.insecure;
        for _ in 0..=REDIRECTS {
            let host = host_of(&url);
            let mode = if url.scheme() == "http" {
                Mode::Plain
            } else if self.config.insecure || same_origin(&url, &origin.base) {
                if origin.mode == Mode::Plain { Mode::Verified } else { origin.mode }
            } else {
                Mode::Verified
            };
            let client = self.client(&host, mode)?;
            let mut request = client.request(call.method.clone(), url.clone()).headers(call.headers.clone());
            if let Some(authorization) = authorization.filter(|_| same_origin(&url, &origin.base)) {
                request = request.header(AUTHORIZATION, authorization.clone());
            }
            let response = self.timed(call, request, &host).await?;
            let get = matches!(call.method, Method::GET | Method::HEAD);
            let redirect = match response.status().as_u16() {
                301..=303 => get,
                307 | 308 => true,
                _ => false,
            };
            let location = response.headers().get(LOCATION).and_then(|location| location.to_str().ok());
            let Some(location) = location.filter(|_| redirect) else { return Ok(response) };
            let refuse = |reason: String| {
                Failure::Final(RegistryError::Unreachable {
                    doing: call.doing.clone(),
                    registry: host.clone(),
                    reason,
                })
            };
            let next =
                url.join(location).map_err(|error| refuse(format!("it redirects to no URL: {error}")))?;
            if !matches!(next.scheme(), "http" | "https")
                || (url.scheme() == "https" && next.scheme() == "http" && !insecure)
            {
                return Err(refuse(format!(
                    "it redirects from HTTPS to `{}`",
                    answer::printable(next.scheme())
                )));
            }
            url = next;
        }
        Err(Failure::Final(RegistryError::Unreachable {
            doing: call.doing.clone(),
            registry: call.endpoint.host.clone(),
            reason: format!("more than {REDIRECTS} redirects"),
        }))
    }

    /// Sends one request; the clock starts anew with every slice of the body that was taken.
    async fn timed(
        &self,
        call: &Call<'_>,
        request: reqwest::RequestBuilder,
        host: &str,
    ) -> std::result::Result<Response, Failure> {
        let taken = Arc::new(AtomicU64::new(0));
        let request = match &call.body {
            Some(body) => {
                request.header(CONTENT_LENGTH, body.length()).body(counted(body.clone(), taken.clone()))
            }
            None => request,
        };
        let idle = self.config.idle_timeout();
        let mut sending = std::pin::pin!(request.send());
        let (mut told, mut since) = (0, Instant::now());
        loop {
            let tick = TICK.min(idle);
            let outcome = tokio::time::timeout(tick, &mut sending).await;
            let now = taken.load(Ordering::Relaxed);
            if now > told {
                if let Some(sent) = call.sent {
                    sent(now - told);
                }
                (told, since) = (now, Instant::now());
            }
            match outcome {
                Ok(Ok(response)) => {
                    self.state(|state| state.contacted.insert(host.to_owned()));
                    return Ok(response);
                }
                Ok(Err(error)) => return Err(self.failure(&call.doing, host, &error)),
                Err(_) if since.elapsed() < idle => {}
                Err(_) => {
                    return Err(Failure::Passing(RegistryError::TimedOut {
                        doing: call.doing.clone(),
                        registry: host.to_owned(),
                        waited: idle,
                        attempts: 1,
                    }));
                }
            }
        }
    }

    /// Where an upload goes on: relative locations are allowed.
    pub(crate) fn absolute(&self, endpoint: &Endpoint, location: &str) -> Option<Url> {
        let base = self.state(|state| state.origins.get(&endpoint.host).map(|origin| origin.base.clone()))?;
        base.join(location).ok()
    }
}

/// The body in slices, each counted when it is taken to be sent.
fn counted(payload: Payload, taken: Arc<AtomicU64>) -> Body {
    let slices = futures_util::stream::unfold(0, move |at| {
        let (taken, payload) = (taken.clone(), payload.clone());
        async move {
            if at >= payload.length() {
                return None;
            }
            let slice = payload.slice(at).await;
            let length = slice.as_ref().map_or(0, |slice| slice.len() as u64);
            taken.fetch_add(length, Ordering::Relaxed);
            Some((slice, at + length))
        }
    });
    Body::wrap_stream(slices)
}

pub(crate) fn host_of(url: &Url) -> String {
    let host = url.host_str().unwrap_or_default();
    url.port().map_or_else(|| host.to_owned(), |port| format!("{host}:{port}"))
}

pub(crate) fn same_origin(a: &Url, b: &Url) -> bool {
    a.scheme() == b.scheme()
        && a.host_str() == b.host_str()
        && a.port_or_known_default() == b.port_or_known_default()
}

pub(crate) fn unreachable(doing: &str, host: &str, error: &reqwest::Error) -> RegistryError {
    RegistryError::Unreachable {
        doing: doing.into(),
        registry: host.into(),
        reason: answer::printable(&innermost(error)),
    }
}

/// The cause at the bottom: `connection refused` instead of `error sending request`.
pub(crate) fn innermost(error: &reqwest::Error) -> String {
    let mut cause: &dyn std::error::Error = error;
    while let Some(source) = cause.source() {
        cause = source;
    }
    cause.to_string()
}

fn with_attempts(error: RegistryError, made: u32) -> RegistryError {
    match error {
        RegistryError::TimedOut { doing, registry, waited, .. } => {
            RegistryError::TimedOut { doing, registry, waited, attempts: made }
        }
        other => other,
    }
}
