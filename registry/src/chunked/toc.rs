//! The table of contents of a zstd:chunked layer, as JSON.

use std::collections::BTreeMap;
use std::fmt;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use jiff::Timestamp;
use kiln_contract::Digest;
use kiln_erofs::{Device, INLINE_LIMIT, Time};
use kiln_store::{EntryKind, FileBytes, LayerEntry};
use serde::de::{DeserializeSeed, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Serialize};

/// An entry as it stands in the table.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct TocEntry {
    #[serde(rename = "type")]
    pub(crate) kind: String,
    pub(crate) name: String,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub(crate) link_name: String,
    #[serde(default, skip_serializing_if = "is_zero")]
    pub(crate) mode: u64,
    #[serde(default, skip_serializing_if = "is_zero")]
    pub(crate) size: u64,
    #[serde(default, skip_serializing_if = "is_zero")]
    pub(crate) uid: u64,
    #[serde(default, skip_serializing_if = "is_zero")]
    pub(crate) gid: u64,
    /// RFC 3339.
    #[serde(default, rename = "modtime", skip_serializing_if = "Option::is_none")]
    pub(crate) mtime: Option<Timestamp>,
    #[serde(default, skip_serializing_if = "is_zero")]
    pub(crate) dev_major: u64,
    #[serde(default, skip_serializing_if = "is_zero")]
    pub(crate) dev_minor: u64,
    /// Values in base64.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub(crate) xattrs: BTreeMap<String, String>,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub(crate) digest: String,
    #[serde(default, skip_serializing_if = "is_zero")]
    pub(crate) offset: u64,
    #[serde(default, skip_serializing_if = "is_zero")]
    pub(crate) end_offset: u64,
    /// All bytes of a file that a tree holds itself, in base64.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) kiln_data: Option<String>,
}

#[allow(clippy::trivially_copy_pass_by_ref, reason = "serde gives a reference")]
fn is_zero(number: &u64) -> bool {
    *number == 0
}

/// A whole table, to be written.
#[derive(Debug, Serialize)]
pub(crate) struct Toc {
    pub(crate) version: u32,
    pub(crate) entries: Vec<TocEntry>,
}

pub(crate) const VERSION: u32 = 1;

impl TocEntry {
    /// The entry of a table for one of a tar, without its bytes.
    ///
    /// # Errors
    /// Tables cannot tell it; in words.
    pub(crate) fn of(entry: LayerEntry) -> Result<Self, String> {
        let text = |bytes: Vec<u8>| {
            String::from_utf8(bytes)
                .map_err(|error| format!("`{}` is no UTF-8", error.as_bytes().escape_ascii()))
        };
        let mut toc = Self {
            mode: entry.mode.into(),
            uid: entry.uid.into(),
            gid: entry.gid.into(),
            mtime: Some(timestamp(entry.mtime).ok_or("a time is beyond what can be written")?),
            ..Self::default()
        };
        let mut device = |device: Device| {
            (toc.dev_major, toc.dev_minor) = (device.major.into(), device.minor.into());
        };
        toc.kind = match &entry.kind {
            EntryKind::Regular { sparse: None, .. } => "reg",
            EntryKind::Regular { sparse: Some(_), .. } => {
                return Err(format!("`{}` is sparse", entry.path.escape_ascii()));
            }
            EntryKind::Directory => "dir",
            EntryKind::Symlink(_) => "symlink",
            EntryKind::HardLink(_) => "hardlink",
            EntryKind::CharDevice(number) => {
                device(*number);
                "char"
            }
            EntryKind::BlockDevice(number) => {
                device(*number);
                "block"
            }
            EntryKind::Fifo => "fifo",
        }
        .to_owned();
        match entry.kind {
            EntryKind::Regular { size, .. } => toc.size = size,
            EntryKind::Symlink(target) | EntryKind::HardLink(target) => toc.link_name = text(target)?,
            _ => {}
        }
        toc.name = text(entry.path)?;
        for (name, value) in entry.xattrs {
            toc.xattrs.insert(text(name)?, STANDARD.encode(value));
        }
        Ok(toc)
    }

    /// Whether it is a file of which a tree holds the bytes itself, and the table has them not.
    pub(crate) fn lacks_data(&self) -> bool {
        self.kind == "reg" && (1..=INLINE_LIMIT as u64).contains(&self.size) && self.kiln_data.is_none()
    }

