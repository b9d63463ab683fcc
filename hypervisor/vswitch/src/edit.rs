//! Doing to a frame's bytes what steps say. Only the headers are needed: an [`Editor`] holds the
//! first bytes of a frame and changes them step by step; who copies the frame writes these, then
//! the rest of the original, then padding.
//!
//! Checksums are brought up to date by the difference (RFC 1624, eqn. 3), so a payload is never
//! read and a checksum that was wrong stays wrong.

use crate::key::{FRAG_LATER, FlowKey, Layout, Vlan, ether, proto};
use crate::translate::{Field, Step};
use crate::{MacAddr, PortId};

/// How much of a frame an editor takes in.
pub const HEADER: usize = 128;
/// Room for two more tags.
const ROOM: usize = 8;
/// The shortest frame on the wire, without its check sequence (IEEE 802.3 §4.2.3.3).
pub const MIN_FRAME: usize = 60;

/// What stands in the checksum field of TCP or UDP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Checksum {
    /// A checksum.
    Full,
    /// The sum of the pseudo header, to be completed by whoever sends it to a wire (virtio 1.2
    /// §5.1.6.2, `VIRTIO_NET_HDR_F_NEEDS_CSUM`).
    Partial,
}

/// The beginning of a frame on its way through steps.
#[derive(Clone, Debug)]
pub struct Editor {
    bytes: [u8; ROOM + HEADER],
    /// Where the frame begins in `bytes`.
    start: usize,
    /// How many bytes of the original are in.
    taken: usize,
    /// Of the original, from its beginning.
    layout: Layout,
    key: FlowKey,
    checksum: Checksum,
}

impl Editor {
    /// Takes in the first [`HEADER`] bytes, or fewer, of a frame of `length` bytes.
    #[must_use]
    pub fn new(prefix: &[u8], length: usize, checksum: Checksum) -> Self {
        let prefix = prefix.get(..HEADER).unwrap_or(prefix);
        let mut bytes = [0; ROOM + HEADER];
        for (to, from) in bytes.iter_mut().skip(ROOM).zip(prefix) {
            *to = *from;
        }
        let found = FlowKey::extract_with(prefix, length, PortId::NONE);
        let (key, layout) = found.unwrap_or_default();
        Self {
            bytes,
            start: ROOM,
            taken: prefix.len(),
            layout,
            key,
            checksum,
        }
    }

    /// The frame's beginning as it is now. It stands for the first [`taken`](Self::taken) bytes of
    /// the original.
    #[must_use]
    pub fn header(&self) -> &[u8] {
        let whole = self.bytes.get(self.start..ROOM + self.taken);
        whole.unwrap_or_default()
    }

    /// How many bytes of the original frame [`header`](Self::header) stands for.
    #[must_use]
    pub const fn taken(&self) -> usize {
        self.taken
    }

    /// How long a frame that was `length` bytes long is now, without padding.
    #[must_use]
    pub const fn length(&self, length: usize) -> usize {
        (length + ROOM).saturating_sub(self.start)
    }

    /// How many zero bytes to put behind a frame that was `length` bytes long: one that became
    /// shorter than the shortest on a wire because it lost a tag is filled up.
    #[must_use]
    pub const fn padding(&self, length: usize) -> usize {
        if self.start > ROOM {
            MIN_FRAME.saturating_sub(self.length(length))
        } else {
            0
        }
    }

    /// Does a step. Outputs and meters change nothing; neither does what the frame has no place
    /// for.
    pub fn apply(&mut self, step: &Step) {
        match *step {
            Step::Output(_) | Step::Meter(_) => {}
            Step::PushVlan(tag) => self.push(tag),
            Step::PopVlan => self.pop(),
            Step::Set(field) => {
                // A field that the frame does not have stays as it is: nothing.
                let _ = self.set(field);
            }
        }
    }

    fn at<const N: usize>(&mut self, offset: usize) -> Option<&mut [u8; N]> {
        let end = ROOM + self.taken;
        self.bytes.get_mut(offset..end)?.first_chunk_mut()
    }

    fn push(&mut self, tag: Vlan) {
        let Some(start) = self.start.checked_sub(4) else {
            return;
        };
        let Some(&mut addresses) = self.at::<12>(self.start) else {
            return;
        };
        self.start = start;
        let [t0, t1] = tag.tpid.to_be_bytes();
        let [c0, c1] = (tag.tci & !Vlan::PRESENT).to_be_bytes();
        if let Some(to) = self.at(start) {
            *to = addresses;
        }
        if let Some(to) = self.at(start + 12) {
            *to = [t0, t1, c0, c1];
        }
    }

