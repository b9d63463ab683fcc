//! The PCI Express root: one bus with a host bridge and whatever functions are plugged in, reached
//! by configuration mechanism 1 (PCI 3.0 §3.2.2.3.2) and by enhanced configuration accesses
//! (PCI Express 6.0 §7.2.2).
//!
//! A function that is not there reads as ones. Where base addresses overlap, the function with the
//! lower device and function number has the range, of one function the lower register; the other
//! register is not decoded until one of them moves. Fixed devices and memory always win.

mod config;
mod msix;
mod region;

pub use config::{
    BarKind, COMMAND_INTX_OFF, COMMAND_IO, COMMAND_MASTER, COMMAND_MEMORY, ConfigSpace,
};
pub use msix::{Msi, MsixTable};
pub use region::{Overlap, RegionMap};

use alloc::{boxed::Box, vec::Vec};
use core::ops::Range;

use arch::{GuestMemory, Nanos};
use serde::{Deserialize, Serialize};

use crate::map;

/// Vendor and device of the host bridge: the generic PCI Express host bridge.
const HOST_BRIDGE: (u16, u16) = (0x1b36, 0x0008);
const HOST_BRIDGE_CLASS: u32 = 0x06_0000;

/// Where a function is on bus 0: device 0 to 31, function 0 to 7.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct DeviceFunction(u8);

impl DeviceFunction {
    /// The host bridge.
    pub const HOST_BRIDGE: Self = Self(0);

    /// `None` if a number is out of range.
    #[must_use]
    pub const fn new(device: u8, function: u8) -> Option<Self> {
        if device < 32 && function < 8 {
            Some(Self(device << 3 | function))
        } else {
            None
        }
    }

    /// Device number, 0 to 31.
    #[must_use]
    pub const fn device(self) -> u8 {
        self.0 >> 3
    }

    /// Function number, 0 to 7.
    #[must_use]
    pub const fn function(self) -> u8 {
        self.0 & 7
    }
}

/// A function that can be plugged in. Its saved state is its own matter: which functions there are
/// is configuration, and a board is restored with the same ones plugged in.
pub trait PciFunction: Send {
    /// Its configuration space.
    fn config(&self) -> &ConfigSpace;
    /// Its configuration space.
    fn config_mut(&mut self) -> &mut ConfigSpace;
    /// Ports that it decodes besides what its base address registers say.
    fn fixed_ports(&self) -> Option<Range<u64>> {
        None
    }
    /// A guest is about to read these bytes of the configuration space.
    fn config_reading(&mut self, _offset: u16, _size: u8) {}
    /// A guest wrote these bytes of the configuration space.
    fn config_written(&mut self, _offset: u16, _size: u8) {}
    /// Reads `size` (1, 2, 4, 8) bytes in what base address register `bar` (or [`FIXED_PORTS`])
    /// decodes. The offset need not be aligned.
    fn read(&mut self, bar: u8, offset: u64, size: u8, now: Nanos) -> u64;
    /// Writes `size` (1, 2, 4, 8) bytes in what base address register `bar` decodes.
    fn write(&mut self, bar: u8, offset: u64, size: u8, value: u64, now: Nanos);
    /// Works out what happened up to now.
    fn tick(&mut self, _now: Nanos) {}
    /// When it has something to do by itself.
    fn next_event(&self) -> Nanos {
        Nanos::NEVER
    }
    /// The level of its INTx pin, before the command register's disable bit.
    fn interrupt(&self) -> bool {
        false
    }
    /// A message to send; asked until there is none.
    fn take_message(&mut self) -> Option<Msi> {
        None
    }
    /// Whether it is a watchdog that ran out since it was asked last.
    fn take_expiry(&mut self) -> bool {
        false
    }
    /// Whether [`PciFunction::serve`] has something to do.
    fn wants_service(&self) -> bool {
        false
    }
    /// Does a bounded amount of what it needs the guest's memory for.
    fn serve(&mut self, _mem: &mut dyn GuestMemory, _now: Nanos) {}
    /// Hands what a console printed to `print`, in pieces, and says whether there was anything.
    fn take_output(&mut self, _print: &mut dyn FnMut(&[u8])) -> bool {
        false
    }
    /// Types at a console; gives how many bytes it took, `None` if it is none that is in use.
    fn push_input(&mut self, _bytes: &[u8]) -> Option<usize> {
        None
    }
    /// RST#.
    fn reset(&mut self);
}

