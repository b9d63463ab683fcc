//! The split virtqueue (virtio 1.2 §2.7), with indirect descriptors and EVENT_IDX.
//!
//! The driver writes the descriptor table and the available ring, the device the used ring. All of
//! it is guest memory: each value is read once and checked, an index never leaves its ring, and a
//! chain is at most as long as the queue, so that a loop of descriptors ends in an error.
//!
//! Reaching guest memory is what costs: the available index is read when all that it told of is
//! taken, entries of the available ring a line of the cache at once, descriptors together as long as
//! heads follow each other, and used elements are written together.

use core::sync::atomic::{Ordering, fence};

use arch::{GuestMemory, GuestPhysAddr};
use serde::{Deserialize, Serialize};

use crate::chain::{
    Chain, DESC_INDIRECT, DESC_NEXT, Descriptor, QueueError, Token, at, indirect_count, read, ring,
};
use crate::features;
use crate::queue::{MAX_SIZE, Position, QueueLayout};

const AVAIL_NO_INTERRUPT: u16 = 1;
const USED_NO_NOTIFY: u16 = 1;

/// Entries of the available ring that are read at once.
const AHEAD: usize = 16;
/// Descriptors that are read at once.
const HEADS: usize = 4;
/// Used elements that are written at once.
const STAGED: usize = 8;

/// What was read of the available ring before it was needed. Nothing is lost if this is.
#[derive(Clone, Copy, Debug, Default)]
struct Ahead {
    /// Chains that are available beyond those taken, as far as is known.
    known: u16,
    /// The entries from this one on, ...
    first: u16,
    /// ... so many.
    count: u16,
    entries: [u16; AHEAD],
    /// The first descriptors of as many chains from entry `from` on: what the driver has made
    /// available it does not change.
    heads: [Descriptor; HEADS],
    from: u16,
    read: u16,
}

impl PartialEq for Ahead {
    /// Two queues that differ in nothing else are equal.
    fn eq(&self, _: &Self) -> bool {
        true
    }
}

impl Eq for Ahead {}

impl Ahead {
    fn get(&self, index: u16) -> Option<u16> {
        let place = index.wrapping_sub(self.first);
        let entry = self.entries.get(usize::from(place));
        entry.filter(|_| place < self.count).copied()
    }

    #[inline]
    fn head(&self, index: u16) -> Option<Descriptor> {
        let place = index.wrapping_sub(self.from);
        let head = self.heads.get(usize::from(place));
        head.filter(|_| place < self.read).copied()
    }

    /// How many entries from `index` on, [`HEADS`] at most, name descriptors that follow each other.
    fn run(&self, index: u16, head: u16) -> usize {
        let follows = |&n: &u16| self.get(index.wrapping_add(n)) == head.checked_add(n);
        (1..HEADS as u16).take_while(follows).count() + 1
    }
}

/// A split virtqueue, as the driver set it up and as far as the device has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SplitQueue {
    layout: QueueLayout,
    indirect: bool,
    event_index: bool,
    next_available: u16,
    /// Where the next entry of the used ring goes.
    next_used: u16,
    /// The used index as it was when the driver was last interrupted, or might have been.
    signalled: u16,
    /// The last elements before `next_used` that are not in the used ring yet, ...
    staged: [u64; STAGED],
    /// ... so many.
    unwritten: u8,
    #[serde(skip)]
    ahead: Ahead,
}

impl SplitQueue {
    pub(crate) fn new(layout: QueueLayout, negotiated: u64) -> Result<Self, QueueError> {
        if !layout.size.is_power_of_two() || layout.size > MAX_SIZE {
            return Err(QueueError::Size(layout.size));
        }
        for (addr, align) in [
            (layout.descriptors, 16),
            (layout.driver, 2),
            (layout.device, 4),
        ] {
            if !addr.is_aligned(align) {
                return Err(QueueError::Ring(addr));
            }
        }
        Ok(Self {
            layout,
            indirect: negotiated & features::RING_INDIRECT_DESC != 0,
            event_index: negotiated & features::RING_EVENT_IDX != 0,
            next_available: 0,
            next_used: 0,
            signalled: 0,
            staged: [0; STAGED],
            unwritten: 0,
            ahead: Ahead::default(),
        })
    }

    fn slot(&self, index: u16) -> u64 {
        (index & self.layout.size.wrapping_sub(1)).into()
    }

