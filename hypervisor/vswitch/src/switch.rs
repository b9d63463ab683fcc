//! A switch: ports, what it knows, and what it decides for a frame.
//!
//! It holds no frames and copies none. For each frame the caller shows the first bytes of it and
//! gets the [`Decision`]: the steps to take, in order, or why there are none. What depends on the
//! frame's key alone is decided once and kept in the caller's [`Cache`]; limits, meters and
//! captures are applied to each frame after that.

use alloc::collections::VecDeque;
use alloc::string::ToString;
use alloc::vec::Vec;
use core::fmt;

use arch::Nanos;

use crate::beacon::Beacons;
use crate::cache::{Cache, Hasher, Notes};
use crate::config::{ConfigError, SwitchConfig};
use crate::counters::{Counters, DropCause};
use crate::edit::{Checksum, Editor, MIN_FRAME};
use crate::flow::FlowMod;
use crate::key::FlowKey;
use crate::learn::{self, Table};
use crate::mirror::{CAPTURE, Capture, Mirror, MirrorOutput, Target};
use crate::normal::Pass;
use crate::order::{sort, sort_by};
use crate::port::{Port, PortConfig, PortKind, VlanSet};
use crate::rate::Bucket;
use crate::tables::{FlowTables, TablesError};
use crate::translate::{Emit, Normal, Step, Translation};
use crate::uplink::{Home, Teaming};
use crate::{MacAddr, PortId};

/// The longest frame: 64 KiB of IP, as segmentation offload makes them, behind two tags.
pub const MAX_FRAME: usize = 65_535 + 14 + 8;

/// What is done with a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Decision<'a> {
    /// What to do, in order.
    pub steps: &'a [Step],
    /// Why it goes nowhere; copies to mirrors may be among the steps all the same.
    pub drop: Option<DropCause>,
}

/// A request of a guest that its port's policy refuses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// There is no such port.
    #[error("port {} is not there", .0.0)]
    NoPort(PortId),
    /// The policy says no.
    #[error("the policy of port {} does not allow it", .0.0)]
    Policy(PortId),
    /// There were too many requests in the last seconds.
    #[error("port {} asks too often", .0.0)]
    TooOften(PortId),
    /// It is no station's address, or that of another port.
    #[error("{0} cannot be this port's address")]
    Address(MacAddr),
}

/// No place.
const NOWHERE: u16 = u16::MAX;

/// What decisions rest on.
#[derive(Clone, Debug)]
pub(crate) struct Core {
    /// By number.
    pub ports: Vec<Port>,
    /// Each number's place in `ports`.
    places: Vec<u16>,
    /// The configured addresses and whose they are, in order.
    addresses: Vec<(MacAddr, usize)>,
    /// The places of the uplinks, by preference.
    pub uplinks: Vec<usize>,
    /// The places of guests' ports that get unicasts which are not for them.
    pub listeners: Vec<usize>,
    pub teaming: Teaming,
    pub mirrors: Vec<Mirror>,
    pub learned: Table,
    pub announcements: VecDeque<Home>,
    pub beacons: Beacons,
}

impl Core {
    fn new(config: &SwitchConfig, hasher: Hasher) -> Self {
        let mut sorted: Vec<&PortConfig> = config.ports.iter().collect();
        sort_by(&mut sorted, |a, b| a.id < b.id);
        let mut ports: Vec<Port> = Vec::with_capacity(sorted.len());
        ports.extend(
            sorted
                .into_iter()
                .map(|port| Port::new(port.clone(), Nanos::ZERO)),
        );
        let mut places = Vec::new();
        for (place, port) in ports.iter().enumerate() {
            places.resize(usize::from(port.id().0), NOWHERE);
            places.push(u16::try_from(place).unwrap_or(NOWHERE));
        }
        let limits = ports.iter().filter_map(|port| port.config.learning);
        let uplinks = ports.iter().filter(|port| port.is(PortKind::Uplink));
        let beacons = Beacons::new(uplinks.map(Port::id), &hasher);
        let mut core = Self {
            learned: Table::new(limits.map(|learning| learning.limit).sum(), hasher),
            ports,
            places,
            addresses: Vec::new(),
            uplinks: Vec::new(),
            listeners: Vec::new(),
            teaming: config.teaming.clone(),
            mirrors: Vec::new(),
            announcements: VecDeque::new(),
            beacons,
        };
        core.index_addresses();
        core.index_listeners();
        core.order_uplinks();
        core.set_mirrors(config);
        core
    }

