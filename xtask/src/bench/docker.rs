//! Docker with an engine of its own: nothing of the host's is touched.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use super::sampling::{quietly, timed};
use crate::shell::{Outcome, capture};

/// How long an engine may take to answer.
const PATIENCE: Duration = Duration::from_secs(60);
const IMAGE: &str = "bench:1";

/// The running engine with one image; it ends when this is dropped.
pub(super) struct Docker {
    engine: Child,
    directory: tempfile::TempDir,
}

impl Docker {
    /// Starts it, with an image of `rootfs`.
    pub(super) fn start(rootfs: &Path) -> Outcome<Self> {
        let directory = tempfile::Builder::new().prefix("kiln-docker-").tempdir();
        let directory = directory.map_err(|error| format!("cannot make a directory: {error}"))?;
        let at = |name: &str| directory.path().join(name);
        let mut command = Command::new("dockerd");
        command.arg("--data-root").arg(at("data")).arg("--exec-root").arg(at("exec"));
        command.arg("--pidfile").arg(at("pid")).arg("--host").arg(format!("unix://{}", at("sock").display()));
        // Neither rules nor bridges of the host's: the containers have no network.
        command.args(["--iptables=false", "--ip6tables=false", "--bridge=none"]);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let engine = command.spawn().map_err(|error| format!("cannot start dockerd: {error}"))?;
        let docker = Self { engine, directory };
        let begun = Instant::now();
        while capture(&mut docker.command(&["version"])).is_err() {
            if begun.elapsed() > PATIENCE {
                return Err("dockerd does not answer".to_owned());
            }
            std::thread::sleep(Duration::from_millis(100));
        }
        let tar = docker.directory.path().join("root.tar");
        capture(Command::new("tar").arg("-C").arg(rootfs).arg("-cf").arg(&tar).arg("."))?;
        capture(docker.command(&["import"]).arg(&tar).arg(IMAGE))?;
        Ok(docker)
    }

    fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new("docker");
        command.arg("--host").arg(format!("unix://{}", self.directory.path().join("sock").display()));
        command.args(words);
        command
    }

    /// Seconds of one `docker run --rm IMAGE true`.
    pub(super) fn run(&self) -> Outcome<f64> {
        timed(|| quietly(&mut self.command(&["run", "--rm", "--network", "none", IMAGE, "true"])))
    }

    /// Starts a container that waits.
    pub(super) fn sleeper(&self, name: &str) -> Outcome {
        let words = ["run", "-d", "--rm", "--network", "none", "--name", name, IMAGE, "sleep", "3600"];
        capture(&mut self.command(&words)).map(drop)
    }

    /// Seconds of one `docker exec NAME true`.
    pub(super) fn exec(&self, name: &str) -> Outcome<f64> {
        timed(|| quietly(&mut self.command(&["exec", name, "true"])))
    }
}

impl Drop for Docker {
    fn drop(&mut self) {
        if let Ok(running) = capture(&mut self.command(&["ps", "--quiet"])) {
            for id in running.lines() {
                let _ = capture(&mut self.command(&["rm", "--force", id]));
            }
        }
        // It unmounts what it has mounted when it is asked to end.
        if let Some(pid) = i32::try_from(self.engine.id()).ok().and_then(rustix::process::Pid::from_raw) {
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
        }
        let _ = self.engine.wait();
    }
}