    /// How many chains are available, at least: the index is read again when it told of none.
    pub(crate) fn waiting(&self, mem: &mut dyn GuestMemory) -> Result<u16, QueueError> {
        if self.ahead.known != 0 {
            return Ok(self.ahead.known);
        }
        let index = u16::from_le_bytes(read(mem, at(self.layout.driver, 2)?)?);
        let waiting = index.wrapping_sub(self.next_available);
        if waiting > self.layout.size {
            return Err(QueueError::Overrun(waiting));
        }
        Ok(waiting)
    }

    pub(crate) fn pop(
        &mut self,
        mem: &mut dyn GuestMemory,
        chain: &mut Chain,
    ) -> Result<bool, QueueError> {
        let waiting = self.waiting(mem)?;
        if waiting == 0 {
            return Ok(false);
        }
        let next = self.next_available;
        self.ahead.known = waiting;
        let head = match self.ahead.get(next) {
            Some(head) => head,
            None => self.read_ahead(mem, waiting)?,
        };
        let token = Token {
            id: head,
            places: 0,
        };
        let first = match self.ahead.head(next) {
            Some(first) => first,
            None => self.read_heads(mem, next, head)?,
        };
        if first.third & (DESC_INDIRECT | DESC_NEXT) == 0 {
            chain.single(token, first.addr, first.length, first.third);
        } else {
            chain.clear();
            chain.token = token;
            self.walk(mem, first, chain)?;
        }
        self.next_available = next.wrapping_add(1);
        self.ahead.known = waiting - 1;
        Ok(true)
    }

    /// Reads the next entries of the available ring, of which so many wait; gives the first.
    fn read_ahead(&mut self, mem: &mut dyn GuestMemory, waiting: u16) -> Result<u16, QueueError> {
        // The entries are read after the index that tells of them (§2.7.13.1).
        fence(Ordering::Acquire);
        let slot = self.slot(self.next_available);
        let to_end = u64::from(self.layout.size) - slot;
        // Up to where a line of the cache ends, most of the time.
        let count = u64::from(waiting)
            .min(to_end)
            .min(AHEAD as u64 - slot % AHEAD as u64);
        let mut bytes = [0; 2 * AHEAD];
        let bytes = bytes.get_mut(..2 * count as usize).unwrap_or_default();
        mem.read(at(self.layout.driver, 4 + 2 * slot)?, bytes)
            .map_err(ring)?;
        let (pairs, _) = bytes.as_chunks();
        for (to, from) in self.ahead.entries.iter_mut().zip(pairs) {
            *to = u16::from_le_bytes(*from);
        }
        (self.ahead.first, self.ahead.count) = (self.next_available, count as u16);
        let [first, ..] = self.ahead.entries;
        Ok(first)
    }

    /// Reads the first descriptor of entry `index`, which is `head`, and those of the entries behind
    /// it that follow.
    fn read_heads(
        &mut self,
        mem: &mut dyn GuestMemory,
        index: u16,
        head: u16,
    ) -> Result<Descriptor, QueueError> {
        let Some(room) = self.layout.size.checked_sub(head).filter(|&room| room > 0) else {
            return Err(QueueError::Descriptor(head));
        };
        let count = self.ahead.run(index, head).min(room.into());
        let mut bytes = [0; 16 * HEADS];
        let bytes = bytes.get_mut(..16 * count).unwrap_or_default();
        let place = at(self.layout.descriptors, 16 * u64::from(head))?;
        mem.read(place, bytes).map_err(ring)?;
        let (read, _) = bytes.as_chunks();
        for (to, from) in self.ahead.heads.iter_mut().zip(read) {
            *to = Descriptor::parse(from);
        }
        (self.ahead.from, self.ahead.read) = (index, count as u16);
        let [first, ..] = self.ahead.heads;
        Ok(first)
    }

    #[inline]
    fn descriptor(
        mem: &mut dyn GuestMemory,
        table: GuestPhysAddr,
        number: u16,
        entries: u16,
    ) -> Result<Descriptor, QueueError> {
        if number >= entries {
            return Err(QueueError::Descriptor(number));
        }
        Descriptor::read(mem, at(table, 16 * u64::from(number))?)
    }

