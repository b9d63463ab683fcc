//! The local APIC (Intel SDM Vol. 3A chapter 11), as xAPIC and as x2APIC.

use crate::util::{
    PATIENCE, assert_gp, assert_measures, need, not_in_tcg, tsc_hz, wait, wait_until,
    wait_with_interrupts, with_tsc,
};
use core::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering};
use guest_runtime::cpu::{
    cpuid, rdmsr, rdtsc, set_cr8, try_rdmsr, try_wrmsr, wait_for_interrupt, wrmsr,
};
use guest_runtime::pc::{
    APIC_BASE, ENABLED, EXTD, MASKED, TSC_DEADLINE, eoi, handle_eoi, has_tsc_deadline, has_x2apic,
    lapic, lapic_bit, reg, set_lapic, set_x2apic, x2apic,
};
use guest_runtime::{Frame, count, guest_test, on_interrupt, with_interrupts};

const TIMER: u8 = 0x60;

/// Sends a fixed interrupt to this CPU by the self shorthand.
fn self_ipi(vector: u8) {
    set_lapic(reg::ICR_LOW, 1 << 18 | u32::from(vector));
}

fn enter_x2apic() {
    need(has_x2apic(), "x2APIC");
    set_x2apic(true);
    for (register, value) in [(reg::SVR, 0x1ff), (reg::TPR, 0), (reg::LVT_TIMER, MASKED)] {
        set_lapic(register, value);
    }
}

fn id_and_version() {
    let version = lapic(reg::VERSION);
    assert!((0x10..0x20).contains(&(version & 0xff)), "{version:x}");
    assert!(
        (3..=6).contains(&(version >> 16 & 0xff)),
        "max LVT entry, {version:x}"
    );
}

#[guest_test]
fn xapic_id_and_version() {
    assert_eq!(lapic(reg::ID) >> 24, cpuid(1, 0)[1] >> 24);
    id_and_version();
}

#[guest_test]
fn xapic_logical_destination_keeps_its_bits() {
    set_lapic(reg::LDR, 0xffff_ffff);
    let ldr = lapic(reg::LDR);
    set_lapic(reg::LDR, 0);
    assert_eq!(ldr & 0xff00_0000, 0xff00_0000);
    set_lapic(reg::DFR, 0x0fff_ffff);
    let dfr = lapic(reg::DFR);
    set_lapic(reg::DFR, 0xffff_ffff);
    assert_eq!((dfr, lapic(reg::DFR)), (0x0fff_ffff, 0xffff_ffff));
}

fn lvt_entries_keep_what_is_written() {
    let entries = [
        (reg::LVT_TIMER, 0x3_0055),
        (reg::LVT_LINT0, 0x1_a755),
        (reg::LVT_LINT1, 0x1_a755),
        (reg::LVT_ERROR, 0x1_0055),
    ];
    for (register, value) in entries {
        let kept = lapic(register);
        set_lapic(register, value);
        let found = lapic(register);
        set_lapic(register, kept);
        assert_eq!(found & !0x1000, value, "LVT at {register:x}");
    }
}

#[guest_test]
fn xapic_lvt_entries_keep_what_is_written() {
    lvt_entries_keep_what_is_written();
}

#[guest_test]
fn x2apic_lvt_entries_keep_what_is_written() {
    enter_x2apic();
    lvt_entries_keep_what_is_written();
}

#[guest_test]
fn xapic_software_disable_masks_the_lvt() {
    not_in_tcg("does not mask them all");
    set_lapic(reg::LVT_LINT1, 0x400);
    set_lapic(reg::SVR, 0xff);
    let masked = [
        reg::LVT_TIMER,
        reg::LVT_LINT0,
        reg::LVT_LINT1,
        reg::LVT_ERROR,
    ]
    .map(|register| lapic(register) & MASKED);
    set_lapic(reg::LVT_LINT0, 0x700);
    let still = lapic(reg::LVT_LINT0) & MASKED;
    set_lapic(reg::SVR, 0x1ff);
    assert_eq!(masked, [MASKED; 4]);
    assert!(still == MASKED, "unmasked while disabled");
}

