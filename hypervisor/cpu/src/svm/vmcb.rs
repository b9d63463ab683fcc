//! The virtual-machine control block (AMD APM Vol. 2 appendix B): the 4 KiB in which hypervisor
//! and CPU tell each other what the guest is and why it left.
//!
//! Every offset is asserted at compile time. The save area is a [`Save`] of its own, so that the
//! page the host's hidden state goes to (VMSAVE) has the same type.

// The members of the flag sets are named as in the manual.
#![allow(missing_docs)]

use arch::{AccessRights, Cr0, Cr4, DescriptorTable, Efer, RFlags, Segment};
use bitflags::bitflags;
use core::mem::{offset_of, size_of};
use zerocopy::FromZeros;

bitflags! {
    /// Intercept vector at 00CH (appendix B, table B-1).
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Misc1: u32 {
        const INTR = 1 << 0;
        const NMI = 1 << 1;
        const SMI = 1 << 2;
        const INIT = 1 << 3;
        const VINTR = 1 << 4;
        const RDPMC = 1 << 15;
        const CPUID = 1 << 18;
        const IRET = 1 << 20;
        const INVD = 1 << 22;
        const PAUSE = 1 << 23;
        const HLT = 1 << 24;
        const INVLPGA = 1 << 26;
        const IOIO_PROT = 1 << 27;
        const MSR_PROT = 1 << 28;
        const TASK_SWITCH = 1 << 29;
        const FERR_FREEZE = 1 << 30;
        const SHUTDOWN = 1 << 31;
    }

    /// Intercept vector at 010H.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Misc2: u32 {
        const VMRUN = 1 << 0;
        const VMMCALL = 1 << 1;
        const VMLOAD = 1 << 2;
        const VMSAVE = 1 << 3;
        const STGI = 1 << 4;
        const CLGI = 1 << 5;
        const SKINIT = 1 << 6;
        const WBINVD = 1 << 9;
        const MONITOR = 1 << 10;
        const MWAIT = 1 << 11;
        const XSETBV = 1 << 13;
        const RDPRU = 1 << 14;
    }

    /// Intercept vector at 014H.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Misc3: u32 {
        const INVLPGB = 1 << 0;
        const INVLPGB_ILLEGAL = 1 << 1;
        const MCOMMIT = 1 << 3;
        const TLBSYNC = 1 << 4;
    }

    /// Virtual-interrupt control at 060H (§15.21.1, §15.21.10, §15.33).
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct IntCtl: u64 {
        const V_TPR = 0xff;
        const V_IRQ = 1 << 8;
        const V_GIF = 1 << 9;
        const V_NMI = 1 << 11;
        const V_NMI_MASK = 1 << 12;
        const V_INTR_PRIO = 0xf << 16;
        const V_IGN_TPR = 1 << 20;
        const V_INTR_MASKING = 1 << 24;
        const V_GIF_ENABLE = 1 << 25;
        const V_NMI_ENABLE = 1 << 26;
        const V_INTR_VECTOR = 0xff << 32;
    }

    /// Clean bits at 0C0H (§15.15.3): a set bit lets the CPU keep what it cached of that group
    /// at the last exit. Whoever writes a field of a group clears its bit.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Clean: u32 {
        /// Intercepts, TSC offset, PAUSE filter.
        const INTERCEPTS = 1 << 0;
        /// IOPM_BASE, MSRPM_BASE.
        const PERMISSION_MAPS = 1 << 1;
        /// ASID.
        const ASID = 1 << 2;
        /// The virtual-interrupt control word.
        const TPR = 1 << 3;
        /// Nested paging: nCR3, G_PAT.
        const NESTED = 1 << 4;
        /// CR0, CR3, CR4, EFER.
        const CRX = 1 << 5;
        /// DR6, DR7.
        const DRX = 1 << 6;
        /// GDTR, IDTR.
        const TABLES = 1 << 7;
        /// CS, DS, SS, ES, CPL.
        const SEGMENTS = 1 << 8;
        /// CR2.
        const CR2 = 1 << 9;
        /// DBGCTL and the last-branch records.
        const LBR = 1 << 10;
    }
}

