//! Images through their lives: made, tagged, found, merged, committed, collected.

mod common;

use std::collections::BTreeMap;

use common::{Fixture, Tar, fixture, header, seal};
use kiln_contract::{ChangeKind, Digest};
use kiln_erofs::{Content, Data, NodeId, Tree};
use kiln_store::{GcOptions, Image, ImageName, ImportLimits, Store, StoreError};

fn name(text: &str) -> ImageName {
    ImageName::parse(text).unwrap()
}

fn make(fixture: &Fixture, tars: &[Tar], tag: &str) -> Image {
    let layers: Vec<_> = tars.iter().map(|tar| fixture.import(&tar.0).unwrap().layer).collect();
    let image = fixture.store.make_image(&Default::default(), &layers).unwrap();
    fixture.store.tag(&name(tag), &image.manifest_digest, "made").unwrap();
    image
}

/// Every path of a merged tree, with what is there.
fn merged(fixture: &Fixture, layers: &[Digest]) -> BTreeMap<String, String> {
    let bytes = std::fs::read(fixture.store.merged_tree(layers).unwrap()).unwrap();
    let tree = kiln_erofs::Image::open(&bytes).unwrap().to_tree().unwrap();
    let mut found = BTreeMap::new();
    let mut stack = vec![(NodeId::ROOT, String::new())];
    while let Some((dir, path)) = stack.pop() {
        for (name, id) in tree.children(dir) {
            let path = format!("{path}/{}", String::from_utf8_lossy(name));
            found.insert(path.clone(), describe(&tree, id));
            stack.push((id, path));
        }
    }
    found
}

fn describe(tree: &Tree, id: NodeId) -> String {
    let node = tree.node(id);
    assert!(node.attributes.xattrs.is_empty(), "{:?}", node.attributes.xattrs);
    match node.content {
        Content::Directory => format!("dir {:o}", node.attributes.mode),
        Content::Regular(Data::Inline(bytes)) => {
            format!("{} x{}", String::from_utf8_lossy(bytes), node.links)
        }
        Content::Symlink(target) => format!("-> {}", String::from_utf8_lossy(target)),
        other => format!("{other:?}"),
    }
}

#[test]
fn layers_are_merged_as_an_overlay_would() {
    let fixture = fixture();
    let below = Tar::new()
        .entry("tmp", b'5', "")
        .file("etc/a", b"1")
        .file("etc/b", b"1")
        .file("kept/x", b"1")
        .file("gone/x", b"1")
        .file("l1", b"link")
        .entry("l2", b'1', "l1")
        .entry("l3", b'1', "l1")
        .file("was-file", b"1")
        .file("was-dir/x", b"1")
        .entry("was-link", b'2', "etc")
        .file("emptied/x", b"1");
    let above = Tar::new()
        .file("tmp/new", b"2")
        .file("etc/.wh.a", b"")
        .file(".wh.gone", b"")
        .file("l2", b"broken off")
        .file("was-file/x", b"2")
        .file("was-dir", b"2")
        .file("was-link/y", b"2")
        .file("emptied/.wh..wh..opq", b"")
        .file("emptied/y", b"2")
        .file(".wh.never-was", b"");
    let layers = [fixture.round_trip(&below.end()).layer, fixture.round_trip(&above.end()).layer];
    let expected: BTreeMap<String, String> = [
        // Not in the upper tar: its attributes stay those of the lower one.
        ("/tmp", "dir 644"),
        ("/tmp/new", "2 x1"),
        ("/etc", "dir 755"),
        ("/etc/b", "1 x1"),
        ("/kept", "dir 755"),
        ("/kept/x", "1 x1"),
        ("/l1", "link x2"),
        ("/l2", "broken off x1"),
        ("/l3", "link x2"),
        ("/was-file", "dir 755"),
        ("/was-file/x", "2 x1"),
        ("/was-dir", "2 x1"),
        ("/was-link", "dir 755"),
        ("/was-link/y", "2 x1"),
        ("/emptied", "dir 755"),
        ("/emptied/y", "2 x1"),
    ]
    .map(|(path, what)| (path.to_owned(), what.to_owned()))
    .into();
    assert_eq!(merged(&fixture, &layers), expected);
    // The same from a merged tree that is there already.
    let third = fixture.round_trip(&Tar::new().file(".wh.kept", b"").file("etc/c", b"3").end()).layer;
    let three = merged(&fixture, &[layers[0], layers[1], third]);
    assert_eq!(three.len(), expected.len() - 2 + 1);
    let changes = fixture.store.diff(&layers, &[layers[0], layers[1], third]).unwrap();
    let told: Vec<_> =
        changes.iter().map(|c| (String::from_utf8_lossy(&c.path).into_owned(), c.kind)).collect();
    assert_eq!(
        told,
        [
            ("/etc/c".to_owned(), ChangeKind::Added),
            ("/kept".to_owned(), ChangeKind::Deleted),
            ("/kept/x".to_owned(), ChangeKind::Deleted),
        ]
    );
    // An opaque root hides all that is below, whatever the tar says of the root after it.
    let alone = Tar::new().file(".wh..wh..opq", b"").entry("./", b'5', "").file("only", b"4");
    let four = merged(&fixture, &[layers[0], layers[1], fixture.round_trip(&alone.end()).layer]);
    assert_eq!(four.into_iter().collect::<Vec<_>>(), [("/only".to_owned(), "4 x1".to_owned())]);
}

