//! Credentials from where users already keep them (containers-auth.json(5), Docker's `config.json`).
//!
//! Files are asked in this order, and the first answer counts: `--authfile` or `$REGISTRY_AUTH_FILE` alone; else
//! `$XDG_RUNTIME_DIR/containers/auth.json` (`/run/containers/<uid>/auth.json`), `~/.config/containers/auth.json`,
//! `$DOCKER_CONFIG/config.json` (`~/.docker/config.json`). Within a file: the registry's own helper
//! (`credHelpers`), the most specific entry of `auths`, the helper for all (`credsStore`).

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::{Deserialize, Serialize};

use crate::config::{path_from_env, user_config_dir};
use crate::endpoint::Endpoint;
use crate::{Config, RegistryError, Result};

/// What Docker Hub is called in Docker's files and helpers.
const HUB_KEY: &str = "https://index.docker.io/v1/";

/// How to prove who one is.
#[derive(Clone, PartialEq, Eq)]
pub(crate) enum Credentials {
    Password {
        username: String,
        password: String,
    },
    /// A refresh token of an OAuth2 token server.
    Identity {
        token: String,
    },
}

impl fmt::Debug for Credentials {
    // Secrets are in no log and in no error.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Password { username, .. } => write!(f, "Password({username})"),
            Self::Identity { .. } => f.write_str("Identity"),
        }
    }
}

/// `auth.json` or `config.json`; what Kiln does not know is kept when it is written.
#[derive(Default, Deserialize, Serialize)]
pub(crate) struct AuthFile {
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub(crate) auths: BTreeMap<String, AuthEntry>,
    #[serde(default, rename = "credHelpers", skip_serializing_if = "BTreeMap::is_empty")]
    pub(crate) helpers: BTreeMap<String, String>,
    #[serde(default, rename = "credsStore", skip_serializing_if = "Option::is_none")]
    pub(crate) store: Option<String>,
    #[serde(flatten)]
    rest: BTreeMap<String, serde_json::Value>,
}

#[derive(Default, Clone, Deserialize, Serialize)]
pub(crate) struct AuthEntry {
    /// base64 of `user:password`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) auth: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    username: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    password: Option<String>,
    #[serde(default, rename = "identitytoken", skip_serializing_if = "Option::is_none")]
    identity_token: Option<String>,
    #[serde(flatten)]
    rest: BTreeMap<String, serde_json::Value>,
}

impl AuthEntry {
    pub(crate) fn of(username: &str, password: &str) -> Self {
        Self { auth: Some(STANDARD.encode(format!("{username}:{password}"))), ..Self::default() }
    }

    /// `None` if the entry is empty, as those are whose secret a helper keeps.
    fn credentials(&self) -> Option<std::result::Result<Credentials, &'static str>> {
        if let Some(token) = self.identity_token.as_ref().filter(|token| !token.is_empty()) {
            return Some(Ok(Credentials::Identity { token: token.clone() }));
        }
        if let Some(auth) = self.auth.as_ref().filter(|auth| !auth.is_empty()) {
            let decoded = STANDARD.decode(auth.trim()).ok().and_then(|bytes| String::from_utf8(bytes).ok());
            // Docker pads what it encodes with NULs.
            return Some(
                match decoded
                    .as_deref()
                    .map(|text| text.trim_end_matches('\0'))
                    .and_then(|text| text.split_once(':'))
                {
                    Some((username, password)) => {
                        Ok(Credentials::Password { username: username.into(), password: password.into() })
                    }
                    None => Err("an `auth` is not base64 of user:password"),
                },
            );
        }
        let (username, password) = (self.username.clone()?, self.password.clone()?);
        (!username.is_empty()).then_some(Ok(Credentials::Password { username, password }))
    }
}

impl AuthFile {
    /// `None` if there is no such file.
    pub(crate) fn load(path: &Path) -> Result<Option<Self>> {
        let text = match fs::read(path) {
            Ok(text) => text,
            Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
                return Ok(None);
            }
            Err(source) => return Err(RegistryError::Io { doing: "read", path: path.to_owned(), source }),
        };
        if text.iter().all(u8::is_ascii_whitespace) {
            return Ok(Some(Self::default()));
        }
        // serde_json's message may quote a value: only the place is told.
        serde_json::from_slice(&text).map(Some).map_err(|error| RegistryError::Config {
            path: path.to_owned(),
            reason: format!(
                "it is not a credentials file (line {}, column {})",
                error.line(),
                error.column()
            ),
        })
    }

    fn find(&self, path: &Path, endpoint: &Endpoint) -> Result<Option<Credentials>> {
        if let Some(helper) = self.helper_of(&endpoint.registry) {
            return ask_helper(helper, &server_name(&endpoint.registry));
        }
        for key in keys(endpoint) {
            let entry = self.auths.iter().find(|(name, _)| normal_key(name) == key).map(|(_, entry)| entry);
            match entry.and_then(AuthEntry::credentials) {
                Some(Ok(credentials)) => return Ok(Some(credentials)),
                Some(Err(reason)) => {
                    return Err(RegistryError::Config {
                        path: path.to_owned(),
                        reason: format!("`{key}`: {reason}"),
                    });
                }
                None => {}
            }
        }
        match &self.store {
            Some(helper) if !helper.is_empty() => ask_helper(helper, &server_name(&endpoint.registry)),
            _ => Ok(None),
        }
    }

    fn helper_of(&self, registry: &str) -> Option<&str> {
        let found = self.helpers.iter().find(|(name, _)| normal_key(name) == registry);
        found.map(|(_, helper)| helper.as_str()).filter(|helper| !helper.is_empty())
    }

    /// The helper that keeps the secrets of `registry`, if it is not this file.
    pub(crate) fn helper_for_writing(&self, registry: &str) -> Option<&str> {
        self.helper_of(registry).or(self.store.as_deref()).filter(|helper| !helper.is_empty())
    }
}

