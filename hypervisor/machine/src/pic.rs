//! The pair of 8259A interrupt controllers of a PC (Intel 8259A datasheet, order 231468) with the
//! edge/level control registers of PCI chipsets (Intel 82371FB §2.5.8, ports 0x4d0 and 0x4d1).
//!
//! Two points where PC chipsets differ from the bare chip, and we with them: the trigger mode of a
//! line is what ELCR says, and the LTIM bit of ICW1 has no effect; and the MCS-80 mode (ICW4 bit 0
//! clear) is not built: vectors are always those of the 8086 mode.
//!
//! An edge-triggered request must stay high until it is acknowledged; if it falls before, the
//! acknowledge cycle finds nothing and gives the spurious level 7 (datasheet, "Edge and level
//! triggered modes").

use arch::Vector;
use serde::{Deserialize, Serialize};

/// The master's input that the slave's output is wired to.
const CASCADE: u8 = 2;

/// Which initialization word is expected next at the odd port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum Step {
    Icw2,
    Icw3,
    Icw4,
    /// Initialized: the odd port is OCW1.
    Ready,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
struct Chip {
    irr: u8,
    imr: u8,
    isr: u8,
    /// Levels of the inputs.
    lines: u8,
    /// Inputs that are level triggered.
    elcr: u8,
    /// ELCR bits that can be set.
    elcr_mask: u8,
    step: Step,
    /// ICW1: no cascade, and no ICW3.
    single: bool,
    /// ICW1: an ICW4 follows.
    icw4_follows: bool,
    /// ICW2: vector of input 0.
    base: u8,
    /// ICW3: inputs with slaves (master), own number (slave).
    icw3: u8,
    auto_eoi: bool,
    rotate_on_auto_eoi: bool,
    special_fully_nested: bool,
    special_mask: bool,
    /// Input of lowest priority; the next one, modulo 8, is highest.
    lowest: u8,
    /// OCW3: the even port reads ISR rather than IRR.
    read_isr: bool,
    /// OCW3: the next read is a poll.
    poll: bool,
}

impl Chip {
    /// As a PC's firmware leaves it: initialized, everything masked.
    const fn new(base: u8, icw3: u8, imr: u8, elcr: u8, elcr_mask: u8) -> Self {
        Self {
            irr: 0,
            imr,
            isr: 0,
            lines: 0,
            elcr,
            elcr_mask,
            step: Step::Ready,
            single: false,
            icw4_follows: true,
            base,
            icw3,
            auto_eoi: false,
            rotate_on_auto_eoi: false,
            special_fully_nested: false,
            special_mask: false,
            lowest: 7,
            read_isr: false,
            poll: false,
        }
    }

    /// How far behind the highest priority the first of `inputs` stands; 8 if there is none.
    fn rank(&self, inputs: u8) -> u32 {
        inputs
            .rotate_right(u32::from(self.lowest) + 1)
            .trailing_zeros()
    }

    fn input_of_rank(&self, rank: u32) -> u8 {
        (self.lowest.wrapping_add(1).wrapping_add(rank as u8)) & 7
    }

    /// The input that may interrupt now.
    #[inline(always)]
    fn resolve(&self, cascades: u8) -> Option<u8> {
        let pending = self.irr & !self.imr;
        if pending == 0 || self.step != Step::Ready {
            return None;
        }
        self.highest(pending, cascades)
    }

    #[inline(never)]
    fn highest(&self, pending: u8, cascades: u8) -> Option<u8> {
        // In special mask mode a masked input in service holds nothing back.
        let serving = if self.special_mask {
            self.isr & !self.imr
        } else {
            self.isr
        };
        let (rank, serving) = (self.rank(pending), self.rank(serving));
        let input = self.input_of_rank(rank);
        // Special fully nested: a slave in service may interrupt again, for a higher input of its.
        let again = self.special_fully_nested && rank == serving && cascades & (1 << input) != 0;
        (rank < serving || again).then_some(input)
    }

