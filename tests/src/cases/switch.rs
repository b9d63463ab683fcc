//! Switches at the monitor: what they tell, and changes while guests talk.

use super::linux::FILES;
use super::network::{KEYBOARD, TWO_LEASES};
use super::{MONITOR, TO_MONITOR};
use crate::dialogue::{Case, Heard, Load, QEMU_BIOS, Step};
use crate::emulator::Card;

use Step::{Check, Expect, Refuse, Send};

const PROMPT_A: Step = Expect("^a# ");

/// The lines of pcap that came hold three echo requests and their answers at least, behind the
/// header of a file.
fn captured(heard: &Heard) -> Result<(), String> {
    let lines = heard.all.lines();
    let pieces: Vec<&str> = lines
        .filter_map(|line| line.strip_prefix("tessera| pcap lan "))
        .collect();
    // The magic of a file with times in nanoseconds.
    match pieces.split_first() {
        Some((first, frames)) if first.starts_with("TTyyoQ") && frames.len() >= 6 => Ok(()),
        _ => Err(format!("pieces of pcap: {pieces:?}")),
    }
}

pub(super) const CASES: &[Case] = &[Case {
    group: "network",
    name: "at-the-monitor",
    on: &[QEMU_BIOS],
    cards: &[Card::E1000],
    load: Load::Bundle {
        config: &[r#"
[[switch]]
name = "lan"
[[switch.uplink]]
name = "up"
[[vm]]
name = "a"
kind = "linux"
kernel = "vmlinuz"
initrd = "initrd.cpio"
cmdline = "console=ttyS0 quiet hostname=a"
memory = "160MiB"
[[vm.nic]]
mac = "02:00:00:00:00:0a"
[[vm]]
name = "b"
kind = "linux"
kernel = "vmlinuz"
initrd = "initrd.cpio"
cmdline = "console=ttyS0 quiet"
memory = "160MiB"
[[vm.nic]]
mac = "02:00:00:00:00:0b"
mac_change = true
promiscuous = true
[[vm.nic]]
name = "probe"
kind = "mirror"
"#],
        files: FILES,
        spoil: None,
    },
    steps: &[
        KEYBOARD,
        TO_MONITOR,
        // A lease that came later would take the place of the addresses set here.
        TWO_LEASES,
        Send("\x141"),
        Send("ip a add 10.9.0.1/24 dev eth0; ip link set eth0 up; echo ready$((1))a\r"),
        Expect("^ready1a$"),
        Send("\x142"),
        Expect(r"^tessera\| keyboard: b"),
        Send("ip a add 10.9.0.2/24 dev eth0; ip link set eth0 up; echo ready$((1))b\r"),
        Expect("^ready1b$"),
        TO_MONITOR,
        MONITOR,
        Send("switch show\r"),
        Expect(r"^tessera\| switch lan: 4 ports, 1 flows, 0 mirrors, active uplink up$"),
        Expect(r"^tessera\| +1 +up +uplink +trunk all +up +card 00:.*link up 1000 Mbit/s$"),
        Expect(r"^tessera\| +2 +a +vnic +trunk all +up +vm a card 0$"),
        Send("add-flow priority=9,in_port=a,icmp,actions=normal\r"),
        Expect(r"^tessera\| flow added$"),
        Send("mirror add m select_src_port=a output_port=probe\r"),
        Expect(r"^tessera\| mirror m added$"),
        Send("capture a\r"),
        Expect(r"^tessera\| capture of lan/a: "),
        Send("\x141"),
        Expect(r"^tessera\| keyboard: a"),
        // Captured frames come between: they may break a line, but not every line.
        Send("ping -q -c 3 10.9.0.2 >/dev/null && yes pong | head -n 9\r"),
        Expect("^pong$"),
        // What a guest may not do is refused, and counted.
        Send("ip link set eth0 promisc on; ip link set eth0 address 02:00:00:00:00:77\r"),
        Expect("RTNETLINK answers: Invalid argument|ioctl.*Invalid argument|SIOCSIFHWADDR"),
        PROMPT_A,
        Send("\x142"),
        Expect(r"^tessera\| keyboard: b"),
        // And what it may is done: answers find its new address.
        Send("ip link set eth0 address 02:00:00:00:00:88; ping -c 2 10.9.0.1\r"),
        Expect("^2 packets transmitted, 2 packets received, 0% packet loss$"),
        TO_MONITOR,
        MONITOR,
        Send("capture a off\r"),
        Expect(r"^tessera\| capture of switch lan: over; [0-9]+ frames, 0 lost$"),
        Check(captured),
        Send("flows\r"),
        Expect(r"^tessera\| n_packets=[0-9]+, n_bytes=[0-9]+, priority=0 actions=NORMAL$"),
        Expect(
            r"^tessera\| n_packets=[1-9][0-9]*, n_bytes=[0-9]+, priority=9,icmp,in_port=2 actions=NORMAL$",
        ),
        Send("fdb lan\r"),
        Expect(r"^tessera\| 02:00:00:00:00:0a +a +any +configuration$"),
        Expect(r"^tessera\| 02:00:00:00:00:88 +b +any +configuration$"),
        Send("port show a\r"),
        Expect(r"^tessera\| in: [1-9][0-9]* frames, "),
        Expect(r"^tessera\| refused: 2 requests of the guest; "),
        Expect(r"^tessera\| behind: vm a card 0$"),
        Expect(r"^tessera\| card: from the guest [1-9][0-9]* frames, .* dropped none$"),
        Send("port show probe\r"),
        Expect(r"^tessera\| out: [1-9][0-9]* frames, "),
        Send("port show up\r"),
        Expect(r"^tessera\| card: received [0-9]+ frames, "),
        Send("mirror del m\r"),
        Expect(r"^tessera\| mirror m removed$"),
        Send("del-flow icmp\r"),
        Expect(r"^tessera\| 1 flow removed$"),
        // A cable is pulled, and the guest sees it.
        Send("link a down\r"),
        Expect(r"^tessera\| cable out$"),
        Send("switch show lan\r"),
        Expect(r"^tessera\| +2 +a +vnic +trunk all +down +vm a card 0$"),
        Send("\x141"),
        Expect(r"^tessera\| keyboard: a"),
        Send("echo carrier$(cat /sys/class/net/eth0/carrier)\r"),
        Expect("^carrier0$"),
        TO_MONITOR,
        MONITOR,
        Send("link a up\r"),
        Expect(r"^tessera\| cable in$"),
        Send("\x141"),
        Expect(r"^tessera\| keyboard: a"),
        Send("echo carrier$(cat /sys/class/net/eth0/carrier); ping -c 2 10.9.0.2\r"),
        Expect("^carrier1$"),
        Expect("^2 packets transmitted, 2 packets received, 0% packet loss$"),
        Refuse(&["Call Trace"]),
        // A cable stays out over the VM's end; its next life has its own address again.
        TO_MONITOR,
        MONITOR,
        Send("link b down\r"),
        Expect(r"^tessera\| cable out$"),
        Send("stop b\r"),
        Expect(r"^tessera\| vm b: ended: "),
        Send("switch show\r"),
        Expect(r"^tessera\| +3 +b +vnic +trunk all +down +vm b card 0, not running$"),
        Send("start b\r"),
        Expect(r"^tessera\| vm b: 160 MiB"),
        Send("switch show\r"),
        Expect(r"^tessera\| +3 +b +vnic +trunk all +down +vm b card 0$"),
        Expect(r"^tessera\| +4 +probe +mirror +trunk all +up +vm b card 1$"),
        Send("fdb\r"),
        Expect(r"^tessera\| 02:00:00:00:00:0b +b +any +configuration$"),
        Send("\x14x"),
    ],
    deadline: 240,
    ..Case::BASE
}];
