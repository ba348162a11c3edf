//! `cargo xtask ci`: what a change must pass, in the order in which faults are cheapest to find.

use std::process::{Command, Stdio};
use std::time::Instant;

use crate::shell::{Outcome, root, run};
use crate::{lints, macos, setup, zfs};

/// Runs every part and stops at the first that fails. The last part is `cargo xtask test`, whose last line counts the tests.
pub(crate) fn run_all() -> Outcome {
    type Part = (&'static str, fn() -> Outcome);
    let parts: [Part; 6] = [
        ("setup", setup::everything),
        ("fmt", lints::fmt),
        ("lint", lints::clippy),
        ("deny", lints::deny),
        ("check-macos", macos::check),
        // Four minutes where it was never done: the modules are compiled.
        ("zfs", zfs::make_if_possible),
    ];
    for (name, part) in parts {
        timed(name, part)?;
    }
    let lines = readme_commands()?;
    let typed =
        |line: &String| run(Command::new("sh").args(["-c", line]).current_dir(root()).stdin(Stdio::null()));
    let (last, before) = lines.split_last().expect("the README has commands");
    for line in before {
        timed(line, || typed(line))?;
    }
    // Nothing is said after it: the runner's summary stays the last line.
    typed(last)
}

fn timed(name: &str, part: impl FnOnce() -> Outcome) -> Outcome {
    let begun = Instant::now();
    part().map_err(|problem| format!("{name}: {problem}"))?;
    eprintln!("== {name}: {} s", begun.elapsed().as_secs());
    Ok(())
}

/// The lines of the README's first fenced block: what a newcomer types.
fn readme_commands() -> Outcome<Vec<String>> {
    let path = root().join("README.md");
    let readme =
        std::fs::read_to_string(&path).map_err(|error| format!("cannot read {}: {error}", path.display()))?;
    let commands = first_block(&readme);
    if commands.is_empty() { Err("README.md has no fenced block".to_owned()) } else { Ok(commands) }
}

fn first_block(markdown: &str) -> Vec<String> {
    let inside = markdown.lines().skip_while(|line| !line.starts_with("```")).skip(1);
    inside.take_while(|line| !line.starts_with("```")).map(str::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_readme_begins_with_the_two_commands_and_the_last_is_the_tests() {
        let commands = readme_commands().unwrap();
        assert_eq!(commands.len(), 2, "{commands:?}");
        assert_eq!(commands[1], "cargo xtask test");
    }

    #[test]
    fn only_the_first_block_is_taken() {
        assert_eq!(first_block("a\n```\none\ntwo\n```\nb\n```\nthree\n```\n"), ["one", "two"]);
    }
}
