//! What a virtio device is to its transport (virtio 1.2 §2).

use arch::{GuestMemory, Nanos};
use serde::{Deserialize, Serialize};

use crate::queue::Queue;

/// Feature bits of queues and transport (virtio 1.2 §6).
pub mod features {
    /// Indirect descriptors.
    pub const RING_INDIRECT_DESC: u64 = 1 << 28;
    /// Notifications are asked for by place in the ring.
    pub const RING_EVENT_IDX: u64 = 1 << 29;
    /// Complies with version 1.
    pub const VERSION_1: u64 = 1 << 32;
    /// Packed rings.
    pub const RING_PACKED: u64 = 1 << 34;
    /// Chains are given back in the order in which they were made available.
    pub const IN_ORDER: u64 = 1 << 35;
    /// A queue can be reset by itself.
    pub const RING_RESET: u64 = 1 << 40;
    /// What the transport and the queues do for every device.
    pub const ALL: u64 =
        RING_INDIRECT_DESC | RING_EVENT_IDX | VERSION_1 | RING_PACKED | IN_ORDER | RING_RESET;
}

/// What a device wants its driver to hear of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Signals {
    /// A bit for each queue whose driver wants an interrupt.
    pub queues: u64,
    /// The configuration space changed.
    pub config: bool,
    /// The driver broke the rules: the device stands until it is reset.
    pub broken: bool,
}

/// The most queues a device can have.
pub const MAX_QUEUES: u16 = 64;

/// A device behind a transport.
///
/// The transport negotiates features, and gives the device its queues when the driver is ready
/// ([`Device::start`], then [`Device::attach`] for each). A doorbell only marks its queue; the work
/// is done in [`Device::serve`], where guest memory can be reached.
pub trait Device: Send {
    /// Device type (§5): 1 is a network card.
    fn kind(&self) -> u16;
    /// PCI class, subclass and interface (24 bits).
    fn class(&self) -> u32;
    /// Features of its own kind, besides [`features::ALL`].
    fn features(&self) -> u64;
    /// Whether these, a subset of what is offered, go together.
    fn accepts(&self, _features: u64) -> bool {
        true
    }
    /// How many queues it has, at most [`MAX_QUEUES`].
    fn queues(&self) -> u16;
    /// The largest size of queue `index`, a power of two.
    fn queue_size(&self, index: u16) -> u16;
    /// Bytes of its configuration space.
    fn config_size(&self) -> u32;
    /// Copies from its configuration space, all within [`Device::config_size`].
    fn read_config(&mut self, offset: u32, buf: &mut [u8]);
    /// The driver writes its configuration space, all within [`Device::config_size`].
    fn write_config(&mut self, _offset: u32, _data: &[u8]) {}
    /// The driver is ready, with these features.
    fn start(&mut self, features: u64);
    /// Queue `index` can be used from now on.
    fn attach(&mut self, index: u16, queue: Queue);
    /// Queue `index` is taken away, with whatever waits in it.
    fn detach(&mut self, index: u16);
    /// Back to how it was before [`Device::start`], without queues.
    fn reset(&mut self);
    /// Whether the device may reach memory from now on. The transport itself asks for service only
    /// then; this is for a device that others serve as well.
    fn set_master(&mut self, _on: bool) {}
    /// There may be something new in queue `index`.
    fn notify(&mut self, index: u16);
    /// Whether [`Device::serve`] has something to do.
    fn wants_service(&self) -> bool;
    /// Does a bounded amount of what there is to do.
    fn serve(&mut self, mem: &mut dyn GuestMemory, now: Nanos);
    /// What the driver is to hear of since the last call.
    fn take_signals(&mut self) -> Signals;
    /// Whether [`Device::take_output`] has something.
    fn has_output(&self) -> bool {
        false
    }
    /// Hands what a console printed to `print`, in pieces, and says whether there was anything.
    fn take_output(&mut self, _print: &mut dyn FnMut(&[u8])) -> bool {
        false
    }
    /// Types at a console; gives how many bytes it took, `None` if it is none.
    fn push_input(&mut self, _bytes: &[u8]) -> Option<usize> {
        None
    }
}
