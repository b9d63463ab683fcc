//! A machine without the machine: guests' memories, their drivers' side of the rings, the network
//! devices, a switch, and what a core does with a batch.

use std::hint::black_box;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use arch::{GuestMemory, GuestPhysAddr, MemoryFault, Nanos};
use relay::{BATCH, Far, Inbound, Leaving, Relay};
use spin::Mutex;
use virtio::net::{Ask, FRAME_ROOM, NetConfig, NetDevice, NetHeader, SharedNet, feature};
use virtio::{Device, Queue, QueueLayout, features};
use vswitch::config::SwitchConfig;
use vswitch::port::{PortConfig, PortKind};
use vswitch::{MacAddr, PortId, Switch};

/// What Linux's driver takes.
const NEGOTIATED: u64 = features::VERSION_1
    | features::RING_EVENT_IDX
    | features::RING_INDIRECT_DESC
    | feature::CSUM
    | feature::GUEST_OFFLOADS
    | feature::HOST_TSO4
    | feature::HOST_TSO6
    | feature::HOST_ECN
    | feature::MAC
    | feature::MRG_RXBUF
    | feature::STATUS
    | feature::CTRL_VQ
    | feature::CTRL_RX
    | feature::CTRL_VLAN;
/// Entries of a ring.
const RING: u16 = 64;
/// Bytes of a buffer.
const SLOT: u64 = 2048;
/// Where the rings are; buffers follow, to send from and to receive into.
const TX: u64 = 0;
const RX: u64 = 0x1000;
const TX_SLOTS: u64 = 0x2000;
const RX_SLOTS: u64 = TX_SLOTS + RING as u64 * SLOT;
const MEMORY: u64 = RX_SLOTS + RING as u64 * SLOT;
/// Decisions that a core remembers, as in the hypervisor.
const CACHED: usize = 2048;

/// A guest's memory.
struct Ram(Vec<u8>);

impl Ram {
    fn part(&mut self, addr: GuestPhysAddr, length: usize) -> Result<&mut [u8], MemoryFault> {
        let start = usize::try_from(addr.as_u64()).unwrap_or(usize::MAX);
        let end = start.saturating_add(length);
        self.0.get_mut(start..end).ok_or(MemoryFault::NotRam(addr))
    }
    fn put<const N: usize>(&mut self, at: u64, bytes: [u8; N]) {
        if let Some(to) = self
            .0
            .get_mut(at as usize..)
            .and_then(|m| m.first_chunk_mut())
        {
            *to = bytes;
        }
    }
    fn get<const N: usize>(&self, at: u64) -> [u8; N] {
        let from = self.0.get(at as usize..).and_then(|m| m.first_chunk());
        from.copied().unwrap_or([0; N])
    }
}

