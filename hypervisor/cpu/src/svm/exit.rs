//! From a #VMEXIT's code and information to an [`Exit`] (AMD APM Vol. 2 §15.9 to §15.14 and
//! appendix C).

use super::caps::SvmFeatures;
use super::vmcb::Vmcb;
use arch::{
    Access, ControlRegister, CrAccess, CrOp, DebugRegister, EntryFailure, Exception, Exit, Gpr,
    GuestPhysAddr, IoExit,
};

/// The exit codes (appendix C, table C-1) that this backend names. Compared on the low 32 bits:
/// QEMU zero-extends the negative ones.
#[allow(missing_docs)]
pub mod code {
    pub const CR_READ: u32 = 0x00;
    pub const CR_WRITE: u32 = 0x10;
    pub const DR_READ: u32 = 0x20;
    pub const DR_WRITE: u32 = 0x30;
    pub const EXCEPTION: u32 = 0x40;
    pub const EXCEPTION_DB: u32 = 0x41;
    pub const EXCEPTION_LAST: u32 = 0x5f;
    pub const INTR: u32 = 0x60;
    pub const NMI: u32 = 0x61;
    pub const SMI: u32 = 0x62;
    pub const INIT: u32 = 0x63;
    pub const VINTR: u32 = 0x64;
    pub const CR0_SEL_WRITE: u32 = 0x65;
    pub const RDTSC: u32 = 0x6e;
    pub const RDPMC: u32 = 0x6f;
    pub const CPUID: u32 = 0x72;
    pub const RSM: u32 = 0x73;
    pub const IRET: u32 = 0x74;
    pub const INVD: u32 = 0x76;
    pub const PAUSE: u32 = 0x77;
    pub const HLT: u32 = 0x78;
    pub const INVLPG: u32 = 0x79;
    pub const INVLPGA: u32 = 0x7a;
    pub const IOIO: u32 = 0x7b;
    pub const MSR: u32 = 0x7c;
    pub const TASK_SWITCH: u32 = 0x7d;
    pub const FERR_FREEZE: u32 = 0x7e;
    pub const SHUTDOWN: u32 = 0x7f;
    pub const VMRUN: u32 = 0x80;
    pub const VMMCALL: u32 = 0x81;
    pub const VMLOAD: u32 = 0x82;
    pub const SKINIT: u32 = 0x86;
    pub const RDTSCP: u32 = 0x87;
    pub const WBINVD: u32 = 0x89;
    pub const MONITOR: u32 = 0x8a;
    pub const MWAIT: u32 = 0x8b;
    pub const MWAIT_CONDITIONAL: u32 = 0x8c;
    pub const XSETBV: u32 = 0x8d;
    pub const RDPRU: u32 = 0x8e;
    pub const INVLPGB: u32 = 0xa0;
    pub const INVLPGB_ILLEGAL: u32 = 0xa1;
    pub const MCOMMIT: u32 = 0xa3;
    pub const TLBSYNC: u32 = 0xa4;
    pub const NPF: u32 = 0x400;
    /// VMEXIT_INVALID, BUSY, IDLE_REQUIRED and INVALID_PMC are −1 to −4: no guest ran.
    pub const FAILED_FIRST: u32 = 0xffff_fffc;
    pub const FAILED_LAST: u32 = 0xffff_ffff;
}

/// Nested-page-fault information in EXITINFO1 (§15.25.6).
mod npf {
    pub const WRITE: u64 = 1 << 1;
    pub const RESERVED: u64 = 1 << 3;
    pub const FETCH: u64 = 1 << 4;
    pub const WALK: u64 = 1 << 33;
}