/// EVENTINJ and EXITINTINFO (§15.20, §15.7.2): vector 7:0, type 10:8, error code valid 11,
/// valid 31, error code 63:32.
pub mod event {
    /// The field holds an event.
    pub const VALID: u64 = 1 << 31;
    /// Bits 63:32 hold an error code.
    pub const ERROR_VALID: u64 = 1 << 11;
    /// The type field.
    pub const TYPE: u64 = 7 << 8;
    /// External or virtual interrupt.
    pub const INTERRUPT: u64 = 0 << 8;
    /// Non-maskable interrupt.
    pub const NMI: u64 = 2 << 8;
    /// Exception (fault or trap), INT3 and INTO among them.
    pub const EXCEPTION: u64 = 3 << 8;
    /// `INT n`.
    pub const SOFTWARE: u64 = 4 << 8;
}

/// TLB_CONTROL at 05CH (§15.16.1).
pub mod tlb {
    /// Nothing.
    pub const KEEP: u8 = 0;
    /// Every ASID's entries: all there is without flush-by-ASID.
    pub const FLUSH_ALL: u8 = 1;
    /// This ASID's entries.
    pub const FLUSH_GUEST: u8 = 3;
}

/// A segment register as the VMCB holds it. `attributes` are bits 55:52 and 47:40 of the
/// descriptor, put together.
#[derive(Clone, Copy, Debug, FromZeros, Default, PartialEq, Eq)]
#[repr(C)]
pub struct VmcbSegment {
    /// Selector.
    pub selector: u16,
    /// Type 3:0, S 4, DPL 6:5, P 7, AVL 8, L 9, D/B 10, G 11.
    pub attributes: u16,
    /// Limit in bytes.
    pub limit: u32,
    /// Linear base.
    pub base: u64,
}

impl From<VmcbSegment> for Segment {
    /// Unusable is P = 0 here: SVM has no bit for it (§15.5.1, "segment state in the VMCB").
    fn from(s: VmcbSegment) -> Self {
        let attributes = u32::from(s.attributes);
        let unusable = u32::from(s.attributes & (1 << 7) == 0) << 16;
        Self {
            selector: s.selector,
            rights: AccessRights((attributes & 0xff) | (attributes & 0xf00) << 4 | unusable),
            limit: s.limit,
            base: s.base,
        }
    }
}

impl From<Segment> for VmcbSegment {
    /// An unusable segment keeps its other bits (the DPL of a null SS is the CPL) but not P.
    fn from(s: Segment) -> Self {
        let rights = s.rights.0;
        let present = if s.rights.unusable() { 0x7f } else { 0xff };
        Self {
            selector: s.selector,
            attributes: ((rights & present) | (rights >> 4 & 0xf00)) as u16,
            limit: s.limit,
            base: s.base,
        }
    }
}

impl From<VmcbSegment> for DescriptorTable {
    fn from(s: VmcbSegment) -> Self {
        Self {
            base: s.base,
            limit: (s.limit & 0xffff) as u16,
        }
    }
}

impl From<DescriptorTable> for VmcbSegment {
    fn from(t: DescriptorTable) -> Self {
        Self {
            limit: t.limit.into(),
            base: t.base,
            ..Self::default()
        }
    }
}

/// The control area, 000H to 3FFH (table B-1).
#[derive(Debug)]
#[repr(C)]
pub struct Control {
    pub intercept_cr: u32,
    pub intercept_dr: u32,
    pub intercept_exceptions: u32,
    pub intercept_misc1: Misc1,
    pub intercept_misc2: Misc2,
    pub intercept_misc3: Misc3,
    _reserved018: [u8; 0x24],
    pub pause_filter_threshold: u16,
    pub pause_filter_count: u16,
    pub iopm_base: u64,
    pub msrpm_base: u64,
    pub tsc_offset: u64,
    pub asid: u32,
    pub tlb_control: u8,
    _reserved05d: [u8; 3],
    pub int_ctl: IntCtl,
    /// Bit 0: the guest is in an STI or MOV-SS shadow.
    pub interrupt_shadow: u64,
    pub exit_code: u64,
    pub exit_info_1: u64,
    pub exit_info_2: u64,
    pub exit_int_info: u64,
    pub nested_control: u64,
    pub avic_apic_bar: u64,
    pub ghcb: u64,
    pub event_inj: u64,
    pub nested_cr3: u64,
    /// Bit 0: last-branch and DBGCTL virtualization. Bit 1: virtual VMLOAD and VMSAVE.
    pub virt_ext: u64,
    pub clean: Clean,
    _reserved0c4: u32,
    pub next_rip: u64,
    pub fetched_bytes: u8,
    pub instruction_bytes: [u8; 15],
    pub avic_backing_page: u64,
    _reserved0e8: u64,
    pub avic_logical_table: u64,
    pub avic_physical_table: u64,
    _reserved100: [u8; 0x300],
}

