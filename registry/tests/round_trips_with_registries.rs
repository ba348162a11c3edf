//! Pulls from and pushes to a real registry, judged by `skopeo` and `umoci`.

mod support;

use std::path::{Path, PathBuf};
use std::process::Command;

use kiln_contract::{Digest, Silent};
use kiln_fixtures::{RegistryOptions, RegistryServer, busybox_rootfs, oci_layout, require};
use kiln_registry::{Compression, Packing, PullOptions, PullPolicy, PushOptions, Registry, RegistryError};
use support::{TestStore, gzip, name, noise, plain_registry, registry, run, tar};

fn always() -> PullOptions {
    PullOptions { policy: PullPolicy::Always, ..PullOptions::default() }
}

struct Setup {
    skopeo: PathBuf,
    layout: PathBuf,
    server: RegistryServer,
}

/// A registry with `busybox:latest` in it, pushed by skopeo.
fn setup(options: &RegistryOptions) -> Option<Setup> {
    let skopeo = require("skopeo")?;
    let layout = oci_layout(&busybox_rootfs()?, "latest")?;
    let server = RegistryServer::start(options)?;
    let mut copy = Command::new(&skopeo);
    copy.args(["--insecure-policy", "copy", "--dest-tls-verify=false"]);
    if let Some((user, password)) = &options.basic_auth {
        copy.arg(format!("--dest-creds={user}:{password}"));
    }
    copy.arg(format!("oci:{}:latest", layout.display()));
    run(copy.arg(format!("docker://{}/busybox:latest", server.address())));
    Some(Setup { skopeo, layout, server })
}

impl Setup {
    fn inspect(&self, repository: &str) -> serde_json::Value {
        let mut inspect = Command::new(&self.skopeo);
        inspect.args(["inspect", "--raw", "--tls-verify=false"]);
        let text = run(inspect.arg(format!("docker://{}/{repository}", self.server.address())));
        serde_json::from_str(&text).unwrap()
    }

    /// Requests that change something.
    fn writes(&self) -> Vec<String> {
        let requests = self.server.requests().into_iter();
        requests.filter(|request| !request.starts_with("GET") && !request.starts_with("HEAD")).collect()
    }
}

#[test]
fn a_pulled_image_is_the_one_that_skopeo_pushed_and_an_unchanged_tag_costs_one_request() {
    let Some(setup) = setup(&RegistryOptions::default()) else { return };
    let store = TestStore::new();
    let (registry, _conf) = plain_registry();
    let reference = name(&format!("{}/busybox:latest", setup.server.address()));
    let pulled = registry.pull(&store.store, &reference, &always(), &Silent).unwrap();
    assert!(!pulled.up_to_date && pulled.bytes > 0 && pulled.layers_pulled == 1, "{pulled:?}");
    let manifest = setup.inspect("busybox:latest");
    assert_eq!(manifest["config"]["digest"], pulled.image.id.to_string());
    let mut tar = Vec::new();
    store.store.export_tar(&pulled.image.layers[0], &mut tar).unwrap();
    assert_eq!(Digest::of(&tar).to_string(), pulled.image.config.rootfs().diff_ids()[0]);

    let before = setup.server.requests().len();
    let again = registry.pull(&store.store, &reference, &always(), &Silent).unwrap();
    assert!(again.up_to_date && again.layers_pulled == 0);
    assert_eq!(setup.server.requests()[before..], ["GET /v2/busybox/manifests/latest 200"]);
    assert_eq!(store.store.tag_history(&reference).unwrap().len(), 1, "an unchanged tag has no new entry");

    // By digest, and as the default policy has it: no request at all.
    let by_digest = name(&format!("{}/busybox@{}", setup.server.address(), pulled.image.manifest_digest));
    let before = setup.server.requests().len();
    for reference in [&reference, &by_digest] {
        registry.pull(&store.store, reference, &PullOptions::default(), &Silent).unwrap();
    }
    assert_eq!(setup.server.requests().len(), before);
}

