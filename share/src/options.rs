//! What the one who shares decides.

use crate::ShareError;

/// Whom files belong to, as the guest sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Ownership {
    /// User and group ids are the same in the guest as on the host.
    ///
    /// Where this process is root, what the guest makes belongs to the guest's user who made it, `chown` works, and
    /// set-user-ID bits, capabilities of files and ACLs are kept: root in the guest can leave programs on the host that
    /// run as root there, as root in a container with a bind mount can. Where this process is an ordinary user,
    /// everything that the guest makes belongs to him, whichever of the guest's users made it, and the kernel decides
    /// what else may be changed (`chown` to somebody else: `EPERM`).
    #[default]
    Host,
    /// Every file belongs to this user and this group of the guest, and whatever is made belongs to this process's user
    /// on the host. `chown` succeeds and changes nothing, so that archives unpack. Set-user-ID and set-group-ID bits of
    /// files, capabilities and ACLs, which would mean somebody else on the host, are not passed.
    Squash {
        /// The user id in the guest.
        uid: u32,
        /// The group id in the guest.
        gid: u32,
    },
}

/// How a share is served. `Options::default()` shares for reading and writing with the ids of the host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Options {
    /// Refuse everything that would change a file, with `EROFS`, whatever the guest mounted it as.
    pub read_only: bool,
    /// Whom files belong to.
    pub ownership: Ownership,
    /// The largest message in bytes, 4096 to 1 MiB (the default). A session needs at most twice that for each request in
    /// flight; data travel in messages of a whole number of pages below it.
    pub message_size: u32,
    /// How many requests are served at once, 1 to 64 (8). Each is a thread of [`crate::Share::serve`].
    pub requests: usize,
    /// How many files the guest may know or have open at once, 16 to 1048576 (65536). Each takes up to two descriptors
    /// of this process, and one more if it is open: see [`crate::raise_descriptor_limit`].
    pub fids: usize,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            read_only: false,
            ownership: Ownership::Host,
            message_size: 1 << 20,
            requests: 8,
            fids: 1 << 16,
        }
    }
}

impl Options {
    #[cfg_attr(not(target_os = "linux"), allow(dead_code, reason = "nothing can be shared there yet"))]
    pub(crate) fn check(&self) -> Result<(), ShareError> {
        let limits = [
            ("message_size", self.message_size as usize, 4096..=1 << 20, "4096 to 1048576"),
            ("requests", self.requests, 1..=64, "1 to 64"),
            ("fids", self.fids, 16..=1 << 20, "16 to 1048576"),
        ];
        match limits.into_iter().find(|(_, value, allowed, _)| !allowed.contains(value)) {
            Some((name, value, _, range)) => Err(ShareError::Limit { name, value, range }),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_outside_of_their_ranges_are_named() {
        assert!(Options::default().check().is_ok());
        for (options, expected) in [
            (Options { message_size: 4095, ..Options::default() }, "message_size = 4095"),
            (Options { message_size: (1 << 20) + 1, ..Options::default() }, "message_size = 1048577"),
            (Options { requests: 0, ..Options::default() }, "requests = 0"),
            (Options { fids: 1, ..Options::default() }, "fids = 1"),
        ] {
            let message = options.check().unwrap_err().to_string();
            assert!(message.contains(expected), "{message}");
        }
    }
}
