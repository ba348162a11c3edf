// Not part of the guest: how it is built, for the build script of what carries it, and for tests that boot it.
//
// Cargo is called again, with a profile and a target directory of the guest's own, so that nothing of how the outer build is
// made (debug or release, lints, coverage) makes another guest.

use std::env;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Builds the static program for `architecture`, in the workspace at `root`, below the target directory `target`.
pub(crate) fn compile(root: &Path, target: &Path, architecture: &str) -> io::Result<PathBuf> {
    let triple = format!("{architecture}-unknown-linux-gnu");
    let directory = target.join("guest-build");
    let mut cargo = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo
        .current_dir(root)
        .args(["build", "--quiet", "--profile", "guest", "--package", "kiln-guest", "--target", &triple])
        .arg("--target-dir")
        .arg(&directory)
        .env("CARGO_ENCODED_RUSTFLAGS", "-Ctarget-feature=+crt-static\u{1f}-Crelocation-model=static");
    // What cargo tells build scripts is of the outer build.
    for name in [
        "RUSTC_WRAPPER",
        "RUSTC_WORKSPACE_WRAPPER",
        "RUSTFLAGS",
        "CARGO_BUILD_TARGET",
        "CARGO_MAKEFLAGS",
        "CLIPPY_ARGS",
    ] {
        cargo.env_remove(name);
    }
    let status = cargo.status()?;
    let program = directory.join(&triple).join("guest/kiln-guest");
    if status.success() && program.is_file() {
        Ok(program)
    } else {
        Err(io::Error::other(format!("the guest cannot be built: {status}")))
    }
}

/// The outer build's target directory, which cargo marks; `inside` is something in it.
pub(crate) fn target_directory(inside: &Path) -> PathBuf {
    let marked = inside.ancestors().find(|directory| directory.join("CACHEDIR.TAG").exists());
    marked.unwrap_or(inside).to_owned()
}
