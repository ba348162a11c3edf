//! Starting a program with clone3(2): it is in its control group from its beginning, and nothing of this process is copied only
//! to be thrown away when the program is executed. An emulated processor takes longer over the copy than over all the rest.
//!
//! Until then the new process has this one's memory, and the thread that made it waits (`CLONE_VM`, `CLONE_VFORK`, as
//! posix_spawn(3) has it). So what it does there is system calls on what was prepared, and it says what failed in a number
//! that both see.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd, RawFd};
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::ptr::null;
use std::sync::atomic::{AtomicI32, AtomicU8, Ordering};

use rustix::process::{WaitId, WaitIdOptions, waitid};

use crate::failure::{Doing as _, Failure, FailureKind, failed, invalid};

/// Where programs are looked for if the environment does not say (confstr(3)).
const USUAL_PATH: &str = "/bin:/usr/bin";
/// Bytes of stack that a new process has until it is another program; system calls need little.
const STACK: usize = 32 << 10;

/// As linux/sched.h has it; the `libc` crate's is cut off.
const CLONE_INTO_CGROUP: u64 = 1 << 33;

/// What is executed, with what and as whom.
pub(crate) struct Start {
    /// The program as it was asked for, and its arguments. There is one at least.
    pub(crate) args: Vec<String>,
    /// `NAME=VALUE`; of two with one name the later counts.
    pub(crate) env: Vec<String>,
    /// Entered as the user: it may not be everybody's.
    pub(crate) cwd: String,
    /// Its standard streams. The first one is its terminal if `terminal` is set.
    pub(crate) streams: [OwnedFd; 3],
    pub(crate) terminal: bool,
    /// Another control group namespace.
    pub(crate) namespace: Option<RawFd>,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) groups: Vec<u32>,
    /// The capabilities that it may have, bit by number; all if it is not set.
    pub(crate) capabilities: Option<u64>,
    /// Resources by number, soft and hard (setrlimit(2)).
    pub(crate) limits: Vec<(u32, u64, u64)>,
    pub(crate) no_new_privileges: bool,
}

/// A process that was started. It stays a zombie until somebody has waited for it.
#[derive(Debug)]
pub(crate) struct Started {
    pub(crate) pid: u32,
    /// Readable when it has ended (pidfd_open(2)).
    pub(crate) handle: OwnedFd,
}

/// All that a new process looks at.
struct Plan {
    start: Start,
    cwd: CString,
    /// Where the program may be, in the order in which they are tried.
    programs: Vec<CString>,
    args: Words,
    env: Words,
    /// What it does now, as a number of [`Step`]'s.
    step: AtomicU8,
    /// The number of the error that kept it from executing the program.
    failed: AtomicI32,
}

/// What a process does on its way to be another program.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    Become,
    Enter,
    Execute,
}

/// Words as execve(2) takes them.
struct Words {
    pointers: Vec<*const libc::c_char>,
    _words: Vec<CString>,
}

impl Words {
    fn new(words: &[String]) -> Result<Self, Failure> {
        let words = words.iter().map(|word| c_string(word)).collect::<Result<Vec<_>, _>>()?;
        let pointers = words.iter().map(|word| word.as_ptr()).chain([null()]).collect();
        Ok(Self { pointers, _words: words })
    }
}

fn c_string(word: &str) -> Result<CString, Failure> {
    CString::new(word).map_err(|_| invalid(format!("{word:?} has a zero byte in it")))
}

impl Start {
    /// Starts the program in the control group whose directory is `group`; returns when it is executed.
    ///
    /// # Errors
    /// By kind: there is no such program, it cannot be executed, or something else of what was wanted failed.
    pub(crate) fn start(self, group: RawFd) -> Result<Started, Failure> {
        let env = last_of_each(&self.env);
        let program = self.args.first().ok_or_else(|| invalid("no command is given"))?.clone();
        let places = places_of(&program, &env);
        let plan = Plan {
            cwd: c_string(&self.cwd)?,
            programs: places.iter().map(|place| c_string(place)).collect::<Result<_, _>>()?,
            args: Words::new(&self.args)?,
            env: Words::new(&env)?,
            step: AtomicU8::new(Step::Become as u8),
            failed: AtomicI32::new(0),
            start: self,
        };
        let started = clone_into(group, &plan).doing(format_args!("make a process for `{program}`"))?;
        let errno = plan.failed.load(Ordering::Relaxed);
        if errno == 0 {
            return Ok(started);
        }
        wait(started.handle.as_fd()).doing("wait for a process that did not begin")?;
        let error = io::Error::from_raw_os_error(errno);
        let (cwd, step) = (Path::new(&plan.start.cwd), plan.step.load(Ordering::Relaxed));
        Err(if step == Step::Execute as u8 {
            let places: Vec<_> = places.iter().map(|place| cwd.join(place)).collect();
            not_executed(&program, &places, &error)
        } else if step == Step::Enter as u8 {
            failed(format_args!("enter the working directory {}", cwd.display()), error)
        } else {
            failed(format_args!("prepare a process for `{program}`"), error)
        })
    }
}

