//! The process that keeps a spare machine: `kiln spare <key> <image>`.

use std::fs::{self, File};
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt as _;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::time::{Duration, Instant};

use kiln_contract::{BackendError, DiskBackend, Driver, ErrorKind, Home, Hypervisor, Vm, VmHandle};
use kiln_instance::{process, socket};
use rustix::event::{PollFd, PollFlags, poll};

use super::{
    DIRECTORY_PREFIX, LOCK, MOST, Offer, Place, SOCKET, disk_of, end, hears_taken, is_for, patience, rights,
    spare_state,
};
use crate::beginning::disks;
use crate::life::{Life, Paths};
use crate::saved::{RECORD, Saved};
use crate::template::{DISK_SIZE, Templates, failed, in_utf8};
use crate::{admission, stream, template};

#[cfg_attr(not(target_os = "linux"), path = "keeper/priority_elsewhere.rs")]
mod priority;

/// Between two looks whether the machine is still of use.
const LOOK: Duration = Duration::from_secs(1);
/// How often a lock is tried.
const LOOKS: u32 = 10;

/// Makes the spare machine of the template `key`, whose image disk is at `image`, and keeps it until somebody has had it or it
/// is of no use. Does nothing if there is one already.
///
/// # Errors
/// There is no such template; the machine cannot be restored, or its guest not rehearse.
pub fn keep_spare(home: &Home, key: &str, image: &Path) -> Result<(), BackendError> {
    // Whoever started the machine before waits for what that says.
    priority::lower();
    let disks = disks(home)?;
    let template = find(home, &*disks, key)?;
    let hypervisor = kiln_vmm::open(Some(Driver::Qemu))?;
    template.check(&*hypervisor)?;
    let place = Place::of(&template);
    if !is_for(&template, &*hypervisor, &*disks) || !admission::has_room(template.record().shape) {
        return Ok(());
    }
    let Some(lock) = lock(&place)? else { return Ok(()) };
    Place::sign(&lock).map_err(failed("write to", &place.path(LOCK)))?;
    place.clear(&*disks)?;
    end_others(home, &*disks, &template)?;
    let kept = keep(&place, &*hypervisor, &*disks, image, &lock);
    drop(lock);
    if let Some(machine) = kept? {
        machine.until_it_is_over();
    }
    Ok(())
}

fn find(home: &Home, disks: &dyn DiskBackend, key: &str) -> Result<Saved, BackendError> {
    let all = Templates::open(home, disks).list()?;
    all.into_iter().find(|template| template.record().key.hex() == key).ok_or_else(|| {
        BackendError::new(ErrorKind::NotFound, format!("there is no template {key} for a spare machine"))
    })
}

