//! virtio devices by their modern PCI transport (virtio 1.2 §4.1), and split rings (§2.7), from the
//! driver's side and without any check of the device: for guests that use one, and for those that
//! try what one bears.

use crate::cpu::{read32, write32};
use crate::pci::{self, Function, MASTER, MEMORY, Msix};
use core::sync::atomic::{Ordering, fence};

/// Kinds of devices (§5).
#[allow(missing_docs, reason = "the names are the standard's")]
pub mod kind {
    pub const NET: u16 = 1;
    pub const CONSOLE: u16 = 3;
    pub const RNG: u16 = 4;
}

/// Device status (§2.1).
#[allow(missing_docs, reason = "the names are the standard's")]
pub mod status {
    pub const ACKNOWLEDGE: u8 = 1;
    pub const DRIVER: u8 = 2;
    pub const DRIVER_OK: u8 = 4;
    pub const FEATURES_OK: u8 = 8;
    pub const NEEDS_RESET: u8 = 64;
    pub const FAILED: u8 = 128;
}

/// Features of transport and rings (§6).
#[allow(missing_docs, reason = "the names are the standard's")]
pub mod feature {
    pub const INDIRECT: u64 = 1 << 28;
    pub const VERSION_1: u64 = 1 << 32;
    pub const RING_RESET: u64 = 1 << 40;
}

/// Offsets in the common configuration (§4.1.4.3).
#[allow(missing_docs, reason = "the names are the standard's")]
pub mod common {
    pub const OFFERED_SELECT: u64 = 0x00;
    pub const OFFERED: u64 = 0x04;
    pub const ACCEPTED_SELECT: u64 = 0x08;
    pub const ACCEPTED: u64 = 0x0c;
    pub const CONFIG_VECTOR: u64 = 0x10;
    pub const QUEUES: u64 = 0x12;
    pub const STATUS: u64 = 0x14;
    pub const GENERATION: u64 = 0x15;
    pub const QUEUE_SELECT: u64 = 0x16;
    pub const QUEUE_SIZE: u64 = 0x18;
    pub const QUEUE_VECTOR: u64 = 0x1a;
    pub const QUEUE_ENABLE: u64 = 0x1c;
    pub const QUEUE_NOTIFY: u64 = 0x1e;
    pub const QUEUE_PARTS: u64 = 0x20;
    pub const QUEUE_RESET: u64 = 0x3a;
}

/// Descriptor: the chain goes on.
pub const NEXT: u16 = 1;
/// Descriptor: the device writes.
pub const WRITE: u16 = 2;
/// Descriptor: a table of descriptors.
pub const INDIRECT: u16 = 4;
/// No message for this.
pub const NO_VECTOR: u16 = 0xffff;

const VENDOR: u32 = 0x1af4;
const FIRST: u32 = 0x1040;

/// A device.
#[derive(Clone, Copy, Debug)]
pub struct Virtio {
    /// Its PCI function.
    pub function: Function,
    /// Addresses of its structures; the device's own is 0 where there is none.
    pub common: u64,
    /// Doorbells.
    pub notify: u64,
    /// Bytes between two of them, for each step of `queue_notify_off`.
    pub multiplier: u32,
    /// Interrupt status.
    pub isr: u64,
    /// The device's own configuration.
    pub device: u64,
    /// Its messages.
    pub msix: Option<Msix>,
}

impl Virtio {
    /// The devices of a kind, with memory and bus mastering on.
    pub fn all(kind: u16) -> impl Iterator<Item = Self> {
        let id = VENDOR | (FIRST + u32::from(kind)) << 16;
        pci::functions()
            .filter(move |function| function.id() == id)
            .filter_map(Self::open)
    }

    /// The first device of a kind.
    pub fn first(kind: u16) -> Option<Self> {
        Self::all(kind).next()
    }

    /// Finds a function's structures; the first of each kind counts (§4.1.4.1).
    pub fn open(function: Function) -> Option<Self> {
        // SAFETY: the device does nothing before it is given a ring.
        unsafe { function.command(MEMORY | MASTER, 0) };
        let place = |wanted: u8| {
            let (_, at) = function
                .capabilities()
                .find(|&(id, at)| id == 9 && function.read8(at + 3) == wanted)?;
            let bar = function.bar(function.read8(at + 4))?;
            Some((at, bar + u64::from(function.read(at + 8))))
        };
        let (notify_at, notify) = place(2)?;
        Some(Self {
            function,
            common: place(1)?.1,
            notify,
            multiplier: function.read(notify_at + 16),
            isr: place(3)?.1,
            device: place(4).map_or(0, |(_, at)| at),
            msix: function.msix(),
        })
    }

