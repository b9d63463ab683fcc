//! Why a virtual CPU left guest mode, in words both vendors share.

use crate::{ControlRegister, DebugRegister, Event, Exception, Gpr, GuestPhysAddr, Vector};

/// What kind of memory access was made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Access {
    /// A data write.
    pub write: bool,
    /// An instruction fetch.
    pub execute: bool,
}

impl Access {
    /// A data read.
    pub const READ: Self = Self {
        write: false,
        execute: false,
    };
    /// A data write.
    pub const WRITE: Self = Self {
        write: true,
        execute: false,
    };
    /// An instruction fetch.
    pub const EXECUTE: Self = Self {
        write: false,
        execute: true,
    };
}

/// A port access (Intel SDM Vol. 3C table 28-5, AMD APM Vol. 2 §15.10.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IoExit {
    /// The first port.
    pub port: u16,
    /// 1, 2 or 4 bytes.
    pub size: u8,
    /// `IN`/`INS` rather than `OUT`/`OUTS`.
    pub input: bool,
    /// `INS`/`OUTS`. The instruction is then emulated as a whole (see `machine::emulate`).
    pub string: bool,
    /// With a REP prefix (only with `string`).
    pub rep: bool,
}

/// What an access to a control register does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CrOp {
    /// `MOV CRn, reg`
    Write(Gpr),
    /// `MOV reg, CRn`
    Read(Gpr),
    /// `CLTS`
    Clts,
    /// `LMSW` with this source operand.
    Lmsw(u16),
    /// The hardware gave no operand (SVM without decode assists): decode the instruction.
    Undecoded {
        /// Whether the instruction writes the register.
        write: bool,
    },
}

/// An intercepted access to a control register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CrAccess {
    /// Which one.
    pub register: ControlRegister,
    /// What is done to it.
    pub op: CrOp,
}

/// The hardware refused to enter guest mode.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EntryFailure {
    /// VMX: VM-instruction error number, or the basic exit reason with bit 31 set. SVM: exit code.
    pub code: u64,
    /// VMX: exit qualification.
    pub detail: u64,
}

