//! Images in files, exchanged with `skopeo` and `umoci`.

mod support;

use std::path::{Path, PathBuf};
use std::process::Command;

use kiln_contract::{Digest, Silent};
use kiln_fixtures::{busybox_rootfs, oci_layout, require};
use kiln_registry::{Compression, Format, Named, RegistryError, Result, export, import};
use kiln_store::{Image, ImportLimits};
use support::{HandMade, TestStore, gzip, name, run, tar};

fn read(store: &TestStore, path: &Path) -> Result<Named> {
    import(&store.store, path, None, None, None, ImportLimits::default(), &Silent)
}

fn import_as(store: &TestStore, path: &Path, format: Format) -> Image {
    let images =
        import(&store.store, path, Some(format), None, None, ImportLimits::default(), &Silent).unwrap();
    images[0].1.clone()
}

fn skopeo_copy(from: &str, to: &str) {
    run(Command::new(require("skopeo").unwrap()).args(["--insecure-policy", "copy", from, to]));
}

/// The layout of busybox, imported as `kiln.test/busybox:1`.
fn busybox(store: &TestStore) -> Option<(PathBuf, Image)> {
    require("skopeo")?;
    let layout = oci_layout(&busybox_rootfs()?, "latest")?;
    let name = name("kiln.test/busybox:1");
    let images =
        import(&store.store, &layout, None, Some(&name), None, ImportLimits::default(), &Silent).unwrap();
    assert_eq!(images.len(), 1);
    assert_eq!(images[0].0.as_ref(), Some(&name));
    Some((layout, images[0].1.clone()))
}

#[test]
fn every_format_that_kiln_writes_is_read_by_skopeo_and_by_kiln() {
    let store = TestStore::new();
    let Some((_, image)) = busybox(&store) else { return };
    let named = [(Some(name("kiln.test/busybox:1")), image.clone())];
    for (format, compression, file, transport) in [
        (Format::OciLayout, Compression::Gzip, "layout", "oci:{}:1"),
        (Format::OciLayout, Compression::None, "plain-layout", "oci:{}:1"),
        (Format::OciArchive, Compression::Zstd, "oci.tar", "oci-archive:{}:1"),
        (Format::DockerArchive, Compression::Gzip, "docker.tar", "docker-archive:{}"),
    ] {
        let path = store.dir.path().join(file);
        export(&store.store, &named, format, &path, compression, &Silent).unwrap();
        let source = transport.replace("{}", path.to_str().unwrap());
        let copy = store.dir.path().join(format!("copy-of-{file}"));
        skopeo_copy(&source, &format!("dir:{}", copy.display()));
        let manifest: serde_json::Value =
            serde_json::from_slice(&std::fs::read(copy.join("manifest.json")).unwrap()).unwrap();
        assert_eq!(manifest["config"]["digest"], image.id.to_string(), "{file}");

        let empty = TestStore::new();
        let back = read(&empty, &path).unwrap();
        assert_eq!(back.len(), 1, "{file}");
        assert_eq!((back[0].1.id, &back[0].1.layers), (image.id, &image.layers), "{file}");
        assert_eq!(back[0].0, named[0].0, "{file}");
        assert!(empty.store.resolve("kiln.test/busybox:1").is_ok(), "{file}");
    }
}

#[test]
fn umoci_unpacks_a_layout_that_kiln_wrote() {
    let Some(umoci) = require("umoci") else { return };
    let store = TestStore::new();
    let Some((_, image)) = busybox(&store) else { return };
    let path = store.dir.path().join("layout");
    export(
        &store.store,
        &[(Some(name("box:7")), image)],
        Format::OciLayout,
        &path,
        Compression::Gzip,
        &Silent,
    )
    .unwrap();
    let bundle = store.dir.path().join("bundle");
    let mut unpack = Command::new(umoci);
    unpack.args(["unpack", "--rootless", "--image"]).arg(format!("{}:7", path.display()));
    run(unpack.arg(&bundle));
    assert!(bundle.join("rootfs/bin/busybox").exists());
}

