//! What a system's init finds in `/run` when it starts in a machine: so that it leaves alone what the guest has set up.
//!
//! All of it is configuration in the places that systemd, udev and NetworkManager have for what is decided at run time; it is
//! in memory, and no part of the root's changes. An image that has other ideas overrides it in `/etc`.

use std::net::IpAddr;

use kiln_link::message::HostFile;

/// The network's device in every guest.
const DEVICE: &str = "kiln0";

/// The files, for a machine that asks this server for names.
pub(crate) fn files(name_server: Option<IpAddr>) -> Vec<HostFile> {
    let file =
        |path: &str, content: String| HostFile { path: path.to_owned(), content: content.into_bytes() };
    vec![
        // An empty unit is a masked one. This one would write the machine's id, which lies over the image's file, into the
        // root: commits would carry it along, and a fork's own would not be seen.
        file("/run/systemd/system/systemd-machine-id-commit.service", String::new()),
        // The guest has given it its addresses and routes.
        file(
            "/run/systemd/network/00-kiln.network",
            format!("[Match]\nName={DEVICE}\n\n[Link]\nUnmanaged=yes\n"),
        ),
        file(
            "/run/NetworkManager/conf.d/00-kiln.conf",
            format!("[keyfile]\nunmanaged-devices=interface-name:{DEVICE}\n"),
        ),
        // Where it answers names, `/etc/resolv.conf` is a link to a file of its own.
        file("/run/systemd/resolved.conf.d/00-kiln.conf", resolved(name_server)),
        // What is on the machine's disks is known; the image's is shorter than it says, and reading its end fails.
        file(
            "/run/udev/rules.d/00-kiln.rules",
            "SUBSYSTEM==\"block\", ATTR{serial}==\"kiln-*\", \
             ENV{UDEV_DISABLE_PERSISTENT_STORAGE_RULES_FLAG}=\"1\", OPTIONS+=\"nowatch\"\n"
                .to_owned(),
        ),
    ]
}

fn resolved(name_server: Option<IpAddr>) -> String {
    let server = name_server.map(|address| address.to_string()).unwrap_or_default();
    // Nobody else is asked.
    format!("[Resolve]\nDNS={server}\nFallbackDNS=\nLLMNR=no\nMulticastDNS=no\n")
}
