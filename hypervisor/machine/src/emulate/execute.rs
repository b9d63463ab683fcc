//! One instruction with a memory operand, executed (Intel SDM Vol. 2, each instruction's page).

use arch::{Access, ControlRegister, Gpr, GuestMemory, RFlags, SegmentRegister, Vcpu};
use iced_x86::{Code as Form, DecoderOptions, Instruction, Mnemonic, OpKind};

use super::fetch::{Code, Fetched};
use super::flags::{self, Outcome, Shift, bits, mask, sign_extend};
use super::operand::{Core, Place, Reg, Span};
use super::string;
use super::{Done, EmulateError, Fault, MmioBus, Stop, finish, retire};

/// Executes the one instruction at RIP: operands that are RAM go to `mem`, others to `bus`.
///
/// On [`Done::Fault`] the vCPU stands as before the instruction; the caller delivers the fault.
///
/// # Errors
/// The VM cannot go on: see [`EmulateError`].
#[inline(never)]
pub fn emulate(
    vcpu: &mut dyn Vcpu,
    mem: &mut dyn GuestMemory,
    bus: &mut dyn MmioBus,
) -> Result<Done, EmulateError> {
    let rip = vcpu.rip();
    let mut code = Code::default();
    let outcome = match Fetched::at_rip(vcpu, mem, &mut code, DecoderOptions::NONE) {
        Ok(fetched) => {
            code = fetched.code;
            Core::new(&fetched, vcpu, mem, Some(bus)).execute(&fetched)
        }
        Err(stop) => Err(stop),
    };
    finish(rip, &code, outcome)
}

/// Where execution goes after an instruction.
enum Flow {
    Next,
    Jump(u64),
}

