//! The TSC against the other clocks, and the paravirtual clock (Linux's
//! `Documentation/virt/kvm/x86/msr.rst`).

use crate::util::{
    PM_HZ, assert_close, assert_measures, need, pm_and_tsc, pm_between, pm_timer, tsc_hz, wait,
};
use guest_runtime::cpu::{cpuid, rdtsc, wrmsr};
use guest_runtime::{Page, guest_test};

#[guest_test]
fn tsc_is_monotone_over_exits() {
    let mut last = rdtsc();
    for _ in 0..500 {
        let _ = cpuid(0, 0);
        let now = rdtsc();
        assert!(now > last, "{last} then {now}");
        last = now;
    }
}

#[guest_test]
fn tsc_keeps_its_rate_by_the_pm_timer() {
    let wanted = tsc_hz();
    assert_measures(
        || {
            let (pm, tsc) = pm_and_tsc();
            while pm_between(pm, pm_timer()) < PM_HZ / 20 {}
            let (pm_end, tsc_end) = pm_and_tsc();
            (tsc_end - tsc) * PM_HZ / pm_between(pm, pm_end)
        },
        wanted,
        10,
    );
}

#[guest_test]
fn tsc_rate_is_what_cpuid_says() {
    let hypervisor = cpuid(0x4000_0000, 0)[0];
    let khz = if (0x4000_0010..0x4000_0100).contains(&hypervisor) {
        cpuid(0x4000_0010, 0)[0]
    } else {
        0
    };
    if khz != 0 {
        assert_close(tsc_hz(), u64::from(khz) * 1000, 10);
    }
    let [ratio, by, crystal, _] = if cpuid(0, 0)[0] >= 0x15 {
        cpuid(0x15, 0)
    } else {
        [0; 4]
    };
    if ratio != 0 && by != 0 && crystal != 0 {
        assert_close(
            tsc_hz(),
            u64::from(crystal) * u64::from(by) / u64::from(ratio),
            10,
        );
    }
    need(
        khz != 0 || ratio != 0 && crystal != 0,
        "leaf with the TSC's rate",
    );
}

#[guest_test]
fn tsc_is_invariant() {
    need(cpuid(0x8000_0007, 0)[3] >> 8 & 1 != 0, "invariant TSC");
    // Runs on in a halt: an APIC-timer's worth of it is seen by TSC and PM timer alike.
    guest_runtime::on_interrupt(0x75, guest_runtime::pc::handle_eoi);
    guest_runtime::pc::set_lapic(guest_runtime::pc::reg::DIVIDE, 0xb);
    guest_runtime::pc::set_lapic(guest_runtime::pc::reg::LVT_TIMER, 0x75);
    let (pm, tsc) = pm_and_tsc();
    while pm_between(pm, pm_timer()) < PM_HZ / 30 {
        guest_runtime::pc::set_lapic(guest_runtime::pc::reg::INITIAL, 1_000_000);
        guest_runtime::cpu::wait_for_interrupt();
    }
    let (pm_end, tsc_end) = pm_and_tsc();
    assert_close(
        (tsc_end - tsc) * PM_HZ / pm_between(pm, pm_end),
        tsc_hz(),
        15,
    );
}

static RECORD: Page = Page::zero();

/// The base of the KVM leaves, and their features.
pub fn kvm() -> Option<u32> {
    (0x4000_0000..0x4001_0000).step_by(0x100).find_map(|base| {
        let [last, b, c, d] = cpuid(base, 0);
        let signature = (b, c, d)
            == (
                u32::from_le_bytes(*b"KVMK"),
                u32::from_le_bytes(*b"VMKV"),
                u32::from_le_bytes(*b"M\0\0\0"),
            );
        (signature && last > base).then(|| cpuid(base + 1, 0)[0])
    })
}

fn pv_nanos() -> u64 {
    pv_nanos_at(RECORD.address())
}

/// `struct pvclock_vcpu_time_info` as nanoseconds now.
pub fn pv_nanos_at(at: u64) -> u64 {
    // SAFETY: the record is the caller's; the hypervisor writes it between versions.
    unsafe {
        loop {
            let version = (at as *const u32).read_volatile();
            let stamp = ((at + 8) as *const u64).read_volatile();
            let nanos = ((at + 16) as *const u64).read_volatile();
            let scale = ((at + 24) as *const u32).read_volatile();
            let shift = ((at + 28) as *const i8).read_volatile();
            let delta = rdtsc().wrapping_sub(stamp);
            if version & 1 == 0 && version == (at as *const u32).read_volatile() {
                assert_ne!((version, scale), (0, 0), "nothing was written");
                let delta = if shift < 0 {
                    delta >> -shift
                } else {
                    delta << shift
                };
                return nanos + ((u128::from(delta) * u128::from(scale)) >> 32) as u64;
            }
        }
    }
}

#[guest_test]
fn kvm_clock_is_monotone_and_runs_right() {
    let Some(features) = kvm() else {
        guest_runtime::skip("no KVM leaves")
    };
    need(features >> 3 & 1 != 0, "KVM clock");
    // SAFETY: the MSR is offered, and the page is this module's own.
    unsafe { wrmsr(0x4b56_4d01, RECORD.address() | 1) };
    let mut last = pv_nanos();
    for _ in 0..200 {
        let _ = cpuid(0, 0);
        let now = pv_nanos();
        assert!(now >= last, "{last} then {now}");
        last = now;
    }
    assert_measures(
        || {
            let (before, pm) = (pv_nanos(), pm_timer());
            wait(20_000);
            let (after, end) = (pv_nanos(), pm_timer());
            (after - before) * PM_HZ / pm_between(pm, end)
        },
        1_000_000_000,
        10,
    );
    // SAFETY: off again.
    unsafe { wrmsr(0x4b56_4d01, 0) };
}

#[guest_test]
fn kvm_wall_clock_is_this_century() {
    let Some(features) = kvm() else {
        guest_runtime::skip("no KVM leaves")
    };
    need(features >> 3 & 1 != 0, "KVM clock");
    // SAFETY: the MSR is offered, and the page is this module's own.
    let (version, seconds) = unsafe {
        wrmsr(0x4b56_4d00, RECORD.address() + 64);
        let at = (RECORD.address() + 64) as *const u32;
        (at.read_volatile(), at.add(1).read_volatile())
    };
    assert!(version != 0 && version & 1 == 0);
    assert!(seconds > 946_684_800, "{seconds}");
}