    /// What the entry tells, and of a file that is not empty what is known of its bytes. `data` gives those of a file that
    /// [lacks](Self::lacks_data) them. `None` for entries that tell of no name of their own.
    ///
    /// # Errors
    /// It makes no sense; in words.
    pub(crate) fn layer_entry(
        self,
        data: impl FnOnce(&Self) -> Option<Vec<u8>>,
    ) -> Result<Option<(LayerEntry, Option<FileBytes>)>, String> {
        let wrong = |what: &str| format!("the entry of `{}` has {what}", self.name.escape_debug());
        let id = |id: u64| u32::try_from(id).map_err(|_| wrong("an owner that cannot be"));
        let device = || {
            let number = |number: u64| u32::try_from(number).map_err(|_| wrong("a device that cannot be"));
            Ok::<_, String>(Device { major: number(self.dev_major)?, minor: number(self.dev_minor)? })
        };
        let link = || self.link_name.clone().into_bytes();
        let mut bytes = None;
        let kind = match self.kind.as_str() {
            "reg" => {
                if self.size > i64::MAX as u64 {
                    return Err(wrong("a size that cannot be"));
                }
                if self.size > 0 {
                    bytes = Some(self.bytes(data).map_err(wrong)?);
                }
                EntryKind::Regular { size: self.size, sparse: None }
            }
            "dir" => EntryKind::Directory,
            "symlink" => EntryKind::Symlink(link()),
            "hardlink" => EntryKind::HardLink(link()),
            "char" => EntryKind::CharDevice(device()?),
            "block" => EntryKind::BlockDevice(device()?),
            "fifo" => EntryKind::Fifo,
            // A part of the file before it, whose frames are among those of the whole file.
            "chunk" => return Ok(None),
            _ => return Err(wrong("a type that is not known")),
        };
        let mut xattrs = BTreeMap::new();
        for (name, value) in &self.xattrs {
            let value =
                STANDARD.decode(value).map_err(|_| wrong("an extended attribute that is no base64"))?;
            xattrs.insert(name.clone().into_bytes(), value);
        }
        let entry = LayerEntry {
            kind,
            mode: (self.mode & 0o7777) as u32,
            uid: id(self.uid)?,
            gid: id(self.gid)?,
            mtime: self.mtime.map(time).unwrap_or_default(),
            xattrs,
            path: self.name.into_bytes(),
        };
        Ok(Some((entry, bytes)))
    }

    fn bytes(&self, data: impl FnOnce(&Self) -> Option<Vec<u8>>) -> Result<FileBytes, &'static str> {
        let digest: Digest = self.digest.parse().map_err(|_| "no digest")?;
        if self.size > INLINE_LIMIT as u64 {
            let length = self.end_offset.checked_sub(self.offset).ok_or("an end before its beginning")?;
            return Ok(FileBytes::There { digest, offset: self.offset, length });
        }
        let bytes = match &self.kiln_data {
            Some(text) if text.len() > 2 * INLINE_LIMIT => return Err("data that are too long"),
            Some(text) => STANDARD.decode(text).map_err(|_| "data that are no base64")?,
            None => data(self).ok_or("no data")?,
        };
        if Digest::of(&bytes) != digest {
            return Err("data of another digest");
        }
        Ok(FileBytes::Here(bytes))
    }
}

fn timestamp(time: Time) -> Option<Timestamp> {
    // jiff's are of one sign: -1.5 s is -1 s and -0.5 s, and here -2 s and 0.5 s.
    let nanoseconds = i128::from(time.seconds) * 1_000_000_000 + i128::from(time.nanoseconds);
    Timestamp::from_nanosecond(nanoseconds).ok()
}

fn time(timestamp: Timestamp) -> Time {
    let nanoseconds = timestamp.as_nanosecond();
    Time {
        // A timestamp has some 10^11 seconds at most.
        seconds: nanoseconds.div_euclid(1_000_000_000) as i64,
        nanoseconds: nanoseconds.rem_euclid(1_000_000_000) as u32,
    }
}

/// Hands the entries of a table to `each`, one after the other: a table need not fit in memory in this form.
///
/// # Errors
/// It is no table, or `each` fails; in words.
pub(crate) fn entries(
    json: &[u8],
    each: &mut dyn FnMut(TocEntry) -> Result<(), String>,
) -> Result<(), String> {
    let mut deserializer = serde_json::Deserializer::from_slice(json);
    let version = Table { each }.deserialize(&mut deserializer).map_err(|error| error.to_string())?;
    deserializer.end().map_err(|error| error.to_string())?;
    if version != Some(VERSION) {
        return Err(format!("its version is {version:?}, and {VERSION} is known"));
    }
    Ok(())
}

struct Table<'a> {
    each: &'a mut dyn FnMut(TocEntry) -> Result<(), String>,
}

impl<'de> DeserializeSeed<'de> for Table<'_> {
    type Value = Option<u32>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for Table<'_> {
    type Value = Option<u32>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a table of contents")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let (mut version, mut seen) = (None, false);
        while let Some(key) = map.next_key::<String>()? {
            match key.as_str() {
                "version" => version = Some(map.next_value()?),
                "entries" if seen => return Err(serde::de::Error::custom("entries twice")),
                "entries" => {
                    seen = true;
                    map.next_value_seed(Entries { each: &mut *self.each })?;
                }
                _ => {
                    map.next_value::<IgnoredAny>()?;
                }
            }
        }
        Ok(version)
    }
}

struct Entries<'a> {
    each: &'a mut dyn FnMut(TocEntry) -> Result<(), String>,
}

impl<'de> DeserializeSeed<'de> for Entries<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_seq(self)
    }
}

impl<'de> Visitor<'de> for Entries<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the entries of a table of contents")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<(), A::Error> {
        while let Some(entry) = seq.next_element()? {
            (self.each)(entry).map_err(serde::de::Error::custom)?;
        }
        Ok(())
    }
}
