//! Second-level page tables: EPT (Intel SDM Vol. 3C §29.3) and NPT (AMD APM Vol. 2 §15.25).
//!
//! Both are four levels of 512 entries of eight bytes; they differ in how an entry spells its
//! rights and its cache type. The walk is written once.

use arch::{FrameSource, GuestPhysAddr, HostPhysAddr, PAGE_SIZE, PageSize, PhysMemory};

/// Whose entries these are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// Intel: extended page tables.
    Ept,
    /// AMD: nested page tables, in the format of ordinary long-mode tables.
    Npt,
}

/// What a guest may do to a page. EPT can give execution without reading; NPT reads always.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rights {
    /// Data reads.
    pub read: bool,
    /// Data writes.
    pub write: bool,
    /// Instruction fetches.
    pub execute: bool,
}

impl Rights {
    /// RAM.
    pub const ALL: Self = Self {
        read: true,
        write: true,
        execute: true,
    };
    /// ROM.
    pub const READ_EXECUTE: Self = Self {
        read: true,
        write: false,
        execute: true,
    };
}

/// How the page is cached, before the guest's own PAT has its say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CacheType {
    /// RAM.
    WriteBack,
    /// Device registers.
    Uncacheable,
}

/// What a mapped address leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Leaf {
    /// The start of the frame.
    pub frame: HostPhysAddr,
    /// Its size.
    pub size: PageSize,
    /// What the guest may do.
    pub rights: Rights,
}

/// A mapping could not be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MapError {
    /// Something is mapped there already.
    #[error("{0} is mapped already")]
    Occupied(GuestPhysAddr),
    /// The frame or the guest address is not a multiple of the page size, or is beyond 48 bits.
    #[error("{0} cannot be mapped with a page of that size")]
    Misplaced(GuestPhysAddr),
    /// No frame for a table.
    #[error("no memory for a page table")]
    OutOfMemory,
}

const ADDRESS: u64 = 0x000f_ffff_ffff_f000;
const LARGE: u64 = 1 << 7;
const EPT_READ: u64 = 1;
const EPT_WRITE: u64 = 1 << 1;
const EPT_EXECUTE: u64 = 1 << 2;
const EPT_WRITE_BACK: u64 = 6 << 3;
const NPT_PRESENT: u64 = 1;
const NPT_WRITE: u64 = 1 << 1;
/// Every nested access of a guest counts as a user access (APM Vol. 2 §15.25.5).
const NPT_USER: u64 = 1 << 2;
const NPT_CACHE_DISABLE: u64 = 1 << 4 | 1 << 3;
const NPT_NO_EXECUTE: u64 = 1 << 63;

impl Format {
    fn table(self, table: HostPhysAddr) -> u64 {
        table.as_u64()
            | match self {
                Self::Ept => EPT_READ | EPT_WRITE | EPT_EXECUTE,
                Self::Npt => NPT_PRESENT | NPT_WRITE | NPT_USER,
            }
    }

    fn leaf(self, frame: HostPhysAddr, size: PageSize, rights: Rights, cache: CacheType) -> u64 {
        let set = |on: bool, bits: u64| if on { bits } else { 0 };
        let large = set(size != PageSize::Size4K, LARGE);
        let write_back = cache == CacheType::WriteBack;
        frame.as_u64()
            | large
            | match self {
                Self::Ept => {
                    set(rights.read, EPT_READ)
                        | set(rights.write, EPT_WRITE)
                        | set(rights.execute, EPT_EXECUTE)
                        | set(write_back, EPT_WRITE_BACK)
                }
                Self::Npt => {
                    NPT_PRESENT
                        | NPT_USER
                        | set(rights.write, NPT_WRITE)
                        | set(!rights.execute, NPT_NO_EXECUTE)
                        | set(!write_back, NPT_CACHE_DISABLE)
                }
            }
    }

    const fn present(self, entry: u64) -> bool {
        match self {
            Self::Ept => entry & (EPT_READ | EPT_WRITE | EPT_EXECUTE) != 0,
            Self::Npt => entry & NPT_PRESENT != 0,
        }
    }

