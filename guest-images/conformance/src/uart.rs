//! The 16550A (PC16550D data sheet). COM1 is also the console: nothing is printed in between, and
//! loopback keeps what is sent inside.

use crate::util::{PATIENCE, wait, wait_until, wait_with_interrupts};
use guest_runtime::cpu::{inb, outb};
use guest_runtime::pc::init_pic;
use guest_runtime::{Frame, count, guest_test, on_interrupt};

const BASE: u16 = 0x3f8;
const DATA: u16 = 0;
const IER: u16 = 1;
const IIR: u16 = 2;
const FCR: u16 = 2;
const LCR: u16 = 3;
const MCR: u16 = 4;
const LSR: u16 = 5;
const MSR: u16 = 6;
const SCRATCH: u16 = 7;
const LOOP: u8 = 0x10;

fn out(register: u16, value: u8) {
    // SAFETY: COM1 is the guest's own; its interrupt is masked or has a handler.
    unsafe { outb(BASE + register, value) };
}

fn read(register: u16) -> u8 {
    // SAFETY: as for `out`.
    unsafe { inb(BASE + register) }
}

/// Loopback with empty FIFOs, once everything has been sent.
fn loop_back(fcr: u8) {
    assert!(wait_until(PATIENCE, || read(LSR) & 0x60 == 0x60));
    out(IER, 0);
    out(MCR, LOOP | 8);
    out(FCR, fcr | 6);
    while read(LSR) & 1 != 0 {
        let _ = read(DATA);
    }
    let _ = (read(IIR), read(LSR), read(MSR));
}

/// Back to a console. A failed check comes here by the next case's reset.
fn console() {
    out(IER, 0);
    out(MCR, 3);
    out(FCR, 7);
}

/// Sends a byte around.
fn send(value: u8) {
    assert!(wait_until(PATIENCE, || read(LSR) & 0x20 != 0));
    out(DATA, value);
}

#[guest_test]
fn uart_scratch_keeps_what_is_written() {
    for value in [0, 0x55, 0xaa, 0xff] {
        out(SCRATCH, value);
        assert_eq!(read(SCRATCH), value);
    }
}

#[guest_test]
fn uart_divisor_is_behind_dlab() {
    out(LCR, 0x83);
    let kept = (read(DATA), read(IER));
    out(DATA, 0x34);
    out(IER, 0x12);
    let found = (read(DATA), read(IER));
    out(DATA, kept.0);
    out(IER, kept.1);
    out(LCR, 3);
    assert_eq!(found, (0x34, 0x12));
    assert_eq!(read(IER), 0);
}

#[guest_test]
fn uart_upper_bits_read_as_zero() {
    out(IER, 0xf0);
    let ier = read(IER);
    out(MCR, 0xe3);
    let mcr = read(MCR);
    console();
    assert_eq!(ier & 0xf0, 0);
    assert_eq!(mcr & 0xc0, 0);
}

#[guest_test]
fn uart_fifo_enable_shows_in_iir() {
    out(FCR, 1);
    assert_eq!(read(IIR) & 0xcf, 0xc1);
    out(FCR, 0);
    assert_eq!(read(IIR) & 0xcf, 0x01);
    console();
}

#[guest_test]
fn uart_loopback_returns_data() {
    loop_back(1);
    for value in [0x00, 0x5a, 0xa5, 0xff] {
        send(value);
        assert!(wait_until(PATIENCE, || read(LSR) & 1 != 0));
        assert_eq!(read(DATA), value);
        assert_eq!(read(LSR) & 1, 0);
    }
    console();
}

#[guest_test]
fn uart_loopback_joins_the_modem_lines() {
    loop_back(1);
    // DTR to DSR, RTS to CTS, OUT1 to RI, OUT2 to DCD.
    for (mcr, msr) in [
        (0, 0),
        (1, 0x20),
        (2, 0x10),
        (4, 0x40),
        (8, 0x80),
        (15, 0xf0),
    ] {
        out(MCR, LOOP | mcr);
        assert_eq!(read(MSR) & 0xf0, msr, "MCR {mcr:x}");
    }
    console();
}

