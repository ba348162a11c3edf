//! A tree, a view of it, and plain directories with the same in them.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use kiln_contract::{BackendError, Digest, Home, Scratch, ViewBackend, ViewRequest};
use kiln_erofs::{Attributes, Content, Data, NodeId, Time, Tree, Xattrs, object_redirect, write_metadata};
use kiln_fixtures::with_private_mounts;
use kiln_store::Store;
use kiln_view::fuse::{self, Mounted, Owners, Served};
use kiln_view::router::Client;
use kiln_view::views::{self, NewView, Views};
use kiln_view::{Fetcher, Overlay};

use crate::operations::{Op, Place, Told, snapshot};

pub(crate) fn owned(mode: u32) -> Attributes {
    Attributes { mode, uid: 0, gid: 0, mtime: Time { seconds: 1000, nanoseconds: 7 }, xattrs: Xattrs::new() }
}

/// What shows an editable view.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Backend {
    Fuse,
    Router,
    Overlay,
}

/// Those with a server of Kiln's.
pub(crate) const BACKENDS: [Backend; 2] = [Backend::Fuse, Backend::Router];

pub(crate) const ALL: [Backend; 3] = [Backend::Overlay, Backend::Fuse, Backend::Router];

/// An editable view that is mounted. Dropping it kills its server.
pub(crate) enum Edited {
    Fuse(Mounted),
    Router(Home),
    Overlay(Overlaid),
}

impl Edited {
    pub(crate) fn unmount(self) -> Result<(), BackendError> {
        match self {
            Self::Fuse(mounted) => mounted.unmount(),
            Self::Router(home) => {
                Self::client(&home)?.unmount_view(VIEW)?;
                Ok(())
            }
            Self::Overlay(overlaid) => {
                overlaid.unmount();
                Ok(())
            }
        }
    }

    pub(crate) fn kill(self) {
        match self {
            Self::Fuse(mounted) => drop(mounted),
            Self::Overlay(_) => unreachable!("the kernel is no process"),
            Self::Router(home) => {
                let pid = Self::client(&home).unwrap().status().unwrap().pid;
                let pid = rustix::process::Pid::from_raw(pid.cast_signed()).unwrap();
                rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
                rustix::process::waitpid(Some(pid), rustix::process::WaitOptions::empty()).unwrap();
            }
        }
    }

    /// The process that serves it; none for the kernel's overlay.
    pub(crate) fn server(&self) -> Option<u32> {
        match self {
            Self::Fuse(_) => {
                let children = fs::read_to_string("/proc/thread-self/children").unwrap();
                let is_server = |pid: &u32| {
                    fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|name| name == "kiln-view\n")
                };
                Some(children.split_whitespace().map(|pid| pid.parse().unwrap()).find(is_server).unwrap())
            }
            Self::Router(home) => Some(Self::client(home).unwrap().status().unwrap().pid),
            Self::Overlay(_) => None,
        }
    }

    fn client(home: &Home) -> Result<Client, BackendError> {
        Ok(Client::connect(home)?.expect("the service runs"))
    }
}

/// Set for the process that is the router's service.
pub(crate) const SERVICE: &str = "KILN_TEST_SERVICE";

/// This test program as the router's service.
fn launch(home: &Home, _: std::time::Duration) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "the_routers_service_itself", "--nocapture", "--test-threads=1"]);
    command.env(SERVICE, home.path());
    command
}

/// What brings objects: a script beside a home, where there is one.
pub(crate) fn fetcher(home: &Home) -> Fetcher {
    let ground = home.path().parent().unwrap();
    let program = "/bin/sh".into();
    Fetcher { program, arguments: vec![ground.join("fetch").into()], home: ground.to_owned() }
}

/// The name of the router's view.
pub(crate) const VIEW: &str = "edited";

/// A tree, and a directory with the same in it.
pub(crate) struct Ground {
    directory: PathBuf,
    /// Whether files of the tree have several names.
    linked: bool,
    /// So many files more, in a directory of their own.
    many: usize,
    backend: Backend,
}

/// A view by the overlay back end; gone when dropped.
pub(crate) struct Overlaid {
    overlay: Overlay,
    target: PathBuf,
}

