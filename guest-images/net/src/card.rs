//! A driver for virtio-net (virtio 1.2 §5.1): one pair of split rings, whole frames, no offloads.
//!
//! Each buffer has a descriptor of its own, with the header in front of the frame. The device
//! interrupts by MSI-X, or by INTA# where that is wanted, and only for what it received: buffers of
//! frames that were sent are taken back when the next one is to go out.

use core::cell::UnsafeCell;
use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use guest_runtime::cpu::rdtsc;
use guest_runtime::virtio::{NO_VECTOR, Ring, Virtio, WRITE, common, feature, kind, ring};
use guest_runtime::{Frame, clock, on_interrupt, pc};
use smoltcp::phy::{Device, DeviceCapabilities, Medium, RxToken, TxToken};
use smoltcp::time::Instant;

/// The interrupt of the card.
const VECTOR: u8 = 0x50;
/// The device has an address (§5.1.3).
const MAC: u64 = 1 << 5;
/// virtio_net_hdr in front of each frame (§5.1.6).
const HEADER: usize = 12;
/// An Ethernet frame without its checksum.
const FRAME: usize = 1514;
const BUFFER: usize = 2048;
const BUFFERS: u16 = 32;
const RING: usize = guest_runtime::virtio::ring_bytes(BUFFERS);
/// The I/O APIC's first pin for PCI interrupts, and their low active level (_PRT).
const FIRST_PIN: u32 = 16;
const LEVEL_LOW: u32 = 1 << 15 | 1 << 13;

#[repr(C, align(4096))]
struct Memory(UnsafeCell<[[u8; RING + BUFFER * BUFFERS as usize]; 2]>);

// SAFETY: `Card::open` gives it away once.
unsafe impl Sync for Memory {}

static MEMORY: Memory = Memory(UnsafeCell::new([[0; _]; 2]));
static TAKEN: AtomicBool = AtomicBool::new(false);
/// An interrupt came since the card was looked at.
static CAME: AtomicBool = AtomicBool::new(false);
/// Where the interrupt status is, for an interrupt by a pin.
static ISR: AtomicU64 = AtomicU64::new(0);

/// A network card.
#[derive(Debug)]
pub struct Card {
    device: Virtio,
    /// Received, and to be sent.
    rings: [Ring; 2],
    doorbells: [u64; 2],
    /// Where the buffers of each ring begin.
    buffers: [u64; 2],
    /// A bit for each buffer to be sent that is not with the device.
    free: u32,
    /// Buffers that the device was not told of.
    unheard: [bool; 2],
}

fn message(_: &mut Frame) {
    CAME.store(true, Ordering::Relaxed);
    pc::eoi();
}

fn pin(frame: &mut Frame) {
    // SAFETY: reading it is what lets the pin go; the address is the device's own.
    let _ = unsafe { (ISR.load(Ordering::Relaxed) as *const u8).read_volatile() };
    message(frame);
}

impl Card {
    /// Sets the first card up, if there is one. Interrupts must be handled already.
    pub fn open(by_pin: bool) -> Option<Self> {
        let device = Virtio::first(kind::NET)?;
        if TAKEN.swap(true, Ordering::Relaxed) {
            return None;
        }
        device.negotiate(feature::VERSION_1 | MAC)?;
        let parts = MEMORY.0.get() as u64;
        let bytes = (RING + BUFFER * usize::from(BUFFERS)) as u64;
        let bases = [parts, parts + bytes];
        let vector = match device.msix.filter(|_| !by_pin) {
            Some(msix) => {
                on_interrupt(VECTOR, message);
                msix.enable(true, false);
                msix.set_here(0, VECTOR);
                0
            }
            None => {
                ISR.store(device.isr, Ordering::Relaxed);
                on_interrupt(VECTOR, pin);
                let line = FIRST_PIN + u32::from(device.function.device) % 4;
                pc::set_redirection(line, LEVEL_LOW | u32::from(VECTOR), 0);
                NO_VECTOR
            }
        };
        device.write16(common::CONFIG_VECTOR, NO_VECTOR);
        let mut card = Self {
            device,
            // SAFETY: the memory is the card's alone.
            rings: bases.map(|base| unsafe { Ring::new(base, BUFFERS) }),
            doorbells: [0, 1].map(|queue| device.doorbell(queue)),
            buffers: bases.map(|base| base + RING as u64),
            free: u32::MAX,
            unheard: [true, false],
        };
        for (queue, vector) in [(0, vector), (1, vector)] {
            let parts = card.rings[usize::from(queue)].parts;
            // SAFETY: as above; the descriptors lead to the card's buffers.
            unsafe { device.set_queue(queue, BUFFERS, parts, vector) };
        }
        card.rings[1].hush(true);
        for index in 0..BUFFERS {
            card.give(index);
        }
        device.go();
        card.tell();
        Some(card)
    }

