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

/// A machine whose cores all come, and then run a guest. Memory is no more than a small machine has.
const CORES: Case = Case {
    group: "boot",
    memory: Some(256),
    on: &[QEMU_BIOS],
    ..HELLO
};

/// What the log says of them.
macro_rules! all_come {
    ($cores:literal) => {
        &[
            Step::Expect(concat!(
                r"^tessera\| cores: ",
                $cores,
                " of ",
                $cores,
                r" started in \d+ µs$"
            )),
            Step::Expect(r"^tessera\| TSC: cores agree within \d+ ticks$"),
            Step::Expect(r"^tessera\| vm hello: ended: debug exit, code 1$"),
        ]
    };
}

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
    Case {
        name: "one-core",
        on: &[QEMU_BIOS, BOCHS_BIOS],
        steps: &[Step::Expect(r"^tessera\| cores: 1 of 1 started in ")],
        ..CORES
    },
    Case {
        name: "two-cores",
        on: &[QEMU_BIOS, QEMU_UEFI, BOCHS_BIOS],
        cpus: 2,
        steps: all_come!("2"),
        ..CORES
    },
    Case {
        name: "four-cores",
        on: &[QEMU_BIOS, BOCHS_BIOS],
        cpus: 4,
        steps: all_come!("4"),
        ..CORES
    },
    // Ids with a gap, up to the highest that messages in xAPIC mode name.
    Case {
        name: "sparse-ids",
        on: &[QEMU_BIOS, QEMU_UEFI],
        cpus: 4,
        sparse: true,
        steps: all_come!("4"),
        ..CORES
    },
    Case {
        name: "sixteen-cores",
        cpus: 16,
        steps: all_come!("16"),
        ..CORES
    },
    Case {
        name: "sixty-four-cores",
        on: &[QEMU_BIOS, QEMU_UEFI],
        cpus: 64,
        steps: all_come!("64"),
        ..CORES
    },
];
