//! The 8259A pair (Intel 8259A data sheet; ICH9 data sheet §13.4).

use core::sync::atomic::{AtomicU8, Ordering};
use guest_runtime::cpu::{inb, outb};
use guest_runtime::pc::init_pic;
use guest_runtime::{Frame, count, guest_test, on_interrupt};

use crate::util::{PATIENCE, wait, wait_until, wait_with_interrupts};

const MASTER: u16 = 0x20;
const SLAVE: u16 = 0xa0;

fn out(port: u16, value: u8) {
    // SAFETY: interrupt controllers and timer are the guest's own; what they raise has handlers.
    unsafe { outb(port, value) };
}

fn read(port: u16) -> u8 {
    // SAFETY: as for `out`.
    unsafe { inb(port) }
}

fn irr(chip: u16) -> u8 {
    out(chip, 0x0a);
    read(chip)
}

fn isr(chip: u16) -> u8 {
    out(chip, 0x0b);
    read(chip)
}

/// Makes an edge on IRQ 0, by channel 0 of the timer in mode 0.
fn raise_irq0() {
    for (port, value) in [(0x43, 0x30), (0x40, 100), (0x40, 0)] {
        out(port, value);
    }
    assert!(wait_until(PATIENCE, || irr(MASTER) & 1 != 0), "no edge");
}

/// Takes IRQ 0's line down again.
fn lower_irq0() {
    out(0x43, 0x30);
}

#[guest_test]
fn pic_masks_read_back() {
    for (port, other) in [(0x21, 0xa1), (0xa1, 0x21)] {
        for mask in [0x00, 0x55, 0xaa, 0xff] {
            out(other, !mask);
            out(port, mask);
            assert_eq!((read(port), read(other)), (mask, !mask));
        }
        out(0x21, 0xff);
        out(0xa1, 0xff);
    }
}

#[guest_test]
fn pic_initialization_clears_the_mask() {
    for (port, value) in [(MASTER, 0x11), (0x21, 0x20), (0x21, 4), (0x21, 1)] {
        out(port, value);
    }
    let mask = read(0x21);
    out(0x21, 0xff);
    assert_eq!(mask, 0);
}

#[guest_test]
fn pic_edge_is_latched_while_masked() {
    lower_irq0();
    init_pic(1, 0xff, 0xff);
    assert_eq!(irr(MASTER) & 1, 0);
    raise_irq0();
    assert_eq!((irr(MASTER) & 1, isr(MASTER)), (1, 0));
    lower_irq0();
}

#[guest_test]
fn pic_poll_acknowledges_the_highest() {
    lower_irq0();
    init_pic(1, 0xff, 0xff);
    out(MASTER, 0x0c);
    assert_eq!(read(MASTER) & 0x80, 0, "nothing to poll");
    // A poll with nothing to give puts nothing in service, or the spurious IRQ 7.
    out(MASTER, 0x20);
    raise_irq0();
    out(0x21, 0xfe);
    out(MASTER, 0x0c);
    assert_eq!(read(MASTER), 0x80);
    assert_eq!((irr(MASTER) & 1, isr(MASTER)), (0, 1));
    out(MASTER, 0x20);
    assert_eq!(isr(MASTER), 0);
    lower_irq0();
}

#[guest_test]
fn pic_specific_eoi_ends_only_its_own() {
    lower_irq0();
    init_pic(1, 0xfe, 0xff);
    raise_irq0();
    out(MASTER, 0x0c);
    assert_eq!(read(MASTER), 0x80);
    out(MASTER, 0x61);
    assert_eq!(isr(MASTER), 1);
    out(MASTER, 0x60);
    assert_eq!(isr(MASTER), 0);
    lower_irq0();
}

#[guest_test]
fn pic_automatic_eoi_leaves_nothing_in_service() {
    lower_irq0();
    init_pic(3, 0xfe, 0xff);
    raise_irq0();
    out(MASTER, 0x0c);
    assert_eq!(read(MASTER), 0x80);
    assert_eq!(isr(MASTER), 0);
    init_pic(1, 0xff, 0xff);
    lower_irq0();
}

static SERVICE: AtomicU8 = AtomicU8::new(0);

fn timer(_: &mut Frame) {
    SERVICE.store(isr(MASTER), Ordering::Relaxed);
    out(MASTER, 0x20);
}

