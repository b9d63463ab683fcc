//! Offloads against smoltcp, which reads and checks what comes out.

use proptest::prelude::*;
use smoltcp::wire::{
    EthernetFrame, EthernetProtocol, IpAddress, IpProtocol, Ipv4Packet, Ipv6Packet, TcpPacket,
    UdpPacket,
};

use super::super::frame::Layout;
use super::super::offload::{Segmenter, completed};
use super::*;

/// What a packet is made of.
#[derive(Clone, Debug)]
struct Packet {
    six: bool,
    tcp: bool,
    /// Tags in front.
    tags: usize,
    /// IPv4 options, or an IPv6 destination options header, in units of 4 and 8 bytes.
    extra: usize,
    /// TCP options in units of 4 bytes.
    options: usize,
    flags: u8,
    sequence: u32,
    identification: u16,
    payload: Vec<u8>,
}

impl Packet {
    fn tcp(length: usize) -> Self {
        Self {
            six: false,
            tcp: true,
            tags: 0,
            extra: 0,
            options: 3,
            flags: 0x18,
            sequence: 0xffff_ff00,
            identification: 0xfffe,
            payload: (0..length).map(|n| (n * 7 + n / 251) as u8).collect(),
        }
    }
    fn network(&self) -> usize {
        14 + 4 * self.tags
    }
    fn transport(&self) -> usize {
        self.network()
            + if self.six {
                40 + 8 * self.extra
            } else {
                20 + 4 * self.extra
            }
    }
    fn headers(&self) -> usize {
        self.transport() + if self.tcp { 20 + 4 * self.options } else { 8 }
    }
    fn offset(&self) -> u16 {
        if self.tcp { 16 } else { 6 }
    }
    fn protocol(&self) -> u8 {
        if self.tcp { 6 } else { 17 }
    }

