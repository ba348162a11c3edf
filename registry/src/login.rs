//! Logging in to a registry and out of it.

use std::fs::{self, Permissions};
use std::io::Write as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use reqwest::{Method, StatusCode};

use crate::challenge::Scopes;
use crate::credentials::{self, AuthEntry, AuthFile, Credentials};
use crate::endpoint::Endpoint;
use crate::registries_conf::RegistriesConf;
use crate::transport::{Call, Target, Transport};
use crate::{Registry, RegistryError, Result};

impl Registry {
    /// Checks a user's password with `registry` (`docker.io`, `localhost:5000`) and keeps it where containers-auth.json(5) says, or
    /// with the credential helper that the file names. Gives the file.
    ///
    /// # Errors
    /// [`RegistryError::Denied`] if the registry does not accept it; then nothing is kept.
    pub fn login(&self, registry: &str, username: &str, password: &str) -> Result<PathBuf> {
        let conf = RegistriesConf::load(self.config())?;
        let endpoint = conf.push_endpoint(registry)?;
        // A transport of its own: these credentials and no others.
        let transport = Transport::new(self.config().clone(), Vec::new());
        transport.tokens.give(Credentials::Password { username: username.into(), password: password.into() });
        let session = self.session()?;
        session.runtime.block_on(verify(&transport, &endpoint))?;
        let path = credentials::file_to_write(self.config());
        let mut file = AuthFile::load(&path)?.unwrap_or_default();
        let key = endpoint.full_name();
        if let Some(helper) = file.helper_for_writing(&endpoint.registry) {
            let record = serde_json::json!({
                "ServerURL": credentials::server_name(&endpoint.registry), "Username": username, "Secret": password,
            });
            tell_helper(helper, "store", &record.to_string())?;
            file.auths.insert(key, AuthEntry::default());
        } else {
            file.auths.retain(|name, _| credentials::normal_key(name) != key);
            file.auths.insert(key, AuthEntry::of(username, password));
        }
        write(&path, &file)?;
        Ok(path)
    }

    /// Forgets the credentials of `registry`. Whether there were any.
    ///
    /// # Errors
    /// A credentials file that cannot be read or written, a helper that fails.
    pub fn logout(&self, registry: &str) -> Result<bool> {
        let endpoint = Endpoint::of_repository(registry, false);
        let key = endpoint.full_name();
        let mut found = false;
        for path in credentials::files_to_clear(self.config())? {
            let Some(mut file) = AuthFile::load(&path)? else { continue };
            let before = file.auths.len();
            file.auths.retain(|name, _| credentials::normal_key(name) != key);
            let removed = file.auths.len() < before;
            if let Some(helper) = file.helper_for_writing(&endpoint.registry).filter(|_| removed) {
                tell_helper(helper, "erase", &credentials::server_name(&endpoint.registry))?;
            }
            if removed {
                write(&path, &file)?;
                found = true;
            }
        }
        Ok(found)
    }
}

async fn verify(transport: &Transport, endpoint: &Endpoint) -> Result<()> {
    let mut call =
        Call::new(endpoint, Method::GET, "", Scopes::default(), format!("log in to {}", endpoint.registry));
    call.target = Target::Api(String::new());
    let response = transport.send(&call).await?;
    match response.status() {
        StatusCode::OK => Ok(()),
        _ => Err(transport.refusal(&call, response).await),
    }
}

fn tell_helper(helper: &str, verb: &str, input: &str) -> Result<()> {
    credentials::run_helper(helper, verb, input)?.map(|_| ()).map_err(|reason| {
        RegistryError::CredentialHelper { helper: format!("docker-credential-{helper}"), reason }
    })
}

/// Replaces the file in one step; only its owner may read it.
fn write(path: &Path, file: &AuthFile) -> Result<()> {
    let failed = |source| RegistryError::Io { doing: "write", path: path.to_owned(), source };
    // What a link points to is replaced, not the link.
    let path = fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
    let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
    fs::create_dir_all(dir).map_err(failed)?;
    let mut temporary = tempfile::Builder::new()
        .permissions(Permissions::from_mode(0o600))
        .tempfile_in(dir)
        .map_err(failed)?;
    let mut text = serde_json::to_vec_pretty(file).map_err(|error| failed(error.into()))?;
    text.push(b'\n');
    temporary.write_all(&text).and_then(|()| temporary.as_file().sync_all()).map_err(failed)?;
    temporary.persist(&path).map_err(|error| failed(error.error))?;
    Ok(())
}
