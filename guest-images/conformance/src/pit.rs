//! The 8254 and port 61H (Intel 8254 data sheet; ICH9 data sheet §13.3, §13.7.1).

use crate::util::{
    PATIENCE, PIT_HZ, PM_HZ, assert_measures, not_in_tcg, pm_between, pm_timer, wait, wait_until,
};
use guest_runtime::cpu::{inb, outb};
use guest_runtime::pc::init_pic;
use guest_runtime::{Frame, count, guest_test, on_interrupt};

const CONTROL: u16 = 0x43;

fn out(port: u16, value: u8) {
    // SAFETY: the timer is the guest's own; its interrupt is masked or has a handler.
    unsafe { outb(port, value) };
}

fn read(port: u16) -> u8 {
    // SAFETY: as for `out`.
    unsafe { inb(port) }
}

/// Programs a channel, low byte then high byte.
fn program(channel: u8, mode: u8, value: u16) {
    let port = 0x40 + u16::from(channel);
    out(CONTROL, channel << 6 | 0x30 | mode << 1);
    out(port, value as u8);
    out(port, (value >> 8) as u8);
}

fn latched(channel: u8) -> u16 {
    out(CONTROL, channel << 6);
    word(channel)
}

fn word(channel: u8) -> u16 {
    let port = 0x40 + u16::from(channel);
    u16::from(read(port)) | u16::from(read(port)) << 8
}

fn status(channel: u8) -> u8 {
    out(CONTROL, 0xe0 | 2 << channel);
    read(0x40 + u16::from(channel))
}

/// Gate of channel 2, without the speaker.
fn gate(on: bool) {
    out(0x61, u8::from(on));
}

/// The output of channel 2 at port 61H.
fn output() -> bool {
    read(0x61) & 0x20 != 0
}

/// Starts channel 2 in mode 0; gives a function that starts counting, which gives one that tells
/// how many ticks have passed.
pub fn start_channel_2() -> impl FnOnce() -> fn() -> u64 {
    gate(false);
    program(2, 0, 0xffff);
    move || {
        gate(true);
        || u64::from(0xffff - latched(2))
    }
}

#[guest_test]
fn pit_runs_at_1193182_hz_by_the_pm_timer() {
    assert_measures(
        || {
            let start = start_channel_2();
            let counted = start();
            let (from, pm) = (counted(), pm_timer());
            while pm_between(pm, pm_timer()) < PM_HZ / 30 {}
            let (to, end) = (counted(), pm_timer());
            (to - from) * PM_HZ / pm_between(pm, end)
        },
        PIT_HZ,
        10,
    );
}

#[guest_test]
fn pit_mode_0_output_rises_at_zero() {
    gate(true);
    program(2, 0, 2000);
    assert!(!output(), "low from the control word on");
    assert!(wait_until(PATIENCE, output));
    // And stays, while the count goes on from FFFFH.
    wait(300);
    assert!(output() && latched(2) > 2000);
}

#[guest_test]
fn pit_gate_stops_mode_0() {
    not_in_tcg("counts on without the gate");
    gate(true);
    program(2, 0, 0xfff0);
    wait(100);
    gate(false);
    let stopped = latched(2);
    wait(200);
    assert_eq!(latched(2), stopped);
    gate(true);
    wait(200);
    assert!(latched(2) < stopped);
}

#[guest_test]
fn pit_mode_1_waits_for_the_gate() {
    not_in_tcg("inverts it");
    gate(false);
    program(2, 1, 1000);
    wait(100);
    assert!(output(), "high until the trigger");
    gate(true);
    assert!(!output());
    assert!(wait_until(PATIENCE, output));
    gate(false);
    gate(true);
    assert!(!output(), "triggered again");
}

#[guest_test]
fn pit_mode_2_counts_round() {
    gate(true);
    program(2, 2, 1000);
    let mut wraps = 0;
    let mut last = latched(2);
    wait_until(PATIENCE, || {
        let now = latched(2);
        assert!((1..=1000).contains(&now), "{now}");
        wraps += u32::from(now > last);
        last = now;
        wraps > 3
    });
    assert!(wraps > 3);
    assert_eq!(status(2) & 0x3f, 0x34);
}

#[guest_test]
fn pit_gate_restarts_mode_2() {
    not_in_tcg("has no output for a low gate");
    gate(true);
    program(2, 2, 0xffff);
    wait(2_000);
    let before = latched(2);
    gate(false);
    assert!(output(), "high while the gate is low");
    gate(true);
    assert!(latched(2) > before);
}