    fn index_addresses(&mut self) {
        self.addresses.clear();
        for (place, port) in self.ports.iter().enumerate() {
            let own = port.config.macs.iter().map(|mac| (*mac, place));
            self.addresses.extend(own);
        }
        sort(&mut self.addresses);
    }

    fn index_listeners(&mut self) {
        let listens = |(place, port): (usize, &Port)| {
            let floods = port.config.learning.is_some_and(|learning| learning.flood);
            (port.is_local() && (port.sees_all || floods)).then_some(place)
        };
        self.listeners.clear();
        self.listeners
            .extend(self.ports.iter().enumerate().filter_map(listens));
    }

    fn order_uplinks(&mut self) {
        let named: Vec<usize> = self
            .teaming
            .order
            .iter()
            .filter_map(|id| self.place(*id))
            .collect();
        let is_uplink = |(place, port): (usize, &Port)| port.is(PortKind::Uplink).then_some(place);
        let all = self.ports.iter().enumerate().filter_map(is_uplink);
        let others = all
            .filter(|place| !named.contains(place))
            .collect::<Vec<_>>();
        self.uplinks = [named, others].concat();
        for place in 0..self.ports.len() {
            let pinned = self.ports.get(place).and_then(|port| port.config.pinned);
            let pinned = pinned.and_then(|id| self.place(id));
            if let Some(port) = self.ports.get_mut(place) {
                port.pinned = pinned;
            }
        }
    }

    fn set_mirrors(&mut self, config: &SwitchConfig) {
        for (number, mirror) in config.mirrors.iter().enumerate() {
            let bit = 1u32.checked_shl(number as u32).unwrap_or(0);
            for port in &mut self.ports {
                let id = port.id();
                if mirror.select_all || mirror.select_src.contains(&id) {
                    port.mirror_src |= bit;
                }
                if mirror.select_all || mirror.select_dst.contains(&id) {
                    port.mirror_dst |= bit;
                }
            }
            let target = match mirror.output {
                MirrorOutput::Port(id) => Target::Port(self.place(id).unwrap_or(usize::MAX)),
                MirrorOutput::Vlan(vlan) => Target::Vlan(vlan.get()),
                MirrorOutput::Capture => Target::Capture,
            };
            self.mirrors.push(Mirror {
                vlans: VlanSet::named(&mirror.select_vlan),
                target,
                same: bit,
            });
        }
        let all: Vec<(Target, u32)> = self.mirrors.iter().map(|m| (m.target, m.same)).collect();
        for mirror in &mut self.mirrors {
            let same = all.iter().filter(|(target, _)| *target == mirror.target);
            mirror.same = same.fold(0, |bits, (_, bit)| bits | bit);
        }
    }

    /// Where the port of a number is.
    pub fn place(&self, id: PortId) -> Option<usize> {
        let place = self.places.get(usize::from(id.0)).copied()?;
        (place != NOWHERE).then_some(place.into())
    }

    pub fn port(&self, id: PortId) -> Option<&Port> {
        self.ports.get(self.place(id)?)
    }

    pub fn port_mut(&mut self, id: PortId) -> Option<&mut Port> {
        let place = self.place(id)?;
        self.ports.get_mut(place)
    }

    /// The place of the port that has an address, by configuration, and has not moved away.
    pub fn owner(&self, mac: MacAddr) -> Option<usize> {
        let found = self
            .addresses
            .binary_search_by_key(&mac, |(mac, _)| *mac)
            .ok()?;
        let place = self.addresses.get(found)?.1;
        (!self.ports.get(place)?.departed).then_some(place)
    }

    /// Forgets learned addresses; whether there were any.
    pub fn forget(&mut self, goes: impl Fn(&learn::Entry) -> bool) -> bool {
        let (ports, places) = (&mut self.ports, &self.places);
        let mut any = false;
        self.learned.retain(
            |entry| !goes(entry),
            |entry| {
                any = true;
                let place = places
                    .get(usize::from(entry.port.0))
                    .copied()
                    .unwrap_or(NOWHERE);
                if let Some(port) = ports.get_mut(usize::from(place)) {
                    port.learned = port.learned.saturating_sub(1);
                }
            },
        );
        any
    }

