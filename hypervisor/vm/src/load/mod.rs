//! Getting a kernel image into a fresh guest's memory, and what its first virtual CPU starts with.
//!
//! Three kinds of image, one shape: check the headers, take the places that the image names, find
//! places for what the loader adds (boot information, command line, modules, page tables), and
//! write. Every range goes through [`Ram`], which refuses what is not RAM of the guest or is taken
//! already, so an image can be garbage and the worst outcome is an error.

mod elf;
mod entry;
mod linux;
mod multiboot;
mod pvh;
mod ram;
mod sniff;
#[cfg(test)]
pub(crate) mod tests;

use alloc::{borrow::ToOwned, string::String, vec::Vec};
use core::fmt;

use arch::{GuestMemory, GuestPhysAddr, MemoryFault};

use crate::{config::Kind, layout::MemoryLayout};
pub use entry::{EntryState, Mode};
use ram::Ram;
pub use sniff::{Looks, sniff};

/// The loader's name, for guests that ask.
pub const LOADER_NAME: &str = "Tessera";

/// An image and its name.
#[derive(Clone, Copy, Debug)]
pub struct Image<'a> {
    /// Name in the bundle.
    pub name: &'a str,
    /// Contents.
    pub data: &'a [u8],
}

/// What to load.
#[derive(Clone, Copy, Debug)]
pub struct Boot<'a, 'i> {
    /// How the kernel wants to be loaded.
    pub kind: Kind,
    /// The kernel.
    pub kernel: Image<'i>,
    /// Linux: the initial RAM disk. Otherwise: the first module.
    pub initrd: Option<Image<'i>>,
    /// Further modules (multiboot and PVH).
    pub modules: &'a [Image<'i>],
    /// The kernel's command line.
    pub cmdline: &'a str,
}

/// Loads `boot` into `memory`, which must be fresh: laid out as `layout` says, and all zero, so
/// that BSS needs no writing. `rsdp` is the guest's ACPI root pointer. What is in the images is
/// still to be copied, by [`Copies::step`].
///
/// # Errors
/// What is wrong with an image, or why it does not fit. The memory is then to be thrown away.
pub fn load<'i>(
    boot: &Boot<'_, 'i>,
    layout: &MemoryLayout,
    memory: &mut dyn GuestMemory,
    rsdp: GuestPhysAddr,
) -> Result<(EntryState, Copies<'i>), LoadError> {
    let mut ram = Ram::new(layout, memory);
    let entry = match boot.kind {
        Kind::Linux => linux::load(boot, &mut ram, rsdp),
        Kind::Multiboot => multiboot::load(boot, &mut ram),
        Kind::Pvh => pvh::load(boot, &mut ram, rsdp),
    }?;
    let mut copies = ram.copies;
    copies.parts.reverse();
    Ok((entry, copies))
}

/// The most that is copied at once. Pieces end at its multiples in the guest's memory, so that
/// none needs more than one frame.
const PIECE: u64 = 64 << 10;

/// The parts of images that a guest's memory is still to get.
#[derive(Debug, Default)]
pub struct Copies<'i> {
    /// Where each goes; the next one is last.
    parts: Vec<(u64, Image<'i>)>,
}

impl<'i> Copies<'i> {
    fn push(&mut self, at: u64, part: Image<'i>) {
        self.parts.push((at, part));
    }

    /// Copies the next piece; `true` when nothing is left.
    ///
    /// # Errors
    /// The memory cannot be written.
    pub fn step(&mut self, memory: &mut dyn GuestMemory) -> Result<bool, LoadError> {
        let Some((at, part)) = self.parts.last_mut() else {
            return Ok(true);
        };
        let room = PIECE - *at % PIECE;
        let (now, rest) = usize::try_from(room)
            .ok()
            .and_then(|room| part.data.split_at_checked(room))
            .unwrap_or((part.data, &[]));
        memory
            .write(GuestPhysAddr::new(*at), now)
            .map_err(|fault| Problem::Memory(fault).of(part))?;
        *at += now.len() as u64;
        part.data = rest;
        if rest.is_empty() {
            self.parts.pop();
        }
        Ok(self.parts.is_empty())
    }
}

