//! INS and OUTS, with and without REP (Intel SDM Vol. 2), on the UART's scratch register and the
//! PCI address register.

use crate::util::assert_fault;
use core::arch::asm;
use guest_runtime::cpu::{inb, inl, outb};
use guest_runtime::{Page, expect_fault, guest_test, set_window};

const SCRATCH: u16 = 0x3ff;
const DEBUG_CONSOLE: u16 = 0xe9;
static BUFFER: [Page; 2] = [const { Page::zero() }; 2];

fn scratch() -> u8 {
    // SAFETY: reading the scratch register has no side effect.
    unsafe { inb(SCRATCH) }
}

#[guest_test]
fn outs_of_one() {
    static BYTES: [u8; 2] = [0x3c, 0xc3];
    let at = &raw const BYTES as u64;
    let rsi: u64;
    // SAFETY: one byte goes to the scratch register.
    unsafe { asm!("outsb", inout("rsi") at => rsi, in("dx") SCRATCH) };
    assert_eq!((rsi, scratch()), (at + 1, 0x3c));
    // SAFETY: as above, downwards.
    unsafe { asm!("std", "outsb", "cld", inout("rsi") at + 1 => _, in("dx") SCRATCH) };
    assert_eq!(scratch(), 0xc3);
}

#[guest_test]
fn rep_outs_sends_all_in_order() {
    static BYTES: [u8; 300] = {
        let mut bytes = [0; 300];
        let mut i = 0;
        while i < 300 {
            bytes[i] = i as u8 ^ 0x5a;
            i += 1;
        }
        bytes
    };
    for length in [0, 1, 2, 299, 300u64] {
        // SAFETY: a byte for the scratch register.
        unsafe { outb(SCRATCH, 0x77) };
        let at = &raw const BYTES as u64;
        let (rsi, rcx): (u64, u64);
        // SAFETY: bytes of `BYTES` go to the scratch register.
        unsafe {
            asm!("rep outsb", inout("rsi") at => rsi, inout("rcx") length => rcx, in("dx") SCRATCH)
        };
        assert_eq!((rsi, rcx), (at + length, 0));
        let last = if length == 0 {
            0x77
        } else {
            BYTES[length as usize - 1]
        };
        assert_eq!(scratch(), last, "{length} bytes");
    }
}

#[guest_test]
fn rep_ins_fills_memory() {
    // SAFETY: a byte for the scratch register.
    unsafe { outb(SCRATCH, 0xd7) };
    let at = BUFFER[0].address();
    for length in [0u64, 1, 255, 4096] {
        // SAFETY: the buffer is this module's.
        unsafe { (at as *mut u8).write_bytes(0, 4096) };
        let (rdi, rcx): (u64, u64);
        // SAFETY: `length` bytes go to the buffer.
        unsafe {
            asm!("rep insb", inout("rdi") at => rdi, inout("rcx") length => rcx, in("dx") SCRATCH)
        };
        assert_eq!((rdi, rcx), (at + length, 0));
        for i in 0..4096 {
            // SAFETY: as above.
            let byte = unsafe { ((at + i) as *const u8).read_volatile() };
            assert_eq!(
                byte,
                if i < length { 0xd7 } else { 0 },
                "byte {i} of {length}"
            );
        }
    }
}

#[guest_test]
fn ins_and_outs_of_double_words() {
    static ADDRESSES: [u32; 3] = [1 << 31 | 0x08, 1 << 31 | 0x3c, 1 << 31];
    // SAFETY: selects the host bridge's first register, and reads it.
    unsafe {
        asm!("rep outsd", inout("rsi") &raw const ADDRESSES => _, inout("rcx") 3u64 => _, in("dx") 0xcf8u16);
        assert_eq!(inl(0xcf8), 1 << 31);
        let id = inl(0xcfc);
        let at = BUFFER[0].address();
        asm!("rep insd", inout("rdi") at => _, inout("rcx") 4u64 => _, in("dx") 0xcfcu16);
        for i in 0..4 {
            assert_eq!(guest_runtime::cpu::read32(at + 4 * i), id);
        }
        asm!("rep insw", inout("rdi") at => _, inout("rcx") 2u64 => _, in("dx") 0xcfeu16);
        assert_eq!(guest_runtime::cpu::read32(at), (id >> 16) * 0x1_0001);
    }
}

