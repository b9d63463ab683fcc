//! `[[switch]]` and `[[vm.nic]]`: which switches there are, which cards of the machine and of the
//! VMs are plugged into them, and by what rules.
//!
//! Ports get their OpenFlow numbers here: a switch's uplinks from 1 on in the order of the text,
//! then the cards of the VMs in theirs. Names lead to numbers once all of the text is read, so a
//! mirror may name a card that stands further down.

use alloc::{borrow::ToOwned, format, string::String, vec::Vec};
use core::ops::RangeInclusive;

use vswitch::config::{MeterConfig, Place, SwitchConfig};
use vswitch::mirror::{MirrorConfig, MirrorOutput};
use vswitch::port::{Learning, PortConfig, PortKind, PriorityTags, VlanMode};
use vswitch::rate::Rate;
use vswitch::uplink::{Spread, Teaming};
use vswitch::{MacAddr, VlanId};

use super::document::{Data, Node};
use super::{Checked, ConfigError, NAME_RULE, Position, SIZES, Section, Value};

/// Most switches in a configuration.
pub const MAX_SWITCHES: usize = 8;
/// Most uplinks of a switch.
pub const MAX_UPLINKS: usize = 8;
/// Most cards of a VM.
pub const MAX_NICS: usize = 8;
/// Most pairs of queues of a card.
pub const MAX_QUEUES: u32 = 8;
/// What a card may say of the longest packet, in bytes.
pub const MTU: RangeInclusive<u32> = 68..=9000;
/// Most flows of a switch that come with the configuration.
const MAX_FLOWS: usize = 4096;
/// How much of what a switch's mirrors capture is kept, in bytes.
const CAPTURE: RangeInclusive<u64> = 4096..=16 << 20;
const DEFAULT_CAPTURE: u64 = 64 << 10;

const SWITCH_KEYS: &[&str] = &[
    "name",
    "uplink",
    "mirror",
    "meter",
    "flows",
    "capture",
    "order",
    "spread",
    "reverse_path",
];
const METER_KEYS: &[&str] = &["id", "packets", "rate", "burst"];
const UPLINK_KEYS: &[&str] = &[
    "name",
    "nic",
    "tag",
    "trunks",
    "vlan_mode",
    "cvlans",
    "priority_tags",
    "storm_limit",
    "ingress",
    "egress",
    "learning",
];
const NIC_KEYS: &[&str] = &[
    "name",
    "switch",
    "kind",
    "mac",
    "queues",
    "mtu",
    "uplink",
    "tag",
    "trunks",
    "vlan_mode",
    "cvlans",
    "priority_tags",
    "protected",
    "forged_source",
    "mac_change",
    "promiscuous",
    "bpdu",
    "dhcp_guard",
    "ra_guard",
    "storm_limit",
    "ingress",
    "egress",
    "learning",
];
const MIRROR_KEYS: &[&str] = &[
    "name",
    "select_all",
    "select_src_port",
    "select_dst_port",
    "select_vlan",
    "output_port",
    "output_vlan",
    "capture",
];
const RATE_KEYS: &[&str] = &["average", "peak", "burst"];
const LEARNING_KEYS: &[&str] = &["limit", "ageing", "flood"];

const RATES: &[(&str, u64)] = &[
    ("bit", 1),
    ("kbit", 1_000),
    ("Mbit", 1_000_000),
    ("Gbit", 1_000_000_000),
];

/// A switch with what is plugged in on the machine's side.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Switch {
    /// Its name, unique in the file.
    pub name: String,
    /// The machine's cards, in the order of their port numbers.
    pub uplinks: Vec<Uplink>,
    /// Bytes of captured frames that are kept.
    pub capture: u64,
    mirrors: Vec<Mirror>,
    meters: Vec<MeterConfig>,
    /// Its flows as text, which the switch itself reads.
    pub flows: Vec<Named>,
    order: Vec<Named>,
    spread: Spread,
    reverse_path: bool,
    /// Where it stands.
    pub position: Position,
}

/// A card of the machine as a port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Uplink {
    /// Which card.
    pub nic: NicChoice,
    /// The port.
    pub port: PortConfig,
    /// Where it stands.
    pub position: Position,
}

