//! `kiln completion`.

use clap::{Command, ValueEnum};
use clap_complete::env::Shells;

use crate::error::{CliError, Result};
use crate::exit::Exit;
use crate::output::Out;

/// Print the script that makes a shell complete commands, flags and names
///
/// Bash: `source <(kiln completion bash)` in ~/.bashrc. Zsh: the same in ~/.zshrc. Fish:
/// `kiln completion fish > ~/.config/fish/completions/kiln.fish`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The shell
    shell: Shell,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Shell {
    Bash,
    Zsh,
    Fish,
    Elvish,
}

impl Args {
    pub(crate) fn run(&self, command: &mut Command) -> Result<Exit> {
        let name = match self.shell {
            Shell::Bash => "bash",
            Shell::Zsh => "zsh",
            Shell::Fish => "fish",
            Shell::Elvish => "elvish",
        };
        let shells = Shells::builtins();
        let shell =
            shells.completer(name).ok_or_else(|| CliError::failed(format!("{name} is not supported")))?;
        let bin = command.get_name().to_owned();
        // By its name, not by today's path: the script outlives this installation.
        let mut script = Vec::new();
        shell
            .write_registration("COMPLETE", &bin, &bin, &bin, &mut script)
            .map_err(|error| CliError::file(format!("cannot write the {name} script"), error))?;
        let mut out = Out::new();
        out.bytes(&script)?;
        out.flush()?;
        Ok(Exit::SUCCESS)
    }
}
