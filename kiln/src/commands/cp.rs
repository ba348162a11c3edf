//! `kiln cp`.

use std::path::{Path, PathBuf};

use clap_complete::engine::ArgValueCompleter;

use crate::complete;
use crate::context::Context;
use crate::copy;
use crate::error::{CliError, Result};
use crate::exit::Exit;

/// Copy files between an instance and the host
///
/// One of the two is INSTANCE:PATH, the other a path of the host, or `-` for a tar archive on standard input or output.
/// As in Docker: a directory is copied into a destination that exists and becomes one that does not; `DIR/.` is what is
/// in it. Copies belong to root in the instance and to you on the host, unless --archive keeps their owners.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// What to copy
    #[arg(value_name = "SOURCE", add = ArgValueCompleter::new(complete::copy_sources))]
    source: String,
    /// Where to
    #[arg(value_name = "DESTINATION", add = ArgValueCompleter::new(complete::copy_sources))]
    destination: String,
    /// Keep owners
    #[arg(short, long)]
    archive: bool,
    /// Copy what a symbolic link points to
    #[arg(short = 'L', long)]
    follow_link: bool,
    /// Accepted for Docker's sake: nothing is shown anyway
    #[arg(short, long, hide = true)]
    quiet: bool,
}

/// One side of a copy.
#[derive(Debug, PartialEq, Eq)]
enum Side<'a> {
    Instance(&'a str, &'a str),
    Host(&'a Path),
    Stream,
}

/// `name:path` is an instance; what begins with `/` or `.` never is, so that a file with a colon can be named.
fn side(text: &str) -> Side<'_> {
    match text.split_once(':') {
        _ if text == "-" => Side::Stream,
        Some((name, path)) if !text.starts_with(['/', '.']) && !name.is_empty() => Side::Instance(name, path),
        _ => Side::Host(Path::new(text)),
    }
}

impl Args {
    pub(crate) fn run(self, context: &Context) -> Result<Exit> {
        let (source, destination) = (side(&self.source), side(&self.destination));
        if !matches!(
            (&source, &destination),
            (Side::Instance(..), Side::Host(_) | Side::Stream)
                | (Side::Host(_) | Side::Stream, Side::Instance(..))
        ) {
            return Err(CliError::usage(
                "one of SOURCE and DESTINATION is INSTANCE:PATH, and the other is not",
            )
            .with_hint("for example: kiln cp web:/etc/hosts . — a file of the host with a colon is ./a:b"));
        }
        let instances = context.instances()?;
        let instance = |name| context.instance(&instances, name).map(|record| record.id);
        let options = copy::Options { owners: self.archive, follow: self.follow_link };
        match (source, destination) {
            (Side::Instance(name, path), Side::Host(to)) => {
                copy::to_host(&instances, &instance(name)?, &inside(path), to, options)?;
            }
            (Side::Instance(name, path), _) => {
                copy::to_stream(&instances, &instance(name)?, &inside(path), options)?;
            }
            (Side::Host(from), Side::Instance(name, path)) => {
                copy::from_host(&instances, &instance(name)?, from, &inside(path), options)?;
            }
            (_, Side::Instance(name, path)) => {
                copy::from_stream(&instances, &instance(name)?, &inside(path))?;
            }
            (Side::Host(_) | Side::Stream, _) => {}
        }
        Ok(Exit::SUCCESS)
    }
}

/// Relative paths in an instance begin at its root.
fn inside(path: &str) -> PathBuf {
    if path.starts_with('/') { path.into() } else { format!("/{path}").into() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sides_are_told_apart_as_in_docker() {
        let table = [
            ("web:/etc", Side::Instance("web", "/etc")),
            ("web:etc", Side::Instance("web", "etc")),
            ("-", Side::Stream),
            ("./a:b", Side::Host(Path::new("./a:b"))),
            ("/a:b", Side::Host(Path::new("/a:b"))),
            ("plain", Side::Host(Path::new("plain"))),
            (":x", Side::Host(Path::new(":x"))),
        ];
        for (text, expected) in table {
            assert_eq!(side(text), expected, "{text}");
        }
    }
}
