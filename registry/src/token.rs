//! Tokens and passwords for requests (distribution token authentication; OAuth2 refresh tokens).

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use reqwest::Url;
use reqwest::header::{AUTHORIZATION, CONTENT_TYPE, HeaderValue};
use serde::Deserialize;

use crate::challenge::{Challenge, Scopes};
use crate::credentials::{self, Credentials};
use crate::endpoint::Endpoint;
use crate::retry::{self, Retry};
use crate::transport::{Call, Transport};
use crate::{Config, RegistryError, Result, answer};

/// A token server's answer is a few kilobytes; more is not read.
const ANSWER: usize = 1 << 20;

struct Token {
    header: HeaderValue,
    until: Instant,
}

type Found = (Option<Credentials>, Option<String>);

/// Credentials and tokens, as long as they last.
pub(crate) struct Tokens {
    helpers: Vec<String>,
    tokens: Mutex<HashMap<String, Token>>,
    credentials: Mutex<HashMap<String, Found>>,
    /// Given on the command line, for a login: asked before all files.
    given: Mutex<Option<Credentials>>,
}

#[derive(Deserialize)]
struct TokenAnswer {
    token: Option<String>,
    access_token: Option<String>,
    expires_in: Option<u64>,
}

impl Tokens {
    pub(crate) fn new(helpers: Vec<String>) -> Self {
        Self { helpers, tokens: Mutex::default(), credentials: Mutex::default(), given: Mutex::default() }
    }

    /// Uses `credentials` for everything.
    pub(crate) fn give(&self, credentials: Credentials) {
        *self.given.lock().unwrap_or_else(PoisonError::into_inner) = Some(credentials);
    }

    fn credentials(&self, config: &Config, endpoint: &Endpoint) -> Result<Found> {
        if let Some(given) = self.given.lock().unwrap_or_else(PoisonError::into_inner).clone() {
            return Ok((Some(given), None));
        }
        let key = endpoint.full_name();
        if let Some(found) = self.credentials.lock().unwrap_or_else(PoisonError::into_inner).get(&key) {
            return Ok(found.clone());
        }
        let found = credentials::find(config, &self.helpers, endpoint)?;
        if let Some(problem) = &found.1 {
            tracing::warn!("{problem}");
        }
        self.credentials.lock().unwrap_or_else(PoisonError::into_inner).insert(key, found.clone());
        Ok(found)
    }

    pub(crate) fn has_credentials(&self, config: &Config, endpoint: &Endpoint) -> bool {
        self.credentials(config, endpoint).is_ok_and(|(found, _)| found.is_some())
    }

    /// The `Authorization` header for `call`; `None` if there are no credentials and the registry takes nothing
    /// else. `refused`: the registry did not accept what it got, a kept token is of no use.
    pub(crate) async fn authorization(
        &self,
        transport: &Transport,
        call: &Call<'_>,
        challenge: &Challenge,
        refused: bool,
    ) -> Result<Option<HeaderValue>> {
        match challenge {
            Challenge::Basic => match self.credentials(&transport.config, call.endpoint)?.0 {
                Some(Credentials::Password { username, password }) => Ok(Some(basic(&username, &password))),
                // An identity token is of no use without a token server.
                Some(Credentials::Identity { .. }) | None => Ok(None),
            },
            Challenge::Bearer { realm, service, scope } => {
                // The challenge's scope is of the request that it answered: of this one only if it is fresh.
                let scopes =
                    if refused { call.scopes.and_challenged(scope.as_deref()) } else { call.scopes.clone() };
                let key = format!(
                    "{}\n{realm}\n{}\n{}",
                    call.endpoint.host,
                    service.as_deref().unwrap_or_default(),
                    call.scopes.key()
                );
                if !refused {
                    let tokens = self.tokens.lock().unwrap_or_else(PoisonError::into_inner);
                    if let Some(token) = tokens.get(&key).filter(|token| token.until > Instant::now()) {
                        return Ok(Some(token.header.clone()));
                    }
                }
                let token = self.fetch(transport, call, realm, service.as_deref(), &scopes).await?;
                let header = token.header.clone();
                self.tokens.lock().unwrap_or_else(PoisonError::into_inner).insert(key, token);
                Ok(Some(header))
            }
        }
    }

