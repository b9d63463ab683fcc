//! The split virtqueue (virtio 1.2 §2.7), with indirect descriptors and EVENT_IDX.
//!
//! The driver writes the descriptor table and the available ring, the device the used ring. All of
//! it is guest memory: each value is read once and checked, an index never leaves its ring, and a
//! chain is at most as long as the queue, so that a loop of descriptors ends in an error.

use arch::{GuestMemory, GuestPhysAddr, MemoryFault};
use serde::{Deserialize, Serialize};

/// The largest queue (§2.7).
const MAX_SIZE: u16 = 32768;
/// The longest chain taken, in buffers: Linux uses at most 128 segments and headers.
const MAX_CHAIN: usize = 256;
const DESC_NEXT: u16 = 1;
const DESC_WRITE: u16 = 2;
const DESC_INDIRECT: u16 = 4;
const AVAIL_NO_INTERRUPT: u16 = 1;

/// What the driver did wrong. The device then sets DEVICE_NEEDS_RESET (§2.1.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum QueueError {
    /// The size is no power of two up to 32768.
    #[error("queue size {0} is not a power of two from 1 to 32768")]
    Size(u16),
    /// A ring is not where the driver says, or not aligned (§2.7: 16, 2 and 4 bytes).
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
    /// An indirect table that is nested, empty, or no multiple of 16 bytes (§2.7.5.3).
    #[error("an indirect table of {0} bytes is malformed")]
    Indirect(u32),
    /// A buffer for the device to read behind one for it to write (§2.7.4.2).
    #[error("a readable buffer stands behind a writable one")]
    Order,
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

/// A chain of buffers that the driver made available.
#[derive(Debug)]
pub struct Chain {
    head: u16,
    buffers: [Buffer; MAX_CHAIN],
    length: usize,
}

impl Chain {
    /// Its buffers: those to read, then those to write.
    #[must_use]
    pub fn buffers(&self) -> &[Buffer] {
        self.buffers.get(..self.length).unwrap_or(&[])
    }
}

/// A queue, as the driver set it up and as far as the device has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SplitQueueState {
    size: u16,
    descriptors: GuestPhysAddr,
    available: GuestPhysAddr,
    used: GuestPhysAddr,
    event_index: bool,
    next_available: u16,
    next_used: u16,
    signalled: u16,
}

/// A split virtqueue, seen from the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SplitQueue(SplitQueueState);

struct Descriptor {
    addr: u64,
    length: u32,
    flags: u16,
    next: u16,
}

fn at(base: GuestPhysAddr, offset: u64) -> Result<GuestPhysAddr, QueueError> {
    base.checked_add(offset).ok_or(QueueError::Ring(base))
}

fn ring(fault: MemoryFault) -> QueueError {
    let (MemoryFault::NotRam(addr) | MemoryFault::ReadOnly(addr) | MemoryFault::OutOfMemory(addr)) =
        fault;
    QueueError::Ring(addr)
}

fn read<const N: usize>(
    mem: &mut dyn GuestMemory,
    addr: GuestPhysAddr,
) -> Result<[u8; N], QueueError> {
    let mut bytes = [0; N];
    mem.read(addr, &mut bytes).map_err(ring)?;
    Ok(bytes)
}

impl SplitQueue {
    /// A queue at these places.
    ///
    /// # Errors
    /// The size or an alignment is wrong.
    pub fn new(
        size: u16,
        descriptors: GuestPhysAddr,
        available: GuestPhysAddr,
        used: GuestPhysAddr,
        event_index: bool,
    ) -> Result<Self, QueueError> {
        if !size.is_power_of_two() || size > MAX_SIZE {
            return Err(QueueError::Size(size));
        }
        for (addr, align) in [(descriptors, 16), (available, 2), (used, 4)] {
            if !addr.is_aligned(align) {
                return Err(QueueError::Ring(addr));
            }
        }
        Ok(Self(SplitQueueState {
            size,
            descriptors,
            available,
            used,
            event_index,
            next_available: 0,
            next_used: 0,
            signalled: 0,
        }))
    }

    /// All state, for saving.
    #[must_use]
    pub const fn save(&self) -> SplitQueueState {
        self.0
    }

