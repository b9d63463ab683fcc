//! The world switch (AMD APM Vol. 2 §15.5, §15.6) and the few instructions around it.
//!
//! VMRUN and #VMEXIT switch RIP, RSP, RAX, RFLAGS, the control registers, EFER, CS, SS, DS, ES,
//! GDTR, IDTR, DR6 and DR7; VMLOAD and VMSAVE switch FS, GS, TR, LDTR, KernelGSBase, STAR and
//! SYSENTER state; this code switches the other general-purpose registers. Extended state,
//! DR0–DR3 and TSC_AUX stay the guest's while its vCPU is loaded.

use arch::Gprs;
use core::arch::asm;

/// Runs the guest until it leaves. `guest` and `host` are the physical addresses of the guest's
/// VMCB and of the page that holds the host's VMSAVE state.
///
/// RFLAGS.IF is set while GIF is 0: with V_INTR_MASKING, it is the host's IF at VMRUN that
/// decides whether a physical interrupt makes the guest leave (§15.21.1). Between STGI and the
/// return it is 0 again.
///
/// RAX of the guest is in the VMCB, not in `gprs`.
///
/// # Safety
/// The core's SVM is on, RFLAGS.IF is 0, no extended state of the host is in registers. `guest` is
/// a VMCB that intercepts what it must and whose nested tables map nothing of the host's; `host`
/// was written by VMSAVE on this core, and FS, GS, TR and LDTR have not changed since.
#[inline(always)]
pub unsafe fn world_switch(gprs: &mut Gprs, guest: u64, host: u64) {
    // SAFETY: every register but RSP, RBX and RBP is declared clobbered; those three are put
    // back, RSP by the hardware. Flags come back from the host save area (DF clear, as at VMRUN).
    unsafe {
        asm!(
            "push rbx",
            "push rbp",
            "push rdi",
            "push rdx",
            "mov rcx, [rdi + 0x08]",
            "mov rdx, [rdi + 0x10]",
            "mov rbx, [rdi + 0x18]",
            "mov rbp, [rdi + 0x28]",
            "mov rsi, [rdi + 0x30]",
            "mov r8,  [rdi + 0x40]",
            "mov r9,  [rdi + 0x48]",
            "mov r10, [rdi + 0x50]",
            "mov r11, [rdi + 0x58]",
            "mov r12, [rdi + 0x60]",
            "mov r13, [rdi + 0x68]",
            "mov r14, [rdi + 0x70]",
            "mov r15, [rdi + 0x78]",
            "mov rdi, [rdi + 0x38]",
            // No NMI, SMI or interrupt from here: FS, GS and TR are about to be the guest's.
            "clgi",
            "sti",
            "vmload rax",
            "vmrun rax",
            "vmsave rax",
            "pop rax",
            "vmload rax",
            "pop rax",
            "mov [rax + 0x08], rcx",
            "mov [rax + 0x10], rdx",
            "mov [rax + 0x18], rbx",
            "mov [rax + 0x28], rbp",
            "mov [rax + 0x30], rsi",
            "mov [rax + 0x38], rdi",
            "mov [rax + 0x40], r8",
            "mov [rax + 0x48], r9",
            "mov [rax + 0x50], r10",
            "mov [rax + 0x58], r11",
            "mov [rax + 0x60], r12",
            "mov [rax + 0x68], r13",
            "mov [rax + 0x70], r14",
            "mov [rax + 0x78], r15",
            "pop rbp",
            "pop rbx",
            "cli",
            "stgi",
            inout("rax") guest => _,
            inout("rdi") gprs.0.as_mut_ptr() => _,
            inout("rdx") host => _,
            out("rcx") _, out("rsi") _, out("r8") _, out("r9") _, out("r10") _, out("r11") _,
            out("r12") _, out("r13") _, out("r14") _, out("r15") _,
        );
    }
}

/// Puts the host's FS, GS, TR, LDTR, KernelGSBase, STAR and SYSENTER state into `page`.
///
/// # Safety
/// The core's SVM is on, and `page` is the physical address of a page that belongs to it.
pub unsafe fn save_host(page: u64) {
    // SAFETY: by the contract above.
    unsafe { asm!("vmsave rax", in("rax") page, options(nostack, preserves_flags)) };
}

/// Writes DR0 to DR3.
///
/// # Safety
/// DR7 of the host enables none of them (as after every #VMEXIT).
pub unsafe fn load_debug(dr: &[u64; 4]) {
    // SAFETY: address registers that nothing enables.
    unsafe {
        asm!("mov dr0, {}", "mov dr1, {}", "mov dr2, {}", "mov dr3, {}",
             in(reg) dr[0], in(reg) dr[1], in(reg) dr[2], in(reg) dr[3],
             options(nomem, nostack, preserves_flags));
    }
}

/// Reads DR0 to DR3.
///
/// # Safety
/// The core is in ring 0, and DR7.GD is clear.
pub unsafe fn save_debug() -> [u64; 4] {
    let (a, b, c, d);
    // SAFETY: reads without effect.
    unsafe {
        asm!("mov {}, dr0", "mov {}, dr1", "mov {}, dr2", "mov {}, dr3",
             out(reg) a, out(reg) b, out(reg) c, out(reg) d,
             options(nomem, nostack, preserves_flags));
    }
    [a, b, c, d]
}

/// XCR0 of the core.
///
/// # Safety
/// CR4.OSXSAVE is set.
pub unsafe fn read_xcr0() -> u64 {
    let (low, high): (u32, u32);
    // SAFETY: a read without effect, valid by the contract above.
    unsafe {
        asm!("xgetbv", in("ecx") 0, out("eax") low, out("edx") high,
             options(nomem, nostack, preserves_flags));
    }
    u64::from(high) << 32 | u64::from(low)
}

/// The register offsets above are those of [`arch::Gpr`].
const _: () = {
    use arch::Gpr;
    assert!(Gpr::Rcx as usize * 8 == 0x08 && Gpr::Rdx as usize * 8 == 0x10);
    assert!(Gpr::Rbx as usize * 8 == 0x18 && Gpr::Rbp as usize * 8 == 0x28);
    assert!(Gpr::Rsi as usize * 8 == 0x30 && Gpr::Rdi as usize * 8 == 0x38);
    assert!(Gpr::R8 as usize * 8 == 0x40 && Gpr::R15 as usize * 8 == 0x78);
};