    const fn rights(self, entry: u64) -> Rights {
        match self {
            Self::Ept => Rights {
                read: entry & EPT_READ != 0,
                write: entry & EPT_WRITE != 0,
                execute: entry & EPT_EXECUTE != 0,
            },
            Self::Npt => Rights {
                read: true,
                write: entry & NPT_WRITE != 0,
                execute: entry & NPT_NO_EXECUTE == 0,
            },
        }
    }
}

/// The level whose entries map pages of this size: 1, 2 or 3.
const fn level_of(size: PageSize) -> u32 {
    match size {
        PageSize::Size4K => 1,
        PageSize::Size2M => 2,
        PageSize::Size1G => 3,
    }
}

const fn size_at(level: u32) -> PageSize {
    match level {
        1 => PageSize::Size4K,
        2 => PageSize::Size2M,
        _ => PageSize::Size1G,
    }
}

/// The address of the entry for `gpa` in a table of this level.
fn slot(table: HostPhysAddr, gpa: GuestPhysAddr, level: u32) -> HostPhysAddr {
    let index = (gpa.as_u64() >> (12 + 9 * (level - 1))) & 511;
    table.wrapping_add(index * 8)
}

/// One guest's second-level tables. The tables' own frames are the only thing it owns: whoever
/// maps a frame keeps the account of it. [`NestedTables::clear`] must have run before it is dropped.
#[derive(Debug)]
pub struct NestedTables {
    root: HostPhysAddr,
    format: Format,
    tables: u64,
}

impl NestedTables {
    /// Empty tables, or `None` when there is no frame for the root.
    pub fn new(
        format: Format,
        phys: &impl PhysMemory,
        frames: &mut impl FrameSource,
    ) -> Option<Self> {
        let root = frames.allocate(PageSize::Size4K)?;
        phys.zero(root, PAGE_SIZE);
        Some(Self {
            root,
            format,
            tables: 1,
        })
    }

    /// The root table, for EPTP or nCR3.
    #[must_use]
    pub const fn root(&self) -> HostPhysAddr {
        self.root
    }

    /// Bytes that the tables themselves occupy.
    #[must_use]
    pub const fn table_bytes(&self) -> u64 {
        self.tables * PAGE_SIZE
    }

    /// Maps one page.
    ///
    /// # Errors
    /// The slot is taken, an address is misplaced, or there is no frame for a table. Nothing was
    /// mapped then.
    #[allow(clippy::too_many_arguments)]
    pub fn map(
        &mut self,
        phys: &impl PhysMemory,
        frames: &mut impl FrameSource,
        gpa: GuestPhysAddr,
        frame: HostPhysAddr,
        size: PageSize,
        rights: Rights,
        cache: CacheType,
    ) -> Result<(), MapError> {
        if !gpa.is_aligned(size.bytes())
            || !frame.is_aligned(size.bytes())
            || gpa.as_u64() >> 48 != 0
            || frame.as_u64() & !ADDRESS != 0
        {
            return Err(MapError::Misplaced(gpa));
        }
        let mut table = self.root;
        for level in (level_of(size) + 1..=4).rev() {
            let entry_at = slot(table, gpa, level);
            let entry = phys.read_u64(entry_at);
            if !self.format.present(entry) {
                let next = frames
                    .allocate(PageSize::Size4K)
                    .ok_or(MapError::OutOfMemory)?;
                phys.zero(next, PAGE_SIZE);
                phys.write_u64(entry_at, self.format.table(next));
                self.tables += 1;
                table = next;
            } else if entry & LARGE != 0 {
                return Err(MapError::Occupied(gpa));
            } else {
                table = HostPhysAddr::new(entry & ADDRESS);
            }
        }
        let entry_at = slot(table, gpa, level_of(size));
        if self.format.present(phys.read_u64(entry_at)) {
            return Err(MapError::Occupied(gpa));
        }
        phys.write_u64(entry_at, self.format.leaf(frame, size, rights, cache));
        Ok(())
    }

