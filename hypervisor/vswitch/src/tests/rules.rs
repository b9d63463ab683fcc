//! The rules R1 to R10, each by its name.

use super::*;
use crate::port::{Learning, VlanMode};
use crate::uplink::Spread;

fn pair() -> World {
    World::new([vnic(1), vnic(2), uplink(UP)])
}

fn team() -> World {
    World::new([
        vnic(1),
        with(vnic(2), |port| port.pinned = Some(PortId(UP2))),
        uplink(UP),
        uplink(UP2),
    ])
}

#[test]
fn r1_nothing_goes_from_uplink_to_uplink() {
    let mut world = team();
    assert_eq!(world.ports(UP, ALL, OUTSIDE), [1, 2]);
    assert_eq!(world.ports(UP, vm(1), OUTSIDE), [1]);
    assert_eq!(world.why(UP, NOBODY, OUTSIDE), Some(DropCause::Unknown));
}

/// Every switch of up to two uplinks and two guests, of every kind of policy that may send frames
/// elsewhere, and every kind of frame.
#[test]
fn r1_holds_in_every_small_world() {
    let mut frames = 0;
    for (uplinks, guests, options) in (0..3).flat_map(|uplinks| {
        (0..3).flat_map(move |guests| (0..128u32).map(move |options| (uplinks, guests, options)))
    }) {
        let option = |bit: u32| options >> bit & 1 != 0;
        let learning = option(0).then_some(Learning {
            limit: 4,
            ageing: 9,
            flood: option(1),
        });
        let mut ports: Vec<PortConfig> = (1..=guests)
            .map(|id| {
                with(vnic(id), |port| {
                    port.forged_source = option(0) || option(2);
                    port.learning = learning;
                    port.promiscuous = option(3);
                    port.pinned = (option(4) && uplinks == 2).then_some(PortId(UP2));
                    port.tag = option(5).then_some(5);
                })
            })
            .collect();
        ports.extend((0..uplinks).map(|id| {
            with(uplink(UP + id), |port| {
                port.learning = learning;
                port.vlan_mode = Some(VlanMode::NativeUntagged);
                port.tag = option(5).then_some(5);
            })
        }));
        let mut config = config(ports);
        config.teaming.reverse_path = option(6);
        if option(6) {
            config.teaming.spread = Spread::ByPort;
        }
        let mut world = World::of(config);
        for id in 1..=guests {
            let _ = world
                .switch
                .set_promiscuous(PortId(id.into()), option(3), Nanos(1));
        }
        let addresses = [
            vm(1),
            vm(2),
            OUTSIDE,
            NOBODY,
            ALL,
            GROUP,
            MacAddr([1, 0x80, 0xc2, 0, 0, 3]),
        ];
        let tags: [&[(u16, u16)]; 5] = [
            &[],
            &[(VLAN, 5)],
            &[(VLAN, 0x6000)],
            &[(VLAN, 4095)],
            &[(0x88a8, 5), (VLAN, 5)],
        ];
        let all = addresses
            .iter()
            .flat_map(|to| addresses.iter().map(move |from| (*to, *from)));
        let all =
            all.flat_map(|(to, from)| tags.map(|tags| frame(to, from, tags, 0x0800, &[0; 46])));
        for bytes in all {
            for id in (1..=u16::from(guests)).chain(UP..UP + uplinks) {
                let (out, cause) = world.give(id, &bytes);
                let outside = out.iter().filter(|(port, _)| *port >= UP).count();
                assert!(outside == 0 || id < UP, "{options:b} {id} {bytes:x?}");
                assert!(outside <= 1, "R10 {options:b} {id} {bytes:x?}");
                assert!(out.iter().all(|(port, _)| *port != id));
                assert_eq!(out.is_empty(), cause.is_some());
                frames += 1;
            }
        }
    }
    assert!(frames > 500_000);
}