impl Overlaid {
    pub(crate) fn unmount(self) {
        drop(self);
    }
}

impl Drop for Overlaid {
    fn drop(&mut self) {
        self.overlay.unmount(&self.target).unwrap();
    }
}

impl Ground {
    pub(crate) fn new(directory: &Path, linked: bool, many: usize, backend: Backend) -> Self {
        let ground = Self { directory: directory.to_owned(), linked, many, backend };
        for name in ["objects", "view", "plain", "lower", "upper", "work", "kernel", "kernel-work"] {
            fs::create_dir(ground.at(name)).unwrap();
        }
        write_metadata(&ground.tree(), File::create(ground.at("tree.erofs")).unwrap()).unwrap();
        for name in ["plain", "lower", "upper"] {
            fs::set_permissions(ground.at(name), std::os::unix::fs::PermissionsExt::from_mode(0o755))
                .unwrap();
        }
        let mounted = ground.serve(None);
        for copy in ["plain", "lower"] {
            let view = ground.at("view").join(".");
            let copied = Command::new("cp").arg("-a").arg(view).arg(ground.at(copy)).status().unwrap();
            assert!(copied.success());
        }
        mounted.unmount().unwrap();
        if backend == Backend::Router {
            ground.make_routed();
        }
        ground
    }

    /// The directory of the objects that the view shows.
    pub(crate) fn objects(&self) -> PathBuf {
        match self.backend {
            Backend::Router => Store::open(&self.home()).unwrap().objects_dir(),
            Backend::Fuse | Backend::Overlay => self.at("objects"),
        }
    }

    pub(crate) fn home(&self) -> Home {
        Home::at(self.at("home"))
    }

    /// Makes a view of the same files for the router, with the scratch of the ground.
    fn make_routed(&self) {
        let store = Store::open(&self.home()).unwrap();
        let layer = store.import_upper(&self.at("lower"), &[], &|id, _| id).unwrap().layer;
        let new = NewView {
            name: VIEW.to_owned(),
            reference: "the ground".to_owned(),
            image: Digest::of(b"no image"),
            layers: vec![layer],
            at: self.at("view"),
            backend: Some(views::Backend::Router),
            editable: true,
            keep: true,
            command: Vec::new(),
            binds: Vec::new(),
            annotations: std::collections::BTreeMap::new(),
        };
        drop(Views::open(&self.home()).served_by(launch).create(new).unwrap());
        for name in ["upper", "work"] {
            let of_view = self.home().views().join(VIEW).join(name);
            fs::remove_dir(&of_view).unwrap();
            std::os::unix::fs::symlink(self.at(name), of_view).unwrap();
        }
    }

    pub(crate) fn at(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    pub(crate) fn object(&self, bytes: &[u8]) -> Content {
        let digest = Digest::of(bytes);
        let redirect = String::from_utf8(object_redirect(&digest).to_vec()).unwrap();
        let path = self.at("objects").join(&redirect[1..]);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, bytes).unwrap();
        Content::Regular(Data::Object { digest, size: bytes.len() as u64 })
    }

