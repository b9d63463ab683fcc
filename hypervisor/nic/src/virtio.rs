//! virtio-net (virtio 1.2 §5.1) over the modern PCI transport (§4.1) with split queues (§2.7), from
//! the driver's side.
//!
//! Asked for are version 1, the address, the link's state, promiscuous mode, and what a platform
//! may insist on. No offload is: each frame is one buffer with an empty header before it.

use crate::driver::{Driver, Hardware, Taken};
use crate::{
    BUFFER, CONTROL, DmaMemory, Fault, Link, Nic, RING, RX_BUFFERS, RX_RING, Registers, TX_BUFFERS,
    TX_RING, Width,
};
use core::sync::atomic::{Ordering, fence};
use vswitch::MacAddr;

/// The parts of the transport (§4.1.4), each a window of its own.
pub struct Windows<R> {
    /// Common configuration.
    pub common: R,
    /// Notifications.
    pub notify: R,
    /// How far apart the queues' places in it are.
    pub notify_multiplier: u32,
    /// Interrupt status.
    pub isr: R,
    /// The network card's own configuration.
    pub device: R,
}

// Common configuration (§4.1.4.3).
const DEVICE_FEATURE_SELECT: u32 = 0x00;
const DEVICE_FEATURE: u32 = 0x04;
const DRIVER_FEATURE_SELECT: u32 = 0x08;
const DRIVER_FEATURE: u32 = 0x0c;
const CONFIG_VECTOR: u32 = 0x10;
const STATUS: u32 = 0x14;
const QUEUE_SELECT: u32 = 0x16;
const QUEUE_SIZE: u32 = 0x18;
const QUEUE_VECTOR: u32 = 0x1a;
const QUEUE_ENABLE: u32 = 0x1c;
const QUEUE_NOTIFY: u32 = 0x1e;
const QUEUE_ADDRESSES: u32 = 0x20;

// Device status (§2.1).
const ACKNOWLEDGE: u32 = 1;
const DRIVER: u32 = 2;
const DRIVER_OK: u32 = 4;
const FEATURES_OK: u32 = 8;
const NEEDS_RESET: u32 = 64;
/// What the status reads once the device is gone: bits that no device sets.
const GONE: u32 = 0xff;

// Features.
const MAC: u64 = 1 << 5;
const LINK_STATUS: u64 = 1 << 16;
const CONTROL_QUEUE: u64 = 1 << 17;
const CONTROL_RECEIVE: u64 = 1 << 18;
const VERSION_1: u64 = 1 << 32;
const ACCESS_PLATFORM: u64 = 1 << 33;
const ORDER_PLATFORM: u64 = 1 << 36;
const WANTED: u64 = MAC
    | LINK_STATUS
    | CONTROL_QUEUE
    | CONTROL_RECEIVE
    | VERSION_1
    | ACCESS_PLATFORM
    | ORDER_PLATFORM;
const NEEDED: u64 = MAC | VERSION_1;

/// In the device's configuration (§5.1.4), after the address.
const DEVICE_STATUS: u32 = 6;

/// Bytes of `virtio_net_hdr` (§5.1.6).
const NET_HEADER: usize = 12;
const RX: u16 = 0;
const TX: u16 = 1;
const CTRL: u16 = 2;
/// Descriptors of the control queue.
const CONTROL_SIZE: u16 = 8;
/// The command and its answer, behind the control queue.
const COMMAND: usize = CONTROL + 0x200;
const ANSWER: usize = COMMAND + 8;
/// Class 0 (receive modes), command 0 (promiscuous), on (§5.1.6.5.1).
const PROMISCUOUS: [u8; 3] = [0, 0, 1];
const UNANSWERED: u8 = 0xff;

const DESC_NEXT: u64 = 1 << 32;
const DESC_WRITE: u64 = 2 << 32;
const NO_INTERRUPT: u16 = 1;
const NO_NOTIFY: u16 = 1;
/// Interrupts by message: queue and configuration share the first vector.
const VECTOR: u32 = 0;
const NO_VECTOR: u32 = 0xffff;

/// A split queue, its parts behind one another from `base` on.
#[derive(Clone, Copy)]
struct Queue {
    number: u16,
    base: usize,
    size: u16,
    notify: u32,
    /// Chains made available, and how many of them the device was told of.
    available: u16,
    told: u16,
    /// Used elements taken.
    used: u16,
    /// By descriptor number: with the device.
    out: [u64; RING as usize / 64],
}

impl Queue {
    const fn new(number: u16, base: usize) -> Self {
        Self {
            number,
            base,
            size: 0,
            notify: 0,
            available: 0,
            told: 0,
            used: 0,
            out: [0; RING as usize / 64],
        }
    }

