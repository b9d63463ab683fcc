//! Small programs against a device: assemble, execute one instruction, look at registers, RAM and
//! what the device saw.

extern crate alloc;

use alloc::format;
use alloc::vec;
use alloc::vec::Vec;

use arch::{
    Access, AccessRights, ControlRegister, Cr0, CrOp, DebugRegister, Event, Exception, Gpr,
    GuestPhysAddr, IoExit, RFlags, Segment, SegmentRegister, Vcpu, Vector,
};
use iced_x86::IcedError;
use iced_x86::code_asm::*;

use super::flags::{STATUS, bits, mask};
use super::*;
use crate::mock::{FlatMemory, MockVcpu};

/// Guest-physical memory 0 to 1 MiB appears here; tables stand above it.
const KERNEL: u64 = 0xffff_8000_0000_0000;
/// Where instructions stand.
const CODE: u64 = 0x1000;
/// Two pages of a device: linear and guest-physical.
const DEVICE: u64 = 0xffff_9000_0000_0000;
const DEVICE_GPA: u64 = 0xfee0_0000;

/// A device that is memory and remembers its accesses.
struct Device {
    bytes: Vec<u8>,
    /// (write, offset, size, value)
    log: Vec<(bool, u64, u8, u64)>,
}

impl MmioBus for Device {
    fn read(&mut self, addr: GuestPhysAddr, size: u8) -> u64 {
        let at = addr.as_u64().wrapping_sub(DEVICE_GPA) as usize;
        let bytes = self.bytes.get(at..at.saturating_add(size.into()));
        let value = bytes.map_or(mask(size), little_endian);
        self.log.push((false, at as u64, size, value));
        value
    }
    fn write(&mut self, addr: GuestPhysAddr, size: u8, value: u64) {
        assert!([1, 2, 4, 8].contains(&size) && value & !mask(size) == 0);
        let at = addr.as_u64().wrapping_sub(DEVICE_GPA) as usize;
        if let Some(bytes) = self.bytes.get_mut(at..at.saturating_add(size.into())) {
            bytes.copy_from_slice(&value.to_le_bytes()[..usize::from(size)]);
        }
        self.log.push((true, at as u64, size, value));
    }
}

struct World {
    cpu: MockVcpu,
    mem: FlatMemory,
    dev: Device,
    page: CodePage,
}

impl World {
    /// 64-bit mode at level 0; RIP at [`CODE`], RSP at 0x8000, RDI at the device, RSI at RAM 0x4000.
    fn long() -> Self {
        let mut mem = FlatMemory::new(0x12_0000);
        let root = mem.table();
        for page in 0..32 {
            mem.map(root, KERNEL + page * 4096, page * 4096, 3);
            mem.map(root, page * 4096, page * 4096, 7);
        }
        for page in 0..2 {
            mem.map(root, DEVICE + page * 4096, DEVICE_GPA + page * 4096, 3);
        }
        let mut cpu = MockVcpu::long(root);
        cpu.rip = KERNEL + CODE;
        cpu.rsp = KERNEL + 0x8000;
        cpu.set_gpr(Gpr::Rdi, DEVICE);
        cpu.set_gpr(Gpr::Rsi, KERNEL + 0x4000);
        Self {
            cpu,
            mem,
            dev: Device {
                bytes: vec![0; 0x2000],
                log: Vec::new(),
            },
            page: CodePage::NONE,
        }
    }

    /// 32-bit protected mode without paging; the device lies where it lies.
    fn protected() -> Self {
        let mut world = Self::long();
        world.cpu = MockVcpu::protected();
        world.cpu.rip = CODE;
        world.cpu.rsp = 0x8000;
        world.cpu.set_gpr(Gpr::Rdi, DEVICE_GPA);
        world.cpu.set_gpr(Gpr::Rsi, 0x4000);
        world
    }

    fn set(&mut self, gpr: Gpr, value: u64) -> &mut Self {
        self.cpu.set_gpr(gpr, value);
        self
    }

    fn get(&self, gpr: Gpr) -> u64 {
        self.cpu.gpr(gpr)
    }

    fn device(&mut self, at: usize, value: u64) -> &mut Self {
        self.dev.bytes[at..at + 8].copy_from_slice(&value.to_le_bytes());
        self
    }

    fn device_value(&self, at: usize) -> u64 {
        little_endian(&self.dev.bytes[at..at + 8])
    }

    fn code(&mut self, bytes: &[u8]) -> &mut Self {
        let at = CODE + (self.cpu.rip & 0xfff);
        self.mem.load(at, bytes);
        self
    }

    fn emulate(&mut self) -> Result<Done, EmulateError> {
        self.dev.log.clear();
        emulate(&mut self.cpu, &mut self.mem, &mut self.dev)
    }

    /// Assembles one instruction at RIP; gives its length.
    fn assemble(&mut self, f: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>) -> u64 {
        let bitness = if self.cpu.efer == 0 { 32 } else { 64 };
        let mut a = CodeAssembler::new(bitness).unwrap();
        f(&mut a).unwrap();
        let bytes = a.assemble(self.cpu.rip).unwrap();
        self.code(&bytes);
        bytes.len() as u64
    }

    /// Assembles and executes one instruction, which must complete.
    fn run(&mut self, f: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>) -> &mut Self {
        let rip = self.cpu.rip;
        let length = self.assemble(f);
        assert_eq!(self.emulate(), Ok(Done::Next), "{:x?}", self.mem.u64(CODE));
        assert_eq!(self.cpu.rip, rip + length);
        self.cpu.rip = rip;
        self
    }

    /// Assembles and executes one instruction, which must fault with this and change nothing.
    fn faults(
        &mut self,
        fault: Fault,
        f: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>,
    ) {
        self.assemble(f);
        let before = self.cpu.clone();
        assert_eq!(self.emulate(), Ok(Done::Fault(fault)));
        assert_eq!(self.cpu, before);
    }
}

/// Numbers that repeat from run to run.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// Often an edge of some operand size.
    fn operand(&mut self) -> u64 {
        let value = self.next();
        match value >> 60 {
            0 => 0,
            1 => 1,
            2 => u64::MAX,
            3 => 0x80,
            4 => 0x8000,
            5 => 0x8000_0000,
            6 => 0x8000_0000_0000_0000,
            7 => 0x7fff_ffff_ffff_ffff,
            8 => 0x7f7f_7f7f,
            9 => self.next() & 0xff,
            _ => self.next(),
        }
    }
}

fn page_fault(error_code: u32, linear: u64) -> Fault {
    Fault::page(error_code, linear)
}

