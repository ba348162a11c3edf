//! What can go wrong with a kernel, and what the user can do about it.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use kiln_contract::{BackendError, ErrorKind};
use thiserror::Error;

/// A part of Linux that machines need, and the option of the kernel's configuration that gives it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Missing {
    /// The module's name.
    pub module: &'static str,
    /// The option, such as `CONFIG_EROFS_FS`.
    pub config: &'static str,
}

impl fmt::Display for Missing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.module, self.config)
    }
}

/// A program or a file that building or downloading takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tool {
    /// The program, or the header of a library.
    pub program: &'static str,
    /// The Debian package that has it.
    pub package: &'static str,
}

/// A failure of this room. Crossing into [`BackendError`] keeps the message, the kind and the hint.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum BootError {
    /// The system refused something.
    #[error("cannot {doing} {}: {source}", .path.display())]
    System {
        /// What was being done: `read`, `make`, …
        doing: &'static str,
        /// To what.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A file is not a kernel that machines could boot.
    #[error("{} is not a Linux kernel for machines: {reason}", .path.display())]
    NotAKernel {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A file is not a Debian package of a kernel.
    #[error("{} is not a Debian package of a kernel: {reason}", .path.display())]
    NotAPackage {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// No kernel is where one should be.
    #[error("no kernel is in {}", .path.display())]
    NoKernel {
        /// Where it was searched for.
        path: PathBuf,
    },
    /// A module's file makes no sense.
    #[error("{} is not a kernel module: {reason}", .path.display())]
    BadModule {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// Modules that need each other in a circle cannot be loaded.
    #[error("the modules {} need each other in a circle", .modules.join(", "))]
    Circle {
        /// The circle.
        modules: Vec<String>,
    },
    /// The kernel has not got what every machine needs.
    #[error("the kernel {version} lacks what machines need: {}", list(.missing))]
    Lacks {
        /// The kernel's version.
        version: String,
        /// What it lacks.
        missing: Vec<Missing>,
    },
    /// A module that another one needs is not there.
    #[error("the module {module} of the kernel {version} needs {needs}, which is not there")]
    Incomplete {
        /// The kernel's version.
        version: String,
        /// The module.
        module: String,
        /// What it needs.
        needs: String,
    },
    /// The name cannot be a kernel's.
    #[error(
        "`{name}` cannot name a kernel: letters, digits, `_`, `.`, `+`, `~` and `-` only, at most 100, starting with a letter or digit"
    )]
    BadName {
        /// The name.
        name: String,
    },
    /// No kernel has this name.
    #[error("no kernel is named `{name}`")]
    NoSuchKernel {
        /// The name asked for.
        name: String,
    },
    /// No kernel is installed.
    #[error("no kernel for machines is installed")]
    NoneInstalled,
    /// The name is in use by a kernel that is another one.
    #[error("another kernel is named `{name}` already")]
    NameTaken {
        /// The name.
        name: String,
    },
    /// What is the default is not removed by accident.
    #[error("the kernel `{name}` is the default")]
    IsDefault {
        /// The kernel.
        name: String,
    },
    /// The kernel is for processors of another kind.
    #[error("the kernel `{name}` is for {found}, and this host is {host}")]
    OtherArchitecture {
        /// The kernel.
        name: String,
        /// What it is for.
        found: String,
        /// What is here.
        host: String,
    },
    /// Programs that do the work are not installed.
    #[error("{purpose} takes {}", .missing.iter().map(|tool| tool.program).collect::<Vec<_>>().join(", "))]
    ToolsMissing {
        /// What they are for.
        purpose: &'static str,
        /// What is missing.
        missing: Vec<Tool>,
    },
    /// A program failed.
    #[error("{doing} with `{program}`: {said}")]
    ProgramFailed {
        /// The program.
        program: &'static str,
        /// What was being done.
        doing: String,
        /// What it wrote at last, or how it ended.
        said: String,
    },
    /// apt knows no package with a kernel for this host.
    #[error("apt knows none of the packages {}", .packages.join(", "))]
    NotInApt {
        /// Those that were asked for.
        packages: Vec<String>,
    },
    /// No source of a kernel is where one should be.
    #[error("{} is no source of Linux: {reason}", .path.display())]
    NotASource {
        /// The directory or file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A file of Kiln's own does not read as it should.
    #[error("reading {}: {reason}", .path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
}

fn list(missing: &[Missing]) -> String {
    missing.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

/// A result of this room.
pub type Result<T> = std::result::Result<T, BootError>;

impl BootError {
    /// A closure for `map_err` that says what was being done to which path.
    pub(crate) fn doing(doing: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::System { doing, path: path.into(), source }
    }

    fn kind(&self) -> ErrorKind {
        match self {
            Self::NoSuchKernel { .. } | Self::NoneInstalled | Self::NoKernel { .. } => ErrorKind::NotFound,
            Self::NameTaken { .. } => ErrorKind::Conflict,
            Self::IsDefault { .. } => ErrorKind::State,
            Self::BadName { .. }
            | Self::NotAKernel { .. }
            | Self::NotAPackage { .. }
            | Self::NotASource { .. } => ErrorKind::Invalid,
            Self::Lacks { .. } | Self::OtherArchitecture { .. } | Self::ToolsMissing { .. } => {
                ErrorKind::Unsupported
            }
            Self::NotInApt { .. } => ErrorKind::NotFound,
            Self::System { source, .. } if source.kind() == io::ErrorKind::NotFound => ErrorKind::NotFound,
            _ => ErrorKind::Failed,
        }
    }

    fn hint(&self) -> Option<String> {
        Some(match self {
            Self::NoSuchKernel { .. } => "`kiln kernel ls` lists the kernels".into(),
            Self::NoneInstalled => "install one: kiln kernel install".into(),
            Self::NoKernel { .. } | Self::Lacks { .. } => {
                "use Debian's kernel (kiln kernel install --from debian), or build one (kiln kernel build)"
                    .into()
            }
            Self::NameTaken { name } => {
                format!("give it another one with --name, or remove that one: kiln kernel rm {name}")
            }
            Self::IsDefault { .. } => {
                "make another one the default (kiln kernel default NAME), or use --force".into()
            }
            Self::ToolsMissing { missing, .. } => {
                let mut packages: Vec<_> = missing.iter().map(|tool| tool.package).collect();
                packages.dedup();
                format!("on Debian and Ubuntu: apt-get install {}", packages.join(" "))
            }
            Self::NotInApt { .. } => "update apt's lists (apt-get update), or name a file with --from".into(),
            Self::System { source, path, .. }
                if source.kind() == io::ErrorKind::PermissionDenied && path.starts_with("/boot") =>
            {
                "some distributions let only root read their kernel: copy it, or use Debian's (--from debian)"
                    .into()
            }
            _ => return None,
        })
    }
}

impl From<BootError> for BackendError {
    fn from(error: BootError) -> Self {
        let told = Self::new(error.kind(), error.to_string());
        match error.hint() {
            Some(hint) => told.hint(hint),
            None => told,
        }
    }
}
