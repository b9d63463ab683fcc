//! A map of address ranges to their owners that refuses overlaps.

use alloc::vec::Vec;
use core::ops::Range;

/// A range that was asked for lies over one that is there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Overlap<T> {
    /// What was asked for.
    pub asked: Range<u64>,
    /// What is there.
    pub found: Range<u64>,
    /// Whose it is.
    pub owner: T,
}

/// Ranges in ascending order, none over another.
#[derive(Clone, Debug)]
pub struct RegionMap<T> {
    regions: Vec<(Range<u64>, T)>,
}

impl<T> Default for RegionMap<T> {
    fn default() -> Self {
        Self {
            regions: Vec::new(),
        }
    }
}

impl<T: Copy> RegionMap<T> {
    /// Removes everything.
    pub fn clear(&mut self) {
        self.regions.clear();
    }

    /// Adds a range. An empty one is nothing.
    ///
    /// # Errors
    /// The first range that it would lie over; the map is unchanged.
    pub fn insert(&mut self, range: Range<u64>, owner: T) -> Result<(), Overlap<T>> {
        if range.is_empty() {
            return Ok(());
        }
        let at = self
            .regions
            .partition_point(|(other, _)| other.end <= range.start);
        match self.regions.get(at) {
            Some((found, owner)) if found.start < range.end => Err(Overlap {
                asked: range,
                found: found.clone(),
                owner: *owner,
            }),
            _ => {
                self.regions.insert(at, (range, owner));
                Ok(())
            }
        }
    }

    /// The owner of `size` bytes at `address` and the offset in its range, if one has all of them.
    #[must_use]
    pub fn find(&self, address: u64, size: u8) -> Option<(T, u64)> {
        let at = self
            .regions
            .partition_point(|(range, _)| range.end <= address);
        let (range, owner) = self.regions.get(at)?;
        let offset = address.checked_sub(range.start)?;
        (range.end - address >= u64::from(size)).then_some((*owner, offset))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_found_and_overlaps_refused() {
        let mut map = RegionMap::default();
        map.insert(0x2000..0x3000, 'b').unwrap();
        map.insert(0x1000..0x2000, 'a').unwrap();
        map.insert(0x5000..0x5000, 'x').unwrap();
        map.insert(0x4000..0x4010, 'c').unwrap();
        for asked in [0x2fff..0x3001, 0x0..0x1001, 0x2400..0x2500, 0x0..0x9000] {
            let overlap = map.insert(asked.clone(), 'z').unwrap_err();
            assert_eq!(overlap.asked, asked);
        }
        assert_eq!(map.insert(0x2000..0x2001, 'z').unwrap_err().owner, 'b');
        for (address, size, found) in [
            (0x0fff, 1, None),
            (0x1000, 8, Some(('a', 0))),
            (0x1fff, 1, Some(('a', 0xfff))),
            (0x1fff, 2, None),
            (0x2ffc, 4, Some(('b', 0xffc))),
            (0x3000, 1, None),
            (0x400f, 1, Some(('c', 15))),
            (u64::MAX, 8, None),
        ] {
            assert_eq!(map.find(address, size), found, "{address:#x}");
        }
    }
}
