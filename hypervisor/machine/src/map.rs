//! Where things are in a guest's physical and port address spaces.
//!
//! The map is that of an ordinary PC with a PCI Express host bridge: RAM from zero with the legacy
//! hole, PCI windows and fixed devices between 3 GiB and 4 GiB, the rest of RAM above. Every room
//! takes these numbers from here: the bus that decodes them, the memory map a loader hands over,
//! and the ACPI tables that describe them.

use core::ops::Range;

/// Legacy video memory: decoded, never RAM.
pub const LEGACY_HOLE: Range<u64> = 0xa_0000..0xc_0000;
/// Where the extended BIOS data area would be: the last KiB of base memory, reserved.
pub const EBDA: Range<u64> = 0x9_fc00..0xa_0000;
/// RAM where a PC has its ROMs: reserved in the memory map, holds the ACPI tables.
pub const ROM_AREA: Range<u64> = 0xc_0000..0x10_0000;
/// Where the ACPI tables start; the root pointer is first, on a 16-byte boundary in the area that
/// operating systems scan (ACPI 6.5 §5.2.5.1).
pub const ACPI_TABLES: Range<u64> = 0xe_0000..0x10_0000;
/// RAM below this address; what a guest has beyond continues at [`HIGH_RAM`].
pub const LOW_RAM_END: u64 = 0xc000_0000;
/// RAM above 4 GiB starts here.
pub const HIGH_RAM: u64 = 0x1_0000_0000;

/// PCI memory window below 4 GiB.
pub const PCI_WINDOW: Range<u64> = 0xc000_0000..0xe000_0000;
/// Enhanced configuration access of PCI segment 0: 1 MiB a bus (PCIe 6.0 §7.2.2).
pub const ECAM: Range<u64> = 0xe000_0000..0xf000_0000;
/// The last PCI bus: all devices are on bus 0.
pub const PCI_LAST_BUS: u8 = 0;
/// I/O APIC registers, one page.
pub const IO_APIC: u64 = 0xfec0_0000;
/// HPET registers, 1 KiB, if the guest has one.
pub const HPET: u64 = 0xfed0_0000;
/// Local APIC registers, one page, at reset.
pub const LOCAL_APIC: u64 = 0xfee0_0000;

/// Global system interrupts of the PCI interrupt lines: function's pin and slot choose one of
/// these four, level triggered and active low.
pub const PCI_INTX_GSI: [u32; 4] = [16, 17, 18, 19];
/// ISA interrupts of the same four lines while the guest uses the 8259A pair.
pub const PCI_INTX_PIC: [u8; 4] = [10, 11, 10, 11];
/// Which of the four lines the interrupt pin (0 to 3 for INTA# to INTD#) of a device on bus 0
/// drives: slots are wired in turn, so that their INTA# do not all share one line.
#[must_use]
pub const fn pci_intx_line(device: u8, pin: u8) -> usize {
    (device as usize + pin as usize) % PCI_INTX_GSI.len()
}
/// The timer's ISA interrupt 0 is wired to this I/O APIC pin.
pub const TIMER_GSI: u32 = 2;
/// System control interrupt: level triggered, active high.
pub const SCI: u8 = 9;

/// First serial port.
pub const COM1: u16 = 0x3f8;
/// Its interrupt.
pub const COM1_IRQ: u8 = 4;
/// PM1 event block, 4 bytes: status, enable (ACPI 6.5 §4.8.3.1).
pub const PM1_EVENT: u16 = 0x600;
/// PM1 control block, 2 bytes.
pub const PM1_CONTROL: u16 = 0x604;
/// PM timer, 4 bytes, 32 bits wide.
pub const PM_TIMER: u16 = 0x608;
/// General-purpose event block 0: [`GPE0_LENGTH`] bytes, half status and half enable.
pub const GPE0: u16 = 0x620;
/// Bytes of the general-purpose event block.
pub const GPE0_LENGTH: u8 = 4;
/// Ports the power-management block owns.
pub const PM_BLOCK: Range<u16> = 0x600..0x640;
/// The watchdog's registers, if the guest has one.
pub const WATCHDOG: Range<u16> = 0x640..0x654;
/// Its device number on bus 0.
pub const WATCHDOG_DEVICE: u8 = 29;
/// The console's place on the bus.
pub const CONSOLE_DEVICE: u8 = 1;
/// The entropy device's place on the bus.
pub const RNG_DEVICE: u8 = 2;
/// Where network devices begin on the bus.
pub const FIRST_NET_DEVICE: u8 = 3;
/// Reset control register.
pub const RESET: u16 = 0xcf9;
/// Written to [`RESET`]: a full reset.
pub const RESET_VALUE: u8 = 6;
/// SLP_TYP of S5 in PM1 control, as `\_S5` names it.
pub const S5_SLEEP_TYPE: u8 = 5;
/// CMOS index of the century byte.
pub const CMOS_CENTURY: u8 = 0x32;
/// Ends the VM with code `(value << 1) | 1`, where the configuration asks for it.
pub const DEBUG_EXIT: u16 = 0xf4;
/// Powers the VM off once `Shutdown` was written to it byte by byte, as Bochs does, where the
/// configuration asks for a debug exit.
pub const DEBUG_SHUTDOWN: u16 = 0x8900;
/// Prints a byte, where the configuration asks for it.
pub const DEBUG_CONSOLE: u16 = 0xe9;

/// Whether this is one of the four ports of the 8259A pair.
#[inline]
#[must_use]
pub const fn is_pic(port: u16) -> bool {
    port & !0x81 == 0x20
}
