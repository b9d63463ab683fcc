//! Several uplinks: which one is whose, and what is announced when that changes (R4, R6, R8).
//!
//! One uplink is active for a VLAN: the first of the order with a link. By it alone broadcasts and
//! multicasts come in (R4). A guest has its own uplink: the one it is pinned to while that has a
//! link, else the active one, or one by its port's number if so configured. All it sends to the
//! outside leaves there, so nothing is sent twice or overtaken (R10), and with the strict reverse
//! path its unicasts come in by that one only (R6): physical switches that do not know an address
//! yet flood its frames to all uplinks.
//!
//! A failure is seen by the link and, where there are three uplinks or more, by [`crate::beacon`]s
//! (R8).

use alloc::vec::Vec;

use crate::key::{Vlan, ether};
use crate::order::sort;
use crate::port::{PortKind, Tags};
use crate::switch::Core;
use crate::{MacAddr, PortId};

/// How guests that are not pinned get an uplink.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Spread {
    /// The active one for all; the others stand by.
    #[default]
    Failover,
    /// By the number of their port, over all that have a link.
    ByPort,
}

/// How several uplinks are used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Teaming {
    /// Which is preferred; those not named come after, by number.
    pub order: Vec<PortId>,
    /// Who gets which.
    pub spread: Spread,
    /// A guest's unicasts are accepted on its own uplink only (R6).
    pub reverse_path: bool,
}

impl Default for Teaming {
    fn default() -> Self {
        Self {
            order: Vec::new(),
            spread: Spread::Failover,
            reverse_path: true,
        }
    }
}

/// Announcements that wait to be sent, at most; further ones are left out.
pub const MAX_ANNOUNCEMENTS: usize = 16_384;

/// An address and the uplink that the outside finds it by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Home {
    pub mac: MacAddr,
    pub vlan: u16,
    pub uplink: Option<PortId>,
}

impl Core {
    /// The uplinks with a link in a VLAN, by preference; those that are lost only if all are.
    fn usable(&self, vlan: u16) -> impl Iterator<Item = usize> + '_ {
        let carries = move |place: &usize| {
            let port = self.ports.get(*place);
            port.is_some_and(|port| port.up && port.vlan.carries(vlan))
        };
        let linked = move || self.uplinks.iter().copied().filter(carries);
        let lost = move |place: &usize| self.ports.get(*place).is_some_and(|port| port.lost);
        let all_lost = linked().all(|place| lost(&place));
        linked().filter(move |place| all_lost || !lost(place))
    }

    /// The active uplink of a VLAN.
    pub(crate) fn active(&self, vlan: u16) -> Option<usize> {
        self.usable(vlan).next()
    }

    /// The uplink of the port at `place` in a VLAN.
    pub(crate) fn uplink_of(&self, place: usize, vlan: u16) -> Option<usize> {
        let port = self.ports.get(place)?;
        if let Some(pinned) = port.pinned
            && self.usable(vlan).any(|uplink| uplink == pinned)
        {
            return Some(pinned);
        }
        match self.teaming.spread {
            Spread::Failover => self.active(vlan),
            Spread::ByPort => {
                let count = self.usable(vlan).count();
                let turn = usize::from(port.id().0).checked_rem(count)?;
                self.usable(vlan).nth(turn)
            }
        }
    }

    /// Where the outside finds the addresses that are here, in order.
    pub(crate) fn homes(&self) -> Vec<Home> {
        let mut homes = Vec::new();
        for place in 0..self.ports.len() {
            self.homes_of(place, &mut homes);
        }
        sort(&mut homes);
        homes.dedup();
        homes
    }

    /// The addresses of the port at `place`, configured and learned.
    pub(crate) fn homes_of(&self, place: usize, homes: &mut Vec<Home>) {
        let Some(port) = self
            .ports
            .get(place)
            .filter(|port| port.is_local() && !port.departed)
        else {
            return;
        };
        let mut add = |mac, vlan| {
            if homes.len() < MAX_ANNOUNCEMENTS {
                let uplink = self.uplink_of(place, vlan);
                let uplink = uplink.and_then(|uplink| self.ports.get(uplink));
                homes.push(Home {
                    mac,
                    vlan,
                    uplink: uplink.map(|uplink| uplink.id()),
                });
            }
        };
        for mac in &port.config.macs {
            port.vlan.announced().for_each(|vlan| add(*mac, vlan));
        }
        let learned = self.learned.entries();
        let learned = learned.filter(|entry| entry.port == port.id());
        learned.for_each(|entry| add(entry.mac, entry.vlan));
    }

    /// Has those announced that are found by another uplink than `before`.
    pub(crate) fn announce_moved(&mut self, before: &[Home]) {
        let mut now = self.homes();
        now.retain(|home| home.uplink.is_some() && before.binary_search(home).is_err());
        self.announce(&now);
    }

    pub(crate) fn announce(&mut self, homes: &[Home]) {
        let room = MAX_ANNOUNCEMENTS.saturating_sub(self.announcements.len());
        self.announcements.extend(homes.iter().take(room));
    }

    /// The next beacon, or announcement: a RARP request for the address's own (RFC 903), which teaches
    /// physical switches and asks nobody. The uplink, and how long it is.
    pub(crate) fn announcement(&mut self, frame: &mut [u8; 64]) -> Option<(PortId, usize)> {
        if let Some(beacon) = self.beacon(frame) {
            return Some(beacon);
        }
        loop {
            let home = self.announcements.pop_front()?;
            let place = home.uplink.and_then(|uplink| self.place(uplink));
            let Some(port) = place.and_then(|place| self.ports.get_mut(place)) else {
                continue;
            };
            let tags = Tags::of(home.vlan);
            let usable = port.is(PortKind::Uplink) && port.up && port.vlan.includes(tags);
            let vlans = port.vlan.leave(tags, [Vlan::NONE; 2]);
            if let Some(vlans) = vlans.filter(|_| usable) {
                let length = rarp(home.mac, vlans, frame);
                port.counters.tx_frames += 1;
                port.counters.tx_bytes += length as u64;
                return Some((port.id(), length));
            }
        }
    }
}

fn rarp(mac: MacAddr, vlans: [Vlan; 2], frame: &mut [u8; 64]) -> usize {
    *frame = [0; 64];
    let mut place = frame.iter_mut();
    let mut put = |bytes: &[u8]| {
        bytes
            .iter()
            .zip(&mut place)
            .for_each(|(byte, to)| *to = *byte)
    };
    put(&MacAddr::BROADCAST.0);
    put(&mac.0);
    for tag in vlans.iter().take_while(|tag| tag.present()).take(1) {
        put(&tag.tpid.to_be_bytes());
        put(&(tag.tci & !Vlan::PRESENT).to_be_bytes());
    }
    put(&ether::RARP.to_be_bytes());
    // Ethernet, IPv4, their lengths, request reverse.
    put(&[0, 1, 8, 0, 6, 4, 0, 3]);
    put(&mac.0);
    put(&[0; 4]);
    put(&mac.0);
    put(&[0; 4]);
    if vlans[0].present() { 64 } else { 60 }
}
