//! COM1 as the guest's console.

use crate::cpu::{inb, outb};
use core::fmt::{self, Write};

const COM1: u16 = 0x3f8;

struct Serial;

/// Sets COM1 up as the console: 115200 8N1, FIFOs on, no interrupts.
pub fn init() {
    for (offset, value) in [(1, 0), (3, 0x80), (0, 1), (1, 0), (3, 3), (2, 7), (4, 3)] {
        // SAFETY: COM1 is the guest's own.
        unsafe { outb(COM1 + offset, value) };
    }
}

impl Write for Serial {
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
    // SAFETY: COM1 is the guest's own.
    unsafe {
        while inb(COM1 + 5) & 0x20 == 0 {}
        outb(COM1, byte);
    }
}

#[doc(hidden)]
pub fn _print(args: fmt::Arguments<'_>) {
    let _ = Serial.write_fmt(args);
}
