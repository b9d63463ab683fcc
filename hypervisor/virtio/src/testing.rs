//! A driver for tests: the other side of a queue, written from the driver's sections of the
//! standard, over a vector as memory.

use std::collections::HashMap;

use arch::{GuestMemory, GuestPhysAddr, MemoryFault};

use crate::{Queue, QueueLayout, features};

/// Guest memory from address 0, with what was read of it and how often it was reached.
#[derive(Clone, Debug)]
pub struct Ram {
    pub bytes: Vec<u8>,
    pub reads: Vec<(u64, usize)>,
    pub writes: Vec<(u64, usize)>,
    pub accesses: usize,
}

impl Ram {
    pub fn new(size: usize) -> Self {
        Self {
            bytes: vec![0; size],
            reads: Vec::new(),
            writes: Vec::new(),
            accesses: 0,
        }
    }
    fn range(addr: GuestPhysAddr, length: usize) -> std::ops::Range<usize> {
        let start = usize::try_from(addr.as_u64()).unwrap_or(usize::MAX);
        start..start.saturating_add(length)
    }
    pub fn put(&mut self, at: u64, bytes: &[u8]) {
        self.write(GuestPhysAddr::new(at), bytes).unwrap();
    }
    pub fn put16(&mut self, at: u64, value: u16) {
        self.put(at, &value.to_le_bytes());
    }
    pub fn get<const N: usize>(&self, at: u64) -> [u8; N] {
        let range = Self::range(GuestPhysAddr::new(at), N);
        self.bytes[range].try_into().unwrap()
    }
    pub fn get16(&self, at: u64) -> u16 {
        u16::from_le_bytes(self.get(at))
    }
    pub fn get32(&self, at: u64) -> u32 {
        u32::from_le_bytes(self.get(at))
    }
}

impl GuestMemory for Ram {
    fn read(&mut self, addr: GuestPhysAddr, buf: &mut [u8]) -> Result<(), MemoryFault> {
        self.accesses += 1;
        self.reads.push((addr.as_u64(), buf.len()));
        let from = self.bytes.get(Self::range(addr, buf.len()));
        buf.copy_from_slice(from.ok_or(MemoryFault::NotRam(addr))?);
        Ok(())
    }
    fn write(&mut self, addr: GuestPhysAddr, data: &[u8]) -> Result<(), MemoryFault> {
        self.accesses += 1;
        self.writes.push((addr.as_u64(), data.len()));
        let to = self.bytes.get_mut(Self::range(addr, data.len()));
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

pub const NEXT: u16 = 1;
pub const WRITE: u16 = 2;
pub const INDIRECT: u16 = 4;
const AVAIL: u16 = 1 << 7;
const USED: u16 = 1 << 15;

/// Numbers that look random and are the same each time.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }
    pub fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }
}

/// Every mix of ring format, indirect descriptors, event index and order.
pub fn kinds() -> impl Iterator<Item = u64> {
    let bits = [
        features::RING_PACKED,
        features::RING_INDIRECT_DESC,
        features::RING_EVENT_IDX,
        features::IN_ORDER,
    ];
    (0u32..16).map(move |mix| {
        let chosen = (0..4).filter(|bit| mix & 1 << bit != 0);
        chosen.fold(features::VERSION_1, |all, bit| all | bits[bit])
    })
}

/// The driver's side of one queue.
#[derive(Clone, Debug)]
pub struct Driver {
    pub layout: QueueLayout,
    pub negotiated: u64,
    /// Where its indirect tables go: 512 bytes for each descriptor.
    tables: u64,
    /// Split: descriptors that are free. Packed: ids.
    free: Vec<u16>,
    /// Places of a packed ring that are free.
    places: u16,
    /// What a chain in flight takes, by head or id.
    flight: HashMap<u16, Vec<u16>>,
    next: u16,
    next_wrap: bool,
    used: u16,
    used_wrap: bool,
}

/// A buffer of a chain: where, how long, and whether the device writes it.
pub type Part = (u64, u32, bool);

