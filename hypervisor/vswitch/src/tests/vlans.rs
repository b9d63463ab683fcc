//! Every VLAN mode against every form of frame, in and out.

use super::*;
use crate::port::{PriorityTags, VlanMode};

/// A guest's port with all addresses, in a VLAN mode with VLAN 5 its own and 5 to 7 its trunks.
fn mode(id: u8, mode: VlanMode) -> PortConfig {
    with(vnic(id), |port| {
        port.vlan_mode = Some(mode);
        port.tag = (mode != VlanMode::Trunk).then_some(5);
        port.trunks = vec![0, 6, 7];
        if mode == VlanMode::Trunk {
            port.trunks.push(5);
        }
    })
}

type Tagged<'a> = &'a [(u16, u16)];

/// What becomes of a broadcast with tags that comes in by port 1: its tags at port 2.
fn through(
    from: VlanMode,
    to: VlanMode,
    tags: Tagged<'_>,
    tune: fn(&mut PortConfig),
) -> Option<Vec<(u16, u16)>> {
    let mut world = World::new([mode(1, from), with(mode(2, to), tune)]);
    let (out, cause) = world.give(1, &frame(ALL, vm(1), tags, 0x88b5, &[9; 60]));
    assert_eq!(out.is_empty(), cause.is_some());
    let (_, bytes) = out.first()?;
    let key = crate::key::FlowKey::extract(bytes, PortId(0)).unwrap();
    assert_eq!(key.dl_type, 0x88b5);
    let tags = key.vlans.iter().filter(|tag| tag.present());
    Some(tags.map(|tag| (tag.tpid, tag.tci & !0x1000)).collect())
}

#[test]
fn every_mode_in_and_out() {
    use VlanMode::{Access, Dot1qTunnel, NativeTagged, NativeUntagged, Trunk};
    const S: u16 = 0x88a8;
    const NO: Option<Tagged<'static>> = None;
    let plain: Tagged<'static> = &[];
    let five: Tagged<'static> = &[(VLAN, 5)];
    let six: Tagged<'static> = &[(VLAN, 6)];
    let high: Tagged<'static> = &[(VLAN, 0x6000)];
    let five_high: Tagged<'static> = &[(VLAN, 0x6005)];
    let six_high: Tagged<'static> = &[(VLAN, 0x6006)];
    let double: Tagged<'static> = &[(S, 6), (VLAN, 9)];
    // What came in, and how it leaves an access port, a trunk, a native tagged and a native
    // untagged one, and a tunnel.
    type Row<'a> = (VlanMode, Tagged<'a>, [Option<Tagged<'a>>; 5]);
    let own = [
        Some(plain),
        Some(five),
        Some(five),
        Some(plain),
        Some(plain),
    ];
    let own_high = [
        Some(plain),
        Some(five_high),
        Some(five_high),
        Some(plain),
        Some(plain),
    ];
    let rows: [Row<'_>; 27] = [
        (Access, plain, own),
        (Access, high, own_high),
        (Access, five, [NO; 5]),
        (Access, six, [NO; 5]),
        (Access, double, [NO; 5]),
        // VLAN 0 is a trunk's own, and no native port's.
        (Trunk, plain, [NO, Some(plain), NO, NO, NO]),
        (Trunk, high, [NO, Some(high), NO, NO, NO]),
        (Trunk, five, own),
        (Trunk, five_high, own_high),
        (Trunk, six, [NO, Some(six), Some(six), Some(six), NO]),
        (
            Trunk,
            six_high,
            [NO, Some(six_high), Some(six_high), Some(six_high), NO],
        ),
        (
            Trunk,
            double,
            [NO, Some(double), Some(double), Some(double), NO],
        ),
        (Trunk, &[(VLAN, 8)], [NO; 5]),
        (NativeTagged, plain, own),
        (NativeTagged, high, own_high),
        (NativeTagged, five, own),
        (NativeTagged, six, [NO, Some(six), Some(six), Some(six), NO]),
        (NativeTagged, &[(VLAN, 8)], [NO; 5]),
        (NativeUntagged, plain, own),
        (NativeUntagged, high, own_high),
        (NativeUntagged, five, own),
        (
            NativeUntagged,
            double,
            [NO, Some(double), Some(double), Some(double), NO],
        ),
        (NativeUntagged, &[(VLAN, 4094)], [NO; 5]),
        (
            Dot1qTunnel,
            plain,
            [
                Some(plain),
                Some(&[(S, 5)]),
                Some(&[(S, 5)]),
                Some(plain),
                Some(plain),
            ],
        ),
        (
            Dot1qTunnel,
            six,
            [
                NO,
                Some(&[(S, 5), (VLAN, 6)]),
                Some(&[(S, 5), (VLAN, 6)]),
                NO,
                Some(six),
            ],
        ),
        (
            Dot1qTunnel,
            high,
            [
                Some(plain),
                Some(&[(S, 5), (VLAN, 0x6000)]),
                Some(&[(S, 5), (VLAN, 0x6000)]),
                Some(high),
                Some(high),
            ],
        ),
        (Dot1qTunnel, double, [NO; 5]),
    ];
    let modes = [Access, Trunk, NativeTagged, NativeUntagged, Dot1qTunnel];
    for (from, tags, expected) in rows {
        for (to, expected) in modes.into_iter().zip(expected) {
            let got = through(from, to, tags, |_| {});
            assert_eq!(got.as_deref(), expected, "{from:?} {tags:x?} to {to:?}");
        }
    }
}

#[test]
fn priority_tags_when_the_port_wants_them() {
    let nonzero = |port: &mut PortConfig| port.priority_tags = PriorityTags::IfNonzero;
    let always = |port: &mut PortConfig| port.priority_tags = PriorityTags::Always;
    let (access, trunk) = (VlanMode::Access, VlanMode::Trunk);
    let high: Tagged<'_> = &[(VLAN, 0x6000)];
    type Case<'a> = (
        VlanMode,
        Tagged<'a>,
        VlanMode,
        fn(&mut PortConfig),
        Tagged<'a>,
    );
    let cases: [Case<'_>; 8] = [
        (access, high, access, nonzero, high),
        (access, high, access, always, high),
        (access, &[], access, nonzero, &[]),
        (trunk, &[(VLAN, 0x6005)], access, nonzero, high),
        (trunk, &[(VLAN, 5)], access, nonzero, &[]),
        (trunk, &[(VLAN, 0)], trunk, always, &[(VLAN, 0)]),
        (trunk, &[(VLAN, 0)], trunk, nonzero, &[]),
        (
            trunk,
            &[(VLAN, 0x6005)],
            VlanMode::NativeUntagged,
            nonzero,
            high,
        ),
    ];
    for (from, tags, to, tune, expected) in cases {
        let got = through(from, to, tags, tune);
        assert_eq!(got.as_deref(), Some(expected), "{from:?} {tags:x?} {to:?}");
    }
}

