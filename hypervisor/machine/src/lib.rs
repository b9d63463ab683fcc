//! The virtual PC that a guest sees: bus, interrupt controllers, timers, ports, firmware tables,
//! CPUID and MSR policy, and the emulation of instructions that touch devices. Everything here is
//! plain data and functions: no clock is read, no hardware is touched.
#![cfg_attr(not(test), no_std)]
#![forbid(unsafe_code)]

extern crate alloc;

pub mod acpi;
pub mod apic;
pub mod clock;
pub mod cpuid;
pub mod emulate;
pub mod map;
#[cfg(any(test, feature = "mock"))]
pub mod mock;
pub mod msr;
pub mod paging;
pub mod pvclock;
#[cfg(test)]
mod random;
