//! Pulls from registries that misbehave: what is needed arrives, or an error says why not and nothing is kept.

mod support;

use std::io::Write as _;

use kiln_contract::{Digest, Platform, Silent};
use kiln_registry::{PullOptions, PullPolicy, Pulled, Registry, RegistryError};
use kiln_store::ImportLimits;
use support::{
    HandMade, Reply, Request, Server, TestStore, gzip, name, noise, plain_registry, tar, tar_header,
};

fn always() -> PullOptions {
    PullOptions { policy: PullPolicy::Always, ..PullOptions::default() }
}

fn image() -> HandMade {
    HandMade::new(&[tar(&[("etc/hostname", b"kiln\n")]), tar(&[("noise", &noise(300_000))])])
}

fn pull(registry: &Registry, store: &TestStore, server: &Server) -> Result<Pulled, RegistryError> {
    registry.pull(&store.store, &server.image(), &always(), &Silent)
}

/// Pulls `image` from a server that answers as `answer` says, or else as it should.
fn pull_through(
    image: &HandMade,
    answer: impl Fn(&Request, usize) -> Option<Reply> + Send + Sync + 'static,
) -> (Result<Pulled, RegistryError>, Server, TestStore) {
    let store = TestStore::new();
    let served = image.clone();
    let server = Server::start(move |request, before| {
        answer(request, before).unwrap_or_else(|| served.answer(request))
    });
    let (registry, _conf) = plain_registry();
    let outcome = pull(&registry, &store, &server);
    (outcome, server, store)
}

/// Nothing of the image can be found in the store.
fn assert_nothing_kept(image: &HandMade, server: &Server, store: &TestStore) {
    let (_, diff_id) = image.layers.last().unwrap();
    assert_eq!(store.store.layer_of_diff_id(diff_id).unwrap(), None);
    assert!(store.store.tag_history(&server.image()).unwrap_or_default().is_empty());
    assert!(store.store.images().unwrap().is_empty());
}

#[test]
fn what_fails_in_passing_is_tried_again() {
    type Fault = fn(&Request, usize) -> Option<Reply>;
    let faults: [(&str, Fault); 6] = [
        ("500 twice for everything", |_, before| (before < 2).then(|| Reply::new(500, "oops"))),
        ("429 with Retry-After", |request, before| {
            (before < 1 && request.path.contains("/manifests/"))
                .then(|| Reply::new(429, "").header("Retry-After", "1"))
        }),
        ("a manifest cut off", |request, before| {
            (before < 1 && request.path.contains("/manifests/")).then(|| image().answer(request).cut(20))
        }),
        ("a manifest that hangs", |request, before| {
            (before < 1 && request.path.contains("/manifests/"))
                .then(|| image().answer(request).cut(20).hang())
        }),
        ("layers cut off", |request, before| {
            (before < 1 && request.path.contains("/blobs/")).then(|| image().answer(request).cut(100))
        }),
        ("layers that hang", |request, before| {
            (before < 1 && request.is_blob(&image().layers[1].0))
                .then(|| image().answer(request).cut(100_000).hang())
        }),
    ];
    for (what, fault) in faults {
        let image = image();
        let (outcome, _server, store) = pull_through(&image, fault);
        let pulled = outcome.unwrap_or_else(|error| panic!("{what}: {error}"));
        assert_eq!(pulled.layers_pulled, 2, "{what}");
        let mut tar = Vec::new();
        store.store.export_tar(&pulled.image.layers[1], &mut tar).unwrap();
        assert_eq!(Digest::of(&tar), image.layers[1].1, "{what}");
    }
}

#[test]
fn a_broken_download_goes_on_where_it_was() {
    let image = image();
    let layer = image.layers[1].0;
    let served = image.clone();
    let (outcome, server, _store) = pull_through(&image, move |request, before| {
        (request.is_blob(&layer) && before < 1).then(|| served.answer(request).cut(100_000))
    });
    outcome.unwrap();
    let starts: Vec<_> =
        server.requests().iter().filter(|r| r.is_blob(&layer)).map(Request::range_start).collect();
    assert_eq!(starts, [None, Some(100_000)]);
}

