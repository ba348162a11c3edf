//! The kernels of a home: installing, finding, choosing and removing them.
//!
//! A kernel is made in a hidden directory and renamed, so that one that can be seen is complete.

use std::fs;
use std::io;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use jiff::Timestamp;
use kiln_contract::{Digest, Home, Progress};

use crate::arch::Arch;
use crate::config::Config;
use crate::error::{BootError, Result};
use crate::found;
use crate::image::{Image, MAX_KERNEL};
use crate::kernel::{
    FORMAT, IMAGE, Kernel, KernelRecord, ModuleRecord, Source, VMLINUX, module_file, read_file,
};
use crate::modules::{self, ModuleTree, Resolved, WANTED};
use crate::staging::{self, Staging};
use crate::version;

/// The name of the symbolic link to the default kernel.
const DEFAULT: &str = "default";

/// The kernels of a home.
#[derive(Debug)]
pub struct Kernels {
    directory: PathBuf,
}

impl Kernels {
    /// The kernels of `home`. Nothing is touched.
    pub fn open(home: &Home) -> Self {
        Self { directory: home.kernels() }
    }

    /// Installs a kernel with what machines need of its modules, under `name` or, without one, its version. A kernel
    /// that is installed already under this name is given back as it is. Distributions give several kernels the same
    /// version; the next ones are named `VERSION-2` and so on.
    ///
    /// # Errors
    /// [`BootError::Lacks`] names what the kernel would have to have; [`BootError::NameTaken`] if another kernel has
    /// the name; [`BootError::NotAKernel`], [`BootError::NotAPackage`], [`BootError::NotASource`] and
    /// [`BootError::NoKernel`] for what cannot be installed; [`BootError::ToolsMissing`] for what takes programs that
    /// are not there.
    pub fn install(&self, source: &Source, name: Option<&str>, progress: &dyn Progress) -> Result<Kernel> {
        name.map_or(Ok(()), check_name)?;
        let staging = Staging::begin(&self.directory)?;
        let found = found::find(source, staging.path(), progress)?;
        let kernel = read_file(&found.kernel, MAX_KERNEL)?;
        let of_kernel = Digest::of(&kernel);
        let image = Image::read(kernel, &found.named)?;
        let config = found.config.or_else(|| image.config());
        let tree = built_in(found.modules, config.as_ref(), progress);
        let mut resolved = modules::resolve(&tree, &image.version, WANTED)?;
        // A kernel that insists on signatures is left all it has, and so is one of which it is not known.
        if config.as_ref().is_some_and(|config| !config.has("CONFIG_MODULE_SIG_FORCE")) {
            resolved.modules.iter_mut().for_each(|module| modules::slim(&mut module.content));
        }
        let digest = digest(of_kernel, &resolved);
        let made = staging.path().join("made");
        let mut record = record(source, digest, &image, &resolved);
        write(&made, &image, &resolved, config.as_ref())?;
        staging.settle()?;
        let lock = staging::lock(&self.directory)?;
        record.name = match self.name(name, &image.version, digest)? {
            Name::Free(name) => name,
            Name::Installed(kernel) => return Ok(*kernel),
        };
        write_record(&made, &record)?;
        let target = self.directory.join(&record.name);
        fs::rename(&made, &target).map_err(BootError::doing("make", &target))?;
        drop(lock);
        Kernel::load(&target)
    }

    /// The name for a new kernel: the one that was asked for, or one made from its version.
    fn name(&self, asked: Option<&str>, version: &str, digest: Digest) -> Result<Name> {
        let names: Vec<String> = match asked {
            Some(name) => vec![name.to_owned()],
            None => std::iter::once(version.to_owned())
                .chain((2..100).map(|number| format!("{version}-{number}")))
                .collect(),
        };
        for name in &names {
            check_name(name)?;
            let directory = self.directory.join(name);
            if !directory.exists() {
                return Ok(Name::Free(name.clone()));
            }
            match Kernel::load(&directory) {
                Ok(kernel) if kernel.digest() == digest => return Ok(Name::Installed(Box::new(kernel))),
                Err(error) if asked.is_some() => return Err(error),
                _ => {}
            }
        }
        Err(BootError::NameTaken { name: names.into_iter().next().unwrap_or_default() })
    }

    /// Installs from the first of `sources` that has a kernel for machines, as [`Self::install`] does. Why the others
    /// have none is told as notes.
    ///
    /// # Errors
    /// As for the last of `sources`.
    pub fn install_first(
        &self,
        sources: &[Source],
        name: Option<&str>,
        progress: &dyn Progress,
    ) -> Result<Kernel> {
        let (last, others) = sources.split_last().ok_or(BootError::NoneInstalled)?;
        for source in others {
            match self.install(source, name, progress) {
                Err(
                    error @ (BootError::NoKernel { .. } | BootError::Lacks { .. } | BootError::System { .. }),
                ) => progress.note(&error.to_string()),
                other => return other,
            }
        }
        self.install(last, name, progress)
    }

