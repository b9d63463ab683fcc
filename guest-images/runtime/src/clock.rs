//! Time as a guest measures it: the TSC, its rate, and sleep until it has come so far.

use crate::cpu::{cpuid, inl, rdtsc, wait_for_interrupt, wrmsr};
use crate::pc::{MASKED, TSC_DEADLINE, handle_eoi, has_tsc_deadline, lapic, reg, set_lapic};
use crate::{acpi, on_interrupt};
use core::arch::asm;
use core::sync::atomic::{AtomicU64, Ordering};

/// The interrupt that ends a sleep.
pub const VECTOR: u8 = 0xee;
/// Frequency of the ACPI timer (ACPI 6.5 §4.8.3.3).
const PM_HZ: u64 = 3_579_545;
/// The longest sleep in one go, so that a one-shot's rate need not be exact.
const NAP: u64 = 1 << 28;

/// TSC ticks of a second: what the hypervisor says, or else measured once over 10 ms of the ACPI
/// timer.
pub fn tsc_hz() -> u64 {
    static HZ: AtomicU64 = AtomicU64::new(0);
    if HZ.load(Ordering::Relaxed) == 0 {
        HZ.store(told().unwrap_or_else(measured).max(1), Ordering::Relaxed);
    }
    HZ.load(Ordering::Relaxed)
}

fn told() -> Option<u64> {
    let there = cpuid(1, 0)[2] >> 31 != 0;
    let last = if there { cpuid(0x4000_0000, 0)[0] } else { 0 };
    let khz = if (0x4000_0010..0x4000_0100).contains(&last) {
        cpuid(0x4000_0010, 0)[0]
    } else {
        0
    };
    (khz != 0).then(|| u64::from(khz) * 1000)
}

fn measured() -> u64 {
    let port = acpi::table(b"FACP").map_or(0, |fadt| fadt.field(76, 4)) as u16;
    // SAFETY: reading the timer has no side effect.
    let now = || unsafe { inl(port) } & 0xff_ffff;
    let since = |from: u32| u64::from(now().wrapping_sub(from) & 0xff_ffff);
    let (from, start) = (now(), rdtsc());
    while since(from) < PM_HZ / 100 {}
    let (ticks, end) = (since(from), rdtsc());
    (end - start) * PM_HZ / ticks
}

/// TSC ticks of so many microseconds.
pub fn ticks(micros: u64) -> u64 {
    (u128::from(micros) * u128::from(tsc_hz()) / 1_000_000) as u64
}

/// Microseconds of so many TSC ticks.
pub fn micros(ticks: u64) -> u64 {
    (u128::from(ticks) * 1_000_000 / u128::from(tsc_hz())) as u64
}

/// TSC ticks of 2^20 of the local APIC's timer at divisor 1.
fn tsc_per_timer_tick() -> u64 {
    static RATE: AtomicU64 = AtomicU64::new(0);
    if RATE.load(Ordering::Relaxed) == 0 {
        set_lapic(reg::INITIAL, u32::MAX);
        let (start, from) = (rdtsc(), lapic(reg::CURRENT));
        while rdtsc() - start < 1 << 21 {}
        let (end, to) = (rdtsc(), lapic(reg::CURRENT));
        set_lapic(reg::INITIAL, 0);
        let rate = ((end - start) << 20) / u64::from(from.wrapping_sub(to)).max(1);
        RATE.store(rate.max(1), Ordering::Relaxed);
    }
    RATE.load(Ordering::Relaxed)
}

/// Halts until the TSC has come to `deadline`, by this CPU's timer; other interrupts are taken
/// meanwhile.
pub fn sleep_until(deadline: u64) {
    sleep_until_or(deadline, || false);
}

/// As [`sleep_until`], and ends when an interrupt has made `woken` true.
pub fn sleep_until_or(deadline: u64, woken: impl Fn() -> bool) {
    on_interrupt(VECTOR, handle_eoi);
    set_lapic(reg::DIVIDE, 0xb);
    let by_deadline = has_tsc_deadline();
    let mode = if by_deadline { 2 << 17 } else { 0 };
    if !by_deadline {
        set_lapic(reg::LVT_TIMER, MASKED);
        tsc_per_timer_tick();
    }
    set_lapic(reg::LVT_TIMER, u32::from(VECTOR) | mode);
    loop {
        let left = deadline.saturating_sub(rdtsc());
        if left == 0 || woken() {
            break;
        }
        if by_deadline {
            // Writes to the LVT and to this MSR are not ordered in xAPIC mode (SDM §11.5.4.1).
            // SAFETY: CPUID says that the MSR exists; its vector has a handler.
            unsafe {
                asm!("mfence");
                wrmsr(TSC_DEADLINE, deadline);
            }
        } else {
            let count = (left.min(NAP) << 20) / tsc_per_timer_tick();
            set_lapic(reg::INITIAL, (count as u32).saturating_add(1));
        }
        wait_for_interrupt();
    }
    set_lapic(reg::LVT_TIMER, MASKED);
}
