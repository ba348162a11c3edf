//! A client that writes messages byte by byte, so that it can also write wrong ones. It shares no code with the
//! server: its numbers are those of `include/net/9p/9p.h`.

use std::io::{Read as _, Write as _};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::thread::JoinHandle;

use kiln_share::{Share, ShareError};
use nix::libc;

pub(crate) const NONE: u32 = u32::MAX;
pub(crate) const O_RDONLY: u32 = 0;
pub(crate) const O_WRONLY: u32 = 1;
pub(crate) const O_RDWR: u32 = 2;
pub(crate) const O_CREAT: u32 = 0o100;
pub(crate) const O_EXCL: u32 = 0o200;
pub(crate) const O_TRUNC: u32 = 0o1000;
pub(crate) const O_APPEND: u32 = 0o2000;
pub(crate) const O_DIRECTORY: u32 = 0o200_000;

pub(crate) const STATFS: u8 = 8;
pub(crate) const LOPEN: u8 = 12;
pub(crate) const LCREATE: u8 = 14;
pub(crate) const SYMLINK: u8 = 16;
pub(crate) const MKNOD: u8 = 18;
pub(crate) const RENAME: u8 = 20;
pub(crate) const READLINK: u8 = 22;
pub(crate) const GETATTR: u8 = 24;
pub(crate) const SETATTR: u8 = 26;
pub(crate) const XATTRWALK: u8 = 30;
pub(crate) const XATTRCREATE: u8 = 32;
pub(crate) const READDIR: u8 = 40;
pub(crate) const FSYNC: u8 = 50;
pub(crate) const LOCK: u8 = 52;
pub(crate) const GETLOCK: u8 = 54;
pub(crate) const LINK: u8 = 70;
pub(crate) const MKDIR: u8 = 72;
pub(crate) const RENAMEAT: u8 = 74;
pub(crate) const UNLINKAT: u8 = 76;
pub(crate) const VERSION: u8 = 100;
pub(crate) const AUTH: u8 = 102;
pub(crate) const ATTACH: u8 = 104;
pub(crate) const FLUSH: u8 = 108;
pub(crate) const WALK: u8 = 110;
pub(crate) const READ: u8 = 116;
pub(crate) const WRITE: u8 = 118;
pub(crate) const CLUNK: u8 = 120;
pub(crate) const REMOVE: u8 = 122;

/// A body under construction.
#[derive(Debug, Clone, Default)]
pub(crate) struct Body(pub(crate) Vec<u8>);

impl Body {
    pub(crate) fn new() -> Self {
        Self::default()
    }

    pub(crate) fn bytes(mut self, bytes: &[u8]) -> Self {
        self.0.extend_from_slice(bytes);
        self
    }

    pub(crate) fn u8(self, number: u8) -> Self {
        self.bytes(&[number])
    }

    pub(crate) fn u16(self, number: u16) -> Self {
        self.bytes(&number.to_le_bytes())
    }

    pub(crate) fn u32(self, number: u32) -> Self {
        self.bytes(&number.to_le_bytes())
    }

    pub(crate) fn u64(self, number: u64) -> Self {
        self.bytes(&number.to_le_bytes())
    }

    pub(crate) fn string(self, bytes: impl AsRef<[u8]>) -> Self {
        let bytes = bytes.as_ref();
        self.u16(bytes.len().try_into().unwrap()).bytes(bytes)
    }

    pub(crate) fn data(self, bytes: &[u8]) -> Self {
        self.u32(bytes.len().try_into().unwrap()).bytes(bytes)
    }
}

/// Reads a reply from front to back.
#[derive(Debug)]
pub(crate) struct Parsed<'a>(pub(crate) &'a [u8]);