    /// A queue from saved state.
    ///
    /// # Errors
    /// As [`SplitQueue::new`].
    pub fn restore(state: SplitQueueState) -> Result<Self, QueueError> {
        let SplitQueueState {
            size,
            descriptors,
            available,
            used,
            event_index,
            ..
        } = state;
        Self::new(size, descriptors, available, used, event_index)?;
        Ok(Self(state))
    }

    /// Takes the next chain, if the driver made one available.
    ///
    /// # Errors
    /// The driver broke the rules; the queue is to be stopped.
    pub fn pop(&mut self, mem: &mut dyn GuestMemory) -> Result<Option<Chain>, QueueError> {
        let queue = &mut self.0;
        let index = u16::from_le_bytes(read(mem, at(queue.available, 2)?)?);
        let waiting = index.wrapping_sub(queue.next_available);
        if waiting == 0 {
            return Ok(None);
        }
        if waiting > queue.size {
            return Err(QueueError::Overrun(waiting));
        }
        let slot = queue.next_available & (queue.size - 1);
        let head = u16::from_le_bytes(read(mem, at(queue.available, 4 + 2 * u64::from(slot))?)?);
        let chain = self.walk(mem, head)?;
        self.0.next_available = self.0.next_available.wrapping_add(1);
        Ok(Some(chain))
    }

    fn walk(&self, mem: &mut dyn GuestMemory, head: u16) -> Result<Chain, QueueError> {
        let nothing = Buffer {
            addr: GuestPhysAddr::new(0),
            length: 0,
            writable: false,
        };
        let mut chain = Chain {
            head,
            buffers: [nothing; MAX_CHAIN],
            length: 0,
        };
        let (mut table, mut entries, mut indirect) = (self.0.descriptors, self.0.size, false);
        let mut number = head;
        loop {
            if number >= entries {
                return Err(QueueError::Descriptor(number));
            }
            let found = Self::descriptor(mem, at(table, 16 * u64::from(number))?)?;
            if found.flags & DESC_INDIRECT != 0 {
                let whole = found.length.is_multiple_of(16) && found.length != 0;
                let count = u16::try_from(found.length / 16);
                match count {
                    Ok(count) if whole && !indirect && found.flags & DESC_NEXT == 0 => {
                        (table, entries, indirect) = (GuestPhysAddr::new(found.addr), count, true);
                        number = 0;
                        continue;
                    }
                    _ => return Err(QueueError::Indirect(found.length)),
                }
            }
            let writable = found.flags & DESC_WRITE != 0;
            if !writable && chain.buffers().last().is_some_and(|last| last.writable) {
                return Err(QueueError::Order);
            }
            let addr = GuestPhysAddr::new(found.addr);
            let slot = chain
                .buffers
                .get_mut(chain.length)
                .ok_or(QueueError::Chain)?;
            *slot = Buffer {
                addr,
                length: found.length,
                writable,
            };
            chain.length += 1;
            if found.flags & DESC_NEXT == 0 {
                return Ok(chain);
            }
            if chain.length >= usize::from(entries) {
                return Err(QueueError::Chain);
            }
            number = found.next;
        }
    }

    fn descriptor(
        mem: &mut dyn GuestMemory,
        addr: GuestPhysAddr,
    ) -> Result<Descriptor, QueueError> {
        let [a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p] = read::<16>(mem, addr)?;
        Ok(Descriptor {
            addr: u64::from_le_bytes([a, b, c, d, e, f, g, h]),
            length: u32::from_le_bytes([i, j, k, l]),
            flags: u16::from_le_bytes([m, n]),
            next: u16::from_le_bytes([o, p]),
        })
    }

    /// Gives a chain back, of whose writable buffers the device wrote the first `written` bytes.
    ///
    /// # Errors
    /// The used ring has no memory behind it.
    pub fn push(
        &mut self,
        mem: &mut dyn GuestMemory,
        chain: &Chain,
        written: u32,
    ) -> Result<(), QueueError> {
        let queue = &mut self.0;
        let slot = queue.next_used & (queue.size - 1);
        let mut element = [0; 8];
        element[..2].copy_from_slice(&chain.head.to_le_bytes());
        element[4..].copy_from_slice(&written.to_le_bytes());
        mem.write(at(queue.used, 4 + 8 * u64::from(slot))?, &element)
            .map_err(ring)?;
        queue.next_used = queue.next_used.wrapping_add(1);
        // The index after the element: x86 keeps stores in order.
        mem.write(at(queue.used, 2)?, &queue.next_used.to_le_bytes())
            .map_err(ring)
    }

