//! RAM, its ends and holes, and what the CPU notes in page tables.

use crate::util::on_tcg;
use core::arch::asm;
use guest_runtime::cpu::{cpuid, read32, write32};
use guest_runtime::{PAGE, Page, guest_test, set_window, start_info, window_entry};

static PAGES: [Page; 2] = [const { Page::zero() }; 2];
const LARGE: u64 = 2 << 20;

/// The usable ranges of the loader's memory map.
fn ranges() -> impl Iterator<Item = (u64, u64)> {
    let info = start_info();
    (0..u64::from(info.memory_map_entries)).filter_map(move |index| {
        let entry = (info.memory_map + 24 * index) as *const u64;
        // SAFETY: the loader's table has that many entries.
        let (address, size, kind) = unsafe {
            (
                entry.read_unaligned(),
                entry.add(1).read_unaligned(),
                entry.add(2).read_unaligned(),
            )
        };
        (kind as u32 == 1).then_some((address, address + size))
    })
}

/// The range that holds this program.
fn main_range() -> (u64, u64) {
    let here = PAGES[0].address();
    match ranges().find(|&(from, to)| (from..to).contains(&here)) {
        Some(range) => range,
        None => panic!("the program is outside the RAM of the map"),
    }
}

/// Writes, checks and restores double words.
fn probe(address: u64) {
    // SAFETY: RAM that is not in use, or gets back what it held before anything looks.
    unsafe {
        let kept = read32(address);
        for value in [0x5555_aaaa, !0x5555_aaaa] {
            write32(address, value);
            let found = read32(address);
            if found != value {
                write32(address, kept);
            }
            assert_eq!(found, value, "at {address:x}");
        }
        write32(address, kept);
    }
}

#[guest_test]
fn memory_map_is_sorted_and_aligned() {
    let mut last = 0;
    for (from, to) in ranges() {
        assert!(from >= last && to > from, "{from:x}..{to:x} after {last:x}");
        last = to;
    }
    assert!(
        ranges()
            .next()
            .is_some_and(|(from, to)| from == 0 && (0x8_0000..=0xa_0000).contains(&to))
    );
}

#[guest_test]
fn memory_works_in_every_large_page() {
    let (_, end) = main_range();
    let mut at = 8 << 20;
    while at < end {
        probe(at);
        at += LARGE;
    }
}

#[guest_test]
fn memory_works_up_to_its_last_byte() {
    let (_, end) = main_range();
    for offset in [4, 64, PAGE, 2 * PAGE] {
        probe(end - offset);
    }
    let last = (end - 1) as *mut u8;
    // SAFETY: the last byte gets back what it held.
    unsafe {
        let kept = last.read_volatile();
        last.write_volatile(!kept);
        assert_eq!(last.read_volatile(), !kept);
        last.write_volatile(kept);
    }
}

#[guest_test]
fn memory_holes_read_as_ones_and_take_writes() {
    // Below the APICs, where nothing is.
    for address in [0xfea0_0000, 0xfee1_0000, 0xfec1_0000] {
        // SAFETY: nothing is there.
        unsafe {
            let before = read32(address);
            write32(address, 0x1234_5678);
            let after = read32(address);
            assert!(
                before == after && (before == u32::MAX || on_tcg()),
                "{before:x} {after:x} at {address:x}"
            );
        }
    }
}

#[guest_test]
fn memory_does_not_wrap_at_one_mebibyte() {
    // SAFETY: both cells get back what they held; no interrupt reads the second vector of real mode.
    unsafe {
        let (low, high) = (0x4u64, 0x10_0004u64);
        let kept = (read32(low), read32(high));
        write32(low, 0x1111_1111);
        write32(high, 0x2222_2222);
        let found = (read32(low), read32(high));
        write32(low, kept.0);
        write32(high, kept.1);
        assert_eq!(found, (0x1111_1111, 0x2222_2222));
    }
}

#[guest_test]
fn memory_copies_across_large_pages() {
    let (_, end) = main_range();
    let from = 32 << 20;
    let to = (48 << 20) - 4096;
    crate::util::need(end >= 52 << 20, "52 MiB");
    // SAFETY: the program lies below 8 MiB and modules at the top: this RAM is free.
    unsafe {
        for i in 0..2048u64 {
            write32(from - 4096 + 4 * i, (i as u32).wrapping_mul(0x9e37_79b9));
        }
        asm!("rep movsb", inout("rsi") from - 4096 => _, inout("rdi") to + 1 => _, inout("rcx") 8192u64 => _);
        for i in 0..2048u64 {
            let found = ((to + 1 + 4 * i) as *const u32).read_unaligned();
            assert_eq!(found, (i as u32).wrapping_mul(0x9e37_79b9), "word {i}");
        }
        asm!("rep stosq", inout("rdi") from - 4096 => _, inout("rcx") 1024u64 => _, in("rax") 0u64);
        assert_eq!(read32(from), 0);
    }
}

