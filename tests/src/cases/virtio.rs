//! A guest that attacks its virtio devices: by their rings, their registers and by what it sends.
//!
//! Each attack runs beside a heartbeat and a guest on the same switch, in a machine with one core:
//! see [`super::hostile`]. The attacker looks itself whether a device asks for a reset or works,
//! and whether a driver that begins anew is served; here the neighbours are judged, and the log.

use super::hostile::{self, BEATEN, beats_within, explained_by, heartbeat};
use super::left_well;
use super::network::talker;
use crate::dialogue::{Case, Ending, Heard, Load, Source, Step};

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
/// Instructions of the longest work that a doorbell of the attacker makes before others may have the
/// core: two batches of frames (`BATCHES` in `kernel::network`). A batch is 32 frames, no two alike,
/// at 3,500 instructions each (`bench switch`); or as much as fits its buffer, four frames of 64 KiB.
/// Such a frame takes as well a step of copying for each 8 bytes, and four for each 8 bytes of a
/// checksum to be put in: 45,000, or 360,000 for the eight of them. What is cut into segments fills
/// the peer's 32 buffers at most, at 3,500 each, as the peer does not run meanwhile; what finds no
/// buffer ends there. The other devices' work is shorter: 256 random bytes, 64 pieces of text.
const LONGEST_DOORBELL: u64 = 360_000 + 32 * 3_500;

/// The heartbeat was right, beside so many vCPUs of the attacker and a peer, whose exits are short
/// but for first touches; and the log tells of nothing worse than a device to be reset.
fn neighbours_are_sound(heard: &Heard, attackers: u64) -> Result<(), String> {
    let worse = |line: &&str| {
        line.starts_with("tessera| error") || line.contains("crashed") || line.contains("panic")
    };
    if let Some(line) = heard.all.lines().find(worse) {
        return Err(format!("the log says `{line}`"));
    }
    let bound = explained_by(heard, attackers + 1, attackers * LONGEST_DOORBELL);
    beats_within(heard, bound)
}

const BESIDE: Case = Case {
    group: "virtio",
    deadline: 150,
    ..hostile::BESIDE
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
        end: Ending::Judged(0, |heard| survived(heard, 1)),
        ..BESIDE
    }
}

fn survived(heard: &Heard, attackers: u64) -> Result<(), String> {
    left_well(heard, &["hostile", "peer"])?;
    neighbours_are_sound(heard, attackers)
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
    Case {
        end: Ending::Judged(0, |heard| survived(heard, 2)),
        ..survives(
            "races",
            &[
                attacker!("ring-races ring-resets ring-messages", 2),
                PEER,
                heartbeat!("100"),
            ],
        )
    },
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
        end: Ending::Judged(0, |heard| neighbours_are_sound(heard, 1)),
        ..survives(
            "flood",
            &[attacker!("net-flood", 1), PEER, heartbeat!("20")],
        )
    },
];
