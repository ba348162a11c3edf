//! From what a user types to an image.

use kiln_contract::Digest;

use crate::{Image, ImageName, Result, Store, StoreError};

/// Fewer digits of an id are never meant as one.
const SHORTEST_PREFIX: usize = 4;

impl Store {
    /// Finds an image by its familiar name, `name:tag~N` (N versions back), `name@sha256:…`, `sha256:…` (of the
    /// config, the manifest or an index), or a prefix of four or more digits of one id. A name wins over a prefix.
    ///
    /// # Errors
    /// [`StoreError::NotFound`] with names that look alike; [`StoreError::Ambiguous`] with the images that a prefix
    /// fits; [`StoreError::NoSuchVersion`].
    pub fn resolve(&self, text: &str) -> Result<Image> {
        self.resolve_by(text, |digest| self.image(digest))
    }

    /// Finds what `get` knows of an image by the digest that it is found by.
    pub(crate) fn resolve_by<T>(&self, text: &str, get: impl Fn(&Digest) -> Result<Option<T>>) -> Result<T> {
        let (base, back) = versions_back(text);
        if back.is_none() {
            if let Ok(digest) = text.parse::<Digest>() {
                return get(&digest)?.ok_or_else(|| self.not_found(text));
            }
            if let Ok(digest) = Digest::from_hex(text) {
                return get(&digest)?.ok_or_else(|| self.not_found(text));
            }
        }
        let parsed = ImageName::parse(base);
        if let Ok(name) = &parsed {
            if let Some(digest) = name.digest {
                return get(&digest)?.ok_or_else(|| self.not_found(text));
            }
            let history = self.tag_history(name)?;
            let back = back.unwrap_or(0);
            if history.len() > back {
                let target = history[history.len() - 1 - back].target;
                return get(&target)?.ok_or(StoreError::Missing { what: "manifest", digest: target });
            }
            if !history.is_empty() {
                let (name, versions) = (name.familiar(), history.len());
                return Err(StoreError::NoSuchVersion { name, versions, wanted: back });
            }
        }
        if back.is_none()
            && let Some(image) = self.by_prefix(text, get)?
        {
            return Ok(image);
        }
        match parsed {
            Ok(_) => Err(self.not_found(text)),
            Err(error) => Err(error),
        }
    }

    fn by_prefix<T>(&self, text: &str, get: impl Fn(&Digest) -> Result<Option<T>>) -> Result<Option<T>> {
        let prefix = text.strip_prefix("sha256:").unwrap_or(text);
        let is_hex = prefix.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
        if prefix.len() < SHORTEST_PREFIX || !is_hex {
            return Ok(None);
        }
        let fitting: Vec<_> =
            self.image_ids()?.into_iter().filter(|id| id.hex().starts_with(prefix)).collect();
        match fitting.as_slice() {
            [] => Ok(None),
            [id] => get(id),
            several => {
                let mut candidates = Vec::new();
                for id in several.iter().take(10) {
                    let names: Vec<_> = self.names_of(id)?.iter().map(ImageName::familiar).collect();
                    let digits = id.hex()[..(prefix.len() + 4).clamp(12, 64)].to_owned();
                    candidates.push(if names.is_empty() {
                        digits
                    } else {
                        format!("{digits} ({})", names.join(", "))
                    });
                }
                Err(StoreError::Ambiguous { text: text.to_owned(), candidates })
            }
        }
    }

    fn not_found(&self, text: &str) -> StoreError {
        let wanted = ImageName::parse(text).map_or_else(|_| text.to_owned(), |name| name.familiar());
        let wanted_base = wanted.split([':', '@']).next().unwrap_or_default();
        let mut near: Vec<(usize, String)> = self
            .tags()
            .unwrap_or_default()
            .into_iter()
            .filter_map(|(name, _)| {
                let familiar = name.familiar();
                // Another tag of the same repository is as near as a typing error.
                let same = familiar.rsplit_once(':').is_some_and(|(base, _)| base == wanted_base);
                let distance = if same { 1 } else { distance(&familiar, &wanted) };
                (distance <= (wanted.len() / 4).max(2)).then_some((distance, familiar))
            })
            .collect();
        near.sort();
        let near = near.into_iter().take(3).map(|(_, name)| name).collect();
        StoreError::NotFound { text: text.to_owned(), near }
    }
}

/// `name~2` is `name`, two versions back; `name~` is one.
fn versions_back(text: &str) -> (&str, Option<usize>) {
    match text.rsplit_once('~') {
        Some((base, "")) => (base, Some(1)),
        Some((base, digits)) => match digits.parse() {
            Ok(back) => (base, Some(back)),
            Err(_) => (text, None),
        },
        None => (text, None),
    }
}

/// Levenshtein's distance.
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, from) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, to) in b.iter().enumerate() {
            let replaced = diagonal + usize::from(from != *to);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_counted_back() {
        for (text, expected) in [
            ("a:b", ("a:b", None)),
            ("a:b~1", ("a:b", Some(1))),
            ("a~", ("a", Some(1))),
            ("a~x", ("a~x", None)),
            ("a~0", ("a", Some(0))),
        ] {
            assert_eq!(versions_back(text), expected);
        }
    }

    #[test]
    fn distance_counts_edits() {
        for (a, b, expected) in
            [("", "abc", 3), ("alpine", "alpine", 0), ("alpine", "apline", 2), ("a", "b", 1)]
        {
            assert_eq!(distance(a, b), expected);
        }
    }
}
