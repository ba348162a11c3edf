//! Objects out of the blobs that lazy layers came from.
//!
//! One process at a time fetches the small objects of a layer, and it brings those that follow the wanted one in the blob,
//! too, up to [`AHEAD`] bytes: whoever opens one file of a directory mostly opens the next. Of the others each has its own turn.

use std::fs::{File, Permissions};
use std::io::{self, BufReader, Read, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use kiln_contract::{Digest, Hasher};
use rustix::fs::{Timespec, Timestamps};

use super::{Lookup, Placed, ZSTD_WINDOW_LOG};
use crate::error::{Context as _, is_full};
use crate::format::{OBJECT_MODE, SOUND};
use crate::import::disk_full;
use crate::staging::Staging;
use crate::{Repair, Result, Store, StoreError, WantedRange};

/// So many bytes of a blob are asked for at once, if no single object takes more.
const AHEAD: u64 = 1 << 20;

impl Store {
    /// Fetches an object of a lazy layer, and whether there is one that has it.
    ///
    /// # Errors
    /// It cannot be had, or what came is not it: nothing of that is kept.
    pub(crate) fn fetch_placed(&self, digest: &Digest, repair: &dyn Repair) -> Result<bool> {
        let mut failed = None;
        for path in self.lazy_paths()? {
            // One that cannot be read is for `check`.
            let Ok(Some(record)) = Lookup::open(&path) else { continue };
            let Some(wanted) = record.find(digest).filter(|wanted| wanted.end() <= record.head.blob.size())
            else {
                continue;
            };
            if self.layer_of_diff_id(&record.head.diff_id)?.is_some() {
                continue;
            }
            let turn = if wanted.length > AHEAD { *digest } else { record.key };
            let turn = Staging::in_turn(&self.layout, &format!("fetch-{}", turn.hex()), &|| ())?;
            if self.has_sound_object(digest) {
                return Ok(true);
            }
            match self.fetch_window(&record, &wanted, repair, &turn) {
                Ok(()) => return Ok(true),
                Err(error) => failed = Some(error),
            }
        }
        failed.map_or(Ok(false), Err)
    }

    fn fetch_window(
        &self,
        record: &Lookup,
        wanted: &Placed,
        repair: &dyn Repair,
        turn: &Staging,
    ) -> Result<()> {
        let window = self.window(record, wanted);
        let end = window.last().map_or(wanted.end(), Placed::end);
        let needs = self.needs()?;
        let needed = needs.layers.get(&record.head.diff_id);
        let range = WantedRange {
            blob: record.head.blob.clone(),
            repositories: needed.map_or(&needs.repositories, |needed| &needed.repositories).clone(),
            offset: wanted.offset,
            length: end - wanted.offset,
        };
        let failed = |source| StoreError::Stream { doing: "fetch a part of a layer", source };
        let mut packed = repair.range(&range).map_err(failed)?;
        let mut at = wanted.offset;
        let mut staged = Vec::new();
        for file in &window {
            // What lies between files is headers of the tar.
            io::copy(&mut packed.by_ref().take(file.offset - at), &mut io::sink()).map_err(failed)?;
            let mut frames = packed.by_ref().take(file.length);
            match self.stage_object(file, &mut frames, turn) {
                Ok(path) => staged.push((file.digest, path)),
                // What nobody asked for yet may come another time.
                Err(_) if file.digest != wanted.digest => {}
                Err(error) => return Err(error),
            }
            io::copy(&mut frames, &mut io::sink()).map_err(failed)?;
            at = file.end();
        }
        self.publish_objects(&staged, turn)
    }

    /// Gives objects their names.
    fn publish_objects(&self, staged: &[(Digest, PathBuf)], turn: &Staging) -> Result<()> {
        // Their times say that their bytes are there: they must be, after a power cut, too.
        match staged {
            [(_, path)] => File::open(path).doing("open", path)?.sync_all().doing("write to disk", path)?,
            _ => turn.sync()?,
        }
        for (digest, path) in staged {
            let to = self.layout.object(digest);
            if let Some(directory) = to.parent() {
                std::fs::create_dir_all(directory).doing("create", directory)?;
            }
            std::fs::rename(path, &to).doing("rename to", &to)?;
        }
        Ok(())
    }

    /// The wanted object and those after it in the blob that are missing, too, as far as they fit in one request.
    fn window(&self, record: &Lookup, wanted: &Placed) -> Vec<Placed> {
        let last = wanted.offset.saturating_add(AHEAD);
        let mut window = vec![*wanted];
        let mut end = wanted.end();
        for file in record.from(end).take_while(|file| file.end() <= last) {
            // In a record that is damaged they may lie over each other.
            if file.offset >= end && !self.layout.object(&file.digest).exists() {
                end = file.end();
                window.push(file);
            }
        }
        window
    }

    /// Decompresses an object and compares it with its digest. Where it is then.
    fn stage_object(&self, wanted: &Placed, frames: impl Read, staging: &Staging) -> Result<PathBuf> {
        let path = staging.path(&wanted.digest.hex());
        self.write_object(wanted, frames, &path).map(|()| path)
    }

    fn write_object(&self, wanted: &Placed, frames: impl Read, path: &Path) -> Result<()> {
        let failed = |source| StoreError::Stream { doing: "decompress a file of a layer", source };
        let mut decoder =
            zstd::Decoder::with_buffer(BufReader::with_capacity(128 << 10, frames)).map_err(failed)?;
        decoder.window_log_max(ZSTD_WINDOW_LOG).map_err(failed)?;
        let mut file = File::create(path).doing("create", path)?;
        let mut hasher = Hasher::new();
        let mut buffer = vec![0; 128 << 10];
        let mut left = wanted.size;
        loop {
            let count = match decoder.read(&mut buffer) {
                Ok(0) => break,
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(failed(error)),
            };
            left = left.checked_sub(count as u64).ok_or_else(|| {
                failed(io::Error::new(
                    io::ErrorKind::InvalidData,
                    format!(
                        "the object {} is larger than the {} bytes that it should have",
                        wanted.digest, wanted.size
                    ),
                ))
            })?;
            hasher.update(&buffer[..count]);
            match file.write_all(&buffer[..count]) {
                Err(error) if is_full(&error) => return Err(disk_full(&self.layout, 1, wanted.size)),
                written => written.doing("write", path)?,
            }
        }
        let found = hasher.finish();
        if found != wanted.digest {
            let what = "what came of a layer for an object".to_owned();
            return Err(StoreError::DigestMismatch { what, expected: wanted.digest, found });
        }
        file.set_permissions(Permissions::from_mode(OBJECT_MODE)).doing("change the mode of", path)?;
        let time = Timespec { tv_sec: SOUND, tv_nsec: 0 };
        let times = Timestamps { last_access: time, last_modification: time };
        rustix::fs::futimens(&file, &times).doing("set the time of", path)
    }
}
