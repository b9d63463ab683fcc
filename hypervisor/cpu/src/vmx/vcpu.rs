//! One virtual CPU on VT-x (Intel SDM Vol. 3C ch. 25–28).

use super::caps::{Features, VmxCaps, entry as entry_control, pin, primary, secondary};
use super::entry::{self, Context, State};
use super::exit::{self, reason as r};
use super::vmcs::{self, Scope};
use crate::page::HostPage;
use crate::virt::{Extension, VirtUnavailable};
use crate::xstate::{XState, XStateCaps};
use arch::{
    Combined, ControlRegister, Cr0, Cr4, CrAccess, CrOp, DebugRegister, DescriptorTable, Efer,
    EntryFailure, Event, Exception, Exit, Gprs, GuestPhysAddr, HostPhysAddr, Interruptibility,
    IoExit, RFlags, Segment, SegmentRegister, Vcpu, msr,
};
use core::arch::asm;
use core::arch::x86_64::{__cpuid, _rdtsc};
use core::hint::assert_unchecked;
use x86::msr::{rdmsr, wrmsr};
use x86::vmx::vmcs::{control, guest, host, ro};

/// The pages that a vCPU owns.
#[derive(Debug)]
pub struct VmxPages {
    /// The VMCS.
    pub vmcs: HostPage,
    /// The MSR bitmap.
    pub msr_bitmap: HostPage,
}

/// What a vCPU is made for.
#[derive(Clone, Copy, Debug)]
pub struct VmxConfig {
    /// The top table (PML4) of the VM's extended page tables.
    pub ept_root: HostPhysAddr,
    /// The tag of the vCPU's linear translations, unique among the machine's vCPUs; 0 for none.
    pub vpid: u16,
    /// The virtual-APIC page, where the local APIC's registers stand for the processor to use;
    /// `None` leaves every access to software.
    pub virtual_apic_page: Option<HostPhysAddr>,
    /// The APIC-access page, which the caller maps at guest-physical FEE0_0000h while the mode
    /// is [`ApicMode::XApic`], and only then.
    pub apic_access_page: Option<HostPhysAddr>,
    /// Bits of CR4 that the guest changes without an exit: those that its CPUID allows, within
    /// [`VmxConfig::CR4_GUEST`] and, where its XCR0 may hold PKRU, PKE.
    pub cr4_guest: Cr4,
    /// Let the guest reach IA32_SPEC_CTRL and IA32_PRED_CMD, where the machine has them.
    pub speculation_control: bool,
    /// The extended state that the guest may use.
    pub xstate: XStateCaps,
}

impl VmxConfig {
    /// The bits of CR4 that do no harm in a guest's own hands. MCE is not among them, because a
    /// machine check must find it set; nor are SMXE and VMXE, nor paging modes and protection
    /// keys, which depend on what else is switched.
    pub const CR4_GUEST: Cr4 = Cr4::VME
        .union(Cr4::PVI)
        .union(Cr4::TSD)
        .union(Cr4::DE)
        .union(Cr4::PSE)
        .union(Cr4::PAE)
        .union(Cr4::PGE)
        .union(Cr4::PCE)
        .union(Cr4::OSFXSR)
        .union(Cr4::OSXMMEXCPT)
        .union(Cr4::UMIP)
        .union(Cr4::FSGSBASE)
        .union(Cr4::PCIDE)
        .union(Cr4::OSXSAVE)
        .union(Cr4::SMEP)
        .union(Cr4::SMAP);
}

pub use arch::ApicMode;

/// Bits of CR0 that only look as the guest wrote them: NE is fixed in VMX operation; CD and NW
/// are not switched by entries, and must not reach the machine's caches.
const CR0_HOST: u64 = Cr0::NE.union(Cr0::CD).union(Cr0::NW).bits();
/// Guest interruptibility (table 25-3).
const BLOCKED_BY_STI: u64 = 1 << 0;
const BLOCKED_BY_MOV_SS: u64 = 1 << 1;
const BLOCKED_BY_NMI: u64 = 1 << 3;
const SHADOW: u64 = BLOCKED_BY_STI | BLOCKED_BY_MOV_SS;
/// DR6 after RESET; its reserved bits read as ones.
const DR6_RESET: u64 = 0xffff_0ff0;
/// Where [`Switched::dr`] holds DR6.
const DR6: usize = 4;
/// #MC belongs to the host. #DB and #AC can arise again in their own delivery, without end
/// (CVE-2015-8104, CVE-2015-5307): each round must come out.
const EXCEPTIONS: u64 = 1 << Exception::MachineCheck as u8
    | 1 << Exception::AlignmentCheck as u8
    | 1 << Exception::Debug as u8;
/// PAT after RESET (Vol. 3A §12.12.4).
const PAT_RESET: u64 = 0x0007_0406_0007_0406;
/// A loop of PAUSEs no more than this many cycles apart that goes on for this long exits.
const PAUSE_GAP: u64 = 128;
const PAUSE_WINDOW: u64 = 4096;
/// The guest-physical page of the local APIC.
const APIC_PAGE: u64 = 0xfee0_0000;

/// MSRs that guests reach without an exit and that are exchanged with the core's when a vCPU is
/// loaded or unloaded. The host uses none of them. TSC_AUX comes last: not every machine has it.
const SWITCHED_MSRS: [u32; 6] = [
    msr::IA32_STAR,
    msr::IA32_LSTAR,
    msr::IA32_CSTAR,
    msr::IA32_FMASK,
    msr::IA32_KERNEL_GS_BASE,
    msr::IA32_TSC_AUX,
];
const IA32_PRED_CMD: u32 = 0x49;

/// State that lives in the core's registers while the vCPU is loaded, and here while it is not.
#[derive(Clone, Copy, Debug, Default)]
struct Switched {
    msrs: [u64; SWITCHED_MSRS.len()],
    spec_ctrl: u64,
    cr2: u64,
    /// DR0 to DR3, DR6.
    dr: [u64; 5],
}

impl Switched {
    fn new() -> Self {
        Self {
            dr: [0, 0, 0, 0, DR6_RESET],
            ..Self::default()
        }
    }

    /// Takes the core's debug registers.
    fn save_debug(&mut self) {
        let [dr0, dr1, dr2, dr3, dr6] = &mut self.dr;
        // SAFETY: reads in ring 0, where this room's code runs.
        unsafe {
            asm!(
                "mov {}, dr0",
                "mov {}, dr1",
                "mov {}, dr2",
                "mov {}, dr3",
                "mov {}, dr6",
                out(reg) * dr0,
                out(reg) * dr1,
                out(reg) * dr2,
                out(reg) * dr3,
                out(reg) * dr6,
                options(nomem, nostack)
            );
        }
    }

    /// Fills the core's debug registers.
    ///
    /// # Safety
    /// The vCPU is loaded or about to be, so that they are the guest's. The host has no
    /// breakpoints on: every exit clears DR7.
    unsafe fn load_debug(&self) {
        let [dr0, dr1, dr2, dr3, dr6] = self.dr;
        // SAFETY: by the contract above; `set_dr` keeps the upper half of DR6 zero.
        unsafe {
            asm!(
                "mov dr0, {}", "mov dr1, {}", "mov dr2, {}", "mov dr3, {}", "mov dr6, {}",
                in(reg) dr0, in(reg) dr1, in(reg) dr2, in(reg) dr3, in(reg) dr6,
                options(nomem, nostack)
            );
        }
    }
}

/// A virtual CPU on VT-x.
///
/// Registers can be read and written whether it is loaded or not; while it is not, each access
/// to a VMCS field makes the VMCS current for a moment, which is slow.
pub struct VmxVcpu {
    context: Context,
    /// What the next entry delivers.
    pending: Option<Event>,
    /// Exit on loops of PAUSE, where the processor can.
    pause_exiting: bool,
    mode: ApicMode,
    /// TSC value at which guest mode ends, `u64::MAX` for never.
    deadline: u64,
    /// The same while the vCPU is loaded, else `u64::MAX`: what an entry looks at.
    timer: u64,
    /// What the VMCS holds, so that it is written only on change.
    pin: u32,
    primary: u32,
    threshold: u8,
    /// Address of the TSS of the core for which host state was written, 0 for none: the vCPU
    /// recognizes by it that it came to another core.
    core: u64,
    /// What the last [`Exit::Rare`] was.
    rare: Exit,
    caps: VmxCaps,
    config: VmxConfig,
    switched: Switched,
    xstate: XState,
    pages: VmxPages,
}

