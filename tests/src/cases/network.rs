//! The machine's network cards, and guests on a switch that is joined to them.

use super::TO_MONITOR;
use super::guests::HELLO;
use super::linux::{FAULTS, FILES, LINUX};
use crate::dialogue::{BOCHS_BIOS, Case, Load, QEMU_BIOS, QEMU_UEFI, Source, Step};
use crate::emulator::{Card, Pace};

use Step::{Beside, Expect, Refuse, Send};

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
            Expect(concat!(
                r"^tessera\| nic [0-9a-f]{2}:[0-9a-f]{2}\.[0-7] ",
                $card
            )),
            Expect(r"^tessera\| vm hello: ended: debug exit, code 1$"),
        ]
    };
}

/// The switch, and one Linux guest of two on it.
const SWITCH: &str = r#"
[[switch]]
name = "lan"
[[switch.uplink]]
nic = "first"
"#;
const ONE: &str = r#"
[[vm]]
name = "one"
kind = "linux"
kernel = "vmlinuz"
initrd = "initrd.cpio"
cmdline = "console=ttyS0 quiet hostname=one tessera.ip=10.9.0.1/24"
memory = "128MiB"
[[vm.nic]]
switch = "lan"
"#;
const TWO: &str = r#"
[[vm]]
name = "two"
kind = "linux"
kernel = "vmlinuz"
initrd = "initrd.cpio"
cmdline = "console=ttyS0 quiet hostname=two tessera.ip=10.9.0.2/24"
memory = "128MiB"
[[vm.nic]]
switch = "lan"
"#;

/// Linux guests on a switch with an uplink to the emulator's network.
const LAN: Case = Case {
    group: "network",
    on: &[QEMU_BIOS],
    load: Load::Bundle {
        config: &[SWITCH, ONE, TWO],
        files: FILES,
        spoil: None,
    },
    cards: &[Card::E1000],
    ..LINUX
};

/// Somebody has the keyboard.
pub(super) const KEYBOARD: Step = Expect(r"^tessera\| keyboard: ");
/// Two or four guests have told their addresses, in any order.
pub(super) const TWO_LEASES: Step =
    Expect(r"(?s)(^[a-z0-9]+\| eth0: 10\.0\.2\.1[5-9]/24 by DHCP, gateway 10\.0\.2\.2$.*?){2}");
const FOUR_ADDRESSES: Step = Expect(r"(?s)(^[a-z]+\| eth0: 10\.0\.2\.[0-9]+/24 by .*?){4}");

/// Sets `other` in a guest to the address of the other one of two: the DHCP server gives them 15
/// and 16 in the order in which they ask.
macro_rules! other {
    () => {
        "set -- $(ip -4 -o addr show eth0); me=${4%/*}; other=10.0.2.$((31 - ${me##*.})); "
    };
}

