//! Networks of switches, to see that no frame comes twice, comes back, or stays for ever.

use alloc::collections::VecDeque;
use alloc::vec::Vec;

use arch::Nanos;

use crate::cache::Cache;
use crate::config::{ConfigError, SwitchConfig};
use crate::counters::DropCause;
use crate::edit::MIN_FRAME;
use crate::key::Vlan;
use crate::port::{PortConfig, PortKind};
use crate::switch::Switch;
use crate::translate::Step;
use crate::{MacAddr, PortId};

/// A frame of that type with tags (TPID and TCI each) and a payload.
#[must_use]
pub fn frame(to: MacAddr, from: MacAddr, tags: &[(u16, u16)], kind: u16, load: &[u8]) -> Vec<u8> {
    let mut frame = [to.0, from.0].concat();
    for (tpid, tci) in tags {
        frame.extend(tpid.to_be_bytes());
        frame.extend(tci.to_be_bytes());
    }
    frame.extend(kind.to_be_bytes());
    frame.extend(load);
    frame
}

/// Takes the steps of a decision that concern tags; calls `output` with each port and the frame as
/// it leaves there.
pub fn take(steps: &[Step], whole: &[u8], mut output: impl FnMut(PortId, &[u8])) {
    let mut frame = whole.to_vec();
    for step in steps {
        match step {
            Step::PushVlan(Vlan { tpid, tci }) => {
                let [a, b] = tpid.to_be_bytes();
                let [c, d] = (tci & !Vlan::PRESENT).to_be_bytes();
                frame.splice(12..12, [a, b, c, d]);
            }
            Step::PopVlan => {
                frame.drain(12..16);
            }
            Step::Output(port) => {
                let length = frame.len();
                if length < whole.len() {
                    frame.resize(length.max(MIN_FRAME), 0);
                }
                output(*port, &frame);
                frame.truncate(length);
            }
            Step::Set(_) | Step::Meter(_) => {}
        }
    }
}

/// How the uplinks of the hosts are joined by switches that know nothing and flood everything.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cabling {
    /// One uplink each, all in one switch.
    Star,
    /// One uplink each, in a row of three switches.
    Row,
    /// Two uplinks each, both in one switch.
    Double,
    /// Two uplinks each, in two switches that are joined: a loop through every host.
    Loop,
}

/// Hosts of a [`Network`].
pub const HOSTS: usize = 3;
/// Guests of a host.
pub const GUESTS: usize = 4;
/// The number of a host's first uplink.
const UPLINK: u16 = 100;

/// What a network did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Frames that guests sent.
    pub sent: u64,
    /// Frames that guests got.
    pub delivered: u64,
    /// Frames that came to a guest again.
    pub duplicates: u64,
    /// Frames that came back to their sender.
    pub echoes: u64,
    /// Frames that came to a guest they were not for.
    pub strays: u64,
    /// Frames that did not come to a guest they were for.
    pub missing: u64,
    /// Most passages through a switch that one frame led to.
    pub passages: u64,
}

/// Where a frame is: it comes in by a port of a host, or of a flooding switch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Plug {
    Host(usize, PortId),
    Hub(usize, usize),
}

struct Host {
    switch: Switch,
    cache: Cache,
}

/// Three hosts and what joins them.
pub struct Network {
    hosts: Vec<Host>,
    /// What is at the end of each port of each flooding switch; whether the cable is whole.
    hubs: Vec<Vec<(Plug, bool)>>,
    queue: VecDeque<(Plug, Vec<u8>)>,
    now: Nanos,
    random: u64,
    report: Report,
}

/// The address of a guest.
#[must_use]
pub fn guest(host: usize, guest: usize) -> MacAddr {
    MacAddr([0x52, 0x54, 0, 0, host as u8, guest as u8])
}

/// The VLAN of a guest.
const fn vlan(guest: usize) -> u16 {
    if guest < GUESTS / 2 { 10 } else { 20 }
}

