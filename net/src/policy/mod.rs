//! What a workload may reach: one policy for every kind of it.
//!
//! A policy is a list of rules. Without any, nothing can be reached; what no rule names cannot be reached either.
//!
//! | rule | opens |
//! |---|---|
//! | `any` | everything but what is closed (below) |
//! | `ADDRESS`, `CIDR` | these addresses |
//! | `NAME` | the addresses to which this name resolves, for as long as the answer says |
//! | `*.NAME` | the same of every name below this one; not the name itself |
//! | `host-loopback` | the host's own loopback, which is `host.kiln.internal` for the guest |
//!
//! Each but `any` may end in `:PORT` or `:FIRST-LAST`, for TCP and UDP: `example.org:443`, `10.0.0.0/8:8000-8999`,
//! `[2001:db8::/32]:443`. One without a port also opens echo requests.
//!
//! *Closed* are loopback, the unspecified addresses, link-local ones, multicast, where clouds answer with their machines' secrets, and
//! all addresses of the host's own and of its networks on which the guest is not. They stay closed whatever resolves to them, and whatever wider rule contains them; only
//! a rule that names them and nothing else opens them: `169.254.169.254`, `fe80::/10`, the host's address in full.
//! IPv4 in IPv6 (mapped, compatible, NAT64, 6to4) counts as what it leads to.
//!
//! ```
//! use kiln_net::Policy;
//!
//! let policy: Policy = ["*.example.org:443", "10.0.0.0/8"].iter().map(|rule| rule.parse()).collect::<Result<_, _>>()?;
//! assert!(policy.allows_name("www.example.org") && !policy.allows_name("example.org"));
//! assert!(policy.check("10.1.2.3".parse()?, Some(22)).is_ok());
//! assert!(Policy::open().check("169.254.169.254".parse()?, Some(80)).is_err());
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod closed;
#[cfg_attr(not(target_os = "linux"), allow(dead_code, reason = "packets are filtered on Linux only"))]
mod packets;
mod rule;

use std::net::IpAddr;

use ipnet::IpNet;
use thiserror::Error;

use crate::dns::DOMAIN;

pub(crate) use closed::canonical;
use closed::{ELSEWHERE, OWN, closed, is_own};
#[cfg(target_os = "linux")]
pub(crate) use packets::{Passage, closed_ranges};
pub(crate) use rule::Ports;
use rule::What;
pub use rule::{Rule, RuleError};

/// The rules of a workload.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Policy {
    rules: Vec<Rule>,
}

/// Why something cannot be reached.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum Denied {
    /// No rule opens it.
    #[error("no rule allows it")]
    NoRule,
    /// It is closed unless a rule names it.
    #[error("{0} is closed unless a rule names it")]
    Closed(&'static str),
}

impl Policy {
    /// Nothing can be reached.
    pub fn none() -> Self {
        Self::default()
    }

    /// Everything that is not closed can be reached.
    pub fn open() -> Self {
        Self { rules: vec![Rule { what: What::Any, ports: Ports::All }] }
    }

    /// From rules as users write them. No rule at all is [`open`](Self::open).
    ///
    /// # Errors
    /// The first that cannot be understood.
    pub fn parse<S: AsRef<str>>(rules: &[S]) -> Result<Self, RuleError> {
        if rules.is_empty() {
            return Ok(Self::open());
        }
        rules.iter().map(|rule| rule.as_ref().parse()).collect()
    }

    /// Its rules.
    pub fn rules(&self) -> &[Rule] {
        &self.rules
    }

    /// Whether an address can be reached at a port, or by an echo request (no port), whatever names lead to it. Whether it is
    /// one of the host's own is found out from the system.
    ///
    /// # Errors
    /// Why it cannot.
    pub fn check(&self, address: IpAddr, port: Option<u16>) -> Result<(), Denied> {
        self.check_granted(address, port, false, None)
    }

    /// The same of an address that a name which may be reached has led to (or not), and that is in a range of another network
    /// of the host's (or not).
    pub(crate) fn check_granted(
        &self,
        address: IpAddr,
        port: Option<u16>,
        granted: bool,
        elsewhere: Option<IpNet>,
    ) -> Result<(), Denied> {
        let address = canonical(address);
        let closed = closed(address)
            .or_else(|| is_own(address).then(|| (IpNet::from(address), OWN)))
            .or_else(|| elsewhere.map(|range| (range, ELSEWHERE)));
        let named = |rule: &Rule| match (&rule.what, closed) {
            (What::Network(network), Some((range, _))) => {
                range.contains(network) && network.contains(&address)
            }
            (What::Network(network), None) => network.contains(&address),
            (What::HostLoopback, _) => address.is_loopback(),
            (What::Any, None) => true,
            _ => false,
        };
        if self.rules.iter().any(|rule| rule.ports.contain(port) && named(rule)) {
            return Ok(());
        }
        match closed {
            Some((_, what)) => Err(Denied::Closed(what)),
            None if granted => Ok(()),
            None => Err(Denied::NoRule),
        }
    }

