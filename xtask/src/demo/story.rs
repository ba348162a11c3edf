//! A demo as it is told: chapters of numbered steps, each with what it gave and how long it took.

use std::io::Write as _;
use std::time::{Duration, Instant};

use crate::shell::Outcome;

/// Numbers the steps, and shows what each gave and how long it took.
#[derive(Default)]
pub(super) struct Story {
    steps: usize,
}

impl Story {
    /// How many there were.
    pub(super) fn steps(&self) -> usize {
        self.steps
    }

    pub(super) fn chapter(&self, title: &str) {
        println!("\n== {title}\n");
    }

    /// Runs a step, which gives its value and what there is to show.
    pub(super) fn step<T>(
        &mut self,
        what: &str,
        action: impl FnOnce() -> Outcome<(T, String)>,
    ) -> Outcome<T> {
        self.steps += 1;
        print!("{:>3}. {what}", self.steps);
        let _ = std::io::stdout().flush();
        let begun = Instant::now();
        let outcome = action();
        let took = begun.elapsed();
        match outcome {
            Ok((value, shown)) => {
                println!("  [{}]", duration(took));
                shown.lines().take(8).for_each(|line| println!("       {line}"));
                Ok(value)
            }
            Err(problem) => {
                println!("  [failed]");
                Err(format!("step {}, {what}: {problem}", self.steps))
            }
        }
    }
}

fn duration(took: Duration) -> String {
    let milliseconds = took.as_secs_f64() * 1e3;
    if milliseconds < 1000.0 {
        format!("{milliseconds:.0} ms")
    } else {
        format!("{:.1} s", milliseconds / 1e3)
    }
}