#[test]
fn r2_reserved_groups_are_not_relayed_either_way() {
    let mut world = World::new([
        vnic(1),
        vnic(2),
        uplink(UP),
        with(
            PortConfig::new(3, "management", PortKind::Management),
            |port| {
                port.macs = vec![vm(3)];
                port.lldp = true;
            },
        ),
    ]);
    for last in 0..=15 {
        let group = MacAddr([1, 0x80, 0xc2, 0, 0, last]);
        assert_eq!(world.why(1, group, vm(1)), Some(DropCause::Reserved));
        assert_eq!(world.why(UP, group, OUTSIDE), Some(DropCause::Reserved));
    }
    let other = MacAddr([1, 0x80, 0xc2, 0, 0, 16]);
    assert_eq!(world.ports(UP, other, OUTSIDE), [1, 2, 3]);
    let nearest = MacAddr([1, 0x80, 0xc2, 0, 0, 14]);
    let lldp = |from| frame(nearest, from, &[], 0x88cc, &[0; 46]);
    let (out, cause) = world.give(UP, &lldp(OUTSIDE));
    assert_eq!((out, cause), (vec![(3, lldp(OUTSIDE))], None));
    assert_eq!(world.why_not(1, &lldp(vm(1))), Some(DropCause::Reserved));
}

#[test]
fn r3_unknown_unicast_goes_to_the_uplink_and_never_in() {
    let mut world = pair();
    assert_eq!(world.ports(1, vm(2), vm(1)), [2]);
    assert_eq!(world.ports(1, NOBODY, vm(1)), [UP]);
    assert_eq!(world.why(UP, NOBODY, OUTSIDE), Some(DropCause::Unknown));
    assert_eq!(world.ports(UP, vm(2), OUTSIDE), [2]);
    assert_eq!(world.why(1, vm(1), vm(1)), Some(DropCause::SamePort));
}

fn learner(limit: u32) -> PortConfig {
    with(vnic(2), |port| {
        port.forged_source = true;
        port.learning = Some(Learning {
            limit,
            ageing: 300,
            flood: false,
        });
    })
}

#[test]
fn r3_learning_is_an_option_with_a_limit_and_ageing() {
    let mut world = World::new([vnic(1), learner(2), uplink(UP)]);
    let nested = |n| MacAddr([6, 0, 0, 0, 0, n]);
    for n in 0..3 {
        assert_eq!(world.ports(2, vm(1), nested(n)), [1]);
    }
    assert_eq!(world.switch.counters(PortId(2)).unwrap().not_learned, 1);
    assert_eq!(world.ports(1, nested(0), vm(1)), [2]);
    assert_eq!(world.ports(1, nested(1), vm(1)), [2]);
    assert_eq!(world.ports(1, nested(2), vm(1)), [UP]);
    // A frame that the cache decides keeps its source young, too.
    world.now = 200 * SECOND;
    assert_eq!(world.ports(2, vm(1), nested(1)), [1]);
    world.now = 300 * SECOND + 1;
    world.switch.tick(Nanos(world.now));
    assert_eq!(world.ports(1, nested(0), vm(1)), [UP]);
    assert_eq!(world.ports(1, nested(1), vm(1)), [2]);
    assert_eq!(world.switch.learned().count(), 1);
    // There is room again.
    assert_eq!(world.ports(2, vm(1), nested(2)), [1]);
    assert_eq!(world.ports(1, nested(2), vm(1)), [2]);
}

#[test]
fn r3_configured_addresses_are_never_learned() {
    let mut world = World::new([vnic(1), learner(9), vnic(3), uplink(UP)]);
    assert_eq!(world.ports(2, vm(3), vm(1)), [3]);
    assert_eq!(world.ports(3, vm(1), vm(3)), [1]);
    assert_eq!(world.switch.learned().count(), 0);
}

#[test]
fn r4_groups_come_in_by_the_active_uplink_alone() {
    let mut world = team();
    assert_eq!(world.switch.active_uplink(0), Some(PortId(UP)));
    assert_eq!(world.ports(UP, GROUP, OUTSIDE), [1, 2]);
    assert_eq!(
        world.why(UP2, GROUP, OUTSIDE),
        Some(DropCause::PassiveUplink)
    );
    assert_eq!(world.why(UP2, ALL, OUTSIDE), Some(DropCause::PassiveUplink));
    world.switch.set_link(PortId(UP), false).unwrap();
    assert_eq!(world.ports(UP2, ALL, OUTSIDE), [1, 2]);
    assert_eq!(world.why(UP, ALL, OUTSIDE), Some(DropCause::LinkDown));
}

