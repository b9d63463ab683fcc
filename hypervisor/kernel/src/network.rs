//! The switches at work: frames from guests' queues and the machine's cards through a switch into
//! other guests' queues and cards.
//!
//! A core moves frames in batches, run to completion: it copies a batch out of a queue, and a
//! [`Relay`] asks the switch about it and hands it over port by port, to be copied to where it
//! goes. It never holds locks of two VMs at once. The order is switch → uplinks, and a VM's own
//! (board → memory → card) are taken alone; a core counts the lock of its [`Mover`] all the while, so that a panic in here stops the machine
//! rather than leave another VM's card locked.
//!
//! Drivers that keep sending are not asked to notify: their queues are left *silent*, and the vCPU
//! that was looked after says when to look again (`vm::run`).
//!
//! What the monitor asks and changes goes through [`Room`]: under the switch's lock, so that a
//! change is in use for every frame after it.

use crate::lock::{Held, Lock};
use crate::run::{Live, Machine};
use crate::uplinks;
use alloc::boxed::Box;
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;
use arch::Nanos;
use core::sync::atomic::{AtomicBool, Ordering};
use cpu::percpu::this;
use log::{error, info, warn};
use monitor::command::SwitchNames;
use monitor::network::{At, Drain};
use relay::{BATCH, Far, Inbound, Leaving, Relay};
use virtio::net::{Ask, FRAME_ROOM, NetHeader, Transmitted, Whole};
use vm::config::{Config, network};
use vswitch::{MacAddr, PortId, Switch};

/// Batches of a queue that a core moves before it looks at what else there is: a ring of the usual
/// length, so that who receives is there once for all of it.
const BATCHES: usize = 4;
/// Bytes of the frames of a batch.
const BUFFER: usize = 4 * FRAME_ROOM;
/// Decisions that a core remembers.
const CACHED: usize = 2048;
/// How often captured frames are written out, in nanoseconds, and how many characters at a time:
/// so that a serial line at 115200 has room for others.
const DRAIN: u64 = 100_000_000;
const DRAINED: usize = 800;

/// All switches, and what is plugged into them.
pub struct Network {
    rooms: Vec<Room>,
    movers: Vec<Lock<Mover>>,
}

/// A switch and what is behind its ports.
pub struct Room {
    name: String,
    switch: Lock<Switch>,
    /// By port number; 0 is nobody's.
    ports: Vec<Option<Behind>>,
    /// By port number: a person has pulled its cable.
    pulled: Vec<AtomicBool>,
    /// The way of captured frames out.
    drain: Lock<Drain>,
    /// Why it has no ports.
    fault: Option<String>,
}

/// What is behind a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Behind {
    /// A card of a VM.
    Guest {
        /// The VM's number.
        vm: usize,
        /// Which of its cards.
        nic: usize,
    },
    /// A card of the machine, by its number among them.
    Uplink(usize),
}

/// What a core needs to move frames.
struct Mover {
    relay: Relay,
    buffer: Box<[u8]>,
}

/// Where a batch comes from.
#[derive(Clone, Copy)]
struct Source<'a> {
    room: &'a Room,
    port: PortId,
    now: Nanos,
}

impl Network {
    /// The switches of the configuration. What is wrong with one is told, and that one is left out:
    /// the cards that were to be in it have no link.
    pub fn new(config: &Config, cores: usize) -> Self {
        let secret = [random(), random()];
        let mut taken = Vec::new();
        let rooms = config.switches.iter().enumerate();
        let rooms: Vec<Room> = rooms
            .map(|(number, switch)| Room::new(config, number, switch, secret, &mut taken))
            .collect();
        let cores = if rooms.is_empty() { 0 } else { cores };
        let movers = (0..cores).map(|_| {
            Lock::new(Mover {
                relay: Relay::new(CACHED, [random(), random()]),
                buffer: alloc::vec![0; BUFFER].into(),
            })
        });
        Self {
            movers: movers.collect(),
            rooms,
        }
    }

