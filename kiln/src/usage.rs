//! How much space a directory takes.

use std::collections::HashSet;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// Allocated bytes of all files below `root`, each inode once. What cannot be read counts as nothing: it may be
/// vanishing at this moment.
pub(crate) fn disk_usage(root: &Path) -> u64 {
    let mut seen = HashSet::new();
    let mut bytes = 0;
    let mut directories = vec![root.to_owned()];
    while let Some(directory) = directories.pop() {
        for entry in fs::read_dir(&directory).into_iter().flatten().filter_map(Result::ok) {
            let Ok(metadata) = entry.metadata() else { continue };
            if metadata.nlink() < 2 || metadata.is_dir() || seen.insert((metadata.dev(), metadata.ino())) {
                bytes += metadata.blocks() * 512;
            }
            if metadata.is_dir() {
                directories.push(entry.path());
            }
        }
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hard_links_count_once_and_symlinks_are_not_followed() {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name);
        fs::create_dir(at("d")).unwrap();
        fs::write(at("d/a"), vec![1; 100_000]).unwrap();
        let once = disk_usage(directory.path());
        assert!(once >= 100_000, "{once}");
        fs::hard_link(at("d/a"), at("b")).unwrap();
        std::os::unix::fs::symlink("/", at("d/root")).unwrap();
        assert!(disk_usage(directory.path()) < once + 100_000);
        assert_eq!(disk_usage(&at("missing")), 0);
    }
}
