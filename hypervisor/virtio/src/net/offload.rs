//! What a guest leaves to its network card: checksums and segmentation (virtio 1.2 §5.1.6.2).
//!
//! Every frame comes with a header in which the driver says what is still to do. [`NetHeader::check`]
//! holds it against the frame once, on the way in; afterwards it is true. Between guests that both
//! negotiated it the work is passed on undone. Otherwise [`completed`] puts a checksum in, and
//! [`Segmenter`] cuts a TCP or UDP packet into frames as the network carries them (RFC 9293,
//! RFC 768; the flags as in RFC 3168 §6.1.2: CWR on the first segment alone).
//!
//! The switch decides on a frame before its checksum is put in. A checksum field that a driver
//! could place at will would change addresses behind the switch's back; so it is either that of the
//! transport header, or so far behind it that it can only be in a tunnel's inner packet.

use super::frame::{Frame, HEAD, ICMP, ICMPV6, Ip, Layout, TCP, UDP, be16, link};
use super::{ReceiveDrop, feature};

/// The checksum is to be completed.
const NEEDS_CSUM: u8 = 1;
/// The checksum has been checked.
const DATA_VALID: u8 = 2;
const GSO_TCPV4: u8 = 1;
const GSO_UDP: u8 = 3;
const GSO_TCPV6: u8 = 4;
const GSO_UDP_L4: u8 = 5;
const GSO_ECN: u8 = 0x80;

const FIN: u8 = 0x01;
const SYN: u8 = 0x02;
const RST: u8 = 0x04;
const PSH: u8 = 0x08;
const CWR: u8 = 0x80;

/// The smallest payload of a TCP segment: what is left of an MTU of 88. It bounds the work that
/// one frame can make.
const LEAST_SEGMENT: u16 = 48;
/// The most datagrams of one frame.
const MOST_DATAGRAMS: usize = 128;
/// Behind the transport header's start: what a switch may match on ends here (ND's target).
const MATCHED: usize = 24;

/// What is known of a frame's transport checksum.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Checksum {
    /// Nothing.
    #[default]
    Unknown,
    /// It is right.
    Valid,
    /// Its field holds the sum of the pseudo header; the sum from `start` to the end goes there.
    Partial {
        /// Where the sum starts, from the start of the frame.
        start: u16,
        /// Where the field is, from `start`.
        offset: u16,
    },
}

/// What is to be segmented.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GsoKind {
    /// TCP in IPv4.
    TcpV4,
    /// TCP in IPv6.
    TcpV6,
    /// UDP in IPv4: each segment is a datagram.
    UdpV4,
    /// UDP in IPv6.
    UdpV6,
}

/// A packet to be cut into segments.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gso {
    /// The protocol.
    pub kind: GsoKind,
    /// A TCP packet with CWR set.
    pub ecn: bool,
    /// The most payload bytes of a segment.
    pub size: u16,
    /// The bytes of all headers, as they were found in the frame.
    pub headers: u16,
}

/// What is to be done to a frame yet. Made from a driver's header by [`NetHeader::check`];
/// the default is a frame from a wire.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NetHeader {
    /// Its checksum.
    pub checksum: Checksum,
    /// Its segmentation; the checksum is partial then.
    pub gso: Option<Gso>,
}

/// What is wrong with a driver's header.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HeaderError {
    /// It asks for what was not negotiated.
    #[error("an offload is asked for that was not negotiated")]
    NotNegotiated,
    /// The checksum's place is not one in this frame.
    #[error("no checksum belongs where the header says")]
    Checksum,
    /// Type or size of the segmentation do not fit the frame.
    #[error("the frame cannot be segmented as the header says")]
    Segmentation,
}

/// What has to happen before a receiver gets a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Work {
    /// Nothing: the receiver takes it as it is.
    Pass,
    /// Completing the checksum.
    Checksum { start: u16, offset: u16 },
    /// Segmentation; then the segments' checksums, or not even those.
    Segment { gso: Gso, complete: bool },
}

impl NetHeader {
    /// Its length on the wire: struct virtio_net_hdr with num_buffers (§5.1.6).
    pub const SIZE: usize = 12;