#[test]
fn a_tunnel_carries_the_customers_it_names() {
    let tune = |port: &mut PortConfig| port.cvlans = vec![6];
    let trunk = |tags| through(VlanMode::Trunk, VlanMode::Dot1qTunnel, tags, tune);
    assert_eq!(trunk(&[(0x88a8, 5), (VLAN, 6)]), Some(vec![(VLAN, 6)]));
    assert_eq!(trunk(&[(0x88a8, 5), (VLAN, 7)]), None);
    let mut world = World::new([
        with(mode(1, VlanMode::Dot1qTunnel), tune),
        mode(2, VlanMode::Trunk),
    ]);
    let mut cause = |vlan| world.why_not(1, &frame(ALL, vm(1), &[(VLAN, vlan)], 0x88b5, &[9; 60]));
    let causes = [6, 7].map(&mut cause);
    assert_eq!(causes, [None, Some(DropCause::Vlan)]);
}

#[test]
fn the_mode_follows_from_the_tag() {
    assert_eq!(vnic(1).mode(), VlanMode::Trunk);
    assert_eq!(
        with(vnic(1), |port| port.tag = Some(0)).mode(),
        VlanMode::Access
    );
}

#[test]
fn a_guest_in_another_vlan_is_not_there() {
    let mut world = World::new([
        with(vnic(1), |port| port.tag = Some(5)),
        with(vnic(2), |port| port.tag = Some(6)),
        uplink(UP),
    ]);
    let (out, _) = world.give(1, &plain(vm(2), vm(1)));
    let tagged = frame(vm(2), vm(1), &[(VLAN, 5)], 0x88b5, &[7; 46]);
    assert_eq!(out, [(UP, tagged)]);
    let tagged = frame(vm(2), OUTSIDE, &[(VLAN, 5)], 0x88b5, &[7; 46]);
    assert_eq!(world.why_not(UP, &tagged), Some(DropCause::Unknown));
}

/// A guest in the native VLAN of an uplink cannot name another with a second tag.
#[test]
fn no_hop_into_another_vlan() {
    let native = |id: u16| {
        with(uplink(id), |port| {
            port.vlan_mode = Some(VlanMode::NativeUntagged);
            port.tag = Some(5);
        })
    };
    let mut world = World::new([
        mode(1, VlanMode::Trunk),
        mode(2, VlanMode::Access),
        native(UP),
    ]);
    let tagged = |from, tags: Tagged<'_>| frame(OUTSIDE, vm(from), tags, 0x88b5, &[9; 60]);
    let mut cause = |port: u8, tags: Tagged<'_>| world.why_not(port.into(), &tagged(port, tags));
    assert_eq!(cause(1, &[(VLAN, 5)]), None);
    assert_eq!(cause(1, &[(VLAN, 5), (VLAN, 6)]), Some(DropCause::Tags));
    assert_eq!(cause(1, &[(VLAN, 6), (VLAN, 5)]), None);
    assert_eq!(
        cause(2, &[(VLAN, 0), (VLAN, 0), (VLAN, 6)]),
        Some(DropCause::Tags)
    );
    let cut = &tagged(1, &[(VLAN, 5), (VLAN, 6)])[..19];
    assert_eq!(world.why_not(1, cut), Some(DropCause::PartialTag));
}
