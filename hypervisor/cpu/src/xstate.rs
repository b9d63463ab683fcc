//! x87, SSE, AVX and what else XSAVE manages (Intel SDM Vol. 1 ch. 13, AMD APM Vol. 2 §11.5).
//!
//! The hypervisor is compiled without floating point, so a guest's extended state stays in the
//! registers from the moment its vCPU is loaded on a core until it is unloaded: exits never touch
//! it. Only a change of vCPU moves it, in the standard format, which every processor writes alike
//! (a saved state can go to another machine).

use alloc::boxed::Box;
use alloc::vec;
use alloc::vec::Vec;
use core::arch::asm;
use core::arch::x86_64::{__cpuid, __cpuid_count};

/// XCR0: x87.
pub const X87: u64 = 1 << 0;
/// XCR0: XMM registers and MXCSR.
pub const SSE: u64 = 1 << 1;
/// XCR0: upper halves of the YMM registers.
pub const AVX: u64 = 1 << 2;
/// XCR0: opmask, upper halves of ZMM0–15, ZMM16–31.
pub const AVX512: u64 = 7 << 5;
/// XCR0: PKRU.
pub const PKRU: u64 = 1 << 9;
/// The components this hypervisor knows to carry. AMX (lazily sized, XFD), MPX (withdrawn) and
/// all supervisor components are left out.
pub const KNOWN: u64 = X87 | SSE | AVX | AVX512 | PKRU;

/// The legacy region and the header, without which no XSAVE area exists (Vol. 1 §13.4).
const LEGACY_AND_HEADER: usize = 576;
const FCW: usize = 0;
const FTW: usize = 4;
const MXCSR: usize = 24;
const XSTATE_BV: usize = 512;

/// Which instruction moves the state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Method {
    Fxsave,
    Xsave,
    Xsaveopt,
}

/// What extended state the machine has, and how it is moved. The same on every core.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct XStateCaps {
    mask: u64,
    size: usize,
    method: Method,
    compacts: bool,
}

impl XStateCaps {
    /// Asks the processor, within `allowed` (bits of XCR0; [`KNOWN`] for all that can be).
    #[must_use]
    pub fn detect(allowed: u64) -> Self {
        if __cpuid(1).ecx & 1 << 26 == 0 || __cpuid(0).eax < 0xd {
            return Self {
                mask: X87 | SSE,
                size: LEGACY_AND_HEADER,
                method: Method::Fxsave,
                compacts: false,
            };
        }
        let leaf = __cpuid_count(0xd, 0);
        let supported = u64::from(leaf.edx) << 32 | u64::from(leaf.eax);
        let mask = legal(supported & allowed);
        // Subleaf i: EAX is the size, EBX the offset of component i (Vol. 1 §13.2).
        let size = (2..63)
            .filter(|bit| mask & 1 << bit != 0)
            .map(|bit| __cpuid_count(0xd, bit))
            .map(|leaf| leaf.ebx as usize + leaf.eax as usize)
            .fold(LEGACY_AND_HEADER, usize::max);
        let ways = __cpuid_count(0xd, 1).eax;
        let method = if ways & 1 != 0 {
            Method::Xsaveopt
        } else {
            Method::Xsave
        };
        Self {
            mask,
            size,
            method,
            compacts: ways & 1 << 1 != 0,
        }
    }

    /// The bits of XCR0 that a guest may set.
    #[must_use]
    pub const fn mask(&self) -> u64 {
        self.mask
    }

    /// Whether the machine has XSAVE at all; without it a guest must not see it.
    #[must_use]
    pub fn has_xsave(&self) -> bool {
        self.method != Method::Fxsave
    }

    /// Whether guests may save state in the compacted format, by XSAVEC and XSAVES: the processor
    /// has them, and has not been found wrong.
    #[must_use]
    pub const fn compacts(&self) -> bool {
        self.compacts
    }

    /// The processor has XSAVEC, and it was found wrong.
    #[must_use]
    pub fn compacts_wrong(&self) -> bool {
        self.has_xsave() && !self.compacts && __cpuid_count(0xd, 1).eax & 1 << 1 != 0
    }

