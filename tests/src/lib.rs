//! The emulator harness: machines to start, a console to talk to, and cases.
//!
//! Nothing here builds anything. A [`Machine`] says what computer to emulate and which disk to
//! boot; [`Session`] is that computer running, with its serial line in hand; [`Console`] is what it
//! has said so far. [`cases`] holds every emulator test as data, and [`dialogue`] plays one.
//! `xtask` builds the images, picks the emulators and shows the results.
#![forbid(unsafe_code)]

pub mod cases;
mod console;
pub mod dialogue;
pub mod emulator;
pub mod oracle;
pub mod process;

pub use console::{Console, End};
pub use emulator::{Emulator, Firmware, Machine, Received, Session};
