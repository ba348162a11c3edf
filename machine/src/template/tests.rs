use kiln_contract::Silent;

use super::*;

const MIB: u64 = 1 << 20;

/// A home, its disks, and what makes templates in it that are files and nothing more.
struct Bed {
    _directory: tempfile::TempDir,
    home: Home,
    disks: Box<dyn DiskBackend>,
}

impl Bed {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let home = Home::at(directory.path().join("home"));
        fs::create_dir_all(home.path()).unwrap();
        let disks = kiln_disk::open(&home, &kiln_disk::Choice::Sparse).unwrap().backend;
        Self { _directory: directory, home, disks }
    }

    fn templates(&self) -> Templates<'_> {
        Templates::open(&self.home, &*self.disks)
    }

    /// The template of a key, and whether it was made for it; `bytes` of its memory are no holes.
    fn get(&self, key: Digest, disk: Disk, bytes: usize) -> (Saved, bool) {
        let mut made = false;
        let templates = self.templates();
        let template = templates.once(key, disk, ("test".to_owned(), &Silent), |place| {
            made = true;
            if let Some(disk) = place.disk {
                templates.disks.create(disk, DISK_SIZE)?;
            }
            let memory = place.directory.join(MEMORY);
            fs::write(&memory, vec![1; bytes]).unwrap();
            File::options().write(true).open(&memory).unwrap().set_len(SHAPE.memory).unwrap();
            fs::write(place.directory.join(STATE), "state").unwrap();
            Ok(record())
        });
        (template.unwrap(), made)
    }

    /// As if it had last been used so many seconds after the first day of Unix.
    fn used_at(&self, template: &Saved, seconds: u64) {
        let time = std::time::UNIX_EPOCH + std::time::Duration::from_secs(seconds);
        File::options()
            .append(true)
            .open(template.directory().join(RECORD))
            .unwrap()
            .set_modified(time)
            .unwrap();
    }

    fn keys(&self) -> Vec<Digest> {
        self.templates().list().unwrap().iter().map(|template| template.record().key).collect()
    }
}

const SHAPE: Shape = Shape { cpus: 1, memory: 4 * MIB, network: false };

fn record() -> TemplateRecord {
    TemplateRecord {
        format: FORMAT,
        key: number(0),
        made: jiff::Timestamp::now(),
        kernel: "kernel".to_owned(),
        hypervisor: "hypervisor".to_owned(),
        shape: SHAPE,
        disk: Disk::Own,
        boot_millis: 1,
        sum: None,
        memory_sum: None,
        delta_sum: None,
    }
}

fn number(number: usize) -> Digest {
    Digest::of(number.to_string().as_bytes())
}

#[test]
fn whatever_of_its_key_changes_another_template_is_made() {
    let bed = Bed::new();
    let same = Parts {
        hypervisor: "qemu 1",
        kernel: number(1),
        guest: guest::DIGEST,
        shape: SHAPE,
        disk: Disk::Own,
    };
    let changed = [
        ("nothing", same),
        ("the hypervisor", Parts { hypervisor: "qemu 2", ..same }),
        ("the kernel", Parts { kernel: number(2), ..same }),
        ("the guest", Parts { guest: "another", ..same }),
        ("processors", Parts { shape: Shape { cpus: 2, ..SHAPE }, ..same }),
        ("memory", Parts { shape: Shape { memory: 2 * MIB, ..SHAPE }, ..same }),
        ("a network device", Parts { shape: Shape { network: true, ..SHAPE }, ..same }),
        ("the disk", Parts { disk: Disk::Empty, ..same }),
    ];
    for (count, (what, parts)) in changed.into_iter().enumerate() {
        assert!(bed.get(parts.key(), parts.disk, 1).1, "{what} changed");
        assert!(!bed.get(parts.key(), parts.disk, 1).1, "{what} did not change again");
        assert_eq!(bed.keys().len(), count + 1, "{what}: the others stay");
    }
    let roots = ["/images/a", "/images/b"].map(|image| root_key(same.key(), Path::new(image)));
    assert!(roots[0] != roots[1] && roots[0] != root_key(number(1), Path::new("/images/a")));
}

