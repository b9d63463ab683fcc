//! Intel's gigabit cards: e1000 (PCI/PCI-X family software developer's manual, 317453), e1000e
//! (82574 datasheet, 317694) and igb (82576 datasheet, 320961; I210, 333016).
//!
//! One set of registers runs through all of them. What differs is the place of the queues'
//! registers, the descriptors (legacy on the first two, advanced on igb, both of 16 bytes), and
//! that PCI Express cards must be told to end their own accesses before a reset.
//!
//! A ring is empty for the card where head and tail are equal, so one descriptor is never used.

use crate::driver::{Driver, Hardware, Taken};
use crate::{
    BUFFER, DmaMemory, Fault, Link, Nic, RING, RX_BUFFERS, RX_RING, Registers, TX_BUFFERS, TX_RING,
};
use vswitch::MacAddr;

/// Which of the three.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// 8254x.
    E1000,
    /// 82574, 82583.
    E1000e,
    /// 82576, 82580, I350, I210, I211.
    Igb,
}

const CTRL: u32 = 0x0000;
const STATUS: u32 = 0x0008;
const EERD: u32 = 0x0014;
const CTRL_EXT: u32 = 0x0018;
const MDIC: u32 = 0x0020;
const FCAL: u32 = 0x0028;
const FCAH: u32 = 0x002c;
const FCT: u32 = 0x0030;
const ICR: u32 = 0x00c0;
const IMS: u32 = 0x00d0;
const IMC: u32 = 0x00d8;
const RCTL: u32 = 0x0100;
const FCTTV: u32 = 0x0170;
const TCTL: u32 = 0x0400;
const TIPG: u32 = 0x0410;
const MPC: u32 = 0x4010;
const RXCSUM: u32 = 0x5000;
const RFCTL: u32 = 0x5008;
const MTA: u32 = 0x5200;
const RAL: u32 = 0x5400;
const RAH: u32 = 0x5404;

/// The first receive queue's registers; on igb these places are its own, which the older ones
/// stand for as well.
const RX_QUEUE: [u32; 2] = [0x2800, 0xc000];
const TX_QUEUE: [u32; 2] = [0x3800, 0xe000];
/// Offsets in them.
const BASE_LOW: u32 = 0x00;
const BASE_HIGH: u32 = 0x04;
const LENGTH: u32 = 0x08;
const SRRCTL: u32 = 0x0c;
const HEAD: u32 = 0x10;
const TAIL: u32 = 0x18;
const DELAY: u32 = 0x20;
const DCTL: u32 = 0x28;
const ABSOLUTE_DELAY: u32 = 0x2c;

const CTRL_MASTER_DISABLE: u32 = 1 << 2;
const CTRL_LINK_RESET: u32 = 1 << 3;
const CTRL_AUTO_SPEED: u32 = 1 << 5;
const CTRL_SET_LINK_UP: u32 = 1 << 6;
const CTRL_INVERT_LOSS: u32 = 1 << 7;
const CTRL_FORCE_SPEED: u32 = 1 << 11;
const CTRL_FORCE_DUPLEX: u32 = 1 << 12;
const CTRL_RESET: u32 = 1 << 26;
const CTRL_FLOW: u32 = 3 << 27;
const CTRL_VLAN: u32 = 1 << 30;
const CTRL_PHY_RESET: u32 = 1 << 31;
const CTRL_EXT_DRIVER: u32 = 1 << 28;

const STATUS_FULL_DUPLEX: u32 = 1 << 0;
const STATUS_LINK: u32 = 1 << 1;
const STATUS_MASTER: u32 = 1 << 19;

const RCTL_ENABLE: u32 = 1 << 1;
/// Receive: on, all unicast, all multicast, broadcast, buffers of 2048 bytes, without checksum.
const RCTL_VALUE: u32 = RCTL_ENABLE | 1 << 3 | 1 << 4 | 1 << 15 | 1 << 26;
/// Transmit: on, padded, given up after 15 collisions.
const TCTL_VALUE: u32 = 1 << 1 | 1 << 3 | 0x0f << 4;
/// How far a late collision may be, in byte times.
const COLLISION_FULL: u32 = 0x40 << 12;
const COLLISION_HALF: u32 = 0x200 << 12;
const QUEUE_ENABLE: u32 = 1 << 25;

