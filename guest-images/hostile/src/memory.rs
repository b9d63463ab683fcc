//! Memory that is not what it should be: code, tables and stacks in devices, at the border of RAM,
//! and under the emulator's feet.

use crate::HOLE;
use core::arch::asm;
use guest_runtime::cpu::{cr3, read32, set_cr3};
use guest_runtime::pc::{IOAPIC, LAPIC, reg};
use guest_runtime::{
    PAGE, Page, println, set_window, set_window_unflushed, smp, start_info, window,
};

pub fn unmapped_jump() {
    // SAFETY: as above.
    unsafe { asm!("jmp {}", in(reg) HOLE) };
}

/// An x87 load from a device: no compiler emits that for one.
pub fn undecodable_mmio() {
    // SAFETY: as above.
    unsafe { asm!("fninit", "fld tbyte ptr [{}]", in(reg) LAPIC + u64::from(reg::VERSION)) };
}

pub fn undecodable_sse() {
    // SAFETY: as above; CR4.OSFXSR is on first.
    unsafe {
        asm!("mov rax, cr4", "or rax, 0x200", "mov cr4, rax", "xorps xmm0, xmm0",
             "paddd xmm0, [{}]", in(reg) LAPIC + u64::from(reg::LVT_TIMER), out("rax") _);
    }
}

/// The next fetch walks page tables that lie where a device is, or nothing.
pub fn mmio_page_tables() {
    // SAFETY: as above.
    unsafe { set_cr3(HOLE) };
}

/// An exception with the stack in a device.
pub fn mmio_stack() {
    // SAFETY: as above.
    unsafe { asm!("mov rsp, {}", "ud2", in(reg) LAPIC + 0x400) };
}

fn jump(to: u64) {
    // SAFETY: the end of this guest is what is wanted.
    unsafe { asm!("jmp {}", in(reg) to) };
}

pub fn fetch_lapic() {
    jump(LAPIC);
}

pub fn fetch_ioapic() {
    jump(IOAPIC);
}

pub fn fetch_ecam() {
    jump(0xe000_0000);
}

static CODE: [Page; 4] = [const { Page::zero() }; 4];
const SLOT: usize = 200;

fn write(page: &Page, offset: u64, bytes: &[u8]) {
    let at = (page.address() + offset) as *mut u8;
    // SAFETY: the page is this module's, and the callers stay in it.
    unsafe { at.copy_from(bytes.as_ptr(), bytes.len()) };
}

/// An instruction that begins in RAM and ends in the frame given.
fn cross_into(frame: u64) {
    let at = set_window(SLOT, CODE[0].address() | 3);
    set_window(SLOT + 1, frame | 3);
    // mov eax, imm32: two bytes here, three there.
    write(&CODE[0], PAGE - 2, &[0xb8, 0]);
    jump(at + PAGE - 2);
}

pub fn cross_into_device() {
    cross_into(LAPIC);
}

pub fn cross_into_nothing() {
    cross_into(HOLE);
}

/// An instruction over the border of two pages of RAM that writes to a device: legal.
pub fn cross_in_ram() {
    // mov [rdi], eax; ret: c3 and the rest on the second page.
    for split in 1..4u64 {
        let code = [0x67, 0x89, 0x07, 0xc3];
        let (here, there) = code.split_at(split as usize);
        write(&CODE[0], PAGE - split, here);
        write(&CODE[1], 0, there);
        let at = set_window(SLOT, CODE[0].address() | 3) + PAGE - split;
        set_window(SLOT + 1, CODE[1].address() | 3);
        // SAFETY: the code writes the task priority.
        unsafe { asm!("call {}", in(reg) at, in("rdi") LAPIC + u64::from(reg::TPR), in("eax") 0) };
    }
}

