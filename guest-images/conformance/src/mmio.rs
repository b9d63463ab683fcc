//! Every form in which a compiler touches memory, on registers in memory: the same instruction on
//! a device and on RAM must give the same result, registers and flags.
//!
//! The 32-bit register is the local APIC's initial count, which keeps all its bits (the timer is
//! masked). Bytes and words are those of the host bridge's configuration space, by ECAM.

use crate::acpi::ecam;
use crate::util::need;
use core::arch::asm;
use guest_runtime::cpu::{inb, outb, outl, read32, write32};
use guest_runtime::pc::{LAPIC, reg};
use guest_runtime::{Page, guest_test, set_window, window};

const REGISTER: u64 = LAPIC + reg::INITIAL as u64;
static RAM: Page = Page::zero();
static CODE: [Page; 2] = [const { Page::zero() }; 2];

/// CF, PF, ZF, SF, OF. AF is left out: it is undefined after logic.
const FLAGS: u64 = 0x8c5;
const CF: u64 = 1;
const NONE: u64 = 0;
const VALUES: [(u32, u64, u64); 5] = [
    (0, 0, 0),
    (0x1234_5678, 0xffff_ffff_8765_4321, 3),
    (0xffff_ffff, 1, 31),
    (0x8000_0000, 0x8000_0000, 17),
    (0x7fff_ffff, 0x7fff_ffff, 7),
];

/// Runs instructions with RDI at a 32-bit register: what it holds then, RAX, RCX, RDX, flags.
macro_rules! run {
    ($address:expr, $input:expr, $($code:literal),+) => {{
        let (value, a, c): (u32, u64, u64) = $input;
        let (ra, rc, rd, flags): (u64, u64, u64, u64);
        // SAFETY: the register is the guest's own, and the timer behind it masked; the stack is
        // balanced.
        unsafe {
            write32($address, value);
            asm!("stc", $($code,)+ "pushfq", "pop {flags}",
                 flags = lateout(reg) flags, out("r9") _, out("r12") _, out("r13") _, out("r15") _,
                 inout("rdi") $address => _, inout("rsi") 0u64 => _,
                 inout("rax") a => ra, inout("rcx") c => rc, inout("rdx") 0x5555_5555_5555_5555_u64 => rd);
            (read32($address), ra, rc, rd, flags)
        }
    }};
}

/// Compares the instructions on the device's register and on RAM.
macro_rules! same {
    ($mask:expr; $($code:literal),+) => {
        for input in VALUES {
            let found = run!(REGISTER, input, $($code),+);
            let wanted = run!(RAM.address(), input, $($code),+);
            let cut = |r: (u32, u64, u64, u64, u64)| (r.0, r.1, r.2, r.3, r.4 & $mask);
            assert_eq!(cut(found), cut(wanted), concat!($($code, "; "),+, "{:x?}"), input);
        }
    };
}

#[guest_test]
fn mmio_mov() {
    same!(NONE; "mov eax, [rdi]");
    same!(NONE; "mov [rdi], eax");
    same!(NONE; "mov dword ptr [rdi], 0x12345678");
    same!(NONE; "mov r9d, [rdi]", "mov eax, r9d");
    same!(NONE; "mov r15, rax", "mov [rdi], r15d");
    same!(NONE; "movsxd rax, dword ptr [rdi]");
    same!(NONE; "movnti [rdi], eax");
}

#[guest_test]
fn mmio_mov_addressing() {
    same!(NONE; "mov rsi, rcx", "sub rdi, rcx", "mov eax, [rdi + rsi]");
    same!(NONE; "sub rdi, 0x100", "mov eax, [rdi + 0x100]");
    same!(NONE; "mov esi, 4", "sub rdi, 0x30", "mov eax, [rdi + rsi * 8 + 0x10]");
    same!(NONE; "mov eax, [edi]");
    same!(NONE; "mov r12, rdi", "mov [r12], eax");
    same!(NONE; "mov r13, rdi", "mov eax, [r13]");
    same!(NONE; "lea rsi, [rdi - 8]", "mov eax, [rsi + 8]");
    // The accumulator with an absolute address.
    let (found, wanted): (u64, u64);
    // SAFETY: the register is the guest's own.
    unsafe {
        write32(REGISTER, 0x1357_9bdf);
        asm!("movabs eax, [0xfee00380]", out("rax") found);
        wanted = u64::from(read32(REGISTER));
    }
    assert_eq!(found, wanted);
}

