//! A model of a virtio network device with the modern transport.

use super::*;
use crate::virtio::Windows;

/// All features that matter, and some that must not be taken.
pub const ALL: u64 =
    1 << 5 | 1 << 16 | 1 << 17 | 1 << 18 | 1 << 32 | 1 << 33 | 1 << 28 | 1 << 15 | 1;

#[derive(Clone, Copy, Default)]
struct Queue {
    size: u16,
    enabled: bool,
    addresses: [u64; 3],
    seen: u16,
    used: u16,
}

pub struct Device {
    memory: Memory,
    mood: Mood,
    wire: Vec<Vec<u8>>,
    offered: u64,
    accepted: u64,
    select: [u32; 3],
    status: u8,
    isr: u32,
    queues: [Queue; 3],
    sizes: [u16; 3],
    promiscuous: bool,
    refuse_promiscuous: bool,
    refuse_features: bool,
}

const MULTIPLIER: u32 = 4;

/// Address, length, flags.
type Buffer = (u64, u32, u16);
/// What is done to a device before it is opened, or while it works.
type Spoil = fn(&mut Device);

impl Device {
    fn reset(&mut self) {
        self.status = 0;
        self.isr = 0;
        self.accepted = 0;
        self.promiscuous = false;
        self.queues = self.sizes.map(|size| Queue {
            size,
            ..Queue::default()
        });
    }

    fn common(&mut self, offset: u32, width: Width, value: Option<u32>) -> u32 {
        if self.mood.dead {
            return match width {
                Width::Byte => 0xff,
                Width::Word => 0xffff,
                Width::Double => u32::MAX,
            };
        }
        let want = match offset {
            0x14 | 0x15 => Width::Byte,
            0x10 | 0x12 | 0x16..=0x1e => Width::Word,
            _ => Width::Double,
        };
        assert_eq!(width, want, "at {offset:#x}");
        let half = |all: u64, select: u32| (all >> (32 * select)) as u32;
        let index = self.select[2] as usize;
        let Some(value) = value else {
            return match offset {
                0x04 => half(self.offered, self.select[0]),
                0x14 if self.mood.endless_reset && self.status == 0 => 0x80,
                0x14 => self.status.into(),
                0x18 => self.queues.get(index).map_or(0, |q| q.size.into()),
                0x1e => self.select[2],
                _ => 0,
            };
        };
        match offset {
            0x00 => self.select[0] = value,
            0x08 => self.select[1] = value,
            0x0c => self.accepted |= u64::from(value) << (32 * self.select[1]),
            0x14 if value == 0 => self.reset(),
            0x14 => {
                let mut status = value as u8;
                if status & 8 != 0 && self.status & 8 == 0 {
                    assert_eq!(self.accepted & !self.offered, 0);
                    assert_eq!(self.accepted & (1 << 28 | 1 << 15 | 1), 0);
                    if self.refuse_features {
                        status &= !8;
                    }
                }
                self.status = status;
            }
            0x16 => self.select[2] = value,
            _ => {
                let queue = &mut self.queues[index];
                assert!(!queue.enabled, "set up before it is enabled");
                match offset {
                    0x18 => queue.size = value as u16,
                    0x1a => assert_eq!(value, 0xffff),
                    0x1c => queue.enabled = value == 1,
                    0x20..0x38 => {
                        let (number, high) = ((offset - 0x20) / 8, offset & 4 != 0);
                        let shift = if high { 32 } else { 0 };
                        queue.addresses[number as usize] |= u64::from(value) << shift;
                    }
                    0x10 => assert_eq!(value, 0xffff),
                    _ => panic!("write at {offset:#x}"),
                }
            }
        }
        0
    }

    fn notify(&mut self, offset: u32, width: Width, value: Option<u32>) -> u32 {
        assert_eq!(
            (value.map(|v| v * MULTIPLIER), width),
            (Some(offset), Width::Word)
        );
        if !self.mood.dead {
            self.run();
        }
        0
    }

    fn interrupt_status(&mut self, _: u32, width: Width, _: Option<u32>) -> u32 {
        assert_eq!(width, Width::Byte);
        std::mem::take(&mut self.isr)
    }

