//! A guest's memory map, made from the size of its RAM and [`machine::map`].
//!
//! Two views of one thing: the ranges that have RAM behind them, which become its address space,
//! and the E820 map that a loader hands to the guest, where part of that RAM is reserved and
//! device ranges are named that the guest must not move.

use alloc::vec::Vec;
use core::ops::Range;

use machine::map;

/// What a range of the map is, by its E820 number (ACPI 6.5 §15.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum RegionKind {
    /// RAM the guest may use.
    Usable = 1,
    /// Not to be used.
    Reserved = 2,
}

/// One entry of the E820 map.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Region {
    /// First address and the one after the last.
    pub range: Range<u64>,
    /// What it is.
    pub kind: RegionKind,
}

/// The map of one guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemoryLayout {
    ram: Vec<Range<u64>>,
    regions: Vec<Region>,
}

impl MemoryLayout {
    /// The map of a guest with `memory` bytes, a multiple of 4 KiB of at least 1 MiB (the
    /// configuration checks both). The legacy hole costs the guest its 128 KiB, as on a PC.
    #[must_use]
    pub fn new(memory: u64) -> Self {
        use RegionKind::{Reserved, Usable};
        let low_end = memory.min(map::LOW_RAM_END);
        let high_end = map::HIGH_RAM.saturating_add(memory - low_end);
        let ram = [
            0..map::LEGACY_HOLE.start,
            map::LEGACY_HOLE.end..low_end,
            map::HIGH_RAM..high_end,
        ];
        let regions = [
            (0..map::EBDA.start, Usable),
            (map::EBDA, Reserved),
            (map::ROM_AREA, Reserved),
            (map::ROM_AREA.end..low_end, Usable),
            (map::ECAM, Reserved),
            (map::HIGH_RAM..high_end, Usable),
        ];
        Self {
            ram: ram.into_iter().filter(|r| !r.is_empty()).collect(),
            regions: regions
                .into_iter()
                .filter(|(range, _)| !range.is_empty())
                .map(|(range, kind)| Region { range, kind })
                .collect(),
        }
    }

    /// Ranges with RAM behind them, sorted, page-aligned.
    #[must_use]
    pub fn ram(&self) -> &[Range<u64>] {
        &self.ram
    }

    /// The E820 map, sorted and without overlaps.
    #[must_use]
    pub fn regions(&self) -> &[Region] {
        &self.regions
    }

    /// The RAM a guest may use, sorted.
    pub fn usable(&self) -> impl DoubleEndedIterator<Item = Range<u64>> + '_ {
        self.regions
            .iter()
            .filter(|region| region.kind == RegionKind::Usable)
            .map(|region| region.range.clone())
    }

    /// Bytes of RAM from 1 MiB up to the PCI hole.
    #[must_use]
    pub fn extended_memory(&self) -> u64 {
        self.usable()
            .find(|range| range.start == map::ROM_AREA.end)
            .map_or(0, |range| range.end - range.start)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn maps_by_memory_size() {
        const GIB: u64 = 1 << 30;
        for (memory, ram) in [
            (1 << 20, &[0..0xa_0000, 0xc_0000..0x10_0000][..]),
            (64 << 20, &[0..0xa_0000, 0xc_0000..64 << 20]),
            (3 * GIB, &[0..0xa_0000, 0xc_0000..3 * GIB]),
            (4 * GIB, &[0..0xa_0000, 0xc_0000..3 * GIB, 4 * GIB..5 * GIB]),
        ] {
            let layout = MemoryLayout::new(memory);
            assert_eq!(layout.ram(), ram);
            let held: u64 = layout.ram().iter().map(|r| r.end - r.start).sum();
            assert_eq!(held, memory - 0x2_0000, "all but the legacy hole");
            let regions = layout.regions();
            assert!(
                regions
                    .windows(2)
                    .all(|w| w[0].range.end <= w[1].range.start)
            );
            for usable in layout.usable() {
                assert!(
                    ram.iter()
                        .any(|r| r.start <= usable.start && usable.end <= r.end)
                );
            }
        }
        assert_eq!(MemoryLayout::new(1 << 20).extended_memory(), 0);
        assert_eq!(
            MemoryLayout::new(4 * GIB).extended_memory(),
            3 * GIB - (1 << 20)
        );
    }
}
