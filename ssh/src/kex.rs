//! Key exchange: `curve25519-sha256` (RFC 8731) with an Ed25519 host key, and `strict kex` against prefix truncation.

use ring::agreement::{EphemeralPrivateKey, UnparsedPublicKey, X25519, agree_ephemeral};
use ring::digest::{Context, SHA256};
use ring::rand::{SecureRandom as _, SystemRandom};

use crate::keys::{ED25519, KeyPair};
use crate::wire::{Put as _, Reader};
use crate::{SshError, message};

/// The exchange, by its standard and its older name.
const EXCHANGES: [&str; 2] = ["curve25519-sha256", "curve25519-sha256@libssh.org"];
/// The cipher, which authenticates too: what OpenSSH prefers.
const CIPHER: &str = "chacha20-poly1305@openssh.com";
/// How a server says that it counts packets anew with every key (`PROTOCOL` of OpenSSH, 1.10).
const STRICT_SERVER: &str = "kex-strict-s-v00@openssh.com";
/// How a client says it.
const STRICT_CLIENT: &str = "kex-strict-c-v00@openssh.com";
/// How a client asks for [`message::EXT_INFO`].
const WANTS_INFO: &str = "ext-info-c";
/// Bytes of key for one direction of the cipher.
pub(crate) const KEY_LENGTH: usize = 64;

/// What identifies the first exchange, and with it the connection.
pub(crate) type SessionId = [u8; 32];

/// What a server offers.
pub(crate) fn offer() -> Result<Vec<u8>, SshError> {
    let mut cookie = [0; 16];
    SystemRandom::new().fill(&mut cookie).map_err(|_| SshError::Crypto("no random bytes"))?;
    let mut offer = vec![message::KEXINIT];
    offer.extend_from_slice(&cookie);
    offer.put_string(format!("{},{},{STRICT_SERVER}", EXCHANGES[0], EXCHANGES[1])).put_string(ED25519);
    offer.put_string(CIPHER).put_string(CIPHER);
    // The cipher brings its own; a client wants to see a name.
    offer.put_string("hmac-sha2-256").put_string("hmac-sha2-256");
    offer.put_string("none").put_string("none").put_string("").put_string("");
    offer.put_byte(0).put_number(0);
    Ok(offer)
}

/// What a client's offer comes to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Agreed {
    /// The client has sent the first message of another exchange already.
    pub(crate) wrong_guess: bool,
    /// Packets are counted anew with every key.
    pub(crate) strict: bool,
    /// The client wants to know what it may sign with.
    pub(crate) wants_info: bool,
}

/// Reads a client's offer.
pub(crate) fn agree(offer: &[u8]) -> Result<Agreed, SshError> {
    let mut fields = Reader::new(offer.get(17..).unwrap_or_default(), "offer of algorithms");
    let mut list = || fields.text();
    let (exchanges, host_keys) = (list()?, list()?);
    let (ciphers_in, ciphers_out) = (list()?, list()?);
    let (_macs_in, _macs_out) = (list()?, list()?);
    let (compressions_in, compressions_out) = (list()?, list()?);
    let (_languages_in, _languages_out) = (list()?, list()?);
    let guesses = fields.boolean()?;
    let has = |list: &str, name: &str| list.split(',').any(|offered| offered == name);
    if !EXCHANGES.iter().any(|exchange| has(exchanges, exchange)) {
        return Err(SshError::NoCommon("key exchange"));
    }
    for (list, name, what) in [
        (host_keys, ED25519, "kind of host key"),
        (ciphers_in, CIPHER, "cipher"),
        (ciphers_out, CIPHER, "cipher"),
        (compressions_in, "none", "compression"),
        (compressions_out, "none", "compression"),
    ] {
        if !has(list, name) {
            return Err(SshError::NoCommon(what));
        }
    }
    let first = |list: &str, name: &str| list.split(',').next() == Some(name);
    Ok(Agreed {
        wrong_guess: guesses && !(first(exchanges, EXCHANGES[0]) && first(host_keys, ED25519)),
        strict: has(exchanges, STRICT_CLIENT),
        wants_info: has(exchanges, WANTS_INFO),
    })
}

/// The keys of both directions.
pub(crate) struct Keys {
    pub(crate) from_client: [u8; KEY_LENGTH],
    pub(crate) to_client: [u8; KEY_LENGTH],
}

/// What both sides have said so far.
pub(crate) struct Said<'a> {
    pub(crate) client_version: &'a [u8],
    pub(crate) server_version: &'a [u8],
    pub(crate) client_offer: &'a [u8],
    pub(crate) server_offer: &'a [u8],
}