    /// Whether the driver wants an interrupt for what was given back since the last call
    /// (§2.7.7).
    ///
    /// # Errors
    /// The available ring has no memory behind it.
    pub fn wants_interrupt(&mut self, mem: &mut dyn GuestMemory) -> Result<bool, QueueError> {
        let queue = &mut self.0;
        let (old, new) = (queue.signalled, queue.next_used);
        queue.signalled = new;
        if old == new {
            return Ok(false);
        }
        if !queue.event_index {
            let flags = u16::from_le_bytes(read(mem, queue.available)?);
            return Ok(flags & AVAIL_NO_INTERRUPT == 0);
        }
        let event = at(queue.available, 4 + 2 * u64::from(queue.size))?;
        let event = u16::from_le_bytes(read(mem, event)?);
        Ok(new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old))
    }

    /// With EVENT_IDX: asks the driver to notify when the next chain is there (§2.7.10). Look
    /// once more after it: one may have come in between.
    ///
    /// # Errors
    /// The used ring has no memory behind it.
    pub fn ask_for_notification(&self, mem: &mut dyn GuestMemory) -> Result<(), QueueError> {
        let queue = &self.0;
        if queue.event_index {
            let event = at(queue.used, 4 + 8 * u64::from(queue.size))?;
            mem.write(event, &queue.next_available.to_le_bytes())
                .map_err(ring)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Ram(Vec<u8>);

    impl GuestMemory for Ram {
        fn read(&mut self, addr: GuestPhysAddr, buf: &mut [u8]) -> Result<(), MemoryFault> {
            let start = addr.as_u64() as usize;
            let from = self.0.get(start..start.saturating_add(buf.len()));
            buf.copy_from_slice(from.ok_or(MemoryFault::NotRam(addr))?);
            Ok(())
        }
        fn write(&mut self, addr: GuestPhysAddr, data: &[u8]) -> Result<(), MemoryFault> {
            let start = addr.as_u64() as usize;
            let to = self.0.get_mut(start..start.saturating_add(data.len()));
            to.ok_or(MemoryFault::NotRam(addr))?.copy_from_slice(data);
            Ok(())
        }
        fn compare_exchange(
            &mut self,
            addr: GuestPhysAddr,
            _: u8,
            _: u64,
            _: u64,
        ) -> Result<u64, MemoryFault> {
            Err(MemoryFault::NotRam(addr))
        }
    }

    const DESC: u64 = 0x1000;
    const AVAIL: u64 = 0x2000;
    const USED: u64 = 0x3000;

    struct Driver {
        ram: Ram,
        index: u16,
    }

    impl Driver {
        fn new() -> Self {
            Self {
                ram: Ram(vec![0; 0x10000]),
                index: 0,
            }
        }
        fn queue(event_index: bool) -> SplitQueue {
            let gpa = GuestPhysAddr::new;
            SplitQueue::new(8, gpa(DESC), gpa(AVAIL), gpa(USED), event_index).unwrap()
        }
        fn put(&mut self, addr: u64, bytes: &[u8]) {
            self.ram.write(GuestPhysAddr::new(addr), bytes).unwrap();
        }
        fn describe(&mut self, table: u64, n: u64, addr: u64, length: u32, flags: u16, next: u16) {
            let at = table + 16 * n;
            self.put(at, &addr.to_le_bytes());
            self.put(at + 8, &length.to_le_bytes());
            self.put(at + 12, &flags.to_le_bytes());
            self.put(at + 14, &next.to_le_bytes());
        }
        fn offer(&mut self, head: u16) {
            self.put(
                AVAIL + 4 + 2 * u64::from(self.index % 8),
                &head.to_le_bytes(),
            );
            self.index = self.index.wrapping_add(1);
            self.put(AVAIL + 2, &self.index.to_le_bytes());
        }
    }

    #[test]
    fn a_request_goes_out_and_its_answer_comes_back() {
        let mut driver = Driver::new();
        let mut queue = Driver::queue(false);
        assert!(queue.pop(&mut driver.ram).unwrap().is_none());
        driver.describe(DESC, 3, 0x4000, 16, DESC_NEXT, 5);
        driver.describe(DESC, 5, 0x5000, 512, DESC_WRITE, 0);
        driver.offer(3);
        let chain = queue.pop(&mut driver.ram).unwrap().unwrap();
        let shape: Vec<_> = chain
            .buffers()
            .iter()
            .map(|b| (b.addr.as_u64(), b.writable))
            .collect();
        assert_eq!(shape, [(0x4000, false), (0x5000, true)]);
        queue.push(&mut driver.ram, &chain, 100).unwrap();
        assert!(queue.wants_interrupt(&mut driver.ram).unwrap());
        assert!(!queue.wants_interrupt(&mut driver.ram).unwrap());
        assert_eq!(
            driver.ram.0[USED as usize + 2..][..10],
            [1, 0, 3, 0, 0, 0, 100, 0, 0, 0]
        );
    }

    #[test]
    fn rules_that_a_driver_breaks_are_named() {
        type Break = fn(&mut Driver);
        let cases: [(Break, QueueError); 6] = [
            (|d| d.offer(8), QueueError::Descriptor(8)),
            (
                |d| {
                    d.describe(DESC, 0, 0x4000, 1, DESC_NEXT, 0);
                    d.offer(0);
                },
                QueueError::Chain,
            ),
            (
                |d| {
                    d.describe(DESC, 0, 0x4000, 24, DESC_INDIRECT, 0);
                    d.offer(0);
                },
                QueueError::Indirect(24),
            ),
            (
                |d| {
                    d.describe(DESC, 0, 0x4000, 16, DESC_INDIRECT, 0);
                    d.describe(0x4000, 0, 0x5000, 16, DESC_INDIRECT, 0);
                    d.offer(0);
                },
                QueueError::Indirect(16),
            ),
            (
                |d| {
                    d.describe(DESC, 0, 0x4000, 1, DESC_WRITE | DESC_NEXT, 1);
                    d.describe(DESC, 1, 0x4000, 1, 0, 0);
                    d.offer(0);
                },
                QueueError::Order,
            ),
            (
                |d| d.put(AVAIL + 2, &9u16.to_le_bytes()),
                QueueError::Overrun(9),
            ),
        ];
        for (break_it, want) in cases {
            let mut driver = Driver::new();
            break_it(&mut driver);
            let got = Driver::queue(false).pop(&mut driver.ram);
            assert_eq!(got.err(), Some(want));
        }
        let gpa = GuestPhysAddr::new;
        assert!(SplitQueue::new(0, gpa(0), gpa(0), gpa(0), false).is_err());
        assert!(SplitQueue::new(8, gpa(8), gpa(0), gpa(0), false).is_err());
    }

    #[test]
    fn with_event_index_only_the_asked_for_entry_interrupts() {
        let mut driver = Driver::new();
        let mut queue = Driver::queue(true);
        driver.put(AVAIL + 4 + 16, &1u16.to_le_bytes());
        let mut interrupts = Vec::new();
        for _ in 0..3 {
            driver.describe(DESC, 0, 0x4000, 1, 0, 0);
            driver.offer(0);
            let chain = queue.pop(&mut driver.ram).unwrap().unwrap();
            queue.push(&mut driver.ram, &chain, 0).unwrap();
            interrupts.push(queue.wants_interrupt(&mut driver.ram).unwrap());
        }
        assert_eq!(interrupts, [false, true, false]);
        queue.ask_for_notification(&mut driver.ram).unwrap();
        assert_eq!(driver.ram.0[USED as usize + 4 + 64], 3);
    }

    #[test]
    fn random_rings_never_panic() {
        let mut seed = 5u64;
        for _ in 0..5_000 {
            let mut driver = Driver::new();
            for _ in 0..200 {
                seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                let at = 0x1000 + (seed >> 33) % 0x2100;
                driver.put(at, &seed.to_le_bytes()[5..6]);
            }
            let mut queue = Driver::queue(seed & 1 << 40 != 0);
            for _ in 0..10 {
                let Ok(Some(chain)) = queue.pop(&mut driver.ram) else {
                    break;
                };
                let _ = queue.push(&mut driver.ram, &chain, 1);
                let _ = queue.wants_interrupt(&mut driver.ram);
            }
        }
    }
}
