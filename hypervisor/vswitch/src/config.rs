//! A switch as it is configured, and what is checked before any of it is used.

use alloc::string::{String, ToString};
use alloc::vec::Vec;

use crate::flow::{Command, FlowMod};
use crate::key::ether;
use crate::learn::MAX_LEARNED;
use crate::mirror::{MAX_MIRRORS, MirrorConfig, MirrorOutput};
use crate::order::sort;
use crate::port::{PortConfig, PortKind};
use crate::rate::Rate;
use crate::tables::FlowTables;
use crate::uplink::Teaming;
use crate::{MacAddr, PortId};

/// Ports of a switch, at most.
pub const MAX_PORTS: usize = 4096;

/// Bytes that a switch may set aside for captured frames.
pub const MAX_CAPTURE: usize = 64 << 20;

/// A meter that flows send frames through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MeterConfig {
    /// Its number in flows.
    pub id: u32,
    /// Whether it counts frames; else it counts bits.
    pub frames: bool,
    /// How many a second, 1 to [`Rate::MAX`].
    pub rate: u64,
    /// How many at once after a silence, 1 to eight times [`Rate::MAX_BURST`].
    pub burst: u64,
}

/// A switch, as it is configured.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SwitchConfig {
    /// Its name.
    pub name: String,
    /// Its ports.
    pub ports: Vec<PortConfig>,
    /// How several uplinks are used.
    pub teaming: Teaming,
    /// Its mirrors.
    pub mirrors: Vec<MirrorConfig>,
    /// The size of the ring for captured frames.
    pub capture_bytes: usize,
    /// Its meters.
    pub meters: Vec<MeterConfig>,
    /// Its flows, each a line as for `ovs-ofctl add-flow`; none is `priority=0,actions=NORMAL`.
    pub flows: Vec<String>,
}

/// Which part of a configuration is wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// The switch itself.
    Switch,
    /// A port, by its name.
    Port(String),
    /// A mirror, by its name.
    Mirror(String),
    /// A meter, by its number.
    Meter(u32),
    /// A flow, counted from 1.
    Flow(usize),
}

impl core::fmt::Display for Place {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self {
            Self::Switch => f.write_str("switch"),
            Self::Port(name) => write!(f, "port {name}"),
            Self::Mirror(name) => write!(f, "mirror {name}"),
            Self::Meter(id) => write!(f, "meter {id}"),
            Self::Flow(number) => write!(f, "flow {number}"),
        }
    }
}

