//! Credential helpers are programs in `$PATH`. That is changed here, so this is the only test of its program.

mod support;

use std::os::unix::fs::PermissionsExt as _;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use kiln_contract::Silent;
use kiln_registry::{PullOptions, PullPolicy};
use support::{HandMade, Reply, Server, TestStore, registry, tar};

#[test]
fn a_credential_helper_is_asked_by_its_protocol() {
    let bin = tempfile::tempdir().unwrap();
    let path = std::env::var("PATH").unwrap();
    // SAFETY: this is the only test of this program, and it has started no other thread yet.
    unsafe { std::env::set_var("PATH", format!("{}:{path}", bin.path().display())) };
    let accepted = format!("Basic {}", STANDARD.encode("helped:by: a helper"));
    let served = HandMade::new(&[tar(&[("a", b"b")])]);
    let server = Server::start(move |request, _| {
        if request.headers.get("authorization") == Some(&accepted) {
            served.answer(request)
        } else {
            Reply::new(401, "{}").header("WWW-Authenticate", r#"Basic realm="x""#)
        }
    });
    let helper = bin.path().join("docker-credential-kiln-test");
    let script = format!(
        "#!/bin/sh\nread server\n[ \"$1\" = get ] && [ \"$server\" = {} ] || {{ echo credentials not found; exit 1; }}\n\
         echo '{{\"ServerURL\":\"x\",\"Username\":\"helped\",\"Secret\":\"by: a helper\"}}'\n",
        server.address()
    );
    std::fs::write(&helper, script).unwrap();
    std::fs::set_permissions(&helper, std::fs::Permissions::from_mode(0o755)).unwrap();
    let options = PullOptions { policy: PullPolicy::Always, ..PullOptions::default() };
    for (text, works) in [
        (format!(r#"{{"credHelpers":{{"{}":"kiln-test"}}}}"#, server.address()), true),
        (r#"{"credsStore":"kiln-test"}"#.to_owned(), true),
        (r#"{"credsStore":"kiln-no-such-helper"}"#.to_owned(), false),
        (r#"{"credHelpers":{"other.test":"kiln-test"}}"#.to_owned(), false),
    ] {
        let store = TestStore::new();
        let (registry, _conf) = registry(|config, dir| {
            let path = dir.join("mine.json");
            std::fs::write(&path, &text).unwrap();
            config.authfile = Some(path);
        });
        let outcome = registry.pull(&store.store, &server.image(), &options, &Silent);
        assert_eq!(outcome.is_ok(), works, "{text}: {outcome:?}");
    }
}
