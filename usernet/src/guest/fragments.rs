//! Puts fragments of IPv4 packets together: containers inside the guest, behind a narrower device, send them.

use std::collections::VecDeque;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use super::packet::{Fragment, Packet};

/// Packets that are being put together.
const MOST: usize = 16;
/// Pieces of one packet: 64 KiB in the smallest that Ethernet makes is 45.
const MOST_PIECES: usize = 128;
/// The largest packet.
const LONGEST: usize = 65_535;
const PATIENCE: Duration = Duration::from_secs(15);

/// Packets of which parts are missing, the oldest first.
#[derive(Debug, Default)]
pub(super) struct Fragments(VecDeque<Partial>);

#[derive(Debug)]
struct Partial {
    source: IpAddr,
    destination: IpAddr,
    identification: u16,
    protocol: u8,
    since: Instant,
    /// Where each begins, and its bytes; sorted, and none overlaps another.
    pieces: Vec<(usize, Vec<u8>)>,
    length: Option<usize>,
}

impl Fragments {
    /// Takes a fragment; the protocol and the payload of the packet that it completes, if it does.
    ///
    /// Fragments that overlap are an attack or a fault: the whole packet is forgotten (RFC 5722 has it so for IPv6).
    pub(super) fn take(
        &mut self,
        packet: &Packet<'_>,
        part: &Fragment<'_>,
        now: Instant,
    ) -> Option<(u8, Vec<u8>)> {
        self.0.retain(|partial| now.duration_since(partial.since) < PATIENCE);
        let same = |partial: &Partial| {
            (partial.source, partial.destination) == (packet.source, packet.destination)
                && (partial.identification, partial.protocol) == (part.identification, part.protocol)
        };
        let index = match self.0.iter().position(same) {
            Some(index) => index,
            None => {
                if self.0.len() >= MOST {
                    self.0.pop_front();
                }
                self.0.push_back(Partial {
                    source: packet.source,
                    destination: packet.destination,
                    identification: part.identification,
                    protocol: part.protocol,
                    since: now,
                    pieces: Vec::new(),
                    length: None,
                });
                self.0.len() - 1
            }
        };
        if !self.0[index].add(part) {
            self.0.remove(index);
            return None;
        }
        if !self.0[index].is_complete() {
            return None;
        }
        let whole = self.0.remove(index)?;
        Some((whole.protocol, whole.pieces.into_iter().flat_map(|(_, data)| data).collect()))
    }
}

impl Partial {
    /// `false` where it does not fit to the others.
    fn add(&mut self, part: &Fragment<'_>) -> bool {
        let end = part.offset + part.data.len();
        if part.data.is_empty() || end > LONGEST || self.pieces.len() >= MOST_PIECES {
            return false;
        }
        if part.last && self.length.replace(end).is_some_and(|known| known != end) {
            return false;
        }
        let at = self.pieces.partition_point(|(offset, _)| *offset < part.offset);
        let after_previous = at == 0 || {
            let (offset, data) = &self.pieces[at - 1];
            offset + data.len() <= part.offset
        };
        let before_next = self.pieces.get(at).is_none_or(|(offset, _)| end <= *offset);
        if self.length.is_some_and(|length| end > length) || !after_previous || !before_next {
            return false;
        }
        self.pieces.insert(at, (part.offset, part.data.to_vec()));
        true
    }

    fn is_complete(&self) -> bool {
        let mut reached = 0;
        self.pieces.iter().all(|(offset, data)| {
            let follows = *offset == reached;
            reached += data.len();
            follows
        }) && self.length == Some(reached)
    }
}

#[cfg(test)]
mod tests {
    use super::super::packet::Body;
    use super::*;

    /// What comes of parts given as (offset, length, last), each filled with its number.
    fn put_together(parts: &[(usize, usize, bool)]) -> Vec<Vec<u8>> {
        let address = IpAddr::from([192, 0, 0, 2]);
        let packet = Packet { source: address, destination: address, bytes: &[], body: Body::Other };
        let (mut fragments, now) = (Fragments::default(), Instant::now());
        let whole = parts.iter().enumerate().filter_map(|(number, (offset, length, last))| {
            let data = vec![number as u8; *length];
            let part =
                Fragment { identification: 7, protocol: 17, offset: *offset, last: *last, data: &data };
            fragments.take(&packet, &part, now)
        });
        whole.map(|(_, data)| data).collect()
    }

    #[test]
    fn parts_make_a_whole_in_any_order_and_none_where_they_overlap() {
        let whole = |parts: &[(usize, usize, bool)]| put_together(parts);
        assert_eq!(whole(&[(0, 8, false), (8, 3, true)]), [[[0; 8].as_slice(), &[1; 3]].concat()]);
        assert_eq!(whole(&[(8, 3, true), (0, 8, false)]), [[[1; 8].as_slice(), &[0; 3]].concat()]);
        for nothing in [
            &[(0, 8, false)][..],
            &[(0, 8, false), (16, 8, true)],
            &[(0, 16, false), (8, 8, true), (8, 8, true)],
            &[(0, 8, false), (8, 8, true), (4, 8, false)][2..],
            &[(8, 8, true), (8, 16, true), (0, 8, false)],
            &[(0, 0, true)],
            &[(65_528, 8, true), (0, 65_528, false)],
        ] {
            assert!(whole(nothing).is_empty(), "{nothing:?}");
        }
        assert_eq!(whole(&[(0, 65_528, false), (65_528, 7, true)])[0].len(), 65_535);
    }

    #[test]
    fn many_beginnings_without_an_end_take_no_more_room_than_a_few() {
        let mut fragments = Fragments::default();
        let now = Instant::now();
        let address = IpAddr::from([192, 0, 0, 2]);
        let packet = Packet { source: address, destination: address, bytes: &[], body: Body::Other };
        for identification in 0..1000 {
            let part = Fragment { identification, protocol: 17, offset: 0, last: false, data: &[0; 8] };
            assert_eq!(fragments.take(&packet, &part, now), None);
        }
        assert_eq!(fragments.0.len(), MOST);
        let later = now + PATIENCE;
        let part = Fragment { identification: 0, protocol: 17, offset: 0, last: false, data: &[0; 8] };
        assert_eq!(fragments.take(&packet, &part, later), None);
        assert_eq!(fragments.0.len(), 1, "what is old is forgotten");
    }
}
