//! Attacks from the modes that a 64-bit guest has left behind: real, protected with and without
//! paging, PAE, compatibility, virtual-8086; and hardware task switches.
//!
//! [`visit`] goes down to 32-bit protected mode without paging, calls a routine, and comes back.
//! Routines that try instructions keep in EBP (or BP) where to go on after an exception; the
//! handlers of all vectors go there, with the stack as it was.

use core::arch::asm;
use guest_runtime::cpu::rdmsr;
use guest_runtime::{Page, load_idt, segments};

core::arch::global_asm!(
    ".macro try bytes:vararg",
    "mov eax, [hostile_pd]",
    ".byte 0xbd", // mov ebp, imm32
    ".long 9f",
    ".byte \\bytes",
    "9:",
    ".endm",
    // All instructions of both extensions; operands at [EAX], which is a page of RAM.
    ".macro virt_all",
    "try 0x0f, 0x01, 0xc1",             // vmcall
    "try 0x0f, 0x01, 0xc2",             // vmlaunch
    "try 0x0f, 0x01, 0xc3",             // vmresume
    "try 0x0f, 0x01, 0xc4",             // vmxoff
    "try 0x0f, 0x01, 0xd4",             // vmfunc
    "try 0xf3, 0x0f, 0xc7, 0x30",       // vmxon [eax]
    "try 0x66, 0x0f, 0xc7, 0x30",       // vmclear [eax]
    "try 0x0f, 0xc7, 0x30",             // vmptrld [eax]
    "try 0x0f, 0xc7, 0x38",             // vmptrst [eax]
    "try 0x0f, 0x78, 0xd8",             // vmread eax, ebx
    "try 0x0f, 0x79, 0xd8",             // vmwrite ebx, eax
    "try 0x66, 0x0f, 0x38, 0x80, 0x18", // invept ebx, [eax]
    "try 0x66, 0x0f, 0x38, 0x81, 0x18", // invvpid ebx, [eax]
    "try 0x66, 0x0f, 0x38, 0x82, 0x18", // invpcid ebx, [eax]
    "try 0x0f, 0x01, 0xd8",             // vmrun
    "try 0x0f, 0x01, 0xd9",             // vmmcall
    "try 0x0f, 0x01, 0xda",             // vmload
    "try 0x0f, 0x01, 0xdb",             // vmsave
    "try 0x0f, 0x01, 0xdc",             // stgi
    "try 0x0f, 0x01, 0xdd",             // clgi
    "try 0x0f, 0x01, 0xde",             // skinit
    "try 0x0f, 0x01, 0xdf",             // invlpga
    "try 0x0f, 0x37",                   // getsec
    "try 0x0f, 0xaa",                   // rsm
    "try 0x0f, 0x01, 0xc8",             // monitor
    "try 0x0f, 0x01, 0xc9",             // mwait
    "try 0x0f, 0x01, 0xd1",             // xsetbv
    "try 0x0f, 0x0b",                   // ud2
    "try 0xcc",                         // int3
    "try 0x0f, 0x30",                   // wrmsr
    "try 0x0f, 0x33",                   // rdpmc
    "try 0x0f, 0x05",                   // syscall
    "try 0x0f, 0x07",                   // sysret
    "try 0x0f, 0x34",                   // sysenter
    "try 0x0f, 0x35",                   // sysexit
    ".endm",
    ".text",
    ".code64",
    "hostile_visit:", // rdi = routine, rsi = not 0: in compatibility mode
    "push rbx",
    "push rbp",
    "push r12",
    "push r13",
    "push r14",
    "push r15",
    "mov [hostile_rsp], rsp",
    "mov rax, cr3",
    "mov [hostile_cr3], rax",
    "mov rax, cr4",
    "mov [hostile_cr4], rax",
    "push 0x18",
    ".byte 0x68", // push imm32
    ".long 2f",
    ".byte 0x48, 0xcb", // retfq
    ".code32",
    "2:",
    "mov eax, 0x10",
    "mov ds, eax",
    "mov es, eax",
    "mov ss, eax",
    "test esi, esi",
    "jz 4f",
    "call edi",
    "jmp 5f",
    "4:",
    "mov eax, cr0",
    "and eax, 0x7fffffff",
    "mov cr0, eax",
    "mov ecx, 0xc0000080",
    "rdmsr",
    "and eax, 0xfffffeff",
    "wrmsr",
    "mov eax, cr4",
    "and eax, 0xffffffdf",
    "mov cr4, eax",
    "call edi",
    "mov eax, cr0",
    "and eax, 0x7fffffff",
    "mov cr0, eax",
    "mov eax, [hostile_cr4]",
    "mov cr4, eax",
    "mov eax, [hostile_cr3]",
    "mov cr3, eax",
    "mov ecx, 0xc0000080",
    "rdmsr",
    "or eax, 0x100",
    "wrmsr",
    "mov eax, cr0",
    "or eax, 0x80000000",
    "mov cr0, eax",
    "5:",
    "lgdt [guest_gdt_pointer]",
    ".byte 0xea",
    ".long 3f",
    ".word 8",
    ".code64",
    "3:",
    "mov eax, 0x10",
    "mov ds, eax",
    "mov es, eax",
    "mov ss, eax",
    "mov rsp, [hostile_rsp]",
    "pop r15",
    "pop r14",
    "pop r13",
    "pop r12",
    "pop rbp",
    "pop rbx",
    "ret",
    ".code32",
    // With no IDT nothing can be delivered, in whatever mode this is.
    "hostile_triple:",
    "lidt [hostile_none]",
    "ud2",
    // ESI was 0; the page directory is in hostile_pd, the PAE root in hostile_pdpt.
    "hostile_triple_paging:",
    "mov eax, cr4",
    "or eax, 0x10",
    "mov cr4, eax",
    "mov eax, [hostile_pd]",
    "mov cr3, eax",
    "mov eax, cr0",
    "or eax, 0x80000000",
    "mov cr0, eax",
    "jmp hostile_triple",
    "hostile_triple_pae:",
    "lidt [hostile_none]",
    "mov eax, cr4",
    "or eax, 0x20",
    "mov cr4, eax",
    "mov eax, [hostile_pdpt]",
    "mov cr3, eax",
    "mov eax, cr0",
    "or eax, 0x80000000",
    "mov cr0, eax",
    "jmp hostile_triple",
    "hostile_virt32:",
    "lgdt [hostile_gdt_pointer]",
    "lidt [hostile_idt]",
    "mov [hostile_sp], esp",
    "mov eax, [hostile_pd]",
    "xor ebx, ebx",
    "xor ecx, ecx",
    "xor edx, edx",
    "virt_all",
    "mov esp, [hostile_sp]",
    "ret",
    "hostile_handler:",
    "mov esp, [hostile_sp]",
    "jmp ebp",
    // Virtual-8086 mode at 800:0, the stack below it.
    "hostile_v86:",
    "lgdt [hostile_gdt_pointer]",
    "lidt [hostile_idt]",
    "mov eax, 0x18",
    "ltr ax",
    "mov [hostile_sp], esp",
    "mov [hostile_tss + 4], esp",
    "xor ebp, ebp",
    "hostile_v86_on:", // DS is null when this comes from virtual-8086 mode
    "mov esp, cs:[hostile_sp]",
    "cmp bp, -1",
    "je 2f",
    "movzx ebp, bp",
    "push 0x800",
    "push 0x800",
    "push 0x800",
    "push 0x800",
    "push 0x800",
    "push 0xff0",
    "push 0x20002", // VM
    "push 0x800",
    "push ebp",
    "iretd",
    "2:",
    "mov eax, 0x10",
    "mov ds, eax",
    "mov es, eax",
    "mov ss, eax",
    "ret",
    "hostile_v86_triple:",
    "lgdt [hostile_gdt_pointer]",
    "mov eax, 0x18",
    "ltr ax",
    "lidt [hostile_none]",
    "xor ebp, ebp",
    "mov [hostile_sp], esp",
    "jmp hostile_v86_on",
    // Hardware task switches: by JMP, by a task gate, by IRET with NT.
    "hostile_task_jmp:",
    "call hostile_task_set",
    ".byte 0xea",
    ".long 0",
    ".word 0x20",
    "hostile_task_gate:",
    "call hostile_task_set",
    "int 0x40",
    "ret",
    "hostile_task_iret:",
    "call hostile_task_set",
    "mov word ptr [hostile_tss], 0x20",
    "or byte ptr [hostile_gdt + 0x25], 2", // busy
    "pushfd",
    "or dword ptr [esp], 0x4000", // NT
    "popfd",
    "iretd",
    "hostile_task_set:",
    "lgdt [hostile_gdt_pointer]",
    "lidt [hostile_idt]",
    "mov eax, 0x18",
    "ltr ax",
    "mov ebp, offset hostile_task_end", // where an exception goes
    "pop eax",
    "mov [hostile_sp], esp",
    "push eax",
    "mov eax, [hostile_sp]",
    "mov [hostile_tss2 + 0x38], eax", // ESP
    "mov dword ptr [hostile_tss2 + 0x20], offset hostile_task_end",
    "mov dword ptr [hostile_tss2 + 0x24], 2",
    "mov dword ptr [hostile_tss2 + 0x4c], 8", // CS
    "mov dword ptr [hostile_tss2 + 0x48], 0x10",
    "mov dword ptr [hostile_tss2 + 0x50], 0x10",
    "mov dword ptr [hostile_tss2 + 0x54], 0x10",
    "ret",
    "hostile_task_end:",
    "mov esp, [hostile_sp]",
    "ret",
    // #AC whose delivery is the next #AC: the handler runs in ring 3 on an odd stack.
    "hostile_ac_loop:",
    "lgdt [hostile_gdt_pointer]",
    "lidt [hostile_idt]",
    "mov eax, 0x18",
    "ltr ax",
    "mov eax, cr0",
    "or eax, 0x40000",
    "mov cr0, eax",
    "mov eax, 0x43",
    "mov ds, eax",
    "mov es, eax",
    "mov ecx, esp",
    "sub ecx, 0x101",
    "push 0x43",
    "push ecx",
    "push 0x40002", // AC
    "push 0x3b",
    ".byte 0x68", // push imm32
    ".long 2f",
    "iretd",
    "2:",
    "mov eax, [esp]",
    "jmp 2b",
    // Real mode by way of 16-bit protected mode; the code is at 0:8000. BX: not 0 for a triple
    // fault.
    "hostile_real:",
    "mov [hostile_sp], esp",
    "xor ebx, ebx",
    "hostile_real_go:",
    ".byte 0xea",
    ".long 0x8000",
    ".word 0x30",
    "hostile_real_triple:",
    "mov ebx, 1",
    "jmp hostile_real_go",
    "hostile_real_back:",
    "mov eax, 0x10",
    "mov ds, eax",
    "mov es, eax",
    "mov ss, eax",
    "mov esp, [hostile_sp]",
    "ret",
    ".macro try16 bytes:vararg",
    ".byte 0xbd", // mov bp, imm16
    ".word 9f - hostile_blob + 0x8000",
    ".byte \\bytes",
    "9:",
    ".endm",
    ".macro virt_some16",
    "try16 0x0f, 0x01, 0xc1",
    "try16 0x0f, 0x01, 0xc2",
    "try16 0x0f, 0x01, 0xc3",
    "try16 0x0f, 0x01, 0xc4",
    "try16 0xf3, 0x0f, 0xc7, 0x37", // vmxon [bx]
    "try16 0x0f, 0xc7, 0x37",
    "try16 0x0f, 0x78, 0xd8",
    "try16 0x0f, 0x01, 0xd8",
    "try16 0x0f, 0x01, 0xd9",
    "try16 0x0f, 0x01, 0xda",
    "try16 0x0f, 0x01, 0xdb",
    "try16 0x0f, 0x01, 0xdd",
    "try16 0x0f, 0x01, 0xdf",
    "try16 0x0f, 0x00, 0xd8", // ltr ax
    "try16 0x0f, 0x0b",
    "try16 0xcc",
    "try16 0x0f, 0xa2", // cpuid
    "try16 0x0f, 0x32", // rdmsr
    "try16 0x0f, 0x08", // invd
    "try16 0xe4, 0x61", // in al, 61h
    ".endm",
    ".code16",
    "hostile_blob:",
    "mov ax, 0x38",
    "mov ds, ax",
    "mov es, ax",
    "mov ss, ax",
    "mov eax, cr0",
    "and al, 0xfe",
    "mov cr0, eax",
    ".byte 0xea",
    ".word 2f - hostile_blob + 0x8000",
    ".word 0",
    "2:",
    "xor ax, ax",
    "mov ds, ax",
    "mov es, ax",
    "mov ss, ax",
    "mov sp, 0x7ff0",
    "test bx, bx",
    "jnz 4f",
    ".byte 0x66, 0x0f, 0x01, 0x1e", // lidt
    ".word 5f - hostile_blob + 0x8000",
    // All vectors to the handler.
    "xor di, di",
    "mov cx, 256",
    ".byte 0x66, 0xb8", // mov eax, imm32
    ".long 3f - hostile_blob + 0x8000",
    "rep stosd",
    "mov bx, 0x7000",
    "xor cx, cx",
    "virt_some16",
    "mov eax, cr0",
    "or al, 1",
    "mov cr0, eax",
    ".byte 0x66, 0xea",
    ".long hostile_real_back",
    ".word 0x18",
    "3:",
    "mov sp, 0x7ff0",
    "jmp bp",
    "4:",
    ".byte 0x66, 0x0f, 0x01, 0x1e",
    ".word 6f - hostile_blob + 0x8000",
    "int3",
    "5:",
    ".word 0x3ff",
    ".long 0",
    "6:",
    ".word 0",
    ".long 0",
    "hostile_blob_end:",
    // The same for virtual-8086 mode, where BP is an offset in 800:0 and the handler is of ring 0.
    ".macro try86 bytes:vararg",
    ".byte 0xbd",
    ".word 9f - hostile_blob86",
    ".byte \\bytes",
    "9:",
    ".endm",
    "hostile_blob86:",
    "try86 0x0f, 0x01, 0xc1",
    "try86 0x0f, 0x01, 0xc2",
    "try86 0x0f, 0x01, 0xc4",
    "try86 0xf3, 0x0f, 0xc7, 0x37",
    "try86 0x0f, 0x78, 0xd8",
    "try86 0x0f, 0x01, 0xd8",
    "try86 0x0f, 0x01, 0xd9",
    "try86 0x0f, 0x01, 0xda",
    "try86 0x0f, 0x01, 0xdd",
    "try86 0x0f, 0x0b",
    "try86 0xfa", // cli
    "try86 0xfb",
    "try86 0xf4", // hlt
    "try86 0xe4, 0x61",
    "try86 0xe6, 0x80",
    "try86 0xcd, 0x10",
    "try86 0xcc",
    "try86 0x0f, 0xa2",
    "try86 0x0f, 0x32",
    "try86 0x0f, 0x20, 0xc0", // mov eax, cr0
    "mov bp, -1",
    "ud2",
    "hostile_blob86_end:",
    ".code64",
    ".section .data.hostile, \"aw\"",
    ".balign 16",
    "hostile_rsp: .quad 0",
    "hostile_cr3: .quad 0",
    "hostile_cr4: .quad 0",
    "hostile_sp: .quad 0",
    ".globl hostile_pd",
    "hostile_pd: .quad 0",
    ".globl hostile_pdpt",
    "hostile_pdpt: .quad 0",
    "hostile_none: .quad 0, 0",
    ".globl hostile_idt",
    "hostile_idt: .word 2047",
    ".quad 0",
    "hostile_gdt_pointer: .word 71",
    ".quad hostile_gdt",
    ".balign 16",
    ".globl hostile_gdt",
    "hostile_gdt: .quad 0",
    ".quad 0x00cf9b000000ffff", // 08
    ".quad 0x00cf93000000ffff", // 10
    ".quad 0x0000890000000067", // 18: a TSS; the base is filled in
    ".quad 0x0000890000000067", // 20: another
    ".quad 0x00009b000000ffff", // 28
    ".quad 0x000093000000ffff", // 30
    ".quad 0x00cffb000000ffff", // 38: ring 3
    ".quad 0x00cff3000000ffff", // 40
    ".balign 16",
    ".globl hostile_tss",
    "hostile_tss: .long 0, 0, 0x10",
    ".skip 92",
    ".balign 16",
    ".globl hostile_tss2",
    "hostile_tss2: .skip 104",
    ".text",
);

