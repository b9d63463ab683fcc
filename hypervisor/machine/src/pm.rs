//! ACPI fixed hardware (ACPI 6.5 §4.8): PM1 event and control blocks, PM timer, one block of
//! general-purpose events, the power button and the soft-off state.
//!
//! The machine has no legacy mode: the FADT names no SMI command port, and SCI_EN always reads 1
//! (§4.8.2.1.1). SLP_EN with a sleep type that `\_Sx` does not name is ignored.
//!
//! The PM timer is a free-running 3.579545 MHz counter; its status bit is set each time the most
//! significant bit changes (§4.8.2.1.5), which is worked out when somebody looks.

use arch::Nanos;
use serde::{Deserialize, Serialize};

use crate::ticks;

/// PM timer rate in Hz.
pub const TIMER_HZ: u64 = 3_579_545;

/// The sleep type of soft-off, as `\_S5` names it.
pub const S5: u16 = 5;

// Offsets in the block of ports.
const EVENT: u16 = 0x00;
const CONTROL: u16 = 0x04;
const TIMER: u16 = 0x08;
const GPE0: u16 = 0x20;

const TIMER_STATUS: u16 = 1 << 0;
const GLOBAL: u16 = 1 << 5;
const POWER_BUTTON: u16 = 1 << 8;
const SLEEP_BUTTON: u16 = 1 << 9;
const RTC: u16 = 1 << 10;
const ENABLE_BITS: u16 = TIMER_STATUS | GLOBAL | POWER_BUTTON | SLEEP_BUTTON | RTC | 1 << 14;

const SCI_EN: u16 = 1 << 0;
const BM_RLD: u16 = 1 << 1;
const SLEEP_TYPE: u16 = 7 << 10;
const SLP_EN: u16 = 1 << 13;

/// The fixed hardware's registers.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Pm {
    status: u16,
    enable: u16,
    /// BM_RLD and SLP_TYP.
    control: u16,
    gpe_status: u16,
    gpe_enable: u16,
    /// 32-bit rather than 24-bit timer, as FADT.TMR_VAL_EXT says.
    wide_timer: bool,
    /// Half-periods of the timer that are accounted for in TMR_STS.
    halves_seen: u64,
    /// The tick at which the timer was 0.
    timer_start: u64,
}

impl Pm {
    /// Registers after power-on.
    #[must_use]
    pub const fn new(wide_timer: bool) -> Self {
        Self {
            status: 0,
            enable: 0,
            control: 0,
            gpe_status: 0,
            gpe_enable: 0,
            wide_timer,
            halves_seen: 0,
            timer_start: 0,
        }
    }

    /// Back to the state after power-on; the timer starts again at 0.
    pub const fn reset(&mut self, now: Nanos) {
        *self = Self::new(self.wide_timer);
        self.timer_start = ticks::ticks::<TIMER_HZ>(now);
    }

    /// Reads `size` (1, 2, 4) bytes at a naturally aligned offset in the block.
    pub fn read(&mut self, offset: u16, size: u8, now: Nanos) -> u32 {
        self.tick(now);
        let word = match offset & !3 {
            EVENT => u32::from(self.enable) << 16 | u32::from(self.status),
            CONTROL => u32::from(self.control | SCI_EN),
            TIMER => self.timer(now),
            GPE0 => u32::from(self.gpe_enable) << 16 | u32::from(self.gpe_status),
            _ => u32::MAX,
        };
        let value = word >> (8 * (offset & 3));
        match size {
            1 => value & 0xff,
            2 => value & 0xffff,
            _ => value,
        }
    }

