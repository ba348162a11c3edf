//! `kiln`: run Linux workloads in isolation, from one content-addressed store, with one command.
//!
//! The command line is taken in three stages. [`cli`] and `commands/` *parse* it; `resolve/` turns flags and the
//! image's settings into a specification; then the command *runs* on the rooms below. [`exit`] is the one place that
//! prints errors and decides exit codes. Nothing is opened, started or entered that a command does not need: the
//! whole of a `kiln run` is to take a few milliseconds.

#![cfg_attr(
    not(target_os = "linux"),
    allow(dead_code, reason = "views and what `system doctor` looks at are in Linux leaves")
)]

mod backends;
mod cli;
mod commands;
mod complete;
mod context;
mod copy;
mod doctor;
mod error;
mod exit;
mod output;
mod progress;
#[cfg(test)]
mod reference;
mod resolve;
mod suggest;
mod usage;

use std::process::ExitCode;

fn main() -> ExitCode {
    cli::main()
}
