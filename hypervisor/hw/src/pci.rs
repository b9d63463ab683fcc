//! The machine's PCI functions (PCI 3.0; PCI Express 6.0 ch. 7): finding them, and what a driver
//! needs of their configuration space.
//!
//! Configuration space is reached by ports 0xcf8 and 0xcfc (mechanism 1, PCI 3.0 §3.2.2.3), and
//! through memory where ACPI's MCFG table names a place (ECAM, PCI Express 6.0 §7.2.2) that the
//! direct map reaches and that shows the same as the ports. The direct map is write-back; like all
//! devices' memory, that of the ECAM is uncached by the MTRRs, which go before it (Intel SDM
//! Vol. 3A table 12-7).
//!
//! Every bus is looked at, whatever the bridges say, so that peer host bridges are found and a
//! bridge with wrong numbers leads nowhere. Nothing is changed in a function but by the driver that
//! takes it: the firmware's console may still be on one.

use crate::DirectMap;
use crate::acpi::EcamRegion;
use crate::mmio;
use crate::power::Port;
use alloc::vec::Vec;
use arch::HostPhysAddr;
use core::fmt;
use nic::{Registers, Width};
use spin::Mutex;

/// Where a function is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Address {
    /// A group of buses; 0 on most machines.
    pub segment: u16,
    /// Bus, 0 to 255.
    pub bus: u8,
    /// Device, 0 to 31.
    pub device: u8,
    /// Function, 0 to 7.
    pub function: u8,
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.segment != 0 {
            write!(f, "{:04x}:", self.segment)?;
        }
        write!(f, "{:02x}:{:02x}.{}", self.bus, self.device, self.function)
    }
}

/// A function that was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Function {
    /// Where.
    pub address: Address,
    /// Vendor.
    pub vendor: u16,
    /// Its number for the device.
    pub device: u16,
    /// Class, subclass and interface, 24 bits.
    pub class: u32,
}

/// Memory that a function decodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bar {
    /// Where.
    pub start: HostPhysAddr,
    /// How much, a power of two.
    pub bytes: u64,
}

/// How a function can interrupt without a pin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Messages {
    /// MSI: its capability.
    Msi(u16),
    /// MSI-X.
    MsiX {
        /// Its capability.
        capability: u16,
        /// The base address register of its table.
        bar: u8,
        /// Where the table begins there.
        offset: u32,
    },
}

/// A structure of a virtio device (virtio 1.2 §4.1.4).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VirtioPart {
    /// 1 common, 2 notifications, 3 interrupt status, 4 the device's own.
    pub kind: u8,
    /// Its base address register.
    pub bar: u8,
    /// Where it begins there.
    pub offset: u32,
    /// Its bytes.
    pub bytes: u32,
    /// How far apart the places of queues are, for kind 2.
    pub multiplier: u32,
}

/// How many functions are listed at the most.
const MAX_FUNCTIONS: usize = 1024;
/// More capabilities than fit in a configuration space.
const MAX_CAPABILITIES: usize = 48;

const ID: u16 = 0x00;
const COMMAND: u16 = 0x04;
const STATUS: u16 = 0x06;
const CLASS: u16 = 0x08;
const HEADER_TYPE: u16 = 0x0e;
const BARS: u16 = 0x10;
const CAPABILITIES: u16 = 0x34;
const SECONDARY_BUS: u16 = 0x19;
const INTERRUPT: u16 = 0x3c;
const CAPABILITY_POWER: u8 = 0x01;
const CAPABILITY_MSI: u8 = 0x05;
const CAPABILITY_VENDOR: u8 = 0x09;
const CAPABILITY_MSIX: u8 = 0x11;

/// A bridge from PCI to PCI, of any kind.
const CLASS_BRIDGE: u32 = 0x0604;

const COMMAND_IO: u32 = 1 << 0;
const COMMAND_MEMORY: u32 = 1 << 1;
const COMMAND_MASTER: u32 = 1 << 2;
const COMMAND_NO_PIN: u32 = 1 << 10;
const STATUS_CAPABILITIES: u32 = 1 << 4;
/// Status bits are cleared by writing 1: accesses of 32 bits to the command register leave them.
const NOTHING: u32 = u32::MAX;

