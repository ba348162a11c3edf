//! What the tests of this room share: stores, images made by hand, and a server that misbehaves as it is told.
#![allow(dead_code, missing_docs, unreachable_pub, reason = "every test program uses its own part of it")]

use std::collections::HashMap;
use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use kiln_contract::{Digest, Home};
use kiln_registry::{Config, Registry};
use kiln_store::{ImageName, Store};

pub const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
pub const OCI_INDEX: &str = "application/vnd.oci.image.index.v1+json";

/// A store in a directory of its own.
pub struct TestStore {
    pub store: Store,
    pub dir: tempfile::TempDir,
}

impl TestStore {
    pub fn new() -> Self {
        let dir = tempfile::Builder::new().prefix("kiln-registry-test-").tempdir().unwrap();
        let store = Store::open(&Home::at(dir.path().join("home"))).unwrap();
        Self { store, dir }
    }
}

/// Registries with nothing of this machine's configuration, and short patience.
pub fn registry(change: impl FnOnce(&mut Config, &Path)) -> (Registry, tempfile::TempDir) {
    let dir = tempfile::Builder::new().prefix("kiln-registry-conf-").tempdir().unwrap();
    let path = |name: &str, content: &str| {
        let path = dir.path().join(name);
        std::fs::write(&path, content).unwrap();
        path
    };
    let mut config = Config {
        authfile: Some(path("auth.json", "{}")),
        registries_conf: Some(path("registries.conf", "")),
        timeout: Some(Duration::from_millis(1500)),
        retries: Some(2),
        ..Config::default()
    };
    change(&mut config, dir.path());
    (Registry::new(config).unwrap(), dir)
}

pub fn plain_registry() -> (Registry, tempfile::TempDir) {
    registry(|_, _| ())
}

pub fn name(text: &str) -> ImageName {
    ImageName::parse(text).unwrap()
}

