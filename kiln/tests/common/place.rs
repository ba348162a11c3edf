//! Somebody with a home in which there is an image: root, or an ordinary user.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use kiln_fixtures::OrdinaryUser;

use super::{Ended, Home, IMAGE, finish};

/// A home with an image in it, somebody who uses it, and a directory of his.
pub(crate) struct Place {
    pub(crate) root: Home,
    pub(crate) user: Option<(OrdinaryUser, tempfile::TempDir)>,
}

impl Place {
    /// As root; `None` where the host cannot.
    pub(crate) fn of_root() -> Option<Self> {
        Some(Self { root: Home::with_busybox()?, user: None })
    }

    /// As an ordinary user.
    pub(crate) fn of_user() -> Option<Self> {
        let (user, root) = (OrdinaryUser::get()?, Home::with_busybox()?);
        let directory = user.tempdir();
        let archive = directory.path().join("busybox.tar");
        root.ok(["image", "export", "-q", "-o", archive.to_str().unwrap(), IMAGE]);
        fs::set_permissions(&archive, fs::Permissions::from_mode(0o644)).unwrap();
        let place = Self { root, user: Some((user, directory)) };
        place.ok(&["image", "import", "-q", archive.to_str().unwrap()]);
        Some(place)
    }

    /// Everybody that this host has.
    pub(crate) fn all() -> Vec<Self> {
        Self::of_root().into_iter().chain(Self::of_user()).collect()
    }

    pub(crate) fn home(&self) -> PathBuf {
        self.user.as_ref().map_or_else(|| self.root.path(), |(_, directory)| directory.path().join("home"))
    }

    pub(crate) fn beside(&self, name: &str) -> PathBuf {
        self.home().parent().unwrap().join(name)
    }

    pub(crate) fn command(&self, words: &[&str]) -> Command {
        let Some((user, directory)) = &self.user else { return self.root.command(words) };
        let mut command = user.command(Path::new(env!("CARGO_BIN_EXE_kiln")));
        command
            .args(words)
            .env("KILN_HOME", self.home())
            .env("KILN_SPARE", "off")
            .stdin(Stdio::null())
            .current_dir(directory);
        command
    }

    pub(crate) fn kiln(&self, words: &[&str]) -> Ended {
        finish(self.command(words))
    }

    #[track_caller]
    pub(crate) fn ok(&self, words: &[&str]) -> String {
        let ended = self.kiln(words);
        assert_eq!(ended.code, 0, "{words:?}: {ended:?}");
        ended.stdout.trim_end().to_owned()
    }

    /// A command that must succeed and write JSON.
    #[track_caller]
    pub(crate) fn json(&self, words: &[&str]) -> serde_json::Value {
        let text = self.ok(words);
        serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text}"))
    }

    /// Where views are shown: an ordinary user's root has the directory that Kiln makes for it.
    pub(crate) fn at(&self) -> String {
        if self.user.is_some() { "/kiln".to_owned() } else { self.beside("at").display().to_string() }
    }

    /// The same by a back end. All processes see the router's directory, so that an ordinary user's must be one of his.
    pub(crate) fn at_by(&self, backend: &str) -> String {
        match &self.user {
            Some((user, _)) if backend == "router" => {
                let at = self.beside("at");
                fs::create_dir_all(&at).unwrap();
                std::os::unix::fs::chown(&at, Some(user.uid), Some(user.gid)).unwrap();
                at.display().to_string()
            }
            _ => self.at(),
        }
    }

    pub(crate) fn views(&self) -> String {
        self.ok(&["fs", "runtimes", "ls", "-q"])
    }

    /// The program for scripts that run in views.
    pub(crate) fn program(&self) -> String {
        self.command(&[]).get_program().to_str().unwrap().to_owned()
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if self.user.is_some() {
            let all = self.kiln(&["ps", "--all", "--quiet", "--no-trunc"]);
            for id in all.stdout.lines() {
                self.kiln(&["rm", "--force", "--volumes", id]);
            }
        }
    }
}

/// `kiln fs run REFERENCE FLAGS --at AT --backend BACKEND -- COMMAND`.
pub(crate) fn fs_run<'a>(
    reference: &'a str,
    at: &'a str,
    backend: &'a str,
    flags: &[&'a str],
    command: &[&'a str],
) -> Vec<&'a str> {
    let shown = ["--at", at, "--backend", backend, "--"];
    [&["fs", "run", reference], flags, &shown, command].concat()
}