impl<'a> Parsed<'a> {
    pub(crate) fn take(&mut self, count: usize) -> &'a [u8] {
        let (taken, rest) = self.0.split_at(count);
        self.0 = rest;
        taken
    }

    pub(crate) fn u8(&mut self) -> u8 {
        self.take(1)[0]
    }

    pub(crate) fn u16(&mut self) -> u16 {
        u16::from_le_bytes(self.take(2).try_into().unwrap())
    }

    pub(crate) fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.take(4).try_into().unwrap())
    }

    pub(crate) fn u64(&mut self) -> u64 {
        u64::from_le_bytes(self.take(8).try_into().unwrap())
    }

    pub(crate) fn string(&mut self) -> &'a [u8] {
        let length = self.u16();
        self.take(length.into())
    }

    pub(crate) fn qid(&mut self) -> Qid {
        Qid { kind: self.u8(), version: self.u32(), path: self.u64() }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Qid {
    pub(crate) kind: u8,
    pub(crate) version: u32,
    pub(crate) path: u64,
}

/// What `Rgetattr` says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Attributes {
    pub(crate) valid: u64,
    pub(crate) qid: Qid,
    pub(crate) mode: u32,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) links: u64,
    pub(crate) device: u64,
    pub(crate) size: u64,
    pub(crate) block: u64,
    pub(crate) blocks: u64,
    pub(crate) atime: (u64, u64),
    pub(crate) mtime: (u64, u64),
    pub(crate) ctime: (u64, u64),
    pub(crate) generation: u64,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Entry {
    pub(crate) qid: Qid,
    pub(crate) offset: u64,
    pub(crate) kind: u8,
    pub(crate) name: Vec<u8>,
}

/// A message as it came.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Message {
    pub(crate) kind: u8,
    pub(crate) tag: u16,
    pub(crate) body: Vec<u8>,
}

/// The errors of requests, by number.
pub(crate) type Outcome<T> = Result<T, i32>;

/// A connection to a share, served by threads of this process.
#[derive(Debug)]
pub(crate) struct Client {
    pub(crate) stream: UnixStream,
    server: Option<JoinHandle<Result<(), ShareError>>>,
    /// For helpers that need a fid for a moment.
    next_fid: u32,
}

/// The fid of the root.
pub(crate) const ROOT: u32 = 0;

impl Client {
    /// Connected, and nothing said.
    pub(crate) fn silent(share: &Share) -> Self {
        let (stream, theirs) = UnixStream::pair().unwrap();
        let share = share.clone();
        let server = std::thread::spawn(move || share.serve(theirs.try_clone().unwrap(), theirs));
        Self { stream, server: Some(server), next_fid: 1 << 20 }
    }

    /// Connected, and attached to the root as nobody in particular.
    pub(crate) fn new(share: &Share) -> Self {
        Self::attached_as(share, NONE)
    }

    pub(crate) fn attached_as(share: &Share, user: u32) -> Self {
        let mut client = Self::silent(share);
        assert_eq!(client.version(1 << 20, b"9P2000.L"), Ok((1 << 20, b"9P2000.L".to_vec())));
        client.attach(ROOT, user).unwrap();
        client
    }

    pub(crate) fn send(&mut self, kind: u8, tag: u16, body: &Body) {
        let size = u32::try_from(body.0.len() + 7).unwrap();
        let mut frame = size.to_le_bytes().to_vec();
        frame.push(kind);
        frame.extend(tag.to_le_bytes());
        frame.extend(&body.0);
        self.stream.write_all(&frame).unwrap();
    }

    pub(crate) fn receive(&mut self) -> Message {
        self.try_receive().expect("a message")
    }

    /// `None`: the server has gone.
    pub(crate) fn try_receive(&mut self) -> Option<Message> {
        let mut header = [0; 7];
        self.stream.read_exact(&mut header).ok()?;
        let size = u32::from_le_bytes(header[..4].try_into().unwrap());
        let mut body = vec![0; size as usize - 7];
        self.stream.read_exact(&mut body).ok()?;
        Some(Message { kind: header[4], tag: u16::from_le_bytes([header[5], header[6]]), body })
    }

    /// One request and its reply's body.
    pub(crate) fn call(&mut self, kind: u8, body: &Body) -> Outcome<Vec<u8>> {
        let tag = if kind == VERSION { u16::MAX } else { 7 };
        self.send(kind, tag, body);
        let reply = self.receive();
        assert_eq!(reply.tag, tag);
        outcome(kind, reply)
    }

    pub(crate) fn version(&mut self, size: u32, version: &[u8]) -> Outcome<(u32, Vec<u8>)> {
        let reply = self.call(VERSION, &Body::new().u32(size).string(version))?;
        let mut reply = Parsed(&reply);
        Ok((reply.u32(), reply.string().to_vec()))
    }

    pub(crate) fn attach(&mut self, fid: u32, user: u32) -> Outcome<Qid> {
        let body = Body::new().u32(fid).u32(NONE).string("root").string("").u32(user);
        self.call(ATTACH, &body).map(|reply| Parsed(&reply).qid())
    }

