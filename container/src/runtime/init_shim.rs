//! `--init`: process 1 that reaps and passes signals on.
//!
//! It is this very process image, forked once more: no program has to be in the container or be mounted there, and
//! its memory is shared with the supervisor until written to. What it must not do is run much: it lives by system
//! calls only.

use std::{fs, io};

use super::privileges::exit;

/// Signals that are about the process itself and not passed on.
const OWN: [i32; 7] =
    [libc::SIGFPE, libc::SIGILL, libc::SIGSEGV, libc::SIGBUS, libc::SIGABRT, libc::SIGTRAP, libc::SIGSYS];

/// Returns in a new child, which becomes the workload. The caller's process stays as init: it ends when the child
/// has, with the child's exit code (128 + n for signal n). `give_up` takes from init what it does not need.
pub(super) fn become_parent_of(terminal: bool, give_up: impl FnOnce() -> io::Result<()>) {
    // SAFETY: plain calls on a zeroed set that lives on the stack; this process has one thread.
    let signals = unsafe {
        let mut signals: libc::sigset_t = std::mem::zeroed();
        libc::sigfillset(&raw mut signals);
        for signal in OWN {
            libc::sigdelset(&raw mut signals, signal);
        }
        signals
    };
    let mut before = signals;
    // SAFETY: both sets live on the stack.
    unsafe { libc::sigprocmask(libc::SIG_BLOCK, &raw const signals, &raw mut before) };
    // SAFETY: one thread only, so that the child's memory is whole.
    match unsafe { libc::fork() } {
        -1 => exit(126),
        0 => {
            // SAFETY: takes numbers, and sets that live on the stack.
            unsafe {
                // A process group of its own, so that signals that a terminal sends reach it once.
                libc::setpgid(0, 0);
                if terminal {
                    // SIGTTOU, which this would raise in a background group, is blocked.
                    libc::tcsetpgrp(0, libc::getpgrp());
                }
                libc::sigprocmask(libc::SIG_SETMASK, &raw const before, std::ptr::null_mut());
            }
        }
        child => {
            hide();
            // The workload may be allowed to look into this process, and must find nothing more than it has itself.
            if give_up().is_err() {
                exit(126);
            }
            reap(child, &signals)
        }
    }
}

/// Takes away what this process has of the host's: open files, its command line and environment, and everybody's
/// right to look into its memory.
fn hide() {
    // SAFETY: takes numbers and a constant text; nothing uses these descriptors any more.
    unsafe {
        libc::close_range(3, libc::c_uint::MAX, 0);
        libc::prctl(libc::PR_SET_DUMPABLE, 0, 0, 0, 0);
        libc::prctl(libc::PR_SET_NAME, c"init".as_ptr());
    }
    let stat = fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let fields: Vec<usize> = stat
        .rsplit_once(") ")
        .map(|(_, rest)| rest.split(' ').filter_map(|field| field.trim().parse().ok()).collect())
        .unwrap_or_default();
    // Fields 48 to 51 of proc_pid_stat(5). Those before may be negative and fail to parse: counted from the end.
    let [.., arguments, arguments_end, environment, environment_end, _exit_code] = fields[..] else { return };
    if arguments == 0 || arguments_end <= arguments + 5 || environment_end < environment {
        return;
    }
    // SAFETY: the kernel says that these ranges hold the arguments and the environment; they are at the bottom of
    // this process's own writable stack, and nothing reads them after this.
    unsafe {
        std::ptr::write_bytes(arguments as *mut u8, 0, arguments_end - arguments);
        std::ptr::copy_nonoverlapping(c"init".as_ptr().cast::<u8>(), arguments as *mut u8, 5);
        std::ptr::write_bytes(environment as *mut u8, 0, environment_end - environment);
    }
}

fn reap(child: libc::pid_t, signals: &libc::sigset_t) -> ! {
    loop {
        // SAFETY: the set outlives the call; no details are asked for.
        let signal = unsafe { libc::sigwaitinfo(signals, std::ptr::null_mut()) };
        if signal > 0 && signal != libc::SIGCHLD {
            // SAFETY: takes numbers.
            unsafe { libc::kill(child, signal) };
            continue;
        }
        loop {
            let mut status = 0;
            // SAFETY: `status` lives on the stack.
            let ended = unsafe { libc::waitpid(-1, &raw mut status, libc::WNOHANG) };
            if ended <= 0 {
                break;
            }
            if ended == child {
                exit(if libc::WIFSIGNALED(status) {
                    128 + libc::WTERMSIG(status)
                } else {
                    libc::WEXITSTATUS(status)
                });
            }
        }
    }
}
