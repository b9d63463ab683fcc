//! Random frames: most of them whole, with right checksums, in the world's addresses and VLANs;
//! some cut off, some with a byte changed.

use vswitch::PortId;
use vswitch::key::{FlowKey, Vlan, ether, proto};

use super::random::Random;
use super::world::{EDGES, PORTS, VLANS, World, mac};

/// A frame, and where it comes in.
pub fn random(random: &mut Random, world: &World) -> (PortId, Vec<u8>) {
    let ports = &world.config.ports;
    let port = &ports[random.below(ports.len())];
    let own = port.macs.first().copied();
    let some = mac(random.below(8) as u8);
    let source = match random.below(4) {
        0 => some,
        _ => own.unwrap_or(mac(random.below(3) as u8 + 0x20)),
    };
    let mut frame = match random.below(12) {
        0 => vec![0xff; 6],
        1 => vec![0x01, 0, 0x5e, 0, 0, random.byte()],
        2 => vec![
            0x01,
            0x80,
            0xc2,
            0,
            0,
            random.pick(&[0, 1, 0x0e, 0x0f, 0x10, 0x21]),
        ],
        _ => mac(random.below(8) as u8).0.to_vec(),
    };
    frame.extend(source.0);
    for _ in 0..random.pick(&[0, 0, 0, 1, 1, 1, 1, 2, 2, 3]) {
        let tpid = random.pick(&[ether::VLAN, ether::VLAN, ether::VLAN, ether::SERVICE_VLAN]);
        let mut id = random.pick(&VLANS);
        if random.once_in(16) {
            id = random.pick(&[EDGES[0], EDGES[1], 4095]);
        }
        let priority = random.pick(&[0, 0, 3, 7]);
        let dei = if random.once_in(10) { 0x1000 } else { 0 };
        frame.extend(tpid.to_be_bytes());
        frame.extend((id | priority << 13 | dei).to_be_bytes());
    }
    match random.below(10) {
        0 => {
            frame.extend(
                random
                    .pick(&[0x1234u16, 0x88cc, 0x8847, 0x05ff])
                    .to_be_bytes(),
            );
            frame.extend([0; 46]);
        }
        1 => {
            // A length, with SNAP or without.
            frame.extend([0, 46]);
            let header = random.pick(&[[0xaa, 0xaa, 3, 0, 0, 0], [0x42, 0x42, 3, 0, 0, 0]]);
            frame.extend(header);
            frame.extend(
                random
                    .pick(&[0x0800u16, 0x1234, 0x0020, 0x0806])
                    .to_be_bytes(),
            );
            frame.extend([0x45; 40]);
        }
        2 => arp(random, &mut frame),
        3..=6 => v4(random, &mut frame),
        _ => v6(random, &mut frame),
    }
    if random.once_in(3) {
        let padding = random.below(60);
        frame.extend(vec![0; padding]);
    }
    if random.once_in(10) {
        frame.truncate(14 + random.below(frame.len() - 13));
    }
    if random.once_in(10) {
        let mut changed = frame.clone();
        let at = random.below(frame.len());
        changed[at] = random.byte();
        // Addresses are known in the world's own VLANs.
        let known = |tag: &Vlan| {
            let ids = VLANS.iter().chain(&EDGES).chain(&[4095]);
            !tag.present() || ids.into_iter().any(|id| *id == tag.id())
        };
        if FlowKey::extract(&changed, port.id).is_ok_and(|key| key.vlans.iter().all(known)) {
            frame = changed;
        }
    }
    (port.id, frame)
}

fn arp(random: &mut Random, frame: &mut Vec<u8>) {
    let kind = random.pick(&[ether::ARP, ether::ARP, ether::RARP]);
    frame.extend(kind.to_be_bytes());
    frame.extend([0, 1, 8, 0, 6, 4, 0, random.below(5) as u8]);
    for _ in 0..2 {
        frame.extend(mac(random.below(8) as u8).0);
        frame.extend([10, 0, 0, random.below(5) as u8]);
    }
}

