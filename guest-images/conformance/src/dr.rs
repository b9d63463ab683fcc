//! Debug registers, breakpoints and single-stepping (Intel SDM Vol. 3B chapter 18), also across
//! instructions that a hypervisor carries out.

use crate::util::{assert_fault, assert_gp, not_in_tcg, not_on_qemus_cpu, on_tcg, vector};
use core::arch::asm;
use core::sync::atomic::{AtomicU64, Ordering};
use guest_runtime::cpu::{
    cr4, dr0, dr1, dr2, dr3, dr6, dr7, set_cr4, set_dr0, set_dr1, set_dr2, set_dr3, set_dr6,
    set_dr7,
};
use guest_runtime::{Frame, expect_fault, guest_test, on_interrupt, pc, skip};

static STEPS: AtomicU64 = AtomicU64::new(0);
static FIRST: AtomicU64 = AtomicU64::new(0);
static STATUS: AtomicU64 = AtomicU64::new(0);
static CELL: AtomicU64 = AtomicU64::new(0);

/// DR7 with breakpoint 0 of a kind (0 execution, 1 write, 2 I/O, 3 access) and length field.
const fn breakpoint(kind: u64, length: u64) -> u64 {
    0x402 | kind << 16 | length << 18
}

fn note(frame: &mut Frame) {
    let status = dr6();
    // SAFETY: the status is sticky, and so is cleared by whoever has seen it.
    unsafe { set_dr6(0xffff_0ff0) };
    STATUS.fetch_or(status & 0xe00f, Ordering::Relaxed);
    if STEPS.fetch_add(1, Ordering::Relaxed) == 0 {
        FIRST.store(frame.rip, Ordering::Relaxed);
    }
    // Goes on behind an execution breakpoint.
    frame.rflags |= 1 << 16;
}

fn watch() {
    STEPS.store(0, Ordering::Relaxed);
    STATUS.store(0, Ordering::Relaxed);
    on_interrupt(vector::DB, note);
}

fn steps() -> u64 {
    STEPS.load(Ordering::Relaxed)
}

/// Runs instructions with TF set: the first step must end right behind the first one, and there
/// must be a step for each, and three for taking TF away again.
macro_rules! single_step {
    ($count:literal, $first:literal $(, $code:literal)*; $($operands:tt)*) => {{
        watch();
        let behind: u64;
        // SAFETY: the callers' instructions change only what their operands name.
        unsafe {
            asm!(
                "lea {behind}, [rip + 3f]",
                "push rbx", "pushfq", "or qword ptr [rsp], 0x100", "popfq",
                $first, "3:", $($code,)*
                "pushfq", "and qword ptr [rsp], -0x101", "popfq", "pop rbx",
                behind = out(reg) behind,
                $($operands)*
            );
        }
        let found = (steps(), FIRST.load(Ordering::Relaxed), STATUS.load(Ordering::Relaxed));
        assert_eq!(found, ($count + 3, behind, 1 << 14), "steps, RIP of the first, DR6");
    }};
}

#[guest_test]
fn dr_addresses_keep_what_is_written() {
    // SAFETY: no breakpoint is enabled.
    unsafe {
        for value in [0, 0x1234_5678_9abc, u64::MAX] {
            set_dr0(value);
            set_dr1(!value);
            set_dr2(value ^ 0xff);
            set_dr3(value ^ 0xff00);
            let _ = guest_runtime::cpu::cpuid(0, 0);
            assert_eq!(
                [dr0(), dr1(), dr2(), dr3()],
                [value, !value, value ^ 0xff, value ^ 0xff00]
            );
        }
    }
}

#[guest_test]
fn dr6_and_dr7_have_fixed_bits() {
    // SAFETY: no breakpoint is enabled for long, and none with an address in use.
    unsafe {
        set_dr6(0);
        assert_eq!(dr6() & 0xffff_1ff0, 0xffff_0ff0);
        set_dr7(0);
        assert_eq!(dr7(), 0x400);
        set_dr0(0);
        set_dr7(0x3 << 18 | 1);
        assert_eq!(dr7(), 0x400 | 0x3 << 18 | 1);
    }
}

#[guest_test]
fn dr_upper_halves_are_gp() {
    not_in_tcg("takes 64 bits of DR6 and DR7");
    // SAFETY: the writes fault.
    unsafe {
        assert_gp(expect_fault(|| set_dr6(1 << 32)));
        assert_gp(expect_fault(|| set_dr7(1 << 32 | 0x400)));
    }
}

#[guest_test]
fn dr7_gd_guards_the_registers() {
    not_on_qemus_cpu("has no general detect");
    watch();
    // SAFETY: the access traps once; GD is cleared by that, and the access repeated.
    unsafe {
        set_dr7(0x400 | 1 << 13);
        let _ = dr0();
    }
    assert_eq!((steps(), STATUS.load(Ordering::Relaxed)), (1, 1 << 13));
    assert_eq!(dr7() & 1 << 13, 0);
}

#[guest_test]
fn breakpoint_on_execution() {
    watch();
    let at: u64;
    // SAFETY: the breakpoint is on a NOP below.
    unsafe {
        asm!("lea {at}, [rip + 3f]", "mov dr0, {at}", "mov dr7, {on}", "3:", "nop", "mov dr7, {off}",
             at = out(reg) at, on = in(reg) breakpoint(0, 0), off = in(reg) 0x400u64);
    }
    assert_eq!((steps(), FIRST.load(Ordering::Relaxed)), (1, at));
    assert_eq!(STATUS.load(Ordering::Relaxed), 1);
}

