//! HTTP/1.1 as Firecracker's server speaks it: one connection, one request at a time, bodies with a length.

use std::io::{self, Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use crate::VmmError;

/// The longest head of a response, in bytes.
const LONGEST_HEAD: usize = 8 << 10;
/// The longest body of a response, in bytes. The longest that is asked for is a page of figures.
const LONGEST_BODY: usize = 256 << 10;
/// Headers of a response that are looked at.
const HEADERS: usize = 32;

/// A response.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Response {
    pub(super) status: u16,
    pub(super) body: Vec<u8>,
}

/// A connection.
#[derive(Debug)]
pub(super) struct Connection {
    stream: UnixStream,
}

impl Connection {
    pub(super) fn new(stream: UnixStream) -> Self {
        Self { stream }
    }

    /// Sends a request and waits for its response. `name` is how errors call it.
    pub(super) fn exchange(
        &mut self,
        name: &'static str,
        method: &str,
        path: &str,
        body: Option<&[u8]>,
        patience: Duration,
    ) -> Result<Response, VmmError> {
        let fail = || VmmError::io(format!("ask the hypervisor `{name}`"));
        self.stream.set_read_timeout(Some(patience)).map_err(fail())?;
        self.stream.set_write_timeout(Some(patience)).map_err(fail())?;
        let mut request =
            format!("{method} {path} HTTP/1.1\r\nHost: localhost\r\nAccept: application/json\r\n");
        if let Some(body) = body {
            request
                .push_str(&format!("Content-Type: application/json\r\nContent-Length: {}\r\n", body.len()));
        }
        request.push_str("\r\n");
        let mut request = request.into_bytes();
        request.extend_from_slice(body.unwrap_or_default());
        self.stream.write_all(&request).map_err(fail())?;
        self.response(name).map_err(|error| match error {
            Failure::Io(error) => fail()(error),
            Failure::Nonsense(words) => VmmError::Nonsense { command: name, words },
        })
    }

    fn response(&mut self, name: &'static str) -> Result<Response, Failure> {
        let mut heard = Vec::new();
        loop {
            let (status, length, body_at) = match head(&heard)? {
                Some(head) => head,
                None if heard.len() >= LONGEST_HEAD => {
                    return Err(Failure::Nonsense(format!("its head has more than {LONGEST_HEAD} bytes")));
                }
                None => {
                    self.more(&mut heard, LONGEST_HEAD)?;
                    continue;
                }
            };
            // Nothing is said before it is asked for.
            let end = body_at + length;
            while heard.len() < end {
                self.more(&mut heard, end)?;
            }
            if status < 200 {
                // `100 Continue`: the response itself is still to come, or has.
                tracing::debug!(name, status, "hypervisor");
                heard.drain(..end);
                continue;
            }
            if heard.len() > end {
                return Err(Failure::Nonsense(format!("{} bytes follow it", heard.len() - end)));
            }
            return Ok(Response { status, body: heard.split_off(body_at) });
        }
    }

    fn more(&mut self, heard: &mut Vec<u8>, most: usize) -> io::Result<()> {
        let mut buffer = [0; 4096];
        let room = (most - heard.len()).min(buffer.len());
        let count = self.stream.read(&mut buffer[..room])?;
        if count == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        heard.extend_from_slice(&buffer[..count]);
        Ok(())
    }
}

