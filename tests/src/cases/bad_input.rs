//! Wrong inputs: each gets one clear error that names place and remedy, and the rest goes on.
//!
//! A memory map with overlaps is no input that an emulator's firmware can be made to give; the
//! host tests of `boot` cover it.

use super::{MONITOR, TO_MONITOR, left_well};
use crate::dialogue::{BOCHS_BIOS, Case, Ending, Heard, Load, QEMU_BIOS, QEMU_UEFI, Source, Step};
use crate::emulator::Extension;

use Step::{Check, Expect, Send, Told};

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

const END: Step = Expect(r"^tessera\| end: status=");

fn rest_went_on(heard: &Heard) -> Result<(), String> {
    left_well(heard, &["rest"])
}

/// What `list` said first and last.
fn nothing_changed(heard: &Heard) -> Result<(), String> {
    let lists = heard.all.split("> list\n").skip(1);
    let lists: Vec<&str> = lists
        .filter_map(|text| text.split(" of memory free").next())
        .collect();
    match lists.as_slice() {
        [before, .., after] if before == after && before.contains("talk: running") => Ok(()),
        _ => Err(format!("the lists: {lists:?}")),
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

/// Switches that cannot be, one that can, and a VM with cards in all of them.
const SWITCHES: &str = r#"
[[switch]]
name = "twins"
[[switch]]
name = "circle"
flows = ["table=1,actions=resubmit(,1)"]
[[switch]]
name = "words"
flows = ["priority=5,arq,actions=drop"]
[[switch]]
name = "lan"
[[switch.uplink]]
name = "up"
nic = "00:1f.7"
[[vm]]
name = "talk"
kind = "pvh"
kernel = "guest-hostile"
cmdline = "console"
memory = "16MiB"
[[vm.nic]]
switch = "twins"
mac = "02:00:00:00:00:07"
[[vm.nic]]
switch = "twins"
mac = "02:00:00:00:00:07"
[[vm.nic]]
switch = "lan"
name = "own"
"#;

pub(super) const CASES: &[Case] = &[
    Case {
        name: "switches",
        load: Load::Bundle {
            config: &[SWITCHES],
            files: &[HOSTILE_FILE],
            spoil: None,
        },
        steps: &[
            Expect(
                r"^tessera\| error: tessera\.toml:2:1: switch `twins`: switch: macs: 02:00:00:00:00:07 is there twice; switch twins has no ports$",
            ),
            Expect(
                r"^tessera\| error: tessera\.toml:6:10: switch `circle`: .*leads from table 1 to table 1; only later tables are allowed, so that no frame runs in circles; switch circle has no ports$",
            ),
            Expect(
                r"^tessera\| error: tessera\.toml:9:10: switch `words`: flow 1: flows: column 12: arq: not a field, action or port known here; switch words has no ports$",
            ),
            Expect(
                r"^tessera\| warning: switch lan: port up: no network card of this machine is 00:1f\.7; it has none$",
            ),
            Expect("^#$"),
            TO_MONITOR,
            MONITOR,
            Send("flows man\r"),
            Expect(r"^tessera\| no switch is named `man`; there are: twins circle words lan$"),
            Send("port show lan/tap\r"),
            Expect(r"^tessera\| no port is named `lan/tap`; there are: lan/up lan/own$"),
            Send("add-flow priority=1,actions=drop\r"),
            Expect(
                r"^tessera\| say which switch, before all else; there are: twins circle words lan$",
            ),
            Send("add-flow lan priority=5,arq,actions=drop\r"),
            Expect(
                r"^tessera\| flow: column 12: arq: not a field, action or port known here; nothing has changed$",
            ),
            Send("add-flow lan table=2,actions=resubmit(,2)\r"),
            Expect(
                r"^tessera\| flow: column 17: resubmit: leads from table 2 to table 2; .*nothing has changed$",
            ),
            Send("mirror lan add m select_all output_vlan=4095\r"),
            Expect(
                r"^tessera\| output_vlan=4095: `4095` is no VLAN: 1 to 4094 are; nothing has changed$",
            ),
            Send("link lan/up down\r"),
            Expect(r"^tessera\| no card is behind that port$"),
            Send("flows lan\r"),
            Expect(r"^tessera\| switch lan: 1 flows$"),
            Send("mirror lan\r"),
            Expect(r"^tessera\| switch lan: 0 mirrors$"),
            Send("quit\r"),
        ],
        end: Ending::Closing(0),
        ..CONFIG
    },
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
        name: "switch-left-out",
        load: hello(&[
            "[[switch]]\nname = \"words\"\nflows = [\"ip,actions=set_field:1/1->nw_ttl,normal\"]\n",
            REST,
        ]),
        steps: &[
            Told(
                r"^tessera\| error: tessera\.toml:3:10: switch `words`: .*set_field: can not be masked",
            ),
            Expect(r"^tessera\| end: status=102 .*switch `words`"),
        ],
        on: &[QEMU_BIOS, BOCHS_BIOS],
        end: Ending::Judged(102, rest_went_on),
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
    Case {
        name: "pin-to-no-core",
        load: hello(&[
            "[[vm]]\nname = \"wrong\"\nkind = \"pvh\"\nkernel = \"guest-hello\"\nmemory = \"16MiB\"\npin = [7]\n",
            REST,
        ]),
        steps: &[
            Told(r"^tessera\| .*tessera\.toml:6:\d+: .*wrong.*core 7, but this machine has 1"),
            END,
        ],
        end: Ending::Judged(102, rest_went_on),
        ..CONFIG
    },
    Case {
        name: "weight-out-of-range",
        load: hello(&[
            "[[vm]]\nname = \"wrong\"\nkind = \"pvh\"\nkernel = \"guest-hello\"\nmemory = \"16MiB\"\nweight = 10001\n",
            REST,
        ]),
        steps: &[
            Told(r"^tessera\| .*tessera\.toml:6:\d+: .*`weight` is 10001"),
            END,
        ],
        end: Ending::Judged(102, rest_went_on),
        ..CONFIG
    },
    Case {
        name: "cap-out-of-range",
        load: hello(&[
            "[[vm]]\nname = \"wrong\"\nkind = \"pvh\"\nkernel = \"guest-hello\"\nmemory = \"16MiB\"\ncap = 0\n",
            REST,
        ]),
        steps: &[Told(r"^tessera\| .*tessera\.toml:6:\d+: .*`cap` is 0"), END],
        end: Ending::Judged(102, rest_went_on),
        ..CONFIG
    },
    Case {
        name: "at-the-monitor",
        on: &[QEMU_BIOS, BOCHS_BIOS],
        load: Load::Bundle {
            config: &[r#"
[[vm]]
name = "talk"
kind = "pvh"
kernel = "guest-hostile"
cmdline = "console"
memory = "16MiB"

[[vm]]
name = "late"
kind = "pvh"
kernel = "guest-hello"
memory = "16MiB"
autostart = false
"#],
            files: &[HELLO_FILE, HOSTILE_FILE],
            spoil: None,
        },
        steps: &[
            Expect("^#$"),
            TO_MONITOR,
            MONITOR,
            Send("list\r"),
            Expect(r"KiB of memory free$"),
            // Verbs and names.
            Send("lisst\r"),
            Expect(r"^tessera\| unknown verb `lisst`: did you mean `list`\?"),
            Send("pause nobody\r"),
            Expect(r"^tessera\| no VM is named `nobody`; there are: talk late$"),
            Send("stop 3\r"),
            Expect(r"^tessera\| no VM is named `3`"),
            Send("inject smi talk\r"),
            Expect(r"^tessera\| `smi` does not belong there"),
            // Shares.
            Send("sched talk pin=7\r"),
            Expect(r"^tessera\| vm talk: core 7 is not there$"),
            Send("sched late pin=0-1\r"),
            Expect(r"^tessera\| vm late: core 1 is not there$"),
            Send("sched talk pin=2000\r"),
            Expect(r"^tessera\| `pin=2000` is out of range: "),
            Send("sched talk weight=0\r"),
            Expect(r"^tessera\| `weight=0` is out of range: a weight is 1 to 10000$"),
            Send("sched talk weight=10001\r"),
            Expect(r"^tessera\| `weight=10001` is out of range: "),
            Send("sched talk cap=6401\r"),
            Expect(r"^tessera\| `cap=6401` is out of range: "),
            Send("sched talk weight=9 cap=101\r"),
            Expect(
                r"^tessera\| vm talk: a cap of 101 % asked; 1 to 100 % can be with these vCPUs$",
            ),
            Send("sched talk\r"),
            Expect(r"^tessera\| scheduled: fair, weight 256, on all cores$"),
            Send("sched late\r"),
            Expect(r"^tessera\| scheduled: fair, weight 256, on all cores$"),
            // States.
            Send("start talk\r"),
            Expect(r"^tessera\| vm talk: it is running: it cannot be started$"),
            Send("resume talk\r"),
            Expect(r"^tessera\| vm talk: it is running: it cannot be resumed$"),
            Send("pause late\r"),
            Expect(r"^tessera\| vm late: it is defined: it cannot be paused$"),
            Send("shutdown late\r"),
            Expect(r"^tessera\| vm late: it is defined: it cannot be shut down$"),
            Send("reset late\r"),
            Expect(r"^tessera\| vm late: it is defined: it cannot be reset$"),
            Send("stop late\r"),
            Expect(r"^tessera\| vm late: it is defined: it cannot be stopped$"),
            Send("inject nmi late\r"),
            Expect(r"^tessera\| vm late: it is defined: it cannot be given an NMI$"),
            Send("dump late\r"),
            Expect(r"^tessera\| vm late: it is defined: it cannot be dumped$"),
            Send("list\r"),
            Expect(r"KiB of memory free$"),
            Check(nothing_changed),
            // All that ran have ended; the other waits in vain.
            Send("stop talk\r"),
            Expect(r"^tessera\| vm talk: ended: stopped$"),
        ],
        end: Ending::Closing(0),
        deadline: 60,
        ..CONFIG
    },
];