#[test]
fn a_push_sends_only_what_is_missing() {
    let Some(setup) = setup(&RegistryOptions::default()) else { return };
    let store = TestStore::new();
    let (registry, _conf) = plain_registry();
    let at = |repository: &str| name(&format!("{}/{repository}", setup.server.address()));
    let image = registry.pull(&store.store, &at("busybox:latest"), &always(), &Silent).unwrap().image;
    let push =
        |to: &str| registry.push(&store.store, &image, &at(to), &PushOptions::default(), &Silent).unwrap();

    // Another tag of the same repository: only the manifest.
    let pushed = push("busybox:copy");
    assert_eq!((pushed.layers_present, pushed.layers_mounted, pushed.layers_pushed), (1, 0, 0));
    assert_eq!(pushed.manifest, image.manifest_digest);
    // Another repository: the layer is taken over, the manifest stays.
    let pushed = push("other/box:1");
    assert_eq!((pushed.layers_present, pushed.layers_mounted, pushed.layers_pushed), (0, 1, 0));
    assert_eq!(pushed.manifest, image.manifest_digest);
    let before = setup.writes().len();
    let pushed = push("other/box:1");
    assert_eq!((pushed.bytes, pushed.layers_present), (0, 1));
    assert_eq!(setup.writes().len(), before, "{:?}", setup.writes());

    // Another registry: it has nothing, and the original blob is no longer there.
    let Some(second) = RegistryServer::start(&RegistryOptions::default()) else { return };
    let far = name(&format!("{}/box:1", second.address()));
    let pushed = registry.push(&store.store, &image, &far, &PushOptions::default(), &Silent).unwrap();
    assert_eq!(pushed.layers_pushed, 1);
    let before = second.requests().len();
    let again = registry.push(&store.store, &image, &far, &PushOptions::default(), &Silent).unwrap();
    assert_eq!((again.bytes, again.layers_present, again.manifest), (0, 1, pushed.manifest));
    let requests = &second.requests()[before..];
    assert!(requests.iter().all(|request| request.starts_with("HEAD")), "{requests:?}");

    // What came out is the same image for everybody.
    let empty = TestStore::new();
    let back = registry.pull(&empty.store, &far, &always(), &Silent).unwrap().image;
    assert_eq!((back.id, &back.layers), (image.id, &image.layers));
    let copy = setup.server.directory.path().join("copy");
    let mut skopeo = Command::new(&setup.skopeo);
    skopeo.args(["--insecure-policy", "copy", "--src-tls-verify=false"]);
    run(skopeo.arg(format!("docker://{}/box:1", second.address())).arg(format!("oci:{}:1", copy.display())));
    let Some(umoci) = require("umoci") else { return };
    let bundle = setup.server.directory.path().join("bundle");
    let mut unpack = Command::new(umoci);
    unpack.args(["unpack", "--rootless", "--image"]).arg(format!("{}:1", copy.display()));
    run(unpack.arg(&bundle));
    assert!(bundle.join("rootfs/bin/busybox").exists());
}

#[test]
fn images_made_here_are_packed_on_the_way_and_remembered() {
    let Some(setup) = setup(&RegistryOptions::default()) else { return };
    let store = TestStore::new();
    let (registry, _conf) = plain_registry();
    let base = name(&format!("{}/busybox:latest", setup.server.address()));
    let base = registry.pull(&store.store, &base, &always(), &Silent).unwrap().image;
    // As a commit does it: a layer on top, which does not compress and needs several chunks.
    let top = tar(&[("noise", &noise(20 << 20))]);
    let layer = store.store.import_tar(&top[..], None, Default::default()).unwrap();
    let stack = [base.layers.clone(), vec![layer.layer]].concat();
    let image = store.store.make_image(&base.config, &stack).unwrap();
    for (compression, media_type, repository) in [
        (Compression::Gzip, "application/vnd.oci.image.layer.v1.tar+gzip", "gzip:1"),
        (Compression::Zstd, "application/vnd.oci.image.layer.v1.tar+zstd", "zstd:1"),
        (Compression::None, "application/vnd.oci.image.layer.v1.tar", "plain:1"),
    ] {
        let to = name(&format!("{}/{repository}", setup.server.address()));
        let options = PushOptions { packing: Packing::Stream(compression), ..PushOptions::default() };
        let before = setup.writes().len();
        let pushed = registry.push(&store.store, &image, &to, &options, &Silent).unwrap();
        assert_eq!((pushed.layers_mounted, pushed.layers_pushed), (1, 1), "{repository}");
        let patches = setup.writes()[before..].iter().filter(|request| request.starts_with("PATCH")).count();
        assert_eq!(patches, 2, "20 MiB in chunks of 8: two, and the rest with the closing request");
        let manifest = setup.inspect(repository);
        assert_eq!(manifest["layers"][1]["mediaType"], media_type);
        assert_eq!(manifest["layers"][0]["mediaType"], "application/vnd.oci.image.layer.v1.tar+gzip");
        let again = registry.push(&store.store, &image, &to, &options, &Silent).unwrap();
        assert_eq!((again.bytes, again.manifest), (0, pushed.manifest));
        let empty = TestStore::new();
        let back = registry.pull(&empty.store, &to, &always(), &Silent).unwrap().image;
        assert_eq!((back.id, &back.layers), (image.id, &image.layers), "{repository}");
    }
}

