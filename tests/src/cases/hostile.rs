//! Guests that do everything they should not, and must harm nobody by it.
//!
//! Every attack runs beside a heartbeat in one machine with one core: a guest that wakes every
//! 100 ms and tells how late it was. Its beats must be complete, and none later than its share
//! explains ([`explained`]).
//! Attacks that end their VM follow each other by `after=<ms>`, several VMs to a boot; those that a
//! VM survives follow each other in one; endless ones go on side by side until a person ends them.
//!
//! The machine's time is counted in instructions, so that lateness does not depend on
//! how busy the machine under the emulator is: this holds in Bochs and in QEMU with `-icount`.
//!
//! One attacker is started again after each of its crashes, by its configuration.

use super::{MONITOR, TO_MONITOR, left_well};
use crate::Emulator;
use crate::dialogue::{BOCHS_BIOS, Case, Ending, Heard, Load, QEMU_BIOS, Source, Step};
use crate::emulator::Pace;

use Step::{Expect, Send};

pub(super) const FILES: &[(&str, Source)] = &[
    ("guest-heartbeat", Source::Made("guest-heartbeat")),
    ("guest-hostile", Source::Made("guest-hostile")),
    ("vmlinuz", Source::Made("vmlinuz")),
    ("initrd.cpio", Source::Made("initrd.cpio")),
];

/// A vCPU's slice, in microseconds (`sched::SLICE`).
const SLICE: u64 = 1000;
/// Instructions of the longest exit that a guest can make again and again: 256 iterations of a
/// string instruction, each of them two accesses to a device's registers.
const LONGEST_EXIT: u64 = 130_000;
/// Instructions of a guest's first touch of a frame of 2 MiB: it is filled with zeroes, in 2^18
/// steps.
const FIRST_TOUCH: u64 = 270_000;
/// Instructions of the longest work that the boot core does for VMs before it looks at its guests:
/// half a millisecond of making one, 16,000 in QEMU and 50,000 in Bochs, and the piece in which
/// that is over. The longest piece is to lay a VM out; the report of a crash is shorter.
const LONGEST_WORK: u64 = 380_000;

/// The greatest lateness, in microseconds, of a guest that mostly sleeps, on a core with so many
/// other vCPUs.
///
/// It goes before those that always run as soon as the one on the core has had 100 µs, and before
/// those that slept as well unless they had less than their share for longer; so it waits for one
/// slice of each of them at the very most. A turn is over with its slice, or with an exit that
/// begins before that. Of these one is a first touch: a frame is touched first once. The boot
/// core, which this is, works for VMs between two turns, and then leaves the core to guests for a
/// slice.
///
/// An instruction takes 32 ns in QEMU as set here ([`Pace::Even`]), and 10 in Bochs.
fn explained(heard: &Heard, others: u64) -> u64 {
    explained_by(heard, others, (others - 1) * LONGEST_EXIT)
}

/// The same, where the exits that are no first touch take so many instructions in all.
pub(super) fn explained_by(heard: &Heard, others: u64, exits: u64) -> u64 {
    let nanos = if heard.emulator == Emulator::Bochs {
        10
    } else {
        32
    };
    let work = FIRST_TOUCH + exits + LONGEST_WORK;
    others * SLICE + work * nanos / 1000
}

/// A VM that makes the attacks given, with one vCPU or as many as are said. The first in a
/// configuration has the console's focus, so its lines may be broken by others'; the heartbeat
/// never is the first.
macro_rules! attacker {
    ($name:literal, $attacks:literal) => {
        attacker!($name, $attacks, 1)
    };
    ($name:literal, $attacks:literal, $vcpus:literal) => {
        concat!(
            "[[vm]]\nname = \"",
            $name,
            "\"\nkind = \"pvh\"\nkernel = \"guest-hostile\"\nmemory = \"16MiB\"\nvcpus = ",
            $vcpus,
            "\ncmdline = \"",
            $attacks,
            "\"\n[vm.devices]\ndebug_exit = true\n"
        )
    };
}
pub(super) use attacker;

macro_rules! heartbeat {
    ($beats:literal) => {
        concat!(
            "[[vm]]\nname = \"heart\"\nkind = \"pvh\"\nkernel = \"guest-heartbeat\"\n",
            "memory = \"16MiB\"\ncmdline = \"beats=",
            $beats,
            "\"\n[vm.devices]\ndebug_exit = true\n"
        )
    };
}
pub(super) use heartbeat;

