//! Writers that die, that meet, and that find the disk full.

mod common;

use std::io::Read as _;
use std::process::{Command, Stdio};
use std::time::Duration;

use common::{Fixture, Tar, fixture};
use kiln_contract::{Digest, Home};
use kiln_store::{GcOptions, ImportLimits, Store, StoreError};

/// A tar of many small and some large files.
fn sample() -> Vec<u8> {
    let mut tar = Tar::new();
    for index in 0..1500_u32 {
        let data = index.to_le_bytes().repeat(200 + index as usize % 500);
        tar = tar.file(&format!("d{}/f{index}", index % 50), &data);
    }
    for index in 0..4_u8 {
        tar = tar.file(&format!("large{index}"), &vec![index; 3 << 20]);
    }
    tar.end()
}

/// Not a test of its own: what the tests below run in a process that they kill.
#[test]
fn import_for_another_process() {
    let (Ok(home), Ok(tar)) = (std::env::var("KILN_TEST_HOME"), std::env::var("KILN_TEST_TAR")) else {
        return;
    };
    let store = Store::open(&Home::at(home)).unwrap();
    store.import_tar(std::fs::File::open(tar).unwrap(), None, ImportLimits::default()).unwrap();
}

fn import_process(home: &Home, tar: &std::path::Path) -> std::process::Child {
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "import_for_another_process"])
        .env("KILN_TEST_HOME", home.path())
        .env("KILN_TEST_TAR", tar)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap()
}

#[test]
fn an_import_killed_at_any_instant_leaves_a_clean_store() {
    let Fixture { dir, home, store } = fixture();
    drop(store);
    let bytes = sample();
    let tar = dir.path().join("sample.tar");
    std::fs::write(&tar, &bytes).unwrap();
    // How long one takes, so that the instants fall into it.
    let start = std::time::Instant::now();
    let probe = Home::at(dir.path().join("probe"));
    assert!(import_process(&probe, &tar).wait().unwrap().success());
    let (mut whole, mut killed) = (start.elapsed(), 0);
    for attempt in 0..200_u32 {
        if killed == 20 {
            break;
        }
        let mut child = import_process(&home, &tar);
        // Spread over the whole time, in an order that has no pattern.
        std::thread::sleep(whole * (attempt * 7 % 20) / 20 + Duration::from_micros(u64::from(attempt) * 137));
        child.kill().unwrap();
        if child.wait().unwrap().success() {
            // It was faster than that: a machine is not as busy at one time as at another.
            whole = whole * 3 / 4;
        } else {
            killed += 1;
        }
        let store = Store::open(&home).unwrap();
        let left = std::fs::read_dir(store.path().join("tmp")).unwrap().count();
        assert_eq!(left, 0, "leavings were not swept");
        let report = store.check(None).unwrap();
        assert_eq!(report.damaged, [""; 0], "attempt {attempt}");
        // What was acknowledged stays; else it begins anew.
        let diff_id = Digest::of(&bytes);
        if let Some(layer) = store.layer_of_diff_id(&diff_id).unwrap() {
            std::fs::remove_file(store.path().join("diffs").join(diff_id.hex())).unwrap();
            std::fs::remove_file(store.layer_path(&layer)).unwrap();
            std::fs::remove_file(store.layer_path(&layer).with_extension("split")).unwrap();
        }
    }
    assert_eq!(killed, 20, "of 200 imports");
    let store = Store::open(&home).unwrap();
    let imported = store.import_tar(&bytes[..], None, ImportLimits::default()).unwrap();
    let fixture = Fixture { dir, home, store };
    assert!(fixture.export(&imported.layer) == bytes);
    assert!(fixture.store.check(None).unwrap().damaged.is_empty());
}

#[test]
fn two_imports_of_one_tar_at_once_both_succeed() {
    let fixture = fixture();
    let bytes = sample();
    let tar = fixture.dir.path().join("sample.tar");
    std::fs::write(&tar, &bytes).unwrap();
    let mut others = [import_process(&fixture.home, &tar), import_process(&fixture.home, &tar)];
    let layers: Vec<_> = std::thread::scope(|scope| {
        let threads = [(); 2].map(|()| scope.spawn(|| fixture.import(&bytes).unwrap().layer));
        threads.map(|thread| thread.join().unwrap()).into()
    });
    for other in &mut others {
        assert!(other.wait().unwrap().success());
    }
    assert_eq!(layers[0], layers[1]);
    let report = fixture.store.check(None).unwrap();
    assert_eq!((report.damaged.as_slice(), report.layers), (&[][..], 1));
    assert!(fixture.export(&layers[0]) == bytes);
}