    /// Forgets a learned address.
    pub fn forget_one(&mut self, mac: MacAddr, vlan: u16) {
        let entry = self.learned.remove(mac, vlan);
        if let Some(port) = entry.and_then(|entry| self.port_mut(entry.port)) {
            port.learned = port.learned.saturating_sub(1);
        }
    }

    /// Takes over what the switch knew and counted under another configuration, where it still
    /// holds: of ports with the same number, name and kind.
    fn inherit(&mut self, older: &Self) {
        let heard = self.beacons.inherit(&older.beacons);
        for port in &mut self.ports {
            let same = older.port(port.id()).filter(|older| {
                older.config.name == port.config.name && older.config.kind == port.config.kind
            });
            if let Some(older) = same {
                port.inherit(older);
                port.lost = heard && older.lost;
            }
        }
        self.index_listeners();
        for place in 0..self.ports.len() {
            let own = self.ports.get(place).and_then(|port| port.own_address);
            let own = own.filter(|mac| self.owner(*mac).is_none());
            if let (Some(own), Some(port)) = (own, self.ports.get_mut(place)) {
                port.config.macs = alloc::vec![own];
                self.index_addresses();
            }
        }
        for entry in older.learned.entries() {
            if self.owner(entry.mac).is_some() {
                continue;
            }
            let name = older.port(entry.port).map(|port| &port.config.name);
            let Some(place) = self.place(entry.port) else {
                continue;
            };
            let Some(port) = self.ports.get_mut(place) else {
                continue;
            };
            let limit = port.config.learning.map_or(0, |learning| learning.limit);
            let valid = Some(&port.config.name) == name && port.vlan.carries(entry.vlan);
            if valid && port.learned < limit && self.learned.adopt(entry) {
                port.learned += 1;
            }
        }
    }
}

/// A meter at work.
#[derive(Clone, Debug)]
struct Meter {
    id: u32,
    frames: bool,
    bucket: Bucket,
}

/// A switch.
#[derive(Clone, Debug)]
pub struct Switch {
    config: SwitchConfig,
    core: Core,
    meters: Vec<Meter>,
    flows: FlowTables,
    capture: Option<Capture>,
    hasher: Hasher,
    /// Changes with everything that decisions rest on, and begins where no other switch does.
    generation: u64,
    translation: Translation,
    scratch: Vec<Step>,
    strays: u64,
}

impl Switch {
    /// A switch of that configuration. Its name is no other switch's. The secret is random and
    /// known to nobody: it hides where addresses are in tables.
    ///
    /// # Errors
    /// What is wrong with the configuration.
    pub fn new(config: SwitchConfig, secret: [u64; 2]) -> Result<Self, ConfigError> {
        let flows = config.check()?;
        Ok(Self::of(config, flows, secret))
    }

    /// A switch without ports, in the place of one whose configuration is refused.
    #[must_use]
    pub fn empty(secret: [u64; 2]) -> Self {
        Self::of(SwitchConfig::default(), FlowTables::normal(), secret)
    }

    fn of(config: SwitchConfig, flows: FlowTables, secret: [u64; 2]) -> Self {
        let hasher = Hasher::new(secret);
        let name = config
            .name
            .bytes()
            .fold(secret[1], |sum, byte| hasher.hash(&[sum, u64::from(byte)]));
        Self {
            core: Core::new(&config, hasher.clone()),
            meters: meters(&config),
            flows,
            capture: capture(&config),
            generation: hasher.hash(&[secret[0], name]),
            translation: Translation::default(),
            scratch: Vec::new(),
            strays: 0,
            hasher,
            config,
        }
    }