#[test]
fn a_server_without_ranges_sends_it_all_again() {
    let image = image();
    let layer = image.layers[1].0;
    let blob = image.blobs[&layer.to_string()].clone();
    let (outcome, server, _store) = pull_through(&image, move |request, before| {
        request.is_blob(&layer).then(|| {
            let whole = Reply::new(200, &blob);
            if before < 1 { whole.cut(100_000) } else { whole }
        })
    });
    outcome.unwrap();
    assert_eq!(server.requests().iter().filter(|request| request.is_blob(&layer)).count(), 2);
}

#[test]
fn a_large_layer_comes_in_parts_whatever_happens_to_some_of_them() {
    let image = HandMade::new(&[tar(&[("noise", &noise(20 << 20))])]);
    let (layer, diff_id) = image.layers[0];
    type Fault = fn(&Request, usize, Reply) -> Reply;
    let faults: [(&str, bool, Fault); 5] = [
        ("no fault", true, |_, _, reply| reply),
        ("every part cut off once", true, |request, before, reply| {
            if before == 0 && request.range_start() != Some(0) { reply.cut(1 << 20) } else { reply }
        }),
        ("the third part never complete", true, |request, _, reply| {
            let third = (8 << 20)..(12 << 20);
            let part =
                request.range_end().is_some() && request.range_start().is_some_and(|at| third.contains(&at));
            if part { reply.cut(1) } else { reply }
        }),
        ("a range that is another", true, |request, _, reply| match request.range_end() {
            Some(end) if end > 1 => {
                Reply { headers: vec![("Content-Range".into(), "bytes 7-8/9".into())], ..reply }
            }
            _ => reply,
        }),
        ("wrong bytes in one part", false, |request, _, mut reply| {
            if request.range_start() == Some(4 << 20) {
                reply.body[1000] ^= 1;
            }
            reply
        }),
    ];
    for (what, works, fault) in faults {
        let served = image.clone();
        let (outcome, server, store) = pull_through(&image, move |request, before| {
            request.is_blob(&layer).then(|| fault(request, before, served.answer(request)))
        });
        let parts = server.requests().iter().filter(|request| request.range_end().is_some()).count();
        assert!(parts >= 3, "{what}: {parts} parts");
        match outcome {
            Ok(pulled) => {
                assert!(works, "{what}");
                let mut tar = Vec::new();
                store.store.export_tar(&pulled.image.layers[0], &mut tar).unwrap();
                assert_eq!(Digest::of(&tar), diff_id, "{what}");
                let whole: usize = image.blobs.values().map(Vec::len).sum::<usize>() + image.manifest.len();
                assert_eq!(pulled.bytes, whole as u64, "{what}");
            }
            Err(error) => {
                assert!(!works, "{what}: {error}");
                assert!(matches!(error, RegistryError::WrongDigest { .. }), "{what}: {error}");
                assert_nothing_kept(&image, &server, &store);
            }
        }
    }
}

#[test]
fn a_layer_that_stays_truncated_is_an_error_and_leaves_nothing() {
    let image = image();
    let layer = image.layers[1].0;
    let served = image.clone();
    let (outcome, server, store) = pull_through(&image, move |request, _| {
        // All but the last thousand bytes, however often it is asked.
        let whole = served.blobs[&layer.to_string()].len();
        request.is_blob(&layer).then(|| {
            let start = request.range_start().unwrap_or(0);
            served.answer(request).cut(whole - 1000 - start)
        })
    });
    let error = outcome.unwrap_err();
    let whole = image.blobs[&layer.to_string()].len() as u64;
    assert!(
        matches!(error, RegistryError::Truncated { digest, got, expected, .. } if digest == layer && got == whole - 1000 && expected == whole),
        "{error}"
    );
    assert_nothing_kept(&image, &server, &store);
}

