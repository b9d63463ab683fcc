//! What of a frame the switch looks at: one fixed record, taken from the frame's headers once.
//!
//! The record follows Open vSwitch's (ovs-fields(7)), so that flows written for it mean the same
//! here: a TCI carries bit 12 where a tag is there at all, ICMP's type and code stand where ports
//! stand, ARP's addresses where IP's stand. Headers that are cut off or contradict themselves leave
//! their fields zero. A record serves as a mask, too: a field's bits are set where it is matched.
//!
//! It has no padding, so it is compared, masked and hashed as twelve words.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::{MacAddr, PortId};

/// EtherTypes (IEEE 802 registry).
pub mod ether {
    /// IPv4.
    pub const IPV4: u16 = 0x0800;
    /// ARP.
    pub const ARP: u16 = 0x0806;
    /// Reverse ARP.
    pub const RARP: u16 = 0x8035;
    /// A customer's VLAN tag (IEEE 802.1Q-2022 table 9-1).
    pub const VLAN: u16 = 0x8100;
    /// A provider's VLAN tag.
    pub const SERVICE_VLAN: u16 = 0x88a8;
    /// IPv6.
    pub const IPV6: u16 = 0x86dd;
    /// Stands for a frame with a length instead of a type, and no SNAP header.
    pub const NONE: u16 = 0x05ff;
}

/// IP protocols (IANA registry).
pub mod proto {
    /// ICMP.
    pub const ICMP: u8 = 1;
    /// IGMP.
    pub const IGMP: u8 = 2;
    /// TCP.
    pub const TCP: u8 = 6;
    /// UDP.
    pub const UDP: u8 = 17;
    /// ICMPv6.
    pub const ICMPV6: u8 = 58;
    /// SCTP.
    pub const SCTP: u8 = 132;
    /// IPv6's fragment header; the protocol of later fragments.
    pub const FRAGMENT: u8 = 44;
    pub(super) const HOP_OPTIONS: u8 = 0;
    pub(super) const ROUTING: u8 = 43;
    pub(super) const AUTHENTICATION: u8 = 51;
    pub(super) const DESTINATION_OPTIONS: u8 = 60;
}

/// In a key's `nw_frag`: the packet is a fragment.
pub const FRAG_ANY: u8 = 1;
/// In a key's `nw_frag`: it is not the first one, so it has no transport header.
pub const FRAG_LATER: u8 = 2;

/// A frame without a whole Ethernet header.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a frame of {0} bytes ends inside its Ethernet header")]
pub struct ShortFrame(pub usize);

/// A VLAN tag, or (all zero) none.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, Hash, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct Vlan {
    /// Tag protocol identifier.
    pub tpid: u16,
    /// Priority in bits 15–13, [`Vlan::PRESENT`], identifier in bits 11–0.
    pub tci: u16,
}

impl Vlan {
    /// The TCI's bit that says that there is a tag; on the wire it is the drop-eligible indicator.
    pub const PRESENT: u16 = 0x1000;
    /// No tag.
    pub const NONE: Self = Self { tpid: 0, tci: 0 };

    /// A customer's tag of that identifier (12 bits count) and priority (3 bits count).
    #[must_use]
    pub const fn new(id: u16, priority: u8) -> Self {
        Self {
            tpid: ether::VLAN,
            tci: ((priority as u16 & 7) << 13) | Self::PRESENT | (id & 0xfff),
        }
    }

    /// Whether there is a tag.
    #[must_use]
    pub const fn present(self) -> bool {
        self.tci & Self::PRESENT != 0
    }

    /// The identifier, 0 to 4095.
    #[must_use]
    pub const fn id(self) -> u16 {
        self.tci & 0xfff
    }

    /// The priority, 0 to 7.
    #[must_use]
    pub const fn priority(self) -> u8 {
        (self.tci >> 13) as u8
    }
}

