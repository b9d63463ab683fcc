//! Random switches and flows, within what both switches can do.

use std::net::{Ipv4Addr, Ipv6Addr};

use anyhow::{Context, Result, ensure};
use arch::Nanos;
use vswitch::cache::Cache;
use vswitch::config::{MeterConfig, SwitchConfig};
use vswitch::key::{Vlan, ether};
use vswitch::mirror::{MirrorConfig, MirrorOutput};
use vswitch::port::{Learning, PortConfig, PortKind, PriorityTags, VlanMode};
use vswitch::{MacAddr, PortId, Switch, VlanId};

use super::random::Random;

/// The VLANs of a world.
pub const VLANS: [u16; 4] = [0, 5, 9, 100];
/// VLANs that some frames are in, and no port by name.
pub const EDGES: [u16; 2] = [1, 4094];
/// TCP's and UDP's ports in it.
pub const PORTS: [u16; 4] = [53, 80, 443, 0x1234];

/// A switch to compare.
pub struct World {
    /// As Tessera has it.
    pub config: SwitchConfig,
    /// No flows: all is `normal`.
    pub plain: bool,
    /// Addresses that ports have learned, in each of their VLANs.
    learned: Vec<(MacAddr, PortId)>,
}

/// Whether a port is in a VLAN.
pub fn carries(port: &PortConfig, vlan: u16) -> bool {
    let own = port.tag.unwrap_or(0);
    let trunked = port.trunks.is_empty() || port.trunks.contains(&vlan);
    match port.mode() {
        VlanMode::Access | VlanMode::Dot1qTunnel => vlan == own,
        VlanMode::Trunk => trunked,
        // Unless it is 0, the native VLAN takes its place.
        _ if own == 0 => trunked,
        _ => vlan == own || (vlan != 0 && trunked),
    }
}

/// Whether `normal` takes frames with the identifier `id`, 0 for no tag, from a port.
pub fn admits(port: &PortConfig, id: u16) -> bool {
    match port.mode() {
        VlanMode::Access => id == 0,
        VlanMode::Dot1qTunnel => port.cvlans.is_empty() || port.cvlans.contains(&id),
        VlanMode::Trunk => carries(port, id),
        VlanMode::NativeTagged | VlanMode::NativeUntagged => id == 0 || carries(port, id),
    }
}

/// The VLAN of a frame that comes in with the identifier `id`, 0 for no tag.
pub fn vlan_of(port: &PortConfig, id: u16) -> u16 {
    let own = port.tag.unwrap_or(0);
    match port.mode() {
        VlanMode::Access | VlanMode::Dot1qTunnel => own,
        VlanMode::NativeTagged | VlanMode::NativeUntagged if id == 0 => own,
        _ => id,
    }
}

/// An address within a world: of the guest at port `n`, or of nobody.
pub const fn mac(n: u8) -> MacAddr {
    MacAddr([2, 0, 0, 0, 0, n])
}

impl World {
    /// A world.
    pub fn random(random: &mut Random) -> Self {
        let plain = random.once_in(2);
        let mirrored = random.once_in(3);
        let into_vlan = plain && mirrored && random.once_in(3);
        // Where what is dropped differs by rules, so would its copies.
        let alike = !plain || mirrored;
        let guests = 2 + random.below(4);
        let uplinks = random.below(if alike { 2 } else { 4 });
        let mut config = SwitchConfig {
            name: "br0".to_owned(),
            ..SwitchConfig::default()
        };
        config.teaming.reverse_path = false;
        for id in 1..=guests + uplinks + usize::from(mirrored && !into_vlan) {
            let kind = match id {
                id if id <= guests => PortKind::Vnic,
                id if id <= guests + uplinks => PortKind::Uplink,
                _ => PortKind::Mirror,
            };
            let mut port = PortConfig::new(id as u16, &format!("p{id}"), kind);
            if kind != PortKind::Mirror {
                vlans(random, &mut port, plain, mirrored);
            }
            // R1 in Open vSwitch's words.
            port.protected = kind == PortKind::Uplink;
            if kind == PortKind::Vnic {
                port.macs = vec![mac(id as u8)];
                port.forged_source = alike || random.once_in(2);
                port.protected = !mirrored && random.once_in(4);
                if port.forged_source && (alike || random.once_in(2)) {
                    port.learning = Some(Learning {
                        flood: true,
                        ..Learning::default()
                    });
                }
            }
            config.ports.push(port);
        }
        if mirrored {
            config.mirrors = vec![mirror(random, &config.ports, plain, into_vlan)];
        }
        if !plain {
            config.meters = (1..=random.below(3) as u32).map(meter).collect();
            config.flows = flows(random, &config.ports, mirrored, config.meters.len());
        }
        let mut learned = Vec::new();
        let learning = config.ports.iter().filter(|p| p.learning.is_some());
        let learning: Vec<PortId> = learning.map(|port| port.id).collect();
        for number in 6..8 {
            if plain && !learning.is_empty() && random.once_in(2) {
                learned.push((mac(number), random.pick(&learning)));
            }
        }
        Self {
            config,
            plain,
            learned,
        }
    }