impl Network {
    /// A network whose randomness begins with `seed`.
    ///
    /// # Errors
    /// None: the configurations are right.
    pub fn new(cabling: Cabling, seed: u64) -> Result<Self, ConfigError> {
        let uplinks = match cabling {
            Cabling::Star | Cabling::Row => 1,
            Cabling::Double | Cabling::Loop => 2,
        };
        let mut hosts = Vec::new();
        for host in 0..HOSTS {
            let mut config = SwitchConfig::default();
            for number in 0..GUESTS {
                let id = number as u16 + 1;
                let mut port = PortConfig::new(id, &alloc::format!("vm{id}"), PortKind::Vnic);
                port.macs = alloc::vec![guest(host, number)];
                port.tag = Some(vlan(number));
                // One of each VLAN prefers the last uplink.
                if number % 2 == 1 {
                    port.pinned = Some(PortId(UPLINK + uplinks - 1));
                }
                config.ports.push(port);
            }
            for id in UPLINK..UPLINK + uplinks {
                let mut port = PortConfig::new(id, &alloc::format!("up{id}"), PortKind::Uplink);
                port.trunks = alloc::vec![10, 20];
                config.ports.push(port);
            }
            hosts.push(Host {
                switch: Switch::new(config, [seed, host as u64])?,
                cache: Cache::new(1024, [seed, 7]),
            });
        }
        let mut network = Self {
            hosts,
            hubs: Vec::new(),
            queue: VecDeque::new(),
            now: Nanos(1),
            random: seed | 1,
            report: Report::default(),
        };
        network.cable(cabling);
        Ok(network)
    }

    fn cable(&mut self, cabling: Cabling) {
        let plug = |host, uplink| (Plug::Host(host, PortId(UPLINK + uplink)), true);
        let hub = |hub, port| (Plug::Hub(hub, port), true);
        self.hubs = match cabling {
            Cabling::Star => alloc::vec![(0..HOSTS).map(|host| plug(host, 0)).collect()],
            Cabling::Row => alloc::vec![
                alloc::vec![plug(0, 0), hub(1, 0)],
                alloc::vec![hub(0, 1), plug(1, 0), hub(2, 1)],
                alloc::vec![plug(2, 0), hub(1, 2)],
            ],
            Cabling::Double => {
                let both = |host| [plug(host, 0), plug(host, 1)];
                alloc::vec![(0..HOSTS).flat_map(both).collect()]
            }
            Cabling::Loop => {
                let side = |uplink, other| {
                    let hosts = (0..HOSTS).map(move |host| plug(host, uplink));
                    hosts.chain([hub(other, HOSTS)]).collect()
                };
                alloc::vec![side(0, 1), side(1, 0)]
            }
        };
    }

    fn roll(&mut self, below: u64) -> usize {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        (self.random >> 11).checked_rem(below).unwrap_or(0) as usize
    }

    /// Cuts or mends the cable of a host's uplink; the other one of the host is mended.
    fn flap(&mut self) {
        let (host, uplink, whole) = (self.roll(HOSTS as u64), self.roll(2), self.roll(2) == 1);
        for port in [uplink, 1 - uplink] {
            let id = PortId(UPLINK + port as u16);
            let whole = whole || port != uplink;
            for (plug, cable) in self.hubs.iter_mut().flatten() {
                if *plug == Plug::Host(host, id) {
                    *cable = whole;
                }
            }
            if let Some(host) = self.hosts.get_mut(host) {
                // Hosts with one uplink have no second.
                let _ = host.switch.set_link(id, whole);
            }
        }
        let mut frame = [0; 64];
        while let Some(switch) = self.hosts.get_mut(host).map(|host| &mut host.switch)
            && let Some((port, length)) = switch.announcement(&mut frame)
        {
            let bytes = frame.get(..length).unwrap_or(&frame).to_vec();
            self.plug_in(Plug::Host(host, port), bytes);
            self.settle(None, 0);
        }
    }

    /// A frame leaves a host by an uplink: it comes in at the other end of the cable.
    fn plug_in(&mut self, from: Plug, frame: Vec<u8>) {
        for (hub, ports) in self.hubs.iter().enumerate() {
            for (port, (plug, whole)) in ports.iter().enumerate() {
                if *plug == from && *whole {
                    self.queue.push_back((Plug::Hub(hub, port), frame));
                    return;
                }
            }
        }
    }

