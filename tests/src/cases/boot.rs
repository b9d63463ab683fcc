//! The same disk image by each firmware.

use super::guests::HELLO;
use crate::dialogue::{BOCHS_BIOS, Case, Ending, Load, QEMU_BIOS, QEMU_UEFI, Step};

/// What the loaders promise the kernel, checked from inside.
const HAND_OFF: Case = Case {
    group: "boot",
    on: &[QEMU_UEFI, QEMU_BIOS, BOCHS_BIOS],
    load: Load::Probe,
    steps: &[Step::Expect("^probe: ok$")],
    end: Ending::Dialogue,
    deadline: 30,
    ..Case::BASE
};

pub(super) const CASES: &[Case] = &[
    Case {
        name: "hand-off",
        ..HAND_OFF
    },
    Case {
        name: "hand-off-6-gib",
        memory: Some(6144),
        ..HAND_OFF
    },
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
