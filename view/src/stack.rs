//! What a user names to be seen: `REF[+REF…]`, where each is what the store resolves, or a file.
//!
//! A file says in `api` what it is. A *stack* lists references, which may be files again, relative to it:
//!
//! ```yaml
//! api: kiln/v1/stack
//! refs: [me/base:1, ./compiler.yaml, me/libs:2+me/more:1]
//! ```
//!
//! A *live layer* shows files of the host's, which must lie below the directory of the file, in a view:
//!
//! ```yaml
//! api: kiln/v1/live
//! contents:
//!   - {bind: src, dest: tools/src}
//!   - {bind: config/app.conf, dest: etc/app.conf}
//! ```
//!
//! Files are not trusted: how large, how deep and how many they are is bounded, and what leads in a circle is refused.

mod yaml;

use std::fs::File;
use std::io::{self, Read as _};
use std::path::{Component, Path, PathBuf};

use kiln_contract::{BackendError, Digest, ErrorKind};
use kiln_store::{Store, StoreError};
use serde::{Deserialize, Serialize};

use self::yaml::parse;

/// The largest file, in bytes.
const SIZE_MOST: u64 = 256 << 10;

/// How deep files may name files.
const DEPTH_MOST: usize = 32;

/// How many references, and how many binds, a stack may have.
const PARTS_MOST: usize = 1000;

/// The longest path in a view, in bytes: the layer of mount points has it in the header of a tar.
const DEST_MOST: usize = 100;

const STACK: &str = "kiln/v1/stack";
const LIVE: &str = "kiln/v1/live";

/// What a reference names.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Stack {
    /// The first image: its configuration is the stack's. None if there are live layers only.
    pub image: Option<Digest>,
    /// The layers, bottom first. One that is there already is not put over what came after it once more.
    pub layers: Vec<Digest>,
    /// Of some of its layers not all files need be here.
    pub is_partial: bool,
    /// What of the host's is shown in it.
    pub binds: Vec<Bind>,
}

/// A file or directory of the host's that is shown in a view.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bind {
    /// Where it is on the host: absolute, without links.
    pub source: PathBuf,
    /// Where it is shown: relative to the view, without `..`.
    pub dest: PathBuf,
}

