//! The layer-2 switch that joins vNICs and uplinks. So far it has its vocabulary: addresses, VLAN
//! identifiers, and the 802.1Q header of a frame, read from bytes that nobody vouches for.
#![cfg_attr(not(test), no_std)]
#![forbid(unsafe_code)]

extern crate alloc;

use core::fmt;

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

pub mod cache;
pub mod config;
pub mod counters;
pub mod edit;
pub mod flow;
pub mod key;
pub mod learn;
pub mod mirror;
pub mod normal;
pub mod ofctl;
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

/// A priority code point, 0 to 7.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Priority(u8);

impl Priority {
    /// The number.
    #[must_use]
    pub const fn get(self) -> u8 {
        self.0
    }
}

/// How a frame is tagged.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Tag {
    /// Not at all.
    None,
    /// VLAN 0: a priority alone.
    Priority(Priority),
    /// In a VLAN.
    Vlan(VlanId, Priority),
}

/// What the switch reads of a frame before it decides.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Destination.
    pub destination: MacAddr,
    /// Source.
    pub source: MacAddr,
    /// The outermost 802.1Q tag.
    pub tag: Tag,
    /// The type or length field behind that tag.
    pub ether_type: u16,
}

/// The tag protocol identifier of a customer VLAN (IEEE 802.1Q-2022 table 9-1).
const TPID: u16 = 0x8100;

/// A frame that cannot be switched.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// Shorter than its headers: a partial 802.1Q header among them.
    #[error("a frame of {0} bytes ends inside its header")]
    Short(usize),
    /// VLAN 4095.
    #[error("VLAN 4095 is not allowed on the wire")]
    Vlan4095,
}

impl Header {
    /// Reads the header of `frame`.
    ///
    /// # Errors
    /// The frame is too short, or its tag is not allowed.
    pub fn parse(frame: &[u8]) -> Result<Self, FrameError> {
        let short = FrameError::Short(frame.len());
        let (destination, rest) = frame.split_first_chunk::<6>().ok_or(short)?;
        let (source, rest) = rest.split_first_chunk::<6>().ok_or(short)?;
        let (kind, rest) = rest.split_first_chunk::<2>().ok_or(short)?;
        let (tag, ether_type) = match u16::from_be_bytes(*kind) {
            TPID => {
                let (control, rest) = rest.split_first_chunk::<2>().ok_or(short)?;
                let (kind, _) = rest.split_first_chunk::<2>().ok_or(short)?;
                let control = u16::from_be_bytes(*control);
                let priority = Priority((control >> 13) as u8);
                let tag = match control & 0xfff {
                    0 => Tag::Priority(priority),
                    id => Tag::Vlan(VlanId::new(id).map_err(|_| FrameError::Vlan4095)?, priority),
                };
                (tag, u16::from_be_bytes(*kind))
            }
            kind => (Tag::None, kind),
        };
        Ok(Self {
            destination: MacAddr(*destination),
            source: MacAddr(*source),
            tag,
            ether_type,
        })
    }
}

#[cfg(test)]
mod header_tests {
    use super::*;

    fn frame(tail: &[u8]) -> Vec<u8> {
        let mut frame = vec![0xff; 6];
        frame.extend([0x52, 0x54, 0, 1, 2, 3]);
        frame.extend(tail);
        frame
    }

    #[test]
    fn tags_are_told_apart() {
        type Parsed = Result<(Tag, u16), FrameError>;
        let cases: [(&[u8], Parsed); 5] = [
            (&[0x08, 0x00], Ok((Tag::None, 0x0800))),
            (
                &[0x81, 0, 0x60, 0, 8, 6],
                Ok((Tag::Priority(Priority(3)), 0x0806)),
            ),
            (
                &[0x81, 0, 0xa0, 9, 8, 0],
                Ok((Tag::Vlan(VlanId(9), Priority(5)), 0x0800)),
            ),
            (&[0x81, 0, 0x0f, 0xff, 8, 0], Err(FrameError::Vlan4095)),
            (&[0x81, 0, 0, 9], Err(FrameError::Short(16))),
        ];
        for (tail, want) in cases {
            let got = Header::parse(&frame(tail)).map(|header| (header.tag, header.ether_type));
            assert_eq!(got, want, "{tail:x?}");
        }
    }

    #[test]
    fn every_truncation_is_an_error() {
        let whole = frame(&[0x81, 0, 0, 9, 8, 0]);
        for length in 0..whole.len() {
            assert_eq!(
                Header::parse(&whole[..length]),
                Err(FrameError::Short(length))
            );
        }
    }

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
