//! What the kernel can do: trees, overlays, FUSE, KVM.

use std::fs;
use std::io;
use std::path::Path;

use super::Finding;

pub(super) fn examine(root: bool) -> Vec<Finding> {
    let filesystems = fs::read_to_string("/proc/filesystems").unwrap_or_default();
    let release = rustix::system::uname().release().to_string_lossy().into_owned();
    let modules = |name: &str| has_module(Path::new("/lib/modules"), &release, name);
    let has = |name: &str| supports(&filesystems, name);
    let known = |name: &str| {
        if has(name) {
            Some("it is in the kernel")
        } else {
            modules(name).then_some("its module can be loaded")
        }
    };
    let mut findings = vec![version(&release)];
    findings.push(match (root, known("erofs")) {
        _ if number(&release) < DIRECT => {
            Finding::ok("erofs", "containers do without it: this kernel cannot mount a tree from its file")
        }
        (_, Some(how)) => Finding::ok("erofs", format!("{how}: roots of containers are mounted as they are")),
        (true, None) => Finding::fail(
            "erofs",
            "the kernel has no EROFS, which roots of containers are",
            "use a kernel with CONFIG_EROFS_FS (Linux 6.12 or later for files without a loop device)",
        ),
        (false, None) => {
            Finding::ok("erofs", "the kernel has none; ordinary users' containers do without it")
        }
    });
    findings.push(match known("overlay") {
        Some(how) => Finding::ok("overlayfs", how),
        None => Finding::fail(
            "overlayfs",
            "the kernel has none, and containers write to one",
            "use a kernel with CONFIG_OVERLAY_FS, or load the module: modprobe overlay",
        ),
    });
    let served = !root || number(&release) < DIRECT;
    if !served {
        findings.push(data_only());
    }
    findings.push(fuse(served));
    findings.push(kvm());
    findings
}

/// The first Linux that mounts a tree from its file.
const DIRECT: (u32, u32) = (6, 12);
/// The first Linux on which tests have run containers.
const TESTED: (u32, u32) = (6, 1);

/// The two numbers that a release begins with.
fn number(release: &str) -> (u32, u32) {
    let number = |part: Option<&str>| part.and_then(|part| part.parse::<u32>().ok()).unwrap_or(0);
    let mut parts = release.split(['.', '-']);
    (number(parts.next()), number(parts.next()))
}

fn version(release: &str) -> Finding {
    if number(release) >= DIRECT {
        Finding::ok("kernel", format!("Linux {release}"))
    } else if number(release) >= TESTED {
        Finding::warn(
            "kernel",
            format!(
                "Linux {release} cannot mount a tree from its file: roots of containers are served through FUSE"
            ),
            "Linux 6.12 or later mounts them, and they are faster",
        )
    } else {
        Finding::warn(
            "kernel",
            format!("Linux {release} is older than Kiln is tested with"),
            "use Linux 6.12 or later",
        )
    }
}

/// A line of `/proc/filesystems` is `[nodev]<tab>name`.
fn supports(filesystems: &str, name: &str) -> bool {
    filesystems.lines().any(|line| line.split_whitespace().last() == Some(name))
}

fn has_module(modules: &Path, release: &str, name: &str) -> bool {
    let index = fs::read_to_string(modules.join(release).join("modules.dep")).unwrap_or_default();
    index.lines().any(|line| {
        let file = line.split(':').next().and_then(|path| path.rsplit('/').next()).unwrap_or_default();
        file.split('.').next() == Some(name)
    })
}

/// Whether an overlay takes data-only lowers (Linux 6.5): the option is given to a configuration that is never mounted.
fn data_only() -> Finding {
    use rustix::mount::{FsOpenFlags, fsconfig_set_string, fsopen};
    let what = "overlay data-only lowers";
    let try_option = || -> rustix::io::Result<()> {
        let overlay = fsopen("overlay", FsOpenFlags::FSOPEN_CLOEXEC)?;
        fsconfig_set_string(&overlay, "metacopy", "on")?;
        fsconfig_set_string(&overlay, "lowerdir+", "/proc")?;
        fsconfig_set_string(&overlay, "datadir+", "/proc")
    };
    match try_option() {
        Ok(()) => {
            Finding::ok(what, "an overlay takes them: a root is there at once, however large the image")
        }
        Err(rustix::io::Errno::PERM) => {
            Finding::warn(what, "cannot be tried without CAP_SYS_ADMIN", "run as root with all capabilities")
        }
        Err(error) => Finding::fail(
            what,
            format!("an overlay refuses them: {error}"),
            "use Linux 6.8 or later with CONFIG_OVERLAY_FS",
        ),
    }
}

fn fuse(serves_roots: bool) -> Finding {
    match fs::OpenOptions::new().read(true).write(true).open("/dev/fuse") {
        Ok(_) => Finding::ok("fuse", "/dev/fuse can be used"),
        Err(error) if !serves_roots => Finding::ok(
            "fuse",
            format!("/dev/fuse cannot be used ({error}); root's containers do without it"),
        ),
        Err(error) => {
            let advice = if error.kind() == io::ErrorKind::NotFound {
                "load the module: modprobe fuse"
            } else {
                "make /dev/fuse writable for you (mode 0666)"
            };
            Finding::fail(
                "fuse",
                format!("/dev/fuse cannot be used: {error}; roots of containers are served through it here"),
                advice,
            )
        }
    }
}

/// `/dev/kvm` alone proves nothing: on x86-64 the processor must show `vmx` or `svm`.
fn kvm() -> Finding {
    let processor = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let virtual_machines = !cfg!(target_arch = "x86_64")
        || processor.split_whitespace().any(|flag| flag == "vmx" || flag == "svm");
    match fs::OpenOptions::new().read(true).write(true).open("/dev/kvm") {
        Ok(_) if virtual_machines => Finding::ok("kvm", "/dev/kvm can be used"),
        Ok(_) => Finding::warn(
            "kvm",
            "/dev/kvm is there, but the processor shows neither vmx nor svm",
            "containers do not need it",
        ),
        Err(error) => {
            Finding::warn("kvm", format!("/dev/kvm cannot be used: {error}"), "containers do not need it")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::Verdict;
    use super::*;

    #[test]
    fn filesystems_are_found_by_their_whole_name() {
        let text = "nodev\tproc\nnodev\toverlay\n\text4\n\terofs\n";
        for (name, there) in [("overlay", true), ("erofs", true), ("over", false), ("nodev", false)] {
            assert_eq!(supports(text, name), there, "{name}");
        }
    }

    #[test]
    fn modules_are_found_by_the_name_of_their_file() {
        let modules = tempfile::tempdir().unwrap();
        fs::create_dir(modules.path().join("6.1")).unwrap();
        fs::write(
            modules.path().join("6.1/modules.dep"),
            "kernel/fs/erofs/erofs.ko.xz: kernel/lib/x.ko\nkernel/fs/fuse/cuse.ko:\n",
        )
        .unwrap();
        for (name, there) in [("erofs", true), ("cuse", true), ("x", false), ("fuse", false)] {
            assert_eq!(has_module(modules.path(), "6.1", name), there, "{name}");
        }
    }

    #[test]
    fn old_kernels_are_warned_about() {
        for (release, verdict) in [
            ("6.18.0", Verdict::Ok),
            ("6.12-rc1", Verdict::Ok),
            ("6.8.0-40-generic", Verdict::Warn),
            ("6.1.0-48-amd64", Verdict::Warn),
            ("5.4", Verdict::Warn),
        ] {
            assert_eq!(version(release).verdict, verdict, "{release}");
        }
    }
}
