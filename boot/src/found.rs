//! Where the parts of a kernel are that is to be installed: in a package, on this host, or beside a file.

use std::fs::{self, File};
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};

use kiln_contract::Progress;

use crate::arch::Arch;
use crate::config::{Config, MAX_CONFIG};
use crate::error::{BootError, Result};
use crate::kernel::{Source, read_file};
use crate::modules::ModuleTree;
use crate::{apt, build, deb, version};

/// A kernel to be installed.
#[derive(Debug)]
pub(crate) struct Found {
    /// Its file.
    pub(crate) kernel: PathBuf,
    /// The file that errors should name.
    pub(crate) named: PathBuf,
    pub(crate) modules: ModuleTree,
    pub(crate) config: Option<Config>,
}

/// Finds what `source` names. `staging` is a directory for what has to be unpacked.
pub(crate) fn find(source: &Source, staging: &Path, progress: &dyn Progress) -> Result<Found> {
    match source {
        Source::Packages(paths) => packages(paths, staging, progress),
        Source::Host(root) => host(root),
        Source::Path(path) => at(path, staging, progress),
        Source::Distribution => distribution(staging, progress),
        Source::Build { source, jobs } => {
            let built = build::build(source.as_deref(), *jobs, staging, progress)?;
            found(built.kernel.clone(), built.kernel, None, Some(&built.config))
        }
    }
}

/// What Debian calls its newest kernel on each architecture, and what Ubuntu does: it has 9P in a package of extras
/// that only this one depends on.
const NEWEST: &[&str] = &[
    match Arch::host() {
        Some(Arch::Aarch64) => "linux-image-arm64",
        _ => "linux-image-amd64",
    },
    "linux-image-generic",
];

fn distribution(staging: &Path, progress: &dyn Progress) -> Result<Found> {
    let downloads = staging.join("downloads");
    fs::create_dir(&downloads).map_err(BootError::doing("make", &downloads))?;
    let files = apt::download(NEWEST, &["linux-image-", "linux-modules-"], &downloads, progress)?;
    packages(&files, staging, progress)
}

fn packages(paths: &[PathBuf], staging: &Path, progress: &dyn Progress) -> Result<Found> {
    let unpacked = deb::unpack(paths, staging, progress)?;
    found(unpacked.kernel, unpacked.named, Some(&unpacked.modules), unpacked.config.as_deref())
}

/// The kernel that runs, else the newest that is in `/boot` (in a container the running one is not).
fn host(root: &Path) -> Result<Found> {
    let running = rustix::system::uname().release().to_string_lossy().into_owned();
    let boot = root.join("boot");
    let mut versions = vec![running];
    if let Ok(entries) = fs::read_dir(&boot) {
        let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
        let mut others: Vec<String> =
            names.filter_map(|name| Some(name.strip_prefix("vmlinuz-")?.to_owned())).collect();
        others.sort_by(|a, b| version::compare(b, a));
        versions.extend(others);
    }
    for version in versions {
        let modules = modules_of(root, &version);
        let kernel =
            [Some(boot.join(format!("vmlinuz-{version}"))), modules.as_ref().map(|m| m.join("vmlinuz"))]
                .into_iter()
                .flatten()
                .find(|path| path.is_file());
        if let (Some(kernel), Some(modules)) = (kernel, modules) {
            let config = boot.join(format!("config-{version}"));
            return found(kernel.clone(), kernel, Some(&modules), Some(&config));
        }
    }
    Err(BootError::NoKernel { path: boot })
}

/// `/lib/modules/VERSION` below `root`, if it has modules.
fn modules_of(root: &Path, version: &str) -> Option<PathBuf> {
    let places = ["lib/modules", "usr/lib/modules"].map(|place| root.join(place).join(version));
    places.into_iter().find(|place| place.join("kernel").is_dir())
}

/// A package's file, the directory of an unpacked package (or of another system's root), or a kernel's file.
fn at(path: &Path, staging: &Path, progress: &dyn Progress) -> Result<Found> {
    if path.is_dir() {
        return host(path);
    }
    // `/vmlinuz` is a symbolic link to what lies beside its modules and its configuration.
    let path = &path.canonicalize().map_err(BootError::doing("find", path))?;
    let mut head = Vec::new();
    let file = File::open(path).map_err(BootError::doing("read", path))?;
    file.take(deb::MAGIC.len() as u64).read_to_end(&mut head).map_err(BootError::doing("read", path))?;
    if head == deb::MAGIC {
        return packages(&[path.into()], staging, progress);
    }
    // /boot/vmlinuz-VERSION, or /lib/modules/VERSION/vmlinuz
    let parent = path.parent().unwrap_or(Path::new("."));
    let version = path.file_name().and_then(|name| name.to_str()?.strip_prefix("vmlinuz-"));
    let modules = version
        .and_then(|version| modules_of(parent.parent()?, version))
        .or_else(|| parent.join("kernel").is_dir().then(|| parent.to_path_buf()));
    let configs =
        [version.map(|version| parent.join(format!("config-{version}"))), Some(parent.join(".config"))];
    let config = configs.into_iter().flatten().find(|path| path.is_file());
    found(path.into(), path.into(), modules.as_deref(), config.as_deref())
}

fn found(kernel: PathBuf, named: PathBuf, modules: Option<&Path>, config: Option<&Path>) -> Result<Found> {
    let modules = modules.map_or_else(|| Ok(ModuleTree::default()), ModuleTree::read)?;
    let config = match config.map(|path| read_file(path, MAX_CONFIG)) {
        Some(Err(BootError::System { source, .. })) if source.kind() == io::ErrorKind::NotFound => None,
        other => other.transpose()?.map(Config::new),
    };
    Ok(Found { kernel, named, modules, config })
}
