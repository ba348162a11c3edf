//! Views as kernel overlays.
//!
//! How a view is mounted:
//! 1. The lower file system appears at the target: the tree's own EROFS mount, or a FUSE server of the same tree.
//! 2. An overlay is made over it (not yet attached anywhere). It keeps the lower file system alive by itself.
//! 3. The lower mount is detached from the target, and the overlay takes its place. One mount is left to take away.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::Mutex;

use kiln_contract::{BackendError, Change, Scratch, ViewBackend, ViewRequest};
use rustix::fs::CWD;
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, UnmountFlags, fsconfig_create,
    fsconfig_set_flag, fsconfig_set_string, fsmount, fsopen, move_mount, unmount,
};

use crate::{fuse, userns};

/// Mounts views in the mount namespace of the calling process.
///
/// Where the kernel does not mount trees for this process, it also holds the FUSE servers of the views that it mounted:
/// it must live as long as they do.
#[derive(Debug, Default)]
pub struct Overlay {
    servers: Mutex<Vec<fuse::Mounted>>,
    /// For the first view that is mounted.
    ready: Mutex<Option<fuse::Server>>,
}

/// How an overlay is told its lower layers, and where it finds the objects that the tree names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Form {
    /// The lower file system gives files with their content. Linux 6.7: as one option a layer.
    Whole,
    /// The same in the one option that older kernels know, in which `:` and `\` need escapes.
    WholeInOne,
    /// Linux 6.16: files of lower layers may redirect into data-only layers, while new uppers stay plain.
    Plain,
    /// Linux 6.5: only with `metacopy`, which new uppers then use too.
    Metacopy,
}

impl Overlay {
    /// A back end that has mounted nothing.
    pub fn new() -> Self {
        Self::default()
    }

    /// A back end whose first view stands on what a server that was started before serves (without a scratch, and below an
    /// overlay).
    pub fn on(server: fuse::Server) -> Self {
        Self { servers: Mutex::default(), ready: Mutex::new(Some(server)) }
    }

    /// Leaves the servers of what is mounted still to themselves: each ends with its view.
    pub fn leave(self) {
        let servers = self.servers.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
        servers.into_iter().for_each(fuse::Mounted::leave);
    }

    fn mount_kernel(&self, request: &ViewRequest) -> Result<(), Failure> {
        let tree = mount_file_system("erofs", &[("source", request.tree.as_os_str().as_encoded_bytes())])?;
        attach(&tree, &request.target)?;
        let stacked = stack(request, Form::Plain).or_else(|_| stack(request, Form::Metacopy));
        replace(stacked, &request.target)
    }

    fn mount_fuse(&self, request: &ViewRequest) -> Result<(), BackendError> {
        let ready = self.ready.lock().unwrap_or_else(std::sync::PoisonError::into_inner).take();
        let server = match ready {
            Some(server) => server.mount(&request.target)?,
            None => fuse::mount(&request.tree, &request.objects, &request.target)?,
        };
        let stacked = stack(request, Form::Whole).or_else(|failure| match failure.errno {
            Errno::INVAL => stack(request, Form::WholeInOne),
            _ => Err(failure),
        });
        replace(stacked, &request.target).map_err(|failure| failure.at(request))?;
        self.servers.lock().unwrap_or_else(std::sync::PoisonError::into_inner).push(server);
        Ok(())
    }
}

impl ViewBackend for Overlay {
    fn name(&self) -> &'static str {
        "overlay"
    }

    fn mount(&self, request: &ViewRequest) -> Result<(), BackendError> {
        if let Some(Scratch { work, .. }) = &request.scratch {
            forget_volatile(work)
                .map_err(|error| BackendError::caused(format!("cannot clear {}", work.display()), error))?;
        }
        if !userns::entered() {
            match self.mount_kernel(request) {
                Ok(()) => return Ok(()),
                // What a kernel says that has no file-backed EROFS, or no EROFS, or no data-only layers.
                Err(Failure { errno: Errno::NOTBLK | Errno::NODEV | Errno::INVAL, .. }) => {}
                Err(failure) => return Err(failure.at(request)),
            }
        }
        self.mount_fuse(request)
    }

    fn unmount(&self, target: &Path) -> Result<(), BackendError> {
        match unmount(target, UnmountFlags::DETACH) {
            Ok(()) | Err(Errno::INVAL | Errno::NOENT) => Ok(()),
            Err(error) => Err(BackendError::caused(
                format!("cannot unmount {}", target.display()),
                io::Error::from(error),
            )),
        }
    }

    fn changes(&self, request: &ViewRequest) -> Result<Vec<Change>, BackendError> {
        match &request.scratch {
            Some(scratch) => crate::changes(&request.tree, &scratch.upper),
            None => Ok(Vec::new()),
        }
    }
}

