//! What the UEFI loader and the multiboot2 entry share: everything between
//! "the kernel's file and the bundle are in memory" and the kernel's `_start`.
//!
//! The steps are the same on both: check the processor ([`Cpu::probe`]), load
//! the ELF file and build the final page tables ([`prepare`]), then, when the
//! memory map will not change any more, write the one
//! [`bootloader_api::BootInfo`] ([`Prepared::finish`]) and jump
//! ([`HandOff::enter`]).
//!
//! The address space the kernel gets, and nothing else is in it:
//!
//! | virtual | what | access |
//! | --- | --- | --- |
//! | one page of the loader, identity mapped | the instruction that loads CR3; the kernel clears the lower half | R-X |
//! | [`DIRECT_MAP`] | physical memory from 0 to max(4 GiB, top of RAM), and the framebuffer if it lies above | RW- |
//! | [`STACK_GUARD`] | nothing, for one page: a stack that overflows faults | --- |
//! | [`STACK_BOTTOM`] | the boot stack, [`STACK_SIZE`] | RW- |
//! | [`KERNEL_BASE`] and up | the kernel's segments | as the ELF file says, never W and X |
//!
//! Without a framebuffer in the `BootInfo`, a machine started by BIOS (its
//! memory map has no `UnknownUefi`) shows the VGA text screen at 0xb8000.
//!
//! Everything here works on memory through [`Frames`], so that all but the
//! jump itself is tested on the host.
#![no_std]

#[cfg(test)]
extern crate std;

mod cpu;
mod handoff;
mod kernel;
pub mod memory_map;
mod paging;
mod serial;

pub use cpu::Cpu;
pub use handoff::{HandOff, Prepared, Screen, prepare};
pub use serial::Serial;

/// Bytes of a page and of a frame.
pub const PAGE: u64 = 4096;
/// Where physical address 0 appears in the kernel's address space.
pub const DIRECT_MAP: u64 = 0xffff_8000_0000_0000;
/// The direct map ends here at the latest: 64 TiB of physical addresses.
pub const DIRECT_MAP_LIMIT: u64 = 1 << 46;
/// The page below the boot stack that is never mapped.
pub const STACK_GUARD: u64 = 0xffff_ff00_0000_0000;
/// The lowest address of the boot stack.
pub const STACK_BOTTOM: u64 = STACK_GUARD + PAGE;
/// Bytes of the boot stack.
pub const STACK_SIZE: u64 = 64 * 1024;
/// The lowest address a kernel segment may have.
pub const KERNEL_BASE: u64 = 0xffff_ffff_8000_0000;

/// Physical memory as a loader sees it: identity mapped, some of it free.
pub trait Frames {
    /// Takes `pages` contiguous frames, zeroed, that the memory map will show
    /// as `Bootloader`. `what` goes into the error.
    fn allocate(&mut self, pages: u64, what: &'static str) -> Result<u64, Error>;

    /// The bytes of frames that [`Frames::allocate`] gave out.
    fn bytes(&mut self, address: u64, len: usize) -> &mut [u8];
}

/// Why the machine cannot be handed to the kernel: what, where, and what to
/// do. Printed after `tessera boot: `.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// The processor lacks something without which nothing is safe.
    #[error("this processor has no {missing}; {remedy}")]
    Processor {
        /// The feature.
        missing: &'static str,
        /// Where a person can turn it on, if anywhere.
        remedy: &'static str,
    },
    /// The firmware left the processor in a mode that cannot be taken over.
    #[error(
        "the firmware runs with 5-level paging (CR4.LA57), which Tessera does not take over; turn it off in the firmware's setup"
    )]
    FiveLevelPaging,
    /// The kernel's file is no ELF file, or ends too early.
    #[error(
        "/tessera/kernel ({len} bytes) is damaged or cut off: {cause}; build the image again with `cargo xtask image`"
    )]
    KernelDamaged {
        /// The length of the file.
        len: u64,
        /// What the ELF parser missed.
        cause: &'static str,
    },
    /// The kernel's ELF file is whole, but not of our kind.
    #[error(
        "/tessera/kernel is of the wrong kind: {field} is {found:#x}, must be {want}; build the image again with `cargo xtask image`"
    )]
    KernelKind {
        /// The field of the ELF or program header.
        field: &'static str,
        /// Its value.
        found: u64,
        /// What it must be.
        want: &'static str,
    },
    /// A segment of the kernel cannot be mapped as it asks.
    #[error(
        "/tessera/kernel: segment {index} at {address:#x} {problem}; check the kernel's linker script"
    )]
    Segment {
        /// The program header's number.
        index: u64,
        /// Its virtual address.
        address: u64,
        /// What is wrong with it.
        problem: &'static str,
    },
    /// A mapping was asked for twice, or off a page boundary.
    #[error(
        "virtual address {virt:#x} is already mapped or not on a page boundary; this is a fault of the loader"
    )]
    Mapping {
        /// The virtual address.
        virt: u64,
    },
    /// There is no room for something the loader has to place.
    #[error("no {bytes} bytes of free contiguous memory for {what}; give the machine more memory")]
    OutOfMemory {
        /// For what.
        what: &'static str,
        /// How much.
        bytes: u64,
    },
    /// The firmware's memory map has more pieces than fit into the hand-off.
    #[error("the firmware's memory map has more than {max} separate pieces; update the firmware")]
    TooManyRegions {
        /// How many fit.
        max: usize,
    },
    /// The firmware's memory map holds no usable memory at all.
    #[error("the firmware's memory map shows no usable memory; update the firmware")]
    NoMemory,
}
