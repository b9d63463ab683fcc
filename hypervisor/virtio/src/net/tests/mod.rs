//! The device against a driver made here, with split or packed rings in plain memory.

mod control;
mod offload;
mod path;

use std::collections::VecDeque;

use arch::{GuestMemory, GuestPhysAddr, MemoryFault, Nanos};

use super::*;
use crate::device::{Signals, features};
use crate::queue::QueueLayout;

pub struct Ram(Vec<u8>);

impl GuestMemory for Ram {
    fn read(&mut self, addr: GuestPhysAddr, buf: &mut [u8]) -> Result<(), MemoryFault> {
        let start = addr.as_u64() as usize;
        let from = self.0.get(start..start.saturating_add(buf.len()));
        buf.copy_from_slice(from.ok_or(MemoryFault::NotRam(addr))?);
        Ok(())
    }
    fn write(&mut self, addr: GuestPhysAddr, data: &[u8]) -> Result<(), MemoryFault> {
        let start = addr.as_u64() as usize;
        let to = self.0.get_mut(start..start.saturating_add(data.len()));
        to.ok_or(MemoryFault::NotRam(addr))?.copy_from_slice(data);
        Ok(())
    }
    fn compare_exchange(
        &mut self,
        addr: GuestPhysAddr,
        _: u8,
        _: u64,
        _: u64,
    ) -> Result<u64, MemoryFault> {
        Err(MemoryFault::NotRam(addr))
    }
}

impl Ram {
    fn u16(&self, at: u64) -> u16 {
        u16::from_le_bytes(self.bytes(at, 2).try_into().unwrap())
    }
    fn bytes(&self, at: u64, length: u64) -> &[u8] {
        &self.0[at as usize..(at + length) as usize]
    }
    fn put(&mut self, at: u64, bytes: &[u8]) {
        self.write(GuestPhysAddr::new(at), bytes).unwrap();
    }
}

/// Entries of each ring.
const SIZE: u16 = 256;
/// Bytes of guest memory for each ring.
const RING: u64 = 0x4000;
/// Where buffers start.
const BUFFERS: u64 = 0x10_0000;
const MEMORY: u64 = 0x80_0000;
pub const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
pub const EVERYTHING: u64 = feature::ALL & !feature::MQ | features::VERSION_1;

/// A buffer that the driver describes: place, length, whether the device writes it.
type Part = (u64, u32, bool);

/// The driver's side of a ring.
struct Ring {
    base: u64,
    packed: bool,
    /// Split: index of the available ring. Packed: the next place.
    next: u16,
    used: u16,
    wrap: bool,
    used_wrap: bool,
    /// Chains on the way: the first descriptor (or id), places, buffers.
    pending: VecDeque<(u16, u16, Vec<Part>)>,
}

impl Ring {
    const fn new(base: u64, packed: bool) -> Self {
        Self {
            base,
            packed,
            next: 0,
            used: 0,
            wrap: true,
            used_wrap: true,
            pending: VecDeque::new(),
        }
    }

    fn layout(&self) -> QueueLayout {
        let at = |offset| GuestPhysAddr::new(self.base + offset);
        QueueLayout {
            size: SIZE,
            descriptors: at(0),
            driver: at(0x1000),
            device: at(0x2000),
        }
    }

    fn describe(&self, ram: &mut Ram, place: u16, part: Part, third: u16, fourth: u16) {
        let at = self.base + 16 * u64::from(place);
        ram.put(at, &part.0.to_le_bytes());
        ram.put(at + 8, &part.1.to_le_bytes());
        ram.put(at + 12, &third.to_le_bytes());
        ram.put(at + 14, &fourth.to_le_bytes());
    }

    fn offer(&mut self, ram: &mut Ram, parts: &[Part]) {
        let places = parts.len() as u16;
        if self.packed {
            let (first, id) = (self.next, self.next);
            let mut head_flags = 0;
            for (n, &part) in parts.iter().enumerate() {
                let more = u16::from(n + 1 < parts.len());
                let turn = if self.wrap { 1 << 7 } else { 1 << 15 };
                let flags = more | u16::from(part.2) << 1 | turn;
                self.describe(ram, self.next, part, id, flags);
                if n == 0 {
                    head_flags = flags;
                }
                self.next += 1;
                if self.next == SIZE {
                    (self.next, self.wrap) = (0, !self.wrap);
                }
            }
            ram.put(
                self.base + 16 * u64::from(first) + 14,
                &head_flags.to_le_bytes(),
            );
            self.pending.push_back((id, places, parts.to_vec()));
        } else {
            // Descriptors are handed out round and round; all rings here are given back in order.
            let first = self
                .pending
                .back()
                .map_or(0, |last| (last.0 + last.1) % SIZE);
            for (n, &part) in parts.iter().enumerate() {
                let place = (first + n as u16) % SIZE;
                let more = u16::from(n + 1 < parts.len());
                let flags = more | u16::from(part.2) << 1;
                self.describe(ram, place, part, flags, (place + 1) % SIZE);
            }
            let slot = self.base + 0x1004 + 2 * u64::from(self.next % SIZE);
            ram.put(slot, &first.to_le_bytes());
            self.next = self.next.wrapping_add(1);
            ram.put(self.base + 0x1002, &self.next.to_le_bytes());
            self.pending.push_back((first, places, parts.to_vec()));
        }
    }