/// What of a frame is matched. IPv4 addresses are the last four bytes of their sixteen.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, Hash, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C, align(8))]
pub struct FlowKey {
    /// IP source, or ARP's sender protocol address.
    pub nw_src: [u8; 16],
    /// IP destination, or ARP's target protocol address.
    pub nw_dst: [u8; 16],
    /// The address a neighbour message is about.
    pub nd_target: [u8; 16],
    /// Destination.
    pub dl_dst: MacAddr,
    /// Source.
    pub dl_src: MacAddr,
    /// ARP's sender, or a neighbour message's source link-layer address.
    pub arp_sha: MacAddr,
    /// ARP's target, or a neighbour message's target link-layer address.
    pub arp_tha: MacAddr,
    /// Where it came in.
    pub in_port: PortId,
    /// The EtherType behind the tags.
    pub dl_type: u16,
    /// The tags, outermost first.
    pub vlans: [Vlan; 2],
    /// Source port, or the type of an ICMP message.
    pub tp_src: u16,
    /// Destination port, or the code of an ICMP message.
    pub tp_dst: u16,
    /// TCP's twelve bits of flags.
    pub tcp_flags: u16,
    /// IP's protocol (behind IPv6's extension headers), or the low byte of ARP's operation.
    pub nw_proto: u8,
    /// DSCP and ECN.
    pub nw_tos: u8,
    /// Time to live, or hop limit.
    pub nw_ttl: u8,
    /// [`FRAG_ANY`], [`FRAG_LATER`].
    pub nw_frag: u8,
    /// Always zero.
    pub reserved: [u8; 2],
}

/// How many words a key is.
pub const KEY_WORDS: usize = size_of::<FlowKey>() / 8;
const _: () = assert!(size_of::<FlowKey>() == 96);

/// The bytes of a frame that is being taken apart.
#[derive(Clone, Copy)]
struct Cursor<'a> {
    /// What of the frame is there, from here on.
    bytes: &'a [u8],
    /// How much the frame has from here on; at least `bytes.len()`.
    length: usize,
    /// How far from the frame's beginning this is.
    place: usize,
}

impl<'a> Cursor<'a> {
    fn peek<const N: usize>(&self) -> Option<&'a [u8; N]> {
        self.bytes.first_chunk()
    }

    fn pull<const N: usize>(&mut self) -> Option<&'a [u8; N]> {
        let head = self.peek()?;
        self.skip(N)?;
        Some(head)
    }

    fn skip(&mut self, count: usize) -> Option<()> {
        self.bytes = self.bytes.get(count..)?;
        self.length -= count;
        self.place += count;
        Some(())
    }

    /// Forgets what lies behind `length` bytes.
    fn limit(&mut self, length: usize) {
        self.bytes = self.bytes.get(..length).unwrap_or(self.bytes);
        self.length = self.length.min(length);
    }
}

/// Takes the tags, at most two, and the type behind them. A tag that is cut off stays as the type.
fn ether_type(at: &mut Cursor<'_>, vlans: &mut [Vlan; 2]) -> Option<u16> {
    for vlan in vlans {
        let tpid = u16::from_be_bytes(*at.peek()?);
        if !matches!(tpid, ether::VLAN | ether::SERVICE_VLAN) || at.bytes.len() < 6 {
            break;
        }
        let [_, _, high, low] = *at.pull()?;
        let tci = u16::from_be_bytes([high, low]) | Vlan::PRESENT;
        *vlan = Vlan { tpid, tci };
    }
    let kind = u16::from_be_bytes(*at.pull()?);
    if kind >= 0x600 {
        return Some(kind);
    }
    // A length: IEEE 802.2 with SNAP names a type all the same.
    if let Some(&[0xaa, 0xaa, 3, 0, 0, 0, high, low]) = at.peek() {
        let kind = u16::from_be_bytes([high, low]);
        if kind >= 0x600 {
            at.skip(8)?;
            return Some(kind);
        }
    }
    Some(ether::NONE)
}

/// An IPv4 address where keys have it.
#[must_use]
pub const fn ipv4([a, b, c, d]: [u8; 4]) -> [u8; 16] {
    [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, a, b, c, d]
}

/// The headers' places in a frame, as [`FlowKey::extract_with`] finds them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Layout {
    /// Where the network header begins, 0 for none that is understood.
    pub network: usize,
    /// Where the transport header begins, 0 for none.
    pub transport: usize,
    /// Where the packet ends; what follows in the frame is padding.
    pub end: usize,
    /// Whether IPv6's destination is a stop on the way to another (RFC 8200 §4.4).
    pub routed: bool,
}

impl FlowKey {
    /// Reads the headers of a whole frame.
    ///
    /// # Errors
    /// It has less than an Ethernet header.
    pub fn extract(frame: &[u8], in_port: PortId) -> Result<Self, ShortFrame> {
        Self::extract_prefix(frame, frame.len(), in_port)
    }

    /// Reads the headers of a frame of `length` bytes of which the first are in `prefix`. Headers
    /// that go beyond the prefix count as cut off.
    ///
    /// # Errors
    /// It has less than an Ethernet header.
    pub fn extract_prefix(
        prefix: &[u8],
        length: usize,
        in_port: PortId,
    ) -> Result<Self, ShortFrame> {
        let mut key = Self::default();
        key.read(prefix, length, in_port)?;
        Ok(key)
    }

