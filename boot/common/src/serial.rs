//! The first serial port, for errors: a person may have no screen, and after
//! the firmware has gone there is no other console.

use core::fmt;

/// COM1, 115200 baud, 8 bits, no parity, 1 stop bit; a 16550A or nothing.
pub struct Serial(());

const COM1: u16 = 0x3f8;
/// How often the line status is read before a character is given up: a port
/// that is absent or blocked must not keep the machine from its next step.
const PATIENCE: u32 = 100_000;

impl Serial {
    /// Programs the port.
    #[must_use]
    pub fn new() -> Self {
        // Interrupts off; divisor latch: 1 = 115200 baud; 8N1; FIFOs on and
        // emptied; DTR and RTS.
        for (register, value) in [(1, 0), (3, 0x80), (0, 1), (1, 0), (3, 3), (2, 7), (4, 3)] {
            outb(COM1 + register, value);
        }
        Self(())
    }
}

impl Default for Serial {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Write for Serial {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for byte in text.bytes() {
            if byte == b'\n' {
                send(b'\r');
            }
            send(byte);
        }
        Ok(())
    }
}

fn send(byte: u8) {
    // Line status bit 5: the transmitter takes a character.
    let _ = (0..PATIENCE).find(|_| inb(COM1 + 5) & 0x20 != 0);
    outb(COM1, byte);
}

fn outb(port: u16, value: u8) {
    // SAFETY: only called with COM1's registers, whose side effects stay in
    // the UART; both loaders run in ring 0.
    unsafe {
        core::arch::asm!("out dx, al", in("dx") port, in("al") value, options(nomem, nostack, preserves_flags));
    }
}

fn inb(port: u16) -> u8 {
    let value;
    // SAFETY: as for `outb`.
    unsafe {
        core::arch::asm!("in al, dx", in("dx") port, out("al") value, options(nomem, nostack, preserves_flags));
    }
    value
}
