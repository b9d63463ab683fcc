//! What each core has of its own: one [`Core`], which GS points at from the moment the core runs
//! our code (Intel SDM Vol. 3A §3.4.4). A guest's GS is never there while the host runs: VM exit
//! loads the host's base, and on AMD-V the world switch does, with interrupts and NMIs held back.

use core::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

/// What one core has of its own. Others may look at it and set its flags; it never goes away.
///
/// The first two cache lines hold what the core itself writes all the time.
#[derive(Debug)]
#[repr(C, align(128))]
pub struct Core {
    /// Address of this structure, so that one load through GS finds it.
    this: AtomicU64,
    number: AtomicU32,
    apic_id: AtomicU32,
    /// Where the stack stood when work that may be abandoned began; 0 when none is under way.
    pub(crate) resume: AtomicU64,
    /// AMD-V: physical address of the page with the host's VMSAVE state.
    pub(crate) host_save: AtomicU64,
    /// Shared locks that the core holds or waits for: with any, work must not be abandoned.
    pub held: AtomicU32,
    /// The core tells of a panic.
    pub panicking: AtomicBool,
    /// The core's timer fired, and the run loop has not looked yet.
    pub timer_fired: AtomicBool,
    /// Another core wants this one's attention: see [`Core::take_kick`].
    pub kicked: AtomicBool,
    /// The core is to ask for its next decision.
    pub reschedule: AtomicBool,
    /// NMIs that came and were not told of yet.
    pub nmis: AtomicU32,
    /// The VM the core works for, plus one; 0 for none. For reports only.
    pub vm: AtomicU32,
    /// Counts up by two on each [`Core::beat`]; bit 0 is set while the core rests.
    heartbeat: AtomicU64,
    /// What the watchdog knows of this core.
    pub watch: Watch,
}

/// What the core that watches another one remembers of it.
#[derive(Debug)]
#[repr(align(64))]
pub struct Watch {
    /// The heartbeat when it was last seen to change.
    pub seen: AtomicU64,
    /// The watcher's TSC then.
    pub since: AtomicU64,
    /// How many NMIs the watcher has sent since.
    pub strikes: AtomicU32,
}

impl Core {
    /// A core that has not started.
    #[must_use]
    pub const fn new(number: u32, apic_id: u32) -> Self {
        Self {
            this: AtomicU64::new(0),
            number: AtomicU32::new(number),
            apic_id: AtomicU32::new(apic_id),
            resume: AtomicU64::new(0),
            host_save: AtomicU64::new(0),
            held: AtomicU32::new(0),
            panicking: AtomicBool::new(false),
            timer_fired: AtomicBool::new(false),
            kicked: AtomicBool::new(false),
            reschedule: AtomicBool::new(false),
            nmis: AtomicU32::new(0),
            vm: AtomicU32::new(0),
            heartbeat: AtomicU64::new(0),
            watch: Watch {
                seen: AtomicU64::new(0),
                since: AtomicU64::new(0),
                strikes: AtomicU32::new(0),
            },
        }
    }

    /// Its place among the cores that run, from 0 (the boot core).
    #[must_use]
    pub fn number(&self) -> usize {
        self.number.load(Ordering::Relaxed) as usize
    }

    /// Its local APIC's id.
    #[must_use]
    pub fn apic_id(&self) -> u32 {
        self.apic_id.load(Ordering::Relaxed)
    }

    /// Gives it another number, before it begins to work.
    pub fn set_number(&self, number: u32) {
        self.number.store(number, Ordering::Relaxed);
    }

    /// Tells its APIC id, once that is known.
    pub fn set_apic_id(&self, id: u32) {
        self.apic_id.store(id, Ordering::Relaxed);
    }

    /// Makes this the calling core's own, for ever.
    ///
    /// # Safety
    /// Called on the core it describes, in ring 0; no other core has it.
    pub unsafe fn adopt(&'static self) {
        let address = &raw const *self as u64;
        self.this.store(address, Ordering::Relaxed);
        // SAFETY: GS is the hypervisor's to use, and holds this address from here on.
        unsafe { x86::msr::wrmsr(arch::msr::IA32_GS_BASE, address) };
    }

    /// Tells the watchdog that the core gets on. Called by the core itself, once a turn.
    #[inline]
    pub fn beat(&self) {
        let beat = self.heartbeat.load(Ordering::Relaxed) | 1;
        self.heartbeat
            .store(beat.wrapping_add(1), Ordering::Relaxed);
    }

    /// As [`Core::beat`], before something that may last: a halt, or a guest that has the core to
    /// itself and no tick. The watchdog leaves the core alone until its next beat.
    #[inline]
    pub fn rest(&self) {
        let beat = self.heartbeat.load(Ordering::Relaxed) | 1;
        self.heartbeat
            .store(beat.wrapping_add(2), Ordering::Relaxed);
    }

    /// The heartbeat; odd while the core rests.
    #[must_use]
    pub fn heartbeat(&self) -> u64 {
        self.heartbeat.load(Ordering::Relaxed)
    }

    /// Whether someone called, told once. Called before the core looks at what others left for it.
    #[inline]
    pub fn take_kick(&self) -> bool {
        // Read first: most of the time nobody did, and a locked exchange is slow.
        self.kicked.load(Ordering::Relaxed) && self.kicked.swap(false, Ordering::AcqRel)
    }
}

/// The calling core.
#[cfg(not(test))]
#[inline]
#[must_use]
pub fn this() -> &'static Core {
    let core: *const Core;
    // SAFETY: GS holds the address of this core's `Core` since `adopt`, the first thing a core
    // does, and a `Core` is never given back.
    unsafe {
        core::arch::asm!("mov {}, gs:[{this}]", out(reg) core,
            this = const core::mem::offset_of!(Core, this),
            options(nostack, preserves_flags, readonly, pure));
        &*core
    }
}

/// The number of the calling core.
#[cfg(not(test))]
#[inline]
#[must_use]
pub fn core_number() -> usize {
    let number: u32;
    // SAFETY: as in `this`.
    unsafe {
        core::arch::asm!("mov {:e}, gs:[{number}]", out(reg) number,
            number = const core::mem::offset_of!(Core, number),
            options(nostack, preserves_flags, readonly, pure));
    }
    number as usize
}

/// Each test thread is a core.
#[cfg(test)]
pub fn this() -> &'static Core {
    std::thread_local!(static CORE: &'static Core = Box::leak(Box::new(Core::new(0, 0))));
    CORE.with(|core| *core)
}

/// The number of the calling core.
#[cfg(test)]
pub fn core_number() -> usize {
    this().number()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_heart_beats_in_even_numbers_and_rests_in_odd_ones() {
        let core = Core::new(3, 7);
        core.beat();
        assert_eq!((core.heartbeat(), core.number(), core.apic_id()), (2, 3, 7));
        core.rest();
        assert_eq!(core.heartbeat(), 5);
        core.rest();
        assert_eq!(core.heartbeat(), 7);
        core.beat();
        assert_eq!(core.heartbeat(), 8);
    }

    #[test]
    fn a_kick_is_taken_once() {
        let core = Core::new(0, 0);
        assert!(!core.take_kick());
        core.kicked.store(true, Ordering::Release);
        assert!(core.take_kick() && !core.take_kick());
    }
}
