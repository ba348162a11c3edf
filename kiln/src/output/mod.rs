//! What commands write to standard output: tables, JSON, JSON lines.

mod filter;
mod format;
mod table;

pub(crate) use filter::Filters;
pub(crate) use format::{Format, FormatArgs, Out, print_json, print_rows};
pub(crate) use table::{Table, clip};
