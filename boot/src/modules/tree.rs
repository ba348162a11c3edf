//! The modules that come with a kernel: files by name, and the names of what is built in.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::path::{Path, PathBuf};

use super::modinfo::{is_module_name, normal};
use super::wanted::Wanted;
use crate::compression;
use crate::error::{BootError, Result};

/// The largest module, packed or not: the largest of distributions' have some 10 MB.
pub(crate) const MAX_MODULE: u64 = 64 << 20;

/// More files than any distribution's kernel has (4000), and fewer than would take long.
pub(crate) const MAX_MODULES: usize = 50_000;

/// The largest `modules.builtin` or `modules.builtin.modinfo`.
const MAX_LIST: u64 = 16 << 20;

/// A kernel's modules.
#[derive(Debug, Default)]
pub(crate) struct ModuleTree {
    files: BTreeMap<String, PathBuf>,
    builtin: BTreeSet<String>,
}

impl ModuleTree {
    /// The modules below `directory`, which is `/lib/modules/VERSION` or looks like it.
    pub(crate) fn read(directory: &Path) -> Result<Self> {
        let mut tree = Self::default();
        let mut pending = vec![directory.to_path_buf()];
        while let Some(current) = pending.pop() {
            let failed = |error| BootError::doing("list", &current)(error);
            for entry in fs::read_dir(&current).map_err(failed)? {
                let entry = entry.map_err(BootError::doing("list", &current))?;
                let kind = entry.file_type().map_err(BootError::doing("read", &entry.path()))?;
                // `build` and `source` are symbolic links out of it.
                if kind.is_dir() {
                    pending.push(entry.path());
                } else if kind.is_file() {
                    tree.add(entry.path());
                }
            }
            if tree.files.len() + pending.len() > MAX_MODULES {
                let reason = format!("it has more than {MAX_MODULES} files");
                return Err(BootError::BadModule { path: directory.into(), reason });
            }
        }
        if let Some(list) = read_list(&directory.join("modules.builtin"))? {
            tree.builtin.extend(list.lines().filter_map(module_name));
        }
        Ok(tree)
    }

    /// Adds a file if it is a module. What is in `updates` or `extra` goes before the kernel's own, as for depmod.
    fn add(&mut self, path: PathBuf) {
        let Some(name) = path.to_str().and_then(module_name) else { return };
        let is_own = |path: &Path| path.components().any(|part| part.as_os_str() == "kernel");
        match self.files.get(&name) {
            Some(known) if !is_own(known) || is_own(&path) => {}
            _ => {
                self.files.insert(name, path);
            }
        }
    }

    /// Whether nothing is known of it.
    pub(crate) fn is_empty(&self) -> bool {
        self.files.is_empty() && self.builtin.is_empty()
    }

    /// Names parts more that are built in.
    pub(crate) fn add_builtin<'a>(&mut self, parts: impl IntoIterator<Item = &'a Wanted>) {
        self.builtin.extend(parts.into_iter().map(|part| part.module.to_owned()));
    }

    pub(crate) fn is_builtin(&self, name: &str) -> bool {
        self.builtin.contains(name)
    }

    pub(crate) fn file(&self, name: &str) -> Option<&Path> {
        self.files.get(name).map(PathBuf::as_path)
    }

    /// The module `name`, decompressed.
    pub(crate) fn load(&self, name: &str) -> Result<Option<Vec<u8>>> {
        let Some(path) = self.file(name) else { return Ok(None) };
        let file = File::open(path).map_err(BootError::doing("read", path))?;
        let packed = compression::read_bounded(file, MAX_MODULE).map_err(BootError::doing("read", path))?;
        compression::unpack(&packed, MAX_MODULE).map(Some).map_err(BootError::doing("decompress", path))
    }
}

/// `crc32c_generic` of `kernel/crypto/crc32c-generic.ko.xz`; `None` if that is no module's path.
pub(crate) fn module_name(path: &str) -> Option<String> {
    let file = path.rsplit('/').next()?;
    let stem = [".ko", ".ko.xz", ".ko.zst", ".ko.gz"].iter().find_map(|end| file.strip_suffix(end))?;
    Some(normal(stem)).filter(|name| is_module_name(name))
}

/// The text of a list, if it is there.
fn read_list(path: &Path) -> Result<Option<String>> {
    let file = match File::open(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        other => other.map_err(BootError::doing("read", path))?,
    };
    let bytes = compression::read_bounded(file, MAX_LIST).map_err(BootError::doing("read", path))?;
    Ok(Some(String::from_utf8_lossy(&bytes).into_owned()))
}
