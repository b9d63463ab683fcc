//! The machine's free frames.
//!
//! Memory is kept in blocks of 2 MiB, each with a bitmap of its 512 base frames. A block is on one
//! of two lists, `whole` (all free) or `partial` (some free), or on none (all taken), so that
//! taking and giving back a base frame or a 2 MiB frame is a constant number of steps, and a block
//! is whole again the moment its last frame comes home. A 1 GiB frame is found by a scan.
//! The cost is 80 bytes of bookkeeping for each 2 MiB.

use alloc::vec::Vec;
use arch::{FrameSource, HostPhysAddr, PAGE_SIZE, PAGE_SIZE_1G, PAGE_SIZE_2M, PageSize};

const FRAMES_PER_BLOCK: u16 = (PAGE_SIZE_2M / PAGE_SIZE) as u16;
const BLOCKS_PER_GIB: u64 = PAGE_SIZE_1G / PAGE_SIZE_2M;
const NONE: u32 = u32::MAX;

/// A range of host-physical memory, `start` included, `end` not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FrameRange {
    /// First byte.
    pub start: HostPhysAddr,
    /// One past the last byte.
    pub end: HostPhysAddr,
}

impl FrameRange {
    /// The part of the range that is whole frames of `size` bytes, if there is any.
    fn inner(self, size: u64) -> Option<(u64, u64)> {
        let start = self.start.as_u64().checked_next_multiple_of(size)?;
        let end = self.end.align_down(size).as_u64();
        (start < end).then_some((start, end))
    }
}

/// One 2 MiB block; a set bit is a free frame.
struct Block {
    bitmap: [u64; 8],
    free: u16,
    next: u32,
    previous: u32,
}

/// A run of consecutive blocks, `blocks[first..first + count]`.
struct Span {
    base: u64,
    count: u32,
    first: u32,
}

#[derive(Clone, Copy, PartialEq)]
enum List {
    Whole,
    Partial,
}

/// All frames that the hypervisor may hand out.
pub struct FrameAllocator {
    spans: Vec<Span>,
    blocks: Vec<Block>,
    whole: u32,
    partial: u32,
    free_frames: u64,
    total_frames: u64,
}

impl FrameAllocator {
    /// Takes over `ranges`, which must be sorted and must not overlap; a range that breaks this
    /// rule is left out. Partial frames at the ends are left out too.
    #[must_use]
    pub fn new(ranges: &[FrameRange]) -> Self {
        let mut this = Self {
            spans: Vec::new(),
            blocks: Vec::new(),
            whole: NONE,
            partial: NONE,
            free_frames: 0,
            total_frames: 0,
        };
        let mut done = 0;
        for range in ranges {
            let Some((start, end)) = range.inner(PAGE_SIZE) else {
                continue;
            };
            if start < done {
                continue;
            }
            done = end;
            this.add_blocks(start & !(PAGE_SIZE_2M - 1), end);
            for frame in (start..end).step_by(PAGE_SIZE as usize) {
                // A whole block at once where possible: a large machine has many.
                if let Some((index, bit)) = this.locate(HostPhysAddr::new(frame)) {
                    let block = &mut this.blocks[index];
                    block.bitmap[usize::from(bit / 64)] |= 1 << (bit % 64);
                    block.free += 1;
                    this.free_frames += 1;
                }
            }
        }
        this.total_frames = this.free_frames;
        for index in (0..this.blocks.len()).rev() {
            this.link(index);
        }
        this
    }

    /// Makes sure that blocks exist for all of `start..end`; `start` is block aligned.
    fn add_blocks(&mut self, start: u64, end: u64) {
        let mut base = start;
        if let Some(last) = self.spans.last() {
            base = base.max(last.base + u64::from(last.count) * PAGE_SIZE_2M);
        }
        if base >= end {
            return;
        }
        let count = (end - base).div_ceil(PAGE_SIZE_2M);
        let (Ok(count), Ok(first)) = (u32::try_from(count), u32::try_from(self.blocks.len()))
        else {
            return;
        };
        self.spans.push(Span { base, count, first });
        self.blocks.extend((0..count).map(|_| Block {
            bitmap: [0; 8],
            free: 0,
            next: NONE,
            previous: NONE,
        }));
    }

    /// The block that holds this frame, and the frame's bit in it.
    fn locate(&self, frame: HostPhysAddr) -> Option<(usize, u16)> {
        let raw = frame.as_u64();
        let after = self.spans.partition_point(|span| span.base <= raw);
        let span = self.spans.get(after.checked_sub(1)?)?;
        let block = (raw - span.base) / PAGE_SIZE_2M;
        if block >= u64::from(span.count) {
            return None;
        }
        let bit = frame.offset_in(PAGE_SIZE_2M) / PAGE_SIZE;
        Some((span.first as usize + block as usize, bit as u16))
    }

