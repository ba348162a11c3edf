//! MicroVMs.
//!
//! A machine starts by restoring a [template](template): a machine of the same shape that was saved when its guest was ready
//! and nobody yet. Only then are its disks looked at and is it told who it is, so one template fits every image, and neither
//! a boot nor the size of the image costs anything.

#[cfg(target_os = "linux")]
mod admission;
mod backend;
#[cfg(target_os = "linux")]
mod carry;
#[cfg(target_os = "linux")]
mod commit;
#[cfg(target_os = "linux")]
mod console;
#[cfg(target_os = "linux")]
mod door;
#[cfg(target_os = "linux")]
mod exec;
mod guest;
#[cfg(target_os = "linux")]
mod kind;
mod last_words;
#[cfg(target_os = "linux")]
mod life;
#[cfg(target_os = "linux")]
mod monitor;
mod plan;
#[cfg(target_os = "linux")]
mod saved;
mod services;
mod snapshots;
#[cfg(target_os = "linux")]
mod ssh;
mod stream;
mod system;
pub mod template;
mod visit;

#[cfg(target_os = "linux")]
pub use backend::Machines;
#[cfg(target_os = "linux")]
pub use kind::MachineKind;
#[cfg(target_os = "linux")]
pub use life::{Life, Paths};
#[cfg(target_os = "linux")]
pub use monitor::monitor;
pub use saved::{Saved, TemplateRecord};
#[cfg(target_os = "linux")]
pub use ssh::SshAccess;
pub use template::{Disk, Shape, Templates, prune_disks, prune_templates, remove_template, templates};
