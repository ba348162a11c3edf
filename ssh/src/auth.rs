//! Authentication by public key (RFC 4252 §7).

use crate::keys::PublicKey;
use crate::wire::{Put as _, Reader};
use crate::{SshError, message};

/// How often a client may try: agents offer every key they have.
const MOST_ATTEMPTS: u32 = 32;

/// What comes of an attempt.
pub(crate) enum Attempt {
    /// To be sent; nobody has entered.
    Answer(Vec<u8>),
    /// This user has entered.
    Entered(String),
}

/// Whoever wants to enter.
#[derive(Debug, Default)]
pub(crate) struct Entrance {
    attempts: u32,
}

impl Entrance {
    /// Reads an attempt. `session` is what it must be bound to, `authorised` the keys that may enter, and `knows` says of a
    /// user whether there is one.
    pub(crate) fn attempt(
        &mut self,
        payload: &[u8],
        session: &[u8],
        authorised: &[PublicKey],
        knows: impl FnOnce(&str) -> bool,
    ) -> Result<Attempt, SshError> {
        self.attempts += 1;
        if self.attempts > MOST_ATTEMPTS {
            return Err(SshError::NotAuthorised);
        }
        let mut fields = Reader::new(payload.get(1..).unwrap_or_default(), "request to enter");
        let (user, service, method) = (fields.text()?, fields.text()?, fields.text()?);
        if service != "ssh-connection" {
            return Err(SshError::Protocol("a service that is not there"));
        }
        if method != "publickey" {
            return Ok(Attempt::Answer(refusal()));
        }
        let (signed, algorithm, blob) = (fields.boolean()?, fields.text()?, fields.string()?);
        let Some(key) = authorised.iter().find(|key| key.blob() == blob) else {
            return Ok(Attempt::Answer(refusal()));
        };
        if !signed {
            let mut answer = vec![message::USERAUTH_PK_OK];
            answer.put_string(algorithm).put_string(blob);
            return Ok(Attempt::Answer(answer));
        }
        let mut message = Vec::new();
        message.put_string(session).put_byte(message::USERAUTH_REQUEST);
        message.put_string(user).put_string(service).put_string(method).put_byte(1);
        message.put_string(algorithm).put_string(blob);
        if key.verify(algorithm, &message, fields.string()?).is_err() || !knows(user) {
            return Ok(Attempt::Answer(refusal()));
        }
        Ok(Attempt::Entered(user.to_owned()))
    }
}

fn refusal() -> Vec<u8> {
    let mut answer = vec![message::USERAUTH_FAILURE];
    answer.put_string("publickey").put_byte(0);
    answer
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::keys::{ED25519, KeyPair};

    fn request(user: &str, pair: &KeyPair, session: &[u8]) -> Vec<u8> {
        let mut request = vec![message::USERAUTH_REQUEST];
        request.put_string(user).put_string("ssh-connection").put_string("publickey").put_byte(1);
        request.put_string(ED25519).put_string(pair.public().blob());
        let mut signed = Vec::new();
        signed.put_string(session);
        signed.extend_from_slice(&request);
        let signature = pair.sign(&signed);
        request.put_string(signature);
        request
    }

    #[test]
    fn only_who_has_an_authorised_key_for_this_connection_enters() {
        let (own, other) = (KeyPair::generate().unwrap(), KeyPair::generate().unwrap());
        let authorised = [own.public()];
        let enters = |request: &[u8], user_is_there: bool| {
            let attempt = Entrance::default().attempt(request, b"this", &authorised, |_| user_is_there);
            match attempt.unwrap() {
                Attempt::Entered(user) => Some(user),
                Attempt::Answer(answer) => {
                    assert_eq!(answer[0], message::USERAUTH_FAILURE);
                    None
                }
            }
        };
        assert_eq!(enters(&request("root", &own, b"this"), true).as_deref(), Some("root"));
        assert_eq!(enters(&request("root", &own, b"this"), false), None, "no such user");
        assert_eq!(enters(&request("root", &own, b"that"), true), None, "replayed from another connection");
        assert_eq!(enters(&request("root", &other, b"this"), true), None, "a key of somebody else");
        // Signed for one user, sent for another.
        let mut changed = request("aaaa", &own, b"this");
        changed[5..9].copy_from_slice(b"root");
        assert_eq!(enters(&changed, true), None);
    }

    #[test]
    fn attempts_have_an_end() {
        let mut entrance = Entrance::default();
        let request = request("root", &KeyPair::generate().unwrap(), b"this");
        let mut attempt = || entrance.attempt(&request, b"this", &[], |_| true);
        for _ in 0..MOST_ATTEMPTS {
            assert!(matches!(attempt(), Ok(Attempt::Answer(_))));
        }
        assert!(matches!(attempt(), Err(SshError::NotAuthorised)));
    }
}
