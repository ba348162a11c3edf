//! Debian packages of kernels (`deb(5)`): an `ar` archive with a compressed tar of the files in it.
//!
//! Nothing is unpacked under the names that the archive gives: the kernel and each module go to names of our own in a
//! flat directory, so that no name, link or device in a package can reach outside of it.

use std::fs::File;
use std::io::{self, Read, Seek as _, SeekFrom};
use std::path::{Path, PathBuf};

use kiln_contract::Progress;

use crate::compression::{Compression, read_bounded};
use crate::counted::Counted;
use crate::error::{BootError, Result};
use crate::image::MAX_KERNEL;
use crate::modules::{MAX_MODULE, MAX_MODULES, module_name};

/// What the archive of every package begins with.
pub(crate) const MAGIC: &[u8] = b"!<arch>\n";

/// A header of an archive's member: name 16, date 12, owner 6, group 6, mode 8, size 10, and two bytes `` `\n``.
const HEADER: usize = 60;

/// How much a package may unpack to: Debian's kernels have 420 MB.
const MAX_UNPACKED: u64 = 4 << 30;

/// The largest list of built-in modules, and the largest configuration.
const MAX_LIST: u64 = 16 << 20;

/// The longest name of a file in the package.
const MAX_NAME: u64 = 4096;

/// What was taken out of a package, in a directory that the caller gave.
#[derive(Debug)]
pub(crate) struct Unpacked {
    /// The kernel.
    pub(crate) kernel: PathBuf,
    /// The package and what it calls the kernel: `….deb/boot/vmlinuz-…`.
    pub(crate) named: PathBuf,
    /// The modules, and `modules.builtin`.
    pub(crate) modules: PathBuf,
    /// Its configuration, if it has one.
    pub(crate) config: Option<PathBuf>,
}

/// Takes the kernel and its modules out of `packages`, into `directory`, which is empty. Debian has both in one
/// package; Ubuntu has the modules in another.
pub(crate) fn unpack(packages: &[PathBuf], directory: &Path, progress: &dyn Progress) -> Result<Unpacked> {
    let modules = directory.join("modules");
    std::fs::create_dir(&modules).map_err(BootError::doing("make", &modules))?;
    let mut taken = Taken { directory: directory.into(), ..Taken::default() };
    for package in packages {
        let tar = open(package, "unpack", progress)?;
        taken.take(tar.take(MAX_UNPACKED), package)?;
    }
    let Some((kernel_name, package)) = taken.kernel else {
        let path = packages.first().cloned().unwrap_or_default();
        return Err(BootError::NotAPackage { path, reason: "there is no boot/vmlinuz-* in it".into() });
    };
    let config = taken.has_config.then(|| directory.join("config"));
    Ok(Unpacked { kernel: directory.join("kernel"), named: package.join(kernel_name), modules, config })
}

/// The tar in `package`, decompressed. Reading it is a step that is called `verb`.
pub(crate) fn open<'a>(
    package: &Path,
    verb: &'static str,
    progress: &'a dyn Progress,
) -> Result<Box<dyn Read + 'a>> {
    let mut file = File::open(package).map_err(BootError::doing("read", package))?;
    let length = find_data(&mut file, package)?;
    let name = package.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let file = Counted::begin(file.take(length), verb, &name, length, progress);
    let mut packed = io::BufReader::with_capacity(1 << 16, file);
    let head = io::BufRead::fill_buf(&mut packed).map_err(BootError::doing("read", package))?;
    let kind = Compression::of(head);
    kind.reader(packed).map_err(BootError::doing("decompress", package))
}

