//! The names of a network, as its file tells them.

use std::collections::HashMap;
use std::fs;
use std::net::{IpAddr, Ipv4Addr};
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

use hickory_proto::op::{Message, MessageType, OpCode, ResponseCode};
use hickory_proto::rr::rdata::{A, PTR};
use hickory_proto::rr::{DNSClass, Name, RData, Record, RecordType};

use crate::dns::{DOMAIN, response};
use crate::networks::read_file;

/// Seconds: a container may be replaced by another at any time.
const TTL: u32 = 1;

/// What to do with a query.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Reply {
    /// This is the answer.
    Answer(Vec<u8>),
    /// It is about names that are not ours.
    Forward,
    /// It is no query.
    Ignore,
}

/// Re-reads the network's file whenever that was replaced.
#[derive(Debug)]
pub(super) struct Zone {
    file: PathBuf,
    seen: Option<(u64, i64, i64)>,
    addresses: HashMap<String, Vec<Ipv4Addr>>,
    names: HashMap<Ipv4Addr, String>,
    turn: usize,
}

impl Zone {
    pub(super) fn new(file: PathBuf) -> Self {
        Self { file, seen: None, addresses: HashMap::new(), names: HashMap::new(), turn: 0 }
    }

    /// Answers what is about the network's own names: `A`, `PTR`, and «nothing» for other types of a known name.
    pub(super) fn reply(&mut self, query: &[u8]) -> Reply {
        let Ok(query) = Message::from_vec(query) else { return Reply::Ignore };
        if query.metadata.message_type != MessageType::Query {
            return Reply::Ignore;
        }
        let [question] = query.queries.as_slice() else { return Reply::Forward };
        if query.metadata.op_code != OpCode::Query || question.query_class() != DNSClass::IN {
            return Reply::Forward;
        }
        self.refresh();
        let mut answer = response(&query);
        let asked = question.name().to_ascii().trim_end_matches('.').to_ascii_lowercase();
        let bare = asked.strip_suffix(DOMAIN).unwrap_or(&asked);
        if let Some(addresses) = self.addresses.get(bare) {
            if matches!(question.query_type(), RecordType::A | RecordType::ANY) {
                // Whoever takes the first of several is led to each in turn.
                self.turn = self.turn.wrapping_add(1);
                let turn = self.turn % addresses.len();
                let (late, early) = addresses.split_at(turn);
                for address in early.iter().chain(late) {
                    let data = RData::A(A(*address));
                    answer.add_answer(Record::from_rdata(question.name().clone(), TTL, data));
                }
            }
        } else if bare.len() != asked.len() {
            answer.metadata.response_code = ResponseCode::NXDomain;
        } else if question.query_type() == RecordType::PTR {
            let known = question.name().parse_arpa_name().ok().and_then(|net| match net.addr() {
                IpAddr::V4(address) if net.prefix_len() == 32 => self.names.get(&address),
                _ => None,
            });
            let Some(name) = known.and_then(|name| Name::from_ascii(format!("{name}.")).ok()) else {
                return Reply::Forward;
            };
            answer.add_answer(Record::from_rdata(question.name().clone(), TTL, RData::PTR(PTR(name))));
        } else {
            return Reply::Forward;
        }
        answer.to_vec().map_or(Reply::Ignore, Reply::Answer)
    }

