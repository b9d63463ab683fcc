//! The walk of a guest's own page tables: linear to guest-physical addresses in every paging mode
//! (Intel SDM Vol. 3A §4.3–4.7, AMD APM Vol. 2 §5).
//!
//! The hardware walks these tables itself; software does it only to reach what an exit does not
//! tell: instruction bytes, and the operands of emulated instructions. On SVM without next-RIP
//! saving every CPUID or MSR exit comes by here, so the walk is one loop without allocation and
//! with one load a level; everything rare (faults, setting accessed and dirty bits) is apart.

use arch::{
    Access, ControlRegister, Cr0, Cr4, Efer, GuestMemory, GuestPhysAddr, MemoryFault, RFlags, Vcpu,
};

const PRESENT: u64 = 1 << 0;
const WRITABLE: u64 = 1 << 1;
const USER: u64 = 1 << 2;
const ACCESSED: u64 = 1 << 5;
const DIRTY: u64 = 1 << 6;
const LARGE: u64 = 1 << 7;
const NO_EXECUTE: u64 = 1 << 63;
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

/// How often a walk starts again because another vCPU changed an entry under it. Past that the
/// accessed and dirty bits of this one access are given up.
const RACES: u32 = 16;

/// What of a vCPU's state takes part in address translation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PagingState {
    /// CR0.
    pub cr0: u64,
    /// CR3.
    pub cr3: u64,
    /// CR4.
    pub cr4: u64,
    /// IA32_EFER.
    pub efer: u64,
    /// RFLAGS.AC: with SMAP, supervisor data accesses to user pages are allowed.
    pub ac: bool,
    /// Current privilege level. Implicit supervisor accesses count as level 0.
    pub cpl: u8,
    /// PKRU, all-allowing (0) where it is not known: an access that the hardware let through to
    /// an exit has passed its protection keys already.
    pub pkru: u32,
    /// Physical-address width of the guest's CPUID; entry bits from here to 51 are reserved.
    pub phys_bits: u8,
}

impl PagingState {
    /// The state for this vCPU's explicit accesses.
    pub fn of<V: Vcpu + ?Sized>(vcpu: &V) -> Self {
        Self {
            cr0: vcpu.cr(ControlRegister::Cr0),
            cr3: vcpu.cr(ControlRegister::Cr3),
            cr4: vcpu.cr(ControlRegister::Cr4),
            efer: vcpu.efer(),
            ac: vcpu.rflags().contains(RFlags::AC),
            cpl: vcpu.cpl(),
            pkru: 0,
            phys_bits: 52,
        }
    }

    /// The same for accesses the CPU makes on its own behalf: descriptor tables, TSS. They are
    /// supervisor accesses at any privilege level, and RFLAGS.AC does not lift SMAP for them.
    #[must_use]
    pub const fn implicit_supervisor(self) -> Self {
        Self {
            ac: false,
            cpl: 0,
            ..self
        }
    }

    const fn cr4_has(&self, bit: Cr4) -> bool {
        self.cr4 & bit.bits() != 0
    }

    const fn efer_has(&self, bit: Efer) -> bool {
        self.efer & bit.bits() != 0
    }

    /// Whether `linear` is canonical for the width of linear addresses in use. Asked only in
    /// 64-bit mode; elsewhere linear addresses have 32 bits.
    #[must_use]
    pub const fn canonical(&self, linear: u64) -> bool {
        let shift = if self.cr4_has(Cr4::LA57) { 7 } else { 16 };
        (((linear << shift) as i64) >> shift) as u64 == linear
    }
}

/// Why a linear address has no translation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TranslateFault {
    /// The guest gets a #PF.
    PageFault {
        /// The error code to push (Intel SDM Vol. 3A §4.7).
        error_code: u32,
        /// The linear address, for CR2.
        linear: u64,
    },
    /// A paging structure does not lie in RAM, or its frame cannot be had.
    Memory(MemoryFault),
}

/// What a walk found: the entry that maps the page and the rights of all entries together.
struct Walked {
    leaf: u64,
    /// AND of all entries, with the sense of NX turned so that 1 allows.
    rights: u64,
    /// log2 of the page's size.
    shift: u32,
}

enum Miss {
    NotPresent,
    Reserved,
    Raced,
    Memory(MemoryFault),
}

impl From<MemoryFault> for Miss {
    fn from(fault: MemoryFault) -> Self {
        Self::Memory(fault)
    }
}

