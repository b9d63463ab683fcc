//! The Rust guests: hello, and conformance with its reference.

use crate::dialogue::{Case, Ending, Load, QEMU_BIOS, Source, Step};
use crate::emulator::Pace;

/// `guest-hello` alone.
pub(super) const HELLO: Case = Case {
    group: "hello",
    name: "prints-and-ends",
    load: Load::Bundle {
        config: &[r#"
[[vm]]
name = "hello"
kind = "pvh"
kernel = "guest-hello"
memory = "16MiB"
[vm.devices]
debug_exit = true
"#],
        files: &[("guest-hello", Source::Made("guest-hello"))],
        spoil: None,
    },
    steps: &[
        Step::Expect("(?i)hello"),
        Step::Expect(r"^tessera\| vm hello: ended: debug exit, code 1$"),
    ],
    deadline: 30,
    ..Case::BASE
};

pub(super) const CONFORMANCE: Case = Case {
    group: "conformance",
    load: Load::Bundle {
        config: &[r#"
[[vm]]
name = "conformance"
kind = "pvh"
kernel = "guest-conformance"
memory = "256MiB"
[vm.devices]
debug_exit = true
debug_console = true
rng = true
virtio_console = true
"#],
        files: &[("guest-conformance", Source::Made("guest-conformance"))],
        spoil: None,
    },
    steps: &[
        Step::Expect(r"^\d+ passed, 0 failed"),
        Step::Expect(r"^tessera\| vm conformance: ended: debug exit, code 1$"),
    ],
    // Its measurements must not depend on how busy the machine under the emulator is.
    pace: Pace::Even,
    deadline: 240,
    ..Case::BASE
};

pub(super) const CASES: &[Case] = &[
    HELLO,
    Case {
        name: "virtual-pc",
        ..CONFORMANCE
    },
    Case {
        name: "reference",
        on: &[QEMU_BIOS],
        load: Load::Reference {
            guest: "guest-conformance",
            append: "",
        },
        // The exit status alone would not do: an emulator that does not start has the same.
        steps: &[Step::Expect(r"^\d+ passed, 0 failed")],
        // Value 0 at the debug-exit port: (0 << 1) | 1.
        end: Ending::Exit(1),
        ..CONFORMANCE
    },
    Case {
        group: "hello",
        name: "two-side-by-side",
        load: Load::Bundle {
            config: &[r#"
[[vm]]
name = "one"
kind = "pvh"
kernel = "guest-hello"
memory = "16MiB"
[vm.devices]
debug_exit = true

[[vm]]
name = "two"
kind = "pvh"
kernel = "guest-hello"
memory = "16MiB"
[vm.devices]
debug_exit = true
"#],
            files: &[("guest-hello", Source::Made("guest-hello"))],
            spoil: None,
        },
        steps: &[Step::Expect(r"^tessera\| end: status=0")],
        end: Ending::Judged(0, |heard| super::left_well(heard, &["one", "two"])),
        ..HELLO
    },
];