    fn address_of(&self, index: usize) -> HostPhysAddr {
        let after = self
            .spans
            .partition_point(|span| span.first as usize <= index);
        let span = &self.spans[after - 1];
        HostPhysAddr::new(span.base + (index as u64 - u64::from(span.first)) * PAGE_SIZE_2M)
    }

    fn list_of(block: &Block) -> Option<List> {
        match block.free {
            0 => None,
            FRAMES_PER_BLOCK => Some(List::Whole),
            _ => Some(List::Partial),
        }
    }

    fn head(&mut self, list: List) -> &mut u32 {
        match list {
            List::Whole => &mut self.whole,
            List::Partial => &mut self.partial,
        }
    }

    /// Puts a block at the head of the list that its count says.
    fn link(&mut self, index: usize) {
        let Some(list) = Self::list_of(&self.blocks[index]) else {
            return;
        };
        let old = core::mem::replace(self.head(list), index as u32);
        self.blocks[index].next = old;
        self.blocks[index].previous = NONE;
        if old != NONE {
            self.blocks[old as usize].previous = index as u32;
        }
    }

    /// Takes a block off the list that its count says.
    fn unlink(&mut self, index: usize) {
        let Some(list) = Self::list_of(&self.blocks[index]) else {
            return;
        };
        let (next, previous) = (self.blocks[index].next, self.blocks[index].previous);
        match previous {
            NONE => *self.head(list) = next,
            other => self.blocks[other as usize].next = next,
        }
        if next != NONE {
            self.blocks[next as usize].previous = previous;
        }
    }

    fn allocate_4k(&mut self) -> Option<HostPhysAddr> {
        let index = match (self.partial, self.whole) {
            (NONE, NONE) => return None,
            (NONE, whole) => whole,
            (partial, _) => partial,
        } as usize;
        let word = self.blocks[index]
            .bitmap
            .iter()
            .position(|word| *word != 0)?;
        let was = Self::list_of(&self.blocks[index]);
        // Only a change of lists touches them: taking from a partial block mostly does not.
        let moves = matches!(self.blocks[index].free, FRAMES_PER_BLOCK | 1);
        if moves && was.is_some() {
            self.unlink(index);
        }
        let block = &mut self.blocks[index];
        let bit = block.bitmap[word].trailing_zeros();
        block.bitmap[word] &= block.bitmap[word] - 1;
        block.free -= 1;
        if moves {
            self.link(index);
        }
        self.free_frames -= 1;
        let frame = word as u64 * 64 + u64::from(bit);
        Some(self.address_of(index).wrapping_add(frame * PAGE_SIZE))
    }

    fn take_block(&mut self, index: usize) -> HostPhysAddr {
        self.unlink(index);
        let block = &mut self.blocks[index];
        block.bitmap = [0; 8];
        block.free = 0;
        self.free_frames -= u64::from(FRAMES_PER_BLOCK);
        self.address_of(index)
    }

    fn allocate_1g(&mut self) -> Option<HostPhysAddr> {
        for span in 0..self.spans.len() {
            let Span { base, count, first } = self.spans[span];
            let lead = base.next_multiple_of(PAGE_SIZE_1G) - base;
            let mut block = lead / PAGE_SIZE_2M;
            while block + BLOCKS_PER_GIB <= u64::from(count) {
                let start = first as usize + block as usize;
                let run = start..start + BLOCKS_PER_GIB as usize;
                if self.blocks[run.clone()]
                    .iter()
                    .all(|block| block.free == FRAMES_PER_BLOCK)
                {
                    run.for_each(|index| {
                        self.take_block(index);
                    });
                    return Some(self.address_of(start));
                }
                block += BLOCKS_PER_GIB;
            }
        }
        None
    }

    /// Bytes free now.
    #[must_use]
    pub fn free_bytes(&self) -> u64 {
        self.free_frames * PAGE_SIZE
    }

    /// Bytes under management, free or not.
    #[must_use]
    pub fn total_bytes(&self) -> u64 {
        self.total_frames * PAGE_SIZE
    }
}

impl FrameSource for FrameAllocator {
    fn allocate(&mut self, size: PageSize) -> Option<HostPhysAddr> {
        match size {
            PageSize::Size4K => self.allocate_4k(),
            PageSize::Size2M => (self.whole != NONE).then(|| self.take_block(self.whole as usize)),
            PageSize::Size1G => self.allocate_1g(),
        }
    }

