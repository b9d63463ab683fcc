//! When the hypervisor itself fails.
//!
//! A panic in work for one VM abandons that work on that core: the VM is crashed and the others run.
//! A panic that holds a shared lock ([`crate::lock`]) or that hits outside any VM's work stops the
//! host, all cores of it, with what is known on every console.

use crate::{console, cores};
use core::panic::PanicInfo;
use core::sync::atomic::Ordering;
use cpu::host::InterruptFrame;
use cpu::percpu::this;

#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    let core = this();
    if core.panicking.swap(true, Ordering::Relaxed) {
        // Telling of the first one failed as well.
        cores::stop_others();
        cpu::host::stop();
    }
    // SAFETY: what this core did is over.
    unsafe { console::release() };
    console::say(format_args!(
        "error: panic on core {}: {info}",
        core.number()
    ));
    if cpu::guard::is_running() && core.held.load(Ordering::Relaxed) == 0 {
        core.panicking.store(false, Ordering::Relaxed);
        // SAFETY: no shared lock is held.
        unsafe { cpu::guard::abandon() };
    }
    stop_host()
}

/// Ends everything: shared state is in doubt.
pub fn stop_host() -> ! {
    cores::stop_others();
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