    /// Writes `size` (1, 2, 4) bytes at a naturally aligned offset in the block. Gives `true` when
    /// the guest asks for soft-off.
    #[must_use]
    pub fn write(&mut self, offset: u16, size: u8, value: u32, now: Nanos) -> bool {
        self.tick(now);
        let shift = 8 * (offset & 3);
        let mask = match size {
            1 => 0xff,
            2 => 0xffff,
            _ => u32::MAX,
        } << shift;
        let value = value << shift & mask;
        let (low, high) = (value as u16, (value >> 16) as u16);
        let high_mask = (mask >> 16) as u16;
        let merge = |old: u16, allowed: u16| old & !high_mask | high & high_mask & allowed;
        match offset & !3 {
            EVENT => {
                self.status &= !low;
                self.enable = merge(self.enable, ENABLE_BITS);
            }
            GPE0 => {
                self.gpe_status &= !low;
                self.gpe_enable = merge(self.gpe_enable, u16::MAX);
            }
            CONTROL => {
                let mask = mask as u16;
                self.control = (self.control & !mask | low) & (BM_RLD | SLEEP_TYPE);
                return low & SLP_EN != 0 && self.control >> 10 == S5;
            }
            _ => {}
        }
        false
    }

    /// The system control interrupt.
    #[must_use]
    pub const fn irq(&self) -> bool {
        self.status & self.enable != 0 || self.gpe_status & self.gpe_enable != 0
    }

    /// Somebody pressed the power button.
    pub const fn power_button(&mut self) {
        self.status |= POWER_BUTTON;
    }

    /// The real-time clock's alarm went off.
    pub const fn rtc_alarm(&mut self) {
        self.status |= RTC;
    }

    /// General-purpose event `number`, 0 to 15.
    pub const fn raise_gpe(&mut self, number: u8) {
        if number < 16 {
            self.gpe_status |= 1 << number;
        }
    }

    /// Works out the timer's status bit.
    pub const fn tick(&mut self, now: Nanos) {
        let halves = self.ticks(now) >> self.top_bit();
        if halves > self.halves_seen {
            self.halves_seen = halves;
            self.status |= TIMER_STATUS;
        }
    }

    /// When the timer's status bit is set next, if it is enabled.
    #[must_use]
    pub const fn next_event(&self) -> Nanos {
        if self.enable & !self.status & TIMER_STATUS == 0 {
            return Nanos::NEVER;
        }
        let tick = (self.halves_seen + 1) << self.top_bit();
        ticks::time_of::<TIMER_HZ>(self.timer_start.saturating_add(tick))
    }

    /// The timer's value.
    #[must_use]
    pub const fn timer(&self, now: Nanos) -> u32 {
        let ticks = self.ticks(now) as u32;
        if self.wide_timer {
            ticks
        } else {
            ticks & 0xff_ffff
        }
    }

    const fn ticks(&self, now: Nanos) -> u64 {
        ticks::ticks::<TIMER_HZ>(now).saturating_sub(self.timer_start)
    }

    const fn top_bit(&self) -> u32 {
        if self.wide_timer { 31 } else { 23 }
    }
}

/// The reset control register at port 0xcf9 (Intel ICH, 82801 datasheet §13.7.5): a write that
/// raises bit 2 resets, the whole machine if bit 1 is set, else the processor (INIT).
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub struct ResetControl(u8);

impl ResetControl {
    const SYSTEM: u8 = 0x02;
    const TRIGGER: u8 = 0x04;

    /// The register.
    #[must_use]
    pub const fn read(self) -> u8 {
        self.0
    }