#[test]
fn a_collection_waits_for_an_import() {
    let Fixture { dir: _dir, home, store } = fixture();
    let bytes = sample();
    let (mut gate, opened) = std::io::pipe().unwrap();
    std::thread::scope(|scope| {
        let importing = scope.spawn({
            let (store, bytes) = (store, &bytes);
            move || {
                // The second half comes only when the collection has had its chance.
                let mut waited = Vec::new();
                let half = bytes.len() / 2;
                let rest = std::io::Cursor::new(&bytes[half..]);
                let gate = Gate { gate: &mut gate, waited: &mut waited };
                let tar = bytes[..half].chain(gate).chain(rest);
                let layer = store.import_tar(tar, None, ImportLimits::default()).unwrap().layer;
                let image = store.make_image(&Default::default(), &[layer]).unwrap();
                store.tag(&"kept:1".parse().unwrap(), &image.manifest_digest, "").unwrap();
            }
        });
        let collecting = scope
            .spawn(|| Store::gc(&home, || Ok::<_, StoreError>(Vec::new()), &GcOptions::default()).unwrap());
        std::thread::sleep(Duration::from_millis(100));
        assert!(!collecting.is_finished(), "the collection did not wait");
        drop(opened);
        importing.join().unwrap();
        assert_eq!(collecting.join().unwrap().objects, 0);
    });
    let store = Store::open(&home).unwrap();
    assert!(store.check(None).unwrap().damaged.is_empty());
    assert!(store.resolve("kept:1").is_ok());
}

/// A stream that is empty, but not before the other end of a pipe is closed.
struct Gate<'g> {
    gate: &'g mut std::io::PipeReader,
    waited: &'g mut Vec<u8>,
}

impl std::io::Read for Gate<'_> {
    fn read(&mut self, _: &mut [u8]) -> std::io::Result<usize> {
        self.gate.read_to_end(self.waited)
    }
}

#[test]
fn a_full_disk_says_how_much_was_missing_and_leaves_the_store_as_it_was() {
    if !kiln_fixtures::require_root() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mounted = Command::new("mount")
        .args(["-t", "tmpfs", "-o", "size=12m", "kiln-test"])
        .arg(dir.path())
        .status()
        .unwrap();
    assert!(mounted.success());
    let unmount = Unmount(dir.path().to_owned());
    let home = Home::at(dir.path());
    let store = Store::open(&home).unwrap();
    let before =
        store.import_tar(&Tar::new().file("a", &[7; 5000]).end()[..], None, ImportLimits::default()).unwrap();
    let mut large = Tar::new();
    for index in 0..40_u8 {
        large = large.file(&format!("f{index}"), &vec![index; 1_000_000]);
    }
    let error = store.import_tar(&large.end()[..], None, ImportLimits::default()).unwrap_err();
    let StoreError::DiskFull { needed, available, .. } = &error else { panic!("{error}") };
    assert_eq!(*needed, 40 * 1_003_520, "{error}");
    assert!((10_u64 << 20..12 << 20).contains(available), "{error}");
    assert!(error.to_string().contains("more needed"), "{error}");
    assert_eq!(std::fs::read_dir(store.path().join("tmp")).unwrap().count(), 0);
    let report = store.check(None).unwrap();
    assert_eq!((report.objects, report.layers, report.damaged.as_slice()), (1, 1, &[][..]));
    assert!(store.layer_path(&before.layer).exists());
    // What fits still does.
    store
        .import_tar(&Tar::new().file("b", &[8; 5_000_000]).end()[..], None, ImportLimits::default())
        .unwrap();
    drop(store);
    drop(unmount);
}

struct Unmount(std::path::PathBuf);

impl Drop for Unmount {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&self.0).status();
    }
}
