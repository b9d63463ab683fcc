//! Drivers for the machine's network cards, by which the switch reaches the wire.
//!
//! A driver is logic over two things that it is given: [`Registers`], the card's register window,
//! and [`DmaMemory`], one region that both sides reach. So all of it is tested on any machine
//! against models of the cards, and the unsafe parts (ports, register windows, frames) stay in `hw`.
//!
//! - [`intel`]: e1000 (82540EM and its kin), e1000e (82574L), igb (82576, 82580, I350, I210).
//! - [`virtio`]: virtio-net over the modern PCI transport. The `virtio-drivers` crate was not taken:
//!   its memory comes from static unsafe functions, and it has no way back from a device that broke.
//!
//! What they share is `driver`: when a card is looked at, what is a stall, how a reset goes, what a
//! card is that answers no more. All work is bounded: but for `open`, no call waits longer for the
//! card than some thousand register reads, and that only in a reset. A frame is copied once on its
//! way out, and shown in place on its way in.
//!
//! Cards are set up as an uplink wants them: promiscuous, VLAN tags untouched, no checksum or
//! segmentation done by the card, no flow control (a switch must not be held by a neighbour), and
//! no jumbo frames: the hardware takes up to 1522 bytes on the wire.
//!
//! A card is trusted as far as it must be: it can write wherever in memory it likes until there is
//! an IOMMU. What it says (lengths, indices, status) is checked, as cards break.
#![cfg_attr(not(test), no_std)]
#![forbid(unsafe_code)]

mod driver;
pub mod ids;
pub mod intel;
pub mod virtio;

#[cfg(test)]
mod tests;

use arch::Nanos;
use core::fmt;
use vswitch::MacAddr;

/// The shortest frame on the wire, without its checksum (IEEE 802.3 §3.2.8): shorter ones are
/// padded with zeroes.
pub const MIN_FRAME: usize = 60;
/// The longest frame, without its checksum: 1500 bytes and two tags.
pub const MAX_FRAME: usize = 1522;
/// Bytes of an Ethernet header: nothing shorter is a frame.
pub const HEADER: usize = 14;

/// Descriptors of each ring. A power of two.
pub const RING: u16 = 256;
/// Bytes of each buffer.
pub const BUFFER: usize = 2048;

// The region's parts. The rings' 8 KiB hold a virtqueue; Intel's rings take 4 of them.
const RX_RING: usize = 0;
const TX_RING: usize = 0x2000;
const CONTROL: usize = 0x4000;
const RX_BUFFERS: usize = 0x5000;
const TX_BUFFERS: usize = RX_BUFFERS + RING as usize * BUFFER;
/// Bytes of memory that a driver wants.
pub const MEMORY: usize = TX_BUFFERS + RING as usize * BUFFER;

/// How wide a register access is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Width {
    /// 8 bits.
    Byte,
    /// 16 bits.
    Word,
    /// 32 bits.
    Double,
}

/// A card's registers. An access beyond the window reads all ones, as one that no device answers,
/// and writes nothing.
pub trait Registers {
    /// Reads at this offset, a multiple of the width.
    fn read(&mut self, offset: u32, width: Width) -> u32;

    /// Writes at this offset, a multiple of the width. What was written to memory before is seen
    /// by the card when it sees this.
    fn write(&mut self, offset: u32, width: Width, value: u32);

    /// Reads 32 bits.
    fn read32(&mut self, offset: u32) -> u32 {
        self.read(offset, Width::Double)
    }

    /// Writes 32 bits.
    fn write32(&mut self, offset: u32, value: u32) {
        self.write(offset, Width::Double, value);
    }
}

/// Memory that a driver owns and its card reaches: contiguous, 4 KiB aligned, write-back and
/// coherent. The card may write any of it at any time, so there are no references into it but in
/// [`DmaMemory::with`]. An access beyond its end reads zeroes and writes nothing.
pub trait DmaMemory {
    /// The address at which the card finds byte 0.
    fn address(&self) -> u64;

    /// Its length.
    fn bytes(&self) -> usize;

    /// Copies out. Aligned accesses of 2, 4 and 8 bytes are single.
    fn read(&self, offset: usize, to: &mut [u8]);

    /// Copies in. Aligned accesses of 2, 4 and 8 bytes are single.
    fn write(&mut self, offset: usize, data: &[u8]);

    /// Shows bytes in place: of a buffer only that the card gave back.
    fn with(&self, offset: usize, length: usize, show: &mut dyn FnMut(&[u8]));

    /// Reads 16 bits.
    fn read16(&self, offset: usize) -> u16 {
        let mut bytes = [0; 2];
        self.read(offset, &mut bytes);
        u16::from_le_bytes(bytes)
    }

    /// Reads 64 bits.
    fn read64(&self, offset: usize) -> u64 {
        let mut bytes = [0; 8];
        self.read(offset, &mut bytes);
        u64::from_le_bytes(bytes)
    }

    /// Writes 16 bits.
    fn write16(&mut self, offset: usize, value: u16) {
        self.write(offset, &value.to_le_bytes());
    }

    /// Writes 64 bits.
    fn write64(&mut self, offset: usize, value: u64) {
        self.write(offset, &value.to_le_bytes());
    }
}