    fn mover(&self) -> Option<Held<'_, Mover>> {
        self.movers.get(this().number() as usize).map(Lock::lock)
    }

    /// The switches in the order of the configuration.
    pub fn rooms(&self) -> &[Room] {
        &self.rooms
    }

    /// What is wrong with the first switch that was left out.
    pub fn fault(&self) -> Option<&str> {
        self.rooms.iter().find_map(|room| room.fault.as_deref())
    }

    /// What can be named at the monitor.
    pub fn names(&self) -> Vec<SwitchNames> {
        let names = self.rooms.iter().map(|room| {
            let mut names = SwitchNames::new(&room.name);
            for (port, ..) in room.switch.lock().ports() {
                names.add(port.id.0, &port.name);
            }
            names
        });
        names.collect()
    }

    /// Plugs a VM's cables in, or pulls them: those that a person has pulled stay so. A VM that
    /// starts has the addresses and rights of its configuration.
    pub fn set_links(&self, machine: &Machine, live: &Live, up: bool) {
        for (index, nic) in live.vm.nics().iter().enumerate() {
            let Some(room) = self.rooms.get(nic.switch) else {
                continue;
            };
            let pulled = room.is_pulled(nic.port);
            if up {
                let mac = live.vm.with_nic(index, |net, _| {
                    net.set_link(!pulled);
                    net.config().mac
                });
                let mut switch = room.switch.lock();
                let now = machine.clock.now();
                let _ = switch.set_promiscuous(nic.port, false, now);
                if let Some(mac) = mac {
                    let _ = switch.change_address(nic.port, MacAddr(mac), now);
                }
            }
            let _ = room.switch.lock().set_link(nic.port, up && !pulled);
        }
    }

    /// Plugs a port's cable in, or pulls it, whoever is behind, from now on.
    ///
    /// # Errors
    /// Nobody is behind it.
    pub fn set_cable(&self, machine: &Machine, at: At, up: bool) -> Result<(), &'static str> {
        let room = self.rooms.get(at.switch).ok_or("no such switch")?;
        let port = PortId(at.port);
        let behind = room.behind(port).ok_or("no card is behind that port")?;
        if let Some(pulled) = room.pulled.get(usize::from(at.port)) {
            pulled.store(!up, Ordering::Relaxed);
        }
        match behind {
            Behind::Guest { vm, nic } => {
                let live = machine.live(vm);
                let _ = room.switch.lock().set_link(port, up && live.is_some());
                if let Some(live) = live {
                    live.vm.with_nic(nic, |net, _| net.set_link(up));
                    live.vm.carry_devices();
                    machine.kick_touched(&live);
                }
            }
            Behind::Uplink(number) => {
                let up = up && uplinks::has_link(number);
                let _ = room.switch.lock().set_link(port, up);
            }
        }
        Ok(())
    }

    /// Writes captured frames out, a bounded share. Gives the time of the next look.
    pub fn drain(&self, now: Nanos, say: &mut dyn FnMut(&str)) -> Nanos {
        let mut due = Nanos::NEVER;
        for room in &self.rooms {
            let mut drain = room.drain.lock();
            let mut lines = Vec::new();
            {
                let mut switch = room.switch.lock();
                drain.step(&mut switch, DRAINED, &mut |line| {
                    lines.push(String::from(line))
                });
                if drain.is_busy(&switch) {
                    due = now + DRAIN;
                }
            }
            // The console may take its time, and frames need not wait for it.
            lines.iter().for_each(|line| say(line));
        }
        due
    }

    /// Tells the switch what a guest's driver asked for. What is refused is counted there.
    fn grant(&self, live: &Live, index: usize, source: Source<'_>) {
        let asked = live.vm.with_nic(index, |net, _| net.take_asked());
        let Some(asked) = asked else { return };
        let mut switch = source.room.switch.lock();
        let (port, now) = (source.port, source.now);
        if let Some(on) = asked.promiscuous {
            let _ = switch.set_promiscuous(port, on, now);
        }
        if let Some(mac) = asked.mac {
            let _ = switch.change_address(port, MacAddr(mac), now);
        }
    }

    /// Moves the frames of a VM whose doorbell was rung, and of its silent queues; `true`: some
    /// queue is left silent, so this is to be called again before long.
    pub fn transmit(&self, machine: &Machine, live: &Live, ask: Ask) -> bool {
        let Some(mut mover) = self.mover() else {
            return false;
        };
        let mut silent = false;
        let vm = &live.vm;
        for (index, nic) in vm.nics().iter().enumerate() {
            let Some(room) = self.rooms.get(nic.switch) else {
                continue;
            };
            if nic.net.take_asked() {
                let source = Source {
                    room,
                    port: nic.port,
                    now: machine.clock.now(),
                };
                self.grant(live, index, source);
            }
            let mut pairs = nic.net.take_notified();
            while pairs != 0 {
                let pair = pairs.trailing_zeros() as u16;
                pairs &= pairs - 1;
                // What was found first decides whether a driver keeps sending.
                let mut ask = ask;
                let mut done = Transmitted::default();
                for _ in 0..BATCHES {
                    let source = Source {
                        room,
                        port: nic.port,
                        now: machine.clock.now(),
                    };
                    done = self.batch(machine, &mut mover, live, (index, pair, ask), source);
                    if !done.more {
                        break;
                    }
                    if ask == Ask::Idle {
                        ask = Ask::Never;
                    }
                }
                if done.more {
                    nic.net.notify_again(pair);
                } else if done.silent {
                    nic.net.leave_silent(pair);
                    silent = true;
                }
            }
            if nic.net.has_signals() {
                vm.carry_devices();
            }
        }
        uplinks::flush();
        silent
    }

    /// Moves one batch of a queue.
    fn batch(
        &self,
        machine: &Machine,
        mover: &mut Mover,
        live: &Live,
        (index, pair, ask): (usize, u16, Ask),
        source: Source<'_>,
    ) -> Transmitted {
        let Mover { relay, buffer } = mover;
        let mut frames = heapless::Vec::<Inbound<'_>, BATCH>::new();
        let done = live.vm.with_nic(index, |net, memory| {
            net.transmit(memory, pair, BATCH as u32, ask, buffer, |header, frame| {
                // Never more than the budget.
                let _ = frames.push((header, frame));
            })
        });
        source.forward(machine, relay, &frames);
        done.unwrap_or_default()
    }

    /// Takes in what came by the machine's cards; `true`: there may be more.
    pub fn receive(&self, machine: &Machine) -> bool {
        let Some(mut mover) = self.mover() else {
            return false;
        };
        let Mover { relay, buffer } = &mut *mover;
        let mut more = false;
        for room in &self.rooms {
            for (port, behind) in (0..).zip(&room.ports) {
                let Some(Behind::Uplink(number)) = *behind else {
                    continue;
                };
                let source = Source {
                    room,
                    port: PortId(port),
                    now: machine.clock.now(),
                };
                let mut rest = &mut **buffer;
                let mut frames = heapless::Vec::<Inbound<'_>, BATCH>::new();
                let count = uplinks::receive(number, BATCH, &mut |bytes| {
                    if let Some((frame, behind)) =
                        core::mem::take(&mut rest).split_at_mut_checked(bytes.len())
                    {
                        frame.copy_from_slice(bytes);
                        rest = behind;
                        let _ = frames.push((NetHeader::default(), Whole::bare(frame)));
                    }
                });
                more |= count == BATCH;
                source.forward(machine, relay, &frames);
            }
        }
        more
    }

    /// Looks after switches and cards: links, ageing, announcements.
    pub fn tick(&self, now: Nanos) {
        for room in &self.rooms {
            let mut switch = room.switch.lock();
            for (port, behind) in (0..).zip(&room.ports) {
                if let Some(Behind::Uplink(number)) = *behind {
                    let up = uplinks::has_link(number) && !room.is_pulled(PortId(port));
                    let _ = switch.set_link(PortId(port), up);
                }
            }
            switch.tick(now);
            let mut frame = [0; 64];
            for _ in 0..BATCH {
                let Some((port, length)) = switch.announcement(&mut frame) else {
                    break;
                };
                let behind = room.ports.get(usize::from(port.0)).copied().flatten();
                if let (Some(Behind::Uplink(number)), Some(frame)) = (behind, frame.get(..length)) {
                    uplinks::transmit(number, &[frame]);
                }
            }
        }
        uplinks::flush();
    }
}

