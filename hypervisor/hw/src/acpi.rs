//! What the firmware's ACPI tables say (ACPI 6.5 ch. 5).
//!
//! Firmware is not trusted: every pointer is checked against what is mapped, every table against
//! its length and checksum, and the walk is bounded. A crate would map wherever a table points;
//! the few fields needed are read here instead.

use alloc::vec::Vec;
use arch::{HostPhysAddr, PhysMemory};

use crate::DirectMap;

/// Fixed-hardware registers and what else the hypervisor needs from ACPI. Anything that is
/// absent or damaged is `None`.
#[derive(Clone, Copy, Debug, Default)]
pub struct AcpiInfo {
    /// I/O port of the PM timer, and whether it has 32 bits.
    pub pm_timer: Option<(u16, bool)>,
    /// I/O port of the PM1a control register.
    pub pm1a_control: Option<u16>,
    /// I/O port of the PM1b control register.
    pub pm1b_control: Option<u16>,
    /// SLP_TYPa and SLP_TYPb of `\_S5`.
    pub s5: Option<(u8, u8)>,
    /// SMI command port and the value that enables ACPI mode.
    pub enable: Option<(u16, u8)>,
    /// Port and value of the reset register.
    pub reset: Option<(u16, u8)>,
    /// The MADT: its address and length.
    madt: Option<(u64, u32)>,
    /// The MCFG likewise.
    mcfg: Option<(u64, u32)>,
    /// Physical address of the I/O APIC that serves GSI 0 and up.
    pub io_apic: Option<u64>,
    /// The GSI of ISA interrupt 4 (COM1), where the MADT overrides it.
    pub com1_gsi: Option<u8>,
    /// Tables that were found but are damaged.
    pub damaged: u32,
}

/// The longest table that is looked at, in bytes: a DSDT of a large server is below 1 MiB.
const MAX_TABLE: u32 = 4 << 20;
/// More entries than any real XSDT has.
const MAX_TABLES: u32 = 256;

/// The most processors that are listed.
pub const MAX_PROCESSORS: usize = 256;

#[derive(Clone, Copy)]
struct Table {
    addr: u64,
    length: u32,
}

/// Reads the tables from the root pointer on.
#[must_use]
pub fn read(map: DirectMap, rsdp: u64) -> AcpiInfo {
    let reader = Reader { map };
    let mut info = AcpiInfo::default();
    let Some((root, wide)) = reader.root(rsdp) else {
        info.damaged = 1;
        return info;
    };
    let Some(root) = reader.table(root) else {
        info.damaged = 1;
        return info;
    };
    let width = if wide { 8 } else { 4 };
    for index in 0..((root.length - 36) / width).min(MAX_TABLES) {
        let at = root.addr + 36 + u64::from(index * width);
        let Some(addr) = (if wide {
            reader.u64(at)
        } else {
            reader.u32(at).map(u64::from)
        }) else {
            continue;
        };
        let Some(table) = reader.table(addr) else {
            info.damaged += 1;
            continue;
        };
        match reader.bytes::<4>(addr).as_ref() {
            Some(b"FACP") => reader.fadt(&table, &mut info),
            Some(b"APIC") => reader.madt(&table, &mut info),
            Some(b"MCFG") => info.mcfg = Some((table.addr, table.length)),
            _ => {}
        }
    }
    info
}

struct Reader {
    map: DirectMap,
}

impl Reader {
    fn bytes<const N: usize>(&self, addr: u64) -> Option<[u8; N]> {
        let addr = HostPhysAddr::new(addr);
        self.map.pointer(addr, N as u64)?;
        let mut bytes = [0; N];
        self.map.read(addr, &mut bytes);
        Some(bytes)
    }
    fn u8(&self, addr: u64) -> Option<u8> {
        self.bytes::<1>(addr).map(|bytes| bytes[0])
    }
    fn u32(&self, addr: u64) -> Option<u32> {
        self.bytes(addr).map(u32::from_le_bytes)
    }
    fn u64(&self, addr: u64) -> Option<u64> {
        self.bytes(addr).map(u64::from_le_bytes)
    }

    fn sums_to_zero(&self, addr: u64, length: u32) -> bool {
        let mut sum = 0u8;
        for offset in 0..u64::from(length) {
            match self.u8(addr.wrapping_add(offset)) {
                Some(byte) => sum = sum.wrapping_add(byte),
                None => return false,
            }
        }
        sum == 0
    }