unsafe extern "C" {
    fn hostile_visit(routine: u32, compatible: u32);
    static hostile_triple: u8;
    static hostile_triple_paging: u8;
    static hostile_triple_pae: u8;
    static hostile_virt32: u8;
    static hostile_handler: u8;
    static hostile_v86: u8;
    static hostile_v86_on: u8;
    static hostile_v86_triple: u8;
    static hostile_task_jmp: u8;
    static hostile_task_gate: u8;
    static hostile_task_iret: u8;
    static hostile_ac_loop: u8;
    static hostile_real: u8;
    static hostile_real_triple: u8;
    static hostile_blob: u8;
    static hostile_blob_end: u8;
    static hostile_blob86: u8;
    static hostile_blob86_end: u8;
    static mut hostile_pd: u64;
    static mut hostile_pdpt: u64;
    static mut hostile_idt: [u16; 5];
    static mut hostile_gdt: [u64; 9];
    static hostile_tss: u8;
    static hostile_tss2: u8;
    static guest_pml4: [u64; 512];
}

static DIRECTORY: Page = Page::zero();
static POINTERS: Page = Page::zero();
static IDT: Page = Page::zero();

fn put(address: u64, value: u64) {
    // SAFETY: the callers' pages are this guest's own.
    unsafe { (address as *mut u64).write_volatile(value) };
}

