//! The MC146818 clock and its CMOS memory (Motorola data sheet; ICH9 data sheet §13.6).

use crate::util::{
    assert_measures, need, not_in_tcg, pm_between, pm_timer, wait_until, wait_with_interrupts,
};
use guest_runtime::cpu::{inb, outb};
use guest_runtime::pc::init_pic;
use guest_runtime::{Frame, count, guest_test, on_interrupt};

const A: u8 = 0xa;
const B: u8 = 0xb;
const C: u8 = 0xc;
const D: u8 = 0xd;
const SET: u8 = 0x80;
const BINARY: u8 = 4;
const HOURS_24: u8 = 2;
const SECOND: u64 = 1_000_000;

fn read(index: u8) -> u8 {
    // SAFETY: the clock is the guest's own.
    unsafe {
        outb(0x70, index);
        inb(0x71)
    }
}

fn write(index: u8, value: u8) {
    // SAFETY: as for `read`.
    unsafe {
        outb(0x70, index);
        outb(0x71, value);
    }
}

/// No interrupts, 24 hours, BCD, 1024 Hz, running.
pub fn reset() {
    write(A, 0x26);
    write(B, HOURS_24);
    let _ = read(C);
}

fn from_bcd(value: u8) -> u8 {
    (value >> 4) * 10 + (value & 0xf)
}

/// Seconds, minutes, hours, weekday, day, month, year; not while they change.
fn time() -> [u8; 7] {
    let all = || [0, 2, 4, 6, 7, 8, 9].map(read);
    loop {
        assert!(wait_until(SECOND, || read(A) & 0x80 == 0));
        let first = all();
        if read(A) & 0x80 == 0 && all() == first {
            return first;
        }
    }
}

/// Waits for the next second to begin.
fn next_second() {
    let now = read(0);
    assert!(
        wait_until(3 * SECOND, || read(A) & 0x80 == 0 && read(0) != now),
        "the clock stands"
    );
}

#[guest_test]
fn rtc_time_is_valid_in_bcd_and_binary() {
    let (bcd, binary) = (|| {
        for _ in 0..5 {
            write(B, HOURS_24);
            let bcd = time();
            write(B, HOURS_24 | BINARY);
            let binary = time();
            if bcd[1] == binary[1] || from_bcd(bcd[1]) == binary[1] {
                return (bcd, binary);
            }
        }
        panic!("five minutes passed");
    })();
    write(B, HOURS_24);
    for value in bcd {
        assert!(value & 0xf <= 9 && value >> 4 <= 9, "{bcd:x?}");
    }
    let [second, minute, hour, weekday, day, month, year] = bcd.map(from_bcd);
    assert!(
        second < 60 && minute < 60 && hour < 24 && year < 100,
        "{bcd:x?}"
    );
    assert!((1..=7).contains(&weekday) && (1..=31).contains(&day) && (1..=12).contains(&month));
    // The chip need not convert what it holds when the mode changes.
    assert!(binary[2..] == bcd.map(from_bcd)[2..] || binary[2..] == bcd[2..]);
}

#[guest_test]
fn rtc_hours_can_be_12_with_pm() {
    let hour = time()[2];
    write(B, 0);
    let twelve = time()[2];
    write(B, HOURS_24);
    let after = time()[2];
    need(hour == after, "an hour that stays");
    let (number, pm) = (from_bcd(twelve & 0x7f), twelve & 0x80 != 0);
    assert_eq!(number % 12 + if pm { 12 } else { 0 }, from_bcd(hour));
}

#[guest_test]
fn rtc_register_d_says_valid() {
    assert_eq!(read(D), 0x80);
    write(D, 0);
    assert_eq!(read(D), 0x80);
}

#[guest_test]
fn rtc_cmos_memory_keeps_what_is_written() {
    for index in [0x40, 0x50, 0x7f] {
        let kept = read(index);
        for value in [0x55, 0xaa, 0] {
            write(index, value);
            assert_eq!(read(index), value, "byte {index:x}");
        }
        write(index, kept);
    }
}

