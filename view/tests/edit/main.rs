//! Editable views: the FUSE server's, against a plain directory and the kernel's overlay.
//!
//! Tests by chance tell the number that they began with (`seed`); `KILN_SEED` takes that one again, and `KILN_SEEDS` as many as
//! it says. `KILN_STEPS` is how many operations each does: a million take some minutes.
#![cfg(target_os = "linux")]

mod ground;
mod kernel;
mod many_open;
mod on_demand;
mod operations;
mod passthrough;
mod programs;
mod random;
mod reflink;
mod special;
mod table;

use std::fs::{self, File};
use std::process::Command;

use ground::{
    BACKENDS, Backend, Ground, as_ordinary_user, assert_same_tree, same, with_ground, with_ground_of,
};
use kiln_contract::Scratch;
use kiln_view::fuse;
use operations::{Op, Place, snapshot};
use random::Random;
use table::{b, s, table};

/// Does nothing as a test: this is where the grounds of the router begin.
#[test]
fn the_routers_service_itself() {
    let Ok(home) = std::env::var(ground::SERVICE) else { return };
    let home = kiln_contract::Home::at(home);
    let views = kiln_view::views::Views::open(&home).fetching(ground::fetcher(&home));
    kiln_view::router::serve(&views, kiln_view::router::IDLE, || {}).unwrap();
}

#[test]
fn every_operation_of_the_table_does_what_it_does_in_a_plain_directory() {
    for ((name, operations), backend) in
        table().into_iter().flat_map(|case| BACKENDS.map(|on| (case.clone(), on)))
    {
        with_ground_of(backend, move |ground| {
            let name = &format!("{name}, on {backend:?}");
            does_the_same(ground, name, &operations);
            ground.mount_upper("upper", "kernel-work", true);
            assert_same_tree(ground, "kernel", &format!("{name}, mounted by the kernel"));
        });
    }
}

#[test]
fn the_kernel_reads_ahead_by_whole_requests_in_views_of_root() {
    for backend in BACKENDS {
        with_ground_of(backend, |ground| {
            let mounted = ground.edit();
            let device = rustix::fs::stat(ground.at("view")).unwrap().st_dev;
            let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
            let told = fs::read_to_string(format!("/sys/class/bdi/{major}:{minor}/read_ahead_kb")).unwrap();
            assert_eq!(told.trim(), "1024");
            mounted.unmount().unwrap();
        });
    }
}

#[test]
fn every_operation_of_the_table_is_allowed_to_an_ordinary_user_as_in_a_plain_directory() {
    // What he may not do (owners, devices, `trusted.` attributes) he may not do in either.
    const TEST: &str = "every_operation_of_the_table_is_allowed_to_an_ordinary_user_as_in_a_plain_directory";
    as_ordinary_user(TEST, |directory| {
        for (number, (name, operations)) in table().into_iter().enumerate() {
            for backend in BACKENDS {
                let own = directory.join(format!("{number}-{backend:?}"));
                fs::create_dir(&own).unwrap();
                let ground = Ground::new(&own, true, 0, backend);
                does_the_same(&ground, &format!("{name}, on {backend:?}"), &operations);
            }
        }
    });
}

/// The same operations in a view and in a plain directory tell the same and leave the same.
fn does_the_same(ground: &Ground, name: &str, operations: &[Op]) {
    let mounted = ground.edit();
    let (mut view, mut plain) = (Place::new(&ground.at("view")), Place::new(&ground.at("plain")));
    for op in operations {
        same(&mut view, &mut plain, op, name);
    }
    view.close_all();
    plain.close_all();
    assert_same_tree(ground, "view", name);
    mounted.unmount().unwrap();
    // Everything is on disk, in the form that the kernel knows: another server shows the same, and so does that.
    let mounted = ground.edit();
    assert_same_tree(ground, "view", &format!("{name}, served again"));
    mounted.unmount().unwrap();
}

#[test]
fn nobody_makes_a_mark_of_the_scratch_by_hand() {
    // Overlayfs means a character device 0/0 as «removed», and refuses to make one as this does (`overlayfs.rst`).
    for backend in BACKENDS {
        with_ground_of(backend, |ground| {
            let mounted = ground.edit();
            let mut view = Place::new(&ground.at("view"));
            let kind = rustix::fs::FileType::CharacterDevice;
            for path in ["a/n", "n"] {
                let told = view.apply(&Op::Node(s(path), kind, 0o600, (0, 0)));
                assert_eq!(told, Err(libc::EPERM));
                assert_eq!(view.apply(&Op::Create(s(path), 0o600, b("1"))), Ok(Vec::new()));
            }
            let told = view.apply(&Op::Node(s("a/small"), kind, 0o600, (0, 0)));
            assert_eq!(told, Err(libc::EEXIST));
            mounted.unmount().unwrap();
        });
    }
}

