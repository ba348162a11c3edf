//! The last that a machine's kernel and guest wrote to the serial console, for people who want to know why there is no machine
//! any more.

use std::fs::File;
use std::io::{Read as _, Seek as _, SeekFrom};
use std::path::{Path, PathBuf};

use kiln_contract::{BackendError, ErrorKind};

/// So much of its end is looked at, in bytes.
const MOST: u64 = 16 << 10;
/// Lines that are shown.
const LINES: usize = 12;
/// What the kernel writes when it gives up.
const PANIC: &str = "Kernel panic - not syncing: ";

/// The log of a console, from some point on. The guest writes it: nothing but words for people is made of it.
#[derive(Debug)]
pub(crate) struct LastWords {
    path: PathBuf,
    from: u64,
}

impl LastWords {
    /// All that is in it.
    pub(crate) fn whole(path: &Path) -> Self {
        Self { path: path.to_owned(), from: 0 }
    }

    /// What will be written to it from now on.
    pub(crate) fn from_here(path: &Path) -> Self {
        Self { path: path.to_owned(), from: std::fs::metadata(path).map_or(0, |file| file.len()) }
    }

    /// Why the kernel gave up, if it did.
    pub(crate) fn panicked(&self) -> Option<BackendError> {
        let lines = self.lines();
        let why = lines.iter().find_map(|line| Some(line.split_once(PANIC)?.1))?;
        Some(BackendError::new(ErrorKind::Failed, format!("the machine's kernel panicked: {why}")))
    }

    /// An error, or in its place what the kernel gave up for, with the last lines of the console.
    pub(crate) fn explain(&self, error: BackendError) -> BackendError {
        let error = self.panicked().unwrap_or(error);
        let lines = self.lines();
        let known = error.hint_text().map(|known| format!("{known}; ")).unwrap_or_default();
        if lines.is_empty() {
            return error.hint(format!("{known}the guest wrote nothing to its console"));
        }
        let last = &lines[lines.len().saturating_sub(LINES)..];
        error.hint(format!("{known}its console's last lines:\n{}", last.join("\n")))
    }

    /// The last lines, with nothing in them that a terminal would obey.
    fn lines(&self) -> Vec<String> {
        let read = || {
            let mut file = File::open(&self.path)?;
            let end = file.metadata()?.len();
            file.seek(SeekFrom::Start(self.from.max(end.saturating_sub(MOST))))?;
            let mut said = Vec::new();
            file.take(MOST).read_to_end(&mut said)?;
            Ok::<_, std::io::Error>(said)
        };
        let said = read().unwrap_or_default();
        let clean = |line: &str| line.chars().filter(|c| !c.is_control()).take(400).collect::<String>();
        let lines =
            String::from_utf8_lossy(&said).lines().map(|line| clean(line).trim_end().to_owned()).collect();
        let mut lines: Vec<String> = lines;
        lines.retain(|line| !line.is_empty());
        lines
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_is_the_reason_and_the_last_lines_are_shown_without_what_a_terminal_obeys() {
        let log = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(log.path(), "Kernel panic - not syncing: of another run\n").unwrap();
        let console = LastWords::from_here(log.path());
        let lost = || BackendError::new(ErrorKind::Failed, "lost the guest");
        assert!(console.panicked().is_none());
        assert_eq!(console.explain(lost()).hint_text(), Some("the guest wrote nothing to its console"));
        let mut said = "Kernel panic - not syncing: of another run\n".to_owned();
        said.push_str(&"x".repeat(20 << 10));
        said.push_str(
            "\n[1.0] Kernel panic - not syncing: sysrq \u{1b}[2Jtriggered\r\n\n[1.1] Call Trace:\n",
        );
        std::fs::write(log.path(), said).unwrap();
        let explained = console.explain(lost());
        assert_eq!(explained.to_string(), "the machine's kernel panicked: sysrq [2Jtriggered");
        let hint = explained.hint_text().unwrap();
        assert!(hint.ends_with("triggered\n[1.1] Call Trace:") && !hint.contains('\u{1b}'), "{hint}");
        assert!(LastWords::whole(Path::new("/no/such")).panicked().is_none());
    }
}
