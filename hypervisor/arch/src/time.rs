//! Guest time.

use core::ops::{Add, Sub};

/// A point in, or a span of, a VM's time in nanoseconds since its power-on.
///
/// Devices never read a clock: the current time comes in as an argument and deadlines go out as
/// values of this type.
#[derive(
    Clone,
    Copy,
    Debug,
    PartialEq,
    Eq,
    PartialOrd,
    Ord,
    Hash,
    Default,
    serde::Serialize,
    serde::Deserialize,
)]
pub struct Nanos(pub u64);

impl Nanos {
    /// Power-on.
    pub const ZERO: Self = Self(0);
    /// Later than anything that happens.
    pub const NEVER: Self = Self(u64::MAX);

    /// Nanoseconds from `earlier` to `self`, 0 if `earlier` is later.
    #[must_use]
    pub const fn since(self, earlier: Self) -> u64 {
        self.0.saturating_sub(earlier.0)
    }

    /// `ticks` of a clock of `hz` as nanoseconds, rounded down.
    #[must_use]
    pub const fn from_ticks(ticks: u64, hz: u64) -> Self {
        let ns = ticks as u128 * 1_000_000_000 / hz as u128;
        Self(if ns > u64::MAX as u128 {
            u64::MAX
        } else {
            ns as u64
        })
    }

    /// How many whole ticks of a clock of `hz` fit in this span.
    #[must_use]
    pub const fn to_ticks(self, hz: u64) -> u64 {
        (self.0 as u128 * hz as u128 / 1_000_000_000) as u64
    }
}

impl Add<u64> for Nanos {
    type Output = Self;
    /// Adds nanoseconds; saturates at [`Nanos::NEVER`].
    fn add(self, ns: u64) -> Self {
        Self(self.0.saturating_add(ns))
    }
}

impl Sub<u64> for Nanos {
    type Output = Self;
    /// Subtracts nanoseconds; saturates at power-on.
    fn sub(self, ns: u64) -> Self {
        Self(self.0.saturating_sub(ns))
    }
}
