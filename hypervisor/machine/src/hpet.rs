//! High precision event timers (IA-PC HPET Specification 1.0a): a 10 MHz, 64-bit main counter and
//! three comparators, each one-shot or periodic.
//!
//! As in the PIT, nothing counts: counter and comparators are worked out when somebody looks, and
//! matches that were missed are one interrupt. FSB (message) delivery is not offered; interrupts
//! go to I/O APIC pins 20 to 23, or, with legacy replacement, in the place of the PIT's and the
//! RTC's.

use arch::Nanos;
use serde::{Deserialize, Serialize};

use crate::ticks;

/// Main counter rate.
const HZ: u64 = 10_000_000;
/// Femtoseconds per tick, 64-bit counter, legacy replacement, three timers, revision 1: the low
/// half is the block identifier in the ACPI table.
const CAPABILITIES: u64 = (1_000_000_000_000_000 / HZ) << 32 | 0x8086_a201;
/// The first I/O APIC pin a timer can use, and how many there are from it on.
pub const FIRST_GSI: u32 = 20;
const GSIS: u32 = 4;

const ENABLE: u64 = 1 << 0;
const LEGACY: u64 = 1 << 1;

const LEVEL: u64 = 1 << 1;
const INTERRUPT: u64 = 1 << 2;
const PERIODIC: u64 = 1 << 3;
const VALUE_SET: u64 = 1 << 6;
const WIDTH_32: u64 = 1 << 8;
const ROUTE_SHIFT: u64 = 9;
const ROUTE: u64 = 31 << ROUTE_SHIFT;
const SETTABLE: u64 = LEVEL | INTERRUPT | PERIODIC | WIDTH_32 | ROUTE;
/// Periodic, 64 bits wide, and the pins.
const TIMER_CAPABILITIES: u64 = (((1 << GSIS) - 1) << FIRST_GSI) << 32 | 1 << 4 | 1 << 5;

#[derive(Clone, Debug, Default, Serialize, Deserialize)]
struct Timer {
    config: u64,
    comparator: u64,
    period: u64,
}

impl Timer {
    const fn mask(&self) -> u64 {
        if self.config & WIDTH_32 != 0 {
            u32::MAX as u64
        } else {
            u64::MAX
        }
    }

    /// Ticks until the counter, now at `counter`, comes to the comparator: at least 1; `None` for
    /// a whole round of a 64-bit counter.
    const fn distance(&self, counter: u64) -> Option<u64> {
        match self.comparator.wrapping_sub(counter) & self.mask() {
            0 => self.mask().checked_add(1),
            distance => Some(distance),
        }
    }

    /// Lets the counter go on from `counter` by `clocks`; `true` if it came to the comparator.
    fn pass(&mut self, counter: u64, clocks: u64) -> bool {
        let Some(past) = self.distance(counter).and_then(|d| clocks.checked_sub(d)) else {
            return false;
        };
        if self.config & PERIODIC != 0
            && let Some(more) = past.checked_div(self.period & self.mask())
        {
            let forward = (more + 1).wrapping_mul(self.period);
            self.comparator = self.comparator.wrapping_add(forward) & self.mask();
        }
        true
    }

    fn write_config(&mut self, value: u64) {
        self.config = value & (SETTABLE | if value & PERIODIC != 0 { VALUE_SET } else { 0 });
        self.comparator &= self.mask();
    }

    fn write_comparator(&mut self, value: u64) {
        let value = value & self.mask();
        let periodic = self.config & PERIODIC != 0;
        // In periodic mode a write sets the period; the comparator too, if it was asked for.
        if !periodic || self.config & VALUE_SET != 0 {
            self.comparator = value;
        }
        if periodic {
            self.period = value;
        }
        self.config &= !VALUE_SET;
    }
}

/// Where a timer's interrupt goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Route {
    /// ISA interrupt 0 or 8, in legacy replacement.
    Isa(u8),
    /// An I/O APIC pin.
    Gsi(u32),
}

/// What a timer's interrupt output does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Output {
    /// Level triggered: it is at this level.
    Level(bool),
    /// Edge triggered: whether it made an edge since this was last asked.
    Edge(bool),
}

/// The block of timers.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Hpet {
    config: u64,
    /// Level-triggered timers that came to their comparator.
    status: u8,
    /// The main counter at tick `at` of the machine.
    counter: u64,
    at: u64,
    timers: [Timer; 3],
    /// Edge-triggered timers that fired since they were last asked.
    fired: u8,
}

