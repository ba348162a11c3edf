//! A client that says what it is told, also what none would say.

use ring::aead::chacha20_poly1305_openssh::{OpeningKey, SealingKey, TAG_LEN};
use ring::agreement::{EphemeralPrivateKey, UnparsedPublicKey, X25519, agree_ephemeral};
use ring::digest::{SHA256, digest};
use ring::rand::SystemRandom;
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader, DuplexStream};

use crate::keys::{ED25519, KeyPair};
use crate::message;
use crate::wire::{Put as _, Reader};

const VERSION: &str = "SSH-2.0-test";

pub(super) struct Client {
    stream: BufReader<DuplexStream>,
    sent: u32,
    received: u32,
    sealing: Option<SealingKey>,
    opening: Option<OpeningKey>,
    strict: bool,
    session: Vec<u8>,
}

/// An exchange of keys of which the client has not used its own yet.
pub(super) struct Switch {
    sealing: SealingKey,
}

impl Client {
    pub(super) fn new(stream: DuplexStream, strict: bool) -> Self {
        let stream = BufReader::new(stream);
        Self { stream, sent: 0, received: 0, sealing: None, opening: None, strict, session: Vec::new() }
    }

    /// Through the first exchange of keys up to the server's new keys.
    pub(super) async fn exchange(&mut self) -> Switch {
        let mut version = String::new();
        self.stream.read_line(&mut version).await.unwrap();
        self.stream.write_all(format!("{VERSION}\r\n").as_bytes()).await.unwrap();
        let mut ours = vec![message::KEXINIT];
        ours.extend_from_slice(&[7; 16]);
        let strict = if self.strict { ",kex-strict-c-v00@openssh.com" } else { "" };
        let cipher = "chacha20-poly1305@openssh.com";
        let exchange = format!("curve25519-sha256{strict}");
        for list in [exchange.as_str(), ED25519, cipher, cipher, "", "", "none", "none", "", ""] {
            ours.put_string(list);
        }
        ours.put_byte(0).put_number(0);
        let private = EphemeralPrivateKey::generate(&X25519, &SystemRandom::new()).unwrap();
        let point = private.compute_public_key().unwrap();
        self.say(&ours).await;
        let mut init = vec![message::KEX_ECDH_INIT];
        init.put_string(point.as_ref());
        self.say(&init).await;
        let theirs = self.hear().await.unwrap();
        let reply = self.hear().await.unwrap();
        let mut fields = Reader::new(&reply[1..], "reply");
        let (host_key, their_point) = (fields.string().unwrap(), fields.string().unwrap());
        let mut secret = Vec::new();
        agree_ephemeral(private, &UnparsedPublicKey::new(&X25519, their_point), |bytes| {
            secret.put_integer(bytes);
        })
        .unwrap();
        let mut hashed = Vec::new();
        hashed.put_string(VERSION).put_string(version.trim_end()).put_string(&ours).put_string(&theirs);
        hashed.put_string(host_key).put_string(point.as_ref()).put_string(their_point);
        hashed.extend_from_slice(&secret);
        let hash = digest(&SHA256, &hashed).as_ref().to_vec();
        self.session.clone_from(&hash);
        let key = |letter: u8| {
            let first = digest(&SHA256, &[&secret[..], &hash, &[letter], &hash].concat());
            let second = digest(&SHA256, &[&secret[..], &hash, first.as_ref()].concat());
            <[u8; 64]>::try_from([first.as_ref(), second.as_ref()].concat()).unwrap()
        };
        assert_eq!(self.hear().await.unwrap(), [message::NEWKEYS]);
        self.opening = Some(OpeningKey::new(&key(b'D')));
        if self.strict {
            self.received = 0;
        }
        Switch { sealing: SealingKey::new(&key(b'C')) }
    }

    /// Uses the new keys.
    pub(super) async fn switch(&mut self, switch: Switch) {
        self.say(&[message::NEWKEYS]).await;
        self.sealing = Some(switch.sealing);
        if self.strict {
            self.sent = 0;
        }
    }

