//! Model-specific registers (Intel SDM Vol. 4, AMD APM Vol. 2 appendix A).

use crate::util::{EFER, assert_gp, need, not_in_tcg, not_on_qemus_cpu, tsc_hz};
use core::arch::asm;
use guest_runtime::cpu::{cpuid, rdmsr, rdtsc, try_rdmsr, try_wrmsr, wrmsr};
use guest_runtime::{expect_fault, guest_test, pc};

const PAT: u32 = 0x277;
const STAR: u32 = 0xc000_0081;
const LSTAR: u32 = 0xc000_0082;
const CSTAR: u32 = 0xc000_0083;
const SFMASK: u32 = 0xc000_0084;
const FS_BASE: u32 = 0xc000_0100;
const GS_BASE: u32 = 0xc000_0101;
const KERNEL_GS_BASE: u32 = 0xc000_0102;
const TSC_AUX: u32 = 0xc000_0103;
const TSC: u32 = 0x10;
const TSC_ADJUST: u32 = 0x3b;
const MTRR_CAP: u32 = 0xfe;
const MTRR_DEF_TYPE: u32 = 0x2ff;
const NOT_CANONICAL: u64 = 0x8000_0000_0000_0000;

/// Writes values that all must read back, and puts the old one back.
fn round_trip(index: u32, values: &[u64]) {
    // SAFETY: the callers' MSRs exist, and nothing uses them in between.
    unsafe {
        let kept = rdmsr(index);
        for &value in values {
            wrmsr(index, value);
            let found = rdmsr(index);
            if found != value {
                wrmsr(index, kept);
            }
            assert_eq!(found, value, "MSR {index:x}");
        }
        wrmsr(index, kept);
        assert_eq!(rdmsr(index), kept);
    }
}

/// Writes that all must be #GP(0) and change nothing.
fn refused(index: u32, values: &[u64]) {
    // SAFETY: the callers' MSRs exist; a write that is not refused is put back.
    unsafe {
        let kept = rdmsr(index);
        for &value in values {
            let result = try_wrmsr(index, value);
            if result.is_ok() {
                let _ = try_wrmsr(index, kept);
                panic!("MSR {index:x} took {value:x}");
            }
            assert_gp(result.err());
            assert_eq!(rdmsr(index), kept);
        }
    }
}

#[guest_test]
fn msr_unknown_read_is_gp() {
    not_in_tcg("reads unknown MSRs as 0");
    for index in [
        0x0000_0bad,
        0x1234_5678,
        0xc000_0fff,
        0xc001_fff0,
        0xffff_ffff,
    ] {
        assert_gp(try_rdmsr(index).err());
    }
}

#[guest_test]
fn msr_unknown_write_is_gp() {
    not_in_tcg("ignores writes to unknown MSRs");
    for index in [
        0x0000_0bad,
        0x1234_5678,
        0xc000_0fff,
        0xc001_fff0,
        0xffff_ffff,
    ] {
        // SAFETY: nothing is there.
        assert_gp(unsafe { try_wrmsr(index, 0) }.err());
    }
}

#[guest_test]
fn msr_read_clears_the_upper_halves() {
    let (a, d): (u64, u64);
    // SAFETY: the PAT exists, and reading it changes nothing; upper ECX bits are ignored.
    unsafe {
        asm!("rdmsr", in("rcx") u64::from(PAT) | 0xffff_ffff_0000_0000,
             inout("rax") u64::MAX => a, inout("rdx") u64::MAX => d);
    }
    assert_eq!((a | d) >> 32, 0);
}

#[guest_test]
fn msr_syscall_registers_keep_what_is_written() {
    round_trip(STAR, &[0, 0x0023_0010_1234_5678]);
    round_trip(LSTAR, &[0, 0xffff_8000_1234_5678, 0x7fff_ffff_f000]);
    round_trip(CSTAR, &[0, 0xffff_8000_1234_5678]);
    round_trip(SFMASK, &[0, 0x4_7700]);
}

#[guest_test]
fn msr_segment_bases_keep_what_is_written() {
    for index in [FS_BASE, GS_BASE, KERNEL_GS_BASE] {
        round_trip(index, &[0, 0x1234_5678_9abc, 0xffff_ffff_ffff_f000]);
    }
}

#[guest_test]
fn msr_fs_and_gs_bases_address_memory() {
    static CELL: [u64; 2] = [0x1111_2222_3333_4444, 0x5555_6666_7777_8888];
    let (first, second, swapped): (u64, u64, u64);
    // SAFETY: both bases point at `CELL`, and get their old values back.
    unsafe {
        let kept = [rdmsr(FS_BASE), rdmsr(GS_BASE), rdmsr(KERNEL_GS_BASE)];
        wrmsr(FS_BASE, &raw const CELL as u64);
        wrmsr(GS_BASE, &raw const CELL as u64 + 8);
        wrmsr(KERNEL_GS_BASE, &raw const CELL as u64);
        asm!("mov {}, fs:[0]", out(reg) first);
        asm!("mov {}, gs:[0]", out(reg) second);
        asm!("swapgs", "mov {}, gs:[0]", out(reg) swapped);
        let after = [rdmsr(GS_BASE), rdmsr(KERNEL_GS_BASE)];
        wrmsr(FS_BASE, kept[0]);
        wrmsr(GS_BASE, kept[1]);
        wrmsr(KERNEL_GS_BASE, kept[2]);
        assert_eq!(after, [&raw const CELL as u64, &raw const CELL as u64 + 8]);
    }
    assert_eq!([first, second, swapped], [CELL[0], CELL[1], CELL[0]]);
}

