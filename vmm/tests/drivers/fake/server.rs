//! The HTTP server: one connection after the other, requests with a length, keep-alive.

use std::fs::{self, File};
use std::io::{self, Read as _, Write as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::ExitCode;

use super::api::{Answer, Machine};

/// The longest body that is taken, in bytes.
const MAX_PAYLOAD: usize = 51_200;
/// Every request that was answered, a line of JSON each, in the working directory.
const REQUESTS: &str = "requests.jsonl";

pub(super) fn serve(socket: &Path) -> ExitCode {
    let listener = match UnixListener::bind(socket) {
        Ok(listener) => listener,
        Err(error) => {
            eprintln!("Failed to open the API socket at: {}: {error}", socket.display());
            return ExitCode::from(1);
        }
    };
    let _ = fs::remove_file(REQUESTS);
    let mut machine = Machine::default();
    for stream in listener.incoming() {
        let Ok(stream) = stream else { continue };
        if let Err(error) = converse(stream, &mut machine) {
            eprintln!("a connection ends: {error}");
        }
    }
    ExitCode::SUCCESS
}

fn converse(mut stream: UnixStream, machine: &mut Machine) -> io::Result<()> {
    let mut heard = Vec::new();
    while let Some(request) = read(&mut stream, &mut heard)? {
        let answer = machine.answer(&request.method, &request.path, request.body.as_deref());
        let mut log = File::options().create(true).append(true).open(REQUESTS)?;
        let body = String::from_utf8_lossy(request.body.as_deref().unwrap_or_default()).into_owned();
        let line = serde_json::json!([request.method, request.path, body, answer.status()]);
        writeln!(log, "{line}")?;
        match &answer {
            Answer::Nothing => {
                stream.write_all(
                    b"HTTP/1.1 204 \r\nServer: Firecracker API\r\nConnection: keep-alive\r\n\r\n",
                )?;
            }
            Answer::Data(body) | Answer::Fault(body) | Answer::Fatal(body) => {
                let head = format!(
                    "HTTP/1.1 {} \r\nServer: Firecracker API\r\nConnection: keep-alive\r\n\
                     Content-Type: application/json\r\nContent-Length: {}\r\n\r\n",
                    answer.status(),
                    body.len()
                );
                stream.write_all(head.as_bytes())?;
                stream.write_all(body.as_bytes())?;
            }
        }
        if let Answer::Fatal(body) = &answer {
            eprintln!("{body}");
            std::process::exit(1);
        }
    }
    Ok(())
}

struct Request {
    method: String,
    path: String,
    body: Option<Vec<u8>>,
}

fn read(stream: &mut UnixStream, heard: &mut Vec<u8>) -> io::Result<Option<Request>> {
    let bad = |why: &str| io::Error::new(io::ErrorKind::InvalidData, why.to_owned());
    loop {
        let mut headers = [httparse::EMPTY_HEADER; 16];
        let mut request = httparse::Request::new(&mut headers);
        if let httparse::Status::Complete(at) =
            request.parse(heard).map_err(|error| bad(&error.to_string()))?
        {
            if request.version != Some(1) {
                return Err(bad("not HTTP/1.1"));
            }
            let find = |name: &str| {
                let mut found =
                    request.headers.iter().filter(|header| header.name.eq_ignore_ascii_case(name));
                let value = found.next().map(|header| String::from_utf8_lossy(header.value).into_owned());
                (value, found.next().is_some())
            };
            if find("host").0.is_none() {
                return Err(bad("no host"));
            }
            let length = match find("content-length") {
                (Some(length), false) => Some(length.parse::<usize>().map_err(|_| bad("a length"))?),
                (None, _) => None,
                (Some(_), true) => return Err(bad("two lengths")),
            };
            if length.is_some() && find("content-type").0.as_deref() != Some("application/json") {
                return Err(bad("a body that is not JSON"));
            }
            if length > Some(MAX_PAYLOAD) {
                return Err(bad("too long"));
            }
            let end = at + length.unwrap_or(0);
            if heard.len() >= end {
                let (method, path) = (request.method.unwrap_or_default(), request.path.unwrap_or_default());
                let (method, path) = (method.to_owned(), path.to_owned());
                let body = length.map(|_| heard[at..end].to_vec());
                heard.drain(..end);
                return Ok(Some(Request { method, path, body }));
            }
        }
        let mut buffer = [0; 4096];
        match stream.read(&mut buffer)? {
            0 if heard.is_empty() => return Ok(None),
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            count => heard.extend_from_slice(&buffer[..count]),
        }
    }
}
