//! Token buckets: how much a port may send and receive, broadcasts a second, and meters.
//!
//! A bucket fills at its rate up to its depth. What passes takes its cost out, and passes when
//! there is as much, or when the bucket is full: so a frame of 64 KiB that is larger than the
//! bucket passes now and then, in debt, and the rate holds over time. Credit is counted in
//! units × 10⁻⁹, so that filling is one multiplication and no division.

use arch::Nanos;

/// How fast traffic may flow, in bits a second (VMware's shaping has the same three figures).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rate {
    /// Over time; 1 to [`Rate::MAX`].
    pub average: u64,
    /// While there is burst left; `average` to [`Rate::MAX`], or 0 for no limit.
    pub peak: u64,
    /// Bytes that may go at `peak` after a silence; 1 to [`Rate::MAX_BURST`].
    pub burst: u64,
}

impl Rate {
    /// A terabit a second.
    pub const MAX: u64 = 1_000_000_000_000;
    /// A gibibyte, less than what a bucket can count.
    pub const MAX_BURST: u64 = 1 << 30;
}

/// Credit for one unit.
const UNIT: i64 = 1_000_000_000;

/// A bucket of bits or of frames.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bucket {
    /// Units a second.
    rate: u64,
    /// Most credit.
    depth: i64,
    credit: i64,
    filled: Nanos,
}

impl Bucket {
    /// A full bucket: `rate` units a second, `depth` units at most.
    #[must_use]
    pub fn new(rate: u64, depth: u64, now: Nanos) -> Self {
        let depth = i64::try_from(depth)
            .unwrap_or(i64::MAX)
            .saturating_mul(UNIT);
        Self {
            rate,
            depth,
            credit: depth,
            filled: now,
        }
    }

    fn fill(&mut self, now: Nanos) {
        let earned = self.rate.saturating_mul(now.since(self.filled));
        let earned = i64::try_from(earned).unwrap_or(i64::MAX);
        self.credit = self.credit.saturating_add(earned).min(self.depth);
        self.filled = self.filled.max(now);
    }

    /// Credit for `units`, if there is as much at `now`, or all there can be.
    fn offers(&mut self, units: u64, now: Nanos) -> Option<i64> {
        self.fill(now);
        let cost = i64::try_from(units)
            .unwrap_or(i64::MAX)
            .saturating_mul(UNIT);
        (self.credit >= cost.min(self.depth)).then_some(cost)
    }

    /// Takes `units` out if they may pass now.
    pub fn take(&mut self, units: u64, now: Nanos) -> bool {
        let cost = self.offers(units, now);
        self.credit = self.credit.saturating_sub(cost.unwrap_or(0));
        cost.is_some()
    }

    /// Keeps what `older` has left if it is a bucket like this one.
    pub fn inherit(&mut self, older: &Self) {
        if (self.rate, self.depth) == (older.rate, older.depth) {
            *self = *older;
        }
    }
}

/// A [`Rate`] that is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limiter {
    average: Bucket,
    peak: Option<Bucket>,
}

impl Limiter {
    /// At `peak`, what may go at once: a millisecond's worth.
    const PEAK_DEPTH: u64 = 1000;

    /// Nothing spent so far.
    #[must_use]
    pub fn new(rate: Rate, now: Nanos) -> Self {
        let depth = (rate.peak / Self::PEAK_DEPTH).max(1);
        Self {
            average: Bucket::new(rate.average, rate.burst.saturating_mul(8), now),
            peak: (rate.peak != 0).then(|| Bucket::new(rate.peak, depth, now)),
        }
    }

    /// Whether a frame of `bytes` may pass now.
    pub fn pass(&mut self, bytes: usize, now: Nanos) -> bool {
        let bits = (bytes as u64).saturating_mul(8);
        if let Some(peak) = &mut self.peak
            && peak.offers(bits, now).is_none()
        {
            return false;
        }
        let passes = self.average.take(bits, now);
        if passes && let Some(peak) = &mut self.peak {
            peak.take(bits, now);
        }
        passes
    }

