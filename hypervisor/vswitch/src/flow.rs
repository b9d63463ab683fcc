//! What a flow is: a match on a frame's key, and actions. The words are OpenFlow's, as Open vSwitch
//! has them (ovs-fields(7), ovs-actions(7)); their text is in [`crate::ofctl`].

use alloc::vec::Vec;

use crate::PortId;
pub use crate::fields::Rewrite;
use crate::key::{FlowKey, Vlan, ether};

/// The priority of a flow that names none (OpenFlow 1.0 §5.3.3).
pub const DEFAULT_PRIORITY: u16 = 0x8000;
/// The highest table; 255 stands for all.
pub const LAST_TABLE: u8 = 254;

/// Which frames a flow is about: those whose key equals `key` where `mask` has bits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Match {
    key: FlowKey,
    mask: FlowKey,
}

impl Match {
    /// A match of the bits in `mask`.
    #[must_use]
    pub fn new(key: &FlowKey, mask: &FlowKey) -> Self {
        Self {
            key: key.masked(mask),
            mask: *mask,
        }
    }

    /// What the masked key must be.
    #[must_use]
    pub const fn key(&self) -> &FlowKey {
        &self.key
    }

    /// Which bits are looked at.
    #[must_use]
    pub const fn mask(&self) -> &FlowKey {
        &self.mask
    }

    /// Means all fragments, whichever it meant.
    pub(crate) const fn forget_fragments(&mut self) {
        (self.key.nw_frag, self.mask.nw_frag) = (0, 0);
    }

    /// Whether a frame of `key` is meant.
    #[must_use]
    pub fn covers(&self, key: &FlowKey) -> bool {
        key.masked(&self.mask) == self.key
    }

    /// Whether every frame that `other` means is meant, as loose commands ask.
    #[must_use]
    pub fn includes(&self, other: &Self) -> bool {
        other.mask.masked(&self.mask) == self.mask && self.covers(&other.key)
    }

    /// The EtherType, where it is matched whole.
    #[must_use]
    pub const fn dl_type(&self) -> Option<u16> {
        if self.mask.dl_type == 0xffff {
            Some(self.key.dl_type)
        } else {
            None
        }
    }

    /// Whether it is about IPv4 or IPv6.
    #[must_use]
    pub const fn is_ip(&self) -> bool {
        matches!(self.dl_type(), Some(ether::IPV4 | ether::IPV6))
    }

    /// IP's protocol, where it is matched.
    #[must_use]
    pub const fn ip_proto(&self) -> Option<u8> {
        if self.is_ip() && self.mask.nw_proto == 0xff {
            Some(self.key.nw_proto)
        } else {
            None
        }
    }

    /// Whether only frames with a tag are meant.
    #[must_use]
    pub const fn is_tagged(&self) -> bool {
        let [outer, _] = self.mask.vlans;
        outer.tci & Vlan::PRESENT != 0 && self.key.vlans[0].present()
    }
}

/// One thing a flow does with its frames.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Send it out of a port, but never out of the one it came in by.
    Output(PortId),
    /// Send it back.
    InPort,
    /// Do what a switch without flows does.
    Normal,
    /// Send it out of every port but its own.
    Flood,
    /// The same; Open vSwitch has ports that only `flood` leaves out.
    All,
    /// Put a tag of that TPID in front: VLAN 0, priority 0.
    PushVlan(u16),
    /// Take the outermost tag off, if there is one.
    PopVlan,
    /// Change the tag's identifier; without a tag, put one in front.
    VlanVid(u16),
    /// Change the tag's priority; without a tag, put one in front.
    VlanPcp(u8),
    /// Change a field, or bits of it, where the frame has it.
    Set(Rewrite),
    /// Count the time to live down; at its end this list of actions is over.
    DecTtl,
    /// Go on only if a meter lets it pass.
    Meter(u32),
    /// Look the frame up in a later table, as if it came from `port`, and come back.
    Resubmit {
        /// Instead of the input port, for the look-up alone.
        port: Option<PortId>,
        /// Where to look.
        table: u8,
    },
    /// Look the frame up in a later table.
    Goto(u8),
}

/// A flow.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Flow {
    /// Its table.
    pub table: u8,
    /// The highest that matches wins; of equals, the one added first.
    pub priority: u16,
    /// Anything; what it is for is known to who gave it.
    pub cookie: u64,
    /// Its frames.
    pub matching: Match,
    /// In order; none means to drop.
    pub actions: Vec<Action>,
}

/// A change of flows, with the selection by cookie or output that goes with it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FlowMod {
    /// What to do.
    pub command: Command,
    /// Which table, all if none; a flow is added to table 0 then.
    pub table: Option<u8>,
    /// The priority: of an added flow, or that strict commands ask for.
    pub priority: u16,
    /// Of added flows, and of modified ones if there is one.
    pub cookie: Option<u64>,
    /// Only flows whose cookie is the first where the second has bits.
    pub cookie_match: (u64, u64),
    /// Only flows that have an output to this port.
    pub out_port: Option<PortId>,
    /// Which frames.
    pub matching: Match,
    /// The new actions.
    pub actions: Vec<Action>,
}

/// What a [`FlowMod`] does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// Add a flow, in place of one with the same table, priority and match.
    Add,
    /// Give flows that the match includes new actions; add one if there is none.
    Modify,
    /// The same for the flow of exactly this match and priority.
    ModifyStrict,
    /// Remove flows that the match includes.
    Delete,
    /// Remove the flow of exactly this match and priority.
    DeleteStrict,
}