/// Data that begins in RAM and ends in a device, or the other way round.
pub fn straddle_data() {
    for (first, second) in [
        (CODE[2].address(), LAPIC),
        (LAPIC, CODE[2].address()),
        (CODE[2].address(), HOLE),
        (HOLE, CODE[2].address()),
        (IOAPIC, LAPIC),
        (HOLE, 0),
    ] {
        set_window(SLOT, first | 3);
        // 0: a page that is not there.
        set_window(SLOT + 1, if second == 0 { 0 } else { second | 3 });
        for offset in [PAGE - 1, PAGE - 2, PAGE - 3, PAGE - 7] {
            let at = window(SLOT) + offset;
            // For all: the RAM is this module's page; device registers there are ids.
            let _ = attempt!({
                let value = (at as *const u64).read_unaligned();
                (at as *mut u64).write_unaligned(value);
            });
            let _ = attempt!({ (at as *mut u32).write_unaligned(0) });
            let _ = attempt!({ (at as *mut u16).write_unaligned(0) });
            let _ = attempt!({
                asm!("lock add dword ptr [{}], 1", in(reg) at);
            });
            let _ = attempt!({
                asm!("rep movsb", inout("rsi") at => _, inout("rdi") CODE[3].address() => _,
                     inout("rcx") 16u64 => _);
            });
            let _ = attempt!({
                asm!("rep stosw", inout("rdi") at => _, inout("rcx") 3u64 => _, in("ax") 0u16);
            });
        }
    }
}

/// Code that the CPU still knows by its TLB while the tables already name another: what reads the
/// instruction anew, to carry it out, finds something else.
pub fn code_swapped() {
    let others: [&[u8]; 9] = [
        &[0xc3],                   // ret
        &[0x90, 0x90, 0x90, 0xc3], // nothing that touches memory
        &[0x0f, 0x0b],             // ud2
        &[0xcc],                   // int3
        &[0xf4, 0xc3],             // hlt: interrupts are off, so this may end the guest
        &[0x8b, 0x40, 0x10, 0xc3], // mov eax, [rax + 16]
        &[0x48, 0x89, 0x07, 0xc3], // mov [rdi], rax
        &[0xf3, 0xa4, 0xc3],       // rep movsb
        &[0x0f, 0x01, 0xd8, 0xc3], // vmrun
    ];
    let at = window(SLOT);
    let call = |rdi: u64| {
        // SAFETY: whatever the code is, a fault is caught.
        let _ = attempt!({
            asm!("call {}", in(reg) at, inout("rdi") rdi => _, inout("rax") rdi => _,
                 inout("rcx") 1u64 => _, inout("rsi") rdi => _, out("rdx") _);
        });
    };
    for other in others {
        if other[0] == 0xf4 {
            continue;
        }
        for frame in [CODE[1].address() | 3, HOLE | 3, LAPIC | 3, 0] {
            write(&CODE[0], 0, &[0x8b, 0x07, 0xc3]); // mov eax, [rdi]; ret
            write(&CODE[1], 0, other);
            set_window(SLOT, CODE[0].address() | 3);
            call(CODE[2].address());
            // A fetch from a device ends the guest: such frames may only be met by who reads the
            // code anew, and an exit may already have cost the TLB its entry.
            if frame == HOLE | 3 || frame == LAPIC | 3 {
                continue;
            }
            set_window_unflushed(SLOT, frame);
            call(LAPIC + u64::from(reg::VERSION));
        }
    }
}

/// The same with the code in a device by then: this mostly ends the guest.
pub fn code_to_device() {
    write(&CODE[0], 0, &[0x8b, 0x07, 0xc3]);
    let at = set_window(SLOT, CODE[0].address() | 3);
    // SAFETY: mov eax, [rdi]; ret.
    unsafe { asm!("call {}", in(reg) at, in("rdi") CODE[2].address(), out("rax") _) };
    set_window_unflushed(SLOT, HOLE | 3);
    // SAFETY: the end of this guest is what is wanted.
    unsafe { asm!("call {}", in(reg) at, in("rdi") LAPIC + 0x30, out("rax") _) };
    // It may have gone well, by what the TLB knew; now that is forgotten.
    set_window(SLOT, HOLE | 3);
    jump(at);
}

