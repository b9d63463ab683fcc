//! The MC146818 real-time clock with its battery-backed memory (Motorola MC146818 datasheet; the
//! second bank and the index ports as in Intel ICH, 82801 datasheet §13.6).
//!
//! The calendar is a count of seconds that the registers are worked out from when they are read,
//! in the format register B asks for at that time. While SET holds the clock the registers are
//! plain bytes; releasing SET makes a time of them, out-of-range values carrying over into the next
//! higher unit. The century lives at index 0x32, as the ACPI FADT says.
//!
//! An update ends at a whole second; UIP is up for the 2 228 µs before (244 µs of warning and
//! 1 984 µs of update with a 32 768 Hz crystal). DSE is kept without effect, as in PC chipsets.

use alloc::{vec, vec::Vec};

use arch::Nanos;
use serde::{Deserialize, Serialize};

use crate::ticks;

const SECOND: u64 = 1_000_000_000;
const DAY: i64 = 86_400;
/// The crystal; the periodic rates are its divisions.
const CRYSTAL: u64 = 32_768;
/// How long before a second's end UIP rises, in nanoseconds.
const UPDATE: u64 = 2_228_000;

const SECONDS: usize = 0x00;
const SECONDS_ALARM: usize = 0x01;
const MINUTES: usize = 0x02;
const MINUTES_ALARM: usize = 0x03;
const HOURS: usize = 0x04;
const HOURS_ALARM: usize = 0x05;
const DAY_OF_WEEK: usize = 0x06;
const DAY_OF_MONTH: usize = 0x07;
const MONTH: usize = 0x08;
const YEAR: usize = 0x09;
const A: usize = 0x0a;
const B: usize = 0x0b;
const C: usize = 0x0c;
const D: usize = 0x0d;
const CENTURY: usize = 0x32;

const UIP: u8 = 0x80;

const SET: u8 = 0x80;
const PERIODIC: u8 = 0x40;
const ALARM: u8 = 0x20;
const UPDATE_ENDED: u8 = 0x10;
const BINARY: u8 = 0x04;
const HOURS_24: u8 = 0x02;

const IRQF: u8 = 0x80;
const AFTERNOON: u8 = 0x80;

/// Clock, memory and index ports 0x70 to 0x73.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Rtc {
    /// 128 bytes of the standard bank (time, registers A to D, memory), 128 of the extended one.
    /// The time's bytes hold it only while it is stopped; C and D's are not used.
    memory: Vec<u8>,
    index: u8,
    extended_index: u8,
    nmi_masked: bool,
    /// Register C without IRQF.
    flags: u8,
    /// Seconds since 1970 on this clock, as of the last update.
    seconds: i64,
    /// Days that the guest's day of the week is ahead of the calendar's.
    weekday_ahead: u8,
    /// When the current second ends.
    second_end: Nanos,
    /// When the divider chain started, and how many crystal ticks of it are seen.
    divider_start: Nanos,
    ticks_seen: u64,
}

