//! Ends that do not keep to the protocol: bounded memory, an error, never a hang.

use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use kiln_fixtures::CountingAllocator;
use kiln_link::frame::{self, Kind};
use kiln_link::message::{self, Hello};
use kiln_link::{GuestLink, HostLink, HostSession, LinkError, Session, VERSION, fuzzing, service};
use proptest::prelude::*;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream, duplex};

/// What an end may take on top of what is under way, whatever it hears: far below what is announced or sent here.
const MOST: usize = 24 << 20;

#[global_allocator]
static MEMORY: CountingAllocator = CountingAllocator::new();

/// Held by the test that measures: tests of one program share its memory.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Runs `work`, which must end, and gives the bytes that were allocated at once on top of those before.
fn measured<F: Future<Output = ()>>(work: F) -> usize {
    MEMORY.peak_of(|| run(work)).1
}

fn run<F: Future>(future: F) -> F::Output {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    runtime.block_on(async { tokio::time::timeout(Duration::from_secs(60), future).await.expect("it ends") })
}

fn hello() -> Hello {
    Hello { version: VERSION, kernel: "6.1.0".to_owned(), uptime: 700 }
}

fn data(payload: &[u8]) -> Vec<u8> {
    let mut bytes = vec![0; 8];
    bytes[..4].copy_from_slice(&(payload.len() as u32).to_le_bytes());
    bytes.extend_from_slice(payload);
    bytes
}

const DATA: u8 = 0;
const WINDOW: u8 = 1;
const PING: u8 = 2;
const SYN: u16 = 1;
const FIN: u16 = 4;
const RST: u16 = 8;

/// A header of yamux: version, type, flags, stream, length.
fn yamux(kind: u8, flags: u16, stream: u32, length: u32) -> Vec<u8> {
    let mut bytes = vec![0, kind];
    bytes.extend_from_slice(&flags.to_be_bytes());
    bytes.extend_from_slice(&stream.to_be_bytes());
    bytes.extend_from_slice(&length.to_be_bytes());
    bytes
}

/// A session with a guest that is not one of ours: its end of the wire.
async fn greeted() -> (HostSession, DuplexStream) {
    let (host, mut theirs) = duplex(1 << 16);
    frame::write(&mut theirs, Kind::Parked, &message::encode(&hello())).await.unwrap();
    let link = HostLink::greet(host).await.unwrap();
    frame::write(&mut theirs, Kind::Begun, &[]).await.unwrap();
    let session = link.begin().await.unwrap();
    assert_eq!(frame::read(&mut theirs).await.unwrap().unwrap().kind, Kind::Begin);
    (session, theirs)
}

/// A guest's link to a host that is not one of ours, which began a life: the host's end of the wire.
async fn begun() -> (GuestLink<DuplexStream>, Session, DuplexStream) {
    let (guest, mut theirs) = duplex(1 << 16);
    frame::write(&mut theirs, Kind::Begin, &VERSION.to_le_bytes()).await.unwrap();
    let mut link = GuestLink::new(guest, hello());
    let session = link.next_session().await.unwrap();
    for kind in [Kind::Parked, Kind::Begun] {
        assert_eq!(frame::read(&mut theirs).await.unwrap().unwrap().kind, kind);
    }
    (link, session, theirs)
}

/// Says `bytes`, `times` in a row, hears whatever comes, and stays: a session must end for what was said, not because nobody
/// is left.
fn say(wire: DuplexStream, bytes: Vec<u8>, times: usize) {
    tokio::spawn(async move {
        let (mut reader, mut writer) = tokio::io::split(wire);
        let speaking = async {
            for _ in 0..times {
                if writer.write_all(&bytes).await.is_err() {
                    return;
                }
            }
        };
        let listening = async {
            let _ = tokio::io::copy(&mut reader, &mut tokio::io::sink()).await;
        };
        tokio::join!(speaking, listening);
        std::future::pending::<()>().await;
    });
}

async fn ends(session: &mut Session, what: &str) {
    let ended =
        tokio::time::timeout(Duration::from_secs(30), async { while session.accept().await.is_some() {} });
    ended.await.unwrap_or_else(|_| panic!("{what}: the session goes on"));
    assert!(session.open(service::CONTROL).await.is_err(), "{what}");
}

