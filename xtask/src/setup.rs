//! Installs what the tests, the demo and the benches need from Debian or Ubuntu; elsewhere lists it.

use std::process::Command;

use kiln_fixtures::find_program;

use crate::shell::{Outcome, run};

/// A program, the Debian package that it comes from, and what it is here for.
struct Needed {
    program: &'static str,
    package: &'static str,
    reason: &'static str,
}

const fn needed(program: &'static str, package: &'static str, reason: &'static str) -> Needed {
    Needed { program, package, reason }
}

/// What the tests and the demo use.
const TESTS: &[Needed] = &[
    needed("cc", "gcc", "C parts of dependencies"),
    needed("skopeo", "skopeo", "an independent reader and writer of images"),
    needed("umoci", "umoci", "an independent writer of OCI layouts"),
    needed("docker-registry", "docker-registry", "a real registry"),
    needed("htpasswd", "apache2-utils", "accounts of that registry"),
    needed("openssl", "openssl", "certificates of that registry"),
    needed("runc", "runc", "an external OCI runtime"),
    needed("crun", "crun", "an external OCI runtime"),
    needed("debootstrap", "debootstrap", "a real root filesystem"),
    needed("busybox", "busybox-static", "a small root filesystem"),
    needed("apt-get", "apt", "downloads a kernel"),
    needed("apt-cache", "apt", "finds the newest kernel"),
    needed("qemu-system-x86_64", "qemu-system-x86", "boots kernels"),
    needed("gcc", "gcc", "builds kernels"),
    needed("make", "make", "builds kernels"),
    needed("ld", "binutils", "builds kernels"),
    needed("flex", "flex", "builds kernels"),
    needed("bison", "bison", "builds kernels"),
    needed("bc", "bc", "builds kernels"),
    needed("perl", "perl", "builds kernels"),
    needed("/usr/include/gelf.h", "libelf-dev", "builds kernels"),
    needed("fsck.erofs", "erofs-utils", "checks the trees that we write"),
    needed("dump.erofs", "erofs-utils", "checks the trees that we write"),
    needed("mkfs.erofs", "erofs-utils", "an independent writer of trees"),
    needed("bsdtar", "libarchive-tools", "an independent writer of tars"),
    needed("python3", "python3", "an independent writer of tars, and the C compiler of the macOS check"),
    needed("unshare", "util-linux", "namespaces that stand for other hosts and users"),
    needed("mkfs.btrfs", "btrfs-progs", "a filesystem with reflinks"),
    needed("btrfs", "btrfs-progs", "counts what is shared"),
    needed("mkfs.xfs", "xfsprogs", "a filesystem with reflinks"),
    needed("mke2fs", "e2fsprogs", "makes the template of machines' disks"),
    needed("filefrag", "e2fsprogs", "looks at what files share"),
    needed("e2fsck", "e2fsprogs", "checks machines' disks"),
    needed("newuidmap", "uidmap", "rootless containers"),
    needed("fusermount3", "fuse3", "rootless containers"),
    needed("pasta", "passt", "rootless networks"),
    needed("ip", "iproute2", "looks at networks"),
    needed("nft", "nftables", "looks at firewall rules"),
    needed("setfattr", "attr", "extended attributes of test files"),
    needed("getfattr", "attr", "extended attributes of test files"),
    needed("setcap", "libcap2-bin", "capabilities of test files"),
    needed("strace", "strace", "counts system calls"),
    needed("jq", "jq", "reads JSON as users do"),
    needed("curl", "curl", "fetches from published ports"),
    needed("git", "git", "as in the Debian image"),
    needed("ssh", "openssh-client", "logs in to machines"),
    needed("scp", "openssh-client", "copies files to and from machines"),
    needed("sftp", "openssh-client", "lists files of machines"),
    needed("ssh-keygen", "openssh-client", "an independent maker of keys"),
    needed("rsync", "rsync", "copies trees to and from machines"),
];

/// What only the benches use: the peers.
const BENCHES: &[Needed] = &[
    needed("podman", "podman", "a peer for pulls"),
    needed("conmon", "conmon", "a peer for memory"),
    needed("dockerd", "docker.io", "a peer for starts of machines"),
    needed("fuse-overlayfs", "fuse-overlayfs", "storage of rootless podman"),
];

/// The compiler of the macOS check. The distribution keeps an older one beside the newest, which lists that are a little old do
/// not show.
const COMPILER: &str = "/usr/bin/rustc";

/// Major and minor version of [`COMPILER`]; `None` if it is not there.
fn compiler_version() -> Option<(u32, u32)> {
    let output = Command::new(COMPILER).arg("--version").output().ok()?;
    version_in(&String::from_utf8_lossy(&output.stdout))
}

/// The version that the workspace needs.
fn our_version() -> (u32, u32) {
    version_in(concat!("rustc ", env!("CARGO_PKG_RUST_VERSION"))).unwrap_or_default()
}

