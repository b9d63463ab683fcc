//! One virtual CPU on AMD-V.
//!
//! The VMCB is plain memory, so most of [`Vcpu`] is a load or a store plus the clean bit of the
//! group written (AMD APM Vol. 2 §15.15). What needs more thought:
//!
//! - **Events.** The VMCB's EVENTINJ is the queue of one. A delivery that an exit cut short comes
//!   back in EXITINTINFO (§15.7.2) and is queued again, except `INT n`, `INT3` and `INTO`: RIP
//!   still stands on those, and they simply execute again.
//! - **Windows.** A virtual interrupt (V_IRQ) that is never delivered but intercepted (VINTR) tells
//!   when the guest can take one, and, by its priority, when TPR falls below a class (§15.21.4).
//! - **NMIs.** With V_NMI the hardware keeps the blocking. Without, it begins with the injection
//!   and ends when the guest's IRET has completed: the IRET intercept comes before that
//!   instruction, so one single step, hidden from the guest, follows when somebody waits.

use super::bitmaps::SvmBitmaps;
use super::caps::{SvmCaps, SvmFeatures, VM_HSAVE_PA};
use super::exit::{self, code};
use super::vmcb::{
    Clean, Control, IntCtl, Misc1, Misc2, Misc3, Save, Violations, Vmcb, event, tlb,
};
use super::{SvmError, entry};
use crate::page::HostPage;
use crate::percpu::this;
use crate::xstate::{XState, XStateCaps};
use arch::{
    Combined, ControlRegister, Cr0, DebugRegister, DescriptorTable, Efer, EntryFailure, Event,
    Exception, Exit, Gpr, Gprs, HostPhysAddr, Interruptibility, RFlags, Segment, SegmentRegister,
    Vcpu, Vector, combine, msr,
};
use core::sync::atomic::Ordering;
use x86_64::registers::model_specific::Msr;

/// DR6 and DR7 after RESET, which are also their bits that always read as one (§13.1.1).
const DR6_FIXED: u64 = 0xffff_0ff0;
const DR7_FIXED: u64 = 0x400;
/// DR6: a single step.
const DR6_BS: u64 = 1 << 14;
/// The CR intercepts at 000H: writes of CR8.
const CR8_WRITE: u32 = 1 << (16 + 8);
/// Consecutive PAUSEs before an exit, and the longest gap in cycles that still counts as one loop
/// (§15.14.4): a spinning vCPU gives its core away after some ten microseconds.
const PAUSE_COUNT: u16 = 3000;
const PAUSE_GAP: u16 = 128;

/// [`SvmVcpu::enter`] takes the long way when one of these is set.
mod attention {
    /// The vCPU is not loaded.
    pub const UNLOADED: u8 = 1 << 0;
    /// An NMI is being handled, or its window is waited for; or that of interrupts, or an event is
    /// queued, on QEMU's processor.
    pub const EVENTS: u8 = 1 << 1;
}

/// What a vCPU is made with.
#[derive(Clone, Copy)]
pub struct SvmConfig {
    /// Root of the VM's nested page tables: in the host's paging mode, four levels.
    pub nested_root: HostPhysAddr,
    /// The vCPU's tag in the TLB, 1 to [`SvmCaps::asids`] − 1.
    pub asid: u32,
    /// Another vCPU may have the same ASID on the same core: the TLB is then flushed at each load.
    pub asid_shared: bool,
    /// The machine's permission maps.
    pub bitmaps: &'static SvmBitmaps,
    /// What extended state there is.
    pub xstate: XStateCaps,
}

/// Where the guest stands with its NMIs, on processors without V_NMI.
#[derive(Clone, Copy, Debug, Default)]
struct Nmi {
    /// One was delivered, and its IRET has not completed.
    blocked: bool,
    /// The window is waited for.
    window: bool,
    /// The guest is about to execute the IRET at this address.
    iret: Option<u64>,
    /// The entry under way is a single step.
    step: Option<Step>,
}

/// What a single step has to put back.
#[derive(Clone, Copy, Debug)]
struct Step {
    rip: u64,
    dr6: u64,
    trap_flag: bool,
}

/// One virtual CPU on AMD-V.
pub struct SvmVcpu {
    gprs: Gprs,
    /// Physical address of the core's host VMCB while loaded.
    host: u64,
    attention: u8,
    features: SvmFeatures,
    vmcb: HostPage,
    /// VM_HSAVE_PA of the core this vCPU ran on last, 0 for none.
    core: u64,
    asid_shared: bool,
    nmi: Nmi,
    /// Asked for by [`Vcpu::request_interrupt_window`].
    window: bool,
    /// Asked for by [`Vcpu::set_virtual_tpr`].
    tpr_threshold: u8,
    /// What the last [`Exit::Rare`] was.
    rare: Exit,
    dr: [u64; 4],
    tsc_aux: u64,
    xstate: XState,
    has_xsave: bool,
}

impl SvmVcpu {
    /// Makes a vCPU in its state after RESET. `vmcb` becomes its control block.
    ///
    /// `config.nested_root` must be the root of tables from `memory` that outlive the vCPU and map
    /// nothing but the VM's frames.
    ///
    /// # Errors
    /// [`SvmError::Asid`] when the ASID is none of a guest.
    pub fn new(caps: &SvmCaps, vmcb: HostPage, config: SvmConfig) -> Result<Self, SvmError> {
        if !(1..caps.asids).contains(&config.asid) {
            return Err(SvmError::Asid {
                asked: config.asid,
                highest: caps.asids.saturating_sub(1),
            });
        }
        let mut vcpu = Self {
            gprs: Gprs::default(),
            host: 0,
            attention: attention::UNLOADED,
            features: caps.features,
            vmcb,
            core: 0,
            asid_shared: config.asid_shared,
            nmi: Nmi::default(),
            window: false,
            rare: Exit::Benign,
            tpr_threshold: 0,
            dr: [0; 4],
            tsc_aux: 0,
            xstate: XState::new(&config.xstate),
            has_xsave: config.xstate.has_xsave(),
        };
        set_controls(vcpu.control_mut(), caps, &config);
        vcpu.reset();
        Ok(vcpu)
    }

    /// Gives the control block's page back.
    #[must_use]
    pub fn into_page(mut self) -> HostPage {
        self.unload();
        self.vmcb
    }

    /// The instruction bytes the CPU fetched before the exit (decode assists: nested faults and
    /// intercepted #PF); empty where there are none.
    #[must_use]
    pub fn fetched_bytes(&self) -> &[u8] {
        let control = self.control();
        let length = usize::from(control.fetched_bytes & 15);
        if self.features.contains(SvmFeatures::DECODE_ASSISTS) {
            control.instruction_bytes.get(..length).unwrap_or(&[])
        } else {
            &[]
        }
    }

    /// Which of VMRUN's conditions (§15.5.1) the guest's state breaks: says more about an
    /// [`Exit::EntryFailed`], whose `detail` holds these bits.
    #[must_use]
    pub fn violations(&self) -> Violations {
        self.block().save.violations()
    }

    fn block(&self) -> &Vmcb {
        // SAFETY: the page is owned, aligned, initialized, and any bits are a `Vmcb`. The CPU
        // writes to it only inside `world_switch`, across which no reference lives.
        unsafe { &*self.vmcb.as_ptr().cast() }
    }

    fn block_mut(&mut self) -> &mut Vmcb {
        // SAFETY: as in `block`; `&mut self` makes the reference unique.
        unsafe { &mut *self.vmcb.as_ptr().cast() }
    }

