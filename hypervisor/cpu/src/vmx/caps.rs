//! What VT-x of this processor offers, which of it we need and want, and VMX operation on a core
//! (Intel SDM Vol. 3C §24.6–24.8, appendix A).

use super::vmcs;
use crate::page::HostPage;
use crate::virt::{Extension, VirtUnavailable};
use core::arch::asm;
use core::arch::x86_64::{__cpuid, __cpuid_count};
use x86::msr::{self, rdmsr, wrmsr};

/// Pin-based controls (table 25-5).
pub(super) mod pin {
    pub const PREEMPTION_TIMER: u32 = 1 << 6;
}
/// Primary processor-based controls (table 25-6).
pub(super) mod primary {
    pub const INTERRUPT_WINDOW: u32 = 1 << 2;
    pub const CR8_EXITING: u32 = 1 << 19 | 1 << 20;
    pub const TPR_SHADOW: u32 = 1 << 21;
    pub const NMI_WINDOW: u32 = 1 << 22;
}
/// Secondary processor-based controls (table 25-7).
pub(super) mod secondary {
    pub const APIC_ACCESSES: u32 = 1 << 0;
    pub const RDTSCP: u32 = 1 << 3;
    pub const X2APIC_MODE: u32 = 1 << 4;
    pub const VPID: u32 = 1 << 5;
    pub const APIC_REGISTERS: u32 = 1 << 8;
    pub const PAUSE_LOOP: u32 = 1 << 10;
    pub const INVPCID: u32 = 1 << 12;
    pub const ENCLS_EXITING: u32 = 1 << 15;
    pub const XSAVES: u32 = 1 << 20;
}
/// VM-entry controls (table 25-15).
pub(super) mod entry {
    pub const IA32E_MODE: u32 = 1 << 9;
}

/// How much we want a control.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Need {
    /// Without it no guest runs.
    Required,
    /// Set where the processor has it.
    Wanted,
    /// Set by the vCPU when a feature is on; here only asked for.
    Dynamic,
    /// Must be clear: a processor that forces it on does not fit.
    Clear,
}
use Need::{Clear, Dynamic, Required, Wanted};