#[test]
fn mov_in_every_shape() {
    let mut w = World::long();
    w.device(8, 0x8899_aabb_ccdd_eeff).set(Gpr::Rax, u64::MAX);
    w.run(|a| a.mov(eax, dword_ptr(rdi + 8)));
    assert_eq!(w.get(Gpr::Rax), 0xccdd_eeff, "the upper half is cleared");
    w.run(|a| a.mov(rax, qword_ptr(rdi + 8)));
    assert_eq!(w.get(Gpr::Rax), 0x8899_aabb_ccdd_eeff);
    w.set(Gpr::Rax, 0x1111_1111_1111_1111)
        .run(|a| a.mov(ax, word_ptr(rdi + 8)));
    assert_eq!(w.get(Gpr::Rax), 0x1111_1111_1111_eeff);
    w.run(|a| a.mov(ah, byte_ptr(rdi + 9)));
    assert_eq!(w.get(Gpr::Rax), 0x1111_1111_1111_eeff);
    w.run(|a| a.mov(r9b, byte_ptr(rdi + 8)));
    assert_eq!(w.get(Gpr::R9), 0xff);
    w.run(|a| a.movzx(r10d, byte_ptr(rdi + 8)));
    assert_eq!(w.get(Gpr::R10), 0xff);
    w.run(|a| a.movzx(r10, word_ptr(rdi + 8)));
    assert_eq!(w.get(Gpr::R10), 0xeeff);
    w.run(|a| a.movsx(r10d, byte_ptr(rdi + 8)));
    assert_eq!(w.get(Gpr::R10), 0xffff_ffff);
    w.run(|a| a.movsx(r10, word_ptr(rdi + 8)));
    assert_eq!(w.get(Gpr::R10), 0xffff_ffff_ffff_eeff);
    w.run(|a| a.movsxd(r10, dword_ptr(rdi + 8)));
    assert_eq!(w.get(Gpr::R10), 0xffff_ffff_ccdd_eeff);
    w.run(|a| a.movbe(r10d, dword_ptr(rdi + 8)));
    assert_eq!(w.get(Gpr::R10), 0xffee_ddcc);
    w.run(|a| a.movbe(r10w, word_ptr(rdi + 8)));
    assert_eq!(w.get(Gpr::R10), 0xffee_ffee);

    w.set(Gpr::Rbx, 0x0102_0304_0506_0708);
    w.run(|a| a.mov(dword_ptr(rdi), ebx));
    assert_eq!(w.dev.log, [(true, 0, 4, 0x0506_0708)]);
    w.run(|a| a.mov(byte_ptr(rdi), bh));
    assert_eq!(w.dev.log, [(true, 0, 1, 7)]);
    w.run(|a| a.mov(qword_ptr(rdi), -2));
    assert_eq!(w.dev.log, [(true, 0, 8, u64::MAX - 1)]);
    w.run(|a| a.mov(word_ptr(rdi), 0x1234));
    assert_eq!(w.dev.log, [(true, 0, 2, 0x1234)]);
    w.run(|a| a.movnti(qword_ptr(rdi), rbx));
    assert_eq!(w.dev.log, [(true, 0, 8, 0x0102_0304_0506_0708)]);
    w.run(|a| a.movbe(qword_ptr(rdi), rbx));
    assert_eq!(w.dev.log, [(true, 0, 8, 0x0807_0605_0403_0201)]);
    w.run(|a| a.mov(word_ptr(rdi), ss));
    assert_eq!(w.dev.log, [(true, 0, 2, 0)]);

    // movabs in both directions, RIP-relative, SIB with a scaled index, 32-bit addresses.
    w.run(|a| a.mov(rax, qword_ptr(DEVICE + 8)));
    assert_eq!(w.get(Gpr::Rax), 0x8899_aabb_ccdd_eeff);
    w.set(Gpr::Rax, 0x77)
        .run(|a| a.mov(byte_ptr(DEVICE + 0x20), al));
    assert_eq!(w.dev.log, [(true, 0x20, 1, 0x77)]);
    w.mem.map(w.cpu.cr3, KERNEL + 0x5000, DEVICE_GPA, 3);
    w.run(|a| a.mov(eax, dword_ptr(KERNEL + 0x5008)));
    assert_eq!(w.dev.log, [(false, 8, 4, 0xccdd_eeff)]);
    w.set(Gpr::R12, 2)
        .run(|a| a.mov(eax, dword_ptr(rdi + r12 * 4 + 4)));
    assert_eq!(w.dev.log, [(false, 12, 4, 0x8899_aabb)]);
    w.mem.map(w.cpu.cr3, 0x1_0000, DEVICE_GPA, 3);
    w.set(Gpr::Rcx, 0xf_0001_0000)
        .run(|a| a.mov(eax, dword_ptr(ecx - 0)));
    assert_eq!(w.dev.log, [(false, 0, 4, w.get(Gpr::Rax))]);
}

/// A full adder, bit by bit: value, carry out of the top, carry out of bit 3, overflow.
fn adder(a: u64, b: u64, carry: bool, size: u8) -> (u64, bool, bool, bool) {
    let (mut sum, mut c, mut half, mut into_top) = (0, carry, false, false);
    for i in 0..bits(size) {
        let (x, y) = (a >> i & 1, b >> i & 1);
        into_top = c;
        let total = x + y + u64::from(c);
        sum |= (total & 1) << i;
        c = total > 1;
        if i == 3 {
            half = c;
        }
    }
    (sum, c, half, into_top != c)
}

fn status(value: u64, size: u8, cf: bool, af: bool, of: bool) -> RFlags {
    let mut flags = RFlags::empty();
    let mut ones = 0;
    for i in 0..8 {
        ones += value >> i & 1;
    }
    flags.set(RFlags::CF, cf);
    flags.set(RFlags::PF, ones % 2 == 0);
    flags.set(RFlags::AF, af);
    flags.set(RFlags::ZF, value == 0);
    flags.set(RFlags::SF, value >> (bits(size) - 1) == 1);
    flags.set(RFlags::OF, of);
    flags
}

/// What one arithmetic instruction gives, by the adder: (opcode group 1 number, a, b).
fn model(op: u8, a: u64, b: u64, carry: bool, size: u8) -> (u64, RFlags) {
    let not_b = !b & mask(size);
    let (value, c, half, of) = match op {
        0 => adder(a, b, false, size),
        2 => adder(a, b, carry, size),
        // A subtraction adds the complement; both carries turn round.
        3 | 5 | 7 => {
            let borrow = op == 3 && carry;
            let (value, c, half, of) = adder(a, not_b, !borrow, size);
            (value, !c, !half, of)
        }
        1 => (a | b, false, false, false),
        4 => (a & b, false, false, false),
        _ => (a ^ b, false, false, false),
    };
    (value, status(value, size, c, half, of))
}

/// The bytes of `prefixes opcode [rdi], reg/imm` forms: 66 or REX.W for the size.
fn sized(size: u8, opcode: u8, modrm: u8) -> Vec<u8> {
    match size {
        1 => vec![opcode, modrm],
        2 => vec![0x66, opcode | 1, modrm],
        4 => vec![opcode | 1, modrm],
        _ => vec![0x48, opcode | 1, modrm],
    }
}

#[test]
fn arithmetic_agrees_with_a_full_adder() {
    let mut w = World::long();
    let mut random = Random(0x1234_5678_9abc_def1);
    for round in 0..20_000u32 {
        let op = (round % 8) as u8;
        let size = [1, 2, 4, 8][(round / 8 % 4) as usize];
        let (memory, register) = (random.operand(), random.operand());
        let carry = random.next() & 1 != 0;
        w.device(0, memory).set(Gpr::Rdx, register);
        w.cpu.rflags = RFlags::FIXED | if carry { RFlags::CF } else { RFlags::empty() };
        // Forms: 0 = [rdi] op= dl.., 1 = dl.. op= [rdi], 2 = [rdi] op= imm8
        let form = round / 32 % 3;
        let imm = random.next() as u8;
        let code = match form {
            0 => sized(size, op << 3, 0x17),
            1 => sized(size, op << 3 | 2, 0x17),
            _ => {
                let mut code = sized(size, 0x80, op << 3 | 7);
                if size != 1 {
                    // 83 /op imm8, extended by its sign.
                    let at = code.len() - 2;
                    code[at] = 0x83;
                }
                code.push(imm);
                code
            }
        };
        let rip = w.cpu.rip;
        w.code(&code);
        assert_eq!(w.emulate(), Ok(Done::Next), "{code:x?}");
        assert_eq!(w.cpu.rip, rip + code.len() as u64);
        w.cpu.rip = rip;

        let (m, r) = (memory & mask(size), register & mask(size));
        let i = i64::from(imm as i8) as u64 & mask(size);
        let (a, b) = [(m, r), (r, m), (m, i)][form as usize];
        let (value, flags) = model(op, a, b, carry, size);
        let context = format!("{code:x?} {a:x} {b:x} {carry}");
        assert_eq!(
            w.cpu.rflags & RFlags::from_bits_retain(STATUS),
            flags,
            "{context}"
        );
        let kept = if op == 7 { a } else { value };
        if form == 1 {
            assert_eq!(w.get(Gpr::Rdx) & mask(size), kept, "{context}");
            assert_eq!(w.device_value(0), memory);
        } else {
            assert_eq!(w.device_value(0), memory & !mask(size) | kept, "{context}");
        }
        if op == 7 {
            assert!(
                w.dev.log.iter().all(|access| !access.0),
                "CMP writes nothing"
            );
        }
    }
}

#[test]
fn unary_agrees_with_a_full_adder() {
    let mut w = World::long();
    let mut random = Random(77);
    for round in 0..4_000u32 {
        let op = round % 4;
        let size = [1, 2, 4, 8][(round / 4 % 4) as usize];
        let memory = random.operand();
        let before = RFlags::from_bits_retain(random.next() & STATUS);
        w.device(0, memory);
        w.cpu.rflags = before | RFlags::FIXED;
        let rip = w.cpu.rip;
        // inc, dec, not, neg
        let code = match op {
            0 => sized(size, 0xfe, 0x07),
            1 => sized(size, 0xfe, 0x0f),
            2 => sized(size, 0xf6, 0x17),
            _ => sized(size, 0xf6, 0x1f),
        };
        w.code(&code);
        assert_eq!(w.emulate(), Ok(Done::Next));
        w.cpu.rip = rip;
        let a = memory & mask(size);
        let (value, mut flags) = match op {
            0 => model(0, a, 1, false, size),
            1 => model(5, a, 1, false, size),
            2 => (!a & mask(size), before),
            _ => model(5, 0, a, false, size),
        };
        if op < 2 {
            flags.set(RFlags::CF, before.contains(RFlags::CF));
        }
        assert_eq!(w.device_value(0) & mask(size), value);
        assert_eq!(w.cpu.rflags, flags | RFlags::FIXED, "{op} {a:x} {size}");
    }
}