    fn control(&self) -> &Control {
        &self.block().control
    }

    fn control_mut(&mut self) -> &mut Control {
        &mut self.block_mut().control
    }

    fn save(&self) -> &Save {
        &self.block().save
    }

    /// The guest's state for writing; `group` is what the CPU must read again.
    fn save_mut(&mut self, group: Clean) -> &mut Save {
        let block = self.block_mut();
        block.control.clean &= !group;
        &mut block.save
    }

    fn loaded(&self) -> bool {
        self.host != 0
    }

    /// Forgets this ASID's translations at the next entry.
    fn flush(&mut self) {
        let by_asid = self.features.contains(SvmFeatures::FLUSH_BY_ASID);
        self.control_mut().tlb_control = if by_asid {
            tlb::FLUSH_GUEST
        } else {
            tlb::FLUSH_ALL
        };
    }

    fn has_vnmi(&self) -> bool {
        self.features.contains(SvmFeatures::VNMI)
    }

    fn shadow(&self) -> bool {
        self.control().interrupt_shadow & 1 != 0
    }

    /// EFER.LMA follows LME and CR0.PG (§14.6.1).
    fn set_paging_mode(&mut self, cr0: u64, efer: u64) {
        let long = efer & Efer::LME.bits() != 0 && cr0 & Cr0::PG.bits() != 0;
        let efer = efer & !Efer::LMA.bits() | if long { Efer::LMA.bits() } else { 0 };
        let save = self.save_mut(Clean::CRX);
        save.cr0 = cr0 | Cr0::ET.bits();
        save.efer = efer | Efer::SVME.bits();
        self.flush();
    }

    /// Brings V_IRQ and its priority to what is asked for. Where CR8 writes exit, nothing can
    /// lower the TPR unseen.
    fn arm_virtual_interrupt(&mut self) {
        let wanted = if self.window {
            IntCtl::V_IRQ | IntCtl::V_IGN_TPR | IntCtl::V_INTR_PRIO
        } else if self.tpr_threshold > 0 && self.control().intercept_cr & CR8_WRITE == 0 {
            IntCtl::V_IRQ | IntCtl::from_bits_retain(u64::from(self.tpr_threshold) << 16)
        } else {
            IntCtl::empty()
        };
        let mask = IntCtl::V_IRQ | IntCtl::V_IGN_TPR | IntCtl::V_INTR_PRIO;
        let control = self.control_mut();
        let word = control.int_ctl & !mask | wanted;
        if word != control.int_ctl {
            control.int_ctl = word;
            control.clean &= !Clean::TPR;
        }
    }

    /// Into the guest and back, with what every exit needs: RAX, which the hardware keeps, and the
    /// fields that hold for one entry.
    #[inline(always)]
    fn switch(&mut self) {
        let (guest, host) = (self.vmcb.phys().as_u64(), self.host);
        self.block_mut().save.rax = self.gprs[Gpr::Rax];
        // SAFETY: loaded (else `attention` is set, and `before_entry` says no), so that SVM is on
        // and `host` was saved here; the block is this vCPU's, with the intercepts of
        // `set_controls`; the caller has interrupts off, by the trait.
        unsafe { entry::world_switch(&mut self.gprs, guest, host) };
        let block = self.block_mut();
        let (rax, info) = (block.save.rax, block.control.exit_int_info);
        // Processors without clean bits ignore them.
        block.control.clean = Clean::all();
        block.control.tlb_control = tlb::KEEP;
        block.control.event_inj = 0;
        self.gprs[Gpr::Rax] = rax;
        if info & event::VALID != 0 {
            self.requeue();
        }
    }

    #[inline(always)]
    fn decode(&mut self) -> Exit {
        match exit::decode(self.block()) {
            Exit::InterruptWindow if !self.window => Exit::TprBelowThreshold,
            Exit::Rare => {
                self.decode_rare();
                Exit::Rare
            }
            exit => exit,
        }
    }

    #[cold]
    #[inline(never)]
    fn decode_rare(&mut self) {
        self.rare = exit::rare(self.block(), &self.features);
        if self.rare == Exit::Nmi {
            // The guest that was left shows the watchdog, who may have sent it, that all is well.
            this().beat();
        }
    }

    /// Queues the event again whose delivery was cut short.
    #[cold]
    fn requeue(&mut self) {
        let control = self.control_mut();
        control.event_inj = requeue(control.exit_int_info);
        self.update_attention();
    }

    /// [`Vcpu::enter`] while an NMI is being handled or waits, and of a vCPU that is not loaded.
    #[cold]
    #[inline(never)]
    fn enter_attended(&mut self, exit: &mut Exit) {
        *exit = if let Some(exit) = self.before_entry() {
            exit
        } else {
            let lent = self.is_emulated() && self.lend_virtual_interrupt();
            self.switch();
            if lent {
                self.take_virtual_interrupt_back();
            }
            self.after_exit().unwrap_or_else(|| self.decode())
        };
        if let Exit::EntryFailed(_) | Exit::NmiWindow | Exit::Benign = exit {
            self.rare = core::mem::replace(exit, Exit::Rare);
        }
    }

    /// What comes before an entry in that case: `Some` is an exit that needs no entry.
    fn before_entry(&mut self) -> Option<Exit> {
        if !self.loaded() {
            return Some(Exit::EntryFailed(EntryFailure {
                code: u64::MAX,
                detail: Violations::NOT_LOADED.bits().into(),
            }));
        }
        let shadow = self.shadow();
        // The window would open at once, between an STI and the HLT that waits for just this
        // interrupt.
        let forgets = shadow && self.window && self.is_emulated();
        if !self.nmi.window && !forgets || self.pending_event().is_some() {
            return None;
        }
        if self.nmi.window && !self.nmi.blocked && !shadow {
            return Some(self.nmi_window());
        }
        let save = self.save();
        let (rip, dr6, rflags) = (save.rip, save.dr6, save.rflags);
        // While the handler runs, its IRET is intercepted. When the guest stands on it, or in a
        // shadow, the window opens one instruction later.
        if forgets || !self.nmi.blocked || self.nmi.iret == Some(rip) {
            if forgets {
                self.hold_virtual_interrupt();
            }
            self.block_mut().save.rflags = rflags | RFlags::TF.bits();
            let trap_flag = rflags & RFlags::TF.bits() != 0;
            self.nmi.step = Some(Step {
                rip,
                dr6,
                trap_flag,
            });
        }
        None
    }

    /// What comes after it: `Some` is the exit in place of the hardware's.
    fn after_exit(&mut self) -> Option<Exit> {
        let code = self.control().exit_code as u32;
        let rip = self.save().rip;
        let iret = self.nmi.iret;
        if iret.is_some_and(|at| at != rip) {
            self.nmi.iret = None;
            self.nmi.blocked = false;
        }
        let mut stepped = false;
        if let Some(step) = self.nmi.step.take() {
            let save = &mut self.block_mut().save;
            // An IRET that completed brought the flags of whom it returned to.
            if iret.is_none() || rip == step.rip {
                let tf = RFlags::TF.bits();
                save.rflags = save.rflags & !tf | if step.trap_flag { tf } else { 0 };
            }
            if code == code::EXCEPTION_DB && !step.trap_flag {
                // Nothing but our step, unless breakpoints were hit as well.
                stepped = save.dr6 & 0xf == step.dr6 & 0xf;
                let dr6 = if stepped {
                    step.dr6
                } else {
                    save.dr6 & !DR6_BS
                };
                self.save_mut(Clean::DRX).dr6 = dr6;
            }
        }
        if code == code::IRET {
            self.nmi.iret = Some(rip);
            self.intercept_iret(false);
        }
        self.arm_virtual_interrupt();
        self.update_attention();
        if !stepped {
            return None;
        }
        Some(if self.nmi.window && !self.nmi.blocked {
            self.nmi_window()
        } else {
            // Who waits for interrupts looks again.
            Exit::Benign
        })
    }

