//! The final page tables: 4-level paging (Intel SDM Vol. 3A §4.5, AMD APM
//! Vol. 2 §5.3), built in frames that are identity mapped while we build.

use crate::{Error, Frames, PAGE};

const PRESENT: u64 = 1 << 0;
const WRITABLE: u64 = 1 << 1;
/// In an entry of the two middle levels: maps a page, is not a table.
const LARGE: u64 = 1 << 7;
const NO_EXECUTE: u64 = 1 << 63;
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;
const ENTRIES: usize = 512;

/// Bytes of a 2 MiB page.
pub(crate) const PAGE_2M: u64 = 2 << 20;
/// Bytes of a 1 GiB page.
pub(crate) const PAGE_1G: u64 = 1 << 30;

/// What the kernel may do with a page. That it may write *and* execute one
/// cannot be said.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Access {
    Read,
    Write,
    Execute,
}

impl Access {
    const fn bits(self) -> u64 {
        match self {
            Self::Read => PRESENT | NO_EXECUTE,
            Self::Write => PRESENT | WRITABLE | NO_EXECUTE,
            Self::Execute => PRESENT,
        }
    }
}

/// One address space.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Tables {
    /// Physical address of the top table: CR3.
    pub root: u64,
}

impl Tables {
    pub(crate) fn new(frames: &mut dyn Frames) -> Result<Self, Error> {
        let root = frames.allocate(1, "page tables")?;
        Ok(Self { root })
    }

    /// Maps `len` bytes at `virt` to `phys` with the largest pages that fit
    /// and are not larger than `largest`. A range that touches a mapping is
    /// an error; what was mapped up to there stays.
    pub(crate) fn map(
        &mut self,
        frames: &mut dyn Frames,
        virt: u64,
        phys: u64,
        len: u64,
        largest: u64,
        access: Access,
    ) -> Result<(), Error> {
        if !(virt | phys | len).is_multiple_of(PAGE) {
            return Err(Error::Mapping { virt });
        }
        let mut done = 0;
        while done < len {
            let (virt, phys, left) = (virt + done, phys + done, len - done);
            let size = [PAGE_1G, PAGE_2M, PAGE]
                .into_iter()
                .find(|size| *size <= largest.min(left) && (virt | phys) % size == 0)
                .unwrap_or(PAGE);
            self.map_one(frames, virt, phys, size, access)?;
            done += size;
        }
        Ok(())
    }

    fn map_one(
        &mut self,
        frames: &mut dyn Frames,
        virt: u64,
        phys: u64,
        size: u64,
        access: Access,
    ) -> Result<(), Error> {
        let (leaf, large) = match size {
            PAGE_1G => (30, LARGE),
            PAGE_2M => (21, LARGE),
            _ => (12, 0),
        };
        let mut table = self.root;
        let mut shift = 39;
        while shift > leaf {
            let entry = read(frames, table, virt, shift);
            if entry & LARGE != 0 {
                return Err(Error::Mapping { virt });
            }
            table = if entry & PRESENT != 0 {
                entry & ADDRESS
            } else {
                let fresh = frames.allocate(1, "page tables")?;
                write(frames, table, virt, shift, fresh | PRESENT | WRITABLE);
                fresh
            };
            shift -= 9;
        }
        if read(frames, table, virt, leaf) != 0 {
            return Err(Error::Mapping { virt });
        }
        write(frames, table, virt, leaf, phys | access.bits() | large);
        Ok(())
    }

    /// Where `virt` leads: physical address and the entry's bits, as the
    /// processor would walk.
    #[cfg(test)]
    pub(crate) fn walk(self, frames: &mut dyn Frames, virt: u64) -> Option<(u64, Access, u64)> {
        let mut table = self.root;
        for shift in [39, 30, 21, 12] {
            let entry = read(frames, table, virt, shift);
            if entry & PRESENT == 0 {
                return None;
            }
            if shift == 12 || entry & LARGE != 0 {
                let size = 1 << shift;
                let access = match (entry & WRITABLE != 0, entry & NO_EXECUTE == 0) {
                    (true, true) => panic!("{virt:#x} is writable and executable"),
                    (true, false) => Access::Write,
                    (false, true) => Access::Execute,
                    (false, false) => Access::Read,
                };
                return Some((
                    entry & ADDRESS & !(size - 1) | virt & (size - 1),
                    access,
                    size,
                ));
            }
            table = entry & ADDRESS;
        }
        None
    }
}

/// The index that bits `shift` and up of `virt` select, in bytes.
fn offset(virt: u64, shift: u32) -> u64 {
    (virt >> shift) % ENTRIES as u64 * 8
}

fn read(frames: &mut dyn Frames, table: u64, virt: u64, shift: u32) -> u64 {
    let mut entry = [0; 8];
    entry.copy_from_slice(frames.bytes(table + offset(virt, shift), 8));
    u64::from_le_bytes(entry)
}

fn write(frames: &mut dyn Frames, table: u64, virt: u64, shift: u32, entry: u64) {
    frames
        .bytes(table + offset(virt, shift), 8)
        .copy_from_slice(&entry.to_le_bytes());
}
