//! From a key to what is done with the frame: runs the flow tables, calls NORMAL, and writes down
//! the steps.
//!
//! As in Open vSwitch, actions change a key, not the frame. Only when the frame is output is the
//! difference to what it looks like by then committed as steps, so one frame can leave several
//! ports with different tags, and a change that no output follows costs nothing.

use alloc::string::ToString;
use alloc::vec::Vec;
use core::fmt;

use arch::Nanos;

pub use crate::counters::DropCause;
use crate::flow::{Action, Flow};
use crate::key::{FRAG_LATER, FlowKey, Vlan, ether, ipv4, proto};
use crate::tables::{FlowIndex, FlowTables};
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
    /// TCP's or UDP's source port, or the type of an ICMP message.
    TpSrc(u16),
    /// TCP's or UDP's destination port, or the code of an ICMP message.
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
    /// Its source link-layer address option, if it has one.
    NdSll(MacAddr),
    /// Its target link-layer address option, if it has one.
    NdTll(MacAddr),
}

/// How many steps a frame can need; what would go beyond is not done.
pub const MAX_STEPS: usize = 4096;

/// What is done with frames of one key. No output means that they are dropped.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Translation {
    /// In order.
    pub steps: Vec<Step>,
    /// The flows that decided it, for their counters.
    pub hits: Vec<FlowIndex>,
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
    /// How far lines of the trace are indented.
    indent: usize,
}

