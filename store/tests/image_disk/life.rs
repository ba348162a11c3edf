//! Disks that several want at once, that are interrupted, collected, damaged, or find no room.

use std::io::Write as _;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use kiln_contract::{Digest, Home, Progress, Silent, Step, StepId};
use kiln_fixtures::noise;
use kiln_store::{CheckReport, GcOptions, GcReport, ImportLimits, Repair, Store, StoreError};

use crate::common::{Fixture, Tar, fixture};
use crate::file_system::fresh;
use crate::{Heard, expected, make, open};

#[test]
fn progress_is_told_in_bytes_and_a_disk_that_is_there_is_not_made_again() {
    let fixture = fixture();
    let image = make(&fixture.store, "a:1");
    let heard = Heard::default();
    let disk = fixture.store.image_disk(&image.layers, &heard).unwrap();
    let length = disk.metadata().unwrap().len();
    let said = heard.all();
    let [first, middle @ .., last] = &said[..] else { panic!("{said:?}") };
    assert_eq!((first, last.as_str()), (&format!("render {length}"), "done"));
    let steps: Vec<i64> = middle.iter().map(|bytes| bytes.parse().unwrap()).collect();
    assert!(steps.len() > 10 && steps.iter().all(|bytes| *bytes > 0), "{steps:?}");
    assert_eq!(steps.iter().sum::<i64>(), length as i64);
    let again = Heard::default();
    assert_eq!(fixture.store.image_disk(&image.layers, &again).unwrap(), disk);
    assert_eq!(again.all(), [""; 0]);
}

/// Writes down that a disk is being made.
struct Register(std::path::PathBuf);

impl Progress for Register {
    fn begin(&self, _: Step) -> StepId {
        let mut file = std::fs::OpenOptions::new().create(true).append(true).open(&self.0).unwrap();
        file.write_all(b"made\n").unwrap();
        StepId(0)
    }

    fn advance(&self, _: StepId, _: i64) {}

    fn end(&self, _: StepId, _: &str) {}

    fn note(&self, _: &str) {}
}

/// Not a test of its own: what the tests below run in another process.
#[test]
fn render_for_another_process() {
    let (Ok(home), Ok(register)) = (std::env::var("KILN_TEST_HOME"), std::env::var("KILN_TEST_REGISTER"))
    else {
        return;
    };
    let store = Store::open(&Home::at(home)).unwrap();
    let layers = store.resolve("a:1").unwrap().layers;
    store.image_disk(&layers, &Register(register.into())).unwrap();
}

fn rendering(home: &Home, register: &Path) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "life::render_for_another_process"])
        .env("KILN_TEST_HOME", home.path())
        .env("KILN_TEST_REGISTER", register)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap()
}

#[test]
fn many_who_want_one_disk_at_once_get_the_one_that_the_first_made() {
    let Fixture { dir, home, store } = fixture();
    let image = make(&store, "a:1");
    let register = dir.path().join("register");
    let mut others = [(); 4].map(|()| rendering(&home, &register));
    let own = Register(register.clone());
    std::thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| store.image_disk(&image.layers, &own).unwrap());
        }
    });
    for other in &mut others {
        assert!(other.wait().unwrap().success());
    }
    assert_eq!(std::fs::read_to_string(&register).unwrap(), "made\n");
    let disk = store.image_disk(&image.layers, &Silent).unwrap();
    assert!(std::fs::read(disk).unwrap() == expected(&store, &image.layers));
}

#[test]
fn a_render_killed_at_any_instant_leaves_nothing_that_can_be_seen() {
    let Fixture { dir, home, store } = fixture();
    let image = make(&store, "a:1");
    let bytes = expected(&store, &image.layers);
    let disks = store.path().join("renders/disks");
    let register = dir.path().join("register");
    let start = Instant::now();
    assert!(rendering(&home, &register).wait().unwrap().success());
    let (mut whole, mut killed) = (start.elapsed(), 0);
    drop(store);
    for attempt in 0..200_u32 {
        if killed == 20 {
            break;
        }
        let _ = std::fs::remove_dir_all(&disks);
        let mut child = rendering(&home, &register);
        std::thread::sleep(whole * (attempt * 7 % 20) / 20 + Duration::from_micros(u64::from(attempt) * 137));
        child.kill().unwrap();
        if child.wait().unwrap().success() {
            whole = whole * 3 / 4;
        } else {
            killed += 1;
        }
        let store = Store::open(&home).unwrap();
        assert_eq!(
            std::fs::read_dir(store.path().join("tmp")).unwrap().count(),
            0,
            "leavings were not swept"
        );
        for disk in std::fs::read_dir(&disks).into_iter().flatten() {
            assert!(std::fs::read(disk.unwrap().path()).unwrap() == bytes, "attempt {attempt}");
        }
    }
    assert_eq!(killed, 20, "of 200 renders");
    let store = Store::open(&home).unwrap();
    let disk = store.image_disk(&image.layers, &Silent).unwrap();
    assert!(std::fs::read(disk).unwrap() == bytes);
}

fn collect(home: &Home, in_use: &[Digest], dry_run: bool) -> GcReport {
    let options = GcOptions { dry_run, ..GcOptions::default() };
    Store::gc(home, || Ok::<_, StoreError>(in_use.to_vec()), &options).unwrap()
}

