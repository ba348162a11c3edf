//! Files watched by `inotify(7)`.

use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::fs::inotify;

/// A handle that becomes readable when something beside `path` is written or made; `None` if watches are used up.
pub(super) fn watch(path: &Path) -> Option<OwnedFd> {
    let watch = inotify::init(inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK).ok()?;
    let events = inotify::WatchFlags::MODIFY | inotify::WatchFlags::CREATE | inotify::WatchFlags::MOVED_TO;
    inotify::add_watch(&watch, path.parent()?, events).ok()?;
    Some(watch)
}
