//! Kernels are built from a source, here from one that has Linux's top makefile only in outline: what `make` is asked
//! for, from where, and what becomes of what it leaves.

mod support;

use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use kiln_boot::{BootError, Form, Kernel, Kernels, Result, Source};
use kiln_contract::{Home, Progress, Silent, Step, StepId};
use support::{ar, vmlinux};

/// Takes over the whole configuration, adds what others select, and «compiles» files of two directories.
const MAKEFILE: &str = "\
VERSION = 6
PATCHLEVEL = 1
SUBLEVEL = 172
SELECTED = VIRTIO INET_TCP_DIAG NFT_REJECT_INET NFT_REJECT_IPV4 NFT_REJECT_IPV6
allnoconfig:
\t(cat $(KCONFIG_ALLCONFIG); for selected in $(SELECTED); do echo CONFIG_$$selected=y; done) | \\
\t\tgrep -v '^$(LOSE)=' > $(O)/.config
vmlinux:
\t@echo '  HOSTCC  scripts/basic/fixdep'
\t@echo '  CC      /build/tools/objtool/check.o'
\t@echo '  CC      mm/slub.o'
\t@echo '  AR      mm/built-in.a'
\t@echo '  CC      fs/ext4/super.o'
\tcp vmlinux.made $(O)/vmlinux
\techo $(MAKEFLAGS) $(KBUILD_BUILD_USER) $(ARCH) > $(SEEN)
";

/// Writes a source into `directory`. Its makefile loses the option `lose`, and writes what it was called with to `seen`.
fn source(directory: &Path, lose: &str, seen: &Path) {
    std::fs::create_dir_all(directory).unwrap();
    let makefile = format!("LOSE = {lose}\nSEEN = {}\n{MAKEFILE}", seen.display());
    std::fs::write(directory.join("Makefile"), makefile).unwrap();
    std::fs::write(directory.join("vmlinux.made"), vmlinux(b"Linux version 6.1.172-kiln (kiln@kiln)", true))
        .unwrap();
}

/// Whether the tools that a build needs are here; says so if not.
fn tools() -> bool {
    if !cfg!(target_arch = "x86_64") {
        kiln_fixtures::skip("the made-up source is for x86-64");
        return false;
    }
    let programs = ["make", "gcc", "ld", "flex", "bison", "bc", "perl"];
    programs.iter().all(|program| kiln_fixtures::require(program).is_some()) && {
        let header = Path::new("/usr/include/gelf.h").exists();
        if !header {
            kiln_fixtures::skip("libelf-dev is not installed (cargo xtask setup installs it)");
        }
        header
    }
}

fn build(directory: &Path, source: PathBuf, progress: &dyn Progress) -> Result<Kernel> {
    let kernels = Kernels::open(&Home::at(directory.join("home")));
    let jobs = NonZeroUsize::new(3);
    kernels.install(&Source::Build { source: Some(source), jobs }, None, progress)
}

/// A tar with the source in a directory of its own, as every tar of Linux is.
fn tarball(directory: &Path, from: &Path) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    builder.append_dir_all("linux-source-6.1", from).unwrap();
    let plain = builder.into_inner().unwrap();
    let packed = zstd::encode_all(&plain[..], 1).unwrap();
    std::fs::write(directory.join("linux-source-6.1.tar.zst"), &packed).unwrap();
    packed
}

#[test]
fn a_kernel_is_built_from_a_directory_a_tar_and_a_package() {
    if !tools() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let (tree, seen) = (directory.path().join("tree"), directory.path().join("seen"));
    source(&tree, "NOTHING", &seen);
    let packed = tarball(directory.path(), &tree);
    let mut data = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_gnu();
    header.set_size(packed.len() as u64);
    data.append_data(&mut header, "./usr/src/linux-source-6.1.tar.zst", &packed[..]).unwrap();
    let package = directory.path().join("linux-source.deb");
    std::fs::write(&package, ar(&[("debian-binary", b"2.0\n"), ("data.tar", &data.into_inner().unwrap())]))
        .unwrap();
    for from in [tree.clone(), directory.path().join("linux-source-6.1.tar.zst"), package] {
        let home = tempfile::tempdir().unwrap();
        let kernel = build(home.path(), from.clone(), &Silent).unwrap();
        assert_eq!((kernel.name(), kernel.record().form), ("6.1.172-kiln", Form::Elf), "{}", from.display());
        assert!(kernel.record().modules.is_empty() && kernel.record().absent.is_empty());
        assert!(kernel.record().builtin.contains(&"erofs".to_owned()));
        let config = std::fs::read_to_string(kernel.directory().join("config")).unwrap();
        assert!(config.contains("\nCONFIG_EROFS_FS=y\n") && config.contains("\nCONFIG_PVH=y\n"));
        let seen = std::fs::read_to_string(&seen).unwrap();
        assert!(seen.contains("-j3") && seen.ends_with("kiln x86_64\n"), "{seen}");
    }
    let left: Vec<_> = std::fs::read_dir(&tree).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(left.len(), 2, "nothing is left in the source: {left:?}");
}

