//! Ports and their VLANs.
//!
//! A frame enters a VLAN where it comes in and takes the form of a port where it leaves, by the
//! `vlan_mode` of each. Open vSwitch's modes and column names are used, with its meaning
//! (ovs-vswitchd.conf.db(5), table Port; ovs-actions(7), the `normal` action), so that one
//! description configures both.

use alloc::boxed::Box;
use alloc::string::String;
use alloc::vec::Vec;

use arch::Nanos;

use crate::counters::{Counters, DropCause};
use crate::key::{Vlan, ether};
use crate::rate::{Bucket, Limiter, Rate};
use crate::{MacAddr, PortId};

/// What a port is there for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PortKind {
    /// A guest's network card.
    Vnic,
    /// A physical card.
    Uplink,
    /// The management cell's card.
    Management,
    /// Receives copies of frames; what it sends is dropped.
    Mirror,
}

/// In which VLANs a port is, and how they look there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum VlanMode {
    /// In `tag`, without tags.
    Access,
    /// In `trunks`, with tags.
    Trunk,
    /// A trunk on which frames without a tag are in `tag`, and those of `tag` leave with it.
    NativeTagged,
    /// A trunk on which frames without a tag are in `tag`, and those of `tag` leave without.
    NativeUntagged,
    /// In `tag`, whatever tags of `cvlans` the frames have themselves (IEEE 802.1ad).
    Dot1qTunnel,
}

/// When a frame that leaves untagged gets a tag with its priority alone.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum PriorityTags {
    /// Never.
    #[default]
    Never,
    /// If it has a priority.
    IfNonzero,
    /// If it has a tag within the switch.
    Always,
}

/// Learning of the addresses behind a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Learning {
    /// How many addresses; 1 to [`MAX_LEARNED`](crate::learn::MAX_LEARNED).
    pub limit: u32,
    /// For how many seconds without a frame.
    pub ageing: u32,
    /// Whether frames to addresses that nobody has are sent to this port, so that those behind it
    /// can be learned.
    pub flood: bool,
}

impl Default for Learning {
    fn default() -> Self {
        Self {
            limit: 16,
            ageing: 300,
            flood: false,
        }
    }
}

/// A port, as it is configured. What is not said is the safest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PortConfig {
    /// Its OpenFlow number.
    pub id: PortId,
    /// Its name, unique in the switch.
    pub name: String,
    /// What it is.
    pub kind: PortKind,
    /// Its own VLAN, 0 to 4094; 0 is that of frames without a tag.
    pub tag: Option<u16>,
    /// The VLANs of a trunk, 0 to 4094; none are all.
    pub trunks: Vec<u16>,
    /// Without it: access where there is a tag, else trunk.
    pub vlan_mode: Option<VlanMode>,
    /// The customer's VLANs that a tunnel carries; none are all.
    pub cvlans: Vec<u16>,
    /// The tunnel's own type of tag: 802.1ad's, or 802.1Q's.
    pub qinq_ethtype: u16,
    /// Tags for priorities alone.
    pub priority_tags: PriorityTags,
    /// Protected ports do not talk to each other.
    pub protected: bool,
    /// The guest's addresses.
    pub macs: Vec<MacAddr>,
    /// The guest may send with other addresses than its own.
    pub forged_source: bool,
    /// The guest may give itself another address.
    pub mac_change: bool,
    /// The guest may see what is not for it.
    pub promiscuous: bool,
    /// The guest may send frames of bridge protocols that bridges relay.
    pub bpdu: bool,
    /// The guest may not answer as a DHCP server.
    pub dhcp_guard: bool,
    /// The guest may not advertise itself as a router.
    pub ra_guard: bool,
    /// How many broadcasts, multicasts and floods a second may come in by it.
    pub storm_limit: Option<u32>,
    /// How much may come in by it.
    pub ingress: Option<Rate>,
    /// How much may leave by it.
    pub egress: Option<Rate>,
    /// Whether addresses are learned.
    pub learning: Option<Learning>,
    /// The uplink that it uses while that has a link.
    pub pinned: Option<PortId>,
    /// A management port: it is given the LLDP frames that come in by uplinks.
    pub lldp: bool,
}