/// The heartbeat is over and was right.
pub(super) const BEATEN: Step = Expect(r"^tessera\| vm heart: ended: debug exit, code 1$");

/// All beats are there, in their order, and none was too late beside one other vCPU at a time.
fn heart_is_sound(heard: &Heard) -> Result<(), String> {
    beats_within(heard, explained(heard, 1))
}

/// The attacker came to its end, beside so many vCPUs of whom the heart is sound.
fn survived(heard: &Heard, others: u64) -> Result<(), String> {
    left_well(heard, &["hostile"])?;
    beats_within(heard, explained(heard, others))
}

pub(super) fn beats_within(heard: &Heard, bound: u64) -> Result<(), String> {
    let said = || {
        heard
            .all
            .lines()
            .filter_map(|line| line.strip_prefix("heart| "))
    };
    let (mut beats, mut latest) = (0, (0, ""));
    for line in said() {
        let words: Vec<&str> = line.split_whitespace().collect();
        let ["beat", number, "late", late] = words[..] else {
            continue;
        };
        beats += 1;
        if number != beats.to_string() {
            return Err(format!("beat {beats} is missing: `{line}`"));
        }
        let late = late.parse().unwrap_or(u64::MAX);
        latest = latest.max((late, line));
    }
    if latest.0 > bound {
        return Err(format!("later than {bound} µs: `{}`", latest.1));
    }
    let total = format!("heartbeat: {beats} beats");
    if beats == 0 || !said().any(|line| line.starts_with(&total)) {
        return Err(format!("{beats} beats, and no line `{total}`"));
    }
    Ok(())
}

pub(super) const BESIDE: Case = Case {
    group: "hostile",
    on: &[QEMU_BIOS, BOCHS_BIOS],
    pace: Pace::Even,
    deadline: 120,
    ..Case::BASE
};

/// Attacks that their VM survives.
const fn survives(name: &'static str, config: &'static [&'static str]) -> Case {
    Case {
        name,
        load: Load::Bundle {
            config,
            files: FILES,
            spoil: None,
        },
        steps: &[Expect(r"^tessera\| end: status=0 ")],
        end: Ending::Judged(0, |heard| survived(heard, 1)),
        ..BESIDE
    }
}

/// Attacks that end their VMs, as the steps say.
const fn crashes(
    name: &'static str,
    config: &'static [&'static str],
    steps: &'static [Step],
) -> Case {
    Case {
        steps,
        end: Ending::Judged(101, heart_is_sound),
        ..survives(name, config)
    }
}

