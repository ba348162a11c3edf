//! The last program of Kiln's in a container: it becomes the workload.
//!
//! Whatever is visible in a container may be looked into by what runs there, and the program file that it runs from
//! may be opened through `/proc/<pid>/exe`, or even be run by naming `/proc/self/exe` as a command. So nothing that is
//! visible runs from the file of Kiln itself, or has its memory: before a process can be seen by others in its
//! container, and before it touches a command of the container, it becomes this program, from a sealed copy in memory.
//! It is small, since it is copied and run at every start: it has no libraries, not even Rust's own, and makes system
//! calls only.
//!
//! Arguments and environment are the workload's own. Descriptor 3 holds the [`Orders`]; descriptor 4 takes the reports:
//! a byte for what failed and the number of the error, or nothing if the command runs (the descriptor is closed by
//! `execve`). With [`CHILD`], descriptor 5 takes the number of the process that was made;
//! with [`INIT`], it is closed when this process may be seen by the workload.
//!
//! `runtime/launcher.rs` is the other side of this.

#![no_builtins]
#![no_std]
#![no_main]

use core::ffi::{CStr, c_char};
use core::mem::MaybeUninit;

mod system;

use system::{Errno, call, exit};

const ORDERS: usize = 3;
const REPORT: usize = 4;
const TOLD: usize = 5;

/// The workload is to be a child of this process's parent, not this process.
const CHILD: u32 = 1;
/// Standard input is a terminal, to be the controlling one of that child.
const TERMINAL: u32 = 2;
/// There is no command: this process is process 1, which reaps and passes signals on.
const INIT: u32 = 4;

/// The most instructions of a filter (`BPF_MAXINSNS`).
const MOST: usize = 4096;
/// The longest path (`PATH_MAX`).
const LONGEST: usize = 4096;

/// What descriptor 3 holds, in the processor's byte order; `length` instructions of eight bytes, and nothing more.
#[repr(C)]
struct Orders {
    flags: u32,
    /// With [`INIT`]: the process whose end is the end of init.
    child: i32,
    length: u64,
    filter: [u64; MOST],
}

/// `struct sock_fprog` (linux/filter.h).
#[repr(C)]
struct Program {
    length: u16,
    filter: *const u64,
}

/// What did not work: the first byte of a report.
#[derive(Clone, Copy)]
#[repr(u8)]
enum Failed {
    NotFound = b'N',
    Directory = b'D',
    Interpreter = b'I',
    Execute = b'X',
    Orders = b'O',
    Filter = b'F',
    Child = b'C',
    Terminal = b'T',
}

/// Called with the stack as `execve` left it: the number of arguments, they, null, the environment, null.
#[unsafe(no_mangle)]
unsafe extern "C" fn launch(stack: *const usize) -> ! {
    // SAFETY: the kernel made the stack so.
    let (args, env) = unsafe {
        let args = stack.add(1).cast::<*const c_char>();
        (args, args.add(*stack + 1))
    };
    // Nobody in the container is to get hold of this process while it is not yet confined as the workload will be.
    const PR_SET_DUMPABLE: usize = 4;
    let _ = call(system::PRCTL, [PR_SET_DUMPABLE, 0, 0, 0, 0]);
    let mut space = MaybeUninit::<Orders>::uninit();
    let orders = match read_orders(&mut space) {
        Ok(orders) => orders,
        Err(errno) => fail(Failed::Orders, errno),
    };
    if orders.flags & INIT != 0 {
        const PR_SET_NAME: usize = 15;
        let _ = call(system::PRCTL, [PR_SET_NAME, c"init".as_ptr() as usize, 0, 0, 0]);
        if confine(orders).is_err() {
            exit(126);
        }
        let _ = call(system::CLOSE, [TOLD, 0, 0, 0, 0]);
        reap(orders.child)
    }
    const F_SETFD: usize = 2;
    const FD_CLOEXEC: usize = 1;
    let _ = call(system::FCNTL, [REPORT, F_SETFD, FD_CLOEXEC, 0, 0]);
    if let Err(errno) = confine(orders) {
        fail(Failed::Filter, errno);
    }
    if orders.flags & CHILD != 0 {
        become_child(orders.flags & TERMINAL != 0);
    }
    // SAFETY: arguments and environment are as above.
    let (failed, errno) = unsafe { execute(args, env) };
    fail(failed, errno)
}

