//! The CPU's other modes, entered and left as boot code does (Intel SDM Vol. 3A chapter 9, §20):
//! compatibility mode, protected mode without paging and with each legacy kind, and real mode.
//!
//! In each, the same probe runs: CPUID, a port, the local APIC's page by an instruction that a
//! hypervisor may have to decode, and RAM.

use core::arch::global_asm;
use guest_runtime::cpu::{cpuid, inb, outb, read32};
use guest_runtime::pc::{LAPIC, init_pic, reg};
use guest_runtime::{Page, guest_test, load_idt};

global_asm!(
    ".section .text.modes, \"ax\", @progbits",
    ".code64",
    // modes_call(how: edi, cr4: esi, cr3: edx): 0 compatibility mode, 1 protected mode without
    // paging, 2 with paging, 3 real mode.
    "modes_call:",
    "push rbx",
    "push rbp",
    "push r12",
    "push r13",
    "push r14",
    "push r15",
    "mov [modes_rsp], rsp",
    "mov [modes_how], edi",
    "mov [modes_cr4], esi",
    "mov [modes_cr3], edx",
    "mov rax, cr4",
    "mov [modes_old_cr4], eax",
    "mov rax, cr3",
    "mov [modes_old_cr3], eax",
    "push 0x18",
    "lea rax, [rip + 2f]",
    "push rax",
    "retfq",
    ".code32",
    "2:",
    "mov eax, 0x10",
    "mov ds, eax",
    "mov es, eax",
    "mov ss, eax",
    "mov fs, eax",
    "cmp dword ptr [modes_how], 0",
    "jne 3f",
    "call modes_probe",
    "jmp 9f",
    "3:",
    "mov eax, cr0",
    "and eax, 0x7fffffff",
    "mov cr0, eax",
    "mov ecx, 0xc0000080",
    "rdmsr",
    "and eax, 0xfffffeff",
    "wrmsr",
    "mov eax, [modes_cr4]",
    "mov cr4, eax",
    "mov eax, [modes_cr3]",
    "mov cr3, eax",
    "cmp dword ptr [modes_how], 3",
    "je 5f",
    "cmp dword ptr [modes_how], 2",
    "jne 4f",
    "mov eax, cr0",
    "or eax, 0x80000000",
    "mov cr0, eax",
    "4:",
    "call modes_probe",
    "jmp 8f",
    "5:",
    ".byte 0xea",
    ".long 0x8000",
    ".word 0x30", // jmp 30:8000
    // Back from real mode, and from the others.
    "modes_from_real:",
    "mov eax, 0x10",
    "mov ds, eax",
    "mov es, eax",
    "mov ss, eax",
    "8:",
    "mov eax, cr0",
    "and eax, 0x7fffffff",
    "mov cr0, eax",
    "mov eax, [modes_old_cr4]",
    "mov cr4, eax",
    "mov eax, [modes_old_cr3]",
    "mov cr3, eax",
    "mov ecx, 0xc0000080",
    "rdmsr",
    "or eax, 0x100",
    "wrmsr",
    "mov eax, cr0",
    "or eax, 0x80000000",
    "mov cr0, eax",
    "9:",
    ".byte 0xea",
    ".long modes_back",
    ".word 8",
    // What runs in 32 bits.
    "modes_probe:",
    "xor eax, eax",
    "xor ecx, ecx",
    "cpuid",
    "mov [modes_result], eax",
    "mov [modes_result + 4], ebx",
    "mov dx, 0x3ff",
    "mov al, 0x3d",
    "out dx, al",
    "mov al, 0",
    "in al, dx",
    "movzx eax, al",
    "mov [modes_result + 8], eax",
    "mov eax, [0xfee00030]",
    "mov [modes_result + 12], eax",
    "mov edi, 0xfee00000",
    "mov dword ptr [edi + 0x80], 0x40",
    "add dword ptr [edi + 0x80], 0x10",
    "mov eax, [edi + 0x80]",
    "mov [modes_result + 16], eax",
    "mov dword ptr [edi + 0x80], 0",
    // The stack, and forms that 64-bit code does not have.
    "pushad",
    "popad",
    "inc eax",
    "dec eax",
    "push dword ptr [edi + 0x30]",
    "pop dword ptr [modes_result + 20]",
    "mov ecx, 0xc0000080",
    "rdmsr",
    "mov [modes_result + 24], eax",
    "mov eax, cr0",
    "mov [modes_result + 28], eax",
    "ret",
    ".code64",
    "modes_back:",
    "mov eax, 0x10",
    "mov ds, eax",
    "mov es, eax",
    "mov ss, eax",
    "xor eax, eax",
    "mov fs, eax",
    "mov rsp, [modes_rsp]",
    "pop r15",
    "pop r14",
    "pop r13",
    "pop r12",
    "pop rbp",
    "pop rbx",
    "ret",
    // What is copied to 8000H: 16-bit code, first in protected mode.
    ".code16",
    "modes_real:",
    "mov ax, 0x38",
    "mov ds, ax",
    "mov es, ax",
    "mov ss, ax",
    // FS keeps its 4 GiB.
    "mov eax, cr0",
    "and al, 0xfe",
    "mov cr0, eax",
    ".byte 0xea",
    ".word modes_real2 - modes_real + 0x8000",
    ".word 0",
    "modes_real2:",
    "xor ax, ax",
    "mov ds, ax",
    "mov es, ax",
    "mov ss, ax",
    "mov sp, 0x7f00",
    // The interrupt vector table: limit and base.
    "mov word ptr [0x7020], 0x3ff",
    "mov dword ptr [0x7022], 0",
    "lidt [0x7020]",
    "xor eax, eax",
    "xor ecx, ecx",
    "cpuid",
    "mov [0x7000], eax",
    "mov [0x7004], ebx",
    "mov dx, 0x3ff",
    "mov al, 0x3d",
    "out dx, al",
    "mov al, 0",
    "in al, dx",
    "movzx eax, al",
    "mov [0x7008], eax",
    "mov esi, 0xfee00030",
    ".byte 0x64, 0x67, 0x66, 0x8b, 0x06", // mov eax, fs:[esi]
    "mov [0x700c], eax",
    // INT 50H through the table, then a halt that IRQ 0 ends as vector 20H.
    ".byte 0xc7, 0x06",
    ".word 0x140, modes_real_int - modes_real + 0x8000", // mov word ptr [0x140], imm16
    "mov word ptr [0x142], 0",
    ".byte 0xc7, 0x06",
    ".word 0x80, modes_real_irq - modes_real + 0x8000", // mov word ptr [0x80], imm16
    "mov word ptr [0x82], 0",
    "mov dword ptr [0x7010], 0",
    "mov dword ptr [0x7014], 0",
    "int 0x50",
    "mov al, 0x30",
    "out 0x43, al",
    "mov al, 0",
    "out 0x40, al",
    "mov al, 0x10",
    "out 0x40, al",
    "modes_real_wait:",
    "sti",
    "hlt",
    "cli",
    "cmp word ptr [0x7014], 0",
    "je modes_real_wait",
    // Segments: the same byte by two of them.
    "mov ax, 0x700",
    "mov ds, ax",
    "mov al, [0x10]",
    "xor bx, bx",
    "mov ds, bx",
    "mov [0x7018], al",
    // String instructions on a port and memory.
    "cld",
    "mov di, 0x7030",
    "mov cx, 4",
    "mov dx, 0x3ff",
    "rep insb",
    "mov si, 0x7030",
    "mov di, 0x7034",
    "mov cx, 4",
    "rep movsb",
    "mov eax, cr0",
    "or al, 1",
    "mov cr0, eax",
    ".byte 0x66, 0xea",
    ".long modes_from_real",
    ".word 0x18",
    "modes_real_int:",
    "mov word ptr [0x7010], 0x5050",
    "iret",
    "modes_real_irq:",
    "inc word ptr [0x7014]",
    "push ax",
    "mov al, 0x20",
    "out 0x20, al",
    "pop ax",
    "iret",
    "modes_real_end:",
    ".code64",
    ".section .bss.modes, \"aw\", @nobits",
    ".balign 8",
    "modes_rsp: .skip 8",
    "modes_how: .skip 4",
    "modes_cr4: .skip 4",
    "modes_cr3: .skip 4",
    "modes_old_cr4: .skip 4",
    "modes_old_cr3: .skip 4",
    ".globl modes_result",
    "modes_result: .skip 32",
    ".text",
);

