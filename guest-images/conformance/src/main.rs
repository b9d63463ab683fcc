//! The virtual PC, checked from inside against the manuals: one named case each.
//!
//! The same file runs on Tessera with either backend and in plain QEMU. A case whose feature
//! CPUID does not offer says so and is skipped; so is one on which QEMU's own emulation is known
//! to be laxer than the manuals, when it runs there directly. The words of the command line, if
//! any, select the cases whose names hold them.
#![no_std]
#![no_main]

mod acpi;
mod cpuid;
mod dr;
mod exceptions;
mod fpu;
mod i8042;
mod interrupts;
mod ioapic;
mod lapic;
mod memory;
mod mmio;
mod modes;
mod msr;
mod pci;
mod pic;
mod pit;
mod registers;
mod rtc;
mod smp;
mod smp_ipi;
mod smp_start;
mod strings;
mod time;
mod uart;
mod util;
mod virtio;

use guest_runtime::{entry, run_tests};

entry!(main);

fn main() {
    run_tests(util::reset_world)
}