#[test]
fn a_registry_with_tls_is_trusted_only_with_its_authority() {
    let Some(setup) = setup(&RegistryOptions { tls: true, basic_auth: None }) else { return };
    let ca = setup.server.ca().unwrap();
    let certs = ca.parent().unwrap().to_owned();
    let reference = name(&format!("{}/busybox:latest", setup.server.address()));
    type Change = Box<dyn FnOnce(&mut kiln_registry::Config, &Path)>;
    let address = setup.server.address();
    let changes: [(&str, bool, Change); 4] = [
        ("nothing", false, Box::new(|_, _| ())),
        ("--cert-dir", true, Box::new(|config, _| config.cert_dir = Some(certs))),
        ("--tls-verify=false", true, Box::new(|config, _| config.insecure = true)),
        (
            "insecure in registries.conf",
            true,
            Box::new(move |config, dir| {
                let path = dir.join("insecure.conf");
                std::fs::write(&path, format!("[[registry]]\nlocation = \"{address}\"\ninsecure = true\n"))
                    .unwrap();
                config.registries_conf = Some(path);
            }),
        ),
    ];
    for (what, works, change) in changes {
        let store = TestStore::new();
        let (registry, _conf) = registry(change);
        let outcome = registry.pull(&store.store, &reference, &always(), &Silent);
        match outcome {
            Ok(_) => assert!(works, "{what}"),
            Err(error) => {
                assert!(!works, "{what}: {error}");
                assert!(matches!(error, RegistryError::Tls { .. }), "{what}: {error:?}");
                assert!(error.hint().unwrap().contains("certs.d"));
            }
        }
    }
}

#[test]
fn a_registry_with_accounts_wants_the_right_one() {
    let account = Some(("user".to_owned(), "secret".to_owned()));
    let Some(setup) = setup(&RegistryOptions { tls: false, basic_auth: account }) else { return };
    let store = TestStore::new();
    let (registry, conf) = plain_registry();
    let reference = name(&format!("{}/busybox:latest", setup.server.address()));
    let pull = |registry: &Registry| registry.pull(&store.store, &reference, &always(), &Silent);
    let denied = pull(&registry).unwrap_err();
    assert!(matches!(denied, RegistryError::Denied { with_credentials: false, .. }), "{denied:?}");
    assert_eq!(denied.hint().unwrap(), format!("log in first: kiln login {}", setup.server.address()));

    let wrong = registry.login(&setup.server.address(), "user", "wrong").unwrap_err();
    assert!(matches!(wrong, RegistryError::Denied { with_credentials: true, .. }), "{wrong:?}");
    let path = conf.path().join("auth.json");
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "{}", "a login that failed is not kept");

    assert_eq!(registry.login(&setup.server.address(), "user", "secret").unwrap(), path);
    use std::os::unix::fs::PermissionsExt as _;
    assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, 0o600);
    let with_login = |change: &dyn Fn(&mut kiln_registry::Config)| {
        let path = path.clone();
        support::registry(|config, _| {
            config.authfile = Some(path);
            change(config);
        })
    };
    let (registry, _conf) = with_login(&|_| ());
    pull(&registry).unwrap();
    // skopeo reads what was written.
    let mut inspect = Command::new(&setup.skopeo);
    inspect.args(["inspect", "--raw", "--tls-verify=false", "--authfile"]).arg(&path);
    run(inspect.arg(format!("docker://{}/busybox:latest", setup.server.address())));
    let image = store.store.resolve(&reference.familiar()).unwrap();
    let to = name(&format!("{}/other:1", setup.server.address()));
    let pushed = registry.push(&store.store, &image, &to, &PushOptions::default(), &Silent).unwrap();
    assert_eq!(pushed.layers_mounted, 1);

    assert!(registry.logout(&setup.server.address()).unwrap());
    assert!(!registry.logout(&setup.server.address()).unwrap());
    let (registry, _conf) = with_login(&|_| ());
    assert!(matches!(pull(&registry), Err(RegistryError::Denied { with_credentials: false, .. })));
}