    /// Reads a driver's header and holds it against the frame and what was negotiated. Flags that
    /// are unknown or for the other direction are ignored, as is hdr_len: it cannot be relied on
    /// (§5.1.6.2.2).
    ///
    /// # Errors
    /// What in it is a lie; the frame is to be dropped.
    pub fn check(
        bytes: [u8; Self::SIZE],
        features: u64,
        frame: &[u8],
    ) -> Result<Self, HeaderError> {
        let [flags, kind, _, _, s0, s1, c0, c1, o0, o1, _, _] = bytes;
        if flags & NEEDS_CSUM == 0 {
            // A packet to segment has its checksum to complete.
            return match kind {
                0 => Ok(Self::default()),
                _ => Err(HeaderError::Segmentation),
            };
        }
        if features & feature::CSUM == 0 {
            return Err(HeaderError::NotNegotiated);
        }
        let (start, offset) = (u16::from_le_bytes([c0, c1]), u16::from_le_bytes([o0, o1]));
        let field = usize::from(start) + usize::from(offset);
        let head = frame.get(..HEAD).unwrap_or(frame);
        let layout = Layout::of(head).ok_or(HeaderError::Checksum)?;
        let of_transport = usize::from(start) == layout.transport
            && checksum_offset(layout.protocol) == Some(offset)
            && !layout.fragment;
        let of_inner = kind == 0
            && usize::from(start) > layout.transport
            && field >= layout.transport + MATCHED;
        if field + 2 > frame.len() || !(of_transport || of_inner) {
            return Err(HeaderError::Checksum);
        }
        let gso = match kind {
            0 => None,
            _ => Some(Gso::check(
                kind,
                u16::from_le_bytes([s0, s1]),
                features,
                head,
                frame.len(),
                &layout,
            )?),
        };
        Ok(Self {
            checksum: Checksum::Partial { start, offset },
            gso,
        })
    }

    /// The header for a receiver with these offloads, spread over `buffers` chains.
    #[must_use]
    #[inline]
    pub fn encode(&self, offloads: u64, buffers: u16) -> [u8; Self::SIZE] {
        if let (None, Checksum::Unknown) = (self.gso, self.checksum) {
            let [b0, b1] = buffers.to_le_bytes();
            return [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, b0, b1];
        }
        self.encode_in_full(offloads, buffers)
    }

    fn encode_in_full(&self, offloads: u64, buffers: u16) -> [u8; Self::SIZE] {
        let (flags, start, offset) = match self.checksum {
            _ if offloads & feature::GUEST_CSUM == 0 => (0, 0, 0),
            Checksum::Unknown => (0, 0, 0),
            Checksum::Valid => (DATA_VALID, 0, 0),
            Checksum::Partial { start, offset } => (NEEDS_CSUM, start, offset),
        };
        let (kind, headers, size) = self.gso.map_or((0, 0, 0), |gso| {
            let kind = match gso.kind {
                GsoKind::TcpV4 => GSO_TCPV4,
                GsoKind::TcpV6 => GSO_TCPV6,
                GsoKind::UdpV4 | GsoKind::UdpV6 => GSO_UDP_L4,
            };
            let ecn = if gso.ecn { GSO_ECN } else { 0 };
            (kind | ecn, gso.headers, gso.size)
        });
        let [h0, h1] = headers.to_le_bytes();
        let [s0, s1] = size.to_le_bytes();
        let [c0, c1] = start.to_le_bytes();
        let [o0, o1] = offset.to_le_bytes();
        let [b0, b1] = buffers.to_le_bytes();
        [flags, kind, h0, h1, s0, s1, c0, c1, o0, o1, b0, b1]
    }

    /// The header of the same frame when its Ethernet header grew or shrank by `by` bytes (a tag
    /// put in or taken out). `None` if the numbers do not allow that.
    #[must_use]
    pub fn moved(mut self, by: i16) -> Option<Self> {
        if let Checksum::Partial { start, .. } = &mut self.checksum {
            *start = start.checked_add_signed(by)?;
        }
        if let Some(gso) = &mut self.gso {
            gso.headers = gso.headers.checked_add_signed(by)?;
        }
        Some(self)
    }