    fn pop(&mut self) {
        let start = self.start;
        let Some(&mut addresses) = self.at::<12>(start) else {
            return;
        };
        let tagged = self.at::<6>(start + 12).is_some_and(|&mut [a, b, ..]| {
            let tpid = u16::from_be_bytes([a, b]);
            matches!(tpid, ether::VLAN | ether::SERVICE_VLAN)
        });
        if tagged && let Some(to) = self.at(start + 4) {
            *to = addresses;
            self.start = start + 4;
        }
    }

    fn set(&mut self, field: Field) -> Option<()> {
        let start = self.start;
        let network = ROOM + self.layout.network;
        let is = |kind: u16| self.key.dl_type == kind && self.layout.network != 0;
        let (v4, v6) = (is(ether::IPV4), is(ether::IPV6));
        let arp = is(ether::ARP) || is(ether::RARP);
        match field {
            Field::DlDst(MacAddr(mac)) => *self.at(start)? = mac,
            Field::DlSrc(MacAddr(mac)) => *self.at(start + 6)? = mac,
            Field::NwSrc([.., a, b, c, d]) if v4 => {
                self.address(network + 12, [a, b, c, d], Some(network))?;
            }
            Field::NwDst([.., a, b, c, d]) if v4 => {
                self.address(network + 16, [a, b, c, d], Some(network))?;
            }
            Field::NwSrc(address) if v6 => self.address(network + 8, address, None)?,
            // With a routing header under way, checksums are about the last destination.
            Field::NwDst(address) if v6 && self.layout.routed => *self.at(network + 24)? = address,
            Field::NwDst(address) if v6 => self.address(network + 24, address, None)?,
            Field::NwTos(tos) if v4 => {
                let &mut [first, _] = self.at(network)?;
                self.v4_word(network, 0, [first, tos])?;
            }
            Field::NwTos(tos) if v6 => {
                let [first, second] = self.at(network)?;
                *first = (*first & 0xf0) | (tos >> 4);
                *second = (*second & 0xf) | (tos << 4);
            }
            Field::NwTtl(ttl) if v4 => {
                let &mut [_, protocol] = self.at(network + 8)?;
                self.v4_word(network, 8, [ttl, protocol])?;
            }
            Field::NwTtl(ttl) if v6 => *self.at(network + 7)? = [ttl],
            Field::TpSrc(kind) if self.key.is_message() => self.message(0, kind as u8)?,
            Field::TpDst(code) if self.key.is_message() => self.message(1, code as u8)?,
            Field::TpSrc(port) => self.port(0, port)?,
            Field::TpDst(port) => self.port(2, port)?,
            Field::NdTarget(target) => self.neighbour(8, target)?,
            Field::NdSll(MacAddr(mac)) => self.option(1, mac)?,
            Field::NdTll(MacAddr(mac)) => self.option(2, mac)?,
            Field::ArpOp(op) if arp => *self.at(network + 6)? = [0, op],
            Field::ArpSha(MacAddr(mac)) if arp => *self.at(network + 8)? = mac,
            Field::ArpSpa(address) if arp => *self.at(network + 14)? = address,
            Field::ArpTha(MacAddr(mac)) if arp => *self.at(network + 18)? = mac,
            Field::ArpTpa(address) if arp => *self.at(network + 24)? = address,
            _ => return None,
        }
        Some(())
    }

    /// Changes two bytes of an IPv4 header, and its checksum.
    fn v4_word(&mut self, network: usize, offset: usize, new: [u8; 2]) -> Option<()> {
        let old = core::mem::replace(self.at(network + offset)?, new);
        let sum = self.at(network + 10)?;
        *sum = updated(*sum, &old, &new);
        Some(())
    }

