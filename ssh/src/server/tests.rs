//! What clients may not do, and what becomes of it.

mod client;

use std::sync::Mutex;
use std::time::Duration;

use client::Client;

use super::*;
use crate::Event;

/// Longer than anything takes.
const FOR_EVER: Duration = Duration::from_secs(3600);

/// Serves sessions that grant everything and take all data; those that are asked for a shell end at once.
#[derive(Debug, Default)]
struct Granting {
    asked: Arc<Mutex<Vec<Request>>>,
    openings: Vec<Opening>,
}

impl Handler for Granting {
    fn knows(&mut self, _: &str) -> bool {
        true
    }

    fn session(&mut self, _: &str, channel: Channel) {
        let asked = Arc::clone(&self.asked);
        tokio::spawn(async move {
            loop {
                match channel.next(true).await {
                    Event::Request(request, wants_answer) => {
                        asked.lock().unwrap().push(request.clone());
                        channel.answer(wants_answer, !matches!(request, Request::Other(_)));
                        if request == Request::Shell {
                            return;
                        }
                    }
                    Event::Closed => return,
                    Event::Data(_) | Event::End => {}
                }
            }
        });
    }

    /// Never connects.
    fn connect(&mut self, _: &str, _: u16, opening: Opening) {
        self.openings.push(opening);
    }

    /// Somebody connects at once.
    fn listen(&mut self, _: &str, port: u16, opener: Opener) -> Option<u16> {
        tokio::spawn(async move { opener.forwarded("", port, ([127, 0, 0, 1], 1).into()).await });
        Some(port)
    }

    fn unlisten(&mut self, _: &str, _: u16) -> bool {
        false
    }
}

/// What the server says of a client in the end, and what it was asked for.
async fn serve_to(
    strict: bool,
    client: impl AsyncFnOnce(&mut Client, &KeyPair),
) -> (Result<(), SshError>, Vec<Request>) {
    let (near, far) = tokio::io::duplex(16 << 10);
    let own = KeyPair::generate().unwrap();
    let identity = Identity { host_key: KeyPair::generate().unwrap(), authorised: vec![own.public()] };
    let handler = Granting::default();
    let asked = Arc::clone(&handler.asked);
    let behave = async {
        let mut behaving = Client::new(near, strict);
        client(&mut behaving, &own).await;
    };
    let both = async { tokio::join!(serve(far, &identity, handler), behave) };
    // Time passes only when nothing else happens any more.
    let (outcome, ()) = tokio::time::timeout(2 * FOR_EVER, both).await.expect("neither waits for the other");
    let asked = asked.lock().unwrap().clone();
    (outcome, asked)
}

/// A request on a channel.
fn channel_request(channel: u32, name: &str, wants_answer: bool, rest: &[u8]) -> Vec<u8> {
    let mut request = vec![message::CHANNEL_REQUEST];
    request.put_number(channel).put_string(name).put_byte(wants_answer.into());
    request.extend_from_slice(rest);
    request
}

/// A global request.
fn global_request(name: &str, wants_answer: bool) -> Vec<u8> {
    let mut request = vec![message::GLOBAL_REQUEST];
    request.put_string(name).put_byte(wants_answer.into());
    request
}

fn text(text: impl AsRef<[u8]>) -> Vec<u8> {
    let mut field = Vec::new();
    field.put_string(text);
    field
}

fn numbers(kind: u8, numbers: &[u32]) -> Vec<u8> {
    let mut payload = vec![kind];
    for number in numbers {
        payload.put_number(*number);
    }
    payload
}

