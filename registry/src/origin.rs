//! How a host is spoken to: HTTPS or plain HTTP, with which certificates.

use std::error::Error as _;
use std::io;

use reqwest::{Client, StatusCode, Url};

use crate::certs::Certs;
use crate::challenge::Challenge;
use crate::endpoint::{self, Endpoint};
use crate::transport::{Failure, Transport, host_of, innermost, unreachable};
use crate::{RegistryError, Result, answer};

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Mode {
    Plain,
    Verified,
    Unverified,
}

/// Where a host's API is.
#[derive(Debug, Clone)]
pub(crate) struct Origin {
    pub(crate) base: Url,
    pub(crate) mode: Mode,
}

impl Transport {
    /// Where `endpoint`'s API is; asks the host once if that is not certain.
    pub(crate) async fn origin(
        &self,
        endpoint: &Endpoint,
        doing: &str,
    ) -> std::result::Result<Origin, Failure> {
        let host = &endpoint.host;
        if let Some(origin) = self.state(|state| state.origins.get(host).cloned()) {
            return Ok(origin);
        }
        let insecure = endpoint.insecure || self.config.insecure;
        let at = |mode: Mode| -> std::result::Result<Origin, Failure> {
            let scheme = if mode == Mode::Plain { "http" } else { "https" };
            let base =
                Url::parse(&format!("{scheme}://{host}/")).map_err(|error| RegistryError::Unreachable {
                    doing: doing.into(),
                    registry: host.clone(),
                    reason: error.to_string(),
                })?;
            Ok(Origin { base, mode })
        };
        let has_certs = !Certs::load(&self.config, host)?.authorities.is_empty();
        let origin = if insecure {
            // HTTPS first: whoever can be spoken to in private shall be.
            match self.probe(&at(Mode::Unverified)?, doing, host).await {
                Ok(_) => at(Mode::Unverified)?,
                Err(failure) => match self.probe(&at(Mode::Plain)?, doing, host).await {
                    Ok(_) => at(Mode::Plain)?,
                    Err(_) => return Err(failure),
                },
            }
        } else if endpoint.is_loopback() && !has_certs {
            match self.probe(&at(Mode::Plain)?, doing, host).await {
                // What a TLS server says to plain HTTP: 400 (Go, nginx), or an alert that is no HTTP.
                Ok(StatusCode::BAD_REQUEST) | Err(Failure::Passing(RegistryError::Unreachable { .. })) => {
                    match self.probe(&at(Mode::Verified)?, doing, host).await {
                        Ok(_) => at(Mode::Verified)?,
                        Err(Failure::Final(error @ RegistryError::Tls { .. })) => {
                            return Err(Failure::Final(error));
                        }
                        Err(_) => at(Mode::Plain)?,
                    }
                }
                Ok(_) => at(Mode::Plain)?,
                Err(failure) => return Err(failure),
            }
        } else {
            at(Mode::Verified)?
        };
        self.state(|state| state.origins.insert(host.clone(), origin.clone()));
        Ok(origin)
    }

    /// Asks for `/v2/`; a 401 there tells already how to authorise.
    async fn probe(
        &self,
        origin: &Origin,
        doing: &str,
        host: &str,
    ) -> std::result::Result<StatusCode, Failure> {
        let url = origin.base.join("/v2/").map_err(|error| RegistryError::Unreachable {
            doing: doing.into(),
            registry: host.to_owned(),
            reason: error.to_string(),
        })?;
        let idle = self.config.idle_timeout();
        match tokio::time::timeout(idle, self.client(host, origin.mode)?.get(url).send()).await {
            Ok(Ok(response)) => {
                self.state(|state| state.contacted.insert(host.to_owned()));
                if let Some(challenge) = Challenge::of(response.headers())
                    .filter(|_| response.status() == StatusCode::UNAUTHORIZED)
                {
                    self.state(|state| state.challenges.insert(host.to_owned(), challenge));
                }
                Ok(response.status())
            }
            Ok(Err(error)) => Err(self.failure(doing, host, &error)),
            Err(_) => Err(Failure::Passing(RegistryError::TimedOut {
                doing: doing.into(),
                registry: host.to_owned(),
                waited: idle,
                attempts: 1,
            })),
        }
    }