#[guest_test]
fn mmio_arithmetic_to_register() {
    same!(FLAGS; "add eax, [rdi]");
    same!(FLAGS; "adc eax, [rdi]");
    same!(FLAGS; "sub eax, [rdi]");
    same!(FLAGS; "sbb eax, [rdi]");
    same!(FLAGS; "and eax, [rdi]");
    same!(FLAGS; "or eax, [rdi]");
    same!(FLAGS; "xor eax, [rdi]");
    same!(FLAGS; "cmp eax, [rdi]");
}

#[guest_test]
fn mmio_arithmetic_to_memory() {
    same!(FLAGS; "add [rdi], eax");
    same!(FLAGS; "adc [rdi], eax");
    same!(FLAGS; "sub [rdi], eax");
    same!(FLAGS; "sbb [rdi], eax");
    same!(FLAGS; "and [rdi], eax");
    same!(FLAGS; "or [rdi], eax");
    same!(FLAGS; "xor [rdi], eax");
    same!(FLAGS; "cmp [rdi], eax");
    same!(FLAGS; "test [rdi], eax");
}

#[guest_test]
fn mmio_arithmetic_with_immediate() {
    same!(FLAGS; "add dword ptr [rdi], 0x12345678");
    same!(FLAGS; "adc dword ptr [rdi], -1");
    same!(FLAGS; "sub dword ptr [rdi], 5");
    same!(FLAGS; "sbb dword ptr [rdi], 0x7fffffff");
    same!(FLAGS; "and dword ptr [rdi], -16");
    same!(FLAGS; "or dword ptr [rdi], 0x10000");
    same!(FLAGS; "xor dword ptr [rdi], 0x55555555");
    same!(FLAGS; "cmp dword ptr [rdi], 0");
    same!(FLAGS; "test dword ptr [rdi], 0x8000");
}

#[guest_test]
fn mmio_arithmetic_of_one_operand() {
    same!(FLAGS; "inc dword ptr [rdi]");
    same!(FLAGS; "dec dword ptr [rdi]");
    same!(FLAGS; "neg dword ptr [rdi]");
    same!(CF; "not dword ptr [rdi]");
}

#[guest_test]
fn mmio_locked() {
    same!(FLAGS; "lock add [rdi], eax");
    same!(FLAGS; "lock or dword ptr [rdi], 1");
    same!(FLAGS; "lock inc dword ptr [rdi]");
    same!(FLAGS; "lock xadd [rdi], eax");
    same!(CF; "lock bts dword ptr [rdi], 5");
}

#[guest_test]
fn mmio_exchange() {
    same!(CF; "xchg [rdi], eax");
    same!(CF; "xchg [rdi], ecx");
    same!(FLAGS; "xadd [rdi], eax");
    same!(FLAGS; "cmpxchg [rdi], ecx");
    // With an accumulator that agrees.
    same!(FLAGS; "mov eax, [rdi]", "cmpxchg [rdi], ecx");
}

#[guest_test]
fn mmio_bits() {
    same!(CF; "bt dword ptr [rdi], 7");
    same!(CF; "bts dword ptr [rdi], 31");
    same!(CF; "btr dword ptr [rdi], 0");
    same!(CF; "btc dword ptr [rdi], 16");
    // Register offsets below 32 stay in the register.
    same!(CF; "bt [rdi], ecx");
    same!(CF; "bts [rdi], ecx");
    same!(CF; "btr [rdi], ecx");
    same!(CF; "btc [rdi], ecx");
}