#[test]
fn a_guest_that_lies_ends_its_session_and_nothing_else() {
    let _alone = alone();
    let table: [(&str, Vec<u8>); 7] = [
        ("a frame of four gigabytes", b"\xff\xff\xff\xff\0\0\0\0".to_vec()),
        ("no frame", b"GET / HTTP/1.1\r\n\r\n".to_vec()),
        ("parked without being asked", b"\0\0\0\0\x02\0\0\0".to_vec()),
        ("a host's own word", b"\0\0\0\0\x01\0\0\0".to_vec()),
        ("four gigabytes in the multiplexer", data(&yamux(DATA, SYN, 2, u32::MAX))),
        ("a stream of the host's own numbers", data(&yamux(WINDOW, SYN, 3, 0))),
        ("garbage in the multiplexer", data(&[0x5a; 4096])),
    ];
    for (what, bytes) in table {
        let peak = measured(async {
            let (mut session, wire) = greeted().await;
            say(wire, bytes, 1);
            ends(&mut session.session, what).await;
        });
        assert!(peak < MOST, "{what}: {peak} bytes");
    }
}

#[test]
fn a_host_that_lies_ends_the_link_of_its_guest() {
    let _alone = alone();
    let table: [(&str, Vec<u8>); 6] = [
        ("a frame of four gigabytes", b"\xff\xff\xff\xff\0\0\0\0".to_vec()),
        ("no frame", b"GET / HTTP/1.1\r\n\r\n".to_vec()),
        ("a guest's own word", b"\0\0\0\0\x02\0\0\0".to_vec()),
        ("begins where nobody is parked", b"\x04\0\0\0\x04\0\0\0\x01\0\0\0".to_vec()),
        ("goes on where nobody is parked", b"\0\0\0\0\x03\0\0\0".to_vec()),
        ("parks what is parked", b"\0\0\0\0\x01\0\0\0\0\0\0\0\x01\0\0\0".to_vec()),
    ];
    for (what, bytes) in table {
        run(async {
            let (mut link, _session, wire) = begun().await;
            say(wire, bytes, 1);
            let next = tokio::time::timeout(Duration::from_secs(30), link.next_session()).await;
            let error = next.unwrap_or_else(|_| panic!("{what}: the link goes on"));
            assert!(error.is_err(), "{what}");
            assert!(matches!(link.next_session().await, Err(LinkError::Closed)), "{what}: for good");
        });
    }
}

#[test]
fn a_hundred_thousand_streams_are_refused_beyond_a_few() {
    let _alone = alone();
    let opened: Vec<u8> = (1..=100_000_u32).flat_map(|n| data(&yamux(WINDOW, SYN, 2 * n, 0))).collect();
    let peak = measured(async {
        let (mut session, wire) = greeted().await;
        let mut inbound = session.session.take_inbound();
        say(wire, [opened.clone(), b"\xff\xff\xff\xff\0\0\0\0".to_vec()].concat(), 1);
        // None names its service; a few wait for that, and all others are refused, until the guest goes too far.
        assert!(inbound.accept().await.is_none());
        assert!(session.open(service::CONTROL).await.is_err());
    });
    assert!(peak < MOST, "{peak} bytes");
    // Each is closed as soon as it is there: never many at once, and none is ever served.
    let flickering = |n| [data(&yamux(WINDOW, SYN, 2 * n, 0)), data(&yamux(WINDOW, RST, 2 * n, 0))].concat();
    let flickering: Vec<u8> = (1..=100_000_u32).flat_map(flickering).collect();
    let peak = measured(async {
        let (mut session, wire) = greeted().await;
        let mut served = session.session.take_inbound();
        say(wire, [flickering.clone(), b"\xff\xff\xff\xff\0\0\0\0".to_vec()].concat(), 1);
        let ended = tokio::time::timeout(Duration::from_secs(50), async { served.accept().await });
        assert!(ended.await.expect("it ends").is_none());
    });
    assert!(peak < MOST, "{peak} bytes");
}

/// A gigabyte on a stream that the host opened and does not read.
#[test]
fn a_flooded_stream_ends_the_session_that_it_is_in() {
    let _alone = alone();
    let peak = measured(async {
        let (mut session, wire) = greeted().await;
        let mut stream = session.open(service::CONTROL).await.unwrap();
        let mut flood = yamux(DATA, 0, 1, 32 << 10);
        flood.resize(flood.len() + (32 << 10), 7);
        say(wire, data(&flood), 1 << 15);
        ends(&mut session.session, "a flood").await;
        let mut left = Vec::new();
        let read = (&mut stream).take(64 << 20).read_to_end(&mut left).await;
        assert!(left.len() <= 512 << 10, "{} bytes were kept ({read:?})", left.len());
    });
    assert!(peak < MOST, "{peak} bytes");
}

