//! Copies that share all blocks until one of the two is written to: ioctl_ficlone(2), on btrfs, XFS, bcachefs and others.

use std::fs::File;
use std::io;
use std::path::Path;

/// Copies `from` to the empty file `to`. Waits until the storage has what was written to `from`; takes the same time
/// whatever its size, but not whatever its number of extents.
pub(crate) fn copy(from: &File, to: &File) -> io::Result<()> {
    Ok(rustix::fs::ioctl_ficlone(to, from)?)
}

/// Whether files in `directory` can share blocks: tries it.
pub(crate) fn probe(directory: &Path) -> io::Result<()> {
    use std::os::unix::fs::FileExt as _;
    let from = tempfile::tempfile_in(directory)?;
    // With a block in it: what is empty can be copied by those that cannot share.
    from.write_all_at(&[1; 4096], 0)?;
    copy(&from, &tempfile::tempfile_in(directory)?)
}