fn task_priority() {
    for tpr in [0x00, 0x10, 0x7f, 0xff, 0x00] {
        set_lapic(reg::TPR, tpr);
        assert_eq!((lapic(reg::TPR), lapic(reg::PPR)), (tpr, tpr));
    }
}

#[guest_test]
fn xapic_tpr_and_ppr() {
    task_priority();
}

#[guest_test]
fn x2apic_tpr_and_ppr() {
    enter_x2apic();
    task_priority();
}

fn ipi_waits_for_if() {
    on_interrupt(0x51, handle_eoi);
    let before = count(0x51);
    self_ipi(0x51);
    assert!(wait_until(PATIENCE, || lapic_bit(reg::IRR, 0x51)));
    assert_eq!(count(0x51), before);
    assert!(wait_with_interrupts(PATIENCE, || count(0x51) == before + 1));
    assert!(!lapic_bit(reg::IRR, 0x51) && !lapic_bit(reg::ISR, 0x51));
}

#[guest_test]
fn xapic_self_ipi() {
    ipi_waits_for_if();
}

#[guest_test]
fn x2apic_self_ipi_by_icr() {
    enter_x2apic();
    ipi_waits_for_if();
}

#[guest_test]
fn xapic_ipi_by_physical_and_logical_destination() {
    on_interrupt(0x52, handle_eoi);
    let comes = |patience: u64, high: u32, low: u32| {
        let before = count(0x52);
        set_lapic(reg::ICR_HIGH, high);
        set_lapic(reg::ICR_LOW, low | 0x52);
        wait_with_interrupts(patience, || count(0x52) > before)
    };
    let came = |high, low| comes(PATIENCE, high, low);
    let stays_away = |high, low| !comes(1_000, high, low);
    assert!(came(lapic(reg::ID), 0), "physical");
    assert!(came(0xff00_0000, 0), "physical broadcast");
    assert!(stays_away(0x0e00_0000, 0), "physical, another CPU");
    set_lapic(reg::DFR, u32::MAX);
    set_lapic(reg::LDR, 0x0400_0000);
    assert!(came(0x0600_0000, 0x800), "logical");
    assert!(stays_away(0x0200_0000, 0x800), "logical, another CPU");
    assert!(came(0, 2 << 18), "all including self");
    assert!(stays_away(0, 3 << 18), "all excluding self");
    assert_eq!(lapic(reg::ICR_LOW) & 0x1000, 0, "delivery status");
    set_lapic(reg::LDR, 0);
}

#[guest_test]
fn xapic_task_priority_holds_back() {
    on_interrupt(0x53, handle_eoi);
    set_lapic(reg::TPR, 0x50);
    let before = count(0x53);
    self_ipi(0x53);
    assert!(!wait_with_interrupts(500, || count(0x53) != before));
    // A lower class lets it through; by CR8 as well as by the register.
    // SAFETY: the interrupt has a handler.
    unsafe { set_cr8(4) };
    assert!(wait_with_interrupts(PATIENCE, || count(0x53) == before + 1));
}

static ORDER: AtomicU64 = AtomicU64::new(0);

fn note_order(frame: &mut Frame) {
    ORDER.store(
        ORDER.load(Ordering::Relaxed) << 8 | frame.vector,
        Ordering::Relaxed,
    );
    eoi();
}

fn highest_first() {
    for vector in [0x45, 0x91, 0x92, 0xe0] {
        on_interrupt(vector, note_order);
    }
    ORDER.store(0, Ordering::Relaxed);
    for vector in [0x91, 0x45, 0xe0, 0x92] {
        self_ipi(vector);
    }
    assert!(wait_with_interrupts(PATIENCE, || ORDER
        .load(Ordering::Relaxed)
        >> 24
        != 0));
    assert_eq!(ORDER.load(Ordering::Relaxed), 0xe092_9145);
}

#[guest_test]
fn xapic_delivers_the_highest_first() {
    highest_first();
}

#[guest_test]
fn x2apic_delivers_the_highest_first() {
    enter_x2apic();
    highest_first();
}

static NESTED_PPR: AtomicU32 = AtomicU32::new(0);

