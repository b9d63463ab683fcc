//! The one store of free frames, and the hypervisor's heap.

use crate::lock::Lock;
use arch::{FrameSource, HostPhysAddr, PAGE_SIZE, PAGE_SIZE_2M, PageSize};
use bootloader_api::info::{MemoryRegion, MemoryRegionKind};
use core::alloc::{GlobalAlloc, Layout};
use core::ptr::{NonNull, null_mut};
use hw::DirectMap;
use linked_list_allocator::Heap;
use memory::{FrameAllocator, FrameRange};

#[global_allocator]
static HEAP: SharedHeap = SharedHeap(Lock::new(Heap::empty()));
static FRAMES: Lock<Option<FrameAllocator>> = Lock::new(None);

/// The heap, for all cores.
struct SharedHeap(Lock<Heap>);

// SAFETY: blocks are the allocator's own, each given out once until it comes back.
unsafe impl GlobalAlloc for SharedHeap {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let block = self.0.lock().allocate_first_fit(layout);
        block.map_or(null_mut(), NonNull::as_ptr)
    }
    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        if let Some(block) = NonNull::new(block) {
            // SAFETY: the caller got the block from `alloc` with this layout.
            unsafe { self.0.lock().deallocate(block, layout) };
        }
    }
}

/// The first megabyte stays out: the firmware's leftovers and the start-up code of other cores
/// live there.
const LOWEST: u64 = 1 << 20;
/// The heap at the least: the log, the configuration, VMs and their devices.
const HEAP_BASE: u64 = 3 << 20;
/// What [`FrameAllocator`] needs for each 2 MiB, rounded up.
const HEAP_PER_BLOCK: u64 = 96;

/// A handle to the store: every VM's tables take their frames through one.
#[derive(Clone, Copy, Debug)]
pub struct Frames;

impl FrameSource for Frames {
    fn allocate(&mut self, size: PageSize) -> Option<HostPhysAddr> {
        FRAMES.lock().as_mut()?.allocate(size)
    }
    fn free(&mut self, frame: HostPhysAddr, size: PageSize) {
        if let Some(frames) = FRAMES.lock().as_mut() {
            frames.free(frame, size);
        }
    }
}

/// Bytes of RAM that no one holds.
pub fn free_bytes() -> u64 {
    FRAMES.lock().as_ref().map_or(0, FrameAllocator::free_bytes)
}

/// Bytes of RAM that were there to be handed out.
pub fn total_bytes() -> u64 {
    FRAMES
        .lock()
        .as_ref()
        .map_or(0, FrameAllocator::total_bytes)
}

/// Bytes that the heap has handed out.
pub fn heap_used() -> usize {
    HEAP.0.lock().used()
}

/// Bytes of the heap.
pub fn heap_size() -> usize {
    HEAP.0.lock().size()
}

/// The lowest free pages that follow one another below 1 MiB, where a core starts in real mode.
/// The first 32 KiB are left to the firmware's data, whatever its memory map says.
pub fn low_pages(regions: &[MemoryRegion], count: u64) -> Option<HostPhysAddr> {
    const FIRST: u64 = 0x8000;
    let usable = regions
        .iter()
        .filter(|region| region.kind == MemoryRegionKind::Usable);
    usable
        .map(|region| {
            let start = region.start.max(FIRST).next_multiple_of(PAGE_SIZE);
            (start, region.end.min(LOWEST))
        })
        .find(|(start, end)| start + count * PAGE_SIZE <= *end)
        .map(|(start, _)| HostPhysAddr::new(start))
}

/// Why there is no memory to begin with.
#[derive(Clone, Copy, Debug)]
pub struct NoMemory {
    /// What was needed, in bytes.
    pub needed: u64,
    /// The largest free region, in bytes.
    pub largest: u64,
}

/// What is left of a usable region for the hypervisor to hand out.
fn usable(region: &MemoryRegion, map: DirectMap) -> Option<(u64, u64)> {
    let start = region
        .start
        .max(LOWEST)
        .checked_next_multiple_of(PAGE_SIZE)?;
    let end = region.end.min(map.limit()) & !(PAGE_SIZE - 1);
    (region.kind == MemoryRegionKind::Usable && start < end).then_some((start, end))
}

/// Sets up the heap, then the store of frames, from the loader's memory map.
///
/// # Safety
/// Called once; the map's usable regions are nobody's.
pub unsafe fn init(regions: &[MemoryRegion], map: DirectMap) -> Result<u64, NoMemory> {
    let all = || regions.iter().filter_map(|region| usable(region, map));
    let total: u64 = all().map(|(start, end)| end - start).sum();
    let needed = (HEAP_BASE + total / PAGE_SIZE_2M * HEAP_PER_BLOCK).next_multiple_of(PAGE_SIZE);
    let (start, end) = all()
        .max_by_key(|(start, end)| end - start)
        .unwrap_or((0, 0));
    let failure = NoMemory {
        needed,
        largest: end - start,
    };
    if end - start < needed {
        return Err(failure);
    }
    // The heap takes the top of the largest region, so that large frames below stay whole.
    let heap = end - needed;
    let pointer = map
        .pointer(HostPhysAddr::new(heap), needed)
        .ok_or(failure)?;
    // SAFETY: usable RAM that the direct map reaches, and from here on the heap's alone.
    unsafe { HEAP.0.lock().init(pointer, needed as usize) };
    let ranges: alloc::vec::Vec<FrameRange> = all()
        .map(|(first, last)| FrameRange {
            start: HostPhysAddr::new(first),
            end: HostPhysAddr::new(if last == end { heap } else { last }),
        })
        .collect();
    let frames = FrameAllocator::new(&ranges);
    let bytes = frames.total_bytes();
    *FRAMES.lock() = Some(frames);
    Ok(bytes)
}
