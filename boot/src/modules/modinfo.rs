//! What a kernel module says of itself: `NAME=VALUE` strings in the ELF section `.modinfo`
//! (`include/linux/moduleinfo.h`).

use std::path::Path;

use object::read::elf::{ElfFile64, FileHeader as _};
use object::{Object as _, ObjectSection as _};

use crate::error::{BootError, Result};

/// The strings that matter here.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct ModInfo {
    /// Its name, with `_` where files may have `-`.
    pub(crate) name: String,
    /// Modules whose symbols it uses.
    pub(crate) depends: Vec<String>,
    /// Names (of modules, or aliases) that should be loaded before it.
    pub(crate) wants: Vec<String>,
    /// Names that the kernel may ask for it by.
    pub(crate) aliases: Vec<String>,
    /// The version of the kernel that it is for.
    pub(crate) kernel: String,
}

impl ModInfo {
    /// Reads the module `elf` of the file `path`.
    pub(crate) fn read(elf: &[u8], path: &Path) -> Result<Self> {
        let bad = |reason: String| BootError::BadModule { path: path.into(), reason };
        let file = ElfFile64::<object::Endianness>::parse(elf).map_err(|error| bad(error.to_string()))?;
        if file.elf_header().e_type(file.endian()) != object::elf::ET_REL {
            return Err(bad("it is no relocatable object".into()));
        }
        let section = file.section_by_name(".modinfo").ok_or_else(|| bad("it has no .modinfo".into()))?;
        let strings = section.data().map_err(|error| bad(error.to_string()))?;
        Ok(Self::parse(strings))
    }

    fn parse(strings: &[u8]) -> Self {
        let mut info = Self::default();
        for string in strings.split(|&byte| byte == 0) {
            let Ok(string) = std::str::from_utf8(string) else { continue };
            match string.split_once('=') {
                Some(("name", name)) => info.name = normal(name),
                Some(("depends", names)) => {
                    info.depends.extend(names.split(',').filter(|name| !name.is_empty()).map(normal));
                }
                Some(("softdep", names)) => info.wants.extend(before(names)),
                Some(("alias", alias)) => info.aliases.push(alias.into()),
                Some(("vermagic", magic)) => {
                    info.kernel = magic.split(' ').next().unwrap_or_default().into();
                }
                _ => {}
            }
        }
        info
    }
}

/// The names after `pre:` in «pre: A B post: C» (modprobe.d(5), softdep).
fn before(names: &str) -> Vec<String> {
    let mut wanted = Vec::new();
    let mut is_before = false;
    for word in names.split_ascii_whitespace() {
        match word {
            "pre:" => is_before = true,
            "post:" => is_before = false,
            name if is_before => wanted.push(normal(name)),
            _ => {}
        }
    }
    wanted
}

/// What the kernel itself allows: names are C identifiers, but for a digit in front (`9p`). They become names of files
/// and stand on lines of lists.
pub(crate) fn is_module_name(name: &str) -> bool {
    // MODULE_NAME_LEN, less the final zero.
    (1..56).contains(&name.len()) && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_')
}

/// A module's name as the kernel has it: files and lists may have `-` for `_`.
pub(crate) fn normal(name: &str) -> String {
    name.replace('-', "_")
}
