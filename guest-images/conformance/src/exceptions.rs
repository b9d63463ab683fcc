//! Exceptions with their error codes (Intel SDM Vol. 3A chapter 6), ring 3, and the fast system
//! calls.

use crate::util::{EFER, assert_fault, assert_gp, cpu_is_qemus, not_on_qemus_cpu, vector};
use core::arch::asm;
use core::sync::atomic::{AtomicU64, Ordering};
use guest_runtime::cpu::{cr0, rdmsr, set_cr0, set_cr4, wrmsr};
use guest_runtime::segments::{CODE, NOT_PRESENT, USER_CODE, USER_DATA};
use guest_runtime::{
    Fault, Frame, PAGE, Page, expect_fault, guest_test, on_interrupt, set_gate, set_window, window,
};

const NO_EXECUTE: u64 = 1 << 63;
static CODE_PAGE: Page = Page::zero();
static DATA_PAGE: Page = Page::zero();
/// Where ring 3 has its code, and its data with the stack at the end.
const USER_AT: usize = 8;
const USER_DATA_AT: usize = 9;
/// That ring 3 came to its end, which is a UD2.
#[track_caller]
pub fn assert_ended(found: Option<Fault>) {
    assert_fault(found, vector::UD, 0);
}

/// Copies code to a page and maps it for ring 3; gives its address.
pub fn map_user(code: &[u8]) -> u64 {
    // SAFETY: the page is this module's own, and `code` is shorter than it.
    unsafe {
        let page = CODE_PAGE.address() as *mut u8;
        page.copy_from_nonoverlapping(code.as_ptr(), code.len().min(4096));
    }
    set_window(USER_DATA_AT, DATA_PAGE.address() | 7 | NO_EXECUTE);
    set_window(USER_AT, CODE_PAGE.address() | 5)
}

fn run_user_with(code: &[u8], flags: u64) {
    let rip = map_user(code);
    let data = window(USER_DATA_AT);
    // SAFETY: the code ends in an exception that the caller of `expect_fault` waits for.
    unsafe {
        asm!("push {ss}", "push {rsp_}", "push {flags}", "push {cs}", "push {rip}", "iretq",
             ss = in(reg) u64::from(USER_DATA), rsp_ = in(reg) data + PAGE, flags = in(reg) flags,
             cs = in(reg) u64::from(USER_CODE), rip = in(reg) rip, in("rdi") data,
             options(noreturn));
    }
}

/// Runs code in ring 3, with RDI at a page of its own: never comes back but by an exception.
pub fn run_user(code: &[u8]) {
    run_user_with(code, 2);
}

fn fault_of(work: impl FnOnce()) -> Option<Fault> {
    expect_fault(work)
}

#[guest_test]
fn exception_divide_error() {
    // SAFETY: the fault is expected.
    let fault = fault_of(|| unsafe {
        asm!("div {:e}", in(reg) 0, inout("eax") 1 => _, inout("edx") 0 => _);
    });
    assert_fault(fault, vector::DE, 0);
}

#[guest_test]
fn exception_undefined_opcode() {
    // SAFETY: the fault is expected.
    assert_fault(fault_of(|| unsafe { asm!("ud2") }), vector::UD, 0);
}

#[guest_test]
fn exception_virtualization_instructions_are_ud() {
    // VMXON without VMXE, VMRUN and STGI without SVME, VMREAD outside VMX operation.
    // SAFETY: the faults are expected; RAX points at nothing that is changed.
    unsafe {
        let vmxon = fault_of(|| asm!("vmxon [{}]", in(reg) DATA_PAGE.address()));
        assert_fault(vmxon, vector::UD, 0);
        let vmread = fault_of(|| asm!("vmread rax, rcx", out("rax") _, in("rcx") 0u64));
        assert_fault(vmread, vector::UD, 0);
        let vmrun = fault_of(|| asm!("vmrun rax", in("rax") DATA_PAGE.address()));
        assert_fault(vmrun, vector::UD, 0);
        let stgi = fault_of(|| asm!("stgi"));
        assert_fault(stgi, vector::UD, 0);
    }
}

