//! `kiln exec`.

use std::path::PathBuf;

use clap_complete::engine::ArgValueCompleter;
use kiln_contract::{ExecSpec, RuntimeBackend};

use super::run::{ended, need_terminal};
use crate::complete;
use crate::context::{self, Context};
use crate::error::Result;
use crate::exit::Exit;
use crate::resolve::{Host, exec_environment};

/// Run a further command in a running instance
///
/// The exit code is the command's own; 125 if Kiln failed, 126 if the command cannot be executed, 127 if it is not there.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Its name or id
    #[arg(add = ArgValueCompleter::new(complete::instances))]
    instance: String,
    /// The command and its arguments
    #[arg(required = true, value_name = "COMMAND", trailing_var_arg = true, allow_hyphen_values = true)]
    command: Vec<String>,
    /// Do not wait for it
    #[arg(short, long)]
    detach: bool,
    /// Keep standard input open
    #[arg(short, long)]
    interactive: bool,
    /// Give it a terminal
    #[arg(short, long)]
    tty: bool,
    /// Set a variable; without a value, as it is on the host
    #[arg(short, long, value_name = "NAME[=VALUE]")]
    env: Vec<String>,
    /// Set the variables in this file, one a line
    #[arg(long, value_name = "FILE")]
    env_file: Vec<PathBuf>,
    /// Run as this user, by name or number
    #[arg(short, long, value_name = "USER[:GROUP]")]
    user: Option<String>,
    /// The working directory
    #[arg(short, long, value_name = "DIR")]
    workdir: Option<String>,
    /// Give it all capabilities
    #[arg(long)]
    privileged: bool,
    /// The key sequence that detaches from it; empty: none
    #[arg(long, value_name = "KEYS", default_value = super::DETACH_KEYS)]
    detach_keys: String,
}

impl Args {
    pub(crate) fn run(self, context: &Context) -> Result<Exit> {
        if !self.detach {
            need_terminal(self.tty, self.interactive)?;
        }
        let env = Host::real(|host| exec_environment(&self.env_file, &self.env, host))?;
        let instances = context.instances()?;
        let record = context.instance(&instances, &self.instance)?;
        let spec = ExecSpec {
            args: self.command,
            env,
            cwd: self.workdir,
            user: self.user,
            tty: self.tty,
            stdin: self.interactive,
            privileged: self.privileged,
            detach: self.detach,
            detach_keys: self.detach_keys,
        };
        let status = instances.exec(&record.id, &spec, context::stdio()?)?;
        Ok(status.map_or(Exit::SUCCESS, |status| ended(&status)))
    }
}