pub fn run(command: &mut Command) -> String {
    let output = command.output().unwrap();
    assert!(
        output.status.success(),
        "{command:?}: {}\n{}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).unwrap()
}

/// A tar with regular files.
pub fn tar(files: &[(&str, &[u8])]) -> Vec<u8> {
    let mut out = Vec::new();
    for (name, content) in files {
        out.extend(tar_header(name, content.len() as u64));
        out.extend_from_slice(content);
        out.resize(out.len().next_multiple_of(512), 0);
    }
    out.resize(out.len() + 1024, 0);
    out
}

pub fn tar_header(name: &str, size: u64) -> [u8; 512] {
    let mut header = [0_u8; 512];
    header[..name.len()].copy_from_slice(name.as_bytes());
    header[100..108].copy_from_slice(b"0000644\0");
    header[108..116].copy_from_slice(b"0000000\0");
    header[116..124].copy_from_slice(b"0000000\0");
    if size < 1 << 33 {
        header[124..136].copy_from_slice(format!("{size:011o}\0").as_bytes());
    } else {
        header[124] = 0x80;
        header[128..136].copy_from_slice(&size.to_be_bytes());
    }
    header[136..148].copy_from_slice(b"00000000000\0");
    header[148..156].copy_from_slice(b"        ");
    header[156] = b'0';
    header[257..265].copy_from_slice(b"ustar\x0000");
    let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
    header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    header
}

pub fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

/// Bytes that do not compress and are the same every time.
pub fn noise(length: usize) -> Vec<u8> {
    kiln_fixtures::noise(length, 1)
}

/// An image made by hand, as a registry would serve it.
#[derive(Clone, Default)]
pub struct HandMade {
    pub blobs: HashMap<String, Vec<u8>>,
    pub manifest: Vec<u8>,
    pub media_type: &'static str,
    /// Compressed layers and their diff_ids, bottom first.
    pub layers: Vec<(Digest, Digest)>,
}

impl HandMade {
    /// An image with one layer for each of `tars`, gzipped.
    pub fn new(tars: &[Vec<u8>]) -> Self {
        let packed: Vec<(Vec<u8>, Digest)> = tars.iter().map(|tar| (gzip(tar), Digest::of(tar))).collect();
        Self::of_packed(&packed)
    }

    /// An image of packed layers with the diff_ids that its config shall have.
    pub fn of_packed(packed: &[(Vec<u8>, Digest)]) -> Self {
        let mut image = Self { media_type: OCI_MANIFEST, ..Self::default() };
        let mut layers = Vec::new();
        for (bytes, diff_id) in packed {
            let digest = Digest::of(bytes);
            layers.push(serde_json::json!({
                "mediaType": "application/vnd.oci.image.layer.v1.tar+gzip", "digest": digest, "size": bytes.len(),
            }));
            image.layers.push((digest, *diff_id));
            image.blobs.insert(digest.to_string(), bytes.clone());
        }
        let diff_ids: Vec<Digest> = packed.iter().map(|(_, diff_id)| *diff_id).collect();
        let architecture = kiln_contract::Platform::host().architecture;
        let config = serde_json::json!({
            "os": "linux", "architecture": architecture, "rootfs": {"type": "layers", "diff_ids": diff_ids},
        });
        image.set(&config, &layers);
        image
    }

    pub fn set(&mut self, config: &serde_json::Value, layers: &[serde_json::Value]) {
        let config = config.to_string().into_bytes();
        let digest = Digest::of(&config);
        self.manifest = serde_json::json!({
            "schemaVersion": 2, "mediaType": OCI_MANIFEST,
            "config": {"mediaType": "application/vnd.oci.image.config.v1+json", "digest": digest, "size": config.len()},
            "layers": layers,
        })
        .to_string()
        .into_bytes();
        self.blobs.insert(digest.to_string(), config);
    }

    /// What a registry that is well answers.
    pub fn answer(&self, request: &Request) -> Reply {
        let path = request.path.split('?').next().unwrap();
        if path == "/v2/" {
            return Reply::new(200, "{}");
        }
        if path.contains("/manifests/") {
            return Reply::new(200, self.manifest.clone()).header("Content-Type", self.media_type);
        }
        match path.rsplit_once("/blobs/").and_then(|(_, digest)| self.blobs.get(digest)) {
            Some(blob) => match request.range_start() {
                Some(start) if request.range_end().is_some() => {
                    let end = request.range_end().unwrap().min(blob.len() - 1);
                    Reply::new(206, &blob[start..=end])
                        .header("Content-Range", &format!("bytes {start}-{end}/{}", blob.len()))
                }
                Some(start) => Reply::new(206, &blob[start..])
                    .header("Content-Range", &format!("bytes {start}-{}/{}", blob.len() - 1, blob.len())),
                None => Reply::new(200, blob.clone()),
            },
            None => Reply::new(404, r#"{"errors":[{"code":"BLOB_UNKNOWN","message":"unknown"}]}"#),
        }
    }
}

/// One request to a server that is well. The head of its answer.
pub fn http(address: &str, method: &str, path: &str, content_type: &str, body: &[u8]) -> String {
    let mut stream = TcpStream::connect(address).unwrap();
    let head = format!(
        "{method} {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\nContent-Type: {content_type}\r\nContent-Length: {}\r\n\r\n",
        body.len()
    );
    stream.write_all(head.as_bytes()).unwrap();
    stream.write_all(body).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let head = answer.split("\r\n\r\n").next().unwrap().to_owned();
    assert!(head.starts_with("HTTP/1.1 20"), "{method} {path}: {answer}");
    head
}

#[derive(Debug, Clone)]
pub struct Request {
    pub method: String,
    pub path: String,
    pub headers: HashMap<String, String>,
    pub body: Vec<u8>,
}

impl Request {
    pub fn range_start(&self) -> Option<usize> {
        self.headers.get("range")?.strip_prefix("bytes=")?.split('-').next()?.parse().ok()
    }

    pub fn range_end(&self) -> Option<usize> {
        self.headers.get("range")?.split('-').nth(1)?.parse().ok()
    }

    pub fn is_blob(&self, digest: &Digest) -> bool {
        self.path.ends_with(&format!("/blobs/{digest}"))
    }
}

/// Passes a request on to the server at `address`, and its answer back.
pub fn forward(address: &str, request: &Request) -> Reply {
    let mut stream = TcpStream::connect(address).unwrap();
    // Of 1.0, whose answers have no chunks and end with the connection.
    let mut head = format!("{} {} HTTP/1.0\r\n", request.method, request.path);
    for (name, value) in &request.headers {
        if name != "connection" {
            head += &format!("{name}: {value}\r\n");
        }
    }
    stream.write_all(format!("{head}\r\n").as_bytes()).unwrap();
    stream.write_all(&request.body).unwrap();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).unwrap();
    let end = answer.windows(4).position(|part| part == b"\r\n\r\n").unwrap();
    let head = String::from_utf8(answer[..end].to_vec()).unwrap();
    let mut lines = head.lines();
    let status = lines.next().unwrap().split(' ').nth(1).unwrap().parse().unwrap();
    let mut reply = Reply::new(status, &answer[end + 4..]);
    for (name, value) in lines.filter_map(|line| line.split_once(": ")) {
        match name.to_ascii_lowercase().as_str() {
            // Of an answer to HEAD it is not the body's.
            "content-length" => reply.length = value.parse().ok(),
            "connection" => {}
            _ => reply = reply.header(name, value),
        }
    }
    reply
}

#[derive(Debug, Clone)]
pub struct Reply {
    pub status: u16,
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
    /// Said instead of the body's real length.
    pub length: Option<u64>,
    /// The connection ends after so many bytes of the body.
    pub cut: Option<usize>,
    /// After what was sent, nothing comes for so long.
    pub hang: Option<Duration>,
}

impl Reply {
    pub fn new(status: u16, body: impl AsRef<[u8]>) -> Self {
        Self {
            status,
            headers: Vec::new(),
            body: body.as_ref().to_vec(),
            length: None,
            cut: None,
            hang: None,
        }
    }

    pub fn header(mut self, name: &str, value: &str) -> Self {
        self.headers.push((name.into(), value.into()));
        self
    }

    pub fn cut(mut self, at: usize) -> Self {
        self.cut = Some(at);
        self
    }

    pub fn hang(mut self) -> Self {
        self.hang = Some(Duration::from_secs(5));
        self
    }

    pub fn length(mut self, length: u64) -> Self {
        self.length = Some(length);
        self
    }
}

/// An HTTP server that answers as a closure says; ended when dropped.
pub struct Server {
    pub port: u16,
    requests: Arc<Mutex<Vec<Request>>>,
    ended: Arc<AtomicBool>,
}

impl Server {
    /// `answer` gets each request and how many of the same method and path came before it.
    pub fn start(answer: impl Fn(&Request, usize) -> Reply + Send + Sync + 'static) -> Self {
        Self::start_early(|_| None, answer)
    }

    /// As [`Server::start`], but what `early` has an answer for gets it after its head, and its body is thrown away.
    pub fn start_early(
        early: impl Fn(&Request) -> Option<Reply> + Send + Sync + 'static,
        answer: impl Fn(&Request, usize) -> Reply + Send + Sync + 'static,
    ) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let requests = Arc::new(Mutex::new(Vec::new()));
        let ended = Arc::new(AtomicBool::new(false));
        let (seen, stop, answers) = (requests.clone(), ended.clone(), Arc::new((early, answer)));
        std::thread::spawn(move || {
            for connection in listener.incoming() {
                if stop.load(Ordering::Relaxed) {
                    return;
                }
                let (seen, answers) = (seen.clone(), answers.clone());
                std::thread::spawn(move || serve(&mut connection.unwrap(), &seen, &answers.0, &answers.1));
            }
        });
        Self { port, requests, ended }
    }

    pub fn address(&self) -> String {
        format!("localhost:{}", self.port)
    }

    pub fn requests(&self) -> Vec<Request> {
        self.requests.lock().unwrap().clone()
    }

    pub fn image(&self) -> ImageName {
        name(&format!("{}/team/app:1", self.address()))
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.ended.store(true, Ordering::Relaxed);
        // Wakes the listener.
        let _ = TcpStream::connect(("127.0.0.1", self.port));
    }
}

