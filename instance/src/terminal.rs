//! The user's terminal, given over to a workload for a while.

#[cfg(target_os = "linux")]
mod linux;
#[cfg(target_os = "macos")]
mod macos;

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use kiln_contract::Stdio;
use rustix::termios::{OptionalActions, Termios, Winsize, isatty, tcgetattr, tcgetwinsize, tcsetattr};

#[cfg(target_os = "linux")]
use linux as platform;
#[cfg(target_os = "macos")]
use macos as platform;

/// A terminal of this host's that only carries, in raw mode; `size` is rows and columns. The far end, which does not wait, and
/// the near one.
///
/// # Errors
/// If there can be no more terminals.
pub fn carrying_pair(size: Option<(u16, u16)>) -> io::Result<(OwnedFd, OwnedFd)> {
    let (master, near) = platform::pair()?;
    let mut modes = tcgetattr(&near)?;
    modes.make_raw();
    tcsetattr(&near, OptionalActions::Now, &modes)?;
    if let Some(size) = size {
        resize(&master, size);
    }
    crate::streams::set_nonblocking(&master)?;
    Ok((master, near))
}

/// A terminal in raw mode: what is typed goes to the workload as it is. Dropping this restores it.
#[derive(Debug)]
pub struct RawTerminal {
    terminal: OwnedFd,
    before: Termios,
}

impl RawTerminal {
    /// Changes the terminal behind `fd`; `None` if it is none.
    ///
    /// # Errors
    /// If it is one and cannot be changed; it is then as it was.
    pub fn enter(fd: &OwnedFd) -> io::Result<Option<Self>> {
        if !isatty(fd) {
            return Ok(None);
        }
        let before = tcgetattr(fd)?;
        let mut raw = before.clone();
        raw.make_raw();
        let terminal = fd.try_clone()?;
        tcsetattr(&terminal, OptionalActions::Drain, &raw)?;
        Ok(Some(Self { terminal, before }))
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        // The terminal may be gone; then nobody needs it restored.
        let _ = tcsetattr(&self.terminal, OptionalActions::Drain, &self.before);
    }
}

/// Rows and columns of the first of these that is a terminal and knows them.
pub fn size<'f>(of: impl IntoIterator<Item = BorrowedFd<'f>>) -> Option<(u16, u16)> {
    of.into_iter()
        .filter_map(|fd| tcgetwinsize(fd).ok())
        .map(|size| (size.ws_row, size.ws_col))
        .find(|(rows, columns)| *rows > 0 && *columns > 0)
}

/// Rows and columns of the caller's terminal: of the first of these streams that is one.
pub fn size_of(stdio: &Stdio) -> Option<(u16, u16)> {
    let all: [&OwnedFd; 3] = [&stdio.stdin, &stdio.stdout, &stdio.stderr];
    size(all.map(AsFd::as_fd))
}

/// Tells a terminal its size.
pub fn resize(terminal: &OwnedFd, (rows, columns): (u16, u16)) {
    let size = Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
    // A terminal that is closed at this moment does not need it.
    let _ = rustix::termios::tcsetwinsize(terminal, size);
}
