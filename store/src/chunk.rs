//! A stream in pieces that several threads share without copying.

use std::io::{ErrorKind, Read};
use std::ops::{Deref, Range};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};

use crate::{Result, StoreError};

/// Large enough that handing a chunk over costs nothing, small enough that it is still in the cache of the core that
/// filled it.
pub(crate) const CHUNK: usize = 256 << 10;

/// How many chunks one stream may have in flight: 24 MiB.
const CHUNKS: usize = 96;

/// A filled buffer; goes back to its pool when the last who shares it lets go.
#[derive(Debug)]
pub(crate) struct Chunk {
    buffer: Vec<u8>,
    length: usize,
    home: Sender<Vec<u8>>,
}

impl Deref for Chunk {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.buffer[..self.length]
    }
}

impl Drop for Chunk {
    fn drop(&mut self) {
        // Without a pool the stream has ended, and the buffer may go.
        let _ = self.home.send(std::mem::take(&mut self.buffer));
    }
}

/// A part of a chunk.
#[derive(Debug)]
pub(crate) struct Slice {
    chunk: Arc<Chunk>,
    range: Range<usize>,
}

impl Deref for Slice {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.chunk[self.range.clone()]
    }
}

/// Reads a stream into chunks. Memory is bounded: when all chunks are in use, reading waits.
#[derive(Debug)]
pub(crate) struct Chunks<R> {
    input: R,
    made: usize,
    home: Sender<Vec<u8>>,
    free: Receiver<Vec<u8>>,
}

impl<R: Read> Chunks<R> {
    pub(crate) fn new(input: R) -> Self {
        let (home, free) = channel();
        Self { input, made: 0, home, free }
    }

    /// The next chunk, full unless it is the last; `None` at the end.
    pub(crate) fn next(&mut self) -> Result<Option<Arc<Chunk>>> {
        let mut buffer = match self.free.try_recv() {
            Ok(buffer) => buffer,
            Err(_) if self.made < CHUNKS => {
                self.made += 1;
                vec![0; CHUNK]
            }
            Err(_) => self.free.recv().expect("this end holds a sender itself"),
        };
        let mut length = 0;
        while length < CHUNK {
            match self.input.read(&mut buffer[length..]) {
                Ok(0) => break,
                Ok(count) => length += count,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(source) => return Err(StoreError::Stream { doing: "read the layer", source }),
            }
        }
        if length == 0 {
            return Ok(None);
        }
        Ok(Some(Arc::new(Chunk { buffer, length, home: self.home.clone() })))
    }
}

impl Slice {
    pub(crate) fn new(chunk: &Arc<Chunk>, range: Range<usize>) -> Self {
        Self { chunk: Arc::clone(chunk), range }
    }
}
