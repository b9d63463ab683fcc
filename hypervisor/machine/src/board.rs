//! The board: every device of the virtual PC, the one place where an access finds its device and
//! where an interrupt line is carried to the 8259A pair and the I/O APIC.
//!
//! Ports and fixed memory ranges are matched on constants; only what PCI base address registers
//! decode is looked up. An access wider than its device is split into bytes, as on an ISA bus.
//! What nobody claims reads as ones, and its writes are ignored; both are counted.
//!
//! What happens outside of the board is asked for in [`Actions`]. Deadlines are kept per device,
//! so that [`Board::next_event`] is a load.

use alloc::{boxed::Box, vec, vec::Vec};
use core::ops::Range;

use arch::{GuestMemory, Nanos, Vector};
use serde::{Deserialize, Serialize};

use crate::{
    apic::{IoApic, Router},
    debug::Debug,
    hpet::{Hpet, Output, Route},
    i8042::{I8042, Request},
    map,
    pci::{DeviceFunction, Pci, PciState},
    pic::PicPair,
    pit::Pit,
    pm::{Pm, ResetControl},
    rtc::Rtc,
    uart::Uart,
    watchdog::Watchdog,
};

/// What a board is made of.
#[derive(Clone, Copy, Debug)]
pub struct BoardConfig {
    /// vCPUs, to which interrupts are routed.
    pub vcpus: u32,
    /// Bytes of memory below 4 GiB.
    pub low_ram: u64,
    /// Bytes of memory above 4 GiB.
    pub high_ram: u64,
    /// The wall clock at power-on: nanoseconds since 1970, UTC.
    pub wall_clock: u64,
    /// Whether there is an HPET.
    pub hpet: bool,
    /// Whether port 0xf4 ends the VM.
    pub debug_exit: bool,
    /// Whether port 0xe9 prints.
    pub debug_console: bool,
    /// Whether there is a watchdog.
    pub watchdog: bool,
}

/// Who asked for a reset.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ResetCause {
    /// The 8042's reset line.
    KeyboardController,
    /// Port 0x92.
    FastReset,
    /// The reset control register at port 0xcf9.
    ResetControl {
        /// The whole machine rather than the processor.
        hard: bool,
    },
}

/// What the board asks of its owner.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Actions {
    /// The guest went into soft-off.
    pub power_off: bool,
    /// The guest resets.
    pub reset: Option<ResetCause>,
    /// The guest ends with this code, by port 0xf4.
    pub exit_code: Option<u32>,
    /// The watchdog ran out.
    pub watchdog: bool,
    /// There is something for [`Board::console_output`].
    pub console: bool,
}

/// Accesses that nobody claimed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Unclaimed {
    /// Port accesses, by bytes.
    pub ports: u64,
    /// Memory accesses.
    pub memory: u64,
}

/// Where in [`Board::deadlines`] a device has its own.
#[derive(Clone, Copy)]
enum Timed {
    Pit,
    Rtc,
    Uart,
    Pm,
    Hpet,
    Pci,
}
const TIMED: usize = 6;

#[derive(Clone, Debug, Serialize, Deserialize)]
struct Devices {
    pic: PicPair,
    pit: Pit,
    rtc: Rtc,
    uart: Uart,
    i8042: I8042,
    pm: Pm,
    hpet: Option<Hpet>,
    reset_control: ResetControl,
    /// Port 0x92 bit 0; bit 1 is the 8042's A20.
    fast_reset: bool,
    debug: Debug,
    /// Levels of ISA interrupts 0 to 15 as they were last carried on.
    irqs: u16,
    /// Levels of the PCI interrupt lines as they were last carried on.
    intx: [bool; 4],
    /// Levels of the HPET's own pins as they were last carried on.
    hpet_pins: u32,
    unclaimed: Unclaimed,
}

/// All of a board's state, for saving, besides that of plugged PCI functions.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct BoardState {
    devices: Devices,
    pci: PciState,
    io_apic: IoApic,
}

/// A virtual PC without its processors.
pub struct Board {
    /// The I/O APIC, and the ways to the local APICs, which their vCPUs own. Local APICs' pages
    /// are not on the board's bus: an access is made by one vCPU, which the caller knows.
    pub apic: Router,
    /// The PCI root, to plug functions in.
    pub pci: Pci,
    devices: Devices,
    /// The 8259A pair's output as it was last carried on.
    extint: bool,
    actions: Actions,
    acting: bool,
    /// A function has something for [`Board::serve`].
    serving: bool,
    /// The guest printed last at a console behind PCI: what is typed goes there.
    pci_console: bool,
    deadlines: [Nanos; TIMED],
    next: Nanos,
}

/// The least time between two ticks, in nanoseconds: a guest can program a timer to be due again
/// (HPET: each 100 ns) before it has run an instruction.
const MIN_TICK: u64 = 10_000;

const PM_END: u16 = map::PM_BLOCK.end - 1;
const COM1_END: u16 = map::COM1 + 7;
const IO_APIC_END: u64 = map::IO_APIC + 0xfff;
const HPET_END: u64 = map::HPET + 0x3ff;
const ECAM_END: u64 = map::ECAM.end - 1;

/// What no base address register may cover.
fn fixed_ranges(config: &BoardConfig) -> Vec<Range<u64>> {
    vec![
        0..config.low_ram.clamp(map::ROM_AREA.end, map::LOW_RAM_END),
        map::ECAM,
        map::IO_APIC..map::IO_APIC + 0x1000,
        map::HPET..map::HPET + 0x1000,
        map::LOCAL_APIC..map::LOCAL_APIC + 0x10_0000,
        map::HIGH_RAM..map::HIGH_RAM.saturating_add(config.high_ram),
    ]
}