/// Why the virtual CPU left guest mode. Fields that cost a VMREAD and are not always needed are
/// read by the handler through [`crate::Vcpu`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// One that [`crate::Vcpu::rare_exit`] tells. [`crate::Vcpu::enter`] itself gives only those
    /// that guests make all day, so that they come in registers.
    Rare,
    /// `CPUID`
    Cpuid,
    /// `RDMSR`; the index is in ECX.
    Rdmsr,
    /// `WRMSR`; index in ECX, value in EDX:EAX.
    Wrmsr,
    /// `VMCALL` or `VMMCALL`: both are accepted on both vendors.
    Hypercall,
    /// A port access; one of a string instruction comes as [`Exit::Rare`].
    Io(IoExit),
    /// The nested page tables do not allow this access: never-touched RAM, a device, or nothing.
    NestedFault {
        /// Guest-physical address of the access.
        addr: GuestPhysAddr,
        /// What was tried.
        access: Access,
        /// The fault hit while the CPU walked the guest's own page tables, so no instruction
        /// operand lies at `addr`.
        walk: bool,
    },
    /// A nested-table entry is malformed: a fault of ours (VMX "EPT misconfiguration").
    NestedMisconfig {
        /// Guest-physical address of the access.
        addr: GuestPhysAddr,
    },
    /// A trap-like exit after a write to the virtual-APIC page (VMX APIC-write emulation):
    /// the value already stands in the page, and RIP is past the instruction.
    ApicWrite {
        /// Register offset, 0 to 0xff0.
        offset: u16,
    },
    /// `HLT`
    Hlt,
    /// `PAUSE` (in a loop).
    Pause,
    /// An interrupt of the machine, for the hypervisor. `Some` when the CPU acknowledged it
    /// already; `None` when it is still pending and is taken by enabling interrupts.
    ExternalInterrupt(Option<Vector>),
    /// An NMI of the machine.
    Nmi,
    /// The guest can take an external interrupt now (the window that was asked for).
    InterruptWindow,
    /// The guest can take an NMI now.
    NmiWindow,
    /// The VMX-preemption timer ran out.
    PreemptionTimer,
    /// The guest lowered its TPR below the threshold (VMX TPR shadow).
    TprBelowThreshold,
    /// A control-register access.
    Cr(CrAccess),
    /// A debug-register access.
    Dr {
        /// Which one.
        register: DebugRegister,
        /// Whether it writes the register.
        write: bool,
        /// The operand, where the hardware gives it.
        gpr: Option<Gpr>,
    },
    /// An intercepted exception; the vCPU has not delivered it.
    Exception {
        /// Which exception.
        exception: Exception,
        /// Its error code, if it has one.
        error_code: Option<u32>,
        /// #PF: the faulting address. #DB: the bits that would go into DR6.
        info: u64,
    },
    /// `INVLPG`
    Invlpg,
    /// `INVD`: without effect on a guest's memory (it is never lost); RIP moves on.
    Invd,
    /// `WBINVD` or `WBNOINVD`
    Wbinvd,
    /// `XSETBV`; index in ECX, value in EDX:EAX.
    Xsetbv,
    /// `RDPMC`
    Rdpmc,
    /// `RDTSC` (intercepted only on request).
    Rdtsc,
    /// `RDTSCP` (intercepted only on request).
    Rdtscp,
    /// `MONITOR`/`MONITORX`
    Monitor,
    /// `MWAIT`/`MWAITX`
    Mwait,
    /// An instruction of the virtualization extension, or one the guest's CPUID hides
    /// (VMXON, VMRUN, SKINIT, GETSEC, RSM, …): #UD.
    UndefinedInstruction,
    /// A hardware task switch (both vendors leave these to software). Guests that need it crash
    /// with a report.
    TaskSwitch,
    /// The guest shut down (triple fault).
    TripleFault,
    /// INIT or SIPI reached the core while in guest mode.
    InitOrSipi,
    /// An SMI or another event that needs nothing from us.
    Benign,
    /// Entry failed: the state or the controls are invalid.
    EntryFailed(EntryFailure),
    /// An exit reason this version does not know.
    Unknown {
        /// The hardware's exit reason or code.
        code: u64,
        /// Exit qualification or EXITINFO1.
        detail: u64,
    },
}

/// The outcome of injecting an exception on top of an event that was being delivered
/// (Intel SDM Vol. 3A table 6-5, AMD APM Vol. 2 §8.2.9).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Combined {
    /// Deliver this one (the second event, or a double fault).
    Deliver(Event),
    /// A fault while delivering a double fault: shutdown.
    TripleFault,
}

/// Combines an exception with the event in whose delivery it arose.
#[must_use]
pub fn combine(first: Option<Event>, second: Event) -> Combined {
    #[derive(PartialEq)]
    enum Class {
        Benign,
        Contributory,
        Page,
        Double,
    }
    fn class(event: Event) -> Class {
        match event {
            Event::Exception { exception, .. } => match exception {
                Exception::DivideError
                | Exception::InvalidTss
                | Exception::SegmentNotPresent
                | Exception::StackFault
                | Exception::GeneralProtection
                | Exception::ControlProtection => Class::Contributory,
                Exception::PageFault | Exception::Virtualization => Class::Page,
                Exception::DoubleFault => Class::Double,
                _ => Class::Benign,
            },
            _ => Class::Benign,
        }
    }
    let Some(first) = first else {
        return Combined::Deliver(second);
    };
    let double = Combined::Deliver(Event::Exception {
        exception: Exception::DoubleFault,
        error_code: Some(0),
    });
    match (class(first), class(second)) {
        (Class::Double, Class::Contributory | Class::Page) => Combined::TripleFault,
        (Class::Contributory, Class::Contributory)
        | (Class::Page, Class::Contributory | Class::Page) => double,
        _ => Combined::Deliver(second),
    }
}