/// The PHY: its address, what to do, and how that went.
const MDIC_PHY: u32 = 1 << 21;
const MDIC_WRITE: u32 = 1 << 26;
const MDIC_READ: u32 = 2 << 26;
const MDIC_READY: u32 = 1 << 28;
const MDIC_ERROR: u32 = 1 << 30;
/// The PHY's control register (IEEE 802.3 §22.2.4.1), number 0.
const PHY_RESTART: u32 = 1 << 9;
const PHY_ISOLATE: u32 = 1 << 10;
const PHY_SLEEP: u32 = 1 << 11;
const PHY_NEGOTIATE: u32 = 1 << 12;

/// Causes of interrupts: link, few buffers left, none left, frame received.
const CAUSES: u32 = 1 << 2 | 1 << 4 | 1 << 6 | 1 << 7;

/// What a register reads once its card is gone. None of those looked at can be this.
const GONE: u32 = u32::MAX;

/// Reads of a register until it must have changed: an access takes some hundred nanoseconds.
const PATIENCE: u32 = 1000;

struct Intel<R, M> {
    registers: R,
    memory: M,
    family: Family,
    mac: MacAddr,
    running: bool,
    half_duplex: bool,
    /// The next receive descriptor to come back.
    rx_next: u16,
    /// It is inside a frame that has several descriptors.
    rx_within: bool,
    /// The next transmit descriptor to fill, the next one that the card must be told of, the next
    /// to come back.
    tx_next: u16,
    tx_told: u16,
    tx_clean: u16,
}

/// Resets a card and sets it up. `wait` waits so many microseconds; when it is
/// called the card has begun its reset, and must be able to reach memory afterwards.
///
/// # Errors
/// The card does not work; it then makes no accesses to memory, if it heeds its reset.
pub fn open<R: Registers, M: DmaMemory>(
    registers: R,
    memory: M,
    family: Family,
    wait: &mut dyn FnMut(u64),
) -> Result<impl Nic + use<R, M>, Fault> {
    let card = Intel {
        registers,
        memory,
        family,
        mac: MacAddr([0; 6]),
        running: false,
        half_duplex: false,
        rx_next: 0,
        rx_within: false,
        tx_next: 0,
        tx_told: 0,
        tx_clean: 0,
    };
    Driver::open(card, wait)
}

const fn after(index: u16) -> u16 {
    (index + 1) % RING
}

const fn descriptor(ring: usize, index: u16) -> usize {
    ring + 16 * index as usize
}

const fn buffer(buffers: usize, index: u16) -> usize {
    buffers + BUFFER * index as usize
}

impl<R: Registers, M: DmaMemory> Intel<R, M> {
    fn rx(&self) -> u32 {
        RX_QUEUE[usize::from(self.family == Family::Igb)]
    }

    fn tx(&self) -> u32 {
        TX_QUEUE[usize::from(self.family == Family::Igb)]
    }

    fn device(&self, offset: usize) -> u64 {
        self.memory.address() + offset as u64
    }

    /// Whether the bits become as wanted soon.
    fn becomes(&mut self, register: u32, mask: u32, wanted: u32) -> bool {
        (0..PATIENCE).any(|_| self.registers.read32(register) & mask == wanted)
    }

    /// Makes a receive descriptor the card's: its address, and no status. The advanced one's
    /// second half is an address too, of a header buffer that is not used.
    fn give(&mut self, index: u16) {
        let at = descriptor(RX_RING, index);
        let addr = self.device(buffer(RX_BUFFERS, index));
        self.memory.write64(at + 8, 0);
        self.memory.write64(at, addr);
    }

