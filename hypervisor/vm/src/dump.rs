//! What a vCPU stands at, for a person to read: its registers, the top of its stack, and the
//! callers that the chain of frame pointers names. No symbols, and nothing of the guest changes.
//!
//! The guest's memory is hostile: every address is walked through the guest's own tables, the
//! chain must lead up the stack, and it is followed for [`FRAMES`] callers at the most. Code that
//! keeps no frame pointers (Linux with its ORC tables) has no chain: the words on its stack then
//! tell where it came from.

use alloc::vec::Vec;
use arch::{
    Access, ControlRegister, Cr0, Cr4, DescriptorTable, Efer, Gpr, GuestMemory, GuestPhysAddr,
    MemoryFault, RFlags, Segment, SegmentRegister, Vcpu,
};
use core::fmt;
use machine::paging::{PagingState, translate};

/// The most callers in a backtrace.
pub const FRAMES: usize = 24;
/// Words of the stack that are shown.
const STACK: u64 = 12;

const NAMES: [&str; 16] = [
    "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8 ", "r9 ", "r10", "r11", "r12",
    "r13", "r14", "r15",
];

const SEGMENTS: [(SegmentRegister, &str); 8] = [
    (SegmentRegister::Cs, "cs"),
    (SegmentRegister::Ss, "ss"),
    (SegmentRegister::Ds, "ds"),
    (SegmentRegister::Es, "es"),
    (SegmentRegister::Fs, "fs"),
    (SegmentRegister::Gs, "gs"),
    (SegmentRegister::Ldtr, "ldtr"),
    (SegmentRegister::Tr, "tr"),
];

/// A guest's memory that cannot be written. The accessed bits that a walk would set count as set.
struct Peek<'a>(&'a mut dyn GuestMemory);

impl GuestMemory for Peek<'_> {
    fn read(&mut self, addr: GuestPhysAddr, buf: &mut [u8]) -> Result<(), MemoryFault> {
        self.0.read(addr, buf)
    }
    fn write(&mut self, addr: GuestPhysAddr, _: &[u8]) -> Result<(), MemoryFault> {
        Err(MemoryFault::ReadOnly(addr))
    }
    fn compare_exchange(
        &mut self,
        _: GuestPhysAddr,
        _: u8,
        current: u64,
        _: u64,
    ) -> Result<u64, MemoryFault> {
        Ok(current)
    }
}

/// The width of code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Width {
    Real,
    Protected16,
    Protected32,
    Long,
}

/// What a vCPU stands at.
#[derive(Clone, Debug)]
pub struct Dump {
    width: Width,
    cpl: u8,
    rip: u64,
    rflags: RFlags,
    gprs: [u64; 16],
    controls: [u64; 4],
    efer: u64,
    segments: [Segment; SEGMENTS.len()],
    gdtr: DescriptorTable,
    idtr: DescriptorTable,
    /// Words from RSP on.
    stack: Vec<u64>,
    /// Return addresses, the innermost first.
    callers: Vec<u64>,
    /// What the local APIC stands at.
    pub(crate) interrupts: Interrupts,
}

/// What a vCPU's local APIC stands at, and what the vCPU waits for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Interrupts {
    pub tpr: u8,
    /// The highest vector requested; 0 for none.
    pub requested: u8,
    /// The highest vector in service; 0 for none.
    pub in_service: u8,
    /// Something was sent that the vCPU has not looked at.
    pub signalled: bool,
    /// An event is to be delivered at the next entry.
    pub event: bool,
    /// In HLT.
    pub halted: bool,
    /// Waits for a start-up.
    pub waits: bool,
}

