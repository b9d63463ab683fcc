//! The 8042 keyboard controller with a keyboard and a mouse behind it that nobody touches
//! (IBM PS/2 Hardware Interface Technical Reference, "Keyboard and auxiliary device controller").
//!
//! Everything answers as the hardware does — self-tests, identification, settings — so that a
//! driver's probe is clean and the reset line works; there is no source of keys or movements.
//! Answers come at once: IBF is never seen set. The A20 bit is kept and has no effect on memory,
//! as on processors without the pin.

use heapless::Deque;
use serde::{Deserialize, Serialize};

const STATUS_OUTPUT_FULL: u8 = 0x01;
const STATUS_COMMAND: u8 = 0x08;
const STATUS_UNLOCKED: u8 = 0x10;
const STATUS_AUX: u8 = 0x20;

const MODE_KEYBOARD_IRQ: u8 = 0x01;
const MODE_AUX_IRQ: u8 = 0x02;
const MODE_SYSTEM: u8 = 0x04;
const MODE_KEYBOARD_OFF: u8 = 0x10;
const MODE_AUX_OFF: u8 = 0x20;
const MODE_TRANSLATE: u8 = 0x40;

const PORT_NOT_RESET: u8 = 0x01;
const PORT_A20: u8 = 0x02;
const PORT_KEYBOARD_FULL: u8 = 0x10;
const PORT_AUX_FULL: u8 = 0x20;

const ACK: u8 = 0xfa;
const RESEND: u8 = 0xfe;
const PASSED: u8 = 0xaa;

type Queue = Deque<u8, 16>;

fn answer(queue: &mut Queue, bytes: &[u8]) {
    for &byte in bytes {
        // A device with a full buffer loses what comes.
        let _ = queue.push_back(byte);
    }
}

#[derive(Clone, Debug, Serialize, Deserialize)]
struct Keyboard {
    queue: Queue,
    /// The command whose parameter comes next.
    waiting: Option<u8>,
    last: u8,
    leds: u8,
    rate: u8,
    scan_codes: u8,
    scanning: bool,
}

impl Keyboard {
    const fn new() -> Self {
        Self {
            queue: Queue::new(),
            waiting: None,
            last: PASSED,
            leds: 0,
            rate: 0x2b,
            scan_codes: 2,
            scanning: true,
        }
    }

    fn defaults(&mut self, scanning: bool) {
        (self.rate, self.scan_codes, self.scanning) = (0x2b, 2, scanning);
    }

    fn write(&mut self, value: u8) {
        if value < 0x80
            && let Some(command) = self.waiting.take()
        {
            let mut reply = &[ACK][..];
            let current = [ACK, self.scan_codes];
            match (command, value) {
                (0xed, _) => self.leds = value & 7,
                (0xf0, 0) => reply = &current,
                (0xf0, 1..=3) => self.scan_codes = value,
                (0xf0, _) => reply = &[RESEND],
                (0xf3, _) => self.rate = value,
                _ => {}
            }
            return answer(&mut self.queue, reply);
        }
        // A command ends a wait for a parameter.
        self.waiting = None;
        let reply: &[u8] = match value {
            0xed | 0xf0 | 0xf3 | 0xfb..=0xfd => {
                self.waiting = Some(value);
                &[ACK]
            }
            0xee => &[0xee],
            0xf2 => &[ACK, 0xab, 0x83],
            0xf4 => {
                self.scanning = true;
                &[ACK]
            }
            0xf5 | 0xf6 => {
                self.defaults(value == 0xf6);
                &[ACK]
            }
            0xf7..=0xfa => &[ACK],
            0xfe => &[self.last],
            0xff => {
                self.defaults(true);
                self.queue.clear();
                &[ACK, PASSED]
            }
            _ => &[RESEND],
        };
        answer(&mut self.queue, reply);
    }

    /// What the controller's translation makes of a byte of scan code set 2: only the bytes that
    /// occur here are in the table.
    const fn translate(byte: u8) -> u8 {
        match byte {
            0x00 => 0xff,
            0x01 => 0x43,
            0x02 => 0x41,
            0x03 => 0x3f,
            0x83 => 0x41,
            byte => byte,
        }
    }
}

