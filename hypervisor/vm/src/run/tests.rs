//! Exits, one after the other, and what the guest and the core see of them.

use super::*;
use crate::testing::{KERNEL, Machine, ORIGIN, World};
use crate::vm::VmError;
use alloc::string::{String, ToString};
use arch::{AccessRights, EntryFailure, Interruptibility, Vector};
use machine::mock::MockVcpu;

const PREEMPTED: Stop = Stop::Preempted;

fn port(port: u16, size: u8, input: bool) -> Exit {
    Exit::Io(IoExit {
        port,
        size,
        input,
        string: false,
        rep: false,
    })
}

fn fault(addr: u64, access: Access) -> Exit {
    Exit::NestedFault {
        addr: GuestPhysAddr::new(addr),
        access,
        walk: false,
    }
}

impl World {
    fn gprs(&mut self) -> &mut arch::Gprs {
        &mut self.cpu.vcpu.gprs
    }

    /// Code at the entry point, whose length the hardware does not tell.
    fn code(&mut self, bytes: &[u8]) {
        self.memory()
            .write(GuestPhysAddr::new(KERNEL), bytes)
            .unwrap();
        self.cpu.vcpu.next_rip = None;
        self.cpu.vcpu.rip = KERNEL;
    }

    fn open(&mut self, interrupts_open: bool) {
        self.cpu.vcpu.interruptibility = Interruptibility {
            interrupts_open,
            nmi_open: true,
        };
        let flags = self.cpu.vcpu.rflags;
        self.cpu.vcpu.rflags = if interrupts_open {
            flags | RFlags::IF
        } else {
            flags - RFlags::IF
        };
    }

    fn interrupt(&mut self, vector: u8) {
        assert!(self.cpu.apic.accept(Vector(vector), false));
    }

    fn end_of_interrupt(&mut self) {
        let _: ApicEffect = self.cpu.apic.eoi();
    }

    fn out(&mut self, number: u16, value: u8) -> Stop {
        self.gprs()[Gpr::Rax] = value.into();
        self.run(&[port(number, 1, false)])
    }

    /// Runs one exit, which the guest should not survive.
    fn crash(&mut self, exit: Exit) -> String {
        match self.run(&[exit]) {
            Stop::Ended(End::Crashed(cause)) => cause,
            other => panic!("{other:?}"),
        }
    }

    /// Runs one exit; whether it ended in #GP(0).
    fn is_gp(&mut self, exit: Exit) -> bool {
        assert_eq!(self.run(&[exit]), PREEMPTED);
        match self.cpu.vcpu.delivered[..] {
            [] => false,
            [Event::GP0] => true,
            ref other => panic!("{other:?}"),
        }
    }
}

#[test]
fn cpuid_answers_and_moves_on() {
    let mut world = World::new();
    world.gprs()[Gpr::Rax] = 0x4000_0000;
    assert_eq!(world.run(&[Exit::Cpuid]), PREEMPTED);
    assert_eq!(world.gprs()[Gpr::Rbx] as u32, u32::from_le_bytes(*b"Tess"));
    assert_eq!(world.cpu.vcpu.rip, KERNEL + 2);
    // The same where the hardware tells no length.
    let mut world = World::new();
    world.code(b"\x0f\xa2");
    world.gprs()[Gpr::Rax] = 0x4000_0000;
    assert_eq!(world.run(&[Exit::Cpuid]), PREEMPTED);
    assert_eq!(world.cpu.vcpu.rip, KERNEL + 2);
}

#[test]
fn an_instruction_that_changed_since_its_exit_is_entered_again() {
    let mut world = World::new();
    world.code(b"\x90\x90\x90");
    let rip = world.cpu.vcpu.rip;
    for exit in [Exit::Cpuid, Exit::Rdmsr, Exit::Hypercall, Exit::Xsetbv] {
        assert_eq!(world.run(&[exit]), PREEMPTED);
        assert_eq!(
            (world.cpu.vcpu.rip, &world.cpu.vcpu.delivered[..]),
            (rip, &[][..])
        );
    }
    // Nor does the guest halt then.
    assert_eq!(world.run(&[Exit::Hlt]), PREEMPTED);
}

#[test]
fn msrs_that_exist_work_and_others_fault() {
    let mut world = World::new();
    world.gprs()[Gpr::Rcx] = msr::IA32_APIC_BASE.into();
    assert!(!world.is_gp(Exit::Rdmsr));
    assert_eq!(world.gprs()[Gpr::Rax], 0xfee0_0900);
    assert_eq!(world.cpu.vcpu.rip, KERNEL + 2);
    world.cpu.vcpu.rip = KERNEL;
    world.gprs()[Gpr::Rcx] = 0xdead_0000;
    for _ in 0..1000 {
        assert!(world.is_gp(Exit::Rdmsr) && world.is_gp(Exit::Wrmsr));
    }
    assert_eq!(world.cpu.vcpu.rip, KERNEL, "a fault leaves RIP where it is");
    assert_eq!(world.cpu.vm.unknown_msrs.load(Relaxed), 2000);
    world.cpu.vm.unknown_msrs.store(u32::MAX, Relaxed);
    assert!(world.is_gp(Exit::Rdmsr), "the count ends, it does not wrap");
}

#[test]
fn a_written_tsc_shows_in_the_offset_and_in_the_clock() {
    let mut world = World::new();
    world.core.tsc = ORIGIN + 1000;
    let gprs = world.gprs();
    (gprs[Gpr::Rcx], gprs[Gpr::Rax], gprs[Gpr::Rdx]) = (msr::IA32_TSC.into(), 7, 1);
    assert!(!world.is_gp(Exit::Wrmsr));
    let seen = world.core.tsc.wrapping_add(world.cpu.vcpu.tsc_offset);
    assert_eq!(seen, 1 << 32 | 7);
    world.core.tsc += 500;
    assert_eq!(world.run(&[Exit::Rdtsc]), PREEMPTED);
    assert_eq!((world.gprs()[Gpr::Rax], world.gprs()[Gpr::Rdx]), (507, 1));
}

#[test]
fn a_clock_beyond_the_end_of_time_does_not_overflow() {
    let mut world = World::new();
    alloc::sync::Arc::get_mut(&mut world.cpu.vm).unwrap().epoch = u64::MAX;
    let gprs = world.gprs();
    (gprs[Gpr::Rcx], gprs[Gpr::Rax]) = (0x4b56_4d00, 0x10_0000);
    assert!(!world.is_gp(Exit::Wrmsr));
}