    /// The root table's address, and whether its entries have eight bytes (XSDT).
    fn root(&self, rsdp: u64) -> Option<(u64, bool)> {
        if self.bytes::<8>(rsdp)? != *b"RSD PTR " || !self.sums_to_zero(rsdp, 20) {
            return None;
        }
        let xsdt = self.u64(rsdp + 24).filter(|addr| *addr != 0);
        match (self.u8(rsdp + 15)?, xsdt) {
            (2.., Some(xsdt)) if self.sums_to_zero(rsdp, 36) => Some((xsdt, true)),
            _ => Some((u64::from(self.u32(rsdp + 16)?), false)),
        }
    }

    fn table(&self, addr: u64) -> Option<Table> {
        let length = self.u32(addr.checked_add(4)?)?;
        let sane = (36..=MAX_TABLE).contains(&length) && self.sums_to_zero(addr, length);
        sane.then_some(Table { addr, length })
    }

    /// A port from a generic address structure in system I/O space, or from the older field.
    fn port(&self, fadt: &Table, old: u32, extended: u32) -> Option<u16> {
        let gas = fadt.addr + u64::from(extended);
        if fadt.length >= extended + 12
            && self.u8(gas)? == 1
            && let Some(port) = self.u64(gas + 4).filter(|port| *port != 0)
        {
            return u16::try_from(port).ok();
        }
        let port = self
            .u32(fadt.addr + u64::from(old))
            .filter(|port| *port != 0)?;
        u16::try_from(port).ok()
    }

    fn fadt(&self, fadt: &Table, info: &mut AcpiInfo) {
        if fadt.length < 116 {
            info.damaged += 1;
            return;
        }
        let flags = self.u32(fadt.addr + 112).unwrap_or(0);
        info.pm_timer = self
            .port(fadt, 76, 208)
            .map(|port| (port, flags & 1 << 8 != 0));
        info.pm1a_control = self.port(fadt, 64, 172);
        info.pm1b_control = self.port(fadt, 68, 184);
        let smi = self
            .u32(fadt.addr + 48)
            .and_then(|port| u16::try_from(port).ok());
        info.enable = smi.filter(|port| *port != 0).zip(self.u8(fadt.addr + 52));
        if flags & 1 << 10 != 0 && fadt.length >= 129 && self.u8(fadt.addr + 116) == Some(1) {
            let port = self
                .u64(fadt.addr + 120)
                .and_then(|port| u16::try_from(port).ok());
            info.reset = port.zip(self.u8(fadt.addr + 128));
        }
        let extended = if fadt.length >= 148 {
            self.u64(fadt.addr + 140)
        } else {
            None
        };
        let dsdt = extended.filter(|addr| *addr != 0);
        let dsdt = dsdt.or_else(|| self.u32(fadt.addr + 40).map(u64::from));
        match dsdt.and_then(|addr| self.table(addr)) {
            Some(dsdt) => info.s5 = self.s5(&dsdt),
            None => info.damaged += 1,
        }
    }

    /// Finds `Name (\_S5, Package () {a, b, …})` in the DSDT's byte code (ACPI 6.5 §20.2): an
    /// interpreter for two small integers would be larger than the rest of this room.
    fn s5(&self, dsdt: &Table) -> Option<(u8, u8)> {
        let end = dsdt.addr + u64::from(dsdt.length);
        let mut at = dsdt.addr + 36;
        while at + 8 < end {
            if self.u8(at)? == b'_' && self.bytes::<4>(at)? == *b"_S5_" && self.u8(at + 4)? == 0x12
            {
                // PkgLength: the two high bits of its first byte count the bytes that follow.
                let package = at + 5 + u64::from(self.u8(at + 5)? >> 6) + 1;
                let (first, next) = self.small_integer(package + 1)?;
                let (second, _) = self.small_integer(next)?;
                return Some((first, second));
            }
            at += 1;
        }
        None
    }

    fn small_integer(&self, at: u64) -> Option<(u8, u64)> {
        match self.u8(at)? {
            value @ 0..=1 => Some((value, at + 1)),
            0x0a => Some((self.u8(at + 1)?, at + 2)),
            0x0b => Some((self.u8(at + 1)?, at + 3)),
            0x0c => Some((self.u8(at + 1)?, at + 5)),
            _ => None,
        }
    }

