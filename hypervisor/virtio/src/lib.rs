//! virtio on the device's side (virtio 1.2). So far it has the split virtqueue; the devices and
//! their PCI transport build on it.
#![cfg_attr(not(test), no_std)]
#![forbid(unsafe_code)]

mod split;

pub use split::{Buffer, Chain, QueueError, SplitQueue, SplitQueueState};
