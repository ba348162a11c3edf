//! Who a process of a container is, and what it may do.

use std::io;

use rustix::io::Errno;
use rustix::process::{Gid, Uid};
use rustix::thread::{
    self, CapabilitySets, set_capabilities, set_keep_capabilities, set_thread_res_gid, set_thread_res_uid,
};

use crate::capabilities::CapabilitySet;
use crate::spec::ProcessPlan;

/// Applies the limits of `plan`.
///
/// # Errors
/// The limit that could not be set, and why.
pub(super) fn set_limits(plan: &ProcessPlan) -> Result<(), String> {
    for limit in &plan.rlimits {
        let value = libc::rlimit { rlim_cur: limit.soft(), rlim_max: limit.hard() };
        // SAFETY: the structure outlives the call.
        if unsafe { libc::setrlimit(limit.typ() as _, &raw const value) } != 0 {
            let error = io::Error::last_os_error();
            let (soft, hard) = (limit.soft(), limit.hard());
            return Err(format!("cannot set the limit {} to {soft}:{hard}: {error}", limit.typ()));
        }
    }
    Ok(())
}

/// Sets the supplementary groups; also when there are none: the caller's are not the container's. To be told whether this
/// process is in a user namespace: in a container, it cannot find out.
pub(super) fn set_groups(groups: &[u32], user_namespace: bool) -> io::Result<()> {
    // SAFETY: pointer and length are of one slice.
    if unsafe { libc::setgroups(groups.len(), groups.as_ptr()) } != 0 {
        let error = io::Error::last_os_error();
        // A user namespace of one user only may not set groups, and has none that could be kept.
        if error.raw_os_error() != Some(libc::EPERM) || !groups.is_empty() && !user_namespace {
            return Err(error);
        }
    }
    Ok(())
}

/// Becomes a user, for good, and keeps all capabilities.
pub(super) fn become_user(uid: u32, gid: u32) -> io::Result<()> {
    let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
    set_keep_capabilities(true)?;
    set_thread_res_gid(gid, gid, gid)?;
    set_thread_res_uid(uid, uid, uid)?;
    set_keep_capabilities(false)?;
    // The change of user took away the effective ones.
    let sets = thread::capabilities(None)?;
    Ok(set_capabilities(None, CapabilitySets { effective: sets.permitted, ..sets })?)
}

/// Gives up all capabilities of this process but `keep`; what programs inherit besides is emptied.
pub(super) fn keep_only(keep: CapabilitySet) -> io::Result<()> {
    for number in (0..64).filter(|number| keep.bits() & 1 << number == 0) {
        match thread::remove_capability_from_bounding_set(kernel(1 << number)) {
            Ok(()) => {}
            // The first number that this kernel does not know.
            Err(Errno::INVAL) => break,
            Err(errno) => return Err(errno.into()),
        }
    }
    thread::clear_ambient_capability_set()?;
    let sets = CapabilitySets {
        effective: kernel(keep.bits()),
        permitted: kernel(keep.bits()),
        inheritable: kernel(0),
    };
    Ok(set_capabilities(None, sets)?)
}

fn kernel(bits: u64) -> thread::CapabilitySet {
    thread::CapabilitySet::from_bits_retain(bits)
}

/// The workload starts with no signal blocked or ignored, whatever the caller does with signals.
pub(super) fn reset_signals() {
    for signal in 1..65 {
        // SAFETY: the default action has no code of this program; signals that cannot be changed are refused.
        unsafe { libc::signal(signal, libc::SIG_DFL) };
    }
    // SAFETY: both sets live on the stack.
    unsafe {
        let mut none: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut none);
        libc::sigprocmask(libc::SIG_SETMASK, &raw const none, std::ptr::null_mut());
    }
}

/// Ends this process without running what its image's origin registered for its own end.
pub(super) fn exit(code: i32) -> ! {
    // SAFETY: `_exit` does not return and touches no memory.
    unsafe { libc::_exit(code) }
}
