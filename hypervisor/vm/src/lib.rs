//! A VM's life: what the configuration asks for, the bundle its images come from, its memory map,
//! and how an image gets into its memory.
#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;

pub mod bundle;
pub mod config;
pub mod layout;
pub mod load;
#[cfg(test)]
mod testing;