    fn config(&mut self, offset: u32, width: Width, _: Option<u32>) -> u32 {
        match (offset, width) {
            (0..6, Width::Byte) => MAC[offset as usize].into(),
            (6, Width::Word) => u32::from(!self.mood.link_down),
            _ => panic!("read at {offset:#x}"),
        }
    }

    fn word(&self, at: u64) -> u16 {
        u16::from_le_bytes(self.memory.get(at))
    }

    /// The next chain: its head and buffers with flags.
    fn pop(&mut self, number: usize) -> Option<(u16, Vec<Buffer>)> {
        let queue = self.queues[number];
        let [table, available, _] = queue.addresses;
        if self.status & 4 == 0 || !queue.enabled || queue.seen == self.word(available + 2) {
            return None;
        }
        let slot = u64::from(queue.seen % queue.size);
        self.queues[number].seen = queue.seen.wrapping_add(1);
        let head = self.word(available + 4 + 2 * slot);
        let mut chain = Vec::new();
        let mut id = head;
        loop {
            assert!(id < queue.size && chain.len() < 3);
            let at = table + 16 * u64::from(id);
            let length = u32::from_le_bytes(self.memory.get(at + 8));
            let flags = self.word(at + 12);
            chain.push((u64::from_le_bytes(self.memory.get(at)), length, flags));
            if flags & 1 == 0 {
                return Some((head, chain));
            }
            id = self.word(at + 14);
        }
    }

    fn push(&mut self, number: usize, head: u32, written: u32) {
        let queue = &mut self.queues[number];
        let [_, available, used] = queue.addresses;
        let slot = u64::from(queue.used % queue.size);
        queue.used = queue.used.wrapping_add(1);
        let index = queue.used;
        self.memory.put(used + 4 + 8 * slot, &head.to_le_bytes());
        self.memory.put(used + 8 + 8 * slot, &written.to_le_bytes());
        self.memory.put(used + 2, &index.to_le_bytes());
        if self.word(available) & 1 == 0 {
            self.isr |= 1;
        }
    }

    fn run(&mut self) {
        while !self.mood.stalled
            && let Some((head, chain)) = self.pop(1)
        {
            let [(addr, length, 0)] = chain[..] else {
                panic!("{chain:x?}")
            };
            let bytes = self.memory.bytes_at(addr, length as usize);
            assert_eq!(bytes[..12], [0; 12]);
            self.wire.push(bytes[12..].to_vec());
            self.push(1, head.into(), 0);
        }
        if let Some((head, chain)) = self.pop(2) {
            let [(command, 3, 1), (answer, 1, 2)] = chain[..] else {
                panic!("{chain:x?}")
            };
            assert_eq!(self.memory.get(command), [0, 0, 1]);
            self.promiscuous = !self.refuse_promiscuous;
            self.memory.put(answer, &[self.refuse_promiscuous.into()]);
            self.push(2, head.into(), 1);
        }
    }
}

impl Model for Device {
    fn mood(&mut self) -> &mut Mood {
        &mut self.mood
    }

    fn arrive(&mut self, frame: &[u8]) -> bool {
        self.run();
        if self.mood.stalled {
            return false;
        }
        assert!(self.promiscuous || self.status & 4 == 0 || self.offered & 1 << 18 == 0);
        let Some((head, chain)) = self.pop(0) else {
            return false;
        };
        let [(addr, 2048, 2)] = chain[..] else {
            panic!("{chain:x?}")
        };
        self.memory.put(addr, &[0; 12]);
        self.memory.put(addr + 12, frame);
        let written = match self.mood.lie.take() {
            Some(Lie::Length(length)) => length,
            _ => frame.len() as u32 + 12,
        };
        self.push(0, head.into(), written);
        true
    }

    fn sent(&mut self) -> Vec<Vec<u8>> {
        std::mem::take(&mut self.wire)
    }

    fn interrupts(&self) -> bool {
        self.isr != 0
    }
}

fn device(offered: u64) -> (Rc<RefCell<Device>>, Memory) {
    let memory = Memory::new();
    let mut device = Device {
        memory: memory.clone(),
        mood: Mood::default(),
        wire: Vec::new(),
        offered,
        accepted: 0,
        select: [0; 3],
        status: 15,
        isr: 0,
        queues: [Queue::default(); 3],
        sizes: [256, 256, 64],
        promiscuous: false,
        refuse_promiscuous: false,
        refuse_features: false,
    };
    device.reset();
    (Rc::new(RefCell::new(device)), memory)
}

