//! Mirrors, limits, protected ports, links, flows, and configurations put in place of others.

use super::*;
use crate::config::{ConfigError, MeterConfig, Place, Problem};
use crate::flow::FlowMod;
use crate::mirror::{Capture, MirrorConfig, MirrorOutput};
use crate::port::Learning;
use crate::rate::Rate;

const UPLINK: PortId = PortId(UP);

fn mirror(output: MirrorOutput) -> MirrorConfig {
    MirrorConfig {
        name: "m".into(),
        select_all: false,
        select_src: vec![],
        select_dst: vec![],
        select_vlan: vec![],
        output,
    }
}

fn probe(id: u16) -> PortConfig {
    PortConfig::new(id, &format!("probe{id}"), PortKind::Mirror)
}

/// Guests 1 and 2 in VLAN 5, 3 in VLAN 6, a probe at 9, an uplink.
fn watched(mirrors: impl IntoIterator<Item = MirrorConfig>) -> World {
    let guest = |id, tag| with(vnic(id), |port| port.tag = Some(tag));
    let mut config = config([guest(1, 5), guest(2, 5), guest(3, 6), probe(9), uplink(UP)]);
    config.mirrors = mirrors.into_iter().collect();
    config.capture_bytes = 4096;
    World::of(config)
}

#[test]
fn a_mirror_selects_by_port_each_way() {
    let to_probe = mirror(MirrorOutput::Port(PortId(9)));
    let mut world = watched([MirrorConfig {
        select_src: vec![PortId(1)],
        ..to_probe.clone()
    }]);
    assert_eq!(world.ports(1, vm(2), vm(1)), [9, 2]);
    assert_eq!(world.ports(2, vm(1), vm(2)), [1]);
    let mut world = watched([MirrorConfig {
        select_dst: vec![PortId(1)],
        ..to_probe.clone()
    }]);
    assert_eq!(world.ports(1, vm(2), vm(1)), [2]);
    assert_eq!(world.ports(2, vm(1), vm(2)), [1, 9]);
    // A frame is copied once, however often it was selected, by however many mirrors.
    let all = MirrorConfig {
        select_all: true,
        ..to_probe
    };
    let again = MirrorConfig {
        name: "again".into(),
        ..all.clone()
    };
    let mut world = watched([all, again]);
    assert_eq!(world.ports(1, ALL, vm(1)), [9, 2, UP]);
    assert_eq!(world.why(9, ALL, vm(1)), Some(DropCause::MirrorPort));
}

#[test]
fn a_mirror_selects_by_vlan_and_shows_it() {
    let select_vlan = vec![6];
    let mut world = watched([MirrorConfig {
        select_all: true,
        select_vlan,
        ..mirror(MirrorOutput::Port(PortId(9)))
    }]);
    assert_eq!(world.ports(1, ALL, vm(1)), [2, UP]);
    let (out, _) = world.give(3, &plain(ALL, vm(3)));
    let tagged = frame(ALL, vm(3), &[(VLAN, 6)], 0x88b5, &[7; 46]);
    assert_eq!(out, [(9, tagged.clone()), (UP, tagged)]);
}

#[test]
fn what_only_a_mirror_gets_counts_as_dropped() {
    let mut world = watched([MirrorConfig {
        select_src: vec![PortId(1)],
        ..mirror(MirrorOutput::Port(PortId(9)))
    }]);
    let (out, cause) = world.give(1, &plain(vm(1), vm(1)));
    assert_eq!((out.len(), cause), (1, Some(DropCause::SamePort)));
}