#[test]
fn a_source_that_lacks_a_vital_option_is_refused_before_anything_is_compiled() {
    if !tools() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let (tree, seen) = (directory.path().join("tree"), directory.path().join("seen"));
    source(&tree, "CONFIG_OVERLAY_FS", &seen);
    let error = build(directory.path(), tree, &Silent).unwrap_err();
    assert_eq!(error.to_string(), "the kernel 6.1.172 lacks what machines need: overlay (CONFIG_OVERLAY_FS)");
    assert!(!seen.exists());
}

#[test]
fn a_build_that_fails_shows_the_last_that_was_said() {
    if !tools() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let (tree, seen) = (directory.path().join("tree"), directory.path().join("seen"));
    source(&tree, "NOTHING", &seen);
    std::fs::remove_file(tree.join("vmlinux.made")).unwrap();
    let error = build(directory.path(), tree, &Silent).unwrap_err();
    let message = error.to_string();
    assert!(message.starts_with("building Linux 6.1.172 with `make`: exit status: 2\n"), "{message}");
    assert!(message.contains("vmlinux.made"), "{message}");
}

#[test]
fn what_is_no_source_of_linux_is_refused() {
    if !tools() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let cases: [(&str, &[(&str, &str)]); 3] = [
        ("it has no Makefile", &[]),
        ("its Makefile has no version of Linux", &[("Makefile", "all:\n")]),
        ("it was built in place", &[("Makefile", "VERSION = 6\nPATCHLEVEL = 1\n"), (".config", "")]),
    ];
    for (index, (expected, files)) in cases.into_iter().enumerate() {
        let tree = directory.path().join(index.to_string());
        std::fs::create_dir(&tree).unwrap();
        for (name, content) in files {
            std::fs::write(tree.join(name), content).unwrap();
        }
        let error = build(directory.path(), tree, &Silent).unwrap_err();
        assert!(matches!(error, BootError::NotASource { .. }), "{error:?}");
        assert!(error.to_string().contains(expected), "{error}");
    }
    let text = directory.path().join("text");
    std::fs::write(&text, "no tar").unwrap();
    let error = build(directory.path(), text, &Silent).unwrap_err();
    assert!(matches!(error, BootError::NotASource { .. }), "{error:?}");
}

/// Remembers what it is told.
#[derive(Default)]
struct Told(Mutex<Vec<String>>);

impl Progress for Told {
    fn begin(&self, step: Step) -> StepId {
        let mut told = self.0.lock().unwrap();
        told.push(format!("{} {}", step.verb, step.name));
        StepId(told.len() as u64 - 1)
    }

    fn advance(&self, _: StepId, _: i64) {}

    fn end(&self, step: StepId, outcome: &str) {
        self.0.lock().unwrap()[usize::try_from(step.0).unwrap()] += &format!(": {outcome}");
    }

    fn note(&self, text: &str) {
        self.0.lock().unwrap().push(text.into());
    }
}

#[test]
fn a_build_tells_which_part_of_linux_it_is_at_and_what_this_version_has_not_got() {
    if !tools() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let (tree, seen) = (directory.path().join("tree"), directory.path().join("seen"));
    source(&tree, "CONFIG_WIREGUARD", &seen);
    let told = Told::default();
    let kernel = build(directory.path(), tree, &told).unwrap();
    assert_eq!(
        *told.0.lock().unwrap(),
        [
            "configure 6.1.172: done",
            "Linux 6.1.172 does not have CONFIG_WIREGUARD",
            "compile mm: done",
            "compile fs: done"
        ]
    );
    assert_eq!(kernel.record().absent, ["CONFIG_WIREGUARD"]);
}