#[guest_test]
fn msr_noncanonical_address_is_gp() {
    not_on_qemus_cpu("takes addresses that are not canonical");
    for index in [LSTAR, CSTAR, FS_BASE, GS_BASE, KERNEL_GS_BASE] {
        refused(index, &[NOT_CANONICAL, 0x0000_8000_0000_0000]);
    }
    if pc::is_intel() {
        refused(0x175, &[NOT_CANONICAL]);
        refused(0x176, &[NOT_CANONICAL]);
    }
}

#[guest_test]
fn msr_sysenter_registers_keep_what_is_written() {
    round_trip(0x174, &[0, 8]);
    round_trip(0x175, &[0, 0x1234_5678]);
    round_trip(0x176, &[0, 0x1234_5678]);
    if pc::is_intel() {
        round_trip(0x175, &[0xffff_8000_1234_5678]);
        round_trip(0x176, &[0xffff_8000_1234_5678]);
    }
}

#[guest_test]
fn msr_efer_reserved_bits_are_gp() {
    not_in_tcg("ignores reserved bits of EFER");
    refused(
        EFER,
        &[
            0xd00 | 1 << 1,
            0xd00 | 1 << 9,
            0xd00 | 1 << 16,
            0xd00 | 1 << 63,
        ],
    );
}

#[guest_test]
fn msr_efer_lme_cannot_change_while_paging() {
    not_in_tcg("lets LME change while paging is on");
    refused(EFER, &[0xc00]);
}

#[guest_test]
fn msr_efer_sce_can_be_set() {
    round_trip(EFER, &[0xd01, 0xd00]);
    // LMA is read-only: a write that differs in it leaves it.
    // SAFETY: LME and NXE keep their values.
    let result = unsafe { try_wrmsr(EFER, 0x900) };
    // SAFETY: EFER exists.
    assert!(result.is_err() || unsafe { rdmsr(EFER) } == 0xd00);
}

#[guest_test]
fn msr_pat_takes_every_legal_type() {
    round_trip(
        PAT,
        &[
            0x0007_0406_0007_0406,
            0x0606_0606_0606_0606,
            0x0001_0405_0607_0001,
        ],
    );
}

#[guest_test]
fn msr_pat_illegal_type_is_gp() {
    not_in_tcg("takes any PAT");
    refused(
        PAT,
        &[
            0x0007_0406_0007_0402,
            0x0307_0406_0007_0406,
            0x0807_0406_0007_0406,
        ],
    );
}

#[guest_test]
fn msr_mtrrs_keep_what_is_written() {
    need(cpuid(1, 0)[3] >> 12 & 1 != 0, "MTRR");
    // SAFETY: CPUID offers MTRRs. All ranges stay write-back or off, so nothing changes for memory
    // in use.
    unsafe {
        let cap = rdmsr(MTRR_CAP);
        let variable = (cap & 0xff) as u32;
        assert!(variable >= 1);
        for range in 0..variable.min(8) {
            round_trip(0x200 + 2 * range, &[0, 0xe000_0000, 0xc000_0006]);
            round_trip(0x201 + 2 * range, &[0, 0xf_f000_0000]);
        }
        if cap >> 8 & 1 != 0 {
            for index in [0x250, 0x258, 0x259, 0x268, 0x26f] {
                round_trip(index, &[0x0606_0606_0606_0606, 0]);
            }
        }
        round_trip(MTRR_DEF_TYPE, &[0xc06, 6]);
    }
}

#[guest_test]
fn msr_mtrr_illegal_values_are_gp() {
    need(cpuid(1, 0)[3] >> 12 & 1 != 0, "MTRR");
    not_in_tcg("does not check MTRRs");
    refused(MTRR_CAP, &[0, 0x508]);
    refused(MTRR_DEF_TYPE, &[2, 0xc07, 1 << 12 | 6, 1 << 63]);
    refused(0x200, &[2, 0x100, 1 << 60]);
    refused(0x250, &[2, 0x0700_0000_0000_0000]);
}

#[guest_test]
fn msr_apic_base_names_the_boot_cpu() {
    // SAFETY: the MSR exists.
    let base = unsafe { rdmsr(pc::APIC_BASE) };
    assert_eq!(base & 0xfff, 0x900, "BSP, enabled, xAPIC");
    assert_eq!(base & 0xf_ffff_f000, pc::LAPIC);
}

