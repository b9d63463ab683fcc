//! A guest that attacks its virtio devices: by their rings, their registers and by what it sends.
//!
//! Each attack runs beside a heartbeat and a guest on the same switch, in a machine with one core:
//! see [`super::hostile`]. The attacker looks itself whether a device asks for a reset or works,
//! and whether a driver that begins anew is served; here the neighbours are judged, and the log.

use super::hostile::{BEATEN, beats_within, heartbeat};
use super::left_well;
use super::network::talker;
use crate::dialogue::{BOCHS_BIOS, Case, Ending, Heard, Load, QEMU_BIOS, Source, Step};
use crate::emulator::Pace;

use Step::{Expect, Send};

/// A VM with all virtio devices that makes these attacks.
macro_rules! attacker {
    ($attacks:literal, $vcpus:literal) => {
        concat!(
            "[[switch]]\nname = \"lan\"\n[[vm]]\nname = \"hostile\"\nkind = \"pvh\"\n",
            "kernel = \"guest-hostile\"\nmemory = \"16MiB\"\nvcpus = ",
            $vcpus,
            "\ncmdline = \"",
            $attacks,
            "\"\n[vm.devices]\ndebug_exit = true\nrng = true\nvirtio_console = true\n",
            "[[vm.nic]]\nswitch = \"lan\"\n"
        )
    };
}

const FILES: &[(&str, Source)] = &[
    ("guest-heartbeat", Source::Made("guest-heartbeat")),
    ("guest-hello", Source::Made("guest-hello")),
    ("guest-hostile", Source::Made("guest-hostile")),
];
const PEER: &str = talker!("peer", "ip=10.9.0.9/24 stay=10");
/// The greatest lateness of the heartbeat, in microseconds: slices of an attacker and a peer, and
/// the batches of frames that a core moves in one go, which nobody has derived a bound for.
const BOUND: u64 = 40_000;

/// The heartbeat was right, and the log tells of nothing worse than a device to be reset.
fn neighbours_are_sound(heard: &Heard) -> Result<(), String> {
    let worse = |line: &&str| {
        line.starts_with("tessera| error") || line.contains("crashed") || line.contains("panic")
    };
    if let Some(line) = heard.all.lines().find(worse) {
        return Err(format!("the log says `{line}`"));
    }
    beats_within(heard, BOUND)
}

const BESIDE: Case = Case {
    group: "virtio",
    on: &[QEMU_BIOS, BOCHS_BIOS],
    pace: Pace::Even,
    deadline: 150,
    ..Case::BASE
};

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
            left_well(heard, &["hostile", "peer"])?;
            neighbours_are_sound(heard)
        }),
        ..BESIDE
    }
}

pub(super) const CASES: &[Case] = &[
    survives(
        "rings",
        &[
            attacker!(
                "ring-loops ring-indirect ring-buffers ring-places ring-ahead",
                1
            ),
            PEER,
            heartbeat!("100"),
        ],
    ),
    survives(
        "registers",
        &[
            attacker!("ring-registers ring-window ring-storm ring-master", 1),
            PEER,
            heartbeat!("100"),
        ],
    ),
    survives(
        "races",
        &[
            attacker!("ring-races ring-resets ring-messages", 2),
            PEER,
            heartbeat!("100"),
        ],
    ),
    survives(
        "frames",
        &[
            attacker!("net-lengths net-headers net-control", 1),
            PEER,
            heartbeat!("100"),
        ],
    ),
    // All that it sends goes to its neighbour on the switch as well.
    Case {
        steps: &[
            BEATEN,
            Send("\x14x"),
            Expect(r"^tessera\| end: status=0 left at the console"),
        ],
        end: Ending::Judged(0, neighbours_are_sound),
        ..survives(
            "flood",
            &[attacker!("net-flood", 1), PEER, heartbeat!("20")],
        )
    },
];
