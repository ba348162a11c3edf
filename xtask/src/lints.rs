//! Formatting, clippy and cargo-deny.

use crate::shell::{Outcome, cargo, run};

/// The formatting is as `rustfmt.toml` says.
pub(crate) fn fmt() -> Outcome {
    run(cargo().args(["fmt", "--all", "--check"]))
}

/// No warning of the compiler or of clippy in anything, tests and benches too.
pub(crate) fn clippy() -> Outcome {
    run(cargo().args(["clippy", "--workspace", "--all-targets", "--", "-D", "warnings"]))
}

/// Licences, bans and sources of the dependencies.
pub(crate) fn deny() -> Outcome {
    if kiln_fixtures::find_program("cargo-deny").is_none() {
        eprintln!("skipped: cargo-deny is not installed (cargo install --locked cargo-deny)");
        return Ok(());
    }
    run(cargo().args(["deny", "--all-features", "check", "licenses", "bans", "sources"]))
}
