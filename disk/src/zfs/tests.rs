//! What is asked of `zfs`, command by command. Answers are as OpenZFS 2.1 words them.

use std::collections::VecDeque;
use std::sync::Mutex;

use tempfile::TempDir;

use super::*;

/// Answers commands that must come exactly in this order. Devices are files, which appear and are renamed as volumes are.
#[derive(Debug)]
struct Script {
    steps: Mutex<VecDeque<(String, std::result::Result<String, String>)>>,
    devices: PathBuf,
}

impl Programs for Script {
    fn run(&self, purpose: &str, program: &'static str, arguments: &[&OsStr]) -> Result<String> {
        let words: Vec<String> = arguments.iter().map(|word| word.to_string_lossy().into_owned()).collect();
        let command = without_tokens(&format!("{program} {}", words.join(" ")));
        let step = self.steps.lock().unwrap().pop_front();
        let (expected, answer) = step.unwrap_or_else(|| panic!("nothing was expected any more: {command}"));
        assert_eq!(command, expected);
        let last = words.last().unwrap();
        if answer.is_ok() && !last.contains('@') {
            let device = self.devices.join(last);
            match words[0].as_str() {
                "create" | "clone" => {
                    fs::create_dir_all(device.parent().unwrap()).unwrap();
                    fs::write(&device, "").unwrap();
                }
                "rename" => fs::rename(self.devices.join(&words[1]), device).unwrap(),
                _ => {}
            }
        }
        answer.map_err(|said| DiskError::ProgramFailed {
            program: program.into(),
            purpose: purpose.into(),
            said,
        })
    }
}

impl Devices for Script {
    fn find(&self, volume: &str) -> Option<PathBuf> {
        Some(self.devices.join(volume)).filter(|path| path.exists())
    }
}

/// Random tokens are shown as `*`; those in the listings here are shorter.
fn without_tokens(command: &str) -> String {
    let mut shown = command.to_owned();
    for prefix in ["making:", "old:", "base-"] {
        let mut from = 0;
        while let Some(at) = shown[from..].find(prefix) {
            let start = from + at + prefix.len();
            let length = shown[start..].bytes().take_while(u8::is_ascii_alphanumeric).count();
            if length >= 6 {
                shown.replace_range(start..start + length, "*");
            }
            from = start;
        }
    }
    shown
}

const LIST: &str = "zfs list -H -p -r -t volume,snapshot -o \
                    name,type,createtxg,creation,volsize,used,referenced,usedbydataset,written,origin,clones,kiln:disk \
                    tank/kiln";

/// A disk `web` of 1 GiB with the snapshot `before`, after which it wrote 1 MiB of its 4 again; as OpenZFS 2.1 lists it.
const WEB: &str = "\
tank/kiln/web\tvolume\t8\t1700000100\t1073741824\t5312512\t4229120\t4229120\t1083392\t-\t-\tweb
tank/kiln/web@snap-before\tsnapshot\t20\t1700000200\t536870912\t1083392\t4229120\t-\t4229120\t-\t\tweb
";

/// The same, when its snapshot has a clone `fork`, which wrote 2 MiB again.
const FORKED: &str = "\
tank/kiln/fork\tvolume\t21\t1700000300\t536870912\t2131968\t4229120\t2131968\t2131968\ttank/kiln/web@snap-before\t-\tfork
tank/kiln/web\tvolume\t8\t1700000100\t1073741824\t5312512\t4229120\t4229120\t1083392\t-\t-\tweb
tank/kiln/web@snap-before\tsnapshot\t20\t1700000200\t536870912\t1083392\t4229120\t-\t4229120\t-\ttank/kiln/fork\tweb
";

struct Bed {
    disks: ZfsDisks,
    script: Arc<Script>,
    directory: TempDir,
}

