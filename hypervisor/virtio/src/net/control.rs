//! The control queue (virtio 1.2 §5.1.6.5): what the driver sets while it runs, and the filters
//! that come of it.
//!
//! A command is done whole or not at all, and needs the feature that it belongs to. Tables are
//! bounded: a driver with more addresses than fit gets all frames of that kind, as §5.1.6.5.2
//! allows.

use alloc::{vec, vec::Vec};

use arch::GuestMemory;
use serde::{Deserialize, Serialize};

use super::feature;
use super::frame::vlan;
use crate::chain::{Chain, QueueError};

/// Addresses kept of a kind.
pub const MAX_ADDRESSES: u32 = 64;
/// Identifiers of VLANs.
const VLANS: u16 = 4096;

const CLASS_RX: u8 = 0;
const CLASS_MAC: u8 = 1;
const CLASS_VLAN: u8 = 2;
const CLASS_ANNOUNCE: u8 = 3;
const CLASS_MQ: u8 = 4;
const CLASS_GUEST_OFFLOADS: u8 = 5;

// Receive modes, by the number of the command that sets them.
const PROMISCUOUS: u8 = 0;
const ALL_MULTICAST: u8 = 1;
const ALL_UNICAST: u8 = 2;
const NO_MULTICAST: u8 = 3;
const NO_UNICAST: u8 = 4;
const NO_BROADCAST: u8 = 5;

/// A frame that the driver does not want.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Unwanted {
    Address,
    Vlan,
}

/// Destination addresses of one kind that the driver wants.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
enum Addresses {
    /// None.
    #[default]
    None,
    /// These.
    Some(Vec<[u8; 6]>),
    /// More than fit.
    All,
}

impl Addresses {
    fn has(&self, address: [u8; 6]) -> bool {
        match self {
            Self::None => false,
            Self::Some(list) => list.contains(&address),
            Self::All => true,
        }
    }
}

/// What the driver negotiated and set. Gone with a reset.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Settings {
    /// What was negotiated.
    pub features: u64,
    /// What may be left undone on frames to the driver: GUEST_… feature bits.
    pub offloads: u64,
    /// Pairs of queues in use.
    pub pairs: u16,
    /// The driver is asked to announce itself.
    pub announce: bool,
    /// The driver's own address, if the device knows it.
    pub mac: Option<[u8; 6]>,
    /// The address that the driver asked for last, granted or not, until it is passed on.
    pub asked: Option<[u8; 6]>,
    /// Whether the driver wants unicasts that are not for it, if that has changed since it was
    /// passed on.
    pub asked_all: Option<bool>,
    /// A bit for each receive mode.
    modes: u8,
    unicast: Addresses,
    multicast: Addresses,
    /// A bit for each VLAN; empty is none.
    vlans: Vec<u64>,
}

impl Settings {
    /// How a driver that negotiated these features finds the device.
    pub fn new(features: u64, mac: [u8; 6]) -> Self {
        Self {
            features,
            offloads: features & feature::GUEST_OFFLOADS,
            pairs: 1,
            announce: false,
            mac: (features & feature::MAC != 0).then_some(mac),
            asked: None,
            asked_all: None,
            modes: 0,
            unicast: Addresses::None,
            multicast: Addresses::None,
            vlans: Vec::new(),
        }
    }

    pub const fn has(&self, features: u64) -> bool {
        self.features & features == features
    }

    const fn mode(&self, command: u8) -> bool {
        self.modes & 1 << command != 0
    }

    /// Whether the driver wants unicasts that are not for it.
    pub const fn is_promiscuous(&self) -> bool {
        self.mode(PROMISCUOUS) || self.mode(ALL_UNICAST)
    }

    /// Whether the driver wants the frame that starts like this (§5.1.6.5.1 to §5.1.6.5.3). A
    /// driver that cannot set filters gets all that comes.
    pub fn wants(&self, head: &[u8]) -> Result<(), Unwanted> {
        if self.mode(PROMISCUOUS) {
            return Ok(());
        }
        let to = head.first_chunk().copied().unwrap_or_default();
        if self.has(feature::CTRL_RX) && !self.wants_address(to) {
            return Err(Unwanted::Address);
        }
        match vlan(head) {
            // 0 is a priority, no VLAN.
            Some(id @ 1..) if self.has(feature::CTRL_VLAN) && !self.has_vlan(id) => {
                Err(Unwanted::Vlan)
            }
            _ => Ok(()),
        }
    }

    fn wants_address(&self, to: [u8; 6]) -> bool {
        let [first, ..] = to;
        if to == [0xff; 6] {
            !self.mode(NO_BROADCAST)
        } else if first & 1 != 0 {
            !self.mode(NO_MULTICAST) && (self.mode(ALL_MULTICAST) || self.multicast.has(to))
        } else {
            let own = self.mac.is_none_or(|mac| mac == to);
            !self.mode(NO_UNICAST) && (own || self.mode(ALL_UNICAST) || self.unicast.has(to))
        }
    }

    fn has_vlan(&self, id: u16) -> bool {
        let word = self.vlans.get(usize::from(id / 64));
        word.is_some_and(|word| word & 1 << (id % 64) != 0)
    }