    /// Whether the processor is QEMU's, which is the one without next-RIP saving. It forgets an
    /// interrupt shadow at VMRUN, and delivers an interrupt from EVENTINJ a second time when it
    /// turns to its devices before the guest's next exception, interrupt or exit.
    const fn is_emulated(&self) -> bool {
        !self.features.contains(SvmFeatures::NEXT_RIP)
    }

    /// Has the interrupt in EVENTINJ delivered as a virtual one (§15.21.4), which that processor
    /// does once: the guest can take it, so it comes before its first instruction. `false` if
    /// there is none. No window is told of during this entry: what else waits is looked at again
    /// when the guest ends this interrupt, which exits.
    fn lend_virtual_interrupt(&mut self) -> bool {
        let interrupt = event::VALID | event::INTERRUPT;
        let control = self.control_mut();
        if control.event_inj & (event::VALID | event::TYPE) != interrupt {
            return false;
        }
        let vector = control.event_inj as u8;
        control.event_inj = 0;
        control.int_ctl |= IntCtl::V_IRQ | IntCtl::V_IGN_TPR | IntCtl::V_INTR_PRIO;
        control.int_ctl |= IntCtl::from_bits_retain(u64::from(vector) << 32);
        control.intercept_misc1.remove(Misc1::VINTR);
        control.clean &= !(Clean::TPR | Clean::INTERCEPTS);
        true
    }

    /// After the exit: an interrupt that was not delivered is queued again.
    fn take_virtual_interrupt_back(&mut self) {
        let control = self.control_mut();
        if control.int_ctl.contains(IntCtl::V_IRQ) {
            let vector = (control.int_ctl & IntCtl::V_INTR_VECTOR).bits() >> 32;
            control.event_inj = event::VALID | event::INTERRUPT | vector;
        }
        control
            .int_ctl
            .remove(IntCtl::V_IRQ | IntCtl::V_INTR_VECTOR);
        control.intercept_misc1.insert(Misc1::VINTR);
        control.clean &= !(Clean::TPR | Clean::INTERCEPTS);
    }

    /// Takes V_IRQ back for one entry.
    fn hold_virtual_interrupt(&mut self) {
        let control = self.control_mut();
        control.int_ctl &= !IntCtl::V_IRQ;
        control.clean &= !Clean::TPR;
    }

    /// The window is told once: who still waits asks again.
    fn nmi_window(&mut self) -> Exit {
        self.nmi.window = false;
        self.update_attention();
        Exit::NmiWindow
    }

    fn update_attention(&mut self) {
        let queued = self.control().event_inj & event::VALID != 0;
        let events =
            self.nmi.blocked || self.nmi.window || (self.window || queued) && self.is_emulated();
        self.attention = if self.loaded() {
            0
        } else {
            attention::UNLOADED
        } | if events { attention::EVENTS } else { 0 };
    }

    fn intercept_iret(&mut self, on: bool) {
        let control = self.control_mut();
        control.intercept_misc1.set(Misc1::IRET, on);
        control.clean &= !Clean::INTERCEPTS;
    }
}

/// The fields of the control area that hold for a vCPU's life.
fn set_controls(control: &mut Control, caps: &SvmCaps, config: &SvmConfig) {
    // INTR, NMI, SMI, INIT (§15.13): the machine's events are the hypervisor's. QEMU has no INIT
    // intercept, so a core in guest mode is never sent one. VINTR: the windows.
    control.intercept_misc1 = Misc1::INTR | Misc1::NMI | Misc1::SMI | Misc1::INIT | Misc1::VINTR
        // CPUID: what the guest is told is policy. RDPMC: the counters are the host's.
        | Misc1::CPUID | Misc1::RDPMC
        // INVD (§15.9) would throw away the host's dirty lines; HLT would stop the core.
        | Misc1::INVD | Misc1::HLT
        // SVM's own (§15.9): the guest is not told of SVM, though its EFER.SVME must be 1.
        | Misc1::INVLPGA
        // Ports and MSRs by the maps (§15.10, §15.11).
        | Misc1::IOIO_PROT | Misc1::MSR_PROT
        // A task switch's checks are not those of this guest's tables (§15.14.1); FERR_FREEZE
        // would freeze the core (§15.14.2); SHUTDOWN would be the machine's (§15.14.3).
        | Misc1::TASK_SWITCH | Misc1::FERR_FREEZE | Misc1::SHUTDOWN;
    // VMRUN must be intercepted (§15.5.1); VMMCALL is the hypercall (§15.18).
    control.intercept_misc2 = Misc2::VMRUN | Misc2::VMMCALL | Misc2::VMLOAD | Misc2::VMSAVE
        | Misc2::STGI | Misc2::CLGI | Misc2::SKINIT
        // WBINVD stalls every core that shares a cache; MWAIT would stop the core as HLT does;
        // XSETBV: XCR0 is switched with the vCPU (§15.9).
        | Misc2::WBINVD | Misc2::MONITOR | Misc2::MWAIT | Misc2::XSETBV;
    // #MC is the machine's. #AC and #DB can be made to fault again and again in their own
    // delivery, where no interrupt is taken: intercepted, the loop passes here each time.
    control.intercept_exceptions = [
        Exception::MachineCheck,
        Exception::AlignmentCheck,
        Exception::Debug,
    ]
    .map(|exception| 1 << exception as u32)
    .iter()
    .fold(0, |bits, bit| bits | bit);
    // CR, DR: none as a rule. TPR is V_TPR, CR2 and DR6/DR7 are in the VMCB, DR0–DR3 in the registers; CR0,
    // CR3 and CR4 do nothing under nested paging that the hardware does not do for the guest
    // (§15.25). Old processors, and QEMU, which dies of some CR8 writes while a virtual
    // interrupt waits and takes one of equal priority, are known by their lack of decode assists:
    // there, CR8 writes exit.
    if !caps.has(SvmFeatures::DECODE_ASSISTS) {
        control.intercept_cr = CR8_WRITE;
    }
    if caps.has(SvmFeatures::RDPRU) {
        control.intercept_misc2 |= Misc2::RDPRU;
    }
    // A guest must not flush other guests' translations by broadcast (§15.9).
    control.intercept_misc3 = Misc3::empty();
    if caps.has(SvmFeatures::INVLPGB) {
        control.intercept_misc3 |= Misc3::INVLPGB | Misc3::INVLPGB_ILLEGAL | Misc3::TLBSYNC;
    }
    if caps.has(SvmFeatures::MCOMMIT) {
        control.intercept_misc3 |= Misc3::MCOMMIT;
    }
    // For when PAUSE is intercepted: without a filter each single one exits.
    if caps.has(SvmFeatures::PAUSE_FILTER) {
        control.pause_filter_count = PAUSE_COUNT;
        if caps.has(SvmFeatures::PAUSE_THRESHOLD) {
            control.pause_filter_threshold = PAUSE_GAP;
        }
    }
    control.iopm_base = config.bitmaps.iopm().as_u64();
    control.msrpm_base = config.bitmaps.msrpm().as_u64();
    control.asid = config.asid;
    control.nested_control = 1;
    control.nested_cr3 = config.nested_root.as_u64();
}