#[test]
fn what_the_kernel_has_changed_is_shown_as_the_kernel_shows_it() {
    for seed in seeds(3) {
        with_ground(move |ground| {
            ground.mount_upper("upper", "work", false);
            let mut random = Random(seed);
            let mut kernel = Place::new(&ground.at("kernel"));
            for _ in 0..400 {
                // What is refused is no matter here.
                let _ = kernel.apply(&random.on_names());
            }
            kernel.close_all();
            let shown = snapshot(&ground.at("kernel"));
            ground.unmount_kernel();
            let mounted = ground.edit();
            let view = snapshot(&ground.at("view"));
            let differing: Vec<_> = view.iter().filter(|line| !shown.contains(line)).collect();
            let missing: Vec<_> = shown.iter().filter(|line| !view.contains(line)).collect();
            assert!(
                differing.is_empty() && missing.is_empty(),
                "seed {seed}: {differing:#?} for {missing:#?}"
            );
            mounted.unmount().unwrap();
        });
    }
}

/// The numbers that tests by chance begin with: those of `KILN_SEED` (one) or, in `KILN_SEEDS`, as many as are said there.
fn seeds(usual: u64) -> Vec<u64> {
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    match number("KILN_SEED") {
        Some(seed) => vec![seed],
        None => (1..=number("KILN_SEEDS").unwrap_or(usual)).collect(),
    }
}

/// How many operations a test by chance does.
fn steps() -> usize {
    std::env::var("KILN_STEPS").ok().and_then(|text| text.parse().ok()).unwrap_or(1500)
}

/// Random operations in a view and in a plain directory. From time to time the server is killed, and another one goes on.
fn by_chance(seed: u64, backend: Backend, steps: usize, next: fn(&mut Random) -> Op) {
    with_ground_of(backend, move |ground| {
        let mut random = Random(seed);
        let mut mounted = ground.edit();
        let (mut view, mut plain) = (Place::new(&ground.at("view")), Place::new(&ground.at("plain")));
        for step in 0..steps {
            let op = next(&mut random);
            same(&mut view, &mut plain, &op, &format!("seed {seed}, step {step}"));
            if random.below(150) == 0 {
                view.close_all();
                plain.close_all();
                assert_same_tree(ground, "view", &format!("seed {seed}, step {step}"));
                mounted.kill();
                ground.forget_killed();
                mounted = ground.edit();
                assert_same_tree(ground, "view", &format!("seed {seed}, killed after step {step}"));
            }
        }
        view.close_all();
        plain.close_all();
        assert_same_tree(ground, "view", &format!("seed {seed}, at the end"));
        mounted.unmount().unwrap();
    });
}

#[test]
fn data_changed_by_chance_are_those_of_a_plain_directory() {
    seeds(4).into_iter().for_each(|seed| by_chance(seed, Backend::Fuse, steps(), Random::on_data));
    seeds(2).into_iter().for_each(|seed| by_chance(seed, Backend::Router, steps() * 2 / 3, Random::on_data));
}

#[test]
fn names_changed_by_chance_are_those_of_a_plain_directory() {
    seeds(8).into_iter().for_each(|seed| by_chance(seed, Backend::Fuse, steps(), Random::on_names));
    seeds(4).into_iter().for_each(|seed| by_chance(seed, Backend::Router, steps() * 2 / 3, Random::on_names));
}

fn listed(ground: &Ground) -> Vec<String> {
    let told = kiln_view::changes(&ground.at("tree.erofs"), &ground.at("upper")).unwrap();
    told.into_iter()
        .map(|change| format!("{:?} {}", change.kind, String::from_utf8(change.path).unwrap()))
        .collect()
}