fn nest(_: &mut Frame) {
    // In service: a lower one must wait, a higher one comes at once.
    NESTED_PPR.store(lapic(reg::PPR), Ordering::Relaxed);
    self_ipi(0x55);
    self_ipi(0x75);
    with_interrupts(|| wait(200));
    ORDER.store(ORDER.load(Ordering::Relaxed) << 8 | 0x65, Ordering::Relaxed);
    eoi();
}

#[guest_test]
fn xapic_nests_by_priority_and_eoi_ends_the_highest() {
    on_interrupt(0x55, note_order);
    on_interrupt(0x75, note_order);
    on_interrupt(0x65, nest);
    ORDER.store(0, Ordering::Relaxed);
    self_ipi(0x65);
    assert!(wait_with_interrupts(PATIENCE, || ORDER
        .load(Ordering::Relaxed)
        >> 16
        != 0));
    assert_eq!(ORDER.load(Ordering::Relaxed), 0x75_6555);
    assert_eq!(NESTED_PPR.load(Ordering::Relaxed), 0x60);
    assert_eq!(lapic(reg::PPR), 0);
}

#[guest_test]
fn xapic_in_service_until_eoi() {
    fn keep(_: &mut Frame) {}
    on_interrupt(0x54, keep);
    self_ipi(0x54);
    assert!(wait_with_interrupts(PATIENCE, || lapic_bit(reg::ISR, 0x54)));
    assert_eq!(lapic(reg::PPR), 0x50);
    eoi();
    assert!(!lapic_bit(reg::ISR, 0x54));
    assert_eq!(lapic(reg::PPR), 0);
}

#[guest_test]
fn xapic_eoi_without_interrupt_does_nothing() {
    eoi();
    assert!((0..8).all(|i| lapic(reg::ISR + 16 * i) == 0));
}

#[guest_test]
fn xapic_illegal_vector_sets_esr() {
    not_in_tcg("does not report illegal vectors");
    set_lapic(reg::ESR, 0);
    self_ipi(0x05);
    set_lapic(reg::ESR, 0);
    // Send illegal vector; or receive, or both.
    assert_ne!(lapic(reg::ESR) & 0x60, 0);
    set_lapic(reg::ESR, 0);
    assert_eq!(lapic(reg::ESR), 0);
}

#[guest_test]
fn xapic_error_interrupt() {
    not_in_tcg("does not report illegal vectors");
    on_interrupt(0x5e, handle_eoi);
    set_lapic(reg::LVT_ERROR, 0x5e);
    let before = count(0x5e);
    self_ipi(0x05);
    let came = wait_with_interrupts(PATIENCE, || count(0x5e) > before);
    set_lapic(reg::LVT_ERROR, MASKED);
    set_lapic(reg::ESR, 0);
    assert!(came);
}

fn arm(mode: u32, divide: u32, initial: u32) {
    set_lapic(reg::DIVIDE, divide);
    set_lapic(reg::LVT_TIMER, mode | u32::from(TIMER));
    set_lapic(reg::INITIAL, initial);
}

/// Timer ticks, undivided, of a second.
fn timer_hz() -> u64 {
    static HZ: AtomicU64 = AtomicU64::new(0);
    if HZ.load(Ordering::Relaxed) == 0 {
        arm(MASKED, 0xb, u32::MAX);
        let (from, start) = with_tsc(|| lapic(reg::CURRENT));
        wait(10_000);
        let (to, end) = with_tsc(|| lapic(reg::CURRENT));
        set_lapic(reg::INITIAL, 0);
        let hz = u64::from(from - to) * tsc_hz() / (end - start);
        HZ.store(hz.max(1), Ordering::Relaxed);
    }
    HZ.load(Ordering::Relaxed)
}

fn one_shot() {
    on_interrupt(TIMER, handle_eoi);
    let ticks = (timer_hz() / 1000) as u32;
    let before = count(TIMER);
    let start = rdtsc();
    arm(0, 0xb, ticks * 2);
    assert!(lapic(reg::CURRENT) <= ticks * 2);
    assert!(wait_with_interrupts(PATIENCE, || count(TIMER) > before));
    assert!(
        rdtsc() - start > tsc_hz() / 1000,
        "2 ms came in less than 1"
    );
    assert_eq!(lapic(reg::CURRENT), 0);
    wait_with_interrupts(5_000, || false);
    assert_eq!(count(TIMER), before + 1);
}

