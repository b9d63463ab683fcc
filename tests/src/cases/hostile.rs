//! Guests that do everything they should not, and must harm nobody by it.
//!
//! Every attack runs beside a heartbeat in one machine with one core: a guest that wakes every
//! 100 ms and tells how late it was. Its beats must be complete, and none later than [`BOUND`].
//! Attacks that end their VM follow each other by `after=<ms>`, several VMs to a boot; those that a
//! VM survives follow each other in one; endless ones are stopped at the console, or left with it.
//!
//! The machine's time is counted (one instruction, one tick), so that lateness does not depend on
//! how busy the machine under the emulator is: this holds in Bochs and in QEMU with `-icount`.
//! What a guest is late by is what it waited for the core (a slice of 10 ms at most for each
//! neighbour that runs, and none by the scheduler's rule, as who slept runs first), and what the
//! host did with the core meanwhile: a line of its log takes 87 µs a character on the serial line,
//! and a report of a crash has 250 of them.
//!
//! That an attacker can be started again is not shown here: a crash ends a VM for good until the
//! configuration has a rule for it.

use crate::dialogue::{BOCHS_BIOS, Case, Ending, Heard, Load, QEMU_BIOS, Source, Step};
use crate::emulator::Pace;

use Step::{Expect, Send};

const FILES: &[(&str, Source)] = &[
    ("guest-heartbeat", Source::Made("guest-heartbeat")),
    ("guest-hostile", Source::Made("guest-hostile")),
];

/// The greatest lateness in microseconds that is right: two slices of 10 ms, one for who runs and
/// one for what the host says about it, and as much again for who comes next.
const BOUND: u64 = 40_000;

/// A VM that makes the attacks given. The first in a configuration has the console's focus, so its
/// lines may be broken by others'; the heartbeat never is the first.
macro_rules! attacker {
    ($name:literal, $attacks:literal) => {
        concat!(
            "[[vm]]\nname = \"",
            $name,
            "\"\nkind = \"pvh\"\nkernel = \"guest-hostile\"\nmemory = \"16MiB\"\ncmdline = \"",
            $attacks,
            "\"\n[vm.devices]\ndebug_exit = true\n"
        )
    };
}

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

/// The heartbeat is over and was right.
const BEATEN: Step = Expect(r"^tessera\| vm heart: ended: debug exit, code 1$");

/// All beats are there, in their order, and none was too late.
fn heart_is_sound(heard: &Heard) -> Result<(), String> {
    let said = || {
        heard
            .all
            .lines()
            .filter_map(|line| line.strip_prefix("heart| "))
    };
    let mut beats = 0;
    for line in said() {
        let words: Vec<&str> = line.split_whitespace().collect();
        let ["beat", number, "late", late] = words[..] else {
            continue;
        };
        beats += 1;
        if number != beats.to_string() {
            return Err(format!("beat {beats} is missing: `{line}`"));
        }
        match late.parse::<u64>() {
            Ok(late) if late <= BOUND => {}
            _ => return Err(format!("later than {BOUND} µs: `{line}`")),
        }
    }
    let total = format!("heartbeat: {beats} beats");
    if beats == 0 || !said().any(|line| line.starts_with(&total)) {
        return Err(format!("{beats} beats, and no line `{total}`"));
    }
    Ok(())
}

