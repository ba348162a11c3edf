//! `registries.conf`, version 2 (containers-registries.conf(5)): where a repository really is, and its mirrors.
//!
//! Short names are not searched for: a name without a registry is Docker Hub's, so that a name means the same
//! everywhere. Aliases and `unqualified-search-registries` are read over.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use crate::config::{path_from_env, user_config_dir};
use crate::endpoint::Endpoint;
use crate::{Config, RegistryError, Result};

/// All entries of all files.
#[derive(Debug, Clone, Default)]
pub(crate) struct RegistriesConf {
    registries: Vec<RegistryEntry>,
    /// `credential-helpers`, in the order in which they are asked.
    pub(crate) credential_helpers: Vec<String>,
}

#[derive(Debug, Clone, Deserialize)]
struct RegistryEntry {
    prefix: Option<String>,
    location: Option<String>,
    #[serde(default)]
    insecure: bool,
    #[serde(default)]
    blocked: bool,
    #[serde(default, rename = "mirror-by-digest-only")]
    mirror_by_digest_only: bool,
    #[serde(default, rename = "mirror")]
    mirrors: Vec<Mirror>,
}

#[derive(Debug, Clone, Deserialize)]
struct Mirror {
    location: String,
    #[serde(default)]
    insecure: bool,
    #[serde(default, rename = "pull-from-mirror")]
    pull_from_mirror: PullFromMirror,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum PullFromMirror {
    #[default]
    #[serde(alias = "")]
    All,
    DigestOnly,
    TagOnly,
}

#[derive(Debug, Deserialize)]
struct File {
    #[serde(default, rename = "registry")]
    registries: Vec<RegistryEntry>,
    #[serde(rename = "credential-helpers")]
    credential_helpers: Option<Vec<String>>,
}

impl RegistriesConf {
    /// Reads the files that `config` and the environment name. A missing file is an empty one, unless it was
    /// asked for explicitly.
    pub(crate) fn load(config: &Config) -> Result<Self> {
        let mut conf = Self::default();
        let explicit = config.registries_conf.clone().or_else(|| path_from_env("CONTAINERS_REGISTRIES_CONF"));
        if let Some(path) = explicit {
            let text = fs::read_to_string(&path).map_err(|source| RegistryError::Io {
                doing: "read",
                path: path.clone(),
                source,
            })?;
            conf.add(&path, &text)?;
            return Ok(conf);
        }
        let user = user_config_dir().map(|dir| dir.join("containers"));
        let system = PathBuf::from("/etc/containers");
        // The user's file replaces the system's; drop-ins of both are added, the user's last.
        let main =
            [user.as_ref(), Some(&system)].into_iter().flatten().map(|dir| dir.join("registries.conf"));
        for path in main {
            if let Some(text) = read_if_there(&path)? {
                conf.add(&path, &text)?;
                break;
            }
        }
        for dir in [Some(&system), user.as_ref()].into_iter().flatten() {
            for path in drop_ins(&dir.join("registries.conf.d"))? {
                if let Some(text) = read_if_there(&path)? {
                    conf.add(&path, &text)?;
                }
            }
        }
        Ok(conf)
    }

    /// Adds a file's entries; one with the same prefix replaces that of an earlier file.
    fn add(&mut self, path: &Path, text: &str) -> Result<()> {
        let bad = |reason: String| RegistryError::Config { path: path.to_owned(), reason };
        let file: File =
            toml::from_str(text).map_err(|error| bad(error.to_string().trim_end().to_owned()))?;
        for mut entry in file.registries {
            let prefix = match (&entry.prefix, &entry.location) {
                (Some(prefix), _) | (None, Some(prefix)) if !prefix.is_empty() => {
                    prefix.trim_end_matches('/').to_owned()
                }
                _ => return Err(bad("a [[registry]] has neither prefix nor location".into())),
            };
            if prefix.starts_with("*.") {
                if entry.location.as_ref().is_some_and(|location| !location.is_empty()) {
                    return Err(bad(format!("`{prefix}`: a wildcard prefix cannot have a location")));
                }
            } else if entry.location.as_ref().is_none_or(String::is_empty) {
                entry.location = Some(prefix.clone());
            }
            entry.prefix = Some(prefix);
            self.registries.retain(|old| old.prefix != entry.prefix);
            self.registries.push(entry);
        }
        if let Some(helpers) = file.credential_helpers {
            self.credential_helpers = helpers;
        }
        Ok(())
    }