    /// Addresses that are known: guests' own, and learned ones.
    pub fn homes(&self) -> impl Iterator<Item = (MacAddr, &PortConfig)> {
        let ports = self.config.ports.iter();
        let own = ports.flat_map(|port| port.macs.iter().map(move |mac| (*mac, port)));
        let port = |id: PortId| self.config.ports.iter().find(move |port| port.id == id);
        let learned = self.learned.iter();
        own.chain(learned.filter_map(move |(mac, id)| Some((*mac, port(*id)?))))
    }

    /// Has the switch learn what there is to learn, by a frame from each port in each of its VLANs.
    pub fn teach(&self, switch: &mut Switch) -> Result<()> {
        let mut cache = Cache::new(4, [1, 2]);
        for (mac, id) in &self.learned {
            let port = self.config.ports.iter().find(|port| port.id == *id);
            let port = port.context("a port")?;
            let vlans = || VLANS.iter().chain(&EDGES);
            for vlan in vlans().filter(|vlan| carries(port, **vlan)) {
                let mut frame = [[0xff; 6], mac.0].concat();
                // Without a tag, else with that of the VLAN; a tunnel puts its own in front.
                let tagged = [0]
                    .iter()
                    .chain(vlans())
                    .find(|id| admits(port, **id) && vlan_of(port, **id) == *vlan);
                if let Some(id @ 1..) = tagged {
                    frame.extend(ether::VLAN.to_be_bytes());
                    frame.extend(id.to_be_bytes());
                }
                frame.extend([0x12, 0x34]);
                frame.resize(60, 0);
                switch.decide(&mut cache, port.id, &frame, frame.len(), Nanos::ZERO);
                let known = switch.learned().any(|e| e.mac == *mac && e.vlan == *vlan);
                ensure!(known, "{mac} was not learned in VLAN {vlan}");
            }
        }
        Ok(())
    }

    /// The ports, for a report.
    pub fn ports_text(&self) -> String {
        let shown = self.config.ports.iter().map(|p| {
            format!(
                "{} {:?} {:?} tag={:?} trunks={:?} cvlans={:?} {:?} protected={} forged={} flood={}\n",
                p.name,
                p.kind,
                p.mode(),
                p.tag,
                p.trunks,
                p.cvlans,
                p.priority_tags,
                p.protected,
                p.forged_source,
                p.learning.is_some()
            )
        });
        let mut text: String = shown.collect();
        for mirror in &self.config.mirrors {
            text += &format!("{mirror:?}\n");
        }
        text
    }
}

