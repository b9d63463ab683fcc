//! Operands: registers, effective addresses, segmentation, and memory that is RAM on one side and
//! a device on the other.

use arch::{
    Access, Gpr, GuestMemory, GuestPhysAddr, MemoryFault, PAGE_SIZE, RFlags, Segment,
    SegmentRegister, Vcpu,
};
use iced_x86::{Instruction, MemorySize, OpKind, Register};

use super::fetch::{CodeMode, Fetched};
use super::flags::mask;
use super::{Fault, MmioBus, Stop, little_endian};
use crate::paging::{PagingState, translate};

/// The world an instruction acts on.
pub(super) struct Core<'a> {
    pub vcpu: &'a mut dyn Vcpu,
    pub mem: &'a mut dyn GuestMemory,
    /// `None`: memory operands must be RAM.
    pub bus: Option<&'a mut dyn MmioBus>,
    pub mode: CodeMode,
    pub paging: PagingState,
}

/// A general-purpose register or a part of one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Reg {
    pub gpr: Gpr,
    pub size: u8,
    /// AH, CH, DH, BH
    pub high: bool,
}

impl Reg {
    /// The register of iced's name, if it is a general-purpose one.
    pub fn from_iced(register: Register) -> Option<Self> {
        let number = register as u8;
        let base = |first: Register| number.wrapping_sub(first as u8);
        let (gpr, size, high) = match register as u32 {
            r if r < Register::AL as u32 => return None,
            r if r < Register::AH as u32 => (base(Register::AL), 1, false),
            r if r < Register::SPL as u32 => (base(Register::AH), 1, true),
            r if r < Register::AX as u32 => (base(Register::SPL) + 4, 1, false),
            r if r < Register::EAX as u32 => (base(Register::AX), 2, false),
            r if r < Register::RAX as u32 => (base(Register::EAX), 4, false),
            r if r < Register::EIP as u32 => (base(Register::RAX), 8, false),
            _ => return None,
        };
        Some(Self {
            gpr: Gpr::from_number(gpr),
            size,
            high,
        })
    }

    /// RAX, RCX or the like, `size` bytes of it.
    pub const fn part(gpr: Gpr, size: u8) -> Self {
        Self {
            gpr,
            size,
            high: false,
        }
    }
}

/// Memory located for an access: checked, translated, and in at most two pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Span {
    addr: GuestPhysAddr,
    /// Where the rest goes on, and how many bytes stand before it.
    rest: Option<(GuestPhysAddr, u8)>,
    pub size: u8,
}

impl Span {
    /// `size` bytes in one page.
    pub const fn within(addr: GuestPhysAddr, size: u8) -> Self {
        Self {
            addr,
            rest: None,
            size,
        }
    }

    /// The page of the first byte.
    pub const fn frame(&self) -> GuestPhysAddr {
        self.addr.align_down(PAGE_SIZE)
    }

    /// Whether it is a multiple of `align`, a power of two up to the page size.
    pub const fn is_aligned(&self, align: u64) -> bool {
        self.addr.is_aligned(align)
    }
}

/// An operand that can be read and perhaps written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    Reg(Reg),
    Memory(Span),
    Immediate(u64),
    /// The selector in a segment register; 2 bytes.
    Selector(SegmentRegister),
}

/// The segment register of iced's name.
pub(super) fn segment_register(register: Register) -> Option<SegmentRegister> {
    Some(match register {
        Register::ES => SegmentRegister::Es,
        Register::CS => SegmentRegister::Cs,
        Register::SS => SegmentRegister::Ss,
        Register::DS => SegmentRegister::Ds,
        Register::FS => SegmentRegister::Fs,
        Register::GS => SegmentRegister::Gs,
        _ => return None,
    })
}

/// Bytes of a memory operand; `None` for vectors, floats and structures.
fn memory_size(instruction: &Instruction) -> Option<u8> {
    Some(match instruction.memory_size() {
        MemorySize::UInt8 | MemorySize::Int8 => 1,
        MemorySize::UInt16 | MemorySize::Int16 | MemorySize::WordOffset => 2,
        MemorySize::UInt32 | MemorySize::Int32 | MemorySize::DwordOffset => 4,
        MemorySize::UInt64 | MemorySize::Int64 | MemorySize::QwordOffset => 8,
        _ => return None,
    })
}