    fn set_line(&mut self, input: u8, level: bool) {
        let bit = 1 << (input & 7);
        if level {
            if self.lines & bit == 0 || self.elcr & bit != 0 {
                self.irr |= bit;
            }
            self.lines |= bit;
        } else {
            self.lines &= !bit;
            self.irr &= !bit;
        }
    }

    fn acknowledge(&mut self, cascades: u8) -> Option<u8> {
        let input = self.resolve(cascades)?;
        let bit = 1 << input;
        if self.elcr & bit == 0 {
            self.irr &= !bit;
        }
        if self.auto_eoi {
            if self.rotate_on_auto_eoi {
                self.lowest = input;
            }
        } else {
            self.isr |= bit;
        }
        Some(input)
    }

    fn ocw2(&mut self, value: u8) {
        let named = value & 7;
        match value >> 5 {
            0b000 => self.rotate_on_auto_eoi = false,
            0b100 => self.rotate_on_auto_eoi = true,
            // Non-specific end of interrupt: the highest in service. In special mask mode,
            // masked inputs are left in service.
            command @ (0b001 | 0b101) => {
                let serving = if self.special_mask {
                    self.isr & !self.imr
                } else {
                    self.isr
                };
                if serving != 0 {
                    let input = self.input_of_rank(self.rank(serving));
                    self.isr &= !(1 << input);
                    if command == 0b101 {
                        self.lowest = input;
                    }
                }
            }
            0b011 => self.isr &= !(1 << named),
            0b111 => {
                self.isr &= !(1 << named);
                self.lowest = named;
            }
            0b110 => self.lowest = named,
            _ => {}
        }
    }

    fn write(&mut self, odd: bool, value: u8) {
        if odd {
            match self.step {
                Step::Icw2 => {
                    self.base = value & 0xf8;
                    self.step = match (self.single, self.icw4_follows) {
                        (false, _) => Step::Icw3,
                        (true, true) => Step::Icw4,
                        (true, false) => Step::Ready,
                    };
                }
                Step::Icw3 => {
                    self.icw3 = value;
                    self.step = if self.icw4_follows {
                        Step::Icw4
                    } else {
                        Step::Ready
                    };
                }
                Step::Icw4 => {
                    self.auto_eoi = value & 0x02 != 0;
                    self.special_fully_nested = value & 0x10 != 0;
                    self.step = Step::Ready;
                }
                Step::Ready => self.imr = value,
            }
        } else if value & 0x10 != 0 {
            // ICW1 resets the edge sense, the masks, the priorities and all of ICW4's functions.
            *self = Self {
                irr: self.lines & self.elcr,
                lines: self.lines,
                step: Step::Icw2,
                single: value & 0x02 != 0,
                icw4_follows: value & 0x01 != 0,
                ..Self::new(self.base, 7, 0, self.elcr, self.elcr_mask)
            };
        } else if value & 0x08 != 0 {
            if value & 0x40 != 0 {
                self.special_mask = value & 0x20 != 0;
            }
            self.poll = value & 0x04 != 0;
            if value & 0x02 != 0 {
                self.read_isr = value & 0x01 != 0;
            }
        } else {
            self.ocw2(value);
        }
    }

    fn read(&mut self, odd: bool, cascades: u8) -> u8 {
        if self.poll {
            // The read is the acknowledge cycle.
            self.poll = false;
            return self.acknowledge(cascades).map_or(0, |input| 0x80 | input);
        }
        match (odd, self.read_isr) {
            (true, _) => self.imr,
            (false, true) => self.isr,
            (false, false) => self.irr,
        }
    }

    fn set_elcr(&mut self, value: u8) {
        self.elcr = value & self.elcr_mask;
        self.irr = (self.irr & !self.elcr) | (self.lines & self.elcr);
    }
}