#[tokio::test(start_paused = true)]
async fn nothing_but_entering_is_heard_of_who_has_not_entered() {
    let mut session = vec![message::CHANNEL_OPEN];
    session.put_string("session").put_number(0).put_number(1 << 20).put_number(1 << 15);
    for (asks, payload) in [
        (true, session.clone()),
        (false, session),
        (true, global_request("tcpip-forward", true)),
        (true, channel_request(1, "exec", true, &text("id"))),
        // What only a server says.
        (true, vec![message::USERAUTH_SUCCESS]),
        (true, vec![message::SERVICE_ACCEPT]),
        (true, vec![message::USERAUTH_PK_OK]),
        (false, [&[message::SERVICE_REQUEST][..], &text("ssh-connection")].concat()),
        // A proof before it was asked for.
        (false, Vec::new()),
    ] {
        let said = payload.clone();
        let (outcome, asked) = serve_to(true, async |client, own| {
            let switch = client.exchange().await;
            client.switch(switch).await;
            if asks {
                client.ask_to_enter().await;
            }
            let payload = if payload.is_empty() { client.proof(own) } else { payload };
            client.say(&payload).await;
            let heard = client.hear_all().await;
            assert_eq!(heard.iter().map(|payload| payload[0]).collect::<Vec<_>>(), [message::DISCONNECT]);
        })
        .await;
        assert!(matches!(outcome, Err(SshError::Protocol(_))), "{said:?}: {outcome:?}");
        assert!(asked.is_empty());
    }
}

