//! The 16550A serial port of a PC (National PC16550D datasheet).
//!
//! Bytes leave in no time: a written byte stands in the output buffer at once and THRE is back.
//! When that buffer is full (its owner did not drain it), THRE stays low, so that a guest that
//! polls waits and one that does not overruns its own byte, as on the wire. Input is taken from a
//! buffer into the receive FIFO as it empties; a receiver overrun can therefore only be seen in
//! loopback, or by [`Uart::receive`], which is the bare line.
//!
//! The interrupt output passes the gate that PCs put behind OUT2, which loopback closes.

use arch::Nanos;
use heapless::Deque;
use serde::{Deserialize, Serialize};

/// Bytes that can wait for the owner to print them.
pub const OUTPUT: usize = 1024;
/// Bytes that can wait for the guest to read them, besides the FIFO.
pub const INPUT: usize = 256;
const FIFO: usize = 16;
/// The 1.8432 MHz crystal divided by 16.
const BASE_BAUD: u64 = 115_200;

const IER_RECEIVED: u8 = 0x01;
const IER_TRANSMITTER: u8 = 0x02;
const IER_LINE: u8 = 0x04;
const IER_MODEM: u8 = 0x08;

const IIR_NONE: u8 = 0x01;
const IIR_MODEM: u8 = 0x00;
const IIR_TRANSMITTER: u8 = 0x02;
const IIR_RECEIVED: u8 = 0x04;
const IIR_LINE: u8 = 0x06;
const IIR_TIMEOUT: u8 = 0x0c;

const LCR_BREAK: u8 = 0x40;
const LCR_DLAB: u8 = 0x80;

const MCR_OUT2: u8 = 0x08;
const MCR_LOOP: u8 = 0x10;

const LSR_DATA: u8 = 0x01;
const LSR_OVERRUN: u8 = 0x02;
const LSR_PARITY: u8 = 0x04;
const LSR_FRAMING: u8 = 0x08;
const LSR_BREAK: u8 = 0x10;
const LSR_THRE: u8 = 0x20;
const LSR_TEMT: u8 = 0x40;
const LSR_FIFO_ERROR: u8 = 0x80;
const LSR_ERRORS: u8 = LSR_OVERRUN | LSR_PARITY | LSR_FRAMING | LSR_BREAK;

/// The far end: clear to send, data set ready, carrier.
const CONNECTED: u8 = 0xb0;

/// One serial port.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Uart {
    ier: u8,
    /// FCR bits 0 and 3; the trigger bits are in `trigger`.
    fifo_enabled: bool,
    /// Bytes in the FIFO that raise the interrupt: 1, 4, 8, 14.
    trigger: u8,
    lcr: u8,
    mcr: u8,
    /// Error bits seen and not read.
    errors: u8,
    /// Upper half: lines, as the last read saw them. Lower half: what changed since.
    msr: u8,
    scratch: u8,
    divisor: u16,
    /// Received bytes with the error bits they came with.
    received: Deque<(u8, u8), FIFO>,
    /// The transmitter-empty interrupt is pending.
    thre_pending: bool,
    /// When the character time-out strikes.
    timeout_at: Nanos,
    timeout: bool,
    /// The interrupt output fell in an access and may be up again.
    dipped: bool,
    output: Deque<u8, OUTPUT>,
    input: Deque<u8, INPUT>,
}

impl Default for Uart {
    fn default() -> Self {
        Self::new()
    }
}

impl Uart {
    /// The state after master reset (datasheet table I), with a terminal connected, 115 200 baud.
    #[must_use]
    pub const fn new() -> Self {
        Self {
            ier: 0,
            fifo_enabled: false,
            trigger: 1,
            lcr: 0,
            mcr: 0,
            errors: 0,
            msr: CONNECTED,
            scratch: 0,
            divisor: 1,
            received: Deque::new(),
            thre_pending: false,
            timeout_at: Nanos::NEVER,
            timeout: false,
            dipped: false,
            output: Deque::new(),
            input: Deque::new(),
        }
    }

    /// Master reset. What waits to be printed or read stays, but for the receiver's own.
    pub fn reset(&mut self) {
        let (output, input) = (self.output.clone(), self.input.clone());
        *self = Self::new();
        (self.output, self.input) = (output, input);
        // Without the FIFO there is no time-out to set.
        self.refill(Nanos::ZERO);
    }