pub(super) const CASES: &[Case] = &[
    // Large segments and unfinished checksums go from guest to guest as they are, and finished to
    // the outside.
    Case {
        name: "two-linux",
        on: &[QEMU_BIOS, BOCHS_BIOS],
        steps: &[
            KEYBOARD,
            TO_MONITOR,
            TWO_LEASES,
            Send("\x141"),
            Send("ping -c 3 10.0.2.2; echo gateway-$?\n"),
            Expect("^gateway-0$"),
            Send(
                "cd /tmp; dd if=/dev/urandom of=file bs=64k count=16; sha256sum file >sum; \
                 httpd -h /tmp; echo serves-$?\n",
            ),
            Expect("^serves-0$"),
            Send("\x142"),
            Send("ping -c 3 10.0.2.2; echo gateway-$?\n"),
            Expect("^gateway-0$"),
            Send(concat!(other!(), "ping -c 3 $other; echo other-$?\n")),
            Expect("^other-0$"),
            Send(
                "cd /tmp; wget -q http://$other/file; wget -q http://$other/sum; sha256sum -c sum\n",
            ),
            Expect("^file: OK$"),
            Send("poweroff\n"),
            Expect(r"^tessera\| vm two: ended: powered off$"),
            Send("\x141"),
            // A megabyte is 724 packets of the wire's size; on a slow link Linux joins two at least.
            Send("[ $(cat /sys/class/net/eth0/statistics/tx_packets) -lt 600 ]; echo large-$?\n"),
            Expect("^large-0$"),
            Send("cat /sys/class/net/eth0/statistics/*_errors | sort -u; echo errors-$?\n"),
            Expect("^0\nerrors-0$"),
            Send("dmesg; echo is-$?\n"),
            Expect("^is-0$"),
            Refuse(FAULTS),
            Send("poweroff\n"),
        ],
        ..LAN
    },
    // What is in a VLAN reaches nobody outside and is not reached, whatever address it takes.
    Case {
        name: "vlans",
        load: Load::Bundle {
            config: &[include_str!("../../../xtask/vlans.toml")],
            files: FILES,
            spoil: None,
        },
        steps: &[
            KEYBOARD,
            TO_MONITOR,
            FOUR_ADDRESSES,
            Send("\x144"),
            Send("ping -c 3 10.0.2.113; echo inside-$?\n"),
            Expect("^inside-0$"),
            Send(
                "for a in 2 15 16; do arping -c 2 -w 3 10.0.2.$a && echo reached-$a; \
                 ping -c 2 -w 3 10.0.2.$a && echo reached-$a; done; echo tried-$?\n",
            ),
            Expect("^tried-1$"),
            Refuse(&[r"^reached-\d", "bytes from"]),
            Send("poweroff\n"),
            Expect(r"^tessera\| vm other: ended: powered off$"),
            Send("\x142"),
            Send(concat!(other!(), "ping -c 3 $other; echo inside-$?\n")),
            Expect("^inside-0$"),
            Send(
                "arping -c 2 -w 3 10.0.2.113 && echo reached-1; \
                 ping -c 2 -w 3 10.0.2.113 && echo reached-2; echo tried-$?\n",
            ),
            Expect("^tried-1$"),
            Refuse(&[r"^reached-\d", "bytes from"]),
            Send("poweroff\n"),
            Expect(r"^tessera\| vm right: ended: powered off$"),
            Send("\x141"),
            Send("poweroff\n"),
            Expect(r"^tessera\| vm left: ended: powered off$"),
            Send("\x143"),
            Send("poweroff\n"),
        ],
        ..LAN
    },
    // A second station address behind a guest's card, as a container in it has, is nobody's that
    // the configuration knows.
    Case {
        name: "forged-source",
        steps: &[
            KEYBOARD,
            TO_MONITOR,
            TWO_LEASES,
            Send("\x141"),
            Send(
                "insmod /lib/modules/macvlan.ko; \
                 ip link add link eth0 name liar type macvlan && ip link set liar up && \
                 ip addr add 10.0.2.99/24 dev liar; echo second-$?\n",
            ),
            Expect("^second-0$"),
            Send("arping -c 3 -w 5 -I liar 10.0.2.2; echo forged-$?\n"),
            Expect("^forged-1$"),
            Send("arping -c 3 -w 5 -I eth0 10.0.2.2; echo honest-$?\n"),
            Expect("^honest-0$"),
            Send("\x140port show one\r"),
            Expect(r"^tessera\| dropped: forged-source [1-9]"),
            Send("\x141"),
            Send("poweroff\n"),
            Expect(r"^tessera\| vm one: ended: powered off$"),
            Send("\x142"),
            Send("poweroff\n"),
        ],
        ..LAN
    },
    // Two hosts, and no DHCP server: a file goes from the one's guest to the other's. Not from
    // Bochs: its seconds without work pass at once, and no answer comes within one of them.
    Case {
        name: "two-hosts",
        on: &[QEMU_BIOS],
        load: Load::Bundle {
            config: &[SWITCH, ONE],
            files: FILES,
            spoil: None,
        },
        beside: Some(Load::Bundle {
            config: &[SWITCH, TWO],
            files: FILES,
            spoil: None,
        }),
        pace: Pace::WallClock,
        steps: &[
            Beside(&[
                Expect(r"^eth0: 10\.9\.0\.2/24 by the command line$"),
                Send(
                    "cd /tmp; dd if=/dev/urandom of=file bs=64k count=16; sha256sum file >sum; \
                     httpd -h /tmp; echo serves-$?\n",
                ),
                Expect("^serves-0$"),
            ]),
            Expect(r"^eth0: 10\.9\.0\.1/24 by the command line$"),
            Send("ping -c 3 10.9.0.2; echo there-$?\n"),
            Expect("^there-0$"),
            Send(
                "cd /tmp; wget -q http://10.9.0.2/file; wget -q http://10.9.0.2/sum; sha256sum -c sum\n",
            ),
            Expect("^file: OK$"),
            Beside(&[
                Send("ping -c 3 10.9.0.1; echo back-$?\n"),
                Expect("^back-0$"),
                Send("poweroff\n"),
                Expect(r"^tessera\| end: status=0"),
            ]),
            Send("poweroff\n"),
        ],
        ..LAN
    },
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
            Expect(r"^tessera\| nic .* virtio-net 52:54:00:12:34:56, link up$"),
            Expect(r"^tessera\| nic .* e1000 52:54:00:12:34:57, link up "),
            Expect(r"^tessera\| nic .* e1000e 52:54:00:12:34:58, link up "),
            Expect(r"^tessera\| vm hello: ended: debug exit, code 1$"),
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
            Expect(r"^client\| hello: ping 10\.9\.0\.1: 4 of 4, "),
            Expect(r"^client\| hello: send 10\.9\.0\.1:9000: 100000 [0-9a-f]{8}, "),
            Expect(r"^client\| hello: fetch 10\.9\.0\.1:9001: 1048576 ee38d2eb, "),
            Expect(r"^tessera\| vm client: ended: debug exit, code 1$"),
            Send("\x14x"),
            Expect(r"^tessera\| end: status=0 left at the console"),
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
            Expect(r"hello: address 10\.0\.2\.\d+/24 by DHCP$"),
            Expect(r"hello: ping 10\.0\.2\.2: [1-4] of 4, "),
            Expect(r"^tessera\| vm hello: ended: debug exit, code 1$"),
        ],
        deadline: 60,
        ..CARDS
    },
];
