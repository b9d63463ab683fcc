//! Beacons: how a switch of three uplinks or more finds one that has a link and leads nowhere (R8).
//!
//! Once a second each uplink sends a frame that the others are to hear, as all of them lead to one
//! network. Two that hear each other are joined; those outside the one largest set of joined
//! uplinks are lost, and treated like those without a link where there is another. Where nobody
//! hears anybody (a network that drops beacons, uplinks in networks of their own), or two sets are
//! equally large, beacons tell nothing, and nobody is lost. That takes three uplinks with a link:
//! of two, nobody can say which one it is.
//!
//! A beacon has no tag, so it speaks for the VLAN that the network gives it. It is for its own
//! switch alone: it says its second and proves with a keyed sum that it was sent here, so that
//! guests and strangers cannot vouch for a dead uplink. Other switches drop it.

use alloc::vec::Vec;

use arch::Nanos;

use crate::cache::Hasher;
use crate::key::FlowKey;
use crate::port::PortKind;
use crate::switch::Core;
use crate::{MacAddr, PortId};

/// Whom beacons are for: a group that nobody else has, locally administered (IEEE 802-2014 §8.4).
pub const GROUP: MacAddr = MacAddr([0x03, 0x54, 0x65, 0x73, 0x73, 0x01]);
/// What they are: an EtherType for experiments of one's own (IEEE 802-2014 §9.2.4).
pub const ETHER_TYPE: u16 = 0x88b5;
/// The fewest uplinks of which one can be told to be lost, and the most that send beacons.
pub const UPLINKS: core::ops::RangeInclusive<usize> = 3..=16;
/// How often they are sent, in nanoseconds.
const BEAT: u64 = 1_000_000_000;
/// For how long one that was heard holds: three may get lost.
const HOLDS: u64 = 3_500_000_000;
/// How many bytes of a beacon mean something.
const LENGTH: usize = 40;

/// What the uplinks of a switch hear of each other.
#[derive(Clone, Debug)]
pub(crate) struct Beacons {
    hasher: Hasher,
    /// The uplinks, by number; none if they are too few or too many.
    uplinks: Vec<PortId>,
    /// When each heard each: the hearer's row, the sender's column.
    heard: Vec<Option<Nanos>>,
    /// When the next are to be sent.
    next: Nanos,
    /// The beat of those that are sent now, and the uplinks that are to send them, a bit each.
    beat: u64,
    due: u32,
    /// Who hears enough to tell that others are lost.
    judging: bool,
}

impl Beacons {
    pub fn new(uplinks: impl Iterator<Item = PortId>, hasher: &Hasher) -> Self {
        let mut uplinks: Vec<PortId> = uplinks.collect();
        if !UPLINKS.contains(&uplinks.len()) {
            uplinks.clear();
        }
        // Apart from the sums that hide addresses: these are seen on the wire.
        let secret = [hasher.hash(&[1, 0xbeac]), hasher.hash(&[2, 0xbeac])];
        Self {
            hasher: Hasher::new(secret),
            heard: alloc::vec![None; uplinks.len() * uplinks.len()],
            uplinks,
            next: Nanos::ZERO,
            beat: 0,
            due: 0,
            judging: false,
        }
    }

    /// Goes on from what was heard under another configuration of the same uplinks.
    pub fn inherit(&mut self, older: &Self) -> bool {
        let same = self.uplinks == older.uplinks;
        if same {
            self.clone_from(older);
        }
        same
    }

    fn turn(&self, id: PortId) -> Option<usize> {
        self.uplinks.iter().position(|uplink| *uplink == id)
    }

    /// The address that an uplink sends them from: nobody's.
    fn source(&self, id: PortId) -> MacAddr {
        let [_, a, b, c, d, e, ..] = self.hasher.hash(&[3, id.0.into()]).to_le_bytes();
        MacAddr([0x02, a, b, c, d, e])
    }

    fn sum(&self, id: PortId, beat: u64) -> u64 {
        self.hasher.hash(&[4, id.0.into(), beat])
    }

    /// Writes the beacon of an uplink.
    fn write(&self, id: PortId, frame: &mut [u8; 64]) {
        *frame = [0; 64];
        let pieces: [&[u8]; 6] = [
            &GROUP.0,
            &self.source(id).0,
            &ETHER_TYPE.to_be_bytes(),
            &id.0.to_be_bytes(),
            &self.beat.to_be_bytes(),
            &self.sum(id, self.beat).to_be_bytes(),
        ];
        let bytes = pieces.iter().copied().flatten();
        frame
            .iter_mut()
            .zip(bytes)
            .for_each(|(to, from)| *to = *from);
    }

    /// Hears a frame at an uplink: a beacon of another one, of this switch and not an old one.
    fn hear(&mut self, at: PortId, frame: &[u8], now: Nanos) -> Option<()> {
        let (hearer, rest) = (self.turn(at)?, frame.get(14..LENGTH)?);
        let (id, rest) = rest.split_first_chunk()?;
        let (beat, rest) = rest.split_first_chunk()?;
        let (id, beat) = (PortId(u16::from_be_bytes(*id)), u64::from_be_bytes(*beat));
        let sum = u64::from_be_bytes(*rest.first_chunk()?);
        let sender = self.turn(id)?;
        let recent = self.beat.checked_sub(beat)? <= HOLDS / BEAT;
        if recent && sum == self.sum(id, beat) {
            *self.heard.get_mut(hearer * self.uplinks.len() + sender)? = Some(now);
        }
        Some(())
    }

