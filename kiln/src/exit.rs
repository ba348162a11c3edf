//! The one place where exit codes are made and errors are printed.
//!
//! | code | when |
//! |---|---|
//! | 0 | it worked |
//! | 1 | it did not |
//! | 2 | the command line makes no sense |
//! | 125 | `run`, `create` or `exec` failed before the workload's command did, or their command line makes no sense |
//! | 126 | the workload's command cannot be executed |
//! | 127 | the workload's command was not found |
//! | 128 + n | the workload was killed by signal n; 141 when nobody reads our output |
//! | other | the workload's own |

use std::ffi::OsString;
use std::io::Write;
use std::process::ExitCode;

use anstyle::{AnsiColor, Style};
use kiln_contract::{ErrorKind, ExitStatus};

use crate::error::CliError;
use crate::suggest;

/// What a successful command ends with: 0, or the workload's own code.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Exit(pub(crate) u8);

impl Exit {
    /// It worked.
    pub(crate) const SUCCESS: Self = Self(0);
    /// It did not.
    pub(crate) const FAILURE: Self = Self(1);

    /// A workload's own code; why it could not be started is printed.
    pub(crate) fn of_workload(status: &ExitStatus) -> Self {
        if let Some(error) = &status.error {
            print_line("error", error);
        }
        Self(status.code)
    }
}

const KILN_FAILED: u8 = 125;
const NOT_EXECUTABLE: u8 = 126;
const NOT_FOUND: u8 = 127;
const USAGE: u8 = 2;
/// 128 + SIGPIPE, as shells show what died of it.
const BROKEN_PIPE: u8 = 141;

/// Whether the exit code belongs to the workload, so that Kiln's own failures need a code of their own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Owner {
    /// `run`, `create`, `exec`.
    Workload,
    /// All others.
    Kiln,
}

/// Ends a command: prints why it failed, if it did.
pub(crate) fn finish(result: Result<Exit, CliError>, owner: Owner) -> ExitCode {
    match result {
        Ok(Exit(code)) => ExitCode::from(code),
        Err(error) => {
            let code = code_of(&error, owner);
            if !error.is_broken_pipe() && !matches!(error, CliError::Reported) {
                print_error(&error);
            }
            ExitCode::from(code)
        }
    }
}

fn code_of(error: &CliError, owner: Owner) -> u8 {
    match (error, error.kind()) {
        _ if error.is_broken_pipe() => BROKEN_PIPE,
        (_, Some(ErrorKind::CommandNotFound)) => NOT_FOUND,
        (_, Some(ErrorKind::CommandNotExecutable)) => NOT_EXECUTABLE,
        _ if owner == Owner::Workload => KILN_FAILED,
        (CliError::Usage { .. } | CliError::Resolve(_), _) => USAGE,
        _ => Exit::FAILURE.0,
    }
}

/// Ends a command whose line clap refused, or answers `--help` and `--version`.
pub(crate) fn finish_usage(error: &clap::Error, words: &[OsString]) -> ExitCode {
    // A closed standard error is no reason to fail in another way.
    let _ = error.print();
    if !error.use_stderr() {
        return ExitCode::SUCCESS;
    }
    if let Some(hint) = suggest::hint(error, words) {
        print_line("hint", hint);
    }
    match verb(words) {
        Some("run" | "create" | "exec") => ExitCode::from(KILN_FAILED),
        _ => ExitCode::from(USAGE),
    }
}

/// The command of a line, before it is parsed: the first word that is neither a flag nor the value of `--home`.
pub(crate) fn verb(words: &[OsString]) -> Option<&str> {
    let mut words = words.iter().skip(1);
    while let Some(word) = words.next() {
        if word == "--home" {
            words.next();
        } else if !word.as_encoded_bytes().starts_with(b"-") {
            return word.to_str();
        }
    }
    None
}

/// Prints an error, its causes and its hint to standard error.
pub(crate) fn print_error(error: &CliError) {
    for (label, text) in error.lines() {
        print_line(label, &text);
    }
}

/// Prints `label: text` to standard error, the label in its colour.
pub(crate) fn print_line(label: &str, text: &str) {
    let colour = match label {
        "error" => AnsiColor::Red,
        "warning" => AnsiColor::Yellow,
        "hint" => AnsiColor::Cyan,
        _ => AnsiColor::BrightBlack,
    };
    let style = Style::new().bold().fg_color(Some(colour.into()));
    let mut stderr = anstream::stderr().lock();
    for (index, line) in text.lines().enumerate() {
        // Nothing can be done about a standard error that cannot be written to.
        let _ = if index == 0 {
            writeln!(stderr, "{style}{label}:{style:#} {line}")
        } else {
            writeln!(stderr, "  {line}")
        };
    }
}

#[cfg(test)]
mod tests {
    use std::io;

    use kiln_contract::BackendError;

    use super::*;

    #[test]
    fn the_verb_is_found_behind_global_flags() {
        let table = [
            ("kiln run --bogus", Some("run")),
            ("kiln --home /x exec", Some("exec")),
            ("kiln --home=/x -v create", Some("create")),
            ("kiln --home", None),
            ("kiln", None),
        ];
        for (line, expected) in table {
            let words: Vec<OsString> = line.split(' ').map(OsString::from).collect();
            assert_eq!(verb(&words), expected, "{line}");
        }
    }

    #[test]
    fn failures_get_the_codes_that_the_table_says() {
        let backend = |kind| CliError::from(BackendError::new(kind, "x"));
        let table = [
            (CliError::failed("x"), Owner::Kiln, 1),
            (CliError::failed("x"), Owner::Workload, 125),
            (CliError::usage("x"), Owner::Kiln, 2),
            (CliError::usage("x"), Owner::Workload, 125),
            (backend(ErrorKind::CommandNotFound), Owner::Workload, 127),
            (backend(ErrorKind::CommandNotFound).with_hint("y"), Owner::Workload, 127),
            (backend(ErrorKind::CommandNotExecutable), Owner::Workload, 126),
            (backend(ErrorKind::NotFound), Owner::Workload, 125),
            (backend(ErrorKind::NotFound), Owner::Kiln, 1),
            (CliError::Output(io::ErrorKind::BrokenPipe.into()), Owner::Kiln, 141),
            (CliError::Output(io::ErrorKind::StorageFull.into()), Owner::Kiln, 1),
        ];
        for (error, owner, code) in table {
            assert_eq!(code_of(&error, owner), code, "{error:?} {owner:?}");
        }
    }
}
