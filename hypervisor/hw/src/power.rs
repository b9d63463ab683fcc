//! Turning the machine off and starting it again.

use crate::acpi::AcpiInfo;
pub use x86_64::instructions::port::Port;

/// Puts the machine into ACPI S5. Comes back only where that does not work.
///
/// # Safety
/// `info` came from the machine's own tables; nothing that matters is still running.
pub unsafe fn off(info: &AcpiInfo) {
    // SAFETY: the ports are the firmware's own (promised by the caller); writing SLP_TYP and
    // SLP_EN there is what ACPI 6.5 §4.8.3.2 asks for.
    unsafe {
        if let Some((port, value)) = info.enable {
            Port::new(port).write(value);
        }
        if let Some((a, b)) = info.sleep_values() {
            if let Some(port) = info.pm1a_control {
                Port::new(port).write(a);
            }
            if let Some(port) = info.pm1b_control {
                Port::new(port).write(b);
            }
        }
    }
}

/// Resets the machine: the ACPI reset register, port 0xcf9, the keyboard controller, in this
/// order. Comes back only where none of them works.
///
/// # Safety
/// As [`off`].
pub unsafe fn reset(info: &AcpiInfo) {
    // SAFETY: as in `off`; 0xcf9 and 0x64 are the PC's own reset ports.
    unsafe {
        if let Some((port, value)) = info.reset {
            Port::new(port).write(value);
        }
        Port::<u8>::new(0xcf9).write(0x02);
        Port::<u8>::new(0xcf9).write(0x06);
        Port::<u8>::new(0x64).write(0xfe);
    }
}
