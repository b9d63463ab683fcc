//! Any configuration, any frame.

use super::*;
use crate::mirror::{MirrorConfig, MirrorOutput};
use crate::port::{Learning, PriorityTags, VlanMode};
use crate::rate::Rate;
use crate::uplink::{Spread, Teaming};
use proptest::prelude::*;

/// A few VLANs, so that ports meet.
fn vlan() -> impl Strategy<Value = u16> {
    prop_oneof![Just(0), 1..4u16, Just(4094)]
}

fn port(id: u8) -> impl Strategy<Value = PortConfig> {
    use VlanMode::{Access, Dot1qTunnel, NativeTagged, NativeUntagged, Trunk};
    let mode = prop::sample::select(vec![
        Access,
        Trunk,
        NativeTagged,
        NativeUntagged,
        Dot1qTunnel,
    ]);
    let vlans = (
        prop::option::of(vlan()),
        prop::collection::vec(vlan(), 0..3),
        prop::option::of(mode),
        prop::collection::vec(vlan(), 0..2),
        0..3usize,
    );
    let kind = prop::sample::select(vec![
        PortKind::Vnic,
        PortKind::Vnic,
        PortKind::Uplink,
        PortKind::Management,
        PortKind::Mirror,
    ]);
    let rate = || {
        let rate = (1..10_000_000u64, 0..3u64, 1..100_000u64);
        prop::option::weighted(
            0.2,
            rate.prop_map(|(average, peak, burst)| Rate {
                average,
                peak: average * peak,
                burst,
            }),
        )
    };
    let learning = prop::option::of((1..5u32, any::<bool>()));
    (
        kind,
        vlans,
        any::<[bool; 8]>(),
        rate(),
        rate(),
        learning,
        prop::option::of(1..50u32),
    )
        .prop_map(
            move |(
                kind,
                (tag, trunks, mode, cvlans, tags),
                bits,
                ingress,
                egress,
                learning,
                storm,
            )| {
                let mut port = PortConfig::new(id.into(), &format!("p{id}"), kind);
                (port.tag, port.trunks, port.vlan_mode, port.cvlans) = (tag, trunks, mode, cvlans);
                port.priority_tags = [
                    PriorityTags::Never,
                    PriorityTags::IfNonzero,
                    PriorityTags::Always,
                ][tags];
                let guest = matches!(kind, PortKind::Vnic | PortKind::Management);
                port.macs = if guest { vec![vm(id)] } else { vec![] };
                [
                    port.protected,
                    port.forged_source,
                    port.mac_change,
                    port.promiscuous,
                    ..,
                ] = bits;
                [.., port.bpdu, port.dhcp_guard, port.ra_guard, port.lldp] = bits;
                port.lldp &= kind == PortKind::Management;
                (port.ingress, port.egress, port.storm_limit) = (ingress, egress, storm);
                let learns = kind == PortKind::Uplink || (guest && port.forged_source);
                port.learning = learning.filter(|_| learns).map(|(limit, flood)| Learning {
                    limit,
                    ageing: 2,
                    flood,
                });
                port
            },
        )
}

fn any_config() -> impl Strategy<Value = SwitchConfig> {
    let ports = (0..7u8).prop_flat_map(|count| (1..=count).map(port).collect::<Vec<_>>());
    let mirrors = prop::collection::vec((any::<[u8; 2]>(), any::<bool>(), 0..4u16, 0..3), 0..3);
    (ports, mirrors, any::<[bool; 2]>(), 0..3).prop_map(|(ports, mirrors, bits, flows)| {
        let ids = |bits: u8| {
            let ids = ports.iter().map(|port| port.id);
            ids.filter(|id| bits >> id.0 & 1 != 0).collect::<Vec<_>>()
        };
        let probe = ports.iter().find(|port| port.kind == PortKind::Mirror);
        let mirrors =
            mirrors
                .into_iter()
                .enumerate()
                .map(|(n, ([src, dst], all, vlan, output))| MirrorConfig {
                    name: n.to_string(),
                    select_all: all,
                    select_src: ids(src),
                    select_dst: ids(dst),
                    select_vlan: (vlan != 0).then_some(vlan).into_iter().collect(),
                    output: match (output, probe) {
                        (0, Some(probe)) => MirrorOutput::Port(probe.id),
                        (1, _) => MirrorOutput::Vlan(crate::VlanId::new(2).unwrap()),
                        _ => MirrorOutput::Capture,
                    },
                });
        let flows: &[&str] = match flows {
            0 => &[],
            1 => &[
                "in_port=1,actions=output:2,push_vlan:0x8100,mod_vlan_vid:3,output:3,normal",
                "priority=9,actions=resubmit(,2)",
                "table=2,priority=4,actions=normal",
            ],
            _ => &[
                "dl_vlan=2,actions=strip_vlan,normal,output:4",
                "priority=1,actions=flood,normal",
            ],
        };
        let mirrors = mirrors.collect();
        SwitchConfig {
            name: "any".into(),
            ports,
            teaming: Teaming {
                order: vec![],
                spread: if bits[0] {
                    Spread::ByPort
                } else {
                    Spread::Failover
                },
                reverse_path: bits[1],
            },
            mirrors,
            capture_bytes: 1000,
            meters: vec![],
            flows: flows.iter().map(|line| (*line).into()).collect(),
        }
    })
}

