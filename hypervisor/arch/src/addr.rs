//! Physical addresses: a guest's and the machine's are different types.

use core::fmt;

/// Bytes in a base page.
pub const PAGE_SIZE: u64 = 4 << 10;
/// Bytes in a 2 MiB large page.
pub const PAGE_SIZE_2M: u64 = 2 << 20;
/// Bytes in a 1 GiB huge page.
pub const PAGE_SIZE_1G: u64 = 1 << 30;

/// The three sizes a page-table entry can map (Intel SDM Vol. 3A §4.5, AMD APM Vol. 2 §5.3).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum PageSize {
    /// 4 KiB
    Size4K,
    /// 2 MiB
    Size2M,
    /// 1 GiB
    Size1G,
}

impl PageSize {
    /// The size in bytes.
    #[must_use]
    pub const fn bytes(self) -> u64 {
        match self {
            Self::Size4K => PAGE_SIZE,
            Self::Size2M => PAGE_SIZE_2M,
            Self::Size1G => PAGE_SIZE_1G,
        }
    }
}

macro_rules! address {
    ($(#[$doc:meta])* $name:ident, $tag:literal) => {
        $(#[$doc])*
        #[derive(
            Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default,
            serde::Serialize, serde::Deserialize,
        )]
        pub struct $name(u64);

        impl $name {
            /// Wraps a raw address. Any 64-bit value is representable; whether it means
            /// something is decided where it is used.
            #[must_use]
            pub const fn new(raw: u64) -> Self {
                Self(raw)
            }

            /// The raw address.
            #[must_use]
            pub const fn as_u64(self) -> u64 {
                self.0
            }

            /// This address rounded down to a multiple of `align`, which must be a power of two.
            #[must_use]
            pub const fn align_down(self, align: u64) -> Self {
                Self(self.0 & !(align - 1))
            }

            /// The offset of this address in a page of `size` bytes (a power of two).
            #[must_use]
            pub const fn offset_in(self, size: u64) -> u64 {
                self.0 & (size - 1)
            }

            /// Whether this address is a multiple of `align`, which must be a power of two.
            #[must_use]
            pub const fn is_aligned(self, align: u64) -> bool {
                self.offset_in(align) == 0
            }

            /// The address `bytes` further up, or `None` where it would wrap.
            #[must_use]
            pub const fn checked_add(self, bytes: u64) -> Option<Self> {
                match self.0.checked_add(bytes) {
                    Some(raw) => Some(Self(raw)),
                    None => None,
                }
            }

            /// The address `bytes` further up, modulo 2⁶⁴.
            #[must_use]
            pub const fn wrapping_add(self, bytes: u64) -> Self {
                Self(self.0.wrapping_add(bytes))
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!($tag, ":{:#x}"), self.0)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:#x}", self.0)
            }
        }
    };
}

address!(
    /// An address in a guest's physical address space.
    GuestPhysAddr,
    "gpa"
);
address!(
    /// An address in the machine's physical address space.
    HostPhysAddr,
    "hpa"
);