    /// Asks for the service that lets in.
    pub(super) async fn ask_to_enter(&mut self) {
        let mut ask = vec![message::SERVICE_REQUEST];
        ask.put_string("ssh-userauth");
        self.say(&ask).await;
        assert_eq!(self.hear().await.unwrap()[0], message::SERVICE_ACCEPT);
    }

    /// A request to enter with `key`.
    pub(super) fn proof(&self, key: &KeyPair) -> Vec<u8> {
        let mut request = vec![message::USERAUTH_REQUEST];
        request.put_string("root").put_string("ssh-connection").put_string("publickey").put_byte(1);
        request.put_string(ED25519).put_string(key.public().blob());
        let mut signed = Vec::new();
        signed.put_string(&self.session);
        signed.extend_from_slice(&request);
        request.put_string(key.sign(&signed));
        request
    }

    /// All the way in.
    pub(super) async fn enter(&mut self, key: &KeyPair) {
        let switch = self.exchange().await;
        self.switch(switch).await;
        self.ask_to_enter().await;
        let proof = self.proof(key);
        self.say(&proof).await;
        assert_eq!(self.hear().await.unwrap(), [message::USERAUTH_SUCCESS]);
    }

    /// Opens a session under the number `own`; the server's number.
    pub(super) async fn open_session(&mut self, own: u32) -> u32 {
        let mut open = vec![message::CHANNEL_OPEN];
        open.put_string("session").put_number(own).put_number(1 << 20).put_number(32 << 10);
        self.say(&open).await;
        let answer = self.hear().await.unwrap();
        assert_eq!(answer[0], message::CHANNEL_OPEN_CONFIRMATION, "{answer:?}");
        let mut fields = Reader::new(&answer[1..], "answer");
        assert_eq!(fields.number().unwrap(), own);
        fields.number().unwrap()
    }

    /// Sends a message.
    pub(super) async fn say(&mut self, payload: &[u8]) {
        let outside = if self.sealing.is_some() { 0 } else { 4 };
        let padding = 4 + (8 - (outside + 1 + payload.len() + 4) % 8) % 8;
        let mut packet = Vec::new();
        packet.put_number(u32::try_from(1 + payload.len() + padding).unwrap());
        packet.put_byte(u8::try_from(padding).unwrap());
        packet.extend_from_slice(payload);
        packet.resize(packet.len() + padding, 0);
        if let Some(key) = &self.sealing {
            let mut tag = [0; TAG_LEN];
            key.seal_in_place(self.sent, &mut packet, &mut tag);
            packet.extend_from_slice(&tag);
        }
        self.sent = self.sent.wrapping_add(1);
        // A server that has hung up is noticed when it is heard.
        let _ = self.stream.write_all(&packet).await;
    }

    /// The next message; `None` at the end.
    pub(super) async fn hear(&mut self) -> Option<Vec<u8>> {
        let mut packet = vec![0; 4];
        self.stream.read_exact(&mut packet).await.ok()?;
        let head = [packet[0], packet[1], packet[2], packet[3]];
        let head = match &self.opening {
            Some(key) => key.decrypt_packet_length(self.received, head),
            None => head,
        };
        let length = u32::from_be_bytes(head) as usize;
        packet.resize(4 + length, 0);
        self.stream.read_exact(&mut packet[4..]).await.ok()?;
        let plain = match &self.opening {
            Some(key) => {
                let mut tag = [0; TAG_LEN];
                self.stream.read_exact(&mut tag).await.ok()?;
                key.open_in_place(self.received, &mut packet, &tag).expect("authentic").to_vec()
            }
            None => packet[4..].to_vec(),
        };
        self.received = self.received.wrapping_add(1);
        let payload = plain.len() - 1 - usize::from(plain[0]);
        Some(plain[1..=payload].to_vec())
    }

    /// Everything up to the end.
    pub(super) async fn hear_all(&mut self) -> Vec<Vec<u8>> {
        let mut heard = Vec::new();
        while let Some(payload) = self.hear().await {
            heard.push(payload);
        }
        heard
    }
}
