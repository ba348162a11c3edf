//! Firecracker's driver word for word, and the stand-in's strictness, without which the rest would prove nothing.

use std::fs;
use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use kiln_contract::{BackendError, ErrorKind};
use kiln_link::HostLink;
use kiln_vmm::{Firecracker, VmmError};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use crate::bed::{self, Driver, MEMORY, ask, begin, run, stream};

pub(crate) const TABLE: &[(&str, fn())] = &[
    ("a machine is made by these requests in this order", says_what_it_should),
    ("what breaks its rules is refused", refuses_what_breaks_its_rules),
    ("a kernel that cannot be unpacked is refused with what to do", refuses_packed_kernels),
    ("an old version is refused with both named", refuses_old_versions),
    ("a refusal is told in its own words", tells_refusals),
    ("a process that ends is told with its last words", tells_last_words),
    ("bulk goes both ways at once, whole", carries_bulk),
    ("a directory may have any name", lives_in_any_directory),
];

fn requests(directory: &Path) -> Vec<(String, serde_json::Value, u64)> {
    let text = fs::read_to_string(directory.join("requests.jsonl")).unwrap();
    let line = |line: &str| {
        let said: serde_json::Value = serde_json::from_str(line).unwrap();
        let word = |at: usize| said[at].as_str().unwrap();
        let body = serde_json::from_str(word(2)).unwrap_or(serde_json::Value::Null);
        (format!("{} {}", word(0), word(1)), body, said[3].as_u64().unwrap())
    };
    text.lines().map(line).collect()
}

fn says_what_it_should() {
    use serde_json::json;
    let Some(bed) = bed::of(Driver::Fake) else { return };
    let template = bed.template();
    let at = |name: &str| template.join(name).to_str().unwrap().to_owned();
    let arch = if cfg!(target_arch = "x86_64") { " i8042.noaux i8042.nomux i8042.dumbkbd" } else { "" };
    let words = format!(
        "console=ttyS0 reboot=k panic=-1 pci=off{arch} kiln.link=vsock:1024 kiln.image=/dev/vda \
         kiln.disk=/dev/vdb kiln.off=restart quiet loglevel=3 random.trust_cpu=on cgroup_no_v1=all"
    );
    let parent = template.parent().unwrap();
    let drive = |id: &str, read_only: bool, cache: &str| {
        json!({ "drive_id": id, "path_on_host": format!("firecracker.{id}"), "is_root_device": false,
                "is_read_only": read_only, "cache_type": cache })
    };
    let expected = [
        ("PUT /machine-config", json!({ "vcpu_count": 1, "mem_size_mib": MEMORY >> 20 })),
        (
            "PUT /boot-source",
            json!({ "kernel_image_path": parent.join("vmlinux"), "initrd_path": parent.join("initramfs"),
                    "boot_args": words }),
        ),
        ("PUT /drives/image", drive("image", true, "Unsafe")),
        ("PUT /drives/disk", drive("disk", false, "Writeback")),
        ("PUT /vsock", json!({ "guest_cid": 3, "uds_path": "firecracker.vsock" })),
        ("PUT /entropy", json!({})),
        ("PUT /balloon", json!({ "amount_mib": 0, "deflate_on_oom": true, "free_page_reporting": true })),
        ("PUT /actions", json!({ "action_type": "InstanceStart" })),
        ("PATCH /vm", json!({ "state": "Paused" })),
        (
            "PUT /snapshot/create",
            json!({ "snapshot_type": "Full", "snapshot_path": at("state"), "mem_file_path": at("memory") }),
        ),
    ];
    let said = requests(&template);
    assert_eq!(said.len(), expected.len(), "{said:#?}");
    for ((request, body, status), (expected, expected_body)) in said.iter().zip(&expected) {
        assert_eq!((request.as_str(), body, *status), (*expected, expected_body, 204));
    }

    let config = bed.config(false);
    let mut vm = bed.hypervisor.restore(&config, &template).unwrap();
    vm.disk_resized(1 << 30).unwrap();
    vm.balloon(MEMORY - (64 << 20)).unwrap();
    vm.state().unwrap();
    let expected = [
        (
            "PUT /snapshot/load",
            json!({ "snapshot_path": at("state"),
                    "mem_backend": { "backend_type": "File", "backend_path": at("memory") }, "resume_vm": true }),
            204,
        ),
        ("PATCH /drives/disk", json!({ "drive_id": "disk", "path_on_host": "firecracker.disk" }), 204),
        ("PATCH /balloon", json!({ "amount_mib": 64 }), 204),
        ("GET /", serde_json::Value::Null, 200),
    ];
    let said = requests(&config.directory);
    let expected = expected.map(|(request, body, status)| (request.to_owned(), body, status));
    assert_eq!(said, expected);
    assert_eq!(fs::read_link(config.directory.join("firecracker.disk")).unwrap(), config.disk);
}

