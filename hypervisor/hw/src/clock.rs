//! The time-stamp counter and its frequency.
//!
//! CPUID leaves 15H and 16H are absent on AMD and untrue in emulators, so the TSC is measured
//! against a timer of known frequency: the ACPI PM timer, or channel 2 of the 8254.

use crate::power::Port;

/// The PM timer's frequency in Hz (ACPI 6.5 §4.8.3.3).
const PM_TIMER_HZ: u64 = 3_579_545;
/// The 8254's input frequency in Hz.
const PIT_HZ: u64 = 1_193_182;
/// How long one measurement takes, in milliseconds.
const MEASURE_MS: u64 = 20;

/// The TSC's frequency.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TscFrequency {
    /// In Hz.
    pub hz: u64,
    /// What it was measured against.
    pub reference: &'static str,
}

/// No timer of known frequency moves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ClockError;

/// The core's time-stamp counter now.
#[inline]
#[must_use]
pub fn rdtsc() -> u64 {
    // SAFETY: RDTSC is part of every x86_64 CPU and changes nothing.
    unsafe { core::arch::x86_64::_rdtsc() }
}

/// The time-stamp counter, read after all loads before it are done (Intel SDM Vol. 2B, RDTSC).
#[must_use]
pub fn rdtsc_ordered() -> u64 {
    // SAFETY: LFENCE is part of every x86_64 CPU and changes nothing.
    unsafe { core::arch::x86_64::_mm_lfence() };
    rdtsc()
}

/// Whether the TSC goes on at one rate in all power states (Intel SDM Vol. 3B §18.17.1).
#[must_use]
pub fn tsc_is_invariant() -> bool {
    use core::arch::x86_64::__cpuid;
    __cpuid(0x8000_0000).eax >= 0x8000_0007 && __cpuid(0x8000_0007).edx & 1 << 8 != 0
}

/// Measures the TSC.
///
/// # Errors
/// Neither reference timer moves.
///
/// # Safety
/// Nothing else drives channel 2 of the PIT, and `pm_timer` is the port the firmware named.
pub unsafe fn calibrate(pm_timer: Option<(u16, bool)>) -> Result<TscFrequency, ClockError> {
    if let Some((port, wide)) = pm_timer {
        let mask = if wide { 0xffff_ffff } else { 0x00ff_ffff };
        // SAFETY: reading the PM timer changes nothing.
        let read = || u64::from(unsafe { Port::<u32>::new(port).read() }) & mask;
        if let Some(hz) = measure(read, mask, PM_TIMER_HZ) {
            return Ok(TscFrequency {
                hz,
                reference: "ACPI PM timer",
            });
        }
    }
    // SAFETY: channel 2 is ours (promised by the caller).
    unsafe { calibrate_pit() }.ok_or(ClockError)
}

/// Counts TSC ticks while an upward counter of `hz` advances by a fixed time.
fn measure(read: impl Fn() -> u64, mask: u64, hz: u64) -> Option<u64> {
    let wanted = hz * MEASURE_MS / 1000;
    let origin = read();
    let mut start = origin;
    // Begin at an edge. A timer that stands still for so many reads is not one.
    for spin in 0.. {
        start = read();
        if start != origin {
            break;
        }
        if spin > 1_000_000 {
            return None;
        }
    }
    let from = rdtsc();
    let mut idle = 0u32;
    let mut last = start;
    // A timer that moves but never comes there is none either.
    for _ in 0..50_000_000u32 {
        let now = read();
        let passed = now.wrapping_sub(start) & mask;
        if passed >= wanted {
            return Some(
                ((u128::from(rdtsc() - from) * u128::from(hz)) / u128::from(passed)) as u64,
            );
        }
        idle = if now == last { idle + 1 } else { 0 };
        if idle > 1_000_000 {
            return None;
        }
        last = now;
    }
    None
}

/// Channel 2 in mode 0 with the speaker off: OUT2 (port 0x61 bit 5) rises at terminal count.
unsafe fn calibrate_pit() -> Option<TscFrequency> {
    let count = (PIT_HZ * MEASURE_MS / 1000) as u16;
    // SAFETY: channel 2 and port 0x61 are ours (promised by the caller).
    unsafe {
        let mut gate = Port::<u8>::new(0x61);
        let old = gate.read();
        gate.write(old & !2 | 1);
        Port::<u8>::new(0x43).write(0b1011_0000);
        let mut channel = Port::<u8>::new(0x42);
        channel.write(count as u8);
        channel.write((count >> 8) as u8);
        let from = rdtsc();
        let mut spins = 0u32;
        while gate.read() & 0x20 == 0 {
            spins += 1;
            if spins > 50_000_000 {
                return None;
            }
        }
        let ticks = rdtsc() - from;
        gate.write(old);
        Some(TscFrequency {
            hz: ticks * PIT_HZ / u64::from(count),
            reference: "8254 PIT",
        })
    }
}