    /// Where to pull `repository` (with its registry) from, in order: mirrors, then the place itself.
    pub(crate) fn pull_endpoints(&self, repository: &str, by_digest: bool) -> Result<Vec<Endpoint>> {
        let Some(entry) = self.entry(repository) else {
            return Ok(vec![Endpoint::of_repository(repository, false)]);
        };
        let prefix = entry.prefix.as_deref().unwrap_or_default();
        if entry.blocked {
            return Err(RegistryError::Blocked { name: repository.into(), prefix: prefix.into() });
        }
        let mut endpoints = Vec::new();
        for mirror in &entry.mirrors {
            let wanted = match mirror.pull_from_mirror {
                PullFromMirror::All => by_digest || !entry.mirror_by_digest_only,
                PullFromMirror::DigestOnly => by_digest,
                PullFromMirror::TagOnly => !by_digest,
            };
            if wanted {
                let at = rewrite(repository, prefix, &mirror.location);
                endpoints.push(Endpoint::of_repository(&at, mirror.insecure));
            }
        }
        endpoints.push(entry.primary(repository));
        Ok(endpoints)
    }

    /// Where to push `repository` to: mirrors are not written to.
    pub(crate) fn push_endpoint(&self, repository: &str) -> Result<Endpoint> {
        match self.entry(repository) {
            None => Ok(Endpoint::of_repository(repository, false)),
            Some(entry) if entry.blocked => Err(RegistryError::Blocked {
                name: repository.into(),
                prefix: entry.prefix.clone().unwrap_or_default(),
            }),
            Some(entry) => Ok(entry.primary(repository)),
        }
    }

    /// The entry with the longest matching prefix.
    fn entry(&self, repository: &str) -> Option<&RegistryEntry> {
        let prefix = |entry: &RegistryEntry| entry.prefix.clone().unwrap_or_default();
        self.registries
            .iter()
            .filter(|entry| matches(&prefix(entry), repository))
            .max_by_key(|entry| prefix(entry).len())
    }
}

impl RegistryEntry {
    fn primary(&self, repository: &str) -> Endpoint {
        let prefix = self.prefix.as_deref().unwrap_or_default();
        match &self.location {
            Some(location) => Endpoint::of_repository(&rewrite(repository, prefix, location), self.insecure),
            None => Endpoint::of_repository(repository, self.insecure),
        }
    }
}

/// Whether a prefix (`host[:port][/path…]` or `*.domain`) covers a repository: whole components only.
fn matches(prefix: &str, repository: &str) -> bool {
    if let Some(domain) = prefix.strip_prefix('*') {
        let host = repository.split('/').next().unwrap_or(repository);
        return host.len() > domain.len() && host.ends_with(domain);
    }
    repository.strip_prefix(prefix).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

fn rewrite(repository: &str, prefix: &str, location: &str) -> String {
    let location = location.trim_end_matches('/');
    if prefix.starts_with('*') {
        // A mirror of a wildcard stands for the registry part alone.
        let path = repository.split_once('/').map_or("", |(_, path)| path);
        return format!("{location}/{path}");
    }
    format!("{location}{}", &repository[prefix.len()..])
}

fn read_if_there(path: &Path) -> Result<Option<String>> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        // A user who may not read the system's file is as one without it.
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
            Ok(None)
        }
        Err(source) => Err(RegistryError::Io { doing: "read", path: path.to_owned(), source }),
    }
}

