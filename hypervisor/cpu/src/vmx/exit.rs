//! Exit reasons, qualifications and interruption information as the words of `arch`
//! (Intel SDM Vol. 3C §28.2, §25.9, appendix C). Pure functions of the fields' values.

use arch::{
    Access, ControlRegister, CrAccess, CrOp, DebugRegister, Event, Exception, Gpr, IoExit,
    SoftwareKind, Vector,
};

/// Basic exit reasons (appendix C) that the vCPU looks at by name.
pub(super) mod reason {
    pub const EXCEPTION_OR_NMI: u32 = 0;
    pub const EXTERNAL_INTERRUPT: u32 = 1;
    pub const TRIPLE_FAULT: u32 = 2;
    pub const INIT: u32 = 3;
    pub const SIPI: u32 = 4;
    pub const IO_SMI: u32 = 5;
    pub const OTHER_SMI: u32 = 6;
    pub const INTERRUPT_WINDOW: u32 = 7;
    pub const NMI_WINDOW: u32 = 8;
    pub const TASK_SWITCH: u32 = 9;
    pub const CPUID: u32 = 10;
    pub const GETSEC: u32 = 11;
    pub const HLT: u32 = 12;
    pub const INVD: u32 = 13;
    pub const INVLPG: u32 = 14;
    pub const RDPMC: u32 = 15;
    pub const RDTSC: u32 = 16;
    pub const RSM: u32 = 17;
    pub const VMCALL: u32 = 18;
    pub const VMCLEAR: u32 = 19;
    pub const VMXON: u32 = 27;
    pub const CR_ACCESS: u32 = 28;
    pub const DR_ACCESS: u32 = 29;
    pub const IO: u32 = 30;
    pub const RDMSR: u32 = 31;
    pub const WRMSR: u32 = 32;
    pub const MWAIT: u32 = 36;
    pub const MONITOR_TRAP: u32 = 37;
    pub const MONITOR: u32 = 39;
    pub const PAUSE: u32 = 40;
    pub const TPR_BELOW_THRESHOLD: u32 = 43;
    pub const APIC_ACCESS: u32 = 44;
    pub const VIRTUALIZED_EOI: u32 = 45;
    pub const EPT_VIOLATION: u32 = 48;
    pub const EPT_MISCONFIGURATION: u32 = 49;
    pub const INVEPT: u32 = 50;
    pub const RDTSCP: u32 = 51;
    pub const PREEMPTION_TIMER: u32 = 52;
    pub const INVVPID: u32 = 53;
    pub const WBINVD: u32 = 54;
    pub const XSETBV: u32 = 55;
    pub const APIC_WRITE: u32 = 56;
    pub const INVPCID: u32 = 58;
    pub const VMFUNC: u32 = 59;
    pub const ENCLS: u32 = 60;
    pub const PML_FULL: u32 = 62;
    pub const XSAVES: u32 = 63;
    pub const XRSTORS: u32 = 64;
    pub const PCONFIG: u32 = 65;
    pub const UMWAIT: u32 = 67;
    pub const TPAUSE: u32 = 68;
    pub const LOADIWKEY: u32 = 69;
    pub const ENCLV: u32 = 70;
    pub const ENQCMD: u32 = 72;
    pub const ENQCMDS: u32 = 73;
    pub const BUS_LOCK: u32 = 74;
    pub const NOTIFY: u32 = 75;
    pub const SEAMCALL: u32 = 76;
    pub const TDCALL: u32 = 77;

    /// The entry failed (bit 31), for one of reasons 33, 34 and 41.
    pub const ENTRY_FAILED: u32 = 1 << 31;
}

/// Bits of the interruption-information fields (§25.8.3, §25.9.2).
const KIND_SHIFT: u32 = 8;
const HAS_ERROR_CODE: u32 = 1 << 11;
pub(super) const IRET_UNBLOCKED_NMI: u32 = 1 << 12;
pub(super) const VALID: u32 = 1 << 31;

