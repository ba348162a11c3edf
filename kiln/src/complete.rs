//! Names that shells complete: instances, images, volumes, networks, kernels. They are read from the home's own files, so
//! that a key press neither waits for a lock nor sets anything right.

use std::ffi::OsStr;
use std::path::PathBuf;

use clap_complete::engine::CompletionCandidate;
use kiln_contract::Home;
use kiln_store::Store;

/// The home that the line being completed means. (Its own `--home` is not known to a completer.)
fn home() -> Option<Home> {
    Home::from_env(rustix::process::geteuid().is_root())
}

fn files(directory: fn(&Home) -> PathBuf, suffix: &str) -> Vec<String> {
    let entries = home().and_then(|home| std::fs::read_dir(directory(&home)).ok()).into_iter().flatten();
    let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    names.filter_map(|name| name.strip_suffix(suffix).map(str::to_owned)).collect()
}

fn beginning(current: &OsStr, names: impl IntoIterator<Item = String>) -> Vec<CompletionCandidate> {
    let Some(current) = current.to_str() else { return Vec::new() };
    let mut names: Vec<String> = names.into_iter().filter(|name| name.starts_with(current)).collect();
    names.sort();
    names.dedup();
    names.into_iter().map(CompletionCandidate::new).collect()
}

/// Names of instances.
pub(crate) fn instances(current: &OsStr) -> Vec<CompletionCandidate> {
    beginning(current, files(Home::names, ""))
}

/// Names of instances, followed by a colon, for `cp`.
pub(crate) fn copy_sources(current: &OsStr) -> Vec<CompletionCandidate> {
    beginning(current, files(Home::names, "").into_iter().map(|name| format!("{name}:")))
}

/// Names of images with their tags.
pub(crate) fn images(current: &OsStr) -> Vec<CompletionCandidate> {
    let there = home().filter(|home| home.store().exists());
    let tags = there
        .and_then(|home| Store::open(&home).ok())
        .and_then(|store| store.tags().ok())
        .unwrap_or_default();
    beginning(current, tags.into_iter().map(|(name, _)| name.familiar()))
}

/// Names of views.
pub(crate) fn views(current: &OsStr) -> Vec<CompletionCandidate> {
    beginning(current, files(Home::views, ""))
}

/// Names of views, and of images.
pub(crate) fn views_and_images(current: &OsStr) -> Vec<CompletionCandidate> {
    let mut both = views(current);
    both.extend(images(current));
    both
}

/// Names of volumes.
pub(crate) fn volumes(current: &OsStr) -> Vec<CompletionCandidate> {
    beginning(current, files(Home::volumes, ""))
}

/// Names of volumes, followed by a colon, for `--volume`.
pub(crate) fn mount_sources(current: &OsStr) -> Vec<CompletionCandidate> {
    beginning(current, files(Home::volumes, "").into_iter().map(|name| format!("{name}:")))
}

/// Names of kernels.
pub(crate) fn kernels(current: &OsStr) -> Vec<CompletionCandidate> {
    let names = files(Home::kernels, "").into_iter();
    beginning(current, names.filter(|name| !name.starts_with('.') && name != "default"))
}

/// Names of networks.
pub(crate) fn networks(current: &OsStr) -> Vec<CompletionCandidate> {
    let built_in = ["none", "host", "pasta", "kiln"].map(str::to_owned);
    beginning(current, files(Home::networks, ".json").into_iter().chain(built_in))
}