struct Control(u8, Need, &'static str);

/// §25.6.1.
const PIN: &[Control] = &[
    // Interrupts and NMIs of the machine are the host's.
    Control(0, Required, "external-interrupt exiting (pin control 0)"),
    Control(3, Required, "NMI exiting (pin control 3)"),
    // A guest's NMI blocking is then its own, and there is an NMI-window exit.
    Control(5, Required, "virtual NMIs (pin control 5)"),
    // On only while there is a deadline.
    Control(6, Dynamic, "VMX-preemption timer (pin control 6)"),
];

/// §25.6.2. What is not listed stays clear: RDTSC runs natively with the offset, INVLPG and
/// MOV-DR natively, PAUSE exits only in loops (secondary control 10).
const PRIMARY: &[Control] = &[
    Control(2, Dynamic, "interrupt-window exiting (processor control 2)"),
    // The guest's TSC is the machine's plus an offset.
    Control(3, Required, "TSC offsetting (processor control 3)"),
    // A halted guest gives the core away.
    Control(7, Required, "HLT exiting (processor control 7)"),
    // MONITOR and MWAIT would halt the core; RDPMC would show the host's counters.
    Control(10, Required, "MWAIT exiting (processor control 10)"),
    Control(11, Required, "RDPMC exiting (processor control 11)"),
    // The nested tables make CR3 the guest's own.
    Control(15, Clear, "the option not to exit on MOV to CR3"),
    Control(16, Clear, "the option not to exit on MOV from CR3"),
    // Only without the TPR shadow.
    Control(19, Dynamic, "CR8-load exiting (processor control 19)"),
    Control(20, Dynamic, "CR8-store exiting (processor control 20)"),
    Control(21, Dynamic, "TPR shadow (processor control 21)"),
    Control(22, Dynamic, "NMI-window exiting (processor control 22)"),
    // No port of the machine belongs to a guest.
    Control(
        24,
        Required,
        "unconditional I/O exiting (processor control 24)",
    ),
    Control(28, Required, "MSR bitmaps (processor control 28)"),
    Control(29, Required, "MONITOR exiting (processor control 29)"),
    Control(31, Required, "secondary controls (processor control 31)"),
];

/// §25.6.2. What is not listed stays clear; for the enabling controls among them (user wait,
/// VM functions, …) the instruction is then #UD in the guest.
const SECONDARY: &[Control] = &[
    Control(0, Dynamic, "virtualize APIC accesses (secondary control 0)"),
    Control(1, Required, "extended page tables (secondary control 1)"),
    Control(3, Wanted, "RDTSCP (secondary control 3)"),
    Control(4, Dynamic, "virtualize x2APIC mode (secondary control 4)"),
    Control(5, Dynamic, "VPID (secondary control 5)"),
    // A guest must not empty the caches of all.
    Control(6, Wanted, "WBINVD exiting (secondary control 6)"),
    // Real mode and unpaged protected mode run natively.
    Control(7, Required, "unrestricted guest (secondary control 7)"),
    Control(
        8,
        Dynamic,
        "APIC-register virtualization (secondary control 8)",
    ),
    // A vCPU that spins on a lock gives the core away.
    Control(10, Wanted, "PAUSE-loop exiting (secondary control 10)"),
    Control(12, Wanted, "INVPCID (secondary control 12)"),
    // No enclaves in guests: every leaf exits and becomes #UD.
    Control(15, Wanted, "ENCLS exiting (secondary control 15)"),
    // XSAVES runs natively: no supervisor state is allowed (XSS is 0), so nothing exits.
    Control(20, Wanted, "XSAVES (secondary control 20)"),
];

/// §25.7.1. Interrupts are not acknowledged (control 15 is clear): they stay pending for the
/// host's own IDT, as on AMD-V.
const EXIT: &[Control] = &[
    // The guest writes DR7 without an exit.
    Control(2, Required, "saving debug controls (exit control 2)"),
    Control(9, Required, "64-bit host (exit control 9)"),
    Control(19, Required, "loading IA32_PAT (exit control 19)"),
    // EFER.LMA follows CR0.PG, which the guest writes without an exit.
    Control(20, Required, "saving IA32_EFER (exit control 20)"),
    Control(21, Required, "loading IA32_EFER (exit control 21)"),
];

/// §25.8.1.
const ENTRY: &[Control] = &[
    Control(2, Required, "loading debug controls (entry control 2)"),
    // Follows EFER.LMA.
    Control(9, Dynamic, "IA-32e mode guests (entry control 9)"),
    Control(14, Required, "loading IA32_PAT (entry control 14)"),
    Control(15, Required, "loading IA32_EFER (entry control 15)"),
];

/// EPT and VPID capabilities (appendix A.10).
const EPT: &[Control] = &[
    Control(
        6,
        Required,
        "4-level EPT walks (IA32_VMX_EPT_VPID_CAP bit 6)",
    ),
    Control(
        14,
        Required,
        "write-back EPT tables (IA32_VMX_EPT_VPID_CAP bit 14)",
    ),
    Control(
        16,
        Required,
        "2 MiB EPT pages (IA32_VMX_EPT_VPID_CAP bit 16)",
    ),
    Control(20, Required, "INVEPT (IA32_VMX_EPT_VPID_CAP bit 20)"),
    Control(
        26,
        Required,
        "all-context INVEPT (IA32_VMX_EPT_VPID_CAP bit 26)",
    ),
];

const fn missing(feature: &'static str) -> VirtUnavailable {
    VirtUnavailable::MissingFeature {
        extension: Extension::Vmx,
        feature,
    }
}

/// What the processor leaves us of a set of controls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Adjusted {
    /// What to write.
    value: u32,
    /// Which dynamic controls may be set.
    dynamic: u32,
}

