//! The modern PCI transport (virtio 1.2 §4.1): a device as a function on the bus.
//!
//! One 64-bit base address register holds everything: registers, interrupt status, the device's
//! configuration, the MSI-X table, and, in a page of their own, the doorbells, one address for each
//! queue. Messages go out by MSI-X or, where the driver leaves that off, as INTA#.
//!
//! The driver sees the rules of §2 and §3 kept: features that were not offered or that do not go
//! together are refused at FEATURES_OK; nothing is taken from a queue before DRIVER_OK; a driver
//! that breaks a rule sees DEVICE_NEEDS_RESET and a configuration interrupt.

use alloc::{vec, vec::Vec};

use arch::{GuestMemory, GuestPhysAddr, Nanos};
use machine::pci::{BarKind, COMMAND_MASTER, ConfigSpace, Msi, MsixTable, PciFunction};
use serde::{Deserialize, Serialize};

use crate::device::{Device, MAX_QUEUES, Signals, features};
use crate::queue::{Queue, QueueLayout};

const VENDOR: u16 = 0x1af4;
/// Device ids of modern devices begin here; the device's kind is added (§4.1.2.1).
const FIRST_DEVICE: u16 = 0x1040;
const SUBSYSTEM: u16 = 0x1100;
const REVISION: u8 = 1;

/// The base address register with everything, and where in it what is.
const BAR: u8 = 0;
const COMMON: u32 = 0x0000;
const COMMON_LENGTH: u32 = 0x3c;
const ISR: u32 = 0x1000;
const ISR_LENGTH: u32 = 1;
const DEVICE: u32 = 0x2000;
const DEVICE_LENGTH: u32 = 0x1000;
const MSIX_TABLE: u32 = 0x3000;
const MSIX_PENDING: u32 = 0x3800;
const NOTIFY: u32 = 0x4000;
const BAR_LENGTH: u32 = 0x8000;
/// Bytes from one queue's doorbell to the next one's.
const NOTIFY_MULTIPLIER: u32 = 4;

const VENDOR_CAPABILITY: u8 = 0x09;
const COMMON_CAPABILITY: u8 = 1;
const NOTIFY_CAPABILITY: u8 = 2;
const ISR_CAPABILITY: u8 = 3;
const DEVICE_CAPABILITY: u8 = 4;
const ACCESS_CAPABILITY: u8 = 5;

/// Device status (§2.1).
const ACKNOWLEDGE: u8 = 1;
const DRIVER: u8 = 2;
const DRIVER_OK: u8 = 4;
const FEATURES_OK: u8 = 8;
const NEEDS_RESET: u8 = 64;
const FAILED: u8 = 128;

/// Interrupt status (§4.1.4.5).
const ISR_QUEUE: u8 = 1;
const ISR_CONFIG: u8 = 2;

/// No MSI-X vector is mapped.
const NO_VECTOR: u16 = 0xffff;

/// What the driver set up of a queue.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
struct Setup {
    size: u16,
    vector: u16,
    enabled: bool,
    /// Descriptors, driver's part, device's part.
    parts: [u64; 3],
}

/// What the driver sees and sets of the transport.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Registers {
    status: u8,
    isr: u8,
    generation: u8,
    /// The configuration changed since the driver read of it.
    changed: bool,
    offered_select: u32,
    accepted_select: u32,
    /// Features 0 to 63 as the driver wrote them.
    accepted: u64,
    /// It wrote others, which nobody offers.
    beyond: bool,
    config_vector: u16,
    queue_select: u16,
    queues: Vec<Setup>,
    /// Queues whose interrupt is to be sent.
    due: u64,
    /// The configuration interrupt is to be sent.
    config_due: bool,
}

impl Registers {
    fn new(device: &impl Device) -> Self {
        let setup = |index| Setup::new(device.queue_size(index));
        Self {
            status: 0,
            isr: 0,
            generation: 0,
            changed: false,
            offered_select: 0,
            accepted_select: 0,
            accepted: 0,
            beyond: false,
            config_vector: NO_VECTOR,
            queue_select: 0,
            queues: (0..device.queues().min(MAX_QUEUES)).map(setup).collect(),
            due: 0,
            config_due: false,
        }
    }