/// Translates `linear` for `access`, with all checks, and sets accessed and dirty bits as the
/// hardware would. The caller has checked that `linear` is canonical.
///
/// # Errors
/// The page fault that the guest is to get, or tables outside RAM.
pub fn translate<M: GuestMemory + ?Sized>(
    cpu: &PagingState,
    mem: &mut M,
    linear: u64,
    access: Access,
) -> Result<GuestPhysAddr, TranslateFault> {
    if cpu.cr0 & Cr0::PG.bits() == 0 {
        return Ok(GuestPhysAddr::new(linear & 0xffff_ffff));
    }
    match quick(cpu, mem, linear, access) {
        Some(addr) => Ok(addr),
        None => translate_in_full(cpu, mem, linear, access),
    }
}

/// The walk that nearly always is enough: 4-level tables with NX, in which nothing is left to
/// mark and every level allows the access by itself. `None` if anything is otherwise.
#[inline(always)]
pub(crate) fn quick<M: GuestMemory + ?Sized>(
    cpu: &PagingState,
    mem: &mut M,
    linear: u64,
    access: Access,
) -> Option<GuestPhysAddr> {
    let mode = Efer::LMA.union(Efer::NXE).bits();
    if cpu.efer & mode != mode || cpu.cr4_has(Cr4::LA57) {
        return None;
    }
    let mut wanted = PRESENT | ACCESSED;
    let mut unwanted = ADDRESS & (u64::MAX << cpu.phys_bits.min(52));
    if cpu.cpl == 3 {
        wanted |= USER;
    }
    if access.write {
        wanted |= WRITABLE;
    }
    if access.execute {
        unwanted |= NO_EXECUTE;
    }
    let relevant = wanted | unwanted;
    let mut user = USER;
    let mut table = cpu.cr3 & ADDRESS;
    let mut shift = 39;
    let leaf = loop {
        let at = GuestPhysAddr::new(table + (linear >> shift << 3 & 0xff8));
        let entry = mem.read_u64(at).ok()?;
        if (entry ^ wanted) & relevant != 0 {
            return None;
        }
        user &= entry;
        if shift == 12 {
            break entry;
        }
        if entry & LARGE != 0 {
            let reserved = ((1 << shift) - 1) & ADDRESS & !0x1000;
            if shift == 39 || entry & reserved != 0 {
                return None;
            }
            break entry;
        }
        table = entry & ADDRESS;
        shift -= 9;
    };
    let guarded = Cr4::SMEP.union(Cr4::SMAP).union(Cr4::PKE).bits();
    if (access.write && leaf & DIRTY == 0)
        || (user != 0 && cpu.cr4 & guarded != 0 && !(access.execute && cpu.cpl == 3))
    {
        return None;
    }
    let offset = (1 << shift) - 1;
    Some(GuestPhysAddr::new(
        leaf & ADDRESS & !offset | linear & offset,
    ))
}

/// Every mode, every fault, and the marking of entries.
#[inline(never)]
fn translate_in_full<M: GuestMemory + ?Sized>(
    cpu: &PagingState,
    mem: &mut M,
    linear: u64,
    access: Access,
) -> Result<GuestPhysAddr, TranslateFault> {
    let walked = walk::<M, false>(cpu, mem, linear, access.write)
        .map_err(|miss| fault(cpu, linear, access, &miss))?;
    if let Some(key) = denied(cpu, &walked, access) {
        return Err(page_fault(cpu, linear, access, PF_PROTECTION | key));
    }
    let dirty = if access.write { DIRTY } else { 0 };
    if walked.rights & ACCESSED == 0 || walked.leaf & dirty != dirty {
        return translate_and_mark(cpu, mem, linear, access);
    }
    Ok(page_address(cpu, &walked, linear))
}

/// The same again, setting the accessed and dirty bits on the way.
#[cold]
#[inline(never)]
fn translate_and_mark<M: GuestMemory + ?Sized>(
    cpu: &PagingState,
    mem: &mut M,
    linear: u64,
    access: Access,
) -> Result<GuestPhysAddr, TranslateFault> {
    for _ in 0..RACES {
        // Rights first: an access that is denied must not set a dirty bit.
        let walked = walk::<M, false>(cpu, mem, linear, access.write)
            .map_err(|miss| fault(cpu, linear, access, &miss))?;
        if let Some(key) = denied(cpu, &walked, access) {
            return Err(page_fault(cpu, linear, access, PF_PROTECTION | key));
        }
        match walk::<M, true>(cpu, mem, linear, access.write) {
            Ok(marked) if marked.leaf | ACCESSED | DIRTY == walked.leaf | ACCESSED | DIRTY => {
                return Ok(page_address(cpu, &marked, linear));
            }
            Ok(_) | Err(Miss::Raced) => {}
            Err(miss) => return Err(fault(cpu, linear, access, &miss)),
        }
    }
    let walked = walk::<M, false>(cpu, mem, linear, access.write)
        .map_err(|miss| fault(cpu, linear, access, &miss))?;
    match denied(cpu, &walked, access) {
        Some(key) => Err(page_fault(cpu, linear, access, PF_PROTECTION | key)),
        None => Ok(page_address(cpu, &walked, linear)),
    }
}

