//! Stacks of layers are merged as the kernel's overlayfs merges directories.

mod common;

use std::ffi::CString;
use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::process::Command;

use common::fixture;
use common::mounted::Mounted;
use kiln_contract::Digest;
use rustix::fs::{CWD, FileType, Mode};

/// SplitMix64.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % limit
    }

    fn name(&mut self) -> &'static str {
        ["a", "b", "c", "d", "e"][self.below(5) as usize]
    }
}

/// Fills a directory as overlayfs fills an upper one: files, links, directories, whiteouts, opaque directories. Few names,
/// so that layers meet.
fn fill(directory: &Path, random: &mut Random, depth: usize) {
    for _ in 0..3 + random.below(4) {
        let path = directory.join(random.name());
        if path.symlink_metadata().is_ok() {
            continue;
        }
        match random.below(10) {
            0..3 => {
                let size = [0, 10, 300, 70_000][random.below(4) as usize];
                fs::write(&path, vec![random.below(256) as u8; size]).unwrap();
                fs::set_permissions(&path, fs::Permissions::from_mode(0o600 + random.below(64) as u32))
                    .unwrap();
            }
            3 => symlink(random.name(), &path).unwrap(),
            4 | 5 => {
                rustix::fs::mknodat(CWD, &path, FileType::CharacterDevice, Mode::empty(), 0).unwrap();
            }
            6 => {
                // Another name of a file that is here.
                let files = || fs::read_dir(directory).unwrap().map(|entry| entry.unwrap());
                if let Some(file) = files().find(|entry| entry.file_type().unwrap().is_file()) {
                    fs::hard_link(file.path(), &path).unwrap();
                }
            }
            _ if depth > 0 => {
                fs::create_dir(&path).unwrap();
                fs::set_permissions(&path, fs::Permissions::from_mode(0o700 + random.below(64) as u32))
                    .unwrap();
                if random.below(3) == 0 {
                    xattr::set(&path, "trusted.overlay.opaque", b"y").unwrap();
                }
                xattr::set(&path, "user.n", random.below(9).to_string().as_bytes()).unwrap();
                fill(&path, random, depth - 1);
            }
            _ => {}
        }
    }
}

/// Everything that is seen: modes, owners, times, link targets, contents, attributes, and which names are one file.
fn listing(root: &Path) -> String {
    // The kernel lists whiteouts in directories that it need not merge, and then does not find them.
    let script = "find() { command find \"$@\" 2>/dev/null || true; }
        find . -mindepth 1 -printf '%p %y %m %U:%G %T@ %l\\n' | sort
        find . -type f | sort | xargs -rd '\\n' sha256sum
        find . -mindepth 1 ! -type l | sort | xargs -rd '\\n' getfattr -h -m '^user' -d 2>/dev/null || true
        find . -type f -links +1 -printf '%i %p\\n' | sort -k2 | awk '{ all[$1] = all[$1] \" \" $2; n[$1]++ } END { for (i in all) if (n[i] > 1) print all[i] }' | sort";
    let output = Command::new("sh").args(["-ec", script]).current_dir(root).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn layers_by_chance_are_merged_as_the_kernel_merges_them() {
    if !kiln_fixtures::require_root() || kiln_fixtures::require("getfattr").is_none() {
        return;
    }
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    let seeds = number("KILN_SEED").map_or(1..number("KILN_SEEDS").unwrap_or(12) + 1, |seed| seed..seed + 1);
    for seed in seeds {
        let fixture = fixture();
        let mut random = Random(seed);
        let (mut layers, mut directories) = (Vec::<Digest>::new(), Vec::new());
        for index in 0..2 + random.below(5) {
            let directory = fixture.dir.path().join(format!("layer-{index}"));
            fs::create_dir(&directory).unwrap();
            fill(&directory, &mut random, 3);
            layers.push(fixture.store.import_upper(&directory, &[], &|id, _| id).unwrap().layer);
            directories.push(directory.display().to_string());
        }
        directories.reverse();
        let kernel = fixture.dir.path().join("kernel");
        fs::create_dir(&kernel).unwrap();
        let options = CString::new(format!("lowerdir={}", directories.join(":"))).unwrap();
        let flags = rustix::mount::MountFlags::RDONLY;
        rustix::mount::mount("overlay", &kernel, "overlay", flags, Some(options.as_c_str())).unwrap();
        let shown = listing(&kernel);
        rustix::mount::unmount(&kernel, rustix::mount::UnmountFlags::DETACH).unwrap();
        let ours = Mounted::new(&fixture, &layers);
        let merged = listing(&ours.root());
        assert_eq!(merged, shown, "seed {seed}");
    }
}