impl PortConfig {
    /// A port of that kind in the VLAN of frames without a tag, its policy the strictest.
    #[must_use]
    pub fn new(id: u16, name: &str, kind: PortKind) -> Self {
        Self {
            id: PortId(id),
            name: name.into(),
            kind,
            tag: None,
            trunks: Vec::new(),
            vlan_mode: None,
            cvlans: Vec::new(),
            qinq_ethtype: ether::SERVICE_VLAN,
            priority_tags: PriorityTags::Never,
            protected: false,
            macs: Vec::new(),
            forged_source: false,
            mac_change: false,
            promiscuous: false,
            bpdu: false,
            dhcp_guard: false,
            ra_guard: false,
            storm_limit: None,
            ingress: None,
            egress: None,
            learning: None,
            pinned: None,
            lldp: false,
        }
    }

    /// The mode, said or not.
    #[must_use]
    pub fn mode(&self) -> VlanMode {
        self.vlan_mode.unwrap_or(match self.tag {
            Some(_) => VlanMode::Access,
            None => VlanMode::Trunk,
        })
    }
}

/// A set of VLAN identifiers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct VlanSet(Box<[u64; 64]>);

impl VlanSet {
    /// Those named; none if none are.
    pub fn named(ids: &[u16]) -> Option<Self> {
        let mut bits = Box::new([0; 64]);
        for id in ids {
            if let Some(word) = bits.get_mut(usize::from(id >> 6)) {
                *word |= 1 << (id & 63);
            }
        }
        (!ids.is_empty()).then_some(Self(bits))
    }

    pub fn has(&self, id: u16) -> bool {
        let word = self.0.get(usize::from(id >> 6)).copied().unwrap_or(0);
        word >> (id & 63) & 1 != 0
    }
}

/// A frame's tags within the switch: the VLAN that it is in, and the tag behind. Unlike on the
/// wire, [`Vlan::PRESENT`] is not used: VLAN 0 is that of frames without a tag.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Tags([Vlan; 2]);

impl Tags {
    const PRIORITY: u16 = 0xe000;

    /// The VLAN.
    pub fn vlan(self) -> u16 {
        self.0[0].id()
    }

    /// The same frame in another VLAN.
    pub fn moved_to(self, vlan: u16) -> Self {
        let [outer, inner] = self.0;
        let tci = outer.tci & !0xfff | vlan;
        Self([Vlan { tci, ..outer }, inner])
    }

    /// A frame of that VLAN, with no tag of its own.
    pub fn of(vlan: u16) -> Self {
        let tpid = ether::VLAN;
        Self([Vlan { tpid, tci: vlan }, Vlan::NONE])
    }
}

/// The VLANs of a port, ready for use.
#[derive(Clone, Debug)]
pub(crate) struct VlanRules {
    mode: VlanMode,
    tag: u16,
    trunks: Option<VlanSet>,
    cvlans: Option<VlanSet>,
    tunnel_type: u16,
    priority_tags: PriorityTags,
}

impl VlanRules {
    pub fn new(config: &PortConfig) -> Self {
        let (mode, tag) = (config.mode(), config.tag.unwrap_or(0));
        Self {
            mode,
            tag,
            trunks: VlanSet::named(&config.trunks),
            cvlans: VlanSet::named(&config.cvlans),
            tunnel_type: config.qinq_ethtype,
            priority_tags: config.priority_tags,
        }
    }

    fn trunks(&self, vlan: u16) -> bool {
        let native = matches!(self.mode, VlanMode::NativeTagged | VlanMode::NativeUntagged);
        if native && self.tag != 0 && (vlan == self.tag || vlan == 0) {
            // A native VLAN is always carried; frames without a tag are in no other.
            return vlan != 0;
        }
        self.trunks.as_ref().is_none_or(|set| set.has(vlan))
    }

