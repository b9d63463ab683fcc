//! Wrong inputs: each gets one clear error that names place and remedy, and the rest goes on.
//!
//! A memory map with overlaps is no input that an emulator's firmware can be made to give; the
//! host tests of `boot` cover it.

use crate::dialogue::{BOCHS_BIOS, Case, Ending, Heard, Load, QEMU_BIOS, QEMU_UEFI, Source, Step};
use crate::emulator::Extension;

use Step::Told;

const HELLO_FILE: (&str, Source) = ("guest-hello", Source::Made("guest-hello"));
const HOSTILE_FILE: (&str, Source) = ("guest-hostile", Source::Made("guest-hostile"));

/// A configuration error: status 102.
const CONFIG: Case = Case {
    group: "bad-input",
    on: &[QEMU_BIOS],
    end: Ending::Closing(102),
    deadline: 30,
    ..Case::BASE
};

/// A configuration with `guest-hello` at hand.
const fn hello(config: &'static [&'static str]) -> Load {
    Load::Bundle {
        config,
        files: &[HELLO_FILE],
        spoil: None,
    }
}

/// A right VM behind a wrong one: it must end well all the same.
const REST: &str = r#"
[[vm]]
name = "rest"
kind = "pvh"
kernel = "guest-hello"
memory = "16MiB"
[vm.devices]
debug_exit = true
"#;

const END: Step = Step::Expect(r"^tessera\| end: status=");

fn rest_went_on(heard: &Heard) -> Result<(), String> {
    let line = "tessera| vm rest: ended: debug exit, code 1";
    if heard.all.contains(line) {
        Ok(())
    } else {
        Err(format!("no line `{line}`"))
    }
}

/// A VM that goes wrong in the way of its command line, which follows.
const HOSTILE: &str = r#"
[[vm]]
name = "hostile"
kind = "pvh"
kernel = "guest-hostile"
memory = "16MiB"
"#;

/// A crash beside a right VM: status 101.
const fn hostile(
    name: &'static str,
    config: &'static [&'static str],
    steps: &'static [Step],
) -> Case {
    Case {
        name,
        on: &[QEMU_BIOS, BOCHS_BIOS],
        load: Load::Bundle {
            config,
            files: &[HELLO_FILE, HOSTILE_FILE],
            spoil: None,
        },
        steps,
        end: Ending::Judged(101, rest_went_on),
        ..CONFIG
    }
}