    /// The next chain that was given back: its buffers and the bytes written.
    fn take(&mut self, ram: &Ram) -> Option<(Vec<Part>, u32)> {
        let (id, length) = if self.packed {
            let at = self.base + 16 * u64::from(self.used);
            let flags = ram.u16(at + 14);
            let bit = |n: u16| flags & 1 << n != 0;
            if bit(7) != self.used_wrap || bit(15) != self.used_wrap {
                return None;
            }
            (ram.u16(at + 12), ram.bytes(at + 8, 4))
        } else {
            if ram.u16(self.base + 0x2002) == self.used {
                return None;
            }
            let at = self.base + 0x2004 + 8 * u64::from(self.used % SIZE);
            (ram.u16(at), ram.bytes(at + 4, 4))
        };
        let length = u32::from_le_bytes(length.try_into().unwrap());
        let (first, places, parts) = self.pending.pop_front().unwrap();
        assert_eq!(id, first, "given back in order");
        if self.packed {
            self.used += places;
            if self.used >= SIZE {
                self.used -= SIZE;
                self.used_wrap = !self.used_wrap;
            }
        } else {
            self.used = self.used.wrapping_add(1);
        }
        Some((parts, length))
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
        let mut net = SharedNet(Arc::new(spin::Mutex::new(NetDevice::new(config).unwrap())));
        assert!(net.accepts(features), "{features:#x}");
        net.start(features);
        let packed = features & features::RING_PACKED != 0;
        let mut guest = Self {
            ram: Ram(vec![0; MEMORY as usize]),
            rings: (0..net.queues())
                .map(|index| Ring::new(0x1_0000 + RING * u64::from(index), packed))
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
        let layout = self.rings[usize::from(index)].layout();
        let queue = Queue::new(layout, self.features).unwrap();
        self.net.attach(index, queue);
    }

    /// Sets a ring up anew, as after a reset of its queue.
    pub fn renew(&mut self, index: u16) {
        let old = &self.rings[usize::from(index)];
        let new = Ring::new(old.base, old.packed);
        self.ram.put(new.base, &[0; RING as usize]);
        self.rings[usize::from(index)] = new;
        self.attach(index);
    }

    pub fn device(&self) -> spin::MutexGuard<'_, NetDevice> {
        self.net.0.lock()
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
        self.rings[usize::from(queue)].offer(&mut self.ram, parts);
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
        poll: bool,
    ) -> (Transmitted, Vec<(NetHeader, Vec<u8>)>) {
        let mut buffer = vec![0; 20 * FRAME_ROOM];
        let mut frames = Vec::new();
        let net = self.net.clone();
        let done = net.0.lock().transmit(
            &mut self.ram,
            pair,
            budget,
            poll,
            &mut buffer,
            |header, frame| frames.push((header, frame.to_vec())),
        );
        (done, frames)
    }

    pub fn transmit(&mut self, pair: u16) -> Vec<(NetHeader, Vec<u8>)> {
        self.transmit_with(pair, 1000, false).1
    }

    /// How many chains of a transmit queue came back.
    pub fn sent(&mut self, pair: u16) -> usize {
        let ring = &mut self.rings[usize::from(tx(pair))];
        std::iter::from_fn(|| ring.take(&self.ram))
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
        net.0
            .lock()
            .receive(&mut self.ram, header, &Frame::whole(frame))
    }

    /// A plain frame.
    pub fn hear(&mut self, frame: &[u8]) -> Result<(), ReceiveDrop> {
        self.receive(&NetHeader::default(), frame)
    }

    pub fn settle(&mut self) -> Signals {
        let net = self.net.clone();
        net.0.lock().settle(&mut self.ram);
        self.net.take_signals()
    }

    /// The frames that arrived in the receive queue of a pair, as a driver reads them.
    pub fn received(&mut self, pair: u16) -> Vec<Received> {
        let ring = &mut self.rings[usize::from(rx(pair))];
        let mut take = || {
            let (parts, written) = ring.take(&self.ram)?;
            let room: u32 = parts.iter().map(|part| part.1).sum();
            let mut bytes = Vec::new();
            for (at, length, writable) in parts {
                assert!(writable);
                bytes.extend_from_slice(self.ram.bytes(at, length.into()));
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
        self.ram.bytes(answer, 1)[0]
    }

    /// Puts a chain into the control queue; the bytes written, if it came back.
    fn control(&mut self, parts: &[Part]) -> Option<u32> {
        let index = self.device().control_queue();
        self.offer(index, parts);
        self.net.notify(index);
        assert!(self.net.wants_service());
        self.net.serve(&mut self.ram, Nanos::ZERO);
        let ring = &mut self.rings[usize::from(index)];
        ring.take(&self.ram).map(|(_, written)| written)
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

/// Numbers that look random, the same every time.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
    pub fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }
}
