//! ACPI tables for a guest (ACPI 6.5, chapter 5): what hardware there is, in the words operating
//! systems ask for it.
//!
//! The tables describe [`crate::map`] and nothing else, so they say what the devices do: a full
//! (not hardware-reduced) ACPI machine that is always in ACPI mode, with fixed power button, PM
//! timer and reset register, legacy devices behind the 8259A pair and the I/O APIC, and one PCI
//! Express root with configuration mechanism 1 and ECAM. The blob is copied to
//! [`map::ACPI_TABLES`]; its first bytes are the root pointer, which both a loader can hand over
//! and a scan of the ROM area finds.

use alloc::{format, vec, vec::Vec};

use acpi_tables::{
    Aml, AmlSink,
    aml::{
        AddressSpace, AddressSpaceCacheable, And, Arg, CreateDWordField, Device, EISAName, Else,
        Equal, IO, If, Local, Memory32Fixed, Method, Name, NotEqual, Or, Package, PackageBuilder,
        Path, ResourceTemplate, Return, Scope, Store, Uuid,
    },
    facs::FACS,
    fadt::{FADTBuilder, Flags, PmProfile},
    gas::{AccessSize, AddressSpace as Space, GAS},
    mcfg::MCFG,
    sdt::Sdt,
    xsdt::XSDT,
};

use arch::{GuestMemory, GuestPhysAddr, MemoryFault};
use spin::Once;

use crate::{map, watchdog};

const OEM: [u8; 6] = *b"TESERA";
const OEM_TABLE: [u8; 8] = *b"TESSERA ";
const OEM_REVISION: u32 = 1;

/// What differs between guests.
#[derive(Clone, Copy, Debug)]
pub struct AcpiConfig {
    /// Virtual CPUs. Processor UIDs and local APIC identifiers both count from zero.
    pub vcpus: u32,
    /// Whether there is an HPET.
    pub hpet: bool,
    /// Whether there is a watchdog.
    pub watchdog: bool,
}

/// The tables need more room than [`map::ACPI_TABLES`] has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TooLarge {
    /// What they need, in bytes.
    pub need: usize,
}

impl core::fmt::Display for TooLarge {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        let room = map::ACPI_TABLES.end - map::ACPI_TABLES.start;
        write!(
            f,
            "ACPI tables of {} bytes do not fit into {room}; use fewer vCPUs",
            self.need
        )
    }
}

/// Writes all tables into a guest's memory; gives the address of the root pointer.
///
/// # Errors
/// The address that cannot be written: there is no RAM, or the tables would leave their area.
pub fn install(
    config: &AcpiConfig,
    memory: &mut dyn GuestMemory,
) -> Result<GuestPhysAddr, MemoryFault> {
    let end = GuestPhysAddr::new(map::ACPI_TABLES.end);
    let tables = build(config).map_err(|TooLarge { .. }| MemoryFault::NotRam(end))?;
    let root = GuestPhysAddr::new(map::ACPI_TABLES.start);
    memory.write(root, &tables)?;
    Ok(root)
}

/// Builds all tables, to be written to guest memory at the start of [`map::ACPI_TABLES`], which is
/// also the address of the root pointer.
///
/// # Errors
/// Too many CPUs for the area.
pub fn build(config: &AcpiConfig) -> Result<Vec<u8>, TooLarge> {
    let mut blob = Blob(vec![0; RSDP_LENGTH]);
    // The FACS is shared with the guest's ACPI code and has an alignment of its own (§5.2.10).
    let facs = blob.place(&FACS::new(), 64);
    let dsdt = blob.place(&dsdt(config), 16);
    let mut tables = vec![
        blob.place(&fadt(facs, dsdt), 16),
        blob.place(&madt(config.vcpus), 16),
        blob.place(&mcfg(), 16),
    ];
    if config.hpet {
        tables.push(blob.place(&hpet(), 16));
    }
    if config.watchdog {
        tables.push(blob.place(&wdat(), 16));
    }
    let mut xsdt = XSDT::new(OEM, OEM_TABLE, OEM_REVISION);
    let mut pointers = Vec::new();
    for table in &tables {
        xsdt.add_entry(u64::from(*table));
        pointers.dword(*table);
    }
    let rsdt = blob.place(&table(*b"RSDT", 1, &pointers), 16);
    let xsdt = blob.place(&xsdt, 16);
    let mut blob = blob.0;
    if let Some(root) = blob.first_chunk_mut() {
        *root = rsdp(rsdt, xsdt);
    }
    let room = map::ACPI_TABLES.end - map::ACPI_TABLES.start;
    if blob.len() as u64 <= room {
        Ok(blob)
    } else {
        Err(TooLarge { need: blob.len() })
    }
}