    fn selected(&self) -> Option<&Setup> {
        self.queues.get(usize::from(self.queue_select))
    }
}

impl Setup {
    const fn new(size: u16) -> Self {
        Self {
            size,
            vector: NO_VECTOR,
            enabled: false,
            parts: [0; 3],
        }
    }
}

/// A virtio device on the PCI bus.
pub struct VirtioPci<D> {
    config: ConfigSpace,
    msix: MsixTable,
    /// Where in the configuration space the access capability is (§4.1.4.9).
    access: u16,
    registers: Registers,
    device: D,
}

/// The transport's state, for saving. The device's own is its own matter.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct VirtioPciState {
    config: ConfigSpace,
    msix: MsixTable,
    registers: Registers,
}

const fn word(select: u32, features: u64) -> u32 {
    match select {
        0 => features as u32,
        1 => (features >> 32) as u32,
        _ => 0,
    }
}

const fn halves(value: u16, above: u16) -> u32 {
    value as u32 | (above as u32) << 16
}

/// The body of a capability (§4.1.4), behind identifier and link.
fn capability(kind: u8, offset: u32, length: u32, more: &[u8]) -> Vec<u8> {
    let size = 16 + u8::try_from(more.len()).unwrap_or(0);
    let mut body = vec![size, kind, BAR, 0, 0, 0];
    body.extend(offset.to_le_bytes());
    body.extend(length.to_le_bytes());
    body.extend(more);
    body
}

impl<D: Device> VirtioPci<D> {
    /// A function with this device; `None` if a number of the device is out of range.
    #[must_use]
    pub fn new(mut device: D) -> Option<Self> {
        let mut config = ConfigSpace::new(
            VENDOR,
            FIRST_DEVICE.checked_add(device.kind())?,
            device.class(),
            REVISION,
            false,
        )
        .with_subsystem(VENDOR, SUBSYSTEM)
        .with_interrupt_pin(1)
        .with_bar(BAR, BarKind::Memory64, BAR_LENGTH.into(), false)?;
        let registers = Registers::new(&device);
        let vectors = u16::try_from(registers.queues.len()).ok()? + 1;
        let doorbells = u32::from(vectors - 1) * NOTIFY_MULTIPLIER;
        let multiplier = NOTIFY_MULTIPLIER.to_le_bytes();
        let mut add = |kind, offset, length, more: &[u8], writable: &[u8]| {
            let body = capability(kind, offset, length, more);
            config.add_capability(VENDOR_CAPABILITY, &body, writable)
        };
        add(COMMON_CAPABILITY, COMMON, COMMON_LENGTH, &[], &[])?;
        add(NOTIFY_CAPABILITY, NOTIFY, doorbells, &multiplier, &[])?;
        add(ISR_CAPABILITY, ISR, ISR_LENGTH, &[], &[])?;
        let length = device.config_size().min(DEVICE_LENGTH);
        if length != 0 {
            add(DEVICE_CAPABILITY, DEVICE, length, &[], &[])?;
        }
        // Register, offset, length and the window itself are the driver's.
        let mut writable = [0xff; 18];
        for fixed in [0, 1, 3, 4, 5] {
            writable[fixed] = 0;
        }
        let access = add(ACCESS_CAPABILITY, 0, 0, &[0; 4], &writable)?;
        let msix = MsixTable::new(&mut config, vectors.max(2), BAR, MSIX_TABLE, MSIX_PENDING)?;
        device.set_master(false);
        Some(Self {
            config,
            msix,
            access,
            registers,
            device,
        })
    }

    /// The device.
    #[must_use]
    pub const fn device(&self) -> &D {
        &self.device
    }

    /// The device.
    pub const fn device_mut(&mut self) -> &mut D {
        &mut self.device
    }