    /// Reads register `offset`, 0 to 7.
    pub fn read(&mut self, offset: u16, now: Nanos) -> u8 {
        self.tick(now);
        let [divisor_low, divisor_high] = self.divisor.to_le_bytes();
        match (offset & 7, self.lcr & LCR_DLAB != 0) {
            (0, true) => divisor_low,
            (1, true) => divisor_high,
            (0, false) => {
                let byte = self.received.pop_front().map_or(0, |(byte, _)| byte);
                self.timeout = false;
                self.reveal_errors();
                self.refill(now);
                self.restart_timeout(now);
                byte
            }
            (1, false) => self.ier,
            (2, _) => {
                let cause = self.cause();
                if cause == IIR_TRANSMITTER {
                    self.thre_pending = false;
                }
                cause | if self.fifo_enabled { 0xc0 } else { 0 }
            }
            (3, _) => self.lcr,
            (4, _) => self.mcr,
            (5, _) => {
                let status = self.line_status();
                self.errors = 0;
                status
            }
            (6, _) => {
                let status = self.modem_lines() | self.msr & 0x0f;
                self.msr = status & 0xf0;
                status
            }
            _ => self.scratch,
        }
    }

    /// Writes register `offset`, 0 to 7.
    pub fn write(&mut self, offset: u16, value: u8, now: Nanos) {
        self.tick(now);
        let [divisor_low, divisor_high] = self.divisor.to_le_bytes();
        match (offset & 7, self.lcr & LCR_DLAB != 0) {
            (0, true) => self.divisor = u16::from_le_bytes([value, divisor_high]),
            (1, true) => self.divisor = u16::from_le_bytes([divisor_low, value]),
            (0, false) => self.transmit(value, now),
            (1, false) => {
                // Enabling it while the register is empty raises it.
                if value & !self.ier & IER_TRANSMITTER != 0 && self.transmitter_ready() {
                    self.thre_pending = true;
                }
                self.ier = value & 0x0f;
            }
            (2, _) => self.fifo_control(value, now),
            (3, _) => {
                let start_break = value & !self.lcr & LCR_BREAK != 0;
                self.lcr = value;
                if start_break && self.mcr & MCR_LOOP != 0 {
                    self.receive(0, LSR_BREAK | LSR_FRAMING, now);
                }
            }
            (4, _) => {
                self.mcr = value & 0x1f;
                self.modem_changed();
                self.refill(now);
            }
            // LSR and MSR are for reading; writes are for factory tests.
            (5 | 6, _) => {}
            _ => self.scratch = value,
        }
    }

    /// Works out the character time-out.
    pub fn tick(&mut self, now: Nanos) {
        if now >= self.timeout_at {
            self.timeout_at = Nanos::NEVER;
            self.timeout = !self.received.is_empty();
        }
    }

    /// When the character time-out strikes, if its interrupt is enabled.
    #[must_use]
    pub const fn next_event(&self) -> Nanos {
        if self.ier & IER_RECEIVED != 0 {
            self.timeout_at
        } else {
            Nanos::NEVER
        }
    }

    /// The interrupt output behind the OUT2 gate.
    #[must_use]
    pub fn irq(&self) -> bool {
        self.mcr & (MCR_OUT2 | MCR_LOOP) == MCR_OUT2 && self.cause() != IIR_NONE
    }

    /// Whether the output fell since this was last asked, even if it is up again: a written byte
    /// clears the transmitter's interrupt, and leaves at once.
    pub const fn take_dip(&mut self) -> bool {
        core::mem::replace(&mut self.dipped, false)
    }

    /// Bytes that wait to be printed.
    #[must_use]
    pub fn has_output(&self) -> bool {
        !self.output.is_empty()
    }

    /// Hands what was transmitted to `print`, in up to two pieces.
    pub fn take_output(&mut self, print: &mut impl FnMut(&[u8])) {
        let was_full = self.output.is_full();
        let (first, second) = self.output.as_slices();
        for piece in [first, second] {
            if !piece.is_empty() {
                print(piece);
            }
        }
        self.output.clear();
        self.thre_pending |= was_full;
    }

    /// Queues bytes from the far end; gives how many fit.
    pub fn push_input(&mut self, bytes: &[u8], now: Nanos) -> usize {
        self.tick(now);
        let taken = bytes
            .iter()
            .take_while(|&&byte| self.input.push_back(byte).is_ok())
            .count();
        self.refill(now);
        taken
    }

