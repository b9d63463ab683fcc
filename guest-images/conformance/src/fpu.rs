//! x87, SSE and AVX state over exits, and their exceptions (Intel SDM Vol. 1 chapters 8, 10, 13).

use crate::smp_start::need_two;
use crate::util::{OSXSAVE, assert_fault, need, vector};
use core::arch::asm;
use core::sync::atomic::{AtomicU64, Ordering};
use guest_runtime::cpu::{cpuid, cr0, cr4, rdtsc, set_cr0, set_cr4};
use guest_runtime::{expect_fault, guest_test, smp};

const OSFXSR: u64 = 1 << 9;
const OSXMMEXCPT: u64 = 1 << 10;

fn enable() {
    // SAFETY: MP and NE on, EM and TS off, SSE on; the next case's reset takes it away.
    unsafe {
        set_cr0(cr0() & !0xc | 2 | 1 << 5);
        set_cr4(cr4() | OSFXSR | OSXMMEXCPT);
        asm!("fninit", "push 0x1f80", "ldmxcsr [rsp]", "add rsp, 8");
    }
}

/// Exits of each common kind, as text for `asm!`: a CPUID, two ports, an MSR, MMIO, a control
/// register. Uses RAX, RCX, RDX, RDI and keeps RBX on the stack.
macro_rules! exits {
    () => {
        "push rbx
         xor eax, eax
         xor ecx, ecx
         cpuid
         mov edx, 0x3ff
         mov al, 0x5a
         out dx, al
         in al, dx
         mov ecx, 0x277
         rdmsr
         wrmsr
         mov edi, 0xfee00080
         mov eax, [rdi]
         mov [rdi], eax
         mov rax, cr0
         mov cr0, rax
         pop rbx"
    };
}

#[guest_test]
fn fpu_x87_registers_survive_exits() {
    enable();
    let mut image = [0u64; 8];
    let (control, status): (u16, u16);
    // SAFETY: the x87 is on and nobody else's; eight values go in and come out.
    unsafe {
        asm!(
            "push 0x027f", "fldcw word ptr [rsp]", "pop rax",
            "fld1", "fldpi", "fldl2e", "fldl2t", "fldlg2", "fldln2", "fldz", "fld1",
            exits!(),
            "fstcw word ptr [{out}]", "mov {control:x}, [{out}]", "fnstsw ax", "mov {status:x}, ax",
            "fstp qword ptr [{out}]", "fstp qword ptr [{out} + 8]", "fstp qword ptr [{out} + 16]",
            "fstp qword ptr [{out} + 24]", "fstp qword ptr [{out} + 32]", "fstp qword ptr [{out} + 40]",
            "fstp qword ptr [{out} + 48]", "fstp qword ptr [{out} + 56]",
            out = in(reg) image.as_mut_ptr(), control = out(reg) control, status = out(reg) status,
            out("rax") _, out("rcx") _, out("rdx") _, out("rdi") _,
        );
    }
    assert_eq!(control, 0x027f);
    assert_eq!(status >> 11 & 7, 0, "TOP");
    let wanted = [
        1.0,
        0.0,
        core::f64::consts::LN_2,
        core::f64::consts::LOG10_2,
        core::f64::consts::LOG2_10,
        core::f64::consts::LOG2_E,
        core::f64::consts::PI,
        1.0,
    ]
    .map(f64::to_bits);
    assert_eq!(image, wanted);
}