#[guest_test]
fn uart_modem_changes_are_latched_until_read() {
    crate::util::not_in_tcg("has no delta bits in loopback");
    loop_back(1);
    out(MCR, LOOP);
    let _ = read(MSR);
    out(MCR, LOOP | 2);
    let (first, second) = (read(MSR), read(MSR));
    console();
    assert_eq!((first & 0xf, second & 0xf), (1, 0));
}

#[guest_test]
fn uart_fifo_holds_sixteen() {
    loop_back(1);
    for value in 0..16 {
        send(value);
        wait(200);
    }
    for value in 0..16 {
        assert!(wait_until(PATIENCE, || read(LSR) & 1 != 0), "byte {value}");
        assert_eq!(read(LSR) & 2, 0);
        assert_eq!(read(DATA), value);
    }
    assert_eq!(read(LSR) & 1, 0);
    console();
}

#[guest_test]
fn uart_seventeenth_byte_is_an_overrun() {
    loop_back(1);
    for value in 0..17 {
        send(value);
        wait(200);
    }
    assert!(wait_until(PATIENCE, || read(LSR) & 0x40 != 0));
    let first = read(LSR);
    // The status read may have taken the flag above.
    let _ = first;
    for value in 0..16 {
        assert_eq!(read(DATA), value);
    }
    assert_eq!(read(LSR) & 1, 0);
    console();
}

#[guest_test]
fn uart_overrun_without_fifo_is_flagged_once() {
    loop_back(0);
    out(FCR, 0);
    send(1);
    wait(500);
    out(DATA, 2);
    wait(500);
    let (first, second) = (read(LSR), read(LSR));
    let byte = read(DATA);
    console();
    assert_eq!((first & 3, second & 3), (3, 1));
    assert_eq!(byte, 2, "the newer byte is kept");
}

#[guest_test]
fn uart_fifo_reset_empties() {
    loop_back(1);
    send(1);
    send(2);
    assert!(wait_until(PATIENCE, || read(LSR) & 1 != 0));
    wait(500);
    out(FCR, 3);
    assert_eq!(read(LSR) & 1, 0);
    console();
}

#[guest_test]
fn uart_trigger_level_interrupts() {
    loop_back(0x41);
    out(IER, 1);
    for value in 0..3 {
        send(value);
        assert_ne!(read(IIR) & 0xf, 4, "below the level of four");
    }
    send(3);
    assert!(wait_until(PATIENCE, || read(IIR) & 0xf == 4));
    let _ = read(DATA);
    assert_ne!(read(IIR) & 0xf, 4);
    console();
}

#[guest_test]
fn uart_timeout_interrupts() {
    loop_back(0x81);
    out(IER, 1);
    send(7);
    assert!(wait_until(PATIENCE, || read(IIR) & 0xf == 0xc));
    assert_eq!(read(DATA), 7);
    assert_eq!(read(IIR) & 1, 1);
    console();
}

#[guest_test]
fn uart_empty_transmitter_interrupts_and_reading_iir_clears() {
    loop_back(1);
    out(IER, 2);
    let (first, second) = (read(IIR) & 0xf, read(IIR) & 0xf);
    out(IER, 0);
    out(IER, 2);
    let again = read(IIR) & 0xf;
    console();
    assert_eq!((first, second, again), (2, 1, 2));
}

#[guest_test]
fn uart_line_status_interrupt_comes_first() {
    loop_back(0);
    out(FCR, 0);
    out(IER, 7);
    send(1);
    wait(500);
    out(DATA, 2);
    wait(500);
    let first = read(IIR) & 0xf;
    let _ = read(LSR);
    let second = read(IIR) & 0xf;
    let _ = read(DATA);
    console();
    assert_eq!((first, second), (6, 4));
}

#[guest_test]
fn uart_interrupts_on_irq4() {
    fn empty(_: &mut Frame) {
        let _ = read(IIR);
        // SAFETY: ends the interrupt.
        unsafe { outb(0x20, 0x20) };
    }
    assert!(wait_until(PATIENCE, || read(LSR) & 0x60 == 0x60));
    init_pic(1, 0xef, 0xff);
    on_interrupt(0x24, empty);
    let before = count(0x24);
    out(MCR, 0xb);
    out(IER, 2);
    let came = wait_with_interrupts(PATIENCE, || count(0x24) > before);
    wait_with_interrupts(500, || false);
    out(IER, 0);
    console();
    assert!(came);
    assert_eq!(count(0x24), before + 1, "reading IIR ends it");
}