    /// A character on the line with its LSR error bits: overruns if there is no room.
    pub fn receive(&mut self, byte: u8, errors: u8, now: Nanos) {
        let room = if self.fifo_enabled { FIFO } else { 1 };
        if self.received.len() >= room {
            self.errors |= LSR_OVERRUN;
            if !self.fifo_enabled {
                // The holding register is overwritten; a full FIFO keeps what it has.
                self.received.clear();
                let _ = self.received.push_back((byte, errors));
            }
        } else {
            let _ = self.received.push_back((byte, errors));
        }
        self.reveal_errors();
        self.restart_timeout(now);
    }

    /// The errors of the character at the top are those that LSR shows.
    fn reveal_errors(&mut self) {
        if let Some((_, errors)) = self.received.front_mut() {
            self.errors |= core::mem::take(errors);
        }
    }

    fn refill(&mut self, now: Nanos) {
        let room = if self.fifo_enabled { FIFO } else { 1 };
        while self.mcr & MCR_LOOP == 0 && self.received.len() < room {
            let Some(byte) = self.input.pop_front() else {
                return;
            };
            self.receive(byte, 0, now);
        }
    }

    /// Four character times from the last character received or read.
    fn restart_timeout(&mut self, now: Nanos) {
        self.timeout_at = if self.fifo_enabled && !self.received.is_empty() {
            let data_bits = u64::from(5 + (self.lcr & 3));
            let bits = 2 + data_bits + u64::from(self.lcr >> 2 & 1) + u64::from(self.lcr >> 3 & 1);
            let divisor = u64::from(self.divisor.max(1));
            now + 4 * bits * divisor * 1_000_000_000 / BASE_BAUD
        } else {
            Nanos::NEVER
        };
    }

    fn transmitter_ready(&self) -> bool {
        !self.output.is_full()
    }

    fn transmit(&mut self, value: u8, now: Nanos) {
        self.dipped |= self.cause() == IIR_TRANSMITTER;
        self.thre_pending = false;
        let value = value & (0xff >> (3 - (self.lcr & 3)));
        if self.mcr & MCR_LOOP != 0 {
            self.receive(value, 0, now);
        } else {
            // A byte that a guest writes without room is lost, as it would be in the register.
            let _ = self.output.push_back(value);
        }
        self.thre_pending = self.transmitter_ready();
    }

    fn fifo_control(&mut self, value: u8, now: Nanos) {
        let enable = value & 1 != 0;
        let toggled = enable != self.fifo_enabled;
        self.fifo_enabled = enable;
        if toggled || enable && value & 2 != 0 {
            self.received.clear();
            self.timeout = false;
            self.timeout_at = Nanos::NEVER;
        }
        if enable && value & 4 != 0 {
            // What was written has left already; the register is empty (again).
            self.thre_pending |= self.transmitter_ready();
        }
        // The other bits count only together with bit 0.
        self.trigger = match (enable, value >> 6) {
            (false, _) | (_, 0) => 1,
            (_, 1) => 4,
            (_, 2) => 8,
            _ => 14,
        };
        self.refill(now);
    }

    fn line_status(&self) -> u8 {
        let mut status = self.errors;
        if !self.received.is_empty() {
            status |= LSR_DATA;
        }
        if self.transmitter_ready() {
            status |= LSR_THRE | LSR_TEMT;
        }
        let in_fifo = self.errors & LSR_ERRORS & !LSR_OVERRUN != 0
            || self.received.iter().any(|&(_, errors)| errors != 0);
        if self.fifo_enabled && in_fifo {
            status |= LSR_FIFO_ERROR;
        }
        status
    }

    /// The modem lines as MSR shows them: in loopback, MCR's outputs.
    const fn modem_lines(&self) -> u8 {
        if self.mcr & MCR_LOOP == 0 {
            return CONNECTED;
        }
        let mcr = self.mcr;
        (mcr & 0x02) << 3 | (mcr & 0x01) << 5 | (mcr & 0x0c) << 4
    }

    /// Notes what changed: any edge of CTS, DSR and DCD, the trailing edge of RI.
    const fn modem_changed(&mut self) {
        let lines = self.modem_lines();
        let changed = (lines ^ self.msr) >> 4;
        let trailing_ring = self.msr >> 4 & !(lines >> 4) & 0x04;
        self.msr = lines | self.msr & 0x0f | changed & 0x0b | trailing_ring;
    }

