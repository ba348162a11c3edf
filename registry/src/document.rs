//! Manifests, indexes and configs as a registry sends them. Their digests are for the caller to check.

use bytes::Bytes;
use kiln_contract::Digest;
use reqwest::header::{ACCEPT, HeaderMap, HeaderValue};
use reqwest::{Method, StatusCode};

use crate::challenge::Scopes;
use crate::endpoint::Endpoint;
use crate::manifest::{self, CONFIG_LIMIT, MANIFEST_LIMIT};
use crate::transport::{Call, Transport};
use crate::{RegistryError, Result, answer};

/// The manifest or index that `reference`, a tag or a digest, leads to. `name` is for errors.
pub(crate) async fn manifest(
    transport: &Transport,
    endpoint: &Endpoint,
    reference: &str,
    name: &str,
) -> Result<(HeaderMap, Bytes)> {
    let path = format!("manifests/{reference}");
    let doing = format!("read the manifest of `{name}`");
    let mut call = Call::new(endpoint, Method::GET, &path, Scopes::pull(&endpoint.repository), doing);
    let accept = HeaderValue::from_str(&manifest::ACCEPT.join(", "));
    call.headers.insert(ACCEPT, accept.unwrap_or_else(|_| unreachable!("media types are a header's value")));
    fetch(transport, call, MANIFEST_LIMIT, "manifest", name).await
}

/// The config with this digest, whose size is not known.
pub(crate) async fn config(
    transport: &Transport,
    endpoint: &Endpoint,
    digest: &Digest,
    name: &str,
) -> Result<(HeaderMap, Bytes)> {
    let path = format!("blobs/{digest}");
    let doing = format!("read the config of `{name}`");
    let call = Call::new(endpoint, Method::GET, &path, Scopes::pull(&endpoint.repository), doing);
    fetch(transport, call, CONFIG_LIMIT, "config", name).await
}

async fn fetch(
    transport: &Transport,
    call: Call<'_>,
    limit: u64,
    what: &'static str,
    name: &str,
) -> Result<(HeaderMap, Bytes)> {
    let (status, headers, bytes) = transport.fetch(&call, limit, what, name).await?;
    match status {
        StatusCode::OK => Ok((headers, bytes)),
        StatusCode::NOT_FOUND => {
            Err(RegistryError::NotFound { name: name.to_owned(), registry: call.endpoint.host.clone() })
        }
        _ => Err(RegistryError::Status {
            doing: call.doing,
            registry: call.endpoint.registry.clone(),
            status: status.as_u16(),
            message: answer::message(&bytes),
        }),
    }
}
