//! Health checks: the image's, changed by flags.

use std::time::Duration;

use kiln_contract::{HealthCheck, HumanDuration};

use super::image::ImageHealthCheck;
use super::{ResolveError, Result};

/// What was typed: `--health-*` and `--no-healthcheck`.
#[derive(Debug, Clone, Default)]
pub(crate) struct Typed {
    pub(crate) none: bool,
    pub(crate) command: Option<String>,
    pub(crate) interval: Option<HumanDuration>,
    pub(crate) timeout: Option<HumanDuration>,
    pub(crate) start_period: Option<HumanDuration>,
    pub(crate) start_interval: Option<HumanDuration>,
    pub(crate) retries: Option<u32>,
}

/// How the workload's health is told, if it is.
///
/// The image's `Test` is `["NONE"]`, `["CMD", program, …]` or `["CMD-SHELL", line]`; a line is run by the image's
/// `Shell`, `/bin/sh -c` unless it says otherwise. Docker's defaults: every 30 s, 30 s each, 3 failures in a row.
pub(crate) fn health_check(
    image: Option<&ImageHealthCheck>,
    shell: &[String],
    typed: &Typed,
) -> Result<Option<HealthCheck>> {
    let others = typed.command.is_some()
        || typed.interval.is_some()
        || typed.timeout.is_some()
        || typed.start_period.is_some()
        || typed.start_interval.is_some()
        || typed.retries.is_some();
    if typed.none {
        return if others {
            Err(ResolveError::Conflict("--no-healthcheck excludes the --health-* flags".to_owned()))
        } else {
            Ok(None)
        };
    }
    let line = |line: &str| -> Vec<String> {
        let default = ["/bin/sh".to_owned(), "-c".to_owned()];
        let shell = if shell.is_empty() { &default[..] } else { shell };
        shell.iter().cloned().chain([line.to_owned()]).collect()
    };
    let command = match &typed.command {
        Some(text) if text.is_empty() => None,
        Some(text) => Some(line(text)),
        None => match image.map_or(&[][..], |check| &check.test[..]) {
            [kind, rest @ ..] if kind == "CMD" && !rest.is_empty() => Some(rest.to_vec()),
            [kind, text] if kind == "CMD-SHELL" => Some(line(text)),
            _ => None,
        },
    };
    let Some(command) = command else { return Ok(None) };
    let pick = |flag: Option<HumanDuration>, image: Option<u64>, default: u64| match (flag, image) {
        (Some(HumanDuration(given)), _) if !given.is_zero() => given,
        (_, Some(nanoseconds)) if nanoseconds > 0 => Duration::from_nanos(nanoseconds),
        _ => Duration::from_secs(default),
    };
    Ok(Some(HealthCheck {
        command,
        interval: pick(typed.interval, image.map(|check| check.interval), 30),
        timeout: pick(typed.timeout, image.map(|check| check.timeout), 30),
        start_period: pick(typed.start_period, image.map(|check| check.start_period), 0),
        start_interval: pick(typed.start_interval, image.map(|check| check.start_interval), 5),
        retries: typed
            .retries
            .or(image.map(|check| check.retries))
            .filter(|retries| *retries > 0)
            .unwrap_or(3),
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(test: &[&str]) -> ImageHealthCheck {
        let test = test.iter().map(|word| (*word).to_owned()).collect();
        ImageHealthCheck { test, timeout: 2_000_000_000, ..Default::default() }
    }

    #[test]
    fn the_command_comes_from_the_flag_or_the_image() {
        let typed = |command: &str| Typed { command: Some(command.to_owned()), ..Default::default() };
        type Words<'a> = &'a [&'a str];
        let table: [(Words<'_>, Typed, Option<Words<'_>>); 7] = [
            (&["CMD", "curl", "-f", "x"], Typed::default(), Some(&["curl", "-f", "x"])),
            (&["CMD-SHELL", "curl x"], Typed::default(), Some(&["/bin/sh", "-c", "curl x"])),
            (&["NONE"], Typed::default(), None),
            (&[], Typed::default(), None),
            (&["CMD"], Typed::default(), None),
            (&["NONE"], typed("true"), Some(&["/bin/sh", "-c", "true"])),
            (&["CMD", "a"], Typed { none: true, ..Default::default() }, None),
        ];
        for (test, typed, expected) in table {
            let got = health_check(Some(&image(test)), &[], &typed).unwrap();
            assert_eq!(
                got.map(|check| check.command),
                expected.map(|words| words.iter().map(|w| (*w).to_owned()).collect()),
                "{test:?}"
            );
        }
    }

    #[test]
    fn times_come_from_flag_then_image_then_default() {
        let typed = Typed { interval: Some("3s".parse().unwrap()), retries: Some(7), ..Default::default() };
        let check = health_check(Some(&image(&["CMD", "a"])), &[], &typed).unwrap().unwrap();
        let seconds =
            [check.interval, check.timeout, check.start_period, check.start_interval].map(|d| d.as_secs());
        assert_eq!((seconds, check.retries), ([3, 2, 0, 5], 7));
    }

    #[test]
    fn no_healthcheck_excludes_the_others() {
        let typed = Typed { none: true, retries: Some(1), ..Default::default() };
        assert!(health_check(None, &[], &typed).is_err());
    }

    #[test]
    fn a_line_is_run_by_the_shell_of_the_image() {
        let shell = ["/bin/bash".to_owned(), "-ec".to_owned()];
        let check =
            health_check(Some(&image(&["CMD-SHELL", "x"])), &shell, &Typed::default()).unwrap().unwrap();
        assert_eq!(check.command, ["/bin/bash", "-ec", "x"]);
    }
}