/// Gives a port its VLANs. Tunnels are only where there are no flows, ports that take a native tag
/// off only where there is no mirror, either: what rules drop there would be copied.
fn vlans(random: &mut Random, port: &mut PortConfig, plain: bool, mirrored: bool) {
    let mut modes = vec![VlanMode::Trunk, VlanMode::NativeTagged];
    if port.kind == PortKind::Vnic {
        modes.push(VlanMode::Access);
        if plain {
            modes.push(VlanMode::Dot1qTunnel);
        }
    }
    if plain && !mirrored {
        modes.push(VlanMode::NativeUntagged);
    }
    let mode = random.pick(&modes);
    if mode != VlanMode::Trunk {
        port.tag = Some(random.pick(&VLANS));
    }
    if !matches!(mode, VlanMode::Access | VlanMode::Dot1qTunnel) && random.once_in(2) {
        port.trunks = random.some(&VLANS);
    }
    if mode == VlanMode::Dot1qTunnel {
        if random.once_in(2) {
            port.cvlans = random.some(&VLANS);
        }
        port.qinq_ethtype = random.pick(&[ether::VLAN, ether::SERVICE_VLAN]);
    }
    // Said where it is not what the tag says.
    let implied = matches!(mode, VlanMode::Access | VlanMode::Trunk) && random.once_in(2);
    port.vlan_mode = (!implied).then_some(mode);
    port.priority_tags = random.pick(&[
        PriorityTags::Never,
        PriorityTags::IfNonzero,
        PriorityTags::Always,
    ]);
}

const fn meter(id: u32) -> MeterConfig {
    MeterConfig {
        id,
        frames: true,
        rate: 1000,
        burst: 1000,
    }
}

/// A mirror to the last port, or into a VLAN.
fn mirror(random: &mut Random, ports: &[PortConfig], plain: bool, into_vlan: bool) -> MirrorConfig {
    let ids: Vec<PortId> = ports.iter().map(|p| p.id).collect();
    let (last, others) = ids.split_last().expect("there are ports");
    let (output, sources) = match into_vlan {
        true => {
            let vlan = VlanId::new(random.pick(&VLANS[1..])).expect("a VLAN");
            (MirrorOutput::Vlan(vlan), &*ids)
        }
        false => (MirrorOutput::Port(*last), others),
    };
    MirrorConfig {
        name: "m1".to_owned(),
        select_all: plain && random.once_in(3),
        select_src: random.some(sources),
        // A copy of what leaves has the form of one of the frame's outputs, and which is not said:
        // a port that gets nothing but copies can forget its tags, a VLAN cannot.
        select_dst: if plain && !into_vlan {
            random.some(sources)
        } else {
            Vec::new()
        },
        select_vlan: if random.once_in(2) {
            random.some(&VLANS)
        } else {
            Vec::new()
        },
        output,
    }
}

/// Flows for a switch: in every table of different priorities, and something to do with the rest.
fn flows(random: &mut Random, ports: &[PortConfig], mirrored: bool, meters: usize) -> Vec<String> {
    let ids: Vec<u16> = ports
        .iter()
        .filter(|p| p.kind != PortKind::Mirror)
        .map(|p| p.id.0)
        .collect();
    let mut flows = Vec::new();
    for table in 0..4u8 {
        for rank in 0..2 + random.below(6) {
            let priority = (rank as u16 + 1) * 10;
            flows.push(flow(random, table, priority, &ids, !mirrored, meters));
        }
        if !random.once_in(4) {
            let rest = if random.once_in(4) { "drop" } else { "normal" };
            flows.push(format!("table={table},priority=0,actions={rest}"));
        }
    }
    flows
}