/// EVENTINJ of an event; `None` for one that comes again by executing its instruction.
/// Exceptions push no error code in real mode.
fn encode(event: Event, protected: bool) -> Option<u64> {
    Some(match event {
        Event::Interrupt(Vector(vector)) => event::VALID | event::INTERRUPT | u64::from(vector),
        Event::Nmi => event::VALID | event::NMI | 2,
        Event::Exception {
            exception,
            error_code,
        } => {
            let error = match error_code {
                Some(error) if protected => event::ERROR_VALID | u64::from(error) << 32,
                _ => 0,
            };
            event::VALID | event::EXCEPTION | exception as u64 | error
        }
        Event::Software { .. } => return None,
    })
}

/// The event in EVENTINJ.
fn decode_event(field: u64) -> Option<Event> {
    if field & event::VALID == 0 {
        return None;
    }
    let vector = field as u8;
    Some(match field & event::TYPE {
        event::NMI => Event::Nmi,
        event::EXCEPTION => Event::Exception {
            exception: Exception::from_vector(vector)?,
            error_code: (field & event::ERROR_VALID != 0).then_some((field >> 32) as u32),
        },
        _ => Event::Interrupt(Vector(vector)),
    })
}

/// What to inject again of an EXITINTINFO that is valid; 0 for nothing.
///
/// QEMU calls the delivery of a virtual interrupt an exception, and an NMI's one of vector 2;
/// VMRUN refuses both as such.
fn requeue(info: u64) -> u64 {
    let kind = match (info & event::TYPE, info as u8) {
        (event::INTERRUPT, _) => event::INTERRUPT,
        (event::NMI, _) | (event::EXCEPTION, 2) => event::NMI,
        // INT3 and INTO (also with the type of INT n) execute again.
        (event::EXCEPTION, 3 | 4) => return 0,
        (event::EXCEPTION, 0..32) => event::EXCEPTION,
        (event::EXCEPTION, _) => event::INTERRUPT,
        _ => return 0,
    };
    let error = event::ERROR_VALID | 0xffff_ffff << 32;
    let kept = if kind == event::EXCEPTION && info & event::ERROR_VALID != 0 {
        error
    } else {
        0
    };
    event::VALID | kind | info & (0xff | kept)
}

impl Vcpu for SvmVcpu {
    fn set_pause_exiting(&mut self, on: bool) {
        if !self.features.contains(SvmFeatures::PAUSE_FILTER) {
            return;
        }
        let control = self.control_mut();
        if control.intercept_misc1.contains(Misc1::PAUSE) != on {
            control.intercept_misc1.set(Misc1::PAUSE, on);
            control.clean &= !Clean::INTERCEPTS;
        }
    }

    fn load(&mut self) {
        if self.loaded() {
            return;
        }
        // SAFETY: a vCPU exists only where SVM was detected, so the MSR exists.
        let hsave = unsafe { Msr::new(VM_HSAVE_PA).read() };
        if hsave == 0 {
            return; // SVM is off on this core: the next entry says so.
        }
        if hsave != self.core {
            // What another core cached of this block and this ASID says nothing here (§15.15.1).
            self.core = hsave;
            self.control_mut().clean = Clean::empty();
            self.flush();
        } else if self.asid_shared {
            self.flush();
        }
        self.host = this().host_save.load(Ordering::Relaxed);
        self.update_attention();
        // SAFETY: VM_HSAVE_PA is set, so `Svm::enable` ran here and owns the page behind. DR7 is
        // as #VMEXIT left it. TSC_AUX is written where it exists; IBPB where PRED_CMD does. The
        // core was made ready for XSAVE at bring-up.
        unsafe {
            entry::save_host(self.host);
            if self.features.contains(SvmFeatures::IBPB) {
                // What another guest trained must not steer this one (Vol. 2 §3.2.9).
                Msr::new(0x49).write(1);
            }
            entry::load_debug(&self.dr);
            if self.features.contains(SvmFeatures::TSC_AUX) {
                Msr::new(msr::IA32_TSC_AUX).write(self.tsc_aux);
            }
            self.xstate.restore();
        }
    }

    fn unload(&mut self) {
        if !self.loaded() {
            return;
        }
        let xcr0 = self.xcr0();
        self.host = 0;
        self.update_attention();
        // SAFETY: the state on the core is this vCPU's since `load`; else as there.
        unsafe {
            self.xstate.set_xcr0(xcr0, false);
            self.xstate.save();
            self.dr = entry::save_debug();
            if self.features.contains(SvmFeatures::TSC_AUX) {
                self.tsc_aux = Msr::new(msr::IA32_TSC_AUX).read();
            }
        }
    }

    // Inlined into the run loop, which then saves only the registers it needs across the switch.
    #[inline(always)]
    fn enter(&mut self) -> Exit {
        if self.attention != 0 {
            // Filled in place: what is returned by pointer is no more in registers.
            let mut exit = Exit::Benign;
            self.enter_attended(&mut exit);
            return exit;
        }
        self.switch();
        self.decode()
    }

    fn rare_exit(&self) -> Exit {
        self.rare
    }

    #[inline]
    fn gprs(&self) -> &Gprs {
        &self.gprs
    }

    #[inline]
    fn gprs_mut(&mut self) -> &mut Gprs {
        &mut self.gprs
    }

    #[inline]
    fn rsp(&self) -> u64 {
        self.save().rsp
    }

    #[inline]
    fn set_rsp(&mut self, value: u64) {
        self.block_mut().save.rsp = value;
    }

    #[inline]
    fn rip(&self) -> u64 {
        self.save().rip
    }

    #[inline]
    fn set_rip(&mut self, value: u64) {
        let block = self.block_mut();
        block.save.rip = value;
        block.control.interrupt_shadow = 0;
    }

    #[inline]
    fn next_rip(&self) -> Option<u64> {
        let control = self.control();
        if control.exit_code as u32 == code::IOIO {
            return Some(control.exit_info_2);
        }
        // Zero where the exit is none of an instruction (§15.7.1).
        let known = self.features.contains(SvmFeatures::NEXT_RIP) && control.next_rip != 0;
        known.then_some(control.next_rip)
    }

    #[inline]
    fn rflags(&self) -> RFlags {
        RFlags::from_bits_retain(self.save().rflags)
    }

    #[inline]
    fn set_rflags(&mut self, value: RFlags) {
        self.block_mut().save.rflags = value.bits() | RFlags::FIXED.bits();
    }

    fn cr(&self, register: ControlRegister) -> u64 {
        match register {
            ControlRegister::Cr0 => self.save().cr0,
            ControlRegister::Cr2 => self.save().cr2,
            ControlRegister::Cr3 => self.save().cr3,
            ControlRegister::Cr4 => self.save().cr4,
            ControlRegister::Cr8 => self.control().int_ctl.bits() & 15,
        }
    }

    fn set_cr(&mut self, register: ControlRegister, value: u64) {
        match register {
            ControlRegister::Cr0 => self.set_paging_mode(value, self.save().efer),
            ControlRegister::Cr2 => self.save_mut(Clean::CR2).cr2 = value,
            ControlRegister::Cr3 => {
                self.save_mut(Clean::CRX).cr3 = value;
                self.flush();
            }
            ControlRegister::Cr4 => {
                self.save_mut(Clean::CRX).cr4 = value;
                self.flush();
            }
            ControlRegister::Cr8 => self.set_virtual_tpr((value as u8) << 4, self.tpr_threshold),
        }
    }

