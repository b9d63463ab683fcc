//! Guests that do everything they should not, and must harm nobody by it.

use crate::dialogue::{BOCHS_BIOS, Case, Ending, Load, QEMU_BIOS, Source, Step};

const FILES: &[(&str, Source)] = &[
    ("guest-hello", Source::Made("guest-hello")),
    ("guest-hostile", Source::Made("guest-hostile")),
];

const HOSTILE: &str = r#"
[[vm]]
name = "hostile"
kind = "pvh"
kernel = "guest-hostile"
memory = "64MiB"
"#;

const BESIDE: &str = r#"
[vm.devices]
debug_exit = true

[[vm]]
name = "rest"
kind = "pvh"
kernel = "guest-hello"
memory = "16MiB"
[vm.devices]
debug_exit = true
"#;

/// It tries everything, survives, and ends well.
const fn survives(name: &'static str, config: &'static [&'static str]) -> Case {
    Case {
        group: "hostile",
        name,
        on: &[QEMU_BIOS, BOCHS_BIOS],
        load: Load::Bundle {
            config,
            files: FILES,
            spoil: None,
        },
        steps: &[
            Step::Expect("^hostile: survived"),
            Step::Expect(r"^tessera\| end: status=0 "),
        ],
        deadline: 240,
        end: Ending::Closing(0),
        ..Case::BASE
    }
}

/// It never ends by itself: its neighbour must run all the same, and a person can end it.
const fn endless(name: &'static str, config: &'static [&'static str]) -> Case {
    Case {
        steps: &[
            Step::Expect(r"^tessera\| vm rest: ended: debug exit, code 1"),
            Step::Send("\x14x"),
            Step::Expect(r"^tessera\| end: status=0 left at the console"),
        ],
        ..survives(name, config)
    }
}

pub(super) const CASES: &[Case] = &[
    survives(
        "all-ports",
        &[HOSTILE, "cmdline = \"io-all-ports\"\n", BESIDE],
    ),
    survives("ports", &[HOSTILE, "cmdline = \"port-storm\"\n", BESIDE]),
    survives("msrs", &[HOSTILE, "cmdline = \"msr-storm\"\n", BESIDE]),
    survives("cpuid", &[HOSTILE, "cmdline = \"cpuid-storm\"\n", BESIDE]),
    survives(
        "interrupt-controllers",
        &[HOSTILE, "cmdline = \"apic-chaos\"\n", BESIDE],
    ),
    survives(
        "end-of-address-space",
        &[HOSTILE, "cmdline = \"wrap\"\n", BESIDE],
    ),
    endless("spin", &[HOSTILE, "cmdline = \"spin\"\n", BESIDE]),
    endless(
        "exception-in-its-own-delivery",
        &[HOSTILE, "cmdline = \"db-loop\"\n", BESIDE],
    ),
    endless(
        "string-output-for-ever",
        &[HOSTILE, "cmdline = \"rep-outs-forever\"\n", BESIDE],
    ),
];
