//! Programs of the host that download and build.

use std::ffi::OsStr;
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use crate::error::{BootError, Result, Tool};

/// How much of what a program writes is read: `apt-cache` and compilers write a few kilobytes.
const MAX_OUTPUT: u64 = 4 << 20;

/// How many of a failed program's last lines an error has.
const LAST_LINES: usize = 12;

/// Whether `program` is in one of the directories that are searched for programs.
pub(crate) fn find(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .map(|directory| directory.join(program))
        .find(|candidate| candidate.is_file())
}

/// All of `tools` that are not there.
///
/// # Errors
/// [`BootError::ToolsMissing`] names them.
pub(crate) fn require(purpose: &'static str, tools: &[Tool]) -> Result<()> {
    let missing: Vec<Tool> = tools.iter().filter(|tool| find(tool.program).is_none()).copied().collect();
    if missing.is_empty() { Ok(()) } else { Err(BootError::ToolsMissing { purpose, missing }) }
}

/// A command that speaks English, asks nothing, and knows nothing of a build that this process may be part of.
pub(crate) fn command(program: &'static str) -> Command {
    let mut command = Command::new(program);
    for variable in
        ["MAKEFLAGS", "MAKELEVEL", "MFLAGS", "ARCH", "CROSS_COMPILE", "KBUILD_OUTPUT", "LOCALVERSION"]
    {
        command.env_remove(variable);
    }
    command.env("LC_ALL", "C").stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// Runs `program` in `directory`, and gives its standard output.
///
/// # Errors
/// If it cannot be started or fails; the message holds the last that it wrote.
pub(crate) fn run<S: AsRef<OsStr>>(
    doing: &str,
    program: &'static str,
    arguments: impl IntoIterator<Item = S>,
    directory: &Path,
) -> Result<String> {
    let started = command(program).args(arguments).current_dir(directory).spawn();
    let child = started.map_err(|error| failed(doing, program, &error.to_string()))?;
    finish(doing, program, child, || {})
}

/// Waits for `child`, and gives its standard output. `meanwhile` is called every now and then.
pub(crate) fn finish(
    doing: &str,
    program: &'static str,
    mut child: Child,
    mut meanwhile: impl FnMut(),
) -> Result<String> {
    let said = child.stderr.take();
    let errors = std::thread::spawn(move || {
        let mut last = Vec::new();
        // Both are read to the end, so that nothing waits for a full pipe.
        let _ = said.map(|said| said.take(MAX_OUTPUT).read_to_end(&mut last));
        last
    });
    let output = child.stdout.take();
    let output = std::thread::spawn(move || {
        let mut all = Vec::new();
        let _ = output.map(|output| output.take(MAX_OUTPUT).read_to_end(&mut all));
        all
    });
    let status = loop {
        match child.try_wait() {
            Ok(Some(status)) => break status,
            Ok(None) => {
                meanwhile();
                std::thread::sleep(Duration::from_millis(20));
            }
            Err(error) => return Err(failed(doing, program, &error.to_string())),
        }
    };
    let output = output.join().unwrap_or_default();
    let errors = errors.join().unwrap_or_default();
    if status.success() {
        return Ok(String::from_utf8_lossy(&output).into_owned());
    }
    let text = String::from_utf8_lossy(if errors.is_empty() { &output } else { &errors }).into_owned();
    Err(failed(doing, program, &format!("{status}\n{}", last_lines(&text))))
}

pub(crate) fn failed(doing: &str, program: &'static str, said: &str) -> BootError {
    BootError::ProgramFailed { program, doing: doing.into(), said: said.trim_end().into() }
}

/// The last lines of `text`.
pub(crate) fn last_lines(text: &str) -> String {
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(LAST_LINES)..].join("\n")
}
