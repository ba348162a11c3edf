//! Where this repository is, and how the tasks run other programs.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// What a task gives: an error is a sentence for the developer.
pub(crate) type Outcome<T = ()> = Result<T, String>;

/// The root of the workspace.
pub(crate) fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("xtask is a folder of the workspace")
}

/// Cargo's target directory: this program is in one of its profiles' folders.
pub(crate) fn target() -> PathBuf {
    let program = std::env::current_exe().expect("the path of this program");
    program.ancestors().nth(2).expect("target/<profile>/xtask").to_owned()
}

/// Cargo, in the root of the workspace.
pub(crate) fn cargo() -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(root()).stdin(Stdio::null());
    // Fuzz targets are only type-checked here: libFuzzer need not be compiled, nor a C++ compiler be there.
    command.env("CUSTOM_LIBFUZZER_PATH", "/libfuzzer-is-not-linked.a");
    command
}

/// Shows `command` and runs it to its end, with our own standard output and error.
pub(crate) fn run(command: &mut Command) -> Outcome {
    eprintln!("$ {}", shown(command));
    let status = command.status().map_err(|error| format!("cannot run {}: {error}", shown(command)))?;
    if status.success() { Ok(()) } else { Err(format!("{} failed: {status}", shown(command))) }
}

/// Runs `command` quietly to its end and gives its standard output; on failure the error holds all that it printed.
pub(crate) fn capture(command: &mut Command) -> Outcome<String> {
    let output = command
        .stdin(Stdio::null())
        .output()
        .map_err(|error| format!("cannot run {}: {error}", shown(command)))?;
    let stdout = String::from_utf8_lossy(&output.stdout);
    if output.status.success() {
        return Ok(stdout.into_owned());
    }
    let stderr = String::from_utf8_lossy(&output.stderr);
    Err(format!("{} failed: {}\n{stdout}{stderr}", shown(command), output.status))
}

/// The command as one would type it.
pub(crate) fn shown(command: &Command) -> String {
    let program = Path::new(command.get_program()).file_name().unwrap_or(command.get_program());
    let words = std::iter::once(program).chain(command.get_args());
    let quoted = words.map(|word| {
        let word = word.to_string_lossy();
        let plain = |c: char| c.is_ascii_alphanumeric() || "-_=+:,./@%^~".contains(c);
        if !word.is_empty() && word.chars().all(plain) {
            word.into_owned()
        } else {
            format!("'{}'", word.replace('\'', r"'\''"))
        }
    });
    quoted.collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shown_command_can_be_pasted_into_a_shell() {
        let mut command = Command::new("/usr/bin/echo");
        command.args(["a", "b c", "it's", ""]);
        assert_eq!(shown(&command), r"echo a 'b c' 'it'\''s' ''");
        let printed = capture(Command::new("sh").args(["-c", &shown(&command)])).unwrap();
        assert_eq!(printed, "a b c it's \n");
    }

    #[test]
    fn a_failing_command_is_an_error_that_holds_what_it_printed() {
        let problem = capture(Command::new("sh").args(["-c", "echo out; echo err >&2; exit 3"])).unwrap_err();
        for part in ["out", "err", "exit status: 3"] {
            assert!(problem.contains(part), "{problem}");
        }
    }
}
