//! The watchdog timer of Intel's 6300ESB I/O controller hub (datasheet 300641-004US, chapter 16),
//! which operating systems have a driver for; and for those that have not, the same registers at
//! fixed ports, as the ACPI table WDAT tells.
//!
//! A counter runs down in two stages. At the end of the first it may interrupt; at the end of the
//! second it drives WDT_TOUT#, which is wired to whoever owns the board. A reload starts the first
//! stage anew. In free-running mode there is the second stage alone, again and again.
//!
//! The counter is clocked by the PCI clock divided by 2¹⁵, or 2⁵; that clock has 32.768 MHz here,
//! so the slow ticks are milliseconds. The interrupt, on the chip an input of a second I/O APIC, is
//! the function's INTA#. There is no SMI.

use core::ops::Range;

use arch::Nanos;
use serde::{Deserialize, Serialize};

use crate::{
    map,
    pci::{BarKind, ConfigSpace, FIXED_PORTS, PciFunction},
};

// In configuration space (§16.4).
const CONFIG: u16 = 0x60;
const LOCK: u16 = 0x68;

/// [`CONFIG`]: nothing at the end of the first stage (3), an SMI (2), or an interrupt (0).
const INT_TYPE: u32 = 3;
const INT_OFF: u32 = 3;
/// [`CONFIG`]: the fast clock.
const FAST: u32 = 1 << 2;
/// [`CONFIG`]: WDT_TOUT# is not driven.
const OUTPUT_OFF: u32 = 1 << 5;

/// [`LOCK`]: the register stays as it is until the next reset.
const LOCKED: u32 = 1 << 0;
/// [`LOCK`]: the counter runs.
pub(crate) const ENABLE: u32 = 1 << 1;
/// [`LOCK`]: free-running mode.
const FREE_RUNNING: u32 = 1 << 2;
const LOCK_WRITABLE: [u8; 1] = [(LOCKED | ENABLE | FREE_RUNNING) as u8];

// In memory (§16.5), and at the fixed ports.
pub(crate) const PRELOAD_1: u16 = 0x0;
pub(crate) const PRELOAD_2: u16 = 0x4;
const INTERRUPT: u16 = 0x8;
pub(crate) const RELOAD: u16 = 0xc;
/// Only at the fixed ports: [`LOCK`].
pub(crate) const LOCK_PORT: u16 = 0x10;

/// Bits of a preload value.
pub(crate) const PRELOAD_MASK: u32 = 0xf_ffff;
/// [`RELOAD`]: start the first stage.
pub(crate) const RELOAD_NOW: u32 = 1 << 8;
/// [`RELOAD`]: the second stage came to its end; not lost in a reset.
pub(crate) const TIMED_OUT: u32 = 1 << 9;
/// What is to be written to [`RELOAD`] before each write to a preload value or to [`RELOAD`].
pub(crate) const UNLOCK: [u8; 2] = [0x80, 0x86];

/// The watchdog.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Watchdog {
    config: ConfigSpace,
    preload: [u32; 2],
    /// WDT_INT_ACT.
    interrupt: bool,
    /// WDT_TIMEOUT.
    timed_out: bool,
    /// How much of [`UNLOCK`] was written.
    unlocked: u8,
    /// Enabled, and to be loaded at the next tick.
    starting: bool,
    second_stage: bool,
    /// When the stage ends; never if the counter stands.
    deadline: Nanos,
    /// WDT_TOUT# was driven and nobody took notice yet.
    expired: bool,
}

impl Watchdog {
    /// After power-on.
    #[must_use]
    pub fn new() -> Option<Self> {
        let mut config = ConfigSpace::new(0x8086, 0x25ab, 0x08_8000, 0, false)
            .with_interrupt_pin(1)
            .with_bar(0, BarKind::Memory32, 16, false)?;
        config.allow(CONFIG, &[(INT_TYPE | FAST | OUTPUT_OFF) as u8]);
        config.allow(LOCK, &LOCK_WRITABLE);
        Some(Self::with(config))
    }

    const fn with(config: ConfigSpace) -> Self {
        Self {
            config,
            preload: [PRELOAD_MASK; 2],
            interrupt: false,
            timed_out: false,
            unlocked: 0,
            starting: false,
            second_stage: false,
            deadline: Nanos::NEVER,
            expired: false,
        }
    }

    fn is_set(&self, register: u16, bit: u32) -> bool {
        self.config.get(register, 1) & bit != 0
    }

