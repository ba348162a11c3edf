//! `cargo xtask disk-template`: the empty file system with which every writable disk of a machine begins.
//!
//! `mke2fs` runs here, once, and not where disks are made. It gets fixed identifiers and a fixed time, so that the
//! same version of it gives the same bytes. What is kept are the blocks that are not all zero, in the form that
//! `kiln_disk::template` describes; that module also tells why the file system has the features and sizes that it has.

use std::fs;
use std::path::Path;
use std::process::Command;

use crate::shell::{Outcome, capture, root};

/// Where the template stands.
const TEMPLATE: &str = "disk/src/ext4.zst";

const BLOCK: usize = 4096;
const BLOCKS: u32 = 16 * 1024;
const MAGIC: &[u8; 16] = b"kiln-ext4-disk 1";

/// What distributions say in `/etc/mke2fs.conf` must not matter.
const CONFIGURATION: &str = "[fs_types]\n  ext4 = {\n  }\n";

const FEATURES: &str = "none,has_journal,ext_attr,dir_index,filetype,meta_bg,extent,64bit,flex_bg,metadata_csum,\
                        metadata_csum_seed,sparse_super,large_file,huge_file,dir_nlink,extra_isize";

/// Makes the template anew.
pub(crate) fn write() -> Outcome {
    let directory = tempfile::tempdir().map_err(|error| format!("cannot make a directory: {error}"))?;
    let image = directory.path().join("image");
    make(&image)?;
    let bytes = fs::read(&image).map_err(|error| format!("cannot read {}: {error}", image.display()))?;
    let packed =
        zstd::encode_all(&pack(&bytes)[..], 19).map_err(|error| format!("cannot compress: {error}"))?;
    let path = root().join(TEMPLATE);
    fs::write(&path, &packed).map_err(|error| format!("cannot write {}: {error}", path.display()))?;
    println!("{TEMPLATE}: {} bytes", packed.len());
    Ok(())
}

/// Makes the file system in a new file.
fn make(image: &Path) -> Outcome {
    let configuration = image.with_extension("conf");
    let problem = |error| format!("cannot write {}: {error}", image.display());
    fs::write(&configuration, CONFIGURATION).map_err(problem)?;
    let file = fs::File::create_new(image).map_err(problem)?;
    file.set_len(u64::from(BLOCKS) * BLOCK as u64).map_err(problem)?;
    let extended = [
        "hash_seed=00000000-0000-4000-8000-000000000002",
        "root_owner=0:0",
        "nodiscard",
        // The file is new, so what was not written reads as zeros: neither inode tables nor journal need to be written.
        "lazy_itable_init=1",
        "lazy_journal_init=1",
        "assume_storage_prezeroed=1",
    ];
    let mke2fs =
        kiln_fixtures::find_program("mke2fs").ok_or("mke2fs is not installed (package e2fsprogs)")?;
    let mut command = Command::new(mke2fs);
    command.args(["-q", "-F", "-t", "ext4", "-b", "4096", "-I", "256", "-N", "8192", "-G", "16", "-m", "0"]);
    command.args(["-e", "remount-ro", "-J", "size=16", "-U", "00000000-0000-4000-8000-000000000001"]);
    command.args(["-E", &extended.join(","), "-O", FEATURES]).arg(image);
    command.env("MKE2FS_CONFIG", &configuration).env("E2FSPROGS_FAKE_TIME", "1700000000");
    capture(&mut command).map(drop)
}

/// The blocks that hold something, each after its number.
fn pack(image: &[u8]) -> Vec<u8> {
    let mut packed = MAGIC.to_vec();
    packed.extend(BLOCKS.to_le_bytes());
    for (number, block) in (0_u32..).zip(image.chunks(BLOCK)) {
        if block.iter().any(|byte| *byte != 0) {
            packed.extend(number.to_le_bytes());
            packed.extend(block);
        }
    }
    packed
}

#[cfg(test)]
mod tests {
    use super::*;
    use kiln_disk::template::{Identity, write_ext4};

    /// The version that the template was made with: others may lay things out otherwise.
    const VERSION: &str = "1.47.0";

    #[test]
    fn the_template_is_what_mke2fs_makes_bit_by_bit() {
        let Some(mke2fs) = kiln_fixtures::require("mke2fs") else { return };
        let output = Command::new(mke2fs).arg("-V").output().unwrap();
        let version = String::from_utf8_lossy(&output.stderr).into_owned();
        if !version.contains(VERSION) {
            kiln_fixtures::skip(&format!("the template was made with mke2fs {VERSION}, this is {version}"));
            return;
        }
        let directory = tempfile::tempdir().unwrap();
        let image = directory.path().join("image");
        make(&image).unwrap();
        let ours = directory.path().join("ours");
        let file = fs::File::create_new(&ours).unwrap();
        file.set_len(u64::from(BLOCKS) * BLOCK as u64).unwrap();
        write_ext4(&file, &Identity::of_the_template().unwrap()).unwrap();
        assert!(fs::read(&image).unwrap() == fs::read(&ours).unwrap());
    }
}
