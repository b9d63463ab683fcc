//! What the processor's SVM can do, and turning it on and off (AMD APM Vol. 2 §15.4, §15.30,
//! Vol. 3 appendix E, function 8000_000AH).

use crate::page::HostPage;
use crate::percpu::this;
use crate::virt::{Extension, VirtUnavailable};
use arch::HostPhysAddr;
use arch::msr::IA32_EFER;
use bitflags::bitflags;
use core::arch::x86_64::{__cpuid_count, CpuidResult};
use core::sync::atomic::Ordering;
use x86_64::registers::model_specific::Msr;

const EFER_SVME: u64 = 1 << 12;
/// VM_CR (§15.30.1): LOCK makes SVMDIS read-only; SVMDIS keeps EFER.SVME at 0.
const VM_CR: u32 = 0xc001_0114;
const VM_CR_LOCK: u64 = 1 << 3;
const VM_CR_SVMDIS: u64 = 1 << 4;
/// Where VMRUN puts the host's state (§15.30.4). It also tells cores apart: see [`Svm`].
pub(super) const VM_HSAVE_PA: u32 = 0xc001_0117;

bitflags! {
    /// What there may be beyond the base of SVM: bits 31:0 are CPUID Fn8000_000A_EDX; those above
    /// gather what this backend asks of other leaves.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct SvmFeatures: u64 {
        /// Nested paging.
        const NESTED_PAGING = 1 << 0;
        /// Last-branch and DBGCTL virtualization.
        const LBR = 1 << 1;
        /// VM_CR.LOCK and the SVM key exist.
        const LOCK = 1 << 2;
        /// The next instruction's address is saved on instruction intercepts.
        const NEXT_RIP = 1 << 3;
        /// TSC ratio MSR.
        const TSC_RATIO = 1 << 4;
        /// Clean bits.
        const CLEAN_BITS = 1 << 5;
        /// TLB flush of one ASID.
        const FLUSH_BY_ASID = 1 << 6;
        /// Operands of MOV CR/DR, INVLPG, and instruction bytes at nested faults.
        const DECODE_ASSISTS = 1 << 7;
        /// PAUSE counted before it exits.
        const PAUSE_FILTER = 1 << 10;
        /// PAUSE counted only in tight loops.
        const PAUSE_THRESHOLD = 1 << 12;
        /// Interrupt-controller virtualization (found, not used: the local APIC is `machine`'s).
        const AVIC = 1 << 13;
        /// VMLOAD and VMSAVE by a nested hypervisor (found, not used).
        const VIRTUAL_VMLOAD = 1 << 15;
        /// The guest's GIF is apart from the machine's.
        const VGIF = 1 << 16;
        /// x2APIC mode of AVIC (found, not used).
        const X2AVIC = 1 << 18;
        /// SPEC_CTRL of the guest is apart from the host's.
        const VIRTUAL_SPEC_CTRL = 1 << 20;
        /// NMIs of the guest, with their blocking, are delivered by the hardware.
        const VNMI = 1 << 25;
        /// TSC_AUX exists (RDTSCP or RDPID).
        const TSC_AUX = 1 << 32;
        /// INVLPGB and TLBSYNC exist.
        const INVLPGB = 1 << 33;
        /// RDPRU exists.
        const RDPRU = 1 << 34;
        /// MCOMMIT exists.
        const MCOMMIT = 1 << 35;
        /// PRED_CMD.IBPB exists.
        const IBPB = 1 << 36;
    }
}

/// What the processor's SVM can do. The same on every core.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SvmCaps {
    /// SVM revision, 1 at this writing.
    pub revision: u8,
    /// How many ASIDs there are: a guest's is 1 to `asids` − 1.
    pub asids: u32,
    /// What there is beyond the base.
    pub features: SvmFeatures,
}