/// One bit at a time: (value, carry).
fn turn(op: u8, a: u64, carry: bool, size: u8) -> (u64, bool) {
    let top = 1 << (bits(size) - 1);
    let (high, low) = (a & top != 0, a & 1 != 0);
    let up = |bit: bool| (a << 1 & mask(size)) | u64::from(bit);
    let down = |bit: bool| a >> 1 | if bit { top } else { 0 };
    match op {
        0 => (up(high), high),
        1 => (down(low), low),
        2 => (up(carry), high),
        3 => (down(carry), low),
        4 | 6 => (up(false), high),
        5 => (down(false), low),
        _ => (down(high), low),
    }
}

#[test]
fn shifts_agree_with_single_bits() {
    let mut w = World::long();
    let mut random = Random(991);
    for round in 0..20_000u32 {
        let op = (round % 8) as u8;
        let size = [1, 2, 4, 8][(round / 8 % 4) as usize];
        let count = random.next() as u8;
        let memory = random.operand();
        let before = RFlags::from_bits_retain(random.next() & STATUS);
        w.device(0, memory).set(Gpr::Rcx, count.into());
        w.cpu.rflags = before | RFlags::FIXED;
        let rip = w.cpu.rip;
        let mut code = sized(size, if round % 3 == 0 { 0xc0 } else { 0xd2 }, op << 3 | 7);
        if round % 3 == 0 {
            code.push(count);
        }
        w.code(&code);
        assert_eq!(w.emulate(), Ok(Done::Next), "{code:x?}");
        w.cpu.rip = rip;

        let n = count & if size == 8 { 63 } else { 31 };
        let (mut value, mut carry) = (memory & mask(size), before.contains(RFlags::CF));
        let first = value;
        for _ in 0..n {
            (value, carry) = turn(op, value, carry, size);
        }
        let context = format!("op {op} size {size} count {n} of {first:x}");
        assert_eq!(w.device_value(0) & mask(size), value, "{context}");
        let after = w.cpu.rflags;
        if n == 0 {
            assert_eq!(after, before | RFlags::FIXED);
            continue;
        }
        assert_eq!(after.contains(RFlags::CF), carry, "{context}");
        if op >= 4 {
            let rest = RFlags::SF | RFlags::ZF | RFlags::PF;
            assert_eq!(
                after & rest,
                status(value, size, false, false, false) & rest
            );
        } else {
            let rest = RFlags::SF | RFlags::ZF | RFlags::PF | RFlags::AF;
            assert_eq!(after & rest, before & rest, "{context}");
        }
        if n == 1 {
            let top = |value: u64| value >> (bits(size) - 1) & 1 != 0;
            assert_eq!(
                after.contains(RFlags::OF),
                top(first) != top(value),
                "{context}"
            );
        }
    }
}

#[test]
fn double_shifts() {
    let mut w = World::long();
    w.device(0, 0x1234_5678).set(Gpr::Rbx, 0x9abc_def0);
    w.run(|a| a.shld(dword_ptr(rdi), ebx, 8));
    assert_eq!(w.device_value(0), 0x3456_789a);
    assert!(
        !w.cpu.rflags.contains(RFlags::CF),
        "the last bit out was bit 24"
    );
    w.run(|a| a.shrd(dword_ptr(rdi), ebx, 8));
    assert_eq!(w.device_value(0), 0xf034_5678);
    assert!(
        w.cpu.rflags.contains(RFlags::CF),
        "0x9a has its top bit set"
    );
    w.device(0, 0x8000_0000_0000_0001).set(Gpr::Rcx, 63);
    w.run(|a| a.shld(qword_ptr(rdi), rbx, cl));
    assert_eq!(w.device_value(0), 0x8000_0000_0000_0000 | 0x9abc_def0 >> 1);
    w.device(0, 0x1234).run(|a| a.shrd(word_ptr(rdi), bx, 4));
    assert_eq!(w.device_value(0), 0x0123);
}

#[test]
fn bit_tests() {
    let mut w = World::long();
    w.device(0, 0b1000);
    w.run(|a| a.bt(dword_ptr(rdi), 3));
    assert!(w.cpu.rflags.contains(RFlags::CF));
    w.run(|a| a.bts(dword_ptr(rdi), 32 + 4));
    assert!(!w.cpu.rflags.contains(RFlags::CF));
    assert_eq!(
        w.device_value(0),
        0b1_1000,
        "an immediate stays in the operand"
    );
    // A register reaches beyond it, in both directions.
    w.set(Gpr::Rax, 100)
        .run(|a| a.lock().bts(dword_ptr(rdi), eax));
    assert_eq!(w.dev.log, [(false, 12, 4, 0), (true, 12, 4, 1 << 4)]);
    w.set(Gpr::Rdi, DEVICE + 0x100).set(Gpr::Rax, -8i64 as u64);
    w.run(|a| a.btc(qword_ptr(rdi), rax));
    assert_eq!(w.dev.log[1], (true, 0xf8, 8, 1 << 56));
    w.set(Gpr::Rax, 0xffff).run(|a| a.btr(word_ptr(rdi), ax));
    assert_eq!(w.dev.log[0], (false, 0xfe, 2, 0x0100));
    w.device(0x10, 0x00f0).set(Gpr::Rdi, DEVICE + 0x10);
    w.run(|a| a.bsf(ecx, dword_ptr(rdi)));
    assert_eq!(w.get(Gpr::Rcx), 4);
    w.run(|a| a.bsr(cx, word_ptr(rdi)));
    assert_eq!(w.get(Gpr::Rcx), 7);
    w.run(|a| a.lzcnt(ecx, dword_ptr(rdi)));
    assert_eq!(w.get(Gpr::Rcx), 24);
    w.run(|a| a.popcnt(rcx, qword_ptr(rdi)));
    assert_eq!(w.get(Gpr::Rcx), 4);
    w.device(0x10, 0).run(|a| a.bsf(ecx, dword_ptr(rdi)));
    assert_eq!(w.get(Gpr::Rcx), 4, "left alone");
    assert!(w.cpu.rflags.contains(RFlags::ZF));
    w.run(|a| a.tzcnt(cx, word_ptr(rdi)));
    assert_eq!(w.get(Gpr::Rcx), 16);
    assert!(w.cpu.rflags.contains(RFlags::CF) && !w.cpu.rflags.contains(RFlags::ZF));
}

#[test]
fn exchanges() {
    let mut w = World::long();
    w.device(0, 5).set(Gpr::Rbx, 7);
    w.run(|a| a.xchg(dword_ptr(rdi), ebx));
    assert_eq!((w.device_value(0), w.get(Gpr::Rbx)), (7, 5));
    w.run(|a| a.lock().xadd(dword_ptr(rdi), ebx));
    assert_eq!((w.device_value(0), w.get(Gpr::Rbx)), (12, 7));
    w.set(Gpr::Rax, 12)
        .run(|a| a.lock().cmpxchg(dword_ptr(rdi), ebx));
    assert_eq!(w.device_value(0), 7);
    assert!(w.cpu.rflags.contains(RFlags::ZF));
    w.set(Gpr::Rax, 0xffff_ffff_0000_000c);
    w.run(|a| a.cmpxchg(dword_ptr(rdi), ebx));
    assert_eq!(w.get(Gpr::Rax), 7, "loaded, upper half cleared");
    assert!(!w.cpu.rflags.contains(RFlags::ZF));
    assert_eq!(w.dev.log.last(), Some(&(true, 0, 4, 7)), "written back");

    w.set(Gpr::Rax, 7)
        .set(Gpr::Rdx, 0)
        .set(Gpr::Rbx, 0x11)
        .set(Gpr::Rcx, 0x22);
    w.run(|a| a.lock().cmpxchg8b(qword_ptr(rdi)));
    assert_eq!(w.device_value(0), 0x22_0000_0011);
    w.run(|a| a.cmpxchg8b(qword_ptr(rdi)));
    assert_eq!((w.get(Gpr::Rax), w.get(Gpr::Rdx)), (0x11, 0x22));
    w.set(Gpr::Rax, 0x22_0000_0011).set(Gpr::Rdx, 0);
    w.run(|a| a.cmpxchg16b(xmmword_ptr(rdi)));
    assert_eq!((w.device_value(0), w.device_value(8)), (0x11, 0x22));
    w.set(Gpr::Rdi, DEVICE + 8);
    w.faults(Fault::GP0, |a| a.cmpxchg16b(xmmword_ptr(rdi)));

    // In RAM the same are atomic.
    w.mem.set_u64(0x4000, 5);
    w.set(Gpr::Rbx, 9).run(|a| a.xchg(qword_ptr(rsi), rbx));
    assert_eq!((w.mem.u64(0x4000), w.get(Gpr::Rbx)), (9, 5));
    w.run(|a| a.lock().add(qword_ptr(rsi), 1));
    assert_eq!(w.mem.u64(0x4000), 10);
    w.set(Gpr::Rsi, KERNEL + 0x4003)
        .run(|a| a.lock().inc(dword_ptr(rsi)));
    assert_eq!(w.mem.u64(0x4000), 0x0100_000a);
}

