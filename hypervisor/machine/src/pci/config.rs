//! One function's configuration space (PCI 3.0 §6, PCI Express 6.0 §7.5): bytes, and masks that
//! say what a guest's write does to each bit.

use alloc::{vec, vec::Vec};
use core::ops::Range;

use serde::{Deserialize, Serialize};

/// Bytes of a conventional configuration space.
const CONVENTIONAL: usize = 0x100;
/// Bytes of a PCI Express configuration space.
const EXPRESS: usize = 0x1000;

const COMMAND: u16 = 0x04;
const STATUS: u16 = 0x06;
const HEADER_TYPE: u16 = 0x0e;
const BARS: u16 = 0x10;
const CAPABILITIES: u16 = 0x34;
const FIRST_CAPABILITY: u16 = 0x40;
const INTERRUPT_LINE: u16 = 0x3c;
const INTERRUPT_PIN: u16 = 0x3d;

/// Command register: decode ports.
pub const COMMAND_IO: u16 = 1 << 0;
/// Command register: decode memory.
pub const COMMAND_MEMORY: u16 = 1 << 1;
/// Command register: act as bus master.
pub const COMMAND_MASTER: u16 = 1 << 2;
/// Command register: keep INTx low.
pub const COMMAND_INTX_OFF: u16 = 1 << 10;
/// I/O, memory, bus master, parity response, SERR#, INTx disable.
const COMMAND_WRITABLE: u16 = 0x0547;
/// Parity, aborts, system error: cleared by writing 1.
const STATUS_CLEARABLE: u16 = 0xf900;
/// INTx is asserted, or would be.
const STATUS_INTERRUPT: u32 = 1 << 3;
const STATUS_CAPABILITIES: u16 = 1 << 4;

/// What a base address register decodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum BarKind {
    /// Ports.
    Io,
    /// Memory below 4 GiB.
    Memory32,
    /// Memory anywhere; takes two registers.
    Memory64,
}

#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
struct Bar {
    kind: BarKind,
    /// A power of two.
    size: u64,
}

/// A configuration space.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ConfigSpace {
    bytes: Vec<u8>,
    /// Bits a guest sets and clears.
    writable: Vec<u8>,
    /// Bits a guest clears by writing 1.
    clearable: Vec<u8>,
    bars: [Option<Bar>; 6],
    last_capability: Option<u16>,
    next_capability: u16,
}

impl ConfigSpace {
    /// A type 0 header. `class` is class, subclass and interface (24 bits).
    #[must_use]
    pub fn new(vendor: u16, device: u16, class: u32, revision: u8, express: bool) -> Self {
        let length = if express { EXPRESS } else { CONVENTIONAL };
        let mut space = Self {
            bytes: vec![0; length],
            writable: vec![0; length],
            clearable: vec![0; length],
            bars: [None; 6],
            last_capability: None,
            next_capability: FIRST_CAPABILITY,
        };
        space.set(0x00, 2, vendor.into());
        space.set(0x02, 2, device.into());
        space.set(0x08, 4, class << 8 | u32::from(revision));
        space.allow(COMMAND, &COMMAND_WRITABLE.to_le_bytes());
        put(
            &mut space.clearable,
            STATUS,
            &STATUS_CLEARABLE.to_le_bytes(),
        );
        // Cache line size, latency timer, interrupt line.
        space.allow(0x0c, &[0xff, 0xff]);
        space.allow(0x3c, &[0xff]);
        space
    }

    /// Names the subsystem.
    #[must_use]
    pub fn with_subsystem(mut self, vendor: u16, id: u16) -> Self {
        self.set(0x2c, 2, vendor.into());
        self.set(0x2e, 2, id.into());
        self
    }

    /// Uses interrupt pin `pin`: 1 is INTA#, 4 is INTD#.
    #[must_use]
    pub fn with_interrupt_pin(mut self, pin: u8) -> Self {
        self.set(INTERRUPT_PIN, 1, pin.into());
        self
    }