#[guest_test]
fn exception_general_protection_by_address() {
    // SAFETY: the fault is expected.
    let fault = fault_of(|| unsafe {
        asm!("mov rax, [{}]", in(reg) 0x8000_0000_0000_0000_u64, out("rax") _);
    });
    assert_gp(fault);
}

#[guest_test]
fn exception_stack_fault_by_address() {
    not_on_qemus_cpu("has #GP for it");
    // SAFETY: the fault is expected; RBP is put back by the catch.
    let fault = fault_of(|| unsafe {
        asm!("push rbp", "mov rbp, {}", "mov rax, [rbp]", "pop rbp",
             in(reg) 0x8000_0000_0000_0000_u64, out("rax") _);
    });
    assert_fault(fault, vector::SS, 0);
}

#[guest_test]
fn exception_selector_beyond_the_table() {
    // SAFETY: the faults are expected, and ES keeps its value.
    unsafe {
        let fault = fault_of(|| asm!("mov es, {:x}", in(reg) 0xfff8u16));
        assert_fault(fault, vector::GP, 0xfff8);
        if !cpu_is_qemus() {
            let fault = fault_of(|| asm!("mov ss, {:x}", in(reg) 3u16));
            assert_gp(fault);
        }
    }
}

#[guest_test]
fn exception_segment_not_present() {
    // SAFETY: the faults are expected, and the registers keep their values.
    unsafe {
        let fault = fault_of(|| asm!("mov es, {:x}", in(reg) NOT_PRESENT));
        assert_fault(fault, vector::NP, NOT_PRESENT.into());
        let fault = fault_of(|| asm!("mov ss, {:x}", in(reg) NOT_PRESENT));
        assert_fault(fault, vector::SS, NOT_PRESENT.into());
    }
}

/// An access to a page of the window mapped like this: the error code, and CR2 as it should be.
fn page_fault(entry: u64, access: impl FnOnce(u64)) -> Option<u64> {
    let address = set_window(5, entry) + 0x123;
    let fault = fault_of(|| access(address))?;
    assert_eq!((fault.vector, fault.address), (vector::PF, address));
    Some(fault.error_code)
}

#[guest_test]
fn exception_page_fault_codes() {
    let read = |address: u64| {
        // SAFETY: a fault is caught, and the page is this module's.
        let _ = unsafe { (address as *const u8).read_volatile() };
    };
    let write = |address: u64| {
        // SAFETY: a fault is caught, and the page is this module's.
        unsafe { (address as *mut u8).write_volatile(0xc3) };
    };
    let fetch = |address: u64| {
        // SAFETY: a fault is caught, and the page holds RET.
        unsafe { asm!("call {}", in(reg) address) };
    };
    let page = DATA_PAGE.address();
    assert_eq!(page_fault(0, read), Some(0));
    assert_eq!(page_fault(0, write), Some(2));
    assert_eq!(page_fault(page | 1, read), None);
    assert_eq!(page_fault(page | 1, write), Some(3));
    assert_eq!(page_fault(page | 3, write), None);
    assert_eq!(page_fault(page | 3, fetch), None);
    assert_eq!(page_fault(page | 3 | NO_EXECUTE, fetch), Some(0x11));
    assert_eq!(page_fault(0, fetch), Some(0x10));
    // Reserved address bits, where the address is narrower.
    let width = guest_runtime::cpu::cpuid(0x8000_0008, 0)[0] & 0xff;
    if width < 52 {
        let code = page_fault(page | 3 | 1 << 51, read);
        // QEMU's CPU forgets that the page is present.
        assert!(
            code == Some(9) || cpu_is_qemus() && code == Some(8),
            "{code:x?}"
        );
    }
}

#[guest_test]
fn exception_page_fault_without_write_protect() {
    let address = set_window(5, DATA_PAGE.address() | 1);
    // SAFETY: ring 0 may write to read-only pages without CR0.WP; the page is this module's.
    let fault = fault_of(|| unsafe {
        set_cr0(cr0() & !(1 << 16));
        (address as *mut u8).write_volatile(1);
    });
    assert_eq!(fault, None);
}