/// How a card of the machine is chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NicChoice {
    /// The first that no other uplink names, in the order of PCI addresses.
    First,
    /// By its PCI address: bus, device, function.
    Address(u8, u8, u8),
    /// By its station address.
    Mac(MacAddr),
}

impl core::fmt::Display for NicChoice {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self {
            Self::First => f.write_str("first"),
            Self::Address(bus, device, function) => write!(f, "{bus:02x}:{device:02x}.{function}"),
            Self::Mac(mac) => write!(f, "{mac}"),
        }
    }
}

/// A mirror whose ports are still names.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Mirror {
    config: MirrorConfig,
    sources: Vec<Named>,
    destinations: Vec<Named>,
    output: Option<Named>,
    position: Position,
}

/// A text, such as the name of a port, and where it stands.
pub type Named = (String, Position);

/// A virtual network card.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Nic {
    /// The number of its switch, in the order of the file.
    pub switch: usize,
    /// Its station address.
    pub mac: MacAddr,
    /// Pairs of queues, 1 to [`MAX_QUEUES`].
    pub queues: u16,
    /// The longest packet in bytes, if the guest is told.
    pub mtu: Option<u16>,
    /// The port.
    pub port: PortConfig,
    /// Where it stands.
    pub position: Position,
}

impl Switch {
    /// What the switch is made from: its uplinks, and the cards of those VMs that are sound.
    ///
    /// # Errors
    /// A name that leads to no port, or what [`SwitchConfig::check`] finds.
    pub fn assemble<'a>(
        &self,
        number: usize,
        file: &str,
        nics: impl Iterator<Item = &'a Nic>,
    ) -> Result<SwitchConfig, ConfigError> {
        let mut ports: Vec<PortConfig> = Vec::new();
        let mut places = Vec::new();
        for uplink in &self.uplinks {
            ports.push(uplink.port.clone());
            places.push(uplink.position);
        }
        for nic in nics.filter(|nic| nic.switch == number) {
            ports.push(nic.port.clone());
            places.push(nic.position);
        }
        let error = |position, problem| ConfigError {
            file: file.into(),
            position,
            vm: None,
            problem: super::Problem::Network(problem),
        };
        let find = |(name, position): &Named| {
            let port = ports.iter().find(|port| port.name == *name);
            port.map(|port| port.id).ok_or_else(|| {
                let names: Vec<&str> = ports.iter().map(|port| port.name.as_str()).collect();
                let names = names.join(", ");
                error(
                    *position,
                    format!(
                        "switch `{}` has no port `{name}`; it has {names}",
                        self.name
                    ),
                )
            })
        };
        let all = |names: &[Named]| names.iter().map(find).collect::<Result<Vec<_>, _>>();
        let mut mirrors = Vec::new();
        for mirror in &self.mirrors {
            let mut config = mirror.config.clone();
            config.select_src = all(&mirror.sources)?;
            config.select_dst = all(&mirror.destinations)?;
            if let Some(port) = &mirror.output {
                config.output = MirrorOutput::Port(find(port)?);
            }
            mirrors.push(config);
        }
        let order = all(&self.order)?;
        let config = SwitchConfig {
            name: self.name.clone(),
            teaming: Teaming {
                order,
                spread: self.spread,
                reverse_path: self.reverse_path,
            },
            mirrors,
            capture_bytes: usize::try_from(self.capture).unwrap_or(0),
            meters: self.meters.clone(),
            flows: self.flows.iter().map(|(flow, _)| flow.clone()).collect(),
            ports,
        };
        config.check().map_err(|wrong| {
            let position = match &wrong.place {
                Place::Port(name) => {
                    let at = config.ports.iter().position(|port| port.name == *name);
                    at.and_then(|at| places.get(at).copied())
                }
                Place::Mirror(name) => {
                    let mut mirrors = self.mirrors.iter();
                    let at = mirrors.find(|mirror| mirror.config.name == *name);
                    at.map(|mirror| mirror.position)
                }
                Place::Flow(number) => {
                    let at = number.checked_sub(1);
                    let flow = at.and_then(|at| self.flows.get(at));
                    flow.map(|(_, position)| *position)
                }
                Place::Switch | Place::Meter(_) => None,
            };
            error(
                position.unwrap_or(self.position),
                format!("switch `{}`: {wrong}", self.name),
            )
        })?;
        Ok(config)
    }
}

