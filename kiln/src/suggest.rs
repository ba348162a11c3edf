//! What was most likely meant: the nearest of several names, and Kiln's words for Docker's.

use std::ffi::OsString;

use clap::error::ErrorKind;

use crate::exit;

/// The candidate that `typed` was most likely meant to be, if one is near: it begins with what was typed, or at
/// most a third of its letters (and at most three) differ.
pub(crate) fn nearest<'a>(typed: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let limit = (typed.chars().count() / 3).clamp(1, 3);
    candidates
        .into_iter()
        .filter_map(|candidate| {
            let distance = distance(typed, candidate);
            let begins = typed.len() > 1 && candidate.starts_with(typed);
            (distance <= limit || begins).then_some((distance, candidate))
        })
        .min()
        .map(|(_, candidate)| candidate)
}

/// Insertions, deletions, substitutions and swaps of neighbours that make `b` of `a` (optimal string alignment).
fn distance(a: &str, b: &str) -> usize {
    let (a, b): (Vec<char>, Vec<char>) = (a.chars().collect(), b.chars().collect());
    let mut rows = vec![(0..=b.len()).collect::<Vec<_>>()];
    for i in 1..=a.len() {
        let mut row = vec![i];
        for j in 1..=b.len() {
            let substituted = rows[i - 1][j - 1] + usize::from(a[i - 1] != b[j - 1]);
            let mut best = substituted.min(rows[i - 1][j] + 1).min(row[j - 1] + 1);
            if i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1] {
                best = best.min(rows[i - 2][j - 2] + 1);
            }
            row.push(best);
        }
        rows.push(row);
    }
    rows[a.len()][b.len()]
}

/// What to type instead of a line that was refused, where its writer thought of Docker, or left out dashes.
pub(crate) fn hint(error: &clap::Error, words: &[OsString]) -> Option<&'static str> {
    let has = |word: &str| words.iter().any(|typed| typed == word);
    match error.kind() {
        ErrorKind::UnknownArgument | ErrorKind::MissingRequiredArgument
            if exit::verb(words) == Some("fs") && !has("--") =>
        {
            match words.iter().skip_while(|word| *word != "fs").nth(1)?.to_str()? {
                "run" => Some(
                    "a command comes after `--`: kiln fs run REF -- COMMAND; `kiln fs shell REF` starts your shell",
                ),
                "join" => Some("a command comes after `--`: kiln fs join NAME -- COMMAND"),
                _ => None,
            }
        }
        ErrorKind::InvalidSubcommand => exit::verb(words).and_then(for_docker_verb),
        ErrorKind::InvalidValue if words.iter().any(|word| word.as_encoded_bytes().starts_with(b"{{")) => {
            Some("there are no templates: `--format jsonl` gives every field, and `jq` takes what you want")
        }
        _ => None,
    }
}

fn for_docker_verb(verb: &str) -> Option<&'static str> {
    Some(match verb {
        "build" | "builder" | "buildx" => {
            "Kiln builds no images: `kiln commit` makes one of an instance, `kiln image import` takes what others built"
        }
        "container" => "instances need no word before the verb: `kiln ls`, `kiln run`, `kiln rm`",
        "export" => "`kiln cp INSTANCE:/ -` writes the root of an instance to standard output",
        "history" => "`kiln image history`",
        "import" => "`kiln image import`",
        "info" => "`kiln system info`",
        "version" => "`kiln --version`",
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_of_docker_are_answered_with_those_of_kiln() {
        use clap::{CommandFactory, Parser};
        let hint = |line: &str| {
            let words: Vec<OsString> = line.split(' ').map(OsString::from).collect();
            super::hint(&crate::cli::Cli::try_parse_from(&words).unwrap_err(), &words)
        };
        assert_eq!(hint("kiln history alpine"), Some("`kiln image history`"));
        assert_eq!(hint("kiln frobnicate"), None);
        assert!(hint("kiln ps --format {{.ID}}").unwrap().contains("jsonl"));
        assert_eq!(hint("kiln ps --format xml"), None);
        for line in ["kiln fs run me/tools:1", "kiln fs run me/tools:1 ls -l", "kiln fs join work ls"] {
            assert!(hint(line).unwrap().contains("after `--`"), "{line}");
        }
        assert_eq!(hint("kiln fs run me/tools:1 --colour -- ls"), None);
        assert_eq!(hint("kiln fs tag me/tools:1"), None);
        let verbs: Vec<String> =
            crate::cli::Cli::command().get_subcommands().map(|verb| verb.get_name().to_owned()).collect();
        let ours = verbs.iter().find(|verb| for_docker_verb(verb).is_some());
        assert_eq!(ours, None, "a verb of ours is answered as if it were none");
    }

    #[test]
    fn near_names_are_suggested_and_far_ones_are_not() {
        let names = ["web", "database", "cache", "brave_jug"];
        let table = [
            ("wbe", Some("web")),
            ("datbase", Some("database")),
            ("brave", Some("brave_jug")),
            ("cahce", Some("cache")),
            ("queue", None),
            ("x", None),
        ];
        for (typed, expected) in table {
            assert_eq!(nearest(typed, names), expected, "{typed}");
        }
    }
}