/// Makes the overlay of a request whose lower file system is mounted at the target.
fn stack(request: &ViewRequest, form: Form) -> Result<OwnedFd, Failure> {
    let path = |path: &Path| path.as_os_str().as_encoded_bytes().to_vec();
    let mut options = match form {
        Form::WholeInOne => vec![("lowerdir", escaped(&path(&request.target)))],
        _ => vec![("lowerdir+", path(&request.target))],
    };
    match form {
        Form::Metacopy => options.extend([
            ("datadir+", path(&request.objects)),
            ("metacopy", b"on".to_vec()),
            ("redirect_dir", b"on".to_vec()),
        ]),
        Form::Plain => options.extend([
            ("datadir+", path(&request.objects)),
            ("metacopy", b"off".to_vec()),
            // What the FUSE server has renamed in the same scratch is found; nothing here makes such marks.
            ("redirect_dir", b"follow".to_vec()),
        ]),
        Form::Whole | Form::WholeInOne => {}
    }
    if userns::entered() {
        options.push(("userxattr", Vec::new()));
    }
    if let Some(scratch) = &request.scratch {
        options.extend([("upperdir", path(&scratch.upper)), ("workdir", path(&scratch.work))]);
        // With an index, an upper directory whose files are open in a mount that was replaced could not be mounted again.
        options.push(("index", b"off".to_vec()));
        if scratch.volatile {
            options.push(("volatile", Vec::new()));
        }
    }
    let options: Vec<(&str, &[u8])> = options.iter().map(|(key, value)| (*key, &value[..])).collect();
    mount_file_system("overlay", &options)
}

/// A path as one of several in `lowerdir`.
fn escaped(path: &[u8]) -> Vec<u8> {
    path.iter()
        .flat_map(|&byte| [b'\\', byte].into_iter().skip(usize::from(!b":\\".contains(&byte))))
        .collect()
}

/// Puts the overlay where the lower file system is, or takes that away if there is no overlay.
fn replace(stacked: Result<OwnedFd, Failure>, target: &Path) -> Result<(), Failure> {
    unmount(target, UnmountFlags::DETACH)?;
    attach(&stacked?, target)
}

/// Makes a detached mount. An empty value is a flag.
fn mount_file_system(kind: &str, options: &[(&str, &[u8])]) -> Result<OwnedFd, Failure> {
    let context = fsopen(kind, FsOpenFlags::FSOPEN_CLOEXEC)?;
    let configure = || {
        for (key, value) in options {
            if value.is_empty() {
                fsconfig_set_flag(context.as_fd(), *key)?;
            } else {
                fsconfig_set_string(context.as_fd(), *key, *value)?;
            }
        }
        if !options.iter().any(|(key, _)| *key == "upperdir") {
            fsconfig_set_flag(context.as_fd(), "ro")?;
        }
        fsconfig_create(context.as_fd())
    };
    configure().map_err(|errno| Failure { errno, said: kernel_log(&context) })?;
    Ok(fsmount(context.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::empty())?)
}

fn attach(mount: &OwnedFd, target: &Path) -> Result<(), Failure> {
    Ok(move_mount(mount.as_fd(), "", CWD, target, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)?)
}

/// What the kernel itself says about a failed configuration: lines that begin with `e `, `w ` or `i `.
fn kernel_log(context: &OwnedFd) -> String {
    let mut buffer = [0; 1024];
    let mut lines = Vec::new();
    while let Ok(length @ 1..) = rustix::io::read(context, &mut buffer) {
        lines.push(String::from_utf8_lossy(&buffer[..length]).trim().to_owned());
    }
    lines.join("; ")
}

/// A scratch that was mounted `volatile` and not unmounted carries a mark that forbids to mount it again, because its
/// content may be torn after a crash of the host. A volatile scratch is never used twice, so the mark is only ever seen
/// when an instance whose changes are to be thrown away is started over.
fn forget_volatile(work: &Path) -> io::Result<()> {
    match std::fs::remove_dir_all(work.join("work/incompat")) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

#[derive(Debug)]
struct Failure {
    errno: Errno,
    said: String,
}

impl From<Errno> for Failure {
    fn from(errno: Errno) -> Self {
        Self { errno, said: String::new() }
    }
}

impl Failure {
    fn at(self, request: &ViewRequest) -> BackendError {
        let target = request.target.display();
        let what = match self.said.as_str() {
            "" => format!("cannot mount a view at {target}"),
            said => format!("cannot mount a view at {target} (the kernel says: {said})"),
        };
        BackendError::caused(what, io::Error::from(self.errno))
            .hint("`kiln system doctor` tells what this host lacks")
    }
}