unsafe extern "C" {
    fn modes_call(how: u32, cr4: u32, cr3: u32);
    static mut modes_result: [u32; 8];
    static modes_real: u8;
    static modes_real_end: u8;
}

static TABLES: [Page; 5] = [const { Page::zero() }; 5];

/// Runs the probe and checks what it saw, and what EFER and CR0 were.
fn probe(how: u32, cr4: u32, cr3: u64, efer: u32, paging: bool) {
    // SAFETY: the callers' tables map the low 4 GiB one to one, as long as there is paging at all.
    let found = unsafe {
        modes_result = [0; 8];
        modes_call(how, cr4, cr3 as u32);
        (&raw const modes_result).read_volatile()
    };
    let [leaf, vendor, ..] = cpuid(0, 0);
    // SAFETY: the local APIC's page is mapped.
    let version = unsafe { read32(LAPIC + u64::from(reg::VERSION)) };
    assert_eq!(found[..6], [leaf, vendor, 0x3d, version, 0x50, version]);
    assert_eq!(found[6] & 0xd00, efer, "EFER");
    assert_eq!((found[7] & 1, found[7] >> 31 != 0), (1, paging), "CR0");
    // SAFETY: EFER exists.
    let efer = unsafe { guest_runtime::cpu::rdmsr(crate::util::EFER) };
    assert_eq!(efer & 0xd00, 0xd00);
}

