//! The reference of the command line, `docs/reference/cli.md`: made from the definition, and checked in, so that a
//! flag cannot change unseen.

use std::fs;
use std::path::Path;

use clap::{Command, CommandFactory};

use crate::cli::Cli;

fn reference() -> String {
    let mut text = String::from(
        "# Command line reference\n\n\
         Made from the program itself. To bring it up to date: `UPDATE=1 cargo test -p kiln reference`.\n\n\
         Standard output carries results only; progress, notes and errors go to standard error. Exit codes: 0 it worked,\n\
         1 it did not, 2 the command line makes no sense. `run`, `create` and `exec` give the workload's own code, and\n\
         125 if Kiln failed, 126 if the command cannot be executed, 127 if it is not there, 128 + n after signal n.\n",
    );
    let mut root = Cli::command().term_width(100);
    root.build();
    describe(&mut text, &root, "kiln");
    text
}

fn describe(text: &mut String, command: &Command, path: &str) {
    let help = command.clone().bin_name(path).render_help().to_string();
    let long = command.get_long_about().map(ToString::to_string);
    text.push_str(&format!("\n## `{path}`\n\n"));
    if let Some(long) = long {
        text.push_str(&format!("{}\n\n", long.trim()));
    }
    let lines: Vec<&str> = help.lines().map(str::trim_end).collect();
    text.push_str(&format!("```text\n{}\n```\n", lines.join("\n").trim()));
    for below in command.get_subcommands().filter(|command| !command.is_hide_set()) {
        describe(text, below, &format!("{path} {}", below.get_name()));
    }
}

#[test]
fn the_reference_in_the_docs_is_that_of_the_program() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/reference/cli.md");
    let now = reference();
    if std::env::var_os("UPDATE").is_some() {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, &now).unwrap();
    }
    let kept = fs::read_to_string(&path).unwrap_or_default();
    let differs = kept.lines().zip(now.lines()).find(|(kept, now)| kept != now);
    assert!(
        kept == now,
        "docs/reference/cli.md is not what the program says (first difference: {differs:?}); if the change is meant: \
         UPDATE=1 cargo test -p kiln reference"
    );
}

#[test]
fn every_command_and_every_flag_says_what_it_is() {
    fn check(command: &Command, path: &str) {
        assert!(command.get_about().is_some(), "{path} has no help");
        for argument in command.get_arguments() {
            assert!(argument.get_help().is_some(), "{path}: {} has no help", argument.get_id());
        }
        for below in command.get_subcommands() {
            check(below, &format!("{path} {}", below.get_name()));
        }
    }
    let mut root = Cli::command();
    root.build();
    check(&root, "kiln");
}