/// Fits a set of controls to a capability MSR (appendix A.3–A.5): a bit that is one in the low
/// half must be one, a bit that is zero in the high half must be zero.
fn adjust(controls: &[Control], capability: u64) -> Result<Adjusted, VirtUnavailable> {
    let must = capability as u32;
    let may = (capability >> 32) as u32;
    let mut adjusted = Adjusted {
        value: must,
        dynamic: 0,
    };
    for Control(bit, need, name) in controls {
        let bit = 1 << bit;
        match need {
            Required if may & bit == 0 => return Err(missing(name)),
            Clear if must & bit != 0 => return Err(missing(name)),
            Required | Wanted => adjusted.value |= bit & may,
            // A dynamic control that is forced on could not be turned off again.
            Dynamic if must & bit != 0 => return Err(missing(name)),
            Dynamic => adjusted.dynamic |= bit & may,
            Clear => {}
        }
    }
    Ok(adjusted)
}

bitflags::bitflags! {
    /// Optional help of the hardware; each has a fall-back in software.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Features: u32 {
        /// Tagged linear translations, which survive entries and exits.
        const VPID = 1 << 0;
        /// A timer that ends guest mode.
        const PREEMPTION_TIMER = 1 << 1;
        /// CR8, and TPR in the virtual-APIC page, without exits.
        const TPR_SHADOW = 1 << 2;
        /// An APIC-access page: exits say register and direction.
        const APIC_ACCESSES = 1 << 3;
        /// APIC reads from the virtual-APIC page, writes as trap-like exits.
        const APIC_REGISTERS = 1 << 4;
        /// The same for x2APIC MSRs.
        const X2APIC = 1 << 5;
        /// Exits on PAUSE in loops.
        const PAUSE_LOOP = 1 << 6;
        /// 1 GiB pages in EPT.
        const EPT_1G = 1 << 7;
        /// Accessed and dirty bits in EPT.
        const EPT_ACCESSED_DIRTY = 1 << 8;
        /// RDTSCP and IA32_TSC_AUX.
        const RDTSCP = 1 << 9;
        /// IA32_SPEC_CTRL.
        const SPEC_CTRL = 1 << 10;
        /// IA32_PRED_CMD.
        const PRED_CMD = 1 << 11;
        /// INVPCID.
        const INVPCID = 1 << 12;
        /// XSAVES and XRSTORS.
        const XSAVES = 1 << 13;
    }
}

/// Instructions that are #UD in a guest unless a secondary control lets them be.
const INSTRUCTIONS: [(Features, u32); 3] = [
    (Features::RDTSCP, secondary::RDTSCP),
    (Features::INVPCID, secondary::INVPCID),
    (Features::XSAVES, secondary::XSAVES),
];

/// The capability MSRs as read, so that the decisions can be tested away from the hardware.
#[derive(Clone, Copy, Debug, Default)]
struct Raw {
    basic: u64,
    pin: u64,
    primary: u64,
    secondary: u64,
    exit: u64,
    entry: u64,
    misc: u64,
    ept_vpid: u64,
    cr0: [u64; 2],
    cr4: [u64; 2],
    /// CPUID 7: EDX.
    leaf7_edx: u32,
}

/// What VT-x of this machine offers, with the controls fitted to it. The same on every core.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VmxCaps {
    /// VMCS revision identifier.
    pub(super) revision: u32,
    pub(super) pin: u32,
    pub(super) primary: u32,
    pub(super) secondary: u32,
    pub(super) exit: u32,
    pub(super) entry: u32,
    /// The preemption timer counts the TSC divided by 2 to this power.
    pub(super) timer_shift: u8,
    /// Scopes of INVEPT and INVVPID.
    pub(super) invept: vmcs::Scope,
    pub(super) invvpid: vmcs::Scope,
    /// Bits that must be one, and bits that may be one, in VMX operation (appendix A.7, A.8).
    cr0: [u64; 2],
    cr4: [u64; 2],
    features: Features,
}

