//! When interrupts are taken: shadows, halts, NMIs (Intel SDM Vol. 3A §6.7, §6.8).

use crate::util::{tsc_hz, vector, wait};
use core::arch::asm;
use core::sync::atomic::{AtomicU64, Ordering};
use guest_runtime::cpu::{rdtsc, wait_for_interrupt};
use guest_runtime::pc::{MASKED, eoi, handle_eoi, lapic, lapic_bit, reg, set_lapic};
use guest_runtime::{Frame, count, guest_test, on_interrupt};

static RIP: AtomicU64 = AtomicU64::new(0);

fn note_rip(frame: &mut Frame) {
    RIP.store(frame.rip, Ordering::Relaxed);
    eoi();
}

fn pend(vector: u8) {
    set_lapic(reg::ICR_LOW, 1 << 18 | u32::from(vector));
    while !lapic_bit(reg::IRR, vector) {}
}

#[guest_test]
fn interrupt_comes_one_instruction_after_sti() {
    on_interrupt(0x71, note_rip);
    pend(0x71);
    let after: u64;
    // SAFETY: the vector has a handler.
    unsafe { asm!("lea {}, [rip + 3f]", "sti", "nop", "3:", "nop", "cli", out(reg) after) };
    assert_eq!(RIP.load(Ordering::Relaxed), after);
}

#[guest_test]
fn sti_cli_lets_nothing_through() {
    on_interrupt(0x71, note_rip);
    let before = count(0x71);
    pend(0x71);
    // SAFETY: the vector has a handler.
    unsafe { asm!("sti", "cli", "nop") };
    assert_eq!(count(0x71), before);
}

#[guest_test]
fn sti_shadow_covers_an_emulated_instruction() {
    on_interrupt(0x71, note_rip);
    pend(0x71);
    let after: u64;
    // SAFETY: the vector has a handler; CPUID's RBX is kept.
    unsafe {
        asm!("lea {after}, [rip + 3f]", "push rbx", "xor eax, eax", "sti", "cpuid", "3:", "nop", "cli", "pop rbx",
             after = out(reg) after, out("eax") _, out("ecx") _, out("edx") _);
    }
    assert_eq!(RIP.load(Ordering::Relaxed), after);
}

#[guest_test]
fn popf_opens_at_once() {
    on_interrupt(0x71, note_rip);
    pend(0x71);
    let after: u64;
    // SAFETY: the vector has a handler.
    unsafe {
        asm!("lea {}, [rip + 3f]", "pushfq", "or qword ptr [rsp], 0x200", "popfq", "3:", "nop", "cli", out(reg) after);
    }
    assert_eq!(RIP.load(Ordering::Relaxed), after);
}

#[guest_test]
fn halt_ends_with_an_interrupt_already_pending() {
    on_interrupt(0x71, handle_eoi);
    let before = count(0x71);
    pend(0x71);
    wait_for_interrupt();
    assert_eq!(count(0x71), before + 1);
}

#[guest_test]
fn halt_wakes_by_the_timer() {
    on_interrupt(0x72, handle_eoi);
    set_lapic(reg::DIVIDE, 0xb);
    set_lapic(reg::LVT_TIMER, 0x72);
    let before = count(0x72);
    for turn in 1..=5 {
        set_lapic(reg::INITIAL, 200_000);
        let start = rdtsc();
        wait_for_interrupt();
        assert_eq!(count(0x72), before + turn);
        assert!(rdtsc() - start < tsc_hz(), "a second too late");
    }
    set_lapic(reg::LVT_TIMER, MASKED);
}

#[guest_test]
fn halt_resumes_behind_itself() {
    on_interrupt(0x72, note_rip);
    set_lapic(reg::DIVIDE, 0xb);
    set_lapic(reg::LVT_TIMER, 0x72);
    set_lapic(reg::INITIAL, 500_000);
    let after: u64;
    // SAFETY: the timer ends the halt.
    unsafe { asm!("lea {}, [rip + 3f]", "sti", "hlt", "3:", "cli", out(reg) after) };
    assert_eq!(RIP.load(Ordering::Relaxed), after);
}

fn nothing(_: &mut Frame) {}

/// NMI to this CPU by its number: the self shorthand takes fixed interrupts only.
fn send_nmi() {
    set_lapic(reg::ICR_HIGH, lapic(reg::ID));
    set_lapic(reg::ICR_LOW, 0x400);
}

#[guest_test]
fn nmi_comes_with_interrupts_off() {
    on_interrupt(vector::NMI, nothing);
    let before = count(vector::NMI);
    send_nmi();
    wait(100);
    assert_eq!(count(vector::NMI), before + 1);
}

static DEPTH: AtomicU64 = AtomicU64::new(0);
static DEEPEST: AtomicU64 = AtomicU64::new(0);

fn nmi_in_nmi(_: &mut Frame) {
    let depth = DEPTH.fetch_add(1, Ordering::Relaxed) + 1;
    if DEEPEST.fetch_max(depth, Ordering::Relaxed) == 0 {
        send_nmi();
        wait(200);
        // Exits do not open it; only IRET does.
        let _ = guest_runtime::cpu::cpuid(0, 0);
    }
    DEPTH.fetch_sub(1, Ordering::Relaxed);
}

#[guest_test]
fn nmi_is_blocked_until_iret() {
    DEEPEST.store(0, Ordering::Relaxed);
    let before = count(vector::NMI);
    on_interrupt(vector::NMI, nmi_in_nmi);
    send_nmi();
    wait(1_000);
    assert_eq!(DEEPEST.load(Ordering::Relaxed), 1, "an NMI inside an NMI");
    assert_eq!(
        count(vector::NMI),
        before + 2,
        "the second comes after the first"
    );
}

#[guest_test]
fn nmi_sent_from_a_handler_comes() {
    fn from_timer(_: &mut Frame) {
        send_nmi();
        eoi();
    }
    on_interrupt(vector::NMI, nothing);
    on_interrupt(0x73, from_timer);
    set_lapic(reg::DIVIDE, 0xb);
    set_lapic(reg::LVT_TIMER, 0x73);
    let before = count(vector::NMI);
    set_lapic(reg::INITIAL, 100_000);
    wait_for_interrupt();
    wait(100);
    assert_eq!(count(vector::NMI), before + 1);
    set_lapic(reg::LVT_TIMER, MASKED);
}

#[guest_test]
fn nmi_sent_one_by_one_all_come() {
    on_interrupt(vector::NMI, nothing);
    let before = count(vector::NMI);
    for _ in 0..5 {
        send_nmi();
        wait(50);
    }
    assert_eq!(count(vector::NMI), before + 5);
}

#[guest_test]
fn software_interrupt_ignores_if_and_apic() {
    on_interrupt(0x74, nothing);
    let before = count(0x74);
    // SAFETY: the vector has a handler.
    unsafe { asm!("int 0x74") };
    assert_eq!(count(0x74), before + 1);
    assert!(!lapic_bit(reg::ISR, 0x74));
}
