//! Cards that answer anything and write anywhere in their memory: no driver panics, or hangs.

use super::*;
use crate::virtio::Windows;

/// xorshift64*.
#[derive(Clone)]
struct Random(Rc<RefCell<u64>>);

impl Random {
    fn next(&self) -> u64 {
        let mut state = self.0.borrow_mut();
        *state ^= *state >> 12;
        *state ^= *state << 25;
        *state ^= *state >> 27;
        state.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }
}

struct Wild {
    random: Random,
    memory: Memory,
}

impl Registers for Wild {
    fn read(&mut self, offset: u32, width: Width) -> u32 {
        let value = (self.random.next() >> 20) as u32;
        // Often as if all were well, so that drivers come far.
        let value = match self.random.next() % 8 {
            0 => value,
            1 => 0,
            2 => u32::MAX,
            _ => match (offset, width) {
                // Virtio: DRIVER_OK and FEATURES_OK, features, queue size; Intel: link up.
                (0x14, Width::Byte) => [0, 15][value as usize % 2],
                (0x18, Width::Word) => 1 << (value % 17),
                (0x04, _) => u32::MAX,
                (0x08, _) => 0x83,
                (0x5404, _) => 1 << 31 | value & 0xffff,
                _ => value & 0xfbff_ffff,
            },
        };
        match width {
            Width::Byte => value & 0xff,
            Width::Word => value & 0xffff,
            Width::Double => value,
        }
    }

    fn write(&mut self, _: u32, _: Width, _: u32) {
        let mut memory = self.memory.0.borrow_mut();
        let random = self.random.next();
        for _ in 0..random % 64 {
            let at = self.random.next() as usize % 0x6000;
            memory[at] = self.random.next() as u8;
        }
        // Now and then a page of what looks like good news.
        if random >> 8 & 3 == 0 {
            let length = random >> 16 & 0x7ff;
            let news = match random >> 10 & 3 {
                0 => random,
                1 => length | 3 << 32,
                2 => 3 | length << 32,
                _ => random & 0x00ff_00ff_00ff_00ff,
            };
            let page = (random >> 12) as usize % 5 * 4096;
            for word in memory[page..page + 4096].chunks_exact_mut(8) {
                word.copy_from_slice(&news.to_le_bytes());
            }
        }
    }
}

#[test]
fn wild_cards_do_no_harm() {
    let (mut opened, mut shown) = (0, 0);
    for seed in 1..600u64 {
        let random = Random(Rc::new(RefCell::new(
            seed.wrapping_mul(0x9e37_79b9_7f4a_7c15),
        )));
        let memory = Memory::new();
        let wild = || Wild {
            random: random.clone(),
            memory: memory.clone(),
        };
        let nic: Result<Box<dyn Nic>, Fault> = match INTEL.get(seed as usize % 4) {
            Some(family) => crate::intel::open(wild(), memory.clone(), *family, &mut |_| {})
                .map(|nic| Box::new(nic) as _),
            None => {
                let windows = Windows {
                    common: wild(),
                    notify: wild(),
                    notify_multiplier: random.next() as u32,
                    isr: wild(),
                    device: wild(),
                };
                crate::virtio::open(windows, memory.clone(), seed % 8 < 4, &mut |_| {})
                    .map(|nic| Box::new(nic) as _)
            }
        };
        let Ok(mut nic) = nic else { continue };
        opened += 1;
        let mut now = Nanos::ZERO;
        for _ in 0..300 {
            now = now + random.next() % (300 * MS);
            wild().write(0, Width::Double, 0);
            match random.next() % 6 {
                0 => nic.flush(),
                1 => nic.set_interrupts(random.next() & 1 == 0),
                2 => {
                    nic.interrupt();
                }
                3 => {
                    let length = random.next() as usize % 1600;
                    let _ = nic.transmit(&[&vec![0; length]]);
                }
                4 => {
                    let taken = nic.receive(random.next() as usize % 300, &mut |frame| {
                        assert!((HEADER..=MAX_FRAME).contains(&frame.len()));
                        shown += 1;
                    });
                    assert!(taken <= usize::from(RING));
                }
                _ => {
                    nic.poll(now);
                }
            }
        }
    }
    assert!(
        opened > 50 && shown > 100,
        "{opened} opened, {shown} frames"
    );
}
