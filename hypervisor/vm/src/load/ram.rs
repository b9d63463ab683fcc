//! A fresh guest's RAM while it is being filled: who has which range.

use alloc::vec::Vec;
use core::ops::Range;

use arch::{GuestMemory, GuestPhysAddr};

use super::{Copies, Image, Problem};
use crate::layout::MemoryLayout;

/// Where to look for room.
#[derive(Clone, Debug)]
pub(super) enum Place {
    /// Exactly here.
    At(u64),
    /// As low as possible in this range.
    Lowest(Range<u64>),
    /// As high as possible in this range.
    Highest(Range<u64>),
}

/// Conventional memory for boot information: above what firmware and boot sectors use, below the
/// reserved end.
pub(super) const BOOT_AREA: Range<u64> = 0x7000..0x9_0000;
/// All addresses that 32 bits reach.
pub(super) const BELOW_4G: Range<u64> = BOOT_AREA.start..1 << 32;

struct Claim {
    range: Range<u64>,
    what: &'static str,
}

/// RAM with its claims. What comes from images is only noted down: it may be much.
pub(super) struct Ram<'a, 'i> {
    pub(super) layout: &'a MemoryLayout,
    memory: &'a mut dyn GuestMemory,
    claims: Vec<Claim>,
    pub(super) copies: Copies<'i>,
}

impl<'a, 'i> Ram<'a, 'i> {
    pub(super) fn new(layout: &'a MemoryLayout, memory: &'a mut dyn GuestMemory) -> Self {
        Self {
            layout,
            memory,
            claims: Vec::new(),
            copies: Copies::default(),
        }
    }

    /// KiB that the guest may use, for errors.
    fn kib(&self) -> u64 {
        self.layout
            .usable()
            .map(|range| range.end - range.start)
            .sum::<u64>()
            >> 10
    }

    /// Takes `size` bytes aligned to `align` (a power of two) at `place`; gives their address.
    pub(super) fn claim(
        &mut self,
        what: &'static str,
        size: u64,
        align: u64,
        place: Place,
    ) -> Result<u64, Problem> {
        let size = size.max(1);
        let start = match place {
            Place::At(start) => {
                self.check(what, start, size)?;
                start
            }
            Place::Lowest(within) => self.search(size, align, &within, false, what)?,
            Place::Highest(within) => self.search(size, align, &within, true, what)?,
        };
        self.claims.push(Claim {
            range: start..start + size,
            what,
        });
        Ok(start)
    }

    /// Whether `size` bytes at `start` are free RAM.
    pub(super) fn check(&self, what: &'static str, start: u64, size: u64) -> Result<(), Problem> {
        let end = start.saturating_add(size);
        let inside = |range: Range<u64>| range.start <= start && end <= range.end && start < end;
        if !self.layout.usable().any(inside) {
            return Err(Problem::OutsideRam {
                what,
                start,
                end,
                memory: self.kib(),
            });
        }
        match self
            .claims
            .iter()
            .find(|c| c.range.start < end && start < c.range.end)
        {
            Some(claim) => Err(Problem::Overlap {
                what,
                start,
                end,
                other: claim.what,
            }),
            None => Ok(()),
        }
    }

    /// The lowest or highest free place: at an edge of usable RAM or of a claim, aligned.
    fn search(
        &self,
        size: u64,
        align: u64,
        within: &Range<u64>,
        highest: bool,
        what: &'static str,
    ) -> Result<u64, Problem> {
        let usable = self.layout.usable().filter_map(|range| {
            let range = range.start.max(within.start)..range.end.min(within.end);
            (!range.is_empty()).then_some(range)
        });
        let fits = |start: &u64| {
            start.checked_add(size).is_some_and(|end| end <= within.end)
                && *start >= within.start
                && self.check(what, *start, size).is_ok()
        };
        let found = if highest {
            usable
                .map(|range| range.end)
                .chain(self.claims.iter().map(|claim| claim.range.start))
                .filter_map(|end| Some(end.checked_sub(size)? & !(align - 1)))
                .filter(fits)
                .max()
        } else {
            usable
                .map(|range| range.start)
                .chain(self.claims.iter().map(|claim| claim.range.end))
                .filter_map(|start| start.checked_next_multiple_of(align))
                .filter(fits)
                .min()
        };
        found.ok_or(Problem::NoRoom {
            what,
            size,
            memory: self.kib(),
        })
    }

    /// Writes into RAM that was claimed.
    pub(super) fn write(&mut self, at: u64, data: &[u8]) -> Result<(), Problem> {
        self.memory
            .write(GuestPhysAddr::new(at), data)
            .map_err(Problem::Memory)
    }

    /// Has a part of an image copied into RAM that was claimed.
    pub(super) fn copy(&mut self, at: u64, image: &Image<'i>, data: &'i [u8]) {
        self.copies.push(at, Image { data, ..*image });
    }

    /// Claims room for an image and has it copied there.
    pub(super) fn put_image(
        &mut self,
        what: &'static str,
        image: &Image<'i>,
        place: Place,
    ) -> Result<u64, Problem> {
        let at = self.claim(what, image.data.len() as u64, arch::PAGE_SIZE, place)?;
        self.copy(at, image, image.data);
        Ok(at)
    }

    /// Claims room for `data` and writes it there.
    pub(super) fn put(
        &mut self,
        what: &'static str,
        data: &[u8],
        align: u64,
        place: Place,
    ) -> Result<u64, Problem> {
        let at = self.claim(what, data.len() as u64, align, place)?;
        self.write(at, data)?;
        Ok(at)
    }

    /// Writes a string with a terminating zero into the boot area.
    pub(super) fn put_string(&mut self, what: &'static str, text: &str) -> Result<u64, Problem> {
        let at = self.claim(what, text.len() as u64 + 1, 16, Place::Lowest(BOOT_AREA))?;
        self.write(at, text.as_bytes())?;
        self.write(at + text.len() as u64, &[0])?;
        Ok(at)
    }
}
