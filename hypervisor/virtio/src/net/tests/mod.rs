//! The device against a driver made here, with split or packed rings in plain memory.

mod control;
mod offload;
mod path;
mod race;

use std::collections::VecDeque;

use arch::Nanos;

use super::*;
use crate::device::{Signals, features};
use crate::testing;
pub use crate::testing::{Part, Ram, Random};

/// Entries of each ring.
const SIZE: u16 = 256;
/// Where the rings are, and how much memory each has.
const RINGS: u64 = 0x4_0000;
const RING: u64 = 0x4_0000;
/// Where buffers start.
const BUFFERS: u64 = 0x40_0000;
const MEMORY: u64 = 0x100_0000;
pub const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
pub const EVERYTHING: u64 = feature::ALL & !feature::MQ | features::VERSION_1;

/// The driver's side of a ring, and the buffers on the way.
struct Ring {
    driver: testing::Driver,
    pending: VecDeque<(u16, Vec<Part>)>,
}

impl Ring {
    fn new(index: u16, negotiated: u64) -> Self {
        Self {
            driver: testing::Driver::new(RINGS + RING * u64::from(index), SIZE, negotiated),
            pending: VecDeque::new(),
        }
    }

    /// The next chain that was given back: its buffers and the bytes written.
    fn take(&mut self, ram: &mut Ram) -> Option<(Vec<Part>, u32)> {
        let (id, written) = self.driver.take(ram)?;
        let (first, parts) = self.pending.pop_front().unwrap();
        assert_eq!(id, first, "given back in order");
        Some((parts, written))
    }
}

/// A guest with a device and a driver.
pub struct Guest {
    pub ram: Ram,
    pub net: SharedNet,
    rings: Vec<Ring>,
    features: u64,
    /// Where the next buffer goes.
    next: u64,
}

/// A frame as the driver finds it.
#[derive(Debug)]
pub struct Received {
    pub header: [u8; 12],
    pub frame: Vec<u8>,
}

impl Guest {
    pub fn new(features: u64) -> Self {
        Self::with(NetConfig::new(MAC), features)
    }

    pub fn with(config: NetConfig, features: u64) -> Self {
        let mut net = SharedNet::new(NetDevice::new(config).unwrap());
        assert!(net.accepts(features), "{features:#x}");
        net.start(features);
        let mut guest = Self {
            ram: Ram::new(MEMORY as usize),
            rings: (0..net.queues())
                .map(|index| Ring::new(index, features))
                .collect(),
            net,
            features,
            next: BUFFERS,
        };
        let several = features & feature::MQ != 0;
        let queues = if several { guest.net.queues() } else { 3 };
        (0..queues).for_each(|index| guest.attach(index));
        guest.net.serve(&mut guest.ram, Nanos::ZERO);
        guest
    }

    pub fn attach(&mut self, index: u16) {
        let queue = self.rings[usize::from(index)].driver.queue();
        self.net.attach(index, queue);
    }

    /// Sets a ring up anew, as after a reset of its queue.
    pub fn renew(&mut self, index: u16) {
        self.rings[usize::from(index)] = Ring::new(index, self.features);
        self.ram.put(RINGS + RING * u64::from(index), &[0; 0x4000]);
        self.attach(index);
    }

