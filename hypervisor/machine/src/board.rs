//! The board: every device of the virtual PC, the one place where an access finds its device and
//! where an interrupt line is carried to the 8259A pair and the I/O APIC.
//!
//! Ports and fixed memory ranges are matched on constants; only what PCI base address registers
//! decode is looked up. An access wider than its device is split into bytes, as on an ISA bus.
//! What nobody claims reads as ones, and its writes are ignored; both are counted.
//!
//! What happens outside of the board is asked for in [`Actions`]. Deadlines are kept per device,
//! so that [`Board::next_event`] is a load.

use alloc::{vec, vec::Vec};
use core::ops::Range;

use arch::{Nanos, Vector};
use serde::{Deserialize, Serialize};

use crate::{
    apic::{ApicFabric, ApicFabricState, RestoreError},
    clock::TscClock,
    debug::Debug,
    i8042::{I8042, Request},
    map,
    pci::{Pci, PciState},
    pic::PicPair,
    pit::Pit,
    pm::{Pm, ResetControl},
    rtc::Rtc,
    uart::Uart,
};

/// What a board is made of.
#[derive(Clone, Copy, Debug)]
pub struct BoardConfig {
    /// vCPUs, for their local APICs.
    pub vcpus: u32,
    /// Width of guest-physical addresses.
    pub phys_bits: u8,
    /// The guests' time stamp counter.
    pub clock: TscClock,
    /// Bytes of memory below 4 GiB.
    pub low_ram: u64,
    /// Bytes of memory above 4 GiB.
    pub high_ram: u64,
    /// The wall clock at power-on: nanoseconds since 1970, UTC.
    pub wall_clock: u64,
    /// Whether port 0xf4 ends the VM.
    pub debug_exit: bool,
    /// Whether port 0xe9 prints.
    pub debug_console: bool,
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
    Pci,
}
const TIMED: usize = 5;

#[derive(Clone, Debug, Serialize, Deserialize)]
struct Devices {
    pic: PicPair,
    pit: Pit,
    rtc: Rtc,
    uart: Uart,
    i8042: I8042,
    pm: Pm,
    reset_control: ResetControl,
    /// Port 0x92 bit 0; bit 1 is the 8042's A20.
    fast_reset: bool,
    debug: Debug,
    /// Levels of ISA interrupts 0 to 15 as they were last carried on.
    irqs: u16,
    /// Levels of the PCI interrupt lines as they were last carried on.
    intx: [bool; 4],
    unclaimed: Unclaimed,
}

/// All of a board's state, for saving, besides that of plugged PCI functions.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct BoardState {
    devices: Devices,
    pci: PciState,
    apic: ApicFabricState,
}

/// A virtual PC without its processors.
pub struct Board {
    /// Local APICs and I/O APIC. Local APICs' pages are not on the board's bus: an access is
    /// made by one vCPU, which the caller knows.
    pub apic: ApicFabric,
    /// The PCI root, to plug functions in.
    pub pci: Pci,
    devices: Devices,
    /// The 8259A pair's output as it was last carried on.
    extint: bool,
    actions: Actions,
    acting: bool,
    deadlines: [Nanos; TIMED],
    next: Nanos,
}

const PM_END: u16 = map::PM_BLOCK.end - 1;
const COM1_END: u16 = map::COM1 + 7;
const IO_APIC_END: u64 = map::IO_APIC + 0xfff;
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
            apic: ApicFabric::new(config.vcpus, config.phys_bits, config.clock),
            pci: Pci::new(fixed_ranges(config)),
            devices: Devices {
                pic: PicPair::new(),
                pit: Pit::new(),
                rtc: Rtc::new(config.wall_clock, config.low_ram, config.high_ram),
                uart: Uart::new(),
                i8042: I8042::new(),
                pm: Pm::new(true),
                reset_control: ResetControl::default(),
                fast_reset: false,
                debug: Debug::new(config.debug_exit, config.debug_console),
                irqs: 0,
                intx: [false; 4],
                unclaimed: Unclaimed::default(),
            },
            extint: false,
            actions: Actions::default(),
            acting: false,
            deadlines: [Nanos::NEVER; TIMED],
            next: Nanos::NEVER,
        };
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
        self.carry_all(now);
    }

    /// All state, for saving.
    #[must_use]
    pub fn save(&self) -> BoardState {
        BoardState {
            devices: self.devices.clone(),
            pci: self.pci.save(),
            apic: self.apic.save(),
        }
    }

    /// Puts saved state in place, on a board of the same configuration on which the same functions
    /// are plugged in and have their own state already.
    ///
    /// # Errors
    /// The state does not fit this board; the board is then as it was.
    pub fn restore(&mut self, state: BoardState, now: Nanos) -> Result<(), RestoreError> {
        self.apic.restore(&state.apic)?;
        self.pci.restore(state.pci);
        self.devices = state.devices;
        self.extint = !self.devices.pic.interrupt();
        self.carry_all(now);
        Ok(())
    }

    // ---- ports ----

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
    pub fn mmio_read(&mut self, address: u64, size: u8, now: Nanos) -> u64 {
        let ones = u64::MAX >> (64 - 8 * u32::from(size.clamp(1, 8)));
        match address {
            map::IO_APIC..=IO_APIC_END => {
                // Registers are 32 bits wide and aligned; a narrower read sees its bytes.
                let register = self.apic.read_io((address & 0xffc) as u16);
                u64::from(register) >> (8 * (address & 3)) & ones
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
    pub fn mmio_write(&mut self, address: u64, size: u8, value: u64, now: Nanos) {
        match address {
            map::IO_APIC..=IO_APIC_END => {
                // The datasheet allows aligned 32-bit writes only.
                if size >= 4 && address & 3 == 0 {
                    self.apic.write_io((address & 0xffc) as u16, value as u32);
                }
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
        self.pci.tick(now);
        self.carry_pic();
        self.carry_pit();
        self.carry_rtc();
        self.carry_uart();
        self.carry_i8042();
        self.carry_pm();
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

    #[inline]
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
        self.edge(0, rose, rose || self.devices.pit.irq());
        self.set_deadline(Timed::Pit, self.devices.pit.next_event());
    }

    fn carry_rtc(&mut self) {
        let irq = self.devices.rtc.irq();
        if irq && self.devices.rtc.alarm() {
            self.devices.pm.rtc_alarm();
            self.carry_pm();
        }
        self.set_irq(8, irq);
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

    fn carry_pci(&mut self) {
        if self.pci.is_empty() {
            return;
        }
        for (line, level) in self.pci.interrupts().into_iter().enumerate() {
            self.set_intx(line, level);
        }
        let apic = &mut self.apic;
        self.pci
            .take_messages(|msi| _ = apic.msi(msi.address, msi.data));
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

    /// Whether [`Board::take_actions`] has something.
    #[inline]
    #[must_use]
    pub const fn has_actions(&self) -> bool {
        self.acting
    }

    /// What was asked for since the last call.
    pub const fn take_actions(&mut self) -> Actions {
        self.acting = false;
        core::mem::replace(
            &mut self.actions,
            Actions {
                power_off: false,
                reset: None,
                exit_code: None,
                console: false,
            },
        )
    }

    /// Hands what the guest printed (first serial port, debug console) to `print`, in pieces.
    pub fn console_output(&mut self, print: &mut impl FnMut(&[u8])) {
        self.devices.uart.take_output(print);
        self.devices.debug.take_output(print);
        self.carry_uart();
    }

    /// Types at the first serial port; gives how many bytes there is room for.
    pub fn console_input(&mut self, bytes: &[u8], now: Nanos) -> usize {
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
