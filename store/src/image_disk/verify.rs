//! Whether an image disk is what its stack makes.

use std::fs::File;
use std::io::{self, Read, Write};
use std::path::PathBuf;

use kiln_contract::{Digest, Hasher};
use kiln_erofs::FullImage;

use crate::error::Context as _;
use crate::format::stack_key;
use crate::merge::Caches;
use crate::{Result, Store};

impl Store {
    /// Reads a stack's image disk from end to end, if there is one, and compares it with what the layers say. The
    /// objects are not looked at: the disk's own bytes must have their digests. Returns its path and what is wrong.
    pub(crate) fn check_image_disk(&self, layers: &[Digest]) -> Result<Option<(PathBuf, String)>> {
        let path = self.layout.image_disk(&stack_key(layers));
        let mut file = match File::open(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            opened => opened.doing("open", &path)?,
        };
        let tree = self.merge(layers, Caches::Ignored)?;
        let image = FullImage::new(&tree)?;
        Ok(compare(&mut file, &image).err().map(|what| (path, what)))
    }
}

/// Says what is wrong with the disk in `file`.
fn compare(file: &mut File, image: &FullImage<'_>) -> std::result::Result<(), String> {
    let unreadable = |error: io::Error| format!("it cannot be read: {error}");
    let length = file.metadata().map_err(unreadable)?.len();
    if length != image.length() {
        return Err(format!("it has {length} bytes, its layers make {}", image.length()));
    }
    let mut same = Same { file, buffer: Vec::new(), differs: false };
    if let Err(error) = image.write_metadata(&mut same) {
        let differs = "its tree is not that of its layers".to_owned();
        return Err(if same.differs { differs } else { format!("it cannot be compared: {error}") });
    }
    let mut buffer = vec![0; 256 << 10];
    for object in image.objects() {
        let mut hasher = Hasher::new();
        let mut left = object.size;
        while left > 0 {
            let piece = left.min(buffer.len() as u64) as usize;
            file.read_exact(&mut buffer[..piece]).map_err(unreadable)?;
            hasher.update(&buffer[..piece]);
            left -= piece as u64;
        }
        let found = hasher.finish();
        if found != object.digest {
            let (offset, expected) = (object.offset, object.digest);
            return Err(format!("what is at {offset} has digest {found}, expected {expected}"));
        }
        let padding = (object.size.next_multiple_of(4096) - object.size) as usize;
        file.read_exact(&mut buffer[..padding]).map_err(unreadable)?;
        if buffer[..padding].iter().any(|byte| *byte != 0) {
            return Err(format!("what follows the object at {} is not zeros", object.offset));
        }
    }
    Ok(())
}

/// Takes only the bytes that a file has.
struct Same<'f> {
    file: &'f mut File,
    buffer: Vec<u8>,
    differs: bool,
}

impl Write for Same<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.buffer.resize(bytes.len(), 0);
        self.file.read_exact(&mut self.buffer)?;
        if self.buffer != bytes {
            self.differs = true;
            return Err(io::ErrorKind::InvalidData.into());
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