/// `*.conf` below `dir` in the order of their names.
fn drop_ins(dir: &Path) -> Result<Vec<PathBuf>> {
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
            return Ok(Vec::new());
        }
        Err(source) => return Err(RegistryError::Io { doing: "read", path: dir.to_owned(), source }),
    };
    let mut paths: Vec<PathBuf> = entries
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.extension().is_some_and(|extension| extension == "conf"))
        .collect();
    paths.sort();
    Ok(paths)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn conf(files: &[&str]) -> RegistriesConf {
        let mut conf = RegistriesConf::default();
        for text in files {
            conf.add(Path::new("test.conf"), text).unwrap();
        }
        conf
    }

    fn places(conf: &RegistriesConf, repository: &str, by_digest: bool) -> Vec<String> {
        let endpoints = conf.pull_endpoints(repository, by_digest).unwrap();
        endpoints
            .iter()
            .map(|e| format!("{}/{}{}", e.host, e.repository, if e.insecure { " insecure" } else { "" }))
            .collect()
    }

    #[test]
    fn the_longest_prefix_decides_where_a_repository_is() {
        let conf = conf(&[r#"
            unqualified-search-registries = ["quay.io"]
            [[registry]]
            prefix = "example.com"
            location = "mirror.internal:5000/all"
            [[registry]]
            prefix = "example.com/team"
            location = "team.internal"
            insecure = true
            [[registry]]
            prefix = "*.corp.test"
            insecure = true
            [[registry]]
            location = "plain.test"
        "#]);
        for (repository, place) in [
            ("example.com/app", "mirror.internal:5000/all/app"),
            ("example.com/team/app", "team.internal/app insecure"),
            ("example.com/teammate/app", "mirror.internal:5000/all/teammate/app"),
            ("example.community/app", "example.community/app"),
            ("a.b.corp.test/app", "a.b.corp.test/app insecure"),
            ("corp.test/app", "corp.test/app"),
            ("plain.test/x", "plain.test/x"),
            ("docker.io/library/alpine", "registry-1.docker.io/library/alpine"),
        ] {
            assert_eq!(places(&conf, repository, false), [place], "{repository}");
            let push = conf.push_endpoint(repository).unwrap();
            assert_eq!(format!("{}/{}", push.host, push.repository), place.trim_end_matches(" insecure"));
        }
    }

    #[test]
    fn mirrors_come_first_and_only_for_what_they_serve() {
        let conf = conf(&[r#"
            [[registry]]
            prefix = "docker.io"
            [[registry.mirror]]
            location = "all.test/hub"
            insecure = true
            [[registry.mirror]]
            location = "digests.test"
            pull-from-mirror = "digest-only"
            [[registry.mirror]]
            location = "tags.test"
            pull-from-mirror = "tag-only"
        "#]);
        assert_eq!(
            places(&conf, "docker.io/library/alpine", false),
            [
                "all.test/hub/library/alpine insecure",
                "tags.test/library/alpine",
                "registry-1.docker.io/library/alpine"
            ]
        );
        assert_eq!(
            places(&conf, "docker.io/library/alpine", true),
            [
                "all.test/hub/library/alpine insecure",
                "digests.test/library/alpine",
                "registry-1.docker.io/library/alpine"
            ]
        );
    }

    #[test]
    fn later_files_replace_entries_and_blocked_ones_are_refused() {
        let first = "[[registry]]\nprefix = \"a.test\"\nlocation = \"b.test\"\n";
        let second = "[[registry]]\nprefix = \"a.test\"\nblocked = true\n";
        assert_eq!(places(&conf(&[first]), "a.test/x", false), ["b.test/x"]);
        let blocked = conf(&[first, second]);
        assert!(matches!(
            blocked.pull_endpoints("a.test/x", false),
            Err(RegistryError::Blocked { prefix, .. }) if prefix == "a.test"
        ));
        assert!(matches!(blocked.push_endpoint("a.test/x"), Err(RegistryError::Blocked { .. })));
    }

    #[test]
    fn nonsense_is_an_error_that_names_the_file() {
        for text in [
            "[[registry]]\ninsecure = true\n",
            "[[registry]]\nprefix = 3\n",
            "[[",
            "[[registry]]\nprefix=\"*.a\"\nlocation=\"b\"",
        ] {
            let error = RegistriesConf::default().add(Path::new("/x/y.conf"), text).unwrap_err();
            assert!(error.to_string().contains("/x/y.conf"), "{error}");
        }
    }
}