/// How a process that has ended did.
pub(crate) fn wait(handle: BorrowedFd<'_>) -> io::Result<ExitStatus> {
    let status = rustix::io::retry_on_intr(|| waitid(WaitId::PidFd(handle), WaitIdOptions::EXITED))?;
    let status = status.ok_or(io::ErrorKind::WouldBlock)?;
    // As wait(2) has it.
    Ok(ExitStatus::from_raw(match (status.exit_status(), status.terminating_signal()) {
        (Some(code), _) => (code & 0xff) << 8,
        (None, Some(signal)) if status.dumped() => signal | 0x80,
        (None, signal) => signal.unwrap_or(0),
    }))
}

/// Says what execve(2) did not, in the words that containers have for it. `places` are where the program was looked for.
fn not_executed(program: &str, places: &[PathBuf], error: &io::Error) -> Failure {
    let not_executable = |reason: &str| Failure {
        kind: FailureKind::CommandNotExecutable,
        what: format!("cannot run `{program}`: {reason}"),
    };
    let (is_file, is_directory) = (places.iter().any(|at| at.is_file()), places.iter().any(|at| at.is_dir()));
    match error.raw_os_error() {
        Some(libc::ENOENT | libc::ENOTDIR) if is_file => {
            not_executable("the interpreter that it names is not in the machine")
        }
        Some(libc::ENOENT | libc::ENOTDIR) => Failure {
            kind: FailureKind::CommandNotFound,
            what: format!("cannot run `{program}`: no such command in the machine"),
        },
        Some(libc::EACCES) if is_directory && !is_file => not_executable("it is a directory"),
        Some(libc::EACCES) => not_executable("permission denied"),
        Some(libc::ENOEXEC) => not_executable(
            "it is neither a program for this processor nor a script that names its interpreter",
        ),
        _ => failed(format_args!("run `{program}`"), error),
    }
}

/// Of variables with one name only the last, in the place of the first.
fn last_of_each(env: &[String]) -> Vec<String> {
    let mut kept: Vec<String> = Vec::with_capacity(env.len());
    for variable in env {
        let Some((name, _)) = variable.split_once('=') else { continue };
        match kept.iter_mut().find(|other| other.split_once('=').is_some_and(|(other, _)| other == name)) {
            Some(other) => other.clone_from(variable),
            None => kept.push(variable.clone()),
        }
    }
    kept
}

/// Where a program may be, as execvp(3) looks for it.
fn places_of(program: &str, env: &[String]) -> Vec<String> {
    if program.is_empty() || program.contains('/') {
        return vec![program.to_owned()];
    }
    let path = env.iter().find_map(|variable| variable.strip_prefix("PATH=")).unwrap_or(USUAL_PATH);
    let place = |directory: &str| match directory {
        "" => program.to_owned(),
        directory => format!("{directory}/{program}"),
    };
    path.split(':').map(place).collect()
}

/// Makes a process in the control group whose directory is `group`, which does what `plan` says. Returns when it has executed a
/// program, or has failed to and ended.
fn clone_into(group: RawFd, plan: &Plan) -> io::Result<Started> {
    let mut stack = Vec::<u128>::with_capacity(STACK / size_of::<u128>());
    let mut handle: RawFd = -1;
    // SAFETY: all zeros is a value of this type.
    let mut args: libc::clone_args = unsafe { std::mem::zeroed() };
    args.flags = (libc::CLONE_VM | libc::CLONE_VFORK | libc::CLONE_PIDFD) as u64 | CLONE_INTO_CGROUP;
    args.pidfd = (&raw mut handle) as u64;
    args.exit_signal = libc::SIGCHLD as u64;
    args.stack = stack.as_mut_ptr() as u64;
    args.stack_size = STACK as u64;
    args.cgroup = u64::try_from(group).map_err(|_| io::ErrorKind::InvalidInput)?;
    let blocked = Blocked::all()?;
    // SAFETY: the stack is the new process's alone and outlives its use of it, as `plan` does: this thread goes on only when
    // that has executed something else or has ended. No handler of a signal runs in it meanwhile.
    let pid = unsafe { clone3(&args, enter, std::ptr::from_ref(plan).cast()) };
    drop(blocked);
    if pid < 0 {
        return Err(io::Error::from_raw_os_error(i32::try_from(-pid).unwrap_or(libc::EINVAL)));
    }
    let pid = u32::try_from(pid).map_err(io::Error::other)?;
    // SAFETY: the kernel has made this descriptor for this process.
    Ok(Started { pid, handle: unsafe { OwnedFd::from_raw_fd(handle) } })
}

