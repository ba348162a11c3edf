//! `kiln image ls`.

use std::collections::BTreeMap;

use jiff::Timestamp;
use kiln_contract::{ByteSize, Digest};
use kiln_store::{Image, ImageName, Store};
use serde::Serialize;

use crate::context::Context;
use crate::error::Result;
use crate::exit::Exit;
use crate::output::{Filters, FormatArgs, Out, Table, print_rows};
use crate::resolve::ago;

/// List images
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Only images of this name
    reference: Option<String>,
    /// Only what fits: reference, dangling, label, before, since
    #[arg(short, long, value_name = "KEY=VALUE")]
    filter: Vec<String>,
    /// Images without a name, too
    #[arg(short, long)]
    all: bool,
    /// Ids in full
    #[arg(long)]
    no_trunc: bool,
    /// The digest of each manifest, too
    #[arg(long)]
    digests: bool,
    /// Only ids
    #[arg(short, long)]
    quiet: bool,
    #[command(flatten)]
    format: FormatArgs,
}

/// An image as the JSON forms write it: a row a name, or one row without a name.
#[derive(Debug, Serialize)]
struct Row {
    /// The name before the colon, as Docker shows it.
    repository: Option<String>,
    /// The tag.
    tag: Option<String>,
    /// `sha256:…`: the digest of the image's config.
    id: Digest,
    /// `sha256:…`: the digest of its manifest.
    digest: Digest,
    /// When it was made, by its config (RFC 3339).
    created: Option<Timestamp>,
    /// Bytes of its layers as its manifest states them: compressed as the registry has them.
    size: u64,
    /// How many layers it has.
    layers: usize,
    /// Whether all of it is here: of an image that was pulled lazily, files come when they are opened.
    whole: bool,
    /// Labels of its config.
    labels: BTreeMap<String, String>,
}

impl Args {
    pub(crate) fn run(self, context: &Context) -> Result<Exit> {
        let filters = Filters::parse(&self.filter, &["reference", "dangling", "label", "before", "since"])?;
        let store = context.store()?;
        let mut rows = rows(&store)?;
        let created =
            |name: &str| -> Result<Option<Timestamp>> { Ok(created(&context.image(&store, name)?)) };
        let before = filters.values("before").next().map(created).transpose()?.flatten();
        let since = filters.values("since").next().map(created).transpose()?.flatten();
        let dangling = filters.switch("dangling")?;
        rows.retain(|row| {
            let unnamed = row.repository.is_none();
            dangling.map_or(self.all || self.reference.is_some() || !unnamed, |wanted| wanted == unnamed)
                && self.reference.as_deref().is_none_or(|pattern| row.is_called(pattern))
                && filters.any("reference", |pattern| row.is_called(pattern))
                && before.is_none_or(|time| row.created.is_some_and(|created| created < time))
                && since.is_none_or(|time| row.created.is_some_and(|created| created > time))
                && filters.labels(&row.labels)
        });
        rows.sort_by(|a, b| {
            b.created.cmp(&a.created).then_with(|| (&a.repository, &a.tag).cmp(&(&b.repository, &b.tag)))
        });
        if self.quiet {
            let mut out = Out::new();
            let mut ids: Vec<Digest> = Vec::new();
            for row in rows {
                if !ids.contains(&row.id) {
                    out.line(self.id(&row))?;
                    ids.push(row.id);
                }
            }
            out.flush()?;
            return Ok(Exit::SUCCESS);
        }
        print_rows(self.format.format, &rows, |rows| self.table(rows))?;
        Ok(Exit::SUCCESS)
    }

    fn id(&self, row: &Row) -> String {
        if self.no_trunc { row.id.to_string() } else { row.id.short() }
    }