#[guest_test]
fn breakpoint_on_an_emulated_instruction() {
    watch();
    let at: u64;
    // SAFETY: the breakpoint is on the CPUID below, which changes what is named.
    unsafe {
        asm!("mov {k}, rbx", "lea {at}, [rip + 3f]", "mov dr0, {at}", "mov dr7, {on}", "3:", "cpuid", "mov dr7, {off}",
             "mov rbx, {k}", k = out(reg) _, at = out(reg) at, on = in(reg) breakpoint(0, 0), off = in(reg) 0x400u64,
             inout("eax") 0 => _, inout("ecx") 0 => _, out("edx") _);
    }
    assert_eq!((steps(), FIRST.load(Ordering::Relaxed)), (1, at));
    assert_eq!(STATUS.load(Ordering::Relaxed), 1);
}

#[guest_test]
fn breakpoint_on_data() {
    // SAFETY: the breakpoint is on `CELL`.
    unsafe {
        set_dr0(CELL.as_ptr() as u64);
        for (length, bytes) in [(0, 1), (1, 2), (3, 4), (2, 8)] {
            watch();
            set_dr7(breakpoint(1, length));
            let _ = CELL.as_ptr().read_volatile();
            assert_eq!(steps(), 0, "a read");
            CELL.as_ptr().cast::<u8>().add(bytes - 1).write_volatile(1);
            assert_eq!(steps(), 1, "a write to byte {} of {bytes}", bytes - 1);
            if bytes < 8 {
                CELL.as_ptr().cast::<u8>().add(bytes).write_volatile(1);
                assert_eq!(steps(), 1, "a write behind {bytes}");
            }
            watch();
            set_dr7(breakpoint(3, length));
            let _ = CELL.as_ptr().read_volatile();
            assert_eq!(steps(), 1, "a read with a breakpoint on access");
            assert_eq!(STATUS.load(Ordering::Relaxed), 1);
            set_dr7(0x400);
        }
    }
}

#[guest_test]
fn breakpoint_on_data_survives_exits() {
    watch();
    // SAFETY: the breakpoint is on `CELL`.
    unsafe {
        set_dr0(CELL.as_ptr() as u64);
        set_dr7(breakpoint(1, 2));
        for _ in 0..10 {
            let _ = guest_runtime::cpu::cpuid(0, 0);
            let _ = pc::lapic(pc::reg::ID);
        }
        CELL.as_ptr().write_volatile(2);
        set_dr7(0x400);
    }
    assert_eq!((steps(), STATUS.load(Ordering::Relaxed)), (1, 1));
}

#[guest_test]
fn single_step_over_plain_instructions() {
    single_step!(3, "nop", "inc {x}", "nop"; x = inout(reg) 0u64 => _,);
}

#[guest_test]
fn single_step_over_cpuid() {
    single_step!(3, "cpuid", "nop", "nop"; inout("eax") 0 => _,
                 inout("ecx") 0 => _, out("edx") _,);
}

#[guest_test]
fn single_step_over_rdmsr_and_wrmsr() {
    single_step!(2, "rdmsr", "wrmsr"; in("ecx") 0x277, out("eax") _, out("edx") _,);
}

#[guest_test]
fn single_step_over_ports() {
    single_step!(3, "in al, dx", "out dx, al", "nop"; in("dx") 0x3ffu16, out("al") _,);
}

#[guest_test]
fn single_step_over_mmio() {
    single_step!(3, "mov eax, [rdi]", "mov [rdi], eax", "nop";
                 in("rdi") pc::LAPIC + u64::from(pc::reg::TPR), out("eax") _,);
}

#[guest_test]
fn single_step_over_control_registers() {
    single_step!(3, "mov rax, cr0", "mov cr0, rax", "clts"; out("rax") _,);
}

#[guest_test]
fn icebp_is_a_debug_trap() {
    not_on_qemus_cpu("has #UD for it");
    watch();
    // SAFETY: the trap has a handler.
    unsafe { asm!(".byte 0xf1", "nop") };
    assert_eq!(steps(), 1);
}

#[guest_test]
fn breakpoint_on_ports_with_debug_extensions() {
    watch();
    // SAFETY: the breakpoint is on the UART's scratch register.
    unsafe {
        set_cr4(cr4() | 1 << 3);
        set_dr0(0x3ff);
        set_dr7(breakpoint(2, 0));
        let _ = guest_runtime::cpu::inb(0x3ff);
        let after_in = steps();
        guest_runtime::cpu::outb(0x3ff, 1);
        let after_out = steps();
        let _ = guest_runtime::cpu::inb(0x3fd);
        set_dr7(0x400);
        if !on_tcg() && steps() == 0 {
            // Where ports are carried out in software, the CPU does not compare their addresses.
            skip("no I/O breakpoints beneath this hypervisor");
        }
        assert_eq!((after_in, after_out, steps()), (1, 2, 2));
    }
}

#[guest_test]
fn int3_is_a_trap_and_needs_no_debug_register() {
    let fault = expect_fault(|| {
        // SAFETY: the trap is expected.
        unsafe { asm!("int3") }
    });
    assert_fault(fault, vector::BP, 0);
}
