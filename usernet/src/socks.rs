//! SOCKS version 5 (RFC 1928): `CONNECT` without authentication, and nothing else.
//!
//! The client sends its greeting and its request at once, without waiting for the answer to the first: the server
//! reads one after the other, and a round trip is saved for each connection.
//!
//! ```text
//!  client   05 01 00   05 01 00 ATYP address port
//!  server   05 00      05 REP 00 01 00000000 0000      (the bound address is nobody's concern: zeros)
//! ```

use std::io;
use std::time::Duration;

use thiserror::Error;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use crate::{Target, WireError};

const VERSION: u8 = 5;
const NO_AUTHENTICATION: u8 = 0;
const NO_METHOD: u8 = 0xff;
const CONNECT: u8 = 1;
/// For a client to take the news that it was refused.
const LINGER: Duration = Duration::from_secs(1);

/// How a `CONNECT` ended (RFC 1928 §6).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Reply {
    /// The connection is made; all further bytes are its own.
    Succeeded = 0,
    /// Something went wrong at the server.
    Failed = 1,
    /// The policy does not allow it.
    NotAllowed = 2,
    /// There is no route.
    NetworkUnreachable = 3,
    /// The host does not answer.
    HostUnreachable = 4,
    /// The host does not listen at this port.
    Refused = 5,
    /// The host did not answer in time.
    TimedOut = 6,
    /// Another command than `CONNECT`.
    CommandNotSupported = 7,
    /// An unknown kind of address.
    AddressNotSupported = 8,
}

impl Reply {
    fn from_code(code: u8) -> Result<Self, WireError> {
        Ok(match code {
            0 => Self::Succeeded,
            1 => Self::Failed,
            2 => Self::NotAllowed,
            3 => Self::NetworkUnreachable,
            4 => Self::HostUnreachable,
            5 => Self::Refused,
            6 => Self::TimedOut,
            7 => Self::CommandNotSupported,
            8 => Self::AddressNotSupported,
            other => return Err(WireError::Reply(other)),
        })
    }
}

/// What `connect(2)` said, as the client is told.
impl From<&io::Error> for Reply {
    fn from(error: &io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::ConnectionRefused | io::ErrorKind::ConnectionReset => Self::Refused,
            // No source address of the family: a host without IPv6.
            io::ErrorKind::NetworkUnreachable | io::ErrorKind::AddrNotAvailable => Self::NetworkUnreachable,
            io::ErrorKind::HostUnreachable => Self::HostUnreachable,
            io::ErrorKind::TimedOut => Self::TimedOut,
            io::ErrorKind::PermissionDenied => Self::NotAllowed,
            _ => Self::Failed,
        }
    }
}

/// Why a connection was not made.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum SocksError {
    /// The server said so.
    #[error("the connection to {target} was not made: {reply:?}")]
    Reply {
        /// Where to.
        target: Target,
        /// Why not.
        reply: Reply,
    },
    /// The other end does not speak the protocol.
    #[error(transparent)]
    Wire(#[from] WireError),
    /// The stream failed.
    #[error("the stream to the proxy failed: {0}")]
    Stream(#[from] io::Error),
}

impl SocksError {
    /// What the server said, if it said something.
    pub fn reply(&self) -> Option<Reply> {
        match self {
            Self::Reply { reply, .. } => Some(*reply),
            _ => None,
        }
    }
}

/// Asks the server at the other end of `stream` to connect to `target`, and waits until it has.
///
/// # Errors
/// [`SocksError::Reply`] where the server could not or would not.
pub async fn connect<S>(stream: &mut S, target: &Target) -> Result<(), SocksError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let mut request = vec![VERSION, 1, NO_AUTHENTICATION, VERSION, CONNECT, 0];
    target.encode(&mut request);
    let sent = async {
        stream.write_all(&request).await?;
        stream.flush().await
    };
    let sent = sent.await;

    let mut method = [0; 2];
    if let Err(error) = stream.read_exact(&mut method).await {
        // A server that refuses everything may not have listened; if it said nothing either, that is the reason.
        return Err(sent.err().unwrap_or(error).into());
    }
    match method {
        [VERSION, NO_AUTHENTICATION] => {}
        [VERSION, _] => return Err(WireError::Authentication.into()),
        [version, _] => return Err(WireError::Version(version).into()),
    }
    // Version, reply, reserved, kind of the bound address, and what follows that.
    let mut head = [0; 5];
    stream.read_exact(&mut head).await?;
    if head[0] != VERSION {
        return Err(WireError::Version(head[0]).into());
    }
    let mut bound = [0; 257];
    stream.read_exact(&mut bound[..Target::rest(head[3], head[4])?]).await?;
    match Reply::from_code(head[1])? {
        Reply::Succeeded => Ok(()),
        reply => Err(SocksError::Reply { target: target.clone(), reply }),
    }
}