    fn dr(&self, register: DebugRegister) -> u64 {
        let number = match register {
            DebugRegister::Dr4 | DebugRegister::Dr6 => return self.save().dr6,
            DebugRegister::Dr5 | DebugRegister::Dr7 => return self.save().dr7,
            DebugRegister::Dr0 => 0,
            DebugRegister::Dr1 => 1,
            DebugRegister::Dr2 => 2,
            DebugRegister::Dr3 => 3,
        };
        if self.loaded() {
            // SAFETY: loaded: ring 0 of the hypervisor, with DR7 as #VMEXIT left it.
            unsafe { entry::save_debug()[number] }
        } else {
            self.dr[number]
        }
    }

    fn set_dr(&mut self, register: DebugRegister, value: u64) {
        let number = match register {
            DebugRegister::Dr4 | DebugRegister::Dr6 => {
                self.save_mut(Clean::DRX).dr6 = value & 0xe00f | DR6_FIXED;
                return;
            }
            DebugRegister::Dr5 | DebugRegister::Dr7 => {
                self.save_mut(Clean::DRX).dr7 = value & 0xffff_23ff | DR7_FIXED;
                return;
            }
            DebugRegister::Dr0 => 0,
            DebugRegister::Dr1 => 1,
            DebugRegister::Dr2 => 2,
            DebugRegister::Dr3 => 3,
        };
        if self.loaded() {
            // SAFETY: as in `dr`.
            unsafe {
                self.dr = entry::save_debug();
                self.dr[number] = value;
                entry::load_debug(&self.dr);
            }
        } else {
            self.dr[number] = value;
        }
    }

    fn segment(&self, register: SegmentRegister) -> Segment {
        let save = self.save();
        let mut segment = Segment::from(match register {
            SegmentRegister::Ldtr => save.ldtr,
            SegmentRegister::Tr => save.tr,
            _ => save.segments[register as usize % 6],
        });
        if register == SegmentRegister::Ss {
            // The hardware keeps CPL apart; SYSRET may leave SS with another DPL.
            segment.rights.0 = segment.rights.0 & !0x60 | u32::from(save.cpl & 3) << 5;
        }
        segment
    }

    fn set_segment(&mut self, register: SegmentRegister, value: Segment) {
        let save = self.save_mut(Clean::SEGMENTS);
        match register {
            SegmentRegister::Ldtr => save.ldtr = value.into(),
            SegmentRegister::Tr => save.tr = value.into(),
            _ => save.segments[register as usize % 6] = value.into(),
        }
        if register == SegmentRegister::Ss {
            save.cpl = value.rights.dpl();
        }
    }

    fn gdtr(&self) -> DescriptorTable {
        self.save().gdtr.into()
    }

    fn set_gdtr(&mut self, value: DescriptorTable) {
        self.save_mut(Clean::TABLES).gdtr = value.into();
    }

    fn idtr(&self) -> DescriptorTable {
        self.save().idtr.into()
    }

    fn set_idtr(&mut self, value: DescriptorTable) {
        self.save_mut(Clean::TABLES).idtr = value.into();
    }

    #[inline]
    fn efer(&self) -> u64 {
        self.save().efer & !Efer::SVME.bits()
    }

    fn set_efer(&mut self, value: u64) {
        self.set_paging_mode(self.save().cr0, value);
    }

    fn msr(&self, index: u32) -> Option<u64> {
        let save = self.save();
        Some(match index {
            msr::IA32_EFER => self.efer(),
            msr::IA32_STAR => save.star,
            msr::IA32_LSTAR => save.lstar,
            msr::IA32_CSTAR => save.cstar,
            msr::IA32_FMASK => save.sfmask,
            msr::IA32_FS_BASE => save.segments[SegmentRegister::Fs as usize].base,
            msr::IA32_GS_BASE => save.segments[SegmentRegister::Gs as usize].base,
            msr::IA32_KERNEL_GS_BASE => save.kernel_gs_base,
            msr::IA32_SYSENTER_CS => save.sysenter_cs,
            msr::IA32_SYSENTER_ESP => save.sysenter_esp,
            msr::IA32_SYSENTER_EIP => save.sysenter_eip,
            msr::IA32_PAT => save.g_pat,
            msr::IA32_DEBUGCTL => save.dbgctl,
            msr::IA32_SPEC_CTRL if self.features.contains(SvmFeatures::VIRTUAL_SPEC_CTRL) => {
                save.spec_ctrl
            }
            msr::IA32_TSC_AUX if self.features.contains(SvmFeatures::TSC_AUX) => {
                if self.loaded() {
                    // SAFETY: the MSR exists, and holds this vCPU's value while it is loaded.
                    unsafe { Msr::new(index).read() }
                } else {
                    self.tsc_aux
                }
            }
            _ => return None,
        })
    }

    fn set_msr(&mut self, index: u32, value: u64) -> bool {
        let features = self.features;
        let save = &mut self.block_mut().save;
        match index {
            msr::IA32_EFER => self.set_efer(value),
            msr::IA32_STAR => save.star = value,
            msr::IA32_LSTAR => save.lstar = value,
            msr::IA32_CSTAR => save.cstar = value,
            msr::IA32_FMASK => save.sfmask = value,
            msr::IA32_FS_BASE => save.segments[SegmentRegister::Fs as usize].base = value,
            msr::IA32_GS_BASE => save.segments[SegmentRegister::Gs as usize].base = value,
            msr::IA32_KERNEL_GS_BASE => save.kernel_gs_base = value,
            msr::IA32_SYSENTER_CS => save.sysenter_cs = value,
            msr::IA32_SYSENTER_ESP => save.sysenter_esp = value,
            msr::IA32_SYSENTER_EIP => save.sysenter_eip = value,
            msr::IA32_PAT => self.save_mut(Clean::NESTED).g_pat = value,
            msr::IA32_DEBUGCTL => {
                // Recording needs the machine's last-branch MSRs switched (§15.23); without
                // that the value is only remembered.
                let on = value != 0 && features.contains(SvmFeatures::LBR);
                self.save_mut(Clean::LBR).dbgctl = value;
                self.control_mut().virt_ext = on.into();
            }
            msr::IA32_SPEC_CTRL if features.contains(SvmFeatures::VIRTUAL_SPEC_CTRL) => {
                save.spec_ctrl = value;
            }
            msr::IA32_TSC_AUX if features.contains(SvmFeatures::TSC_AUX) => {
                self.tsc_aux = value;
                if self.loaded() {
                    // SAFETY: the MSR exists; the hypervisor itself does not use it. Its upper
                    // half is reserved, and the caller checked that it is zero.
                    unsafe { Msr::new(index).write(value & 0xffff_ffff) };
                }
            }
            _ => return false,
        }
        true
    }

    /// Of a loaded vCPU this is the register's: QEMU 7.2 has no XSETBV intercept.
    fn xcr0(&self) -> u64 {
        if self.loaded() && self.has_xsave {
            // SAFETY: with XSAVE, the core was made ready for it at bring-up.
            unsafe { entry::read_xcr0() }
        } else {
            self.xstate.xcr0()
        }
    }

    fn set_xcr0(&mut self, value: u64) {
        let on_core = self.loaded();
        // SAFETY: the core was made ready for XSAVE at bring-up.
        unsafe { self.xstate.set_xcr0(value, on_core) };
    }

