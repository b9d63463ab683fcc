//! virtio on the device's side (virtio 1.2): queues in both formats, devices as plain structs, and
//! their PCI transport.
//!
//! Everything in guest memory may change at any moment and may be wrong: each field is read once
//! and checked, work per call is bounded, and a driver that breaks the rules gets a device that
//! needs a reset.
#![cfg_attr(not(test), no_std)]
#![forbid(unsafe_code)]

extern crate alloc;

mod chain;
pub mod console;
mod device;
pub mod net;
#[cfg(test)]
mod oracle;
mod packed;
pub mod pci;
mod queue;
#[cfg(test)]
mod requirements;
pub mod rng;
mod split;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;

pub use chain::{Buffer, Chain, MAX_CHAIN, QueueError, Token};
pub use device::{Device, MAX_QUEUES, Signals, features};
pub use packed::PackedQueue;
pub use queue::{MAX_SIZE, Position, Queue, QueueLayout};
pub use split::SplitQueue;
