//! String instructions, alone or repeated (Intel SDM Vol. 2, REP/REPE/REPNE).

use arch::{Access, Gpr, GuestPhysAddr, PAGE_SIZE, RFlags, SegmentRegister};
use iced_x86::{Code as Form, Instruction, OpKind, Register};

use super::fetch::Fetched;
use super::flags;
use super::operand::{Core, Reg, Span, segment_register};
use super::{Done, PortBus, Stop, retire, single_step};

/// Iterations of a repeated instruction in one exit. Past that the vCPU is entered again with the
/// instruction unfinished, so that interrupts and other vCPUs get their turn.
const SHARE: u32 = 256;

/// What an iteration does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Movs,
    Cmps,
    Stos,
    Lods,
    Scas,
    Ins,
    Outs,
}

/// A string instruction.
#[derive(Clone, Copy, Debug)]
pub(super) struct StringOp {
    pub kind: Kind,
    /// Bytes of an element.
    pub size: u8,
    /// Bytes of address and count registers.
    address: u8,
    /// Segment of the source.
    segment: SegmentRegister,
    rep: Option<Rep>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Rep {
    /// REP, REPE
    Equal,
    /// REPNE; as REP where no flag is compared.
    NotEqual,
}

impl StringOp {
    /// The string instruction that this is, if it is one.
    pub fn of(i: &Instruction) -> Option<Self> {
        let (kind, size) = match i.code() {
            Form::Movsb_m8_m8 => (Kind::Movs, 1),
            Form::Movsw_m16_m16 => (Kind::Movs, 2),
            Form::Movsd_m32_m32 => (Kind::Movs, 4),
            Form::Movsq_m64_m64 => (Kind::Movs, 8),
            Form::Cmpsb_m8_m8 => (Kind::Cmps, 1),
            Form::Cmpsw_m16_m16 => (Kind::Cmps, 2),
            Form::Cmpsd_m32_m32 => (Kind::Cmps, 4),
            Form::Cmpsq_m64_m64 => (Kind::Cmps, 8),
            Form::Stosb_m8_AL => (Kind::Stos, 1),
            Form::Stosw_m16_AX => (Kind::Stos, 2),
            Form::Stosd_m32_EAX => (Kind::Stos, 4),
            Form::Stosq_m64_RAX => (Kind::Stos, 8),
            Form::Lodsb_AL_m8 => (Kind::Lods, 1),
            Form::Lodsw_AX_m16 => (Kind::Lods, 2),
            Form::Lodsd_EAX_m32 => (Kind::Lods, 4),
            Form::Lodsq_RAX_m64 => (Kind::Lods, 8),
            Form::Scasb_AL_m8 => (Kind::Scas, 1),
            Form::Scasw_AX_m16 => (Kind::Scas, 2),
            Form::Scasd_EAX_m32 => (Kind::Scas, 4),
            Form::Scasq_RAX_m64 => (Kind::Scas, 8),
            Form::Insb_m8_DX => (Kind::Ins, 1),
            Form::Insw_m16_DX => (Kind::Ins, 2),
            Form::Insd_m32_DX => (Kind::Ins, 4),
            Form::Outsb_DX_m8 => (Kind::Outs, 1),
            Form::Outsw_DX_m16 => (Kind::Outs, 2),
            Form::Outsd_DX_m32 => (Kind::Outs, 4),
            _ => return None,
        };
        let address = i.op_kinds().find_map(|kind| match kind {
            OpKind::MemorySegSI | OpKind::MemorySegDI | OpKind::MemoryESDI => Some(2),
            OpKind::MemorySegESI | OpKind::MemorySegEDI | OpKind::MemoryESEDI => Some(4),
            OpKind::MemorySegRSI | OpKind::MemorySegRDI | OpKind::MemoryESRDI => Some(8),
            _ => None,
        })?;
        Some(Self {
            kind,
            size,
            address,
            segment: match i.segment_prefix() {
                Register::None => SegmentRegister::Ds,
                prefix => segment_register(prefix)?,
            },
            rep: if i.has_repne_prefix() {
                Some(Rep::NotEqual)
            } else if i.has_rep_prefix() {
                Some(Rep::Equal)
            } else {
                None
            },
        })
    }
}

/// The page an operand was last found in, so that a repeated instruction walks the guest's tables
/// once a page and not once an element. It lives for one exit.
#[derive(Default)]
struct Window(Option<(u64, GuestPhysAddr)>);

impl Core<'_> {
    /// A string instruction that touches no port.
    pub fn string(&mut self, op: &StringOp, fetched: &Fetched) -> Result<Done, Stop> {
        if matches!(op.kind, Kind::Ins | Kind::Outs) {
            return Err(Stop::Unsupported("a port access to a device's memory"));
        }
        self.repeat(op, fetched, None)
    }