    #[inline]
    fn cpl(&self) -> u8 {
        self.save().cpl & 3
    }

    /// SVM does not tell an STI shadow from one of MOV SS: either holds back NMIs too.
    #[inline]
    fn interruptibility(&self) -> Interruptibility {
        let control = self.control();
        let free = control.event_inj & event::VALID == 0 && control.interrupt_shadow & 1 == 0;
        Interruptibility {
            interrupts_open: free && self.save().rflags & RFlags::IF.bits() != 0,
            // With V_NMI the hardware holds it back by itself.
            nmi_open: self.has_vnmi() || free && !self.nmi.blocked,
        }
    }

    fn inject(&mut self, event: Event) -> bool {
        if event == Event::Nmi && self.has_vnmi() {
            let control = self.control_mut();
            control.int_ctl |= IntCtl::V_NMI;
            control.clean &= !Clean::TPR;
            return true;
        }
        let event = match event {
            Event::Exception { .. } => match combine(self.pending_event(), event) {
                Combined::Deliver(event) => event,
                Combined::TripleFault => return false,
            },
            _ => event,
        };
        let protected = self.save().cr0 & Cr0::PE.bits() != 0;
        if let Some(field) = encode(event, protected) {
            self.control_mut().event_inj = field;
        }
        if event == Event::Nmi {
            self.nmi = Nmi {
                blocked: true,
                ..Nmi::default()
            };
            self.intercept_iret(true);
        }
        self.update_attention();
        true
    }

    #[inline]
    fn pending_event(&self) -> Option<Event> {
        decode_event(self.control().event_inj)
    }

    fn request_interrupt_window(&mut self, on: bool) {
        self.window = on;
        self.arm_virtual_interrupt();
        self.update_attention();
    }

    fn request_nmi_window(&mut self, on: bool) {
        self.nmi.window = on && !self.has_vnmi();
        self.update_attention();
    }

    fn set_tsc_offset(&mut self, offset: u64) {
        let control = self.control_mut();
        control.tsc_offset = offset;
        control.clean &= !Clean::INTERCEPTS;
    }

    /// SVM has no timer of its own.
    fn set_deadline(&mut self, _tsc: u64) -> bool {
        false
    }

    fn flush_nested(&mut self, root: HostPhysAddr) {
        let control = self.control_mut();
        control.nested_cr3 = root.as_u64();
        control.clean &= !Clean::NESTED;
        self.flush();
    }

    #[inline]
    fn virtual_tpr(&self) -> Option<u8> {
        Some((self.control().int_ctl.bits() as u8 & 15) << 4)
    }

    fn set_virtual_tpr(&mut self, tpr: u8, threshold: u8) {
        let control = self.control_mut();
        let word = control.int_ctl & !IntCtl::V_TPR | IntCtl::from_bits_retain((tpr >> 4).into());
        if word != control.int_ctl {
            control.int_ctl = word;
            control.clean &= !Clean::TPR;
        }
        let threshold = threshold & 15;
        if threshold != self.tpr_threshold {
            self.tpr_threshold = threshold;
            self.arm_virtual_interrupt();
        }
    }

    /// §14.1.3, table 14-1. CR0.CD is set as there: a loader that starts a kernel directly clears
    /// it, or the guest's memory is uncached. RDX, which tells the processor's signature, is 0.
    fn reset(&mut self) {
        self.xstate.reset();
        self.tsc_aux = 0;
        if self.loaded() {
            // SAFETY: the state on the core is this vCPU's; see `load`.
            unsafe {
                self.xstate.restore();
                if self.features.contains(SvmFeatures::TSC_AUX) {
                    Msr::new(msr::IA32_TSC_AUX).write(0);
                }
            }
        }
        self.restart();
    }

    fn init(&mut self) {
        let kept = msr::KEPT_BY_INIT.map(|index| self.msr(index));
        self.restart();
        for (index, value) in msr::KEPT_BY_INIT.into_iter().zip(kept) {
            value.map(|value| self.set_msr(index, value));
        }
    }
}

impl SvmVcpu {
    /// What RESET and INIT have in common.
    fn restart(&mut self) {
        self.gprs = Gprs::default();
        // Family, model and stepping.
        self.gprs[Gpr::Rdx] = core::arch::x86_64::__cpuid(1).eax.into();
        self.dr = [0; 4];
        self.nmi = Nmi::default();
        self.window = false;
        self.tpr_threshold = 0;
        if self.loaded() {
            // SAFETY: the debug registers on the core are this vCPU's; see `load`.
            unsafe { entry::load_debug(&self.dr) };
        }
        let mut int_ctl = IntCtl::V_INTR_MASKING;
        if self.features.contains(SvmFeatures::VGIF) {
            int_ctl |= IntCtl::V_GIF_ENABLE | IntCtl::V_GIF;
        }
        if self.has_vnmi() {
            int_ctl |= IntCtl::V_NMI_ENABLE;
        }
        let block = self.block_mut();
        block.save.reset();
        block.control.int_ctl = int_ctl;
        block.control.interrupt_shadow = 0;
        block.control.event_inj = 0;
        block.control.virt_ext = 0;
        block.control.clean = Clean::empty();
        self.intercept_iret(false);
        self.update_attention();
        self.flush();
    }
}

#[cfg(test)]
mod tests {
    use super::super::bitmaps;
    use super::*;
    use crate::xstate::KNOWN;
    use alloc::boxed::Box;

    const QEMU: SvmFeatures = SvmFeatures::NESTED_PAGING.union(SvmFeatures::VGIF);

    fn vcpu(features: SvmFeatures) -> SvmVcpu {
        let caps = SvmCaps {
            revision: 1,
            asids: 16,
            features,
        };
        let config = SvmConfig {
            nested_root: HostPhysAddr::new(0x5000),
            asid: 15,
            asid_shared: false,
            bitmaps: Box::leak(Box::new(bitmaps::tests::maps(&caps))),
            xstate: XStateCaps::detect(KNOWN),
        };
        let mut vcpu = SvmVcpu::new(&caps, HostPage::for_test(), config).expect("a vCPU");
        vcpu.exits(0, 0xfff0);
        vcpu
    }

    impl SvmVcpu {
        /// What `switch` leaves behind when the guest exits with `code` at `rip`.
        fn exits(&mut self, code: u32, rip: u64) {
            let block = self.block_mut();
            block.save.rip = rip;
            block.control.exit_code = code.into();
            block.control.event_inj = 0;
            block.control.clean = Clean::all();
            block.control.tlb_control = tlb::KEEP;
        }
    }

    #[test]
    fn asids_are_checked() {
        let caps = SvmCaps {
            revision: 1,
            asids: 16,
            features: QEMU,
        };
        for asid in [0, 16] {
            let config = SvmConfig {
                nested_root: HostPhysAddr::new(0),
                asid,
                asid_shared: false,
                bitmaps: Box::leak(Box::new(bitmaps::tests::maps(&caps))),
                xstate: XStateCaps::detect(KNOWN),
            };
            let error = SvmVcpu::new(&caps, HostPage::for_test(), config).err();
            assert_eq!(
                error,
                Some(SvmError::Asid {
                    asked: asid,
                    highest: 15
                })
            );
        }
    }

    #[test]
    fn a_vcpu_that_is_not_loaded_does_not_run() {
        let mut vcpu = vcpu(QEMU);
        assert_eq!(vcpu.enter(), Exit::Rare);
        assert!(matches!(vcpu.rare_exit(), Exit::EntryFailed(_)));
    }

