//! Processes by `libproc` and `kqueue(2)`.

use std::ffi::{CStr, c_int, c_void};
use std::os::fd::OwnedFd;

use kiln_contract::ProcessId;
use rustix::event::kqueue::{Event, EventFilter, EventFlags, ProcessEvents, kevent, kqueue};
use rustix::io::Errno;
use rustix::process::{Pid, Signal};

/// More children than any process of ours has.
const MAX_CHILDREN: usize = 4096;

pub(super) fn program() -> std::io::Result<std::path::PathBuf> {
    std::env::current_exe()
}

pub(super) fn end_with_parent() -> std::io::Result<()> {
    Ok(())
}

/// A machine is one process to its supervisor.
pub(super) fn adopt_orphans() -> std::io::Result<()> {
    Ok(())
}

pub(super) fn identify(pid: u32) -> Option<ProcessId> {
    let size = size_of::<libc::proc_bsdinfo>();
    let mut info = std::mem::MaybeUninit::<libc::proc_bsdinfo>::zeroed();
    // SAFETY: the kernel writes at most `size` bytes to a buffer of that size.
    let written = unsafe {
        libc::proc_pidinfo(
            c_int::try_from(pid).ok()?,
            libc::PROC_PIDTBSDINFO,
            0,
            info.as_mut_ptr().cast::<c_void>(),
            c_int::try_from(size).ok()?,
        )
    };
    if usize::try_from(written).ok()? != size {
        return None;
    }
    // SAFETY: plain numbers, all of them written (and zeroed before).
    let info = unsafe { info.assume_init() };
    let start = info.pbi_start_tvsec.saturating_mul(1_000_000).saturating_add(info.pbi_start_tvusec);
    (info.pbi_status != libc::SZOMB).then_some(ProcessId { pid, start })
}

/// A queue that becomes readable when the process ends.
pub(super) fn handle(pid: Pid) -> Option<OwnedFd> {
    let queue = kqueue().ok()?;
    let exit = EventFilter::Proc { pid, flags: ProcessEvents::EXIT };
    let event = Event::new(exit, EventFlags::ADD, std::ptr::null_mut());
    let none: &mut [Event] = &mut [];
    // SAFETY: the filter names no descriptor.
    unsafe { kevent(&queue, &[event], none, None) }.ok()?;
    Some(queue)
}

/// There is nothing here that a signal could be sent through: the number is looked at just before.
pub(super) fn send(_handle: &OwnedFd, process: ProcessId, signal: Signal) -> Result<(), Errno> {
    let pid =
        super::raw(process.pid).filter(|_| identify(process.pid) == Some(process)).ok_or(Errno::SRCH)?;
    rustix::process::kill_process(pid, signal)
}

pub(super) fn children(pid: u32) -> Vec<u32> {
    let Ok(parent) = libc::pid_t::try_from(pid) else { return Vec::new() };
    let mut pids: Vec<libc::pid_t> = vec![0; MAX_CHILDREN];
    let Ok(size) = c_int::try_from(size_of_val(pids.as_slice())) else { return Vec::new() };
    // SAFETY: the kernel writes at most `size` bytes to a buffer of that size.
    let count = unsafe { libc::proc_listchildpids(parent, pids.as_mut_ptr().cast::<c_void>(), size) };
    pids.truncate(usize::try_from(count).unwrap_or(0));
    pids.into_iter().filter_map(|pid| u32::try_from(pid).ok()).filter(|pid| *pid > 0).collect()
}

pub(super) fn boot_id() -> Option<String> {
    let mut buffer = [0_u8; 64];
    let mut size = buffer.len();
    // SAFETY: the name ends with a NUL, and the kernel writes at most `size` bytes to a buffer of that size.
    let failed = unsafe {
        libc::sysctlbyname(
            c"kern.bootsessionuuid".as_ptr(),
            buffer.as_mut_ptr().cast::<c_void>(),
            &raw mut size,
            std::ptr::null_mut(),
            0,
        )
    };
    if failed != 0 {
        return None;
    }
    CStr::from_bytes_until_nul(&buffer).ok()?.to_str().map(str::to_owned).ok()
}
