//! MSI-X (PCI 3.0 §6.8.2): a function's table of messages, with its pending bits.

use alloc::{vec, vec::Vec};

use serde::{Deserialize, Serialize};

use super::ConfigSpace;

/// The capability's identifier.
const ID: u8 = 0x11;
const ENTRY: u64 = 16;
const ENABLE: u32 = 1 << 15;
const MASK_ALL: u32 = 1 << 14;
const MASKED: u32 = 1;

/// A message-signalled interrupt: a write of `data` to `address`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Msi {
    /// Where to.
    pub address: u64,
    /// What.
    pub data: u32,
}

#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
struct Entry {
    address: u64,
    data: u32,
    control: u32,
    pending: bool,
}

/// Table and pending bits. The function places them in one of its base address registers and
/// passes accesses on.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct MsixTable {
    entries: Vec<Entry>,
    capability: u16,
    /// Some entry may be pending.
    waiting: bool,
}

impl MsixTable {
    /// Adds the capability to `config`: `vectors` (1 to 2048) messages with the table at offset
    /// `table` and the pending bits at offset `pending` of base address register `bar`, both
    /// multiples of 8. `None` if a number is out of range or there is no room.
    pub fn new(
        config: &mut ConfigSpace,
        vectors: u16,
        bar: u8,
        table: u32,
        pending: u32,
    ) -> Option<Self> {
        if !(1..=2048).contains(&vectors) || bar > 5 || (table | pending) & 7 != 0 {
            return None;
        }
        let mut body = [0; 10];
        body[..2].copy_from_slice(&(vectors - 1).to_le_bytes());
        body[2..6].copy_from_slice(&(table | u32::from(bar)).to_le_bytes());
        body[6..].copy_from_slice(&(pending | u32::from(bar)).to_le_bytes());
        let capability = config.add_capability(ID, &body, &[0x00, 0xc0])?;
        let entry = Entry {
            address: 0,
            data: 0,
            control: MASKED,
            pending: false,
        };
        Some(Self {
            entries: vec![entry; vectors.into()],
            capability,
            waiting: false,
        })
    }

    /// Masks every vector and forgets what is pending.
    pub fn reset(&mut self) {
        for entry in &mut self.entries {
            (entry.control, entry.pending) = (MASKED, false);
        }
        self.waiting = false;
    }

    /// The number of a vector, or 0xffff if there is none of this number.
    #[must_use]
    pub fn vector(&self, number: u16) -> u16 {
        if usize::from(number) < self.entries.len() {
            number
        } else {
            u16::MAX
        }
    }

    /// Whether the guest uses it.
    #[must_use]
    pub fn enabled(&self, config: &ConfigSpace) -> bool {
        config.get(self.capability, 4) >> 16 & ENABLE != 0
    }

    fn open(&self, config: &ConfigSpace) -> bool {
        config.get(self.capability, 4) >> 16 & (ENABLE | MASK_ALL) == ENABLE
    }

    /// Reads 4 or 8 bytes of the table.
    #[must_use]
    pub fn read_table(&self, offset: u64, size: u8) -> u64 {
        let Some(entry) = self.entries.get((offset / ENTRY) as usize) else {
            return 0;
        };
        let half = |at: u64| match at & 12 {
            0 => entry.address & 0xffff_ffff,
            4 => entry.address >> 32,
            8 => entry.data.into(),
            _ => entry.control.into(),
        };
        match (size, offset & 7) {
            (8, 0) => half(offset) | half(offset + 4) << 32,
            (4, 0 | 4) => half(offset),
            _ => 0,
        }
    }

    /// Writes 4 or 8 bytes of the table; other sizes are undefined by the standard and ignored.
    pub fn write_table(&mut self, offset: u64, size: u8, value: u64) {
        let Some(entry) = self.entries.get_mut((offset / ENTRY) as usize) else {
            return;
        };
        let mut half = |at: u64, value: u64| match at & 12 {
            0 => entry.address = entry.address & !0xffff_ffff | value & 0xffff_fffc,
            4 => entry.address = entry.address & 0xffff_ffff | value << 32,
            8 => entry.data = value as u32,
            _ => entry.control = value as u32 & MASKED,
        };
        match (size, offset & 7) {
            (8, 0) => {
                half(offset, value & 0xffff_ffff);
                half(offset + 4, value >> 32);
            }
            (4, 0 | 4) => half(offset, value & 0xffff_ffff),
            _ => {}
        }
    }

