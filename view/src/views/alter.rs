//! Views are changed while somebody is in them: made editable or not, set back, given another stack.

use std::ffi::OsStr;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Component, Path, PathBuf};

use kiln_contract::{BackendError, Digest, ErrorKind};
use serde::{Deserialize, Serialize};

use super::{Backend, Result, ViewRecord, Views, keeper, remove_all};
use crate::Bind;

/// What is to become of a view.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Alteration {
    /// It may be changed from now on, or not any more; what was changed stays.
    Edit(bool),
    /// What was changed is taken back: at these paths in the view and below them, or everywhere if there are none.
    Reset(Vec<Vec<u8>>),
    /// Another stack is shown, with what was changed on top.
    Show {
        /// What it is, in words.
        reference: String,
        /// The image whose configuration a commit goes on with.
        image: Digest,
        /// The stack, bottom first.
        layers: Vec<Digest>,
        /// What of the host's is to be shown in it.
        binds: Vec<Bind>,
    },
}

/// How a view is to be changed for those who are in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum How {
    /// Everything is mounted anew.
    Anew,
    /// Only whether it may be written to.
    Flags,
}

/// Shows them the second record's view in place of the first's.
pub(crate) type Show<'a> = &'a mut dyn FnMut(&ViewRecord, &ViewRecord, How) -> Result<()>;

/// Renames that can be undone: from where they were to where they are.
#[derive(Debug, Default)]
struct Moved(Vec<(PathBuf, PathBuf)>);

impl Moved {
    fn rename(&mut self, from: &Path, to: &Path) -> io::Result<()> {
        fs::rename(from, to)?;
        self.0.push((from.to_owned(), to.to_owned()));
        Ok(())
    }

    fn undo(self) {
        for (from, to) in self.0.into_iter().rev() {
            // What was made in its place meanwhile is empty.
            let _ = remove_all(&from);
            if let Err(error) = fs::rename(&to, &from) {
                tracing::warn!(%error, "{} is left at {}", from.display(), to.display());
            }
        }
    }
}

impl Views {
    /// Changes a view, whether somebody is in it or not. Files that are open there stay open.
    ///
    /// # Errors
    /// [`ErrorKind::State`] if the view is not one that can be changed so; a path is none; what is to be shown cannot be. The
    /// view is as it was then.
    pub fn alter(&self, record: &ViewRecord, alteration: &Alteration) -> Result<()> {
        if record.backend == Backend::Router {
            if let Alteration::Show { binds, .. } = alteration {
                super::routed::no_live_layers(binds)?;
            }
            if self.in_use(record) {
                return self.router()?.alter(&record.name, alteration);
            }
        }
        if keeper::ask(self, &record.name, alteration)?.is_some() {
            return Ok(());
        }
        let Some((_lock, _)) = self.hold(&record.name, super::PATIENCE)? else {
            let what =
                format!("the view `{}` has no keeper any more, which would have to change it", record.name);
            return Err(BackendError::new(ErrorKind::State, what).hint(
                "end what runs in it, and enter it again with `kiln fs run --rerun` if it was to be kept",
            ));
        };
        self.apply(&record.name, alteration, None).map(drop)
    }

    /// The same for who has the view's lock, or shows it; `show` if somebody is in it. Tells whether it was mounted anew.
    pub(crate) fn apply(&self, name: &str, alteration: &Alteration, show: Option<Show<'_>>) -> Result<bool> {
        let old = self.find(name)?;
        let mut new = old.clone();
        let mut how = How::Anew;
        let mut moved = Moved::default();
        let trash = self.directory(name).join(format!("old-{}", old.generation));
        let prepared = match alteration {
            Alteration::Edit(true) if old.editable => {
                (new.frozen, how) = (false, How::Flags);
                Ok(())
            }
            Alteration::Edit(true) => {
                new.editable = true;
                self.prepare_scratch(&new)
            }
            Alteration::Edit(false) => {
                (new.frozen, how) = (old.editable, How::Flags);
                Ok(())
            }
            Alteration::Reset(_) if !old.editable => {
                let what = format!("the view `{name}` was never editable: there is nothing to be taken back");
                Err(BackendError::new(ErrorKind::State, what))
            }
            Alteration::Reset(paths) => {
                new.generation += 1;
                self.set_back(&old, &new, paths, &trash, &mut moved)
            }
            Alteration::Show { reference, image, layers, binds } => {
                new.generation += 1;
                new.reference.clone_from(reference);
                new.image = *image;
                new.layers.clone_from(layers);
                new.binds.clone_from(binds);
                self.prepare_base(&mut new).and_then(|()| self.prepare_scratch(&new))
            }
        };
        let is_shown = show.is_some();
        let done = prepared.and_then(|()| {
            // What cannot be merged is told before anything is mounted.
            self.tree(&self.store()?, &new)?;
            if let Some(show) = show.filter(|_| new != old) {
                show(&old, &new, how)?;
            }
            self.write(&new)
        });
        match done {
            Ok(()) => {
                // Whoever has something of it open still has it.
                let _ = remove_all(&trash);
                Ok(is_shown && new != old && how == How::Anew)
            }
            Err(error) => {
                moved.undo();
                Err(error)
            }
        }
    }