impl VmxVcpu {
    /// Makes a vCPU in the state after RESET, not loaded, with the local APIC disabled.
    ///
    /// # Safety
    /// This and every method is called on a core where [`super::Vmx::enable`] was done with these
    /// `caps`, and `config.xstate` made ready by [`XStateCaps::enable`]. At most one vCPU is
    /// loaded on a core, and a loaded one stays there. All pages named in `config` are the VM's,
    /// and the tables under `ept_root` map nothing that is not, for as long as the vCPU lives.
    ///
    /// # Errors
    /// The processor refused the VMCS page.
    pub unsafe fn new(
        caps: &VmxCaps,
        mut pages: VmxPages,
        config: VmxConfig,
    ) -> Result<Self, VirtUnavailable> {
        // §25.2: the VMCS begins with the revision identifier; VMCLEAR sets up the rest.
        let revision = caps.revision.to_le_bytes();
        for (byte, value) in pages.vmcs.bytes_mut().iter_mut().zip(revision) {
            *byte = value;
        }
        // SAFETY: a page of ours with the right revision, on a core in VMX operation.
        if !unsafe { vmcs::vmclear(pages.vmcs.phys()) } {
            return Err(VirtUnavailable::EnableFailed {
                extension: Extension::Vmx,
                step: "VMCLEAR refused a VMCS page (not 4 KiB-aligned, beyond the physical \
                       address width, or the VMXON region)",
            });
        }
        let mut vcpu = Self {
            context: Context {
                gprs: Gprs::default(),
                host_rsp: 0,
                state: State::Clear,
            },
            pending: None,
            rare: Exit::Benign,
            pause_exiting: false,
            mode: ApicMode::Disabled,
            deadline: u64::MAX,
            timer: u64::MAX,
            pin: caps.pin,
            primary: caps.primary,
            threshold: 0,
            core: 0,
            caps: *caps,
            config,
            switched: Switched::new(),
            xstate: XState::new(&config.xstate),
            pages,
        };
        vcpu.allow_msrs();
        vcpu.with_current(Self::write_controls);
        vcpu.reset();
        Ok(vcpu)
    }

    /// Ends the vCPU and gives its pages back.
    #[must_use]
    pub fn into_pages(mut self) -> VmxPages {
        self.unload();
        self.pages
    }

    fn has(&self, feature: Features) -> bool {
        self.caps.features().contains(feature)
    }

    fn loaded(&self) -> bool {
        self.context.state != State::Clear
    }

    /// Reads a field, which the processor must have.
    #[inline(always)]
    fn read(&self, field: u32) -> u64 {
        if self.loaded() {
            // SAFETY: the VMCS is current on this core.
            unsafe { vmcs::vmread(field) }
        } else {
            self.read_unloaded(field)
        }
    }

    #[cold]
    fn read_unloaded(&self, field: u32) -> u64 {
        // SAFETY: the VMCS is clear and ours; whatever was current becomes so again.
        unsafe {
            let current = vmcs::vmptrst();
            let mine = vmcs::vmptrld(self.pages.vmcs.phys());
            let value = if mine { vmcs::vmread(field) } else { 0 };
            put_back(self.pages.vmcs.phys(), current);
            value
        }
    }

    /// Writes a field, which the processor must have.
    #[inline(always)]
    fn write(&mut self, field: u32, value: u64) {
        if self.loaded() {
            // SAFETY: the VMCS is current on this core; this module keeps to the manual's rules
            // for control and host fields, and guest fields do no harm.
            unsafe { vmcs::vmwrite(field, value) }
        } else {
            self.with_current(|vcpu| vcpu.write(field, value));
        }
    }

    /// Does something with the VMCS current, loaded or not.
    #[cold]
    fn with_current(&mut self, work: impl FnOnce(&mut Self)) {
        if self.loaded() {
            return work(self);
        }
        // SAFETY: the VMCS is clear and ours; whatever was current becomes so again.
        unsafe {
            let current = vmcs::vmptrst();
            if vmcs::vmptrld(self.pages.vmcs.phys()) {
                self.context.state = State::Loaded;
                work(self);
                self.context.state = State::Clear;
            }
            put_back(self.pages.vmcs.phys(), current);
        }
    }

    /// Opens the MSR bitmap (§25.6.9) for what is switched.
    fn allow_msrs(&mut self) {
        self.pages.msr_bitmap.bytes_mut().fill(0xff);
        for index in SWITCHED_MSRS.iter().copied().chain([
            msr::IA32_FS_BASE,
            msr::IA32_GS_BASE,
            msr::IA32_SYSENTER_CS,
            msr::IA32_SYSENTER_ESP,
            msr::IA32_SYSENTER_EIP,
        ]) {
            if index != msr::IA32_TSC_AUX || self.has(Features::RDTSCP) {
                self.intercept_msr(index, false, false);
            }
        }
        if self.speculation_control(Features::SPEC_CTRL) {
            self.intercept_msr(msr::IA32_SPEC_CTRL, false, false);
        }
        if self.speculation_control(Features::PRED_CMD) {
            self.intercept_msr(IA32_PRED_CMD, true, false);
        }
    }

    fn speculation_control(&self, feature: Features) -> bool {
        self.config.speculation_control && self.has(feature)
    }

    fn intercept_msr(&mut self, index: u32, read: bool, write: bool) {
        set_bitmap(self.pages.msr_bitmap.bytes_mut(), index, read, write);
    }

    /// Whether the processor uses the virtual-APIC page.
    fn shadows_tpr(&self) -> bool {
        self.has(Features::TPR_SHADOW) && self.config.virtual_apic_page.is_some()
    }

    fn uses_vpid(&self) -> bool {
        self.has(Features::VPID) && self.config.vpid != 0
    }

    /// §25.6.11: write-back tables, four levels.
    fn eptp(root: HostPhysAddr) -> u64 {
        root.as_u64() | 3 << 3 | 6
    }

    /// The control fields that stay as they are (§25.6 to §25.8).
    fn write_controls(&mut self) {
        self.primary |= if self.shadows_tpr() {
            primary::TPR_SHADOW
        } else {
            primary::CR8_EXITING
        };
        let secondary = self.caps.secondary;
        for (field, value) in [
            (control::PINBASED_EXEC_CONTROLS, self.pin.into()),
            (
                control::PRIMARY_PROCBASED_EXEC_CONTROLS,
                self.primary.into(),
            ),
            (control::VMEXIT_CONTROLS, self.caps.exit.into()),
            (control::VMENTRY_CONTROLS, self.caps.entry.into()),
            (control::EXCEPTION_BITMAP, EXCEPTIONS),
            // No page fault exits, whatever its error code.
            (control::PAGE_FAULT_ERR_CODE_MASK, 0),
            (control::PAGE_FAULT_ERR_CODE_MATCH, 0),
            (control::CR3_TARGET_COUNT, 0),
            // MSRs are switched by hand, when a vCPU is loaded.
            (control::VMEXIT_MSR_STORE_COUNT, 0),
            (control::VMEXIT_MSR_LOAD_COUNT, 0),
            (control::VMENTRY_MSR_LOAD_COUNT, 0),
            (control::VMENTRY_INTERRUPTION_INFO_FIELD, 0),
            (
                control::MSR_BITMAPS_ADDR_FULL,
                self.pages.msr_bitmap.phys().as_u64(),
            ),
            (control::EPTP_FULL, Self::eptp(self.config.ept_root)),
            (control::TSC_OFFSET_FULL, 0),
            (control::CR0_GUEST_HOST_MASK, CR0_HOST),
            (control::CR4_GUEST_HOST_MASK, !self.config.cr4_guest.bits()),
            // §25.4.2: no shadow VMCS.
            (guest::LINK_PTR_FULL, u64::MAX),
        ] {
            self.write(field, value);
        }
        if self.uses_vpid() {
            self.write(control::VPID, self.config.vpid.into());
        }
        if let (true, Some(page)) = (self.shadows_tpr(), self.config.virtual_apic_page) {
            self.write(control::VIRT_APIC_ADDR_FULL, page.as_u64());
            self.write(control::TPR_THRESHOLD, 0);
        }
        if let (true, Some(page)) = (
            self.has(Features::APIC_ACCESSES),
            self.config.apic_access_page,
        ) {
            self.write(control::APIC_ACCESS_ADDR_FULL, page.as_u64());
        }
        if secondary & secondary::PAUSE_LOOP != 0 {
            self.write(control::PLE_GAP, PAUSE_GAP);
            self.write(control::PLE_WINDOW, PAUSE_WINDOW);
        }
        if secondary & secondary::ENCLS_EXITING != 0 {
            self.write(control::ENCLS_EXITING_BITMAP_FULL, u64::MAX);
        }
        if secondary & secondary::XSAVES != 0 {
            self.write(control::XSS_EXITING_BITMAP_FULL, 0);
        }
        self.set_apic_mode(ApicMode::Disabled);
    }

