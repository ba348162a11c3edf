//! `kiln run`.

use std::io::{self, IsTerminal};

use kiln_contract::{ExitStatus, RemoveOptions, RuntimeBackend, StartMode};

use super::create::create;
use super::workload::WorkloadArgs;
use crate::context::{self, Context};
use crate::error::{CliError, Result};
use crate::exit::Exit;
use crate::output::Out;

/// Make an instance of an image and run a command in it
#[derive(Debug, clap::Args)]
#[command(
    disable_help_flag = true,
    override_usage = "kiln run [OPTIONS] <IMAGE> [COMMAND]...",
    after_help = "Flags after the image belong to the command. The exit code is the command's own; 125 if Kiln failed,\n126 if the command cannot be executed, 127 if it is not there.\n\nExamples:\n  kiln run docker.io/library/alpine echo hi\n  kiln run -it --rm alpine\n  kiln run -d --name web -p 8080:80 -v ./site:/usr/share/nginx/html:ro nginx"
)]
pub(crate) struct Args {
    /// Run in the background and print the id
    #[arg(short, long)]
    detach: bool,
    /// Show no progress: of a pull, and of what the first machine of its kind needs
    #[arg(short, long)]
    quiet: bool,
    /// Whether signals are passed on to a workload without a terminal; else they end this command only
    #[arg(
        long, value_name = "BOOL", default_value_t = true, num_args = 0..=1, require_equals = true,
        default_missing_value = "true", action = clap::ArgAction::Set
    )]
    sig_proxy: bool,
    /// Print help
    #[arg(long, action = clap::ArgAction::HelpShort)]
    help: Option<bool>,
    #[command(flatten)]
    workload: WorkloadArgs,
}

impl Args {
    pub(crate) fn run(self, context: &Context) -> Result<Exit> {
        if !self.detach {
            need_terminal(self.workload.tty, self.workload.interactive)?;
        }
        let instances = context.instances()?.quietly(self.quiet);
        let record = create(context, &instances, &self.workload, self.quiet, true)?;
        let mode = if self.detach {
            StartMode::Detached
        } else {
            StartMode::Foreground {
                stdio: context::stdio()?,
                detach_keys: self.workload.detach_keys,
                signal_proxy: self.sig_proxy,
            }
        };
        match instances.start(&record.id, mode) {
            Ok(Some(status)) => Ok(ended(&status)),
            Ok(None) if self.detach => {
                let mut out = Out::new();
                out.line(record.id.as_str())?;
                out.flush()?;
                Ok(Exit::SUCCESS)
            }
            Ok(None) => Ok(Exit::SUCCESS),
            Err(error) => {
                if self.workload.rm {
                    // What could not be started is not worth keeping; the failure to start is what is told.
                    let _ = instances.remove(&record.id, RemoveOptions { force: true, volumes: true });
                }
                Err(error.into())
            }
        }
    }
}

pub(super) fn ended(status: &ExitStatus) -> Exit {
    Exit::of_workload(status)
}

/// `-it` with something else than a terminal on standard input: the keys would go nowhere.
pub(super) fn need_terminal(tty: bool, interactive: bool) -> Result<()> {
    if tty && interactive && !io::stdin().is_terminal() {
        return Err(CliError::usage("--tty with --interactive needs a terminal on standard input")
            .with_hint("leave out --tty to feed it from a pipe or a file"));
    }
    Ok(())
}
