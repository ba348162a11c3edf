//! Builds a kernel for machines: everything that they need and nothing else, without modules.
//!
//! The configuration is that of `make allnoconfig` with the options in `boot/kernel/*.config`: one file for all
//! architectures, one for each. What is built is an uncompressed kernel, so that nothing is decompressed at boot: a
//! `vmlinux` on x86-64, an `Image` on arm64.

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead as _, BufReader, Read as _};
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use kiln_contract::{Progress, Step, StepId};

use crate::arch::Arch;
use crate::error::{BootError, Missing, Result, Tool};
use crate::linux_source::{self, LinuxSource};
use crate::modules::{WANTED, is_vital};
use crate::tools;

/// Options that every machine's kernel has.
const COMMON: &str = include_str!("../kernel/common.config");

/// Those of an architecture.
const fn options(arch: Arch) -> &'static str {
    match arch {
        Arch::X86_64 => include_str!("../kernel/x86_64.config"),
        Arch::Aarch64 => include_str!("../kernel/aarch64.config"),
    }
}

/// What the build runs. `perl` writes assembly for ciphers.
const TOOLS: &[Tool] = &[
    Tool { program: "make", package: "make" },
    Tool { program: "gcc", package: "gcc" },
    Tool { program: "ld", package: "binutils" },
    Tool { program: "flex", package: "flex" },
    Tool { program: "bison", package: "bison" },
    Tool { program: "bc", package: "bc" },
    Tool { program: "perl", package: "perl" },
];

/// Headers of libraries, which the kernel's own tools for x86-64 are built with.
const HEADERS: &[Tool] = &[Tool { program: "gelf.h", package: "libelf-dev" }];

const PURPOSE: &str = "building a kernel";

/// A kernel that was built.
#[derive(Debug)]
pub(crate) struct Built {
    /// The vmlinux or Image.
    pub(crate) kernel: PathBuf,
    /// Its whole configuration.
    pub(crate) config: PathBuf,
}

/// Builds from `source` (or Debian's), with `jobs` compilers at a time (or one for each processor), in `staging`.
pub(crate) fn build(
    source: Option<&Path>,
    jobs: Option<NonZeroUsize>,
    staging: &Path,
    progress: &dyn Progress,
) -> Result<Built> {
    let arch = Arch::host().ok_or_else(|| BootError::NotAKernel {
        path: source.unwrap_or(Path::new("linux-source")).into(),
        reason: format!("machines on {} are not known", std::env::consts::ARCH),
    })?;
    require_tools(arch)?;
    let source = linux_source::find(source, staging, progress)?;
    let build = Build { arch, directory: staging.join("build"), source, progress };
    build.configure()?;
    let jobs = jobs.or_else(|| std::thread::available_parallelism().ok()).map_or(1, NonZeroUsize::get);
    build.compile(jobs)?;
    let kernel = match arch {
        Arch::X86_64 => build.directory.join("vmlinux"),
        Arch::Aarch64 => build.directory.join("arch/arm64/boot/Image"),
    };
    Ok(Built { kernel, config: build.directory.join(".config") })
}

fn require_tools(arch: Arch) -> Result<()> {
    let mut missing: Vec<Tool> =
        TOOLS.iter().filter(|tool| tools::find(tool.program).is_none()).copied().collect();
    if arch == Arch::X86_64 && !missing.iter().any(|tool| tool.program == "gcc") {
        missing.extend(HEADERS.iter().filter(|header| !has_header(header.program)));
    }
    if missing.is_empty() { Ok(()) } else { Err(BootError::ToolsMissing { purpose: PURPOSE, missing }) }
}

/// Whether the compiler finds the header `name`.
fn has_header(name: &str) -> bool {
    let include = format!("-include{name}");
    let tried = Command::new("gcc")
        .args([&include, "-fsyntax-only", "-x", "c", "/dev/null"])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status();
    tried.is_ok_and(|status| status.success())
}

/// A build in progress.
struct Build<'a> {
    arch: Arch,
    directory: PathBuf,
    source: LinuxSource,
    progress: &'a dyn Progress,
}