impl Driver {
    /// A driver for a queue of `size` entries, all of whose memory is in `base..base + 64 KiB`.
    pub fn new(base: u64, size: u16, negotiated: u64) -> Self {
        let gpa = GuestPhysAddr::new;
        Self {
            layout: QueueLayout {
                size,
                descriptors: gpa(base),
                driver: gpa(base + 0x2000),
                device: gpa(base + 0x3000),
            },
            negotiated,
            tables: base + 0x8000,
            free: (0..size).rev().collect(),
            places: size,
            flight: HashMap::new(),
            next: 0,
            next_wrap: true,
            used: 0,
            used_wrap: true,
        }
    }
    pub fn queue(&self) -> Queue {
        Queue::new(self.layout, self.negotiated).unwrap()
    }
    pub fn has(&self, feature: u64) -> bool {
        self.negotiated & feature != 0
    }
    fn packed(&self) -> bool {
        self.has(features::RING_PACKED)
    }
    pub fn descriptor(ram: &mut Ram, at: u64, addr: u64, length: u32, third: u16, fourth: u16) {
        ram.put(at, &addr.to_le_bytes());
        ram.put(at + 8, &length.to_le_bytes());
        ram.put16(at + 12, third);
        ram.put16(at + 14, fourth);
    }
    fn flags(part: &Part, more: bool) -> u16 {
        let flag = |on, flag| if on { flag } else { 0 };
        flag(more, NEXT) | flag(part.2, WRITE)
    }

    /// Makes a chain available; gives its head or id, or nothing if there is no room.
    pub fn offer(&mut self, ram: &mut Ram, parts: &[Part], indirect: bool) -> Option<u16> {
        let indirect = indirect && self.has(features::RING_INDIRECT_DESC);
        let count = if indirect { 1 } else { parts.len() };
        let room = if self.packed() {
            usize::from(self.places)
        } else {
            self.free.len()
        };
        if room < count || self.free.is_empty() {
            return None;
        }
        if self.packed() {
            Some(self.offer_packed(ram, parts, indirect))
        } else {
            Some(self.offer_split(ram, parts, indirect))
        }
    }

    fn table(&self, id: u16) -> u64 {
        self.tables + 512 * u64::from(id)
    }

    fn offer_split(&mut self, ram: &mut Ram, parts: &[Part], indirect: bool) -> u16 {
        let base = self.layout.descriptors.as_u64();
        let chain: Vec<u16> = if indirect {
            let head = self.free.pop().unwrap();
            for (n, part) in (0u16..).zip(parts) {
                let more = usize::from(n) + 1 < parts.len();
                let at = self.table(head) + 16 * u64::from(n);
                Self::descriptor(ram, at, part.0, part.1, Self::flags(part, more), n + 1);
            }
            let at = base + 16 * u64::from(head);
            let bytes = 16 * parts.len() as u32;
            // The write flag of it means nothing.
            let flags = INDIRECT | Self::flags(&parts[0], false);
            Self::descriptor(ram, at, self.table(head), bytes, flags, 0x7777);
            vec![head]
        } else {
            let chain: Vec<u16> = parts.iter().map(|_| self.free.pop().unwrap()).collect();
            for (n, part) in parts.iter().enumerate() {
                let next = chain.get(n + 1).copied();
                let at = base + 16 * u64::from(chain[n]);
                let flags = Self::flags(part, next.is_some());
                Self::descriptor(ram, at, part.0, part.1, flags, next.unwrap_or(0x7777));
            }
            chain
        };
        let head = chain[0];
        let driver = self.layout.driver.as_u64();
        let slot = u64::from(self.next % self.layout.size);
        ram.put16(driver + 4 + 2 * slot, head);
        self.next = self.next.wrapping_add(1);
        ram.put16(driver + 2, self.next);
        self.flight.insert(head, chain);
        head
    }

    fn offer_packed(&mut self, ram: &mut Ram, parts: &[Part], indirect: bool) -> u16 {
        let id = self.free.pop().unwrap();
        let base = self.layout.descriptors.as_u64();
        let mut table = Vec::new();
        if indirect {
            for (n, part) in (0u64..).zip(parts) {
                let at = self.table(id) + 16 * n;
                Self::descriptor(ram, at, part.0, part.1, 0x7777, Self::flags(part, false));
            }
            table.push((self.table(id), 16 * parts.len() as u32, false));
        }
        let list = if indirect { &table[..] } else { parts };
        let mut first = None;
        for (n, part) in list.iter().enumerate() {
            let mut flags = Self::flags(part, n + 1 < list.len());
            flags |= u16::from(indirect) * INDIRECT;
            flags |= if self.next_wrap { AVAIL } else { USED };
            let at = base + 16 * u64::from(self.next);
            let (low, high) = (part.0.to_le_bytes(), part.1.to_le_bytes());
            ram.put(at, &low);
            ram.put(at + 8, &high);
            ram.put16(at + 12, id);
            match first {
                None => first = Some((at, flags)),
                Some(_) => ram.put16(at + 14, flags),
            }
            self.next += 1;
            if self.next == self.layout.size {
                (self.next, self.next_wrap) = (0, !self.next_wrap);
            }
        }
        let (at, flags) = first.unwrap();
        ram.put16(at + 14, flags);
        self.places -= list.len() as u16;
        self.flight.insert(id, vec![0; list.len()]);
        id
    }

