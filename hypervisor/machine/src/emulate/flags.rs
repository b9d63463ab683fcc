//! Arithmetic with status flags, on values of 1, 2, 4 or 8 bytes (Intel SDM Vol. 1 §3.4.3.1 and
//! the instructions' pages in Vol. 2). Flags that the manual leaves undefined are left cleared or
//! unchanged.

use arch::RFlags;

const CF: u64 = RFlags::CF.bits();
const PF: u64 = RFlags::PF.bits();
const AF: u64 = RFlags::AF.bits();
const ZF: u64 = RFlags::ZF.bits();
const SF: u64 = RFlags::SF.bits();
const OF: u64 = RFlags::OF.bits();
/// The six status flags.
pub const STATUS: u64 = CF | PF | AF | ZF | SF | OF;

/// A result: the value, the flags it sets, and which flags it touches at all.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    pub value: u64,
    pub flags: u64,
    pub touched: u64,
}

impl Outcome {
    /// A value that leaves the flags alone.
    pub const fn plain(value: u64) -> Self {
        Self {
            value,
            flags: 0,
            touched: 0,
        }
    }

    /// `flags` with what this result changes in them.
    pub const fn apply(&self, flags: u64) -> u64 {
        flags & !self.touched | self.flags & self.touched
    }

    const fn keeping(self, kept: u64) -> Self {
        Self {
            touched: self.touched & !kept,
            ..self
        }
    }
}

/// All ones in `size` bytes.
pub const fn mask(size: u8) -> u64 {
    match size {
        1 => 0xff,
        2 => 0xffff,
        4 => 0xffff_ffff,
        _ => u64::MAX,
    }
}

/// The number of bits in `size` bytes.
pub const fn bits(size: u8) -> u32 {
    match size {
        1 => 8,
        2 => 16,
        4 => 32,
        _ => 64,
    }
}

/// `value` of `size` bytes extended by its sign.
pub const fn sign_extend(value: u64, size: u8) -> u64 {
    let shift = 64 - bits(size);
    ((value << shift) as i64 >> shift) as u64
}

const fn sign(value: u64, size: u8) -> bool {
    value >> (bits(size) - 1) & 1 != 0
}

const fn flag(condition: bool, flag: u64) -> u64 {
    if condition { flag } else { 0 }
}

const fn sign_zero_parity(value: u64, size: u8) -> u64 {
    flag(sign(value, size), SF)
        | flag(value & mask(size) == 0, ZF)
        | flag((value as u8).count_ones() & 1 == 0, PF)
}

/// `a + b + carry`
pub const fn add(a: u64, b: u64, carry: bool, size: u8) -> Outcome {
    let (a, b) = (a & mask(size), b & mask(size));
    let wide = a as u128 + b as u128 + carry as u128;
    let value = wide as u64 & mask(size);
    Outcome {
        value,
        flags: sign_zero_parity(value, size)
            | flag(wide > mask(size) as u128, CF)
            | (a ^ b ^ value) & AF
            | flag(sign((a ^ value) & (b ^ value), size), OF),
        touched: STATUS,
    }
}

/// `a - b - borrow`
pub const fn sub(a: u64, b: u64, borrow: bool, size: u8) -> Outcome {
    let (a, b) = (a & mask(size), b & mask(size));
    let value = a.wrapping_sub(b).wrapping_sub(borrow as u64) & mask(size);
    Outcome {
        value,
        flags: sign_zero_parity(value, size)
            | flag((a as u128) < b as u128 + borrow as u128, CF)
            | (a ^ b ^ value) & AF
            | flag(sign((a ^ b) & (a ^ value), size), OF),
        touched: STATUS,
    }
}

/// The flags of AND, OR, XOR and TEST for their result.
pub const fn logic(value: u64, size: u8) -> Outcome {
    let value = value & mask(size);
    Outcome {
        value,
        flags: sign_zero_parity(value, size),
        touched: STATUS,
    }
}

/// INC: as an addition that leaves CF alone.
pub const fn inc(a: u64, size: u8) -> Outcome {
    add(a, 1, false, size).keeping(CF)
}

/// DEC: as a subtraction that leaves CF alone.
pub const fn dec(a: u64, size: u8) -> Outcome {
    sub(a, 1, false, size).keeping(CF)
}

/// The shifts and rotates of opcode group 2.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shift {
    Rol,
    Ror,
    Rcl,
    Rcr,
    Shl,
    Shr,
    Sar,
}

