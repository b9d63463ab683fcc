//! The PC around the CPU, as far as every guest needs it: interrupt controllers brought to a known
//! quiet state, and short names for their registers.

use crate::cpu::{cpuid, inb, outb, rdmsr, read32, write32, wrmsr};
use crate::{Frame, reset_interrupts};
use core::arch::asm;

/// The local APIC's page.
pub const LAPIC: u64 = 0xfee0_0000;
/// The I/O APIC's page.
pub const IOAPIC: u64 = 0xfec0_0000;
/// `IA32_APIC_BASE`.
pub const APIC_BASE: u32 = 0x1b;
/// Its x2APIC bit.
pub const EXTD: u64 = 1 << 10;
/// Its enable bit.
pub const ENABLED: u64 = 1 << 11;
/// `IA32_TSC_DEADLINE`.
pub const TSC_DEADLINE: u32 = 0x6e0;

/// Offsets of the local APIC's registers (Intel SDM Vol. 3A table 11-1).
#[allow(missing_docs, reason = "the names are the manual's")]
pub mod reg {
    pub const ID: u32 = 0x20;
    pub const VERSION: u32 = 0x30;
    pub const TPR: u32 = 0x80;
    pub const PPR: u32 = 0xa0;
    pub const EOI: u32 = 0xb0;
    pub const LDR: u32 = 0xd0;
    pub const DFR: u32 = 0xe0;
    pub const SVR: u32 = 0xf0;
    pub const ISR: u32 = 0x100;
    pub const TMR: u32 = 0x180;
    pub const IRR: u32 = 0x200;
    pub const ESR: u32 = 0x280;
    pub const ICR_LOW: u32 = 0x300;
    pub const ICR_HIGH: u32 = 0x310;
    pub const LVT_TIMER: u32 = 0x320;
    pub const LVT_THERMAL: u32 = 0x330;
    pub const LVT_PERF: u32 = 0x340;
    pub const LVT_LINT0: u32 = 0x350;
    pub const LVT_LINT1: u32 = 0x360;
    pub const LVT_ERROR: u32 = 0x370;
    pub const INITIAL: u32 = 0x380;
    pub const CURRENT: u32 = 0x390;
    pub const DIVIDE: u32 = 0x3e0;
    pub const SELF_IPI: u32 = 0x3f0;
}

/// LVT: masked.
pub const MASKED: u32 = 1 << 16;

/// The x2APIC MSR of the register at `offset`.
pub const fn x2apic(offset: u32) -> u32 {
    0x800 + offset / 16
}

/// Whether the local APIC is in x2APIC mode.
pub fn in_x2apic() -> bool {
    // SAFETY: the MSR exists wherever there is a local APIC.
    unsafe { rdmsr(APIC_BASE) & EXTD != 0 }
}

/// Reads a local-APIC register, in whichever mode it is.
pub fn lapic(offset: u32) -> u32 {
    // SAFETY: the page is mapped, the MSR exists in x2APIC mode; reading has no side effect.
    unsafe {
        if in_x2apic() {
            rdmsr(x2apic(offset)) as u32
        } else {
            read32(LAPIC + u64::from(offset))
        }
    }
}

/// Writes a local-APIC register, in whichever mode it is.
pub fn set_lapic(offset: u32, value: u32) {
    // SAFETY: the local APIC is the guest's own, and interrupts have handlers.
    unsafe {
        if in_x2apic() {
            wrmsr(x2apic(offset), value.into());
        } else {
            write32(LAPIC + u64::from(offset), value);
        }
    }
}

/// Ends the interrupt of highest priority at the local APIC.
pub fn eoi() {
    set_lapic(reg::EOI, 0);
}

/// An interrupt handler that does nothing but [`eoi`].
pub fn handle_eoi(_: &mut Frame) {
    eoi();
}

/// Whether a bit of one of the 256-bit registers ISR, TMR, IRR is set.
pub fn lapic_bit(register: u32, vector: u8) -> bool {
    let vector = u32::from(vector);
    lapic(register + vector / 32 * 16) >> (vector % 32) & 1 != 0
}

/// Reads an I/O-APIC register.
pub fn ioapic(index: u32) -> u32 {
    // SAFETY: the page is mapped, and the I/O APIC the guest's own.
    unsafe {
        write32(IOAPIC, index);
        read32(IOAPIC + 0x10)
    }
}