/// Puts `file` at the beginning of the member `data.tar…`, and gives its length in bytes.
fn find_data(file: &mut File, package: &Path) -> Result<u64> {
    let not = |reason: &str| BootError::NotAPackage { path: package.into(), reason: reason.into() };
    let mut magic = [0; 8];
    file.read_exact(&mut magic).map_err(|_| not("it is too short"))?;
    if magic != MAGIC {
        return Err(not("it does not begin as an archive"));
    }
    // debian-binary, control.tar and data.tar; some have a signature or two more.
    for _ in 0..16 {
        let mut header = [0; HEADER];
        file.read_exact(&mut header).map_err(|_| not("it has no data.tar"))?;
        let size = std::str::from_utf8(&header[48..58]).ok().and_then(|size| size.trim_end().parse().ok());
        let size: u64 = size.filter(|_| header.ends_with(b"`\n")).ok_or_else(|| not("it is damaged"))?;
        if header.starts_with(b"data.tar") {
            return Ok(size);
        }
        // Members begin at even offsets. The size has ten digits, so the sum is no larger than i64.
        let skip = size.next_multiple_of(2).cast_signed();
        file.seek(SeekFrom::Current(skip)).map_err(BootError::doing("read", package))?;
    }
    Err(not("it has no data.tar"))
}

/// What has been taken so far.
#[derive(Debug, Default)]
struct Taken {
    directory: PathBuf,
    /// The kernel's name, and the package that it was in.
    kernel: Option<(String, PathBuf)>,
    has_config: bool,
    modules: usize,
}

impl Taken {
    fn take(&mut self, tar: impl Read, package: &Path) -> Result<()> {
        let not = |reason: String| BootError::NotAPackage { path: package.into(), reason };
        let damaged = |error: io::Error| not(format!("it is damaged: {error}"));
        let mut long_name = None;
        let mut archive = tar::Archive::new(tar);
        // Raw, since the crate would otherwise hold long names in memory, however long they are.
        for entry in archive.entries().map_err(damaged)?.raw(true) {
            let mut entry = entry.map_err(damaged)?;
            if entry.header().entry_type().is_gnu_longname() {
                let name = read_bounded(&mut entry, MAX_NAME).map_err(damaged)?;
                long_name = Some(String::from_utf8_lossy(&name).trim_end_matches('\0').to_owned());
                continue;
            }
            let short = String::from_utf8_lossy(&entry.path_bytes()).into_owned();
            let name = long_name.take().unwrap_or(short);
            if !entry.header().entry_type().is_file() {
                continue;
            }
            let name = name.trim_start_matches("./").trim_start_matches("usr/");
            let Some((target, limit)) = self.target(name, package)? else { continue };
            let mut out = File::create(&target).map_err(BootError::doing("make", &target))?;
            let written = io::copy(&mut (&mut entry).take(limit + 1), &mut out);
            if written.map_err(BootError::doing("unpack", &target))? > limit {
                return Err(not(format!("{name} has more than {limit} bytes")));
            }
        }
        Ok(())
    }

    /// Where the file `name` goes, and how large it may be; `None` if it is of no use.
    fn target(&mut self, name: &str, package: &Path) -> Result<Option<(PathBuf, u64)>> {
        let not = |reason: String| BootError::NotAPackage { path: package.into(), reason };
        let modules = self.directory.join("modules");
        if let Some(module) = module_name(name).filter(|_| name.starts_with("lib/")) {
            self.modules += 1;
            if self.modules > MAX_MODULES {
                return Err(not(format!("it has more than {MAX_MODULES} modules")));
            }
            // How it is compressed is told from its content, not from its name.
            return Ok(Some((modules.join(format!("{module}.ko")), MAX_MODULE)));
        }
        if name.starts_with("lib/modules/") && name.ends_with("/modules.builtin") {
            return Ok(Some((modules.join("modules.builtin"), MAX_LIST)));
        }
        if name.starts_with("boot/config-") {
            self.has_config = true;
            return Ok(Some((self.directory.join("config"), MAX_LIST)));
        }
        if is_kernel(name) {
            if self.kernel.replace((name.to_owned(), package.into())).is_some() {
                return Err(not("it has several kernels".into()));
            }
            return Ok(Some((self.directory.join("kernel"), MAX_KERNEL)));
        }
        Ok(None)
    }
}

/// `boot/vmlinuz-V`, and the places where a kernel lies beside its modules in packages of newer times.
fn is_kernel(name: &str) -> bool {
    let beside_modules = name.strip_prefix("lib/modules/").and_then(|rest| rest.split_once('/'));
    name.starts_with("boot/vmlinuz-") || beside_modules.is_some_and(|(_, file)| file == "vmlinuz")
}
