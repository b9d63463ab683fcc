//! Registers and instructions: every control bit, every MSR, what a guest must not execute, debug
//! exceptions where they hurt, caches.

use crate::Random;
use core::arch::asm;
use guest_runtime::cpu::{
    self, cpuid, rdtsc, set_cr0, set_cr3, set_cr4, set_cr8, set_dr0, set_dr6, set_dr7, try_rdmsr,
    try_wrmsr,
};
use guest_runtime::pc::{APIC_BASE, LAPIC, handle_eoi, quiet, reg, set_lapic};
use guest_runtime::{Frame, Page, count, expect_fault, on_interrupt, println, set_window, window};

const EFER: u32 = 0xc000_0080;

/// The ranges in which any CPU has MSRs.
pub const RANGES: [core::ops::Range<u32>; 6] = [
    0..0x2000,
    0x4000_0000..0x4000_0200,
    0x4b56_4d00..0x4b56_4d10,
    0xc000_0000..0xc000_0400,
    0xc001_0000..0xc001_1100,
    0xffff_fff0..0xffff_ffff,
];

/// Whether the MSR names memory that a hypervisor writes to, at any time from then on.
fn is_address(index: u32) -> bool {
    matches!(index, 0x11 | 0x12 | 0x4000_0000..0x4000_0200 | 0x4b56_4d00..0x4b56_4d10)
}

/// An address like `value`, but in a page that is for that, or where this guest has no memory: one
/// that had records written over its code would harm itself.
fn aside(value: u64) -> u64 {
    static PAGE: Page = Page::zero();
    if value >> 32 == 0 {
        PAGE.address() | value & 0xfff
    } else {
        value
    }
}

/// Every MSR that is there: random values, and each bit of its value turned over.
pub fn msr_random() {
    let mut random = Random(0x0f1e_2d3c_4b5a_6978);
    let (mut taken, mut refused) = (0u32, 0u32);
    for index in RANGES.into_iter().flatten() {
        let Ok(kept) = try_rdmsr(index) else {
            continue;
        };
        for turn in 0..16u32 {
            let value = match turn {
                0..8 => random.next() >> (random.next() & 63),
                _ => kept ^ 1 << (random.next() & 63),
            };
            let value = if is_address(index) {
                aside(value)
            } else {
                value
            };
            // Long mode and the local APIC's page are what this guest itself stands on.
            if index == EFER && (value ^ kept) & 0x500 == 0 && value & 0x500 != 0x500
                || index == APIC_BASE && value & 0xff_f000 != kept & 0xff_f000
                // TSC and deadline: this guest measures by them.
                || matches!(index, 0x10 | 0x3b | 0x6e0)
            {
                continue;
            }
            // SAFETY: interrupts are off, and segment bases and system calls are not in use.
            match unsafe { try_wrmsr(index, value) } {
                Ok(()) => taken += 1,
                Err(_) => refused += 1,
            }
            let _ = try_rdmsr(index);
            // SAFETY: what was there. A mode of the local APIC may not lead straight back.
            if unsafe { try_wrmsr(index, kept) }.is_err() && index == APIC_BASE {
                // SAFETY: as above.
                unsafe {
                    let _ = try_wrmsr(index, kept & !0xc00);
                    let _ = try_wrmsr(index, kept);
                }
            }
        }
    }
    for msr in [0x4b56_4d01, 0x4b56_4d03, 0x12] {
        // SAFETY: a hypervisor must not go on writing to this guest's memory.
        let _ = unsafe { try_wrmsr(msr, 0) };
    }
    println!("hostile: {taken} taken, {refused} refused");
}

/// The bits of CR4 that every CPU has, but for PAE, and those that CPUID offers.
fn known_cr4() -> u64 {
    let [_, b, c, _] = cpuid(7, 0);
    let offered = [(b, 0, 16), (b, 7, 20), (b, 20, 21), (c, 2, 11), (c, 3, 22)];
    let more = offered
        .into_iter()
        .filter(|(word, bit, _)| word >> bit & 1 != 0)
        .fold(0, |bits, (.., bit)| bits | 1 << bit);
    0x7df | more
}