impl<'a> Emit<'a> {
    /// Begins with a frame of `key`.
    pub fn new(
        key: FlowKey,
        translation: &'a mut Translation,
        trace: Option<&'a mut dyn fmt::Write>,
    ) -> Self {
        translation.steps.clear();
        translation.hits.clear();
        translation.drop = None;
        Self {
            base: key,
            current: key,
            translation,
            trace,
            indent: 0,
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
            let indent = self.indent;
            // A listener that takes no more has what it wanted.
            let _ = writeln!(trace, "{:indent$}{what}", "");
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
        // As in Open vSwitch, no protocol means that there is no such header, or a broken one; and no
        // port that there is none of the transport.
        match to.dl_type {
            _ if to.nw_proto == 0 => {}
            ether::IPV4 | ether::IPV6 => {
                self.set(from.nw_src, to.nw_src, Field::NwSrc);
                self.set(from.nw_dst, to.nw_dst, Field::NwDst);
                self.set(from.nw_tos, to.nw_tos, Field::NwTos);
                self.set(from.nw_ttl, to.nw_ttl, Field::NwTtl);
                let ported = matches!(to.nw_proto, proto::TCP | proto::UDP);
                if to.is_message() || ported && (from.tp_src, from.tp_dst) != (0, 0) {
                    self.set(from.tp_src, to.tp_src, Field::TpSrc);
                    self.set(from.tp_dst, to.tp_dst, Field::TpDst);
                }
                if to.is_neighbour() {
                    self.set(from.nd_target, to.nd_target, Field::NdTarget);
                    self.set(from.arp_sha, to.arp_sha, Field::NdSll);
                    self.set(from.arp_tha, to.arp_tha, Field::NdTll);
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
        fn tags(vlans: &[Vlan; 2]) -> &[Vlan] {
            match vlans {
                [outer, _] if !outer.present() => &[],
                [outer, inner] if !inner.present() => core::slice::from_ref(outer),
                _ => vlans,
            }
        }
        let (had, wants) = (tags(&from), tags(&to));
        let inner = had.iter().rev().zip(wants.iter().rev());
        let same = inner.take_while(|(a, b)| a == b).count();
        for _ in same..had.len() {
            self.step(Step::PopVlan);
        }
        for vlan in wants.iter().rev().skip(same) {
            self.step(Step::PushVlan(*vlan));
        }
    }
}

impl FlowTables {
    /// Decides what is done with a frame of `key`: runs the tables from table 0 on.
    pub fn run(&self, normal: &mut impl Normal, key: &FlowKey, now: Nanos, out: &mut Emit<'_>) {
        let tables = self;
        let mut run = Run {
            tables,
            normal,
            now,
            out,
        };
        run.table(0, key.in_port);
        if out.steps() == 0 {
            out.drop(DropCause::Flow);
        }
    }
}

/// A frame's way through the tables.
struct Run<'a, 'b, 'c, N> {
    tables: &'a FlowTables,
    normal: &'a mut N,
    now: Nanos,
    out: &'b mut Emit<'c>,
}

impl<N: Normal> Run<'_, '_, '_, N> {
    /// Looks the frame up, as if it came from `port`, and does what its flow says. Tables lead to
    /// later ones only ([`FlowTables`] sees to it), so this ends.
    fn table(&mut self, table: u8, port: PortId) {
        let key = FlowKey {
            in_port: port,
            ..self.out.current
        };
        let tables = self.tables;
        let found = tables.lookup(table, &key);
        let Some((index, flow)) = found.and_then(|i| Some((i, tables.flow(i)?))) else {
            self.out.say(format_args!("{table:2}. No match."));
            self.out.say(format_args!("    drop"));
            return;
        };
        if self.out.trace.is_some() {
            let matching = flow.matching.to_string();
            let gap = if matching.is_empty() { "" } else { ", " };
            let priority = flow.priority;
            self.out.say(format_args!(
                "{table:2}. {matching}{gap}priority {priority}"
            ));
        }
        self.out.translation.hits.push(index);
        self.out.indent += 4;
        self.actions(flow);
        self.out.indent -= 4;
    }

    fn actions(&mut self, flow: &Flow) {
        if flow.actions.is_empty() {
            self.out.say(format_args!("drop"));
        }
        let mut texts = flow.actions_text_parts(self.out.trace.is_some());
        for action in &flow.actions {
            if let Some(text) = texts.next() {
                self.out.say(format_args!("{text}"));
            }
            if !self.action(action) {
                break;
            }
        }
    }

    /// Does one action; whether the list goes on.
    fn action(&mut self, action: &Action) -> bool {
        let key = &mut self.out.current;
        let [outer, inner] = &mut key.vlans;
        match *action {
            Action::Output(port) if port == key.in_port => {
                self.out
                    .say(format_args!(">> skipping output to input port"));
            }
            Action::Output(port) => self.output(port),
            Action::InPort => {
                let port = key.in_port;
                self.output(port);
            }
            Action::Normal => {
                let key = *key;
                self.normal.normal(&key, self.now, self.out);
            }
            Action::Flood | Action::All => {
                let in_port = key.in_port;
                for port in self.normal.flood() {
                    if port != in_port {
                        self.output(port);
                    }
                }
            }
            Action::PushVlan(_) if inner.present() => {
                self.out.drop(DropCause::Tags);
                self.out
                    .say(format_args!(">> a third tag cannot be put on, stopping"));
                return false;
            }
            Action::PushVlan(tpid) => {
                *inner = *outer;
                *outer = Vlan {
                    tpid,
                    tci: Vlan::PRESENT,
                };
            }
            Action::PopVlan => (*outer, *inner) = (*inner, Vlan::NONE),
            Action::VlanVid(id) => outer.change(0xfff, id),
            Action::VlanPcp(priority) => outer.change(0xe000, u16::from(priority) << 13),
            Action::Set(rewrite) => rewrite.apply(key),
            Action::DecTtl if key.nw_ttl > 1 => key.nw_ttl -= 1,
            Action::DecTtl => {
                self.out.drop(DropCause::TimeToLive);
                self.out
                    .say(format_args!(">> the time to live is over, stopping"));
                return false;
            }
            Action::Meter(meter) => self.out.step(Step::Meter(meter)),
            Action::Resubmit { port, table } => {
                let port = port.unwrap_or(key.in_port);
                self.table(table, port);
            }
            Action::Goto(table) => {
                let port = key.in_port;
                self.table(table, port);
            }
        }
        true
    }

    fn output(&mut self, port: PortId) {
        let key = self.out.current;
        self.normal.output(port, &key, self.out);
    }
}

impl Vlan {
    /// Changes bits of the tag; if there is none, there is one then.
    const fn change(&mut self, mask: u16, value: u16) {
        if !self.present() {
            self.tpid = ether::VLAN;
        }
        self.tci = (self.tci & !mask) | value | Self::PRESENT;
    }
}

impl FlowKey {
    /// Changes a field, as the step of that name changes the frame.
    pub fn set(&mut self, field: Field) {
        let has_ports = self.nw_frag & FRAG_LATER == 0;
        match field {
            Field::DlSrc(mac) => self.dl_src = mac,
            Field::DlDst(mac) => self.dl_dst = mac,
            Field::NwSrc(address) => self.nw_src = address,
            Field::NwDst(address) => self.nw_dst = address,
            Field::NwTos(tos) => self.nw_tos = tos,
            Field::NwTtl(ttl) => self.nw_ttl = ttl,
            Field::TpSrc(port) if has_ports => self.tp_src = port,
            Field::TpDst(port) if has_ports => self.tp_dst = port,
            Field::TpSrc(_) | Field::TpDst(_) => {}
            Field::ArpOp(op) => self.nw_proto = op,
            Field::ArpSpa(address) => self.nw_src = ipv4(address),
            Field::ArpTpa(address) => self.nw_dst = ipv4(address),
            Field::ArpSha(mac) => self.arp_sha = mac,
            Field::ArpTha(mac) => self.arp_tha = mac,
            Field::NdTarget(address) => self.nd_target = address,
            Field::NdSll(mac) => self.arp_sha = mac,
            Field::NdTll(mac) => self.arp_tha = mac,
        }
    }

    /// Whether it is an ICMP message's, and not of a later fragment, which has no type.
    #[must_use]
    pub const fn is_message(&self) -> bool {
        matches!(
            (self.dl_type, self.nw_proto),
            (ether::IPV4, proto::ICMP) | (ether::IPV6, proto::ICMPV6)
        ) && self.nw_frag & FRAG_LATER == 0
    }

    /// Whether it is a neighbour solicitation's or advertisement's.
    #[must_use]
    pub const fn is_neighbour(&self) -> bool {
        self.dl_type == ether::IPV6
            && self.is_message()
            && matches!((self.tp_src, self.tp_dst), (135 | 136, 0))
    }
}
