//! Pushes to registries that take no chunked uploads: a real one behind a proxy that refuses them.

mod support;

use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Duration;

use kiln_contract::{Digest, Silent};
use kiln_fixtures::{RegistryOptions, RegistryServer, require};
use kiln_registry::{Compression, Packing, PushOptions, Pushed, RegistryError};
use kiln_store::Image;
use support::{Reply, Request, Server, TestStore, forward, name, noise, plain_registry, registry, run, tar};

/// Two layers of so many MiB, and one that needs no chunks.
fn image(store: &TestStore, size: usize) -> Image {
    let noise = noise((size + 1) << 20);
    let layers = [&noise[..size << 20], &noise[1 << 20..], b"small"].map(|content| {
        store.store.import_tar(&tar(&[("noise", content)])[..], None, Default::default()).unwrap().layer
    });
    store.store.make_image(&Default::default(), &layers).unwrap()
}

fn proxy(
    registry: &RegistryServer,
    early: impl Fn(&Request) -> Option<Reply> + Send + Sync + 'static,
    fault: impl Fn(&Request, usize) -> Option<Reply> + Send + Sync + 'static,
) -> Server {
    let behind = format!("127.0.0.1:{}", registry.port);
    Server::start_early(early, move |request, before| {
        fault(request, before).unwrap_or_else(|| forward(&behind, request))
    })
}

fn push(store: &TestStore, image: &Image, server: &Server, parallel: usize) -> Result<Pushed, RegistryError> {
    // A registry on a busy machine takes its time for a large blob, and what is counted here must not be repeated.
    let (registry, _conf) = registry(|config, _| config.timeout = Some(Duration::from_secs(60)));
    let options = PushOptions { packing: Packing::Stream(Compression::None), parallel: Some(parallel) };
    registry.push(&store.store, image, &server.image(), &options, &Silent)
}

/// Methods and lengths of the requests that carried a part of a blob.
fn uploads(server: &Server) -> Vec<(String, usize)> {
    let mut requests = server.requests();
    requests.retain(|request| {
        request.path.contains("/blobs/uploads/") && matches!(request.method.as_str(), "PATCH" | "PUT")
    });
    let length = |request: &Request| request.headers["content-length"].parse().unwrap();
    requests.into_iter().map(|request| (request.method.clone(), length(&request))).collect()
}