    pub(crate) fn walk<N: AsRef<[u8]>>(&mut self, fid: u32, new: u32, names: &[N]) -> Outcome<Vec<Qid>> {
        let mut body = Body::new().u32(fid).u32(new).u16(names.len().try_into().unwrap());
        for name in names {
            body = body.string(name);
        }
        let reply = self.call(WALK, &body)?;
        let mut reply = Parsed(&reply);
        Ok((0..reply.u16()).map(|_| reply.qid()).collect())
    }

    /// A new fid for a path from the root, or the error of its last step.
    pub(crate) fn fid(&mut self, path: &str) -> Outcome<u32> {
        self.next_fid += 1;
        let fid = self.next_fid;
        let names: Vec<&str> = path.split('/').filter(|name| !name.is_empty()).collect();
        let qids = self.walk(ROOT, fid, &names)?;
        if qids.len() == names.len() { Ok(fid) } else { Err(libc::ENOENT) }
    }

    pub(crate) fn open(&mut self, path: &str, flags: u32) -> Outcome<u32> {
        let fid = self.fid(path)?;
        match self.lopen(fid, flags) {
            Ok(_) => Ok(fid),
            Err(error) => {
                self.clunk(fid).unwrap();
                Err(error)
            }
        }
    }

    pub(crate) fn lopen(&mut self, fid: u32, flags: u32) -> Outcome<(Qid, u32)> {
        let reply = self.call(LOPEN, &Body::new().u32(fid).u32(flags))?;
        let mut reply = Parsed(&reply);
        Ok((reply.qid(), reply.u32()))
    }

    /// Makes a file in the directory and opens it; returns its fid.
    pub(crate) fn create(&mut self, directory: &str, name: &str, flags: u32, mode: u32) -> Outcome<u32> {
        let fid = self.fid(directory)?;
        let body = Body::new().u32(fid).string(name).u32(flags).u32(mode).u32(0);
        match self.call(LCREATE, &body) {
            Ok(_) => Ok(fid),
            Err(error) => {
                self.clunk(fid).unwrap();
                Err(error)
            }
        }
    }

    pub(crate) fn read(&mut self, fid: u32, offset: u64, count: u32) -> Outcome<Vec<u8>> {
        let reply = self.call(READ, &Body::new().u32(fid).u64(offset).u32(count))?;
        let mut reply = Parsed(&reply);
        let length = reply.u32();
        assert_eq!(reply.0.len(), length as usize);
        Ok(reply.0.to_vec())
    }

    pub(crate) fn write(&mut self, fid: u32, offset: u64, data: &[u8]) -> Outcome<u32> {
        let reply = self.call(WRITE, &Body::new().u32(fid).u64(offset).data(data))?;
        Ok(Parsed(&reply).u32())
    }

    pub(crate) fn clunk(&mut self, fid: u32) -> Outcome<()> {
        self.call(CLUNK, &Body::new().u32(fid)).map(|_| ())
    }

    pub(crate) fn getattr(&mut self, fid: u32) -> Outcome<Attributes> {
        let reply = self.call(GETATTR, &Body::new().u32(fid).u64(0x3fff))?;
        assert_eq!(reply.len(), 153);
        let mut reply = Parsed(&reply);
        Ok(Attributes {
            valid: reply.u64(),
            qid: reply.qid(),
            mode: reply.u32(),
            uid: reply.u32(),
            gid: reply.u32(),
            links: reply.u64(),
            device: reply.u64(),
            size: reply.u64(),
            block: reply.u64(),
            blocks: reply.u64(),
            atime: (reply.u64(), reply.u64()),
            mtime: (reply.u64(), reply.u64()),
            ctime: (reply.u64(), reply.u64()),
            generation: {
                let _birth = (reply.u64(), reply.u64());
                reply.u64()
            },
        })
    }

    pub(crate) fn stat(&mut self, path: &str) -> Outcome<Attributes> {
        let fid = self.fid(path)?;
        let attributes = self.getattr(fid);
        self.clunk(fid).unwrap();
        attributes
    }

    pub(crate) fn setattr(&mut self, fid: u32, change: Change) -> Outcome<()> {
        let body = Body::new()
            .u32(fid)
            .u32(change.valid)
            .u32(change.mode)
            .u32(change.uid)
            .u32(change.gid)
            .u64(change.size)
            .u64(change.atime.0)
            .u64(change.atime.1)
            .u64(change.mtime.0)
            .u64(change.mtime.1);
        self.call(SETATTR, &body).map(|_| ())
    }

