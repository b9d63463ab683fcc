//! Devices behind their PCI transport, with a driver that does anything: it may set a device up
//! as it should be and then lie in its rings, or not even that.

use arch::{GuestMemory, GuestPhysAddr, MemoryFault, Nanos};
use machine::pci::PciFunction;
use virtio::console::Console;
use virtio::net::{Ask, Frame, NetConfig, NetDevice, NetHeader, SharedNet, feature};
use virtio::pci::VirtioPci;
use virtio::rng::Rng;
use virtio::{Device, features};

use crate::Bytes;

const RAM: usize = 0x1_0000;
/// Where a queue's three parts are, by its number.
const QUEUE: u64 = 0x1000;
const DRIVER: u64 = 0x400;
const DEVICE: u64 = 0x600;
/// Buffers.
const DATA: u64 = 0x8000;
/// Accesses to memory that no step needs, however bad the rings are.
const ACCESSES: usize = 300_000;

/// Registers of the transport, in the base address register that has all of them.
const BAR: u8 = 0;
const DRIVER_FEATURE: u64 = 0x08;
const STATUS: u64 = 0x14;
const QUEUE_SELECT: u64 = 0x16;
const NOTIFY: u64 = 0x4000;

struct Ram {
    bytes: Vec<u8>,
    accesses: usize,
}

impl Ram {
    fn part(&mut self, addr: GuestPhysAddr, length: usize) -> Result<&mut [u8], MemoryFault> {
        self.accesses += 1;
        let start = usize::try_from(addr.as_u64()).unwrap_or(usize::MAX);
        let part = self.bytes.get_mut(start..start.saturating_add(length));
        part.ok_or(MemoryFault::NotRam(addr))
    }
    fn put(&mut self, at: u64, bytes: &[u8]) {
        if let Ok(to) = self.part(GuestPhysAddr::new(at), bytes.len()) {
            to.copy_from_slice(bytes);
        }
    }
    fn get16(&mut self, at: u64) -> u16 {
        let found = self.part(GuestPhysAddr::new(at), 2);
        found.map_or(0, |bytes| u16::from_le_bytes([bytes[0], bytes[1]]))
    }
}

