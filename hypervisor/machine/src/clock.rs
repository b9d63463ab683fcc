//! A guest's time stamp counter and its VM's time, one in terms of the other.
//!
//! The guest's TSC ticks at a fixed rate (it is invariant) and stands at `base` when the VM's
//! time is zero; a write to IA32_TSC or IA32_TSC_ADJUST moves `base` and nothing else
//! (Intel SDM Vol. 3B §18.17). Conversions are one or two multiplications: a rate is held as a
//! whole number and a 64-bit binary fraction, rounded up, which is exact to the tick for spans
//! below 2⁶⁴ divided by the rate's denominator and never off by more than one tick beyond.

use arch::Nanos;
use serde::{Deserialize, Serialize};

/// A ratio as a whole number and a binary fraction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Rate {
    whole: u64,
    fraction: u64,
}

impl Rate {
    const fn new(numerator: u64, denominator: u64) -> Self {
        let rest = ((numerator % denominator) as u128) << 64;
        let fraction = rest.div_ceil(denominator as u128);
        Self {
            whole: numerator / denominator,
            // The remainder is below the denominator, so the quotient is at most 2⁶⁴.
            fraction: if fraction > u64::MAX as u128 {
                u64::MAX
            } else {
                fraction as u64
            },
        }
    }

    /// `value` times the rate, modulo 2⁶⁴.
    #[inline]
    const fn of(self, value: u64) -> u64 {
        let part = ((value as u128 * self.fraction as u128) >> 64) as u64;
        value.wrapping_mul(self.whole).wrapping_add(part)
    }

    /// The largest value for which [`Rate::of`] does not wrap.
    const fn limit(self) -> u64 {
        u64::MAX / (self.whole + 1)
    }
}

/// The guest TSC of one vCPU against the VM's time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "TscClockState", into = "TscClockState")]
pub struct TscClock {
    khz: u32,
    base: u64,
    tick: Rate,
    nano: Rate,
    /// More ticks than these are beyond the end of time.
    far: u64,
}

/// What of a [`TscClock`] is state; the rest follows from it.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
struct TscClockState {
    khz: u32,
    base: u64,
}

impl From<TscClockState> for TscClock {
    fn from(state: TscClockState) -> Self {
        let mut clock = Self::new(state.khz);
        clock.base = state.base;
        clock
    }
}

impl From<TscClock> for TscClockState {
    fn from(clock: TscClock) -> Self {
        Self {
            khz: clock.khz,
            base: clock.base,
        }
    }
}

impl TscClock {
    /// A TSC of `khz` kilohertz (at least 1) that is zero at the VM's power-on.
    #[must_use]
    pub const fn new(khz: u32) -> Self {
        let khz = if khz == 0 { 1 } else { khz };
        let tick = Rate::new(1_000_000, khz as u64);
        Self {
            khz,
            base: 0,
            tick,
            far: tick.limit(),
            nano: Rate::new(khz as u64, 1_000_000),
        }
    }

    /// The TSC's rate in kilohertz.
    #[must_use]
    pub const fn khz(&self) -> u32 {
        self.khz
    }

    /// What the guest's TSC read, or would have read, at the VM's time zero. The offset that the
    /// hardware adds to the machine's TSC is this less the machine's TSC at the VM's time zero.
    #[must_use]
    pub const fn base(&self) -> u64 {
        self.base
    }

    /// The guest's TSC at `now`.
    #[inline]
    #[must_use]
    pub const fn tsc(&self, now: Nanos) -> u64 {
        self.base.wrapping_add(self.nano.of(now.0))
    }

    /// Moves the guest's TSC by `ticks`, modulo 2⁶⁴.
    pub const fn shift(&mut self, ticks: u64) {
        self.base = self.base.wrapping_add(ticks);
    }

    /// `ticks` of the TSC in nanoseconds, rounded down; saturates.
    #[inline]
    #[must_use]
    pub const fn ticks_to_nanos(&self, ticks: u64) -> u64 {
        if ticks > self.far {
            u64::MAX
        } else {
            self.tick.of(ticks)
        }
    }

    /// `nanos` nanoseconds in ticks of the TSC, rounded down, modulo 2⁶⁴.
    #[inline]
    #[must_use]
    pub const fn nanos_to_ticks(&self, nanos: u64) -> u64 {
        self.nano.of(nanos)
    }

    /// The first time at which the guest's TSC is `tsc` or more: `now` if it already is.
    #[inline]
    #[must_use]
    pub const fn deadline(&self, tsc: u64, now: Nanos) -> Nanos {
        match tsc.checked_sub(self.tsc(now)) {
            None | Some(0) => now,
            Some(ticks) => Nanos(
                now.0
                    .saturating_add(self.ticks_to_nanos(ticks))
                    .saturating_add(1),
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn conversions_are_exact_for_common_rates() {
        for khz in [
            1, 50_000, 100_000, 1_000_000, 1_996_250, 2_400_000, 2_995_201, 5_700_000,
        ] {
            let clock = TscClock::new(khz);
            for ns in [0_u64, 1, 10, 999, 1_000_000, 123_456_789, 3_600_000_000_000] {
                let exact = (u128::from(ns) * u128::from(khz) / 1_000_000) as u64;
                assert_eq!(clock.tsc(Nanos(ns)), exact, "{khz} kHz, {ns} ns");
            }
            let year = 31_557_600_000_000_000;
            let exact = (u128::from(year) * u128::from(khz) / 1_000_000) as u64;
            assert!(clock.tsc(Nanos(year)).abs_diff(exact) <= 1);
        }
    }

    #[test]
    fn a_deadline_is_never_early_and_hardly_late() {
        for khz in [100_000, 1_000_000, 2_995_201, 3_999_999] {
            let mut clock = TscClock::new(khz);
            clock.shift(u64::MAX - 1_000_000);
            for now in [0, 5, 1_000_003, 999_999_999_999_u64] {
                for ahead in [1, 2, 100, 12_345_678, 900_000] {
                    let now = Nanos(now);
                    let Some(target) = clock.tsc(now).checked_add(ahead) else {
                        continue;
                    };
                    let at = clock.deadline(target, now);
                    assert!(clock.tsc(at).wrapping_sub(target) < 1 << 32, "early");
                    let late = 3 + 2 * u64::from(khz) / 1_000_000;
                    assert!(clock.tsc(at).wrapping_sub(target) <= late, "late");
                }
            }
        }
    }

    #[test]
    fn a_deadline_in_the_past_is_now_and_one_beyond_time_is_never() {
        let mut clock = TscClock::new(1_000_000);
        clock.shift(1_000);
        assert_eq!(clock.deadline(5, Nanos(10)), Nanos(10));
        assert_eq!(clock.deadline(1_010, Nanos(10)), Nanos(10));
        assert_eq!(
            TscClock::new(1_000).deadline(u64::MAX, Nanos(0)),
            Nanos::NEVER
        );
    }

    #[test]
    fn writing_the_counter_moves_only_the_base() {
        let mut clock = TscClock::new(2_000_000);
        clock.shift(0_u64.wrapping_sub(1_000));
        assert_eq!(clock.tsc(Nanos(500)), 0);
        assert_eq!(clock.tsc(Nanos(501)), 2);
    }
}
