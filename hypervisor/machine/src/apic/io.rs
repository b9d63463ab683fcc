//! The I/O APIC: 24 pins and their redirection table (Intel 82093AA datasheet, and version 20H
//! with an EOI register as of the ICH, Intel I/O Controller Hub datasheet §5.9).
//!
//! A pin's level here is "asserted" as the board's wiring means it; the polarity bit is kept for
//! the guest and changes nothing, because the board has no electrical levels to invert.

use super::{DeliveryMode, Message};
use arch::Vector;
use serde::{Deserialize, Serialize};

/// How many pins there are.
pub const PINS: usize = 24;

const VERSION: u32 = 0x20 | (PINS as u32 - 1) << 16;

const STATUS: u64 = 1 << 12;
const REMOTE_IRR: u64 = 1 << 14;
const LEVEL: u64 = 1 << 15;
const MASKED: u64 = 1 << 16;
/// What a guest can set: vector, modes, polarity, trigger, mask; destination.
const SETTABLE: u64 = 0xff00_0000_0001_ffff & !(STATUS | REMOTE_IRR);

/// The I/O APIC. All of it is state.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct IoApic {
    select: u8,
    id: u8,
    entries: [u64; PINS],
    /// Which pins are asserted.
    asserted: u32,
}

impl Default for IoApic {
    fn default() -> Self {
        Self {
            select: 0,
            id: 0,
            entries: [MASKED; PINS],
            asserted: 0,
        }
    }
}

impl IoApic {
    /// RESET. The lines keep their levels.
    pub fn reset(&mut self) {
        *self = Self {
            asserted: self.asserted,
            ..Self::default()
        };
    }

    /// Reads in the MMIO window: the selector at 0, the selected register at 10H.
    #[must_use]
    pub fn read(&self, offset: u16) -> u32 {
        match offset & 0xff {
            0x00 => self.select.into(),
            0x10 => match self.select {
                // The arbitration id follows the id.
                0 | 2 => u32::from(self.id) << 24,
                1 => VERSION,
                _ => match self.entry_of(self.select) {
                    Some((pin, false)) => self.entries[pin] as u32,
                    Some((pin, true)) => (self.entries[pin] >> 32) as u32,
                    None => 0,
                },
            },
            _ => 0,
        }
    }

    /// Writes in the MMIO window: the selector at 0, the selected register at 10H, the EOI
    /// register at 40H. Gives a set of pins that may have something to send now.
    #[must_use]
    pub fn write(&mut self, offset: u16, value: u32) -> u32 {
        match offset & 0xff {
            0x00 => self.select = value as u8,
            0x10 => match self.select {
                0 => self.id = (value >> 24) as u8 & 0xf,
                select => {
                    if let Some((pin, high)) = self.entry_of(select) {
                        let old = self.entries[pin];
                        let value = u64::from(value);
                        let new = if high {
                            value << 32 | old & 0xffff_ffff
                        } else {
                            old & !0xffff_ffff | value
                        };
                        // Edge-triggered entries have no remote IRR: software clears a stuck
                        // one by switching to edge and back.
                        let kept = if new & LEVEL != 0 { REMOTE_IRR } else { 0 };
                        self.entries[pin] = new & SETTABLE | old & kept;
                        return 1 << pin;
                    }
                }
            },
            0x40 => return self.eoi(Vector(value as u8)),
            _ => {}
        }
        0
    }

    /// The pin whose redirection entry register `select` is half of, and whether the upper.
    fn entry_of(&self, select: u8) -> Option<(usize, bool)> {
        let pin = usize::from(select.checked_sub(0x10)? >> 1);
        (pin < PINS).then_some((pin, select & 1 != 0))
    }

    /// Sets a pin's level. Gives the message that a rising edge makes at once; a level-triggered
    /// pin is asked with [`IoApic::level_message`].
    #[inline]
    pub fn set_pin(&mut self, pin: usize, asserted: bool) -> Option<Message> {
        let entry = *self.entries.get(pin)?;
        let bit = 1 << pin;
        let rising = asserted && self.asserted & bit == 0;
        self.asserted = if asserted {
            self.asserted | bit
        } else {
            self.asserted & !bit
        };
        // An edge on a masked pin is lost (82093AA §3.2.4).
        if !rising || entry & MASKED != 0 {
            return None;
        }
        Self::message(entry).filter(|message| !message.level)
    }

    /// The message that a level-triggered pin wants to send: asserted, not masked, and none on
    /// its way. Once a local APIC took it, say so by [`IoApic::level_taken`].
    #[inline]
    #[must_use]
    pub fn level_message(&self, pin: usize) -> Option<Message> {
        let entry = *self.entries.get(pin)?;
        if self.asserted & 1 << pin == 0 || entry & (LEVEL | MASKED | REMOTE_IRR) != LEVEL {
            return None;
        }
        Self::message(entry).filter(|message| message.level)
    }