impl Dump {
    /// Reads a vCPU, which is loaded on this core, and its stack if the guest's memory can be had.
    pub fn of<V: Vcpu>(vcpu: &V, memory: Option<&mut dyn GuestMemory>) -> Self {
        let cr0 = vcpu.cr(ControlRegister::Cr0);
        let cs = vcpu.rights(SegmentRegister::Cs);
        let width = if cr0 & Cr0::PE.bits() == 0 {
            Width::Real
        } else if vcpu.efer() & Efer::LMA.bits() != 0 && cs.long() {
            Width::Long
        } else if cs.default_big() {
            Width::Protected32
        } else {
            Width::Protected16
        };
        let mut this = Self {
            width,
            cpl: vcpu.cpl(),
            rip: vcpu.rip(),
            rflags: vcpu.rflags(),
            gprs: Gpr::ALL.map(|gpr| vcpu.gpr(gpr)),
            controls: [
                cr0,
                vcpu.cr(ControlRegister::Cr2),
                vcpu.cr(ControlRegister::Cr3),
                vcpu.cr(ControlRegister::Cr4),
            ],
            efer: vcpu.efer(),
            segments: SEGMENTS.map(|(register, _)| vcpu.segment(register)),
            gdtr: vcpu.gdtr(),
            idtr: vcpu.idtr(),
            stack: Vec::new(),
            callers: Vec::new(),
            interrupts: Interrupts::default(),
        };
        if let Some(memory) = memory {
            // Rights do not matter to who only looks.
            let guards = Cr4::SMAP.union(Cr4::SMEP).union(Cr4::PKE).bits();
            let mut state = PagingState::of(vcpu).implicit_supervisor();
            state.cr4 &= !guards;
            this.follow(
                state,
                &mut Peek(memory),
                vcpu.segment(SegmentRegister::Ss).base,
            );
        }
        this
    }

    /// Reads the top of the stack and the chain of frames.
    fn follow(&mut self, state: PagingState, memory: &mut Peek<'_>, stack_base: u64) {
        let (size, base) = match self.width {
            Width::Long => (8, 0),
            Width::Protected32 => (4, stack_base),
            // 16-bit code keeps no frames that could be told from other words.
            Width::Real | Width::Protected16 => return,
        };
        let mut word = |at: u64| -> Option<u64> {
            let linear = match size {
                8 => Some(at).filter(|at| state.canonical(*at))?,
                _ => at.wrapping_add(base) & 0xffff_ffff,
            };
            // An aligned word lies in one page.
            if linear % size != 0 {
                return None;
            }
            let addr = translate(&state, memory, linear, Access::READ).ok()?;
            match size {
                8 => memory.read_u64(addr).ok(),
                _ => memory.read_u32(addr).ok().map(u64::from),
            }
        };
        let [rsp, mut frame] = [Gpr::Rsp, Gpr::Rbp].map(|gpr| self.gprs[gpr as usize]);
        let words = (0..STACK).map_while(|index| word(rsp.wrapping_add(index * size)));
        self.stack = words.collect();
        while self.callers.len() < FRAMES {
            let Some(next) = word(frame) else { break };
            let Some(caller) = frame.checked_add(size).and_then(&mut word) else {
                break;
            };
            if caller == 0 {
                break;
            }
            self.callers.push(caller);
            // The callers' frames are further up, or there is no end of them.
            if next <= frame {
                break;
            }
            frame = next;
        }
    }

