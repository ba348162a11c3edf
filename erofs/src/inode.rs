//! Inodes in images: attributes and data.

use std::borrow::Cow;

use kiln_contract::Digest;

use crate::format::{
    BLOCK, BLOCK_BITS, CHUNK_FORMAT, COMPACT_SIZE, EXTENDED_SIZE, INLINE_LAYOUTS, LAYOUT_CHUNKS,
    LAYOUT_INLINE, LAYOUT_PLAIN, S_IFBLK, S_IFCHR, S_IFDIR, S_IFIFO, S_IFLNK, S_IFMT, S_IFREG, S_IFSOCK,
    SLOT, SYMLINK_MAX, XATTR_HEADER,
};
use crate::read::{u16_at, u32_at, u64_at};
use crate::{
    Attributes, Content, Data, Device, INLINE_LIMIT, Image, ImageError, Nid, Time, Xattrs,
    unescape_xattr_name, xattr,
};

/// What an inode is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FileType {
    /// A directory.
    Directory,
    /// A file.
    Regular,
    /// A symbolic link.
    Symlink,
    /// A character device.
    CharDevice,
    /// A block device.
    BlockDevice,
    /// A named pipe.
    Fifo,
    /// A Unix socket's name.
    Socket,
}

/// An inode, read and checked as far as its own bytes go.
#[derive(Debug, Clone, Copy)]
pub struct Inode<'a> {
    pub(crate) image: Image<'a>,
    nid: Nid,
    file_type: FileType,
    layout: u16,
    mode: u32,
    links: u32,
    uid: u32,
    gid: u32,
    mtime: Time,
    size: u64,
    /// First block, or device number, or chunk format.
    location: u32,
    xattrs_at: u64,
    xattrs_size: u64,
}

impl<'a> Inode<'a> {
    pub(crate) fn read(image: Image<'a>, nid: Nid) -> Result<Self, ImageError> {
        let wrong = |what| ImageError::Inode { nid, what };
        let offset = nid
            .checked_mul(SLOT)
            .and_then(|at| at.checked_add(image.metadata_at))
            .ok_or_else(|| wrong("there is none so far"))?;
        let compact = image.slice(offset, COMPACT_SIZE as u64, "an inode")?;
        let format = u16_at(compact, 0);
        if format & !0xf != 0 {
            return Err(wrong("its format is not known"));
        }
        let layout = format >> 1;
        if !INLINE_LAYOUTS.contains(&layout) && layout != LAYOUT_CHUNKS {
            return Err(ImageError::Unsupported { what: "compressed files" });
        }
        let full_mode = u32::from(u16_at(compact, 4));
        let file_type = match full_mode & S_IFMT {
            S_IFDIR => FileType::Directory,
            S_IFREG => FileType::Regular,
            S_IFLNK => FileType::Symlink,
            S_IFCHR => FileType::CharDevice,
            S_IFBLK => FileType::BlockDevice,
            S_IFIFO => FileType::Fifo,
            S_IFSOCK => FileType::Socket,
            _ => return Err(wrong("its file type is not known")),
        };
        let xattrs_size = match u64::from(u16_at(compact, 2)) {
            0 => 0,
            count => XATTR_HEADER as u64 + 4 * (count - 1),
        };
        let mut inode = Self {
            image,
            nid,
            file_type,
            layout,
            mode: full_mode & 0o7777,
            links: u16_at(compact, 6).into(),
            uid: u16_at(compact, 24).into(),
            gid: u16_at(compact, 26).into(),
            mtime: image.epoch,
            size: u32_at(compact, 8).into(),
            location: u32_at(compact, 16),
            xattrs_at: offset + COMPACT_SIZE as u64,
            xattrs_size,
        };
        if format & 1 == 1 {
            let extended = image.slice(offset, EXTENDED_SIZE as u64, "an inode")?;
            inode.links = u32_at(extended, 44);
            inode.uid = u32_at(extended, 24);
            inode.gid = u32_at(extended, 28);
            inode.mtime =
                Time { seconds: u64_at(extended, 32).cast_signed(), nanoseconds: u32_at(extended, 40) };
            inode.size = u64_at(extended, 8);
            inode.xattrs_at = offset + EXTENDED_SIZE as u64;
        }
        if inode.mtime.nanoseconds >= 1_000_000_000 {
            return Err(wrong("its time is none"));
        }
        if i64::try_from(inode.size).is_err() {
            return Err(wrong("its size is negative"));
        }
        if layout == LAYOUT_CHUNKS && file_type != FileType::Regular {
            return Err(wrong("only files can be in chunks"));
        }
        if layout == LAYOUT_CHUNKS && inode.location & !CHUNK_FORMAT != 0 {
            return Err(wrong("its chunk format is not known"));
        }
        image.slice(inode.xattrs_at, xattrs_size, "xattrs")?;
        Ok(inode)
    }

