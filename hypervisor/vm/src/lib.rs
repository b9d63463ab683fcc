//! A VM's life: what the configuration asks for, the bundle its images come from, its memory map,
//! how an image gets into its memory, and how it runs.
#![cfg_attr(not(test), no_std)]
#![forbid(unsafe_code)]

extern crate alloc;

pub mod bundle;
pub mod config;
pub mod dump;
pub mod exits;
#[cfg(feature = "fault-injection")]
mod inject;
pub mod layout;
pub mod life;
pub mod load;
mod nic;
mod run;
mod seats;
#[cfg(test)]
mod testing;
mod vm;

pub use nic::VmNic;
pub use seats::Seats;
pub use vm::{
    End, Host, MakeVcpu, Making, Order, Processor, SILENCE, Stop, VcpuParts, Vm, VmError, VmSetup,
    check_images,
};