impl Hpet {
    /// Reads 4 or 8 naturally aligned bytes; others are undefined by the specification, and zero.
    pub fn read(&mut self, offset: u16, size: u8, now: Nanos) -> u64 {
        self.tick(now);
        let value = self.register(offset & !7);
        match (size, offset & 7) {
            (8, 0) => value,
            (4, 0) => value & 0xffff_ffff,
            (4, 4) => value >> 32,
            _ => 0,
        }
    }

    fn register(&self, offset: u16) -> u64 {
        let timer = self.timers.get(usize::from(offset >> 5).wrapping_sub(8));
        match (offset, timer) {
            (0x000, _) => CAPABILITIES,
            (0x010, _) => self.config,
            (0x020, _) => self.status.into(),
            (0x0f0, _) => self.counter,
            (_, Some(timer)) => match offset & 0x1f {
                0x00 => timer.config | TIMER_CAPABILITIES,
                0x08 => timer.comparator,
                _ => 0,
            },
            _ => 0,
        }
    }

    /// Writes 4 or 8 naturally aligned bytes; others are ignored.
    pub fn write(&mut self, offset: u16, size: u8, value: u64, now: Nanos) {
        self.tick(now);
        let register = offset & !7;
        let old = self.register(register);
        let value = match (size, offset & 7) {
            (8, 0) => value,
            (4, 0) => old & !0xffff_ffff | value & 0xffff_ffff,
            (4, 4) => old & 0xffff_ffff | value << 32,
            _ => return,
        };
        let timer = self
            .timers
            .get_mut(usize::from(offset >> 5).wrapping_sub(8));
        match (register, timer) {
            (0x010, _) => self.config = value & (ENABLE | LEGACY),
            // The upper half of the register is reserved.
            (0x020, _) if offset & 4 == 0 => self.status &= !(value as u8),
            // It is to be written while it is halted.
            (0x0f0, _) if self.config & ENABLE == 0 => self.counter = value,
            (_, Some(timer)) => match register & 0x1f {
                0x00 => timer.write_config(value),
                0x08 => timer.write_comparator(value),
                _ => {}
            },
            _ => {}
        }
        // A timer that is no longer level triggered has no status.
        for (index, timer) in self.timers.iter().enumerate() {
            if timer.config & LEVEL == 0 {
                self.status &= !(1 << index);
            }
        }
    }

    /// Works out counter and comparators up to now.
    pub fn tick(&mut self, now: Nanos) {
        let tick = ticks::ticks::<HZ>(now);
        let clocks = tick.saturating_sub(self.at);
        self.at += clocks;
        if clocks == 0 || self.config & ENABLE == 0 {
            return;
        }
        for (index, timer) in self.timers.iter_mut().enumerate() {
            if timer.pass(self.counter, clocks) {
                if timer.config & LEVEL != 0 {
                    self.status |= 1 << index;
                } else if timer.config & INTERRUPT != 0 {
                    self.fired |= 1 << index;
                }
            }
        }
        self.counter = self.counter.wrapping_add(clocks);
    }

    /// When the next interrupt comes.
    #[must_use]
    pub fn next_event(&self) -> Nanos {
        if self.config & ENABLE == 0 {
            return Nanos::NEVER;
        }
        let wanted = self
            .timers
            .iter()
            .filter(|timer| timer.config & INTERRUPT != 0);
        wanted
            .filter_map(|timer| timer.distance(self.counter))
            .min()
            .map_or(Nanos::NEVER, |distance| {
                ticks::time_of::<HZ>(self.at.saturating_add(distance))
            })
    }

    /// Whether ISA interrupts 0 and 8 are the timers', and not the PIT's and the RTC's.
    #[must_use]
    pub const fn legacy(&self) -> bool {
        self.config & LEGACY != 0
    }

