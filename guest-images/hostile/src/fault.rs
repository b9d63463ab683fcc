//! Asks a hypervisor built for that to fail, at the place `at=<n>` of the command line.

use core::arch::asm;
use core::sync::atomic::{AtomicBool, Ordering};
use guest_runtime::cpu::{inb, read32};
use guest_runtime::pc::is_intel;
use guest_runtime::{cmdline, smp};

/// The hypercall's number.
const FAULT: u64 = 0x5465_0003;
/// The I/O APIC's data register.
const IO_APIC: u64 = 0xfec0_0010;

fn place() -> u64 {
    cmdline()
        .split_whitespace()
        .find_map(|word| word.strip_prefix("at=")?.parse().ok())
        .unwrap_or(0)
}

/// The call, on this CPU.
pub fn here() {
    let place = place();
    // RBX belongs to the compiler.
    // SAFETY: the end of this guest is what is wanted.
    unsafe {
        if is_intel() {
            asm!("xchg rbx, {0}", "vmcall", "xchg rbx, {0}",
                 inout(reg) place => _, inout("rax") FAULT => _);
        } else {
            asm!("xchg rbx, {0}", "vmmcall", "xchg rbx, {0}",
                 inout(reg) place => _, inout("rax") FAULT => _);
        }
    }
}

/// The call on the second CPU, while the first uses all the time what the VM's CPUs share: its
/// devices, and its memory for the instructions that do so.
pub fn beside() {
    let over = AtomicBool::new(false);
    smp::beside(
        1..2,
        &|| {
            here();
            over.store(true, Ordering::SeqCst);
        },
        || {
            while !over.load(Ordering::SeqCst) {
                // SAFETY: reading these changes nothing.
                let _ = unsafe { (inb(0x61), read32(IO_APIC)) };
            }
        },
    );
}
