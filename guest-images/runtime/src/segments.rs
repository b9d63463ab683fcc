//! The descriptor table of `boot.s`, and each CPU's TSS, with its
//! stacks for ring 0 and IST 1.

use crate::smp::MAX;
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
/// The first CPU's; the others' follow, 16 bytes each.
const TSS: u16 = 0x48;
/// Bytes of the table.
pub(crate) const GDT_BYTES: usize = TSS as usize + 16 * MAX;
const STACK: usize = 8192;

/// What a CPU has for itself: both stacks grow down, and the TSS lies above them.
#[repr(C, align(16))]
struct Area {
    ist1: [u8; STACK],
    stack0: [u8; STACK],
    tss: [u32; 26],
}

struct Areas(UnsafeCell<[Area; MAX]>);

// SAFETY: a CPU writes its own area, once, before anything can use it.
unsafe impl Sync for Areas {}

static AREAS: Areas = Areas(UnsafeCell::new(
    [const {
        Area {
            ist1: [0; STACK],
            stack0: [0; STACK],
            tss: [0; 26],
        }
    }; MAX],
));

unsafe extern "C" {
    static guest_gdt_pointer: u8;
    static mut guest_gdt: [u64; GDT_BYTES / 8];
}

/// Loads the TSS of this CPU, which is the one of that index.
pub(crate) fn init_cpu(cpu: usize) {
    let area = AREAS.0.get().cast::<Area>().wrapping_add(cpu.min(MAX - 1));
    let selector = TSS + 16 * cpu as u16;
    // The fields are 64 bits wide and 4-byte aligned; the stacks lie below 4 GiB.
    // SAFETY: nobody else uses this CPU's area or its part of the table. The descriptor is written
    // anew each time, as loading it marks it busy.
    unsafe {
        let tss = &raw mut (*area).tss;
        let address = tss as u64;
        (*tss)[1] = (&raw const (*area).tss) as u32 & !15;
        (*tss)[9] = (&raw const (*area).stack0) as u32;
        (*tss)[25] = 104 << 16; // no I/O permission map
        let slot = (&raw mut guest_gdt)
            .cast::<u64>()
            .add(usize::from(selector) / 8);
        // Available 64-bit TSS, limit 103.
        slot.write_volatile(
            103 | (address & 0xff_ffff) << 16 | 0x89 << 40 | (address >> 24 & 0xff) << 56,
        );
        slot.add(1).write_volatile(address >> 32);
        asm!("ltr {:x}", in(reg) selector, options(nostack));
    }
}

/// Loads the runtime's GDT and this CPU's TSS again, for whoever has loaded others on the CPU that
/// booted.
pub fn restore() {
    // SAFETY: the pointer and what it points to live for ever.
    unsafe { asm!("lgdt [{}]", in(reg) &raw const guest_gdt_pointer, options(nostack)) };
    init_cpu(0);
}

/// The index of this CPU, which its task register tells; 0 when that is something else.
pub fn current() -> usize {
    let selector: u32;
    // SAFETY: STR changes nothing else.
    unsafe { asm!("str {:e}", out(reg) selector, options(nomem, nostack, preserves_flags)) };
    let index = (selector as usize & 0xfff8).wrapping_sub(TSS.into()) / 16;
    if index < MAX { index } else { 0 }
}

/// The top of the stack of IST 1 of the CPU that booted.
pub fn interrupt_stack() -> u64 {
    let area = AREAS.0.get().cast::<Area>();
    // SAFETY: the address is all that is taken.
    unsafe { &raw const (*area).stack0 as u64 }
}
