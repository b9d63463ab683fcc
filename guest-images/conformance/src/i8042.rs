//! The keyboard controller, as a probe sees it (IBM PS/2 reference; Linux's i8042 probe).

use crate::util::{PATIENCE, need, wait_until};
use guest_runtime::cpu::{inb, outb};
use guest_runtime::guest_test;
use guest_runtime::pc::wait_port;

fn status() -> u8 {
    // SAFETY: reading the status has no side effect.
    unsafe { inb(0x64) }
}

fn drain() {
    let empty = wait_until(PATIENCE, || {
        if status() & 1 != 0 {
            // SAFETY: the byte is unwanted.
            let _ = unsafe { inb(0x60) };
        }
        status() & 1 == 0
    });
    assert!(empty);
}

fn send(port: u16, value: u8) {
    assert!(wait_port(0x64, 2, 0, 100_000), "input buffer full");
    // SAFETY: the controller is the guest's own; the callers' commands reset nothing but it.
    unsafe { outb(port, value) };
}

fn receive() -> Option<u8> {
    // SAFETY: reading takes the byte that is there.
    wait_until(500_000, || status() & 1 != 0).then(|| unsafe { inb(0x60) })
}

fn command(value: u8) -> Option<u8> {
    drain();
    send(0x64, value);
    receive()
}

#[guest_test]
fn i8042_self_test_passes() {
    let kept = command(0x20);
    assert_eq!(command(0xaa), Some(0x55));
    send(0x64, 0x60);
    send(0x60, kept.unwrap_or(0x30));
}

#[guest_test]
fn i8042_keyboard_interface_test_passes() {
    assert_eq!(command(0xab), Some(0));
}

#[guest_test]
fn i8042_command_byte_keeps_what_is_written() {
    let Some(kept) = command(0x20) else {
        panic!("no command byte")
    };
    for value in [0x30, 0x74] {
        send(0x64, 0x60);
        send(0x60, value);
        assert_eq!(command(0x20), Some(value));
    }
    send(0x64, 0x60);
    send(0x60, kept);
}

#[guest_test]
fn i8042_status_tells_command_from_data() {
    drain();
    send(0x64, 0xab);
    assert!(wait_until(500_000, || status() & 1 != 0));
    assert_eq!(status() & 0x08, 8, "the last write was a command");
    assert_eq!(status() & 0x20, 0, "not from the auxiliary port");
    drain();
}

#[guest_test]
fn i8042_output_port_has_a20_and_no_reset() {
    let Some(port) = command(0xd0) else {
        panic!("no output port")
    };
    assert_eq!(port & 3, 3, "{port:x}");
}

#[guest_test]
fn i8042_keyboard_resets_and_identifies() {
    let kept = command(0x20);
    // No translation to set 1.
    for (port, value) in [(0x64, 0x60), (0x60, 0x30), (0x64, 0xae)] {
        send(port, value);
    }
    send(0x60, 0xff);
    let answer = receive();
    need(answer.is_some() && answer != Some(0xfe), "keyboard");
    assert_eq!(answer, Some(0xfa));
    assert_eq!(receive(), Some(0xaa));
    send(0x60, 0xf2);
    assert_eq!(
        [receive(), receive(), receive()],
        [Some(0xfa), Some(0xab), Some(0x83)]
    );
    send(0x60, 0xee);
    assert_eq!(receive(), Some(0xee));
    drain();
    send(0x64, 0x60);
    send(0x60, kept.unwrap_or(0x30));
}

#[guest_test]
fn i8042_fast_a20_gate_reads_on() {
    // SAFETY: port 92H is read only.
    let value = unsafe { inb(0x92) };
    assert_eq!(value & 3, 2, "{value:x}");
}