/// Address and data port belong together.
static PORTS: Mutex<()> = Mutex::new(());

/// A way to configuration space.
trait Access {
    fn read(&self, at: Address, offset: u16, width: Width) -> u32;
    fn write(&self, at: Address, offset: u16, width: Width, value: u32);
    /// The buses that there may be.
    fn buses(&self) -> Vec<(u16, u8, u8)>;
}

/// The ports and the ECAM.
struct Real {
    map: DirectMap,
    ports: bool,
    ecam: Vec<EcamRegion>,
}

impl Real {
    /// The place of a register in the ECAM.
    fn place(&self, at: Address, offset: u16) -> Option<*mut u8> {
        let region = self.ecam.iter().find(|region| {
            region.segment == at.segment && (region.first_bus..=region.last_bus).contains(&at.bus)
        })?;
        let function = u64::from(at.bus) << 20
            | u64::from(at.device & 31) << 15
            | u64::from(at.function & 7) << 12
            | u64::from(offset & 0xfff);
        // The base is that of bus 0, whatever the first bus is (PCI Firmware 3.3 §4.1.2).
        let addr = HostPhysAddr::new(region.base).checked_add(function)?;
        self.map.pointer(addr, 4)
    }

    fn by_ports(&self, at: Address, offset: u16) -> Option<Port<u32>> {
        let reachable = self.ports && at.segment == 0 && offset < 0x100;
        reachable.then(|| {
            let address = 1 << 31
                | u32::from(at.bus) << 16
                | u32::from(at.device & 31) << 11
                | u32::from(at.function & 7) << 8
                | u32::from(offset & 0xfc);
            let mut port = Port::new(0xcf8);
            // SAFETY: the address port of mechanism 1, which `find` saw to be there; the caller
            // holds its lock.
            unsafe { port.write(address) };
            Port::new(0xcfc)
        })
    }
}

impl Access for Real {
    fn read(&self, at: Address, offset: u16, width: Width) -> u32 {
        if let Some(place) = self.place(at, offset) {
            // SAFETY: configuration space, by the firmware's word and the look of `find`; reads
            // have no side effects there. Callers' offsets are aligned.
            return unsafe { mmio::load(place, width) };
        }
        let _guard = PORTS.lock();
        let Some(mut data) = self.by_ports(at, offset) else {
            return NOTHING;
        };
        // SAFETY: the data port of mechanism 1; reads have no side effects.
        let value = unsafe { data.read() } >> (8 * (offset & 3));
        match width {
            Width::Byte => value & 0xff,
            Width::Word => value & 0xffff,
            Width::Double => value,
        }
    }

    fn write(&self, at: Address, offset: u16, width: Width, value: u32) {
        if let Some(place) = self.place(at, offset) {
            // SAFETY: as in `read`; who writes is the driver of the function (`Pci`'s contract).
            unsafe { mmio::store(place, width, value) };
            return;
        }
        let _guard = PORTS.lock();
        if self.by_ports(at, offset).is_none() {
            return;
        }
        let port = 0xcfc + (offset & 3);
        // SAFETY: as above.
        unsafe {
            match width {
                Width::Byte => Port::<u8>::new(port).write(value as u8),
                Width::Word => Port::<u16>::new(port).write(value as u16),
                Width::Double => Port::<u32>::new(port).write(value),
            }
        }
    }

    fn buses(&self) -> Vec<(u16, u8, u8)> {
        let mut buses: Vec<_> = self
            .ecam
            .iter()
            .map(|region| (region.segment, region.first_bus, region.last_bus))
            .collect();
        if self.ports && !buses.iter().any(|(segment, ..)| *segment == 0) {
            buses.push((0, 0, 255));
        }
        buses
    }
}

/// The machine's configuration space.
pub struct Pci {
    access: Real,
}

impl Pci {
    /// Finds the ways to it. `ecam` is what the firmware says ([`crate::acpi::ecam`]).
    ///
    /// # Safety
    /// Nothing else uses ports 0xcf8 to 0xcff. A function is written to only for its one driver.
    #[must_use]
    pub unsafe fn find(map: DirectMap, ecam: Vec<EcamRegion>) -> Self {
        let ports = {
            let _guard = PORTS.lock();
            // SAFETY: the address port keeps what it is given where the mechanism is there.
            unsafe {
                let mut port = Port::<u32>::new(0xcf8);
                port.write(1 << 31);
                port.read() == 1 << 31
            }
        };
        let mut access = Real { map, ports, ecam };
        if ports {
            access.check_ecam();
        }
        Self { access }
    }