fn read_orders(space: &mut MaybeUninit<Orders>) -> Result<&Orders, Errno> {
    let (start, size) = (space.as_mut_ptr() as usize, size_of::<Orders>());
    let mut got = 0;
    while got < size {
        match call(system::READ, [ORDERS, start + got, size - got, 0, 0]) {
            Ok(0) => break,
            Ok(read) => got += read,
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno),
        }
    }
    let _ = call(system::CLOSE, [ORDERS, 0, 0, 0, 0]);
    let head = size - size_of::<[u64; MOST]>();
    if got < head {
        return Err(Errno::INVAL);
    }
    // SAFETY: the head was read; any bytes are numbers; instructions beyond those that were read are not looked at,
    // as is checked next.
    let orders = unsafe { space.assume_init_ref() };
    if orders.length > MOST as u64 || got != head + orders.length as usize * size_of::<u64>() {
        return Err(Errno::INVAL);
    }
    Ok(orders)
}

/// Loads the system call filter, if there is one.
fn confine(orders: &Orders) -> Result<(), Errno> {
    if orders.length == 0 {
        return Ok(());
    }
    const SECCOMP_SET_MODE_FILTER: usize = 1;
    // A filter alone is no reason to slow every branch down, as other runtimes have it too.
    const SECCOMP_FILTER_FLAG_SPEC_ALLOW: usize = 1 << 2;
    let program = Program { length: orders.length as u16, filter: orders.filter.as_ptr() };
    let at = &raw const program as usize;
    call(system::SECCOMP, [SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_SPEC_ALLOW, at, 0, 0]).map(drop)
}

/// Returns in a child of this process's parent; this process tells its number and ends.
fn become_child(terminal: bool) {
    const CLONE_PARENT: usize = 0x8000;
    const SIGCHLD: usize = 17;
    const TIOCSCTTY: usize = 0x540e;
    match call(system::CLONE, [CLONE_PARENT | SIGCHLD, 0, 0, 0, 0]) {
        Err(errno) => fail(Failed::Child, errno),
        Ok(0) => {
            let _ = call(system::CLOSE, [TOLD, 0, 0, 0, 0]);
            // Without a terminal it is as good in the session of another.
            let session = call(system::SETSID, [0; 5]);
            if terminal && let Err(errno) = session.and_then(|_| call(system::IOCTL, [0, TIOCSCTTY, 0, 0, 0]))
            {
                fail(Failed::Terminal, errno);
            }
        }
        Ok(child) => {
            let child = child as i32;
            let told = call(system::WRITE, [TOLD, &raw const child as usize, size_of::<i32>(), 0, 0]);
            exit(i32::from(told.is_err()))
        }
    }
}

/// Becomes the command, looked for as `execvp` does; what failed if it cannot.
///
/// # Safety
/// Both arrays end with null, and what they point to with NUL.
unsafe fn execute(args: *const *const c_char, env: *const *const c_char) -> (Failed, Errno) {
    // SAFETY: by this function's contract.
    let name = unsafe {
        if (*args).is_null() {
            return (Failed::NotFound, Errno::INVAL);
        }
        CStr::from_ptr(*args)
    };
    let run =
        |path: &CStr| match call(system::EXECVE, [path.as_ptr() as usize, args as usize, env as usize, 0, 0])
        {
            Err(errno) => errno,
            Ok(_) => Errno::INVAL,
        };
    if name.to_bytes().contains(&b'/') {
        return explain(run(name), name);
    }
    let mut space = [const { MaybeUninit::<u8>::uninit() }; LONGEST];
    let mut refused = None;
    // SAFETY: by this function's contract.
    let path = unsafe { variable(env, b"PATH=") };
    for directory in path.split(|byte| *byte == b':') {
        let directory = if directory.is_empty() { b"." } else { directory };
        let Some(path) = join(&mut space, directory, name.to_bytes()) else {
            return (Failed::Execute, Errno::NAMETOOLONG);
        };
        match run(path) {
            Errno::NOENT if !exists(path) => {}
            Errno::NOTDIR => {}
            // As execvp(3): what may not be executed is passed over, and told of if nothing else is found.
            Errno::ACCESS => refused = refused.or(Some(is_directory(path))),
            errno => return explain(errno, path),
        }
    }
    let failed = match refused {
        None => Failed::NotFound,
        Some(true) => Failed::Directory,
        Some(false) => Failed::Execute,
    };
    (failed, Errno::ACCESS)
}

