//! One guest's physical address space: what is RAM, and which of it has a frame.

use crate::nested::{CacheType, Format, MapError, NestedTables, Rights};
use alloc::vec::Vec;
use arch::{
    Access, FrameSource, GuestMemory, GuestPhysAddr, HostPhysAddr, MemoryFault, PAGE_SIZE,
    PAGE_SIZE_2M, PageSize, PhysMemory,
};

/// What a region of guest-physical memory is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RegionKind {
    /// Memory, backed on first touch.
    Ram,
    /// Memory that the guest reads and executes and only software fills.
    Rom,
}

/// A region of guest-physical memory. What no region covers is a device's or nobody's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    /// First byte; a multiple of 4 KiB.
    pub start: GuestPhysAddr,
    /// Length in bytes; a multiple of 4 KiB.
    pub bytes: u64,
    /// What it is.
    pub kind: RegionKind,
}

impl Region {
    fn end(&self) -> u64 {
        self.start.as_u64() + self.bytes
    }

    fn contains(&self, gpa: GuestPhysAddr) -> bool {
        gpa >= self.start && gpa.as_u64() < self.end()
    }
}

/// An address space could not be laid out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RegionError {
    /// Not a multiple of 4 KiB, empty, or beyond 48 bits.
    #[error("region {start} of {bytes:#x} bytes is not made of whole pages below 2^48")]
    Malformed {
        /// Its first byte.
        start: GuestPhysAddr,
        /// Its length.
        bytes: u64,
    },
    /// It shares addresses with another.
    #[error("region at {0} overlaps the one before it")]
    Overlap(GuestPhysAddr),
    /// No frame for the root table.
    #[error("no memory for the root page table")]
    OutOfMemory,
}

/// What became of a nested page fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FaultOutcome {
    /// The page has a frame now: run the guest again.
    Backed,
    /// No RAM is here: a device's register, or nothing.
    NotRam,
    /// A write to ROM.
    ReadOnly,
    /// The host has no frame left.
    OutOfMemory,
}

/// Recently used translations of 4 KiB pages, direct-mapped. Software walks guests' page tables
/// often (an instruction fetch at an exit is five reads), and a hit costs a compare and an add.
const CACHE_ENTRIES: usize = 64;

#[derive(Clone, Copy)]
struct Cached {
    page: u64,
    frame: u64,
}

const EMPTY: Cached = Cached {
    page: u64::MAX,
    frame: 0,
};

/// A guest-physical address space that is backed as it is touched.
pub struct AddressSpace<P: PhysMemory, F: FrameSource> {
    regions: Vec<Region>,
    tables: Option<NestedTables>,
    phys: P,
    frames: F,
    large_pages: bool,
    backed: u64,
    cache: [Cached; CACHE_ENTRIES],
}

impl<P: PhysMemory, F: FrameSource> AddressSpace<P, F> {
    /// An address space with these regions (in any order) and no frame yet. With `large_pages`,
    /// RAM is backed by 2 MiB frames wherever a whole aligned 2 MiB is RAM.
    ///
    /// # Errors
    /// A region is malformed or overlaps another, or there is no memory at all.
    pub fn new(
        format: Format,
        regions: &[Region],
        large_pages: bool,
        phys: P,
        mut frames: F,
    ) -> Result<Self, RegionError> {
        let mut regions = regions.to_vec();
        regions.sort_unstable_by_key(|region| region.start);
        let mut end = 0;
        for region in &regions {
            let (start, bytes) = (region.start, region.bytes);
            let whole = start.is_aligned(PAGE_SIZE) && bytes.is_multiple_of(PAGE_SIZE) && bytes > 0;
            let last = start
                .checked_add(bytes)
                .filter(|end| end.as_u64() <= 1 << 48);
            let Some(last) = last.filter(|_| whole) else {
                return Err(RegionError::Malformed { start, bytes });
            };
            if start.as_u64() < end {
                return Err(RegionError::Overlap(start));
            }
            end = last.as_u64();
        }
        let tables =
            NestedTables::new(format, &phys, &mut frames).ok_or(RegionError::OutOfMemory)?;
        Ok(Self {
            regions,
            tables: Some(tables),
            phys,
            frames,
            large_pages,
            backed: 0,
            cache: [EMPTY; CACHE_ENTRIES],
        })
    }

