//! Serving a share over a stream with threads.
//!
//! The threads take turns: one reads a request, lets the next read, does what it has read and writes the reply itself. No
//! request is handed from one thread to another, so a client with one request in flight is answered without waiting for a
//! scheduler, and one with several is served in parallel. As many requests are in memory as there are threads; while
//! all are busy nothing is read, and the guest's own buffers fill.

use std::io::{self, BufReader, ErrorKind, Read, Write};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use crate::session::Session;
use crate::share::Tree;
use crate::wire::{HEADER, Reply, rflush};
use crate::{Share, ShareError};

/// Small requests arrive whole in one read; the data of large ones go past this buffer.
const READ_AHEAD: usize = 8192;

/// How a session ended.
#[derive(Debug, Default)]
struct End {
    reached: AtomicBool,
    why: Mutex<Option<ShareError>>,
}

impl End {
    fn reach(&self, why: Option<ShareError>) {
        let mut first = self.why.lock().unwrap_or_else(PoisonError::into_inner);
        if !self.reached.swap(true, Ordering::AcqRel) {
            *first = why;
        }
    }

    fn is_reached(&self) -> bool {
        self.reached.load(Ordering::Acquire)
    }
}

impl Share {
    /// Serves one connection until the guest closes it. `reader` and `writer` are the two halves of the stream, for example a
    /// `UnixStream` and its `try_clone`, or two pipes.
    ///
    /// The calling thread serves too, beside [`crate::Options::requests`] - 1 more that end with this call. When the
    /// stream cannot be written any more, the session ends with the next thing that is read from it: shut both
    /// halves down to end it from outside.
    ///
    /// # Errors
    /// The stream broke, or what came over it is not 9P. A guest that leaves between two messages is no error.
    pub fn serve(&self, reader: impl Read + Send, writer: impl Write + Send) -> Result<(), ShareError> {
        let session = Session::new(Arc::clone(&self.tree));
        let input = Mutex::new(BufReader::with_capacity(READ_AHEAD, reader));
        let output = Mutex::new(writer);
        let end = End::default();
        let serve = || serve_turns(&session, &input, &output, &end);
        std::thread::scope(|scope| {
            for number in 1..self.tree.options.requests {
                let thread = std::thread::Builder::new().name(format!("share-{number}"));
                if let Err(source) = thread.spawn_scoped(scope, serve) {
                    // Fewer do as well, down to the one that is here.
                    tracing::warn!(share = self.tree.name, threads = number, %source, "serving with few threads");
                    break;
                }
            }
            serve();
        });
        end.why.into_inner().unwrap_or_else(PoisonError::into_inner).map_or(Ok(()), Err)
    }
}

fn serve_turns(session: &Session, input: &Mutex<impl Read>, output: &Mutex<impl Write>, end: &End) {
    let mut buffer = Vec::new();
    let mut reply = Reply::default();
    loop {
        let (admitted, frame) = {
            let mut reader = input.lock().unwrap_or_else(PoisonError::into_inner);
            if end.is_reached() {
                return;
            }
            match read_frame(&mut *reader, &mut buffer, session) {
                Ok(Some(frame)) => (session.admit(frame), frame),
                over => {
                    end.reach(over.err());
                    session.requests.cancel_all();
                    return;
                }
            }
        };
        if !session.answer(&admitted, frame, &mut reply) {
            continue;
        }
        let mut output = output.lock().unwrap_or_else(PoisonError::into_inner);
        let flushes = session.finish(&admitted);
        let written = output.write_all(reply.frame()).and_then(|()| {
            flushes.into_iter().try_for_each(|tag| output.write_all(&rflush(tag)))?;
            output.flush()
        });
        if let Err(source) = written {
            end.reach(Some(session.tree.broken("writing a reply", source)));
            session.requests.cancel_all();
            return;
        }
    }
}

/// The next frame; `None` if the stream ends where one could begin.
fn read_frame<'b>(
    reader: &mut impl Read,
    buffer: &'b mut Vec<u8>,
    session: &Session,
) -> Result<Option<&'b [u8]>, ShareError> {
    let broken = |source| session.tree.broken("reading a request", source);
    let mut size = [0; 4];
    let mut read = 0;
    while read < size.len() {
        match reader.read(&mut size[read..]) {
            Ok(0) if read == 0 => return Ok(None),
            Ok(0) => return Err(broken(ErrorKind::UnexpectedEof.into())),
            Ok(more) => read += more,
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(broken(error)),
        }
    }
    let frame = session.frame_space(size, buffer)?;
    reader.read_exact(&mut frame[4..]).map_err(broken)?;
    Ok(Some(frame))
}

impl Session {
    /// Room for a frame of this size, which is in it already.
    pub(crate) fn frame_space<'b>(
        &self,
        size: [u8; 4],
        buffer: &'b mut Vec<u8>,
    ) -> Result<&'b mut [u8], ShareError> {
        let limit = self.frame_limit();
        let told = u32::from_le_bytes(size);
        if !(HEADER as u32..=limit).contains(&told) {
            return Err(ShareError::Framing { share: self.tree.name.clone(), size: told, limit });
        }
        let length = told as usize;
        if buffer.len() < length {
            buffer.resize(length, 0);
        }
        let frame = &mut buffer[..length];
        frame[..4].copy_from_slice(&size);
        Ok(frame)
    }
}

impl Tree {
    pub(crate) fn broken(&self, action: &'static str, source: io::Error) -> ShareError {
        ShareError::Stream { share: self.name.clone(), action, source }
    }
}
