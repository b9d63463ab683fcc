//! The pipeline of the action `normal`, stage by stage as Open vSwitch has it (ovs-actions(7)),
//! with the rules for uplinks put in.
//!
//! A frame is first admitted by its port, before any flow sees it; then `normal` (or a flow's
//! `output`) names ports; then each output passes a last gate, whoever named it. So rules hold
//! whatever flows say: R1, R2, R6, R9 and `protected` at the gate, R2, R4, R5, R7 and R9 at the
//! entry.
//!
//! What differs from Open vSwitch, because a rule wants it or nothing better can be done:
//!
//! | here | there |
//! | --- | --- |
//! | From uplink to uplink nothing goes, flows' outputs and mirrors among it (R1). | Only where both are `protected`. |
//! | To 01-80-C2-00-00-00 … 0F nothing goes, by flows neither, and mirrors do not see it; LLDP from an uplink goes to management ports with `lldp` (R2). | Flows can output it; `normal` drops more: vendors' groups, too. |
//! | Vendors' bridge groups are dropped from guests without `bpdu` (R7), and relayed from others. | Always dropped by `normal`. |
//! | Unicast goes by the configured addresses; to unknown ones from guests to their uplink and to ports that learn with `flood`, from uplinks to the latter alone (R3). | Learned on every port; unknown ones to all. |
//! | Ports learn when they are told to; an address stays for a second before it moves; configured ones are never learned. | Every port learns, always. |
//! | Groups come in by the active uplink alone, go out by the guest's own alone (R4, R10). | By all ports, unless bonded. |
//! | From an uplink nothing comes with the address of a guest that is here (R5). | Only so for bonds. |
//! | Guests' frames with others' addresses, DHCP answers and router advertisements are dropped where the policy says so, before mirrors and flows (R7). | No such policy. |
//! | VLAN 4095 neither enters nor leaves (R9). | It is a VLAN as others. |
//! | A frame with three tags does not enter, nor one whose second tag is cut off, nor one with two tags by a tunnel port: it would need a third. | What is behind the second tag is payload; a tunnel loses the inner tag. |
//! | A frame in the native VLAN of a native-untagged port does not leave there if it has a second tag: that would stand for another VLAN on the wire. | The second tag becomes its VLAN. |
//! | A frame with a second tag never leaves by an access port, nor by a tunnel whose `cvlans` have not that tag; an address there is unknown to it. | Broadcast the same; but it is sent to a known address, and an access port loses the tag. |
//! | A frame that flows would give a third tag is dropped there. | The innermost gets lost. |
//! | `flood` and `all` send by the uplink of the frame's own VLAN alone. | To all ports. |
//! | A mirror's `output_vlan` never goes back to the port that the frame came from, and out by one uplink alone. | To all ports of the VLAN. |
//! | A port whose link is down neither sends nor receives. | Frames are queued to it all the same. |
//! | Beacons of such switches end at the uplink that hears them (R8). | No such frames. |
//! | ICMP's type and code are not changed in later fragments, which have none. | What stands there is changed. |
//! | Guests that may be, and asked to be, promiscuous see the unicasts of their VLANs. | No such port. |

use alloc::vec::Vec;

use arch::Nanos;

use crate::counters::DropCause;
use crate::key::{FlowKey, ether};
use crate::learn::Learned;
use crate::mirror::{CAPTURE, Target};
use crate::policy::{self, LLDP};
use crate::port::{Port, PortKind, Tags};
use crate::switch::Core;
use crate::translate::{Emit, Normal};
use crate::{MacAddr, PortId};

/// For how long after a VM came from another machine, or an address was learned, announcements
/// from outside do not take it away, in nanoseconds: they are echoes of its own (R5).
pub const ARRIVAL_LOCK: u64 = 5_000_000_000;

/// A frame on its way through the switch.
pub(crate) struct Pass<'a> {
    core: &'a mut Core,
    /// The place of the port that it really came in by, whatever flows make of `in_port`.
    entry: usize,
    /// The VLAN that it is in there.
    vlan: Option<u16>,
    /// Only looking: nothing is learned.
    quiet: bool,
    /// The mirrors that have had it.
    mirrored: u32,
    /// It counts against the storm limit.
    pub storm: bool,
    /// Where its source was learned.
    pub learned: Option<u32>,
    /// The same frame is decided the same way until something changes.
    pub lasting: bool,
    /// Something that other decisions rest on has changed.
    pub changed: bool,
}

