//! A home of its own for a test, and the real binary in it.
#![allow(dead_code, reason = "each test file uses its part")]

pub(crate) mod place;
pub(crate) mod terminal;

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use kiln_store::{ImageName, Store};
use oci_spec::image::ImageConfiguration;
use serde_json::Value;

/// The name of the image that [`Home::with_busybox`] has.
pub(crate) const IMAGE: &str = "localhost/busybox:test";

/// A Kiln home below a temporary directory. What runs in it is killed and removed when it is dropped.
pub(crate) struct Home {
    directory: tempfile::TempDir,
    is_mounted: bool,
}

/// What a command gave.
#[derive(Debug)]
pub(crate) struct Ended {
    pub(crate) code: i32,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Home {
    pub(crate) fn new() -> Self {
        Self { directory: tempfile::Builder::new().prefix("kiln-cli-").tempdir().unwrap(), is_mounted: false }
    }

    /// With a small image, for tests that run containers as root; `None` where the host cannot.
    pub(crate) fn with_busybox() -> Option<Self> {
        if !kiln_fixtures::require_root() {
            return None;
        }
        let rootfs = kiln_fixtures::busybox_rootfs()?;
        let home = Self::new();
        add_busybox(&home.path(), &rootfs);
        Some(home)
    }

    /// With that image and Debian's kernel, for tests that run machines; its template of 256 MiB is made.
    pub(crate) fn with_kernel() -> Option<Self> {
        let home = Self::with_busybox()?;
        home.add_kernel()?;
        Some(home)
    }

    /// The same on a filesystem in memory that has this size, as `mount -o size=` reads it.
    pub(crate) fn with_kernel_in_memory(size: &str) -> Option<Self> {
        if !kiln_fixtures::require_root() {
            return None;
        }
        let rootfs = kiln_fixtures::busybox_rootfs()?;
        let mut home = Self::new();
        std::fs::create_dir(home.path()).unwrap();
        let options = std::ffi::CString::new(format!("size={size}")).unwrap();
        rustix::mount::mount(
            "tmpfs",
            home.path(),
            "tmpfs",
            rustix::mount::MountFlags::empty(),
            Some(options.as_c_str()),
        )
        .unwrap();
        home.is_mounted = true;
        add_busybox(&home.path(), &rootfs);
        home.add_kernel()?;
        Some(home)
    }

    pub(crate) fn add_kernel(&self) -> Option<()> {
        kiln_fixtures::require("qemu-system-x86_64")?;
        let package = kiln_fixtures::debian_kernel()?;
        let kernels = kiln_boot::Kernels::open(&kiln_contract::Home::at(self.path()));
        let source = kiln_boot::Source::Packages(vec![package]);
        kernels.install(&source, None, &kiln_contract::Silent).unwrap();
        // A busy host takes its time for the template.
        let run = self.command(["run", "--vm", "--rm", "--memory", "256m", IMAGE, "true"]);
        let ended = finish_within(run, Duration::from_secs(240));
        assert_eq!(ended.code, 0, "{ended:?}");
        Some(())
    }

    pub(crate) fn path(&self) -> PathBuf {
        self.directory.path().join("home")
    }

    /// For a static, which is never dropped: it goes, with all that runs in it, when the test program has ended.
    pub(crate) fn until_the_end(self) -> Self {
        let script = "export KILN_HOME=\"$2\"/home; for id in $(\"$1\" ps --all --quiet --no-trunc); do \
                      \"$1\" rm --force --volumes $id; done; rm -rf \"$2\"";
        let program = std::ffi::OsStr::new(env!("CARGO_BIN_EXE_kiln"));
        kiln_fixtures::at_the_end(script, &[program, self.directory.path().as_os_str()]);
        self
    }

    /// A file beside the home.
    pub(crate) fn beside(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    pub(crate) fn command<S: AsRef<std::ffi::OsStr>>(&self, words: impl IntoIterator<Item = S>) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_kiln"));
        command.args(words).env("KILN_HOME", self.path()).env_remove("KILN_LOG").env_remove("COMPLETE");
        // Nothing runs that a test has not started.
        command.env("KILN_SPARE", "off");
        command.current_dir(self.directory.path()).stdin(Stdio::null());
        command
    }

    pub(crate) fn kiln<S: AsRef<std::ffi::OsStr>>(&self, words: impl IntoIterator<Item = S>) -> Ended {
        finish(self.command(words))
    }

    /// A command that must succeed; its standard output without the last newline.
    #[track_caller]
    pub(crate) fn ok<S: AsRef<std::ffi::OsStr>>(&self, words: impl IntoIterator<Item = S>) -> String {
        let ended = self.kiln(words);
        assert_eq!(ended.code, 0, "{ended:?}");
        ended.stdout.strip_suffix('\n').unwrap_or(&ended.stdout).to_owned()
    }

    /// A command that must succeed and write JSON.
    #[track_caller]
    pub(crate) fn json<S: AsRef<std::ffi::OsStr>>(&self, words: impl IntoIterator<Item = S>) -> Value {
        let text = self.ok(words);
        serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text}"))
    }