/// A reference that names nothing.
#[derive(Debug, thiserror::Error)]
pub enum StackError {
    /// The store does not have it.
    #[error("{source}")]
    Store {
        /// The part of the reference.
        part: String,
        /// What the store says.
        source: StoreError,
    },
    /// A file cannot be read.
    #[error("cannot read {}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A file is not what it should be.
    #[error("{}: {why}", path.display())]
    Wrong {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// Files name each other in a circle.
    #[error("files name each other in a circle: {}", names(circle))]
    Circle {
        /// From the first that is named again to that.
        circle: Vec<PathBuf>,
    },
    /// There is too much of something.
    #[error("`{reference}` is too much: {why}")]
    TooMuch {
        /// The reference.
        reference: String,
        /// Which bound it is beyond.
        why: String,
    },
}

fn names(paths: &[PathBuf]) -> String {
    paths.iter().map(|path| path.display().to_string()).collect::<Vec<_>>().join(", ")
}

impl From<StackError> for BackendError {
    fn from(error: StackError) -> Self {
        let kind = match &error {
            StackError::Store { source: StoreError::NotFound { .. }, .. } => ErrorKind::NotFound,
            StackError::File { source, .. } if source.kind() == io::ErrorKind::NotFound => {
                ErrorKind::NotFound
            }
            _ => ErrorKind::Invalid,
        };
        let what = error.to_string();
        match error {
            StackError::File { source, .. } => Self::caused(what, source).of_kind(kind),
            _ => Self::new(kind, what),
        }
    }
}

#[derive(Debug, Deserialize)]
struct Head {
    api: String,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct StackFile {
    #[serde(rename = "api")]
    _api: String,
    refs: Vec<String>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct LiveFile {
    #[serde(rename = "api")]
    _api: String,
    contents: Vec<LiveEntry>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct LiveEntry {
    bind: PathBuf,
    dest: PathBuf,
}

impl Stack {
    /// Finds what a reference names.
    ///
    /// # Errors
    /// A part names nothing or is ambiguous, or a file is none of the two kinds.
    pub fn resolve(store: &Store, reference: &str) -> Result<Self, StackError> {
        let mut resolving =
            Resolving { store, reference, stack: Self::default(), files: Vec::new(), parts: 0 };
        resolving.reference(reference, Path::new(""))?;
        Ok(resolving.stack)
    }

    /// Whether a part of a reference names a file, and not an image.
    pub fn is_file(part: &str) -> bool {
        is_file(part)
    }
}

struct Resolving<'a> {
    store: &'a Store,
    reference: &'a str,
    stack: Stack,
    /// The files that are being read, the outermost first.
    files: Vec<PathBuf>,
    parts: usize,
}

impl Resolving<'_> {
    fn reference(&mut self, reference: &str, relative_to: &Path) -> Result<(), StackError> {
        reference.split('+').try_for_each(|part| self.part(part, relative_to))
    }

    fn part(&mut self, part: &str, relative_to: &Path) -> Result<(), StackError> {
        self.parts += 1;
        if self.parts > PARTS_MOST {
            return Err(self.too_much(format!("it names more than {PARTS_MOST} things")));
        }
        if is_file(part) {
            return self.file(&relative_to.join(part));
        }
        let failed = |source| StackError::Store { part: part.to_owned(), source };
        let found = self.store.resolve_stack(part).map_err(failed)?;
        self.stack.image.get_or_insert(found.image);
        self.stack.is_partial |= !found.whole;
        for layer in found.layers {
            if !self.stack.layers.contains(&layer) {
                self.stack.layers.push(layer);
            }
        }
        Ok(())
    }

    fn file(&mut self, path: &Path) -> Result<(), StackError> {
        let failed = |source| StackError::File { path: path.to_owned(), source };
        let whole = std::fs::canonicalize(path).map_err(failed)?;
        if let Some(before) = self.files.iter().position(|file| *file == whole) {
            let circle = self.files[before..].iter().chain([&whole]).cloned().collect();
            return Err(StackError::Circle { circle });
        }
        if self.files.len() == DEPTH_MOST {
            return Err(self.too_much(format!("its files name files more than {DEPTH_MOST} times deep")));
        }
        let text = read(&whole).map_err(failed)?;
        let wrong = |why: String| StackError::Wrong { path: path.to_owned(), why };
        let Head { api } = parse(&text).map_err(wrong)?;
        let directory = whole.parent().unwrap_or(Path::new("/")).to_owned();
        match api.as_str() {
            STACK => {
                let StackFile { refs, .. } = parse(&text).map_err(wrong)?;
                self.files.push(whole);
                refs.iter().try_for_each(|reference| self.reference(reference, &directory))?;
                self.files.pop();
                Ok(())
            }
            LIVE => {
                let LiveFile { contents, .. } = parse(&text).map_err(wrong)?;
                for entry in contents {
                    let bind = bind(&directory, &entry).map_err(wrong)?;
                    if self.stack.binds.len() == PARTS_MOST {
                        return Err(self.too_much(format!("it binds more than {PARTS_MOST} things")));
                    }
                    self.stack.binds.push(bind);
                }
                Ok(())
            }
            _ => Err(wrong(format!("its api is `{}`; {STACK} and {LIVE} are known", api.escape_debug()))),
        }
    }

    fn too_much(&self, why: String) -> StackError {
        StackError::TooMuch { reference: self.reference.to_owned(), why }
    }
}

/// Names of images begin with neither a dot nor a slash, and no tag ends so.
fn is_file(part: &str) -> bool {
    let suffix = |suffix: &str| part.len() > suffix.len() && part.ends_with(suffix) && !part.contains(':');
    part.starts_with(['.', '/']) || [".yaml", ".yml"].into_iter().any(suffix)
}

fn read(path: &Path) -> io::Result<String> {
    let file = File::open(path)?;
    if !file.metadata()?.is_file() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "it is not a file"));
    }
    let mut bytes = Vec::new();
    file.take(SIZE_MOST + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > SIZE_MOST {
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, "it is too large for a list of references"));
    }
    String::from_utf8(bytes).map_err(|_| io::Error::new(io::ErrorKind::InvalidData, "it is not UTF-8"))
}