impl Build<'_> {
    fn doing(&self) -> String {
        format!("building Linux {}", self.source.version)
    }

    /// `make`, outside of the source, so that the same source gives the same kernel.
    fn make(&self) -> Command {
        let mut make = tools::command("make");
        make.arg("-C").arg(&self.source.directory);
        make.arg(format!("O={}", self.directory.display()));
        make.arg(match self.arch {
            Arch::X86_64 => "ARCH=x86_64",
            Arch::Aarch64 => "ARCH=arm64",
        });
        make.env("KBUILD_BUILD_TIMESTAMP", "Thu Jan  1 00:00:00 UTC 1970");
        make.env("KBUILD_BUILD_USER", "kiln").env("KBUILD_BUILD_HOST", "kiln");
        make
    }

    /// Writes the configuration, and checks that this version of Linux has the options that matter.
    fn configure(&self) -> Result<()> {
        let step =
            self.progress.begin(Step { name: self.source.version.clone(), verb: "configure", total: None });
        fs::create_dir(&self.directory).map_err(BootError::doing("make", &self.directory))?;
        let wanted = self.directory.join("wanted.config");
        let text = format!("{COMMON}\n{}", options(self.arch));
        fs::write(&wanted, &text).map_err(BootError::doing("write", &wanted))?;
        let mut make = self.make();
        make.arg("allnoconfig").env("KCONFIG_ALLCONFIG", &wanted);
        let doing = format!("configuring Linux {}", self.source.version);
        let child = make.spawn().map_err(|error| tools::failed(&doing, "make", &error.to_string()))?;
        let finished = tools::finish(&doing, "make", child, || {});
        self.progress.end(step, if finished.is_ok() { "done" } else { "failed" });
        finished?;
        let path = self.directory.join(".config");
        let config = fs::read_to_string(&path).map_err(BootError::doing("read", &path))?;
        let lost = lost(&text, &config);
        let vital = WANTED.iter().filter(|wanted| is_vital(wanted) && lost.contains(&wanted.config));
        let missing: Vec<Missing> =
            vital.map(|wanted| Missing { module: wanted.module, config: wanted.config }).collect();
        if !missing.is_empty() {
            return Err(BootError::Lacks { version: self.source.version.clone(), missing });
        }
        if !lost.is_empty() {
            self.progress.note(&format!("Linux {} does not have {}", self.source.version, lost.join(", ")));
        }
        Ok(())
    }

    fn compile(&self, jobs: usize) -> Result<()> {
        let target = match self.arch {
            Arch::X86_64 => "vmlinux",
            Arch::Aarch64 => "Image",
        };
        let mut make = self.make();
        make.arg(format!("-j{jobs}")).arg(target);
        let fail = |said: &str| tools::failed(&self.doing(), "make", said);
        let mut child = make.spawn().map_err(|error| fail(&error.to_string()))?;
        let errors = child.stderr.take();
        let errors = std::thread::spawn(move || {
            let mut text = String::new();
            let _ = errors.map(|errors| BufReader::new(errors.take(16 << 20)).read_to_string(&mut text));
            text
        });
        let mut steps = Steps { progress: self.progress, open: BTreeMap::new(), files: 0 };
        if let Some(output) = child.stdout.take() {
            let lines = BufReader::new(output).split(b'\n').map_while(std::io::Result::ok);
            lines.for_each(|line| steps.line(&String::from_utf8_lossy(&line)));
        }
        let status = child.wait().map_err(|error| fail(&error.to_string()))?;
        let errors = errors.join().unwrap_or_default();
        steps.end(if status.success() { "done" } else { "failed" });
        if status.success() {
            Ok(())
        } else {
            Err(fail(&format!("{status}\n{}", tools::last_lines(&errors))))
        }
    }
}

/// Options that `wanted` sets and `config` has not got.
fn lost<'a>(wanted: &'a str, config: &str) -> Vec<&'a str> {
    let have: std::collections::BTreeSet<&str> = config.lines().collect();
    let set = wanted.lines().filter(|line| line.starts_with("CONFIG_") && !have.contains(line));
    set.filter_map(|line| Some(line.split_once('=')?.0)).collect()
}

/// Steps of progress: one for each top directory of Linux, from the first file that is compiled in it to the archive
/// that all of them go into.
struct Steps<'a> {
    progress: &'a dyn Progress,
    open: BTreeMap<String, StepId>,
    files: u64,
}

impl Steps<'_> {
    /// A line of `make`: `  CC      fs/ext4/super.o`, `  AR      fs/built-in.a`.
    fn line(&mut self, line: &str) {
        let Some((verb, file)) = line.trim().split_once(' ').map(|(verb, file)| (verb, file.trim())) else {
            return;
        };
        let Some((top, rest)) = file.split_once('/') else { return };
        match verb {
            "CC" | "AS" if !matches!(top, "" | "scripts" | "tools") => {
                self.files += 1;
                self.open.entry(top.to_owned()).or_insert_with(|| {
                    self.progress.begin(Step { name: top.into(), verb: "compile", total: None })
                });
            }
            "AR" if rest == "built-in.a" => {
                if let Some(step) = self.open.remove(top) {
                    self.progress.end(step, "done");
                }
            }
            _ => {}
        }
    }

    fn end(&mut self, outcome: &str) {
        for step in std::mem::take(&mut self.open).into_values() {
            self.progress.end(step, outcome);
        }
        tracing::debug!(files = self.files, "compiled");
    }
}
