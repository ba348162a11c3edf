//! Damaged stores get back from a real registry what they lost.

mod support;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use kiln_contract::{Digest, Platform, Silent};
use kiln_fixtures::{RegistryOptions, RegistryServer};
use kiln_registry::{PullOptions, PushOptions};
use kiln_store::{CheckReport, Image};
use support::{Request, Server, TestStore, forward, name, noise, plain_registry, tar};

/// A registry with an image of two layers, packed anew on the way there, behind an index.
fn registry_with_index() -> Option<(RegistryServer, Digest)> {
    let server = RegistryServer::start(&RegistryOptions::default())?;
    let store = TestStore::new();
    let (registry, _conf) = plain_registry();
    let layers = [tar(&[("a", b"small")]), tar(&[("b", &noise(3 << 20)), ("c", &noise(1000))])];
    let layers = layers.map(|tar| store.store.import_tar(&tar[..], None, Default::default()).unwrap().layer);
    let image = store.store.make_image(&Default::default(), &layers).unwrap();
    let to = name(&format!("{}/team/app:1", server.address()));
    let pushed = registry.push(&store.store, &image, &to, &PushOptions::default(), &Silent).unwrap();
    let manifest = get(&server, &format!("/v2/team/app/manifests/{}", pushed.manifest));
    let host = Platform::host();
    let index = serde_json::json!({"schemaVersion": 2, "mediaType": support::OCI_INDEX, "manifests": [{
        "mediaType": support::OCI_MANIFEST, "digest": pushed.manifest, "size": manifest.len(),
        "platform": {"os": host.os, "architecture": host.architecture},
    }]})
    .to_string();
    let digest = Digest::of(index.as_bytes());
    let path = format!("/v2/team/app/manifests/{digest}");
    support::http(&server.address(), "PUT", &path, support::OCI_INDEX, index.as_bytes());
    Some((server, digest))
}

fn get(server: &RegistryServer, path: &str) -> Vec<u8> {
    let headers = [("host", "localhost"), ("accept", support::OCI_MANIFEST)];
    let headers = headers.map(|(name, value)| (name.to_owned(), value.to_owned())).into();
    let request = Request { method: "GET".into(), path: path.into(), headers, body: Vec::new() };
    forward(&format!("127.0.0.1:{}", server.port), &request).body
}

/// A store with the image, pulled by the digest of its index: no tag says where it came from.
fn pulled(address: &str, index: &Digest) -> (TestStore, Image) {
    let store = TestStore::new();
    let (registry, _conf) = plain_registry();
    let reference = name(&format!("{address}/team/app@{index}"));
    let image = registry.pull(&store.store, &reference, &PullOptions::default(), &Silent).unwrap().image;
    assert!(store.store.tags().unwrap().is_empty());
    assert_eq!(store.store.check(None).unwrap().damaged, [""; 0]);
    (store, image)
}

fn repair(store: &TestStore) -> CheckReport {
    let (registry, _conf) = plain_registry();
    let report = store.store.check(Some(&registry.repair(&store.store, &Silent))).unwrap();
    let left = std::fs::read_dir(store.store.path().join("tmp")).unwrap().count();
    assert_eq!(left, 0, "something was left behind");
    report
}

fn blob(store: &TestStore, digest: &Digest) -> PathBuf {
    store.store.path().join(format!("blobs/sha256/{}", digest.hex()))
}

fn damage(path: PathBuf) {
    let mut bytes = std::fs::read(&path).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::remove_file(&path).unwrap();
    std::fs::write(path, bytes).unwrap();
}

