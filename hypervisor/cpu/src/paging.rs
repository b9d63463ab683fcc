//! The host's own page tables (Intel SDM Vol. 3A §4.5): what the loader left is checked, cleaned
//! of its scaffold, and extended by guarded stacks and devices' registers.

use arch::{HostPhysAddr, PAGE_SIZE, PhysMemory};
use core::arch::asm;

const PRESENT: u64 = 1;
const WRITABLE: u64 = 1 << 1;
const WRITE_THROUGH: u64 = 1 << 3;
const CACHE_DISABLE: u64 = 1 << 4;
const LARGE: u64 = 1 << 7;
const NO_EXECUTE: u64 = 1 << 63;
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

/// What the tables hold.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Audit {
    /// Leaf entries of any size.
    pub leaves: u64,
    /// Leaves that can be written and executed.
    pub writable_executable: u64,
    /// Leaves in the lower half: nothing of the hypervisor's is there.
    pub lower_half: u64,
    /// Leaves that can be executed.
    pub executable: u64,
}

/// The root of the tables in use.
#[must_use]
pub fn root() -> HostPhysAddr {
    let cr3: u64;
    // SAFETY: reading CR3 in ring 0 changes nothing.
    unsafe { asm!("mov {}, cr3", out(reg) cr3, options(nomem, nostack, preserves_flags)) };
    HostPhysAddr::new(cr3 & ADDRESS)
}

fn flush() {
    // SAFETY: reloading CR3 with its own value only drops cached translations.
    unsafe { asm!("mov {0}, cr3", "mov cr3, {0}", out(reg) _, options(nostack, preserves_flags)) };
}

/// Removes everything below the canonical hole: the page on which the loader switched tables.
///
/// # Safety
/// The tables at `root` are in use, and nothing lives in the lower half any more.
pub unsafe fn clear_lower_half(phys: &impl PhysMemory, root: HostPhysAddr) {
    for index in 0..256 {
        phys.write_u64(root.wrapping_add(8 * index), 0);
    }
    flush();
}

/// Walks all tables.
#[must_use]
pub fn audit(phys: &impl PhysMemory, root: HostPhysAddr) -> Audit {
    fn walk(
        phys: &impl PhysMemory,
        table: HostPhysAddr,
        level: u32,
        lower: bool,
        (writable, executable): (bool, bool),
        audit: &mut Audit,
    ) {
        for index in 0..512 {
            let entry = phys.read_u64(table.wrapping_add(8 * index));
            if entry & PRESENT == 0 {
                continue;
            }
            let lower = if level == 4 { index < 256 } else { lower };
            let writable = writable && entry & WRITABLE != 0;
            let executable = executable && entry & NO_EXECUTE == 0;
            if level > 1 && entry & LARGE == 0 {
                let next = HostPhysAddr::new(entry & ADDRESS);
                walk(phys, next, level - 1, lower, (writable, executable), audit);
            } else {
                audit.leaves += 1;
                audit.writable_executable += u64::from(writable && executable);
                audit.executable += u64::from(executable);
                audit.lower_half += u64::from(lower);
            }
        }
    }
    let mut audit = Audit::default();
    walk(phys, root, 4, false, (true, true), &mut audit);
    audit
}

/// How a page is cached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Caching {
    /// As memory is.
    WriteBack,
    /// Not at all, as a device's registers must be: entry 3 of the PAT's power-on values (Intel SDM
    /// Vol. 3A §12.12.4), which the hypervisor keeps.
    Uncached,
}

/// Maps one writable, non-executable page at `at`; `false` when something is mapped there or
/// there is no frame for a table.
///
/// # Safety
/// The tables at `root` are in use; `frame` belongs to the caller.
#[must_use]
pub unsafe fn map_page(
    phys: &impl PhysMemory,
    root: HostPhysAddr,
    at: u64,
    (frame, caching): (HostPhysAddr, Caching),
    allocate: &mut impl FnMut() -> Option<HostPhysAddr>,
) -> bool {
    let mut table = root;
    for level in (2..=4).rev() {
        let slot = table.wrapping_add(8 * (at >> (12 + 9 * (level - 1)) & 511));
        let entry = phys.read_u64(slot);
        if entry & PRESENT == 0 {
            let Some(next) = allocate() else { return false };
            phys.zero(next, PAGE_SIZE);
            phys.write_u64(slot, next.as_u64() | PRESENT | WRITABLE);
            table = next;
        } else if entry & LARGE != 0 {
            return false;
        } else {
            table = HostPhysAddr::new(entry & ADDRESS);
        }
    }
    let slot = table.wrapping_add(8 * (at >> 12 & 511));
    if phys.read_u64(slot) & PRESENT != 0 {
        return false;
    }
    let caching = match caching {
        Caching::WriteBack => 0,
        Caching::Uncached => WRITE_THROUGH | CACHE_DISABLE,
    };
    let rights = PRESENT | WRITABLE | NO_EXECUTE;
    phys.write_u64(slot, frame.as_u64() | rights | caching);
    true
}