fn open(device: &Rc<RefCell<Device>>, memory: Memory) -> Result<Box<dyn Nic>, Fault> {
    let windows = Windows {
        common: Shared(device.clone(), Device::common),
        notify: Shared(device.clone(), Device::notify),
        notify_multiplier: MULTIPLIER,
        isr: Shared(device.clone(), Device::interrupt_status),
        device: Shared(device.clone(), Device::config),
    };
    let nic = crate::virtio::open(windows, memory, false, &mut |_| {})?;
    Ok(Box::new(nic))
}

fn on(device: Rc<RefCell<Device>>, memory: Memory) -> World {
    World {
        name: "virtio",
        nic: open(&device, memory).expect("a good device"),
        model: device,
        now: Nanos::ZERO,
    }
}

pub fn world(offered: u64) -> World {
    let (device, memory) = device(offered);
    on(device, memory)
}

#[test]
fn the_least_device_is_enough() {
    let mut world = world(1 << 5 | 1 << 32);
    assert!(world.nic.link().up);
    world.mood(|mood| mood.link_down = true);
    assert_eq!(world.pass(SECOND), [], "it cannot tell");
    world.assert_works();
}

#[test]
fn small_queues_are_used_as_they_are() {
    let (device, memory) = device(ALL);
    device.borrow_mut().sizes = [2, 4, 2];
    let mut world = on(device, memory);
    for _ in 0..100 {
        world.assert_works();
    }
    assert!(world.arrive(&frame(60, 1)) && world.arrive(&frame(60, 2)));
    assert!(!world.arrive(&frame(60, 3)));
    assert_eq!(world.receive(), [frame(60, 1), frame(60, 2)]);
}

#[test]
fn devices_that_cannot_be_used_are_refused() {
    let cases: [(Fault, Spoil); 7] = [
        (Fault::Refuses, |d| d.offered &= !(1 << 32)),
        (Fault::Refuses, |d| d.offered &= !(1 << 5)),
        (Fault::Refuses, |d| d.refuse_features = true),
        (Fault::Queue(0), |d| d.sizes[0] = 0),
        (Fault::Queue(1), |d| d.sizes[1] = 24),
        (Fault::Queue(2), |d| d.sizes[2] = 1),
        (Fault::Gone, |d| d.mood.dead = true),
    ];
    for (fault, spoil) in cases {
        let (device, memory) = device(ALL);
        spoil(&mut device.borrow_mut());
        assert_eq!(open(&device, memory).err(), Some(fault));
    }
}

#[test]
fn a_device_that_is_not_promiscuous_is_given_up() {
    let (device, memory) = device(ALL);
    device.borrow_mut().refuse_promiscuous = true;
    // It is found when the device has answered, maybe later than at once.
    match open(&device, memory) {
        Err(fault) => assert_eq!(fault, Fault::Refuses),
        Ok(mut nic) => assert_eq!(nic.poll(Nanos(1)), Some(Event::Dead(Fault::Refuses))),
    }
}

#[test]
fn lies_in_the_used_rings_end_in_a_reset() {
    let lies: [Spoil; 6] = [
        // A chain it does not have, and one that no queue has.
        |d| {
            d.arrive(&[0; 60]);
            d.queues[0].used = d.queues[0].used.wrapping_sub(1);
            d.push(0, 77 + 256, 72);
        },
        |d| d.push(1, 3, 0),
        // The same twice.
        |d| {
            d.push(1, 0, 0);
            d.push(1, 0, 0);
        },
        // More than there are.
        |d| {
            let used = d.queues[0].addresses[2];
            d.memory.put(used + 2, &[0xff, 0xff]);
        },
        |d| d.status |= 64,
        |d| d.reset(),
    ];
    for (number, lie) in lies.into_iter().enumerate() {
        let (device, memory) = device(ALL);
        let mut world = on(device.clone(), memory);
        world.nic.transmit(&[&frame(60, 1)]).expect("room");
        lie(&mut device.borrow_mut());
        world.receive();
        let events = world.pass(SECOND);
        assert!(
            matches!(events[..], [Event::Resetting(Fault::Broken), Event::Restarted, up] if is_up(&up)),
            "{number}: {events:?}"
        );
        world.assert_works();
    }
}
