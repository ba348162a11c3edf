//! MicroVMs.
//!
//! A machine starts by restoring a [template](template): a machine of the same shape that was saved when its guest was ready
//! and nobody yet. Only then are its disks looked at and is it told who it is, so one template fits every image, and neither
//! a boot nor the size of the image costs anything.

mod guest;
#[cfg(target_os = "linux")]
mod life;
mod stream;
pub mod template;

#[cfg(target_os = "linux")]
pub use life::{Life, Paths};
pub use template::{Shape, Template, Templates};
