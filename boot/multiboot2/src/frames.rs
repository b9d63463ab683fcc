//! Free memory, while the only list of what is occupied is our own.
//!
//! What we place (kernel, tables, stack, boot information) comes from one run
//! of frames, so that it is one region in the kernel's map: the largest free
//! stretch above 1 MiB and below 4 GiB, from its bottom up. Nothing of
//! unknown size is placed, so the largest stretch is always a good one.

use crate::MAPPED;
use bootloader_api::info::MemoryRegion;
use core::ops::Range;
use tessera_boot::{Error, Frames, PAGE, memory_map};

/// The kernel starts other processors from low memory: leave it that.
const LOW_MEMORY: u64 = 1 << 20;
/// More pieces than any firmware has.
const MAX_REGIONS: usize = 1024;

/// The stretch that is given out, and how far.
pub struct FreeMemory {
    stretch: Range<u64>,
    next: u64,
}

impl FreeMemory {
    /// Finds the stretch in the firmware's map `e820` around what is `occupied`.
    pub fn new(
        e820: impl Iterator<Item = MemoryRegion> + Clone,
        occupied: impl IntoIterator<Item = MemoryRegion, IntoIter: Clone>,
    ) -> Result<Self, Error> {
        let mut scratch = [MemoryRegion::empty(); MAX_REGIONS];
        let entries = e820.chain(occupied);
        let stretch = memory_map::largest_usable(entries, LOW_MEMORY, MAPPED, &mut scratch)?;
        Ok(Self {
            next: stretch.start,
            stretch,
        })
    }

    /// What was given out.
    pub fn taken(&self) -> Range<u64> {
        self.stretch.start..self.next
    }
}

impl Frames for FreeMemory {
    fn allocate(&mut self, pages: u64, what: &'static str) -> Result<u64, Error> {
        let bytes = pages.saturating_mul(PAGE);
        if bytes > self.stretch.end - self.next {
            return Err(Error::OutOfMemory { what, bytes });
        }
        let address = self.next;
        self.next += bytes;
        self.bytes(address, bytes as usize).fill(0);
        Ok(address)
    }

    fn bytes(&mut self, address: u64, len: usize) -> &mut [u8] {
        // SAFETY: only called for frames of `allocate`, which lie in free
        // memory that is identity mapped and nobody else's; the borrow of
        // `self` makes it one slice at a time.
        unsafe { core::slice::from_raw_parts_mut(address as *mut u8, len) }
    }
}