    /// A client for one host: each may have certificates of its own.
    pub(crate) fn client(&self, host: &str, mode: Mode) -> Result<Client> {
        let key = (host.to_owned(), mode);
        if let Some(client) = self.state(|state| state.clients.get(&key).cloned()) {
            return Ok(client);
        }
        let builder = || {
            let builder = Client::builder()
                .user_agent(concat!("kiln/", env!("CARGO_PKG_VERSION")))
                .redirect(reqwest::redirect::Policy::none())
                .connect_timeout(self.config.idle_timeout())
                .tcp_nodelay(true);
            if endpoint::is_loopback(host) { builder.no_proxy() } else { builder }
        };
        let client = match mode {
            // No authorities: the system's need not be read for what is not encrypted.
            Mode::Plain => builder().tls_certs_only([]).build(),
            Mode::Verified | Mode::Unverified => {
                let certs = Certs::load(&self.config, host)?;
                let with_identity = || match &certs.identity {
                    Some(identity) => builder().identity(identity.clone()),
                    None => builder(),
                };
                if mode == Mode::Unverified {
                    with_identity().tls_danger_accept_invalid_certs(true).build()
                } else if certs.authorities.is_empty() {
                    with_identity().build()
                } else {
                    // A system without authorities of its own is no reason to fail when there are ours.
                    with_identity()
                        .tls_certs_merge(certs.authorities.clone())
                        .build()
                        .or_else(|_| with_identity().tls_certs_only(certs.authorities).build())
                }
            }
        };
        let client = client.map_err(|error| RegistryError::Tls {
            doing: "prepare a connection".into(),
            registry: host.into(),
            reason: answer::printable(&innermost(&error)),
        })?;
        self.state(|state| state.clients.insert(key, client.clone()));
        Ok(client)
    }

    /// A request outside of the registry's API: to its token server.
    pub(crate) fn outside(&self, url: &Url, endpoint: &Endpoint) -> Result<Client> {
        let insecure = self.config.insecure || endpoint.insecure;
        let plain = url.scheme() == "http";
        let registry_is_plain = self.state(|state| {
            state.origins.get(&endpoint.host).is_some_and(|origin| origin.mode == Mode::Plain)
        });
        if plain && !insecure && !registry_is_plain {
            return Err(RegistryError::Denied {
                doing: "get a token".into(),
                registry: endpoint.registry.clone(),
                repository: endpoint.repository.clone(),
                reason: format!("its token server `{}` is not encrypted", answer::printable(url.as_str())),
                with_credentials: false,
            });
        }
        let mode = if plain {
            Mode::Plain
        } else if insecure {
            Mode::Unverified
        } else {
            Mode::Verified
        };
        self.client(&host_of(url), mode)
    }

    pub(crate) fn failure(&self, doing: &str, host: &str, error: &reqwest::Error) -> Failure {
        if let Some(reason) = tls_error(error).filter(|error| !is_no_tls(error)) {
            return Failure::Final(RegistryError::Tls {
                doing: doing.into(),
                registry: host.into(),
                reason: answer::printable(&reason.to_string()),
            });
        }
        let refused = unreachable(doing, host, error);
        // A host that never answered is more likely misspelt than restarting.
        if error.is_connect() && !error.is_timeout() && !self.state(|state| state.contacted.contains(host)) {
            return Failure::Final(refused);
        }
        Failure::Passing(refused)
    }
}

/// The TLS error below a request's error.
fn tls_error(error: &reqwest::Error) -> Option<&rustls::Error> {
    let mut next = error.source();
    while let Some(cause) = next {
        if let Some(tls) = cause.downcast_ref::<rustls::Error>() {
            return Some(tls);
        }
        // An `io::Error` does not name what it wraps as its source, but the source of that.
        next = match cause.downcast_ref::<io::Error>().and_then(io::Error::get_ref) {
            Some(inner) => Some(inner),
            None => cause.source(),
        };
    }
    None
}

/// Whether the peer did not speak TLS at all.
fn is_no_tls(error: &rustls::Error) -> bool {
    matches!(error, rustls::Error::InvalidMessage(_))
}