#[test]
fn a_mirror_into_a_vlan_leaves_by_no_uplink_what_came_by_one() {
    let mut world = watched([MirrorConfig {
        select_all: true,
        ..mirror(MirrorOutput::Vlan(crate::VlanId::new(6).unwrap()))
    }]);
    let (out, _) = world.give(1, &plain(vm(2), vm(1)));
    let ports: Vec<u16> = out.iter().map(|(port, _)| *port).collect();
    assert_eq!(ports, [3, UP, 2]);
    assert_eq!(
        out[1].1,
        frame(vm(2), vm(1), &[(VLAN, 6)], 0x88b5, &[7; 46])
    );
    let (out, _) = world.give(UP, &frame(vm(2), OUTSIDE, &[(VLAN, 5)], 0x88b5, &[7; 46]));
    let ports: Vec<u16> = out.iter().map(|(port, _)| *port).collect();
    assert_eq!(ports, [3, 2]);
}

#[test]
fn a_capture_has_frames_as_they_came_or_left() {
    let capture = mirror(MirrorOutput::Capture);
    let mut world = watched([MirrorConfig {
        select_dst: vec![UPLINK],
        ..capture
    }]);
    world.now = 5 * SECOND;
    let (out, _) = world.give(1, &plain(ALL, vm(1)));
    let ports: Vec<u16> = out.iter().map(|(port, _)| *port).collect();
    assert_eq!(ports, [2, UP]);
    let mut record = Vec::new();
    let ring = world.switch.capture().unwrap();
    assert!(ring.read(&mut record));
    let head = [5, 0, 0, 0, 0, 0, 0, 0, 64, 0, 0, 0, 64, 0, 0, 0];
    assert_eq!(record[..16], head);
    assert_eq!(
        record[16..],
        frame(ALL, vm(1), &[(VLAN, 5)], 0x88b5, &[7; 46])
    );
    assert!(!ring.read(&mut record));
    assert_eq!(Capture::file_header().len(), 24);
}

#[test]
fn rates_hold_both_ways() {
    let rate = Some(Rate {
        average: 8_000,
        peak: 0,
        burst: 600,
    });
    let mut world = World::new([
        with(vnic(1), |port| port.ingress = rate),
        with(vnic(2), |port| port.egress = rate),
        vnic(3),
    ]);
    let mut count = |port, to: u8| {
        let bytes = plain(vm(to), vm(port as u8));
        (0..30)
            .filter(|_| world.give(port, &bytes).1.is_none())
            .count()
    };
    assert_eq!(count(1, 3), 10);
    assert_eq!(count(3, 2), 10);
    assert_eq!(count(3, 1), 30);
    // A broadcast still goes to those who may have it.
    assert_eq!(world.ports(3, ALL, vm(3)), [1]);
    let counters = |port| world.switch.counters(PortId(port)).unwrap();
    assert_eq!(counters(1).dropped(DropCause::IngressRate), 20);
    assert_eq!(counters(3).dropped(DropCause::EgressRate), 20);
    assert_eq!(counters(2).tx_limited, 22);
    assert_eq!(counters(2).tx_frames, 10);
}

#[test]
fn protected_ports_do_not_talk_to_each_other() {
    let isolated = |id| with(vnic(id), |port| port.protected = true);
    let mut world = World::new([isolated(1), isolated(2), vnic(3), uplink(UP)]);
    assert_eq!(world.ports(1, ALL, vm(1)), [3, UP]);
    assert_eq!(world.why(1, vm(2), vm(1)), Some(DropCause::Protected));
    assert_eq!(world.ports(1, vm(3), vm(1)), [3]);
    assert_eq!(world.ports(3, ALL, vm(3)), [1, 2, UP]);
}

#[test]
fn a_port_without_a_link_neither_sends_nor_receives() {
    let mut world = World::new([vnic(1), vnic(2), uplink(UP)]);
    world.switch.set_link(PortId(2), false).unwrap();
    assert_eq!(world.why(2, ALL, vm(2)), Some(DropCause::LinkDown));
    assert_eq!(world.why(1, vm(2), vm(1)), Some(DropCause::LinkDown));
    assert_eq!(world.ports(1, ALL, vm(1)), [UP]);
    assert!(world.switch.set_link(PortId(77), true).is_err());
}

