//! What a registry says when it does not say yes.

use std::time::{Duration, SystemTime};

use bytes::Bytes;
use reqwest::header::{HeaderMap, RETRY_AFTER};
use serde::Deserialize;

use crate::retry;

/// The error document of the distribution specification, and the ones that token servers send.
#[derive(Deserialize)]
struct Document {
    #[serde(default)]
    errors: Vec<Entry>,
    #[serde(default)]
    error_description: Option<String>,
    #[serde(default)]
    details: Option<String>,
    #[serde(default)]
    message: Option<String>,
}

#[derive(Deserialize)]
struct Entry {
    #[serde(default)]
    code: String,
    #[serde(default)]
    message: String,
}

/// A body as one line that is safe to show: a hostile registry cannot steer the user's terminal.
pub(crate) fn message(body: &Bytes) -> String {
    let text = match serde_json::from_slice::<Document>(body) {
        Ok(document) if !document.errors.is_empty() => {
            let line = |entry: &Entry| match (entry.code.as_str(), entry.message.as_str()) {
                ("", message) => message.to_owned(),
                (code, "") => code.to_owned(),
                (code, message) => format!("{message} ({code})"),
            };
            document.errors.iter().map(line).collect::<Vec<_>>().join("; ")
        }
        Ok(
            Document { error_description: Some(text), .. }
            | Document { details: Some(text), .. }
            | Document { message: Some(text), .. },
        ) => text,
        Ok(_) => String::new(),
        Err(_) => {
            let text = String::from_utf8_lossy(body);
            // A page for browsers tells nothing in one line.
            if text.trim_start().starts_with('<') {
                String::new()
            } else {
                text.lines().next().unwrap_or("").to_owned()
            }
        }
    };
    printable(&text)
}

/// At most 300 characters, none of them a control character.
pub(crate) fn printable(text: &str) -> String {
    text.trim().chars().map(|c| if c.is_control() { ' ' } else { c }).take(300).collect()
}

/// How long the answer asks to wait.
pub(crate) fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    retry::retry_after(headers.get(RETRY_AFTER)?.to_str().ok()?, SystemTime::now())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_become_one_printable_line() {
        for (body, expected) in [
            (r#"{"errors":[{"code":"DENIED","message":"no access","detail":[1]}]}"#, "no access (DENIED)"),
            (r#"{"errors":[{"code":"A"},{"message":"b"}]}"#, "A; b"),
            (r#"{"details":"incorrect username or password"}"#, "incorrect username or password"),
            (r#"{"error":"invalid_grant","error_description":"expired"}"#, "expired"),
            ("plain text\nmore", "plain text"),
            ("<html><body>502</body></html>", ""),
            ("\u{1b}[31mred", "[31mred"),
            ("", ""),
        ] {
            assert_eq!(message(&Bytes::from_static(body.as_bytes())).trim(), expected.trim(), "{body}");
        }
    }
}
