//! A model of Intel's cards: registers, rings in memory, and what the drivers must not do.

use super::*;
use std::collections::HashMap;

pub struct Card {
    family: Family,
    registers: HashMap<u32, u32>,
    memory: Memory,
    mood: Mood,
    wire: Vec<Vec<u8>>,
    cause: u32,
    mask: u32,
    missed: u32,
    /// Words of its own memory; the address is there when RAL and RAH are not filled from it.
    pub eeprom: Option<[u16; 3]>,
    status: u32,
    /// The PHY's control register; there is a link once it has negotiated.
    phy: Option<u32>,
}

impl Card {
    fn get(&self, register: u32) -> u32 {
        self.registers.get(&register).copied().unwrap_or(0)
    }

    fn queue(&self, place: [u32; 2]) -> u32 {
        place[usize::from(self.family == Family::Igb)]
    }

    fn reset(&mut self) {
        // An emulated 8254x forgets to, on which a driver must not rely.
        if self.family != Family::E1000 {
            self.registers.clear();
        }
        (self.mask, self.cause) = (0, 0);
        if self.eeprom.is_none() {
            let [a, b, c, d, e, f] = MAC;
            self.registers
                .insert(0x5400, u32::from_le_bytes([a, b, c, d]));
            self.registers
                .insert(0x5404, u32::from_le_bytes([e, f, 0, 0x80]));
        }
    }

    pub fn access(&mut self, offset: u32, width: Width, value: Option<u32>) -> u32 {
        assert_eq!((width, offset % 4), (Width::Double, 0));
        assert!(offset < 0x2_0000);
        if self.mood.dead {
            return u32::MAX;
        }
        match value {
            None => self.read(offset),
            Some(value) => {
                self.write(offset, value);
                0
            }
        }
    }

    fn read(&mut self, offset: u32) -> u32 {
        match offset {
            0x0000 if !self.mood.endless_reset => self.get(0) & !(1 << 26),
            0x0008 => {
                let master = self.get(0) & 4 == 0 && self.family != Family::E1000;
                let asleep = self.phy.is_some_and(|phy| phy & 0x1c00 != 0x1000);
                let down = self.mood.link_down || asleep;
                let status = if down { 0 } else { self.status };
                status | u32::from(master) << 19
            }
            0x0014 => {
                let (shift, done) = match self.family {
                    Family::E1000 => (8, 1 << 4),
                    _ => (2, 1 << 1),
                };
                let word = (self.get(0x14) >> shift) as usize;
                let words = self.eeprom.unwrap_or_default();
                words
                    .get(word)
                    .map_or(0, |word| u32::from(*word) << 16 | done)
            }
            0x0020 => {
                let phy = self.phy.map_or(1 << 30, |phy| phy);
                self.get(0x20) & 0x0fff_0000 | 1 << 28 | phy
            }
            0x00c0 => std::mem::take(&mut self.cause),
            0x4010 => std::mem::take(&mut self.missed),
            _ => self.get(offset),
        }
    }

    fn write(&mut self, offset: u32, value: u32) {
        match offset {
            0x00d0 => self.mask |= value,
            0x00d8 => self.mask &= !value,
            0x0020 => {
                assert_eq!(value >> 16 & 0x3ff, 1 << 5, "register 0 of PHY 1");
                if value >> 26 == 1 {
                    assert!(value & 1 << 9 != 0, "negotiate anew");
                    self.phy = self.phy.map(|_| value & 0xfdff);
                }
                self.registers.insert(offset, value);
            }
            0x0000 if value & 1 << 26 != 0 => {
                self.registers.insert(0, value);
                assert_eq!(self.read(8) >> 19 & 1, 0, "reset with accesses under way");
                self.reset();
                self.registers.insert(0, value);
            }
            _ => {
                self.registers.insert(offset, value);
            }
        }
        if offset == self.queue([0x3818, 0xe018]) {
            self.transmit();
        }
    }

    fn base(&self, queue: u32) -> u64 {
        u64::from(self.get(queue + 4)) << 32 | u64::from(self.get(queue))
    }