/// The list of tables under a key that is written `[[…]]`.
fn tables<'a>(section: &Section<'a>, key: &'static str, most: usize) -> Checked<Vec<Value<'a>>> {
    let Some(value) = section.get(key) else {
        return Ok(Vec::new());
    };
    match &value.value.data {
        Data::Array(list) | Data::Tables(list) if list.len() <= most => {
            Ok(list.iter().map(|node| value.entry(node)).collect())
        }
        _ => Err(value.wrong(&format!("written [[…{key}]], at most {most} times"))),
    }
}

fn table<'a>(
    value: &Value<'a>,
    name: &'static str,
    valid: &'static [&'static str],
) -> Checked<Section<'a>> {
    match &value.value.data {
        Data::Table(table) => Section::check(value.source, table, value.value.at, name, valid),
        _ => Err(value.wrong(&format!("a section {name}"))),
    }
}

/// All switches of the file. Their mistakes are the file's: a VM cannot be kept apart by half a
/// switch.
pub(super) fn switches(top: &Section<'_>) -> Checked<Vec<Switch>> {
    let mut found: Vec<Switch> = Vec::new();
    for value in tables(top, "switch", MAX_SWITCHES)? {
        let section = table(&value, "[[switch]]", SWITCH_KEYS)?;
        let name = section.need("name", NAME_RULE)?;
        let text = name.vm_name()?;
        if found.iter().any(|other| other.name == text) {
            return Err(name.wrong("a name that no other switch has"));
        }
        found.push(switch(&section, text, value.position())?);
    }
    Ok(found)
}

fn switch(section: &Section<'_>, name: &str, position: Position) -> Checked<Switch> {
    let mut uplinks: Vec<Uplink> = Vec::new();
    for (id, value) in (1..).zip(tables(section, "uplink", MAX_UPLINKS)?) {
        let uplink = table(&value, "[[switch.uplink]]", UPLINK_KEYS)?;
        let default = format!("uplink{}", id - 1);
        let name = uplink.get("name").map(|name| name.vm_name());
        let name = name.transpose()?.unwrap_or(&default);
        let mut port = PortConfig::new(id, name, PortKind::Uplink);
        shape(&uplink, &mut port)?;
        // R1: uplinks never talk to each other, whatever else they are.
        port.protected = true;
        uplinks.push(Uplink {
            nic: match uplink.get("nic") {
                Some(value) => value.nic()?,
                None => NicChoice::First,
            },
            port,
            position: value.position(),
        });
    }
    let mirrors = tables(section, "mirror", 32)?
        .iter()
        .map(mirror)
        .collect::<Checked<_>>()?;
    let mut meters = Vec::new();
    for value in tables(section, "meter", 256)? {
        let meter = table(&value, "[[switch.meter]]", METER_KEYS)?;
        let frames = meter.get("packets").is_some();
        let rate = match (frames, meter.get("rate")) {
            (true, None) => meter
                .need("packets", "frames a second")?
                .number(1..=u32::MAX)?
                .into(),
            (false, Some(rate)) => rate.quantity(RATES, RATE_RULE)?,
            (true, Some(rate)) => return Err(rate.wrong("left out beside `packets`")),
            (false, None) => meter.need("rate", RATE_RULE)?.quantity(RATES, RATE_RULE)?,
        };
        let burst = match meter.get("burst") {
            Some(value) if frames => value.number(1..=u32::MAX)?.into(),
            Some(value) => value.quantity(SIZES, SIZE_RULE)?.saturating_mul(8),
            None => rate,
        };
        meters.push(MeterConfig {
            id: meter
                .need("id", "its number in flows")?
                .number(1..=u32::MAX)?,
            frames,
            rate,
            burst,
        });
    }
    let capture = match section.get("capture") {
        Some(value) => {
            let bytes = value.quantity(SIZES, SIZE_RULE)?;
            if !CAPTURE.contains(&bytes) {
                return Err(value.wrong("between 4KiB and 16MiB"));
            }
            bytes
        }
        None => DEFAULT_CAPTURE,
    };
    Ok(Switch {
        name: name.to_owned(),
        uplinks,
        capture,
        mirrors,
        meters,
        flows: texts(
            section,
            "flows",
            MAX_FLOWS,
            "flows in the form of ovs-ofctl",
        )?,
        order: texts(section, "order", MAX_UPLINKS, "names of uplinks")?,
        spread: section.one_of(
            "spread",
            Spread::Failover,
            &[("failover", Spread::Failover), ("by-port", Spread::ByPort)],
        )?,
        reverse_path: section.boolean("reverse_path", true)?,
        position,
    })
}

