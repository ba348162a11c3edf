//! Packets (RFC 4253 §6), first in the clear and then under `chacha20-poly1305@openssh.com`, and the exchanges that give them
//! keys: one at the beginning, and another whenever the client asks, which it does before a key has seen too much.

use bytes::{Buf as _, BytesMut};
use ring::aead::chacha20_poly1305_openssh::{OpeningKey, SealingKey, TAG_LEN};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, ReadHalf, WriteHalf};

use crate::kex::{self, Agreed, Said, SessionId};
use crate::keys::{KeyPair, SIGNATURES};
use crate::wire::Put as _;
use crate::{SshError, message};

/// The longest packet, in bytes; RFC 4253 wants at least 35000.
const LONGEST_PACKET: usize = 64 << 10;
/// The longest line before the first packet (RFC 4253 §4.2).
const LONGEST_LINE: usize = 255;
/// Bytes that wait for a client that does not read, before it is not listened to either.
const MOST_OUTPUT: usize = 1 << 20;
/// Bytes that wait for the client before those who have more to say must wait too.
const ENOUGH_OUTPUT: usize = 128 << 10;
/// What packets are a multiple of.
const BLOCK: usize = 8;
/// A key has seen all numbers of packets.
const WORN: SshError = SshError::Protocol("no new keys after all packets that one may have");

/// Our first line, without its end.
const VERSION: &str = concat!("SSH-2.0-Kiln_", env!("CARGO_PKG_VERSION"));

/// Where an exchange of keys is.
enum Exchange {
    /// Our offer is on its way.
    Offered { ours: Vec<u8> },
    /// Both offers are known.
    Agreed { ours: Vec<u8>, theirs: Vec<u8>, agreed: Agreed },
    /// We use the new keys; the client is about to.
    Switching { opening: OpeningKey },
    /// There is none.
    Over,
}

/// Numbers of packets in one direction.
#[derive(Debug, Default)]
struct Count {
    /// Of the next packet: its nonce.
    next: u32,
    /// Packets that the present key has seen.
    under_key: u32,
}

impl Count {
    /// The number of one more packet; `None` if the key has seen all numbers: a nonce must not come twice.
    fn take(&mut self) -> Option<u32> {
        self.under_key = self.under_key.checked_add(1)?;
        let number = self.next;
        self.next = number.wrapping_add(1);
        Some(number)
    }

    /// The next packet is under another key.
    fn renew(&mut self, strict: bool) {
        self.under_key = 0;
        if strict {
            self.next = 0;
        }
    }
}

/// What a step came to.
#[derive(Debug)]
pub(crate) enum Step {
    /// A message that is not the transport's own.
    Message(Vec<u8>),
    /// Bytes went out: there may be room for more.
    Moved,
    /// The client has gone.
    Ended,
}

/// Packets over a stream.
pub(crate) struct Transport<'a, S> {
    reader: ReadHalf<S>,
    writer: WriteHalf<S>,
    input: BytesMut,
    output: BytesMut,
    opening: Option<OpeningKey>,
    sealing: Option<SealingKey>,
    received: Count,
    sent: Count,
    /// Something could not be sent, for the key has seen too much.
    worn: bool,
    /// The length of the packet that is coming in, once it is known.
    length: Option<usize>,
    exchange: Exchange,
    strict: bool,
    session: Option<SessionId>,
    host_key: &'a KeyPair,
    client_version: Vec<u8>,
}

impl<'a, S: AsyncRead + AsyncWrite> Transport<'a, S> {
    /// Begins: says who we are and hears who the client is.
    pub(crate) async fn begin(stream: S, host_key: &'a KeyPair) -> Result<Self, SshError> {
        let (mut reader, mut writer) = tokio::io::split(stream);
        writer.write_all(format!("{VERSION}\r\n").as_bytes()).await?;
        let mut input = BytesMut::new();
        let end = loop {
            if let Some(end) = input.iter().position(|byte| *byte == b'\n') {
                break end;
            }
            if input.len() > LONGEST_LINE {
                return Err(SshError::Malformed("first line"));
            }
            if reader.read_buf(&mut input).await? == 0 {
                return Err(SshError::Ended);
            }
        };
        let line = input.split_to(end + 1);
        let line = line[..end].strip_suffix(b"\r").unwrap_or(&line[..end]);
        if !line.starts_with(b"SSH-2.0-") || line.len() > LONGEST_LINE {
            return Err(SshError::Malformed("first line"));
        }
        let mut transport = Self {
            reader,
            writer,
            client_version: line.to_vec(),
            input,
            output: BytesMut::new(),
            opening: None,
            sealing: None,
            received: Count::default(),
            sent: Count::default(),
            worn: false,
            length: None,
            exchange: Exchange::Over,
            strict: false,
            session: None,
            host_key,
        };
        transport.make_offer()?;
        Ok(transport)
    }