#[derive(Clone, Debug, Serialize, Deserialize)]
struct Mouse {
    queue: Queue,
    waiting: Option<u8>,
    last: u8,
    scale_2_1: bool,
    resolution: u8,
    rate: u8,
    remote: bool,
    reporting: bool,
    wrap: bool,
}

impl Mouse {
    const fn new() -> Self {
        Self {
            queue: Queue::new(),
            waiting: None,
            last: PASSED,
            scale_2_1: false,
            resolution: 2,
            rate: 100,
            remote: false,
            reporting: false,
            wrap: false,
        }
    }

    fn defaults(&mut self) {
        *self = Self {
            queue: core::mem::take(&mut self.queue),
            last: self.last,
            ..Self::new()
        };
    }

    fn write(&mut self, value: u8) {
        if self.wrap && value != 0xec && value != 0xff {
            return answer(&mut self.queue, &[value]);
        }
        if let Some(command) = self.waiting.take() {
            let reply = match (command, value) {
                (0xe8, 0..=3) => {
                    self.resolution = value;
                    ACK
                }
                (0xf3, 10 | 20 | 40 | 60 | 80 | 100 | 200) => {
                    self.rate = value;
                    ACK
                }
                _ => RESEND,
            };
            return answer(&mut self.queue, &[reply]);
        }
        let mut reply = &[ACK][..];
        let status = [
            ACK,
            u8::from(self.remote) << 6
                | u8::from(self.reporting) << 5
                | u8::from(self.scale_2_1) << 4,
            self.resolution,
            self.rate,
        ];
        let last = [self.last];
        match value {
            0xe6 | 0xe7 => self.scale_2_1 = value & 1 != 0,
            0xe8 | 0xf3 => self.waiting = Some(value),
            0xe9 => reply = &status,
            0xea | 0xf0 => self.remote = value == 0xf0,
            // Read data: no button, no movement.
            0xeb => reply = &[ACK, 0x08, 0, 0],
            0xec => self.wrap = false,
            0xee => self.wrap = true,
            0xf2 => reply = &[ACK, 0x00],
            0xf4 | 0xf5 => self.reporting = value == 0xf4,
            0xf6 => self.defaults(),
            0xfe => reply = &last,
            0xff => {
                self.defaults();
                self.queue.clear();
                reply = &[ACK, PASSED, 0x00];
            }
            _ => reply = &[RESEND],
        }
        answer(&mut self.queue, reply);
    }
}

/// What a write to the controller asks of the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// Nothing.
    None,
    /// The processor's reset line was pulled.
    Reset,
}

/// The controller, ports 0x60 and 0x64.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct I8042 {
    /// The controller's memory; byte 0 is the mode ("command byte").
    memory: [u8; 32],
    /// The command whose parameter comes next at port 0x60.
    waiting: Option<u8>,
    last_was_command: bool,
    /// The byte in the output buffer, and whether it is the auxiliary device's.
    output: Option<(u8, bool)>,
    /// What was last in the output buffer.
    last_output: u8,
    /// Answers of the controller itself, which go before the devices'.
    own: Queue,
    port: u8,
    keyboard: Keyboard,
    mouse: Mouse,
    /// An interrupt output fell in an access and may be up again: bit 0 keyboard, bit 1 mouse.
    dipped: u8,
}

impl Default for I8042 {
    fn default() -> Self {
        Self::new()
    }
}

impl I8042 {
    /// The controller as firmware leaves it: self-test passed, translation on.
    #[must_use]
    pub const fn new() -> Self {
        let mut memory = [0; 32];
        memory[0] = MODE_KEYBOARD_IRQ | MODE_SYSTEM | MODE_TRANSLATE | MODE_AUX_OFF;
        Self {
            memory,
            waiting: None,
            last_was_command: false,
            output: None,
            last_output: 0,
            own: Queue::new(),
            port: PORT_NOT_RESET | PORT_A20,
            keyboard: Keyboard::new(),
            mouse: Mouse::new(),
            dipped: 0,
        }
    }