    /// Adds a base address register of `size` bytes, rounded up to a power of two of at least 4
    /// (ports) or 4096 (memory). Gives nothing if `index` is not 0 to 5, or its register (or, with
    /// 64 bits, the next one) is not there or taken.
    #[must_use]
    pub fn with_bar(mut self, index: u8, kind: BarKind, size: u64, prefetch: bool) -> Option<Self> {
        let wide = kind == BarKind::Memory64;
        let at = usize::from(index);
        let below = at.checked_sub(1).and_then(|below| *self.bars.get(below)?);
        if self.bars.get(at)?.is_some()
            || below.is_some_and(|bar| bar.kind == BarKind::Memory64)
            || wide && self.bars.get(at + 1)?.is_some()
        {
            return None;
        }
        let (smallest, flags) = match kind {
            BarKind::Io => (4, 1),
            BarKind::Memory32 => (4096, u32::from(prefetch) << 3),
            BarKind::Memory64 => (4096, 4 | u32::from(prefetch) << 3),
        };
        let size = size.max(smallest).checked_next_power_of_two()?;
        let offset = BARS + 4 * u16::from(index);
        let mask = !(size - 1);
        self.set(offset, 4, flags);
        self.allow(offset, &(mask as u32).to_le_bytes());
        if wide {
            self.allow(offset + 4, &((mask >> 32) as u32).to_le_bytes());
        }
        *self.bars.get_mut(at)? = Some(Bar { kind, size });
        Some(self)
    }

    /// Adds a capability with this body after its two header bytes, and the bits of the body that
    /// a guest may write. Gives its offset, or `None` if there is no room.
    pub fn add_capability(&mut self, id: u8, body: &[u8], writable: &[u8]) -> Option<u16> {
        let at = self.next_capability;
        let length = u16::try_from(body.len() + 2).ok()?.next_multiple_of(4);
        if usize::from(at.checked_add(length)?) > CONVENTIONAL {
            return None;
        }
        self.next_capability = at + length;
        match self.last_capability.replace(at) {
            Some(last) => self.set(last + 1, 1, at.into()),
            None => {
                self.set(CAPABILITIES, 1, at.into());
                let status = self.get(STATUS, 2) | u32::from(STATUS_CAPABILITIES);
                self.set(STATUS, 2, status);
            }
        }
        self.set(at, 1, id.into());
        put(&mut self.bytes, at + 2, body);
        self.allow(at + 2, writable);
        Some(at)
    }

    /// Says that the device has more than one function.
    pub fn set_multifunction(&mut self) {
        let header = self.get(HEADER_TYPE, 1) | 0x80;
        self.set(HEADER_TYPE, 1, header);
    }

    /// The `size` (1, 2, 4) bytes at `offset`; ones beyond the end.
    #[must_use]
    pub fn get(&self, offset: u16, size: u8) -> u32 {
        (0..u16::from(size.min(4))).rev().fold(0, |value, index| {
            let at = usize::from(offset) + usize::from(index);
            value << 8 | u32::from(self.bytes.get(at).copied().unwrap_or(0xff))
        })
    }

    /// Sets bytes as the device does, past all masks.
    pub fn set(&mut self, offset: u16, size: u8, value: u32) {
        let bytes = value.to_le_bytes();
        put(
            &mut self.bytes,
            offset,
            bytes.get(..usize::from(size)).unwrap_or(&bytes),
        );
    }

    /// Lets a guest write these bits.
    pub fn allow(&mut self, offset: u16, bits: &[u8]) {
        put(&mut self.writable, offset, bits);
    }

    /// A guest's write.
    pub fn write(&mut self, offset: u16, size: u8, value: u32) {
        for (at, new) in (usize::from(offset)..)
            .zip(value.to_le_bytes())
            .take(size.into())
        {
            let (Some(byte), Some(writable), Some(clearable)) = (
                self.bytes.get_mut(at),
                self.writable.get(at),
                self.clearable.get(at),
            ) else {
                return;
            };
            *byte = (*byte & !writable | new & writable) & !(new & clearable);
        }
    }

