//! The store on disk.
//!
//! ```text
//! FORMAT                      the format's version: a decimal number and a newline
//! lock                        flock: shared to use, exclusive to collect
//! objects/ab/cdef…            regular files by SHA-256, mode 0444; see below
//! layers/<sha256>.erofs       a layer's tree: a metadata-only EROFS image; its SHA-256 is the layer's identity
//! layers/<sha256>.split       how the layer's tar is made again (`split` module); gives its diff_id
//! lazy/<sha256>               where the objects of a layer lie whose tar has not come (`lazy` module)
//! diffs/<diff_id>             what is known of a tar, a line each:
//!                               `layer sha256:…`                     the layer that it became
//!                               `blob <media type> sha256:… <size>`  a compressed form that a registry has; of
//!                                                                    zstd:chunked, the digest and position of its table follow
//! diffs/<diff_id>.split       a second tar that became the same layer (other order, other user names)
//! diffs/blobs/<sha256>        the diff_id of a compressed form: `sha256:…` and a newline
//! blobs/sha256/<hex>          OCI manifests, configs, indexes, as received
//! images/<config sha256>      an image by its id, newest lines last:
//!                               `sha256:…`             a manifest of it
//!                               `from <repository>`    where it was pulled from or pushed to
//!                               `index sha256:…`       an index in that repository by whose digest it was asked for
//! tags/<repository>/:<tag>    a tag's history (`tag` module)
//! renders/merged/<sha256>     merged trees, named by the SHA-256 of the stack's layer digests (32 bytes each)
//! renders/disks/<sha256>       image disks (`image_disk` module), named in the same way
//! renders/stacks/<sha256>     the layers of an image (`stacks` module)
//! damaged                     what the last check found wrong and could not repair (`known_damage` module), a line each:
//!                               `object sha256:…`, `layer sha256:…`, `split sha256:…` (a layer whose stream is wrong)
//! tmp/<pid>-<n>               staging of one writer: a directory or file that it holds an flock on; swept when free
//! ```
//!
//! # What makes it safe
//!
//! A writer puts everything into its own directory below `tmp/`, calls `syncfs` **once**, and then renames:
//! objects first, then the split stream, then the tree, then `diffs/<diff_id>`. So
//! - nothing is ever seen half-written: a name appears by `rename`, of a file that is complete;
//! - after a power cut, too: data are on the disk before the first rename, and file systems that log their
//!   metadata (ext4, XFS, btrfs) keep renames in order, so that a tree which is there has its objects;
//! - whatever is left of a writer that was killed lies in `tmp/` and, if it died while renaming, consists of whole
//!   objects that no layer needs: the next collection takes them;
//! - two writers of the same thing replace one good file by an equal one.
//!
//! Files that are appended to (`tags/…`, `diffs/…`, `images/…`) consist of whole lines, each written by one
//! `write` with `O_APPEND`. A last line without its newline was torn by a power cut and is ignored.
//!
//! Sparse files become sparse objects; the digest is that of all their bytes.
//!
//! # What a layer says of its directories
//!
//! A layer's tree takes away in overlayfs's forms: a character device 0:0 for a name that is gone,
//! `trusted.overlay.opaque` = `y` on a directory that hides what lower layers have in it.
//!
//! A tar need not have an entry for every directory in it, and most have none for the root, while a tree has to give
//! each of them some attributes. Those that no entry stated are marked with `trusted.kiln.implied` (empty), **the root
//! among them**: mode 0755, owner 0:0, of 1970. Where layers are merged, a marked directory leaves the one below it its
//! attributes, and only where there is none the guess stands. A stack so gives what unpacking its tars into one
//! directory gives, and what containers-storage does for overlayfs, which itself knows no such mark (the root of
//! an overlay is always its uppermost one's): there a new layer's root begins with its parent's owner and mode, and
//! the tar may change them. A layer from a directory or an overlay's upper directory states all of its directories.
//!
//! The mark is a part of the tree and so of the layer's digest; merged trees have neither it nor overlayfs's marks.
//! (Stores of development versions that never marked the root know tars without an entry for it by other digests. They
//! stay readable; such a layer states a root of the guessed attributes until its tar is imported again.)

use std::path::{Path, PathBuf};

use kiln_contract::Digest;

/// The format that this program writes. Readers refuse a greater one; a smaller one is to be migrated.
pub const VERSION: u32 = 1;

/// Modification time of objects that were written whole and have their digests, in seconds since 1970. Whoever writes to one
/// afterwards leaves another time.
pub const SOUND: i64 = 1;

/// Mode of objects: nobody writes them, and everybody may read what an image holds.
pub const OBJECT_MODE: u32 = 0o444;

/// Where everything is.
#[derive(Debug, Clone)]
pub(crate) struct Layout {
    root: PathBuf,
}

impl Layout {
    /// The directories that every store has.
    pub(crate) const DIRECTORIES: [&'static str; 11] = [
        "objects",
        "layers",
        "diffs",
        "diffs/blobs",
        "blobs",
        "blobs/sha256",
        "images",
        "tags",
        "renders",
        "renders/merged",
        "tmp",
    ];

    pub(crate) fn new(root: PathBuf) -> Self {
        Self { root }
    }

    pub(crate) fn root(&self) -> &Path {
        &self.root
    }

    pub(crate) fn version(&self) -> PathBuf {
        self.root.join("FORMAT")
    }

