//! Signals of this process, taken as events; and signals by name.

#[cfg(target_os = "linux")]
mod linux;
#[cfg(target_os = "macos")]
mod macos;

use kiln_contract::{BackendError, ErrorKind};

#[cfg(target_os = "linux")]
pub use linux::Signals;
#[cfg(target_os = "macos")]
pub use macos::Signals;

/// What a process that supervises or attaches takes as events. Faults of the process itself (SIGSEGV and its like), what
/// cannot be caught, and what stops and continues processes are not among them.
const TAKEN: [i32; 12] = [
    libc::SIGHUP,
    libc::SIGINT,
    libc::SIGQUIT,
    libc::SIGTERM,
    libc::SIGUSR1,
    libc::SIGUSR2,
    libc::SIGALRM,
    libc::SIGVTALRM,
    libc::SIGPROF,
    libc::SIGIO,
    libc::SIGWINCH,
    libc::SIGCHLD,
];

/// Does to this process what a signal would have done if it had not been taken as an event. To be called when nothing
/// takes it any more.
pub fn die(signal: i32) {
    if let Some(signal) = crate::process::named(signal) {
        if signal == rustix::process::Signal::PIPE {
            // It is Rust's own start that ignores it, and not (as with `nohup`) who started this command.
            // SAFETY: the default action has no code of this program.
            unsafe { libc::signal(libc::SIGPIPE, libc::SIG_DFL) };
        }
        let _ = rustix::process::kill_process(rustix::process::getpid(), signal);
    }
}

/// Reads a signal: its name with or without `SIG`, its number, `RTMIN+n`, `RTMAX-n`.
///
/// # Errors
/// [`ErrorKind::Invalid`] for what is none of these.
pub fn parse(text: &str) -> Result<i32, BackendError> {
    let bad = || {
        BackendError::new(ErrorKind::Invalid, format!("`{text}` is no signal"))
            .hint("give a name such as TERM or SIGTERM, or a number from 1 to 64")
    };
    if let Ok(number) = text.parse::<i32>() {
        return if (1..=64).contains(&number) { Ok(number) } else { Err(bad()) };
    }
    let upper = text.to_ascii_uppercase();
    let name = upper.strip_prefix("SIG").unwrap_or(&upper);
    let real_time = |rest: &str, sign: char| match rest {
        "" => Some(0),
        _ => rest.strip_prefix(sign)?.parse::<u8>().ok().map(i32::from),
    };
    let number = match name {
        _ if name.starts_with("RTMIN") => real_time(&name[5..], '+').map(|n| 34 + n),
        _ if name.starts_with("RTMAX") => real_time(&name[5..], '-').map(|n| 64 - n),
        "POLL" => Some(libc::SIGIO),
        _ => format!("SIG{name}").parse::<nix::sys::signal::Signal>().ok().map(|signal| signal as i32),
    };
    number.filter(|number| (1..=64).contains(number)).ok_or_else(bad)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signals_are_read_as_docker_reads_them() {
        let table = [
            ("SIGTERM", 15),
            ("term", 15),
            ("9", 9),
            ("KILL", 9),
            ("SIGRTMIN+3", 37),
            ("RTMIN", 34),
            ("rtmax-1", 63),
            ("WINCH", 28),
        ];
        for (text, number) in table {
            assert_eq!(parse(text).unwrap(), number, "{text}");
        }
        for text in ["", "0", "65", "-1", "SIG", "NOPE", "RTMIN+40", "RTMAX-x", "RTMIN3x"] {
            assert_eq!(parse(text).unwrap_err().kind(), ErrorKind::Invalid, "{text}");
        }
    }
}
