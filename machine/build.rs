//! Builds the guest: a static Linux program that every machine runs as its first process. It is part of this crate, so that a
//! plain `cargo build` gives a program that can make machines.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};

use sha2::Digest as _;

#[path = "../guest/compile.rs"]
mod guest;

fn main() {
    println!("cargo:rustc-check-cfg=cfg(kiln_no_guest)");
    println!("cargo:rerun-if-env-changed=KILN_GUEST");
    if let Some(ready) = env::var_os("KILN_GUEST") {
        println!("cargo:rerun-if-changed={}", Path::new(&ready).display());
        return embed(Path::new(&ready));
    }
    // Where it is now: a build directory may have been moved here together with this script, compiled.
    let here = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").unwrap_or_default());
    let root = here.parent().map(Path::to_owned).unwrap_or_default();
    for used in ["guest", "link", "ssh", "accounts", "usernet", "Cargo.lock", "Cargo.toml"] {
        if root.join(used).exists() {
            println!("cargo:rerun-if-changed={}", root.join(used).display());
        }
    }
    if env::var("CARGO_CFG_TARGET_OS").as_deref() != Ok("linux") {
        // A type check for another system: its guest comes from a Linux build, through KILN_GUEST.
        println!("cargo:rustc-cfg=kiln_no_guest");
        return;
    }
    let architecture = env::var("CARGO_CFG_TARGET_ARCH").unwrap_or_default();
    let out = PathBuf::from(env::var_os("OUT_DIR").unwrap_or_default());
    match guest::compile(&root, &guest::target_directory(&out), &architecture) {
        Ok(program) => embed(&program),
        Err(error) => panic!("{error}"),
    }
}

fn embed(program: &Path) {
    let bytes =
        fs::read(program).unwrap_or_else(|error| panic!("cannot read {}: {error}", program.display()));
    println!("cargo:rustc-env=KILN_GUEST_PROGRAM={}", program.display());
    let digest: String = sha2::Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect();
    println!("cargo:rustc-env=KILN_GUEST_DIGEST={digest}");
}
