//! Several CPUs in one guest.

use super::guests::CONFORMANCE;
use crate::dialogue::{Case, Ending, Load, QEMU_BIOS, Step};

pub(super) const CASES: &[Case] = &[
    // What the same cases find without a hypervisor.
    Case {
        group: "smp",
        name: "reference",
        on: &[QEMU_BIOS],
        cpus: 4,
        load: Load::Reference {
            guest: "guest-conformance",
            append: "smp_",
        },
        steps: &[Step::Expect(r"^\d+ passed, 0 failed")],
        // Value 0 at the debug-exit port: (0 << 1) | 1.
        end: Ending::Exit(1),
        ..CONFORMANCE
    },
];