impl VmxCaps {
    fn new(raw: &Raw) -> Result<Self, VirtUnavailable> {
        if raw.basic >> 50 & 15 != 6 {
            return Err(missing(
                "write-back VMCS memory (IA32_VMX_BASIC bits 53:50)",
            ));
        }
        let pin = adjust(PIN, raw.pin)?;
        let primary = adjust(PRIMARY, raw.primary)?;
        let secondary = adjust(SECONDARY, raw.secondary)?;
        let exit = adjust(EXIT, raw.exit)?;
        let entry = adjust(ENTRY, raw.entry)?;
        if entry.dynamic & entry::IA32E_MODE == 0 {
            return Err(missing("64-bit guests (entry control 9)"));
        }
        // Capability bits read like controls that may be one.
        adjust(EPT, raw.ept_vpid << 32)?;
        let ept = |bit: u32| raw.ept_vpid & 1 << bit != 0;

        let mut features = Features::empty();
        features.set(
            Features::VPID,
            secondary.dynamic & secondary::VPID != 0 && ept(32) && ept(42),
        );
        features.set(
            Features::PREEMPTION_TIMER,
            pin.dynamic & pin::PREEMPTION_TIMER != 0,
        );
        // The rest of APIC virtualization stands on the TPR shadow (§27.2.1.1).
        if primary.dynamic & primary::TPR_SHADOW != 0 {
            features |= Features::TPR_SHADOW;
            let has = |bit| secondary.dynamic & bit != 0;
            features.set(Features::APIC_ACCESSES, has(secondary::APIC_ACCESSES));
            features.set(Features::APIC_REGISTERS, has(secondary::APIC_REGISTERS));
            features.set(Features::X2APIC, has(secondary::X2APIC_MODE));
        } else if primary.dynamic & primary::CR8_EXITING != primary::CR8_EXITING {
            return Err(missing(
                "both TPR shadow and CR8 exiting (processor controls 19–21)",
            ));
        }
        features.set(
            Features::PAUSE_LOOP,
            secondary.value & secondary::PAUSE_LOOP != 0,
        );
        features.set(Features::EPT_1G, ept(17));
        features.set(Features::EPT_ACCESSED_DIRTY, ept(21));
        for (feature, control) in INSTRUCTIONS {
            features.set(feature, secondary.value & control != 0);
        }
        // CPUID 7: EDX bit 26 tells of both MSRs.
        features.set(
            Features::SPEC_CTRL | Features::PRED_CMD,
            raw.leaf7_edx & 1 << 26 != 0,
        );
        Ok(Self {
            revision: raw.basic as u32 & 0x7fff_ffff,
            pin: pin.value,
            primary: primary.value,
            secondary: secondary.value,
            exit: exit.value,
            entry: entry.value,
            timer_shift: raw.misc as u8 & 31,
            invept: if ept(25) {
                vmcs::Scope::Single
            } else {
                vmcs::Scope::All
            },
            invvpid: if ept(41) {
                vmcs::Scope::Single
            } else {
                vmcs::Scope::All
            },
            cr0: raw.cr0,
            cr4: raw.cr4,
            features,
        })
    }

    /// The optional features in use.
    #[must_use]
    pub const fn features(&self) -> Features {
        self.features
    }

    /// The same machine with only these optional features: fall-backs are tested this way.
    #[cfg(test)]
    pub(crate) fn with_only(mut self, features: Features) -> Self {
        self.features &= features;
        if !self.features.contains(Features::TPR_SHADOW) {
            self.features -= Features::APIC_ACCESSES | Features::APIC_REGISTERS | Features::X2APIC;
        }
        for (feature, control) in INSTRUCTIONS
            .into_iter()
            .chain([(Features::PAUSE_LOOP, secondary::PAUSE_LOOP)])
        {
            if !self.features.contains(feature) {
                self.secondary &= !control;
            }
        }
        self
    }

    /// CR0 of a guest with the bits that VMX operation fixes; unrestricted guests choose PE and PG
    /// themselves (§27.3.1.1).
    pub(super) const fn fix_cr0(&self, value: u64) -> u64 {
        (value | self.cr0[0] & !0x8000_0001) & self.cr0[1]
    }

    /// CR4 of a guest with the bits that VMX operation fixes.
    pub(super) const fn fix_cr4(&self, value: u64) -> u64 {
        (value | self.cr4[0]) & self.cr4[1]
    }
}