#[guest_test]
fn msr_apic_base_reserved_bits_are_gp() {
    not_in_tcg("does not check APIC_BASE");
    // SAFETY: the MSR exists.
    let base = unsafe { rdmsr(pc::APIC_BASE) };
    refused(pc::APIC_BASE, &[base | 1, base | 1 << 9, base | 1 << 60]);
    // Disabled and x2APIC at once.
    refused(pc::APIC_BASE, &[base & !0x800 | 0x400]);
}

#[guest_test]
fn msr_tsc_aux_is_what_rdtscp_gives() {
    need(cpuid(0x8000_0001, 0)[3] >> 27 & 1 != 0, "RDTSCP");
    // SAFETY: RDTSCP, and with it the MSR, exists; nothing else uses it.
    unsafe {
        let kept = rdmsr(TSC_AUX);
        wrmsr(TSC_AUX, 0x1234_5678);
        let (aux, low, high): (u32, u32, u32);
        asm!("rdtscp", out("ecx") aux, out("eax") low, out("edx") high);
        let later = rdtsc();
        wrmsr(TSC_AUX, kept);
        assert_eq!(aux, 0x1234_5678);
        let stamp = u64::from(high) << 32 | u64::from(low);
        assert!(stamp <= later && later - stamp < tsc_hz());
    }
}

#[guest_test]
fn msr_tsc_reads_as_rdtsc() {
    not_in_tcg("reads it as 0");
    // SAFETY: the MSR exists.
    let (before, read, after) = (rdtsc(), unsafe { rdmsr(TSC) }, rdtsc());
    assert!(before <= read && read <= after, "{before} {read} {after}");
}

#[guest_test]
fn msr_tsc_can_be_written() {
    not_in_tcg("ignores writes to the TSC");
    // SAFETY: the TSC gets the time back that it lost.
    unsafe {
        let before = rdtsc();
        wrmsr(TSC, 1 << 50);
        let after = rdtsc();
        let ahead = after.wrapping_sub(1 << 50);
        wrmsr(TSC, before + ahead);
        assert!(ahead < tsc_hz(), "{after:x}");
        let back = rdtsc();
        assert!(back >= before && back - before < tsc_hz());
    }
}

#[guest_test]
fn msr_tsc_adjust_moves_the_tsc() {
    need(
        cpuid(0, 0)[0] >= 7 && cpuid(7, 0)[1] >> 1 & 1 != 0,
        "TSC_ADJUST",
    );
    // SAFETY: CPUID offers the MSR, and it gets its value back.
    unsafe {
        let kept = rdmsr(TSC_ADJUST);
        let before = rdtsc();
        wrmsr(TSC_ADJUST, kept + (1 << 45));
        let moved = rdtsc();
        let read = rdmsr(TSC_ADJUST);
        wrmsr(TSC_ADJUST, kept);
        let back = rdtsc();
        assert_eq!(read, kept + (1 << 45));
        assert!((moved - before) >> 45 == 1, "{before:x} {moved:x}");
        assert!(back >= before && back - before < tsc_hz());
    }
}

#[guest_test]
fn msr_microcode_and_platform_can_be_read() {
    let _ = try_rdmsr(0x8b).map_err(|fault| panic!("{fault:?}"));
    if pc::is_intel() {
        // Locked and without VMX, or not there.
        if let Ok(control) = try_rdmsr(0x3a) {
            assert!(control & 1 == 1 && control & 4 == 0 || cpuid(1, 0)[2] >> 5 & 1 != 0);
        }
        assert!(try_rdmsr(0x1a0).is_ok(), "MISC_ENABLE");
    }
}

#[guest_test]
fn msr_machine_check_banks_are_consistent() {
    need(cpuid(1, 0)[3] >> 14 & 1 != 0, "MCA");
    let Ok(cap) = try_rdmsr(0x179) else {
        panic!("no MCG_CAP")
    };
    assert!(try_rdmsr(0x17a).is_ok(), "MCG_STATUS");
    for bank in 0..(cap & 0xff) as u32 {
        assert!(try_rdmsr(0x401 + 4 * bank).is_ok(), "MC{bank}_STATUS");
    }
}

#[guest_test]
fn msr_access_from_ring_3_is_gp() {
    for code in [[0x0f, 0x32, 0x0f, 0x0b], [0x0f, 0x30, 0x0f, 0x0b]] {
        assert_gp(expect_fault(|| crate::exceptions::run_user(&code)));
    }
}

#[guest_test]
fn msr_number_is_32_bits_of_ecx_only() {
    let low: u32;
    // SAFETY: IA32_APIC_BASE exists; only its low half is looked at.
    unsafe {
        asm!("rdmsr", in("rcx") u64::from(pc::APIC_BASE) | 0xdead_beef_0000_0000, out("eax") low, out("edx") _);
    }
    assert_eq!(u64::from(low) & 0xffff_f000, pc::LAPIC);
}
