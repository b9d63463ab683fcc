//! What the processor must have before the kernel's page tables can be used.
//! The features are those of Intel SDM Vol. 2A, CPUID, leaves 8000_0001H and
//! 8000_0008H, and AMD APM Vol. 3, appendix E.

use crate::{DIRECT_MAP_LIMIT, Error};
use core::arch::x86_64::__cpuid;

/// CR4.LA57: 5-level paging is on.
const CR4_LA57: u64 = 1 << 12;

/// The features of this processor that page tables depend on.
#[derive(Clone, Copy, Debug)]
pub struct Cpu {
    /// 1 GiB pages may be used.
    pub gib_pages: bool,
    /// No physical address reaches this one.
    pub physical_limit: u64,
}

impl Cpu {
    /// Looks at the processor this runs on.
    ///
    /// # Errors
    /// When it has no NX bit, or runs with 5-level paging.
    pub fn probe() -> Result<Self, Error> {
        let highest = __cpuid(0x8000_0000).eax;
        let features = if highest >= 0x8000_0001 {
            __cpuid(0x8000_0001).edx
        } else {
            0
        };
        if features & 1 << 20 == 0 {
            return Err(Error::Processor {
                missing: "no-execute bit (NX)",
                remedy: "turn on \"NX\", \"XD\" or \"Execute Disable\" in the firmware's setup",
            });
        }
        let cr4: u64;
        // SAFETY: reading CR4 changes nothing; both loaders run in ring 0.
        unsafe {
            core::arch::asm!("mov {}, cr4", out(reg) cr4, options(nomem, nostack, preserves_flags));
        }
        if cr4 & CR4_LA57 != 0 {
            return Err(Error::FiveLevelPaging);
        }
        let width = if highest >= 0x8000_0008 {
            (__cpuid(0x8000_0008).eax & 0xff).clamp(32, 52)
        } else {
            36
        };
        Ok(Self {
            gib_pages: features & 1 << 26 != 0,
            physical_limit: (1 << width).min(DIRECT_MAP_LIMIT),
        })
    }
}
