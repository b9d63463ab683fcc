//! The 8254 programmable interval timer (Intel 8254 datasheet, order 231164) and the system
//! control port 0x61 that gates its third channel.
//!
//! Nothing counts here: a channel knows the tick up to which it is worked out, and every access or
//! tick works it out up to now in a constant number of steps, by the clock's exact 1 193 182 Hz.
//!
//! **Missed ticks.** If more than one period passes between two looks, the rising edges of OUT in
//! it are one edge, as they are for an interrupt controller whose request is still pending. Ticks
//! are not replayed: guest time is what the counter says.
//!
//! A count of 1 in modes 2 and 3 is illegal by the datasheet; it counts as 2 here.

use arch::Nanos;
use serde::{Deserialize, Serialize};

use crate::ticks;

/// Input clock in Hz.
pub const HZ: u64 = 1_193_182;
/// Ticks between two toggles of the refresh bit in port 0x61 (15.085 µs).
const REFRESH: u64 = 18;

/// What the next byte read or written is (control word bits 5 and 4).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum Format {
    Low,
    High,
    LowHigh,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
struct Channel {
    /// 0 to 5.
    mode: u8,
    bcd: bool,
    format: Format,
    /// Count register: what was written last.
    count: u16,
    /// A whole count was written since the control word.
    written: bool,
    /// First of two bytes written.
    low_written: Option<u8>,
    /// The second of two bytes is read next.
    high_next: bool,
    latched: Option<u16>,
    latched_status: Option<u8>,
    /// Written and not yet in the counting element.
    null_count: bool,
    gate: bool,
    out: bool,
    /// OUT rose since it was last asked.
    rose: bool,
    /// Tick up to which the state below is worked out.
    at: u64,
    /// The counting element takes the count register at the next clock.
    load: bool,
    /// A count was loaded since the control word.
    running: bool,
    /// Modes 0, 1, 4, 5: the terminal count is still to come.
    armed: bool,
    /// Modes 4 and 5: OUT is low for this one clock.
    strobe: bool,
    /// Counting element. Mode 3: the count this half-cycle started from. Else, what is left.
    element: u32,
    /// Mode 3: clocks left in this half-cycle.
    half: u32,
}

impl Channel {
    const fn new(mode: u8, count: u16, gate: bool) -> Self {
        let mut channel = Self {
            mode,
            bcd: false,
            format: Format::LowHigh,
            count,
            written: true,
            low_written: None,
            high_next: false,
            latched: None,
            latched_status: None,
            null_count: false,
            gate,
            out: true,
            rose: false,
            at: 0,
            load: false,
            running: false,
            armed: false,
            strobe: false,
            element: 0,
            half: 1,
        };
        channel.load_element();
        channel
    }

    const fn modulus(&self) -> u32 {
        if self.bcd { 10_000 } else { 0x1_0000 }
    }

    /// The count register as a number of clocks, 1 to the modulus (0 stands for the modulus).
    const fn initial(&self) -> u32 {
        let raw = self.count as u32;
        let value = if self.bcd {
            (raw >> 12) * 1000 + (raw >> 8 & 15) * 100 + (raw >> 4 & 15) * 10 + (raw & 15)
        } else {
            raw
        };
        match (value, self.mode) {
            (0, _) => self.modulus(),
            (1, 2 | 3) => 2,
            _ => value,
        }
    }

    const fn half_cycle(count: u32, high: bool) -> u32 {
        if high { count.div_ceil(2) } else { count / 2 }
    }

    const fn load_element(&mut self) {
        self.element = self.initial();
        self.half = Self::half_cycle(self.element, self.out);
        self.null_count = false;
        self.load = false;
        self.running = true;
    }

    const fn set_out(&mut self, level: bool) {
        self.rose |= level && !self.out;
        self.out = level;
    }

    /// Whether the counting element moves with the clock.
    const fn counts(&self) -> bool {
        self.running
            && match self.mode {
                // The first of two bytes stops the count in mode 0.
                0 => self.gate && self.low_written.is_none(),
                1 | 5 => true,
                _ => self.gate,
            }
    }

    /// Works out the state at `tick`.
    fn advance(&mut self, tick: u64) {
        let mut clocks = tick.saturating_sub(self.at);
        self.at += clocks;
        if clocks == 0 {
            return;
        }
        if self.strobe {
            self.strobe = false;
            self.set_out(true);
        }
        if self.load {
            clocks -= 1;
            match self.mode {
                1 => self.set_out(false),
                3 => self.set_out(true),
                _ => {}
            }
            self.armed = true;
            self.load_element();
        }
        self.clock(clocks);
    }