/// Whether firmware left VMX usable (§24.7): true if the MSR must still be set and locked.
fn feature_control(value: u64) -> Result<bool, VirtUnavailable> {
    const LOCKED: u64 = 1 << 0;
    const OUTSIDE_SMX: u64 = 1 << 2;
    match (value & LOCKED != 0, value & OUTSIDE_SMX != 0) {
        (false, _) => Ok(true),
        (true, true) => Ok(false),
        (true, false) => Err(VirtUnavailable::DisabledByFirmware {
            extension: Extension::Vmx,
            name: "IA32_FEATURE_CONTROL",
            msr: msr::IA32_FEATURE_CONTROL,
            value,
            remedy: "bit 2 (VMX outside SMX) is clear and bit 0 locks it: enable Intel \
                     Virtualization Technology (VT-x) in the firmware setup, then switch the \
                     machine off and on",
        }),
    }
}

/// VMX operation on one core.
#[derive(Debug)]
pub struct Vmx {
    region: HostPage,
}

impl Vmx {
    /// Asks the processor what it offers.
    ///
    /// # Safety
    /// Runs in ring 0.
    ///
    /// # Errors
    /// There is no VT-x, firmware locked it off, or it lacks something that is needed.
    pub unsafe fn detect() -> Result<VmxCaps, VirtUnavailable> {
        if __cpuid(1).ecx & 1 << 5 == 0 {
            return Err(VirtUnavailable::NotSupported);
        }
        // SAFETY: with CPUID.VMX, IA32_FEATURE_CONTROL and the VMX MSRs up to CR4_FIXED1 exist
        // (appendix A); the others are read where the bits that announce them are set.
        let raw = unsafe {
            feature_control(rdmsr(msr::IA32_FEATURE_CONTROL))?;
            let basic = rdmsr(msr::IA32_VMX_BASIC);
            // Bit 55: the TRUE MSRs tell which default-1 controls may be zero (appendix A.2).
            let [pin, primary, exit, entry] = if basic & 1 << 55 != 0 {
                [
                    msr::IA32_VMX_TRUE_PINBASED_CTLS,
                    msr::IA32_VMX_TRUE_PROCBASED_CTLS,
                    msr::IA32_VMX_TRUE_EXIT_CTLS,
                    msr::IA32_VMX_TRUE_ENTRY_CTLS,
                ]
            } else {
                [
                    msr::IA32_VMX_PINBASED_CTLS,
                    msr::IA32_VMX_PROCBASED_CTLS,
                    msr::IA32_VMX_EXIT_CTLS,
                    msr::IA32_VMX_ENTRY_CTLS,
                ]
            };
            let primary = rdmsr(primary);
            let secondary = if primary >> 63 != 0 {
                rdmsr(msr::IA32_VMX_PROCBASED_CTLS2)
            } else {
                0
            };
            // EPT (1) or VPID (5) bring their capability MSR.
            let ept_vpid = if secondary >> 32 & 0x22 != 0 {
                rdmsr(msr::IA32_VMX_EPT_VPID_CAP)
            } else {
                0
            };
            Raw {
                basic,
                pin: rdmsr(pin),
                primary,
                secondary,
                exit: rdmsr(exit),
                entry: rdmsr(entry),
                misc: rdmsr(msr::IA32_VMX_MISC),
                ept_vpid,
                cr0: [
                    rdmsr(msr::IA32_VMX_CR0_FIXED0),
                    rdmsr(msr::IA32_VMX_CR0_FIXED1),
                ],
                cr4: [
                    rdmsr(msr::IA32_VMX_CR4_FIXED0),
                    rdmsr(msr::IA32_VMX_CR4_FIXED1),
                ],
                leaf7_edx: if __cpuid(0).eax >= 7 {
                    __cpuid_count(7, 0).edx
                } else {
                    0
                },
            }
        };
        VmxCaps::new(&raw)
    }