fn serve(
    stream: &mut TcpStream,
    seen: &Mutex<Vec<Request>>,
    early: &dyn Fn(&Request) -> Option<Reply>,
    answer: &dyn Fn(&Request, usize) -> Reply,
) {
    let Some(mut request) = read_head(stream) else { return };
    let early = early(&request);
    let length = request.headers.get("content-length").and_then(|length| length.parse().ok()).unwrap_or(0);
    if early.is_none() {
        request.body = vec![0; length];
        if stream.read_exact(&mut request.body).is_err() {
            return;
        }
    }
    let before = {
        let mut seen = seen.lock().unwrap();
        let before =
            seen.iter().filter(|old| old.method == request.method && old.path == request.path).count();
        seen.push(request.clone());
        before
    };
    let is_early = early.is_some();
    let reply = early.unwrap_or_else(|| answer(&request, before));
    let length = reply.length.unwrap_or(reply.body.len() as u64);
    let mut head =
        format!("HTTP/1.1 {} Whatever\r\nConnection: close\r\nContent-Length: {length}\r\n", reply.status);
    for (name, value) in &reply.headers {
        head += &format!("{name}: {value}\r\n");
    }
    head += "\r\n";
    let body = &reply.body[..reply.cut.unwrap_or(reply.body.len()).min(reply.body.len())];
    // The client may have gone: that is its right.
    let _ = stream.write_all(head.as_bytes());
    if request.method != "HEAD" {
        let _ = stream.write_all(body);
    }
    let _ = stream.flush();
    if let Some(hang) = reply.hang {
        std::thread::sleep(hang);
    }
    if is_early {
        // As servers do it: a connection that is closed with bytes unread would take the answer with it.
        let _ = stream.shutdown(std::net::Shutdown::Write);
        let _ = stream.set_read_timeout(Some(Duration::from_millis(500)));
        let _ = std::io::copy(stream, &mut std::io::sink());
    }
}

fn read_head(stream: &mut TcpStream) -> Option<Request> {
    let mut head = Vec::new();
    let mut byte = [0];
    while !head.ends_with(b"\r\n\r\n") {
        if stream.read(&mut byte).ok()? == 0 {
            return None;
        }
        head.push(byte[0]);
    }
    let head = String::from_utf8(head).ok()?;
    let mut lines = head.lines();
    let mut first = lines.next()?.split(' ');
    let (method, path) = (first.next()?.to_owned(), first.next()?.to_owned());
    let headers: HashMap<String, String> = lines
        .filter_map(|line| line.split_once(':'))
        .map(|(name, value)| (name.to_ascii_lowercase(), value.trim().to_owned()))
        .collect();
    Some(Request { method, path, headers, body: Vec::new() })
}