    /// Whether memory leads there, too.
    #[must_use]
    pub fn has_ecam(&self) -> bool {
        !self.access.ecam.is_empty()
    }

    /// All functions, by address.
    #[must_use]
    pub fn functions(&self) -> Vec<Function> {
        functions(&self.access)
    }

    /// The memory behind a base address register; `None` where it is not used, decodes ports, was
    /// given no place, or lies across the end of memory. Decoding is off while its size is asked
    /// for, so interrupts must be off and nobody else may use the function.
    #[must_use]
    pub fn bar(&self, at: Address, index: u8) -> Option<Bar> {
        bar(&self.access, at, index)
    }

    /// Has the bridges before a function let accesses through in both directions: not all firmware
    /// leaves them so.
    pub fn open_bridges(&self, at: Address, functions: &[Function]) {
        open_bridges(&self.access, at, functions);
    }

    /// Makes a function its driver's: powered, decoding memory, its pin quiet.
    pub fn take(&self, at: Address) {
        take(&self.access, at);
    }

    /// Lets a function access memory: once its driver has stopped what others set up in it.
    pub fn make_master(&self, at: Address) {
        let command = self.access.read(at, COMMAND, Width::Word);
        (self.access).write(at, COMMAND, Width::Word, command | COMMAND_MASTER);
    }

    /// Ends a function's accesses to memory.
    pub fn release(&self, at: Address) {
        let command = self.access.read(at, COMMAND, Width::Word);
        self.access
            .write(at, COMMAND, Width::Word, command & !COMMAND_MASTER);
    }

    /// The ISA interrupt to which the firmware joined a function's pin. On chipsets whose I/O APIC
    /// hears PCI's pins apart from ISA's only, it never comes: which pin it then is stands in
    /// ACPI's byte code.
    #[must_use]
    pub fn pin(&self, at: Address) -> Option<u8> {
        pin(&self.access, at)
    }

    /// Lets a function interrupt by its pin.
    pub fn use_pin(&self, at: Address) {
        let command = self.access.read(at, COMMAND, Width::Word);
        self.access
            .write(at, COMMAND, Width::Word, command & !COMMAND_NO_PIN);
    }

    /// How it can interrupt without a pin; MSI where it has both.
    #[must_use]
    pub fn messages(&self, at: Address) -> Option<Messages> {
        messages(&self.access, at)
    }

    /// Turns MSI on: all causes come to the core of this APIC id as this vector. `false` where a
    /// message does not reach the core.
    pub fn use_msi(&self, at: Address, capability: u16, apic_id: u32, vector: u8) -> bool {
        use_msi(&self.access, at, capability, apic_id, vector)
    }

    /// Turns MSI-X on with the first entry of its table, which `table` shows, for this vector.
    /// The others stay masked. `false` where a message does not reach the core.
    pub fn use_msix(
        &self,
        at: Address,
        capability: u16,
        table: &mut impl Registers,
        apic_id: u32,
        vector: u8,
    ) -> bool {
        use_msix(&self.access, at, capability, table, apic_id, vector)
    }

    /// The structures of a virtio device.
    #[must_use]
    pub fn virtio_parts(&self, at: Address) -> Vec<VirtioPart> {
        virtio_parts(&self.access, at)
    }
}

impl Real {
    /// Leaves out a place in memory that does not show what the ports show.
    fn check_ecam(&mut self) {
        let same = |region: &EcamRegion| {
            let at = |device| Address {
                segment: 0,
                bus: region.first_bus,
                device,
                function: 0,
            };
            (0..32).all(|device| {
                let by_memory = self.place(at(device), ID);
                // SAFETY: as in `read`; the direct map reaches it.
                let by_memory = by_memory.map(|place| unsafe { mmio::load(place, Width::Double) });
                let _guard = PORTS.lock();
                let port = self.by_ports(at(device), ID);
                // SAFETY: as in `read`.
                by_memory == port.map(|mut data| unsafe { data.read() })
            })
        };
        let good: Vec<bool> = (self.ecam.iter())
            .map(|region| region.segment != 0 || same(region))
            .collect();
        let mut good = good.into_iter();
        self.ecam.retain(|_| good.next().unwrap_or(false));
    }
}

