//! The names of a home's instances, each taken by one of them.
//!
//! A name is a symbolic link `names/<name>` → `../instances/<id>`: making it is atomic, and fails if the name is taken.

use std::fs::{self, File};
use std::io::ErrorKind as IoKind;
use std::os::unix::fs::symlink;

use kiln_contract::{BackendError, ErrorKind, InstanceId};
use rustix::fs::{FlockOperation, flock};

use super::{Instances, failed, read_record};

/// A longer name would not fit where names go (files, DNS, `/etc/hosts`).
const MAX_NAME: usize = 200;

impl Instances {
    /// Gives an instance a name that no other has.
    ///
    /// # Errors
    /// [`ErrorKind::Conflict`] if another has it.
    pub(super) fn take_name(&self, name: &str, id: &InstanceId) -> Result<(), BackendError> {
        let link = self.home.names().join(name);
        let target = format!("../instances/{id}");
        let taken = match symlink(&target, &link) {
            Ok(()) => return Ok(()),
            Err(error) if error.kind() == IoKind::AlreadyExists => error,
            Err(error) if error.kind() == IoKind::NotFound => {
                fs::create_dir_all(self.home.names())
                    .and_then(|()| symlink(&target, &link))
                    .map_err(|error| failed("make", &link, error))?;
                return Ok(());
            }
            Err(error) => return Err(failed("make", &link, error)),
        };
        // Only one process at a time may find out that a name is stale and take it over.
        let names =
            File::open(self.home.names()).map_err(|error| failed("open", &self.home.names(), error))?;
        rustix::io::retry_on_intr(|| flock(&names, FlockOperation::LockExclusive))
            .map_err(|error| failed("lock", &self.home.names(), error.into()))?;
        if let Some(holder) = self.holder(name)
            && self.has_name(&holder, name)?
        {
            return Err(BackendError::new(
                ErrorKind::Conflict,
                format!("the name `{name}` is taken by instance {}", holder.short()),
            )
            .hint(format!("remove it with `kiln rm {name}`, rename it, or choose another name")));
        }
        tracing::debug!(name, %taken, "taking over a name that an interrupted command left");
        fs::remove_file(&link)
            .or_else(|error| if error.kind() == IoKind::NotFound { Ok(()) } else { Err(error) })
            .and_then(|()| symlink(&target, &link))
            .map_err(|error| failed("take over", &link, error))
    }

    /// Whether an instance has a name, or is just getting it.
    fn has_name(&self, id: &InstanceId, name: &str) -> Result<bool, BackendError> {
        match self.lock_how(id, FlockOperation::NonBlockingLockExclusive) {
            Ok(None) => Ok(false),
            Ok(Some(_locked)) => {
                Ok(read_record(&self.dir(id).record())?.is_some_and(|record| record.spec.name == name))
            }
            // Somebody is making or changing it.
            Err(error) if error.kind() == IoKind::WouldBlock => Ok(true),
            Err(error) => Err(failed("lock", self.dir(id).path(), error)),
        }
    }

    /// To whom a name leads. It may say otherwise itself, or be gone.
    pub(super) fn holder(&self, name: &str) -> Option<InstanceId> {
        let target = fs::read_link(self.home.names().join(name)).ok()?;
        target.file_name()?.to_str()?.parse().ok()
    }

    /// Takes a name away, if it is this instance's.
    pub(super) fn drop_name(&self, name: &str, id: &InstanceId) {
        if self.holder(name).as_ref() == Some(id) {
            let _ = fs::remove_file(self.home.names().join(name));
        }
    }
}