    /// A byte of the common configuration.
    pub fn read8(&self, offset: u64) -> u8 {
        // SAFETY: the registers are mapped; reading them has no side effect.
        unsafe { ((self.common + offset) as *const u8).read_volatile() }
    }

    /// Two bytes of the common configuration.
    pub fn read16(&self, offset: u64) -> u16 {
        // SAFETY: as above.
        unsafe { ((self.common + offset) as *const u16).read_volatile() }
    }

    /// Four bytes of the common configuration.
    pub fn read32(&self, offset: u64) -> u32 {
        // SAFETY: as above.
        unsafe { read32(self.common + offset) }
    }

    /// Writes a byte of the common configuration.
    pub fn write8(&self, offset: u64, value: u8) {
        // SAFETY: the device reaches the memory of its rings alone, which `set_queue` answers for.
        unsafe { ((self.common + offset) as *mut u8).write_volatile(value) };
    }

    /// Writes two bytes of the common configuration.
    pub fn write16(&self, offset: u64, value: u16) {
        // SAFETY: as above.
        unsafe { ((self.common + offset) as *mut u16).write_volatile(value) };
    }

    /// Writes four bytes of the common configuration.
    pub fn write32(&self, offset: u64, value: u32) {
        // SAFETY: as above.
        unsafe { write32(self.common + offset, value) };
    }

    /// A byte of the device's own configuration.
    pub fn config8(&self, offset: u64) -> u8 {
        // SAFETY: as above.
        unsafe { ((self.device + offset) as *const u8).read_volatile() }
    }

    /// The interrupt status, which is cleared by this.
    pub fn take_isr(&self) -> u8 {
        // SAFETY: as above.
        unsafe { (self.isr as *const u8).read_volatile() }
    }

    /// The device status.
    pub fn status(&self) -> u8 {
        self.read8(common::STATUS)
    }

    /// Resets the device, and waits until it is.
    pub fn reset(&self) {
        self.write8(common::STATUS, 0);
        while self.status() != 0 {
            core::hint::spin_loop();
        }
    }

    /// What the device offers.
    pub fn offered(&self) -> u64 {
        let half = |select| {
            self.write32(common::OFFERED_SELECT, select);
            u64::from(self.read32(common::OFFERED))
        };
        half(0) | half(1) << 32
    }

    /// Resets the device and agrees on those of `wanted` that it offers; gives them, or `None` if
    /// it does not agree.
    pub fn negotiate(&self, wanted: u64) -> Option<u64> {
        self.reset();
        let begun = status::ACKNOWLEDGE | status::DRIVER;
        self.write8(common::STATUS, status::ACKNOWLEDGE);
        self.write8(common::STATUS, begun);
        let taken = self.offered() & wanted;
        for (select, half) in [(0, taken as u32), (1, (taken >> 32) as u32)] {
            self.write32(common::ACCEPTED_SELECT, select);
            self.write32(common::ACCEPTED, half);
        }
        self.write8(common::STATUS, begun | status::FEATURES_OK);
        (self.status() & status::FEATURES_OK != 0).then_some(taken)
    }

    /// The driver is ready.
    pub fn go(&self) {
        self.write8(common::STATUS, self.status() | status::DRIVER_OK);
    }

    /// The size of a queue as the device has it: the largest, before it is set up.
    pub fn queue_size(&self, queue: u16) -> u16 {
        self.write16(common::QUEUE_SELECT, queue);
        self.read16(common::QUEUE_SIZE)
    }

    /// Sets a queue up at these three addresses and enables it.
    ///
    /// # Safety
    /// The device may write there, and where the descriptors lead.
    pub unsafe fn set_queue(&self, queue: u16, size: u16, parts: [u64; 3], vector: u16) {
        self.write16(common::QUEUE_SELECT, queue);
        self.write16(common::QUEUE_SIZE, size);
        self.write16(common::QUEUE_VECTOR, vector);
        for (at, part) in (common::QUEUE_PARTS..).step_by(8).zip(parts) {
            self.write32(at, part as u32);
            self.write32(at + 4, (part >> 32) as u32);
        }
        self.write16(common::QUEUE_ENABLE, 1);
    }