    fn descriptor(&self, id: u16) -> usize {
        self.base + 16 * usize::from(id)
    }

    fn available_ring(&self) -> usize {
        self.descriptor(self.size)
    }

    fn used_ring(&self) -> usize {
        (self.available_ring() + 6 + 2 * usize::from(self.size)).next_multiple_of(8)
    }

    fn describe(&self, memory: &mut impl DmaMemory, id: u16, offset: usize, rest: u64) {
        let at = self.descriptor(id);
        let addr = memory.address() + offset as u64;
        memory.write64(at, addr);
        memory.write64(at + 8, rest);
    }

    /// Whether a descriptor is with the device, and from now on is or is not.
    fn set_out(&mut self, id: u16, out: bool) -> bool {
        let Some(word) = self.out.get_mut(usize::from(id / 64)) else {
            return false;
        };
        let bit = 1 << (id % 64);
        let was = *word & bit != 0;
        *word = if out { *word | bit } else { *word & !bit };
        was
    }

    fn offer(&mut self, memory: &mut impl DmaMemory, id: u16) {
        let slot = usize::from(self.available % self.size.max(1));
        memory.write16(self.available_ring() + 4 + 2 * slot, id);
        self.available = self.available.wrapping_add(1);
        self.set_out(id, true);
    }

    /// Makes what was offered visible; whether the device wants to be told (§2.7.13).
    fn publish(&mut self, memory: &mut impl DmaMemory) -> bool {
        if self.told == self.available {
            return false;
        }
        self.told = self.available;
        fence(Ordering::Release);
        memory.write16(self.available_ring() + 2, self.available);
        fence(Ordering::SeqCst);
        memory.read16(self.used_ring()) & NO_NOTIFY == 0
    }

    fn waiting(&self, memory: &impl DmaMemory) -> u16 {
        memory.read16(self.used_ring() + 2).wrapping_sub(self.used)
    }

    /// Chains that are with the device.
    fn pending(&self) -> u16 {
        self.available.wrapping_sub(self.used)
    }

    /// The next used chain: its first descriptor and the bytes written.
    fn take(&mut self, memory: &impl DmaMemory) -> Result<Option<(u16, u32)>, Fault> {
        let waiting = self.waiting(memory);
        if waiting == 0 {
            return Ok(None);
        }
        if waiting > self.told.wrapping_sub(self.used) {
            return Err(Fault::Broken);
        }
        fence(Ordering::Acquire);
        let slot = usize::from(self.used % self.size.max(1));
        let element = memory.read64(self.used_ring() + 4 + 8 * slot);
        let id = u16::try_from(element & 0xffff_ffff).map_err(|_| Fault::Broken)?;
        if id >= self.size || !self.set_out(id, false) {
            return Err(Fault::Broken);
        }
        self.used = self.used.wrapping_add(1);
        Ok(Some((id, (element >> 32) as u32)))
    }
}

struct Virtio<R, M> {
    windows: Windows<R>,
    memory: M,
    messages: bool,
    features: u64,
    running: bool,
    mac: MacAddr,
    rx: Queue,
    tx: Queue,
    control: Queue,
    /// The transmit buffers that are ours, a stack.
    free: [u16; RING as usize],
    free_count: usize,
    /// The receive buffer that was taken last.
    taken: u16,
}

/// Resets a card and sets it up. With `messages` it interrupts by the first entry of its MSI-X
/// table, which the caller has set up; else by its pin. `wait` waits so many microseconds; when it is
/// called the card has begun its reset, and must be able to reach memory afterwards.
///
/// # Errors
/// The card does not work.
pub fn open<R: Registers, M: DmaMemory>(
    windows: Windows<R>,
    memory: M,
    messages: bool,
    wait: &mut dyn FnMut(u64),
) -> Result<impl Nic + use<R, M>, Fault> {
    let card = Virtio {
        windows,
        memory,
        messages,
        features: 0,
        running: false,
        mac: MacAddr([0; 6]),
        rx: Queue::new(RX, RX_RING),
        tx: Queue::new(TX, TX_RING),
        control: Queue::new(CTRL, CONTROL),
        free: [0; RING as usize],
        free_count: 0,
        taken: 0,
    };
    Driver::open(card, wait)
}

impl<R: Registers, M: DmaMemory> Virtio<R, M> {
    fn get(&mut self, offset: u32, width: Width) -> u32 {
        self.windows.common.read(offset, width)
    }

    fn set(&mut self, offset: u32, width: Width, value: u32) {
        self.windows.common.write(offset, width, value);
    }