    /// One `Treaddir`.
    pub(crate) fn readdir(&mut self, fid: u32, offset: u64, count: u32) -> Outcome<Vec<Entry>> {
        let reply = self.call(READDIR, &Body::new().u32(fid).u64(offset).u32(count))?;
        let mut reply = Parsed(&reply);
        assert!(reply.u32() <= count);
        let mut entries = Vec::new();
        while !reply.0.is_empty() {
            entries.push(Entry {
                qid: reply.qid(),
                offset: reply.u64(),
                kind: reply.u8(),
                name: reply.string().to_vec(),
            });
        }
        Ok(entries)
    }

    /// All names in a directory but `.` and `..`, sorted.
    pub(crate) fn list(&mut self, path: &str) -> Outcome<Vec<String>> {
        let fid = self.open(path, O_RDONLY | O_DIRECTORY)?;
        let (mut names, mut offset) = (Vec::new(), 0);
        loop {
            let entries = self.readdir(fid, offset, 8192)?;
            let Some(last) = entries.last() else { break };
            offset = last.offset;
            names.extend(entries.into_iter().map(|entry| String::from_utf8(entry.name).unwrap()));
        }
        self.clunk(fid)?;
        names.retain(|name| name != "." && name != "..");
        names.sort();
        Ok(names)
    }

    /// Reads an extended attribute, or with an empty name the list of them.
    pub(crate) fn xattr(&mut self, path: &str, name: &str) -> Outcome<Vec<u8>> {
        let fid = self.fid(path)?;
        self.next_fid += 1;
        let new = self.next_fid;
        let walked = self.call(XATTRWALK, &Body::new().u32(fid).u32(new).string(name));
        self.clunk(fid)?;
        let size = Parsed(&walked?).u64();
        let value = self.read(new, 0, 1 << 17)?;
        assert_eq!(value.len() as u64, size);
        self.clunk(new)?;
        Ok(value)
    }

    /// Sets an extended attribute as Linux does it; an empty value with flags 2 removes it.
    pub(crate) fn set_xattr(&mut self, path: &str, name: &str, value: &[u8], flags: u32) -> Outcome<()> {
        let fid = self.fid(path)?;
        let body = Body::new().u32(fid).string(name).u64(value.len() as u64).u32(flags);
        if let Err(error) = self.call(XATTRCREATE, &body) {
            self.clunk(fid)?;
            return Err(error);
        }
        if !value.is_empty() {
            assert_eq!(self.write(fid, 0, value), Ok(value.len() as u32));
        }
        self.clunk(fid)
    }

    /// `Tlock`: its status.
    pub(crate) fn lock(&mut self, fid: u32, kind: u8, flags: u32, start: u64, length: u64) -> Outcome<u8> {
        let reply = self.call(LOCK, &lock_body(fid, kind, flags, start, length))?;
        Ok(reply[0])
    }

    /// Says goodbye, and how the server took it.
    pub(crate) fn close(mut self) -> Result<(), ShareError> {
        self.stream.shutdown(Shutdown::Both).unwrap();
        self.server.take().unwrap().join().expect("the server does not panic")
    }

    /// How the server ended by itself.
    pub(crate) fn ended(mut self) -> Result<(), ShareError> {
        self.server.take().unwrap().join().expect("the server does not panic")
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        let _ = self.stream.shutdown(Shutdown::Both);
        if let Some(server) = self.server.take() {
            let ended = server.join();
            assert!(ended.is_ok() || std::thread::panicking(), "the server panicked");
        }
    }
}

pub(crate) fn outcome(kind: u8, reply: Message) -> Outcome<Vec<u8>> {
    match reply.kind {
        7 => Err(Parsed(&reply.body).u32() as i32),
        answer => {
            assert_eq!(answer, kind + 1);
            Ok(reply.body)
        }
    }
}

pub(crate) fn lock_body(fid: u32, kind: u8, flags: u32, start: u64, length: u64) -> Body {
    Body::new().u32(fid).u8(kind).u32(flags).u64(start).u64(length).u32(1).string("guest")
}

/// What a `Tsetattr` changes.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Change {
    pub(crate) valid: u32,
    pub(crate) mode: u32,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) size: u64,
    pub(crate) atime: (u64, u64),
    pub(crate) mtime: (u64, u64),
}

impl Change {
    pub(crate) fn mode(mode: u32) -> Self {
        Self { valid: 1, mode, ..Self::default() }
    }

    pub(crate) fn owner(uid: u32, gid: u32) -> Self {
        Self { valid: 2 | 4, uid, gid, ..Self::default() }
    }

    pub(crate) fn size(size: u64) -> Self {
        Self { valid: 8, size, ..Self::default() }
    }
}