fn mirror(value: &Value<'_>) -> Checked<Mirror> {
    let section = table(value, "[[switch.mirror]]", MIRROR_KEYS)?;
    let output = section.get("output_port");
    let vlan = section.number("output_vlan", 1..=4094)?;
    let output = match (&output, vlan) {
        (Some(port), None) => Some((port.text(PORT_RULE)?.to_owned(), port.position())),
        (Some(port), Some(_)) => return Err(port.wrong("left out beside `output_vlan`")),
        (None, _) => None,
    };
    let kept = match vlan.map(|id| VlanId::new(id as u16)) {
        Some(Ok(vlan)) => MirrorOutput::Vlan(vlan),
        _ => MirrorOutput::Capture,
    };
    if section.boolean("capture", false)? && (output.is_some() || vlan.is_some()) {
        return Err(value.wrong("either a capture or sent to a port or VLAN"));
    }
    let most = 64;
    Ok(Mirror {
        config: MirrorConfig {
            name: section.need("name", NAME_RULE)?.vm_name()?.to_owned(),
            select_all: section.boolean("select_all", false)?,
            select_src: Vec::new(),
            select_dst: Vec::new(),
            select_vlan: vlans(&section, "select_vlan")?,
            output: kept,
        },
        sources: texts(&section, "select_src_port", most, PORT_RULE)?,
        destinations: texts(&section, "select_dst_port", most, PORT_RULE)?,
        output,
        position: value.position(),
    })
}

/// The cards of a VM. `ports` counts those of each switch.
pub(super) fn nics(
    vm: &Section<'_>,
    name: &str,
    switches: &[Switch],
    ports: &mut Vec<u16>,
) -> Checked<Vec<Nic>> {
    let mut found: Vec<Nic> = Vec::new();
    ports.resize(switches.len(), 0);
    for (index, value) in tables(vm, "nic", MAX_NICS)?.into_iter().enumerate() {
        let section = table(&value, "[[vm.nic]]", NIC_KEYS)?;
        let choices: Vec<_> = switches
            .iter()
            .enumerate()
            .map(|(at, s)| (s.name.as_str(), at))
            .collect();
        let number = match section.need("switch", "the name of a [[switch]]") {
            Ok(value) => value.one_of(&choices)?,
            // With one switch there is nothing to choose.
            Err(_) if switches.len() == 1 => 0,
            Err(error) => return Err(error),
        };
        let (Some(switch), Some(used)) = (switches.get(number), ports.get_mut(number)) else {
            return Err(value.wrong("on a switch of this file"));
        };
        *used += 1;
        let id = switch.uplinks.len() as u16 + *used;
        let default = match index {
            0 => name.to_owned(),
            _ => format!("{name}-{index}"),
        };
        let own = section.get("name").map(|name| name.vm_name()).transpose()?;
        let kind = section.one_of(
            "kind",
            PortKind::Vnic,
            &[
                ("vnic", PortKind::Vnic),
                ("management", PortKind::Management),
                ("mirror", PortKind::Mirror),
            ],
        )?;
        let mut port = PortConfig::new(id, own.unwrap_or(&default), kind);
        shape(&section, &mut port)?;
        port.protected = section.boolean("protected", false)?;
        port.forged_source = section.boolean("forged_source", false)?;
        port.mac_change = section.boolean("mac_change", false)?;
        port.promiscuous = section.boolean("promiscuous", false)?;
        port.bpdu = section.boolean("bpdu", false)?;
        port.dhcp_guard = section.boolean("dhcp_guard", false)?;
        port.ra_guard = section.boolean("ra_guard", false)?;
        if let Some(value) = section.get("uplink") {
            let names: Vec<_> = switch
                .uplinks
                .iter()
                .map(|u| (u.port.name.as_str(), u.port.id))
                .collect();
            port.pinned = Some(value.one_of(&names)?);
        }
        let mac = match section.get("mac") {
            Some(value) => value.mac()?,
            None => own_mac(name, index),
        };
        if kind != PortKind::Mirror {
            port.macs.push(mac);
        }
        found.push(Nic {
            switch: number,
            mac,
            queues: section.number("queues", 1..=MAX_QUEUES)?.unwrap_or(1) as u16,
            mtu: section.number("mtu", MTU)?.map(|mtu| mtu as u16),
            port,
            position: value.position(),
        });
    }
    Ok(found)
}