    fn add_status(&mut self, bit: u32) -> u32 {
        let status = self.get(STATUS, Width::Byte);
        self.set(STATUS, Width::Byte, status | bit);
        self.get(STATUS, Width::Byte)
    }

    fn negotiate(&mut self) -> Result<(), Fault> {
        let mut offered = 0;
        for half in [1, 0] {
            self.set(DEVICE_FEATURE_SELECT, Width::Double, half);
            offered = offered << 32 | u64::from(self.get(DEVICE_FEATURE, Width::Double));
        }
        self.features = offered & WANTED;
        if self.features & CONTROL_QUEUE == 0 {
            self.features &= !CONTROL_RECEIVE;
        }
        for (half, bits) in [(0, self.features as u32), (1, (self.features >> 32) as u32)] {
            self.set(DRIVER_FEATURE_SELECT, Width::Double, half);
            self.set(DRIVER_FEATURE, Width::Double, bits);
        }
        let agreed = self.add_status(FEATURES_OK) & FEATURES_OK != 0;
        (agreed && self.features & NEEDED == NEEDED)
            .then_some(())
            .ok_or(Fault::Refuses)
    }

    fn set_queue(&mut self, mut queue: Queue, most: u16) -> Result<Queue, Fault> {
        let fault = Fault::Queue(queue.number);
        queue = Queue::new(queue.number, queue.base);
        self.set(QUEUE_SELECT, Width::Word, queue.number.into());
        let size = u16::try_from(self.get(QUEUE_SIZE, Width::Word)).map_err(|_| fault)?;
        queue.size = size.min(most);
        if !queue.size.is_power_of_two() || queue.size < 2 {
            return Err(fault);
        }
        self.set(QUEUE_SIZE, Width::Word, queue.size.into());
        let vector = match self.messages && queue.number == RX {
            true => VECTOR,
            false => NO_VECTOR,
        };
        self.set(QUEUE_VECTOR, Width::Word, vector);
        let place = self.get(QUEUE_NOTIFY, Width::Word);
        queue.notify = place.saturating_mul(self.windows.notify_multiplier);
        for at in (queue.base..queue.used_ring() + 6 + 8 * usize::from(queue.size)).step_by(8) {
            self.memory.write64(at, 0);
        }
        self.memory.write16(queue.available_ring(), NO_INTERRUPT);
        let rings = [queue.base, queue.available_ring(), queue.used_ring()];
        for (register, ring) in (QUEUE_ADDRESSES..).step_by(8).zip(rings) {
            let addr = self.memory.address() + ring as u64;
            self.set(register, Width::Double, addr as u32);
            self.set(register + 4, Width::Double, (addr >> 32) as u32);
        }
        self.set(QUEUE_ENABLE, Width::Word, 1);
        Ok(queue)
    }

    fn notify(&mut self, queue: Queue) {
        self.windows
            .notify
            .write(queue.notify, Width::Word, queue.number.into());
    }

    /// All frames, whomever they are for.
    fn be_promiscuous(&mut self) {
        let memory = &mut self.memory;
        memory.write(COMMAND, &PROMISCUOUS);
        memory.write(ANSWER, &[UNANSWERED]);
        let command = PROMISCUOUS.len() as u64 | DESC_NEXT | 1 << 48;
        self.control.describe(memory, 0, COMMAND, command);
        self.control.describe(memory, 1, ANSWER, 1 | DESC_WRITE);
        self.control.offer(memory, 0);
        if self.control.publish(memory) {
            self.notify(self.control);
        }
    }
}

impl<R: Registers, M: DmaMemory> Hardware for Virtio<R, M> {
    type Memory = M;

    fn memory(&mut self) -> &mut M {
        &mut self.memory
    }

    fn begin_reset(&mut self) {
        self.running = false;
        self.set(STATUS, Width::Byte, 0);
    }

    fn reset_ended(&mut self) -> bool {
        self.get(STATUS, Width::Byte) == 0
    }