#[guest_test]
fn xapic_timer_one_shot() {
    one_shot();
}

#[guest_test]
fn x2apic_timer_one_shot() {
    enter_x2apic();
    one_shot();
}

fn periodic() {
    on_interrupt(TIMER, handle_eoi);
    let ticks = (timer_hz() / 1000) as u32;
    let before = count(TIMER);
    let start = rdtsc();
    arm(1 << 17, 0xb, ticks);
    let came = wait_with_interrupts(500_000, || count(TIMER) >= before + 20);
    let passed = rdtsc() - start;
    set_lapic(reg::INITIAL, 0);
    assert!(came, "{} of 20", count(TIMER) - before);
    assert!(passed > tsc_hz() * 18 / 1000, "20 ms in {passed} TSC ticks");
    let stopped = count(TIMER);
    wait_with_interrupts(3_000, || false);
    assert!(count(TIMER) <= stopped + 1);
}

#[guest_test]
fn xapic_timer_periodic() {
    periodic();
}

#[guest_test]
fn x2apic_timer_periodic() {
    enter_x2apic();
    periodic();
}

#[guest_test]
fn xapic_timer_divides() {
    let hz = timer_hz();
    for (code, by) in [
        (0xb, 1),
        (0, 2),
        (1, 4),
        (2, 8),
        (3, 16),
        (8, 32),
        (9, 64),
        (0xa, 128),
    ] {
        let measure = || {
            arm(MASKED, code, u32::MAX);
            let (from, start) = with_tsc(|| lapic(reg::CURRENT));
            wait(2_000);
            let (to, end) = with_tsc(|| lapic(reg::CURRENT));
            u64::from(from - to) * tsc_hz() / (end - start)
        };
        assert_measures(measure, hz / by, 60);
        assert_eq!(lapic(reg::DIVIDE), code);
    }
}

#[guest_test]
fn xapic_timer_masked_counts_in_silence() {
    on_interrupt(TIMER, handle_eoi);
    let before = count(TIMER);
    arm(MASKED, 0xb, 1000);
    wait_with_interrupts(2_000, || false);
    assert_eq!((count(TIMER), lapic_bit(reg::IRR, TIMER)), (before, false));
    assert_eq!((lapic(reg::CURRENT), lapic(reg::INITIAL)), (0, 1000));
}

#[guest_test]
fn xapic_timer_zero_stops() {
    arm(MASKED, 0xb, u32::MAX);
    assert_ne!(lapic(reg::CURRENT), 0);
    set_lapic(reg::INITIAL, 0);
    assert_eq!(lapic(reg::CURRENT), 0);
}

static WOKEN: AtomicU64 = AtomicU64::new(0);

fn stamp(_: &mut Frame) {
    WOKEN.store(rdtsc(), Ordering::Relaxed);
    eoi();
}

fn deadline() {
    need(has_tsc_deadline(), "TSC-deadline timer");
    on_interrupt(TIMER, stamp);
    set_lapic(reg::LVT_TIMER, 2 << 17 | u32::from(TIMER));
    // SAFETY: MFENCE as SDM §11.5.4.1 asks; the MSR exists, and the vector has a handler.
    unsafe {
        core::arch::asm!("mfence");
        wrmsr(TSC_DEADLINE, 1 << 62);
        assert_eq!(rdmsr(TSC_DEADLINE), 1 << 62);
        for ahead in [tsc_hz() / 1000, tsc_hz() / 200] {
            WOKEN.store(0, Ordering::Relaxed);
            let at = rdtsc() + ahead;
            wrmsr(TSC_DEADLINE, at);
            while WOKEN.load(Ordering::Relaxed) == 0 {
                wait_for_interrupt();
            }
            let woken = WOKEN.load(Ordering::Relaxed);
            assert!(woken >= at, "{} early", at - woken);
            assert_eq!(rdmsr(TSC_DEADLINE), 0, "disarmed by expiry");
        }
        // In the past: at once. Zero: never.
        let before = count(TIMER);
        wrmsr(TSC_DEADLINE, 1);
        wait_with_interrupts(PATIENCE, || count(TIMER) == before + 1);
        assert_eq!(count(TIMER), before + 1, "a deadline in the past");
        wrmsr(TSC_DEADLINE, rdtsc() + tsc_hz() / 50);
        wrmsr(TSC_DEADLINE, 0);
        assert!(!wait_with_interrupts(25_000, || count(TIMER) > before + 1));
        // The initial count means nothing in this mode.
        set_lapic(reg::INITIAL, 1000);
        assert!(!wait_with_interrupts(1_000, || count(TIMER) > before + 1));
        assert_eq!(lapic(reg::CURRENT), 0);
        set_lapic(reg::LVT_TIMER, MASKED);
        wrmsr(TSC_DEADLINE, rdtsc() + (1 << 30));
        assert_eq!(rdmsr(TSC_DEADLINE), 0, "the MSR is void in other modes");
    }
}