/// In place of a base address register: the ports that a function decodes in any case.
pub const FIXED_PORTS: u8 = 6;

/// Which base address register of which plugged function.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Owner {
    slot: usize,
    bar: u8,
}

/// Something is there already, or the place is the host bridge's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SlotTaken(pub DeviceFunction);

/// What a guest can change of the root itself.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct PciState {
    /// CONFIG_ADDRESS.
    address: u32,
    bridge: ConfigSpace,
}

/// The root.
pub struct Pci {
    state: PciState,
    /// In ascending order of place.
    functions: Vec<(DeviceFunction, Box<dyn PciFunction>)>,
    memory: RegionMap<Option<Owner>>,
    ports: RegionMap<Option<Owner>>,
    /// What base addresses may not cover: memory and fixed devices.
    fixed: Vec<Range<u64>>,
}

impl core::fmt::Debug for Pci {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Pci")
            .field("state", &self.state)
            .field("memory", &self.memory)
            .field("ports", &self.ports)
            .finish_non_exhaustive()
    }
}

impl Pci {
    /// An empty bus. Base addresses never cover the ranges in `fixed`.
    #[must_use]
    pub fn new(fixed: Vec<Range<u64>>) -> Self {
        let (vendor, device) = HOST_BRIDGE;
        let mut pci = Self {
            state: PciState {
                address: 0,
                bridge: ConfigSpace::new(vendor, device, HOST_BRIDGE_CLASS, 0, true),
            },
            functions: Vec::new(),
            memory: RegionMap::default(),
            ports: RegionMap::default(),
            fixed,
        };
        pci.place();
        pci
    }

    /// Plugs a function in.
    ///
    /// # Errors
    /// The place is taken.
    pub fn plug(
        &mut self,
        place: DeviceFunction,
        function: Box<dyn PciFunction>,
    ) -> Result<(), SlotTaken> {
        let at = self.functions.partition_point(|&(other, _)| other < place);
        let taken = self
            .functions
            .get(at)
            .is_some_and(|&(other, _)| other == place);
        if taken || place == DeviceFunction::HOST_BRIDGE {
            return Err(SlotTaken(place));
        }
        self.functions.insert(at, (place, function));
        // A device with more than function 0 says so in function 0's header.
        let device = place.device();
        let several = self
            .functions
            .iter()
            .any(|(other, _)| other.device() == device && other.function() != 0);
        if several && device == 0 {
            self.state.bridge.set_multifunction();
        } else if several {
            for (_, function) in self
                .functions
                .iter_mut()
                .filter(|(other, _)| other.device() == device)
            {
                function.config_mut().set_multifunction();
            }
        }
        self.assign();
        Ok(())
    }

    /// Gives each function its place in memory, as firmware does, without letting it decode yet.
    fn assign(&mut self) {
        let mut next = map::PCI_WINDOW.start;
        for (place, function) in &mut self.functions {
            let config = function.config_mut();
            let pin = config.interrupt_pin().map_or(0, |pin| pin - 1);
            let line = map::pci_intx_line(place.device(), pin);
            let irq = map::PCI_INTX_PIC.get(line).copied().unwrap_or(0);
            config.assign(&mut next, map::PCI_WINDOW.end, irq);
        }
        self.place();
    }

    /// The plugged functions, in ascending order of place.
    pub fn functions(&mut self) -> impl Iterator<Item = (DeviceFunction, &mut dyn PciFunction)> {
        self.functions
            .iter_mut()
            .map(|(place, function)| (*place, &mut **function as _))
    }

    /// RST# to everything.
    pub fn reset(&mut self) {
        self.state.address = 0;
        self.state.bridge.reset();
        for (_, function) in &mut self.functions {
            function.reset();
            function.config_mut().reset();
        }
        self.assign();
    }

    /// The root's own state, for saving.
    #[must_use]
    pub fn save(&self) -> PciState {
        self.state.clone()
    }

    /// Puts saved state in place; the plugged functions have theirs already.
    pub fn restore(&mut self, state: PciState) {
        self.state = state;
        self.place();
    }

    /// Reads CONFIG_ADDRESS: a 32-bit access to port 0xcf8, no other.
    #[must_use]
    pub const fn read_address(&self) -> u32 {
        self.state.address
    }