#[guest_test]
fn mmio_conditional_move_and_swap() {
    same!(NONE; "cmovc eax, [rdi]");
    same!(NONE; "cmovnc eax, [rdi]");
}

#[guest_test]
fn mmio_multiply_and_shift() {
    same!(CF; "imul eax, [rdi]");
    same!(CF; "imul eax, [rdi], 17");
    same!(CF; "mul dword ptr [rdi]");
    same!(CF; "shl dword ptr [rdi], 1");
    same!(CF; "shr dword ptr [rdi], 5");
    same!(CF; "sar dword ptr [rdi], 3");
    same!(CF; "rol dword ptr [rdi], 7");
}

#[guest_test]
fn mmio_strings_of_one() {
    same!(NONE; "stosd");
    same!(NONE; "mov ecx, 1", "rep stosd");
    same!(NONE; "mov rsi, rdi", "lodsd");
    same!(FLAGS; "scasd");
    same!(NONE; "std", "stosd", "cld");
    same!(NONE; "xor ecx, ecx", "rep stosd");
    static SOURCE: [u32; 2] = [0xcafe_f00d, 0x0bad_cafe];
    for (address, repeat) in [(REGISTER, false), (REGISTER, true), (RAM.address(), false)] {
        let (from, to): (u64, u64);
        // SAFETY: one element goes to the register.
        unsafe {
            if repeat {
                asm!("rep movsd", inout("rsi") &raw const SOURCE => from, inout("rdi") address => to, inout("rcx") 1u64 => _);
            } else {
                asm!("movsd", inout("rsi") &raw const SOURCE => from, inout("rdi") address => to);
            }
            assert_eq!(read32(address), SOURCE[0]);
        }
        assert_eq!((from, to), (&raw const SOURCE as u64 + 4, address + 4));
    }
    // From the device to RAM, and a comparison of both.
    let flags: u64;
    // SAFETY: one element comes from the register; the page is this module's.
    unsafe {
        write32(REGISTER, 0x600d_f00d);
        asm!("movsd", inout("rsi") REGISTER => _, inout("rdi") RAM.address() => _);
        assert_eq!(read32(RAM.address()), 0x600d_f00d);
        asm!("cmpsd", "pushfq", "pop {}", out(reg) flags, inout("rsi") REGISTER => _, inout("rdi") RAM.address() => _);
    }
    assert_eq!(flags & 0x41, 0x40);
}

fn bridge() -> u64 {
    let Some((base, ..)) = ecam() else {
        guest_runtime::skip("no MCFG")
    };
    need(base < 1 << 32, "ECAM below 4 GiB");
    base
}

/// Copies the host bridge's header to RAM, as the model to compare with.
fn copy_of_bridge() -> (u64, u64) {
    let base = bridge();
    for offset in (0..64).step_by(4) {
        // SAFETY: reading configuration space has no side effect; the page is this module's.
        unsafe { write32(RAM.address() + offset, read32(base + offset)) };
    }
    (base, RAM.address())
}

/// Runs instructions that only read, with RDI at the bridge and at its copy.
macro_rules! same_read {
    ($($code:literal),+) => {{
        let (device, copy) = copy_of_bridge();
        for offset in [0u64, 2, 8, 0xe] {
            let one = |address: u64| {
                let (ra, flags): (u64, u64);
                // SAFETY: reads configuration space or its copy.
                unsafe {
                    asm!("test eax, eax", $($code,)+ "pushfq", "pop {flags}", flags = lateout(reg) flags,
                         inout("rdi") address => _, inout("rsi") address => _, out("rcx") _,
                         inout("rax") 0x1122_3344_5566_7788_u64 => ra);
                }
                (ra, flags & FLAGS)
            };
            assert_eq!(one(device + offset), one(copy + offset), concat!($($code, "; "),+, "+{}"), offset);
        }
    }};
}

