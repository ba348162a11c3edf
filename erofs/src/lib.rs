//! The tree format: EROFS images, written deterministically and read without copying.
//!
//! A [`Tree`] is what is written: [`write_metadata`] makes the metadata-only images in which the store keeps layers
//! and merged stacks, and which an overlay with the store's objects as a data-only lower turns into a root file
//! system; [`write_full`] and [`FullImage`] embed the data, for machines and bakes. An [`Image`] is what is read: a
//! mapped file in which lookups and listings need no preparation. [`mod@format`] draws what is on disk.
//!
//! ```
//! use kiln_erofs::{Attributes, Content, Data, Image, NodeId, Tree, write_metadata};
//!
//! let mut tree = Tree::default();
//! let bin = tree.add(NodeId::ROOT, b"bin", Content::Directory, Attributes { mode: 0o755, ..Default::default() })?;
//! let hello = Content::Regular(Data::Inline(b"#!/bin/echo hello\n".to_vec()));
//! tree.add(bin, b"hello", hello, Attributes { mode: 0o755, ..Default::default() })?;
//!
//! let mut bytes = Vec::new();
//! write_metadata(&tree, &mut bytes)?;
//!
//! let image = Image::open(&bytes)?;
//! let bin = image.inode(image.root()?.lookup(b"bin")?.unwrap().nid)?;
//! let names: Vec<_> = bin.entries(0).map(|entry| entry.unwrap().name).collect();
//! assert_eq!(names, [b"hello"]);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

#![forbid(unsafe_code)]

mod directory;
mod dirents;
mod error;
pub mod format;
mod full;
#[doc(hidden)]
pub mod fuzzing;
mod inode;
mod layout;
mod merge;
mod read;
mod tree;
mod write;
mod xattr;

pub use dirents::{Entries, Entry};
pub use error::{ImageError, TreeError, WriteError};
pub use full::{EmbeddedObject, FullImage, ObjectSource, write_full};
pub use inode::{FileType, Inode};
pub use merge::{Charge, Layers, MergeError, Met, merge};
pub use read::{Image, Nid};
pub use tree::{Attributes, Content, Data, Device, INLINE_LIMIT, Node, NodeId, Time, Tree, Xattrs};
pub use write::write_metadata;
pub use xattr::{escape_xattr_name, object_redirect, unescape_xattr_name};