/// Kind, mode, links, size and target of all files below a directory; sizes and links of directories are the file system's.
fn listing(root: &Path) -> String {
    let script = "find . -type d -printf '%P d %m\\n' -o -printf '%P %y %m %n %s %l\\n' | sort";
    run(Command::new("sh").args(["-ec", script]).current_dir(root))
}

#[test]
fn the_root_filesystem_of_a_stack_is_what_umoci_unpacks() {
    let Some(umoci) = require("umoci") else { return };
    let Some(unpacker) = require("tar") else { return };
    let store = TestStore::new();
    let Some((_, base)) = busybox(&store) else { return };
    let layer = |tar: &[u8]| store.store.import_tar(tar, None, Default::default()).unwrap().layer;
    let removes = layer(&tar(&[("bin/.wh.sh", b""), ("etc/added", &[7; 5000]), ("etc/small", b"1")]));
    let changes = layer(&tar(&[("etc/added", &[8; 6000]), ("srv/new/file", b"2")]));
    let stack = [base.layers.clone(), vec![removes, changes]].concat();
    let image = store.store.make_image(&base.config, &stack).unwrap();
    let path = |file: &str| store.dir.path().join(file);
    let named = [(Some(name("box:7")), image)];
    export(&store.store, &named, Format::OciLayout, &path("layout"), Compression::Gzip, &Silent).unwrap();
    let mut unpack = Command::new(umoci);
    unpack.args(["unpack", "--rootless", "--image"]).arg(format!("{}:7", path("layout").display()));
    run(unpack.arg(path("bundle")));
    let expected = listing(&path("bundle/rootfs"));
    assert!(expected.contains("srv/new/file f 644 1 1") && !expected.contains("bin/sh "), "{expected}");
    for (compression, file) in
        [(Compression::None, "root.tar"), (Compression::Gzip, "root.tgz"), (Compression::Zstd, "root.zst")]
    {
        export(&store.store, &named, Format::Rootfs, &path(file), compression, &Silent).unwrap();
        if compression != Compression::Zstd {
            let unpacked = path(&format!("{file}.d"));
            std::fs::create_dir(&unpacked).unwrap();
            run(Command::new(&unpacker).args(["-xp", "-C"]).arg(&unpacked).arg("-f").arg(path(file)));
            assert_eq!(listing(&unpacked), expected, "{file}");
        }
        let empty = TestStore::new();
        let back = import_as(&empty, &path(file), Format::Rootfs);
        assert_eq!(
            std::fs::read(empty.store.merged_tree(&back.layers).unwrap()).unwrap(),
            std::fs::read(store.store.merged_tree(&stack).unwrap()).unwrap(),
            "{file}"
        );
    }
    let two = [named[0].clone(), (None, base)];
    let refused = export(&store.store, &two, Format::Rootfs, &path("x"), Compression::None, &Silent);
    assert!(matches!(refused, Err(RegistryError::Unsupported { .. })), "{refused:?}");
    assert!(!path("x").exists());
}

#[test]
fn what_skopeo_writes_is_read_however_it_is_packed_and_wherever_it_comes_from() {
    let store = TestStore::new();
    let Some((layout, image)) = busybox(&store) else { return };
    let from = format!("oci:{}:latest", layout.display());
    let path = |file: &str| store.dir.path().join(file);
    skopeo_copy(&from, &format!("docker-archive:{}:me/box:3", path("docker.tar").display()));
    skopeo_copy(&from, &format!("oci-archive:{}:latest", path("oci.tar").display()));
    for (file, packed) in [("docker.tar", "docker.tar.gz"), ("oci.tar", "oci.tar.gz")] {
        std::fs::write(path(packed), gzip(&std::fs::read(path(file)).unwrap())).unwrap();
    }
    for file in ["docker.tar", "docker.tar.gz", "oci.tar", "oci.tar.gz"] {
        // A pipe is as standard input is: it is read once, from the beginning to the end.
        for piped in [false, true] {
            let empty = TestStore::new();
            let images = if piped {
                let fifo = empty.dir.path().join("fifo");
                run(Command::new("mkfifo").arg(&fifo));
                let (source, target) = (path(file), fifo.clone());
                let writer = std::thread::spawn(move || {
                    // Opened once: a pipe that its writer has closed is at its end.
                    let mut out = std::fs::File::options().write(true).open(target)?;
                    std::io::copy(&mut std::fs::File::open(source)?, &mut out)
                });
                let images = read(&empty, &fifo).unwrap();
                writer.join().unwrap().unwrap();
                images
            } else {
                read(&empty, &path(file)).unwrap()
            };
            assert_eq!(images.len(), 1, "{file}");
            assert_eq!(images[0].1.layers, image.layers, "{file}");
            let named = images[0].0.as_ref().map(kiln_store::ImageName::familiar);
            assert_eq!(named.as_deref(), file.starts_with("docker").then_some("me/box:3"), "{file}");
            let left: Vec<_> = std::fs::read_dir(empty.store.path().join("tmp")).unwrap().collect();
            assert!(left.is_empty(), "{left:?}");
        }
    }
}

