//! Instances and their supervisors, however their workloads are isolated.
//!
//! What every back end shares: names and records (`instances`), the one process that owns a running instance
//! (`supervisor`), its socket and what is said over it (`control`, `attach`), its log (`log`), and what becomes of an
//! instance whose supervisor was killed (`reconcile`). What depends on the isolation is behind three traits: [`Kind`],
//! [`Ground`] and [`Hold`]. A back end is a [`Kind`] and its own verbs beside the shared ones, [`Verbs`].
//!
//! ```no_run
//! use kiln_contract::{BackendError, Home, StartMode};
//! use kiln_instance::{Kinds, Verbs};
//!
//! fn serve(kinds: Kinds) -> Result<(), BackendError> {
//!     let verbs = Verbs::open(&Home::at("/var/lib/kiln"), kinds);
//!     let web = verbs.find("web")?;
//!     verbs.start(&web.id, StartMode::Detached)?;
//!     assert_eq!(verbs.wait(&web.id)?.code, 0);
//!     Ok(())
//! }
//! ```

pub mod archive;
mod attach;
mod control;
mod instances;
mod keys;
mod kind;
mod log;
pub mod process;
mod reconcile;
pub mod signals;
pub mod socket;
mod spawn;
pub mod streams;
mod supervisor;
pub mod terminal;
mod verbs;
mod volumes;

pub use control::{Attach, Connection, Failure, Reply, Request};
pub use instances::{Instances, Locked, failed, is_of_this_boot, is_supervised};
pub use keys::DetachKeys;
pub use kind::{Ground, Hold, Kind, Kinds, Run, kind_of};
pub use supervisor::supervise;
pub use verbs::Verbs;
pub use volumes::{Volume, Volumes};