impl Board {
    /// A board at power-on, as firmware hands it over.
    #[must_use]
    pub fn new(config: &BoardConfig) -> Self {
        let mut board = Self {
            apic: Router::new(config.vcpus),
            pci: Pci::new(fixed_ranges(config)),
            devices: Devices {
                pic: PicPair::new(),
                pit: Pit::new(),
                rtc: Rtc::new(config.wall_clock, config.low_ram, config.high_ram),
                uart: Uart::new(),
                i8042: I8042::new(),
                pm: Pm::new(true),
                hpet: config.hpet.then(Hpet::default),
                reset_control: ResetControl::default(),
                fast_reset: false,
                debug: Debug::new(config.debug_exit, config.debug_console),
                irqs: 0,
                intx: [false; 4],
                hpet_pins: 0,
                unclaimed: Unclaimed::default(),
            },
            extint: false,
            actions: Actions::default(),
            acting: false,
            serving: false,
            pci_console: false,
            deadlines: [Nanos::NEVER; TIMED],
            next: Nanos::NEVER,
        };
        if config.watchdog
            && let Some(place) = DeviceFunction::new(map::WATCHDOG_DEVICE, 0)
            && let Some(watchdog) = Watchdog::new()
        {
            // The bus is empty.
            let _ = board.pci.plug(place, Box::new(watchdog));
        }
        board.carry_all(Nanos::ZERO);
        board
    }

    /// Resets the machine at `now`. Time of day, CMOS memory and what waits at the console stay.
    pub fn reset(&mut self, now: Nanos) {
        for irq in 0..16 {
            self.set_irq(irq, false);
        }
        for line in 0..4 {
            self.set_intx(line, false);
        }
        if let Some(hpet) = &mut self.devices.hpet {
            *hpet = Hpet::default();
            self.carry_hpet();
        }
        self.apic.reset();
        self.pci.reset();
        let devices = &mut self.devices;
        devices.pic.reset();
        devices.pit.reset(now);
        devices.rtc.reset(now);
        devices.uart.reset();
        devices.i8042.reset();
        devices.pm.reset(now);
        devices.reset_control = ResetControl::default();
        devices.fast_reset = false;
        self.actions = Actions::default();
        self.acting = false;
        self.pci_console = false;
        self.carry_all(now);
    }

    /// All state, for saving.
    #[must_use]
    pub fn save(&self) -> BoardState {
        BoardState {
            devices: self.devices.clone(),
            pci: self.pci.save(),
            io_apic: self.apic.io.clone(),
        }
    }

    /// Puts saved state in place, on a board of the same configuration on which the same functions
    /// are plugged in and have their own state already.
    pub fn restore(&mut self, state: BoardState) {
        self.apic.restore(state.io_apic);
        self.pci.restore(state.pci);
        self.devices = state.devices;
        self.extint = self.devices.pic.interrupt();
        self.apic.set_extint(self.extint);
        self.carry_lines();
        self.act(|actions| actions.console = true);
    }

    // ---- ports ----

    /// Reads a byte of the 8259A pair, which needs to know no time; `None` for other ports.
    #[inline(always)]
    pub fn pic_read(&mut self, port: u16) -> Option<u8> {
        if !map::is_pic(port) {
            return None;
        }
        let value = self.devices.pic.read(port);
        self.carry_pic();
        Some(value)
    }

    /// Writes a byte to the 8259A pair, which needs to know no time; `false` for other ports.
    #[inline(always)]
    pub fn pic_write(&mut self, port: u16, value: u8) -> bool {
        let own = map::is_pic(port);
        if own {
            self.devices.pic.write(port, value);
            self.carry_pic();
        }
        own
    }

    /// Reads `size` (1, 2, 4) bytes at `port`.
    #[inline]
    pub fn port_read(&mut self, port: u16, size: u8, now: Nanos) -> u32 {
        if size == 1 {
            self.read8(port, now).into()
        } else {
            self.read_wide(port, size, now)
        }
    }

    /// Writes the low `size` (1, 2, 4) bytes of `value` to `port`.
    #[inline]
    pub fn port_write(&mut self, port: u16, size: u8, value: u32, now: Nanos) {
        if size == 1 {
            self.write8(port, value as u8, now);
        } else {
            self.write_wide(port, size, value, now);
        }
    }

    #[inline(always)]
    fn read8(&mut self, port: u16, now: Nanos) -> u8 {
        let devices = &mut self.devices;
        match port {
            0x20 | 0x21 | 0xa0 | 0xa1 | 0x4d0 | 0x4d1 => {
                let value = devices.pic.read(port);
                self.carry_pic();
                value
            }
            0x40..=0x43 | 0x61 => {
                let value = devices.pit.read(port, now);
                if port == 0x40 {
                    self.carry_pit();
                }
                value
            }
            0x60 => {
                let value = devices.i8042.read(port);
                self.carry_i8042();
                value
            }
            0x64 => devices.i8042.read(port),
            0x70..=0x73 => {
                let value = devices.rtc.read(port, now);
                self.carry_rtc();
                value
            }
            0x80 => devices.debug.post(),
            0x92 => u8::from(devices.fast_reset) | u8::from(devices.i8042.a20()) << 1,
            0xf4 if devices.debug.exit_enabled() => 0,
            map::DEBUG_CONSOLE => match devices.debug.read_console() {
                Some(value) => value,
                None => self.nobody(),
            },
            map::COM1..=COM1_END => {
                let value = devices.uart.read(port - map::COM1, now);
                self.carry_uart();
                value
            }
            0x600..=PM_END => {
                let value = devices.pm.read(port - map::PM_BLOCK.start, 1, now);
                self.carry_pm();
                value as u8
            }
            map::RESET => devices.reset_control.read(),
            0xcfc..=0xcff => match self.pci.read_data(port & 3, 1) {
                Some(value) => value as u8,
                None => self.nobody(),
            },
            _ => match self.pci.read(true, port.into(), 1, now) {
                Some(value) => {
                    self.carry_pci();
                    value as u8
                }
                None => self.nobody(),
            },
        }
    }

