//! Which vCPU runs next on a core, and for how long.
//!
//! Pure: time comes in as an argument, and nothing here knows what a vCPU is but its number. The
//! policy is round robin among those that can run; one that sleeps comes back at its deadline or
//! when it is woken, and then runs before those that have just had their slice.
#![cfg_attr(not(test), no_std)]
#![forbid(unsafe_code)]

extern crate alloc;

use alloc::collections::{BTreeSet, VecDeque};
use arch::Nanos;

/// How long a vCPU runs before another gets its turn, in nanoseconds.
pub const SLICE: u64 = 10_000_000;

/// A vCPU, by the number its owner gave it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct VcpuId(pub usize);

/// The vCPUs of one core.
#[derive(Debug, Default)]
pub struct Scheduler {
    runnable: VecDeque<VcpuId>,
    asleep: BTreeSet<(Nanos, VcpuId)>,
}

/// What the core does next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    /// Run this vCPU until then at the latest; [`Nanos::NEVER`] when nobody else waits.
    Run(VcpuId, Nanos),
    /// Nobody can run before then.
    Idle(Nanos),
    /// There is no vCPU.
    Nothing,
}

impl Scheduler {
    /// Adds a vCPU that can run, or lets a sleeping one run again, ahead of those that wait.
    pub fn wake(&mut self, vcpu: VcpuId) {
        self.asleep.retain(|(_, other)| *other != vcpu);
        if !self.runnable.contains(&vcpu) {
            self.runnable.push_front(vcpu);
        }
    }

    /// Puts a vCPU to sleep until `until` or until it is woken.
    pub fn sleep(&mut self, vcpu: VcpuId, until: Nanos) {
        self.remove(vcpu);
        self.asleep.insert((until, vcpu));
    }

    /// Sends a vCPU whose slice is over behind the others.
    pub fn yield_now(&mut self, vcpu: VcpuId) {
        if let Some(at) = self.runnable.iter().position(|other| *other == vcpu) {
            self.runnable.remove(at);
            self.runnable.push_back(vcpu);
        }
    }

    /// Forgets a vCPU.
    pub fn remove(&mut self, vcpu: VcpuId) {
        self.runnable.retain(|other| *other != vcpu);
        self.asleep.retain(|(_, other)| *other != vcpu);
    }

    /// Decides what runs at `now`.
    pub fn next(&mut self, now: Nanos) -> Decision {
        while let Some(&(until, vcpu)) = self.asleep.first()
            && until <= now
        {
            self.asleep.pop_first();
            self.runnable.push_front(vcpu);
        }
        let wake = self
            .asleep
            .first()
            .map_or(Nanos::NEVER, |(until, _)| *until);
        match self.runnable.front() {
            Some(&vcpu) if self.runnable.len() > 1 => Decision::Run(vcpu, wake.min(now + SLICE)),
            Some(&vcpu) => Decision::Run(vcpu, wake),
            None if self.asleep.is_empty() => Decision::Nothing,
            None => Decision::Idle(wake),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: VcpuId = VcpuId(0);
    const B: VcpuId = VcpuId(1);

    fn ms(ms: u64) -> Nanos {
        Nanos(ms * 1_000_000)
    }

    #[test]
    fn one_vcpu_alone_is_not_disturbed() {
        let mut core = Scheduler::default();
        core.wake(A);
        assert_eq!(core.next(ms(0)), Decision::Run(A, Nanos::NEVER));
    }

    #[test]
    fn two_busy_vcpus_take_turns() {
        let mut core = Scheduler::default();
        core.wake(B);
        core.wake(A);
        let mut turns = [0, 0];
        for round in 0..100 {
            let Decision::Run(vcpu, until) = core.next(ms(10 * round)) else {
                panic!()
            };
            assert_eq!(until, ms(10 * round + 10));
            turns[vcpu.0] += 1;
            core.yield_now(vcpu);
        }
        assert_eq!(turns, [50, 50]);
    }

    #[test]
    fn a_sleeper_comes_back_at_its_deadline_and_runs_first() {
        let mut core = Scheduler::default();
        core.wake(A);
        core.wake(B);
        core.sleep(B, ms(5));
        assert_eq!(core.next(ms(0)), Decision::Run(A, ms(5)));
        assert_eq!(core.next(ms(5)), Decision::Run(B, ms(15)));
        core.sleep(B, Nanos::NEVER);
        core.sleep(A, ms(9));
        assert_eq!(core.next(ms(6)), Decision::Idle(ms(9)));
        core.wake(B);
        assert_eq!(core.next(ms(6)), Decision::Run(B, ms(9)));
        core.remove(A);
        core.remove(B);
        assert_eq!(core.next(ms(100)), Decision::Nothing);
    }
}
