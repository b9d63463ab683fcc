//! ACPI tables, found as an operating system does (ACPI 6.5 §5.2).

use crate::start_info;

/// The byte at a physical address below 4 GiB.
pub fn byte(address: u64) -> u8 {
    // SAFETY: tables lie in mapped memory below 4 GiB, and reading them changes nothing.
    unsafe { (address as *const u8).read_volatile() }
}

/// So many bytes from `address` on, as a number; they need no alignment.
pub fn number(address: u64, bytes: u64) -> u64 {
    (0..bytes)
        .map(|i| u64::from(byte(address + i)) << (8 * i))
        .sum()
}

/// A system description table, by its address.
#[derive(Clone, Copy, Debug)]
pub struct Table(pub u64);

impl Table {
    /// Its name.
    pub fn signature(self) -> [u8; 4] {
        (number(self.0, 4) as u32).to_le_bytes()
    }

    /// Bytes, with the header.
    pub fn length(self) -> u64 {
        number(self.0 + 4, 4)
    }

    /// A field; 0 if the table ends before it.
    pub fn field(self, offset: u64, bytes: u64) -> u64 {
        if offset + bytes <= self.length() {
            number(self.0 + offset, bytes)
        } else {
            0
        }
    }
}

/// The root pointer: the loader's, or else the one in the BIOS area; 0 if there is none.
pub fn rsdp() -> u64 {
    let found = start_info().rsdp;
    if found != 0 {
        return found;
    }
    (0xe_0000..0x10_0000)
        .step_by(16)
        .find(|&at| number(at, 8) == u64::from_le_bytes(*b"RSD PTR "))
        .unwrap_or(0)
}

/// The tables that XSDT or RSDT list.
pub fn tables() -> impl Iterator<Item = Table> {
    let rsdp = rsdp();
    let xsdt = if rsdp != 0 && byte(rsdp + 15) >= 2 {
        number(rsdp + 24, 8)
    } else {
        0
    };
    let (root, width) = match (rsdp, xsdt) {
        (0, _) => (0, 4),
        (_, 0) => (number(rsdp + 16, 4), 4),
        _ => (xsdt, 8),
    };
    let count = match root {
        0 => 0,
        _ => Table(root).length().saturating_sub(36) / width,
    };
    (0..count).map(move |i| Table(number(root + 36 + i * width, width)))
}

/// The table with this signature.
pub fn table(signature: &[u8; 4]) -> Option<Table> {
    tables().find(|table| table.signature() == *signature)
}

/// The entries of the MADT, as kind and address; none where there is no MADT.
pub fn madt() -> impl Iterator<Item = (u8, u64)> {
    let (mut at, end) = match table(b"APIC") {
        Some(madt) => (madt.0 + 44, madt.0 + madt.length()),
        None => (0, 0),
    };
    core::iter::from_fn(move || {
        let here = at;
        if here >= end {
            return None;
        }
        at += u64::from(byte(here + 1)).max(2);
        Some((byte(here), here))
    })
}

/// The APIC ids of the CPUs that the MADT has as enabled (ACPI 6.5 §5.2.12.2, §5.2.12.12).
pub fn cpus() -> impl Iterator<Item = u32> {
    madt().filter_map(|(kind, at)| match kind {
        0 if number(at + 4, 4) & 1 != 0 => Some(byte(at + 3).into()),
        9 if number(at + 8, 4) & 1 != 0 => Some(number(at + 4, 4) as u32),
        _ => None,
    })
}
