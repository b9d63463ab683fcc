//! The hypervisor itself fails while it works for a VM: that VM dies, and neither its neighbours nor
//! the host notice.
//!
//! Tessera is the build with `fault-injection`, in which a guest chooses where: `at=<n>` is a place of
//! `abi::hypercall::fault`. Attackers with one CPU call from it; those with two call from the second
//! while the first uses the VM's devices and memory all the time, so that it stands at the locks that
//! the failed work held. That matters most where both run at the same time.

use super::hostile::{BEATEN, FILES, attacker, beats_within, heartbeat};
use crate::dialogue::{BOCHS_BIOS, Case, Ending, Heard, Load, QEMU_BIOS, Step};
use crate::emulator::Pace;

use Step::Expect;

/// The VM of this name died of the failure.
macro_rules! dies {
    ($name:literal) => {
        Expect(concat!(
            r"^tessera\| vm ",
            $name,
            ": crashed: the hypervisor failed while it worked for this VM$"
        ))
    };
}

/// The heart beat to its end, and the host did not stop. How late a beat was says nothing here: a
/// report of a panic is long.
fn only_they_died(heard: &Heard) -> Result<(), String> {
    if let Some(line) = heard.all.lines().find(|l| l.contains("has failed")) {
        return Err(format!("the host stopped: `{line}`"));
    }
    beats_within(heard, u64::MAX)
}

/// Failures beside a heartbeat.
const fn case(name: &'static str, config: &'static [&'static str], steps: &'static [Step]) -> Case {
    Case {
        group: "inject",
        name,
        on: &[QEMU_BIOS, BOCHS_BIOS],
        cpus: 2,
        load: Load::Bundle {
            config,
            files: FILES,
            spoil: None,
        },
        fails: true,
        steps,
        end: Ending::Judged(101, only_they_died),
        deadline: 120,
        ..Case::BASE
    }
}

pub(super) const CASES: &[Case] = &[
    Case {
        cpus: 1,
        pace: Pace::Even,
        ..case(
            "one-core",
            &[
                attacker!("handler", "after=200 at=0 fault"),
                attacker!("board", "after=500 at=1 fault"),
                attacker!("memory", "after=800 at=2 fault"),
                attacker!("entry", "after=1100 at=3 fault"),
                attacker!("stack", "after=1400 at=4 fault"),
                attacker!("handler-beside", "after=1700 at=0 fault-beside", 2),
                attacker!("board-beside", "after=2000 at=1 fault-beside", 2),
                attacker!("memory-beside", "after=2300 at=2 fault-beside", 2),
                attacker!("entry-beside", "after=2600 at=3 fault-beside", 2),
                attacker!("stack-beside", "after=2900 at=4 fault-beside", 2),
                heartbeat!("36 late=10000000"),
            ],
            &[
                dies!("handler"),
                dies!("board"),
                dies!("memory"),
                dies!("entry"),
                dies!("stack"),
                dies!("handler-beside"),
                dies!("board-beside"),
                dies!("memory-beside"),
                dies!("entry-beside"),
                dies!("stack-beside"),
                BEATEN,
            ],
        )
    },
    case(
        "two-cores",
        &[
            attacker!("handler", "after=200 at=0 fault-beside", 2),
            attacker!("board", "after=1000 at=1 fault-beside", 2),
            attacker!("memory", "after=1800 at=2 fault-beside", 2),
            attacker!("entry", "after=2600 at=3 fault-beside", 2),
            attacker!("stack", "after=3400 at=4 fault-beside", 2),
            heartbeat!("50 late=10000000"),
        ],
        &[
            dies!("handler"),
            dies!("board"),
            dies!("memory"),
            dies!("entry"),
            dies!("stack"),
            BEATEN,
        ],
    ),
    // The second while the other core waits for the lock that is never given back.
    case(
        "watchdog",
        &[
            attacker!("endless", "after=200 at=5 fault"),
            attacker!("holder", "after=22000 at=6 fault-beside", 2),
            heartbeat!("480 late=60000000"),
        ],
        &[
            Expect(
                r"^tessera\| error: core \d got nowhere for 10 s: at 0xffffffff8[0-9a-f]+, .*, working for VM 1 ",
            ),
            dies!("endless"),
            Expect(
                r"^tessera\| error: core \d got nowhere for 10 s: at 0xffffffff8[0-9a-f]+, .*, working for VM 2 ",
            ),
            dies!("holder"),
            BEATEN,
        ],
    ),
    // What all cores share cannot be had back: the host stops, and says where it was.
    Case {
        end: Ending::Closing(103),
        ..case(
            "shared-lock",
            &[attacker!("sharer", "after=200 at=7 fault")],
            &[
                Expect(
                    r"^tessera\| error: core \d got nowhere for 10 s: at 0xffffffff8[0-9a-f]+, .*, working for VM 1 ",
                ),
                Expect(r"^tessera\| the hypervisor has failed and stops here$"),
            ],
        )
    },
];