    fn madt(&self, madt: &Table, info: &mut AcpiInfo) {
        info.madt = Some((madt.addr, madt.length));
        let whole = self.entries(madt, |kind, at, length| match kind {
            // I/O APIC: address, and the first GSI it serves.
            1 if length >= 12 && self.u32(at + 8) == Some(0) => {
                info.io_apic = self.u32(at + 4).map(u64::from);
            }
            // Interrupt source override: bus, source, GSI.
            2 if length >= 10 && self.u8(at + 3) == Some(4) => info.com1_gsi = self.u8(at + 4),
            _ => {}
        });
        info.damaged += u32::from(!whole);
    }

    /// Walks the MADT's entries: kind, address, length. False when one is damaged, where the walk
    /// ends.
    fn entries(&self, madt: &Table, mut each: impl FnMut(u8, u64, u64)) -> bool {
        let end = madt.addr + u64::from(madt.length);
        let mut at = madt.addr + 44;
        while at + 2 <= end {
            let (Some(kind), Some(length)) = (self.u8(at), self.u8(at + 1)) else {
                return false;
            };
            let length = u64::from(length);
            if length < 2 || at + length > end {
                return false;
            }
            each(kind, at, length);
            at += length;
        }
        true
    }
}

/// The processors that the firmware lists (ACPI 6.5 §5.2.12.2, §5.2.12.12).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Processors {
    /// APIC ids of those that are enabled, in the firmware's order, each once, without the boot
    /// core's.
    pub ids: Vec<u32>,
    /// How many more could be added while the machine runs.
    pub spare: u32,
    /// How many were left out because the list was full.
    pub left_out: u32,
}

/// Lists the processors beside the boot core, which has the id `boot`.
#[must_use]
pub fn processors(map: DirectMap, info: &AcpiInfo, boot: u32) -> Processors {
    const ENABLED: u32 = 1 << 0;
    const ONLINE_CAPABLE: u32 = 1 << 1;
    let reader = Reader { map };
    let mut found = Processors::default();
    let Some((addr, length)) = info.madt else {
        return found;
    };
    reader.entries(&Table { addr, length }, |kind, at, length| {
        // Local APIC: id of 8 bits, where 255 is none; local x2APIC: id of 32 bits.
        let (id, flags) = match (kind, length) {
            (0, 8..) => {
                let id = reader.u8(at + 3).filter(|id| *id != 0xff);
                (id.map(u32::from), reader.u32(at + 4))
            }
            (9, 16..) => {
                let id = reader.u32(at + 4).filter(|id| *id != u32::MAX);
                (id, reader.u32(at + 8))
            }
            _ => return,
        };
        let (Some(id), Some(flags)) = (id, flags) else {
            return;
        };
        if flags & ENABLED == 0 {
            found.spare += u32::from(flags & ONLINE_CAPABLE != 0);
        } else if id == boot || found.ids.contains(&id) {
            // Known: an id below 255 may stand in an entry of each kind.
        } else if found.ids.len() < MAX_PROCESSORS - 1 {
            found.ids.push(id);
        } else {
            found.left_out += 1;
        }
    });
    found
}

/// Where memory leads to the configuration space of these PCI buses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EcamRegion {
    /// Where bus 0 would be.
    pub base: u64,
    /// The buses' segment.
    pub segment: u16,
    /// The first of them.
    pub first_bus: u8,
    /// The last of them.
    pub last_bus: u8,
}

/// Lists the regions of the MCFG (PCI Firmware 3.3 §4.1.2) that make sense.
#[must_use]
pub fn ecam(map: DirectMap, info: &AcpiInfo) -> Vec<EcamRegion> {
    const MOST: usize = 64;
    let reader = Reader { map };
    let (addr, length) = info.mcfg.unwrap_or((0, 0));
    let entries = u64::from(length.saturating_sub(44) / 16);
    let entry = |index| {
        let at = addr + 44 + 16 * index;
        let [a, b, first_bus, last_bus] = reader.bytes(at + 8)?;
        let base = reader.u64(at)?;
        let sane = base != 0 && base.is_multiple_of(1 << 20) && first_bus <= last_bus;
        sane.then_some(EcamRegion {
            base,
            segment: u16::from_le_bytes([a, b]),
            first_bus,
            last_bus,
        })
    };
    (0..entries).filter_map(entry).take(MOST).collect()
}