    /// Does up to [`SHARE`] iterations. After each the registers are those of the architecture,
    /// so a fault or an interrupt can come between any two.
    pub fn repeat(
        &mut self,
        op: &StringOp,
        fetched: &Fetched,
        mut ports: Option<&mut dyn PortBus>,
    ) -> Result<Done, Stop> {
        let counter = Reg::part(Gpr::Rcx, op.address);
        let rflags = self.vcpu.rflags();
        let mut windows = [Window::default(), Window::default()];
        for _ in 0..SHARE {
            let left = match op.rep {
                Some(_) => self.reg(counter),
                None => 1,
            };
            if left == 0 {
                return Ok(retire(self.vcpu, fetched.next()));
            }
            let compared = self.iteration(op, &mut windows, &mut ports)?;
            let Some(rep) = op.rep else {
                return Ok(retire(self.vcpu, fetched.next()));
            };
            self.set_reg(counter, left - 1);
            let zero = self.vcpu.rflags().contains(RFlags::ZF);
            if left == 1 || (compared && zero != (rep == Rep::Equal)) {
                return Ok(retire(self.vcpu, fetched.next()));
            }
            if let Some(trap) = single_step(self.vcpu, rflags) {
                return Ok(Done::Trap(trap));
            }
        }
        Ok(Done::Again)
    }

    /// One iteration; tells whether it set the flags.
    fn iteration(
        &mut self,
        op: &StringOp,
        [from, to]: &mut [Window; 2],
        ports: &mut Option<&mut dyn PortBus>,
    ) -> Result<bool, Stop> {
        let (source, destination) = (
            Reg::part(Gpr::Rsi, op.address),
            Reg::part(Gpr::Rdi, op.address),
        );
        let accumulator = Reg::part(Gpr::Rax, op.size);
        let port = self.reg(Reg::part(Gpr::Rdx, 2)) as u16;
        let reads = matches!(op.kind, Kind::Movs | Kind::Cmps | Kind::Lods | Kind::Outs);
        let es = !matches!(op.kind, Kind::Lods | Kind::Outs);
        let writes = matches!(op.kind, Kind::Movs | Kind::Stos | Kind::Ins);
        // Both operands are located before either is touched.
        let from = match reads {
            true => Some(self.element(op, source, op.segment, Access::READ, from)?),
            false => None,
        };
        let to = match es {
            true => {
                let access = if writes { Access::WRITE } else { Access::READ };
                Some(self.element(op, destination, SegmentRegister::Es, access, to)?)
            }
            false => None,
        };
        let value = match (op.kind, &from, &mut *ports) {
            (Kind::Ins, _, Some(ports)) => ports.read(port, op.size).into(),
            (_, Some(span), _) => self.load(span)?,
            _ => self.reg(accumulator),
        };
        match (op.kind, &to) {
            (Kind::Cmps | Kind::Scas, Some(span)) => {
                let other = self.load(span)?;
                let outcome = flags::sub(value, other, false, op.size);
                let flags = outcome.apply(self.vcpu.rflags().bits());
                self.vcpu.set_rflags(RFlags::from_bits_retain(flags));
            }
            (_, Some(span)) => self.store(span, value)?,
            (Kind::Lods, None) => self.set_reg(accumulator, value),
            _ => {}
        }
        if let (Kind::Outs, Some(ports)) = (op.kind, ports) {
            ports.write(port, op.size, value as u32);
        }
        if reads {
            self.advance(source, op.size);
        }
        if es {
            self.advance(destination, op.size);
        }
        Ok(matches!(op.kind, Kind::Cmps | Kind::Scas))
    }

    /// Moves an address register on by an element, in the direction that DF says.
    fn advance(&mut self, register: Reg, size: u8) {
        let value = self.reg(register);
        let size = u64::from(size);
        let value = if self.vcpu.rflags().contains(RFlags::DF) {
            value.wrapping_sub(size)
        } else {
            value.wrapping_add(size)
        };
        self.set_reg(register, value);
    }

    /// Locates an element.
    fn element(
        &mut self,
        op: &StringOp,
        register: Reg,
        segment: SegmentRegister,
        access: Access,
        window: &mut Window,
    ) -> Result<Span, Stop> {
        let offset = self.reg(register);
        let linear = self.linear(segment, offset, op.size.into(), access.write)?;
        let (page, at) = (linear & !(PAGE_SIZE - 1), linear % PAGE_SIZE);
        if let Some((known, frame)) = window.0
            && known == page
            && at + u64::from(op.size) <= PAGE_SIZE
        {
            return Ok(Span::within(frame.wrapping_add(at), op.size));
        }
        let span = self.span(linear, op.size, access)?;
        window.0 = Some((page, span.frame()));
        Ok(span)
    }
}