#[test]
fn of_many_templates_those_used_last_are_kept_and_those_in_use() {
    let bed = Bed::new();
    let templates: Vec<_> = (0..KEPT + 1).map(|name| bed.get(number(name), Disk::Empty, 1).0).collect();
    assert_eq!(bed.keys().len(), KEPT + 1, "so many are kept");
    for (at, template) in templates.iter().enumerate() {
        bed.used_at(template, at as u64);
    }
    let held = templates[1].hold().unwrap();
    let disk = |name: usize| bed.disks.path(&disk_id(number(name)).unwrap()).is_ok();
    // What a machine runs from stays beyond them, and is in nobody's place.
    for (new, gone) in [(KEPT + 1, Some(0)), (KEPT + 2, None), (KEPT + 3, Some(2))] {
        let before = bed.keys();
        bed.get(number(new), Disk::Empty, 1);
        let mut after = bed.keys();
        assert_eq!(after.remove(0), number(new));
        let missing: Vec<_> = before.into_iter().filter(|key| !after.contains(key)).collect();
        assert_eq!(missing, gone.map(number).into_iter().collect::<Vec<_>>(), "{new}");
        assert!(gone.is_none_or(|gone| !disk(gone)) && disk(1) && disk(3));
    }
    assert_eq!(bed.keys().len(), KEPT + 2);
    drop(held);
    bed.get(number(KEPT + 4), Disk::Empty, 1);
    assert_eq!(bed.keys().len(), KEPT + 1);
    assert!(!bed.keys().contains(&number(1)) && !disk(1), "it was kept only for as long as it was used");
}

#[test]
fn templates_take_no_more_room_than_they_may() {
    let bed = Bed::new();
    let templates: Vec<_> = (0..4).map(|name| bed.get(number(name), Disk::Own, MIB as usize).0).collect();
    for (at, template) in templates.iter().enumerate() {
        assert!((MIB..2 * MIB).contains(&template.size()), "{}", template.size());
        bed.used_at(template, at as u64);
    }
    let held = templates[0].hold().unwrap();
    let newest = number(3);
    bed.templates().keep_few(newest, KEPT, 5 * MIB).unwrap();
    assert_eq!(bed.keys().len(), 4, "all fit");
    bed.templates().keep_few(newest, KEPT, 2 * MIB + MIB / 2).unwrap();
    assert_eq!(bed.keys(), [newest, number(2), number(0)], "the oldest is in use");
    drop(held);
    bed.templates().keep_few(newest, KEPT, MIB / 2).unwrap();
    assert_eq!(bed.keys(), [newest], "the newest stays, however large it is");
}

#[test]
fn what_a_killed_maker_left_goes_when_another_template_is_made_and_what_is_being_made_stays() {
    let bed = Bed::new();
    let root = bed.home.templates();
    let left = |name: usize| {
        let directory = root.join(format!("{UNFINISHED}{}-abcdef", number(name).hex()));
        fs::create_dir_all(&directory).unwrap();
        fs::write(directory.join(MEMORY), "half").unwrap();
        bed.disks.create(&disk_id(number(name)).unwrap(), DISK_SIZE).unwrap();
        (directory, File::create(root.join(number(name).hex()).with_extension(LOCK)).unwrap())
    };
    let ((killed, _), (making, lock), (own, _)) = (left(1), left(2), left(3));
    flock(&lock, FlockOperation::LockExclusive).unwrap();
    let disk = |name: usize| bed.disks.path(&disk_id(number(name)).unwrap()).is_ok();
    bed.get(number(3), Disk::Empty, 1);
    assert!(!killed.exists() && !disk(1), "nobody makes it any more");
    assert!(making.exists() && disk(2), "somebody makes it");
    assert!(!own.exists() && disk(3), "it was made to the end");
}
