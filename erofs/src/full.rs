//! Images with data: where every object goes is known before any of them is read.

use std::io::{Read, Write};

use kiln_contract::{Digest, Hasher};

use crate::format::BLOCK;
use crate::layout::Layout;
use crate::write::{Output, write_head};
use crate::{Tree, WriteError};

/// Where [`write_full`] gets an object's bytes.
pub trait ObjectSource {
    /// An object from its start.
    ///
    /// # Errors
    /// Whatever keeps it from being read: it ends in [`WriteError::Object`].
    fn open(&self, digest: &Digest) -> std::io::Result<Box<dyn Read + '_>>;
}

/// Writes `tree` with its data embedded: what a kernel mounts without anything else. Every object begins at a
/// multiple of 4096 and is there once. Same tree, same bytes. Returns the length, a multiple of 4096.
///
/// Who can put data into a file without reading them plans with [`FullImage`] instead; the bytes are the same.
///
/// # Errors
/// As [`crate::write_metadata`]; and an object cannot be read, or is not what its digest says.
pub fn write_full(tree: &Tree, objects: &dyn ObjectSource, out: impl Write) -> Result<u64, WriteError> {
    let image = FullImage::new(tree)?;
    let mut out = Output::new(out);
    write_head(&image.layout, &mut out)?;
    for object in image.objects() {
        debug_assert_eq!(out.position(), object.offset);
        embed(objects, &object, &mut out)?;
    }
    debug_assert_eq!(out.position(), image.length());
    out.finish()
}

/// A tree laid out as an image with data. Nothing is read or written yet: who has the objects in files puts each where
/// [`FullImage::objects`] says, by whatever way is the shortest.
///
/// ```
/// use kiln_contract::Digest;
/// use kiln_erofs::{Attributes, Content, Data, FullImage, Image, NodeId, Tree};
///
/// let object = [7; 5000];
/// let data = Data::Object { digest: Digest::of(&object), size: 5000 };
/// let mut tree = Tree::default();
/// tree.add(NodeId::ROOT, b"file", Content::Regular(data), Attributes::default())?;
///
/// let plan = FullImage::new(&tree)?;
/// let mut bytes = Vec::new();
/// plan.write_metadata(&mut bytes)?;
/// bytes.resize(plan.length() as usize, 0);
/// for place in plan.objects() {
///     bytes[place.offset as usize..][..object.len()].copy_from_slice(&object);
/// }
/// let image = Image::open(&bytes)?;
/// let file = image.inode(image.root()?.lookup(b"file")?.unwrap().nid)?;
/// assert_eq!(*file.embedded()?, object);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct FullImage<'t> {
    layout: Layout<'t>,
}

impl<'t> FullImage<'t> {
    /// Lays a tree out.
    ///
    /// # Errors
    /// The format has no place for something in the tree ([`WriteError::Node`] names it), or the image would be
    /// larger than 16 TiB.
    pub fn new(tree: &'t Tree) -> Result<Self, WriteError> {
        Ok(Self { layout: Layout::new(tree, false)? })
    }

    /// Length of the image in bytes, a multiple of 4096.
    pub fn length(&self) -> u64 {
        self.layout.length()
    }

    /// Writes all that comes before the data, in order and in large pieces. Returns its length, a multiple of 4096.
    ///
    /// # Errors
    /// `out` fails.
    pub fn write_metadata(&self, out: impl Write) -> Result<u64, WriteError> {
        let mut out = Output::new(out);
        write_head(&self.layout, &mut out)?;
        out.finish()
    }

    /// The objects, each once, in the order of their places. What lies between the end of one and the next multiple
    /// of 4096 is zeros.
    pub fn objects(&self) -> impl Iterator<Item = EmbeddedObject> + '_ {
        let mut next = self.layout.data_start();
        self.layout.objects.iter().map(move |(digest, size)| {
            let offset = next;
            next += size.next_multiple_of(BLOCK);
            EmbeddedObject { digest: *digest, size: *size, offset }
        })
    }
}

/// An object's place in an image with data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EmbeddedObject {
    /// Which.
    pub digest: Digest,
    /// Its length in bytes, never 0.
    pub size: u64,
    /// Where its first byte goes: a multiple of 4096.
    pub offset: u64,
}

/// Copies an object, hashing it on the way: a damaged one must not become part of a disk that is trusted later.
fn embed<W: Write>(
    objects: &dyn ObjectSource,
    object: &EmbeddedObject,
    out: &mut Output<W>,
) -> Result<(), WriteError> {
    let EmbeddedObject { digest, size, .. } = object;
    let failed = |source| WriteError::Object { digest: *digest, source };
    let damaged = |what| WriteError::Damaged { digest: *digest, what };
    let mut source = objects.open(digest).map_err(failed)?.take(size.saturating_add(1));
    let mut hasher = Hasher::new();
    let mut length = 0;
    loop {
        let start = out.buffer.len();
        let room = Output::<W>::FULL.saturating_sub(start).max(BLOCK as usize);
        out.buffer.resize(start + room, 0);
        let read = match source.read(&mut out.buffer[start..]) {
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => 0,
            Err(error) => return Err(failed(error)),
            Ok(0) => {
                out.buffer.truncate(start);
                break;
            }
            Ok(read) => read,
        };
        hasher.update(&out.buffer[start..start + read]);
        out.buffer.truncate(start + read);
        length += read as u64;
        if length > *size {
            return Err(damaged(format!("it has more than {size} bytes")));
        }
        out.drain()?;
    }
    if length < *size {
        return Err(damaged(format!("it has {length} bytes instead of {size}")));
    }
    let found = hasher.finish();
    if found != *digest {
        return Err(damaged(format!("its bytes have the digest {found}")));
    }
    let end = out.position().next_multiple_of(BLOCK);
    out.pad_to(end);
    out.drain()
}
