//! Addresses that are open to one guest because it was told a name that leads to them.

use std::collections::HashMap;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use crate::policy::{Ports, canonical};

/// Addresses that are remembered; beyond, those go first that would be forgotten first.
const MOST: usize = 4096;
/// Rules that can open the same address.
const MOST_RULES: usize = 16;
/// Programs use an address a little longer than its record allows: they resolve, then do something, then connect.
const LEAST: Duration = Duration::from_secs(60);
const LONGEST: Duration = Duration::from_secs(24 * 3600);

#[derive(Debug, Default)]
pub(super) struct Grants(HashMap<IpAddr, Vec<(Ports, Instant)>>);

impl Grants {
    /// Opens an address at these ports for the time that its record lives, within reason.
    pub(super) fn grant(&mut self, address: IpAddr, ports: Ports, ttl: Duration, now: Instant) {
        let address = canonical(address);
        let until = now + ttl.clamp(LEAST, LONGEST);
        if self.0.len() >= MOST && !self.0.contains_key(&address) {
            self.make_room(now);
        }
        let rules = self.0.entry(address).or_default();
        rules.retain(|(known, end)| *known != ports && *end > now);
        if rules.len() < MOST_RULES {
            rules.push((ports, until));
        }
    }

    pub(super) fn allow(&self, address: IpAddr, port: Option<u16>, now: Instant) -> bool {
        let rules = self.0.get(&canonical(address)).map(Vec::as_slice).unwrap_or_default();
        rules.iter().any(|(ports, until)| ports.contain(port) && *until > now)
    }

    fn make_room(&mut self, now: Instant) {
        let end = |rules: &[(Ports, Instant)]| rules.iter().map(|(_, until)| *until).max();
        self.0.retain(|_, rules| end(rules).is_some_and(|end| end > now));
        if self.0.len() >= MOST
            && let Some(first) =
                self.0.iter().min_by_key(|(_, rules)| end(rules)).map(|(address, _)| *address)
        {
            self.0.remove(&first);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_granted_ends_with_its_record_but_not_at_once() {
        let (mut grants, now) = (Grants::default(), Instant::now());
        let address: IpAddr = "192.0.2.1".parse().unwrap();
        grants.grant(address, Ports::These(443, 443), Duration::from_secs(300), now);
        let later = |seconds| now + Duration::from_secs(seconds);
        assert!(grants.allow(address, Some(443), later(299)));
        assert!(grants.allow("::ffff:192.0.2.1".parse().unwrap(), Some(443), now));
        assert!(!grants.allow(address, Some(443), later(300)));
        assert!(!grants.allow(address, Some(80), now));
        assert!(!grants.allow(address, None, now), "no echo requests");
        assert!(!grants.allow("192.0.2.2".parse().unwrap(), Some(443), now));
        grants.grant(address, Ports::All, Duration::ZERO, now);
        assert!(grants.allow(address, Some(80), later(59)) && !grants.allow(address, Some(80), later(60)));
        assert!(grants.allow(address, Some(443), later(299)), "two names led here");
        grants.grant(address, Ports::These(443, 443), Duration::from_secs(u64::from(u32::MAX)), now);
        assert!(!grants.allow(address, Some(443), later(24 * 3600)));
    }

    #[test]
    fn a_guest_that_resolves_without_end_takes_no_more_room() {
        let (mut grants, now) = (Grants::default(), Instant::now());
        for number in 0..MOST as u32 + 100 {
            let ttl = Duration::from_secs(100 + u64::from(number));
            grants.grant(IpAddr::from(number.to_be_bytes()), Ports::All, ttl, now);
        }
        assert_eq!(grants.0.len(), MOST);
        assert!(!grants.allow(IpAddr::from(99u32.to_be_bytes()), None, now), "those that end first go first");
        assert!(grants.allow(IpAddr::from(100u32.to_be_bytes()), None, now));
    }
}