#[test]
fn r4_the_active_uplink_is_one_that_carries_the_vlan() {
    let trunk = |id, vlans: &[u16]| with(uplink(id), |port| port.trunks = vlans.to_vec());
    let in_vlan = |id, tag| with(vnic(id), |port| port.tag = Some(tag));
    let mut world = World::new([
        in_vlan(1, 5),
        in_vlan(2, 6),
        trunk(UP, &[5]),
        trunk(UP2, &[5, 6]),
    ]);
    let mut give = |port, vlan| {
        let (out, cause) = world.give(port, &frame(ALL, OUTSIDE, &[(VLAN, vlan)], 0x800, &[0; 46]));
        (out.iter().map(|(port, _)| *port).collect::<Vec<_>>(), cause)
    };
    assert_eq!(give(UP, 5), (vec![1], None));
    assert_eq!(give(UP2, 5), (vec![], Some(DropCause::PassiveUplink)));
    assert_eq!(give(UP2, 6), (vec![2], None));
}

#[test]
fn r5_what_comes_back_from_outside_is_dropped() {
    let mut world = pair();
    assert_eq!(world.why(UP, ALL, vm(1)), Some(DropCause::Echo));
    assert_eq!(world.why(UP, vm(2), vm(1)), Some(DropCause::Echo));
    assert_eq!(world.why_not(UP, &gratuitous(vm(1))), Some(DropCause::Echo));
}

#[test]
fn r5_an_announcement_takes_a_leaving_vm_away() {
    let mut world = pair();
    world.switch.leaving(PortId(1)).unwrap();
    assert_eq!(world.why(UP, ALL, vm(1)), Some(DropCause::Echo));
    assert_eq!(world.ports(2, vm(1), vm(2)), [1]);
    let (out, _) = world.give(UP, &gratuitous(vm(1)));
    assert_eq!(out.len(), 2);
    assert_eq!(world.ports(2, vm(1), vm(2)), [UP]);
    assert_eq!(world.ports(UP, vm(2), vm(1)), [2]);
    // It comes back: echoes of its announcement do not take it away for five seconds.
    world.switch.arrived(PortId(1), Nanos(world.now)).unwrap();
    assert_eq!(world.announced(), [(UP, vm(1), None)]);
    assert_eq!(world.ports(2, vm(1), vm(2)), [1]);
    world.switch.leaving(PortId(1)).unwrap();
    world.now += 5 * SECOND - 1;
    assert_eq!(world.why_not(UP, &gratuitous(vm(1))), Some(DropCause::Echo));
    world.now += 1;
    assert_eq!(world.why_not(UP, &gratuitous(vm(1))), None);
    assert_eq!(world.ports(2, vm(1), vm(2)), [UP]);
}

#[test]
fn r5_holds_for_learned_addresses() {
    let nested = MacAddr([6, 0, 0, 0, 0, 1]);
    let mut world = World::new([vnic(1), learner(2), uplink(UP)]);
    world.ports(2, ALL, nested);
    assert_eq!(world.why(UP, ALL, nested), Some(DropCause::Echo));
    assert_eq!(
        world.why_not(UP, &gratuitous(nested)),
        Some(DropCause::Echo)
    );
    world.now += 5 * SECOND;
    assert_eq!(world.why_not(UP, &gratuitous(nested)), None);
    assert_eq!(world.ports(1, nested, vm(1)), [UP]);
}

#[test]
fn r6_unicast_comes_in_by_the_guests_own_uplink() {
    let mut world = team();
    assert_eq!(world.ports(UP, vm(1), OUTSIDE), [1]);
    assert_eq!(world.why(UP2, vm(1), OUTSIDE), Some(DropCause::ReversePath));
    assert_eq!(world.ports(UP2, vm(2), OUTSIDE), [2]);
    assert_eq!(world.why(UP, vm(2), OUTSIDE), Some(DropCause::ReversePath));
    let mut config = world.switch.config().clone();
    config.teaming.reverse_path = false;
    world.switch.replace(config).unwrap();
    assert_eq!(world.ports(UP, vm(2), OUTSIDE), [2]);
}