    /// Does to a frame what a receiver with these offloads (GUEST_… feature bits; none: a wire)
    /// did not take over, and hands over what comes of it: the frame, or its segments.
    ///
    /// # Errors
    /// The frame is not what this header says, or the first error of `give`.
    pub fn finish(
        &self,
        offloads: u64,
        frame: &Frame<'_>,
        mut give: impl FnMut(&Self, &Frame<'_>) -> Result<(), ReceiveDrop>,
    ) -> Result<(), ReceiveDrop> {
        match self.work(offloads) {
            Work::Pass => give(self, frame),
            Work::Checksum { start, offset } => {
                let header = Self::default();
                completed(frame, start, offset, |frame| give(&header, frame))
                    .unwrap_or(Err(ReceiveDrop::Malformed))
            }
            Work::Segment { gso, complete } => {
                let mut segments =
                    Segmenter::new(*frame, gso, complete).ok_or(ReceiveDrop::Malformed)?;
                while let Some((header, segment)) = segments.next() {
                    give(&header, &segment)?;
                }
                Ok(())
            }
        }
    }

    fn work(&self, offloads: u64) -> Work {
        let takes = |wanted: u64| offloads & wanted == wanted;
        match (self.gso, self.checksum) {
            (Some(gso), _) if !takes(gso.wanted()) => Work::Segment {
                gso,
                complete: !takes(feature::GUEST_CSUM),
            },
            (None, Checksum::Partial { start, offset }) if !takes(feature::GUEST_CSUM) => {
                Work::Checksum { start, offset }
            }
            _ => Work::Pass,
        }
    }
}

/// Where in its header a protocol has its checksum.
const fn checksum_offset(protocol: u8) -> Option<u16> {
    match protocol {
        TCP => Some(16),
        UDP => Some(6),
        ICMP | ICMPV6 => Some(2),
        _ => None,
    }
}

impl Gso {
    fn check(
        kind: u8,
        size: u16,
        features: u64,
        head: &[u8],
        length: usize,
        layout: &Layout,
    ) -> Result<Self, HeaderError> {
        let lie = HeaderError::Segmentation;
        let ecn = kind & GSO_ECN != 0;
        let (wanted, kind) = match (kind & !GSO_ECN, layout.ip) {
            (GSO_TCPV4, _) => (feature::HOST_TSO4, GsoKind::TcpV4),
            (GSO_TCPV6, _) => (feature::HOST_TSO6, GsoKind::TcpV6),
            (GSO_UDP_L4, Ip::V4) if !ecn => (feature::HOST_USO, GsoKind::UdpV4),
            (GSO_UDP_L4, Ip::V6) if !ecn => (feature::HOST_USO, GsoKind::UdpV6),
            (GSO_UDP, _) => return Err(HeaderError::NotNegotiated),
            _ => return Err(lie),
        };
        if features & wanted == 0 || ecn && features & feature::HOST_ECN == 0 {
            return Err(HeaderError::NotNegotiated);
        }
        Self::measured(kind, size, head, length, layout).ok_or(lie)
    }

    /// Finds the headers of a packet of this kind. The bounds on the size bound the work.
    fn measured(
        kind: GsoKind,
        size: u16,
        head: &[u8],
        length: usize,
        layout: &Layout,
    ) -> Option<Self> {
        let (ip, protocol) = match kind {
            GsoKind::TcpV4 => (Ip::V4, TCP),
            GsoKind::TcpV6 => (Ip::V6, TCP),
            GsoKind::UdpV4 => (Ip::V4, UDP),
            GsoKind::UdpV6 => (Ip::V6, UDP),
        };
        if layout.ip != ip || layout.protocol != protocol || layout.fragment {
            return None;
        }
        let (own, ecn) = if protocol == TCP {
            let own = 4 * usize::from(*head.get(layout.transport + 12)? >> 4);
            let flags = *head.get(layout.transport + 13)?;
            if own < 20 || flags & (SYN | RST) != 0 || size < LEAST_SEGMENT {
                return None;
            }
            (own, flags & CWR != 0)
        } else {
            (8, false)
        };
        let headers = layout.transport + own;
        let payload = length.checked_sub(headers).filter(|&bytes| bytes > 0)?;
        let few = protocol == TCP || payload <= MOST_DATAGRAMS * usize::from(size);
        let fits = headers + usize::from(size) <= usize::from(u16::MAX);
        (headers <= head.len() && size > 0 && few && fits).then_some(Self {
            kind,
            ecn,
            size,
            headers: u16::try_from(headers).ok()?,
        })
    }