    /// Whether a neighbour with these names can be reached: by any of them, by a range, or by a policy that is open.
    ///
    /// # Errors
    /// Why it cannot.
    pub(crate) fn check_neighbour(
        &self,
        names: &[String],
        address: IpAddr,
        port: Option<u16>,
    ) -> Result<(), Denied> {
        let opens = |rule: &Rule| match &rule.what {
            What::Any => true,
            What::Network(network) => network.contains(&address),
            _ => names.iter().any(|name| rule.matches(name) || rule.matches(&format!("{name}{DOMAIN}"))),
        };
        let opens = |rule: &Rule| rule.ports.contain(port) && opens(rule);
        self.rules.iter().any(opens).then_some(()).ok_or(Denied::NoRule)
    }

    /// Whether the host's loopback can be reached at a port.
    pub(crate) fn check_host_loopback(&self, port: u16) -> Result<(), Denied> {
        let opens = |rule: &Rule| rule.what == What::HostLoopback && rule.ports.contain(Some(port));
        self.rules.iter().any(opens).then_some(()).ok_or(Denied::Closed("the host's loopback"))
    }

    /// Whether a name may be asked for. What it leads to may be closed all the same.
    pub fn allows_name(&self, name: &str) -> bool {
        self.is_open() || self.ports_of(name).next().is_some()
    }

    /// Whether any name may be asked for.
    pub(crate) fn is_open(&self) -> bool {
        self.rules.iter().any(|rule| rule.what == What::Any)
    }

    /// The ports at which rules open what this name leads to.
    pub(crate) fn ports_of(&self, name: &str) -> impl Iterator<Item = Ports> {
        let name = name.trim_end_matches('.').to_ascii_lowercase();
        self.rules.iter().filter(move |rule| rule.matches(&name)).map(|rule| rule.ports)
    }

    /// Whether nothing at all can be reached.
    pub fn is_none(&self) -> bool {
        self.rules.is_empty()
    }
}