/// Bits of CR4 that CPUID does not offer, of CR3 above the physical addresses, and the upper halves
/// of DR6 and DR7: #GP on a CPU that
/// checks. QEMU's does not, and makes an exit of it that stands for an entry that failed.
pub fn reserved_bits() {
    let cr4 = cpu::cr4();
    for bit in (32..64).map(|bit| 1u64 << bit) {
        let _ = attempt!({ set_dr6(bit) });
        let _ = attempt!({ set_dr7(bit | 0x400) });
        let _ = attempt!({ set_dr7(0x400) });
        let _ = attempt!({ set_dr6(0) });
    }
    let (cr3, width) = (cpu::cr3(), cpuid(0x8000_0008, 0)[0] & 0xff);
    for bit in (width..64).map(|bit| 1u64 << bit) {
        let _ = attempt!({ set_cr3(cr3 | bit) });
        let _ = attempt!({ set_cr3(cr3) });
    }
    for bit in (0..64)
        .map(|bit| 1u64 << bit)
        .filter(|bit| bit & (known_cr4() | 0x20) == 0)
    {
        let _ = attempt!({ set_cr4(cr4 ^ bit) });
        let _ = attempt!({ set_cr4(cr4) });
    }
}

/// Every bit of CR0, CR3, CR4, CR8 and XCR0 turned over, one by one, and all at once.
pub fn cr_bits() {
    let (mut taken, mut refused) = (0u32, 0u32);
    let mut note = |faulted: bool| {
        if faulted {
            refused += 1;
        } else {
            taken += 1;
        }
    };
    let (cr0, cr3, cr4) = (cpu::cr0(), cpu::cr3(), cpu::cr4());
    for bit in (0..64).map(|bit| 1u64 << bit).chain([u64::MAX]) {
        // For all: what is taken leaves this guest runnable until the old value is back:
        // no page of it is a user's, and interrupts are off.
        // PE, PG and PAE, which a lax CPU may let go, are attacks of their own.
        if bit & 0x8000_0001 == 0 {
            note(attempt!({ set_cr0(cr0 ^ bit) }).is_some());
            let _ = attempt!({ set_cr0(cr0) });
        }
        if bit & known_cr4() != 0 && bit != u64::MAX {
            note(attempt!({ set_cr4(cr4 ^ bit) }).is_some());
            let _ = attempt!({ set_cr4(cr4) });
        }
        // Bits that choose other tables are not this attack.
        if bit < 0x1000 {
            note(attempt!({ set_cr3(cr3 ^ bit) }).is_some());
            let _ = attempt!({ set_cr3(cr3) });
        }
        note(attempt!({ set_cr8(bit) }).is_some());
        let _ = attempt!({ set_cr8(0) });
        // Their upper halves are of `reserved-bits`.
        let _ = attempt!({
            set_dr6(bit & 0xffff_ffff);
            set_dr7(bit & 0xffff_dfff);
            set_dr7(0x400);
        });
    }
    if cpuid(1, 0)[2] >> 26 & 1 != 0 {
        // SAFETY: XSAVE is there.
        unsafe { set_cr4(cr4 | 1 << 18) };
        for bit in 0..64 {
            for value in [1u64 << bit, 1 | 1 << bit, 7 ^ 1 << bit, u64::MAX << bit] {
                for index in [0u32, 1, 2, u32::MAX] {
                    note(
                        expect_fault(|| {
                            // SAFETY: this guest uses no vector registers.
                            unsafe {
                                asm!("xsetbv", in("ecx") index, in("eax") value as u32,
                                     in("edx") (value >> 32) as u32);
                            }
                        })
                        .is_some(),
                    );
                }
            }
        }
        // SAFETY: as it was.
        unsafe {
            asm!("xsetbv", in("ecx") 0, in("eax") 1, in("edx") 0);
            set_cr4(cr4);
        }
    }
    println!("hostile: {taken} taken, {refused} refused");
}

/// What long mode stands on, taken away: #GP on a CPU that checks, else whatever comes of it.
pub fn without_pe() {
    let _ = attempt!({ set_cr0(cpu::cr0() & !1) });
}

pub fn without_pg() {
    let _ = attempt!({ set_cr0(cpu::cr0() & !(1 << 31)) });
}

pub fn without_pae() {
    let _ = attempt!({ set_cr4(cpu::cr4() & !0x20) });
}

static CODE: Page = Page::zero();
/// The page of the window through which [`CODE`] is executed.
const SLOT: usize = 120;

