//! Made-up kernels are installed, found and removed.

mod support;

use std::io::Write as _;
use std::path::Path;

use kiln_boot::{Arch, BootError, Form, Kernel, Kernels, Source, initramfs};
use kiln_contract::{Home, Silent};
use support::{VERSION, ar, bzimage, deb, module, package_files, read_cpio, tar, unpack};

fn kernels(directory: &Path) -> Kernels {
    Kernels::open(&Home::at(directory.join("home")))
}

/// The text of a file of `kernel`'s initramfs.
fn text(kernel: &Kernel, name: &str) -> String {
    let members = read_cpio(&initramfs(kernel, b"guest").unwrap());
    let member = members.into_iter().find(|member| member.name == name).unwrap();
    String::from_utf8(member.content).unwrap()
}

#[test]
fn a_package_is_installed_however_its_data_is_compressed() {
    let plain = tar(&package_files());
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gzip.write_all(&plain).unwrap();
    let forms = [
        ("data.tar", plain.clone()),
        ("data.tar.gz", gzip.finish().unwrap()),
        ("data.tar.zst", zstd::encode_all(&plain[..], 1).unwrap()),
    ];
    for (name, data) in forms {
        let directory = tempfile::tempdir().unwrap();
        let package = deb(directory.path(), name, &data);
        let kernel =
            kernels(directory.path()).install(&Source::Packages(vec![package]), None, &Silent).unwrap();
        assert_eq!(kernel.version(), VERSION, "{name}");
        assert_eq!(std::fs::read(kernel.image()).unwrap(), bzimage(VERSION), "{name}");
        assert_eq!(kernel.record().builtin, ["fuse"], "{name}");
        assert!(kernel.record().absent.contains(&"CONFIG_NF_TABLES".to_owned()), "{name}");
    }
}

#[test]
fn modules_are_loaded_after_what_they_need_and_later_ones_stay_apart() {
    let directory = tempfile::tempdir().unwrap();
    unpack(directory.path(), &package_files());
    let kernels = kernels(directory.path());
    let kernel = kernels.install(&Source::Path(directory.path().into()), None, &Silent).unwrap();
    let load = text(&kernel, "modules/load");
    let at = |name: &str| {
        let line = format!("/modules/{name}.ko");
        load.lines().position(|found| found == line).unwrap_or_else(|| panic!("{name} is not in\n{load}"))
    };
    for (first, second) in [
        ("virtio", "virtio_mmio"),
        ("virtio_ring", "virtio_mmio"),
        ("vsock", "vmw_vsock_virtio_transport"),
        ("9pnet", "9p"),
        ("9pnet", "9pnet_fd"),
        ("crc32c_generic", "ext4"),
    ] {
        assert!(at(first) < at(second), "{first} must be loaded before {second}:\n{load}");
    }
    assert!(!load.contains("bridge"), "{load}");
    assert!(!load.contains("virtio-rng"), "files are named as the kernel names modules: {load}");
    assert_eq!(
        text(&kernel, "modules/later"),
        "/modules/llc.ko\n/modules/stp.ko llc\n/modules/bridge.ko stp llc\n"
    );
    assert_eq!(text(&kernel, "modules/alias"), "rtnl-link-bridge bridge\n");
}

#[test]
fn an_initramfs_holds_the_guest_a_console_and_mount_points_and_is_always_the_same() {
    let directory = tempfile::tempdir().unwrap();
    unpack(directory.path(), &package_files());
    let kernels = kernels(directory.path());
    let kernel = kernels.install(&Source::Path(directory.path().into()), None, &Silent).unwrap();
    let archive = initramfs(&kernel, b"a guest").unwrap();
    assert_eq!(archive.len() % 512, 0);
    assert_eq!(archive, initramfs(&kernel, b"a guest").unwrap());
    let members = read_cpio(&archive);
    let find = |name: &str| members.iter().find(|member| member.name == name).unwrap();
    assert_eq!((find("init").mode, &find("init").content[..]), (0o100_755, &b"a guest"[..]));
    assert_eq!((find("dev/console").mode, find("dev/console").device), (0o020_600, (5, 1)));
    for (name, mode) in [("dev", 0o755), ("proc", 0o555), ("sys", 0o555), ("run", 0o755), ("tmp", 0o1777)] {
        assert_eq!(find(name).mode, 0o040_000 | mode, "{name}");
    }
    assert_eq!(find("modules/virtio_rng.ko").content, module(&["name=virtio_rng", "depends=virtio"]));
    assert!(members.iter().all(|member| member.name != "modules/unwanted.ko"));
}