fn explain(errno: Errno, path: &CStr) -> (Failed, Errno) {
    let failed = match errno {
        Errno::NOENT | Errno::NOTDIR if !exists(path) => Failed::NotFound,
        Errno::NOENT => Failed::Interpreter,
        Errno::ACCESS if is_directory(path) => Failed::Directory,
        _ => Failed::Execute,
    };
    (failed, errno)
}

/// The value of a variable, or nothing.
///
/// # Safety
/// The array ends with null, and what it points to with NUL, for as long as the value is used.
unsafe fn variable<'a>(mut env: *const *const c_char, prefix: &[u8]) -> &'a [u8] {
    // SAFETY: by this function's contract.
    unsafe {
        while !(*env).is_null() {
            if let Some(value) = CStr::from_ptr(*env).to_bytes().strip_prefix(prefix) {
                return value;
            }
            env = env.add(1);
        }
    }
    b""
}

/// `directory/name`, if there is room for it.
fn join<'a>(space: &'a mut [MaybeUninit<u8>; LONGEST], directory: &[u8], name: &[u8]) -> Option<&'a CStr> {
    let mut length = 0;
    for byte in directory.iter().chain(b"/").chain(name).chain(b"\0") {
        space.get_mut(length)?.write(*byte);
        length += 1;
    }
    // SAFETY: so many bytes were written.
    let bytes = unsafe { core::slice::from_raw_parts(space.as_ptr().cast::<u8>(), length) };
    CStr::from_bytes_with_nul(bytes).ok()
}

const O_PATH: usize = 0o10_000_000;

fn exists(path: &CStr) -> bool {
    opens(path, O_PATH)
}

fn is_directory(path: &CStr) -> bool {
    opens(path, O_PATH | system::O_DIRECTORY)
}

fn opens(path: &CStr, flags: usize) -> bool {
    const AT_FDCWD: usize = -100_isize as usize;
    const O_CLOEXEC: usize = 0o2_000_000;
    let opened = call(system::OPENAT, [AT_FDCWD, path.as_ptr() as usize, flags | O_CLOEXEC, 0, 0]);
    opened.and_then(|descriptor| call(system::CLOSE, [descriptor, 0, 0, 0, 0])).is_ok()
}

/// Passes signals on to `child` and reaps whatever becomes a child of this process, until `child` ends.
fn reap(child: i32) -> ! {
    /// All but those that are about this process itself: SIGFPE, SIGILL, SIGSEGV, SIGBUS, SIGABRT, SIGTRAP, SIGSYS. All of
    /// them were blocked before this program began.
    const SIGNALS: u64 = !(1 << 7 | 1 << 3 | 1 << 10 | 1 << 6 | 1 << 5 | 1 << 4 | 1 << 30);
    const SIGCHLD: usize = 17;
    const WNOHANG: usize = 1;
    loop {
        let signals = SIGNALS;
        let at = &raw const signals as usize;
        match call(system::RT_SIGTIMEDWAIT, [at, 0, 0, size_of::<u64>(), 0]) {
            Ok(SIGCHLD) | Err(_) => {}
            Ok(signal) => {
                let _ = call(system::KILL, [child as usize, signal, 0, 0, 0]);
                continue;
            }
        }
        let mut status = 0_i32;
        while let Ok(ended @ 1..) =
            call(system::WAIT4, [-1_isize as usize, &raw mut status as usize, WNOHANG, 0, 0])
        {
            if ended == child as usize {
                let signal = status & 0x7f;
                exit(if signal == 0 { status >> 8 & 0xff } else { 128 + signal })
            }
        }
    }
}

fn fail(failed: Failed, errno: Errno) -> ! {
    let [a, b, c, d] = errno.0.to_ne_bytes();
    let report = [failed as u8, a, b, c, d];
    let _ = call(system::WRITE, [REPORT, report.as_ptr() as usize, report.len(), 0, 0]);
    exit(if matches!(failed, Failed::NotFound) { 127 } else { 126 })
}

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    exit(126)
}