    /// Tells how the guest reaches its local APIC now (§30.4, §30.5). What the processor cannot
    /// do comes as [`Exit::NestedFault`] at FEE0_0xxxh, or as [`Exit::Rdmsr`] and [`Exit::Wrmsr`].
    ///
    /// The virtual-APIC page then answers reads of all registers but PPR (which nothing but
    /// virtual-interrupt delivery keeps) and the timer's current count.
    pub fn set_apic_mode(&mut self, mode: ApicMode) {
        self.mode = mode;
        let controls = self.secondary();
        let open = controls & secondary::X2APIC_MODE != 0;
        for index in msr::X2APIC_FIRST..=msr::X2APIC_LAST {
            self.intercept_msr(index, !(open && x2apic_readable(index)), true);
        }
        // A write to TPR goes to the page and exits only below the threshold (§30.5).
        self.intercept_msr(0x808, !open, !open);
        self.write(control::SECONDARY_PROCBASED_EXEC_CONTROLS, controls.into());
    }

    /// The secondary controls for what is asked for.
    fn secondary(&self) -> u32 {
        let mut controls = self.caps.secondary;
        if self.uses_vpid() {
            controls |= secondary::VPID;
        }
        if !self.pause_exiting {
            controls &= !secondary::PAUSE_LOOP;
        }
        let registers = if self.has(Features::APIC_REGISTERS) {
            secondary::APIC_REGISTERS
        } else {
            0
        };
        let memory = self.shadows_tpr()
            && self.has(Features::APIC_ACCESSES)
            && self.config.apic_access_page.is_some();
        // Without register virtualization, reads that do not exit would go to the machine's APIC.
        let msrs = self.shadows_tpr() && self.has(Features::X2APIC) && registers != 0;
        controls
            | match self.mode {
                ApicMode::XApic if memory => secondary::APIC_ACCESSES | registers,
                ApicMode::X2Apic if msrs => secondary::X2APIC_MODE | registers,
                _ => 0,
            }
    }

    /// The four PDPTEs of a guest in PAE paging, for the restoring of a saved state. In running
    /// guests the processor loads them by itself.
    pub fn set_pdptes(&mut self, entries: [u64; 4]) {
        for (field, entry) in (guest::PDPTE0_FULL..).step_by(2).zip(entries) {
            self.write(field, entry);
        }
    }

    fn set_primary(&mut self, bit: u32, on: bool) {
        let value = if on {
            self.primary | bit
        } else {
            self.primary & !bit
        };
        if value != self.primary {
            self.primary = value;
            self.write(control::PRIMARY_PROCBASED_EXEC_CONTROLS, value.into());
        }
    }

    /// Forgets linear translations, after software changed what they depend on.
    fn flush_linear(&mut self) {
        if !self.loaded() {
            self.core = 0;
        } else if self.uses_vpid() {
            // SAFETY: in VMX operation; VPID in use implies INVVPID of this scope.
            unsafe { vmcs::invvpid(self.caps.invvpid, self.config.vpid) };
        }
    }

    /// Makes EFER.LMA and the mode control follow CR0.PG and EFER.LME.
    fn update_mode(&mut self, efer: u64, cr0: u64) {
        let mut efer = Efer::from_bits_retain(efer);
        let long = efer.contains(Efer::LME) && cr0 & Cr0::PG.bits() != 0;
        efer.set(Efer::LMA, long);
        let controls = self.read(control::VMENTRY_CONTROLS) & !u64::from(entry_control::IA32E_MODE);
        let mode = if long { entry_control::IA32E_MODE } else { 0 };
        self.write(control::VMENTRY_CONTROLS, controls | u64::from(mode));
        self.write(guest::IA32_EFER_FULL, efer.bits());
    }

    /// Writes `event` where the entry delivers it (§25.8.3, §27.2.1.3).
    #[cold]
    fn deliver(&mut self) {
        let Some(event) = self.pending.take() else {
            return;
        };
        let protected = self.read(guest::CR0) & Cr0::PE.bits() != 0;
        let (info, error_code, length) = exit::encode_event(event, protected);
        self.write(control::VMENTRY_INTERRUPTION_INFO_FIELD, info.into());
        self.write(control::VMENTRY_EXCEPTION_ERR_CODE, error_code.into());
        self.write(control::VMENTRY_INSTRUCTION_LEN, length.into());
        // Delivery ends a shadow, and with one the entry's checks are stricter (§27.3.1.5).
        self.end_shadow();
    }

    #[inline(always)]
    fn end_shadow(&mut self) {
        let blocked = self.read(guest::INTERRUPTIBILITY_STATE);
        if blocked & SHADOW != 0 {
            self.write(guest::INTERRUPTIBILITY_STATE, blocked & !SHADOW);
        }
    }

    #[inline(never)]
    fn set_other_msr(&mut self, index: u32, value: u64) -> bool {
        if index == msr::IA32_EFER {
            self.set_efer(value);
            return true;
        }
        if let Some(field) = vmcs_msr(index) {
            self.write(field, value);
            return true;
        }
        let spec_ctrl =
            index == msr::IA32_SPEC_CTRL && self.speculation_control(Features::SPEC_CTRL);
        let position = self.switched_msr(index);
        let slot = match position {
            _ if spec_ctrl => Some(&mut self.switched.spec_ctrl),
            Some(position) => self.switched.msrs.get_mut(position),
            None => None,
        };
        let Some(slot) = slot else {
            return false;
        };
        *slot = value;
        if self.loaded() {
            // SAFETY: while the vCPU is loaded, this MSR is the guest's; the caller checked the value.
            unsafe { wrmsr(index, value) };
        }
        true
    }

    fn set_nmi_blocking(&mut self, on: bool) {
        let blocked = self.read(guest::INTERRUPTIBILITY_STATE) & !BLOCKED_BY_NMI;
        let bit = if on { BLOCKED_BY_NMI } else { 0 };
        self.write(guest::INTERRUPTIBILITY_STATE, blocked | bit);
    }

    /// Queues again what was being delivered when the guest left (§28.2.4), or else takes back
    /// that an IRET had unblocked NMIs before it faulted (§28.2.3).
    #[inline(always)]
    fn requeue(&mut self, iret_unblocked_nmi: bool) {
        let info = self.read(ro::IDT_VECTORING_INFO) as u32;
        if info & exit::VALID != 0 || iret_unblocked_nmi {
            self.requeue_event(info, iret_unblocked_nmi);
        }
    }

    #[cold]
    #[inline(never)]
    fn requeue_event(&mut self, info: u32, iret_unblocked_nmi: bool) {
        if info & exit::VALID != 0 {
            let error_code = self.read(ro::IDT_VECTORING_ERR_CODE) as u32;
            let length = self.read(ro::VMEXIT_INSTRUCTION_LEN) as u32;
            self.pending = exit::decode_event(info, error_code, length);
            if self.pending == Some(Event::Nmi) {
                self.set_nmi_blocking(false);
            }
        } else if iret_unblocked_nmi {
            self.set_nmi_blocking(true);
        }
    }

