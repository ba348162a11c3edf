//! Links between two ends of a pipe: lives that begin, park, go on and begin anew; ends that do not keep to the protocol.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use kiln_link::frame::{self, Kind};
use kiln_link::message::{self, Hello};
use kiln_link::{GuestLink, Hold, HostLink, LinkError, Session, VERSION, service};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream, duplex};
use tokio::task::JoinHandle;

const PATIENCE: Duration = Duration::from_secs(20);

fn run<F: Future>(future: F) -> F::Output {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    runtime.block_on(async { tokio::time::timeout(Duration::from_secs(60), future).await.expect("it ends") })
}

fn hello() -> Hello {
    Hello { version: VERSION, kernel: "6.1.0".to_owned(), uptime: 700 }
}

/// Sends back what each stream brings, and says first which life it is.
async fn echo(mut session: Session, life: u32) {
    while let Some((_, mut stream)) = session.accept().await {
        tokio::spawn(async move {
            let _ = stream.write_u32(life).await;
            let (mut reader, mut writer) = tokio::io::split(stream);
            let _ = tokio::io::copy(&mut reader, &mut writer).await;
            let _ = writer.shutdown().await;
        });
    }
}

/// A guest that lives one life after the other.
fn guest(stream: DuplexStream) -> JoinHandle<LinkError> {
    guest_that_holds(stream, Arc::new(()))
}

fn guest_that_holds<H: Hold>(stream: DuplexStream, hold: Arc<H>) -> JoinHandle<LinkError> {
    tokio::spawn(async move {
        let mut link = GuestLink::holding(stream, hello(), hold);
        for life in 1.. {
            match link.next_session().await {
                Ok(session) => drop(tokio::spawn(echo(session, life))),
                Err(error) => return error,
            }
        }
        unreachable!()
    })
}

async fn exchange(session: &Session, bytes: usize) -> u32 {
    let mut stream = session.open(service::CONTROL).await.unwrap();
    let life = stream.read_u32().await.unwrap();
    let (mut reader, mut writer) = tokio::io::split(stream);
    let sent: Vec<u8> = (0..bytes).map(|n| (n % 251) as u8).collect();
    let expected = sent.clone();
    let writing = tokio::spawn(async move {
        writer.write_all(&sent).await.unwrap();
        writer.shutdown().await.unwrap();
    });
    let mut back = Vec::new();
    reader.read_to_end(&mut back).await.unwrap();
    writing.await.unwrap();
    assert!(back == expected, "{} of {bytes} bytes came back", back.len());
    life
}

#[test]
fn a_guest_says_hello_and_streams_carry_bulk_side_by_side() {
    run(async {
        let (host, theirs) = duplex(1 << 16);
        let _guest = guest(theirs);
        let link = HostLink::greet(host).await.unwrap();
        assert_eq!(link.hello(), Some(&hello()));
        let session = Arc::new(link.begin().await.unwrap());
        let all: Vec<_> = (0..20)
            .map(|n| {
                let session = Arc::clone(&session);
                tokio::spawn(async move { exchange(&session, n * 300_000).await })
            })
            .collect();
        for one in all {
            assert_eq!(one.await.unwrap(), 1);
        }
    });
}

/// Counts what it was asked to do.
#[derive(Default)]
struct Counting {
    held: AtomicU32,
    released: AtomicU32,
}

impl Hold for Counting {
    async fn hold(&self) {
        self.held.fetch_add(1, Ordering::SeqCst);
    }

    async fn release(&self) {
        self.released.fetch_add(1, Ordering::SeqCst);
    }
}