/// Whether a VM announces where it is: ARP as Open vSwitch has it, or any broadcast RARP.
fn is_gratuitous(key: &FlowKey) -> bool {
    key.dl_dst == MacAddr::BROADCAST
        && match (key.dl_type, key.nw_proto) {
            (ether::ARP, 1) => key.nw_src == key.nw_dst,
            (ether::ARP, 2) | (ether::RARP, _) => true,
            _ => false,
        }
}

impl<'a> Pass<'a> {
    /// A frame that came in by the port at `entry`.
    pub fn new(core: &'a mut Core, entry: usize, key: &FlowKey, quiet: bool) -> Self {
        let port = core.ports.get(entry);
        let tags = port.and_then(|port| port.vlan.enter(key.vlans).ok());
        Self {
            core,
            entry,
            vlan: tags.map(Tags::vlan),
            quiet,
            mirrored: 0,
            storm: key.dl_dst.is_group(),
            learned: None,
            lasting: true,
            changed: false,
        }
    }

    /// Checks what flows have no say in. LLDP for the management is handed over at once.
    ///
    /// # Errors
    /// Why the frame is dropped.
    pub fn admit(
        &mut self,
        key: &FlowKey,
        now: Nanos,
        out: &mut Emit<'_>,
    ) -> Result<(), DropCause> {
        let port = self.core.ports.get(self.entry).ok_or(DropCause::NoPort)?;
        if !port.up {
            return Err(DropCause::LinkDown);
        }
        let from_uplink = port.is(PortKind::Uplink);
        let admitted = policy::admit(port, key);
        if admitted == Err(DropCause::Reserved) && from_uplink && key.dl_type == LLDP {
            for place in 0..self.core.ports.len() {
                let port = self.core.ports.get(place);
                if port.is_some_and(|port| port.config.lldp) {
                    self.deliver(place, key, out);
                }
            }
        }
        admitted?;
        if from_uplink {
            if Core::is_beacon(key) {
                // Each is listened to.
                self.lasting = false;
                return Err(DropCause::Beacon);
            }
            self.admit_outside(key, now)?;
        }
        Ok(())
    }

    /// Rules R4 and R5.
    fn admit_outside(&mut self, key: &FlowKey, now: Nanos) -> Result<(), DropCause> {
        let vlan = self.vlan.unwrap_or(0);
        if key.dl_dst.is_group() && self.core.active(vlan) != Some(self.entry) {
            return Err(DropCause::PassiveUplink);
        }
        let gratuitous = is_gratuitous(key);
        let locked = |since: Nanos| now.since(since) < ARRIVAL_LOCK;
        if let Some(port) = self.core.owner(key.dl_src) {
            let port = self.core.ports.get_mut(port).ok_or(DropCause::Echo)?;
            if !gratuitous || !port.leaving {
                return Err(DropCause::Echo);
            }
            self.lasting = false;
            if port.arrived.is_some_and(locked) {
                return Err(DropCause::Echo);
            }
            if !self.quiet {
                port.departed = true;
                self.changed = true;
            }
        } else if let Some(entry) = self.core.learned.find(key.dl_src, vlan).copied() {
            let place = self.core.place(entry.port);
            let port = place.and_then(|place| self.core.ports.get(place));
            if !port.is_some_and(Port::is_local) {
                return Ok(());
            }
            self.lasting &= !gratuitous;
            if !gratuitous || locked(entry.since) {
                return Err(DropCause::Echo);
            }
            if !self.quiet {
                self.core.forget_one(entry.mac, vlan);
                self.changed = true;
            }
        }
        Ok(())
    }

    /// Whether the frame may leave by the port at `to`.
    fn gate(&self, to: &Port, place: usize, key: &FlowKey) -> Result<(), DropCause> {
        let entry = self.core.ports.get(self.entry).ok_or(DropCause::NoPort)?;
        if !to.up {
            return Err(DropCause::LinkDown);
        }
        if key.dl_dst.is_reserved() {
            let managed = to.config.lldp && key.dl_type == LLDP && entry.is(PortKind::Uplink);
            return if managed {
                Ok(())
            } else {
                Err(DropCause::Reserved)
            };
        }
        if key
            .vlans
            .iter()
            .any(|tag| tag.present() && tag.id() == 4095)
        {
            return Err(DropCause::Vlan4095);
        }
        if entry.config.protected && to.config.protected {
            return Err(DropCause::Protected);
        }
        if entry.is(PortKind::Uplink) {
            if to.is(PortKind::Uplink) {
                return Err(DropCause::UplinkToUplink);
            }
            let own = || self.core.uplink_of(place, self.vlan.unwrap_or(0));
            let strict = self.core.teaming.reverse_path && !key.dl_dst.is_group();
            if strict && to.is_local() && own() != Some(self.entry) {
                return Err(DropCause::ReversePath);
            }
        }
        Ok(())
    }