/// The names under which an endpoint's credentials may stand, the most specific first.
fn keys(endpoint: &Endpoint) -> Vec<String> {
    let mut keys = Vec::new();
    let mut name = endpoint.full_name();
    loop {
        keys.push(name.clone());
        match name.rfind('/') {
            Some(slash) => name.truncate(slash),
            None => return keys,
        }
    }
}

/// A key as the files have it (perhaps a URL) in the form of [`keys`].
pub(crate) fn normal_key(key: &str) -> String {
    let bare = key.strip_prefix("https://").or_else(|| key.strip_prefix("http://"));
    let key = match bare {
        // Docker's old URL keys name an API path; it is not a namespace.
        Some(url) => url.split('/').next().unwrap_or(url),
        None => key.trim_end_matches('/'),
    };
    match key.split_once('/') {
        Some(("index.docker.io" | "registry-1.docker.io", path)) => format!("docker.io/{path}"),
        None if matches!(key, "index.docker.io" | "registry-1.docker.io") => "docker.io".into(),
        _ => key.to_owned(),
    }
}

/// A registry's name as helpers know it.
pub(crate) fn server_name(registry: &str) -> String {
    if registry == "docker.io" { HUB_KEY.into() } else { registry.into() }
}

#[derive(Deserialize)]
struct HelperAnswer {
    #[serde(rename = "Username", default)]
    username: String,
    #[serde(rename = "Secret", default)]
    secret: String,
}

/// Runs `docker-credential-<helper> <verb>` with `input` (docker/docker-credential-helpers' protocol).
pub(crate) fn run_helper(
    helper: &str,
    verb: &str,
    input: &str,
) -> Result<std::result::Result<Vec<u8>, String>> {
    let program = format!("docker-credential-{helper}");
    let failed = |reason: String| RegistryError::CredentialHelper { helper: program.clone(), reason };
    if helper.contains('/') {
        return Err(failed("its name must not contain a slash".into()));
    }
    let mut child = Command::new(&program)
        .arg(verb)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .map_err(|error| failed(error.to_string()))?;
    if let Some(mut stdin) = child.stdin.take() {
        // A helper that does not read its input has said what it has to say by its exit code.
        let _ = stdin.write_all(input.as_bytes());
    }
    let output = child.wait_with_output().map_err(|error| failed(error.to_string()))?;
    if output.status.success() {
        return Ok(Ok(output.stdout));
    }
    Ok(Err(String::from_utf8_lossy(&output.stdout).trim().to_owned()))
}

fn ask_helper(helper: &str, server: &str) -> Result<Option<Credentials>> {
    let failed = |reason: String| RegistryError::CredentialHelper {
        helper: format!("docker-credential-{helper}"),
        reason,
    };
    match run_helper(helper, "get", server)? {
        Ok(output) => {
            let answer: HelperAnswer =
                serde_json::from_slice(&output).map_err(|_| failed("its answer is not JSON".into()))?;
            Ok(match (answer.username.as_str(), answer.secret) {
                (_, secret) if secret.is_empty() => None,
                ("<token>", token) => Some(Credentials::Identity { token }),
                (username, password) => Some(Credentials::Password { username: username.into(), password }),
            })
        }
        Err(message) if message.contains("not found") => Ok(None),
        Err(message) => Err(failed(message)),
    }
}

/// Finds the credentials of an endpoint. A helper that cannot be run is no obstacle to what needs no
/// credentials: its error is given beside what was found.
pub(crate) fn find(
    config: &Config,
    helpers: &[String],
    endpoint: &Endpoint,
) -> Result<(Option<Credentials>, Option<String>)> {
    let mut problem = None;
    let mut note = |error: RegistryError| -> Result<()> {
        match error {
            RegistryError::CredentialHelper { .. } => {
                problem = Some(error.to_string());
                Ok(())
            }
            other => Err(other),
        }
    };
    for path in files_to_read(config)? {
        match AuthFile::load(&path)?.map(|file| file.find(&path, endpoint)) {
            Some(Ok(Some(credentials))) => return Ok((Some(credentials), None)),
            Some(Err(error)) => note(error)?,
            Some(Ok(None)) | None => {}
        }
    }
    for helper in helpers.iter().filter(|helper| *helper != "containers-auth.json") {
        match ask_helper(helper, &server_name(&endpoint.registry)) {
            Ok(Some(credentials)) => return Ok((Some(credentials), None)),
            Ok(None) => {}
            Err(error) => note(error)?,
        }
    }
    Ok((None, problem))
}

