//! AMD-V (SVM) behind [`arch::Vcpu`], by AMD APM Vol. 2 chapter 15.
//!
//! - [`caps`]: what the processor has, and turning it on and off on a core.
//! - [`vmcb`]: the control block's layout.
//! - [`bitmaps`]: which ports and MSRs leave the guest.
//! - [`entry`]: the world switch.
//! - [`exit`]: exit codes into [`arch::Exit`].
//! - [`vcpu`]: one virtual CPU.
//!
//! **Global interrupt flag.** GIF is 0 only inside [`entry`]: from CLGI before the guest's
//! FS, GS, TR and LDTR are loaded, through VMRUN and #VMEXIT (which clears it), to STGI after the
//! host's are back. Outside, the hypervisor runs as it does on VT-x: GIF 1 and RFLAGS.IF as the
//! run loop wants it. A host interrupt therefore only makes the guest leave
//! (`ExternalInterrupt(None)`); it is still pending then, and taken when the run loop enables
//! interrupts ([`crate::host::serve_interrupts`]). A host NMI or SMI that made the guest leave is taken
//! at the STGI, so that the NMI handler has run before [`arch::Vcpu::enter`] returns
//! [`arch::Exit::Nmi`].
//!
//! **Hypercalls.** VMMCALL leaves the guest; Intel's VMCALL is #UD in hardware on AMD, and stays
//! so: guests choose by CPUID or patch (Linux does), and intercepting #UD for it would slow and
//! blur every true #UD.

pub mod bitmaps;
pub mod caps;
pub mod entry;
pub mod exit;
pub mod vcpu;
pub mod vmcb;

pub use bitmaps::SvmBitmaps;
pub use caps::{Svm, SvmCaps, SvmFeatures};
pub use vcpu::{SvmConfig, SvmVcpu};

/// Why a piece of the backend could not be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SvmError {
    /// Pages that the hardware reads as one run do not follow each other.
    #[error("{what} must lie in consecutive pages, but {after} follows {page}")]
    NotContiguous {
        /// What the pages are for.
        what: &'static str,
        /// A page of the run.
        page: arch::HostPhysAddr,
        /// The one given as the next.
        after: arch::HostPhysAddr,
    },
    /// The address-space identifier is 0 (the host's) or beyond what the processor has.
    #[error("ASID {asked} cannot be a guest's: this processor has 1 to {highest}")]
    Asid {
        /// What was asked for.
        asked: u32,
        /// The highest there is.
        highest: u32,
    },
}

/// Checks that `pages` follow each other in physical memory.
fn contiguous(what: &'static str, pages: &[crate::page::HostPage]) -> Result<(), SvmError> {
    for (page, after) in pages.iter().zip(pages.iter().skip(1)) {
        let (page, after) = (page.phys(), after.phys());
        if page.checked_add(arch::PAGE_SIZE) != Some(after) {
            return Err(SvmError::NotContiguous { what, page, after });
        }
    }
    Ok(())
}