#[test]
fn compressed_modules_are_decompressed() {
    let directory = tempfile::tempdir().unwrap();
    let mut files = package_files();
    let mut expected = Vec::new();
    for (path, content) in &mut files {
        if path.ends_with("/erofs.ko") {
            expected.clone_from(content);
            *content = zstd::encode_all(&content[..], 1).unwrap();
            path.push_str(".zst");
        } else if path.ends_with("/overlay.ko") {
            let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
            gzip.write_all(content).unwrap();
            *content = gzip.finish().unwrap();
            path.push_str(".gz");
        }
    }
    unpack(directory.path(), &files);
    let kernels = kernels(directory.path());
    let kernel = kernels.install(&Source::Path(directory.path().into()), None, &Silent).unwrap();
    let members = read_cpio(&initramfs(&kernel, b"").unwrap());
    let erofs = members.iter().find(|member| member.name == "modules/erofs.ko").unwrap();
    assert_eq!(erofs.content, expected);
    let overlay = members.iter().find(|member| member.name == "modules/overlay.ko").unwrap();
    assert_eq!(overlay.content, module(&["depends="]));
}

#[test]
fn a_kernel_that_lacks_something_is_refused_with_the_options_that_it_needs() {
    let directory = tempfile::tempdir().unwrap();
    let files: Vec<_> = package_files()
        .into_iter()
        .filter(|(path, _)| !path.ends_with("/erofs.ko") && !path.ends_with("/tun.ko"))
        .collect();
    unpack(directory.path(), &files);
    let error =
        kernels(directory.path()).install(&Source::Path(directory.path().into()), None, &Silent).unwrap_err();
    assert_eq!(
        error.to_string(),
        "the kernel 6.1.0-test lacks what machines need: erofs (CONFIG_EROFS_FS), tun (CONFIG_TUN)"
    );
    assert!(kernels(directory.path()).list().unwrap().is_empty());
}

#[test]
fn modules_that_cannot_be_right_are_refused() {
    let other = module(&["depends="]);
    let at = other.windows(6).position(|window| window == b"6.1.0-").unwrap();
    let mut for_another_kernel = other.clone();
    for_another_kernel[at] = b'5';
    let cases: [(&str, Vec<u8>, &str); 5] = [
        ("/erofs.ko", b"no module".to_vec(), "is not a kernel module"),
        ("/erofs.ko", module(&["depends=nowhere"]), "needs nowhere, which is not there"),
        ("/9pnet.ko", module(&["depends=9p"]), "need each other in a circle"),
        ("/erofs.ko", for_another_kernel, "it is for the kernel 5.1.0-test, not for 6.1.0-test"),
        ("/erofs.ko", other[..other.len() - 70].to_vec(), "is not a kernel module"),
    ];
    for (name, content, expected) in cases {
        let directory = tempfile::tempdir().unwrap();
        let mut files = package_files();
        files.iter_mut().find(|(path, _)| path.ends_with(name)).unwrap().1 = content;
        unpack(directory.path(), &files);
        let error = kernels(directory.path())
            .install(&Source::Path(directory.path().into()), None, &Silent)
            .unwrap_err();
        assert!(error.to_string().contains(expected), "{name}: {error}");
    }
}

#[test]
fn damaged_packages_are_refused_and_leave_nothing() {
    let whole = tar(&package_files());
    let cut = zstd::encode_all(&whole[..], 1).unwrap();
    let two = {
        let mut files = package_files();
        files.push(("./boot/vmlinuz-other".into(), bzimage("other")));
        tar(&files)
    };
    let cases: [(&str, Vec<u8>); 8] = [
        ("it is too short", b"!<ar".to_vec()),
        ("it does not begin as an archive", b"a text, and no archive at all".to_vec()),
        ("it has no data.tar", ar(&[("debian-binary", b"2.0\n")])),
        ("it is damaged", ar(&[("debian-binary", b"2.0\n")]).replace_size()),
        ("it is damaged", ar(&[("data.tar.zst", &cut[..cut.len() / 2])])),
        ("it is damaged", ar(&[("data.tar", &[b'x'; 1024])])),
        ("there is no boot/vmlinuz-* in it", ar(&[("data.tar", &tar(&[]))])),
        ("it has several kernels", ar(&[("data.tar", &two)])),
    ];
    for (expected, bytes) in cases {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("package.deb");
        std::fs::write(&path, bytes).unwrap();
        let error =
            kernels(directory.path()).install(&Source::Packages(vec![path]), None, &Silent).unwrap_err();
        assert!(error.to_string().contains(expected), "{expected}: {error}");
        let left: Vec<_> = std::fs::read_dir(directory.path().join("home/kernels"))
            .unwrap()
            .map(|entry| entry.unwrap().file_name())
            .collect();
        assert_eq!(left, [".lock"], "{expected}");
    }
}