    /// Finds the entry that decides about `gpa`: its place, its value and its level.
    fn find(&self, phys: &impl PhysMemory, gpa: GuestPhysAddr) -> (HostPhysAddr, u64, u32) {
        let mut table = self.root;
        let mut level = 4;
        loop {
            let entry_at = slot(table, gpa, level);
            let entry = phys.read_u64(entry_at);
            if level == 1 || !self.format.present(entry) || (entry & LARGE != 0 && level < 4) {
                return (entry_at, entry, level);
            }
            table = HostPhysAddr::new(entry & ADDRESS);
            level -= 1;
        }
    }

    /// What `gpa` leads to; `None` where nothing is mapped.
    pub fn translate(&self, phys: &impl PhysMemory, gpa: GuestPhysAddr) -> Option<Leaf> {
        if gpa.as_u64() >> 48 != 0 {
            return None;
        }
        let (_, entry, level) = self.find(phys, gpa);
        self.format.present(entry).then(|| {
            let size = size_at(level);
            Leaf {
                frame: HostPhysAddr::new(entry & ADDRESS).align_down(size.bytes()),
                size,
                rights: self.format.rights(entry),
            }
        })
    }

    /// The largest page that could be mapped at `gpa` without touching what is there: the size
    /// of the empty slot that a walk ends in. `None` where something is mapped.
    pub fn vacancy(&self, phys: &impl PhysMemory, gpa: GuestPhysAddr) -> Option<PageSize> {
        let (_, entry, level) = self.find(phys, gpa);
        (!self.format.present(entry)).then(|| size_at(level))
    }

    /// Unmaps the page at `gpa` and gives back what was there. The caller invalidates cached
    /// translations before the frame is used for anything else.
    pub fn unmap(&mut self, phys: &impl PhysMemory, gpa: GuestPhysAddr) -> Option<Leaf> {
        let leaf = self.translate(phys, gpa)?;
        let (entry_at, ..) = self.find(phys, gpa);
        phys.write_u64(entry_at, 0);
        Some(leaf)
    }

    /// Hands leaves to `release` and unmaps them for as long as that takes them, and frees the
    /// tables below the root that have become empty. `true` when nothing is left.
    pub fn clear(
        &mut self,
        phys: &impl PhysMemory,
        frames: &mut impl FrameSource,
        release: &mut impl FnMut(&mut dyn FrameSource, GuestPhysAddr, Leaf) -> bool,
    ) -> bool {
        self.clear_table(phys, frames, self.root, 4, GuestPhysAddr::new(0), release)
    }

    fn clear_table(
        &mut self,
        phys: &impl PhysMemory,
        frames: &mut impl FrameSource,
        table: HostPhysAddr,
        level: u32,
        base: GuestPhysAddr,
        release: &mut impl FnMut(&mut dyn FrameSource, GuestPhysAddr, Leaf) -> bool,
    ) -> bool {
        for index in 0..512 {
            let entry_at = table.wrapping_add(index * 8);
            let entry = phys.read_u64(entry_at);
            if !self.format.present(entry) {
                continue;
            }
            let gpa = base.wrapping_add(index << (12 + 9 * (level - 1)));
            let next = HostPhysAddr::new(entry & ADDRESS);
            if level == 1 || (level < 4 && entry & LARGE != 0) {
                let size = size_at(level);
                let frame = next.align_down(size.bytes());
                let leaf = Leaf {
                    frame,
                    size,
                    rights: self.format.rights(entry),
                };
                if !release(frames, gpa, leaf) {
                    return false;
                }
                phys.write_u64(entry_at, 0);
            } else {
                if !self.clear_table(phys, frames, next, level - 1, gpa, release) {
                    return false;
                }
                phys.write_u64(entry_at, 0);
                frames.free(next, PageSize::Size4K);
                self.tables -= 1;
            }
        }
        true
    }

