//! Random switches and flows, within what both switches can do.

use vswitch::config::SwitchConfig;
use vswitch::key::ether;
use vswitch::mirror::{MirrorConfig, MirrorOutput};
use vswitch::port::{Learning, PortConfig, PortKind, PriorityTags, VlanMode};
use vswitch::{MacAddr, PortId};

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
        // Where what is dropped differs by rules, so would its copies.
        let alike = !plain || mirrored;
        let guests = 2 + random.below(4);
        let uplinks = random.below(if alike { 2 } else { 4 });
        let mut config = SwitchConfig {
            name: "br0".to_owned(),
            ..SwitchConfig::default()
        };
        config.teaming.reverse_path = false;
        for id in 1..=guests + uplinks + usize::from(mirrored) {
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
            config.mirrors = vec![mirror(random, &config.ports, plain)];
        }
        if !plain {
            config.flows = flows(random, &config.ports, mirrored);
        }
        Self { config, plain }
    }

    /// Guests' addresses.
    pub fn homes(&self) -> impl Iterator<Item = (MacAddr, &PortConfig)> {
        let ports = self.config.ports.iter();
        ports.flat_map(|port| port.macs.iter().map(move |mac| (*mac, port)))
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

fn mirror(random: &mut Random, ports: &[PortConfig], plain: bool) -> MirrorConfig {
    let ids: Vec<PortId> = ports.iter().map(|p| p.id).collect();
    let (output, sources) = ids.split_last().expect("there are ports");
    MirrorConfig {
        name: "m1".to_owned(),
        select_all: plain && random.once_in(3),
        select_src: random.some(sources),
        select_dst: if plain {
            random.some(sources)
        } else {
            Vec::new()
        },
        select_vlan: if random.once_in(2) {
            random.some(&VLANS)
        } else {
            Vec::new()
        },
        output: MirrorOutput::Port(*output),
    }
}

/// Flows for a switch: in every table of different priorities, and something to do with the rest.
fn flows(random: &mut Random, ports: &[PortConfig], mirrored: bool) -> Vec<String> {
    let ids: Vec<u16> = ports
        .iter()
        .filter(|p| p.kind != PortKind::Mirror)
        .map(|p| p.id.0)
        .collect();
    let mut flows = Vec::new();
    for table in 0..4u8 {
        for rank in 0..2 + random.below(6) {
            let priority = (rank as u16 + 1) * 10;
            flows.push(flow(random, table, priority, &ids, !mirrored));
        }
        if !random.once_in(4) {
            let rest = if random.once_in(4) { "drop" } else { "normal" };
            flows.push(format!("table={table},priority=0,actions={rest}"));
        }
    }
    flows
}

/// A flow that both switches take.
pub fn flow(random: &mut Random, table: u8, priority: u16, ports: &[u16], floods: bool) -> String {
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
    let (port, vlan) = (random.pick(ports), random.pick(&VLANS));
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
    if kind == "icmp6" && random.once_in(2) {
        let (kind, link) = random.pick(&[(135, "nd_sll"), (136, "nd_tll")]);
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
}

fn actions(random: &mut Random, table: u8, ports: &[u16], floods: bool, of: &Kind<'_>) -> String {
    let mut actions: Vec<String> = Vec::new();
    // OpenFlow 1.0 changes tags that need not be there, 1.3 pushes them; no version does both.
    let old = of.odd || random.once_in(3);
    let mut tags = u32::from(of.tagged);
    for _ in 0..random.below(6) {
        let (id, pcp) = (random.pick(&VLANS), random.below(8));
        let address = mac(random.below(8) as u8);
        let v4 = format!("10.0.0.{}", random.below(5));
        let v6 = format!("fe80::{}", random.below(5));
        let end = random.pick(&["src", "dst"]);
        let action = match random.below(15) {
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
            _ => continue,
        };
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