/// Reads `rustc 1.95.0 (…)`.
fn version_in(text: &str) -> Option<(u32, u32)> {
    let mut parts = text.split_whitespace().nth(1)?.split('.');
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

/// What only the macOS check uses: a compiler with the source of its library, and pip for a C compiler.
const MACOS: &[Needed] = &[
    needed(COMPILER, "rustc-web", "a compiler whose library's source is packaged"),
    needed("/usr/lib/rustlib/src/rust/library/Cargo.lock", "rust-web-src", "that source"),
    needed("pip3", "python3-pip", "installs the C compiler that knows macOS"),
];

/// `cargo xtask setup`: all of it.
pub(crate) fn everything() -> Outcome {
    install("the tests, the demo, the benches and the macOS check", &[TESTS, BENCHES, MACOS])
}

/// What `cargo xtask test` and `demo` need.
pub(crate) fn for_tests() -> Outcome {
    install("the tests and the demo", &[TESTS])
}

/// What `cargo xtask bench` needs.
pub(crate) fn for_benches() -> Outcome {
    install("the benches", &[TESTS, BENCHES])
}

/// What `cargo xtask check-macos` needs.
pub(crate) fn for_macos() -> Outcome {
    install("the macOS check", &[MACOS])
}

fn is_there(needed: &Needed) -> bool {
    if needed.program == COMPILER {
        return compiler_version().is_some_and(|version| version >= our_version());
    }
    if needed.program.starts_with('/') {
        return std::path::Path::new(needed.program).exists();
    }
    find_program(needed.program).is_some()
}

fn install(purpose: &str, groups: &[&[Needed]]) -> Outcome {
    let missing: Vec<&Needed> = groups.iter().copied().flatten().filter(|needed| !is_there(needed)).collect();
    if missing.is_empty() {
        eprintln!("all that {purpose} need is installed");
        return Ok(());
    }
    let packages: Vec<&str> = missing.iter().map(|needed| needed.package).collect();
    let apt = find_program("apt-get").filter(|_| rustix::process::geteuid().is_root());
    let Some(apt) = apt else {
        eprintln!("not installed, but needed by {purpose}:");
        for needed in &missing {
            eprintln!("  {:<16} {} (Debian package {})", needed.program, needed.reason, needed.package);
        }
        eprintln!(
            "on Debian and Ubuntu: sudo apt-get install --no-install-recommends {}",
            packages.join(" ")
        );
        return Ok(());
    };
    // Installing the registry's package starts a server of its own on port 5000; ours are started by the tests.
    let registry_is_new = packages.contains(&"docker-registry");
    let mut install = Command::new(&apt);
    install
        .env("DEBIAN_FRONTEND", "noninteractive")
        .args(["install", "-y", "--no-install-recommends"])
        .args(&packages);
    // Lists may be absent or too old: then it fails, or what it installs is too old.
    let installed = run(&mut install);
    if installed.is_err() || missing.iter().any(|needed| !is_there(needed)) {
        run(Command::new(&apt).arg("update"))?;
        run(&mut install)?;
    }
    if let Some(systemctl) = find_program("systemctl").filter(|_| registry_is_new) {
        // Fails where systemd does not run; then nothing was started either.
        let _ = Command::new(systemctl).args(["disable", "--now", "docker-registry"]).output();
    }
    match missing.iter().find(|needed| !is_there(needed)) {
        None => Ok(()),
        Some(needed) => {
            Err(format!("{} is still missing after installing {}", needed.program, needed.package))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    /// Every literal in `require("…")` in the workspace's Rust sources.
    fn required_by_tests() -> BTreeSet<String> {
        let listing = crate::shell::capture(
            Command::new("git")
                .args(["grep", "-hoE", r#"require\("[^"]+"\)"#, "--", "*.rs"])
                .current_dir(crate::shell::root()),
        );
        let listing = listing.expect("the sources can be searched");
        let names = listing.lines().filter_map(|line| line.split('"').nth(1));
        names.filter(|name| name.is_ascii()).map(str::to_owned).collect()
    }

    #[test]
    fn versions_are_read_and_compared_as_numbers() {
        assert_eq!(
            version_in("rustc 1.96.0 (ac68faa20 2026-05-25) (built from a source tarball)"),
            Some((1, 96))
        );
        assert!(version_in("rustc 1.100.0").unwrap() > (1, 95));
        assert_eq!(version_in("what"), None);
        assert!(our_version() >= (1, 95));
    }

    #[test]
    fn setup_installs_every_program_that_a_test_requires() {
        let known: BTreeSet<&str> = TESTS.iter().map(|needed| needed.program).collect();
        // Parts of every Debian system.
        let always = BTreeSet::from(["useradd", "mount", "tar", "sh", "ldd"]);
        let required = required_by_tests();
        assert!(required.contains("skopeo"), "the search found {required:?}");
        let unknown: Vec<_> = required
            .iter()
            .filter(|name| !known.contains(name.as_str()) && !always.contains(name.as_str()))
            .collect();
        assert!(unknown.is_empty(), "not in setup's table: {unknown:?}");
    }
}