#[guest_test]
fn fpu_sse_registers_survive_exits() {
    enable();
    let wanted: [u128; 16] =
        core::array::from_fn(|i| 0x0123_4567_89ab_cdef_0011_2233_4455_6677 * (i as u128 + 1));
    let mut found = [0u128; 16];
    let mut mxcsr = 0x3f80u32;
    // SAFETY: SSE is on, and the compiler uses none; the arrays are 16 bytes aligned.
    unsafe {
        asm!(
            "ldmxcsr [{mxcsr}]",
            "movaps xmm0, [{i}]", "movaps xmm1, [{i} + 16]", "movaps xmm2, [{i} + 32]", "movaps xmm3, [{i} + 48]",
            "movaps xmm4, [{i} + 64]", "movaps xmm5, [{i} + 80]", "movaps xmm6, [{i} + 96]", "movaps xmm7, [{i} + 112]",
            "movaps xmm8, [{i} + 128]", "movaps xmm9, [{i} + 144]", "movaps xmm10, [{i} + 160]", "movaps xmm11, [{i} + 176]",
            "movaps xmm12, [{i} + 192]", "movaps xmm13, [{i} + 208]", "movaps xmm14, [{i} + 224]", "movaps xmm15, [{i} + 240]",
            exits!(),
            "movaps [{o}], xmm0", "movaps [{o} + 16], xmm1", "movaps [{o} + 32], xmm2", "movaps [{o} + 48], xmm3",
            "movaps [{o} + 64], xmm4", "movaps [{o} + 80], xmm5", "movaps [{o} + 96], xmm6", "movaps [{o} + 112], xmm7",
            "movaps [{o} + 128], xmm8", "movaps [{o} + 144], xmm9", "movaps [{o} + 160], xmm10", "movaps [{o} + 176], xmm11",
            "movaps [{o} + 192], xmm12", "movaps [{o} + 208], xmm13", "movaps [{o} + 224], xmm14", "movaps [{o} + 240], xmm15",
            "mov dword ptr [{mxcsr}], 0", "stmxcsr [{mxcsr}]",
            i = in(reg) wanted.as_ptr(), o = in(reg) found.as_mut_ptr(), mxcsr = in(reg) &raw mut mxcsr,
            out("rax") _, out("rcx") _, out("rdx") _, out("rdi") _,
        );
    }
    assert_eq!(found, wanted);
    assert_eq!(mxcsr, 0x3f80);
}

#[repr(C, align(64))]
struct Area([u8; 4096]);

fn enable_xsave(mask: u32) {
    enable();
    // SAFETY: the callers have seen that CPUID offers these components.
    unsafe {
        set_cr4(cr4() | OSXSAVE);
        asm!("xsetbv", in("ecx") 0, in("eax") mask, in("edx") 0);
    }
}

#[guest_test]
fn fpu_avx_upper_halves_survive_exits() {
    need(cpuid(1, 0)[2] >> 28 & 1 != 0, "AVX");
    enable_xsave(7);
    let wanted = [
        [0x1111_2222_3333_4444u64, 5, 6, 7],
        [0x8888_7777_6666_5555, 4, 3, 2],
    ];
    let mut found = [[0u64; 4]; 2];
    // SAFETY: AVX is on, and the compiler uses none.
    unsafe {
        asm!(
            "vmovups ymm0, [{i}]", "vmovups ymm15, [{i} + 32]",
            exits!(),
            "vmovups [{o}], ymm0", "vmovups [{o} + 32], ymm15", "vzeroall",
            i = in(reg) wanted.as_ptr(), o = in(reg) found.as_mut_ptr(),
            out("rax") _, out("rcx") _, out("rdx") _, out("rdi") _,
        );
    }
    assert_eq!(found, wanted);
}

#[guest_test]
fn fpu_xsave_area_survives_exits() {
    need(cpuid(1, 0)[2] >> 26 & 1 != 0, "XSAVE");
    let mask = cpuid(0xd, 0)[0] & 7;
    enable_xsave(mask);
    static mut BEFORE: Area = Area([0; 4096]);
    static mut AFTER: Area = Area([0; 4096]);
    // SAFETY: the areas are this case's own, aligned, and larger than x87, SSE and AVX state.
    unsafe {
        asm!(
            "fninit", "fldpi", "pcmpeqd xmm3, xmm3",
            "mov eax, -1", "mov edx, -1", "xsave [{before}]",
            exits!(),
            "mov eax, -1", "mov edx, -1", "xsave [{after}]",
            before = in(reg) &raw mut BEFORE, after = in(reg) &raw mut AFTER,
            out("rax") _, out("rcx") _, out("rdx") _, out("rdi") _,
        );
        let bytes = |area: *const Area, i: usize| area.cast::<u8>().add(i).read_volatile();
        for i in (0..416).chain(512..520).chain(576..832) {
            assert_eq!(
                bytes(&raw const BEFORE, i),
                bytes(&raw const AFTER, i),
                "byte {i}"
            );
        }
    }
}

#[guest_test]
fn fpu_xcr0_survives_exits_and_halts() {
    need(cpuid(1, 0)[2] >> 28 & 1 != 0, "AVX");
    for mask in [1u32, 3, 7] {
        enable_xsave(mask);
        let found: u32;
        // SAFETY: XSAVE is on.
        unsafe {
            asm!(exits!(), "xor ecx, ecx", "xgetbv", out("rax") found, out("rcx") _, out("rdx") _, out("rdi") _);
        }
        assert_eq!(found, mask);
    }
    enable_xsave(1);
    // SAFETY: AVX is off now: #UD.
    let fault = expect_fault(|| unsafe { asm!("vzeroall") });
    assert_fault(fault, vector::UD, 0);
}