/// The tables as they will lie in guest memory.
struct Blob(Vec<u8>);

impl Blob {
    /// Appends a table; gives its guest-physical address.
    fn place(&mut self, table: &dyn Aml, align: usize) -> u32 {
        self.0.resize(self.0.len().next_multiple_of(align), 0);
        // `build` checks the size of the whole: no address is used that would not fit.
        let address = map::ACPI_TABLES.start as u32 + self.0.len() as u32;
        table.to_aml_bytes(&mut self.0);
        address
    }
}

/// A table with the standard header.
fn table(signature: [u8; 4], revision: u8, body: &[u8]) -> Sdt {
    let mut table = Sdt::new(signature, 36, revision, OEM, OEM_TABLE, OEM_REVISION);
    table.append_slice(body);
    table
}

const RSDP_LENGTH: usize = 36;

/// Root pointer (§5.2.5.3) with both a 32-bit and a 64-bit root table, for guests that know one.
fn rsdp(rsdt: u32, xsdt: u32) -> [u8; RSDP_LENGTH] {
    let mut root = Vec::with_capacity(RSDP_LENGTH);
    root.vec(b"RSD PTR \0");
    root.vec(&OEM);
    root.byte(2);
    root.dword(rsdt);
    root.dword(RSDP_LENGTH as u32);
    root.qword(u64::from(xsdt));
    root.dword(0);
    let sum = |bytes: &[u8]| bytes.iter().fold(0u8, |sum, byte| sum.wrapping_sub(*byte));
    let mut bytes = [0; RSDP_LENGTH];
    bytes.copy_from_slice(&root);
    bytes[8] = sum(&bytes[..20]);
    bytes[32] = sum(&bytes);
    bytes
}

/// Fixed hardware (§5.2.9).
fn fadt(facs: u32, dsdt: u32) -> impl Aml {
    let io = |port: u16, bytes: u8, access| {
        GAS::new(Space::SystemIo, bytes * 8, 0, access, u64::from(port))
    };
    /// IAPC_BOOT_ARCH: there are ISA devices and an 8042, and no VGA to probe for.
    const BOOT_ARCH: u16 = 1 << 0 | 1 << 1 | 1 << 2;
    /// A C-state latency that says the state does not exist.
    const NO_STATE: u16 = 0xffff;
    let mut fadt = FADTBuilder::new(OEM, OEM_TABLE, OEM_REVISION)
        .firmware_ctrl_32(facs)
        .preferred_pm_profile(PmProfile::EnterpriseServer)
        .gpe_info(map::GPE0.into(), 0, map::GPE0_LENGTH, 0, 0)
        .flag(Flags::Wbinvd)
        .flag(Flags::ProcC1)
        // The power button is the fixed one, so its flag stays clear. There is no sleep button,
        // and no wake from sleep by the clock.
        .flag(Flags::SlpButton)
        .flag(Flags::FixRtc)
        .flag(Flags::TmrValExt)
        .flag(Flags::ResetRegSup);
    fadt.dsdt = dsdt.into();
    fadt.x_dsdt = u64::from(dsdt).into();
    fadt.sci_int = u16::from(map::SCI).into();
    // SMI_CMD stays zero: there is no legacy mode to leave, SCI_EN is always set (§4.8.2.5).
    fadt.pm1a_evt_blk = u32::from(map::PM1_EVENT).into();
    fadt.pm1a_cnt_blk = u32::from(map::PM1_CONTROL).into();
    fadt.pm_tmr_blk = u32::from(map::PM_TIMER).into();
    fadt.pm1_evt_len = 4;
    fadt.pm1_cnt_len = 2;
    fadt.pm_tmr_len = 4;
    fadt.x_pm1a_evt_blk = io(map::PM1_EVENT, 4, AccessSize::WordAccess);
    fadt.x_pm1a_cnt_blk = io(map::PM1_CONTROL, 2, AccessSize::WordAccess);
    fadt.x_pm_tmr_blk = io(map::PM_TIMER, 4, AccessSize::DwordAccess);
    fadt.x_gpe0_blk = io(map::GPE0, map::GPE0_LENGTH, AccessSize::ByteAccess);
    fadt.p_lvl2_lat = NO_STATE.into();
    fadt.p_lvl3_lat = NO_STATE.into();
    fadt.century = map::CMOS_CENTURY;
    fadt.iapc_boot_arch = BOOT_ARCH.into();
    fadt.reset_reg = io(map::RESET, 1, AccessSize::ByteAccess);
    fadt.reset_value = map::RESET_VALUE;
    fadt.hypervisor_vendor_identity = u64::from_le_bytes(*b"Tessera\0").into();
    fadt.finalize()
}