const EXTERNAL: u32 = 0;
const NMI: u32 = 2;
const HARDWARE_EXCEPTION: u32 = 3;
const SOFTWARE_INTERRUPT: u32 = 4;
const PRIVILEGED_EXCEPTION: u32 = 5;
const SOFTWARE_EXCEPTION: u32 = 6;

/// VM-entry interruption information, error code and instruction length for an event.
/// Real mode pushes no error codes, so there (`protected` is false) none may be given (§27.2.1.3).
pub(super) const fn encode_event(event: Event, protected: bool) -> (u32, u32, u32) {
    let (kind, vector, error_code, length) = match event {
        Event::Interrupt(Vector(vector)) => (EXTERNAL, vector, None, 0),
        Event::Nmi => (NMI, 2, None, 0),
        Event::Exception {
            exception,
            error_code,
        } => (HARDWARE_EXCEPTION, exception as u8, error_code, 0),
        Event::Software {
            vector: Vector(vector),
            length,
            kind,
        } => (
            match kind {
                SoftwareKind::Interrupt => SOFTWARE_INTERRUPT,
                SoftwareKind::PrivilegedException => PRIVILEGED_EXCEPTION,
                SoftwareKind::Exception => SOFTWARE_EXCEPTION,
            },
            vector,
            None,
            length,
        ),
    };
    let info = VALID | kind << KIND_SHIFT | vector as u32;
    match error_code {
        // The entry's check allows the 16 bits that exceptions push, and bit 15 only for SGX.
        Some(code) if protected => (info | HAS_ERROR_CODE, code & 0x7fff, length as u32),
        _ => (info, 0, length as u32),
    }
}

/// The event in an interruption-information field; `None` where the field is not valid or names
/// what cannot be delivered.
pub(super) fn decode_event(info: u32, error_code: u32, length: u32) -> Option<Event> {
    if info & VALID == 0 {
        return None;
    }
    let vector = info as u8;
    let software = |kind| {
        Some(Event::Software {
            vector: Vector(vector),
            length: (length & 15) as u8,
            kind,
        })
    };
    match info >> KIND_SHIFT & 7 {
        EXTERNAL => Some(Event::Interrupt(Vector(vector))),
        NMI => Some(Event::Nmi),
        HARDWARE_EXCEPTION => Some(Event::Exception {
            exception: Exception::from_vector(vector)?,
            error_code: (info & HAS_ERROR_CODE != 0).then_some(error_code),
        }),
        SOFTWARE_INTERRUPT => software(SoftwareKind::Interrupt),
        PRIVILEGED_EXCEPTION => software(SoftwareKind::PrivilegedException),
        SOFTWARE_EXCEPTION => software(SoftwareKind::Exception),
        _ => None,
    }
}

/// Table 28-5.
#[inline]
pub(super) const fn decode_io(qualification: u64) -> IoExit {
    IoExit {
        port: (qualification >> 16) as u16,
        size: (qualification & 3) as u8 + 1,
        input: qualification & 1 << 3 != 0,
        string: qualification & 1 << 4 != 0,
        rep: qualification & 1 << 5 != 0,
    }
}

/// Table 28-3; `None` for a register that has no exits.
pub(super) const fn decode_cr(qualification: u64) -> Option<CrAccess> {
    let register = match qualification & 15 {
        0 => ControlRegister::Cr0,
        3 => ControlRegister::Cr3,
        4 => ControlRegister::Cr4,
        8 => ControlRegister::Cr8,
        _ => return None,
    };
    let gpr = Gpr::from_number((qualification >> 8) as u8);
    let op = match qualification >> 4 & 3 {
        0 => CrOp::Write(gpr),
        1 => CrOp::Read(gpr),
        2 => CrOp::Clts,
        _ => CrOp::Lmsw((qualification >> 16) as u16),
    };
    Some(CrAccess { register, op })
}