#[test]
fn a_wrong_digest_names_both_and_leaves_nothing() {
    let image = image();
    let layer = image.layers[1].0;
    // The same length, but valid gzip of another tar: only the digest can tell.
    let other = gzip(&tar(&[("noise", &noise(300_000).iter().map(|byte| byte ^ 1).collect::<Vec<_>>())]));
    let right = &image.blobs[&layer.to_string()];
    let damaged = {
        let mut damaged = right.clone();
        let middle = damaged.len() / 2;
        damaged[middle] ^= 1;
        damaged
    };
    let mut tries = vec![damaged];
    if other.len() == right.len() {
        tries.push(other);
    }
    for wrong in tries {
        let actual_digest = Digest::of(&wrong);
        let (outcome, server, store) =
            pull_through(&image, move |request, _| request.is_blob(&layer).then(|| Reply::new(200, &wrong)));
        let error = outcome.unwrap_err();
        assert!(
            matches!(error, RegistryError::WrongDigest { expected, actual, .. } if expected == layer && actual == actual_digest),
            "{error}"
        );
        let message = error.to_string();
        assert!(
            message.contains(&layer.to_string()) && message.contains(&actual_digest.to_string()),
            "{message}"
        );
        assert_nothing_kept(&image, &server, &store);
    }
}

#[test]
fn a_layer_that_is_not_what_its_config_promises_is_refused() {
    let tar = tar(&[("a", b"b")]);
    let image = HandMade::of_packed(&[(gzip(&tar), Digest::of(b"something else"))]);
    let (outcome, server, store) = pull_through(&image, |_, _| None);
    let message = outcome.unwrap_err().to_string();
    assert!(message.contains(&Digest::of(b"something else").to_string()), "{message}");
    assert!(message.contains(&Digest::of(&tar).to_string()), "{message}");
    assert_nothing_kept(&image, &server, &store);
}