fn v4(random: &mut Random, frame: &mut Vec<u8>) {
    let protocol = random.pick(&[
        proto::TCP,
        proto::UDP,
        proto::ICMP,
        proto::SCTP,
        proto::IGMP,
        99,
    ]);
    let options = if random.once_in(6) { 4 } else { 0 };
    let fragment: u16 = random.pick(&[0, 0, 0, 0x4000, 0x2000, 0x2010, 0x0010]);
    let body = transport(random, protocol, false);
    let total = (20 + options + body.len()) as u16;
    let mut header = vec![0x45 + (options / 4) as u8, random.byte()];
    header.extend(total.to_be_bytes());
    header.extend([0, 7]);
    header.extend(fragment.to_be_bytes());
    header.extend([random.pick(&[0, 1, 2, 64, 255]), protocol, 0, 0]);
    header.extend([
        10,
        0,
        0,
        random.below(5) as u8,
        10,
        0,
        0,
        random.below(5) as u8,
    ]);
    header.extend(vec![1; options]);
    let checksum = !sum(&[&header]);
    header[10..12].copy_from_slice(&checksum.to_be_bytes());
    let pseudo = header[12..20].to_vec();
    frame.extend(ether::IPV4.to_be_bytes());
    frame.extend(header);
    frame.extend(summed(random, body, &pseudo, protocol));
}

