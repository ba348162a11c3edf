//! A policy as packet rules can hold it: by address, of IPv4.

use std::net::IpAddr;

use ipnet::{IpNet, Ipv4Net};

use super::closed::{CLOSED, closed};
use super::rule::What;
use super::{Policy, Ports, Rule};

/// Where packets may go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Passage {
    pub(crate) network: Ipv4Net,
    pub(crate) ports: Ports,
    /// It names what is closed, or a network on which the workload is not: it opens these too.
    pub(crate) is_named: bool,
}

impl Passage {
    /// One address, which may be the host's own.
    pub(crate) fn is_exact(&self) -> bool {
        self.network.prefix_len() == 32
    }
}

impl Policy {
    /// The first rule that packet rules cannot hold: one of names.
    pub(crate) fn needs_names(&self) -> Option<&Rule> {
        self.rules.iter().find(|rule| matches!(rule.what, What::Name(_) | What::Below(_)))
    }

    /// What it opens of IPv4. `elsewhere` are the networks of the host's on which the workload is not.
    pub(crate) fn passages(&self, elsewhere: &[Ipv4Net]) -> Vec<Passage> {
        let passage = |rule: &Rule| {
            let network = match rule.what {
                What::Any => Ipv4Net::default(),
                What::Network(IpNet::V4(network)) => network,
                // The host's loopback is no place for packets from elsewhere, and names are refused.
                What::Network(IpNet::V6(_)) | What::HostLoopback | What::Name(_) | What::Below(_) => {
                    return None;
                }
            };
            let closed = closed(IpAddr::V4(network.addr()))
                .is_some_and(|(range, _)| range.contains(&IpNet::V4(network)));
            let is_named = closed || elsewhere.iter().any(|other| other.contains(&network));
            Some(Passage { network, ports: rule.ports, is_named })
        };
        self.rules.iter().filter_map(passage).collect()
    }
}

/// What is closed of IPv4.
pub(crate) fn closed_ranges() -> impl Iterator<Item = &'static str> {
    CLOSED.iter().map(|(range, _)| *range).filter(|range| !range.contains(':'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_of_addresses_become_passages_and_those_that_name_what_is_closed_are_told_apart() {
        let elsewhere = ["10.89.1.0/24".parse().unwrap()];
        for (rule, expected) in [
            ("any", Some(("0.0.0.0/0", false))),
            ("10.0.0.0/8:80-90", Some(("10.0.0.0/8", false))),
            ("10.89.1.0/24", Some(("10.89.1.0/24", true))),
            ("10.89.1.7:22", Some(("10.89.1.7/32", true))),
            ("10.89.0.7", Some(("10.89.0.7/32", false))),
            ("169.254.169.254", Some(("169.254.169.254/32", true))),
            ("169.0.0.0/8", Some(("169.0.0.0/8", false))),
            ("host-loopback", None),
            ("2001:db8::/32", None),
        ] {
            let policy = Policy::parse(&[rule]).unwrap();
            assert!(policy.needs_names().is_none(), "{rule}");
            let found = policy.passages(&elsewhere);
            let told: Vec<_> =
                found.iter().map(|found| (found.network.to_string(), found.is_named)).collect();
            let expected: Vec<_> =
                expected.map(|(network, named)| (network.to_owned(), named)).into_iter().collect();
            assert_eq!(told, expected, "{rule}");
        }
        for rule in ["example.org", "*.example.org:443"] {
            assert!(Policy::parse(&["10.0.0.0/8", rule]).unwrap().needs_names().is_some(), "{rule}");
        }
    }
}