/// What uplinks and cards of VMs have in common.
fn shape(section: &Section<'_>, port: &mut PortConfig) -> Checked<()> {
    let tag = section.number("tag", 0..=4094)?;
    port.tag = tag.map(|tag| tag as u16);
    port.trunks = vlans(section, "trunks")?;
    port.cvlans = vlans(section, "cvlans")?;
    port.vlan_mode = section.choice(
        "vlan_mode",
        &[
            ("access", VlanMode::Access),
            ("trunk", VlanMode::Trunk),
            ("native-tagged", VlanMode::NativeTagged),
            ("native-untagged", VlanMode::NativeUntagged),
            ("dot1q-tunnel", VlanMode::Dot1qTunnel),
        ],
    )?;
    port.priority_tags = section.one_of(
        "priority_tags",
        PriorityTags::Never,
        &[
            ("never", PriorityTags::Never),
            ("if-nonzero", PriorityTags::IfNonzero),
            ("always", PriorityTags::Always),
        ],
    )?;
    port.storm_limit = section.number("storm_limit", 1..=u32::MAX)?;
    port.ingress = rate(section, "ingress", "[ingress]")?;
    port.egress = rate(section, "egress", "[egress]")?;
    port.learning = match section.get("learning") {
        None => None,
        Some(Value {
            value: Node {
                data: Data::Boolean(on),
                ..
            },
            ..
        }) => on.then(Learning::default),
        Some(_) => {
            let learning = section.sub("learning", "[learning]", LEARNING_KEYS)?;
            let default = Learning::default();
            Some(Learning {
                limit: learning
                    .number("limit", 1..=u32::MAX)?
                    .unwrap_or(default.limit),
                ageing: learning
                    .number("ageing", 1..=1_000_000)?
                    .unwrap_or(default.ageing),
                flood: learning.boolean("flood", default.flood)?,
            })
        }
    };
    Ok(())
}

const RATE_RULE: &str = "a rate such as \"100Mbit\" or \"2Gbit\"";
const SIZE_RULE: &str = "a size such as \"64KiB\"";
const PORT_RULE: &str = "the name of a port of this switch";

fn rate(section: &Section<'_>, key: &'static str, name: &'static str) -> Checked<Option<Rate>> {
    if section.get(key).is_none() {
        return Ok(None);
    }
    let table = section.sub(key, name, RATE_KEYS)?;
    let average = table
        .need("average", RATE_RULE)?
        .quantity(RATES, RATE_RULE)?;
    let peak = table
        .get("peak")
        .map(|value| value.quantity(RATES, RATE_RULE));
    let burst = table
        .get("burst")
        .map(|value| value.quantity(SIZES, SIZE_RULE));
    Ok(Some(Rate {
        average,
        peak: peak.transpose()?.unwrap_or(0),
        burst: burst.transpose()?.unwrap_or(64 << 10),
    }))
}

/// VLANs 0 to 4094: a number, or an array of them.
fn vlans(section: &Section<'_>, key: &'static str) -> Checked<Vec<u16>> {
    let Some(value) = section.get(key) else {
        return Ok(Vec::new());
    };
    let list = match &value.value.data {
        Data::Array(list) => list.as_slice(),
        _ => core::slice::from_ref(value.value),
    };
    let mut ids = Vec::new();
    for node in list {
        let id = value.entry(node).number(0..=4094)? as u16;
        if !ids.contains(&id) {
            ids.push(id);
        }
    }
    Ok(ids)
}

