//! Directories in images.

use crate::format::{BLOCK, DIRENT, NAME_MAX};
use crate::read::{u16_at, u64_at};
use crate::{FileType, ImageError, Inode, Nid};

/// An entry of a directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry<'a> {
    /// 1 to 255 bytes without `/` and NUL.
    pub name: &'a [u8],
    /// Whose name it is.
    pub nid: Nid,
    /// What that is, as the directory tells it.
    pub file_type: FileType,
}

/// A block of entries, its header checked.
#[derive(Clone, Copy)]
struct Block<'a> {
    nid: Nid,
    bytes: &'a [u8],
    count: usize,
}

impl<'a> Block<'a> {
    fn wrong(&self, what: &'static str) -> ImageError {
        ImageError::Directory { nid: self.nid, what }
    }

    fn name_at(&self, index: usize) -> usize {
        u16_at(self.bytes, index * DIRENT + 8).into()
    }

    /// Any entry, `.` and `..` included.
    fn entry(&self, index: usize) -> Result<Entry<'a>, ImageError> {
        let start = self.name_at(index);
        let name = if index + 1 < self.count {
            self.bytes.get(start..self.name_at(index + 1))
        } else {
            let rest = self.bytes.get(start..);
            rest.map(|rest| &rest[..rest.iter().position(|byte| *byte == 0).unwrap_or(rest.len())])
        };
        let name = name.ok_or_else(|| self.wrong("a name lies outside of its block"))?;
        if name.is_empty() || name.len() > NAME_MAX {
            return Err(self.wrong("a name has 1 to 255 bytes"));
        }
        if name.iter().any(|byte| matches!(byte, b'/' | 0)) {
            return Err(self.wrong("a name has a slash or a NUL"));
        }
        let file_type = match self.bytes[index * DIRENT + 10] {
            1 => FileType::Regular,
            2 => FileType::Directory,
            3 => FileType::CharDevice,
            4 => FileType::BlockDevice,
            5 => FileType::Fifo,
            6 => FileType::Socket,
            7 => FileType::Symlink,
            _ => return Err(self.wrong("an entry's type is not known")),
        };
        Ok(Entry { name, nid: u64_at(self.bytes, index * DIRENT), file_type })
    }

    /// The first entry whose name is not less.
    fn lower_bound(&self, name: &[u8]) -> Result<usize, ImageError> {
        let (mut low, mut high) = (0, self.count);
        while low < high {
            let middle = low.midpoint(high);
            if self.entry(middle)?.name < name {
                low = middle + 1;
            } else {
                high = middle;
            }
        }
        Ok(low)
    }

    /// How many of `.` and `..` it holds.
    fn dots(&self) -> Result<usize, ImageError> {
        let mut count = 0;
        for index in self.lower_bound(b".")?..self.count {
            if !is_dots(self.entry(index)?.name) {
                break;
            }
            count += 1;
        }
        Ok(count)
    }
}

fn is_dots(name: &[u8]) -> bool {
    name == b"." || name == b".."
}

impl<'a> Inode<'a> {
    fn block_count(&self) -> Result<u64, ImageError> {
        if self.file_type() == FileType::Directory {
            Ok(self.size().div_ceil(BLOCK))
        } else {
            Err(ImageError::Directory { nid: self.nid(), what: "it is none" })
        }
    }