    fn set_queue(&mut self, queue: u32, ring: usize) {
        let base = self.device(ring);
        self.registers.write32(queue + BASE_LOW, base as u32);
        self.registers
            .write32(queue + BASE_HIGH, (base >> 32) as u32);
        self.registers.write32(queue + LENGTH, u32::from(RING) * 16);
        self.registers.write32(queue + HEAD, 0);
        self.registers.write32(queue + TAIL, 0);
    }

    /// The address that the card took from its memory, else what stands there.
    fn address(&mut self) -> Result<MacAddr, Fault> {
        let (low, high) = (self.registers.read32(RAL), self.registers.read32(RAH));
        let [a, b, c, d] = low.to_le_bytes();
        let [e, f, ..] = high.to_le_bytes();
        let mac = MacAddr([a, b, c, d, e, f]);
        if high & 1 << 31 != 0 && mac.is_station() {
            return Ok(mac);
        }
        let mut bytes = [0; 6];
        for (word, pair) in (0..).zip(bytes.chunks_exact_mut(2)) {
            pair.copy_from_slice(&self.eeprom(word).ok_or(Fault::NoAddress)?.to_le_bytes());
        }
        let mac = MacAddr(bytes);
        mac.is_station().then_some(mac).ok_or(Fault::NoAddress)
    }

    /// A word of the card's own memory. Where address and done bit stand changed after 8254x.
    fn eeprom(&mut self, word: u32) -> Option<u16> {
        let (shift, done) = match self.family {
            Family::E1000 => (8, 1 << 4),
            Family::E1000e | Family::Igb => (2, 1 << 1),
        };
        self.registers.write32(EERD, word << shift | 1);
        (0..PATIENCE).find_map(|_| {
            let value = self.registers.read32(EERD);
            (value & done != 0 && value != GONE).then_some((value >> 16) as u16)
        })
    }

    /// An access to the PHY's control register; `None` where there is no PHY, as on fibre.
    fn phy(&mut self, access: u32) -> Option<u32> {
        self.registers.write32(MDIC, MDIC_PHY | access);
        (0..PATIENCE)
            .find_map(|_| {
                let value = self.registers.read32(MDIC);
                (value & MDIC_READY != 0).then_some(value)
            })
            .filter(|value| value & MDIC_ERROR == 0)
            .map(|value| value & 0xffff)
    }

    /// Wakes the PHY, which firmware may have put to sleep, and has it look for a link.
    fn wake_phy(&mut self) {
        if let Some(control) = self.phy(MDIC_READ) {
            let control = control & !(PHY_ISOLATE | PHY_SLEEP) | PHY_NEGOTIATE | PHY_RESTART;
            self.phy(MDIC_WRITE | control);
        }
    }

    fn set_transmit(&mut self) {
        let distance = match self.half_duplex {
            true => COLLISION_HALF,
            false => COLLISION_FULL,
        };
        self.registers.write32(TCTL, TCTL_VALUE | distance);
    }
}

impl<R: Registers, M: DmaMemory> Hardware for Intel<R, M> {
    type Memory = M;

    fn memory(&mut self) -> &mut M {
        &mut self.memory
    }

    fn begin_reset(&mut self) {
        self.running = false;
        self.registers.write32(IMC, u32::MAX);
        self.registers.write32(RCTL, 0);
        self.registers.write32(TCTL, 0);
        let mut control = self.registers.read32(CTRL);
        if control == GONE {
            return;
        }
        if self.family != Family::E1000 {
            // A reset in the middle of an access may hang the bus (82574 datasheet §5.2.5.3). One
            // that does not end is not waited for.
            control |= CTRL_MASTER_DISABLE;
            self.registers.write32(CTRL, control);
            self.becomes(STATUS, STATUS_MASTER, 0);
        }
        self.registers.write32(CTRL, control | CTRL_RESET);
    }

    fn reset_ended(&mut self) -> bool {
        self.registers.read32(CTRL) & CTRL_RESET == 0
    }