/// Writes an I/O-APIC register.
pub fn set_ioapic(index: u32, value: u32) {
    // SAFETY: as for `ioapic`.
    unsafe {
        write32(IOAPIC, index);
        write32(IOAPIC + 0x10, value);
    }
}

/// Sets a redirection entry: first masked, so that no half of it is ever in force.
pub fn set_redirection(pin: u32, low: u32, high: u32) {
    set_ioapic(0x10 + 2 * pin, MASKED);
    set_ioapic(0x11 + 2 * pin, high);
    set_ioapic(0x10 + 2 * pin, low);
}

/// How many pins the I/O APIC has.
pub fn ioapic_pins() -> u32 {
    (ioapic(1) >> 16 & 0xff) + 1
}

/// Initializes both 8259s: vectors from 20H and 28H, edges, ICW4 as given to both, and the masks.
pub fn init_pic(icw4: u8, master: u8, slave: u8) {
    let steps = [
        (0x20, 0x11),
        (0xa0, 0x11),
        (0x21, 0x20),
        (0xa1, 0x28),
        (0x21, 4),
        (0xa1, 2),
        (0x21, icw4),
        (0xa1, icw4),
        (0x21, master),
        (0xa1, slave),
    ];
    for (port, value) in steps {
        // SAFETY: the interrupt controllers are the guest's own.
        unsafe { outb(port, value) };
    }
}

/// Whether CPUID names Intel.
pub fn is_intel() -> bool {
    cpuid(0, 0)[1] == u32::from_le_bytes(*b"Genu")
}

/// Whether CPUID offers x2APIC.
pub fn has_x2apic() -> bool {
    cpuid(1, 0)[2] >> 21 & 1 != 0
}

/// Whether CPUID offers the TSC-deadline timer.
pub fn has_tsc_deadline() -> bool {
    cpuid(1, 0)[2] >> 24 & 1 != 0
}

/// Puts the local APIC into xAPIC or x2APIC mode, by way of "disabled" where needed.
pub fn set_x2apic(on: bool) {
    // SAFETY: these are the transitions that SDM Vol. 3A §11.12.5 allows.
    unsafe {
        let base = rdmsr(APIC_BASE) & !(EXTD | ENABLED);
        if !on && in_x2apic() {
            wrmsr(APIC_BASE, base);
        }
        if !on || !in_x2apic() {
            wrmsr(APIC_BASE, base | ENABLED);
        }
        if on {
            wrmsr(APIC_BASE, base | ENABLED | EXTD);
        }
    }
}

/// Interrupts off, no handlers, both 8259s and the I/O APIC masked, the local APIC in xAPIC mode,
/// enabled, empty, with virtual wire on LINT0 and NMI on LINT1, counters stopped.
pub fn quiet() {
    // SAFETY: interrupts off is the quieter state.
    unsafe { asm!("cli") };
    reset_interrupts();
    init_pic(1, 0xff, 0xff);
    for pin in 0..ioapic_pins() {
        set_ioapic(0x10 + 2 * pin, MASKED);
    }
    set_x2apic(false);
    if has_tsc_deadline() {
        // SAFETY: CPUID says that the MSR exists.
        unsafe { wrmsr(TSC_DEADLINE, 0) };
    }
    let registers = [
        (reg::SVR, 0x1ff),
        (reg::INITIAL, 0),
        (reg::LVT_TIMER, MASKED),
        (reg::LVT_PERF, MASKED),
        (reg::LVT_ERROR, MASKED),
        (reg::LVT_LINT0, 0x700),
        (reg::LVT_LINT1, 0x400),
        (reg::TPR, 0),
        (reg::ESR, 0),
    ];
    for (register, value) in registers {
        set_lapic(register, value);
    }
    for _ in 0..64 {
        let pending = |register: u32| (0..8).any(|i| lapic(register + 16 * i) != 0);
        if pending(reg::ISR) {
            eoi();
        } else if pending(reg::IRR) {
            // SAFETY: every vector has a stub, which does nothing.
            unsafe { asm!("sti", "nop", "cli") };
        } else {
            break;
        }
    }
}

/// Polls a status register: reads `port` until `(value & mask)
/// == wanted`, at most `tries` times.
pub fn wait_port(port: u16, mask: u8, wanted: u8, tries: u32) -> bool {
    // SAFETY: the callers' ports are status registers, and reading them is what polling is.
    (0..tries).any(|_| unsafe { inb(port) } & mask == wanted)
}