#[test]
fn a_mirror_serves_what_it_has_and_the_registry_the_rest() {
    let Some(setup) = setup(&RegistryOptions::default()) else { return };
    let store = TestStore::new();
    let address = setup.server.address();
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let (registry, _conf) = registry(move |config, dir| {
        let path = dir.join("mirrors.conf");
        let text = format!(
            "[[registry]]\nprefix = \"registry.invalid/lib\"\nlocation = \"{address}\"\n\
             [[registry.mirror]]\nlocation = \"localhost:{port}\"\n[[registry.mirror]]\nlocation = \"{address}/nowhere\"\n\
             [[registry]]\nprefix = \"registry.invalid/bad\"\nblocked = true\n"
        );
        std::fs::write(&path, text).unwrap();
        config.registries_conf = Some(path);
    });
    // The first mirror is not there, the second has no such repository.
    let reference = name("registry.invalid/lib/busybox:latest");
    registry.pull(&store.store, &reference, &always(), &Silent).unwrap();
    assert!(
        store.store.resolve("registry.invalid/lib/busybox").is_ok(),
        "tagged with the name that was asked for"
    );
    let blocked = registry.pull(&store.store, &name("registry.invalid/bad/x:1"), &always(), &Silent);
    assert!(matches!(blocked, Err(RegistryError::Blocked { .. })), "{blocked:?}");
}

#[test]
fn an_index_gives_the_image_of_the_platform_that_is_asked_for() {
    let Some(setup) = setup(&RegistryOptions::default()) else { return };
    let _ = &setup.layout;
    let architectures = ["amd64", "arm64"];
    let mut entries = Vec::new();
    let mut ids = Vec::new();
    for architecture in architectures {
        let tar = tar(&[("arch", architecture.as_bytes())]);
        let mut image = support::HandMade::of_packed(&[(gzip(&tar), Digest::of(&tar))]);
        let config = serde_json::json!({
            "os": "linux", "architecture": architecture, "rootfs": {"type": "layers", "diff_ids": [Digest::of(&tar)]},
        });
        let manifest: serde_json::Value = serde_json::from_slice(&image.manifest).unwrap();
        image.set(&config, manifest["layers"].as_array().unwrap());
        ids.push(Digest::of(config.to_string().as_bytes()));
        for blob in image.blobs.values() {
            upload(&setup.server.address(), "multi", blob);
        }
        put_manifest(
            &setup.server.address(),
            "multi",
            &Digest::of(&image.manifest).to_string(),
            support::OCI_MANIFEST,
            &image.manifest,
        );
        entries.push(serde_json::json!({
            "mediaType": support::OCI_MANIFEST, "digest": Digest::of(&image.manifest), "size": image.manifest.len(),
            "platform": {"os": "linux", "architecture": architecture},
        }));
    }
    let index =
        serde_json::json!({"schemaVersion": 2, "mediaType": support::OCI_INDEX, "manifests": entries})
            .to_string();
    put_manifest(&setup.server.address(), "multi", "1", support::OCI_INDEX, index.as_bytes());
    let by_digest = format!("multi@{}", Digest::of(index.as_bytes()));
    for reference in ["multi:1", &by_digest] {
        let store = TestStore::new();
        let (registry, _conf) = plain_registry();
        let reference = name(&format!("{}/{reference}", setup.server.address()));
        for (architecture, id) in architectures.iter().zip(&ids) {
            for up_to_date in [false, true] {
                let before = setup.server.requests().len();
                let options = PullOptions { platform: Some(architecture.parse().unwrap()), ..always() };
                let pulled = registry.pull(&store.store, &reference, &options, &Silent).unwrap();
                assert_eq!((pulled.image.id, pulled.up_to_date), (*id, up_to_date), "{architecture}");
                let requests = setup.server.requests().split_off(before);
                assert!(!up_to_date || requests.len() <= 1, "{requests:?}");
            }
        }
        let options = PullOptions { platform: Some("linux/s390x".parse().unwrap()), ..always() };
        let error = registry.pull(&store.store, &reference, &options, &Silent).unwrap_err();
        assert!(error.to_string().ends_with("it has linux/amd64, linux/arm64"), "{error}");
    }
}

fn upload(address: &str, repository: &str, blob: &[u8]) {
    let opened =
        support::http(address, "POST", &format!("/v2/{repository}/blobs/uploads/"), "text/plain", b"");
    let location = opened.lines().find_map(|line| line.strip_prefix("Location: ")).unwrap();
    let path = location.split_once(address).map_or(location, |(_, path)| path);
    let digest = Digest::of(blob);
    support::http(address, "PUT", &format!("{path}&digest={digest}"), "application/octet-stream", blob);
}

fn put_manifest(address: &str, repository: &str, reference: &str, media_type: &str, manifest: &[u8]) {
    support::http(address, "PUT", &format!("/v2/{repository}/manifests/{reference}"), media_type, manifest);
}
