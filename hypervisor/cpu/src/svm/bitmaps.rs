//! Which ports and MSRs leave the guest (AMD APM Vol. 2 §15.10.1, §15.11).
//!
//! Every port does: the virtual PC owns them all. Of the MSRs, only those pass that VMLOAD and
//! VMSAVE switch, and TSC_AUX, which a loaded vCPU has in the register; none of them has a value
//! that a guest could hurt the host with, since the host's own are put back at each exit (and the
//! hypervisor does not use TSC_AUX). The maps are the same for all guests: one set for the machine.

use super::{SvmCaps, SvmError, SvmFeatures, contiguous};
use crate::page::HostPage;
use arch::{HostPhysAddr, msr};

/// MSRs that a guest reads and writes without leaving. EFER and PAT are not among them: EFER
/// holds SVME, and PAT's guest value is in the VMCB only.
const PASSED: [u32; 10] = [
    msr::IA32_STAR,
    msr::IA32_LSTAR,
    msr::IA32_CSTAR,
    msr::IA32_FMASK,
    msr::IA32_FS_BASE,
    msr::IA32_GS_BASE,
    msr::IA32_KERNEL_GS_BASE,
    msr::IA32_SYSENTER_CS,
    msr::IA32_SYSENTER_ESP,
    msr::IA32_SYSENTER_EIP,
];

/// The I/O and MSR permission maps, filled.
#[derive(Debug)]
pub struct SvmBitmaps {
    iopm: [HostPage; 3],
    msrpm: [HostPage; 2],
}

impl SvmBitmaps {
    /// Fills the maps. The pages of each must follow each other in physical memory.
    ///
    /// # Errors
    /// [`SvmError::NotContiguous`] when they do not.
    pub fn new(
        caps: &SvmCaps,
        mut iopm: [HostPage; 3],
        mut msrpm: [HostPage; 2],
    ) -> Result<Self, SvmError> {
        contiguous("I/O permission map", &iopm)?;
        contiguous("MSR permission map", &msrpm)?;
        for page in iopm.iter_mut().chain(&mut msrpm) {
            page.bytes_mut().fill(0xff);
        }
        let aux = (msr::IA32_TSC_AUX, SvmFeatures::TSC_AUX);
        let spec = (msr::IA32_SPEC_CTRL, SvmFeatures::VIRTUAL_SPEC_CTRL);
        let by_feature = [aux, spec]
            .into_iter()
            .filter(|(_, feature)| caps.has(*feature));
        for index in PASSED.into_iter().chain(by_feature.map(|(index, _)| index)) {
            if let Some((page, byte, shift)) = position(index)
                && let Some(slot) = msrpm
                    .get_mut(page)
                    .and_then(|p| p.bytes_mut().get_mut(byte))
            {
                *slot &= !(3 << shift);
            }
        }
        Ok(Self { iopm, msrpm })
    }

    /// For IOPM_BASE_PA.
    #[must_use]
    pub const fn iopm(&self) -> HostPhysAddr {
        self.iopm[0].phys()
    }

    /// For MSRPM_BASE_PA.
    #[must_use]
    pub const fn msrpm(&self) -> HostPhysAddr {
        self.msrpm[0].phys()
    }
}

/// Page, byte, and bit of the two bits (read, write) of an MSR; `None` for one outside the three
/// ranges of the map, which always leaves the guest.
const fn position(index: u32) -> Option<(usize, usize, u32)> {
    let range = match index & !0x1fff {
        0 => 0,
        0xc000_0000 => 0x800,
        0xc001_0000 => 0x1000,
        _ => return None,
    };
    let byte = range + (index as usize & 0x1fff) / 4;
    Some((byte / HostPage::SIZE, byte % HostPage::SIZE, index % 4 * 2))
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use alloc::{boxed::Box, vec::Vec};
    use core::ptr::NonNull;

    /// Five pages in one run, with addresses in place of physical ones.
    fn pages() -> ([HostPage; 3], [HostPage; 2]) {
        #[repr(align(4096))]
        struct Run(#[allow(dead_code)] [u8; 5 * 4096]);
        let base = NonNull::from(Box::leak(Box::new(Run([0; 5 * 4096])))).cast::<u8>();
        let page = |i: usize| {
            // SAFETY: inside the leaked run, page-aligned, each page taken once.
            unsafe {
                let at = base.add(i * 4096);
                HostPage::new(HostPhysAddr::new(at.as_ptr() as u64), at)
            }
        };
        ([page(0), page(1), page(2)], [page(3), page(4)])
    }

    /// A set of maps that is never given back.
    pub fn maps(caps: &SvmCaps) -> SvmBitmaps {
        let (iopm, msrpm) = pages();
        SvmBitmaps::new(caps, iopm, msrpm).expect("a run")
    }

    const CAPS: SvmCaps = SvmCaps {
        revision: 1,
        asids: 16,
        features: SvmFeatures::NESTED_PAGING.union(SvmFeatures::TSC_AUX),
    };

    #[test]
    fn only_switched_msrs_pass() {
        let mut maps = maps(&CAPS);
        assert!(
            maps.iopm
                .iter_mut()
                .all(|p| p.bytes_mut().iter().all(|b| *b == 0xff))
        );
        let bytes: Vec<u8> = maps.msrpm.iter_mut().flat_map(|p| *p.bytes_mut()).collect();
        for (base, at) in [(0, 0), (0xc000_0000, 0x800), (0xc001_0000, 0x1000u32)] {
            for low in 0..0x2000 {
                let bits = bytes[(at + low / 4) as usize] >> (low % 4 * 2) & 3;
                let index = base + low;
                let passes = PASSED.contains(&index) || index == msr::IA32_TSC_AUX;
                assert_eq!(bits, if passes { 0 } else { 3 }, "{index:#x}");
            }
        }
        assert!(bytes[0x1800..].iter().all(|b| *b == 0xff));
    }

    #[test]
    fn pages_apart_are_refused() {
        let ([a, b, c], msrpm) = pages();
        assert!(matches!(
            SvmBitmaps::new(&CAPS, [a, c, b], msrpm),
            Err(SvmError::NotContiguous {
                what: "I/O permission map",
                ..
            })
        ));
    }

    #[test]
    fn msrs_outside_the_map() {
        assert_eq!(position(0x4000_0000), None);
        assert_eq!(position(0xc001_1fff), Some((1, 0x7ff, 6)));
    }
}
