//! Executing guest instructions in software: those that touch a device's memory, string port
//! accesses, and finding the end of an instruction where the hardware does not tell it.
//!
//! Decoding is iced-x86's, execution is ours. An instruction is fetched through the guest's own
//! page tables, its operands are located and checked in full (segmentation, canonical form,
//! paging) before the first side effect, and only then it acts: a fault leaves the vCPU as it was
//! at the instruction, as the architecture wants (Intel SDM Vol. 3A §6.5).
//!
//! Two short ways stand ahead of the decoder, because they are what guests do all day:
//! [`next_rip`] compares the bytes with what the exit reason implies, and [`fast_mov`] does the
//! plain `mov` to and from a device at the address the exit told.
//!
//! iced-x86 builds its tables on the heap when it first decodes; [`prepare`] does that at a time
//! of the caller's choice, so that no exit pays for it.

mod execute;
mod fast;
mod fetch;
mod flags;
mod length;
mod operand;
mod string;
mod string_io;
#[cfg(test)]
mod tests;

use core::fmt;

use arch::{
    DebugRegister, Event, Exception, GuestMemory, GuestPhysAddr, MemoryFault, RFlags, Vcpu,
};

use crate::paging::TranslateFault;

pub use execute::emulate;
pub use fast::fast_mov;
pub use fetch::{Code, CodeMode};
pub use length::{
    CodePage, DrAccess, Expected, LengthError, decode_cr, decode_dr, decode_invlpg,
    decode_next_rip, next_rip, plain_next_rip,
};
pub use string_io::string_io;

/// Guest-physical addresses that are not RAM.
pub trait MmioBus {
    /// Reads `size` (1 to 8, a power of two) bytes at `addr`, which need not be aligned.
    fn read(&mut self, addr: GuestPhysAddr, size: u8) -> u64;
    /// Writes the low `size` bytes of `value`. Writes to ROM come here too.
    fn write(&mut self, addr: GuestPhysAddr, size: u8, value: u64);
}

/// The port space.
pub trait PortBus {
    /// Reads `size` (1, 2 or 4) bytes at `port`.
    fn read(&mut self, port: u16, size: u8) -> u32;
    /// Writes the low `size` bytes of `value`.
    fn write(&mut self, port: u16, size: u8, value: u32);
}

/// An exception for the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    /// What to inject.
    pub event: Event,
    /// The value for CR2, if it is a page fault.
    pub cr2: Option<u64>,
}

impl Fault {
    /// #UD
    pub const UD: Self = Self {
        event: Event::UD,
        cr2: None,
    };
    /// #GP(0)
    pub const GP0: Self = Self {
        event: Event::GP0,
        cr2: None,
    };
    /// #SS(0)
    pub const SS0: Self = Self::exception(Exception::StackFault, Some(0));
    /// #DE
    pub const DE: Self = Self::exception(Exception::DivideError, None);

    const fn exception(exception: Exception, error_code: Option<u32>) -> Self {
        Self {
            event: Event::Exception {
                exception,
                error_code,
            },
            cr2: None,
        }
    }

    const fn page(error_code: u32, linear: u64) -> Self {
        Self {
            event: Event::page_fault(error_code),
            cr2: Some(linear),
        }
    }

    /// Writes CR2 and queues the exception; `false` means a triple fault.
    #[must_use]
    pub fn deliver<V: Vcpu + ?Sized>(&self, vcpu: &mut V) -> bool {
        if let Some(linear) = self.cr2 {
            vcpu.set_cr2(linear);
        }
        raise(vcpu, self.event)
    }
}

/// Queues an exception that software found; `false` means a triple fault. A fault goes on the
/// stack with RF set, so that no instruction breakpoint comes between the handler's return and the
/// second try. That is up to who injects it (Intel SDM Vol. 3B §18.3.1.1, Vol. 3C §27.6.1.1).
#[must_use]
pub fn raise<V: Vcpu + ?Sized>(vcpu: &mut V, event: Event) -> bool {
    use Exception::{Breakpoint, Debug, DoubleFault, MachineCheck, Overflow};
    if let Event::Exception { exception, .. } = event
        && !matches!(
            exception,
            Breakpoint | Debug | DoubleFault | MachineCheck | Overflow
        )
    {
        vcpu.set_rflags(vcpu.rflags().union(RFlags::RF));
    }
    vcpu.inject(event)
}

/// How an emulated instruction ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Done {
    /// It is complete, RIP is past it.
    Next,
    /// It is complete, RIP is past it, and a single-step trap (#DB, DR6.BS is set) follows.
    Trap(Fault),
    /// RIP is still on it: a repeated string instruction did a share of its work and goes on at
    /// the next entry (interrupts may come between), or the guest's code no longer is what the
    /// exit told.
    Again,
    /// It faulted. Nothing of it has happened, save whole iterations of a string instruction.
    Fault(Fault),
}

