//! A frame in pieces, and where its headers are.
//!
//! Who moves a frame rarely wants to move its bytes: the switch rewrites the first few and leaves
//! the rest, a checksum replaces two, a segment has headers of its own before a part of the
//! payload. So a frame is a short list of slices that are written to the receiver one by one.

use super::NetHeader;

/// Slices of one frame: three from outside, two more by putting a checksum in.
const PIECES: usize = 5;
/// The first bytes of a frame that are looked at: all headers lie in them, or the frame is not
/// understood.
pub(super) const HEAD: usize = 256;

/// Bytes of an Ethernet header without tags.
pub const ETHERNET: usize = 14;
const TPID: u16 = 0x8100;
const SERVICE_TPID: u16 = 0x88a8;
const ETHER_IPV4: u16 = 0x0800;
const ETHER_IPV6: u16 = 0x86dd;
/// Tags that are skipped.
const MAX_TAGS: usize = 3;
/// IPv6 extension headers that are skipped.
const MAX_EXTENSIONS: usize = 8;

pub(super) const ICMP: u8 = 1;
pub(super) const TCP: u8 = 6;
pub(super) const UDP: u8 = 17;
pub(super) const ICMPV6: u8 = 58;

/// A frame in one place, as it came out of a queue or from a wire.
#[derive(Clone, Copy, Debug)]
pub struct Whole<'a> {
    frame: &'a [u8],
    /// With the header in front that it has in a queue if nothing is left to do to it; else empty.
    headed: &'a [u8],
}

impl<'a> Whole<'a> {
    /// A frame without a header in front.
    #[must_use]
    pub const fn bare(frame: &'a [u8]) -> Self {
        Self { frame, headed: &[] }
    }

    /// A frame behind its header, as [`NetHeader::encode`] gives it for a receiver that takes all
    /// over in one buffer.
    pub(super) fn headed(headed: &'a [u8]) -> Self {
        let frame = headed.get(NetHeader::SIZE..).unwrap_or_default();
        Self { frame, headed }
    }

    /// Its bytes.
    #[must_use]
    pub const fn bytes(&self) -> &'a [u8] {
        self.frame
    }

    /// The frame, to be handed on as it is.
    #[must_use]
    pub fn frame(&self) -> Frame<'a> {
        Frame {
            headed: self.headed,
            ..Frame::whole(self.frame)
        }
    }
}

/// A frame without its frame check sequence.
#[derive(Clone, Copy, Debug)]
pub struct Frame<'a> {
    pieces: [&'a [u8]; PIECES],
    count: usize,
    length: usize,
    headed: &'a [u8],
}

impl<'a> Frame<'a> {
    /// A frame that stands in one place.
    #[must_use]
    pub fn whole(bytes: &'a [u8]) -> Self {
        Self {
            pieces: [bytes, &[], &[], &[], &[]],
            count: usize::from(!bytes.is_empty()),
            length: bytes.len(),
            headed: &[],
        }
    }

    /// This frame behind this header in one piece, if it stands so.
    pub(super) fn behind_header(&self, header: &[u8; NetHeader::SIZE]) -> Option<&'a [u8]> {
        self.headed.starts_with(header).then_some(self.headed)
    }

    /// A frame of up to three pieces, for example rewritten headers, the rest, padding.
    #[must_use]
    pub fn new(pieces: [&'a [u8]; 3]) -> Self {
        let mut frame = Self::empty();
        pieces.into_iter().for_each(|piece| frame.push(piece));
        frame
    }

    const fn empty() -> Self {
        Self {
            pieces: [&[]; PIECES],
            count: 0,
            length: 0,
            headed: &[],
        }
    }

    fn push(&mut self, piece: &'a [u8]) {
        if let Some(slot) = self.pieces.get_mut(self.count)
            && !piece.is_empty()
        {
            *slot = piece;
            self.count += 1;
            self.length += piece.len();
        }
    }

    /// Its length in bytes.
    #[must_use]
    pub const fn len(&self) -> usize {
        self.length
    }

    /// Whether there is nothing in it.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// Its pieces in order.
    pub fn pieces(&self) -> impl Iterator<Item = &'a [u8]> {
        let pieces = self.pieces.get(..self.count).unwrap_or_default();
        pieces.iter().copied()
    }

    /// The bytes from offset `from` up to `to`, as far as there are such.
    pub(super) fn part(&self, from: usize, to: usize) -> impl Iterator<Item = &'a [u8]> {
        let mut before = 0usize;
        self.pieces().filter_map(move |piece| {
            let within = |at: usize| at.saturating_sub(before).min(piece.len());
            let part = piece.get(within(from)..within(to));
            before += piece.len();
            part
        })
    }

    /// `head`, then the bytes of `rest` from `from` up to `to`.
    pub(super) fn behind(head: &'a [u8], rest: &Self, from: usize, to: usize) -> Self {
        let mut frame = Self::empty();
        frame.push(head);
        rest.part(from, to).for_each(|piece| frame.push(piece));
        frame
    }

    /// This frame with `bytes` in place of as many at `at`.
    pub(super) fn with(&self, at: usize, bytes: &'a [u8]) -> Self {
        let mut frame = Self::empty();
        self.part(0, at).for_each(|piece| frame.push(piece));
        frame.push(bytes);
        self.part(at + bytes.len(), self.length)
            .for_each(|piece| frame.push(piece));
        frame
    }

    /// Calls `look` with the first bytes, all of them or [`HEAD`], in one slice.
    pub(super) fn with_head<R>(&self, look: impl FnOnce(&[u8]) -> R) -> R {
        let first = self.pieces.first().copied().unwrap_or_default();
        if first.len() >= HEAD || self.count <= 1 {
            return look(first.get(..HEAD).unwrap_or(first));
        }
        let mut head = [0; HEAD];
        let length = self.copy_head(&mut head);
        look(head.get(..length).unwrap_or_default())
    }

    /// Copies the first bytes; gives how many.
    pub(super) fn copy_head(&self, head: &mut [u8; HEAD]) -> usize {
        let mut length = 0;
        for piece in self.pieces() {
            let room = head.get_mut(length..).unwrap_or_default();
            let now = room.len().min(piece.len());
            if let (Some(to), Some(from)) = (room.get_mut(..now), piece.get(..now)) {
                to.copy_from_slice(from);
            }
            length += now;
        }
        length
    }
}