#[guest_test]
fn pit_mode_3_is_a_square_wave() {
    gate(true);
    program(2, 3, 2000);
    let (mut high, mut low, mut edges) = (0u32, 0u32, 0u32);
    let mut last = output();
    wait_until(300_000, || {
        let now = output();
        if now {
            high += 1
        } else {
            low += 1
        }
        edges += u32::from(now != last);
        last = now;
        edges > 12
    });
    assert!(edges > 12, "{edges} edges");
    assert!(high > low / 3 && low > high / 3, "{high} high, {low} low");
    for _ in 0..20 {
        let now = latched(2);
        assert!(
            now.is_multiple_of(2) && now <= 2000,
            "counts by twos: {now}"
        );
    }
}

#[guest_test]
fn pit_mode_4_output_is_high_but_for_a_strobe() {
    not_in_tcg("inverts it");
    gate(true);
    program(2, 4, 1000);
    assert!(output());
    wait(2_000);
    assert!(output());
    assert!(latched(2) > 1000, "counts on from FFFFH");
    assert_eq!(status(2) & 0x3f, 0x38);
}

#[guest_test]
fn pit_mode_5_waits_for_the_gate() {
    gate(false);
    program(2, 5, 0xf000);
    wait(100);
    gate(true);
    wait(500);
    let now = latched(2);
    assert!(now < 0xf000, "{now}");
    gate(false);
    wait(100);
    assert!(latched(2) < now, "the gate's level does not stop it");
}

#[guest_test]
fn pit_latch_holds_until_read() {
    gate(true);
    program(2, 2, 0xffff);
    wait(100);
    out(CONTROL, 0x80);
    wait(200);
    // A second latch command before the read is ignored.
    out(CONTROL, 0x80);
    let held = word(2);
    let later = word(2);
    assert!(held > later && held - later > 100, "{held} {later}");
}

#[guest_test]
fn pit_read_back_latches_status_and_count() {
    gate(true);
    program(2, 2, 0xffff);
    wait(100);
    out(CONTROL, 0xc8);
    wait(200);
    let status = read(0x42);
    let held = word(2);
    let later = latched(2);
    assert_eq!(status & 0x3f, 0x34);
    assert_eq!(status & 0x40, 0, "the count is loaded");
    assert!(held > later, "{held} {later}");
}

#[guest_test]
fn pit_status_tells_access_mode() {
    gate(true);
    for (command, wanted) in [(0x90, 0x10), (0xa0, 0x20), (0xb0, 0x30), (0xb5, 0x35)] {
        out(CONTROL, command);
        out(0x42, 0x20);
        if command & 0x30 == 0x30 {
            out(0x42, 0);
        }
        assert_eq!(status(2) & 0x3f, wanted);
    }
}

#[guest_test]
fn pit_null_count_until_loaded() {
    not_in_tcg("has no null count");
    gate(true);
    out(CONTROL, 0xb4);
    assert_eq!(status(2) & 0x40, 0x40);
    out(0x42, 0xff);
    out(0x42, 0xff);
    assert!(wait_until(PATIENCE, || status(2) & 0x40 == 0));
}

#[guest_test]
fn pit_single_byte_access() {
    gate(false);
    out(CONTROL, 0xa0);
    out(0x42, 0x12);
    gate(true);
    gate(false);
    out(CONTROL, 0x80);
    let high = read(0x42);
    assert!(high == 0x12 || high == 0x11, "{high:x}");
}

#[guest_test]
fn pit_counts_in_bcd() {
    not_in_tcg("counts in binary");
    gate(true);
    out(CONTROL, 0xb5);
    out(0x42, 0x00);
    out(0x42, 0x30);
    for _ in 0..50 {
        let now = latched(2);
        for digit in 0..4 {
            assert!(now >> (4 * digit) & 0xf <= 9, "{now:x}");
        }
        assert!(now <= 0x3000);
    }
}

#[guest_test]
fn pit_port_61_keeps_its_bits_and_toggles_refresh() {
    for value in 0..4 {
        out(0x61, value);
        assert_eq!(read(0x61) & 3, value);
    }
    out(0x61, 0);
    let first = read(0x61) & 0x10;
    assert!(wait_until(PATIENCE, || read(0x61) & 0x10 != first));
    assert!(wait_until(PATIENCE, || read(0x61) & 0x10 == first));
}

#[guest_test]
fn pit_channel_0_interrupts_periodically() {
    fn tick(_: &mut Frame) {
        out(0x20, 0x20);
    }
    init_pic(1, 0xfe, 0xff);
    on_interrupt(0x20, tick);
    program(0, 2, 1193);
    let before = count(0x20);
    let pm = pm_timer();
    let came = crate::util::wait_with_interrupts(PATIENCE, || count(0x20) >= before + 30);
    let ticks = pm_between(pm, pm_timer()) * 1000 / PM_HZ;
    program(0, 0, 1);
    assert!(came, "{} of 30", count(0x20) - before);
    assert!(ticks >= 28, "30 ticks of a millisecond in {ticks} ms");
}