/// While this lives, no signal is delivered to this thread.
struct Blocked(libc::sigset_t);

impl Blocked {
    fn all() -> io::Result<Self> {
        // SAFETY: both sets live in this frame, and all zeros is a value of their type.
        unsafe {
            let (mut all, mut before): (libc::sigset_t, libc::sigset_t) = std::mem::zeroed();
            libc::sigfillset(&raw mut all);
            match libc::pthread_sigmask(libc::SIG_SETMASK, &raw const all, &raw mut before) {
                0 => Ok(Self(before)),
                errno => Err(io::Error::from_raw_os_error(errno)),
            }
        }
    }
}

impl Drop for Blocked {
    fn drop(&mut self) {
        // SAFETY: the set was filled in by the kernel.
        unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &raw const self.0, std::ptr::null_mut()) };
    }
}

/// clone3(2) for a new process that calls `entry` on a stack of its own; the C library has no function for it. The result is the
/// new process's number, or that of an error, negative.
///
/// # Safety
/// `args` must have `CLONE_VM`, `CLONE_VFORK` and a stack with an end on a multiple of 16. `entry` must be safe to call with
/// `argument` in a process that has this one's memory and not its other threads.
unsafe fn clone3(
    args: &libc::clone_args,
    entry: unsafe extern "C" fn(*const libc::c_void) -> !,
    argument: *const libc::c_void,
) -> i64 {
    let result: i64;
    // SAFETY: the new process starts with all registers as they are here but the stack pointer and the result, touches no
    // other stack than its own, and never comes back. In this one only the registers that are listed change.
    #[cfg(target_arch = "x86_64")]
    unsafe {
        std::arch::asm!(
            "syscall",
            "test rax, rax",
            "jnz 2f",
            "xor ebp, ebp",
            "mov rdi, r13",
            "call r12",
            "ud2",
            "2:",
            inlateout("rax") libc::SYS_clone3 => result,
            in("rdi") std::ptr::from_ref(args),
            in("rsi") size_of::<libc::clone_args>(),
            in("r12") entry,
            in("r13") argument,
            lateout("rcx") _,
            lateout("r11") _,
        );
    }
    // SAFETY: as above.
    #[cfg(target_arch = "aarch64")]
    unsafe {
        std::arch::asm!(
            "svc #0",
            "cbnz x0, 2f",
            "mov x29, xzr",
            "mov x0, x21",
            "blr x20",
            "brk #1",
            "2:",
            inlateout("x0") std::ptr::from_ref(args) => result,
            in("x1") size_of::<libc::clone_args>(),
            in("x8") libc::SYS_clone3,
            in("x20") entry,
            in("x21") argument,
        );
    }
    result
}

/// What the new process does. It neither allocates nor locks, and where the C library would do to all threads what Linux does to
/// one, it calls the kernel itself.
///
/// # Safety
/// `plan` must point to a [`Plan`], and this process must be a new one that nothing else is expected of.
unsafe extern "C" fn enter(plan: *const libc::c_void) -> ! {
    // SAFETY: as the caller says.
    let plan = unsafe { &*plan.cast::<Plan>() };
    let errno = match plan.become_user() {
        Ok(()) => plan.execute(),
        Err(errno) => errno,
    };
    plan.failed.store(errno, Ordering::Relaxed);
    // SAFETY: takes a number.
    unsafe { libc::_exit(127) }
}

/// A system call's result, with the error's number.
fn done(result: impl Into<i64>) -> Result<(), i32> {
    if result.into() == -1 { Err(errno()) } else { Ok(()) }
}

fn errno() -> i32 {
    // SAFETY: it is this thread's, and in a new process its maker's, which waits.
    unsafe { *libc::__errno_location() }
}