    /// Back to [`I8042::new`].
    pub fn reset(&mut self) {
        *self = Self::new();
    }

    /// Whether address line 20 is let through, as the output port says.
    #[must_use]
    pub const fn a20(&self) -> bool {
        self.port & PORT_A20 != 0
    }

    /// Sets the output port's A20 bit (port 0x92 shares it).
    pub const fn set_a20(&mut self, on: bool) {
        self.port = self.port & !PORT_A20 | if on { PORT_A20 } else { 0 };
    }

    /// Reads port 0x60 (data) or 0x64 (status).
    pub fn read(&mut self, port: u16) -> u8 {
        if port != 0x60 {
            return self.status();
        }
        if let Some((byte, aux)) = self.output.take() {
            self.last_output = byte;
            self.dipped |= if aux { 2 } else { 1 };
            self.fill();
        }
        self.last_output
    }

    /// Writes port 0x60 (data) or 0x64 (command).
    pub fn write(&mut self, port: u16, value: u8) -> Request {
        self.last_was_command = port != 0x60;
        let request = if self.last_was_command {
            self.waiting = None;
            self.command(value)
        } else {
            self.data(value)
        };
        self.fill();
        request
    }

    /// Interrupt outputs: keyboard (ISA 1) and mouse (ISA 12).
    #[must_use]
    pub const fn irqs(&self) -> (bool, bool) {
        match self.output {
            Some((_, false)) => (self.memory[0] & MODE_KEYBOARD_IRQ != 0, false),
            Some((_, true)) => (false, self.memory[0] & MODE_AUX_IRQ != 0),
            None => (false, false),
        }
    }

    /// Which outputs fell since this was last asked, even if they are up again.
    pub const fn take_dips(&mut self) -> (bool, bool) {
        let dipped = core::mem::replace(&mut self.dipped, 0);
        (dipped & 1 != 0, dipped & 2 != 0)
    }

    fn status(&self) -> u8 {
        let output = match self.output {
            Some((_, false)) => STATUS_OUTPUT_FULL,
            Some((_, true)) => STATUS_OUTPUT_FULL | STATUS_AUX,
            None => 0,
        };
        let command = if self.last_was_command {
            STATUS_COMMAND
        } else {
            0
        };
        output | self.memory[0] & MODE_SYSTEM | command | STATUS_UNLOCKED
    }

    /// Moves the next answer into the free output buffer.
    fn fill(&mut self) {
        if self.output.is_some() {
            return;
        }
        let mode = self.memory[0];
        self.output = if let Some(byte) = self.own.pop_front() {
            Some((byte, false))
        } else if mode & MODE_KEYBOARD_OFF == 0
            && let Some(byte) = self.keyboard.queue.pop_front()
        {
            self.keyboard.last = byte;
            let translated = mode & MODE_TRANSLATE != 0;
            Some((
                if translated {
                    Keyboard::translate(byte)
                } else {
                    byte
                },
                false,
            ))
        } else if mode & MODE_AUX_OFF == 0
            && let Some(byte) = self.mouse.queue.pop_front()
        {
            self.mouse.last = byte;
            Some((byte, true))
        } else {
            None
        };
    }

    fn output_port(&self) -> u8 {
        self.port
            | match self.output {
                Some((_, false)) => PORT_KEYBOARD_FULL,
                Some((_, true)) => PORT_AUX_FULL,
                None => 0,
            }
    }

