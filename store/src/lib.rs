//! Objects, layers, stacks, images, tags, garbage collection and checks: `$KILN_HOME/store`.
//!
//! A [`Store`] brings tars, directories and overlays in as layers ([`Store::import_tar`], [`Store::import_directory`],
//! [`Store::import_upper`]), keeps what registries know of them ([`Store::put_image`], [`Store::tag`]), finds images by
//! what users type ([`Store::resolve`]), and gives them back: merged trees to mount ([`Store::merged_tree`]), disks to boot from
//! ([`Store::image_disk`]), and the tars byte for byte ([`Store::export_tar`]). [`Store::gc`] and [`Store::check`] look after it. What is on the disk, and why
//! it survives a crash, is told in [`format`].
//!
//! ```
//! use kiln_contract::Home;
//! use kiln_store::{ImageName, Store};
//!
//! # let dir = tempfile::tempdir()?;
//! let home = Home::at(dir.path());
//! let store = Store::open(&home)?;
//! let rootfs = dir.path().join("rootfs");
//! std::fs::create_dir_all(rootfs.join("etc"))?;
//! std::fs::write(rootfs.join("etc/hostname"), "kiln\n")?;
//!
//! let layer = store.import_directory(&rootfs)?.layer;
//! let image = store.make_image(&Default::default(), &[layer])?;
//! store.tag(&ImageName::parse("me/dev:1")?, &image.manifest_digest, "made here")?;
//!
//! assert_eq!(store.resolve("me/dev:1")?.id, image.id);
//! assert!(store.merged_tree(&image.layers)?.exists());
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod blob;
mod check;
mod chunk;
mod commit;
mod diff;
mod diffs;
mod directory;
mod error;
mod export;
mod extents;
mod fetch;
pub mod format;
mod gc;
mod host_xattrs;
mod image;
mod image_disk;
mod import;
mod known_damage;
mod layer_reader;
mod layer_tree;
mod layers;
mod lazy;
mod limits;
mod lines;
mod merge;
mod mount_points;
mod name;
mod needs;
mod object_writer;
mod overlay;
mod repair;
mod reshape;
mod resolve;
mod selection;
mod source_date;
mod split;
mod stacks;
mod staging;
mod stamp;
mod store;
mod tag;
mod tar;
mod tar_parts;
mod tree_file;
mod upper;
mod usage;
mod versions;

pub use check::CheckReport;
pub use commit::{Changes, CommitError, CommitRequest};
pub use error::{Result, StoreError};
pub use gc::{GcOptions, GcReport};
pub use image::Image;
pub use import::ImportedLayer;
pub use layers::LayerContents;
pub use lazy::{FileBytes, LazyLayer, LazySource, TOC_DIGEST, TOC_POSITION, ZSTD_WINDOW_LOG};
pub use limits::{ImportLimits, Limit};
pub use name::ImageName;
pub use needs::DocumentKind;
pub use repair::{Repair, WantedDocument, WantedLayer, WantedRange};
pub use selection::{Selection, SelectionError};
pub use stacks::ImageStack;
pub use store::Store;
pub use tag::TagEntry;
pub use tar::entry::{EntryKind, LayerEntry, Sparse};
pub use tar_parts::TarParts;
pub use upper::IdKind;
pub use usage::Usage;
pub use versions::VersionPolicy;
