//! Frames, nested page tables and guest address spaces.
//!
//! A guest's RAM exists as a promise until it is touched: [`AddressSpace`] knows which
//! guest-physical ranges are RAM, and gives a range its zeroed frame on the first access, by the
//! guest (a nested page fault) or by software on its behalf (a device, a loader). Everything is
//! generic over the two walls [`arch::PhysMemory`] and [`arch::FrameSource`], so the very code
//! that builds tables for hardware is tested on the host against plain vectors.
#![cfg_attr(not(test), no_std)]
#![forbid(unsafe_code)]

extern crate alloc;

mod frames;
mod nested;
mod space;

pub use frames::{FrameAllocator, FrameRange};
pub use nested::{CacheType, Format, Leaf, MapError, NestedTables, Rights};
pub use space::{AddressSpace, FaultOutcome, Region, RegionError, RegionKind};

#[cfg(test)]
mod testing;