    /// Lets everything arrive that is under way. `sender` and `meant` say who sent it and, a bit
    /// each, whom it is for.
    fn settle(&mut self, sender: Option<usize>, meant: u32) {
        let (mut got, mut passages) = (0u32, 0);
        while let Some((at, frame)) = self.queue.pop_front() {
            passages += 1;
            // A storm is seen, not waited for.
            if passages > 10_000 {
                self.queue.clear();
                break;
            }
            match at {
                Plug::Hub(hub, from) => {
                    for (port, (plug, whole)) in
                        self.hubs.get(hub).into_iter().flatten().enumerate()
                    {
                        if port != from && *whole {
                            self.queue.push_back((*plug, frame.clone()));
                        }
                    }
                }
                Plug::Host(number, port) => {
                    let Some(host) = self.hosts.get_mut(number) else {
                        continue;
                    };
                    let decision =
                        host.switch
                            .decide(&mut host.cache, port, &frame, frame.len(), self.now);
                    let mut outside = Vec::new();
                    take(decision.steps, &frame, |to, frame| {
                        if to.0 >= UPLINK {
                            outside.push((Plug::Host(number, to), frame.to_vec()));
                            return;
                        }
                        let bit = number * GUESTS + usize::from(to.0) - 1;
                        self.report.delivered += 1;
                        if sender == Some(bit) {
                            self.report.echoes += 1;
                        } else if got >> bit & 1 != 0 {
                            self.report.duplicates += 1;
                        }
                        got |= 1 << bit;
                    });
                    for (plug, frame) in outside {
                        self.plug_in(plug, frame);
                    }
                }
            }
        }
        if sender.is_some() {
            self.report.strays += u64::from((got & !meant).count_ones());
            self.report.missing += u64::from((meant & !got).count_ones());
        }
        self.report.passages = self.report.passages.max(passages);
    }

    /// A guest sends something: to one, to all, to nobody, to bridges, or in another's name.
    fn send(&mut self) {
        let (host, number) = (self.roll(HOSTS as u64), self.roll(GUESTS as u64));
        let (to_host, to) = (self.roll(HOSTS as u64), self.roll(GUESTS as u64));
        let of_vlan = |which: u16| -> u32 {
            let all = (0..HOSTS * GUESTS).filter(|bit| vlan(bit % GUESTS) == which);
            all.fold(0, |bits, bit| bits | 1 << bit)
        };
        let sender = host * GUESTS + number;
        let others = of_vlan(vlan(number)) & !(1 << sender);
        let own = guest(host, number);
        let (target, source, meant) = match self.roll(16) {
            0..8 => (
                guest(to_host, to),
                own,
                others & 1 << (to_host * GUESTS + to),
            ),
            8..11 => (MacAddr::BROADCAST, own, others),
            11..13 => (MacAddr([1, 0, 0x5e, 0, 0, 5]), own, others),
            13 => (MacAddr([0x52, 0x54, 9, 9, 9, 9]), own, 0),
            14 => (MacAddr([1, 0x80, 0xc2, 0, 0, self.roll(16) as u8]), own, 0),
            _ => (MacAddr::BROADCAST, guest(to_host, 9), 0),
        };
        let load = [self.roll(256) as u8; 46];
        let bytes = frame(target, source, &[], 0x0800, &load);
        let port = PortId(number as u16 + 1);
        self.queue.push_back((Plug::Host(host, port), bytes));
        self.settle(Some(sender), meant);
        self.report.sent += 1;
    }

    /// Has guests send that many frames, with cables cut and mended meanwhile where hosts have two
    /// uplinks.
    pub fn run(&mut self, frames: u64) -> Report {
        let hubs = self.hubs.iter().flatten();
        let uplinks = hubs
            .filter(|(plug, _)| matches!(plug, Plug::Host(..)))
            .count();
        for count in 0..frames {
            if count % 1000 == 999 && uplinks > HOSTS {
                self.flap();
            }
            self.now.0 += 1000;
            self.send();
        }
        self.report
    }

    /// Frames that came in by ports of all hosts, those that left again, and those that did not.
    #[must_use]
    pub fn totals(&self) -> (u64, u64, u64) {
        let ports = self.hosts.iter().flat_map(|host| host.switch.ports());
        ports.fold((0, 0, 0), |(rx, forwarded, dropped), (_, _, counters)| {
            (
                rx + counters.rx_frames,
                forwarded + counters.forwarded,
                dropped + counters.dropped_in_all(),
            )
        })
    }

    /// How many frames all hosts dropped for a cause.
    #[must_use]
    pub fn dropped(&self, cause: DropCause) -> u64 {
        let ports = self.hosts.iter().flat_map(|host| host.switch.ports());
        ports.map(|(_, _, counters)| counters.dropped(cause)).sum()
    }
}

/// Runs a network of that cabling; [`Report::duplicates`], `echoes`, `strays` and `missing` are to
/// be 0.
///
/// # Errors
/// None: the configurations are right.
pub fn run(cabling: Cabling, frames: u64, seed: u64) -> Result<Report, ConfigError> {
    Ok(Network::new(cabling, seed)?.run(frames))
}
