//! The keys that detach from a workload's terminal, in Docker's notation.

use kiln_contract::{BackendError, ErrorKind};

/// Looks for a sequence of keys in what a user types. The default is the empty sequence, which nobody types.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DetachKeys {
    sequence: Vec<u8>,
    matched: usize,
}

impl DetachKeys {
    /// Reads `ctrl-p,ctrl-q`, `a,b`, `ctrl-@`; empty never detaches.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] for what is no key.
    pub fn parse(text: &str) -> Result<Self, BackendError> {
        let mut sequence = Vec::new();
        for key in text.split(',').filter(|_| !text.is_empty()) {
            let byte = match key.strip_prefix("ctrl-").map(str::as_bytes) {
                Some(&[letter @ b'a'..=b'z']) => letter - b'a' + 1,
                Some(b"@") => 0,
                Some(&[symbol @ (b'[' | b'\\' | b']' | b'^' | b'_')]) => symbol - b'@',
                None if key.len() == 1 && key.is_ascii() => key.as_bytes()[0],
                _ => {
                    return Err(BackendError::new(
                        ErrorKind::Invalid,
                        format!("`{text}` are no detach keys: `{key}` is no key"),
                    )
                    .hint(
                        "give single characters or ctrl-<a-z, @, [, \\, ], ^, _>, with commas between them",
                    ));
                }
            };
            sequence.push(byte);
        }
        Ok(Self { sequence, matched: 0 })
    }

    /// Takes in what was typed. Gives what is to be sent on, and whether the user wants to detach: keys of a sequence
    /// that has begun are held back until it is clear that it is none.
    pub fn filter(&mut self, typed: &[u8]) -> (Vec<u8>, bool) {
        let mut out = Vec::with_capacity(typed.len());
        let mut rest = typed;
        loop {
            if self.matched == 0 {
                // Whole runs in which no sequence can begin: pasted text comes in pieces of many kilobytes.
                let begins = |byte| self.sequence.first() == Some(byte);
                let (before, from) = rest.split_at(rest.iter().position(begins).unwrap_or(rest.len()));
                out.extend_from_slice(before);
                rest = from;
            }
            let Some((byte, after)) = rest.split_first() else { return (out, false) };
            rest = after;
            self.matched += 1;
            // What was held back, and this key: the longest end of it that still begins the sequence is held back.
            let mut held = self.sequence[..self.matched - 1].to_vec();
            held.push(*byte);
            let begins = (0..=held.len())
                .find(|start| self.sequence.starts_with(&held[*start..]))
                .unwrap_or(held.len());
            out.extend_from_slice(&held[..begins]);
            self.matched = held.len() - begins;
            if self.matched == self.sequence.len() {
                self.matched = 0;
                return (out, true);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn notation_is_dockers() {
        let table: [(&str, &[u8]); 5] = [
            ("ctrl-p,ctrl-q", &[16, 17]),
            ("a", b"a"),
            ("ctrl-@,ctrl-[,ctrl-_", &[0, 27, 31]),
            ("", b""),
            ("x,y,z", b"xyz"),
        ];
        for (text, sequence) in table {
            assert_eq!(DetachKeys::parse(text).unwrap().sequence, sequence, "{text}");
        }
        for text in [",", "ctrl-", "ctrl-P", "ctrl-ab", "ab", "ä", "ctrl-p,"] {
            assert!(DetachKeys::parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn keys_are_held_back_only_while_they_may_be_the_sequence() {
        /// Keys, what is typed at once, what is sent, whether that detaches.
        type Row = (&'static str, &'static [&'static [u8]], &'static [u8], bool);
        let table: [Row; 7] = [
            ("ctrl-p,ctrl-q", &[b"abc"], b"abc", false),
            ("ctrl-p,ctrl-q", &[b"ab\x10\x11"], b"ab", true),
            ("ctrl-p,ctrl-q", &[b"ab\x10", b"\x11"], b"ab", true),
            ("ctrl-p,ctrl-q", &[b"\x10", b"x"], b"\x10x", false),
            ("ctrl-p,ctrl-q", &[b"\x10\x10", b"\x11"], b"\x10", true),
            ("a,a,b", &[b"aaab"], b"a", true),
            ("", &[b"\x10\x11"], b"\x10\x11", false),
        ];
        for (keys, typed, sent, detached) in table {
            let mut keys = DetachKeys::parse(keys).unwrap();
            let mut out = Vec::new();
            let mut left = false;
            for part in typed {
                let (bytes, detach) = keys.filter(part);
                out.extend(bytes);
                left |= detach;
            }
            assert_eq!((out.as_slice(), left), (sent, detached), "{typed:?}");
        }
    }
}
