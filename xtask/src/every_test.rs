//! `cargo xtask test`: every test, and a last line that counts them.

use std::collections::BTreeSet;
use std::io::{BufRead as _, BufReader, Write as _};
use std::process::Stdio;
use std::time::Instant;

use crate::setup;
use crate::shell::{Outcome, cargo, shown};

/// What the runner's `test result:` lines add up to.
#[derive(Debug, Default, PartialEq, Eq)]
struct Tally {
    passed: u64,
    failed: u64,
    ignored: u64,
}

impl Tally {
    /// Adds a line `test result: ok. 3 passed; 0 failed; 1 ignored; …`; other lines change nothing.
    fn add(&mut self, line: &str) {
        let Some((_, counts)) = line.strip_prefix("test result: ").and_then(|rest| rest.split_once(". "))
        else {
            return;
        };
        for count in counts.split("; ") {
            let Some((number, what)) = count.split_once(' ') else { continue };
            let Ok(number) = number.parse::<u64>() else { continue };
            match what {
                "passed" => self.passed += number,
                "failed" => self.failed += number,
                "ignored" => self.ignored += number,
                _ => {}
            }
        }
    }
}

/// Runs `cargo test` over the workspace (or with `arguments` instead of that), shows which tests were skipped, and ends
/// with one line `N passed, N failed, N skipped`.
pub(crate) fn run(arguments: &[String]) -> Outcome {
    setup::for_tests()?;
    let begun = Instant::now();
    let skipped_list =
        tempfile::NamedTempFile::new().map_err(|error| format!("cannot make a temporary file: {error}"))?;
    let mut command = cargo();
    command.arg("test");
    if arguments.is_empty() {
        command.args(["--workspace", "--no-fail-fast"]);
    }
    command.args(arguments).env("KILN_SKIPPED", skipped_list.path()).stdout(Stdio::piped());
    eprintln!("$ {}", shown(&command));
    let mut runner = command.spawn().map_err(|error| format!("cannot run {}: {error}", shown(&command)))?;
    let mut tally = Tally::default();
    let output = BufReader::new(runner.stdout.take().expect("a piped standard output"));
    for line in output.split(b'\n').map_while(Result::ok) {
        let line = String::from_utf8_lossy(&line);
        tally.add(&line);
        println!("{line}");
    }
    let status = runner.wait().map_err(|error| format!("cannot wait for cargo: {error}"))?;

    let skipped = std::fs::read_to_string(skipped_list.path()).unwrap_or_default();
    let skipped: BTreeSet<&str> = skipped.lines().collect();
    if !skipped.is_empty() {
        println!("\nskipped or not run, because this host lacks something:");
        skipped.iter().for_each(|line| println!("  {}", line.trim_start_matches("skipped: ")));
    }
    println!("\ntests took {} s", begun.elapsed().as_secs());
    println!("{}", summary(&tally, &skipped));
    let _ = std::io::stdout().flush();
    if status.success() { Ok(()) } else { Err(format!("{} failed: {status}", shown(&command))) }
}

/// A test that skips itself ends well as far as the runner knows; here it counts as skipped, once however many things it lacks.
/// One that is not run is ignored by the runner too.
fn summary(tally: &Tally, skipped: &BTreeSet<&str>) -> String {
    let tests: BTreeSet<Vec<&str>> = skipped
        .iter()
        .map(|line| line.splitn(4, ": ").take(3).collect::<Vec<_>>())
        .filter(|line| line[0] == "skipped")
        .collect();
    let skips = tests.len() as u64;
    let passed = tally.passed.saturating_sub(skips);
    format!("{passed} passed, {} failed, {} skipped", tally.failed, tally.ignored + skips)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn result_lines_add_up_and_a_skipped_test_does_not_count_as_passed() {
        let mut tally = Tally::default();
        for line in [
            "running 3 tests",
            "test result: ok. 3 passed; 0 failed; 1 ignored; 0 measured; 2 filtered out; finished in 0.55s",
            "test result: FAILED. 10 passed; 2 failed; 0 ignored; 0 measured; 0 filtered out; finished in 1.00s",
        ] {
            tally.add(line);
        }
        assert_eq!(tally, Tally { passed: 13, failed: 2, ignored: 1 });
        let skipped = BTreeSet::from([
            "skipped: store: a::b: skopeo is not installed",
            "skipped: store: a::b: needs root",
            "skipped: net: a::b: needs root",
            "not run: vmm: c::d: needs KVM",
        ]);
        assert_eq!(summary(&tally, &skipped), "11 passed, 2 failed, 3 skipped");
    }
}