    #[test]
    fn reset_is_the_manuals_and_can_be_entered() {
        let vcpu = vcpu(QEMU);
        assert_eq!(vcpu.violations(), Violations::empty());
        assert_eq!(vcpu.cr(ControlRegister::Cr0), 0x6000_0010);
        assert_eq!((vcpu.efer(), vcpu.rip(), vcpu.cpl()), (0, 0xfff0, 0));
        assert_eq!(vcpu.rflags().bits(), 2);
        let cs = vcpu.segment(SegmentRegister::Cs);
        assert_eq!(
            (cs.selector, cs.base, cs.limit, cs.rights.0),
            (0xf000, 0xffff_0000, 0xffff, 0x9b)
        );
        assert_eq!(vcpu.segment(SegmentRegister::Tr).rights.0, 0x8b);
        assert_eq!(vcpu.msr(msr::IA32_PAT), Some(0x0007_0406_0007_0406));
    }

    #[test]
    fn writing_a_group_clears_its_clean_bit() {
        use ControlRegister::{Cr0, Cr2, Cr3, Cr4, Cr8};
        type Write = fn(&mut SvmVcpu);
        let cases: [(Clean, Write); 15] = [
            (Clean::CRX, |v| v.set_cr(Cr0, 0x31)),
            (Clean::CR2, |v| v.set_cr(Cr2, 1)),
            (Clean::CRX, |v| v.set_cr(Cr3, 1)),
            (Clean::CRX, |v| v.set_cr(Cr4, 0x20)),
            (Clean::TPR, |v| v.set_cr(Cr8, 3)),
            (Clean::CRX, |v| v.set_efer(1)),
            (Clean::DRX, |v| v.set_dr(DebugRegister::Dr7, 0x401)),
            (Clean::TABLES, |v| v.set_gdtr(DescriptorTable::default())),
            (Clean::SEGMENTS, |v| {
                v.set_segment(SegmentRegister::Ds, Segment::default())
            }),
            (Clean::NESTED, |v| assert!(v.set_msr(msr::IA32_PAT, 6))),
            (Clean::LBR, |v| assert!(v.set_msr(msr::IA32_DEBUGCTL, 1))),
            (Clean::INTERCEPTS, |v| v.set_tsc_offset(5)),
            (Clean::TPR, |v| v.request_interrupt_window(true)),
            (Clean::NESTED, |v| v.flush_nested(HostPhysAddr::new(0x9000))),
            (Clean::empty(), |v| {
                v.set_rip(5);
                v.set_rsp(5);
                v.set_rflags(RFlags::IF);
                v.set_virtual_tpr(0, 0);
                v.request_interrupt_window(false);
                assert!(v.set_msr(msr::IA32_LSTAR, 5));
                assert!(v.inject(Event::UD));
            }),
        ];
        for (number, (group, write)) in cases.into_iter().enumerate() {
            let mut vcpu = vcpu(QEMU);
            write(&mut vcpu);
            assert_eq!(vcpu.control().clean, Clean::all() & !group, "case {number}");
        }
    }

    #[test]
    fn flushes_are_as_narrow_as_the_processor_can() {
        for (more, expected) in [
            (SvmFeatures::empty(), tlb::FLUSH_ALL),
            (SvmFeatures::FLUSH_BY_ASID, tlb::FLUSH_GUEST),
        ] {
            let mut vcpu = vcpu(QEMU | more);
            vcpu.set_cr(ControlRegister::Cr3, 0x1000);
            assert_eq!(vcpu.control().tlb_control, expected);
        }
    }

    #[test]
    fn long_mode_follows_paging() {
        let mut vcpu = vcpu(QEMU);
        vcpu.set_cr(ControlRegister::Cr4, 0x20);
        vcpu.set_efer(0x100);
        assert_eq!(vcpu.efer(), 0x100);
        vcpu.set_cr(ControlRegister::Cr0, 0x8000_0001);
        assert_eq!(
            (vcpu.efer(), vcpu.cr(ControlRegister::Cr0)),
            (0x500, 0x8000_0011)
        );
        vcpu.set_cr(ControlRegister::Cr0, 1);
        assert_eq!(vcpu.efer(), 0x100);
        assert_eq!(
            vcpu.save().efer,
            0x1100,
            "SVME, which the guest does not see"
        );
    }

    #[test]
    fn broken_state_is_named() {
        let mut vcpu = vcpu(QEMU);
        vcpu.set_efer(0x100);
        vcpu.set_cr(ControlRegister::Cr0, 0x8000_0001);
        assert_eq!(vcpu.violations(), Violations::LONG_MODE);
        vcpu.set_cr(ControlRegister::Cr0, 0x2000_0000);
        assert_eq!(vcpu.violations(), Violations::CACHE);
    }

    #[test]
    fn cpl_is_that_of_ss() {
        let mut vcpu = vcpu(QEMU);
        let user = Segment {
            selector: 0x2b,
            rights: arch::AccessRights(0xc0f3),
            limit: !0,
            base: 0,
        };
        vcpu.set_segment(SegmentRegister::Ss, user);
        assert_eq!((vcpu.cpl(), vcpu.segment(SegmentRegister::Ss)), (3, user));
        // SYSRET leaves CPL 3 with whatever DPL was there.
        vcpu.block_mut().save.segments[SegmentRegister::Ss as usize].attributes = 0xc93;
        assert_eq!(vcpu.segment(SegmentRegister::Ss).rights.dpl(), 3);
    }

    #[test]
    fn next_rip_only_where_it_is_told() {
        let next = |features, code: u32, nrip, info2| {
            let mut vcpu = vcpu(features);
            vcpu.exits(code, 0x1000);
            vcpu.control_mut().next_rip = nrip;
            vcpu.control_mut().exit_info_2 = info2;
            vcpu.next_rip()
        };
        let nrips = QEMU | SvmFeatures::NEXT_RIP;
        assert_eq!(next(QEMU, code::CPUID, 0x1002, 0), None);
        assert_eq!(next(nrips, code::CPUID, 0x1002, 0), Some(0x1002));
        assert_eq!(next(nrips, code::NPF, 0, 0xfee0_0000), None);
        assert_eq!(next(QEMU, code::IOIO, 0, 0x1001), Some(0x1001));
    }

    #[test]
    fn events_keep_their_shape() {
        for (event, field) in [
            (Event::Interrupt(Vector(0x30)), 0x8000_0030),
            (Event::Nmi, 0x8000_0202),
            (Event::UD, 0x8000_0306),
            (Event::page_fault(7), 0x7_8000_0b0e),
        ] {
            assert_eq!(encode(event, true), Some(field));
            assert_eq!(decode_event(field), Some(event));
        }
        assert_eq!(
            encode(Event::GP0, false),
            Some(0x8000_030d),
            "none in real mode"
        );
        assert_eq!(decode_event(0x30), None);
    }

    #[test]
    fn cut_deliveries_come_again() {
        for (info, again) in [
            (0x8000_0030, 0x8000_0030),     // interrupt
            (0x8000_0202, 0x8000_0202),     // NMI
            (0x5_8000_0b0d, 0x5_8000_0b0d), // #GP(5)
            (0x5_8000_0306, 0x8000_0306),   // stray error code
            (0x8000_0330, 0x8000_0030),     // QEMU: a virtual interrupt
            (0x8000_0302, 0x8000_0202),     // QEMU: an NMI
            (0x8000_0303, 0),               // INT3 executes again
            (0x8000_0480, 0),               // so does INT 80h
        ] {
            assert_eq!(requeue(info), again, "{info:#x}");
        }
    }

