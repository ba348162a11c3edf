//! Named volumes: `volumes/<name>/`, with the data in `data/` and what is known of it in `volume.json`.
//!
//! A volume is made in a hidden directory and renamed, so that one that can be seen is complete. It is filled with
//! what the image has at its first target when an instance first starts with it, as Docker does. Containers bind its data,
//! machines get it as a share: one volume serves any number of either at once.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use jiff::Timestamp;
use kiln_contract::{BackendError, ErrorKind, Home, InstanceId, InstanceRecord, InstanceSpec, MountKind};
use serde::{Deserialize, Serialize};

use crate::archive::{Archive, Base, Confine, Devices, Unpack};

type Result<T> = std::result::Result<T, BackendError>;

/// A named volume.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Volume {
    /// Its name: `[a-zA-Z0-9][a-zA-Z0-9_.-]*`.
    pub name: String,
    /// Where its data is on the host.
    #[serde(skip)]
    pub path: PathBuf,
    /// When it was made.
    pub created: Timestamp,
    /// Its labels.
    pub labels: BTreeMap<String, String>,
    /// Made for one instance, and to be removed with it.
    pub anonymous: bool,
}

/// The volumes of a home.
#[derive(Debug)]
pub struct Volumes {
    home: Home,
}

impl Volumes {
    /// The volumes of `home`. Nothing is touched.
    pub fn open(home: &Home) -> Self {
        Self { home: home.clone() }
    }

    /// Finds the volume `name`, or makes it. Without a name an anonymous one is made.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] for a name that cannot be one.
    pub fn create(&self, name: Option<&str>, labels: &BTreeMap<String, String>) -> Result<Volume> {
        let random = InstanceId::random().to_string();
        let anonymous = name.is_none();
        let name = name.unwrap_or(&random);
        check_name(name)?;
        if let Some(volume) = self.read(name)? {
            return Ok(volume);
        }
        let failed = |error: io::Error| BackendError::caused(format!("cannot make the volume {name}"), error);
        let staging = self.home.volumes().join(format!(".{random}"));
        let made = Volume {
            name: name.into(),
            path: self.data(name),
            created: Timestamp::now(),
            labels: labels.clone(),
            anonymous,
        };
        fs::create_dir_all(staging.join("data")).map_err(failed)?;
        let write = || {
            fs::write(staging.join("volume.json"), serde_json::to_vec(&made)?)?;
            fs::rename(&staging, self.home.volumes().join(name))
        };
        match write() {
            Ok(()) => Ok(made),
            Err(error) => {
                let _ = fs::remove_dir_all(&staging);
                // Another process was faster: its volume is as good.
                self.read(name)?.ok_or_else(|| failed(error))
            }
        }
    }