impl Rtc {
    /// A clock that shows `wall_clock` (nanoseconds since 1970, UTC) at power-on, with `low_ram` and
    /// `high_ram` bytes of memory below and above 4 GiB in the usual bytes.
    #[must_use]
    pub fn new(wall_clock: u64, low_ram: u64, high_ram: u64) -> Self {
        let mut rtc = Self {
            memory: vec![0; 256],
            index: 0,
            extended_index: 0,
            nmi_masked: false,
            flags: 0,
            seconds: (wall_clock / SECOND).cast_signed(),
            weekday_ahead: 0,
            second_end: Nanos(SECOND - wall_clock % SECOND),
            divider_start: Nanos::ZERO,
            ticks_seen: 0,
        };
        rtc.memory[A] = 0x26;
        rtc.memory[B] = HOURS_24;
        let kib = |bytes: u64, from: u64, unit: u64, most: u64| {
            (bytes.saturating_sub(from) / unit).min(most).to_le_bytes()
        };
        let mut put =
            |at: usize, bytes: &[u8]| rtc.memory[at..at + bytes.len()].copy_from_slice(bytes);
        // Equipment: a coprocessor. Base memory, extended memory in KiB, memory above 16 MiB and
        // above 4 GiB in units of 64 KiB.
        put(0x14, &[0x02]);
        put(0x15, &kib(low_ram, 0, 1 << 10, 640)[..2]);
        let extended = kib(low_ram, 1 << 20, 1 << 10, 0xffff);
        put(0x17, &extended[..2]);
        put(0x30, &extended[..2]);
        put(0x34, &kib(low_ram, 16 << 20, 64 << 10, 0xffff)[..2]);
        put(0x5b, &kib(high_ram, 0, 64 << 10, 0xff_ffff)[..3]);
        let sum: u16 = rtc.memory[0x10..0x2e]
            .iter()
            .map(|&byte| u16::from(byte))
            .sum();
        rtc.memory[0x2e..0x30].copy_from_slice(&sum.to_be_bytes());
        rtc
    }

    /// The RESET pin: interrupts off and flags clear; time and memory stay.
    pub fn reset(&mut self, now: Nanos) {
        self.advance(now);
        self.memory[B] &= !(PERIODIC | ALARM | UPDATE_ENDED | 0x08);
        self.flags = 0;
        self.nmi_masked = false;
    }

    /// Whether the guest masked NMIs (port 0x70 bit 7).
    #[must_use]
    pub const fn nmi_masked(&self) -> bool {
        self.nmi_masked
    }

    /// Reads 0x70 to 0x73. The index ports cannot be read.
    pub fn read(&mut self, port: u16, now: Nanos) -> u8 {
        match port {
            0x71 => self.read_register(usize::from(self.index), now),
            0x73 => self.byte(usize::from(self.extended_index) | 0x80),
            _ => 0xff,
        }
    }

    /// Writes 0x70 to 0x73.
    pub fn write(&mut self, port: u16, value: u8, now: Nanos) {
        match port {
            0x70 => {
                self.index = value & 0x7f;
                self.nmi_masked = value & 0x80 != 0;
            }
            0x71 => self.write_register(usize::from(self.index), value, now),
            0x72 => self.extended_index = value & 0x7f,
            _ => self.set_byte(usize::from(self.extended_index) | 0x80, value),
        }
    }

    /// Works out what happened up to now.
    pub fn tick(&mut self, now: Nanos) {
        self.advance(now);
    }

    /// The interrupt output, ISA interrupt 8.
    #[must_use]
    pub fn irq(&self) -> bool {
        self.flags & self.byte(B) & (PERIODIC | ALARM | UPDATE_ENDED) != 0
    }

    /// Whether the alarm is among the causes of the interrupt.
    #[must_use]
    pub fn alarm(&self) -> bool {
        self.flags & self.byte(B) & ALARM != 0
    }

    /// When an interrupt that the guest asked for comes next.
    #[must_use]
    pub fn next_event(&self) -> Nanos {
        let wanted = self.byte(B) & !self.flags;
        let mut next = Nanos::NEVER;
        if wanted & PERIODIC != 0
            && let Some(period) = self.period()
        {
            let tick = (self.ticks_seen / period + 1) * period;
            next = self.divider_start + ticks::time_of::<CRYSTAL>(tick).0;
        }
        if self.updating() {
            if wanted & UPDATE_ENDED != 0 {
                next = next.min(self.second_end);
            }
            if wanted & ALARM != 0
                && let Some(seconds) = self.until_alarm()
            {
                next = next.min(self.second_end + (seconds - 1) * SECOND);
            }
        }
        next
    }

    fn byte(&self, index: usize) -> u8 {
        self.memory.get(index).copied().unwrap_or(0xff)
    }

    fn set_byte(&mut self, index: usize, value: u8) {
        if let Some(byte) = self.memory.get_mut(index) {
            *byte = value;
        }
    }

