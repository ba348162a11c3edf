//! What is common to all that answers name queries.

use std::fs;
use std::net::IpAddr;

use hickory_proto::op::{Message, ResponseCode};

/// Names of a network may also be asked for with this behind them: `web.kiln.internal`.
pub(crate) const DOMAIN: &str = ".kiln.internal";

/// The host's name servers, in its order.
pub(crate) fn host_name_servers() -> Vec<IpAddr> {
    parse_name_servers(&fs::read_to_string("/etc/resolv.conf").unwrap_or_default())
}

pub(crate) fn parse_name_servers(text: &str) -> Vec<IpAddr> {
    text.lines()
        .filter_map(|line| line.trim().strip_prefix("nameserver")?.split_whitespace().next())
        // A scope (`fe80::1%eth0`) names an interface of the host's.
        .filter_map(|address| address.parse().ok())
        .collect()
}

/// An answer to `query` that says `code` and nothing else.
pub(crate) fn refusal(query: &[u8], code: ResponseCode) -> Option<Vec<u8>> {
    let mut answer = response(&Message::from_vec(query).ok()?);
    answer.metadata.authoritative = false;
    answer.metadata.response_code = code;
    answer.to_vec().ok()
}

/// An answer to `query` that has nothing in it yet.
pub(crate) fn response(query: &Message) -> Message {
    let mut answer = Message::response(query.metadata.id, query.metadata.op_code);
    answer.metadata.recursion_desired = query.metadata.recursion_desired;
    answer.metadata.recursion_available = true;
    answer.metadata.authoritative = true;
    answer.add_queries(query.queries.clone());
    answer
}
