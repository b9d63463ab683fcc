//! Instruction fetch: CS:RIP to bytes and to a decoded instruction (Intel SDM Vol. 3A §5.3,
//! §5.13; Vol. 2A §2.3.11 for the limit of 15 bytes).

use core::fmt;

use arch::{Access, Efer, GuestMemory, PAGE_SIZE, SegmentRegister, Vcpu};
use iced_x86::{Decoder, DecoderError, DecoderOptions, Instruction};

use super::{Fault, Stop, read_code};
use crate::paging::{PagingState, translate};

/// The longest instruction in bytes.
const MAX: u64 = 15;

/// Instruction bytes, as far as they were fetched.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
pub struct Code {
    bytes: [u8; MAX as usize],
    len: u8,
}

impl Code {
    /// The bytes.
    #[must_use]
    pub fn as_slice(&self) -> &[u8] {
        self.bytes.get(..usize::from(self.len)).unwrap_or_default()
    }

    /// The bytes of an instruction of `len` bytes.
    pub(super) fn truncated(mut self, len: usize) -> Self {
        self.len = self.len.min(u8::try_from(len).unwrap_or(u8::MAX));
        self
    }
}

impl fmt::Display for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, byte) in self.as_slice().iter().enumerate() {
            let gap = if i == 0 { "" } else { " " };
            write!(f, "{gap}{byte:02x}")?;
        }
        Ok(())
    }
}

impl fmt::Debug for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "[{self}]")
    }
}

/// How code is addressed and read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CodeMode {
    /// 16, 32 or 64: default operand and address size of the code segment.
    pub bits: u8,
    /// Base of CS; 0 in 64-bit mode.
    pub base: u64,
    /// The last address in CS; all of it in 64-bit mode.
    pub limit: u64,
}

impl CodeMode {
    /// 64-bit mode.
    pub const LONG: Self = Self {
        bits: 64,
        base: 0,
        limit: u64::MAX,
    };

    /// The mode this vCPU runs in.
    pub fn of<V: Vcpu + ?Sized>(vcpu: &V) -> Self {
        let cs = vcpu.segment(SegmentRegister::Cs);
        if vcpu.efer() & Efer::LMA.bits() != 0 && cs.rights.long() {
            return Self::LONG;
        }
        Self {
            bits: if cs.rights.default_big() { 32 } else { 16 },
            base: cs.base,
            limit: cs.limit.into(),
        }
    }

    /// Whether this is 64-bit mode.
    #[must_use]
    pub const fn long(&self) -> bool {
        self.bits == 64
    }

    /// The linear address of an offset in CS.
    #[must_use]
    pub const fn linear(&self, rip: u64) -> u64 {
        if self.long() {
            rip
        } else {
            self.base.wrapping_add(rip) & 0xffff_ffff
        }
    }

    /// `rip` moved on by `length` bytes.
    #[must_use]
    pub const fn advance(&self, rip: u64, length: u64) -> u64 {
        let next = rip.wrapping_add(length);
        if self.long() {
            next
        } else {
            next & 0xffff_ffff
        }
    }
}

/// An instruction about to be executed.
pub(super) struct Fetched {
    pub rip: u64,
    pub mode: CodeMode,
    pub paging: PagingState,
    pub code: Code,
    pub instruction: Instruction,
}

impl Fetched {
    /// Fetches and decodes the instruction at RIP. What was read of it is in `code` even if that
    /// fails.
    pub fn at_rip(
        vcpu: &dyn Vcpu,
        mem: &mut dyn GuestMemory,
        code: &mut Code,
        options: u32,
    ) -> Result<Self, Stop> {
        let mode = CodeMode::of(vcpu);
        let paging = PagingState::of(vcpu);
        let rip = vcpu.rip();
        let rip = if mode.long() { rip } else { rip & 0xffff_ffff };

        // Bytes that CS allows, and of these the ones in the first page.
        if rip > mode.limit {
            return Err(Fault::GP0.into());
        }
        let allowed = (mode.limit - rip).saturating_add(1).min(MAX);
        let linear = mode.linear(rip);
        let first = (PAGE_SIZE - linear % PAGE_SIZE).min(allowed);
        fetch_more(&mode, &paging, mem, linear, first, code)?;
        let mut decoded = decode(&mode, code, rip, options);
        if matches!(decoded, Err(DecoderError::NoMoreBytes)) && first < allowed {
            let linear = mode.linear(rip.wrapping_add(first));
            fetch_more(&mode, &paging, mem, linear, allowed - first, code)?;
            decoded = decode(&mode, code, rip, options);
        }
        match decoded {
            Ok(instruction) => Ok(Self {
                rip,
                mode,
                paging,
                code: code.truncated(instruction.len()),
                instruction,
            }),
            // Longer than CS or than an instruction may be.
            Err(DecoderError::NoMoreBytes) => Err(Fault::GP0.into()),
            Err(_) if too_long(&mode, code, rip, options) => Err(Fault::GP0.into()),
            // An instruction that decodes, but not with this LOCK prefix or these operands.
            Err(_) if decode(&mode, code, rip, DecoderOptions::NO_INVALID_CHECK).is_ok() => {
                Err(Fault::UD.into())
            }
            Err(_) => Err(Stop::Undecodable),
        }
    }

    /// RIP after the instruction.
    pub fn next(&self) -> u64 {
        self.mode.advance(self.rip, self.instruction.len() as u64)
    }
}

/// Whether all 15 bytes are not enough; the decoder calls that invalid.
fn too_long(mode: &CodeMode, code: &Code, rip: u64, options: u32) -> bool {
    let shorter = code.truncated(MAX as usize - 1);
    shorter != *code
        && matches!(
            decode(mode, &shorter, rip, options),
            Err(DecoderError::NoMoreBytes)
        )
}

fn fetch_more(
    mode: &CodeMode,
    paging: &PagingState,
    mem: &mut dyn GuestMemory,
    linear: u64,
    count: u64,
    code: &mut Code,
) -> Result<(), Stop> {
    if mode.long() && !paging.canonical(linear) {
        return Err(Fault::GP0.into());
    }
    let addr = translate(paging, mem, linear, Access::EXECUTE)?;
    let start = usize::from(code.len);
    let end = (start + count as usize).min(code.bytes.len());
    if let Some(bytes) = code.bytes.get_mut(start..end) {
        read_code(mem, addr, bytes)?;
        code.len = end as u8;
    }
    Ok(())
}

fn decode(
    mode: &CodeMode,
    code: &Code,
    rip: u64,
    options: u32,
) -> Result<Instruction, DecoderError> {
    let bytes = code.as_slice();
    let mut decoder = Decoder::with_ip(u32::from(mode.bits), bytes, rip, options);
    let instruction = decoder.decode();
    match decoder.last_error() {
        DecoderError::None => Ok(instruction),
        error => Err(error),
    }
}