/// The lock, unless another keeper holds it. Who only looks whether one does holds it for an instant too.
fn lock(place: &Place) -> Result<Option<File>, BackendError> {
    for _ in 0..LOOKS {
        if let Some(lock) = place.lock()? {
            return Ok(Some(lock));
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(None)
}

/// Ends the spare machines beyond those that are kept besides this one: of the templates that were not used for longest.
fn end_others(home: &Home, disks: &dyn DiskBackend, own: &Saved) -> Result<(), BackendError> {
    let others = Templates::open(home, disks).list()?.into_iter();
    let others = others.filter(|other| other.record().key != own.record().key);
    let others = others.filter(|other| spare_state(other).is_some());
    others.skip(MOST - 1).try_for_each(|other| end(&other, disks))
}

/// A machine that waits, or that somebody has.
struct Kept {
    vm: Box<dyn Vm>,
    /// Tells that it has ended.
    ended: OwnedFd,
    monitor: UnixStream,
}

/// Makes a machine and waits with it; gives it once somebody has it, or `None` if nobody wanted it.
fn keep(
    place: &Place,
    hypervisor: &dyn Hypervisor,
    disks: &dyn DiskBackend,
    image: &Path,
    lock: &File,
) -> Result<Option<Kept>, BackendError> {
    let outcome = make_and_wait(place, hypervisor, disks, image);
    if !matches!(outcome, Ok(Some(_))) {
        place.clear(disks)?;
    }
    // What is written there must not be taken for the next keeper.
    let _ = lock.set_len(0);
    outcome
}

fn make_and_wait(
    place: &Place,
    hypervisor: &dyn Hypervisor,
    disks: &dyn DiskBackend,
    image: &Path,
) -> Result<Option<Kept>, BackendError> {
    let template = &place.template;
    let Some(empty) = template::disk_of(template) else { return Ok(None) };
    let directory = tempfile::Builder::new()
        .prefix(DIRECTORY_PREFIX)
        .tempdir_in(template.directory())
        .map_err(failed("make a directory in", template.directory()))?;
    let paths = Paths {
        directory: directory.path().to_owned(),
        memory: template.memory(),
        image: image.to_owned(),
        disk: disks.clone_disk(&empty, None, &disk_of(template)?)?,
        disk_size: DISK_SIZE,
        network: None,
    };
    let (vm, handle) = stream::runtime()?.block_on(Life::rehearsed(hypervisor, template, &paths))?;
    priority::raise(handle.pid);
    let offer = Offer {
        pid: handle.pid,
        memory_address: handle.memory_address,
        directory: in_utf8(directory.path())?,
    };
    wait(place, vm, &handle, &offer)
}

/// Waits until somebody has the machine.
fn wait(
    place: &Place,
    vm: Box<dyn Vm>,
    handle: &VmHandle,
    offer: &Offer,
) -> Result<Option<Kept>, BackendError> {
    let path = place.path(SOCKET);
    let fail = || failed("listen at", &path);
    let ended = process::identify(handle.pid).and_then(process::open);
    let ended = ended.ok_or_else(|| BackendError::new(ErrorKind::Failed, "the spare machine has ended"))?;
    let listener = socket::with_short_path(&path, |path| UnixListener::bind(path)).map_err(fail())?;
    let made = fs::symlink_metadata(&path).map_err(fail())?;
    let is_there = || {
        let is_same =
            fs::symlink_metadata(&path).is_ok_and(|now| (now.dev(), now.ino()) == (made.dev(), made.ino()));
        is_same && place.path(RECORD).exists()
    };
    let (begun, patience) = (Instant::now(), patience().unwrap_or_default());
    while begun.elapsed() < patience && is_there() {
        let mut polled = [PollFd::new(&listener, PollFlags::IN), PollFd::new(&ended, PollFlags::IN)];
        let look = process::timespec(LOOK);
        match poll(&mut polled, Some(&look)) {
            Ok(0) | Err(rustix::io::Errno::INTR) => continue,
            polled => polled.map_err(|error| fail()(error.into()))?,
        };
        if !polled[1].revents().is_empty() {
            return Err(BackendError::new(ErrorKind::Failed, "the spare machine has ended"));
        }
        let (monitor, _) = listener.accept().map_err(fail())?;
        if !may_ask(&monitor) {
            continue;
        }
        // Nobody else finds it.
        fs::remove_file(&path).map_err(fail())?;
        drop(listener);
        rights::send(&monitor, offer, &handle.descriptors).map_err(fail())?;
        return Ok(hears_taken(&monitor).then_some(Kept { vm, ended, monitor }));
    }
    Ok(None)
}

/// The same user, or root.
fn may_ask(socket: &UnixStream) -> bool {
    let own = rustix::process::geteuid().as_raw();
    socket::peer(socket).is_ok_and(|peer| peer == own || peer == 0)
}

impl Kept {
    /// Ends the machine when whoever has it has gone.
    fn until_it_is_over(self) {
        loop {
            let mut polled =
                [PollFd::new(&self.monitor, PollFlags::IN), PollFd::new(&self.ended, PollFlags::IN)];
            match poll(&mut polled, None) {
                Err(rustix::io::Errno::INTR) => {}
                // Nothing is ever said: what can be read is the end.
                _ => break,
            }
        }
        drop(self.vm);
    }
}
