//! Builds the guest: a static Linux program that every machine runs as its first process. It is part of this crate, so that a
//! plain `cargo build` gives a program that can make machines.
//!
//! Cargo is called again, with a profile and a target directory of the guest's own, so that nothing of how the outer build is
//! made (debug or release, lints, coverage) makes another guest.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

fn main() {
    println!("cargo:rustc-check-cfg=cfg(kiln_no_guest)");
    println!("cargo:rerun-if-env-changed=KILN_GUEST");
    if let Some(ready) = env::var_os("KILN_GUEST") {
        println!("cargo:rerun-if-changed={}", Path::new(&ready).display());
        return embed(Path::new(&ready));
    }
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().map(Path::to_owned).unwrap_or_default();
    for used in ["guest", "link", "accounts", "usernet", "Cargo.lock", "Cargo.toml"] {
        if root.join(used).exists() {
            println!("cargo:rerun-if-changed={}", root.join(used).display());
        }
    }
    let architecture = env::var("CARGO_CFG_TARGET_ARCH").unwrap_or_default();
    if env::var("CARGO_CFG_TARGET_OS").as_deref() != Ok("linux") {
        // A type check for another system: its guest comes from a Linux build, through KILN_GUEST.
        println!("cargo:rustc-cfg=kiln_no_guest");
        return;
    }
    let target = format!("{architecture}-unknown-linux-gnu");
    let directory = target_directory().join("guest-build");
    let mut cargo = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo
        .current_dir(&root)
        .args(["build", "--quiet", "--profile", "guest", "--package", "kiln-guest", "--target", &target])
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
    let status = cargo.status();
    assert!(matches!(&status, Ok(status) if status.success()), "the guest cannot be built: {status:?}");
    embed(&directory.join(&target).join("guest/kiln-guest"));
}

fn embed(program: &Path) {
    assert!(program.is_file(), "{} is not there", program.display());
    println!("cargo:rustc-env=KILN_GUEST_PROGRAM={}", program.display());
}

/// The outer build's target directory: cargo marks it.
fn target_directory() -> PathBuf {
    let out = PathBuf::from(env::var_os("OUT_DIR").unwrap_or_default());
    let marked = out.ancestors().find(|directory| directory.join("CACHEDIR.TAG").exists());
    marked.unwrap_or(&out).to_owned()
}