    /// What a receiver must have negotiated to get the packet whole.
    const fn wanted(self) -> u64 {
        let kind = match self.kind {
            GsoKind::TcpV4 => feature::GUEST_TSO4,
            GsoKind::TcpV6 => feature::GUEST_TSO6,
            GsoKind::UdpV4 => feature::GUEST_USO4,
            GsoKind::UdpV6 => feature::GUEST_USO6,
        };
        let ecn = if self.ecn { feature::GUEST_ECN } else { 0 };
        feature::GUEST_CSUM | kind | ecn
    }
}

/// A ones' complement sum (RFC 1071) over bytes that come piece by piece. It is kept in the byte
/// order of the words as they lie: the result goes back as little-endian bytes.
#[derive(Clone, Copy, Default)]
struct Sum {
    total: u64,
    odd: bool,
}

impl Sum {
    fn add(mut self, bytes: &[u8]) -> Self {
        let (words, rest) = bytes.as_chunks::<8>();
        let mut last = [0; 8];
        last.iter_mut().zip(rest).for_each(|(to, from)| *to = *from);
        let sum = words
            .iter()
            .fold(u128::from(u64::from_le_bytes(last)), |sum, word| {
                sum + u128::from(u64::from_le_bytes(*word))
            });
        let mut sum = fold(sum);
        if self.odd {
            sum = sum.swap_bytes();
        }
        self.total += u64::from(sum);
        self.odd ^= !bytes.len().is_multiple_of(2);
        self
    }

    /// The sum itself, as it stands in a field that is to be completed.
    fn partial(self) -> [u8; 2] {
        fold(self.total.into()).to_le_bytes()
    }