    fn block(&self, index: u64) -> Result<Block<'a>, ImageError> {
        let from = index * BLOCK;
        let bytes = self.piece(from, (self.size() - from).min(BLOCK))?;
        let mut block = Block { nid: self.nid(), bytes, count: 0 };
        if bytes.len() < DIRENT {
            return Err(block.wrong("a block is too short for an entry"));
        }
        let names_at = block.name_at(0);
        if names_at == 0 || !names_at.is_multiple_of(DIRENT) || names_at > bytes.len() {
            return Err(block.wrong("a block has an impossible number of entries"));
        }
        block.count = names_at / DIRENT;
        Ok(block)
    }

    /// Finds an entry by binary search, over the blocks and then within one.
    ///
    /// # Errors
    /// It is not a directory, or a block on the way is damaged. A directory that is not sorted gives wrong answers.
    pub fn lookup(&self, name: &[u8]) -> Result<Option<Entry<'a>>, ImageError> {
        let (mut low, mut high) = (0, self.block_count()?);
        while low < high {
            let middle = low.midpoint(high);
            if self.block(middle)?.entry(0)?.name <= name {
                low = middle + 1;
            } else {
                high = middle;
            }
        }
        let Some(index) = low.checked_sub(1) else { return Ok(None) };
        let block = self.block(index)?;
        let at = block.lower_bound(name)?;
        if at == block.count {
            return Ok(None);
        }
        let entry = block.entry(at)?;
        Ok((entry.name == name).then_some(entry))
    }

    /// Entries in order without `.` and `..`, each checked; from the `from`-th on, which is found without going
    /// through those before it. Ends after the first error.
    pub fn entries(&self, from: usize) -> Entries<'a> {
        let mut entries =
            Entries { inode: *self, next_block: 0, block: None, index: 0, last: None, failure: None };
        entries.failure = entries.skip_to(from).err();
        entries
    }

    /// The directory that a directory is in; the root's is itself.
    ///
    /// # Errors
    /// It is not a directory, or it is damaged.
    pub fn parent(&self) -> Result<Nid, ImageError> {
        match self.lookup(b"..")? {
            Some(entry) => Ok(entry.nid),
            None => Err(ImageError::Directory { nid: self.nid(), what: "it has no parent" }),
        }
    }
}

/// What [`Inode::entries`] gives.
#[derive(Clone)]
pub struct Entries<'a> {
    inode: Inode<'a>,
    next_block: u64,
    block: Option<Block<'a>>,
    index: usize,
    last: Option<&'a [u8]>,
    failure: Option<ImageError>,
}

impl std::fmt::Debug for Entries<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Entries").field("directory", &self.inode.nid()).finish_non_exhaustive()
    }
}

impl<'a> Entries<'a> {
    fn skip_to(&mut self, mut count: usize) -> Result<(), ImageError> {
        while count > 0 {
            let Some(block) = self.load()? else { break };
            let here = block.count - block.dots()?;
            if here > count {
                break;
            }
            count -= here;
            self.block = None;
        }
        for _ in 0..count {
            if self.step()?.is_none() {
                break;
            }
        }
        Ok(())
    }

    /// The current block, or the next one.
    fn load(&mut self) -> Result<Option<Block<'a>>, ImageError> {
        if self.block.is_none() {
            if self.next_block >= self.inode.block_count()? {
                return Ok(None);
            }
            self.block = Some(self.inode.block(self.next_block)?);
            self.next_block += 1;
            self.index = 0;
        }
        Ok(self.block)
    }

    fn step(&mut self) -> Result<Option<Entry<'a>>, ImageError> {
        loop {
            let Some(block) = self.load()? else { return Ok(None) };
            if self.index >= block.count {
                self.block = None;
                continue;
            }
            let entry = block.entry(self.index)?;
            self.index += 1;
            if self.last.is_some_and(|last| last >= entry.name) {
                return Err(block.wrong("its entries are not sorted"));
            }
            self.last = Some(entry.name);
            if !is_dots(entry.name) {
                return Ok(Some(entry));
            }
        }
    }
}

impl<'a> Iterator for Entries<'a> {
    type Item = Result<Entry<'a>, ImageError>;

    fn next(&mut self) -> Option<Self::Item> {
        let result = match self.failure.take() {
            Some(error) => Err(error),
            None => self.step(),
        };
        if result.is_err() {
            // Nothing after the first error.
            self.block = None;
            self.next_block = u64::MAX;
        }
        result.transpose()
    }
}