/// A flow that both switches take.
pub fn flow(
    random: &mut Random,
    table: u8,
    priority: u16,
    ports: &[u16],
    floods: bool,
    meters: usize,
) -> String {
    let mut fields: Vec<String> = vec![format!("table={table}"), format!("priority={priority}")];
    if random.once_in(4) {
        fields.push(format!("cookie={:#x}", random.number() >> 8));
    }
    let kind = random.pick(&[
        "", "", "", "ip", "tcp", "udp", "icmp", "arp", "ipv6", "tcp6", "udp6", "icmp6", "rarp",
        "sctp",
    ]);
    if !kind.is_empty() {
        fields.push(kind.to_owned());
    }
    let some = |random: &mut Random, field: String, fields: &mut Vec<String>| {
        if random.once_in(6) {
            fields.push(field);
        }
    };
    let word = |random: &mut Random| random.number() as u16;
    let (mut port, vlan) = (random.pick(ports).to_string(), random.pick(&VLANS));
    if random.once_in(8) {
        port = "LOCAL".to_owned();
    }
    some(random, format!("in_port={port}"), &mut fields);
    let (tagged, mut odd) = (random.once_in(3), false);
    if tagged {
        let pcp = random.below(8);
        fields.push(match random.below(5) {
            0 => format!("dl_vlan={vlan},dl_vlan_pcp={pcp}"),
            1 => format!("dl_vlan_pcp={pcp}"),
            2 => "vlan_tci=0x1000/0x1000".to_owned(),
            _ => format!("dl_vlan={vlan}"),
        });
    } else if random.once_in(6) {
        fields.push("vlan_tci=0x0000/0x1fff".to_owned());
    } else if random.once_in(12) {
        odd = true;
        let mask = word(random) & 0xefff;
        fields.push(format!("vlan_tci={:#06x}/{mask:#06x}", word(random) & mask));
    }
    for field in ["dl_src", "dl_dst"] {
        let group = "01:00:00:00:00:00/01:00:00:00:00:00".to_owned();
        let address = mac(random.below(8) as u8).to_string();
        let value = random.pick(&[&group, &address]).clone();
        some(random, format!("{field}={value}"), &mut fields);
    }
    if kind.is_empty() {
        some(random, "dl_type=0x1234".to_owned(), &mut fields);
    }
    let v4 = |random: &mut Random| {
        let host = format!("10.0.0.{}", random.below(5));
        match random.below(4) {
            0 => format!("{host}/{}", random.below(33)),
            1 => format!("{host}/255.0.255.{}", random.byte()),
            _ => host,
        }
    };
    let v6 = |random: &mut Random| {
        let host = format!("fe80::{}", random.below(5));
        match random.below(4) {
            0 => format!("{host}/{}", random.below(129)),
            1 => format!("{host}/ffff::{:x}", word(random)),
            _ => host,
        }
    };
    let is_v6 = kind == "ipv6" || kind.ends_with('6');
    let is_arp = matches!(kind, "arp" | "rarp");
    let is_ip = !kind.is_empty() && !is_arp;
    if is_arp {
        let op = random.below(4);
        some(random, format!("arp_op={op}"), &mut fields);
        for field in ["arp_spa", "arp_tpa"] {
            let address = v4(random);
            some(random, format!("{field}={address}"), &mut fields);
        }
        for field in ["arp_sha", "arp_tha"] {
            let address = mac(random.below(8) as u8);
            some(random, format!("{field}={address}"), &mut fields);
        }
    } else if is_ip {
        for end in ["src", "dst"] {
            let (name, address) = match is_v6 {
                true => ("ipv6", v6(random)),
                false => ("nw", v4(random)),
            };
            some(random, format!("{name}_{end}={address}"), &mut fields);
        }
        let (tos, ecn) = (random.below(64) * 4, random.below(4));
        some(random, format!("nw_tos={tos}"), &mut fields);
        some(random, format!("nw_ecn={ecn}"), &mut fields);
        let ttl = random.pick(&[1, 2, 64]);
        some(random, format!("nw_ttl={ttl}"), &mut fields);
        // Later fragments have no ports.
        let frags = ["no", "yes", "first", "not_later", "later"];
        let bare = matches!(kind, "ip" | "ipv6");
        let frag = random.pick(if bare { &frags } else { &frags[..4] });
        some(random, format!("ip_frag={frag}"), &mut fields);
    }
    let ported = ["tcp", "udp", "sctp"].iter().any(|p| kind.starts_with(p));
    if ported {
        for field in ["tp_src", "tp_dst"] {
            let mut value = random.pick(&PORTS).to_string();
            if random.once_in(4) {
                let mask = word(random);
                value = format!("{:#x}/{mask:#x}", word(random));
            }
            some(random, format!("{field}={value}"), &mut fields);
        }
    }
    if kind.starts_with("tcp") {
        let flags = random.pick(&["+syn-ack", "-fin", "syn|ack", "0x2/0x12", "0", "+[200]"]);
        some(random, format!("tcp_flags={flags}"), &mut fields);
    }
    if kind == "icmp" {
        some(random, "icmp_type=8".to_owned(), &mut fields);
        some(random, "icmp_code=0".to_owned(), &mut fields);
    }
    let mut message = "";
    if kind == "icmp6" && random.once_in(2) {
        let (kind, link) = random.pick(&[(135, "nd_sll"), (136, "nd_tll")]);
        message = link;
        fields.push(format!("icmp_type={kind},icmp_code=0"));
        let target = v6(random);
        some(random, format!("nd_target={target}"), &mut fields);
        let address = mac(random.below(8) as u8);
        some(random, format!("{link}={address}"), &mut fields);
    }
    let of = Kind {
        kind,
        is_v6,
        is_ip,
        is_arp,
        tagged,
        odd,
        message,
        meters,
    };
    let actions = actions(random, table, ports, floods, &of);
    format!("{},actions={actions}", fields.join(","))
}