/// What the exit in `vmcb` means. Operands of MOV CR and MOV DR are there only with decode assists
/// (§15.8.1).
#[inline(always)]
pub fn decode(vmcb: &Vmcb) -> Exit {
    let control = &vmcb.control;
    let (info1, info2) = (control.exit_info_1, control.exit_info_2);
    let code = control.exit_code as u32;
    match code {
        code::CPUID => Exit::Cpuid,
        code::MSR if info1 & 1 == 0 => Exit::Rdmsr,
        code::MSR => Exit::Wrmsr,
        code::IOIO if info1 & IO_STRING == 0 => Exit::Io(io(info1)),
        code::NPF if info1 & npf::RESERVED == 0 => nested_fault(info1, info2),
        code::INTR => Exit::ExternalInterrupt(None),
        code::VINTR => Exit::InterruptWindow,
        code::HLT => Exit::Hlt,
        code::VMMCALL => Exit::Hypercall,
        _ => Exit::Rare,
    }
}

const IO_STRING: u64 = 1 << 2;

/// EXITINFO1 of an IOIO exit (§15.10.2).
#[inline(always)]
fn io(info: u64) -> IoExit {
    IoExit {
        port: (info >> 16) as u16,
        size: (info >> 4 & 7) as u8,
        input: info & 1 != 0,
        string: info & IO_STRING != 0,
        rep: info & 1 << 3 != 0,
    }
}

#[inline(always)]
fn nested_fault(info: u64, addr: u64) -> Exit {
    Exit::NestedFault {
        addr: GuestPhysAddr::new(addr),
        access: Access {
            write: info & npf::WRITE != 0,
            execute: info & npf::FETCH != 0,
        },
        walk: info & npf::WALK != 0,
    }
}

/// The exit that [`decode`] calls rare.
#[cold]
pub fn rare(vmcb: &Vmcb, features: &SvmFeatures) -> Exit {
    let code = vmcb.control.exit_code as u32;
    let assists = features.contains(SvmFeatures::DECODE_ASSISTS);
    let control = &vmcb.control;
    let (info1, info2) = (control.exit_info_1, control.exit_info_2);
    let unknown = Exit::Unknown {
        code: code.into(),
        detail: info1,
    };
    match code {
        code::IOIO => Exit::Io(io(info1)),
        code::NPF => Exit::NestedMisconfig {
            addr: GuestPhysAddr::new(info2),
        },
        code::CR_READ..code::DR_READ | code::CR0_SEL_WRITE => {
            let (number, write) = match code {
                code::CR0_SEL_WRITE => (0, true),
                _ => (code & 15, code >= code::CR_WRITE),
            };
            let Some(register) = control_register(number) else {
                return unknown;
            };
            // Bit 63: a MOV, with its register in 3:0. LMSW and CLTS give nothing.
            let op = match (assists && info1 >> 63 != 0, write) {
                (false, write) => CrOp::Undecoded { write },
                (true, true) => CrOp::Write(gpr(info1)),
                (true, false) => CrOp::Read(gpr(info1)),
            };
            Exit::Cr(CrAccess { register, op })
        }
        // DR8 to DR15 are none.
        code::DR_READ..code::EXCEPTION if code & 8 == 0 => Exit::Dr {
            register: DebugRegister::from_number((code & 7) as u8),
            write: code >= code::DR_WRITE,
            gpr: assists.then(|| gpr(info1)),
        },
        code::EXCEPTION..=code::EXCEPTION_LAST => {
            match Exception::from_vector((code - code::EXCEPTION) as u8) {
                Some(exception) => Exit::Exception {
                    exception,
                    error_code: exception.has_error_code().then_some(info1 as u32),
                    info: match exception {
                        Exception::PageFault => info2,
                        // DR6 is already what a handler would find (§15.12.2).
                        Exception::Debug => vmcb.save.dr6 & 0xe00f,
                        _ => 0,
                    },
                },
                None => unknown,
            }
        }
        // Both stay pending until GIF is set again, so the host's own handler has run by now.
        code::NMI => Exit::Nmi,
        code::SMI => Exit::Benign,
        code::INIT => Exit::InitOrSipi,
        code::RDTSC => Exit::Rdtsc,
        code::RDTSCP => Exit::Rdtscp,
        code::RDPMC => Exit::Rdpmc,
        code::IRET => Exit::Benign,
        code::INVD => Exit::Invd,
        code::WBINVD => Exit::Wbinvd,
        code::PAUSE => Exit::Pause,
        code::INVLPG => Exit::Invlpg,
        code::TASK_SWITCH => Exit::TaskSwitch,
        // A pending x87 error with CR0.NE = 0, to be told by FERR# and IRQ 13 on old boards.
        // We have no such wire: it is told as #MF, as with NE = 1.
        code::FERR_FREEZE => Exit::Exception {
            exception: Exception::FloatingPoint,
            error_code: None,
            info: 0,
        },
        code::SHUTDOWN => Exit::TripleFault,
        code::MONITOR => Exit::Monitor,
        code::MWAIT | code::MWAIT_CONDITIONAL => Exit::Mwait,
        code::XSETBV => Exit::Xsetbv,
        code::RSM
        | code::INVLPGA
        | code::VMRUN
        | code::VMLOAD..=code::SKINIT
        | code::RDPRU
        | code::INVLPGB
        | code::INVLPGB_ILLEGAL
        | code::MCOMMIT
        | code::TLBSYNC => Exit::UndefinedInstruction,
        code::FAILED_FIRST..=code::FAILED_LAST => Exit::EntryFailed(EntryFailure {
            code: control.exit_code,
            detail: vmcb.save.violations().bits().into(),
        }),
        _ => unknown,
    }
}

