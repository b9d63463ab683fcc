//! Which vCPU runs next on a core, and for how long.
//!
//! Pure: time comes in as an argument, and nothing here knows what a vCPU is but its number. Of
//! those that can run, the one that has used the core least runs next, for a slice. One that
//! sleeps comes back at its deadline or when it is woken, within a slice of those that ran
//! meanwhile: so it mostly runs at once, but cannot save up time, and one that sleeps and wakes
//! without end gets its share and no more.
#![cfg_attr(not(test), no_std)]
#![forbid(unsafe_code)]

extern crate alloc;

use alloc::collections::{BTreeMap, BTreeSet, VecDeque};
use arch::Nanos;

/// How long a vCPU runs before another gets its turn, in nanoseconds.
pub const SLICE: u64 = 10_000_000;

/// How long a vCPU runs at the least before a sleeper's deadline ends its turn, in nanoseconds:
/// changing over must stay cheap against running.
pub const MIN_TURN: u64 = 100_000;

/// A vCPU, by the number its owner gave it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct VcpuId(pub usize);

/// The vCPUs of one core.
#[derive(Debug, Default)]
pub struct Scheduler {
    runnable: VecDeque<VcpuId>,
    asleep: BTreeSet<(Nanos, VcpuId)>,
    /// Nanoseconds of the core that each has used, in terms that only compare.
    used: BTreeMap<VcpuId, u64>,
    /// Who was given the core last, and when.
    running: Option<(VcpuId, Nanos)>,
    /// Who gave up the rest of its turn.
    yielded: Option<VcpuId>,
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
    /// Adds a vCPU that can run, or lets a sleeping one run again, ahead of those that have used
    /// the core as much.
    pub fn wake(&mut self, vcpu: VcpuId) {
        self.asleep.retain(|(_, other)| *other != vcpu);
        if self.runnable.contains(&vcpu) {
            return;
        }
        let least = self.runnable.iter().map(|other| self.used(*other)).min();
        if let Some(least) = least {
            let near = least.saturating_sub(SLICE)..=least.saturating_add(SLICE);
            let used = self.used(vcpu).clamp(*near.start(), *near.end());
            self.used.insert(vcpu, used);
        }
        self.runnable.push_front(vcpu);
    }

    /// Puts a vCPU to sleep until `until` or until it is woken.
    pub fn sleep(&mut self, vcpu: VcpuId, until: Nanos) {
        self.forget(vcpu);
        self.asleep.insert((until, vcpu));
    }

    /// Sends a vCPU whose slice is over behind the others.
    pub fn yield_now(&mut self, vcpu: VcpuId) {
        if let Some(at) = self.runnable.iter().position(|other| *other == vcpu) {
            self.runnable.remove(at);
            self.runnable.push_back(vcpu);
            self.yielded = Some(vcpu);
        }
    }

    /// Forgets a vCPU.
    pub fn remove(&mut self, vcpu: VcpuId) {
        self.forget(vcpu);
        self.used.remove(&vcpu);
        self.running = self.running.filter(|(other, _)| *other != vcpu);
    }

    fn forget(&mut self, vcpu: VcpuId) {
        self.runnable.retain(|other| *other != vcpu);
        self.asleep.retain(|(_, other)| *other != vcpu);
    }

    fn used(&self, vcpu: VcpuId) -> u64 {
        self.used.get(&vcpu).copied().unwrap_or(0)
    }

    /// Decides what runs at `now`.
    pub fn next(&mut self, now: Nanos) -> Decision {
        if let Some((vcpu, since)) = self.running.take() {
            let used = self.used(vcpu).saturating_add(now.since(since));
            self.used.insert(vcpu, used);
        }
        while let Some(&(until, vcpu)) = self.asleep.first()
            && until <= now
        {
            self.wake(vcpu);
        }
        let wake = self
            .asleep
            .first()
            .map_or(Nanos::NEVER, |(until, _)| *until);
        let yielded = self.yielded.take().filter(|_| self.runnable.len() > 1);
        let least = self
            .runnable
            .iter()
            .copied()
            .filter(|vcpu| Some(*vcpu) != yielded)
            .min_by_key(|vcpu| self.used(*vcpu));
        let Some(vcpu) = least else {
            return if self.asleep.is_empty() {
                Decision::Nothing
            } else {
                Decision::Idle(wake)
            };
        };
        self.running = Some((vcpu, now));
        let slice = if self.runnable.len() > 1 {
            now + SLICE
        } else {
            Nanos::NEVER
        };
        Decision::Run(vcpu, wake.max(now + MIN_TURN).min(slice))
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
    fn one_that_sleeps_and_wakes_without_end_gets_its_share_and_no_more() {
        let mut core = Scheduler::default();
        core.wake(A);
        core.wake(B);
        let (mut now, mut ran) = (ms(0), [0u64, 0]);
        while now < ms(2000) {
            match core.next(now) {
                // A runs for 5 µs, then sleeps until a moment that is over when it is looked at.
                Decision::Run(A, _) => {
                    now = now + 5_000;
                    ran[0] += 5_000;
                    core.sleep(A, now);
                }
                Decision::Run(vcpu, until) => {
                    assert!(until >= now + MIN_TURN);
                    ran[1] += until.since(now);
                    now = until;
                    core.yield_now(vcpu);
                }
                other => panic!("{other:?}"),
            }
        }
        assert!(ran[0] < 1_100_000_000 && ran[1] > 900_000_000, "{ran:?}");
    }

    #[test]
    fn a_long_sleep_saves_up_one_slice() {
        let mut core = Scheduler::default();
        core.wake(A);
        core.wake(B);
        core.sleep(B, ms(1000));
        assert_eq!(core.next(ms(0)), Decision::Run(A, ms(1000)));
        let (mut now, mut ran) = (ms(1000), [0u64, 0]);
        for _ in 0..100 {
            let Decision::Run(vcpu, until) = core.next(now) else {
                panic!()
            };
            ran[vcpu.0] += until.since(now);
            now = until;
            core.yield_now(vcpu);
        }
        assert!(ran[1] - ran[0] <= 2 * SLICE, "{ran:?}");
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
