//! What of all this works on this host.

use std::fs;

use rustix::fs::{Access, access};

use super::{namespace, program};

/// What was looked at, whether it is as it should be, and what that means for the user.
pub fn doctor() -> Vec<(String, bool, String)> {
    let privileged = namespace::may_configure();
    let nft = program::find("nft");
    let pasta = program::find("pasta");
    let forwarding =
        fs::read_to_string("/proc/sys/net/ipv4/ip_forward").is_ok_and(|value| value.trim() == "1");
    let tun = access("/dev/net/tun", Access::READ_OK | Access::WRITE_OK);
    let found = |program: &Option<std::path::PathBuf>, package: &str, purpose: &str| match program {
        Some(path) => format!("{} {purpose}", path.display()),
        None => format!("not found; install the package `{package}`: it {purpose}"),
    };
    let line = |name: &str, ok: bool, text: String| (name.to_owned(), ok, text);
    vec![
        line(
            "bridge",
            privileged && nft.is_some(),
            match (privileged, nft.is_some()) {
                (true, true) => "this user can make bridge networks".into(),
                (true, false) => "bridge networks need `nft`".into(),
                (false, _) => {
                    "bridge networks take root's rights over the host's network; pasta is used instead".into()
                }
            },
        ),
        line("nft", nft.is_some(), found(&nft, "nftables", "writes the packet rules of bridge networks")),
        line(
            "ip_forward",
            forwarding || privileged,
            match (forwarding, privileged) {
                (true, _) => "on: containers on bridges reach the outside".into(),
                (false, true) => "off: Kiln turns it on with the first container on a bridge".into(),
                (false, false) => "off: containers on bridges would not reach the outside".into(),
            },
        ),
        line(
            "pasta",
            pasta.is_some(),
            found(&pasta, "passt", "connects containers of users who are not root"),
        ),
        line(
            "tun",
            tun.is_ok(),
            match tun {
                Ok(()) => "/dev/net/tun can be opened: pasta can work".into(),
                Err(error) => format!(
                    "/dev/net/tun: {error}; pasta needs it: `modprobe tun` and mode 0666 are what distributions set up"
                ),
            },
        ),
    ]
}