    /// Makes the calling core ready to move extended state: CR0.TS and EM off, CR4.OSFXSR and
    /// OSXSAVE on. Then it sees for itself whether XSAVEC can be relied on: that of Bochs 2.7 puts
    /// components 160 bytes before the place that XRSTOR takes them from, and programs in guests
    /// lose vector registers.
    ///
    /// # Safety
    /// The core is in ring 0 of the hypervisor, whose code uses no extended state, and has that of
    /// no guest.
    pub unsafe fn enable(&mut self) {
        let (mut cr0, mut cr4): (u64, u64);
        // SAFETY: reads of control registers in ring 0.
        unsafe {
            asm!("mov {}, cr0", "mov {}, cr4", out(reg) cr0, out(reg) cr4, options(nomem, nostack))
        };
        // EM (2) and TS (3) make every FXSAVE and XSAVE fault; MP (1) and NE (5) belong with them.
        cr0 = cr0 & !(1 << 2 | 1 << 3) | 1 << 1 | 1 << 5;
        cr4 |= 1 << 9 | 1 << 10;
        if self.has_xsave() {
            cr4 |= 1 << 18;
        }
        // SAFETY: these bits only decide which instructions of extended state work.
        unsafe {
            asm!("mov cr0, {}", "mov cr4, {}", in(reg) cr0, in(reg) cr4, options(nomem, nostack))
        };
        if self.compacts {
            // SAFETY: the core was just made ready, and has the state of no guest.
            self.compacts = unsafe { self.compaction_holds() };
        }
    }

    /// Whether XSAVEC lays components out one after the other from byte 576 on, each at a multiple
    /// of 64 if CPUID asks for that (Vol. 1 §13.4.3).
    ///
    /// # Safety
    /// As for [`XState::save`]; registers and XCR0 are as after power-up then.
    unsafe fn compaction_holds(&self) -> bool {
        let mut places = Vec::new();
        let mut end = LEGACY_AND_HEADER;
        for bit in (2..63).filter(|bit| self.mask & 1 << bit != 0) {
            let leaf = __cpuid_count(0xd, bit);
            let aligned = if leaf.ecx & 1 << 1 != 0 { 64 } else { 1 };
            let (length, from) = (leaf.eax as usize, leaf.ebx as usize);
            let to = end.next_multiple_of(aligned);
            end = to + length;
            // Of PKRU's eight bytes half are reserved.
            places.push((
                from,
                to,
                length.min(if 1 << bit == PKRU { 4 } else { length }),
            ));
        }
        let lines = self.size.max(end).div_ceil(64);
        let mut standard = XState {
            area: vec![Line([0; 64]); lines].into_boxed_slice(),
            caps: *self,
            xcr0: self.mask,
        };
        standard.reset();
        let mut compacted = standard.area.clone();
        for (from, _, length) in &places {
            (*from..from + length).for_each(|at| standard.put(at, &[mark(at - from)]));
        }
        standard.put(XSTATE_BV, &(self.mask & !(X87 | SSE)).to_le_bytes());
        // SAFETY: by the contract; both areas have room for all components in either format.
        unsafe {
            standard.restore();
            xsetbv(self.mask);
            asm!("xsavec64 [{}]", in(reg) compacted.as_mut_ptr(), in("eax") u32::MAX, in("edx") u32::MAX, options(nostack));
            standard.reset();
            standard.restore();
        }
        let bytes = || compacted.iter().flat_map(|line| line.0);
        places.iter().all(|(_, to, length)| {
            let found = bytes().skip(*to).take(*length);
            found.eq((0..*length).map(mark))
        })
    }
}

/// What [`XStateCaps::compaction_holds`] has at this place of a component: never zero.
const fn mark(at: usize) -> u8 {
    (at % 251) as u8 | 1
}

/// `wanted` without what XSETBV would refuse for want of something else (Vol. 1 §13.3): AVX needs
/// SSE, AVX-512 comes whole and needs AVX; x87 is always there.
const fn legal(wanted: u64) -> u64 {
    let mut mask = wanted | X87;
    if mask & SSE == 0 {
        mask &= !AVX;
    }
    if mask & AVX == 0 || mask & AVX512 != AVX512 {
        mask &= !AVX512;
    }
    mask
}

#[derive(Clone)]
#[repr(C, align(64))]
struct Line([u8; 64]);

/// The extended state of one vCPU while it is on no core, and its XCR0.
pub struct XState {
    area: Box<[Line]>,
    caps: XStateCaps,
    xcr0: u64,
}

impl XState {
    /// The state after power-up.
    #[must_use]
    pub fn new(caps: &XStateCaps) -> Self {
        let mut state = Self {
            area: vec![Line([0; 64]); caps.size.div_ceil(64)].into_boxed_slice(),
            caps: *caps,
            xcr0: X87,
        };
        state.reset();
        state
    }

    /// Puts the saved state into that after power-up (Intel SDM Vol. 3A table 9-1): x87 control
    /// word 40h, all registers +0.0 and valid, MXCSR 1F80h, XCR0 1.
    pub fn reset(&mut self) {
        self.area.fill(Line([0; 64]));
        self.xcr0 = X87;
        self.put(FCW, &0x40u16.to_le_bytes());
        // The abridged tag word of FXSAVE has a one for each register that is not empty.
        self.put(FTW, &[0xff]);
        self.put(MXCSR, &0x1f80u32.to_le_bytes());
        self.put(XSTATE_BV, &X87.to_le_bytes());
    }