fn functions(access: &impl Access) -> Vec<Function> {
    let mut found = Vec::new();
    for (segment, first, last) in access.buses() {
        for (bus, device) in (first..=last).flat_map(|bus| (0..32).map(move |d| (bus, d))) {
            for function in 0..8 {
                let address = Address {
                    segment,
                    bus,
                    device,
                    function,
                };
                let id = access.read(address, ID, Width::Double);
                // No vendor: 0xffff, or 0 from some broken bridges.
                let there = !matches!(id & 0xffff, 0 | 0xffff);
                if there && found.len() < MAX_FUNCTIONS {
                    found.push(Function {
                        address,
                        vendor: id as u16,
                        device: (id >> 16) as u16,
                        class: access.read(address, CLASS, Width::Double) >> 8,
                    });
                }
                let header = || access.read(address, HEADER_TYPE, Width::Byte);
                if function == 0 && (!there || header() & 0x80 == 0) {
                    break;
                }
            }
        }
    }
    found
}

/// Capabilities: id and offset.
fn capabilities(access: &impl Access, at: Address) -> impl Iterator<Item = (u8, u16)> {
    let has = access.read(at, STATUS, Width::Word) & STATUS_CAPABILITIES != 0;
    let first = has.then(|| access.read(at, CAPABILITIES, Width::Byte));
    let valid = |offset: u32| u16::try_from(offset & 0xfc).ok().filter(|at| *at >= 0x40);
    core::iter::successors(first.and_then(valid), move |offset| {
        valid(access.read(at, offset + 1, Width::Byte))
    })
    .take(MAX_CAPABILITIES)
    .map(move |offset| (access.read(at, offset, Width::Byte) as u8, offset))
}

fn bar(access: &impl Access, at: Address, index: u8) -> Option<Bar> {
    // Bridges have two, and what stands behind those is something else.
    let last = match access.read(at, HEADER_TYPE, Width::Byte) & 0x7f {
        0 => 5,
        1 => 1,
        _ => return None,
    };
    let register = BARS + 4 * u16::from(index);
    let low = (index <= last).then(|| access.read(at, register, Width::Double))?;
    let wide = low & 6 == 4;
    if low == NOTHING || low & 1 != 0 || wide && index == last {
        return None;
    }
    let high = if wide {
        access.read(at, register + 4, Width::Double)
    } else {
        0
    };
    let start = u64::from(high) << 32 | u64::from(low & !15);

    let command = access.read(at, COMMAND, Width::Word);
    let quiet = command & !(COMMAND_IO | COMMAND_MEMORY);
    access.write(at, COMMAND, Width::Word, quiet);
    let ask = |register, value| {
        access.write(at, register, Width::Double, u32::MAX);
        let mask = access.read(at, register, Width::Double);
        access.write(at, register, Width::Double, value);
        mask
    };
    let mask = u64::from(ask(register, low) & !15);
    let mask = match wide {
        true => mask | u64::from(ask(register + 4, high)) << 32,
        false => mask | 0xffff_ffff << 32,
    };
    access.write(at, COMMAND, Width::Word, command);
    let bytes = (!mask).checked_add(1)?;
    let sane = bytes.is_power_of_two() && start != 0 && start.is_multiple_of(bytes);
    start.checked_add(bytes)?;
    sane.then_some(Bar {
        start: HostPhysAddr::new(start),
        bytes,
    })
}

fn open_bridges(access: &impl Access, at: Address, functions: &[Function]) {
    let bridges = functions
        .iter()
        .filter(|function| {
            function.class >> 8 == CLASS_BRIDGE && function.address.segment == at.segment
        })
        .map(|function| function.address);
    for bridge in bridges {
        let secondary = access.read(bridge, SECONDARY_BUS, Width::Byte);
        let last = access.read(bridge, SECONDARY_BUS + 1, Width::Byte);
        let command = access.read(bridge, COMMAND, Width::Word);
        let open = command | COMMAND_MEMORY | COMMAND_MASTER;
        if secondary != 0 && (secondary..=last).contains(&at.bus.into()) && open != command {
            access.write(bridge, COMMAND, Width::Word, open);
        }
    }
}

