//! The plain `mov` between a register or an immediate and a device: what a 64-bit kernel compiles
//! its `readl` and `writel` to, and by far the most frequent emulation (local APIC, HPET, virtio).
//!
//! The exit tells the guest-physical address, so the operand needs no walk, and the encoding is
//! simple enough to need no decoder. Every condition that does not hold leads to the general way.

use arch::{
    Access, ControlRegister, Cr0, Efer, Gpr, GuestMemory, GuestPhysAddr, PAGE_SIZE,
    SegmentRegister, Vcpu,
};

use super::{Done, MmioBus, retire};
use crate::paging::{PagingState, quick};

/// The instruction, taken apart.
struct Mov {
    length: u64,
    size: u8,
    /// The effective address.
    address: u64,
    operand: Operand,
}

enum Operand {
    /// Read the device into this register.
    Load(Gpr),
    /// Write this register to the device.
    Store(Gpr),
    /// Write this to the device.
    Immediate(u64),
}

/// Executes the instruction at RIP if it is a plain 4- or 8-byte `mov` (88 and 8A excepted, no
/// prefix but REX) in 64-bit mode whose whole operand is not RAM and begins at `addr`; `None`,
/// and nothing has happened, if not.
#[inline]
pub fn fast_mov<V: Vcpu + ?Sized, M: GuestMemory + ?Sized, B: MmioBus + ?Sized>(
    vcpu: &mut V,
    mem: &mut M,
    bus: &mut B,
    addr: GuestPhysAddr,
    access: Access,
) -> Option<Done> {
    let rip = vcpu.rip();
    // Only 64-bit mode has addresses beyond 4 GiB: there CS need not be looked at. What is read
    // below stays in the page.
    let efer = vcpu.efer();
    let long =
        rip >> 32 != 0 || efer & Efer::LMA.bits() != 0 && vcpu.rights(SegmentRegister::Cs).long();
    if !long || rip % PAGE_SIZE > PAGE_SIZE - 24 {
        return None;
    }
    // What the walk for a fetch in 64-bit mode needs, and no more: each may cost a VMREAD.
    let paging = PagingState {
        cr0: Cr0::PG.union(Cr0::PE).bits(),
        cr3: vcpu.cr(ControlRegister::Cr3),
        cr4: vcpu.cr(ControlRegister::Cr4),
        efer,
        ac: false,
        cpl: vcpu.cpl(),
        pkru: 0,
        phys_bits: 52,
    };
    let code = quick(&paging, mem, rip, Access::EXECUTE)?;
    // Two aligned words hold nine bytes or more: all but an immediate operand.
    let (word, skip) = (code.align_down(8), code.offset_in(8));
    let low = mem.read_u64(word).ok()?;
    let high = mem.read_u64(word.wrapping_add(8)).ok()?;
    let join = |low: u64, high: u64| low >> (8 * skip) | high << 8 << (56 - 8 * skip);
    let mut mov = take_apart(vcpu, rip, join(low, high))?;
    if let Operand::Immediate(value) = &mut mov.operand {
        let next = mem.read_u64(word.wrapping_add(16)).ok()?;
        let bytes = u128::from(join(low, high)) | u128::from(join(high, next)) << 64;
        // It ends the instruction.
        *value = (bytes >> (8 * (mov.length - 4))) as i32 as u64;
    }
    // The address that faulted may be in the operand's second page, and the code may have changed
    // since: only equal offsets in the page make `addr` the operand's first byte.
    let offset = addr.offset_in(PAGE_SIZE);
    let end = offset + u64::from(mov.size);
    if mov.address % PAGE_SIZE != offset || end > PAGE_SIZE {
        return None;
    }
    match mov.operand {
        Operand::Load(gpr) if !access.write => {
            let value = bus.read(addr, mov.size);
            vcpu.set_gpr(gpr, value);
        }
        Operand::Store(gpr) if access.write => {
            let value = vcpu.gpr(gpr);
            bus.write(addr, mov.size, truncate(value, mov.size));
        }
        Operand::Immediate(value) if access.write => {
            bus.write(addr, mov.size, truncate(value, mov.size));
        }
        _ => return None,
    }
    Some(retire(vcpu, rip.wrapping_add(mov.length)))
}

#[inline]
const fn truncate(value: u64, size: u8) -> u64 {
    if size == 4 {
        value & 0xffff_ffff
    } else {
        value
    }
}

/// Decodes `[REX] 89|8B|C7 ModRM [SIB] [disp]`, at most eight bytes (Intel SDM Vol. 2A §2.1.5,
/// §2.2.1). An immediate operand is left to the caller, but counted.
#[inline]
fn take_apart<V: Vcpu + ?Sized>(vcpu: &V, rip: u64, code: u64) -> Option<Mov> {
    let (rex, code, mut length) = if code & 0xf0 == 0x40 {
        (code as u8, code >> 8, 3)
    } else {
        (0, code, 2)
    };
    let (opcode, modrm) = (code as u8, (code >> 8) as u8);
    let mut rest = code >> 16;
    let (mode, reg, rm) = (modrm >> 6, modrm >> 3 & 7, modrm & 7);
    let operand = match opcode {
        0x89 => Operand::Store(Gpr::from_number(reg | rex << 1 & 8)),
        0x8b => Operand::Load(Gpr::from_number(reg | rex << 1 & 8)),
        0xc7 if reg == 0 => Operand::Immediate(0),
        _ => return None,
    };
    if mode == 3 {
        return None;
    }
    let mut address = 0u64;
    let mut relative = false;
    let mut wide = mode == 2;
    if rm == 4 {
        let sib = rest as u8;
        rest >>= 8;
        length += 1;
        let (base, index) = (sib & 7, sib >> 3 & 7 | rex << 2 & 8);
        if base == 5 && mode == 0 {
            wide = true;
        } else {
            address = vcpu.gpr(Gpr::from_number(base | rex << 3 & 8));
        }
        if index != 4 {
            let index = vcpu.gpr(Gpr::from_number(index));
            address = address.wrapping_add(index << (sib >> 6));
        }
    } else if rm == 5 && mode == 0 {
        relative = true;
        wide = true;
    } else {
        address = vcpu.gpr(Gpr::from_number(rm | rex << 3 & 8));
    }
    if wide {
        address = address.wrapping_add(rest as i32 as u64);
        length += 4;
    } else if mode == 1 {
        address = address.wrapping_add(rest as i8 as u64);
        length += 1;
    }
    if opcode == 0xc7 {
        length += 4;
    }
    if relative {
        address = address.wrapping_add(rip).wrapping_add(length);
    }
    Some(Mov {
        length,
        size: if rex & 8 != 0 { 8 } else { 4 },
        address,
        operand,
    })
}
