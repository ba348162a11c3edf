//! OCI images in and out: registries, layouts and archives.
//!
//! - [`Registry::pull`] and [`Registry::push`] speak the OCI distribution protocol (distribution-spec 1.1), with the
//!   credentials, mirrors and certificates that users already have ([`Config`]);
//! - [`Registry::repair`] gets back what a check of the store found missing or damaged;
//! - [`import`] and [`export`] read and write OCI layouts, `oci-archive`, `docker-archive` and plain root filesystems.
//!
//! Everything is synchronous outside; one small runtime inside moves the bytes. Layers stream: what comes from a connection or a
//! file is hashed, decompressed and split into objects in one pass, and none is ever held in memory or on disk whole.
//! What comes from outside is not believed: every document has a size limit, every digest is checked, and an error
//! names what was expected and what came.
//!
//! There is one HTTP client here, over `reqwest`, and not `oci-client` beside it: resuming with ranges, `Retry-After`, mounts
//! across repositories, chunked uploads that go on after a failure, mirrors, and time limits that count bytes and not requests all need
//! their own hold on the connection, its redirects and its tokens. The data types are `oci-spec`'s.
//!
//! ```no_run
//! use kiln_contract::{Home, Silent};
//! use kiln_registry::{Config, PullOptions, Registry};
//! use kiln_store::{ImageName, Store};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let store = Store::open(&Home::at("/var/lib/kiln"))?;
//! let registry = Registry::new(Config::default())?;
//! let name = ImageName::parse("alpine")?;
//! let pulled = registry.pull(&store, &name, &PullOptions::default(), &Silent)?;
//! println!("{} ({} bytes transferred)", pulled.image.id, pulled.bytes);
//! # Ok(())
//! # }
//! ```

mod answer;
mod archive;
mod certs;
mod challenge;
mod chunked;
mod complete;
mod compression;
mod config;
mod credentials;
mod document;
mod download;
mod endpoint;
mod error;
mod export;
mod import;
mod layer_stream;
mod login;
mod manifest;
mod origin;
mod pack;
mod pull;
mod push;
mod registries_conf;
mod registry;
mod repair;
mod retry;
mod saved;
mod token;
mod transport;
mod unpack;
mod upload;

pub use compression::{Compression, decompress};
pub use config::Config;
pub use error::{RegistryError, Result};
pub use export::export;
pub use import::{Named, import};
pub use pack::Packing;
pub use pull::{PullOptions, PullPolicy, Pulled};
pub use push::{PushOptions, Pushed};
pub use registry::Registry;
pub use repair::FromRegistries;

/// How images are kept outside of registries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// A directory (image-spec 1.1, image-layout.md).
    OciLayout,
    /// The same in a tar.
    OciArchive,
    /// What `docker save` writes and `docker load` reads.
    DockerArchive,
    /// A directory or a tar of a root filesystem.
    Rootfs,
}