    /// Like [`extract_prefix`](Self::extract_prefix), and says where the headers are.
    pub(crate) fn extract_with(
        prefix: &[u8],
        length: usize,
        in_port: PortId,
    ) -> Result<(Self, Layout), ShortFrame> {
        let mut key = Self::default();
        let layout = key.read(prefix, length, in_port)?;
        Ok((key, layout))
    }

    /// Reads the headers into a key that is all zero, as
    /// [`extract_prefix`](Self::extract_prefix) does; where they are.
    pub(crate) fn read(
        &mut self,
        prefix: &[u8],
        length: usize,
        in_port: PortId,
    ) -> Result<Layout, ShortFrame> {
        let key = self;
        let short = ShortFrame(prefix.len());
        let mut at = Cursor {
            bytes: prefix,
            length: length.max(prefix.len()),
            place: 0,
        };
        key.dl_dst = MacAddr(*at.pull().ok_or(short)?);
        key.dl_src = MacAddr(*at.pull().ok_or(short)?);
        key.in_port = in_port;
        key.dl_type = ether_type(&mut at, &mut key.vlans).ok_or(short)?;
        let mut layout = Layout::default();
        match key.dl_type {
            ether::IPV4 | ether::IPV6 => {
                let transport = if key.dl_type == ether::IPV4 {
                    key.ipv4(at, &mut layout)
                } else {
                    key.ipv6(at, &mut layout)
                };
                if let Some(at) = transport
                    && key.nw_frag & FRAG_LATER == 0
                {
                    (layout.transport, layout.end) = (at.place, at.place + at.length);
                    let _ = key.transport(at);
                }
            }
            ether::ARP | ether::RARP => {
                layout.network = at.place;
                let _ = key.arp(at);
            }
            _ => {}
        }
        Ok(layout)
    }

