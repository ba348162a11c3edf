//! `kiln login`.

use std::io::{self, BufRead, IsTerminal, Read, Write};

use kiln_registry::Registry;

use super::RegistryArgs;
use crate::context::Context;
use crate::error::{CliError, Result};
use crate::exit::Exit;

/// Check a user's password with a registry, and keep it for pulls and pushes
///
/// It is kept where podman and skopeo look too (containers-auth.json), or by the credential helper named there.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The registry
    #[arg(default_value = "docker.io")]
    registry: String,
    /// The user; asked for otherwise
    #[arg(short, long)]
    username: Option<String>,
    /// The password; asked for otherwise. Others can see it in the list of processes: prefer --password-stdin
    #[arg(short, long, conflicts_with = "password_stdin")]
    password: Option<String>,
    /// Read the password from standard input
    #[arg(long)]
    password_stdin: bool,
    #[command(flatten)]
    options: RegistryArgs,
}

impl Args {
    pub(crate) fn run(self, _context: &Context) -> Result<Exit> {
        if self.password_stdin && self.username.is_none() {
            return Err(CliError::usage("--password-stdin needs --username too"));
        }
        let username = self.username.map_or_else(|| ask("Username", true), Ok)?;
        let password = match self.password {
            Some(password) => password,
            None if self.password_stdin => {
                let mut text = String::new();
                let read = io::stdin().read_to_string(&mut text);
                read.map_err(|error| CliError::file("cannot read the password from standard input", error))?;
                text.trim_end_matches(['\r', '\n']).to_owned()
            }
            None => ask("Password", false)?,
        };
        let kept = Registry::new(self.options.config())?.login(&self.registry, &username, &password)?;
        // The password is in there as base64: who reads the file has it.
        eprint(&format!("logged in to {}; kept in {}", self.registry, kept.display()));
        Ok(Exit::SUCCESS)
    }
}

pub(super) fn eprint(text: &str) {
    // A standard error that is closed is no reason to fail.
    let _ = writeln!(io::stderr().lock(), "{text}");
}

/// Asks on the terminal; what must not be seen is not echoed.
fn ask(what: &str, echo: bool) -> Result<String> {
    let failed =
        |error: io::Error| CliError::file(format!("cannot ask for the {}", what.to_lowercase()), error);
    if !io::stdin().is_terminal() {
        return Err(CliError::usage(format!(
            "no {} was given, and standard input is no terminal",
            what.to_lowercase()
        ))
        .with_hint("give --username NAME and --password-stdin"));
    }
    let mut stderr = io::stderr().lock();
    write!(stderr, "{what}: ").and_then(|()| stderr.flush()).map_err(failed)?;
    let mut line = String::new();
    let stdin = io::stdin();
    if echo {
        stdin.lock().read_line(&mut line).map_err(failed)?;
    } else {
        use rustix::termios::{LocalModes, OptionalActions, tcgetattr, tcsetattr};
        let before = tcgetattr(&stdin).map_err(|error| failed(error.into()))?;
        let mut silent = before.clone();
        silent.local_modes.remove(LocalModes::ECHO);
        tcsetattr(&stdin, OptionalActions::Flush, &silent).map_err(|error| failed(error.into()))?;
        let read = stdin.lock().read_line(&mut line);
        tcsetattr(&stdin, OptionalActions::Flush, &before).map_err(|error| failed(error.into()))?;
        read.map_err(failed)?;
        let _ = writeln!(stderr);
    }
    Ok(line.trim_end_matches(['\r', '\n']).to_owned())
}
