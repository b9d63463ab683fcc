//! What two vCPUs cost each other: interrupts to and fro, wake-ups, turns given away.
//!
//! On one core a figure holds everything from the one vCPU's instruction to the other's handler:
//! the exit, the scheduler's decision, the halt of the sender, the switch, the injection.

use crate::{AHEAD, TIMER, WAKES, WARM_UP, WOKEN, arm_mode, disarm, row, woken};
use core::arch::asm;
use core::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use guest_runtime::cpu::{self, rdtsc, wrmsr};
use guest_runtime::pc::{
    TSC_DEADLINE, has_tsc_deadline, has_x2apic, is_intel, reg, set_lapic, set_x2apic, x2apic,
};
use guest_runtime::{Frame, clock, on_interrupt, println, smp};

const BELL: u8 = 0x72;
const ROUNDS: u64 = 500;
/// Tessera's hypercall that gives the core away (`abi::hypercall::YIELD`).
const YIELD: u64 = 0x5465_0002;

/// Straight to the registers: to ask for the APIC's mode first would be an exit of its own.
fn ring(cpu: usize) {
    let icr = u64::from(smp::apic_id(cpu)) << 32 | u64::from(BELL);
    // SAFETY: all CPUs are in x2APIC mode, and `BELL` has a handler.
    unsafe { wrmsr(x2apic(reg::ICR_LOW), icr) };
}

fn heard(_: &mut Frame) {
    WOKEN.store(rdtsc(), SeqCst);
    // SAFETY: as in `ring`.
    unsafe { wrmsr(x2apic(reg::EOI), 0) };
}

/// An interrupt to the other CPU, which halts, and one back.
fn round_trip() -> u64 {
    static HOPS: AtomicU64 = AtomicU64::new(0);
    HOPS.store(0, SeqCst);
    let wait = |hop| {
        while HOPS.load(SeqCst) < hop {
            cpu::wait_for_interrupt();
        }
    };
    let play = |first: u64, other: usize| {
        for turn in 0..ROUNDS {
            wait(2 * turn + first);
            HOPS.fetch_add(1, SeqCst);
            ring(other);
        }
    };
    smp::beside([1], &|| play(1, 0), || {
        let start = rdtsc();
        play(0, 1);
        wait(2 * ROUNDS);
        (rdtsc() - start) / ROUNDS
    })
}

/// From the write to the ICR to the handler of a CPU that halts; the sender halts meanwhile, or
/// (`busy`) works on.
fn wake_by_interrupt(busy: bool) -> u64 {
    let stop = AtomicBool::new(false);
    let sleep = || {
        while !stop.load(SeqCst) {
            cpu::wait_for_interrupt();
        }
    };
    smp::beside([1], &sleep, || {
        let mut total = 0;
        for turn in 0..WAKES + WARM_UP {
            // In the meantime the other falls asleep.
            clock::sleep_until(rdtsc() + AHEAD);
            WOKEN.store(0, SeqCst);
            let sent = rdtsc();
            ring(1);
            if busy {
                while WOKEN.load(SeqCst) == 0 {
                    core::hint::spin_loop();
                }
            } else {
                clock::sleep_until(sent + AHEAD);
            }
            if turn >= WARM_UP {
                total += WOKEN.load(SeqCst).saturating_sub(sent);
            }
        }
        stop.store(true, SeqCst);
        ring(1);
        total / WAKES
    })
}

/// From the deadline of a CPU that halts to its handler, while another is at work.
fn wake_by_timer() -> u64 {
    let stop = AtomicBool::new(false);
    let work = || {
        while !stop.load(SeqCst) {
            // No PAUSE, which may ask the hypervisor for a look.
            for _ in 0..100 {
                // SAFETY: does nothing.
                unsafe { asm!("nop") };
            }
        }
    };
    smp::beside([1], &work, || {
        on_interrupt(TIMER, woken);
        arm_mode();
        let mut total = 0;
        for turn in 0..WAKES + WARM_UP {
            let deadline = rdtsc() + AHEAD;
            WOKEN.store(0, SeqCst);
            // SAFETY: the caller looked for the MSR; its vector has a handler.
            unsafe { wrmsr(TSC_DEADLINE, deadline) };
            while WOKEN.load(SeqCst) == 0 {
                cpu::wait_for_interrupt();
            }
            if turn >= WARM_UP {
                total += WOKEN.load(SeqCst).saturating_sub(deadline);
            }
        }
        stop.store(true, SeqCst);
        disarm();
        total / WAKES
    })
}

fn give_way() {
    // SAFETY: the call changes RAX alone.
    unsafe {
        if is_intel() {
            asm!("vmcall", inout("rax") YIELD => _);
        } else {
            asm!("vmmcall", inout("rax") YIELD => _);
        }
    }
}

/// Each CPU gives its core to the other: from one's call to the other's.
fn switch() -> u64 {
    let stop = AtomicBool::new(false);
    let turns = AtomicU64::new(0);
    let there = || {
        while !stop.load(SeqCst) {
            turns.fetch_add(1, SeqCst);
            give_way();
        }
    };
    smp::beside([1], &there, || {
        while turns.load(SeqCst) < WARM_UP {
            give_way();
        }
        let (start, before) = (rdtsc(), turns.load(SeqCst));
        for _ in 0..ROUNDS {
            give_way();
        }
        let (end, after) = (rdtsc(), turns.load(SeqCst));
        stop.store(true, SeqCst);
        (end - start) / (ROUNDS + after - before)
    })
}

/// All of them; `apart`: each vCPU has a core to itself.
pub fn measure(apart: bool) {
    if !has_x2apic() || !has_tsc_deadline() || smp::start_all() < 2 {
        println!("# smp: needs two CPUs, x2APIC and TSC deadlines");
        return;
    }
    smp::everywhere(&|| {
        set_x2apic(true);
        set_lapic(reg::SVR, 0x1ff);
    });
    on_interrupt(BELL, heard);
    let name = |here, there| if apart { there } else { here };
    row(name("ipi-round-trip", "ipi-round-trip-apart"), round_trip());
    row(
        name("wake-by-ipi", "wake-by-ipi-apart"),
        wake_by_interrupt(false),
    );
    row(
        name("wake-by-ipi-busy", "wake-by-ipi-busy-apart"),
        wake_by_interrupt(true),
    );
    if !apart {
        row("vcpu-switch", switch());
    }
    let timer = name("wake-by-timer-busy", "wake-by-timer-apart");
    row(timer, wake_by_timer());
}