#[inline]
fn page_address(cpu: &PagingState, walked: &Walked, linear: u64) -> GuestPhysAddr {
    let offset = (1 << walked.shift) - 1;
    let frame = if walked.shift == 22 && !wide(cpu) {
        pse36(walked.leaf)
    } else {
        walked.leaf & ADDRESS & !offset
    };
    GuestPhysAddr::new(frame | (linear & offset))
}

/// Whether entries have eight bytes.
const fn wide(cpu: &PagingState) -> bool {
    cpu.efer_has(Efer::LMA) || cpu.cr4_has(Cr4::PAE)
}

/// The frame of a 4 MiB page: bits 20:13 of the entry are bits 39:32 of the address
/// (Intel SDM Vol. 3A table 4-4).
const fn pse36(entry: u64) -> u64 {
    (entry & 0xffc0_0000) | ((entry >> 13) & 0xff) << 32
}

#[inline]
fn walk<M: GuestMemory + ?Sized, const MARK: bool>(
    cpu: &PagingState,
    mem: &mut M,
    linear: u64,
    write: bool,
) -> Result<Walked, Miss> {
    let mut reserved = ADDRESS & (u64::MAX << cpu.phys_bits.min(52));
    if !cpu.efer_has(Efer::NXE) {
        reserved |= NO_EXECUTE;
    }
    if cpu.efer_has(Efer::LMA) {
        let top = if cpu.cr4_has(Cr4::LA57) { 48 } else { 39 };
        return descend::<M, MARK>(mem, cpu.cr3 & ADDRESS, linear, top, reserved, write);
    }
    let linear = linear & 0xffff_ffff;
    if cpu.cr4_has(Cr4::PAE) {
        let reserved = reserved | 0x7ff0_0000_0000_0000;
        // The four page-directory-pointer entries hold no rights and no accessed bit; bits 2:1
        // and 8:5 are reserved. QEMU's CPU sets bit 5 all the same, so 6:5 are let through.
        let at = (cpu.cr3 & 0xffff_ffe0) + (linear >> 30) * 8;
        let entry = mem.read_u64(GuestPhysAddr::new(at))?;
        if entry & PRESENT == 0 {
            return Err(Miss::NotPresent);
        }
        if entry & (reserved | NO_EXECUTE | 0x186) != 0 {
            return Err(Miss::Reserved);
        }
        return descend::<M, MARK>(mem, entry & ADDRESS, linear, 21, reserved, write);
    }
    descend_narrow::<M, MARK>(cpu, mem, linear, write)
}

/// The levels of eight-byte entries, from the one that `shift` names down to the page.
#[inline]
fn descend<M: GuestMemory + ?Sized, const MARK: bool>(
    mem: &mut M,
    mut table: u64,
    linear: u64,
    mut shift: u32,
    reserved: u64,
    write: bool,
) -> Result<Walked, Miss> {
    let mut rights = u64::MAX;
    loop {
        let at = GuestPhysAddr::new(table + ((linear >> shift) & 0x1ff) * 8);
        let mut entry = mem.read_u64(at)?;
        if (entry ^ PRESENT) & (reserved | PRESENT) != 0 {
            return Err(malformed(entry));
        }
        let leaf = shift == 12 || entry & LARGE != 0;
        if leaf && shift > 12 {
            // No page is larger than 1 GiB, and below the PAT bit (12) the rest of the offset
            // is reserved.
            let low = ((1 << shift) - 1) & !0x1fff;
            if shift > 30 || entry & low & ADDRESS != 0 {
                return Err(Miss::Reserved);
            }
        }
        if MARK {
            entry = mark(mem, at, 8, entry, leaf && write)?;
        }
        rights &= entry ^ NO_EXECUTE;
        if leaf {
            return Ok(Walked {
                leaf: entry,
                rights,
                shift,
            });
        }
        table = entry & ADDRESS;
        shift -= 9;
    }
}

