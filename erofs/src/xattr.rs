//! xattr names as they stand in images.

use std::borrow::Cow;

use kiln_contract::Digest;

use crate::format::{XATTR_BODY_MAX, XATTR_HEADER};
use crate::{Content, Data, Node};

/// What overlayfs takes for its own in a mount without `userxattr`.
const OVERLAY: &[u8] = b"trusted.overlay.";
/// One level of escape: overlayfs shows `trusted.overlay.overlay.x` as `trusted.overlay.x`.
const ESCAPE: &[u8] = b"overlay.";
/// Markers that are meant for overlayfs wherever they stand in a tree.
const MARKERS: [&[u8]; 3] = [b"opaque", b"whiteout", b"whiteouts"];

/// On a directory: nothing of lower layers is seen in it.
pub(crate) const OPAQUE: &[u8] = b"trusted.overlay.opaque";
pub(crate) const METACOPY: &[u8] = b"trusted.overlay.metacopy";
pub(crate) const REDIRECT: &[u8] = b"trusted.overlay.redirect";

/// Index and prefix; a prefix without final dot is a whole name.
const PREFIXES: [(u8, &[u8]); 5] = [
    (1, b"user."),
    (2, b"system.posix_acl_access"),
    (3, b"system.posix_acl_default"),
    (4, b"trusted."),
    (6, b"security."),
];

fn is_marker(rest: &[u8]) -> bool {
    let mut rest = rest;
    while let Some(inner) = rest.strip_prefix(ESCAPE) {
        rest = inner;
    }
    MARKERS.contains(&rest)
}

/// The name under which an xattr of a tree stands in an image.
///
/// - `trusted.overlay.opaque`, `….whiteout` and `….whiteouts` are meant for overlayfs and stand as they are, and so
///   do their escaped forms (`trusted.overlay.overlay.opaque`): who has an image whose *own* xattr has such a
///   name escapes it before it comes into a tree.
/// - Every other `trusted.overlay.x` stands as `trusted.overlay.overlay.x`, the kernel's own escape
///   (`overlayfs.rst`, «Nesting overlayfs mounts»): an overlay over the image shows it as it was, and nothing
///   that an image brings in can pass for the metacopy and redirect that name objects.
/// - All other names stand as they are.
///
/// [`unescape_xattr_name`] is the inverse.
///
/// ```
/// use kiln_erofs::{escape_xattr_name, unescape_xattr_name};
///
/// assert_eq!(*escape_xattr_name(b"trusted.overlay.redirect"), *b"trusted.overlay.overlay.redirect");
/// assert_eq!(*escape_xattr_name(b"trusted.overlay.opaque"), *b"trusted.overlay.opaque");
/// assert_eq!(*unescape_xattr_name(b"trusted.overlay.overlay.redirect").unwrap(), *b"trusted.overlay.redirect");
/// assert_eq!(unescape_xattr_name(b"trusted.overlay.redirect"), None); // the writer's own
/// ```
pub fn escape_xattr_name(name: &[u8]) -> Cow<'_, [u8]> {
    match name.strip_prefix(OVERLAY) {
        Some(rest) if !is_marker(rest) => Cow::Owned([OVERLAY, ESCAPE, rest].concat()),
        _ => Cow::Borrowed(name),
    }
}

/// The name in a tree of an xattr in an image; `None` for those that the writer made itself.
pub fn unescape_xattr_name(name: &[u8]) -> Option<Cow<'_, [u8]>> {
    match name.strip_prefix(OVERLAY) {
        Some(rest) if !is_marker(rest) => {
            rest.strip_prefix(ESCAPE).map(|rest| Cow::Owned([OVERLAY, rest].concat()))
        }
        _ => Some(Cow::Borrowed(name)),
    }
}

/// A name's prefix index and what remains.
pub(crate) fn split_name(name: &[u8]) -> (u8, &[u8]) {
    for (index, prefix) in PREFIXES {
        match name.strip_prefix(prefix) {
            Some(rest) if prefix.ends_with(b".") != rest.is_empty() => return (index, rest),
            _ => {}
        }
    }
    (0, name)
}

/// The prefix with an index.
pub(crate) fn prefix(index: u8) -> Option<&'static [u8]> {
    if index == 0 {
        return Some(b"");
    }
    PREFIXES.iter().find(|(i, _)| *i == index).map(|(_, prefix)| *prefix)
}

/// `/ab/cdef…`: where an object is below the directory of objects.
pub fn object_redirect(digest: &Digest) -> [u8; 66] {
    let hex = digest.hex();
    let mut path = [b'/'; 66];
    path[1..3].copy_from_slice(&hex.as_bytes()[..2]);
    path[4..].copy_from_slice(&hex.as_bytes()[2..]);
    path
}

/// The object that a redirect names.
pub(crate) fn redirected_object(path: &[u8]) -> Option<Digest> {
    if path.len() != 66 || path[0] != b'/' || path[3] != b'/' {
        return None;
    }
    let mut hex = [0; 64];
    hex[..2].copy_from_slice(&path[1..3]);
    hex[2..].copy_from_slice(&path[4..]);
    Digest::from_hex(std::str::from_utf8(&hex).ok()?).ok()
}