    /// Puts another configuration in its place, whole or not at all. Counters, links, what was
    /// learned and what is left in buckets stay where they still hold; guests' addresses are
    /// announced where their uplink has changed.
    ///
    /// # Errors
    /// What is wrong with the configuration; the one before stays.
    pub fn replace(&mut self, config: SwitchConfig) -> Result<(), ConfigError> {
        let mut flows = config.check()?;
        flows.inherit(&self.flows);
        let before = self.core.homes();
        let mut core = Core::new(&config, self.hasher.clone());
        core.inherit(&self.core);
        core.announcements = core::mem::take(&mut self.core.announcements);
        core.announce_moved(&before);
        let mut meters = meters(&config);
        for meter in &mut meters {
            let older = self.meters.iter().find(|older| older.id == meter.id);
            if let Some(older) = older.filter(|older| older.frames == meter.frames) {
                meter.bucket.inherit(&older.bucket);
            }
        }
        if config.capture_bytes != self.config.capture_bytes {
            self.capture = capture(&config);
        }
        (self.core, self.meters, self.flows, self.config) = (core, meters, flows, config);
        self.changed();
        Ok(())
    }

    /// The configuration that is in use.
    #[must_use]
    pub fn config(&self) -> &SwitchConfig {
        &self.config
    }

    fn changed(&mut self) {
        self.generation = self.generation.wrapping_add(1);
    }