    fn carries_customer(&self, vlan: u16) -> bool {
        self.cvlans.as_ref().is_none_or(|set| set.has(vlan))
    }

    /// Whether the port is in that VLAN.
    pub fn carries(&self, vlan: u16) -> bool {
        match self.mode {
            VlanMode::Access | VlanMode::Dot1qTunnel => vlan == self.tag,
            _ => self.trunks(vlan),
        }
    }

    /// Whether the port takes part in the frame's VLAN, for frames with its tags.
    pub fn includes(&self, tags: Tags) -> bool {
        let inner = tags.0[1].id();
        self.carries(tags.vlan())
            && match self.mode {
                VlanMode::Access => inner == 0,
                VlanMode::Dot1qTunnel => self.carries_customer(inner),
                _ => true,
            }
    }

    /// The tags within the switch of a frame that comes in with `wire`.
    pub fn enter(&self, wire: [Vlan; 2]) -> Result<Tags, DropCause> {
        let mut tags = [Vlan::NONE; 2];
        for (tag, wire) in tags.iter_mut().zip(wire) {
            if !wire.present() {
                break;
            }
            *tag = Vlan {
                tpid: wire.tpid,
                tci: wire.tci & !Vlan::PRESENT,
            };
        }
        let [outer, inner] = tags;
        let vlan = outer.id();
        let admitted = match self.mode {
            VlanMode::Access => vlan == 0,
            VlanMode::Trunk => self.trunks(vlan),
            VlanMode::NativeTagged | VlanMode::NativeUntagged => vlan == 0 || self.trunks(vlan),
            VlanMode::Dot1qTunnel => self.carries_customer(vlan),
        };
        if !admitted {
            return Err(DropCause::Vlan);
        }
        let own = Vlan {
            tpid: if outer.tpid == 0 {
                ether::VLAN
            } else {
                outer.tpid
            },
            tci: outer.tci & Tags::PRIORITY | self.tag,
        };
        Ok(Tags(match self.mode {
            VlanMode::Access => [own, Vlan::NONE],
            VlanMode::NativeTagged | VlanMode::NativeUntagged if vlan == 0 => [own, inner],
            VlanMode::Dot1qTunnel if inner != Vlan::NONE => return Err(DropCause::Tags),
            VlanMode::Dot1qTunnel => {
                let tunnel = Vlan {
                    tpid: self.tunnel_type,
                    tci: self.tag,
                };
                [tunnel, outer]
            }
            _ => tags,
        }))
    }

    /// The tags with which a frame leaves that came in with `wire` and has `tags` within; nothing
    /// if its native tag would be taken off and the one behind would stand for its VLAN.
    pub fn leave(&self, tags: Tags, wire: [Vlan; 2]) -> Option<[Vlan; 2]> {
        let [outer, inner] = tags.0;
        let native = self.mode == VlanMode::NativeUntagged && outer.id() == self.tag;
        if native && inner.id() != 0 {
            return None;
        }
        let mut out = match self.mode {
            VlanMode::Access => [Vlan::NONE; 2],
            VlanMode::Dot1qTunnel => [inner, Vlan::NONE],
            _ if native => [inner, Vlan::NONE],
            _ => [outer, inner],
        };
        if self.priority_tags != PriorityTags::Never {
            let [first, _] = &mut out;
            first.tci = first.tci & !Tags::PRIORITY | wire[0].tci & Tags::PRIORITY;
        }
        Some(out.map(|tag| {
            let always = self.priority_tags == PriorityTags::Always && tag.tpid != 0;
            if tag.tci == 0 && !always {
                return Vlan::NONE;
            }
            Vlan {
                tpid: if tag.tpid == 0 { ether::VLAN } else { tag.tpid },
                tci: tag.tci | Vlan::PRESENT,
            }
        }))
    }

