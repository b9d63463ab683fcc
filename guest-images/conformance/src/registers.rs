//! Control registers (Intel SDM Vol. 3A §2.5, AMD APM Vol. 2 §3.1) and XCR0.

use crate::util::{OSXSAVE, assert_fault, assert_gp, need, not_in_tcg, not_on_qemus_cpu, vector};
use core::arch::asm;
use guest_runtime::cpu::{
    cpuid, cr0, cr2, cr3, cr4, cr8, set_cr0, set_cr2, set_cr3, set_cr4, set_cr8,
};
use guest_runtime::{expect_fault, guest_test, pc};

const EM: u64 = 1 << 2;
const TS: u64 = 1 << 3;
const CR4_DE: u64 = 1 << 3;

#[guest_test]
fn cr0_illegal_combinations_are_gp() {
    not_on_qemus_cpu("does not check CR0");
    let now = cr0();
    // Paging without protection; not-write-through without cache-disable; upper half.
    for value in [now & !1, now | 1 << 29, now | 1 << 32] {
        // SAFETY: the write faults.
        assert_gp(expect_fault(|| unsafe { set_cr0(value) }));
        assert_eq!(cr0(), now);
    }
}

#[guest_test]
fn cr0_keeps_what_is_written() {
    let now = cr0();
    // MP, EM, TS, AM, CD; bit 4 (ET) is always 1.
    for bit in [1, 2, 3, 18, 30] {
        // SAFETY: nothing here uses FPU or alignment checks, and caches do not matter.
        unsafe { set_cr0(now | 1 << bit) };
        let found = cr0();
        // SAFETY: the value from before.
        unsafe { set_cr0(now) };
        assert_eq!(found, now | 1 << bit);
    }
    // SAFETY: ET cannot be cleared.
    unsafe { set_cr0(now & !(1 << 4)) };
    assert_eq!(cr0(), now);
}

#[guest_test]
fn cr0_lmsw_smsw_and_clts() {
    let now = cr0();
    let (word, wide): (u16, u64);
    // SAFETY: TS is cleared again.
    unsafe {
        asm!("smsw {:x}", out(reg) word);
        asm!("smsw {}", out(reg) wide);
        asm!("lmsw {:x}", in(reg) (now as u16) | 8);
    }
    assert_eq!(word, now as u16);
    assert_eq!(wide, now);
    assert_eq!(cr0(), now | TS);
    // SAFETY: back to what it was; LMSW cannot clear PE.
    unsafe { asm!("clts") };
    assert_eq!(cr0(), now);
    // SAFETY: as above.
    unsafe { asm!("lmsw {:x}", in(reg) (now as u16) & !1) };
    assert_eq!(cr0(), now);
    static WORD: [u16; 1] = [0x3b];
    // SAFETY: reads the word: PE, MP, TS, as CR0 is otherwise.
    unsafe { asm!("lmsw word ptr [{}]", in(reg) &raw const WORD) };
    let found = cr0();
    // SAFETY: the value from before.
    unsafe { set_cr0(now) };
    assert_eq!(found, now & !0xe | 0xa);
}

#[guest_test]
fn cr0_ts_and_em_stop_the_fpu() {
    let now = cr0();
    // SAFETY: the FPU instructions fault; the value from before comes back.
    unsafe {
        set_cr0(now | TS);
        let fault = expect_fault(|| asm!("fnop"));
        assert_fault(fault, vector::NM, 0);
        asm!("clts");
        assert_eq!(expect_fault(|| asm!("fnop")), None);
        set_cr0(now | EM);
        let fault = expect_fault(|| asm!("fnop"));
        assert_fault(fault, vector::NM, 0);
        set_cr4(cr4() | 1 << 9);
        let fault = expect_fault(|| asm!("xorps xmm0, xmm0"));
        assert_fault(fault, vector::UD, 0);
        set_cr0(now);
    }
}

#[guest_test]
fn cr2_keeps_what_is_written() {
    for value in [0, 0x1234_5678_9abc_def0, u64::MAX] {
        // SAFETY: CR2 is only read after a page fault.
        unsafe { set_cr2(value) };
        let _ = cpuid(0, 0);
        assert_eq!(cr2(), value);
    }
}