    /// All volumes by name.
    ///
    /// # Errors
    /// If the directory of volumes cannot be read.
    pub fn list(&self) -> Result<Vec<Volume>> {
        let directory = self.home.volumes();
        let failed = |error| BackendError::caused(format!("cannot list {}", directory.display()), error);
        let entries = match fs::read_dir(&directory) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            other => other.map_err(failed)?,
        };
        let mut volumes = Vec::new();
        for entry in entries {
            let name = entry.map_err(failed)?.file_name();
            if let Some(name) = name.to_str().filter(|name| !name.starts_with('.')) {
                volumes.extend(self.read(name)?);
            }
        }
        volumes.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(volumes)
    }

    /// The volume `name`.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`].
    pub fn find(&self, name: &str) -> Result<Volume> {
        check_name(name)?;
        self.read(name)?
            .ok_or_else(|| BackendError::new(ErrorKind::NotFound, format!("no volume is named {name}")))
    }

    /// Removes the volume `name` with its data.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`]; [`ErrorKind::Conflict`] while an instance uses it.
    pub fn remove(&self, name: &str) -> Result<()> {
        self.find(name)?;
        if let Some(user) = self.users()?.remove(name) {
            return Err(BackendError::new(
                ErrorKind::Conflict,
                format!("the volume {name} is used by {user}"),
            )
            .hint(format!("remove it first: kiln rm {user}")));
        }
        self.discard(name)
    }

    /// Removes anonymous volumes that no instance uses; named ones too with `all`. Their names and sizes in bytes.
    ///
    /// # Errors
    /// At the first that cannot be removed.
    pub fn prune(&self, all: bool) -> Result<Vec<(String, u64)>> {
        let used = self.users()?;
        let mut removed = Vec::new();
        for volume in self.list()? {
            if (all || volume.anonymous) && !used.contains_key(&volume.name) {
                let size = tree_size(&volume.path);
                self.discard(&volume.name)?;
                removed.push((volume.name, size));
            }
        }
        Ok(removed)
    }

    /// Gives every volume that `spec` mounts a name, and makes those that are not there. Returns the anonymous ones.
    ///
    /// # Errors
    /// As [`Self::create`]. Those that were made for the mounts before stay.
    pub fn claim(&self, spec: &mut InstanceSpec) -> Result<Vec<String>> {
        let mut anonymous = Vec::new();
        for mount in &mut spec.mounts {
            if let MountKind::Volume { name, .. } = &mut mount.kind {
                let volume = self.create(name.as_deref(), &BTreeMap::new())?;
                if name.is_none() {
                    anonymous.push(volume.name.clone());
                }
                *name = Some(volume.name);
            }
        }
        Ok(anonymous)
    }

    /// Removes volumes that were claimed for an instance that is gone, but those that another instance uses, as a fork
    /// does its original's. A missing one is no error.
    ///
    /// # Errors
    /// At the first that cannot be removed.
    pub fn release(&self, names: &[String]) -> Result<()> {
        if names.is_empty() {
            return Ok(());
        }
        let used = self.users()?;
        names.iter().filter(|name| !used.contains_key(*name)).try_for_each(|name| self.discard(name))
    }

    fn read(&self, name: &str) -> Result<Option<Volume>> {
        let path = self.home.volumes().join(name).join("volume.json");
        let failed =
            |error: io::Error| BackendError::caused(format!("cannot read {}", path.display()), error);
        let text = match fs::read(&path) {
            Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
                return Ok(None);
            }
            other => other.map_err(failed)?,
        };
        let volume: Volume = serde_json::from_slice(&text).map_err(|error| failed(error.into()))?;
        Ok(Some(Volume { path: self.data(name), ..volume }))
    }

    fn data(&self, name: &str) -> PathBuf {
        self.home.volumes().join(name).join("data")
    }

    /// Renames it away first, so that nobody finds a volume that is half removed.
    fn discard(&self, name: &str) -> Result<()> {
        let failed = |error| BackendError::caused(format!("cannot remove the volume {name}"), error);
        let away = self.home.volumes().join(format!(".{}", InstanceId::random()));
        match fs::rename(self.home.volumes().join(name), &away) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            other => other.map_err(failed)?,
        }
        fs::remove_dir_all(away).map_err(failed)
    }

    /// Volumes that instances use, each with the name of one that does.
    fn users(&self) -> Result<BTreeMap<String, String>> {
        let mut users = BTreeMap::new();
        let Ok(entries) = fs::read_dir(self.home.instances()) else {
            return Ok(users);
        };
        for entry in entries.flatten() {
            let Ok(text) = fs::read(entry.path().join("instance.json")) else {
                continue;
            };
            // A record that cannot be read may use any volume: better to remove none than one too many.
            let record: InstanceRecord = serde_json::from_slice(&text).map_err(|error| {
                BackendError::caused(
                    format!("cannot tell which volumes {} uses", entry.path().display()),
                    error,
                )
            })?;
            let named = record.spec.mounts.iter().filter_map(|mount| match &mount.kind {
                MountKind::Volume { name, .. } => name.clone(),
                _ => None,
            });
            let all: BTreeSet<String> = named.chain(record.volumes.iter().cloned()).collect();
            users.extend(all.into_iter().map(|volume| (volume, record.spec.name.clone())));
        }
        Ok(users)
    }
}

fn check_name(name: &str) -> Result<()> {
    let valid = name.starts_with(|c: char| c.is_ascii_alphanumeric())
        && name.len() <= 255
        && name.chars().all(|c| c.is_ascii_alphanumeric() || "_.-".contains(c));
    if valid {
        return Ok(());
    }
    Err(BackendError::new(ErrorKind::Invalid, format!("`{name}` cannot be the name of a volume"))
        .hint("letters, digits, `_`, `.` and `-`, beginning with a letter or digit; a path of the host begins with / or ."))
}

