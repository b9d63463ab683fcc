//! Batches in a small world: what leaves by which port, in which order, changed how.

use alloc::format;
use alloc::vec;
use std::cell::RefCell;

use super::*;
use vswitch::MacAddr;
use vswitch::config::SwitchConfig;
use vswitch::port::{PortConfig, PortKind};

/// What was handed over, call by call.
#[derive(Default)]
struct Seen(Vec<(u16, Vec<Vec<u8>>)>);

impl Far for Seen {
    fn take(&mut self, port: PortId, frames: Leaving<'_>) {
        let mut all = Vec::new();
        assert!(!frames.is_empty());
        let expected = frames.len();
        frames.each(|_, frame| all.push(frame.pieces().collect::<Vec<_>>().concat()));
        assert_eq!(all.len(), expected);
        self.0.push((port.0, all));
    }
}

fn mac(port: u16) -> [u8; 6] {
    MacAddr([2, 0, 0, 0, (port >> 8) as u8, port as u8]).0
}

/// A frame to the guest at `to` from the one at port 1, with a number in it.
fn frame(to: [u8; 6], number: u8) -> Vec<u8> {
    let mut frame = [to, mac(1)].concat();
    frame.extend([0x88, 0xb5, number]);
    frame.resize(60, 0);
    frame
}

/// Guests at ports from 1 on; those in `tagged` take frames with the tag of VLAN 7 only, the others
/// are in VLAN 7 without.
fn world(ports: u16, tagged: &[u16]) -> RefCell<Switch> {
    let port = |id: u16| {
        let mut port = PortConfig::new(id, &format!("vm{id}"), PortKind::Vnic);
        port.macs = vec![MacAddr(mac(id))];
        if tagged.contains(&id) {
            port.trunks = vec![7];
        } else {
            port.tag = Some(7);
        }
        port
    };
    let config = SwitchConfig {
        name: "s".into(),
        ports: (1..=ports).map(port).collect(),
        ..SwitchConfig::default()
    };
    RefCell::new(Switch::new(config, [1, 2]).unwrap())
}

fn forward(switch: &RefCell<Switch>, frames: &[Vec<u8>]) -> Seen {
    let mut relay = Relay::new(64, [3, 4]);
    let frames: Vec<Inbound<'_>> = frames
        .iter()
        .map(|bytes| (NetHeader::default(), Whole::bare(bytes)))
        .collect();
    let mut seen = Seen::default();
    let lock = || switch.borrow_mut();
    relay.forward(lock, PortId(1), &frames, Nanos::ZERO, &mut seen);
    seen
}

#[test]
fn each_port_is_called_once_with_its_frames_in_order() {
    let switch = world(3, &[]);
    let frames: Vec<Vec<u8>> = (0..BATCH as u8)
        .map(|n| frame(mac(2 + u16::from(n % 2)), n))
        .collect();
    let seen = forward(&switch, &frames);
    let wanted = |odd: u8| -> Vec<Vec<u8>> {
        let all = frames.iter();
        all.filter(|frame| frame[14] % 2 == odd).cloned().collect()
    };
    assert_eq!(seen.0, [(2, wanted(0)), (3, wanted(1))]);
}

#[test]
fn a_frame_leaves_each_port_in_the_form_for_it() {
    let switch = world(4, &[3]);
    let plain = frame([0xff; 6], 9);
    let mut tagged = plain.clone();
    tagged.splice(12..12, [0x81, 0, 0, 7]);
    let seen = forward(&switch, core::slice::from_ref(&plain));
    let one = |frame: &Vec<u8>| vec![frame.clone()];
    assert_eq!(
        seen.0,
        [(2, one(&plain)), (3, one(&tagged)), (4, one(&plain))]
    );
}

#[test]
fn a_frame_that_loses_its_tag_is_filled_up() {
    let switch = world(2, &[1]);
    let mut tagged = frame(mac(2), 9);
    tagged.splice(12..12, [0x81, 0, 0, 7]);
    tagged.truncate(60);
    let seen = forward(&switch, &[tagged]);
    assert_eq!(seen.0, [(2, vec![frame(mac(2), 9)])]);
}

#[test]
fn a_batch_of_floods_is_handed_over_in_parts_and_in_order() {
    let ports = 200;
    let switch = world(ports, &[]);
    let frames: Vec<Vec<u8>> = (0..BATCH as u8).map(|n| frame([0xff; 6], n)).collect();
    let seen = forward(&switch, &frames);
    for port in 2..=ports {
        let got = seen.0.iter().filter(|(to, _)| *to == port);
        let got: Vec<&Vec<u8>> = got.flat_map(|(_, frames)| frames).collect();
        assert_eq!(got, frames.iter().collect::<Vec<_>>(), "port {port}");
    }
    assert!(seen.0.len() > usize::from(ports), "in several parts");
}

#[test]
fn nothing_that_came_in_is_nothing_that_leaves() {
    let switch = world(2, &[]);
    assert!(forward(&switch, &[]).0.is_empty());
    assert!(forward(&switch, &[vec![], vec![1, 2, 3]]).0.is_empty());
}