impl AcpiInfo {
    /// What to write to PM1a and PM1b control to enter S5: SLP_TYP and SLP_EN.
    #[must_use]
    pub fn sleep_values(&self) -> Option<(u16, u16)> {
        let (a, b) = self.s5?;
        let value = |kind: u8| u16::from(kind & 7) << 10 | 1 << 13;
        Some((value(a), value(b)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct World(Vec<u8>);

    impl World {
        fn put(&mut self, at: usize, bytes: &[u8]) {
            self.0[at..at + bytes.len()].copy_from_slice(bytes);
        }
        fn seal(&mut self, at: usize, length: usize, checksum: usize) {
            self.0[at + checksum] = 0;
            let sum = self.0[at..at + length]
                .iter()
                .fold(0u8, |sum, byte| sum.wrapping_add(*byte));
            self.0[at + checksum] = 0u8.wrapping_sub(sum);
        }
        fn read(&mut self) -> AcpiInfo {
            // SAFETY: the "physical" range is this vector, borrowed for the whole call.
            read(
                unsafe { DirectMap::new(self.0.as_mut_ptr() as u64, self.0.len() as u64) },
                0x100,
            )
        }
    }

    /// RSDP at 0x100 → RSDT at 0x200 → one table, to be put at 0x300.
    fn rooted(bytes: usize) -> World {
        let mut world = World(vec![0; bytes]);
        world.put(0x100, b"RSD PTR ");
        world.put(0x110, &0x200u32.to_le_bytes());
        world.seal(0x100, 20, 8);
        world.put(0x200, b"RSDT");
        world.put(0x204, &40u32.to_le_bytes());
        world.put(0x224, &0x300u32.to_le_bytes());
        world.seal(0x200, 40, 9);
        world
    }

    /// A FADT that leads to a DSDT at 0x500.
    fn world() -> World {
        let mut world = rooted(0x1000);
        world.put(0x300, b"FACP");
        world.put(0x304, &116u32.to_le_bytes());
        world.put(0x328, &0x500u32.to_le_bytes());
        world.put(0x340, &0xb004u32.to_le_bytes());
        world.put(0x34c, &0xb008u32.to_le_bytes());
        world.seal(0x300, 116, 9);
        world.put(0x500, b"DSDT");
        world.put(0x504, &64u32.to_le_bytes());
        world.put(0x528, b"_S5_\x12\x06\x04\x0a\x05\x0a\x05\x00\x00");
        world.seal(0x500, 64, 9);
        world
    }

    #[test]
    fn the_registers_of_a_plain_pc_are_found() {
        let info = world().read();
        assert_eq!(info.pm_timer, Some((0xb008, false)));
        assert_eq!(info.pm1a_control, Some(0xb004));
        assert_eq!(info.sleep_values(), Some((0x3400, 0x3400)));
        assert_eq!(info.damaged, 0);
    }

    #[test]
    fn a_table_with_a_wrong_checksum_is_not_believed() {
        let mut world = world();
        world.0[0x34c] ^= 1;
        let info = world.read();
        assert_eq!((info.pm_timer, info.damaged), (None, 1));
    }

    /// A world whose only table is a MADT with these entries, sealed.
    fn madt(entries: &[u8]) -> World {
        let mut world = rooted(0x1000 + entries.len());
        let length = 44 + entries.len();
        world.put(0x300, b"APIC");
        world.put(0x304, &(length as u32).to_le_bytes());
        world.put(0x32c, entries);
        world.seal(0x300, length, 9);
        world
    }

    impl World {
        fn processors(&mut self, boot: u32) -> (Processors, u32) {
            let info = self.read();
            // SAFETY: the "physical" range is this vector, borrowed for the whole call.
            let map = unsafe { DirectMap::new(self.0.as_mut_ptr() as u64, self.0.len() as u64) };
            (processors(map, &info, boot), info.damaged)
        }
    }

    fn local(id: u8, flags: u8) -> Vec<u8> {
        vec![0, 8, id, id, flags, 0, 0, 0]
    }

    fn wide(id: u32, flags: u8) -> Vec<u8> {
        let id = id.to_le_bytes();
        let mut entry = vec![9, 16, 0, 0];
        entry.extend(id);
        entry.extend([flags, 0, 0, 0]);
        entry.extend(id);
        entry
    }

    #[test]
    fn processors_are_listed_once_and_without_the_boot_core() {
        let io_apic = [1, 12, 0, 0, 0, 0, 0xc0, 0xfe, 0, 0, 0, 0].to_vec();
        let entries = [
            local(0, 1),
            local(4, 1),
            local(4, 1),
            local(6, 0),
            local(8, 2),
            local(0xff, 1),
            io_apic,
            wide(4, 1),
            wide(0x1_0000, 1),
            wide(u32::MAX, 1),
            wide(300, 3),
        ];
        let mut world = madt(&entries.concat());
        let (found, damaged) = world.processors(0);
        assert_eq!(found.ids, [4, 0x1_0000, 300]);
        assert_eq!((found.spare, found.left_out, damaged), (1, 0, 0));
        assert_eq!(world.read().io_apic, Some(0xfec0_0000));
        let (found, _) = world.processors(300);
        assert_eq!(found.ids, [0, 4, 0x1_0000]);
    }

    #[test]
    fn a_damaged_madt_is_believed_up_to_the_damage() {
        for (tail, name) in [
            (vec![0, 0, 2, 2, 1, 0, 0, 0], "an entry of no length"),
            (
                vec![0, 1, 2, 2, 1, 0, 0, 0],
                "an entry shorter than its header",
            ),
            (vec![9, 16, 0, 0, 7], "an entry beyond the end"),
        ] {
            let entries = [local(1, 1), tail].concat();
            let (found, damaged) = madt(&entries).processors(0);
            assert_eq!((found.ids, damaged), (vec![1], 1), "{name}");
        }
        // An entry that is too short for its kind says nothing.
        let (found, damaged) = madt(&[0, 4, 1, 1, 9, 8, 0, 0, 1, 0, 0, 0]).processors(0);
        assert_eq!((found.ids, damaged), (vec![], 0));
    }

    #[test]
    fn places_of_configuration_space_that_make_no_sense_are_left_out() {
        let entry = |base: u64, segment: u16, first, last| {
            let [a, b] = segment.to_le_bytes();
            [&base.to_le_bytes()[..], &[a, b, first, last, 0, 0, 0, 0]].concat()
        };
        let entries = [
            entry(0xe000_0000, 0, 0, 255),
            entry(0, 1, 0, 255),
            entry(0x1_0000_0000, 2, 16, 31),
            entry(0x1234, 3, 0, 255),
            entry(0xd000_0000, 4, 9, 8),
            vec![0; 15],
        ];
        // The header is as long as the MADT's.
        let entries = entries.concat();
        let mut world = madt(&entries);
        world.put(0x300, b"MCFG");
        world.seal(0x300, 44 + entries.len(), 9);
        let info = world.read();
        // SAFETY: the "physical" range is this vector, borrowed for the whole call.
        let map = unsafe { DirectMap::new(world.0.as_mut_ptr() as u64, world.0.len() as u64) };
        let region = |base, segment, first_bus, last_bus| EcamRegion {
            base,
            segment,
            first_bus,
            last_bus,
        };
        let want = [
            region(0xe000_0000, 0, 0, 255),
            region(0x1_0000_0000, 2, 16, 31),
        ];
        assert_eq!(ecam(map, &info), want);
        assert_eq!(ecam(map, &AcpiInfo::default()), []);
    }

    #[test]
    fn ten_thousand_processors_are_cut_to_the_bound() {
        let entries: Vec<u8> = (0..10_000).flat_map(|id| wide(id, 1)).collect();
        let (found, damaged) = madt(&entries).processors(0);
        assert_eq!(found.ids.len(), MAX_PROCESSORS - 1);
        assert_eq!(
            (found.left_out, damaged),
            (10_000 - MAX_PROCESSORS as u32, 0)
        );
    }

    #[test]
    fn garbage_never_panics() {
        let mut seed = 1u64;
        for _ in 0..20_000 {
            let mut world = world();
            for _ in 0..4 {
                seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                let at = 0x100 + (seed >> 40) as usize % 0x480;
                world.0[at] = (seed >> 32) as u8;
            }
            for (at, length, checksum) in [(0x100, 20, 8), (0x200, 40, 9), (0x300, 116, 9)] {
                world.seal(at, length, checksum);
            }
            world.read();
        }
    }
}