    /// Whether two hear each other.
    fn joined(&self, a: usize, b: usize, now: Nanos) -> bool {
        let hears = |hearer: usize, sender: usize| {
            let heard = self.heard.get(hearer * self.uplinks.len() + sender);
            heard
                .copied()
                .flatten()
                .is_some_and(|at| now.since(at) < HOLDS)
        };
        hears(a, b) && hears(b, a)
    }

    /// The largest set of those `there` that are joined, a bit each; none if there is no one
    /// largest of two or more.
    fn largest(&self, there: u32, now: Nanos) -> u32 {
        let count = self.uplinks.len();
        let (mut left, mut best, mut alone) = (there, 0u32, true);
        for first in 0..count {
            let mut set = left & 1 << first;
            left &= !set;
            // As many rounds as there can be steps from one to the farthest.
            for _ in 0..count {
                for (a, b) in (0..count).flat_map(|a| (0..count).map(move |b| (a, b))) {
                    if set >> a & 1 != 0 && left >> b & 1 != 0 && self.joined(a, b, now) {
                        set |= 1 << b;
                        left &= !(1 << b);
                    }
                }
            }
            match set.count_ones().cmp(&best.count_ones()) {
                core::cmp::Ordering::Greater => (best, alone) = (set, true),
                core::cmp::Ordering::Equal => alone = false,
                core::cmp::Ordering::Less => {}
            }
        }
        if alone && best.count_ones() >= 2 {
            best
        } else {
            0
        }
    }
}

impl Core {
    /// Whether a frame is a beacon, of whatever switch.
    pub(crate) fn is_beacon(key: &FlowKey) -> bool {
        key.dl_type == ETHER_TYPE && key.dl_dst == GROUP
    }

    /// Hears a beacon that came in by a port.
    pub(crate) fn hear(&mut self, at: PortId, key: &FlowKey, header: &[u8], now: Nanos) {
        if Self::is_beacon(key) && !key.vlans[0].present() {
            // What is no beacon of this switch tells nothing.
            let _ = self.beacons.hear(at, header, now);
        }
    }

    /// Has beacons sent when it is time, and judges by those that were heard; whether an uplink was
    /// lost or found.
    pub(crate) fn beat(&mut self, now: Nanos) -> bool {
        let count = self.beacons.uplinks.len();
        if count == 0 {
            return false;
        }
        if now >= self.beacons.next {
            self.beacons.next = now + BEAT;
            self.beacons.beat += 1;
            self.beacons.due = (1 << count) - 1;
        }
        let mut there = 0u32;
        for turn in 0..count {
            let id = self.beacons.uplinks.get(turn).copied();
            let up = id.and_then(|id| self.port(id)).is_some_and(|port| port.up);
            there |= u32::from(up) << turn;
        }
        let largest = match there.count_ones() as usize {
            up if up >= *UPLINKS.start() => self.beacons.largest(there, now),
            _ => 0,
        };
        self.beacons.judging = largest != 0;
        let lost = if largest == 0 { 0 } else { there & !largest };
        let before = self.homes();
        let mut changed = false;
        for turn in 0..count {
            let id = self.beacons.uplinks.get(turn).copied();
            let Some(port) = id.and_then(|id| self.port_mut(id)) else {
                continue;
            };
            let now = lost >> turn & 1 != 0;
            changed |= core::mem::replace(&mut port.lost, now) != now;
        }
        if changed {
            self.announce_moved(&before);
        }
        changed
    }

    /// A link came or went: what was heard by it and of it is over. One that comes has to be heard
    /// before it is used, if the others hear each other.
    pub(crate) fn forget_beacons(&mut self, id: PortId, up: bool) {
        let count = self.beacons.uplinks.len();
        let Some(turn) = self.beacons.turn(id) else {
            return;
        };
        for (place, heard) in self.beacons.heard.iter_mut().enumerate() {
            if place / count == turn || place % count == turn {
                *heard = None;
            }
        }
        let lost = up && self.beacons.judging;
        if let Some(port) = self.port_mut(id) {
            port.lost = lost;
        }
    }

    /// The next beacon that is to be sent: the uplink, and how long it is.
    pub(crate) fn beacon(&mut self, frame: &mut [u8; 64]) -> Option<(PortId, usize)> {
        while self.beacons.due != 0 {
            let turn = self.beacons.due.trailing_zeros();
            self.beacons.due &= self.beacons.due - 1;
            let id = *self.beacons.uplinks.get(turn as usize)?;
            let Some(port) = self.port_mut(id) else {
                continue;
            };
            if port.up && port.is(PortKind::Uplink) {
                let length = crate::MIN_FRAME;
                port.counters.tx_frames += 1;
                port.counters.tx_bytes += length as u64;
                self.beacons.write(id, frame);
                return Some((id, length));
            }
        }
        None
    }
}