impl SvmCaps {
    /// Reads the capabilities out of CPUID; `None` where there is no SVM at all.
    ///
    /// # Errors
    /// [`VirtUnavailable::MissingFeature`] without nested paging, or without a guest's ASID.
    pub fn from_cpuid(
        cpuid: impl Fn(u32, u32) -> CpuidResult,
    ) -> Result<Option<Self>, VirtUnavailable> {
        let highest = cpuid(0x8000_0000, 0).eax;
        if highest < 0x8000_000a || cpuid(0x8000_0001, 0).ecx & 1 << 2 == 0 {
            return Ok(None);
        }
        let svm = cpuid(0x8000_000a, 0);
        let mut features = SvmFeatures::from_bits_retain(svm.edx.into());
        let rdpid = cpuid(0, 0).eax >= 7 && cpuid(7, 0).ecx & 1 << 22 != 0;
        let rdtscp = cpuid(0x8000_0001, 0).edx & 1 << 27 != 0;
        features.set(SvmFeatures::TSC_AUX, rdpid || rdtscp);
        // Leaf 8000_0008 is below 8000_000A, so it exists.
        let extended = cpuid(0x8000_0008, 0).ebx;
        for (bit, feature) in [
            (3, SvmFeatures::INVLPGB),
            (4, SvmFeatures::RDPRU),
            (8, SvmFeatures::MCOMMIT),
            (12, SvmFeatures::IBPB),
        ] {
            features.set(feature, extended & 1 << bit != 0);
        }
        let missing = |feature| VirtUnavailable::MissingFeature {
            extension: Extension::Svm,
            feature,
        };
        if !features.contains(SvmFeatures::NESTED_PAGING) {
            return Err(missing("nested paging (CPUID 8000_000Ah: EDX bit 0)"));
        }
        if svm.ebx < 2 {
            return Err(missing(
                "an ASID for guests (CPUID 8000_000Ah: EBX above 1)",
            ));
        }
        Ok(Some(Self {
            revision: svm.eax as u8,
            asids: svm.ebx,
            features,
        }))
    }

    /// Whether the processor has `feature`.
    #[must_use]
    pub const fn has(&self, feature: SvmFeatures) -> bool {
        self.features.contains(feature)
    }
}

/// SVM turned on on one core: holds the page VMRUN saves the host's state to, and the one that
/// VMSAVE puts the host's FS, GS, TR, LDTR, KernelGSBase, STAR and SYSENTER state into.
///
/// A vCPU that is loaded finds the second by the core's own data, and knows by VM_HSAVE_PA on which
/// core it is; that is 0 exactly while SVM is off.
#[derive(Debug)]
pub struct Svm {
    pages: [HostPage; 2],
}

impl Svm {
    /// Asks the processor and its firmware whether SVM can be used, by the steps of §15.4.
    ///
    /// # Errors
    /// There is none, firmware locked it off, or it lacks what Tessera needs.
    pub fn detect() -> Result<SvmCaps, VirtUnavailable> {
        let caps = SvmCaps::from_cpuid(__cpuid_count)?.ok_or(VirtUnavailable::NotSupported)?;
        // SAFETY: VM_CR exists where CPUID says SVM.
        let value = unsafe { Msr::new(VM_CR).read() };
        check_vm_cr(value)?;
        Ok(caps)
    }

    /// Turns SVM on on the calling core.
    ///
    /// # Errors
    /// [`VirtUnavailable::EnableFailed`] when SVM is on already, or when the processor does not take
    /// EFER.SVME.
    ///
    /// # Safety
    /// The core is in ring 0 of the hypervisor, and the returned value stays with it (its drop
    /// without [`Svm::disable`] leaks the pages, on purpose).
    pub unsafe fn enable(caps: &SvmCaps, pages: [HostPage; 2]) -> Result<Self, VirtUnavailable> {
        let failed = |step| VirtUnavailable::EnableFailed {
            extension: Extension::Svm,
            step,
        };
        // SAFETY: these MSRs exist where CPUID says SVM (`caps` is the proof); setting SVME only
        // makes more instructions valid, and HSAVE_PA names a page that is ours.
        unsafe {
            let vm_cr = Msr::new(VM_CR).read();
            if vm_cr & VM_CR_SVMDIS != 0 {
                if vm_cr & VM_CR_LOCK != 0 || !caps.has(SvmFeatures::LOCK) {
                    return Err(failed("VM_CR.SVMDIS is set on this core, and locked"));
                }
                Msr::new(VM_CR).write(vm_cr & !VM_CR_SVMDIS);
            }
            if Msr::new(IA32_EFER).read() & EFER_SVME != 0 {
                return Err(failed("EFER.SVME is set already: another hypervisor runs"));
            }
            Msr::new(IA32_EFER).write(Msr::new(IA32_EFER).read() | EFER_SVME);
            if Msr::new(IA32_EFER).read() & EFER_SVME == 0 {
                return Err(failed("EFER.SVME stays 0"));
            }
            let [save, host] = &pages;
            this()
                .host_save
                .store(host.phys().as_u64(), Ordering::Relaxed);
            Msr::new(VM_HSAVE_PA).write(save.phys().as_u64());
        }
        Ok(Self { pages })
    }