impl Bed {
    /// Opens a dataset of which `listing` is told.
    fn new(listing: &str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let devices = directory.path().join("dev");
        for name in ["web", "fork", "making:x", "old:x"] {
            fs::create_dir_all(devices.join("tank/kiln")).unwrap();
            fs::write(devices.join("tank/kiln").join(name), "").unwrap();
        }
        let steps = Mutex::default();
        let script = Arc::new(Script { steps, devices: devices.clone() });
        let type_of = ("zfs list -H -o type tank/kiln", Ok("filesystem\n"));
        script.expect(&[type_of, (LIST, Ok(listing)), (LIST, Ok(listing)), (LIST, Ok(listing))]);
        let disks =
            ZfsDisks::with(directory.path().join("disks"), "tank/kiln", script.clone(), script.clone())
                .unwrap();
        script.is_done();
        Self { disks, script, directory }
    }
}

impl Script {
    fn expect(&self, steps: &[(&str, std::result::Result<&str, &str>)]) {
        let steps = steps.iter().map(|(command, answer)| {
            ((*command).to_owned(), answer.map(str::to_owned).map_err(str::to_owned))
        });
        self.steps.lock().unwrap().extend(steps);
    }

    fn is_done(&self) {
        assert_eq!(self.steps.lock().unwrap().len(), 0, "not asked for: {:?}", self.steps);
    }
}

fn id(text: &str) -> DiskId {
    text.parse().unwrap()
}

fn name(text: &str) -> SnapshotName {
    text.parse().unwrap()
}

#[test]
fn a_volume_is_made_written_and_then_renamed_to_its_place() {
    let bed = Bed::new("");
    bed.script.expect(&[
        (LIST, Ok("")),
        ("zfs create -s -b 16384 -o volmode=dev -o kiln:disk=new -V 1073758208 tank/kiln/making:*", Ok("")),
        ("zfs rename tank/kiln/making:* tank/kiln/new", Ok("")),
    ]);
    let path = bed.disks.create(&id("new"), (1 << 30) + 1).unwrap();
    bed.script.is_done();
    assert_eq!(path, bed.directory.path().join("dev/tank/kiln/new"));
    assert_eq!(fs::read(path).unwrap()[1024 + 56..][..2], [0x53, 0xef], "an ext4");
}

#[test]
fn a_volume_that_cannot_be_made_is_taken_away() {
    let bed = Bed::new("");
    let making = "tank/kiln/making:dead\tvolume\t1\t1\t1073741824\t1\t1\t1\t1\t-\t-\tnew\n";
    bed.script.expect(&[
        (LIST, Ok("")),
        ("zfs create -s -b 16384 -o volmode=dev -o kiln:disk=new -V 1073741824 tank/kiln/making:*", Ok("")),
        (
            "zfs rename tank/kiln/making:* tank/kiln/new",
            Err("cannot rename 'tank/kiln/making:dead': dataset already exists"),
        ),
        (LIST, Ok(making)),
        ("zfs destroy tank/kiln/making:dead", Ok("")),
        (LIST, Ok("")),
    ]);
    let error = bed.disks.create(&id("new"), 1 << 30).unwrap_err();
    bed.script.is_done();
    assert_eq!((error.kind(), error.to_string().as_str()), (Kind::Conflict, "there is a disk `new` already"));
}

