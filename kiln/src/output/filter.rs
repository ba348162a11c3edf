//! `--filter key=value`.

use std::collections::BTreeMap;

use crate::error::{CliError, Result};
use crate::resolve::ResolveError;

/// Conditions that rows must meet: all keys; of one key with several values, one of them (labels: all).
#[derive(Debug, Clone, Default)]
pub(crate) struct Filters(Vec<(String, String)>);

impl Filters {
    /// Reads `key=value` words; a key that is not among `known` is refused.
    pub(crate) fn parse(words: &[String], known: &[&str]) -> Result<Self> {
        let one = |word: &String| match word.split_once('=') {
            Some((key, value)) if known.contains(&key) => Ok((key.to_owned(), value.to_owned())),
            Some((key, _)) => {
                Err(bad(word, format!("`{key}` is not something to filter by ({})", known.join(", "))))
            }
            None => Err(bad(word, "a filter is key=value".to_owned())),
        };
        words.iter().map(one).collect::<Result<_>>().map(Self)
    }

    /// The values given for a key.
    pub(crate) fn values<'a>(&'a self, key: &'a str) -> impl Iterator<Item = &'a str> {
        self.0.iter().filter(move |(other, _)| other == key).map(|(_, value)| value.as_str())
    }

    /// Whether a key was not given, or one of its values fits.
    pub(crate) fn any(&self, key: &str, fits: impl FnMut(&str) -> bool) -> bool {
        self.values(key).next().is_none() || self.values(key).any(fits)
    }

    /// Whether every `label=name[=value]` is among `labels`.
    pub(crate) fn labels(&self, labels: &BTreeMap<String, String>) -> bool {
        self.values("label").all(|wanted| match wanted.split_once('=') {
            Some((name, value)) => labels.get(name).is_some_and(|given| given == value),
            None => labels.contains_key(wanted),
        })
    }

    /// The value of a key that is true or false.
    pub(crate) fn switch(&self, key: &str) -> Result<Option<bool>> {
        let mut last = None;
        for value in self.values(key) {
            last = Some(match value {
                "true" | "1" => true,
                "false" | "0" => false,
                _ => return Err(bad(&format!("{key}={value}"), "it is true or false".to_owned())),
            });
        }
        Ok(last)
    }
}

fn bad(word: &str, why: String) -> CliError {
    ResolveError::value("--filter", word, why).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filters(words: &[&str]) -> Result<Filters> {
        let words: Vec<String> = words.iter().map(|word| (*word).to_owned()).collect();
        Filters::parse(&words, &["name", "label", "dangling"])
    }

    #[test]
    fn keys_are_joined_with_and_and_values_with_or() {
        let some = filters(&["name=a", "name=b"]).unwrap();
        assert!(some.any("name", |value| value == "b") && !some.any("name", |value| value == "c"));
        assert!(some.any("label", |_| false));
    }

    #[test]
    fn labels_must_all_be_there() {
        let labels = BTreeMap::from([("a".to_owned(), "1".to_owned()), ("b".to_owned(), String::new())]);
        for (words, fits) in [
            (vec![], true),
            (vec!["label=a"], true),
            (vec!["label=a=1", "label=b"], true),
            (vec!["label=a=2"], false),
            (vec!["label=a", "label=c"], false),
        ] {
            assert_eq!(filters(&words).unwrap().labels(&labels), fits, "{words:?}");
        }
    }

    #[test]
    fn unknown_keys_and_odd_switches_are_refused() {
        assert!(filters(&["colour=red"]).is_err());
        assert!(filters(&["name"]).is_err());
        assert!(filters(&["dangling=maybe"]).unwrap().switch("dangling").is_err());
        assert_eq!(filters(&["dangling=true"]).unwrap().switch("dangling").unwrap(), Some(true));
    }
}
