#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;

pub mod apic;
pub mod clock;
pub mod cpuid;
pub mod msr;
pub mod pvclock;

#[cfg(test)]
mod fake;
