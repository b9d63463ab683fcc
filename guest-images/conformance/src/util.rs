//! What the cases share.

use crate::acpi;
use core::sync::atomic::{AtomicU64, Ordering};
use guest_runtime::cpu::{self, cpuid, inb, inl, outb, rdtsc};
use guest_runtime::{Fault, pc, skip, smp};

/// #UD, #GP and the others by number.
#[allow(missing_docs, reason = "the names are the manual's")]
pub mod vector {
    pub const DE: u8 = 0;
    pub const DB: u8 = 1;
    pub const NMI: u8 = 2;
    pub const BP: u8 = 3;
    pub const UD: u8 = 6;
    pub const NM: u8 = 7;
    pub const DF: u8 = 8;
    pub const NP: u8 = 11;
    pub const SS: u8 = 12;
    pub const GP: u8 = 13;
    pub const PF: u8 = 14;
    pub const MF: u8 = 16;
    pub const AC: u8 = 17;
    pub const XM: u8 = 19;
}

/// `IA32_EFER`.
pub const EFER: u32 = 0xc000_0080;
/// CR4: XSAVE and XGETBV are there.
pub const OSXSAVE: u64 = 1 << 18;
/// CR4 as the runtime leaves it: PAE.
const CR4: u64 = 1 << 5;
/// CR0 as the runtime leaves it: PG, WP, NE, ET, PE.
const CR0: u64 = 0x8001_0031;

/// Everything a case may have changed, back to what every case starts from.
pub fn reset_world() {
    smp::park_others();
    pc::quiet();
    // SAFETY: these are the values that the runtime booted with, and devices that belong to the
    // guest; nothing uses breakpoints or the FPU between cases.
    unsafe {
        cpu::set_dr7(0x400);
        cpu::set_dr6(0xffff_0ff0);
        cpu::set_cr0(CR0);
        cpu::set_cr4(CR4);
        cpu::wrmsr(EFER, 0xd00);
        for (port, value) in [(0x3fb, 0x83), (0x3f8, 1), (0x3f9, 0)] {
            outb(port, value);
        }
        for (port, value) in [(0x3fb, 3), (0x3f9, 0), (0x3fa, 7), (0x3fc, 3)] {
            outb(port, value);
        }
        let _ = (inb(0x3f8), inb(0x3fa), inb(0x3fd), inb(0x3fe));
        // Channel 0 in mode 0, expiring once, masked; channel 2 off.
        for (port, value) in [(0x43, 0x30), (0x40, 1), (0x40, 0), (0x61, 0)] {
            outb(port, value);
        }
    }
    crate::rtc::reset();
}

/// Whether this is QEMU's own emulation, without a hypervisor of its own in between.
pub fn on_tcg() -> bool {
    cpuid(1, 0)[2] >> 31 != 0 && cpuid(0x4000_0000, 0)[1] == u32::from_le_bytes(*b"TCGT")
}

/// Skips the case where QEMU's own emulation is the machine: it is known not to do `what`.
pub fn not_in_tcg(what: &str) {
    if on_tcg() {
        skip(format_args!("QEMU's emulation {what}"));
    }
}

/// Whether the CPU is one of QEMU's emulation, even beneath a hypervisor: what it does by itself
/// is then QEMU's.
pub fn cpu_is_qemus() -> bool {
    let [a, b, ..] = cpuid(0x8000_0002, 0);
    [a, b] == [u32::from_le_bytes(*b"QEMU"), u32::from_le_bytes(*b" TCG")]
}

/// Skips the case on a CPU of QEMU's emulation: it is known not to do `what`.
pub fn not_on_qemus_cpu(what: &str) {
    if cpu_is_qemus() {
        skip(format_args!("QEMU's CPU {what}"));
    }
}

/// Skips the case unless `condition`.
pub fn need(condition: bool, what: &str) {
    if !condition {
        skip(format_args!("no {what}"));
    }
}

/// That a fault came, with this vector and error code.
#[track_caller]
pub fn assert_fault(found: Option<Fault>, vector: u8, error_code: u64) {
    match found {
        Some(fault) => assert_eq!((fault.vector, fault.error_code), (vector, error_code)),
        None => panic!("vector {vector} expected, nothing came"),
    }
}