    /// Loads the counter for a stage that begins at `now`.
    fn load(&mut self, second: bool, now: Nanos) {
        self.second_stage = second || self.is_set(LOCK, FREE_RUNNING);
        let ticks = u64::from(self.preload[usize::from(self.second_stage)].max(1));
        let shift = if self.is_set(CONFIG, FAST) { 10 } else { 0 };
        self.deadline = now + ((ticks * 1_000_000) >> shift);
    }

    fn register(&self, offset: u16) -> u32 {
        match offset & !3 {
            PRELOAD_1 => self.preload[0],
            PRELOAD_2 => self.preload[1],
            INTERRUPT => self.interrupt.into(),
            RELOAD => u32::from(self.timed_out) * TIMED_OUT,
            LOCK_PORT => self.config.get(LOCK, 1),
            _ => 0,
        }
    }

    /// The offset of a register, if there is one in this place.
    fn offset(bar: u8, offset: u64) -> Option<u16> {
        let end = if bar == FIXED_PORTS {
            LOCK_PORT + 1
        } else {
            LOCK_PORT
        };
        u16::try_from(offset).ok().filter(|offset| *offset < end)
    }
}

impl PciFunction for Watchdog {
    fn config(&self) -> &ConfigSpace {
        &self.config
    }

    fn config_mut(&mut self) -> &mut ConfigSpace {
        &mut self.config
    }

    fn config_written(&mut self, offset: u16, size: u8) {
        if !(offset..offset.saturating_add(size.into())).contains(&LOCK) {
            return;
        }
        if self.is_set(LOCK, LOCKED) {
            self.config.allow(LOCK, &[0]);
        }
        let runs = self.starting || self.deadline != Nanos::NEVER;
        match (self.is_set(LOCK, ENABLE), runs) {
            (true, false) => self.starting = true,
            (false, true) => {
                self.starting = false;
                self.deadline = Nanos::NEVER;
            }
            _ => {}
        }
    }

    fn fixed_ports(&self) -> Option<Range<u64>> {
        Some(map::WATCHDOG.start.into()..map::WATCHDOG.end.into())
    }

    fn read(&mut self, bar: u8, offset: u64, size: u8, now: Nanos) -> u64 {
        self.tick(now);
        let Some(offset) = Self::offset(bar, offset) else {
            return 0;
        };
        let both = [offset, offset + 4].map(|at| u64::from(self.register(at)));
        let value = (both[1] << 32 | both[0]) >> (8 * (offset & 3));
        value & u64::MAX >> (64 - 8 * u32::from(size.clamp(1, 8)))
    }

    fn write(&mut self, bar: u8, offset: u64, size: u8, value: u64, now: Nanos) {
        self.tick(now);
        let Some(offset) = Self::offset(bar, offset) else {
            return;
        };
        let mask = u32::MAX >> (32 - 8 * u32::from(size.clamp(1, 4)));
        let value = value as u32 & mask;
        let step = usize::from(self.unlocked);
        if offset == RELOAD && UNLOCK.get(step).is_some_and(|key| value == u32::from(*key)) {
            self.unlocked += 1;
            return;
        }
        self.unlocked = u8::from(offset == RELOAD && value == u32::from(UNLOCK[0]));
        let open = step == UNLOCK.len();
        let (value, mask) = (value << (8 * (offset & 3)), mask << (8 * (offset & 3)));
        match offset & !3 {
            register @ (PRELOAD_1 | PRELOAD_2) if open => {
                let preload = &mut self.preload[usize::from(register == PRELOAD_2)];
                *preload = (*preload & !mask | value) & PRELOAD_MASK;
            }
            INTERRUPT if value & 1 != 0 => self.interrupt = false,
            RELOAD if open => {
                if value & TIMED_OUT != 0 {
                    self.timed_out = false;
                }
                if value & RELOAD_NOW != 0 && self.deadline != Nanos::NEVER {
                    self.load(false, now);
                }
            }
            LOCK_PORT => {
                self.config.write(LOCK, 1, value);
                self.config_written(LOCK, 1);
            }
            _ => {}
        }
    }

    fn tick(&mut self, now: Nanos) {
        if self.starting {
            self.starting = false;
            self.load(false, now);
        }
        // At most the ends of both stages: what follows the second begins now.
        while self.deadline <= now && self.deadline != Nanos::NEVER {
            if !self.second_stage {
                self.interrupt |= self.config.get(CONFIG, 1) & INT_TYPE != INT_OFF;
                self.load(true, self.deadline);
                continue;
            }
            self.timed_out = true;
            self.expired |= !self.is_set(CONFIG, OUTPUT_OFF);
            self.deadline = Nanos::NEVER;
            if self.is_set(LOCK, FREE_RUNNING) {
                self.load(true, now);
            }
        }
    }