    /// Its number.
    pub fn nid(&self) -> Nid {
        self.nid
    }

    /// What it is.
    pub fn file_type(&self) -> FileType {
        self.file_type
    }

    /// Permission bits.
    pub fn mode(&self) -> u32 {
        self.mode
    }

    /// Owner.
    pub fn uid(&self) -> u32 {
        self.uid
    }

    /// Group.
    pub fn gid(&self) -> u32 {
        self.gid
    }

    /// Modification time.
    pub fn mtime(&self) -> Time {
        self.mtime
    }

    /// Number of links, as the image states it.
    pub fn links(&self) -> u32 {
        self.links
    }

    /// Size in bytes; of a directory the size of its blocks. At most 2^63 - 1, and not to be trusted for allocations.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// A device's number.
    pub fn device(&self) -> Option<Device> {
        matches!(self.file_type, FileType::CharDevice | FileType::BlockDevice).then(|| Device {
            major: (self.location >> 8) & 0xfff,
            minor: (self.location & 0xff) | ((self.location >> 12) & 0xf_ff00),
        })
    }

    /// Whether it stands for a name that a layer removes: overlayfs's character device 0:0.
    pub fn is_whiteout(&self) -> bool {
        self.file_type == FileType::CharDevice && self.device() == Some(Device { major: 0, minor: 0 })
    }

