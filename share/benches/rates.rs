//! How fast a share is over a socket pair, beside the socket pair itself: `cargo bench -p kiln-share`.
//!
//! Each figure is the median of several rounds. Requests in flight are what a guest with as many threads would have.
#![cfg(target_os = "linux")]
#![allow(clippy::print_stdout)]

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use kiln_share::{Options, Share};

const ROUNDS: usize = 5;
const DATA: usize = 256 << 20;
const CHUNK: usize = (1 << 20) - 4096;
const SMALL: u32 = 20_000;

fn main() {
    let host = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).expect("a directory");
    std::fs::write(host.path().join("file"), vec![7; DATA]).expect("a file");
    let share = Share::directory(host.path(), Options::default()).expect("a share");

    let (mut ours, mut theirs) = UnixStream::pair().expect("a socket pair");
    let raw = median(|| {
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let data = vec![7; CHUNK];
                (0..DATA / CHUNK).for_each(|_| theirs.write_all(&data).expect("written"));
            });
            let mut data = vec![0; CHUNK];
            (0..DATA / CHUNK).for_each(|_| ours.read_exact(&mut data).expect("read"));
        });
    });
    println!("socket pair                    {:7.0} MB/s", rate(raw));

    for (name, serve) in [("threads", serve_threads as Serve), ("async", serve_async)] {
        for in_flight in [1, 4, 16] {
            let mut client = Client::new(&share, serve);
            let reading = median(|| {
                client.pipeline(in_flight, DATA / CHUNK, |number, out| {
                    let offset = (number * CHUNK) as u64;
                    out.extend(23_u32.to_le_bytes());
                    out.extend([116, number as u8, (number >> 8) as u8, 1, 0, 0, 0]);
                    out.extend(offset.to_le_bytes());
                    out.extend((CHUNK as u32).to_le_bytes());
                });
            });
            let data = vec![8; CHUNK];
            let writing = median(|| {
                client.pipeline(in_flight, DATA / CHUNK, |number, out| {
                    let offset = (number * CHUNK) as u64;
                    out.extend((23 + CHUNK as u32).to_le_bytes());
                    out.extend([118, number as u8, (number >> 8) as u8, 1, 0, 0, 0]);
                    out.extend(offset.to_le_bytes());
                    out.extend((CHUNK as u32).to_le_bytes());
                    out.extend(&data);
                });
            });
            let small = median(|| {
                client.pipeline(in_flight, SMALL as usize, |number, out| {
                    out.extend(19_u32.to_le_bytes());
                    // A tag of its own each: one may be overtaken by many.
                    let [low, high, ..] = number.to_le_bytes();
                    out.extend([24, low, high, 0, 0, 0, 0, 0xff, 7, 0, 0, 0, 0, 0, 0]);
                });
            });
            println!(
                "{name:8} {in_flight:2} in flight: read {:5.0} MB/s ({:.2} of the pair)  write {:5.0} MB/s ({:.2})  getattr {:5.1} us",
                rate(reading),
                raw.as_secs_f64() / reading.as_secs_f64(),
                rate(writing),
                raw.as_secs_f64() / writing.as_secs_f64(),
                small.as_secs_f64() * 1e6 / f64::from(SMALL),
            );
        }
    }
}

type Serve = fn(&Share, UnixStream);

fn serve_threads(share: &Share, stream: UnixStream) {
    share.serve(stream.try_clone().expect("another handle"), stream).expect("served");
}

fn serve_async(share: &Share, stream: UnixStream) {
    stream.set_nonblocking(true).expect("a mode");
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(async {
        let (reader, writer) = tokio::net::UnixStream::from_std(stream).expect("a stream").into_split();
        share.serve_async(reader, writer).await.expect("served");
    });
}

fn median(mut once: impl FnMut()) -> Duration {
    let mut all: Vec<Duration> = (0..ROUNDS)
        .map(|_| {
            let begun = Instant::now();
            once();
            begun.elapsed()
        })
        .collect();
    all.sort_unstable();
    all[ROUNDS / 2]
}

fn rate(time: Duration) -> f64 {
    DATA as f64 / 1e6 / time.as_secs_f64()
}

/// A client whose fid 1 is the file, open.
struct Client {
    stream: UnixStream,
    reply: Vec<u8>,
}

impl Client {
    fn new(share: &Share, serve: Serve) -> Self {
        let (stream, theirs) = UnixStream::pair().expect("a socket pair");
        let share = share.clone();
        std::thread::spawn(move || serve(&share, theirs));
        let mut client = Self { stream, reply: vec![0; 1 << 20] };
        for greeting in [
            &b"\x15\0\0\0\x64\xff\xff\0\0\x10\0\x08\x009P2000.L"[..],
            b"\x17\0\0\0\x68\0\0\0\0\0\0\xff\xff\xff\xff\0\0\0\0\xff\xff\xff\xff",
            b"\x17\0\0\0\x6e\0\0\0\0\0\0\x01\0\0\0\x01\0\x04\0file",
            b"\x0f\0\0\0\x0c\0\0\x01\0\0\0\x02\0\0\0",
        ] {
            client.stream.write_all(greeting).expect("written");
            assert_eq!(client.receive(), greeting[4] + 1);
        }
        client
    }

    fn receive(&mut self) -> u8 {
        let mut size = [0; 4];
        self.stream.read_exact(&mut size).expect("a size");
        let length = u32::from_le_bytes(size) as usize - 4;
        self.stream.read_exact(&mut self.reply[..length]).expect("a reply");
        self.reply[0]
    }

    /// `count` requests, of which so many are in flight.
    fn pipeline(&mut self, in_flight: usize, count: usize, request: impl Fn(usize, &mut Vec<u8>) + Send) {
        let mut writing = self.stream.try_clone().expect("another handle");
        let (credit, credits) = std::sync::mpsc::sync_channel(in_flight);
        std::thread::scope(|scope| {
            if in_flight == 1 {
                let mut out = Vec::new();
                for number in 0..count {
                    out.clear();
                    request(number, &mut out);
                    writing.write_all(&out).expect("written");
                    assert_ne!(self.receive(), 7);
                }
                return;
            }
            scope.spawn(move || {
                let mut out = Vec::new();
                for number in 0..count {
                    out.clear();
                    request(number, &mut out);
                    credit.send(()).expect("a receiver");
                    writing.write_all(&out).expect("written");
                }
            });
            for _ in 0..count {
                assert_ne!(self.receive(), 7);
                let _ = credits.recv();
            }
        });
    }
}