/// Interrupt controllers (§5.2.12).
fn madt(vcpus: u32) -> Sdt {
    /// MPS INTI flags (§5.2.12.5): active high and level triggered.
    const HIGH_LEVEL: u16 = 1 | 3 << 2;
    /// As the bus has it: for ISA, active high and edge triggered.
    const CONFORMS: u16 = 0;
    const ENABLED: u32 = 1;
    const PCAT_COMPAT: u32 = 1;
    let mut body = Vec::new();
    body.dword(map::LOCAL_APIC as u32);
    body.dword(PCAT_COMPAT);
    for id in 0..vcpus {
        match u8::try_from(id) {
            Ok(id @ 0..=254) => {
                body.vec(&[0, 8, id, id]);
                body.dword(ENABLED);
            }
            _ => {
                body.vec(&[9, 16, 0, 0]);
                body.dword(id);
                body.dword(ENABLED);
                body.dword(id);
            }
        }
    }
    // The I/O APIC: identifier 0, global system interrupts from 0.
    body.vec(&[1, 12, 0, 0]);
    body.dword(map::IO_APIC as u32);
    body.dword(0);
    for (irq, gsi, flags) in [
        (0, map::TIMER_GSI, CONFORMS),
        (map::SCI, u32::from(map::SCI), HIGH_LEVEL),
    ] {
        body.vec(&[2, 10, 0, irq]);
        body.dword(gsi);
        body.word(flags);
    }
    // NMI on LINT1 of every processor: in local APIC and in x2APIC words.
    body.vec(&[4, 6, 0xff]);
    body.word(CONFORMS);
    body.byte(1);
    if vcpus > 255 {
        body.vec(&[0xa, 12]);
        body.word(CONFORMS);
        body.dword(u32::MAX);
        body.vec(&[1, 0, 0, 0]);
    }
    table(*b"APIC", 5, &body)
}

/// ECAM (PCI Firmware Specification 3.3 §4.1.2).
fn mcfg() -> MCFG {
    let mut mcfg = MCFG::new(OEM, OEM_TABLE, OEM_REVISION);
    mcfg.add_ecam(map::ECAM.start, 0, 0, map::PCI_LAST_BUS);
    mcfg
}

/// HPET (IA-PC HPET 1.0a §3.2.4).
fn hpet() -> Sdt {
    /// Revision 1, three comparators, 64-bit counter, legacy replacement, vendor 8086.
    const BLOCK_ID: u32 = 0x8086_0000 | 1 << 15 | 1 << 13 | 2 << 8 | 1;
    let mut body = Vec::new();
    body.dword(BLOCK_ID);
    GAS::new(Space::SystemMemory, 64, 0, AccessSize::Undefined, map::HPET).to_aml_bytes(&mut body);
    body.byte(0);
    body.word(0x80);
    body.byte(0);
    table(*b"HPET", 1, &body)
}