    #[inline(always)]
    fn write8(&mut self, port: u16, value: u8, now: Nanos) {
        let devices = &mut self.devices;
        match port {
            0x20 | 0x21 | 0xa0 | 0xa1 | 0x4d0 | 0x4d1 => {
                devices.pic.write(port, value);
                self.carry_pic();
            }
            0x40..=0x43 | 0x61 => {
                devices.pit.write(port, value, now);
                if port != 0x61 {
                    self.carry_pit();
                }
            }
            0x60 | 0x64 => {
                if devices.i8042.write(port, value) == Request::Reset {
                    self.ask_reset(ResetCause::KeyboardController);
                }
                self.carry_i8042();
            }
            0x70..=0x73 => {
                devices.rtc.write(port, value, now);
                self.carry_rtc();
            }
            0x80 => devices.debug.set_post(value),
            0x92 => {
                let pulse = value & 1 != 0 && !devices.fast_reset;
                devices.fast_reset = value & 1 != 0;
                devices.i8042.set_a20(value & 2 != 0);
                if pulse {
                    self.ask_reset(ResetCause::FastReset);
                }
            }
            map::DEBUG_EXIT => self.debug_exit(value.into()),
            map::DEBUG_CONSOLE => {
                if devices.debug.write_console(&[value]) {
                    self.act(|actions| actions.console = true);
                } else {
                    self.nobody();
                }
            }
            map::DEBUG_SHUTDOWN => match devices.debug.write_shutdown(value) {
                Some(true) => self.act(|actions| actions.power_off = true),
                Some(false) => {}
                None => _ = self.nobody(),
            },
            map::COM1..=COM1_END => {
                devices.uart.write(port - map::COM1, value, now);
                self.carry_uart();
            }
            0x600..=PM_END => self.write_pm(port, 1, value.into(), now),
            map::RESET => {
                if let Some(hard) = devices.reset_control.write(value) {
                    self.ask_reset(ResetCause::ResetControl { hard });
                }
            }
            0xcfc..=0xcff => {
                if self.pci.write_data(port & 3, 1, value.into()) {
                    self.carry_pci();
                } else {
                    self.nobody();
                }
            }
            _ => {
                if self.pci.write(true, port.into(), 1, value.into(), now) {
                    self.carry_pci();
                } else {
                    self.nobody();
                }
            }
        }
    }

    #[inline(never)]
    fn read_wide(&mut self, port: u16, size: u8, now: Nanos) -> u32 {
        let whole = port & 3 <= 4 - u16::from(size.min(4));
        match port {
            0xcf8 if size == 4 => return self.pci.read_address(),
            0xcfc..=0xcff if whole => {
                if let Some(value) = self.pci.read_data(port & 3, size) {
                    return value;
                }
            }
            0x600..=PM_END if whole => {
                let value = self.devices.pm.read(port - map::PM_BLOCK.start, size, now);
                self.carry_pm();
                return value;
            }
            map::DEBUG_EXIT if self.devices.debug.exit_enabled() => return 0,
            _ => {
                if let Some(value) = self.pci.read(true, port.into(), size, now) {
                    self.carry_pci();
                    return value as u32;
                }
            }
        }
        (0..u16::from(size.min(4))).rev().fold(0, |value, index| {
            // The address wraps nowhere: beyond the last port there is nobody.
            let byte = match port.checked_add(index) {
                Some(port) => self.read8(port, now),
                None => self.nobody(),
            };
            value << 8 | u32::from(byte)
        })
    }

    #[inline(never)]
    fn write_wide(&mut self, port: u16, size: u8, value: u32, now: Nanos) {
        let whole = port & 3 <= 4 - u16::from(size.min(4));
        match port {
            0xcf8 if size == 4 => return self.pci.write_address(value),
            0xcfc..=0xcff if whole => {
                if self.pci.write_data(port & 3, size, value) {
                    return self.carry_pci();
                }
            }
            0x600..=PM_END if whole => return self.write_pm(port, size, value, now),
            map::DEBUG_EXIT if self.devices.debug.exit_enabled() => return self.debug_exit(value),
            _ => {
                if self.pci.write(true, port.into(), size, value.into(), now) {
                    return self.carry_pci();
                }
            }
        }
        for (index, byte) in (0..).zip(value.to_le_bytes()).take(size.into()) {
            match port.checked_add(index) {
                Some(port) => self.write8(port, byte, now),
                None => _ = self.nobody(),
            }
        }
    }

    fn write_pm(&mut self, port: u16, size: u8, value: u32, now: Nanos) {
        if self
            .devices
            .pm
            .write(port - map::PM_BLOCK.start, size, value, now)
        {
            self.act(|actions| actions.power_off = true);
        }
        self.carry_pm();
    }

    fn debug_exit(&mut self, value: u32) {
        if self.devices.debug.exit_enabled() {
            self.act(|actions| actions.exit_code = Some(Debug::exit_code(value)));
        } else {
            self.nobody();
        }
    }

    /// What a port gives that nobody decodes.
    #[cold]
    fn nobody(&mut self) -> u8 {
        let count = &mut self.devices.unclaimed.ports;
        *count = count.wrapping_add(1);
        0xff
    }

    // ---- memory ----

    /// Reads `size` (1, 2, 4, 8) bytes of device memory at `address`.
    #[inline(never)]
    pub fn mmio_read(&mut self, address: u64, size: u8, now: Nanos) -> u64 {
        let ones = u64::MAX >> (64 - 8 * u32::from(size.clamp(1, 8)));
        match address {
            map::IO_APIC..=IO_APIC_END => {
                // Registers are 32 bits wide and aligned; a narrower read sees its bytes.
                let register = self.apic.io.read((address & 0xffc) as u16);
                u64::from(register) >> (8 * (address & 3)) & ones
            }
            map::HPET..=HPET_END if let Some(hpet) = &mut self.devices.hpet => {
                let value = hpet.read((address & 0x3ff) as u16, size, now);
                self.carry_hpet();
                value
            }
            0xe000_0000..=ECAM_END => self.pci.read_ecam(address - map::ECAM.start, size),
            _ => match self.pci.read(false, address, size, now) {
                Some(value) => {
                    self.carry_pci();
                    value & ones
                }
                None => {
                    self.devices.unclaimed.memory = self.devices.unclaimed.memory.wrapping_add(1);
                    ones
                }
            },
        }
    }

