//! The machine's network cards, and guests that talk by them and with each other.

use super::guests::HELLO;
use crate::dialogue::{BOCHS_BIOS, Case, Load, QEMU_BIOS, QEMU_UEFI, Source, Step};
use crate::emulator::Card;

/// A machine with cards, which are found while it runs a guest as ever.
const CARDS: Case = Case {
    group: "network",
    on: &[QEMU_BIOS],
    ..HELLO
};

/// `guest-hello` with a card in the switch `lan`.
macro_rules! talker {
    ($name:literal, $cmdline:literal) => {
        concat!(
            "[[vm]]\nname = \"",
            $name,
            "\"\nkind = \"pvh\"\nkernel = \"guest-hello\"\nmemory = \"16MiB\"\ncmdline = \"",
            $cmdline,
            "\"\n[vm.devices]\ndebug_exit = true\n[[vm.nic]]\nswitch = \"lan\"\n"
        )
    };
}
pub(super) use talker;

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
    // One is interrupted by messages, the other by its pin. Whoever ends first is still asked.
    Case {
        name: "guests-talk",
        on: &[QEMU_BIOS, BOCHS_BIOS],
        cards: &[],
        load: Load::Bundle {
            config: &[
                "[[switch]]\nname = \"lan\"\n",
                talker!("server", "ip=10.9.0.1/24 stay intx"),
                talker!(
                    "client",
                    "ip=10.9.0.2/24 ping=10.9.0.1 send=10.9.0.1,100000 fetch=10.9.0.1"
                ),
            ],
            files: &[("guest-hello", Source::Made("guest-hello"))],
            spoil: None,
        },
        steps: &[
            Step::Expect(r"^client\| hello: ping 10\.9\.0\.1: 4 of 4, "),
            Step::Expect(r"^client\| hello: send 10\.9\.0\.1:9000: 100000 [0-9a-f]{8}, "),
            Step::Expect(r"^client\| hello: fetch 10\.9\.0\.1:9001: 1048576 ee38d2eb, "),
            Step::Expect(r"^tessera\| vm client: ended: debug exit, code 1$"),
            Step::Send("\x14x"),
            Step::Expect(r"^tessera\| end: status=0 left at the console"),
        ],
        deadline: 60,
        ..CARDS
    },
    Case {
        name: "guest-by-dhcp",
        on: &[QEMU_BIOS, BOCHS_BIOS],
        cards: &[Card::E1000],
        load: Load::Bundle {
            config: &[
                "[[switch]]\nname = \"lan\"\n[[switch.uplink]]\nname = \"up\"\n",
                talker!("hello", "ping=10.0.2.2"),
            ],
            files: &[("guest-hello", Source::Made("guest-hello"))],
            spoil: None,
        },
        steps: &[
            Step::Expect(r"hello: address 10\.0\.2\.\d+/24 by DHCP$"),
            Step::Expect(r"hello: ping 10\.0\.2\.2: [1-4] of 4, "),
            Step::Expect(r"^tessera\| vm hello: ended: debug exit, code 1$"),
        ],
        deadline: 60,
        ..CARDS
    },
];
