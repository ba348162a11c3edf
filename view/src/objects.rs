//! Objects, opened for who shows them: never without their digest.
//!
//! What an object's name says is compared with its bytes when it is opened for the first time, and again when it was
//! changed since. That costs a pass over the file, so that of large ones ([`LARGE`]) only those are read that are not
//! marked: whoever writes or verifies an object gives it the time [`kiln_store::format::SOUND`], which no later write leaves as it
//! is. So a large object costs nothing after its import, and what the disk itself does to it is for the kernel's
//! fs-verity, or `kiln system check`, to find.
//!
//! An object that is missing or damaged is fetched from where it came from, by a process of its own ([`Fetcher`]), once
//! for all who wait for it. After a failure nobody is asked for [`PAUSE`].

use std::collections::{HashMap, HashSet};
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::hash::{BuildHasher as _, RandomState};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use kiln_contract::{BackendError, Digest, Hasher};
use kiln_erofs::object_redirect;
use rustix::fs::{Mode, OFlags, Timespec, Timestamps};

/// Objects of more bytes than this are not read again if they are marked.
const LARGE: u64 = 1 << 20;
/// How long after a failure nobody is asked for the same object.
const PAUSE: Duration = Duration::from_secs(2);
/// As many opened objects are remembered; then it begins anew.
const REMEMBERED: usize = 1 << 18;
/// Of what a fetcher says, so many bytes are told.
const TOLD: usize = 1024;

/// A program that brings an object into the store.
#[derive(Debug, Clone)]
pub struct Fetcher {
    /// The program.
    pub program: PathBuf,
    /// Its arguments; the object's digest follows.
    pub arguments: Vec<OsString>,
    /// `KILN_HOME` for it.
    pub home: PathBuf,
}

impl Fetcher {
    fn fetch(&self, digest: &Digest) -> Result<(), String> {
        let ran = Command::new(&self.program)
            .args(&self.arguments)
            .arg(digest.to_string())
            .env("KILN_HOME", &self.home)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .output()
            .map_err(|error| format!("{} cannot be executed: {error}", self.program.display()))?;
        if ran.status.success() {
            return Ok(());
        }
        let said =
            String::from_utf8_lossy(&ran.stderr[..ran.stderr.len().min(TOLD)]).trim().replace('\n', "; ");
        Err(if said.is_empty() { ran.status.to_string() } else { said })
    }
}

/// What is wrong with an object.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ObjectError {
    /// It cannot be opened or read; without it, mostly.
    #[error("it cannot be read: {0}")]
    Unreadable(#[from] io::Error),
    /// It is another length than the tree says.
    #[error("it has {found} bytes instead of {expected}")]
    Size { found: u64, expected: u64 },
    /// It is something else.
    #[error("its bytes have the digest {0}")]
    Digest(Digest),
    /// Fetching it did not help.
    #[error("{flaw}, and it cannot be fetched: {why}")]
    NotFetched { flaw: Box<ObjectError>, why: String },
}

/// The directory of objects. Held open, so that it stays the same wherever the process's namespace goes.
#[derive(Debug)]
pub(crate) struct Objects {
    directory: OwnedFd,
    /// For messages.
    path: PathBuf,
    fetcher: Option<Fetcher>,
    /// Objects that were compared with their digests by this process, by a hash that nobody can choose.
    verified: Mutex<HashSet<u64>>,
    hasher: RandomState,
    /// When fetching failed last.
    failed: Mutex<HashMap<Digest, Instant>>,
}

/// Where an object is.
enum Local<'a> {
    Here(File),
    /// It is missing or damaged, and may be had by this.
    Elsewhere(ObjectError, &'a Fetcher),
    /// It cannot be had now.
    Nowhere(ObjectError),
}

fn not_fetched(flaw: ObjectError, why: String) -> ObjectError {
    ObjectError::NotFetched { flaw: Box::new(flaw), why }
}

impl AsFd for Objects {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.directory.as_fd()
    }
}

impl Objects {
    /// Those in a directory.
    ///
    /// # Errors
    /// It cannot be opened.
    pub(crate) fn of(path: &Path, fetcher: Option<Fetcher>) -> Result<Self, BackendError> {
        let directory = File::open(path).map_err(|error| {
            BackendError::caused(format!("cannot open the objects in {}", path.display()), error)
        })?;
        Ok(Self {
            directory: directory.into(),
            path: path.to_owned(),
            fetcher,
            verified: Mutex::default(),
            hasher: RandomState::new(),
            failed: Mutex::default(),
        })
    }