#[test]
fn conditions() {
    // The sixteen in encoding order, as sentences about flags.
    let holds: [fn(RFlags) -> bool; 8] = [
        |f| f.contains(RFlags::OF),
        |f| f.contains(RFlags::CF),
        |f| f.contains(RFlags::ZF),
        |f| f.intersects(RFlags::CF | RFlags::ZF),
        |f| f.contains(RFlags::SF),
        |f| f.contains(RFlags::PF),
        |f| f.contains(RFlags::SF) != f.contains(RFlags::OF),
        |f| f.contains(RFlags::ZF) || f.contains(RFlags::SF) != f.contains(RFlags::OF),
    ];
    let mut w = World::long();
    for flags in 0..64u64 {
        let mut rflags = RFlags::FIXED;
        for (i, flag) in [0, 2, 4, 6, 7, 11].into_iter().enumerate() {
            rflags |= RFlags::from_bits_retain((flags >> i & 1) << flag);
        }
        w.cpu.rflags = rflags;
        for code in 0..16u8 {
            let expected = holds[usize::from(code / 2)](rflags) != (code & 1 != 0);
            let rip = w.cpu.rip;
            w.code(&[0x0f, 0x90 + code, 0x07]);
            assert_eq!(w.emulate(), Ok(Done::Next));
            assert_eq!(w.dev.log, [(true, 0, 1, expected.into())]);
            w.cpu.rip = rip;
            w.device(0, 0x55).set(Gpr::Rdx, u64::MAX);
            w.code(&[0x0f, 0x40 + code, 0x17]);
            assert_eq!(w.emulate(), Ok(Done::Next));
            assert_eq!(w.dev.log, [(false, 0, 4, 0x55)]);
            let value = if expected { 0x55 } else { 0xffff_ffff };
            assert_eq!(w.get(Gpr::Rdx), value, "32 bits are written in any case");
            w.cpu.rip = rip;
        }
    }
}

#[test]
fn products_and_quotients() {
    let mut w = World::long();
    w.device(0, 0xffff_ffff).set(Gpr::Rax, 0x10);
    w.run(|a| a.mul(dword_ptr(rdi)));
    assert_eq!((w.get(Gpr::Rdx), w.get(Gpr::Rax)), (0xf, 0xffff_fff0));
    assert!(w.cpu.rflags.contains(RFlags::CF | RFlags::OF));
    w.set(Gpr::Rax, 0x10).run(|a| a.imul(dword_ptr(rdi)));
    assert_eq!(
        (w.get(Gpr::Rdx), w.get(Gpr::Rax)),
        (0xffff_ffff, 0xffff_fff0)
    );
    assert!(!w.cpu.rflags.intersects(RFlags::CF | RFlags::OF));
    w.set(Gpr::Rax, 0x10).run(|a| a.mul(byte_ptr(rdi)));
    assert_eq!(w.get(Gpr::Rax), 0xff0);
    w.set(Gpr::Rcx, 3).run(|a| a.imul_2(ecx, dword_ptr(rdi)));
    assert_eq!(w.get(Gpr::Rcx), 0xffff_fffd);
    w.run(|a| a.imul_3(rcx, qword_ptr(rdi), -2));
    assert_eq!(w.get(Gpr::Rcx), -0x1_ffff_fffei64 as u64);

    w.device(0, 10).set(Gpr::Rdx, 1).set(Gpr::Rax, 7);
    w.run(|a| a.div(dword_ptr(rdi)));
    assert_eq!((w.get(Gpr::Rax), w.get(Gpr::Rdx)), (0x1999_999a, 3));
    w.set(Gpr::Rax, 0xff38).run(|a| a.idiv(byte_ptr(rdi)));
    assert_eq!(w.get(Gpr::Rax), 0x00ec, "-200 / 10 = -20 rest 0");
    w.set(Gpr::Rdx, u64::MAX).set(Gpr::Rax, -17i64 as u64);
    w.run(|a| a.idiv(qword_ptr(rdi)));
    assert_eq!(
        (w.get(Gpr::Rax), w.get(Gpr::Rdx)),
        (-1i64 as u64, -7i64 as u64)
    );
    w.set(Gpr::Rdx, 10);
    w.faults(Fault::DE, |a| a.div(dword_ptr(rdi)));
    w.device(0, 0);
    w.faults(Fault::DE, |a| a.idiv(qword_ptr(rdi)));
    w.device(0, u64::MAX)
        .set(Gpr::Rdx, 1 << 63)
        .set(Gpr::Rax, 0);
    w.faults(Fault::DE, |a| a.idiv(qword_ptr(rdi)));
}

#[test]
fn stack_and_transfers() {
    let mut w = World::long();
    w.device(0, KERNEL + 0x2000);
    w.run(|a| a.push(qword_ptr(rdi)));
    assert_eq!(w.cpu.rsp, KERNEL + 0x7ff8);
    assert_eq!(w.mem.u64(0x7ff8), KERNEL + 0x2000);
    w.run(|a| a.pop(qword_ptr(rdi + 8)));
    assert_eq!(
        (w.cpu.rsp, w.device_value(8)),
        (KERNEL + 0x8000, KERNEL + 0x2000)
    );
    // An address with RSP is that after the POP.
    w.mem.set_u64(0x8000, 0x99);
    w.run(|a| a.pop(qword_ptr(rsp + 0x10)));
    assert_eq!(w.mem.u64(0x8018), 0x99);

    w.cpu.rsp = KERNEL + 0x8000;
    let length = w.assemble(|a| a.call(qword_ptr(rdi)));
    assert_eq!(w.emulate(), Ok(Done::Next));
    assert_eq!(w.cpu.rip, KERNEL + 0x2000);
    assert_eq!(w.mem.u64(0x7ff8), KERNEL + CODE + length);
    w.cpu.rip = KERNEL + CODE;
    w.assemble(|a| a.jmp(qword_ptr(rdi)));
    assert_eq!(w.emulate(), Ok(Done::Next));
    assert_eq!(w.cpu.rip, KERNEL + 0x2000);
    w.cpu.rip = KERNEL + CODE;
    w.device(0, 1 << 60);
    w.faults(Fault::GP0, |a| a.call(qword_ptr(rdi)));
    // The stack is located before the device is read.
    w.cpu.rsp = KERNEL + 0x2_0000_0000;
    let fault = page_fault(2, w.cpu.rsp - 8);
    w.faults(fault, |a| a.push(qword_ptr(rdi)));
    assert!(w.dev.log.is_empty());
}

