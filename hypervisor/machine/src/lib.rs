//! The virtual PC that a guest sees: bus, interrupt controllers, timers, ports, firmware tables,
//! CPUID and MSR policy, and the emulation of instructions that touch devices. Everything here is
//! plain data and functions: no clock is read, no hardware is touched.
#![cfg_attr(not(test), no_std)]
#![forbid(unsafe_code)]

extern crate alloc;

pub mod acpi;
pub mod apic;
pub mod board;
pub mod clock;
pub mod cpuid;
pub mod debug;
pub mod emulate;
pub mod hpet;
pub mod i8042;
pub mod map;
#[cfg(any(test, feature = "mock"))]
pub mod mock;
pub mod msr;
pub mod paging;
pub mod pci;
pub mod pic;
pub mod pit;
pub mod pm;
pub mod pvclock;
pub mod rtc;
mod ticks;
pub mod uart;
pub mod watchdog;

#[cfg(test)]
mod random;