    /// The divider chain runs (DV: the three crystals; the rest holds it in reset).
    fn dividing(&self) -> bool {
        self.byte(A) & 0x70 <= 0x20
    }

    fn updating(&self) -> bool {
        self.dividing() && self.byte(B) & SET == 0
    }

    /// The periodic rate in ticks of the crystal (RS; table 5 of the datasheet).
    fn period(&self) -> Option<u64> {
        match self.byte(A) & 15 {
            _ if !self.dividing() => None,
            0 => None,
            rate @ (1 | 2) => Some(64 << rate),
            rate => Some(1 << (rate - 1)),
        }
    }

    fn advance(&mut self, now: Nanos) {
        if !self.dividing() {
            return;
        }
        let ticks = ticks::ticks::<CRYSTAL>(Nanos(now.since(self.divider_start)));
        if let Some(period) = self.period()
            && ticks / period > self.ticks_seen / period
        {
            self.flags |= PERIODIC;
        }
        self.ticks_seen = self.ticks_seen.max(ticks);
        if now < self.second_end {
            return;
        }
        let updates = now.since(self.second_end) / SECOND + 1;
        self.second_end = self.second_end + updates * SECOND;
        if self.byte(B) & SET == 0 {
            if self.until_alarm().is_some_and(|seconds| seconds <= updates) {
                self.flags |= ALARM;
            }
            self.flags |= UPDATE_ENDED;
            self.seconds = self.seconds.saturating_add_unsigned(updates);
        }
    }

    fn read_register(&mut self, index: usize, now: Nanos) -> u8 {
        self.advance(now);
        match index {
            SECONDS | MINUTES | HOURS | DAY_OF_WEEK..=YEAR | CENTURY if !self.is_set() => {
                self.time_byte(index)
            }
            A => {
                let uip = self.updating() && self.second_end.since(now) <= UPDATE;
                self.byte(A) & !UIP | if uip { UIP } else { 0 }
            }
            C => {
                let irqf = if self.irq() { IRQF } else { 0 };
                core::mem::take(&mut self.flags) | irqf
            }
            // Valid RAM and time: the battery is good.
            D => 0x80,
            _ => self.byte(index),
        }
    }

    /// The time is in plain bytes, and not in `seconds`.
    fn is_set(&self) -> bool {
        self.byte(B) & SET != 0
    }

    fn write_register(&mut self, index: usize, value: u8, now: Nanos) {
        self.advance(now);
        match index {
            SECONDS | MINUTES | HOURS | DAY_OF_WEEK..=YEAR | CENTURY => {
                if !self.is_set() {
                    self.stop();
                    self.set_byte(index, value);
                    self.start();
                } else {
                    self.set_byte(index, value);
                }
            }
            A => {
                let divided = self.dividing();
                self.set_byte(A, value & !UIP);
                if !divided && self.dividing() {
                    // The first update comes half a second after the chain is released.
                    self.divider_start = now;
                    self.ticks_seen = 0;
                    self.second_end = now + SECOND / 2;
                }
            }
            B => {
                let was_set = self.is_set();
                let set = value & SET != 0;
                if set && !was_set {
                    self.stop();
                }
                // SET clears the enable of update-ended interrupts.
                self.set_byte(B, if set { value & !UPDATE_ENDED } else { value });
                if was_set && !set {
                    self.start();
                }
            }
            C | D => {}
            _ => self.set_byte(index, value),
        }
    }

    fn encode(&self, value: u8) -> u8 {
        if self.byte(B) & BINARY != 0 {
            value
        } else {
            ((value / 10 % 10) << 4) + value % 10
        }
    }

    fn decode(&self, value: u8) -> u8 {
        if self.byte(B) & BINARY != 0 {
            value
        } else {
            (value >> 4) * 10 + (value & 15)
        }
    }

