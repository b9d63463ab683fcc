//! The address after an intercepted instruction, and its operands, where the hardware tells none
//! (SVM without next-RIP saving and decode assists, AMD APM Vol. 2 §15.7.1, §15.8).
//!
//! The exit reason implies the instruction. So the bytes need not be decoded, only compared with
//! its plain encoding; a general decode follows where they differ (a redundant prefix). If that
//! finds another instruction, the guest rewrote its code after the exit: nothing is guessed, the
//! caller enters the guest again and the hardware executes what stands there now.

use arch::{
    Access, ControlRegister, CrOp, DebugRegister, Gpr, GuestMemory, GuestPhysAddr, PAGE_SIZE, Vcpu,
};
use iced_x86::{DecoderOptions, Instruction, Mnemonic, OpKind, Register};

use super::fetch::{Code, CodeMode, Fetched};
use super::operand::{Core, Reg, unchecked_linear};
use super::{Done, EmulateError, Fault, Stop, finish};
use crate::paging::{PagingState, translate};

/// What an exit reason says that the instruction is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Expected {
    Cpuid,
    Rdmsr,
    Wrmsr,
    /// VMCALL or VMMCALL
    Hypercall,
    Hlt,
    Pause,
    Invlpg,
    Clts,
    Lmsw,
    Smsw,
    /// MOV to or from a control register
    MovCr,
    /// MOV to or from a debug register
    MovDr,
    Invd,
    /// WBINVD or WBNOINVD
    Wbinvd,
    Xsetbv,
    Rdpmc,
    Rdtsc,
    Rdtscp,
    /// MONITOR or MONITORX
    Monitor,
    /// MWAIT or MWAITX
    Mwait,
}

impl Expected {
    /// The plain encoding: little-endian bytes, the bits of them that count, and their number.
    /// Encodings with operands have none.
    #[inline]
    const fn plain(self) -> Option<(u32, u32, u8)> {
        Some(match self {
            Self::Cpuid => (0xa2_0f, 0xffff, 2),
            Self::Rdmsr => (0x32_0f, 0xffff, 2),
            Self::Wrmsr => (0x30_0f, 0xffff, 2),
            // VMMCALL; VMCALL is compared apart.
            Self::Hypercall => (0xd9_01_0f, 0xff_ffff, 3),
            Self::Hlt => (0xf4, 0xff, 1),
            Self::Pause => (0x90_f3, 0xffff, 2),
            Self::Clts => (0x06_0f, 0xffff, 2),
            Self::Invd => (0x08_0f, 0xffff, 2),
            Self::Wbinvd => (0x09_0f, 0xffff, 2),
            Self::Xsetbv => (0xd1_01_0f, 0xff_ffff, 3),
            Self::Rdpmc => (0x33_0f, 0xffff, 2),
            Self::Rdtsc => (0x31_0f, 0xffff, 2),
            Self::Rdtscp => (0xf9_01_0f, 0xff_ffff, 3),
            Self::Monitor => (0xc8_01_0f, 0xff_ffff, 3),
            Self::Mwait => (0xc9_01_0f, 0xff_ffff, 3),
            Self::Invlpg | Self::Lmsw | Self::Smsw | Self::MovCr | Self::MovDr => return None,
        })
    }

    fn matches(self, instruction: &Instruction) -> bool {
        let mnemonic = instruction.mnemonic();
        match self {
            Self::Cpuid => mnemonic == Mnemonic::Cpuid,
            Self::Rdmsr => mnemonic == Mnemonic::Rdmsr,
            Self::Wrmsr => mnemonic == Mnemonic::Wrmsr,
            Self::Hypercall => matches!(mnemonic, Mnemonic::Vmcall | Mnemonic::Vmmcall),
            Self::Hlt => mnemonic == Mnemonic::Hlt,
            Self::Pause => mnemonic == Mnemonic::Pause,
            Self::Invlpg => mnemonic == Mnemonic::Invlpg,
            Self::Clts => mnemonic == Mnemonic::Clts,
            Self::Lmsw => mnemonic == Mnemonic::Lmsw,
            Self::Smsw => mnemonic == Mnemonic::Smsw,
            Self::MovCr => moved(instruction).is_some_and(|m| matches!(m.0, Moved::Control(_))),
            Self::MovDr => moved(instruction).is_some_and(|m| matches!(m.0, Moved::Debug(_))),
            Self::Invd => mnemonic == Mnemonic::Invd,
            Self::Wbinvd => matches!(mnemonic, Mnemonic::Wbinvd | Mnemonic::Wbnoinvd),
            Self::Xsetbv => mnemonic == Mnemonic::Xsetbv,
            Self::Rdpmc => mnemonic == Mnemonic::Rdpmc,
            Self::Rdtsc => mnemonic == Mnemonic::Rdtsc,
            Self::Rdtscp => mnemonic == Mnemonic::Rdtscp,
            Self::Monitor => matches!(mnemonic, Mnemonic::Monitor | Mnemonic::Monitorx),
            Self::Mwait => matches!(mnemonic, Mnemonic::Mwait | Mnemonic::Mwaitx),
        }
    }
}

