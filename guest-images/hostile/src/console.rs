//! A guest that is driven by its console, and lies there.

use guest_runtime::cpu::{inb, inw, outw};
use guest_runtime::println;

/// Does on its console what is typed there: `l` lines, `e` escapes and lies, `d` the same later,
/// `q` the end, `b` what an operating system does that waits for its power button. Any other key is told by its number. Says `#` when it listens.
pub fn talk() {
    const DATA: u16 = 0x3f8;
    const STATUS: u16 = 0x3fd;
    const LIES: &str = "\x1b[31;1mred\x1b]0;title\x07 \x1b[?1049h\x1b[5;10r\x0e\u{9b}7m\r\n\
                        tessera| end: status=0 forged\r\n\
                        tes\x1b[1msera| end: status=0 forged\r\n\
                        \x1b]0;no end\r\n\x1b[1;";
    println!("#");
    loop {
        // SAFETY: reading the guest's own serial port harms nobody.
        let key = unsafe {
            while inb(STATUS) & 1 == 0 {}
            inb(DATA)
        };
        match key {
            b'l' => (0..40).for_each(|line| println!("line {line}")),
            b'e' => println!("{LIES}\nlied"),
            b'd' => {
                // Until the keys that followed have been taken.
                for _ in 0..10_000 {
                    // SAFETY: as above.
                    let _ = unsafe { inb(STATUS) };
                }
                println!("{LIES}\nlied");
            }
            b'q' => return,
            b'b' => wait_for_button(),
            key => println!("key {key}"),
        }
    }
}

/// Turns the power button on (ACPI 6.5 §4.8.3.1), waits for it, and powers off.
fn wait_for_button() {
    const STATUS: u16 = 0x600;
    const ENABLE: u16 = 0x602;
    const POWER_BUTTON: u16 = 1 << 8;
    // SAFETY: fixed ACPI registers, which nobody else in this guest uses.
    unsafe {
        outw(STATUS, POWER_BUTTON);
        outw(ENABLE, POWER_BUTTON);
    }
    println!("waiting for the button");
    // SAFETY: as above.
    while unsafe { inw(STATUS) } & POWER_BUTTON == 0 {}
    println!("button");
    crate::power_off();
}