/// Takes a client's request. It must be [`answer`]ed. Reads no byte beyond it.
///
/// A request that makes no sense has been answered already. There is no time-out in here: the caller has one.
///
/// # Errors
/// [`SocksError::Wire`] where it makes no sense.
pub async fn accept<S>(stream: &mut S) -> Result<Target, SocksError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let mut head = [0; 2];
    stream.read_exact(&mut head).await?;
    if head[0] != VERSION {
        return Err(WireError::Version(head[0]).into());
    }
    let mut methods = [0; 255];
    let methods = &mut methods[..usize::from(head[1])];
    stream.read_exact(methods).await?;
    if !methods.contains(&NO_AUTHENTICATION) {
        stream.write_all(&[VERSION, NO_METHOD]).await?;
        stream.flush().await?;
        return Err(WireError::Authentication.into());
    }
    stream.write_all(&[VERSION, NO_AUTHENTICATION]).await?;
    stream.flush().await?;

    // Version, command, reserved, kind of address, and what follows that.
    let mut head = [0; 5];
    stream.read_exact(&mut head).await?;
    if head[0] != VERSION {
        return Err(WireError::Version(head[0]).into());
    }
    let rest = match Target::rest(head[3], head[4]) {
        Ok(rest) => rest,
        Err(error) => {
            answer(stream, Reply::AddressNotSupported).await?;
            return Err(error.into());
        }
    };
    let mut address = [0; 2 + 257];
    address[..2].copy_from_slice(&head[3..]);
    stream.read_exact(&mut address[2..2 + rest]).await?;
    if head[1] != CONNECT {
        answer(stream, Reply::CommandNotSupported).await?;
        return Err(WireError::Command(head[1]).into());
    }
    match Target::decode(&address[..2 + rest]) {
        Ok((target, _)) => Ok(target),
        Err(error) => {
            answer(stream, Reply::AddressNotSupported).await?;
            Err(error.into())
        }
    }
}

/// Tells the client how its request ended.
///
/// # Errors
/// What the stream says.
pub async fn answer<S>(stream: &mut S, reply: Reply) -> io::Result<()>
where
    S: AsyncWrite + Unpin,
{
    stream.write_all(&[VERSION, reply as u8, 0, 1, 0, 0, 0, 0, 0, 0]).await?;
    stream.flush().await
}

/// Tells a client that its request will not be carried out, without looking at it, and ends the stream.
///
/// # Errors
/// What the stream says.
pub async fn refuse<S>(stream: &mut S, reply: Reply) -> io::Result<()>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    stream.write_all(&[VERSION, NO_AUTHENTICATION]).await?;
    refuse_request(stream, reply).await
}