    /// The frame as a driver hands it over: the checksum field holds the pseudo header's sum.
    fn frame(&self) -> Vec<u8> {
        let mut frame = vec![2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2];
        for n in 0..self.tags {
            frame.extend([
                if n == 0 && self.tags > 1 { 0x88 } else { 0x81 },
                0xa8 * u8::from(n == 0 && self.tags > 1),
                0,
                5,
            ]);
        }
        let behind = self.headers() - self.transport() + self.payload.len();
        if self.six {
            let all = (8 * self.extra + behind) as u16;
            frame.extend([0x86, 0xdd, 0x60, 0, 0, 0]);
            frame.extend(all.to_be_bytes());
            frame.extend([if self.extra > 0 { 60 } else { self.protocol() }, 64]);
            frame.extend((0..32).map(|n| if n % 16 == 0 { 0xfd } else { n * 3 + 1 }));
            if self.extra > 0 {
                let pad = 8 * self.extra - 4;
                frame.extend([self.protocol(), self.extra as u8 - 1, 1, pad as u8]);
                frame.resize(frame.len() + pad, 0);
            }
        } else {
            let all = (20 + 4 * self.extra + behind) as u16;
            frame.extend([8, 0, 0x45 + self.extra as u8, 0]);
            frame.extend(all.to_be_bytes());
            frame.extend(self.identification.to_be_bytes());
            frame.extend([0x40, 0, 64, self.protocol(), 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
            frame.resize(frame.len() + 4 * self.extra, 1);
            let at = self.network();
            let sum = !naive(&frame[at..]);
            frame[at + 10..at + 12].copy_from_slice(&sum.to_be_bytes());
        }
        assert_eq!(frame.len(), self.transport());
        frame.extend([0x12, 0x34, 0x00, 0x50]);
        if self.tcp {
            frame.extend(self.sequence.to_be_bytes());
            frame.extend([
                0,
                0,
                0,
                1,
                (5 + self.options as u8) << 4,
                self.flags,
                1,
                0,
                0,
                0,
                0,
                0,
            ]);
            frame.resize(frame.len() + 4 * self.options, 1);
        } else {
            frame.extend((behind as u16).to_be_bytes());
            frame.extend([0, 0]);
        }
        frame.extend(&self.payload);
        let addresses = if self.six {
            self.network() + 8..self.network() + 40
        } else {
            self.network() + 12..self.network() + 20
        };
        let mut pseudo = frame[addresses].to_vec();
        pseudo.extend([0, self.protocol()]);
        pseudo.extend((behind as u16).to_be_bytes());
        let field = self.transport() + usize::from(self.offset());
        frame[field..field + 2].copy_from_slice(&naive(&pseudo).to_be_bytes());
        frame
    }

    /// The driver's header, to segment into payloads of `size` bytes if that is not zero.
    fn header(&self, size: u16) -> [u8; 12] {
        let kind = match (size, self.tcp, self.six) {
            (0, _, _) => 0,
            (_, true, false) => 1,
            (_, true, true) => 4,
            (_, false, _) => 5,
        };
        header(1, kind, size, self.transport() as u16, self.offset())
    }
}

fn header(flags: u8, kind: u8, size: u16, start: u16, offset: u16) -> [u8; 12] {
    let mut bytes = [flags, kind, 0xff, 0xff, 0, 0, 0, 0, 0, 0, 0, 0];
    bytes[4..6].copy_from_slice(&size.to_le_bytes());
    bytes[6..8].copy_from_slice(&start.to_le_bytes());
    bytes[8..10].copy_from_slice(&offset.to_le_bytes());
    bytes
}

/// RFC 1071, word by word.
fn naive(bytes: &[u8]) -> u16 {
    let words = bytes
        .chunks(2)
        .map(|word| u32::from(word[0]) << 8 | u32::from(*word.get(1).unwrap_or(&0)));
    let mut sum: u32 = words.sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

/// What smoltcp reads of a frame after it checked lengths and checksums.
#[derive(Debug, PartialEq)]
struct Read {
    identification: Option<u16>,
    sequence: u32,
    flags: (bool, bool, bool),
    payload: Vec<u8>,
}

fn read(frame: &[u8], network: usize) -> Read {
    // smoltcp knows no tags: the frame as it would be without.
    let untagged = [&frame[..12], &frame[network - 2..]].concat();
    let ethernet = EthernetFrame::new_checked(&untagged[..]).unwrap();
    let (source, destination, identification, protocol, body);
    match ethernet.ethertype() {
        EthernetProtocol::Ipv4 => {
            let ip = Ipv4Packet::new_checked(ethernet.payload()).unwrap();
            assert!(ip.verify_checksum());
            assert_eq!(usize::from(ip.total_len()), ethernet.payload().len());
            source = IpAddress::from(ip.src_addr());
            destination = IpAddress::from(ip.dst_addr());
            identification = Some(ip.ident());
            protocol = ip.next_header();
            body = ip.payload().to_vec();
        }
        EthernetProtocol::Ipv6 => {
            let ip = Ipv6Packet::new_checked(ethernet.payload()).unwrap();
            assert_eq!(usize::from(ip.payload_len()) + 40, ethernet.payload().len());
            source = ip.src_addr().into();
            destination = ip.dst_addr().into();
            identification = None;
            let options = ip.next_header() == IpProtocol::Ipv6Opts;
            let payload = ip.payload();
            let skip = if options {
                8 + 8 * usize::from(payload[1])
            } else {
                0
            };
            protocol = if options {
                payload[0].into()
            } else {
                ip.next_header()
            };
            body = payload[skip..].to_vec();
        }
        other => panic!("{other}"),
    }
    match protocol {
        IpProtocol::Tcp => {
            let tcp = TcpPacket::new_checked(&body[..]).unwrap();
            assert!(tcp.verify_checksum(&source, &destination));
            Read {
                identification,
                sequence: tcp.seq_number().0 as u32,
                flags: (tcp.fin(), tcp.psh(), tcp.cwr()),
                payload: tcp.payload().to_vec(),
            }
        }
        IpProtocol::Udp => {
            let udp = UdpPacket::new_checked(&body[..]).unwrap();
            assert_ne!(udp.checksum(), 0);
            assert!(udp.verify_checksum(&source, &destination));
            assert_eq!(usize::from(udp.len()), body.len());
            Read {
                identification,
                sequence: 0,
                flags: (false, false, false),
                payload: udp.payload().to_vec(),
            }
        }
        other => panic!("{other}"),
    }
}

fn bytes(frame: &Frame<'_>) -> Vec<u8> {
    let bytes = frame.pieces().collect::<Vec<_>>().concat();
    assert_eq!(bytes.len(), frame.len());
    bytes
}

/// The frame in three pieces.
fn split(frame: &[u8], one: usize, two: usize) -> Frame<'_> {
    let (a, b) = (one.min(frame.len()), two.min(frame.len()));
    let (a, b) = (a.min(b), a.max(b));
    Frame::new([&frame[..a], &frame[a..b], &frame[b..]])
}

/// All segments of a frame, made complete.
fn segments(frame: Frame<'_>, gso: Gso, complete: bool) -> Vec<Vec<u8>> {
    let mut segmenter = Segmenter::new(frame, gso, complete).unwrap();
    let mut all = Vec::new();
    while let Some((header, segment)) = segmenter.next() {
        all.push(match header.checksum {
            Checksum::Partial { start, offset } => {
                assert!(!complete);
                completed(&Frame::whole(&bytes(&segment)), start, offset, bytes).unwrap()
            }
            checksum => {
                assert_eq!(checksum, Checksum::Valid);
                bytes(&segment)
            }
        });
    }
    all
}

fn packet() -> impl Strategy<Value = Packet> {
    let payload = prop_oneof![0usize..200, 1000usize..4000, 60_000usize..65_000];
    let shape = (
        any::<bool>(),
        any::<bool>(),
        0usize..3,
        0usize..3,
        0usize..=10,
    );
    let numbers = (
        any::<u8>(),
        any::<u32>(),
        any::<u16>(),
        payload,
        any::<u8>(),
    );
    (shape, numbers).prop_map(
        |((six, tcp, tags, extra, options), (flags, sequence, identification, length, seed))| {
            Packet {
                six,
                tcp,
                tags,
                extra,
                options,
                // Neither SYN nor RST.
                flags: flags & !6,
                sequence,
                identification,
                payload: (0..length)
                    .map(|n| (n as u8).wrapping_mul(seed) ^ (n / 256) as u8)
                    .collect(),
            }
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_completed_checksum_is_right(packet in packet(), cuts in (0usize..300, 0usize..66_000)) {
        let frame = packet.frame();
        let header = NetHeader::check(packet.header(0), feature::ALL, &frame).unwrap();
        let Checksum::Partial { start, offset } = header.checksum else { panic!() };
        let whole = completed(&split(&frame, cuts.0, cuts.1), start, offset, bytes).unwrap();
        let found = read(&whole, packet.network());
        prop_assert_eq!(found.payload, packet.payload);
    }

    #[test]
    fn segments_are_right_and_make_the_packet_again(
        packet in packet(),
        size in 48u16..9000,
        cuts in (0usize..300, 0usize..66_000),
        complete: bool,
    ) {
        let length = packet.payload.len();
        prop_assume!(length > 0 && (packet.tcp || length <= 128 * usize::from(size)));
        let frame = packet.frame();
        let header = NetHeader::check(packet.header(size), feature::ALL, &frame).unwrap();
        let gso = header.gso.unwrap();
        prop_assert_eq!(usize::from(gso.headers), packet.headers());
        let segments = segments(split(&frame, cuts.0, cuts.1), gso, complete);
        prop_assert_eq!(segments.len(), length.div_ceil(size.into()));
        let mut payload = Vec::new();
        for (n, segment) in segments.iter().enumerate() {
            let (first, last) = (n == 0, n + 1 == segments.len());
            prop_assert_eq!(&segment[..packet.network()], &frame[..packet.network()]);
            let found = read(segment, packet.network());
            if !packet.six {
                prop_assert_eq!(found.identification, Some(packet.identification.wrapping_add(n as u16)));
            }
            if packet.tcp {
                prop_assert_eq!(found.sequence, packet.sequence.wrapping_add(payload.len() as u32));
                let has = |bit: u8| packet.flags & bit != 0;
                prop_assert_eq!(found.flags, (last && has(1), last && has(8), first && has(0x80)));
            }
            prop_assert!(last || found.payload.len() == usize::from(size));
            payload.extend(found.payload);
        }
        prop_assert_eq!(payload, packet.payload);
    }

    #[test]
    fn no_header_is_believed_and_none_is_fatal(
        packet in packet(),
        noise in prop::collection::vec((0usize..120, any::<u8>()), 0..6),
        lie in any::<[u8; 12]>(),
        mask in any::<[bool; 12]>(),
        cut in 0usize..70_000,
    ) {
        let mut frame = packet.frame();
        frame.truncate(cut);
        for (at, byte) in noise {
            if let Some(place) = frame.get_mut(at) {
                *place = byte;
            }
        }
        let mut header = packet.header(1000);
        for ((byte, lie), wrong) in header.iter_mut().zip(lie).zip(mask) {
            if wrong {
                *byte = lie;
            }
        }
        let Ok(checked) = NetHeader::check(header, feature::ALL, &frame) else { return Ok(()) };
        let whole = Frame::whole(&frame);
        if let Some(gso) = checked.gso {
            // What was accepted can be done, and the work is bounded.
            let segments = segments(whole, gso, true);
            prop_assert!(segments.len() <= 1400);
            let payload: usize = segments.iter().map(|one| one.len() - usize::from(gso.headers)).sum();
            prop_assert_eq!(payload, frame.len() - usize::from(gso.headers));
        } else if let Checksum::Partial { start, offset } = checked.checksum {
            // What a switch matches on stays as it was.
            let after = completed(&whole, start, offset, bytes).unwrap();
            let layout = Layout::of(&frame[..frame.len().min(256)]).unwrap();
            let field = layout.transport..layout.transport + 24;
            for at in (0..frame.len().min(field.end)).filter(|&at| after[at] != frame[at]) {
                let offset = match layout.protocol { 6 => 16, 17 => 6, _ => 2 };
                prop_assert!((offset..offset + 2).contains(&(at - field.start)));
            }
        }
    }
}

#[test]
fn lies_are_named() {
    let packet = Packet::tcp(5000);
    let frame = packet.frame();
    let all = feature::ALL;
    let (not, sum, cut) = (
        HeaderError::NotNegotiated,
        HeaderError::Checksum,
        HeaderError::Segmentation,
    );
    for (bytes, features, want) in [
        // No NEEDS_CSUM: places are not looked at; a size without a type neither.
        (header(0, 0, 77, 60_000, 60_000), all, Ok(())),
        (header(0xfe, 0, 0, 0, 0), all, Ok(())),
        (header(1, 0, 0, 34, 16), all, Ok(())),
        (header(0xff, 1, 1000, 34, 16), all, Ok(())),
        (header(1, 0x81, 1000, 34, 16), all, Ok(())),
        // Not negotiated.
        (header(1, 0, 0, 34, 16), all & !feature::CSUM, Err(not)),
        (
            header(1, 1, 1000, 34, 16),
            all & !feature::HOST_TSO4,
            Err(not),
        ),
        (
            header(1, 0x81, 1000, 34, 16),
            all & !feature::HOST_ECN,
            Err(not),
        ),
        (header(1, 3, 1000, 34, 16), all, Err(not)),
        // A checksum beyond the frame, in its addresses, in its ports.
        (header(1, 0, 0, 5054, 16), all, Err(sum)),
        (header(1, 0, 0, 65_535, 65_535), all, Err(sum)),
        (header(1, 0, 0, 0, 6), all, Err(sum)),
        (header(1, 0, 0, 14, 10), all, Err(sum)),
        (header(1, 0, 0, 34, 0), all, Err(sum)),
        (header(1, 0, 0, 34, 6), all, Err(sum)),
        (header(1, 0, 0, 35, 1), all, Err(sum)),
        // One of an inner packet.
        (header(1, 0, 0, 70, 6), all, Ok(())),
        (header(1, 1, 1000, 70, 6), all, Err(sum)),
        // Segmentation without a checksum, of an unknown type, of another protocol, by nothing.
        (header(0, 1, 1000, 34, 16), all, Err(cut)),
        (header(1, 2, 1000, 34, 16), all, Err(cut)),
        (header(1, 4, 1000, 34, 16), all, Err(cut)),
        (header(1, 5, 1000, 34, 16), all, Err(cut)),
        (header(1, 0x85, 1000, 34, 16), all, Err(cut)),
        (header(1, 0x21, 1000, 34, 16), all, Err(cut)),
        (header(1, 0x80, 1000, 34, 16), all, Err(cut)),
        (header(1, 1, 0, 34, 16), all, Err(cut)),
        (header(1, 1, 47, 34, 16), all, Err(cut)),
        (header(1, 1, 65_535, 34, 16), all, Err(cut)),
    ] {
        let got = NetHeader::check(bytes, features, &frame).map(|_| ());
        assert_eq!(got, want, "{bytes:?}");
    }
}

#[test]
fn frames_that_are_not_to_be_segmented_are_refused() {
    type Change = fn(&mut Packet, &mut Vec<u8>);
    let cases: [(&str, Change); 6] = [
        ("SYN", |packet, frame| frame[packet.transport() + 13] |= 2),
        ("RST", |packet, frame| frame[packet.transport() + 13] |= 4),
        ("a short TCP header", |packet, frame| {
            frame[packet.transport() + 12] = 0x40
        }),
        ("headers alone", |packet, frame| {
            frame.truncate(packet.headers())
        }),
        ("headers cut off", |packet, frame| {
            frame.truncate(packet.headers() - 1)
        }),
        (
            "a UDP packet for more than 128 datagrams",
            |packet, frame| {
                *packet = Packet {
                    tcp: false,
                    payload: vec![1; 129 * 100],
                    ..packet.clone()
                };
                *frame = packet.frame();
            },
        ),
    ];
    for (what, change) in cases {
        let mut packet = Packet::tcp(3000);
        let mut frame = packet.frame();
        change(&mut packet, &mut frame);
        let got = NetHeader::check(packet.header(100), feature::ALL, &frame);
        assert_eq!(got, Err(HeaderError::Segmentation), "{what}");
    }
    // A fragment has no checksum of its own, a frame that is no IP neither.
    for change in [
        |frame: &mut Vec<u8>| frame[20] = 0x20,
        |frame: &mut Vec<u8>| frame[12] = 0x99,
    ] {
        let packet = Packet::tcp(3000);
        let mut frame = packet.frame();
        change(&mut frame);
        let got = NetHeader::check(packet.header(100), feature::ALL, &frame);
        assert_eq!(got, Err(HeaderError::Checksum));
    }
}

#[test]
fn a_sum_of_zero_is_sent_as_ones() {
    let mut packet = Packet {
        tcp: false,
        ..Packet::tcp(2)
    };
    // A payload that makes the sum all ones, of which the complement is zero.
    packet.payload = vec![0, 0];
    let frame = packet.frame();
    let missing = !naive(&frame[packet.transport()..]);
    packet.payload = missing.to_be_bytes().to_vec();
    let frame = packet.frame();
    let whole = completed(&Frame::whole(&frame), 34, 6, bytes).unwrap();
    assert_eq!(whole[40..42], [0xff, 0xff]);
}

#[test]
fn a_routed_packet_keeps_the_sum_of_its_last_destination() {
    // The pseudo header of a packet with a routing header has another destination: the driver's sum
    // counts. Here it is off by 5 from that of the addresses in the header.
    let mut packet = Packet {
        six: true,
        extra: 3,
        ..Packet::tcp(1000)
    };
    packet.flags = 0x10;
    let mut frame = packet.frame();
    frame[20] = 43;
    let field = packet.transport() + 16;
    let sum = u16::from_be_bytes([frame[field], frame[field + 1]]);
    let (sum, carry) = sum.overflowing_add(5);
    frame[field..field + 2].copy_from_slice(&(sum + u16::from(carry)).to_be_bytes());
    let header = NetHeader::check(packet.header(600), feature::ALL, &frame).unwrap();
    let segments = segments(Frame::whole(&frame), header.gso.unwrap(), true);
    assert_eq!(segments.len(), 2);
    for segment in segments {
        let mut pseudo = segment[22..54].to_vec();
        let length = (segment.len() - packet.transport()) as u16;
        pseudo.extend([0, 6]);
        pseudo.extend(length.to_be_bytes());
        pseudo.extend([0, 5]);
        pseudo.extend(&segment[packet.transport()..]);
        assert_eq!(naive(&pseudo), 0xffff);
    }
}

#[test]
fn a_header_moves_with_a_tag() {
    let packet = Packet::tcp(3000);
    let frame = packet.frame();
    let header = NetHeader::check(packet.header(1000), feature::ALL, &frame).unwrap();
    let tagged = Packet {
        tags: 1,
        ..packet.clone()
    }
    .frame();
    let moved = header.moved(4).unwrap();
    assert_eq!(
        moved,
        NetHeader::check(
            Packet {
                tags: 1,
                ..packet.clone()
            }
            .header(1000),
            feature::ALL,
            &tagged
        )
        .unwrap()
    );
    assert_eq!(moved.moved(-4), Some(header));
    assert_eq!(header.moved(-100), None);
    // A prefix for the new headers, then the rest of the old frame.
    let frame = Frame::new([&tagged[..18], &frame[14..], &[]]);
    let segments = segments(frame, moved.gso.unwrap(), true);
    assert_eq!(segments.len(), 3);
    assert!(
        segments
            .iter()
            .all(|one| read(one, 18).payload.len() == 1000)
    );
}

#[test]
fn headers_say_to_a_driver_only_what_it_negotiated() {
    let packet = Packet {
        flags: 0x98,
        ..Packet::tcp(3000)
    };
    let frame = packet.frame();
    let header = NetHeader::check(packet.header(1000), feature::ALL, &frame).unwrap();
    assert!(
        header.gso.unwrap().ecn,
        "from the flags, whatever the header says"
    );
    assert_eq!(
        header.encode(feature::GUEST_OFFLOADS, 3),
        [1, 0x81, 66, 0, 0xe8, 3, 34, 0, 16, 0, 3, 0]
    );
    let valid = NetHeader {
        checksum: Checksum::Valid,
        gso: None,
    };
    assert_eq!(valid.encode(feature::GUEST_CSUM, 1)[..2], [2, 0]);
    assert_eq!(valid.encode(0, 1), [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0]);
}

#[test]
fn the_hash_of_a_flow_is_the_same_in_both_directions() {
    for six in [false, true] {
        let there = Packet {
            six,
            ..Packet::tcp(10)
        }
        .frame();
        let mut back = there.clone();
        let (from, length) = if six { (22, 16) } else { (26, 4) };
        for (from, length) in [(0, 6), (from, length), (from + 2 * length, 2)] {
            let (a, b) = back[from..from + 2 * length].split_at_mut(length);
            a.swap_with_slice(b);
        }
        assert_ne!(there, back);
        assert_eq!(flow_hash(&there), flow_hash(&back));
        let mut other = there.clone();
        other[if six { 57 } else { 37 }] ^= 1;
        assert_ne!(flow_hash(&there), flow_hash(&other));
    }
}

#[test]
fn each_kind_of_packet_goes_whole_only_to_who_takes_that_kind() {
    let csum = feature::GUEST_CSUM;
    for (tcp, six, wanted) in [
        (true, false, feature::GUEST_TSO4),
        (true, true, feature::GUEST_TSO6),
        (false, false, feature::GUEST_USO4),
        (false, true, feature::GUEST_USO6),
    ] {
        let packet = Packet {
            tcp,
            six,
            ..Packet::tcp(3000)
        };
        let frame = packet.frame();
        let header = NetHeader::check(packet.header(1000), feature::ALL, &frame).unwrap();
        for (offloads, whole) in [
            (csum | wanted, true),
            (wanted, false),
            (csum | feature::GUEST_OFFLOADS & !wanted, false),
            (0, false),
        ] {
            let mut got = Vec::new();
            let done = header.finish(offloads, &Frame::whole(&frame), |header, frame| {
                got.push((header.encode(offloads, 1), frame.len()));
                Ok(())
            });
            assert_eq!(done, Ok(()));
            assert_eq!(got.len(), if whole { 1 } else { 3 });
            for (bytes, length) in got {
                assert_eq!(bytes[1] != 0, whole);
                assert_eq!(bytes[0], u8::from(offloads & csum != 0));
                assert!(whole || length == packet.headers() + 1000);
            }
        }
        // Who takes no more frames is not given more.
        let mut count = 0;
        let done = header.finish(0, &Frame::whole(&frame), |_, _| {
            count += 1;
            Err(ReceiveDrop::NoBuffer)
        });
        assert_eq!((done, count), (Err(ReceiveDrop::NoBuffer), 1));
    }
}
