//! Who the machine is: what must be different in every copy, and right, before anything of the workload runs.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd as _;

use kiln_link::message::Configure;
use rustix::time::{ClockId, Timespec, clock_gettime, clock_settime};

use crate::failure::{Doing as _, Failure, invalid};

/// `RNDADDENTROPY` of `linux/random.h`: `_IOW('R', 3, int[2])`.
const ADD_ENTROPY: libc::c_ulong = 0x4008_5203;
/// `RNDRESEEDCRNG`: `_IO('R', 7)`.
const RESEED: libc::c_ulong = 0x5207;
/// More than the generator can hold.
const MOST_ENTROPY: usize = 512;

/// Seeds the random generator, sets the clock and the host name. The order matters: nothing draws before the first.
pub(crate) fn assume(configure: &Configure) -> Result<(), Failure> {
    seed(&configure.entropy).doing("seed the random generator")?;
    set_clock(configure.clock)?;
    rustix::system::sethostname(configure.hostname.as_bytes()).doing("set the host name")
}

/// Sets the wall clock to nanoseconds since 1970.
pub(crate) fn set_clock(nanoseconds: u64) -> Result<(), Failure> {
    let time = Timespec {
        tv_sec: (nanoseconds / 1_000_000_000).cast_signed(),
        // Below 10^9.
        tv_nsec: (nanoseconds % 1_000_000_000).cast_signed(),
    };
    clock_settime(ClockId::Realtime, time).doing("set the clock")
}

/// Since the kernel started.
pub(crate) fn uptime_millis() -> u64 {
    let now = clock_gettime(ClockId::Boottime);
    now.tv_sec.unsigned_abs() * 1000 + now.tv_nsec.unsigned_abs() / 1_000_000
}

fn seed(entropy: &[u8]) -> io::Result<()> {
    if entropy.len() < 32 || entropy.len() > MOST_ENTROPY {
        return Err(io::Error::other(format!("{} bytes are not from 32 to {MOST_ENTROPY}", entropy.len())));
    }
    let file = File::options().write(true).open("/dev/urandom")?;
    // `struct rand_pool_info`: bits, bytes, then the bytes.
    let length = i32::try_from(entropy.len()).map_err(io::Error::other)?;
    let mut pool = Vec::with_capacity(8 + entropy.len());
    pool.extend_from_slice(&(length * 8).to_ne_bytes());
    pool.extend_from_slice(&length.to_ne_bytes());
    pool.extend_from_slice(entropy);
    // SAFETY: the kernel reads the two integers and as many bytes as the second says, all of which are in `pool`.
    if unsafe { libc::ioctl(file.as_raw_fd(), ADD_ENTROPY, pool.as_ptr()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: takes no argument.
    if unsafe { libc::ioctl(file.as_raw_fd(), RESEED) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Refuses what `machine-id(5)` would.
pub(crate) fn check_machine_id(id: &str) -> Result<(), Failure> {
    let good = id.len() == 32 && id.bytes().all(|digit| matches!(digit, b'0'..=b'9' | b'a'..=b'f'));
    if good { Ok(()) } else { Err(invalid(format!("`{id}` is no machine id"))) }
}