const fn entry_size(name: usize, value: usize) -> usize {
    (4 + name + value).next_multiple_of(4)
}

/// The object that must be named in a node's xattrs.
fn object(node: &Node<'_>, redirects: bool) -> Option<Digest> {
    match node.content {
        Content::Regular(Data::Object { digest, .. }) if redirects => Some(*digest),
        _ => None,
    }
}

/// Bytes of a node's xattrs in an image, or why they cannot be written.
pub(crate) fn size(node: &Node<'_>, redirects: bool) -> Result<usize, String> {
    let mut bytes = 0;
    if object(node, redirects).is_some() {
        bytes += entry_size("overlay.metacopy".len(), 0) + entry_size("overlay.redirect".len(), 66);
    }
    for (name, value) in &node.attributes.xattrs {
        let escaped = escape_xattr_name(name);
        let (index, rest) = split_name(&escaped);
        let shown = || name.escape_ascii();
        if name.is_empty() || name.contains(&0) {
            return Err(format!("`{}` cannot be the name of an xattr", shown()));
        }
        if escaped.len() > 255 || (index == 0 && rest.len() > 255) {
            return Err(format!("the name of the xattr `{}` is longer than 255 bytes", shown()));
        }
        if value.len() > usize::from(u16::MAX) {
            return Err(format!("the xattr `{}` has {} bytes, and 65535 is the most", shown(), value.len()));
        }
        bytes += entry_size(rest.len(), value.len());
    }
    if bytes == 0 {
        return Ok(0);
    }
    if XATTR_HEADER + bytes > XATTR_BODY_MAX {
        return Err(format!(
            "its xattrs take {bytes} bytes, and {} is the most",
            XATTR_BODY_MAX - XATTR_HEADER
        ));
    }
    Ok(XATTR_HEADER + bytes)
}

/// Appends what [`size`] measured.
pub(crate) fn write(node: &Node<'_>, redirects: bool, out: &mut Vec<u8>) {
    let object = object(node, redirects);
    if object.is_none() && node.attributes.xattrs.is_empty() {
        return;
    }
    out.extend_from_slice(&[0; XATTR_HEADER]);
    if let Some(digest) = object {
        write_entry(METACOPY, b"", out);
        write_entry(REDIRECT, &object_redirect(&digest), out);
    }
    for (name, value) in &node.attributes.xattrs {
        write_entry(&escape_xattr_name(name), value, out);
    }
}

fn write_entry(name: &[u8], value: &[u8], out: &mut Vec<u8>) {
    let (index, rest) = split_name(name);
    out.push(rest.len() as u8);
    out.push(index);
    out.extend_from_slice(&(value.len() as u16).to_le_bytes());
    out.extend_from_slice(rest);
    out.extend_from_slice(value);
    let padding = entry_size(rest.len(), value.len()) - (4 + rest.len() + value.len());
    out.extend_from_slice(&[0; 3][..padding]);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn escaping_is_undone_and_markers_pass() {
        for name in [
            "user.x",
            "trusted.x",
            "trusted.overlay.",
            "trusted.overlay.x",
            "trusted.overlay.overlay.x",
            "trusted.overlay.metacopy",
            "trusted.overlay.redirect",
            "trusted.overlay.opaque",
            "trusted.overlay.overlay.opaque",
            "trusted.overlay.overlay.",
        ] {
            let escaped = escape_xattr_name(name.as_bytes());
            let back = unescape_xattr_name(&escaped).map(Cow::into_owned);
            assert_eq!(back.as_deref(), Some(name.as_bytes()), "{name}");
            assert_eq!(*escaped == *name.as_bytes(), is_marker_or_plain(name), "{name}");
        }
        assert_eq!(unescape_xattr_name(METACOPY), None);
        assert_eq!(unescape_xattr_name(REDIRECT), None);
    }

    fn is_marker_or_plain(name: &str) -> bool {
        !name.starts_with("trusted.overlay.") || name.ends_with("opaque")
    }

    #[test]
    fn names_split_at_known_prefixes_only() {
        for (name, index, rest) in [
            ("user.mime", 1, "mime"),
            ("system.posix_acl_access", 2, ""),
            ("system.posix_acl_default", 3, ""),
            ("system.posix_acl_accessory", 0, "system.posix_acl_accessory"),
            ("security.capability", 6, "capability"),
            ("user.", 0, "user."),
            ("btrfs.compression", 0, "btrfs.compression"),
        ] {
            assert_eq!(split_name(name.as_bytes()), (index, rest.as_bytes()), "{name}");
            assert_eq!([prefix(index).unwrap(), rest.as_bytes()].concat(), name.as_bytes());
        }
        assert_eq!(prefix(5), None);
    }

    #[test]
    fn redirects_name_objects_and_nothing_else() {
        let digest = Digest::of(b"kiln");
        let path = object_redirect(&digest);
        assert_eq!(redirected_object(&path), Some(digest));
        for bad in [&path[1..], &path[..65], b"", b"/ab/cd"] {
            assert_eq!(redirected_object(bad), None);
        }
        let mut dots = path;
        dots[1..4].copy_from_slice(b"../");
        assert_eq!(redirected_object(&dots), None);
    }
}