/// The effective address, `bytes` further on than the operand says.
fn effective_address(vcpu: &dyn Vcpu, mode: &CodeMode, i: &Instruction, bytes: u64) -> u64 {
    let (base, index) = (i.memory_base(), i.memory_index());
    // RIP-relative displacements come as the absolute target.
    let part = |register| Reg::from_iced(register);
    let size = match (base, part(base).or(part(index))) {
        (Register::RIP, _) => 8,
        (Register::EIP, _) => 4,
        (_, Some(reg)) => reg.size,
        _ => match i.memory_displ_size() {
            2 => 2,
            4 => 4,
            8 => 8,
            _ => mode.bits / 8,
        },
    };
    let value = |register| part(register).map_or(0, |reg: Reg| vcpu.gpr(reg.gpr) & mask(reg.size));
    let address = value(base)
        .wrapping_add(value(index).wrapping_mul(u64::from(i.memory_index_scale())))
        .wrapping_add(i.memory_displacement64())
        .wrapping_add(bytes);
    address & mask(size)
}

impl Core<'_> {
    /// The linear address of `offset` in a segment, checked for an access of `size` bytes
    /// (Intel SDM Vol. 3A §5.3–5.5; Vol. 1 §3.3.7.1 for canonical form).
    pub fn linear(
        &self,
        segment: SegmentRegister,
        offset: u64,
        size: u64,
        write: bool,
    ) -> Result<u64, Stop> {
        let fault = if segment == SegmentRegister::Ss {
            Fault::SS0
        } else {
            Fault::GP0
        };
        let last = size.saturating_sub(1);
        if self.mode.long() {
            let base = match segment {
                SegmentRegister::Fs | SegmentRegister::Gs => self.vcpu.segment(segment).base,
                _ => 0,
            };
            let linear = base.wrapping_add(offset);
            let end = linear.wrapping_add(last);
            if self.paging.canonical(linear) && self.paging.canonical(end) {
                return Ok(linear);
            }
            return Err(fault.into());
        }
        let descriptor = self.vcpu.segment(segment);
        if self.protected() && !may_access(&descriptor, write) {
            return Err(fault.into());
        }
        let limit = u64::from(descriptor.limit);
        let end = offset + last;
        let kind = descriptor.rights.kind();
        let expand_down = kind & 0b1100 == 0b0100 && self.protected();
        let inside = if expand_down {
            let top = if descriptor.rights.default_big() {
                0xffff_ffff
            } else {
                0xffff
            };
            offset > limit && end <= top
        } else {
            end <= limit
        };
        if inside {
            Ok(descriptor.base.wrapping_add(offset) & 0xffff_ffff)
        } else {
            Err(fault.into())
        }
    }

    /// Protected mode proper: neither real mode nor virtual-8086 mode, in which segments have no
    /// rights.
    fn protected(&self) -> bool {
        self.paging.cr0 & 1 != 0 && !self.vcpu.rflags().contains(RFlags::VM)
    }

    /// Translates `size` (at most 8) bytes at a checked linear address.
    pub fn span(&mut self, linear: u64, size: u8, access: Access) -> Result<Span, Stop> {
        let addr = translate(&self.paging, self.mem, linear, access)?;
        let here = PAGE_SIZE - linear % PAGE_SIZE;
        let rest = if here < u64::from(size) {
            let linear = linear.wrapping_add(here);
            let linear = if self.mode.long() {
                linear
            } else {
                linear & 0xffff_ffff
            };
            let rest = translate(&self.paging, self.mem, linear, access)?;
            Some((rest, here as u8))
        } else {
            None
        };
        Ok(Span { addr, rest, size })
    }

    /// Locates `size` bytes at `offset` of a segment.
    pub fn locate(
        &mut self,
        segment: SegmentRegister,
        offset: u64,
        size: u8,
        access: Access,
    ) -> Result<Span, Stop> {
        let linear = self.linear(segment, offset, size.into(), access.write)?;
        self.span(linear, size, access)
    }

    /// Reads located memory.
    pub fn load(&mut self, span: &Span) -> Result<u64, Stop> {
        match span.rest {
            None => self.load_part(span.addr, span.size),
            Some((rest, here)) => {
                let low = self.load_part(span.addr, here)?;
                let high = self.load_part(rest, span.size - here)?;
                Ok(low | high << (8 * here))
            }
        }
    }

    /// Writes located memory.
    pub fn store(&mut self, span: &Span, value: u64) -> Result<(), Stop> {
        match span.rest {
            None => self.store_part(span.addr, span.size, value),
            Some((rest, here)) => {
                self.store_part(span.addr, here, value)?;
                self.store_part(rest, span.size - here, value >> (8 * here))
            }
        }
    }

    /// Reads 1 to 8 bytes within a page.
    fn load_part(&mut self, addr: GuestPhysAddr, size: u8) -> Result<u64, Stop> {
        let read = match size {
            8 if addr.is_aligned(8) => self.mem.read_u64(addr),
            4 if addr.is_aligned(4) => self.mem.read_u32(addr).map(u64::from),
            _ => {
                let mut bytes = [0; 8];
                let part = bytes.get_mut(..usize::from(size)).unwrap_or_default();
                let read = self.mem.read(addr, part);
                read.map(|()| little_endian(&bytes))
            }
        };
        match (read, &mut self.bus) {
            (Err(MemoryFault::NotRam(_)), Some(bus)) => {
                let mut value = 0;
                for (at, size) in pieces(size) {
                    value |= (bus.read(addr.wrapping_add(at), size) & mask(size)) << (8 * at);
                }
                Ok(value)
            }
            (Err(MemoryFault::NotRam(_)), None) => {
                Err(Stop::Unsupported("an operand in a device's memory"))
            }
            (read, _) => read.map_err(Stop::Memory),
        }
    }

    /// Writes 1 to 8 bytes within a page.
    fn store_part(&mut self, addr: GuestPhysAddr, size: u8, value: u64) -> Result<(), Stop> {
        let bytes = value.to_le_bytes();
        let part = bytes.get(..usize::from(size)).unwrap_or_default();
        match (self.mem.write(addr, part), &mut self.bus) {
            (Err(MemoryFault::NotRam(_) | MemoryFault::ReadOnly(_)), Some(bus)) => {
                for (at, size) in pieces(size) {
                    bus.write(addr.wrapping_add(at), size, value >> (8 * at) & mask(size));
                }
                Ok(())
            }
            (Err(MemoryFault::NotRam(_)), None) => {
                Err(Stop::Unsupported("an operand in a device's memory"))
            }
            (Err(MemoryFault::ReadOnly(_)), None) => Ok(()),
            (written, _) => written.map_err(Stop::Memory),
        }
    }

    /// Replaces a value by `f` of it. With `lock` and in RAM the exchange is atomic; `f` may then
    /// run more than once.
    pub fn modify(
        &mut self,
        place: &Place,
        lock: bool,
        f: &mut dyn FnMut(u64) -> u64,
    ) -> Result<(), Stop> {
        let mut old = self.get(place)?;
        if let (true, Place::Memory(span)) = (lock, place)
            && span.addr.is_aligned(u64::from(span.size))
        {
            loop {
                let new = f(old);
                let addr = span.addr;
                match self.mem.compare_exchange(addr, span.size, old, new) {
                    Ok(found) if found == old => return Ok(()),
                    Ok(found) => old = found,
                    Err(MemoryFault::NotRam(_) | MemoryFault::ReadOnly(_)) => {
                        return self.store(span, new);
                    }
                    Err(fault) => return Err(Stop::Memory(fault)),
                }
            }
        }
        let new = f(old);
        self.set(place, new)
    }

    /// A register, or the part of it that is meant.
    pub fn reg(&self, reg: Reg) -> u64 {
        let value = self.vcpu.gpr(reg.gpr);
        let value = if reg.high { value >> 8 } else { value };
        value & mask(reg.size)
    }

    /// Writes a register: four bytes clear the upper half, fewer leave the rest alone.
    pub fn set_reg(&mut self, reg: Reg, value: u64) {
        let old = self.vcpu.gpr(reg.gpr);
        let (mask, value) = if reg.high {
            (0xff00, value << 8)
        } else {
            (mask(reg.size), value)
        };
        let kept = if reg.size == 4 { 0 } else { old & !mask };
        self.vcpu.set_gpr(reg.gpr, kept | value & mask);
    }

    /// Reads an operand.
    pub fn get(&mut self, place: &Place) -> Result<u64, Stop> {
        match place {
            Place::Reg(reg) => Ok(self.reg(*reg)),
            Place::Memory(span) => self.load(span),
            Place::Immediate(value) => Ok(*value),
            Place::Selector(register) => Ok(self.vcpu.segment(*register).selector.into()),
        }
    }

    /// Writes an operand.
    pub fn set(&mut self, place: &Place, value: u64) -> Result<(), Stop> {
        match place {
            Place::Reg(reg) => {
                self.set_reg(*reg, value);
                Ok(())
            }
            Place::Memory(span) => self.store(span, value),
            Place::Immediate(_) | Place::Selector(_) => {
                Err(Stop::Unsupported("a write to such an operand"))
            }
        }
    }

    /// Locates operand `n` of an instruction.
    pub fn place(&mut self, i: &Instruction, n: u32, access: Access) -> Result<Place, Stop> {
        match i.op_kind(n) {
            OpKind::Register => {
                let register = i.op_register(n);
                Reg::from_iced(register)
                    .map(Place::Reg)
                    .or_else(|| segment_register(register).map(Place::Selector))
                    .ok_or(Stop::Unsupported("an instruction with such a register"))
            }
            OpKind::Memory => {
                let size = memory_size(i).ok_or(Stop::Unsupported("an operand of this size"))?;
                self.memory(i, 0, size, access).map(Place::Memory)
            }
            _ => i
                .try_immediate(n)
                .map(Place::Immediate)
                .map_err(|_| Stop::Unsupported("an instruction with such an operand")),
        }
    }

    /// Locates the memory operand, `bytes` further on than it says.
    pub fn memory(
        &mut self,
        i: &Instruction,
        bytes: u64,
        size: u8,
        access: Access,
    ) -> Result<Span, Stop> {
        let offset = effective_address(self.vcpu, &self.mode, i, bytes);
        let segment = segment_register(i.memory_segment()).unwrap_or(SegmentRegister::Ds);
        self.locate(segment, offset, size, access)
    }
}

