//! Logging in to machines: keys, what a client must be told, and the way to the guest's server.
//!
//! The host makes both keys: one pair for the user, for all machines of a home, and one pair for each machine, so that a client
//! is told beforehand which machine it is going to speak to. The guest gets its own with every connection, and keeps nothing.

use std::fs;
use std::io::{self, Read, Write};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use kiln_contract::{BackendError, ErrorKind, Home, InstanceId, InstanceRecord, Isolation, Stdio};
use kiln_link::message::{self, Process, SshServer};
use kiln_link::service;
use kiln_ssh::{KeyPair, PublicKey};

use crate::life::lost;
use crate::{Machines, door, plan, stream};

/// What a client must be told to log in to a machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SshAccess {
    /// The machine.
    pub id: InstanceId,
    /// Its name.
    pub name: String,
    /// The image's user.
    pub user: String,
    /// The file of the private key.
    pub identity: PathBuf,
    /// What the host key is known by: the machine's for as long as it is there, whatever its name.
    pub alias: String,
    /// A `known_hosts` file with this machine in it, and no other.
    pub known_hosts: PathBuf,
}

impl Machines {
    /// What a client must be told to log in to a machine, which need not run. Keys are made if there are none yet.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] for a container; or a key cannot be written or read.
    pub fn ssh_access(&self, record: &InstanceRecord) -> Result<SshAccess, BackendError> {
        only_machines(record)?;
        let dir = self.home().instance(&record.id);
        let alias = format!("kiln-{}", record.id);
        let host_key = host_key(&dir.ssh_host_key())?;
        let known_hosts = dir.known_hosts();
        write(&known_hosts, &format!("{alias} {}\n", host_key.public()), true)?;
        user_key(self.home())?;
        let own = &record.spec.process.user;
        Ok(SshAccess {
            id: record.id.clone(),
            name: record.spec.name.clone(),
            user: if own.is_empty() { "root".to_owned() } else { own.clone() },
            identity: self.home().ssh_key(),
            alias,
            known_hosts,
        })
    }

    /// Whether a machine can be logged in to now.
    ///
    /// # Errors
    /// As [`Self::ssh_proxy`].
    pub fn ready_for_ssh(&self, id: &InstanceId) -> Result<InstanceRecord, BackendError> {
        only_machines(&self.instances().read(id)?)?;
        self.verbs().ready_to(id, "log in to")
    }

    /// Carries an SSH client's bytes between `stdio` and the server in a machine, until one of them ends. Besides Kiln's own
    /// key, those in `keys` (files as `.pub` ones) may enter.
    ///
    /// # Errors
    /// [`ErrorKind::State`] if the machine does not run; [`ErrorKind::Unsupported`] for a container.
    pub fn ssh_proxy(&self, id: &InstanceId, keys: &[PathBuf], stdio: Stdio) -> Result<(), BackendError> {
        let record = self.ready_for_ssh(id)?;
        let dir = self.home().instance(id);
        let mut authorised = vec![user_key(self.home())?.public()];
        for path in keys {
            authorised.extend(public_keys(path)?);
        }
        let server = SshServer {
            host_key: host_key(&dir.ssh_host_key())?.seed().to_vec(),
            authorised: authorised.iter().map(|key| key.blob().to_vec().into()).collect(),
            process: Process {
                env: plan::with_defaults(&record.spec.process.env, false),
                groups: record.spec.process.groups.clone(),
                ..plan::confined(&record.spec)?
            },
        };
        let stream = stream::runtime()?.block_on(async {
            let mut stream = door::dial(&dir, service::SSH).await?;
            message::send(&mut stream, &server).await.map_err(lost)?;
            stream.into_std().map_err(|error| BackendError::caused("cannot use the machine's door", error))
        })?;
        carry(&stream, stdio).map_err(|error| BackendError::caused("cannot carry the connection", error))
    }
}

fn only_machines(record: &InstanceRecord) -> Result<(), BackendError> {
    if record.spec.isolation == Isolation::Machine {
        return Ok(());
    }
    let name = &record.spec.name;
    Err(BackendError::unsupported(format!(
        "cannot log in to {name}: it is a container, and has no SSH server"
    ))
    .hint(format!("run a shell in it with `kiln exec -it {name} sh`")))
}

/// Both directions, each on a thread: what a client gave may be anything.
fn carry(stream: &UnixStream, stdio: Stdio) -> io::Result<()> {
    stream.set_nonblocking(false)?;
    let mut to_guest = stream.try_clone()?;
    // Not waited for: it may hang in reading from a client that has nothing more to say.
    std::thread::spawn(move || {
        let _ = pass(&mut fs::File::from(stdio.stdin), &mut to_guest);
        let _ = to_guest.shutdown(std::net::Shutdown::Write);
    });
    match pass(&mut &*stream, &mut fs::File::from(stdio.stdout)) {
        // A client that has all it wants closes first.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        outcome => outcome,
    }
}

