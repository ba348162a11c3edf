//! Taking times and making medians of them.

use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::shell::{Outcome, capture};

/// One contender of a measure: how to take one sample of it, in seconds.
pub(crate) type Contender<'a> = Box<dyn FnMut() -> Outcome<f64> + 'a>;

static ONLY_ONCE: AtomicBool = AtomicBool::new(false);

/// Whether every sample is taken only once.
pub(crate) fn choose_rounds(only_once: bool) {
    ONLY_ONCE.store(only_once, Ordering::Relaxed);
}

/// How many rounds there are where `usual` are due.
pub(crate) fn rounds(usual: usize) -> usize {
    if ONLY_ONCE.load(Ordering::Relaxed) { 1 } else { usual }
}

/// Between two samples: what the one before has left running, such as a daemon that tidies up, is not the next one's.
const PAUSE: Duration = Duration::from_millis(50);

/// The median of each contender over `usual` rounds, in which they take turns. One round before is not counted.
pub(crate) fn medians<const N: usize>(usual: usize, mut contenders: [Contender<'_>; N]) -> Outcome<[f64; N]> {
    let rounds = rounds(usual);
    let mut samples: [Vec<f64>; N] = std::array::from_fn(|_| Vec::with_capacity(rounds));
    for round in 0..=rounds {
        for (contender, samples) in contenders.iter_mut().zip(&mut samples) {
            std::thread::sleep(PAUSE);
            let sample = contender()?;
            if round > 0 {
                samples.push(sample);
            }
        }
    }
    Ok(samples.map(|samples| median(&samples)))
}

/// The middle one of `samples`, or the mean of the middle two; not a number if there is none.
pub(crate) fn median(samples: &[f64]) -> f64 {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    match (sorted.len(), sorted.len() / 2) {
        (0, _) => f64::NAN,
        (length, middle) if length % 2 == 1 => sorted[middle],
        (_, middle) => f64::midpoint(sorted[middle - 1], sorted[middle]),
    }
}

/// How long `action` takes, in seconds.
pub(crate) fn timed(action: impl FnOnce() -> Outcome) -> Outcome<f64> {
    let begun = Instant::now();
    action()?;
    Ok(begun.elapsed().as_secs_f64())
}

/// Runs `command` to its end with its output thrown away. It must succeed; where it does not, it is run once more so
/// that the error can say why.
pub(crate) fn quietly(command: &mut Command) -> Outcome {
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    match command.status() {
        Ok(status) if status.success() => Ok(()),
        _ => capture(command.stdout(Stdio::piped()).stderr(Stdio::piped())).map(drop),
    }
}

/// Starts all `commands` at once and waits for the last of them; how long that took, in seconds. All must succeed.
pub(crate) fn at_once(commands: Vec<Command>) -> Outcome<f64> {
    let begun = Instant::now();
    let mut running = Vec::with_capacity(commands.len());
    for mut command in commands {
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        running.push(command.spawn().map_err(|error| format!("cannot run {command:?}: {error}"))?);
    }
    let mut failed = None;
    for child in running {
        let output = child.wait_with_output().map_err(|error| format!("cannot wait: {error}"))?;
        if !output.status.success() {
            failed = Some(String::from_utf8_lossy(&output.stderr).into_owned());
        }
    }
    match failed {
        None => Ok(begun.elapsed().as_secs_f64()),
        Some(problem) => Err(format!("one of several started at once failed: {problem}")),
    }
}

/// Lets what was written reach the disk, so that one contender does not pay for another's.
pub(crate) fn settle() {
    rustix::fs::sync();
    std::thread::sleep(Duration::from_millis(100));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_the_middle_and_the_first_round_is_not_counted() {
        assert!((median(&[9.0, 1.0, 2.0]) - 2.0).abs() < 1e-9);
        assert!((median(&[4.0, 1.0]) - 2.5).abs() < 1e-9);
        assert!(median(&[]).is_nan());
        let mut first = vec![100.0, 1.0, 3.0, 2.0].into_iter();
        let [found] = medians(3, [Box::new(move || Ok(first.next().unwrap()))]).unwrap();
        assert!((found - 2.0).abs() < 1e-9);
    }
}
