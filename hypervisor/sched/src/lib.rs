//! Which vCPU runs next on which core, and for how long.
//!
//! Pure: time comes in as an argument, and nothing here knows what a vCPU is but its number. One
//! [`Scheduler`] serves the whole machine; the kernel keeps it behind a short lock and interrupts
//! the cores that [`Scheduler::kicks`] names.
//!
//! **Fair.** Each vCPU pays virtual time for the real time that it ran: n / weight a nanosecond
//! while n vCPUs of its VM want a core. The one that has paid least is next (start-time fair
//! queueing, after Goyal, Vin and Cheng). Each core has a queue of those that call it home, and
//! each distinct affinity mask has a queue of all that have it: a core takes the first of its own
//! queue, unless that of a mask it belongs to is behind by more than a slice, or its own is
//! empty. So a core that has nothing to do takes what waits anywhere, cores with unequal queues
//! even out, and who is home on a core mostly stays there.
//!
//! **Sleepers** come back with what they had not had when they went, but ahead of those that have
//! had the same by [`CREDIT`]: they mostly run at once, and save nothing up. One that had more
//! than its part when it went to sleep lingers: until the others have had theirs, its VM's weight
//! is split with it. So vCPUs that sleep and wake without end, in turns, or just before they are
//! looked at, get their share and no more.
//!
//! **Ahead of the fair** go real-time vCPUs (a constant-bandwidth server each, bound to a core,
//! earliest deadline first), then those whose VM has reservation left. **Dedicated** vCPUs own
//! their core: no other is put there and nothing ends their turn.
//!
//! A decision takes O(log n) steps in the worst case and allocates nothing.
#![cfg_attr(not(test), no_std)]
#![forbid(unsafe_code)]

extern crate alloc;

mod cores;
mod forest;
mod policy;
mod scheduler;
#[cfg(any(test, feature = "simulate"))]
pub mod simulate;
#[cfg(test)]
mod tests;
mod vm;

use arch::Nanos;

pub use cores::{CoreSet, MAX_CORES};
pub use policy::{
    Class, DEFAULT_WEIGHT, GUARANTEE_LIMIT, MAX_PERIOD, MAX_VCPUS, MAX_WEIGHT, MIN_BUDGET, Policy,
    PolicyError, REAL_TIME_LIMIT,
};
pub use scheduler::Scheduler;

/// How long a vCPU runs before another gets its turn, in nanoseconds. Over any time at all a
/// capped VM uses no more than its cap and one slice for each core that the cap is worth.
pub const SLICE: u64 = 1_000_000;

/// How long a vCPU runs at the least before one that is not real-time takes its core, in
/// nanoseconds: changing over must stay cheap against running.
pub const MIN_TURN: u64 = 100_000;

/// How much further behind than the one that runs a vCPU must be to end its slice, in nanoseconds
/// of its own.
pub const PATIENCE: u64 = SLICE / 4;

/// How much a vCPU that slept may have had more than others and still go first, and the most that
/// it keeps of what it had not had, in nanoseconds of its own.
pub const CREDIT: u64 = 2 * SLICE;

/// How far cores may differ for one that changes between them, in nanoseconds of its own.
pub const LIMIT: u64 = 20 * SLICE;

/// A VM, by the number its owner gave it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct VmId(pub u16);

/// A vCPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct VcpuId {
    /// Its VM.
    pub vm: VmId,
    /// Its number in the VM, from 0.
    pub index: u16,
}

/// A core, by a number below [`MAX_CORES`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct CoreId(pub u16);

/// What a core does next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    /// Run this vCPU until then at the latest.
    Run {
        /// Who.
        vcpu: VcpuId,
        /// [`Nanos::NEVER`] for a dedicated vCPU, and when nobody else could want the core.
        until: Nanos,
    },
    /// Nobody can run before then, unless the core is interrupted.
    Idle {
        /// [`Nanos::NEVER`] when nobody has a deadline here.
        until: Nanos,
    },
}

/// What a vCPU does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// Until it is woken or its deadline.
    Asleep,
    /// For a core.
    Waiting,
    /// For its VM's cap, or its real-time budget, to be filled.
    Throttled,
    /// On this core.
    Running(CoreId),
}

/// What there is to know about a vCPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct View {
    /// What it does.
    pub state: State,
    /// Where it ran last, or will.
    pub core: CoreId,
    /// Nanoseconds on a core.
    pub used: u64,
    /// Nanoseconds for which it wanted a core and had none.
    pub stolen: u64,
    /// How often it came to another core than it had.
    pub migrations: u64,
}