fn get(address: u64) -> u64 {
    // SAFETY: as above.
    unsafe { (address as *const u64).read_volatile() }
}

/// Tables for all modes: paging by 4 MiB pages, PAE, and an IDT whose gates all lead to `handler`.
fn prepare(handler: *const u8, reserved: u64) {
    for entry in 0..512u64 {
        let frame = |i: u64| i << 22 | 0x83;
        put(
            DIRECTORY.address() + 8 * entry,
            frame(2 * entry) & 0xffff_ffff | frame(2 * entry + 1) << 32,
        );
    }
    let pointers = get(&raw const guest_pml4 as u64) & !0xfff;
    for entry in 0..4 {
        // The runtime's directories; R/W is reserved here (SDM Vol. 3A table 4-8).
        put(
            POINTERS.address() + 8 * entry,
            get(pointers + 8 * entry) & !0xfff | 1 | reserved,
        );
    }
    let offset = handler as u64;
    let gate = |selector: u64, kind: u64| {
        offset & 0xffff | selector << 16 | kind << 40 | (offset & 0xffff_0000) << 32
    };
    for vector in 0..256 {
        put(IDT.address() + 8 * vector, gate(8, 0x8e));
    }
    // #AC in ring 3; a task gate.
    put(IDT.address() + 8 * 17, gate(0x38, 0xee));
    put(IDT.address() + 8 * 0x40, 0x20 << 16 | 0xe5 << 40);
    // SAFETY: nothing uses them yet.
    unsafe {
        hostile_pd = DIRECTORY.address();
        hostile_pdpt = POINTERS.address();
        let base = IDT.address();
        let pointer = &raw mut hostile_idt;
        (*pointer)[1] = base as u16;
        (*pointer)[2] = (base >> 16) as u16;
        for (slot, tss) in [(3, &raw const hostile_tss), (4, &raw const hostile_tss2)] {
            let base = tss as u64;
            hostile_gdt[slot] =
                0x0000_8900_0000_0067 | (base & 0xff_ffff) << 16 | (base >> 24 & 0xff) << 56;
        }
    }
}

