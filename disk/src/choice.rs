//! Which back end a user chose.
//!
//! `disks.json` in the home keeps it: `{"format": 1, "disks": "zfs:tank/kiln"}`. Without the file, whatever works is taken.

use std::fmt;
use std::fs;
use std::io::{ErrorKind, Write as _};
use std::str::FromStr;

use kiln_contract::{ErrorKind as Kind, Home};
use serde::{Deserialize, Serialize};

use crate::error::Context as _;
use crate::{DiskError, Result};

/// The version of the file that this program writes.
const FORMAT: u32 = 1;

/// More than any such file has.
const MOST: u64 = 64 << 10;

/// Which back end is to keep the disks.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Choice {
    /// What was chosen before for this home; else the best that works.
    #[default]
    Auto,
    /// Files that share blocks, on the file system where the home is.
    Reflink,
    /// Files in the pool of the home.
    Btrfs,
    /// Volumes of a ZFS dataset.
    Zfs {
        /// The dataset, which no other home uses.
        dataset: String,
    },
    /// Files that are copied whole.
    Sparse,
}

/// Text that names no back end.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not a back end for disks (auto, reflink, btrfs, zfs:DATASET, sparse)")]
pub struct ChoiceError(String);

impl FromStr for Choice {
    type Err = ChoiceError;

    fn from_str(text: &str) -> std::result::Result<Self, ChoiceError> {
        Ok(match text {
            "auto" => Self::Auto,
            "reflink" => Self::Reflink,
            "btrfs" => Self::Btrfs,
            "sparse" => Self::Sparse,
            _ => match text.strip_prefix("zfs:") {
                Some(dataset) if !dataset.is_empty() => Self::Zfs { dataset: dataset.to_owned() },
                _ => return Err(ChoiceError(text.chars().take(200).collect())),
            },
        })
    }
}

impl fmt::Display for Choice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Reflink => f.write_str("reflink"),
            Self::Btrfs => f.write_str("btrfs"),
            Self::Zfs { dataset } => write!(f, "zfs:{dataset}"),
            Self::Sparse => f.write_str("sparse"),
        }
    }
}

#[derive(Debug, Serialize, Deserialize)]
struct Record {
    format: u32,
    disks: String,
}

impl Choice {
    /// What was chosen for this home; [`Choice::Auto`] if nothing was.
    ///
    /// # Errors
    /// The file cannot be read, or was written by a newer version.
    pub fn load(home: &Home) -> Result<Self> {
        let path = home.disk_settings();
        let file = match fs::File::open(&path) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Self::Auto),
            opened => opened.doing("open", &path)?,
        };
        let mut text = String::new();
        std::io::Read::read_to_string(&mut std::io::Read::take(file, MOST), &mut text)
            .doing("read", &path)?;
        let bad = |what: String| {
            let what = format!("cannot read `{}`: {what}", path.display());
            DiskError::place(Kind::Failed, what, "`kiln init` writes it anew")
        };
        // The format first: what else a newer version writes may not be readable.
        let value: serde_json::Value = serde_json::from_str(&text).map_err(|error| bad(error.to_string()))?;
        let format = value.get("format").and_then(serde_json::Value::as_u64).unwrap_or_default();
        if format != u64::from(FORMAT) {
            let what =
                format!("`{}` has format {format}, and this program knows format {FORMAT}", path.display());
            return Err(DiskError::place(Kind::Unsupported, what, "use a newer kiln"));
        }
        let record: Record = serde_json::from_value(value).map_err(|error| bad(error.to_string()))?;
        record.disks.parse().map_err(|error: ChoiceError| bad(error.to_string()))
    }

    /// Keeps this for the home, in place of what was chosen before.
    ///
    /// # Errors
    /// It cannot be written; then the old choice stays.
    pub fn save(&self, home: &Home) -> Result<()> {
        let path = home.disk_settings();
        let record = serde_json::json!(Record { format: FORMAT, disks: self.to_string() });
        fs::create_dir_all(home.path()).doing("create", home.path())?;
        let mut file = tempfile::NamedTempFile::new_in(home.path()).doing("create a file in", home.path())?;
        writeln!(file, "{record}").and_then(|()| file.as_file().sync_all()).doing("write", file.path())?;
        file.persist(&path).map_err(|error| error.error).doing("replace", &path)?;
        crate::staging::sync_directory(home.path())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn choices_are_read_as_they_are_shown_and_kept_for_the_home() {
        let directory = tempfile::tempdir().unwrap();
        let home = Home::at(directory.path());
        assert_eq!(Choice::load(&home).unwrap(), Choice::Auto);
        for text in ["auto", "reflink", "btrfs", "zfs:tank/kiln", "sparse"] {
            let choice: Choice = text.parse().unwrap();
            assert_eq!(choice.to_string(), text);
            choice.save(&home).unwrap();
            assert_eq!(Choice::load(&home).unwrap(), choice);
        }
        for text in ["", "zfs", "zfs:", "Reflink", "ext4"] {
            assert!(text.parse::<Choice>().is_err(), "{text}");
        }
        let kept = fs::read_to_string(home.disk_settings()).unwrap();
        assert_eq!(kept, "{\"disks\":\"sparse\",\"format\":1}\n");
    }

    #[test]
    fn a_file_that_is_none_is_refused_with_a_reason() {
        let directory = tempfile::tempdir().unwrap();
        let home = Home::at(directory.path());
        for (text, expected) in [
            ("", "EOF"),
            ("{}", "format 0"),
            (r#"{"format": 2, "disks": {"new": "shape"}}"#, "format 2, and this program knows format 1"),
            (r#"{"format": 1}"#, "missing field"),
            (r#"{"format": 1, "disks": "lvm"}"#, "`lvm` is not a back end"),
        ] {
            fs::write(home.disk_settings(), text).unwrap();
            let error = Choice::load(&home).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
    }
}
