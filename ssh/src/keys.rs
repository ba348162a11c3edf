//! Keys: those that Kiln makes, which are Ed25519, and those that users bring.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use ring::digest::{SHA256, digest};
use ring::rand::{SecureRandom as _, SystemRandom};
use ring::signature::{self, Ed25519KeyPair, KeyPair as _, RsaPublicKeyComponents, UnparsedPublicKey};

use crate::SshError;
use crate::wire::{Put as _, Reader};

/// The only kind of key that Kiln makes.
pub(crate) const ED25519: &str = "ssh-ed25519";
/// What a client may sign with, as servers tell it (RFC 8308 §3.1).
pub(crate) const SIGNATURES: &str = "ssh-ed25519,sk-ssh-ed25519@openssh.com,ecdsa-sha2-nistp256,ecdsa-sha2-nistp384,rsa-sha2-512,rsa-sha2-256";
/// How a file of a private key begins and ends.
const BEGIN: &str = "-----BEGIN OPENSSH PRIVATE KEY-----";
const END: &str = "-----END OPENSSH PRIVATE KEY-----";
/// What is between them begins with this.
const MAGIC: &[u8] = b"openssh-key-v1\0";
/// The longest public key that is read, in bytes: an RSA key of 8192 bits has some 1100.
const LONGEST: usize = 4096;

/// A pair of Ed25519 keys.
pub struct KeyPair {
    seed: [u8; 32],
    pair: Ed25519KeyPair,
}

impl std::fmt::Debug for KeyPair {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("KeyPair").field("public", &self.public().to_string()).finish_non_exhaustive()
    }
}

impl KeyPair {
    /// A new one.
    ///
    /// # Errors
    /// [`SshError::Crypto`] if the operating system gives no random bytes.
    pub fn generate() -> Result<Self, SshError> {
        let mut seed = [0; 32];
        SystemRandom::new().fill(&mut seed).map_err(|_| SshError::Crypto("no random bytes"))?;
        Self::from_seed(seed)
    }

    /// The one of a seed (RFC 8032 §5.1.5).
    ///
    /// # Errors
    /// None in practice: every seed is one.
    pub fn from_seed(seed: [u8; 32]) -> Result<Self, SshError> {
        let pair =
            Ed25519KeyPair::from_seed_unchecked(&seed).map_err(|_| SshError::Crypto("the key's seed"))?;
        Ok(Self { seed, pair })
    }

    /// Reads what [`Self::to_file`] writes.
    ///
    /// # Errors
    /// [`SshError::Malformed`] for anything else; also for a key of another kind, or with a passphrase.
    pub fn from_file(text: &str) -> Result<Self, SshError> {
        let wrong = || SshError::Malformed("private key");
        let inner =
            text.trim().strip_prefix(BEGIN).and_then(|text| text.strip_suffix(END)).ok_or_else(wrong)?;
        let encoded: String = inner.split_ascii_whitespace().collect();
        let file = BASE64.decode(encoded).map_err(|_| wrong())?;
        let file = file.strip_prefix(MAGIC).ok_or_else(wrong)?;
        let mut fields = Reader::new(file, "private key");
        if (fields.string()?, fields.string()?) != (b"none", b"none") {
            return Err(wrong());
        }
        let (_options, count, public) = (fields.string()?, fields.number()?, fields.string()?);
        let mut private = Reader::new(fields.string()?, "private key");
        let equal = private.number()? == private.number()?;
        if count != 1 || !equal || private.text()? != ED25519 {
            return Err(wrong());
        }
        let _public = private.string()?;
        let seed = private.string()?.first_chunk::<32>().ok_or_else(wrong)?;
        let pair = Self::from_seed(*seed)?;
        if pair.public().blob == public { Ok(pair) } else { Err(wrong()) }
    }

    /// What it is made from: the secret.
    pub fn seed(&self) -> &[u8; 32] {
        &self.seed
    }

    /// What others may know.
    pub fn public(&self) -> PublicKey {
        let mut blob = Vec::new();
        blob.put_string(ED25519).put_string(self.pair.public_key());
        PublicKey { blob }
    }

    pub(crate) fn sign(&self, message: &[u8]) -> Vec<u8> {
        let mut signature = Vec::new();
        signature.put_string(ED25519).put_string(self.pair.sign(message));
        signature
    }

