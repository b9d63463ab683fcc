//! A switch in a small world: ports, frames in, frames out.

mod beacons;
mod features;
mod flows;
mod networks;
mod properties;
mod rules;
mod vlans;

use arch::Nanos;

use crate::cache::Cache;
use crate::config::SwitchConfig;
use crate::counters::DropCause;
use crate::port::{PortConfig, PortKind};
use crate::simulate::{frame, take};
use crate::switch::Switch;
use crate::{MacAddr, PortId};

pub(crate) const SECOND: u64 = 1_000_000_000;
pub(crate) const VLAN: u16 = 0x8100;
pub(crate) const GROUP: MacAddr = MacAddr([1, 0, 0x5e, 0, 0, 1]);
pub(crate) const ALL: MacAddr = MacAddr::BROADCAST;
/// Somebody outside.
pub(crate) const OUTSIDE: MacAddr = MacAddr([2, 0xaa, 0, 0, 0, 1]);
/// Nobody.
pub(crate) const NOBODY: MacAddr = MacAddr([2, 0xbb, 0, 0, 0, 1]);
/// The first uplinks' numbers.
pub(crate) const UP: u16 = 100;
pub(crate) const UP2: u16 = 101;

/// The address of the guest at a port.
pub(crate) const fn vm(port: u8) -> MacAddr {
    MacAddr([2, 0, 0, 0, 0, port])
}

/// A guest's port.
pub(crate) fn vnic(port: u8) -> PortConfig {
    let mut config = PortConfig::new(port.into(), &format!("vm{port}"), PortKind::Vnic);
    config.macs = vec![vm(port)];
    config
}

pub(crate) fn uplink(id: u16) -> PortConfig {
    PortConfig::new(id, &format!("up{id}"), PortKind::Uplink)
}

/// A port of those with something changed.
pub(crate) fn with(mut port: PortConfig, change: impl FnOnce(&mut PortConfig)) -> PortConfig {
    change(&mut port);
    port
}

pub(crate) fn config(ports: impl IntoIterator<Item = PortConfig>) -> SwitchConfig {
    SwitchConfig {
        name: "s".into(),
        ports: ports.into_iter().collect(),
        ..SwitchConfig::default()
    }
}

pub(crate) struct World {
    pub switch: Switch,
    pub cache: Cache,
    pub now: u64,
}

/// What leaves, by port.
pub(crate) type Out = Vec<(u16, Vec<u8>)>;

impl World {
    pub fn new(ports: impl IntoIterator<Item = PortConfig>) -> Self {
        Self::of(config(ports))
    }

    pub fn of(config: SwitchConfig) -> Self {
        Self {
            switch: Switch::new(config, [11, 22]).unwrap(),
            cache: Cache::new(256, [3, 4]),
            now: 1,
        }
    }

    /// A frame comes in: what leaves, or why it does not.
    pub fn give(&mut self, port: u16, frame: &[u8]) -> (Out, Option<DropCause>) {
        let (id, now) = (PortId(port), Nanos(self.now));
        let decision = self
            .switch
            .decide(&mut self.cache, id, frame, frame.len(), now);
        let mut out = Vec::new();
        take(decision.steps, frame, |port, frame| {
            out.push((port.0, frame.to_vec()))
        });
        (out, decision.drop)
    }

    /// A plain frame comes in: the ports by which it leaves. Twice, the second time by the cache.
    pub fn ports(&mut self, port: u16, to: MacAddr, from: MacAddr) -> Vec<u16> {
        let frame = plain(to, from);
        let (first, _) = self.give(port, &frame);
        assert_eq!(self.give(port, &frame).0, first);
        first.into_iter().map(|(port, _)| port).collect()
    }

    /// A plain frame comes in that leaves by no port: why.
    pub fn why(&mut self, port: u16, to: MacAddr, from: MacAddr) -> Option<DropCause> {
        self.why_not(port, &plain(to, from))
    }

    pub fn why_not(&mut self, port: u16, frame: &[u8]) -> Option<DropCause> {
        let before = self.dropped(port);
        let (out, cause) = self.give(port, frame);
        assert!(cause.is_none() || out.is_empty(), "{out:?} {cause:?}");
        if let Some(cause) = cause
            && let Some(counters) = self.switch.counters(PortId(port))
        {
            assert!(counters.dropped(cause) > 0);
            assert_eq!(self.dropped(port), before + 1);
        }
        cause
    }

    fn dropped(&self, port: u16) -> u64 {
        let counters = self.switch.counters(PortId(port));
        counters.map_or(0, crate::counters::Counters::dropped_in_all)
    }

    /// The announcements that wait, without beacons: uplink, address, and VLAN if there is a tag.
    pub fn announced(&mut self) -> Vec<(u16, MacAddr, Option<u16>)> {
        let (mut all, mut frame) = (Vec::new(), [0; 64]);
        while let Some((port, length)) = self.switch.announcement(&mut frame) {
            let key = crate::key::FlowKey::extract(&frame[..length], PortId(0)).unwrap();
            if key.dl_dst == crate::beacon::GROUP {
                continue;
            }
            assert_eq!((key.dl_dst, key.dl_type, key.nw_proto), (ALL, 0x8035, 3));
            assert_eq!((key.arp_sha, key.arp_tha), (key.dl_src, key.dl_src));
            let tag = key.vlans[0];
            assert_eq!(length, if tag.present() { 64 } else { 60 });
            all.push((port.0, key.dl_src, tag.present().then_some(tag.id())));
        }
        all
    }
}

/// A frame of 60 bytes without tags.
pub(crate) fn plain(to: MacAddr, from: MacAddr) -> Vec<u8> {
    frame(to, from, &[], 0x88b5, &[7; 46])
}

/// A gratuitous ARP of `from`.
pub(crate) fn gratuitous(from: MacAddr) -> Vec<u8> {
    let ip = [10, 0, 0, 1];
    let arp = [
        &[0, 1, 8, 0, 6, 4, 0, 1][..],
        &from.0,
        &ip,
        &[0; 6],
        &ip,
        &[0; 18],
    ];
    frame(ALL, from, &[], 0x0806, &arp.concat())
}