    fn command(&mut self, command: u8) -> Request {
        let mode = self.memory[0];
        match command {
            0x20..=0x3f => {
                let byte = self.memory[usize::from(command & 0x1f)];
                answer(&mut self.own, &[byte]);
            }
            0x60..=0x7f | 0xd1..=0xd4 => self.waiting = Some(command),
            0xa7 => self.memory[0] = mode | MODE_AUX_OFF,
            0xa8 => self.memory[0] = mode & !MODE_AUX_OFF,
            // Tests of the auxiliary and the keyboard interface: no error.
            0xa9 | 0xab => answer(&mut self.own, &[0x00]),
            0xaa => {
                self.memory[0] = mode | MODE_SYSTEM | MODE_KEYBOARD_OFF | MODE_AUX_OFF;
                answer(&mut self.own, &[0x55]);
            }
            0xad => self.memory[0] = mode | MODE_KEYBOARD_OFF,
            0xae => self.memory[0] = mode & !MODE_KEYBOARD_OFF,
            // Input port: the keyboard is not locked.
            0xc0 => answer(&mut self.own, &[0x80]),
            0xd0 => {
                let port = self.output_port();
                answer(&mut self.own, &[port]);
            }
            0xdd => self.set_a20(false),
            0xdf => self.set_a20(true),
            // Test inputs: both clocks are high.
            0xe0 => answer(&mut self.own, &[0x03]),
            // Pulse the output port's low bits; bit 0 is the reset line.
            0xf0..=0xff if command & PORT_NOT_RESET == 0 => return Request::Reset,
            _ => {}
        }
        Request::None
    }

    fn data(&mut self, value: u8) -> Request {
        match self.waiting.take() {
            Some(command @ 0x60..=0x7f) => self.memory[usize::from(command & 0x1f)] = value,
            Some(0xd1) => {
                self.port = value & (PORT_NOT_RESET | PORT_A20);
                if value & PORT_NOT_RESET == 0 {
                    return Request::Reset;
                }
            }
            Some(0xd2) => answer(&mut self.own, &[value]),
            // As if the auxiliary device had sent it.
            Some(0xd3) => answer(&mut self.mouse.queue, &[value]),
            Some(0xd4) => {
                self.memory[0] &= !MODE_AUX_OFF;
                self.mouse.write(value);
            }
            _ => {
                self.memory[0] &= !MODE_KEYBOARD_OFF;
                self.keyboard.write(value);
            }
        }
        Request::None
    }
}

#[cfg(test)]
mod tests {
    use std::vec::Vec;

    use super::*;

    fn drain(controller: &mut I8042) -> Vec<(u8, bool)> {
        let mut bytes = Vec::new();
        while controller.read(0x64) & STATUS_OUTPUT_FULL != 0 {
            let aux = controller.read(0x64) & STATUS_AUX != 0;
            bytes.push((controller.read(0x60), aux));
        }
        bytes
    }

    fn values(controller: &mut I8042) -> Vec<u8> {
        drain(controller)
            .into_iter()
            .map(|(byte, _)| byte)
            .collect()
    }

    #[test]
    fn controller_commands() {
        // (command, parameter), answer
        for (command, parameter, expected) in [
            (0x20, None, &[0x65][..]),
            (0xaa, None, &[0x55]),
            (0xa9, None, &[0x00]),
            (0xab, None, &[0x00]),
            (0xc0, None, &[0x80]),
            (0xd0, None, &[0x03]),
            (0xe0, None, &[0x03]),
            (0xd2, Some(0x5a), &[0x5a]),
            (0xff, None, &[]),
            (0x9b, None, &[]),
        ] {
            let mut controller = I8042::new();
            assert_eq!(controller.write(0x64, command), Request::None);
            assert_eq!(controller.read(0x64) & STATUS_COMMAND, STATUS_COMMAND);
            if let Some(value) = parameter {
                controller.write(0x60, value);
                assert_eq!(controller.read(0x64) & STATUS_COMMAND, 0);
            }
            assert_eq!(values(&mut controller), expected, "{command:#x}");
        }
        let mut controller = I8042::new();
        for (command, mode) in [(0xa8, 0x45), (0xa7, 0x65), (0xad, 0x75), (0xae, 0x65)] {
            controller.write(0x64, command);
            controller.write(0x64, 0x20);
            assert_eq!(values(&mut controller), [mode]);
        }
        controller.write(0x64, 0x65);
        controller.write(0x60, 0x99);
        controller.write(0x64, 0x25);
        assert_eq!(values(&mut controller), [0x99]);
    }