    /// A symlink's target.
    ///
    /// # Errors
    /// It is none, is damaged, or is longer than a path can be.
    pub fn symlink_target(&self) -> Result<&'a [u8], ImageError> {
        let wrong = |what| ImageError::Inode { nid: self.nid, what };
        if self.file_type != FileType::Symlink {
            return Err(wrong("it is not a symlink"));
        }
        if self.size == 0 || self.size > SYMLINK_MAX as u64 {
            return Err(wrong("a symlink's target has 1 to 4095 bytes"));
        }
        let target = self.piece(0, self.size)?;
        if target.contains(&0) {
            return Err(wrong("a symlink's target has a NUL"));
        }
        Ok(target)
    }

    /// The object that a file's overlay xattrs name: where the data are that [`Inode::embedded`] does not have.
    ///
    /// # Errors
    /// Its xattrs are damaged, or redirect to something else than an object.
    pub fn object(&self) -> Result<Option<Digest>, ImageError> {
        self.raw_xattr(xattr::REDIRECT)?.map(|path| self.named_object(path)).transpose()
    }

    /// Where a regular file's data are: inline, or in an object that its overlay xattrs name. The bytes of a file that
    /// is embedded whole (and larger than [`INLINE_LIMIT`]) are hashed to name the object that they are.
    ///
    /// # Errors
    /// It is no regular file, or damaged.
    pub fn data(&self) -> Result<Data, ImageError> {
        if let Some(digest) = self.object()? {
            return Ok(Data::Object { digest, size: self.size });
        }
        let bytes = self.embedded()?;
        Ok(if bytes.len() <= INLINE_LIMIT {
            Data::Inline(bytes.into_owned())
        } else {
            Data::Object { digest: Digest::of(&bytes), size: self.size }
        })
    }

    /// A regular file's bytes where the image has them: inline files, and all files of an image with data. Borrowed
    /// wherever they lie together, which they always do in Kiln's images.
    ///
    /// # Errors
    /// It is no regular file, or its data are not in the image.
    pub fn embedded(&self) -> Result<Cow<'a, [u8]>, ImageError> {
        let wrong = |what| ImageError::Inode { nid: self.nid, what };
        if self.file_type != FileType::Regular {
            return Err(wrong("it is not a regular file"));
        }
        if self.layout == LAYOUT_CHUNKS {
            return Err(wrong("its data are not in the image, and no object is named"));
        }
        let blocks = self.size / BLOCK * BLOCK;
        if self.layout == LAYOUT_PLAIN || blocks == 0 || blocks == self.size {
            return self.piece(0, self.size).map(Cow::Borrowed);
        }
        let (head, tail) = (self.piece(0, blocks)?, self.piece(blocks, self.size - blocks)?);
        Ok(Cow::Owned([head, tail].concat()))
    }

    /// All xattrs but those that the writer itself made for objects (`metacopy`, `redirect`), by their names in a
    /// tree ([`unescape_xattr_name`]).
    ///
    /// # Errors
    /// They are damaged.
    pub fn xattrs(&self) -> Result<Xattrs, ImageError> {
        self.read_xattrs().map(|(xattrs, ..)| xattrs)
    }

    /// All that xattrs say, in one walk: those of the tree, the object, and how many bytes they are.
    pub(crate) fn read_xattrs(&self) -> Result<(Xattrs, Option<Digest>, u64), ImageError> {
        let wrong = |what| ImageError::Xattr { nid: self.nid, what };
        let (mut xattrs, mut object, mut bytes) = (Xattrs::new(), None, 0);
        let mut full = Vec::new();
        for entry in self.raw_xattrs() {
            let (prefix, rest, value) = entry?;
            bytes += (prefix.len() + rest.len() + value.len()) as u64;
            if bytes > self.image.len() {
                return Err(ImageError::Overlap);
            }
            full.clear();
            full.extend_from_slice(prefix);
            full.extend_from_slice(rest);
            if full.is_empty() || full.contains(&0) {
                return Err(wrong("a name is empty or has a NUL"));
            }
            if let Some(name) = unescape_xattr_name(&full) {
                if xattrs.insert(name.into_owned(), value.to_owned()).is_some() {
                    return Err(wrong("a name stands twice"));
                }
            } else if self.file_type == FileType::Regular && full == xattr::REDIRECT && object.is_none() {
                object = Some(self.named_object(value)?);
            }
        }
        Ok((xattrs, object, bytes))
    }

    fn named_object(&self, path: &[u8]) -> Result<Digest, ImageError> {
        let what = "the redirect does not name an object";
        xattr::redirected_object(path).ok_or(ImageError::Xattr { nid: self.nid, what })
    }

    /// One of [`Inode::xattrs`].
    ///
    /// # Errors
    /// They are damaged.
    pub fn xattr(&self, name: &[u8]) -> Result<Option<&'a [u8]>, ImageError> {
        let escaped = crate::escape_xattr_name(name);
        self.raw_xattr(&escaped)
    }

    /// Everything of it that is neither place nor data.
    ///
    /// # Errors
    /// Its xattrs are damaged.
    pub fn attributes(&self) -> Result<Attributes, ImageError> {
        self.xattrs().map(|xattrs| self.attributes_with(xattrs))
    }

    pub(crate) fn attributes_with(&self, xattrs: Xattrs) -> Attributes {
        let Self { mode, uid, gid, mtime, .. } = *self;
        Attributes { mode, uid, gid, mtime, xattrs }
    }

    /// What it is for a tree, in one walk over its xattrs. The entries of a directory are not looked at.
    ///
    /// # Errors
    /// Its xattrs are damaged, or its data or its target are ([`Inode::data`], [`Inode::symlink_target`]).
    pub fn described(&self) -> Result<(Content, Attributes), ImageError> {
        let (xattrs, object, _) = self.read_xattrs()?;
        Ok((self.content(object)?, self.attributes_with(xattrs)))
    }

    /// Its content; `object` is what its xattrs name.
    pub(crate) fn content(&self, object: Option<Digest>) -> Result<Content, ImageError> {
        let device =
            || self.device().ok_or(ImageError::Inode { nid: self.nid, what: "a device has no number" });
        Ok(match self.file_type {
            FileType::Directory => Content::Directory,
            FileType::Regular => Content::Regular(match object {
                Some(digest) => Data::Object { digest, size: self.size },
                None => self.data()?,
            }),
            FileType::Symlink => Content::Symlink(self.symlink_target()?.to_owned()),
            FileType::CharDevice => Content::CharDevice(device()?),
            FileType::BlockDevice => Content::BlockDevice(device()?),
            FileType::Fifo => Content::Fifo,
            FileType::Socket => Content::Socket,
        })
    }

    /// Its own bytes, with its inline xattrs.
    pub(crate) fn header_size(&self) -> u64 {
        COMPACT_SIZE as u64 + self.xattrs_size
    }

    /// Where its blocks begin, if it has any.
    pub(crate) fn blocks_at(&self) -> Option<u64> {
        let has = match self.layout {
            LAYOUT_PLAIN => self.size > 0,
            LAYOUT_INLINE => self.size >= BLOCK,
            _ => false,
        };
        has.then(|| u64::from(self.location) * BLOCK)
    }

    /// Bytes of the data that lie together: within the blocks, or within what is inline.
    pub(crate) fn piece(&self, from: u64, length: u64) -> Result<&'a [u8], ImageError> {
        let inline_from = self.size / BLOCK * BLOCK;
        if self.layout == LAYOUT_INLINE && from >= inline_from {
            let offset = self.xattrs_at + self.xattrs_size;
            // The kernel refuses what crosses a block here.
            if offset % BLOCK + (self.size - inline_from) > BLOCK {
                return Err(ImageError::Inode { nid: self.nid, what: "its inline data cross a block" });
            }
            return self.image.slice(offset + (from - inline_from), length, "inline data");
        }
        let start = (u64::from(self.location) << BLOCK_BITS).checked_add(from);
        let start = start.ok_or(ImageError::Truncated { what: "data", offset: from })?;
        self.image.slice(start, length, "data")
    }

    fn raw_xattr(&self, full_name: &[u8]) -> Result<Option<&'a [u8]>, ImageError> {
        for entry in self.raw_xattrs() {
            let (prefix, rest, value) = entry?;
            if full_name.strip_prefix(prefix) == Some(rest) {
                return Ok(Some(value));
            }
        }
        Ok(None)
    }

    fn raw_xattrs(&self) -> RawXattrs<'a> {
        let body = self.image.slice(self.xattrs_at, self.xattrs_size, "xattrs").unwrap_or_default();
        let (shared, inline) = match body.get(XATTR_HEADER..) {
            Some(rest) => rest.split_at((4 * usize::from(body[4])).min(rest.len())),
            None => (&[][..], &[][..]),
        };
        RawXattrs { image: self.image, nid: self.nid, inline, shared }
    }
}