/// An entry for a directory with a mode and an owner of its own.
fn directory(tar: Tar, name: &str, mode: u32, owner: u32) -> Tar {
    let mut block = header(name.as_bytes(), b'5', 0, b"");
    block[100..108].copy_from_slice(format!("{mode:07o}\0").as_bytes());
    block[108..116].copy_from_slice(format!("{owner:07o}\0").as_bytes());
    block[116..124].copy_from_slice(format!("{owner:07o}\0").as_bytes());
    seal(&mut block);
    tar.raw(&block)
}

#[test]
fn only_a_layer_with_an_entry_for_a_directory_changes_that_directory() {
    type Attributes = (u32, u32);
    const GUESS: Attributes = (0o755, 0);
    const BELOW: Attributes = (0o750, 7);
    const ABOVE: Attributes = (0o1777, 8);
    let stating =
        |tar: Tar, (mode, owner): Attributes| directory(directory(tar, "./", mode, owner), "d/", mode, owner);
    let silent = || Tar::new().file("d/x", b"2");
    let opaque = || Tar::new().file("d/.wh..wh..opq", b"").file("d/y", b"3");
    let opaque_root = || Tar::new().file(".wh..wh..opq", b"").file("d/y", b"3");
    let below = || stating(silent(), BELOW);
    // Of the root and of `d`, and what is in `d`.
    type Case = (Vec<Tar>, Attributes, Attributes, &'static str);
    let cases: [Case; 9] = [
        (vec![silent(), silent()], GUESS, GUESS, "x"),
        (vec![below(), silent(), silent()], BELOW, BELOW, "x"),
        (vec![silent(), below()], BELOW, BELOW, "x"),
        (vec![below(), stating(Tar::new(), ABOVE), silent()], ABOVE, ABOVE, "x"),
        (vec![below(), stating(silent(), ABOVE)], ABOVE, ABOVE, "x"),
        (vec![below(), opaque()], BELOW, BELOW, "y"),
        (vec![below(), stating(opaque(), ABOVE)], ABOVE, ABOVE, "y"),
        // What is hidden is gone, with its attributes; the root itself is still there.
        (vec![below(), opaque_root()], BELOW, GUESS, "y"),
        (vec![below(), Tar::new().file(".wh.d", b""), silent()], BELOW, GUESS, "x"),
    ];
    for (case, (tars, root, d, file)) in cases.into_iter().enumerate() {
        let fixture = fixture();
        let layers: Vec<_> = tars.into_iter().map(|tar| fixture.round_trip(&tar.end()).layer).collect();
        // Each longer stack begins with the merged tree of the one before.
        for count in 1..layers.len() {
            fixture.store.merged_tree(&layers[..count]).unwrap();
        }
        let bytes = std::fs::read(fixture.store.merged_tree(&layers).unwrap()).unwrap();
        let tree = kiln_erofs::Image::open(&bytes).unwrap().to_tree().unwrap();
        let node = tree.child(NodeId::ROOT, b"d").unwrap();
        for (node, expected) in [(NodeId::ROOT, root), (node, d)] {
            let attributes = tree.node(node).attributes;
            assert_eq!((attributes.mode, attributes.uid), expected, "case {case}");
            assert!(attributes.xattrs.is_empty(), "case {case}: {:?}", attributes.xattrs);
        }
        let names: Vec<_> = tree.children(node).map(|(name, _)| name).collect();
        assert_eq!(names, [file.as_bytes()], "case {case}");
    }
}

#[test]
fn images_are_found_by_all_their_names() {
    let fixture = fixture();
    let store = &fixture.store;
    let one = make(&fixture, &[Tar::new().file("a", b"1")], "me/dev:1");
    let two = make(&fixture, &[Tar::new().file("a", b"2")], "me/dev:1");
    let hex = two.id.hex();
    for (text, expected) in [
        ("me/dev:1", two.id),
        ("docker.io/me/dev:1", two.id),
        ("me/dev:1~0", two.id),
        ("me/dev:1~1", one.id),
        (&format!("me/dev@{}", one.manifest_digest), one.id),
        (&two.id.to_string(), two.id),
        (&two.manifest_digest.to_string(), two.id),
        (&hex, two.id),
        (&hex[..8], two.id),
    ] {
        assert_eq!(store.resolve(text).unwrap().id, expected, "{text}");
    }
    let error = store.resolve("me/dev:1~2").unwrap_err();
    assert_eq!(error.to_string(), "`me/dev:1` has 2 version(s): there is no `~2`");
    let error = store.resolve("me/dve:1").unwrap_err();
    assert!(matches!(&error, StoreError::NotFound { near, .. } if near == &["me/dev:1"]), "{error:?}");
    assert_eq!(error.hint().unwrap(), "there is me/dev:1");
    assert!(
        matches!(store.resolve("me/dev:2").unwrap_err(), StoreError::NotFound { near, .. } if near == ["me/dev:1"])
    );
    assert!(matches!(store.resolve("UPPER"), Err(StoreError::BadName { .. })));
    // Enough images that two begin with the same digit; four digits must be given, so ids are searched for.
    let mut by_prefix: BTreeMap<String, Vec<Digest>> = BTreeMap::new();
    let layer = store.layer_of_diff_id(&one.diff_ids()[0]).unwrap().unwrap();
    for index in 0..1000 {
        let config: oci_spec::image::ImageConfiguration = serde_json::from_value(serde_json::json!({
            "architecture": "amd64", "os": "linux", "author": index.to_string(),
            "rootfs": {"type": "layers", "diff_ids": []}
        }))
        .unwrap();
        let image = store.make_image(&config, &[layer]).unwrap();
        let ids = by_prefix.entry(image.id.hex()[..4].to_owned()).or_default();
        ids.push(image.id);
        if ids.len() == 2 {
            let error = store.resolve(&image.id.hex()[..4]).unwrap_err();
            let StoreError::Ambiguous { candidates, .. } = &error else { panic!("{error}") };
            assert_eq!(candidates.len(), 2);
            return;
        }
    }
    panic!("a thousand ids had different first digits");
}

#[test]
fn manifests_of_both_media_types_and_indexes_are_kept() {
    let fixture = fixture();
    let store = &fixture.store;
    let image = make(&fixture, &[Tar::new().file("a", b"1")], "a:1");
    let config = store.blob(&image.id).unwrap().unwrap();
    let docker = serde_json::to_vec(&serde_json::json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.docker.distribution.manifest.v2+json",
        "config": {"mediaType": "application/vnd.docker.container.image.v1+json", "size": config.len(), "digest": image.id},
        "layers": [{"mediaType": "application/vnd.docker.image.rootfs.diff.tar.gzip", "size": 7, "digest": Digest::of(b"gz")}],
    }))
    .unwrap();
    let second = store.put_image(&docker, &config).unwrap();
    assert_eq!((second.id, second.layers.clone()), (image.id, image.layers.clone()));
    assert_eq!(store.image(&image.id).unwrap().unwrap().manifest_digest, Digest::of(&docker));
    assert_eq!(store.image(&image.manifest_digest).unwrap().unwrap().manifest_digest, image.manifest_digest);
    let index = serde_json::to_vec(&serde_json::json!({
        "schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json",
        "manifests": [
            {"mediaType": "application/vnd.oci.image.manifest.v1+json", "size": 1, "digest": Digest::of(b"other platform")},
            {"mediaType": "application/vnd.docker.distribution.manifest.v2+json", "size": docker.len(), "digest": second.manifest_digest},
        ],
    }))
    .unwrap();
    let index = store.put_blob(&index).unwrap();
    assert_eq!(store.resolve(&format!("a@{index}")).unwrap().id, image.id);
    assert_eq!(store.images().unwrap().len(), 1);

    let missing = serde_json::json!({"architecture": "amd64", "os": "linux",
        "rootfs": {"type": "layers", "diff_ids": [Digest::of(b"nowhere")]}});
    let missing = serde_json::to_vec(&missing).unwrap();
    let manifest = String::from_utf8(docker).unwrap().replace(&image.id.hex(), &Digest::of(&missing).hex());
    let error = store.put_image(manifest.as_bytes(), &missing).unwrap_err();
    assert!(error.to_string().contains("is not in the store"), "{error}");
    let error = store.put_image(manifest.as_bytes(), b"{}").unwrap_err();
    assert!(matches!(error, StoreError::DigestMismatch { .. }), "{error}");
}

