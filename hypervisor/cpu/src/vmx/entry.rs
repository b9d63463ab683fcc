//! The few instructions between host and guest (Intel SDM Vol. 3C ch. 27 and 28).
//!
//! The processor switches RIP, RSP, RFLAGS, segments, CR0, CR3, CR4, DR7, EFER and PAT; the
//! general-purpose registers are ours. CR2, DR0–3, DR6, SYSCALL's MSRs and the extended state stay
//! the guest's while the host runs: the host uses none of them (see `VmxVcpu::load`).

use arch::Gprs;
use core::arch::{asm, naked_asm};
use core::mem::offset_of;
use x86::vmx::vmcs::host;

/// What the assembly reaches.
#[repr(C)]
pub(super) struct Context {
    pub gprs: Gprs,
    /// What HOST_RSP holds, so that it is written only when the stack depth differs.
    pub host_rsp: u64,
    pub state: State,
}

/// Where the VMCS is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub(super) enum State {
    /// Clear, in memory, on no core.
    Clear = 0,
    /// Current on a core, not launched: VMLAUNCH comes next.
    Loaded = 1,
    /// Current and launched: VMRESUME comes next.
    Launched = 2,
}

/// How an attempt to enter ended.
pub(super) const EXITED: u32 = 0;
/// The instruction failed, and the VMCS holds an error number.
pub(super) const FAILED_VALID: u32 = 1;

/// Enters guest mode and comes back at the exit, with interrupts disabled.
///
/// # Safety
/// The core is in VMX operation; if `context.state` is not `Clear`, the current VMCS is this
/// vCPU's, with host state of this core and [`exit_address`] as HOST_RIP.
#[inline(always)]
pub(super) unsafe fn run(context: *mut Context) -> u32 {
    let outcome: u32;
    // SAFETY: by the contract above. The guest leaves values of its own in every register that
    // `switch` does not keep; all are named here. No code of the hypervisor uses others.
    unsafe {
        asm!(
            "call {switch}",
            switch = sym switch,
            inout("rdi") context => _,
            lateout("eax") outcome,
            lateout("rcx") _, lateout("rdx") _, lateout("rsi") _,
            lateout("r8") _, lateout("r9") _, lateout("r10") _, lateout("r11") _,
            lateout("r12") _, lateout("r13") _, lateout("r14") _, lateout("r15") _,
        );
    }
    outcome
}

/// Keeps RBX and RBP (which inline assembly cannot give up) and takes the context in RDI; every
/// other register is lost. The stack at entry and exit: context, RBP, RBX, return address.
#[unsafe(naked)]
unsafe extern "C" fn switch() {
    naked_asm!(
        "push rbx",
        "push rbp",
        "push rdi",
        "cmp rsp, [rdi + {host_rsp}]",
        "jne 3f",
        "2:",
        // The flags of this comparison live through the loads below.
        "cmp byte ptr [rdi + {state}], {loaded}",
        "mov rax, [rdi + 0]",
        "mov rcx, [rdi + 8]",
        "mov rdx, [rdi + 16]",
        "mov rbx, [rdi + 24]",
        "mov rbp, [rdi + 40]",
        "mov rsi, [rdi + 48]",
        "mov r8, [rdi + 64]",
        "mov r9, [rdi + 72]",
        "mov r10, [rdi + 80]",
        "mov r11, [rdi + 88]",
        "mov r12, [rdi + 96]",
        "mov r13, [rdi + 104]",
        "mov r14, [rdi + 112]",
        "mov r15, [rdi + 120]",
        "mov rdi, [rdi + 56]",
        "jbe 4f",
        "vmresume",
        "jmp 5f",
        // The stack is at another depth than last time. While the VMCS is on no core, HOST_RSP
        // must stay, or another vCPU's would be written; the entry fails below.
        "3:",
        "cmp byte ptr [rdi + {state}], {loaded}",
        "jb 2b",
        "mov [rdi + {host_rsp}], rsp",
        "mov eax, {host_rsp_field}",
        "vmwrite rax, rsp",
        "jmp 2b",
        // Below: the VMCS is on no core, and the carry flag says so as VMfailInvalid does.
        "4:",
        "jb 5f",
        "vmlaunch",
        // VMfailValid sets ZF and gives 1, VMfailInvalid sets CF and gives 2 (§31.2).
        "5:",
        "mov eax, 1",
        "adc eax, 0",
        "pop rdi",
        "pop rbp",
        "pop rbx",
        "ret",
        host_rsp = const offset_of!(Context, host_rsp),
        state = const offset_of!(Context, state),
        loaded = const State::Loaded as u8,
        host_rsp_field = const host::RSP,
    )
}

/// Where the processor arrives on exit: HOST_RIP.
#[unsafe(naked)]
unsafe extern "C" fn arrive() {
    naked_asm!(
        "push rdi",
        "mov rdi, [rsp + 8]",
        "mov [rdi + 0], rax",
        "mov [rdi + 8], rcx",
        "mov [rdi + 16], rdx",
        "mov [rdi + 24], rbx",
        "mov [rdi + 40], rbp",
        "mov [rdi + 48], rsi",
        "mov [rdi + 64], r8",
        "mov [rdi + 72], r9",
        "mov [rdi + 80], r10",
        "mov [rdi + 88], r11",
        "mov [rdi + 96], r12",
        "mov [rdi + 104], r13",
        "mov [rdi + 112], r14",
        "mov [rdi + 120], r15",
        "pop qword ptr [rdi + 56]",
        "mov byte ptr [rdi + {state}], {launched}",
        "pop rdi",
        "pop rbp",
        "pop rbx",
        "xor eax, eax",
        "ret",
        state = const offset_of!(Context, state),
        launched = const State::Launched as u8,
    )
}

/// What HOST_RIP must hold.
pub(super) fn exit_address() -> u64 {
    arrive as *const () as u64
}

const _: () = assert!(offset_of!(Context, gprs) == 0);
