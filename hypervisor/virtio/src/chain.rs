//! Chains of buffers, which are what a virtqueue carries (virtio 1.2 §2.6), and what a driver can
//! do wrong with them.

use arch::{GuestMemory, GuestPhysAddr, MemoryFault};
use serde::{Deserialize, Serialize};

/// The longest chain taken, in buffers; Linux uses at most 128 segments and headers.
pub const MAX_CHAIN: usize = 256;

pub(crate) const DESC_NEXT: u16 = 1;
pub(crate) const DESC_WRITE: u16 = 2;
pub(crate) const DESC_INDIRECT: u16 = 4;

/// What the driver did wrong. The device then sets DEVICE_NEEDS_RESET (§2.1.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum QueueError {
    /// The size is no power of two (split), or not from 1 to 32768.
    #[error("queue size {0} is not a power of two (packed: a number) from 1 to 32768")]
    Size(u16),
    /// A ring is not where the driver says, or not aligned (§2.7: 16, 2 and 4 bytes; §2.8: 16, 4
    /// and 4).
    #[error("ring at {0} is misaligned or has no memory")]
    Ring(GuestPhysAddr),
    /// The available index is further ahead than the queue is long.
    #[error("{0} chains are said to be available, more than the queue holds")]
    Overrun(u16),
    /// A descriptor number beyond its table.
    #[error("descriptor {0} is beyond its table")]
    Descriptor(u16),
    /// A chain longer than its table or than this device takes.
    #[error("a descriptor chain is endless or too long")]
    Chain,
    /// An indirect table that was not negotiated, is nested, empty, or no multiple of 16 bytes
    /// (§2.7.5.3, §2.8.7).
    #[error("an indirect table of {0} bytes is malformed")]
    Indirect(u32),
    /// A buffer for the device to read behind one for it to write (§2.7.4.2).
    #[error("a readable buffer stands behind a writable one")]
    Order,
    /// A buffer is not in RAM.
    #[error("the buffer at {0} has no memory")]
    Buffer(GuestPhysAddr),
    /// A request is shorter or longer than its device's kind allows, or lacks a part.
    #[error("a request has {found} bytes where {wanted} are needed")]
    Request {
        /// What there is.
        found: u64,
        /// What is needed.
        wanted: u64,
    },
}

/// One buffer of a chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Buffer {
    /// Where it is.
    pub addr: GuestPhysAddr,
    /// Its length in bytes.
    pub length: u32,
    /// The device writes it; otherwise it reads it.
    pub writable: bool,
}

/// What names a chain when it is given back.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Token {
    /// Split: number of the first descriptor. Packed: the buffer id.
    pub(crate) id: u16,
    /// Packed: how many places of the ring it takes.
    pub(crate) places: u16,
}

/// A chain of buffers that the driver made available. It is large, and meant to be kept and filled
/// again by [`Queue::pop`](crate::Queue::pop).
#[derive(Debug)]
pub struct Chain {
    pub(crate) token: Token,
    buffers: [Buffer; MAX_CHAIN],
    readable: usize,
    length: usize,
    readable_bytes: u64,
    writable_bytes: u64,
}

impl Default for Chain {
    fn default() -> Self {
        Self::new()
    }
}

impl Chain {
    /// An empty chain.
    #[must_use]
    pub const fn new() -> Self {
        let nothing = Buffer {
            addr: GuestPhysAddr::new(0),
            length: 0,
            writable: false,
        };
        Self {
            token: Token { id: 0, places: 0 },
            buffers: [nothing; MAX_CHAIN],
            readable: 0,
            length: 0,
            readable_bytes: 0,
            writable_bytes: 0,
        }
    }

    /// What names it when it is given back.
    #[must_use]
    pub const fn token(&self) -> Token {
        self.token
    }

    /// Its buffers: those to read, then those to write.
    #[must_use]
    pub fn buffers(&self) -> &[Buffer] {
        self.buffers.get(..self.length).unwrap_or(&[])
    }

    /// The buffers for the device to read.
    #[must_use]
    pub fn readable(&self) -> &[Buffer] {
        self.buffers.get(..self.readable).unwrap_or(&[])
    }

    /// The buffers for the device to write.
    #[must_use]
    pub fn writable(&self) -> &[Buffer] {
        self.buffers.get(self.readable..self.length).unwrap_or(&[])
    }

    /// Bytes to read.
    #[must_use]
    pub const fn readable_bytes(&self) -> u64 {
        self.readable_bytes
    }

    /// Room to write, in bytes.
    #[must_use]
    pub const fn writable_bytes(&self) -> u64 {
        self.writable_bytes
    }

    /// Copies from the readable part at `offset` into `buf`; gives how many bytes there were.
    ///
    /// # Errors
    /// A buffer is not in RAM.
    pub fn read(
        &self,
        mem: &mut dyn GuestMemory,
        offset: u64,
        buf: &mut [u8],
    ) -> Result<usize, QueueError> {
        if let ([part], 0) = (self.readable(), offset)
            && buf.len() as u64 <= part.length.into()
        {
            mem.read(part.addr, buf).map_err(buffer)?;
            return Ok(buf.len());
        }
        let mut done = 0;
        pieces(self.readable(), offset, buf.len(), |addr, range| {
            done = range.end;
            let to = buf.get_mut(range).unwrap_or(&mut []);
            mem.read(addr, to).map_err(buffer)
        })?;
        Ok(done)
    }