fn visit(routine: *const u8, compatible: bool) {
    // SAFETY: the routine keeps everything that the way back needs; interrupts are off, and
    // tables that it changed are loaded anew.
    unsafe {
        asm!("cli");
        hostile_visit(routine as u32, compatible.into());
        segments::restore();
    }
    load_idt();
}

fn copy(start: *const u8, end: *const u8) {
    // SAFETY: the page at 8000H is RAM that nobody uses.
    unsafe { (0x8000 as *mut u8).copy_from(start, end as usize - start as usize) };
}

pub fn triple_compatible() {
    visit(&raw const hostile_triple, true);
}

pub fn triple_protected() {
    visit(&raw const hostile_triple, false);
}

pub fn triple_paging() {
    prepare(&raw const hostile_handler, 0);
    visit(&raw const hostile_triple_paging, false);
}

pub fn triple_pae() {
    prepare(&raw const hostile_handler, 0);
    visit(&raw const hostile_triple_pae, false);
}

/// Reserved bits in all four page-directory pointers.
pub fn bad_pdpte() {
    prepare(&raw const hostile_handler, 0x1e6);
    visit(&raw const hostile_triple_pae, false);
}

pub fn triple_v86() {
    prepare(&raw const hostile_v86_on, 0);
    copy(&raw const hostile_blob86, &raw const hostile_blob86_end);
    visit(&raw const hostile_v86_triple, false);
}

