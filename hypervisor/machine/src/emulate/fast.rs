//! The plain `mov` between a register or an immediate and a device: what a 64-bit kernel compiles
//! its `readl` and `writel` to, and by far the most frequent emulation (local APIC, HPET, virtio).
//!
//! The exit tells the guest-physical address, so the operand needs no walk, and the encoding is
//! simple enough to need no decoder. Every condition that does not hold leads to the general way.

use arch::{Access, Gpr, GuestMemory, GuestPhysAddr, PAGE_SIZE, Vcpu};

use super::execute::emulate;
use super::length::fetch_state;
use super::{Done, EmulateError, MmioBus, retire};
use crate::paging::translate;

/// [`emulate`] with what the exit told of the access (guest-physical address and direction).
///
/// # Errors
/// The VM cannot go on: see [`EmulateError`].
#[inline]
pub fn emulate_at<V: Vcpu, M: GuestMemory, B: MmioBus>(
    vcpu: &mut V,
    mem: &mut M,
    bus: &mut B,
    told: Option<(GuestPhysAddr, Access)>,
) -> Result<Done, EmulateError> {
    if let Some((addr, access)) = told
        && let Some(done) = fast_mov(vcpu, mem, bus, addr, access)
    {
        return Ok(done);
    }
    emulate(vcpu, mem, bus)
}

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
    // Only 64-bit mode has addresses beyond 4 GiB. The longest form has 12 bytes; 16 are read.
    if rip >> 32 == 0 || rip % PAGE_SIZE > PAGE_SIZE - 16 {
        return None;
    }
    let code = translate(&fetch_state(vcpu, rip), mem, rip, Access::EXECUTE).ok()?;
    let mut bytes = [0; 16];
    mem.read(code, &mut bytes).ok()?;
    let mov = take_apart(vcpu, rip, u128::from_le_bytes(bytes))?;
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

/// Decodes `[REX] 89|8B|C7 ModRM [SIB] [disp] [imm32]` (Intel SDM Vol. 2A §2.1.5, §2.2.1).
#[inline]
fn take_apart<V: Vcpu + ?Sized>(vcpu: &V, rip: u64, code: u128) -> Option<Mov> {
    let mut rest = code;
    let mut length = 0;
    let mut take = |bytes: u32| {
        let value = rest as u64 & u64::MAX >> (64 - 8 * bytes);
        rest >>= 8 * bytes;
        length += u64::from(bytes);
        value
    };
    let mut opcode = take(1) as u8;
    let mut rex = 0;
    if opcode & 0xf0 == 0x40 {
        rex = opcode;
        opcode = take(1) as u8;
    }
    if !matches!(opcode, 0x89 | 0x8b | 0xc7) {
        return None;
    }
    let modrm = take(1) as u8;
    let mode = modrm >> 6;
    let reg = modrm >> 3 & 7 | rex << 1 & 8;
    let rm = modrm & 7;
    if mode == 3 {
        return None;
    }
    let (b, x) = (rex << 3 & 8, rex << 2 & 8);
    let mut address = 0u64;
    let mut relative = false;
    let mut wide = mode == 2;
    if rm == 4 {
        let sib = take(1) as u8;
        let (base, index) = (sib & 7, sib >> 3 & 7 | x);
        if base == 5 && mode == 0 {
            wide = true;
        } else {
            address = vcpu.gpr(Gpr::from_number(base | b));
        }
        if index != 4 {
            let index = vcpu.gpr(Gpr::from_number(index));
            address = address.wrapping_add(index << (sib >> 6));
        }
    } else if rm == 5 && mode == 0 {
        relative = true;
        wide = true;
    } else {
        address = vcpu.gpr(Gpr::from_number(rm | b));
    }
    if wide {
        address = address.wrapping_add(take(4) as i32 as u64);
    } else if mode == 1 {
        address = address.wrapping_add(take(1) as i8 as u64);
    }
    let operand = match opcode {
        0x89 => Operand::Store(Gpr::from_number(reg)),
        0x8b => Operand::Load(Gpr::from_number(reg)),
        _ if reg & 7 == 0 => Operand::Immediate(take(4) as i32 as u64),
        _ => return None,
    };
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