fn files_to_read(config: &Config) -> Result<Vec<PathBuf>> {
    if let Some(path) = explicit_file(config) {
        if !path.exists() {
            let source = io::Error::from(io::ErrorKind::NotFound);
            return Err(RegistryError::Io { doing: "read the credentials file", path, source });
        }
        return Ok(vec![path]);
    }
    let docker = path_from_env("DOCKER_CONFIG").or_else(|| Some(path_from_env("HOME")?.join(".docker")));
    let candidates = [
        Some(default_file()),
        user_config_dir().map(|dir| dir.join("containers/auth.json")),
        docker.map(|dir| dir.join("config.json")),
    ];
    Ok(candidates.into_iter().flatten().collect())
}

fn explicit_file(config: &Config) -> Option<PathBuf> {
    config.authfile.clone().or_else(|| path_from_env("REGISTRY_AUTH_FILE"))
}

/// Where a login is written to.
pub(crate) fn file_to_write(config: &Config) -> PathBuf {
    explicit_file(config).unwrap_or_else(default_file)
}

/// All files in which a login may be, for a logout.
pub(crate) fn files_to_clear(config: &Config) -> Result<Vec<PathBuf>> {
    files_to_read(config)
}

/// containers-auth.json(5): the runtime directory on Linux, the configuration directory elsewhere.
fn default_file() -> PathBuf {
    if cfg!(target_os = "linux") {
        let runtime = path_from_env("XDG_RUNTIME_DIR")
            .unwrap_or_else(|| format!("/run/containers/{}", rustix::process::getuid().as_raw()).into());
        // The fallback is itself named `containers`.
        return if runtime.starts_with("/run/containers") {
            runtime.join("auth.json")
        } else {
            runtime.join("containers/auth.json")
        };
    }
    user_config_dir().unwrap_or_else(|| "/".into()).join("containers/auth.json")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn find_in(text: &str, repository: &str) -> Option<Credentials> {
        let file: AuthFile = serde_json::from_str(text).unwrap();
        file.find(Path::new("auth.json"), &Endpoint::of_repository(repository, false)).unwrap()
    }

    fn password(user: &str) -> Option<Credentials> {
        Some(Credentials::Password { username: user.into(), password: "pw:x".into() })
    }

    #[test]
    fn the_most_specific_entry_counts() {
        let entry = |user: &str| STANDARD.encode(format!("{user}:pw:x"));
        let text = format!(
            r#"{{"auths": {{
                "example.com": {{"auth": "{}"}},
                "example.com/team": {{"auth": "{}"}},
                "example.com/team/app": {{"auth": "{}"}},
                "https://index.docker.io/v1/": {{"auth": "{}"}},
                "https://old.example.com/v2/": {{"username": "old", "password": "pw:x"}},
                "token.example.com": {{"identitytoken": "t0ken", "auth": "{}"}},
                "empty.example.com": {{}}
            }}}}"#,
            entry("all"),
            entry("team"),
            entry("app"),
            entry("hub"),
            entry("x")
        );
        for (repository, expected) in [
            ("example.com/x", password("all")),
            ("example.com/team/x", password("team")),
            ("example.com/team/app", password("app")),
            ("example.com/teams/app", password("all")),
            ("docker.io/library/alpine", password("hub")),
            ("old.example.com/a", password("old")),
            ("token.example.com/a", Some(Credentials::Identity { token: "t0ken".into() })),
            ("empty.example.com/a", None),
            ("other.example.com/a", None),
        ] {
            assert_eq!(find_in(&text, repository), expected, "{repository}");
        }
    }

    #[test]
    fn what_is_not_known_survives_a_rewrite() {
        let text = r#"{"auths":{"a.test":{"auth":"dTpw","email":"x@y"}},"HttpHeaders":{"X":"y"},"psFormat":"table"}"#;
        let file: AuthFile = serde_json::from_str(text).unwrap();
        let written: serde_json::Value = serde_json::to_value(&file).unwrap();
        assert_eq!(written, serde_json::from_str::<serde_json::Value>(text).unwrap());
    }

    #[test]
    fn a_damaged_file_is_told_without_its_secrets() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("auth.json");
        fs::write(&path, r#"{"auths": {"a.test": {"auth": "c2VjcmV0OnNlY3JldA==" "#).unwrap();
        let error = AuthFile::load(&path).map(|_| ()).unwrap_err().to_string();
        assert!(error.contains("auth.json") && !error.contains("c2Vj"), "{error}");
        let shown = format!("{:?}", password("me").unwrap());
        assert!(!shown.contains("pw"), "{shown}");
    }
}
