//! Both ways to serve, and several requests at once.

use std::collections::HashMap;
use std::fs;
use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;

use kiln_share::{Options, Share, ShareError};

use crate::client::*;

/// A share served by [`Share::serve_async`], and a client of it.
fn asynchronous(share: &Share, conversation: impl FnOnce(&mut UnixStream) + Send) -> Result<(), ShareError> {
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    theirs.set_nonblocking(true).unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    std::thread::scope(|scope| {
        let client = scope.spawn(move || {
            conversation(&mut ours);
        });
        let ended = runtime.block_on(async {
            let (reader, writer) = tokio::net::UnixStream::from_std(theirs).unwrap().into_split();
            share.serve_async(reader, writer).await
        });
        client.join().unwrap();
        ended
    })
}

fn frame(kind: u8, tag: u16, body: &Body) -> Vec<u8> {
    let mut frame = u32::try_from(body.0.len() + 7).unwrap().to_le_bytes().to_vec();
    frame.push(kind);
    frame.extend(tag.to_le_bytes());
    frame.extend(&body.0);
    frame
}

fn receive(stream: &mut UnixStream) -> Message {
    let mut header = [0; 7];
    stream.read_exact(&mut header).unwrap();
    let size = u32::from_le_bytes(header[..4].try_into().unwrap());
    let mut body = vec![0; size as usize - 7];
    stream.read_exact(&mut body).unwrap();
    Message { kind: header[4], tag: u16::from_le_bytes([header[5], header[6]]), body }
}

fn ask(stream: &mut UnixStream, kind: u8, tag: u16, body: &Body) {
    stream.write_all(&frame(kind, tag, body)).unwrap();
    let reply = receive(stream);
    assert_eq!((reply.kind, reply.tag), (kind + 1, tag));
}

/// Up to fid 1, which is the file.
fn greet(stream: &mut UnixStream) {
    ask(stream, VERSION, u16::MAX, &Body::new().u32(1 << 20).string("9P2000.L"));
    ask(stream, ATTACH, 0, &Body::new().u32(ROOT).u32(NONE).string("").string("").u32(NONE));
    ask(stream, WALK, 1, &Body::new().u32(ROOT).u32(1).u16(1).string("file"));
}

/// A client with 64 requests in flight gets each answered once and with its own data.
fn many_at_once(stream: &mut UnixStream, content: &[u8]) {
    greet(stream);
    ask(stream, LOPEN, 2, &Body::new().u32(1).u32(O_RDONLY));
    let mut writing = stream.try_clone().unwrap();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            for tag in 0..2000_u64 {
                let body = Body::new().u32(1).u64(tag * 97 % 5000).u32(1000 + tag as u32);
                writing.write_all(&frame(READ, tag as u16, &body)).unwrap();
            }
        });
        let mut seen = HashMap::new();
        for _ in 0..2000 {
            let reply = receive(stream);
            let tag = u64::from(reply.tag);
            let from = (tag * 97 % 5000) as usize;
            let expected = &content[from..content.len().min(from + 1000 + tag as usize)];
            assert_eq!(&reply.body[4..], expected, "{tag}");
            assert_eq!(seen.insert(tag, ()), None, "{tag} is answered once");
        }
    });
}

fn shared() -> (tempfile::TempDir, Share, Vec<u8>) {
    let host = tempfile::tempdir().unwrap();
    let content: Vec<u8> = (0..6000_u32).map(|number| (number * number % 253) as u8).collect();
    fs::write(host.path().join("file"), &content).unwrap();
    let share = Share::directory(host.path(), Options::default()).unwrap();
    (host, share, content)
}

#[test]
fn many_requests_at_once_are_answered_each_with_its_own() {
    let (_host, share, content) = shared();
    let mut client = Client::silent(&share);
    many_at_once(&mut client.stream, &content);
    client.close().unwrap();
    asynchronous(&share, |stream| many_at_once(stream, &content)).unwrap();
}

#[test]
fn an_asynchronous_stream_is_served_alike() {
    let (_host, share, _) = shared();
    // A version among other requests: what is before it is answered before it, and what is behind it after it.
    asynchronous(&share, |stream| {
        greet(stream);
        let getattr = |tag| frame(GETATTR, tag, &Body::new().u32(ROOT).u64(0));
        let version = frame(VERSION, u16::MAX, &Body::new().u32(1 << 16).string("9P2000.L"));
        stream.write_all(&[getattr(1), getattr(2), version, getattr(3)].concat()).unwrap();
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        let mut replies: Vec<(u8, u16)> =
            (0..4).map(|_| receive(stream)).map(|reply| (reply.kind, reply.tag)).collect();
        replies[..2].sort_unstable();
        assert_eq!(replies, [(GETATTR + 1, 1), (GETATTR + 1, 2), (VERSION + 1, u16::MAX), (7, 3)]);
    })
    .unwrap();
    for (bytes, expected) in [
        (&[6, 0, 0, 0][..], "6 bytes"),
        (&[0xff, 0xff, 0xff, 0xff], "4294967295 bytes"),
        (&[7, 0], "reading a request"),
    ] {
        let error = asynchronous(&share, |stream| {
            stream.write_all(bytes).unwrap();
            stream.shutdown(std::net::Shutdown::Write).unwrap();
            let mut rest = Vec::new();
            let _ = stream.read_to_end(&mut rest);
        });
        let message = error.unwrap_err().to_string();
        assert!(message.contains(expected), "{message}");
    }
}

#[test]
fn a_flush_is_answered_after_what_it_takes_back() {
    let (_host, share, _) = shared();
    let conversation = |stream: &mut UnixStream| {
        greet(stream);
        let mut writing = stream.try_clone().unwrap();
        std::thread::scope(|scope| {
            scope.spawn(move || {
                for round in 0..3000_u16 {
                    let [request, flush] = [round * 2, round * 2 + 1];
                    let both = [
                        frame(GETATTR, request, &Body::new().u32(1).u64(u64::MAX)),
                        frame(FLUSH, flush, &Body::new().u16(request)),
                    ];
                    writing.write_all(&both.concat()).unwrap();
                }
            });
            let mut flushed = vec![false; 6000];
            for _ in 0..6000 {
                let reply = receive(stream);
                if reply.kind == FLUSH + 1 {
                    flushed[usize::from(reply.tag) - 1] = true;
                } else {
                    assert_eq!(reply.kind, GETATTR + 1);
                    assert!(!flushed[usize::from(reply.tag)], "{} came after its flush", reply.tag);
                }
            }
        });
    };
    let mut client = Client::silent(&share);
    conversation(&mut client.stream);
    client.close().unwrap();
    asynchronous(&share, conversation).unwrap();
}

#[test]
fn a_share_is_served_again_and_to_several_at_once() {
    let (_host, share, content) = shared();
    for _ in 0..3 {
        let mut one = Client::new(&share);
        let mut two = Client::new(&share);
        let fids = [one.open("file", O_RDONLY).unwrap(), two.open("file", O_RDONLY).unwrap()];
        assert_eq!(one.read(fids[0], 0, 9000).unwrap(), content);
        one.close().unwrap();
        assert_eq!(two.read(fids[1], 0, 9000).unwrap(), content);
    }
}