    /// Changes an address, and the checksums that cover it: IPv4's at `header`, and the transport's.
    fn address<const N: usize>(
        &mut self,
        offset: usize,
        new: [u8; N],
        header: Option<usize>,
    ) -> Option<()> {
        let old = core::mem::replace(self.at(offset)?, new);
        if let Some(header) = header {
            let sum = self.at(header + 10)?;
            *sum = updated(*sum, &old, &new);
        }
        let v4 = header.is_some();
        // ICMP's checksum is about the message alone.
        if self.key.nw_proto == proto::ICMP || v4 && self.key.nw_proto == proto::ICMPV6 {
            return Some(());
        }
        let partial = self.checksum == Checksum::Partial;
        if let Some(sum) = self.transport_sum() {
            *sum = match partial {
                // What stands there is a sum, not its complement.
                true => complement(updated(complement(*sum), &old, &new)),
                false => updated(*sum, &old, &new),
            };
            self.no_zero();
        }
        Some(())
    }

    /// Changes a port, and the checksum.
    fn port(&mut self, offset: usize, port: u16) -> Option<()> {
        let protocol = self.key.nw_proto;
        let at = ROOM + self.layout.transport;
        if !matches!(protocol, proto::TCP | proto::UDP) || self.transport_sum_offset().is_none() {
            return None;
        }
        self.covered(at + offset, port.to_be_bytes())
    }

    /// Changes the type (0) or the code (1) of an ICMP message.
    fn message(&mut self, which: usize, to: u8) -> Option<()> {
        self.transport_sum_offset()?;
        let at = ROOM + self.layout.transport;
        let mut pair: [u8; 2] = *self.at(at)?;
        *pair.get_mut(which)? = to;
        self.covered(at, pair)
    }

    /// Changes what is `offset` bytes behind the beginning of a neighbour message (RFC 4861 §4.3).
    fn neighbour<const N: usize>(&mut self, offset: usize, new: [u8; N]) -> Option<()> {
        let at = ROOM + self.layout.transport;
        let &mut [kind, code] = self.at(at)?;
        let within = self.layout.transport + offset + N <= self.layout.end;
        let meant = self.key.dl_type == ether::IPV6 && self.key.is_message();
        if !within || !meant || !matches!((kind, code), (135 | 136, 0)) {
            return None;
        }
        self.covered(at + offset, new)
    }

    /// Changes the first link-layer address option of that kind.
    fn option(&mut self, kind: u8, mac: [u8; 6]) -> Option<()> {
        let mut offset = 24;
        loop {
            let &mut [found, units] = self.at(ROOM + self.layout.transport + offset)?;
            match (found, units) {
                (_, 0) => return None,
                (found, 1) if found == kind => return self.neighbour(offset + 2, mac),
                _ => offset += usize::from(units) * 8,
            }
        }
    }

    /// Changes bytes that the transport's checksum is about.
    fn covered<const N: usize>(&mut self, offset: usize, new: [u8; N]) -> Option<()> {
        let old = core::mem::replace(self.at(offset)?, new);
        if self.checksum == Checksum::Full
            && let Some(sum) = self.transport_sum()
        {
            *sum = updated(*sum, &old, &new);
            self.no_zero();
        }
        Some(())
    }

    /// Where the transport header's checksum is, if there is a whole header.
    fn transport_sum_offset(&self) -> Option<usize> {
        let (header, offset) = match self.key.nw_proto {
            proto::TCP => (20, 16),
            proto::UDP => (8, 6),
            proto::ICMP if self.key.is_message() => (8, 2),
            proto::ICMPV6 => (4, 2),
            _ => return None,
        };
        let begin = self.layout.transport;
        let whole = begin != 0 && begin + header <= self.taken.min(self.layout.end);
        (whole && self.key.nw_frag & FRAG_LATER == 0).then_some(ROOM + begin + offset)
    }

    /// The transport's checksum. A UDP checksum of zero is none.
    fn transport_sum(&mut self) -> Option<&mut [u8; 2]> {
        let offset = self.transport_sum_offset()?;
        let udp = self.key.nw_proto == proto::UDP && self.checksum == Checksum::Full;
        self.at(offset).filter(|sum| !udp || **sum != [0, 0])
    }

    /// UDP sends a checksum that comes out as zero as all ones (RFC 768).
    fn no_zero(&mut self) {
        let udp = self.key.nw_proto == proto::UDP && self.checksum == Checksum::Full;
        let offset = self.transport_sum_offset().filter(|_| udp);
        if let Some(sum) = offset.and_then(|o| self.at(o))
            && *sum == [0, 0]
        {
            *sum = [0xff, 0xff];
        }
    }
}

const fn complement([a, b]: [u8; 2]) -> [u8; 2] {
    [!a, !b]
}

