//! The switches at work: frames from guests' queues and the machine's cards through a switch into
//! other guests' queues and cards.
//!
//! A core moves frames in batches, run to completion: it copies a batch out of a queue, and a
//! [`Relay`] asks the switch about it and hands it over port by port, to be copied to where it
//! goes. It never holds locks of two VMs at once. The order is uplinks → switch, and a VM's own (board → memory → card) are taken alone; a
//! core counts the lock of its [`Mover`] all the while, so that a panic in here stops the machine
//! rather than leave another VM's card locked.

use crate::lock::{Held, Lock};
use crate::run::{Live, Machine};
use crate::uplinks;
use alloc::boxed::Box;
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;
use arch::Nanos;
use cpu::percpu::this;
use log::{error, info, warn};
use relay::{BATCH, Far, Inbound, Leaving, Relay};
use virtio::net::{FRAME_ROOM, NetHeader};
use vm::config::{Config, network};
use vswitch::{PortId, Switch};

/// Batches that a core moves for one doorbell before it looks at what else there is.
const BATCHES: usize = 8;
/// Bytes of the frames of a batch.
const BUFFER: usize = 4 * FRAME_ROOM;
/// Decisions that a core remembers.
const CACHED: usize = 2048;
/// All switches, and what is plugged into them.
pub struct Network {
    rooms: Vec<Room>,
    movers: Vec<Lock<Mover>>,
}

/// A switch and what is behind its ports.
struct Room {
    name: String,
    switch: Lock<Switch>,
    /// By port number; 0 is nobody's.
    ports: Vec<Option<Behind>>,
}

/// What is behind a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Behind {
    /// A card of a VM: the VM's number, and which of its cards.
    Guest { vm: usize, nic: usize },
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

    /// Plugs a VM's cables in, or pulls them.
    pub fn set_links(&self, live: &Live, up: bool) {
        for nic in live.vm.nics() {
            if let Some(room) = self.rooms.get(nic.switch) {
                let _ = room.switch.lock().set_link(nic.port, up);
            }
        }
    }

    /// Moves the frames of a VM whose doorbell was rung.
    pub fn transmit(&self, machine: &Machine, live: &Live) {
        let Some(mut mover) = self.mover() else {
            return;
        };
        let vm = &live.vm;
        for (index, nic) in vm.nics().iter().enumerate() {
            let Some(room) = self.rooms.get(nic.switch) else {
                continue;
            };
            let mut pairs = nic.net.take_notified();
            while pairs != 0 {
                let pair = pairs.trailing_zeros() as u16;
                pairs &= pairs - 1;
                let mut more = true;
                for _ in 0..BATCHES {
                    if !more {
                        break;
                    }
                    let source = Source {
                        room,
                        port: nic.port,
                        now: machine.clock.now(),
                    };
                    more = self.batch(machine, &mut mover, live, (index, pair), source);
                }
                if more {
                    nic.net.notify_again(pair);
                }
            }
            if nic.net.has_signals() {
                vm.carry_devices();
            }
        }
        uplinks::flush();
    }

    /// Moves one batch of a queue; `true`: there may be more.
    fn batch(
        &self,
        machine: &Machine,
        mover: &mut Mover,
        live: &Live,
        (index, pair): (usize, u16),
        source: Source<'_>,
    ) -> bool {
        let Mover { relay, buffer } = mover;
        let mut frames = heapless::Vec::<Inbound<'_>, BATCH>::new();
        let done = live.vm.with_nic(index, |net, memory| {
            net.transmit(
                memory,
                pair,
                BATCH as u32,
                false,
                buffer,
                |header, frame| {
                    // Never more than the budget.
                    let _ = frames.push((header, frame));
                },
            )
        });
        source.forward(machine, relay, &frames);
        done.is_some_and(|done| done.more)
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
                        let _ = frames.push((NetHeader::default(), frame));
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
                    let _ = switch.set_link(PortId(port), uplinks::has_link(number));
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
                // A switch without ports is always sound.
                let empty = vswitch::config::SwitchConfig::default();
                match Switch::new(empty, secret) {
                    Ok(switch) => switch,
                    Err(error) => panic!("an empty switch: {error}"),
                }
            }
        };
        Self {
            name,
            switch: Lock::new(switch),
            ports,
        }
    }

    /// Its name.
    #[expect(dead_code, reason = "the monitor will ask")]
    pub fn name(&self) -> &str {
        &self.name
    }
}

fn random() -> u64 {
    let [a, b, c, d, e, f, g, h, ..] = hw::random_seed();
    u64::from_le_bytes([a, b, c, d, e, f, g, h])
}