#[test]
fn r7_guests_may_not_pretend() {
    let mut world = pair();
    assert_eq!(world.why(1, vm(2), NOBODY), Some(DropCause::ForgedSource));
    assert_eq!(world.why(1, ALL, vm(2)), Some(DropCause::ForgedSource));
    assert_eq!(world.why(1, ALL, GROUP), Some(DropCause::ForgedSource));
    let mut world = World::new([with(vnic(1), |port| port.forged_source = true), vnic(2)]);
    assert_eq!(world.ports(1, vm(2), NOBODY), [2]);
}

#[test]
fn r7_guests_may_not_change_their_address() {
    let mut world = World::new([vnic(1), with(vnic(2), |port| port.mac_change = true)]);
    let change = |world: &mut World, port, mac| {
        world.now += SECOND;
        world
            .switch
            .change_address(PortId(port), mac, Nanos(world.now))
    };
    assert_eq!(
        change(&mut world, 1, NOBODY),
        Err(crate::switch::Refused::Policy(PortId(1)))
    );
    assert_eq!(change(&mut world, 1, vm(1)), Ok(()));
    for mac in [vm(1), GROUP, MacAddr([0; 6])] {
        assert_eq!(
            change(&mut world, 2, mac),
            Err(crate::switch::Refused::Address(mac))
        );
    }
    assert_eq!(world.ports(1, vm(2), vm(1)), [2]);
    assert_eq!(change(&mut world, 2, NOBODY), Ok(()));
    assert_eq!(world.why(1, vm(2), vm(1)), Some(DropCause::Unknown));
    assert_eq!(world.ports(1, NOBODY, vm(1)), [2]);
    assert_eq!(world.ports(2, vm(1), NOBODY), [1]);
    assert_eq!(world.why(2, vm(1), vm(2)), Some(DropCause::ForgedSource));
    assert_eq!(world.switch.counters(PortId(1)).unwrap().refused, 1);
}

#[test]
fn r7_guests_see_what_is_for_them() {
    let curious = with(vnic(3), |port| port.promiscuous = true);
    let mut world = World::new([vnic(1), vnic(2), curious, uplink(UP)]);
    assert!(
        world
            .switch
            .set_promiscuous(PortId(2), true, Nanos(1))
            .is_err()
    );
    assert_eq!(world.ports(1, vm(2), vm(1)), [2]);
    world
        .switch
        .set_promiscuous(PortId(3), true, Nanos(1))
        .unwrap();
    assert_eq!(world.ports(1, vm(2), vm(1)), [2, 3]);
    assert_eq!(world.ports(1, vm(3), vm(1)), [3]);
    assert_eq!(world.ports(UP, NOBODY, OUTSIDE), [3]);
    assert_eq!(world.ports(1, ALL, vm(1)), [2, 3, UP]);
    world
        .switch
        .set_promiscuous(PortId(3), false, Nanos(1))
        .unwrap();
    assert_eq!(world.ports(1, vm(2), vm(1)), [2]);
}

#[test]
fn r7_guests_cannot_ask_without_end() {
    let mut world = World::new([with(vnic(1), |port| port.promiscuous = true)]);
    let mut ask = |on, now| {
        world
            .switch
            .set_promiscuous(PortId(1), on, Nanos(now))
            .is_ok()
    };
    let heard = (0..100).filter(|n| ask(n % 2 == 0, 0)).count();
    assert!((8..100).contains(&heard), "{heard}");
    assert!(ask(true, SECOND) && ask(false, SECOND));
}

#[test]
fn r7_guests_send_no_bpdus() {
    let pvst = MacAddr([1, 0, 0x0c, 0xcc, 0xcc, 0xcd]);
    let mut world = World::new([vnic(1), with(vnic(2), |port| port.bpdu = true), uplink(UP)]);
    assert_eq!(world.why(1, pvst, vm(1)), Some(DropCause::Bpdu));
    assert_eq!(world.ports(2, pvst, vm(2)), [1, UP]);
    assert_eq!(world.ports(UP, pvst, OUTSIDE), [1, 2]);
}

