//! From a key to what is done with the frame: runs the flow tables, calls NORMAL, and writes down
//! the steps.
//!
//! As in Open vSwitch, actions change a key, not the frame. Only when the frame is output is the
//! difference to what it looks like by then committed as steps, so one frame can leave several
//! ports with different tags, and a change that no output follows costs nothing.

use alloc::vec::Vec;
use core::fmt;

use arch::Nanos;

pub use crate::counters::DropCause;
use crate::key::{FlowKey, Vlan, ether, proto};
use crate::{MacAddr, PortId};

/// One thing to do with a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Step {
    /// Send it, as it is by now, out of a port.
    Output(PortId),
    /// Put a tag in front of those it has.
    PushVlan(Vlan),
    /// Take the outermost tag off.
    PopVlan,
    /// Change a field.
    Set(Field),
    /// Go on only if that meter lets it pass.
    Meter(u32),
}

/// A field and its new value.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Field {
    /// Source address.
    DlSrc(MacAddr),
    /// Destination address.
    DlDst(MacAddr),
    /// IP source, by the frame's own version.
    NwSrc([u8; 16]),
    /// IP destination.
    NwDst([u8; 16]),
    /// DSCP and ECN.
    NwTos(u8),
    /// Time to live or hop limit.
    NwTtl(u8),
    /// Source port, or ICMP's type.
    TpSrc(u16),
    /// Destination port, or ICMP's code.
    TpDst(u16),
    /// ARP's operation.
    ArpOp(u8),
    /// ARP's sender protocol address.
    ArpSpa([u8; 4]),
    /// ARP's target protocol address.
    ArpTpa([u8; 4]),
    /// ARP's sender.
    ArpSha(MacAddr),
    /// ARP's target.
    ArpTha(MacAddr),
    /// The address a neighbour message is about.
    NdTarget([u8; 16]),
}

/// How many steps a frame can need; what would go beyond is not done.
pub const MAX_STEPS: usize = 4096;

/// What is done with frames of one key. No output means that they are dropped.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Translation {
    /// In order.
    pub steps: Vec<Step>,
    /// Why nothing, or less than asked, leaves.
    pub drop: Option<DropCause>,
}

/// What flows need of the switch they are in.
pub trait Normal {
    /// A frame came in: mirrors of the input port.
    fn begin(&mut self, key: &FlowKey, now: Nanos, out: &mut Emit<'_>);

    /// The action `normal`. `key` is as the actions before have left it.
    fn normal(&mut self, key: &FlowKey, now: Nanos, out: &mut Emit<'_>);

    /// The action `output`: sends the frame of `key` out of `port`, if there is such a port and the
    /// rules allow it, and mirrors it. `key.in_port` is never `port` but for the action `in_port`.
    fn output(&mut self, port: PortId, key: &FlowKey, out: &mut Emit<'_>);

    /// The action `flood`: the ports it means, but for the input port, in order of their numbers.
    fn flood(&self) -> Vec<PortId>;
}

/// Writes steps down, with the changes that each output needs in front of it.
pub struct Emit<'a> {
    /// What the frame looks like after the steps so far.
    base: FlowKey,
    /// What it is to look like when it is output next.
    current: FlowKey,
    translation: &'a mut Translation,
    trace: Option<&'a mut dyn fmt::Write>,
}

impl<'a> Emit<'a> {
    /// Begins with a frame of `key`.
    pub fn new(
        key: FlowKey,
        translation: &'a mut Translation,
        trace: Option<&'a mut dyn fmt::Write>,
    ) -> Self {
        translation.steps.clear();
        translation.drop = None;
        Self {
            base: key,
            current: key,
            translation,
            trace,
        }
    }

    /// Sends the frame out of `port` with these tags instead of those it has.
    pub fn output(&mut self, port: PortId, vlans: [Vlan; 2]) {
        let own = core::mem::replace(&mut self.current.vlans, vlans);
        self.commit();
        self.current.vlans = own;
        self.step(Step::Output(port));
    }

    /// Notes why the frame, or a copy of it, is not forwarded. The first cause stays.
    pub fn drop(&mut self, cause: DropCause) {
        self.translation.drop.get_or_insert(cause);
    }

    /// How many steps there are so far.
    #[must_use]
    pub fn steps(&self) -> usize {
        self.translation.steps.len()
    }

    /// Says a line of the trace, if somebody listens.
    pub fn say(&mut self, what: fmt::Arguments<'_>) {
        if let Some(trace) = &mut self.trace {
            // A listener that takes no more has what it wanted.
            let _ = trace.write_fmt(what).and_then(|()| trace.write_char('\n'));
        }
    }

    fn step(&mut self, step: Step) {
        if self.translation.steps.len() < MAX_STEPS {
            self.translation.steps.push(step);
        } else {
            self.drop(DropCause::TooManySteps);
        }
    }

    /// Writes the difference between the frame as it is and as it is to be.
    fn commit(&mut self) {
        let (from, to) = (self.base, self.current);
        self.set(from.dl_src, to.dl_src, Field::DlSrc);
        self.set(from.dl_dst, to.dl_dst, Field::DlDst);
        match to.dl_type {
            ether::IPV4 | ether::IPV6 => {
                self.set(from.nw_src, to.nw_src, Field::NwSrc);
                self.set(from.nw_dst, to.nw_dst, Field::NwDst);
                self.set(from.nw_tos, to.nw_tos, Field::NwTos);
                self.set(from.nw_ttl, to.nw_ttl, Field::NwTtl);
                self.set(from.tp_src, to.tp_src, Field::TpSrc);
                self.set(from.tp_dst, to.tp_dst, Field::TpDst);
                if to.nw_proto == proto::ICMPV6 {
                    self.set(from.nd_target, to.nd_target, Field::NdTarget);
                }
            }
            ether::ARP | ether::RARP => {
                let v4 = |[.., a, b, c, d]: [u8; 16]| [a, b, c, d];
                self.set(from.nw_proto, to.nw_proto, Field::ArpOp);
                self.set(v4(from.nw_src), v4(to.nw_src), Field::ArpSpa);
                self.set(v4(from.nw_dst), v4(to.nw_dst), Field::ArpTpa);
                self.set(from.arp_sha, to.arp_sha, Field::ArpSha);
                self.set(from.arp_tha, to.arp_tha, Field::ArpTha);
            }
            _ => {}
        }
        self.retag(from.vlans, to.vlans);
        self.base = to;
    }

    fn set<T: PartialEq>(&mut self, from: T, to: T, field: fn(T) -> Field) {
        if from != to {
            self.step(Step::Set(field(to)));
        }
    }

    /// Pops what is not to stay, outermost first, and pushes what is to come: the innermost tags
    /// that are the same stay.
    fn retag(&mut self, from: [Vlan; 2], to: [Vlan; 2]) {
        let count = |vlans: &[Vlan; 2]| vlans.iter().take_while(|v| v.present()).count();
        let (had, wants) = (count(&from), count(&to));
        let inner = from[..had].iter().rev().zip(to[..wants].iter().rev());
        let same = inner.take_while(|(a, b)| a == b).count();
        for _ in same..had {
            self.step(Step::PopVlan);
        }
        for vlan in to[..wants - same].iter().rev() {
            self.step(Step::PushVlan(*vlan));
        }
    }
}