    /// Decides what is done with a frame of `length` bytes that came in by `in_port`. `header` is
    /// its beginning: all of it, or enough for its headers (128 bytes).
    pub fn decide<'a>(
        &'a mut self,
        cache: &'a mut Cache,
        in_port: PortId,
        header: &[u8],
        length: usize,
        now: Nanos,
    ) -> Decision<'a> {
        let length = length.max(header.len());
        let Some(entry) = self.core.place(in_port) else {
            self.strays += 1;
            return Decision::dropped(DropCause::NoPort);
        };
        let Some(port) = self.core.ports.get_mut(entry) else {
            return Decision::dropped(DropCause::NoPort);
        };
        port.counters.rx_frames += 1;
        port.counters.rx_bytes += length as u64;
        if length > MAX_FRAME {
            return port.dropped(DropCause::Long);
        }
        if let Some(limiter) = &mut port.ingress
            && !limiter.pass(length, now)
        {
            return port.dropped(DropCause::IngressRate);
        }
        let mut key = FlowKey::default();
        if key.read(header, length, in_port).is_err() {
            return port.dropped(DropCause::Short);
        }
        let (steps, hits, notes) = match cache.look_up(&key, self.generation) {
            Ok(place) => cache.get(place).unwrap_or_default(),
            Err(hash) => {
                self.core.hear(in_port, &key, header, now);
                let (notes, lasting) = self.translate(entry, &key, now, None);
                let Translation { steps, hits, .. } = &self.translation;
                if lasting {
                    cache.insert(hash, &key, self.generation, (steps, hits), notes);
                }
                (steps.as_slice(), hits.as_slice(), notes)
            }
        };
        if let Some(place) = notes.learned {
            self.core.learned.touch(place, now);
        }
        self.flows.count(hits, length);
        let mut finish = Finish {
            core: &mut self.core,
            meters: &mut self.meters,
            capture: self.capture.as_mut(),
            drop: notes.drop,
            header,
            original: length,
            length,
            now,
        };
        finish.run(entry, steps, notes, &mut self.scratch)
    }

    /// Its flows, with what they counted.
    #[must_use]
    pub fn flows(&self) -> &FlowTables {
        &self.flows
    }

    /// Makes all of those changes to the flows or none; how many flows were added, changed or
    /// removed. The configuration in use has them from then on.
    ///
    /// # Errors
    /// The flows there would be cannot be had.
    pub fn change_flows(&mut self, changes: &[FlowMod]) -> Result<usize, TablesError> {
        let count = self.flows.apply(changes)?;
        let lines = self.flows.flows().iter();
        self.config.flows = lines.map(|counted| counted.flow.to_string()).collect();
        if self.config.flows.is_empty() {
            // No line would stand for NORMAL.
            self.config.flows.push("priority=0,actions=drop".into());
        }
        self.changed();
        Ok(count)
    }

    /// Says what would be done with a frame of `key`, and why, stage by stage; nothing is learned
    /// or counted.
    pub fn explain(
        &mut self,
        key: &FlowKey,
        now: Nanos,
        trace: &mut dyn fmt::Write,
    ) -> Decision<'_> {
        let Some(entry) = self.core.place(key.in_port) else {
            return Decision::dropped(DropCause::NoPort);
        };
        let (notes, _) = self.translate(entry, key, now, Some(trace));
        Decision {
            steps: &self.translation.steps,
            drop: notes.drop,
        }
    }

    /// Runs a key through the switch. What is to be kept with the steps, and whether it may be.
    fn translate(
        &mut self,
        entry: usize,
        key: &FlowKey,
        now: Nanos,
        trace: Option<&mut dyn fmt::Write>,
    ) -> (Notes, bool) {
        let mut pass = Pass::new(&mut self.core, entry, key, trace.is_some());
        let trace = trace.map(|trace| trace as &mut dyn fmt::Write);
        let mut out = Emit::new(*key, &mut self.translation, trace);
        match pass.admit(key, now, &mut out) {
            Ok(()) => {
                pass.begin(key, now, &mut out);
                self.flows.run(&mut pass, key, now, &mut out);
            }
            Err(cause) => {
                out.say(format_args!("not admitted: {}", cause.word()));
                out.drop(cause);
            }
        }
        let (storm, learned) = (pass.storm, pass.learned);
        let (lasting, changed) = (pass.lasting, pass.changed);
        if changed {
            self.changed();
        }
        let careful = |step: &Step| match step {
            Step::Meter(_) | Step::Output(CAPTURE) => true,
            Step::Output(id) => self
                .core
                .port(*id)
                .is_some_and(|port| port.egress.is_some()),
            _ => false,
        };
        let notes = Notes {
            hits: 0,
            drop: self.translation.drop,
            storm,
            careful: self.translation.steps.iter().any(careful),
            learned,
        };
        (notes, lasting)
    }

    /// The link of a port came or went. Where that gives guests another uplink, announcements are
    /// ready after (R8). A guest's port has a link while its VM is there; whether the guest's driver
    /// is ready is for its card to see: decisions that are kept are void after this.
    ///
    /// # Errors
    /// There is no such port.
    pub fn set_link(&mut self, id: PortId, up: bool) -> Result<(), Refused> {
        let port = self.core.port_mut(id).ok_or(Refused::NoPort(id))?;
        if port.up == up {
            return Ok(());
        }
        if port.is(PortKind::Uplink) {
            let before = self.core.homes();
            if let Some(port) = self.core.port_mut(id) {
                port.up = up;
            }
            self.core.forget_beacons(id, up);
            self.core.announce_moved(&before);
        } else {
            port.up = up;
        }
        self.changed();
        Ok(())
    }

    /// Forgets learned addresses that have been silent for too long, and judges by beacons (R8).
    /// Call it about once a second, or more often; announcements may be ready after.
    pub fn tick(&mut self, now: Nanos) {
        if self.core.beat(now) {
            self.changed();
        }
        let ageing = self.core.ports.iter().map(|port| {
            let seconds = port.config.learning.map_or(0, |learning| learning.ageing);
            (port.id(), u64::from(seconds) * 1_000_000_000)
        });
        let ageing: Vec<(PortId, u64)> = ageing.collect();
        let old = |entry: &learn::Entry| {
            let found = ageing.binary_search_by_key(&entry.port, |(id, _)| *id);
            let time = found.ok().and_then(|at| ageing.get(at));
            now.since(entry.seen) >= time.map_or(0, |(_, time)| *time)
        };
        if self.core.forget(old) {
            self.changed();
        }
    }

    /// Hears a request of a guest that changes something, unless there were too many.
    fn request(
        &mut self,
        id: PortId,
        allowed: fn(&PortConfig) -> bool,
        now: Nanos,
    ) -> Result<&mut Port, Refused> {
        let port = self.core.port_mut(id).ok_or(Refused::NoPort(id))?;
        let problem = match (allowed(&port.config), port.requests.take(1, now)) {
            (true, true) => return Ok(port),
            (false, _) => Refused::Policy(id),
            (true, false) => Refused::TooOften(id),
        };
        port.counters.refused += 1;
        Err(problem)
    }

    /// The guest gives itself another address.
    ///
    /// # Errors
    /// It may not (R7), or not this one, or asks too often.
    pub fn change_address(&mut self, id: PortId, mac: MacAddr, now: Nanos) -> Result<(), Refused> {
        let owner = self.core.owner(mac);
        if owner.is_some() && owner == self.core.place(id) {
            return Ok(());
        }
        let port = self.request(id, |config| config.mac_change, now)?;
        if owner.is_some() || !mac.is_station() || !port.is_local() {
            port.counters.refused += 1;
            return Err(Refused::Address(mac));
        }
        port.config.macs = alloc::vec![mac];
        port.own_address = Some(mac);
        self.core.index_addresses();
        self.core.forget(|entry| entry.mac == mac);
        self.changed();
        Ok(())
    }

    /// The guest wants to see what is not for it, or no more.
    ///
    /// # Errors
    /// It may not (R7), or asks too often.
    pub fn set_promiscuous(&mut self, id: PortId, on: bool, now: Nanos) -> Result<(), Refused> {
        let port = self.core.port_mut(id).ok_or(Refused::NoPort(id))?;
        if port.sees_all != on {
            self.request(id, |config| config.promiscuous, now)?.sees_all = on;
            self.core.index_listeners();
            self.changed();
        }
        Ok(())
    }

    /// A VM came from another machine, or stays after all: its addresses are announced, and for
    /// [`ARRIVAL_LOCK`](crate::normal::ARRIVAL_LOCK) echoes of that do not take them away.
    ///
    /// # Errors
    /// There is no such port.
    pub fn arrived(&mut self, id: PortId, now: Nanos) -> Result<(), Refused> {
        let place = self.core.place(id).ok_or(Refused::NoPort(id))?;
        if let Some(port) = self.core.ports.get_mut(place) {
            (port.leaving, port.departed) = (false, false);
            port.arrived = Some(now);
        }
        let mut homes = Vec::new();
        self.core.homes_of(place, &mut homes);
        self.core.announce(&homes);
        self.changed();
        Ok(())
    }

    /// A VM is about to go to another machine: the first announcement of an address of it from
    /// outside takes them there (R5).
    ///
    /// # Errors
    /// There is no such port.
    pub fn leaving(&mut self, id: PortId) -> Result<(), Refused> {
        self.core.port_mut(id).ok_or(Refused::NoPort(id))?.leaving = true;
        self.changed();
        Ok(())
    }

    /// Whether beacons say that an uplink leads nowhere, though it has a link (R8).
    #[must_use]
    pub fn is_lost(&self, id: PortId) -> bool {
        self.core.port(id).is_some_and(|port| port.up && port.lost)
    }

    /// The next announcement or beacon that is to be sent out of an uplink, as it is: the port, and how much
    /// of `frame` it takes.
    pub fn announcement(&mut self, frame: &mut [u8; 64]) -> Option<(PortId, usize)> {
        self.core.announcement(frame)
    }

    /// Each port: its configuration, as far as guests have not changed it, whether it has a link,
    /// and what it counted.
    pub fn ports(&self) -> impl Iterator<Item = (&PortConfig, bool, &Counters)> {
        self.core
            .ports
            .iter()
            .map(|port| (&port.config, port.up, &port.counters))
    }

    /// What a port counted.
    #[must_use]
    pub fn counters(&self, id: PortId) -> Option<&Counters> {
        self.core.port(id).map(|port| &port.counters)
    }

    /// Frames said to come from ports that are not there.
    #[must_use]
    pub fn strays(&self) -> u64 {
        self.strays
    }

    /// The configured addresses and where they are, but for those that moved away.
    pub fn addresses(&self) -> impl Iterator<Item = (MacAddr, PortId)> {
        let here = |(mac, place): &(MacAddr, usize)| {
            let port = self.core.ports.get(*place)?;
            (!port.departed).then_some((*mac, port.id()))
        };
        self.core.addresses.iter().filter_map(here)
    }

    /// The learned addresses.
    pub fn learned(&self) -> impl Iterator<Item = &learn::Entry> {
        self.core.learned.entries()
    }

    /// The active uplink of a VLAN.
    #[must_use]
    pub fn active_uplink(&self, vlan: u16) -> Option<PortId> {
        let port = self.core.ports.get(self.core.active(vlan)?);
        port.map(Port::id)
    }

    /// What was captured.
    pub fn capture(&mut self) -> Option<&mut Capture> {
        self.capture.as_mut()
    }
}