#[guest_test]
fn exception_page_fault_from_ring_3() {
    // A read of, then a write to kernel memory, and a write to a present read-only user page.
    let read = [0x48, 0x8b, 0x04, 0x25, 0x00, 0x00, 0x20, 0x00]; // MOV RAX, [200000H]
    let write = [0x48, 0x89, 0x04, 0x25, 0x00, 0x00, 0x20, 0x00]; // MOV [200000H], RAX
    let own = [0x48, 0x8d, 0x05, 0xf9, 0xff, 0xff, 0xff, 0x89, 0x00]; // LEA RAX, [self]; MOV [RAX], EAX
    let fetch = [0xff, 0xe7]; // JMP RDI
    for (code, error, address) in [
        (&read[..], 5, 0x20_0000),
        (&write[..], 7, 0x20_0000),
        (&own[..], 7, window(USER_AT)),
        (&fetch[..], 0x15, window(USER_DATA_AT)),
    ] {
        let fault = expect_fault(|| run_user(code));
        assert_fault(fault, vector::PF, error);
        assert_eq!(fault.map(|fault| fault.address), Some(address));
    }
}

#[guest_test]
fn exception_smep_and_smap() {
    let b = guest_runtime::cpu::cpuid(7, 0)[1];
    crate::util::need(b >> 7 & 1 != 0 && b >> 20 & 1 != 0, "SMEP and SMAP");
    let address = map_user(&[0xc3]);
    // SAFETY: the page holds RET; faults are caught.
    unsafe {
        assert_eq!(fault_of(|| asm!("call {}", in(reg) address)), None);
        set_cr4(guest_runtime::cpu::cr4() | 1 << 20 | 1 << 21);
        assert_fault(
            fault_of(|| asm!("call {}", in(reg) address)),
            vector::PF,
            0x11,
        );
        let load = || asm!("mov al, [{}]", in(reg) address, out("al") _);
        assert_fault(fault_of(load), vector::PF, 1);
        let open = || asm!("stac", "mov al, [{}]", "clac", in(reg) address, out("al") _);
        assert_eq!(fault_of(open), None);
    }
}

#[guest_test]
fn exception_double_fault_on_its_own_stack() {
    set_gate(vector::DF, 1, 0);
    let hole = set_window(6, 0) + 0x800;
    // The #UD cannot be pushed; nor can the page fault of that; the double fault has a stack.
    // SAFETY: the catch puts the stack back.
    let fault = fault_of(|| unsafe {
        asm!("mov rsp, {}", "ud2", in(reg) hole, options(noreturn));
    });
    assert_fault(fault, vector::DF, 0);
}

#[guest_test]
fn exception_interrupt_gate_uses_its_stack() {
    static SEEN: AtomicU64 = AtomicU64::new(0);
    fn see(frame: &mut Frame) {
        SEEN.store(core::ptr::from_ref(frame) as u64, Ordering::Relaxed);
    }
    let here = 0u64;
    let distance = || {
        SEEN.load(Ordering::Relaxed)
            .abs_diff(&raw const here as u64)
    };
    on_interrupt(0x81, see);
    // SAFETY: the vector has a handler.
    unsafe { asm!("int 0x81") };
    let near = distance();
    set_gate(0x81, 1, 0);
    // SAFETY: the vector has a handler.
    unsafe { asm!("int 0x81") };
    assert!(near < 4096 && SEEN.load(Ordering::Relaxed) > &raw const here as u64);
}