    pub(crate) fn tree(&self) -> Tree {
        let mut tree = Tree::new(owned(0o755));
        let large: Vec<u8> = (0..100_000_u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
        for name in ["a", "b", "c"] {
            let mut add = |parent, name: &[u8], content, attributes| {
                tree.add(parent, name, content, attributes).unwrap()
            };
            let inline = |text: &str| Content::Regular(Data::Inline(text.as_bytes().to_vec()));
            let here = add(NodeId::ROOT, name.as_bytes(), Content::Directory, owned(0o755));
            let big = add(here, b"large", self.object(&large), owned(0o644));
            add(here, b"small", inline("small"), owned(0o4711));
            add(here, b"link", Content::Symlink(b"small".to_vec()), owned(0o777));
            add(here, b"g", Content::Fifo, owned(0o600));
            let sub = add(here, b"sub", Content::Directory, owned(0o2775));
            let mut with_xattr = owned(0o640);
            with_xattr.xattrs.insert(b"user.x".to_vec(), b"of the tree".to_vec());
            add(sub, b"f", inline("deep"), with_xattr);
            let inner = add(sub, b"sub", Content::Directory, owned(0o755));
            add(inner, b"f", inline("deeper"), owned(0o644));
            for directory in [here, sub] {
                if self.linked {
                    tree.link(directory, b"twin", big).unwrap();
                } else {
                    tree.add(directory, b"twin", self.object(&large), owned(0o644)).unwrap();
                }
            }
        }
        if self.many > 0 {
            let here = tree.add(NodeId::ROOT, b"many", Content::Directory, owned(0o755)).unwrap();
            for number in 0..self.many {
                let object = self.object(format!("{number}\n").repeat(40).as_bytes());
                tree.add(here, number.to_string().as_bytes(), object, owned(0o644)).unwrap();
            }
        }
        tree
    }

    pub(crate) fn scratch(&self) -> Scratch {
        Scratch { upper: self.at("upper"), work: self.at("work"), volatile: true }
    }

    pub(crate) fn served<'a>(
        &self,
        tree: &'a Path,
        objects: &'a Path,
        scratch: Option<&'a Scratch>,
    ) -> Served<'a> {
        Served {
            tree,
            objects,
            scratch,
            owners: owners(),
            below_overlay: false,
            bound: true,
            log: None,
            fetcher: None,
        }
    }

    pub(crate) fn serve(&self, scratch: Option<&Scratch>) -> Mounted {
        let (tree, objects) = (self.at("tree.erofs"), self.at("objects"));
        let fetcher = fetcher(&self.home());
        let served = Served { fetcher: Some(&fetcher), ..self.served(&tree, &objects, scratch) };
        fuse::start(&served).unwrap().mount(&self.at("view")).unwrap()
    }

    pub(crate) fn edit(&self) -> Edited {
        match self.backend {
            Backend::Fuse => return Edited::Fuse(self.serve(Some(&self.scratch()))),
            Backend::Overlay => return Edited::Overlay(self.overlay()),
            Backend::Router => {}
        }
        let views = Views::open(&self.home()).served_by(launch);
        // A service that was killed shows again what it had shown.
        views.router().unwrap();
        if views.find(VIEW).unwrap().shown_to.is_none() {
            views.reopen(VIEW, Vec::new()).unwrap().show_to(std::process::id()).unwrap();
        }
        Edited::Router(self.home())
    }

    /// Takes away the mount that a killed server has left. The router's next service does that by itself.
    pub(crate) fn forget_killed(&self) {
        if self.backend == Backend::Fuse {
            rustix::mount::unmount(self.at("view"), rustix::mount::UnmountFlags::DETACH).unwrap();
        }
    }

    /// The overlay back end's view of the same tree and scratch.
    pub(crate) fn overlay(&self) -> Overlaid {
        let overlay = Overlay::new();
        let target = self.at("view");
        let request = ViewRequest {
            tree: self.at("tree.erofs"),
            objects: self.at("objects"),
            target: target.clone(),
            scratch: Some(self.scratch()),
        };
        overlay.mount(&request).unwrap();
        Overlaid { overlay, target }
    }

    /// Takes the kernel's overlay away, whole. A child that another test has just forked may hold files of it for a moment.
    pub(crate) fn unmount_kernel(&self) {
        for _ in 0..500 {
            match rustix::mount::unmount(self.at("kernel"), rustix::mount::UnmountFlags::empty()) {
                Err(rustix::io::Errno::BUSY) => std::thread::sleep(std::time::Duration::from_millis(10)),
                other => return other.unwrap(),
            }
        }
        panic!("the overlay stays busy");
    }

    /// An overlay of the kernel's over the same files as the tree has.
    pub(crate) fn mount_upper(&self, upper: &str, work: &str, read_only: bool) {
        let options = format!(
            "lowerdir={},upperdir={},workdir={},redirect_dir=on,index=off,metacopy=off",
            self.at("lower").display(),
            self.at(upper).display(),
            self.at(work).display()
        );
        let flags =
            if read_only { rustix::mount::MountFlags::RDONLY } else { rustix::mount::MountFlags::empty() };
        let options = std::ffi::CString::new(options).unwrap();
        rustix::mount::mount("overlay", self.at("kernel"), "overlay", flags, &*options).unwrap();
    }
}

