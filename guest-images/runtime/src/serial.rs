//! COM1 as the guest's console.

use crate::cpu::{inb, outb};
use crate::smp::current;
use core::fmt::{self, Write};
use core::sync::atomic::{AtomicUsize, Ordering};

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

/// The CPU that prints, plus one; 0 when none does.
static PRINTING: AtomicUsize = AtomicUsize::new(0);

/// The CPU that printed does not run any more.
pub(crate) fn abandon() {
    PRINTING.store(0, Ordering::Release);
}

#[doc(hidden)]
pub fn _print(args: fmt::Arguments<'_>) {
    let own = current() + 1;
    // An interrupt handler or a panic may print while its own CPU does.
    let nested = PRINTING.load(Ordering::Relaxed) == own;
    while !nested
        && PRINTING
            .compare_exchange_weak(0, own, Ordering::Acquire, Ordering::Relaxed)
            .is_err()
    {
        core::hint::spin_loop();
    }
    let _ = Serial.write_fmt(args);
    if !nested {
        PRINTING.store(0, Ordering::Release);
    }
}