impl GuestMemory for Ram {
    fn read(&mut self, addr: GuestPhysAddr, buf: &mut [u8]) -> Result<(), MemoryFault> {
        let from = self.part(addr, buf.len())?;
        buf.copy_from_slice(from);
        Ok(())
    }
    fn write(&mut self, addr: GuestPhysAddr, data: &[u8]) -> Result<(), MemoryFault> {
        self.part(addr, data.len())?.copy_from_slice(data);
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

/// The driver's side of a split ring: descriptor `n` is buffer `n` for ever.
struct Ring {
    base: u64,
    next: u16,
    used: u16,
}

impl Ring {
    fn new(ram: &mut Ram, base: u64, slots: u64, writable: bool) -> Self {
        for n in 0..u64::from(RING) {
            let at = base + 16 * n;
            ram.put(at, (slots + n * SLOT).to_le_bytes());
            ram.put(at + 8, (SLOT as u32).to_le_bytes());
            ram.put(at + 12, (u16::from(writable) * 2).to_le_bytes());
        }
        Self {
            base,
            next: 0,
            used: 0,
        }
    }
    fn layout(&self) -> QueueLayout {
        QueueLayout {
            size: RING,
            descriptors: GuestPhysAddr::new(self.base),
            driver: GuestPhysAddr::new(self.base + 0x600),
            device: GuestPhysAddr::new(self.base + 0x800),
        }
    }
    /// Makes the next `count` buffers available.
    fn offer(&mut self, ram: &mut Ram, count: u16) {
        for _ in 0..count {
            let slot = self.next % RING;
            ram.put(self.base + 0x604 + 2 * u64::from(slot), slot.to_le_bytes());
            self.next = self.next.wrapping_add(1);
        }
        ram.put(self.base + 0x602, self.next.to_le_bytes());
    }
    /// Takes back what was used; calls `look` with each buffer and how much was written.
    fn collect(&mut self, ram: &Ram, mut look: impl FnMut(u32, u32)) -> u16 {
        let until = u16::from_le_bytes(ram.get(self.base + 0x802));
        let count = until.wrapping_sub(self.used);
        for _ in 0..count {
            let at = self.base + 0x804 + 8 * u64::from(self.used % RING);
            look(
                u32::from_le_bytes(ram.get(at)),
                u32::from_le_bytes(ram.get(at + 4)),
            );
            self.used = self.used.wrapping_add(1);
        }
        count
    }
}

/// A guest with a card.
pub struct Guest {
    net: SharedNet,
    ram: Mutex<Ram>,
    tx: Ring,
    rx: Ring,
    length: usize,
    received: u64,
}

/// The address of the guest at a port.
fn mac(port: u16) -> MacAddr {
    let [a, b] = port.to_be_bytes();
    MacAddr([2, 0, 0, 0, a, b])
}

/// A UDP frame, of the least length at least.
fn frame(from: u16, to: u16, length: usize) -> Vec<u8> {
    let mut frame = [mac(to).0, mac(from).0].concat();
    frame.extend([8, 0]);
    let total = (length - 14) as u16;
    frame.extend([0x45, 0]);
    frame.extend(total.to_be_bytes());
    frame.extend([0, 0, 0, 0, 64, 17, 0, 0]);
    frame.extend([10, 0]);
    frame.extend(from.to_be_bytes());
    frame.extend([10, 0]);
    frame.extend(to.to_be_bytes());
    frame.extend([0x10, 0, 0x20, 0]);
    frame.extend((total - 20).to_be_bytes());
    frame.resize(length, 0x5a);
    frame
}

impl Guest {
    fn new(port: u16, to: u16, length: usize) -> Result<Self> {
        let device = NetDevice::new(NetConfig::new(mac(port).0)).context("a device")?;
        let mut net = SharedNet::new(device);
        let mut ram = Ram(vec![0; MEMORY as usize]);
        let tx = Ring::new(&mut ram, TX, TX_SLOTS, false);
        let mut rx = Ring::new(&mut ram, RX, RX_SLOTS, true);
        let size = (NetHeader::SIZE + length) as u32;
        let bytes = frame(port, to, length);
        for n in 0..u64::from(RING) {
            ram.put(TX + 16 * n + 8, size.to_le_bytes());
            let at = (TX_SLOTS + n * SLOT) as usize + NetHeader::SIZE;
            ram.part(GuestPhysAddr::new(at as u64), length)
                .ok()
                .context("a buffer")?
                .copy_from_slice(&bytes);
        }
        rx.offer(&mut ram, RING);
        net.start(NEGOTIATED);
        net.attach(0, Queue::new(rx.layout(), NEGOTIATED)?);
        net.attach(1, Queue::new(tx.layout(), NEGOTIATED)?);
        Ok(Self {
            net,
            ram: Mutex::new(ram),
            tx,
            rx,
            length,
            received: 0,
        })
    }

    /// The driver sends a batch; `vary` gives each frame its IP source and ports.
    fn send(&mut self, vary: &mut impl FnMut() -> Option<[u8; 8]>) {
        let ram = self.ram.get_mut();
        self.tx.collect(ram, |_, _| ());
        for n in 0..BATCH as u16 {
            if let Some([a, b, c, d, ports @ ..]) = vary() {
                let slot = u64::from(self.tx.next.wrapping_add(n) % RING);
                let at = TX_SLOTS + slot * SLOT + NetHeader::SIZE as u64;
                ram.put(at + 26, [a, b, c, d]);
                ram.put(at + 34, ports);
            }
        }
        self.tx.offer(ram, BATCH as u16);
    }

    /// The driver takes what came and gives the buffers back.
    fn take(&mut self) {
        let ram = self.ram.get_mut();
        let count = self.rx.collect(ram, |slot, written| {
            black_box((slot, written));
        });
        self.rx.offer(ram, count);
        self.received += u64::from(count);
    }
}

/// What the sending guests put into their frames.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Traffic {
    /// The same headers always.
    Same,
    /// So many flows in turn.
    Flows(u32),
    /// No two frames alike.
    Spray,
}

/// Sources of headers.
struct Headers {
    traffic: Traffic,
    count: u32,
}

impl Headers {
    fn next(&mut self) -> Option<[u8; 8]> {
        self.count = self.count.wrapping_add(1);
        let number = match self.traffic {
            Traffic::Same => return None,
            Traffic::Flows(flows) => self.count % flows,
            Traffic::Spray => self.count,
        };
        let [a, b, c, d] = number.wrapping_mul(0x9e37_79b1).to_be_bytes();
        let [e, f, g, h] = number.to_be_bytes();
        Some([a, b, c, d, e, f, g, h])
    }
}

/// All of it.
pub struct World {
    guests: Vec<Guest>,
    switch: Mutex<Switch>,
    relay: Relay,
    buffer: Vec<u8>,
    now: Nanos,
}

/// The guests behind the ports.
struct Ports<'a>(&'a [Guest]);