/// A frame that switches find something in: known addresses and tags, any length.
fn any_frame() -> impl Strategy<Value = Vec<u8>> {
    let mac = || {
        prop_oneof![
            (1..8u8).prop_map(vm),
            Just(ALL),
            Just(OUTSIDE),
            Just(NOBODY),
            any::<[u8; 6]>().prop_map(MacAddr),
            (0..17u8).prop_map(|n| MacAddr([1, 0x80, 0xc2, 0, 0, n])),
        ]
    };
    let tag = (
        prop::sample::select(vec![VLAN, 0x88a8]),
        0..8u16,
        prop_oneof![vlan(), Just(4095)],
    );
    let tags = prop::collection::vec(tag.prop_map(|(tpid, pcp, id)| (tpid, pcp << 13 | id)), 0..4);
    let kind = prop::sample::select(vec![0x800, 0x806, 0x86dd, 0x8035, 0x88cc, 46, 0x88b5]);
    let load = prop::collection::vec(any::<u8>(), 0..80);
    let length = prop_oneof![8 => 0..200usize, 1 => 0..=65_536usize];
    (mac(), mac(), tags, kind, load, length).prop_map(|(to, from, tags, kind, load, length)| {
        let mut bytes = frame(to, from, &tags, kind, &load);
        bytes.resize(length, 0x55);
        bytes
    })
}

/// What happens to a switch.
#[derive(Clone, Debug)]
enum Event {
    Frame(u16, Vec<u8>),
    Link(u16, bool),
    Promiscuous(u16, bool),
    Address(u16, u8),
    Leaving(u16),
    Arrived(u16),
    Wait(u64),
}

fn event() -> impl Strategy<Value = Event> {
    let port = || 0..8u16;
    prop_oneof![
        20 => (port(), any_frame()).prop_map(|(port, bytes)| Event::Frame(port, bytes)),
        1 => (port(), any::<bool>()).prop_map(|(port, up)| Event::Link(port, up)),
        1 => (port(), any::<bool>()).prop_map(|(port, on)| Event::Promiscuous(port, on)),
        1 => (port(), 0..9u8).prop_map(|(port, mac)| Event::Address(port, mac)),
        1 => port().prop_map(Event::Leaving),
        1 => port().prop_map(Event::Arrived),
        2 => (0..3 * SECOND).prop_map(Event::Wait),
    ]
}

impl World {
    fn meet(&mut self, event: &Event) -> Option<(Out, Option<DropCause>)> {
        let (switch, now) = (&mut self.switch, Nanos(self.now));
        match *event {
            Event::Frame(port, ref bytes) => return Some(self.give(port, bytes)),
            Event::Link(port, up) => drop(switch.set_link(PortId(port), up)),
            Event::Promiscuous(port, on) => drop(switch.set_promiscuous(PortId(port), on, now)),
            Event::Address(port, mac) => drop(switch.change_address(PortId(port), vm(mac), now)),
            Event::Leaving(port) => drop(switch.leaving(PortId(port))),
            Event::Arrived(port) => drop(switch.arrived(PortId(port), now)),
            Event::Wait(time) => {
                self.now += time;
                switch.tick(Nanos(self.now));
            }
        }
        self.announced();
        None
    }
}