    /// A level-triggered interrupt of `pin` was taken: nothing more until its EOI.
    pub fn level_taken(&mut self, pin: usize) {
        if let Some(entry) = self.entries.get_mut(pin) {
            *entry |= REMOTE_IRR;
        }
    }

    /// An EOI with this vector arrives; gives the pins that it frees.
    pub fn eoi(&mut self, vector: Vector) -> u32 {
        let mut freed = 0;
        for (pin, entry) in self.entries.iter_mut().enumerate() {
            if *entry & (LEVEL | REMOTE_IRR) == LEVEL | REMOTE_IRR && *entry as u8 == vector.0 {
                *entry &= !REMOTE_IRR;
                freed |= 1 << pin;
            }
        }
        freed
    }

    /// Whether pin 0, which the 8259's output is wired to, passes ExtINT on; and to whom.
    #[must_use]
    pub fn extint(&self) -> Option<Message> {
        let entry = self.entries[0];
        let message = Self::decode(entry);
        (entry & MASKED == 0 && message.mode == DeliveryMode::ExtInt).then_some(message)
    }

    /// Modes other than fixed and lowest priority are edges whatever their trigger bit says.
    fn decode(entry: u64) -> Message {
        let mode = DeliveryMode::from_bits(entry as u32);
        Message {
            vector: Vector(entry as u8),
            mode,
            logical: entry & 1 << 11 != 0,
            dest: Message::narrow_dest((entry >> 56) as u8),
            level: entry & LEVEL != 0
                && matches!(mode, DeliveryMode::Fixed | DeliveryMode::LowestPriority),
        }
    }

    /// ExtINT is a line through to the 8259, not a message.
    fn message(entry: u64) -> Option<Message> {
        Some(Self::decode(entry)).filter(|message| message.mode != DeliveryMode::ExtInt)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn program(io: &mut IoApic, pin: u32, entry: u64) -> u32 {
        let _ = io.write(0, 0x11 + 2 * pin);
        let _ = io.write(0x10, (entry >> 32) as u32);
        let _ = io.write(0, 0x10 + 2 * pin);
        io.write(0x10, entry as u32)
    }

    fn register(io: &mut IoApic, select: u32) -> u32 {
        let _ = io.write(0, select);
        io.read(0x10)
    }

    #[test]
    fn reset_values_and_identity() {
        let mut io = IoApic::default();
        assert_eq!(register(&mut io, 1), 0x0017_0020);
        assert_eq!(register(&mut io, 0x10), 0x1_0000);
        assert_eq!(register(&mut io, 0x3f), 0);
        assert_eq!(register(&mut io, 0x40), 0);
        let _ = io.write(0, 0);
        let _ = io.write(0x10, 0xffff_ffff);
        assert_eq!(io.read(0x10), 0x0f00_0000);
        assert_eq!(register(&mut io, 2), 0x0f00_0000);
    }

    #[test]
    fn read_only_and_reserved_bits_stay_zero() {
        let mut io = IoApic::default();
        program(&mut io, 3, u64::MAX);
        assert_eq!(register(&mut io, 0x16), 0x1_afff);
        assert_eq!(register(&mut io, 0x17), 0xff00_0000);
    }

    #[test]
    fn an_edge_sends_once_and_is_lost_while_masked() {
        let mut io = IoApic::default();
        assert_eq!(io.set_pin(4, true), None);
        io.set_pin(4, false);
        program(&mut io, 4, 0x34);
        let message = io.set_pin(4, true).unwrap();
        assert_eq!((message.vector, message.level), (Vector(0x34), false));
        assert_eq!(io.set_pin(4, true), None);
        io.set_pin(4, false);
        assert!(io.set_pin(4, true).is_some());
        assert_eq!(io.set_pin(24, true), None);
    }

    #[test]
    fn a_level_sends_until_taken_and_again_after_its_eoi() {
        let mut io = IoApic::default();
        assert_eq!(program(&mut io, 9, LEVEL | 0x59), 1 << 9);
        assert_eq!(io.set_pin(9, true), None);
        assert!(io.level_message(9).is_some_and(|m| m.level));
        io.level_taken(9);
        assert_eq!(io.level_message(9), None);
        assert_eq!(register(&mut io, 0x22), 0x59 | 0x4000 | 0x8000);
        assert_eq!(io.eoi(Vector(0x58)), 0);
        assert_eq!(io.write(0x40, 0x59), 1 << 9);
        assert!(io.level_message(9).is_some());
        io.set_pin(9, false);
        assert_eq!(io.level_message(9), None);
    }

    #[test]
    fn switching_to_edge_clears_remote_irr() {
        let mut io = IoApic::default();
        program(&mut io, 9, LEVEL | 0x59);
        io.set_pin(9, true);
        io.level_taken(9);
        program(&mut io, 9, MASKED | 0x59);
        program(&mut io, 9, LEVEL | 0x59);
        assert!(io.level_message(9).is_some());
    }
}