    #[test]
    fn qemus_processor_gets_interrupts_as_virtual_ones() {
        let mut vcpu = vcpu(QEMU);
        vcpu.host = 0x1000; // as if loaded
        let event = Event::Interrupt(Vector(0x72));
        assert!(vcpu.inject(event));
        vcpu.request_interrupt_window(true);
        assert_ne!(vcpu.attention & attention::EVENTS, 0);
        assert!(vcpu.lend_virtual_interrupt());
        let control = vcpu.control();
        assert_eq!((control.event_inj, control.int_ctl.bits() >> 32), (0, 0x72));
        assert!(control.int_ctl.contains(IntCtl::V_IRQ));
        assert!(!control.intercept_misc1.contains(Misc1::VINTR));
        // An exit that came first.
        vcpu.exits(code::INTR, 0);
        vcpu.take_virtual_interrupt_back();
        assert_eq!(vcpu.pending_event(), Some(event));
        assert!(vcpu.lend_virtual_interrupt());
        // Delivered.
        vcpu.control_mut().int_ctl.remove(IntCtl::V_IRQ);
        vcpu.exits(code::INTR, 0);
        vcpu.take_virtual_interrupt_back();
        assert_eq!(vcpu.pending_event(), None);
        assert!(vcpu.control().intercept_misc1.contains(Misc1::VINTR));
        assert_eq!(vcpu.control().int_ctl.bits() >> 32, 0);
        // And the window is asked for again.
        assert_eq!(vcpu.after_exit(), None);
        assert!(vcpu.control().int_ctl.contains(IntCtl::V_IRQ));
        // Nothing else goes that way.
        vcpu.request_interrupt_window(false);
        assert!(vcpu.inject(Event::GP0));
        assert!(!vcpu.lend_virtual_interrupt());
    }

    #[test]
    fn an_exception_joins_what_was_cut_short() {
        let mut vcpu = vcpu(QEMU);
        vcpu.set_cr(ControlRegister::Cr0, 1);
        vcpu.control_mut().event_inj = requeue(0x8000_0b0e);
        assert!(vcpu.inject(Event::GP0));
        let double = Event::Exception {
            exception: Exception::DoubleFault,
            error_code: Some(0),
        };
        assert_eq!(vcpu.pending_event(), Some(double));
        assert!(!vcpu.inject(Event::GP0), "triple fault");
    }

    #[test]
    fn windows_are_virtual_interrupts() {
        let mask = IntCtl::V_IRQ | IntCtl::V_IGN_TPR | IntCtl::V_INTR_PRIO;
        let armed = |vcpu: &SvmVcpu| vcpu.control().int_ctl & mask;
        let mut modern = vcpu(QEMU | SvmFeatures::DECODE_ASSISTS);
        modern.set_virtual_tpr(0x60, 5);
        assert_eq!(armed(&modern).bits(), 0x5_0100);
        assert_eq!(modern.virtual_tpr(), Some(0x60));
        modern.exits(code::VINTR, 0);
        assert_eq!(modern.decode(), Exit::TprBelowThreshold);
        modern.request_interrupt_window(true);
        assert_eq!(armed(&modern), mask);
        assert_eq!(modern.decode(), Exit::InterruptWindow);
        modern.request_interrupt_window(false);
        modern.set_virtual_tpr(0x60, 0);
        assert_eq!(armed(&modern), IntCtl::empty());
        // Where CR8 writes exit, there is no threshold to watch.
        let mut old = vcpu(QEMU);
        old.set_virtual_tpr(0x60, 5);
        assert_eq!(armed(&old), IntCtl::empty());
    }

    #[test]
    fn shadows_hold_events_back_until_the_next_instruction() {
        let mut vcpu = vcpu(QEMU);
        vcpu.set_rflags(RFlags::IF);
        vcpu.control_mut().interrupt_shadow = 1;
        assert_eq!(vcpu.interruptibility(), Interruptibility::default());
        vcpu.set_rip(1);
        let open = Interruptibility {
            interrupts_open: true,
            nmi_open: true,
        };
        assert_eq!(vcpu.interruptibility(), open);
        assert!(vcpu.inject(Event::Nmi));
        assert_eq!(vcpu.interruptibility(), Interruptibility::default());
    }

    #[test]
    fn an_nmi_blocks_until_its_iret_completed() {
        let mut vcpu = vcpu(QEMU);
        vcpu.host = 0x1000; // as if loaded
        assert!(vcpu.inject(Event::Nmi));
        assert!(vcpu.control().intercept_misc1.contains(Misc1::IRET));
        // The handler runs; a second NMI waits.
        vcpu.exits(code::CPUID, 0x100);
        assert_eq!(vcpu.after_exit(), None);
        vcpu.request_nmi_window(true);
        assert_eq!(vcpu.before_entry(), None);
        assert!(
            !vcpu.rflags().contains(RFlags::TF),
            "no step before the IRET"
        );
        // It reaches its IRET, which is then stepped over.
        vcpu.exits(code::IRET, 0x110);
        assert_eq!(vcpu.after_exit(), None);
        assert!(!vcpu.interruptibility().nmi_open);
        assert!(!vcpu.control().intercept_misc1.contains(Misc1::IRET));
        assert_eq!(vcpu.before_entry(), None);
        assert!(vcpu.rflags().contains(RFlags::TF));
        // A nested fault on the way hides the step again.
        vcpu.exits(code::NPF, 0x110);
        assert_eq!(vcpu.after_exit(), None);
        assert!(!vcpu.rflags().contains(RFlags::TF) && !vcpu.interruptibility().nmi_open);
        assert_eq!(vcpu.before_entry(), None);
        // Done: flags are those that IRET brought, DR6 is as it was.
        vcpu.exits(code::EXCEPTION_DB, 0x2000);
        vcpu.block_mut().save.rflags = 0x302;
        vcpu.block_mut().save.dr6 |= DR6_BS;
        assert_eq!(vcpu.after_exit(), Some(Exit::NmiWindow));
        assert_eq!(
            (vcpu.rflags().bits(), vcpu.dr(DebugRegister::Dr6)),
            (0x302, DR6_FIXED)
        );
        assert!(vcpu.interruptibility().nmi_open);
        assert_eq!(vcpu.attention, 0);
        vcpu.host = 0;
    }

    #[test]
    fn an_open_nmi_window_is_told_at_once_and_once() {
        let mut vcpu = vcpu(QEMU);
        vcpu.host = 0x1000; // as if loaded
        vcpu.request_nmi_window(true);
        assert_eq!(vcpu.before_entry(), Some(Exit::NmiWindow));
        assert_eq!(vcpu.before_entry(), None);
        vcpu.host = 0;
    }

    #[test]
    fn with_virtual_nmis_the_hardware_keeps_the_blocking() {
        let mut vcpu = vcpu(QEMU | SvmFeatures::VNMI);
        assert!(vcpu.inject(Event::Nmi));
        assert!(
            vcpu.control()
                .int_ctl
                .contains(IntCtl::V_NMI | IntCtl::V_NMI_ENABLE)
        );
        assert_eq!(vcpu.pending_event(), None);
        assert!(vcpu.interruptibility().nmi_open);
        assert!(!vcpu.control().intercept_misc1.contains(Misc1::IRET));
    }
}
