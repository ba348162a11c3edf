//! `kiln console`.

use std::io::IsTerminal as _;

use clap_complete::engine::ArgValueCompleter;
use kiln_contract::{AttachEnd, AttachOptions};

use crate::complete;
use crate::context::{self, Context};
use crate::error::Result;
use crate::exit::{self, Exit};

/// Connect to the serial console of a running machine
///
/// Shows the last of what its kernel and its init have said, then what they say, and sends what is typed: where a login runs
/// on the console (as systemd starts one), one can log in. Ends with the machine, or by the keys that detach.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Its name or id
    #[arg(value_name = "MACHINE", add = ArgValueCompleter::new(complete::instances))]
    machine: String,
    /// Only look
    #[arg(long)]
    no_stdin: bool,
    /// The key sequence that detaches from it; empty: none
    #[arg(long, value_name = "KEYS", default_value = super::DETACH_KEYS)]
    detach_keys: String,
}

impl Args {
    pub(crate) fn run(self, context: &Context) -> Result<Exit> {
        let instances = context.instances()?;
        let record = context.instance(&instances, &self.machine)?;
        let machines = instances.machines();
        if std::io::stdin().is_terminal() && !self.no_stdin {
            if !machines.console_takes_input(&record.id) {
                exit::print_line("note", "this machine's console takes no input");
            }
            if !self.detach_keys.is_empty() {
                exit::print_line("note", &format!("{} leaves the console", self.detach_keys));
            }
        }
        let options = AttachOptions {
            stdio: context::stdio()?,
            stdin: !self.no_stdin,
            detach_keys: self.detach_keys,
            signal_proxy: false,
        };
        match machines.console(&record.id, options)? {
            AttachEnd::Exited(_) | AttachEnd::Detached => Ok(Exit::SUCCESS),
        }
    }
}