    /// The root of the nested tables.
    #[must_use]
    pub fn root(&self) -> HostPhysAddr {
        self.tables
            .as_ref()
            .map_or(HostPhysAddr::new(0), NestedTables::root)
    }

    /// Bytes of RAM that have a frame.
    #[must_use]
    pub const fn backed_bytes(&self) -> u64 {
        self.backed
    }

    /// Bytes that the page tables take.
    #[must_use]
    pub fn table_bytes(&self) -> u64 {
        self.tables.as_ref().map_or(0, NestedTables::table_bytes)
    }

    /// Bytes of RAM and ROM that the guest was promised.
    #[must_use]
    pub fn promised_bytes(&self) -> u64 {
        self.regions.iter().map(|region| region.bytes).sum()
    }

    /// Maps one page of the machine that is not RAM of this guest (the APIC-access page of VMX).
    ///
    /// # Errors
    /// As [`NestedTables::map`]; an address inside a region counts as occupied.
    pub fn map_device_page(
        &mut self,
        gpa: GuestPhysAddr,
        frame: HostPhysAddr,
    ) -> Result<(), MapError> {
        if self.region(gpa).is_some() {
            return Err(MapError::Occupied(gpa));
        }
        let tables = self.tables.as_mut().ok_or(MapError::OutOfMemory)?;
        let rights = Rights {
            execute: false,
            ..Rights::ALL
        };
        tables.map(
            &self.phys,
            &mut self.frames,
            gpa,
            frame,
            PageSize::Size4K,
            rights,
            CacheType::WriteBack,
        )
    }

    /// Unmaps what [`AddressSpace::map_device_page`] mapped. The caller invalidates cached
    /// translations.
    pub fn unmap_device_page(&mut self, gpa: GuestPhysAddr) {
        if self.region(gpa).is_none()
            && let Some(tables) = self.tables.as_mut()
        {
            tables.unmap(&self.phys, gpa);
        }
    }

    fn region(&self, gpa: GuestPhysAddr) -> Option<Region> {
        let after = self.regions.partition_point(|region| region.start <= gpa);
        let region = self.regions.get(after.checked_sub(1)?)?;
        region.contains(gpa).then_some(*region)
    }

    /// Settles a nested page fault.
    pub fn fault(&mut self, gpa: GuestPhysAddr, access: Access) -> FaultOutcome {
        let Some(region) = self.region(gpa) else {
            return FaultOutcome::NotRam;
        };
        if region.kind == RegionKind::Rom && access.write {
            return FaultOutcome::ReadOnly;
        }
        match self.back(region, gpa) {
            Some(_) => FaultOutcome::Backed,
            None => FaultOutcome::OutOfMemory,
        }
    }