#[test]
fn switches_with_little_or_nothing_in_them() {
    let mut world = World::new([]);
    assert_eq!(world.why(1, ALL, vm(1)), Some(DropCause::NoPort));
    assert_eq!(world.why(0xffff, ALL, vm(1)), Some(DropCause::NoPort));
    assert_eq!(world.switch.strays(), 2);
    let mut world = World::new([vnic(1)]);
    assert_eq!(world.why(1, ALL, vm(1)), Some(DropCause::NoOutput));
    assert_eq!(world.why(1, OUTSIDE, vm(1)), Some(DropCause::Unknown));
    assert_eq!(world.why_not(1, &[]), Some(DropCause::Short));
    assert_eq!(world.why_not(1, &[0; 70_000]), Some(DropCause::Long));
}

fn flows(lines: &[&str], ports: impl IntoIterator<Item = PortConfig>) -> World {
    let mut config = config(ports);
    config.flows = lines.iter().map(|line| (*line).into()).collect();
    config.meters = vec![MeterConfig {
        id: 1,
        frames: true,
        rate: 1,
        burst: 3,
    }];
    World::of(config)
}

#[test]
fn flows_come_first_and_rules_hold_all_the_same() {
    let ports = || [vnic(1), vnic(2), vnic(3), uplink(UP), uplink(UP2)];
    let mut world = flows(
        &[
            "priority=9,in_port=1,dl_type=0x88b5,actions=output:3",
            "priority=8,in_port=100,actions=output:101,output:3",
            "priority=7,in_port=101,actions=output:100",
            "priority=0,actions=NORMAL",
        ],
        ports(),
    );
    assert_eq!(world.ports(1, vm(2), vm(1)), [3]);
    assert_eq!(world.why(1, vm(2), NOBODY), Some(DropCause::ForgedSource));
    assert_eq!(world.ports(2, vm(1), vm(2)), [1]);
    assert_eq!(world.ports(UP, vm(1), OUTSIDE), [3]);
    assert_eq!(
        world.why(UP2, vm(1), OUTSIDE),
        Some(DropCause::UplinkToUplink)
    );
    let mut world = flows(&["actions=FLOOD"], ports());
    assert_eq!(world.ports(1, vm(2), vm(1)), [2, 3, UP]);
    assert_eq!(world.ports(UP, ALL, OUTSIDE), [1, 2, 3]);
}

#[test]
fn meters_and_flows_count_what_the_cache_decides() {
    let mut world = flows(&["in_port=1,actions=meter:1,output:2"], [vnic(1), vnic(2)]);
    let causes: Vec<_> = (0..5).map(|_| world.why(1, ALL, vm(1))).collect();
    assert_eq!(
        causes,
        [
            None,
            None,
            None,
            Some(DropCause::Meter),
            Some(DropCause::Meter)
        ]
    );
    assert_eq!(world.cache.statistics(), (4, 1));
    assert_eq!(world.switch.flows().flows()[0].packets, 5);
    assert_eq!(world.why(2, ALL, vm(2)), Some(DropCause::Flow));
}

#[test]
fn flows_change_at_run_time_whole_or_not_at_all() {
    let mut world = flows(&["in_port=1,actions=output:2"], [vnic(1), vnic(2), vnic(3)]);
    assert_eq!(world.ports(1, ALL, vm(1)), [2]);
    let parse = |line: &str| FlowMod::parse(line, &|_| None).unwrap();
    let right = parse("priority=40000,in_port=1,actions=output:3");
    let wrong = parse("in_port=1,actions=meter:9,output:3");
    assert!(world.switch.change_flows(&[right.clone(), wrong]).is_err());
    assert_eq!(world.ports(1, ALL, vm(1)), [2]);
    assert_eq!(world.switch.change_flows(&[right]), Ok(1));
    assert_eq!(world.ports(1, ALL, vm(1)), [3]);
    // The configuration in use has them, and replacing it by itself changes and forgets nothing.
    let config = world.switch.config().clone();
    assert_eq!(config.flows.len(), 2);
    world.switch.replace(config).unwrap();
    assert_eq!(world.ports(1, ALL, vm(1)), [3]);
    assert_eq!(world.switch.flows().flows()[0].packets, 4);
}