#[test]
fn changes_are_told_as_differences_between_the_tree_and_the_view() {
    with_ground(|ground| {
        let mounted = ground.edit();
        let mut view = Place::new(&ground.at("view"));
        for op in [
            Op::Rename(s("a"), s("z")),
            Op::Append(s("z/small"), b("x")),
            Op::Unlink(s("z/sub/f")),
            Op::Unlink(s("c/small")),
            Op::Create(s("n"), 0o644, b("")),
            Op::Rename(s("c/sub"), s("n2")),
            Op::Mkdir(s("c/sub"), 0o755),
            Op::Create(s("c/sub/new"), 0o644, b("")),
            Op::Chmod(s("c/g"), 0o644),
            Op::Rename(s("b/sub/sub"), s("b/inner")),
            Op::Rename(s("b/inner"), s("b/sub/sub")),
        ] {
            view.apply(&op).unwrap();
        }
        let expected = [
            "Added /n",
            "Added /n2",
            "Added /n2/f",
            "Added /n2/sub",
            "Added /n2/sub/f",
            "Added /n2/twin",
            "Added /z",
            "Added /z/g",
            "Added /z/large",
            "Added /z/link",
            "Added /z/small",
            "Added /z/sub",
            "Added /z/sub/sub",
            "Added /z/sub/sub/f",
            "Added /z/sub/twin",
            "Added /z/twin",
            "Deleted /a",
            "Deleted /c/small",
            "Added /c/sub/new",
            "Deleted /c/sub/f",
            "Deleted /c/sub/sub",
            "Deleted /c/sub/twin",
            "Modified /b",
            "Modified /b/sub",
            "Modified /b/sub/sub",
            "Modified /c",
            "Modified /c/sub",
            "Modified /c/g",
        ];
        let mut told = listed(ground);
        let mut expected: Vec<_> = expected.map(str::to_owned).into();
        told.sort();
        expected.sort();
        assert_eq!(told, expected);
        mounted.unmount().unwrap();
    });
}

#[test]
fn times_of_directories_change_with_their_names_and_never_by_copying_up() {
    use std::os::unix::fs::MetadataExt;
    with_ground(|ground| {
        let mounted = ground.edit();
        let time = |path: &str| fs::metadata(ground.at("view").join(path)).unwrap().mtime();
        fs::set_permissions(ground.at("view/a/sub/f"), std::os::unix::fs::PermissionsExt::from_mode(0o600))
            .unwrap();
        fs::write(ground.at("view/a/sub/sub/f"), "x").unwrap();
        for path in ["a", "a/sub", "a/sub/sub", "a/sub/f"] {
            assert_eq!(time(path), 1000, "{path}");
        }
        assert_ne!(time("a/sub/sub/f"), 1000);
        fs::remove_file(ground.at("view/a/sub/f")).unwrap();
        assert_ne!(time("a/sub"), 1000);
        assert_eq!(time("a"), 1000);
        mounted.unmount().unwrap();
    });
}

#[test]
fn a_scratch_serves_one_view_at_a_time() {
    with_ground(|ground| {
        let mounted = ground.edit();
        let (tree, objects, scratch) = (ground.at("tree.erofs"), ground.at("objects"), ground.scratch());
        let again = fuse::start(&ground.served(&tree, &objects, Some(&scratch)));
        assert!(again.unwrap_err().to_string().contains("in use"));
        mounted.unmount().unwrap();
        ground.edit().unmount().unwrap();
    });
}