fn kind(config: &SwitchConfig, id: u16) -> PortKind {
    let port = config.ports.iter().find(|port| port.id.0 == id);
    port.map(|port| port.kind).unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    /// No panic; R1, R2, R9; and every frame is delivered or dropped for one cause.
    #[test]
    fn every_frame_is_delivered_or_dropped_with_a_cause(
        config in any_config(), events in prop::collection::vec(event(), 1..120),
    ) {
        config.check().unwrap();
        let mut world = World::of(config.clone());
        let (mut frames, mut copies) = (0u64, 0u64);
        for event in &events {
            let Some((out, cause)) = world.meet(event) else { continue };
            let Event::Frame(from, bytes) = event else { continue };
            frames += 1;
            copies += out.len() as u64;
            prop_assert!(cause.is_some() || !out.is_empty());
            if config.flows.is_empty() && config.mirrors.is_empty() {
                let mut ports: Vec<u16> = out.iter().map(|(port, _)| *port).collect();
                ports.sort_unstable();
                ports.dedup();
                prop_assert_eq!(ports.len(), out.len(), "R10");
                prop_assert!(!ports.contains(from));
            }
            for (to, bytes) in &out {
                let both = [kind(&config, *from), kind(&config, *to)];
                prop_assert_ne!(both, [PortKind::Uplink; 2], "R1");
                if let Ok(key) = crate::key::FlowKey::extract(bytes, PortId(0)) {
                    prop_assert!(key.vlans.iter().all(|tag| tag.id() != 4095), "R9");
                    let lldp = both == [PortKind::Uplink, PortKind::Management];
                    prop_assert!(lldp || !key.dl_dst.is_reserved(), "R2");
                }
            }
            prop_assert!(bytes.len() <= crate::MAX_FRAME || out.is_empty());
        }
        let (mut rx, mut tx) = (world.switch.strays(), 0);
        for (_, _, counters) in world.switch.ports() {
            prop_assert_eq!(counters.rx_frames, counters.forwarded + counters.dropped_in_all());
            rx += counters.rx_frames;
            tx += counters.tx_frames;
        }
        prop_assert_eq!(rx, frames);
        prop_assert!(tx >= copies);
        let learned = world.switch.learned().count() as u64;
        let limit: u32 = config.ports.iter().filter_map(|p| p.learning).map(|l| l.limit).sum();
        prop_assert!(learned <= u64::from(limit));
    }

    /// With a cache, even one that is far too small, and without: the same.
    #[test]
    fn the_cache_changes_nothing(
        config in any_config(), events in prop::collection::vec(event(), 1..120), size in 1..40usize,
    ) {
        let mut cached = World::of(config.clone());
        cached.cache = Cache::new(size, [5, 6]);
        let mut plain = World::of(config);
        plain.cache = Cache::new(0, [5, 6]);
        // Each frame thrice, so that there is something to find.
        for event in events.iter().flat_map(|event| [event; 3]) {
            prop_assert_eq!(cached.meet(event), plain.meet(event));
        }
        let counters = |world: &World| {
            world.switch.ports().map(|(_, _, counters)| {
                let mut counters = counters.clone();
                // Counted where it is decided.
                counters.not_learned = 0;
                counters
            }).collect::<Vec<_>>()
        };
        prop_assert_eq!(counters(&cached), counters(&plain));
        let learned = |world: &World| {
            let mut all: Vec<_> = world.switch.learned().copied().collect();
            all.sort_by_key(|entry| (entry.mac, entry.vlan));
            all
        };
        prop_assert_eq!(learned(&cached), learned(&plain));
    }

    /// Whatever configuration follows whatever other, with everything that happened in between.
    #[test]
    fn configurations_follow_each_other(
        configs in prop::collection::vec(any_config(), 2..5),
        events in prop::collection::vec(event(), 1..30),
    ) {
        let mut world = World::of(configs[0].clone());
        for config in configs {
            world.switch.replace(config.clone()).unwrap();
            prop_assert_eq!(world.switch.config(), &config);
            events.iter().for_each(|event| drop(world.meet(event)));
            let mut fresh = 0;
            for (port, _, counters) in world.switch.ports() {
                prop_assert_eq!(counters.rx_frames, counters.forwarded + counters.dropped_in_all());
                fresh += usize::from(port.learning.is_none());
            }
            prop_assert!(fresh <= config.ports.len());
            for entry in world.switch.learned() {
                let port = config.ports.iter().find(|port| port.id == entry.port);
                prop_assert!(port.is_some_and(|port| port.learning.is_some()));
            }
        }
    }
}