#[test]
fn pings_and_windows_without_number_take_no_memory() {
    let _alone = alone();
    for (what, frame, times) in [
        ("pings", yamux(PING, SYN, 0, 7), 300_000),
        ("windows", yamux(WINDOW, 0, 1, u32::MAX), 300_000),
        ("empty frames", Vec::new(), 300_000),
    ] {
        let peak = measured(async {
            let (mut session, wire) = greeted().await;
            let _stream = session.open(service::CONTROL).await.unwrap();
            let (_reader, mut writer) = tokio::io::split(wire);
            // Nothing of what the host answers is read: it may stop to listen, or end the session.
            let bytes = data(&frame).repeat(256);
            let speaking = async {
                for _ in 0..times / 256 {
                    if writer.write_all(&bytes).await.is_err() {
                        return;
                    }
                }
            };
            let _ = tokio::time::timeout(Duration::from_secs(5), speaking).await;
            drop(writer);
            drop(_reader);
            ends(&mut session.session, what).await;
        });
        assert!(peak < MOST, "{what}: {peak} bytes");
    }
}

#[test]
fn a_guest_that_does_not_hold_still_is_not_waited_for() {
    let _alone = alone();
    let peak = measured(async {
        let (session, wire) = greeted().await;
        let parker = session.parker();
        let (_reader, mut writer) = tokio::io::split(wire);
        let pings = data(&yamux(PING, SYN, 0, 7)).repeat(4096);
        let flood = tokio::spawn(async move { while writer.write_all(&pings).await.is_ok() {} });
        // Its answers to pings go nowhere, so the host can say nothing; that it can park nobody, it says in time.
        tokio::time::sleep(Duration::from_millis(300)).await;
        let begun = Instant::now();
        let error = parker.park(Duration::from_secs(2)).await.unwrap_err();
        assert!(matches!(error, LinkError::TimedOut { what: "park", .. }), "{error}");
        assert!(begun.elapsed() < Duration::from_secs(10));
        flood.abort();
    });
    assert!(peak < MOST, "{peak} bytes");
}

#[test]
fn what_is_kept_before_parking_has_a_bound() {
    let _alone = alone();
    let peak = measured(async {
        let (mut session, wire) = greeted().await;
        let parker = session.parker();
        let parking = tokio::spawn(async move { parker.park(Duration::from_secs(40)).await.map(drop) });
        let mut wire = wire;
        while frame::read(&mut wire).await.unwrap().unwrap().kind != Kind::Park {}
        // The answers to pings are not read any more, and after the first of them nothing is taken from what is kept.
        let (_reader, mut writer) = tokio::io::split(wire);
        let pings = data(&yamux(PING, SYN, 0, 7).repeat(4096));
        let flood = tokio::spawn(async move { while writer.write_all(&pings).await.is_ok() {} });
        let error = parking.await.unwrap().unwrap_err();
        assert!(matches!(error, LinkError::Closed), "{error}");
        flood.abort();
        ends(&mut session.session, "a flood before parking").await;
    });
    assert!(peak > MOST, "{peak} bytes: nothing was kept, and nothing shown");
    assert!(peak < 96 << 20, "{peak} bytes");
}

#[test]
fn a_half_that_is_closed_is_an_end_and_not_a_wait() {
    let _alone = alone();
    // The guest closes its half of a stream: the host reads the end and may still write.
    run(async {
        let (session, mut wire) = greeted().await;
        let mut stream = session.open(service::CONTROL).await.unwrap();
        wire.write_all(&data(&yamux(DATA, FIN, 1, 0))).await.unwrap();
        assert_eq!(stream.read(&mut [0; 8]).await.unwrap(), 0);
        stream.write_all(b"still here").await.unwrap();
        stream.flush().await.unwrap();
        let mut heard = Vec::new();
        while !heard.ends_with(b"still here") {
            let frame = frame::read(&mut wire).await.unwrap().unwrap();
            heard.extend(frame.payload);
        }
    });
    // It closes its half of the wire: the session ends, although it goes on listening.
    run(async {
        let (mut session, wire) = greeted().await;
        let (_reader, mut writer) = tokio::io::split(wire);
        writer.shutdown().await.unwrap();
        ends(&mut session.session, "half a wire").await;
    });
    // In the middle of a frame, and of a message.
    run(async {
        let (mut session, wire) = greeted().await;
        let (_reader, mut writer) = tokio::io::split(wire);
        writer.write_all(b"\x40\0\0\0\0\0\0\0abc").await.unwrap();
        writer.shutdown().await.unwrap();
        ends(&mut session.session, "half a frame").await;
    });
    run(async {
        let (session, wire) = greeted().await;
        let mut stream = session.open(service::CONTROL).await.unwrap();
        let half = [yamux(DATA, FIN, 1, 6), b"\xff\0\0\0ab".to_vec()].concat();
        say(wire, data(&half), 1);
        let error = message::receive::<_, Hello>(&mut stream).await.unwrap_err();
        assert!(matches!(error, LinkError::Closed), "{error}");
    });
}