    /// Writes it; gives `Some(hard)` when it resets.
    #[must_use]
    pub const fn write(&mut self, value: u8) -> Option<bool> {
        let triggered = value & !self.0 & Self::TRIGGER != 0;
        self.0 = value & 0x0e;
        if triggered {
            Some(value & Self::SYSTEM != 0)
        } else {
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const T: Nanos = Nanos(5_000_000);

    fn pm() -> Pm {
        Pm::new(true)
    }

    #[test]
    fn the_timer_counts_and_wraps() {
        let mut pm = pm();
        let second = Nanos(1_000_000_000);
        assert_eq!(pm.read(TIMER, 4, second), 3_579_545);
        assert_eq!(pm.read(TIMER + 1, 1, second), 3_579_545 >> 8 & 0xff);
        assert_eq!(
            pm.read(TIMER, 4, Nanos(3600 * second.0)),
            (3_579_545u64 * 3600) as u32
        );
        let mut pm = Pm::new(false);
        assert_eq!(
            pm.read(TIMER, 4, Nanos(10 * second.0)),
            35_795_450 & 0xff_ffff
        );
        pm.reset(second);
        assert_eq!(pm.read(TIMER, 4, second), 0);
    }

    #[test]
    fn timer_status_follows_the_top_bit() {
        for wide in [false, true] {
            let mut pm = Pm::new(wide);
            assert_eq!(pm.next_event(), Nanos::NEVER, "not enabled");
            assert!(!pm.write(EVENT + 2, 2, 1, Nanos::ZERO));
            let half = 1 << if wide { 31 } else { 23 };
            for n in 1..5 {
                let at = ticks::time_of::<TIMER_HZ>(n * half);
                assert_eq!(pm.next_event(), at);
                pm.tick(at - 1);
                assert!(!pm.irq());
                pm.tick(at);
                assert!(pm.irq());
                assert_eq!(pm.next_event(), Nanos::NEVER, "until it is cleared");
                assert!(!pm.write(EVENT, 2, 1, at));
                assert!(!pm.irq());
            }
        }
    }

    #[test]
    fn the_power_button_raises_the_sci() {
        let mut pm = pm();
        pm.power_button();
        assert!(!pm.irq());
        assert!(
            !pm.write(EVENT, 4, 0xffff_0000, T),
            "writing 0 to status clears nothing"
        );
        assert!(pm.irq());
        assert_eq!(pm.read(EVENT, 4, T), 0x4721_0100);
        assert_eq!(pm.read(EVENT + 1, 1, T), 0x01);
        assert!(!pm.write(EVENT + 1, 1, 0x01, T));
        assert!(!pm.irq());
        pm.rtc_alarm();
        assert!(pm.irq());
        pm.reset(T);
        assert!(!pm.irq());
        assert_eq!(pm.read(EVENT, 4, T), 0);
    }

    #[test]
    fn general_purpose_events() {
        let mut pm = pm();
        pm.raise_gpe(9);
        pm.raise_gpe(99);
        assert!(!pm.write(GPE0 + 3, 1, 0x02, T));
        assert!(pm.irq());
        assert_eq!(pm.read(GPE0, 4, T), 0x0200_0200);
        assert!(!pm.write(GPE0, 2, 0x0200, T));
        assert!(!pm.irq());
    }

    #[test]
    fn soft_off_needs_the_type_and_the_enable() {
        for (value, off) in [
            (5 << 10 | 1 << 13, true),
            (5 << 10, false),
            (1 << 13, false),
            (4 << 10 | 1 << 13, false),
        ] {
            assert_eq!(pm().write(CONTROL, 2, value, T), off, "{value:#x}");
        }
        let mut pm = pm();
        assert_eq!(pm.read(CONTROL, 2, T), 1, "always in ACPI mode");
        assert!(!pm.write(CONTROL, 2, 5 << 10, T));
        assert_eq!(pm.read(CONTROL, 2, T), 5 << 10 | 1);
        assert!(pm.write(CONTROL + 1, 1, 0x34, T), "by bytes too");
    }

    #[test]
    fn reset_control_needs_a_rising_bit() {
        let mut register = ResetControl::default();
        assert_eq!(register.write(0x02), None);
        assert_eq!(register.write(0x06), Some(true));
        assert_eq!(register.write(0x06), None);
        assert_eq!(register.write(0x00), None);
        assert_eq!(register.write(0x04), Some(false));
        assert_eq!(register.read(), 0x04);
    }
}