impl Source<'_> {
    /// Asks the switch about frames and does what it says.
    fn forward(self, machine: &Machine, relay: &mut Relay, frames: &[Inbound<'_>]) {
        let Self { room, port, now } = self;
        let mut ports = Ports { machine, room };
        relay.forward(|| room.switch.lock(), port, frames, now, &mut ports);
    }
}

/// What is behind the ports of a switch.
struct Ports<'a> {
    machine: &'a Machine,
    room: &'a Room,
}

impl Far for Ports<'_> {
    fn take(&mut self, port: PortId, frames: Leaving<'_>) {
        let behind = self.room.ports.get(usize::from(port.0));
        match behind.copied().flatten() {
            Some(Behind::Guest { vm, nic }) => self.give(vm, nic, frames),
            Some(Behind::Uplink(number)) => frames.each(|header, frame| {
                // A frame that is not what its header says is nobody's.
                let _ = header.finish(0, frame, |_, frame| {
                    let mut pieces = heapless::Vec::<&[u8], 8>::new();
                    pieces.extend(frame.pieces());
                    uplinks::transmit(number, &pieces);
                    Ok(())
                });
            }),
            None => {}
        }
    }
}

impl Ports<'_> {
    /// Puts frames into a guest's queue, and shows them to it.
    fn give(&self, vm: usize, nic: usize, frames: Leaving<'_>) {
        let Some(live) = self.machine.live(vm) else {
            return;
        };
        live.vm.with_nic(nic, |net, memory| {
            frames.each(|header, frame| {
                // What it drops it counts.
                let _ = net.receive(memory, header, frame);
            });
            net.settle(memory);
        });
        let nics = live.vm.nics();
        if nics.get(nic).is_some_and(|nic| nic.net.has_signals()) {
            live.vm.carry_devices();
            self.machine.kick_touched(&live);
        }
    }
}