impl Far for Ports<'_> {
    fn take(&mut self, port: PortId, frames: Leaving<'_>) {
        let Some(guest) = self.0.get(usize::from(port.0).wrapping_sub(1)) else {
            return;
        };
        let mut net = guest.net.lock();
        let mut ram = guest.ram.lock();
        frames.each(|header, frame| {
            // What it drops it counts.
            let _ = net.receive(&mut *ram, header, frame);
        });
        net.settle(&mut *ram);
    }
}

/// Flows of 16 masks, none of which meets what is sent: a look-up visits all of them.
pub fn flows(count: u32) -> Vec<String> {
    let flow = |n: u32| {
        let [_, b, c, d] = n.to_be_bytes();
        let bits = 32 - n % 16;
        let net = u32::from_be_bytes([172, b, c, d]) << (n % 16) >> (n % 16) | 0x8000_0000;
        let [e, f, g, h] = (net & (u32::MAX << (n % 16))).to_be_bytes();
        format!(
            "priority={},udp,nw_dst={e}.{f}.{g}.{h}/{bits},tp_dst={},actions=drop",
            1000 + n % 16,
            n / 16 % 60_000
        )
    };
    let mut all: Vec<String> = (0..count.saturating_sub(1)).map(flow).collect();
    all.push("priority=0,actions=NORMAL".to_owned());
    all
}

impl World {
    /// So many guests, each of which sends frames of `length` bytes to the next.
    pub fn new(ports: u16, length: usize, flows: Vec<String>) -> Result<Self> {
        let next = |port| if port == ports { 1 } else { port + 1 };
        let guests = (1..=ports).map(|port| Guest::new(port, next(port), length));
        let ports = (1..=ports).map(|port| {
            let mut config = PortConfig::new(port, &format!("vm{port}"), PortKind::Vnic);
            config.macs = vec![mac(port)];
            config
        });
        let config = SwitchConfig {
            name: "bench".into(),
            ports: ports.collect(),
            flows,
            ..SwitchConfig::default()
        };
        Ok(Self {
            guests: guests.collect::<Result<_>>()?,
            switch: Mutex::new(Switch::new(config, [11, 22])?),
            relay: Relay::new(CACHED, [33, 44]),
            buffer: vec![0; 4 * FRAME_ROOM],
            now: Nanos::ZERO,
        })
    }