#[test]
fn a_configuration_is_replaced_whole_or_not_at_all() {
    let learner = || {
        with(vnic(2), |port| {
            port.forged_source = true;
            port.learning = Some(Learning::default());
        })
    };
    let nested = MacAddr([6, 0, 0, 0, 0, 1]);
    let mut world = World::new([vnic(1), learner(), uplink(UP)]);
    world.ports(2, vm(1), nested);
    world.switch.set_link(PortId(1), false).unwrap();
    let before = world.switch.counters(PortId(2)).unwrap().clone();
    let wrong = config([vnic(1), with(vnic(3), |port| port.tag = Some(4095))]);
    assert!(world.switch.replace(wrong).is_err());
    assert_eq!(world.ports(2, nested, vm(2)), [] as [u16; 0]);
    assert_eq!(world.switch.ports().count(), 3);
    world
        .switch
        .replace(config([vnic(1), learner(), vnic(3)]))
        .unwrap();
    assert_eq!(
        world.switch.counters(PortId(2)).unwrap().rx_frames,
        before.rx_frames + 2
    );
    assert_eq!(world.ports(3, nested, vm(3)), [2]);
    assert_eq!(world.why(3, vm(1), vm(3)), Some(DropCause::LinkDown));
    // Another port of the same number has nothing of the old one, and what is in no VLAN of its
    // port any more is forgotten.
    let other = with(vnic(1), |port| port.name = "other".into());
    let moved = with(learner(), |port| port.tag = Some(7));
    world
        .switch
        .replace(config([other, moved, vnic(3)]))
        .unwrap();
    assert_eq!(world.switch.learned().count(), 0);
    assert_eq!(world.switch.counters(PortId(1)).unwrap().rx_frames, 0);
    assert_eq!(world.ports(3, vm(1), vm(3)), [1]);
}

#[test]
fn an_address_that_the_guest_chose_outlives_a_configuration() {
    let free = || with(vnic(1), |port| port.mac_change = true);
    let mut world = World::new([free(), vnic(2)]);
    world
        .switch
        .change_address(PortId(1), NOBODY, Nanos(1))
        .unwrap();
    world
        .switch
        .replace(config([free(), vnic(2), vnic(3)]))
        .unwrap();
    assert_eq!(world.ports(2, NOBODY, vm(2)), [1]);
    world.switch.replace(config([vnic(1), vnic(2)])).unwrap();
    assert_eq!(world.ports(2, vm(1), vm(2)), [1]);
    assert_eq!(world.why(2, NOBODY, vm(2)), Some(DropCause::Unknown));
}

#[test]
fn addresses_are_announced_where_another_configuration_moves_them() {
    let mut world = World::new([vnic(1), vnic(2), uplink(UP), uplink(UP2)]);
    let pinned = with(vnic(1), |port| port.pinned = Some(PortId(UP2)));
    world
        .switch
        .replace(config([pinned, vnic(2), uplink(UP), uplink(UP2)]))
        .unwrap();
    assert_eq!(world.announced(), [(UP2, vm(1), None)]);
}

#[test]
fn a_trace_changes_nothing() {
    let learner = with(vnic(2), |port| {
        port.forged_source = true;
        port.learning = Some(Learning::default());
    });
    let mut world = World::new([vnic(1), learner]);
    let key = crate::key::FlowKey::extract(&plain(vm(1), NOBODY), PortId(2)).unwrap();
    let text = world.switch.trace(&key, Nanos(1));
    assert!(text.ends_with("Datapath actions: 1\n"), "{text}");
    assert_eq!(world.switch.learned().count(), 0);
    assert_eq!(world.switch.counters(PortId(1)).unwrap().tx_frames, 0);
}

