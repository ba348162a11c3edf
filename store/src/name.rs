//! Names of images, by Docker's rules (`distribution/reference`).

use std::fmt;

use kiln_contract::Digest;

use crate::{Result, StoreError};

const DEFAULT_REGISTRY: &str = "docker.io";
const DEFAULT_NAMESPACE: &str = "library/";
const DEFAULT_TAG: &str = "latest";

/// A name in its normal form: `docker.io/library/alpine:3.20`, `localhost:5000/a/b:latest`; `me/dev:1` is
/// `docker.io/me/dev:1`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ImageName {
    /// With the registry.
    pub repository: String,
    /// The tag.
    pub tag: Option<String>,
    /// The digest of a manifest or index.
    pub digest: Option<Digest>,
}

impl ImageName {
    /// Reads a name as Docker does: without a registry it is one of `docker.io`, without a tag and digest it has the
    /// tag `latest`.
    ///
    /// # Errors
    /// [`StoreError::BadName`] says what is wrong.
    pub fn parse(text: &str) -> Result<Self> {
        let bad = |why| StoreError::BadName { text: text.chars().take(300).collect(), why };
        let (rest, digest) = match text.split_once('@') {
            Some((rest, digest)) => {
                let digest = digest
                    .parse()
                    .map_err(|_| bad("its digest is not sha256: and 64 lower-case hex digits"))?;
                (rest, Some(digest))
            }
            None => (text, None),
        };
        let (rest, tag) = match rest.rsplit_once(':') {
            // A colon before the last slash is that of a port.
            Some((rest, tag)) if !tag.contains('/') => (rest, Some(tag)),
            _ => (rest, None),
        };
        if tag.is_some_and(|tag| !is_tag(tag)) {
            return Err(bad(
                "a tag has up to 128 letters, digits, `_`, `.` and `-`, and begins with none of the last two",
            ));
        }
        let (registry, path) = match rest.split_once('/') {
            Some((first, path)) if is_registry(first) => (first, path),
            _ => (DEFAULT_REGISTRY, rest),
        };
        let registry = if registry == "index.docker.io" { DEFAULT_REGISTRY } else { registry };
        if !is_host(registry) {
            return Err(bad("its registry is no host name"));
        }
        if path.is_empty() {
            return Err(bad("it is empty"));
        }
        if path.chars().any(|c| c.is_ascii_uppercase()) {
            return Err(bad("the name of a repository must be in lower case"));
        }
        if path.len() == 64 && path.bytes().all(|byte| byte.is_ascii_hexdigit()) && !rest.contains('/') {
            return Err(bad("64 hex digits would be an image id"));
        }
        if !path.split('/').all(is_component) {
            return Err(bad(
                "parts of a repository's name are lower-case letters and digits, with single `.`, `_`, `__` or `-` between",
            ));
        }
        let namespace =
            if registry == DEFAULT_REGISTRY && !path.contains('/') { DEFAULT_NAMESPACE } else { "" };
        let repository = format!("{registry}/{namespace}{path}");
        if repository.len() > 255 {
            return Err(bad("it is longer than 255 characters"));
        }
        let tag = match (tag, digest) {
            (None, None) => Some(DEFAULT_TAG),
            (tag, _) => tag,
        };
        Ok(Self { repository, tag: tag.map(str::to_owned), digest })
    }

    /// `docker.io`, `localhost:5000`.
    pub fn registry(&self) -> &str {
        self.repository.split_once('/').map_or(self.repository.as_str(), |(registry, _)| registry)
    }

    /// Without the registry: `library/alpine`.
    pub fn path(&self) -> &str {
        self.repository.split_once('/').map_or("", |(_, path)| path)
    }

    /// As Docker shows it: `alpine:3.20`, `me/dev:1`, `localhost:5000/a/b:latest`.
    pub fn familiar(&self) -> String {
        let mut text = match self.repository.strip_prefix("docker.io/") {
            Some(path) => path.strip_prefix(DEFAULT_NAMESPACE).unwrap_or(path).to_owned(),
            None => self.repository.clone(),
        };
        self.write_suffix(&mut text).expect("writing to a string succeeds");
        text
    }

    fn write_suffix(&self, out: &mut impl fmt::Write) -> fmt::Result {
        if let Some(tag) = &self.tag {
            write!(out, ":{tag}")?;
        }
        if let Some(digest) = &self.digest {
            write!(out, "@{digest}")?;
        }
        Ok(())
    }
}

