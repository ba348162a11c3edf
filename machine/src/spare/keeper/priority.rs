//! Whose turn it is on the processors (sched(7)).

use std::fs;

/// Lets everything else go first, if that can be taken back: a user who is not root may not.
pub(super) fn lower() {
    if rustix::process::geteuid().is_root() {
        set(0, libc::SCHED_IDLE);
    }
}

/// Takes that back, for this process and all of `pid`.
pub(super) fn raise(pid: u32) {
    if !rustix::process::geteuid().is_root() {
        return;
    }
    for tasks in ["/proc/self/task".to_owned(), format!("/proc/{pid}/task")] {
        for task in fs::read_dir(tasks).into_iter().flatten().flatten() {
            if let Some(task) = task.file_name().to_str().and_then(|task| task.parse().ok()) {
                set(task, libc::SCHED_OTHER);
            }
        }
    }
}

fn set(task: libc::pid_t, policy: libc::c_int) {
    // SAFETY: all zeros is a value of this type, and the one that these policies take.
    let parameter: libc::sched_param = unsafe { std::mem::zeroed() };
    // SAFETY: reads the parameter. Where it is refused, the machine is only made sooner or later.
    let _ = unsafe { libc::sched_setscheduler(task, policy, &raw const parameter) };
}