impl GuestMemory for Ram {
    fn read(&mut self, addr: GuestPhysAddr, buf: &mut [u8]) -> Result<(), MemoryFault> {
        buf.copy_from_slice(self.part(addr, buf.len())?);
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

/// A function, its guest's memory, and how far its driver has come.
struct World<D: Device> {
    pci: VirtioPci<D>,
    ram: Ram,
    packed: bool,
    size: u16,
    /// By queue: the next place, and packed rings' wrap counter.
    next: [(u16, bool); 4],
}

impl<D: Device> World<D> {
    /// The function at work with the features asked for, as far as they are offered.
    fn new(device: D, bytes: &mut Bytes<'_>) -> Self {
        let mut pci = VirtioPci::new(device).expect("its configuration fits");
        pci.config_mut().write(4, 2, 6);
        pci.config_written(4, 2);
        let wanted = bytes.u64() | features::VERSION_1;
        let shape = bytes.u8();
        let mut world = Self {
            pci,
            ram: Ram {
                bytes: vec![0; RAM],
                accesses: 0,
            },
            packed: false,
            size: 1 << (shape & 7).min(5),
            next: [(0, true); 4],
        };
        let mut accepted = 0;
        for (select, shift) in [(0, 0), (1, 32)] {
            world.put(0, 4, select);
            let word = world.get(4, 4) & (wanted >> shift) & 0xffff_ffff;
            accepted |= word << shift;
            world.put(DRIVER_FEATURE, 4, select);
            world.put(DRIVER_FEATURE + 4, 4, word);
        }
        world.packed = accepted & features::RING_PACKED != 0;
        world.put(STATUS, 1, 3);
        world.put(STATUS, 1, 0xb);
        for queue in 0..4 {
            let base = QUEUE * (queue + 1);
            world.put(QUEUE_SELECT, 2, queue);
            world.put(0x18, 2, world.size.into());
            for (at, part) in [(0x20, 0), (0x28, DRIVER), (0x30, DEVICE)] {
                world.put(at, 8, base + part);
            }
            world.put(0x1c, 2, 1);
        }
        world.put(STATUS, 1, 0xf);
        world
    }

    fn put(&mut self, offset: u64, size: u8, value: u64) {
        self.pci.write(BAR, offset, size, value, Nanos::ZERO);
    }

    fn get(&mut self, offset: u64, size: u8) -> u64 {
        self.pci.read(BAR, offset, size, Nanos::ZERO)
    }

    /// What the run loop does after an access.
    fn serve(&mut self) {
        for _ in 0..4 {
            if !self.pci.wants_service() {
                break;
            }
            self.pci.serve(&mut self.ram, Nanos::ZERO);
        }
        let _ = self.pci.interrupt();
        for _ in 0..64 {
            if self.pci.take_message().is_none() {
                return;
            }
        }
        panic!("messages without an end");
    }

    /// Offers a chain of up to four buffers, as good drivers do but for what the bytes say.
    fn offer(&mut self, queue: u64, bytes: &mut Bytes<'_>) {
        let base = QUEUE * (queue + 1);
        let Some(mut place) = self.next.get(queue as usize).copied() else {
            return;
        };
        let count = u16::from(bytes.u8() & 3) + 1;
        let mut first = None;
        let head = place.0 % self.size;
        for n in 0..count {
            let [kind, page] = bytes.take();
            let mut flags = u16::from(n + 1 < count) | u16::from(kind & 1) << 1;
            flags |= u16::from(kind & 0xe0 == 0xe0) << 2;
            let length = match kind >> 1 & 3 {
                0 => u32::from(page),
                1 => 16 * u32::from(page),
                2 => 2048,
                _ => bytes.u32(),
            };
            let addr = match kind >> 3 & 3 {
                3 => bytes.u64(),
                _ => DATA + 0x80 * u64::from(page),
            };
            let slot = if self.packed {
                place.0
            } else {
                place.0 % self.size
            };
            let at = base + 16 * u64::from(slot);
            self.ram.put(at, &addr.to_le_bytes());
            self.ram.put(at + 8, &length.to_le_bytes());
            if self.packed {
                flags |= if place.1 { 1 << 7 } else { 1 << 15 };
                self.ram.put(at + 12, &head.to_le_bytes());
                match first {
                    None => first = Some((at, flags)),
                    Some(_) => self.ram.put(at + 14, &flags.to_le_bytes()),
                }
                place.0 += 1;
                if place.0 == self.size {
                    place = (0, !place.1);
                }
            } else {
                place.0 = place.0.wrapping_add(1);
                self.ram.put(at + 12, &flags.to_le_bytes());
                self.ram.put(at + 14, &(place.0 % self.size).to_le_bytes());
            }
        }
        if let Some((at, flags)) = first {
            self.ram.put(at + 14, &flags.to_le_bytes());
        } else {
            let index = self.ram.get16(base + DRIVER + 2);
            let slot = u64::from(index % self.size);
            self.ram
                .put(base + DRIVER + 4 + 2 * slot, &head.to_le_bytes());
            let index = index.wrapping_add(1);
            self.ram.put(base + DRIVER + 2, &index.to_le_bytes());
        }
        self.next[queue as usize] = place;
    }

    /// One thing that a guest can do. `own` does what this kind of device has done to it besides.
    fn step(&mut self, bytes: &mut Bytes<'_>, own: &mut impl FnMut(&mut Self, &mut Bytes<'_>)) {
        self.ram.accesses = 0;
        let op = bytes.u8();
        let queue = u64::from(op >> 4 & 3);
        match op & 15 {
            0..=4 => self.offer(queue, bytes),
            5 | 6 => {
                let at = u64::from(bytes.u16());
                self.ram.put(at, bytes.some(64));
            }
            7 => {
                let size = [1, 2, 4, 8][usize::from(op >> 4 & 3)];
                let (offset, value) = (bytes.u16() & 0x7fff, bytes.u64());
                self.put(offset.into(), size, value);
            }
            8 => {
                let size = [1, 2, 4, 8][usize::from(op >> 4 & 3)];
                let _ = self.get((bytes.u16() & 0x7fff).into(), size);
            }
            9 => {
                let size = [1, 2, 4, 4][usize::from(op >> 4 & 3)];
                let offset = u16::from(bytes.u8()) & !(u16::from(size) - 1);
                let value = bytes.u32();
                self.pci.config_mut().write(offset, size, value);
                self.pci.config_written(offset, size);
                self.pci.config_reading(offset, size);
            }
            10 => own(self, bytes),
            // The rings are set up as before, or reset.
            11 if op & 0x10 != 0 => self.put(QUEUE_SELECT, 2, queue),
            11 => self.pci.reset(),
            _ => {
                self.put(NOTIFY + 4 * queue, 2, queue);
                self.serve();
                own(self, bytes);
            }
        }
        assert!(
            self.ram.accesses < ACCESSES,
            "{} accesses in one step",
            self.ram.accesses
        );
    }

    fn run(mut self, bytes: &mut Bytes<'_>, mut own: impl FnMut(&mut Self, &mut Bytes<'_>)) {
        for _ in 0..256 {
            if bytes.is_empty() {
                break;
            }
            self.step(bytes, &mut own);
        }
        self.serve();
        let saved = self.pci.save();
        self.pci.restore(saved);
        self.serve();
        // However broken it was: a reset makes it new.
        self.put(STATUS, 1, 0);
        assert_eq!(self.get(STATUS, 1) & 0xff, 0);
    }
}