    /// Copies `data` into the writable part at `offset`; gives how many bytes there was room for.
    ///
    /// # Errors
    /// A buffer is not in RAM.
    pub fn write(
        &self,
        mem: &mut dyn GuestMemory,
        offset: u64,
        data: &[u8],
    ) -> Result<usize, QueueError> {
        if let ([part], 0) = (self.writable(), offset)
            && data.len() as u64 <= part.length.into()
        {
            mem.write(part.addr, data).map_err(buffer)?;
            return Ok(data.len());
        }
        let mut done = 0;
        pieces(self.writable(), offset, data.len(), |addr, range| {
            done = range.end;
            mem.write(addr, data.get(range).unwrap_or(&[]))
                .map_err(buffer)
        })?;
        Ok(done)
    }

    pub(crate) fn clear(&mut self) {
        (self.readable, self.length) = (0, 0);
        (self.readable_bytes, self.writable_bytes) = (0, 0);
        self.token = Token::default();
    }

    /// Fills it with one buffer, as its only descriptor tells of it.
    #[inline]
    pub(crate) const fn single(&mut self, token: Token, addr: u64, length: u32, flags: u16) {
        let writable = flags & DESC_WRITE != 0;
        let [first, ..] = &mut self.buffers;
        *first = Buffer {
            addr: GuestPhysAddr::new(addr),
            length,
            writable,
        };
        (self.token, self.length) = (token, 1);
        (self.readable, self.readable_bytes, self.writable_bytes) = match writable {
            true => (0, 0, length as u64),
            false => (1, length as u64, 0),
        };
    }

    /// Appends a buffer as a descriptor tells of it.
    pub(crate) fn append(&mut self, addr: u64, length: u32, flags: u16) -> Result<(), QueueError> {
        let writable = flags & DESC_WRITE != 0;
        if !writable && self.readable != self.length {
            return Err(QueueError::Order);
        }
        let slot = self.buffers.get_mut(self.length).ok_or(QueueError::Chain)?;
        *slot = Buffer {
            addr: GuestPhysAddr::new(addr),
            length,
            writable,
        };
        self.length += 1;
        if writable {
            self.writable_bytes += u64::from(length);
        } else {
            self.readable = self.length;
            self.readable_bytes += u64::from(length);
        }
        Ok(())
    }
}

/// Walks `length` bytes from `offset` of the buffers, piece by piece: where it lies in the guest,
/// and which of the bytes asked for it is.
#[inline]
fn pieces(
    buffers: &[Buffer],
    mut offset: u64,
    length: usize,
    mut piece: impl FnMut(GuestPhysAddr, core::ops::Range<usize>) -> Result<(), QueueError>,
) -> Result<(), QueueError> {
    let mut done = 0;
    for part in buffers {
        let Some(room) = u64::from(part.length)
            .checked_sub(offset)
            .filter(|&n| n > 0)
        else {
            offset -= u64::from(part.length);
            continue;
        };
        let left = length - done;
        if left == 0 {
            break;
        }
        let now = usize::try_from(room).map_or(left, |room| room.min(left));
        let addr = part
            .addr
            .checked_add(offset)
            .ok_or(QueueError::Buffer(part.addr))?;
        piece(addr, done..done + now)?;
        done += now;
        offset = 0;
    }
    Ok(())
}

const fn place(fault: MemoryFault) -> GuestPhysAddr {
    let (MemoryFault::NotRam(addr) | MemoryFault::ReadOnly(addr) | MemoryFault::OutOfMemory(addr)) =
        fault;
    addr
}

fn buffer(fault: MemoryFault) -> QueueError {
    QueueError::Buffer(place(fault))
}

pub(crate) fn ring(fault: MemoryFault) -> QueueError {
    QueueError::Ring(place(fault))
}

pub(crate) fn at(base: GuestPhysAddr, offset: u64) -> Result<GuestPhysAddr, QueueError> {
    base.checked_add(offset).ok_or(QueueError::Ring(base))
}

pub(crate) fn read<const N: usize>(
    mem: &mut dyn GuestMemory,
    addr: GuestPhysAddr,
) -> Result<[u8; N], QueueError> {
    let mut bytes = [0; N];
    mem.read(addr, &mut bytes).map_err(ring)?;
    Ok(bytes)
}

/// A 16-byte descriptor; the last two fields differ between the ring formats: flags and next
/// (§2.7.5), buffer id and flags (§2.8.13).
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Descriptor {
    pub addr: u64,
    pub length: u32,
    pub third: u16,
    pub fourth: u16,
}

impl Descriptor {
    pub fn read(mem: &mut dyn GuestMemory, addr: GuestPhysAddr) -> Result<Self, QueueError> {
        Ok(Self::parse(&read(mem, addr)?))
    }

    #[inline]
    pub const fn parse(bytes: &[u8; 16]) -> Self {
        let [a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p] = *bytes;
        Self {
            addr: u64::from_le_bytes([a, b, c, d, e, f, g, h]),
            length: u32::from_le_bytes([i, j, k, l]),
            third: u16::from_le_bytes([m, n]),
            fourth: u16::from_le_bytes([o, p]),
        }
    }
}

/// The number of descriptors in an indirect table of `bytes` bytes.
pub(crate) fn indirect_count(bytes: u32) -> Result<u16, QueueError> {
    match u16::try_from(bytes / 16) {
        Ok(count) if count != 0 && bytes.is_multiple_of(16) => Ok(count),
        _ => Err(QueueError::Indirect(bytes)),
    }
}
