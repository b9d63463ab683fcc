//! The machine's console as seen by the person in front of it: many voices on one line ([`mux`]),
//! a line to type on ([`line`]), what can be typed ([`command`]), what the switches answer
//! ([`network`]), how lists look ([`table`]), and what of the line a screen shows ([`grid`]).
//!
//! Nothing here touches a port, a clock or a lock. Bytes come in as arguments and go out through
//! a function, so that all of it runs on the host under random input. What a guest writes is
//! hostile by assumption: [`contain`] says how far it gets.
#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;

pub mod command;
pub mod contain;
pub mod grid;
pub mod keys;
pub mod line;
pub mod mux;
pub mod network;
pub mod scroll;
pub mod table;