trait Damage {
    fn replace_size(self) -> Self;
}

impl Damage for Vec<u8> {
    /// Makes the size of the first member no number.
    fn replace_size(mut self) -> Self {
        self[8 + 48..8 + 58].copy_from_slice(b"-1        ");
        self
    }
}

#[test]
fn names_in_a_package_reach_nothing_outside() {
    let directory = tempfile::tempdir().unwrap();
    let mut files = package_files();
    // `tar::Builder` refuses to write such names; the header is made by hand below.
    files.retain(|(path, _)| !path.contains("boot/config"));
    let mut data = tar(&files);
    data.truncate(data.len() - 1024);
    for name in ["lib/../../../../escaped.ko", "boot/vmlinuz-x/../../../escaped"] {
        let mut header = tar::Header::new_gnu();
        header.as_old_mut().name[..name.len()].copy_from_slice(name.as_bytes());
        header.set_size(4);
        header.set_entry_type(tar::EntryType::Regular);
        header.set_cksum();
        data.extend_from_slice(header.as_bytes());
        let mut block = [0; 512];
        block[..4].copy_from_slice(b"evil");
        data.extend_from_slice(&block);
    }
    data.resize(data.len() + 1024, 0);
    let package = deb(directory.path(), "data.tar", &data);
    let error =
        kernels(directory.path()).install(&Source::Packages(vec![package]), None, &Silent).unwrap_err();
    assert!(error.to_string().contains("several kernels"), "{error}");
    let mut found = vec![directory.path().to_path_buf()];
    while let Some(path) = found.pop() {
        assert!(!path.file_name().unwrap().to_string_lossy().contains("escaped"), "{}", path.display());
        if path.is_dir() {
            found.extend(std::fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()));
        }
    }
}

#[test]
fn a_kernel_keeps_its_name_and_the_newest_is_the_default_until_one_is_chosen() {
    let directory = tempfile::tempdir().unwrap();
    let kernels = kernels(directory.path());
    assert!(matches!(kernels.default(), Err(BootError::NoneInstalled)));
    let monolithic = |version: &str| {
        let path = directory.path().join(format!("kernel-{version}"));
        std::fs::write(&path, bzimage(version)).unwrap();
        Source::Path(path)
    };
    for version in ["6.9.1", "6.10.2", "6.1.100"] {
        kernels.install(&monolithic(version), None, &Silent).unwrap();
    }
    let names = || kernels.list().unwrap().iter().map(|kernel| kernel.name().to_owned()).collect::<Vec<_>>();
    assert_eq!(names(), ["6.10.2", "6.9.1", "6.1.100"]);
    if cfg!(target_arch = "x86_64") {
        assert_eq!(kernels.default().unwrap().name(), "6.10.2");
        kernels.set_default("6.9.1").unwrap();
        assert_eq!(kernels.default().unwrap().name(), "6.9.1");
        assert!(matches!(kernels.remove("6.9.1", false), Err(BootError::IsDefault { .. })));
        kernels.remove("6.9.1", true).unwrap();
        assert_eq!(kernels.default().unwrap().name(), "6.10.2");
    }
    // The same again is no error; another one under the same name is.
    kernels.install(&monolithic("6.10.2"), None, &Silent).unwrap();
    let error = kernels.install(&monolithic("6.1.100"), Some("6.10.2"), &Silent).unwrap_err();
    assert!(matches!(error, BootError::NameTaken { .. }), "{error}");
    kernels.install(&monolithic("6.1.100"), Some("old"), &Silent).unwrap();
    assert_eq!(kernels.find("old").unwrap().version(), "6.1.100");
    // Another kernel of the same version gets a name of its own, and goes before the older one.
    let mut rebuilt = bzimage("6.10.2");
    rebuilt[0xf00] = 1;
    let path = directory.path().join("rebuilt");
    std::fs::write(&path, rebuilt).unwrap();
    for _ in 0..2 {
        let kernel = kernels.install(&Source::Path(path.clone()), None, &Silent).unwrap();
        assert_eq!(kernel.name(), "6.10.2-2");
    }
    assert_eq!(names()[..2], ["6.10.2-2", "6.10.2"]);
    for bad in ["", "default", "..", "a/b", ".hidden", "a b"] {
        assert!(
            matches!(kernels.install(&monolithic("1"), Some(bad), &Silent), Err(BootError::BadName { .. })),
            "{bad:?}"
        );
    }
    assert!(matches!(kernels.find("none"), Err(BootError::NoSuchKernel { .. })));
    assert!(matches!(kernels.remove("none", true), Err(BootError::NoSuchKernel { .. })));
}

