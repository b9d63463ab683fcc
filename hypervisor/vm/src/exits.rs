//! How often a vCPU left guest mode, by reason.
//!
//! The core that runs the vCPU is the one writer, so that counting is a plain increment; others
//! read while it runs, and may miss the last few.

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

/// The exits of a vCPU, counted.
#[derive(Debug, Default)]
pub struct Exits([AtomicU64; Reason::ALL.len()]);

impl Exits {
    /// Counts one. Only the core that runs the vCPU does.
    #[inline(always)]
    pub(crate) fn count(&self, reason: Reason) {
        // One increment in memory: nobody else writes, so it need not be locked.
        let counter = &self.0[reason as usize];
        counter.store(counter.load(Relaxed).wrapping_add(1), Relaxed);
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