#[guest_test]
fn mmio_bytes_and_words() {
    same_read!("mov al, [rdi]");
    same_read!("mov ah, [rdi]");
    same_read!("mov ax, [rdi]");
    same_read!("movzx eax, byte ptr [rdi]");
    same_read!("movzx rax, byte ptr [rdi]");
    same_read!("movzx eax, word ptr [rdi]");
    same_read!("movzx ax, byte ptr [rdi]");
    same_read!("movsx eax, byte ptr [rdi]");
    same_read!("movsx rax, byte ptr [rdi]");
    same_read!("movsx eax, word ptr [rdi]");
    same_read!("movsx rax, word ptr [rdi]");
    same_read!("cmp al, [rdi]");
    same_read!("cmp byte ptr [rdi], 0x29");
    same_read!("test byte ptr [rdi], 0x86");
    same_read!("test word ptr [rdi], 0x8000");
    same_read!("add ax, [rdi]");
    same_read!("or al, [rdi]");
    same_read!("lodsb");
    same_read!("lodsw");
}

#[guest_test]
fn mmio_quadwords() {
    let (device, copy) = copy_of_bridge();
    for offset in [0, 8, 0x28] {
        let one = |address: u64| {
            let (moved, pushed, added): (u64, u64, u64);
            // SAFETY: reads configuration space or its copy; the stack is balanced.
            unsafe {
                asm!("mov {}, [{}]", out(reg) moved, in(reg) address);
                asm!("push qword ptr [{}]", "pop {}", in(reg) address, out(reg) pushed);
                asm!("add {}, [{}]", inout(reg) 1u64 => added, in(reg) address);
            }
            (moved, pushed, added)
        };
        assert_eq!(one(device + offset), one(copy + offset));
    }
    // A pop into the device: identity and class, which are read-only.
    let stack: u64;
    // SAFETY: writes to read-only registers; the stack is balanced.
    unsafe {
        asm!("mov {k}, rsp", "push -1", "pop qword ptr [{a}]", "sub {k}, rsp", k = out(reg) stack, a = in(reg) device + 0x28);
        assert_eq!(read32(device), read32(copy));
    }
    assert_eq!(stack, 0);
}

#[guest_test]
fn mmio_rep_movs_to_ram() {
    let (device, copy) = copy_of_bridge();
    let to = RAM.address() + 1024;
    let clear = || {
        (0..64).step_by(4).for_each(|i| {
            // SAFETY: the page is this module's.
            unsafe { write32(to + i, 0x0dd0_dead) }
        })
    };
    let check = |name: &str| {
        (0..64).step_by(4).for_each(|i| {
            // SAFETY: as above.
            unsafe { assert_eq!(read32(to + i), read32(copy + i), "{name} +{i}") }
        })
    };
    macro_rules! copy {
        ($code:literal, $count:expr) => {
            clear();
            let left: u64;
            // SAFETY: 64 bytes go from configuration space to the module's page.
            unsafe { asm!($code, inout("rsi") device => _, inout("rdi") to => _, inout("rcx") $count => left) };
            assert_eq!(left, 0);
            check($code);
        };
    }
    copy!("rep movsb", 64u64);
    copy!("rep movsw", 32u64);
    copy!("rep movsd", 16u64);
    copy!("rep movsq", 8u64);
    clear();
    // SAFETY: as above, from the end down.
    unsafe {
        asm!("std", "rep movsd", "cld", inout("rsi") device + 60 => _, inout("rdi") to + 60 => _, inout("rcx") 16u64 => _);
    }
    check("backwards");
}