/// The end of the instruction cannot be told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LengthError {
    /// The guest's code no longer is what the exit told: enter it again, RIP unchanged.
    Changed,
    /// The fetch faults (the code was unmapped meanwhile): deliver this.
    Fault(Fault),
    /// The VM cannot go on.
    Failed(EmulateError),
}

/// The page that a vCPU's last intercepted instruction stood in, so that the next one there needs
/// no walk.
///
/// Nothing tells when the guest remaps the page. That is harmless: the bytes found are compared
/// with the one encoding that the exit reason implies, and lead to a decode through a new walk if
/// they differ. All that a stale page could hide is a redundant prefix.
#[derive(Clone, Copy, Debug)]
pub struct CodePage {
    linear: u64,
    cr3: u64,
    frame: GuestPhysAddr,
}

impl CodePage {
    /// No page yet.
    pub const NONE: Self = Self {
        linear: u64::MAX,
        cr3: 0,
        frame: GuestPhysAddr::new(0),
    };
}

impl Default for CodePage {
    fn default() -> Self {
        Self::NONE
    }
}

/// The address after the instruction at RIP, which the exit says to be `expected`: from the
/// hardware if it tells, else from the code.
///
/// # Errors
/// See [`LengthError`].
#[inline]
pub fn next_rip<V: Vcpu, M: GuestMemory>(
    vcpu: &V,
    mem: &mut M,
    expected: Expected,
) -> Result<u64, LengthError> {
    if let Some(next) = vcpu.next_rip() {
        return Ok(next);
    }
    match plain_next_rip(vcpu, mem, &mut CodePage::default(), expected) {
        Some(next) => Ok(next),
        None => decode_next_rip(vcpu, mem, expected),
    }
}

/// [`next_rip`] for the plain encoding, in one page, where CS has no base; `None` says to decode.
#[inline(always)]
pub fn plain_next_rip<V: Vcpu + ?Sized, M: GuestMemory + ?Sized>(
    vcpu: &V,
    mem: &mut M,
    page: &mut CodePage,
    expected: Expected,
) -> Option<u64> {
    let (bytes, mask, length) = expected.plain()?;
    let found = peek(vcpu, mem, page, length.into())?;
    let vmcall = expected == Expected::Hypercall && found & mask == 0xc1_01_0f;
    (found & mask == bytes || vmcall).then(|| vcpu.rip().wrapping_add(length.into()))
}

/// The first `length` bytes (up to four) at RIP and what follows, if they are in one page.
#[inline]
fn peek<V: Vcpu + ?Sized, M: GuestMemory + ?Sized>(
    vcpu: &V,
    mem: &mut M,
    page: &mut CodePage,
    length: u64,
) -> Option<u32> {
    let rip = vcpu.rip();
    let at = rip % PAGE_SIZE;
    if at > PAGE_SIZE - length {
        return None;
    }
    let cr3 = vcpu.cr(ControlRegister::Cr3);
    let linear = rip - at;
    let addr = if page.linear == linear && page.cr3 == cr3 {
        page.frame.wrapping_add(at)
    } else {
        let mode = CodeMode::of(vcpu);
        if mode.linear(rip) != rip || rip.checked_add(length - 1)? > mode.limit {
            return None;
        }
        let addr = translate(&PagingState::of(vcpu), mem, rip, Access::EXECUTE).ok()?;
        *page = CodePage {
            linear,
            cr3,
            frame: addr.align_down(PAGE_SIZE),
        };
        addr
    };
    let (word, skip) = (addr.align_down(8), addr.offset_in(8));
    let mut value = mem.read_u64(word).ok()? >> (8 * skip);
    if skip + length > 8 {
        value |= mem.read_u64(word.wrapping_add(8)).ok()? << (64 - 8 * skip);
    }
    Some(value as u32)
}

/// [`next_rip`] by decoding the instruction.
///
/// # Errors
/// See [`LengthError`].
#[cold]
#[inline(never)]
pub fn decode_next_rip(
    vcpu: &dyn Vcpu,
    mem: &mut dyn GuestMemory,
    expected: Expected,
) -> Result<u64, LengthError> {
    let fetched = fetch(vcpu, mem)?;
    if expected.matches(&fetched.instruction) {
        Ok(fetched.next())
    } else {
        Err(LengthError::Changed)
    }
}

/// Decodes with AMD's `LOCK MOV CR0` for CR8, since what comes here was intercepted by SVM.
fn fetch(vcpu: &dyn Vcpu, mem: &mut dyn GuestMemory) -> Result<Fetched, LengthError> {
    let mut code = Code::default();
    let fetched = Fetched::at_rip(vcpu, mem, &mut code, DecoderOptions::AMD);
    fetched.map_err(|stop| length_error(vcpu.rip(), &code, stop))
}

fn length_error(rip: u64, code: &Code, stop: Stop) -> LengthError {
    match finish(rip, code, Err(stop)) {
        Ok(Done::Fault(fault)) => LengthError::Fault(fault),
        // The hardware decoded an instruction here; what stands here now is none.
        Ok(_) | Err(EmulateError::Undecodable { .. }) => LengthError::Changed,
        Err(error) => LengthError::Failed(error),
    }
}

