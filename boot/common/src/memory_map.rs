//! The memory map, put in order.
//!
//! Firmware maps are unsorted, overlap, have holes, end in the middle of a
//! page and now and then wrap around the end of the address space (ACPI 6.5
//! §15 asks the operating system to cope). What the kernel gets is sorted,
//! does not overlap, lies on page boundaries, and says `Usable` only of pages
//! about which no entry said anything worse: where entries overlap, the more
//! restrictive kind wins.

use crate::{Error, PAGE};
use bootloader_api::info::{MemoryRegion, MemoryRegionKind};

/// Puts `entries` in order and writes them to `out`; gives their number.
///
/// Addresses of `limit` and above do not exist: what lies there is cut off.
/// Partial pages count as usable by nobody. Page 0 is never `Usable`: it is
/// the firmware's (interrupt vectors, BIOS data), and so that address 0 can
/// stay what nobody owns.
///
/// # Errors
/// When the result has more pieces than `out` has room, or no usable one.
pub fn normalise(
    entries: impl Iterator<Item = MemoryRegion> + Clone,
    limit: u64,
    out: &mut [MemoryRegion],
) -> Result<usize, Error> {
    let page_zero = MemoryRegion {
        start: 0,
        end: PAGE,
        kind: MemoryRegionKind::Bootloader,
    };
    let usable_zero = entries
        .clone()
        .any(|entry| entry.start < PAGE && usable(&entry));
    let entries = entries
        .chain(usable_zero.then_some(page_zero))
        .filter_map(|entry| on_pages(entry, limit));

    let max = out.len();
    let mut len = 0;
    let mut at = 0;
    // From one boundary to the next, all pages have the same owners.
    while let Some(next) = entries
        .clone()
        .flat_map(|entry| [entry.start, entry.end])
        .filter(|&boundary| boundary > at)
        .min()
    {
        let owner = entries
            .clone()
            .filter(|entry| entry.start <= at && at < entry.end)
            .max_by_key(|entry| rank(entry.kind));
        if let Some(MemoryRegion { kind, .. }) = owner {
            let piece = MemoryRegion {
                start: at,
                end: next,
                kind,
            };
            match out[..len].last_mut() {
                Some(last) if last.end == at && last.kind == kind => last.end = next,
                _ => {
                    *out.get_mut(len).ok_or(Error::TooManyRegions { max })? = piece;
                    len += 1;
                }
            }
        }
        at = next;
    }
    if out[..len].iter().any(usable) {
        Ok(len)
    } else {
        Err(Error::NoMemory)
    }
}

/// The first address above all RAM below `limit`, of whatever use. Reserved
/// ranges and devices do not count: some firmware lists them at the far end
/// of the address space.
pub fn top_of_ram(entries: impl Iterator<Item = MemoryRegion>, limit: u64) -> u64 {
    entries
        .filter(|entry| is_ram(entry.kind))
        .filter_map(|entry| on_pages(entry, limit))
        .map(|entry| entry.end)
        .max()
        .unwrap_or(0)
}

/// The largest usable stretch from `from` to before `to`, for a loader without
/// an allocator: `entries` are the firmware's and, as `Bootloader`, all that
/// is occupied. `scratch` holds the map in between.
///
/// # Errors
/// As [`normalise`], or when nothing usable lies there.
pub fn largest_usable(
    entries: impl Iterator<Item = MemoryRegion> + Clone,
    from: u64,
    to: u64,
    scratch: &mut [MemoryRegion],
) -> Result<core::ops::Range<u64>, Error> {
    let len = normalise(entries, to, scratch)?;
    scratch
        .iter()
        .take(len)
        .filter(|region| usable(region) && region.end > from)
        .map(|region| region.start.max(from)..region.end)
        .max_by_key(|stretch| stretch.end - stretch.start)
        .ok_or(Error::NoMemory)
}

fn usable(entry: &MemoryRegion) -> bool {
    entry.kind == MemoryRegionKind::Usable
}

/// Whole pages below `limit` only: usable memory shrinks to them, everything
/// else grows. Empty and wrapped-around entries are dropped.
fn on_pages(entry: MemoryRegion, limit: u64) -> Option<MemoryRegion> {
    let limit = limit & !(PAGE - 1);
    let (start, end) = (entry.start.min(limit), entry.end.min(limit));
    if start >= end {
        return None;
    }
    let (start, end) = if usable(&entry) {
        (start.next_multiple_of(PAGE), end & !(PAGE - 1))
    } else {
        (start & !(PAGE - 1), end.next_multiple_of(PAGE))
    };
    (start < end).then_some(MemoryRegion {
        start,
        end,
        ..entry
    })
}

