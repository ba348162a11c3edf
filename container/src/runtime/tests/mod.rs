//! Real containers in a plain directory, by every runtime.

mod bed;
mod further;
mod hostile;
mod limits;
mod rootless;
mod running;