fn meters(config: &SwitchConfig) -> Vec<Meter> {
    let meters = config.meters.iter().map(|meter| Meter {
        id: meter.id,
        frames: meter.frames,
        bucket: Bucket::new(meter.rate, meter.burst, Nanos::ZERO),
    });
    meters.collect()
}

fn capture(config: &SwitchConfig) -> Option<Capture> {
    (config.capture_bytes != 0).then(|| Capture::new(config.capture_bytes))
}

impl Decision<'_> {
    const fn dropped(cause: DropCause) -> Self {
        Self {
            steps: &[],
            drop: Some(cause),
        }
    }
}

impl Port {
    fn dropped(&mut self, cause: DropCause) -> Decision<'static> {
        self.counters.drop(cause);
        Decision::dropped(cause)
    }
}

/// What is done for each frame, however it was decided.
struct Finish<'a> {
    core: &'a mut Core,
    meters: &'a mut [Meter],
    capture: Option<&'a mut Capture>,
    drop: Option<DropCause>,
    header: &'a [u8],
    /// The length with which it came.
    original: usize,
    /// The length after the steps so far.
    length: usize,
    now: Nanos,
}

impl Finish<'_> {
    fn run<'s>(
        &mut self,
        entry: usize,
        steps: &'s [Step],
        notes: Notes,
        scratch: &'s mut Vec<Step>,
    ) -> Decision<'s> {
        if notes.storm
            && let Some(port) = self.core.ports.get_mut(entry)
            && let Some(bucket) = &mut port.storm
            && !bucket.take(1, self.now)
        {
            return port.dropped(DropCause::Storm);
        }
        let mut delivered = false;
        let steps = if notes.careful {
            scratch.clear();
            for (done, step) in steps.iter().enumerate() {
                match step {
                    Step::Meter(id) if !self.meter(*id) => {
                        self.drop.get_or_insert(DropCause::Meter);
                        break;
                    }
                    Step::Meter(_) => {}
                    Step::Output(CAPTURE) => self.keep(steps.get(..done).unwrap_or_default()),
                    Step::Output(id) if !self.may_receive(*id) => {
                        self.drop.get_or_insert(DropCause::EgressRate);
                    }
                    step => {
                        delivered |= self.count(step);
                        scratch.push(*step);
                    }
                }
            }
            scratch.as_slice()
        } else {
            steps.iter().for_each(|step| delivered |= self.count(step));
            steps
        };
        let cause = self.drop.unwrap_or(DropCause::Flow);
        if let Some(port) = self.core.ports.get_mut(entry) {
            if delivered {
                port.counters.forwarded += 1;
            } else {
                port.counters.drop(cause);
            }
        }
        Decision {
            steps,
            drop: (!delivered).then_some(cause),
        }
    }

    /// How long the frame is where it leaves.
    fn length(&self) -> usize {
        if self.length < self.original {
            self.length.max(MIN_FRAME)
        } else {
            self.length
        }
    }

    /// Counts a step; whether it delivers the frame.
    fn count(&mut self, step: &Step) -> bool {
        match step {
            Step::PushVlan(_) => self.length += 4,
            Step::PopVlan => self.length = self.length.saturating_sub(4),
            Step::Output(id) => {
                let length = self.length();
                let Some(port) = self.core.port_mut(*id) else {
                    return false;
                };
                port.counters.tx_frames += 1;
                port.counters.tx_bytes += length as u64;
                return !port.is(PortKind::Mirror);
            }
            Step::Set(_) | Step::Meter(_) => {}
        }
        false
    }

    fn may_receive(&mut self, id: PortId) -> bool {
        let (length, now) = (self.length(), self.now);
        let Some(port) = self.core.port_mut(id) else {
            return false;
        };
        let limiter = port.egress.as_mut();
        let may = limiter.is_none_or(|limiter| limiter.pass(length, now));
        port.counters.tx_limited += u64::from(!may);
        may
    }

    fn meter(&mut self, id: u32) -> bool {
        let units = |frames| if frames { 1 } else { self.length as u64 * 8 };
        let meter = self.meters.iter_mut().find(|meter| meter.id == id);
        meter.is_some_and(|meter| meter.bucket.take(units(meter.frames), self.now))
    }

    /// Captures the frame, as the steps have left it.
    fn keep(&mut self, done: &[Step]) {
        let Some(capture) = &mut self.capture else {
            return;
        };
        let mut editor = Editor::new(self.header, self.original, Checksum::Partial);
        done.iter().for_each(|step| editor.apply(step));
        let rest = self.header.get(editor.taken()..).unwrap_or_default();
        capture.push(self.now, [editor.header(), rest], self.length);
    }
}
