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
//! all addresses of the host's own. They stay closed whatever resolves to them, and whatever wider rule contains them; only
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

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;
use std::sync::LazyLock;

use ipnet::IpNet;
use thiserror::Error;

/// The rules of a workload.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Policy {
    rules: Vec<Rule>,
}

/// Ports of TCP and UDP.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Ports {
    /// All, and echo requests too.
    All,
    /// From the first to the last.
    These(u16, u16),
}

/// One thing that may be reached.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rule {
    what: What,
    ports: Ports,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum What {
    Any,
    HostLoopback,
    Network(IpNet),
    /// Lower case, without a dot at its end.
    Name(String),
    /// Every name that ends in a dot and this.
    Below(String),
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

/// A rule that cannot be understood.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("`{rule}` is no rule of what may be reached: {reason}")]
pub struct RuleError {
    /// What was given.
    pub rule: String,
    /// What is wrong with it.
    pub reason: String,
}

/// What is closed, with the name that users are told.
const CLOSED: &[(&str, &str)] = &[
    ("0.0.0.0/8", "`this host` (0.0.0.0/8)"),
    ("127.0.0.0/8", "the host's loopback"),
    ("169.254.0.0/16", "link-local, where clouds keep their machines' secrets"),
    // Where those answer that do not use a link-local address: Azure, Oracle, Alibaba.
    ("168.63.129.16/32", "the metadata service of a cloud"),
    ("192.0.0.192/32", "the metadata service of a cloud"),
    ("100.100.100.200/32", "the metadata service of a cloud"),
    // Where the guest's own addresses come from (kiln_usernet's default): on the host's side they are somebody else's.
    ("192.0.0.0/29", "the link between guest and host"),
    ("224.0.0.0/4", "multicast"),
    ("240.0.0.0/4", "reserved"),
    ("::/96", "the unspecified address, the host's loopback, or IPv4 in an abandoned form"),
    ("fe80::/10", "link-local"),
    ("fec0::/10", "site-local, abandoned"),
    ("ff00::/8", "multicast"),
    // Amazon's and Google's.
    ("fd00:ec2::/32", "the metadata service of a cloud"),
    ("fd20:ce::254/128", "the metadata service of a cloud"),
    ("fd6b:696c:6e00::/48", "the link between guest and host"),
];

/// What an address of the host's own is called.
const OWN: &str = "an address of the host's own";

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
        self.check_granted(address, port, false)
    }

    /// The same of an address that a name which may be reached has led to (or not).
    pub(crate) fn check_granted(
        &self,
        address: IpAddr,
        port: Option<u16>,
        granted: bool,
    ) -> Result<(), Denied> {
        let address = canonical(address);
        let closed = closed(address).or_else(|| is_own(address).then(|| (IpNet::from(address), OWN)));
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

impl Ports {
    pub(crate) fn contain(self, port: Option<u16>) -> bool {
        match (self, port) {
            (Self::All, _) => true,
            (Self::These(first, last), Some(port)) => (first..=last).contains(&port),
            (Self::These(..), None) => false,
        }
    }
}

impl Rule {
    fn matches(&self, name: &str) -> bool {
        match &self.what {
            What::Name(own) => own == name,
            What::Below(domain) => name
                .strip_suffix(domain.as_str())
                .and_then(|rest| rest.strip_suffix('.'))
                .is_some_and(|rest| !rest.is_empty()),
            _ => false,
        }
    }
}

impl FromStr for Rule {
    type Err = RuleError;

    fn from_str(rule: &str) -> Result<Self, RuleError> {
        let wrong = |reason: String| RuleError { rule: rule.to_owned(), reason };
        let (what, ports) = split_ports(rule).map_err(wrong)?;
        let what = parse_what(what).map_err(wrong)?;
        if what == What::Any && ports != Ports::All {
            return Err(wrong(
                "`any` has no port; `0.0.0.0/0:PORT` and `[::/0]:PORT` open one everywhere".into(),
            ));
        }
        Ok(Self { what, ports })
    }
}

/// Splits `WHAT[:PORT[-PORT]]`; IPv6 with a port stands in brackets.
fn split_ports(rule: &str) -> Result<(&str, Ports), String> {
    if let Some(rest) = rule.strip_prefix('[') {
        let (what, ports) = rest.split_once(']').ok_or("a bracket is not closed")?;
        if !what.contains(':') {
            return Err("only IPv6 addresses stand in brackets".into());
        }
        return match ports.strip_prefix(':') {
            Some(ports) => Ok((what, parse_ports(ports)?)),
            None if ports.is_empty() => Ok((what, Ports::All)),
            None => Err("only `:PORT` may follow the bracket".into()),
        };
    }
    match rule.split_once(':') {
        Some((_, rest)) if rest.contains(':') => Ok((rule, Ports::All)),
        Some((what, ports)) => Ok((what, parse_ports(ports)?)),
        None => Ok((rule, Ports::All)),
    }
}

fn parse_ports(text: &str) -> Result<Ports, String> {
    let port = |text: &str| match text.parse() {
        Ok(port) if port > 0 && text.bytes().all(|byte| byte.is_ascii_digit()) => Ok(port),
        _ => Err(format!("`{text}` is no port (1 to 65535, or two of them as FIRST-LAST)")),
    };
    let (first, last) = match text.split_once('-') {
        Some((first, last)) => (port(first)?, port(last)?),
        None => (port(text)?, port(text)?),
    };
    if first > last {
        return Err(format!("the ports {first} to {last} are none"));
    }
    Ok(Ports::These(first, last))
}

fn parse_what(text: &str) -> Result<What, String> {
    match text {
        "" => return Err("it names nothing".into()),
        "any" => return Ok(What::Any),
        "host-loopback" => return Ok(What::HostLoopback),
        "*" => return Err("everything is `any`".into()),
        _ => {}
    }
    if let Ok(address) = text.parse::<IpAddr>() {
        let address = canonical(address);
        if address.is_unspecified() {
            return Err(
                "it is no destination; the host's loopback is `host-loopback`, everything is `any`".into()
            );
        }
        return Ok(What::Network(address.into()));
    }
    if text.contains('/') {
        let network: IpNet = text
            .parse()
            .map_err(|_| "it is neither an address nor a network such as 10.0.0.0/8".to_owned())?;
        if network.addr() != network.network() {
            return Err(format!("the network is {}", network.trunc()));
        }
        if let IpAddr::V6(address) = network.addr()
            && address.to_ipv4_mapped().is_some()
        {
            return Err("write IPv4 networks as IPv4".into());
        }
        return Ok(What::Network(network));
    }
    let (below, name) = match text.strip_prefix("*.") {
        Some(domain) => (true, domain),
        None => (false, text),
    };
    let name = name.strip_suffix('.').unwrap_or(name).to_ascii_lowercase();
    check_name(&name)?;
    Ok(if below { What::Below(name) } else { What::Name(name) })
}

fn check_name(name: &str) -> Result<(), String> {
    if name.contains('*') {
        return Err("`*` can only stand for the first label and what is before it: `*.example.org`".into());
    }
    if !name.is_ascii() {
        return Err("names outside of ASCII are written as in the DNS: `xn--…`".into());
    }
    if name.contains(':') {
        return Err("it is no IPv6 address".into());
    }
    let label = |label: &str| {
        (1..=63).contains(&label.len())
            && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_'))
    };
    if name.len() > 253 || !name.split('.').all(label) {
        return Err("it is neither an address nor a name".into());
    }
    // No top-level domain is a number; whatever ends in one was meant to be an address.
    if name.rsplit('.').next().is_some_and(|last| last.bytes().all(|byte| byte.is_ascii_digit())) {
        return Err("it is no IPv4 address".into());
    }
    Ok(())
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ports = match self.ports {
            Ports::All => String::new(),
            Ports::These(first, last) if first == last => format!(":{first}"),
            Ports::These(first, last) => format!(":{first}-{last}"),
        };
        match &self.what {
            What::Any => f.write_str("any"),
            What::HostLoopback => write!(f, "host-loopback{ports}"),
            What::Network(network) => {
                let whole = network.prefix_len() == network.max_prefix_len();
                let text = if whole { network.addr().to_string() } else { network.to_string() };
                match network {
                    IpNet::V6(_) if !ports.is_empty() => write!(f, "[{text}]{ports}"),
                    _ => write!(f, "{text}{ports}"),
                }
            }
            What::Name(name) => write!(f, "{name}{ports}"),
            What::Below(domain) => write!(f, "*.{domain}{ports}"),
        }
    }
}