impl FromIterator<Rule> for Policy {
    fn from_iter<I: IntoIterator<Item = Rule>>(rules: I) -> Self {
        Self { rules: rules.into_iter().collect() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn policy(rules: &[&str]) -> Policy {
        rules.iter().map(|rule| rule.parse::<Rule>().unwrap()).collect()
    }

    #[test]
    fn names_match_as_a_whole_and_below_a_wildcard_but_not_the_domain_itself() {
        let rules = policy(&["example.org", "*.example.net", "*.internal"]);
        for (name, allowed) in [
            ("example.org", true),
            ("EXAMPLE.org.", true),
            ("www.example.org", false),
            ("notexample.org", false),
            ("example.net", false),
            (".example.net", false),
            ("a.example.net", true),
            ("a.b.example.net", true),
            ("evilexample.net", false),
            ("example.net.evil.test", false),
            ("db.internal", true),
        ] {
            assert_eq!(rules.allows_name(name), allowed, "{name}");
            assert!(Policy::open().allows_name(name));
            assert!(!Policy::none().allows_name(name));
        }
    }

    #[test]
    fn what_is_closed_stays_closed_in_every_disguise() {
        let wide = policy(&["any", "0.0.0.0/0", "[::/0]:1-65535", "host-loopback:5432"]);
        for address in [
            "127.0.0.1",
            "127.255.0.3",
            "0.0.0.0",
            "0.1.2.3",
            "169.254.169.254",
            "169.254.0.1",
            "100.100.100.200",
            "168.63.129.16",
            "192.0.0.192",
            "192.0.0.1",
            "224.0.0.251",
            "255.255.255.255",
            "::",
            "::1",
            "::127.0.0.1",
            "::ffff:127.0.0.1",
            "::ffff:0.0.0.0",
            "::ffff:169.254.169.254",
            "64:ff9b::127.0.0.1",
            "64:ff9b::a9fe:a9fe",
            "64:ff9b:1::127.0.0.1",
            "64:ff9b:1:2:3:4:127.0.0.1",
            "::ffff:0:127.0.0.1",
            "2002:7f00:1::",
            "2002:a9fe:a9fe::1",
            "fe80::1",
            "febf::1",
            "fec0::1",
            "ff02::fb",
            "fd00:ec2::254",
            "fd20:ce::254",
        ] {
            let address: IpAddr = address.parse().unwrap();
            assert!(matches!(wide.check(address, Some(80)), Err(Denied::Closed(_))), "{address}");
            assert!(
                matches!(wide.check_granted(address, Some(80), true, None), Err(Denied::Closed(_))),
                "{address}"
            );
            assert!(wide.check(address, None).is_err(), "{address}");
        }
        for open in
            ["192.0.2.1", "10.0.0.1", "100.100.100.201", "2001:db8::1", "64:ff9b::192.0.2.1", "fd00::1"]
        {
            let open = open.parse().unwrap();
            assert_eq!(Policy::open().check(open, Some(80)), Ok(()), "{open}");
            assert_eq!(Policy::open().check(open, None), Ok(()), "{open}");
            assert_eq!(Policy::none().check(open, Some(80)), Err(Denied::NoRule), "{open}");
        }
    }

    #[test]
    fn only_a_rule_that_names_what_is_closed_opens_it() {
        for (rule, address, port, open) in [
            ("169.254.169.254", "169.254.169.254", 80, true),
            ("169.254.169.254:80", "169.254.169.254", 81, false),
            ("169.254.0.0/16", "169.254.169.254", 80, true),
            ("169.0.0.0/8", "169.254.169.254", 80, false),
            ("169.0.0.0/8", "169.1.1.1", 80, true),
            ("169.254.169.254", "::ffff:169.254.169.254", 80, true),
            ("fe80::/10", "fe80::1", 80, true),
            ("fe00::/8", "fe80::1", 80, false),
            ("127.0.0.1:80", "127.0.0.1", 80, true),
            ("127.0.0.1:80", "127.0.0.2", 80, false),
            ("host-loopback", "127.0.0.1", 80, true),
            ("host-loopback", "::1", 80, true),
            ("host-loopback", "0.0.0.0", 80, false),
            ("host-loopback:80", "127.0.0.1", 81, false),
            ("64:ff9b::127.0.0.1", "64:ff9b::127.0.0.1", 80, true),
            ("64:ff9b::/96", "64:ff9b::127.0.0.1", 80, false),
        ] {
            let result = policy(&[rule]).check(address.parse().unwrap(), Some(port));
            assert_eq!(result.is_ok(), open, "{rule}: {address}:{port}: {result:?}");
        }
        assert!(policy(&["host-loopback:80"]).check_host_loopback(80).is_ok());
        assert!(policy(&["any", "127.0.0.0/8", "host-loopback:80"]).check_host_loopback(81).is_err());
    }

    #[test]
    fn networks_of_which_the_guest_is_no_part_are_closed_unless_named() {
        let (address, elsewhere) = ("10.89.1.2".parse().unwrap(), Some("10.89.1.0/24".parse().unwrap()));
        for (rules, open) in [
            (&["any"][..], false),
            (&["10.0.0.0/8"], false),
            (&["10.89.1.0/24"], true),
            (&["10.89.1.2:80"], true),
            (&["10.89.1.2:81"], false),
        ] {
            for granted in [false, true] {
                let result = policy(rules).check_granted(address, Some(80), granted, elsewhere);
                assert_eq!(result.is_ok(), open, "{rules:?}: {result:?}");
            }
        }
    }

    #[test]
    fn neighbours_are_reached_by_an_open_policy_or_any_of_their_names() {
        let names = ["db".to_owned(), "primary".to_owned()];
        for (rules, port, open) in [
            (&["any"][..], Some(80), true),
            (&["db"], Some(80), true),
            (&["db"], None, true),
            (&["primary:80"], Some(80), true),
            (&["primary:80"], Some(81), false),
            (&["db.kiln.internal:80"], Some(80), true),
            (&["*.kiln.internal"], Some(80), true),
            (&["10.89.0.0/24:80"], Some(80), true),
            (&["web", "10.90.0.0/24", "host-loopback"], Some(80), false),
            (&[], Some(80), false),
        ] {
            let result = policy(rules).check_neighbour(&names, "10.89.0.5".parse().unwrap(), port);
            assert_eq!(result.is_ok(), open, "{rules:?} {port:?}");
        }
    }

    #[test]
    fn echo_requests_need_a_rule_without_a_port() {
        let address = "192.0.2.1".parse().unwrap();
        assert!(policy(&["192.0.2.0/24"]).check(address, None).is_ok());
        assert!(policy(&["192.0.2.0/24:1-65535"]).check(address, None).is_err());
    }
}