    /// Puts what a guest can write back to zero: command, base addresses, capabilities' controls.
    pub fn reset(&mut self) {
        for (byte, (writable, clearable)) in self
            .bytes
            .iter_mut()
            .zip(self.writable.iter().zip(&self.clearable))
        {
            *byte &= !(writable | clearable);
        }
    }

    /// The command register.
    #[must_use]
    pub fn command(&self) -> u16 {
        self.get(COMMAND, 2) as u16
    }

    /// Says in the status register whether an interrupt by INTx is pending.
    pub fn set_interrupt_status(&mut self, pending: bool) {
        let status = self.get(STATUS, 1) & !STATUS_INTERRUPT;
        let interrupt = if pending { STATUS_INTERRUPT } else { 0 };
        self.set(STATUS, 1, status | interrupt);
    }

    /// The interrupt pin, 1 to 4, if the function uses one.
    #[must_use]
    pub fn interrupt_pin(&self) -> Option<u8> {
        match self.get(INTERRUPT_PIN, 1) as u8 {
            pin @ 1..=4 => Some(pin),
            _ => None,
        }
    }

    /// The ranges that the function decodes now: index of the base address register, whether it is
    /// of ports, first and behind-last address. An address of zero is not decoded: it is what
    /// firmware leaves in a register that nobody placed.
    pub fn decoded(&self) -> impl Iterator<Item = (u8, bool, Range<u64>)> {
        let command = self.command();
        (0u8..6).zip(self.bars).filter_map(move |(index, bar)| {
            let Bar { kind, size } = bar?;
            let offset = BARS + 4 * u16::from(index);
            let low = u64::from(self.get(offset, 4));
            let (enable, base) = match kind {
                BarKind::Io => (COMMAND_IO, low & !3),
                BarKind::Memory32 => (COMMAND_MEMORY, low & !15),
                BarKind::Memory64 => (
                    COMMAND_MEMORY,
                    u64::from(self.get(offset + 4, 4)) << 32 | low & !15,
                ),
            };
            let ports = kind == BarKind::Io;
            let end = base.checked_add(size)?;
            let fits = match kind {
                BarKind::Io => end <= 0x1_0000,
                BarKind::Memory32 => end <= 1 << 32,
                BarKind::Memory64 => true,
            };
            (command & enable != 0 && base != 0 && fits).then_some((index, ports, base..end))
        })
    }

    /// Places its memory as firmware does, from `next` on, which is moved behind it, to below
    /// `end`; and says to which input of the 8259A pair its pin goes.
    pub fn assign(&mut self, next: &mut u64, end: u64, irq: u8) {
        for (index, bar) in (0u16..).zip(self.bars) {
            let Some(Bar { kind, size }) = bar else {
                continue;
            };
            let place = next.checked_next_multiple_of(size);
            let Some(place) = place.filter(|at| kind != BarKind::Io && *at <= end - size.min(end))
            else {
                continue;
            };
            let offset = BARS + 4 * index;
            self.write(offset, 4, place as u32);
            if kind == BarKind::Memory64 {
                self.write(offset + 4, 4, (place >> 32) as u32);
            }
            *next = place.saturating_add(size);
        }
        if self.interrupt_pin().is_some() {
            self.write(INTERRUPT_LINE, 1, irq.into());
        }
    }

    /// Whether a write to these bytes can change what [`ConfigSpace::decoded`] gives.
    #[must_use]
    pub const fn moves(offset: u16) -> bool {
        matches!(offset, COMMAND..STATUS | BARS..0x28)
    }
}