/// What a flow's actions may rely on.
struct Kind<'a> {
    kind: &'a str,
    is_v6: bool,
    is_ip: bool,
    is_arp: bool,
    tagged: bool,
    /// Bits of the tag are matched as only OpenFlow 1.0 can.
    odd: bool,
    /// The option of the neighbour messages that it is about.
    message: &'a str,
    meters: usize,
}

/// A field of which some bits are set; none where there is no such field.
fn masked(random: &mut Random, end: &str, of: &Kind<'_>, tags: u32) -> String {
    let (value, mask) = (random.number(), random.number());
    let byte = |number: u64, at: u32| (number >> (8 * at)) as u8;
    let bytes = |number: u64| [0, 1, 2, 3, 4, 5].map(|at| byte(number, at));
    let link = || {
        // Neither groups nor the reserved ones.
        let mask = mask & !1;
        let (value, mask) = (MacAddr(bytes(value & mask)), MacAddr(bytes(mask)));
        format!("{value}/{mask}")
    };
    let v4 = |random: &mut Random| {
        if random.once_in(2) {
            return format!("10.{}.0.0/16", random.below(4));
        }
        let address = |n: u64| Ipv4Addr::from_bits(n as u32);
        format!("{}/{}", address(value & mask), address(mask | 1))
    };
    let v6 = |random: &mut Random| {
        // Open vSwitch takes a mask that begins with a decimal digit for a prefix's length.
        let address = |n: u64| Ipv6Addr::from_bits(0xffff << 112 | u128::from(n) << 32 | 3);
        match random.once_in(2) {
            true => format!("fe80:{:x}::/32", random.below(4)),
            false => format!("{}/{}", address(value & mask), address(mask)),
        }
    };
    let ports = ["tcp", "udp"].into_iter().find(|p| of.kind.starts_with(p));
    match random.below(4) {
        0 => format!("set_field:{}->eth_{end}", link()),
        1 if tags > 0 => {
            let (id, mask) = (value as u16 & 0x7ff, mask as u16 & 0xfff);
            let value = Vlan::PRESENT | id & mask;
            format!("set_field:{value:#x}/{:#x}->vlan_vid", mask | Vlan::PRESENT)
        }
        2 if of.is_arp => {
            let which = random.pick(&["sha", "tha"]);
            format!("set_field:{}->arp_{which}", link())
        }
        _ if of.is_arp => {
            let which = random.pick(&["spa", "tpa"]);
            format!("set_field:{}->arp_{which}", v4(random))
        }
        2 if !of.message.is_empty() => match random.once_in(2) {
            true => format!("set_field:{}->nd_target", v6(random)),
            false => format!("set_field:{}->{}", link(), of.message),
        },
        2 if ports.is_some() => {
            let (value, mask) = (value as u16, mask as u16 | 1);
            let name = ports.unwrap_or_default();
            format!("set_field:{:#x}/{mask:#x}->{name}_{end}", value & mask)
        }
        _ if of.is_v6 => format!("set_field:{}->ipv6_{end}", v6(random)),
        _ if of.is_ip => format!("set_field:{}->ip_{end}", v4(random)),
        _ => String::new(),
    }
}