#[guest_test]
fn mmio_rep_across_the_page_of_the_destination() {
    let (device, copy) = copy_of_bridge();
    // Two pages of the window that are the same frame: the middle of the copy lies on its border.
    set_window(30, RAM.address() | 3);
    let at = set_window(31, CODE[0].address() | 3) - 32;
    // SAFETY: 64 bytes go to the module's two pages.
    unsafe {
        asm!("rep movsb", inout("rsi") device => _, inout("rdi") at => _, inout("rcx") 64u64 => _);
        for i in (0..64).step_by(4) {
            assert_eq!(read32(at + i), read32(copy + i), "+{i}");
        }
    }
}

/// A byte of configuration space that keeps all its bits: an interrupt line, if any has one.
fn line() -> Option<u64> {
    let (base, ..) = ecam()?;
    (0..32u64)
        .flat_map(|device| (0..8).map(move |function| device << 15 | function << 12))
        .find_map(|at| {
            // SAFETY: the interrupt line is a scratch byte for software.
            unsafe {
                if read32(base + at) == u32::MAX {
                    return None;
                }
                outl(0xcf8, 1 << 31 | (at >> 4) as u32 & 0xff_ff00 | 0x3c);
                let kept = inb(0xcfc);
                outb(0xcfc, 0xa5);
                let found = inb(0xcfc);
                outb(0xcfc, kept);
                (found == 0xa5).then_some(base + at + 0x3c)
            }
        })
}

#[guest_test]
fn mmio_byte_writes() {
    let Some(address) = line() else {
        guest_runtime::skip("no byte that keeps its bits")
    };
    let byte = address as *mut u8;
    // SAFETY: the byte is a scratch one, and gets its value back.
    let kept = unsafe { byte.read_volatile() };
    macro_rules! form {
        ($($code:literal),+) => {
            for (value, a) in [(0u8, 0u64), (0x7f, 0x81), (0x80, 0x80), (0xff, 0x1ff)] {
                let one = |byte: *mut u8| {
                    let (ra, flags): (u64, u64);
                    // SAFETY: as above.
                    unsafe {
                        byte.write_volatile(value);
                        asm!("stc", $($code,)+ "pushfq", "pop {flags}", flags = lateout(reg) flags,
                             inout("rdi") byte => _, inout("rax") a => ra, inout("rcx") 1u64 => _);
                        (byte.read_volatile(), ra, flags & FLAGS)
                    }
                };
                let (found, wanted) = (one(byte), one(RAM.address() as *mut u8));
                assert_eq!(found, wanted, concat!($($code, "; "),+, "{:x} {:x}"), value, a);
            }
        };
    }
    form!("mov [rdi], al");
    form!("mov byte ptr [rdi], 0x5a");
    form!("mov [rdi], ah");
    form!("xchg [rdi], al");
    form!("add [rdi], al");
    form!("sub byte ptr [rdi], 1");
    form!("and byte ptr [rdi], 0x3c");
    form!("or [rdi], al");
    form!("xor [rdi], ah");
    form!("inc byte ptr [rdi]");
    form!("dec byte ptr [rdi]");
    form!("not byte ptr [rdi]");
    form!("neg byte ptr [rdi]");
    form!("setc byte ptr [rdi]");
    form!("setnc byte ptr [rdi]");
    form!("stosb");
    form!("rep stosb");
    form!("xadd [rdi], al");
    form!("cmpxchg [rdi], cl");
    // SAFETY: the old value.
    unsafe { byte.write_volatile(kept) };
}

/// Puts code so that it crosses from one page of the window to the next, `before` bytes before the
/// border; the frames are not neighbours in order.
fn code_across(code: &[u8], before: u64) -> u64 {
    let [second, first] = &CODE;
    for (page, index) in [(first, 10), (second, 11)] {
        set_window(index, page.address() | 3);
    }
    let at = window(11) - before;
    for (i, &byte) in code.iter().enumerate() {
        // SAFETY: the two pages are this module's.
        unsafe { ((at + i as u64) as *mut u8).write_volatile(byte) };
    }
    at
}

