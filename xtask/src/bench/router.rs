//! How long the router of views takes to find out whose view a caller sees.

use std::path::Path;
use std::process::Command;

use super::measures::Images;
use super::table::Row;
use crate::shell::{Outcome, capture, root};

/// The goal, in nanoseconds.
const GOAL: u64 = 2000;

/// A caller that was seen before, eight generations below the process to which the view was shown.
pub(crate) fn resolution(_: &Path, _: &Images) -> Outcome<Vec<Row>> {
    let mut command = Command::new(env!("CARGO"));
    command.current_dir(root());
    command.args(["run", "--quiet", "--release", "--package", "kiln-view", "--example", "resolution"]);
    let said = capture(&mut command)?;
    let nanoseconds: u64 =
        said.trim().parse().map_err(|_| format!("the example `resolution` printed `{said}`"))?;
    Ok(vec![Row {
        measure: "router: the view of a caller, warm".to_owned(),
        kiln: microseconds(nanoseconds),
        peers: String::new(),
        result: microseconds(nanoseconds),
        goal: format!("≤ {}", microseconds(GOAL)),
        met: nanoseconds <= GOAL,
    }])
}

fn microseconds(nanoseconds: u64) -> String {
    format!("{}.{:02} µs", nanoseconds / 1000, nanoseconds % 1000 / 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn microseconds_have_two_digits_after_the_point() {
        assert_eq!([2000, 345, 1999, 7].map(microseconds), ["2.00 µs", "0.34 µs", "1.99 µs", "0.00 µs"]);
    }
}