    /// Starts the preemption timer (§26.5.1): it counts down with the TSC from the entry.
    #[inline(always)]
    fn start_timer(&mut self) {
        // SAFETY: RDTSC is harmless.
        let now = unsafe { _rdtsc() };
        // The field takes the low 32 bits. A deadline farther than they reach exits once too
        // early, finds nothing due, and is set again.
        let ticks = self.timer.saturating_sub(now) >> self.caps.timer_shift;
        // SAFETY: there is a timer to set, so the VMCS is current and the processor has the field.
        unsafe { vmcs::vmwrite(guest::VMX_PREEMPTION_TIMER_VALUE, ticks) };
    }

    /// What an exit means; `None` to enter again at once.
    #[inline(always)]
    fn decode(&mut self, reason: u32) -> Option<Exit> {
        Some(match reason {
            r::VMCALL => Exit::Hypercall,
            r::RDMSR => Exit::Rdmsr,
            r::WRMSR => Exit::Wrmsr,
            r::IO => match exit::decode_io(self.read(ro::EXIT_QUALIFICATION)) {
                io if io.string => {
                    self.rare = Exit::Io(io);
                    Exit::Rare
                }
                // Said again, so that nobody asks.
                io => Exit::Io(IoExit {
                    string: false,
                    rep: false,
                    ..io
                }),
            },
            r::EPT_VIOLATION => {
                let qualification = self.read(ro::EXIT_QUALIFICATION);
                let addr = GuestPhysAddr::new(self.read(ro::GUEST_PHYSICAL_ADDR_FULL));
                // Bit 12 as in the interruption information (table 28-7).
                self.requeue(qualification as u32 & exit::IRET_UNBLOCKED_NMI != 0);
                let (access, walk) = exit::decode_ept(qualification);
                Exit::NestedFault { addr, access, walk }
            }
            r::APIC_ACCESS => {
                let qualification = self.read(ro::EXIT_QUALIFICATION);
                self.requeue(false);
                let (offset, access, walk) = exit::decode_apic_access(qualification);
                Exit::NestedFault {
                    addr: GuestPhysAddr::new(APIC_PAGE + offset),
                    access,
                    walk,
                }
            }
            r::APIC_WRITE => Exit::ApicWrite {
                offset: (self.read(ro::EXIT_QUALIFICATION) & 0xff0) as u16,
            },
            r::HLT => Exit::Hlt,
            r::EXTERNAL_INTERRUPT => Exit::ExternalInterrupt(None),
            r::INTERRUPT_WINDOW => Exit::InterruptWindow,
            r::PREEMPTION_TIMER => Exit::PreemptionTimer,
            _ if self.decode_rare(reason) => Exit::Rare,
            _ => return None,
        })
    }

    /// Keeps what a rare exit means; `false` to enter again at once.
    #[cold]
    #[inline(never)]
    fn decode_rare(&mut self, reason: u32) -> bool {
        let exit = self.decode_other(reason);
        self.rare = exit.unwrap_or(self.rare);
        exit.is_some()
    }

    fn decode_other(&mut self, reason: u32) -> Option<Exit> {
        Some(match reason {
            r::EXCEPTION_OR_NMI => return self.decode_exception(),
            r::TRIPLE_FAULT => Exit::TripleFault,
            r::INIT | r::SIPI => Exit::InitOrSipi,
            r::NMI_WINDOW => Exit::NmiWindow,
            r::TASK_SWITCH => {
                self.requeue(false);
                Exit::TaskSwitch
            }
            r::INVD => Exit::Invd,
            r::INVLPG => Exit::Invlpg,
            r::RDPMC => Exit::Rdpmc,
            r::RDTSC => Exit::Rdtsc,
            r::RDTSCP => Exit::Rdtscp,
            r::MWAIT => Exit::Mwait,
            r::MONITOR => Exit::Monitor,
            r::PAUSE => Exit::Pause,
            r::WBINVD => Exit::Wbinvd,
            r::XSETBV => Exit::Xsetbv,
            r::CR_ACCESS => {
                let qualification = self.read(ro::EXIT_QUALIFICATION);
                match exit::decode_cr(qualification) {
                    Some(access) if self.retry_cr(access) => return None,
                    Some(access) => Exit::Cr(access),
                    None => self.unknown(reason),
                }
            }
            r::DR_ACCESS => {
                let (register, write, gpr) = exit::decode_dr(self.read(ro::EXIT_QUALIFICATION));
                Exit::Dr {
                    register,
                    write,
                    gpr: Some(gpr),
                }
            }
            r::TPR_BELOW_THRESHOLD => {
                // A threshold above TPR would fail the next entry (§27.2.1.1).
                self.set_threshold(0);
                Exit::TprBelowThreshold
            }
            r::EPT_MISCONFIGURATION => {
                self.requeue(false);
                Exit::NestedMisconfig {
                    addr: GuestPhysAddr::new(self.read(ro::GUEST_PHYSICAL_ADDR_FULL)),
                }
            }
            // A guest has no SMM: RSM outside of it is #UD. The rest are instructions of VMX, SGX,
            // TDX and others that guests are not shown.
            r::RSM
            | r::GETSEC
            | r::VMCLEAR..=r::VMXON
            | r::INVEPT
            | r::INVVPID
            | r::VMFUNC
            | r::ENCLS
            | r::ENCLV
            | r::PCONFIG
            | r::LOADIWKEY
            | r::UMWAIT
            | r::TPAUSE
            | r::ENQCMD
            | r::ENQCMDS
            | r::SEAMCALL
            | r::TDCALL
            | r::INVPCID
            | r::XSAVES
            | r::XRSTORS => Exit::UndefinedInstruction,
            // These come only from controls that are off; entering again is right for all.
            r::IO_SMI
            | r::OTHER_SMI
            | r::MONITOR_TRAP
            | r::VIRTUALIZED_EOI
            | r::PML_FULL
            | r::BUS_LOCK
            | r::NOTIFY => Exit::Benign,
            _ if reason & r::ENTRY_FAILED != 0 => Exit::EntryFailed(EntryFailure {
                code: reason.into(),
                detail: self.read(ro::EXIT_QUALIFICATION),
            }),
            _ => self.unknown(reason),
        })
    }

    fn unknown(&self, reason: u32) -> Exit {
        Exit::Unknown {
            code: reason.into(),
            detail: self.read(ro::EXIT_QUALIFICATION),
        }
    }

    fn decode_exception(&mut self) -> Option<Exit> {
        let info = self.read(ro::VMEXIT_INTERRUPTION_INFO) as u32;
        let error_code = self.read(ro::VMEXIT_INTERRUPTION_ERR_CODE) as u32;
        let event = exit::decode_event(info, error_code, 0);
        // Bit 12 means something for faults that do not go into a double fault (§28.2.3).
        let fault = matches!(event, Some(Event::Exception { exception, .. }) if exception != Exception::DoubleFault);
        self.requeue(fault && info & exit::IRET_UNBLOCKED_NMI != 0);
        Some(match event {
            Some(Event::Nmi) => {
                // The exit took the NMI and left NMIs blocked: the host's handler runs as if it
                // had been interrupted, and its IRET unblocks them (§28.2.2 does not).
                // The guest that was left shows the watchdog, who may have sent it, that all is well.
                crate::percpu::this().beat();
                // SAFETY: the host's IDT has a handler for vector 2.
                #[cfg(target_os = "none")]
                unsafe {
                    asm!("int 2");
                }
                Exit::Nmi
            }
            Some(Event::Exception {
                exception,
                error_code,
            }) => Exit::Exception {
                exception,
                error_code,
                info: self.read(ro::EXIT_QUALIFICATION),
            },
            // INT1, which is intercepted along with #DB, is a trap: RIP goes past it.
            Some(Event::Software { .. }) if info as u8 == Exception::Debug as u8 => {
                let next = self
                    .read(guest::RIP)
                    .wrapping_add(self.read(ro::VMEXIT_INSTRUCTION_LEN));
                self.write(guest::RIP, next);
                Exit::Exception {
                    exception: Exception::Debug,
                    error_code: None,
                    info: 0,
                }
            }
            _ => self.unknown(info),
        })
    }

