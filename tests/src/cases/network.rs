//! The machine's network cards.

use super::guests::HELLO;
use crate::dialogue::{BOCHS_BIOS, Case, QEMU_BIOS, QEMU_UEFI, Step};
use crate::emulator::Card;

/// A machine with cards, which are found while it runs a guest as ever.
const CARDS: Case = Case {
    group: "network",
    on: &[QEMU_BIOS],
    ..HELLO
};

/// The log's line about a card, and the guest's end.
macro_rules! finds {
    ($card:literal) => {
        &[
            Step::Expect(concat!(
                r"^tessera\| nic [0-9a-f]{2}:[0-9a-f]{2}\.[0-7] ",
                $card
            )),
            Step::Expect(r"^tessera\| vm hello: ended: debug exit, code 1$"),
        ]
    };
}

pub(super) const CASES: &[Case] = &[
    Case {
        name: "e1000",
        on: &[QEMU_BIOS, BOCHS_BIOS],
        cards: &[Card::E1000],
        steps: finds!("8086:100e e1000 52:54:00:12:34:56, link up 1000 Mbit/s$"),
        ..CARDS
    },
    Case {
        name: "e1000e",
        cards: &[Card::E1000e],
        steps: finds!("8086:10d3 e1000e 52:54:00:12:34:56, link up 1000 Mbit/s$"),
        ..CARDS
    },
    // By UEFI its registers may lie above all memory.
    Case {
        name: "virtio-net",
        on: &[QEMU_BIOS, QEMU_UEFI],
        cards: &[Card::VirtioNet],
        steps: finds!("1af4:1000 virtio-net 52:54:00:12:34:56, link up$"),
        ..CARDS
    },
    Case {
        name: "three-cards",
        cards: &[Card::VirtioNet, Card::E1000, Card::E1000e],
        steps: &[
            Step::Expect(r"^tessera\| nic .* virtio-net 52:54:00:12:34:56, link up$"),
            Step::Expect(r"^tessera\| nic .* e1000 52:54:00:12:34:57, link up "),
            Step::Expect(r"^tessera\| nic .* e1000e 52:54:00:12:34:58, link up "),
            Step::Expect(r"^tessera\| vm hello: ended: debug exit, code 1$"),
        ],
        ..CARDS
    },
];