#[guest_test]
fn mode_compatibility() {
    for _ in 0..3 {
        probe(0, 0, 0, 0xd00, true);
    }
}

#[guest_test]
fn mode_protected_without_paging() {
    for _ in 0..3 {
        probe(1, 0, 0, 0x800, false);
    }
}

#[guest_test]
fn mode_protected_with_4_mib_pages() {
    let [directory, ..] = &TABLES;
    for i in 0..1024u64 {
        // SAFETY: the page is this module's, and not in use yet.
        unsafe {
            ((directory.address() + 4 * i) as *mut u32).write_volatile((i as u32) << 22 | 0x83)
        };
    }
    probe(2, 0x10, directory.address(), 0x800, true);
}

#[guest_test]
fn mode_protected_with_4_kib_pages() {
    // 4 MiB pages but for the first four of them, where the program is, and which one table maps.
    let [directory, tables @ ..] = &TABLES;
    for i in 0..1024u64 {
        let entry = match tables.get(i as usize) {
            Some(table) => table.address() as u32 | 3,
            None => (i as u32) << 22 | 0x83,
        };
        // SAFETY: the pages are this module's, and not in use yet.
        unsafe {
            ((directory.address() + 4 * i) as *mut u32).write_volatile(entry);
            for (t, table) in tables.iter().enumerate() {
                let frame = (t as u32) << 22 | (i as u32) << 12;
                ((table.address() + 4 * i) as *mut u32).write_volatile(frame | 3);
            }
        }
    }
    probe(2, 0x10, directory.address(), 0x800, true);
}

#[guest_test]
fn mode_protected_with_pae() {
    let [pointers, directories @ ..] = &TABLES;
    for (i, directory) in directories.iter().enumerate() {
        for j in 0..512u64 {
            let frame = (i as u64) << 30 | j << 21;
            // SAFETY: the page is this module's, and not in use yet.
            unsafe { ((directory.address() + 8 * j) as *mut u64).write_volatile(frame | 0x83) };
        }
        // SAFETY: as above. Only P may be set in these.
        unsafe {
            ((pointers.address() + 8 * i as u64) as *mut u64)
                .write_volatile(directory.address() | 1)
        };
    }
    probe(2, 0x20, pointers.address(), 0x800, true);
}

#[guest_test]
fn mode_real() {
    const LOW: usize = 0x7000;
    const SIZE: usize = 0x2000;
    static mut KEPT: [u8; SIZE] = [0; SIZE];
    static mut VECTORS: [u8; 1024] = [0; 1024];
    init_pic(1, 0xfe, 0xff);
    // SAFETY: what lies in the low pages and the vector table is put back; the code fits; IRQ 0
    // comes by LINT0. The IDT register is loaded again.
    let found = unsafe {
        (&raw mut KEPT)
            .cast::<u8>()
            .copy_from(LOW as *const u8, SIZE);
        // The vector table begins at address 0, to which no Rust pointer may point.
        copy_bytes((&raw mut VECTORS) as u64, 0, 1024);
        let length = &raw const modes_real_end as usize - &raw const modes_real as usize;
        (0x8000 as *mut u8).copy_from(&raw const modes_real, length);
        outb(0x3ff, 0);
        modes_call(3, 0, 0);
        load_idt();
        let found = (LOW as *const [u32; 16]).read_volatile();
        (LOW as *mut u8).copy_from((&raw const KEPT).cast(), SIZE);
        copy_bytes(0, (&raw const VECTORS) as u64, 1024);
        found
    };
    let [leaf, vendor, ..] = cpuid(0, 0);
    // SAFETY: the local APIC's page is mapped.
    let version = unsafe { read32(LAPIC + u64::from(reg::VERSION)) };
    assert_eq!(found[..4], [leaf, vendor, 0x3d, version]);
    assert_eq!(found[4], 0x5050, "INT through the vector table");
    assert_eq!(found[5], 1, "one interrupt ended the halt");
    assert_eq!(found[6] & 0xff, 0x50, "segment base");
    assert_eq!(found[12..14], [0x3d3d_3d3d, 0x3d3d_3d3d], "strings");
    // SAFETY: reads the scratch register.
    assert_eq!(unsafe { inb(0x3ff) }, 0x3d);
}

/// Copies bytes between addresses of which one may be 0.
///
/// # Safety
/// Both ranges are the caller's.
unsafe fn copy_bytes(to: u64, from: u64, count: u64) {
    // SAFETY: promised by the caller.
    unsafe {
        core::arch::asm!("rep movsb", inout("rdi") to => _, inout("rsi") from => _, inout("rcx") count => _);
    }
}