/// IPv4 in IPv6 (`::ffff:192.0.2.1`) as what it is: the kernel connects to the same host.
pub(crate) fn canonical(address: IpAddr) -> IpAddr {
    address.to_canonical()
}

/// The closed range in which an address is, and its name.
fn closed(address: IpAddr) -> Option<(IpNet, &'static str)> {
    static RANGES: LazyLock<Vec<(IpNet, &str)>> = LazyLock::new(|| {
        CLOSED.iter().filter_map(|(range, name)| Some((range.parse().ok()?, *name))).collect()
    });
    let found = RANGES.iter().find(|(range, _)| range.contains(&address)).copied();
    found.or_else(|| {
        // A gateway on the way would lead there.
        let IpAddr::V6(address) = address else { return None };
        let (_, name) = closed(embedded(address)?.into())?;
        Some((IpNet::from(IpAddr::V6(address)), name))
    })
}

/// The IPv4 address to which a translator or a tunnel would carry what is sent to this one.
fn embedded(address: Ipv6Addr) -> Option<Ipv4Addr> {
    let [a, b, c, d, e, f, g, h] = address.segments();
    let v4 = |high: u16, low: u16| Ipv4Addr::from(u32::from(high) << 16 | u32::from(low));
    match [a, b, c, d, e, f] {
        // NAT64 (RFC 6052), also for use inside a network (RFC 8215), and SIIT (RFC 2765).
        [0x64, 0xff9b, 0, 0, 0, 0] | [0x64, 0xff9b, 1, _, _, _] | [0, 0, 0, 0, 0xffff, 0] => Some(v4(g, h)),
        // 6to4 (RFC 3056).
        [0x2002, ..] => Some(v4(b, c)),
        _ => None,
    }
}