    #[test]
    fn reset_and_a20() {
        let mut controller = I8042::new();
        for (command, resets) in [(0xfe, true), (0xf0, true), (0xff, false), (0xf1, false)] {
            let expected = if resets {
                Request::Reset
            } else {
                Request::None
            };
            assert_eq!(controller.write(0x64, command), expected);
        }
        controller.write(0x64, 0xd1);
        assert_eq!(controller.write(0x60, 0x01), Request::None);
        assert!(!controller.a20());
        controller.write(0x64, 0xdf);
        assert!(controller.a20());
        controller.write(0x64, 0xd1);
        assert_eq!(controller.write(0x60, 0x02), Request::Reset);
    }

    #[test]
    fn keyboard_commands() {
        for (bytes, translated, expected) in [
            (&[0xff][..], true, &[ACK, PASSED][..]),
            (&[0xf2], true, &[ACK, 0xab, 0x41]),
            (&[0xf2], false, &[ACK, 0xab, 0x83]),
            (&[0xee], true, &[0xee]),
            (&[0xed, 0x07], true, &[ACK, ACK]),
            (&[0xed, 0xf4], true, &[ACK, ACK]),
            (&[0xf0, 0x00], false, &[ACK, ACK, 0x02]),
            (
                &[0xf0, 0x01, 0xf0, 0x00],
                false,
                &[ACK, ACK, ACK, ACK, 0x01],
            ),
            (&[0xf3, 0x00, 0xf4, 0xf5, 0xf6], true, &[ACK; 5]),
            (&[0x01], true, &[RESEND]),
        ] {
            let mut controller = I8042::new();
            controller.write(0x64, 0x60);
            controller.write(0x60, if translated { 0x45 } else { 0x05 });
            for &byte in bytes {
                controller.write(0x60, byte);
            }
            assert_eq!(values(&mut controller), expected, "{bytes:x?}");
        }
    }

    #[test]
    fn mouse_commands() {
        for (bytes, expected) in [
            (&[0xff][..], &[ACK, PASSED, 0x00][..]),
            (&[0xf2], &[ACK, 0x00]),
            (&[0xe9], &[ACK, 0x00, 2, 100]),
            (
                &[0xf3, 200, 0xe8, 3, 0xe7, 0xf4, 0xe9],
                &[ACK, ACK, ACK, ACK, ACK, ACK, ACK, 0x30, 3, 200],
            ),
            (&[0xf3, 77], &[ACK, RESEND]),
            (&[0xeb], &[ACK, 0x08, 0, 0]),
            (&[0xee, 0x12, 0xec, 0xf2], &[ACK, 0x12, ACK, ACK, 0x00]),
            (&[0x55], &[RESEND]),
        ] {
            let mut controller = I8042::new();
            for &byte in bytes {
                controller.write(0x64, 0xd4);
                controller.write(0x60, byte);
            }
            let answers = drain(&mut controller);
            assert!(answers.iter().all(|&(_, aux)| aux));
            let answers: Vec<u8> = answers.into_iter().map(|(byte, _)| byte).collect();
            assert_eq!(answers, expected, "{bytes:x?}");
        }
    }

    #[test]
    fn interrupts_follow_the_output_buffer() {
        let mut controller = I8042::new();
        controller.write(0x64, 0x60);
        controller.write(0x60, 0x47);
        controller.write(0x60, 0xf2);
        for more in [true, true, false] {
            assert_eq!(controller.irqs(), (true, false));
            controller.read(0x60);
            assert_eq!(controller.take_dips(), (true, false));
            assert_eq!(controller.irqs(), (more, false));
        }
        controller.write(0x64, 0xd4);
        controller.write(0x60, 0xf4);
        assert_eq!(controller.irqs(), (false, true));
        controller.write(0x64, 0x60);
        controller.write(0x60, 0x44);
        assert_eq!(controller.irqs(), (false, false));
        let byte = controller.read(0x60);
        assert_eq!(
            controller.read(0x60),
            byte,
            "an empty buffer keeps its last byte"
        );
    }
}