    pub fn device(&self) -> spin::MutexGuard<'_, NetDevice> {
        self.net.lock()
    }

    fn room(&mut self, length: usize) -> u64 {
        if self.next + length as u64 > MEMORY {
            self.next = BUFFERS;
        }
        let at = self.next;
        self.next += length as u64;
        at
    }

    fn offer(&mut self, queue: u16, parts: &[Part]) {
        let ring = &mut self.rings[usize::from(queue)];
        let indirect = parts.len() > 1 && parts.len() <= 32;
        let id = ring.driver.offer(&mut self.ram, parts, indirect).unwrap();
        ring.pending.push_back((id, parts.to_vec()));
    }

    /// Sends bytes (header and frame) in buffers of the lengths given, and one with the rest.
    pub fn send_in(&mut self, pair: u16, bytes: &[u8], lengths: &[usize]) {
        let (mut rest, mut parts) = (bytes, Vec::new());
        for &length in lengths.iter().chain([&usize::MAX]) {
            let (now, later) = rest.split_at(length.min(rest.len()));
            rest = later;
            let at = self.room(now.len());
            self.ram.put(at, now);
            parts.push((at, now.len() as u32, false));
        }
        self.offer(tx(pair), &parts);
        self.net.notify(tx(pair));
    }

    pub fn send(&mut self, pair: u16, header: [u8; 12], frame: &[u8]) {
        self.send_in(pair, &[&header, frame].concat(), &[12]);
    }

    /// What the device takes out of a transmit queue.
    pub fn transmit_with(
        &mut self,
        pair: u16,
        budget: u32,
        ask: Ask,
    ) -> (Transmitted, Vec<(NetHeader, Vec<u8>)>) {
        let mut buffer = vec![0; 20 * FRAME_ROOM];
        let mut frames = Vec::new();
        let net = self.net.clone();
        let done = net.lock().transmit(
            &mut self.ram,
            pair,
            budget,
            ask,
            &mut buffer,
            |header, frame| frames.push((header, frame.bytes().to_vec())),
        );
        (done, frames)
    }

    pub fn transmit(&mut self, pair: u16) -> Vec<(NetHeader, Vec<u8>)> {
        self.transmit_with(pair, 1000, Ask::Now).1
    }

    /// How many chains of a transmit queue came back.
    pub fn sent(&mut self, pair: u16) -> usize {
        let ring = &mut self.rings[usize::from(tx(pair))];
        std::iter::from_fn(|| ring.take(&mut self.ram))
            .inspect(|&(_, written)| assert_eq!(written, 0))
            .count()
    }

    /// Offers `count` buffers to receive into.
    pub fn stock(&mut self, pair: u16, count: u16, length: u32) {
        for _ in 0..count {
            let at = self.room(length as usize);
            self.offer(rx(pair), &[(at, length, true)]);
        }
    }

    pub fn receive(&mut self, header: &NetHeader, frame: &[u8]) -> Result<(), ReceiveDrop> {
        let net = self.net.clone();
        net.lock()
            .receive(&mut self.ram, header, &Frame::whole(frame))
    }

    /// A plain frame.
    pub fn hear(&mut self, frame: &[u8]) -> Result<(), ReceiveDrop> {
        self.receive(&NetHeader::default(), frame)
    }

    pub fn settle(&mut self) -> Signals {
        let net = self.net.clone();
        net.lock().settle(&mut self.ram);
        self.net.take_signals()
    }

    /// The frames that arrived in the receive queue of a pair, as a driver reads them.
    pub fn received(&mut self, pair: u16) -> Vec<Received> {
        let ring = &mut self.rings[usize::from(rx(pair))];
        let mut take = || {
            let (parts, written) = ring.take(&mut self.ram)?;
            let room: u32 = parts.iter().map(|part| part.1).sum();
            let mut bytes = Vec::new();
            for (at, length, writable) in parts {
                assert!(writable);
                bytes.extend_from_slice(&self.ram.bytes[at as usize..][..length as usize]);
            }
            bytes.truncate(written as usize);
            Some((bytes, written == room))
        };
        let mut frames = Vec::new();
        while let Some((first, mut full)) = take() {
            let header: [u8; 12] = first[..12].try_into().unwrap();
            let mut frame = first[12..].to_vec();
            for _ in 1..u16::from_le_bytes([header[10], header[11]]) {
                assert!(full, "all buffers but the last are used whole");
                let (more, used) = take().expect("all buffers of a frame are seen together");
                frame.extend(more);
                full = used;
            }
            frames.push(Received { header, frame });
        }
        frames
    }

    /// Gives a command; the answer.
    pub fn command(&mut self, class: u8, command: u8, data: &[u8]) -> u8 {
        let bytes = [&[class, command], data].concat();
        self.raw_command(&bytes)
    }

    pub fn raw_command(&mut self, bytes: &[u8]) -> u8 {
        let at = self.room(bytes.len() + 1);
        let answer = at + bytes.len() as u64;
        self.ram.put(at, bytes);
        self.ram.put(answer, &[0xee]);
        let split = bytes.len().min(2) as u32;
        let rest = bytes.len() as u32 - split;
        let parts = [
            (at, split, false),
            (at + u64::from(split), rest, false),
            (answer, 1, true),
        ];
        assert_eq!(self.control(&parts), Some(1));
        self.ram.bytes[answer as usize]
    }

    /// Puts a chain into the control queue; the bytes written, if it came back.
    fn control(&mut self, parts: &[Part]) -> Option<u32> {
        let index = self.device().control_queue();
        self.offer(index, parts);
        self.net.notify(index);
        assert!(self.net.wants_service());
        self.net.serve(&mut self.ram, Nanos::ZERO);
        let ring = &mut self.rings[usize::from(index)];
        ring.take(&mut self.ram).map(|(_, written)| written)
    }

    pub fn status(&mut self) -> u16 {
        let mut bytes = [0; 2];
        self.net.read_config(6, &mut bytes);
        u16::from_le_bytes(bytes)
    }
}

/// A frame to an address.
pub fn frame_to(to: [u8; 6], length: usize) -> Vec<u8> {
    let mut frame = [&to[..], &[2, 0, 0, 0, 0, 9], &[0x88, 0xb5]].concat();
    frame.extend((14..length).map(|n| n as u8));
    frame.truncate(length);
    frame
}
