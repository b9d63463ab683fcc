//! How a VM is to be scheduled, and what is wrong with a policy that cannot be kept.

use crate::{CoreId, CoreSet, VmId};
use alloc::vec::Vec;

/// Weight of a VM that asks for nothing else.
pub const DEFAULT_WEIGHT: u32 = 256;
/// The greatest weight.
pub const MAX_WEIGHT: u32 = 10_000;
/// The most vCPUs of a VM.
pub const MAX_VCPUS: u16 = 1024;
/// Of each core, what real-time vCPUs may have together, in millionths: the rest never starves.
pub const REAL_TIME_LIMIT: u32 = 800_000;
/// Of all cores, what reservations and real-time vCPUs may have together, in percent.
pub const GUARANTEE_LIMIT: u64 = 90;
/// The least budget of a real-time vCPU, in nanoseconds.
pub const MIN_BUDGET: u64 = 100_000;
/// The longest period of a real-time vCPU, in nanoseconds.
pub const MAX_PERIOD: u64 = 10_000_000_000;

/// What kind of claim a VM's vCPUs have on a core.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Class {
    /// A share of the cores by weight.
    #[default]
    Fair,
    /// `budget` nanoseconds in every `period` nanoseconds for each vCPU, ahead of every fair one
    /// and no more than that: a constant-bandwidth server, earliest deadline first.
    RealTime {
        /// Nanoseconds a period.
        budget: u64,
        /// In nanoseconds.
        period: u64,
    },
    /// Each vCPU owns a core: nobody else is put there, and its turn has no end.
    Dedicated,
}

/// How a VM is scheduled.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Policy {
    /// Its part of the cores among the VMs that want them, 1 to [`MAX_WEIGHT`].
    pub weight: u32,
    /// The most that all its vCPUs use together, in percent of one core.
    pub cap: Option<u32>,
    /// What its vCPUs get together before weights are asked, in percent of one core.
    pub reservation: u32,
    /// The kind of claim.
    pub class: Class,
    /// Where its vCPUs may run.
    pub affinity: CoreSet,
    /// Where vCPU n may run, in place of `affinity`; it holds for those with no entry or an
    /// empty one.
    pub pins: Vec<CoreSet>,
}

impl Default for Policy {
    fn default() -> Self {
        Self {
            weight: DEFAULT_WEIGHT,
            cap: None,
            reservation: 0,
            class: Class::Fair,
            affinity: CoreSet::ALL,
            pins: Vec::new(),
        }
    }
}

/// Why a policy is refused; nothing has changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PolicyError {
    /// The VM was added before.
    #[error("VM {} is scheduled already", .0.0)]
    Exists(VmId),
    /// The VM was not added.
    #[error("VM {} is not scheduled", .0.0)]
    NoSuchVm(VmId),
    /// Number of vCPUs out of range.
    #[error("{0} vCPUs asked; 1 to {MAX_VCPUS} can be")]
    Vcpus(u16),
    /// Weight out of range.
    #[error("weight {0} asked; 1 to {MAX_WEIGHT} can be")]
    Weight(u32),
    /// Cap out of range.
    #[error("a cap of {asked} % asked; 1 to {most} % can be with these vCPUs")]
    Cap {
        /// Percent.
        asked: u32,
        /// Percent.
        most: u32,
    },
    /// Reservation out of range.
    #[error(
        "a reservation of {asked} % asked; up to {most} % can be with this cap, these vCPUs and cores"
    )]
    Reservation {
        /// Percent.
        asked: u32,
        /// Percent.
        most: u32,
    },
    /// All reservations and real-time budgets are more than the cores give.
    #[error("{asked} % of a core reserved or real-time in all on cores that give {most} %")]
    Guarantees {
        /// Percent.
        asked: u64,
        /// Percent.
        most: u64,
    },
    /// Only the fair class has caps and reservations.
    #[error("a real-time or dedicated VM has neither cap nor reservation")]
    NotFair,
    /// Budget or period out of range.
    #[error(
        "a budget of {budget} ns in {period} ns asked; at least {MIN_BUDGET} ns, at most 80 % of a period of up to {MAX_PERIOD} ns can be"
    )]
    Budget {
        /// In nanoseconds.
        budget: u64,
        /// In nanoseconds.
        period: u64,
    },
    /// No allowed core has that much real time left.
    #[error(
        "vCPU {index}: no core that it may run on has its real-time budget left under the limit of 80 %"
    )]
    NoBudget {
        /// The vCPU in its VM.
        index: u16,
    },
    /// A pin or an affinity names a core that is not there.
    #[error("core {} is not there", .0.0)]
    NoSuchCore(CoreId),
    /// Every core that the vCPU may run on is owned by another, or there is no core.
    #[error("vCPU {index}: every core that it may run on is owned by a dedicated vCPU")]
    NoCore {
        /// The vCPU in its VM.
        index: u16,
    },
    /// No core can be given to a dedicated vCPU.
    #[error("vCPU {index}: no core that it may have is free of dedicated and real-time vCPUs")]
    NotFree {
        /// The vCPU in its VM.
        index: u16,
    },
    /// A core cannot be given away since others would have none.
    #[error("core {} cannot be dedicated: others may run nowhere else", .0.0)]
    Needed(CoreId),
}

impl Policy {
    /// Where vCPU `index` may run, by this policy alone.
    #[must_use]
    pub fn cores_of(&self, index: u16) -> CoreSet {
        match self.pins.get(usize::from(index)) {
            Some(set) if !set.is_empty() => *set,
            _ => self.affinity,
        }
    }

    /// Checks what can be told without the other VMs.
    pub(crate) fn check(&self, vcpus: u16, present: &CoreSet) -> Result<(), PolicyError> {
        if !(1..=MAX_VCPUS).contains(&vcpus) {
            return Err(PolicyError::Vcpus(vcpus));
        }
        if !(1..=MAX_WEIGHT).contains(&self.weight) {
            return Err(PolicyError::Weight(self.weight));
        }
        for set in core::iter::once(&self.affinity).chain(&self.pins) {
            if *set != CoreSet::ALL
                && let Some(core) = set.minus(present).iter().next()
            {
                return Err(PolicyError::NoSuchCore(core));
            }
        }
        let most = u32::from(vcpus) * 100;
        if let Some(asked) = self.cap
            && !(1..=most).contains(&asked)
        {
            return Err(PolicyError::Cap { asked, most });
        }
        let mut usable = CoreSet::EMPTY;
        (0..vcpus).for_each(|index| {
            self.cores_of(index)
                .and(present)
                .iter()
                .for_each(|core| usable.insert(core));
        });
        let most = self.cap.unwrap_or(most).min(usable.len() * 100);
        if self.reservation > most {
            let asked = self.reservation;
            return Err(PolicyError::Reservation { asked, most });
        }
        match self.class {
            Class::Fair => Ok(()),
            _ if self.cap.is_some() || self.reservation != 0 => Err(PolicyError::NotFair),
            Class::RealTime { budget, period }
                if budget < MIN_BUDGET
                    || period > MAX_PERIOD
                    || bandwidth(budget, period) > REAL_TIME_LIMIT =>
            {
                Err(PolicyError::Budget { budget, period })
            }
            _ => Ok(()),
        }
    }
}

/// The part of a core, in millionths rounded up.
pub(crate) fn bandwidth(budget: u64, period: u64) -> u32 {
    if budget >= period {
        return 1_000_000;
    }
    let part = u128::from(budget) * 1_000_000;
    part.div_ceil(u128::from(period)) as u32
}
