//! Small files of whole lines.

use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::path::Path;

use crate::Result;
use crate::error::Context as _;

/// The complete lines of a file; none if it is not there. What follows the last newline was torn and is no line.
pub(crate) fn read(path: &Path) -> Result<Vec<String>> {
    let mut bytes = Vec::new();
    match File::open(path) {
        Ok(mut file) => file.read_to_end(&mut bytes).doing("read", path)?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error).doing("open", path),
    };
    let end = bytes.iter().rposition(|byte| *byte == b'\n').map_or(0, |at| at + 1);
    Ok(String::from_utf8_lossy(&bytes[..end]).lines().map(str::to_owned).collect())
}

/// Appends a line with one write. A torn line before it is ended first, so that it stays alone.
pub(crate) fn append(path: &Path, line: &str) -> Result<()> {
    let mut file = File::options().read(true).append(true).create(true).open(path).doing("open", path)?;
    let torn = is_torn(&file).doing("read", path)?;
    let text = format!("{}{line}\n", if torn { "\n" } else { "" });
    file.write_all(text.as_bytes()).doing("write", path)
}

fn is_torn(file: &File) -> io::Result<bool> {
    use std::os::unix::fs::FileExt as _;
    let length = file.metadata()?.len();
    let mut last = [b'\n'];
    if length > 0 {
        file.read_exact_at(&mut last, length - 1)?;
    }
    Ok(last != [b'\n'])
}

/// Makes `line` one of the file's lines, if it is not.
pub(crate) fn add(path: &Path, line: &str) -> Result<()> {
    if read(path)?.iter().any(|there| there == line) { Ok(()) } else { append(path, line) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn torn_lines_are_ignored_and_do_not_spoil_the_next() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lines");
        assert!(read(&path).unwrap().is_empty());
        append(&path, "one").unwrap();
        add(&path, "one").unwrap();
        std::fs::write(&path, "one\ntw").unwrap();
        assert_eq!(read(&path).unwrap(), ["one"]);
        append(&path, "three").unwrap();
        assert_eq!(read(&path).unwrap(), ["one", "tw", "three"]);
    }
}