    /// The private key as OpenSSH keeps it in a file, without a passphrase (`PROTOCOL.key`).
    pub fn to_file(&self, comment: &str) -> String {
        let public = self.public();
        let mut private = Vec::new();
        // Two equal numbers show who decrypts that the passphrase was right; here there is none.
        private.put_number(0).put_number(0);
        private.put_string(ED25519).put_string(self.pair.public_key());
        private.put_string([&self.seed[..], self.pair.public_key().as_ref()].concat()).put_string(comment);
        for padding in 1..=8 {
            if private.len().is_multiple_of(8) {
                break;
            }
            private.push(padding);
        }
        let mut file = MAGIC.to_vec();
        file.put_string("none").put_string("none").put_string("").put_number(1);
        file.put_string(&public.blob).put_string(private);
        let mut text = format!("{BEGIN}\n");
        let encoded = BASE64.encode(file);
        for line in encoded.as_bytes().chunks(70) {
            text.extend(line.iter().copied().map(char::from));
            text.push('\n');
        }
        text + END + "\n"
    }
}

/// A public key of any kind that a client may have.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PublicKey {
    blob: Vec<u8>,
}

impl PublicKey {
    /// A key as it travels (RFC 4253 §6.6).
    pub fn from_blob(blob: Vec<u8>) -> Self {
        Self { blob }
    }

    /// As it travels.
    pub fn blob(&self) -> &[u8] {
        &self.blob
    }

    /// Reads a line of a `.pub` file: `algorithm base64 comment`.
    ///
    /// # Errors
    /// [`SshError::Malformed`] for what is no such line; [`SshError::NoCommon`] for a kind of key that cannot be verified here.
    pub fn parse(line: &str) -> Result<Self, SshError> {
        let mut words = line.split_ascii_whitespace();
        let (Some(algorithm), Some(encoded)) = (words.next(), words.next()) else {
            return Err(SshError::Malformed("public key"));
        };
        let blob = BASE64.decode(encoded).map_err(|_| SshError::Malformed("public key"))?;
        let inner = Reader::new(&blob, "public key").text()?;
        if inner != algorithm || blob.len() > LONGEST {
            return Err(SshError::Malformed("public key"));
        }
        let known = algorithm == "ssh-rsa" || SIGNATURES.split(',').any(|known| known == algorithm);
        if known { Ok(Self { blob }) } else { Err(SshError::NoCommon("kind of key")) }
    }

    /// Whether `signature`, made with `algorithm`, is this key's under `message`.
    pub(crate) fn verify(&self, algorithm: &str, message: &[u8], signature: &[u8]) -> Result<(), SshError> {
        let wrong = || SshError::Crypto("the client's signature");
        let mut key = Reader::new(&self.blob, "public key");
        let mut signature = Reader::new(signature, "signature");
        let kind = key.text()?;
        if signature.text()? != algorithm {
            return Err(wrong());
        }
        let bytes = signature.string()?;
        match (kind, algorithm) {
            (ED25519, ED25519) => UnparsedPublicKey::new(&signature::ED25519, key.string()?)
                .verify(message, bytes)
                .map_err(|_| wrong()),
            ("sk-ssh-ed25519@openssh.com", "sk-ssh-ed25519@openssh.com") => {
                // A token signs who asks, that somebody touched it, a counter, and the message (`PROTOCOL.u2f`).
                let (public, application) = (key.string()?, key.string()?);
                let (flags, counter) = (signature.byte()?, signature.number()?);
                let mut signed = digest(&SHA256, application).as_ref().to_vec();
                signed.put_byte(flags).put_number(counter);
                signed.extend_from_slice(digest(&SHA256, message).as_ref());
                if flags & 1 == 0 {
                    return Err(wrong());
                }
                UnparsedPublicKey::new(&signature::ED25519, public)
                    .verify(&signed, bytes)
                    .map_err(|_| wrong())
            }
            ("ecdsa-sha2-nistp256", "ecdsa-sha2-nistp256") => {
                let _curve = key.string()?;
                let fixed = fixed(bytes, 32)?;
                UnparsedPublicKey::new(&signature::ECDSA_P256_SHA256_FIXED, key.string()?)
                    .verify(message, &fixed)
                    .map_err(|_| wrong())
            }
            ("ecdsa-sha2-nistp384", "ecdsa-sha2-nistp384") => {
                let _curve = key.string()?;
                let fixed = fixed(bytes, 48)?;
                UnparsedPublicKey::new(&signature::ECDSA_P384_SHA384_FIXED, key.string()?)
                    .verify(message, &fixed)
                    .map_err(|_| wrong())
            }
            ("ssh-rsa", "rsa-sha2-256" | "rsa-sha2-512") => {
                let (e, n) = (key.integer()?, key.integer()?);
                let parameters = if algorithm == "rsa-sha2-256" {
                    &signature::RSA_PKCS1_2048_8192_SHA256
                } else {
                    &signature::RSA_PKCS1_2048_8192_SHA512
                };
                RsaPublicKeyComponents { n, e }.verify(parameters, message, bytes).map_err(|_| wrong())
            }
            _ => Err(wrong()),
        }
    }
}