    fn make_offer(&mut self) -> Result<(), SshError> {
        let ours = kex::offer()?;
        self.seal(&ours);
        self.exchange = Exchange::Offered { ours };
        Ok(())
    }

    /// What identifies the connection; empty before the first keys.
    pub(crate) fn session(&self) -> &[u8] {
        self.session.as_ref().map_or(&[], |session| session)
    }

    /// The number of the packet that came last.
    pub(crate) fn heard(&self) -> u32 {
        self.received.next.wrapping_sub(1)
    }

    /// Whether messages may be given to [`Self::send`] that nobody waits for: not in an exchange, nor while much waits already.
    pub(crate) fn has_room(&self) -> bool {
        let free = matches!(self.exchange, Exchange::Over | Exchange::Switching { .. });
        free && self.session.is_some() && self.output.len() < ENOUGH_OUTPUT
    }

    /// Appends a message to what goes out.
    pub(crate) fn send(&mut self, payload: &[u8]) {
        self.seal(payload);
    }

    /// Waits until something has come in or gone out. If much waits to be sent elsewhere (`behind`) and here too, nothing is
    /// heard. May be dropped at any time: nothing is lost.
    pub(crate) async fn step(&mut self, behind: bool) -> Result<Step, SshError> {
        loop {
            if self.worn {
                return Err(WORN);
            }
            let most = if behind { ENOUGH_OUTPUT } else { MOST_OUTPUT };
            let listens = self.output.len() < most;
            while listens && let Some(payload) = self.open()? {
                match payload.first() {
                    Some(&message::DISCONNECT) => return Ok(Step::Ended),
                    Some(_) if self.absorb(&payload)? => {}
                    Some(_) => return Ok(Step::Message(payload)),
                    None => return Err(SshError::Malformed("packet")),
                }
            }
            tokio::select! {
                count = self.reader.read_buf(&mut self.input), if listens => {
                    match count? {
                        0 if self.input.is_empty() => return Ok(Step::Ended),
                        0 => return Err(SshError::Ended),
                        _ => {}
                    }
                }
                count = self.writer.write_buf(&mut self.output), if !self.output.is_empty() => {
                    return if count? == 0 { Err(SshError::Ended) } else { Ok(Step::Moved) };
                }
            }
        }
    }

    /// Sends what waits, and the end.
    pub(crate) async fn finish(&mut self) -> Result<(), SshError> {
        while !self.output.is_empty() {
            if self.writer.write_buf(&mut self.output).await? == 0 {
                return Err(SshError::Ended);
            }
        }
        Ok(self.writer.shutdown().await?)
    }

    /// Takes a message that is the transport's own; false if it is not.
    fn absorb(&mut self, payload: &[u8]) -> Result<bool, SshError> {
        let first = self.session.is_none();
        match payload[0] {
            // In a first exchange that is strict, nothing may come in between, up to the client's new keys.
            message::IGNORE | message::UNIMPLEMENTED | message::DEBUG
                if !(self.strict && self.opening.is_none()) => {}
            message::KEXINIT => self.hear_offer(payload)?,
            message::KEX_ECDH_INIT => match std::mem::replace(&mut self.exchange, Exchange::Over) {
                Exchange::Agreed { ours, theirs, agreed } if agreed.wrong_guess => {
                    let agreed = Agreed { wrong_guess: false, ..agreed };
                    self.exchange = Exchange::Agreed { ours, theirs, agreed };
                }
                Exchange::Agreed { ours, theirs, agreed } => self.answer(payload, &ours, &theirs, agreed)?,
                _ => return Err(SshError::Protocol("a key exchange that was not agreed on")),
            },
            message::NEWKEYS => match std::mem::replace(&mut self.exchange, Exchange::Over) {
                Exchange::Switching { opening } => {
                    self.opening = Some(opening);
                    self.received.renew(self.strict);
                }
                _ => return Err(SshError::Protocol("new keys before there are any")),
            },
            _ if first || matches!(self.exchange, Exchange::Agreed { .. } | Exchange::Switching { .. }) => {
                return Err(SshError::Protocol("a message in the middle of a key exchange"));
            }
            message::EXT_INFO => {}
            _ => return Ok(false),
        }
        Ok(true)
    }

    fn hear_offer(&mut self, payload: &[u8]) -> Result<(), SshError> {
        if matches!(self.exchange, Exchange::Over) {
            self.make_offer()?;
        }
        let Exchange::Offered { ours } = std::mem::replace(&mut self.exchange, Exchange::Over) else {
            return Err(SshError::Protocol("two offers in one key exchange"));
        };
        let agreed = kex::agree(payload)?;
        if self.session.is_none() {
            self.strict = agreed.strict;
            // Whatever came before would have moved the count.
            if self.strict && self.received.next != 1 {
                return Err(SshError::Protocol("a message before the key exchange"));
            }
        }
        self.exchange = Exchange::Agreed { ours, theirs: payload.to_vec(), agreed };
        Ok(())
    }