    /// All state of the transport, for saving.
    #[must_use]
    pub fn save(&self) -> VirtioPciState {
        VirtioPciState {
            config: self.config.clone(),
            msix: self.msix.clone(),
            registers: self.registers.clone(),
        }
    }

    /// Puts saved state in place; the device has its own already.
    pub fn restore(&mut self, state: VirtioPciState) {
        (self.config, self.msix) = (state.config, state.msix);
        self.registers = state.registers;
    }

    fn offered(&self) -> u64 {
        features::ALL | self.device.features()
    }

    fn negotiated(&self, feature: u64) -> bool {
        self.registers.status & FEATURES_OK != 0 && self.registers.accepted & feature != 0
    }

    /// Whether the device is at work.
    const fn is_live(&self) -> bool {
        self.registers.status & (DRIVER_OK | NEEDS_RESET | FAILED) == DRIVER_OK
    }

    /// Whether it may reach memory, which messages are too (PCI 3.0 §6.2.2).
    fn is_master(&self) -> bool {
        self.config.command() & COMMAND_MASTER != 0
    }

    fn can_serve(&self) -> bool {
        self.is_live() && self.device.wants_service() && self.is_master()
    }

    fn reset_device(&mut self) {
        self.device.reset();
        // The generation goes on: a driver may hold what it read before.
        let generation = self.registers.generation;
        self.registers = Registers::new(&self.device);
        self.registers.generation = generation;
        let _ = self.device.take_signals();
        self.config.set_interrupt_status(false);
    }

    /// Takes over what the device wants its driver to hear of.
    fn collect(&mut self) {
        let Signals {
            queues,
            config,
            broken,
        } = self.device.take_signals();
        let live = self.is_live();
        if live {
            self.registers.due |= queues;
        }
        if config {
            self.registers.changed = true;
            self.registers.config_due |= live;
        }
        if broken {
            self.break_down();
        }
    }

    /// The driver broke a rule (§2.1.2).
    fn break_down(&mut self) {
        let live = self.is_live();
        self.registers.status |= NEEDS_RESET;
        self.registers.config_due |= live;
    }

    fn set_isr(&mut self, isr: u8) {
        self.registers.isr = isr;
        let pending = isr != 0 && !self.msix.enabled(&self.config);
        self.config.set_interrupt_status(pending);
    }

    fn read_isr(&mut self) -> u8 {
        let isr = self.registers.isr;
        self.set_isr(0);
        isr
    }

    // ---- common configuration (§4.1.4.3) ----

    /// The aligned four bytes at `offset`.
    fn common(&self, offset: u32) -> u32 {
        let registers = &self.registers;
        let queue = registers.selected();
        let part = |number: usize, shift| {
            let part = queue.and_then(|queue| queue.parts.get(number));
            part.map_or(0, |part| (part >> shift) as u32)
        };
        match offset {
            0x00 => registers.offered_select,
            0x04 => word(registers.offered_select, self.offered()),
            0x08 => registers.accepted_select,
            0x0c => word(registers.accepted_select, registers.accepted),
            0x10 => halves(registers.config_vector, registers.queues.len() as u16),
            0x14 => u32::from_le_bytes([
                registers.status,
                registers.generation,
                registers.queue_select as u8,
                (registers.queue_select >> 8) as u8,
            ]),
            0x18 => queue.map_or(halves(0, NO_VECTOR), |queue| {
                halves(queue.size, queue.vector)
            }),
            0x1c => queue.map_or(0, |queue| {
                halves(queue.enabled.into(), registers.queue_select)
            }),
            0x20 => part(0, 0),
            0x24 => part(0, 32),
            0x28 => part(1, 0),
            0x2c => part(1, 32),
            0x30 => part(2, 0),
            0x34 => part(2, 32),
            // Queue's notification data: NOTIF_CONFIG_DATA is not offered. Queue reset: done at
            // once.
            _ => 0,
        }
    }