#[guest_test]
fn memory_fresh_pages_are_zero_or_keep_what_is_written() {
    let (_, end) = main_range();
    crate::util::need(end >= 80 << 20, "80 MiB");
    let base = 64 << 20;
    // SAFETY: this RAM is free.
    unsafe {
        for i in 0..512u64 {
            write32(base + i * PAGE, i as u32 ^ 0x1357);
        }
        for i in 0..512u64 {
            assert_eq!(read32(base + i * PAGE), i as u32 ^ 0x1357);
        }
    }
}

#[guest_test]
fn paging_notes_accessed_and_dirty() {
    let address = set_window(60, PAGES[0].address() | 3);
    assert_eq!(window_entry(60) & 0x60, 0);
    // SAFETY: the page is this module's.
    unsafe {
        let _ = read32(address);
        assert_eq!(window_entry(60) & 0x60, 0x20);
        write32(address, 1);
        assert_eq!(window_entry(60) & 0x60, 0x60);
    }
}

#[guest_test]
fn paging_invlpg_shows_the_new_page() {
    for turn in 0..20u32 {
        for (i, page) in PAGES.iter().enumerate() {
            // SAFETY: the pages are this module's.
            unsafe {
                write32(page.address(), turn * 2 + i as u32);
                let address = set_window(61, page.address() | 3);
                assert_eq!(read32(address), turn * 2 + i as u32);
                let _ = cpuid(0, 0);
            }
        }
    }
}

#[guest_test]
fn paging_cr3_reload_shows_the_new_page() {
    let address = set_window(62, PAGES[0].address() | 3);
    // SAFETY: the pages are this module's; the tables stay the same but for the one entry.
    unsafe {
        write32(PAGES[0].address(), 0xaaaa);
        write32(PAGES[1].address(), 0xbbbb);
        assert_eq!(read32(address), 0xaaaa);
        let entry = window_entry(62) & 0xfff | PAGES[1].address();
        guest_runtime::set_window_unflushed(62, entry);
        guest_runtime::cpu::set_cr3(guest_runtime::cpu::cr3());
        assert_eq!(read32(address), 0xbbbb);
    }
}

#[guest_test]
fn paging_global_pages_go_with_cr4_pge() {
    use guest_runtime::cpu::{cr4, set_cr4};
    // SAFETY: as above; PGE is back off at the end.
    unsafe {
        set_cr4(cr4() | 1 << 7);
        let address = set_window(63, PAGES[0].address() | 0x103);
        write32(PAGES[0].address(), 0xaaaa);
        write32(PAGES[1].address(), 0xbbbb);
        assert_eq!(read32(address), 0xaaaa);
        guest_runtime::set_window_unflushed(63, PAGES[1].address() | 0x103);
        set_cr4(cr4() & !(1 << 7));
        assert_eq!(read32(address), 0xbbbb);
    }
}

#[guest_test]
fn code_can_be_changed() {
    let at = PAGES[1].address();
    for value in 0..50u32 {
        let found: u32;
        // MOV EAX, value; RET.
        // SAFETY: the page is this module's.
        unsafe {
            (at as *mut u8).write_volatile(0xb8);
            ((at + 1) as *mut u32).write_unaligned(value);
            ((at + 5) as *mut u8).write_volatile(0xc3);
            asm!("push rbx", "cpuid", "pop rbx", inout("eax") 0 => _, inout("ecx") 0 => _, out("edx") _);
            asm!("call {}", in(reg) at, out("eax") found);
        }
        assert_eq!(found, value);
    }
}

#[guest_test]
fn code_can_change_itself_ahead() {
    // MOV BYTE [RIP + 1], 7 changes the immediate of the MOV AL, 1 behind it; RET.
    let at = PAGES[1].address();
    let found: u32;
    // SAFETY: the page is this module's.
    unsafe {
        for (i, byte) in [0x31, 0xc0, 0xc6, 0x05, 1, 0, 0, 0, 7, 0xb0, 1, 0xc3]
            .into_iter()
            .enumerate()
        {
            ((at + i as u64) as *mut u8).write_volatile(byte);
        }
        asm!("call {}", in(reg) at, out("eax") found);
    }
    assert_eq!(found, 7);
}

#[guest_test]
fn atomic_operations_on_memory() {
    let at = PAGES[0].address();
    let ok: u8;
    // SAFETY: the page is this module's; RBX is kept.
    unsafe {
        (at as *mut [u64; 2]).write_volatile([1, 2]);
        asm!("xchg {b}, rbx", "lock cmpxchg16b [{at}]", "sete {ok}", "xchg {b}, rbx",
             b = inout(reg) 3u64 => _, at = in(reg) at, ok = out(reg_byte) ok,
             inout("rax") 1u64 => _, inout("rdx") 2u64 => _, in("rcx") 4u64);
        assert_eq!((ok, (at as *const [u64; 2]).read_volatile()), (1, [3, 4]));
        // A locked operation on both pages of the window.
        set_window(64, PAGES[1].address() | 3);
        let split = set_window(65, PAGES[0].address() | 3) - 2;
        (split as *mut u32).write_unaligned(0xffff);
        asm!("lock add dword ptr [{}], 1", in(reg) split);
        assert_eq!((split as *const u32).read_unaligned(), 0x1_0000);
    }
}