    /// Sends the frame, as `key` is, out of the port at `place`, and its copies to mirrors.
    fn deliver(&mut self, place: usize, key: &FlowKey, out: &mut Emit<'_>) {
        let Some(port) = self.core.ports.get(place) else {
            return out.drop(DropCause::NoPort);
        };
        let (id, mirrors) = (port.id(), port.mirror_dst);
        if let Err(cause) = self.gate(port, place, key) {
            out.say(format_args!("port {}: not sent: {}", id.0, cause.word()));
            return out.drop(cause);
        }
        out.output(id, key.vlans);
        self.mirror(place, mirrors, key, out);
    }

    /// Sends the frame with the tags of the port at `place`.
    fn send(&mut self, place: usize, tags: Tags, key: &FlowKey, out: &mut Emit<'_>) {
        let Some(port) = self.core.ports.get(place) else {
            return;
        };
        let Some(vlans) = port.vlan.leave(tags, key.vlans) else {
            return out.drop(DropCause::Tags);
        };
        let form = FlowKey { vlans, ..*key };
        self.deliver(place, &form, out);
    }

    /// Copies a frame that comes in, or leaves, by the port at `place` to those `mirrors` of it
    /// that select its VLAN and have not had it.
    fn mirror(&mut self, place: usize, mirrors: u32, key: &FlowKey, out: &mut Emit<'_>) {
        let port = self.core.ports.get(place);
        let Some(tags) = port.and_then(|port| port.vlan.enter(key.vlans).ok()) else {
            return;
        };
        for number in 0..self.core.mirrors.len() {
            if mirrors & !self.mirrored & 1 << number == 0 {
                continue;
            }
            let Some(mirror) = self.core.mirrors.get_mut(number) else {
                continue;
            };
            let vlans = &mirror.vlans;
            if vlans.as_ref().is_some_and(|vlans| !vlans.has(tags.vlan())) {
                continue;
            }
            self.mirrored |= mirror.same;
            match mirror.target {
                Target::Port(to) => self.send(to, tags, key, out),
                Target::Capture => out.output(CAPTURE, key.vlans),
                Target::Vlan(vlan) if vlan == tags.vlan() => {}
                Target::Vlan(vlan) => {
                    let tags = tags.moved_to(vlan);
                    let own = self.core.uplink_of(self.entry, vlan);
                    self.send_to_all(tags, self.entry, own, key, out);
                }
            }
        }
    }

    /// Sends the frame to all ports of its VLAN but `input`, of uplinks to `uplink` alone.
    fn send_to_all(
        &mut self,
        tags: Tags,
        input: usize,
        uplink: Option<usize>,
        key: &FlowKey,
        out: &mut Emit<'_>,
    ) {
        for place in 0..self.core.ports.len() {
            let Some(port) = self.core.ports.get(place) else {
                continue;
            };
            let meant = match port.config.kind {
                PortKind::Vnic | PortKind::Management => true,
                PortKind::Uplink => uplink == Some(place),
                PortKind::Mirror => false,
            };
            if meant && place != input && port.up && port.vlan.includes(tags) {
                self.send(place, tags, key, out);
            }
        }
    }

    /// Learns where the source is, if its port is to.
    fn learn(&mut self, input: usize, vlan: u16, source: MacAddr, now: Nanos) {
        let Some(port) = self.core.ports.get_mut(input) else {
            return;
        };
        let Some(learning) = port.config.learning else {
            return;
        };
        if self.quiet || !source.is_station() || self.core.owner(source).is_some() {
            return;
        }
        let Some(port) = self.core.ports.get_mut(input) else {
            return;
        };
        let room = port.learned < learning.limit;
        match self.core.learned.learn(source, vlan, port.id(), now, room) {
            Learned::Known(place) => self.learned = Some(place),
            Learned::New(place) => {
                port.learned += 1;
                (self.learned, self.changed) = (Some(place), true);
            }
            Learned::Moved(from, place) => {
                port.learned += 1;
                (self.learned, self.changed) = (Some(place), true);
                let from = self.core.place(from);
                if let Some(from) = from.and_then(|from| self.core.ports.get_mut(from)) {
                    from.learned = from.learned.saturating_sub(1);
                }
            }
            Learned::Later => self.lasting = false,
            Learned::Full => port.counters.not_learned += 1,
        }
    }