#[test]
fn messages_are_bounded_before_they_are_read() {
    let _alone = alone();
    let peak = measured(async {
        let mut long = &b"\xff\xff\xff\xff"[..];
        let error = message::receive::<_, Hello>(&mut long).await.unwrap_err();
        assert!(matches!(error, LinkError::TooLong { length: 4_294_967_295, .. }), "{error}");
        let mut cut = &b"\x05\0\0\0ab"[..];
        assert!(matches!(message::receive::<_, Hello>(&mut cut).await.unwrap_err(), LinkError::Closed));
        // As long as a message may be, and not there.
        let mut cut = &b"\0\0\x40\0ab"[..];
        assert!(matches!(message::receive::<_, Hello>(&mut cut).await.unwrap_err(), LinkError::Closed));
        let mut none = &b""[..];
        assert_eq!(message::receive::<_, Hello>(&mut none).await.unwrap(), None);
        let mut chunk = &b"\x01\0\x01\0"[..];
        assert!(matches!(message::receive_chunk(&mut chunk).await.unwrap_err(), LinkError::TooLong { .. }));
        // An array that claims 2^32 elements; a message with something behind it.
        for bytes in [&b"\x9a\xff\xff\xff\xff\x01"[..], b"\x83\x01\x60\x00\x00"] {
            assert!(matches!(message::decode::<Hello>(bytes).unwrap_err(), LinkError::Message(_)));
        }
    });
    assert!(peak < 1 << 20, "{peak} bytes");
}

/// Headers that make sense more often than random bytes do, with random bodies.
fn speech() -> impl Strategy<Value = Vec<u8>> {
    let header = (0..4_u8, prop::sample::select(vec![0_u16, 1, 2, 4, 8, 5, 9]), 0..8_u32, any::<u16>());
    let piece = (header, prop::collection::vec(any::<u8>(), 0..40), any::<bool>());
    prop::collection::vec(piece, 0..40).prop_map(|pieces| {
        let mut bytes = vec![1];
        for ((kind, flags, stream, length), body, honest) in pieces {
            let length = if honest { body.len() as u32 } else { u32::from(length) << 4 };
            let said = [yamux(kind, flags, stream, length), body].concat();
            bytes.extend((said.len() as u16).to_le_bytes());
            bytes.extend(said);
        }
        bytes
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn whatever_a_guest_says_the_host_ends_with_it(
        bytes in prop_oneof![prop::collection::vec(any::<u8>(), 0..400), speech()],
    ) {
        let _alone = alone();
        prop_assert!(fuzzing::host(&bytes).is_ok());
    }

    #[test]
    fn whatever_a_host_says_the_guest_ends_with_it(
        bytes in prop_oneof![prop::collection::vec(any::<u8>(), 0..400), speech()],
    ) {
        let _alone = alone();
        prop_assert!(fuzzing::guest(&bytes)? >= 1);
    }

    #[test]
    fn whatever_comes_as_a_message_is_one_or_an_error(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let _alone = alone();
        fuzzing::messages(&bytes);
    }
}

#[test]
fn the_fuzzers_corpus_is_heard() {
    let _alone = alone();
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus");
    let read = |target: &str, name: &str| std::fs::read(corpus.join(target).join(name)).unwrap();
    // (target, sample, what is made of it)
    assert_eq!(fuzzing::host(&read("host", "streams")).unwrap(), 1);
    assert_eq!(fuzzing::host(&read("host", "frames")).unwrap(), 0, "parked without being asked");
    fuzzing::host(&read("host", "reset")).unwrap();
    assert_eq!(fuzzing::guest(&read("guest", "streams")).unwrap(), 1);
    assert_eq!(fuzzing::guest(&read("guest", "lives")).unwrap(), 3);
    assert_eq!(fuzzing::guest(&read("guest", "twice")).unwrap(), 1);
    for name in ["hello", "start", "stdout"] {
        assert!(fuzzing::messages(&read("messages", name)) >= 1, "{name}");
    }
    // No byte changed in any of them makes an end panic or hang.
    for target in ["host", "guest", "messages"] {
        for sample in std::fs::read_dir(corpus.join(target)).unwrap() {
            let sound = std::fs::read(sample.unwrap().path()).unwrap();
            for at in 0..sound.len() {
                let mut bytes = sound.clone();
                bytes[at] ^= 1 << (at % 8);
                match target {
                    "host" => drop(fuzzing::host(&bytes).unwrap()),
                    "guest" => drop(fuzzing::guest(&bytes).unwrap()),
                    _ => drop(fuzzing::messages(&bytes)),
                }
            }
        }
    }
}