    /// A container in the background that waits; its id.
    #[track_caller]
    pub(crate) fn sleeper(&self, name: &str) -> String {
        self.ok(["run", "-d", "--name", name, "--network", "none", IMAGE, "sleep", "600"])
    }
}

/// Compiles one of `tests/programs` for guests, whose images have no libraries.
pub(crate) fn compile(name: &str, to: &Path) {
    let source = format!("{}/tests/programs/{name}.rs", env!("CARGO_MANIFEST_DIR"));
    let mut compiler = Command::new("rustc");
    compiler.args(["--edition", "2024", "-Ctarget-feature=+crt-static", "-o"]).arg(to).arg(source);
    assert!(compiler.status().unwrap().success(), "{name}");
}

/// Runs a command to its end; one that hangs is killed, and fails its test.
pub(crate) fn finish(command: Command) -> Ended {
    finish_within(command, Duration::from_secs(60))
}

/// The same for what may take longer.
pub(crate) fn finish_within(mut command: Command, patience: Duration) -> Ended {
    end(command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap(), patience)
}

/// The same for what reads its standard input to the end.
pub(crate) fn fed(mut command: Command, input: &[u8]) -> Ended {
    let command = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    child.stdin.take().unwrap().write_all(input).unwrap();
    end(child, Duration::from_secs(60))
}

fn end(child: Child, patience: Duration) -> Ended {
    let pid = rustix::process::Pid::from_child(&child);
    let (done, watch) = std::sync::mpsc::channel::<()>();
    let watchdog = std::thread::spawn(move || {
        if watch.recv_timeout(patience) == Err(std::sync::mpsc::RecvTimeoutError::Timeout) {
            rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
        }
    });
    let ended = child.wait_with_output().unwrap().into();
    drop(done);
    watchdog.join().unwrap();
    ended
}

/// Puts the small image into the store of a home: without configuration, its layer the whole root.
pub(crate) fn add_busybox(home: &Path, rootfs: &Path) {
    let store = Store::open(&kiln_contract::Home::at(home)).unwrap();
    let layer = store.import_directory(rootfs).unwrap().layer;
    let image = store.make_image(&ImageConfiguration::default(), &[layer]).unwrap();
    store.tag(&ImageName::parse(IMAGE).unwrap(), &image.manifest_digest, "test").unwrap();
}

impl Drop for Home {
    fn drop(&mut self) {
        let all = self.kiln(["ps", "--all", "--quiet", "--no-trunc"]);
        for id in all.stdout.lines() {
            self.kiln(["rm", "--force", "--volumes", id]);
        }
        // A pool of disks, if it has one.
        let _ = rustix::mount::unmount(self.path().join("disks"), rustix::mount::UnmountFlags::DETACH);
        if self.is_mounted {
            let _ = rustix::mount::unmount(self.path(), rustix::mount::UnmountFlags::DETACH);
        }
    }
}

impl From<Output> for Ended {
    fn from(output: Output) -> Self {
        use std::os::unix::process::ExitStatusExt;
        let code = output.status.code().or(output.status.signal().map(|signal| -signal));
        let text = |bytes| String::from_utf8_lossy(bytes).into_owned();
        Self { code: code.unwrap(), stdout: text(&output.stdout), stderr: text(&output.stderr) }
    }
}

/// Waits until something is so; a test that waits in vain fails.
#[track_caller]
pub(crate) fn until(what: &str, mut so: impl FnMut() -> bool) {
    let started = Instant::now();
    while !so() {
        assert!(started.elapsed() < Duration::from_secs(20), "waited in vain until {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

pub(crate) fn write(path: &Path, text: &str) {
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::fs::write(path, text).unwrap();
}