    /// Its complement, never zero: that would mean that there is no checksum (RFC 768), and stands
    /// for the same number.
    fn complete(self) -> [u8; 2] {
        match !fold(self.total.into()) {
            0 => [0xff; 2],
            sum => sum.to_le_bytes(),
        }
    }
}

fn fold(mut sum: u128) -> u16 {
    sum = (sum & u128::from(u64::MAX)) + (sum >> 64);
    let mut sum =
        (sum & 0xffff_ffff) as u64 + (sum >> 32 & 0xffff_ffff) as u64 + (sum >> 64) as u64;
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

/// Calls `give` with the frame whose partial checksum is completed. `None` if its place is not in
/// the frame.
pub(super) fn completed<R>(
    frame: &Frame<'_>,
    start: u16,
    offset: u16,
    give: impl FnOnce(&Frame<'_>) -> R,
) -> Option<R> {
    let start = usize::from(start);
    let field = start + usize::from(offset);
    if field + 2 > frame.len() {
        return None;
    }
    let sum = frame
        .part(start, frame.len())
        .fold(Sum::default(), Sum::add)
        .complete();
    Some(give(&frame.with(field, &sum)))
}

/// Cuts one packet into segments.
pub(super) struct Segmenter<'a> {
    frame: Frame<'a>,
    head: [u8; HEAD],
    layout: Layout,
    gso: Gso,
    /// Whether checksums are completed.
    complete: bool,
    /// Offset of the next segment's payload in the frame.
    at: usize,
    identification: u16,
    sequence: u32,
    /// TCP's flags as they were.
    flags: u8,
    /// The sum of the pseudo header without the length.
    pseudo: Sum,
}

impl<'a> Segmenter<'a> {
    /// Looks at the packet's headers, which need not be those that the guest sent. `None` if they
    /// are not what `gso` says.
    pub fn new(frame: Frame<'a>, gso: Gso, complete: bool) -> Option<Self> {
        let mut head = [0; HEAD];
        let length = frame.copy_head(&mut head);
        let bytes = head.get(..length)?;
        let layout = Layout::of(bytes)?;
        let gso = Gso::measured(gso.kind, gso.size, bytes, frame.len(), &layout)?;
        let tcp = layout.protocol == TCP;
        let sequence = bytes.get(layout.transport + 4..)?.first_chunk::<4>();
        let pseudo = if layout.routed {
            // The sum is over a destination further on. The driver put it into the field.
            let field = layout.transport + usize::from(checksum_offset(layout.protocol)?);
            let all = u16::try_from(frame.len() - layout.transport).ok()?;
            Sum::default()
                .add(bytes.get(field..field + 2)?)
                .add(&(!all).to_be_bytes())
        } else {
            Sum::default()
                .add(layout.addresses(bytes)?)
                .add(&[0, layout.protocol])
        };
        Some(Self {
            pseudo,
            identification: be16(bytes, layout.network + 4)?,
            sequence: sequence.map_or(0, |field| u32::from_be_bytes(*field)),
            flags: if tcp {
                *bytes.get(layout.transport + 13)?
            } else {
                0
            },
            at: gso.headers.into(),
            frame,
            head,
            layout,
            gso,
            complete,
        })
    }

    /// The next segment with its header, until there is none.
    pub fn next(&mut self) -> Option<(NetHeader, Frame<'_>)> {
        let headers = usize::from(self.gso.headers);
        let from = self.at;
        if from >= self.frame.len() {
            return None;
        }
        let to = (from + usize::from(self.gso.size)).min(self.frame.len());
        self.rewrite(from == headers, to == self.frame.len(), from, to)?;
        self.at = to;
        let checksum = match self.complete {
            true => Checksum::Valid,
            false => Checksum::Partial {
                start: u16::try_from(self.layout.transport).ok()?,
                offset: checksum_offset(self.layout.protocol)?,
            },
        };
        let header = NetHeader {
            checksum,
            gso: None,
        };
        let head = self.head.get(..headers)?;
        Some((header, Frame::behind(head, &self.frame, from, to)))
    }

    /// Makes the headers those of the segment with the payload at `from` up to `to`.
    fn rewrite(&mut self, first: bool, last: bool, from: usize, to: usize) -> Option<()> {
        let Layout {
            ip,
            network,
            transport,
            protocol,
            ..
        } = self.layout;
        let headers = usize::from(self.gso.headers);
        let head = &mut self.head;
        let behind = |start: usize| u16::try_from(headers - start + (to - from)).ok();
        match ip {
            Ip::V4 => {
                put(head, network + 2, &behind(network)?.to_be_bytes())?;
                put(head, network + 4, &self.identification.to_be_bytes())?;
                put(head, network + 10, &[0, 0])?;
                let sum = Sum::default().add(head.get(network..transport)?);
                put(head, network + 10, &sum.complete())?;
                self.identification = self.identification.wrapping_add(1);
            }
            Ip::V6 => put(head, network + 4, &behind(network + 40)?.to_be_bytes())?,
        }
        if protocol == TCP {
            let not_here = if last { 0 } else { FIN | PSH } | if first { 0 } else { CWR };
            put(head, transport + 4, &self.sequence.to_be_bytes())?;
            put(head, transport + 13, &[self.flags & !not_here])?;
            self.sequence = self.sequence.wrapping_add(u32::try_from(to - from).ok()?);
        } else {
            put(head, transport + 4, &behind(transport)?.to_be_bytes())?;
        }
        let field = transport + usize::from(checksum_offset(protocol)?);
        let pseudo = self.pseudo.add(&behind(transport)?.to_be_bytes());
        let sum = if self.complete {
            put(head, field, &[0, 0])?;
            self.frame
                .part(from, to)
                .fold(pseudo.add(head.get(transport..headers)?), Sum::add)
                .complete()
        } else {
            pseudo.partial()
        };
        put(head, field, &sum)
    }
}

fn put(bytes: &mut [u8], at: usize, field: &[u8]) -> Option<()> {
    bytes.get_mut(at..at + field.len())?.copy_from_slice(field);
    Some(())
}

/// The most bytes behind the Ethernet header of a frame that goes over a wire for this one: the
/// whole of it, or the largest segment. `None` if there is no Ethernet header.
pub(super) fn largest_packet(header: &NetHeader, head: &[u8], length: usize) -> Option<usize> {
    let (link, _) = link(head)?;
    let length = header.gso.map_or(length, |gso| {
        length.min(usize::from(gso.headers) + usize::from(gso.size))
    });
    length.checked_sub(link)
}