    fn descriptor(&self, queue: u32) -> (u64, u64, u64) {
        assert_eq!(self.get(queue + 8), 4096, "bytes of a ring");
        let at = self.base(queue) + 16 * u64::from(self.get(queue + 0x10));
        let word = |at| u64::from_le_bytes(self.memory.get(at));
        (at, word(at), word(at + 8))
    }

    fn advance(&mut self, queue: u32) {
        let head = (self.get(queue + 0x10) + 1) % 256;
        self.registers.insert(queue + 0x10, head);
    }

    fn transmit(&mut self) {
        let queue = self.queue([0x3800, 0xe000]);
        let on = self.get(0x400) & 2 != 0
            && (self.family != Family::Igb || self.get(queue + 0x28) & 1 << 25 != 0);
        while on && !self.mood.stalled && self.get(queue + 0x10) != self.get(queue + 0x18) {
            let (at, addr, word) = self.descriptor(queue);
            let length = word & 0xffff;
            let command = word >> 24 & 0xff;
            if self.family == Family::Igb {
                assert_eq!((command, word >> 20 & 15), (0x2b, 3));
                assert_eq!(word >> 46, length, "whole length");
            } else {
                assert_eq!(command, 0x0b);
            }
            self.wire.push(self.memory.bytes_at(addr, length as usize));
            self.memory.put(at + 12, &[1]);
            self.advance(queue);
        }
    }
}

impl Model for Card {
    fn mood(&mut self) -> &mut Mood {
        &mut self.mood
    }

    fn arrive(&mut self, frame: &[u8]) -> bool {
        self.transmit();
        let queue = self.queue([0x2800, 0xc000]);
        let igb = self.family == Family::Igb;
        let control = self.get(0x100);
        if control & 2 == 0 || igb && self.get(queue + 0x28) & 1 << 25 == 0 {
            return false;
        }
        // Promiscuous, broadcast, checksum stripped, no jumbo frames, 2048 bytes.
        assert_eq!(control & 0x0407_8038, 0x0400_8018);
        if self.mood.stalled || self.get(queue + 0x10) == self.get(queue + 0x18) {
            self.missed += 1;
            return false;
        }
        let (at, addr, word) = self.descriptor(queue);
        assert_eq!(word, 0, "a status that was not cleared");
        self.memory.put(addr, frame);
        let lie = self.mood.lie.take();
        let length = match lie {
            Some(Lie::Length(length)) => u64::from(length),
            _ => frame.len() as u64,
        };
        let end = u64::from(lie != Some(Lie::NoEnd));
        let error = u64::from(lie == Some(Lie::Damaged));
        let word = if igb {
            assert_eq!(self.get(queue + 0x0c), 1 << 25 | 2);
            1 | end << 1 | error << 31 | length << 32
        } else {
            length | 1 << 32 | end << 33 | error << 40
        };
        self.memory.put(at, &[0xcc; 8]);
        self.memory.put(at + 8, &word.to_le_bytes());
        self.advance(queue);
        self.cause |= 1 << 7;
        true
    }

    fn sent(&mut self) -> Vec<Vec<u8>> {
        std::mem::take(&mut self.wire)
    }

    fn interrupts(&self) -> bool {
        self.cause & self.mask != 0
    }
}

pub fn card(family: Family) -> (Rc<RefCell<Card>>, Memory) {
    let memory = Memory::new();
    let mut card = Card {
        family,
        registers: HashMap::new(),
        memory: memory.clone(),
        mood: Mood::default(),
        wire: Vec::new(),
        cause: 0,
        mask: 0xffff,
        missed: 0,
        eeprom: None,
        status: 2 << 6 | 3,
        phy: Some(0x1000),
    };
    card.reset();
    (Rc::new(RefCell::new(card)), memory)
}

fn open(card: &Rc<RefCell<Card>>, memory: Memory) -> Result<Box<dyn Nic>, Fault> {
    let family = card.borrow().family;
    let registers = Shared(card.clone(), Card::access);
    let nic = crate::intel::open(registers, memory, family, &mut |_| {})?;
    Ok(Box::new(nic))
}