/// The watchdog, as instructions on its registers (Microsoft, Hardware Watchdog Timers Design
/// Specification; ACPI 6.5 table 5.6 reserves the name). The whole time is in the first stage: an
/// interrupt at its end would be nobody's.
fn wdat() -> Sdt {
    use watchdog::{
        ENABLE, LOCK_PORT, PRELOAD_1, PRELOAD_2, PRELOAD_MASK, RELOAD, RELOAD_NOW, TIMED_OUT,
        UNLOCK,
    };
    const READ_VALUE: u8 = 0;
    const READ_COUNTDOWN: u8 = 1;
    const WRITE_VALUE: u8 = 2;
    const WRITE_COUNTDOWN: u8 = 3;
    const PRESERVE: u8 = 0x80;
    /// What to do, with which register, the value, and the bits that count.
    type Instruction = (u8, u16, u32, u32);
    /// In place of an instruction: the sequence that opens the registers for one write.
    const OPEN: Instruction = (u8::MAX, 0, 0, 0);
    let enabled = |what, value| (what, LOCK_PORT, value, ENABLE);
    let restart = (WRITE_VALUE, RELOAD, RELOAD_NOW, RELOAD_NOW);
    let actions: [(u8, &[Instruction]); 9] = [
        (0x01, &[OPEN, restart]),
        (0x05, &[(READ_COUNTDOWN, PRELOAD_1, 0, PRELOAD_MASK)]),
        (
            0x06,
            &[
                OPEN,
                (WRITE_COUNTDOWN, PRELOAD_1, 0, PRELOAD_MASK),
                OPEN,
                (WRITE_VALUE, PRELOAD_2, 1, PRELOAD_MASK),
            ],
        ),
        (0x08, &[enabled(READ_VALUE, ENABLE)]),
        (0x09, &[enabled(WRITE_VALUE | PRESERVE, ENABLE)]),
        (0x0a, &[enabled(READ_VALUE, 0)]),
        (0x0b, &[enabled(WRITE_VALUE | PRESERVE, 0)]),
        (0x20, &[(READ_VALUE, RELOAD, TIMED_OUT, TIMED_OUT)]),
        (0x21, &[OPEN, (WRITE_VALUE, RELOAD, TIMED_OUT, TIMED_OUT)]),
    ];
    let (mut count, mut entries) = (0, Vec::new());
    let mut entry = |action, (what, register, value, mask): Instruction| {
        count += 1;
        let shift = mask.trailing_zeros();
        let (bits, access) = match register {
            LOCK_PORT => (8, AccessSize::ByteAccess),
            _ => (32, AccessSize::DwordAccess),
        };
        let port = u64::from(map::WATCHDOG.start + register);
        entries.vec(&[action, what, 0, 0]);
        GAS::new(Space::SystemIo, bits, shift as u8, access, port).to_aml_bytes(&mut entries);
        entries.dword(value >> shift);
        entries.dword(mask >> shift);
    };
    for (action, instructions) in actions {
        for instruction in instructions {
            if *instruction == OPEN {
                for key in UNLOCK {
                    entry(action, (WRITE_VALUE, RELOAD, key.into(), u32::MAX));
                }
            } else {
                entry(action, *instruction);
            }
        }
    }
    let mut body = Vec::new();
    body.dword(32);
    // No PCI device: an address in full would make it a legacy one.
    body.vec(&[0xff, 0, 0xff, 0xff, 0xff, 0, 0, 0]);
    // A count is a millisecond; from 1 to as many as the register holds.
    body.dword(1);
    body.dword(PRELOAD_MASK);
    body.dword(1);
    body.dword(1);
    body.dword(count);
    body.vec(&entries);
    table(*b"WDAT", 1, &body)
}

/// A small IRQ descriptor: edge triggered, active high, exclusive (§6.4.2.1). The legacy devices
/// use it, because its numbers are those of the 8259A pair as well.
struct Irq(u8);

impl Aml for Irq {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        sink.byte(0x22);
        sink.word(1 << self.0);
    }
}

/// A run of ports that decodes all 16 address bits.
fn ports(first: u16, count: u8) -> IO {
    IO::new(first, first, 1, count)
}

/// A legacy device with a Plug and Play identifier and fixed resources.
fn legacy(name: &str, id: &str, resources: Vec<&dyn Aml>) -> Vec<u8> {
    bytes(&Device::new(
        name.into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new(id)),
            &Name::new("_CRS".into(), &ResourceTemplate::new(resources)),
        ],
    ))
}

/// AML that is there already.
struct Raw<'a>(&'a [u8]);

impl Aml for Raw<'_> {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        sink.vec(self.0);
    }
}

fn bytes(aml: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    aml.to_aml_bytes(&mut bytes);
    bytes
}