#[test]
fn strings() {
    let mut w = World::long();
    w.mem.load(0x4000, b"hello, device!!!");
    w.set(Gpr::Rcx, 16).run(|a| a.rep().movsb());
    assert_eq!(&w.dev.bytes[..16], b"hello, device!!!");
    assert_eq!((w.get(Gpr::Rcx), w.get(Gpr::Rdi)), (0, DEVICE + 16));
    // Back from the device, downwards.
    w.cpu.rflags |= RFlags::DF;
    w.set(Gpr::Rsi, DEVICE + 8)
        .set(Gpr::Rdi, KERNEL + 0x5008)
        .set(Gpr::Rcx, 2);
    w.run(|a| a.rep().movsq());
    assert_eq!(w.mem.u64(0x5000), w.device_value(0));
    assert_eq!(w.get(Gpr::Rsi), DEVICE - 8);
    w.cpu.rflags -= RFlags::DF;

    w.set(Gpr::Rdi, DEVICE)
        .set(Gpr::Rax, 0x4142)
        .set(Gpr::Rcx, 0);
    w.run(|a| a.rep().stosd());
    assert!(w.dev.log.is_empty(), "a count of zero does nothing");
    w.run(|a| a.stosw());
    assert_eq!(w.dev.log, [(true, 0, 2, 0x4142)]);
    w.set(Gpr::Rsi, DEVICE).set(Gpr::Rax, 0).run(|a| a.lodsb());
    assert_eq!((w.get(Gpr::Rax), w.get(Gpr::Rsi)), (0x42, DEVICE + 1));

    // SCAS finds, CMPS differs; both leave their registers past the element.
    w.dev.bytes[..8].copy_from_slice(b"abcdefgh");
    w.set(Gpr::Rdi, DEVICE)
        .set(Gpr::Rcx, 100)
        .set(Gpr::Rax, b'd'.into());
    w.run(|a| a.repne().scasb());
    assert_eq!((w.get(Gpr::Rdi), w.get(Gpr::Rcx)), (DEVICE + 4, 96));
    assert!(w.cpu.rflags.contains(RFlags::ZF));
    w.mem.load(0x4000, b"abcxefgh");
    w.set(Gpr::Rdi, DEVICE)
        .set(Gpr::Rsi, KERNEL + 0x4000)
        .set(Gpr::Rcx, 8);
    w.run(|a| a.repe().cmpsb());
    assert_eq!((w.get(Gpr::Rdi), w.get(Gpr::Rcx)), (DEVICE + 4, 4));
    assert!(
        !w.cpu.rflags.intersects(RFlags::ZF | RFlags::CF),
        "x is above d"
    );

    // 32-bit addresses use ECX, ESI and EDI, and clear their upper halves.
    w.mem.map(w.cpu.cr3, 0x1_0000, DEVICE_GPA, 3);
    w.set(Gpr::Rdi, 0xf_0001_0000).set(Gpr::Rcx, 0xf_0000_0002);
    w.code(&[0x67, 0xf3, 0xaa]);
    let rip = w.cpu.rip;
    assert_eq!(w.emulate(), Ok(Done::Next));
    assert_eq!((w.get(Gpr::Rdi), w.get(Gpr::Rcx)), (0x1_0002, 0));
    w.cpu.rip = rip;
}

#[test]
fn a_long_string_yields_and_goes_on() {
    let mut w = World::long();
    w.set(Gpr::Rcx, 600).set(Gpr::Rax, 0xee);
    w.assemble(|a| a.rep().stosb());
    let mut exits = 1;
    while w.emulate() == Ok(Done::Again) {
        assert_eq!(w.cpu.rip, KERNEL + CODE);
        assert_eq!(w.get(Gpr::Rdi) - DEVICE, 600 - w.get(Gpr::Rcx));
        exits += 1;
    }
    assert_eq!((exits, w.get(Gpr::Rcx)), (3, 0));
    assert!(w.dev.bytes[..600].iter().all(|&byte| byte == 0xee) && w.dev.bytes[600] == 0);
    // The walk is made once a page, not once an element.
    w.cpu.rip = KERNEL + CODE;
    w.set(Gpr::Rcx, 100).set(Gpr::Rdi, DEVICE);
    w.mem.accesses = 0;
    let _ = w.emulate();
    assert!(w.mem.accesses < 120, "{}", w.mem.accesses);
}

#[test]
fn a_string_that_faults_keeps_what_it_did() {
    let mut w = World::long();
    w.set(Gpr::Rdi, DEVICE + 0x2000 - 6).set(Gpr::Rcx, 10);
    w.assemble(|a| a.rep().stosd());
    let fault = page_fault(2, DEVICE + 0x2000);
    assert_eq!(w.emulate(), Ok(Done::Fault(fault)));
    assert_eq!((w.get(Gpr::Rdi), w.get(Gpr::Rcx)), (DEVICE + 0x1ffe, 9));
    assert_eq!(w.cpu.rip, KERNEL + CODE);
    // The split element had no effect.
    assert_eq!(w.dev.log.len(), 1);
}

#[test]
fn single_step_traps_after_each_instruction_and_iteration() {
    let mut w = World::long();
    w.cpu.rflags |= RFlags::TF | RFlags::RF;
    w.assemble(|a| a.mov(dword_ptr(rdi), eax));
    let trap = Done::Trap(Fault::exception(Exception::Debug, None));
    assert_eq!(w.emulate(), Ok(trap));
    assert!(!w.cpu.rflags.contains(RFlags::RF) && w.cpu.rflags.contains(RFlags::TF));
    assert_eq!(w.cpu.dr(DebugRegister::Dr6) & 1 << 14, 1 << 14);
    assert!(trap.deliver(&mut w.cpu));
    assert!(matches!(
        w.cpu.pending,
        Some(Event::Exception {
            exception: Exception::Debug,
            ..
        })
    ));

    w.cpu.rip = KERNEL + CODE;
    w.set(Gpr::Rcx, 2);
    w.assemble(|a| a.rep().stosb());
    assert_eq!(w.emulate(), Ok(trap));
    assert_eq!((w.cpu.rip, w.get(Gpr::Rcx)), (KERNEL + CODE, 1));
    assert_eq!(w.emulate(), Ok(trap));
    assert_eq!((w.cpu.rip, w.get(Gpr::Rcx)), (KERNEL + CODE + 2, 0));
}

#[test]
fn accesses_that_cross_pages() {
    let mut w = World::long();
    w.set(Gpr::Rdi, DEVICE + 0xffd)
        .set(Gpr::Rax, 0x1122_3344_5566_7788);
    w.run(|a| a.mov(qword_ptr(rdi), rax));
    assert_eq!(
        w.dev.log,
        [
            (true, 0xffd, 2, 0x7788),
            (true, 0xfff, 1, 0x66),
            (true, 0x1000, 4, 0x2233_4455),
            (true, 0x1004, 1, 0x11)
        ],
    );
    w.run(|a| a.mov(rbx, qword_ptr(rdi)));
    assert_eq!(w.get(Gpr::Rbx), 0x1122_3344_5566_7788);
    // RAM before the device.
    w.mem.map(w.cpu.cr3, KERNEL + 0x1_f000, 0x9000, 3);
    w.mem.map(w.cpu.cr3, KERNEL + 0x2_0000, DEVICE_GPA, 3);
    w.set(Gpr::Rdi, KERNEL + 0x1_fffe);
    w.run(|a| a.mov(dword_ptr(rdi), eax));
    assert_eq!(w.dev.log, [(true, 0, 2, 0x5566)]);
    assert_eq!(w.mem.u64(0x9ff8) >> 48, 0x7788);
    // The second page faults: the first is not touched.
    w.mem.map(w.cpu.cr3, KERNEL + 0x2_0000, DEVICE_GPA, 1);
    w.set(Gpr::Rax, 0);
    w.faults(page_fault(3, KERNEL + 0x2_0000), |a| {
        a.mov(dword_ptr(rdi), eax)
    });
    assert_eq!(w.mem.u64(0x9ff8) >> 48, 0x7788);
}

#[test]
fn segments_in_64_bit_mode() {
    let mut w = World::long();
    w.cpu.segments[SegmentRegister::Gs as usize].base = DEVICE;
    w.cpu.segments[SegmentRegister::Ds as usize].base = 0x1234;
    w.device(0x10, 0xabcd).set(Gpr::Rdx, 8);
    w.run(|a| a.mov(eax, dword_ptr(rdx + 8).gs()));
    assert_eq!(w.get(Gpr::Rax), 0xabcd);
    w.run(|a| a.mov(eax, dword_ptr(rdi + 0x10)));
    assert_eq!(w.get(Gpr::Rax), 0xabcd, "the base of DS does not count");
    w.set(Gpr::Rdi, 0x8000_0000_0000_0000);
    w.faults(Fault::GP0, |a| a.mov(eax, dword_ptr(rdi)));
    w.set(Gpr::Rbp, 0x7fff_ffff_fffe);
    w.faults(Fault::SS0, |a| a.mov(eax, dword_ptr(rbp)));
}

