//! The descriptor table of `boot.s`, and the TSS with the stacks for ring 0 and IST 1.

use core::arch::asm;
use core::cell::UnsafeCell;

/// 64-bit code.
pub const CODE: u16 = 0x08;
/// Flat data.
pub const DATA: u16 = 0x10;
/// 32-bit code.
pub const CODE32: u16 = 0x18;
/// Flat data of ring 3.
pub const USER_DATA: u16 = 0x20 | 3;
/// 64-bit code of ring 3.
pub const USER_CODE: u16 = 0x28 | 3;
/// 16-bit code with the limit and base of real mode.
pub const CODE16: u16 = 0x30;
/// 16-bit data with the limit and base of real mode.
pub const DATA16: u16 = 0x38;
/// Data, not present.
pub const NOT_PRESENT: u16 = 0x40;
const TSS: u16 = 0x48;

#[repr(C, align(16))]
struct Tss(UnsafeCell<[u32; 26]>);

// SAFETY: written once, before anything can use it.
unsafe impl Sync for Tss {}

static TASK: Tss = Tss(UnsafeCell::new([0; 26]));

unsafe extern "C" {
    static mut guest_gdt: [u64; 11];
    static guest_stack0_top: u8;
    static guest_ist1_top: u8;
}

pub(crate) fn init() {
    let tss = TASK.0.get();
    let address = tss as u64;
    // The fields are 64 bits wide and 4-byte aligned; the stacks lie below 4 GiB.
    // SAFETY: nobody else uses table or TSS yet.
    unsafe {
        (*tss)[1] = (&raw const guest_stack0_top) as u32;
        (*tss)[9] = (&raw const guest_ist1_top) as u32;
        (*tss)[25] = 104 << 16; // no I/O permission map
        // Available 64-bit TSS, limit 103.
        guest_gdt[9] =
            103 | (address & 0xff_ffff) << 16 | 0x89 << 40 | (address >> 24 & 0xff) << 56;
        guest_gdt[10] = address >> 32;
        asm!("ltr {:x}", in(reg) TSS, options(nostack));
    }
}

/// The top of the stack of IST 1.
pub fn interrupt_stack() -> u64 {
    &raw const guest_ist1_top as u64
}