    /// A write of one field, or of half of an eight-byte one. Others are undefined by the
    /// standard and ignored.
    fn set_common(&mut self, offset: u32, size: u8, value: u32) {
        let registers = &mut self.registers;
        match (offset, size) {
            (0x00, 4) => registers.offered_select = value,
            (0x08, 4) => registers.accepted_select = value,
            (0x0c, 4) => self.accept(value),
            (0x10, 2) => registers.config_vector = self.msix.vector(value as u16),
            (0x14, 1) => self.set_status(value as u8),
            (0x16, 2) => registers.queue_select = value as u16,
            (0x18, 2) => {
                let (value, packed) = (value as u16, self.negotiated(features::RING_PACKED));
                let largest = self.device.queue_size(self.registers.queue_select);
                if (packed || value.is_power_of_two()) && (1..=largest).contains(&value) {
                    self.change(|queue| queue.size = value);
                }
            }
            (0x1a, 2) => {
                let vector = self.msix.vector(value as u16);
                let select = usize::from(registers.queue_select);
                if let Some(queue) = registers.queues.get_mut(select) {
                    queue.vector = vector;
                }
            }
            (0x1c, 2) if value == 1 => self.enable(),
            (0x20..0x38, 4) => {
                let shift = if offset & 4 == 0 { 0 } else { 32 };
                let number = ((offset - 0x20) / 8) as usize;
                self.change(|queue| {
                    if let Some(part) = queue.parts.get_mut(number) {
                        *part = *part & !(0xffff_ffff << shift) | u64::from(value) << shift;
                    }
                });
            }
            (0x3a, 2) if value == 1 => self.reset_queue(),
            _ => {}
        }
    }

    /// Changes the selected queue, if it is there and not in use.
    fn change(&mut self, change: impl FnOnce(&mut Setup)) {
        let select = usize::from(self.registers.queue_select);
        if let Some(queue) = self.registers.queues.get_mut(select)
            && !queue.enabled
        {
            change(queue);
        }
    }

    fn accept(&mut self, value: u32) {
        let registers = &mut self.registers;
        // What was agreed on stays.
        if registers.status & FEATURES_OK != 0 {
            return;
        }
        match registers.accepted_select {
            0 => registers.accepted = registers.accepted & !0xffff_ffff | u64::from(value),
            1 => registers.accepted = registers.accepted & 0xffff_ffff | u64::from(value) << 32,
            _ => registers.beyond |= value != 0,
        }
    }

    fn set_status(&mut self, value: u8) {
        if value == 0 {
            return self.reset_device();
        }
        let all = ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK | FAILED;
        // Bits are cleared by a reset alone (§2.1.1).
        let old = self.registers.status;
        let mut new = value & all & !old;
        if new & FEATURES_OK != 0 && !self.agrees() {
            new &= !FEATURES_OK;
        }
        if (old | new) & FEATURES_OK == 0 {
            new &= !DRIVER_OK;
        }
        self.registers.status |= new;
        if new & DRIVER_OK != 0 && self.is_live() {
            self.device.start(self.registers.accepted);
            for index in 0..self.registers.queues.len() {
                self.attach(index as u16);
            }
        }
    }

    /// Whether the accepted features were offered and go together (§2.2.2).
    fn agrees(&self) -> bool {
        let registers = &self.registers;
        registers.accepted & !self.offered() == 0
            && !registers.beyond
            && registers.accepted & features::VERSION_1 != 0
            && self.device.accepts(registers.accepted)
    }

    fn enable(&mut self) {
        let select = self.registers.queue_select;
        let before = self.registers.selected().is_none_or(|queue| queue.enabled);
        if before {
            return;
        }
        self.change(|queue| queue.enabled = true);
        if self.is_live() {
            self.attach(select);
        }
    }

    /// Gives the device a queue that the driver enabled.
    fn attach(&mut self, index: u16) {
        let Some(setup) = self.registers.queues.get(usize::from(index)) else {
            return;
        };
        if !setup.enabled {
            return;
        }
        let [descriptors, driver, device] = setup.parts.map(GuestPhysAddr::new);
        let layout = QueueLayout {
            size: setup.size,
            descriptors,
            driver,
            device,
        };
        match Queue::new(layout, self.registers.accepted) {
            Ok(queue) => self.device.attach(index, queue),
            Err(_) => self.break_down(),
        }
    }

