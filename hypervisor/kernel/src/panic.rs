//! When the hypervisor itself fails.
//!
//! A panic in work for one VM abandons that work: the VM is crashed and the others run. A panic
//! that holds shared state (the frame store or the heap: their locks are the list) or that hits
//! outside any VM's work stops the host, with what is known on every console.

use crate::{console, frames};
use core::panic::PanicInfo;
use cpu::host::InterruptFrame;

#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    // SAFETY: this core's only flow of control is here now; the console's holder was it.
    unsafe { console::force_unlock() };
    console::say(format_args!("error: panic: {info}"));
    if cpu::guard::is_running() && !frames::is_locked() {
        // SAFETY: neither of the shared locks is held.
        unsafe { cpu::guard::abandon() };
    }
    console::say(format_args!("the hypervisor has failed and stops here"));
    crate::bring_up::end(103, "the hypervisor panicked");
}

/// An exception in the hypervisor: a defect of ours.
pub fn exception(frame: &InterruptFrame) -> ! {
    let cr2: u64;
    // SAFETY: reading CR2 in ring 0 changes nothing.
    unsafe { core::arch::asm!("mov {}, cr2", out(reg) cr2, options(nomem, nostack)) };
    panic!(
        "exception {} (error code {:#x}) at {:#x}, rsp {:#x}, cr2 {cr2:#x}, registers {:x?}",
        frame.vector, frame.error_code, frame.rip, frame.rsp, frame.registers
    );
}