#[test]
fn what_an_interrupted_installation_left_is_swept() {
    let directory = tempfile::tempdir().unwrap();
    let left = directory.path().join("home/kernels/.making-left/made");
    std::fs::create_dir_all(&left).unwrap();
    let path = directory.path().join("kernel");
    std::fs::write(&path, bzimage("6.1.1")).unwrap();
    let kernels = kernels(directory.path());
    assert!(kernels.list().unwrap().is_empty());
    kernels.install(&Source::Path(path), None, &Silent).unwrap();
    assert!(!left.exists());
}

#[test]
fn a_record_of_a_newer_version_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("kernel");
    std::fs::write(&path, bzimage("6.1.1")).unwrap();
    let kernels = kernels(directory.path());
    let kernel = kernels.install(&Source::Path(path), None, &Silent).unwrap();
    let record = kernel.directory().join("kernel.json");
    let text = std::fs::read_to_string(&record).unwrap();
    std::fs::write(&record, text.replace("\"format\": 1", "\"format\": 2")).unwrap();
    let error = kernels.find("6.1.1").unwrap_err();
    assert!(error.to_string().ends_with("it has the format 2, and this version knows 1"), "{error}");
}

#[test]
fn signatures_and_types_are_taken_out_of_modules_unless_the_kernel_insists_on_them() {
    let plain = module(&["depends="]);
    let mut signed = plain.clone();
    signed.extend_from_slice(&[0x30; 64]);
    signed.extend_from_slice(&[0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 64]);
    signed.extend_from_slice(b"~Module signature appended~\n");
    for (config, kept) in [
        (Some("CONFIG_FUSE_FS=y\nCONFIG_MODULE_SIG=y\n# CONFIG_MODULE_SIG_FORCE is not set\n"), &plain),
        (Some("CONFIG_FUSE_FS=y\nCONFIG_MODULE_SIG_FORCE=y\n"), &signed),
        (None, &signed),
    ] {
        let directory = tempfile::tempdir().unwrap();
        let mut files = package_files();
        files.iter_mut().find(|(path, _)| path.ends_with("/erofs.ko")).unwrap().1.clone_from(&signed);
        files.retain(|(path, _)| !path.contains("boot/config"));
        files.extend(config.map(|text| (format!("./boot/config-{VERSION}"), text.as_bytes().to_vec())));
        unpack(directory.path(), &files);
        let kernel =
            kernels(directory.path()).install(&Source::Path(directory.path().into()), None, &Silent).unwrap();
        let erofs = std::fs::read(kernel.directory().join("modules/erofs.ko")).unwrap();
        assert_eq!(&erofs, kept, "{config:?}");
    }
}

#[test]
fn a_kernel_that_cannot_be_read_keeps_no_other_from_being_used_and_can_be_removed() {
    let directory = tempfile::tempdir().unwrap();
    let kernels = kernels(directory.path());
    for version in ["6.1.1", "6.1.2"] {
        let path = directory.path().join("kernel");
        std::fs::write(&path, bzimage(version)).unwrap();
        kernels.install(&Source::Path(path), None, &Silent).unwrap();
    }
    std::fs::write(directory.path().join("home/kernels/6.1.2/kernel.json"), "{").unwrap();
    assert_eq!(kernels.list().unwrap().len(), 1);
    assert!(matches!(kernels.find("6.1.2"), Err(BootError::Format { .. })));
    kernels.remove("6.1.2", false).unwrap();
    assert!(matches!(kernels.find("6.1.2"), Err(BootError::NoSuchKernel { .. })));
}