    /// Gives the page at `gpa` its frame if it has none, and finds the host address of `gpa`.
    fn back(&mut self, region: Region, gpa: GuestPhysAddr) -> Option<HostPhysAddr> {
        let tables = self.tables.as_mut()?;
        if let Some(leaf) = tables.translate(&self.phys, gpa) {
            return Some(leaf.frame.wrapping_add(gpa.offset_in(leaf.size.bytes())));
        }
        let block = gpa.align_down(PAGE_SIZE_2M);
        let large = self.large_pages
            && block >= region.start
            && block.as_u64() + PAGE_SIZE_2M <= region.end()
            && tables
                .vacancy(&self.phys, gpa)
                .is_some_and(|size| size >= PageSize::Size2M);
        let sizes: &[PageSize] = if large {
            &[PageSize::Size2M, PageSize::Size4K]
        } else {
            &[PageSize::Size4K]
        };
        let rights = match region.kind {
            RegionKind::Ram => Rights::ALL,
            RegionKind::Rom => Rights::READ_EXECUTE,
        };
        for &size in sizes {
            let Some(frame) = self.frames.allocate(size) else {
                continue;
            };
            self.phys.zero(frame, size.bytes());
            let page = gpa.align_down(size.bytes());
            let cache = CacheType::WriteBack;
            if tables
                .map(
                    &self.phys,
                    &mut self.frames,
                    page,
                    frame,
                    size,
                    rights,
                    cache,
                )
                .is_err()
            {
                self.frames.free(frame, size);
                continue;
            }
            self.backed += size.bytes();
            return Some(frame.wrapping_add(gpa.offset_in(size.bytes())));
        }
        None
    }

    /// The host address of a guest address, backed if need be.
    #[inline]
    fn host_address(&mut self, gpa: GuestPhysAddr) -> Result<HostPhysAddr, MemoryFault> {
        let page = gpa.as_u64() / PAGE_SIZE;
        let cached = self.cache[page as usize % CACHE_ENTRIES];
        if cached.page == page {
            return Ok(HostPhysAddr::new(cached.frame + gpa.offset_in(PAGE_SIZE)));
        }
        self.host_address_slow(gpa)
    }

    #[cold]
    fn host_address_slow(&mut self, gpa: GuestPhysAddr) -> Result<HostPhysAddr, MemoryFault> {
        let region = self.region(gpa).ok_or(MemoryFault::NotRam(gpa))?;
        let address = self
            .back(region, gpa)
            .ok_or(MemoryFault::OutOfMemory(gpa))?;
        let page = gpa.as_u64() / PAGE_SIZE;
        let frame = address.as_u64() - gpa.offset_in(PAGE_SIZE);
        self.cache[page as usize % CACHE_ENTRIES] = Cached { page, frame };
        Ok(address)
    }

    /// Software on the guest's behalf must not write ROM; loaders use [`AddressSpace::fill`].
    fn check_writable(&self, gpa: GuestPhysAddr) -> Result<(), MemoryFault> {
        match self.region(gpa) {
            Some(Region {
                kind: RegionKind::Rom,
                ..
            }) => Err(MemoryFault::ReadOnly(gpa)),
            _ => Ok(()),
        }
    }

    fn copy_in(&mut self, addr: GuestPhysAddr, data: &[u8], rom: bool) -> Result<(), MemoryFault> {
        let mut at = addr;
        let mut rest = data;
        while !rest.is_empty() {
            let room = (PAGE_SIZE - at.offset_in(PAGE_SIZE)) as usize;
            let (now, later) = rest.split_at(room.min(rest.len()));
            if !rom {
                self.check_writable(at)?;
            }
            let host = self.host_address(at)?;
            self.phys.write(host, now);
            at = at
                .checked_add(now.len() as u64)
                .ok_or(MemoryFault::NotRam(at))?;
            rest = later;
        }
        Ok(())
    }

    /// Writes initial contents, into ROM too.
    ///
    /// # Errors
    /// As [`GuestMemory::write`], but never [`MemoryFault::ReadOnly`].
    pub fn fill(&mut self, addr: GuestPhysAddr, data: &[u8]) -> Result<(), MemoryFault> {
        self.copy_in(addr, data, true)
    }

    /// Takes every frame back, as at power-on. The caller invalidates cached translations.
    pub fn reset(&mut self) {
        self.give_back(u64::MAX);
    }

