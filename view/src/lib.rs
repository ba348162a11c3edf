//! Stacks seen as file systems.
//!
//! A merged tree of the store (a metadata-only EROFS image) and the directory of objects become a root file system in
//! the mount namespace of the calling process. Two ways lead there, and [`Overlay`] takes the first that this host and
//! this user have:
//!
//! 1. The kernel mounts the tree's file itself and lays an overlay over it whose data-only lower layer is the directory
//!    of objects (Linux 6.12, `CAP_SYS_ADMIN` in the first user namespace): constant time, whatever the image's size.
//! 2. A FUSE server reads the same file and serves it below a kernel overlay: what unprivileged users get, inside
//!    the user namespace that [`userns::enter`] makes.
//!
//! The same server edits a tree by itself, with a scratch in overlayfs's form and without overlayfs ([`fuse`]).
//! [`views`] keeps views with names, each in a mount namespace of its own, and makes layers of what was changed in them.
//!
//! ```no_run
//! use kiln_contract::{ViewBackend, ViewRequest};
//!
//! let view = kiln_view::Overlay::new();
//! let request = ViewRequest {
//!     tree: "/var/lib/kiln/store/renders/tree.erofs".into(),
//!     objects: "/var/lib/kiln/store/objects".into(),
//!     target: "/mnt".into(),
//!     scratch: None,
//! };
//! view.mount(&request)?;
//! view.unmount(&request.target)?;
//! # Ok::<(), kiln_contract::BackendError>(())
//! ```

mod changes;
mod contents;
#[cfg(target_os = "linux")]
pub mod fuse;
pub mod mounting;
mod objects;
#[cfg(target_os = "linux")]
mod overlay;
pub mod router;
mod sockets;
mod stack;
mod tree;
#[cfg(target_os = "linux")]
pub mod userns;
#[cfg(target_os = "linux")]
pub mod views;

pub use changes::{changes, root_attributes};
pub use contents::{ContentsEntry, TreeContents};
pub use objects::Fetcher;
#[cfg(target_os = "linux")]
pub use overlay::Overlay;
pub use stack::{Bind, Stack, StackError};