#[test]
fn a_full_disk_is_told_to_the_program_and_nothing_is_lost() {
    with_ground(|ground| {
        fs::create_dir(ground.at("small")).unwrap();
        let flags = rustix::mount::MountFlags::empty();
        rustix::mount::mount("small", ground.at("small"), "tmpfs", flags, c"size=300k").unwrap();
        for name in ["upper", "work"] {
            fs::create_dir(ground.at("small").join(name)).unwrap();
        }
        let scratch =
            Scratch { upper: ground.at("small/upper"), work: ground.at("small/work"), volatile: true };
        let mounted = ground.serve(Some(&scratch));
        let at = |name: &str| ground.at("view").join(name);
        fs::write(at("first"), vec![1; 150_000]).unwrap();
        let full = |result: std::io::Result<()>| result.unwrap_err().raw_os_error() == Some(libc::ENOSPC);
        assert!(full(fs::write(at("second"), vec![2; 200_000])));
        fs::remove_file(at("second")).unwrap();
        // The kernel tells of the last close when it has the time, and only then the room is there again.
        let room = || {
            rustix::fs::statvfs(ground.at("small"))
                .is_ok_and(|small| small.f_bfree * small.f_frsize > 140_000)
        };
        for _ in 0..1000 {
            if room() {
                break;
            }
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
        assert!(room(), "what was removed and closed still takes its room");
        // A copy has no room twice.
        fs::write(at("third"), vec![3; 60_000]).unwrap();
        assert!(full(File::options().append(true).open(at("a/large")).map(drop)));
        assert_eq!(fs::read(at("a/large")).unwrap().len(), 100_000);
        assert_eq!(fs::read_dir(ground.at("small/work")).unwrap().count(), 0, "half a copy is left");
        fs::remove_file(at("third")).unwrap();
        fs::write(at("a/large"), "new").unwrap();
        assert_eq!(fs::read(at("first")).unwrap(), vec![1; 150_000]);
        mounted.unmount().unwrap();
    });
}

#[test]
fn what_was_written_before_the_server_was_killed_is_there() {
    BACKENDS.into_iter().for_each(written_before_a_kill_is_there);
}

fn written_before_a_kill_is_there(backend: Backend) {
    with_ground_of(backend, move |ground| {
        for round in 0..5_u64 {
            let mounted = ground.edit();
            let view = ground.at("view");
            let (told, acknowledged) = std::sync::mpsc::channel();
            let writer = std::thread::spawn(move || {
                for number in 0_u64.. {
                    let file = view.join(format!("a/{round}-{number}"));
                    let text = vec![number as u8; 5000];
                    let temporary = view.join("temporary");
                    let write = || -> std::io::Result<()> {
                        fs::write(&temporary, &text)?;
                        fs::rename(&temporary, &file)?;
                        let mut log = File::options().append(true).create(true).open(view.join("b/large"))?;
                        std::io::Write::write_all(&mut log, &[number as u8])
                    };
                    if write().is_err() || told.send(number).is_err() {
                        break;
                    }
                }
            });
            for _ in 0..20 + 13 * round {
                acknowledged.recv().unwrap();
            }
            mounted.kill();
            writer.join().unwrap();
            let last = acknowledged.try_iter().last();
            ground.forget_killed();
            let mounted = ground.edit();
            for number in 0..=last.unwrap_or(19 + 13 * round) {
                let file = ground.at("view").join(format!("a/{round}-{number}"));
                assert_eq!(fs::read(file).unwrap(), vec![number as u8; 5000]);
            }
            assert!(fs::metadata(ground.at("view/b/large")).unwrap().len() > 100_000);
            mounted.unmount().unwrap();
        }
    });
}

#[test]
fn many_processes_at_once_see_and_change_one_view() {
    with_ground(|ground| {
        let mounted = ground.edit();
        // Each gives names to a file of its own: of one to which several processes give names at this moment the kernel counts
        // them by answers that may come in another order, and takes it for removed now and then.
        let script = r#"
            set -e; cd "$1"; i=$2
            for n in 1 2 3 4 5 6 7 8 9 10; do
                mkdir -p d/$i; echo $i-$n > d/$i/$n; mv d/$i/$n d/moved-$i-$n; cat a/large > d/$i/copy-$n
                echo line-$i-$n >> log; ln d/moved-$i-$n d/link-$i-$n; rm d/link-$i-$n; flock lock sh -c 'read n < count; echo $((n+1)) > count'
            done"#;
        fs::write(ground.at("view/count"), "0\n").unwrap();
        fs::write(ground.at("view/lock"), "").unwrap();
        let children: Vec<_> = (0..8)
            .map(|number| {
                let number = number.to_string();
                Command::new("sh")
                    .args(["-c", script, "sh"])
                    .arg(ground.at("view"))
                    .arg(number)
                    .spawn()
                    .unwrap()
            })
            .collect();
        for mut child in children {
            assert!(child.wait().unwrap().success());
        }
        let read = |name: &str| fs::read_to_string(ground.at("view").join(name)).unwrap();
        assert_eq!(read("count"), "80\n");
        assert_eq!(read("log").lines().count(), 80);
        for process in 0..8 {
            for number in 1..=10 {
                assert_eq!(read(&format!("d/moved-{process}-{number}")), format!("{process}-{number}\n"));
                let copy = fs::read(ground.at(&format!("view/d/{process}/copy-{number}"))).unwrap();
                assert_eq!(copy, fs::read(ground.at("plain/a/large")).unwrap());
            }
        }
        mounted.unmount().unwrap();
    });
}