    /// IIR bits 3 to 0: the pending interrupt of highest priority.
    fn cause(&self) -> u8 {
        if self.ier & IER_LINE != 0 && self.errors & LSR_ERRORS != 0 {
            IIR_LINE
        } else if self.ier & IER_RECEIVED != 0 && self.received.len() >= usize::from(self.trigger) {
            IIR_RECEIVED
        } else if self.ier & IER_RECEIVED != 0 && self.timeout {
            IIR_TIMEOUT
        } else if self.ier & IER_TRANSMITTER != 0 && self.thre_pending {
            IIR_TRANSMITTER
        } else if self.ier & IER_MODEM != 0 && self.msr & 0x0f != 0 {
            IIR_MODEM
        } else {
            IIR_NONE
        }
    }
}

#[cfg(test)]
mod tests {
    use std::vec::Vec;

    use super::*;

    const T: Nanos = Nanos(1_000);

    fn with(writes: &[(u16, u8)]) -> Uart {
        let mut uart = Uart::new();
        for &(offset, value) in writes {
            uart.write(offset, value, T);
        }
        uart
    }

    fn printed(uart: &mut Uart) -> Vec<u8> {
        let mut all = Vec::new();
        uart.take_output(&mut |bytes| all.extend_from_slice(bytes));
        all
    }

    #[test]
    fn registers_after_reset() {
        let mut uart = Uart::new();
        for (offset, value) in [
            (0, 0),
            (1, 0),
            (2, 0x01),
            (3, 0),
            (4, 0),
            (5, 0x60),
            (6, 0xb0),
            (7, 0),
        ] {
            assert_eq!(uart.read(offset, T), value, "register {offset}");
        }
        for (offset, written, read) in [
            (1, 0xff, 0x0f),
            (3, 0x7f, 0x7f),
            (4, 0xef, 0x0f),
            (7, 0xa5, 0xa5),
        ] {
            uart.write(offset, written, T);
            assert_eq!(uart.read(offset, T), read);
        }
        uart.write(3, 0x83, T);
        uart.write(0, 0x0c, T);
        uart.write(1, 0x01, T);
        assert_eq!((uart.read(0, T), uart.read(1, T)), (0x0c, 0x01));
        uart.write(3, 0x03, T);
        assert_eq!(uart.read(1, T), 0x0f, "the divisor is out of the way");
    }

    #[test]
    fn output_is_taken_and_waits_when_full() {
        let mut uart = with(&[(3, 3)]);
        for byte in b"hello" {
            uart.write(0, *byte, T);
        }
        assert_eq!(printed(&mut uart), b"hello");
        for _ in 0..OUTPUT {
            assert_eq!(uart.read(5, T) & 0x60, 0x60);
            uart.write(0, b'x', T);
        }
        assert_eq!(uart.read(5, T) & 0x60, 0, "full");
        uart.write(0, b'y', T);
        assert_eq!(printed(&mut uart), [b'x'; OUTPUT]);
        assert_eq!(uart.read(5, T) & 0x60, 0x60);
    }

    #[test]
    fn transmitter_interrupt() {
        let mut uart = with(&[(3, 3), (4, 8), (1, 2)]);
        assert!(uart.irq(), "enabled while empty");
        assert_eq!(uart.read(2, T), 0x02);
        assert!(!uart.irq(), "reading IIR takes it");
        assert_eq!(uart.read(2, T), 0x01);
        uart.write(0, b'a', T);
        assert!(uart.irq());
        uart.take_dip();
        uart.write(0, b'b', T);
        assert!(uart.irq() && uart.take_dip(), "the line fell and rose");
        uart.write(1, 0, T);
        assert!(!uart.irq());
        uart.write(1, 2, T);
        assert!(uart.irq());
        uart.write(4, 0, T);
        assert!(!uart.irq(), "OUT2 gates it");
        assert_eq!(uart.read(2, T), 0x02);
    }

    #[test]
    fn received_without_fifo() {
        let mut uart = with(&[(3, 3), (4, 8), (1, 5)]);
        assert_eq!(uart.push_input(b"ab", T), 2);
        assert_eq!(uart.read(5, T), 0x61);
        assert_eq!(uart.read(2, T), 0x04);
        assert!(uart.irq());
        assert_eq!(uart.read(0, T), b'a');
        assert_eq!(uart.read(0, T), b'b');
        assert!(!uart.irq());
        assert_eq!(uart.read(5, T), 0x60);
        uart.receive(1, 0, T);
        uart.receive(2, 0, T);
        assert_eq!(uart.read(2, T), 0x06, "overrun is line status");
        assert_eq!(uart.read(5, T), 0x63);
        assert_eq!(uart.read(5, T), 0x61, "reading LSR clears it");
        assert_eq!(uart.read(0, T), 2, "the newer byte stands there");
    }