#[tokio::test(start_paused = true)]
async fn in_a_strict_exchange_nothing_is_heard_before_the_new_keys() {
    let mut ignored = vec![message::IGNORE];
    ignored.put_string("");
    for (strict, unimplemented) in [(true, false), (true, true), (false, false)] {
        let (outcome, _) = serve_to(strict, async |client, own| {
            let switch = client.exchange().await;
            let extra = if unimplemented { numbers(message::UNIMPLEMENTED, &[0]) } else { ignored.clone() };
            client.say(&extra).await;
            client.switch(switch).await;
            if !strict {
                client.ask_to_enter().await;
                let proof = client.proof(own);
                client.say(&proof).await;
                assert_eq!(client.hear().await.unwrap(), [message::USERAUTH_SUCCESS]);
                client.say(&numbers(message::DISCONNECT, &[11, 0, 0])).await;
            }
            client.hear_all().await;
        })
        .await;
        assert_eq!(outcome.is_err(), strict, "{outcome:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn who_asks_and_does_not_read_the_answers_is_not_heard_for_ever() {
    const MOST: usize = 4 << 20;
    serve_to(true, async |client, own| {
        client.enter(own).await;
        let channel = client.open_session(0).await;
        let size = numbers(0, &[80, 24, 0, 0]);
        let request = channel_request(channel, "window-change", true, &size[1..]);
        let mut said = 0;
        let flood = async {
            while said < MOST {
                client.say(&request).await;
                said += request.len();
                // The session answers.
                tokio::task::yield_now().await;
            }
        };
        let stopped = tokio::time::timeout(FOR_EVER, flood).await;
        assert!(stopped.is_err(), "{MOST} bytes of requests were heard");
    })
    .await
    .0
    .expect_err("the client has gone in the middle of a message");
}

#[tokio::test(start_paused = true)]
async fn a_channel_that_is_closed_grants_nothing_more() {
    let (outcome, _) = serve_to(true, async |client, own| {
        client.enter(own).await;
        let channel = client.open_session(5).await;
        client.say(&channel_request(channel, "shell", false, &[])).await;
        assert_eq!(client.hear().await.unwrap(), numbers(message::CHANNEL_CLOSE, &[5]));
        // What was under way.
        let data = vec![1; 32 << 10];
        for _ in 0..WINDOW / LONGEST_DATA {
            let mut payload = numbers(message::CHANNEL_DATA, &[channel]);
            payload.put_string(&data);
            client.say(&payload).await;
        }
        client.say(&numbers(message::CHANNEL_CLOSE, &[channel])).await;
        client.say(&global_request("keepalive@openssh.com", true)).await;
        // Another channel of the client may have that number by now.
        assert_eq!(client.hear().await.unwrap(), [message::REQUEST_FAILURE]);
        client.say(&numbers(message::DISCONNECT, &[11, 0, 0])).await;
    })
    .await;
    outcome.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_request_that_cannot_be_granted_ends_nothing_else() {
    let long = vec![b'x'; LONGEST_TEXT + 1];
    let (outcome, asked) = serve_to(true, async |client, own| {
        client.enter(own).await;
        let channel = client.open_session(0).await;
        for (name, rest) in [
            ("exec", text(b"ls \xff")),
            ("exec", text("a\0b")),
            ("exec", text(&long)),
            ("env", [text("LANG"), text(b"\xe4")].concat()),
            ("subsystem", text(b"\xff")),
        ] {
            client.say(&channel_request(channel, name, true, &rest)).await;
            let refused = numbers(message::CHANNEL_FAILURE, &[0]);
            assert_eq!(client.hear().await.expect("the connection lasts"), refused, "{name}");
        }
        client.say(&channel_request(channel, "exec", true, &text("ls"))).await;
        assert_eq!(client.hear().await.unwrap(), numbers(message::CHANNEL_SUCCESS, &[0]));
        // What is cut off is no request.
        client.say(&channel_request(channel, "exec", true, &[0, 0, 0, 9, 1])).await;
        client.hear_all().await;
    })
    .await;
    assert!(matches!(outcome, Err(SshError::Malformed(_))), "{outcome:?}");
    assert_eq!(asked.last(), Some(&Request::Command("ls".to_owned())));
}

#[tokio::test(start_paused = true)]
async fn many_requests_may_wait_but_not_without_bound() {
    for (count, bytes, good) in
        [(1000, 10, true), (5, 40 << 10, true), (1500, 10, false), (20, 40 << 10, false)]
    {
        let (outcome, _) = serve_to(true, async |client, own| {
            client.enter(own).await;
            let mut open = vec![message::CHANNEL_OPEN];
            open.put_string("direct-tcpip").put_number(0).put_number(1 << 20).put_number(32 << 10);
            open.put_string("localhost").put_number(80).put_string("localhost").put_number(1);
            client.say(&open).await;
            for number in 0..count {
                let words = [text(format!("V{number}")), text(vec![b'x'; bytes])].concat();
                client.say(&channel_request(1, "env", false, &words)).await;
            }
            client.say(&numbers(message::DISCONNECT, &[11, 0, 0])).await;
            client.hear_all().await;
        })
        .await;
        assert_eq!(outcome.is_ok(), good, "{count} of {bytes}: {outcome:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn who_wanted_no_more_sessions_gets_none() {
    let (outcome, _) = serve_to(true, async |client, own| {
        client.enter(own).await;
        client.open_session(0).await;
        client.say(&global_request("no-more-sessions@openssh.com", false)).await;
        let mut open = vec![message::CHANNEL_OPEN];
        open.put_string("session").put_number(1).put_number(1 << 20).put_number(32 << 10);
        client.say(&open).await;
        let heard = client.hear_all().await;
        assert_eq!(heard.iter().map(|payload| payload[0]).collect::<Vec<_>>(), [message::DISCONNECT]);
    })
    .await;
    assert!(matches!(outcome, Err(SshError::Protocol(_))), "{outcome:?}");
}

#[tokio::test(start_paused = true)]
async fn a_channel_that_the_client_has_not_confirmed_takes_nothing() {
    for kind in [message::CHANNEL_DATA, message::CHANNEL_WINDOW_ADJUST, message::CHANNEL_CLOSE] {
        let (outcome, _) = serve_to(true, async |client, own| {
            client.enter(own).await;
            let mut listen = global_request("tcpip-forward", false);
            listen.put_string("").put_number(80);
            client.say(&listen).await;
            let opening = client.hear().await.unwrap();
            let mut fields = Reader::new(&opening, "opening");
            assert_eq!(fields.byte().unwrap(), message::CHANNEL_OPEN);
            assert_eq!(fields.text().unwrap(), "forwarded-tcpip");
            let channel = fields.number().unwrap();
            client.say(&numbers(kind, &[channel, 0])).await;
            client.hear_all().await;
        })
        .await;
        assert!(matches!(outcome, Err(SshError::Protocol(_))), "{kind}: {outcome:?}");
    }
}
