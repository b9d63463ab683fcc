//! ACPI tables, found as an operating system does (ACPI 6.5 §5.2), and the fixed hardware that
//! the FADT names (§4.8).

use crate::util::{
    PATIENCE, PIT_HZ, PM_HZ, assert_measures, pm_between, pm_timer, wait, wait_until,
};
use guest_runtime::acpi::{Table, byte, madt, number, rsdp, table, tables};
use guest_runtime::cpu::{cpuid, inb, inw, outb, outw};
use guest_runtime::{guest_test, pc};

fn sum(address: u64, length: u64) -> u8 {
    (0..length).fold(0, |sum, i| sum.wrapping_add(byte(address + i)))
}

/// The FADT.
pub fn fadt() -> Table {
    static FOUND: core::sync::atomic::AtomicU64 = core::sync::atomic::AtomicU64::new(0);
    let found = FOUND.load(core::sync::atomic::Ordering::Relaxed);
    if found != 0 {
        return Table(found);
    }
    let Some(found) = table(b"FACP") else {
        panic!("no FADT")
    };
    FOUND.store(found.0, core::sync::atomic::Ordering::Relaxed);
    found
}

/// The base of the memory-mapped configuration space of segment 0, and its first and last bus.
pub fn ecam() -> Option<(u64, u8, u8)> {
    let mcfg = table(b"MCFG")?;
    Some((
        mcfg.field(44, 8),
        mcfg.field(54, 1) as u8,
        mcfg.field(55, 1) as u8,
    ))
}

/// The I/O port of the ACPI timer.
pub fn pm_timer_port() -> u16 {
    fadt().field(76, 4) as u16
}

#[guest_test]
fn acpi_rsdp_has_both_checksums() {
    let rsdp = rsdp();
    assert_ne!(rsdp, 0, "no RSDP");
    assert_eq!(number(rsdp, 8), u64::from_le_bytes(*b"RSD PTR "));
    assert_eq!(sum(rsdp, 20), 0);
    if byte(rsdp + 15) >= 2 {
        assert_eq!(sum(rsdp, number(rsdp + 20, 4)), 0);
    }
}

#[guest_test]
fn acpi_every_table_has_a_checksum_of_zero() {
    let mut count = 0;
    for table in tables() {
        let name = table.signature();
        assert!(table.length() >= 36, "{name:?}");
        assert_eq!(sum(table.0, table.length()), 0, "{name:?}");
        count += 1;
    }
    assert!(count >= 2);
}

#[guest_test]
fn acpi_fadt_names_dsdt_and_facs() {
    let fadt = fadt();
    let dsdt = Table(fadt.field(40, 4).max(fadt.field(140, 8)));
    assert_eq!(&dsdt.signature(), b"DSDT");
    assert_eq!(sum(dsdt.0, dsdt.length()), 0);
    let facs = fadt.field(36, 4).max(fadt.field(132, 8));
    if facs != 0 {
        assert_eq!(number(facs, 4) as u32, u32::from_le_bytes(*b"FACS"));
        assert!(facs.is_multiple_of(64) && number(facs + 4, 4) >= 64);
    }
}

#[guest_test]
fn acpi_fadt_describes_the_fixed_hardware() {
    let fadt = fadt();
    for (offset, length_at, lengths) in [(56, 88, 4..=4), (64, 89, 2..=4), (76, 91, 4..=4)] {
        assert_ne!(fadt.field(offset, 4), 0, "block at {offset}");
        let length = fadt.field(length_at, 1);
        assert!(
            lengths.contains(&length),
            "length of block at {offset}: {length}"
        );
    }
    assert_eq!(fadt.field(46, 2), 9, "SCI_INT");
    // X_ fields, where there are any, say the same.
    for (old, new) in [(56, 148), (64, 172), (76, 208)] {
        let extended = fadt.field(new + 4, 8);
        assert!(extended == 0 || extended == fadt.field(old, 4));
    }
    // The reset register, if the flags promise one.
    if fadt.field(112, 4) >> 10 & 1 != 0 {
        assert_ne!(fadt.field(120, 8), 0);
    }
}

#[guest_test]
fn acpi_madt_lists_this_cpu_and_the_io_apic() {
    let id = cpuid(1, 0)[1] >> 24;
    let cpu = madt().any(|(kind, at)| {
        kind == 0 && u32::from(byte(at + 3)) == id && number(at + 4, 4) & 1 != 0
            || kind == 9 && number(at + 4, 4) == u64::from(id) && number(at + 8, 4) & 1 != 0
    });
    assert!(cpu, "no enabled entry for APIC id {id}");
    let io = madt()
        .find(|(kind, _)| *kind == 1)
        .map(|(_, at)| (number(at + 4, 4), number(at + 8, 4)));
    assert_eq!(io, Some((pc::IOAPIC, 0)));
    // The timer is on pin 2.
    let timer = madt().any(|(kind, at)| kind == 2 && byte(at + 3) == 0 && number(at + 4, 4) == 2);
    assert!(timer, "no override of IRQ 0");
}

#[guest_test]
fn acpi_pm_timer_is_monotone_and_24_or_32_bits() {
    let mut last = pm_timer();
    for _ in 0..200 {
        let now = pm_timer();
        assert!(pm_between(last, now) < 1 << 23, "{last} then {now}");
        last = now;
    }
}

#[guest_test]
fn acpi_pm_timer_runs_at_3579545_hz_by_the_pit() {
    assert_measures(
        || {
            let start = crate::pit::start_channel_2();
            let pm = pm_timer();
            let counted = start();
            while counted() < PIT_HZ / 25 {}
            let end = pm_timer();
            pm_between(pm, end) * PIT_HZ / counted()
        },
        PM_HZ,
        15,
    );
}

#[guest_test]
fn acpi_pm1_enable_reads_back_and_status_clears_by_ones() {
    let status = fadt().field(56, 4) as u16;
    let enable = status + fadt().field(88, 1) as u16 / 2;
    // SAFETY: the PM1 registers are the guest's own; no event is left enabled, and the SCI is
    // masked.
    unsafe {
        let kept = inw(enable);
        outw(enable, 0x120);
        assert_eq!(inw(enable) & 0x121, 0x120);
        outw(enable, kept);
        outw(status, 0xffff);
        assert_eq!(inw(status) & 0x100, 0, "PWRBTN_STS");
    }
}

#[guest_test]
fn acpi_mode_can_be_entered() {
    let control = fadt().field(64, 4) as u16;
    let command = fadt().field(48, 4) as u16;
    let enable = fadt().field(52, 1) as u8;
    // SAFETY: entering ACPI mode is what every operating system does; nothing here uses the SCI.
    unsafe {
        if inw(control) & 1 == 0 {
            assert_ne!(
                (command, enable),
                (0, 0),
                "SCI_EN is off, and there is no SMI_CMD"
            );
            outb(command, enable);
            assert!(wait_until(PATIENCE, || inw(control) & 1 != 0));
        }
        assert_eq!(inw(control) & 1, 1);
        // SLP_EN reads as zero.
        assert_eq!(inw(control) & 0x2000, 0);
        let _ = inb(control);
    }
    wait(10);
}