pub fn world(family: Family) -> World {
    let (card, memory) = card(family);
    World {
        name: ["e1000", "e1000e", "igb"][family as usize],
        nic: open(&card, memory).expect("a good card"),
        model: card,
        now: Nanos::ZERO,
    }
}

#[test]
fn frames_in_pieces_and_damaged_ones_are_dropped_and_counted() {
    for family in INTEL {
        let mut world = world(family);
        for _ in 0..3 {
            world.mood(|mood| mood.lie = Some(Lie::NoEnd));
            assert!(world.arrive(&frame(60, 1)));
        }
        // The end of that frame, which is none.
        assert!(world.arrive(&frame(60, 2)));
        world.mood(|mood| mood.lie = Some(Lie::Damaged));
        assert!(world.arrive(&frame(60, 3)));
        assert!(world.arrive(&frame(60, 4)));
        assert_eq!(world.receive(), [frame(60, 4)], "{}", world.name);
        let counters = world.nic.counters();
        assert_eq!(
            (counters.malformed, counters.errors, counters.received),
            (4, 1, 1)
        );
    }
}

#[test]
fn speed_and_duplex_are_told() {
    for family in INTEL {
        for (status, speed, half_duplex) in [
            (2, 10, true),
            (1 << 6 | 3, 100, false),
            (1 << 6 | 2, 100, true),
            (2 << 6 | 3, 1000, false),
            (3 << 6 | 3, 1000, false),
        ] {
            let (card, memory) = card(family);
            card.borrow_mut().status = status;
            let nic = open(&card, memory).expect("a good card");
            let link = Link {
                up: true,
                speed,
                half_duplex,
            };
            assert_eq!(nic.link(), link);
            let distance = card.borrow().get(0x400) >> 12 & 0x3ff;
            assert_eq!(distance, if half_duplex { 0x200 } else { 0x40 });
        }
    }
}

#[test]
fn a_phy_that_sleeps_is_woken() {
    for family in INTEL {
        for (phy, up) in [(Some(0x1800), true), (Some(0x0400), true), (None, false)] {
            let (card, memory) = card(family);
            card.borrow_mut().phy = phy;
            card.borrow_mut().mood.link_down = phy.is_none();
            let nic = open(&card, memory).expect("a good card");
            assert_eq!(nic.link().up, up, "{family:?} {phy:x?}");
        }
    }
}

#[test]
fn the_address_is_read_from_the_cards_memory_where_it_did_not_load_it() {
    for family in INTEL {
        let (card, memory) = card(family);
        let words = [0x5452, 0x1200, 0x5634];
        for (eeprom, want) in [
            (words, Ok(MAC)),
            ([0; 3], Err(Fault::NoAddress)),
            ([0xffff; 3], Err(Fault::NoAddress)),
        ] {
            card.borrow_mut().eeprom = Some(eeprom);
            card.borrow_mut().registers.clear();
            let nic = open(&card, memory.clone());
            assert_eq!(nic.map(|nic| nic.mac().0), want, "{family:?}");
        }
    }
}

#[test]
fn a_card_that_does_not_come_up_is_refused() {
    for family in INTEL {
        let (card, memory) = card(family);
        card.borrow_mut().mood.endless_reset = true;
        assert_eq!(open(&card, memory.clone()).err(), Some(Fault::Reset));
        card.borrow_mut().mood.dead = true;
        assert_eq!(open(&card, memory.clone()).err(), Some(Fault::Gone));
        memory.0.borrow_mut().pop();
        assert_eq!(open(&card, memory).err(), Some(Fault::Memory));
    }
}

#[test]
fn a_card_that_someone_else_reset_is_set_up_again() {
    for family in INTEL {
        let (card, memory) = card(family);
        let nic = open(&card, memory).expect("a good card");
        card.borrow_mut().registers.insert(0x100, 0);
        let mut world = World {
            name: "reset",
            nic,
            model: card,
            now: Nanos::ZERO,
        };
        let broken = Event::Resetting(Fault::Broken);
        assert_eq!(world.pass(SECOND), [broken, Event::Restarted, UP]);
        world.assert_works();
    }
}