    /// A chain that came back, with how many bytes the device says it wrote.
    pub fn take(&mut self, ram: &mut Ram) -> Option<(u16, u32)> {
        let (id, written) = if self.packed() {
            let at = self.layout.descriptors.as_u64() + 16 * u64::from(self.used);
            let flags = ram.get16(at + 14);
            let wrap = self.used_wrap;
            if (flags & AVAIL != 0) != wrap || (flags & USED != 0) != wrap {
                return None;
            }
            (ram.get16(at + 12), ram.get32(at + 8))
        } else {
            let device = self.layout.device.as_u64();
            if ram.get16(device + 2) == self.used {
                return None;
            }
            let slot = device + 4 + 8 * u64::from(self.used % self.layout.size);
            self.used = self.used.wrapping_add(1);
            (ram.get32(slot).try_into().unwrap(), ram.get32(slot + 4))
        };
        let chain = self.flight.remove(&id).expect("what came back was given");
        if self.packed() {
            self.free.push(id);
            self.places += chain.len() as u16;
            self.used += chain.len() as u16;
            if self.used >= self.layout.size {
                (self.used, self.used_wrap) = (self.used - self.layout.size, !self.used_wrap);
            }
        } else {
            self.free.extend(chain);
        }
        Some((id, written))
    }

    /// Asks for an interrupt when the next chain comes back, or for none.
    pub fn want_interrupt(&self, ram: &mut Ram, on: bool) {
        let driver = self.layout.driver.as_u64();
        match (self.packed(), self.has(features::RING_EVENT_IDX)) {
            (false, false) => ram.put16(driver, u16::from(!on)),
            (false, true) => {
                let event = if on {
                    self.used
                } else {
                    self.used.wrapping_sub(1)
                };
                ram.put16(driver + 4 + 2 * u64::from(self.layout.size), event);
            }
            (true, true) if on => {
                ram.put16(driver, self.used | u16::from(self.used_wrap) << 15);
                ram.put16(driver + 2, 2);
            }
            (true, _) => ram.put16(driver + 2, u16::from(!on)),
        }
    }

    /// Whether the device wants to hear of the chains offered since the ring was at `old`
    /// ([`Driver::mark`]).
    pub fn must_notify(&self, ram: &Ram, old: (u16, bool)) -> bool {
        let device = self.layout.device.as_u64();
        let event_index = self.has(features::RING_EVENT_IDX);
        if !self.packed() {
            if !event_index {
                return ram.get16(device) & 1 == 0;
            }
            let event = ram.get16(device + 4 + 8 * u64::from(self.layout.size));
            return self.next.wrapping_sub(event).wrapping_sub(1) < self.next.wrapping_sub(old.0);
        }
        match ram.get16(device + 2) & 3 {
            0 => true,
            1 => false,
            _ => {
                // Walks from the old place to the new one.
                let wanted = ram.get16(device);
                let (mut place, mut wrap) = old;
                while (place, wrap) != (self.next, self.next_wrap) {
                    if wanted == place | u16::from(wrap) << 15 {
                        return true;
                    }
                    place += 1;
                    if place == self.layout.size {
                        (place, wrap) = (0, !wrap);
                    }
                }
                false
            }
        }
    }

    /// As if this many chains had gone through a split ring.
    pub fn start_at(&mut self, ram: &mut Ram, index: u16) {
        (self.next, self.used) = (index, index);
        ram.put16(self.layout.driver.as_u64() + 2, index);
        ram.put16(self.layout.device.as_u64() + 2, index);
    }

    pub const fn mark(&self) -> (u16, bool) {
        (self.next, self.next_wrap)
    }
}
