//! Privileged instructions, one function each.

use crate::{Fault, expect_fault};
use core::arch::asm;

/// Writes a byte to a port.
///
/// # Safety
/// The device behind the port is the caller's to drive.
#[inline]
pub unsafe fn outb(port: u16, value: u8) {
    // SAFETY: promised by the caller.
    unsafe { asm!("out dx, al", in("dx") port, in("al") value, options(nomem, nostack)) };
}

/// Writes two bytes to a port.
///
/// # Safety
/// As [`outb`].
#[inline]
pub unsafe fn outw(port: u16, value: u16) {
    // SAFETY: promised by the caller.
    unsafe { asm!("out dx, ax", in("dx") port, in("ax") value, options(nomem, nostack)) };
}

/// Writes four bytes to a port.
///
/// # Safety
/// As [`outb`].
#[inline]
pub unsafe fn outl(port: u16, value: u32) {
    // SAFETY: promised by the caller.
    unsafe { asm!("out dx, eax", in("dx") port, in("eax") value, options(nomem, nostack)) };
}

/// Reads a byte from a port.
///
/// # Safety
/// As [`outb`]: reading may have side effects.
#[inline]
#[must_use]
pub unsafe fn inb(port: u16) -> u8 {
    let value;
    // SAFETY: promised by the caller.
    unsafe { asm!("in al, dx", in("dx") port, out("al") value, options(nomem, nostack)) };
    value
}

/// Reads two bytes from a port.
///
/// # Safety
/// As [`inb`].
#[inline]
#[must_use]
pub unsafe fn inw(port: u16) -> u16 {
    let value;
    // SAFETY: promised by the caller.
    unsafe { asm!("in ax, dx", in("dx") port, out("ax") value, options(nomem, nostack)) };
    value
}

/// Reads four bytes from a port.
///
/// # Safety
/// As [`inb`].
#[inline]
#[must_use]
pub unsafe fn inl(port: u16) -> u32 {
    let value;
    // SAFETY: promised by the caller.
    unsafe { asm!("in eax, dx", in("dx") port, out("eax") value, options(nomem, nostack)) };
    value
}

/// CPUID: EAX, EBX, ECX, EDX.
#[inline]
#[must_use]
pub fn cpuid(leaf: u32, subleaf: u32) -> [u32; 4] {
    let result = core::arch::x86_64::__cpuid_count(leaf, subleaf);
    [result.eax, result.ebx, result.ecx, result.edx]
}

/// The time-stamp counter.
#[inline]
#[must_use]
pub fn rdtsc() -> u64 {
    // SAFETY: RDTSC changes nothing.
    unsafe { core::arch::x86_64::_rdtsc() }
}

/// Reads an MSR that is known to exist.
///
/// # Safety
/// The MSR exists; otherwise #GP ends the guest.
#[inline]
#[must_use]
pub unsafe fn rdmsr(index: u32) -> u64 {
    let (low, high): (u32, u32);
    // SAFETY: promised by the caller.
    unsafe {
        asm!("rdmsr", in("ecx") index, out("eax") low, out("edx") high, options(nomem, nostack));
    }
    u64::from(high) << 32 | u64::from(low)
}

/// Writes an MSR that is known to exist.
///
/// # Safety
/// The MSR exists and the value leaves the guest runnable.
#[inline]
pub unsafe fn wrmsr(index: u32, value: u64) {
    // SAFETY: promised by the caller.
    unsafe {
        asm!("wrmsr", in("ecx") index, in("eax") value as u32, in("edx") (value >> 32) as u32,
             options(nostack));
    }
}

/// Reads an MSR, or gives the exception that came instead.
pub fn try_rdmsr(index: u32) -> Result<u64, Fault> {
    let mut value = 0;
    // SAFETY: reading has no side effect, and a fault is caught.
    match expect_fault(|| value = unsafe { rdmsr(index) }) {
        None => Ok(value),
        Some(fault) => Err(fault),
    }
}

/// Writes an MSR, or gives the exception that came instead.
///
/// # Safety
/// The value leaves the guest runnable.
pub unsafe fn try_wrmsr(index: u32, value: u64) -> Result<(), Fault> {
    // SAFETY: promised by the caller, and a fault is caught.
    match expect_fault(|| unsafe { wrmsr(index, value) }) {
        None => Ok(()),
        Some(fault) => Err(fault),
    }
}

/// Reads a register in memory.
///
/// # Safety
/// `addr` is mapped; reading has no effect that the caller does not want.
#[inline]
#[must_use]
pub unsafe fn read32(addr: u64) -> u32 {
    // SAFETY: promised by the caller.
    unsafe { (addr as *const u32).read_volatile() }
}

/// Writes a register in memory.
///
/// # Safety
/// As [`read32`].
#[inline]
pub unsafe fn write32(addr: u64, value: u32) {
    // SAFETY: promised by the caller.
    unsafe { (addr as *mut u32).write_volatile(value) };
}

macro_rules! register {
    ($get:ident, $set:ident, $name:literal) => {
        #[doc = concat!("Reads ", $name, ".")]
        #[inline]
        #[must_use]
        pub fn $get() -> u64 {
            let value;
            // SAFETY: reading it changes nothing.
            unsafe { asm!(concat!("mov {}, ", $name), out(reg) value, options(nomem, nostack)) };
            value
        }

        #[doc = concat!("Writes ", $name, ".")]
        ///
        /// # Safety
        /// The value leaves the guest runnable, or is one that faults.
        #[inline]
        pub unsafe fn $set(value: u64) {
            // SAFETY: promised by the caller.
            unsafe { asm!(concat!("mov ", $name, ", {}"), in(reg) value, options(nostack)) };
        }
    };
}
register!(cr0, set_cr0, "cr0");
register!(cr2, set_cr2, "cr2");
register!(cr3, set_cr3, "cr3");
register!(cr4, set_cr4, "cr4");
register!(cr8, set_cr8, "cr8");
register!(dr0, set_dr0, "dr0");
register!(dr1, set_dr1, "dr1");
register!(dr2, set_dr2, "dr2");
register!(dr3, set_dr3, "dr3");
register!(dr6, set_dr6, "dr6");
register!(dr7, set_dr7, "dr7");

/// RFLAGS.
#[inline]
#[must_use]
pub fn flags() -> u64 {
    let value;
    // SAFETY: reading changes nothing; the red zone is off on this target.
    unsafe { asm!("pushfq", "pop {}", out(reg) value) };
    value
}

/// Enables interrupts and halts until one came, then disables them again.
pub fn wait_for_interrupt() {
    // SAFETY: every vector has a handler.
    unsafe { asm!("sti", "hlt", "cli") };
}