/// Whether a name is one that an instance may have: `[a-zA-Z0-9][a-zA-Z0-9_.-]*`, and nobody's id.
pub(super) fn check_name(name: &str) -> Result<(), BackendError> {
    let invalid = |why: &str| {
        Err(BackendError::new(ErrorKind::Invalid, format!("`{name}` is no name for an instance: {why}")))
    };
    let good = name.bytes().enumerate().all(|(index, byte)| {
        byte.is_ascii_alphanumeric() || (index > 0 && matches!(byte, b'_' | b'.' | b'-'))
    });
    if name.is_empty() || !good {
        return invalid("only letters, digits, `_`, `.` and `-`, and one of the first two at the start");
    }
    if name.len() > MAX_NAME {
        return invalid("too long (200 characters at most)");
    }
    if name.parse::<InstanceId>().is_ok() {
        return invalid("it looks like an id");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::tests::fresh;
    use super::*;
    use kiln_fixtures::instance_spec;

    #[test]
    fn a_name_is_taken_once_and_free_again_after_its_instance_is_gone() {
        let (_dir, instances) = fresh();
        let first = instances.create(&instance_spec("web"), Vec::new()).unwrap();
        let error = instances.create(&instance_spec("web"), Vec::new()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Conflict);
        assert!(error.to_string().contains(first.id.short()), "{error}");
        assert_eq!(instances.all().unwrap(), std::slice::from_ref(&first), "the loser leaves nothing behind");
        instances.forget(&first).unwrap();
        assert!(!instances.dir(&first.id).path().exists());
        instances.create(&instance_spec("web"), Vec::new()).unwrap();
    }

    #[test]
    fn of_many_who_want_a_name_at_once_one_gets_it() {
        let (_dir, instances) = fresh();
        // A stale name in the way makes them all go through the take-over.
        fs::create_dir_all(instances.home().names()).unwrap();
        symlink(format!("../instances/{}", InstanceId::random()), instances.home().names().join("web"))
            .unwrap();
        let won: Vec<bool> = std::thread::scope(|scope| {
            let all: Vec<_> = (0..16)
                .map(|_| scope.spawn(|| instances.create(&instance_spec("web"), Vec::new()).is_ok()))
                .collect();
            all.into_iter().map(|one| one.join().unwrap()).collect()
        });
        assert_eq!(won.iter().filter(|won| **won).count(), 1);
        assert_eq!(instances.all().unwrap().len(), 1);
    }

    #[test]
    fn what_killed_commands_left_does_not_block_names() {
        let (_dir, instances) = fresh();
        // Killed between taking the name and writing the record.
        let id = InstanceId::random();
        fs::create_dir_all(instances.dir(&id).path()).unwrap();
        fs::create_dir_all(instances.home().names()).unwrap();
        symlink(format!("../instances/{id}"), instances.home().names().join("x")).unwrap();
        instances.create(&instance_spec("x"), Vec::new()).unwrap();
        // Killed in a rename from `y` to `z`, before the record said so.
        let y = instances.create(&instance_spec("y"), Vec::new()).unwrap();
        symlink(format!("../instances/{}", y.id), instances.home().names().join("z")).unwrap();
        assert_eq!(instances.find("z").unwrap_err().kind(), ErrorKind::NotFound);
        let z = instances.create(&instance_spec("z"), Vec::new()).unwrap();
        assert_eq!(instances.find("z").unwrap().id, z.id);
        assert_eq!(instances.find("y").unwrap().id, y.id);
    }

    #[test]
    fn names_that_nobody_may_have() {
        let (_dir, instances) = fresh();
        let id = InstanceId::random().to_string();
        for name in ["", "-a", ".a", "a/b", "a b", "ä", &"a".repeat(201), &id] {
            let error = instances.create(&instance_spec(name), Vec::new()).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Invalid, "{name}");
        }
        assert!(instances.all().unwrap().is_empty());
    }

    #[test]
    fn rename_frees_the_old_name_and_refuses_a_taken_one() {
        let (_dir, instances) = fresh();
        let a = instances.create(&instance_spec("a"), Vec::new()).unwrap();
        instances.create(&instance_spec("b"), Vec::new()).unwrap();
        assert_eq!(instances.rename(&a.id, "b").unwrap_err().kind(), ErrorKind::Conflict);
        instances.rename(&a.id, "c").unwrap();
        assert_eq!(instances.find("c").unwrap().id, a.id);
        instances.create(&instance_spec("a"), Vec::new()).unwrap();
    }
}