    /// Takes up to `most` frames back; `true` when none is left. The caller invalidates cached
    /// translations.
    pub fn give_back(&mut self, mut most: u64) -> bool {
        self.cache = [EMPTY; CACHE_ENTRIES];
        let (regions, backed) = (&self.regions, &mut self.backed);
        let Some(tables) = &mut self.tables else {
            return true;
        };
        let (phys, frames) = (&self.phys, &mut self.frames);
        tables.clear(phys, frames, &mut |frames, gpa, leaf| {
            let Some(rest) = most.checked_sub(1) else {
                return false;
            };
            most = rest;
            // A device page was lent, not backed: it is not ours to free.
            if regions.iter().any(|region| region.contains(gpa)) {
                frames.free(leaf.frame, leaf.size);
                *backed -= leaf.size.bytes();
            }
            true
        })
    }
}

impl<P: PhysMemory, F: FrameSource> Drop for AddressSpace<P, F> {
    fn drop(&mut self) {
        self.reset();
        if let Some(tables) = self.tables.take() {
            tables.free_root(&mut self.frames);
        }
    }
}

impl<P: PhysMemory, F: FrameSource> GuestMemory for AddressSpace<P, F> {
    fn read(&mut self, addr: GuestPhysAddr, buf: &mut [u8]) -> Result<(), MemoryFault> {
        let mut at = addr;
        let mut rest = buf;
        while !rest.is_empty() {
            let room = (PAGE_SIZE - at.offset_in(PAGE_SIZE)) as usize;
            let length = room.min(rest.len());
            let (now, later) = rest.split_at_mut(length);
            let host = self.host_address(at)?;
            self.phys.read(host, now);
            at = at
                .checked_add(length as u64)
                .ok_or(MemoryFault::NotRam(at))?;
            rest = later;
        }
        Ok(())
    }

    fn write(&mut self, addr: GuestPhysAddr, data: &[u8]) -> Result<(), MemoryFault> {
        self.copy_in(addr, data, false)
    }

    #[inline]
    fn read_u64(&mut self, addr: GuestPhysAddr) -> Result<u64, MemoryFault> {
        if !addr.is_aligned(8) {
            let mut bytes = [0; 8];
            self.read(addr, &mut bytes)?;
            return Ok(u64::from_le_bytes(bytes));
        }
        let host = self.host_address(addr)?;
        Ok(self.phys.read_u64(host))
    }

