//! The hypervisor `tessera`: takes the machine from the loader, wires the rooms together and runs
//! the guests. It has no policy of its own.
#![no_std]
#![no_main]

extern crate alloc;

mod backend;
mod bring_up;
mod console;
mod cores;
mod frames;
mod lock;
mod manager;
mod network;
mod panic;
mod run;
mod uplinks;

use bootloader_api::BootInfo;

/// The loader's jump lands here with the boot information in RDI and a stack in RSP.
#[unsafe(naked)]
#[unsafe(no_mangle)]
extern "C" fn _start() -> ! {
    core::arch::naked_asm!("xor ebp, ebp", "and rsp, -16", "call {entry}", "ud2", entry = sym entry)
}

extern "C" fn entry(boot: &'static mut BootInfo) -> ! {
    bring_up::main(boot)
}