    fn next_event(&self) -> Nanos {
        if self.starting || self.expired {
            Nanos::ZERO
        } else {
            self.deadline
        }
    }

    fn interrupt(&self) -> bool {
        self.interrupt && self.config.get(CONFIG, 1) & INT_TYPE == 0
    }

    fn take_expiry(&mut self) -> bool {
        core::mem::take(&mut self.expired)
    }

    fn reset(&mut self) {
        // The bus resets what a guest can write.
        self.config.allow(LOCK, &LOCK_WRITABLE);
        *self = Self {
            timed_out: self.timed_out,
            ..Self::with(self.config.clone())
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pci::{DeviceFunction, Pci};
    use alloc::{boxed::Box, vec::Vec};

    const MS: u64 = 1_000_000;
    const BASE: u64 = 0xc000_1000;

    /// A bus with a watchdog whose registers are placed.
    fn bus() -> (Pci, DeviceFunction) {
        let place = DeviceFunction::new(29, 0).unwrap();
        let mut pci = Pci::new(Vec::new());
        pci.plug(place, Box::new(Watchdog::new().unwrap())).unwrap();
        let config = |register: u64| u64::from(place.device()) << 15 | register;
        pci.write_ecam(config(0x10), 4, BASE);
        pci.write_ecam(config(4), 2, 2);
        (pci, place)
    }

    struct World {
        pci: Pci,
        now: Nanos,
    }

    impl World {
        fn new() -> Self {
            let (pci, _) = bus();
            Self {
                pci,
                now: Nanos(5 * MS),
            }
        }

        fn config(&mut self, register: u64, value: u64) {
            self.pci.write_ecam(29 << 15 | register, 1, value);
            self.pci.tick(self.now);
        }

        fn put(&mut self, offset: u64, size: u8, value: u64) {
            assert!(self.pci.write(false, BASE + offset, size, value, self.now));
        }

        fn get(&mut self, offset: u64, size: u8) -> u64 {
            self.pci.read(false, BASE + offset, size, self.now).unwrap()
        }

        fn unlock(&mut self) {
            self.put(0xc, 2, 0x80);
            self.put(0xc, 2, 0x86);
        }

        /// As Linux's driver sets it up: `ticks` a stage, no interrupt.
        fn start(&mut self, ticks: u64) {
            self.config(0x60, 3);
            self.unlock();
            self.put(0x0, 4, ticks);
            self.unlock();
            self.put(0x4, 4, ticks);
            self.config(0x68, 2);
        }

        fn reload(&mut self) {
            self.unlock();
            self.put(0xc, 2, 0x100);
        }

        fn wait(&mut self, ms: u64) -> bool {
            self.now = self.now + ms * MS;
            self.pci.tick(self.now);
            self.pci.take_expiry()
        }
    }

    #[test]
    fn it_expires_at_the_end_of_the_second_stage_unless_it_is_reloaded() {
        let mut world = World::new();
        world.start(512);
        assert_eq!(world.pci.next_event(), world.now + 512 * MS);
        for _ in 0..10 {
            assert!(!world.wait(1000), "in the second stage");
            world.reload();
        }
        assert!(!world.wait(1023));
        assert!(world.wait(1));
        assert!(!world.wait(10_000), "once");
        assert_eq!(world.get(0xc, 2), 0x200);
        assert_eq!(world.pci.next_event(), Nanos::NEVER);
        world.pci.reset();
        assert_eq!(world.pci.read_ecam(29 << 15 | 0x68, 1), 0);
        world.config(4, 2);
        world.pci.write_ecam(29 << 15 | 0x10, 4, BASE);
        assert_eq!(world.get(0xc, 2), 0x200, "it tells of the time before");
        assert_eq!(world.get(0, 4), 0xf_ffff);
        world.unlock();
        world.put(0xc, 2, 0x200);
        assert_eq!(world.get(0xc, 2), 0);
    }

    #[test]
    fn registers_take_a_value_after_the_sequence_alone() {
        let mut world = World::new();
        world.put(0, 4, 5);
        world.put(0xc, 1, 0x86);
        world.put(0, 4, 5);
        world.put(0xc, 1, 0x80);
        world.put(0, 4, 5);
        world.put(0xc, 1, 0x86);
        world.put(0, 4, 5);
        assert_eq!(world.get(0, 4), 0xf_ffff);
        world.put(0xc, 1, 0x80);
        world.unlock();
        world.put(0, 4, 0xffa_bcde);
        assert_eq!(world.get(0, 4), 0xa_bcde, "twenty bits");
        assert_eq!(world.get(1, 1), 0xbc);
        world.put(0, 4, 5);
        assert_eq!(world.get(0, 8), 0xf_ffff_000a_bcde, "and it locks again");
    }

    #[test]
    fn it_stops_and_can_be_kept_from_stopping() {
        let mut world = World::new();
        world.start(10);
        world.config(0x68, 0);
        assert!(!world.wait(1_000));
        world.config(0x68, 3);
        world.config(0x68, 0);
        assert_eq!(world.pci.read_ecam(29 << 15 | 0x68, 1), 3, "locked");
        assert!(world.wait(20));
        world.pci.reset();
        assert_eq!(world.pci.read_ecam(29 << 15 | 0x68, 1), 0, "until a reset");
        world.config(0x68, 2);
        assert_eq!(world.pci.read_ecam(29 << 15 | 0x68, 1), 2);
    }

    #[test]
    fn the_first_stage_may_interrupt_and_the_second_be_silent() {
        let mut world = World::new();
        world.start(10);
        world.config(0x60, 1 << 5);
        assert!(!world.wait(10));
        assert!(world.pci.interrupts().contains(&true));
        assert_eq!(world.get(8, 4), 1);
        world.put(8, 4, 1);
        assert!(!world.pci.interrupts().contains(&true));
        assert!(!world.wait(10), "the output is off");
        assert_eq!(world.get(0xc, 4), 0x200);
        world.config(0x68, 0);
        world.config(0x68, 2);
        world.config(0x60, 2 | 1 << 5);
        assert!(!world.wait(10));
        assert_eq!(world.get(8, 4), 1, "an SMI was meant");
        assert!(!world.pci.interrupts().contains(&true));
    }

    #[test]
    fn free_running_is_the_second_stage_again_and_again() {
        let mut world = World::new();
        world.start(10);
        world.config(0x68, 0);
        world.config(0x68, 6);
        for _ in 0..3 {
            assert!(!world.wait(9));
            assert!(world.wait(1));
        }
        world.config(0x60, 7);
        assert!(world.wait(1_000_000), "however long nobody looked");
        world.config(0x68, 0);
        world.config(0x68, 6);
        assert_eq!(world.pci.next_event(), world.now + 9_765, "the fast clock");
    }

    #[test]
    fn the_ports_are_the_same_registers() {
        let mut world = World::new();
        let port = u64::from(map::WATCHDOG.start);
        let put = |world: &mut World, offset: u64, size, value| {
            assert!(world.pci.write(true, port + offset, size, value, world.now));
            world.pci.tick(world.now);
        };
        for (register, ticks) in [(0, 30_000), (4, 1)] {
            put(&mut world, 0xc, 1, 0x80);
            put(&mut world, 0xc, 1, 0x86);
            put(&mut world, register, 4, ticks);
        }
        put(&mut world, 0x10, 1, 2);
        assert_eq!(world.pci.read(true, port + 0x10, 1, world.now), Some(2));
        assert_eq!(world.get(0, 4), 30_000);
        assert!(!world.wait(30_000));
        assert!(world.wait(1));
        assert!(world.pci.read(true, port + 0x14, 1, world.now).is_none());
        assert_eq!(world.get(0x10, 1), 0, "not in memory");
    }

    #[test]
    fn no_access_does_harm() {
        let mut random = crate::random::Random(11);
        let mut world = World::new();
        for _ in 0..200_000 {
            let size = 1 << (random.next() % 4);
            let value = match random.next() % 4 {
                0 => 0x80,
                1 => 0x86,
                _ => random.next() >> (random.next() % 64),
            };
            match random.next() % 5 {
                0 => world
                    .pci
                    .write_ecam(29 << 15 | 0x60 | (random.next() % 12), size, value),
                1 => drop(
                    world
                        .pci
                        .read(false, BASE + random.next() % 32, size, world.now),
                ),
                2 => {
                    _ = world
                        .pci
                        .write(true, 0x640 + random.next() % 24, size, value, world.now)
                }
                3 => _ = world.wait((random.next() >> (random.next() % 64)) >> 20),
                _ => {
                    _ = world
                        .pci
                        .write(false, BASE + random.next() % 32, size, value, world.now)
                }
            }
            assert!(world.pci.next_event() >= Nanos::ZERO);
        }
    }
}