    fn compare_exchange(
        &mut self,
        addr: GuestPhysAddr,
        size: u8,
        current: u64,
        new: u64,
    ) -> Result<u64, MemoryFault> {
        if !matches!(size, 1 | 2 | 4 | 8) || !addr.is_aligned(u64::from(size)) {
            return Err(MemoryFault::NotRam(addr));
        }
        self.check_writable(addr)?;
        let host = self.host_address(addr)?;
        Ok(self.phys.compare_exchange(host, size, current, new))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::TestMemory;
    use crate::{FrameAllocator, FrameRange};
    use std::cell::RefCell;
    use std::rc::Rc;

    #[derive(Clone)]
    struct Shared(Rc<RefCell<FrameAllocator>>);

    impl FrameSource for Shared {
        fn allocate(&mut self, size: PageSize) -> Option<HostPhysAddr> {
            self.0.borrow_mut().allocate(size)
        }
        fn free(&mut self, frame: HostPhysAddr, size: PageSize) {
            self.0.borrow_mut().free(frame, size);
        }
    }

    fn gpa(raw: u64) -> GuestPhysAddr {
        GuestPhysAddr::new(raw)
    }

    fn ram(start: u64, bytes: u64) -> Region {
        Region {
            start: gpa(start),
            bytes,
            kind: RegionKind::Ram,
        }
    }

    fn world(regions: &[Region], large: bool) -> (AddressSpace<TestMemory, Shared>, Shared) {
        let (phys, frames) = TestMemory::pair(16 << 20);
        let frames = Shared(Rc::new(RefCell::new(frames)));
        (
            AddressSpace::new(Format::Ept, regions, large, phys, frames.clone()).unwrap(),
            frames,
        )
    }

    #[test]
    fn a_promise_of_gigabytes_costs_one_table_until_it_is_touched() {
        let (mut space, frames) = world(&[ram(0, 32 << 30)], false);
        let before = frames.0.borrow().free_bytes();
        assert_eq!(space.backed_bytes(), 0);
        assert_eq!(
            space.fault(gpa(20 << 30), Access::WRITE),
            FaultOutcome::Backed
        );
        assert_eq!(space.backed_bytes(), PAGE_SIZE);
        assert_eq!(before - frames.0.borrow().free_bytes(), 4 * PAGE_SIZE);
    }

    #[test]
    fn memory_is_zero_when_first_seen_and_kept_across_pages() {
        let (mut space, _) = world(&[ram(0, 1 << 20)], false);
        let mut bytes = [1; 8];
        space.read(gpa(0x1ffc), &mut bytes).unwrap();
        assert_eq!(bytes, [0; 8]);
        space.write(gpa(0x1ffc), b"boundary").unwrap();
        space.read(gpa(0x1ffc), &mut bytes).unwrap();
        assert_eq!(&bytes, b"boundary");
    }

    #[test]
    fn large_frames_are_used_only_where_the_whole_block_is_ram() {
        let (mut space, _) = world(&[ram(0, 0xa_0000), ram(0x10_0000, 7 << 20)], true);
        space.fault(gpa(0x1000), Access::READ);
        assert_eq!(space.backed_bytes(), PAGE_SIZE);
        space.fault(gpa(0x12_3000), Access::READ);
        assert_eq!(space.backed_bytes(), 2 * PAGE_SIZE);
        space.fault(gpa(0x25_0000), Access::READ);
        assert_eq!(space.backed_bytes(), 2 * PAGE_SIZE + PAGE_SIZE_2M);
    }

    #[test]
    fn holes_and_rom_are_told_apart() {
        let rom = Region {
            start: gpa(0xf_0000),
            bytes: 0x1_0000,
            kind: RegionKind::Rom,
        };
        let (mut space, _) = world(&[ram(0, 0xa_0000), rom], true);
        assert_eq!(
            space.fault(gpa(0xa_0000), Access::READ),
            FaultOutcome::NotRam
        );
        assert_eq!(
            space.fault(gpa(0xf_0000), Access::WRITE),
            FaultOutcome::ReadOnly
        );
        assert_eq!(
            space.fault(gpa(0xf_0000), Access::EXECUTE),
            FaultOutcome::Backed
        );
        assert_eq!(
            space.write(gpa(0xf_0000), &[1]),
            Err(MemoryFault::ReadOnly(gpa(0xf_0000)))
        );
        space.fill(gpa(0xf_0000), &[7]).unwrap();
        let mut byte = [0];
        space.read(gpa(0xf_0000), &mut byte).unwrap();
        assert_eq!(byte, [7]);
        assert_eq!(
            space.read(gpa(0x9_ffff), &mut [0; 2]),
            Err(MemoryFault::NotRam(gpa(0xa_0000)))
        );
    }

    #[test]
    fn addresses_at_the_very_end_do_not_wrap() {
        let (mut space, _) = world(&[ram(0, 1 << 20)], true);
        assert!(space.read(gpa(u64::MAX), &mut [0; 16]).is_err());
        assert!(space.write(gpa(u64::MAX - 3), &[0; 16]).is_err());
        assert!(space.compare_exchange(gpa(u64::MAX - 7), 8, 0, 1).is_err());
    }

    #[test]
    fn a_machine_without_frames_says_so_and_recovers() {
        let range = FrameRange {
            start: HostPhysAddr::new(0),
            end: HostPhysAddr::new(8 * PAGE_SIZE),
        };
        let frames = Shared(Rc::new(RefCell::new(FrameAllocator::new(&[range]))));
        let (phys, _) = TestMemory::pair(1 << 20);
        let total = frames.0.borrow().free_bytes();
        let mut space =
            AddressSpace::new(Format::Npt, &[ram(0, 1 << 30)], true, phys, frames.clone()).unwrap();
        let mut page = 0;
        while space.fault(gpa(page * PAGE_SIZE), Access::WRITE) == FaultOutcome::Backed {
            page += 1;
        }
        assert_eq!(page, 4);
        assert_eq!(space.fault(gpa(0), Access::WRITE), FaultOutcome::Backed);
        drop(space);
        assert_eq!(frames.0.borrow().free_bytes(), total);
    }

    #[test]
    fn malformed_regions_are_refused() {
        let (phys, _) = TestMemory::pair(1 << 20);
        for (regions, want_overlap) in [
            (vec![ram(0, 0x2000), ram(0x1000, 0x1000)], true),
            (vec![ram(0x800, 0x1000)], false),
            (vec![ram(0, 0)], false),
            (vec![ram(1 << 48, 0x1000)], false),
        ] {
            let (_, frames) = TestMemory::pair(1 << 20);
            let result = AddressSpace::new(Format::Ept, &regions, true, phys.clone(), frames);
            match result.err().unwrap() {
                RegionError::Overlap(_) => assert!(want_overlap),
                RegionError::Malformed { .. } => assert!(!want_overlap),
                RegionError::OutOfMemory => panic!("there was memory"),
            }
        }
    }

    #[test]
    fn memory_goes_back_in_pieces_as_well() {
        let (mut space, frames) = world(&[ram(0, 0xa_0000), ram(0x10_0000, 9 << 20)], true);
        let empty = frames.0.borrow().free_bytes();
        space
            .map_device_page(gpa(0xfee0_0000), HostPhysAddr::new(0x5000))
            .unwrap();
        for page in [0, 1, 7, 0x100, 0x101, 0x200, 0x400, 0x600] {
            space.fault(gpa(page * PAGE_SIZE), Access::WRITE);
        }
        let (mut backed, mut pieces) = (space.backed_bytes(), 0);
        loop {
            let done = space.give_back(3);
            pieces += 1;
            assert_eq!(done, space.backed_bytes() == 0 && pieces == 3, "{pieces}");
            if done {
                break;
            }
            assert!(space.backed_bytes() < backed);
            backed = space.backed_bytes();
        }
        assert_eq!(frames.0.borrow().free_bytes(), empty);
        // As at power-on.
        assert_eq!(space.fault(gpa(0), Access::WRITE), FaultOutcome::Backed);
    }

    /// Two guests take and lose pages at random; no frame is ever in both, and software's view
    /// through the cache agrees with the tables.
    #[test]
    fn two_guests_never_share_a_frame() {
        let (phys, frames) = TestMemory::pair(8 << 20);
        let total = frames.free_bytes();
        let frames = Shared(Rc::new(RefCell::new(frames)));
        let make = |format| {
            AddressSpace::new(
                format,
                &[ram(0, 64 << 20)],
                false,
                phys.clone(),
                frames.clone(),
            )
            .unwrap()
        };
        let mut guests = [make(Format::Ept), make(Format::Npt)];
        let mut seed = 3u64;
        for round in 0..20_000u64 {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let who = (seed >> 40) as usize % 2;
            let page = (seed >> 33) % 3000;
            let at = gpa(page * PAGE_SIZE + 8 * who as u64);
            let value = page << 1 | who as u64;
            match guests[who].write(at, &value.to_le_bytes()) {
                Ok(()) => assert_eq!(guests[who].read_u64(at), Ok(value)),
                Err(MemoryFault::OutOfMemory(_)) => guests[who].reset(),
                Err(other) => panic!("{other:?}"),
            }
            // The other guest's view of the same address never holds this guest's mark.
            if round % 7 == 0
                && let Ok(seen) = guests[1 - who].read_u64(at)
            {
                assert_eq!(seen, 0);
            }
        }
        drop(guests);
        assert_eq!(frames.0.borrow().free_bytes(), total);
    }
}
