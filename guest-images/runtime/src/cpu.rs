//! Privileged instructions, one function each.

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

/// Enables interrupts and halts until one came, then disables them again.
pub fn wait_for_interrupt() {
    // SAFETY: every vector has a handler.
    unsafe { asm!("sti", "hlt", "cli") };
}