    fn answer(&mut self, init: &[u8], ours: &[u8], theirs: &[u8], agreed: Agreed) -> Result<(), SshError> {
        let said = Said {
            client_version: &self.client_version,
            server_version: VERSION.as_bytes(),
            client_offer: theirs,
            server_offer: ours,
        };
        let first = self.session.is_none();
        let exchanged = kex::exchange(init, &said, self.host_key, self.session)?;
        self.session = Some(exchanged.session);
        self.seal(&exchanged.reply);
        self.seal(&[message::NEWKEYS]);
        self.sealing = Some(SealingKey::new(&exchanged.keys.to_client));
        self.sent.renew(self.strict);
        self.exchange = Exchange::Switching { opening: OpeningKey::new(&exchanged.keys.from_client) };
        if first && agreed.wants_info {
            let mut info = vec![message::EXT_INFO];
            info.put_number(1).put_string("server-sig-algs").put_string(SIGNATURES);
            self.seal(&info);
        }
        Ok(())
    }

    /// Appends a packet to what goes out.
    fn seal(&mut self, payload: &[u8]) {
        let Some(number) = self.sent.take() else {
            self.worn = true;
            return;
        };
        // The cipher encrypts the length apart from the rest, so that there it is not part of the block.
        let outside = if self.sealing.is_some() { 0 } else { 4 };
        let unpadded = outside + 1 + payload.len();
        let mut padding = BLOCK - unpadded % BLOCK;
        if padding < 4 {
            padding += BLOCK;
        }
        let length = 1 + payload.len() + padding;
        let start = self.output.len();
        self.output.reserve(4 + length + TAG_LEN);
        self.output.extend_from_slice(&u32::try_from(length).unwrap_or(u32::MAX).to_be_bytes());
        self.output.extend_from_slice(&[u8::try_from(padding).unwrap_or(u8::MAX)]);
        self.output.extend_from_slice(payload);
        // What is encrypted and authenticated needs no noise.
        self.output.resize(start + 4 + length, 0);
        if let Some(key) = &self.sealing {
            let mut tag = [0; TAG_LEN];
            key.seal_in_place(number, &mut self.output[start..], &mut tag);
            self.output.extend_from_slice(&tag);
        }
    }

    /// The next packet's payload, if it has come in whole.
    fn open(&mut self) -> Result<Option<Vec<u8>>, SshError> {
        let length = match self.length {
            Some(length) => length,
            None => {
                let Some(head) = self.input.first_chunk::<4>() else { return Ok(None) };
                let plain = match &self.opening {
                    Some(key) => key.decrypt_packet_length(self.received.next, *head),
                    None => *head,
                };
                let length = usize::try_from(u32::from_be_bytes(plain)).unwrap_or(usize::MAX);
                if !(BLOCK..=LONGEST_PACKET).contains(&length) {
                    return Err(SshError::Malformed("packet's length"));
                }
                *self.length.insert(length)
            }
        };
        let tag_length = if self.opening.is_some() { TAG_LEN } else { 0 };
        if self.input.len() < 4 + length + tag_length {
            return Ok(None);
        }
        self.length = None;
        let number = self.received.take().ok_or(WORN)?;
        let mut packet = self.input.split_to(4 + length);
        let plain = match &self.opening {
            Some(key) => {
                let mut tag = [0; TAG_LEN];
                self.input.copy_to_slice(&mut tag);
                key.open_in_place(number, &mut packet, &tag)
                    .map_err(|_| SshError::Crypto("a packet's tag"))?
            }
            None => &packet[4..],
        };
        let padding = usize::from(plain[0]);
        let payload = plain.len().checked_sub(1 + padding).ok_or(SshError::Malformed("packet's padding"))?;
        Ok(Some(plain[1..=payload].to_vec()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_sees_no_number_twice_and_the_next_key_begins_anew() {
        for (strict, next) in [(true, 0), (false, 3)] {
            let mut count = Count { next: 2, under_key: u32::MAX - 1 };
            assert_eq!(count.take(), Some(2), "the last");
            assert_eq!((count.take(), count.take()), (None, None));
            count.renew(strict);
            assert_eq!(count.take(), Some(next), "strict: {strict}");
        }
        let mut wraps = Count { next: u32::MAX, under_key: 0 };
        assert_eq!((wraps.take(), wraps.take()), (Some(u32::MAX), Some(0)), "under a key that is younger");
    }
}
