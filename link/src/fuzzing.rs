//! What fuzzers and robustness tests run: each end of a link, hearing any bytes.
//!
//! The bytes are what the other end says once a life has begun. The lowest bit of the first says how the rest is taken: as it
//! is, or as pieces, each behind its length in two bytes (little-endian), that are put into right frames for the multiplexer,
//! which would else hardly ever be reached.

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream, duplex};

use crate::frame::{HEADER, Kind, MAX_DATA};
use crate::message::{self, Answer, Configure, Hello, Input, Output, Request};
use crate::{GuestLink, HostLink, Inbound, LinkError, VERSION, service};

/// Bytes that may be under way.
const PIPE: usize = 64 << 10;
/// Streams of a guest that are read at one time.
const READ_AT_ONCE: usize = 16;

/// The host's end hears `bytes` from a guest that was greeted. Returns how many streams the guest opened; whatever comes, the
/// session must end when the bytes do, without a panic.
///
/// # Errors
/// A host that does not get as far as a session, or a runtime that cannot be made.
pub fn host(bytes: &[u8]) -> Result<usize, LinkError> {
    let said =
        [framed(Kind::Parked, &message::encode(&Hello::default())), framed(Kind::Begun, &[]), words(bytes)];
    run(async {
        let (ours, theirs) = duplex(PIPE);
        let peer = tokio::spawn(speak(theirs, said.concat()));
        let mut session = HostLink::greet(ours).await?.begin().await?;
        let inbound = session.session.take_inbound();
        let opener = session.opener();
        let asking = tokio::spawn(async move {
            let mut stream = opener.open(service::CONTROL).await?;
            message::send(&mut stream, &Request::Stats).await?;
            message::receive::<_, Answer>(&mut stream).await
        });
        let accepted = read_all(inbound).await;
        let _ = asking.await;
        drop(session);
        peer.abort();
        Ok(accepted)
    })
}

/// The guest's end hears `bytes` from a host that began a life. Returns how many lives there were; whatever comes, the link
/// must end when the bytes do, without a panic.
///
/// # Errors
/// A runtime that cannot be made.
pub fn guest(bytes: &[u8]) -> Result<usize, LinkError> {
    let said = [framed(Kind::Begin, &VERSION.to_le_bytes()), words(bytes)].concat();
    run(async {
        let (ours, theirs) = duplex(PIPE);
        let peer = tokio::spawn(speak(theirs, said));
        let mut link = GuestLink::new(ours, Hello::default());
        let mut lives = 0;
        while let Ok(mut session) = link.next_session().await {
            lives += 1;
            tokio::spawn(async move { read_all(session.take_inbound()).await });
        }
        peer.abort();
        Ok(lives)
    })
}

/// Every kind of message is read from `bytes`. Returns how many kinds they are a message of; each that they are is written
/// and read again, and must be the same.
pub fn messages(bytes: &[u8]) -> usize {
    macro_rules! count {
        ($($kind:ty),*) => { 0 $(+ usize::from(message::decode::<$kind>(bytes).is_ok_and(|message| {
            let again = message::decode::<$kind>(&message::encode(&message));
            assert_eq!(again.ok(), Some(message));
            true
        })))* };
    }
    count!(Hello, Configure, Request, Answer, Input, Output)
}

fn run<T>(work: impl Future<Output = Result<T, LinkError>>) -> Result<T, LinkError> {
    tokio::runtime::Builder::new_current_thread().enable_time().build()?.block_on(work)
}

/// Says everything, and that nothing follows; hears whatever comes.
async fn speak(stream: DuplexStream, said: Vec<u8>) {
    let (mut reader, mut writer) = tokio::io::split(stream);
    let speaking = async {
        let _ = writer.write_all(&said).await;
        let _ = writer.shutdown().await;
    };
    let mut nowhere = tokio::io::sink();
    let _ = tokio::join!(speaking, tokio::io::copy(&mut reader, &mut nowhere));
}

/// Reads all streams to their ends.
async fn read_all(mut inbound: Inbound) -> usize {
    let mut accepted = 0;
    let mut reading = tokio::task::JoinSet::new();
    while let Some((_, mut stream)) = inbound.accept().await {
        accepted += 1;
        reading.spawn(async move {
            let mut buffer = vec![0; 4096];
            while let Ok(1..) = stream.read(&mut buffer).await {}
        });
        if reading.len() >= READ_AT_ONCE {
            let _ = reading.join_next().await;
        }
    }
    accepted
}

fn words(bytes: &[u8]) -> Vec<u8> {
    let Some((first, mut rest)) = bytes.split_first() else { return Vec::new() };
    if first & 1 == 0 {
        return rest.to_vec();
    }
    let mut said = Vec::new();
    while let [low, high, behind @ ..] = rest {
        let length = usize::from(u16::from_le_bytes([*low, *high])).min(behind.len());
        let (piece, next) = behind.split_at(length);
        said.extend(framed(Kind::Data, piece));
        rest = next;
    }
    said
}

/// A frame; `payload` is at most [`MAX_DATA`] long.
fn framed(kind: Kind, payload: &[u8]) -> Vec<u8> {
    let payload = &payload[..payload.len().min(MAX_DATA)];
    let mut frame = vec![0; HEADER];
    frame[..4].copy_from_slice(&(payload.len() as u32).to_le_bytes());
    frame[4] = kind as u8;
    frame.extend_from_slice(payload);
    frame
}