impl<'a> Core<'a> {
    /// The world of a fetched instruction.
    pub fn new(
        fetched: &Fetched,
        vcpu: &'a mut dyn Vcpu,
        mem: &'a mut dyn GuestMemory,
        bus: Option<&'a mut dyn MmioBus>,
    ) -> Self {
        Self {
            vcpu,
            mem,
            bus,
            mode: fetched.mode,
            paging: fetched.paging,
        }
    }
}

/// Whether a segment's type allows data accesses (Intel SDM Vol. 3A table 3-1).
fn may_access(segment: &Segment, write: bool) -> bool {
    let (rights, kind) = (segment.rights, segment.rights.kind());
    let code = kind & 8 != 0;
    let allowed = if write {
        !code && kind & 2 != 0
    } else {
        !code || kind & 2 != 0
    };
    allowed && rights.present() && !rights.unusable()
}

/// Cuts 1 to 8 bytes into powers of two, as a bus takes them: (offset, size).
fn pieces(size: u8) -> impl Iterator<Item = (u64, u8)> {
    let mut at = 0;
    core::iter::from_fn(move || {
        let left = size - at;
        let piece = 1u8.checked_shl(left.checked_ilog2()?)?;
        let offset = at;
        at += piece;
        Some((u64::from(offset), piece))
    })
}

/// The linear address of the memory operand without any check.
pub(super) fn unchecked_linear(vcpu: &dyn Vcpu, mode: &CodeMode, i: &Instruction) -> u64 {
    let offset = effective_address(vcpu, mode, i, 0);
    match segment_register(i.memory_segment()) {
        Some(segment @ (SegmentRegister::Fs | SegmentRegister::Gs)) if mode.long() => {
            vcpu.segment(segment).base.wrapping_add(offset)
        }
        Some(segment) if !mode.long() => {
            vcpu.segment(segment).base.wrapping_add(offset) & 0xffff_ffff
        }
        _ => offset,
    }
}