#[test]
fn parking_in_the_middle_of_bulk_loses_nothing() {
    run(async {
        let (host, theirs) = duplex(1 << 14);
        let hold = Arc::new(Counting::default());
        let _guest = guest_that_holds(theirs, Arc::clone(&hold));
        let session = Arc::new(HostLink::greet(host).await.unwrap().begin().await.unwrap());
        let bulk: Vec<_> = (0..4)
            .map(|_| {
                let session = Arc::clone(&session);
                tokio::spawn(async move { exchange(&session, 8 << 20).await })
            })
            .collect();
        let parker = session.parker();
        let mut times = 0;
        while !bulk.iter().all(JoinHandle::is_finished) {
            let parked = parker.park(PATIENCE).await.unwrap();
            times += 1;
            assert_eq!(hold.held.load(Ordering::SeqCst), times);
            assert_eq!(hold.released.load(Ordering::SeqCst), times - 1, "not before it is told to go on");
            tokio::time::sleep(Duration::from_millis(1)).await;
            parked.resume().await.unwrap();
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        assert!(times > 2, "parked only {times} times");
        for one in bulk {
            assert_eq!(one.await.unwrap(), 1);
        }
    });
}

/// What a hypervisor does with the guest's end: whatever host was there, another one is now.
#[test]
fn a_parked_guest_begins_a_new_life_with_another_host() {
    run(async {
        let (first, theirs) = duplex(1 << 16);
        let (near, far) = duplex(1 << 16);
        let _guest = guest(far);
        let (lives, next) = tokio::sync::mpsc::channel::<DuplexStream>(1);
        tokio::spawn(device(near, next));
        lives.send(theirs).await.unwrap();
        let session = HostLink::greet(first).await.unwrap().begin().await.unwrap();
        let mut lost = session.open(service::TCP).await.unwrap();
        assert_eq!(lost.read_u32().await.unwrap(), 1);
        let parked = session.parker().park(PATIENCE).await.unwrap();
        drop(parked);
        drop(session);
        assert!(lost.read_u8().await.is_err(), "a stream of a life that has ended is no more");

        let (second, theirs) = duplex(1 << 16);
        lives.send(theirs).await.unwrap();
        let session = HostLink::restored(second).begin().await.unwrap();
        assert_eq!(exchange(&session, 100_000).await, 2);
    });
}

/// The wire between a guest and its hosts, one after the other; a host that goes is nothing that the guest sees.
async fn device(mut guest: DuplexStream, mut hosts: tokio::sync::mpsc::Receiver<DuplexStream>) {
    while let Some(mut host) = hosts.recv().await {
        let (mut down, mut up) = ([0; 4096], [0; 4096]);
        loop {
            tokio::select! {
                count = host.read(&mut down) => match count {
                    Ok(count @ 1..) => guest.write_all(&down[..count]).await.unwrap(),
                    _ => break,
                },
                count = guest.read(&mut up) => host.write_all(&up[..count.unwrap()]).await.unwrap(),
            }
        }
    }
}

#[test]
fn a_guest_that_does_not_park_is_told_to_go_on_and_a_late_answer_is_nobody_elses() {
    run(async {
        let (host, mut theirs) = duplex(1 << 16);
        let link = tokio::spawn(HostLink::greet(host));
        frame::write(&mut theirs, Kind::Parked, &message::encode(&hello())).await.unwrap();
        let beginning = tokio::spawn(link.await.unwrap().unwrap().begin());
        assert_eq!(frame::read(&mut theirs).await.unwrap().unwrap().kind, Kind::Begin);
        frame::write(&mut theirs, Kind::Begun, &[]).await.unwrap();
        let session = beginning.await.unwrap().unwrap();
        let parker = session.parker();
        let error = parker.park(Duration::from_millis(50)).await.unwrap_err();
        assert!(matches!(error, LinkError::TimedOut { what: "park", .. }), "{error}");
        let second = tokio::spawn(async move { parker.park(PATIENCE).await.map(drop) });
        let mut kinds = Vec::new();
        while kinds.len() < 3 {
            let frame = frame::read(&mut theirs).await.unwrap().unwrap();
            if frame.kind != Kind::Data {
                kinds.push(frame.kind);
            }
        }
        assert_eq!(kinds, [Kind::Park, Kind::Continue, Kind::Park]);
        frame::write(&mut theirs, Kind::Parked, &message::encode(&hello())).await.unwrap();
        tokio::time::sleep(Duration::from_millis(50)).await;
        assert!(!second.is_finished(), "the first answer is to the first question");
        frame::write(&mut theirs, Kind::Parked, &message::encode(&hello())).await.unwrap();
        second.await.unwrap().unwrap();
    });
}

#[test]
fn another_version_is_refused_with_both_named() {
    run(async {
        let (host, mut theirs) = duplex(1 << 16);
        let link = tokio::spawn(async move { HostLink::restored(host).begin().await });
        assert_eq!(frame::read(&mut theirs).await.unwrap().unwrap().payload, VERSION.to_le_bytes());
        let other = Hello { version: 99, ..hello() };
        frame::write(&mut theirs, Kind::Parked, &message::encode(&other)).await.unwrap();
        let error = link.await.unwrap().unwrap_err();
        assert!(matches!(error, LinkError::Version { ours: VERSION, theirs: 99 }), "{error}");
        // And a guest stays parked, and can still be begun by one that speaks its version.
        let (mut host, theirs) = duplex(1 << 16);
        let _guest = guest(theirs);
        assert_eq!(frame::read(&mut host).await.unwrap().unwrap().kind, Kind::Parked);
        frame::write(&mut host, Kind::Begin, &99_u32.to_le_bytes()).await.unwrap();
        assert_eq!(frame::read(&mut host).await.unwrap().unwrap().kind, Kind::Parked);
        let session = HostLink::restored(host).begin().await.unwrap();
        assert_eq!(exchange(&session, 10).await, 1);
    });
}

#[test]
fn the_form_of_messages_is_frozen() {
    let start = message::Input::Start {
        number: message::WORKLOAD,
        process: Box::new(message::Process { args: vec!["a".to_owned()], ..Default::default() }),
    };
    assert_eq!(message::encode(&hello()), b"\x83\x01\x656.1.0\x19\x02\xbc");
    assert_eq!(message::encode(&message::Output::Stdout(b"x".to_vec())), b"\x82\x02\x81\x41x");
    assert_eq!(message::encode(&start), b"\x82\x00\x82\x01\x8a\x81\x61a\x80\x60\x60\x80\xf6\xf4\xf6\x80\xf4",);
    assert_eq!(message::decode::<message::Input>(&message::encode(&start)).unwrap(), start);
}