#[guest_test]
fn pic_delivers_irq0_by_virtual_wire() {
    lower_irq0();
    init_pic(1, 0xfe, 0xff);
    on_interrupt(0x20, timer);
    let before = count(0x20);
    raise_irq0();
    assert_eq!(count(0x20), before, "interrupts are off");
    assert!(wait_with_interrupts(PATIENCE, || count(0x20) != before));
    assert_eq!(SERVICE.load(Ordering::Relaxed), 1);
    assert_eq!(isr(MASTER), 0);
    wait_with_interrupts(500, || false);
    assert_eq!(count(0x20), before + 1, "one edge is one interrupt");
    lower_irq0();
}

#[guest_test]
fn pic_uses_the_vectors_it_is_given() {
    lower_irq0();
    init_pic(1, 0xff, 0xff);
    for (port, value) in [
        (MASTER, 0x11),
        (0x21, 0x58),
        (0x21, 4),
        (0x21, 1),
        (0x21, 0xfe),
    ] {
        out(port, value);
    }
    on_interrupt(0x58, timer);
    let before = count(0x58);
    raise_irq0();
    assert!(wait_with_interrupts(PATIENCE, || count(0x58) != before));
    lower_irq0();
}

#[guest_test]
fn pic_holds_back_what_is_masked() {
    lower_irq0();
    init_pic(1, 0xff, 0xff);
    on_interrupt(0x20, timer);
    let before = count(0x20);
    raise_irq0();
    assert!(!wait_with_interrupts(2_000, || count(0x20) != before));
    // The latched edge comes as soon as it may.
    out(0x21, 0xfe);
    assert!(wait_with_interrupts(PATIENCE, || count(0x20) != before));
    lower_irq0();
}

#[guest_test]
fn pic_holds_back_while_one_is_in_service() {
    fn keep(_: &mut Frame) {}
    lower_irq0();
    init_pic(1, 0xfe, 0xff);
    on_interrupt(0x20, keep);
    let before = count(0x20);
    raise_irq0();
    assert!(wait_with_interrupts(PATIENCE, || count(0x20) != before));
    lower_irq0();
    raise_irq0();
    assert!(!wait_with_interrupts(2_000, || count(0x20) != before + 1));
    out(MASTER, 0x20);
    assert!(wait_with_interrupts(PATIENCE, || count(0x20) != before + 1));
    out(MASTER, 0x20);
    lower_irq0();
}

#[guest_test]
fn pic_goes_through_lint0_only_when_it_is_extint() {
    use guest_runtime::pc::{MASKED, reg, set_lapic};
    lower_irq0();
    init_pic(1, 0xfe, 0xff);
    on_interrupt(0x20, timer);
    set_lapic(reg::LVT_LINT0, 0x700 | MASKED);
    let before = count(0x20);
    raise_irq0();
    assert!(!wait_with_interrupts(2_000, || count(0x20) != before));
    set_lapic(reg::LVT_LINT0, 0x700);
    assert!(wait_with_interrupts(PATIENCE, || count(0x20) != before));
    lower_irq0();
}

#[guest_test]
fn pic_trigger_modes_read_back() {
    let kept = [read(0x4d0), read(0x4d1)];
    out(0x4d0, 0xff);
    out(0x4d1, 0xff);
    let found = [read(0x4d0), read(0x4d1)];
    out(0x4d0, kept[0]);
    out(0x4d1, kept[1]);
    // IRQs 0, 1, 2, 8 and 13 are always edges.
    assert_eq!(found, [0xf8, 0xde]);
}

#[guest_test]
fn pic_special_mask_mode_and_rotation_are_taken() {
    lower_irq0();
    init_pic(1, 0xfe, 0xff);
    // Rotation: with IRQ 0 lowest the poll still finds it as the only one.
    out(MASTER, 0xc0);
    raise_irq0();
    out(MASTER, 0x0c);
    assert_eq!(read(MASTER), 0x80);
    out(MASTER, 0xa0);
    assert_eq!(isr(MASTER), 0);
    // Special mask mode, and back; priorities as at first.
    out(MASTER, 0x68);
    out(MASTER, 0x48);
    out(MASTER, 0xc7);
    assert_eq!((irr(SLAVE), isr(SLAVE)), (irr(SLAVE), 0));
    init_pic(1, 0xff, 0xff);
    lower_irq0();
    wait(10);
}