fn v6(random: &mut Random, frame: &mut Vec<u8>) {
    let protocol = random.pick(&[
        proto::TCP,
        proto::UDP,
        proto::ICMPV6,
        proto::ICMPV6,
        proto::SCTP,
        99,
    ]);
    let mut addresses = Vec::new();
    for _ in 0..2 {
        addresses.extend([0xfe, 0x80, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        addresses.push(random.below(5) as u8);
    }
    let mut extensions = Vec::new();
    let mut kinds = Vec::new();
    while kinds.len() < 3 && random.once_in(3) {
        kinds.push(random.pick(&[0u8, 43, 60, 51, 44, 44]));
    }
    kinds.push(protocol);
    for pair in kinds.windows(2) {
        let length = random.below(2) as u8;
        let mut bytes = match pair[0] {
            44 => vec![0; 8],
            51 => vec![0; 8 + usize::from(length) * 4],
            _ => vec![0; 8 + usize::from(length) * 8],
        };
        bytes[0] = pair[1];
        bytes[1] = length;
        match pair[0] {
            44 => {
                let place: u16 = random.pick(&[0, 1, 0x10, 0x11, 6]);
                bytes[2..4].copy_from_slice(&place.to_be_bytes());
            }
            43 => bytes[3] = random.below(2) as u8,
            _ => {}
        }
        extensions.extend(bytes);
    }
    let body = transport(random, protocol, true);
    let tos = random.byte();
    frame.extend(ether::IPV6.to_be_bytes());
    frame.extend([0x60 | tos >> 4, tos << 4, 0, 0]);
    frame.extend(((extensions.len() + body.len()) as u16).to_be_bytes());
    frame.extend([kinds[0], random.pick(&[0, 1, 2, 64, 255])]);
    frame.extend(&addresses);
    frame.extend(extensions);
    frame.extend(summed(random, body, &addresses, protocol));
}

/// A transport header and some payload, without a checksum.
fn transport(random: &mut Random, protocol: u8, v6: bool) -> Vec<u8> {
    let mut body = Vec::new();
    let size = random.below(30);
    match protocol {
        proto::TCP | proto::UDP | proto::SCTP => {
            body.extend(random.pick(&PORTS).to_be_bytes());
            body.extend(random.pick(&PORTS).to_be_bytes());
            match protocol {
                proto::TCP => {
                    let flags = random.pick(&[0x02, 0x12, 0x10, 0x11, 0x202, 0]) | 0x5000u16;
                    body.extend([0; 8]);
                    body.extend(flags.to_be_bytes());
                    body.extend([0; 6]);
                }
                proto::UDP => {
                    body.extend((8 + size as u16).to_be_bytes());
                    body.extend([0; 2]);
                }
                _ => body.extend([0; 8]),
            }
        }
        proto::ICMPV6 if v6 => {
            let kind = random.pick(&[128, 135, 135, 136, 136, 134]);
            let code = if random.once_in(8) { 1 } else { 0 };
            body.extend([kind, code, 0, 0, 0, 0, 0, 0]);
            if matches!(kind, 135 | 136) {
                body.extend([0xfe, 0x80, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
                body.push(random.below(5) as u8);
                for _ in 0..random.below(3) {
                    let units = random.pick(&[1, 1, 1, 1, 2, 0]);
                    body.extend([random.pick(&[1, 2, 3]), units]);
                    body.extend(mac(random.below(8) as u8).0);
                }
            }
        }
        _ => body.extend([random.pick(&[8, 0, 3, 0x16]), 0, 0, 0, 0, 0, 0, 0]),
    }
    body.extend((0..size).map(|n| n as u8));
    body
}

/// Where a protocol has its checksum, and how long its header is.
const fn place(protocol: u8) -> Option<(usize, usize)> {
    match protocol {
        proto::TCP => Some((16, 20)),
        proto::UDP => Some((6, 8)),
        proto::ICMPV6 => Some((2, 8)),
        _ => None,
    }
}

/// With the checksum of the pseudo header and all.
fn summed(random: &mut Random, mut body: Vec<u8>, addresses: &[u8], protocol: u8) -> Vec<u8> {
    let Some((at, _)) = place(protocol) else {
        return body;
    };
    let v4 = addresses.len() == 8;
    if protocol == proto::UDP && v4 && random.once_in(5) {
        // None at all.
        return body;
    }
    let checksum = match !pseudo_sum(&body, addresses, protocol) {
        0 if protocol == proto::UDP => 0xffff,
        sum => sum,
    };
    body[at..at + 2].copy_from_slice(&checksum.to_be_bytes());
    body
}

fn pseudo_sum(body: &[u8], addresses: &[u8], protocol: u8) -> u16 {
    let length = (body.len() as u16).to_be_bytes();
    sum(&[addresses, &[0, protocol], &length, body])
}

/// The sum of 16-bit words, the naive way.
fn sum(pieces: &[&[u8]]) -> u16 {
    let all = pieces.concat();
    let mut total = 0u64;
    for pair in all.chunks(2) {
        total += u64::from(pair[0]) << 8 | u64::from(*pair.get(1).unwrap_or(&0));
    }
    while total > 0xffff {
        total = (total & 0xffff) + (total >> 16);
    }
    total as u16
}

/// What of a frame can be checked.
#[derive(Clone, Copy, Debug, Default)]
pub struct Sound {
    /// Every header that is begun is whole.
    pub whole: bool,
    /// And every checksum is right.
    pub right: bool,
}

/// Reads a frame's headers and sums its checksums, simply.
pub fn checksums(frame: &[u8]) -> Sound {
    read(frame).unwrap_or_default()
}

fn read(frame: &[u8]) -> Option<Sound> {
    let mut at = 12;
    let kind = loop {
        let kind = u16::from_be_bytes(frame.get(at..at + 2)?.try_into().ok()?);
        at += 2;
        match kind {
            ether::VLAN | ether::SERVICE_VLAN if at < 12 + 4 * 2 + 2 => at += 2,
            kind => break kind,
        }
    };
    let rest = frame.get(at..)?;
    let word = |at: usize| {
        Some(usize::from(u16::from_be_bytes([
            *rest.get(at)?,
            *rest.get(at + 1)?,
        ])))
    };
    match kind {
        ether::ARP | ether::RARP => {
            let whole = rest.len() >= 28 && rest.starts_with(&[0, 1, 8, 0, 6, 4, 0]);
            Some(Sound {
                whole,
                right: false,
            })
        }
        ether::IPV4 => {
            let header = usize::from(rest.first()? & 0xf) * 4;
            let (total, fragment) = (word(2)?, word(6)? & 0x3fff);
            if header < 20 || total < header || total > rest.len() {
                return None;
            }
            let (body, protocol) = (&rest[header..total], rest[9]);
            let right = sum(&[&rest[..header]]) == 0xffff;
            if fragment != 0 {
                let first = fragment & 0x1fff == 0;
                let whole = !first || place(protocol).is_none_or(|(_, l)| body.len() >= l);
                return Some(Sound { whole, right });
            }
            if protocol == proto::ICMPV6 {
                return Some(Sound { whole: true, right });
            }
            Some(transport_sound(body, &rest[12..20], protocol, right))
        }
        ether::IPV6 => {
            let (length, protocol) = (word(4)?, *rest.get(6)?);
            let body = rest.get(40..40 + length)?;
            if matches!(protocol, 0 | 43 | 44 | 51 | 60) {
                return Some(Sound::default());
            }
            Some(transport_sound(body, &rest[8..40], protocol, true))
        }
        // A length: what SNAP names behind it is not checked here.
        0..0x600 => None,
        // A third tag hides what is behind it until another goes.
        ether::VLAN | ether::SERVICE_VLAN => None,
        _ => Some(Sound {
            whole: true,
            right: true,
        }),
    }
}

fn transport_sound(body: &[u8], addresses: &[u8], protocol: u8, right: bool) -> Sound {
    let Some((at, length)) = place(protocol) else {
        return Sound { whole: true, right };
    };
    // TCP says itself how long its header is.
    let length = match protocol {
        proto::TCP => body
            .get(12)
            .map_or(length, |byte| usize::from(byte >> 4) * 4),
        _ => length,
    };
    if body.len() < length || length < 8 {
        return Sound::default();
    }
    let none = protocol == proto::UDP && body[at..at + 2] == [0, 0];
    let right = right && (none || pseudo_sum(body, addresses, protocol) == 0xffff);
    Sound { whole: true, right }
}
