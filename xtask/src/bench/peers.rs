//! How each peer does what Kiln does.

use std::path::{Path, PathBuf};
use std::process::Command;

use super::disk::directory;
use super::sampling::{at_once, quietly, timed};
use crate::shell::{Outcome, capture};

/// A directory on a disk, removed when dropped.
pub(crate) fn scratch() -> Outcome<tempfile::TempDir> {
    tempfile::Builder::new()
        .prefix("kiln-bench-")
        .tempdir_in(directory())
        .map_err(|error| format!("cannot make a directory in {}: {error}", directory().display()))
}

/// A bundle of the busybox root, as `runc spec` configures it, that runs `command`.
pub(crate) struct Bundle {
    directory: tempfile::TempDir,
}

impl Bundle {
    pub(crate) fn new(rootfs: &Path, command: &[&str]) -> Outcome<Self> {
        let directory = scratch()?;
        capture(Command::new("runc").arg("spec").current_dir(directory.path()))?;
        let path = directory.path().join("config.json");
        let problem = |error: &dyn std::fmt::Display| format!("{}: {error}", path.display());
        let text = std::fs::read_to_string(&path).map_err(|error| problem(&error))?;
        let mut config: serde_json::Value = serde_json::from_str(&text).map_err(|error| problem(&error))?;
        config["process"]["terminal"] = false.into();
        config["process"]["args"] = command.into();
        config["root"]["path"] = rootfs.to_string_lossy().into();
        std::fs::write(&path, config.to_string()).map_err(|error| problem(&error))?;
        Ok(Self { directory })
    }

    fn path(&self) -> &Path {
        self.directory.path()
    }

    /// `RUNTIME run` of this bundle.
    pub(crate) fn command(&self, runtime: &str, id: &str) -> Command {
        let mut command = Command::new(runtime);
        command.arg("run").arg("--bundle").arg(self.path()).arg(id);
        command
    }

    /// Seconds of one run.
    pub(crate) fn run(&self, runtime: &str) -> Outcome<f64> {
        timed(|| quietly(&mut self.command(runtime, "kiln-bench")))
    }

    /// Seconds until the last of `count` runs that begin together has ended.
    pub(crate) fn run_many(&self, runtime: &str, count: usize) -> Outcome<f64> {
        at_once((0..count).map(|number| self.command(runtime, &format!("kiln-bench-{number}"))).collect())
    }
}

/// Seconds of `podman pull` into an empty storage.
pub(crate) fn podman_pull(image: &str) -> Outcome<f64> {
    let storage = scratch()?;
    // Podman refuses a longer path for it.
    let runroot =
        tempfile::tempdir_in("/tmp").map_err(|error| format!("cannot make a directory in /tmp: {error}"))?;
    let podman = || {
        let mut command = Command::new("podman");
        command.args(["--storage-driver", "overlay", "--root"]).arg(storage.path().join("root"));
        command.arg("--runroot").arg(runroot.path());
        command
    };
    let took = timed(|| quietly(podman().args(["pull", "--quiet", "--tls-verify=false", image])))?;
    // Its own way out: it leaves a mount on its storage.
    quietly(podman().args(["system", "reset", "--force"]))?;
    Ok(took)
}

/// Seconds of `skopeo copy` into an OCI layout and `umoci unpack` of that.
pub(crate) fn skopeo_umoci_pull(image: &str) -> Outcome<f64> {
    let directory = scratch()?;
    let layout = format!("{}:latest", directory.path().join("layout").display());
    timed(|| {
        let mut copy = Command::new("skopeo");
        copy.args(["--insecure-policy", "copy", "--quiet", "--src-tls-verify=false"]);
        quietly(copy.arg(format!("docker://{image}")).arg(format!("oci:{layout}")))?;
        quietly(
            Command::new("umoci").args(["unpack", "--image", &layout]).arg(directory.path().join("bundle")),
        )
    })
}

/// A container that `conmon` owns, as podman and CRI-O start it; ended when dropped.
pub(crate) struct Conmon {
    id: String,
    pub(crate) pid: u32,
    _bundle: Bundle,
}

impl Conmon {
    pub(crate) fn start(rootfs: &Path, number: usize) -> Outcome<Self> {
        let bundle = Bundle::new(rootfs, &["sleep", "1000"])?;
        let id = format!("kiln-bench-conmon-{number}");
        let file = |name: &str| -> PathBuf { bundle.path().join(name) };
        let mut command = Command::new("conmon");
        command.args(["--api-version", "1", "--cid", &id, "--cuuid", &id, "--runtime"]);
        command.arg(kiln_fixtures::find_program("runc").ok_or("runc is missing")?);
        command.arg("--bundle").arg(bundle.path());
        command.arg("--container-pidfile").arg(file("pid"));
        command.arg("--conmon-pidfile").arg(file("conmon.pid"));
        command.arg("--log-path").arg(format!("k8s-file:{}", file("log").display()));
        command.arg("--persist-dir").arg(bundle.path()).arg("--socket-dir-path").arg(bundle.path());
        quietly(&mut command)?;
        capture(Command::new("sh").arg("-c").arg(format!(
            "for i in $(seq 100); do test -s '{}' && break; sleep 0.05; done",
            file("pid").display()
        )))?;
        capture(Command::new("runc").args(["start", &id]))?;
        let pid =
            std::fs::read_to_string(file("conmon.pid")).map_err(|error| format!("conmon's pid: {error}"))?;
        let pid = pid.trim().parse().map_err(|error| format!("conmon's pid {pid:?}: {error}"))?;
        Ok(Self { id, pid, _bundle: bundle })
    }
}

impl Drop for Conmon {
    fn drop(&mut self) {
        // conmon ends with its container.
        let _ = Command::new("runc").args(["delete", "--force", &self.id]).output();
    }
}
