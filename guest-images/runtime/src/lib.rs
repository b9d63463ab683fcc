//! What a bare guest needs: boot, a serial console, interrupts, an exit code, and tests.
//!
//! A guest is a 64-bit ELF with a PVH note. The same file runs on Tessera and, unchanged, in
//! plain QEMU with `-kernel` and `isa-debug-exit`, which is the reference for what hardware does.
//! Memory below 4 GiB is mapped one to one; interrupts are off at first; every vector has a
//! handler, and a fault that no test expects ends the guest with a report.
#![no_std]

pub mod acpi;
pub mod clock;
pub mod cpu;
mod interrupts;
mod paging;
pub mod pc;
pub mod pci;
pub mod segments;
mod serial;
pub mod smp;
mod start;
mod tests;
pub mod virtio;

pub use guest_macros::guest_test;
pub use interrupts::{
    Fault, Frame, Handler, count, count_on, expect_fault, load_idt, on_interrupt, reset_interrupts,
    set_gate, with_interrupts,
};
pub use paging::{PAGE, Page, WINDOW, set_window, set_window_unflushed, window, window_entry};
pub use serial::{_print, init as init_serial};
pub use start::{StartInfo, cmdline, start_info};
pub use tests::{Case, run_tests, skip};

use core::arch::global_asm;
use core::panic::PanicInfo;

global_asm!(include_str!("boot.s"));

/// Prints to the serial console.
#[macro_export]
macro_rules! print {
    ($($arg:tt)*) => { $crate::_print(format_args!($($arg)*)) };
}

/// Prints a line to the serial console.
#[macro_export]
macro_rules! println {
    () => { $crate::print!("\n") };
    ($($arg:tt)*) => { $crate::print!("{}\n", format_args!($($arg)*)) };
}

/// Names the guest's `fn main()`.
#[macro_export]
macro_rules! entry {
    ($main:path) => {
        #[unsafe(no_mangle)]
        extern "Rust" fn guest_main() {
            let main: fn() = $main;
            main()
        }
    };
}

unsafe extern "Rust" {
    fn guest_main();
}

/// The debug-exit port: value v ends the guest with code (v << 1) | 1.
const DEBUG_EXIT: u16 = 0xf4;

#[unsafe(no_mangle)]
extern "C" fn guest_start(start_info: u64) -> ! {
    start::set(start_info);
    serial::init();
    segments::init_cpu(0);
    interrupts::init();
    // SAFETY: `entry!` defines it with this signature.
    unsafe { guest_main() };
    exit(0)
}

/// Ends the guest by the debug-exit port; halts where there is none.
pub fn exit(value: u32) -> ! {
    // SAFETY: the port belongs to the debug-exit device, or to nobody.
    unsafe { cpu::outl(DEBUG_EXIT, value) };
    loop {
        // SAFETY: nothing is left to do.
        unsafe { core::arch::asm!("cli", "hlt") };
    }
}

#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    tests::failed(info);
    println!("guest panic: {info}");
    exit(1)
}