fn udp(from: MacAddr, ports: [u16; 2]) -> Vec<u8> {
    let mut load = vec![
        0x45, 0, 0, 46, 0, 0, 0, 0, 64, 17, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2,
    ];
    ports
        .iter()
        .for_each(|port| load.extend(port.to_be_bytes()));
    load.extend([0, 26, 0, 0]);
    load.resize(46, 0);
    frame(ALL, from, &[], 0x0800, &load)
}

/// An IPv6 packet behind whose header the payload is.
fn ipv6(from: MacAddr, next: u8, payload: &[u8]) -> Vec<u8> {
    let mut load = vec![0x60, 0, 0, 0, 0, payload.len() as u8, next, 255];
    load.extend([0xfe; 32]);
    load.extend(payload);
    frame(MacAddr([0x33, 0x33, 0, 0, 0, 1]), from, &[], 0x86dd, &load)
}

#[test]
fn r7_guards_against_servers_and_routers() {
    let guarded = with(vnic(1), |port| {
        (port.dhcp_guard, port.ra_guard) = (true, true)
    });
    let mut world = World::new([guarded, vnic(2)]);
    let advertisement = [134, 0, 0, 0, 0, 0, 0, 0];
    let first = |kind| [58, 0, 0, 1, 0, 0, 0, 1, kind, 0, 0, 0, 0, 0, 0, 0];
    let dhcp = Some(DropCause::DhcpServer);
    let router = Some(DropCause::RouterAdvertisement);
    type Build = fn(MacAddr, &[u8]) -> Vec<u8>;
    let cases: [(&str, Build, Vec<u8>, Option<DropCause>); 9] = [
        ("answer", |mac, _| udp(mac, [67, 68]), vec![], dhcp),
        ("to a relay", |mac, _| udp(mac, [67, 67]), vec![], dhcp),
        ("question", |mac, _| udp(mac, [68, 67]), vec![], None),
        (
            "RA",
            |mac, load| ipv6(mac, 58, load),
            advertisement.into(),
            router,
        ),
        (
            "echo",
            |mac, load| ipv6(mac, 58, load),
            [128, 0, 0, 0, 0, 0, 0, 0].into(),
            None,
        ),
        (
            "RA in a fragment",
            |mac, load| ipv6(mac, 44, load),
            first(134).into(),
            router,
        ),
        (
            "echo in a fragment",
            |mac, load| ipv6(mac, 44, load),
            first(128).into(),
            None,
        ),
        (
            "RA without its head",
            |mac, load| ipv6(mac, 44, load),
            first(134)[..8].into(),
            router,
        ),
        (
            "cut off options",
            |mac, load| ipv6(mac, 60, load),
            vec![58, 9, 0, 0, 0, 0, 0, 0],
            router,
        ),
    ];
    for (what, build, load, cause) in cases {
        assert_eq!(world.why_not(1, &build(vm(1), &load)), cause, "{what}");
        assert_eq!(world.why_not(2, &build(vm(2), &load)), None, "{what}");
    }
}

#[test]
fn r7_storms_are_limited() {
    let mut world = World::new([with(vnic(1), |port| port.storm_limit = Some(10)), vnic(2)]);
    let storm = |world: &mut World| {
        let sent = (0..100).filter(|_| !world.give(1, &plain(ALL, vm(1))).0.is_empty());
        sent.count()
    };
    assert_eq!(storm(&mut world), 10);
    assert_eq!(world.ports(1, vm(2), vm(1)), [2]);
    world.now += SECOND / 2;
    assert_eq!(storm(&mut world), 5);
    let counters = world.switch.counters(PortId(1)).unwrap();
    assert_eq!(counters.dropped(DropCause::Storm), 185);
}

#[test]
fn r8_guests_change_over_when_a_link_fails_and_are_announced() {
    let mut world = team();
    assert_eq!(world.ports(1, OUTSIDE, vm(1)), [UP]);
    assert_eq!(world.ports(2, OUTSIDE, vm(2)), [UP2]);
    world.switch.set_link(PortId(UP), false).unwrap();
    assert_eq!(world.announced(), [(UP2, vm(1), None)]);
    assert_eq!(world.ports(1, OUTSIDE, vm(1)), [UP2]);
    world.switch.set_link(PortId(UP2), false).unwrap();
    assert_eq!(world.announced(), []);
    assert_eq!(world.why(1, OUTSIDE, vm(1)), Some(DropCause::Unknown));
    assert_eq!(world.ports(1, vm(2), vm(1)), [2]);
    world.switch.set_link(PortId(UP), true).unwrap();
    assert_eq!(world.announced(), [(UP, vm(1), None), (UP, vm(2), None)]);
    world.switch.set_link(PortId(UP2), true).unwrap();
    assert_eq!(world.announced(), [(UP2, vm(2), None)]);
    assert_eq!(world.ports(2, OUTSIDE, vm(2)), [UP2]);
}