    /// The VLANs in which the addresses of the port are announced: its own, or those of a trunk
    /// that says which; on one of all VLANs, that of frames without a tag.
    pub fn announced(&self) -> impl Iterator<Item = u16> + '_ {
        let all = match (self.mode, &self.trunks) {
            (VlanMode::Access | VlanMode::Dot1qTunnel, _) | (_, None) => None,
            (_, Some(set)) => Some(set),
        };
        let own = all.is_none().then_some(self.tag);
        let named = all
            .into_iter()
            .flat_map(|set| (0..4095).filter(|id| set.has(*id)));
        own.into_iter().chain(named)
    }
}

/// How many of a guest's requests a second are heard. Each makes decisions that are kept void, for
/// its neighbours, too.
pub(crate) const REQUESTS: u64 = 4;

/// A port at work.
#[derive(Clone, Debug)]
pub(crate) struct Port {
    /// As configured; `macs` are those that it has now.
    pub config: PortConfig,
    pub vlan: VlanRules,
    /// The place of the uplink that it is pinned to.
    pub pinned: Option<usize>,
    pub ingress: Option<Limiter>,
    pub egress: Option<Limiter>,
    pub storm: Option<Bucket>,
    /// What the guest asks of the switch.
    pub requests: Bucket,
    /// The address that the guest gave itself.
    pub own_address: Option<MacAddr>,
    /// Mirrors that select what comes in by it, and what leaves by it, a bit each.
    pub mirror_src: u32,
    pub mirror_dst: u32,
    pub up: bool,
    /// Beacons say that an uplink leads nowhere, whatever its link says.
    pub lost: bool,
    /// The guest asked for what is not for it, and may.
    pub sees_all: bool,
    /// It moves to another machine: a gratuitous announcement from outside takes its address away.
    pub leaving: bool,
    /// It has moved: its addresses are outside.
    pub departed: bool,
    /// When it came from another machine.
    pub arrived: Option<Nanos>,
    /// How many addresses are learned behind it.
    pub learned: u32,
    pub counters: Counters,
}

impl Port {
    pub fn new(config: PortConfig, now: Nanos) -> Self {
        let limiter = |rate: Option<Rate>| rate.map(|rate| Limiter::new(rate, now));
        let storm = config.storm_limit.map(u64::from);
        Self {
            vlan: VlanRules::new(&config),
            pinned: None,
            ingress: limiter(config.ingress),
            egress: limiter(config.egress),
            storm: storm.map(|limit| Bucket::new(limit, limit, now)),
            requests: Bucket::new(REQUESTS, 4 * REQUESTS, now),
            own_address: None,
            mirror_src: 0,
            mirror_dst: 0,
            up: true,
            lost: false,
            sees_all: false,
            leaving: false,
            departed: false,
            arrived: None,
            learned: 0,
            counters: Counters::default(),
            config,
        }
    }

    pub fn id(&self) -> PortId {
        self.config.id
    }

    pub fn is(&self, kind: PortKind) -> bool {
        self.config.kind == kind
    }

    /// Whether a guest or the management cell is behind it.
    pub fn is_local(&self) -> bool {
        matches!(self.config.kind, PortKind::Vnic | PortKind::Management)
    }

    /// Takes over what `older`, the same port under another configuration, has counted and knows.
    pub fn inherit(&mut self, older: &Self) {
        self.counters = older.counters.clone();
        self.up = older.up;
        self.sees_all = older.sees_all && self.config.promiscuous;
        (self.leaving, self.departed) = (older.leaving, older.departed);
        self.arrived = older.arrived;
        self.requests = older.requests;
        self.own_address = older.own_address.filter(|_| self.config.mac_change);
        let limiters = [
            (&mut self.ingress, &older.ingress),
            (&mut self.egress, &older.egress),
        ];
        for (own, older) in limiters {
            if let (Some(own), Some(older)) = (own, older) {
                own.inherit(older);
            }
        }
        if let (Some(own), Some(older)) = (&mut self.storm, &older.storm) {
            own.inherit(older);
        }
    }
}