#[test]
fn a_clone_stands_on_a_snapshot_that_nobody_sees() {
    let bed = Bed::new(WEB);
    bed.script.expect(&[(LIST, Ok(WEB)), ("zfs snapshot tank/kiln/web@base-*", Ok(""))]);
    let pending = bed.disks.start_clone(&id("web"), None, &id("new")).unwrap();
    bed.script.is_done();
    bed.script.expect(&[
        (LIST, Ok(WEB)),
        ("zfs clone -o volmode=dev -o kiln:disk=new tank/kiln/web@base-* tank/kiln/new", Ok("")),
    ]);
    pending.finish().unwrap();
    bed.script.is_done();

    // Of a saved state.
    bed.script.expect(&[
        (LIST, Ok(WEB)),
        (LIST, Ok(WEB)),
        ("zfs clone -o volmode=dev -o kiln:disk=new tank/kiln/web@snap-before tank/kiln/new", Ok("")),
    ]);
    bed.disks.start_clone(&id("web"), Some(&name("before")), &id("new")).unwrap().finish().unwrap();
    bed.script.is_done();

    // Given up: what it would have stood on goes.
    bed.script.expect(&[(LIST, Ok(WEB)), ("zfs snapshot tank/kiln/web@base-*", Ok(""))]);
    let pending = bed.disks.start_clone(&id("web"), None, &id("new")).unwrap();
    let left = format!("{WEB}tank/kiln/web@base-dead\tsnapshot\t1\t1\t1\t1\t1\t-\t-\t-\t\tweb\n");
    bed.script.expect(&[(LIST, Ok(&left)), ("zfs destroy tank/kiln/web@base-dead", Ok("")), (LIST, Ok(WEB))]);
    drop(pending);
    bed.script.is_done();
}

#[test]
fn a_snapshot_gets_its_name_when_it_is_finished() {
    let bed = Bed::new(WEB);
    bed.script.expect(&[(LIST, Ok(WEB)), ("zfs snapshot tank/kiln/web@base-*", Ok(""))]);
    let pending = bed.disks.start_snapshot(&id("web"), &name("after")).unwrap();
    bed.script.is_done();
    bed.script
        .expect(&[(LIST, Ok(WEB)), ("zfs rename tank/kiln/web@base-* tank/kiln/web@snap-after", Ok(""))]);
    pending.finish().unwrap();
    bed.script.is_done();
    bed.script.expect(&[(LIST, Ok(WEB))]);
    assert_eq!(bed.disks.snapshot(&id("web"), &name("before")).unwrap_err().kind(), Kind::Conflict);
    bed.script.is_done();
}

#[test]
fn a_restore_puts_a_clone_in_the_disks_place() {
    let bed = Bed::new(WEB);
    let after = "\
tank/kiln/old:abc\tvolume\t8\t1700000100\t1073741824\t7000000\t5000000\t4000000\t4000000\t-\t-\tweb
tank/kiln/old:abc@snap-before\tsnapshot\t20\t1700000200\t536870912\t1000000\t4500000\t-\t-\t-\ttank/kiln/web\tweb
tank/kiln/web\tvolume\t21\t1700000300\t536870912\t0\t4500000\t0\t0\ttank/kiln/old:abc@snap-before\t-\tweb
";
    bed.script.expect(&[
        (LIST, Ok(WEB)),
        ("zfs clone -o volmode=dev -o kiln:disk=web tank/kiln/web@snap-before tank/kiln/making:*", Ok("")),
        ("zfs rename tank/kiln/web tank/kiln/old:*", Ok("")),
        ("zfs rename tank/kiln/making:* tank/kiln/web", Ok("")),
        (LIST, Ok(after)),
        ("zfs rollback tank/kiln/old:abc@snap-before", Ok("")),
    ]);
    bed.disks.restore(&id("web"), &name("before")).unwrap();
    bed.script.is_done();

    // The snapshot stays the disk's, although it is on another volume now.
    bed.script.expect(&[(LIST, Ok(after)), (LIST, Ok(after))]);
    let snapshots = bed.disks.snapshots(&id("web")).unwrap();
    assert_eq!((snapshots[0].name.as_str(), snapshots[0].size), ("before", 512 << 20));
    assert_eq!(snapshots[0].created.as_second(), 1_700_000_200);
    assert_eq!(bed.disks.size(&id("web")).unwrap(), 512 << 20);
    bed.script.is_done();
}

