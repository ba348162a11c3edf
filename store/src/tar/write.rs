//! The tar of a tree, always the same for the same tree: entries in the order of their names, parents first, ustar
//! headers without user names, PAX records for what does not fit.

use std::io::{Read, Write};

use kiln_contract::Digest;
use kiln_erofs::{Attributes, Content, Data, Node, NodeId, Tree};

use super::entry::padding;
use super::header::BLOCK;
use super::number::write_octal;
use super::pax::write_record;
use crate::layer_tree::PATH;
use crate::{Result, StoreError, overlay};

/// Writes `tree` as an OCI layer. Returns the number of bytes. `open` gives an object.
///
/// Names that this program itself would not read are refused: each entry has its whole path, and a tree that is
/// deep enough would make a tar of any size.
///
/// Sockets are left out: tar has no form for them, and they mean nothing without their process.
pub(crate) fn write_tree<R: Read>(
    tree: &Tree,
    out: &mut impl Write,
    open: impl Fn(&Digest) -> Result<R>,
) -> Result<u64> {
    write_below(tree, NodeId::ROOT, out, open)
}

/// As [`write_tree`], of one directory of the tree, which is `./` in the tar.
pub(crate) fn write_below<R: Read>(
    tree: &Tree,
    top: NodeId,
    out: &mut impl Write,
    open: impl Fn(&Digest) -> Result<R>,
) -> Result<u64> {
    let mut tar = TarWriter { out, written: 0, buffer: Vec::new() };
    let mut first_names: std::collections::HashMap<NodeId, Vec<u8>> = std::collections::HashMap::new();
    let mut path = Vec::new();
    if !overlay::is_implied(&tree.node(top).attributes.xattrs) {
        tar.directory(b"./", tree.node(top))?;
    }
    tar.opaque(b"", tree.node(top))?;
    let list =
        |dir| tree.children(dir).map(|(name, node)| (name.to_vec(), node)).collect::<Vec<_>>().into_iter();
    // The directories that are open, and where their names begin in `path`.
    let mut stack = vec![(list(top), 0)];
    while let Some((entries, start)) = stack.last_mut() {
        path.truncate(*start);
        let Some((name, id)) = entries.next() else {
            stack.pop();
            continue;
        };
        let node = tree.node(id);
        if overlay::is_whiteout(node.content) {
            path.extend_from_slice(overlay::WHITEOUT_PREFIX);
            path.extend_from_slice(&name);
            tar.header(&path, b'0', &Attributes::default(), &Extra::default())?;
            continue;
        }
        path.extend_from_slice(&name);
        if let Some(first) = first_names.get(&id) {
            tar.header(&path, b'1', node.attributes, &Extra { link: first, ..Extra::default() })?;
            continue;
        }
        if node.links > 1 && *node.content != Content::Directory {
            first_names.insert(id, path.clone());
        }
        match node.content {
            Content::Directory => {
                path.push(b'/');
                // Whoever reads the tar makes it as it is here.
                let comes_by_itself = overlay::is_implied(&node.attributes.xattrs)
                    && (tree.children(id).next().is_some() || overlay::is_opaque(&node.attributes.xattrs));
                if !comes_by_itself {
                    tar.directory(&path, node)?;
                }
                tar.opaque(&path, node)?;
                stack.push((list(id), path.len()));
            }
            Content::Regular(Data::Inline(bytes)) => {
                tar.header(
                    &path,
                    b'0',
                    node.attributes,
                    &Extra { size: bytes.len() as u64, ..Extra::default() },
                )?;
                tar.put(bytes)?;
                tar.pad(bytes.len() as u64)?;
            }
            Content::Regular(Data::Object { digest, size }) => {
                tar.header(&path, b'0', node.attributes, &Extra { size: *size, ..Extra::default() })?;
                tar.object(digest, *size, open(digest)?)?;
                tar.pad(*size)?;
            }
            Content::Symlink(target) => {
                tar.header(&path, b'2', node.attributes, &Extra { link: target, ..Extra::default() })?;
            }
            Content::CharDevice(device) | Content::BlockDevice(device) => {
                let kind = if matches!(node.content, Content::CharDevice(_)) { b'3' } else { b'4' };
                let device = Some((device.major, device.minor));
                tar.header(&path, kind, node.attributes, &Extra { device, ..Extra::default() })?;
            }
            Content::Fifo => tar.header(&path, b'6', node.attributes, &Extra::default())?,
            Content::Socket => {}
        }
    }
    tar.put(&[0; 2 * BLOCK])?;
    Ok(tar.written)
}

/// What only some kinds of entries have.
#[derive(Default)]
struct Extra<'a> {
    size: u64,
    link: &'a [u8],
    device: Option<(u32, u32)>,
}

struct TarWriter<'o, W> {
    out: &'o mut W,
    written: u64,
    buffer: Vec<u8>,
}