    /// Turns VMX operation on for the calling core (§24.7, §24.8).
    ///
    /// # Safety
    /// Runs in ring 0 of the hypervisor; the core stays its own until [`Vmx::disable`]. A task
    /// register with a TSS of this core's own is loaded: exits need it, and a vCPU knows by its
    /// address whether it came to another core.
    ///
    /// # Errors
    /// Which step failed.
    pub unsafe fn enable(caps: &VmxCaps, mut region: HostPage) -> Result<Self, VirtUnavailable> {
        let failed = |step| VirtUnavailable::EnableFailed {
            extension: Extension::Vmx,
            step,
        };
        // SAFETY: §24.7: the MSR exists, and is written only while it is not locked.
        unsafe {
            let value = rdmsr(msr::IA32_FEATURE_CONTROL);
            if feature_control(value)? {
                wrmsr(msr::IA32_FEATURE_CONTROL, value | 1 << 2 | 1);
                if feature_control(rdmsr(msr::IA32_FEATURE_CONTROL)) != Ok(false) {
                    return Err(failed(
                        "IA32_FEATURE_CONTROL (MSR 3ah) did not keep bits 2 and 0",
                    ));
                }
            }
        }
        let (mut cr0, mut cr4, tr): (u64, u64, u16);
        // SAFETY: reads in ring 0.
        unsafe {
            asm!("mov {}, cr0", "mov {}, cr4", "str {2:x}", out(reg) cr0, out(reg) cr4, out(reg) tr, options(nomem, nostack));
        }
        if tr == 0 {
            return Err(failed(
                "the core has no TSS in its task register (§27.2.3 wants one for exits)",
            ));
        }
        if cr4 & 1 << 13 != 0 {
            return Err(failed(
                "CR4.VMXE is set already: another hypervisor holds this core",
            ));
        }
        cr0 = (cr0 | caps.cr0[0]) & caps.cr0[1];
        cr4 = (cr4 | caps.cr4[0]) & caps.cr4[1];
        let revision = caps.revision.to_le_bytes();
        for (byte, value) in region.bytes_mut().iter_mut().zip(revision) {
            *byte = value;
        }
        // SAFETY: the fixed bits of CR0 and CR4 are those the manual asks for (NE and VMXE on the
        // machines we know); the region starts with the revision and is ours.
        unsafe {
            asm!("mov cr0, {}", "mov cr4, {}", in(reg) cr0, in(reg) cr4, options(nostack));
            if !vmcs::vmxon(region.phys()) {
                asm!("mov cr4, {}", in(reg) cr4 & !(1 << 13), options(nostack));
                return Err(failed(
                    "VMXON failed: the core is in VMX operation already, or refuses the VMXON region",
                ));
            }
            // Translations of an earlier user of VPIDs and EPT pointers must not come back.
            vmcs::invept(vmcs::Scope::All, 0);
            if caps.features.contains(Features::VPID) {
                vmcs::invvpid(vmcs::Scope::All, 0);
            }
        }
        Ok(Self { region })
    }