pub(super) const CASES: &[Case] = &[
    Case {
        name: "toml-typo",
        on: &[QEMU_BIOS, QEMU_UEFI, BOCHS_BIOS],
        load: hello(&["[[vm]]\nname = \"hello\"\nkind = pvh\"\n"]),
        steps: &[Told(r"^tessera\| .*tessera\.toml:3:\d+: ")],
        ..CONFIG
    },
    Case {
        name: "unknown-key",
        load: hello(&[
            "[[vm]]\nname = \"hello\"\nkind = \"pvh\"\nkernal = \"guest-hello\"\nmemory = \"16MiB\"\n",
        ]),
        steps: &[Told(
            r"^tessera\| .*tessera\.toml:4:\d+: .*unknown key `kernal`",
        )],
        ..CONFIG
    },
    Case {
        name: "missing-kernel",
        load: hello(&[
            "[[vm]]\nname = \"lost\"\nkind = \"pvh\"\nkernel = \"nowhere\"\nmemory = \"16MiB\"\n",
            REST,
        ]),
        steps: &[Told(r"^tessera\| .*`nowhere` is not in the bundle"), END],
        end: Ending::Judged(102, rest_went_on),
        ..CONFIG
    },
    Case {
        name: "truncated-linux",
        load: Load::Bundle {
            config: &[
                "[[vm]]\nname = \"cut\"\nkind = \"linux\"\nkernel = \"vmlinuz\"\nmemory = \"128MiB\"\n",
                REST,
            ],
            files: &[("vmlinuz", Source::Cut("vmlinuz", 100_000)), HELLO_FILE],
            spoil: None,
        },
        steps: &[Told(r"^tessera\| .*cut.*is truncated"), END],
        end: Ending::Judged(102, rest_went_on),
        ..CONFIG
    },
    Case {
        name: "truncated-elf",
        load: Load::Bundle {
            config: &[
                "[[vm]]\nname = \"cut\"\nkind = \"pvh\"\nkernel = \"half\"\nmemory = \"16MiB\"\n",
                REST,
            ],
            files: &[("half", Source::Short("guest-hello", 16)), HELLO_FILE],
            spoil: None,
        },
        steps: &[Told(r"^tessera\| .*cut.*is truncated"), END],
        end: Ending::Judged(102, rest_went_on),
        ..CONFIG
    },
    Case {
        name: "wrong-kind",
        load: hello(&[
            "[[vm]]\nname = \"wrong\"\nkind = \"linux\"\nkernel = \"guest-hello\"\nmemory = \"64MiB\"\n",
            REST,
        ]),
        steps: &[Told(r"^tessera\| .*wrong.*(?i:bzImage|HdrS|linux)"), END],
        end: Ending::Judged(102, rest_went_on),
        ..CONFIG
    },
    Case {
        name: "not-a-kernel",
        load: Load::Bundle {
            config: &[
                "[[vm]]\nname = \"wrong\"\nkind = \"pvh\"\nkernel = \"text\"\nmemory = \"64MiB\"\n",
                REST,
            ],
            files: &[
                ("text", Source::Bytes(b"#!/bin/sh\necho no kernel\n")),
                HELLO_FILE,
            ],
            spoil: None,
        },
        steps: &[Told(r"^tessera\| .*wrong.*(?i:ELF|PVH)"), END],
        end: Ending::Judged(102, rest_went_on),
        ..CONFIG
    },
    Case {
        name: "too-much-memory",
        load: hello(&[
            "[[vm]]\nname = \"big\"\nkind = \"pvh\"\nkernel = \"guest-hello\"\nmemory = \"8GiB\"\n",
            REST,
        ]),
        memory: Some(512),
        steps: &[Told(r"^tessera\| .*big.*(?i:memory).*MiB"), END],
        end: Ending::Judged(102, rest_went_on),
        ..CONFIG
    },
    Case {
        name: "no-vcpus",
        load: hello(&[
            "[[vm]]\nname = \"none\"\nkind = \"pvh\"\nkernel = \"guest-hello\"\nmemory = \"16MiB\"\nvcpus = 0\n",
        ]),
        steps: &[Told(r"^tessera\| .*tessera\.toml:6:\d+: .*`vcpus`")],
        ..CONFIG
    },
    Case {
        name: "too-many-vcpus",
        load: hello(&[
            "[[vm]]\nname = \"many\"\nkind = \"pvh\"\nkernel = \"guest-hello\"\nmemory = \"16MiB\"\nvcpus = 1000\n",
        ]),
        steps: &[Told(r"^tessera\| .*tessera\.toml:6:\d+: .*`vcpus`")],
        ..CONFIG
    },
    Case {
        name: "no-extension",
        on: &[QEMU_BIOS, QEMU_UEFI, BOCHS_BIOS],
        load: super::guests::HELLO.load,
        extension: Extension::Absent,
        steps: &[Told(r"^tessera\| .*(?i:VT-x|VMX|AMD-V|SVM)")],
        ..CONFIG
    },
    Case {
        name: "extension-locked-off",
        on: &[BOCHS_BIOS],
        load: super::guests::HELLO.load,
        extension: Extension::LockedOff,
        steps: &[Told(r"^tessera\| .*(?i:firmware|BIOS|setup)")],
        ..CONFIG
    },
    Case {
        name: "corrupt-bundle",
        on: &[QEMU_BIOS, QEMU_UEFI],
        load: Load::Bundle {
            config: &[
                "[[vm]]\nname = \"hello\"\nkind = \"pvh\"\nkernel = \"guest-hello\"\nmemory = \"16MiB\"\n",
            ],
            files: &[HELLO_FILE],
            spoil: Some(|bundle| {
                // A bit in the last image, which the checksum in the manifest covers.
                let middle = bundle.len() * 3 / 4;
                if let Some(byte) = bundle.get_mut(middle) {
                    *byte ^= 0x10;
                }
            }),
        },
        steps: &[Told(r"^tessera\| .*corrupt bundle: `guest-hello`")],
        ..CONFIG
    },
    Case {
        name: "truncated-bundle",
        load: Load::Bundle {
            config: &[
                "[[vm]]\nname = \"hello\"\nkind = \"pvh\"\nkernel = \"guest-hello\"\nmemory = \"16MiB\"\n",
            ],
            files: &[HELLO_FILE],
            spoil: Some(|bundle| bundle.truncate(bundle.len() / 2)),
        },
        steps: &[Told(r"^tessera\| .*truncated bundle: `guest-hello`")],
        ..CONFIG
    },
    Case {
        // The loaders themselves miss it.
        name: "no-bundle",
        on: &[QEMU_BIOS, QEMU_UEFI],
        load: Load::Bundle {
            config: &[],
            files: &[],
            spoil: Some(Vec::clear),
        },
        steps: &[Told(
            "tessera boot: .*bundle is (missing or )?empty.*cargo xtask image",
        )],
        end: Ending::Dialogue,
        ..CONFIG
    },
    hostile(
        "triple-fault",
        &[HOSTILE, "cmdline = \"triple-fault\"\n", REST],
        &[
            Told(r"^tessera\| vm hostile: crashed: .*(?i:triple fault)"),
            END,
        ],
    ),
    hostile(
        "jump-to-nowhere",
        &[HOSTILE, "cmdline = \"unmapped-jump\"\n", REST],
        &[Told(r"^tessera\| vm hostile: crashed: .*no memory"), END],
    ),
    hostile(
        "undecodable-mmio",
        &[HOSTILE, "cmdline = \"undecodable-mmio\"\n", REST],
        &[
            Told(r"^tessera\| vm hostile: crashed: .*(?i:cannot emulate|undecodable)"),
            END,
        ],
    ),
    hostile(
        "page-tables-in-a-device",
        &[HOSTILE, "cmdline = \"mmio-page-tables\"\n", REST],
        &[Told(r"^tessera\| vm hostile: crashed: .*page tables"), END],
    ),
    hostile(
        "stack-in-a-device",
        &[HOSTILE, "cmdline = \"mmio-stack\"\n", REST],
        &[Told(r"^tessera\| vm hostile: crashed: .*no memory"), END],
    ),
];