#[test]
fn a_collection_takes_the_disks_that_no_instance_uses() {
    let Fixture { dir: _dir, home, store } = fixture();
    let image = make(&store, "a:1");
    let disk = store.image_disk(&image.layers, &Silent).unwrap();
    let usage = store.usage().unwrap();
    assert_eq!(usage.image_disks, 1);
    let length = disk.metadata().unwrap().len();
    assert!(usage.image_disk_bytes > 12_000_000 && usage.image_disk_bytes <= length + 4096, "{usage:?}");
    assert!(usage.render_bytes > usage.image_disk_bytes);
    drop(store);
    for in_use in [image.id, image.manifest_digest] {
        assert_eq!(collect(&home, &[in_use], false), GcReport::default());
        assert!(disk.exists());
    }
    let dry = collect(&home, &[], true);
    assert!(disk.exists());
    assert_eq!(collect(&home, &[], false), dry);
    assert_eq!((dry.renders, dry.objects, dry.bytes), (1, 0, usage.image_disk_bytes));
    assert!(!disk.exists());
    let store = Store::open(&home).unwrap();
    assert_eq!(store.usage().unwrap().image_disks, 0);
    // The image itself is whole.
    assert_eq!(store.check(None).unwrap().damaged, [""; 0]);
    assert_eq!(store.image_disk(&image.layers, &Silent).unwrap(), disk);
}

/// Nothing is lost but what can be made again.
struct Nobody;

impl Repair for Nobody {
    fn document(&self, _: &kiln_store::WantedDocument) -> std::io::Result<Vec<u8>> {
        Err(std::io::ErrorKind::NotFound.into())
    }

    fn layer(&self, _: &kiln_store::WantedLayer) -> std::io::Result<Box<dyn std::io::Read + Send>> {
        Err(std::io::ErrorKind::NotFound.into())
    }
}

#[test]
fn a_damaged_disk_is_found_removed_and_made_again() {
    let fixture = fixture();
    let store = &fixture.store;
    let image = make(store, "a:1");
    let bytes = expected(store, &image.layers);
    let path = store.image_disk(&image.layers, &Silent).unwrap();
    assert_eq!(store.check(None).unwrap().damaged, [""; 0]);
    let length = bytes.len() as u64;
    // In noise, a byte is zero where a file ends within a block.
    let padding =
        (4096..length - 1).rev().find(|at| bytes[*at as usize - 32..=*at as usize] == [0; 33]).unwrap();
    type Damage<'d> = &'d dyn Fn(&mut Vec<u8>);
    let table: [(Damage<'_>, &str); 5] = [
        (&|bytes| bytes[1200] ^= 1, "its tree is not that of its layers"),
        (&|bytes| bytes[length as usize - 5000] ^= 1, "has digest"),
        (&|bytes| bytes[padding as usize] = 1, "is not zeros"),
        (&|bytes| bytes.truncate(length as usize - 4096), "its layers make"),
        (&|bytes| bytes.extend([0; 4096]), "its layers make"),
    ];
    for (damage, expected) in table {
        let mut damaged = bytes.clone();
        damage(&mut damaged);
        std::fs::remove_file(&path).unwrap();
        std::fs::write(&path, damaged).unwrap();
        let CheckReport { damaged, .. } = store.check(None).unwrap();
        assert!(damaged.len() == 1 && damaged[0].contains(expected), "{damaged:?} / {expected}");
        let repaired = store.check(Some(&Nobody)).unwrap();
        assert_eq!((repaired.damaged.len(), repaired.repaired), (0, damaged), "{expected}");
        assert!(!path.exists());
        assert!(std::fs::read(store.image_disk(&image.layers, &Silent).unwrap()).unwrap() == bytes);
    }
}

#[test]
fn a_disk_of_objects_that_are_not_whole_is_refused_and_leaves_nothing() {
    let fixture = fixture();
    let store = &fixture.store;
    let image = make(store, "a:1");
    let object = Digest::of(&noise(700_000, 92));
    let path = store.object_path(&object);
    let whole = std::fs::read(&path).unwrap();
    for (content, wanted) in
        [(None, "is not in the store"), (Some(&whole[1..]), "699999 bytes instead of 700000")]
    {
        std::fs::remove_file(&path).unwrap();
        if let Some(content) = content {
            std::fs::write(&path, content).unwrap();
        }
        let heard = Heard::default();
        let error = store.image_disk(&image.layers, &heard).unwrap_err().to_string();
        assert!(error.contains(wanted), "{error}");
        assert_eq!(heard.all().last().unwrap(), "failed");
        assert_eq!(std::fs::read_dir(store.path().join("tmp")).unwrap().count(), 0);
        assert!(!store.path().join("renders/disks").exists());
        std::fs::write(&path, &whole).unwrap();
    }
    store.image_disk(&image.layers, &Silent).unwrap();
}

#[test]
fn a_full_disk_says_how_much_was_missing_and_leaves_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let Some(mounted) = fresh("tmpfs", 12, directory.path()) else { return };
    let (_home, store) = open(&mounted.0);
    let tar = Tar::new().file("a", &noise(7_000_000, 1)).file("b", &noise(70, 2)).end();
    let layer = store.import_tar(&tar[..], None, ImportLimits::default()).unwrap().layer;
    let error = store.image_disk(&[layer], &Silent).unwrap_err();
    let StoreError::DiskFull { needed, available, .. } = &error else { panic!("{error}") };
    assert_eq!(*needed, 4096 + 7_000_064 + 4096, "{error}");
    assert!((4_000_000..6_000_000).contains(available), "{error}");
    assert_eq!(std::fs::read_dir(store.path().join("tmp")).unwrap().count(), 0);
    assert!(!store.path().join("renders/disks").exists());
    assert_eq!(store.check(None).unwrap().damaged, [""; 0]);
    drop(store);
}
