//! PCI functions of bus 0, reached by mechanism 1 (PCI 3.0 §3.2.2.3.2). One CPU at a time.

use crate::cpu::{inl, outb, outl, outw, write32};
use crate::pc::{LAPIC, lapic, reg};

/// Registers of every function's configuration space (PCI 3.0 §6.1).
#[allow(missing_docs, reason = "the names are the standard's")]
pub mod register {
    pub const COMMAND: u8 = 0x04;
    pub const BAR0: u8 = 0x10;
    pub const CAPABILITIES: u8 = 0x34;
    pub const INTERRUPT: u8 = 0x3c;
}

/// Command: accesses to memory are answered.
pub const MEMORY: u16 = 1 << 1;
/// Command: the function may reach memory.
pub const MASTER: u16 = 1 << 2;
/// Command: INTx stays off.
pub const INTX_OFF: u16 = 1 << 10;
/// Status: INTx would be asserted.
pub const INTX_STATUS: u32 = 1 << 19;
/// The capability of MSI-X (PCI 3.0 §6.8.2).
pub const MSIX: u8 = 0x11;

const ADDRESS: u16 = 0xcf8;
const DATA: u16 = 0xcfc;
/// A list of capabilities cannot be longer.
const MOST_CAPABILITIES: usize = 48;

/// A function on bus 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Function {
    /// Device number, 0 to 31.
    pub device: u8,
    /// Function number, 0 to 7.
    pub function: u8,
}

impl Function {
    fn select(self, offset: u8) {
        let place = u32::from(self.device & 31) << 11 | u32::from(self.function & 7) << 8;
        // SAFETY: selects a register, and does nothing to it.
        unsafe { outl(ADDRESS, 1 << 31 | place | u32::from(offset & 0xfc)) };
    }

    /// The aligned four bytes that hold `offset`.
    pub fn read(self, offset: u8) -> u32 {
        self.select(offset);
        // SAFETY: reading configuration space has no side effect but in what a test asks for.
        unsafe { inl(DATA) }
    }

    /// The two bytes at `offset`.
    pub fn read16(self, offset: u8) -> u16 {
        (self.read(offset) >> (8 * (offset & 2))) as u16
    }

    /// The byte at `offset`.
    pub fn read8(self, offset: u8) -> u8 {
        self.read(offset).to_le_bytes()[usize::from(offset & 3)]
    }

    /// Writes four bytes.
    ///
    /// # Safety
    /// The function is the caller's to drive, and what it then does to memory as well.
    pub unsafe fn write(self, offset: u8, value: u32) {
        self.select(offset);
        // SAFETY: promised by the caller.
        unsafe { outl(DATA, value) };
    }

    /// Writes two bytes.
    ///
    /// # Safety
    /// As [`Function::write`].
    pub unsafe fn write16(self, offset: u8, value: u16) {
        self.select(offset);
        // SAFETY: promised by the caller.
        unsafe { outw(DATA + u16::from(offset & 2), value) };
    }

    /// Writes a byte.
    ///
    /// # Safety
    /// As [`Function::write`].
    pub unsafe fn write8(self, offset: u8, value: u8) {
        self.select(offset);
        // SAFETY: promised by the caller.
        unsafe { outb(DATA + u16::from(offset & 3), value) };
    }

    /// Vendor, and device above it.
    pub fn id(self) -> u32 {
        self.read(0)
    }

    /// Sets and clears bits of the command register.
    ///
    /// # Safety
    /// As [`Function::write`].
    pub unsafe fn command(self, set: u16, clear: u16) {
        let value = self.read16(register::COMMAND) & !clear | set;
        // SAFETY: promised by the caller.
        unsafe { self.write16(register::COMMAND, value) };
    }

    /// Where a base address register of memory points.
    pub fn bar(self, index: u8) -> Option<u64> {
        let at = register::BAR0 + 4 * (index & 7);
        let low = self.read(at);
        let base = match low & 7 {
            4 => u64::from(self.read(at + 4)) << 32 | u64::from(low & !15),
            0 => u64::from(low & !15),
            _ => 0,
        };
        (index < 6 && base != 0).then_some(base)
    }

    /// Its capabilities: number and offset.
    pub fn capabilities(self) -> impl Iterator<Item = (u8, u8)> {
        let listed = self.read(register::COMMAND) >> 20 & 1 != 0;
        let mut at = if listed {
            self.read8(register::CAPABILITIES) & 0xfc
        } else {
            0
        };
        core::iter::from_fn(move || {
            let here = (at != 0).then_some(at)?;
            at = self.read8(here + 1) & 0xfc;
            Some((self.read8(here), here))
        })
        .take(MOST_CAPABILITIES)
    }

    /// MSI-X, if the function has it.
    pub fn msix(self) -> Option<Msix> {
        let (_, at) = self.capabilities().find(|(id, _)| *id == MSIX)?;
        let place = |offset| {
            let value = self.read(at + offset);
            Some(self.bar(value as u8 & 7)? + u64::from(value & !7))
        };
        Some(Msix {
            function: self,
            at,
            vectors: (self.read16(at + 2) & 0x7ff) + 1,
            table: place(4)?,
            pending: place(8)?,
        })
    }
}

/// All functions of bus 0.
pub fn functions() -> impl Iterator<Item = Function> {
    (0..32)
        .flat_map(|device| (0..8).map(move |function| Function { device, function }))
        .filter(|it| it.id() != u32::MAX)
}

/// A function's MSI-X capability.
#[derive(Clone, Copy, Debug)]
pub struct Msix {
    function: Function,
    at: u8,
    /// How many messages there are.
    pub vectors: u16,
    /// Where the table is.
    pub table: u64,
    /// Where the pending bits are.
    pub pending: u64,
}

impl Msix {
    /// Turns it on or off, and masks all messages or not.
    pub fn enable(&self, on: bool, masked: bool) {
        let value = u16::from(on) << 15 | u16::from(masked) << 14;
        // SAFETY: messages go where the table says, and every vector has a handler.
        unsafe { self.function.write16(self.at + 2, value) };
    }

    /// Message `number` is interrupt `vector` of the CPU with this APIC id.
    pub fn set(&self, number: u16, apic_id: u32, vector: u8, masked: bool) {
        let entry = self.table + 16 * u64::from(number);
        let address = LAPIC as u32 | apic_id << 12;
        for (offset, value) in [
            (12, 1),
            (0, address),
            (4, 0),
            (8, vector.into()),
            (12, masked.into()),
        ] {
            // SAFETY: the table is mapped; every vector has a handler.
            unsafe { write32(entry + offset, value) };
        }
    }

    /// As [`Msix::set`], for this CPU and open.
    pub fn set_here(&self, number: u16, vector: u8) {
        self.set(number, lapic(reg::ID) >> 24, vector, false);
    }
}
