//! `cargo xtask check-macos`: everything that is not a Linux leaf type-checks for Apple silicon, on Linux.
//!
//! A compiler from Debian that comes with the source of its library (`rustc-web`, `rust-web-src`) builds `std` for
//! the target's type check; C in build scripts is compiled by `zig cc`, which knows macOS's headers, from PyPI. Nothing
//! is linked, so this proves types and names, not behaviour.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::setup;
use crate::shell::{Outcome, cargo, run, target};

const TARGET: &str = "aarch64-apple-darwin";

/// Everything but the rooms that are Linux leaves as a whole (`container`, `guest`), and the tools of this repository itself.
const PACKAGES: &[&str] = &[
    "kiln-contract",
    "kiln-accounts",
    "kiln-erofs",
    "kiln-link",
    "kiln-store",
    "kiln-registry",
    "kiln-view",
    "kiln-ssh",
    "kiln-usernet",
    "kiln-net",
    "kiln-share",
    "kiln-vmm",
    "kiln-boot",
    "kiln-disk",
    "kiln-instance",
    "kiln-machine",
    "kiln",
];

/// Type-checks [`PACKAGES`] in a target directory of its own.
pub(crate) fn check() -> Outcome {
    setup::for_macos()?;
    let directory = target().join("macos");
    let tools = directory.join("zig");
    fs::create_dir_all(&tools).map_err(|error| format!("cannot make {}: {error}", tools.display()))?;
    let (cc, ar) = c_compiler(&tools)?;
    let mut command = cargo();
    command
        .args(["check", "-Zbuild-std", "--target", TARGET, "--target-dir"])
        .arg(&directory)
        .env("RUSTC", "/usr/bin/rustc")
        .env("RUSTC_BOOTSTRAP", "1")
        .env(format!("CC_{}", TARGET.replace('-', "_")), cc)
        .env(format!("AR_{}", TARGET.replace('-', "_")), ar);
    for package in PACKAGES {
        command.args(["--package", package]);
    }
    run(&mut command)
}

/// Installs zig below `tools` if it is not there, and writes the two wrappers that stand for `cc` and `ar`.
fn c_compiler(tools: &Path) -> Outcome<(PathBuf, PathBuf)> {
    let modules = tools.join("python");
    if !modules.join("ziglang").exists() {
        let pip = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--target"];
        run(Command::new("/usr/bin/python3").args(pip).arg(&modules).arg("ziglang"))?;
    }
    let zig = format!("PYTHONPATH='{}' exec /usr/bin/python3 -m ziglang", modules.display());
    // Build scripts speak to Apple's clang; zig takes the target in its own words.
    let cc = format!(
        "#!/bin/bash\narguments=()\nwhile (($#)); do\n  case $1 in\n    -arch) shift ;;\n    \
         --target=* | -mmacosx-version-min=* | -mmacos-version-min=*) ;;\n    *) arguments+=(\"$1\") ;;\n  esac\n  shift\ndone\n\
         {zig} cc -target aarch64-macos.14.0 \"${{arguments[@]}}\"\n"
    );
    let ar = format!("#!/bin/bash\n{zig} ar \"$@\"\n");
    Ok((script(&tools.join("cc"), &cc)?, script(&tools.join("ar"), &ar)?))
}

fn script(path: &Path, text: &str) -> Outcome<PathBuf> {
    let problem = |error: std::io::Error| format!("cannot write {}: {error}", path.display());
    // Unchanged files keep their times, so that cargo does not compile C again.
    if fs::read_to_string(path).ok().as_deref() != Some(text) {
        fs::write(path, text).map_err(problem)?;
        fs::set_permissions(path, fs::Permissions::from_mode(0o755)).map_err(problem)?;
    }
    Ok(path.to_owned())
}