fn put(bytes: &mut [u8], offset: u16, new: &[u8]) {
    for (byte, new) in bytes.iter_mut().skip(offset.into()).zip(new) {
        *byte = *new;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn space() -> ConfigSpace {
        ConfigSpace::new(0x1af4, 0x1041, 0x02_0000, 1, false)
            .with_subsystem(0x1af4, 0x40)
            .with_interrupt_pin(1)
            .with_bar(0, BarKind::Io, 24, false)
            .and_then(|space| space.with_bar(1, BarKind::Memory32, 4096, false))
            .and_then(|space| space.with_bar(4, BarKind::Memory64, 1 << 33, true))
            .unwrap()
    }

    #[test]
    fn header() {
        let space = space();
        for (offset, size, value) in [
            (0x00, 4, 0x1041_1af4),
            (0x02, 2, 0x1041),
            (0x08, 4, 0x0200_0001),
            (0x0e, 1, 0),
            (0x2c, 4, 0x0040_1af4),
            (0x3d, 1, 1),
            (0x100, 4, u32::MAX),
            (0xfe, 4, 0xffff_0000),
        ] {
            assert_eq!(space.get(offset, size), value, "{offset:#x}");
        }
    }

    #[test]
    fn only_writable_bits_change() {
        let mut space = space();
        space.set(0x06, 2, 0xf900);
        for offset in (0..0x100).step_by(4) {
            space.write(offset, 4, u32::MAX);
        }
        for (offset, value) in [
            (0x00, 0x1041_1af4),
            (0x04, 0x0000_0547),
            (0x0c, 0x0000_ffff),
            (0x10, 0xffff_ffe1),
            (0x14, 0xffff_f000),
            (0x18, 0),
            (0x20, 0x0000_000c),
            (0x24, 0xffff_fffe),
            (0x30, 0),
            (0x3c, 0x0000_01ff),
            (0x40, 0),
        ] {
            assert_eq!(space.get(offset, 4), value, "{offset:#x}");
        }
        space.reset();
        assert_eq!(space.get(0x04, 4), 0);
        assert_eq!(space.get(0x10, 4), 1);
        assert_eq!(space.get(0x3c, 4), 0x100);
    }

    #[test]
    fn base_addresses_decode_when_enabled_and_placed() {
        let mut space = space();
        space.write(0x10, 4, 0xc001);
        space.write(0x14, 4, 0xd000_0fff);
        space.write(0x24, 4, 0x12);
        assert_eq!(space.decoded().count(), 0);
        space.write(4, 1, 1);
        assert!(space.decoded().eq([(0, true, 0xc000..0xc020)]));
        space.write(4, 1, 2);
        assert!(space.decoded().eq([
            (1, false, 0xd000_0000..0xd000_1000),
            (4, false, 0x12_0000_0000..0x14_0000_0000)
        ]));
        space.write(0x14, 4, 0);
        assert_eq!(space.decoded().count(), 1);
    }

    #[test]
    fn registers_are_taken_once() {
        let fresh = || ConfigSpace::new(1, 1, 0, 0, true);
        assert!(fresh().with_bar(6, BarKind::Io, 4, false).is_none());
        assert!(fresh().with_bar(5, BarKind::Memory64, 4, false).is_none());
        let one = fresh().with_bar(2, BarKind::Memory64, 4, false).unwrap();
        assert!(one.clone().with_bar(3, BarKind::Io, 4, false).is_none());
        assert!(one.clone().with_bar(2, BarKind::Io, 4, false).is_none());
        assert!(one.with_bar(1, BarKind::Memory64, 4, false).is_none());
    }

    #[test]
    fn capabilities_are_chained() {
        let mut space = space();
        let first = space
            .add_capability(0x09, &[1, 2, 3], &[0, 0, 0xff])
            .unwrap();
        let second = space.add_capability(0x11, &[0; 10], &[]).unwrap();
        assert_eq!((first, second), (0x40, 0x48));
        assert_eq!(space.get(0x34, 1), 0x40);
        assert_eq!(space.get(0x06, 2), 0x10);
        assert_eq!(space.get(0x40, 4), 0x0201_4809);
        assert_eq!(space.get(0x48, 2), 0x0011);
        space.write(0x40, 4, 0);
        space.write(0x44, 1, 0x5a);
        assert_eq!(space.get(0x40, 4), 0x0201_4809);
        assert_eq!(space.get(0x44, 1), 0x5a);
        assert_eq!(space.add_capability(0x09, &[0; 200], &[]), None);
    }
}