#[test]
fn blobs_go_whole_to_a_registry_that_refuses_chunks() {
    let Some(skopeo) = require("skopeo") else { return };
    let store = TestStore::new();
    let image = image(&store, 9);
    let sizes: Vec<usize> = image
        .layers
        .iter()
        .map(|layer| {
            let mut tar = Vec::new();
            store.store.export_tar(layer, &mut tar).unwrap();
            tar.len()
        })
        .collect();
    for (status, at_once) in [
        (404, false),
        (405, false),
        (405, true),
        (416, false),
        (400, false),
        (501, false),
        (501, true),
        (415, true),
    ] {
        let Some(registry) = RegistryServer::start(&RegistryOptions::default()) else { return };
        let refuse = move |request: &Request| {
            (request.method == "PATCH").then(|| Reply::new(status, r#"{"errors":[{"code":"UNSUPPORTED"}]}"#))
        };
        let server = proxy(
            &registry,
            move |request| refuse(request).filter(|_| at_once),
            move |request, _| refuse(request),
        );
        let what = format!("{status}, at once: {at_once}");
        let pushed = push(&store, &image, &server, 1).unwrap_or_else(|error| panic!("{what}: {error}"));
        assert_eq!(pushed.layers_pushed, 3, "{what}");
        let uploads = uploads(&server);
        // One chunk tells enough: each layer, that one too, then goes with one request, and the config as always.
        let patches: Vec<_> = uploads.iter().filter(|(method, _)| method == "PATCH").collect();
        assert_eq!(patches.len(), 1, "{what}: {uploads:?}");
        let mut puts: Vec<usize> =
            uploads.iter().filter(|(method, _)| method == "PUT").map(|(_, length)| *length).collect();
        assert_eq!(puts.pop(), Some(store.store.blob(&image.id).unwrap().unwrap().len()), "{what}");
        assert_eq!(puts, sizes, "{what}");
        let again = push(&store, &image, &server, 1).unwrap();
        assert_eq!((again.bytes, again.layers_present), (0, 3), "{what}");
        // The registry itself has them, and others read them.
        let copy = store.dir.path().join(format!("copy-{status}-{at_once}"));
        let mut command = Command::new(&skopeo);
        command.args(["--insecure-policy", "copy", "--src-tls-verify=false"]);
        command.arg(format!("docker://{}/team/app:1", registry.address()));
        run(command.arg(format!("dir:{}", copy.display())));
        for diff_id in image.diff_ids() {
            assert_eq!(Digest::of(&std::fs::read(copy.join(diff_id.hex())).unwrap()), diff_id, "{what}");
        }
    }
}

#[test]
fn chunks_refused_in_the_middle_or_by_many_at_once_are_sent_again_whole() {
    let store = TestStore::new();
    let image = image(&store, 20);
    type Fault = fn(&Request, usize) -> Option<Reply>;
    let faults: [(&str, Fault); 4] = [
        ("the second chunk", |request, _| {
            let later = request.headers.get("content-range").is_some_and(|range| !range.starts_with("0-"));
            (request.method == "PATCH" && later).then(|| Reply::new(416, ""))
        }),
        ("the second chunk, by one that says nothing of the first", |request, _| {
            let later = request.headers.get("content-range").is_some_and(|range| !range.starts_with("0-"));
            let asks = request.method == "GET" && request.path.contains("/uploads/");
            (asks || request.method == "PATCH" && later).then(|| Reply::new(416, ""))
        }),
        ("the first chunk, of every layer", |request, _| {
            (request.method == "PATCH").then(|| Reply::new(405, ""))
        }),
        ("the chunks, and one request with a whole blob fails", |request, _| {
            static FAILED: AtomicBool = AtomicBool::new(false);
            if request.method == "PUT" && request.body.len() > 8 << 20 {
                return (!FAILED.swap(true, Relaxed)).then(|| Reply::new(503, ""));
            }
            (request.method == "PATCH").then(|| Reply::new(405, ""))
        }),
    ];
    for (what, fault) in faults {
        let Some(registry) = RegistryServer::start(&RegistryOptions::default()) else { return };
        let server = proxy(&registry, |_| None, fault);
        let pushed = push(&store, &image, &server, 3).unwrap_or_else(|error| panic!("{what}: {error}"));
        assert_eq!(pushed.layers_pushed, 3, "{what}");
        let (puller, _conf) = plain_registry();
        let empty = TestStore::new();
        let reference = name(&format!("{}/team/app:1", registry.address()));
        let back = puller.pull(&empty.store, &reference, &Default::default(), &Silent).unwrap().image;
        assert_eq!(back.layers, image.layers, "{what}");
    }
}

#[test]
fn what_is_no_refusal_of_chunks_sends_nothing_whole() {
    let store = TestStore::new();
    let image = image(&store, 9);
    let Some(registry) = RegistryServer::start(&RegistryOptions::default()) else { return };
    for (status, patches) in [(500, 3), (503, 3), (429, 3), (401, 1), (403, 1), (413, 1)] {
        let server = proxy(
            &registry,
            |_| None,
            move |request, _| {
                (request.method == "PATCH").then(|| Reply::new(status, "").header("Retry-After", "0"))
            },
        );
        let error = push(&store, &image, &server, 1).unwrap_err();
        assert!(
            matches!(
                (&error, status),
                (RegistryError::Status { status: 500 | 503 | 413, .. }, 500 | 503 | 413)
                    | (RegistryError::RateLimited { .. }, 429)
                    | (RegistryError::Denied { .. }, 401 | 403)
            ),
            "{status}: {error:?}"
        );
        let uploads = uploads(&server);
        assert_eq!(uploads.len(), patches, "{status}: {uploads:?}");
        assert!(uploads.iter().all(|(method, _)| method == "PATCH"), "{status}: {uploads:?}");
    }
}