impl Room {
    fn new(
        config: &Config,
        number: usize,
        section: &network::Switch,
        secret: [u64; 2],
        taken: &mut Vec<usize>,
    ) -> Self {
        let vms = || config.vms.iter().flatten().enumerate();
        let nics = || vms().flat_map(|(_, vm)| &vm.nics);
        let name = section.name.clone();
        let mut ports = Vec::new();
        let mut put = |id: PortId, behind| {
            let place = usize::from(id.0);
            if ports.len() <= place {
                ports.resize(place + 1, None);
            }
            if let Some(slot) = ports.get_mut(place) {
                *slot = Some(behind);
            }
        };
        let made = section
            .assemble(number, "tessera.toml", nics())
            .map_err(|error| format!("{error}"))
            .and_then(|config| {
                Switch::new(config, secret).map_err(|error| format!("switch {name}: {error}"))
            });
        let mut fault = None;
        let switch = match made {
            Ok(mut switch) => {
                for uplink in &section.uplinks {
                    let id = uplink.port.id;
                    let _ = switch.set_link(id, false);
                    match uplinks::choose(uplink.nic, taken) {
                        Some(number) => {
                            taken.push(number);
                            put(id, Behind::Uplink(number));
                        }
                        None => warn!(
                            "switch {name}: port {}: no network card of this machine is {}; it has {}",
                            uplink.port.name,
                            uplink.nic,
                            uplinks::list()
                        ),
                    }
                }
                for (vm, config) in vms() {
                    for (nic, card) in config.nics.iter().enumerate() {
                        if card.switch == number {
                            let _ = switch.set_link(card.port.id, false);
                            put(card.port.id, Behind::Guest { vm, nic });
                        }
                    }
                }
                let count = |uplink| {
                    let of_kind = ports.iter().flatten();
                    let of_kind = of_kind.filter(|b| matches!(b, Behind::Uplink(_)) == uplink);
                    of_kind.count()
                };
                info!(
                    "switch {name}: {} uplinks, {} cards of VMs, {} flows",
                    count(true),
                    count(false),
                    section.flows.len()
                );
                switch
            }
            Err(error) => {
                error!("{error}; switch {name} has no ports");
                ports.clear();
                fault = Some(error);
                Switch::empty(secret)
            }
        };
        Self {
            name,
            switch: Lock::new(switch),
            pulled: ports.iter().map(|_| AtomicBool::new(false)).collect(),
            ports,
            drain: Lock::new(Drain::default()),
            fault,
        }
    }

    /// The switch, locked: not for long.
    pub fn switch(&self) -> Held<'_, Switch> {
        self.switch.lock()
    }

    /// The numbers that ports can have.
    pub fn numbers(&self) -> impl Iterator<Item = PortId> {
        (0..).zip(&self.ports).map(|(number, _)| PortId(number))
    }

    /// Who is behind a port.
    pub fn behind(&self, port: PortId) -> Option<Behind> {
        self.ports.get(usize::from(port.0)).copied().flatten()
    }

    fn is_pulled(&self, port: PortId) -> bool {
        let pulled = self.pulled.get(usize::from(port.0));
        pulled.is_some_and(|pulled| pulled.load(Ordering::Relaxed))
    }
}

fn random() -> u64 {
    let [a, b, c, d, e, f, g, h, ..] = hw::random_seed();
    u64::from_le_bytes([a, b, c, d, e, f, g, h])
}