    /// Lets the counting element see `clocks` clocks.
    fn clock(&mut self, mut clocks: u64) {
        if clocks == 0 || !self.counts() {
            return;
        }
        let left = u64::from(self.element);
        match self.mode {
            2 => {
                if clocks >= left {
                    // OUT was low for the last clock of the period and rises with the reload.
                    self.set_out(false);
                    self.load_element();
                    clocks = (clocks - left) % u64::from(self.element);
                    self.set_out(true);
                }
                self.element -= clocks as u32;
                self.set_out(self.element != 1);
            }
            3 => {
                if clocks >= u64::from(self.half) {
                    clocks -= u64::from(self.half);
                    self.set_out(!self.out);
                    self.load_element();
                    let period = u64::from(self.element);
                    if clocks >= period {
                        clocks %= period;
                        self.rose = true;
                    }
                    if clocks >= u64::from(self.half) {
                        clocks -= u64::from(self.half);
                        self.set_out(!self.out);
                        self.half = Self::half_cycle(self.element, self.out);
                    }
                }
                self.half -= clocks as u32;
            }
            _ => {
                let modulus = u64::from(self.modulus());
                let terminal = if left == 0 { modulus } else { left };
                if self.armed && clocks >= terminal {
                    self.armed = false;
                    if self.mode < 4 {
                        self.set_out(true);
                    } else {
                        self.set_out(false);
                        self.strobe = clocks == terminal;
                        self.set_out(!self.strobe);
                    }
                }
                // After the terminal count it goes on from the top.
                let down = clocks % modulus;
                self.element = ((left + modulus - down) % modulus) as u32;
            }
        }
    }

    /// The tick of the next rising edge of OUT, if one is to come without a further access.
    fn next_rise(&self) -> Option<u64> {
        if self.strobe {
            return Some(self.at + 1);
        }
        let initial = u64::from(self.initial());
        if self.load {
            let after = match self.mode {
                4 | 5 => initial + 2,
                _ => initial + 1,
            };
            return (self.gate || matches!(self.mode, 1 | 5)).then(|| self.at + after);
        }
        if !self.counts() {
            return None;
        }
        let left = match self.element {
            0 => u64::from(self.modulus()),
            left => u64::from(left),
        };
        match self.mode {
            2 => Some(self.at + left),
            3 if self.out => {
                let low = Self::half_cycle(self.initial(), false);
                Some(self.at + u64::from(self.half) + u64::from(low))
            }
            3 => Some(self.at + u64::from(self.half)),
            0 | 1 => self.armed.then_some(self.at + left),
            _ => self.armed.then_some(self.at + left + 1),
        }
    }

    /// The counting element as the bus sees it.
    fn visible(&self) -> u16 {
        let value = if self.mode == 3 {
            let past = Self::half_cycle(self.element, self.out).saturating_sub(self.half);
            (self.element & !1).saturating_sub(2 * past)
        } else {
            self.element
        } % self.modulus();
        if self.bcd {
            let digit = |unit: u32| value / unit % 10;
            (digit(1000) << 12 | digit(100) << 8 | digit(10) << 4 | digit(1)) as u16
        } else {
            value as u16
        }
    }

    fn status(&self) -> u8 {
        let format = match self.format {
            Format::Low => 1,
            Format::High => 2,
            Format::LowHigh => 3,
        };
        u8::from(self.out) << 7
            | u8::from(self.null_count) << 6
            | format << 4
            | self.mode << 1
            | u8::from(self.bcd)
    }

    fn latch(&mut self) {
        if self.latched.is_none() {
            self.latched = Some(self.visible());
        }
    }

    fn control(&mut self, value: u8) {
        self.format = match value >> 4 & 3 {
            0 => return self.latch(),
            1 => Format::Low,
            2 => Format::High,
            _ => Format::LowHigh,
        };
        self.mode = match value >> 1 & 7 {
            mode @ 0..6 => mode,
            mode => mode & 3,
        };
        self.bcd = value & 1 != 0;
        self.element = u32::from(self.visible());
        if self.bcd {
            self.element %= 10_000;
        }
        self.written = false;
        self.low_written = None;
        self.high_next = false;
        self.latched = None;
        self.latched_status = None;
        self.null_count = true;
        self.load = false;
        self.running = false;
        self.armed = false;
        self.strobe = false;
        self.set_out(self.mode != 0);
    }

