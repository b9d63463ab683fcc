//! The layer-2 switch that joins guests' network cards and uplinks.
//!
//! Pure: it decides, and whoever has the frames copies them. A [`Switch`] gets the beginning of a
//! frame and says the steps to take with it. On the way there:
//!
//! | stage | where |
//! | --- | --- |
//! | the frame's headers become a key | [`key`] |
//! | limits of the port; what was decided for the key before | [`switch`], [`rate`], [`cache`] |
//! | what the port admits: links, policies, echoes | [`normal`], `policy` |
//! | flows, as Open vSwitch has them | [`tables`], [`flow`], [`ofctl`], `fields`, [`translate`] |
//! | VLANs, addresses, uplinks: the action `normal` | [`normal`], [`port`], [`learn`], [`uplink`], [`beacon`] |
//! | the gate of each output, and mirrors | [`normal`], [`mirror`] |
//! | meters, limits of the receivers, captures, counters | [`switch`], [`counters`] |
//!
//! The steps are put into a frame's bytes by [`edit`]; [`trace`] tells the stages to people. Two
//! rules stand above everything, flows among it: a frame that came in by an uplink never leaves by
//! one, and whatever guests send costs a bounded time. Where the rules make a switch differ from
//! Open vSwitch is listed in [`normal`].
#![cfg_attr(not(test), no_std)]
#![forbid(unsafe_code)]

extern crate alloc;

use core::fmt;

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

pub mod beacon;
pub mod cache;
pub mod config;
pub mod counters;
pub mod edit;
mod fields;
pub mod flow;
pub mod key;
pub mod learn;
pub mod mirror;
pub mod normal;
pub mod ofctl;
mod order;
mod policy;
pub mod port;
pub mod rate;
#[cfg(any(test, feature = "simulate"))]
pub mod simulate;
pub mod switch;
pub mod tables;
#[cfg(test)]
mod tests;
pub mod trace;
pub mod translate;
pub mod uplink;

pub use edit::MIN_FRAME;
pub use switch::{Decision, MAX_FRAME, Switch};

/// A MAC address.
#[derive(
    Clone,
    Copy,
    Default,
    PartialEq,
    Eq,
    PartialOrd,
    Ord,
    Hash,
    FromBytes,
    IntoBytes,
    Immutable,
    KnownLayout,
)]
#[repr(transparent)]
pub struct MacAddr(pub [u8; 6]);

impl MacAddr {
    /// All stations.
    pub const BROADCAST: Self = Self([0xff; 6]);

    /// Whether it addresses a group: broadcast or multicast (IEEE 802-2014 §8.2.2).
    #[must_use]
    pub const fn is_group(self) -> bool {
        self.0[0] & 1 != 0
    }

    /// Whether a bridge must not relay it: 01-80-C2-00-00-00 to 0F (IEEE 802.1Q-2022 §8.6.3).
    #[must_use]
    pub const fn is_reserved(self) -> bool {
        matches!(self.0, [0x01, 0x80, 0xc2, 0, 0, 0..=0x0f])
    }

    /// Whether a station can have it: neither a group address nor all zero.
    #[must_use]
    pub fn is_station(self) -> bool {
        !self.is_group() && self.0 != [0; 6]
    }
}

impl fmt::Display for MacAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl fmt::Debug for MacAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A port's OpenFlow number: 1 to [`PortId::MAX`], or a reserved one.
#[derive(
    Clone,
    Copy,
    Default,
    Debug,
    PartialEq,
    Eq,
    PartialOrd,
    Ord,
    Hash,
    FromBytes,
    IntoBytes,
    Immutable,
    KnownLayout,
)]
#[repr(transparent)]
pub struct PortId(pub u16);

impl PortId {
    /// The highest number of a port (OpenFlow 1.0 §5.2.1).
    pub const MAX: Self = Self(0xfeff);
    /// No port; where a frame came in that the switch itself made.
    pub const NONE: Self = Self(0xffff);
    /// The switch's own port.
    pub const LOCAL: Self = Self(0xfffe);
}

/// A VLAN identifier that a port can be in: 1 to 4094 (IEEE 802.1Q-2022 table 9-2: 0 is a
/// priority tag, 4095 never appears on the wire).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct VlanId(u16);

/// A number that is no VLAN.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0} is no VLAN: identifiers are 1 to 4094")]
pub struct NotAVlan(pub u16);

impl VlanId {
    /// Checks the range.
    ///
    /// # Errors
    /// 0, 4095 and above.
    pub const fn new(id: u16) -> Result<Self, NotAVlan> {
        if id >= 1 && id <= 4094 {
            Ok(Self(id))
        } else {
            Err(NotAVlan(id))
        }
    }

    /// The number.
    #[must_use]
    pub const fn get(self) -> u16 {
        self.0
    }
}

#[cfg(test)]
mod address_tests {
    use super::*;

    #[test]
    fn addresses_are_classed_by_the_standard() {
        let reserved = MacAddr([1, 0x80, 0xc2, 0, 0, 0x0f]);
        assert!(reserved.is_reserved() && reserved.is_group() && !reserved.is_station());
        assert!(!MacAddr([1, 0x80, 0xc2, 0, 0, 0x10]).is_reserved());
        assert!(MacAddr([0x52, 0x54, 0, 1, 2, 3]).is_station());
        assert!(!MacAddr([0; 6]).is_station());
        assert_eq!(MacAddr::BROADCAST.to_string(), "ff:ff:ff:ff:ff:ff");
        assert_eq!(VlanId::new(4095), Err(NotAVlan(4095)));
    }
}