#[test]
fn r8_announcements_are_in_the_guests_vlans() {
    let trunk = with(vnic(2), |port| port.trunks = vec![7, 8]);
    let nested = with(vnic(3), |port| {
        port.forged_source = true;
        port.learning = Some(Learning::default());
    });
    let mut world = World::new([
        with(vnic(1), |port| port.tag = Some(6)),
        trunk,
        nested,
        uplink(UP),
        uplink(UP2),
    ]);
    world.give(3, &frame(OUTSIDE, NOBODY, &[(VLAN, 9)], 0x800, &[0; 46]));
    world.switch.set_link(PortId(UP), false).unwrap();
    let expected = [
        (UP2, vm(1), Some(6)),
        (UP2, vm(2), Some(7)),
        (UP2, vm(2), Some(8)),
        (UP2, vm(3), None),
        (UP2, NOBODY, Some(9)),
    ];
    assert_eq!(world.announced(), expected);
}

#[test]
fn r8_spread_by_port_uses_all_that_have_a_link() {
    let mut config = config([vnic(1), vnic(2), uplink(UP), uplink(UP2)]);
    config.teaming.spread = Spread::ByPort;
    let mut world = World::of(config);
    assert_eq!(world.ports(2, OUTSIDE, vm(2)), [UP]);
    assert_eq!(world.ports(1, OUTSIDE, vm(1)), [UP2]);
    world.switch.set_link(PortId(UP2), false).unwrap();
    assert_eq!(world.ports(1, OUTSIDE, vm(1)), [UP]);
}

#[test]
fn r9_vlan_0_is_a_priority_and_4095_is_nothing() {
    let mut world = World::new([
        with(vnic(1), |port| port.tag = Some(5)),
        with(vnic(2), |port| {
            port.tag = Some(5);
        }),
        uplink(UP),
    ]);
    let tagged = |tci| frame(ALL, vm(1), &[(VLAN, tci)], 0x0800, &[1; 46]);
    let (out, _) = world.give(1, &tagged(0xa000));
    assert_eq!(out[0], (2, frame(ALL, vm(1), &[], 0x0800, &[1; 46])));
    assert_eq!(
        out[1],
        (UP, frame(ALL, vm(1), &[(VLAN, 0xa005)], 0x0800, &[1; 46]))
    );
    assert_eq!(world.why_not(1, &tagged(4095)), Some(DropCause::Vlan4095));
    let inner = frame(ALL, OUTSIDE, &[(0x88a8, 5), (VLAN, 4095)], 0x0800, &[1; 46]);
    assert_eq!(world.why_not(UP, &inner), Some(DropCause::Vlan4095));
    assert_eq!(world.why_not(1, &tagged(5)), Some(DropCause::Vlan));
    let partial = &tagged(0)[..15];
    assert_eq!(world.why_not(1, partial), Some(DropCause::PartialTag));
}

#[test]
fn r9_what_untagging_makes_short_is_counted_padded() {
    let mut world = World::new([with(vnic(1), |port| port.tag = Some(5)), uplink(UP)]);
    let (out, _) = world.give(UP, &frame(vm(1), OUTSIDE, &[(VLAN, 5)], 0x0800, &[1; 42]));
    assert_eq!(out[0].1.len(), 60);
    assert_eq!(world.switch.counters(PortId(1)).unwrap().tx_bytes, 60);
}

#[test]
fn r10_a_flow_of_frames_keeps_to_one_uplink() {
    let mut world = team();
    for _ in 0..100 {
        assert_eq!(world.ports(1, ALL, vm(1)), [2, UP]);
        assert_eq!(world.ports(2, ALL, vm(2)), [1, UP2]);
    }
}