    /// Resets the selected queue (§2.6.1).
    fn reset_queue(&mut self) {
        let index = self.registers.queue_select;
        if !self.negotiated(features::RING_RESET) {
            return;
        }
        let largest = self.device.queue_size(index);
        if let Some(queue) = self.registers.queues.get_mut(usize::from(index)) {
            *queue = Setup::new(largest);
            self.device.detach(index);
            // What it had to tell came before.
            self.collect();
            self.registers.due &= !(1 << (index & 63));
        }
    }

    /// How many of `size` bytes at `offset` are in the device's configuration.
    fn room(&self, offset: u32, size: u8) -> usize {
        let room = self
            .device
            .config_size()
            .saturating_sub(offset.saturating_sub(DEVICE));
        usize::from(size.min(8)).min(room as usize)
    }

    fn read_register(&mut self, offset: u32, size: u8) -> u64 {
        match offset {
            COMMON..ISR => {
                self.collect();
                let start = offset & !3;
                let both = [start, start + 4].map(|at| u64::from(self.common(at)));
                (both[1] << 32 | both[0]) >> (8 * (offset & 3))
            }
            ISR => self.read_isr().into(),
            DEVICE..MSIX_TABLE if self.room(offset, size) != 0 => {
                self.collect();
                // Counted when it is read, so that 256 changes are not taken for none.
                if core::mem::take(&mut self.registers.changed) {
                    self.registers.generation = self.registers.generation.wrapping_add(1);
                }
                let mut bytes = [0; 8];
                if let Some(bytes) = bytes.get_mut(..self.room(offset, size)) {
                    self.device.read_config(offset - DEVICE, bytes);
                }
                u64::from_le_bytes(bytes)
            }
            MSIX_TABLE..MSIX_PENDING => self.msix.read_table((offset - MSIX_TABLE).into(), size),
            MSIX_PENDING..NOTIFY => self.msix.read_pending((offset - MSIX_PENDING).into(), size),
            _ => 0,
        }
    }

    fn write_register(&mut self, offset: u32, size: u8, value: u64) {
        match offset {
            COMMON..ISR => {
                if size == 8 {
                    self.set_common(offset, 4, value as u32);
                    self.set_common(offset + 4, 4, (value >> 32) as u32);
                } else {
                    self.set_common(offset, size, value as u32);
                }
            }
            DEVICE..MSIX_TABLE if self.room(offset, size) != 0 => {
                if let Some(bytes) = value.to_le_bytes().get(..self.room(offset, size)) {
                    self.device.write_config(offset - DEVICE, bytes);
                }
            }
            MSIX_TABLE..MSIX_PENDING => {
                self.msix
                    .write_table((offset - MSIX_TABLE).into(), size, value);
            }
            // The address tells the queue; what is written tells it again.
            NOTIFY..BAR_LENGTH if self.is_live() => {
                let index = (offset - NOTIFY) / NOTIFY_MULTIPLIER;
                let queue = self.registers.queues.get(index as usize);
                if queue.is_some_and(|queue| queue.enabled) {
                    self.device.notify(index as u16);
                }
            }
            _ => {}
        }
    }

    /// The access that the driver set up in the access capability (§4.1.4.9), if these bytes of
    /// the configuration space touch its window and it is one.
    fn access(&self, offset: u16, size: u8) -> Option<(u32, u8)> {
        let window = self.access + 16;
        let touched = offset < window + 4 && window < offset.saturating_add(size.into());
        let bar = self.config.get(self.access + 4, 1);
        let at = self.config.get(self.access + 8, 4);
        let length = self.config.get(self.access + 12, 4);
        let end = at.checked_add(length)?;
        let sound = matches!(length, 1 | 2 | 4) && at.is_multiple_of(length) && end <= BAR_LENGTH;
        (touched && sound && bar == u32::from(BAR)).then_some((at, length as u8))
    }
}

