//! How long operations show what they do: bars where standard error is a terminal, plain lines elsewhere.

use std::collections::HashMap;
use std::io::{IsTerminal, Write};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use kiln_contract::{ByteSize, Progress, Silent, Step, StepId};

/// What shows progress: nothing with `--quiet`, bars on a terminal, lines otherwise.
pub(crate) fn new(quiet: bool) -> Box<dyn Progress> {
    if quiet {
        Box::new(Silent)
    } else if std::io::stderr().is_terminal() && std::env::var_os("TERM").is_none_or(|term| term != "dumb") {
        Box::new(Bars::default())
    } else {
        Box::new(Lines::default())
    }
}

/// A bar for each step: name, verb, bytes, rate.
#[derive(Debug, Default)]
struct Bars {
    all: MultiProgress,
    bars: Mutex<HashMap<u64, ProgressBar>>,
    next: AtomicU64,
}

const KNOWN: &str = "{prefix:>12} {msg:<8} [{bar:28}] {binary_bytes:>10}/{binary_total_bytes:<10} {binary_bytes_per_sec:>12} {eta:>4}";
const UNKNOWN: &str = "{prefix:>12} {msg:<8} {spinner} {binary_bytes:>10} {binary_bytes_per_sec:>12}";
/// Of what has no bytes, or none yet.
const WORKING: &str = "{prefix:>12} {msg:<8} {spinner} {elapsed:>4}";
const ENDED: &str = "{prefix:>12} {msg}";

fn style(template: &str) -> ProgressStyle {
    // The templates are constants; the default style is right if one of them has a slip.
    ProgressStyle::with_template(template)
        .unwrap_or_else(|_| ProgressStyle::default_bar())
        .progress_chars("=> ")
}

impl Bars {
    fn bar(&self, step: StepId) -> Option<ProgressBar> {
        self.bars.lock().unwrap_or_else(PoisonError::into_inner).get(&step.0).cloned()
    }
}

impl Progress for Bars {
    fn begin(&self, step: Step) -> StepId {
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let bar = match step.total {
            Some(total) => ProgressBar::new(total).with_style(style(KNOWN)),
            None => ProgressBar::no_length().with_style(style(WORKING)),
        };
        let bar = self.all.add(bar.with_prefix(step.name).with_message(step.verb));
        bar.enable_steady_tick(Duration::from_millis(200));
        self.bars.lock().unwrap_or_else(PoisonError::into_inner).insert(id, bar);
        StepId(id)
    }

    fn advance(&self, step: StepId, bytes: i64) {
        if let Some(bar) = self.bar(step) {
            if bar.length().is_none() && bar.position() == 0 {
                bar.set_style(style(UNKNOWN));
            }
            match u64::try_from(bytes) {
                Ok(forward) => bar.inc(forward),
                Err(_) => bar.set_position(bar.position().saturating_sub(bytes.unsigned_abs())),
            }
        }
    }

    fn end(&self, step: StepId, outcome: &str) {
        let bar = self.bars.lock().unwrap_or_else(PoisonError::into_inner).remove(&step.0);
        if let Some(bar) = bar {
            let size = ByteSize(bar.position());
            bar.set_style(style(ENDED));
            bar.finish_with_message(if size.bytes() > 0 {
                format!("{outcome} {size}")
            } else {
                outcome.to_owned()
            });
        }
    }

    fn note(&self, text: &str) {
        // A note that cannot be shown is no reason to stop.
        let _ = self.all.println(text);
    }
}

/// A line when a step ends, with its size.
#[derive(Debug, Default)]
struct Lines {
    steps: Mutex<HashMap<u64, (Step, i64)>>,
    next: AtomicU64,
}

impl Progress for Lines {
    fn begin(&self, step: Step) -> StepId {
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        self.steps.lock().unwrap_or_else(PoisonError::into_inner).insert(id, (step, 0));
        StepId(id)
    }

    fn advance(&self, step: StepId, bytes: i64) {
        if let Some((_, done)) = self.steps.lock().unwrap_or_else(PoisonError::into_inner).get_mut(&step.0) {
            *done += bytes;
        }
    }

    fn end(&self, step: StepId, outcome: &str) {
        let ended = self.steps.lock().unwrap_or_else(PoisonError::into_inner).remove(&step.0);
        if let Some((step, done)) = ended {
            let size = match u64::try_from(done) {
                Ok(done) if done > 0 => format!(" ({})", ByteSize(done)),
                _ => String::new(),
            };
            self.note(&format!("{}: {} {outcome}{size}", step.name, step.verb));
        }
    }

    fn note(&self, text: &str) {
        // A standard error that is closed is no reason to stop.
        let _ = writeln!(std::io::stderr().lock(), "{text}");
    }
}
