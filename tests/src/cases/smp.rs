//! Several CPUs in one guest.

use super::guests::CONFORMANCE;
use super::linux;
use crate::dialogue::{BOCHS_BIOS, Case, Ending, Load, QEMU_BIOS, Source, Step};
use crate::emulator::Pace;

pub(super) const CASES: &[Case] = &[
    // What the same cases find without a hypervisor.
    Case {
        group: "smp",
        name: "reference",
        on: &[QEMU_BIOS],
        cpus: 4,
        pace: Pace::Free,
        load: Load::Reference {
            guest: "guest-conformance",
            append: "smp_",
        },
        steps: &[Step::Expect(r"^\d+ passed, 0 failed")],
        // Value 0 at the debug-exit port: (0 << 1) | 1.
        end: Ending::Exit(1),
        ..CONFORMANCE
    },
    // Four vCPUs that share one core, and that move between two.
    Case {
        group: "smp",
        name: "one-core",
        load: FOUR_VCPUS,
        ..CONFORMANCE
    },
    Case {
        group: "smp",
        name: "two-cores",
        cpus: 2,
        pace: Pace::Free,
        load: FOUR_VCPUS,
        ..CONFORMANCE
    },
    // Unmodified Linux, to which all of it must look like a PC.
    Case {
        group: "smp",
        name: "linux",
        on: &[QEMU_BIOS, BOCHS_BIOS],
        load: Load::Bundle {
            config: &[linux::VM, "vcpus = 4\n"],
            files: linux::FILES,
            spoil: None,
        },
        steps: &[
            linux::UP,
            linux::PROMPT,
            Step::Send("grep -c ^processor /proc/cpuinfo; cat /sys/devices/system/cpu/online\n"),
            Step::Expect("^4$"),
            Step::Expect("^0-3$"),
            linux::PROMPT,
            Step::Send("dmesg; echo is-$?\n"),
            // Who waits for a lock halts, and is kicked.
            Step::Expect(r"kvm-guest: PV spinlocks enabled"),
            Step::Expect("^is-0$"),
            Step::Refuse(linux::FAULTS),
            linux::PROMPT,
            // Four vCPUs on one core: time was taken from each (the eighth figure).
            Step::Send("head -n 1 /proc/stat\n"),
            Step::Expect(r"^cpu +(\d+ ){7}[1-9]\d* \d+ \d+"),
            linux::PROMPT,
            // A process on each, one after the other, and the parent moved along.
            Step::Send(
                "for c in 0 1 2 3; do taskset -p $((1 << c)) $$ >/dev/null; sh -c 'cut -d\" \" -f39 /proc/self/stat'; done\n",
            ),
            Step::Expect("^0$"),
            Step::Expect("^1$"),
            Step::Expect("^2$"),
            Step::Expect("^3$"),
            linux::PROMPT,
            Step::Send("poweroff\n"),
            Step::Expect(r"^tessera\| vm linux: ended: powered off$"),
        ],
        deadline: 300,
        ..linux::LINUX
    },
    // One VM that owns its cores, and one with a share of another.
    Case {
        group: "smp",
        name: "own-cores-and-shares",
        on: &[QEMU_BIOS],
        cpus: 3,
        pace: Pace::Free,
        load: Load::Bundle {
            config: &[r#"
[[vm]]
name = "shared"
kind = "pvh"
kernel = "guest-conformance"
cmdline = "smp_ipi smp_init smp_xapic"
memory = "64MiB"
vcpus = 2
weight = 100
cap = 90
reservation = 50
affinity = "0"
[vm.devices]
debug_exit = true
debug_console = true

[[vm]]
name = "own"
kind = "pvh"
kernel = "guest-conformance"
cmdline = "smp_ipi smp_init smp_xapic"
memory = "64MiB"
vcpus = 2
class = "dedicated"
pin = [1, 2]
[vm.devices]
debug_exit = true
debug_console = true
"#],
            files: &[("guest-conformance", Source::Made("guest-conformance"))],
            spoil: None,
        },
        steps: &[Step::Expect(r"^tessera\| end: status=0")],
        end: Ending::Judged(0, |heard| super::left_well(heard, &["shared", "own"])),
        ..CONFORMANCE
    },
    // Two of them, a small guest and one that attacks.
    Case {
        name: "crowd-on-one-core",
        on: &[BOCHS_BIOS],
        ..CROWD
    },
    Case {
        name: "crowd-on-two-cores",
        on: &[QEMU_BIOS],
        cpus: 2,
        ..CROWD
    },
];

const CROWD: Case = Case {
    group: "smp",
    load: Load::Bundle {
        config: &[r#"
[[vm]]
name = "linux"
kind = "linux"
kernel = "vmlinuz"
initrd = "initrd.cpio"
cmdline = "console=ttyS0"
memory = "192MiB"
vcpus = 3
[[vm]]
name = "other"
kind = "linux"
kernel = "vmlinuz"
initrd = "initrd.cpio"
cmdline = "console=ttyS0"
memory = "192MiB"
vcpus = 2
[[vm]]
name = "hello"
kind = "pvh"
kernel = "guest-hello"
memory = "16MiB"
[vm.devices]
debug_exit = true
[[vm]]
name = "hostile"
kind = "pvh"
kernel = "guest-hostile"
memory = "16MiB"
vcpus = 2
cmdline = "code-races apic-chaos exotic port-storm"
[vm.devices]
debug_exit = true
"#],
        files: &[
            ("vmlinuz", Source::Made("vmlinuz")),
            ("initrd.cpio", Source::Made("initrd.cpio")),
            ("guest-hello", Source::Made("guest-hello")),
            ("guest-hostile", Source::Made("guest-hostile")),
        ],
        spoil: None,
    },
    steps: &[
        linux::UP,
        linux::PROMPT,
        Step::Send("dmesg; echo is-$?\n"),
        Step::Expect("^is-0$"),
        Step::Refuse(linux::FAULTS),
        linux::PROMPT,
        Step::Send("poweroff\n"),
        Step::Expect(r"^tessera\| vm linux: ended: powered off$"),
        // The other one.
        Step::Send("\x14"),
        Step::Send("2"),
        Step::Send("\n"),
        linux::PROMPT,
        Step::Send("cat /sys/devices/system/cpu/online\n"),
        Step::Expect("^0-1$"),
        Step::Send("poweroff\n"),
        Step::Expect(r"^tessera\| vm other: ended: powered off$"),
    ],
    end: Ending::Judged(0, |heard| super::left_well(heard, &["hello", "hostile"])),
    deadline: 400,
    ..linux::LINUX
};

const FOUR_VCPUS: Load = Load::Bundle {
    config: &[r#"
[[vm]]
name = "conformance"
kind = "pvh"
kernel = "guest-conformance"
cmdline = "smp_"
memory = "256MiB"
vcpus = 4
[vm.devices]
debug_exit = true
debug_console = true
"#],
    files: &[("guest-conformance", Source::Made("guest-conformance"))],
    spoil: None,
};