/// Executes `code` with RAX and RDI at a page of RAM and the others 0; whatever comes of it.
fn execute(code: &[u8]) {
    let at = set_window(SLOT, CODE.address() | 3) as *mut u8;
    // SAFETY: the page is this module's; what the code does ends in an exception or comes back.
    unsafe {
        at.copy_from(code.as_ptr(), code.len());
        at.add(code.len()).write(0xc3);
        // What code finds where RAX and RDI point: as a far pointer it has a selector of nothing.
        at.add(2048)
            .cast::<u64>()
            .write_unaligned(0xffff_ffff_0000_0000);
        // Where SYSCALL goes: #UD.
        asm!("mov word ptr [{}], 0x0b0f", in(reg) 0u64, options(nostack));
    }
    let _ = attempt!({
        asm!("push rbx", "push rbp", "xor ebx, ebx", "xor ebp, ebp", "call {}", "pop rbp", "pop rbx",
             in(reg) at, inout("rax") window(SLOT) + 2048 => _, inout("rdi") window(SLOT) + 2048 => _,
             inout("rcx") 0u64 => _, inout("rdx") 0u64 => _, inout("rsi") 0u64 => _,
             out("r8") _, out("r9") _, out("r10") _, out("r11") _,
             out("r12") _, out("r13") _, out("r14") _, out("r15") _);
    });
    guest_runtime::load_idt();
    guest_runtime::segments::restore();
}

/// What a hypervisor may forget to intercept, in 64-bit mode.
pub fn exotic() {
    const CODES: &[&[u8]] = &[
        &[0x0f, 0x01, 0xc1], // vmcall
        &[0x0f, 0x01, 0xc2],
        &[0x0f, 0x01, 0xc3],
        &[0x0f, 0x01, 0xc4],
        &[0x0f, 0x01, 0xd4],
        &[0xf3, 0x0f, 0xc7, 0x30],
        &[0x66, 0x0f, 0xc7, 0x30],
        &[0x0f, 0xc7, 0x30],
        &[0x0f, 0xc7, 0x38],
        &[0x0f, 0x78, 0xd8],
        &[0x0f, 0x79, 0xd8],
        &[0x66, 0x0f, 0x38, 0x80, 0x18],
        &[0x66, 0x0f, 0x38, 0x81, 0x18],
        &[0x66, 0x0f, 0x38, 0x82, 0x18],
        &[0x0f, 0x01, 0xd8], // vmrun
        &[0x0f, 0x01, 0xd9],
        &[0x0f, 0x01, 0xda],
        &[0x0f, 0x01, 0xdb],
        &[0x0f, 0x01, 0xdc],
        &[0x0f, 0x01, 0xdd],
        &[0x0f, 0x01, 0xde],
        &[0x0f, 0x01, 0xdf],
        &[0x0f, 0x37],       // getsec
        &[0x0f, 0xaa],       // rsm
        &[0x0f, 0x01, 0xc8], // monitor
        &[0x0f, 0x01, 0xc9], // mwait
        &[0x0f, 0x01, 0xfa], // monitorx
        &[0x0f, 0x01, 0xfb], // mwaitx
        &[0x0f, 0x01, 0xcf], // encls
        &[0x0f, 0x01, 0xd7], // enclu
        &[0x0f, 0x01, 0xc0], // enclv
        &[0x0f, 0x01, 0xc5], // pconfig
        &[0x0f, 0x01, 0xee], // rdpkru
        &[0x0f, 0x01, 0xef], // wrpkru
        &[0x0f, 0x01, 0xe8], // serialize
        &[0x0f, 0x01, 0xfc], // clzero
        &[0x0f, 0x01, 0xfd], // rdpru
        &[0x0f, 0x33],       // rdpmc
        &[0x0f, 0x05],       // syscall
        &[0x0f, 0x34],       // sysenter
        &[0x48, 0x0f, 0x07], // sysretq
        &[0x48, 0x0f, 0x35], // sysexitq
        &[0x0f, 0x01, 0xf8], // swapgs
        &[0x0f, 0x01, 0xf8],
        &[0xf1], // int1
        &[0xcc],
        &[0xcd, 0x02], // int 2
        &[0xcd, 0x08],
        &[0xcd, 0x12],
        &[0xcd, 0xff],
        &[0x0f, 0xb9, 0xc0],       // ud1
        &[0x0f, 0xff, 0xc0],       // ud0
        &[0x0f, 0x00, 0xd0],       // lldt ax
        &[0x0f, 0x00, 0xd8],       // ltr ax
        &[0x8e, 0xc8],             // mov cs, ax
        &[0x8e, 0xd0],             // mov ss, ax
        &[0x0f, 0x20, 0xc8],       // mov rax, cr1
        &[0x0f, 0x22, 0xf8],       // mov cr7, rax
        &[0x0f, 0x21, 0xe0],       // mov rax, dr4
        &[0x44, 0x0f, 0x23, 0xc0], // mov dr8, rax
        &[0x0f, 0x06],             // clts
        &[0x0f, 0x01, 0xf0],       // lmsw ax
        &[0x0f, 0x09],             // wbinvd
        &[0x0f, 0x08],             // invd
        &[0xf3, 0x0f, 0x09],       // wbnoinvd
        &[0xf3, 0x0f, 0xae, 0xc0], // rdfsbase
        &[0x0f, 0xc7, 0xf0],       // rdrand
        &[0x0f, 0xc7, 0xf8],       // rdseed
        &[0xf3, 0x0f, 0xc7, 0xf8], // rdpid
        &[0xf3, 0x0f, 0xae, 0xf0], // umonitor
        &[0xf2, 0x0f, 0xae, 0xf1], // umwait
        &[0x66, 0x0f, 0xae, 0xf1], // tpause
        &[0xc7, 0xf8, 0, 0, 0, 0], // xbegin
        &[0x0f, 0x01, 0xd5],       // xend
        &[0xf0, 0x0f, 0xa2],       // lock cpuid
        &[0xf0, 0xf4],             // lock hlt
        &[
            0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x66,
            0x66, 0x90,
        ],
        &[0x2e, 0x3e, 0x26, 0x64, 0x65, 0x36, 0x0f, 0xa2], // prefixes before cpuid
        &[0x66, 0xf3, 0x0f, 0x30],                         // prefixes before wrmsr
        &[0x48, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0x80, 0xff, 0xe0], // jmp to a non-canonical address
        &[0x0f, 0xb2, 0x20],                               // lss esp, [rax]
    ];
    for code in CODES {
        execute(code);
    }
    // SAFETY: what the runtime has.
    unsafe {
        set_cr0(0x8001_0031);
        asm!("mov fs, {0:e}", "mov gs, {0:e}", in(reg) 0u32);
    }
}