    fn refresh(&mut self) {
        // Replaced files have other inode numbers.
        let seen = fs::metadata(&self.file).ok().map(|m| (m.ino(), m.mtime(), m.mtime_nsec()));
        if seen == self.seen {
            return;
        }
        self.seen = seen;
        self.addresses.clear();
        self.names.clear();
        let Ok(Some(network)) = read_file(&self.file) else { return };
        for lease in network.leases.values() {
            let IpAddr::V4(address) = lease.address else { continue };
            for name in &lease.names {
                self.addresses.entry(name.to_ascii_lowercase()).or_default().push(address);
            }
            self.names.extend(lease.names.first().map(|name| (address, name.clone())));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dns::refusal;
    use crate::{Lease, Network};
    use hickory_proto::op::Query;
    use kiln_contract::InstanceId;

    fn query(name: &str, kind: RecordType) -> Vec<u8> {
        let mut message = Message::new(7, MessageType::Query, OpCode::Query);
        let mut question = Query::new();
        question.set_name(Name::from_ascii(name).unwrap()).set_query_type(kind);
        message.add_query(question);
        message.to_vec().unwrap()
    }

    fn answers(reply: Reply) -> Option<(ResponseCode, Vec<String>)> {
        let Reply::Answer(bytes) = reply else { return None };
        let message = Message::from_vec(&bytes).unwrap();
        assert_eq!(message.metadata.id, 7);
        let mut data: Vec<_> = message.answers.iter().map(|record| record.data.to_string()).collect();
        data.sort();
        Some((message.metadata.response_code, data))
    }

    fn write(file: &std::path::Path, leases: &[(&str, &[&str])]) {
        let mut network = Network::built_in("n", "bridge");
        for (address, names) in leases {
            let names = names.iter().map(|name| (*name).to_owned()).collect();
            let lease = Lease { names, ..Lease::at(address.parse::<IpAddr>().unwrap()) };
            network.leases.insert(InstanceId::random(), lease);
        }
        let staged = file.with_extension("new");
        fs::write(&staged, serde_json::to_vec(&network).unwrap()).unwrap();
        fs::rename(staged, file).unwrap();
    }

    #[test]
    fn names_of_the_network_are_answered_and_others_forwarded() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("n.json");
        write(&file, &[("10.1.0.2", &["web_1", "www"]), ("10.1.0.3", &["db", "www"])]);
        let mut zone = Zone::new(file.clone());
        type Expected = Option<(ResponseCode, Vec<&'static str>)>;
        let table: [(&str, RecordType, Expected); 9] = [
            ("web_1.", RecordType::A, Some((ResponseCode::NoError, vec!["10.1.0.2"]))),
            ("WEB_1.", RecordType::A, Some((ResponseCode::NoError, vec!["10.1.0.2"]))),
            ("www.", RecordType::A, Some((ResponseCode::NoError, vec!["10.1.0.2", "10.1.0.3"]))),
            ("db.kiln.internal.", RecordType::A, Some((ResponseCode::NoError, vec!["10.1.0.3"]))),
            ("no.kiln.internal.", RecordType::A, Some((ResponseCode::NXDomain, vec![]))),
            ("db.", RecordType::AAAA, Some((ResponseCode::NoError, vec![]))),
            ("2.0.1.10.in-addr.arpa.", RecordType::PTR, Some((ResponseCode::NoError, vec!["web_1."]))),
            ("9.0.1.10.in-addr.arpa.", RecordType::PTR, None),
            ("example.org.", RecordType::A, None),
        ];
        for (name, kind, expected) in table {
            let reply = zone.reply(&query(name, kind));
            if expected.is_none() {
                assert_eq!(reply, Reply::Forward, "{name}");
            }
            let expected =
                expected.map(|(code, data)| (code, data.into_iter().map(str::to_owned).collect::<Vec<_>>()));
            assert_eq!(answers(reply), expected, "{name} {kind}");
        }
        write(&file, &[("10.1.0.9", &["web_1"])]);
        let moved = answers(zone.reply(&query("web_1.", RecordType::A))).unwrap();
        assert_eq!(moved.1, ["10.1.0.9"], "the replaced file was not read");
    }

    #[test]
    fn bytes_that_are_no_query_are_ignored() {
        let mut zone = Zone::new("/nonexistent".into());
        assert_eq!(zone.reply(b""), Reply::Ignore);
        assert_eq!(zone.reply(&[0xff; 600]), Reply::Ignore);
        let answer = refusal(&query("a.", RecordType::A), ResponseCode::ServFail).unwrap();
        assert_eq!(zone.reply(&answer), Reply::Ignore, "an answer is no query: two responders must not talk");
    }
}