/// Table 28-4: register, whether it is written, and the operand.
pub(super) const fn decode_dr(qualification: u64) -> (DebugRegister, bool, Gpr) {
    let register = DebugRegister::from_number((qualification & 7) as u8);
    let gpr = Gpr::from_number((qualification >> 8) as u8);
    (register, qualification & 1 << 4 == 0, gpr)
}

/// Table 28-7: the access, and whether it was made by a walk of the guest's own tables (the
/// linear address is valid, bit 7, but the access is not to its translation, bit 8).
#[inline]
pub(super) const fn decode_ept(qualification: u64) -> (Access, bool) {
    (
        Access {
            write: qualification & 1 << 1 != 0,
            execute: qualification & 1 << 2 != 0,
        },
        qualification & 0x180 == 0x80,
    )
}

/// Table 28-6: offset in the APIC-access page, the access, and whether no instruction operand
/// lies there (a guest-physical access: a walk, or the delivery of an event).
pub(super) const fn decode_apic_access(qualification: u64) -> (u64, Access, bool) {
    let kind = qualification >> 12 & 15;
    (
        qualification & 0xfff,
        Access {
            write: kind == 1,
            execute: kind == 2,
        },
        !matches!(kind, 0..=2),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_survive_encoding() {
        for event in [
            Event::Interrupt(Vector(0x20)),
            Event::Interrupt(Vector(0xff)),
            Event::Nmi,
            Event::GP0,
            Event::UD,
            Event::page_fault(0x1f),
            Event::Software {
                vector: Vector(0x80),
                length: 2,
                kind: SoftwareKind::Interrupt,
            },
            Event::Software {
                vector: Vector(3),
                length: 1,
                kind: SoftwareKind::Exception,
            },
            Event::Software {
                vector: Vector(1),
                length: 1,
                kind: SoftwareKind::PrivilegedException,
            },
        ] {
            let (info, error, length) = encode_event(event, true);
            assert_eq!(decode_event(info, error, length), Some(event));
        }
        assert_eq!(decode_event(0x20, 0, 0), None, "not valid");
    }

    #[test]
    fn encodings_are_the_manuals() {
        assert_eq!(encode_event(Event::Nmi, true), (0x8000_0202, 0, 0));
        assert_eq!(encode_event(Event::GP0, true), (0x8000_0b0d, 0, 0));
        assert_eq!(
            encode_event(Event::GP0, false),
            (0x8000_030d, 0, 0),
            "real mode pushes no error code"
        );
    }

    #[test]
    fn qualifications() {
        // OUT DX, AL to 3f8h; REP INSD from 1f0h.
        let out = decode_io(0x03f8_0000);
        assert_eq!(
            (out.port, out.size, out.input, out.string),
            (0x3f8, 1, false, false)
        );
        let ins = decode_io(0x01f0_003b);
        assert_eq!(
            (ins.port, ins.size, ins.input, ins.string, ins.rep),
            (0x1f0, 4, true, true, true)
        );
        assert_eq!(
            decode_cr(0x0f00 | 4),
            Some(CrAccess {
                register: ControlRegister::Cr4,
                op: CrOp::Write(Gpr::R15)
            })
        );
        assert_eq!(
            decode_cr(0x0118),
            Some(CrAccess {
                register: ControlRegister::Cr8,
                op: CrOp::Read(Gpr::Rcx)
            })
        );
        assert_eq!(
            decode_cr(0x0001_0030),
            Some(CrAccess {
                register: ControlRegister::Cr0,
                op: CrOp::Lmsw(1)
            })
        );
        assert_eq!(decode_cr(2), None);
        assert_eq!(decode_dr(0x0317), (DebugRegister::Dr7, false, Gpr::Rbx));
        assert_eq!(decode_ept(0x182), (Access::WRITE, false));
        assert_eq!(decode_ept(0x081), (Access::READ, true));
        assert_eq!(decode_ept(0x184), (Access::EXECUTE, false));
        assert_eq!(decode_apic_access(0x10b0), (0xb0, Access::WRITE, false));
        assert_eq!(decode_apic_access(0xa300), (0x300, Access::READ, true));
    }
}