/// The normal form.
impl fmt::Display for ImageName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.repository)?;
        self.write_suffix(f)
    }
}

impl std::str::FromStr for ImageName {
    type Err = StoreError;

    fn from_str(text: &str) -> Result<Self> {
        Self::parse(text)
    }
}

fn is_registry(first: &str) -> bool {
    first == "localhost" || first.contains(['.', ':']) || first.chars().any(|c| c.is_ascii_uppercase())
}

fn is_host(registry: &str) -> bool {
    let (host, port) = match registry.rsplit_once(':') {
        Some((host, port)) if !registry.ends_with(']') => (host, Some(port)),
        _ => (registry, None),
    };
    if port.is_some_and(|port| port.parse::<u16>().is_err()) {
        return false;
    }
    if let Some(address) = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')) {
        return address.parse::<std::net::Ipv6Addr>().is_ok();
    }
    host.split('.').all(|label| {
        !label.is_empty()
            && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
            && !label.starts_with('-')
            && !label.ends_with('-')
    })
}

fn is_component(text: &str) -> bool {
    let is_word = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    let bytes = text.as_bytes();
    if !bytes.first().is_some_and(|byte| is_word(*byte)) || !bytes.last().is_some_and(|byte| is_word(*byte)) {
        return false;
    }
    text.split(|c: char| c.is_ascii() && is_word(c as u8))
        .all(|between| matches!(between, "" | "." | "_" | "__") || between.bytes().all(|byte| byte == b'-'))
}

fn is_tag(text: &str) -> bool {
    (1..=128).contains(&text.len())
        && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'.' | b'-'))
        && !text.starts_with(['.', '-'])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_as_docker_reads_them() {
        let sha = format!("sha256:{}", "a".repeat(64));
        for (text, normal, familiar) in [
            ("alpine", "docker.io/library/alpine:latest", "alpine:latest"),
            ("alpine:3.20", "docker.io/library/alpine:3.20", "alpine:3.20"),
            ("me/dev:1", "docker.io/me/dev:1", "me/dev:1"),
            ("docker.io/library/alpine", "docker.io/library/alpine:latest", "alpine:latest"),
            ("index.docker.io/alpine", "docker.io/library/alpine:latest", "alpine:latest"),
            ("localhost/x", "localhost/x:latest", "localhost/x:latest"),
            ("localhost:5000/a/b", "localhost:5000/a/b:latest", "localhost:5000/a/b:latest"),
            ("localhost:5000/a/b:V1.x_y-z", "localhost:5000/a/b:V1.x_y-z", "localhost:5000/a/b:V1.x_y-z"),
            ("[::1]:5000/a", "[::1]:5000/a:latest", "[::1]:5000/a:latest"),
            ("quay.io/a__b/c-d--e.f_g", "quay.io/a__b/c-d--e.f_g:latest", "quay.io/a__b/c-d--e.f_g:latest"),
            (&format!("alpine@{sha}"), &format!("docker.io/library/alpine@{sha}"), &format!("alpine@{sha}")),
            (
                &format!("alpine:3@{sha}"),
                &format!("docker.io/library/alpine:3@{sha}"),
                &format!("alpine:3@{sha}"),
            ),
        ] {
            let name = ImageName::parse(text).unwrap();
            assert_eq!((name.to_string().as_str(), name.familiar().as_str()), (normal, familiar), "{text}");
            assert_eq!(ImageName::parse(normal).unwrap(), name);
            assert_eq!(ImageName::parse(familiar).unwrap(), name);
        }
    }

    #[test]
    fn what_is_no_name_is_refused() {
        let (tag, long, id) = ("a:".to_owned() + &"t".repeat(129), "x/".repeat(130) + "x", "a".repeat(64));
        for text in [
            "",
            ":1",
            "a:",
            "a:-1",
            "A",
            "a/B",
            "a//b",
            "/a",
            "a/",
            "a___b",
            "a..b",
            "-a",
            "a-",
            "a b",
            "ä",
            "a@sha256:00",
            "a@",
            "host:port/a",
            "a.-b.c/d",
            "..",
            "../a",
            "a:b/c",
            "a\n",
            &tag,
            &long,
            &id,
        ] {
            assert!(ImageName::parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn registry_and_path_are_parts_of_the_repository() {
        let name = ImageName::parse("localhost:5000/a/b").unwrap();
        assert_eq!((name.registry(), name.path()), ("localhost:5000", "a/b"));
    }
}