impl std::fmt::Display for PublicKey {
    /// `algorithm base64`, as in `.pub` files and `known_hosts`.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let algorithm = Reader::new(&self.blob, "public key").text().unwrap_or("unknown");
        write!(f, "{algorithm} {}", BASE64.encode(&self.blob))
    }
}

/// Two integers as `size` bytes each.
fn fixed(signature: &[u8], size: usize) -> Result<Vec<u8>, SshError> {
    let mut signature = Reader::new(signature, "signature");
    let mut both = Vec::with_capacity(2 * size);
    for _ in 0..2 {
        let integer = signature.integer()?;
        let zeros = size.checked_sub(integer.len()).ok_or(SshError::Malformed("signature"))?;
        both.resize(both.len() + zeros, 0);
        both.extend_from_slice(integer);
    }
    Ok(both)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_gives_the_key_that_the_standard_says() {
        // RFC 8032 §7.1, test 1.
        let seed = [
            0x9d, 0x61, 0xb1, 0x9d, 0xef, 0xfd, 0x5a, 0x60, 0xba, 0x84, 0x4a, 0xf4, 0x92, 0xec, 0x2c, 0xc4,
            0x44, 0x49, 0xc5, 0x69, 0x7b, 0x32, 0x69, 0x19, 0x70, 0x3b, 0xac, 0x03, 0x1c, 0xae, 0x7f, 0x60,
        ];
        let pair = KeyPair::from_seed(seed).unwrap();
        assert_eq!(
            pair.public().to_string(),
            "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAINdamAGCsQq31Uv+08lkBzoO4XLz2qYjJa8CGmj3B1Ea"
        );
        assert_eq!(PublicKey::parse(&format!("{} someone", pair.public())).unwrap(), pair.public());
        let signature = pair.sign(b"words");
        pair.public().verify(ED25519, b"words", &signature).unwrap();
        assert!(pair.public().verify(ED25519, b"other words", &signature).is_err());
    }

    #[test]
    fn a_file_of_a_key_is_read_back_and_a_damaged_one_is_refused() {
        let pair = KeyPair::generate().unwrap();
        let file = pair.to_file("a comment");
        assert_eq!(KeyPair::from_file(&file).unwrap().seed(), pair.seed());
        for length in 0..file.len() - 2 {
            assert!(KeyPair::from_file(&file[..length]).is_err(), "{length}");
        }
        let other = KeyPair::generate().unwrap().to_file("a comment");
        // The public half of one with the private half of another.
        let mixed: String = file
            .lines()
            .zip(other.lines())
            .enumerate()
            .map(|(index, (one, two))| format!("{}\n", if index < 3 { one } else { two }))
            .collect();
        assert!(KeyPair::from_file(&mixed).is_err());
    }

    #[test]
    fn what_is_no_public_key_is_refused() {
        let own = KeyPair::generate().unwrap().public().to_string();
        let other_name = own.replacen("ssh-ed25519", "ssh-rsa", 1);
        for line in ["", "ssh-ed25519", "ssh-ed25519 %%%", "ssh-ed25519 AAAA", &other_name] {
            assert!(PublicKey::parse(line).is_err(), "{line}");
        }
    }
}