    /// A write of CR0 or CR4 that exited only because of bits that merely look as the guest wrote
    /// them: the shadow takes these bits, and the guest does the instruction again, so that the
    /// processor itself makes the other checks, changes mode, and loads the PDPTEs of PAE paging,
    /// which an exit would leave to us (§27.3.2.4). False for everything that software must judge.
    fn retry_cr(&mut self, access: CrAccess) -> bool {
        let CrOp::Write(gpr) = access.op else {
            return false;
        };
        let efer = Efer::from_bits_retain(self.efer());
        let long_code = efer.contains(Efer::LMA) && self.segment(SegmentRegister::Cs).rights.long();
        let mut value = self.gpr(gpr);
        if !long_code {
            value &= u64::from(u32::MAX);
        }
        match access.register {
            ControlRegister::Cr0 => {
                let cr4 = Cr4::from_bits_retain(self.cr(ControlRegister::Cr4));
                let was = Cr0::from_bits_retain(self.cr(ControlRegister::Cr0));
                let legal = cr0_legal(
                    was,
                    value,
                    cr4,
                    efer,
                    self.segment(SegmentRegister::Cs).rights.long(),
                );
                if legal {
                    self.write(control::CR0_READ_SHADOW, value);
                }
                legal
            }
            ControlRegister::Cr4 => {
                let shadow = self.read(control::CR4_READ_SHADOW);
                let host_owned = !self.config.cr4_guest.bits();
                let only_mce = (value ^ shadow) & host_owned == Cr4::MCE.bits();
                if only_mce {
                    self.write(control::CR4_READ_SHADOW, value);
                }
                only_mce
            }
            _ => false,
        }
    }

    fn set_threshold(&mut self, threshold: u8) {
        if threshold != self.threshold {
            self.threshold = threshold;
            self.write(control::TPR_THRESHOLD, threshold.into());
        }
    }

    #[cold]
    fn entry_failed(&mut self, outcome: u32) {
        let code = if outcome == entry::FAILED_VALID {
            self.read(ro::VM_INSTRUCTION_ERROR)
        } else {
            0
        };
        self.rare = Exit::EntryFailed(EntryFailure { code, detail: 0 });
    }

    /// Exchanges what the guest reaches without exits.
    fn load_switched(&mut self) {
        self.load_registers();
        // SAFETY: the vCPU becomes the core's, and the host uses no extended state.
        unsafe { self.xstate.restore() };
    }

    /// [`Self::load_switched`] but for the extended state.
    fn load_registers(&mut self) {
        let state = &self.switched;
        let msrs = SWITCHED_MSRS.iter().zip(state.msrs);
        // SAFETY: the values came from the guest by the same MSRs or were checked by the caller of
        // `set_msr`; the host uses neither these MSRs nor CR2 nor debug registers.
        unsafe {
            for (index, value) in msrs.take(self.switched_msrs()) {
                wrmsr(*index, value);
            }
            if self.speculation_control(Features::SPEC_CTRL) {
                wrmsr(msr::IA32_SPEC_CTRL, state.spec_ctrl);
            }
            // What another guest taught the branch predictors is forgotten.
            if self.has(Features::PRED_CMD) {
                wrmsr(IA32_PRED_CMD, 1);
            }
            asm!("mov cr2, {}", in(reg) state.cr2, options(nomem, nostack));
            state.load_debug();
        }
    }

    fn unload_switched(&mut self) {
        let count = self.switched_msrs();
        let spec_ctrl = self.speculation_control(Features::SPEC_CTRL);
        let state = &mut self.switched;
        // SAFETY: reads, and host values for what would otherwise go on to work: no speculation
        // control. Breakpoints are off, because the exit cleared DR7.
        unsafe {
            for (index, value) in SWITCHED_MSRS.iter().zip(&mut state.msrs).take(count) {
                *value = rdmsr(*index);
            }
            if spec_ctrl {
                state.spec_ctrl = rdmsr(msr::IA32_SPEC_CTRL);
                wrmsr(msr::IA32_SPEC_CTRL, 0);
            }
            asm!("mov {}, cr2", out(reg) state.cr2, options(nomem, nostack));
            state.save_debug();
            self.xstate.save();
        }
    }

    /// How many of [`SWITCHED_MSRS`] the machine has.
    fn switched_msrs(&self) -> usize {
        SWITCHED_MSRS.len() - usize::from(!self.has(Features::RDTSCP))
    }

    fn switched_msr(&self, index: u32) -> Option<usize> {
        SWITCHED_MSRS
            .iter()
            .take(self.switched_msrs())
            .position(|candidate| *candidate == index)
    }

    /// The part of the state after RESET that lives in the VMCS, which is current.
    fn reset_vmcs(&mut self) {
        self.request_interrupt_window(false);
        self.request_nmi_window(false);
        self.set_threshold(0);
        let data = Segment {
            selector: 0,
            rights: arch::AccessRights(0x93),
            limit: 0xffff,
            base: 0,
        };
        for register in [
            SegmentRegister::Es,
            SegmentRegister::Ss,
            SegmentRegister::Ds,
            SegmentRegister::Fs,
            SegmentRegister::Gs,
        ] {
            self.set_segment(register, data);
        }
        for (register, selector, rights, base) in [
            (SegmentRegister::Cs, 0xf000, 0x9b, 0xffff_0000),
            (SegmentRegister::Ldtr, 0, 0x82, 0),
            (SegmentRegister::Tr, 0, 0x8b, 0),
        ] {
            let rights = arch::AccessRights(rights);
            self.set_segment(
                register,
                Segment {
                    selector,
                    rights,
                    base,
                    ..data
                },
            );
        }
        let table = DescriptorTable {
            base: 0,
            limit: 0xffff,
        };
        self.set_gdtr(table);
        self.set_idtr(table);
        for (field, value) in [
            (guest::IA32_EFER_FULL, 0),
            (guest::IA32_PAT_FULL, PAT_RESET),
            (guest::IA32_DEBUGCTL_FULL, 0),
            (guest::IA32_SYSENTER_CS, 0),
            (guest::IA32_SYSENTER_ESP, 0),
            (guest::IA32_SYSENTER_EIP, 0),
            (guest::ACTIVITY_STATE, 0),
            (guest::INTERRUPTIBILITY_STATE, 0),
            (guest::PENDING_DBG_EXCEPTIONS, 0),
            (guest::RFLAGS, 2),
            (guest::RSP, 0),
            (guest::RIP, 0xfff0),
            (guest::DR7, 0x400),
        ] {
            self.write(field, value);
        }
        self.set_cr(ControlRegister::Cr0, 0x6000_0010);
        self.set_cr(ControlRegister::Cr3, 0);
        self.set_cr(ControlRegister::Cr4, 0);
    }

    /// Host state of the calling core (§25.5), where the processor goes on at an exit.
    fn write_host(&mut self, core: &Core) {
        // SAFETY: EFER and PAT exist on every processor with VT-x in 64-bit mode.
        let (efer, pat, fs_base, gs_base) = unsafe {
            (
                rdmsr(msr::IA32_EFER),
                rdmsr(msr::IA32_PAT),
                rdmsr(msr::IA32_FS_BASE),
                rdmsr(msr::IA32_GS_BASE),
            )
        };
        let (cr0, cr3, cr4): (u64, u64, u64);
        let (cs, ss): (u16, u16);
        // SAFETY: reads of registers.
        unsafe {
            asm!(
                "mov {}, cr0", "mov {}, cr3", "mov {}, cr4", "mov {3:x}, cs", "mov {4:x}, ss",
                out(reg) cr0, out(reg) cr3, out(reg) cr4, out(reg) cs, out(reg) ss,
                options(nomem, nostack)
            );
        }
        for (field, value) in [
            (host::CR0, cr0),
            (host::CR3, cr3),
            (host::CR4, cr4),
            // RPL and TI must be zero (§27.2.3). Data segments mean nothing in 64-bit mode.
            (host::CS_SELECTOR, (cs & !7).into()),
            (host::SS_SELECTOR, (ss & !7).into()),
            (host::DS_SELECTOR, 0),
            (host::ES_SELECTOR, 0),
            (host::FS_SELECTOR, 0),
            (host::GS_SELECTOR, 0),
            (host::TR_SELECTOR, (core.tr & !7).into()),
            (host::FS_BASE, fs_base),
            (host::GS_BASE, gs_base),
            (host::TR_BASE, core.tss),
            (host::GDTR_BASE, core.gdt),
            (host::IDTR_BASE, core.idt),
            (host::IA32_SYSENTER_CS, 0),
            (host::IA32_SYSENTER_ESP, 0),
            (host::IA32_SYSENTER_EIP, 0),
            (host::IA32_EFER_FULL, efer),
            (host::IA32_PAT_FULL, pat),
            (host::RIP, entry::exit_address()),
        ] {
            self.write(field, value);
        }
    }
}

