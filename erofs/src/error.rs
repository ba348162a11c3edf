use kiln_contract::Digest;

/// A change that a [`crate::Tree`] refuses.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TreeError {
    /// Names are 1 to 255 bytes, without `/` and NUL, and neither `.` nor `..`.
    #[error("`{}` cannot be the name of a file", .0.escape_ascii())]
    BadName(Vec<u8>),
    /// Something has that name.
    #[error("`{}` is there already", .0.escape_ascii())]
    NameTaken(Vec<u8>),
    /// Only directories have entries.
    #[error("cannot add `{}`: its parent is not a directory", .0.escape_ascii())]
    NotADirectory(Vec<u8>),
    /// Directories have one name.
    #[error("cannot add `{}`: a directory cannot have a second name", .0.escape_ascii())]
    DirectoryLink(Vec<u8>),
    /// The parent, or the node to be linked, was removed before.
    #[error("cannot add `{}`: the node was removed", .0.escape_ascii())]
    Removed(Vec<u8>),
    /// 2^32 nodes or bytes of names.
    #[error("cannot add `{}`: the tree is full", .0.escape_ascii())]
    Full(Vec<u8>),
}

/// A tree that could not be written.
#[derive(Debug, thiserror::Error)]
pub enum WriteError {
    /// The output could not be written.
    #[error("cannot write the image: {0}")]
    Io(#[from] std::io::Error),
    /// The format has no place for something that a node has.
    #[error("cannot write `{}`: {what}", path.escape_ascii())]
    Node {
        /// The node's first path, absolute.
        path: Vec<u8>,
        /// What is wrong with it.
        what: String,
    },
    /// The image would be larger than 2^32 blocks.
    #[error("the image would be larger than 16 TiB")]
    TooLarge,
    /// An object could not be read.
    #[error("cannot read the object {digest}: {source}")]
    Object {
        /// Which.
        digest: Digest,
        /// Why.
        source: std::io::Error,
    },
    /// An object's bytes are not what its name says.
    #[error("the object {digest} is damaged: {what}")]
    Damaged {
        /// Which.
        digest: Digest,
        /// In what way.
        what: String,
    },
}

/// A hostile or damaged image, or one with features that Kiln does not write.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ImageError {
    /// No superblock.
    #[error("this is not an EROFS image")]
    NotErofs,
    /// Written by a newer Kiln.
    #[error("the image has layout version {found}, and this program knows up to {known}")]
    Version {
        /// The image's.
        found: u32,
        /// The newest that can be read.
        known: u32,
    },
    /// The superblock's checksum is wrong.
    #[error("the superblock's checksum is {found:08x}, and should be {expected:08x}")]
    Checksum {
        /// In the image.
        found: u32,
        /// Of the image.
        expected: u32,
    },
    /// A feature that is not read here.
    #[error("the image has {what}, which is not supported")]
    Unsupported {
        /// The feature.
        what: &'static str,
    },
    /// Something lies beyond the end of the image.
    #[error("the image is damaged: {what} at {offset} lies beyond its end")]
    Truncated {
        /// What.
        what: &'static str,
        /// Where, in bytes.
        offset: u64,
    },
    /// An inode makes no sense.
    #[error("the image is damaged: inode {nid}: {what}")]
    Inode {
        /// Which.
        nid: u64,
        /// Why.
        what: &'static str,
    },
    /// A directory makes no sense.
    #[error("the image is damaged: directory {nid}: {what}")]
    Directory {
        /// Which.
        nid: u64,
        /// Why.
        what: &'static str,
    },
    /// xattrs make no sense.
    #[error("the image is damaged: xattrs of inode {nid}: {what}")]
    Xattr {
        /// Whose.
        nid: u64,
        /// Why.
        what: &'static str,
    },
    /// A directory has two parents, or is in itself.
    #[error("the image is damaged: directory {nid} has more than one name")]
    Loop {
        /// Which.
        nid: u64,
    },
    /// Parts of the image overlap so that it unfolds to far more than its size.
    #[error("the image is damaged: it unfolds to more than its size allows")]
    Overlap,
}
