//! Who gets to see a secret: token servers and redirects. And how uploads go on.

mod support;

use std::sync::{Arc, Mutex};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use kiln_contract::Silent;
use kiln_registry::{PullOptions, PullPolicy, PushOptions, RegistryError};
use support::{HandMade, Reply, Request, Server, TestStore, name, registry, tar};

fn always() -> PullOptions {
    PullOptions { policy: PullPolicy::Always, ..PullOptions::default() }
}

fn image() -> HandMade {
    HandMade::new(&[tar(&[("a", b"b")])])
}

fn authorization(request: &Request) -> &str {
    request.headers.get("authorization").map_or("", String::as_str)
}

/// A registry that wants a token from a server of its own; tokens are `token-<number>`, and the first one runs out at once.
fn token_registry(
    answer_token: impl Fn(&Request, usize) -> Reply + Send + Sync + 'static,
) -> (Server, Server) {
    let tokens = Server::start(answer_token);
    let realm = format!("http://{}/token", tokens.address());
    let image = image();
    let accepted: Arc<Mutex<Option<String>>> = Arc::default();
    let server = Server::start(move |request, _| {
        let given = authorization(request).to_owned();
        let mut accepted = accepted.lock().unwrap();
        // A token is good for the manifest only; the blobs need a second one.
        let fine = match accepted.as_deref() {
            _ if !given.starts_with("Bearer token-") => false,
            None => {
                *accepted = Some(given.clone());
                true
            }
            Some(first) => request.path.contains("/manifests/") || given != first,
        };
        if fine {
            return image.answer(request);
        }
        let challenge =
            format!(r#"Bearer realm="{realm}",service="the registry",scope="repository:team/app:pull""#);
        Reply::new(401, r#"{"errors":[{"code":"UNAUTHORIZED"}]}"#).header("WWW-Authenticate", &challenge)
    });
    (server, tokens)
}

#[test]
fn tokens_are_fetched_with_scopes_and_renewed_when_they_are_refused() {
    let (server, tokens) = token_registry(|_, before| {
        Reply::new(200, format!(r#"{{"token":"token-{before}","expires_in":300}}"#))
    });
    let store = TestStore::new();
    let (registry, _conf) = registry(|config, dir| {
        let path = dir.join("mine.json");
        let auth = STANDARD.encode("me:my password");
        std::fs::write(&path, format!(r#"{{"auths":{{"{}/team":{{"auth":"{auth}"}}}}}}"#, server.address()))
            .unwrap();
        config.authfile = Some(path);
    });
    registry.pull(&store.store, &server.image(), &always(), &Silent).unwrap();
    let asked = tokens.requests();
    assert!(asked.len() >= 2, "{asked:?}");
    for request in &asked {
        assert_eq!(request.method, "GET");
        for part in ["service=the+registry", "scope=repository%3Ateam%2Fapp%3Apull", "account=me"] {
            assert!(request.path.contains(part), "{}", request.path);
        }
        assert_eq!(authorization(request), format!("Basic {}", STANDARD.encode("me:my password")));
    }
    let sent = server.requests();
    assert!(
        sent.iter().all(|request| !authorization(request).starts_with("Basic")),
        "the password goes to the token server only"
    );
}

#[test]
fn an_identity_token_is_exchanged_and_a_refusal_says_why() {
    let (server, tokens) = token_registry(|request, before| {
        if String::from_utf8_lossy(&request.body).contains("refresh_token=good") {
            Reply::new(200, format!(r#"{{"access_token":"token-{before}"}}"#))
        } else {
            Reply::new(401, r#"{"details":"no such token"}"#)
        }
    });
    for (token, works) in [("good", true), ("bad", false)] {
        let store = TestStore::new();
        let (registry, _conf) = registry(|config, dir| {
            let path = dir.join("mine.json");
            let text = format!(r#"{{"auths":{{"{}":{{"identitytoken":"{token}"}}}}}}"#, server.address());
            std::fs::write(&path, text).unwrap();
            config.authfile = Some(path);
        });
        let outcome = registry.pull(&store.store, &server.image(), &always(), &Silent);
        assert_eq!(outcome.is_ok(), works, "{outcome:?}");
        if let Err(error) = outcome {
            assert!(matches!(error, RegistryError::Denied { with_credentials: true, .. }), "{error:?}");
            assert!(
                error.to_string().contains("no such token") && !error.to_string().contains("bad"),
                "{error}"
            );
        }
    }
    let first = &tokens.requests()[0];
    assert_eq!(first.method, "POST");
    let body = String::from_utf8_lossy(&first.body).into_owned();
    assert!(body.contains("grant_type=refresh_token") && body.contains("service=the+registry"), "{body}");
}

#[test]
fn a_redirect_to_another_host_takes_no_secret_along() {
    let image = image();
    let (blobs, served) = (image.clone(), image.clone());
    let storage = Server::start(move |request, _| {
        let digest = request.path.trim_start_matches('/');
        Reply::new(200, &blobs.blobs[digest])
    });
    let elsewhere = storage.address();
    let server = Server::start(move |request, _| {
        if authorization(request) != format!("Basic {}", STANDARD.encode("me:secret")) {
            return Reply::new(401, "{}").header("WWW-Authenticate", r#"Basic realm="x""#);
        }
        match request.path.rsplit_once("/blobs/") {
            Some((_, digest)) => {
                Reply::new(307, "").header("Location", &format!("http://{elsewhere}/{digest}"))
            }
            None => served.answer(request),
        }
    });
    let store = TestStore::new();
    let (registry, _conf) = registry(|config, dir| {
        let path = dir.join("mine.json");
        let auth = STANDARD.encode("me:secret");
        std::fs::write(&path, format!(r#"{{"auths":{{"{}":{{"auth":"{auth}"}}}}}}"#, server.address()))
            .unwrap();
        config.authfile = Some(path);
    });
    registry.pull(&store.store, &server.image(), &always(), &Silent).unwrap();
    let seen = storage.requests();
    assert_eq!(seen.len(), 2, "config and layer");
    assert!(seen.iter().all(|request| !request.headers.contains_key("authorization")), "{seen:?}");
}

#[test]
fn redirects_without_end_are_given_up() {
    let served = image();
    let server = Server::start(move |request, _| match request.path.contains("/blobs/") {
        true => Reply::new(302, "").header("Location", &request.path),
        false => served.answer(request),
    });
    let store = TestStore::new();
    let (registry, _conf) = support::plain_registry();
    let error = registry.pull(&store.store, &server.image(), &always(), &Silent).unwrap_err();
    assert!(error.to_string().contains("more than 10 redirects"), "{error}");
}

/// A registry for one upload; `fault` may answer in its place.
fn upload_registry(
    fault: impl Fn(&Request, usize) -> Option<Reply> + Send + Sync + 'static,
) -> (Server, Arc<Mutex<Vec<u8>>>) {
    let taken: Arc<Mutex<Vec<u8>>> = Arc::default();
    let body = taken.clone();
    let done: Mutex<Vec<String>> = Mutex::default();
    let server = Server::start(move |request, before| {
        if let Some(reply) = fault(request, before) {
            return reply;
        }
        let mut taken = body.lock().unwrap();
        let mut done = done.lock().unwrap();
        let (path, query) = request.path.split_once('?').unwrap_or((&request.path, ""));
        let range = |length: usize| format!("0-{}", length.saturating_sub(1));
        match (request.method.as_str(), path) {
            ("GET", "/v2/") => Reply::new(200, "{}"),
            ("POST", _) => {
                taken.clear();
                Reply::new(202, "").header("Location", "/v2/up/blobs/uploads/1")
            }
            ("PATCH", _) => {
                taken.extend(&request.body);
                Reply::new(202, "")
                    .header("Location", "/v2/up/blobs/uploads/1")
                    .header("Range", &range(taken.len()))
            }
            ("GET", "/v2/up/blobs/uploads/1") => Reply::new(204, "").header("Range", &range(taken.len())),
            ("PUT", "/v2/up/blobs/uploads/1") => {
                taken.extend(&request.body);
                let digest = query.strip_prefix("digest=").unwrap().replace("%3A", ":");
                assert_eq!(digest, kiln_contract::Digest::of(&taken).to_string());
                done.push(digest);
                Reply::new(201, "")
            }
            ("HEAD", path) if done.iter().any(|digest| path.ends_with(digest)) => Reply::new(200, ""),
            ("HEAD", _) => Reply::new(404, ""),
            ("PUT", _) => Reply::new(201, ""),
            _ => Reply::new(404, ""),
        }
    });
    (server, taken)
}

#[test]
fn an_upload_that_breaks_goes_on_or_begins_anew() {
    type Fault = fn(&Request, usize) -> Option<Reply>;
    let faults: [(&str, Fault, usize); 4] = [
        ("no fault", |_, _| None, 2),
        (
            "500 for the first chunk",
            |request, before| (request.method == "PATCH" && before == 0).then(|| Reply::new(500, "")),
            3,
        ),
        (
            "429 for the first chunk",
            |request, before| {
                (request.method == "PATCH" && before == 0)
                    .then(|| Reply::new(429, "").header("Retry-After", "0"))
            },
            3,
        ),
        (
            "a session that is lost",
            |request, before| (request.method == "PATCH" && before == 1).then(|| Reply::new(404, "")),
            4,
        ),
    ];
    let store = TestStore::new();
    let layer = store
        .store
        .import_tar(&tar(&[("noise", &support::noise(20 << 20))])[..], None, Default::default())
        .unwrap();
    let image = store.store.make_image(&Default::default(), &[layer.layer]).unwrap();
    for (what, fault, patches) in faults {
        let (server, _taken) = upload_registry(fault);
        let (registry, _conf) = support::plain_registry();
        let to = name(&format!("{}/up:1", server.address()));
        let pushed = registry.push(&store.store, &image, &to, &PushOptions::default(), &Silent);
        let pushed = pushed.unwrap_or_else(|error| panic!("{what}: {error}"));
        assert_eq!(pushed.layers_pushed, 1);
        let made = server.requests().iter().filter(|request| request.method == "PATCH").count();
        assert_eq!(made, patches, "{what}");
    }
}
