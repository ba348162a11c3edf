//! macOS: proc_pidinfo(3).

use std::io;
use std::mem::{MaybeUninit, size_of};

use super::{Ancestry, Found, Process};

/// All processes.
#[derive(Debug, Clone, Copy, Default)]
pub struct Host;

impl Host {
    /// Empty: starts of processes are counted from 1970.
    pub fn boot() -> String {
        String::new()
    }
}

impl Ancestry for Host {
    /// The start: asking for it costs no more than a descriptor would.
    type Watch = u64;

    fn find(&self, number: u32) -> io::Result<Option<Found<u64>>> {
        Ok(info(number)?.map(|info| {
            let start = start(&info);
            let process = Process { pid: info.pbi_pid, start };
            // Its parent's number is that of launchd when that has ended, as on Linux.
            Found { process, parent: info.pbi_ppid, watch: start }
        }))
    }

    fn lives(&self, number: u32, watch: &u64) -> bool {
        matches!(info(number), Ok(Some(info)) if start(&info) == *watch)
    }
}

fn start(info: &libc::proc_bsdinfo) -> u64 {
    info.pbi_start_tvsec.saturating_mul(1_000_000).saturating_add(info.pbi_start_tvusec)
}

/// `None`: there is no such process.
fn info(number: u32) -> io::Result<Option<libc::proc_bsdinfo>> {
    let Ok(pid) = libc::c_int::try_from(number) else { return Ok(None) };
    let mut info = MaybeUninit::<libc::proc_bsdinfo>::zeroed();
    let size = size_of::<libc::proc_bsdinfo>() as libc::c_int;
    // SAFETY: the buffer is of the size that is said, and the kernel writes no more than that.
    let written =
        unsafe { libc::proc_pidinfo(pid, libc::PROC_PIDTBSDINFO, 0, info.as_mut_ptr().cast(), size) };
    if written == size {
        // SAFETY: it was written whole; it has numbers only.
        return Ok(Some(unsafe { info.assume_init() }));
    }
    match io::Error::last_os_error() {
        error if error.raw_os_error() == Some(libc::ESRCH) => Ok(None),
        error => Err(error),
    }
}