#[test]
fn segments_in_32_bit_mode() {
    let mut w = World::protected();
    w.run(|a| a.mov(dword_ptr(edi), 5));
    assert_eq!(w.dev.log, [(true, 0, 4, 5)]);
    let segment = |w: &mut World, register: SegmentRegister, rights, limit, base| {
        let segment = &mut w.cpu.segments[register as usize];
        segment.rights = AccessRights(rights);
        segment.limit = limit;
        segment.base = base;
    };
    // Base and limit.
    segment(&mut w, SegmentRegister::Ds, 0xc093, 0xfff, DEVICE_GPA);
    w.set(Gpr::Rdi, 0xffc).run(|a| a.mov(dword_ptr(edi), 6));
    assert_eq!(w.dev.log, [(true, 0xffc, 4, 6)]);
    w.set(Gpr::Rdi, 0xffd);
    w.faults(Fault::GP0, |a| a.mov(dword_ptr(edi), 6));
    // Read-only data, execute-only code, not present, null.
    w.set(Gpr::Rdi, 0);
    for (rights, write) in [
        (0xc091, true),
        (0xc099, false),
        (0xc013, false),
        (0x1_c093, false),
    ] {
        segment(&mut w, SegmentRegister::Ds, rights, 0xfff, DEVICE_GPA);
        if write {
            w.faults(Fault::GP0, |a| a.mov(dword_ptr(edi), 6));
        } else {
            w.faults(Fault::GP0, |a| a.mov(eax, dword_ptr(edi)));
        }
    }
    segment(&mut w, SegmentRegister::Ds, 0xc09b, 0xfff, DEVICE_GPA);
    w.run(|a| a.mov(eax, dword_ptr(edi)));
    // Expand-down: valid above the limit.
    segment(
        &mut w,
        SegmentRegister::Ss,
        0xc097,
        0xfff,
        DEVICE_GPA - 0x1000,
    );
    w.set(Gpr::Rbp, 0x1000).run(|a| a.mov(eax, dword_ptr(ebp)));
    assert_eq!(w.dev.log[0].1, 0);
    w.set(Gpr::Rbp, 0xfff);
    w.faults(Fault::SS0, |a| a.mov(eax, dword_ptr(ebp)));
    segment(
        &mut w,
        SegmentRegister::Ss,
        0x8097,
        0xfff,
        DEVICE_GPA - 0x1000,
    );
    w.set(Gpr::Rbp, 0xfffd);
    w.faults(Fault::SS0, |a| a.mov(eax, dword_ptr(ebp)));
}

#[test]
fn real_mode() {
    let mut w = World::protected();
    w.cpu = MockVcpu::real();
    w.cpu.rip = CODE;
    w.mem.ram.truncate(0xb8000);
    let extra = &mut w.cpu.segments[SegmentRegister::Es as usize];
    extra.base = 0xb8000;
    // mov es:[bx+si+4], ax
    w.set(Gpr::Rbx, 0xf_0010)
        .set(Gpr::Rsi, 2)
        .set(Gpr::Rax, 0x0741);
    w.code(&[0x26, 0x89, 0x40, 0x04]);
    assert_eq!(w.emulate(), Ok(Done::Next));
    let offset = 0xb8016u64.wrapping_sub(DEVICE_GPA);
    assert_eq!(w.dev.log, [(true, offset, 2, 0x0741)]);
    assert_eq!(w.cpu.rip, CODE + 4);
    // The offset wraps at 64 KiB, but an operand does not reach beyond the limit.
    w.cpu.rip = CODE;
    w.set(Gpr::Rbx, 0xfff9);
    assert_eq!(w.emulate(), Ok(Done::Fault(Fault::GP0)));
    // Code beyond the limit of CS.
    w.cpu.rip = 0x1_0000;
    assert_eq!(w.emulate(), Ok(Done::Fault(Fault::GP0)));
}

#[test]
fn code_that_crosses_pages() {
    let mut w = World::long();
    let bytes = [0x89, 0x87, 0x10, 0x00, 0x00, 0x00];
    for split in 1..6u64 {
        // The second page lies elsewhere.
        w.mem.map(w.cpu.cr3, KERNEL + 0x1_1000, 0x9000, 3);
        w.cpu.rip = KERNEL + 0x1_1000 - split;
        let (first, second) = bytes.split_at(split as usize);
        w.mem.load(0x1_1000 - split, first);
        w.mem.load(0x9000, second);
        assert_eq!(w.emulate(), Ok(Done::Next));
        assert_eq!(w.dev.log.len(), 1);
        assert_eq!(w.cpu.rip, KERNEL + 0x1_1000 + 6 - split);
        // Not there: CR2 is the second page.
        w.mem.map(w.cpu.cr3, KERNEL + 0x1_1000, 0x9000, 0);
        w.cpu.rip = KERNEL + 0x1_1000 - split;
        let fault = page_fault(0x10, KERNEL + 0x1_1000);
        assert_eq!(w.emulate(), Ok(Done::Fault(fault)));
    }
    // An instruction that ends with the page needs no second one.
    w.cpu.rip = KERNEL + 0x1_1000 - 6;
    w.mem.load(0x1_1000 - 6, &bytes);
    assert_eq!(w.emulate(), Ok(Done::Next));
    // Longer than 15 bytes.
    w.cpu.rip = KERNEL + CODE;
    w.code(&[0x66; 16]);
    assert_eq!(w.emulate(), Ok(Done::Fault(Fault::GP0)));
}

#[test]
fn what_is_not_emulated_says_so() {
    let mut w = World::long();
    let text = |w: &mut World| format!("{}", w.emulate().unwrap_err());
    w.assemble(|a| a.movaps(xmm0, xmmword_ptr(rdi)));
    assert_eq!(
        text(&mut w),
        "cannot emulate this instruction on a device's memory at rip 0xffff800000001000: 0f 28 07"
    );
    // vmovaps: VEX is not decoded.
    w.code(&[0xc5, 0xf8, 0x28, 0x07]);
    assert!(matches!(w.emulate(), Err(EmulateError::Undecodable { .. })));
    // LOCK where it is not allowed.
    w.code(&[0xf0, 0x89, 0x07]);
    assert_eq!(w.emulate(), Ok(Done::Fault(Fault::UD)));
    w.cpu.rip = DEVICE;
    assert!(matches!(w.emulate(), Err(EmulateError::Memory { .. })));
}

#[test]
fn the_short_way_does_what_the_long_way_does() {
    let mut random = Random(4242);
    let mut taken = 0;
    let mut w = World::long();
    // Marks the code's page as accessed, as the hardware has by the time of an exit.
    w.run(|a| a.mov(eax, dword_ptr(rdi)));
    for _ in 0..60_000 {
        // [REX] 89|8B|C7 ModRM and whatever follows, registers near the device.
        let mut code: Vec<u8> = random.next().to_le_bytes().into();
        code.extend(random.next().to_le_bytes());
        let opcode = [0x89, 0x8b, 0xc7][(random.next() % 3) as usize];
        if random.next() & 1 != 0 {
            code[0] = 0x40 | code[0] & 15;
            code[1] = opcode;
        } else {
            code[0] = opcode;
        }
        let wide = random.next() & 1 != 0;
        for gpr in Gpr::ALL {
            let value = DEVICE + 0x800 + random.next() % 0xe00;
            w.set(gpr, if wide { value } else { random.next() % 0x1000 });
        }
        w.code(&code);
        let mut slow = World {
            page: CodePage::NONE,
            cpu: w.cpu.clone(),
            mem: w.mem.clone(),
            dev: Device {
                bytes: w.dev.bytes.clone(),
                log: Vec::new(),
            },
        };
        w.dev.log.clear();
        let before = w.cpu.clone();
        // The hardware tells the address; here the long way finds it out.
        let done = slow.emulate();
        let Some(&(write, at, _, _)) = slow.dev.log.first() else {
            continue;
        };
        let access = if write { Access::WRITE } else { Access::READ };
        let told = GuestPhysAddr::new(DEVICE_GPA.wrapping_add(at));
        match fast_mov(&mut w.cpu, &mut w.mem, &mut w.dev, told, access) {
            Some(fast) => {
                taken += 1;
                assert_eq!(Ok(fast), done, "{code:x?}");
                assert_eq!(w.cpu, slow.cpu, "{code:x?}");
                assert_eq!(w.dev.log, slow.dev.log, "{code:x?}");
            }
            None => assert_eq!(w.cpu, before),
        }
        w.cpu = before;
    }
    assert!(taken > 3_000, "{taken}");
}

#[test]
fn the_short_way_refuses_the_second_half_of_a_split_operand() {
    let mut w = World::long();
    w.set(Gpr::Rdi, DEVICE + 0xffe);
    w.assemble(|a| a.mov(dword_ptr(rdi), eax));
    let told = (GuestPhysAddr::new(DEVICE_GPA + 0x1000), Access::WRITE);
    assert_eq!(
        fast_mov(&mut w.cpu, &mut w.mem, &mut w.dev, told.0, told.1),
        None
    );
    assert_eq!(emulate(&mut w.cpu, &mut w.mem, &mut w.dev), Ok(Done::Next));
    assert_eq!(w.dev.log.len(), 2);
}

