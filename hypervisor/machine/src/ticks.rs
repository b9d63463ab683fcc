//! Ticks of a fixed-rate clock that started at power-on, without drift and without a 128-bit
//! division: the rate is a constant, so that dividing by it is a multiplication.

use arch::Nanos;

const SECOND: u64 = 1_000_000_000;

/// Whole ticks of a clock of `HZ` (at most 1 GHz) that have passed at `now`.
#[inline]
pub(crate) const fn ticks<const HZ: u64>(now: Nanos) -> u64 {
    now.0 / SECOND * HZ + now.0 % SECOND * HZ / SECOND
}

/// The first nanosecond at which [`ticks`] gives `tick`; saturates at [`Nanos::NEVER`].
#[inline]
pub(crate) const fn time_of<const HZ: u64>(tick: u64) -> Nanos {
    let whole = (tick / HZ).saturating_mul(SECOND);
    Nanos(whole.saturating_add((tick % HZ * SECOND).div_ceil(HZ)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tick_starts_at_its_time_and_not_earlier() {
        for tick in (0..5_000_000_000).step_by(7_777_777) {
            let start = time_of::<1_193_182>(tick);
            assert_eq!(ticks::<1_193_182>(start), tick);
            assert!(tick == 0 || ticks::<1_193_182>(start - 1) == tick - 1);
        }
        assert_eq!(ticks::<1_193_182>(Nanos(3_600 * SECOND)), 3_600 * 1_193_182);
        assert_eq!(time_of::<3_579_545>(u64::MAX), Nanos::NEVER);
    }
}