#[test]
fn a_disk_is_put_back_in_its_place_if_its_restore_fails_half_way() {
    let bed = Bed::new(WEB);
    let half = "\
tank/kiln/making:abc\tvolume\t30\t1\t536870912\t0\t1\t0\t0\ttank/kiln/old:abc@snap-before\t-\tweb
tank/kiln/old:abc\tvolume\t8\t1\t1073741824\t1\t1\t1\t1\t-\t-\tweb
tank/kiln/old:abc@snap-before\tsnapshot\t20\t1\t536870912\t1\t1\t-\t1\t-\ttank/kiln/making:abc\tweb
";
    bed.script.expect(&[
        (LIST, Ok(WEB)),
        ("zfs clone -o volmode=dev -o kiln:disk=web tank/kiln/web@snap-before tank/kiln/making:*", Ok("")),
        ("zfs rename tank/kiln/web tank/kiln/old:*", Ok("")),
        ("zfs rename tank/kiln/making:* tank/kiln/web", Err("pool I/O is currently suspended")),
        (LIST, Ok(half)),
        ("zfs rename tank/kiln/old:* tank/kiln/web", Ok("")),
        (LIST, Ok(&half.replace("old:abc", "web"))),
        ("zfs destroy tank/kiln/making:abc", Ok("")),
        (LIST, Ok(WEB)),
    ]);
    let error = bed.disks.restore(&id("web"), &name("before")).unwrap_err().to_string();
    bed.script.is_done();
    assert_eq!(error, "cannot restore the disk `web`: zfs says: pool I/O is currently suspended");

    // Where that fails as well, both stay for whoever finishes it.
    bed.script.expect(&[
        (LIST, Ok(WEB)),
        ("zfs clone -o volmode=dev -o kiln:disk=web tank/kiln/web@snap-before tank/kiln/making:*", Ok("")),
        ("zfs rename tank/kiln/web tank/kiln/old:*", Ok("")),
        ("zfs rename tank/kiln/making:* tank/kiln/web", Err("pool I/O is currently suspended")),
        (LIST, Ok(half)),
        ("zfs rename tank/kiln/old:* tank/kiln/web", Err("pool I/O is currently suspended")),
        (LIST, Ok(half)),
    ]);
    bed.disks.restore(&id("web"), &name("before")).unwrap_err();
    bed.script.is_done();
}

#[test]
fn a_restore_that_was_cut_short_is_finished_by_whoever_opens_the_disks_next() {
    let directory = tempfile::tempdir().unwrap();
    let devices = directory.path().join("dev");
    fs::create_dir_all(devices.join("tank/kiln")).unwrap();
    fs::write(devices.join("tank/kiln/making:x"), "").unwrap();
    let script = Arc::new(Script { steps: Mutex::default(), devices: devices.clone() });
    let cut = "\
tank/kiln/old:x\tvolume\t1\t1\t1\t1\t1\t1\t1\t-\t-\tweb
tank/kiln/old:x@snap-a\tsnapshot\t1\t1\t1\t1\t1\t-\t-\t-\ttank/kiln/making:x\tweb
tank/kiln/making:x\tvolume\t1\t1\t1\t1\t1\t1\t1\ttank/kiln/old:x@snap-a\t-\tweb
tank/kiln/old:y\tvolume\t1\t1\t1\t1\t1\t1\t1\t-\t-\tgone
";
    let finished = cut.replace("making:x", "web");
    script.expect(&[
        ("zfs list -H -o type tank/kiln", Ok("filesystem\n")),
        (LIST, Ok(cut)),
        ("zfs rename tank/kiln/making:x tank/kiln/web", Ok("")),
        (LIST, Ok(&finished)),
        (LIST, Ok(&finished)),
        ("zfs inherit kiln:disk tank/kiln/old:y", Ok("")),
        (LIST, Ok(&finished)),
        ("zfs destroy tank/kiln/old:y", Err("cannot destroy 'tank/kiln/old:y': dataset is busy")),
        ("zfs destroy tank/kiln/old:y", Err("cannot destroy 'tank/kiln/old:y': I/O error")),
        (LIST, Ok(&finished)),
    ]);
    ZfsDisks::with(directory.path().join("disks"), "tank/kiln", script.clone(), script.clone()).unwrap();
    script.is_done();
}