/// Where [`Switched::dr`] holds a debug register; `None` for DR7 (and DR5), which is in the VMCS.
const fn debug_index(register: DebugRegister) -> Option<usize> {
    match register {
        DebugRegister::Dr0 => Some(0),
        DebugRegister::Dr1 => Some(1),
        DebugRegister::Dr2 => Some(2),
        DebugRegister::Dr3 => Some(3),
        DebugRegister::Dr4 | DebugRegister::Dr6 => Some(DR6),
        DebugRegister::Dr5 | DebugRegister::Dr7 => None,
    }
}

/// Clears `mine` and makes `previous` current again.
///
/// # Safety
/// The core is in VMX operation; both are VMCS pages, `mine` not loaded, `previous` current before.
unsafe fn put_back(mine: HostPhysAddr, previous: Option<HostPhysAddr>) {
    // SAFETY: by the contract above. Neither can fail for pages that were accepted before.
    unsafe {
        let _ = vmcs::vmclear(mine);
        if let Some(previous) = previous {
            let _ = vmcs::vmptrld(previous);
        }
    }
}

/// What tells one core from another, and where its tables are.
struct Core {
    tr: u16,
    /// Address of the TSS.
    tss: u64,
    gdt: u64,
    idt: u64,
}

impl Core {
    fn current() -> Self {
        #[repr(C, packed)]
        #[derive(Default)]
        struct Pointer {
            limit: u16,
            base: u64,
        }
        let (mut gdtr, mut idtr) = (Pointer::default(), Pointer::default());
        let tr: u16;
        // SAFETY: stores ten bytes into each of two variables.
        unsafe {
            asm!(
                "sgdt [{}]", "sidt [{}]", "str {2:x}",
                in(reg) &raw mut gdtr, in(reg) &raw mut idtr, out(reg) tr, options(nostack)
            );
        }
        let (gdt, idt) = (gdtr.base, idtr.base);
        let entry = (gdt + u64::from(tr & !7)) as *const [u64; 2];
        // SAFETY: `Vmx::enable` saw that TR is loaded, so its 16-byte descriptor is in the GDT.
        let [low, high] = unsafe { entry.read_unaligned() };
        Self {
            tr,
            tss: tss_base(low, high),
            gdt,
            idt,
        }
    }
}

/// The base address in a 64-bit TSS descriptor (Vol. 3A figure 8-4).
const fn tss_base(low: u64, high: u64) -> u64 {
    (low >> 16 & 0xff_ffff) | (low >> 56) << 24 | high << 32
}

/// Whether the guest may write `value` to CR0 (Vol. 3A §2.5, §4.1.1, §10.8.5); the processor
/// checks the PDPTEs itself.
fn cr0_legal(was: Cr0, value: u64, cr4: Cr4, efer: Efer, cs_long: bool) -> bool {
    let new = Cr0::from_bits_retain(value);
    let paging = new.contains(Cr0::PG);
    let begins = paging && !was.contains(Cr0::PG);
    let ends = !paging && was.contains(Cr0::PG);
    value >> 32 == 0
        && (new.contains(Cr0::CD) || !new.contains(Cr0::NW))
        && (new.contains(Cr0::PE) || !paging)
        && !(begins && efer.contains(Efer::LME) && (!cr4.contains(Cr4::PAE) || cs_long))
        && !(ends && (cr4.contains(Cr4::PCIDE) || efer.contains(Efer::LMA) && cs_long))
        && (new.contains(Cr0::WP) || !cr4.contains(Cr4::CET))
}

/// Sets or clears the bits of an MSR in the bitmap (§25.6.9): four quarters, for reads and writes
/// of low (0 to 1FFFh) and high (C000_0000h to C000_1FFFh) MSRs. Others always exit.
fn set_bitmap(bitmap: &mut [u8; HostPage::SIZE], index: u32, read: bool, write: bool) {
    let (high, offset) = match index {
        0..=0x1fff => (0, index),
        0xc000_0000..=0xc000_1fff => (1024, index - 0xc000_0000),
        _ => return,
    };
    for (quarter, on) in [(high, read), (2048 + high, write)] {
        if let Some(byte) = bitmap.get_mut(quarter + (offset / 8) as usize) {
            let bit = 1 << (offset % 8);
            *byte = if on { *byte | bit } else { *byte & !bit };
        }
    }
}

/// Which x2APIC registers the virtual-APIC page can answer for: all that can be read but PPR
/// (80Ah) and the timer's current count (839h). For what does not exist the exit gives #GP.
const fn x2apic_readable(index: u32) -> bool {
    matches!(index, 0x802 | 0x803 | 0x808 | 0x80d | 0x80f..=0x828 | 0x830 | 0x832..=0x838 | 0x83e)
}

/// MSRs that live in the VMCS; EFER goes its own way.
const fn vmcs_msr(index: u32) -> Option<u32> {
    Some(match index {
        msr::IA32_FS_BASE => guest::FS_BASE,
        msr::IA32_GS_BASE => guest::GS_BASE,
        msr::IA32_SYSENTER_CS => guest::IA32_SYSENTER_CS,
        msr::IA32_SYSENTER_ESP => guest::IA32_SYSENTER_ESP,
        msr::IA32_SYSENTER_EIP => guest::IA32_SYSENTER_EIP,
        msr::IA32_PAT => guest::IA32_PAT_FULL,
        msr::IA32_DEBUGCTL => guest::IA32_DEBUGCTL_FULL,
        _ => return None,
    })
}

impl Vcpu for VmxVcpu {
    fn set_pause_exiting(&mut self, on: bool) {
        if on != self.pause_exiting {
            self.pause_exiting = on;
            let controls = self.secondary();
            self.write(control::SECONDARY_PROCBASED_EXEC_CONTROLS, controls.into());
        }
    }

    fn set_apic_mode(&mut self, mode: ApicMode) {
        Self::set_apic_mode(self, mode);
    }

    fn set_pdptes(&mut self, entries: [u64; 4]) {
        Self::set_pdptes(self, entries);
    }

    fn load(&mut self) {
        if self.loaded() {
            return;
        }
        // SAFETY: the VMCS is clear and ours (the contract of `new`). If the processor refuses it,
        // the state stays `Clear` and the next entry fails with a report.
        if !unsafe { vmcs::vmptrld(self.pages.vmcs.phys()) } {
            return;
        }
        self.context.state = State::Loaded;
        let core = Core::current();
        if self.core != core.tss {
            self.write_host(&core);
            self.core = core.tss;
            // What this core remembers from an earlier visit may be out of date.
            self.flush_linear();
            self.flush_nested(self.config.ept_root);
        }
        self.timer = self.deadline;
        self.load_switched();
    }

    fn unload(&mut self) {
        if self.loaded() {
            self.timer = u64::MAX;
            self.unload_switched();
            // SAFETY: the VMCS is ours; VMCLEAR writes it to memory so that any core can load it.
            let _ = unsafe { vmcs::vmclear(self.pages.vmcs.phys()) };
            self.context.state = State::Clear;
        }
    }

    // Inlined into the run loop, whose registers then need not be saved around it.
    #[inline(always)]
    fn enter(&mut self) -> Exit {
        loop {
            if self.pending.is_some() {
                self.deliver();
            }
            if self.timer != u64::MAX {
                self.start_timer();
            }
            // SAFETY: loaded on this core with its host state, or else the entry fails.
            let outcome = unsafe { entry::run(&mut self.context) };
            if outcome != entry::EXITED {
                self.entry_failed(outcome);
                return Exit::Rare;
            }
            // SAFETY: the exit came from the current VMCS, and the assembly noted that it is
            // launched; told of it, the compiler leaves out what asks whether it is loaded.
            let raw = unsafe {
                assert_unchecked(self.loaded());
                vmcs::vmread(ro::EXIT_REASON)
            };
            let reason = raw as u32;
            // Compared in full width, which keeps the compiler from drawing it into the table
            // below: the path of the most common instruction is a straight line.
            if raw == u64::from(r::CPUID) {
                return Exit::Cpuid;
            }
            if let Some(exit) = self.decode(reason) {
                return exit;
            }
        }
    }