#[guest_test]
fn xapic_timer_tsc_deadline() {
    deadline();
}

#[guest_test]
fn x2apic_timer_tsc_deadline() {
    enter_x2apic();
    deadline();
}

#[guest_test]
fn x2apic_id_version_and_logical_id() {
    let id = lapic(reg::ID) >> 24;
    enter_x2apic();
    id_and_version();
    assert_eq!(lapic(reg::ID), id);
    assert_eq!(lapic(reg::LDR), (id >> 4) << 16 | 1 << (id & 15));
    // Derived, and so read-only.
    // SAFETY: the write faults.
    assert_gp(unsafe { try_wrmsr(x2apic(reg::LDR), 0) }.err());
}

#[guest_test]
fn x2apic_reserved_registers_are_gp() {
    enter_x2apic();
    for msr in [0x800, 0x804, 0x80e, 0x831, 0x83a, 0x840, 0x8ff] {
        assert_gp(try_rdmsr(msr).err());
        // SAFETY: the write faults.
        assert_gp(unsafe { try_wrmsr(msr, 0) }.err());
    }
    // Write-only: EOI, self IPI. Read-only: ID, version, PPR, ISR, TMR, IRR, current count.
    for register in [reg::EOI, reg::SELF_IPI] {
        assert_gp(try_rdmsr(x2apic(register)).err());
    }
    for register in [
        reg::ID,
        reg::VERSION,
        reg::PPR,
        reg::ISR,
        reg::TMR,
        reg::IRR,
        reg::CURRENT,
    ] {
        // SAFETY: the write faults.
        assert_gp(unsafe { try_wrmsr(x2apic(register), 0) }.err());
    }
}

#[guest_test]
fn x2apic_reserved_bits_are_gp() {
    enter_x2apic();
    for (register, value) in [
        (reg::EOI, 1),
        (reg::TPR, 0x100),
        (reg::TPR, 1 << 32),
        (reg::SVR, 1 << 31),
        (reg::ESR, 1),
        (reg::LVT_TIMER, 1 << 31),
        (reg::DIVIDE, 0x10),
        (reg::SELF_IPI, 0x100),
    ] {
        // SAFETY: the write faults.
        let result = unsafe { try_wrmsr(x2apic(register), value) };
        assert!(result.is_err(), "{register:x} took {value:x}");
        assert_gp(result.err());
    }
}

#[guest_test]
fn x2apic_icr_is_one_register_of_64_bits() {
    enter_x2apic();
    on_interrupt(0x56, handle_eoi);
    let before = count(0x56);
    let id = u64::from(lapic(reg::ID));
    // SAFETY: the vector has a handler.
    unsafe {
        wrmsr(x2apic(reg::ICR_LOW), id << 32 | 0x56);
        assert_eq!(rdmsr(x2apic(reg::ICR_LOW)) >> 32, id);
        assert!(wait_with_interrupts(PATIENCE, || count(0x56) == before + 1));
        // Logical: cluster and bit.
        wrmsr(
            x2apic(reg::ICR_LOW),
            u64::from(lapic(reg::LDR)) << 32 | 0x856,
        );
        assert!(wait_with_interrupts(PATIENCE, || count(0x56) == before + 2));
        wrmsr(x2apic(reg::ICR_LOW), 0xffff_ffff << 32 | 0x56);
        assert!(wait_with_interrupts(PATIENCE, || count(0x56) == before + 3));
    }
    assert_gp(try_rdmsr(x2apic(reg::ICR_HIGH)).err());
}