#[guest_test]
fn rtc_seconds_pass() {
    assert_measures(
        || {
            next_second();
            let (second, pm) = (from_bcd(read(0)), pm_timer());
            next_second();
            let (later, end) = (from_bcd(read(0)), pm_timer());
            assert_eq!(later, (second + 1) % 60);
            pm_between(pm, end)
        },
        crate::util::PM_HZ,
        50,
    );
}

#[guest_test]
fn rtc_update_ends_with_its_flag() {
    let _ = read(C);
    assert!(wait_until(2 * SECOND, || read(C) & 0x10 != 0));
    assert_eq!(read(C) & 0x90, 0, "reading clears, and nothing was enabled");
}

#[guest_test]
fn rtc_update_in_progress_is_seen() {
    assert!(wait_until(6 * SECOND, || read(A) & 0x80 != 0));
    assert!(wait_until(SECOND / 10, || read(A) & 0x80 == 0));
}

#[guest_test]
fn rtc_set_stops_the_clock() {
    write(B, SET | HOURS_24);
    let kept = [0, 2, 4, 6, 7, 8, 9].map(read);
    for (index, value) in [
        (0, 0x59),
        (2, 0x59),
        (4, 0x23),
        (7, 0x28),
        (8, 2),
        (9, 0x24),
    ] {
        write(index, value);
    }
    assert_eq!(read(A) & 0x80, 0);
    assert_eq!(
        [0, 2, 4, 7, 8, 9].map(read),
        [0x59, 0x59, 0x23, 0x28, 2, 0x24]
    );
    // Runs on over the end of 28 February of a leap year.
    write(B, HOURS_24);
    let turned = wait_until(5 * SECOND, || read(A) & 0x80 == 0 && read(2) == 0);
    let after = [2, 4, 7, 8, 9].map(read);
    write(B, SET | HOURS_24);
    for (index, value) in [0, 2, 4, 6, 7, 8, 9].into_iter().zip(kept) {
        write(index, value);
    }
    write(B, HOURS_24);
    assert!(turned, "no new day");
    assert_eq!(after, [0, 0, 0x29, 2, 0x24]);
}

fn note(_: &mut Frame) {
    let _ = read(C);
    // SAFETY: ends the interrupt at both controllers.
    unsafe {
        outb(0xa0, 0x20);
        outb(0x20, 0x20);
    }
}

#[guest_test]
fn rtc_periodic_interrupt_on_irq8() {
    init_pic(1, 0xfb, 0xfe);
    on_interrupt(0x28, note);
    let before = count(0x28);
    write(A, 0x26);
    write(B, HOURS_24 | 0x40);
    let _ = read(C);
    let pm = pm_timer();
    let came = wait_with_interrupts(SECOND, || count(0x28) >= before + 20);
    let passed = pm_between(pm, pm_timer());
    write(B, HOURS_24);
    let _ = read(C);
    assert!(came, "{} of 20", count(0x28) - before);
    assert!(
        passed > crate::util::PM_HZ * 18 / 1024,
        "20 of 1024 a second in {passed} ticks"
    );
}

#[guest_test]
fn rtc_periodic_flag_without_interrupt() {
    not_in_tcg("sets it only with the interrupt");
    write(A, 0x26);
    let _ = read(C);
    assert!(wait_until(SECOND / 10, || read(C) & 0x40 != 0));
}

#[guest_test]
fn rtc_update_interrupt_on_irq8() {
    init_pic(1, 0xfb, 0xfe);
    on_interrupt(0x28, note);
    let before = count(0x28);
    let _ = read(C);
    write(B, HOURS_24 | 0x10);
    let came = wait_with_interrupts(2 * SECOND, || count(0x28) > before);
    write(B, HOURS_24);
    let _ = read(C);
    assert!(came);
}

#[guest_test]
fn rtc_alarm_every_second_with_wildcards() {
    for index in [1, 3, 5] {
        write(index, 0xff);
        assert_eq!(read(index), 0xff);
    }
    let _ = read(C);
    write(B, HOURS_24 | 0x20);
    let came = wait_until(2 * SECOND, || read(C) & 0xa0 == 0xa0);
    write(B, HOURS_24);
    let _ = read(C);
    assert!(came);
}
