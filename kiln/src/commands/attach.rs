//! `kiln attach`.

use clap_complete::engine::ArgValueCompleter;
use kiln_contract::{AttachEnd, AttachOptions, RuntimeBackend};

use super::run::ended;
use crate::complete;
use crate::context::{self, Context};
use crate::error::Result;
use crate::exit::Exit;

/// Connect to the standard streams of a running instance
///
/// The exit code is the workload's own, or 0 after detaching.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Its name or id
    #[arg(add = ArgValueCompleter::new(complete::instances))]
    instance: String,
    /// Do not send standard input
    #[arg(long)]
    no_stdin: bool,
    /// Whether signals are passed on to a workload without a terminal
    #[arg(
        long, value_name = "BOOL", default_value_t = true, num_args = 0..=1, require_equals = true,
        default_missing_value = "true", action = clap::ArgAction::Set
    )]
    sig_proxy: bool,
    /// The key sequence that detaches from it; empty: none
    #[arg(long, value_name = "KEYS", default_value = super::DETACH_KEYS)]
    detach_keys: String,
}

impl Args {
    pub(crate) fn run(self, context: &Context) -> Result<Exit> {
        let instances = context.instances()?;
        let record = context.instance(&instances, &self.instance)?;
        let options = AttachOptions {
            stdio: context::stdio()?,
            stdin: !self.no_stdin,
            detach_keys: self.detach_keys,
            signal_proxy: self.sig_proxy,
        };
        Ok(match instances.attach(&record.id, options)? {
            AttachEnd::Exited(status) => ended(&status),
            AttachEnd::Detached => Exit::SUCCESS,
        })
    }
}
