//! How often a vCPU left guest mode, by reason.
//!
//! Counting is one increment of the vCPU's own memory. At the end of each turn the counts are put
//! where others can read them.

use core::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// Why a vCPU left guest mode, as far as a person is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// CPUID.
    Cpuid,
    /// VMCALL or VMMCALL.
    Hypercall,
    /// RDMSR.
    Rdmsr,
    /// WRMSR.
    Wrmsr,
    /// A port was read or written.
    Port,
    /// A register of the local APIC was written.
    Apic,
    /// An address without a page behind it: a device, or RAM for the first time.
    Memory,
    /// HLT.
    Halt,
    /// An interrupt of the machine, or a timer.
    Interrupt,
    /// The guest can take an interrupt again.
    Window,
    /// All others.
    Other,
}

impl Reason {
    /// All of them, with their names.
    pub const ALL: [(Self, &'static str); 11] = [
        (Self::Cpuid, "cpuid"),
        (Self::Hypercall, "hypercall"),
        (Self::Rdmsr, "rdmsr"),
        (Self::Wrmsr, "wrmsr"),
        (Self::Port, "port"),
        (Self::Apic, "apic"),
        (Self::Memory, "memory"),
        (Self::Halt, "hlt"),
        (Self::Interrupt, "interrupt"),
        (Self::Window, "window"),
        (Self::Other, "other"),
    ];
}

/// The exits of a vCPU, as it counts them.
#[derive(Debug, Default)]
pub(crate) struct Counts([u64; Reason::ALL.len()]);

impl Counts {
    /// Counts one.
    #[inline(always)]
    pub(crate) const fn count(&mut self, reason: Reason) {
        let counter = &mut self.0[reason as usize];
        *counter = counter.wrapping_add(1);
    }

    /// How many there were for the reason with this number.
    pub(crate) fn of(&self, reason: u64) -> Option<u64> {
        self.0.get(usize::try_from(reason).ok()?).copied()
    }
}

/// The exits of a vCPU up to the end of its last turn.
#[derive(Debug, Default)]
pub struct Exits([AtomicU64; Reason::ALL.len()]);

impl Exits {
    pub(crate) fn publish(&self, counts: &Counts) {
        for (shown, count) in self.0.iter().zip(counts.0) {
            shown.store(count, Relaxed);
        }
    }

    /// How many there were for a reason.
    #[must_use]
    pub fn of(&self, reason: Reason) -> u64 {
        self.0[reason as usize].load(Relaxed)
    }

    /// How many there were in all.
    #[must_use]
    pub fn total(&self) -> u64 {
        let counts = self.0.iter().map(|count| count.load(Relaxed));
        counts.fold(0, u64::wrapping_add)
    }
}
