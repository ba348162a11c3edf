//! The configuration that a kernel was built with.

use memchr::memmem;

use crate::compression;

/// The largest configuration: distributions' have 300 kB.
pub(crate) const MAX_CONFIG: u64 = 16 << 20;

/// A kernel's configuration: lines such as `CONFIG_EROFS_FS=y`.
#[derive(Debug, Clone)]
pub(crate) struct Config(Vec<u8>);

impl Config {
    pub(crate) fn new(text: Vec<u8>) -> Self {
        Self(text)
    }

    /// The one that is kept in `kernel`, uncompressed (`CONFIG_IKCONFIG`, `kernel/configs.c`).
    pub(crate) fn embedded(kernel: &[u8]) -> Option<Self> {
        const BEGIN: &[u8] = b"IKCFG_ST";
        let packed = memmem::find_iter(kernel, BEGIN).map(|at| &kernel[at + BEGIN.len()..]);
        let texts = packed.filter(|packed| packed.starts_with(b"\x1f\x8b"));
        texts.filter_map(|packed| compression::unpack(packed, MAX_CONFIG).ok()).next().map(Self)
    }

    /// Whether `option` is built in.
    pub(crate) fn has(&self, option: &str) -> bool {
        let wanted = format!("{option}=y");
        self.0.split(|&byte| byte == b'\n').any(|line| line.trim_ascii_end() == wanted.as_bytes())
    }

    pub(crate) fn text(&self) -> &[u8] {
        &self.0
    }
}