    /// All kernels, the newest version first, and of several with the same the one that was installed last.
    ///
    /// # Errors
    /// If the directory cannot be read. Kernels whose record cannot be read are left out.
    pub fn list(&self) -> Result<Vec<Kernel>> {
        let entries = match fs::read_dir(&self.directory) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            other => other.map_err(BootError::doing("list", &self.directory))?,
        };
        let mut kernels = Vec::new();
        for entry in entries {
            let name = entry.map_err(BootError::doing("list", &self.directory))?.file_name();
            if let Some(name) = name.to_str().filter(|name| check_name(name).is_ok()) {
                // One that cannot be read must not keep the others from being used, nor itself from being removed.
                match Kernel::load(&self.directory.join(name)) {
                    Ok(kernel) => kernels.push(kernel),
                    Err(error) => tracing::warn!("{error}"),
                }
            }
        }
        kernels.sort_by(|a, b| {
            version::compare(b.version(), a.version())
                .then_with(|| b.record().created.cmp(&a.record().created))
                .then_with(|| a.name().cmp(b.name()))
        });
        Ok(kernels)
    }

    /// The kernel `name`.
    ///
    /// # Errors
    /// [`BootError::NoSuchKernel`].
    pub fn find(&self, name: &str) -> Result<Kernel> {
        check_name(name)?;
        let directory = self.directory.join(name);
        if !directory.exists() {
            return Err(BootError::NoSuchKernel { name: name.into() });
        }
        Kernel::load(&directory)
    }

    /// The kernel that machines boot if none is named: the one that was chosen, else the newest for this host's
    /// processors.
    ///
    /// # Errors
    /// [`BootError::NoneInstalled`].
    pub fn default(&self) -> Result<Kernel> {
        if let Some(name) = self.chosen()
            && let Ok(kernel) = self.find(&name)
        {
            return Ok(kernel);
        }
        let fits = |kernel: &Kernel| Some(kernel.arch()) == Arch::host();
        self.list()?.into_iter().find(fits).ok_or(BootError::NoneInstalled)
    }

    /// Makes `name` the default.
    ///
    /// # Errors
    /// [`BootError::NoSuchKernel`]; [`BootError::OtherArchitecture`] for one that cannot run here.
    pub fn set_default(&self, name: &str) -> Result<Kernel> {
        let kernel = self.find(name)?;
        if Some(kernel.arch()) != Arch::host() {
            return Err(BootError::OtherArchitecture {
                name: name.into(),
                found: kernel.arch().to_string(),
                host: std::env::consts::ARCH.into(),
            });
        }
        let lock = staging::lock(&self.directory)?;
        let link = self.directory.join(DEFAULT);
        let new = staging::name_for(&self.directory, DEFAULT);
        symlink(name, &new).map_err(BootError::doing("make", &new))?;
        fs::rename(&new, &link).map_err(BootError::doing("make", &link))?;
        drop(lock);
        Ok(kernel)
    }

    /// Removes the kernel `name`; the default one only with `force`.
    ///
    /// # Errors
    /// [`BootError::NoSuchKernel`], [`BootError::IsDefault`].
    pub fn remove(&self, name: &str, force: bool) -> Result<()> {
        check_name(name)?;
        let directory = self.directory.join(name);
        if !directory.exists() {
            return Err(BootError::NoSuchKernel { name: name.into() });
        }
        let is_default = self.default().is_ok_and(|default| default.name() == name);
        if is_default && !force {
            return Err(BootError::IsDefault { name: name.into() });
        }
        let lock = staging::lock(&self.directory)?;
        // Renamed first: a kernel is there whole, or not at all.
        let doomed = staging::name_for(&self.directory, "removed");
        fs::rename(&directory, &doomed).map_err(BootError::doing("remove", &directory))?;
        if self.chosen().as_deref() == Some(name) {
            let link = self.directory.join(DEFAULT);
            fs::remove_file(&link).map_err(BootError::doing("remove", &link))?;
        }
        fs::remove_dir_all(&doomed).map_err(BootError::doing("remove", &doomed))?;
        drop(lock);
        Ok(())
    }

    /// The name that the link `default` has, if there is one.
    fn chosen(&self) -> Option<String> {
        let target = fs::read_link(self.directory.join(DEFAULT)).ok()?;
        target.to_str().filter(|name| check_name(name).is_ok()).map(str::to_owned)
    }
}

