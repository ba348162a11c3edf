//! MicroVMs.
//!
//! A machine starts by restoring a [template](template): a machine of the same shape that was saved when its guest was ready
//! and nobody yet. Only then are its disks looked at and is it told who it is, so one template fits every image, and neither
//! a boot nor the size of the image costs anything.

mod admission;
mod backend;
mod beginning;
mod boot;
mod carry;
mod clock;
mod commit;
mod console;
mod console_log;
mod door;
mod exec;
mod guest;
mod kind;
mod last_words;
mod life;
mod monitor;
mod plan;
mod refusal;
mod rights;
mod saved;
mod services;
mod snapshots;
mod spare;
mod ssh;
mod stream;
mod system;
pub mod template;
mod visit;

pub use backend::Machines;
pub use kind::MachineKind;
pub use life::{Life, Paths};
pub use monitor::monitor;
pub use saved::{Saved, TemplateRecord};
pub use spare::{SpareState, keep_spare, spare_state};
pub use ssh::SshAccess;
pub use template::{Disk, Shape, Templates, prune_disks, prune_templates, remove_template, templates};