#[test]
fn several_images_share_an_archive() {
    let store = TestStore::new();
    let shared = tar(&[("shared", b"by both")]);
    let mut images = Vec::new();
    for n in 0..2 {
        let own = tar(&[("own", format!("{n}").as_bytes())]);
        let layers: Vec<Digest> = [&shared, &own]
            .iter()
            .map(|tar| store.store.import_tar(&tar[..], None, Default::default()).unwrap().layer)
            .collect();
        let image = store.store.make_image(&Default::default(), &layers).unwrap();
        images.push((Some(name(&format!("kiln.test/many/{n}:1"))), image.clone()));
        images.push((Some(name(&format!("kiln.test/many/{n}:2"))), image));
    }
    for (format, file) in [
        (Format::DockerArchive, "docker.tar"),
        (Format::OciArchive, "oci.tar"),
        (Format::OciLayout, "layout"),
    ] {
        let path = store.dir.path().join(file);
        export(&store.store, &images, format, &path, Compression::Gzip, &Silent).unwrap();
        let empty = TestStore::new();
        let mut back: Vec<_> =
            read(&empty, &path).unwrap().into_iter().map(|(name, image)| (name, image.id)).collect();
        let mut expected: Vec<_> = images.iter().map(|(name, image)| (name.clone(), image.id)).collect();
        back.sort();
        expected.sort();
        assert_eq!(back, expected, "{file}");
    }
}

#[test]
fn a_layout_keeps_what_it_has_and_replaces_what_has_the_same_name() {
    let store = TestStore::new();
    let path = store.dir.path().join("layout");
    let image = |text: &str| {
        let layer =
            store.store.import_tar(&tar(&[("a", text.as_bytes())])[..], None, Default::default()).unwrap();
        store.store.make_image(&Default::default(), &[layer.layer]).unwrap()
    };
    let (one, two, three) = (image("1"), image("2"), image("3"));
    for (tag, image) in [("a", &one), ("b", &two), ("a", &three)] {
        let named = [(Some(name(&format!("kiln.test/x:{tag}"))), image.clone())];
        export(&store.store, &named, Format::OciLayout, &path, Compression::Gzip, &Silent).unwrap();
    }
    let empty = TestStore::new();
    read(&empty, &path).unwrap();
    assert_eq!(empty.store.resolve("kiln.test/x:a").unwrap().id, three.id);
    assert_eq!(empty.store.resolve("kiln.test/x:b").unwrap().id, two.id);
}

#[test]
fn a_root_filesystem_becomes_an_image_of_one_layer() {
    let store = TestStore::new();
    let root = store.dir.path().join("root");
    std::fs::create_dir_all(root.join("etc")).unwrap();
    std::fs::write(root.join("etc/hostname"), "kiln\n").unwrap();
    let plain = tar(&[("etc/hostname", b"kiln\n")]);
    let path = |file: &str, content: &[u8]| {
        let path = store.dir.path().join(file);
        std::fs::write(&path, content).unwrap();
        path
    };
    for (source, format) in [
        (root.clone(), None),
        (root, Some(Format::Rootfs)),
        (path("root.tar", &plain), None),
        (path("root.tar.gz", &gzip(&plain)), None),
        (path("root2.tar.gz", &gzip(&plain)), Some(Format::Rootfs)),
    ] {
        let name = name("kiln.test/root:1");
        let images =
            import(&store.store, &source, format, Some(&name), None, ImportLimits::default(), &Silent)
                .unwrap();
        let (_, image) = &images[0];
        assert_eq!(image.layers.len(), 1);
        assert_eq!(store.store.resolve("kiln.test/root:1").unwrap().id, image.id);
        let mut tar = Vec::new();
        store.store.export_tar(&image.layers[0], &mut tar).unwrap();
        assert!(tar.windows(13).any(|part| part.starts_with(b"etc/hostname")), "{}", source.display());
    }
}