/// xattrs as they stand: inline ones, then shared ones. Ends with the first error.
struct RawXattrs<'a> {
    image: Image<'a>,
    nid: Nid,
    inline: &'a [u8],
    shared: &'a [u8],
}

impl<'a> Iterator for RawXattrs<'a> {
    type Item = Result<(&'static [u8], &'a [u8], &'a [u8]), ImageError>;

    fn next(&mut self) -> Option<Self::Item> {
        // mkfs.erofs may leave zeros at the end: a name of no length without prefix is none.
        while self.inline.len() >= 4 && self.inline[..4] == [0; 4] {
            self.inline = &self.inline[4..];
        }
        let entry = if self.inline.is_empty() {
            let (id, rest) = self.shared.split_first_chunk::<4>()?;
            self.shared = rest;
            let at = self.image.shared_xattrs_at + 4 * u64::from(u32::from_le_bytes(*id));
            let length = self.image.len().saturating_sub(at);
            self.image.slice(at, length, "a shared xattr").and_then(|bytes| self.entry(bytes))
        } else {
            self.entry(self.inline).map(|(entry, length)| {
                self.inline = self.inline.get(length..).unwrap_or_default();
                (entry, length)
            })
        };
        if entry.is_err() {
            (self.inline, self.shared) = (&[], &[]);
        }
        Some(entry.map(|(entry, _)| entry))
    }
}

type RawXattr<'a> = (&'static [u8], &'a [u8], &'a [u8]);

impl<'a> RawXattrs<'a> {
    fn entry(&self, bytes: &'a [u8]) -> Result<(RawXattr<'a>, usize), ImageError> {
        let wrong = |what| ImageError::Xattr { nid: self.nid, what };
        let (header, rest) = bytes.split_first_chunk::<4>().ok_or_else(|| wrong("an entry is cut off"))?;
        let prefix = xattr::prefix(header[1]).ok_or_else(|| wrong("a prefix is not known"))?;
        let (name_length, value_length) = (usize::from(header[0]), usize::from(u16_at(header, 2)));
        let name = rest.get(..name_length).ok_or_else(|| wrong("a name is cut off"))?;
        let value =
            rest.get(name_length..name_length + value_length).ok_or_else(|| wrong("a value is cut off"))?;
        Ok(((prefix, name, value), (4 + name_length + value_length).next_multiple_of(4)))
    }
}
