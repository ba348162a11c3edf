//! Formatting, clippy and cargo-deny.

use crate::shell::{Outcome, cargo, run};

/// The formatting is as `rustfmt.toml` says.
pub(crate) fn fmt() -> Outcome {
    run(cargo().args(["fmt", "--all", "--check"]))
}

/// No warning of the compiler or of clippy in anything, tests, benches and fuzz targets too.
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

#[cfg(test)]
mod tests {
    use crate::shell::root;

    #[test]
    fn every_fuzz_target_is_of_the_workspace_and_so_is_checked() {
        let manifest = std::fs::read_to_string(root().join("Cargo.toml")).unwrap();
        let rooms =
            std::fs::read_dir(root()).unwrap().map(|room| room.unwrap().file_name().into_string().unwrap());
        let fuzzed: Vec<_> =
            rooms.filter(|room| root().join(room).join("fuzz/Cargo.toml").exists()).collect();
        assert!(fuzzed.len() >= 3, "{fuzzed:?}");
        for room in fuzzed {
            assert!(
                manifest.contains(&format!("    \"{room}/fuzz\",\n")),
                "{room}/fuzz is not checked by anything"
            );
        }
    }
}