/// A stand-in that was told nothing.
struct Raw {
    process: Child,
    directory: tempfile::TempDir,
    api: UnixStream,
}

impl Raw {
    fn start() -> Self {
        let directory = tempfile::tempdir().unwrap();
        fs::write(directory.path().join("log"), "").unwrap();
        for (name, content) in
            [("vmlinux", "\x7fELF"), ("initramfs", "0707"), ("bzImage", "MZ"), ("disk", "")]
        {
            fs::write(directory.path().join(name), content).unwrap();
        }
        let process = Command::new(std::env::current_exe().unwrap())
            .args(["--api-sock", "api.sock", "--log-path", "log", "--level", "Warning"])
            .current_dir(directory.path())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let begun = Instant::now();
        let api = loop {
            match UnixStream::connect(directory.path().join("api.sock")) {
                Ok(api) => break api,
                Err(error) => assert!(begun.elapsed() < Duration::from_secs(20), "{error}"),
            }
            std::thread::sleep(Duration::from_millis(2));
        };
        Self { process, directory, api }
    }

    /// The status and the body.
    fn ask(&mut self, request: &str, body: &str) -> (u16, String) {
        let length = body.len();
        let type_and_length = if body.is_empty() {
            String::new()
        } else {
            format!("Content-Type: application/json\r\nContent-Length: {length}\r\n")
        };
        write!(self.api, "{request} HTTP/1.1\r\nHost: localhost\r\n{type_and_length}\r\n{body}").unwrap();
        let mut heard = String::new();
        loop {
            let mut buffer = [0; 4096];
            let count = self.api.read(&mut buffer).unwrap();
            heard.push_str(std::str::from_utf8(&buffer[..count]).unwrap());
            let Some((head, body)) = heard.split_once("\r\n\r\n") else { continue };
            let length = head.lines().find_map(|line| line.strip_prefix("Content-Length: "));
            if body.len() == length.map_or(0, |length| length.parse().unwrap()) {
                break;
            }
        }
        let (head, body) = heard.split_once("\r\n\r\n").unwrap();
        (head[9..12].parse().unwrap(), body.to_owned())
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

const BOOT: &str = "{\"kernel_image_path\": \"vmlinux\", \"initrd_path\": \"initramfs\", \"boot_args\": \
                    \"kiln.link=vsock:1024 kiln.image=/dev/vda kiln.disk=/dev/vdb kiln.off=restart\"}";
const CREATE: &str = "{\"snapshot_path\": \"state\", \"mem_file_path\": \"memory\"}";
const LOAD: &str = "{\"snapshot_path\": \"state\", \"mem_backend\": {\"backend_type\": \"File\", \
                    \"backend_path\": \"memory\"}}";

fn refuses_what_breaks_its_rules() {
    let mut raw = Raw::start();
    let disk = "{\"drive_id\": \"d\", \"path_on_host\": \"disk\", \"is_root_device\": false, \"is_read_only\": false}";
    let steps: &[(&str, &str, u16, &str)] = &[
        ("GET /", "", 200, "Not started"),
        ("GET /", "{}", 400, "GET request cannot have a body."),
        ("PUT /machine-config", "", 400, "Empty PUT request."),
        ("PUT /nowhere", "{}", 400, "Invalid request method and/or path: PUT nowhere."),
        // Not before the start.
        ("PATCH /vm", "{\"state\": \"Paused\"}", 400, "before starting"),
        ("PATCH /balloon", "{\"amount_mib\": 1}", 400, "before starting"),
        ("PATCH /drives/d", "{\"drive_id\": \"d\"}", 400, "before starting"),
        ("PUT /snapshot/create", CREATE, 400, "before starting"),
        ("PUT /actions", "{\"action_type\": \"SendCtrlAltDel\"}", 400, "before starting"),
        ("PUT /actions", "{\"action_type\": \"InstanceStart\"}", 400, "without kernel configuration"),
        // Fields.
        ("PUT /machine-config", "{\"vcpu_count\": 1}", 400, "missing field `mem_size_mib`"),
        (
            "PUT /machine-config",
            "{\"vcpu_count\": 1, \"mem_size_mib\": 8, \"ht\": true}",
            400,
            "unknown field `ht`",
        ),
        ("PUT /machine-config", "{\"vcpu_count\": \"1\", \"mem_size_mib\": 8}", 400, "invalid type: string"),
        ("PUT /machine-config", "{\"vcpu_count\": 33, \"mem_size_mib\": 8}", 400, "vCPU number is invalid"),
        ("PUT /actions", "{\"action_type\": \"Halt\"}", 400, "unknown variant `Halt`"),
        ("PUT /vsock", "{\"guest_cid\": 2, \"uds_path\": \"v\"}", 400, "CID"),
        ("PUT /drives/e", disk, 400, "does not match"),
        (
            "PUT /drives/d",
            "{\"drive_id\": \"d\", \"path_on_host\": \"none\", \"is_root_device\": false, \
          \"is_read_only\": false}",
            400,
            "No such file",
        ),
        // A machine.
        ("PUT /machine-config", "{\"vcpu_count\": 1, \"mem_size_mib\": 8}", 204, ""),
        ("PUT /drives/d", disk, 204, ""),
        ("PUT /vsock", "{\"guest_cid\": 3, \"uds_path\": \"v\"}", 204, ""),
        ("PUT /entropy", "{}", 204, ""),
        ("PUT /balloon", "{\"amount_mib\": 9, \"deflate_on_oom\": true}", 400, "too large"),
        ("PUT /boot-source", "{\"kernel_image_path\": \"bzImage\"}", 204, ""),
        ("PUT /actions", "{\"action_type\": \"InstanceStart\"}", 400, "invalid kernel image"),
        ("PUT /boot-source", BOOT, 204, ""),
        ("PUT /snapshot/load", LOAD, 400, "not allowed after configuring boot-specific resources"),
        ("PUT /actions", "{\"action_type\": \"InstanceStart\"}", 204, ""),
        // Not after the start.
        ("PUT /actions", "{\"action_type\": \"InstanceStart\"}", 400, "after starting"),
        ("PUT /machine-config", "{\"vcpu_count\": 1, \"mem_size_mib\": 8}", 400, "after starting"),
        ("PUT /boot-source", BOOT, 400, "after starting"),
        ("PUT /drives/d", disk, 400, "after starting"),
        ("PUT /vsock", "{\"guest_cid\": 3, \"uds_path\": \"v\"}", 400, "after starting"),
        ("PUT /entropy", "{}", 400, "after starting"),
        ("PUT /snapshot/load", LOAD, 400, "after starting"),
        ("PATCH /balloon", "{\"amount_mib\": 1}", 400, "Device not found"),
        ("PATCH /drives/e", "{\"drive_id\": \"e\"}", 400, "no such device"),
        ("PUT /snapshot/create", CREATE, 400, "not paused"),
        ("PATCH /vm", "{\"state\": \"Stopped\"}", 400, "unknown variant"),
        ("PATCH /vm", "{\"state\": \"Paused\"}", 204, ""),
        ("GET /", "", 200, "Paused"),
        ("PUT /snapshot/create", CREATE, 204, ""),
        ("PATCH /vm", "{\"state\": \"Resumed\"}", 204, ""),
        ("GET /", "", 200, "Running"),
    ];
    for (request, body, status, words) in steps {
        let (got, said) = raw.ask(request, body);
        assert_eq!(got, *status, "{request} {body}: {said}");
        assert!(said.contains(words), "{request} {body}: {said}");
        if *status == 400 {
            let fault: serde_json::Value = serde_json::from_str(&said).unwrap();
            assert!(fault["fault_message"].is_string() && fault.as_object().unwrap().len() == 1, "{said}");
        }
    }
    // A load that fails ends the process.
    let mut other = Raw::start();
    for name in ["state", "memory"] {
        fs::copy(raw.directory.path().join(name), other.directory.path().join(name)).unwrap();
    }
    fs::write(other.directory.path().join("memory"), "short").unwrap();
    let (status, said) = other.ask("PUT /snapshot/load", LOAD);
    assert!(status == 400 && said.contains("another size"), "{said}");
    assert_eq!(other.process.wait().unwrap().code(), Some(1));
}

fn refuses_packed_kernels() {
    let Some(bed) = bed::of(Driver::Fake) else { return };
    if !cfg!(target_arch = "x86_64") {
        return;
    }
    let mut config = bed.config(true);
    if let Some(boot) = &mut config.boot {
        boot.vmlinux = None;
    }
    let error = bed.hypervisor.create(&config).err().unwrap();
    assert!(error.to_string().contains("uncompressed kernel"), "{error}");
    assert!(error.hint_text().unwrap().contains("--hypervisor qemu"));
}

fn refuses_old_versions() {
    let directory = tempfile::tempdir().unwrap();
    for (says, ok, words) in [
        ("Firecracker v1.13.1", false, "is version 1.13.1, and 1.14 is the oldest"),
        ("Firecracker v0.25.2", false, "is version 0.25.2"),
        ("Firecracker v1.14.0", true, ""),
        ("Firecracker v2.0.0-dev", true, ""),
        ("something else", false, "makes no sense"),
        ("", false, "makes no sense"),
    ] {
        let program = directory.path().join("firecracker");
        let _ = fs::remove_file(&program);
        fs::write(&program, format!("#!/bin/sh\necho '{says}'\n")).unwrap();
        fs::set_permissions(&program, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
        match Firecracker::at(program) {
            Ok(found) => assert!(ok && says.ends_with(found.version()), "{says}"),
            Err(error) => assert!(!ok && error.to_string().contains(words), "{says}: {error}"),
        }
    }
    let missing = BackendError::from(Firecracker::at(PathBuf::from("/nowhere/firecracker")).unwrap_err());
    assert!(missing.to_string().contains("/nowhere/firecracker"), "{missing}");
    let no_kvm = VmmError::NoKvm { hypervisor: "Firecracker", because: "there is none".to_owned() };
    let no_kvm = BackendError::from(no_kvm);
    assert_eq!((no_kvm.kind(), no_kvm.hint_text().is_some()), (ErrorKind::Unsupported, true));
}

fn tells_refusals() {
    let Some(bed) = bed::of(Driver::Fake) else { return };
    let mut config = bed.config(true);
    config.cpus = 33;
    let error = bed.hypervisor.create(&config).err().unwrap().to_string();
    assert_eq!(
        error,
        "the hypervisor refused `PUT /machine-config`: Machine config error: The vCPU number is invalid!"
    );
    let (mut vm, _link) = bed.restored();
    let error = vm.save(tempfile::tempdir().unwrap().path()).unwrap_err().to_string();
    assert!(error.contains("refused `PUT /snapshot/create`: Create snapshot error: "), "{error}");
}

fn tells_last_words() {
    let Some(bed) = bed::of(Driver::Fake) else { return };
    let mut config = bed.config(false);
    config.memory_file = config.directory.join("other");
    fs::write(&config.memory_file, "short").unwrap();
    // A template's own memory would be found beside its state.
    let saved = tempfile::tempdir().unwrap();
    fs::copy(bed.template().join("state"), saved.path().join("state")).unwrap();
    let error = bed.hypervisor.restore(&config, saved.path()).err().unwrap().to_string();
    assert!(error.contains("is not a saved machine") && error.contains("another size"), "{error}");
    let (mut vm, _link) = bed.restored();
    assert!(vm.last_words().is_none());
    let pid = rustix::process::Pid::from_raw(vm.pid().unwrap() as i32).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
    let error = vm.pause().unwrap_err().to_string();
    assert!(error.contains(" ended: "), "{error}");
    assert!(vm.last_words().is_some());
}

fn carries_bulk() {
    let Some(bed) = bed::of(Driver::Fake) else { return };
    let (mut vm, link) = bed.restored();
    run(async {
        let session = begin(HostLink::restored(stream(link))).await;
        let stream = session.open(99).await.unwrap();
        let (mut reader, mut writer) = tokio::io::split(stream);
        let sent: Vec<u8> = (0..6_000_000_u32).map(|n| (n % 251) as u8).collect();
        let expected = sent.clone();
        let writing = tokio::spawn(async move {
            writer.write_all(&sent).await.unwrap();
            writer.shutdown().await.unwrap();
        });
        // Paused in the middle, it goes on where it was.
        let mut back = vec![0; 1_000_000];
        reader.read_exact(&mut back).await.unwrap();
        vm.pause().unwrap();
        tokio::time::sleep(Duration::from_millis(50)).await;
        vm.resume().unwrap();
        reader.read_to_end(&mut back).await.unwrap();
        writing.await.unwrap();
        assert!(back == expected, "{} bytes came back", back.len());
        ask(&session).await;
    });
}

fn lives_in_any_directory() {
    let Some(bed) = bed::of(Driver::Fake) else { return };
    // Longer than the address of a socket may be.
    let mut config = bed.config(false);
    let long = config.directory.join("a name, with \"spaces\" and more than that".repeat(4));
    fs::create_dir(&long).unwrap();
    config.directory = long;
    let mut vm = bed.hypervisor.restore(&config, &bed.template()).unwrap();
    let link = vm.link().unwrap();
    run(async {
        let session = begin(HostLink::restored(stream(link))).await;
        ask(&session).await;
    });
    // Once more in the same one, over what was left there.
    drop(vm);
    let mut vm = bed.hypervisor.restore(&config, &bed.template()).unwrap();
    let link = vm.link().unwrap();
    run(async { ask(&begin(HostLink::restored(stream(link))).await).await });
}