#[test]
fn a_kernel_is_taken_with_what_lies_beside_it_even_through_a_link() {
    let directory = tempfile::tempdir().unwrap();
    unpack(directory.path(), &package_files());
    let link = directory.path().join("vmlinuz");
    std::os::unix::fs::symlink(format!("boot/vmlinuz-{VERSION}"), &link).unwrap();
    let kernel = kernels(directory.path()).install(&Source::Path(link), None, &Silent).unwrap();
    assert!(kernel.record().modules.iter().any(|module| module.name == "erofs"));
    assert_eq!(kernel.record().builtin, ["fuse"]);
}

#[test]
fn a_kernel_without_modules_is_believed_what_its_configuration_says() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("bzImage");
    std::fs::write(&path, bzimage(VERSION)).unwrap();
    let install = |config: &str| {
        std::fs::write(directory.path().join(".config"), config).unwrap();
        kernels(directory.path()).install(&Source::Path(path.clone()), None, &Silent)
    };
    let error = install("CONFIG_EROFS_FS=y\n# CONFIG_EXT4_FS is not set\nCONFIG_TUN=m\n").unwrap_err();
    let BootError::Lacks { missing, .. } = &error else { panic!("{error}") };
    let missing: Vec<_> = missing.iter().map(|missing| missing.module).collect();
    assert!(missing.contains(&"ext4") && missing.contains(&"tun") && !missing.contains(&"erofs"), "{error}");
}

#[test]
fn a_record_of_format_1_is_read_as_it_was_written() {
    let directory = tempfile::tempdir().unwrap();
    std::fs::write(directory.path().join("kernel.json"), include_str!("samples/kernel-1.json")).unwrap();
    let kernel = Kernel::load(directory.path()).unwrap();
    assert_eq!((kernel.name(), kernel.version(), kernel.arch()), ("debian", "6.1.0-47-amd64", Arch::X86_64));
    let record = kernel.record();
    assert!(matches!(&record.source, Source::Packages(paths) if paths.len() == 1));
    assert_eq!((record.form, record.vmlinux, record.pvh), (Form::BzImage, true, true));
    assert_eq!(record.digest.short(), "5d5b09f6dcb2");
    let modules: Vec<_> = record.modules.iter().map(|module| (&module.name[..], module.at_boot)).collect();
    assert_eq!(modules, [("virtio", true), ("stp", false), ("bridge", false)]);
    assert_eq!((&record.modules[1].needs[..], record.modules[1].aliases.len()), (&["llc".to_owned()][..], 0));
    assert_eq!((&record.builtin[0][..], &record.absent[0][..]), ("fuse", "CONFIG_IP_VS"));
    assert_eq!(kernel.for_qemu(), directory.path().join("vmlinux"));
}

#[test]
fn a_record_with_a_module_that_would_be_a_path_is_refused() {
    let sample = include_str!("samples/kernel-1.json");
    for name in ["../../../etc/shadow", "", "a/b", &"x".repeat(80)] {
        let directory = tempfile::tempdir().unwrap();
        let record = sample.replace("\"bridge\"", &format!("{name:?}"));
        std::fs::write(directory.path().join("kernel.json"), record).unwrap();
        let error = Kernel::load(directory.path()).unwrap_err();
        assert!(error.to_string().contains("cannot name a module"), "{name}: {error}");
    }
}

#[test]
fn names_in_a_kernel_that_would_break_the_lists_of_an_initramfs_are_left_out() {
    let directory = tempfile::tempdir().unwrap();
    let mut files = package_files();
    let bridge = &mut files.iter_mut().find(|(path, _)| path.ends_with("/bridge.ko")).unwrap().1;
    *bridge = module(&["depends=", "alias=one two", "alias=two\nthree", "alias=pci:v*", "alias=fine"]);
    files.push((format!("./lib/modules/{VERSION}/kernel/a\n/modules/evil.ko"), module(&["depends="])));
    let package = deb(directory.path(), "data.tar", &tar(&files));
    let kernel = kernels(directory.path()).install(&Source::Packages(vec![package]), None, &Silent).unwrap();
    assert_eq!(text(&kernel, "modules/alias"), "fine bridge\n");
    assert_eq!(text(&kernel, "modules/later"), "/modules/bridge.ko\n");
}