/// What comes of an exchange.
pub(crate) struct Exchanged {
    /// To be sent.
    pub(crate) reply: Vec<u8>,
    pub(crate) keys: Keys,
    /// Of the first exchange; later ones keep it.
    pub(crate) session: SessionId,
}

/// Answers a client's half of the exchange (RFC 8731 §3).
pub(crate) fn exchange(
    init: &[u8],
    said: &Said<'_>,
    host_key: &KeyPair,
    session: Option<SessionId>,
) -> Result<Exchanged, SshError> {
    let failed = || SshError::Crypto("the key exchange");
    let mut fields = Reader::new(init.get(1..).unwrap_or_default(), "key exchange");
    let theirs = fields.string()?;
    let private = EphemeralPrivateKey::generate(&X25519, &SystemRandom::new()).map_err(|_| failed())?;
    let ours = private.compute_public_key().map_err(|_| failed())?;
    let mut secret = Vec::new();
    // A point of low order gives no secret; the library refuses it.
    agree_ephemeral(private, &UnparsedPublicKey::new(&X25519, theirs), |bytes| {
        secret.put_integer(bytes);
    })
    .map_err(|_| failed())?;
    let host_blob = host_key.public().blob().to_vec();
    let mut hashed = Vec::new();
    for field in
        [said.client_version, said.server_version, said.client_offer, said.server_offer, &host_blob, theirs]
    {
        hashed.put_string(field);
    }
    hashed.put_string(ours.as_ref());
    hashed.extend_from_slice(&secret);
    let hash = sha256(&[&hashed]);
    let session = session.unwrap_or(hash);
    let mut reply = vec![message::KEX_ECDH_REPLY];
    reply.put_string(&host_blob).put_string(ours.as_ref()).put_string(host_key.sign(&hash));
    let derive = |letter: u8| {
        let mut key = [0; KEY_LENGTH];
        let (first, second) = key.split_at_mut(32);
        first.copy_from_slice(&sha256(&[&secret, &hash, &[letter], &session]));
        second.copy_from_slice(&sha256(&[&secret, &hash, first]));
        key
    };
    let keys = Keys { from_client: derive(b'C'), to_client: derive(b'D') };
    Ok(Exchanged { reply, keys, session })
}

fn sha256(parts: &[&[u8]]) -> [u8; 32] {
    let mut context = Context::new(&SHA256);
    for part in parts {
        context.update(part);
    }
    let mut hash = [0; 32];
    hash.copy_from_slice(context.finish().as_ref());
    hash
}

#[cfg(test)]
mod tests {
    use super::*;

    fn client(exchanges: &str, cipher: &str, guesses: bool) -> Vec<u8> {
        let mut offer = vec![message::KEXINIT];
        offer.extend_from_slice(&[0; 16]);
        for list in [exchanges, ED25519, cipher, cipher, "", "", "none", "none", "", ""] {
            offer.put_string(list);
        }
        offer.put_byte(guesses.into()).put_number(0);
        offer
    }

    #[test]
    fn offers_come_to_what_both_have() {
        let both = "sntrup761x25519-sha512,curve25519-sha256,ext-info-c,kex-strict-c-v00@openssh.com";
        let agreed = agree(&client(both, CIPHER, false)).unwrap();
        assert_eq!(agreed, Agreed { wrong_guess: false, strict: true, wants_info: true });
        assert!(agree(&client(both, CIPHER, true)).unwrap().wrong_guess);
        let old = agree(&client(EXCHANGES[1], CIPHER, false)).unwrap();
        assert_eq!(old, Agreed { wrong_guess: false, strict: false, wants_info: false });
        assert!(matches!(
            agree(&client("diffie-hellman-group1-sha1", CIPHER, false)),
            Err(SshError::NoCommon(_))
        ));
        assert!(matches!(agree(&client(both, "3des-cbc", false)), Err(SshError::NoCommon("cipher"))));
    }

    #[test]
    fn an_offer_that_ends_early_and_a_point_of_low_order_are_refused() {
        let whole = client(EXCHANGES[0], CIPHER, false);
        for length in 0..whole.len() - 4 {
            assert!(agree(&whole[..length]).is_err(), "{length}");
        }
        let said = Said { client_version: b"", server_version: b"", client_offer: b"", server_offer: b"" };
        let key = KeyPair::generate().unwrap();
        for point in [&[0; 32][..], &[1; 31], &[]] {
            let mut init = vec![message::KEX_ECDH_INIT];
            init.put_string(point);
            assert!(exchange(&init, &said, &key, None).is_err(), "{point:?}");
        }
    }
}