#[test]
fn documents_that_cannot_be_right_are_refused() {
    let image = image();
    let index = |platform: &str| {
        serde_json::json!({"schemaVersion": 2, "mediaType": support::OCI_INDEX, "manifests": [{
            "mediaType": support::OCI_MANIFEST, "digest": Digest::of(&image.manifest), "size": image.manifest.len(),
            "platform": {"os": platform, "architecture": "mips"},
        }]})
        .to_string()
    };
    let count = {
        let mut wrong = image.clone();
        let config = serde_json::json!({
            "os": "linux", "architecture": Platform::host().architecture,
            "rootfs": {"type": "layers", "diff_ids": [image.layers[0].1]},
        });
        let layers: Vec<_> = image
            .layers
            .iter()
            .map(|(digest, _)| serde_json::json!({"mediaType": "application/vnd.oci.image.layer.v1.tar+gzip", "digest": digest, "size": 1}))
            .collect();
        wrong.set(&config, &layers);
        wrong
    };
    let manifest = |reply: Reply| {
        move |request: &Request, _: usize| request.path.contains("/manifests/").then(|| reply.clone())
    };
    for (reply, part) in [
        (Reply::new(200, index("plan9")), "it has plan9/mips"),
        (Reply::new(200, vec![b' '; 9 << 20]), "too large"),
        (Reply::new(200, "{").length(1 << 60), "too large"),
        (Reply::new(200, "<html>"), "cannot be read"),
        (
            Reply::new(200, &image.manifest).header("Docker-Content-Digest", &Digest::of(b"x").to_string()),
            "wrong digest",
        ),
        (Reply::new(404, "{}"), "was not found"),
        (Reply::new(418, r#"{"errors":[{"message":"short and stout"}]}"#), "answered 418: short and stout"),
    ] {
        let (outcome, server, store) = pull_through(&image, manifest(reply));
        let message = outcome.unwrap_err().to_string();
        assert!(message.contains(part), "{message}");
        assert!(message.contains("team/app") || part.starts_with("answered"), "{message}");
        assert_nothing_kept(&image, &server, &store);
    }
    let (outcome, server, store) = pull_through(&count, |_, _| None);
    assert!(matches!(outcome, Err(RegistryError::LayerCount { layers: 2, diff_ids: 1, .. })), "{outcome:?}");
    assert_nothing_kept(&image, &server, &store);
}

#[test]
fn a_length_that_is_absurd_is_refused_before_the_download() {
    let image = image();
    let layer = image.layers[1].0;
    for length in [10, 1 << 60] {
        let (outcome, server, store) = pull_through(&image, move |request, _| {
            request.is_blob(&layer).then(|| Reply::new(200, "0123456789").length(length))
        });
        let error = outcome.unwrap_err();
        assert!(
            matches!(error, RegistryError::WrongSize { digest, actual, .. } if digest == layer && actual == length),
            "{error}"
        );
        assert_nothing_kept(&image, &server, &store);
    }
}

#[test]
fn a_bomb_stops_at_the_limit() {
    // One file of 10 GiB of zeros: a header, then the same 64 MiB of zeros 160 times, each a gzip member.
    let mut bomb = gzip(&tar_header("zeros", 10 << 30));
    let zeros = gzip(&vec![0; 64 << 20]);
    for _ in 0..160 {
        bomb.write_all(&zeros).unwrap();
    }
    bomb.extend(gzip(&[0; 1024]));
    let image = HandMade::of_packed(&[(bomb, Digest::of(b"nobody gets that far"))]);
    let store = TestStore::new();
    let served = image.clone();
    let server = Server::start(move |request, _| served.answer(request));
    let (registry, _conf) = plain_registry();
    let options = PullOptions {
        limits: ImportLimits { max_size: Some(100 << 20), ..ImportLimits::default() },
        ..always()
    };
    let error = registry.pull(&store.store, &server.image(), &options, &Silent).unwrap_err();
    assert!(error.to_string().contains("too large"), "{error}");
    assert_nothing_kept(&image, &server, &store);
}

#[test]
fn a_registry_that_never_answers_is_given_up_with_a_clear_message() {
    let image = image();
    let (outcome, server, store) = pull_through(&image, |request, _| {
        request.path.contains("/manifests/").then(|| Reply::new(200, "").length(5).hang())
    });
    let error = outcome.unwrap_err();
    assert!(matches!(error, RegistryError::TimedOut { attempts: 3, .. }), "{error:?}");
    assert!(error.to_string().contains(&server.address()) && error.hint().is_some(), "{error}");
    assert_nothing_kept(&image, &server, &store);
}

#[test]
fn a_registry_that_is_not_there_is_told_at_once() {
    let store = TestStore::new();
    let (registry, _conf) = plain_registry();
    // The port was free a moment ago.
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let image = name(&format!("localhost:{port}/a:1"));
    let error = registry.pull(&store.store, &image, &always(), &Silent).unwrap_err();
    assert!(matches!(error, RegistryError::Unreachable { .. }), "{error:?}");
    assert!(error.to_string().contains("refused"), "{error}");
}

#[test]
fn a_layer_that_arrived_is_not_fetched_again_after_a_failed_pull() {
    let image = image();
    let (first, second) = (image.layers[0].0, image.layers[1].0);
    let store = TestStore::new();
    let (registry, _conf) = plain_registry();
    let served = image.clone();
    let broken = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(true));
    let state = broken.clone();
    let server = Server::start(move |request, _| {
        let broken = state.load(std::sync::atomic::Ordering::Relaxed);
        if broken && request.is_blob(&second) { Reply::new(404, "") } else { served.answer(request) }
    });
    let options = PullOptions { parallel: Some(1), ..always() };
    registry.pull(&store.store, &server.image(), &options, &Silent).unwrap_err();
    broken.store(false, std::sync::atomic::Ordering::Relaxed);
    let pulled = registry.pull(&store.store, &server.image(), &options, &Silent).unwrap();
    assert_eq!(pulled.layers_pulled, 1);
    assert_eq!(server.requests().iter().filter(|request| request.is_blob(&first)).count(), 1);
}

#[test]
fn a_newer_policy_makes_do_with_what_is_there_when_the_registry_is_gone() {
    let image = image();
    let served = image.clone();
    let store = TestStore::new();
    let (registry, _conf) = plain_registry();
    let server = Server::start(move |request, _| served.answer(request));
    let reference = server.image();
    pull(&registry, &store, &server).unwrap();
    drop(server);
    for (policy, works) in [
        (PullPolicy::Newer, true),
        (PullPolicy::Missing, true),
        (PullPolicy::Never, true),
        (PullPolicy::Always, false),
    ] {
        let options = PullOptions { policy, ..PullOptions::default() };
        // A new session: it has not met the registry.
        let (registry, _conf) = plain_registry();
        let outcome = registry.pull(&store.store, &reference, &options, &Silent);
        assert_eq!(outcome.is_ok(), works, "{policy:?}: {outcome:?}");
    }
    let never = PullOptions { policy: PullPolicy::Never, ..PullOptions::default() };
    let missing = registry.pull(&store.store, &name("localhost:1/none:1"), &never, &Silent);
    assert!(matches!(missing, Err(RegistryError::NotLocal { .. })), "{missing:?}");
}