    /// Follows a chain from its first descriptor. Each step takes a place in `chain` or, once, goes
    /// to the indirect table.
    #[inline(never)]
    fn walk(
        &self,
        mem: &mut dyn GuestMemory,
        mut found: Descriptor,
        chain: &mut Chain,
    ) -> Result<(), QueueError> {
        let (mut table, mut entries) = (self.layout.descriptors, self.layout.size);
        let (mut steps, mut nested) = (0, false);
        loop {
            let (flags, mut number) = (found.third, found.fourth);
            if flags & DESC_INDIRECT != 0 {
                if !self.indirect || nested || flags & DESC_NEXT != 0 {
                    return Err(QueueError::Indirect(found.length));
                }
                // Its WRITE flag says nothing (§2.7.5.3.2).
                (table, entries) = (
                    GuestPhysAddr::new(found.addr),
                    indirect_count(found.length)?,
                );
                (number, steps, nested) = (0, 0, true);
            } else {
                chain.append(found.addr, found.length, flags)?;
                if flags & DESC_NEXT == 0 {
                    return Ok(());
                }
                steps += 1;
                if steps >= entries {
                    return Err(QueueError::Chain);
                }
            }
            found = Self::descriptor(mem, table, number, entries)?;
        }
    }

    pub(crate) const fn position(&self) -> Position {
        Position {
            next: self.next_available,
            wrap: false,
        }
    }

    pub(crate) const fn rewind(&mut self, position: Position) {
        self.next_available = position.next;
        // The index is read again.
        self.ahead.known = 0;
    }

    pub(crate) fn stage(
        &mut self,
        mem: &mut dyn GuestMemory,
        token: Token,
        written: u32,
    ) -> Result<(), QueueError> {
        let element = u64::from(written) << 32 | u64::from(token.id);
        // What is written at once does not go around the ring's end.
        let slot = self.slot(self.next_used);
        if slot == 0 || usize::from(self.unwritten) >= STAGED {
            self.write_staged(mem)?;
        }
        if let Some(place) = self.staged.get_mut(usize::from(self.unwritten)) {
            *place = element;
        }
        self.unwritten += 1;
        self.next_used = self.next_used.wrapping_add(1);
        Ok(())
    }

    /// Writes the elements that are not in the used ring yet.
    fn write_staged(&mut self, mem: &mut dyn GuestMemory) -> Result<(), QueueError> {
        let count = u16::from(core::mem::take(&mut self.unwritten));
        if count == 0 {
            return Ok(());
        }
        let slot = self.slot(self.next_used.wrapping_sub(count));
        let mut bytes = [0; 8 * STAGED];
        let (places, _) = bytes.as_chunks_mut();
        for (to, from) in places.iter_mut().zip(self.staged) {
            *to = from.to_le_bytes();
        }
        let bytes = bytes.get(..8 * usize::from(count)).unwrap_or_default();
        mem.write(at(self.layout.device, 4 + 8 * slot)?, bytes)
            .map_err(ring)
    }

    pub(crate) fn publish(&mut self, mem: &mut dyn GuestMemory) -> Result<(), QueueError> {
        self.write_staged(mem)?;
        // What the driver changes though it must not is seen by the next batch.
        self.ahead.read = 0;
        // The index after the elements (§2.7.8.2).
        fence(Ordering::Release);
        mem.write(at(self.layout.device, 2)?, &self.next_used.to_le_bytes())
            .map_err(ring)
    }

    pub(crate) fn wants_interrupt(
        &mut self,
        mem: &mut dyn GuestMemory,
    ) -> Result<bool, QueueError> {
        let (old, new) = (self.signalled, self.next_used);
        if old == new {
            return Ok(false);
        }
        self.signalled = new;
        // What was published must be seen before the driver's wish is read: it writes its wish
        // and then looks at what was published.
        fence(Ordering::SeqCst);
        let available = self.layout.driver;
        if !self.event_index {
            let flags = u16::from_le_bytes(read(mem, available)?);
            return Ok(flags & AVAIL_NO_INTERRUPT == 0);
        }
        let event = at(available, 4 + 2 * u64::from(self.layout.size))?;
        let event = u16::from_le_bytes(read(mem, event)?);
        Ok(new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old))
    }

    pub(crate) fn ask_for_notification(
        &mut self,
        mem: &mut dyn GuestMemory,
        on: bool,
    ) -> Result<(), QueueError> {
        let used = self.layout.device;
        let (place, value) = match (self.event_index, on) {
            (true, true) => (4 + 8 * u64::from(self.layout.size), self.next_available),
            // The entry asked for last is passed already.
            (true, false) => return Ok(()),
            (false, on) => (0, u16::from(!on) * USED_NO_NOTIFY),
        };
        mem.write(at(used, place)?, &value.to_le_bytes())
            .map_err(ring)?;
        // The next look at the ring comes after the driver can see this.
        fence(Ordering::SeqCst);
        Ok(())
    }

    /// As if this many chains had gone through.
    #[cfg(test)]
    pub(crate) const fn start_at(&mut self, index: u16) {
        (self.next_available, self.next_used, self.signalled) = (index, index, index);
    }
}
