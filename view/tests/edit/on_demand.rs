//! Objects that come while a view is used.

use std::fs::{self, File};
use std::io::{Read as _, Write as _};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{TryRecvError, channel};
use std::time::{Duration, Instant};

use kiln_contract::Digest;
use kiln_erofs::object_redirect;
use kiln_view::router::Client;
use kiln_view::views::Alteration;

use crate::ground::{BACKENDS, Backend, Edited, Ground, VIEW, with_ground_of_many};

/// Files of the view that are read, each by a fetch of its own: more than a server has threads or fetches at once, and more
/// than the kernel reads ahead at once where nobody tells it otherwise.
const READ: usize = 30;
/// Objects that are fetched at once, as `fuse/fetches.rs` has it.
const AT_ONCE: usize = 8;
/// A file whose object is there.
const HERE: &str = "many/0";
const PATIENCE: Duration = Duration::from_secs(60);

fn contents(number: usize) -> String {
    format!("{number}\n").repeat(40)
}

/// Objects that are elsewhere, and come when this is dropped.
struct Held(PathBuf);

impl Held {
    /// Takes every object away but that of one file. Whoever fetches one tells it, and waits.
    fn all_of(ground: &Ground) -> Self {
        let at = |name: &str| ground.at(name).display().to_string();
        for name in ["elsewhere", "asked"] {
            fs::create_dir(ground.at(name)).unwrap();
        }
        let objects = ground.objects();
        let stays = object_redirect(&Digest::of(contents(0).as_bytes()));
        let stays = objects.join(std::ffi::OsStr::from_bytes(&stays[1..]));
        for directory in fs::read_dir(&objects).unwrap() {
            for object in fs::read_dir(directory.unwrap().path()).unwrap() {
                let object = object.unwrap().path();
                if object != stays {
                    let name = object.strip_prefix(&objects).unwrap().to_str().unwrap().replace('/', "");
                    fs::rename(&object, ground.at("elsewhere").join(name)).unwrap();
                }
            }
        }
        let script = format!(
            "hex=${{1#sha256:}}; rest=${{hex#??}}; echo >> {asked}/$hex\n\
             until test -e {go}; do sleep 0.05; done\n\
             mv {elsewhere}/$hex {objects}/${{hex%$rest}}/$rest",
            asked = at("asked"),
            go = at("go"),
            elsewhere = at("elsewhere"),
            objects = objects.display()
        );
        fs::write(ground.at("fetch"), script).unwrap();
        Self(ground.at("go"))
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        fs::write(&self.0, "").unwrap();
    }
}

/// Every file that is fetched, and how often that was.
fn asked(ground: &Ground) -> Vec<usize> {
    let asked = fs::read_dir(ground.at("asked")).unwrap();
    asked.map(|name| fs::read(name.unwrap().path()).unwrap().len()).collect()
}

