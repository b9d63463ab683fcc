//! What a VM is owed and has had: virtual time, cap, reservation.
//!
//! All of it is exact in fluid terms. Virtual time passes for a VM's running vCPU at n / weight
//! while n of its vCPUs want a core; the VM keeps the integral of that, so a vCPU pays for a turn
//! the difference between its two ends, whatever its siblings did meanwhile. Cap and reservation
//! are buckets that fill at their rate.

use crate::forest::Queue;
use crate::policy::bandwidth;
use crate::{Class, Policy, SLICE, VmId};
use alloc::vec::Vec;
use arch::Nanos;

/// The least time that a capped VM must have before one of its vCPUs is put on a core, and what
/// a reservation must have gathered to go ahead, in nanoseconds.
pub const QUANTUM: u64 = SLICE / 2;

/// Buckets hold hundredths of nanoseconds, since their rates are in percent.
const PERCENT: i64 = 100;

pub struct Vm {
    pub id: VmId,
    pub policy: Policy,
    /// Scheduler's slots of its vCPUs.
    pub vcpus: Vec<u32>,
    /// Its own slot, for a timer.
    pub slot: u32,
    /// vCPUs that want a core.
    pub runnable: u32,
    /// vCPUs on a core.
    pub running: u32,
    /// Integral of the rate of virtual time.
    pub virtual_time: u128,
    at: Nanos,
    /// Virtual time a nanosecond for a VM with one runnable vCPU.
    pace: u64,
    /// What the cap leaves and nobody was granted.
    left: i64,
    /// Sum of the ends of the turns granted out of the cap.
    ends: i128,
    granted: u32,
    reserved: i64,
    /// Its vCPUs that wait for the cap.
    pub parked: Queue,
}

impl Vm {
    pub fn new(id: VmId, policy: Policy, slot: u32) -> Self {
        let mut vm = Self {
            id,
            policy: Policy::default(),
            vcpus: Vec::new(),
            slot,
            runnable: 0,
            running: 0,
            virtual_time: 0,
            at: Nanos::ZERO,
            pace: 0,
            left: 0,
            ends: 0,
            granted: 0,
            reserved: 0,
            parked: Queue::EMPTY,
        };
        vm.set_policy(policy);
        vm
    }

    pub fn set_policy(&mut self, policy: Policy) {
        self.pace = (1 << 32) / u64::from(policy.weight.max(1));
        self.policy = policy;
        self.left = self.left.min(self.burst());
        self.reserved = self.reserved.min(SLICE as i64 * PERCENT);
    }

    /// What the cap lets gather: a slice for each core that it is worth.
    fn burst(&self) -> i64 {
        let cores = self.policy.cap.unwrap_or(0).div_ceil(100);
        i64::from(cores) * SLICE as i64 * PERCENT
    }

    /// Virtual time a nanosecond for each running vCPU.
    pub fn rate(&self) -> u128 {
        u128::from(self.pace) * u128::from(self.runnable.max(1))
    }

    /// Lets time pass. To be called before `runnable`, `running` or the policy change.
    pub fn advance(&mut self, now: Nanos) {
        let passed = now.since(self.at);
        if passed == 0 {
            return;
        }
        self.at = now;
        self.virtual_time += u128::from(passed) * self.rate();
        // Every bucket is full or empty long before.
        let passed = passed.min(100_000_000_000) as i64;
        if let Some(cap) = self.policy.cap {
            let out = self.ends - i128::from(self.granted) * i128::from(now.0);
            let full = i128::from(self.burst()) - out * i128::from(PERCENT);
            let left = i128::from(self.left) + i128::from(passed) * i128::from(cap);
            self.left = left.min(full) as i64;
        }
        if self.policy.reservation != 0 {
            let full = 4 * SLICE as i64 * PERCENT;
            let more = self.gain().saturating_mul(passed);
            self.reserved = self.reserved.saturating_add(more).clamp(-full, full);
        }
    }

    /// How the reservation fills, less what its running vCPUs take of it.
    fn gain(&self) -> i64 {
        i64::from(self.policy.reservation) - i64::from(self.running) * PERCENT
    }

    /// Whether the cap leaves enough for a turn.
    pub fn may_run(&self) -> bool {
        self.policy.cap.is_none() || self.left >= QUANTUM as i64 * PERCENT
    }

    /// How many vCPUs more the cap has turns for.
    pub fn turns(&self) -> i64 {
        self.left / (QUANTUM as i64 * PERCENT)
    }

    /// Takes a turn out of the cap: its end, or never without a cap.
    pub fn grant(&mut self, now: Nanos) -> Nanos {
        if self.policy.cap.is_none() {
            return Nanos::NEVER;
        }
        let turn = (self.left / PERCENT).clamp(0, SLICE as i64);
        self.left -= turn * PERCENT;
        let end = now + turn as u64;
        self.ends += i128::from(end.0);
        self.granted += 1;
        end
    }

    /// Gives back what is left of a turn, or takes what went beyond it.
    pub fn settle(&mut self, end: Nanos, now: Nanos) {
        if end == Nanos::NEVER {
            return;
        }
        let back = i128::from(end.0) - i128::from(now.0);
        self.left = self
            .left
            .saturating_add((back as i64).saturating_mul(PERCENT));
        self.ends -= i128::from(end.0);
        self.granted = self.granted.saturating_sub(1);
    }

    /// Whether the reservation puts a vCPU ahead that waits; one that is ahead stays so for as
    /// long as there is any.
    pub fn goes_ahead(&self, is_ahead: bool) -> bool {
        let least = if is_ahead {
            1
        } else {
            QUANTUM as i64 * PERCENT
        };
        self.policy.reservation != 0 && self.reserved >= least
    }

    /// When a vCPU that waits may go on by the cap, or ahead by the reservation.
    pub fn next_change(&self, now: Nanos, parked: bool) -> Nanos {
        let (level, gain) = if parked {
            (self.left, i64::from(self.policy.cap.unwrap_or(100)))
        } else {
            (self.reserved, self.gain())
        };
        let missing = QUANTUM as i64 * PERCENT - level;
        if missing <= 0 {
            return now;
        }
        if gain <= 0 {
            return Nanos::NEVER;
        }
        now + (missing as u64).div_ceil(gain as u64)
    }

    /// Millionths of a core that each of its vCPUs has as real time.
    pub fn bandwidth(&self) -> u32 {
        match self.policy.class {
            Class::RealTime { budget, period } => bandwidth(budget, period),
            _ => 0,
        }
    }
}
