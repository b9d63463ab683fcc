//! Free memory, while the only list of what is occupied is our own.
//!
//! What we place (kernel, tables, stack, boot information) comes from one run
//! of frames, so that it is one region in the kernel's map: the largest free
//! stretch above 1 MiB and below 4 GiB, from its bottom up. Nothing of
//! unknown size is placed, so the largest stretch is always a good one.

use crate::MAPPED;
use bootloader_api::info::{MemoryRegion, MemoryRegionKind};
use tessera_boot::{Error, Frames, PAGE, memory_map};

/// The kernel starts other processors from low memory: leave it that.
const LOW_MEMORY: u64 = 1 << 20;
/// More pieces than any firmware has.
const MAX_REGIONS: usize = 1024;

/// Physical addresses from `start` to before `end`.
#[derive(Clone, Copy, Debug)]
pub struct Span {
    pub start: u64,
    pub end: u64,
}

/// The stretch that is given out, and how far.
pub struct FreeMemory {
    stretch: Span,
    next: u64,
}

impl FreeMemory {
    /// Finds the stretch in the firmware's map `e820` around what is `occupied`.
    pub fn new<const N: usize>(
        e820: impl Iterator<Item = MemoryRegion> + Clone,
        occupied: [Span; N],
    ) -> Result<Self, Error> {
        let occupied = occupied.into_iter().map(|span| MemoryRegion {
            start: span.start,
            end: span.end,
            kind: MemoryRegionKind::Bootloader,
        });
        let mut regions = [MemoryRegion::empty(); MAX_REGIONS];
        let len = memory_map::normalise(e820.chain(occupied), MAPPED, &mut regions)?;
        let stretch = regions
            .iter()
            .take(len)
            .filter(|region| region.kind == MemoryRegionKind::Usable)
            .map(|region| Span {
                start: region.start.max(LOW_MEMORY),
                end: region.end,
            })
            .filter(|span| span.start < span.end)
            .max_by_key(|span| span.end - span.start)
            .ok_or(Error::NoMemory)?;
        Ok(Self {
            stretch,
            next: stretch.start,
        })
    }

    /// What was given out.
    pub fn taken(&self) -> Span {
        Span {
            start: self.stretch.start,
            end: self.next,
        }
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
