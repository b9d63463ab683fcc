//! Addresses learned from the frames that ports send, where they are told to.
//!
//! A table of fixed size in buckets of eight, found by a keyed hash: looking up, learning and
//! forgetting take the same bounded time whoever chose the addresses. Each port has a limit, so
//! none can fill the table; an address stays at its port for [`SETTLE`] before it moves, and only
//! so many are new in a second ([`NEW_A_SECOND`]), because each makes decisions that are kept void.

use alloc::vec::Vec;

use arch::Nanos;

use crate::cache::Hasher;
use crate::rate::Bucket;
use crate::{MacAddr, PortId};

/// How many addresses may be learned in a switch, over all ports.
pub const MAX_LEARNED: u32 = 65_536;

/// How long an address stays before it moves to another port, in nanoseconds.
pub const SETTLE: u64 = 1_000_000_000;

/// How many addresses a switch learns, or moves, in a second; as many at once after a silence.
pub const NEW_A_SECOND: u64 = 256;

const BUCKET: usize = 8;

/// An address that was learned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The address.
    pub mac: MacAddr,
    /// In which VLAN.
    pub vlan: u16,
    /// Behind which port.
    pub port: PortId,
    /// When it came there.
    pub since: Nanos,
    /// When it last sent a frame.
    pub seen: Nanos,
}

/// What became of an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Learned {
    /// Known there before, at that place.
    Known(u32),
    /// New, at that place.
    New(u32),
    /// Taken from that port, at that place.
    Moved(PortId, u32),
    /// Known elsewhere, and not long enough to move; or too many are new.
    Later,
    /// No room in its bucket.
    Full,
}

/// The table.
#[derive(Clone, Debug)]
pub(crate) struct Table {
    slots: Vec<Option<Entry>>,
    budget: Bucket,
    hasher: Hasher,
}

impl Table {
    /// With room for `limit` addresses, and as much again so that buckets are rarely full.
    pub fn new(limit: u32, hasher: Hasher) -> Self {
        let count = match limit {
            0 => 0,
            limit => (limit.min(MAX_LEARNED) as usize * 2)
                .next_power_of_two()
                .max(BUCKET * 8),
        };
        Self {
            slots: alloc::vec![None; count],
            budget: Bucket::new(NEW_A_SECOND, NEW_A_SECOND, Nanos::ZERO),
            hasher,
        }
    }

    fn bucket(&self, mac: MacAddr, vlan: u16) -> usize {
        let [a, b, c, d, e, f] = mac.0;
        let word = u64::from_be_bytes([0, 0, a, b, c, d, e, f]) | u64::from(vlan) << 48;
        let buckets = self.slots.len() / BUCKET;
        (self.hasher.hash(&[word]) as usize & buckets.saturating_sub(1)) * BUCKET
    }

    fn slots(&self, bucket: usize) -> &[Option<Entry>] {
        self.slots.get(bucket..bucket + BUCKET).unwrap_or(&[])
    }

    /// Where an address is.
    pub fn find(&self, mac: MacAddr, vlan: u16) -> Option<&Entry> {
        let slots = self.slots(self.bucket(mac, vlan));
        let mut entries = slots.iter().flatten();
        entries.find(|entry| entry.mac == mac && entry.vlan == vlan)
    }

    /// Learns that an address is behind a port. A new one only if the port `has_room`.
    pub fn learn(
        &mut self,
        mac: MacAddr,
        vlan: u16,
        port: PortId,
        now: Nanos,
        has_room: bool,
    ) -> Learned {
        let bucket = self.bucket(mac, vlan);
        let mut free = None;
        for (slot, place) in self.slots(bucket).iter().zip(bucket..) {
            match slot {
                Some(entry) if entry.mac == mac && entry.vlan == vlan => {
                    return self.seen(place, port, now, has_room);
                }
                Some(_) => {}
                None => free = free.or(Some(place)),
            }
        }
        let Some(place) = free.filter(|_| has_room) else {
            return Learned::Full;
        };
        let Some(slot) = self.slots.get_mut(place) else {
            return Learned::Full;
        };
        if !self.budget.take(1, now) {
            return Learned::Later;
        }
        *slot = Some(Entry {
            mac,
            vlan,
            port,
            since: now,
            seen: now,
        });
        Learned::New(place as u32)
    }

    fn seen(&mut self, place: usize, port: PortId, now: Nanos, has_room: bool) -> Learned {
        let Some(Some(entry)) = self.slots.get_mut(place) else {
            return Learned::Full;
        };
        if entry.port == port {
            entry.seen = now;
            return Learned::Known(place as u32);
        }
        if now.since(entry.since) < SETTLE {
            return Learned::Later;
        }
        if !has_room {
            return Learned::Full;
        }
        if !self.budget.take(1, now) {
            return Learned::Later;
        }
        let from = entry.port;
        (entry.port, entry.since, entry.seen) = (port, now, now);
        Learned::Moved(from, place as u32)
    }

