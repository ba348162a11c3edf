//! The guest's name server.

use std::net::IpAddr;
use std::time::{Duration, Instant};

use hickory_proto::op::{Edns, Message, MessageType, OpCode, ResponseCode};
use hickory_proto::rr::rdata::opt::EdnsOption;
use hickory_proto::rr::rdata::{A, AAAA, PTR};
use hickory_proto::rr::{DNSClass, Name, RData, Record, RecordType};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::timeout;

use super::forward::{Transport, Upstreams, read_message, write_message};
use super::gateway::{Gateway, HOST};
use crate::dns::{DOMAIN, refusal, response};

/// Seconds: an instance may be replaced by another at any time.
const TTL: u32 = 1;
/// For a client of TCP between two questions (RFC 7766 §6.2.3 leaves it to the server).
const PATIENCE: Duration = Duration::from_secs(10);
/// Aliases on the way from a name to its addresses.
const MOST_ALIASES: usize = 16;
/// Extended DNS errors (RFC 8914): an option of EDNS, and what it says here.
const EXTENDED_ERROR: u16 = 15;
const PROHIBITED: u16 = 18;

impl Gateway {
    /// Answers queries over TCP until the client has no more. `early` came before the connection was reported made.
    pub(super) async fn serve_names<S>(&self, stream: S, early: Vec<u8>)
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let (reader, mut writer) = tokio::io::split(stream);
        let mut reader = tokio::io::AsyncReadExt::chain(std::io::Cursor::new(early), reader);
        while let Ok(Ok(Some(query))) = timeout(PATIENCE, read_message(&mut reader)).await {
            let Some(answer) = self.resolve(&query, Transport::Tcp).await else { break };
            match timeout(PATIENCE, write_message(&mut writer, &answer)).await {
                Ok(Ok(())) => {}
                _ => return,
            }
        }
        let _ = tokio::io::AsyncWriteExt::shutdown(&mut writer).await;
    }

    /// The answer to a query, or `None` if it is none.
    pub(super) async fn resolve(&self, query: &[u8], transport: Transport) -> Option<Vec<u8>> {
        let message = Message::from_vec(query).ok()?;
        if message.metadata.message_type != MessageType::Query {
            return None;
        }
        let Some(_permit) = self.take_query() else { return refusal(query, ResponseCode::ServFail) };
        if message.metadata.op_code != OpCode::Query {
            return refusal(query, ResponseCode::NotImp);
        }
        let [question] = message.queries.as_slice() else { return refusal(query, ResponseCode::FormErr) };
        if question.query_class() != DNSClass::IN {
            return refusal(query, ResponseCode::NotImp);
        }
        let asked = question.name().to_ascii().trim_end_matches('.').to_ascii_lowercase();
        let kind = question.query_type();
        if let Some(answer) = self.answer_own(&message, question.name(), &asked, kind) {
            return answer.to_vec().ok();
        }
        if !self.may_ask(&asked, question.name(), kind) {
            self.deny(
                &self.tally.denied_names,
                "a name",
                format_args!("{asked} ({kind})"),
                "no rule allows it",
            );
            return prohibited(&message).to_vec().ok();
        }
        if self.options.upstreams == Upstreams::Nobody {
            return refusal(query, ResponseCode::NXDomain);
        }
        match self.options.upstreams.ask(query, transport).await {
            Some(answer) => {
                self.learn(&asked, &answer);
                Some(answer)
            }
            None => refusal(query, ResponseCode::ServFail),
        }
    }

    /// What is about the names of the network, or nobody's business outside of it.
    fn answer_own(&self, query: &Message, name: &Name, asked: &str, kind: RecordType) -> Option<Message> {
        let mut answer = response(query);
        if self.policy().is_none() {
            answer.metadata.response_code = ResponseCode::NXDomain;
            return Some(answer);
        }
        if kind == RecordType::PTR {
            let address = pointed(name)?;
            let known = if self.options.addresses.contains(&address) {
                format!("{HOST}{DOMAIN}")
            } else {
                format!("{}{DOMAIN}", self.options.names.names(address).first()?)
            };
            let known = Name::from_ascii(format!("{known}.")).ok()?;
            answer.add_answer(Record::from_rdata(name.clone(), TTL, RData::PTR(PTR(known))));
            return Some(answer);
        }
        let bare = asked.strip_suffix(DOMAIN);
        let addresses = if bare == Some(HOST) {
            Some(self.options.addresses.clone())
        } else {
            self.options.names.addresses(bare.unwrap_or(asked))
        };
        let Some(addresses) = addresses else {
            // `dns.kiln.internal` is for the guest's own half, and `kiln.internal` itself is no name.
            let ours = bare.is_some() || Some(asked) == DOMAIN.strip_prefix('.');
            answer.metadata.response_code = ResponseCode::NXDomain;
            return ours.then_some(answer);
        };
        for address in addresses {
            let data = match address {
                IpAddr::V4(v4) if matches!(kind, RecordType::A | RecordType::ANY) => RData::A(A(v4)),
                IpAddr::V6(v6) if matches!(kind, RecordType::AAAA | RecordType::ANY) => RData::AAAA(AAAA(v6)),
                _ => continue,
            };
            answer.add_answer(Record::from_rdata(name.clone(), TTL, data));
        }
        Some(answer)
    }

    /// Whether a question may leave the host.
    fn may_ask(&self, asked: &str, name: &Name, kind: RecordType) -> bool {
        if self.policy().allows_name(asked) {
            return true;
        }
        // Who may speak to an address may know what it is called.
        kind == RecordType::PTR
            && pointed(name).is_some_and(|address| self.policy().check(address, None).is_ok())
    }

    /// Opens the addresses of an answer to the guest, at the ports at which its rules open the name.
    fn learn(&self, asked: &str, answer: &[u8]) {
        let ports: Vec<_> = self.policy().ports_of(asked).collect();
        if ports.is_empty() {
            return;
        }
        let Ok(answer) = Message::from_vec(answer) else { return };
        let same =
            |name: &Name, other: &str| name.to_ascii().trim_end_matches('.').eq_ignore_ascii_case(other);
        // Only what the name leads to: anything else in an answer is not about it.
        let mut names = vec![(asked.to_owned(), u32::MAX)];
        while let Some((last, ttl)) = names.last()
            && names.len() <= MOST_ALIASES
        {
            let alias = answer.answers.iter().find_map(|record| match &record.data {
                RData::CNAME(alias) if same(&record.name, last) => {
                    let alias = alias.0.to_ascii().trim_end_matches('.').to_owned();
                    Some((alias, record.ttl.min(*ttl)))
                }
                _ => None,
            });
            match alias {
                Some(alias) => names.push(alias),
                None => break,
            }
        }
        let now = Instant::now();
        let mut grants = self.grants();
        for record in &answer.answers {
            let address = match &record.data {
                RData::A(address) => IpAddr::V4(address.0),
                RData::AAAA(address) => IpAddr::V6(address.0),
                _ => continue,
            };
            let Some((_, ttl)) = names.iter().find(|(name, _)| same(&record.name, name)) else { continue };
            for ports in &ports {
                let ttl = Duration::from_secs(u64::from(record.ttl.min(*ttl)));
                grants.grant(address, *ports, ttl, now);
            }
        }
    }
}

/// The address whose name is asked for.
fn pointed(name: &Name) -> Option<IpAddr> {
    let net = name.parse_arpa_name().ok()?;
    let whole = if net.addr().is_ipv4() { 32 } else { 128 };
    (net.prefix_len() == whole).then(|| net.addr())
}

/// «There is no such name», which every C library understands at once (some wait for another answer after REFUSED), and why, for
/// clients that speak EDNS.
fn prohibited(query: &Message) -> Message {
    let mut answer = response(query);
    answer.metadata.authoritative = false;
    answer.metadata.response_code = ResponseCode::NXDomain;
    if query.edns.is_some() {
        let mut edns = Edns::new();
        edns.set_max_payload(1232).set_version(0);
        let text = [&PROHIBITED.to_be_bytes(), b"not allowed by the network policy".as_slice()].concat();
        edns.options_mut().insert(EdnsOption::Unknown(EXTENDED_ERROR, text));
        answer.set_edns(edns);
    }
    answer
}
