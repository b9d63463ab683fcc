//! One virtual CPU, without its vendor.

use crate::{
    AccessRights, ControlRegister, DebugRegister, DescriptorTable, Event, Exit, Gpr, Gprs,
    HostPhysAddr, RFlags, Segment, SegmentRegister,
};

/// How the guest reaches its local APIC's registers (Intel SDM Vol. 3A §11.12.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ApicMode {
    /// Not at all: IA32_APIC_BASE.EN is clear.
    Disabled,
    /// By memory.
    XApic,
    /// By MSRs 800H to 8FFH.
    X2Apic,
}

/// What currently holds back interrupts (Intel SDM Vol. 3C table 25-3).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Interruptibility {
    /// RFLAGS.IF is set, no STI or MOV-SS shadow, and no event waits for delivery: an interrupt
    /// can be injected.
    pub interrupts_open: bool,
    /// No NMI is being handled, no MOV-SS shadow, and no event waits: an NMI can be injected.
    pub nmi_open: bool,
}

/// A virtual CPU that hardware runs: VMX or SVM behind one set of words.
///
/// Between two entries everything here reads and writes the guest's architectural state. The
/// general-purpose registers are plain memory; the others may cost a VMREAD or VMWRITE each, so
/// handlers ask only for what they need.
pub trait Vcpu {
    /// Makes this vCPU the current one of the calling core: control structure, switched MSRs,
    /// debug registers and extended state (XSAVE) of the guest are on the core until
    /// [`Vcpu::unload`], so that an exit and entry in between need not touch them.
    fn load(&mut self);
    /// Takes the guest's state off the core.
    fn unload(&mut self);
    /// Enters guest mode and comes back with the reason. Host interrupts are disabled around it.
    /// An event that was being delivered when the guest left is queued again by the backend, so
    /// that the next entry delivers it unless [`Vcpu::inject`] combines something with it.
    fn enter(&mut self) -> Exit;
    /// What the last exit was, if it came as [`Exit::Rare`].
    fn rare_exit(&self) -> Exit;

    /// RAX to R15; the slot of RSP is not kept.
    fn gprs(&self) -> &Gprs;
    /// RAX to R15; the slot of RSP is not kept.
    fn gprs_mut(&mut self) -> &mut Gprs;

    /// RSP.
    fn rsp(&self) -> u64;
    /// Sets RSP.
    fn set_rsp(&mut self, value: u64);
    /// RIP.
    fn rip(&self) -> u64;
    /// Sets RIP. Also ends an STI or MOV-SS shadow, as finishing an instruction does.
    fn set_rip(&mut self, value: u64);
    /// The address of the instruction after the one that exited, where the hardware tells it (VMX
    /// always; SVM with next-RIP saving, and for port accesses). `None` means: decode it. Asked
    /// only after an exit that an instruction caused by what it is (not by a fault of it): after
    /// others VMX would give anything (Intel SDM Vol. 3C §28.2.5).
    fn next_rip(&self) -> Option<u64>;
    /// RFLAGS.
    fn rflags(&self) -> RFlags;
    /// Sets RFLAGS.
    fn set_rflags(&mut self, value: RFlags);

    /// A control register as the guest sees it.
    fn cr(&self, register: ControlRegister) -> u64;
    /// Sets a control register to a value already checked by the caller; adjusts the hardware's
    /// fixed bits, the mode controls, PAE pointers and the TLB as needed.
    fn set_cr(&mut self, register: ControlRegister, value: u64);
    /// Sets CR2 (before injecting a page fault).
    fn set_cr2(&mut self, value: u64) {
        self.set_cr(ControlRegister::Cr2, value);
    }
    /// A debug register as the guest sees it (DR4 and DR5 are DR6 and DR7).
    fn dr(&self, register: DebugRegister) -> u64;
    /// Sets a debug register.
    fn set_dr(&mut self, register: DebugRegister, value: u64);
    /// A segment register with its hidden part.
    fn segment(&self, register: SegmentRegister) -> Segment;
    /// Sets a segment register with its hidden part.
    fn set_segment(&mut self, register: SegmentRegister, value: Segment);
    /// GDTR.
    fn gdtr(&self) -> DescriptorTable;
    /// Sets GDTR.
    fn set_gdtr(&mut self, value: DescriptorTable);
    /// IDTR.
    fn idtr(&self) -> DescriptorTable;
    /// Sets IDTR.
    fn set_idtr(&mut self, value: DescriptorTable);