    fn rare_exit(&self) -> Exit {
        self.rare
    }

    #[cfg(feature = "count-vmcs")]
    fn control_accesses(&self) -> Option<[u64; 2]> {
        use core::sync::atomic::Ordering::Relaxed;
        Some([
            vmcs::count::READS.load(Relaxed),
            vmcs::count::WRITES.load(Relaxed),
        ])
    }

    #[inline]
    fn gprs(&self) -> &Gprs {
        &self.context.gprs
    }
    #[inline]
    fn gprs_mut(&mut self) -> &mut Gprs {
        &mut self.context.gprs
    }

    fn rsp(&self) -> u64 {
        self.read(guest::RSP)
    }
    fn set_rsp(&mut self, value: u64) {
        self.write(guest::RSP, value);
    }
    #[inline]
    fn rip(&self) -> u64 {
        self.read(guest::RIP)
    }
    #[inline(always)]
    fn set_rip(&mut self, value: u64) {
        if !self.loaded() {
            self.write(guest::RIP, value);
            return self.end_shadow();
        }
        // SAFETY: the VMCS is current; guest fields do no harm.
        unsafe {
            vmcs::vmwrite(guest::RIP, value);
            let blocked = vmcs::vmread(guest::INTERRUPTIBILITY_STATE);
            if blocked & SHADOW != 0 {
                vmcs::vmwrite(guest::INTERRUPTIBILITY_STATE, blocked & !SHADOW);
            }
        }
    }
    #[inline(always)]
    fn next_rip(&self) -> Option<u64> {
        self.loaded().then(|| {
            let length = self.read(ro::VMEXIT_INSTRUCTION_LEN);
            self.read(guest::RIP).wrapping_add(length)
        })
    }
    #[inline(always)]
    fn rflags(&self) -> RFlags {
        RFlags::from_bits_retain(self.read(guest::RFLAGS))
    }
    fn set_rflags(&mut self, value: RFlags) {
        self.write(guest::RFLAGS, (value | RFlags::FIXED).bits());
        // §27.3.1.5: an STI shadow without IF cannot be entered.
        if !value.contains(RFlags::IF) {
            let blocked = self.read(guest::INTERRUPTIBILITY_STATE);
            if blocked & BLOCKED_BY_STI != 0 {
                self.write(guest::INTERRUPTIBILITY_STATE, blocked & !BLOCKED_BY_STI);
            }
        }
    }

    fn cr(&self, register: ControlRegister) -> u64 {
        let seen = |field, shadow, mask: u64| self.read(field) & !mask | self.read(shadow) & mask;
        match register {
            ControlRegister::Cr0 => seen(guest::CR0, control::CR0_READ_SHADOW, CR0_HOST),
            ControlRegister::Cr2 if self.loaded() => {
                let value;
                // SAFETY: while the vCPU is loaded, CR2 is the guest's.
                unsafe { asm!("mov {}, cr2", out(reg) value, options(nomem, nostack)) };
                value
            }
            ControlRegister::Cr2 => self.switched.cr2,
            ControlRegister::Cr3 => self.read(guest::CR3),
            ControlRegister::Cr4 => {
                let host_owned = !self.config.cr4_guest.bits();
                seen(guest::CR4, control::CR4_READ_SHADOW, host_owned)
            }
            // TPR is the local APIC's, in the virtual-APIC page or in software.
            ControlRegister::Cr8 => 0,
        }
    }
    fn set_cr(&mut self, register: ControlRegister, value: u64) {
        match register {
            ControlRegister::Cr0 => {
                // ET is hardwired to one.
                let value = value | Cr0::ET.bits();
                let real = self.caps.fix_cr0(value & !(Cr0::CD | Cr0::NW).bits());
                self.write(control::CR0_READ_SHADOW, value);
                self.write(guest::CR0, real);
                self.update_mode(self.read(guest::IA32_EFER_FULL), real);
                self.flush_linear();
            }
            ControlRegister::Cr2 if self.loaded() => {
                // SAFETY: while the vCPU is loaded, CR2 is the guest's.
                unsafe { asm!("mov cr2, {}", in(reg) value, options(nomem, nostack)) };
            }
            ControlRegister::Cr2 => self.switched.cr2 = value,
            ControlRegister::Cr3 => {
                // Bit 63 only asks not to flush, and the flush is always right.
                self.write(guest::CR3, value & !(1 << 63));
                self.flush_linear();
            }
            ControlRegister::Cr4 => {
                // Bits that the guest does not own but the caller allowed work all the same.
                let real = self.caps.fix_cr4(value | Cr4::MCE.bits());
                self.write(control::CR4_READ_SHADOW, value);
                self.write(guest::CR4, real);
                self.flush_linear();
            }
            ControlRegister::Cr8 => {}
        }
    }

    fn dr(&self, register: DebugRegister) -> u64 {
        let Some(index) = debug_index(register) else {
            return self.read(guest::DR7);
        };
        let mut state = self.switched;
        if self.loaded() {
            state.save_debug();
        }
        state.dr[index]
    }
    fn set_dr(&mut self, register: DebugRegister, value: u64) {
        let Some(index) = debug_index(register) else {
            // Bit 10 is one; 11, 12, 14, 15 and the upper half are zero (§27.3.1.1).
            return self.write(guest::DR7, value & 0xffff_27ff | 0x400);
        };
        if self.loaded() {
            self.switched.save_debug();
        }
        self.switched.dr[index] = if index == DR6 {
            // Reserved bits as in Vol. 3B §17.2.3; a one in the upper half would fault.
            value & 0xffff_efff | DR6_RESET
        } else {
            value
        };
        if self.loaded() {
            // SAFETY: the vCPU is loaded.
            unsafe { self.switched.load_debug() };
        }
    }

    fn segment(&self, register: SegmentRegister) -> Segment {
        // The fields of the eight registers follow each other in the order of `SegmentRegister`.
        let step = 2 * register as u32;
        Segment {
            selector: self.read(guest::ES_SELECTOR + step) as u16,
            rights: arch::AccessRights(self.read(guest::ES_ACCESS_RIGHTS + step) as u32),
            limit: self.read(guest::ES_LIMIT + step) as u32,
            base: self.read(guest::ES_BASE + step),
        }
    }
    fn set_segment(&mut self, register: SegmentRegister, value: Segment) {
        let step = 2 * register as u32;
        self.write(guest::ES_SELECTOR + step, value.selector.into());
        self.write(guest::ES_ACCESS_RIGHTS + step, value.rights.0.into());
        self.write(guest::ES_LIMIT + step, value.limit.into());
        self.write(guest::ES_BASE + step, value.base);
    }
    #[inline(always)]
    fn rights(&self, register: SegmentRegister) -> arch::AccessRights {
        let field = guest::ES_ACCESS_RIGHTS + 2 * register as u32;
        arch::AccessRights(self.read(field) as u32)
    }
    fn gdtr(&self) -> DescriptorTable {
        DescriptorTable {
            base: self.read(guest::GDTR_BASE),
            limit: self.read(guest::GDTR_LIMIT) as u16,
        }
    }
    fn set_gdtr(&mut self, value: DescriptorTable) {
        self.write(guest::GDTR_BASE, value.base);
        self.write(guest::GDTR_LIMIT, value.limit.into());
    }
    fn idtr(&self) -> DescriptorTable {
        DescriptorTable {
            base: self.read(guest::IDTR_BASE),
            limit: self.read(guest::IDTR_LIMIT) as u16,
        }
    }
    fn set_idtr(&mut self, value: DescriptorTable) {
        self.write(guest::IDTR_BASE, value.base);
        self.write(guest::IDTR_LIMIT, value.limit.into());
    }