#[guest_test]
fn ring_3_may_not_do_what_ring_0_may() {
    let privileged: [&[u8]; 10] = [
        &[0xf4],             // HLT
        &[0xfa],             // CLI
        &[0xfb],             // STI
        &[0x0f, 0x20, 0xc0], // MOV RAX, CR0
        &[0x0f, 0x21, 0xc0], // MOV RAX, DR0
        &[0x0f, 0x06],       // CLTS
        &[0xec],             // IN AL, DX
        &[0xee],             // OUT DX, AL
        &[0x0f, 0x08],       // INVD
        &[0x0f, 0x01, 0x3f], // INVLPG [RDI]
    ];
    for code in privileged {
        let fault = expect_fault(|| run_user(code));
        assert!(
            fault.is_some_and(|f| (f.vector, f.error_code) == (vector::GP, 0)),
            "{code:x?}: {fault:x?}"
        );
    }
}

#[guest_test]
fn ring_3_has_ports_with_iopl_3() {
    // MOV DX, 3FFH; IN AL, DX; UD2.
    let code = [0x66, 0xba, 0xff, 0x03, 0xec, 0x0f, 0x0b];
    assert_gp(expect_fault(|| run_user(&code)));
    assert_ended(expect_fault(|| run_user_with(&code, 0x3002)));
}

#[guest_test]
fn ring_3_may_use_cpuid_and_calls_open_gates() {
    static CS: AtomicU64 = AtomicU64::new(0);
    fn note(frame: &mut Frame) {
        CS.store(frame.cs, Ordering::Relaxed);
    }
    on_interrupt(0x82, note);
    set_gate(0x82, 0, 3);
    // XOR EAX, EAX; CPUID; INT 82H; UD2.
    let fault = expect_fault(|| run_user(&[0x31, 0xc0, 0x0f, 0xa2, 0xcd, 0x82, 0x0f, 0x0b]));
    assert_ended(fault);
    assert_eq!(CS.load(Ordering::Relaxed), USER_CODE.into());
}

#[guest_test]
fn ring_3_alignment_check() {
    not_on_qemus_cpu("does not check alignment");
    // MOV EAX, [RDI+1]; UD2.
    let code = [0x8b, 0x47, 0x01, 0x0f, 0x0b];
    let run = |flags| expect_fault(|| run_user_with(&code, flags));
    assert_ended(run(2 | 1 << 18));
    // SAFETY: alignment checks concern ring 3 only.
    unsafe { set_cr0(cr0() | 1 << 18) };
    assert_ended(run(2));
    assert_fault(run(2 | 1 << 18), vector::AC, 0);
}

const STAR: u32 = 0xc000_0081;
const LSTAR: u32 = 0xc000_0082;
const SFMASK: u32 = 0xc000_0084;

#[guest_test]
fn syscall_and_sysret_change_rings() {
    // SYSCALL.
    let rip = map_user(&[0x0f, 0x05]);
    let (entered, rcx, r11, cs): (u64, u64, u64, u64);
    // SAFETY: SYSRET goes to the instruction above; SYSCALL comes back to label 4 with the
    // stack as it was, as neither touches RSP; the MSRs are reset below.
    unsafe {
        wrmsr(EFER, rdmsr(EFER) | 1);
        wrmsr(STAR, u64::from(CODE) << 32 | 0x18 << 48);
        wrmsr(SFMASK, 0x700);
        asm!(
            "lea rax, [rip + 4f]", "mov rdx, rax", "shr rdx, 32", "mov ecx, 0xc0000082", "wrmsr",
            "mov rcx, {rip}", "mov r11d, 0x46", "sysretq",
            "4:", "mov {cs}, cs",
            rip = in(reg) rip, cs = out(reg) cs, out("rax") entered, out("rdx") _,
            out("rcx") rcx, out("r11") r11,
        );
        asm!("mov ss, {:x}", in(reg) guest_runtime::segments::DATA);
        wrmsr(LSTAR, 0);
        wrmsr(STAR, 0);
        wrmsr(SFMASK, 0);
    }
    assert_ne!(entered, 0);
    assert_eq!((rcx, r11, cs), (rip + 2, 0x46, u64::from(CODE)));
}

#[guest_test]
fn syscall_without_sce_is_ud() {
    // SAFETY: the fault is expected.
    assert_fault(
        fault_of(|| unsafe { asm!("syscall", out("rcx") _, out("r11") _) }),
        vector::UD,
        0,
    );
}
