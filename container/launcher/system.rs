//! System calls, and where the program begins.

use core::arch::{asm, global_asm};

/// The number of an error (`errno(3)`).
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Errno(pub(crate) i32);

impl Errno {
    pub(crate) const NOENT: Self = Self(2);
    pub(crate) const INTR: Self = Self(4);
    pub(crate) const ACCESS: Self = Self(13);
    pub(crate) const NOTDIR: Self = Self(20);
    pub(crate) const INVAL: Self = Self(22);
    pub(crate) const NAMETOOLONG: Self = Self(36);
}

macro_rules! numbers {
    ($($name:ident = $number:expr;)*) => { $(pub(crate) const $name: usize = $number;)* };
}

#[cfg(target_arch = "x86_64")]
numbers! {
    READ = 0; WRITE = 1; CLOSE = 3; IOCTL = 16; CLONE = 56; EXECVE = 59; WAIT4 = 61; KILL = 62; FCNTL = 72;
    SETSID = 112; RT_SIGTIMEDWAIT = 128; PRCTL = 157; EXIT_GROUP = 231; OPENAT = 257; SECCOMP = 317;
    O_DIRECTORY = 0o200_000;
}

#[cfg(target_arch = "aarch64")]
numbers! {
    READ = 63; WRITE = 64; CLOSE = 57; IOCTL = 29; CLONE = 220; EXECVE = 221; WAIT4 = 260; KILL = 129; FCNTL = 25;
    SETSID = 157; RT_SIGTIMEDWAIT = 137; PRCTL = 167; EXIT_GROUP = 94; OPENAT = 56; SECCOMP = 277;
    O_DIRECTORY = 0o40_000;
}

#[cfg(target_arch = "x86_64")]
global_asm!(".globl _start", "_start:", "mov rdi, rsp", "and rsp, -16", "call launch", "ud2");

#[cfg(target_arch = "aarch64")]
global_asm!(".globl _start", "_start:", "mov x0, sp", "bl launch", "brk #1");

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
compile_error!("the system calls of this processor are not known to the launcher");

/// Makes a system call.
pub(crate) fn call(number: usize, arguments: [usize; 5]) -> Result<usize, Errno> {
    let [a, b, c, d, e] = arguments;
    let result: isize;
    // SAFETY: what the call does to memory is up to its caller, who passes addresses of its own only; the registers that
    // the kernel changes are named.
    #[cfg(target_arch = "x86_64")]
    unsafe {
        asm!(
            "syscall", inlateout("rax") number => result, in("rdi") a, in("rsi") b, in("rdx") c, in("r10") d,
            in("r8") e, lateout("rcx") _, lateout("r11") _, options(nostack)
        );
    }
    // SAFETY: as above.
    #[cfg(target_arch = "aarch64")]
    unsafe {
        asm!(
            "svc #0", in("x8") number, inlateout("x0") a => result, in("x1") b, in("x2") c, in("x3") d, in("x4") e,
            options(nostack)
        );
    }
    match result {
        -4095..0 => Err(Errno(-result as i32)),
        _ => Ok(result as usize),
    }
}

/// Ends this process.
pub(crate) fn exit(code: i32) -> ! {
    loop {
        let _ = call(EXIT_GROUP, [code as usize, 0, 0, 0, 0]);
    }
}

// What the compiler takes to be in every program; most of it is not in this one in the end.

#[unsafe(no_mangle)]
unsafe extern "C" fn strlen(text: *const u8) -> usize {
    let mut length = 0;
    // SAFETY: by this function's contract the text ends with NUL.
    while unsafe { *text.add(length) } != 0 {
        length += 1;
    }
    length
}

#[unsafe(no_mangle)]
unsafe extern "C" fn memcpy(to: *mut u8, from: *const u8, length: usize) -> *mut u8 {
    for at in 0..length {
        // SAFETY: by this function's contract both have so many bytes.
        unsafe { *to.add(at) = *from.add(at) };
    }
    to
}

#[unsafe(no_mangle)]
unsafe extern "C" fn memset(to: *mut u8, byte: i32, length: usize) -> *mut u8 {
    for at in 0..length {
        // SAFETY: by this function's contract there are so many bytes.
        unsafe { *to.add(at) = byte as u8 };
    }
    to
}

#[unsafe(no_mangle)]
unsafe extern "C" fn memcmp(one: *const u8, other: *const u8, length: usize) -> i32 {
    for at in 0..length {
        // SAFETY: by this function's contract both have so many bytes.
        let (a, b) = unsafe { (*one.add(at), *other.add(at)) };
        if a != b {
            return i32::from(a) - i32::from(b);
        }
    }
    0
}