/// Another CPU changes the instruction while it is carried out for this one.
pub fn code_races() {
    const FORMS: [u32; 4] = [0xc3_078b, 0xc3_0789, 0xc390_9090_u32, 0xc3_0787];
    let at = set_window(SLOT, CODE[0].address() | 3);
    write(&CODE[0], 0, &FORMS[0].to_le_bytes());
    let stop = core::sync::atomic::AtomicBool::new(false);
    let change = || {
        let mut turn = 0;
        while !stop.load(core::sync::atomic::Ordering::Relaxed) {
            turn += 1;
            // SAFETY: the word is aligned, and every form ends with RET.
            unsafe { (CODE[0].address() as *mut u32).write_volatile(FORMS[turn & 3]) };
        }
    };
    let run = || {
        for _ in 0..3_000 {
            // SAFETY: every form touches the version register only, which cannot be written.
            let _ = attempt!({
                asm!("call {}", in(reg) at, in("rdi") LAPIC + u64::from(reg::VERSION),
                     inout("rax") 0u64 => _);
            });
        }
        stop.store(true, core::sync::atomic::Ordering::Relaxed);
    };
    if smp::count() > 1 {
        smp::beside([1], &change, run);
        smp::park_others();
    } else {
        run();
    }
}

/// The end of the RAM below 4 GiB, by the loader's map.
fn top_of_ram() -> u64 {
    let info = start_info();
    let entry = |index: u64| {
        let at = (info.memory_map + 24 * index) as *const u64;
        // SAFETY: the loader's table has that many entries.
        unsafe {
            (
                at.read_unaligned(),
                at.add(1).read_unaligned(),
                at.add(2).read_unaligned(),
            )
        }
    };
    (0..u64::from(info.memory_map_entries))
        .map(entry)
        .filter(|(start, size, kind)| *kind as u32 == 1 && start + size <= 1 << 32)
        .map(|(start, size, _)| start + size)
        .max()
        .unwrap_or(0)
        & !(PAGE - 1)
}

fn copy_table(from: u64, to: u64) {
    for entry in (0..PAGE).step_by(8) {
        // SAFETY: both are pages of RAM that nothing else uses or that only the CPU walks.
        unsafe {
            ((to + entry) as *mut u64)
                .write_volatile(((from + entry) as *const u64).read_volatile());
        }
    }
}

fn entry(table: u64, index: u64) -> u64 {
    // SAFETY: a table of this guest.
    unsafe { ((table + 8 * index) as *const u64).read_volatile() & !0xfff }
}

/// Page tables on the last pages of RAM, which map themselves, and whose first touch is a walk.
pub fn tables_at_the_end() {
    let kept = cr3() & !0xfff;
    let top = top_of_ram();
    let (root, pointers, directory) = (top - PAGE, top - 2 * PAGE, top - 3 * PAGE);
    println!("hostile: RAM ends at {top:#x}");
    for turn in 0..64u64 {
        copy_table(kept, root);
        copy_table(entry(kept, 0), pointers);
        copy_table(entry(entry(kept, 0), 0), directory);
        // SAFETY: the copies map what the originals do, and the last two map the tables.
        unsafe {
            (root as *mut u64).write_volatile(pointers | 3);
            (pointers as *mut u64).write_volatile(directory | 3);
            ((root + 8 * 511) as *mut u64).write_volatile(root | 3);
            set_cr3(root);
            // Through the tables as data, by the root that maps itself.
            let own = u64::MAX << 12;
            let _ = (own as *const u64).read_volatile();
            ((own + 8 * 300) as *mut u64).write_volatile(turn);
            let _ = read32(LAPIC + u64::from(reg::VERSION));
            set_cr3(kept);
        }
    }
}

/// The last table lies on the last page of RAM, and the next one behind it.
pub fn tables_beyond_the_end() {
    let kept = cr3() & !0xfff;
    let top = top_of_ram();
    copy_table(kept, top - PAGE);
    // SAFETY: slot 2 of the root is used by nobody else.
    unsafe {
        ((top - PAGE + 16) as *mut u64).write_volatile(top | 3);
        set_cr3(top - PAGE);
        let _ = ((2u64 << 39) as *const u8).read_volatile();
    }
}