    /// IA32_EFER as the guest sees it.
    fn efer(&self) -> u64;
    /// Sets IA32_EFER to a value already checked (LMA follows CR0.PG and LME).
    fn set_efer(&mut self, value: u64);
    /// Reads an MSR that lives in the vCPU's hardware state (see `arch::msr::VCPU_STATE`);
    /// `None` for any other.
    fn msr(&self, index: u32) -> Option<u64>;
    /// Writes an MSR that lives in the vCPU's hardware state; `false` for any other. The value
    /// was checked (canonical, reserved bits).
    fn set_msr(&mut self, index: u32, value: u64) -> bool;
    /// XCR0.
    fn xcr0(&self) -> u64;
    /// Sets XCR0 to a value already checked.
    fn set_xcr0(&mut self, value: u64);

    /// Current privilege level, 0 to 3.
    fn cpl(&self) -> u8 {
        self.rights(SegmentRegister::Ss).dpl()
    }
    /// The attributes alone of a segment register, for where its other parts cost.
    fn rights(&self, register: SegmentRegister) -> AccessRights {
        self.segment(register).rights
    }

    /// Whether interrupts and NMIs can be injected now.
    fn interruptibility(&self) -> Interruptibility;
    /// Queues an event for the next entry. An exception that comes on top of an event whose
    /// delivery was cut short is combined with it ([`crate::combine`]); `false` means that the
    /// result is a triple fault. Interrupts and NMIs need an open window.
    #[must_use]
    fn inject(&mut self, event: Event) -> bool;
    /// The event that the next entry will deliver, if any.
    fn pending_event(&self) -> Option<Event>;
    /// Asks for an [`Exit::InterruptWindow`] as soon as the guest can take an interrupt.
    fn request_interrupt_window(&mut self, on: bool);
    /// Asks for an [`Exit::NmiWindow`] as soon as the guest can take an NMI.
    fn request_nmi_window(&mut self, on: bool);

    /// The guest's TSC is the machine's plus this offset, modulo 2⁶⁴.
    fn set_tsc_offset(&mut self, offset: u64);
    /// Leaves guest mode when the machine's TSC reaches this value, on backends that have a
    /// timer of their own (VMX-preemption timer); `u64::MAX` means never. Gives `false` where
    /// there is none, and the caller uses the local APIC timer of the core.
    fn set_deadline(&mut self, tsc: u64) -> bool;

    /// Forgets cached translations of this vCPU's nested tables (after an entry lost rights).
    fn flush_nested(&mut self, root: HostPhysAddr);

    /// The guest's TPR (CR8 << 4) where the hardware virtualizes it without the APIC page
    /// (SVM's V_TPR); `None` where the virtual-APIC page holds it or nothing does.
    fn virtual_tpr(&self) -> Option<u8>;
    /// Tells the hardware's copy of TPR, and the highest pending vector's priority class (0 for
    /// none) below which the guest's lowering of TPR must exit.
    fn set_virtual_tpr(&mut self, tpr: u8, threshold: u8);

    /// The guest's local APIC changed its mode: backends whose hardware virtualizes its registers
    /// follow. The APIC-access page, if the backend has one, is mapped by the caller in
    /// [`ApicMode::XApic`] only.
    fn set_apic_mode(&mut self, mode: ApicMode) {
        let _ = mode;
    }
    /// Asks for [`Exit::Pause`] when the guest spins in a loop of PAUSE, where the hardware counts
    /// them. Off at first: a vCPU that has a core to itself may spin, and one without siblings waits
    /// for a device.
    fn set_pause_exiting(&mut self, on: bool) {
        let _ = on;
    }
    /// Loads the PAE page-directory pointers after an emulated write of CR0, CR3 or CR4, on
    /// backends whose hardware does not read them itself (Intel SDM Vol. 3C §27.3.2.4).
    fn set_pdptes(&mut self, entries: [u64; 4]) {
        let _ = entries;
    }

    /// How many reads and writes of the hardware's control structure cost an instruction of their
    /// own (VMREAD, VMWRITE) since boot, in builds that count them.
    fn control_accesses(&self) -> Option<[u64; 2]> {
        None
    }

    /// Puts the vCPU into the state after RESET (Intel SDM Vol. 3A table 9-1).
    fn reset(&mut self);
    /// Puts the vCPU into the state after INIT: as after RESET, but extended state with XCR0, and
    /// MSRs that INIT leaves alone, stay (ibid.; AMD APM Vol. 2 table 14-1).
    fn init(&mut self);

    /// A general-purpose register by number, RSP included.
    fn gpr(&self, gpr: Gpr) -> u64 {
        if gpr == Gpr::Rsp {
            self.rsp()
        } else {
            self.gprs()[gpr]
        }
    }
    /// Sets a general-purpose register by number, RSP included.
    fn set_gpr(&mut self, gpr: Gpr, value: u64) {
        if gpr == Gpr::Rsp {
            self.set_rsp(value)
        } else {
            self.gprs_mut()[gpr] = value
        }
    }
}