    /// Its address.
    pub fn mac(&self) -> [u8; 6] {
        [0, 1, 2, 3, 4, 5].map(|at| self.device.config8(at))
    }

    fn buffer(&self, queue: usize, index: u16) -> u64 {
        self.buffers[queue] + BUFFER as u64 * u64::from(index % BUFFERS)
    }

    /// Gives the device a buffer to fill.
    fn give(&mut self, index: u16) {
        let at = self.buffer(0, index);
        self.rings[0].describe(index, at, BUFFER as u32, WRITE, 0);
        self.rings[0].offer(index);
        self.unheard[0] = true;
    }

    /// Rings the doorbells of rings with something new.
    pub fn tell(&mut self) {
        for queue in 0..2u16 {
            let at = usize::from(queue);
            if core::mem::take(&mut self.unheard[at]) && self.rings[at].wants_notice() {
                ring(self.doorbells[at], queue);
            }
        }
    }

    /// Tells that from now on an interrupt is news.
    pub fn look(&self) {
        CAME.store(false, Ordering::Relaxed);
    }

    /// Halts until the card has news or the TSC has come to `deadline`.
    pub fn wait(&self, deadline: u64) {
        if deadline > rdtsc() {
            clock::sleep_until_or(deadline, || CAME.load(Ordering::Relaxed));
        }
    }

    fn take_back(&mut self) {
        while let Some((head, _)) = self.rings[1].take() {
            self.free |= 1 << (head % BUFFERS);
        }
    }

    /// Whether a frame can go out; if not, an interrupt tells when one can.
    fn has_room(&mut self) -> bool {
        self.take_back();
        self.rings[1].hush(self.free != 0);
        if self.free == 0 {
            self.tell();
            self.take_back();
        }
        self.free != 0
    }

    fn received(&mut self) -> Option<Received> {
        let (head, length) = self.rings[0].take()?;
        let length = (length as usize).clamp(HEADER, HEADER + FRAME) - HEADER;
        let mut frame = Received {
            bytes: [0; FRAME],
            length,
        };
        let from = (self.buffer(0, head) + HEADER as u64) as *const u8;
        // SAFETY: the device has given the buffer back.
        unsafe {
            frame
                .bytes
                .as_mut_ptr()
                .copy_from_nonoverlapping(from, length)
        };
        self.give(head);
        Some(frame)
    }

    fn send<R>(&mut self, length: usize, fill: impl FnOnce(&mut [u8]) -> R) -> R {
        let mut bytes = [0; FRAME];
        let length = length.min(FRAME);
        let result = fill(&mut bytes[..length]);
        // `has_room` came first.
        let index = (self.free.trailing_zeros() as u16) % BUFFERS;
        self.free &= !(1 << index);
        let at = self.buffer(1, index);
        // SAFETY: the buffer is not with the device. Its header is and stays zero.
        unsafe {
            ((at + HEADER as u64) as *mut u8).copy_from_nonoverlapping(bytes.as_ptr(), length)
        };
        self.rings[1].describe(index, at, (HEADER + length) as u32, 0, 0);
        self.rings[1].offer(index);
        self.unheard[1] = true;
        result
    }
}

/// A frame that came.
#[derive(Debug)]
pub struct Received {
    bytes: [u8; FRAME],
    length: usize,
}

/// Room for a frame that goes.
#[derive(Debug)]
pub struct Room<'a>(&'a mut Card);

impl RxToken for Received {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, work: F) -> R {
        work(&self.bytes[..self.length])
    }
}

impl TxToken for Room<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, length: usize, fill: F) -> R {
        self.0.send(length, fill)
    }
}

impl Device for Card {
    type RxToken<'a> = Received;
    type TxToken<'a> = Room<'a>;

    fn receive(&mut self, _: Instant) -> Option<(Received, Room<'_>)> {
        // What came may want an answer.
        if !self.has_room() {
            return None;
        }
        let frame = self.received()?;
        Some((frame, Room(self)))
    }

    fn transmit(&mut self, _: Instant) -> Option<Room<'_>> {
        self.has_room().then_some(Room(self))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ethernet;
        capabilities.max_transmission_unit = FRAME;
        capabilities.max_burst_size = Some(BUFFERS.into());
        capabilities
    }
}