    /// Does the command in `chain`, and says in its writable part whether it was done. Gives the
    /// bytes written there. The driver gets another address only where it `may_move`.
    ///
    /// # Errors
    /// A buffer is not in RAM.
    pub fn command(
        &mut self,
        mem: &mut dyn GuestMemory,
        chain: &Chain,
        max_pairs: u16,
        may_move: bool,
    ) -> Result<u32, QueueError> {
        let mut data = Data {
            mem,
            chain,
            offset: 0,
        };
        // What cannot be answered is not done.
        let done =
            chain.writable_bytes() > 0 && self.perform(&mut data, max_pairs, may_move)?.is_some();
        let written = chain.write(mem, 0, &[u8::from(!done)])?;
        Ok(u32::from(written != 0))
    }

    fn perform(
        &mut self,
        data: &mut Data<'_>,
        max_pairs: u16,
        may_move: bool,
    ) -> Result<Option<()>, QueueError> {
        let Some([class, command]) = data.take()? else {
            return Ok(None);
        };
        let needed = match (class, command) {
            (CLASS_RX, PROMISCUOUS | ALL_MULTICAST) | (CLASS_MAC, 0) => feature::CTRL_RX,
            (CLASS_RX, ALL_UNICAST..=NO_BROADCAST) => feature::CTRL_RX_EXTRA,
            (CLASS_MAC, 1) => feature::CTRL_MAC_ADDR,
            (CLASS_VLAN, 0 | 1) => feature::CTRL_VLAN,
            (CLASS_ANNOUNCE, 0) => feature::GUEST_ANNOUNCE,
            (CLASS_MQ, 0) => feature::MQ,
            (CLASS_GUEST_OFFLOADS, 0) => feature::CTRL_GUEST_OFFLOADS,
            _ => return Ok(None),
        };
        if !self.has(needed) {
            return Ok(None);
        }
        match (class, command) {
            (CLASS_RX, _) => Ok(data.take()?.and_then(|[on]| self.set_mode(command, on))),
            (CLASS_MAC, 0) => self.set_tables(data),
            (CLASS_MAC, _) => Ok(data.take()?.and_then(|mac| self.set_mac(mac, may_move))),
            (CLASS_VLAN, _) => Ok(data
                .take()?
                .and_then(|id| self.set_vlan(u16::from_le_bytes(id), command == 0))),
            (CLASS_ANNOUNCE, _) => {
                self.announce = false;
                Ok(Some(()))
            }
            (CLASS_MQ, _) => Ok(data
                .take()?
                .map(u16::from_le_bytes)
                .filter(|pairs| (1..=max_pairs).contains(pairs))
                .map(|pairs| self.pairs = pairs)),
            _ => {
                let possible = self.features & feature::GUEST_OFFLOADS;
                Ok(data
                    .take()?
                    .map(u64::from_le_bytes)
                    .filter(|offloads| offloads & !possible == 0)
                    .map(|offloads| self.offloads = offloads))
            }
        }
    }

    fn set_mode(&mut self, command: u8, on: u8) -> Option<()> {
        match on {
            0 => self.modes &= !(1 << command),
            1 => self.modes |= 1 << command,
            _ => return None,
        }
        Some(())
    }

    fn set_mac(&mut self, mac: [u8; 6], may_move: bool) -> Option<()> {
        let [first, ..] = mac;
        (first & 1 == 0 && mac != [0; 6]).then_some(())?;
        self.asked = Some(mac);
        // The address it has is no change.
        (may_move || self.mac == Some(mac)).then(|| self.mac = Some(mac))
    }

    fn set_vlan(&mut self, id: u16, on: bool) -> Option<()> {
        if id >= VLANS {
            return None;
        }
        if self.vlans.is_empty() {
            self.vlans = vec![0; usize::from(VLANS / 64)];
        }
        let (word, bit) = (self.vlans.get_mut(usize::from(id / 64))?, 1 << (id % 64));
        if on {
            *word |= bit;
        } else {
            *word &= !bit;
        }
        Some(())
    }

    fn set_tables(&mut self, data: &mut Data<'_>) -> Result<Option<()>, QueueError> {
        let Some(unicast) = data.addresses(false)? else {
            return Ok(None);
        };
        let Some(multicast) = data.addresses(true)? else {
            return Ok(None);
        };
        (self.unicast, self.multicast) = (unicast, multicast);
        Ok(Some(()))
    }
}

/// The readable part of a command, from front to back.
struct Data<'a> {
    mem: &'a mut dyn GuestMemory,
    chain: &'a Chain,
    offset: u64,
}

impl Data<'_> {
    /// The next `N` bytes, if there are as many.
    fn take<const N: usize>(&mut self) -> Result<Option<[u8; N]>, QueueError> {
        let mut bytes = [0; N];
        let found = self.chain.read(self.mem, self.offset, &mut bytes)?;
        self.offset += found as u64;
        Ok((found == N).then_some(bytes))
    }

    /// A table of addresses (struct virtio_net_ctrl_mac), all of a group or none.
    fn addresses(&mut self, group: bool) -> Result<Option<Addresses>, QueueError> {
        let Some(entries) = self.take()?.map(u32::from_le_bytes) else {
            return Ok(None);
        };
        let bytes = 6 * u64::from(entries);
        if bytes > self.chain.readable_bytes().saturating_sub(self.offset) {
            return Ok(None);
        }
        if entries > MAX_ADDRESSES {
            self.offset += bytes;
            return Ok(Some(Addresses::All));
        }
        let mut list = Vec::new();
        for _ in 0..entries {
            match self.take::<6>()? {
                Some(address) if (address[0] & 1 != 0) == group => list.push(address),
                _ => return Ok(None),
            }
        }
        Ok(Some(match entries {
            0 => Addresses::None,
            _ => Addresses::Some(list),
        }))
    }
}