#[guest_test]
fn cr3_can_be_reloaded() {
    let now = cr3();
    // SAFETY: the same tables; PCD and PWT do not matter.
    unsafe {
        set_cr3(now);
        set_cr3(now | 0x18);
        assert_eq!(cr3(), now | 0x18);
        set_cr3(now);
    }
    assert_eq!(cr3(), now);
}

#[guest_test]
fn cr3_reserved_bits_are_gp() {
    not_on_qemus_cpu("does not check CR3");
    let width = cpuid(0x8000_0008, 0)[0] & 0xff;
    need(width < 52, "reserved address bits in CR3");
    let now = cr3();
    // SAFETY: the write faults.
    assert_gp(expect_fault(|| unsafe { set_cr3(now | 1 << width) }));
    assert_eq!(cr3(), now);
}

#[guest_test]
fn cr4_reserved_bits_are_gp() {
    not_on_qemus_cpu("masks CR4");
    let now = cr4();
    for bit in [15, 26, 31, 32, 63] {
        // SAFETY: the write faults.
        assert_gp(expect_fault(|| unsafe { set_cr4(now | 1 << bit) }));
        assert_eq!(cr4(), now);
    }
}

#[guest_test]
fn cr4_features_without_cpuid_are_gp() {
    not_on_qemus_cpu("masks CR4");
    let basic = cpuid(1, 0)[2];
    let [_, b, c, _] = if cpuid(0, 0)[0] >= 7 {
        cpuid(7, 0)
    } else {
        [0; 4]
    };
    let now = cr4();
    // VMXE, SMXE, LA57, FSGSBASE, PCIDE, OSXSAVE, SMEP, SMAP, PKE.
    let features = [
        (13, basic >> 5),
        (14, basic >> 6),
        (12, 0),
        (16, b),
        (17, basic >> 17),
        (18, basic >> 26),
        (20, b >> 7),
        (21, b >> 20),
        (22, c >> 3),
    ];
    for (bit, offered) in features {
        if bit == 12 || offered & 1 == 0 {
            // SAFETY: the write faults (LA57 cannot change while paging is on).
            assert_gp(expect_fault(|| unsafe { set_cr4(now | 1 << bit) }));
        } else if bit != 13 && bit != 14 {
            // SAFETY: the feature is there and changes nothing for ring 0 on kernel pages, but
            // for SMEP and SMAP, which concern user pages only.
            unsafe {
                set_cr4(now | 1 << bit);
                assert_eq!(cr4(), now | 1 << bit);
                set_cr4(now);
            }
        }
        assert_eq!(cr4(), now);
    }
}

#[guest_test]
fn cr4_pae_cannot_go_in_long_mode() {
    not_on_qemus_cpu("lets PAE go");
    let now = cr4();
    // SAFETY: the write faults.
    assert_gp(expect_fault(|| unsafe { set_cr4(now & !(1 << 5)) }));
    assert_eq!(cr4(), now);
}

#[guest_test]
fn cr4_keeps_what_is_written() {
    let now = cr4();
    // VME, PVI, TSD, DE, PSE, MCE, PGE, OSFXSR, OSXMMEXCPT.
    for bit in [0, 1, 2, 3, 4, 6, 7, 9, 10] {
        // SAFETY: none of these changes anything for ring 0 here.
        unsafe { set_cr4(now | 1 << bit) };
        let found = cr4();
        // SAFETY: the value from before.
        unsafe { set_cr4(now) };
        assert_eq!(found, now | 1 << bit, "bit {bit}");
    }
}

#[guest_test]
fn cr4_tsd_keeps_the_tsc_from_ring_3() {
    // RDTSC; UD2.
    let code = [0x0f, 0x31, 0x0f, 0x0b];
    let run = || expect_fault(|| crate::exceptions::run_user(&code));
    crate::exceptions::assert_ended(run());
    // SAFETY: ring 0 may still read the TSC.
    unsafe { set_cr4(cr4() | 1 << 2) };
    assert_gp(run());
}

#[guest_test]
fn cr4_umip_hides_descriptor_tables_from_ring_3() {
    need(cpuid(0, 0)[0] >= 7 && cpuid(7, 0)[2] >> 2 & 1 != 0, "UMIP");
    // SGDT [RDI]; UD2.
    let code = [0x0f, 0x01, 0x07, 0x0f, 0x0b];
    let run = || expect_fault(|| crate::exceptions::run_user(&code));
    crate::exceptions::assert_ended(run());
    // SAFETY: UMIP is there, and changes nothing for ring 0.
    unsafe { set_cr4(cr4() | 1 << 11) };
    assert_gp(run());
}