    fn encode_hour(&self, hour: u8) -> u8 {
        if self.byte(B) & HOURS_24 != 0 {
            return self.encode(hour);
        }
        let twelve = (hour + 11) % 12 + 1;
        self.encode(twelve) | if hour >= 12 { AFTERNOON } else { 0 }
    }

    fn decode_hour(&self, value: u8) -> u8 {
        if self.byte(B) & HOURS_24 != 0 {
            return self.decode(value);
        }
        let afternoon = if value & AFTERNOON != 0 { 12 } else { 0 };
        self.decode(value & !AFTERNOON) % 12 + afternoon
    }

    fn second_of_day(&self) -> u32 {
        self.seconds.rem_euclid(DAY) as u32
    }

    /// One byte of the time in the guest's format.
    fn time_byte(&self, index: usize) -> u8 {
        let time = self.second_of_day();
        let days = self.seconds.div_euclid(DAY);
        match index {
            SECONDS => return self.encode((time % 60) as u8),
            MINUTES => return self.encode((time / 60 % 60) as u8),
            HOURS => return self.encode_hour((time / 3600) as u8),
            DAY_OF_WEEK => {
                // 1970-01-01 was a Thursday; Sunday is 1.
                let day = (days + 4 + i64::from(self.weekday_ahead)).rem_euclid(7);
                return self.encode(day as u8 + 1);
            }
            _ => {}
        }
        let (year, month, day) = date_of(days);
        self.encode(match index {
            DAY_OF_MONTH => day,
            MONTH => month,
            YEAR => year.rem_euclid(100) as u8,
            _ => year.div_euclid(100).rem_euclid(100) as u8,
        })
    }

    /// Puts the time into its bytes.
    fn stop(&mut self) {
        for index in [
            SECONDS,
            MINUTES,
            HOURS,
            DAY_OF_WEEK,
            DAY_OF_MONTH,
            MONTH,
            YEAR,
            CENTURY,
        ] {
            let byte = self.time_byte(index);
            self.set_byte(index, byte);
        }
    }

    /// Makes a time of the bytes.
    fn start(&mut self) {
        let get = |index| i64::from(self.decode(self.byte(index)));
        let year = get(CENTURY) * 100 + get(YEAR);
        let days = days_of(year, get(MONTH), get(DAY_OF_MONTH));
        let hour = i64::from(self.decode_hour(self.byte(HOURS)));
        let seconds = days * DAY + hour * 3600 + get(MINUTES) * 60 + get(SECONDS);
        let weekday = get(DAY_OF_WEEK) - 1;
        self.seconds = seconds;
        let days = seconds.div_euclid(DAY);
        self.weekday_ahead = (weekday - (days + 4)).rem_euclid(7) as u8;
    }

    /// Seconds until the alarm's next match, at least 1; `None` if it never matches.
    fn until_alarm(&self) -> Option<u64> {
        let field = |index: usize, limit: u32, hour: bool| match self.byte(index) {
            // The two top bits set: any value matches. (An hour of 12-hour format with PM has one.)
            value if value >= 0xc0 => Some(None),
            value => {
                let decoded = if hour {
                    self.decode_hour(value)
                } else {
                    self.decode(value)
                };
                let again = if hour {
                    self.encode_hour(decoded % 24)
                } else {
                    self.encode(decoded)
                };
                (u32::from(decoded) < limit && again == value).then_some(Some(u32::from(decoded)))
            }
        };
        let hour = field(HOURS_ALARM, 24, true)?;
        let minute = field(MINUTES_ALARM, 60, false)?;
        let second = field(SECONDS_ALARM, 60, false)?;
        let matches = |wanted: Option<u32>, value: u32| wanted.is_none_or(|wanted| wanted == value);

        let start = self.second_of_day() + 1;
        let mut time = start;
        // Skips hours, then minutes, then seconds: at most 24 + 60 + 60 steps and one day's wrap.
        loop {
            if time > start + 2 * DAY as u32 {
                return None;
            }
            if !matches(hour, time / 3600 % 24) {
                time = (time / 3600 + 1) * 3600;
            } else if !matches(minute, time / 60 % 60) {
                time = (time / 60 + 1) * 60;
            } else if !matches(second, time % 60) {
                time += 1;
            } else {
                return Some(u64::from(time - start + 1));
            }
        }
    }
}

