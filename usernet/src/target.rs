//! Where a connection or a datagram goes: an address or a name, in the form of RFC 1928 §5.
//!
//! ```text
//!  | ATYP 1 | 4 bytes of IPv4        | port u16 |
//!  | ATYP 3 | length u8, name        | port u16 |
//!  | ATYP 4 | 16 bytes of IPv6       | port u16 |
//! ```

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::str::FromStr;

use thiserror::Error;

const IPV4: u8 = 1;
const NAME: u8 = 3;
const IPV6: u8 = 4;
/// RFC 1035 §2.3.4, in its textual form.
const LONGEST_NAME: usize = 253;

/// What the other end of a link sent makes no sense.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum WireError {
    /// Not version 5 of SOCKS.
    #[error("the other end speaks version {0} of SOCKS, not 5")]
    Version(u8),
    /// None of the offered ways to authenticate is «none».
    #[error("the other end wants to authenticate")]
    Authentication,
    /// A command other than CONNECT.
    #[error("SOCKS command {0} is not supported")]
    Command(u8),
    /// An unknown kind of address.
    #[error("{0} is no kind of address")]
    AddressKind(u8),
    /// A name that cannot be a host's.
    #[error("an invalid host name was sent")]
    Name,
    /// An unknown kind of frame.
    #[error("{0} is no kind of frame")]
    FrameKind(u8),
    /// A frame that is too short for what it should hold.
    #[error("a frame of {0} bytes is too short")]
    Truncated(usize),
    /// A reply code that RFC 1928 §6 does not have.
    #[error("{0} is no reply of SOCKS")]
    Reply(u8),
}

impl From<WireError> for std::io::Error {
    fn from(error: WireError) -> Self {
        Self::new(std::io::ErrorKind::InvalidData, error)
    }
}

/// An address, or a name that the receiving end resolves, and a port (for echo: a sequence number).
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Target {
    /// An address.
    Address(SocketAddr),
    /// A name: letters, digits, `-`, `_` and `.`, at most 253 of them, and a port.
    Name(String, u16),
}

impl Target {
    /// A target of this name, if it is one that hosts can have.
    ///
    /// # Errors
    /// [`WireError::Name`] where it is not.
    pub fn name(name: &str, port: u16) -> Result<Self, WireError> {
        let fits = (1..=LONGEST_NAME).contains(&name.len());
        let letter = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
        if fits && name.bytes().all(letter) {
            Ok(Self::Name(name.to_owned(), port))
        } else {
            Err(WireError::Name)
        }
    }

    /// The port.
    pub fn port(&self) -> u16 {
        match self {
            Self::Address(address) => address.port(),
            Self::Name(_, port) => *port,
        }
    }

    /// Appends the wire form.
    pub(crate) fn encode(&self, out: &mut Vec<u8>) {
        match self {
            Self::Address(SocketAddr::V4(address)) => {
                out.push(IPV4);
                out.extend_from_slice(&address.ip().octets());
            }
            Self::Address(SocketAddr::V6(address)) => {
                out.push(IPV6);
                out.extend_from_slice(&address.ip().octets());
            }
            Self::Name(name, _) => {
                out.push(NAME);
                // Names are at most 253 bytes long wherever one is made.
                let length = name.len().min(LONGEST_NAME);
                out.push(length as u8);
                out.extend_from_slice(&name.as_bytes()[..length]);
            }
        }
        out.extend_from_slice(&self.port().to_be_bytes());
    }

    /// How many bytes follow the first two (the kind, and what is after it) in the wire form.
    pub(crate) fn rest(kind: u8, next: u8) -> Result<usize, WireError> {
        match kind {
            IPV4 => Ok(3 + 2),
            IPV6 => Ok(15 + 2),
            NAME => Ok(usize::from(next) + 2),
            other => Err(WireError::AddressKind(other)),
        }
    }

    /// Takes a target from the front of `bytes`; also gives what follows it.
    pub(crate) fn decode(bytes: &[u8]) -> Result<(Self, &[u8]), WireError> {
        let truncated = || WireError::Truncated(bytes.len());
        let [kind, next, ..] = *bytes else { return Err(truncated()) };
        let (head, rest) = bytes.split_at_checked(2 + Self::rest(kind, next)?).ok_or_else(truncated)?;
        let (head, port) = head.split_last_chunk::<2>().ok_or_else(truncated)?;
        let port = u16::from_be_bytes(*port);
        let address: IpAddr = match kind {
            IPV4 => Ipv4Addr::from(<[u8; 4]>::try_from(&head[1..]).map_err(|_| truncated())?).into(),
            IPV6 => Ipv6Addr::from(<[u8; 16]>::try_from(&head[1..]).map_err(|_| truncated())?).into(),
            _ => {
                let name = std::str::from_utf8(&head[2..]).map_err(|_| WireError::Name)?;
                return Ok((Self::name(name, port)?, rest));
            }
        };
        Ok((Self::Address(SocketAddr::new(address, port)), rest))
    }
}

impl From<SocketAddr> for Target {
    fn from(address: SocketAddr) -> Self {
        Self::Address(address)
    }
}

impl FromStr for Target {
    type Err = WireError;

    fn from_str(text: &str) -> Result<Self, WireError> {
        if let Ok(address) = text.parse() {
            return Ok(Self::Address(address));
        }
        let (name, port) = text.rsplit_once(':').ok_or(WireError::Name)?;
        Self::name(name, port.parse().map_err(|_| WireError::Name)?)
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Address(address) => write!(f, "{address}"),
            Self::Name(name, port) => write!(f, "{name}:{port}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_survive_the_wire_and_what_follows_them_is_left_alone() {
        for text in ["192.0.2.1:80", "[2001:db8::1]:443", "example.org:53", "a_b-c.kiln.internal:65535"] {
            let target: Target = text.parse().unwrap();
            let mut bytes = Vec::new();
            target.encode(&mut bytes);
            assert_eq!(bytes.len(), 2 + Target::rest(bytes[0], bytes[1]).unwrap(), "{text}");
            for cut in 0..bytes.len() {
                assert_eq!(Target::decode(&bytes[..cut]), Err(WireError::Truncated(cut)), "{text}");
            }
            bytes.extend_from_slice(b"rest");
            assert_eq!(Target::decode(&bytes), Ok((target.clone(), &b"rest"[..])), "{text}");
            assert_eq!(target.to_string(), text);
        }
    }

    #[test]
    fn names_that_no_host_can_have_are_refused() {
        for name in ["", "a b", "a\n", "é", "a/b", "a\0", &"x".repeat(254)] {
            assert_eq!(Target::name(name, 1), Err(WireError::Name), "{name:?}");
            let mut bytes = vec![NAME, name.len().min(255) as u8];
            bytes.extend_from_slice(name.as_bytes());
            bytes.extend_from_slice(&[0, 1]);
            assert_eq!(Target::decode(&bytes), Err(WireError::Name), "{name:?}");
        }
        assert_eq!(Target::decode(&[2, 0, 0, 0]), Err(WireError::AddressKind(2)));
    }
}