/// The state-save area, from 400H (table B-2).
#[derive(Debug, FromZeros)]
#[repr(C)]
pub struct Save {
    /// ES, CS, SS, DS, FS, GS in the order of their encodings.
    pub segments: [VmcbSegment; 6],
    pub gdtr: VmcbSegment,
    pub ldtr: VmcbSegment,
    pub idtr: VmcbSegment,
    pub tr: VmcbSegment,
    _reserved0a0: [u8; 0x2b],
    pub cpl: u8,
    _reserved0cc: u32,
    pub efer: u64,
    _reserved0d8: [u8; 0x70],
    pub cr4: u64,
    pub cr3: u64,
    pub cr0: u64,
    pub dr7: u64,
    pub dr6: u64,
    pub rflags: u64,
    pub rip: u64,
    _reserved180: [u8; 0x58],
    pub rsp: u64,
    pub s_cet: u64,
    pub ssp: u64,
    pub isst_addr: u64,
    pub rax: u64,
    pub star: u64,
    pub lstar: u64,
    pub cstar: u64,
    pub sfmask: u64,
    pub kernel_gs_base: u64,
    pub sysenter_cs: u64,
    pub sysenter_esp: u64,
    pub sysenter_eip: u64,
    pub cr2: u64,
    _reserved248: [u8; 0x20],
    pub g_pat: u64,
    pub dbgctl: u64,
    pub br_from: u64,
    pub br_to: u64,
    pub last_excp_from: u64,
    pub last_excp_to: u64,
    _reserved298: [u8; 0x48],
    pub spec_ctrl: u64,
    _reserved2e8: [u8; 0x918],
}

/// The whole block.
#[derive(Debug)]
#[repr(C, align(4096))]
pub struct Vmcb {
    /// What to intercept and inject, and why the guest left.
    pub control: Control,
    /// The guest's state.
    pub save: Save,
}

bitflags! {
    /// Which of VMRUN's conditions on the guest's state (§15.5.1) are broken.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Violations: u32 {
        /// EFER.SVME is 0.
        const SVME = 1 << 0;
        /// CR0.NW without CR0.CD.
        const CACHE = 1 << 1;
        /// CR0[63:32] is not 0.
        const CR0 = 1 << 2;
        /// CR4[63:32] is not 0.
        const CR4 = 1 << 3;
        /// DR6[63:32] or DR7[63:32] is not 0.
        const DEBUG = 1 << 4;
        /// Long mode with paging, but CR4.PAE or CR0.PE is 0.
        const LONG_MODE = 1 << 5;
        /// CS.L and CS.D in long mode.
        const CS = 1 << 6;
        /// An undefined bit of EFER.
        const EFER = 1 << 7;
        /// No guest was tried: the vCPU is not loaded, or SVM is off on this core.
        const NOT_LOADED = 1 << 31;
    }
}

impl Save {
    /// Checks the state as VMRUN does, as far as it can be told from the block alone.
    #[must_use]
    pub fn violations(&self) -> Violations {
        let (cr0, efer) = (
            Cr0::from_bits_retain(self.cr0),
            Efer::from_bits_retain(self.efer),
        );
        let pae = self.cr4 & Cr4::PAE.bits() != 0;
        let long = efer.contains(Efer::LME) && cr0.contains(Cr0::PG);
        let [_, cs, ..] = self.segments;
        let mut broken = Violations::empty();
        for (violation, is) in [
            (Violations::SVME, !efer.contains(Efer::SVME)),
            (
                Violations::CACHE,
                cr0.contains(Cr0::NW) && !cr0.contains(Cr0::CD),
            ),
            (Violations::CR0, self.cr0 >> 32 != 0),
            (Violations::CR4, self.cr4 >> 32 != 0),
            (Violations::DEBUG, (self.dr6 | self.dr7) >> 32 != 0),
            (
                Violations::LONG_MODE,
                long && !(pae && cr0.contains(Cr0::PE)),
            ),
            (
                Violations::CS,
                long && pae && cs.attributes & 0x600 == 0x600,
            ),
            (Violations::EFER, self.efer & !0x3f_fd01 != 0),
        ] {
            broken.set(violation, is);
        }
        broken
    }