/// The state of the cable.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Link {
    /// Frames can pass.
    pub up: bool,
    /// In Mbit/s; 0 where the card does not know.
    pub speed: u32,
    /// One direction at a time.
    pub half_duplex: bool,
}

impl fmt::Display for Link {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !self.up {
            return f.write_str("link down");
        }
        f.write_str("link up")?;
        if self.speed != 0 {
            write!(f, " {} Mbit/s", self.speed)?;
        }
        f.write_str(if self.half_duplex { " half duplex" } else { "" })
    }
}

/// A direction of frames.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// To the wire.
    Transmit,
    /// From the wire.
    Receive,
}

/// What is wrong with a card.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    /// All registers read all ones: it is off the bus.
    #[error("it does not answer (its registers read all ones)")]
    Gone,
    /// A ring that should move stands still.
    #[error("its {} ring stands still", match .0 { Direction::Transmit => "transmit", Direction::Receive => "receive" })]
    Stalled(Direction),
    /// It gave back what it never had, or says itself that it is broken.
    #[error("it broke the rules of its rings")]
    Broken,
    /// It does not come out of reset.
    #[error("its reset does not end")]
    Reset,
    /// It has no address to go by.
    #[error("it has no valid MAC address")]
    NoAddress,
    /// It does not accept the few features that the driver wants.
    #[error("it refuses what the driver needs")]
    Refuses,
    /// One of its queues is missing or has an odd size.
    #[error("its queue {0} cannot be used")]
    Queue(u16),
    /// The region is smaller than [`MEMORY`] or not aligned.
    #[error("the memory given to it cannot be used")]
    Memory,
}

/// What happened to a card, for the log and for whoever chooses among uplinks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// The cable's state changed.
    Link(Link),
    /// It failed, and is being reset.
    Resetting(Fault),
    /// It works again.
    Restarted,
    /// It cannot be used; tried again from time to time, in silence until it works.
    Dead(Fault),
}

impl fmt::Display for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Link(link) => link.fmt(f),
            Self::Resetting(fault) => write!(f, "reset, as {fault}"),
            Self::Restarted => f.write_str("works again"),
            Self::Dead(fault) => write!(f, "given up for now, as {fault}"),
        }
    }
}

/// Why a frame was not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TransmitError {
    /// The ring is full: later.
    #[error("the transmit ring is full")]
    Full,
    /// Shorter than a header or longer than [`MAX_FRAME`].
    #[error("{0} bytes are no frame: {HEADER} to {MAX_FRAME} are")]
    Size(usize),
    /// There is no link.
    #[error("the link is down")]
    LinkDown,
    /// It is being reset, stopped or dead.
    #[error("the card is not working")]
    NotWorking,
}

/// What passed and what did not. Counters wrap.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Counters {
    /// Frames from the wire.
    pub received: u64,
    /// Their bytes.
    pub received_bytes: u64,
    /// Frames that the card marked as damaged.
    pub errors: u64,
    /// Frames that the card had no buffer for.
    pub missed: u64,
    /// Descriptors that came back with a length that cannot be, or a frame in pieces.
    pub malformed: u64,
    /// Frames taken for the wire.
    pub transmitted: u64,
    /// Their bytes.
    pub transmitted_bytes: u64,
    /// Frames taken that a reset threw away.
    pub lost: u64,
    /// Resets after a fault or a lost link.
    pub resets: u64,
}

/// A network card.
pub trait Nic {
    /// Its own address.
    fn mac(&self) -> MacAddr;

    /// The cable's state when the card was last looked at.
    fn link(&self) -> Link;

    /// Whether it works: neither in reset nor dead nor stopped.
    fn works(&self) -> bool;

    /// What passed.
    fn counters(&self) -> &Counters;

    /// Queues a frame, given in pieces, without its checksum. The card begins with it at the next
    /// [`Nic::flush`], or when the ring is full.
    ///
    /// # Errors
    /// The frame was not taken; see [`TransmitError`].
    fn transmit(&mut self, frame: &[&[u8]]) -> Result<(), TransmitError>;

    /// Tells the card of all that was queued: once for a batch, as it is an access to the card.
    fn flush(&mut self);

    /// Takes up to `budget` buffers from the card and shows the frames in them, without their
    /// checksums. Gives the number of buffers: less than the budget when there were no more.
    fn receive(&mut self, budget: usize, show: &mut dyn FnMut(&[u8])) -> usize;

    /// Looks after the card: link, stalls, resets. Cheap; to be called at least some ten times a
    /// second, with time that does not go back. One event a call.
    fn poll(&mut self, now: Nanos) -> Option<Event>;

    /// Turns the card's interrupts for received frames and link changes on or off. They are off at
    /// first. A frame that came before they were turned on may raise none: look once more after it.
    fn set_interrupts(&mut self, on: bool);

    /// To be called on an interrupt that may be the card's: acknowledges it, and says whether it
    /// was. The next [`Nic::poll`] looks at the card.
    fn interrupt(&mut self) -> bool;

    /// Stops all access to memory, for good.
    fn stop(&mut self);
}