    /// Keeps what `older` has left if it keeps the same rate.
    pub fn inherit(&mut self, older: &Self) {
        self.average.inherit(&older.average);
        if let (Some(own), Some(older)) = (&mut self.peak, &older.peak) {
            own.inherit(older);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const SECOND: u64 = 1_000_000_000;

    #[test]
    fn a_burst_goes_at_once_and_the_rest_at_the_average() {
        let rate = Rate {
            average: 8_000,
            peak: 0,
            burst: 3_000,
        };
        let mut limiter = Limiter::new(rate, Nanos(0));
        let passed =
            |limiter: &mut Limiter, at| (0..10).filter(|_| limiter.pass(1000, Nanos(at))).count();
        assert_eq!(passed(&mut limiter, 0), 3);
        assert_eq!(passed(&mut limiter, SECOND - 1), 0);
        assert_eq!(passed(&mut limiter, SECOND), 1);
        assert_eq!(passed(&mut limiter, 100 * SECOND), 3);
        assert_eq!(passed(&mut limiter, u64::MAX), 3);
    }

    #[test]
    fn the_peak_holds_while_the_burst_lasts() {
        let rate = Rate {
            average: 8_000_000,
            peak: 16_000_000,
            burst: 1_000_000,
        };
        let mut limiter = Limiter::new(rate, Nanos(0));
        // A frame of 1000 bytes every 100 µs: 80 Mbit/s are asked for. After a second of it the
        // 2 MB that the peak allows have gone: 1 MB of burst and 1 MB of average.
        let passed = (0..10_000)
            .filter(|i| limiter.pass(1000, Nanos(i * 100_000)))
            .count();
        assert!((1990..=2010).contains(&passed), "{passed}");
        let passed = (10_000..20_000)
            .filter(|i| limiter.pass(1000, Nanos(i * 100_000)))
            .count();
        assert!((990..=1010).contains(&passed), "{passed}");
    }

    #[test]
    fn a_frame_larger_than_the_burst_passes_in_debt() {
        let rate = Rate {
            average: 8_000,
            peak: 0,
            burst: 1_000,
        };
        let mut limiter = Limiter::new(rate, Nanos(0));
        assert!(limiter.pass(65_000, Nanos(0)));
        assert!(!limiter.pass(60, Nanos(64 * SECOND)));
        assert!(limiter.pass(60, Nanos(65 * SECOND)));
    }

    proptest! {
        /// Whatever is asked and when: what passed is at most the burst, the average's worth of
        /// the time, and one frame; and a sender that keeps below the average is never refused.
        #[test]
        fn no_more_than_the_average(
            average in 1..=10_000_000_000u64,
            burst in 1..=1_000_000u64,
            peak in 0..=2u64,
            frames in prop::collection::vec((0..50_000_000u64, 0..65_557usize), 1..200),
        ) {
            let rate = Rate { average, peak: average * peak, burst };
            let mut limiter = Limiter::new(rate, Nanos(0));
            let (mut now, mut bits) = (0, 0u128);
            let largest = frames.iter().map(|(_, bytes)| *bytes as u128).max().unwrap_or(0);
            for (wait, bytes) in frames {
                now += wait;
                if limiter.pass(bytes, Nanos(now)) {
                    bits += bytes as u128 * 8;
                }
                let earned = u128::from(average) * u128::from(now) / u128::from(SECOND);
                prop_assert!(bits <= earned + 1 + u128::from(burst) * 8 + largest * 8);
            }
        }

        #[test]
        fn below_the_average_nothing_is_refused(
            average in 1_000..=10_000_000_000u64,
            sizes in prop::collection::vec(1..1_500u64, 1..100),
        ) {
            let mut limiter = Limiter::new(Rate { average, peak: 0, burst: 1_500 }, Nanos(0));
            let mut now = 0;
            for bytes in sizes {
                prop_assert!(limiter.pass(bytes as usize, Nanos(now)));
                now += (bytes * 8 * SECOND).div_ceil(average);
            }
        }

        /// Time that goes back or leaps, any size: no panic, and never more credit than depth.
        #[test]
        fn any_time_any_size(
            rate in any::<u64>(), depth in any::<u64>(),
            asks in prop::collection::vec((any::<u64>(), any::<u64>()), 0..50),
        ) {
            let mut bucket = Bucket::new(rate, depth, Nanos(0));
            for (units, now) in asks {
                let _ = bucket.take(units, Nanos(now));
                prop_assert!(bucket.credit <= bucket.depth);
            }
        }
    }
}