    /// Writes CONFIG_ADDRESS.
    pub const fn write_address(&mut self, value: u32) {
        self.state.address = value & 0x80ff_fffc;
    }

    /// Reads CONFIG_DATA at `offset` 0 to 3, not crossing its end; `None` if mechanism 1 is off.
    pub fn read_data(&mut self, offset: u16, size: u8) -> Option<u32> {
        let (bus, place, register) = self.selected(offset)?;
        Some(self.config_read(bus, place, register, size))
    }

    /// Writes CONFIG_DATA at `offset` 0 to 3, not crossing its end; `false` if mechanism 1 is off.
    pub fn write_data(&mut self, offset: u16, size: u8, value: u32) -> bool {
        let Some((bus, place, register)) = self.selected(offset) else {
            return false;
        };
        self.config_write(bus, place, register, size, value);
        true
    }

    fn selected(&self, offset: u16) -> Option<(u8, DeviceFunction, u16)> {
        let [register, place, bus, enable] = self.state.address.to_le_bytes();
        (enable & 0x80 != 0).then(|| (bus, DeviceFunction(place), u16::from(register) | offset & 3))
    }

    /// Reads at an offset in the enhanced configuration window.
    pub fn read_ecam(&mut self, offset: u64, size: u8) -> u64 {
        let (bus, place, register) = ecam(offset);
        if size == 8 {
            let low = self.config_read(bus, place, register, 4);
            let high = self.config_read(bus, place, register.saturating_add(4), 4);
            return u64::from(high) << 32 | u64::from(low);
        }
        self.config_read(bus, place, register, size).into()
    }

    /// Writes at an offset in the enhanced configuration window.
    pub fn write_ecam(&mut self, offset: u64, size: u8, value: u64) {
        let (bus, place, register) = ecam(offset);
        self.config_write(bus, place, register, size.min(4), value as u32);
        if size == 8 {
            self.config_write(
                bus,
                place,
                register.saturating_add(4),
                4,
                (value >> 32) as u32,
            );
        }
    }

    fn config_read(&mut self, bus: u8, place: DeviceFunction, register: u16, size: u8) -> u32 {
        let absent = u32::MAX >> (32 - 8 * u32::from(size.clamp(1, 4)));
        match (bus, place) {
            (0, DeviceFunction::HOST_BRIDGE) => self.state.bridge.get(register, size),
            (0, _) => self
                .functions
                .iter_mut()
                .find(|(other, _)| *other == place)
                .map_or(absent, |(_, function)| {
                    function.config_reading(register, size);
                    function.config().get(register, size)
                }),
            _ => absent,
        }
    }

    fn config_write(
        &mut self,
        bus: u8,
        place: DeviceFunction,
        register: u16,
        size: u8,
        value: u32,
    ) {
        match (bus, place) {
            (0, DeviceFunction::HOST_BRIDGE) => self.state.bridge.write(register, size, value),
            (0, _) => {
                let found = self.functions.iter_mut().find(|(other, _)| *other == place);
                let Some((_, function)) = found else {
                    return;
                };
                function.config_mut().write(register, size, value);
                function.config_written(register, size);
                if ConfigSpace::moves(register & !3) {
                    self.place();
                }
            }
            _ => {}
        }
    }

    /// Works out who decodes what.
    fn place(&mut self) {
        self.memory.clear();
        self.ports.clear();
        for range in &self.fixed {
            // Fixed ranges that overlap each other are one range for this purpose.
            let _ = self.memory.insert(range.clone(), None);
        }
        for (slot, (_, function)) in self.functions.iter().enumerate() {
            if let Some(range) = function.fixed_ports() {
                let bar = FIXED_PORTS;
                let _ = self.ports.insert(range, Some(Owner { slot, bar }));
            }
        }
        for (slot, (_, function)) in self.functions.iter().enumerate() {
            for (bar, ports, range) in function.config().decoded() {
                let map = if ports {
                    &mut self.ports
                } else {
                    &mut self.memory
                };
                // Who comes second is not decoded.
                let _ = map.insert(range, Some(Owner { slot, bar }));
            }
        }
    }

