//! CPUID (Intel SDM Vol. 2A, AMD APM Vol. 3 appendix E).

use crate::util::{OSXSAVE, need};
use core::arch::asm;
use guest_runtime::cpu::{cpuid, cr4, set_cr4};
use guest_runtime::{guest_test, pc};

#[guest_test]
fn cpuid_leaf_limits_are_sane() {
    let [basic, ..] = cpuid(0, 0);
    assert!((1..0x100).contains(&basic), "highest basic leaf {basic:x}");
    let [extended, ..] = cpuid(0x8000_0000, 0);
    assert!(
        (0x8000_0008..0x8000_0100).contains(&extended),
        "highest extended leaf {extended:x}"
    );
    assert!(matches!(
        cpuid(0, 0)[1].to_le_bytes(),
        [b'G', b'e', b'n', b'u'] | [b'A', b'u', b't', b'h']
    ));
}

#[guest_test]
fn cpuid_beyond_the_limit_is_zero_or_the_last_leaf() {
    let [last, ..] = cpuid(0, 0);
    let beyond = cpuid(last + 0x1000, 0);
    assert!(beyond == [0; 4] || beyond == cpuid(last, 0), "{beyond:x?}");
}

#[guest_test]
fn cpuid_tells_of_a_hypervisor() {
    assert_eq!(cpuid(1, 0)[2] >> 31, 1);
    let [last, b, c, d] = cpuid(0x4000_0000, 0);
    assert!(
        last == 0 || (0x4000_0000..0x4001_0000).contains(&last),
        "{last:x}"
    );
    for byte in [b, c, d].into_iter().flat_map(u32::to_le_bytes) {
        assert!(
            byte == 0 || byte.is_ascii_graphic() || byte == b' ',
            "{byte:x}"
        );
    }
}

#[guest_test]
fn cpuid_clears_the_upper_halves() {
    let (a, b, c, d): (u64, u64, u64, u64);
    // SAFETY: CPUID changes only registers; RBX is put back.
    unsafe {
        asm!("mov {k}, rbx", "mov rbx, rdx", "cpuid", "xchg {k}, rbx", k = out(reg) b,
             inout("rax") 0xffff_ffff_0000_0000_u64 => a,
             inout("rcx") 0xffff_ffff_0000_0000_u64 => c,
             inout("rdx") u64::MAX => d);
    }
    assert_eq!((a | b | c | d) >> 32, 0, "{a:x} {b:x} {c:x} {d:x}");
}

#[guest_test]
fn cpuid_repeats_itself() {
    for base in [0, 0x4000_0000, 0x8000_0000] {
        let [last, ..] = cpuid(base, 0);
        for leaf in base..=last.min(base + 0x40) {
            for subleaf in 0..4 {
                assert_eq!(
                    cpuid(leaf, subleaf),
                    cpuid(leaf, subleaf),
                    "{leaf:x}.{subleaf}"
                );
            }
        }
    }
}

#[guest_test]
fn cpuid_has_what_long_mode_needs() {
    let [_, _, _, d] = cpuid(1, 0);
    // FPU, TSC, MSR, PAE, CX8, APIC, PGE, CMOV, PAT, FXSR, SSE, SSE2.
    for bit in [0, 4, 5, 6, 8, 9, 13, 15, 16, 24, 25, 26] {
        assert!(d >> bit & 1 != 0, "CPUID.1:EDX[{bit}]");
    }
    let [_, _, _, d] = cpuid(0x8000_0001, 0);
    for bit in [20, 29] {
        assert!(d >> bit & 1 != 0, "CPUID.80000001H:EDX[{bit}]");
    }
}

#[guest_test]
fn cpuid_features_agree_with_each_other() {
    let [_, _, c, _] = cpuid(1, 0);
    let has = |bit: u32| c >> bit & 1 != 0;
    assert!(!has(28) || has(26), "AVX without XSAVE");
    assert!(!has(12) || has(28), "FMA without AVX");
    let [last, ..] = cpuid(0, 0);
    if last >= 7 {
        let [_, b, ..] = cpuid(7, 0);
        assert!(b >> 5 & 1 == 0 || has(28), "AVX2 without AVX");
        assert!(
            b >> 10 & 1 == 0 || has(17) || !pc::is_intel(),
            "INVPCID without PCID"
        );
    }
    if has(26) {
        assert!(last >= 0xd);
        let [low, ..] = cpuid(0xd, 0);
        assert_eq!(low & 3, 3, "x87 and SSE in XCR0");
        assert_eq!(low >> 2 & 1, c >> 28 & 1, "AVX in XCR0");
    }
}

#[guest_test]
fn cpuid_osxsave_follows_cr4() {
    need(cpuid(1, 0)[2] >> 26 & 1 != 0, "XSAVE");
    let shown = || cpuid(1, 0)[2] >> 27 & 1;
    assert_eq!(shown(), 0);
    // SAFETY: XSAVE is there.
    unsafe { set_cr4(cr4() | OSXSAVE) };
    assert_eq!(shown(), 1);
    // SAFETY: as before.
    unsafe { set_cr4(cr4() & !OSXSAVE) };
    assert_eq!(shown(), 0);
}

#[guest_test]
fn cpuid_xsave_size_follows_xcr0() {
    need(cpuid(1, 0)[2] >> 28 & 1 != 0, "AVX");
    let set = |mask: u32| {
        // SAFETY: CPUID offers these components.
        unsafe {
            set_cr4(cr4() | OSXSAVE);
            asm!("xsetbv", in("ecx") 0, in("eax") mask, in("edx") 0);
        }
        cpuid(0xd, 0)[1]
    };
    assert_eq!(set(1), 576);
    assert_eq!(set(3), 576);
    let [size, offset, ..] = cpuid(0xd, 2);
    assert_eq!((size, offset), (256, 576));
    assert_eq!(set(7), 832);
    assert_eq!(set(1), 576);
    assert!(cpuid(0xd, 0)[2] >= 832);
}

#[guest_test]
fn cpuid_apic_ids_agree() {
    let initial = cpuid(1, 0)[1] >> 24;
    assert_eq!(initial, pc::lapic(pc::reg::ID) >> 24);
    if cpuid(0, 0)[0] >= 0xb {
        let [_, width, _, id] = cpuid(0xb, 0);
        assert!(width & 0xffff == 0 || id & 0xff == initial);
    }
}

#[guest_test]
fn cpuid_address_widths_are_legal() {
    let [a, ..] = cpuid(0x8000_0008, 0);
    assert!((32..=52).contains(&(a & 0xff)), "{a:x}");
    assert!(matches!(a >> 8 & 0xff, 48 | 57), "{a:x}");
}

#[guest_test]
fn cpuid_brand_string_is_text() {
    for leaf in 0x8000_0002..=0x8000_0004 {
        for byte in cpuid(leaf, 0).into_iter().flat_map(u32::to_le_bytes) {
            assert!(byte == 0 || (0x20..0x7f).contains(&byte), "{byte:x}");
        }
    }
}

#[guest_test]
fn cpuid_leaves_flags_alone() {
    let flags: u64;
    // SAFETY: the arithmetic flags are the compiler's to forget.
    unsafe {
        asm!("mov {k}, rbx", "xor eax, eax", "xor ecx, ecx", "stc", "cpuid", "pushfq", "mov rbx, {k}", "pop {k}",
             k = out(reg) flags, out("eax") _, out("ecx") _, out("edx") _);
    }
    // XOR left ZF and PF set, STC set CF.
    assert_eq!(flags & 0x8d5, 0x45, "{flags:x}");
}