type Damage = (&'static str, fn(&TestStore, &Image, &Digest));

const DAMAGES: [Damage; 7] = [
    ("a damaged manifest", |store, image, _| damage(blob(store, &image.manifest_digest))),
    ("a missing config", |store, image, _| std::fs::remove_file(blob(store, &image.id)).unwrap()),
    ("a damaged index", |store, _, index| damage(blob(store, index))),
    ("a missing index", |store, _, index| std::fs::remove_file(blob(store, index)).unwrap()),
    ("a damaged object", |store, _, _| damage(store.store.object_path(&Digest::of(&noise(3 << 20))))),
    ("a missing tree and split stream", |store, image, _| {
        let tree = store.store.layer_path(&image.layers[1]);
        std::fs::remove_file(tree.with_extension("split")).unwrap();
        std::fs::remove_file(tree).unwrap();
    }),
    ("nearly everything", |store, image, index| {
        damage(blob(store, index));
        damage(blob(store, &image.id));
        std::fs::remove_file(blob(store, &image.manifest_digest)).unwrap();
        for layer in &image.layers {
            let tree = store.store.layer_path(layer);
            damage(tree.with_extension("split"));
            damage(tree);
        }
        std::fs::remove_dir_all(store.store.objects_dir()).unwrap();
        std::fs::create_dir(store.store.objects_dir()).unwrap();
    }),
];

#[test]
fn what_was_lost_comes_back_from_the_registry_that_had_it() {
    let Some((server, index)) = registry_with_index() else { return };
    for (what, act) in DAMAGES {
        let (store, image) = pulled(&server.address(), &index);
        act(&store, &image, &index);
        assert!(!store.store.check(None).unwrap().damaged.is_empty(), "{what}");
        let report = repair(&store);
        assert_eq!(report.damaged, [""; 0], "{what}");
        assert!(!report.repaired.is_empty(), "{what}");
        assert_eq!(store.store.check(None).unwrap().damaged, [""; 0], "{what}");
        for digest in [image.id, image.manifest_digest, index] {
            assert_eq!(store.store.image(&digest).unwrap().unwrap().layers, image.layers, "{what}");
        }
        for diff_id in image.diff_ids() {
            let mut tar = Vec::new();
            store.store.export_diff(&diff_id, &mut tar).unwrap();
            assert_eq!(Digest::of(&tar), diff_id, "{what}");
        }
    }
}

#[test]
fn an_image_made_here_comes_back_from_where_it_was_pushed() {
    let Some(server) = RegistryServer::start(&RegistryOptions::default()) else { return };
    let store = TestStore::new();
    let (registry, _conf) = plain_registry();
    let made = tar(&[("noise", &noise(100_000))]);
    let layer = store.store.import_tar(&made[..], None, Default::default()).unwrap().layer;
    let image = store.store.make_image(&Default::default(), &[layer]).unwrap();
    let to = name(&format!("{}/mine:1", server.address()));
    registry.push(&store.store, &image, &to, &PushOptions::default(), &Silent).unwrap();
    damage(store.store.object_path(&Digest::of(&noise(100_000))));
    damage(blob(&store, &image.id));
    assert_eq!(repair(&store).damaged, [""; 0]);
    assert_eq!(store.store.check(None).unwrap().damaged, [""; 0]);
}

#[test]
fn a_registry_that_lies_or_is_gone_changes_nothing() {
    let Some((server, index)) = registry_with_index() else { return };
    let behind = format!("127.0.0.1:{}", server.port);
    let lies = Arc::new(AtomicBool::new(false));
    let lying = lies.clone();
    let proxy = Server::start(move |request, _| {
        let mut reply = forward(&behind, request);
        if lying.load(Relaxed)
            && let Some(byte) = reply.body.last_mut()
        {
            *byte ^= 1;
        }
        reply
    });
    let address = proxy.address();
    let mut stores = Vec::new();
    for (what, act) in DAMAGES {
        let (store, image) = pulled(&address, &index);
        act(&store, &image, &index);
        stores.push((what, store));
    }
    lies.store(true, Relaxed);
    let damaged = |store: &TestStore| store.store.check(None).unwrap().damaged;
    for (what, store) in &stores {
        let before = damaged(store);
        let report = repair(store);
        let told = report.damaged.iter().any(|line| line.contains("wrong digest"));
        assert!(told && report.repaired.is_empty(), "{what}: {report:?}");
        assert_eq!(damaged(store), before, "{what}");
    }
    let asked = proxy.requests().len();
    drop(proxy);
    drop(server);
    assert!(asked > DAMAGES.len());
    for (what, store) in &stores {
        let before = damaged(store);
        let report = repair(store);
        assert!(report.damaged.iter().any(|line| line.contains("no connection")), "{what}: {report:?}");
        assert_eq!(damaged(store), before, "{what}");
    }
}
