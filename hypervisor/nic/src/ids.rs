//! Which PCI devices the drivers take.

use crate::intel::Family;

/// The driver of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// See [`crate::intel`].
    Intel(Family),
    /// See [`crate::virtio`].
    Virtio,
}

impl Kind {
    /// The name that others use for such cards, too.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Intel(Family::E1000) => "e1000",
            Self::Intel(Family::E1000e) => "e1000e",
            Self::Intel(Family::Igb) => "igb",
            Self::Virtio => "virtio-net",
        }
    }
}

const INTEL: u16 = 0x8086;
const VIRTIO: u16 = 0x1af4;

/// The driver for a PCI device, if there is one.
#[must_use]
pub const fn find(vendor: u16, device: u16) -> Option<Kind> {
    let family = match (vendor, device) {
        // A network card by its transitional and by its modern number (virtio 1.2 §4.1.2, §5.1.1).
        (VIRTIO, 0x1000 | 0x1041) => return Some(Kind::Virtio),
        // Copper cards: 82540EM and EP, 82545EM and GM, 82546EB and GB.
        (INTEL, 0x100e | 0x1015..=0x1017 | 0x101e | 0x100f | 0x1026 | 0x1010 | 0x101d | 0x1079) => {
            Family::E1000
        }
        // 82574L and LA, 82583V.
        (INTEL, 0x10d3 | 0x10f6 | 0x150c) => Family::E1000e,
        // 82576.
        (INTEL, 0x10c9 | 0x10e6..=0x10e8 | 0x1518 | 0x150a | 0x150d | 0x1526)
        // 82580.
        | (INTEL, 0x150e..=0x1511 | 0x1516 | 0x1527)
        // I350.
        | (INTEL, 0x1521..=0x1524 | 0x1546)
        // I210, I211.
        | (INTEL, 0x1533 | 0x1536..=0x1539 | 0x157b | 0x157c) => Family::Igb,
        _ => return None,
    };
    Some(Kind::Intel(family))
}