    /// What the hypervisor's core does with a batch of the guest at `place`.
    #[inline(never)]
    fn carry(&mut self, place: usize) {
        let Some(guest) = self.guests.get(place) else {
            return;
        };
        let mut frames = Vec::<Inbound<'_>>::with_capacity(BATCH);
        {
            let mut net = guest.net.lock();
            let mut ram = guest.ram.lock();
            net.transmit(
                &mut *ram,
                0,
                BATCH as u32,
                Ask::Idle,
                &mut self.buffer,
                |header, frame| frames.push((header, frame)),
            );
        }
        let port = PortId(place as u16 + 1);
        let mut ports = Ports(&self.guests);
        self.relay
            .forward(|| self.switch.lock(), port, &frames, self.now, &mut ports);
    }

    /// As [`World::carry`], to be counted: a counter of instructions is switched on by this name.
    #[inline(never)]
    pub fn counted_carry(&mut self, place: usize) {
        self.carry(place);
        black_box(());
    }

    fn send(&mut self, place: usize, headers: &mut Headers) {
        if let Some(guest) = self.guests.get_mut(place) {
            guest.send(&mut || headers.next());
        }
    }

    fn take(&mut self, place: usize) {
        if let Some(guest) = self.guests.get_mut(place) {
            guest.take();
        }
    }

    /// The guests send batch after batch in turn. How many frames arrived, and how long the core
    /// took for them.
    pub fn run(&mut self, traffic: Traffic, batches: u64) -> (u64, Duration) {
        let mut headers = Headers { traffic, count: 0 };
        let ports = self.guests.len();
        let before = self.received();
        let mut took = Duration::ZERO;
        for batch in 0..batches as usize {
            let place = batch % ports;
            self.send(place, &mut headers);
            let begin = Instant::now();
            self.counted_carry(place);
            took += begin.elapsed();
            self.take((place + 1) % ports);
        }
        (self.received() - before, took)
    }

    /// The first guest sends to the second in many flows; the third sends as `other` does, as much.
    /// How many frames the second got, and how long the core took for those of the first.
    pub fn beside(&mut self, other: Traffic, batches: u64) -> (u64, Duration) {
        let mut own = Headers {
            traffic: Traffic::Flows(256),
            count: 0,
        };
        let mut others = Headers {
            traffic: other,
            count: 0,
        };
        let before = self.guests.get(1).map_or(0, |guest| guest.received);
        let mut took = Duration::ZERO;
        for _ in 0..batches {
            self.send(0, &mut own);
            self.send(2, &mut others);
            self.carry(2);
            let begin = Instant::now();
            self.counted_carry(0);
            took += begin.elapsed();
            self.take(1);
            self.take(3);
        }
        let after = self.guests.get(1).map_or(0, |guest| guest.received);
        (after - before, took)
    }

    fn received(&self) -> u64 {
        self.guests.iter().map(|guest| guest.received).sum()
    }

    /// Sends one batch and compares what arrives with what was sent, byte for byte.
    pub fn check(&mut self) -> Result<()> {
        let mut headers = Headers {
            traffic: Traffic::Same,
            count: 0,
        };
        self.send(0, &mut headers);
        self.carry(0);
        let [sender, receiver, ..] = &mut *self.guests else {
            return Ok(());
        };
        let length = sender.length as u64;
        let sent = sender.ram.get_mut();
        let got = receiver.ram.get_mut();
        let mut arrived = 0;
        let mut same = true;
        let count = receiver.rx.collect(got, |slot, written| {
            let header = NetHeader::SIZE as u64;
            same &= u64::from(written) == header + length;
            for at in header..header + length {
                let from = sent.get::<1>(TX_SLOTS + at);
                same &= from == got.get(RX_SLOTS + u64::from(slot) * SLOT + at);
            }
            arrived += 1;
        });
        receiver.rx.offer(got, count);
        ensure!(
            arrived == BATCH && same,
            "of {BATCH} frames {arrived} arrived, {}",
            if same { "whole" } else { "changed" }
        );
        Ok(())
    }
}