/// Passes on what comes as soon as it comes. (`io::copy` would splice into a pipe, which may hold back what a client waits for.)
fn pass(from: &mut impl Read, to: &mut impl Write) -> io::Result<()> {
    let mut buffer = vec![0; 64 << 10];
    loop {
        match from.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(count) => to.write_all(&buffer[..count])?,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

/// The key of Kiln's user, made at the first use; the public one lies beside it.
fn user_key(home: &Home) -> Result<KeyPair, BackendError> {
    let path = home.ssh_key();
    let pair = key(&path, "kiln")?;
    let public = path.with_extension("pub");
    if !public.exists() {
        write(&public, &format!("{} kiln\n", pair.public()), false)?;
    }
    Ok(pair)
}

/// The key of a machine, made at the first use.
fn host_key(path: &Path) -> Result<KeyPair, BackendError> {
    key(path, "machine")
}

fn key(path: &Path, comment: &str) -> Result<KeyPair, BackendError> {
    let fail = |what: &str, error: kiln_ssh::SshError| {
        BackendError::caused(format!("cannot {what} the key {}", path.display()), error)
    };
    if !path.exists() {
        let pair = KeyPair::generate().map_err(|error| fail("make", error))?;
        write(path, &pair.to_file(comment), false)?;
    }
    // Whoever was first has written it.
    let text = fs::read_to_string(path)
        .map_err(|error| BackendError::caused(format!("cannot read the key {}", path.display()), error))?;
    KeyPair::from_file(&text).map_err(|error| {
        fail("read", error).hint("it was changed by hand: remove it, and another will be made")
    })
}

/// Writes a file whole, for its owner only. What is there stays unless it is to be replaced.
fn write(path: &Path, text: &str, replace: bool) -> Result<(), BackendError> {
    let write = || {
        let directory = path.parent().unwrap_or(Path::new("/"));
        fs::create_dir_all(directory)?;
        let mut file = tempfile::NamedTempFile::new_in(directory)?;
        file.as_file().set_permissions(fs::Permissions::from_mode(0o600))?;
        file.write_all(text.as_bytes())?;
        if replace {
            file.persist(path)?;
            return Ok(());
        }
        match file.persist_noclobber(path) {
            Err(error) if error.error.kind() != io::ErrorKind::AlreadyExists => Err(error.error),
            _ => Ok(()),
        }
    };
    write()
        .map_err(|error: io::Error| BackendError::caused(format!("cannot write {}", path.display()), error))
}

/// The public keys in a file, one a line.
fn public_keys(path: &Path) -> Result<Vec<PublicKey>, BackendError> {
    let text = fs::read_to_string(path).map_err(|error| {
        BackendError::caused(format!("cannot read the public key {}", path.display()), error)
    })?;
    let lines = text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
    let keys: Vec<_> = lines
        .map(|line| {
            PublicKey::parse(line).map_err(|error| {
                BackendError::caused(format!("cannot use the public key {}", path.display()), error)
                    .of_kind(ErrorKind::Invalid)
            })
        })
        .collect::<Result<_, _>>()?;
    if keys.is_empty() {
        return Err(BackendError::new(ErrorKind::Invalid, format!("there is no key in {}", path.display())));
    }
    Ok(keys)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_made_once_for_its_owner_only_and_a_broken_one_is_an_error() {
        let directory = tempfile::tempdir().unwrap();
        let home = Home::at(directory.path());
        let made = user_key(&home).unwrap().public();
        assert_eq!(user_key(&home).unwrap().public(), made);
        assert_eq!(fs::metadata(home.ssh_key()).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(public_keys(&home.ssh_key().with_extension("pub")).unwrap(), [made]);
        fs::write(home.ssh_key(), "-----BEGIN OPENSSH PRIVATE KEY-----\nAAAA\n").unwrap();
        let error = user_key(&home).unwrap_err();
        assert!(error.to_string().contains("cannot read the key"), "{error}");
    }

    #[test]
    fn files_of_public_keys_are_read_line_by_line() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("keys");
        let own = KeyPair::generate().unwrap().public();
        for (text, count) in [
            (format!("{own} me\n\n# a comment\n{own}\n"), Some(2)),
            (String::new(), None),
            ("nonsense\n".to_owned(), None),
        ] {
            fs::write(&path, &text).unwrap();
            assert_eq!(public_keys(&path).ok().map(|keys| keys.len()), count, "{text}");
        }
    }
}