/// Master and slave, cascaded at the master's input 2.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct PicPair {
    master: Chip,
    slave: Chip,
    /// The INTR output, kept up to date by every change.
    output: bool,
}

impl Default for PicPair {
    fn default() -> Self {
        Self::new()
    }
}

impl PicPair {
    /// The pair as a PC's firmware leaves it: vectors 0x08 and 0x70, everything masked but the
    /// cascade, and 9, 10, 11 (SCI and PCI) level triggered.
    #[must_use]
    pub const fn new() -> Self {
        Self {
            master: Chip::new(0x08, 1 << CASCADE, 0xfb, 0, 0xf8),
            slave: Chip::new(0x70, CASCADE, 0xff, 0x0e, 0xde),
            output: false,
        }
    }

    /// Back to [`PicPair::new`], with the inputs' levels kept.
    pub fn reset(&mut self) {
        let lines = (self.master.lines, self.slave.lines);
        *self = Self::new();
        (self.master.lines, self.slave.lines) = lines;
        self.slave.irr = self.slave.lines & self.slave.elcr;
        self.update();
    }

    /// Reads 0x20, 0x21, 0xa0, 0xa1, 0x4d0 or 0x4d1. A read of a chip in poll mode acknowledges.
    #[inline(always)]
    pub fn read(&mut self, port: u16) -> u8 {
        if !(self.master.poll | self.slave.poll) {
            match port {
                0x21 => return self.master.imr,
                0xa1 => return self.slave.imr,
                _ => {}
            }
        }
        self.read_other(port)
    }

    #[inline(never)]
    fn read_other(&mut self, port: u16) -> u8 {
        let cascades = self.cascades();
        let acknowledges = self.master.poll || self.slave.poll;
        let value = match port {
            0x20 | 0x21 => self.master.read(port & 1 != 0, cascades),
            0xa0 | 0xa1 => self.slave.read(port & 1 != 0, 0),
            0x4d0 => self.master.elcr,
            0x4d1 => self.slave.elcr,
            _ => 0xff,
        };
        if acknowledges {
            self.update();
        }
        value
    }

    /// Writes 0x20, 0x21, 0xa0, 0xa1, 0x4d0 or 0x4d1.
    #[inline(always)]
    pub fn write(&mut self, port: u16, value: u8) {
        // The master's mask changes nothing at the slave.
        if port == 0x21 && self.master.step == Step::Ready {
            self.master.imr = value;
            self.output = self.master.resolve(self.cascades()).is_some();
        } else {
            self.write_other(port, value);
        }
    }

    #[inline(never)]
    fn write_other(&mut self, port: u16, value: u8) {
        match port {
            0x20 | 0x21 => self.master.write(port & 1 != 0, value),
            0xa0 | 0xa1 => self.slave.write(port & 1 != 0, value),
            0x4d0 => self.master.set_elcr(value),
            0x4d1 => self.slave.set_elcr(value),
            _ => {}
        }
        self.update();
    }

    /// Drives ISA interrupt `irq`, 0 to 15. 2 is the cascade and cannot be driven.
    pub fn set_irq(&mut self, irq: u8, level: bool) {
        match irq {
            CASCADE => return,
            0..8 => self.master.set_line(irq, level),
            8..16 => self.slave.set_line(irq - 8, level),
            _ => return,
        }
        self.update();
    }

    /// The INTR output: an acknowledge cycle is asked for.
    #[must_use]
    pub const fn interrupt(&self) -> bool {
        self.output
    }

    /// The acknowledge cycle (INTA): the vector, spurious if the request went away.
    pub fn acknowledge(&mut self) -> Vector {
        let cascades = self.cascades();
        let vector = match self.master.acknowledge(cascades) {
            Some(input) if cascades & (1 << input) != 0 => {
                // The slave that is named answers; a name nobody has leaves the bus floating.
                let vector = if self.slave.icw3 & 7 == input && input == CASCADE {
                    self.slave.base | self.slave.acknowledge(0).unwrap_or(7)
                } else {
                    0xff
                };
                // Its INT falls with INTA, also if it rises again at once.
                self.master.set_line(CASCADE, false);
                vector
            }
            Some(input) => self.master.base | input,
            None => self.master.base | 7,
        };
        self.update();
        Vector(vector)
    }

