//! The modules of a kernel: which are needed, what they need in turn, and in which order they are loaded.

mod modinfo;
mod resolve;
mod slim;
mod tree;
mod wanted;

pub(crate) use modinfo::is_module_name;
pub(crate) use resolve::{Resolved, resolve};
pub(crate) use slim::slim;
pub(crate) use tree::{MAX_MODULE, MAX_MODULES, ModuleTree, module_name};
pub(crate) use wanted::{WANTED, is_vital};
