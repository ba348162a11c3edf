//! One place from which a repository can be had.

use std::net::IpAddr;

/// A repository at a host that speaks the distribution protocol.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Endpoint {
    /// Host and port, as requests go to it.
    pub(crate) host: String,
    /// Repository without the registry.
    pub(crate) repository: String,
    /// Certificates are not checked and plain HTTP is accepted.
    pub(crate) insecure: bool,
    /// The registry as users and credential files name it: `docker.io`, where `host` is
    /// `registry-1.docker.io`.
    pub(crate) registry: String,
}

impl Endpoint {
    /// The endpoint of `registry/path`.
    pub(crate) fn of_repository(repository: &str, insecure: bool) -> Self {
        let (registry, path) = repository.split_once('/').unwrap_or((repository, ""));
        Self::new(registry, path, insecure)
    }

    /// The endpoint of `path` (may be empty: the registry itself) in `registry`.
    pub(crate) fn new(registry: &str, path: &str, insecure: bool) -> Self {
        let hub = matches!(registry, "docker.io" | "index.docker.io" | "registry-1.docker.io");
        Self {
            host: if hub { "registry-1.docker.io".into() } else { registry.to_owned() },
            repository: path.to_owned(),
            insecure,
            registry: if hub { "docker.io".into() } else { registry.to_owned() },
        }
    }

    /// Registry and repository, as namespaced credentials are looked up.
    pub(crate) fn full_name(&self) -> String {
        if self.repository.is_empty() {
            self.registry.clone()
        } else {
            format!("{}/{}", self.registry, self.repository)
        }
    }

    /// Whether the host is this machine: plain HTTP is then accepted, as Docker does.
    pub(crate) fn is_loopback(&self) -> bool {
        is_loopback(&self.host)
    }
}

/// Whether `host[:port]` is this machine.
pub(crate) fn is_loopback(host: &str) -> bool {
    let name = match host.strip_prefix('[') {
        Some(rest) => rest.split(']').next().unwrap_or(rest),
        None => host.split(':').next().unwrap_or(host),
    };
    name == "localhost" || name.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_this_machine_is_loopback() {
        for (host, expected) in [
            ("localhost", true),
            ("localhost:5000", true),
            ("127.0.0.1:80", true),
            ("127.9.9.9", true),
            ("[::1]:5000", true),
            ("localhost.example.com", false),
            ("127.0.0.1.example.com", false),
            ("10.0.0.1:5000", false),
            ("docker.io", false),
        ] {
            assert_eq!(is_loopback(host), expected, "{host}");
        }
    }

    #[test]
    fn docker_hub_has_another_host_than_name() {
        let hub = Endpoint::of_repository("docker.io/library/alpine", false);
        assert_eq!(
            (hub.host.as_str(), hub.full_name().as_str()),
            ("registry-1.docker.io", "docker.io/library/alpine")
        );
    }
}