/// Days from 1970-01-01 to a date of the Gregorian calendar; months and days out of range carry.
fn days_of(year: i64, month: i64, day: i64) -> i64 {
    // Years that start in March put the leap day at the end.
    let months = year * 12 + month - 3;
    let (year, month) = (months.div_euclid(12), months.rem_euclid(12));
    let leaps = year.div_euclid(4) - year.div_euclid(100) + year.div_euclid(400);
    year * 365 + leaps + (month * 153 + 2) / 5 + day - 1 - 719_468
}

/// The date `days` after 1970-01-01: year, month (1 to 12), day (1 to 31).
fn date_of(days: i64) -> (i64, u8, u8) {
    // Within a 400-year cycle that starts in March: leap days come every 1461 days but not every
    // 36 524, and the cycle's own at its very end.
    let (cycle, day) = (
        (days + 719_468).div_euclid(146_097),
        (days + 719_468).rem_euclid(146_097),
    );
    let year = (day - day / 1_460 + day / 36_524 - day / 146_096) / 365;
    let day_of_year = day - (year * 365 + year / 4 - year / 100);
    let year = year + cycle * 400;
    let month = (day_of_year * 5 + 2) / 153;
    let day = day_of_year - (month * 153 + 2) / 5 + 1;
    let (year, month) = if month >= 10 {
        (year + 1, month - 9)
    } else {
        (year, month + 3)
    };
    (year, month as u8, day as u8)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 2024-02-28 23:59:58.5 UTC, a Wednesday.
    const LEAP: u64 = 1_709_164_798_500_000_000;

    fn get(rtc: &mut Rtc, index: u8, now: u64) -> u8 {
        rtc.write(0x70, index, Nanos(now));
        rtc.read(0x71, Nanos(now))
    }

    fn set(rtc: &mut Rtc, index: u8, value: u8, now: u64) {
        rtc.write(0x70, index, Nanos(now));
        rtc.write(0x71, value, Nanos(now));
    }

    fn time(rtc: &mut Rtc, now: u64) -> [u8; 8] {
        [0x32, 9, 8, 7, 6, 4, 2, 0].map(|index| get(rtc, index, now))
    }

    const S: u64 = SECOND;

    #[test]
    fn dates_go_both_ways() {
        for (days, date) in [
            (0, (1970, 1, 1)),
            (59, (1970, 3, 1)),
            (11_016, (2000, 2, 29)),
            (19_782, (2024, 2, 29)),
            (47_540, (2100, 2, 28)),
            (47_541, (2100, 3, 1)),
            (-1, (1969, 12, 31)),
        ] {
            assert_eq!(date_of(days), date);
            assert_eq!(days_of(date.0, date.1.into(), date.2.into()), days);
        }
        let mut expected = -719_528; // year 0
        while expected < 2_932_896 {
            let (year, month, day) = date_of(expected);
            assert_eq!(days_of(year, month.into(), day.into()), expected);
            expected += 97;
        }
    }

    #[test]
    fn time_runs_over_a_leap_day() {
        let mut rtc = Rtc::new(LEAP, 0, 0);
        assert_eq!(
            time(&mut rtc, 0),
            [0x20, 0x24, 2, 0x28, 4, 0x23, 0x59, 0x58]
        );
        assert_eq!(time(&mut rtc, S / 2 - 1)[7], 0x58);
        assert_eq!(time(&mut rtc, S / 2)[7], 0x59, "the fraction counts");
        assert_eq!(time(&mut rtc, 3 * S / 2), [0x20, 0x24, 2, 0x29, 5, 0, 0, 0]);
        assert_eq!(time(&mut rtc, 86_401 * S + S / 2)[2..5], [3, 1, 6]);
    }

    #[test]
    fn formats() {
        let mut rtc = Rtc::new(LEAP, 0, 0);
        set(&mut rtc, 0x0b, 0x06, 0);
        assert_eq!(time(&mut rtc, 0), [20, 24, 2, 28, 4, 23, 59, 58]);
        set(&mut rtc, 0x0b, 0x04, 0);
        assert_eq!(time(&mut rtc, 0)[5], 11 | 0x80);
        set(&mut rtc, 0x0b, 0x00, 0);
        assert_eq!(time(&mut rtc, 0)[5], 0x11 | 0x80);
        assert_eq!(time(&mut rtc, 2 * S)[5], 0x12, "midnight is 12 AM");
        assert_eq!(time(&mut rtc, 2 * S + 43_200 * S)[5], 0x92, "noon is 12 PM");
    }

    #[test]
    fn the_guest_sets_the_time() {
        let mut rtc = Rtc::new(LEAP, 0, 0);
        set(&mut rtc, 0x0b, 0x92, 0);
        assert_eq!(get(&mut rtc, 0x0b, 0), 0x82, "SET clears UIE");
        for (index, value) in [
            (0, 0x59),
            (2, 0x59),
            (4, 0x23),
            (6, 7),
            (7, 0x31),
            (8, 0x12),
        ] {
            set(&mut rtc, index, value, 0);
        }
        set(&mut rtc, 9, 0x99, 0);
        set(&mut rtc, 0x32, 0x19, 0);
        assert_eq!(time(&mut rtc, 100 * S)[7], 0x59, "held");
        set(&mut rtc, 0x0b, 0x02, 100 * S);
        assert_eq!(
            time(&mut rtc, 100 * S + S / 2),
            [0x20, 0, 1, 1, 1, 0, 0, 0],
            "the phase of the second is kept, the day of the week is what the guest says"
        );
        // A write without SET.
        set(&mut rtc, 2, 0x30, 100 * S + S / 2);
        assert_eq!(time(&mut rtc, 101 * S)[5..], [0, 0x30, 0]);
        // A divider reset: the next second ends half a second after its release.
        set(&mut rtc, 0x0a, 0x76, 102 * S);
        set(&mut rtc, 0x0a, 0x26, 200 * S);
        let before = time(&mut rtc, 200 * S + S / 2 - 1)[7];
        assert_eq!(time(&mut rtc, 200 * S + S / 2)[7], before + 1);
    }

    #[test]
    fn uip_warns_before_the_update() {
        let mut rtc = Rtc::new(LEAP, 0, 0);
        for (at, uip) in [
            (0, 0),
            (S / 2 - UPDATE - 1, 0),
            (S / 2 - UPDATE, UIP),
            (S / 2 - 1, UIP),
            (S / 2, 0),
        ] {
            assert_eq!(get(&mut rtc, 0x0a, at) & UIP, uip, "{at}");
        }
        set(&mut rtc, 0x0b, 0x82, S);
        assert_eq!(get(&mut rtc, 0x0a, 3 * S / 2 - 1) & UIP, 0);
    }

    #[test]
    fn update_ended_and_alarm_interrupts() {
        let mut rtc = Rtc::new(LEAP, 0, 0);
        assert_eq!(rtc.next_event(), Nanos::NEVER);
        set(&mut rtc, 0x0b, 0x12, 0);
        assert_eq!(rtc.next_event(), Nanos(S / 2));
        rtc.tick(Nanos(S / 2));
        assert!(rtc.irq());
        assert_eq!(get(&mut rtc, 0x0c, S / 2) & 0xb0, 0x90);
        assert!(!rtc.irq());
        assert_eq!(get(&mut rtc, 0x0c, S / 2), 0, "reading clears");

        // (hour, minute, second), seconds from 23:59:58 on
        for (alarm, after) in [
            ([0x23, 0x59, 0x59], Some(1)),
            ([0x00, 0x00, 0x00], Some(2)),
            ([0x23, 0x59, 0x58], Some(86_400)),
            ([0xff, 0xff, 0xff], Some(1)),
            ([0xc0, 0xff, 0x10], Some(12)),
            ([0xff, 0x05, 0x00], Some(302)),
            ([0x12, 0xff, 0xff], Some(12 * 3600 + 2)),
            ([0x24, 0x00, 0x00], None),
            ([0x00, 0x60, 0x00], None),
            ([0x00, 0x0a, 0x00], None),
        ] {
            let mut rtc = Rtc::new(LEAP, 0, 0);
            for (index, value) in [5, 3, 1].into_iter().zip(alarm) {
                set(&mut rtc, index, value, 0);
            }
            set(&mut rtc, 0x0b, 0x22, 0);
            let expected = after.map_or(Nanos::NEVER, |s| Nanos(S / 2 + (s - 1) * S));
            assert_eq!(rtc.next_event(), expected, "{alarm:x?}");
            if expected != Nanos::NEVER {
                rtc.tick(expected - 1);
                assert!(!rtc.irq());
                rtc.tick(expected);
                assert!(rtc.irq());
                assert_eq!(get(&mut rtc, 0x0c, expected.0) & 0xa0, 0xa0);
            }
        }
    }

    #[test]
    fn periodic_rates() {
        for (rate, hz) in [(1, 256), (2, 128), (3, 8192), (6, 1024), (15, 2)] {
            let mut rtc = Rtc::new(LEAP, 0, 0);
            set(&mut rtc, 0x0a, 0x20 | rate, 0);
            set(&mut rtc, 0x0b, 0x42, 0);
            let mut count = 0;
            while rtc.next_event() <= Nanos(10 * S) {
                let now = rtc.next_event();
                rtc.tick(now);
                assert!(rtc.irq());
                assert_eq!(get(&mut rtc, 0x0c, now.0) & 0xc0, 0xc0);
                count += 1;
            }
            assert_eq!(count, 10 * hz);
        }
        let mut rtc = Rtc::new(LEAP, 0, 0);
        set(&mut rtc, 0x0a, 0x20, 0);
        set(&mut rtc, 0x0b, 0x42, 0);
        assert_eq!(rtc.next_event(), Nanos::NEVER, "rate 0 is off");
    }

    #[test]
    fn memory_survives_a_reset() {
        let mut rtc = Rtc::new(LEAP, 3 << 30, 1 << 30);
        assert_eq!(
            [get(&mut rtc, 0x15, 0), get(&mut rtc, 0x16, 0)],
            640u16.to_le_bytes()
        );
        assert_eq!(
            [get(&mut rtc, 0x17, 0), get(&mut rtc, 0x30, 0)],
            [0xff, 0xff]
        );
        assert_eq!(get(&mut rtc, 0x35, 0), 0xbf);
        assert_eq!(
            [0x5b, 0x5c, 0x5d].map(|i| get(&mut rtc, i, 0)),
            [0, 0x40, 0]
        );
        set(&mut rtc, 0x0f, 0x0a, 0);
        set(&mut rtc, 0x8f, 0x05, 0);
        assert!(rtc.nmi_masked());
        rtc.write(0x72, 0x0f, Nanos(0));
        rtc.write(0x73, 0x77, Nanos(0));
        set(&mut rtc, 0x0b, 0x72, 0);
        rtc.reset(Nanos(5 * S));
        assert_eq!(get(&mut rtc, 0x0f, 0), 0x05);
        assert_eq!(rtc.read(0x73, Nanos(0)), 0x77);
        assert_eq!(get(&mut rtc, 0x0b, 0), 0x02);
        assert!(!rtc.nmi_masked());
        assert_eq!(get(&mut rtc, 0x0d, 0), 0x80);
        assert_eq!(time(&mut rtc, 5 * S)[7], 0x03);
    }
}
