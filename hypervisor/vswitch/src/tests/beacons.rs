//! R8: uplinks that have a link and lead nowhere.

use super::*;
use crate::beacon;

const UP3: u16 = 102;
const ALL_UP: [u16; 3] = [UP, UP2, UP3];

/// For some seconds beacons go from uplinks to those that `hears` (hearer, sender) joins.
fn seconds(world: &mut World, count: u64, hears: impl Fn(u16, u16) -> bool) {
    for _ in 0..count {
        world.now += SECOND;
        world.switch.tick(Nanos(world.now));
        let (mut frame, mut sent) = ([0; 64], Vec::new());
        while let Some((port, length)) = world.switch.announcement(&mut frame) {
            if frame[12..14] == beacon::ETHER_TYPE.to_be_bytes() {
                sent.push((port.0, frame[..length].to_vec()));
            }
        }
        for (sender, frame) in sent {
            for hearer in ALL_UP
                .into_iter()
                .filter(|at| *at != sender && hears(*at, sender))
            {
                let (out, cause) = world.give(hearer, &frame);
                assert_eq!((out, cause), (Vec::new(), Some(DropCause::Beacon)));
            }
        }
    }
}

fn three() -> World {
    let mut world = World::new([vnic(1), uplink(UP), uplink(UP2), uplink(UP3)]);
    seconds(&mut world, 5, |_, _| true);
    assert_eq!(world.switch.active_uplink(0), Some(PortId(UP)));
    world
}

fn apart(one: u16) -> impl Fn(u16, u16) -> bool {
    move |a, b| a != one && b != one
}

#[test]
fn an_uplink_that_nobody_hears_is_left_and_taken_again() {
    let mut world = three();
    assert_eq!(world.ports(1, OUTSIDE, vm(1)), [UP]);
    seconds(&mut world, 3, apart(UP));
    assert_eq!(
        world.switch.active_uplink(0),
        Some(PortId(UP)),
        "three may get lost"
    );
    seconds(&mut world, 2, apart(UP));
    assert!(world.switch.is_lost(PortId(UP)));
    assert_eq!(world.ports(1, OUTSIDE, vm(1)), [UP2]);
    assert_eq!(world.why(UP, ALL, OUTSIDE), Some(DropCause::PassiveUplink));
    seconds(&mut world, 2, |_, _| true);
    assert!(!world.switch.is_lost(PortId(UP)));
    assert_eq!(world.ports(1, OUTSIDE, vm(1)), [UP]);
}

#[test]
fn guests_are_announced_when_an_uplink_is_lost() {
    let mut world = three();
    seconds(&mut world, 3, apart(UP));
    world.announced();
    world.now += SECOND;
    world.switch.tick(Nanos(world.now));
    assert!(world.switch.is_lost(PortId(UP)));
    assert_eq!(world.announced(), [(UP2, vm(1), None)]);
}

#[test]
fn another_configuration_of_the_same_uplinks_knows_who_is_lost() {
    let mut world = three();
    seconds(&mut world, 5, apart(UP));
    let mut config = world.switch.config().clone();
    config.flows = vec!["priority=0,actions=normal".into()];
    world.switch.replace(config.clone()).unwrap();
    assert_eq!(world.switch.active_uplink(0), Some(PortId(UP2)));
    seconds(&mut world, 1, apart(UP));
    assert!(world.switch.is_lost(PortId(UP)));
    // Of two that are left, nobody can tell any more.
    config.ports.pop();
    world.switch.replace(config).unwrap();
    assert_eq!(world.switch.active_uplink(0), Some(PortId(UP)));
}

#[test]
fn one_that_only_sends_or_only_hears_is_lost() {
    let mut world = three();
    seconds(&mut world, 6, |hearer, _| hearer != UP);
    assert!(world.switch.is_lost(PortId(UP)));
    let mut world = three();
    seconds(&mut world, 6, |_, sender| sender != UP);
    assert!(world.switch.is_lost(PortId(UP)));
}

#[test]
fn where_nobody_hears_anybody_nobody_is_lost() {
    let mut world = three();
    seconds(&mut world, 10, |_, _| false);
    assert_eq!(world.switch.active_uplink(0), Some(PortId(UP)));
    assert!(ALL_UP.iter().all(|id| !world.switch.is_lost(PortId(*id))));
}

#[test]
fn two_cannot_tell() {
    let mut world = three();
    world.switch.set_link(PortId(UP3), false).unwrap();
    seconds(&mut world, 10, |_, _| false);
    assert_eq!(world.switch.active_uplink(0), Some(PortId(UP)));
    let mut two = World::new([vnic(1), uplink(UP), uplink(UP2)]);
    two.switch.tick(Nanos(SECOND));
    assert_eq!(two.switch.announcement(&mut [0; 64]), None);
}

#[test]
fn a_link_that_comes_back_is_used_when_it_is_heard() {
    let mut world = three();
    world.switch.set_link(PortId(UP), false).unwrap();
    assert_eq!(world.switch.active_uplink(0), Some(PortId(UP2)));
    // With one gone, two cannot tell; when it comes, they still hear each other.
    seconds(&mut world, 1, apart(UP));
    world.switch.set_link(PortId(UP), true).unwrap();
    seconds(&mut world, 1, apart(UP));
    assert_eq!(world.switch.active_uplink(0), Some(PortId(UP2)));
    seconds(&mut world, 2, |_, _| true);
    assert_eq!(world.switch.active_uplink(0), Some(PortId(UP)));
}

#[test]
fn a_lost_uplink_is_better_than_none() {
    let only = |id, vlan| with(uplink(id), |port| port.trunks = vec![vlan]);
    let mut world = World::new([
        with(vnic(1), |port| port.tag = Some(5)),
        only(UP, 5),
        only(UP2, 6),
        only(UP3, 6),
    ]);
    seconds(&mut world, 6, apart(UP));
    assert!(world.switch.is_lost(PortId(UP)));
    assert_eq!(world.switch.active_uplink(5), Some(PortId(UP)));
}

#[test]
fn forged_old_and_strange_beacons_vouch_for_nobody() {
    let mut world = three();
    let mut frame = [0; 64];
    world.now += SECOND;
    world.switch.tick(Nanos(world.now));
    let mut old = Vec::new();
    while let Some((port, length)) = world.switch.announcement(&mut frame) {
        old.push((port.0, frame[..length].to_vec()));
    }
    assert_eq!(old.len(), 3);
    for _ in 0..10 {
        seconds(&mut world, 1, apart(UP));
        for (sender, frame) in &old {
            for hearer in ALL_UP.into_iter().filter(|at| at != sender) {
                world.give(hearer, frame);
                // A beat that was not yet, with a sum of another.
                let mut changed = frame.clone();
                changed[23] = changed[23].wrapping_add(20);
                world.give(hearer, &changed);
                world.give(hearer, &frame[..30]);
            }
        }
    }
    assert!(world.switch.is_lost(PortId(UP)));
    // Another host's switch has another secret; its beacons end here, too.
    let mut other = Switch::new(config(ALL_UP.map(uplink)), [5, 6]).unwrap();
    other.tick(Nanos(SECOND));
    let (_, length) = other.announcement(&mut frame).unwrap();
    assert_eq!(
        world.why_not(UP2, &frame[..length]),
        Some(DropCause::Beacon)
    );
}