/// How restrictive a kind is, with the firmware's own number to break ties.
/// The numbers are those of ACPI 6.5 table 15.1 and UEFI 2.10 table 7.10.
fn rank(kind: MemoryRegionKind) -> (u8, bool, u32) {
    use MemoryRegionKind::{Bootloader, UnknownBios, UnknownUefi, Usable};
    let (uefi, number) = match kind {
        Usable => return (0, false, 0),
        Bootloader => return (1, false, 0),
        UnknownBios(number) => (false, number),
        UnknownUefi(number) => (true, number),
        _ => return (6, false, 0),
    };
    let class = match (uefi, number) {
        // ACPI tables, which may be reclaimed after reading.
        (false, 3) | (true, 9) => 2,
        // ACPI non-volatile storage.
        (false, 4) | (true, 10) => 3,
        // Memory that is broken.
        (false, 5) | (true, 8) => 5,
        _ => 4,
    };
    (class, uefi, number)
}

fn is_ram(kind: MemoryRegionKind) -> bool {
    use MemoryRegionKind::{Bootloader, UnknownBios, UnknownUefi, Usable};
    matches!(
        kind,
        Usable | Bootloader | UnknownBios(3 | 4) | UnknownUefi(1..=7 | 9 | 10)
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use MemoryRegionKind::{Bootloader, UnknownBios, UnknownUefi, Usable};
    use proptest::prelude::*;
    use std::vec::Vec;

    fn region(start: u64, end: u64, kind: MemoryRegionKind) -> MemoryRegion {
        MemoryRegion { start, end, kind }
    }

    fn normalised(entries: &[MemoryRegion], limit: u64) -> Result<Vec<MemoryRegion>, Error> {
        let mut out = [MemoryRegion::empty(); 64];
        let len = normalise(entries.iter().copied(), limit, &mut out)?;
        Ok(out[..len].to_vec())
    }

    #[test]
    fn a_pc_with_six_gib() {
        let e820 = [
            region(0x0, 0x9fc00, Usable),
            region(0x9fc00, 0xa0000, UnknownBios(2)),
            region(0xf0000, 0x10_0000, UnknownBios(2)),
            region(0x10_0000, 0xbffe_0000, Usable),
            region(0xbffe_0000, 0xc000_0000, UnknownBios(3)),
            region(0xfeff_c000, 0xff00_0000, UnknownBios(2)),
            region(0x1_0000_0000, 0x1_c000_0000, Usable),
            region(0xfd_0000_0000, 0x100_0000_0000, UnknownBios(2)),
        ];
        let stub = region(0x10_0000, 0x11_0800, Bootloader);
        let all = e820.into_iter().chain([stub]);
        let got = normalised(&all.clone().collect::<Vec<_>>(), 1 << 46).unwrap();
        assert_eq!(
            got,
            [
                region(0, 0x1000, Bootloader),
                region(0x1000, 0x9f000, Usable),
                region(0x9f000, 0xa0000, UnknownBios(2)),
                region(0xf0000, 0x10_0000, UnknownBios(2)),
                region(0x10_0000, 0x11_1000, Bootloader),
                region(0x11_1000, 0xbffe_0000, Usable),
                region(0xbffe_0000, 0xc000_0000, UnknownBios(3)),
                region(0xfeff_c000, 0xff00_0000, UnknownBios(2)),
                region(0x1_0000_0000, 0x1_c000_0000, Usable),
                region(0xfd_0000_0000, 0x100_0000_0000, UnknownBios(2)),
            ]
        );
        assert_eq!(top_of_ram(all, 1 << 46), 0x1_c000_0000);
    }

    #[test]
    fn the_more_restrictive_kind_wins() {
        let cases = [
            (Usable, Bootloader, Bootloader),
            (Usable, UnknownBios(3), UnknownBios(3)),
            (UnknownBios(3), UnknownBios(4), UnknownBios(4)),
            (UnknownBios(2), UnknownBios(4), UnknownBios(2)),
            (UnknownBios(2), UnknownBios(5), UnknownBios(5)),
            (UnknownUefi(9), UnknownUefi(11), UnknownUefi(11)),
            (UnknownUefi(8), UnknownUefi(0), UnknownUefi(8)),
            (Bootloader, UnknownUefi(0), UnknownUefi(0)),
        ];
        let elsewhere = region(0x10_0000, 0x20_0000, Usable);
        for (a, b, want) in cases {
            for (first, second) in [(a, b), (b, a)] {
                let got = normalised(
                    &[
                        region(0x4000, 0x6000, first),
                        elsewhere,
                        region(0x4000, 0x6000, second),
                    ],
                    u64::MAX,
                );
                assert_eq!(got, Ok([region(0x4000, 0x6000, want), elsewhere].to_vec()));
            }
        }
    }

    #[test]
    fn nothing_usable_is_an_error() {
        for entries in [
            &[][..],
            &[region(0, 0x1fff, Usable)],
            &[region(0x5000, 0x4000, Usable)],
            &[region(0x1001, 0x2fff, Usable)],
            &[
                region(0x1000, u64::MAX, Usable),
                region(0, u64::MAX, UnknownBios(2)),
            ],
        ] {
            let entries = entries.to_vec();
            assert_eq!(
                normalised(&entries, 1 << 46),
                Err(Error::NoMemory),
                "{entries:x?}"
            );
        }
    }

    #[test]
    fn too_many_pieces_are_an_error() {
        let entries: Vec<_> = (1..100)
            .map(|i| region(i * 0x2000, i * 0x2000 + 0x1000, Usable))
            .collect();
        assert_eq!(
            normalised(&entries, u64::MAX),
            Err(Error::TooManyRegions { max: 64 })
        );
    }

    fn kinds() -> impl Strategy<Value = MemoryRegionKind> {
        prop_oneof![
            3 => Just(Usable),
            1 => Just(Bootloader),
            2 => (0u32..8).prop_map(UnknownBios),
            2 => (0u32..16).prop_map(UnknownUefi),
        ]
    }

    proptest! {
        /// Page by page, the map says what the worst entry about it says.
        #[test]
        fn agrees_with_a_page_by_page_model(
            raw in prop::collection::vec((0u64..64 * 4, 0u64..64 * 4, kinds()), 0..24),
        ) {
            const QUARTER: u64 = PAGE / 4;
            let limit = 60 * PAGE;
            let entries: Vec<_> = raw
                .iter()
                .map(|&(start, end, kind)| region(start * QUARTER, end * QUARTER, kind))
                .collect();
            let model: Vec<Option<MemoryRegionKind>> = (0..60)
                .map(|page| {
                    let (from, to) = (page * PAGE, (page + 1) * PAGE);
                    let touching = entries.iter().filter(|e| e.start < e.end && e.start < to && from < e.end);
                    let mut worst: Option<MemoryRegionKind> = None;
                    for entry in touching {
                        let whole = entry.start <= from && to <= entry.end;
                        let kind = match entry.kind {
                            Usable if page == 0 && whole => Bootloader,
                            Usable if !whole => continue,
                            kind => kind,
                        };
                        if worst.is_none_or(|w| rank(kind) > rank(w)) {
                            worst = Some(kind);
                        }
                    }
                    worst
                })
                .collect();
            match normalised(&entries, limit) {
                Ok(map) => {
                    for (page, want) in (0u64..).zip(&model) {
                        let got = map
                            .iter()
                            .find(|r| r.start <= page * PAGE && page * PAGE < r.end)
                            .map(|r| r.kind);
                        prop_assert!(got == *want || (page == 0 && got == Some(Bootloader)), "page {page}: {got:?}, model {want:?}");
                    }
                }
                Err(error) => {
                    prop_assert_eq!(error, Error::NoMemory);
                    prop_assert!(!model.contains(&Some(Usable)));
                }
            }
        }

        /// What a loader takes for itself is memory, and nobody else's.
        #[test]
        fn free_memory_spares_what_is_occupied(
            e820 in prop::collection::vec((0u64..1 << 33, 0u64..1 << 32, kinds()), 0..12),
            occupied in prop::collection::vec((0u64..1 << 32, 1u64..1 << 30), 0..5),
        ) {
            let entries: Vec<_> = e820
                .iter()
                .map(|&(start, len, kind)| region(start, start + len, kind))
                .chain(occupied.iter().map(|&(start, len)| region(start, start + len, Bootloader)))
                .collect();
            let mut scratch = [MemoryRegion::empty(); 64];
            let found = largest_usable(entries.iter().copied(), 1 << 20, 1 << 32, &mut scratch);
            if let Ok(free) = found {
                prop_assert!(1 << 20 <= free.start && free.start < free.end && free.end <= 1 << 32);
                let inside = |at| entries.iter().any(|e| e.kind == Usable && e.start <= at && at < e.end);
                prop_assert!(inside(free.start) && inside(free.end - 1));
                for entry in entries.iter().filter(|e| e.kind != Usable && e.start < e.end) {
                    prop_assert!(entry.end <= free.start || free.end <= entry.start, "{entry:x?}");
                }
            }
        }

        /// Whatever the firmware says, the shape of the result holds.
        #[test]
        fn garbage_in_order_out(
            raw in prop::collection::vec((any::<u64>(), any::<u64>(), kinds()), 0..24),
            limit in any::<u64>(),
        ) {
            let entries: Vec<_> = raw.iter().map(|&(a, b, kind)| region(a, b, kind)).collect();
            if let Ok(map) = normalised(&entries, limit) {
                for r in &map {
                    prop_assert!(r.start < r.end && r.end <= limit);
                    prop_assert!(r.start % PAGE == 0 && r.end % PAGE == 0);
                }
                for pair in map.windows(2) {
                    prop_assert!(pair[0].end <= pair[1].start);
                    prop_assert!(pair[0].end < pair[1].start || pair[0].kind != pair[1].kind);
                }
                prop_assert!(top_of_ram(map.iter().copied(), limit) <= limit);
            }
        }
    }
}
