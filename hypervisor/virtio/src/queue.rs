//! A virtqueue in whichever format was negotiated (virtio 1.2 §2.6).

use arch::{GuestMemory, GuestPhysAddr};
use serde::{Deserialize, Serialize};

use crate::chain::{Chain, QueueError, Token};
use crate::features;
use crate::packed::PackedQueue;
use crate::split::SplitQueue;

/// The largest queue (§2.7, §2.8.10.1).
pub const MAX_SIZE: u16 = 32768;

/// Where the driver put a queue's three parts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueLayout {
    /// Entries.
    pub size: u16,
    /// Split: the descriptor table. Packed: the descriptor ring.
    pub descriptors: GuestPhysAddr,
    /// Split: the available ring. Packed: the driver's event suppression structure.
    pub driver: GuestPhysAddr,
    /// Split: the used ring. Packed: the device's event suppression structure.
    pub device: GuestPhysAddr,
}

/// How far a queue had been taken from: see [`Queue::rewind`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Position {
    pub(crate) next: u16,
    pub(crate) wrap: bool,
}

/// A virtqueue, seen from the device. All of its state, for saving.
///
/// Chains are to be given back in the order in which they were taken, so that VIRTIO_F_IN_ORDER
/// holds by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Queue {
    /// Split rings (§2.7).
    Split(SplitQueue),
    /// A packed ring (§2.8).
    Packed(PackedQueue),
}

impl Queue {
    /// A queue at these places, with what of [`features`] was negotiated.
    ///
    /// # Errors
    /// The size or an alignment is wrong.
    pub fn new(layout: QueueLayout, negotiated: u64) -> Result<Self, QueueError> {
        if negotiated & features::RING_PACKED != 0 {
            PackedQueue::new(layout, negotiated).map(Self::Packed)
        } else {
            SplitQueue::new(layout, negotiated).map(Self::Split)
        }
    }

    /// Takes the next chain into `chain`; `false`: there is none.
    ///
    /// # Errors
    /// The driver broke the rules; the device needs a reset.
    #[inline]
    pub fn pop(
        &mut self,
        mem: &mut dyn GuestMemory,
        chain: &mut Chain,
    ) -> Result<bool, QueueError> {
        match self {
            Self::Split(queue) => queue.pop(mem, chain),
            Self::Packed(queue) => queue.pop(mem, chain),
        }
    }

    /// Whether [`Queue::pop`] would find one.
    ///
    /// # Errors
    /// A ring has no memory behind it.
    pub fn has_next(&self, mem: &mut dyn GuestMemory) -> Result<bool, QueueError> {
        match self {
            Self::Split(queue) => Ok(queue.waiting(mem)? != 0),
            Self::Packed(queue) => Ok(queue.waiting(mem)?.is_some()),
        }
    }

    /// How far the queue has been taken from.
    #[must_use]
    pub const fn position(&self) -> Position {
        match self {
            Self::Split(queue) => queue.position(),
            Self::Packed(queue) => queue.position(),
        }
    }

    /// Puts back what was taken since `position`, of which nothing was given back.
    pub const fn rewind(&mut self, position: Position) {
        match self {
            Self::Split(queue) => queue.rewind(position),
            Self::Packed(queue) => queue.rewind(position),
        }
    }

    /// Gives a chain back, of whose writable part the device wrote the first `written` bytes.
    ///
    /// # Errors
    /// A ring has no memory behind it.
    pub fn push(
        &mut self,
        mem: &mut dyn GuestMemory,
        token: Token,
        written: u32,
    ) -> Result<(), QueueError> {
        self.stage(mem, token, written)?;
        self.publish(mem)
    }

    /// As [`Queue::push`], but the driver sees it at the next [`Queue::publish`] and not before,
    /// together with all others that were staged.
    ///
    /// # Errors
    /// A ring has no memory behind it.
    #[inline]
    pub fn stage(
        &mut self,
        mem: &mut dyn GuestMemory,
        token: Token,
        written: u32,
    ) -> Result<(), QueueError> {
        match self {
            Self::Split(queue) => queue.stage(mem, token, written),
            Self::Packed(queue) => queue.stage(mem, token, written),
        }
    }

    /// Shows the driver what was staged.
    ///
    /// # Errors
    /// A ring has no memory behind it.
    pub fn publish(&mut self, mem: &mut dyn GuestMemory) -> Result<(), QueueError> {
        match self {
            Self::Split(queue) => queue.publish(mem),
            Self::Packed(queue) => queue.publish(mem),
        }
    }

    /// Whether the driver wants an interrupt for what was published since the last call (§2.7.7,
    /// §2.8.10).
    ///
    /// # Errors
    /// A ring has no memory behind it.
    pub fn wants_interrupt(&mut self, mem: &mut dyn GuestMemory) -> Result<bool, QueueError> {
        match self {
            Self::Split(queue) => queue.wants_interrupt(mem),
            Self::Packed(queue) => queue.wants_interrupt(mem),
        }
    }

    /// Asks the driver to notify when the next chain is there, or not to (§2.7.10, §2.8.10.1).
    /// After `true`, look once more: one may have come in between.
    ///
    /// # Errors
    /// A ring has no memory behind it.
    pub fn ask_for_notification(
        &mut self,
        mem: &mut dyn GuestMemory,
        on: bool,
    ) -> Result<(), QueueError> {
        match self {
            Self::Split(queue) => queue.ask_for_notification(mem, on),
            Self::Packed(queue) => queue.ask_for_notification(mem, on),
        }
    }
}