/// Two bytes in network order.
pub(super) fn be16(bytes: &[u8], at: usize) -> Option<u16> {
    let field = bytes.get(at..)?.first_chunk::<2>()?;
    Some(u16::from_be_bytes(*field))
}

/// The length of the Ethernet header with its tags, and the type behind it. What stands behind
/// [`MAX_TAGS`] is not looked into.
pub(super) fn link(head: &[u8]) -> Option<(usize, u16)> {
    let mut at = ETHERNET - 2;
    let mut kind = be16(head, at)?;
    for _ in 0..MAX_TAGS {
        if kind != TPID && kind != SERVICE_TPID {
            break;
        }
        at += 4;
        kind = be16(head, at)?;
    }
    Some((at + 2, kind))
}

/// The VLAN that a customer tag names; 0 is a priority tag.
pub(super) fn vlan(head: &[u8]) -> Option<u16> {
    (be16(head, ETHERNET - 2)? == TPID)
        .then(|| be16(head, ETHERNET))?
        .map(|tci| tci & 0xfff)
}

/// Which IP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ip {
    V4,
    V6,
}

/// Where the headers of an IP packet are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Layout {
    pub ip: Ip,
    /// Offset of the IP header.
    pub network: usize,
    /// Offset of what comes behind IP and its options or extension headers.
    pub transport: usize,
    /// What that is.
    pub protocol: u8,
    /// The packet is a fragment.
    pub fragment: bool,
    /// It has IPv4 options or an IPv6 routing header: its destination may not be the last.
    pub routed: bool,
}

impl Layout {
    /// Reads the headers; `None` if this is no IP or its header is cut off or malformed.
    pub fn of(head: &[u8]) -> Option<Self> {
        let (network, kind) = link(head)?;
        let first = *head.get(network)?;
        match (kind, first >> 4) {
            (ETHER_IPV4, 4) => {
                let length = 4 * usize::from(first & 15);
                head.get(network..network + length.max(20))?;
                (length >= 20).then_some(())?;
                Some(Self {
                    ip: Ip::V4,
                    network,
                    transport: network + length,
                    protocol: *head.get(network + 9)?,
                    fragment: be16(head, network + 6)? & 0x3fff != 0,
                    routed: length > 20,
                })
            }
            (ETHER_IPV6, 6) => {
                head.get(network..network + 40)?;
                let mut found = Self {
                    ip: Ip::V6,
                    network,
                    transport: network + 40,
                    protocol: *head.get(network + 6)?,
                    fragment: false,
                    routed: false,
                };
                for _ in 0..MAX_EXTENSIONS {
                    match found.protocol {
                        // Hop-by-hop options, routing, destination options (RFC 8200 §4).
                        0 | 60 => {}
                        43 => found.routed = true,
                        44 => {
                            found.fragment = true;
                            return Some(found);
                        }
                        _ => return Some(found),
                    }
                    let at = found.transport;
                    found.protocol = *head.get(at)?;
                    found.transport = at + 8 + 8 * usize::from(*head.get(at + 1)?);
                }
                None
            }
            _ => None,
        }
    }

    /// The two addresses, one behind the other.
    pub fn addresses<'a>(&self, head: &'a [u8]) -> Option<&'a [u8]> {
        let (from, length) = match self.ip {
            Ip::V4 => (self.network + 12, 8),
            Ip::V6 => (self.network + 8, 32),
        };
        head.get(from..from + length)
    }
}

/// A hash of the flow that a frame belongs to, the same in both directions: addresses and ports,
/// or what there is of them.
pub(super) fn flow_hash(head: &[u8]) -> u32 {
    let fold = |bytes: &[u8]| {
        bytes.chunks(4).fold(0u32, |hash, chunk| {
            let mut word = [0; 4];
            word.iter_mut()
                .zip(chunk)
                .for_each(|(to, from)| *to = *from);
            hash.wrapping_mul(0x0100_0193) ^ u32::from_le_bytes(word)
        })
    };
    // Either half alone, then a sum: which one comes first does not matter.
    let both = |bytes: &[u8]| {
        let (a, b) = bytes.split_at(bytes.len() / 2);
        fold(a).wrapping_add(fold(b))
    };
    let hash = match Layout::of(head) {
        Some(layout) => {
            let ports = match layout.protocol {
                TCP | UDP if !layout.fragment => head.get(layout.transport..layout.transport + 4),
                _ => None,
            };
            both(layout.addresses(head).unwrap_or_default())
                .wrapping_mul(31)
                .wrapping_add(both(ports.unwrap_or_default()))
                .wrapping_add(layout.protocol.into())
        }
        None => both(head.get(..12).unwrap_or_default()),
    };
    // Every bit counts in every bit.
    let hash = (hash ^ hash >> 16).wrapping_mul(0x85eb_ca6b);
    let hash = (hash ^ hash >> 13).wrapping_mul(0xc2b2_ae35);
    hash ^ hash >> 16
}