#[derive(Debug)]
enum Failure {
    Io(io::Error),
    Nonsense(String),
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

/// The status, the body's length and where it begins, once the head is whole.
fn head(heard: &[u8]) -> Result<Option<(u16, usize, usize)>, Failure> {
    let mut headers = [httparse::EMPTY_HEADER; HEADERS];
    let mut response = httparse::Response::new(&mut headers);
    let body_at = match response.parse(heard) {
        Ok(httparse::Status::Complete(at)) => at,
        Ok(httparse::Status::Partial) => return Ok(None),
        Err(error) => return Err(Failure::Nonsense(format!("it is no HTTP: {error}"))),
    };
    let status = response.code.unwrap_or_default();
    let mut length = 0;
    for header in response.headers.iter() {
        if header.name.eq_ignore_ascii_case("transfer-encoding") {
            return Err(Failure::Nonsense("its body comes without a length".to_owned()));
        }
        if header.name.eq_ignore_ascii_case("content-length") {
            let text = String::from_utf8_lossy(header.value);
            length = text
                .trim()
                .parse::<usize>()
                .ok()
                .filter(|length| *length <= LONGEST_BODY)
                .ok_or_else(|| Failure::Nonsense(format!("its body has {text} bytes")))?;
        }
    }
    Ok(Some((status, length, body_at)))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is made of `said`, which comes in pieces of `piece` bytes; the peer stays as long as `stays`.
    fn heard(said: &[u8], piece: usize, stays: bool) -> Result<Response, VmmError> {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let said = said.to_vec();
        let peer = std::thread::spawn(move || {
            let mut request = [0; 4096];
            let count = theirs.read(&mut request).unwrap();
            for part in said.chunks(piece) {
                theirs.write_all(part).unwrap();
            }
            let request = String::from_utf8(request[..count].to_vec()).unwrap();
            (request, stays.then_some(theirs))
        });
        let mut connection = Connection::new(ours);
        let answer = connection.exchange("PUT /x", "PUT", "/x", Some(b"{}"), Duration::from_millis(500));
        let (request, _) = peer.join().unwrap();
        let expected = "PUT /x HTTP/1.1\r\nHost: localhost\r\nAccept: application/json\r\n\
                        Content-Type: application/json\r\nContent-Length: 2\r\n\r\n{}";
        assert_eq!(request, expected);
        answer
    }

    #[test]
    fn responses_are_read_however_they_are_cut() {
        let table: [(&[u8], u16, &[u8]); 4] = [
            (b"HTTP/1.1 204 \r\nServer: Firecracker API\r\nConnection: keep-alive\r\n\r\n", 204, b""),
            (b"HTTP/1.1 200 \r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}", 200, b"{}"),
            (b"HTTP/1.1 100 \r\n\r\nHTTP/1.1 204 No Content\r\n\r\n", 204, b""),
            (b"HTTP/1.1 400 Bad Request\r\ncontent-length: 3\r\n\r\nabc", 400, b"abc"),
        ];
        for (said, status, body) in table {
            for piece in [1, 7, 4096] {
                let response = heard(said, piece, true).unwrap();
                assert_eq!((response.status, response.body.as_slice()), (status, body));
            }
        }
    }

    #[test]
    fn what_is_no_response_is_an_error_and_never_a_wait() {
        let endless = [b"HTTP/1.1 200 \r\nX: ".to_vec(), vec![b'a'; 10_000]].concat();
        let table: [(&[u8], bool, &str); 7] = [
            (b"what?\r\n\r\n", true, "it is no HTTP"),
            (b"HTTP/1.1 200 \r\nContent-Length: 99999999999\r\n\r\n", true, "its body has 99999999999 bytes"),
            (b"HTTP/1.1 200 \r\nContent-Length: -1\r\n\r\n", true, "its body has -1 bytes"),
            (b"HTTP/1.1 200 \r\nTransfer-Encoding: chunked\r\n\r\n", true, "without a length"),
            (b"HTTP/1.1 200 \r\nContent-Length: 1\r\n\r\nab", true, "1 bytes follow it"),
            (&endless, true, "its head has more than"),
            (b"HTTP/1.1 200 \r\nContent-Length: 5\r\n\r\nab", false, "ask the hypervisor `PUT /x`"),
        ];
        for (said, stays, words) in table {
            let error = heard(said, 4096, stays).unwrap_err().to_string();
            assert!(error.contains(words), "{error} ({words})");
        }
        // Nothing at all.
        let error = heard(b"", 1, true).unwrap_err().to_string();
        assert!(error.contains("ask the hypervisor"), "{error}");
    }
}