/// An array of texts, each with its place.
fn texts(section: &Section<'_>, key: &'static str, most: usize, rule: &str) -> Checked<Vec<Named>> {
    let Some(value) = section.get(key) else {
        return Ok(Vec::new());
    };
    let list = match &value.value.data {
        Data::Array(list) if list.len() <= most => list.as_slice(),
        Data::Text(_) => core::slice::from_ref(value.value),
        _ => return Err(value.wrong(&format!("an array of at most {most} {rule}"))),
    };
    list.iter()
        .map(|node| {
            let value = value.entry(node);
            Ok((value.text(rule)?.to_owned(), value.position()))
        })
        .collect()
}

/// A station address of our own for the card `index` of a VM: locally administered (IEEE 802
/// §8.2.2), the same at every start, and by FNV-1a unlikely to be that of another.
fn own_mac(vm: &str, index: usize) -> MacAddr {
    let hash = vm
        .bytes()
        .chain([index as u8])
        .fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3)
        });
    let [a, b, c, d, e, ..] = hash.to_be_bytes();
    MacAddr([0x02, a, b, c, d, e])
}

impl Value<'_> {
    fn mac(&self) -> Checked<MacAddr> {
        let rule = "a station's address such as \"02:00:00:00:00:01\"";
        let parsed = mac_from(self.text(rule)?).filter(|mac| mac.is_station());
        parsed.ok_or_else(|| self.wrong(rule))
    }

    fn nic(&self) -> Checked<NicChoice> {
        let rule = "\"first\", a PCI address such as \"00:03.0\", or a station's address";
        let text = self.text(rule)?;
        let choice = match text {
            "first" => Some(NicChoice::First),
            _ => mac_from(text)
                .map(NicChoice::Mac)
                .or_else(|| address_from(text)),
        };
        choice.ok_or_else(|| self.wrong(rule))
    }
}

fn mac_from(text: &str) -> Option<MacAddr> {
    let mut bytes = [0; 6];
    let mut parts = text.split([':', '-']);
    for byte in &mut bytes {
        let part = parts.next().filter(|part| part.len() == 2)?;
        *byte = u8::from_str_radix(part, 16).ok()?;
    }
    parts.next().is_none().then_some(MacAddr(bytes))
}

fn address_from(text: &str) -> Option<NicChoice> {
    let (bus, rest) = text.split_once(':')?;
    let (device, function) = rest.split_once('.')?;
    let hex = |text: &str| u8::from_str_radix(text, 16).ok();
    let (bus, device, function) = (hex(bus)?, hex(device)?, hex(function)?);
    (device < 32 && function < 8).then_some(NicChoice::Address(bus, device, function))
}

#[cfg(test)]
mod tests {
    use super::super::{Config, parse};
    use super::*;
    use vswitch::PortId;

    const FULL: &str = r#"
[[switch]]
name = "lan"
flows = ["priority=10,arp,actions=normal", "priority=0,actions=normal"]
order = ["up"]
spread = "by-port"
reverse_path = false
[[switch.uplink]]
name = "up"
nic = "00:03.0"
trunks = [5, 9]
[[switch.uplink]]
nic = "52:54:00:12:34:56"
[[switch.mirror]]
name = "watch"
select_src_port = ["a"]
output_port = "probe"
[[switch.meter]]
id = 1
packets = 1000
[[vm]]
name = "a"
kind = "linux"
kernel = "k"
memory = "64MiB"
[[vm.nic]]
tag = 5
queues = 2
mtu = 9000
ingress = { average = "10Mbit", peak = "1Gbit", burst = "64KiB" }
learning = { limit = 4 }
forged_source = true
uplink = "up"
[[vm.nic]]
name = "probe"
kind = "mirror"
[[vm]]
name = "b"
kind = "linux"
kernel = "k"
memory = "64MiB"
[[vm.nic]]
switch = "lan"
mac = "02:00:00:00:00:07"
vlan_mode = "native-untagged"
tag = 9
"#;

