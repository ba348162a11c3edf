//! `cargo xtask`: all that is done to this repository besides building it.

// This is a program for developers: what it says goes to the terminal.
#![allow(clippy::print_stdout, clippy::print_stderr)]

mod bench;
mod ci;
mod demo;
mod disk_template;
mod every_test;
mod kiln;
mod lints;
mod macos;
mod setup;
mod shell;
mod zfs;

use std::process::ExitCode;

const HELP: &str = "\
cargo xtask <task>

  setup         install what the tests, the demo and the benches need (Debian and Ubuntu; elsewhere: list it)
  demo          Kiln's main job from end to end, with what each step shows and how long it took
  test [ARGS]   every test; ARGS go to `cargo test`
  bench         Kiln beside its peers, into docs/benchmarks.md (--quick: once each and not in release, only to see that it runs;
                containers, machines, views: only these tables)
  fmt           check the formatting
  lint          clippy, with warnings denied
  deny          licences, bans and sources of all dependencies (where cargo-deny is installed)
  check-macos   type-check for aarch64-apple-darwin
  disk-template make the empty file system of machines' disks anew (disk/src/ext4.zst)
  zfs           compile OpenZFS for the kernel that tests boot, into their cache: tests of disks on ZFS run where that was done
  ci            all of it that a change must pass, as .ci/run does
";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let (task, rest) = match arguments.split_first() {
        Some((task, rest)) => (task.as_str(), rest),
        None => ("help", &[] as &[String]),
    };
    let outcome = match task {
        "setup" => setup::everything(),
        "fmt" => lints::fmt(),
        "lint" => lints::clippy(),
        "deny" => lints::deny(),
        "check-macos" => macos::check(),
        "test" => every_test::run(rest),
        "bench" => bench::run(rest),
        "demo" => demo::run(),
        "disk-template" => disk_template::write(),
        "zfs" => zfs::make(),
        "ci" => ci::run_all(),
        "help" | "--help" | "-h" => {
            print!("{HELP}");
            Ok(())
        }
        other => {
            eprintln!("xtask: no task {other:?}\n\n{HELP}");
            return ExitCode::from(2);
        }
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(problem) => {
            eprintln!("xtask {task}: {problem}");
            ExitCode::FAILURE
        }
    }
}