#[test]
fn ports_merge_by_their_size() {
    let mut world = World::new();
    // Nobody is at port 0x1000: all ones.
    for (size, merged) in [
        (1, 0x1122_3344_5566_77ff),
        (2, 0x1122_3344_5566_ffff),
        (4, 0xffff_ffff),
    ] {
        world.gprs()[Gpr::Rax] = 0x1122_3344_5566_7788;
        assert_eq!(world.run(&[port(0x1000, size, true)]), PREEMPTED);
        assert_eq!(world.gprs()[Gpr::Rax], merged);
    }
    for number in [0, 0x60, 0xcf8, 0xcfc, 0xffff] {
        for size in [1, 2, 4] {
            for input in [true, false] {
                assert_eq!(world.run(&[port(number, size, input)]), PREEMPTED);
            }
        }
    }
}

#[test]
fn a_port_access_without_a_length_crashes_the_vm_alone() {
    let mut world = World::new();
    world.cpu.vcpu.next_rip = None;
    assert!(world.crash(port(0x80, 1, false)).contains("no length"));
}

#[test]
fn strings_go_out_as_a_whole() {
    let mut world = World::new();
    world.code(b"\xf3\x6e");
    world
        .memory()
        .write(GuestPhysAddr::new(0x1000), b"hello\n")
        .unwrap();
    let gprs = world.gprs();
    (gprs[Gpr::Rsi], gprs[Gpr::Rcx], gprs[Gpr::Rdx]) = (0x1000, 6, 0xe9);
    let exit = Exit::Io(IoExit {
        port: 0xe9,
        size: 1,
        input: false,
        string: true,
        rep: true,
    });
    assert_eq!(world.run(&[exit]), PREEMPTED);
    assert_eq!(world.run(&[]), PREEMPTED);
    assert_eq!(world.core.output, b"hello\n");
    assert_eq!(world.gprs()[Gpr::Rcx], 0);
}

#[test]
fn what_the_guest_writes_is_shown_before_it_ends() {
    let mut world = World::new();
    world.out(0x3fb, 3);
    for byte in *b"ok" {
        world.out(0x3f8, byte);
    }
    assert_eq!(world.core.output, b"ok");
    world.gprs()[Gpr::Rax] = u64::from(b'!');
    let stop = world.run(&[port(0xe9, 1, false), Exit::TripleFault]);
    assert!(matches!(stop, Stop::Ended(End::Crashed(_))));
    assert_eq!(world.core.output, b"ok!");
}

#[test]
fn a_vm_ends_in_the_ways_of_a_pc() {
    assert_eq!(World::new().out(0xf4, 3), Stop::Ended(End::DebugExit(7)));
    assert_eq!(World::new().out(0x64, 0xfe), Stop::Ended(End::Reset));
    assert_eq!(World::new().out(0xcf9, 6), Stop::Ended(End::Reset));
    let mut world = World::new();
    world.gprs()[Gpr::Rax] = 5 << 10 | 1 << 13;
    let sleep = world.run(&[port(0x604, 2, false)]);
    assert_eq!(sleep, Stop::Ended(End::PoweredOff));
    let mut world = World::new();
    world.cpu.vm().set_order(Order::Stop);
    assert_eq!(world.run(&[]), Stop::Ordered);
    world.cpu.vm().set_order(Order::Run);
    assert_eq!(world.run(&[]), Stop::Ordered, "the end is final");
}

#[test]
fn a_halt_with_interrupts_off_is_an_end() {
    let mut world = World::new();
    world.open(false);
    assert_eq!(world.run(&[Exit::Hlt]), Stop::Ended(End::Halted));
}

#[test]
fn a_halt_waits_for_the_interrupt() {
    let mut world = World::new();
    world.open(true);
    // At power-on the PIT ticks 18.2 times a second.
    let asleep = world.run(&[Exit::Hlt]);
    assert!(matches!(asleep, Stop::Halted { until } if until > ORIGIN + 50_000_000));
    // Woken without an interrupt, it sleeps on: nothing of the guest runs.
    assert_eq!(world.run(&[]), asleep);
    assert!(world.cpu.vcpu.delivered.is_empty());
    world.interrupt(0x41);
    assert_eq!(world.run(&[]), PREEMPTED);
    assert_eq!(world.cpu.vcpu.delivered, [Event::Interrupt(Vector(0x41))]);
}

#[test]
fn a_single_step_trap_ends_a_halt_at_once() {
    let mut world = World::new();
    world.open(true);
    world.cpu.vcpu.rflags |= RFlags::TF;
    assert_eq!(world.run(&[Exit::Hlt]), PREEMPTED);
    let [Event::Exception { exception, .. }] = world.cpu.vcpu.delivered[..] else {
        panic!("{:?}", world.cpu.vcpu.delivered)
    };
    assert_eq!(exception, Exception::Debug);
}

/// The timer in one-shot mode, in nanoseconds.
fn start_timer(world: &mut World, count: u32, mode: u32) {
    let now = world.cpu.vm.time_at(world.core.tsc);
    for (offset, value) in [(0x3e0, 0b1011), (0x320, mode | 0x42), (0x380, count)] {
        let _: ApicEffect = world.cpu.apic.write_mmio(offset, value, now);
    }
}

#[test]
fn a_sleeper_wakes_at_its_timer() {
    let mut world = World::new();
    world.open(true);
    start_timer(&mut world, 2000, 0);
    let Stop::Halted { until } = world.run(&[Exit::Hlt]) else {
        panic!()
    };
    assert!((ORIGIN + 2000..ORIGIN + 2010).contains(&until));
    world.core.tsc = until;
    assert_eq!(world.run(&[]), PREEMPTED);
    assert_eq!(world.cpu.vcpu.delivered, [Event::Interrupt(Vector(0x42))]);
}

