//! The words of x86 that every room uses: addresses, registers, segments,
//! events, exits, and the few traits that are walls between rooms.
//!
//! This crate holds vocabulary, not behaviour. The safe rooms (`machine`,
//! `memory`, `vm`) speak to a virtual CPU and to guest memory only through
//! [`Vcpu`] and [`GuestMemory`], so that they can be tested on the host with
//! plain structs in place of VT-x, AMD-V and real frames.
#![no_std]
#![forbid(unsafe_code)]

mod addr;
mod event;
mod exit;
mod mem;
pub mod msr;
mod regs;
mod time;
mod vcpu;

pub use addr::{GuestPhysAddr, HostPhysAddr, PAGE_SIZE, PAGE_SIZE_1G, PAGE_SIZE_2M, PageSize};
pub use event::{Event, Exception, SoftwareKind, Vector};
pub use exit::{Access, Combined, CrAccess, CrOp, EntryFailure, Exit, IoExit, combine};
pub use mem::{FrameSource, GuestMemory, MemoryFault, PhysMemory};
pub use regs::{
    AccessRights, ControlRegister, Cr0, Cr4, DebugRegister, DescriptorTable, Efer, Gpr, Gprs,
    RFlags, Segment, SegmentRegister,
};
pub use time::Nanos;
pub use vcpu::{ApicMode, Interruptibility, Vcpu};