#[guest_test]
fn fpu_unmasked_x87_exception_is_mf() {
    enable();
    // SAFETY: the exception is pending until the next x87 instruction, and cleared after.
    let fault = expect_fault(|| unsafe {
        asm!("push 0x037b", "fldcw word ptr [rsp]", "pop rax", "fld1", "fldz", "fdivp st(1), st", "fwait",
             out("rax") _);
    });
    assert_fault(fault, vector::MF, 0);
    // SAFETY: leaves the x87 as at first.
    unsafe { asm!("fninit") };
}

#[guest_test]
fn fpu_unmasked_sse_exception_is_xm() {
    crate::util::not_on_qemus_cpu("has no SSE exceptions");
    enable();
    let divide = || {
        // SAFETY: 1 / 0 in XMM0, with the exception unmasked.
        unsafe {
            asm!(
                "push 0x1d80",
                "ldmxcsr [rsp]",
                "mov dword ptr [rsp], 0x3f800000",
                "movss xmm0, [rsp]",
                "xorps xmm1, xmm1",
                "divss xmm0, xmm1",
                "add rsp, 8"
            );
        }
    };
    assert_fault(expect_fault(divide), vector::XM, 0);
    // SAFETY: without OSXMMEXCPT it is #UD.
    unsafe { set_cr4(cr4() & !OSXMMEXCPT) };
    assert_fault(expect_fault(divide), vector::UD, 0);
    enable();
}

#[guest_test]
fn fpu_sse_without_osfxsr_is_ud() {
    enable();
    // SAFETY: the fault is expected.
    unsafe {
        set_cr4(cr4() & !OSFXSR);
        assert_fault(expect_fault(|| asm!("xorps xmm0, xmm0")), vector::UD, 0);
    }
}

/// 32 vector registers of 64 bytes.
#[repr(C, align(64))]
struct Vectors([[u64; 8]; 32]);

/// Moves all of a kind of vector registers from or to memory.
macro_rules! vectors {
    (load $op:literal $width:literal [$($n:literal)*] $memory:expr) => {
        asm!($(concat!($op, " ", $width, "mm", $n, ", [{m} + 64*", $n, "]"),)* m = in(reg) $memory)
    };
    (store $op:literal $width:literal [$($n:literal)*] $memory:expr) => {
        asm!($(concat!($op, " [{m} + 64*", $n, "], ", $width, "mm", $n),)* m = in(reg) $memory)
    };
}

#[guest_test]
fn smp_vector_registers_are_each_cpus_own() {
    need_two();
    need(cpuid(1, 0)[2] >> 28 & 1 != 0, "AVX");
    let mask = cpuid(0xd, 0)[0] & 0xe7;
    let wide = mask & 0xe0 == 0xe0;
    smp::start_all();
    let wrong = AtomicU64::new(0);
    smp::everywhere(&|| {
        enable_xsave(mask);
        let own = 0x0101_0101_0101_0101 * (1 + smp::current() as u64);
        let given = Vectors(core::array::from_fn(|n| [own + n as u64; 8]));
        let mut found = Vectors([[0; 8]; 32]);
        let (registers, words) = if wide { (32, 8) } else { (16, 4) };
        // SAFETY: the components are on, the compiler uses none of them, and the arrays are as
        // long as what is moved.
        unsafe {
            if wide {
                vectors!(load "vmovdqu64" "z" [0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25 26 27 28 29 30 31] &raw const given);
                asm!("kmovw k1, {0:e}", "kmovw k7, {0:e}", in(reg) own);
            } else {
                vectors!(load "vmovdqu" "y" [0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15] &raw const given);
            }
            let start = rdtsc();
            // Some slices of every CPU, if they share a core.
            while rdtsc().wrapping_sub(start) < 20_000_000 {
                let (mut first, mut last) = (own as u32 & 0xffff, own as u32 & 0xffff);
                if wide {
                    vectors!(store "vmovdqu64" "z" [0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25 26 27 28 29 30 31] &raw mut found);
                    asm!("kmovw {:e}, k1", "kmovw {:e}, k7", out(reg) first, out(reg) last);
                } else {
                    vectors!(store "vmovdqu" "y" [0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15] &raw mut found);
                }
                let differs = |n: usize| found.0[n][..words] != given.0[n][..words];
                let count = (0..registers).filter(|n| differs(*n)).count();
                let masks = u64::from(first != own as u32 & 0xffff || last != first);
                wrong.fetch_add(count as u64 + masks, Ordering::SeqCst);
            }
        }
    });
    assert_eq!(wrong.load(Ordering::SeqCst), 0);
}