/// #GP(0).
#[track_caller]
pub fn assert_gp(found: Option<Fault>) {
    assert_fault(found, vector::GP, 0);
}

/// Frequency of the ACPI timer in Hz (ACPI 6.5 §4.8.3.3).
pub const PM_HZ: u64 = 3_579_545;
/// Frequency of the 8254 in Hz.
pub const PIT_HZ: u64 = 1_193_182;

/// The ACPI timer: 24 bits.
pub fn pm_timer() -> u32 {
    // SAFETY: reading the timer has no side effect.
    unsafe { inl(acpi::pm_timer_port()) & 0xff_ffff }
}

/// ACPI timer ticks between two readings.
pub fn pm_between(from: u32, to: u32) -> u64 {
    u64::from(to.wrapping_sub(from) & 0xff_ffff)
}

/// A reading of a clock with the TSC of the same moment: the closest pair of several, as a busy
/// machine under an emulator may stop for a while anywhere.
pub fn with_tsc(read: impl Fn() -> u32) -> (u32, u64) {
    let mut best = (u64::MAX, 0, 0);
    for _ in 0..8 {
        let before = rdtsc();
        let value = read();
        let width = rdtsc() - before;
        if width < best.0 {
            best = (width, value, before + width / 2);
        }
    }
    (best.1, best.2)
}

/// A reading of the ACPI timer with the TSC of the same moment.
pub fn pm_and_tsc() -> (u32, u64) {
    with_tsc(pm_timer)
}

/// TSC ticks of a second, measured once over 20 ms of the ACPI timer.
pub fn tsc_hz() -> u64 {
    static HZ: AtomicU64 = AtomicU64::new(0);
    if HZ.load(Ordering::Relaxed) == 0 {
        let (pm, tsc) = pm_and_tsc();
        while pm_between(pm, pm_timer()) < PM_HZ / 50 {}
        let (pm_end, tsc_end) = pm_and_tsc();
        HZ.store(
            (tsc_end - tsc) * PM_HZ / pm_between(pm, pm_end),
            Ordering::Relaxed,
        );
    }
    HZ.load(Ordering::Relaxed)
}

/// How long to wait, in microseconds, for what should come soon: the machine under the emulator
/// may be busy.
pub const PATIENCE: u64 = 500_000;

/// Waits for `condition` for at most so many microseconds: whether it came true. Time in which
/// this CPU did not run, because the machine under the emulator is busy, counts for little.
pub fn wait_until(micros: u64, mut condition: impl FnMut() -> bool) -> bool {
    let ticks = tsc_hz() / 1000 * micros / 1000;
    let most = tsc_hz() / 10_000;
    let (mut waited, mut last) = (0, rdtsc());
    while !condition() {
        let now = rdtsc();
        waited += (now - last).min(most);
        last = now;
        if waited > ticks {
            return condition();
        }
    }
    true
}

/// Waits so many microseconds.
pub fn wait(micros: u64) {
    wait_until(micros, || false);
}

/// Waits with interrupts on for `condition`, for at most so many microseconds.
pub fn wait_with_interrupts(micros: u64, condition: impl FnMut() -> bool) -> bool {
    guest_runtime::with_interrupts(|| wait_until(micros, condition))
}

/// That two quantities agree within so many parts of a thousand.
#[track_caller]
pub fn assert_close(found: u64, wanted: u64, per_mille: u64) {
    let off = found.abs_diff(wanted);
    assert!(
        off * 1000 <= wanted * per_mille,
        "{found} is not within {per_mille}/1000 of {wanted}"
    );
}

/// Like [`assert_close`], for measurements that a busy machine under the emulator may spoil: one
/// good one of five is enough.
#[track_caller]
pub fn assert_measures(mut measure: impl FnMut() -> u64, wanted: u64, per_mille: u64) {
    let mut found = 0;
    for _ in 0..5 {
        found = measure();
        if found.abs_diff(wanted) * 1000 <= wanted * per_mille {
            return;
        }
    }
    assert_close(found, wanted, per_mille);
}