    /// For each timer that has a way out: where it goes, and what it does.
    pub fn take_outputs(&mut self) -> [Option<(Route, Output)>; 3] {
        let fired = core::mem::take(&mut self.fired);
        core::array::from_fn(|index| {
            let timer = self.timers.get(index)?;
            let bit = 1 << index;
            let route = match (self.legacy(), index) {
                (true, 0) => Route::Isa(0),
                (true, 1) => Route::Isa(8),
                _ => {
                    let gsi = ((timer.config & ROUTE) >> ROUTE_SHIFT) as u32;
                    let there = (FIRST_GSI..FIRST_GSI + GSIS).contains(&gsi);
                    Route::Gsi(there.then_some(gsi)?)
                }
            };
            let on = timer.config & INTERRUPT != 0;
            let output = if timer.config & LEVEL != 0 {
                Output::Level(on && self.status & bit != 0)
            } else {
                Output::Edge(on && fired & bit != 0)
            };
            Some((route, output))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(tick: u64) -> Nanos {
        Nanos(tick * 100)
    }

    fn running(writes: &[(u16, u64)]) -> Hpet {
        let mut hpet = Hpet::default();
        for &(offset, value) in writes {
            hpet.write(offset, 8, value, at(0));
        }
        hpet.write(0x10, 4, 1, at(0));
        hpet
    }

    #[test]
    fn registers() {
        let mut hpet = Hpet::default();
        assert_eq!(hpet.read(0, 4, at(0)), 0x8086_a201);
        assert_eq!(hpet.read(4, 4, at(0)), 100_000_000, "femtoseconds");
        for timer in 0..3 {
            let config = 0x100 + 0x20 * timer;
            hpet.write(config, 8, u64::MAX, at(0));
            assert_eq!(hpet.read(config, 8, at(0)), 0x00f0_0000_0000_3f7e);
            assert_eq!(hpet.read(config + 4, 4, at(0)), 0x00f0_0000);
        }
        assert_eq!(hpet.read(0x160, 8, at(0)), 0, "no fourth timer");
        assert_eq!(hpet.read(0x1, 2, at(0)), 0);
    }

    #[test]
    fn the_counter_runs_when_enabled() {
        let mut hpet = Hpet::default();
        assert_eq!(hpet.read(0xf0, 8, at(500)), 0);
        hpet.write(0xf0, 8, 0xffff_fff0, at(500));
        hpet.write(0x10, 4, 1, at(500));
        assert_eq!(hpet.read(0xf0, 8, at(532)), 0x1_0000_0010);
        assert_eq!(hpet.read(0xf4, 4, at(532)), 1);
        hpet.write(0xf0, 8, 0, at(532));
        assert_eq!(hpet.read(0xf0, 4, at(533)), 0x11, "not while it runs");
        hpet.write(0x10, 4, 0, at(540));
        assert_eq!(hpet.read(0xf0, 4, at(900)), 0x18);
    }

    #[test]
    fn one_shot_edges_and_levels() {
        let mut hpet = running(&[(0x100, INTERRUPT | 21 << 9), (0x108, 50)]);
        assert_eq!(hpet.next_event(), at(50));
        hpet.tick(at(49));
        assert_eq!(
            hpet.take_outputs()[0],
            Some((Route::Gsi(21), Output::Edge(false)))
        );
        hpet.tick(at(50));
        assert_eq!(
            hpet.take_outputs()[0],
            Some((Route::Gsi(21), Output::Edge(true)))
        );
        assert_eq!(
            hpet.take_outputs()[0],
            Some((Route::Gsi(21), Output::Edge(false)))
        );
        assert_eq!(hpet.next_event(), Nanos::NEVER);
        assert_eq!(hpet.read(0x20, 4, at(60)), 0);

        let mut hpet = running(&[(0x120, INTERRUPT | LEVEL | 20 << 9), (0x128, 50)]);
        hpet.tick(at(70));
        assert_eq!(
            hpet.take_outputs()[1],
            Some((Route::Gsi(20), Output::Level(true)))
        );
        assert_eq!(hpet.read(0x20, 4, at(70)), 2);
        hpet.write(0x20, 4, 2, at(70));
        assert_eq!(
            hpet.take_outputs()[1],
            Some((Route::Gsi(20), Output::Level(false)))
        );
        // 32 bits wide: again after a round.
        let mut hpet = running(&[(0x140, INTERRUPT | WIDTH_32), (0x148, 0x7_0000_0005)]);
        hpet.tick(at(5));
        assert_eq!(hpet.next_event(), at(5 + (1 << 32)));
        assert_eq!(hpet.take_outputs()[2], None, "pin 0 is not one of ours");
    }

    #[test]
    fn periodic_as_linux_sets_it() {
        let mut hpet = running(&[
            (0x100, INTERRUPT | PERIODIC | VALUE_SET),
            (0x108, 1000),
            (0x108, 300),
        ]);
        hpet.write(0x10, 4, 3, at(0));
        assert!(hpet.legacy());
        for due in [1000, 1300, 1600] {
            assert_eq!(hpet.next_event(), at(due));
            hpet.tick(at(due));
            assert_eq!(
                hpet.take_outputs()[0],
                Some((Route::Isa(0), Output::Edge(true)))
            );
        }
        hpet.tick(at(1_000_000));
        assert_eq!(
            hpet.take_outputs()[0],
            Some((Route::Isa(0), Output::Edge(true))),
            "as one"
        );
        assert_eq!(hpet.read(0x108, 8, at(1_000_000)), 1_000_300);
        // A period of nothing is no period.
        hpet.write(0x108, 8, 0, at(1_000_000));
        hpet.tick(at(1_000_300));
        assert_eq!(hpet.next_event(), Nanos::NEVER);
    }
}