#[guest_test]
fn rep_ins_and_outs_across_pages() {
    // Two pages of the window in the opposite order of their frames.
    set_window(50, BUFFER[1].address() | 3);
    let at = set_window(51, BUFFER[0].address() | 3) - 100;
    // SAFETY: the pages are this module's.
    unsafe {
        outb(SCRATCH, 0x99);
        (at as *mut u8).write_bytes(0, 200);
        asm!("rep insb", inout("rdi") at => _, inout("rcx") 200u64 => _, in("dx") SCRATCH);
        for i in 0..200 {
            assert_eq!(((at + i) as *const u8).read_volatile(), 0x99, "byte {i}");
        }
        ((at + 199) as *mut u8).write_volatile(0x66);
        asm!("rep outsb", inout("rsi") at => _, inout("rcx") 200u64 => _, in("dx") SCRATCH);
        assert_eq!(inb(SCRATCH), 0x66);
        // A double word that lies on both.
        ((at + 98) as *mut u32).write_unaligned(1 << 31 | 0x3c);
        asm!("outsd", inout("rsi") at + 98 => _, in("dx") 0xcf8u16);
        assert_eq!(inl(0xcf8), 1 << 31 | 0x3c);
    }
}

#[guest_test]
fn rep_ins_stops_at_a_page_fault() {
    set_window(52, BUFFER[0].address() | 3);
    let hole = set_window(53, 0);
    static LEFT: core::sync::atomic::AtomicU64 = core::sync::atomic::AtomicU64::new(0);
    // RCX and RDI at the fault tell how far it came.
    fn note(frame: &mut guest_runtime::Frame) {
        LEFT.store(
            frame.registers[12] << 32 | frame.registers[9] & 0xffff_ffff,
            core::sync::atomic::Ordering::Relaxed,
        );
        set_window(53, BUFFER[1].address() | 3);
    }
    guest_runtime::on_interrupt(crate::util::vector::PF, note);
    let (rdi, rcx): (u64, u64);
    // SAFETY: the pages are this module's; the fault maps the second.
    unsafe {
        outb(SCRATCH, 0x31);
        asm!("rep insb", inout("rdi") hole - 10 => rdi, inout("rcx") 20u64 => rcx, in("dx") SCRATCH);
    }
    let left = LEFT.load(core::sync::atomic::Ordering::Relaxed);
    assert_eq!(left >> 32, 10, "RCX at the fault");
    assert_eq!(left & 0xffff_ffff, hole & 0xffff_ffff, "RDI at the fault");
    assert_eq!((rdi, rcx), (hole + 10, 0));
}

#[guest_test]
fn outs_from_nowhere_is_the_guests_page_fault() {
    let hole = set_window(54, 0);
    // SAFETY: the fault is expected.
    let fault = expect_fault(|| unsafe { asm!("outsb", in("rsi") hole, in("dx") SCRATCH) });
    assert_fault(fault, crate::util::vector::PF, 0);
    // SAFETY: the fault is expected.
    let fault = expect_fault(|| unsafe { asm!("insb", in("rdi") hole, in("dx") SCRATCH) });
    assert_fault(fault, crate::util::vector::PF, 2);
}

#[guest_test]
fn debug_console_takes_strings() {
    // SAFETY: reading the port tells whether the device is there.
    crate::util::need(unsafe { inb(DEBUG_CONSOLE) } == 0xe9, "debug console");
    static TEXT: &str = "(by the debug console)\n";
    // SAFETY: the console prints.
    unsafe {
        asm!("rep outsb", inout("rsi") TEXT.as_ptr() => _, inout("rcx") TEXT.len() => _, in("dx") DEBUG_CONSOLE);
    }
}
