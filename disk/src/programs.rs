//! Runs the programs that look after pools: the one place that starts a process in this room.

use std::ffi::OsStr;
use std::fmt::Debug;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::{DiskError, Result};

/// Runs programs to their end. A trait, so that what is asked of `zfs` can be seen where there is none.
pub(crate) trait Programs: Debug + Send + Sync {
    /// Runs `program` and gives its standard output. `purpose` completes «cannot …».
    ///
    /// # Errors
    /// It is not installed, or fails; the error holds what it said.
    fn run(&self, purpose: &str, program: &'static str, arguments: &[&OsStr]) -> Result<String>;
}

/// Those of this host.
#[derive(Debug, Clone, Copy)]
pub(crate) struct HostPrograms;

impl Programs for HostPrograms {
    fn run(&self, purpose: &str, program: &'static str, arguments: &[&OsStr]) -> Result<String> {
        let Some(path) = find(program) else {
            return Err(DiskError::ProgramMissing { program: program.into(), purpose: purpose.into() });
        };
        tracing::debug!(program, ?arguments, "running");
        let failed =
            |said| DiskError::ProgramFailed { program: program.into(), purpose: purpose.into(), said };
        let output = Command::new(path)
            .args(arguments)
            .env("LC_ALL", "C")
            .stdin(Stdio::null())
            .output()
            .map_err(|error| failed(error.to_string()))?;
        if output.status.success() {
            return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
        }
        let said = String::from_utf8_lossy(&output.stderr);
        let lines: Vec<&str> = said.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
        Err(failed(if lines.is_empty() { output.status.to_string() } else { lines.join("; ") }))
    }
}

/// Where `program` is: in `PATH`, or where it usually is although ordinary users' paths leave that out.
pub(crate) fn find(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/sbin", "/sbin", "/usr/bin", "/bin"].map(PathBuf::from))
        .map(|directory| directory.join(program))
        .find(|candidate| is_executable(candidate))
}

fn is_executable(path: &Path) -> bool {
    path.metadata().is_ok_and(|found| found.is_file() && found.permissions().mode() & 0o111 != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_gives_its_output_or_says_why_not() {
        let run = |program, arguments: &[&str]| {
            let arguments: Vec<&OsStr> = arguments.iter().map(OsStr::new).collect();
            HostPrograms.run("try this", program, &arguments)
        };
        assert_eq!(run("sh", &["-c", "echo $LC_ALL"]).unwrap(), "C\n");
        for (program, arguments, expected) in [
            (
                "sh",
                &["-c", "echo one >&2; echo; echo two >&2; exit 3"][..],
                "cannot try this: sh says: one; two",
            ),
            ("sh", &["-c", "exit 3"], "cannot try this: sh says: exit status: 3"),
            (
                "kiln-no-such-program",
                &[],
                "`kiln-no-such-program` is needed to try this, and it was not found in PATH or the usual places",
            ),
        ] {
            assert_eq!(run(program, arguments).unwrap_err().to_string(), expected);
        }
    }
}