/// The special register of a MOV.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Moved {
    Control(ControlRegister),
    Debug(DebugRegister),
}

/// A MOV with a control or debug register: which, whether it is written, and the other operand.
fn moved(i: &Instruction) -> Option<(Moved, bool, Gpr)> {
    if i.mnemonic() != Mnemonic::Mov
        || i.op0_kind() != OpKind::Register
        || i.op1_kind() != OpKind::Register
    {
        return None;
    }
    let special = |register| {
        Some(match register {
            Register::CR0 => Moved::Control(ControlRegister::Cr0),
            Register::CR2 => Moved::Control(ControlRegister::Cr2),
            Register::CR3 => Moved::Control(ControlRegister::Cr3),
            Register::CR4 => Moved::Control(ControlRegister::Cr4),
            Register::CR8 => Moved::Control(ControlRegister::Cr8),
            Register::DR0 => Moved::Debug(DebugRegister::Dr0),
            Register::DR1 => Moved::Debug(DebugRegister::Dr1),
            Register::DR2 => Moved::Debug(DebugRegister::Dr2),
            Register::DR3 => Moved::Debug(DebugRegister::Dr3),
            Register::DR4 => Moved::Debug(DebugRegister::Dr4),
            Register::DR5 => Moved::Debug(DebugRegister::Dr5),
            Register::DR6 => Moved::Debug(DebugRegister::Dr6),
            Register::DR7 => Moved::Debug(DebugRegister::Dr7),
            _ => return None,
        })
    };
    let (op0, op1) = (i.op0_register(), i.op1_register());
    match special(op0) {
        Some(to) => Some((to, true, Reg::from_iced(op1)?.gpr)),
        None => Some((special(op1)?, false, Reg::from_iced(op0)?.gpr)),
    }
}

/// The operation of an intercepted access to `register`, and the address after it.
///
/// # Errors
/// See [`LengthError`]. SMSW has no [`CrOp`] and is not supported: CR0 reads are never intercepted.
pub fn decode_cr(
    vcpu: &mut dyn Vcpu,
    mem: &mut dyn GuestMemory,
    register: ControlRegister,
    write: bool,
) -> Result<(CrOp, u64), LengthError> {
    let fetched = fetch(vcpu, mem)?;
    let i = &fetched.instruction;
    let cr0 = register == ControlRegister::Cr0;
    let op = match (i.mnemonic(), moved(i)) {
        (_, Some((Moved::Control(found), writes, gpr))) if found == register && writes == write => {
            if write {
                CrOp::Write(gpr)
            } else {
                CrOp::Read(gpr)
            }
        }
        (Mnemonic::Clts, _) if cr0 && write => CrOp::Clts,
        (Mnemonic::Lmsw, _) if cr0 && write => {
            let mut core = Core::new(&fetched, vcpu, mem, None);
            let source = core.place(i, 0, Access::READ);
            let source = source.and_then(|place| core.get(&place));
            let rip = fetched.rip;
            let source = source.map_err(|stop| length_error(rip, &fetched.code, stop))?;
            CrOp::Lmsw(source as u16)
        }
        (Mnemonic::Smsw, _) if cr0 && !write => {
            let stop = Stop::Unsupported("an intercepted SMSW");
            return Err(length_error(fetched.rip, &fetched.code, stop));
        }
        _ => return Err(LengthError::Changed),
    };
    Ok((op, fetched.next()))
}

/// An intercepted access to a debug register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DrAccess {
    /// Which.
    pub register: DebugRegister,
    /// `MOV DRn, reg` rather than `MOV reg, DRn`.
    pub write: bool,
    /// The other operand.
    pub gpr: Gpr,
}

/// The operands of an intercepted access to a debug register, and the address after it.
///
/// # Errors
/// See [`LengthError`].
pub fn decode_dr(
    vcpu: &dyn Vcpu,
    mem: &mut dyn GuestMemory,
) -> Result<(DrAccess, u64), LengthError> {
    let fetched = fetch(vcpu, mem)?;
    match moved(&fetched.instruction) {
        Some((Moved::Debug(register), write, gpr)) => {
            let access = DrAccess {
                register,
                write,
                gpr,
            };
            Ok((access, fetched.next()))
        }
        _ => Err(LengthError::Changed),
    }
}

/// The linear address an intercepted INVLPG names, and the address after it. INVLPG checks
/// neither limits nor canonical form (Intel SDM Vol. 2A).
///
/// # Errors
/// See [`LengthError`].
pub fn decode_invlpg(
    vcpu: &dyn Vcpu,
    mem: &mut dyn GuestMemory,
) -> Result<(u64, u64), LengthError> {
    let fetched = fetch(vcpu, mem)?;
    let i = &fetched.instruction;
    if !Expected::Invlpg.matches(i) {
        return Err(LengthError::Changed);
    }
    let linear = unchecked_linear(vcpu, &fetched.mode, i);
    Ok((linear, fetched.next()))
}
