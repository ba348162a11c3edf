//! Image disks: a stack as a disk that a machine boots from.
//!
//! An image disk is an EROFS image of the merged tree with all file data in it, which a Linux 6.1 kernel mounts as a
//! block device without anything else: no object, no overlay. It is made at the first use of a stack and kept.
//!
//! 1. The merged tree is laid out ([`FullImage`]); from then on it is known where each object goes.
//! 2. A file in `tmp/` gets its whole length, and the tree before the data.
//! 3. Each object is put in its place: shared with `objects/` where the file system can do that, else copied
//!    (`transfer` module). Nothing of it is hashed: what is in `objects/` was, and `check` looks after it.
//! 4. The file is put on the disk and renamed.
//!
//! The bytes depend on the stack alone. Holes of sparse objects are holes of the disk's file, and blocks that several
//! files have are there once.
//!
//! Who makes a disk has the directory for it in `tmp/`: others that want the same one wait for that, and take what they
//! find then. If the first one is killed, the next one makes it.

mod transfer;
mod verify;

use std::fs::OpenOptions;
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use kiln_contract::{Digest, Progress, Step, StepId};
use kiln_erofs::FullImage;

use crate::error::Context as _;
use crate::format::{OBJECT_MODE, stack_key};
use crate::image_disk::transfer::{Source, Transfer, Way};
use crate::import::disk_full;
use crate::staging::Staging;
use crate::tag::files_below;
use crate::tree_file::TreeFile;
use crate::{Result, Store, StoreError};

impl Store {
    /// The image disk of a stack (layers, bottom first): an EROFS image with all its data, mode 0444, that a machine
    /// boots from. It is kept, and made only if it is not there; whoever wants the same one meanwhile waits for it.
    /// `progress` gets one step, `render`, in bytes of the disk; none if the disk is there.
    ///
    /// On a file system with reflinks the disk shares its blocks with the objects, and costs little time and room;
    /// elsewhere it costs what copying the image's files does.
    ///
    /// # Errors
    /// A layer or an object is missing or damaged; the disk is full; the disk would be larger than 16 TiB. Nothing is
    /// kept then.
    pub fn image_disk(&self, layers: &[Digest], progress: &dyn Progress) -> Result<PathBuf> {
        let key = stack_key(layers);
        let path = self.layout.image_disk(&key);
        if path.exists() {
            return Ok(path);
        }
        let waiting = || progress.note("waiting for another process that makes the same image disk");
        let staging = Staging::in_turn(&self.layout, &format!("disk-{}", key.hex()), &waiting)?;
        if path.exists() {
            return Ok(path);
        }
        let merged = self.merged_tree(layers)?;
        let missing = StoreError::Missing { what: "merged tree", digest: key };
        let tree = TreeFile::open(&merged)?.ok_or(missing)?.to_tree()?;
        let image = FullImage::new(&tree)?;
        let total = Some(image.length());
        let step = progress.begin(Step { name: key.short(), verb: "render", total });
        let rendered = self.render(&image, &staging, &path, &mut Meter { progress, step, done: 0 });
        progress.end(step, if rendered.is_ok() { "done" } else { "failed" });
        // Before the figures of a full disk are asked for.
        drop(staging);
        match rendered {
            Err(error) if error.is_disk_full() => Err(disk_full(&self.layout, 1, self.bytes_to_copy(&image))),
            rendered => rendered.map(|()| path),
        }
    }

    /// The disks that there are.
    pub(crate) fn image_disks(&self) -> Result<Vec<PathBuf>> {
        let directory = self.layout.disks();
        if directory.exists() { files_below(&directory) } else { Ok(Vec::new()) }
    }

    fn render(
        &self,
        image: &FullImage<'_>,
        staging: &Staging,
        path: &Path,
        meter: &mut Meter<'_>,
    ) -> Result<()> {
        let new = staging.path("disk");
        let mut options = OpenOptions::new();
        let file = options.write(true).create_new(true).mode(OBJECT_MODE).open(&new).doing("create", &new)?;
        let head = image.write_metadata(&file)?;
        file.set_len(image.length()).doing("write", &new)?;
        meter.reach(head);
        let mut transfer = Transfer::new(file, new.clone(), Way::Share);
        for object in image.objects() {
            let file = self.open_object(&object.digest)?;
            let source = Source::new(file, self.layout.object(&object.digest), object.size)?;
            transfer.put(&source, object.offset, &mut |bytes| meter.reach(object.offset + bytes))?;
        }
        transfer.finish()?;
        meter.reach(image.length());
        if let Some(directory) = path.parent() {
            std::fs::create_dir_all(directory).doing("create", directory)?;
        }
        std::fs::rename(&new, path).doing("rename to", path)
    }

    /// What a disk takes that shares nothing.
    fn bytes_to_copy(&self, image: &FullImage<'_>) -> u64 {
        let mut bytes = 0;
        let mut start = None;
        for object in image.objects() {
            // What comes before the first object is the tree.
            start.get_or_insert(object.offset);
            let whole = object.size.next_multiple_of(4096);
            let allocated = std::fs::metadata(self.layout.object(&object.digest))
                .map_or(whole, |metadata| metadata.blocks() * 512);
            bytes += allocated.min(whole);
        }
        bytes + start.unwrap_or(image.length())
    }
}

/// Tells how far a disk is, in bytes from its start.
struct Meter<'p> {
    progress: &'p dyn Progress,
    step: StepId,
    done: u64,
}

impl Meter<'_> {
    fn reach(&mut self, offset: u64) {
        if offset > self.done {
            self.progress.advance(self.step, (offset - self.done) as i64);
            self.done = offset;
        }
    }
}