#[test]
fn images_are_removed_by_name_and_by_id() {
    let fixture = fixture();
    let store = &fixture.store;
    let image = make(&fixture, &[Tar::new().file("a", b"1")], "a:1");
    store.tag(&name("a:2"), &image.manifest_digest, "").unwrap();
    assert!(matches!(store.remove_image(&image.id.hex()[..12], false), Err(StoreError::SeveralNames { .. })));
    assert_eq!(store.remove_image("a:1", false).unwrap(), ["a:1"]);
    assert!(store.resolve("a:2").is_ok() && store.resolve("a:1").is_err());
    assert_eq!(store.remove_image(&image.id.hex()[..12], false).unwrap(), ["a:2"]);
    assert!(store.images().unwrap().is_empty());
    assert!(store.image(&image.manifest_digest).unwrap().is_none());
    assert!(matches!(store.remove_image("a:2", true), Err(StoreError::NotFound { .. })));
}

#[test]
fn a_collection_takes_what_nothing_needs_and_nothing_else() {
    let Fixture { dir, home, store } = fixture();
    let fixture = Fixture { dir, home, store };
    let shared = [1; 1000];
    let kept = make(
        &fixture,
        &[Tar::new().file("s", &shared).file("twice", &[5; 500]).file("twice", &[6; 500])],
        "kept:1",
    );
    let gone = make(&fixture, &[Tar::new().file("s", &shared).file("own", &[2; 2000])], "gone:1");
    let used = make(&fixture, &[Tar::new().file("used", &[3; 3000])], "used:1");
    for image in [&kept, &gone, &used] {
        fixture.store.merged_tree(&image.layers).unwrap();
    }
    fixture.store.remove_image("gone:1", false).unwrap();
    fixture.store.remove_image("used:1", false).unwrap();
    let Fixture { dir, home, store } = fixture;
    drop(store);
    let dry = Store::gc(
        &home,
        || Ok::<_, StoreError>(used.layers.clone()),
        &GcOptions { dry_run: true, ..GcOptions::default() },
    )
    .unwrap();
    let report =
        Store::gc(&home, || Ok::<_, StoreError>(used.layers.clone()), &GcOptions::default()).unwrap();
    assert_eq!(dry, report);
    assert_eq!((report.objects, report.layers, report.blobs, report.renders), (1, 1, 4, 2));
    assert!(report.bytes > 2000, "{report:?}");
    let store = Store::open(&home).unwrap();
    let fixture = Fixture { dir, home, store };
    assert!(fixture.store.check(None).unwrap().damaged.is_empty());
    fixture.export(&kept.layers[0]);
    fixture.export(&used.layers[0]);
    assert!(fixture.store.layer_of_diff_id(&gone.diff_ids()[0]).unwrap().is_none());
    let Fixture { dir: _dir, home, store } = fixture;
    drop(store);
    let report = Store::gc(
        &home,
        || Ok::<_, StoreError>(vec![kept.id]),
        &GcOptions { all: true, ..GcOptions::default() },
    )
    .unwrap();
    assert_eq!((report.images.len(), report.objects, report.layers), (0, 1, 1));
    let report = Store::gc(
        &home,
        || Ok::<_, StoreError>(Vec::new()),
        &GcOptions { all: true, ..GcOptions::default() },
    )
    .unwrap();
    assert_eq!(report.images, ["kept:1"]);
    let left = Store::open(&home).unwrap().usage().unwrap();
    assert_eq!((left.images, left.layers, left.objects, left.metadata_bytes), (0, 0, 0, 0));
}

