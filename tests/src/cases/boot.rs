//! The same disk image by each firmware.

use super::guests::HELLO;
use crate::dialogue::{BOCHS_BIOS, Case, QEMU_BIOS, QEMU_UEFI};

pub(super) const CASES: &[Case] = &[
    Case {
        group: "boot",
        name: "uefi",
        on: &[QEMU_UEFI],
        ..HELLO
    },
    Case {
        group: "boot",
        name: "bios",
        on: &[QEMU_BIOS, BOCHS_BIOS],
        ..HELLO
    },
    // RAM on both sides of the hole below 4 GiB.
    Case {
        group: "boot",
        name: "above-4-gib",
        on: &[QEMU_UEFI, QEMU_BIOS, BOCHS_BIOS],
        memory: Some(6144),
        ..HELLO
    },
];
