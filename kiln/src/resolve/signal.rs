//! Signals by name and number (Linux, signal(7)).

use super::{ResolveError, Result};

const NAMES: [&str; 31] = [
    "HUP", "INT", "QUIT", "ILL", "TRAP", "ABRT", "BUS", "FPE", "KILL", "USR1", "SEGV", "USR2", "PIPE",
    "ALRM", "TERM", "STKFLT", "CHLD", "CONT", "STOP", "TSTP", "TTIN", "TTOU", "URG", "XCPU", "XFSZ",
    "VTALRM", "PROF", "WINCH", "IO", "PWR", "SYS",
];
const RTMIN: i32 = 34;
const RTMAX: i32 = 64;

/// A signal's Linux number, from `TERM`, `SIGTERM`, `15`, `RTMIN+3` or `RTMAX-1`, in any case. Linux numbers on
/// every host: it is a Linux process that gets it.
pub(crate) fn parse_signal(flag: &'static str, text: &str) -> Result<i32> {
    let bad = || ResolveError::value(flag, text, "it is not a signal (a name such as SIGTERM, or a number)");
    if let Ok(number) = text.parse::<i32>() {
        return if (1..=RTMAX).contains(&number) { Ok(number) } else { Err(bad()) };
    }
    let upper = text.to_ascii_uppercase();
    let name = upper.strip_prefix("SIG").unwrap_or(&upper);
    let name = match name {
        "IOT" => "ABRT",
        "POLL" => "IO",
        "CLD" => "CHLD",
        other => other,
    };
    if let Some(index) = NAMES.iter().position(|other| *other == name) {
        return Ok(index as i32 + 1);
    }
    let offset = |digits: &str| digits.parse::<i32>().ok().filter(|n| (0..=RTMAX - RTMIN).contains(n));
    let real_time = match (name, name.strip_prefix("RTMIN+"), name.strip_prefix("RTMAX-")) {
        ("RTMIN", ..) => Some(RTMIN),
        ("RTMAX", ..) => Some(RTMAX),
        (_, Some(digits), _) => offset(digits).map(|n| RTMIN + n),
        (_, _, Some(digits)) => offset(digits).map(|n| RTMAX - n),
        _ => None,
    };
    real_time.ok_or_else(bad)
}

/// A signal's name with `SIG`.
pub(crate) fn signal_name(number: i32) -> String {
    match usize::try_from(number - 1).ok().and_then(|index| NAMES.get(index)) {
        Some(name) => format!("SIG{name}"),
        None if (RTMIN..=RTMAX).contains(&number) => format!("SIGRTMIN+{}", number - RTMIN),
        None => number.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signals_read_by_name_and_number() {
        let table = [
            ("TERM", Some(15)),
            ("sigkill", Some(9)),
            ("9", Some(9)),
            ("SIGSYS", Some(31)),
            ("RTMIN+3", Some(37)),
            ("SIGRTMAX-1", Some(63)),
            ("rtmin", Some(34)),
            ("0", None),
            ("65", None),
            ("", None),
            ("SIG", None),
            ("RTMIN+31", None),
            ("BOGUS", None),
        ];
        for (text, expected) in table {
            assert_eq!(parse_signal("--signal", text).ok(), expected, "{text}");
        }
        for number in 1..=64 {
            if !(32..34).contains(&number) {
                assert_eq!(parse_signal("--signal", &signal_name(number)).unwrap(), number);
            }
        }
    }
}