    /// Opens an object of the size that the tree says, after it was compared with its digest. One that is missing or damaged
    /// is fetched meanwhile. What is wrong is told to the log.
    pub(crate) fn open(&self, digest: &Digest, size: u64) -> Result<File, ObjectError> {
        let opened = match self.local(digest, size) {
            Local::Here(file) => return Ok(file),
            Local::Elsewhere(flaw, fetcher) => self.fetch(fetcher, flaw, digest, size),
            Local::Nowhere(why) => Err(why),
        };
        opened.inspect_err(|why| self.tell(digest, why))
    }

    /// The same for who cannot wait: `None` for one that has to be fetched.
    #[cfg(target_os = "linux")]
    pub(crate) fn open_local(&self, digest: &Digest, size: u64) -> Result<Option<File>, ObjectError> {
        match self.local(digest, size) {
            Local::Here(file) => Ok(Some(file)),
            Local::Elsewhere(..) => Ok(None),
            Local::Nowhere(why) => Err(why).inspect_err(|why| self.tell(digest, why)),
        }
    }

    fn tell(&self, digest: &Digest, why: &ObjectError) {
        let path = self.path.join(relative(digest));
        tracing::error!(object = %path.display(), "the object cannot be shown: {why}");
    }

    fn local(&self, digest: &Digest, size: u64) -> Local<'_> {
        let flaw = match self.open_verified(digest, size) {
            Ok(file) => return Local::Here(file),
            Err(flaw) => flaw,
        };
        let Some(fetcher) = &self.fetcher else { return Local::Nowhere(flaw) };
        if lock(&self.failed).get(digest).is_some_and(|failed| failed.elapsed() < PAUSE) {
            return Local::Nowhere(not_fetched(flaw, "it could not be a moment ago".to_owned()));
        }
        Local::Elsewhere(flaw, fetcher)
    }

    fn fetch(
        &self,
        fetcher: &Fetcher,
        flaw: ObjectError,
        digest: &Digest,
        size: u64,
    ) -> Result<File, ObjectError> {
        tracing::warn!(object = %digest, "the object is fetched: {flaw}");
        let fetched = match fetcher.fetch(digest) {
            Ok(()) => self.open_verified(digest, size),
            Err(why) => Err(not_fetched(flaw, why)),
        };
        if fetched.is_err() {
            let mut failed = lock(&self.failed);
            failed.retain(|_, at| at.elapsed() < PAUSE);
            failed.insert(*digest, Instant::now());
        }
        fetched
    }

    fn open_verified(&self, digest: &Digest, size: u64) -> Result<File, ObjectError> {
        let flags = OFlags::RDONLY | OFlags::CLOEXEC;
        let fd = rustix::fs::openat(&self.directory, relative(digest), flags, Mode::empty());
        let file = File::from(fd.map_err(io::Error::from)?);
        let metadata = file.metadata()?;
        if metadata.len() != size {
            return Err(ObjectError::Size { found: metadata.len(), expected: size });
        }
        let key = self.hasher.hash_one(digest);
        let marked = metadata.mtime() == kiln_store::format::SOUND && metadata.mtime_nsec() == 0;
        if marked && (size > LARGE || lock(&self.verified).contains(&key)) {
            return Ok(file);
        }
        let found = digest_of(&file)?;
        if found != *digest {
            return Err(ObjectError::Digest(found));
        }
        if !marked {
            // Only its owner may; others read it again the next time.
            let time = Timespec { tv_sec: kiln_store::format::SOUND, tv_nsec: 0 };
            let _ = rustix::fs::futimens(&file, &Timestamps { last_access: time, last_modification: time });
        }
        let mut verified = lock(&self.verified);
        if verified.len() >= REMEMBERED {
            verified.clear();
        }
        verified.insert(key);
        Ok(file)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Where an object is below the directory of objects.
fn relative(digest: &Digest) -> PathBuf {
    PathBuf::from(OsStr::from_bytes(&object_redirect(digest)[1..]))
}

fn digest_of(file: &File) -> io::Result<Digest> {
    let mut hasher = Hasher::new();
    let mut buffer = vec![0; 128 << 10];
    let mut offset = 0;
    loop {
        match file.read_at(&mut buffer, offset) {
            Ok(0) => return Ok(hasher.finish()),
            Ok(count) => {
                hasher.update(&buffer[..count]);
                offset += count as u64;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    struct Bed {
        directory: tempfile::TempDir,
        objects: Objects,
    }

    fn bed(fetcher: Option<&str>) -> Bed {
        let directory = tempfile::tempdir().unwrap();
        let fetcher = fetcher.map(|script| Fetcher {
            program: "/bin/sh".into(),
            arguments: ["-c", script, "sh"].map(Into::into).to_vec(),
            home: directory.path().to_owned(),
        });
        Bed { objects: Objects::of(directory.path(), fetcher).unwrap(), directory }
    }

    impl Bed {
        fn put(&self, digest: &Digest, bytes: &[u8]) -> PathBuf {
            let path = self.directory.path().join(relative(digest));
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(&path, bytes).unwrap();
            path
        }

        fn open(&self, digest: &Digest, size: usize) -> Result<(), String> {
            self.objects.open(digest, size as u64).map(drop).map_err(|error| error.to_string())
        }
    }

    fn mtime(path: &Path) -> i64 {
        std::fs::metadata(path).unwrap().mtime()
    }

    #[test]
    fn an_object_is_compared_with_its_digest_at_first_and_after_every_change() {
        let bed = bed(None);
        for size in [100, (LARGE as usize) + 1] {
            let good = vec![1; size];
            let digest = Digest::of(&good);
            let path = bed.put(&digest, &good);
            bed.open(&digest, size).unwrap();
            assert_eq!(mtime(&path), kiln_store::format::SOUND, "{size}: what is verified is marked");
            bed.open(&digest, size).unwrap();
            let mut bad = good.clone();
            bad[size / 2] = 2;
            std::fs::write(&path, &bad).unwrap();
            let said = bed.open(&digest, size).unwrap_err();
            assert!(said.contains(&Digest::of(&bad).to_string()), "{size}: {said}");
            assert_ne!(mtime(&path), kiln_store::format::SOUND);
            std::fs::write(&path, &bad[1..]).unwrap();
            let said = bed.open(&digest, size).unwrap_err();
            assert!(said.contains(&format!("{} bytes instead of {size}", size - 1)), "{said}");
            std::fs::write(&path, &good).unwrap();
            bed.open(&digest, size).unwrap();
        }
    }

    #[test]
    fn a_small_object_is_read_again_by_every_server_whatever_its_time_says() {
        let (bytes, bad) = (vec![1; 100], vec![2; 100]);
        let digest = Digest::of(&bytes);
        let bed = bed(None);
        let path = bed.put(&digest, &bad);
        let time = Timespec { tv_sec: kiln_store::format::SOUND, tv_nsec: 0 };
        let times = Timestamps { last_access: time, last_modification: time };
        rustix::fs::futimens(File::open(&path).unwrap(), &times).unwrap();
        assert!(bed.open(&digest, 100).is_err());
    }

    #[test]
    fn what_is_missing_or_damaged_is_fetched_once_and_not_believed() {
        let bytes = b"an object that was fetched".repeat(10);
        let digest = Digest::of(&bytes);
        let hex = digest.hex();
        let (first, rest) = hex.split_at(2);
        // It keeps count, and copies what is beside it.
        let script = format!(
            "echo $1 >> \"$KILN_HOME/asked\"; [ -e \"$KILN_HOME/source\" ] || {{ echo nobody has it >&2; exit 1; }}; \
             mkdir -p \"$KILN_HOME/{first}\"; cp -f \"$KILN_HOME/source\" \"$KILN_HOME/{first}/{rest}\""
        );
        let bed = bed(Some(&script));
        let asked = || std::fs::read_to_string(bed.directory.path().join("asked")).unwrap().lines().count();
        let said = bed.open(&digest, bytes.len()).unwrap_err();
        assert!(said.contains("No such file") && said.contains("nobody has it"), "{said}");
        assert!(bed.open(&digest, bytes.len()).unwrap_err().contains("a moment ago"));
        assert_eq!(asked(), 1);
        // Later it is there; but first it is another.
        let source = bed.directory.path().join("source");
        std::fs::write(&source, vec![0; bytes.len()]).unwrap();
        lock(&bed.objects.failed).clear();
        assert!(bed.open(&digest, bytes.len()).unwrap_err().contains("have the digest"));
        lock(&bed.objects.failed).clear();
        std::fs::write(&source, &bytes).unwrap();
        bed.open(&digest, bytes.len()).unwrap();
        bed.open(&digest, bytes.len()).unwrap();
        assert_eq!(asked(), 3);
        let path = bed.directory.path().join(relative(&digest));
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o444)).unwrap();
        bed.open(&digest, bytes.len()).unwrap();
        assert_eq!(asked(), 3);
    }
}
