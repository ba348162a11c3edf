//! Views of images that are in a registry, and not in the store.

use std::fs;
use std::path::Path;

use super::disk::directory;
use super::measures::{Images, ratio_row};
use super::peers::scratch;
use super::sampling::{medians, quietly, settle, timed};
use super::table::Row;
use super::view_trees::scaled;
use crate::kiln::Kiln;
use crate::shell::Outcome;

/// Files of 10 MiB that do not compress.
const FILE: usize = 10 << 20;

/// From the command, with an empty store, to the first byte of a file: of a layer that is read in parts, and of the same layer
/// pulled whole.
pub(super) fn first_byte(program: &Path, images: &Images) -> Outcome<Vec<Row>> {
    let failed = |error: std::io::Error| format!("cannot make an image: {error}");
    let scratch = scratch()?;
    let (source, at) = (scratch.path().join("source"), scratch.path().join("at"));
    fs::create_dir(&source).map_err(failed)?;
    fs::create_dir(&at).map_err(failed)?;
    let files = scaled(50);
    for number in 0..files {
        fs::write(source.join(format!("file{number}")), kiln_fixtures::noise(FILE, number as u64))
            .map_err(failed)?;
    }
    let registry = images.busybox.split('/').next().ok_or("an image without a registry")?;
    let reference = format!("{registry}/bench/on-demand:1");
    let maker = Kiln::below(&directory(), program)?;
    let from = source.to_string_lossy();
    maker.output(["image", "import", "--quiet", "--format", "rootfs", &from, &reference])?;
    maker.output(["image", "push", "--quiet", "--compression", "zstd:chunked", &reference])?;
    let last = at.join(format!("file{}", files - 1)).to_string_lossy().into_owned();
    let at = at.to_string_lossy();
    let from_nothing = |policy: &str| {
        let kiln = Kiln::below(&directory(), program)?;
        let words = ["fs", "run", "--backend", "fuse", "--pull", policy, "--at", &at, &reference, "--"];
        let mut command = kiln.command(words.into_iter().chain(["head", "-c", "1", &last]));
        timed(|| quietly(&mut command))
    };
    settle();
    let [lazy, whole] =
        medians(5, [Box::new(|| from_nothing("lazy")), Box::new(|| from_nothing("missing"))])?;
    let megabytes = (files * FILE) >> 20;
    let measure =
        format!("first byte of 10 MiB in an image of {megabytes} MiB, from an empty store, on demand");
    Ok(vec![ratio_row(&measure, lazy, &[("pulled whole", whole)], 0.2)])
}