pub fn triple_real() {
    copy(&raw const hostile_blob, &raw const hostile_blob_end);
    visit(&raw const hostile_real_triple, false);
}

/// Every VMX and SVM instruction, and other privileged ones, in each mode.
pub fn virt_modes() {
    prepare(&raw const hostile_handler, 0);
    println_mode("protected");
    visit(&raw const hostile_virt32, false);
    println_mode("real");
    copy(&raw const hostile_blob, &raw const hostile_blob_end);
    visit(&raw const hostile_real, false);
    println_mode("virtual-8086");
    prepare(&raw const hostile_v86_on, 0);
    copy(&raw const hostile_blob86, &raw const hostile_blob86_end);
    visit(&raw const hostile_v86, false);
    // SAFETY: the MSR is there in long mode.
    let _ = unsafe { rdmsr(0xc000_0080) };
}

fn println_mode(name: &str) {
    guest_runtime::println!("hostile: in {name} mode");
}

pub fn task_jmp() {
    prepare(&raw const hostile_handler, 0);
    visit(&raw const hostile_task_jmp, false);
}

pub fn task_gate() {
    prepare(&raw const hostile_handler, 0);
    visit(&raw const hostile_task_gate, false);
}

pub fn task_iret() {
    prepare(&raw const hostile_handler, 0);
    visit(&raw const hostile_task_iret, false);
}

pub fn ac_loop() {
    prepare(&raw const hostile_handler, 0);
    visit(&raw const hostile_ac_loop, false);
}