    /// Turns SVM off on the calling core and gives its pages back.
    ///
    /// # Safety
    /// The calling core is the one that [`Svm::enable`] ran on, and no vCPU is loaded on it.
    #[must_use]
    pub unsafe fn disable(self) -> [HostPhysAddr; 2] {
        // SAFETY: the core's SVM is on (`self` is the proof); no guest state is on it, so nothing
        // needs the save area or the instructions any more.
        unsafe {
            Msr::new(VM_HSAVE_PA).write(0);
            Msr::new(IA32_EFER).write(Msr::new(IA32_EFER).read() & !EFER_SVME);
        }
        self.pages.map(HostPage::into_phys)
    }
}

fn check_vm_cr(value: u64) -> Result<(), VirtUnavailable> {
    if value & VM_CR_SVMDIS != 0 && value & VM_CR_LOCK != 0 {
        return Err(VirtUnavailable::DisabledByFirmware {
            extension: Extension::Svm,
            name: "VM_CR",
            msr: VM_CR,
            value,
            remedy: "turn on \"SVM Mode\" (also \"AMD-V\", \"Virtualization\") in the firmware setup \
                     and power-cycle the machine",
        });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// CPUID of QEMU 7.2's `-cpu max,+svm,+npt`, as far as it is asked.
    fn qemu(edx: u32) -> impl Fn(u32, u32) -> CpuidResult {
        move |leaf, _| {
            let (eax, ebx, ecx, edx) = match leaf {
                0 => (0xd, 0, 0, 0),
                0x8000_0000 => (0x8000_000a, 0, 0, 0),
                0x8000_0001 => (0, 0, 1 << 2, 1 << 27),
                0x8000_000a => (1, 16, 0, edx),
                _ => (0, 0, 0, 0),
            };
            CpuidResult { eax, ebx, ecx, edx }
        }
    }

    #[test]
    fn qemu_has_nested_paging_and_vgif() {
        let caps = SvmCaps::from_cpuid(qemu(1 << 0 | 1 << 16 | 1 << 28));
        let caps = caps.expect("usable").expect("there");
        assert_eq!((caps.revision, caps.asids), (1, 16));
        assert!(caps.has(SvmFeatures::VGIF | SvmFeatures::TSC_AUX));
        assert!(!caps.has(SvmFeatures::NEXT_RIP) && !caps.has(SvmFeatures::IBPB));
    }

    #[test]
    fn nested_paging_is_needed() {
        assert!(matches!(
            SvmCaps::from_cpuid(qemu(1 << 16)),
            Err(VirtUnavailable::MissingFeature {
                extension: Extension::Svm,
                ..
            })
        ));
    }

    #[test]
    fn an_intel_processor_has_none() {
        let intel = |leaf, _| CpuidResult {
            eax: if leaf == 0x8000_0000 { 0x8000_0008 } else { 0 },
            ebx: 0,
            ecx: 0,
            edx: 0,
        };
        assert_eq!(SvmCaps::from_cpuid(intel), Ok(None));
    }

    #[test]
    fn only_a_locked_switch_is_final() {
        assert!(check_vm_cr(0).is_ok());
        assert!(check_vm_cr(VM_CR_LOCK).is_ok());
        assert!(check_vm_cr(VM_CR_SVMDIS).is_ok());
        assert!(matches!(
            check_vm_cr(VM_CR_SVMDIS | VM_CR_LOCK),
            Err(VirtUnavailable::DisabledByFirmware {
                msr: 0xc001_0114,
                value: 0x18,
                ..
            })
        ));
    }
}