    fn table(&self, rows: &[Row]) -> Table {
        let mut titles = vec!["REPOSITORY", "TAG", "ID", "CREATED", "SIZE"];
        if self.digests {
            titles.insert(2, "DIGEST");
        }
        let mut table = Table::new(titles).right("SIZE");
        let now = Timestamp::now();
        for row in rows {
            let none = || "<none>".to_owned();
            let mut cells =
                vec![row.repository.clone().unwrap_or_else(none), row.tag.clone().unwrap_or_else(none)];
            cells.extend(self.digests.then(|| row.digest.to_string()));
            let created = row.created.map_or_else(|| "-".to_owned(), |created| ago(created, now));
            let mut size = ByteSize(row.size).to_string();
            if !row.whole {
                size.push_str(" (partly here)");
            }
            cells.extend([self.id(row), created, size]);
            table.row(cells);
        }
        table
    }
}

impl Row {
    /// Whether the image's name fits a pattern: `name`, `name:tag`, with `*` for any characters but `/`.
    fn is_called(&self, pattern: &str) -> bool {
        let Some(repository) = &self.repository else { return false };
        let tagged = format!("{repository}:{}", self.tag.as_deref().unwrap_or_default());
        glob(pattern, repository)
            || glob(pattern, &tagged)
            || ImageName::parse(pattern).is_ok_and(|name| name.familiar() == tagged && pattern.contains(':'))
            || ImageName::parse(pattern).is_ok_and(|name| {
                split(&name).0 == *repository
                    && !pattern.contains('*')
                    && name.tag.as_deref() == Some("latest")
                    && !pattern.ends_with(":latest")
            })
    }
}

/// Shell patterns with `*` only; it does not cross a `/`.
fn glob(pattern: &str, text: &str) -> bool {
    match pattern.split_once('*') {
        None => pattern == text,
        Some((start, rest)) => text.strip_prefix(start).is_some_and(|text| {
            let end = text.find('/').unwrap_or(text.len());
            text.char_indices()
                .map(|(index, _)| index)
                .chain([text.len()])
                .filter(|index| *index <= end)
                .any(|index| glob(rest, &text[index..]))
        }),
    }
}

fn rows(store: &Store) -> Result<Vec<Row>> {
    let mut names: BTreeMap<Digest, Vec<ImageName>> = BTreeMap::new();
    for (name, entry) in store.tags()? {
        names.entry(entry.target).or_default().push(name);
    }
    let mut rows = Vec::new();
    for image in store.images()? {
        let named = names.remove(&image.manifest_digest).unwrap_or_default();
        rows.extend(named.iter().map(|name| row(&image, Some(name))));
        if named.is_empty() {
            rows.push(row(&image, None));
        }
    }
    Ok(rows)
}

fn row(image: &Image, name: Option<&ImageName>) -> Row {
    let (repository, tag) = name.map(split).map_or((None, None), |(repository, tag)| (Some(repository), tag));
    let config = image.config.config().as_ref();
    let labels = config.and_then(|config| config.labels().clone()).unwrap_or_default();
    Row {
        repository,
        tag,
        id: image.id,
        digest: image.manifest_digest,
        created: created(image),
        size: size(image),
        layers: image.layers.len(),
        whole: image.whole,
        labels: labels.into_iter().collect(),
    }
}

/// The familiar name, apart from its tag.
fn split(name: &ImageName) -> (String, Option<String>) {
    let familiar = name.familiar();
    let bare = familiar.split('@').next().unwrap_or_default();
    match &name.tag {
        Some(tag) => (bare.strip_suffix(&format!(":{tag}")).unwrap_or(bare).to_owned(), Some(tag.clone())),
        None => (bare.to_owned(), None),
    }
}

/// Bytes of all layers as the manifest states them.
pub(super) fn size(image: &Image) -> u64 {
    image.manifest.layers().iter().map(oci_spec::image::Descriptor::size).sum()
}

/// When the image was made, as its config says.
pub(super) fn created(image: &Image) -> Option<Timestamp> {
    image.config.created().as_deref().and_then(|text| text.parse().ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_stay_between_slashes() {
        let table = [
            ("alpine", "alpine", true),
            ("al*", "alpine", true),
            ("*", "alpine", true),
            ("*", "me/alpine", false),
            ("*/alp*", "me/alpine", true),
            ("al*x", "alpine", false),
            ("alpine:3*", "alpine:3.20", true),
        ];
        for (pattern, text, fits) in table {
            assert_eq!(glob(pattern, text), fits, "{pattern} {text}");
        }
    }
}