    fn write(&mut self, value: u8) {
        self.count = match (self.format, self.low_written.take()) {
            (Format::Low, _) => u16::from(value),
            (Format::High, _) => u16::from(value) << 8,
            (Format::LowHigh, Some(low)) => u16::from_le_bytes([low, value]),
            (Format::LowHigh, None) => {
                self.low_written = Some(value);
                if self.mode == 0 {
                    self.set_out(false);
                }
                return;
            }
        };
        self.null_count = true;
        self.written = true;
        match self.mode {
            0 => {
                self.set_out(false);
                self.load = true;
            }
            4 => self.load = true,
            // A running period or half-cycle is finished first.
            2 | 3 => self.load |= !self.running,
            // Taken at the next trigger.
            _ => {}
        }
    }

    fn read(&mut self) -> u8 {
        if let Some(status) = self.latched_status.take() {
            return status;
        }
        let [low, high] = self.latched.unwrap_or_else(|| self.visible()).to_le_bytes();
        let (byte, last) = match self.format {
            Format::Low => (low, true),
            Format::High => (high, true),
            Format::LowHigh if self.high_next => (high, true),
            Format::LowHigh => (low, false),
        };
        self.high_next = !last;
        if last {
            self.latched = None;
        }
        byte
    }

    fn set_gate(&mut self, gate: bool) {
        let rising = gate && !self.gate;
        self.gate = gate;
        match self.mode {
            // A trigger loads the count that was written, if there is one since the mode was set.
            1 | 5 if rising => self.load |= self.written,
            2 | 3 if !gate => self.set_out(true),
            2 | 3 if rising => self.load |= self.written,
            _ => {}
        }
    }
}

/// The three channels, ports 0x40 to 0x43, and port 0x61.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Pit {
    channels: [Channel; 3],
    /// Port 0x61 bits 1 (speaker data), 2 and 3 (error reports off).
    control: u8,
}

impl Default for Pit {
    fn default() -> Self {
        Self::new()
    }
}

impl Pit {
    /// The timer as a PC's firmware leaves it: channel 0 at 18.2 Hz, channel 1 at the refresh rate.
    #[must_use]
    pub const fn new() -> Self {
        Self {
            channels: [
                Channel::new(3, 0, true),
                Channel::new(2, REFRESH as u16, true),
                Channel::new(3, 0, false),
            ],
            control: 0,
        }
    }

    /// Back to [`Pit::new`], starting now.
    pub fn reset(&mut self, now: Nanos) {
        *self = Self::new();
        for channel in &mut self.channels {
            channel.at = ticks::ticks::<HZ>(now);
        }
    }

    /// Reads 0x40 to 0x43 or 0x61. The control word cannot be read.
    pub fn read(&mut self, port: u16, now: Nanos) -> u8 {
        let tick = ticks::ticks::<HZ>(now);
        if port == 0x61 {
            let speaker = &mut self.channels[2];
            speaker.advance(tick);
            return self.control
                | u8::from(speaker.gate)
                | u8::from(tick % (2 * REFRESH) >= REFRESH) << 4
                | u8::from(speaker.out) << 5;
        }
        match self.channels.get_mut(usize::from(port & 3)) {
            Some(channel) => {
                channel.advance(tick);
                channel.read()
            }
            None => 0xff,
        }
    }

    /// Writes 0x40 to 0x43 or 0x61.
    pub fn write(&mut self, port: u16, value: u8, now: Nanos) {
        let tick = ticks::ticks::<HZ>(now);
        if port == 0x61 {
            self.control = value & 0x0e;
            let speaker = &mut self.channels[2];
            speaker.advance(tick);
            return speaker.set_gate(value & 1 != 0);
        }
        if let Some(channel) = self.channels.get_mut(usize::from(port & 3)) {
            channel.advance(tick);
            return channel.write(value);
        }
        match self.channels.get_mut(usize::from(value >> 6)) {
            Some(channel) => {
                channel.advance(tick);
                channel.control(value);
            }
            None => {
                for (index, channel) in self.channels.iter_mut().enumerate() {
                    if value & (2 << index) == 0 {
                        continue;
                    }
                    channel.advance(tick);
                    if value & 0x10 == 0 && channel.latched_status.is_none() {
                        channel.latched_status = Some(channel.status());
                    }
                    if value & 0x20 == 0 {
                        channel.latch();
                    }
                }
            }
        }
    }