#[guest_test]
fn cr8_is_the_task_priority() {
    for class in [0, 1, 7, 15, 0] {
        // SAFETY: interrupts are off.
        unsafe { set_cr8(class) };
        assert_eq!(cr8(), class);
        assert_eq!(u64::from(pc::lapic(pc::reg::TPR)), class << 4);
    }
    pc::set_lapic(pc::reg::TPR, 0x59);
    assert_eq!(cr8(), 5);
    pc::set_lapic(pc::reg::TPR, 0);
    assert_eq!(cr8(), 0);
}

#[guest_test]
fn cr8_reserved_bits_are_gp() {
    not_in_tcg("does not check CR8");
    // SAFETY: the write faults.
    assert_gp(expect_fault(|| unsafe { set_cr8(16) }));
}

#[guest_test]
fn cr_that_do_not_exist_are_ud() {
    // SAFETY: there are no such registers.
    unsafe {
        assert_fault(
            expect_fault(|| asm!("mov rax, cr1", out("rax") _)),
            vector::UD,
            0,
        );
        assert_fault(
            expect_fault(|| asm!("mov cr7, rax", in("rax") 0u64)),
            vector::UD,
            0,
        );
    }
}

#[guest_test]
fn dr4_and_dr5_follow_cr4_de() {
    // MOV RAX, DR4.
    // SAFETY: DR4 is DR6 without DE, and #UD with it.
    unsafe {
        let alias: u64;
        asm!(".byte 0x0f, 0x21, 0xe0", out("rax") alias);
        assert_eq!(alias, guest_runtime::cpu::dr6());
        set_cr4(cr4() | CR4_DE);
        let fault = expect_fault(|| asm!(".byte 0x0f, 0x21, 0xe0", out("rax") _));
        assert_fault(fault, vector::UD, 0);
    }
}

fn xsetbv(index: u32, value: u64) {
    // SAFETY: the callers' values are legal and change nothing in use, or fault.
    unsafe {
        asm!("xsetbv", in("ecx") index, in("eax") value as u32, in("edx") (value >> 32) as u32);
    }
}

fn xgetbv() -> u64 {
    let (low, high): (u32, u32);
    // SAFETY: the callers have set OSXSAVE.
    unsafe { asm!("xgetbv", in("ecx") 0, out("eax") low, out("edx") high) };
    u64::from(high) << 32 | u64::from(low)
}

#[guest_test]
fn xsetbv_checks_its_value() {
    need(cpuid(1, 0)[2] >> 26 & 1 != 0, "XSAVE");
    assert_fault(expect_fault(|| xsetbv(0, 1)), vector::UD, 0);
    // SAFETY: XSAVE is there.
    unsafe { set_cr4(cr4() | OSXSAVE) };
    let now = xgetbv();
    let legal = cpuid(0xd, 0)[0];
    let mut illegal = [0, 2, 1 << 63, 3 | 1 << 62, 3 | 1 << 40].into_iter();
    assert!(illegal.all(|value| {
        assert_gp(expect_fault(|| xsetbv(0, value)));
        xgetbv() == now
    }));
    assert_gp(expect_fault(|| xsetbv(1, 3)));
    xsetbv(0, 3);
    assert_eq!(xgetbv(), 3);
    if legal & 4 != 0 {
        xsetbv(0, 7);
        assert_eq!(xgetbv(), 7);
    }
    xsetbv(0, now);
}

#[guest_test]
fn xsetbv_avx_needs_sse() {
    need(cpuid(1, 0)[2] >> 28 & 1 != 0, "AVX");
    not_on_qemus_cpu("lets AVX go without SSE");
    // SAFETY: AVX, and so XSAVE, is there.
    unsafe { set_cr4(cr4() | OSXSAVE) };
    assert_gp(expect_fault(|| xsetbv(0, 5)));
}

#[guest_test]
fn xsetbv_from_ring_3_is_gp() {
    need(cpuid(1, 0)[2] >> 26 & 1 != 0, "XSAVE");
    // SAFETY: XSAVE is there.
    unsafe { set_cr4(cr4() | OSXSAVE) };
    // XSETBV; UD2.
    assert_gp(expect_fault(|| {
        crate::exceptions::run_user(&[0x0f, 0x01, 0xd1, 0x0f, 0x0b])
    }));
}
