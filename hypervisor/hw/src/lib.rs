//! The physical machine: memory through the direct map, the serial port, the local APIC and its
//! timer, PCI, devices' registers and memory, clocks, and what ACPI says of them. Knows nothing of
//! guests.
#![cfg_attr(not(test), no_std)]

extern crate alloc;

pub mod acpi;
mod apic;
mod clock;
mod direct_map;
pub mod mmio;
pub mod pci;
pub mod power;
mod random;
mod rtc;
mod screen;
mod serial;

pub use apic::{
    ApicError, CoreTimer, IoApic, KICK_VECTOR, LocalApic, NIC_VECTOR, SERIAL_VECTOR,
    SPURIOUS_VECTOR, TIMER_VECTOR, Trigger,
};
pub use clock::{ClockError, TscFrequency, calibrate, rdtsc, rdtsc_ordered, tsc_is_invariant};
pub use direct_map::DirectMap;
pub use random::random_seed;
pub use rtc::wall_clock;
pub use screen::{Framebuffer, Screen};
pub use serial::{ComPort, Serial, SerialError};
