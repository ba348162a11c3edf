//! A hypervisor's process: a child that ends with the thread that started it, and what it said.

use std::fs::{self, File};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use rustix::io::FdFlags;
use rustix::process::Signal;

use crate::VmmError;

/// How much of what it said is told, in bytes.
const LAST_WORDS: usize = 2000;

/// A running hypervisor.
#[derive(Debug)]
pub(crate) struct HypervisorProcess {
    program: PathBuf,
    process: Child,
    words: PathBuf,
}

impl HypervisorProcess {
    /// Starts `command` in `directory`. What it writes to standard error goes to the file `words` there; it inherits
    /// `descriptors` by their numbers.
    pub(crate) fn start(
        mut command: Command,
        directory: &Path,
        words: &str,
        descriptors: Vec<OwnedFd>,
    ) -> Result<Self, VmmError> {
        let words = directory.join(words);
        let fail = || VmmError::io(format!("make {}", words.display()));
        File::create(&words).map_err(fail())?;
        // Others may write to it too.
        let log = File::options().append(true).open(&words).map_err(fail())?;
        let program = PathBuf::from(command.get_program());
        command.current_dir(directory).stdin(Stdio::null()).stderr(log);
        let parent = rustix::process::getpid();
        // SAFETY: system calls only, between fork and exec, on descriptors that outlive them.
        unsafe {
            command.pre_exec(move || {
                rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
                // It may have ended before that was said.
                if rustix::process::getppid() != Some(parent) {
                    return Err(io::ErrorKind::BrokenPipe.into());
                }
                for descriptor in &descriptors {
                    rustix::io::fcntl_setfd(descriptor, FdFlags::empty())?;
                }
                Ok(())
            });
        }
        // With the command its descriptors are closed here: nobody would see else that their other ends are gone.
        let process = command.spawn().map_err(VmmError::io(format!("run {}", program.display())))?;
        Ok(Self { program, process, words })
    }

    pub(crate) fn program(&self) -> &Path {
        &self.program
    }

    pub(crate) fn id(&self) -> u32 {
        self.process.id()
    }

    pub(crate) fn has_ended(&mut self) -> bool {
        !matches!(self.process.try_wait(), Ok(None))
    }

    /// Ends it, if it has not ended.
    pub(crate) fn kill(&mut self) -> Result<(), VmmError> {
        // Ending it twice is no error.
        let _ = self.process.kill();
        self.process.wait().map(drop).map_err(VmmError::io("wait for the hypervisor"))
    }

    /// The end of what it wrote to standard error.
    pub(crate) fn words(&self) -> String {
        let said = fs::read(&self.words).unwrap_or_default();
        String::from_utf8_lossy(&said[said.len().saturating_sub(LAST_WORDS)..]).trim().to_owned()
    }

    /// A failure to talk to it is explained by what it said before it ended, if it did.
    pub(crate) fn explain<T>(&mut self, outcome: Result<T, VmmError>) -> Result<T, VmmError> {
        let Err(error @ VmmError::Io { .. }) = outcome else { return outcome };
        // It closes its sockets a little before it ends.
        for _ in 0..50 {
            if self.has_ended() {
                let said = self.words();
                let words = if said.is_empty() { error.to_string() } else { said };
                return Err(VmmError::Ended { program: self.program.clone(), words });
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        Err(error)
    }
}

impl Drop for HypervisorProcess {
    fn drop(&mut self) {
        if let Err(error) = self.kill() {
            tracing::warn!("{error}");
        }
    }
}
