//! The interrupt controllers of a symmetric PC: a local APIC per vCPU, which that vCPU alone
//! touches, the I/O APIC, and the fabric that carries messages between them (Intel SDM Vol. 3A ch. 11, AMD APM Vol. 2 ch. 16,
//! Intel 82093AA datasheet).

mod fabric;
mod io;
mod local;
#[cfg(test)]
pub(crate) mod rig;
#[cfg(test)]
mod tests;

pub use fabric::{ApicFabric, MAX_VCPUS, Router};
pub use io::IoApic;
pub use local::{
    Address, ApicEffect, ApicMode, ApicPage, Gp, LocalApic, LocalApicState, RestoreError, Signals,
    TIMER_HZ,
};

use arch::Vector;

/// What a message asks of the CPU that takes it (Intel SDM Vol. 3A §11.6.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum DeliveryMode {
    Fixed,
    LowestPriority,
    Smi,
    Reserved,
    Nmi,
    Init,
    StartUp,
    ExtInt,
}

impl DeliveryMode {
    /// The mode that bits 10:8 of an ICR, LVT or redirection entry or of MSI data name.
    #[must_use]
    pub const fn from_bits(bits: u32) -> Self {
        match (bits >> 8) & 7 {
            0 => Self::Fixed,
            1 => Self::LowestPriority,
            2 => Self::Smi,
            3 => Self::Reserved,
            4 => Self::Nmi,
            5 => Self::Init,
            6 => Self::StartUp,
            _ => Self::ExtInt,
        }
    }
}

/// An interrupt message on its way to local APICs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Message {
    /// The vector (fixed, lowest priority) or the start page (start-up).
    pub vector: Vector,
    /// What it asks.
    pub mode: DeliveryMode,
    /// `dest` is a logical destination rather than an APIC id.
    pub logical: bool,
    /// The destination; all ones, in whatever width the sender has, is [`Message::ALL`].
    pub dest: u32,
    /// Level-triggered: its EOI goes back to the I/O APIC.
    pub level: bool,
}

impl Message {
    /// The broadcast destination.
    pub const ALL: u32 = u32::MAX;

    /// An 8-bit destination in the 32-bit form, where 0xff addresses every APIC.
    #[must_use]
    pub const fn narrow_dest(dest: u8) -> u32 {
        if dest == 0xff { Self::ALL } else { dest as u32 }
    }

    /// The message that a write of `data` to `address` makes, if `address` lies in the window
    /// of message-signalled interrupts (Intel SDM Vol. 3A §11.11).
    #[must_use]
    pub const fn from_msi(address: u64, data: u32) -> Option<Self> {
        if address >> 20 != 0xfee {
            return None;
        }
        let logical = address & (1 << 2) != 0;
        let mode = match DeliveryMode::from_bits(data) {
            // The redirection hint asks for one CPU of the logical set.
            DeliveryMode::Fixed if logical && address & (1 << 3) != 0 => {
                DeliveryMode::LowestPriority
            }
            mode => mode,
        };
        Some(Self {
            vector: Vector((data & 0xff) as u8),
            mode,
            logical,
            dest: Self::narrow_dest(((address >> 12) & 0xff) as u8),
            level: data & (1 << 15) != 0,
        })
    }
}

/// An inter-processor interrupt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ipi {
    /// What is sent.
    pub message: Message,
    /// To whom.
    pub shorthand: Shorthand,
}

/// The destination shorthand of an IPI.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shorthand {
    /// The message's own destination.
    None,
    /// The sender.
    SelfOnly,
    /// Every APIC.
    All,
    /// Every APIC but the sender.
    Others,
}
