//! The split virtqueue (virtio 1.2 §2.7), with indirect descriptors and EVENT_IDX.
//!
//! The driver writes the descriptor table and the available ring, the device the used ring. All of
//! it is guest memory: each value is read once and checked, an index never leaves its ring, and a
//! chain is at most as long as the queue, so that a loop of descriptors ends in an error.

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
        })
    }

    fn slot(&self, index: u16) -> u64 {
        (index & self.layout.size.wrapping_sub(1)).into()
    }

    /// How many chains are available.
    pub(crate) fn waiting(&self, mem: &mut dyn GuestMemory) -> Result<u16, QueueError> {
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
        if self.waiting(mem)? == 0 {
            return Ok(false);
        }
        let available = self.layout.driver;
        // The entry is read after the index that tells of it (§2.7.13.1).
        fence(Ordering::Acquire);
        let slot = self.slot(self.next_available);
        let head = u16::from_le_bytes(read(mem, at(available, 4 + 2 * slot)?)?);
        chain.clear();
        chain.token.id = head;
        self.walk(mem, head, chain)?;
        self.next_available = self.next_available.wrapping_add(1);
        Ok(true)
    }

    /// Follows a chain. Each step takes a place in `chain` or, once, goes to the indirect table.
    fn walk(
        &self,
        mem: &mut dyn GuestMemory,
        head: u16,
        chain: &mut Chain,
    ) -> Result<(), QueueError> {
        let (mut table, mut entries) = (self.layout.descriptors, self.layout.size);
        let (mut number, mut steps, mut nested) = (head, 0, false);
        loop {
            if number >= entries {
                return Err(QueueError::Descriptor(number));
            }
            let found = Descriptor::read(mem, at(table, 16 * u64::from(number))?)?;
            let (flags, next) = (found.third, found.fourth);
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
                continue;
            }
            chain.append(found.addr, found.length, flags)?;
            if flags & DESC_NEXT == 0 {
                return Ok(());
            }
            steps += 1;
            if steps >= entries {
                return Err(QueueError::Chain);
            }
            number = next;
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
    }

    pub(crate) fn stage(
        &mut self,
        mem: &mut dyn GuestMemory,
        token: Token,
        written: u32,
    ) -> Result<(), QueueError> {
        let element = u64::from(written) << 32 | u64::from(token.id);
        let slot = at(self.layout.device, 4 + 8 * self.slot(self.next_used))?;
        mem.write(slot, &element.to_le_bytes()).map_err(ring)?;
        self.next_used = self.next_used.wrapping_add(1);
        Ok(())
    }

    pub(crate) fn publish(&mut self, mem: &mut dyn GuestMemory) -> Result<(), QueueError> {
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