    /// Writes the low `size` (1, 2, 4, 8) bytes of `value` to device memory at `address`.
    #[inline(never)]
    pub fn mmio_write(&mut self, address: u64, size: u8, value: u64, now: Nanos) {
        match address {
            map::IO_APIC..=IO_APIC_END => {
                // The datasheet allows aligned 32-bit writes only.
                if size >= 4 && address & 3 == 0 {
                    self.apic.write_io((address & 0xffc) as u16, value as u32);
                }
            }
            map::HPET..=HPET_END if let Some(hpet) = &mut self.devices.hpet => {
                hpet.write((address & 0x3ff) as u16, size, value, now);
                self.carry_hpet();
                // It may have taken over, or given back, their interrupts.
                self.carry_pit();
                self.carry_rtc();
            }
            0xe000_0000..=ECAM_END => {
                self.pci.write_ecam(address - map::ECAM.start, size, value);
                self.carry_pci();
            }
            _ => {
                if self.pci.write(false, address, size, value, now) {
                    self.carry_pci();
                } else {
                    self.devices.unclaimed.memory = self.devices.unclaimed.memory.wrapping_add(1);
                }
            }
        }
    }

    // ---- time ----

    /// When [`Board::tick`] is to be called at the latest.
    #[inline]
    #[must_use]
    pub const fn next_event(&self) -> Nanos {
        self.next
    }

    /// Works out what happened up to now. Takes bounded time, however much of it passed.
    pub fn tick(&mut self, now: Nanos) {
        if now >= self.next {
            self.carry_all(now);
        }
    }

    fn carry_all(&mut self, now: Nanos) {
        let devices = &mut self.devices;
        devices.pit.tick(now);
        devices.rtc.tick(now);
        devices.uart.tick(now);
        devices.pm.tick(now);
        if let Some(hpet) = &mut devices.hpet {
            hpet.tick(now);
        }
        self.pci.tick(now);
        if self.pci.take_expiry() {
            self.act(|actions| actions.watchdog = true);
        }
        self.carry_lines();
        self.next = self.next.max(now + MIN_TICK);
    }

    fn carry_lines(&mut self) {
        self.carry_pic();
        self.carry_pit();
        self.carry_rtc();
        self.carry_uart();
        self.carry_i8042();
        self.carry_pm();
        self.carry_hpet();
        self.carry_pci();
    }

    #[inline]
    fn set_deadline(&mut self, device: Timed, deadline: Nanos) {
        let own = &mut self.deadlines[device as usize];
        if *own != deadline {
            *own = deadline;
            self.next = self.deadlines.iter().copied().min().unwrap_or(Nanos::NEVER);
        }
    }

    // ---- lines ----

    /// Carries the level of an ISA interrupt to both controllers. The only way for one.
    fn set_irq(&mut self, irq: u8, level: bool) {
        let bit = 1 << (irq & 15);
        if (self.devices.irqs & bit != 0) == level {
            return;
        }
        self.devices.irqs ^= bit;
        let gsi = if irq == 0 { map::TIMER_GSI } else { irq.into() };
        self.apic.set_gsi(gsi, level);
        self.set_pic(irq, level);
    }

    /// Carries the level of a PCI interrupt line to both controllers. The only way for one.
    fn set_intx(&mut self, line: usize, level: bool) {
        let (Some(own), Some(&gsi), Some(&irq)) = (
            self.devices.intx.get_mut(line),
            map::PCI_INTX_GSI.get(line),
            map::PCI_INTX_PIC.get(line),
        ) else {
            return;
        };
        if *own == level {
            return;
        }
        *own = level;
        self.apic.set_gsi(gsi, level);
        // The 8259A pair sees lines that share an input as one.
        let shared = self
            .devices
            .intx
            .iter()
            .zip(map::PCI_INTX_PIC)
            .any(|(&on, to)| on && to == irq);
        self.set_pic(irq, shared);
    }

    fn set_pic(&mut self, irq: u8, level: bool) {
        self.devices.pic.set_irq(irq, level);
        self.carry_pic();
    }

    /// A line that fell in an access and may be up again makes an edge.
    fn edge(&mut self, irq: u8, dipped: bool, level: bool) {
        if dipped {
            self.set_irq(irq, false);
        }
        self.set_irq(irq, level);
    }

    #[inline(always)]
    fn carry_pic(&mut self) {
        let output = self.devices.pic.interrupt();
        if output != self.extint {
            self.extint = output;
            self.apic.set_extint(output);
        }
    }

    fn carry_pit(&mut self) {
        // A rise that was followed by a fall since the last look is still a request: the guest
        // had no chance to take it in between.
        let rose = self.devices.pit.take_rise();
        if self.hpet_replaces() {
            return self.set_deadline(Timed::Pit, Nanos::NEVER);
        }
        self.edge(0, rose, rose || self.devices.pit.irq());
        self.set_deadline(Timed::Pit, self.devices.pit.next_event());
    }

    fn carry_rtc(&mut self) {
        let irq = self.devices.rtc.irq();
        if irq && self.devices.rtc.alarm() {
            self.devices.pm.rtc_alarm();
            self.carry_pm();
        }
        if !self.hpet_replaces() {
            self.set_irq(8, irq);
        }
        self.set_deadline(Timed::Rtc, self.devices.rtc.next_event());
    }

    fn carry_uart(&mut self) {
        let dipped = self.devices.uart.take_dip();
        self.edge(map::COM1_IRQ, dipped, self.devices.uart.irq());
        self.set_deadline(Timed::Uart, self.devices.uart.next_event());
        if self.devices.uart.has_output() {
            self.act(|actions| actions.console = true);
        }
    }

    fn carry_i8042(&mut self) {
        let dipped = self.devices.i8042.take_dips();
        let levels = self.devices.i8042.irqs();
        self.edge(1, dipped.0, levels.0);
        self.edge(12, dipped.1, levels.1);
    }