    #[test]
    fn fifo_triggers_and_times_out() {
        for (fcr, level) in [(0x01, 1), (0x41, 4), (0x81, 8), (0xc1, 14)] {
            let mut uart = with(&[(3, 3), (4, 8), (1, 1), (2, fcr)]);
            for n in 1..=FIFO {
                assert_eq!(uart.push_input(b"x", T), 1);
                assert_eq!(uart.irq(), n >= level, "{n} bytes, trigger {level}");
            }
            assert_eq!(uart.read(2, T), 0xc4);
        }

        let mut uart = with(&[(3, 3), (4, 8), (1, 1), (2, 0x81)]);
        uart.push_input(b"xy", T);
        let four_characters = 4 * 10 * 1_000_000_000 / 115_200;
        assert_eq!(uart.next_event(), T + four_characters);
        uart.tick(T + four_characters - 1);
        assert!(!uart.irq());
        uart.tick(T + four_characters);
        assert!(uart.irq());
        let later = T + four_characters;
        assert_eq!(uart.read(2, later), 0xcc);
        assert_eq!(uart.read(0, later), b'x');
        assert!(!uart.irq(), "a read takes it and starts the time again");
        assert_eq!(uart.next_event(), later + four_characters);
        assert_eq!(uart.read(0, later), b'y');
        assert_eq!(uart.next_event(), Nanos::NEVER);
    }

    #[test]
    fn fifo_overrun_keeps_the_fifo_and_input_waits() {
        let mut uart = with(&[(3, 3), (2, 1)]);
        let text: Vec<u8> = (0..=255).collect();
        assert_eq!(uart.push_input(&text, T), 256);
        assert_eq!(
            uart.push_input(&text, T),
            16,
            "as many as went into the FIFO"
        );
        for byte in text {
            assert_eq!(uart.read(0, T), byte);
        }
        uart.write(2, 3, T);
        for byte in 0..20 {
            uart.receive(byte, 0, T);
        }
        assert_eq!(uart.read(5, T) & 2, 2);
        assert_eq!(uart.read(0, T), 0);
    }

    #[test]
    fn errors_show_with_their_character() {
        let mut uart = with(&[(3, 3), (4, 8), (1, 4), (2, 1)]);
        uart.receive(b'a', 0, T);
        uart.receive(b'b', LSR_PARITY, T);
        assert_eq!(uart.read(5, T), 0xe1, "somewhere in the FIFO");
        assert!(!uart.irq());
        uart.read(0, T);
        assert!(uart.irq());
        assert_eq!(uart.read(5, T), 0xe5);
        assert_eq!(uart.read(5, T), 0x61);
        uart.write(2, 3, T);
        assert_eq!(uart.read(5, T), 0x60);
    }

    #[test]
    fn loopback() {
        let mut uart = with(&[(3, 3), (4, 0x1f), (1, 0x0f)]);
        uart.push_input(b"z", T);
        assert_eq!(uart.read(5, T), 0x60, "the line is cut off");
        assert_eq!(uart.read(6, T) & 0xf0, 0xf0);
        assert!(!uart.irq(), "OUT2 is off the pin");
        for (mcr, msr) in [(0x12, 0x10), (0x11, 0x20), (0x14, 0x40), (0x18, 0x80)] {
            uart.write(4, mcr, T);
            assert_eq!(uart.read(6, T) & 0xf0, msr);
        }
        // From DCD alone to nothing, then RI up and down.
        for (mcr, msr) in [
            (0x10, 0x08),
            (0x14, 0x40),
            (0x10, 0x04),
            (0x1b, 0xbb),
            (0x1b, 0xb0),
        ] {
            uart.write(4, mcr, T);
            assert_eq!(uart.read(6, T), msr, "MCR {mcr:#x}");
        }
        uart.write(0, b'q', T);
        assert_eq!(uart.read(2, T), 0x04);
        assert_eq!(uart.read(0, T), b'q');
        uart.write(3, 0x00, T);
        uart.write(0, 0xff, T);
        assert_eq!(uart.read(0, T), 0x1f, "five data bits");
        uart.write(3, 0x43, T);
        assert_eq!(uart.read(5, T) & 0x19, 0x19, "break");
        uart.read(0, T);
        assert!(printed(&mut uart).is_empty());
        uart.write(4, 0x08, T);
        assert_eq!(uart.read(0, T), b'z');
    }
}