impl Done {
    /// Queues the exception, if there is one; `false` means a triple fault.
    #[must_use]
    pub fn deliver<V: Vcpu + ?Sized>(&self, vcpu: &mut V) -> bool {
        match self {
            Self::Next | Self::Again => true,
            Self::Trap(fault) | Self::Fault(fault) => fault.deliver(vcpu),
        }
    }
}

/// The instruction cannot be emulated; the VM cannot go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EmulateError {
    /// No instruction this decoder knows.
    Undecodable {
        /// Where.
        rip: u64,
        /// What stands there.
        bytes: Code,
    },
    /// An instruction that never is emulated.
    Unsupported {
        /// Where.
        rip: u64,
        /// What stands there.
        bytes: Code,
        /// What it would take.
        what: &'static str,
    },
    /// The code, a paging structure or an operand has no memory behind it.
    Memory {
        /// Where the instruction is.
        rip: u64,
        /// What failed.
        fault: MemoryFault,
    },
}

impl fmt::Display for EmulateError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Undecodable { rip, bytes } => {
                write!(f, "undecodable instruction at rip {rip:#x}: {bytes}")
            }
            Self::Unsupported { rip, bytes, what } => {
                write!(f, "cannot emulate {what} at rip {rip:#x}: {bytes}")
            }
            Self::Memory { rip, fault } => {
                write!(
                    f,
                    "no memory for the instruction at rip {rip:#x}: {fault:?}"
                )
            }
        }
    }
}

impl core::error::Error for EmulateError {}

/// Why execution stopped short; [`finish`] turns it into what callers see.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stop {
    Fault(Fault),
    Memory(MemoryFault),
    Undecodable,
    Unsupported(&'static str),
}

impl From<Fault> for Stop {
    fn from(fault: Fault) -> Self {
        Self::Fault(fault)
    }
}

impl From<TranslateFault> for Stop {
    fn from(fault: TranslateFault) -> Self {
        match fault {
            TranslateFault::PageFault { error_code, linear } => {
                Self::Fault(Fault::page(error_code, linear))
            }
            TranslateFault::Memory(fault) => Self::Memory(fault),
        }
    }
}

/// The outcome of an instruction at `rip`, whose bytes are `code` as far as they were read.
fn finish(rip: u64, code: &Code, outcome: Result<Done, Stop>) -> Result<Done, EmulateError> {
    let bytes = *code;
    match outcome {
        Ok(done) => Ok(done),
        Err(Stop::Fault(fault)) => Ok(Done::Fault(fault)),
        Err(Stop::Memory(fault)) => Err(EmulateError::Memory { rip, fault }),
        Err(Stop::Undecodable) => Err(EmulateError::Undecodable { rip, bytes }),
        Err(Stop::Unsupported(what)) => Err(EmulateError::Unsupported { rip, bytes, what }),
    }
}

/// Ends an instruction: RIP moves to `next`, RF falls, and with TF set a trap follows
/// (Intel SDM Vol. 3B §17.3.1).
#[inline(always)]
pub fn retire<V: Vcpu + ?Sized>(vcpu: &mut V, next: u64) -> Done {
    vcpu.set_rip(next);
    let rflags = vcpu.rflags();
    if rflags.intersects(RFlags::TF.union(RFlags::RF)) {
        return retire_traced(vcpu, rflags);
    }
    Done::Next
}

#[cold]
#[inline(never)]
fn retire_traced<V: Vcpu + ?Sized>(vcpu: &mut V, rflags: RFlags) -> Done {
    vcpu.set_rflags(rflags.difference(RFlags::RF));
    single_step(vcpu, rflags).map_or(Done::Next, Done::Trap)
}

/// The trap after an instruction, or an iteration of one, that began with TF set.
fn single_step<V: Vcpu + ?Sized>(vcpu: &mut V, rflags: RFlags) -> Option<Fault> {
    const BS: u64 = 1 << 14;
    if !rflags.contains(RFlags::TF) {
        return None;
    }
    let dr6 = vcpu.dr(DebugRegister::Dr6);
    vcpu.set_dr(DebugRegister::Dr6, dr6 | BS);
    Some(Fault::exception(Exception::Debug, None))
}

/// Builds the decoder's tables (some 80 KiB of heap), so that no exit has to.
pub fn prepare() {
    let mut decoder = iced_x86::Decoder::new(64, &[0x90], 0);
    let _ = decoder.decode();
}

/// Copies up to eight bytes into the low end of a number.
fn little_endian(bytes: &[u8]) -> u64 {
    bytes
        .iter()
        .rev()
        .fold(0, |value, &byte| value << 8 | u64::from(byte))
}

/// Reads code without looking at more of memory than `bytes`.
fn read_code(mem: &mut dyn GuestMemory, addr: GuestPhysAddr, bytes: &mut [u8]) -> Result<(), Stop> {
    mem.read(addr, bytes).map_err(Stop::Memory)
}