#[test]
fn archives_that_lie_are_refused() {
    let store = TestStore::new();
    let image = HandMade::new(&[tar(&[("a", b"b")])]);
    let (blob, diff_id) = image.layers[0];
    let config = image.blobs.iter().find(|(digest, _)| **digest != blob.to_string()).unwrap();
    let index = serde_json::json!({"schemaVersion": 2, "manifests": [{
        "mediaType": support::OCI_MANIFEST, "digest": Digest::of(&image.manifest), "size": image.manifest.len(),
    }]})
    .to_string();
    let blob_name = |digest: &str| format!("blobs/sha256/{}", digest.trim_start_matches("sha256:"));
    let (manifest_name, config_name) =
        (blob_name(&Digest::of(&image.manifest).to_string()), blob_name(config.0));
    let layer_name = blob_name(&blob.to_string());
    let oci = |manifest: &[u8], layer: &[u8]| {
        tar(&[
            ("index.json", index.as_bytes()),
            ("oci-layout", b"{}"),
            (&manifest_name, manifest),
            (&config_name, config.1),
            (&layer_name, layer),
        ])
    };
    let saved = |entry: &str| {
        tar(&[("manifest.json", entry.as_bytes()), ("c.json", config.1), ("l.tar", b"no tar at all")])
    };
    for (archive, part) in [
        (oci(b"{}", b""), "manifest of"),
        (oci(&image.manifest, b"something else"), "wrong digest"),
        (
            saved(r#"[{"Config":"c.json","Layers":["../../../etc/passwd"]}]"#),
            "`../../../etc/passwd` is not in it",
        ),
        (saved(r#"[{"Config":"c.json","Layers":["/etc/passwd"]}]"#), "`/etc/passwd` is not in it"),
        (saved(r#"[{"Config":"c.json","Layers":[]}]"#), "0 layers, but its config has 1"),
        (saved(r#"[{"Config":"c.json","Layers":["l.tar"]}]"#), ""),
        (saved("[]"), "no image in it"),
        (oci(&image.manifest, &image.blobs[&blob.to_string()])[..3000].to_vec(), ""),
    ] {
        let path = store.dir.path().join("lie.tar");
        std::fs::write(&path, &archive).unwrap();
        let error = read(&store, &path).unwrap_err();
        assert!(error.to_string().contains(part), "{error}");
        assert_eq!(store.store.layer_of_diff_id(&diff_id).unwrap(), None, "{error}");
    }
    // The same, and true.
    let path = store.dir.path().join("truth.tar");
    std::fs::write(&path, oci(&image.manifest, &image.blobs[&blob.to_string()])).unwrap();
    let images = read(&store, &path).unwrap();
    assert_eq!(images[0].1.manifest_digest, Digest::of(&image.manifest));
}

#[test]
fn a_bomb_in_an_archive_stops_at_the_limit() {
    let store = TestStore::new();
    let mut bomb = gzip(&support::tar_header("zeros", 10 << 30));
    let zeros = gzip(&vec![0; 64 << 20]);
    for _ in 0..160 {
        bomb.extend_from_slice(&zeros);
    }
    let path = store.dir.path().join("bomb.tar.gz");
    std::fs::write(&path, bomb).unwrap();
    for format in [None, Some(Format::Rootfs)] {
        let limits = ImportLimits { max_size: Some(10 << 20), ..ImportLimits::default() };
        let outcome = import(&store.store, &path, format, None, None, limits, &Silent);
        let error = outcome.unwrap_err();
        assert!(error.to_string().contains("too large"), "{error}");
        assert!(store.store.images().unwrap().is_empty());
    }
    let missing = read(&store, &store.dir.path().join("not there"));
    assert!(matches!(missing, Err(RegistryError::Io { .. })), "{missing:?}");
}
