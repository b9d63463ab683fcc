//! The instructions of VMX (Intel SDM Vol. 3C ch. 31), one function each.
//!
//! VMREAD and VMWRITE on the exit path do not look at the flags: they fail only for a field that
//! the processor lacks, and fields of optional features are touched only where the feature is on.

use arch::HostPhysAddr;
use core::arch::asm;

/// How many VMREADs and VMWRITEs were made, where the build counts them: the second figure of
/// the exit bench.
#[cfg(feature = "count-vmcs")]
pub mod count {
    use core::sync::atomic::AtomicU64;
    /// VMREADs since boot, on all cores.
    pub static READS: AtomicU64 = AtomicU64::new(0);
    /// VMWRITEs since boot, on all cores.
    pub static WRITES: AtomicU64 = AtomicU64::new(0);
}

/// Reads a field of the current VMCS.
///
/// # Safety
/// The core is in VMX operation with a current VMCS, and the processor has the field.
#[inline(always)]
pub unsafe fn vmread(field: u32) -> u64 {
    #[cfg(feature = "count-vmcs")]
    count::READS.fetch_add(1, core::sync::atomic::Ordering::Relaxed);
    let value;
    // SAFETY: by the contract above; the instruction changes nothing but its operand.
    unsafe {
        asm!("vmread {}, {}", out(reg) value, in(reg) u64::from(field), options(nomem, nostack));
    }
    value
}

/// Writes a field of the current VMCS.
///
/// # Safety
/// As for [`vmread`]; and the value keeps the hypervisor safe after the next exit, or the machine
/// safe from the guest.
#[inline(always)]
pub unsafe fn vmwrite(field: u32, value: u64) {
    #[cfg(feature = "count-vmcs")]
    count::WRITES.fetch_add(1, core::sync::atomic::Ordering::Relaxed);
    // SAFETY: by the contract above.
    unsafe {
        asm!("vmwrite {}, {}", in(reg) u64::from(field), in(reg) value, options(nomem, nostack));
    }
}

/// A VMX instruction with one memory operand, here a physical address; true if it succeeded
/// (CF = ZF = 0, §31.2).
macro_rules! on_address {
    ($(#[$doc:meta])* $name:ident, $instruction:literal) => {
        $(#[$doc])*
        #[must_use]
        pub unsafe fn $name(page: HostPhysAddr) -> bool {
            let address = page.as_u64();
            let succeeded: u8;
            // SAFETY: by the function's contract.
            unsafe {
                asm!(
                    concat!($instruction, " [{}]"), "seta {}",
                    in(reg) &raw const address, out(reg_byte) succeeded, options(nostack)
                );
            }
            succeeded != 0
        }
    };
}

on_address!(
    /// Enters VMX operation.
    ///
    /// # Safety
    /// CR0 and CR4 hold what VMX operation needs; `page` starts with the revision identifier and
    /// belongs to the processor until VMXOFF.
    vmxon, "vmxon"
);
on_address!(
    /// Makes a VMCS inactive, not current and not launched, and writes all of it to memory.
    ///
    /// # Safety
    /// The core is in VMX operation; `page` is a VMCS that belongs to the caller.
    vmclear, "vmclear"
);
on_address!(
    /// Makes a VMCS current.
    ///
    /// # Safety
    /// As for [`vmclear`]; the VMCS is active on no other core.
    vmptrld, "vmptrld"
);

/// The current VMCS, if there is one.
///
/// # Safety
/// The core is in VMX operation.
#[must_use]
pub unsafe fn vmptrst() -> Option<HostPhysAddr> {
    let mut address = u64::MAX;
    // SAFETY: by the contract above; writes eight bytes of ours.
    unsafe { asm!("vmptrst [{}]", in(reg) &raw mut address, options(nostack)) };
    (address != u64::MAX).then_some(HostPhysAddr::new(address))
}

/// Leaves VMX operation.
///
/// # Safety
/// The core is in VMX operation, and no VMCS is active on it.
pub unsafe fn vmxoff() {
    // SAFETY: by the contract above.
    unsafe { asm!("vmxoff", options(nostack)) };
}

/// INVEPT and INVVPID types (§31.3).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
pub enum Scope {
    /// One EPT pointer, or one VPID.
    Single = 1,
    /// All of them.
    All = 2,
}

/// Forgets translations made through an EPT pointer.
///
/// # Safety
/// The core is in VMX operation, and the processor has this type of INVEPT.
pub unsafe fn invept(scope: Scope, eptp: u64) {
    let descriptor = [eptp, 0];
    // SAFETY: by the contract above; reads 16 bytes of ours.
    unsafe {
        asm!("invept {}, [{}]", in(reg) scope as u64, in(reg) &raw const descriptor, options(nostack));
    }
}

/// Forgets linear translations of a VPID.
///
/// # Safety
/// The core is in VMX operation, and the processor has this type of INVVPID.
pub unsafe fn invvpid(scope: Scope, vpid: u16) {
    let descriptor = [u64::from(vpid), 0];
    // SAFETY: by the contract above; reads 16 bytes of ours.
    unsafe {
        asm!("invvpid {}, [{}]", in(reg) scope as u64, in(reg) &raw const descriptor, options(nostack));
    }
}