    /// The function that decodes an access, with register and offset.
    fn owner(
        &mut self,
        ports: bool,
        address: u64,
        size: u8,
    ) -> Option<(&mut dyn PciFunction, u8, u64)> {
        let map = if ports { &self.ports } else { &self.memory };
        let (owner, offset) = map.find(address, size)?;
        let owner = owner?;
        let (_, function) = self.functions.get_mut(owner.slot)?;
        Some((&mut **function, owner.bar, offset))
    }

    /// Reads where a function may decode; `None` if none does.
    pub fn read(&mut self, ports: bool, address: u64, size: u8, now: Nanos) -> Option<u64> {
        let (function, bar, offset) = self.owner(ports, address, size)?;
        Some(function.read(bar, offset, size, now))
    }

    /// Writes where a function may decode; `false` if none does.
    pub fn write(&mut self, ports: bool, address: u64, size: u8, value: u64, now: Nanos) -> bool {
        let Some((function, bar, offset)) = self.owner(ports, address, size) else {
            return false;
        };
        function.write(bar, offset, size, value, now);
        true
    }

    /// Whether anything is plugged in.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.functions.is_empty()
    }

    /// Works out what happened up to now.
    pub fn tick(&mut self, now: Nanos) {
        for (_, function) in &mut self.functions {
            function.tick(now);
        }
    }

    /// When a function has something to do by itself.
    #[must_use]
    pub fn next_event(&self) -> Nanos {
        self.functions
            .iter()
            .map(|(_, function)| function.next_event())
            .min()
            .unwrap_or(Nanos::NEVER)
    }

    /// Whether a watchdog ran out since this was asked last.
    pub fn take_expiry(&mut self) -> bool {
        let functions = self.functions.iter_mut();
        functions.fold(false, |any, (_, function)| function.take_expiry() || any)
    }

    /// Whether a function has something for [`Pci::serve`].
    #[must_use]
    pub fn wants_service(&self) -> bool {
        let mut functions = self.functions.iter();
        functions.any(|(_, function)| function.wants_service())
    }

    /// Lets each function that wants to do a bounded amount of what it needs memory for.
    pub fn serve(&mut self, mem: &mut dyn GuestMemory, now: Nanos) {
        for (_, function) in &mut self.functions {
            if function.wants_service() {
                function.serve(mem, now);
            }
        }
    }

    /// Hands what consoles printed to `print`, in pieces, and says whether there was anything.
    pub fn take_output(&mut self, print: &mut dyn FnMut(&[u8])) -> bool {
        let functions = self.functions.iter_mut();
        functions.fold(false, |any, (_, function)| {
            function.take_output(print) || any
        })
    }

    /// Types at the first console in use; gives how many bytes it took, `None` if there is none.
    pub fn push_input(&mut self, bytes: &[u8]) -> Option<usize> {
        let mut functions = self.functions.iter_mut();
        functions.find_map(|(_, function)| function.push_input(bytes))
    }

    /// Levels of the four interrupt lines: a device's pins are swizzled by its number
    /// (PCI 3.0 §2.2.6), as the routing table in the DSDT says.
    #[must_use]
    pub fn interrupts(&self) -> [bool; 4] {
        let mut lines = [false; 4];
        for (place, function) in &self.functions {
            let config = function.config();
            if function.interrupt()
                && config.command() & COMMAND_INTX_OFF == 0
                && let Some(pin) = config.interrupt_pin()
                && let Some(line) = lines.get_mut(map::pci_intx_line(place.device(), pin - 1))
            {
                *line = true;
            }
        }
        lines
    }

    /// Hands the messages that wait to `send`.
    pub fn take_messages(&mut self, mut send: impl FnMut(Msi)) {
        for (_, function) in &mut self.functions {
            while let Some(message) = function.take_message() {
                send(message);
            }
        }
    }
}