fn until(what: &str, mut reached: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !reached() {
        assert!(begun.elapsed() < PATIENCE, "{what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// How many requests of a mount have no answer yet, as the kernel counts them.
fn waiting(ground: &Ground) -> impl Fn() -> usize {
    let connections = ground.at("connections");
    fs::create_dir_all(&connections).unwrap();
    let none: Option<&std::ffi::CStr> = None;
    rustix::mount::mount("none", &connections, "fusectl", rustix::mount::MountFlags::empty(), none).unwrap();
    let device = rustix::fs::minor(fs::metadata(ground.at("view")).unwrap().dev());
    let waiting = connections.join(device.to_string()).join("waiting");
    move || fs::read_to_string(&waiting).unwrap().trim().parse().unwrap()
}

/// Something that needs an object, and what is true afterwards.
type Use = Box<dyn FnOnce(&Path) + Send>;

fn reads() -> Vec<Use> {
    let read = |number: usize| -> Use {
        Box::new(move |view| {
            assert_eq!(fs::read_to_string(view.join(format!("many/{number}"))).unwrap(), contents(number));
        })
    };
    (1..=READ).map(read).collect()
}

/// Changes, each of a file of its own that is copied to the scratch for it.
fn changes() -> Vec<Use> {
    let large = |view: &Path, name: &str| assert_eq!(fs::metadata(view.join(name)).unwrap().len(), 100_000);
    vec![
        // A second one that wants the same object.
        Box::new(|view| assert_eq!(fs::read_to_string(view.join("many/1")).unwrap(), contents(1))),
        Box::new(|view| {
            let file = view.join("many/31");
            File::options().append(true).open(&file).unwrap().write_all(b"more").unwrap();
            assert_eq!(fs::read_to_string(file).unwrap(), contents(31) + "more");
        }),
        Box::new(|view| {
            let file = view.join("many/32");
            fs::set_permissions(&file, fs::Permissions::from_mode(0o600)).unwrap();
            assert_eq!(fs::metadata(&file).unwrap().mode() & 0o7777, 0o600);
            assert_eq!(fs::read_to_string(file).unwrap(), contents(32));
        }),
        Box::new(|view| {
            let file = view.join("many/33");
            xattr::set(&file, "user.x", b"value").unwrap();
            assert_eq!(xattr::get(&file, "user.x").unwrap().unwrap(), b"value");
            assert_eq!(fs::read_to_string(file).unwrap(), contents(33));
        }),
        Box::new(|view| {
            let file = view.join("many/34");
            nix::unistd::truncate(&file, 10).unwrap();
            assert_eq!(fs::read_to_string(file).unwrap(), contents(34)[..10]);
        }),
        Box::new(|view| {
            fs::hard_link(view.join("many/35"), view.join("b/linked")).unwrap();
            assert_eq!(fs::read_to_string(view.join("b/linked")).unwrap(), contents(35));
        }),
        Box::new(move |view| {
            fs::rename(view.join("c/large"), view.join("c/moved")).unwrap();
            large(view, "c/moved");
            let mut begin = [0; 2];
            File::open(view.join("c/moved")).unwrap().read_exact(&mut begin).unwrap();
            assert_eq!(begin, [0, 158]);
        }),
    ]
}

/// What needs nothing that is not here, in a view that can be changed. Directories in which a name is made or moved are locked by
/// the kernel meanwhile: these are others.
fn go_on(view: &Path) {
    let bytes = b"new ".repeat(1 << 20);
    fs::write(view.join("new"), &bytes).unwrap();
    fs::rename(view.join("new"), view.join("a/newer")).unwrap();
    assert!(fs::read(view.join("a/newer")).unwrap() == bytes);
    fs::write(view.join("many/36"), "written anew").unwrap();
    assert_eq!(fs::read(view.join("many/36")).unwrap(), b"written anew");
    fs::set_permissions(view.join(HERE), fs::Permissions::from_mode(0o600)).unwrap();
    fs::remove_file(view.join("many/37")).unwrap();
    assert_eq!(fs::read_dir(view.join("many")).unwrap().count(), 37);
    assert_eq!(fs::read(view.join("a/sub/f")).unwrap(), b"deep");
    look(view);
}

/// What needs nothing that is not here.
fn look(view: &Path) {
    assert_eq!(fs::read_to_string(view.join(HERE)).unwrap(), contents(0));
    assert_eq!(fs::read(view.join("a/small")).unwrap(), b"small");
    assert_eq!(fs::read_link(view.join("a/link")).unwrap(), Path::new("small"));
}

/// As many as wait for objects that nobody brings keep nobody else from using a view; then all get theirs.
fn nobody_else_waits(backend: Backend, editable: bool) {
    with_ground_of_many(backend, 38, move |ground| {
        let held = Held::all_of(ground);
        let mounted = if editable { ground.edit() } else { Edited::Fuse(ground.serve(None)) };
        let waiting = waiting(ground);
        let mut uses = reads();
        if editable {
            uses.extend(changes());
        }
        let objects = if editable { READ + 6 } else { READ };
        let (done, all_done) = channel();
        let users: Vec<_> = uses
            .into_iter()
            .map(|task| {
                let (view, done) = (ground.at("view"), done.clone());
                std::thread::spawn(move || {
                    task(&view);
                    let _ = done.send(());
                })
            })
            .collect();
        let count = users.len();
        until("all are to wait", || waiting() == count && asked(ground).len() == AT_ONCE);
        let (view, (told, gone_on)) = (ground.at("view"), channel());
        let other = std::thread::spawn(move || {
            if editable {
                go_on(&view);
            } else {
                look(&view);
            }
            told.send(()).unwrap();
        });
        let went_on = gone_on.recv_timeout(PATIENCE);
        let none_done = all_done.try_recv();
        let fetches = asked(ground).len();
        drop(held);
        went_on.expect("others go on meanwhile");
        assert_eq!(none_done, Err(TryRecvError::Empty), "{backend:?}: nobody has brought anything");
        assert_eq!(fetches, AT_ONCE, "{backend:?}");
        other.join().unwrap();
        users.into_iter().for_each(|user| user.join().unwrap());
        assert_eq!(asked(ground), vec![1; objects], "{backend:?}: each is fetched once");
        rustix::mount::unmount(ground.at("connections"), rustix::mount::UnmountFlags::DETACH).unwrap();
        mounted.unmount().unwrap();
    });
}

#[test]
fn however_many_wait_for_objects_that_are_being_fetched_nobody_else_waits() {
    nobody_else_waits(Backend::Fuse, false);
}

#[test]
fn however_many_wait_for_objects_that_are_being_fetched_everybody_else_uses_and_changes_an_editable_view() {
    BACKENDS.into_iter().for_each(|backend| nobody_else_waits(backend, true));
}

#[test]
fn what_waited_for_an_object_changes_nothing_in_a_view_that_is_read_only_since() {
    with_ground_of_many(Backend::Router, 3, |ground| {
        let held = Held::all_of(ground);
        let mounted = ground.edit();
        let waiting = waiting(ground);
        let view = ground.at("view");
        let appended =
            |view: &Path| File::options().append(true).open(view.join("many/1"))?.write_all(b"more");
        let other = view.clone();
        let users = [
            std::thread::spawn({
                let view = view.clone();
                move || appended(&view)
            }),
            std::thread::spawn(move || {
                fs::set_permissions(other.join("many/2"), fs::Permissions::from_mode(0o600))
            }),
        ];
        until("both are to wait", || waiting() == 2);
        let mut client = Client::connect(&ground.home()).unwrap().expect("the service runs");
        let frozen = client.alter(VIEW, &Alteration::Edit(false));
        drop(held);
        frozen.unwrap();
        for user in users {
            let refused = user.join().unwrap().unwrap_err();
            assert_eq!(refused.raw_os_error(), Some(libc::EROFS), "{refused}");
        }
        assert_eq!(fs::read_dir(ground.at("upper")).unwrap().count(), 0, "nothing is in the scratch");
        client.alter(VIEW, &Alteration::Edit(true)).unwrap();
        appended(&view).unwrap();
        assert_eq!(fs::read_to_string(view.join("many/1")).unwrap(), contents(1) + "more");
        rustix::mount::unmount(ground.at("connections"), rustix::mount::UnmountFlags::DETACH).unwrap();
        mounted.unmount().unwrap();
    });
}