/// 32-bit paging: two levels of four-byte entries.
#[cold]
fn descend_narrow<M: GuestMemory + ?Sized, const MARK: bool>(
    cpu: &PagingState,
    mem: &mut M,
    linear: u64,
    write: bool,
) -> Result<Walked, Miss> {
    let mut rights = u64::MAX;
    let mut table = cpu.cr3 & 0xffff_f000;
    for shift in [22, 12] {
        let at = GuestPhysAddr::new(table + ((linear >> shift) & 0x3ff) * 4);
        let mut entry = u64::from(mem.read_u32(at)?);
        if entry & PRESENT == 0 {
            return Err(Miss::NotPresent);
        }
        let large = shift == 22 && entry & LARGE != 0 && cpu.cr4_has(Cr4::PSE);
        if large && (entry & (1 << 21) != 0 || pse36(entry) >> cpu.phys_bits.min(52) != 0) {
            return Err(Miss::Reserved);
        }
        let leaf = large || shift == 12;
        if MARK {
            entry = mark(mem, at, 4, entry, leaf && write)?;
        }
        rights &= entry | NO_EXECUTE;
        if leaf {
            return Ok(Walked {
                leaf: entry,
                rights,
                shift,
            });
        }
        table = entry & 0xffff_f000;
    }
    Err(Miss::NotPresent)
}

#[cold]
fn malformed(entry: u64) -> Miss {
    if entry & PRESENT == 0 {
        Miss::NotPresent
    } else {
        Miss::Reserved
    }
}

/// Sets the accessed bit, and the dirty bit if asked, unless the entry changed meanwhile. An
/// entry in ROM stays as it is, as on hardware.
fn mark<M: GuestMemory + ?Sized>(
    mem: &mut M,
    at: GuestPhysAddr,
    size: u8,
    entry: u64,
    dirty: bool,
) -> Result<u64, Miss> {
    let marked = entry | ACCESSED | if dirty { DIRTY } else { 0 };
    if marked == entry {
        return Ok(entry);
    }
    match mem.compare_exchange(at, size, entry, marked) {
        Ok(found) if found == entry => Ok(marked),
        Ok(_) => Err(Miss::Raced),
        Err(MemoryFault::ReadOnly(_)) => Ok(entry),
        Err(fault) => Err(Miss::Memory(fault)),
    }
}

const PF_PROTECTION: u32 = 1 << 0;
const PF_WRITE: u32 = 1 << 1;
const PF_USER: u32 = 1 << 2;
const PF_RESERVED: u32 = 1 << 3;
const PF_FETCH: u32 = 1 << 4;
const PF_KEY: u32 = 1 << 5;

/// `None` if the rights allow the access, else what its protection key adds to the error code
/// (Intel SDM Vol. 3A §4.6).
#[inline]
fn denied(cpu: &PagingState, walked: &Walked, access: Access) -> Option<u32> {
    let user_page = walked.rights & USER != 0;
    let writable = walked.rights & WRITABLE != 0;
    let protect = cpu.cr0 & Cr0::WP.bits() != 0;
    let ok = if access.execute {
        walked.rights & NO_EXECUTE != 0
            && if cpu.cpl == 3 {
                user_page
            } else {
                !(user_page && cpu.cr4_has(Cr4::SMEP))
            }
    } else if cpu.cpl == 3 {
        user_page && (writable || !access.write)
    } else {
        let prevented = user_page && cpu.cr4_has(Cr4::SMAP) && !cpu.ac;
        (writable || !access.write || !protect) && !prevented
    };
    if !ok {
        return Some(0);
    }
    if user_page && cpu.cr4_has(Cr4::PKE) && cpu.efer_has(Efer::LMA) && !access.execute {
        let key = cpu.pkru >> (2 * ((walked.leaf >> 59) & 15));
        let no_write = key & 2 != 0 && access.write && (cpu.cpl == 3 || protect);
        if key & 1 != 0 || no_write {
            return Some(PF_KEY);
        }
    }
    None
}

#[cold]
fn fault(cpu: &PagingState, linear: u64, access: Access, miss: &Miss) -> TranslateFault {
    match *miss {
        Miss::NotPresent | Miss::Raced => page_fault(cpu, linear, access, 0),
        Miss::Reserved => page_fault(cpu, linear, access, PF_PROTECTION | PF_RESERVED),
        Miss::Memory(fault) => TranslateFault::Memory(fault),
    }
}