/// Bus, place and register of an offset in the enhanced configuration window.
const fn ecam(offset: u64) -> (u8, DeviceFunction, u16) {
    let offset = offset & (map::ECAM.end - map::ECAM.start - 1);
    (
        (offset >> 20) as u8,
        DeviceFunction((offset >> 12) as u8),
        (offset & 0xfff) as u16,
    )
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A function with a port and a memory register that remembers the last write.
    pub(crate) struct Toy {
        config: ConfigSpace,
        pub(crate) last: (u8, u64, u64),
        msix: MsixTable,
        message: Option<Msi>,
    }

    impl Toy {
        pub(crate) fn new(device: u16) -> Box<Self> {
            let mut config = ConfigSpace::new(0x1234, device, 0xff_0000, 0, true)
                .with_interrupt_pin(1)
                .with_bar(0, BarKind::Io, 16, false)
                .and_then(|config| config.with_bar(1, BarKind::Memory64, 0x1000, false))
                .unwrap();
            let msix = MsixTable::new(&mut config, 2, 1, 0x800, 0xc00).unwrap();
            Box::new(Self {
                config,
                last: (0, 0, 0),
                msix,
                message: None,
            })
        }
    }

    impl PciFunction for Toy {
        fn config(&self) -> &ConfigSpace {
            &self.config
        }
        fn config_mut(&mut self) -> &mut ConfigSpace {
            &mut self.config
        }
        fn read(&mut self, bar: u8, offset: u64, _size: u8, _now: Nanos) -> u64 {
            u64::from(bar) << 32 | offset
        }
        fn write(&mut self, bar: u8, offset: u64, size: u8, value: u64, _now: Nanos) {
            self.last = (bar, offset, value);
            if bar == 1 && offset >= 0x800 {
                self.msix.write_table(offset - 0x800, size, value);
            } else if bar == 1 {
                self.message = self.msix.raise(&self.config, value as u16);
            }
        }
        fn interrupt(&self) -> bool {
            self.last.2 == 0x1e
        }
        fn take_message(&mut self) -> Option<Msi> {
            self.message.take()
        }
        fn reset(&mut self) {
            self.last = (0, 0, 0);
        }
    }

    fn place(device: u8) -> DeviceFunction {
        DeviceFunction::new(device, 0).unwrap()
    }

    fn select(pci: &mut Pci, device: u8, register: u8) {
        pci.write_address(0x8000_0000 | u32::from(device) << 11 | u32::from(register));
    }

    fn set(pci: &mut Pci, device: u8, register: u8, value: u32) {
        select(pci, device, register);
        assert!(pci.write_data(0, 4, value));
    }

    #[test]
    fn mechanism_one() {
        let mut pci = Pci::new(Vec::new());
        assert_eq!(pci.read_data(0, 4), None, "off until enabled");
        assert!(!pci.write_data(0, 4, 0));
        pci.write_address(u32::MAX);
        assert_eq!(pci.read_address(), 0x80ff_fffc);
        assert_eq!(pci.read_data(0, 4), Some(u32::MAX), "no such bus");
        select(&mut pci, 0, 0);
        assert_eq!(pci.read_data(0, 4), Some(0x0008_1b36));
        assert_eq!(pci.read_data(2, 2), Some(0x0008));
        assert_eq!(pci.read_data(1, 1), Some(0x1b));
        select(&mut pci, 0, 8);
        assert_eq!(pci.read_data(0, 4), Some(0x0600_0000));
        select(&mut pci, 5, 0);
        assert_eq!(
            (
                pci.read_data(0, 4),
                pci.read_data(0, 2),
                pci.read_data(3, 1)
            ),
            (Some(u32::MAX), Some(0xffff), Some(0xff))
        );
        assert!(pci.write_data(0, 4, 0), "ignored");
    }

    #[test]
    fn enhanced_accesses_see_the_same() {
        let mut pci = Pci::new(Vec::new());
        pci.plug(place(3), Toy::new(7)).unwrap();
        let base = 3 << 15;
        assert_eq!(pci.read_ecam(base, 4), 0x0007_1234);
        assert_eq!(pci.read_ecam(base, 8), 0x0010_0000_0007_1234);
        assert_eq!(
            pci.read_ecam(base + 0x100, 4),
            0,
            "no extended capabilities"
        );
        assert_eq!(pci.read_ecam(base + (1 << 20), 8), u64::MAX);
        pci.write_ecam(base + 0x10, 8, u64::MAX);
        assert_eq!(pci.read_ecam(base + 0x10, 8), 0xffff_f004_ffff_fff1);
        select(&mut pci, 3, 0x14);
        assert_eq!(pci.read_data(1, 1), Some(0xf0));
    }

    #[test]
    fn base_addresses_route_and_the_first_of_two_wins() {
        let fixed = core::iter::once(0xfec0_0000..0xfec0_1000).collect();
        let mut pci = Pci::new(fixed);
        pci.plug(place(2), Toy::new(2)).unwrap();
        pci.plug(place(1), Toy::new(1)).unwrap();
        assert_eq!(pci.plug(place(1), Toy::new(1)), Err(SlotTaken(place(1))));
        assert_eq!(pci.plug(place(0), Toy::new(1)), Err(SlotTaken(place(0))));
        for device in [2, 1] {
            set(&mut pci, device, 0x10, 0xc000);
            set(&mut pci, device, 0x14, 0xd000_0000);
            set(&mut pci, device, 0x04, 7);
        }
        let t = Nanos::ZERO;
        assert_eq!(pci.read(true, 0xc004, 4, t), Some(4));
        assert_eq!(pci.read(true, 0xc00e, 4, t), None, "over the end");
        assert_eq!(pci.read(false, 0xd000_0ff8, 8, t), Some(0x1_0000_0ff8));
        assert!(pci.write(true, 0xc000, 1, 0x1e, t));
        assert_eq!(
            pci.interrupts(),
            [false, true, false, false],
            "device 1, INTA"
        );
        set(&mut pci, 1, 0x04, 0x407);
        assert_eq!(pci.interrupts(), [false; 4], "disabled");
        set(&mut pci, 1, 0x10, 0xd000);
        assert!(pci.write(true, 0xc000, 1, 0x1e, t));
        assert_eq!(
            pci.interrupts(),
            [false, false, true, false],
            "now it is device 2's"
        );
        set(&mut pci, 1, 0x14, 0xfec0_0000);
        assert_eq!(
            pci.read(false, 0xfec0_0000, 4, t),
            None,
            "a fixed device wins"
        );
        pci.reset();
        assert_eq!(pci.read(true, 0xc000, 4, t), None);
        assert_eq!(pci.interrupts(), [false; 4]);
    }

    #[test]
    fn functions_are_placed_as_firmware_does() {
        let mut pci = Pci::new(Vec::new());
        pci.plug(place(2), Toy::new(2)).unwrap();
        pci.plug(place(1), Toy::new(1)).unwrap();
        let start = map::PCI_WINDOW.start;
        for _ in 0..2 {
            for (device, base, irq) in [(1, start, 11), (2, start + 0x1000, 10)] {
                let config = device << 15;
                assert_eq!(pci.read_ecam(config + 0x10, 4), 1, "no ports");
                assert_eq!(pci.read_ecam(config + 0x14, 8), base | 4);
                assert_eq!(pci.read_ecam(config + 0x3c, 1), irq);
                assert_eq!(pci.read(false, base, 4, Nanos::ZERO), None, "not yet");
                pci.write_ecam(config + 4, 2, 2);
                assert_eq!(pci.read(false, base, 4, Nanos::ZERO), Some(1 << 32));
                pci.write_ecam(config + 0x14, 4, 0xd000_0000);
            }
            pci.reset();
        }
        let mut config = ConfigSpace::new(1, 1, 0, 0, false)
            .with_bar(0, BarKind::Memory64, 1 << 33, false)
            .and_then(|config| config.with_bar(2, BarKind::Memory32, 0x1000, false))
            .unwrap();
        let mut next = start;
        config.assign(&mut next, map::PCI_WINDOW.end, 0);
        assert_eq!(config.get(0x10, 4), 4, "too large");
        assert_eq!(config.get(0x18, 4), start as u32);
        assert_eq!(next, start + 0x1000);
    }

    #[test]
    fn several_functions_and_saved_state() {
        let mut pci = Pci::new(Vec::new());
        pci.plug(place(4), Toy::new(4)).unwrap();
        assert_eq!(pci.read_ecam(4 << 15 | 0x0e, 1), 0);
        pci.plug(DeviceFunction::new(4, 3).unwrap(), Toy::new(5))
            .unwrap();
        assert_eq!(pci.read_ecam(4 << 15 | 0x0e, 1), 0x80);
        assert_eq!(pci.read_ecam(4 << 15 | 3 << 12 | 2, 2), 5);
        select(&mut pci, 4, 8);
        let saved = pci.save();
        pci.reset();
        pci.restore(saved);
        assert_eq!(pci.read_data(0, 4), Some(0xff00_0000));
        assert_eq!(DeviceFunction::new(32, 0), None);
        assert_eq!(DeviceFunction::new(0, 8), None);
    }
}