/// Whether an address is one of the host's: the kernel then chooses it as the source too. Nothing is sent.
fn is_own(address: IpAddr) -> bool {
    let any: IpAddr = match address {
        IpAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        IpAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    let source = std::net::UdpSocket::bind((any, 0))
        // Any port will do.
        .and_then(|socket| socket.connect((address, 9)).and_then(|()| socket.local_addr()));
    source.is_ok_and(|source| source.ip() == address)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn policy(rules: &[&str]) -> Policy {
        rules.iter().map(|rule| rule.parse::<Rule>().unwrap()).collect()
    }

    #[test]
    fn rules_read_as_they_are_written() {
        for (rule, shown) in [
            ("any", "any"),
            ("host-loopback", "host-loopback"),
            ("host-loopback:5432", "host-loopback:5432"),
            ("Example.ORG.", "example.org"),
            ("*.example.org:443", "*.example.org:443"),
            ("registry:5000-5010", "registry:5000-5010"),
            ("192.0.2.1", "192.0.2.1"),
            ("192.0.2.1:80", "192.0.2.1:80"),
            ("10.0.0.0/8:22", "10.0.0.0/8:22"),
            ("0.0.0.0/0", "0.0.0.0/0"),
            ("2001:db8::1", "2001:db8::1"),
            ("[2001:db8::1]", "2001:db8::1"),
            ("[2001:db8::1]:443", "[2001:db8::1]:443"),
            ("2001:db8::/32", "2001:db8::/32"),
            ("[2001:db8::/32]:1-65535", "[2001:db8::/32]:1-65535"),
            ("::ffff:192.0.2.1", "192.0.2.1"),
        ] {
            let parsed: Rule = rule.parse().unwrap_or_else(|error| panic!("{error}"));
            assert_eq!(parsed.to_string(), shown, "{rule}");
            assert_eq!(shown.parse(), Ok(parsed), "{shown}");
        }
    }

    #[test]
    fn what_is_no_rule_is_refused_with_a_reason() {
        for (rule, reason) in [
            ("", "names nothing"),
            (":80", "names nothing"),
            ("*", "everything is `any`"),
            ("any:80", "`any` has no port"),
            ("a b", "neither an address nor a name"),
            ("a..b", "neither an address nor a name"),
            ("*.*.org", "`*` can only stand for the first label"),
            ("a.*.org", "`*` can only stand for the first label"),
            ("bücher.example", "xn--"),
            ("1.2.3", "no IPv4 address"),
            ("1.2.3.4.5", "no IPv4 address"),
            ("256.0.0.1", "no IPv4 address"),
            ("10.0.0.1/8", "the network is 10.0.0.0/8"),
            ("10.0.0.0/33", "such as 10.0.0.0/8"),
            ("example.org/24", "such as 10.0.0.0/8"),
            ("::ffff:10.0.0.0/104", "IPv4 networks as IPv4"),
            ("example.org:0", "`0` is no port"),
            ("example.org:65536", "`65536` is no port"),
            ("example.org:+80", "`+80` is no port"),
            ("example.org:http", "`http` is no port"),
            ("example.org:", "`` is no port"),
            ("example.org:90-80", "90 to 80 are none"),
            ("[::1", "bracket is not closed"),
            ("[::1]80", "only `:PORT` may follow"),
            ("[example.org]:80", "only IPv6 addresses stand in brackets"),
            ("2001:db8::g", "no IPv6 address"),
            ("0.0.0.0", "no destination"),
            ("::", "no destination"),
            ("https://example.org", "neither"),
            (&"x".repeat(254), "neither"),
        ] {
            let error = rule.parse::<Rule>().unwrap_err();
            assert!(error.reason.contains(reason) || rule.starts_with("https"), "{error}");
            assert!(error.to_string().starts_with(&format!("`{rule}` is no rule")), "{error}");
        }
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
                matches!(wide.check_granted(address, Some(80), true), Err(Denied::Closed(_))),
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
    fn every_closed_range_is_a_range() {
        for (range, _) in CLOSED {
            let range: IpNet = range.parse().unwrap();
            assert_eq!(range, range.trunc());
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
    fn addresses_of_the_hosts_own_are_closed_but_for_themselves() {
        // Whatever the host is called: some address of its own that is not loopback.
        let socket = std::net::UdpSocket::bind("0.0.0.0:0").unwrap();
        let Ok(own) = socket.connect("192.0.2.1:9").and_then(|()| socket.local_addr()) else { return };
        let own = own.ip();
        assert_eq!(Policy::open().check(own, Some(80)), Err(Denied::Closed(OWN)));
        assert_eq!(policy(&["0.0.0.0/0"]).check(own, Some(80)), Err(Denied::Closed(OWN)));
        assert_eq!(policy(&[&format!("{own}:80")]).check(own, Some(80)), Ok(()));
        assert!(policy(&[&format!("{own}:80")]).check(own, Some(81)).is_err());
    }

    #[test]
    fn echo_requests_need_a_rule_without_a_port() {
        let address = "192.0.2.1".parse().unwrap();
        assert!(policy(&["192.0.2.0/24"]).check(address, None).is_ok());
        assert!(policy(&["192.0.2.0/24:1-65535"]).check(address, None).is_err());
    }
}