impl Core<'_> {
    fn execute(&mut self, fetched: &Fetched) -> Result<Done, Stop> {
        let i = &fetched.instruction;
        if let Some(string) = string::StringOp::of(i) {
            return self.string(&string, fetched);
        }
        let next = fetched.next();
        match self.step(i, next)? {
            Flow::Next => Ok(retire(self.vcpu, next)),
            Flow::Jump(target) => Ok(retire(self.vcpu, target)),
        }
    }

    fn flags(&self) -> u64 {
        self.vcpu.rflags().bits()
    }

    fn carry(&self) -> bool {
        self.vcpu.rflags().contains(RFlags::CF)
    }

    /// Writes the status flags of a result.
    fn apply(&mut self, outcome: &Outcome) {
        if outcome.touched != 0 {
            let flags = outcome.apply(self.flags());
            self.vcpu.set_rflags(RFlags::from_bits_retain(flags));
        }
    }

    fn step(&mut self, i: &Instruction, next: u64) -> Result<Flow, Stop> {
        use Mnemonic as M;
        match i.mnemonic() {
            M::Mov | M::Movzx | M::Movnti | M::Movdiri => {
                let source = self.place(i, 1, Access::READ)?;
                let to = self.place(i, 0, Access::WRITE)?;
                // A selector stored to memory has two bytes, whatever the operand size.
                let value = self.get(&source)?;
                self.set(&to, value)?;
            }
            M::Movsx | M::Movsxd => {
                let source = self.place(i, 1, Access::READ)?;
                let to = self.place(i, 0, Access::WRITE)?;
                let value = self.get(&source)?;
                self.set(&to, sign_extend(value, size_of(&source)))?;
            }
            M::Movbe => {
                let source = self.place(i, 1, Access::READ)?;
                let to = self.place(i, 0, Access::WRITE)?;
                let value = self.get(&source)?;
                let size = size_of(&to);
                self.set(&to, value.swap_bytes() >> (64 - bits(size)))?;
            }
            M::Add => self.arithmetic(i, |a, b, _, size| flags::add(a, b, false, size))?,
            M::Adc => self.arithmetic(i, flags::add)?,
            M::Sub => self.arithmetic(i, |a, b, _, size| flags::sub(a, b, false, size))?,
            M::Sbb => self.arithmetic(i, flags::sub)?,
            M::And => self.arithmetic(i, |a, b, _, size| flags::logic(a & b, size))?,
            M::Or => self.arithmetic(i, |a, b, _, size| flags::logic(a | b, size))?,
            M::Xor => self.arithmetic(i, |a, b, _, size| flags::logic(a ^ b, size))?,
            M::Cmp => self.compare(i, |a, b, size| flags::sub(a, b, false, size))?,
            M::Test => self.compare(i, |a, b, size| flags::logic(a & b, size))?,
            M::Inc => self.unary(i, flags::inc)?,
            M::Dec => self.unary(i, flags::dec)?,
            M::Neg => self.unary(i, |a, size| flags::sub(0, a, false, size))?,
            M::Not => self.unary(i, |a, size| Outcome::plain(!a & mask(size)))?,
            M::Rol => self.shift(i, Shift::Rol)?,
            M::Ror => self.shift(i, Shift::Ror)?,
            M::Rcl => self.shift(i, Shift::Rcl)?,
            M::Rcr => self.shift(i, Shift::Rcr)?,
            M::Shl | M::Sal => self.shift(i, Shift::Shl)?,
            M::Shr => self.shift(i, Shift::Shr)?,
            M::Sar => self.shift(i, Shift::Sar)?,
            M::Shld => self.double_shift(i, true)?,
            M::Shrd => self.double_shift(i, false)?,
            M::Bt => self.bit(i, None)?,
            M::Bts => self.bit(i, Some(|value, bit| value | bit))?,
            M::Btr => self.bit(i, Some(|value, bit| value & !bit))?,
            M::Btc => self.bit(i, Some(|value, bit| value ^ bit))?,
            M::Bsf | M::Bsr | M::Tzcnt | M::Lzcnt | M::Popcnt => self.scan(i)?,
            M::Xchg => self.exchange(i)?,
            M::Xadd => self.exchange_add(i)?,
            M::Cmpxchg => self.compare_exchange(i)?,
            M::Cmpxchg8b => self.compare_exchange_pair(i, 4)?,
            M::Cmpxchg16b => self.compare_exchange_pair(i, 8)?,
            M::Mul => self.multiply_wide(i, false)?,
            M::Imul if i.op_count() == 1 => self.multiply_wide(i, true)?,
            M::Imul => self.multiply(i)?,
            M::Div => self.divide(i, false)?,
            M::Idiv => self.divide(i, true)?,
            M::Push => {
                let source = self.place(i, 0, Access::READ)?;
                let slot = self.push_slot(self.stack_operand(&source))?;
                let value = self.get(&source)?;
                self.push(&slot, value)?;
            }
            M::Pop => self.pop(i)?,
            M::Call | M::Jmp if matches!(i.op0_kind(), OpKind::Memory | OpKind::Register) => {
                return self.transfer(i, next);
            }
            M::Smsw | M::Sldt | M::Str => {
                let value = match i.mnemonic() {
                    M::Smsw => self.vcpu.cr(ControlRegister::Cr0),
                    M::Sldt => self.vcpu.segment(SegmentRegister::Ldtr).selector.into(),
                    _ => self.vcpu.segment(SegmentRegister::Tr).selector.into(),
                };
                let to = self.place(i, 0, Access::WRITE)?;
                self.set(&to, value)?;
            }
            M::Xlatb => {
                // The decoder names AL as the index register.
                let span = self.memory(i, 0, 1, Access::READ)?;
                let value = self.load(&span)?;
                self.set_reg(Reg::part(Gpr::Rax, 1), value);
            }
            // Hints, and cache lines of memory that is not cached: nothing to do.
            M::Nop
            | M::Prefetch
            | M::Prefetchw
            | M::Prefetchwt1
            | M::Prefetchnta
            | M::Prefetcht0
            | M::Prefetcht1
            | M::Prefetcht2
            | M::Clflush
            | M::Clflushopt
            | M::Clwb
            | M::Cldemote => {}
            _ => return self.conditional(i),
        }
        Ok(Flow::Next)
    }

    /// SETcc and CMOVcc, by the order of their forms (condition codes 0 to 15).
    fn conditional(&mut self, i: &Instruction) -> Result<Flow, Stop> {
        let form = i.code() as u32;
        let (set, moves) = (Form::Seto_rm8 as u32, Form::Cmovo_r16_rm16 as u32);
        if (set..=Form::Setg_rm8 as u32).contains(&form) {
            let to = self.place(i, 0, Access::WRITE)?;
            let holds = flags::condition(form - set, self.flags());
            self.set(&to, holds.into())?;
        } else if (moves..=Form::Cmovg_r64_rm64 as u32).contains(&form) {
            // The source is read in any case, and a 32-bit register is written in any case.
            let source = self.place(i, 1, Access::READ)?;
            let to = self.place(i, 0, Access::WRITE)?;
            let value = self.get(&source)?;
            let holds = flags::condition((form - moves) / 3, self.flags());
            let value = if holds { value } else { self.get(&to)? };
            self.set(&to, value)?;
        } else {
            return Err(Stop::Unsupported("this instruction on a device's memory"));
        }
        Ok(Flow::Next)
    }

    /// `op0 = f(op0, op1, carry)` with flags.
    fn arithmetic(
        &mut self,
        i: &Instruction,
        f: fn(u64, u64, bool, u8) -> Outcome,
    ) -> Result<(), Stop> {
        let source = self.place(i, 1, Access::READ)?;
        let to = self.place(i, 0, Access::WRITE)?;
        let (source, carry, size) = (self.get(&source)?, self.carry(), size_of(&to));
        self.update(&to, i, |a| f(a, source, carry, size))
    }

    /// `f(op0, op1)` for its flags alone.
    fn compare(&mut self, i: &Instruction, f: fn(u64, u64, u8) -> Outcome) -> Result<(), Stop> {
        let a = self.place(i, 0, Access::READ)?;
        let b = self.place(i, 1, Access::READ)?;
        let outcome = f(self.get(&a)?, self.get(&b)?, size_of(&a));
        self.apply(&outcome);
        Ok(())
    }

    /// `op0 = f(op0)` with flags.
    fn unary(&mut self, i: &Instruction, f: fn(u64, u8) -> Outcome) -> Result<(), Stop> {
        let to = self.place(i, 0, Access::WRITE)?;
        let size = size_of(&to);
        self.update(&to, i, |a| f(a, size))
    }

    fn shift(&mut self, i: &Instruction, kind: Shift) -> Result<(), Stop> {
        let count = self.place(i, 1, Access::READ)?;
        let to = self.place(i, 0, Access::WRITE)?;
        let (count, carry, size) = (self.get(&count)?, self.carry(), size_of(&to));
        self.update(&to, i, |a| flags::shift(kind, a, count, carry, size))
    }

    fn double_shift(&mut self, i: &Instruction, left: bool) -> Result<(), Stop> {
        let fill = self.place(i, 1, Access::READ)?;
        let count = self.place(i, 2, Access::READ)?;
        let to = self.place(i, 0, Access::WRITE)?;
        let (fill, count, size) = (self.get(&fill)?, self.get(&count)?, size_of(&to));
        self.update(&to, i, |a| flags::double_shift(left, a, fill, count, size))
    }

    /// Read, modify, write, then flags: a fault in the write leaves the flags alone.
    fn update(
        &mut self,
        to: &Place,
        i: &Instruction,
        f: impl Fn(u64) -> Outcome,
    ) -> Result<(), Stop> {
        let mut outcome = Outcome::default();
        self.modify(to, i.has_lock_prefix(), &mut |old| {
            outcome = f(old);
            outcome.value
        })?;
        self.apply(&outcome);
        Ok(())
    }

    /// BT and kin: a bit number in a register reaches beyond the operand, an immediate does not.
    fn bit(&mut self, i: &Instruction, change: Option<fn(u64, u64) -> u64>) -> Result<(), Stop> {
        let access = if change.is_some() {
            Access::WRITE
        } else {
            Access::READ
        };
        let number = self.place(i, 1, Access::READ)?;
        let index = self.get(&number)?;
        let to = match (i.op0_kind(), number) {
            (OpKind::Memory, Place::Reg(Reg { size, .. })) => {
                let bytes = (sign_extend(index, size) as i64 >> 3) as u64;
                let bytes = bytes & !u64::from(size - 1);
                Place::Memory(self.memory(i, bytes, size, access)?)
            }
            _ => self.place(i, 0, access)?,
        };
        let size = size_of(&to);
        let bit = 1u64 << (index & u64::from(bits(size) - 1));
        let outcome = |value: u64| Outcome {
            value: change.map_or(value, |change| change(value, bit)),
            flags: if value & bit != 0 {
                RFlags::CF.bits()
            } else {
                0
            },
            touched: RFlags::CF.bits(),
        };
        if change.is_some() {
            return self.update(&to, i, outcome);
        }
        let value = self.get(&to)?;
        self.apply(&outcome(value));
        Ok(())
    }

    /// BSF, BSR, TZCNT, LZCNT, POPCNT
    fn scan(&mut self, i: &Instruction) -> Result<(), Stop> {
        use Mnemonic as M;
        let source = self.place(i, 1, Access::READ)?;
        let to = self.place(i, 0, Access::WRITE)?;
        let value = self.get(&source)?;
        let size = size_of(&to);
        let (zf, cf) = (RFlags::ZF.bits(), RFlags::CF.bits());
        let n = u64::from(bits(size));
        let low = u64::from(value.trailing_zeros()).min(n);
        let high = u64::from(value.leading_zeros()).saturating_sub(64 - n);
        let counted = |result: u64| Outcome {
            value: result,
            flags: if value == 0 { cf } else { 0 } | if result == 0 { zf } else { 0 },
            touched: cf | zf,
        };
        let found = |result: u64| Outcome {
            value: result,
            flags: if value == 0 { zf } else { 0 },
            touched: zf,
        };
        let outcome = match i.mnemonic() {
            M::Tzcnt => counted(low),
            M::Lzcnt => counted(high),
            M::Popcnt => Outcome {
                value: value.count_ones().into(),
                flags: if value == 0 { zf } else { 0 },
                touched: flags::STATUS,
            },
            M::Bsf => found(low),
            _ => found(n.wrapping_sub(1).wrapping_sub(high)),
        };
        let undefined = value == 0 && matches!(i.mnemonic(), M::Bsf | M::Bsr);
        if !undefined {
            self.set(&to, outcome.value)?;
        }
        self.apply(&outcome);
        Ok(())
    }

    /// XCHG with memory is locked even without the prefix.
    fn exchange(&mut self, i: &Instruction) -> Result<(), Stop> {
        let (memory, register) = match i.op0_kind() {
            OpKind::Memory => (0, 1),
            _ => (1, 0),
        };
        let to = self.place(i, memory, Access::WRITE)?;
        let register = self.place(i, register, Access::WRITE)?;
        let new = self.get(&register)?;
        let mut found = 0;
        self.modify(&to, true, &mut |old| {
            found = old;
            new
        })?;
        self.set(&register, found)
    }

    fn exchange_add(&mut self, i: &Instruction) -> Result<(), Stop> {
        let to = self.place(i, 0, Access::WRITE)?;
        let register = self.place(i, 1, Access::WRITE)?;
        let (addend, size) = (self.get(&register)?, size_of(&to));
        let mut found = 0;
        let mut outcome = Outcome::default();
        self.modify(&to, i.has_lock_prefix(), &mut |old| {
            found = old;
            outcome = flags::add(old, addend, false, size);
            outcome.value
        })?;
        // With the same register twice the sum wins.
        self.set(&register, found)?;
        if to == register {
            self.set(&to, outcome.value)?;
        }
        self.apply(&outcome);
        Ok(())
    }

    /// CMPXCHG writes its operand in any case: back what it read, where the comparison fails.
    fn compare_exchange(&mut self, i: &Instruction) -> Result<(), Stop> {
        let to = self.place(i, 0, Access::WRITE)?;
        let source = self.place(i, 1, Access::READ)?;
        let (new, size) = (self.get(&source)?, size_of(&to));
        let accumulator = Reg::part(Gpr::Rax, size);
        let expected = self.reg(accumulator);
        let mut found = 0;
        self.modify(&to, i.has_lock_prefix(), &mut |old| {
            found = old;
            if old == expected { new } else { old }
        })?;
        if found != expected {
            self.set_reg(accumulator, found);
        }
        self.apply(&flags::sub(expected, found, false, size));
        Ok(())
    }

    /// CMPXCHG8B and CMPXCHG16B, on halves of `half` bytes.
    fn compare_exchange_pair(&mut self, i: &Instruction, half: u8) -> Result<(), Stop> {
        let pair = |core: &Self, high, low| {
            (
                core.reg(Reg::part(low, half)),
                core.reg(Reg::part(high, half)),
            )
        };
        let expected = pair(self, Gpr::Rdx, Gpr::Rax);
        let new = pair(self, Gpr::Rcx, Gpr::Rbx);
        let found;
        if half == 4 {
            let join = |(low, high): (u64, u64)| low | high << 32;
            let to = Place::Memory(self.memory(i, 0, 8, Access::WRITE)?);
            let (expected, new) = (join(expected), join(new));
            let mut value = 0;
            self.modify(&to, i.has_lock_prefix(), &mut |old| {
                value = old;
                if old == expected { new } else { old }
            })?;
            found = (value & mask(4), value >> 32);
        } else {
            // Sixteen aligned bytes lie in one page. No device takes such an access as one, and
            // RAM that is not a device does not come here.
            let low = self.memory(i, 0, 8, Access::WRITE)?;
            let high = self.memory(i, 8, 8, Access::WRITE)?;
            if !low.is_aligned(16) {
                return Err(Fault::GP0.into());
            }
            found = (self.load(&low)?, self.load(&high)?);
            let (value_low, value_high) = if found == expected { new } else { found };
            self.store(&low, value_low)?;
            self.store(&high, value_high)?;
        }
        let equal = found == expected;
        if !equal {
            self.set_reg(Reg::part(Gpr::Rax, half), found.0);
            self.set_reg(Reg::part(Gpr::Rdx, half), found.1);
        }
        self.apply(&Outcome {
            value: 0,
            flags: if equal { RFlags::ZF.bits() } else { 0 },
            touched: RFlags::ZF.bits(),
        });
        Ok(())
    }

    /// MUL and one-operand IMUL: the product stands in RDX:RAX, or AX for bytes.
    fn multiply_wide(&mut self, i: &Instruction, signed: bool) -> Result<(), Stop> {
        let source = self.place(i, 0, Access::READ)?;
        let size = size_of(&source);
        let b = self.get(&source)?;
        let a = self.reg(Reg::part(Gpr::Rax, size));
        let (product, fits) = if signed {
            let product = signed_product(a, b, size);
            (product as u128, fits_signed(product, size))
        } else {
            let product = u128::from(a) * u128::from(b);
            (product, product >> bits(size) == 0)
        };
        self.set_wide(size, product);
        self.apply(&multiplied(fits));
        Ok(())
    }

    /// IMUL with two or three operands.
    fn multiply(&mut self, i: &Instruction) -> Result<(), Stop> {
        let to = self.place(i, 0, Access::WRITE)?;
        let first = if i.op_count() == 3 { 1 } else { 0 };
        let a = self.place(i, first, Access::READ)?;
        let b = self.place(i, first + 1, Access::READ)?;
        let size = size_of(&to);
        let product = signed_product(self.get(&a)?, self.get(&b)?, size);
        self.set(&to, product as u64)?;
        self.apply(&multiplied(fits_signed(product, size)));
        Ok(())
    }

    fn divide(&mut self, i: &Instruction, signed: bool) -> Result<(), Stop> {
        let source = self.place(i, 0, Access::READ)?;
        let size = size_of(&source);
        let divisor = self.get(&source)?;
        let n = bits(size);
        let (high, low) = if size == 1 {
            let ax = self.reg(Reg::part(Gpr::Rax, 2));
            (ax >> 8, ax & 0xff)
        } else {
            let part = |gpr| Reg::part(gpr, size);
            (self.reg(part(Gpr::Rdx)), self.reg(part(Gpr::Rax)))
        };
        let dividend = u128::from(high) << n | u128::from(low);
        let (quotient, remainder) = if signed {
            let unused = 128 - 2 * n;
            let dividend = (dividend << unused) as i128 >> unused;
            let divisor = i128::from(sign_extend(divisor, size) as i64);
            let quotient = dividend.checked_div(divisor).ok_or(Fault::DE)?;
            let remainder = dividend.checked_rem(divisor).ok_or(Fault::DE)?;
            if !fits_signed(quotient, size) {
                return Err(Fault::DE.into());
            }
            (quotient as u64, remainder as u64)
        } else {
            let divisor = u128::from(divisor);
            let quotient = dividend.checked_div(divisor).ok_or(Fault::DE)?;
            let remainder = dividend.checked_rem(divisor).ok_or(Fault::DE)?;
            if quotient >> n != 0 {
                return Err(Fault::DE.into());
            }
            (quotient as u64, remainder as u64)
        };
        let result = u128::from(remainder & mask(size)) << n | u128::from(quotient & mask(size));
        self.set_wide(size, result);
        Ok(())
    }

    /// Writes twice `size` bytes to RDX:RAX, or AX for bytes.
    fn set_wide(&mut self, size: u8, value: u128) {
        if size == 1 {
            self.set_reg(Reg::part(Gpr::Rax, 2), value as u64);
        } else {
            self.set_reg(Reg::part(Gpr::Rax, size), value as u64);
            self.set_reg(Reg::part(Gpr::Rdx, size), (value >> bits(size)) as u64);
        }
    }

    /// Bytes of the stack pointer (Intel SDM Vol. 1 §6.2.3).
    fn stack_size(&self) -> u8 {
        if self.mode.long() {
            8
        } else if self.vcpu.segment(SegmentRegister::Ss).rights.default_big() {
            4
        } else {
            2
        }
    }

    /// Bytes that PUSH moves for an operand.
    fn stack_operand(&self, place: &Place) -> u8 {
        match place {
            Place::Reg(reg) => reg.size,
            Place::Memory(span) => span.size,
            Place::Immediate(_) | Place::Selector(_) => self.mode.bits / 8,
        }
    }

    /// Locates where PUSH writes `size` bytes, ahead of any side effect; gives it with the new RSP.
    fn push_slot(&mut self, size: u8) -> Result<(Span, u64), Stop> {
        let pointer = Reg::part(Gpr::Rsp, self.stack_size());
        let top = self.reg(pointer).wrapping_sub(size.into()) & mask(pointer.size);
        let span = self.locate(SegmentRegister::Ss, top, size, Access::WRITE)?;
        Ok((span, top))
    }

    /// Writes to a located slot, then moves RSP.
    fn push(&mut self, (span, top): &(Span, u64), value: u64) -> Result<(), Stop> {
        self.store(span, value)?;
        self.set_reg(Reg::part(Gpr::Rsp, self.stack_size()), *top);
        Ok(())
    }

    /// POP computes an address based on RSP after it has moved RSP.
    fn pop(&mut self, i: &Instruction) -> Result<(), Stop> {
        let pointer = Reg::part(Gpr::Rsp, self.stack_size());
        let old = self.vcpu.rsp();
        let size = match i.op0_kind() {
            OpKind::Memory => match i.code() {
                Form::Pop_rm16 => 2,
                Form::Pop_rm32 => 4,
                _ => 8,
            },
            _ => match Reg::from_iced(i.op0_register()) {
                Some(reg) => reg.size,
                None => return Err(Stop::Unsupported("POP of a segment register")),
            },
        };
        let top = self.reg(pointer);
        let span = self.locate(SegmentRegister::Ss, top, size, Access::READ)?;
        let value = self.load(&span)?;
        self.set_reg(pointer, top.wrapping_add(size.into()));
        let popped = self
            .place(i, 0, Access::WRITE)
            .and_then(|to| self.set(&to, value));
        if popped.is_err() {
            self.vcpu.set_rsp(old);
        }
        popped
    }

    /// Near CALL and JMP through memory or a register.
    fn transfer(&mut self, i: &Instruction, next: u64) -> Result<Flow, Stop> {
        let form = i.code();
        let near = matches!(
            form,
            Form::Call_rm16
                | Form::Call_rm32
                | Form::Call_rm64
                | Form::Jmp_rm16
                | Form::Jmp_rm32
                | Form::Jmp_rm64
        );
        if !near {
            return Err(Stop::Unsupported("a far call or jump"));
        }
        let to = self.place(i, 0, Access::READ)?;
        let slot = match i.mnemonic() {
            Mnemonic::Call => Some(self.push_slot(size_of(&to))?),
            _ => None,
        };
        let target = self.get(&to)?;
        let legal = if self.mode.long() {
            self.paging.canonical(target)
        } else {
            target <= self.mode.limit
        };
        if !legal {
            return Err(Fault::GP0.into());
        }
        if let Some(slot) = slot {
            self.push(&slot, next)?;
        }
        Ok(Flow::Jump(target))
    }
}

fn size_of(place: &Place) -> u8 {
    match place {
        Place::Reg(reg) => reg.size,
        Place::Memory(span) => span.size,
        Place::Selector(_) => 2,
        Place::Immediate(_) => 8,
    }
}

fn signed_product(a: u64, b: u64, size: u8) -> i128 {
    let wide = |value| i128::from(sign_extend(value, size) as i64);
    wide(a) * wide(b)
}

fn fits_signed(value: i128, size: u8) -> bool {
    value == i128::from(sign_extend(value as u64, size) as i64)
}

/// CF and OF of a product: set where its upper half matters. The others are undefined.
fn multiplied(fits: bool) -> Outcome {
    let flags = RFlags::CF.union(RFlags::OF).bits();
    Outcome {
        value: 0,
        flags: if fits { 0 } else { flags },
        touched: flags,
    }
}