const BESIDE: Case = Case {
    group: "hostile",
    on: &[QEMU_BIOS, BOCHS_BIOS],
    pace: Pace::Counted,
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
        end: Ending::Judged(0, |heard| {
            let line = "tessera| vm hostile: ended: debug exit, code 1";
            if !heard.all.contains(line) {
                return Err(format!("no line `{line}`"));
            }
            heart_is_sound(heard)
        }),
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
        "ports",
        &[
            attacker!("hostile", "port-storm io-all-ports"),
            heartbeat!("30"),
        ],
    ),
    survives(
        "registers",
        &[
            attacker!("hostile", "cr-bits msr-storm msr-random cache-control"),
            heartbeat!("20"),
        ],
    ),
    survives(
        "instructions",
        &[
            attacker!(
                "hostile",
                "exotic virt-modes debug-shadow cpuid-storm hypercall-flood pause-flood"
            ),
            heartbeat!("20"),
        ],
    ),
    survives(
        "interrupt-controllers",
        &[
            attacker!(
                "hostile",
                "apic-chaos timer-storm self-ipi-loop eoi-storm ipi-flood nmi-flood controller-race"
            ),
            heartbeat!("30"),
        ],
    ),
    survives(
        "memory",
        &[
            attacker!(
                "hostile",
                "wrap holes cross-in-ram straddle-data code-swapped code-races tables-at-the-end"
            ),
            heartbeat!("20"),
        ],
    ),
    crashes(
        "triple-faults",
        &[
            attacker!("long", "after=100 triple-fault"),
            attacker!("real", "after=200 triple-real"),
            attacker!("protected", "after=300 triple-protected"),
            attacker!("paging", "after=400 triple-paging"),
            attacker!("pae", "after=500 triple-pae"),
            attacker!("compatibility", "after=600 triple-compatibility"),
            attacker!("virtual", "after=700 triple-v86"),
            attacker!("pdpte", "after=800 bad-pdpte"),
            attacker!("stack", "after=900 noncanonical-stack"),
            heartbeat!("12"),
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
            BEATEN,
        ],
    ),
    crashes(
        "code-in-devices",
        &[
            attacker!("nowhere", "after=100 unmapped-jump"),
            attacker!("lapic", "after=200 fetch-lapic"),
            attacker!("ioapic", "after=300 fetch-ioapic"),
            attacker!("ecam", "after=400 fetch-ecam"),
            attacker!("device", "after=500 cross-into-device"),
            attacker!("nothing", "after=600 cross-into-nothing"),
            attacker!("swapped", "after=700 code-to-device"),
            heartbeat!("10"),
        ],
        &[
            Expect(r"^tessera\| vm nowhere: crashed: instructions at .*no memory"),
            Expect(r"^tessera\| vm lapic: crashed: instructions at .*no memory"),
            Expect(r"^tessera\| vm ioapic: crashed: instructions at .*no memory"),
            Expect(r"^tessera\| vm ecam: crashed: instructions at .*no memory"),
            Expect(r"^tessera\| vm device: crashed: instructions at .*no memory"),
            Expect(r"^tessera\| vm nothing: crashed: instructions at .*no memory"),
            Expect(r"^tessera\| vm swapped: crashed: .*(no memory|cannot emulate)"),
            BEATEN,
        ],
    ),
    crashes(
        "tables-in-devices",
        &[
            attacker!("pages", "after=100 mmio-page-tables"),
            attacker!("beyond", "after=200 tables-beyond-the-end"),
            attacker!("stack", "after=300 mmio-stack"),
            attacker!("idt", "after=400 idt-in-device"),
            attacker!("gdt", "after=500 gdt-in-device"),
            attacker!("x87", "after=600 undecodable-mmio"),
            attacker!("sse", "after=700 undecodable-sse"),
            heartbeat!("10"),
        ],
        &[
            Expect(r"^tessera\| vm pages: crashed: page tables at"),
            Expect(r"^tessera\| vm beyond: crashed: page tables at"),
            Expect(r"^tessera\| vm stack: crashed: .*no memory"),
            Expect(r"^tessera\| vm idt: crashed: "),
            Expect(r"^tessera\| vm gdt: (crashed|ended): "),
            Expect(r"^tessera\| vm x87: crashed: .*(?i:cannot emulate|undecodable)"),
            Expect(r"^tessera\| vm sse: crashed: .*(?i:cannot emulate|undecodable)"),
            BEATEN,
        ],
    ),
    // What a task switch comes to is the CPU's: one that has none for guests stops at it.
    crashes(
        "halts-and-switches",
        &[
            attacker!("halt", "after=100 cli-hlt"),
            attacker!("task-jmp", "after=200 task-jmp"),
            attacker!("task-gate", "after=300 task-gate"),
            attacker!("task-iret", "after=400 task-iret"),
            attacker!("reports", "after=500 triple-fault"),
            heartbeat!("8"),
        ],
        &[
            Expect(r"^tessera\| vm halt: ended: halted with interrupts off"),
            Expect(r"^tessera\| vm task-jmp: (crashed: .*task switch|ended: debug exit, code 1$)"),
            Expect(r"^tessera\| vm task-gate: (crashed: .*task switch|ended: debug exit, code 1$)"),
            Expect(r"^tessera\| vm task-iret: (crashed: .*task switch|ended: debug exit, code 1$)"),
            Expect(r"^tessera\| vm reports: crashed: triple fault"),
            BEATEN,
        ],
    ),
    endless("spin", &[attacker!("hostile", "spin"), heartbeat!("5")]),
    endless(
        "exception-in-its-own-delivery",
        &[attacker!("hostile", "db-loop"), heartbeat!("5")],
    ),
    // QEMU's emulation knows no #AC.
    Case {
        on: &[BOCHS_BIOS],
        ..endless(
            "alignment-check-in-its-own-delivery",
            &[attacker!("hostile", "ac-loop"), heartbeat!("5")],
        )
    },
    endless(
        "interrupts-for-ever",
        &[
            attacker!("hostile", "timer-forever"),
            attacker!("ipis", "self-ipi-forever"),
            attacker!("nmis", "nmi-forever"),
            heartbeat!("8"),
        ],
    ),
    endless(
        "string-io-for-ever",
        &[
            attacker!("hostile", "rep-outs-forever"),
            attacker!("in", "rep-ins-forever"),
            heartbeat!("8"),
        ],
    ),
    endless(
        "strings-on-devices-for-ever",
        &[
            attacker!("hostile", "rep-stos-device"),
            attacker!("movs", "rep-movs-device"),
            heartbeat!("8"),
        ],
    ),
    endless(
        "exits-for-ever",
        &[
            attacker!("hostile", "cpuid-forever"),
            attacker!("caches", "wbinvd-forever"),
            heartbeat!("8"),
        ],
    ),
];
