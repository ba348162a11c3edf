//! A writer of the cpio archives that the kernel unpacks before it runs `/init`
//! (`Documentation/driver-api/early-userspace/buffer-format.rst`, format «newc»).
//!
//! Everything belongs to root and has the time zero, so that the same content is the same bytes.

/// `S_IFDIR`, `S_IFREG` and `S_IFCHR` of `inode(7)`.
const DIRECTORY: u32 = 0o040_000;
const REGULAR: u32 = 0o100_000;
const CHARACTER: u32 = 0o020_000;

/// An archive under construction.
#[derive(Debug, Default)]
pub(crate) struct Cpio {
    bytes: Vec<u8>,
    inode: u32,
}

impl Cpio {
    pub(crate) fn with_capacity(bytes: usize) -> Self {
        Self { bytes: Vec::with_capacity(bytes), inode: 0 }
    }

    /// A directory; its parents must have been added before.
    pub(crate) fn directory(&mut self, name: &str, permissions: u32) {
        self.entry(name, DIRECTORY | permissions, 2, (0, 0), &[]);
    }

    /// A character device.
    pub(crate) fn device(&mut self, name: &str, permissions: u32, device: (u32, u32)) {
        self.entry(name, CHARACTER | permissions, 1, device, &[]);
    }

    /// A file. The format has 32 bits for its length; callers bound it far below.
    pub(crate) fn file(&mut self, name: &str, permissions: u32, content: &[u8]) {
        self.entry(name, REGULAR | permissions, 1, (0, 0), content);
    }

    /// The archive, padded to the 512 bytes that cpio's blocks have.
    pub(crate) fn finish(mut self) -> Vec<u8> {
        self.inode = u32::MAX; // becomes 0: the trailer is no file
        self.entry("TRAILER!!!", 0, 1, (0, 0), &[]);
        self.pad(512);
        self.bytes
    }

    fn entry(&mut self, name: &str, mode: u32, links: u32, device: (u32, u32), content: &[u8]) {
        self.inode = self.inode.wrapping_add(1);
        let length = u32::try_from(content.len()).unwrap_or(u32::MAX);
        debug_assert!(length < u32::MAX, "callers bound what they add");
        let name_length = name.len() as u32 + 1;
        // inode, mode, uid, gid, links, mtime, length, device (2), what a device node names (2), name length, checksum
        let fields = [self.inode, mode, 0, 0, links, 0, length, 0, 0, device.0, device.1, name_length, 0];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes.extend_from_slice(format!("{field:08X}").as_bytes());
        }
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.pad(4);
        self.bytes.extend_from_slice(content);
        self.pad(4);
    }

    fn pad(&mut self, alignment: usize) {
        self.bytes.resize(self.bytes.len().next_multiple_of(alignment), 0);
    }
}