/// The count as the CPU takes it: modulo 32, or 64 for eight bytes.
const fn count_of(count: u64, size: u8) -> u32 {
    (count & if size == 8 { 63 } else { 31 }) as u32
}

/// A shift or rotate of `a` by `count`; `carry` is CF before it. A count of zero touches no flag.
pub fn shift(kind: Shift, a: u64, count: u64, carry: bool, size: u8) -> Outcome {
    let n = bits(size);
    let a = a & mask(size);
    let count = count_of(count, size);
    if count == 0 {
        return Outcome::plain(a);
    }
    let top = |value: u64| value >> (n - 1) & 1 != 0;
    let (value, out, overflow) = match kind {
        Shift::Shl => {
            let wide = u128::from(a) << count;
            let value = wide as u64 & mask(size);
            let out = wide >> n & 1 != 0;
            (value, out, top(value) != out)
        }
        Shift::Shr => (a >> count, a >> (count - 1) & 1 != 0, top(a)),
        Shift::Sar => {
            let a = sign_extend(a, size) as i64;
            let value = (a >> count) as u64 & mask(size);
            (value, a >> (count - 1) & 1 != 0, false)
        }
        Shift::Rol => {
            let by = count % n;
            let wide = u128::from(a) << by;
            let value = (wide as u64 | (wide >> n) as u64) & mask(size);
            (value, value & 1 != 0, top(value) != (value & 1 != 0))
        }
        Shift::Ror => {
            let wide = (u128::from(a) << n) >> (count % n);
            let value = ((wide >> n) as u64 | wide as u64) & mask(size);
            (value, top(value), top(value) != top(value << 1))
        }
        Shift::Rcl | Shift::Rcr => {
            // A rotate of n + 1 bits, the carry on top.
            let ring = u128::from(a) | u128::from(carry) << n;
            let by = count % (n + 1);
            let by = if kind == Shift::Rcl || by == 0 {
                by
            } else {
                n + 1 - by
            };
            let turned = ring << by | ring >> (n + 1 - by);
            let value = turned as u64 & mask(size);
            let out = turned >> n & 1 != 0;
            let overflow = if kind == Shift::Rcl {
                top(value) != out
            } else {
                top(value) != top(value << 1)
            };
            (value, out, overflow)
        }
    };
    let carry_overflow = flag(out, CF) | flag(overflow, OF);
    match kind {
        Shift::Shl | Shift::Shr | Shift::Sar => Outcome {
            value,
            flags: carry_overflow | sign_zero_parity(value, size),
            touched: STATUS,
        },
        _ => Outcome {
            value,
            flags: carry_overflow,
            touched: CF | OF,
        },
    }
}

/// SHLD (`left`) or SHRD of `a`, filled from `fill`. A count beyond 16 for two bytes is undefined
/// by the manual, and fills with zeroes here.
pub fn double_shift(left: bool, a: u64, fill: u64, count: u64, size: u8) -> Outcome {
    let n = bits(size);
    let (a, fill) = (a & mask(size), fill & mask(size));
    let count = count_of(count, size);
    if count == 0 {
        return Outcome::plain(a);
    }
    let (value, out) = if left {
        let ring = u128::from(a) << n | u128::from(fill);
        let value = (ring << count >> n) as u64 & mask(size);
        (value, ring >> (2 * n - count) & 1 != 0)
    } else {
        let ring = u128::from(fill) << n | u128::from(a);
        let value = (ring >> count) as u64 & mask(size);
        (value, ring >> (count - 1) & 1 != 0)
    };
    Outcome {
        value,
        flags: sign_zero_parity(value, size) | flag(out, CF) | flag(sign(value ^ a, size), OF),
        touched: STATUS,
    }
}

/// Whether the condition with this encoding (0 to 15) holds (Intel SDM Vol. 1 appendix B).
pub const fn condition(code: u32, rflags: u64) -> bool {
    let less = (rflags & SF != 0) != (rflags & OF != 0);
    let holds = match code >> 1 & 7 {
        0 => rflags & OF != 0,
        1 => rflags & CF != 0,
        2 => rflags & ZF != 0,
        3 => rflags & (CF | ZF) != 0,
        4 => rflags & SF != 0,
        5 => rflags & PF != 0,
        6 => less,
        _ => rflags & ZF != 0 || less,
    };
    holds != (code & 1 != 0)
}
