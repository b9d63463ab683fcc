//! The host's descriptor tables and interrupt entry (Intel SDM Vol. 3A ch. 3, 6 and 8).
//!
//! A core runs with interrupts off but for short windows that the run loop opens, so the entry
//! path is built for clarity: all registers are saved, and one handler gets the frame.

use alloc::boxed::Box;
use core::arch::{asm, global_asm};
use core::sync::atomic::{AtomicPtr, Ordering};

/// The code segment of the hypervisor.
pub const CODE_SELECTOR: u16 = 0x08;
/// The data segment of the hypervisor.
pub const DATA_SELECTOR: u16 = 0x10;
/// The task-state segment of the core.
pub const TSS_SELECTOR: u16 = 0x18;

/// What an interrupt or exception found on the core.
#[derive(Debug)]
#[repr(C)]
pub struct InterruptFrame {
    /// R15, R14, R13, R12, R11, R10, R9, R8, RBP, RDI, RSI, RDX, RCX, RBX, RAX.
    pub registers: [u64; 15],
    /// 0 to 255.
    pub vector: u64,
    /// The error code, or 0 where the vector has none.
    pub error_code: u64,
    /// Where it hit.
    pub rip: u64,
    /// Code segment.
    pub cs: u64,
    /// Flags.
    pub rflags: u64,
    /// Stack pointer.
    pub rsp: u64,
    /// Stack segment.
    pub ss: u64,
}

/// Handles every vector.
pub type Handler = fn(&mut InterruptFrame);

static HANDLER: AtomicPtr<()> = AtomicPtr::new(core::ptr::null_mut());

// One 16-byte stub for each vector: make the frame uniform, then go on in common.
// 8, 10–14, 17, 21, 29 and 30 push an error code themselves (SDM Vol. 3A table 6-1, APM Vol. 2
// table 8-1).
global_asm!(
    ".text",
    ".globl tessera_vectors",
    ".balign 16",
    "tessera_vectors:",
    ".set vector, 0",
    ".rept 256",
    ".balign 16",
    ".if (vector == 8) || ((vector >= 10) && (vector <= 14)) || (vector == 17) || (vector == 21) || (vector == 29) || (vector == 30)",
    ".else",
    "push 0",
    ".endif",
    "push vector",
    "jmp tessera_interrupt",
    ".set vector, vector + 1",
    ".endr",
    "tessera_interrupt:",
    "push rax", "push rbx", "push rcx", "push rdx", "push rsi", "push rdi", "push rbp",
    "push r8", "push r9", "push r10", "push r11", "push r12", "push r13", "push r14", "push r15",
    "cld",
    "mov rdi, rsp",
    "call {dispatch}",
    "pop r15", "pop r14", "pop r13", "pop r12", "pop r11", "pop r10", "pop r9", "pop r8",
    "pop rbp", "pop rdi", "pop rsi", "pop rdx", "pop rcx", "pop rbx", "pop rax",
    "add rsp, 16",
    "iretq",
    dispatch = sym dispatch,
);

unsafe extern "C" {
    static tessera_vectors: [u8; 256 * 16];
}

extern "C" fn dispatch(frame: &mut InterruptFrame) {
    let handler = HANDLER.load(Ordering::Acquire);
    if !handler.is_null() {
        // SAFETY: only `CoreTables::install` stores here, and it stores a `Handler`.
        let handler = unsafe { core::mem::transmute::<*mut (), Handler>(handler) };
        handler(frame);
    }
}

#[repr(C, packed(4))]
struct TaskStateSegment {
    reserved: u32,
    rsp: [u64; 3],
    reserved2: u64,
    ist: [u64; 7],
    reserved3: u64,
    reserved4: u16,
    io_map_base: u16,
}

const _: () = assert!(size_of::<TaskStateSegment>() == 104);

#[derive(Clone, Copy)]
#[repr(C)]
struct Gate {
    offset_low: u16,
    selector: u16,
    ist: u8,
    attributes: u8,
    offset_middle: u16,
    offset_high: u32,
    reserved: u32,
}

const _: () = assert!(size_of::<Gate>() == 16);

/// Present, DPL 0, 64-bit interrupt gate.
const INTERRUPT_GATE: u8 = 0x8e;

#[repr(C, packed)]
struct TablePointer {
    limit: u16,
    base: u64,
}

/// The stacks that exceptions switch to, because the one in use may be the trouble. Each value
/// is a top, 16-byte aligned, with an unmapped page below the stack.
#[derive(Clone, Copy, Debug)]
pub struct EmergencyStacks {
    /// For double faults.
    pub double_fault: u64,
    /// For NMIs.
    pub nmi: u64,
    /// For machine checks.
    pub machine_check: u64,
    /// For page faults: a stack that ran into its guard page faults on a page.
    pub page_fault: u64,
}