/// Bytes that a die chose, as instructions, for ever. Nearly anything may come of it, to this guest.
pub fn random_code() {
    let mut random = Random(rdtsc() | 1);
    let mut turns = 0u64;
    loop {
        let mut code = [0u8; 32];
        for byte in &mut code {
            *byte = random.next() as u8;
        }
        // Half of them begin with the first byte of two-byte opcodes.
        if random.next() & 1 == 0 {
            code[0] = 0x0f;
        }
        execute(&code);
        turns += 1;
        if turns.is_multiple_of(1000) {
            println!("hostile: {turns} pieces of code");
        }
    }
}

/// #DB that is held back by a load of SS, or by STI, and meets an exit.
pub fn debug_shadow() {
    fn nothing(_: &mut Frame) {}
    static WORD: Page = Page::zero();
    on_interrupt(1, nothing);
    on_interrupt(3, nothing);
    on_interrupt(0x50, handle_eoi);
    let at = WORD.address();
    // SAFETY: the word is this function's; the selector is that of all data.
    unsafe { (at as *mut u64).write_volatile(0x10) };
    // SAFETY: a breakpoint on reads and writes of the word, with a handler.
    unsafe {
        set_dr0(at);
        set_dr7(0x402 | 3 << 16);
    }
    let before = count(1);
    macro_rules! shadowed {
        ($($code:literal),*) => {
            // SAFETY: the instructions change only the registers named.
            let _ = attempt!({
                asm!("mov {k}, rbx", "mov ss, word ptr [rsi]", $($code,)* "mov rbx, {k}",
                     k = out(reg) _, in("rsi") at, in("rdi") LAPIC + 0x30, in("dx") 0x80u16,
                     out("eax") _, out("ecx") _);
            });
        };
    }
    macro_rules! stepped {
        ($($code:literal),*) => {
            // SAFETY: as above; TF is off again at the end.
            let _ = attempt!({
                asm!("mov {k}, rbx", "pushfq", "or qword ptr [rsp], 0x100", "popfq", $($code,)*
                     "pushfq", "and qword ptr [rsp], -257", "popfq", "cli", "mov rbx, {k}",
                     k = out(reg) _, in("rsi") at, in("rdi") LAPIC + 0x30, in("dx") 0x80u16,
                     out("eax") _, out("ecx") _);
            });
        };
    }
    macro_rules! both {
        ($($code:literal),*) => {
            shadowed!($($code),*);
            stepped!($($code),*);
            stepped!("mov ss, word ptr [rsi]", $($code),*);
            stepped!("sti", $($code),*);
        };
    }
    both!("nop");
    both!("xor eax, eax", "cpuid", "mov edx, 0x80");
    both!("in al, dx");
    both!("out dx, al");
    both!("int3");
    both!(".byte 0xf1");
    both!("ud2");
    both!("mov rax, cr3", "mov cr3, rax");
    both!("mov rax, cr0", "mov cr0, rax");
    both!("mov rax, dr7", "mov dr7, rax");
    both!("wbinvd");
    both!("invlpg [rsi]");
    both!("rdtsc", "mov edx, 0x80");
    both!("pause");
    both!("mov ss, word ptr [rsi]");
    both!("mov eax, [rdi]");
    // A halt in the shadow, with a timer that ends it.
    set_lapic(reg::DIVIDE, 0xb);
    set_lapic(reg::LVT_TIMER, 1 << 17 | 0x50);
    set_lapic(reg::INITIAL, 1_000_000);
    both!("sti", "hlt");
    stepped!("sti", "hlt");
    stepped!("mov ss, word ptr [rsi]", "sti", "hlt");
    stepped!("sti", "mov ss, word ptr [rsi]", "hlt");
    set_lapic(reg::LVT_TIMER, 1 << 16);
    println!("hostile: {} debug exceptions", count(1) - before);
    // SAFETY: off again.
    unsafe { set_dr7(0x400) };
}