const LENGTHS: &[(Expected, &[u8])] = &[
    (Expected::Cpuid, &[0x0f, 0xa2]),
    (Expected::Rdmsr, &[0x0f, 0x32]),
    (Expected::Wrmsr, &[0x0f, 0x30]),
    (Expected::Hypercall, &[0x0f, 0x01, 0xd9]),
    (Expected::Hypercall, &[0x0f, 0x01, 0xc1]),
    (Expected::Hlt, &[0xf4]),
    (Expected::Pause, &[0xf3, 0x90]),
    (Expected::Clts, &[0x0f, 0x06]),
    (Expected::Invd, &[0x0f, 0x08]),
    (Expected::Wbinvd, &[0x0f, 0x09]),
    (Expected::Xsetbv, &[0x0f, 0x01, 0xd1]),
    (Expected::Rdpmc, &[0x0f, 0x33]),
    (Expected::Rdtsc, &[0x0f, 0x31]),
    (Expected::Rdtscp, &[0x0f, 0x01, 0xf9]),
    (Expected::Monitor, &[0x0f, 0x01, 0xc8]),
    (Expected::Mwait, &[0x0f, 0x01, 0xc9]),
    (Expected::Invlpg, &[0x0f, 0x01, 0x3f]),
    (Expected::Lmsw, &[0x0f, 0x01, 0xf0]),
    (Expected::Smsw, &[0x0f, 0x01, 0xe0]),
    (Expected::MovCr, &[0x0f, 0x22, 0xd8]),
    (Expected::MovDr, &[0x0f, 0x23, 0xf8]),
];

/// The next instruction as the run loop finds it, with the page kept from exit to exit.
fn kept(w: &mut World, expected: Expected) -> Result<u64, LengthError> {
    match plain_next_rip(&w.cpu, &mut w.mem, &mut w.page, expected) {
        Some(next) => Ok(next),
        None => decode_next_rip(&w.cpu, &mut w.mem, expected),
    }
}

#[test]
fn lengths_at_every_place_in_memory() {
    for mut w in [World::long(), World::protected()] {
        let base = if w.cpu.efer == 0 { 0 } else { KERNEL };
        for &(expected, bytes) in LENGTHS {
            // Within a page, at each offset in a word, and across two pages.
            for at in (0x2ff0..0x3000).chain(0x3000..0x3008) {
                w.cpu.rip = base + at;
                w.mem.load(at, bytes);
                let next = kept(&mut w, expected);
                assert_eq!(
                    next,
                    Ok(base + at + bytes.len() as u64),
                    "{expected:?} {at:x}"
                );
                w.mem.load(at, &[0x90; 4]);
                let next = kept(&mut w, expected);
                assert_eq!(next, Err(LengthError::Changed), "{expected:?}");
                // With prefixes that mean nothing here.
                w.mem.load(at, &[0x2e, 0x36]);
                w.mem.load(at + 2, bytes);
                let next = kept(&mut w, expected);
                assert_eq!(next, Ok(base + at + 2 + bytes.len() as u64), "{expected:?}");
            }
        }
    }
}

#[test]
fn the_hardware_is_believed_about_lengths() {
    let mut w = World::long();
    w.code(&[0xf4]);
    assert_eq!(
        next_rip(&w.cpu, &mut w.mem, Expected::Hlt),
        Ok(w.cpu.rip + 1)
    );
    w.mem.accesses = 0;
    w.cpu.next_rip = Some(0x1234);
    assert_eq!(next_rip(&w.cpu, &mut w.mem, Expected::Hlt), Ok(0x1234));
    assert_eq!(w.mem.accesses, 0);
}

#[test]
fn a_plain_length_costs_one_load_once_its_page_is_known() {
    let mut w = World::long();
    w.code(&[0x0f, 0xa2]);
    w.mem.accesses = 0;
    // A walk, which also marks the tables, and the load.
    assert!(kept(&mut w, Expected::Cpuid).is_ok());
    assert!(w.mem.accesses > 5);
    w.mem.accesses = 0;
    assert!(kept(&mut w, Expected::Cpuid).is_ok());
    assert_eq!(w.mem.accesses, 1);
    // The page moved, and the old one holds something else now: found by a new walk.
    w.mem.map(w.cpu.cr3, KERNEL + CODE, 0x9000, 3);
    w.mem.load(CODE, &[0x90, 0x90]);
    w.mem.load(0x9000, &[0x66, 0x0f, 0xa2]);
    let next = kept(&mut w, Expected::Cpuid);
    assert_eq!(next, Ok(w.cpu.rip + 3));
}

#[test]
fn a_length_of_unmapped_code_is_a_fault() {
    let mut w = World::long();
    w.cpu.rip = KERNEL + 0x10_0000_0000;
    let next = kept(&mut w, Expected::Cpuid);
    assert_eq!(next, Err(LengthError::Fault(page_fault(0x10, w.cpu.rip))));
}

#[test]
fn operands_of_control_and_debug_registers() {
    let mut w = World::long();
    let cr = |w: &mut World, code: &[u8], register, write| {
        w.code(code);
        let next = w.cpu.rip + code.len() as u64;
        decode_cr(&mut w.cpu, &mut w.mem, register, write).map(|(op, rip)| {
            assert_eq!(rip, next);
            op
        })
    };
    use ControlRegister as C;
    assert_eq!(
        cr(&mut w, &[0x0f, 0x22, 0xd9], C::Cr3, true),
        Ok(CrOp::Write(Gpr::Rcx))
    );
    assert_eq!(
        cr(&mut w, &[0x41, 0x0f, 0x20, 0xc4], C::Cr0, false),
        Ok(CrOp::Read(Gpr::R12))
    );
    assert_eq!(
        cr(&mut w, &[0x44, 0x0f, 0x22, 0xc0], C::Cr8, true),
        Ok(CrOp::Write(Gpr::Rax))
    );
    // AMD's other way to CR8.
    assert_eq!(
        cr(&mut w, &[0xf0, 0x0f, 0x22, 0xc0], C::Cr8, true),
        Ok(CrOp::Write(Gpr::Rax))
    );
    assert_eq!(cr(&mut w, &[0x0f, 0x06], C::Cr0, true), Ok(CrOp::Clts));
    w.set(Gpr::Rdx, 0x1_000b);
    assert_eq!(
        cr(&mut w, &[0x0f, 0x01, 0xf2], C::Cr0, true),
        Ok(CrOp::Lmsw(0xb))
    );
    w.mem.set_u64(0x4000, 0xf_fff1);
    assert_eq!(
        cr(&mut w, &[0x0f, 0x01, 0x36], C::Cr0, true),
        Ok(CrOp::Lmsw(0xfff1))
    );
    assert_eq!(
        cr(&mut w, &[0x0f, 0x22, 0xd9], C::Cr4, true),
        Err(LengthError::Changed)
    );
    assert_eq!(
        cr(&mut w, &[0x0f, 0x20, 0xd9], C::Cr3, true),
        Err(LengthError::Changed)
    );

    w.code(&[0x0f, 0x23, 0xfa]);
    let access = DrAccess {
        register: DebugRegister::Dr7,
        write: true,
        gpr: Gpr::Rdx,
    };
    assert_eq!(
        decode_dr(&w.cpu, &mut w.mem),
        Ok((access, KERNEL + CODE + 3))
    );
    w.code(&[0x0f, 0x21, 0xf0]);
    let access = DrAccess {
        register: DebugRegister::Dr6,
        write: false,
        gpr: Gpr::Rax,
    };
    assert_eq!(
        decode_dr(&w.cpu, &mut w.mem),
        Ok((access, KERNEL + CODE + 3))
    );

    w.cpu.segments[SegmentRegister::Gs as usize].base = 0x10;
    w.code(&[0x65, 0x0f, 0x01, 0x7e, 0x20]);
    assert_eq!(
        decode_invlpg(&w.cpu, &mut w.mem),
        Ok((KERNEL + 0x4030, KERNEL + CODE + 5))
    );
    let mut w = World::protected();
    w.cpu.segments[SegmentRegister::Ds as usize].base = 0xffff_f000;
    w.code(&[0x0f, 0x01, 0x3e]);
    assert_eq!(decode_invlpg(&w.cpu, &mut w.mem), Ok((0x3000, CODE + 3)));
}

/// A port that counts up, and remembers.
#[derive(Default)]
struct Ports {
    next: u32,
    written: Vec<(u16, u8, u32)>,
}

impl PortBus for Ports {
    fn read(&mut self, _port: u16, _size: u8) -> u32 {
        self.next += 1;
        self.next
    }
    fn write(&mut self, port: u16, size: u8, value: u32) {
        self.written.push((port, size, value));
    }
}

fn port_exit(input: bool, size: u8) -> IoExit {
    IoExit {
        port: 0x1f0,
        size,
        input,
        string: true,
        rep: false,
    }
}