    async fn fetch(
        &self,
        transport: &Transport,
        call: &Call<'_>,
        realm: &str,
        service: Option<&str>,
        scopes: &Scopes,
    ) -> Result<Token> {
        let (found, problem) = self.credentials(&transport.config, call.endpoint)?;
        let denied = |reason: String| RegistryError::Denied {
            doing: call.doing.clone(),
            registry: call.endpoint.registry.clone(),
            repository: call.endpoint.repository.clone(),
            reason: match &problem {
                Some(problem) => format!("{reason}; {problem}"),
                None => reason,
            },
            with_credentials: found.is_some(),
        };
        let mut url = Url::parse(realm)
            .map_err(|_| denied(format!("its token server `{}` is no URL", answer::printable(realm))))?;
        let client = transport.outside(&url, call.endpoint)?;
        let mut form = Vec::new();
        if let Some(service) = service {
            form.push(("service", service));
        }
        let request = if let Some(Credentials::Identity { token }) = &found {
            let all = scopes.key();
            form.extend([
                ("grant_type", "refresh_token"),
                ("client_id", "kiln"),
                ("refresh_token", token.as_str()),
                ("scope", all.as_str()),
            ]);
            // The same encoding as a query's.
            let body = Url::parse_with_params("http://form/", &form)
                .ok()
                .and_then(|url| url.query().map(str::to_owned));
            client
                .post(url)
                .header(CONTENT_TYPE, "application/x-www-form-urlencoded")
                .body(body.unwrap_or_default())
        } else {
            form.extend(scopes.iter().map(|scope| ("scope", scope)));
            if let Some(Credentials::Password { username, .. }) = &found {
                form.push(("account", username));
            }
            url.query_pairs_mut().extend_pairs(form);
            let request = client.get(url);
            match &found {
                Some(Credentials::Password { username, password }) => {
                    request.header(AUTHORIZATION, basic(username, password))
                }
                _ => request,
            }
        };
        let idle = transport.config.idle_timeout();
        let mut retry = Retry::new(transport.config.retries());
        let asked = Instant::now();
        let body = loop {
            let Some(request) = request.try_clone() else {
                return Err(denied("the token request cannot be repeated".into()));
            };
            let outcome = tokio::time::timeout(idle, async {
                let response = request.send().await?;
                let (status, after) = (response.status().as_u16(), answer::retry_after(response.headers()));
                Ok::<_, reqwest::Error>((status, after, limited(response).await?))
            });
            let (reason, after) = match outcome.await {
                Ok(Ok((200..=299, _, body))) => break body,
                Ok(Ok((status, after, body))) if retry::is_transient(status) => {
                    (format!("its token server answered {status} {}", answer::message(&body)), after)
                }
                Ok(Ok((status, _, body))) => {
                    let message = answer::message(&body);
                    return Err(denied(if message.is_empty() {
                        format!("its token server answered {status}")
                    } else {
                        message
                    }));
                }
                // The error itself may contain the URL, but that holds no secret.
                Ok(Err(error)) => (
                    format!("its token server cannot be reached: {}", answer::printable(&error.to_string())),
                    None,
                ),
                Err(_) => ("its token server does not answer".into(), None),
            };
            match retry.failed(after) {
                Some(pause) => tokio::time::sleep(pause).await,
                None => return Err(denied(reason)),
            }
        };
        let parsed: TokenAnswer = serde_json::from_slice(&body)
            .map_err(|_| denied("its token server's answer cannot be read".into()))?;
        let token =
            parsed.token.filter(|token| !token.is_empty()).or(parsed.access_token).unwrap_or_default();
        let mut header = HeaderValue::from_str(&format!("Bearer {token}"))
            .map_err(|_| denied("its token server's token cannot be used".into()))?;
        header.set_sensitive(true);
        // A token without a term lasts a minute (distribution token specification); a tenth is left for the way.
        let lasts = Duration::from_secs(parsed.expires_in.unwrap_or(60).clamp(10, 86_400)).mul_f64(0.9);
        Ok(Token { header, until: asked + lasts })
    }
}

async fn limited(mut response: reqwest::Response) -> std::result::Result<bytes::Bytes, reqwest::Error> {
    let mut body = bytes::BytesMut::new();
    while let Some(chunk) = response.chunk().await? {
        body.extend_from_slice(&chunk[..chunk.len().min(ANSWER - body.len())]);
        if body.len() == ANSWER {
            break;
        }
    }
    Ok(body.freeze())
}

fn basic(username: &str, password: &str) -> HeaderValue {
    let mut header =
        HeaderValue::from_str(&format!("Basic {}", STANDARD.encode(format!("{username}:{password}"))))
            .unwrap_or_else(|_| HeaderValue::from_static(""));
    header.set_sensitive(true);
    header
}