/// A checksum after `old` has become `new`, which are of the same even length.
fn updated(sum: [u8; 2], old: &[u8], new: &[u8]) -> [u8; 2] {
    let words = |bytes: &'_ [u8], flip: u16| -> u32 {
        let pairs = bytes.as_chunks::<2>().0.iter();
        pairs
            .map(|p| u32::from(u16::from_be_bytes(*p) ^ flip))
            .sum()
    };
    let mut total = u32::from(!u16::from_be_bytes(sum)) + words(old, 0xffff) + words(new, 0);
    while total >> 16 != 0 {
        total = (total & 0xffff) + (total >> 16);
    }
    (!(total as u16)).to_be_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::key::ipv4;
    use proptest::prelude::*;

    /// The sum over words, the naive way.
    fn sum(bytes: &[u8]) -> u16 {
        let mut total = 0u32;
        for pair in bytes.chunks(2) {
            total += u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0));
        }
        while total >> 16 != 0 {
            total = (total & 0xffff) + (total >> 16);
        }
        total as u16
    }

    fn tag(id: u16, priority: u8) -> Vlan {
        Vlan::new(id, priority)
    }

    /// An IPv4 or IPv6 frame with tags and right checksums.
    fn packet(tags: &[Vlan], v6: bool, protocol: u8, payload: &[u8]) -> Vec<u8> {
        let mut frame = vec![2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2];
        for tag in tags {
            frame.extend(tag.tpid.to_be_bytes());
            frame.extend((tag.tci & !Vlan::PRESENT).to_be_bytes());
        }
        let (length, at) = match protocol {
            proto::TCP => (20, 16),
            proto::UDP => (8, 6),
            _ => (8, 2),
        };
        let mut transport = vec![0; length];
        transport[..4].copy_from_slice(&[0x12, 0x34, 0, 80]);
        if protocol == proto::TCP {
            transport[12] = 0x50;
        } else if protocol == proto::UDP {
            transport[4..6].copy_from_slice(&(8 + payload.len() as u16).to_be_bytes());
        }
        transport.extend(payload);
        let size = transport.len() as u16;
        let mut header = if v6 {
            let mut header = vec![0x60, 0, 0, 0];
            header.extend(size.to_be_bytes());
            header.extend([protocol, 64]);
            header.extend((1..=32).map(|n: u8| n.wrapping_mul(37)));
            header
        } else {
            let mut header = vec![0x45, 0];
            header.extend((size + 20).to_be_bytes());
            header.extend([0, 1, 0, 0, 64, protocol, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
            header
        };
        if !v6 {
            let value = !sum(&header);
            header[10..12].copy_from_slice(&value.to_be_bytes());
        }
        let value = !transport_sum(&header, &transport, v6, protocol);
        transport[at..at + 2].copy_from_slice(&value.to_be_bytes());
        frame.extend(if v6 { [0x86, 0xdd] } else { [8, 0] });
        frame.extend(header);
        frame.extend(transport);
        frame
    }

    fn transport_sum(header: &[u8], transport: &[u8], v6: bool, protocol: u8) -> u16 {
        let mut pseudo = header[if v6 { 8 } else { 12 }..].to_vec();
        pseudo.extend([0, protocol]);
        pseudo.extend((transport.len() as u16).to_be_bytes());
        pseudo.extend(transport);
        sum(&pseudo)
    }

    /// Whether both checksums of an untagged packet are right.
    fn is_sound(frame: &[u8]) -> bool {
        let v6 = frame[12] == 0x86;
        let (header, transport) = frame[14..].split_at(if v6 { 40 } else { 20 });
        let protocol = header[if v6 { 6 } else { 9 }];
        (v6 || sum(header) == 0xffff) && transport_sum(header, transport, v6, protocol) == 0xffff
    }

    fn edited(frame: &[u8], steps: &[Step]) -> Vec<u8> {
        let mut editor = Editor::new(frame, frame.len(), Checksum::Full);
        for step in steps {
            editor.apply(step);
        }
        let mut out = editor.header().to_vec();
        out.extend(&frame[editor.taken()..]);
        assert_eq!(out.len(), editor.length(frame.len()));
        out.extend(vec![0; editor.padding(frame.len())]);
        out
    }

    #[test]
    fn tags_come_and_go() {
        let payload = [7; 200];
        for (had, steps, wants) in [
            (vec![], vec![Step::PushVlan(tag(9, 3))], vec![tag(9, 3)]),
            (vec![tag(9, 3)], vec![Step::PopVlan], vec![]),
            (
                vec![tag(9, 3), tag(5, 0)],
                vec![Step::PopVlan, Step::PopVlan, Step::PushVlan(tag(1, 1))],
                vec![tag(1, 1)],
            ),
            (
                vec![],
                vec![Step::PushVlan(tag(5, 0)), Step::PushVlan(tag(9, 3))],
                vec![tag(9, 3), tag(5, 0)],
            ),
        ] {
            let before = packet(&had, false, proto::UDP, &payload);
            assert_eq!(
                edited(&before, &steps),
                packet(&wants, false, proto::UDP, &payload)
            );
        }
    }

    #[test]
    fn a_frame_that_lost_its_tag_is_padded() {
        let mut tagged = packet(&[tag(9, 0)], false, proto::UDP, &[1; 14]);
        assert_eq!(tagged.len(), 60);
        let out = edited(&tagged, &[Step::PopVlan]);
        assert_eq!((out.len(), &out[56..]), (60, &[0; 4][..]));
        // One that came in too short is not made longer unless it lost a tag.
        tagged.truncate(40);
        assert_eq!(
            edited(&tagged, &[Step::Set(Field::DlSrc(MacAddr([9; 6])))]).len(),
            40
        );
    }

    #[test]
    fn a_frame_without_a_tag_keeps_its_type() {
        let frame = packet(&[], false, proto::UDP, &[]);
        assert_eq!(edited(&frame, &[Step::PopVlan])[..frame.len()], frame[..]);
        for length in 0..14 {
            let cut = &frame[..length];
            assert_eq!(
                edited(cut, &[Step::PopVlan, Step::PushVlan(tag(1, 0))])[..length.min(12)],
                cut[..length.min(12)]
            );
        }
    }

    #[test]
    fn a_sum_that_is_not_complete_stays_a_sum_of_the_pseudo_header() {
        let mut frame = packet(&[], false, proto::UDP, &[1, 2, 3, 4]);
        let pseudo = |frame: &[u8]| {
            let mut bytes = frame[26..34].to_vec();
            bytes.extend([0, proto::UDP, 0, 12]);
            sum(&bytes).to_be_bytes()
        };
        let begin = pseudo(&frame);
        frame[40..42].copy_from_slice(&begin);
        let mut editor = Editor::new(&frame, frame.len(), Checksum::Partial);
        editor.apply(&Step::Set(Field::NwDst(ipv4([192, 168, 1, 77]))));
        editor.apply(&Step::Set(Field::TpDst(4711)));
        let out = editor.header();
        assert_eq!(out[40..42], pseudo(out));
        assert_eq!(out[30..34], [192, 168, 1, 77]);
    }

    /// A neighbour solicitation with options: something else, the source's address, its own again.
    fn solicitation() -> Vec<u8> {
        let mut body = vec![0xfe; 16];
        body.extend([14, 1, 1, 2, 3, 4, 5, 6, 1, 1, 2, 0, 0, 0, 0, 9]);
        let mut frame = packet(&[], true, proto::ICMPV6, &body);
        frame[54..56].copy_from_slice(&[135, 0]);
        frame[56..58].copy_from_slice(&[0, 0]);
        let (header, transport) = frame[14..].split_at(40);
        let sum = !transport_sum(header, transport, true, proto::ICMPV6);
        frame[56..58].copy_from_slice(&sum.to_be_bytes());
        frame
    }

    #[test]
    fn neighbour_messages_keep_right_checksums() {
        let frame = solicitation();
        assert!(is_sound(&frame));
        let (target, source) = ([0x20; 16], MacAddr([2, 0, 0, 0, 0, 7]));
        let steps = [Field::NdTarget(target), Field::NdSll(source)].map(Step::Set);
        let out = edited(&frame, &steps);
        assert!(is_sound(&out));
        let key = FlowKey::extract(&out, PortId(1)).unwrap();
        assert_eq!((key.nd_target, key.arp_sha), (target, source));
        // There is no such option, and nothing to change.
        let other = edited(&frame, &[Step::Set(Field::NdTll(source))]);
        assert_eq!(other, frame);
        // An option that ends the frame too early is left alone, as is one of no length.
        let mut broken = frame.clone();
        broken[78..80].copy_from_slice(&[1, 0]);
        assert_eq!(edited(&broken, &steps[1..]), broken);
        assert_eq!(edited(&frame[..90], &steps[1..]), frame[..90]);
    }

    #[test]
    fn messages_change_type_and_code_with_their_checksum() {
        let frame = packet(&[], false, proto::ICMP, &[1, 2, 3]);
        let mut frame = frame;
        frame[36..38].copy_from_slice(&[0, 0]);
        let right = !sum(&frame[34..]);
        frame[36..38].copy_from_slice(&right.to_be_bytes());
        let out = edited(
            &frame,
            &[
                Field::TpSrc(11),
                Field::TpDst(1),
                Field::NwSrc(ipv4([9, 9, 9, 9])),
            ]
            .map(Step::Set),
        );
        assert_eq!(out[34..36], [11, 1]);
        assert_eq!((sum(&out[14..34]), sum(&out[34..])), (0xffff, 0xffff));
        let frame = solicitation();
        let out = edited(&frame, &[Field::TpSrc(128), Field::TpDst(9)].map(Step::Set));
        assert!(is_sound(&out) && out[54..56] == [128, 9]);
    }

    fn field(v6: bool) -> impl Strategy<Value = Field> {
        prop_oneof![
            any::<[u8; 6]>().prop_map(|m| Field::DlSrc(MacAddr(m))),
            any::<[u8; 6]>().prop_map(|m| Field::DlDst(MacAddr(m))),
            any::<[u8; 16]>().prop_map(move |a| Field::NwSrc(if v6 {
                a
            } else {
                ipv4([a[0], a[1], a[2], a[3]])
            })),
            any::<[u8; 16]>().prop_map(move |a| Field::NwDst(if v6 {
                a
            } else {
                ipv4([a[0], a[1], a[2], a[3]])
            })),
            any::<u8>().prop_map(Field::NwTos),
            any::<u8>().prop_map(Field::NwTtl),
            any::<u16>().prop_map(Field::TpSrc),
            any::<u16>().prop_map(Field::TpDst),
        ]
    }

    fn neighbour_field() -> impl Strategy<Value = Field> {
        prop_oneof![
            any::<[u8; 16]>().prop_map(Field::NdTarget),
            any::<[u8; 6]>().prop_map(|m| Field::NdSll(MacAddr(m))),
            any::<[u8; 6]>().prop_map(|m| Field::NdTll(MacAddr(m))),
        ]
    }

    proptest! {
        #[test]
        fn checksums_stay_right_and_the_key_says_what_was_set(
            v6: bool,
            protocol in prop_oneof![Just(proto::TCP), Just(proto::UDP)],
            payload in prop::collection::vec(any::<u8>(), 0..300),
            fields in any::<bool>().prop_flat_map(|_| prop::collection::vec((field(true), field(false)), 1..8)),
        ) {
            let frame = packet(&[], v6, protocol, &payload);
            prop_assert!(is_sound(&frame));
            let mut want = FlowKey::extract(&frame, PortId(1)).unwrap();
            let fields: Vec<Field> = fields.into_iter().map(|(a, b)| if v6 { a } else { b }).collect();
            let steps: Vec<Step> = fields.iter().map(|f| Step::Set(*f)).collect();
            for field in fields {
                want.set(field);
            }
            let out = edited(&frame, &steps);
            prop_assert!(is_sound(&out));
            prop_assert_eq!(FlowKey::extract(&out, PortId(1)).unwrap(), want);
        }

        #[test]
        fn any_bytes_and_steps_are_taken(
            frame in prop_oneof![
                prop::collection::vec(any::<u8>(), 0..160),
                (0..100usize, 0..94usize, any::<u8>()).prop_map(|(length, at, byte)| {
                    let mut frame = solicitation();
                    if let Some(to) = frame.get_mut(at) {
                        *to = byte;
                    }
                    frame.truncate(length);
                    frame
                }),
            ],
            fields in prop::collection::vec(prop_oneof![field(true), neighbour_field()], 0..6),
            tags in prop::collection::vec(any::<Option<u16>>(), 0..6),
        ) {
            let mut editor = Editor::new(&frame, frame.len(), Checksum::Full);
            for tag in tags {
                editor.apply(&tag.map_or(Step::PopVlan, |t| Step::PushVlan(Vlan { tpid: ether::VLAN, tci: t })));
            }
            for field in fields {
                editor.apply(&Step::Set(field));
            }
            prop_assert!(editor.header().len() <= ROOM + HEADER);
        }
    }
}