/// Whose the files of views are: who has no other numbers to give has them all, as in every view of an ordinary user's.
fn owners() -> Owners {
    match (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw()) {
        (0, _) => Owners::Kept,
        (uid, gid) => Owners::One { uid, gid },
    }
}

/// Set for tests that run again as an ordinary user: the directory that is his.
const DIRECTORY: &str = "KILN_TEST_DIRECTORY";

/// Runs a test, which has this name, as an ordinary user, with a directory of his.
pub(crate) fn as_ordinary_user(test: &str, body: impl Fn(&Path)) {
    if let Some(directory) = std::env::var_os(DIRECTORY) {
        return body(Path::new(&directory));
    }
    if !kiln_fixtures::require_root() || kiln_fixtures::require("fusermount3").is_none() {
        return;
    }
    let Some(user) = kiln_fixtures::OrdinaryUser::get() else { return };
    let directory = user.tempdir();
    user.test_again(test, DIRECTORY, directory.path());
}

/// Runs a test as root with a mount namespace of its own.
pub(crate) fn with_ground(body: impl FnOnce(&Ground) + Send + 'static) {
    with_tree(true, Backend::Fuse, body);
}

/// The same, with a back end.
pub(crate) fn with_ground_of(backend: Backend, body: impl FnOnce(&Ground) + Send + 'static) {
    with_tree(true, backend, body);
}

/// The same, with so many files more in the tree's directory `many`.
pub(crate) fn with_ground_of_many(
    backend: Backend,
    many: usize,
    body: impl FnOnce(&Ground) + Send + 'static,
) {
    with_private_mounts(move |directory| body(&Ground::new(directory, true, many, backend)));
}

/// The same in a directory that is made in the test's own.
pub(crate) fn with_ground_in(
    backend: Backend,
    make: impl FnOnce(&Path) -> PathBuf + Send + 'static,
    body: impl FnOnce(&Ground) + Send + 'static,
) {
    with_private_mounts(move |directory| {
        let made = make(directory);
        body(&Ground::new(&made, false, 0, backend));
        // Nothing else uses it any more.
        rustix::mount::unmount(&made, rustix::mount::UnmountFlags::DETACH).unwrap();
    });
}

/// The same with a tree in which each file has one name: the kernel's overlay makes several files of one when it copies it
/// up (`overlayfs.rst`, «Non-standard behavior»).
pub(crate) fn with_unlinked_ground(body: impl FnOnce(&Ground) + Send + 'static) {
    with_tree(false, Backend::Fuse, body);
}

fn with_tree(linked: bool, backend: Backend, body: impl FnOnce(&Ground) + Send + 'static) {
    with_private_mounts(move |directory| body(&Ground::new(directory, linked, 0, backend)));
}

/// Does the same in a view and in a plain directory; each must tell the same.
pub(crate) fn same(view: &mut Place, plain: &mut Place, op: &Op, context: &str) {
    let (told, expected) = (view.apply(op), plain.apply(op));
    if told != expected {
        let shown = |told: &Told| match told {
            Ok(bytes) => format!(
                "{} bytes: {}",
                bytes.len(),
                bytes
                    .escape_ascii()
                    .to_string()
                    .get(..300)
                    .map_or_else(|| bytes.escape_ascii().to_string(), str::to_owned)
            ),
            Err(number) => std::io::Error::from_raw_os_error(*number).to_string(),
        };
        panic!("{context}: {op:?} in the view: {}; in a plain directory: {}", shown(&told), shown(&expected));
    }
}

pub(crate) fn assert_same_tree(ground: &Ground, view: &str, context: &str) {
    let (view, plain) = (snapshot(&ground.at(view)), snapshot(&ground.at("plain")));
    let differing: Vec<_> = view
        .iter()
        .filter(|line| !plain.contains(line))
        .map(|line| format!("view:  {line}"))
        .chain(plain.iter().filter(|line| !view.contains(line)).map(|line| format!("plain: {line}")))
        .collect();
    assert!(differing.is_empty(), "{context}:\n{}", differing.join("\n"));
}