#[test]
fn a_removed_disk_stays_without_a_name_while_clones_stand_on_it() {
    let bed = Bed::new(FORKED);
    fs::create_dir_all(bed.directory.path().join("disks/web/files")).unwrap();
    let renamed = FORKED.replace("kiln/web", "kiln/old:abc");
    let removed = renamed.replace("\tweb\n", "\t-\n");
    bed.script.expect(&[
        (LIST, Ok(FORKED)),
        ("zfs rename tank/kiln/web tank/kiln/old:*", Ok("")),
        ("zfs inherit kiln:disk tank/kiln/old:*", Ok("")),
        (LIST, Ok(&removed)),
        // What it wrote after that is freed.
        ("zfs rollback tank/kiln/old:abc@snap-before", Ok("")),
    ]);
    bed.disks.remove(&id("web")).unwrap();
    bed.script.is_done();
    assert!(!bed.directory.path().join("disks/web").exists());

    // With the last clone all goes.
    let removed = removed.replace("\t1083392\t-\t-\t", "\t1024\t-\t-\t");
    let renamed = removed.replace("kiln/fork\t", "kiln/old:def\t");
    let nameless = renamed.replace("\tfork\n", "\t-\n");
    let alone: String =
        removed.lines().skip(1).map(|line| line.replace("tank/kiln/fork", "-") + "\n").collect();
    bed.script.expect(&[
        (LIST, Ok(&removed)),
        ("zfs rename tank/kiln/fork tank/kiln/old:*", Ok("")),
        ("zfs inherit kiln:disk tank/kiln/old:*", Ok("")),
        (LIST, Ok(&nameless)),
        ("zfs destroy tank/kiln/old:def", Ok("")),
        (LIST, Ok(&alone)),
        ("zfs destroy tank/kiln/old:abc@snap-before", Ok("")),
        ("zfs destroy tank/kiln/old:abc", Ok("")),
        (LIST, Ok("")),
    ]);
    bed.disks.remove(&id("fork")).unwrap();
    bed.script.is_done();

    // Nothing there is no error.
    bed.script.expect(&[(LIST, Ok("")), (LIST, Ok(""))]);
    bed.disks.remove(&id("never")).unwrap();
    bed.script.is_done();
}

#[test]
fn a_snapshot_with_clones_loses_its_name_and_one_without_goes() {
    let bed = Bed::new(WEB);
    bed.script.expect(&[(LIST, Ok(WEB)), ("zfs destroy tank/kiln/web@snap-before", Ok(""))]);
    bed.disks.delete_snapshot(&id("web"), &name("before")).unwrap();
    bed.script
        .expect(&[(LIST, Ok(FORKED)), ("zfs rename tank/kiln/web@snap-before tank/kiln/web@base-*", Ok(""))]);
    bed.disks.delete_snapshot(&id("web"), &name("before")).unwrap();
    bed.script.is_done();
}

#[test]
fn volumes_grow_in_whole_blocks_and_never_shrink() {
    let bed = Bed::new(WEB);
    bed.script.expect(&[(LIST, Ok(WEB)), ("zfs set volsize=2147500032 tank/kiln/web", Ok(""))]);
    bed.disks.resize(&id("web"), (2 << 30) + 1).unwrap();
    bed.script.expect(&[(LIST, Ok(WEB)), (LIST, Ok(WEB)), (LIST, Ok(WEB))]);
    bed.disks.resize(&id("web"), (1 << 30) - 1).unwrap();
    let error = bed.disks.resize(&id("web"), 1 << 29).unwrap_err().to_string();
    assert!(error.contains("cannot shrink the disk `web` from 1.0 GiB to 512.0 MiB"), "{error}");
    assert_eq!(bed.disks.resize(&id("gone"), 1 << 30).unwrap_err().kind(), Kind::NotFound);
    bed.script.is_done();
}