impl<D: Device> PciFunction for VirtioPci<D> {
    fn config(&self) -> &ConfigSpace {
        &self.config
    }

    fn config_mut(&mut self) -> &mut ConfigSpace {
        &mut self.config
    }

    fn config_reading(&mut self, offset: u16, size: u8) {
        if let Some((at, length)) = self.access(offset, size) {
            let value = self.read_register(at, length) as u32;
            let mask = u32::MAX >> (32 - 8 * u32::from(length));
            self.config.set(self.access + 16, 4, value & mask);
        }
    }

    fn config_written(&mut self, offset: u16, size: u8) {
        if let Some((at, length)) = self.access(offset, size) {
            let value = self.config.get(self.access + 16, length);
            self.write_register(at, length, value.into());
        }
        self.device.set_master(self.is_master());
        // MSI-X may have been turned on or off.
        self.set_isr(self.registers.isr);
    }

    fn read(&mut self, bar: u8, offset: u64, size: u8, _now: Nanos) -> u64 {
        match u32::try_from(offset) {
            Ok(offset) if bar == BAR && offset < BAR_LENGTH => {
                let ones = u64::MAX >> (64 - 8 * u32::from(size.clamp(1, 8)));
                self.read_register(offset, size) & ones
            }
            _ => 0,
        }
    }

    fn write(&mut self, bar: u8, offset: u64, size: u8, value: u64, _now: Nanos) {
        match u32::try_from(offset) {
            Ok(offset) if bar == BAR && offset < BAR_LENGTH => {
                self.write_register(offset, size, value);
            }
            _ => {}
        }
    }

    fn interrupt(&self) -> bool {
        self.registers.isr != 0 && !self.msix.enabled(&self.config)
    }

    fn take_message(&mut self) -> Option<Msi> {
        self.collect();
        if !self.msix.enabled(&self.config) {
            // Queues share one bit.
            let queues = core::mem::take(&mut self.registers.due) != 0;
            let config = core::mem::take(&mut self.registers.config_due);
            let isr = [(queues, ISR_QUEUE), (config, ISR_CONFIG)];
            let isr = isr.into_iter().filter(|&(on, _)| on);
            let isr = isr.fold(self.registers.isr, |isr, (_, bit)| isr | bit);
            if isr != self.registers.isr {
                self.set_isr(isr);
            }
            return None;
        }
        if !self.is_master() {
            return None;
        }
        loop {
            let vector = if core::mem::take(&mut self.registers.config_due) {
                // This bit tells with messages, too (§4.1.4.5.1).
                self.set_isr(self.registers.isr | ISR_CONFIG);
                self.registers.config_vector
            } else if self.registers.due != 0 {
                let index = self.registers.due.trailing_zeros();
                self.registers.due &= self.registers.due - 1;
                let queue = self.registers.queues.get(index as usize);
                queue.map_or(NO_VECTOR, |queue| queue.vector)
            } else {
                return self.msix.take_unmasked(&self.config);
            };
            let message = self.msix.raise(&self.config, vector);
            if message.is_some() {
                return message;
            }
        }
    }

    fn wants_service(&self) -> bool {
        self.can_serve() || self.device.has_output()
    }

    fn serve(&mut self, mem: &mut dyn GuestMemory, now: Nanos) {
        if self.can_serve() {
            self.device.serve(mem, now);
        }
    }

    fn take_output(&mut self, print: &mut dyn FnMut(&[u8])) -> bool {
        self.device.take_output(print)
    }

    fn push_input(&mut self, bytes: &[u8]) -> Option<usize> {
        if self.is_live() {
            self.device.push_input(bytes)
        } else {
            None
        }
    }

    fn reset(&mut self) {
        self.reset_device();
        self.device.set_master(false);
        self.msix.reset();
    }
}

#[cfg(test)]
mod tests;