    pub(crate) fn lock(&self) -> PathBuf {
        self.root.join("lock")
    }

    pub(crate) fn objects(&self) -> PathBuf {
        self.root.join("objects")
    }

    pub(crate) fn object(&self, digest: &Digest) -> PathBuf {
        self.root.join("objects").join(object_name(digest))
    }

    pub(crate) fn known_damage(&self) -> PathBuf {
        self.root.join("damaged")
    }

    pub(crate) fn layers(&self) -> PathBuf {
        self.root.join("layers")
    }

    pub(crate) fn layer(&self, digest: &Digest) -> PathBuf {
        self.root.join(format!("layers/{}.erofs", digest.hex()))
    }

    pub(crate) fn layer_split(&self, layer: &Digest) -> PathBuf {
        self.root.join(format!("layers/{}.split", layer.hex()))
    }

    /// Not one of [`Layout::DIRECTORIES`]: it is made with the first lazy layer.
    pub(crate) fn lazy(&self) -> PathBuf {
        self.root.join("lazy")
    }

    pub(crate) fn lazy_record(&self, key: &Digest) -> PathBuf {
        self.root.join(format!("lazy/{}", key.hex()))
    }

    pub(crate) fn diffs(&self) -> PathBuf {
        self.root.join("diffs")
    }

    pub(crate) fn diff(&self, diff_id: &Digest) -> PathBuf {
        self.root.join(format!("diffs/{}", diff_id.hex()))
    }

    pub(crate) fn diff_split(&self, diff_id: &Digest) -> PathBuf {
        self.root.join(format!("diffs/{}.split", diff_id.hex()))
    }

    pub(crate) fn diff_blobs(&self) -> PathBuf {
        self.root.join("diffs/blobs")
    }

    pub(crate) fn diff_of_blob(&self, blob: &Digest) -> PathBuf {
        self.root.join(format!("diffs/blobs/{}", blob.hex()))
    }

    pub(crate) fn blobs(&self) -> PathBuf {
        self.root.join("blobs/sha256")
    }

    pub(crate) fn blob(&self, digest: &Digest) -> PathBuf {
        self.root.join(format!("blobs/sha256/{}", digest.hex()))
    }

    pub(crate) fn images(&self) -> PathBuf {
        self.root.join("images")
    }

    pub(crate) fn image(&self, id: &Digest) -> PathBuf {
        self.root.join(format!("images/{}", id.hex()))
    }

    pub(crate) fn tags(&self) -> PathBuf {
        self.root.join("tags")
    }

    pub(crate) fn merged(&self) -> PathBuf {
        self.root.join("renders/merged")
    }

    pub(crate) fn merged_tree(&self, key: &Digest) -> PathBuf {
        self.root.join(format!("renders/merged/{}.erofs", key.hex()))
    }

    /// Not one of [`Layout::DIRECTORIES`]: it comes and goes with what is in it.
    pub(crate) fn stacks(&self) -> PathBuf {
        self.root.join("renders/stacks")
    }

    pub(crate) fn stack(&self, digest: &Digest) -> PathBuf {
        self.root.join(format!("renders/stacks/{}", digest.hex()))
    }

    /// Not one of [`Layout::DIRECTORIES`]: it is made with the first disk.
    pub(crate) fn disks(&self) -> PathBuf {
        self.root.join("renders/disks")
    }

    pub(crate) fn image_disk(&self, key: &Digest) -> PathBuf {
        self.root.join(format!("renders/disks/{}.erofs", key.hex()))
    }

    pub(crate) fn tmp(&self) -> PathBuf {
        self.root.join("tmp")
    }
}

/// An object's path below `objects/`.
pub(crate) fn object_name(digest: &Digest) -> String {
    let mut name = digest.hex();
    name.insert(2, '/');
    name
}

/// The name of a stack's merged tree and image disk.
pub(crate) fn stack_key(layers: &[Digest]) -> Digest {
    let mut hasher = kiln_contract::Hasher::new();
    layers.iter().for_each(|layer| hasher.update(layer.as_bytes()));
    hasher.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_those_that_the_format_states() {
        let layout = Layout::new("/s".into());
        let digest = Digest::of(b"kiln");
        let hex = digest.hex();
        for (path, expected) in [
            (layout.object(&digest), format!("/s/objects/{}/{}", &hex[..2], &hex[2..])),
            (layout.layer(&digest), format!("/s/layers/{hex}.erofs")),
            (layout.layer_split(&digest), format!("/s/layers/{hex}.split")),
            (layout.lazy_record(&digest), format!("/s/lazy/{hex}")),
            (layout.diff(&digest), format!("/s/diffs/{hex}")),
            (layout.diff_split(&digest), format!("/s/diffs/{hex}.split")),
            (layout.diff_of_blob(&digest), format!("/s/diffs/blobs/{hex}")),
            (layout.blob(&digest), format!("/s/blobs/sha256/{hex}")),
            (layout.image(&digest), format!("/s/images/{hex}")),
            (layout.merged_tree(&digest), format!("/s/renders/merged/{hex}.erofs")),
            (layout.image_disk(&digest), format!("/s/renders/disks/{hex}.erofs")),
        ] {
            assert_eq!(path, PathBuf::from(expected));
        }
        let stack = [digest, Digest::of(b"")];
        let bytes: Vec<u8> = stack.iter().flat_map(|layer| *layer.as_bytes()).collect();
        assert_eq!(stack_key(&stack), Digest::of(&bytes));
    }
}