    #[inline]
    fn efer(&self) -> u64 {
        self.read(guest::IA32_EFER_FULL)
    }
    fn set_efer(&mut self, value: u64) {
        self.update_mode(value, self.read(guest::CR0));
        self.flush_linear();
    }
    #[inline]
    fn msr(&self, index: u32) -> Option<u64> {
        if index == msr::IA32_EFER {
            return Some(self.efer());
        }
        if let Some(field) = vmcs_msr(index) {
            return Some(self.read(field));
        }
        let loaded = self.loaded();
        let kept = if index == msr::IA32_SPEC_CTRL && self.speculation_control(Features::SPEC_CTRL)
        {
            self.switched.spec_ctrl
        } else {
            *self.switched.msrs.get(self.switched_msr(index)?)?
        };
        if !loaded {
            return Some(kept);
        }
        // SAFETY: while the vCPU is loaded, this MSR, which the machine has, is the guest's.
        Some(unsafe { rdmsr(index) })
    }
    #[inline(always)]
    fn set_msr(&mut self, index: u32, value: u64) -> bool {
        // The one that always exits and needs nothing else (EFER changes the mode).
        if index == msr::IA32_PAT {
            self.write(guest::IA32_PAT_FULL, value);
            return true;
        }
        self.set_other_msr(index, value)
    }
    fn xcr0(&self) -> u64 {
        self.xstate.xcr0()
    }
    fn set_xcr0(&mut self, value: u64) {
        let loaded = self.loaded();
        // SAFETY: the core was made ready (the contract of `new`).
        unsafe { self.xstate.set_xcr0(value, loaded) };
    }

    fn interruptibility(&self) -> Interruptibility {
        if self.pending.is_some() {
            return Interruptibility::default();
        }
        let blocked = self.read(guest::INTERRUPTIBILITY_STATE);
        Interruptibility {
            interrupts_open: blocked & SHADOW == 0 && self.rflags().contains(RFlags::IF),
            // An STI shadow does not hold NMIs back; delivery ends it.
            nmi_open: blocked & (BLOCKED_BY_NMI | BLOCKED_BY_MOV_SS) == 0,
        }
    }
    fn inject(&mut self, event: Event) -> bool {
        match arch::combine(self.pending, event) {
            Combined::Deliver(event) => {
                self.pending = Some(event);
                true
            }
            Combined::TripleFault => false,
        }
    }
    fn pending_event(&self) -> Option<Event> {
        self.pending
    }
    fn request_interrupt_window(&mut self, on: bool) {
        self.set_primary(primary::INTERRUPT_WINDOW, on);
    }
    fn request_nmi_window(&mut self, on: bool) {
        self.set_primary(primary::NMI_WINDOW, on);
    }

    fn set_tsc_offset(&mut self, offset: u64) {
        self.write(control::TSC_OFFSET_FULL, offset);
    }
    fn set_deadline(&mut self, tsc: u64) -> bool {
        if !self.has(Features::PREEMPTION_TIMER) {
            return false;
        }
        self.deadline = tsc;
        if self.loaded() {
            self.timer = tsc;
        }
        let mut value = self.pin & !pin::PREEMPTION_TIMER;
        if tsc != u64::MAX {
            value |= pin::PREEMPTION_TIMER;
        }
        if value != self.pin {
            self.pin = value;
            self.write(control::PINBASED_EXEC_CONTROLS, value.into());
        }
        true
    }

    fn flush_nested(&mut self, root: HostPhysAddr) {
        if self.loaded() {
            let scope = self.caps.invept;
            let eptp = if scope == Scope::Single {
                Self::eptp(root)
            } else {
                0
            };
            // SAFETY: in VMX operation; the processor has this scope.
            unsafe { vmcs::invept(scope, eptp) };
        } else {
            self.core = 0;
        }
    }

    fn virtual_tpr(&self) -> Option<u8> {
        None
    }
    fn set_virtual_tpr(&mut self, tpr: u8, threshold: u8) {
        if self.shadows_tpr() {
            // A threshold above TPR would fail the entry (§27.2.1.1).
            self.set_threshold(threshold.min(tpr >> 4));
        }
    }

    fn reset(&mut self) {
        self.context.gprs = Gprs::default();
        // Family, model and stepping.
        self.context.gprs[arch::Gpr::Rdx] = __cpuid(1).eax.into();
        self.pending = None;
        self.with_current(Self::reset_vmcs);
        self.switched = Switched::new();
        self.xstate.reset();
        if self.loaded() {
            self.load_switched();
        } else {
            self.core = 0;
        }
    }

    fn init(&mut self) {
        let kept = msr::KEPT_BY_INIT.map(|index| self.msr(index));
        self.context.gprs = Gprs::default();
        self.context.gprs[arch::Gpr::Rdx] = __cpuid(1).eax.into();
        self.pending = None;
        self.with_current(Self::reset_vmcs);
        self.switched = Switched::new();
        if self.loaded() {
            self.load_registers();
        } else {
            self.core = 0;
        }
        for (index, value) in msr::KEPT_BY_INIT.into_iter().zip(kept) {
            value.map(|value| self.set_msr(index, value));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whether reads and writes of an MSR exit, by the layout of §25.6.9.
    fn exits(bitmap: &[u8; HostPage::SIZE], index: u32) -> (bool, bool) {
        let base = if index >= 0xc000_0000 { 1024 } else { 0 };
        let bit = (index & 0x1fff) as usize;
        let at = |from: usize| bitmap[from + bit / 8] & 1 << (bit % 8) != 0;
        (at(base), at(base + 2048))
    }

    #[test]
    fn the_msr_bitmap_has_four_quarters() {
        let mut bitmap = [0xff; HostPage::SIZE];
        set_bitmap(&mut bitmap, msr::IA32_SYSENTER_EIP, false, false);
        set_bitmap(&mut bitmap, msr::IA32_LSTAR, false, true);
        set_bitmap(&mut bitmap, 0x4000_0000, false, false);
        assert_eq!(exits(&bitmap, msr::IA32_SYSENTER_EIP), (false, false));
        assert_eq!(exits(&bitmap, msr::IA32_LSTAR), (false, true));
        assert_eq!(bitmap.iter().map(|byte| byte.count_zeros()).sum::<u32>(), 3);
        set_bitmap(&mut bitmap, msr::IA32_LSTAR, true, true);
        assert_eq!(exits(&bitmap, msr::IA32_LSTAR), (true, true));
    }

    #[test]
    fn cr0_writes_that_fault_are_left_to_software() {
        const PG: u64 = Cr0::PG.bits();
        const PE: u64 = Cr0::PE.bits();
        const CD: u64 = Cr0::CD.bits();
        const NW: u64 = Cr0::NW.bits();
        let (real, paged) = (Cr0::ET, Cr0::PE | Cr0::PG);
        let (none, pae, lme) = (Cr4::empty(), Cr4::PAE, Efer::LME);
        let (off, long) = (Efer::empty(), Efer::LME | Efer::LMA);
        for (was, value, cr4, efer, cs_long, legal) in [
            (real, CD | NW, none, off, false, true),
            (real, NW, none, off, false, false),
            (real, PG, none, off, false, false),
            (real, 1 << 32, none, off, false, false),
            (real, PE | PG, none, off, false, true),
            (real, PE | PG, none, lme, false, false),
            (real, PE | PG, pae, lme, false, true),
            (real, PE | PG, pae, lme, true, false),
            (paged, PE, pae, long, true, false),
            (paged, PE, pae, long, false, true),
            (paged, PE, pae | Cr4::PCIDE, long, false, false),
            (paged, PE | PG, pae | Cr4::CET, long, true, false),
        ] {
            assert_eq!(
                cr0_legal(was, value, cr4, efer, cs_long),
                legal,
                "{was:?} to {value:#x}"
            );
        }
    }

    #[test]
    fn descriptors_and_registers_are_found() {
        assert_eq!(
            tss_base(0x1200_8934_5678_0067, 0xffff_8000),
            0xffff_8000_1234_5678
        );
        assert!(x2apic_readable(0x802) && x2apic_readable(0x83e));
        // PPR, EOI, current count, self-IPI; the CMCI entry, as there are no machine-check banks,
        // and the high half of ICR, which x2APIC has not.
        for index in [0x80a, 0x80b, 0x82f, 0x831, 0x839, 0x83f] {
            assert!(!x2apic_readable(index), "{index:#x}");
        }
        assert_eq!(
            debug_index(DebugRegister::Dr4),
            debug_index(DebugRegister::Dr6)
        );
    }
}