    /// Reads an IPv4 header; what is behind it.
    fn ipv4<'a>(&mut self, mut at: Cursor<'a>, layout: &mut Layout) -> Option<Cursor<'a>> {
        let head: &[u8; 20] = at.peek()?;
        let [
            first,
            tos,
            total_high,
            total_low,
            _,
            _,
            frag_high,
            frag_low,
            ..,
        ] = *head;
        let [.., ttl, protocol, _, _, s0, s1, s2, s3, d0, d1, d2, d3] = *head;
        let header = usize::from(first & 0xf) * 4;
        let total = usize::from(u16::from_be_bytes([total_high, total_low]));
        let whole = header >= 20 && header <= at.length && header <= total && total <= at.length;
        if !whole || at.length - total > 0xffff {
            return None;
        }
        at.limit(total);
        layout.network = at.place;
        self.nw_src = ipv4([s0, s1, s2, s3]);
        self.nw_dst = ipv4([d0, d1, d2, d3]);
        (self.nw_tos, self.nw_ttl, self.nw_proto) = (tos, ttl, protocol);
        let fragment = u16::from_be_bytes([frag_high, frag_low]);
        if fragment & 0x3fff != 0 {
            self.nw_frag = FRAG_ANY;
        }
        if fragment & 0x1fff != 0 {
            self.nw_frag |= FRAG_LATER;
        }
        at.skip(header)?;
        Some(at)
    }

    /// Reads an IPv6 header and its extensions; what is behind them.
    fn ipv6<'a>(&mut self, mut at: Cursor<'a>, layout: &mut Layout) -> Option<Cursor<'a>> {
        let place = at.place;
        let head: &[u8; 40] = at.pull()?;
        let (fixed, addresses) = head.split_first_chunk::<8>()?;
        let [first, second, _, _, high, low, next, limit] = *fixed;
        let payload = usize::from(u16::from_be_bytes([high, low]));
        if payload > at.length || at.length - payload > 0xff {
            return None;
        }
        at.limit(payload);
        layout.network = place;
        let (source, destination) = addresses.split_first_chunk()?;
        self.nw_src = *source;
        self.nw_dst = *destination.first_chunk()?;
        let mut next = next;
        let mut fragment = 0;
        loop {
            let units = match next {
                proto::HOP_OPTIONS | proto::ROUTING | proto::DESTINATION_OPTIONS => 8,
                proto::AUTHENTICATION => 4,
                proto::FRAGMENT => 0,
                _ => break,
            };
            let [following, length, high, low, ..]: [u8; 8] = *at.peek()?;
            // A routing header's fourth byte counts the stops that are left.
            layout.routed |= next == proto::ROUTING && low != 0;
            next = following;
            match units {
                0 => {
                    at.skip(8)?;
                    let place = u16::from_be_bytes([high, low]);
                    if place != 0 {
                        fragment = FRAG_ANY;
                    }
                    if place & 0xfff8 != 0 {
                        fragment |= FRAG_LATER;
                        next = proto::FRAGMENT;
                        break;
                    }
                }
                4 => at.skip((usize::from(length) + 2) * 4)?,
                _ => at.skip((usize::from(length) + 1) * 8)?,
            }
        }
        self.nw_tos = (first << 4) | (second >> 4);
        (self.nw_ttl, self.nw_proto, self.nw_frag) = (limit, next, fragment);
        Some(at)
    }

    /// Reads ARP for IPv4 over Ethernet (RFC 826).
    fn arp(&mut self, mut at: Cursor<'_>) -> Option<()> {
        let &[0, 1, 8, 0, 6, 4, high, low] = at.pull()? else {
            return None;
        };
        let sender = MacAddr(*at.pull()?);
        let source = ipv4(*at.pull()?);
        let target = MacAddr(*at.pull()?);
        let destination = ipv4(*at.pull()?);
        (self.arp_sha, self.arp_tha) = (sender, target);
        (self.nw_src, self.nw_dst) = (source, destination);
        if high == 0 {
            self.nw_proto = low;
        }
        Some(())
    }

    /// Reads the transport header that `nw_proto` says is there.
    fn transport(&mut self, mut at: Cursor<'_>) -> Option<()> {
        let pair = |[a, b, c, d]: [u8; 4]| (u16::from_be_bytes([a, b]), u16::from_be_bytes([c, d]));
        match (self.nw_proto, self.dl_type) {
            (proto::TCP, _) => {
                let head: &[u8; 20] = at.peek()?;
                let [.., high, low, _, _, _, _, _, _] = *head;
                let length = usize::from(high >> 4) * 4;
                if length < head.len() || length > at.length {
                    return None;
                }
                (self.tp_src, self.tp_dst) = pair(*head.first_chunk()?);
                self.tcp_flags = u16::from_be_bytes([high & 0xf, low]);
            }
            (proto::UDP, _) => {
                let head: &[u8; 8] = at.peek()?;
                (self.tp_src, self.tp_dst) = pair(*head.first_chunk()?);
            }
            (proto::SCTP, _) => {
                let head: &[u8; 12] = at.peek()?;
                (self.tp_src, self.tp_dst) = pair(*head.first_chunk()?);
            }
            (proto::ICMP | proto::IGMP, ether::IPV4) => {
                let [kind, code, ..]: [u8; 8] = *at.peek()?;
                (self.tp_src, self.tp_dst) = (kind.into(), code.into());
            }
            (proto::ICMPV6, ether::IPV6) => {
                let [kind, code, ..]: [u8; 8] = *at.pull()?;
                (self.tp_src, self.tp_dst) = (kind.into(), code.into());
                if matches!(kind, 135 | 136) && code == 0 {
                    self.neighbour(at);
                }
            }
            _ => {}
        }
        Some(())
    }

    /// Reads a neighbour solicitation or advertisement (RFC 4861 §4.3, §4.4). The same link-layer
    /// address option twice makes all of it void.
    fn neighbour(&mut self, mut at: Cursor<'_>) {
        let Some(&target) = at.pull() else { return };
        let (mut source, mut destination) = (MacAddr::default(), MacAddr::default());
        while let Some(&[kind, units, ref mac @ ..]) = at.peek::<8>() {
            let length = usize::from(units) * 8;
            if length == 0 || length > at.length {
                break;
            }
            let address = match kind {
                1 if units == 1 => Some(&mut source),
                2 if units == 1 => Some(&mut destination),
                _ => None,
            };
            if let Some(address) = address {
                if *address != MacAddr::default() {
                    return;
                }
                *address = MacAddr(*mac);
            }
            if at.skip(length).is_none() {
                break;
            }
        }
        self.nd_target = target;
        (self.arp_sha, self.arp_tha) = (source, destination);
    }

    /// The key as words, for hashing and comparing.
    #[must_use]
    pub fn words(&self) -> &[u64; KEY_WORDS] {
        zerocopy::transmute_ref!(self)
    }

    /// What of the key a mask lets through.
    #[must_use]
    pub fn masked(&self, mask: &Self) -> Self {
        let mut out = *self;
        let words: &mut [u64; KEY_WORDS] = zerocopy::transmute_mut!(&mut out);
        for (word, mask) in words.iter_mut().zip(mask.words()) {
            *word &= mask;
        }
        out
    }
}
