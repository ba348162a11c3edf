//! Builds the program that becomes the workload in every container ([`launcher/main.rs`](launcher/main.rs)), which the
//! library carries: a static program without any library.

use std::env;
use std::path::PathBuf;
use std::process::Command;

fn main() {
    println!("cargo::rerun-if-changed=launcher");
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-env-changed=RUSTC_LINKER");
    let variable = |name: &str| env::var(name).unwrap_or_else(|error| panic!("{name}: {error}"));
    if variable("CARGO_CFG_TARGET_OS") != "linux" {
        return;
    }
    let output = PathBuf::from(variable("OUT_DIR")).join("launcher");
    let mut command = Command::new(variable("RUSTC"));
    command.args(["--edition", "2024", "--crate-name", "launcher", "--crate-type", "bin", "-D", "warnings"]);
    command.args(["--target", &variable("TARGET")]);
    for option in [
        "opt-level=s",
        "lto=fat",
        "panic=abort",
        "strip=symbols",
        // At a fixed address: there is nobody to relocate it.
        "relocation-model=static",
        "target-feature=+crt-static",
        "link-arg=-nostartfiles",
        "link-arg=-nostdlib",
        // It is copied at every start: one page less for a note and alignment each.
        "link-arg=-Wl,--build-id=none,-z,noseparate-code,-z,norelro",
    ] {
        command.args(["-C", option]);
    }
    if variable("CARGO_CFG_TARGET_ENV") == "musl" {
        // It would bring the start files of its own C library along.
        command.args(["-C", "link-self-contained=no"]);
    }
    if let Ok(linker) = env::var("RUSTC_LINKER") {
        command.arg("-C").arg(format!("linker={linker}"));
    }
    command.arg("launcher/main.rs").arg("-o").arg(&output);
    let status = command.status().unwrap_or_else(|error| panic!("cannot run {command:?}: {error}"));
    assert!(status.success(), "cannot build the launcher: {status}");
}