/// Caches on and off, thrown away, flushed, and of every type.
pub fn cache_control() {
    let (cr0, pat) = (cpu::cr0(), try_rdmsr(0x277).unwrap_or(0));
    let mut random = Random(0x1357_9bdf_0246_8ace);
    for turn in 0..200u64 {
        // SAFETY: INVD would lose what is not written back, but no cache is there that a
        // guest could hold back; the values are legal or refused.
        unsafe {
            set_cr0(cr0 | (turn & 1) << 30);
            asm!("wbinvd", "invd");
            let _ = expect_fault(|| set_cr0(cr0 & !(1 << 30) | 1 << 29));
            set_cr0(cr0);
            for index in (0x200..0x210).chain([0x250, 0x258, 0x259, 0x268, 0x26f, 0x2ff, 0x277]) {
                let value = if turn & 1 == 0 {
                    random.next()
                } else {
                    random.next() & 0x0707_0707_0707_0707
                };
                let _ = try_wrmsr(index, value);
            }
            asm!("clflush [{}]", in(reg) &raw const CODE);
        }
    }
    // SAFETY: as it was; MTRRs of a virtual machine decide nothing.
    unsafe {
        let _ = try_wrmsr(0x277, pat);
        set_cr0(cr0);
        for _ in 0..500 {
            asm!("wbinvd");
        }
    }
}

/// Hypercalls of every number, with arguments that a die chose.
pub fn hypercall_flood() {
    let mut random = Random(0x2468_ace0_1357_9bdf);
    for turn in 0..4_000u64 {
        let number = match turn & 3 {
            0 => turn >> 2,
            1 => 0x5465_0000 | random.next() & 0xff,
            2 => random.next() & 0xffff_ffff,
            _ => random.next(),
        };
        let arguments = [
            random.next(),
            random.next() & 0xffff_ffff,
            random.next() >> 60,
        ];
        // SAFETY: a hypervisor changes at most these, or refuses.
        let _ = attempt!({
            if turn & 4 == 0 {
                asm!("vmcall", inout("rax") number => _, in("rcx") arguments[0],
                     in("rdx") arguments[1], in("rsi") arguments[2], in("rdi") number,
                     out("r8") _, out("r9") _, out("r10") _, out("r11") _);
            } else {
                asm!("vmmcall", inout("rax") number => _, in("rcx") arguments[0],
                     in("rdx") arguments[1], in("rsi") arguments[2], in("rdi") number,
                     out("r8") _, out("r9") _, out("r10") _, out("r11") _);
            }
        });
    }
}

pub fn pause_flood() {
    for _ in 0..5_000 {
        core::hint::spin_loop();
    }
}

/// A stack pointer that no exception can be delivered with.
pub fn noncanonical_stack() {
    // SAFETY: the end of this guest is what is wanted.
    unsafe { asm!("mov rsp, {}", "push rax", in(reg) 1u64 << 63 | 1 << 50) };
}

pub fn idt_in_device() {
    let pointer = [0xfffu16, LAPIC as u16, (LAPIC >> 16) as u16, 0, 0];
    // SAFETY: as above.
    unsafe { asm!("lidt [{}]", "ud2", in(reg) &pointer) };
}

pub fn gdt_in_device() {
    let pointer = [0xfffu16, LAPIC as u16, (LAPIC >> 16) as u16, 0, 0];
    // SAFETY: as above.
    unsafe { asm!("lgdt [{}]", "mov ds, {:e}", in(reg) &pointer, in(reg) 0x320) };
    guest_runtime::segments::restore();
    quiet();
}