/// What is to be done with a new kernel.
enum Name {
    /// It gets this name.
    Free(String),
    /// It is there already.
    Installed(Box<Kernel>),
}

/// `modules`, with what is built in by the configuration.
fn built_in(mut modules: ModuleTree, config: Option<&Config>, progress: &dyn Progress) -> ModuleTree {
    match config {
        Some(config) => modules.add_builtin(WANTED.iter().filter(|wanted| config.has(wanted.config))),
        // A kernel alone, of which nothing is known: it is taken for a monolithic one.
        None if modules.is_empty() => {
            progress.note("the kernel does not say what is in it: it may lack what machines need");
            modules.add_builtin(WANTED);
        }
        None => {}
    }
    modules
}

/// All that is known of a kernel but its name.
fn record(source: &Source, digest: Digest, image: &Image, resolved: &Resolved) -> KernelRecord {
    let kernels = image.content.len() + image.vmlinux.as_ref().map_or(0, |vmlinux| vmlinux.elf.len());
    let modules_size: usize = resolved.modules.iter().map(|module| module.content.len()).sum();
    let modules = resolved.modules.iter().map(|module| ModuleRecord {
        name: module.name.clone(),
        needs: module.needs.clone(),
        aliases: module.aliases.iter().filter(|alias| is_asked_for(alias)).cloned().collect(),
        at_boot: module.at_boot,
    });
    KernelRecord {
        format: FORMAT,
        name: String::new(),
        version: image.version.clone(),
        arch: image.arch,
        source: source.clone(),
        digest,
        created: Timestamp::now(),
        form: image.form,
        size: (kernels + modules_size) as u64,
        vmlinux: image.vmlinux.is_some(),
        pvh: image.vmlinux.as_ref().is_some_and(|vmlinux| vmlinux.pvh),
        modules: modules.collect(),
        builtin: resolved.builtin.iter().map(|&name| name.to_owned()).collect(),
        absent: resolved.absent.iter().map(|missing| missing.config.to_owned()).collect(),
    }
}

/// Whether a module is asked for by this name. Those of devices have colons and patterns, and no device comes later;
/// anything else that is not plain would not stand on a line of a list.
fn is_asked_for(alias: &str) -> bool {
    alias.bytes().all(|byte| byte.is_ascii_graphic() && !b":*?[".contains(&byte))
}

/// Of the kernel and its modules, each by its digest, so that nothing can move from one into the next.
fn digest(kernel: Digest, resolved: &Resolved) -> Digest {
    let mut list = format!("kernel {kernel}\n");
    for module in &resolved.modules {
        list += &format!("{} {} {}\n", module.name, module.at_boot, Digest::of(&module.content));
    }
    Digest::of(list.as_bytes())
}

/// A file of a kernel.
fn put(path: &Path, content: &[u8]) -> Result<()> {
    fs::write(path, content).map_err(BootError::doing("write", path))
}

fn write_record(directory: &Path, record: &KernelRecord) -> Result<()> {
    let path = directory.join("kernel.json");
    let mut json = serde_json::to_vec_pretty(record)
        .map_err(|error| BootError::Format { path: path.clone(), reason: error.to_string() })?;
    json.push(b'\n');
    put(&path, &json)?;
    let file = fs::File::open(&path).and_then(|file| file.sync_all());
    file.map_err(BootError::doing("write out", &path))
}

/// Everything but the record.
fn write(directory: &Path, image: &Image, resolved: &Resolved, config: Option<&Config>) -> Result<()> {
    let modules = directory.join("modules");
    fs::create_dir_all(&modules).map_err(BootError::doing("make", &modules))?;
    if !image.content.is_empty() {
        put(&directory.join(IMAGE), &image.content)?;
    }
    if let Some(vmlinux) = &image.vmlinux {
        put(&directory.join(VMLINUX), &vmlinux.elf)?;
    }
    for module in &resolved.modules {
        put(&module_file(directory, &module.name), &module.content)?;
    }
    if let Some(config) = config {
        put(&directory.join("config"), config.text())?;
    }
    Ok(())
}

/// Names are directories, and appear in tables and on command lines.
fn check_name(name: &str) -> Result<()> {
    let fits = |byte: u8| byte.is_ascii_alphanumeric() || b"_.+~-".contains(&byte);
    let starts = name.bytes().next().is_some_and(|byte| byte.is_ascii_alphanumeric());
    if starts && name.len() <= 100 && name.bytes().all(fits) && name != DEFAULT {
        Ok(())
    } else {
        Err(BootError::BadName { name: name.chars().take(120).collect() })
    }
}
