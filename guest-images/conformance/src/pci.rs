//! PCI configuration space by mechanism 1 and by ECAM (PCI 3.0 §3.2.2.3.2, PCIe 5.0 §7.2.2).

use crate::acpi::ecam;
use crate::util::need;
use guest_runtime::cpu::{inb, inl, inw, outl, read32};
use guest_runtime::guest_test;

fn address(bus: u32, device: u32, function: u32, offset: u32) -> u32 {
    1 << 31 | bus << 16 | device << 11 | function << 8 | offset & 0xfc
}

fn select(bus: u32, device: u32, function: u32, offset: u32) {
    // SAFETY: selects a register, and does nothing to it.
    unsafe { outl(0xcf8, address(bus, device, function, offset)) };
}

fn dword(bus: u32, device: u32, function: u32, offset: u32) -> u32 {
    select(bus, device, function, offset);
    // SAFETY: reading configuration space has no side effect.
    unsafe { inl(0xcfc) }
}

fn functions() -> impl Iterator<Item = (u32, u32)> {
    (0..32)
        .flat_map(|device| (0..8).map(move |function| (device, function)))
        .filter(|&(device, function)| dword(0, device, function, 0) != u32::MAX)
}

#[guest_test]
fn pci_address_register_reads_back() {
    for offset in [0, 0x3c] {
        select(0, 0, 0, offset);
        // SAFETY: reads the register just written.
        assert_eq!(unsafe { inl(0xcf8) }, address(0, 0, 0, offset));
    }
}

#[guest_test]
fn pci_host_bridge_is_at_zero() {
    let id = dword(0, 0, 0, 0);
    assert!(id != u32::MAX && id & 0xffff != 0);
    assert_eq!(dword(0, 0, 0, 8) >> 16, 0x0600, "class");
    assert_eq!(dword(0, 0, 0, 12) >> 16 & 0x7f, 0, "header type");
}

#[guest_test]
fn pci_bytes_and_words_are_parts_of_dwords() {
    for (device, function) in functions() {
        for offset in (0..0x40).step_by(4) {
            let whole = dword(0, device, function, offset);
            for byte in 0..4u16 {
                // SAFETY: reading configuration space has no side effect.
                let part = unsafe { inb(0xcfc + byte) };
                assert_eq!(
                    part,
                    whole.to_le_bytes()[usize::from(byte)],
                    "{device}.{function} {offset:x}"
                );
            }
            for word in 0..2u16 {
                // SAFETY: as above.
                let part = unsafe { inw(0xcfc + 2 * word) };
                assert_eq!(u32::from(part), whole >> (16 * word) & 0xffff);
            }
        }
    }
}

#[guest_test]
fn pci_absent_devices_read_as_ones() {
    let Some(absent) = (1..32).find(|&device| dword(0, device, 0, 0) == u32::MAX) else {
        guest_runtime::skip("no absent device")
    };
    for offset in [4, 8, 0x3c] {
        assert_eq!(dword(0, absent, 0, offset), u32::MAX);
    }
    // SAFETY: reading configuration space has no side effect.
    unsafe {
        assert_eq!((inb(0xcfd), inw(0xcfe)), (0xff, 0xffff));
    }
    assert_eq!(dword(0xfe, 0, 0, 0), u32::MAX, "bus 254");
}

#[guest_test]
fn pci_disabled_mechanism_reads_as_ones() {
    // SAFETY: bit 31 off: the data port is not configuration space.
    unsafe {
        outl(0xcf8, 0);
        assert_eq!(inl(0xcfc), u32::MAX);
    }
}

#[guest_test]
fn pci_ecam_shows_the_same() {
    let Some((base, first, _)) = ecam() else {
        guest_runtime::skip("no MCFG")
    };
    need(first == 0 && base < 1 << 32, "ECAM of bus 0 below 4 GiB");
    for (device, function) in functions() {
        let at = base + u64::from(device << 15 | function << 12);
        for offset in (0..0x100).step_by(4) {
            // SAFETY: ECAM is mapped; reading it has no side effect.
            let found = unsafe { read32(at + u64::from(offset)) };
            assert_eq!(
                found,
                dword(0, device, function, offset),
                "{device}.{function} {offset:x}"
            );
        }
    }
}

#[guest_test]
fn pci_ecam_reads_bytes_and_words() {
    let Some((base, ..)) = ecam() else {
        guest_runtime::skip("no MCFG")
    };
    need(base < 1 << 32, "ECAM below 4 GiB");
    let whole = dword(0, 0, 0, 0).to_le_bytes();
    for (i, wanted) in whole.into_iter().enumerate() {
        // SAFETY: ECAM is mapped; reading it has no side effect.
        let found = unsafe { ((base + i as u64) as *const u8).read_volatile() };
        assert_eq!(found, wanted);
    }
    // SAFETY: as above.
    let word = unsafe { ((base + 2) as *const u16).read_volatile() };
    assert_eq!(word.to_le_bytes(), whole[2..]);
}

#[guest_test]
fn pci_ecam_absent_reads_as_ones() {
    let Some((base, ..)) = ecam() else {
        guest_runtime::skip("no MCFG")
    };
    need(base < 1 << 32, "ECAM below 4 GiB");
    let Some(absent) = (1..32u32).find(|&device| dword(0, device, 0, 0) == u32::MAX) else {
        guest_runtime::skip("no absent device")
    };
    // SAFETY: ECAM is mapped; reading it has no side effect.
    assert_eq!(unsafe { read32(base + u64::from(absent << 15)) }, u32::MAX);
}

#[guest_test]
fn pci_identity_is_read_only() {
    let id = dword(0, 0, 0, 0);
    let class = dword(0, 0, 0, 8);
    select(0, 0, 0, 0);
    // SAFETY: the registers are read-only.
    unsafe { outl(0xcfc, !id) };
    assert_eq!(dword(0, 0, 0, 0), id);
    select(0, 0, 0, 8);
    // SAFETY: as above.
    unsafe { outl(0xcfc, !class) };
    assert_eq!(dword(0, 0, 0, 8), class);
}
