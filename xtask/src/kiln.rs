//! The `kiln` under test: built in release, with a home of its own, as root or as an ordinary user.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use kiln_fixtures::OrdinaryUser;

use crate::shell::{Outcome, capture, cargo, run, target};

/// Builds `kiln` as users get it, and says where it is.
pub(crate) fn build() -> Outcome<PathBuf> {
    run(cargo().args(["build", "--release", "--package", "kiln"]))?;
    Ok(target().join("release/kiln"))
}

/// The same as developers have it, which is there in a tenth of the time.
pub(crate) fn build_for_debugging() -> Outcome<PathBuf> {
    run(cargo().args(["build", "--package", "kiln"]))?;
    Ok(target().join("debug/kiln"))
}

/// A `kiln` with an empty home, which is removed when this is dropped.
pub(crate) struct Kiln {
    program: PathBuf,
    user: Option<OrdinaryUser>,
    home: tempfile::TempDir,
}

impl Kiln {
    /// As `user`, or as whoever runs this task.
    pub(crate) fn new(program: &Path, user: Option<&OrdinaryUser>) -> Outcome<Self> {
        let Some(user) = user else {
            // On a disk, as a store is.
            return Self::below(Path::new("/var/tmp"), program);
        };
        Ok(Self { program: program.to_owned(), user: Some(user.clone()), home: user.tempdir() })
    }

    /// With a home below `directory`.
    pub(crate) fn below(directory: &Path, program: &Path) -> Outcome<Self> {
        let home = tempfile::Builder::new().prefix("kiln-home-").tempdir_in(directory);
        let home =
            home.map_err(|error| format!("cannot make a directory in {}: {error}", directory.display()))?;
        Ok(Self { program: program.to_owned(), user: None, home })
    }

    /// `KILN_HOME`.
    pub(crate) fn home(&self) -> &Path {
        self.home.path()
    }

    /// The program itself where its user can reach it, for scripts.
    pub(crate) fn program(&self) -> PathBuf {
        self.command::<&str>([]).get_program().into()
    }

    /// `kiln ARGUMENTS` in this home, with nothing on its standard input.
    pub(crate) fn command<S: AsRef<std::ffi::OsStr>>(
        &self,
        arguments: impl IntoIterator<Item = S>,
    ) -> Command {
        let mut command = match &self.user {
            Some(user) => user.command(&self.program),
            None => Command::new(&self.program),
        };
        // Nothing runs that was not asked for, unless it is.
        command.env("KILN_SPARE", "off");
        command.env("KILN_HOME", self.home.path()).args(arguments).stdin(Stdio::null());
        command
    }

    /// Runs `kiln ARGUMENTS`, which must succeed, and gives its standard output without the last newline.
    pub(crate) fn output<const N: usize>(&self, arguments: [&str; N]) -> Outcome<String> {
        Ok(capture(&mut self.command(arguments))?.trim_end().to_owned())
    }
}

impl Drop for Kiln {
    fn drop(&mut self) {
        // After a failure: let nothing run on, and let no mount keep the directory.
        if let Ok(ids) = self.output(["ps", "--all", "--quiet"]) {
            for id in ids.lines() {
                let _ = self.output(["rm", "--force", id]);
            }
        }
    }
}