    /// Reads 4 or 8 bytes of the pending bits.
    #[must_use]
    pub fn read_pending(&self, offset: u64, size: u8) -> u64 {
        let first = offset.saturating_mul(8);
        (0..u64::from(size.min(8)) * 8).fold(0, |bits, bit| {
            let entry = self.entries.get(first.saturating_add(bit) as usize);
            bits | u64::from(entry.is_some_and(|entry| entry.pending)) << bit
        })
    }

    /// Raises vector `number`: the message to send now, or it waits as pending.
    pub fn raise(&mut self, config: &ConfigSpace, number: u16) -> Option<Msi> {
        let open = self.open(config);
        let entry = self.entries.get_mut(usize::from(number))?;
        if open && entry.control & MASKED == 0 {
            return Some(entry.message());
        }
        entry.pending = true;
        self.waiting = true;
        None
    }

    /// A message that was pending and may be sent by now. Asked after each write to the table or
    /// to the capability until there is none.
    pub fn take_unmasked(&mut self, config: &ConfigSpace) -> Option<Msi> {
        if !self.waiting || !self.open(config) {
            return None;
        }
        let mut pending = self.entries.iter_mut().filter(|entry| entry.pending);
        let Some(entry) = pending.find(|entry| entry.control & MASKED == 0) else {
            self.waiting = self.entries.iter().any(|entry| entry.pending);
            return None;
        };
        entry.pending = false;
        Some(entry.message())
    }
}

impl Entry {
    const fn message(&self) -> Msi {
        Msi {
            address: self.address,
            data: self.data,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn masked_vectors_wait() {
        let mut config = ConfigSpace::new(1, 1, 0, 0, false);
        assert!(MsixTable::new(&mut config, 0, 0, 0, 0).is_none());
        assert!(MsixTable::new(&mut config, 1, 0, 4, 0).is_none());
        let mut table = MsixTable::new(&mut config, 3, 2, 0, 0x800).unwrap();
        assert_eq!(config.get(0x40, 4), 0x0002_0011);
        assert_eq!(config.get(0x44, 4), 0x0000_0002);
        assert_eq!(config.get(0x48, 4), 0x0000_0802);

        assert_eq!(table.read_table(0x1c, 4), 1, "masked from the start");
        table.write_table(0x10, 8, 0x1_fee0_0003);
        table.write_table(0x18, 8, 0x41);
        assert_eq!(table.read_table(0x10, 8), 0x1_fee0_0000);
        assert_eq!(table.read_table(0x18, 8), 0x41);
        let message = Msi {
            address: 0x1_fee0_0000,
            data: 0x41,
        };

        assert_eq!(table.raise(&config, 1), None, "not enabled");
        assert_eq!(table.read_pending(0, 8), 2);
        config.write(0x42, 2, 0xc000);
        assert_eq!(table.take_unmasked(&config), None, "masked as a whole");
        config.write(0x42, 2, 0x8000);
        assert!(table.enabled(&config));
        assert_eq!(table.take_unmasked(&config), Some(message));
        assert_eq!(table.take_unmasked(&config), None);
        assert_eq!(table.raise(&config, 1), Some(message));
        assert_eq!(table.raise(&config, 0), None, "masked by itself");
        assert_eq!(table.read_pending(0, 4), 1);
        assert_eq!(table.raise(&config, 7), None, "no such vector");
        table.reset();
        assert_eq!(table.read_pending(0, 8), 0);
        assert_eq!(
            (
                table.read_table(64, 8),
                table.read_table(2, 4),
                table.read_pending(u64::MAX, 8)
            ),
            (0, 0, 0)
        );
    }
}