    fn carry_pm(&mut self) {
        self.set_irq(map::SCI, self.devices.pm.irq());
        self.set_deadline(Timed::Pm, self.devices.pm.next_event());
    }

    /// Whether ISA interrupts 0 and 8 are the HPET's.
    fn hpet_replaces(&self) -> bool {
        self.devices.hpet.as_ref().is_some_and(Hpet::legacy)
    }

    fn carry_hpet(&mut self) {
        let Some(hpet) = &mut self.devices.hpet else {
            return;
        };
        let deadline = hpet.next_event();
        let outputs = hpet.take_outputs();
        let mut pins = 0;
        for &output in outputs.iter().flatten() {
            match output {
                (Route::Isa(irq), Output::Level(level)) => self.set_irq(irq, level),
                // It stays up, for the 8259A forgets a request whose line falls.
                (Route::Isa(irq), Output::Edge(true)) => self.edge(irq, true, true),
                (Route::Gsi(gsi), Output::Level(level)) => pins |= u32::from(level) << gsi,
                (Route::Gsi(gsi), Output::Edge(true)) => {
                    let level = self.devices.hpet_pins & 1 << gsi != 0;
                    self.apic.set_gsi(gsi, true);
                    self.apic.set_gsi(gsi, level);
                }
                (_, Output::Edge(false)) => {}
            }
        }
        let mut changed = pins ^ self.devices.hpet_pins;
        self.devices.hpet_pins = pins;
        while changed != 0 {
            let gsi = changed.trailing_zeros();
            self.apic.set_gsi(gsi, pins & 1 << gsi != 0);
            changed &= changed - 1;
        }
        self.set_deadline(Timed::Hpet, deadline);
    }

    /// Carries on what plugged functions have to tell. To be called after one of them was given
    /// something from outside of the board.
    pub fn carry_pci(&mut self) {
        if self.pci.is_empty() {
            return;
        }
        // What makes a message may make a level instead.
        let apic = &mut self.apic;
        self.pci
            .take_messages(|msi| _ = apic.msi(msi.address, msi.data));
        for (line, level) in self.pci.interrupts().into_iter().enumerate() {
            self.set_intx(line, level);
        }
        self.serving = self.pci.wants_service();
        self.acting |= self.serving;
        self.set_deadline(Timed::Pci, self.pci.next_event());
    }

    /// Whether the 8259A pair asks for an acknowledge cycle.
    #[inline]
    #[must_use]
    pub const fn pic_interrupt(&self) -> bool {
        self.extint
    }

    /// The acknowledge cycle of a vCPU that takes an ExtINT.
    pub fn pic_acknowledge(&mut self) -> Vector {
        let vector = self.devices.pic.acknowledge();
        self.carry_pic();
        vector
    }

    /// Whether the guest masked NMIs (port 0x70 bit 7).
    #[must_use]
    pub const fn nmi_masked(&self) -> bool {
        self.devices.rtc.nmi_masked()
    }

    // ---- outside ----

    fn act(&mut self, what: impl FnOnce(&mut Actions)) {
        what(&mut self.actions);
        self.acting = true;
    }

    fn ask_reset(&mut self, cause: ResetCause) {
        self.act(|actions| actions.reset = Some(cause));
    }

    /// Whether [`Board::serve`] has something to do.
    #[inline]
    #[must_use]
    pub const fn wants_service(&self) -> bool {
        self.serving
    }

    /// Does a bounded amount of what functions need the guest's memory for: doorbells that were
    /// rung, bytes that were typed.
    pub fn serve(&mut self, mem: &mut dyn GuestMemory, now: Nanos) {
        self.pci.serve(mem, now);
        self.carry_pci();
    }

    /// Whether [`Board::take_actions`] or [`Board::serve`] has something.
    #[inline]
    #[must_use]
    pub const fn has_actions(&self) -> bool {
        self.acting
    }

    /// What was asked for since the last call.
    pub const fn take_actions(&mut self) -> Actions {
        self.acting = self.serving;
        core::mem::replace(
            &mut self.actions,
            Actions {
                power_off: false,
                reset: None,
                exit_code: None,
                watchdog: false,
                console: false,
            },
        )
    }

    /// Hands what the guest printed (first serial port, debug console, consoles behind PCI) to
    /// `print`, in pieces.
    pub fn console_output(&mut self, print: &mut impl FnMut(&[u8])) {
        self.pci_console &= !self.devices.uart.has_output();
        self.devices.uart.take_output(print);
        self.devices.debug.take_output(print);
        self.carry_uart();
        if self.pci.take_output(print) {
            self.pci_console = true;
            self.carry_pci();
        }
    }

    /// Types where the guest printed last: at the first serial port, or a console behind PCI.
    /// Gives how many bytes there is room for.
    pub fn console_input(&mut self, bytes: &[u8], now: Nanos) -> usize {
        if self.pci_console
            && let Some(taken) = self.pci.push_input(bytes)
        {
            self.carry_pci();
            return taken;
        }
        let taken = self.devices.uart.push_input(bytes, now);
        self.carry_uart();
        taken
    }

    /// Presses the power button.
    pub fn power_button(&mut self) {
        self.devices.pm.power_button();
        self.carry_pm();
    }

    /// Raises a general-purpose event, 0 to 15.
    pub fn raise_gpe(&mut self, number: u8) {
        self.devices.pm.raise_gpe(number);
        self.carry_pm();
    }

    /// The last POST code.
    #[must_use]
    pub const fn post(&self) -> u8 {
        self.devices.debug.post()
    }

