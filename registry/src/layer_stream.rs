//! A downloaded blob as a reader for the thread that unpacks it.

use std::io::{self, Read};

use bytes::{Buf as _, Bytes};
use tokio::sync::mpsc;

use crate::download::Piece;
use crate::unpack::PackedLayer;

/// Reads what a download sends. It gives an end only for a complete, verified blob; a download that failed is
/// an error here, so that nobody takes a part for the whole.
pub(crate) struct Pieces {
    receiver: mpsc::Receiver<Piece>,
    data: Bytes,
    ended: bool,
}

impl Pieces {
    pub(crate) fn new(receiver: mpsc::Receiver<Piece>) -> Self {
        Self { receiver, data: Bytes::new(), ended: false }
    }
}

impl Read for Pieces {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        while self.data.is_empty() && !self.ended {
            match self.receiver.blocking_recv() {
                Some(Piece::Data(data)) => self.data = data,
                Some(Piece::End) => self.ended = true,
                None => return Err(io::Error::other("the download failed")),
            }
        }
        let n = into.len().min(self.data.len());
        self.data.copy_to_slice(&mut into[..n]);
        Ok(n)
    }
}

impl PackedLayer for Pieces {
    fn drain(&mut self) {
        while let Some(Piece::Data(_)) = self.receiver.blocking_recv() {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_verified_blob_has_an_end() {
        for (pieces, expected) in [
            (
                vec![
                    Piece::Data(Bytes::from_static(b"ab")),
                    Piece::Data(Bytes::from_static(b"c")),
                    Piece::End,
                ],
                Some("abc"),
            ),
            (vec![Piece::End], Some("")),
            (vec![Piece::Data(Bytes::from_static(b"ab"))], None),
            (vec![], None),
        ] {
            let (sender, receiver) = mpsc::channel(4);
            for piece in pieces {
                sender.try_send(piece).unwrap();
            }
            drop(sender);
            let mut text = String::new();
            let outcome = Pieces::new(receiver).read_to_string(&mut text);
            assert_eq!(outcome.ok().map(|_| text.as_str()), expected);
        }
    }
}