    fn set_up(&mut self) -> Result<(), Fault> {
        // Some cards let interrupts through again after a reset, emulated ones forget to reset.
        self.registers.write32(IMC, u32::MAX);
        self.registers.read32(ICR);
        if self.mac == MacAddr([0; 6]) {
            self.mac = self.address()?;
        }
        let control = self.registers.read32(CTRL)
            & !(CTRL_MASTER_DISABLE
                | CTRL_LINK_RESET
                | CTRL_INVERT_LOSS
                | CTRL_FORCE_SPEED
                | CTRL_FORCE_DUPLEX
                | CTRL_FLOW
                | CTRL_VLAN
                | CTRL_PHY_RESET);
        let speed = match self.family {
            Family::E1000 => CTRL_AUTO_SPEED,
            Family::E1000e | Family::Igb => 0,
        };
        self.registers
            .write32(CTRL, control | CTRL_SET_LINK_UP | speed);
        if self.family != Family::E1000 {
            // Tells the card's firmware that it is driven.
            let extended = self.registers.read32(CTRL_EXT);
            self.registers.write32(CTRL_EXT, extended | CTRL_EXT_DRIVER);
        }
        for register in [FCAL, FCAH, FCT, FCTTV, RXCSUM] {
            self.registers.write32(register, 0);
        }
        for index in 0..128 {
            self.registers.write32(MTA + 4 * index, 0);
        }

        for index in 0..RING {
            self.give(index);
            self.memory.write64(descriptor(TX_RING, index), 0);
            self.memory.write64(descriptor(TX_RING, index) + 8, 0);
        }
        (self.rx_next, self.rx_within) = (0, false);
        (self.tx_next, self.tx_told, self.tx_clean) = (0, 0, 0);
        let (rx, tx) = (self.rx(), self.tx());
        self.set_queue(rx, RX_RING);
        self.set_queue(tx, TX_RING);
        match self.family {
            Family::Igb => {
                // Advanced descriptors with one buffer of 2 KiB.
                self.registers.write32(rx + SRRCTL, 1 << 25 | 2);
                for queue in [rx, tx] {
                    let value = self.registers.read32(queue + DCTL);
                    self.registers.write32(queue + DCTL, value | QUEUE_ENABLE);
                    if !self.becomes(queue + DCTL, QUEUE_ENABLE, QUEUE_ENABLE) {
                        return Err(Fault::Queue(u16::from(queue == tx)));
                    }
                }
            }
            family => {
                // An interrupt, if they are on, for each frame at once.
                self.registers.write32(rx + DELAY, 0);
                // Gaps between frames for copper (8254x manual §13.4.34).
                self.registers.write32(TIPG, 6 << 20 | 8 << 10 | 8);
                if family == Family::E1000e {
                    self.registers.write32(rx + ABSOLUTE_DELAY, 0);
                    // Legacy descriptors (§10.2.5.15); bit 22 must be set (§10.2.6.11), and
                    // thresholds count descriptors.
                    self.registers.write32(RFCTL, 0);
                    let value = self.registers.read32(tx + DCTL);
                    self.registers.write32(tx + DCTL, value | 1 << 22 | 1 << 24);
                }
            }
        }
        self.registers.read32(MPC);
        self.set_transmit();
        self.registers.write32(RCTL, RCTL_VALUE);
        // Buffers are handed over once the queue is on: igb takes none before.
        self.registers.write32(rx + TAIL, u32::from(RING) - 1);
        match self.registers.read32(STATUS) {
            GONE => Err(Fault::Gone),
            status => {
                if status & STATUS_LINK == 0 {
                    self.wake_phy();
                }
                self.running = true;
                Ok(())
            }
        }
    }

    fn mac(&self) -> MacAddr {
        self.mac
    }

    fn look(&mut self) -> Result<Link, Fault> {
        let status = self.registers.read32(STATUS);
        if status == GONE {
            return Err(Fault::Gone);
        }
        if self.running && self.registers.read32(RCTL) & RCTL_ENABLE == 0 {
            // Someone else reset it, or took it.
            return Err(Fault::Broken);
        }
        let up = status & STATUS_LINK != 0;
        let link = Link {
            up,
            speed: match status >> 6 & 3 {
                _ if !up => 0,
                0 => 10,
                1 => 100,
                _ => 1000,
            },
            half_duplex: up && status & STATUS_FULL_DUPLEX == 0,
        };
        if up && link.half_duplex != self.half_duplex {
            self.half_duplex = link.half_duplex;
            self.set_transmit();
        }
        Ok(link)
    }

