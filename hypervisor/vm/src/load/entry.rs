//! What virtual CPU 0 starts with.
//!
//! All boot protocols here ask for the same: flat segments, interrupts off, and either protected
//! mode without paging or long mode on identity page tables. They differ in a few registers.
//! A vCPU that starts at its reset vector (firmware) needs nothing of this: that is
//! [`Vcpu::reset`].

use arch::{
    AccessRights, ControlRegister, Cr0, Cr4, DescriptorTable, Efer, Gpr, RFlags, Segment,
    SegmentRegister, Vcpu,
};

use super::{
    Problem,
    ram::{BOOT_AREA, Place, Ram},
};

/// Selector of the code segment (`__BOOT_CS` of Linux's boot protocol).
const CODE: u16 = 0x10;
/// Selector of the data segments (`__BOOT_DS`).
const DATA: u16 = 0x18;
/// Selector of the task-state segment.
const TASK: u16 = 0x20;
/// Execute/read, accessed, present; 4 KiB granularity.
const CODE_RIGHTS: u32 = 0x809b;
/// Read/write, accessed, present, 32-bit; 4 KiB granularity.
const DATA_RIGHTS: u32 = 0xc093;
/// Busy 32-bit TSS (in long mode: 64-bit TSS), present.
const TASK_RIGHTS: u32 = 0x8b;
/// D/B: 32-bit code.
const BIG: u32 = 1 << 14;
/// L: 64-bit code.
const LONG: u32 = 1 << 13;
/// Limit of the smallest task-state segment.
const TASK_LIMIT: u32 = 0x67;

/// The operating mode at entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// 32-bit protected mode, paging off.
    Protected,
    /// 64-bit mode on these page tables.
    Long {
        /// Their root.
        cr3: u64,
    },
}

/// The registers of virtual CPU 0 at the first instruction of a kernel. What is not named is as
/// after reset, with RFLAGS clear.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EntryState {
    /// The mode.
    pub mode: Mode,
    /// First instruction, flat.
    pub rip: u64,
    /// RAX.
    pub rax: u64,
    /// RBX.
    pub rbx: u64,
    /// RSI.
    pub rsi: u64,
    /// Where the descriptor table is, in guest memory.
    pub gdt: DescriptorTable,
}

impl EntryState {
    /// Builds a descriptor table, and page tables if `long`, in the boot area; enters at `rip`.
    pub(super) fn new(ram: &mut Ram<'_, '_>, long: bool, rip: u64) -> Result<Self, Problem> {
        let code = CODE_RIGHTS | if long { LONG } else { BIG };
        let mut table = [0; 56];
        for (selector, rights, limit) in [
            (CODE, code, u32::MAX),
            (DATA, DATA_RIGHTS, u32::MAX),
            (TASK, TASK_RIGHTS, TASK_LIMIT),
        ] {
            let at = usize::from(selector);
            table[at..at + 8].copy_from_slice(&descriptor(rights, limit).to_le_bytes());
        }
        let base = ram.put("the descriptor table", &table, 16, Place::Lowest(BOOT_AREA))?;
        let mode = if long {
            Mode::Long {
                cr3: identity_map(ram)?,
            }
        } else {
            Mode::Protected
        };
        let gdt = DescriptorTable {
            base,
            limit: table.len() as u16 - 1,
        };
        Ok(Self {
            mode,
            rip,
            rax: 0,
            rbx: 0,
            rsi: 0,
            gdt,
        })
    }

    /// Puts a vCPU into this state.
    pub fn apply(&self, vcpu: &mut dyn Vcpu) {
        vcpu.reset();
        let protected = (Cr0::PE | Cr0::ET).bits();
        let code = match self.mode {
            Mode::Protected => {
                vcpu.set_cr(ControlRegister::Cr0, protected);
                CODE_RIGHTS | BIG
            }
            Mode::Long { cr3 } => {
                vcpu.set_cr(ControlRegister::Cr4, Cr4::PAE.bits());
                vcpu.set_cr(ControlRegister::Cr3, cr3);
                vcpu.set_efer((Efer::LME | Efer::LMA).bits());
                vcpu.set_cr(ControlRegister::Cr0, protected | Cr0::PG.bits());
                CODE_RIGHTS | LONG
            }
        };
        let segment = |selector, rights, limit| Segment {
            selector,
            rights: AccessRights(rights),
            limit,
            base: 0,
        };
        use SegmentRegister::{Cs, Ds, Es, Fs, Gs, Ldtr, Ss, Tr};
        vcpu.set_segment(Cs, segment(CODE, code, u32::MAX));
        for register in [Ds, Es, Ss, Fs, Gs] {
            vcpu.set_segment(register, segment(DATA, DATA_RIGHTS, u32::MAX));
        }
        vcpu.set_segment(Tr, segment(TASK, TASK_RIGHTS, TASK_LIMIT));
        vcpu.set_segment(Ldtr, segment(0, AccessRights::UNUSABLE.0, 0));
        vcpu.set_gdtr(self.gdt);
        vcpu.set_idtr(DescriptorTable { base: 0, limit: 0 });
        vcpu.set_rflags(RFlags::FIXED);
        for gpr in Gpr::ALL {
            vcpu.set_gpr(gpr, 0);
        }
        vcpu.set_gpr(Gpr::Rax, self.rax);
        vcpu.set_gpr(Gpr::Rbx, self.rbx);
        vcpu.set_gpr(Gpr::Rsi, self.rsi);
        vcpu.set_rip(self.rip);
    }
}

/// A segment descriptor with base 0 (Intel SDM Vol. 3A §3.4.5).
const fn descriptor(rights: u32, limit: u32) -> u64 {
    let raw = if rights & 0x8000 != 0 {
        limit >> 12
    } else {
        limit
    };
    let attributes = (rights & 0xf0ff) as u64;
    (attributes << 40) | (((raw >> 16) as u64 & 0xf) << 48) | (raw as u64 & 0xffff)
}

const _: () = assert!(descriptor(0xc09b, u32::MAX) == 0x00cf_9b00_0000_ffff);

/// Page tables that map the first 4 GiB one to one in 2 MiB pages (Intel SDM Vol. 3A §4.5).
fn identity_map(ram: &mut Ram<'_, '_>) -> Result<u64, Problem> {
    const PAGE: u64 = arch::PAGE_SIZE;
    const PRESENT_WRITE: u64 = 3;
    const LARGE: u64 = 1 << 7;
    const GIBS: u64 = 4;
    let place = Place::Lowest(BOOT_AREA);
    let root = ram.claim("the page tables", (2 + GIBS) * PAGE, PAGE, place)?;
    let pointers = root + PAGE;
    ram.write(root, &(pointers | PRESENT_WRITE).to_le_bytes())?;
    for gib in 0..GIBS {
        let directory = pointers + (1 + gib) * PAGE;
        ram.write(
            pointers + gib * 8,
            &(directory | PRESENT_WRITE).to_le_bytes(),
        )?;
        let mut page = [0; PAGE as usize];
        for (entry, index) in page.as_chunks_mut::<8>().0.iter_mut().zip(0u64..) {
            let frame = (gib << 30) + (index << 21);
            *entry = (frame | PRESENT_WRITE | LARGE).to_le_bytes();
        }
        ram.write(directory, &page)?;
    }
    Ok(root)
}