/// One core's GDT, TSS and IDT.
#[repr(C, align(64))]
pub struct CoreTables {
    gdt: [u64; 5],
    tss: TaskStateSegment,
    idt: [Gate; 256],
}

impl CoreTables {
    /// Builds the tables of the calling core and loads them, for ever.
    ///
    /// # Safety
    /// Called once on a core, interrupts off, in 64-bit mode; the stacks are mapped and used for
    /// nothing else.
    pub unsafe fn install(stacks: EmergencyStacks, handler: Handler) {
        HANDLER.store(handler as *mut (), Ordering::Release);
        let stubs = &raw const tessera_vectors as u64;
        let gate = |vector: usize| {
            let offset = stubs + 16 * vector as u64;
            let ist = match vector {
                8 => 1,
                2 => 2,
                18 => 3,
                14 => 4,
                _ => 0,
            };
            Gate {
                offset_low: offset as u16,
                selector: CODE_SELECTOR,
                ist,
                attributes: INTERRUPT_GATE,
                offset_middle: (offset >> 16) as u16,
                offset_high: (offset >> 32) as u32,
                reserved: 0,
            }
        };
        let EmergencyStacks {
            double_fault,
            nmi,
            machine_check,
            page_fault,
        } = stacks;
        let tables = Box::leak(Box::new(Self {
            gdt: [0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff, 0, 0],
            tss: TaskStateSegment {
                reserved: 0,
                rsp: [0; 3],
                reserved2: 0,
                ist: [double_fault, nmi, machine_check, page_fault, 0, 0, 0],
                reserved3: 0,
                reserved4: 0,
                // Beyond the limit: no I/O permission map.
                io_map_base: size_of::<TaskStateSegment>() as u16,
            },
            idt: core::array::from_fn(gate),
        }));
        let base = &raw const tables.tss as u64;
        let limit = size_of::<TaskStateSegment>() as u64 - 1;
        // A 64-bit available TSS takes two slots (SDM Vol. 3A figure 8-4).
        tables.gdt[3] = limit | (base & 0xff_ffff) << 16 | 0x89 << 40 | (base >> 24 & 0xff) << 56;
        tables.gdt[4] = base >> 32;
        let gdt = TablePointer {
            limit: size_of_val(&tables.gdt) as u16 - 1,
            base: tables.gdt.as_ptr() as u64,
        };
        let idt = TablePointer {
            limit: size_of_val(&tables.idt) as u16 - 1,
            base: tables.idt.as_ptr() as u64,
        };
        // SAFETY: the tables live for ever and are well-formed; the selectors name them. Loading GS
        // may clear its base, which is this core's own.
        unsafe {
            let gs_base = x86::msr::rdmsr(arch::msr::IA32_GS_BASE);
            asm!(
                "lgdt [{gdt}]",
                "lidt [{idt}]",
                "push {code}",
                "lea {scratch}, [rip + 2f]",
                "push {scratch}",
                "retfq",
                "2:",
                "mov ds, {data:e}", "mov es, {data:e}", "mov ss, {data:e}",
                "mov fs, {zero:e}", "mov gs, {zero:e}",
                "ltr {tss:x}",
                gdt = in(reg) &gdt, idt = in(reg) &idt,
                code = const CODE_SELECTOR as u64,
                scratch = out(reg) _,
                data = in(reg) u32::from(DATA_SELECTOR),
                zero = in(reg) 0u32,
                tss = in(reg) u32::from(TSS_SELECTOR),
            );
            x86::msr::wrmsr(arch::msr::IA32_GS_BASE, gs_base);
        }
    }
}

/// Lets the interrupts in that wait, one after the other, and closes the door again.
#[inline]
pub fn serve_interrupts() {
    // SAFETY: the IDT is installed and its handler keeps the registers.
    unsafe { asm!("sti", "nop", "cli", options(nostack)) };
}

/// Halts the core until an interrupt comes, and serves it.
#[inline]
pub fn wait_for_interrupt() {
    let core = crate::percpu::this();
    core.rest();
    // SAFETY: as above; STI holds interrupts back until HLT has begun (SDM Vol. 2B, STI).
    unsafe { asm!("sti", "hlt", "cli", options(nostack)) };
    core.beat();
}

/// Stops the core for good.
pub fn stop() -> ! {
    loop {
        // SAFETY: halting with interrupts off harms nothing; an NMI wakes it to halt again.
        unsafe { asm!("cli", "hlt", options(nomem, nostack)) };
    }
}