    fn assemble(text: &str) -> Result<SwitchConfig, String> {
        let config: Config = parse(text, "t.toml").map_err(|error| error.to_string())?;
        if let Some(Err(error)) = config.vms.iter().find(|vm| vm.is_err()) {
            return Err(error.to_string());
        }
        let nics = config.vms.iter().flatten().flat_map(|vm| &vm.nics);
        let switch = config.switches.first().expect("a switch");
        switch
            .assemble(0, "t.toml", nics)
            .map_err(|error| error.to_string())
    }

    #[test]
    fn a_switch_is_what_its_text_says() {
        let switch = assemble(FULL).expect("it is sound");
        let ports: Vec<_> = switch
            .ports
            .iter()
            .map(|p| (p.id.0, p.name.as_str()))
            .collect();
        assert_eq!(
            ports,
            [(1, "up"), (2, "uplink1"), (3, "a"), (4, "probe"), (5, "b")]
        );
        let [up, _, a, probe, b] = switch.ports.as_slice() else {
            panic!()
        };
        assert_eq!(
            (up.kind, up.protected, &up.trunks[..]),
            (PortKind::Uplink, true, &[5, 9][..])
        );
        assert_eq!(
            (a.tag, a.mode(), a.pinned),
            (Some(5), VlanMode::Access, Some(PortId(1)))
        );
        let rate = Rate {
            average: 10_000_000,
            peak: 1_000_000_000,
            burst: 65536,
        };
        assert_eq!((a.ingress, a.egress), (Some(rate), None));
        assert_eq!(
            a.learning,
            Some(Learning {
                limit: 4,
                ..Learning::default()
            })
        );
        assert_eq!((probe.kind, probe.macs.len()), (PortKind::Mirror, 0));
        assert_eq!(b.macs, [MacAddr([2, 0, 0, 0, 0, 7])]);
        assert!(
            a.macs.iter().all(|mac| mac.is_station()),
            "an address of its own"
        );
        assert_eq!(switch.mirrors[0].select_src, [PortId(3)]);
        assert_eq!(switch.mirrors[0].output, MirrorOutput::Port(PortId(4)));
        assert_eq!(switch.teaming.order, [PortId(1)]);
    }

    #[test]
    fn mistakes_have_place_and_remedy() {
        for (from, to, want) in [
            ("switch = \"lan\"", "switch = \"lam\"", "one of \"lan\""),
            ("tag = 9", "tag = 4095", "a number from 0 to 4094"),
            ("nic = \"00:03.0\"", "nic = \"00:33.0\"", "a PCI address"),
            (
                "02:00:00:00:00:07",
                "03:00:00:00:00:07",
                "a station's address",
            ),
            (
                "uplink = \"up\"",
                "uplink = \"down\"",
                "one of \"up\", \"uplink1\"",
            ),
            ("\"10Mbit\"", "\"10MB\"", "a rate such as"),
            (
                "[\"a\"]",
                "[\"c\"]",
                "has no port `c`; it has up, uplink1, a, probe, b",
            ),
            (
                "output_port = \"probe\"",
                "output_port = \"b\"",
                "t.toml:14:1",
            ),
            ("priority=10,arp", "priority=10,arq", "t.toml:4:10"),
            (
                "packets = 1000",
                "packets = 1000\nrate = \"1Mbit\"",
                "left out beside `packets`",
            ),
            ("name = \"up\"", "name = \"a\"", "one of \"a\""),
            (
                "kind = \"mirror\"",
                "mac = \"02:00:00:00:00:07\"",
                "02:00:00:00:00:07 is there twice",
            ),
            (
                "[[switch.meter]]",
                "[[switch.metre]]",
                "did you mean `meter`?",
            ),
            ("queues = 2", "queues = 99", "a number from 1 to 8"),
        ] {
            assert!(FULL.contains(from), "{from}");
            let error = assemble(&FULL.replacen(from, to, 1)).expect_err(to);
            assert!(error.contains(want), "{to}: {error}");
        }
    }

    #[test]
    fn own_addresses_differ_and_stay() {
        let all = [own_mac("a", 0), own_mac("a", 1), own_mac("b", 0)];
        assert!(all[0] != all[1] && all[0] != all[2] && all[1] != all[2]);
        assert_eq!(all[0], own_mac("a", 0));
        assert!(all.iter().all(|mac| mac.is_station() && mac.0[0] == 2));
    }
}