    /// Frees the root of tables that [`NestedTables::clear`] has emptied.
    pub fn free_root(self, frames: &mut impl FrameSource) {
        frames.free(self.root, PageSize::Size4K);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::TestMemory;

    #[test]
    fn entries_are_spelled_as_the_manuals_say() {
        let frame = HostPhysAddr::new(0x20_0000);
        let all = Rights::ALL;
        let rom = Rights::READ_EXECUTE;
        let no_execute = Rights {
            execute: false,
            ..all
        };
        let cases = [
            (
                Format::Ept,
                PageSize::Size4K,
                all,
                CacheType::WriteBack,
                0x20_0037,
            ),
            (
                Format::Ept,
                PageSize::Size2M,
                all,
                CacheType::WriteBack,
                0x20_00b7,
            ),
            (
                Format::Ept,
                PageSize::Size4K,
                rom,
                CacheType::Uncacheable,
                0x20_0005,
            ),
            (
                Format::Npt,
                PageSize::Size4K,
                all,
                CacheType::WriteBack,
                0x20_0007,
            ),
            (
                Format::Npt,
                PageSize::Size2M,
                rom,
                CacheType::WriteBack,
                0x20_0085,
            ),
            (
                Format::Npt,
                PageSize::Size4K,
                no_execute,
                CacheType::Uncacheable,
                1 << 63 | 0x20_001f,
            ),
        ];
        for (format, size, rights, cache, want) in cases {
            assert_eq!(
                format.leaf(frame, size, rights, cache),
                want,
                "{format:?} {size:?}"
            );
        }
    }

    #[test]
    fn a_large_page_is_not_mapped_over_or_split_unasked() {
        for format in [Format::Ept, Format::Npt] {
            let (phys, mut frames) = TestMemory::pair(16 << 20);
            let mut tables = NestedTables::new(format, &phys, &mut frames).unwrap();
            let large = frames.allocate(PageSize::Size2M).unwrap();
            let small = frames.allocate(PageSize::Size4K).unwrap();
            let at = GuestPhysAddr::new(4 << 20);
            let map = |tables: &mut NestedTables, frames: &mut _, gpa, frame, size| {
                tables.map(
                    &phys,
                    frames,
                    gpa,
                    frame,
                    size,
                    Rights::ALL,
                    CacheType::WriteBack,
                )
            };
            map(&mut tables, &mut frames, at, large, PageSize::Size2M).unwrap();
            let inside = at.wrapping_add(0x5000);
            assert_eq!(
                map(&mut tables, &mut frames, inside, small, PageSize::Size4K),
                Err(MapError::Occupied(inside))
            );
            let leaf = tables.translate(&phys, inside).unwrap();
            assert_eq!((leaf.frame, leaf.size), (large, PageSize::Size2M));
            assert_eq!(tables.vacancy(&phys, inside), None);
            assert_eq!(
                tables.vacancy(&phys, GuestPhysAddr::new(6 << 20)),
                Some(PageSize::Size2M)
            );
            assert_eq!(tables.unmap(&phys, inside).unwrap().frame, large);
            assert_eq!(tables.translate(&phys, at), None);
        }
    }

    #[test]
    fn addresses_beyond_48_bits_lead_nowhere() {
        let (phys, mut frames) = TestMemory::pair(4 << 20);
        let tables = NestedTables::new(Format::Ept, &phys, &mut frames).unwrap();
        assert_eq!(tables.translate(&phys, GuestPhysAddr::new(1 << 48)), None);
    }

    #[test]
    fn clearing_gives_every_frame_back() {
        let (phys, mut frames) = TestMemory::pair(16 << 20);
        let before = frames.free_bytes();
        let mut tables = NestedTables::new(Format::Npt, &phys, &mut frames).unwrap();
        for page in 0..700u64 {
            let frame = frames.allocate(PageSize::Size4K).unwrap();
            let gpa = GuestPhysAddr::new(page * page * 0x1000);
            tables
                .map(
                    &phys,
                    &mut frames,
                    gpa,
                    frame,
                    PageSize::Size4K,
                    Rights::ALL,
                    CacheType::WriteBack,
                )
                .unwrap();
        }
        assert!(tables.table_bytes() > 3 * PAGE_SIZE);
        let pieces = [1, u64::MAX].map(|mut most| {
            tables.clear(&phys, &mut frames, &mut |frames, _, leaf| {
                let takes = most > 0;
                if takes {
                    most -= 1;
                    frames.free(leaf.frame, leaf.size);
                }
                takes
            })
        });
        assert_eq!(pieces, [false, true]);
        assert_eq!(tables.table_bytes(), PAGE_SIZE);
        tables.free_root(&mut frames);
        assert_eq!(frames.free_bytes(), before);
    }
}