    /// Where a unicast goes: its port, or none that is known.
    fn destination(&self, input: usize, tags: Tags, destination: MacAddr) -> Option<usize> {
        let place = match self.core.owner(destination) {
            Some(place) => place,
            None => {
                let entry = self.core.learned.find(destination, tags.vlan())?;
                self.core.place(entry.port)?
            }
        };
        let port = self.core.ports.get(place)?;
        if place != input && port.is(PortKind::Uplink) {
            // Outside; by which uplink is not for it to say.
            return match self.core.ports.get(input) {
                Some(from) if from.is(PortKind::Uplink) => Some(place),
                _ => self.core.uplink_of(input, tags.vlan()).filter(|uplink| {
                    let port = self.core.ports.get(*uplink);
                    port.is_some_and(|port| port.vlan.includes(tags))
                }),
            };
        }
        port.vlan.includes(tags).then_some(place)
    }

    /// Sends a unicast to nobody who is known to the guest's uplink.
    fn send_outside(&mut self, input: usize, tags: Tags, key: &FlowKey, out: &mut Emit<'_>) {
        let uplink = self.core.uplink_of(input, tags.vlan());
        let port = uplink.and_then(|uplink| self.core.ports.get(uplink));
        if let Some(uplink) = uplink
            && port.is_some_and(|port| port.vlan.includes(tags))
        {
            self.send(uplink, tags, key, out);
        }
    }

    /// Copies a unicast to those who see all of their VLANs and, if nobody is `known` to have its
    /// address, to those behind whom somebody may.
    fn send_to_listeners(
        &mut self,
        input: usize,
        known: Option<usize>,
        tags: Tags,
        key: &FlowKey,
        out: &mut Emit<'_>,
    ) {
        for turn in 0..self.core.listeners.len() {
            let Some(&place) = self.core.listeners.get(turn) else {
                continue;
            };
            let port = self.core.ports.get(place);
            let Some(port) = port.filter(|port| port.sees_all || known.is_none()) else {
                continue;
            };
            if place != input && known != Some(place) && port.up && port.vlan.includes(tags) {
                self.storm |= !port.sees_all;
                self.send(place, tags, key, out);
            }
        }
    }
}

impl Normal for Pass<'_> {
    fn begin(&mut self, key: &FlowKey, _now: Nanos, out: &mut Emit<'_>) {
        let port = self.core.ports.get(self.entry);
        let mirrors = port.map_or(0, |port| port.mirror_src);
        if mirrors != 0 {
            self.mirror(self.entry, mirrors, key, out);
        }
    }

    fn normal(&mut self, key: &FlowKey, now: Nanos, out: &mut Emit<'_>) {
        let Some(input) = self.core.place(key.in_port) else {
            return out.drop(DropCause::NoPort);
        };
        let Some(port) = self.core.ports.get(input) else {
            return out.drop(DropCause::NoPort);
        };
        if port.is(PortKind::Mirror) {
            return out.drop(DropCause::MirrorPort);
        }
        let from_uplink = port.is(PortKind::Uplink);
        let tags = match port.vlan.enter(key.vlans) {
            Ok(tags) => tags,
            Err(cause) => {
                out.say(format_args!("port {} does not admit VLAN", port.id().0));
                return out.drop(cause);
            }
        };
        if key.dl_dst.is_reserved() {
            return out.drop(DropCause::Reserved);
        }
        let vlan = tags.vlan();
        out.say(format_args!("normal: in VLAN {vlan}"));
        self.learn(input, vlan, key.dl_src, now);
        let before = out.steps();
        if key.dl_dst.is_group() {
            self.storm = true;
            let uplink = self.core.uplink_of(input, vlan).filter(|_| !from_uplink);
            self.send_to_all(tags, input, uplink, key, out);
            if out.steps() == before {
                out.drop(DropCause::NoOutput);
            }
            return;
        }
        let known = self.destination(input, tags, key.dl_dst);
        match known {
            Some(place) if place == input => out.drop(DropCause::SamePort),
            Some(place) => self.send(place, tags, key, out),
            None if from_uplink => {}
            None => self.send_outside(input, tags, key, out),
        }
        self.send_to_listeners(input, known, tags, key, out);
        if out.steps() == before {
            out.drop(DropCause::Unknown);
        }
    }

    fn output(&mut self, port: PortId, key: &FlowKey, out: &mut Emit<'_>) {
        match self.core.place(port) {
            Some(place) => self.deliver(place, key, out),
            None => out.drop(DropCause::NoPort),
        }
    }

    fn flood(&self) -> Vec<PortId> {
        let uplink = self.core.uplink_of(self.entry, self.vlan.unwrap_or(0));
        let ports = self.core.ports.iter().enumerate();
        let meant = ports.filter(|(place, port)| {
            *place != self.entry && (port.is_local() || uplink == Some(*place))
        });
        meant.map(|(_, port)| port.id()).collect()
    }
}