fn take(access: &impl Access, at: Address) {
    if let Some((_, power)) = capabilities(access, at).find(|(id, _)| *id == CAPABILITY_POWER) {
        // From any sleep to D0 (PCI Power Management 1.2 §3.2.4); bit 15 is cleared by writing 1.
        let state = access.read(at, power + 4, Width::Word);
        if state & 3 != 0 && state != 0xffff {
            access.write(at, power + 4, Width::Word, state & !0x8003);
        }
    }
    let command = access.read(at, COMMAND, Width::Word);
    let command = command | COMMAND_MEMORY | COMMAND_NO_PIN;
    access.write(at, COMMAND, Width::Word, command);
}

fn pin(access: &impl Access, at: Address) -> Option<u8> {
    let line = access.read(at, INTERRUPT, Width::Byte) as u8;
    let pin = access.read(at, INTERRUPT + 1, Width::Byte);
    // Timer, keyboard and cascade are never PCI's; 0xff is none.
    ((1..=4).contains(&pin) && (3..16).contains(&line)).then_some(line)
}

fn messages(access: &impl Access, at: Address) -> Option<Messages> {
    let find = |wanted| capabilities(access, at).find(|(id, _)| *id == wanted);
    if let Some((_, capability)) = find(CAPABILITY_MSI) {
        return Some(Messages::Msi(capability));
    }
    let (_, capability) = find(CAPABILITY_MSIX)?;
    let table = access.read(at, capability + 4, Width::Double);
    Some(Messages::MsiX {
        capability,
        bar: (table & 7) as u8,
        offset: table & !7,
    })
}

/// The message that brings a vector to a core (Intel SDM Vol. 3A §11.11): fixed, edge. Ids above
/// 8 bits need interrupt remapping.
fn message(apic_id: u32, vector: u8) -> Option<(u32, u32)> {
    (apic_id < 0xff).then_some((0xfee0_0000 | apic_id << 12, vector.into()))
}

fn use_msi(access: &impl Access, at: Address, capability: u16, apic_id: u32, vector: u8) -> bool {
    let Some((address, data)) = message(apic_id, vector) else {
        return false;
    };
    let control = access.read(at, capability + 2, Width::Word);
    // Address, its upper half where there are 64 bits, data; then the switch, with one message.
    let wide = control & 1 << 7 != 0;
    access.write(at, capability + 4, Width::Double, address);
    if wide {
        access.write(at, capability + 8, Width::Double, 0);
    }
    let place = capability + if wide { 12 } else { 8 };
    access.write(at, place, Width::Word, data);
    access.write(at, capability + 2, Width::Word, control & !(7 << 4) | 1);
    true
}

fn use_msix(
    access: &impl Access,
    at: Address,
    capability: u16,
    table: &mut impl Registers,
    apic_id: u32,
    vector: u8,
) -> bool {
    let Some((address, data)) = message(apic_id, vector) else {
        return false;
    };
    let control = access.read(at, capability + 2, Width::Word) & !(1 << 14);
    // Entries may be written only while all are masked.
    access.write(at, capability + 2, Width::Word, control | 3 << 14);
    let entry = [address, 0, data, 0];
    for (offset, value) in (0..).step_by(4).zip(entry) {
        table.write32(offset, value);
    }
    access.write(at, capability + 2, Width::Word, control | 1 << 15);
    true
}

fn virtio_parts(access: &impl Access, at: Address) -> Vec<VirtioPart> {
    capabilities(access, at)
        .filter(|(id, _)| *id == CAPABILITY_VENDOR)
        .map(|(_, capability)| VirtioPart {
            kind: access.read(at, capability + 3, Width::Byte) as u8,
            bar: access.read(at, capability + 4, Width::Byte) as u8,
            offset: access.read(at, capability + 8, Width::Double),
            bytes: access.read(at, capability + 12, Width::Double),
            multiplier: access.read(at, capability + 16, Width::Double),
        })
        .collect()
}

#[cfg(test)]
mod tests;