/// Tells a client that its request, which was [`accept`]ed, is not carried out, and ends the stream.
///
/// # Errors
/// What the stream says.
pub async fn refuse_request<S>(stream: &mut S, reply: Reply) -> io::Result<()>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    answer(stream, reply).await?;
    stream.shutdown().await?;
    // A stream that is dropped before its end was seen is a reset, which may overtake the answer.
    let mut rest = [0; 512];
    let end = async { while stream.read(&mut rest).await.is_ok_and(|read| read > 0) {} };
    let _ = tokio::time::timeout(LINGER, end).await;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use tokio::io::duplex;

    fn block_on<T>(work: impl Future<Output = T>) -> T {
        tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap().block_on(work)
    }

    /// What the server makes of `bytes`, and what it answers.
    fn serve(bytes: &[u8]) -> (Result<Target, SocksError>, Vec<u8>) {
        block_on(async {
            let (mut client, mut server) = duplex(4096);
            client.write_all(bytes).await.unwrap();
            client.shutdown().await.unwrap();
            let target = accept(&mut server).await;
            drop(server);
            let mut answer = Vec::new();
            client.read_to_end(&mut answer).await.unwrap();
            (target, answer)
        })
    }

    /// What the client makes of a server that says `bytes`.
    fn ask(bytes: &[u8]) -> Result<(), SocksError> {
        block_on(async {
            let (mut client, mut server) = duplex(4096);
            server.write_all(bytes).await.unwrap();
            server.shutdown().await.unwrap();
            connect(&mut client, &"example.org:80".parse().unwrap()).await
        })
    }

    #[test]
    fn requests_of_any_client_are_understood_and_no_byte_beyond_them_is_read() {
        let requests: [(&[u8], &str); 3] = [
            (b"\x05\x01\x00\x05\x01\x00\x01\x7f\x00\x00\x01\x00\x50", "127.0.0.1:80"),
            (b"\x05\x03\x02\x01\x00\x05\x01\x00\x03\x04a.bc\x01\xbb", "a.bc:443"),
            (b"\x05\x01\x00\x05\x01\x00\x04\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\x01\x00\x16", "[::1]:22"),
        ];
        for (bytes, expected) in requests {
            block_on(async {
                let (mut client, mut server) = duplex(4096);
                client.write_all(bytes).await.unwrap();
                client.write_all(b"early data").await.unwrap();
                assert_eq!(accept(&mut server).await.unwrap().to_string(), expected);
                let mut rest = [0; 10];
                server.read_exact(&mut rest).await.unwrap();
                assert_eq!(&rest, b"early data");
            });
        }
    }

    #[test]
    fn nonsense_is_refused_in_the_words_of_the_protocol() {
        let none: &[u8] = b"";
        let no_method: &[u8] = b"\x05\xff";
        let command: &[u8] = b"\x05\x00\x05\x07\x00\x01\0\0\0\0\0\0";
        let address: &[u8] = b"\x05\x00\x05\x08\x00\x01\0\0\0\0\0\0";
        let table: [(&[u8], WireError, &[u8]); 7] = [
            (b"\x04\x01", WireError::Version(4), none),
            (b"GET / HTTP/1.1\r\n", WireError::Version(b'G'), none),
            (b"\x05\x00", WireError::Authentication, no_method),
            (b"\x05\x01\x02", WireError::Authentication, no_method),
            (b"\x05\x01\x00\x05\x02\x00\x01\x7f\0\0\x01\0\x50", WireError::Command(2), command),
            (b"\x05\x01\x00\x05\x01\x00\x09\x7f", WireError::AddressKind(9), address),
            (b"\x05\x01\x00\x05\x01\x00\x03\x02a\n\0\x50", WireError::Name, address),
        ];
        for (bytes, expected, answer) in table {
            let (result, answered) = serve(bytes);
            match result {
                Err(SocksError::Wire(error)) => assert_eq!(error, expected),
                other => panic!("{bytes:?}: {other:?}"),
            }
            assert_eq!(answered, answer, "{bytes:?}");
        }
    }

    #[test]
    fn a_client_understands_every_reply_and_survives_servers_that_make_no_sense() {
        for code in 0..=255 {
            let mut bytes = b"\x05\x00\x05?\x00\x01\0\0\0\0\0\0".to_vec();
            bytes[3] = code;
            match (code, ask(&bytes)) {
                (0, Ok(())) => {}
                (1..=8, Err(SocksError::Reply { reply, .. })) => assert_eq!(reply as u8, code),
                (9.., Err(SocksError::Wire(WireError::Reply(told)))) => assert_eq!(told, code),
                (_, other) => panic!("{code}: {other:?}"),
            }
        }
        assert!(matches!(ask(b""), Err(SocksError::Stream(_))));
        assert!(matches!(ask(b"\x05\xff"), Err(SocksError::Wire(WireError::Authentication))));
        assert!(matches!(ask(b"\x04\x00"), Err(SocksError::Wire(WireError::Version(4)))));
        assert!(matches!(ask(b"\x05\x00\x05\x00\x00\x03\xff"), Err(SocksError::Stream(_))));
    }

    #[test]
    fn a_client_that_is_refused_unheard_understands_it() {
        block_on(async {
            let (mut client, mut server) = duplex(4096);
            let target = "example.org:80".parse().unwrap();
            let asking = async {
                let told = connect(&mut client, &target).await;
                drop(client);
                told.unwrap_err().reply()
            };
            let (told, refused) = tokio::join!(asking, refuse(&mut server, Reply::Failed));
            assert_eq!(told, Some(Reply::Failed));
            refused.unwrap();

            // Gone before anything was asked.
            let (mut client, mut server) = duplex(4096);
            server.write_all(b"\x05\x00\x05\x01\x00\x01\0\0\0\0\0\0").await.unwrap();
            drop(server);
            assert_eq!(connect(&mut client, &target).await.unwrap_err().reply(), Some(Reply::Failed));
        });
    }

    proptest! {
        #[test]
        fn garbage_ends_in_an_error_or_a_target_but_never_in_a_panic(bytes in prop::collection::vec(any::<u8>(), 0..600)) {
            let _ = serve(&bytes);
            let _ = serve(&[b"\x05\x01\x00\x05\x01\x00", bytes.as_slice()].concat());
            let _ = ask(&bytes);
            let _ = ask(&[b"\x05\x00\x05\x00", bytes.as_slice()].concat());
        }
    }
}