#[guest_test]
fn x2apic_self_ipi_register() {
    enter_x2apic();
    on_interrupt(0x57, handle_eoi);
    let before = count(0x57);
    set_lapic(reg::SELF_IPI, 0x57);
    assert!(lapic_bit(reg::IRR, 0x57));
    assert!(wait_with_interrupts(PATIENCE, || count(0x57) == before + 1));
}

#[guest_test]
fn x2apic_cr8_is_the_task_priority() {
    enter_x2apic();
    // SAFETY: interrupts are off.
    unsafe { set_cr8(9) };
    assert_eq!(lapic(reg::TPR), 0x90);
    set_lapic(reg::TPR, 0x20);
    assert_eq!(guest_runtime::cpu::cr8(), 2);
}

#[guest_test]
fn x2apic_page_is_not_the_apic() {
    enter_x2apic();
    set_lapic(reg::TPR, 0x30);
    // SAFETY: the page is mapped; in x2APIC mode nothing is behind it.
    let found = unsafe { guest_runtime::cpu::read32(guest_runtime::pc::LAPIC + 0x80) };
    assert_ne!(found, 0x30);
}

#[guest_test]
fn x2apic_msrs_need_x2apic_mode() {
    not_in_tcg("has the MSRs in xAPIC mode, if at all");
    assert_gp(try_rdmsr(x2apic(reg::VERSION)).err());
}

#[guest_test]
fn x2apic_transitions_follow_the_state_machine() {
    need(has_x2apic(), "x2APIC");
    // SAFETY: the values are those of the state machine in SDM §11.12.5, or fault.
    unsafe {
        let base = rdmsr(APIC_BASE) & !(ENABLED | EXTD);
        assert_gp(try_wrmsr(APIC_BASE, base | EXTD).err());
        wrmsr(APIC_BASE, base | ENABLED | EXTD);
        // Not straight back.
        assert_gp(try_wrmsr(APIC_BASE, base | ENABLED).err());
        assert_gp(try_wrmsr(APIC_BASE, base | EXTD).err());
        assert_ne!(cpuid(1, 0)[3] >> 9 & 1, 0);
        wrmsr(APIC_BASE, base);
        assert_eq!(
            cpuid(1, 0)[3] >> 9 & 1,
            0,
            "CPUID shows no APIC while it is disabled"
        );
        // And not from disabled to x2APIC.
        assert_gp(try_wrmsr(APIC_BASE, base | ENABLED | EXTD).err());
        wrmsr(APIC_BASE, base | ENABLED);
        assert_ne!(cpuid(1, 0)[3] >> 9 & 1, 0);
    }
}

#[guest_test]
fn xapic_state_after_being_disabled_is_that_of_reset() {
    need(has_x2apic(), "way to disable the local APIC and come back");
    set_lapic(reg::TPR, 0x30);
    // SAFETY: disabled, then xAPIC again; the next reset sets it up.
    unsafe {
        let base = rdmsr(APIC_BASE);
        wrmsr(APIC_BASE, base & !ENABLED);
        wrmsr(APIC_BASE, base);
    }
    assert_eq!((lapic(reg::TPR), lapic(reg::SVR) & 0x1ff), (0, 0xff));
    assert_eq!(lapic(reg::LVT_TIMER), MASKED);
}

static LAST: AtomicU8 = AtomicU8::new(0);

#[guest_test]
fn xapic_same_vector_twice_is_one_pending() {
    fn note(frame: &mut Frame) {
        LAST.store(frame.vector as u8, Ordering::Relaxed);
        eoi();
    }
    on_interrupt(0x58, note);
    let before = count(0x58);
    self_ipi(0x58);
    self_ipi(0x58);
    wait_with_interrupts(500, || false);
    assert_eq!(
        (count(0x58) - before, LAST.load(Ordering::Relaxed)),
        (1, 0x58)
    );
}
