//! `kiln ssh`.

use std::os::unix::process::CommandExt as _;
use std::process::{Command, Stdio};

use clap_complete::engine::ArgValueCompleter;

use super::ssh_config::{LoginArgs, options};
use crate::complete;
use crate::context::Context;
use crate::error::{CliError, Result};
use crate::exit::{self, Exit};

/// Log in to a running machine, or run a command in it, over SSH
///
/// Runs this host's ssh, with the keys that Kiln has made: nothing is asked, and no image needs an SSH server. The command is
/// read by the user's shell, as with ssh. The exit code is the command's own, or 255 if there is no connection.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Examples:\n  kiln ssh dev\n  kiln ssh app@dev -- make -C /src\n  kiln ssh -L 8080:localhost:80 dev"
)]
pub(crate) struct Args {
    /// Its name or id, with the user in front if it is not that of the image
    #[arg(value_name = "[USER@]MACHINE", add = ArgValueCompleter::new(complete::instances))]
    machine: String,
    /// The command
    #[arg(value_name = "COMMAND", trailing_var_arg = true, allow_hyphen_values = true)]
    command: Vec<String>,
    #[command(flatten)]
    login: LoginArgs,
    /// Give a command a terminal
    #[arg(short, long)]
    tty: bool,
    /// Run no command: only forward ports
    #[arg(short = 'N', long)]
    no_command: bool,
    /// Forward a port of this host to what the machine reaches
    #[arg(short = 'L', long, value_name = "[ADDRESS:]PORT:HOST:PORT")]
    local: Vec<String>,
    /// Forward a port of the machine to what this host reaches
    #[arg(short = 'R', long, value_name = "[ADDRESS:]PORT:HOST:PORT")]
    remote: Vec<String>,
}

impl Args {
    pub(crate) fn run(mut self, context: &Context) -> Result<Exit> {
        let machine = match self.machine.rsplit_once('@') {
            Some((user, machine)) => {
                self.login.user.get_or_insert_with(|| user.to_owned());
                machine.to_owned()
            }
            None => self.machine.clone(),
        };
        let mut ssh = Command::new("ssh");
        for option in self.told(context, &machine)? {
            ssh.arg("-o").arg(option);
        }
        let flags = [(self.tty, "-t"), (self.no_command, "-N")];
        ssh.args(flags.iter().filter(|(given, _)| *given).map(|(_, flag)| flag));
        for (flag, forwards) in [("-L", &self.local), ("-R", &self.remote)] {
            ssh.args(forwards.iter().flat_map(|forward| [flag, forward]));
        }
        ssh.arg("--").arg(&machine).args(&self.command);
        let error = ssh.exec();
        if error.kind() == std::io::ErrorKind::NotFound {
            let missing = CliError::failed("cannot log in: this host has no `ssh`");
            return Err(missing.with_hint("install it: on Debian and Ubuntu, the package is openssh-client"));
        }
        Err(CliError::file("cannot run `ssh`", error))
    }

    /// What ssh is told, a line each.
    fn told(&self, context: &Context, machine: &str) -> Result<Vec<String>> {
        if rustix::process::geteuid().is_root() {
            let instances = context.instances()?;
            let record = context.instance(&instances, machine)?;
            let machines = instances.machines();
            machines.ready_for_ssh(&record.id)?;
            let told = options(context, &instances, &record, &self.login)?;
            return Ok(told.into_iter().map(|(name, value)| format!("{name} {value}")).collect());
        }
        // An ordinary user's instances are seen from a user namespace, in which ssh would take him for root.
        let program = kiln_instance::process::program()
            .map_err(|error| CliError::file("cannot ask for the machine's configuration", error))?;
        let mut asked = Command::new(program);
        asked.args(["ssh-config", machine]);
        if let Some(user) = &self.login.user {
            asked.args(["--login", user]);
        }
        if let Some(key) = &self.login.ssh_key {
            asked.arg("--ssh-key").arg(key);
        }
        let answer = asked
            .stderr(Stdio::inherit())
            .output()
            .map_err(|error| CliError::file("cannot ask for the machine's configuration", error))?;
        if !answer.status.success() {
            exit::print_line("note", "the machine could not be asked for");
            return Err(CliError::Reported);
        }
        let text = String::from_utf8_lossy(&answer.stdout).into_owned();
        Ok(text.lines().filter_map(|line| line.strip_prefix("    ")).map(str::to_owned).collect())
    }
}