impl Plan {
    /// Does everything but executing a program.
    fn become_user(&self) -> Result<(), i32> {
        let start = &self.start;
        // SAFETY: every pointer is to memory of `self`, with the length that is given.
        unsafe {
            for (number, stream) in (0..).zip(&start.streams) {
                done(libc::dup2(stream.as_raw_fd(), number))?;
            }
            if let Some(namespace) = start.namespace {
                done(libc::setns(namespace, libc::CLONE_NEWCGROUP))?;
            }
            done(libc::setsid())?;
            if start.terminal {
                done(libc::ioctl(0, libc::TIOCSCTTY, 0))?;
            }
            for (resource, soft, hard) in &start.limits {
                let limit = libc::rlimit { rlim_cur: *soft, rlim_max: *hard };
                done(libc::setrlimit(*resource as _, &raw const limit))?;
            }
            if let Some(kept) = start.capabilities {
                for capability in 0..=LAST_CAPABILITY {
                    if kept & (1 << capability) == 0 {
                        done(libc::prctl(libc::PR_CAPBSET_DROP, capability, 0, 0, 0))?;
                    }
                }
            }
            done(libc::syscall(libc::SYS_setgroups, start.groups.len(), start.groups.as_ptr()))?;
            done(libc::syscall(libc::SYS_setresgid, start.gid, start.gid, start.gid))?;
            done(libc::syscall(libc::SYS_setresuid, start.uid, start.uid, start.uid))?;
            // Of somebody who is not root the kernel has taken them by now; of root, exec gives what the bounding set has.
            if start.no_new_privileges {
                done(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))?;
            }
            self.step.store(Step::Enter as u8, Ordering::Relaxed);
            done(libc::chdir(self.cwd.as_ptr()))
        }
    }

    /// Executes the program; comes back with an error's number.
    fn execute(&self) -> i32 {
        // SAFETY: as in `become_user`; all zeros is a value of both types, and of the second the default.
        unsafe {
            let mut none: libc::sigset_t = std::mem::zeroed();
            libc::sigemptyset(&raw mut none);
            // The one signal that this program ignores, which would stay ignored.
            let default: libc::sigaction = std::mem::zeroed();
            libc::sigaction(libc::SIGPIPE, &raw const default, std::ptr::null_mut());
            libc::sigprocmask(libc::SIG_SETMASK, &raw const none, std::ptr::null_mut());
        }
        self.step.store(Step::Execute as u8, Ordering::Relaxed);
        let mut outcome = libc::ENOENT;
        for program in &self.programs {
            // SAFETY: all three are what execve(2) wants, and are there.
            unsafe {
                libc::execve(program.as_ptr(), self.args.pointers.as_ptr(), self.env.pointers.as_ptr())
            };
            match errno() {
                libc::ENOENT | libc::ENOTDIR => {}
                // There may be another one that may be executed.
                libc::EACCES => outcome = libc::EACCES,
                other => return other,
            }
        }
        outcome
    }
}

/// The highest capability of a kernel that knows fewer would be refused; 40 is `CAP_CHECKPOINT_RESTORE`, of Linux 5.9.
const LAST_CAPABILITY: u32 = 40;

#[cfg(test)]
mod tests {
    use super::*;

    fn strings(words: &[&str]) -> Vec<String> {
        words.iter().map(|&word| word.to_owned()).collect()
    }

    #[test]
    fn programs_are_looked_for_as_execvp_does() {
        let env = strings(&["HOME=/", "PATH=/usr/bin::/bin"]);
        assert_eq!(places_of("sh", &env), ["/usr/bin/sh", "sh", "/bin/sh"]);
        assert_eq!(places_of("sh", &strings(&["XPATH=/x"])), ["/bin/sh", "/usr/bin/sh"]);
        for is_a_path in ["/bin/sh", "./sh", "bin/sh", ""] {
            assert_eq!(places_of(is_a_path, &env), [is_a_path]);
        }
    }

    #[test]
    fn of_variables_with_one_name_the_last_counts() {
        let env = strings(&["A=1", "B=2", "A=3=4", "nothing", "B=", "=x"]);
        assert_eq!(last_of_each(&env), ["A=3=4", "B=", "=x"]);
    }

    #[test]
    fn what_was_not_executed_says_why() {
        let of = |place: &str, errno| {
            let failure = not_executed("x", &[place.into()], &io::Error::from_raw_os_error(errno));
            (failure.kind, failure.what)
        };
        let (found, executable) = (FailureKind::CommandNotFound, FailureKind::CommandNotExecutable);
        for (place, errno, kind, says) in [
            ("/no/such", libc::ENOENT, found, "no such command in the machine"),
            ("/etc/passwd/x", libc::ENOTDIR, found, "no such command in the machine"),
            ("/etc/passwd", libc::ENOENT, executable, "the interpreter that it names is not in the machine"),
            ("/etc", libc::EACCES, executable, "it is a directory"),
            ("/etc/passwd", libc::EACCES, executable, "permission denied"),
        ] {
            assert_eq!(of(place, errno), (kind, format!("cannot run `x`: {says}")));
        }
        assert_eq!(of("/etc/passwd", libc::ENOEXEC).0, executable);
        assert_eq!(of("/etc/passwd", libc::ENOMEM).0, FailureKind::Failed);
    }
}