    fn set_up(&mut self) -> Result<(), Fault> {
        self.add_status(ACKNOWLEDGE);
        self.add_status(DRIVER);
        self.negotiate()?;
        let mut mac = [0; 6];
        for (offset, byte) in (0..).zip(&mut mac) {
            *byte = self.windows.device.read(offset, Width::Byte) as u8;
        }
        self.mac = MacAddr(mac);
        if !self.mac.is_station() {
            return Err(Fault::NoAddress);
        }
        let vector = if self.messages { VECTOR } else { NO_VECTOR };
        self.set(CONFIG_VECTOR, Width::Word, vector);
        self.rx = self.set_queue(self.rx, RING)?;
        self.tx = self.set_queue(self.tx, RING)?;
        for id in 0..self.rx.size {
            let offset = RX_BUFFERS + BUFFER * usize::from(id);
            let rest = BUFFER as u64 | DESC_WRITE;
            self.rx.describe(&mut self.memory, id, offset, rest);
            self.rx.offer(&mut self.memory, id);
        }
        self.free_count = self.tx.size.into();
        for (slot, id) in self.free.iter_mut().zip(0..self.tx.size) {
            *slot = id;
        }
        let control = self.features & CONTROL_RECEIVE != 0;
        if control {
            self.control = self.set_queue(self.control, CONTROL_SIZE)?;
        }
        if self.add_status(DRIVER_OK) & DRIVER_OK == 0 {
            return Err(Fault::Refuses);
        }
        self.running = true;
        self.refill();
        if control {
            self.be_promiscuous();
        }
        Ok(())
    }

    fn mac(&self) -> MacAddr {
        self.mac
    }

    fn look(&mut self) -> Result<Link, Fault> {
        let status = self.get(STATUS, Width::Byte);
        if status == GONE {
            return Err(Fault::Gone);
        }
        if !self.running {
            return Ok(Link::default());
        }
        if status & NEEDS_RESET != 0 || status & DRIVER_OK == 0 {
            return Err(Fault::Broken);
        }
        if self.features & CONTROL_RECEIVE != 0 && self.control.take(&self.memory)?.is_some() {
            let mut answer = [0];
            self.memory.read(ANSWER, &mut answer);
            if answer != [0] {
                return Err(Fault::Refuses);
            }
        }
        let device = &mut self.windows.device;
        let up =
            self.features & LINK_STATUS == 0 || device.read(DEVICE_STATUS, Width::Word) & 1 != 0;
        Ok(Link {
            up,
            ..Link::default()
        })
    }

    fn missed(&mut self) -> u32 {
        0
    }

    fn slot(&mut self) -> Option<usize> {
        let id = self.free.get(self.free_count.checked_sub(1)?)?;
        Some(TX_BUFFERS + BUFFER * usize::from(*id) + NET_HEADER)
    }

    fn post(&mut self, length: usize) {
        let Some(top) = self.free_count.checked_sub(1) else {
            return;
        };
        let Some(&id) = self.free.get(top) else {
            return;
        };
        self.free_count = top;
        let offset = TX_BUFFERS + BUFFER * usize::from(id);
        self.memory.write(offset, &[0; NET_HEADER]);
        let rest = (length + NET_HEADER) as u64;
        self.tx.describe(&mut self.memory, id, offset, rest);
        self.tx.offer(&mut self.memory, id);
    }

    fn tell(&mut self) {
        if self.tx.publish(&mut self.memory) {
            self.notify(self.tx);
        }
    }

    fn reclaim(&mut self) -> Result<usize, Fault> {
        let mut count = 0;
        while count < RING.into()
            && let Some((id, _)) = self.tx.take(&self.memory)?
        {
            if let Some(slot) = self.free.get_mut(self.free_count) {
                *slot = id;
                self.free_count += 1;
            }
            count += 1;
        }
        Ok(count)
    }

    fn pending(&self) -> usize {
        self.tx.pending().into()
    }

    fn ready(&self) -> bool {
        self.rx.waiting(&self.memory) != 0
    }

    fn take(&mut self) -> Result<Option<Taken>, Fault> {
        let Some((id, written)) = self.rx.take(&self.memory)? else {
            return Ok(None);
        };
        self.taken = id;
        let length = usize::try_from(written).ok().filter(|all| *all <= BUFFER);
        Ok(Some(
            match length.and_then(|all| all.checked_sub(NET_HEADER)) {
                Some(length) => Taken::Frame {
                    offset: RX_BUFFERS + BUFFER * usize::from(id) + NET_HEADER,
                    length,
                },
                None => Taken::Malformed,
            },
        ))
    }

    fn recycle(&mut self) {
        self.rx.offer(&mut self.memory, self.taken);
    }

    fn refill(&mut self) {
        if self.rx.publish(&mut self.memory) {
            self.notify(self.rx);
        }
    }

    fn set_interrupts(&mut self, on: bool) {
        let flags = if on { 0 } else { NO_INTERRUPT };
        self.memory.write16(self.rx.available_ring(), flags);
        fence(Ordering::SeqCst);
    }

    fn acknowledge(&mut self) -> bool {
        // A message has no cause to read; the register is the pin's (§4.1.4.5).
        self.messages || matches!(self.windows.isr.read(0, Width::Byte), 1..GONE)
    }
}