#[test]
fn what_a_person_types_wakes_a_sleeper_in_time() {
    let mut world = World::new();
    world.open(true);
    // Receive interrupts with a FIFO that waits for eight bytes: one byte only times out.
    for (register, value) in [(0x3fa, 0x81), (0x3f9, 1), (0x3fc, 8)] {
        world.out(register, value);
    }
    world.interrupt(0x31);
    world.run(&[]);
    world.end_of_interrupt();
    // The 8259A pair in its usual state, with all open.
    for (register, value) in [(0x20, 0x11), (0x21, 0x20), (0x21, 4), (0x21, 1), (0x21, 0)] {
        world.out(register, value);
    }
    let stop = world.run(&[Exit::Hlt]);
    assert!(matches!(stop, Stop::Halted { .. }), "{stop:?}");
    assert_eq!(world.cpu.vm.input(b"x", world.core.tsc), 1);
    let mut turns = 0;
    loop {
        turns += 1;
        assert!(turns < 4, "sleeps on with a deadline that is over");
        match world.run(&[]) {
            Stop::Halted { until } => world.core.tsc = until,
            PREEMPTED => break,
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(world.cpu.vcpu.delivered, [Event::Interrupt(Vector(0x24))]);
}

#[test]
fn a_closed_guest_is_asked_for_its_window() {
    let mut world = World::new();
    world.open(false);
    world.interrupt(0x61);
    assert_eq!(world.run(&[Exit::Cpuid]), PREEMPTED);
    assert!(world.cpu.vcpu.interrupt_window && world.cpu.vcpu.delivered.is_empty());
    world.open(true);
    assert_eq!(world.run(&[Exit::InterruptWindow]), PREEMPTED);
    assert_eq!(world.cpu.vcpu.delivered, [Event::Interrupt(Vector(0x61))]);
    assert!(!world.cpu.vcpu.interrupt_window);
    // Two at once: the lower one waits in service order, behind a window.
    world.end_of_interrupt();
    world.interrupt(0x52);
    world.interrupt(0x71);
    assert_eq!(world.run(&[]), PREEMPTED);
    assert_eq!(world.cpu.vcpu.delivered, [Event::Interrupt(Vector(0x71))]);
    assert!(
        !world.cpu.vcpu.interrupt_window,
        "held back by the one in service"
    );
}

#[test]
fn the_8259_interrupts_through_lint0() {
    let mut world = World::new();
    world.open(true);
    for (register, value) in [
        (0x20, 0x11),
        (0x21, 0x20),
        (0x21, 4),
        (0x21, 1),
        (0x21, 0xfe),
        (0x43, 0x34),
        (0x40, 0),
        (0x40, 1),
    ] {
        assert_eq!(world.out(register, value), PREEMPTED);
    }
    let due = *world.core.armed.last().unwrap();
    assert_eq!(due, u64::MAX, "the vCPU's own timer does it");
    world.core.tsc = world.cpu.vcpu.deadline;
    assert_eq!(world.run(&[Exit::PreemptionTimer]), PREEMPTED);
    assert_eq!(world.cpu.vcpu.delivered, [Event::Interrupt(Vector(0x20))]);
}

#[test]
fn an_nmi_comes_once_and_waits_for_its_window() {
    let mut world = World::new();
    world.cpu.vcpu.interruptibility.nmi_open = false;
    world.cpu.apic.raise_nmi();
    assert_eq!(world.run(&[Exit::Cpuid]), PREEMPTED);
    assert!(world.cpu.vcpu.nmi_window && world.cpu.vcpu.delivered.is_empty());
    world.cpu.vcpu.interruptibility.nmi_open = true;
    assert_eq!(world.run(&[Exit::NmiWindow]), PREEMPTED);
    assert_eq!(world.cpu.vcpu.delivered, [Event::Nmi]);
    // Or else the window would exit for ever, before any interrupt of the machine.
    assert!(!world.cpu.vcpu.nmi_window);
    // It wakes a sleeper, whatever IF says.
    world.open(true);
    world.run(&[Exit::Hlt]);
    world.cpu.apic.raise_nmi();
    assert_eq!(world.run(&[]), PREEMPTED);
    assert_eq!(world.cpu.vcpu.delivered, [Event::Nmi]);
}

#[test]
fn exits_that_come_before_the_machines_interrupts_look_for_them() {
    let debug = Exit::Exception {
        exception: Exception::Debug,
        error_code: None,
        info: 1,
    };
    for exit in [
        Exit::PreemptionTimer,
        Exit::NmiWindow,
        Exit::Benign,
        Exit::ExternalInterrupt(None),
        debug,
    ] {
        let mut world = World::new();
        world.cpu.vcpu.exits = [exit; 3].into();
        world.core.patience = 1;
        assert_eq!(world.cpu.run(&mut world.core), PREEMPTED, "{exit:?}");
        assert_eq!(world.cpu.vcpu.exits.len(), 1, "{exit:?}: preempted in time");
    }
}

#[test]
fn a_core_timer_that_ran_out_early_is_armed_again() {
    let mut world = World::new();
    world.cpu.vcpu.own_timer = false;
    start_timer(&mut world, 1000, 0);
    world.run(&[Exit::ExternalInterrupt(None)]);
    let armed = &world.core.armed;
    assert_eq!(armed.len(), 2);
    assert!(armed[0] == armed[1] && armed[0] > ORIGIN);
}

#[test]
fn never_touched_memory_is_backed() {
    let mut world = World::new();
    let before = world.cpu.vm.backed_bytes();
    assert_eq!(world.run(&[fault(0x30_1000, Access::WRITE)]), PREEMPTED);
    assert_eq!(world.cpu.vm.backed_bytes(), before + 4096);
}

#[test]
fn device_registers_are_emulated() {
    let mut world = World::new();
    // mov eax, [0xfee00030]: the local APIC's version.
    world.code(b"\xa1\x30\x00\xe0\xfe");
    assert_eq!(world.run(&[fault(0xfee0_0030, Access::READ)]), PREEMPTED);
    assert_eq!(world.gprs()[Gpr::Rax], 0x0105_0014);
    assert_eq!(world.cpu.vcpu.rip, KERNEL + 5);
}

#[test]
fn what_cannot_be_emulated_crashes_with_a_report() {
    for (exit, text) in [
        (
            fault(0xc000_0000, Access::EXECUTE),
            "instructions at 0xc0000000",
        ),
        (
            Exit::NestedFault {
                addr: GuestPhysAddr::new(0xa_0000),
                access: Access::READ,
                walk: true,
            },
            "page tables at 0xa0000",
        ),
        (Exit::TripleFault, "triple fault"),
        (Exit::TaskSwitch, "task switch"),
        (
            Exit::EntryFailed(EntryFailure {
                code: 0x8000_0021,
                detail: 3,
            }),
            "refused to enter the guest: code 0x80000021, detail 0x3",
        ),
        (
            Exit::Unknown {
                code: 0x77,
                detail: 9,
            },
            "unknown exit 0x77, detail 0x9",
        ),
        (
            Exit::NestedMisconfig {
                addr: GuestPhysAddr::new(0x1000),
            },
            "malformed",
        ),
    ] {
        let cause = World::new().crash(exit);
        assert!(
            cause.contains(text) && cause.contains("rip 0x200000"),
            "{cause}"
        );
    }
    // An interrupt whose delivery hits a hole.
    let mut world = World::new();
    world.cpu.vcpu.exits.clear();
    world.open(false);
    world.cpu.vcpu.pending = Some(Event::GP0);
    let cause = world.crash(Exit::TripleFault);
    assert!(cause.contains("triple fault"));
}

#[test]
fn a_fault_while_a_double_fault_waits_is_a_triple_fault() {
    // Each exit's own event comes on top of what its delivery cut short.
    let mut world = World::new();
    world.cpu.vcpu.pending = Some(Event::Exception {
        exception: Exception::DoubleFault,
        error_code: Some(0),
    });
    assert!(!world.cpu.vcpu.inject(Event::GP0));
    assert!(world.cpu.inject(Event::GP0).is_err());
    assert!(matches!(world.cpu.end, Some(End::Crashed(_))));
}

#[test]
fn without_host_memory_the_vm_crashes_and_says_so() {
    let mut world = World::new();
    let mut frames = world.machine.frames.clone();
    while frames.allocate(arch::PageSize::Size4K).is_some() {}
    let cause = world.crash(fault(0x50_0000, Access::READ));
    assert!(
        cause.contains("no host memory is left for its page"),
        "{cause}"
    );
}

#[test]
fn exceptions_are_reflected() {
    let mut world = World::new();
    let exit = Exit::Exception {
        exception: Exception::AlignmentCheck,
        error_code: Some(0),
        info: 0,
    };
    world.run(&[exit]);
    let [
        Event::Exception {
            exception,
            error_code,
        },
    ] = world.cpu.vcpu.delivered[..]
    else {
        panic!()
    };
    assert_eq!(
        (exception, error_code),
        (Exception::AlignmentCheck, Some(0))
    );
    let exit = Exit::Exception {
        exception: Exception::Debug,
        error_code: None,
        info: 1 << 14 | 1,
    };
    world.cpu.vcpu.dr[7] |= 1 << 13;
    world.run(&[exit]);
    assert_eq!(world.cpu.vcpu.dr[6] & 0x400f, 0x4001);
    assert_eq!(world.cpu.vcpu.dr[7] & 1 << 13, 0);
    for exit in [Exit::Monitor, Exit::Mwait, Exit::UndefinedInstruction] {
        world.run(&[exit]);
        assert_eq!(world.cpu.vcpu.delivered, [Event::UD]);
    }
    assert!(world.is_gp(Exit::Rdpmc));
}

#[test]
fn hypercalls_answer_ring_0_only() {
    let mut world = World::new();
    for (cpl, number, answer) in [
        (0, abi::hypercall::VERSION, abi::VERSION.into()),
        (0, 999, abi::hypercall::ERROR_UNKNOWN),
        (3, abi::hypercall::VERSION, abi::hypercall::ERROR_PRIVILEGE),
    ] {
        world.cpu.vcpu = world.cpu.vcpu.clone().at_cpl(cpl);
        world.gprs()[Gpr::Rax] = number;
        assert_eq!(world.run(&[Exit::Hypercall]), PREEMPTED);
        assert_eq!(world.gprs()[Gpr::Rax] as i64, answer);
    }
}

#[test]
fn a_pause_gives_the_core_away() {
    assert_eq!(World::new().run(&[Exit::Pause]), Stop::Yield);
}

#[test]
fn xcr0_keeps_the_rules() {
    let mut world = World::new();
    for (index, value, legal) in [
        (0u64, 7u64, true),
        (0, 3, true),
        (0, 1, true),
        (0, 0, false),
        (0, 6, false),
        (0, 5, false),
        (0, 1 << 63 | 3, false),
        (0, 0xe7, false),
        (1, 3, false),
    ] {
        let gprs = world.gprs();
        (gprs[Gpr::Rcx], gprs[Gpr::Rax], gprs[Gpr::Rdx]) =
            (index, value & 0xffff_ffff, value >> 32);
        assert_eq!(world.is_gp(Exit::Xsetbv), !legal, "{index} {value:#x}");
    }
    assert_eq!(world.cpu.vcpu.xcr0, 1, "the last legal value");
}

fn write_cr(register: ControlRegister) -> Exit {
    Exit::Cr(CrAccess {
        register,
        op: CrOp::Write(Gpr::Rax),
    })
}

#[test]
fn control_registers_keep_the_rules() {
    use ControlRegister::{Cr0, Cr3, Cr4, Cr8};
    const PG: u64 = 1 << 31;
    const PCIDE: u64 = 1 << 17;
    const PAE: u64 = 1 << 5;
    let protected = MockVcpu::protected;
    let long = || MockVcpu::long(0x1000);
    let with_pcid = || {
        let mut vcpu = long();
        vcpu.cr4 |= PCIDE;
        vcpu
    };
    let lme = || {
        let mut vcpu = protected();
        vcpu.efer = arch::Efer::LME.bits();
        vcpu
    };
    let dirty = || MockVcpu::long(0x1018);
    for (vcpu, register, value, legal) in [
        (protected(), Cr0, 0x11, true),
        (protected(), Cr0, 0x11 | PG, true),
        (protected(), Cr0, 0x10 | PG, false),
        (protected(), Cr0, 0x11 | 1 << 29, false),
        (protected(), Cr0, 0x11 | 3 << 29, true),
        // In 32-bit code the upper half of the register does not count.
        (protected(), Cr0, 0x11 | 1 << 40, true),
        (long(), Cr0, 0x11 | PG | 1 << 40, false),
        (lme(), Cr0, 0x11 | PG, false),
        (long(), Cr0, 0x11, false),
        (protected(), Cr4, PAE, true),
        (protected(), Cr4, 1 << 13, false),
        (protected(), Cr4, PCIDE, false),
        (long(), Cr4, PAE | PCIDE, true),
        (dirty(), Cr4, PAE | PCIDE, false),
        (long(), Cr4, 0, false),
        (long(), Cr4, PAE | 1 << 63, false),
        (long(), Cr3, 0x5000, true),
        (long(), Cr3, 1 << 50, false),
        (long(), Cr3, 1 << 63 | 0x5000, false),
        (with_pcid(), Cr3, 1 << 63 | 0x5000, true),
        (protected(), Cr8, 15, true),
        (protected(), Cr8, 16, false),
    ] {
        let mut world = World::new();
        world.cpu.vcpu = vcpu;
        world.cpu.vcpu.next_rip = Some(3);
        world.gprs()[Gpr::Rax] = value;
        assert_eq!(
            world.is_gp(write_cr(register)),
            !legal,
            "{register:?} := {value:#x}"
        );
        assert_eq!(world.cpu.vcpu.rip == 3, legal);
    }
}

#[test]
fn pae_paging_gets_its_pointers() {
    let mut world = World::new();
    let pae = |world: &mut World, entry: u64| {
        world.cpu.vcpu = MockVcpu::protected();
        world.cpu.vcpu.next_rip = Some(3);
        world.cpu.vcpu.cr4 = Cr4::PAE.bits();
        world.cpu.vcpu.cr3 = 0x1_0020;
        for (index, value) in [entry, 0x3001, 0, 0x5001].into_iter().enumerate() {
            let at = GuestPhysAddr::new(0x1_0020 + 8 * index as u64);
            world.memory().write(at, &value.to_le_bytes()).unwrap();
        }
        world.gprs()[Gpr::Rax] = 0x11 | Cr0::PG.bits();
        world.is_gp(write_cr(ControlRegister::Cr0))
    };
    assert!(!pae(&mut world, 0x2001));
    assert_eq!(world.cpu.vcpu.pdptes, Some([0x2001, 0x3001, 0, 0x5001]));
    // A reserved bit, or one beyond the physical addresses.
    for bad in [0x2003, 0x2041, 1 << 50 | 1] {
        assert!(pae(&mut world, bad), "{bad:#x}");
        assert_eq!(world.cpu.vcpu.pdptes, None);
        assert_eq!(world.cpu.vcpu.cr0 & Cr0::PG.bits(), 0);
    }
}

#[test]
fn clts_and_lmsw_do_what_they_may() {
    let mut world = World::new();
    world.cpu.vcpu.cr0 |= Cr0::TS.bits();
    let clear = |op| {
        Exit::Cr(CrAccess {
            register: ControlRegister::Cr0,
            op,
        })
    };
    world.run(&[clear(CrOp::Clts)]);
    assert_eq!(world.cpu.vcpu.cr0, 0x11);
    world.run(&[clear(CrOp::Lmsw(0xfff8))]);
    assert_eq!(
        world.cpu.vcpu.cr0, 0x19,
        "PE stays, and only four bits count"
    );
}

#[test]
fn debug_registers_keep_the_rules() {
    let mut world = World::new();
    let exit = Exit::Dr {
        register: DebugRegister::Dr7,
        write: true,
        gpr: None,
    };
    // mov dr7, eax; mov dr5, eax
    world.code(b"\x0f\x23\xf8");
    world.gprs()[Gpr::Rax] = 0x401 | 1 << 40;
    world.run(&[exit]);
    assert_eq!(world.cpu.vcpu.dr[7], 0x401, "32 bits of it in 32-bit code");
    world.code(b"\x0f\x23\xe8");
    world.gprs()[Gpr::Rax] = 0x402;
    world.run(&[exit]);
    assert_eq!(world.cpu.vcpu.dr[7], 0x402, "DR5 is DR7");
    world.code(b"\x0f\x23\xe8");
    world.cpu.vcpu.cr4 |= Cr4::DE.bits();
    world.run(&[exit]);
    assert_eq!(world.cpu.vcpu.delivered, [Event::UD]);
}

#[test]
fn caches_and_translations_are_left_to_the_hardware() {
    let mut world = World::new();
    world.run(&[Exit::Wbinvd]);
    assert_eq!(world.cpu.vcpu.rip, KERNEL + 2);
    for code in [b"\x0f\x08", b"\x0f\x09"] {
        world.code(code);
        world.run(&[Exit::Wbinvd]);
        assert_eq!(world.cpu.vcpu.rip, KERNEL + 2);
    }
    world.code(b"\x0f\x01\x38");
    world.run(&[Exit::Invlpg]);
    assert_eq!(world.cpu.vcpu.rip, KERNEL + 3);
}

/// Whatever exits come, the guest goes on, crashes or sleeps: the core never fails with it.
#[test]
fn any_exit_in_any_state_is_survived() {
    let mut random = crate::testing::Random::new(11);
    let mut world = World::new();
    for _ in 0..10_000 {
        let mut value = || random.below(1 << 53) << 11 | random.below(1 << 11);
        let addr = GuestPhysAddr::new(value() >> (value() % 64));
        let (a, b) = (value(), value());
        let flag = |bit: u32| b >> bit & 1 != 0;
        let access = Access {
            write: flag(0),
            execute: flag(1) && flag(2),
        };
        let exit = match a % 24 {
            0 => Exit::Cpuid,
            1 => Exit::Rdmsr,
            2 => Exit::Wrmsr,
            3 => Exit::Hypercall,
            4..8 => Exit::Io(IoExit {
                port: (value() >> (value() % 8)) as u16,
                size: 1 << (b % 3),
                input: flag(3),
                string: flag(4),
                rep: flag(5),
            }),
            8..11 => Exit::NestedFault {
                addr,
                access,
                walk: flag(6) && flag(7),
            },
            11 => Exit::ApicWrite {
                offset: (b % 0x100) as u16 * 16,
            },
            12 => Exit::Hlt,
            13 => Exit::Cr(CrAccess {
                register: [
                    ControlRegister::Cr0,
                    ControlRegister::Cr3,
                    ControlRegister::Cr4,
                    ControlRegister::Cr8,
                ][b as usize % 4],
                op: if flag(9) {
                    CrOp::Write(Gpr::from_number(b as u8))
                } else {
                    CrOp::Undecoded { write: flag(8) }
                },
            }),
            14 => Exit::Dr {
                register: DebugRegister::Dr6,
                write: true,
                gpr: None,
            },
            15 => Exit::Exception {
                exception: [
                    Exception::Debug,
                    Exception::AlignmentCheck,
                    Exception::PageFault,
                ][b as usize % 3],
                error_code: Some(b as u32),
                info: value(),
            },
            16 => Exit::Invlpg,
            17 => Exit::Xsetbv,
            18 => Exit::Rdtscp,
            19 => Exit::Wbinvd,
            20 => Exit::NmiWindow,
            21 => Exit::InterruptWindow,
            22 => Exit::PreemptionTimer,
            _ => Exit::UndefinedInstruction,
        };
        let vcpu = &mut world.cpu.vcpu;
        for number in 0..16 {
            vcpu.set_gpr(Gpr::from_number(number), value() >> (value() % 64));
        }
        if flag(10) {
            // MSRs that exist, mostly.
            let known = [
                0x10,
                0x1b,
                0x3b,
                0x277,
                0x6e0,
                0x808,
                0x830,
                0x838,
                0xc000_0080,
            ];
            vcpu.gprs[Gpr::Rcx] = known[b as usize % known.len()];
        }
        vcpu.next_rip = flag(11).then(|| value() >> (value() % 64));
        vcpu.rip = if flag(12) { KERNEL + b % 4096 } else { value() };
        vcpu.rflags = RFlags::from_bits_retain(value() & 0x25_7fd5) | RFlags::FIXED;
        let code = value().to_le_bytes();
        let at = GuestPhysAddr::new(KERNEL + b % 4096);
        world.memory().write(at, &code).unwrap();
        world.core.tsc += b % 100_000;
        let ended = matches!(world.run(&[exit]), Stop::Ended(_));
        if ended || flag(13) && flag(14) && flag(15) {
            let machine = Machine::new();
            let vcpu = match b % 4 {
                0 => MockVcpu::real(),
                1 => MockVcpu::protected(),
                2 => MockVcpu::protected().at_cpl(3),
                _ => MockVcpu::long(0x1000),
            };
            let mut cpus = machine.make("", &mut || Ok(MockVcpu::real())).unwrap();
            world.cpu = cpus.remove(0);
            world.cpu.vcpu = vcpu;
        }
        world.core.output.clear();
        world.core.armed.clear();
        let rights = world.cpu.vcpu.segments[SegmentRegister::Cs as usize].rights;
        assert_ne!(rights, AccessRights(0));
    }
}

#[test]
fn a_vm_that_cannot_be_made_leaves_nothing_behind() {
    let machine = Machine::new();
    for (keys, wrong) in [
        ("memory = \"64MiB\"", "memory = 64 MiB"),
        // Its RAM would fit, its page tables do not.
        ("memory = \"40MiB\"", "KiB for its page tables"),
        ("kernel = \"absent\"", "absent"),
        ("kernel = \"text\"", "text"),
        ("kind = \"linux\"", "kernel"),
        ("initrd = \"absent\"", "absent"),
    ] {
        let mut made = 0;
        let result = machine.make(keys, &mut || {
            made += 1;
            Ok(MockVcpu::real())
        });
        let error = result.err().unwrap().to_string();
        assert!(error.contains(wrong), "{keys}: {error}");
        assert_eq!(made, 0, "no vCPU is made for a VM that fails before");
        assert_eq!(machine.free_bytes(), machine.total, "{keys}");
    }
    let result = machine.make("", &mut || Err("no".to_string()));
    assert!(matches!(result, Err(VmError::Vcpu(_))));
    assert_eq!(machine.free_bytes(), machine.total);
}

#[test]
fn a_thousand_restarts_leave_nothing_behind() {
    let machine = Machine::new();
    let mut world = World::new();
    for round in 0..1000 {
        let mut cpus = machine.make("", &mut || Ok(MockVcpu::protected())).unwrap();
        world.cpu = cpus.remove(0);
        world.cpu.vcpu.next_rip = Some(KERNEL + 2);
        world.run(&[fault(0x40_0000 + 4096 * round, Access::WRITE)]);
        assert_eq!(world.out(0x64, 0xfe), Stop::Ended(End::Reset));
    }
    let _vcpu = world.cpu.into_vcpu();
    assert_eq!(machine.free_bytes(), machine.total);
}

#[test]
fn what_is_outstanding_shrinks_as_memory_is_taken() {
    let mut world = World::new();
    let before = world.cpu.vm.outstanding_bytes();
    assert!(before >= 15 << 20);
    let free = world.machine.free_bytes();
    for page in 0..100 {
        world.run(&[fault(0x40_0000 + 4096 * page, Access::WRITE)]);
    }
    let taken = free - world.machine.free_bytes();
    assert_eq!(world.cpu.vm.outstanding_bytes(), before - taken);
}

/// Two vCPUs of one VM, each on a core of its own.
struct Pair {
    worlds: [World; 2],
}

impl Pair {
    fn new() -> Self {
        let mut first = World::new();
        let mut cpus = first
            .machine
            .make("vcpus = 2", &mut || Ok(MockVcpu::protected()))
            .unwrap();
        let mut second = World::new();
        second.cpu = cpus.remove(1);
        first.cpu = cpus.remove(0);
        for world in [&mut first, &mut second] {
            world.cpu.vcpu.next_rip = Some(KERNEL + 2);
        }
        Self {
            worlds: [first, second],
        }
    }

    /// vCPU 0 writes its interrupt command register.
    fn command(&mut self, dest: u32, low: u32) {
        let world = &mut self.worlds[0];
        let now = world.cpu.vm.time_at(world.core.tsc);
        let _ = world.cpu.apic.write_mmio(0x310, dest << 24, now);
        let effect = world.cpu.apic.write_mmio(0x300, low, now);
        world.cpu.apply(effect).unwrap();
    }
}

const ASLEEP: Stop = Stop::Halted { until: u64::MAX };

#[test]
fn a_second_cpu_starts_where_it_is_told_to() {
    let mut pair = Pair::new();
    assert_eq!(pair.worlds[1].run(&[]), ASLEEP, "waits for its start-up");
    pair.command(1, 0xc500);
    pair.command(1, 0x469a);
    assert_eq!(pair.worlds[0].run(&[]), PREEMPTED);
    assert_eq!(pair.worlds[0].core.kicked, 0b10);
    pair.worlds[1].cpu.vcpu.exits.clear();
    assert_eq!(pair.worlds[1].run(&[]), PREEMPTED);
    let cs = pair.worlds[1].cpu.vcpu.segments[SegmentRegister::Cs as usize];
    assert_eq!((cs.selector, cs.base), (0x9a00, 0x9_a000));
    assert_eq!(pair.worlds[1].cpu.vcpu.rip, 0);
    // The second start-up of the book's sequence is lost on it, an INIT parks it again.
    pair.command(1, 0x4655);
    assert_eq!(pair.worlds[1].run(&[]), PREEMPTED);
    assert_eq!(pair.worlds[1].cpu.vcpu.rip, 0);
    pair.command(1, 0xc500);
    assert_eq!(pair.worlds[1].run(&[]), ASLEEP);
    pair.command(1, 0x4655);
    assert_eq!(pair.worlds[1].run(&[]), PREEMPTED);
    let cs = pair.worlds[1].cpu.vcpu.segments[SegmentRegister::Cs as usize];
    assert_eq!(cs.base, 0x5_5000);
}

#[test]
fn an_nmi_waits_with_a_cpu_that_waits() {
    let mut pair = Pair::new();
    pair.command(1, 0x4400);
    assert_eq!(pair.worlds[1].run(&[]), ASLEEP);
    assert!(pair.worlds[1].cpu.vcpu.delivered.is_empty());
    pair.command(1, 0x4601);
    pair.worlds[1].open(true);
    assert_eq!(pair.worlds[1].run(&[]), PREEMPTED);
    assert_eq!(pair.worlds[1].cpu.vcpu.delivered, [Event::Nmi]);
}

#[test]
fn init_of_the_boot_cpu_resets_the_machine() {
    let mut pair = Pair::new();
    pair.command(0, 0xc500);
    assert_eq!(pair.worlds[0].run(&[]), Stop::Ended(End::Reset));
}

#[test]
fn the_vm_ends_when_its_last_cpu_goes_deaf() {
    let mut pair = Pair::new();
    assert_eq!(pair.worlds[1].run(&[]), ASLEEP);
    pair.worlds[0].open(false);
    assert_eq!(
        pair.worlds[0].run(&[Exit::Hlt]),
        Stop::Ended(End::Halted),
        "the other waits for what nobody can send"
    );
    // One that has something coming will hear it, and may send something in its turn.
    let mut pair = Pair::new();
    assert_eq!(pair.worlds[1].run(&[]), ASLEEP);
    pair.command(1, 0x4601);
    pair.worlds[0].open(false);
    let stop = pair.worlds[0].run(&[Exit::Hlt]);
    assert!(matches!(stop, Stop::Halted { .. }), "{stop:?}");
    assert_eq!(pair.worlds[1].run(&[]), PREEMPTED);
    pair.worlds[1].open(false);
    assert_eq!(pair.worlds[1].run(&[Exit::Hlt]), Stop::Ended(End::Halted));
}

#[test]
fn a_kick_ends_a_halt_without_interrupts_or_the_next_one() {
    let mut pair = Pair::new();
    pair.command(1, 0x4601);
    assert_eq!(pair.worlds[1].run(&[]), PREEMPTED);
    pair.worlds[1].open(false);
    let kick = |pair: &mut Pair, target: u64| {
        let gprs = pair.worlds[0].gprs();
        (gprs[Gpr::Rax], gprs[Gpr::Rcx]) = (abi::hypercall::KICK_CPU, target);
        pair.worlds[0].core.kicked = 0;
        assert_eq!(pair.worlds[0].run(&[Exit::Hypercall]), PREEMPTED);
        assert_eq!(pair.worlds[0].gprs()[Gpr::Rax], 0);
    };
    let halted = |stop| matches!(stop, Stop::Halted { .. });
    assert!(halted(pair.worlds[1].run(&[Exit::Hlt])));
    kick(&mut pair, 1);
    assert_eq!(pair.worlds[0].core.kicked, 0b10);
    assert_eq!(pair.worlds[1].run(&[]), PREEMPTED, "goes on");
    // Two before a halt are one.
    kick(&mut pair, 1);
    kick(&mut pair, 1);
    assert_eq!(pair.worlds[1].run(&[Exit::Hlt]), PREEMPTED);
    assert!(halted(pair.worlds[1].run(&[Exit::Hlt])));
    // Nobody is there.
    for target in [2, 63, 64, u64::MAX] {
        kick(&mut pair, target);
        assert_eq!(pair.worlds[0].core.kicked, 0, "{target}");
    }
    // The sender may halt at once: who was kicked is not deaf.
    kick(&mut pair, 1);
    pair.worlds[0].open(false);
    assert!(halted(pair.worlds[0].run(&[Exit::Hlt])));
    assert_eq!(pair.worlds[1].run(&[]), PREEMPTED);
}

#[test]
fn the_board_keeps_time_on_the_first_cpu_whoever_programs_it() {
    let mut pair = Pair::new();
    pair.command(1, 0x4601);
    assert_eq!(pair.worlds[1].run(&[]), PREEMPTED);
    pair.worlds[0].run(&[]);
    // The 8254 at 1 kHz.
    for (register, value) in [(0x43, 0x34), (0x40, 0xa9), (0x40, 0x04)] {
        assert_eq!(pair.worlds[1].out(register, value), PREEMPTED);
    }
    assert_ne!(pair.worlds[1].core.kicked & 1, 0, "it is told");
    pair.worlds[0].run(&[]);
    let due = pair.worlds[0].cpu.vcpu.deadline - ORIGIN;
    assert!((900_000..1_100_000).contains(&due), "{due}");
}

#[test]
fn one_that_loses_its_core_has_told_the_others_before() {
    let mut pair = Pair::new();
    pair.command(1, 0x4601);
    assert_eq!(pair.worlds[1].run(&[]), PREEMPTED);
    assert_eq!(pair.worlds[1].out(0x43, 0x34), PREEMPTED);
    pair.worlds[0].run(&[]);
    let world = &mut pair.worlds[1];
    world.core.kicked = 0;
    // The count in one string, while something else wants the core.
    world.code(b"");
    world.cpu.vcpu.rip = 0;
    for (at, bytes) in [(0x1000, b"\xf3\x6e"), (0x2000, b"\xa9\x04")] {
        world.memory().write(GuestPhysAddr::new(at), bytes).unwrap();
    }
    let gprs = world.gprs();
    (gprs[Gpr::Rsi], gprs[Gpr::Rcx], gprs[Gpr::Rdx]) = (0x2000, 2, 0x40);
    let exit = Exit::Io(IoExit {
        port: 0x40,
        size: 1,
        input: false,
        string: true,
        rep: true,
    });
    world.cpu.vcpu.exits = [exit].into();
    world.core.patience = 0;
    assert_eq!(world.cpu.run(&mut world.core), PREEMPTED);
    assert_eq!(world.core.kicked & 1, 1);
}

#[test]
fn the_memory_of_a_vm_that_is_given_up_is_left_alone() {
    for (order, preempted) in [(Order::Run, 1), (Order::Abandon, 0)] {
        let mut world = World::new();
        let gprs = world.gprs();
        (gprs[Gpr::Rcx], gprs[Gpr::Rax], gprs[Gpr::Rdx]) = (0x4b56_4d03, 0x1001, 0);
        assert_eq!(world.run(&[Exit::Wrmsr]), PREEMPTED);
        world.cpu.vm.set_order(order);
        world.cpu.unload(true);
        let mut byte = [0];
        let at = GuestPhysAddr::new(0x1010);
        world.memory().read(at, &mut byte).unwrap();
        assert_eq!(byte, [preempted], "{order:?}");
    }
}

#[test]
fn one_end_is_the_end_of_all() {
    let mut pair = Pair::new();
    pair.command(1, 0x4601);
    assert_eq!(pair.worlds[1].run(&[]), PREEMPTED);
    assert_eq!(
        pair.worlds[1].out(0xf4, 0),
        Stop::Ended(End::DebugExit(1)),
        "by whichever vCPU"
    );
    pair.worlds[1].cpu.vm().set_order(Order::Stop);
    assert_eq!(pair.worlds[0].run(&[Exit::Cpuid]), Stop::Ordered);
    // Paused ones go on where they were.
    let mut pair = Pair::new();
    pair.worlds[0].cpu.vm().set_order(Order::Pause);
    assert_eq!(pair.worlds[0].run(&[Exit::Cpuid]), Stop::Ordered);
    pair.worlds[0].cpu.vm().set_order(Order::Run);
    assert_eq!(pair.worlds[0].run(&[Exit::Cpuid]), PREEMPTED);
}

#[test]
fn exits_are_counted_by_reason_and_told_at_the_end_of_a_turn() {
    use crate::exits::Reason;
    let mut world = World::new();
    let exits = world.cpu.exits().clone();
    assert_eq!(exits.total(), 0);
    let out = port(0x80, 1, false);
    assert_eq!(world.run(&[Exit::Cpuid, out, out]), PREEMPTED);
    assert_eq!(exits.of(Reason::Cpuid), 1);
    assert_eq!(exits.of(Reason::Port), 2);
    // What ended the turn.
    assert!(exits.total() > 3);
    let sum: u64 = Reason::ALL
        .iter()
        .map(|(reason, _)| exits.of(*reason))
        .sum();
    assert_eq!(exits.total(), sum);
}

#[test]
fn a_silent_queue_is_looked_at_in_time() {
    let mut world = World::new();
    world.cpu.vcpu.own_timer = false;
    world.cpu.listens = true;
    world.core.tsc += 7_000_000;
    let due = world.core.tsc + crate::SILENCE;
    // A look that finds frames is followed by another one, in time; one that finds none is not.
    world.core.frames = true;
    assert_eq!(world.run(&[Exit::PreemptionTimer]), PREEMPTED);
    assert_eq!(world.core.armed, [due, due]);
    assert_eq!(world.core.looks, [Ask::Idle, Ask::Never]);
    assert!(world.cpu.listens, "and nobody adds anything meanwhile");
    // The time while it was away does not count.
    world.core.tsc += 50_000_000;
    world.core.armed.clear();
    world.core.looks.clear();
    assert_eq!(world.run(&[Exit::PreemptionTimer]), PREEMPTED);
    let due = world.core.tsc + crate::SILENCE;
    assert_eq!(world.core.armed.first(), Some(&due));
    assert_eq!(world.core.looks, [Ask::Idle]);
    assert!(!world.cpu.listens && world.core.armed.last() > Some(&due));
}

#[test]
fn who_leaves_a_silent_queue_looks_and_asks_for_notifications() {
    let halted = |stop: &Stop| matches!(stop, Stop::Halted { .. });
    // What it sent before it halts leaves first, ...
    for (frames, looks) in [
        (true, &[Ask::Idle, Ask::Now][..]),
        (false, &[Ask::Idle][..]),
    ] {
        let mut world = World::new();
        (world.cpu.listens, world.core.frames) = (true, frames);
        world.open(true);
        assert!(halted(&world.run(&[Exit::Hlt])));
        assert_eq!(world.core.looks, looks);
        assert!(!world.cpu.listens);
    }
    // ... and what it sent before it is paused, ...
    let mut world = World::new();
    world.cpu.listens = true;
    world.cpu.vm().set_order(Order::Pause);
    assert_eq!(world.run(&[]), Stop::Ordered);
    assert_eq!(world.core.looks, [Ask::Now]);
    // ... and if a sibling may add to the queue, before it is away.
    let mut pair = Pair::new();
    pair.worlds[0].cpu.listens = true;
    assert_eq!(pair.worlds[0].run(&[]), PREEMPTED);
    assert_eq!(pair.worlds[0].core.looks, [Ask::Now]);
    assert!(!pair.worlds[0].cpu.listens);
}

#[test]
fn a_doorbell_is_served_before_the_next_entry() {
    const BAR: u64 = 0xd000_0000;
    const RING: u64 = 0x30_0000;
    const DATA: u64 = 0x31_0000;
    let mut world = World::new();
    let mut board = world.cpu.vm().board().unwrap();
    let place = machine::pci::DeviceFunction::new(2, 0).unwrap();
    let rng = virtio::pci::VirtioPci::new(virtio::rng::Rng::new([1; 32])).unwrap();
    board.pci.plug(place, Box::new(rng)).unwrap();
    let config = map::ECAM.start + (2 << 15);
    for (at, size, value) in [
        (config + 0x10, 4, BAR),
        (config + 0x04, 2, 6),
        (BAR + 0x14, 1, 3),
        (BAR + 0x08, 4, 1),
        (BAR + 0x0c, 4, 1),
        (BAR + 0x14, 1, 0xb),
        (BAR + 0x18, 2, 8),
        (BAR + 0x20, 8, RING),
        (BAR + 0x28, 8, RING + 0x1000),
        (BAR + 0x30, 8, RING + 0x2000),
        (BAR + 0x1c, 2, 1),
        (BAR + 0x14, 1, 0xf),
    ] {
        board.mmio_write(at, size, value, Nanos::ZERO);
    }
    drop(board);
    assert_eq!(world.run(&[]), PREEMPTED);
    let put = |world: &World, at, bytes: &[u8]| {
        let mut memory = world.memory();
        memory.write(GuestPhysAddr::new(at), bytes).unwrap();
    };
    put(&world, RING, &DATA.to_le_bytes());
    put(&world, RING + 8, &[16, 0, 0, 0, 2, 0, 0, 0]);
    put(&world, RING + 0x1002, &[1, 0]);
    world.code(b"\x66\x89\x07");
    world.gprs()[Gpr::Rdi] = BAR + 0x4000;
    assert_eq!(world.run(&[fault(BAR + 0x4000, Access::WRITE)]), PREEMPTED);
    let get = |world: &World, at| {
        let mut memory = world.memory();
        memory.read_u64(GuestPhysAddr::new(at)).unwrap()
    };
    assert_eq!(get(&world, RING + 0x2000) >> 16 & 0xffff, 1, "given back");
    assert_eq!(get(&world, RING + 0x2004), 16 << 32);
    assert_ne!(get(&world, DATA), 0);
    let mut board = world.cpu.vm().board().unwrap();
    assert!(!board.wants_service());
    assert_eq!(
        board.mmio_read(BAR + 0x1000, 1, Nanos::ZERO),
        1,
        "interrupt status"
    );
}