    /// A frame that is not ours, or is free already, is left alone: losing a frame is better
    /// than handing one out twice.
    fn free(&mut self, frame: HostPhysAddr, size: PageSize) {
        debug_assert!(
            frame.is_aligned(size.bytes()),
            "{frame} is not aligned to {size:?}"
        );
        // Whole blocks at once: a VM has hundreds of them.
        let (step, count) = match size {
            PageSize::Size4K => (PAGE_SIZE, 1),
            PageSize::Size2M | PageSize::Size1G => (PAGE_SIZE_2M, FRAMES_PER_BLOCK),
        };
        for offset in (0..size.bytes()).step_by(step as usize) {
            let Some((index, bit)) = self.locate(frame.wrapping_add(offset)) else {
                return;
            };
            let (word, mask) = (usize::from(bit / 64), 1 << (bit % 64));
            let Block { bitmap, free, .. } = &self.blocks[index];
            let (free, taken) = (*free, bitmap[word] & mask == 0);
            if !taken || free + count > FRAMES_PER_BLOCK {
                debug_assert!(false, "{frame} is freed twice");
                return;
            }
            let moves = free == 0 || free == FRAMES_PER_BLOCK - 1;
            if moves {
                self.unlink(index);
            }
            let block = &mut self.blocks[index];
            if count == 1 {
                block.bitmap[word] |= mask;
            } else {
                block.bitmap = [u64::MAX; 8];
            }
            block.free += count;
            if moves {
                self.link(index);
            }
            self.free_frames += u64::from(count);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    fn range(start: u64, end: u64) -> FrameRange {
        FrameRange {
            start: HostPhysAddr::new(start),
            end: HostPhysAddr::new(end),
        }
    }

    #[test]
    fn partial_frames_at_the_ends_are_left_out() {
        let frames = FrameAllocator::new(&[range(0x1001, 0x4fff)]);
        assert_eq!(frames.total_bytes(), 2 * PAGE_SIZE);
    }

    #[test]
    fn overlapping_ranges_are_taken_once() {
        let frames = FrameAllocator::new(&[range(0, 0x4000), range(0x2000, 0x6000)]);
        assert_eq!(frames.total_bytes(), 0x4000);
    }

    #[test]
    fn two_ranges_can_share_a_block() {
        let mut frames = FrameAllocator::new(&[range(0, 0x2000), range(0x8000, 0xa000)]);
        let mut seen: Vec<u64> = core::iter::from_fn(|| frames.allocate(PageSize::Size4K))
            .map(HostPhysAddr::as_u64)
            .collect();
        seen.sort_unstable();
        assert_eq!(seen, [0, 0x1000, 0x8000, 0x9000]);
    }

    #[test]
    fn a_gigabyte_frame_is_aligned_and_comes_back_whole() {
        let mut frames = FrameAllocator::new(&[range(PAGE_SIZE_2M, 3 * PAGE_SIZE_1G)]);
        let before = frames.free_bytes();
        let frame = frames.allocate(PageSize::Size1G).unwrap();
        assert_eq!(frame.as_u64(), PAGE_SIZE_1G);
        frames.free(frame, PageSize::Size1G);
        assert_eq!(frames.free_bytes(), before);
        assert!(frames.allocate(PageSize::Size1G).is_some());
    }

    /// Random takes and gives against a map of what is out: nothing is handed out twice, and at
    /// the end everything is back.
    #[test]
    fn random_use_never_hands_out_a_frame_twice() {
        let mut frames =
            FrameAllocator::new(&[range(0, 40 << 20), range(1 << 30, (1 << 30) + (9 << 20))]);
        let total = frames.free_bytes();
        let mut out: BTreeMap<u64, PageSize> = BTreeMap::new();
        let mut seed = 7u64;
        for _ in 0..200_000 {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let dice = seed >> 33;
            if dice % 5 < 3 {
                let size = if dice.is_multiple_of(97) {
                    PageSize::Size2M
                } else {
                    PageSize::Size4K
                };
                if let Some(frame) = frames.allocate(size) {
                    let start = frame.as_u64();
                    assert!(frame.is_aligned(size.bytes()));
                    if let Some((other, held)) = out.range(..start + size.bytes()).next_back() {
                        assert!(other + held.bytes() <= start, "{start:#x} is out already");
                    }
                    out.insert(start, size);
                }
            } else if !out.is_empty() {
                let nth = dice as usize % out.len();
                let (&start, &size) = out.iter().nth(nth.min(50)).unwrap();
                out.remove(&start);
                frames.free(HostPhysAddr::new(start), size);
            }
            let held: u64 = if dice.is_multiple_of(1000) {
                out.values().map(|s| s.bytes()).sum()
            } else {
                continue;
            };
            assert_eq!(frames.free_bytes() + held, total);
        }
        for (start, size) in out {
            frames.free(HostPhysAddr::new(start), size);
        }
        assert_eq!(frames.free_bytes(), total);
    }
}
