//! Real machines: a Debian kernel under QEMU (with TCG where there is no KVM), images from the store, disks that are copied.

use std::path::PathBuf;
use std::sync::LazyLock;

use kiln_boot::{Kernels, Source};
use kiln_contract::{Digest, DiskBackend, DiskId, Home, Silent};
use kiln_link::Stream;
use kiln_link::message::{self, Configure, HostFile, Output, Process, Root, WORKLOAD};
use kiln_machine::{Life, Paths, Saved, Shape, Templates};
use kiln_store::{ImportLimits, Store};
use kiln_vmm::Qemu;

/// What all tests share: a home with a kernel, an image and a template.
struct Bed {
    _directory: tempfile::TempDir,
    home: Home,
    qemu: Qemu,
    template: Saved,
    image: PathBuf,
    disks: Box<dyn DiskBackend>,
}

static BED: LazyLock<Option<Bed>> = LazyLock::new(|| {
    kiln_fixtures::require("qemu-system-x86_64")?;
    let package = kiln_fixtures::debian_kernel()?;
    let rootfs = kiln_fixtures::busybox_rootfs()?;
    let directory = tempfile::tempdir().unwrap();
    kiln_fixtures::at_the_end("rm -rf \"$1\"", &[directory.path().as_os_str()]);
    let home = Home::at(directory.path());
    let kernel =
        Kernels::open(&home).install(&Source::Packages(vec![package]), None, &kiln_contract::Silent).unwrap();
    let store = Store::open(&home).unwrap();
    let tar = std::process::Command::new("tar").arg("-C").arg(&rootfs).args(["-c", "."]).output().unwrap();
    let layer = store.import_tar(&tar.stdout[..], None, ImportLimits::default()).unwrap().layer;
    let layers: Vec<Digest> = store.with_mount_points(&[layer]).unwrap();
    let image = store.image_disk(&layers, &Silent).unwrap();
    let qemu = Qemu::find().unwrap();
    let shape = Shape { cpus: 1, memory: 256 << 20, network: false };
    let disks = kiln_disk::open(&home, &kiln_disk::Choice::Auto).unwrap().backend;
    let template = Templates::open(&home, &*disks).get(&qemu, &kernel, shape, false, &Silent).unwrap();
    Some(Bed { _directory: directory, home, qemu, template, image, disks })
});

impl Bed {
    fn paths(&self, name: &str) -> (DiskId, Paths) {
        let id: DiskId = name.parse().unwrap();
        let directory = self.home.path().join(name);
        std::fs::create_dir_all(&directory).unwrap();
        let disk = self.disks.create(&id, 8 << 30).unwrap();
        (
            id,
            Paths {
                directory,
                memory: self.template.memory(),
                image: self.image.clone(),
                disk,
                disk_size: 8 << 30,
                network: None,
            },
        )
    }
}

fn run<F: Future>(future: F) -> F::Output {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(future)
}

fn configure(name: &str) -> Configure {
    let mut entropy = vec![0; 64];
    getrandom::fill(&mut entropy).unwrap();
    Configure {
        hostname: name.to_owned(),
        machine_id: Digest::of(name.as_bytes()).hex()[..32].to_owned(),
        clock: u64::try_from(jiff::Timestamp::now().as_nanosecond()).unwrap(),
        entropy,
        root: Some(Root { shm_size: 64 << 20, disk_size: 8 << 30, ..Root::default() }),
        files: vec![HostFile { path: "/etc/hostname".to_owned(), content: format!("{name}\n").into_bytes() }],
        ..Configure::default()
    }
}

fn shell(script: &str) -> Process {
    Process {
        args: ["/bin/sh", "-c", script].map(str::to_owned).to_vec(),
        env: vec!["PATH=/bin:/sbin:/usr/bin".to_owned()],
        ..Process::default()
    }
}

/// All that a process writes, and how it ends.
async fn finish(mut stream: Stream) -> (String, String, u8) {
    let (mut out, mut err) = (Vec::new(), Vec::new());
    loop {
        match message::receive(&mut stream).await.unwrap().expect("it says how it ended") {
            Output::Stdout(bytes) => out.extend(bytes),
            Output::Stderr(bytes) => err.extend(bytes),
            Output::Exited(code) => {
                return (String::from_utf8(out).unwrap(), String::from_utf8(err).unwrap(), code);
            }
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn a_machine_starts_from_a_template_and_runs_a_command() {
    let Some(bed) = &*BED else { return };
    run(async {
        let (_, paths) = bed.paths("first");
        let life = Life::restore(&bed.qemu, &bed.template, &paths).await.unwrap();
        life.configure(configure("first")).await.unwrap();
        let stream =
            life.start(WORKLOAD, shell("hostname; cat /etc/hostname; echo no >&2; exit 3")).await.unwrap();
        let (out, err, code) = finish(stream).await;
        assert_eq!((out.as_str(), err.as_str(), code), ("first\nfirst\n", "no\n", 3));
    });
}
