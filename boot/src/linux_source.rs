//! The source of Linux: a directory, a tar, or a Debian package that has one.

use std::fs::{self, File};
use std::io::Read as _;
use std::path::{Path, PathBuf};

use kiln_contract::Progress;

use crate::apt;
use crate::compression::Compression;
use crate::counted::Counted;
use crate::deb;
use crate::error::{BootError, Result};
use crate::version;

/// Where Debian's package puts it.
const INSTALLED: &str = "/usr/src";

/// A source to build from.
#[derive(Debug)]
pub(crate) struct LinuxSource {
    /// The directory with the top `Makefile`.
    pub(crate) directory: PathBuf,
    /// Its version, `6.1.172`, without what a configuration adds.
    pub(crate) version: String,
}

/// Finds or fetches the source `named`, or Debian's if none is, and unpacks it into `staging` if it has to be.
pub(crate) fn find(named: Option<&Path>, staging: &Path, progress: &dyn Progress) -> Result<LinuxSource> {
    let path = match named {
        Some(path) => path.to_path_buf(),
        None => match installed(Path::new(INSTALLED)) {
            Some(path) => path,
            None => {
                let names = ["linux-source"];
                let packages = apt::download(&names, &["linux-source-"], staging, progress)?;
                packages.into_iter().next().ok_or_else(|| BootError::NotInApt {
                    packages: names.iter().map(|&name| name.to_owned()).collect(),
                })?
            }
        },
    };
    if path.is_dir() {
        return read(&path);
    }
    let unpacked = staging.join("source");
    fs::create_dir(&unpacked).map_err(BootError::doing("make", &unpacked))?;
    unpack(&path, &unpacked, progress)?;
    // A tar of Linux has one directory, in which everything is.
    let entries = fs::read_dir(&unpacked).map_err(BootError::doing("list", &unpacked))?;
    let inside = entries.filter_map(|entry| Some(entry.ok()?.path())).find(|path| path.is_dir());
    let not = || BootError::NotASource { path: path.clone(), reason: "there is no directory in it".into() };
    read(&inside.ok_or_else(not)?).map_err(|error| match error {
        // The directory will be gone when the message is read.
        BootError::NotASource { reason, .. } => BootError::NotASource { path: path.clone(), reason },
        other => other,
    })
}

/// The newest of the tars that Debian's packages `linux-source-…` put into `directory`.
fn installed(directory: &Path) -> Option<PathBuf> {
    let names = fs::read_dir(directory).ok()?.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    let mut tars: Vec<String> =
        names.filter(|name| name.starts_with("linux-source-") && name.contains(".tar")).collect();
    tars.sort_by(|a, b| version::compare(a, b));
    tars.pop().map(|name| directory.join(name))
}

fn unpack(path: &Path, into: &Path, progress: &dyn Progress) -> Result<()> {
    let mut head = [0; 8];
    let mut file = File::open(path).map_err(BootError::doing("read", path))?;
    let read = file.read(&mut head).map_err(BootError::doing("read", path))?;
    let not = |error: std::io::Error| BootError::NotASource { path: path.into(), reason: error.to_string() };
    if &head[..read] == deb::MAGIC {
        let mut archive = tar::Archive::new(deb::open(path, "unpack", progress)?);
        for entry in archive.entries().map_err(not)? {
            let entry = entry.map_err(not)?;
            let name = String::from_utf8_lossy(&entry.path_bytes()).into_owned();
            if name.contains("usr/src/linux-source-") && name.contains(".tar") {
                return unpack_tar(entry, into).map_err(not);
            }
        }
        let reason = "there is no usr/src/linux-source-*.tar.* in it".into();
        return Err(BootError::NotASource { path: path.into(), reason });
    }
    let file = File::open(path).map_err(BootError::doing("read", path))?;
    let length = file.metadata().map_err(BootError::doing("read", path))?.len();
    let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    unpack_tar(Counted::begin(file, "unpack", &name, length, progress), into).map_err(not)
}

/// Unpacks a compressed tar. What is in it is compiled and run, so its size is not bounded here; names and links are
/// confined to `into`.
fn unpack_tar(packed: impl std::io::Read, into: &Path) -> std::io::Result<()> {
    let mut packed = std::io::BufReader::with_capacity(1 << 16, packed);
    let kind = Compression::of(std::io::BufRead::fill_buf(&mut packed)?);
    tar::Archive::new(kind.reader(packed)?).unpack(into)
}

/// Checks that `directory` is a source that can be built from outside of it.
fn read(directory: &Path) -> Result<LinuxSource> {
    let not = |reason: &str| BootError::NotASource { path: directory.into(), reason: reason.into() };
    let mut makefile = String::new();
    let file = File::open(directory.join("Makefile")).map_err(|_| not("it has no Makefile"))?;
    file.take(1 << 20).read_to_string(&mut makefile).map_err(|_| not("its Makefile is no text"))?;
    let number = |name: &str| {
        let lines =
            makefile.lines().filter_map(|line| line.strip_prefix(name)?.trim_start().strip_prefix('='));
        lines
            .map(str::trim)
            .find(|number| !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit()))
    };
    let (Some(major), Some(minor)) = (number("VERSION"), number("PATCHLEVEL")) else {
        return Err(not("its Makefile has no version of Linux"));
    };
    if directory.join(".config").exists() || directory.join("include/config").exists() {
        return Err(not("it was built in place (clean it: make mrproper)"));
    }
    let version = match number("SUBLEVEL") {
        None | Some("0") => format!("{major}.{minor}"),
        Some(patch) => format!("{major}.{minor}.{patch}"),
    };
    // `make` runs in another directory.
    let directory = directory.canonicalize().map_err(BootError::doing("find", directory))?;
    Ok(LinuxSource { directory, version })
}