    /// A frame came from the address at that place.
    pub fn touch(&mut self, place: u32, now: Nanos) {
        if let Some(Some(entry)) = self.slots.get_mut(place as usize) {
            entry.seen = now;
        }
    }

    /// Puts an entry of another table here, if there is room.
    pub fn adopt(&mut self, entry: &Entry) -> bool {
        let bucket = self.bucket(entry.mac, entry.vlan);
        let slots = self.slots.get_mut(bucket..bucket + BUCKET);
        let free = slots.and_then(|slots| slots.iter_mut().find(|slot| slot.is_none()));
        match free {
            Some(slot) => *slot = Some(*entry),
            None => return false,
        }
        true
    }

    /// Forgets an address; what was known.
    pub fn remove(&mut self, mac: MacAddr, vlan: u16) -> Option<Entry> {
        let bucket = self.bucket(mac, vlan);
        let slots = self.slots.get_mut(bucket..bucket + BUCKET)?;
        let at = |slot: &&mut Option<Entry>| {
            slot.is_some_and(|entry| entry.mac == mac && entry.vlan == vlan)
        };
        slots.iter_mut().find(at)?.take()
    }

    /// Forgets what `stays` does not hold for; calls `gone` with each.
    pub fn retain(&mut self, stays: impl Fn(&Entry) -> bool, mut gone: impl FnMut(&Entry)) {
        for slot in &mut self.slots {
            if let Some(entry) = slot
                && !stays(entry)
            {
                gone(entry);
                *slot = None;
            }
        }
    }

    /// All, in no order.
    pub fn entries(&self) -> impl Iterator<Item = &Entry> {
        self.slots.iter().flatten()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mac(n: u8) -> MacAddr {
        MacAddr([2, 0, 0, 0, 0, n])
    }

    fn table(limit: u32) -> Table {
        Table::new(limit, Hasher::new([1, 2]))
    }

    #[test]
    fn an_address_is_found_in_its_vlan_only() {
        let mut table = table(8);
        let learned = table.learn(mac(1), 5, PortId(3), Nanos(7), true);
        assert!(matches!(learned, Learned::New(_)));
        assert_eq!(
            table.find(mac(1), 5).map(|entry| entry.port),
            Some(PortId(3))
        );
        assert_eq!(table.find(mac(1), 6), None);
        assert_eq!(table.find(mac(2), 5), None);
    }

    #[test]
    fn it_moves_only_when_it_has_settled_and_there_is_room() {
        let mut table = table(8);
        let later = Nanos(SETTLE);
        table.learn(mac(1), 0, PortId(1), Nanos(0), true);
        let mut there = |now, room| table.learn(mac(1), 0, PortId(2), now, room);
        assert_eq!(there(Nanos(SETTLE - 1), true), Learned::Later);
        assert_eq!(there(later, false), Learned::Full);
        assert!(matches!(there(later, true), Learned::Moved(PortId(1), _)));
        assert!(matches!(there(later, false), Learned::Known(_)));
    }

    #[test]
    fn a_table_without_room_learns_nothing_and_panics_never() {
        let mut table = table(0);
        assert_eq!(
            table.learn(mac(1), 0, PortId(1), Nanos(0), true),
            Learned::Full
        );
        assert_eq!(table.find(mac(1), 0), None);
        table.touch(u32::MAX, Nanos(0));
    }

    #[test]
    fn forgetting_names_those_that_are_gone() {
        let mut table = table(64);
        for n in 0..64 {
            table.learn(mac(n), 0, PortId(1), Nanos(n.into()), true);
        }
        let known = table.entries().count();
        assert!(known >= 60, "{known} of 64 found room");
        let mut gone = Vec::new();
        table.retain(|entry| entry.seen.0 >= 10, |entry| gone.push(entry.mac));
        assert_eq!(table.entries().count() + gone.len(), known);
        assert!(gone.iter().all(|mac| mac.0[5] < 10));
    }

    #[test]
    fn only_so_many_are_new_in_a_second() {
        let mut table = table(MAX_LEARNED);
        let mut new = |now| {
            let macs = (0..2000u32).map(|n| MacAddr([2, 0, 0, now as u8, (n >> 8) as u8, n as u8]));
            let learned = macs.map(|mac| table.learn(mac, 0, PortId(1), Nanos(now * SETTLE), true));
            learned.filter(|it| matches!(it, Learned::New(_))).count() as u64
        };
        assert_eq!(new(0), NEW_A_SECOND);
        assert_eq!(new(1), NEW_A_SECOND);
    }

    #[test]
    fn what_is_removed_is_gone_alone() {
        let mut table = table(8);
        for vlan in 0..3 {
            table.learn(mac(1), vlan, PortId(1), Nanos(0), true);
        }
        assert_eq!(table.remove(mac(1), 1).map(|entry| entry.vlan), Some(1));
        assert_eq!(table.remove(mac(1), 1), None);
        assert_eq!(table.entries().count(), 2);
    }
}
