//! Meters: what flows share of a rate. Their text is `ovs-ofctl add-meter`'s:
//! `meter=1,kbps,band=type=drop,rate=1000,burst_size=200`.

use arch::Nanos;

use crate::ofctl::{self, TextError};
use crate::rate::Bucket;

/// What a meter counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unit {
    /// Kilobits.
    Kilobits,
    /// Frames.
    Frames,
}

/// A meter with one band that drops what is too much.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MeterConfig {
    /// Its number, from 1.
    pub id: u32,
    /// What it counts.
    pub unit: Unit,
    /// How many a second, from 1.
    pub rate: u32,
    /// How many at once after a silence; 0 for a second's worth.
    pub burst: u32,
}

impl MeterConfig {
    /// Reads the text of a meter.
    ///
    /// # Errors
    /// A word that is not understood, a number out of range, or no number or rate.
    pub fn parse(text: &str) -> Result<Self, TextError> {
        ofctl::parse_meter(text)
    }
}

/// A meter at work.
#[derive(Clone, Debug)]
pub struct Meter {
    config: MeterConfig,
    bucket: Bucket,
    /// Frames that passed.
    pub passed: u64,
    /// Frames that did not.
    pub dropped: u64,
}

impl Meter {
    /// A full one.
    #[must_use]
    pub fn new(config: MeterConfig, now: Nanos) -> Self {
        let (rate, burst) = (u64::from(config.rate), u64::from(config.burst));
        let depth = if burst == 0 { rate } else { burst };
        let scale = match config.unit {
            Unit::Kilobits => 1000,
            Unit::Frames => 1,
        };
        Self {
            config,
            bucket: Bucket::new(rate * scale, depth * scale, now),
            passed: 0,
            dropped: 0,
        }
    }

    /// What it is.
    #[must_use]
    pub const fn config(&self) -> &MeterConfig {
        &self.config
    }

    /// Whether a frame of `bytes` may pass now.
    pub fn passes(&mut self, bytes: usize, now: Nanos) -> bool {
        let units = match self.config.unit {
            Unit::Kilobits => (bytes as u64).saturating_mul(8),
            Unit::Frames => 1,
        };
        let passes = self.bucket.take(units, now);
        let count = if passes {
            &mut self.passed
        } else {
            &mut self.dropped
        };
        *count += 1;
        passes
    }
}