    /// Turns VMX operation off on the calling core and gives the page back.
    ///
    /// # Safety
    /// The core is the one that was enabled, and no vCPU is loaded on it.
    #[must_use]
    pub unsafe fn disable(self) -> HostPage {
        // SAFETY: the value proves that the core is in VMX operation; no VMCS is active.
        unsafe {
            vmcs::vmxoff();
            let cr4: u64;
            asm!("mov {}, cr4", out(reg) cr4, options(nomem, nostack));
            asm!("mov cr4, {}", in(reg) cr4 & !(1 << 13), options(nostack));
        }
        self.region
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A processor that has everything, with the default-1 bits of appendix A.2 already optional.
    const FULL: Raw = Raw {
        basic: 6 << 50 | 1 << 55 | 0x1234,
        pin: 0xff_0000_0016,
        primary: 0xfff9_fffe_0400_6172,
        secondary: 0x01ff_ffff_0000_0000,
        exit: 0x01ff_ffff_0003_6dfb,
        entry: 0x0003_ffff_0000_11fb,
        misc: 5,
        ept_vpid: 0xf01_0673_4141,
        cr0: [0x8000_0021, 0xffff_ffff],
        cr4: [0x2000, 0x0037_27ff],
        leaf7_edx: 1 << 26,
    };

    fn lacks(raw: &Raw) -> &'static str {
        match VmxCaps::new(raw) {
            Err(VirtUnavailable::MissingFeature { feature, .. }) => feature,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_full_processor_fits() {
        let caps = VmxCaps::new(&FULL).unwrap();
        assert_eq!(caps.features(), Features::all());
        assert_eq!((caps.revision, caps.timer_shift), (0x1234, 5));
        assert_eq!(
            caps.fix_cr0(0),
            0x20,
            "NE is fixed, PE and PG are the guest's"
        );
        assert_eq!(caps.fix_cr4(0), 0x2000);
    }

    #[test]
    fn what_is_missing_is_named() {
        let off = |bit: u32| !(1u64 << (bit + 32));
        for (raw, name) in [
            (
                Raw {
                    secondary: FULL.secondary & off(7),
                    ..FULL
                },
                "unrestricted guest",
            ),
            (
                Raw {
                    secondary: FULL.secondary & off(1),
                    ..FULL
                },
                "extended page tables",
            ),
            (
                Raw {
                    primary: FULL.primary & off(31),
                    ..FULL
                },
                "secondary controls",
            ),
            (
                Raw {
                    pin: FULL.pin & off(5),
                    ..FULL
                },
                "virtual NMIs",
            ),
            (
                Raw {
                    ept_vpid: FULL.ept_vpid & !(1 << 16),
                    ..FULL
                },
                "2 MiB EPT pages",
            ),
            (
                Raw {
                    exit: FULL.exit & off(20),
                    ..FULL
                },
                "saving IA32_EFER",
            ),
            (
                Raw {
                    primary: FULL.primary | 1 << 15,
                    ..FULL
                },
                "MOV to CR3",
            ),
        ] {
            assert!(lacks(&raw).contains(name), "{name}: {}", lacks(&raw));
        }
    }

    #[test]
    fn optional_features_are_left_out_where_missing() {
        let off = |bit: u32| !(1u64 << (bit + 32));
        let caps = VmxCaps::new(&Raw {
            pin: FULL.pin & off(6),
            ..FULL
        })
        .unwrap();
        assert!(!caps.features().contains(Features::PREEMPTION_TIMER));
        let caps = VmxCaps::new(&Raw {
            primary: FULL.primary & off(21),
            ..FULL
        })
        .unwrap();
        assert!(!caps.features().intersects(
            Features::TPR_SHADOW
                | Features::APIC_ACCESSES
                | Features::APIC_REGISTERS
                | Features::X2APIC
        ));
        let caps = VmxCaps::new(&FULL)
            .unwrap()
            .with_only(Features::APIC_REGISTERS);
        assert!(
            caps.features().is_empty(),
            "APIC virtualization stands on the TPR shadow"
        );
    }

    #[test]
    fn default_ones_are_kept_and_nothing_else_is_set() {
        let caps = VmxCaps::new(&FULL).unwrap();
        for (value, capability) in [
            (caps.pin, FULL.pin),
            (caps.primary, FULL.primary),
            (caps.secondary, FULL.secondary),
            (caps.exit, FULL.exit),
            (caps.entry, FULL.entry),
        ] {
            assert_eq!(
                u64::from(value) & (capability & 0xffff_ffff),
                capability & 0xffff_ffff
            );
            assert_eq!(u64::from(value) & !(capability >> 32), 0);
        }
        assert_eq!(
            caps.primary & (primary::INTERRUPT_WINDOW | primary::NMI_WINDOW),
            0
        );
        assert_eq!(caps.secondary & secondary::APIC_ACCESSES, 0);
        assert_ne!(
            caps.secondary & secondary::ENCLS_EXITING & secondary::XSAVES | secondary::XSAVES,
            0
        );
    }

    #[test]
    fn firmware_decides_once() {
        assert_eq!(feature_control(0), Ok(true));
        assert_eq!(feature_control(5), Ok(false));
        for locked_off in [1, 3] {
            assert!(matches!(
                feature_control(locked_off),
                Err(VirtUnavailable::DisabledByFirmware { msr: 0x3a, value, .. }) if value == locked_off
            ));
        }
    }
}