#[test]
fn string_ports() {
    let mut w = World::long();
    let mut ports = Ports::default();
    w.set(Gpr::Rdx, 0x1f0)
        .set(Gpr::Rcx, 4)
        .set(Gpr::Rdi, KERNEL + 0x4000);
    let length = w.assemble(|a| a.rep().insw());
    let exit = port_exit(true, 2);
    let done = string_io(&mut w.cpu, &mut w.mem, &mut ports, &exit);
    assert_eq!((done, w.cpu.rip), (Ok(Done::Next), KERNEL + CODE + length));
    assert_eq!(w.mem.u64(0x4000), 0x0004_0003_0002_0001);
    assert_eq!((w.get(Gpr::Rdi), w.get(Gpr::Rcx)), (KERNEL + 0x4008, 0));

    // OUTS takes a segment override, INS does not; DF turns both round.
    w.cpu.rip = KERNEL + CODE;
    w.cpu.segments[SegmentRegister::Fs as usize].base = 4;
    w.cpu.rflags |= RFlags::DF;
    w.set(Gpr::Rcx, 2).set(Gpr::Rsi, KERNEL + 0x4000);
    w.code(&[0x64, 0xf3, 0x6f]);
    let exit = port_exit(false, 4);
    let done = string_io(&mut w.cpu, &mut w.mem, &mut ports, &exit);
    assert_eq!(done, Ok(Done::Next));
    assert_eq!(
        ports.written,
        [(0x1f0, 4, 0x0004_0003), (0x1f0, 4, 0x0002_0001)]
    );
    assert_eq!(w.get(Gpr::Rsi), KERNEL + 0x3ff8);

    // A fault comes before the port is read.
    w.cpu.rip = KERNEL + CODE;
    w.cpu.rflags -= RFlags::DF;
    w.set(Gpr::Rcx, 8).set(Gpr::Rdi, KERNEL + 0x2_0000 - 3);
    w.assemble(|a| a.rep().insw());
    let exit = port_exit(true, 2);
    let before = ports.next;
    let done = string_io(&mut w.cpu, &mut w.mem, &mut ports, &exit);
    assert_eq!(done, Ok(Done::Fault(page_fault(2, KERNEL + 0x2_0000))));
    assert_eq!((ports.next - before, w.get(Gpr::Rcx)), (1, 7));
    // The code is no longer what the exit told.
    w.code(&[0x90]);
    let done = string_io(&mut w.cpu, &mut w.mem, &mut ports, &exit);
    assert_eq!(done, Ok(Done::Again));
    // A device is no buffer for ports.
    w.set(Gpr::Rdi, DEVICE).code(&[0x66, 0x6d]);
    let done = string_io(&mut w.cpu, &mut w.mem, &mut ports, &exit);
    assert!(matches!(done, Err(EmulateError::Unsupported { .. })));
}

#[test]
fn privilege_is_that_of_the_guest() {
    let mut w = World::long();
    w.cpu = w.cpu.clone().at_cpl(3);
    w.cpu.rip = CODE;
    w.faults(page_fault(5, DEVICE), |a| a.mov(eax, dword_ptr(rdi)));
    w.mem.map(w.cpu.cr3, 0x1_0000, DEVICE_GPA, 5);
    w.set(Gpr::Rdi, 0x1_0000)
        .run(|a| a.mov(eax, dword_ptr(rdi)));
    w.faults(page_fault(7, 0x1_0000), |a| a.mov(dword_ptr(rdi), eax));
    // Without CR0.WP the supervisor writes to read-only pages.
    w.cpu = w.cpu.clone().at_cpl(0);
    w.faults(page_fault(3, 0x1_0000), |a| a.mov(dword_ptr(rdi), eax));
    w.cpu.cr0 &= !Cr0::WP.bits();
    w.run(|a| a.mov(dword_ptr(rdi), eax));
}

#[test]
fn rom_goes_to_the_bus_when_written() {
    let mut w = World::long();
    w.mem.rom = 0x5000..0x6000;
    w.mem.set_u64(0x5000, 0x55);
    w.set(Gpr::Rdi, KERNEL + 0x5000)
        .run(|a| a.add(dword_ptr(rdi), 1));
    assert_eq!(
        w.dev.log,
        [(true, 0x5000u64.wrapping_sub(DEVICE_GPA), 4, 0x56)]
    );
    assert_eq!(w.mem.u64(0x5000), 0x55);
}

#[test]
fn no_bytes_are_too_strange() {
    let mut random = Random(0xdead_beef);
    let mut ports = Ports::default();
    let mut worlds = [World::long(), World::protected(), World::protected()];
    worlds[2].cpu = MockVcpu::real();
    worlds[2].cpu.rip = CODE;
    let first = [0x0f, 0x66, 0xf0, 0xf3, 0x48, 0x67];
    for round in 0..100_000u32 {
        let w = &mut worlds[(round % 3) as usize];
        let mut code = [0; 16];
        code[..8].copy_from_slice(&random.next().to_le_bytes());
        code[8..].copy_from_slice(&random.next().to_le_bytes());
        if round % 4 == 0 {
            code[0] = first[(random.next() % 6) as usize];
        }
        let cpu = w.cpu.clone();
        for gpr in Gpr::ALL {
            let base = [DEVICE, DEVICE_GPA, KERNEL, 0, random.next()][(random.next() % 5) as usize];
            w.set(gpr, base.wrapping_add(random.next() % 0x2000));
        }
        w.cpu.rflags = RFlags::from_bits_retain(random.next() & 0x3f_0fd5 | 2);
        if round % 7 == 0 {
            // Near the end of a page, or of everything.
            w.cpu.rip =
                [KERNEL + 0x1_fff8, CODE + 0xff8, u64::MAX - 4][(random.next() % 3) as usize];
            w.mem.load(0x1_fff8, &code[..8]);
        }
        w.mem.load(CODE, &code);
        let state = w.cpu.clone();
        let done = w.emulate();
        let chunked = matches!(fetch::Fetched::at_rip(&state, &mut w.mem, &mut Code::default(), 0),
            Ok(f) if string::StringOp::of(&f.instruction).is_some());
        if let (Ok(Done::Fault(_)), false) = (&done, chunked) {
            assert_eq!(w.cpu, state, "a fault leaves the vCPU alone: {code:x?}");
        }
        w.cpu = state;
        let _ = string_io(
            &mut w.cpu,
            &mut w.mem,
            &mut ports,
            &port_exit(round % 2 == 0, 1),
        );
        let _ = kept(w, Expected::Cpuid);
        let _ = decode_cr(&mut w.cpu, &mut w.mem, ControlRegister::Cr0, true);
        let _ = decode_dr(&w.cpu, &mut w.mem);
        let _ = decode_invlpg(&w.cpu, &mut w.mem);
        let told = GuestPhysAddr::new(DEVICE_GPA + random.next() % 0x1000);
        let _ = fast_mov(&mut w.cpu, &mut w.mem, &mut w.dev, told, Access::READ);
        ports.written.clear();
        w.cpu = cpu;
        if round % 1024 == 0 {
            // What the bytes wrote may have reached the tables.
            let fresh = World::long();
            w.mem = fresh.mem;
        }
    }
}

#[test]
fn system_words_have_two_bytes_in_memory() {
    let mut w = World::long();
    let tr = Segment {
        selector: 0x28,
        ..w.cpu.segment(SegmentRegister::Tr)
    };
    w.cpu.set_segment(SegmentRegister::Tr, tr);
    let msw = w.cpu.cr(ControlRegister::Cr0) & 0xffff;
    w.run(|a| a.smsw(word_ptr(rdi)));
    assert_eq!(w.dev.log, [(true, 0, 2, msw)]);
    w.run(|a| a.str(word_ptr(rdi)));
    assert_eq!(w.dev.log, [(true, 0, 2, 0x28)]);
    w.run(|a| a.sldt(word_ptr(rdi)));
    assert_eq!(w.dev.log, [(true, 0, 2, 0)]);
}

#[test]
fn faults_but_not_traps_are_pushed_with_rf() {
    let ac = Fault::exception(Exception::AlignmentCheck, Some(0));
    let db = Fault::exception(Exception::Debug, None);
    for (fault, rf) in [
        (Fault::GP0, true),
        (Fault::UD, true),
        (page_fault(2, 0x1000), true),
        (ac, true),
        (db, false),
    ] {
        let mut w = World::long();
        assert!(fault.deliver(&mut w.cpu));
        assert_eq!(w.cpu.rflags.contains(RFlags::RF), rf, "{fault:?}");
        assert_eq!(w.cpu.pending, Some(fault.event));
    }
    let mut w = World::long();
    assert!(raise(&mut w.cpu, Event::Interrupt(Vector(0x20))));
    assert!(!w.cpu.rflags.contains(RFlags::RF));
}