    /// Takes changes out of the scratch.
    fn set_back(
        &self,
        old: &ViewRecord,
        new: &ViewRecord,
        paths: &[Vec<u8>],
        trash: &Path,
        moved: &mut Moved,
    ) -> Result<()> {
        let Some(scratch) = self.scratch(old) else { return Ok(()) };
        let failed = |error| {
            BackendError::caused(
                format!("cannot take back what was changed in the view `{}`", old.name),
                error,
            )
        };
        fs::create_dir_all(trash).map_err(failed)?;
        if paths.is_empty() {
            moved.rename(&scratch.upper, &trash.join("upper")).map_err(failed)?;
        }
        for (index, path) in paths.iter().enumerate() {
            if let Some(changed) = changed_at(&scratch.upper, path)? {
                moved.rename(&changed, &trash.join(index.to_string())).map_err(failed)?;
            }
        }
        self.prepare_scratch(new)
    }
}

/// Where in an upper directory the change of a path is, if there is one.
fn changed_at(upper: &Path, path: &[u8]) -> Result<Option<PathBuf>> {
    let shown = String::from_utf8_lossy(path);
    let mut here = upper.to_owned();
    let mut parts = Vec::new();
    for part in Path::new(OsStr::from_bytes(path)).components() {
        match part {
            Component::Normal(name) => parts.push(name),
            Component::RootDir | Component::CurDir => {}
            Component::ParentDir | Component::Prefix(_) => {
                return Err(BackendError::new(
                    ErrorKind::Invalid,
                    format!("`{shown}` may lead out of the view"),
                ));
            }
        }
    }
    let Some((last, above)) = parts.split_last() else {
        return Err(BackendError::new(ErrorKind::Invalid, "the root of a view is not reset by its path")
            .hint("without a path, everything is taken back"));
    };
    for name in above {
        here.push(name);
        match fs::symlink_metadata(&here) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Ok(metadata) if metadata.is_dir() && !stands_alone(&here) => {}
            Ok(_) => {
                let inner = here.strip_prefix(upper).unwrap_or(&here).display();
                let what = format!(
                    "`{shown}` cannot be reset by itself: `/{inner}` was removed or replaced as a whole"
                );
                return Err(BackendError::new(ErrorKind::State, what).hint("reset that"));
            }
            Err(error) => return Err(BackendError::caused(format!("cannot read {}", here.display()), error)),
        }
    }
    here.push(last);
    Ok(fs::symlink_metadata(&here).is_ok().then_some(here))
}

/// Whether a directory of an upper shows nothing of what is below its own path.
fn stands_alone(directory: &Path) -> bool {
    ["opaque", "redirect"].into_iter().any(|mark| crate::changes::mark(directory, mark).is_some())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_is_reset_only_where_what_is_below_would_be_seen_then() {
        let directory = tempfile::tempdir().unwrap();
        let upper = directory.path();
        fs::create_dir_all(upper.join("etc/app")).unwrap();
        fs::write(upper.join("etc/app/file"), "").unwrap();
        fs::write(upper.join("removed"), "").unwrap();
        for (path, expected) in [
            ("etc/app/file", Some("etc/app/file")),
            ("/etc/./app/", Some("etc/app")),
            ("etc/none", None),
            ("none/none", None),
            ("removed", Some("removed")),
        ] {
            let changed = changed_at(upper, path.as_bytes()).unwrap();
            assert_eq!(changed, expected.map(|path| upper.join(path)), "{path}");
        }
        for (path, why) in [("../x", "lead out"), ("/", "root"), ("removed/x", "`/removed` was removed")] {
            let error = changed_at(upper, path.as_bytes()).unwrap_err().to_string();
            assert!(error.contains(why), "{path}: {error}");
        }
    }
}
