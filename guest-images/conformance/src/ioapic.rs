//! The I/O APIC (82093AA data sheet). Its inputs are IRQ 0 of the timer, on pin 2, for edges, and
//! IRQ 4 of the UART for levels.

use crate::util::{PATIENCE, wait, wait_until, wait_with_interrupts};
use guest_runtime::cpu::{inb, outb};
use guest_runtime::pc::{
    MASKED, eoi, handle_eoi, ioapic, ioapic_pins, lapic, lapic_bit, reg, set_ioapic,
    set_redirection,
};
use guest_runtime::{Frame, count, guest_test, on_interrupt};

pub const PIN: u32 = 2;
pub const UART_PIN: u32 = 4;
pub const LEVEL: u32 = 1 << 15;
pub const REMOTE_IRR: u32 = 1 << 14;

fn out(port: u16, value: u8) {
    // SAFETY: timer and UART are the guest's own; what they raise has handlers.
    unsafe { outb(port, value) };
}

/// An edge on IRQ 0, some microseconds later.
pub fn edge() {
    for (port, value) in [(0x43, 0x30), (0x40, 50), (0x40, 0)] {
        out(port, value);
    }
}

/// Raises or lowers IRQ 4: the transmitter is empty, and that is enabled or not.
pub fn uart_line(on: bool) {
    assert!(wait_until(PATIENCE, || {
        // SAFETY: reading the line status takes nothing that is wanted.
        unsafe { inb(0x3fd) & 0x60 == 0x60 }
    }));
    out(0x3fc, 0xb);
    out(0x3f9, 0);
    if on {
        out(0x3f9, 2);
    }
}

fn destination() -> u32 {
    lapic(reg::ID) & 0xff00_0000
}

#[guest_test]
fn ioapic_identifies_itself() {
    let version = ioapic(1);
    assert!(matches!(version & 0xff, 0x11 | 0x20), "{version:x}");
    assert_eq!(ioapic_pins(), 24);
    set_ioapic(0, 0x0f00_0000);
    let id = ioapic(0);
    set_ioapic(0, 0);
    assert_eq!(id, 0x0f00_0000);
}

#[guest_test]
fn ioapic_redirection_keeps_what_is_written() {
    for pin in 0..ioapic_pins() {
        set_redirection(pin, MASKED | 0xaf31, 0x0300_0000);
        let found = (ioapic(0x10 + 2 * pin), ioapic(0x11 + 2 * pin));
        set_redirection(pin, MASKED, 0);
        // Delivery status and remote IRR are read-only.
        assert_eq!(found, (MASKED | 0xaf31, 0x0300_0000), "pin {pin}");
    }
}

#[guest_test]
fn ioapic_edge_is_one_interrupt() {
    on_interrupt(0x61, handle_eoi);
    let before = count(0x61);
    set_redirection(PIN, 0x61, destination());
    edge();
    assert!(wait_with_interrupts(PATIENCE, || count(0x61) == before + 1));
    wait_with_interrupts(1_000, || false);
    assert_eq!(count(0x61), before + 1);
    assert!(!lapic_bit(reg::TMR, 0x61));
}

#[guest_test]
fn ioapic_masked_pin_is_silent() {
    on_interrupt(0x61, handle_eoi);
    let before = count(0x61);
    set_redirection(PIN, MASKED | 0x61, destination());
    edge();
    assert!(!wait_with_interrupts(2_000, || count(0x61) != before));
}

#[guest_test]
fn ioapic_logical_destination() {
    on_interrupt(0x61, handle_eoi);
    guest_runtime::pc::set_lapic(reg::DFR, u32::MAX);
    guest_runtime::pc::set_lapic(reg::LDR, 0x0200_0000);
    let before = count(0x61);
    set_redirection(PIN, 0x861, 0x0300_0000);
    edge();
    assert!(wait_with_interrupts(PATIENCE, || count(0x61) == before + 1));
    // Lowest priority.
    set_redirection(PIN, 0x961, 0x0300_0000);
    edge();
    assert!(wait_with_interrupts(PATIENCE, || count(0x61) == before + 2));
    guest_runtime::pc::set_lapic(reg::LDR, 0);
}

#[guest_test]
fn ioapic_level_waits_for_eoi_and_comes_again() {
    fn keep(_: &mut Frame) {}
    uart_line(false);
    on_interrupt(0x62, keep);
    let before = count(0x62);
    set_redirection(UART_PIN, LEVEL | 0x62, destination());
    uart_line(true);
    let first = wait_with_interrupts(PATIENCE, || count(0x62) == before + 1);
    let remote = ioapic(0x10 + 2 * UART_PIN) & REMOTE_IRR;
    let tmr = lapic_bit(reg::TMR, 0x62);
    // Still high: the EOI lets it come again.
    eoi();
    let second = wait_with_interrupts(PATIENCE, || count(0x62) == before + 2);
    uart_line(false);
    eoi();
    let after = ioapic(0x10 + 2 * UART_PIN) & REMOTE_IRR;
    wait_with_interrupts(1_000, || false);
    set_redirection(UART_PIN, MASKED, 0);
    out(0x3fc, 3);
    assert!(first && second);
    assert_eq!((remote, tmr, after), (REMOTE_IRR, true, 0));
    assert_eq!(count(0x62), before + 2);
}

#[guest_test]
fn ioapic_level_that_falls_while_masked_is_forgotten() {
    uart_line(false);
    on_interrupt(0x62, handle_eoi);
    let before = count(0x62);
    set_redirection(UART_PIN, LEVEL | MASKED | 0x62, destination());
    uart_line(true);
    uart_line(false);
    set_redirection(UART_PIN, LEVEL | 0x62, destination());
    let came = wait_with_interrupts(1_000, || count(0x62) != before);
    set_redirection(UART_PIN, MASKED, 0);
    out(0x3fc, 3);
    assert!(!came);
}

#[guest_test]
fn ioapic_level_that_stays_while_masked_comes_when_unmasked() {
    uart_line(false);
    on_interrupt(0x62, |_| {
        out(0x3f9, 0);
        eoi();
    });
    let before = count(0x62);
    set_redirection(UART_PIN, LEVEL | MASKED | 0x62, destination());
    uart_line(true);
    set_ioapic(0x10 + 2 * UART_PIN, LEVEL | 0x62);
    let came = wait_with_interrupts(PATIENCE, || count(0x62) == before + 1);
    set_redirection(UART_PIN, MASKED, 0);
    out(0x3fc, 3);
    assert!(came);
}

#[guest_test]
fn ioapic_nmi_delivery() {
    fn nothing(_: &mut Frame) {}
    on_interrupt(2, nothing);
    let before = count(2);
    set_redirection(PIN, 0x400, destination());
    edge();
    let came = wait_until(PATIENCE, || count(2) == before + 1);
    set_redirection(PIN, MASKED, 0);
    assert!(came, "an NMI comes with interrupts off");
    wait(10);
}

#[guest_test]
fn ioapic_index_register_reads_back() {
    // SAFETY: the I/O APIC is the guest's own.
    unsafe {
        guest_runtime::cpu::write32(guest_runtime::pc::IOAPIC, 0x15);
        assert_eq!(
            guest_runtime::cpu::read32(guest_runtime::pc::IOAPIC) & 0xff,
            0x15
        );
    }
}