    /// Works out channel 0 up to now.
    pub fn tick(&mut self, now: Nanos) {
        self.channels[0].advance(ticks::ticks::<HZ>(now));
    }

    /// When OUT of channel 0 rises next. Its falls are seen with the next access or tick.
    #[must_use]
    pub fn next_event(&self) -> Nanos {
        self.channels[0]
            .next_rise()
            .map_or(Nanos::NEVER, ticks::time_of::<HZ>)
    }

    /// OUT of channel 0, ISA interrupt 0.
    #[must_use]
    pub const fn irq(&self) -> bool {
        self.channels[0].out
    }

    /// Whether OUT of channel 0 rose since this was last asked, even if it is low again.
    pub const fn take_rise(&mut self) -> bool {
        core::mem::replace(&mut self.channels[0].rose, false)
    }

    /// The speaker's input: OUT of channel 2 where the guest lets it through.
    #[must_use]
    pub const fn speaker(&self) -> bool {
        self.channels[2].out && self.control & 2 != 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A moment in tick `tick`.
    fn at(tick: u64) -> Nanos {
        ticks::time_of::<HZ>(tick)
    }

    fn gate(pit: &mut Pit, on: bool, tick: u64) {
        pit.write(0x61, on.into(), at(tick));
    }

    /// Programs channel 2 in tick 100: a mode and a count.
    fn programmed(control: u8, count: &[u8], gate_on: bool) -> Pit {
        let mut pit = Pit::new();
        gate(&mut pit, gate_on, 100);
        pit.write(0x43, 0x80 | control, at(100));
        for &byte in count {
            pit.write(0x42, byte, at(100));
        }
        pit
    }

    /// Count and OUT of channel 2 in each of these ticks, seen by a look in each.
    fn wave(pit: &mut Pit, ticks: core::ops::Range<u64>) -> (Vec<u16>, String) {
        ticks
            .map(|tick| {
                let channel = &mut pit.channels[2];
                channel.advance(tick);
                (channel.visible(), if channel.out { 'H' } else { 'L' })
            })
            .unzip()
    }

    #[test]
    fn waveforms_of_the_datasheet() {
        // Mode, count, counts and OUT from the first clock after the write or trigger on.
        for (mode, count, counts, out) in [
            (0, 4, &[4, 3, 2, 1, 0, 0xffff, 0xfffe][..], "LLLLHHH"),
            (1, 3, &[3, 2, 1, 0, 0xffff], "LLLHH"),
            (2, 3, &[3, 2, 1, 3, 2, 1, 3], "HHLHHLH"),
            (2, 2, &[2, 1, 2, 1], "HLHL"),
            (3, 4, &[4, 2, 4, 2, 4, 2], "HHLLHH"),
            (3, 5, &[4, 2, 0, 4, 2, 4, 2, 0, 4], "HHHLLHHHL"),
            (3, 3, &[2, 0, 2, 2, 0, 2], "HHLHHL"),
            (4, 3, &[3, 2, 1, 0, 0xffff], "HHHLH"),
            (5, 3, &[3, 2, 1, 0, 0xffff], "HHHLH"),
        ] {
            let triggered = matches!(mode, 1 | 5);
            let mut pit = programmed(0x10 | mode << 1, &[count], !triggered);
            if triggered {
                assert!(wave(&mut pit, 101..110).1.chars().all(|out| out == 'H'));
                gate(&mut pit, true, 109);
            }
            let first = if triggered { 110 } else { 101 };
            let seen = wave(&mut pit, first..first + counts.len() as u64);
            assert_eq!(seen, (counts.to_vec(), out.to_string()), "mode {mode}");
        }
    }

    #[test]
    fn a_gate_low_holds_the_count() {
        for (mode, counts, out) in [
            (0, &[4, 4, 4, 3, 2, 1, 0][..], "LLLLLLH"),
            (2, &[4, 4, 4, 4, 3, 2, 1, 4], "HHHHHHLH"),
            (3, &[4, 4, 4, 4, 2, 4], "HHHHHL"),
            (4, &[4, 4, 4, 3, 2, 1, 0, 0xffff], "HHHHHHLH"),
        ] {
            let mut pit = programmed(0x10 | mode << 1, &[4], false);
            let mut seen = wave(&mut pit, 101..104);
            gate(&mut pit, true, 103);
            let rest = wave(&mut pit, 104..101 + counts.len() as u64);
            seen.0.extend(rest.0);
            seen.1.push_str(&rest.1);
            assert_eq!(seen, (counts.to_vec(), out.to_string()), "mode {mode}");
        }
        // Modes 2 and 3: OUT goes high at once, and a trigger starts the period again.
        for mode in [2, 3] {
            let mut pit = programmed(0x10 | mode << 1, &[4], true);
            let low = (101..120).find(|&tick| wave(&mut pit, tick..tick + 1).1 == "L");
            let low = low.unwrap();
            gate(&mut pit, false, low);
            assert!(pit.channels[2].out);
            gate(&mut pit, true, low + 5);
            assert_eq!(wave(&mut pit, low + 6..low + 7), (vec![4], "H".to_string()));
        }
        // Modes 1 and 5: low changes nothing, the next rise triggers again.
        let mut pit = programmed(0x12, &[5], false);
        gate(&mut pit, true, 110);
        gate(&mut pit, false, 111);
        assert_eq!(wave(&mut pit, 111..114).0, [5, 4, 3]);
        gate(&mut pit, true, 113);
        assert_eq!(
            wave(&mut pit, 114..120),
            (vec![5, 4, 3, 2, 1, 0], "LLLLLH".to_string())
        );
    }

    #[test]
    fn a_new_count_half_way() {
        let rewrite = |mode: u8, count: u8| {
            let mut pit = programmed(0x10 | mode << 1, &[6], true);
            wave(&mut pit, 101..103);
            pit.write(0x42, count, at(102));
            wave(&mut pit, 103..112)
        };
        assert_eq!(
            rewrite(0, 3).0,
            [3, 2, 1, 0, 0xffff, 0xfffe, 0xfffd, 0xfffc, 0xfffb]
        );
        assert_eq!(rewrite(0, 3).1, "LLLHHHHHH");
        assert_eq!(rewrite(2, 3).0, [4, 3, 2, 1, 3, 2, 1, 3, 2]);
        assert_eq!(rewrite(3, 4).0, [2, 4, 2, 4, 2, 4, 2, 4, 2]);
        assert_eq!(rewrite(3, 4).1, "HLLHHLLHH");
        assert_eq!(rewrite(4, 3).0[..4], [3, 2, 1, 0]);
        // Modes 1 and 5: with the next trigger.
        let mut pit = programmed(0x12, &[6], false);
        gate(&mut pit, true, 101);
        pit.write(0x42, 3, at(103));
        assert_eq!(wave(&mut pit, 104..106).0, [4, 3]);
        gate(&mut pit, false, 105);
        gate(&mut pit, true, 105);
        assert_eq!(wave(&mut pit, 106..108).0, [3, 2]);

        // Mode 0: the first of two bytes stops the count, OUT goes low.
        let mut pit = programmed(0x30, &[2, 0], true);
        assert_eq!(wave(&mut pit, 101..104).1, "LLH");
        pit.write(0x42, 0x03, at(103));
        assert_eq!(wave(&mut pit, 104..106), (vec![0, 0], "LL".to_string()));
        pit.write(0x42, 0x00, at(105));
        assert_eq!(
            wave(&mut pit, 106..110),
            (vec![3, 2, 1, 0], "LLLH".to_string())
        );
    }

    #[test]
    fn access_formats_and_latches() {
        let read = |pit: &mut Pit, tick| pit.read(0x42, at(tick));
        // Low byte only, high byte only.
        let mut pit = programmed(0x14, &[0x80], true);
        assert_eq!([read(&mut pit, 101), read(&mut pit, 102)], [0x80, 0x7f]);
        let mut pit = programmed(0x24, &[0x12], true);
        assert_eq!([read(&mut pit, 101), read(&mut pit, 102)], [0x12, 0x11]);

        let mut pit = programmed(0x34, &[0x34, 0x12], true);
        assert_eq!([read(&mut pit, 101), read(&mut pit, 101)], [0x34, 0x12]);
        pit.write(0x43, 0x80, at(102));
        pit.write(0x43, 0x80, at(110)); // the first latch stays
        assert_eq!([read(&mut pit, 120), read(&mut pit, 120)], [0x33, 0x12]);
        assert_eq!([read(&mut pit, 121), read(&mut pit, 121)], [0x20, 0x12]);

        // Read-back: status first, then count.
        pit.write(0x43, 0xc8, at(122));
        assert_eq!([0; 3].map(|_| read(&mut pit, 200)), [0xb4, 0x1f, 0x12]);
        pit.write(0x43, 0xe8, at(123)); // status only
        pit.write(0x42, 0x55, at(201));
        pit.write(0x42, 0x00, at(201));
        assert_eq!(read(&mut pit, 202), 0xb4, "as it was when it was latched");
        pit.write(0x43, 0xe8, at(203));
        assert_eq!(read(&mut pit, 203), 0xf4, "the new count is not loaded yet");
        pit.write(0x43, 0xee, at(204));
        for (port, status) in [(0x40, 0xb6), (0x41, 0xb4), (0x42, 0xf4)] {
            assert_eq!(pit.read(port, at(204)) | 0x80, status, "{port:#x}");
        }
        assert_eq!(pit.read(0x43, at(204)), 0xff);
    }

    #[test]
    fn decimal_counts() {
        let mut pit = programmed(0x35, &[0x00, 0x10], true);
        assert_eq!(wave(&mut pit, 101..104).0, [0x1000, 0x0999, 0x0998]);
        let mut pit = programmed(0x31, &[0, 0], true);
        assert_eq!(wave(&mut pit, 101..103).0, [0, 0x9999]);
        assert_eq!(pit.channels[2].next_rise(), Some(101 + 10_000));
    }

    #[test]
    fn jumps_see_what_steps_see() {
        for mode in 0..6 {
            for count in [1, 2, 3, 4, 5, 7, 16, 99] {
                for bcd in [0, 1] {
                    let triggered = matches!(mode, 1 | 5);
                    let mut stepped = programmed(0x10 | mode << 1 | bcd, &[count], !triggered);
                    if triggered {
                        gate(&mut stepped, true, 100);
                    }
                    let start = stepped.clone();
                    let mut rises = Vec::new();
                    for tick in 101..500 {
                        let before = stepped.channels[2].next_rise();
                        stepped.channels[2].rose = false;
                        stepped.channels[2].advance(tick);
                        if stepped.channels[2].rose {
                            assert_eq!(before, Some(tick), "mode {mode}, {count}: foretold");
                            rises.push(tick);
                        }
                        let mut jumped = start.clone();
                        jumped.channels[2].rose = false;
                        jumped.channels[2].advance(tick);
                        assert_eq!(jumped.channels[2].rose, !rises.is_empty());
                        jumped.channels[2].rose = stepped.channels[2].rose;
                        assert_eq!(
                            format!("{:?}", jumped.channels[2]),
                            format!("{:?}", stepped.channels[2]),
                            "mode {mode}, count {count}, tick {tick}"
                        );
                    }
                    assert!(!rises.is_empty(), "mode {mode}, {count}");
                }
            }
        }
    }

    #[test]
    fn channel_0_does_not_drift() {
        let mut pit = Pit::new();
        pit.write(0x43, 0x34, Nanos(1));
        pit.write(0x40, 0xa9, Nanos(1)); // 11 929.6: 100 Hz as near as can be
        pit.write(0x40, 0x2e, Nanos(1));
        let mut count = 0;
        let hour = Nanos(3_600_000_000_000);
        while pit.next_event() <= hour {
            let now = pit.next_event();
            pit.tick(now - 1);
            assert!(!pit.take_rise(), "not early");
            pit.tick(now);
            assert!(pit.take_rise(), "not late");
            assert!(pit.next_event() > now);
            count += 1;
        }
        assert_eq!(count, 3_600 * HZ / 0x2ea9);
        pit.tick(Nanos(hour.0 * 2));
        assert!(pit.take_rise() && !pit.take_rise(), "missed ticks are one");
    }

    #[test]
    fn port_61() {
        let mut pit = Pit::new();
        let toggles = (0..3600)
            .map(|tick| pit.read(0x61, at(tick)) & 0x10)
            .fold((0, 0), |(last, count), bit| {
                (bit, count + u32::from(bit != last))
            });
        assert_eq!(toggles.1, 3599 / 18);
        pit.write(0x61, 0xff, at(4000));
        assert_eq!(pit.read(0x61, at(4000)) & 0xcf, 0x0f);
        // What kernels measure their clocks with: mode 0 on channel 2, until OUT2 rises.
        pit.write(0x61, 0x01, at(5000));
        pit.write(0x43, 0xb0, at(5000));
        pit.write(0x42, 0x10, at(5000));
        pit.write(0x42, 0x27, at(5000));
        assert_eq!(pit.read(0x61, at(5000 + 10_000)) & 0x20, 0);
        assert_eq!(pit.read(0x61, at(5000 + 10_001)) & 0x20, 0x20);
        assert!(!pit.speaker());
        pit.write(0x61, 0x03, at(20_000));
        assert!(pit.speaker());
    }
}