#[guest_test]
fn mmio_instruction_across_a_page() {
    // MOV EAX, [RDI + 0]; RET, and MOV DWORD [RDI + 0], 12345678H; RET.
    let load = [0x8b, 0x87, 0, 0, 0, 0, 0xc3];
    let store = [0xc7, 0x87, 0, 0, 0, 0, 0x78, 0x56, 0x34, 0x12, 0xc3];
    for before in 1..10 {
        // SAFETY: the code is the two instructions above.
        unsafe {
            write32(REGISTER, 0x4242_0000 + before as u32);
            if before < 6 {
                let found: u32;
                asm!("call {}", in(reg) code_across(&load, before), in("rdi") REGISTER, out("eax") found);
                assert_eq!(found, 0x4242_0000 + before as u32);
            }
            asm!("call {}", in(reg) code_across(&store, before), in("rdi") REGISTER);
            assert_eq!(read32(REGISTER), 0x1234_5678);
        }
    }
}

#[guest_test]
fn cpuid_across_a_page() {
    // CPUID; RET, with the border in the middle of CPUID: a hypervisor may need the second byte.
    let at = code_across(&[0x0f, 0xa2, 0xc3], 1);
    let found: u32;
    // SAFETY: the code is the two instructions above; RBX is kept.
    unsafe {
        asm!("push rbx", "call {}", "pop rbx", in(reg) at, inout("eax") 0 => found, inout("ecx") 0 => _, out("edx") _);
    }
    assert_eq!(found, guest_runtime::cpu::cpuid(0, 0)[0]);
}

#[guest_test]
fn mmio_by_another_virtual_address() {
    let page = set_window(20, LAPIC | 3);
    // SAFETY: the page is the local APIC's under another address.
    unsafe {
        write32(page + u64::from(reg::INITIAL), 0x1122_3344);
        assert_eq!(read32(REGISTER), 0x1122_3344);
    }
    // RIP-relative: MOV EAX, [RIP + displacement]; RET.
    set_window(10, CODE[0].address() | 3);
    let at = window(10);
    let displacement = (page + u64::from(reg::INITIAL)).wrapping_sub(at + 6) as u32;
    let found: u32;
    // SAFETY: the page is this module's, and its code the instructions above.
    unsafe {
        for (i, byte) in [0x8b, 0x05]
            .into_iter()
            .chain(displacement.to_le_bytes())
            .chain([0xc3])
            .enumerate()
        {
            ((at + i as u64) as *mut u8).write_volatile(byte);
        }
        asm!("call {}", in(reg) at, out("eax") found);
    }
    assert_eq!(found, 0x1122_3344);
}

#[guest_test]
fn mmio_with_a_segment_base() {
    let found: u32;
    // SAFETY: the base is put back; the register is the guest's own.
    unsafe {
        write32(REGISTER, 0x5566_7788);
        let kept = guest_runtime::cpu::rdmsr(0xc000_0101);
        guest_runtime::cpu::wrmsr(0xc000_0101, LAPIC);
        asm!("mov {:e}, gs:[0x380]", out(reg) found);
        guest_runtime::cpu::wrmsr(0xc000_0101, kept);
    }
    assert_eq!(found, 0x5566_7788);
}

#[guest_test]
fn mmio_fault_comes_before_the_access() {
    use guest_runtime::expect_fault;
    // MOVSD from the device to a page that is not there: the page fault is the guest's.
    let hole = set_window(40, 0);
    // SAFETY: the fault is expected.
    let fault = expect_fault(|| unsafe {
        asm!("movsd", inout("rsi") REGISTER => _, inout("rdi") hole => _);
    });
    crate::util::assert_fault(fault, crate::util::vector::PF, 2);
    assert_eq!(fault.map(|fault| fault.address), Some(hole));
    let read_only = set_window(41, LAPIC | 1);
    // SAFETY: the fault is expected.
    let fault = expect_fault(|| unsafe { write32(read_only + u64::from(reg::INITIAL), 0) });
    crate::util::assert_fault(fault, crate::util::vector::PF, 3);
}