#[test]
fn wrong_configurations_are_named() {
    let check = |ports: Vec<PortConfig>, change: fn(&mut SwitchConfig)| {
        let mut config = config(ports);
        change(&mut config);
        config.check().unwrap_err().to_string()
    };
    let port = |change: fn(&mut PortConfig)| check(vec![with(vnic(1), change), uplink(UP)], |_| {});
    let cases = [
        (
            port(|p| p.tag = Some(4095)),
            "port vm1: tag: 4095 is not in 0 to 4094",
        ),
        (
            port(|p| p.trunks = vec![1, 5000]),
            "port vm1: trunks: 5000 is not in 0 to 4094",
        ),
        (
            port(|p| p.macs = vec![ALL]),
            "port vm1: macs: ff:ff:ff:ff:ff:ff is no station's address",
        ),
        (
            port(|p| p.macs = vec![]),
            "port vm1: macs: needed: an address, or forged_source, or it can send nothing",
        ),
        (
            port(|p| p.pinned = Some(PortId(5))),
            "port vm1: pinned: 5 is no uplink of this switch",
        ),
        (
            port(|p| p.id = PortId(0)),
            "port vm1: id: 0 is not in 1 to 65279",
        ),
        (
            port(|p| p.name = "up100".into()),
            "switch: name: up100 is there twice",
        ),
        (port(|p| p.id = UPLINK), "switch: id: 100 is there twice"),
        (
            port(|p| p.storm_limit = Some(0)),
            "port vm1: storm_limit: 0 is not in 1 to 4294967295",
        ),
        (
            port(|p| p.lldp = true),
            "port vm1: lldp: only for management ports",
        ),
        (
            port(|p| p.qinq_ethtype = 0x9100),
            "port vm1: qinq_ethtype: 37120 is not in 34984 to 34984",
        ),
        (
            port(|p| p.learning = Some(Learning::default())),
            "port vm1: learning: needed: forged_source, or there is nothing to learn",
        ),
        (
            port(|p| {
                p.ingress = Some(Rate {
                    average: 10,
                    peak: 5,
                    burst: 1,
                })
            }),
            "port vm1: ingress: 5 is not in 10 to 1000000000000",
        ),
        (
            check(
                vec![vnic(1), with(vnic(2), |p| p.macs = vec![vm(1)])],
                |_| {},
            ),
            "switch: macs: 02:00:00:00:00:01 is there twice",
        ),
        (
            check(vec![vnic(1)], |c| c.teaming.order = vec![PortId(1)]),
            "switch: order: 1 is no uplink of this switch",
        ),
        (
            check(vec![vnic(1)], |c| {
                c.mirrors = vec![mirror(MirrorOutput::Port(PortId(1)))]
            }),
            "mirror m: output_port: 1 is no mirror port of this switch",
        ),
        (
            check(vec![vnic(1)], |c| {
                c.mirrors = vec![mirror(MirrorOutput::Capture)]
            }),
            "mirror m: capture: needed: capture_bytes",
        ),
        (
            check(vec![], |c| {
                c.meters = vec![MeterConfig {
                    id: 3,
                    frames: true,
                    rate: 0,
                    burst: 1,
                }]
            }),
            "meter 3: rate: 0 is not in 1 to 1000000000000",
        ),
    ];
    for (found, expected) in cases {
        assert_eq!(found, expected);
    }
    let error = config([with(vnic(1), |port| port.name = String::new())]).check();
    let error = error.map(drop);
    let field = "name";
    let (place, problem) = (Place::Port(String::new()), Problem::Needed("a name"));
    assert_eq!(
        error,
        Err(ConfigError {
            place,
            field,
            problem
        })
    );
}