/// Files and directories below the one in which the file is: what somebody else wrote shows nothing else of the host.
fn bind(directory: &Path, entry: &LiveEntry) -> Result<Bind, String> {
    let shown = entry.bind.display();
    let source = std::fs::canonicalize(directory.join(&entry.bind))
        .map_err(|error| format!("it binds `{shown}`, which cannot be found: {error}"))?;
    if !source.starts_with(directory) {
        return Err(format!("it binds `{shown}`, which is outside of {}", directory.display()));
    }
    let mut dest = PathBuf::new();
    for part in entry.dest.components() {
        match part {
            Component::Normal(name) => dest.push(name),
            Component::RootDir | Component::CurDir => {}
            Component::ParentDir | Component::Prefix(_) => {
                return Err(format!("`{}` may lead out of the view", entry.dest.display()));
            }
        }
    }
    if dest.as_os_str().is_empty() {
        return Err(format!("it binds `{shown}` over the whole view"));
    }
    if dest.as_os_str().len() > DEST_MOST {
        return Err(format!("`{}` is longer than {DEST_MOST} bytes", dest.display()));
    }
    Ok(Bind { source, dest })
}

#[cfg(test)]
mod tests {
    use std::fs;

    use kiln_contract::Home;
    use kiln_store::ImageName;
    use oci_spec::image::ImageConfiguration;

    use super::*;

    struct Place {
        directory: tempfile::TempDir,
        store: Store,
    }

    impl Place {
        /// Images `me/a`, `me/b` and `me/c`, of one layer each.
        fn new() -> Self {
            let directory = tempfile::tempdir().unwrap();
            let store = Store::open(&Home::at(directory.path().join("home"))).unwrap();
            for name in ["a", "b", "c"] {
                let files = directory.path().join(name);
                fs::create_dir(&files).unwrap();
                fs::write(files.join(name), name).unwrap();
                let layer = store.import_directory(&files).unwrap().layer;
                let image = store.make_image(&ImageConfiguration::default(), &[layer]).unwrap();
                let name = ImageName::parse(&format!("me/{name}")).unwrap();
                store.tag(&name, &image.manifest_digest, "").unwrap();
            }
            Self { directory, store }
        }

        fn write(&self, name: &str, text: &str) -> String {
            let path = self.directory.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(&path, text).unwrap();
            path.to_str().unwrap().to_owned()
        }

        fn layer(&self, name: &str) -> Digest {
            self.store.resolve(&format!("me/{name}")).unwrap().layers[0]
        }

        fn error(&self, reference: &str) -> String {
            BackendError::from(Stack::resolve(&self.store, reference).unwrap_err()).to_string()
        }
    }

    #[test]
    fn files_name_images_and_files_beside_them() {
        let place = Place::new();
        place
            .write("deep/inner.yaml", "api: kiln/v1/stack\nrefs:\n  - me/b+me/a # again\n  - ../live.yaml\n");
        place.write(
            "live.yaml",
            "api: kiln/v1/live\ncontents: [{bind: a, dest: /x/./y}, {bind: a/a, dest: file}]\n",
        );
        let outer = place.write("outer.yaml", "api: kiln/v1/stack\nrefs: ['me/a', deep/inner.yaml]\n");
        let stack = Stack::resolve(&place.store, &format!("{outer}+me/c+{outer}")).unwrap();
        assert_eq!(stack.layers, ["a", "b", "c"].map(|name| place.layer(name)));
        assert_eq!(stack.image, Some(place.store.resolve("me/a").unwrap().id));
        let here = fs::canonicalize(place.directory.path()).unwrap();
        let binds = [("a", "x/y"), ("a/a", "file")];
        let binds = binds.map(|(source, dest)| Bind { source: here.join(source), dest: dest.into() });
        assert_eq!(stack.binds, [binds.clone(), binds].concat());
    }