#[cold]
fn page_fault(cpu: &PagingState, linear: u64, access: Access, cause: u32) -> TranslateFault {
    let mut error_code = cause;
    if access.write {
        error_code |= PF_WRITE;
    }
    if cpu.cpl == 3 {
        error_code |= PF_USER;
    }
    // The fetch bit exists only where fetches have rights of their own.
    let fetch_rights = cpu.cr4_has(Cr4::SMEP) || (wide(cpu) && cpu.efer_has(Efer::NXE));
    if access.execute && fetch_rights {
        error_code |= PF_FETCH;
    }
    let linear = if cpu.efer_has(Efer::LMA) {
        linear
    } else {
        linear & 0xffff_ffff
    };
    TranslateFault::PageFault { error_code, linear }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mock::FlatMemory;

    const ROOT: u64 = 0x1000;
    /// Linear address that takes the entries below in every mode: offset 0x678 in its page.
    const LINEAR: u64 = 0x0040_3678;

    fn state(cr4: Cr4, efer: Efer) -> PagingState {
        PagingState {
            cr0: (Cr0::PG | Cr0::PE | Cr0::WP).bits(),
            cr3: ROOT,
            cr4: cr4.bits(),
            efer: efer.bits(),
            ac: false,
            cpl: 0,
            pkru: 0,
            phys_bits: 40,
        }
    }

    fn long() -> PagingState {
        state(Cr4::PAE, Efer::LME | Efer::LMA | Efer::NXE)
    }

    /// Four-level tables at 0x1000, 0x2000, … that map [`LINEAR`] with these entries, from the top.
    fn tables(entries: [u64; 4]) -> FlatMemory {
        let mut mem = FlatMemory::new(0x10_0000);
        for (level, entry) in (0u64..).zip(entries) {
            let table = ROOT + level * 0x1000;
            mem.set_u64(table + (LINEAR >> (39 - 9 * level) & 0x1ff) * 8, entry);
        }
        mem
    }

    /// Everything allowed to everybody, marked already.
    fn open() -> [u64; 4] {
        [0x2067, 0x3067, 0x4067, 0xabc_d067]
    }

    fn code(fault: Result<GuestPhysAddr, TranslateFault>) -> Option<u32> {
        match fault {
            Err(TranslateFault::PageFault { error_code, linear }) => {
                assert_eq!(linear, LINEAR);
                Some(error_code)
            }
            Err(fault) => panic!("{fault:?}"),
            Ok(addr) => {
                assert_eq!(addr.as_u64(), 0xabc_d678);
                None
            }
        }
    }

    #[test]
    fn without_paging_addresses_are_physical() {
        let mut cpu = long();
        cpu.cr0 = Cr0::PE.bits();
        let mut mem = FlatMemory::new(0);
        let addr = translate(&cpu, &mut mem, 0x1_2345_6789, Access::WRITE);
        assert_eq!(addr, Ok(GuestPhysAddr::new(0x2345_6789)));
    }

    #[test]
    fn four_levels_cost_four_loads() {
        let mut mem = tables(open());
        assert_eq!(
            code(translate(&long(), &mut mem, LINEAR, Access::WRITE)),
            None
        );
        assert_eq!(mem.accesses, 4);
    }

    #[test]
    fn large_pages() {
        let mut mem = tables([0x2067, 0x3067, 0x20_00e7, 0]);
        let addr = translate(&long(), &mut mem, LINEAR, Access::WRITE);
        assert_eq!(addr, Ok(GuestPhysAddr::new(0x20_3678)));
        let mut mem = tables([0x2067, 0x1_4000_00e7, 0, 0]);
        let addr = translate(&long(), &mut mem, LINEAR, Access::WRITE);
        assert_eq!(addr, Ok(GuestPhysAddr::new(0x1_4040_3678)));
    }

    #[test]
    fn five_levels() {
        let mut mem = tables([0x2067, 0x3067, 0x4067, 0x5067]);
        mem.set_u64(0x5000 + (LINEAR >> 12 & 0x1ff) * 8, 0xabc_d067);
        // The top level takes index 0 of each: the entries move down one level.
        for level in 0..4u64 {
            let table = ROOT + level * 0x1000;
            mem.set_u64(
                table + (LINEAR >> (48 - 9 * level) & 0x1ff) * 8,
                table + 0x1067,
            );
        }
        let mut cpu = long();
        cpu.cr4 |= Cr4::LA57.bits();
        assert_eq!(code(translate(&cpu, &mut mem, LINEAR, Access::READ)), None);
        assert_eq!(mem.accesses, 5);
        assert!(cpu.canonical(1 << 55) && !cpu.canonical(1 << 56));
        assert!(!long().canonical(1 << 47) && long().canonical(u64::MAX << 47));
    }

    #[test]
    fn pae() {
        let mut mem = FlatMemory::new(0x10_0000);
        let cpu = PagingState {
            cr3: 0x1020,
            ..state(Cr4::PAE, Efer::NXE)
        };
        mem.set_u64(0x1020, 0x2001);
        mem.set_u64(0x2000 + 2 * 8, 0x3067);
        mem.set_u64(0x3000 + 3 * 8, 0xabc_d067);
        assert_eq!(code(translate(&cpu, &mut mem, LINEAR, Access::WRITE)), None);
        mem.set_u64(0x2000 + 2 * 8, 0xff_ffe0_00e7);
        let addr = translate(&cpu, &mut mem, LINEAR, Access::WRITE);
        assert_eq!(addr, Ok(GuestPhysAddr::new(0xff_ffe0_3678)));
        // Bits 62:52 are reserved here, unlike with four levels; and 2:1 of the pointers.
        mem.set_u64(0x2000 + 2 * 8, 0x3067 | 1 << 52);
        assert_eq!(
            code(translate(&cpu, &mut mem, LINEAR, Access::READ)),
            Some(9)
        );
        mem.set_u64(0x1020, 0x2003);
        assert_eq!(
            code(translate(&cpu, &mut mem, LINEAR, Access::READ)),
            Some(9)
        );
        mem.set_u64(0x1020, 0);
        assert_eq!(
            code(translate(&cpu, &mut mem, LINEAR, Access::READ)),
            Some(0)
        );
    }

    #[test]
    fn narrow_entries() {
        let mut mem = FlatMemory::new(0x10_0000);
        let cpu = state(Cr4::PSE, Efer::empty());
        mem.load(0x1000 + 4, &0x2067u32.to_le_bytes());
        mem.load(0x2000 + 3 * 4, &0x0abc_d067u32.to_le_bytes());
        assert_eq!(code(translate(&cpu, &mut mem, LINEAR, Access::WRITE)), None);
        // 4 MiB; with PSE-36 bits 20:13 are address bits 39:32.
        mem.load(0x1000 + 4, &0x00c0_00e7u32.to_le_bytes());
        let addr = translate(&cpu, &mut mem, LINEAR, Access::WRITE);
        assert_eq!(addr, Ok(GuestPhysAddr::new(0x00c0_3678)));
        mem.load(0x1000 + 4, &0x00c0_60e7u32.to_le_bytes());
        let addr = translate(&cpu, &mut mem, LINEAR, Access::WRITE);
        assert_eq!(addr, Ok(GuestPhysAddr::new(0x3_00c0_3678)));
        let narrow = PagingState {
            phys_bits: 32,
            ..cpu
        };
        assert_eq!(
            code(translate(&narrow, &mut mem, LINEAR, Access::READ)),
            Some(9)
        );
        mem.load(0x1000 + 4, &0x00e0_00e7u32.to_le_bytes());
        assert_eq!(
            code(translate(&cpu, &mut mem, LINEAR, Access::READ)),
            Some(9)
        );
        // Without CR4.PSE the bit means nothing.
        mem.load(0x1000 + 4, &0x20e7u32.to_le_bytes());
        let cpu = state(Cr4::empty(), Efer::empty());
        assert_eq!(code(translate(&cpu, &mut mem, LINEAR, Access::WRITE)), None);
    }

    #[test]
    fn marks_accessed_and_dirty() {
        let entries = open().map(|entry| entry & !(ACCESSED | DIRTY));
        let leaf = 0x4000 + 3 * 8;
        let mut mem = tables(entries);
        assert_eq!(
            code(translate(&long(), &mut mem, LINEAR, Access::READ)),
            None
        );
        assert_eq!(mem.u64(leaf) & (ACCESSED | DIRTY), ACCESSED);
        assert_eq!(mem.u64(ROOT) & (ACCESSED | DIRTY), ACCESSED);
        assert_eq!(
            code(translate(&long(), &mut mem, LINEAR, Access::WRITE)),
            None
        );
        assert_eq!(mem.u64(leaf) & DIRTY, DIRTY);
        assert_eq!(mem.u64(ROOT) & DIRTY, 0, "only the leaf gets dirty");
        // What is denied marks nothing; what lies in ROM stays.
        let mut mem = tables([0x2067, 0x3067, 0x4067, 0xabc_d001]);
        assert_eq!(
            code(translate(&long(), &mut mem, LINEAR, Access::WRITE)),
            Some(3)
        );
        assert_eq!(mem.u64(leaf), 0xabc_d001);
        mem.rom = 0x4000..0x5000;
        assert_eq!(
            code(translate(&long(), &mut mem, LINEAR, Access::READ)),
            None
        );
        assert_eq!(mem.u64(leaf), 0xabc_d001);
        // Narrow entries take theirs as four bytes.
        let mut mem = FlatMemory::new(0x10_0000);
        mem.load(0x1000 + 4, &0x2007u32.to_le_bytes());
        mem.load(0x2000 + 3 * 4, &0x0abc_d007u32.to_le_bytes());
        let cpu = state(Cr4::empty(), Efer::empty());
        assert_eq!(code(translate(&cpu, &mut mem, LINEAR, Access::WRITE)), None);
        assert_eq!(mem.u64(0x2000 + 3 * 4), 0x0abc_d067);
        assert_eq!(mem.u64(0x1004), 0x2027);
    }

    /// Memory in which another vCPU clears the leaf's accessed bit, or its presence, after each read.
    struct Racing {
        mem: FlatMemory,
        changes: u32,
    }

    impl GuestMemory for Racing {
        fn read(&mut self, addr: GuestPhysAddr, buf: &mut [u8]) -> Result<(), MemoryFault> {
            let read = self.mem.read(addr, buf);
            if addr.as_u64() == 0x4000 + 3 * 8 && self.changes > 0 {
                self.changes -= 1;
                let entry = self.mem.u64(addr.as_u64());
                self.mem.set_u64(addr.as_u64(), entry ^ 1 << 10);
            }
            read
        }
        fn write(&mut self, addr: GuestPhysAddr, data: &[u8]) -> Result<(), MemoryFault> {
            self.mem.write(addr, data)
        }
        fn compare_exchange(
            &mut self,
            addr: GuestPhysAddr,
            size: u8,
            current: u64,
            new: u64,
        ) -> Result<u64, MemoryFault> {
            self.mem.compare_exchange(addr, size, current, new)
        }
    }

    #[test]
    fn races_end() {
        for (changes, marked) in [(1, true), (7, true), (u32::MAX, false)] {
            let mem = tables([0x2067, 0x3067, 0x4067, 0xabc_d007]);
            let mut mem = Racing { mem, changes };
            assert_eq!(
                code(translate(&long(), &mut mem, LINEAR, Access::READ)),
                None
            );
            assert_eq!(mem.mem.u64(0x4000 + 3 * 8) & ACCESSED != 0, marked);
        }
    }

    #[test]
    fn reserved_bits() {
        for (level, bit) in [(0, 40), (0, 7), (1, 45), (2, 51), (3, 40), (3, 51)] {
            let mut entries = open();
            entries[level] |= 1 << bit;
            let fault = translate(&long(), &mut tables(entries), LINEAR, Access::READ);
            assert_eq!(code(fault), Some(9), "level {level} bit {bit}");
        }
        // In a large page bits from 13 up to its size; NX without EFER.NXE.
        let mut mem = tables([0x2067, 0x3067, 0x20_40e7, 0]);
        assert_eq!(
            code(translate(&long(), &mut mem, LINEAR, Access::READ)),
            Some(9)
        );
        let mut entries = open();
        entries[1] |= NO_EXECUTE;
        let mut cpu = long();
        cpu.efer &= !Efer::NXE.bits();
        let fault = translate(&cpu, &mut tables(entries), LINEAR, Access::WRITE);
        assert_eq!(code(fault), Some(0xb));
        // Bits 62:52 are the guest's own.
        let mut entries = open();
        entries[2] |= 0x7ff << 52;
        assert_eq!(
            code(translate(
                &long(),
                &mut tables(entries),
                LINEAR,
                Access::READ
            )),
            None
        );
    }

    #[test]
    fn rights() {
        // Bits of the leaf, or of an upper entry with the same effect.
        const U: u64 = USER;
        const W: u64 = WRITABLE;
        const X: u64 = NO_EXECUTE;
        const SMEP: Cr4 = Cr4::SMEP;
        const SMAP: Cr4 = Cr4::SMAP;
        const NONE: Cr4 = Cr4::empty();
        let (read, write, exec) = (Access::READ, Access::WRITE, Access::EXECUTE);
        // (level, page, CR4, access, AC, expected)
        let cases = [
            (0, U | W, NONE, exec, false, None),
            (3, U | W, NONE, write, false, None),
            (3, U, NONE, write, false, Some(7)),
            (3, W, NONE, read, false, Some(5)),
            (3, W, NONE, write, false, Some(7)),
            (3, W, NONE, exec, false, Some(0x15)),
            (3, U | X, NONE, exec, false, Some(0x15)),
            (3, U | X, NONE, read, false, None),
            (0, 0, NONE, write, false, Some(3)),
            (0, W, NONE, write, false, None),
            (0, X, NONE, exec, false, Some(0x11)),
            (0, U | W, SMEP, exec, false, Some(0x11)),
            (0, W, SMEP, exec, false, None),
            (3, U, SMEP, exec, false, None),
            (0, U | W, SMEP, write, false, None),
            (0, U | W, SMAP, write, false, Some(3)),
            (0, U | W, SMAP, read, false, Some(1)),
            (0, U | W, SMAP, read, true, None),
            (0, U | W, SMAP, exec, false, None),
            (0, W, SMAP, read, false, None),
            (3, U | W, SMAP, read, false, None),
        ];
        for (cpl, page, cr4, access, ac, expected) in cases {
            for level in 0..4 {
                let mut entries = open();
                entries[level] = entries[level] & !(U | W) | page;
                let mut cpu = PagingState { cpl, ac, ..long() };
                cpu.cr4 |= cr4.bits();
                let found = translate(&cpu, &mut tables(entries), LINEAR, access);
                assert_eq!(
                    code(found),
                    expected,
                    "cpl {cpl} page {page:x} {cr4:?} {access:?} level {level}"
                );
            }
        }
        // Without CR0.WP a supervisor writes everywhere.
        let mut cpu = long();
        cpu.cr0 &= !Cr0::WP.bits();
        let mut mem = tables([0x2067, 0x3067, 0x4067, 0xabc_d061]);
        assert_eq!(code(translate(&cpu, &mut mem, LINEAR, Access::WRITE)), None);
        // The CPU's own accesses: supervisor, and AC does not lift SMAP.
        let cpu = PagingState {
            cpl: 3,
            ac: true,
            ..long()
        };
        let cpu = PagingState {
            cr4: cpu.cr4 | SMAP.bits(),
            ..cpu
        }
        .implicit_supervisor();
        assert_eq!(
            code(translate(&cpu, &mut tables(open()), LINEAR, Access::READ)),
            Some(1)
        );
    }

    #[test]
    fn the_fetch_bit_needs_fetch_rights() {
        let mut mem = tables([0; 4]);
        let fetch = |cpu: PagingState, mem: &mut FlatMemory| {
            code(translate(&cpu, mem, LINEAR, Access::EXECUTE))
        };
        assert_eq!(fetch(long(), &mut mem), Some(0x10));
        assert_eq!(fetch(state(Cr4::PAE, Efer::LMA), &mut mem), Some(0));
        assert_eq!(fetch(state(Cr4::empty(), Efer::NXE), &mut mem), Some(0));
        assert_eq!(fetch(state(Cr4::SMEP, Efer::empty()), &mut mem), Some(0x10));
    }

    #[test]
    fn protection_keys() {
        let mut entries = open();
        entries[3] |= 5 << 59;
        let mut cpu = long();
        cpu.cr4 |= Cr4::PKE.bits();
        let try_with = |pkru: u32, cpl, access| {
            let cpu = PagingState { pkru, cpl, ..cpu };
            code(translate(&cpu, &mut tables(entries), LINEAR, access))
        };
        assert_eq!(try_with(!(3 << 10), 3, Access::WRITE), None);
        assert_eq!(try_with(1 << 10, 3, Access::READ), Some(0x25));
        assert_eq!(try_with(1 << 10, 0, Access::READ), Some(0x21));
        assert_eq!(try_with(2 << 10, 3, Access::READ), None);
        assert_eq!(try_with(2 << 10, 3, Access::WRITE), Some(0x27));
        assert_eq!(try_with(3 << 10, 3, Access::EXECUTE), None);
    }

    #[test]
    fn tables_outside_ram_are_no_page_fault() {
        let mut cpu = long();
        cpu.cr3 = 0xfee0_0000;
        let found = translate(&cpu, &mut FlatMemory::new(0x1000), LINEAR, Access::READ);
        assert!(matches!(
            found,
            Err(TranslateFault::Memory(MemoryFault::NotRam(_)))
        ));
    }
}