#[test]
fn usage_tells_what_sharing_saves() {
    let fixture = fixture();
    make(&fixture, &[Tar::new().file("a", &[1; 100_000]).file("b", &[2; 100])], "a:1");
    make(&fixture, &[Tar::new().file("x", &[1; 100_000]).file("c", &[3; 100])], "b:1");
    let usage = fixture.store.usage().unwrap();
    assert_eq!((usage.images, usage.layers, usage.objects), (2, 2, 3));
    assert_eq!(usage.logical_bytes, 200_200);
    assert!((100_200..=120_000).contains(&usage.object_bytes), "{usage:?}");
}

#[test]
fn a_newer_store_is_refused() {
    let Fixture { dir: _dir, home, store } = fixture();
    let path = store.path().join("FORMAT");
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "1\n");
    std::fs::write(&path, "2\n").unwrap();
    let error = Store::open(&home).unwrap_err();
    assert!(matches!(error, StoreError::NewerFormat { found: 2, known: 1, .. }), "{error}");
}

#[test]
fn limits_of_size_count_every_file() {
    let fixture = fixture();
    let tar = Tar::new().file("a", &[1; 600]).file("b", &[2; 600]).end();
    for (max_size, fits) in [(1200 + 1024, true), (1199, false)] {
        let limits = ImportLimits { max_size: Some(max_size), ..ImportLimits::default() };
        assert_eq!(fixture.store.import_tar(&tar[..], None, limits).is_ok(), fits, "{max_size}");
    }
}
