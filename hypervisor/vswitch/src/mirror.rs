//! Copies of frames: to a port, into a VLAN, or into the switch's capture.
//!
//! A mirror selects by the port a frame comes in or leaves by, and by VLAN, in the words of Open
//! vSwitch's table Mirror. A capture is a mirror whose output is a ring of bounded size that is
//! read as a pcap file: the oldest frames make room for the newest.

use alloc::collections::VecDeque;
use alloc::string::String;
use alloc::vec::Vec;

use arch::Nanos;

use crate::port::VlanSet;
use crate::{PortId, VlanId};

/// Where copies go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MirrorOutput {
    /// To a port of kind mirror.
    Port(PortId),
    /// To all ports of a VLAN.
    Vlan(VlanId),
    /// Into the switch's ring.
    Capture,
}

/// A mirror, as it is configured.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MirrorConfig {
    /// Its name, unique in the switch.
    pub name: String,
    /// Every frame, whatever port.
    pub select_all: bool,
    /// Those that come in by these ports.
    pub select_src: Vec<PortId>,
    /// Those that leave by these ports.
    pub select_dst: Vec<PortId>,
    /// Of those, the ones in these VLANs; none are all.
    pub select_vlan: Vec<u16>,
    /// Where they go.
    pub output: MirrorOutput,
}

/// Mirrors of a switch, at most; as in Open vSwitch.
pub const MAX_MIRRORS: usize = 32;

/// The output of a capture, among the steps of a decision until the frame is in the ring.
pub(crate) const CAPTURE: PortId = PortId(0xfff0);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Target {
    /// A port's place.
    Port(usize),
    Vlan(u16),
    Capture,
}

/// A mirror at work.
#[derive(Clone, Debug)]
pub(crate) struct Mirror {
    pub vlans: Option<VlanSet>,
    pub target: Target,
    /// The mirrors with the same output, itself among them, a bit each: a frame is copied there
    /// once.
    pub same: u32,
}

/// Frames that were captured.
#[derive(Clone, Debug)]
pub struct Capture {
    ring: VecDeque<u8>,
    size: usize,
    frames: u64,
    lost: u64,
}

/// A record's header: seconds, nanoseconds, bytes kept, bytes that the frame had.
const RECORD: usize = 16;

impl Capture {
    /// A ring of `size` bytes.
    pub(crate) fn new(size: usize) -> Self {
        Self {
            ring: VecDeque::with_capacity(size),
            size,
            frames: 0,
            lost: 0,
        }
    }

    /// What a pcap file begins with: Ethernet, times in nanoseconds
    /// (draft-ietf-opsawg-pcap, section 4).
    #[must_use]
    pub fn file_header() -> [u8; 24] {
        let words = [0xa1b2_3c4d_u32, 4 << 16 | 2, 0, 0, 0x1_0000, 1];
        let mut header = [0; 24];
        for (place, word) in header.chunks_exact_mut(4).zip(words) {
            place.copy_from_slice(&word.to_le_bytes());
        }
        header
    }

    /// How many frames were captured, and how many of them made room before they were read.
    #[must_use]
    pub fn counts(&self) -> (u64, u64) {
        (self.frames, self.lost)
    }

    /// Keeps the beginning of a frame of `length` bytes.
    pub(crate) fn push(&mut self, now: Nanos, pieces: [&[u8]; 2], length: usize) {
        let kept = pieces[0].len() + pieces[1].len();
        self.frames += 1;
        if RECORD + kept > self.size {
            self.lost += 1;
            return;
        }
        while self.ring.len() + RECORD + kept > self.size {
            self.skip();
        }
        let second = 1_000_000_000;
        let words = [now.0 / second, now.0 % second, kept as u64, length as u64];
        for word in words {
            self.ring.extend((word as u32).to_le_bytes());
        }
        pieces.iter().for_each(|piece| self.ring.extend(*piece));
    }

    /// How long the oldest record is.
    fn oldest(&self) -> usize {
        let mut bytes = [0; 4];
        for (to, from) in bytes.iter_mut().zip(self.ring.iter().skip(8)) {
            *to = *from;
        }
        (RECORD + u32::from_le_bytes(bytes) as usize).min(self.ring.len())
    }

    fn skip(&mut self) {
        self.ring.drain(..self.oldest());
        self.lost += 1;
    }

    /// Takes the oldest record out, to be written behind the [file header](Self::file_header) and
    /// the records before; `false` if there is none.
    pub fn read(&mut self, record: &mut Vec<u8>) -> bool {
        record.clear();
        record.extend(self.ring.drain(..self.oldest().min(self.ring.len())));
        !record.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn read(capture: &mut Capture) -> Vec<Vec<u8>> {
        let mut records = Vec::new();
        let mut record = Vec::new();
        while capture.read(&mut record) {
            records.push(record.clone());
        }
        records
    }

    #[test]
    fn a_record_is_what_pcap_says() {
        let mut capture = Capture::new(100);
        capture.push(Nanos(3_000_000_007), [b"he", b"ad"], 1500);
        assert_eq!(
            read(&mut capture),
            [[
                3, 0, 0, 0, 7, 0, 0, 0, 4, 0, 0, 0, 0xdc, 5, 0, 0, b'h', b'e', b'a', b'd'
            ]]
        );
        assert_eq!(capture.counts(), (1, 0));
        assert_eq!(
            Capture::file_header()[..8],
            [0x4d, 0x3c, 0xb2, 0xa1, 2, 0, 4, 0]
        );
    }

    #[test]
    fn the_oldest_make_room_and_what_is_too_large_is_lost() {
        let mut capture = Capture::new(2 * RECORD + 10);
        for n in 1..=4 {
            capture.push(Nanos(n), [&[n as u8; 4], &[]], 4);
        }
        capture.push(Nanos(9), [&[9; 100], &[]], 100);
        let last: Vec<u8> = read(&mut capture).iter().map(|record| record[16]).collect();
        assert_eq!(last, [3, 4]);
        assert_eq!(capture.counts(), (5, 3));
    }

    proptest! {
        #[test]
        fn records_stay_whole(
            size in 0..500usize, frames in prop::collection::vec(0..200usize, 0..40),
        ) {
            let mut capture = Capture::new(size);
            for length in &frames {
                capture.push(Nanos(1), [&vec![7; *length], &[]], *length);
                prop_assert!(capture.ring.len() <= size);
            }
            let (all, lost) = capture.counts();
            let records = read(&mut capture);
            prop_assert_eq!(records.len() as u64, all - lost);
            let kept = frames.iter().filter(|length| **length + RECORD <= size);
            let newest: Vec<usize> = kept.rev().take(records.len()).copied().collect();
            let lengths: Vec<usize> = records.iter().rev().map(|r| r.len() - RECORD).collect();
            prop_assert_eq!(lengths, newest);
        }
    }
}