/// Everything that is not fixed hardware.
fn dsdt(config: &AcpiConfig) -> Sdt {
    let s5 = map::S5_SLEEP_TYPE;
    let mut body = bytes(&Name::new(
        "_S5_".into(),
        &Package::new(vec![&s5, &s5, &0u8, &0u8]),
    ));
    // Which interrupt controller the guest uses: it tells by _PIC, and _PRT answers in kind.
    Name::new("PICM".into(), &0u8).to_aml_bytes(&mut body);
    Method::new(
        "_PIC".into(),
        1,
        false,
        vec![&Store::new(&Path::new("PICM"), &Arg(0))],
    )
    .to_aml_bytes(&mut body);

    let mut devices = prepare().to_vec();
    devices.extend(motherboard());
    for uid in 0..config.vcpus {
        // Names have three hexadecimal digits; `build` refuses so many CPUs long before.
        let name = format!("C{:03X}", uid & 0xfff);
        let hid = Name::new("_HID".into(), &"ACPI0007");
        let uid = Name::new("_UID".into(), &uid);
        Device::new(Path::new(&name), vec![&hid, &uid]).to_aml_bytes(&mut devices);
    }
    if config.hpet {
        let registers = Memory32Fixed::new(false, map::HPET as u32, 0x400);
        devices.extend(legacy("HPET", "PNP0103", vec![&registers]));
    }
    Scope::new("_SB_".into(), vec![&Raw(&devices)]).to_aml_bytes(&mut body);
    table(*b"DSDT", 2, &body)
}

/// Builds what is the same for all guests, so that to make one takes no time for it: an interrupt
/// for each pin of each device is a million instructions' work.
pub fn prepare() -> &'static [u8] {
    static PCI_ROOT: Once<Vec<u8>> = Once::new();
    PCI_ROOT.call_once(pci_root)
}

/// The PCI Express root (PCI Firmware Specification 3.3 §4), with its windows and interrupts.
fn pci_root() -> Vec<u8> {
    let buses = AddressSpace::new_bus_number(0u16, u16::from(map::PCI_LAST_BUS));
    let mechanism_1 = ports(0xcf8, 8);
    let low_ports = AddressSpace::new_io(0u16, 0xcf7, None);
    let high_ports = AddressSpace::new_io(0xd00u16, 0xffff, None);
    let window = AddressSpace::new_memory(
        AddressSpaceCacheable::NotCacheable,
        true,
        map::PCI_WINDOW.start as u32,
        (map::PCI_WINDOW.end - 1) as u32,
        None,
    );
    let resources: Vec<&dyn Aml> = vec![&buses, &mechanism_1, &low_ports, &high_ports, &window];
    bytes(&Device::new(
        "PCI0".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0A08")),
            &Name::new("_CID".into(), &EISAName::new("PNP0A03")),
            &Name::new("_UID".into(), &0u8),
            &Name::new("_SEG".into(), &0u8),
            &Name::new("_BBN".into(), &0u8),
            &Name::new("_CRS".into(), &ResourceTemplate::new(resources)),
            &Raw(&osc()),
            &Name::new("PRTA".into(), &routing(|line| map::PCI_INTX_GSI[line])),
            &Name::new(
                "PRTP".into(),
                &routing(|line| u32::from(map::PCI_INTX_PIC[line])),
            ),
            &Method::new(
                "_PRT".into(),
                0,
                false,
                vec![
                    &If::new(&Path::new("PICM"), vec![&Return::new(&Path::new("PRTA"))]),
                    &Return::new(&Path::new("PRTP")),
                ],
            ),
        ],
    ))
}

/// `_PRT` (ACPI 6.5 §6.2.13): for each device and pin the interrupt of its line.
fn routing(interrupt: impl Fn(usize) -> u32) -> PackageBuilder {
    let mut routing = PackageBuilder::new();
    for device in 0..32u8 {
        for pin in 0..4u8 {
            let address = u32::from(device) << 16 | 0xffff;
            let interrupt = interrupt(map::pci_intx_line(device, pin));
            routing.add_element(&Package::new(vec![&address, &pin, &0u8, &interrupt]));
        }
    }
    routing
}