    /// Where a queue's doorbell is.
    pub fn doorbell(&self, queue: u16) -> u64 {
        self.write16(common::QUEUE_SELECT, queue);
        let offset = u32::from(self.read16(common::QUEUE_NOTIFY)) * self.multiplier;
        self.notify + u64::from(offset)
    }
}

/// Bytes of memory that a [`Ring`] of so many entries takes, a multiple of 16.
pub const fn ring_bytes(size: u16) -> usize {
    let (_, used) = offsets(size);
    (used + 6 + 8 * size as u64).next_multiple_of(16) as usize
}

/// Where the available and the used ring are behind the descriptors.
const fn offsets(size: u16) -> (u64, u64) {
    let available = 16 * size as u64;
    let used = (available + 6 + 2 * size as u64).next_multiple_of(4);
    (available, used)
}

/// A split ring with everything in one piece of memory.
#[derive(Clone, Copy, Debug)]
pub struct Ring {
    /// Entries: a power of two.
    pub size: u16,
    /// Descriptors, available ring, used ring.
    pub parts: [u64; 3],
    /// The next value of the available index.
    pub next: u16,
    /// How far the used ring was looked at.
    pub seen: u16,
}

impl Ring {
    /// An empty ring at `base`, a multiple of 16.
    ///
    /// # Safety
    /// [`ring_bytes`] of memory there belong to the ring and to the device.
    pub unsafe fn new(base: u64, size: u16) -> Self {
        let (available, used) = offsets(size);
        // SAFETY: promised by the caller.
        unsafe { (base as *mut u8).write_bytes(0, ring_bytes(size)) };
        Self {
            size,
            parts: [base, base + available, base + used],
            next: 0,
            seen: 0,
        }
    }

    fn read(&self, part: usize, offset: u64) -> u16 {
        // SAFETY: within the ring's memory.
        unsafe { ((self.parts[part] + offset) as *const u16).read_volatile() }
    }

    /// Writes two bytes of a part: 0 descriptors, 1 available, 2 used.
    pub fn write(&self, part: usize, offset: u64, value: u16) {
        // SAFETY: as above.
        unsafe { ((self.parts[part] + offset) as *mut u16).write_volatile(value) };
    }

    /// Sets a descriptor.
    pub fn describe(&self, index: u16, addr: u64, length: u32, flags: u16, next: u16) {
        let at = (self.parts[0] + 16 * u64::from(index & (self.size - 1))) as *mut u64;
        let second = u64::from(length) | u64::from(flags) << 32 | u64::from(next) << 48;
        // SAFETY: within the ring's memory.
        unsafe {
            at.write_volatile(addr);
            at.add(1).write_volatile(second);
        }
    }

    /// Makes the chain that begins at `head` available.
    pub fn offer(&mut self, head: u16) {
        let slot = u64::from(self.next & (self.size - 1));
        self.write(1, 4 + 2 * slot, head);
        self.next = self.next.wrapping_add(1);
        fence(Ordering::Release);
        self.write(1, 2, self.next);
        fence(Ordering::SeqCst);
    }

    /// Asks for no interrupts, or for them again.
    pub fn hush(&self, on: bool) {
        self.write(1, 0, on.into());
        fence(Ordering::SeqCst);
    }

    /// Whether the device wants to hear of chains.
    pub fn wants_notice(&self) -> bool {
        self.read(2, 0) & 1 == 0
    }

    /// How far the device has come.
    pub fn used(&self) -> u16 {
        self.read(2, 2)
    }

    /// The next chain that the device gives back: its head, and how much was written.
    pub fn take(&mut self) -> Option<(u16, u32)> {
        if self.used() == self.seen {
            return None;
        }
        fence(Ordering::Acquire);
        let at = 4 + 8 * u64::from(self.seen & (self.size - 1));
        self.seen = self.seen.wrapping_add(1);
        let length = [self.read(2, at + 4), self.read(2, at + 6)].map(u32::from);
        Some((self.read(2, at), length[0] | length[1] << 16))
    }
}

/// Rings a doorbell.
pub fn ring(doorbell: u64, queue: u16) {
    // SAFETY: a doorbell makes the device look at its ring.
    unsafe { (doorbell as *mut u16).write_volatile(queue) };
}