/// Why an image could not be loaded.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{image}`: {problem}")]
pub struct LoadError {
    /// The image's name.
    pub image: String,
    /// What is wrong.
    pub problem: Problem,
}

/// The ways in which loading can fail.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Problem {
    /// Another kind of image than the configuration says.
    #[error("is {looks}, not {}{}", wanted_image(*.wanted), Remedy(*.wanted, .looks))]
    WrongKind {
        /// By the configuration.
        wanted: Kind,
        /// By its contents.
        looks: Looks,
    },
    /// The file ends too early.
    #[error("is truncated: {what} ends at byte {end:#x}, the file at {size:#x}")]
    Truncated {
        /// What is cut off.
        what: &'static str,
        /// Where it would end.
        end: u64,
        /// The file's size.
        size: u64,
    },
    /// A header field that cannot be worked with.
    #[error("{field} is {found:#x}; {right}")]
    Field {
        /// Which one.
        field: &'static str,
        /// Its value.
        found: u64,
        /// What would be right.
        right: &'static str,
    },
    /// No free RAM for something.
    #[error("{what} of {size} bytes finds no room: the VM has {memory} KiB of RAM; raise `memory`")]
    NoRoom {
        /// For what.
        what: &'static str,
        /// Its size.
        size: u64,
        /// RAM that the guest may use, in KiB.
        memory: u64,
    },
    /// A place that the image names is not RAM the guest may use.
    #[error(
        "{what} belongs at {start:#x}..{end:#x}, where the VM has no usable RAM (it has {memory} KiB in all)"
    )]
    OutsideRam {
        /// What.
        what: &'static str,
        /// First address.
        start: u64,
        /// The address after the last.
        end: u64,
        /// RAM that the guest may use, in KiB.
        memory: u64,
    },
    /// Two things at one place.
    #[error("{what} at {start:#x}..{end:#x} overlaps {other}")]
    Overlap {
        /// What.
        what: &'static str,
        /// First address.
        start: u64,
        /// The address after the last.
        end: u64,
        /// What is there already.
        other: &'static str,
    },
    /// The kernel takes shorter command lines only.
    #[error("takes a command line of at most {limit} bytes, but `cmdline` has {length}")]
    CommandLine {
        /// By the kernel's header.
        limit: u64,
        /// By the configuration.
        length: u64,
    },
    /// Guest memory could not be written.
    #[error("guest memory: {}", fault(.0))]
    Memory(MemoryFault),
}

impl Problem {
    /// This problem, put down to an image.
    fn of(self, image: &Image<'_>) -> LoadError {
        LoadError {
            image: image.name.to_owned(),
            problem: self,
        }
    }
}

fn wanted_image(kind: Kind) -> &'static str {
    match kind {
        Kind::Linux => "a Linux bzImage",
        Kind::Multiboot => "a multiboot (version 1) kernel",
        Kind::Pvh => "an ELF with a PVH entry note",
    }
}

struct Remedy<'a>(Kind, &'a Looks);

impl fmt::Display for Remedy<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.1.kind {
            Some(kind) if kind != self.0 => write!(f, "; use kind = \"{}\"", kind.name()),
            _ => Ok(()),
        }
    }
}

fn fault(fault: &MemoryFault) -> String {
    use alloc::format;
    match fault {
        MemoryFault::NotRam(addr) => format!("no RAM at {addr}"),
        MemoryFault::ReadOnly(addr) => format!("{addr} cannot be written"),
        MemoryFault::OutOfMemory(addr) => {
            format!("the machine has no free frame for {addr}; run fewer or smaller VMs")
        }
    }
}