    /// Gives the lines of it one after the other.
    pub fn lines(&self, line: &mut dyn FnMut(fmt::Arguments<'_>)) {
        let mode = match self.width {
            Width::Real => "real mode",
            Width::Protected16 => "16-bit protected mode",
            Width::Protected32 => "32-bit mode",
            Width::Long => "64-bit mode",
        };
        line(format_args!(
            "rip {:016x}  rflags {:08x}  {mode}, level {}",
            self.rip,
            self.rflags.bits(),
            self.cpl
        ));
        let own = &self.interrupts;
        let flag = |on: bool, name: &'static str| if on { name } else { "" };
        line(format_args!(
            "apic tpr {:02x}  requested {:02x}  in service {:02x}{}{}{}{}",
            own.tpr,
            own.requested,
            own.in_service,
            flag(own.signalled, "  signalled"),
            flag(own.event, "  event pending"),
            flag(own.halted, "  halted"),
            flag(own.waits, "  waits for a start-up"),
        ));
        for (names, values) in NAMES.chunks(4).zip(self.gprs.chunks(4)) {
            four(line, names, values);
        }
        four(line, &["cr0", "cr2", "cr3", "cr4"], &self.controls);
        for ((_, name), segment) in SEGMENTS.iter().zip(&self.segments) {
            line(format_args!(
                "{name:4} {:04x}  base {:016x}  limit {:08x}  rights {:05x}",
                segment.selector, segment.base, segment.limit, segment.rights.0
            ));
        }
        line(format_args!(
            "gdt {:016x}+{:04x}  idt {:016x}+{:04x}  efer {:04x}",
            self.gdtr.base, self.gdtr.limit, self.idtr.base, self.idtr.limit, self.efer
        ));
        for words in self.stack.chunks(4) {
            four(line, &["stack", "     ", "     ", "     "], words);
        }
        line(format_args!("at   {:016x}", self.rip));
        for caller in &self.callers {
            line(format_args!("from {caller:016x}"));
        }
    }
}

/// Up to four words on a line.
fn four(line: &mut dyn FnMut(fmt::Arguments<'_>), names: &[&str], values: &[u64]) {
    let name = |index: usize| names.get(index).copied().unwrap_or("");
    match values {
        [a, b, c, d] => line(format_args!(
            "{} {a:016x}  {} {b:016x}  {} {c:016x}  {} {d:016x}",
            name(0),
            name(1),
            name(2),
            name(3)
        )),
        _ => values
            .iter()
            .for_each(|value| line(format_args!("{} {value:016x}", name(0)))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::string::{String, ToString};
    use machine::mock::{FlatMemory, MockVcpu};

    const PRESENT: u64 = 3;
    /// Linear addresses of the stack are not physical ones.
    const HIGH: u64 = 0xffff_8000_0000_0000;

    fn text(dump: &Dump) -> Vec<String> {
        let mut lines = Vec::new();
        dump.lines(&mut |line| lines.push(line.to_string()));
        lines
    }

    fn world() -> (MockVcpu, FlatMemory) {
        let mut memory = FlatMemory::new(2 << 20);
        let cr3 = memory.table();
        memory.map(cr3, HIGH, 0x8_0000, PRESENT);
        let mut vcpu = MockVcpu::long(cr3);
        vcpu.rip = 0x1234;
        vcpu.rsp = HIGH + 0x100;
        vcpu.gprs[Gpr::Rbp] = HIGH + 0x120;
        (vcpu, memory)
    }

    fn frame(memory: &mut FlatMemory, at: u64, next: u64, caller: u64) {
        memory.set_u64(0x8_0000 + at, next);
        memory.set_u64(0x8_0000 + at + 8, caller);
    }

    #[test]
    fn callers_are_found_through_the_guests_tables_which_do_not_change() {
        let (vcpu, mut memory) = world();
        frame(&mut memory, 0x120, HIGH + 0x200, 0xaaaa);
        frame(&mut memory, 0x200, HIGH + 0x400, 0xbbbb);
        frame(&mut memory, 0x400, 0, 0xcccc);
        let before = memory.ram.clone();
        let dump = Dump::of(&vcpu, Some(&mut memory));
        assert_eq!(dump.callers, [0xaaaa, 0xbbbb, 0xcccc]);
        assert!(before == memory.ram);
        let text = text(&dump);
        assert!(text[0].starts_with("rip 0000000000001234"), "{text:?}");
        let last: Vec<_> = text.iter().rev().take(4).rev().collect();
        assert_eq!(
            last,
            [
                "at   0000000000001234",
                "from 000000000000aaaa",
                "from 000000000000bbbb",
                "from 000000000000cccc",
            ]
        );
    }

    #[test]
    fn a_chain_that_lies_is_not_followed_far() {
        // In a circle, down, out of the mapped page, unaligned, not canonical.
        for next in [
            HIGH + 0x120,
            HIGH + 0x80,
            HIGH + 0x2000,
            HIGH + 0x301,
            1 << 60,
            u64::MAX,
        ] {
            let (vcpu, mut memory) = world();
            frame(&mut memory, 0x120, next, 0xaaaa);
            assert_eq!(Dump::of(&vcpu, Some(&mut memory)).callers, [0xaaaa]);
        }
        // Up for ever.
        let (vcpu, mut memory) = world();
        for at in (0x120..0xf00).step_by(16) {
            frame(&mut memory, at, HIGH + at + 16, 0xaaaa);
        }
        let dump = Dump::of(&vcpu, Some(&mut memory));
        assert_eq!(dump.callers.len(), FRAMES);
        assert_eq!(dump.stack.len(), STACK as usize);
    }

    #[test]
    fn real_mode_and_unreadable_memory_leave_the_registers() {
        let (vcpu, mut memory) = world();
        assert!(
            Dump::of(&MockVcpu::real(), Some(&mut memory))
                .callers
                .is_empty()
        );
        let dump = Dump::of(&vcpu, None);
        assert!(dump.callers.is_empty() && dump.stack.is_empty());
        assert_eq!(text(&dump).last().unwrap(), "at   0000000000001234");
    }
}