    /// The state after RESET (§14.1.3, table 14-1), with the EFER.SVME that VMRUN wants.
    pub fn reset(&mut self) {
        let data = VmcbSegment {
            selector: 0,
            attributes: 0x93,
            limit: 0xffff,
            base: 0,
        };
        let table = |attributes| VmcbSegment { attributes, ..data };
        let code = VmcbSegment {
            selector: 0xf000,
            attributes: 0x9b,
            base: 0xffff_0000,
            ..data
        };
        *self = Self {
            segments: [data, code, data, data, data, data],
            gdtr: table(0),
            ldtr: table(0x82),
            idtr: table(0),
            tr: table(0x8b),
            efer: Efer::SVME.bits(),
            cr0: (Cr0::CD | Cr0::NW | Cr0::ET).bits(),
            dr7: 0x400,
            dr6: 0xffff_0ff0,
            rflags: RFlags::FIXED.bits(),
            rip: 0xfff0,
            g_pat: 0x0007_0406_0007_0406,
            ..Self::new_zeroed()
        };
    }
}

macro_rules! offsets {
    ($type:ty: $($field:ident = $offset:literal),* $(,)?) => {
        $(const _: () = assert!(offset_of!($type, $field) == $offset);)*
    };
}

offsets!(Control:
    intercept_cr = 0x000, intercept_dr = 0x004, intercept_exceptions = 0x008,
    intercept_misc1 = 0x00c, intercept_misc2 = 0x010, intercept_misc3 = 0x014,
    pause_filter_threshold = 0x03c, pause_filter_count = 0x03e, iopm_base = 0x040,
    msrpm_base = 0x048, tsc_offset = 0x050, asid = 0x058, tlb_control = 0x05c, int_ctl = 0x060,
    interrupt_shadow = 0x068, exit_code = 0x070, exit_info_1 = 0x078, exit_info_2 = 0x080,
    exit_int_info = 0x088, nested_control = 0x090, avic_apic_bar = 0x098, ghcb = 0x0a0,
    event_inj = 0x0a8, nested_cr3 = 0x0b0, virt_ext = 0x0b8, clean = 0x0c0, next_rip = 0x0c8,
    fetched_bytes = 0x0d0, instruction_bytes = 0x0d1, avic_backing_page = 0x0e0,
    avic_logical_table = 0x0f0, avic_physical_table = 0x0f8,
);
offsets!(Save:
    segments = 0x000, gdtr = 0x060, ldtr = 0x070, idtr = 0x080, tr = 0x090, cpl = 0x0cb,
    efer = 0x0d0, cr4 = 0x148, cr3 = 0x150, cr0 = 0x158, dr7 = 0x160, dr6 = 0x168,
    rflags = 0x170, rip = 0x178, rsp = 0x1d8, s_cet = 0x1e0, ssp = 0x1e8, isst_addr = 0x1f0,
    rax = 0x1f8, star = 0x200, lstar = 0x208, cstar = 0x210, sfmask = 0x218,
    kernel_gs_base = 0x220, sysenter_cs = 0x228, sysenter_esp = 0x230, sysenter_eip = 0x238,
    cr2 = 0x240, g_pat = 0x268, dbgctl = 0x270, br_from = 0x278, br_to = 0x280,
    last_excp_from = 0x288, last_excp_to = 0x290, spec_ctrl = 0x2e0,
);
offsets!(Vmcb: control = 0, save = 0x400);
const _: () = assert!(size_of::<VmcbSegment>() == 16);
const _: () = assert!(size_of::<Vmcb>() == 4096);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_go_both_ways() {
        for (attributes, rights) in [
            (0x0a9b, 0x0000_a09b), // 64-bit code: G, L
            (0x0c93, 0x0000_c093), // flat data: G, D/B
            (0x009b, 0x0000_009b), // real-mode code
            (0x008b, 0x0000_008b), // busy TSS
            (0x0060, 0x0001_0060), // null SS at CPL 3
        ] {
            let vmcb = VmcbSegment {
                selector: 8,
                attributes,
                limit: !0,
                base: 0x1234,
            };
            let segment = Segment::from(vmcb);
            assert_eq!(segment.rights.0, rights);
            assert_eq!(VmcbSegment::from(segment), vmcb);
        }
        // "Unusable" is the bit that counts, whatever P says beside it.
        let null = Segment {
            rights: AccessRights(0x1_c093),
            ..Segment::default()
        };
        assert_eq!(VmcbSegment::from(null).attributes & 0x80, 0);
    }
}