/// An attack without end: the neighbour lives, and a person can end it.
const fn endless(name: &'static str, config: &'static [&'static str]) -> Case {
    Case {
        steps: &[
            BEATEN,
            Send("\x14x"),
            Expect(r"^tessera\| end: status=0 left at the console"),
        ],
        end: Ending::Judged(0, heart_is_sound),
        ..survives(name, config)
    }
}

pub(super) const CASES: &[Case] = &[
    survives(
        "registers-and-instructions",
        &[
            attacker!(
                "hostile",
                "cr-bits msr-storm msr-random cache-control exotic virt-modes debug-shadow \
                 cpuid-storm hypercall-flood pause-flood"
            ),
            heartbeat!("60"),
        ],
    ),
    survives(
        "ports-and-interrupts",
        &[
            attacker!(
                "hostile",
                "port-storm io-all-ports apic-chaos self-ipi-loop eoi-storm ipi-flood \
                 nmi-flood controller-race"
            ),
            heartbeat!("60"),
        ],
    ),
    // Two vCPUs against each other and the host.
    Case {
        end: Ending::Judged(0, |heard| survived(heard, 2)),
        ..survives(
            "two-vcpus",
            &[
                attacker!(
                    "hostile",
                    "code-races nmi-flood apic-chaos self-ipi-loop",
                    2
                ),
                heartbeat!("40"),
            ],
        )
    },
    // A crash without end: each time it starts again.
    Case {
        steps: &[
            Expect(r"^tessera\| vm hostile: crashed: triple fault"),
            Expect(r"^tessera\| vm hostile: crashed: triple fault"),
            Expect(r"^tessera\| vm hostile: crashed: triple fault"),
            BEATEN,
            Send("\x14x"),
            Expect(r"^tessera\| end: status=0 left at the console"),
        ],
        end: Ending::Judged(0, heart_is_sound),
        ..endless(
            "crashes-again",
            &[
                "[[vm]]\nname = \"hostile\"\nkind = \"pvh\"\nkernel = \"guest-hostile\"\n\
                 memory = \"16MiB\"\ncmdline = \"triple-fault\"\non_crash = \"restart\"\n",
                heartbeat!("20"),
            ],
        )
    },
    survives(
        "memory",
        &[
            attacker!(
                "hostile",
                "wrap holes cross-in-ram straddle-data code-races tables-at-the-end"
            ),
            heartbeat!("40"),
        ],
    ),
    // What a task switch comes to, and what is left without PE, is the CPU's: a strict
    // one refuses, a lax one stops at the next entry.
    crashes(
        "broken-modes",
        &[
            attacker!("long", "after=200 triple-fault"),
            attacker!("real", "after=400 triple-real"),
            attacker!("protected", "after=600 triple-protected"),
            attacker!("paging", "after=800 triple-paging"),
            attacker!("pae", "after=1000 triple-pae"),
            attacker!("compatibility", "after=1200 triple-compatibility"),
            attacker!("virtual", "after=1400 triple-v86"),
            attacker!("pdpte", "after=1600 bad-pdpte"),
            attacker!("stack", "after=1800 noncanonical-stack"),
            attacker!("task-jmp", "after=2000 task-jmp"),
            attacker!("task-gate", "after=2200 task-gate"),
            attacker!("task-iret", "after=2400 task-iret"),
            attacker!("pe", "after=2600 without-pe"),
            attacker!("reserved", "after=2800 reserved-bits"),
            attacker!("halt", "after=3000 cli-hlt"),
            heartbeat!("34"),
        ],
        &[
            Expect(r"^tessera\| vm long: crashed: triple fault"),
            Expect(r"^tessera\| vm real: crashed: triple fault"),
            Expect(r"^tessera\| vm protected: crashed: triple fault"),
            Expect(r"^tessera\| vm paging: crashed: triple fault"),
            Expect(r"^tessera\| vm pae: crashed: triple fault"),
            Expect(r"^tessera\| vm compatibility: crashed: triple fault"),
            Expect(r"^tessera\| vm virtual: crashed: triple fault"),
            Expect(r"^tessera\| vm pdpte: crashed: triple fault"),
            Expect(r"^tessera\| vm stack: crashed: triple fault"),
            Expect(r"^tessera\| vm task-jmp: (crashed: .*task switch|ended: debug exit, code 1$)"),
            Expect(r"^tessera\| vm task-gate: (crashed: .*task switch|ended: debug exit, code 1$)"),
            Expect(r"^tessera\| vm task-iret: (crashed: .*task switch|ended: debug exit, code 1$)"),
            Expect(r"^tessera\| vm pe: (crashed: .*refused to enter|ended: debug exit, code 1$)"),
            Expect(
                r"^tessera\| vm reserved: (crashed: .*refused to enter|ended: debug exit, code 1$)",
            ),
            Expect(r"^tessera\| vm halt: ended: halted with interrupts off"),
            BEATEN,
        ],
    ),
    crashes(
        "devices-as-memory",
        &[
            attacker!("nowhere", "after=200 unmapped-jump"),
            attacker!("lapic", "after=400 fetch-lapic"),
            attacker!("ioapic", "after=600 fetch-ioapic"),
            attacker!("ecam", "after=800 fetch-ecam"),
            attacker!("device", "after=1000 cross-into-device"),
            attacker!("nothing", "after=1200 cross-into-nothing"),
            attacker!("moved", "after=1400 code-to-device"),
            attacker!("pages", "after=1600 mmio-page-tables"),
            attacker!("beyond", "after=1800 tables-beyond-the-end"),
            attacker!("stack", "after=2000 mmio-stack"),
            attacker!("idt", "after=2200 idt-in-device"),
            attacker!("gdt", "after=2400 gdt-in-device"),
            attacker!("x87", "after=2600 undecodable-mmio"),
            attacker!("sse", "after=2800 undecodable-sse"),
            attacker!("swapped", "after=3000 code-swapped"),
            heartbeat!("34"),
        ],
        &[
            Expect(r"^tessera\| vm nowhere: crashed: instructions at .*no memory"),
            Expect(r"^tessera\| vm lapic: crashed: instructions at .*no memory"),
            Expect(r"^tessera\| vm ioapic: crashed: instructions at .*no memory"),
            Expect(r"^tessera\| vm ecam: crashed: instructions at .*no memory"),
            Expect(r"^tessera\| vm device: crashed: instructions at .*no memory"),
            Expect(r"^tessera\| vm nothing: crashed: instructions at .*no memory"),
            Expect(r"^tessera\| vm moved: crashed: .*(no memory|cannot emulate)"),
            Expect(r"^tessera\| vm pages: crashed: page tables at"),
            Expect(r"^tessera\| vm beyond: crashed: page tables at"),
            Expect(r"^tessera\| vm stack: crashed: .*no memory"),
            Expect(r"^tessera\| vm idt: crashed: "),
            Expect(r"^tessera\| vm gdt: (crashed|ended): "),
            Expect(r"^tessera\| vm x87: crashed: .*(?i:cannot emulate|undecodable)"),
            Expect(r"^tessera\| vm sse: crashed: .*(?i:cannot emulate|undecodable)"),
            Expect(
                r"^tessera\| vm swapped: (crashed: .*cannot emulate|ended: debug exit, code 1$)",
            ),
            BEATEN,
        ],
    ),
    // A VM is made while its neighbour counts time: a kernel and an initial RAM disk are summed up
    // and copied, and memory is given back.
    Case {
        steps: &[
            Expect(r"^heart\| beat 3 late"),
            TO_MONITOR,
            MONITOR,
            Send("start linux\r"),
            Expect(r"^heart\| beat \d+ late"),
            Expect(r"^heart\| beat \d+ late"),
            Send("list\r"),
            Expect(r"^tessera\| 1 linux: starting$"),
            Send("stop linux\r"),
            Expect(r"^tessera\| vm linux: its start is given up$"),
            Send("start linux\r"),
            Expect(r"^tessera\| vm linux: 256 MiB"),
            Send("reset linux\r"),
            Expect(r"^tessera\| vm linux: ended: stopped$"),
            Expect(r"^tessera\| vm linux: 256 MiB"),
            Send("stop linux\r"),
            Expect(r"^tessera\| vm linux: ended: stopped$"),
            BEATEN,
        ],
        end: Ending::Judged(0, heart_is_sound),
        ..survives(
            "made-beside",
            &[
                "[[vm]]\nname = \"linux\"\nkind = \"linux\"\nkernel = \"vmlinuz\"\n\
                 initrd = \"initrd.cpio\"\ncmdline = \"console=ttyS0\"\nmemory = \"256MiB\"\n\
                 autostart = false\n",
                heartbeat!("120"),
            ],
        )
    },
    // All at once: each beat prints its line in turns with ten that never stop.
    Case {
        end: Ending::Judged(0, |heard| beats_within(heard, explained(heard, 10))),
        ..endless(
            "for-ever",
            &[
                attacker!("hostile", "spin"),
                attacker!("timer", "timer-forever"),
                attacker!("ipis", "self-ipi-forever"),
                attacker!("nmis", "nmi-forever"),
                attacker!("outs", "rep-outs-forever"),
                attacker!("ins", "rep-ins-forever"),
                attacker!("stos", "rep-stos-device"),
                attacker!("movs", "rep-movs-device"),
                attacker!("cpuid", "cpuid-forever"),
                attacker!("caches", "wbinvd-forever"),
                heartbeat!("20"),
            ],
        )
    },
    // QEMU's emulation knows no #AC, and a breakpoint on the stack of #DB ends the emulator itself.
    Case {
        on: &[BOCHS_BIOS],
        end: Ending::Judged(0, |heard| beats_within(heard, explained(heard, 2))),
        ..endless(
            "exceptions-in-their-own-delivery",
            &[
                attacker!("hostile", "db-loop"),
                attacker!("alignment", "ac-loop"),
                heartbeat!("10"),
            ],
        )
    },
];