/// `_OSC` of a PCI root (PCI Firmware Specification 3.3 §4.5.1): the guest may have control of
/// every feature it asks for; no firmware is there to keep any.
fn osc() -> Vec<u8> {
    /// Hot plug, SHPC hot plug, power management events, error reporting, capability structures.
    const GRANTED: u8 = 0x1f;
    const UNKNOWN_UUID: u8 = 1 << 2;
    const UNKNOWN_REVISION: u8 = 1 << 3;
    const MASKED: u8 = 1 << 4;
    let [status, control] = [Path::new("CDW1"), Path::new("CDW3")];
    let report = |bit: &'static u8| Or::new(&status, &status, bit);
    bytes(&Method::new(
        "_OSC".into(),
        4,
        true,
        vec![
            &CreateDWordField::new(&status, &Arg(3), &0u8),
            &If::new(
                &Equal::new(&Arg(0), &Uuid::new("33db4d5b-1ff7-401c-9657-7441c03dd766")),
                vec![
                    &CreateDWordField::new(&control, &Arg(3), &8u8),
                    &And::new(&Local(0), &control, &GRANTED),
                    &If::new(
                        &NotEqual::new(&Arg(1), &1u8),
                        vec![&report(&UNKNOWN_REVISION)],
                    ),
                    &If::new(&NotEqual::new(&control, &Local(0)), vec![&report(&MASKED)]),
                    &Store::new(&control, &Local(0)),
                ],
            ),
            &Else::new(vec![&report(&UNKNOWN_UUID)]),
            &Return::new(&Arg(3)),
        ],
    ))
}

/// Legacy devices at fixed places, and what no driver may take.
fn motherboard() -> Vec<u8> {
    let fixed = |base: u64, size: u64| Memory32Fixed::new(true, base as u32, size as u32);
    [
        legacy(
            "COM1",
            "PNP0501",
            vec![&ports(map::COM1, 8), &Irq(map::COM1_IRQ)],
        ),
        legacy("RTC_", "PNP0B00", vec![&ports(0x70, 2), &Irq(8)]),
        legacy(
            "PS2K",
            "PNP0303",
            vec![&ports(0x60, 1), &ports(0x64, 1), &Irq(1)],
        ),
        legacy("PS2M", "PNP0F13", vec![&Irq(12)]),
        legacy(
            "PIC_",
            "PNP0000",
            vec![&ports(0x20, 2), &ports(0xa0, 2), &ports(0x4d0, 2), &Irq(2)],
        ),
        legacy("PIT_", "PNP0100", vec![&ports(0x40, 4), &Irq(0)]),
        legacy("SPKR", "PNP0800", vec![&ports(0x61, 1)]),
        legacy(
            "MBRD",
            "PNP0C02",
            vec![
                &ports(
                    map::PM_BLOCK.start,
                    (map::PM_BLOCK.end - map::PM_BLOCK.start) as u8,
                ),
                &fixed(map::ECAM.start, map::ECAM.end - map::ECAM.start),
                &fixed(map::IO_APIC, arch::PAGE_SIZE),
                &fixed(map::LOCAL_APIC, arch::PAGE_SIZE),
            ],
        ),
    ]
    .concat()
}

#[cfg(test)]
mod tests {
    extern crate std;

    use std::{fs, process::Command, string::String};

    use super::*;
    use crate::board::{Board, BoardConfig};
    use arch::Nanos;

    const ONE: AcpiConfig = AcpiConfig {
        vcpus: 1,
        hpet: true,
        watchdog: false,
    };

    const WATCHED: AcpiConfig = AcpiConfig {
        watchdog: true,
        ..ONE
    };

    fn number(bytes: &[u8]) -> usize {
        bytes
            .iter()
            .rev()
            .fold(0, |value, byte| value << 8 | usize::from(*byte))
    }