impl<W: Write> TarWriter<'_, W> {
    fn put(&mut self, bytes: &[u8]) -> Result<()> {
        self.written += bytes.len() as u64;
        self.out
            .write_all(bytes)
            .map_err(|source| StoreError::Stream { doing: "write the tar of a layer", source })
    }

    fn pad(&mut self, size: u64) -> Result<()> {
        self.put(&[0; BLOCK][..padding(size) as usize])
    }

    fn directory(&mut self, path: &[u8], node: Node<'_>) -> Result<()> {
        self.header(path, b'5', node.attributes, &Extra::default())
    }

    fn opaque(&mut self, path: &[u8], node: Node<'_>) -> Result<()> {
        if !overlay::is_opaque(&node.attributes.xattrs) {
            return Ok(());
        }
        let path = [path, overlay::OPAQUE_NAME].concat();
        self.header(&path, b'0', &Attributes::default(), &Extra::default())
    }

    fn object(&mut self, digest: &Digest, size: u64, mut file: impl Read) -> Result<()> {
        self.buffer.resize(256 << 10, 0);
        let mut buffer = std::mem::take(&mut self.buffer);
        let mut left = size;
        while left > 0 {
            let part = left.min(buffer.len() as u64) as usize;
            let read = file
                .read(&mut buffer[..part])
                .map_err(|source| StoreError::Stream { doing: "read an object", source })?;
            if read == 0 {
                let what = format!("object {digest} is shorter than the layer says");
                return Err(StoreError::Damaged { path: digest.hex().into(), what });
            }
            self.put(&buffer[..read])?;
            left -= read as u64;
        }
        self.buffer = buffer;
        Ok(())
    }

    fn header(&mut self, path: &[u8], kind: u8, attributes: &Attributes, extra: &Extra<'_>) -> Result<()> {
        if path.len() > PATH {
            let what = format!("a name of {} bytes (at most {PATH} are read from a tar)", path.len());
            return Err(StoreError::Entry { path: path[..1024].to_owned(), what });
        }
        let mut records = Vec::new();
        let mut block = [0; BLOCK];
        let mut text = |range: std::ops::Range<usize>, key: &[u8], value: &[u8], records: &mut Vec<u8>| {
            let fits = value.len().min(range.len());
            block[range.start..range.start + fits].copy_from_slice(&value[..fits]);
            if fits < value.len() {
                write_record(records, key, value);
            }
        };
        text(0..100, b"path", path, &mut records);
        text(157..257, b"linkpath", extra.link, &mut records);
        write_octal(&mut block[100..108], u64::from(attributes.mode));
        let mut number = |range: std::ops::Range<usize>, key: &[u8], value: u64| {
            if !write_octal(&mut block[range], value) {
                write_record(&mut records, key, value.to_string().as_bytes());
            }
        };
        number(108..116, b"uid", u64::from(attributes.uid));
        number(116..124, b"gid", u64::from(attributes.gid));
        number(124..136, b"size", extra.size);
        let mtime = attributes.mtime;
        let whole = u64::try_from(mtime.seconds).ok();
        if !whole.is_some_and(|seconds| write_octal(&mut block[136..148], seconds)) || mtime.nanoseconds != 0
        {
            write_octal(&mut block[136..148], 0);
            write_record(&mut records, b"mtime", decimal_time(mtime.seconds, mtime.nanoseconds).as_bytes());
        }
        block[156] = kind;
        block[257..265].copy_from_slice(b"ustar\x0000");
        if let Some((major, minor)) = extra.device {
            write_octal(&mut block[329..337], u64::from(major));
            write_octal(&mut block[337..345], u64::from(minor));
        }
        if kind != b'1' {
            for (name, value) in &attributes.xattrs {
                if let Some(name) = overlay::xattr_of_file(name) {
                    write_record(&mut records, &[b"SCHILY.xattr.", name.as_slice()].concat(), value);
                }
            }
        }
        if !records.is_empty() {
            let mut extended = [0; BLOCK];
            extended[..10].copy_from_slice(b"PaxHeaders");
            write_octal(&mut extended[100..108], 0o644);
            for range in [108..116, 116..124, 136..148] {
                write_octal(&mut extended[range], 0);
            }
            write_octal(&mut extended[124..136], records.len() as u64);
            extended[156] = b'x';
            extended[257..265].copy_from_slice(b"ustar\x0000");
            sum(&mut extended);
            self.put(&extended)?;
            self.put(&records)?;
            self.pad(records.len() as u64)?;
        }
        sum(&mut block);
        self.put(&block)
    }
}

fn sum(block: &mut [u8; BLOCK]) {
    block[148..156].fill(b' ');
    let sum = block.iter().map(|byte| u64::from(*byte)).sum();
    write_octal(&mut block[148..155], sum);
}

fn decimal_time(seconds: i64, nanoseconds: u32) -> String {
    let text = if seconds < 0 && nanoseconds > 0 {
        // -2 s and 750,000,000 ns is -1.25.
        let whole = (seconds + 1).unsigned_abs();
        format!("-{whole}.{:09}", 1_000_000_000 - nanoseconds)
    } else {
        format!("{seconds}.{nanoseconds:09}")
    };
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_written_as_decimals() {
        for (seconds, nanoseconds, expected) in [
            (0, 0, "0"),
            (10, 0, "10"),
            (1, 500_000_000, "1.5"),
            (-2, 750_000_000, "-1.25"),
            (-1, 500_000_000, "-0.5"),
            (-3, 0, "-3"),
            (1, 1, "1.000000001"),
        ] {
            assert_eq!(decimal_time(seconds, nanoseconds), expected);
        }
    }
}
