//! Asks the host's name servers, with the guest's question as it is.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpStream, UdpSocket};
use tokio::time::timeout;

use crate::dns::host_name_servers;

/// How long one name server has for an answer (`resolv.conf(5)` gives 5 s to all of them).
const PATIENCE: Duration = Duration::from_millis(2000);
/// How often each is asked.
const TURNS: usize = 2;
/// More than `resolv.conf(5)` can name.
const MOST_SERVERS: usize = 8;
const HEADER: usize = 12;

/// Who is asked for names that are not the network's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Upstreams {
    /// The host's name servers as they are at that moment: a laptop changes them with its place.
    Host,
    /// These, one after the other.
    These(Vec<SocketAddr>),
    /// Nobody: such names do not exist.
    Nobody,
}

/// What carries a question.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Transport {
    Udp,
    Tcp,
}

impl Upstreams {
    fn now(&self) -> Vec<SocketAddr> {
        match self {
            Self::Nobody => Vec::new(),
            Self::These(servers) => servers.clone(),
            Self::Host => {
                let mut servers = host_name_servers();
                if servers.is_empty() {
                    // As resolv.conf(5) has it.
                    servers.push(Ipv4Addr::LOCALHOST.into());
                }
                servers.into_iter().map(|server| SocketAddr::new(server, 53)).collect()
            }
        }
    }

    /// The answer of the first that has one.
    pub(super) async fn ask(&self, query: &[u8], transport: Transport) -> Option<Vec<u8>> {
        let (identifier, rest) = query.split_first_chunk::<2>()?;
        // The guest must not know it: together with somebody outside it could have an answer forged.
        let own = (getrandom::u32().ok()? as u16).to_be_bytes();
        let asked = [own.as_slice(), rest].concat();
        let servers = self.now();
        for server in servers.iter().take(MOST_SERVERS).cycle().take(servers.len().min(MOST_SERVERS) * TURNS)
        {
            let answer = async {
                match transport {
                    Transport::Udp => ask_over_udp(&asked, *server).await,
                    Transport::Tcp => ask_over_tcp(&asked, *server).await,
                }
            };
            match timeout(PATIENCE, answer).await {
                Ok(Ok(mut answer)) => {
                    answer[..2].copy_from_slice(identifier);
                    return Some(answer);
                }
                Ok(Err(error)) => tracing::debug!(%server, %error, "a name server cannot be asked"),
                Err(_) => tracing::debug!(%server, "a name server does not answer"),
            }
        }
        None
    }
}

async fn ask_over_udp(query: &[u8], server: SocketAddr) -> io::Result<Vec<u8>> {
    let any: IpAddr = match server {
        SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    // A new one for each question, so that its port is hard to guess.
    let socket = UdpSocket::bind((any, 0)).await?;
    socket.connect(server).await?;
    socket.send(query).await?;
    // More than resolvers send: fragments are lost too easily (RFC 9715).
    let mut answer = vec![0; 16 << 10];
    loop {
        let length = socket.recv(&mut answer).await?;
        if is_answer(&answer[..length], query) {
            answer.truncate(length);
            return Ok(answer);
        }
    }
}

async fn ask_over_tcp(query: &[u8], server: SocketAddr) -> io::Result<Vec<u8>> {
    let mut stream = TcpStream::connect(server).await?;
    write_message(&mut stream, query).await?;
    let answer = read_message(&mut stream).await?.ok_or(io::ErrorKind::UnexpectedEof)?;
    if is_answer(&answer, query) { Ok(answer) } else { Err(io::ErrorKind::InvalidData.into()) }
}

/// The same number, it is an answer, and to this question.
fn is_answer(answer: &[u8], query: &[u8]) -> bool {
    if answer.len() < HEADER || query.len() < HEADER || answer[..2] != query[..2] || answer[2] & 0x80 == 0 {
        return false;
    }
    // A server that cannot do what was asked may leave the question out (RFC 1035 §4.1.1, RCODE).
    let no_question = answer[4..6] == [0, 0] && answer[3] & 0x0f != 0;
    no_question || question(answer).is_some_and(|asked| Some(asked) == question(query))
}

/// The first question, its name in lower case.
fn question(message: &[u8]) -> Option<Vec<u8>> {
    let mut end = HEADER;
    loop {
        match usize::from(*message.get(end)?) {
            0 => break,
            length @ 1..=63 => end += 1 + length,
            // Nothing is before it that could be pointed to.
            _ => return None,
        }
    }
    Some(message.get(HEADER..end + 5)?.to_ascii_lowercase())
}

/// RFC 1035 §4.2.2: each message is preceded by its length in two bytes. `None` at the end.
pub(super) async fn read_message(stream: &mut (impl AsyncRead + Unpin)) -> io::Result<Option<Vec<u8>>> {
    let mut length = [0; 2];
    match stream.read_exact(&mut length).await {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        other => drop(other?),
    }
    let mut message = vec![0; usize::from(u16::from_be_bytes(length))];
    stream.read_exact(&mut message).await?;
    Ok(Some(message))
}

pub(super) async fn write_message(stream: &mut (impl AsyncWrite + Unpin), message: &[u8]) -> io::Result<()> {
    let length = u16::try_from(message.len()).map_err(|_| io::ErrorKind::InvalidData)?;
    let framed = [&length.to_be_bytes(), message].concat();
    stream.write_all(&framed).await?;
    stream.flush().await
}

#[cfg(test)]
mod tests {
    use super::*;

    const QUERY: &[u8] = b"\x12\x34\x01\x00\x00\x01\x00\x00\x00\x00\x00\x00\x03WwW\x01a\x00\x00\x01\x00\x01";

    #[test]
    fn only_an_answer_to_the_question_is_one() {
        let with = |change: fn(&mut Vec<u8>)| {
            let mut answer = QUERY.to_vec();
            answer[2] |= 0x80;
            change(&mut answer);
            is_answer(&answer, QUERY)
        };
        assert!(with(|_| ()));
        assert!(with(|answer| answer[13] = b'w'), "the case of a name is no matter");
        assert!(with(|answer| answer.extend_from_slice(b"records")));
        assert!(
            with(|answer| {
                answer.truncate(12);
                answer[5] = 0;
                answer[3] = 1;
            }),
            "a format error"
        );
        for no in [
            (|answer| answer[0] = 0) as fn(&mut Vec<u8>),
            |answer| answer[2] = 1,
            |answer| answer[13] = b'x',
            |answer| answer[20] = 28,
            |answer| answer.truncate(12),
            |answer| answer.truncate(20),
            |answer| answer.truncate(3),
            |answer| answer[12] = 0xc0,
        ] {
            assert!(!with(no));
        }
    }
}