#[test]
fn usage_is_what_zfs_charges_without_what_clones_stand_on() {
    let of = |listing: &str| {
        let usage = usage::usage(&Listing::parse("tank/kiln", listing).unwrap());
        let figures = usage.disks.iter().map(|(id, usage)| (id.to_string(), usage.exclusive, usage.shared));
        (figures.collect::<Vec<_>>(), usage.taken)
    };
    let figures = |name: &str, exclusive: u64, shared: u64| (name.to_owned(), exclusive, shared);
    assert_eq!(
        of(WEB),
        (vec![figures("web", 5_312_512, 0)], 5_312_512),
        "a snapshot of its own is nobody else's"
    );
    let (fork, web) = (figures("fork", 2_131_968, 2_097_152), figures("web", 1_083_392, 3_145_728));
    assert_eq!(of(FORKED), (vec![fork, web], 7_444_480));

    // What a restore left belongs to the disk.
    let restored = "\
tank/kiln/old:abc\tvolume\t8\t1700000100\t1073741824\t4230144\t4229120\t4229120\t1024\t-\t-\tweb
tank/kiln/old:abc@snap-before\tsnapshot\t20\t1700000200\t536870912\t1024\t4229120\t-\t4229120\t-\ttank/kiln/web\tweb
tank/kiln/web\tvolume\t30\t1700000300\t536870912\t1066496\t4229120\t1066496\t1066496\ttank/kiln/old:abc@snap-before\t-\tweb
";
    assert_eq!(of(restored), (vec![figures("web", 5_296_640, 0)], 5_296_640));
    // What removed disks left belongs to the last that needs it.
    let heir = FORKED.replace("kiln/web", "kiln/old:abc").replace("\tweb\n", "\t-\n");
    assert_eq!(of(&heir), (vec![figures("fork", 7_444_480, 0)], 7_444_480));
    // A fork that was made before it keeps what is below both.
    let forked = restored.replace("\ttank/kiln/web\tweb", "\ttank/kiln/fork,tank/kiln/web\tweb")
        + "tank/kiln/fork\tvolume\t21\t1700000300\t536870912\t9\t4229120\t9\t9\ttank/kiln/old:abc@snap-before\t-\tfork\n";
    let (fork, web) = (figures("fork", 9, 4_229_111), figures("web", 1_066_496 + 1024, 3_162_624));
    assert_eq!(of(&forked), (vec![fork, web], 5_296_649));
}

#[test]
fn a_dataset_that_cannot_be_is_refused_with_a_reason() {
    let open = |dataset: &str, steps: &[(&str, std::result::Result<&str, &str>)]| {
        let directory = tempfile::tempdir().unwrap();
        let script = Arc::new(Script { steps: Mutex::default(), devices: directory.path().to_owned() });
        script.expect(steps);
        let error =
            ZfsDisks::with(directory.path().to_owned(), dataset, script.clone(), script.clone()).unwrap_err();
        script.is_done();
        BackendError::from(error)
    };
    for bad in ["", "-r", "tank/", "/tank", "tank//kiln", "tank/a@b", "tank/a b", "tank/%x", &"t".repeat(101)]
    {
        assert_eq!(open(bad, &[]).kind(), Kind::Invalid, "{bad}");
    }
    let look = "zfs list -H -o type tank/kiln";
    let missing = "cannot open 'tank/kiln': dataset does not exist";
    let error = open("tank/kiln", &[(look, Err(missing))]);
    assert_eq!(error.to_string(), "there is no ZFS dataset `tank/kiln`");
    assert_eq!(error.hint_text(), Some("`zfs create -o canmount=off tank/kiln` makes one"));
    let error = open("tank/kiln", &[(look, Ok("volume\n"))]);
    assert_eq!(error.to_string(), "`tank/kiln` is a volume, and disks need a file system's dataset");
    let denied = "Permission denied the ZFS utilities must be run as root.";
    let error = open("tank/kiln", &[(look, Err(denied))]);
    assert_eq!(error.to_string(), format!("cannot look at the dataset for disks: zfs says: {denied}"));
}