impl Volume {
    /// Whether nothing is in it.
    pub fn is_empty(&self) -> bool {
        fs::read_dir(&self.path).is_ok_and(|mut entries| entries.next().is_none())
    }

    /// Fills it from a tar archive of a directory: what is in that, and with `.` its owner and mode.
    ///
    /// # Errors
    /// As [`Archive::unpack`].
    pub fn fill(&self, mut archive: &mut dyn Read) -> Result<()> {
        let failed = |error: Box<dyn std::error::Error + Send + Sync>| {
            BackendError::caused(format!("cannot fill the volume {} from the image", self.name), error)
        };
        let to = Base::open(&self.path, Confine::Beneath).map_err(|error| failed(error.into()))?;
        let options = Unpack { owners: true, devices: Devices::as_caller(), top: None };
        Archive::open(&mut archive)
            .and_then(|archive| archive.unpack(&to, Path::new(""), &options))
            .map_err(|error| failed(error.into()))
    }
}

/// Bytes of all files below `directory`, as far as they can be read.
fn tree_size(directory: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt as _;
    let mut size = 0;
    let mut pending = vec![directory.to_owned()];
    while let Some(directory) = pending.pop() {
        for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
            match entry.metadata() {
                Ok(metadata) if metadata.is_dir() => pending.push(entry.path()),
                Ok(metadata) => size += metadata.blocks() * 512,
                Err(_) => {}
            }
        }
    }
    size
}

#[cfg(test)]
mod tests {
    use super::*;

    fn volumes() -> (tempfile::TempDir, Volumes) {
        let directory = tempfile::tempdir().unwrap();
        let volumes = Volumes::open(&Home::at(directory.path()));
        (directory, volumes)
    }

    #[test]
    fn a_volume_is_made_once_and_found_again() {
        let (_directory, volumes) = volumes();
        assert!(volumes.list().unwrap().is_empty());
        let labels = BTreeMap::from([("a".to_owned(), "b".to_owned())]);
        let made = volumes.create(Some("data"), &labels).unwrap();
        fs::write(made.path.join("f"), "x").unwrap();
        assert_eq!(volumes.create(Some("data"), &BTreeMap::new()).unwrap(), made);
        assert_eq!(volumes.find("data").unwrap(), made);
        let anonymous = volumes.create(None, &BTreeMap::new()).unwrap();
        assert!(anonymous.anonymous);
        assert_eq!(volumes.list().unwrap().len(), 2);
        assert_eq!(volumes.prune(false).unwrap(), [(anonymous.name, 0)]);
        volumes.remove("data").unwrap();
        assert_eq!(volumes.find("data").unwrap_err().kind(), ErrorKind::NotFound);
        assert_eq!(fs::read_dir(volumes.home.volumes()).unwrap().count(), 0);
    }

    #[test]
    fn names_that_are_paths_are_refused() {
        let (_directory, volumes) = volumes();
        for name in ["", ".", "..", "../x", "a/b", ".hidden", "a b", "ä"] {
            assert_eq!(
                volumes.create(Some(name), &BTreeMap::new()).unwrap_err().kind(),
                ErrorKind::Invalid,
                "{name}"
            );
        }
    }

    #[test]
    fn a_volume_that_another_instance_uses_outlives_its_own() {
        let (directory, volumes) = volumes();
        let instances = crate::Instances::of(&Home::at(directory.path()));
        let mut spec = kiln_fixtures::instance_spec("fork");
        let kind = MountKind::Volume { name: None, copy: true };
        spec.mounts.push(kiln_contract::MountSpec { kind, target: "/data".into(), read_only: false });
        let claimed = volumes.claim(&mut spec).unwrap();
        let user = instances.create(&spec, claimed.clone()).unwrap();
        volumes.release(&claimed).unwrap();
        assert_eq!(volumes.remove(&claimed[0]).unwrap_err().kind(), ErrorKind::Conflict);
        instances.forget(&user).unwrap();
        volumes.release(&claimed).unwrap();
        assert!(volumes.list().unwrap().is_empty());
    }
}