    fn put(&mut self, offset: usize, bytes: &[u8]) {
        let at = offset % 64;
        if let Some(slot) = self
            .area
            .get_mut(offset / 64)
            .and_then(|line| line.0.get_mut(at..at + bytes.len()))
        {
            slot.copy_from_slice(bytes);
        }
    }

    /// XCR0 as the guest set it.
    #[must_use]
    pub const fn xcr0(&self) -> u64 {
        self.xcr0
    }

    /// Sets XCR0 (checked by the caller; what the machine or the configuration does not allow is
    /// left out), also in the register when the state is on the calling core.
    ///
    /// # Safety
    /// As for [`XState::restore`] when `on_core`.
    pub unsafe fn set_xcr0(&mut self, value: u64, on_core: bool) {
        self.xcr0 = legal(value & self.caps.mask);
        if on_core && self.caps.has_xsave() {
            // SAFETY: a legal subset of what the processor supports.
            unsafe { xsetbv(self.xcr0) };
        }
    }

    /// Saves the core's registers here. All components are saved, also those that the guest's
    /// XCR0 hides at the moment: they keep their values.
    ///
    /// # Safety
    /// The calling core was made ready by [`XStateCaps::enable`], and no code of the hypervisor
    /// keeps anything in extended registers (it is compiled without).
    pub unsafe fn save(&mut self) {
        let area = self.area.as_mut_ptr();
        if self.caps.has_xsave() && self.xcr0 != self.caps.mask {
            // SAFETY: `mask` is what the processor supports, made legal.
            unsafe { xsetbv(self.caps.mask) };
        }
        // SAFETY: the area is aligned to 64 bytes and as long as the components of `mask` need.
        unsafe {
            match self.caps.method {
                Method::Fxsave => asm!("fxsave64 [{}]", in(reg) area, options(nostack)),
                Method::Xsave => {
                    asm!("xsave64 [{}]", in(reg) area, in("eax") u32::MAX, in("edx") u32::MAX, options(nostack));
                }
                Method::Xsaveopt => {
                    asm!("xsaveopt64 [{}]", in(reg) area, in("eax") u32::MAX, in("edx") u32::MAX, options(nostack));
                }
            }
        }
    }

    /// Puts this state and the guest's XCR0 into the core's registers.
    ///
    /// # Safety
    /// As for [`XState::save`].
    pub unsafe fn restore(&self) {
        let area = self.area.as_ptr();
        // SAFETY: `mask` is legal; the area was filled by `reset` or `save`, so that its header
        // and MXCSR are valid.
        unsafe {
            if self.caps.has_xsave() {
                xsetbv(self.caps.mask);
                asm!("xrstor64 [{}]", in(reg) area, in("eax") u32::MAX, in("edx") u32::MAX, options(nostack, readonly));
                if self.xcr0 != self.caps.mask {
                    xsetbv(self.xcr0);
                }
            } else {
                asm!("fxrstor64 [{}]", in(reg) area, options(nostack, readonly));
            }
        }
    }
}

/// # Safety
/// `value` is a legal XCR0 of this processor, and CR4.OSXSAVE is set.
unsafe fn xsetbv(value: u64) {
    // SAFETY: by the contract above.
    unsafe {
        asm!("xsetbv", in("ecx") 0, in("eax") value as u32, in("edx") (value >> 32) as u32, options(nomem, nostack));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn xcr0_is_kept_legal() {
        for (wanted, legal_mask) in [
            (0, X87),
            (X87 | AVX, X87),
            (X87 | SSE | AVX, X87 | SSE | AVX),
            (X87 | SSE | AVX512, X87 | SSE),
            (X87 | SSE | AVX | 1 << 5, X87 | SSE | AVX),
            (KNOWN, KNOWN),
        ] {
            assert_eq!(legal(wanted), legal_mask, "{wanted:#x}");
        }
    }

    #[test]
    fn power_up_state_is_the_manuals() {
        let state = XState::new(&XStateCaps::detect(KNOWN));
        let byte = |offset: usize| state.area[offset / 64].0[offset % 64];
        assert_eq!((byte(0), byte(1), byte(4)), (0x40, 0, 0xff));
        assert_eq!((byte(24), byte(25)), (0x80, 0x1f));
        assert_eq!(byte(512), 1);
        assert_eq!(state.xcr0(), 1);
        assert_eq!(state.area.as_ptr() as usize % 64, 0);
    }

    #[test]
    fn the_area_holds_every_allowed_component() {
        let all = XStateCaps::detect(KNOWN);
        let few = XStateCaps::detect(X87 | SSE);
        assert!(all.size >= few.size && few.size == LEGACY_AND_HEADER);
        assert_eq!(few.mask & !(X87 | SSE), 0);
    }
}
