//! What the monitor answers about switches, and changes in them: [`monitor::network`] has the
//! words; here they meet the machine's switches and who is behind their ports.

use super::Manager;
use crate::console;
use crate::network::{Behind, Room};
use crate::uplinks;
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;
use core::fmt::Write;
use monitor::network::{self, Answer, At, Net};
use virtio::net::{ReceiveDrop, TransmitDrop};
use vswitch::{PortId, Switch};

impl Manager {
    /// Carries out what was typed about switches.
    pub(super) fn net(&mut self, net: &Net) {
        let now = self.machine.clock.now();
        match net {
            Net::Switches(which) => self.each(*which, &|room| {
                // Before the switch is locked.
                let behind = room.numbers().map(|port| self.behind(room, port));
                let behind: Vec<String> = behind.collect();
                let behind = |port: PortId| behind.get(usize::from(port.0)).cloned();
                let who = |port| behind(port).unwrap_or_else(|| "nobody".into());
                network::show(&room.switch(), &who)
            }),
            Net::Addresses(which) => {
                self.each(*which, &|room| network::addresses(&room.switch(), now));
            }
            Net::Flows(which) => self.each(*which, &|room| network::flows(&room.switch())),
            Net::Mirrors(which) => self.each(*which, &|room| network::mirrors(&room.switch())),
            Net::Port(at) => self.port(*at),
            Net::AddFlow(switch, text) => self.change(*switch, &|s| network::add_flow(s, text)),
            Net::DelFlow(switch, text) => self.change(*switch, &|s| network::del_flow(s, text)),
            Net::AddMirror(switch, text) => self.change(*switch, &|s| network::add_mirror(s, text)),
            Net::DelMirror(switch, name) => self.change(*switch, &|s| network::del_mirror(s, name)),
            Net::Capture(at, on) => {
                self.change(at.switch, &|s| network::capture(s, PortId(at.port), *on));
                self.drain = now;
            }
            Net::Link(at, up) => match self.machine.network.set_cable(self.machine, *at, *up) {
                Ok(()) => console::reply(format_args!("cable {}", if *up { "in" } else { "out" })),
                Err(why) => console::reply(format_args!("{why}")),
            },
        }
    }

    /// Writes out what was captured, if it is time.
    pub(super) fn drain_captures(&mut self) {
        let now = self.machine.clock.now();
        if self.drain <= now {
            let say = &mut |line: &str| console::reply(format_args!("{line}"));
            self.drain = self.machine.network.drain(now, say);
        }
    }

    /// Shows something of one switch, or of all.
    fn each(&self, which: Option<usize>, text: &dyn Fn(&Room) -> String) {
        let rooms = self.machine.network.rooms();
        if rooms.is_empty() {
            console::reply(format_args!("there is no switch: [[switch]] describes one"));
        }
        for (number, room) in rooms.iter().enumerate() {
            if which.is_none_or(|which| which == number) {
                show(&text(room));
            }
        }
    }

    fn change(&self, switch: usize, change: &dyn Fn(&mut Switch) -> Answer) {
        let Some(room) = self.machine.network.rooms().get(switch) else {
            return;
        };
        let answer = change(&mut room.switch());
        show(&answer.unwrap_or_else(|why| format!("{why}; nothing has changed")));
    }

    /// Who is behind a port, in words.
    fn behind(&self, room: &Room, port: PortId) -> String {
        match room.behind(port) {
            None => "nobody".into(),
            Some(Behind::Uplink(number)) => {
                uplinks::about(number).map_or_else(String::new, |(about, _)| about)
            }
            Some(Behind::Guest { vm, nic }) => {
                let Some(kept) = self.vms.get(vm) else {
                    return String::new();
                };
                let state = match self.machine.live(vm) {
                    Some(live) if live.vm.nics().get(nic).is_some() => "",
                    _ => ", not running",
                };
                format!("vm {} card {nic}{state}", kept.config.name)
            }
        }
    }

    /// All about a port: what the switch counted, and the card behind.
    fn port(&self, at: At) {
        let (rooms, id) = (self.machine.network.rooms(), PortId(at.port));
        let Some(room) = rooms.get(at.switch) else {
            return;
        };
        let mut text = network::port(&room.switch(), id);
        let _ = writeln!(text, "behind: {}", self.behind(room, id));
        match room.behind(id) {
            Some(Behind::Uplink(number)) => {
                if let Some((_, counters)) = uplinks::about(number) {
                    let _ = writeln!(
                        text,
                        "card: received {} frames, {} bytes; {} damaged, {} missed, {} malformed",
                        counters.received,
                        counters.received_bytes,
                        counters.errors,
                        counters.missed,
                        counters.malformed
                    );
                    let _ = writeln!(
                        text,
                        "card: sent {} frames, {} bytes; {} lost; {} resets",
                        counters.transmitted,
                        counters.transmitted_bytes,
                        counters.lost,
                        counters.resets
                    );
                }
            }
            Some(Behind::Guest { vm, nic }) => {
                if let Some(live) = self.machine.live(vm) {
                    let about = live.vm.with_nic(nic, |net, _| {
                        let mac = vswitch::MacAddr(net.mac());
                        (mac, net.ready(), net.fault(), *net.counters())
                    });
                    if let Some((mac, ready, fault, counters)) = about {
                        let _ = write!(
                            text,
                            "card: {mac}, driver {}",
                            if ready { "ready" } else { "not ready" }
                        );
                        if let Some(fault) = fault {
                            let _ = write!(text, ": {fault}");
                        }
                        let _ = write!(
                            text,
                            "\ncard: from the guest {} frames, {} bytes; dropped",
                            counters.out_frames, counters.out_bytes
                        );
                        let causes = TransmitDrop::ALL;
                        drops(
                            &mut text,
                            causes.map(|(cause, word)| (counters.out_dropped(cause), word)),
                        );
                        let _ = write!(
                            text,
                            "card: to the guest {} frames, {} bytes; dropped",
                            counters.in_frames, counters.in_bytes
                        );
                        let causes = ReceiveDrop::ALL;
                        drops(
                            &mut text,
                            causes.map(|(cause, word)| (counters.in_dropped(cause), word)),
                        );
                    }
                }
            }
            None => {}
        }
        show(&text);
    }
}

/// The causes that were counted, and the end of the line.
fn drops<const N: usize>(text: &mut String, causes: [(u64, &str); N]) {
    let mut any = false;
    for (count, word) in causes {
        if count != 0 {
            any = true;
            let _ = write!(text, " {word} {count}");
        }
    }
    text.push_str(if any { "\n" } else { " none\n" });
}

/// Answers line by line.
fn show(text: &str) {
    text.lines()
        .for_each(|line| console::reply(format_args!("{line}")));
}
