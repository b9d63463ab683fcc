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
#[inline]
pub fn translate<M: GuestMemory + ?Sized>(
    cpu: &PagingState,
    mem: &mut M,
    linear: u64,
    access: Access,
) -> Result<GuestPhysAddr, TranslateFault> {
    if cpu.cr0 & Cr0::PG.bits() == 0 {
        return Ok(GuestPhysAddr::new(linear & 0xffff_ffff));
    }
    let walked = match walk::<M, false>(cpu, mem, linear, access.write) {
        Ok(walked) => walked,
        Err(miss) => return Err(fault(cpu, linear, access, &miss)),
    };
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
        // and 8:5 are reserved.
        let at = (cpu.cr3 & 0xffff_ffe0) + (linear >> 30) * 8;
        let entry = mem.read_u64(GuestPhysAddr::new(at))?;
        if entry & PRESENT == 0 {
            return Err(Miss::NotPresent);
        }
        if entry & (reserved | NO_EXECUTE | 0x1e6) != 0 {
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
        (writable || !access.write || !protect) && !(user_page && cpu.cr4_has(Cr4::SMAP) && !cpu.ac)
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