    /// Accesses that nobody claimed.
    #[must_use]
    pub const fn unclaimed(&self) -> Unclaimed {
        self.devices.unclaimed
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::apic::LocalApic;
    use crate::clock::TscClock;
    use crate::pci::{DeviceFunction, tests::Toy};

    const CONFIG: BoardConfig = BoardConfig {
        vcpus: 1,
        low_ram: 256 << 20,
        high_ram: 0,
        wall_clock: 1_709_164_798_500_000_000,
        hpet: true,
        debug_exit: true,
        debug_console: true,
        watchdog: false,
    };
    const T: Nanos = Nanos(1_000_000);

    fn board() -> Board {
        Board::new(&CONFIG)
    }

    fn out(board: &mut Board, writes: &[(u16, u8)]) {
        for &(port, value) in writes {
            board.port_write(port, 1, value.into(), T);
        }
    }

    /// The 8259A pair at vectors 0x20 and 0x28, everything open.
    fn with_pic() -> Board {
        let mut board = board();
        out(
            &mut board,
            &[
                (0x20, 0x11),
                (0x21, 0x20),
                (0x21, 0x04),
                (0x21, 0x01),
                (0xa0, 0x11),
                (0xa1, 0x28),
                (0xa1, 0x02),
                (0xa1, 0x01),
                (0x21, 0x00),
                (0xa1, 0x00),
            ],
        );
        // The timer's output has been high since power-on.
        while board.pic_interrupt() {
            board.pic_acknowledge();
            out(&mut board, &[(0xa0, 0x20), (0x20, 0x20)]);
        }
        board
    }

    /// Routes an I/O APIC pin to vCPU 0, whose local APIC is switched on.
    fn route(board: &mut Board, pin: u8, entry: u32) -> LocalApic {
        let mut apic = LocalApic::new(0, true, 36, TscClock::new(1_000_000));
        let _ = apic.write_mmio(0xf0, 0x1ff, T);
        board.apic.fabric().publish(&mut apic);
        for (register, value) in [(0x11 + 2 * pin, 0), (0x10 + 2 * pin, entry)] {
            board.mmio_write(map::IO_APIC, 4, register.into(), T);
            board.mmio_write(map::IO_APIC + 0x10, 4, value.into(), T);
        }
        apic
    }

    /// The interrupt that waits in the local APIC.
    fn pending(board: &Board, apic: &mut LocalApic) -> Option<Vector> {
        board.apic.fabric().collect(apic);
        apic.pending()
    }

    fn printed(board: &mut Board) -> String {
        let mut all = Vec::new();
        board.console_output(&mut |bytes| all.extend_from_slice(bytes));
        String::from_utf8(all).unwrap()
    }

    #[test]
    fn the_fastest_timer_leaves_the_guest_time_to_run() {
        let mut board = board();
        let mut now = T;
        // HPET timer 0 periodic at one clock.
        for (offset, value) in [(0x100, 0x4c), (0x108, 1), (0x10, 1)] {
            board.mmio_write(map::HPET + offset, 8, value, now);
        }
        for _ in 0..100 {
            now = now.max(board.next_event());
            board.tick(now);
            assert!(board.next_event() >= now + MIN_TICK);
        }
    }

    #[test]
    fn the_timer_reaches_both_controllers() {
        let mut board = with_pic();
        let mut apic = route(&mut board, 2, 0x30);
        out(&mut board, &[(0x43, 0x34), (0x40, 0xa9), (0x40, 0x04)]); // 1 kHz
        for n in 1..=3 {
            let now = board.next_event();
            assert!(now.since(T).abs_diff(n * 1_000_000) < 2_000, "{now:?}");
            board.tick(now - 1);
            assert!(!board.pic_interrupt());
            board.tick(now);
            assert!(board.pic_interrupt());
            assert_eq!(board.pic_acknowledge(), Vector(0x20));
            out(&mut board, &[(0x20, 0x20)]);
            assert_eq!(pending(&board, &mut apic), Some(Vector(0x30)));
            apic.acknowledge();
            let _ = apic.write_mmio(0xb0, 0, now);
        }
        board.tick(Nanos(10_000_000_000));
        assert_eq!(
            board.pic_acknowledge(),
            Vector(0x20),
            "thousands of ticks are one"
        );
        out(&mut board, &[(0x20, 0x20)]);
        assert!(!board.pic_interrupt());
        assert!(board.next_event() > Nanos(10_000_000_000));
    }

    #[test]
    fn the_hpet_replaces_the_timer() {
        let mut board = with_pic();
        out(&mut board, &[(0x43, 0x34), (0x40, 0xa9), (0x40, 0x04)]);
        let hpet = map::HPET;
        for (offset, value) in [(0x100, 0x4c), (0x108, 50_000), (0x108, 20_000), (0x10, 3)] {
            board.mmio_write(hpet + offset, 8, value, T);
        }
        for due in [5_000_000, 7_000_000, 9_000_000] {
            assert_eq!(board.next_event(), T + due, "the PIT is quiet");
            board.tick(T + due);
            assert_eq!(board.pic_acknowledge(), Vector(0x20));
            out(&mut board, &[(0x20, 0x20)]);
            assert!(!board.pic_interrupt());
        }
        assert_eq!(board.mmio_read(hpet + 0xf0, 4, T + 9_000_000), 90_000);
        board.mmio_write(hpet + 0x10, 4, 0, T + 9_000_000);
        assert!(board.next_event() < T + 11_000_000, "the PIT is back");

        // A timer on its own pin, level triggered.
        let mut apic = route(&mut board, 21, 0x803b);
        board.mmio_write(hpet + 0x120, 4, 0x6 | 21 << 9, T);
        board.mmio_write(hpet + 0x128, 8, 90_010, T);
        board.mmio_write(hpet + 0x10, 4, 1, T + 9_000_000);
        board.tick(T + 9_001_000);
        assert_eq!(pending(&board, &mut apic), Some(Vector(0x3b)));

        let mut without = Board::new(&BoardConfig {
            hpet: false,
            ..CONFIG
        });
        assert_eq!(without.mmio_read(hpet, 8, T), u64::MAX);
    }

    #[test]
    fn the_console() {
        let mut board = with_pic();
        out(
            &mut board,
            &[
                (0x3fb, 0x03),
                (0x3fc, 0x08),
                (0x3f8, b'h'),
                (0x3f8, b'i'),
                (0xe9, b'!'),
            ],
        );
        assert!(board.has_actions());
        let actions = board.take_actions();
        assert_eq!(
            actions,
            Actions {
                console: true,
                ..Actions::default()
            }
        );
        assert_eq!(printed(&mut board), "hi!");
        assert_eq!(board.take_actions(), Actions::default());
        assert_eq!(board.port_read(0xe9, 1, T), 0xe9);

        out(&mut board, &[(0x3f9, 0x01)]);
        assert_eq!(board.console_input(b"x", T), 1);
        assert_eq!(board.pic_acknowledge(), Vector(0x24));
        assert_eq!(board.port_read(0x3f8, 1, T), u32::from(b'x'));
        // The transmitter's interrupt is an edge for every byte.
        out(&mut board, &[(0x20, 0x20), (0x3f9, 0x02)]);
        for _ in 0..3 {
            assert_eq!(board.pic_acknowledge(), Vector(0x24));
            out(&mut board, &[(0x3f8, b'.'), (0x20, 0x20)]);
        }
        assert_eq!(printed(&mut board), "...");
    }

    #[test]
    fn ways_to_end() {
        let ends = |port: u16, size: u8, value: u32| {
            let mut board = board();
            board.port_write(port, size, value, T);
            let actions = board.take_actions();
            assert!(!board.has_actions());
            (actions.power_off, actions.reset, actions.exit_code)
        };
        let reset = |cause| (false, Some(cause), None);
        let hard = ResetCause::ResetControl { hard: true };
        assert_eq!(ends(0x604, 2, 0x3400), (true, None, None));
        assert_eq!(ends(0x604, 2, 0x2000), (false, None, None));
        assert_eq!(ends(0x64, 1, 0xfe), reset(ResetCause::KeyboardController));
        assert_eq!(ends(0x92, 1, 0x01), reset(ResetCause::FastReset));
        assert_eq!(ends(0x92, 1, 0x02), (false, None, None));
        assert_eq!(ends(0xcf9, 1, 0x06), reset(hard));
        assert_eq!(ends(0xcf9, 1, 0x02), (false, None, None));
        for (size, value, code) in [(1, 0x10, 0x21), (4, 0x10, 0x21), (4, 0x1_0000, 0x2_0001)] {
            assert_eq!(ends(0xf4, size, value), (false, None, Some(code)));
        }
        let mut without = Board::new(&BoardConfig {
            debug_exit: false,
            debug_console: false,
            ..CONFIG
        });
        out(&mut without, &[(0xf4, 0), (0xe9, b'x')]);
        assert!(!without.has_actions());
        assert_eq!(without.port_read(0xe9, 1, T), 0xff);
        assert_eq!(without.unclaimed().ports, 3);
        without.port_write(0x8900, 1, 0x53, T);
        assert_eq!(without.unclaimed().ports, 4);

        for (text, off) in [
            (&b"Shutdown"[..], true),
            (b"ShutShutdown", true),
            (b"SShutdown", true),
            (b"Shutdow", false),
            (b"Shutdoxn", false),
            (b"shutdown", false),
        ] {
            let mut board = board();
            for &byte in text {
                assert!(!board.has_actions());
                board.port_write(0x8900, 1, byte.into(), T);
            }
            assert_eq!(board.take_actions().power_off, off, "{text:?}");
        }
    }

    #[test]
    fn the_power_button_is_a_level_sci() {
        let mut board = with_pic();
        board.port_write(0x602, 2, 0x100, T);
        board.power_button();
        assert_eq!(board.pic_acknowledge(), Vector(0x29));
        out(&mut board, &[(0xa0, 0x20), (0x20, 0x20)]);
        assert!(board.pic_interrupt(), "until it is cleared");
        board.port_write(0x600, 2, 0x100, T);
        assert!(!board.pic_interrupt());
        let mut apic = route(&mut board, 9, 0x8039);
        board.power_button();
        assert_eq!(pending(&board, &mut apic), Some(Vector(0x39)));
    }

    #[test]
    fn wide_accesses_are_split() {
        let mut board = board();
        board.port_write(0x70, 2, 0x55_3f, T); // index, then data
        assert_eq!(board.port_read(0x71, 1, T), 0x55);
        assert_eq!(board.port_read(0x20, 2, T), 0xfb01);
        assert_eq!(board.port_read(0x1234, 4, T), u32::MAX);
        assert_eq!(board.unclaimed().ports, 4);
        assert_eq!(board.port_read(0xffff, 4, T), u32::MAX);
        assert_eq!(board.port_read(0xffff, 2, T), 0xffff);
        // A timer read in one piece and in bytes.
        let timer = board.port_read(0x608, 4, T);
        assert_eq!(
            board.port_read(0x608, 2, T) | board.port_read(0x60a, 2, T) << 16,
            timer
        );
    }

    #[test]
    fn configuration_mechanism_1() {
        let mut board = board();
        board.port_write(0xcfb, 1, 0x01, T);
        assert_eq!(board.port_read(0xcf8, 4, T), 0);
        assert_eq!(board.port_read(0xcfc, 4, T), u32::MAX, "off");
        board.port_write(0xcf8, 4, 0x8000_0000, T);
        assert_eq!(board.port_read(0xcf8, 4, T), 0x8000_0000);
        assert_eq!(board.port_read(0xcf8, 2, T), 0x00ff, "only in one piece");
        assert_eq!(board.port_read(0xcfc, 4, T), 0x0008_1b36);
        assert_eq!(board.port_read(0xcfd, 2, T), 0x081b);
        assert_eq!(board.port_read(0xcfe, 4, T), 0xffff_0008);
        board.port_write(0xcf9, 1, 0x02, T);
        assert_eq!(
            board.port_read(0xcf8, 4, T),
            0x8000_0000,
            "0xcf9 is the reset control"
        );
        assert_eq!(board.mmio_read(map::ECAM.start + 8, 4, T), 0x0600_0000);
        assert_eq!(board.mmio_read(map::ECAM.start + (8 << 15), 2, T), 0xffff);
    }

    #[test]
    fn plugged_functions() {
        let mut board = with_pic();
        let place = DeviceFunction::new(2, 0).unwrap();
        board.pci.plug(place, Toy::new(1)).unwrap();
        let config = map::ECAM.start + (2 << 15);
        board.mmio_write(config + 0x10, 4, 0xc000, T);
        board.mmio_write(config + 0x14, 8, 0xd000_0000, T);
        board.mmio_write(config + 0x04, 2, 7, T);
        assert_eq!(board.port_read(0xc006, 2, T), 6);
        assert_eq!(board.mmio_read(0xd000_0123, 1, T), 0x23);
        board.mmio_write(0xd000_0000, 4, 0x1e, T);
        assert!(
            board.pic_interrupt(),
            "INTA of device 2 is line 2, input 10"
        );
        assert_eq!(board.pic_acknowledge(), Vector(0x2a));
        board.mmio_write(0xd000_0000, 4, 0, T);

        let mut apic = route(&mut board, 18, 0xa03a);
        board.mmio_write(0xd000_0000, 4, 0x1e, T);
        assert_eq!(pending(&board, &mut apic), Some(Vector(0x3a)));

        board.mmio_write(0xd000_0800, 8, 0xfee0_0000, T);
        board.mmio_write(0xd000_0808, 8, 0x0000_0051, T);
        board.mmio_write(config + 0x42, 2, 0x8000, T);
        board.mmio_write(0xd000_0000, 4, 0, T);
        assert_eq!(pending(&board, &mut apic), Some(Vector(0x51)), "MSI-X");

        assert_eq!(board.mmio_read(0xd100_0000, 4, T), 0xffff_ffff);
        board.mmio_write(0xa_0000, 1, 0, T);
        assert_eq!(board.unclaimed().memory, 2);
    }

    #[test]
    fn state_comes_back_and_a_reset_forgets() {
        fn savable<T: Serialize + serde::de::DeserializeOwned>(_: &T) {}
        let mut board = with_pic();
        out(
            &mut board,
            &[
                (0x43, 0x34),
                (0x40, 0),
                (0x40, 0x10),
                (0x3fc, 0x08),
                (0x3f9, 0x02),
                (0x3ff, 0x77),
            ],
        );
        board.console_input(b"typed", T);
        let state = board.save();
        savable(&state);
        let mut other = Board::new(&CONFIG);
        other.restore(state);
        let [other_state, own_state] = [&other, &board].map(|b| format!("{:?}", b.save()));
        assert!(other_state == own_state);
        assert_eq!(other.next_event(), board.next_event());
        assert_eq!(other.pic_acknowledge(), Vector(0x24));
        let later = Nanos(5_000_000_000);
        board.reset(later);
        assert!(!board.pic_interrupt());
        assert_eq!(board.port_read(0x3ff, 1, later), 0);
        assert_eq!(
            board.port_read(0x3f8, 1, later),
            u32::from(b'y'),
            "typed text stays"
        );
        board.port_write(0x70, 1, 0, later);
        assert_eq!(board.port_read(0x71, 1, later), 0x03, "and time goes on");
        assert!(board.next_event() > later);
    }

    /// Whatever a guest does, nothing panics, and after a tick the next deadline is ahead.
    #[test]
    fn any_access_at_any_time() {
        let mut seed = 0x9e37_79b9_7f4a_7c15u64;
        let mut random = move || {
            seed ^= seed << 13;
            seed ^= seed >> 7;
            seed ^= seed << 17;
            seed
        };
        let ports = [
            0x20, 0x40, 0x43, 0x60, 0x70, 0x71, 0x80, 0x92, 0xa0, 0xe8, 0xf4, 0x3f8, 0x3fc, 0x4d0,
            0x600, 0x608, 0x620, 0x63c, 0xcf8, 0xcfc, 0xc000, 0xfffc,
        ];
        let places = [
            0,
            0xa_0000,
            map::PCI_WINDOW.start,
            0xd000_0000,
            map::ECAM.start,
            map::ECAM.start + 0x1_0000,
            map::ECAM.end - 8,
            map::IO_APIC,
            map::IO_APIC + 0x10,
            map::HPET,
            map::HPET + 0x100,
            u64::MAX - 16,
        ];
        for _ in 0..8 {
            let mut board = board();
            board
                .pci
                .plug(DeviceFunction::new(2, 0).unwrap(), Toy::new(1))
                .unwrap();
            let mut now = Nanos::ZERO;
            for _ in 0..40_000 {
                let r = random();
                now = match r % 64 {
                    0 => now + (random() >> (random() % 64)),
                    1 => now - (random() >> 40),
                    2 => board.next_event(),
                    _ => now + r % 5_000,
                };
                if r % 4096 == 7 {
                    now = Nanos(random());
                }
                if now > Nanos(u64::MAX / 2) {
                    now = Nanos(r % 1_000_000_000);
                }
                let value = random() >> (random() % 64);
                if r & 0x100 != 0 {
                    let base = ports[(r >> 16) as usize % ports.len()];
                    let (port, size) = (base + (r >> 32 & 3) as u16, 1 << (r >> 40 & 3).min(2));
                    if r & 0x200 != 0 {
                        board.port_write(port, size, value as u32, now);
                    } else {
                        board.port_read(port, size, now);
                    }
                } else {
                    let base = places[(r >> 16) as usize % places.len()];
                    let (address, size) = (base + (r >> 32 & 15), 1 << (r >> 40 & 3));
                    if r & 0x200 != 0 {
                        board.mmio_write(address, size, value, now);
                    } else {
                        board.mmio_read(address, size, now);
                    }
                }
                match r >> 44 & 255 {
                    0 => board.console_output(&mut |_| ()),
                    1 => _ = board.console_input(&value.to_le_bytes(), now),
                    2 => board.power_button(),
                    3 => board.reset(now),
                    4 if board.pic_interrupt() => _ = board.pic_acknowledge(),
                    5 => _ = board.take_actions(),
                    _ => {}
                }
                board.tick(now);
                assert!(board.next_event() > now);
            }
        }
    }
}