    #[test]
    fn what_is_wrong_with_a_file_is_told_with_its_name() {
        let place = Place::new();
        std::os::unix::fs::symlink("/etc", place.directory.path().join("out")).unwrap();
        let live = |bind: &str, dest: &str| {
            format!("api: kiln/v1/live\ncontents: [{{bind: '{bind}', dest: '{dest}'}}]")
        };
        for (text, expected) in [
            ("api: kiln/v1/stack\nrefs: [me/none]", "no such image"),
            ("api: kiln/v2/stack\nrefs: []", "`kiln/v2/stack`"),
            ("refs: []", "api"),
            ("api: kiln/v1/stack\nrefs: []\nmore: 1", "more"),
            ("api: kiln/v1/stack\nrefs: {a: b}", "x.yaml: "),
            ("api: [", "x.yaml: "),
            ("", "x.yaml: "),
            ("api: kiln/v1/stack\nrefs: [./x.yaml]", "circle"),
            ("api: kiln/v1/stack\nrefs: [./none.yaml]", "none.yaml"),
            ("api: kiln/v1/stack\nrefs: [.]", "cannot read"),
            (&live("none", "x"), "cannot be found"),
            (&live("../", "x"), "outside of"),
            (&live("out/passwd", "x"), "outside of"),
            (&live("/etc/passwd", "x"), "outside of"),
            (&live("a", "../x"), "lead out"),
            (&live("a", "/"), "whole view"),
            (&live("a", &"x".repeat(101)), "longer than"),
            (&" ".repeat(300 << 10), "cannot read"),
            (&format!("api: kiln/v1/stack\nrefs: [{}]", "me/a,".repeat(1001)), "more than 1000"),
            (&format!("api: {}{}", "[".repeat(10_000), "]".repeat(10_000)), "x.yaml: "),
            (&format!("api: {}{}", "[".repeat(16), "]".repeat(16)), "16 times deep"),
            ("api: kiln/v1/stack\nrefs: []\nrefs: []", "twice"),
            ("api: kiln/v1/stack\nrefs: []\n---\napi: x", "more than one"),
            ("api: &a x\nrefs: [*a]", "alias"),
            ("? [a]\n: b", "more than a word"),
            // As much as ten to the ninth, written in a few lines.
            (
                &format!(
                    "api: kiln/v1/stack\na0: &a0 [x,x,x,x,x,x,x,x,x,x]\n{}refs: *a8",
                    (1..9)
                        .map(|n| format!("a{n}: &a{n} [{}]\n", vec![format!("*a{}", n - 1); 10].join(",")))
                        .collect::<String>()
                ),
                "x.yaml: ",
            ),
        ] {
            let error = place.error(&place.write("x.yaml", text));
            assert!(error.contains(expected), "{}: {error}", &text[..text.len().min(100)]);
            assert!(error.len() < 1000, "{error}");
        }
        for (depth, fits) in [(31, true), (32, false)] {
            for n in 0..depth {
                place.write(&format!("{n}.yaml"), &format!("api: kiln/v1/stack\nrefs: [./{}.yaml]", n + 1));
            }
            place.write(&format!("{depth}.yaml"), "api: kiln/v1/stack\nrefs: [me/a]");
            let first = place.directory.path().join("0.yaml");
            let resolved = Stack::resolve(&place.store, first.to_str().unwrap());
            assert_eq!(resolved.is_ok(), fits, "{depth}: {resolved:?}");
        }
    }
}