    /// The master's inputs that it knows as slaves.
    const fn cascades(&self) -> u8 {
        if self.master.single {
            0
        } else {
            self.master.icw3
        }
    }

    fn update(&mut self) {
        let slave = self.slave.resolve(0).is_some();
        self.master.set_line(CASCADE, slave);
        self.output = self.master.resolve(self.cascades()).is_some();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A pair initialized as Linux and most kernels do, everything unmasked.
    fn pair() -> PicPair {
        let mut pic = PicPair::new();
        init(&mut pic, 0x01, 0x01);
        pic
    }

    fn init(pic: &mut PicPair, master4: u8, slave4: u8) {
        for (port, value) in [
            (0x20, 0x11),
            (0x21, 0x20),
            (0x21, 0x04),
            (0x21, master4),
            (0xa0, 0x11),
            (0xa1, 0x28),
            (0xa1, 0x02),
            (0xa1, slave4),
            (0x4d1, 0),
        ] {
            pic.write(port, value);
        }
    }

    fn isr(pic: &mut PicPair, port: u16) -> u8 {
        pic.write(port, 0x0b);
        let value = pic.read(port);
        pic.write(port, 0x0a);
        value
    }

    #[test]
    fn each_line_gives_its_vector_and_is_in_service_until_eoi() {
        for irq in (0..16).filter(|&irq| irq != 2) {
            let mut pic = pair();
            pic.set_irq(irq, true);
            assert!(pic.interrupt());
            assert_eq!(pic.acknowledge(), Vector(0x20 + irq));
            assert!(!pic.interrupt(), "{irq} is in service");
            if irq < 8 {
                assert_eq!(isr(&mut pic, 0x20), 1 << irq);
            } else {
                assert_eq!(isr(&mut pic, 0x20), 4);
                assert_eq!(isr(&mut pic, 0xa0), 1 << (irq - 8));
                pic.write(0xa0, 0x20);
            }
            pic.write(0x20, 0x20);
            assert_eq!(isr(&mut pic, 0x20) | isr(&mut pic, 0xa0), 0);
            assert!(!pic.interrupt(), "an edge counts once");
        }
    }

    #[test]
    fn priorities_nest() {
        let mut pic = pair();
        pic.set_irq(4, true);
        assert_eq!(pic.acknowledge(), Vector(0x24));
        pic.set_irq(5, true);
        assert!(!pic.interrupt(), "lower waits");
        pic.set_irq(1, true);
        assert_eq!(pic.acknowledge(), Vector(0x21), "higher nests");
        pic.write(0x20, 0x20);
        assert_eq!(isr(&mut pic, 0x20), 1 << 4, "EOI takes the highest");
        pic.write(0x20, 0x60 | 4);
        assert_eq!(pic.acknowledge(), Vector(0x25));
    }

    #[test]
    fn a_request_that_goes_away_is_spurious() {
        let mut pic = pair();
        pic.set_irq(3, true);
        pic.set_irq(3, false);
        assert!(!pic.interrupt());
        assert_eq!(pic.acknowledge(), Vector(0x27));
        assert_eq!(isr(&mut pic, 0x20), 0, "no EOI is due");

        pic.write(0x21, 0);
        pic.set_irq(9, true);
        // The slave's request is withdrawn by its mask only after the master has latched it in
        // level mode, so that the slave answers with its own level 7.
        let mut held = pic.clone();
        held.slave.irr = 0;
        assert_eq!(held.acknowledge(), Vector(0x2f));
        assert_eq!(isr(&mut held, 0x20), 4, "the master needs an EOI");
        assert_eq!(isr(&mut held, 0xa0), 0, "the slave does not");
    }

    #[test]
    fn level_lines_ask_again_until_they_fall() {
        let mut pic = pair();
        pic.write(0x4d1, 0xff);
        assert_eq!(pic.read(0x4d1), 0xde, "8 and 13 are always edges");
        pic.write(0x4d0, 0xff);
        assert_eq!(pic.read(0x4d0), 0xf8, "0, 1, 2 are always edges");
        pic.set_irq(9, true);
        for _ in 0..2 {
            assert_eq!(pic.acknowledge(), Vector(0x29));
            assert!(!pic.interrupt());
            pic.write(0xa0, 0x61);
            pic.write(0x20, 0x62);
            assert!(pic.interrupt());
        }
        pic.set_irq(9, false);
        assert!(!pic.interrupt());
    }

    #[test]
    fn masks_hold_back_and_requests_are_kept() {
        let mut pic = pair();
        pic.write(0x21, 0x10);
        pic.set_irq(4, true);
        assert!(!pic.interrupt());
        assert_eq!(pic.read(0x20), 0x10, "IRR");
        assert_eq!(pic.read(0x21), 0x10, "IMR");
        pic.write(0x21, 0);
        assert_eq!(pic.acknowledge(), Vector(0x24));
        assert_eq!(pic.read(0x20), 0, "IRR is cleared by the acknowledge");
    }

    #[test]
    fn rotations() {
        let order = |pic: &mut PicPair| {
            let mut order = Vec::new();
            for irq in [0, 1, 3, 4, 5, 6, 7] {
                pic.set_irq(irq, false);
                pic.set_irq(irq, true);
            }
            while pic.interrupt() {
                let input = pic.acknowledge().0 & 7;
                pic.write(0x20, 0x60 | input);
                order.push(input);
            }
            order
        };
        let mut pic = pair();
        assert_eq!(order(&mut pic), [0, 1, 3, 4, 5, 6, 7]);
        pic.write(0x20, 0xc0 | 4);
        assert_eq!(order(&mut pic), [5, 6, 7, 0, 1, 3, 4], "set priority");

        let mut pic = pair();
        pic.set_irq(3, true);
        pic.acknowledge();
        pic.write(0x20, 0xa0);
        assert_eq!(order(&mut pic), [4, 5, 6, 7, 0, 1, 3], "rotate on EOI");

        let mut pic = pair();
        pic.set_irq(3, true);
        pic.acknowledge();
        pic.write(0x20, 0xe0 | 6);
        assert_eq!(isr(&mut pic, 0x20), 8, "not the one named");
        pic.write(0x20, 0x63);
        assert_eq!(
            order(&mut pic),
            [7, 0, 1, 3, 4, 5, 6],
            "rotate on specific EOI"
        );

        let mut pic = pair();
        init(&mut pic, 0x03, 0x01);
        pic.write(0x20, 0x80);
        pic.set_irq(5, true);
        pic.acknowledge();
        assert_eq!(isr(&mut pic, 0x20), 0, "automatic EOI");
        assert_eq!(order(&mut pic)[0], 6, "rotates with it");
        pic.write(0x20, 0x00);
        let before = pic.master.lowest;
        pic.set_irq(0, false);
        pic.set_irq(0, true);
        pic.acknowledge();
        assert_eq!(pic.master.lowest, before, "rotation off");
    }

    #[test]
    fn special_mask_lets_lower_inputs_through() {
        let mut pic = pair();
        pic.set_irq(3, true);
        pic.acknowledge();
        pic.set_irq(6, true);
        assert!(!pic.interrupt());
        pic.write(0x21, 1 << 3);
        assert!(!pic.interrupt(), "a mask alone does not end the service");
        pic.write(0x20, 0x68);
        assert_eq!(pic.acknowledge(), Vector(0x26));
        pic.write(0x20, 0x20);
        pic.write(0x20, 0x20);
        assert_eq!(isr(&mut pic, 0x20), 8, "masked inputs stay in service");
        pic.write(0x20, 0x48);
        pic.write(0x20, 0x20);
        assert_eq!(isr(&mut pic, 0x20), 0);
    }

    #[test]
    fn special_fully_nested_lets_a_slave_nest() {
        for (icw4, nests) in [(0x01, false), (0x11, true)] {
            let mut pic = pair();
            init(&mut pic, icw4, 0x01);
            pic.set_irq(12, true);
            assert_eq!(pic.acknowledge(), Vector(0x2c));
            pic.set_irq(5, true);
            assert!(!pic.interrupt(), "a lower input of the master waits");
            pic.set_irq(9, true);
            assert_eq!(pic.interrupt(), nests);
            if nests {
                assert_eq!(pic.acknowledge(), Vector(0x29));
                assert_eq!(isr(&mut pic, 0xa0), 0x12);
            }
        }
    }

    #[test]
    fn a_slave_with_automatic_eoi_asks_again_at_once() {
        let mut pic = pair();
        init(&mut pic, 0x03, 0x03);
        pic.set_irq(8, true);
        pic.set_irq(14, true);
        assert_eq!(pic.acknowledge(), Vector(0x28));
        assert!(pic.interrupt());
        assert_eq!(pic.acknowledge(), Vector(0x2e));
        assert!(!pic.interrupt());
    }

    #[test]
    fn poll_acknowledges_by_a_read() {
        let mut pic = pair();
        pic.write(0x20, 0x0c);
        assert_eq!(pic.read(0x20), 0, "nothing pending");
        pic.set_irq(6, true);
        pic.write(0x20, 0x0c);
        assert_eq!(pic.read(0x20), 0x86);
        assert_eq!(isr(&mut pic, 0x20), 0x40);
        assert!(!pic.interrupt());
        assert_eq!(pic.read(0x20), 0, "one read only");
        pic.set_irq(10, true);
        pic.write(0x20, 0x0c);
        assert_eq!(pic.read(0x20), 0x82);
        pic.write(0xa0, 0x0c);
        assert_eq!(pic.read(0xa0), 0x82);
    }

    #[test]
    fn initialization_forms() {
        let mut pic = pair();
        pic.set_irq(1, true);
        pic.write(0x21, 0x55);
        pic.write(0x20, 0x12); // single, no ICW4
        assert!(!pic.interrupt(), "not while it is initialized");
        pic.write(0x21, 0x47);
        assert_eq!(
            pic.read(0x21),
            0,
            "the next write is a mask again, and masks are clear"
        );
        assert!(!pic.interrupt(), "the edge was forgotten");
        pic.set_irq(1, false);
        pic.set_irq(1, true);
        assert_eq!(pic.acknowledge(), Vector(0x41));
        pic.write(0x20, 0x20);
        pic.set_irq(8, true);
        assert_eq!(
            pic.acknowledge(),
            Vector(0x42),
            "without cascade 2 is an input like others"
        );

        let mut pic = pair();
        pic.write(0xa0, 0x11);
        pic.write(0xa1, 0x28);
        pic.write(0xa1, 0x05); // a wrong name
        pic.write(0xa1, 0x01);
        pic.set_irq(8, true);
        assert_eq!(pic.acknowledge(), Vector(0xff), "nobody answers");
    }

    #[test]
    fn firmware_state_is_quiet() {
        let mut pic = PicPair::default();
        for irq in 0..16 {
            pic.set_irq(irq, true);
        }
        assert!(!pic.interrupt());
        assert_eq!((pic.read(0x21), pic.read(0xa1)), (0xfb, 0xff));
        pic.reset();
        assert_eq!(pic.read(0xa0), 0x0e, "level lines that are up are requests");
    }
}