    /// All tables, found as a guest finds them: root pointer, root tables, FADT.
    fn walk(blob: &[u8]) -> Vec<(String, &[u8])> {
        let at = |address: usize| {
            let table = &blob[address - map::ACPI_TABLES.start as usize..];
            &table[..number(&table[4..8])]
        };
        let sum = |bytes: &[u8]| bytes.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte));
        let root = &blob[..36];
        assert_eq!(
            (&root[..8], sum(&root[..20]), sum(root)),
            (&b"RSD PTR "[..], 0, 0)
        );
        let rsdt = at(number(&root[16..20]));
        let xsdt = at(number(&root[24..32]));
        let old: Vec<_> = rsdt[36..].chunks(4).map(number).collect();
        let new: Vec<_> = xsdt[36..].chunks(8).map(number).collect();
        assert_eq!(old, new);
        let fadt = at(new[0]);
        assert_eq!(
            number(&fadt[40..44]),
            number(&fadt[140..148]),
            "DSDT, twice"
        );
        let facs = number(&fadt[36..40]);
        assert_eq!((facs % 64, &at(facs)[..4]), (0, &b"FACS"[..]));
        let tables = [rsdt, xsdt, at(number(&fadt[40..44]))];
        let tables = tables.into_iter().chain(new.into_iter().map(at));
        let named = |table| {
            assert_eq!(sum(table), 0);
            (String::from_utf8(table[..4].to_vec()).unwrap(), table)
        };
        tables.map(named).collect()
    }

    #[test]
    fn a_guest_finds_all_tables() {
        let blob = build(&ONE).unwrap();
        let names: Vec<_> = walk(&blob).into_iter().map(|(name, _)| name).collect();
        assert_eq!(
            names,
            ["RSDT", "XSDT", "DSDT", "FACP", "APIC", "MCFG", "HPET"]
        );
        let without = build(&AcpiConfig { hpet: false, ..ONE }).unwrap();
        assert_eq!(walk(&without).len(), 6);
    }

    #[test]
    fn processors_beyond_255_are_x2apics() {
        let blob = build(&AcpiConfig { vcpus: 257, ..ONE }).unwrap();
        let tables = walk(&blob);
        let mut entries = &tables.iter().find(|(name, _)| name == "APIC").unwrap().1[44..];
        let mut found = Vec::new();
        while let [kind, length, rest @ ..] = entries {
            found.push((*kind, number(&rest[..usize::from(*length) - 2])));
            entries = &entries[usize::from(*length)..];
        }
        // Identifier 255 is a broadcast to a local APIC, so 255 and up are x2APICs.
        assert_eq!(found[254], (0, 0x1_fefe));
        let kinds: Vec<_> = found[254..].iter().map(|entry| entry.0).collect();
        assert_eq!(kinds, [0, 9, 9, 1, 2, 2, 4, 10]);
        assert_eq!(
            found[258],
            (2, 2 << 16),
            "the timer's interrupt goes to pin 2"
        );
        assert_eq!(
            found[259],
            (2, 0xd << 48 | 9 << 16 | 9 << 8),
            "the SCI is level, active high"
        );
    }

    /// What a guest's driver does for one action, on a board.
    fn act(board: &mut Board, action: u8, countdown: u32, now: Nanos) -> Option<u32> {
        let blob = build(&WATCHED).unwrap();
        let tables = walk(&blob);
        let table = tables.iter().find(|(name, _)| name == "WDAT").unwrap().1;
        let entries = &table[36 + number(&table[36..40])..];
        assert_eq!(entries.len(), 24 * number(&table[64..68]));
        let mut result = None;
        for entry in entries.chunks(24).filter(|entry| entry[0] == action) {
            assert_eq!(entry[4], 1, "ports");
            let (shift, size) = (entry[6], 1 << (entry[7] - 1));
            let port = number(&entry[8..16]) as u16;
            let [value, mask] = [16, 20].map(|at| number(&entry[at..at + 4]) as u32);
            let read = board.port_read(port, size, now) >> shift & mask;
            let kept = match entry[1] & 0x80 {
                0 => 0,
                _ => board.port_read(port, size, now) & !(mask << shift),
            };
            let mut write = |value: u32| {
                board.port_write(port, size, kept | (value & mask) << shift, now);
            };
            match entry[1] & 0x7f {
                0 => result = Some(u32::from(read == value)),
                1 => result = Some(read),
                2 => write(value),
                _ => write(countdown),
            }
            board.tick(now);
        }
        result
    }

    #[test]
    fn a_driver_that_knows_the_table_alone_can_use_the_watchdog() {
        let mut board = Board::new(&BoardConfig {
            vcpus: 1,
            low_ram: 1 << 20,
            high_ram: 0,
            wall_clock: 0,
            hpet: false,
            debug_exit: false,
            debug_console: false,
            watchdog: true,
        });
        let second = |n: u64| Nanos(n * 1_000_000_000);
        let board = &mut board;
        assert_eq!(act(board, 8, 0, second(1)), Some(0), "does not run");
        assert_eq!(act(board, 0x20, 0, second(1)), Some(0), "did not expire");
        act(board, 6, 30_000, second(1));
        assert_eq!(act(board, 5, 0, second(1)), Some(30_000));
        act(board, 9, 0, second(1));
        assert_eq!(act(board, 8, 0, second(1)), Some(1), "runs");
        assert_eq!(act(board, 0xa, 0, second(1)), Some(0), "is not stopped");
        act(board, 1, 0, second(30));
        board.tick(second(59));
        assert!(!board.take_actions().watchdog);
        board.tick(second(61));
        assert!(board.take_actions().watchdog);
        assert_eq!(act(board, 0x20, 0, second(61)), Some(1), "it expired");
        board.reset(second(62));
        assert_eq!(act(board, 0x20, 0, second(62)), Some(1), "before the reset");
        act(board, 0x21, 0, second(62));
        assert_eq!(act(board, 0x20, 0, second(62)), Some(0));
        act(board, 6, 1_000, second(63));
        act(board, 9, 0, second(63));
        act(board, 0xb, 0, second(63));
        board.tick(second(100));
        assert!(!board.take_actions().watchdog, "stopped");
    }

    /// Processors are known by one number in MADT and DSDT.
    #[test]
    fn each_vcpu_has_its_entries() {
        for vcpus in [1, 3, 4, 64] {
            let blob = build(&AcpiConfig { vcpus, ..ONE }).unwrap();
            let tables = walk(&blob);
            let table = |name| tables.iter().find(|(n, _)| n == name).unwrap().1;
            let madt = &table("APIC")[44..];
            for (id, entry) in (0..vcpus as u8).zip(madt.chunks(8)) {
                assert_eq!(entry, [0, 8, id, id, 1, 0, 0, 0], "enabled local APIC");
            }
            assert_eq!(madt[8 * vcpus as usize], 1, "then the I/O APIC");
            let end = madt.len() - 6;
            assert_eq!(madt[end..], [4, 6, 0xff, 0, 0, 1], "NMI on LINT1 of all");
            let dsdt = table("DSDT");
            let named = |name: String| dsdt.windows(4).filter(|w| *w == name.as_bytes()).count();
            for id in 0..=vcpus {
                let devices = named(format!("C{id:03X}"));
                assert_eq!(devices, usize::from(id < vcpus), "{id}");
            }
        }
    }

    #[test]
    fn too_many_processors_are_refused() {
        let need = build(&AcpiConfig { vcpus: 4096, ..ONE }).unwrap_err().need;
        assert!(need > 0x2_0000);
    }

    /// ACPICA takes our tables apart and its compiler takes the result without a complaint.
    #[test]
    fn iasl_takes_the_tables_apart_and_back() {
        if Command::new("iasl").arg("-v").output().is_err() {
            std::println!("iasl is not installed: the tables are not compiled");
            return;
        }
        let folder = std::env::temp_dir().join(format!("tessera-acpi-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        let blob = build(&AcpiConfig {
            vcpus: 257,
            ..WATCHED
        })
        .unwrap();
        let iasl = |arguments: &[&str]| {
            let output = Command::new("iasl")
                .args(arguments)
                .current_dir(&folder)
                .output()
                .unwrap();
            let mut said = String::from_utf8_lossy(&output.stdout).into_owned();
            said += &String::from_utf8_lossy(&output.stderr);
            assert!(output.status.success(), "{said}");
            said
        };
        for (name, table) in walk(&blob) {
            fs::write(folder.join(format!("{name}.aml")), table).unwrap();
            let apart = iasl(&["-d", &format!("{name}.aml")]);
            assert!(
                !apart.contains("rror") && !apart.contains("arning"),
                "{apart}"
            );
            let text = fs::read_to_string(folder.join(format!("{name}.dsl"))).unwrap();
            assert!(
                !text.contains("/* Invalid") && !text.contains("Unknown"),
                "{text}"
            );
            let again = iasl(&["-p", "again", &format!("{name}.dsl")]);
            if name == "DSDT" {
                assert!(again.contains("0 Errors, 0 Warnings"), "{again}\n{text}");
            }
            let again = fs::read(folder.join("again.aml")).unwrap();
            assert_eq!(again[36..], table[36..], "{name}");
        }
        fs::remove_dir_all(&folder).unwrap();
    }
}