/// What is wrong with it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Problem {
    /// A number beyond its range.
    #[error("{found} is not in {least} to {most}")]
    Range {
        /// What it says.
        found: u64,
        /// What it may be.
        least: u64,
        /// What it may be.
        most: u64,
    },
    /// Two have the same.
    #[error("{0} is there twice")]
    Twice(String),
    /// An address no station can have.
    #[error("{0} is no station's address")]
    NoStation(MacAddr),
    /// A port that is not there, or not of the kind needed.
    #[error("{} is no {} of this switch", .0.0, .1)]
    NoSuchPort(PortId, &'static str),
    /// Nothing where something is needed.
    #[error("needed: {0}")]
    Needed(&'static str),
    /// Something where it has no sense.
    #[error("only for {0}")]
    OnlyFor(&'static str),
    /// The text of a flow, or flows that do not go together.
    #[error("{0}")]
    Flow(String),
}

/// A configuration that is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{place}: {field}: {problem}")]
pub struct ConfigError {
    /// Where.
    pub place: Place,
    /// The field, by its name in the configuration.
    pub field: &'static str,
    /// What is wrong.
    pub problem: Problem,
}

type Checked = Result<(), (&'static str, Problem)>;

fn range(field: &'static str, found: u64, least: u64, most: u64) -> Checked {
    if (least..=most).contains(&found) {
        return Ok(());
    }
    let problem = Problem::Range { found, least, most };
    Err((field, problem))
}

fn vlans(field: &'static str, ids: &[u16]) -> Checked {
    ids.iter()
        .try_for_each(|id| range(field, (*id).into(), 0, 4094))
}

fn rate(field: &'static str, rate: Option<Rate>) -> Checked {
    let Some(rate) = rate else { return Ok(()) };
    range(field, rate.average, 1, Rate::MAX)?;
    if rate.peak != 0 {
        range(field, rate.peak, rate.average, Rate::MAX)?;
    }
    range(field, rate.burst, 1, Rate::MAX_BURST)
}

/// The first that is there twice.
fn twice<T: Ord + Clone>(mut all: Vec<T>) -> Option<T> {
    sort(&mut all);
    let pair = all.windows(2).find(|pair| pair.first() == pair.last())?;
    pair.first().cloned()
}

fn once<T: Ord + Clone + core::fmt::Display>(field: &'static str, all: Vec<T>) -> Checked {
    match twice(all) {
        Some(it) => Err((field, Problem::Twice(alloc::format!("{it}")))),
        None => Ok(()),
    }
}

impl SwitchConfig {
    /// Checks all of it; the flows.
    ///
    /// # Errors
    /// The first thing that is wrong, and where.
    pub fn check(&self) -> Result<FlowTables, ConfigError> {
        let at = |place: Place| {
            move |(field, problem)| ConfigError {
                place,
                field,
                problem,
            }
        };
        self.check_switch().map_err(at(Place::Switch))?;
        for port in &self.ports {
            let place = Place::Port(port.name.clone());
            self.check_port(port).map_err(at(place))?;
        }
        for mirror in &self.mirrors {
            let place = Place::Mirror(mirror.name.clone());
            self.check_mirror(mirror).map_err(at(place))?;
        }
        for meter in &self.meters {
            check_meter(meter).map_err(at(Place::Meter(meter.id)))?;
        }
        self.tables()
    }

    /// The number of the port of that name.
    #[must_use]
    pub fn port_named(&self, name: &str) -> Option<PortId> {
        let port = self.ports.iter().find(|port| port.name == name);
        port.map(|port| port.id)
    }

    /// The flows.
    ///
    /// # Errors
    /// One that is not understood or cannot be had.
    pub fn tables(&self) -> Result<FlowTables, ConfigError> {
        let wrong = |place: Place, problem: Problem| ConfigError {
            place,
            field: "flows",
            problem,
        };
        let mut mods = Vec::with_capacity(self.flows.len());
        for (number, line) in self.flows.iter().enumerate() {
            let place = || Place::Flow(number + 1);
            let parsed = FlowMod::parse(line, &|name| self.port_named(name));
            let parsed =
                parsed.map_err(|error| wrong(place(), Problem::Flow(error.to_string())))?;
            if parsed.command != Command::Add {
                return Err(wrong(place(), Problem::OnlyFor("flows that are added")));
            }
            mods.push(parsed);
        }
        let mut tables = match mods.is_empty() {
            true => FlowTables::normal(),
            false => FlowTables::new(),
        };
        let meters = self.meters.iter().map(|meter| meter.id).collect();
        let made = tables.set_meters(meters).and_then(|()| tables.apply(&mods));
        made.map_err(|error| wrong(Place::Switch, Problem::Flow(error.to_string())))?;
        Ok(tables)
    }

    fn port(&self, field: &'static str, id: PortId, kind: Option<PortKind>) -> Checked {
        let word = match kind {
            None => "port",
            Some(PortKind::Vnic) => "vnic",
            Some(PortKind::Uplink) => "uplink",
            Some(PortKind::Management) => "management port",
            Some(PortKind::Mirror) => "mirror port",
        };
        let fits = |port: &&PortConfig| port.id == id && kind.is_none_or(|kind| kind == port.kind);
        match self.ports.iter().find(fits) {
            Some(_) => Ok(()),
            None => Err((field, Problem::NoSuchPort(id, word))),
        }
    }

    fn check_switch(&self) -> Checked {
        range("ports", self.ports.len() as u64, 0, MAX_PORTS as u64)?;
        once("id", self.ports.iter().map(|port| port.id.0).collect())?;
        once("name", self.ports.iter().map(|port| &port.name).collect())?;
        let macs = self.ports.iter().flat_map(|port| port.macs.iter().copied());
        once("macs", macs.collect())?;
        once(
            "mirrors",
            self.mirrors.iter().map(|mirror| &mirror.name).collect(),
        )?;
        range("mirrors", self.mirrors.len() as u64, 0, MAX_MIRRORS as u64)?;
        once("meters", self.meters.iter().map(|meter| meter.id).collect())?;
        range(
            "capture_bytes",
            self.capture_bytes as u64,
            0,
            MAX_CAPTURE as u64,
        )?;
        let order = &self.teaming.order;
        once("order", order.iter().map(|id| id.0).collect())?;
        for id in order {
            self.port("order", *id, Some(PortKind::Uplink))?;
        }
        let learning = self.ports.iter().filter_map(|port| port.learning);
        let learned = learning.map(|learning| u64::from(learning.limit)).sum();
        range("learning", learned, 0, MAX_LEARNED.into())
    }

    fn check_port(&self, port: &PortConfig) -> Checked {
        range("id", port.id.0.into(), 1, PortId::MAX.0.into())?;
        if port.name.is_empty() {
            return Err(("name", Problem::Needed("a name")));
        }
        vlans("tag", port.tag.as_slice())?;
        vlans("trunks", &port.trunks)?;
        vlans("cvlans", &port.cvlans)?;
        if port.qinq_ethtype != ether::VLAN {
            let (found, tag) = (port.qinq_ethtype.into(), ether::SERVICE_VLAN.into());
            range("qinq_ethtype", found, tag, tag)?;
        }
        rate("ingress", port.ingress)?;
        rate("egress", port.egress)?;
        if let Some(limit) = port.storm_limit {
            range("storm_limit", limit.into(), 1, u32::MAX.into())?;
        }
        for mac in &port.macs {
            if !mac.is_station() {
                return Err(("macs", Problem::NoStation(*mac)));
            }
        }
        let guest = matches!(port.kind, PortKind::Vnic | PortKind::Management);
        if guest && port.macs.is_empty() && !port.forged_source {
            let needed = "an address, or forged_source, or it can send nothing";
            return Err(("macs", Problem::Needed(needed)));
        }
        if !guest && !port.macs.is_empty() {
            return Err(("macs", Problem::OnlyFor("guests' ports")));
        }
        if port.lldp && port.kind != PortKind::Management {
            return Err(("lldp", Problem::OnlyFor("management ports")));
        }
        if let Some(uplink) = port.pinned {
            if !guest {
                return Err(("pinned", Problem::OnlyFor("guests' ports")));
            }
            self.port("pinned", uplink, Some(PortKind::Uplink))?;
        }
        if let Some(learning) = port.learning {
            range(
                "learning.limit",
                learning.limit.into(),
                1,
                MAX_LEARNED.into(),
            )?;
            range("learning.ageing", learning.ageing.into(), 1, 1_000_000)?;
            if port.kind == PortKind::Mirror {
                return Err(("learning", Problem::OnlyFor("ports that send")));
            }
            if guest && !port.forged_source {
                let needed = "forged_source, or there is nothing to learn";
                return Err(("learning", Problem::Needed(needed)));
            }
        }
        Ok(())
    }

    fn check_mirror(&self, mirror: &MirrorConfig) -> Checked {
        for (field, ids) in [
            ("select_src_port", &mirror.select_src),
            ("select_dst_port", &mirror.select_dst),
        ] {
            ids.iter().try_for_each(|id| self.port(field, *id, None))?;
        }
        vlans("select_vlan", &mirror.select_vlan)?;
        match mirror.output {
            MirrorOutput::Port(id) => self.port("output_port", id, Some(PortKind::Mirror)),
            MirrorOutput::Vlan(_) => Ok(()),
            MirrorOutput::Capture if self.capture_bytes == 0 => {
                Err(("capture", Problem::Needed("capture_bytes")))
            }
            MirrorOutput::Capture => Ok(()),
        }
    }
}

fn check_meter(meter: &MeterConfig) -> Checked {
    range("rate", meter.rate, 1, Rate::MAX)?;
    range("burst", meter.burst, 1, Rate::MAX_BURST * 8)
}