/// A source of random bytes.
pub fn rng(data: &[u8]) {
    let mut bytes = Bytes(data);
    let world = World::new(Rng::new([7; 32]), &mut bytes);
    world.run(&mut bytes, |_, _| ());
}

/// A console.
pub fn console(data: &[u8]) {
    let mut bytes = Bytes(data);
    let world = World::new(Console::new(80, 25), &mut bytes);
    world.run(&mut bytes, |world, bytes| {
        let typed = bytes.some(32);
        let taken = world.pci.push_input(typed).unwrap_or(0);
        assert!(taken <= typed.len());
        world.pci.take_output(&mut |_| ());
        world.serve();
    });
}

/// A network card: frames out of it, and into it with everything left to do.
pub fn net(data: &[u8]) {
    let mut bytes = Bytes(data);
    // The address that the seeds' frames are for.
    let mut config = NetConfig::new([2, 0, 0, 0, 0, 2]);
    config.mtu = 65_535;
    config.pairs = 1 + u16::from(bytes.u8() & 1);
    let device = SharedNet::new(NetDevice::new(config).expect("in bounds"));
    let net = device.clone();
    let world = World::new(device, &mut bytes);
    let mut buffer = vec![0; 2 * virtio::net::FRAME_ROOM];
    let mut kept: Vec<(NetHeader, Vec<u8>)> = Vec::new();
    world.run(&mut bytes, |world, bytes| {
        let pairs = net.take_notified();
        let mut net = net.lock();
        for pair in (0..2).filter(|pair| pairs & 1 << pair != 0) {
            net.transmit(
                &mut world.ram,
                pair,
                8,
                Ask::Now,
                &mut buffer,
                |header, frame| {
                    if kept.len() < 4 {
                        kept.push((header, frame.bytes().to_vec()));
                    }
                },
            );
        }
        // What it sent comes back to it, split in another place.
        if let Some((header, frame)) = kept.pop() {
            let cut = usize::from(bytes.u8()).min(frame.len());
            let (head, rest) = frame.split_at(cut);
            let frame = Frame::new([head, rest, &[]]);
            let _ = net.receive(&mut world.ram, &header, &frame);
            // And to a wire.
            let _ = header.finish(0, &frame, |_, segment| {
                assert!(segment.len() <= virtio::net::MAX_FRAME);
                Ok(())
            });
            let _ = header.finish(feature::GUEST_CSUM, &frame, |_, _| Ok(()));
        } else {
            let plain = NetHeader::default();
            let _ = net.receive(&mut world.ram, &plain, &Frame::whole(bytes.some(255)));
        }
        net.settle(&mut world.ram);
        drop(net);
        world.serve();
    });
}
