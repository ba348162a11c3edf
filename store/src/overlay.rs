//! How a layer's tree says what it takes away: overlayfs's forms (`Documentation/filesystems/overlayfs.rst`), and
//! the OCI forms in tars (image-spec 1.1, layer.md, «Whiteouts»).

use kiln_erofs::{Content, Device, Xattrs};

/// On a directory: nothing of lower layers is seen in it.
pub(crate) const OPAQUE: &[u8] = b"trusted.overlay.opaque";

/// On a directory that a tar did not have but whose children it had, and on the root if the tar did not have that
/// ([`crate::format`], "What a layer says of its directories"). Its attributes are a guess, and give way to those of
/// a lower layer's directory.
pub(crate) const IMPLIED: &[u8] = b"trusted.kiln.implied";

/// Before the name of a file that a layer removes.
pub(crate) const WHITEOUT_PREFIX: &[u8] = b".wh.";

/// What a tar calls an opaque directory's mark.
pub(crate) const OPAQUE_NAME: &[u8] = b".wh..wh..opq";

/// Names that aufs used for itself.
pub(crate) const AUFS_PREFIX: &[u8] = b".wh..wh.";

const WHITEOUT: Device = Device { major: 0, minor: 0 };

/// The node that stands for a removed name.
pub(crate) fn whiteout() -> Content {
    Content::CharDevice(WHITEOUT)
}

pub(crate) fn is_whiteout(content: &Content) -> bool {
    matches!(content, Content::CharDevice(device) if *device == WHITEOUT)
}

pub(crate) fn is_opaque(xattrs: &Xattrs) -> bool {
    xattrs.get(OPAQUE).is_some_and(|value| value == b"y")
}

pub(crate) fn is_implied(xattrs: &Xattrs) -> bool {
    xattrs.contains_key(IMPLIED)
}

const PREFIX: &[u8] = b"trusted.overlay.";
const ESCAPE: &[u8] = b"overlay.";

fn is_marker(rest: &[u8]) -> bool {
    let mut rest = rest;
    while let Some(inner) = rest.strip_prefix(ESCAPE) {
        rest = inner;
    }
    matches!(rest, b"opaque" | b"whiteout" | b"whiteouts")
}

/// The name in a tree of an xattr that a file of an image really has: one that overlayfs would take for its own is
/// escaped as the kernel does. (Other `trusted.overlay.` names are escaped by the writer of trees.)
pub(crate) fn own_xattr(name: &[u8]) -> Vec<u8> {
    match name.strip_prefix(PREFIX) {
        Some(rest) if is_marker(rest) => [PREFIX, ESCAPE, rest].concat(),
        _ => name.to_owned(),
    }
}

/// The inverse; `None` for a layer's own marks.
pub(crate) fn xattr_of_file(name: &[u8]) -> Option<Vec<u8>> {
    if name == IMPLIED {
        return None;
    }
    match name.strip_prefix(PREFIX) {
        Some(rest) if is_marker(rest) => rest.strip_prefix(ESCAPE).map(|rest| [PREFIX, rest].concat()),
        _ => Some(name.to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_images_own_overlay_marks_are_escaped_and_come_back() {
        for (name, in_tree) in [
            ("user.x", "user.x"),
            ("trusted.overlay.opaque", "trusted.overlay.overlay.opaque"),
            ("trusted.overlay.overlay.opaque", "trusted.overlay.overlay.overlay.opaque"),
            ("trusted.overlay.redirect", "trusted.overlay.redirect"),
        ] {
            assert_eq!(own_xattr(name.as_bytes()), in_tree.as_bytes());
            assert_eq!(xattr_of_file(in_tree.as_bytes()).as_deref(), Some(name.as_bytes()));
        }
        assert_eq!(xattr_of_file(OPAQUE), None);
    }
}
