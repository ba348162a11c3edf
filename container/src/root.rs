//! An instance's root: its image's merged tree below what the instance changed.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;

use kiln_contract::{BackendError, Digest, Home, InstanceRecord, Scratch, ViewBackend as _, ViewRequest};
use kiln_store::Store;
use kiln_view::Overlay;

use kiln_instance::Volumes;
use kiln_instance::archive::{Base, Confine};

type Result<T> = std::result::Result<T, BackendError>;

/// The stack of an instance's root, bottom first.
pub(crate) fn stack(store: &Store, layers: &[Digest]) -> Result<Vec<Digest>> {
    store
        .with_mount_points(layers)
        .map_err(|error| BackendError::caused("cannot make the layer of mount points", error))
}

/// How an instance's root is mounted; its directories are made if they are missing.
pub(crate) fn request(store: &Store, home: &Home, record: &InstanceRecord) -> Result<ViewRequest> {
    let directory = home.instance(&record.id);
    let tree = store.merged_tree(&stack(store, &record.spec.layers)?).map_err(|error| {
        BackendError::caused(format!("cannot prepare the root of {}", record.spec.name), error)
    })?;
    for path in [directory.root(), directory.upper(), directory.work()] {
        match fs::create_dir(&path) {
            Ok(()) if path == directory.upper() => dress_like_root(&tree, &path)?,
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                return Err(BackendError::caused(format!("cannot make {}", path.display()), error));
            }
            _ => {}
        }
    }
    Ok(ViewRequest {
        tree,
        objects: store.objects_dir(),
        target: directory.root(),
        scratch: Some(Scratch {
            upper: directory.upper(),
            work: directory.work(),
            volatile: record.spec.remove,
        }),
    })
}

/// An overlay shows its upper directory's own owner and mode as those of its root: a new upper gets the image's.
fn dress_like_root(tree: &Path, upper: &Path) -> Result<()> {
    use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
    let failed = |error| BackendError::caused(format!("cannot prepare {}", upper.display()), error);
    let attributes = kiln_view::root_attributes(tree)?;
    let made = fs::metadata(upper).map_err(failed)?;
    if (made.uid(), made.gid()) != (attributes.uid, attributes.gid) {
        match std::os::unix::fs::chown(upper, Some(attributes.uid), Some(attributes.gid)) {
            // An owner who has no number in this user namespace.
            Err(error) if error.kind() == io::ErrorKind::InvalidInput => {}
            other => other.map_err(failed)?,
        }
    }
    // After the owner, whose change takes bits away; and whatever the umask left.
    fs::set_permissions(upper, fs::Permissions::from_mode(attributes.mode)).map_err(failed)
}

/// An instance's root as it is now, with what is mounted in it: a running one's through its first process, else
/// mounted for as long as this value lives, in a mount namespace that only this process sees.
#[derive(Debug)]
pub(crate) struct OpenRoot {
    pub(crate) base: Base,
    mounted: Option<(Overlay, ViewRequest)>,
}

impl OpenRoot {
    /// Opens the root of a running instance by the number of its first process.
    pub(crate) fn running(pid: u32) -> Result<Self> {
        let path = format!("/proc/{pid}/root");
        let base = Base::open(Path::new(&path), Confine::InRoot)
            .map_err(|error| BackendError::caused(format!("cannot open {path}"), error))?;
        Ok(Self { base, mounted: None })
    }

    /// Mounts the root of an instance that does not run. The calling thread gets a mount namespace of its own.
    pub(crate) fn stopped(store: &Store, home: &Home, record: &InstanceRecord) -> Result<Self> {
        let failed = |error: io::Error| {
            BackendError::caused(format!("cannot open the root of {}", record.spec.name), error)
        };
        let private = || -> rustix::io::Result<()> {
            use rustix::mount::{MountPropagationFlags, mount_change};
            // SAFETY: CLONE_NEWNS takes nothing from this thread but the sharing of mounts, root and working directory.
            unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNS) }?;
            mount_change("/", MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC)
        };
        private().map_err(|error| failed(error.into()))?;
        let request = request(store, home, record)?;
        let view = Overlay::new();
        view.mount(&request)?;
        let base = Base::open(&request.target, Confine::InRoot).map_err(failed)?;
        for mount in crate::mounts::resolve(&Volumes::open(home), &record.spec, &request.target)? {
            if mount.fstype == "bind" {
                bind(&base, &mount.source, Path::new(&mount.target)).map_err(failed)?;
            }
        }
        Ok(Self { base, mounted: Some((view, request)) })
    }
}

impl Drop for OpenRoot {
    fn drop(&mut self) {
        if let Some((view, request)) = self.mounted.take() {
            // Lazily, with all that is mounted in it; the namespace would take it along in any case.
            let _ = view.unmount(&request.target);
        }
    }
}

/// Lays `source` over `target` of the root, if the root has it: a target that is missing is made when the instance
/// starts, and has nothing to be copied until then.
fn bind(base: &Base, source: &Path, target: &Path) -> io::Result<()> {
    use rustix::mount::{MoveMountFlags, OpenTreeFlags, move_mount, open_tree};
    let there: OwnedFd = match base.resolve(target, rustix::fs::OFlags::PATH) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        other => other?,
    };
    let flags =
        OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_RECURSIVE;
    let tree = open_tree(rustix::fs::CWD, source, flags)?;
    let empty = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    Ok(move_mount(&tree, "", &there, "", empty)?)
}
