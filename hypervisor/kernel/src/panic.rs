//! When the hypervisor itself fails.
//!
//! A panic in work for one VM abandons that work: the VM is crashed and the others run. A panic
//! that holds shared state (the frame store or the heap: their locks are the list) or that hits
//! outside any VM's work stops the host, with what is known on every console.

use crate::{console, frames};
use core::panic::PanicInfo;
use core::sync::atomic::{AtomicBool, Ordering};
use cpu::host::InterruptFrame;

/// A panic is being told.
static PANICKING: AtomicBool = AtomicBool::new(false);

#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    if PANICKING.swap(true, Ordering::Relaxed) {
        // Telling of the first one failed as well.
        cpu::host::stop();
    }
    // SAFETY: this core's only flow of control is here now; the console's holder was it.
    unsafe { console::force_unlock() };
    console::say(format_args!("error: panic: {info}"));
    if cpu::guard::is_running() && !frames::is_locked() {
        PANICKING.store(false, Ordering::Relaxed);
        // SAFETY: neither of the shared locks is held.
        unsafe { cpu::guard::abandon() };
    }
    console::say(format_args!("the hypervisor has failed and stops here"));
    crate::bring_up::end(103, "the hypervisor panicked");
}

const DOUBLE_FAULT: u64 = 8;
const MACHINE_CHECK: u64 = 18;

/// An exception in the hypervisor: a defect of ours, or of the machine.
pub fn exception(frame: &InterruptFrame) -> ! {
    let cr2: u64;
    // SAFETY: reading CR2 in ring 0 changes nothing.
    unsafe { core::arch::asm!("mov {}, cr2", out(reg) cr2, options(nomem, nostack)) };
    if matches!(frame.vector, DOUBLE_FAULT | MACHINE_CHECK) {
        // The core itself is in doubt: no VM's death makes up for that.
        cpu::guard::forget();
    }
    panic!(
        "exception {} (error code {:#x}) at {:#x}, rsp {:#x}, cr2 {cr2:#x}, registers {:x?}",
        frame.vector, frame.error_code, frame.rip, frame.rsp, frame.registers
    );
}