fn actions(random: &mut Random, table: u8, ports: &[u16], floods: bool, of: &Kind<'_>) -> String {
    let mut actions: Vec<String> = Vec::new();
    // OpenFlow 1.0 changes tags that need not be there, 1.3 pushes them; no version does both.
    let old = of.odd || random.once_in(3);
    let mut tags = u32::from(of.tagged);
    if !old && of.meters != 0 && random.once_in(3) {
        actions.push(format!("meter:{}", 1 + random.below(of.meters)));
    }
    for _ in 0..random.below(6) {
        let (id, pcp) = (random.pick(&VLANS), random.below(8));
        let address = mac(random.below(8) as u8);
        let v4 = format!("10.0.0.{}", random.below(5));
        let v6 = format!("fe80::{}", random.below(5));
        let end = random.pick(&["src", "dst"]);
        let action = match random.below(22) {
            0 if random.once_in(10) => "LOCAL".to_owned(),
            0 | 1 => format!("output:{}", random.pick(ports)),
            2 if floods => random.pick(&["flood", "all"]).to_owned(),
            2 => "in_port".to_owned(),
            3 => "normal".to_owned(),
            4 if table < 3 => {
                let to = table + 1 + random.below(3 - usize::from(table)) as u8;
                match random.below(3) {
                    0 => format!("resubmit({},{to})", random.pick(ports)),
                    _ => format!("resubmit(,{to})"),
                }
            }
            5 => format!("mod_dl_{end}:{address}"),
            6 if old => format!("mod_vlan_vid:{id}"),
            7 if old => format!("mod_vlan_pcp:{pcp}"),
            8 if old => "strip_vlan".to_owned(),
            6 if tags < 2 => {
                tags += 1;
                random
                    .pick(&["push_vlan:0x8100", "push_vlan:0x88a8"])
                    .to_owned()
            }
            7 if tags > 0 => match random.below(2) {
                0 => format!("set_field:{}->vlan_vid", id | 0x1000),
                _ => format!("set_field:{pcp}->vlan_pcp"),
            },
            8 if tags > 0 => {
                tags -= 1;
                "pop_vlan".to_owned()
            }
            9 if of.is_arp => match random.below(3) {
                0 => format!("set_field:{}->arp_op", 1 + random.below(2)),
                1 => format!("set_field:{v4}->arp_{}", random.pick(&["spa", "tpa"])),
                _ => format!("set_field:{address}->arp_{}", random.pick(&["sha", "tha"])),
            },
            9 if of.is_v6 => format!("set_field:{v6}->ipv6_{end}"),
            9 if of.is_ip => match random.below(2) {
                0 => format!("mod_nw_{end}:{v4}"),
                _ => format!("set_field:{v4}->ip_{end}"),
            },
            10 if of.is_ip => match random.below(4) {
                0 => format!("mod_nw_tos:{}", random.below(64) * 4),
                1 => format!("set_field:{}->ip_dscp", random.below(64)),
                2 => format!("set_field:{}->nw_ecn", random.below(4)),
                _ => format!("set_field:{}->nw_ttl", 1 + random.below(200)),
            },
            11 if of.is_ip => "dec_ttl".to_owned(),
            12 if of.kind.starts_with("tcp") || of.kind.starts_with("udp") => {
                format!("mod_tp_{end}:{}", random.pick(&PORTS))
            }
            13 if of.kind == "icmp" || of.kind == "icmp6" => {
                let name = if of.is_v6 { "icmpv6" } else { "icmp" };
                match random.below(3) {
                    0 => format!("set_field:{}->{name}_code", random.below(3)),
                    _ => format!(
                        "set_field:{}->{name}_type",
                        random.pick(&[0, 8, 128, 135, 136])
                    ),
                }
            }
            14 | 15 if !of.message.is_empty() => match random.below(2) {
                0 => format!("set_field:{v6}->nd_target"),
                _ => format!("set_field:{address}->{}", of.message),
            },
            // In OpenFlow 1.0 a mask gets lost.
            16..=20 if !old => masked(random, end, of, tags),
            _ => continue,
        };
        if action.is_empty() {
            continue;
        }
        actions.push(action);
    }
    if table < 3 && !old && random.once_in(5) {
        actions.push(format!("goto_table:{}", table + 1));
    }
    if actions.is_empty() {
        return "drop".to_owned();
    }
    actions.join(",")
}