fn gpr(info: u64) -> Gpr {
    Gpr::from_number((info & 15) as u8)
}

fn control_register(number: u32) -> Option<ControlRegister> {
    Some(match number {
        0 => ControlRegister::Cr0,
        2 => ControlRegister::Cr2,
        3 => ControlRegister::Cr3,
        4 => ControlRegister::Cr4,
        8 => ControlRegister::Cr8,
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::boxed::Box;

    const NONE: SvmFeatures = SvmFeatures::empty();
    const ASSISTS: SvmFeatures = SvmFeatures::DECODE_ASSISTS;

    fn vmcb(code: u64, info1: u64, info2: u64) -> Box<Vmcb> {
        // SAFETY: a control block is integers through and through.
        let mut vmcb: Box<Vmcb> = unsafe { Box::new_zeroed().assume_init() };
        vmcb.control.exit_code = code;
        vmcb.control.exit_info_1 = info1;
        vmcb.control.exit_info_2 = info2;
        vmcb
    }

    fn told(vmcb: &Vmcb, features: &SvmFeatures) -> Exit {
        match decode(vmcb) {
            Exit::Rare => rare(vmcb, features),
            exit => exit,
        }
    }

    #[test]
    fn codes_become_exits() {
        let ud = Exit::UndefinedInstruction;
        for (code, info1, expected) in [
            (0x60, 0, Exit::ExternalInterrupt(None)),
            (0x61, 0, Exit::Nmi),
            (0x62, 0, Exit::Benign),
            (0x63, 0, Exit::InitOrSipi),
            (0x64, 0, Exit::InterruptWindow),
            (0x6f, 0, Exit::Rdpmc),
            (0x72, 0, Exit::Cpuid),
            (0x76, 0, Exit::Invd),
            (0x78, 0, Exit::Hlt),
            (0x7c, 0, Exit::Rdmsr),
            (0x7c, 1, Exit::Wrmsr),
            (0x7d, 0, Exit::TaskSwitch),
            (0x7f, 0, Exit::TripleFault),
            (0x80, 0, ud),
            (0x81, 0, Exit::Hypercall),
            (0x82, 0, ud),
            (0x85, 0, ud),
            (0x86, 0, ud),
            (0x8e, 0, ud),
            (0x8d, 0, Exit::Xsetbv),
            (
                0x401,
                7,
                Exit::Unknown {
                    code: 0x401,
                    detail: 7,
                },
            ),
            (
                0x4f,
                7,
                Exit::Unknown {
                    code: 0x4f,
                    detail: 7,
                },
            ),
        ] {
            assert_eq!(told(&vmcb(code, info1, 0), &ASSISTS), expected, "{code:#x}");
        }
    }

    #[test]
    fn port_accesses() {
        // REP OUTSW to 0x1f0; IN AL, 0x60.
        for (info1, port, size, input, string, rep) in [
            (0x01f0_012c, 0x1f0, 2, false, true, true),
            (0x0060_0011, 0x60, 1, true, false, false),
            (0x0cfc_0041, 0xcfc, 4, true, false, false),
        ] {
            let expected = IoExit {
                port,
                size,
                input,
                string,
                rep,
            };
            assert_eq!(told(&vmcb(0x7b, info1, 0), &NONE), Exit::Io(expected));
        }
    }

    #[test]
    fn nested_faults() {
        let addr = GuestPhysAddr::new(0xfee0_0080);
        let fault = |access, walk| Exit::NestedFault { addr, access, walk };
        for (info1, expected) in [
            (0x1_0000_0004, fault(Access::READ, false)),
            (0x1_0000_0006, fault(Access::WRITE, false)),
            (0x1_0000_0014, fault(Access::EXECUTE, false)),
            (0x2_0000_0006, fault(Access::WRITE, true)),
            (0x1_0000_000d, Exit::NestedMisconfig { addr }),
        ] {
            assert_eq!(told(&vmcb(0x400, info1, addr.as_u64()), &NONE), expected);
        }
    }

    #[test]
    fn operands_only_with_decode_assists() {
        let info = 1 << 63 | 3;
        let cr = |register, op| Exit::Cr(CrAccess { register, op });
        let (cr0, cr4) = (ControlRegister::Cr0, ControlRegister::Cr4);
        let blind = CrOp::Undecoded { write: true };
        assert_eq!(
            told(&vmcb(0x14, info, 0), &ASSISTS),
            cr(cr4, CrOp::Write(Gpr::Rbx))
        );
        assert_eq!(told(&vmcb(0x14, info, 0), &NONE), cr(cr4, blind));
        assert_eq!(
            told(&vmcb(0x04, info, 0), &ASSISTS),
            cr(cr4, CrOp::Read(Gpr::Rbx))
        );
        assert_eq!(told(&vmcb(0x65, 0, 0), &ASSISTS), cr(cr0, blind));
        assert!(matches!(
            told(&vmcb(0x11, info, 0), &ASSISTS),
            Exit::Unknown { .. }
        ));
        let dr7 = |gpr| Exit::Dr {
            register: DebugRegister::Dr7,
            write: true,
            gpr,
        };
        assert_eq!(told(&vmcb(0x37, 5, 0), &ASSISTS), dr7(Some(Gpr::Rbp)));
        assert_eq!(told(&vmcb(0x37, 5, 0), &NONE), dr7(None));
    }

    #[test]
    fn exceptions_carry_what_they_have() {
        let pf = Exit::Exception {
            exception: Exception::PageFault,
            error_code: Some(2),
            info: 0xdead_b000,
        };
        assert_eq!(told(&vmcb(0x4e, 2, 0xdead_b000), &NONE), pf);
        let mut debug = vmcb(0x41, 99, 99);
        debug.save.dr6 = 0xffff_4ff1;
        let db = Exit::Exception {
            exception: Exception::Debug,
            error_code: None,
            info: 0x4001,
        };
        assert_eq!(told(&debug, &NONE), db);
    }

    #[test]
    fn refusals_are_told_in_either_width() {
        for code in [u64::MAX, 0xffff_ffff, u64::MAX - 1] {
            assert!(
                matches!(told(&vmcb(code, 0, 0), &NONE), Exit::EntryFailed(f) if f.code == code)
            );
        }
    }
}