    fn missed(&mut self) -> u32 {
        self.registers.read32(MPC)
    }

    fn slot(&mut self) -> Option<usize> {
        (after(self.tx_next) != self.tx_clean).then_some(buffer(TX_BUFFERS, self.tx_next))
    }

    fn post(&mut self, length: usize) {
        let at = descriptor(TX_RING, self.tx_next);
        let addr = self.device(buffer(TX_BUFFERS, self.tx_next));
        // The driver sends no more than `MAX_FRAME` bytes.
        let length = length as u64;
        // End of packet, insert the frame's checksum, report status.
        let word = match self.family {
            Family::E1000 | Family::E1000e => length | 0x0b << 24,
            // Also: an advanced data descriptor, and the length of the whole frame.
            Family::Igb => length | 3 << 20 | 0x2b << 24 | length << 46,
        };
        self.memory.write64(at, addr);
        self.memory.write64(at + 8, word);
        self.tx_next = after(self.tx_next);
    }

    fn tell(&mut self) {
        if self.tx_told != self.tx_next {
            self.tx_told = self.tx_next;
            let tail = self.tx() + TAIL;
            self.registers.write32(tail, self.tx_next.into());
        }
    }

    fn reclaim(&mut self) -> Result<usize, Fault> {
        let mut count = 0;
        // Descriptor done is bit 0 of the status, at the same place in both kinds.
        while self.tx_clean != self.tx_told
            && self.memory.read64(descriptor(TX_RING, self.tx_clean) + 8) & 1 << 32 != 0
        {
            self.tx_clean = after(self.tx_clean);
            count += 1;
        }
        Ok(count)
    }

    fn pending(&self) -> usize {
        usize::from(self.tx_next.wrapping_sub(self.tx_clean) % RING)
    }

    fn ready(&self) -> bool {
        let word = self.memory.read64(descriptor(RX_RING, self.rx_next) + 8);
        match self.family {
            Family::E1000 | Family::E1000e => word & 1 << 32 != 0,
            Family::Igb => word & 1 != 0,
        }
    }

    fn take(&mut self) -> Result<Option<Taken>, Fault> {
        let word = self.memory.read64(descriptor(RX_RING, self.rx_next) + 8);
        let (done, end, errors, length) = match self.family {
            // Length, checksum, status, errors (CRC, symbol, sequence, carrier, receive), VLAN.
            Family::E1000 | Family::E1000e => (
                word >> 32 & 1,
                word >> 33 & 1,
                word >> 40 & 0x97,
                word & 0xffff,
            ),
            // Status with errors on top (receive), length, VLAN.
            Family::Igb => (word & 1, word >> 1 & 1, word >> 31 & 1, word >> 32 & 0xffff),
        };
        if done == 0 {
            return Ok(None);
        }
        let begun_before = core::mem::replace(&mut self.rx_within, end == 0);
        Ok(Some(if begun_before || end == 0 {
            Taken::Malformed
        } else if errors != 0 {
            Taken::Damaged
        } else {
            Taken::Frame {
                offset: buffer(RX_BUFFERS, self.rx_next),
                length: length as usize,
            }
        }))
    }

    fn recycle(&mut self) {
        self.give(self.rx_next);
        self.rx_next = after(self.rx_next);
    }

    fn refill(&mut self) {
        // The tail is the descriptor behind the last that is the card's: the one that comes back
        // last stays ours, and so never looks as if it were new.
        let tail = self.rx() + TAIL;
        let last = self.rx_next.wrapping_sub(1) % RING;
        self.registers.write32(tail, last.into());
    }

    fn set_interrupts(&mut self, on: bool) {
        self.registers.write32(if on { IMS } else { IMC }, CAUSES);
    }

    fn acknowledge(&mut self) -> bool {
        let cause = self.registers.read32(ICR);
        cause != 0 && cause != GONE
    }
}
