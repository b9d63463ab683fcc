//! Several CPUs on one memory and one clock: translations, locked operations, locks, time,
//! topology, and what each has for itself.

use crate::smp_start::need_two;
use crate::time::{kvm, pv_nanos_at};
use crate::util::{OSXSAVE, PATIENCE, need, vector, wait_until};
use core::arch::asm;
use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use guest_runtime::cpu::{self, cpuid, rdmsr, rdtsc, wrmsr};
use guest_runtime::pc::{eoi, is_intel};
use guest_runtime::smp::{self, OTHERS, apic_id, send};
use guest_runtime::{
    Frame, Page, count_on, expect_fault, guest_test, on_interrupt, set_window,
    set_window_unflushed, window, with_interrupts,
};

static FRAMES: [Page; 2] = [const { Page::zero() }; 2];
/// The page of the window whose translation changes.
const SLOT: usize = 40;
const SHOOT: u8 = 0x76;

fn invalidate() {
    // SAFETY: forgetting a translation is always allowed.
    unsafe { asm!("invlpg [{}]", in(reg) window(SLOT), options(nostack)) };
}

fn peek(address: u64) -> u64 {
    // SAFETY: the callers' pages are mapped.
    unsafe { (address as *const u64).read_volatile() }
}

fn poke(address: u64, value: u64) {
    // SAFETY: the callers' pages are mapped and their own.
    unsafe { (address as *mut u64).write_volatile(value) };
}

static WANTED: AtomicU64 = AtomicU64::new(0);
static WRONG: AtomicU64 = AtomicU64::new(0);

/// The shoot-down itself: forget, and look, and write so that the other side can look.
fn shoot(_: &mut Frame) {
    invalidate();
    if peek(window(SLOT)) != WANTED.load(Ordering::SeqCst) {
        WRONG.fetch_add(1, Ordering::SeqCst);
    }
    poke(
        window(SLOT) + 8 + 8 * smp::current() as u64,
        WANTED.load(Ordering::SeqCst),
    );
    eoi();
}

#[guest_test]
fn smp_shot_down_translations_are_gone_everywhere() {
    const ROUNDS: u64 = 300;
    let count = need_two();
    on_interrupt(SHOOT, shoot);
    smp::start_all();
    WRONG.store(0, Ordering::SeqCst);
    set_window(SLOT, FRAMES[0].address() | 3);
    let stop = AtomicBool::new(false);
    let use_it = || {
        with_interrupts(|| {
            while !stop.load(Ordering::SeqCst) {
                let _ = peek(window(SLOT));
                core::hint::spin_loop();
            }
        });
    };
    let before: [u64; smp::MAX] = core::array::from_fn(|cpu| count_on(cpu, SHOOT));
    smp::beside(1..count, &use_it, || {
        for round in 1..=ROUNDS {
            let frame = FRAMES[(round & 1) as usize].address();
            poke(frame, round);
            WANTED.store(round, Ordering::SeqCst);
            set_window_unflushed(SLOT, frame | 3);
            invalidate();
            send(0, OTHERS | u32::from(SHOOT));
            while !(1..count).all(|cpu| {
                count_on(cpu, SHOOT) == before[cpu] + round
                    && peek(frame + 8 + 8 * cpu as u64) == round
            }) {
                // The count comes before the handler's writes, which this waits for as well: a
                // write through the old translation would be waited for in vain.
                core::hint::spin_loop();
            }
        }
        stop.store(true, Ordering::SeqCst);
    });
    assert_eq!(
        WRONG.load(Ordering::SeqCst),
        0,
        "reads by the old translation"
    );
}

#[guest_test]
fn smp_removed_and_protected_pages_fault_everywhere() {
    let count = need_two();
    smp::start_all();
    let frame = FRAMES[0].address();
    for _ in 0..20 {
        set_window(SLOT, frame | 3);
        smp::everywhere(&|| poke(window(SLOT), 1));
        set_window(SLOT, frame | 1);
        for cpu in 1..count {
            let fault = smp::on(cpu, || {
                invalidate();
                let _ = peek(window(SLOT));
                expect_fault(|| poke(window(SLOT), 2))
            });
            crate::util::assert_fault(fault, vector::PF, 3);
        }
        set_window(SLOT, 0);
        for cpu in 1..count {
            let fault = smp::on(cpu, || {
                // A new CR3 forgets as well.
                // SAFETY: it is the one in force.
                unsafe { cpu::set_cr3(cpu::cr3()) };
                expect_fault(|| {
                    let _ = peek(window(SLOT));
                })
            });
            crate::util::assert_fault(fault, vector::PF, 0);
        }
    }
}

#[repr(C, align(4096))]
struct Shared([AtomicU64; 1024]);

static SHARED: Shared = Shared([const { AtomicU64::new(0) }; 1024]);

/// An instruction on the memory that these tests share, and on nothing else.
macro_rules! locked {
    ($($code:tt)*) => {{
        // SAFETY: the memory is these tests' own, and the operands name what changes.
        unsafe { asm!($($code)*) }
    }};
}

/// Adds up on all CPUs at once by the instructions given, at several addresses: whether nothing
/// was lost.
#[track_caller]
fn adds_up(rounds: u64, name: &str, add: impl Fn(u64) + Sync) {
    let base = &raw const SHARED as u64;
    // Aligned; over a cache line; over a page.
    for offset in [0, 8, 60, 4092] {
        poke(base + offset, 0);
        smp::everywhere(&|| (0..rounds).for_each(|_| add(base + offset)));
        let wanted = rounds * smp::count() as u64;
        assert_eq!(peek(base + offset), wanted, "{name} at {offset}");
        poke(base + offset, 0);
    }
}

/// KVM's call that wakes who halted in wait for a lock.
fn kick(cpu: usize) {
    const KICK_CPU: u64 = 5;
    let (mut result, target) = (KICK_CPU, u64::from(apic_id(cpu)));
    // SAFETY: it changes RAX alone; RBX, which the compiler keeps to itself, is put back.
    unsafe {
        if is_intel() {
            asm!("push rbx", "xor ebx, ebx", "vmcall", "pop rbx", inout("rax") result, in("rcx") target);
        } else {
            asm!("push rbx", "xor ebx, ebx", "vmmcall", "pop rbx", inout("rax") result, in("rcx") target);
        }
    }
    assert_eq!(result, 0);
}

#[guest_test]
fn smp_kicks_end_halts_without_interrupts() {
    const ROUNDS: u64 = 200;
    need_two();
    need(
        kvm().is_some_and(|features| features >> 7 & 1 != 0),
        "KVM kicks",
    );
    smp::start_all();
    let (halts, ready) = (AtomicU64::new(0), AtomicU64::new(0));
    // One that finds its condition false halts; the other makes it true, and kicks. The kick may
    // come before the halt, or the halt end without one.
    let waiter = || {
        for round in 1..=ROUNDS {
            while ready.load(Ordering::SeqCst) < round {
                // SAFETY: interrupts are off, and the kick ends it.
                unsafe { asm!("cli", "hlt", options(nomem, nostack)) };
            }
            halts.store(round, Ordering::SeqCst);
        }
    };
    smp::beside([1], &waiter, || {
        for round in 1..=ROUNDS {
            if round & 1 != 0 {
                // Give it time to halt.
                (0..2_000).for_each(|_| core::hint::spin_loop());
            }
            ready.store(round, Ordering::SeqCst);
            kick(1);
            let woken = || halts.load(Ordering::SeqCst) == round;
            assert!(wait_until(PATIENCE, woken), "round {round}");
        }
    });
    // Nobody is there: no harm.
    kick(0);
}

#[guest_test]
fn smp_locked_operations_are_atomic() {
    need_two();
    const ROUNDS: u64 = 2_000;
    smp::start_all();
    adds_up(
        ROUNDS,
        "lock inc",
        |at| locked!("lock inc qword ptr [{}]", in(reg) at),
    );
    adds_up(
        ROUNDS,
        "lock add",
        |at| locked!("lock add dword ptr [{}], 1", in(reg) at),
    );
    adds_up(
        ROUNDS,
        "lock xadd",
        |at| locked!("lock xadd [{}], {}", in(reg) at, inout(reg) 1u64 => _),
    );
    adds_up(
        ROUNDS,
        "lock sub",
        |at| locked!("lock sub qword ptr [{}], -1", in(reg) at),
    );
    adds_up(ROUNDS, "lock cmpxchg", |at| {
        locked!("mov rax, [{0}]", "2:", "lea {1}, [rax + 1]", "lock cmpxchg [{0}], {1}",
             "jz 3f", "pause", "jmp 2b", "3:", in(reg) at, out(reg) _, out("rax") _)
    });
}

#[guest_test]
fn smp_locked_bits_and_exchanges_are_atomic() {
    need_two();
    smp::start_all();
    let at = &raw const SHARED as u64;
    poke(at, 0);
    poke(at + 64, 0);
    let both = |lock: &(dyn Fn() + Sync), unlock: &(dyn Fn() + Sync)| {
        poke(at + 64, 0);
        smp::everywhere(&|| {
            for _ in 0..500 {
                lock();
                // Not locked by itself: the lock keeps the others out.
                poke(at + 64, peek(at + 64) + 1);
                unlock();
            }
        });
        assert_eq!(peek(at + 64), 500 * smp::count() as u64);
    };
    both(
        &|| locked!("2:", "lock bts dword ptr [{}], 7", "jnc 3f", "pause", "jmp 2b", "3:", in(reg) at),
        &|| locked!("lock btr dword ptr [{}], 7", in(reg) at),
    );
    // XCHG locks without a prefix.
    both(
        &|| {
            locked!("2:", "mov {1:e}, 1", "xchg [{0}], {1:e}", "test {1:e}, {1:e}", "jz 3f", "pause",
                 "jmp 2b", "3:", in(reg) at, out(reg) _)
        },
        &|| locked!("mov dword ptr [{}], 0", in(reg) at),
    );
    if cpuid(1, 0)[2] >> 13 & 1 != 0 {
        both(
            &|| {
                locked!("2:", "xor eax, eax", "xor edx, edx", "mov {k}, rbx", "mov ebx, 1",
                     "xor ecx, ecx", "lock cmpxchg16b [{at}]", "mov rbx, {k}", "jz 3f", "pause",
                     "jmp 2b", "3:", at = in(reg) at, k = out(reg) _,
                     out("rax") _, out("rcx") _, out("rdx") _)
            },
            &|| poke(at, 0),
        );
    }
}

/// A lock that serves in order: worst when CPUs do not run all at once, as only one can go on.
struct Tickets {
    next: AtomicU64,
    served: AtomicU64,
}

impl Tickets {
    const fn new() -> Self {
        Self {
            next: AtomicU64::new(0),
            served: AtomicU64::new(0),
        }
    }

    fn with<T>(&self, work: impl FnOnce() -> T) -> T {
        let own = self.next.fetch_add(1, Ordering::SeqCst);
        while self.served.load(Ordering::SeqCst) != own {
            core::hint::spin_loop();
        }
        let result = work();
        self.served.fetch_add(1, Ordering::SeqCst);
        result
    }
}

#[guest_test]
fn smp_ticket_lock_makes_progress() {
    need_two();
    smp::start_all();
    let (lock, counter) = (Tickets::new(), AtomicU64::new(0));
    smp::everywhere(&|| {
        for _ in 0..100 {
            lock.with(|| {
                let value = counter.load(Ordering::Relaxed);
                counter.store(value + 1, Ordering::Relaxed);
            });
        }
    });
    assert_eq!(counter.load(Ordering::SeqCst), 100 * smp::count() as u64);
}

#[guest_test]
fn smp_barriers_make_progress() {
    const ROUNDS: u64 = 50;
    let count = need_two() as u64;
    smp::start_all();
    let arrived = AtomicU64::new(0);
    smp::everywhere(&|| {
        for round in 1..=ROUNDS {
            arrived.fetch_add(1, Ordering::SeqCst);
            while arrived.load(Ordering::SeqCst) < round * count {
                core::hint::spin_loop();
            }
        }
    });
    assert_eq!(arrived.load(Ordering::SeqCst), ROUNDS * count);
}

/// Stores are seen in order, and a locked operation keeps a load behind a store (SDM §8.2.3).
#[guest_test]
fn smp_memory_is_ordered() {
    need_two();
    smp::start_all();
    let base = &raw const SHARED as u64;
    // Message passing: a CPU that sees the flag sees the data.
    poke(base, 0);
    poke(base + 128, 0);
    let wrong = AtomicU64::new(0);
    smp::beside(
        [1],
        &|| {
            let mut last = 0;
            while last < 2_000 {
                last = peek(base + 128);
                if peek(base) < last {
                    wrong.fetch_add(1, Ordering::SeqCst);
                }
            }
        },
        || {
            for value in 1..=2_000 {
                poke(base, value);
                poke(base + 128, value);
            }
        },
    );
    assert_eq!(
        wrong.load(Ordering::SeqCst),
        0,
        "the data came after the flag"
    );
}

#[guest_test]
fn smp_tsc_is_monotone_across_cpus() {
    need_two();
    smp::start_all();
    let (lock, last, back) = (Tickets::new(), AtomicU64::new(0), AtomicU64::new(0));
    smp::everywhere(&|| {
        for _ in 0..200 {
            lock.with(|| {
                // SAFETY: LFENCE keeps RDTSC behind what came before.
                unsafe { asm!("lfence") };
                let now = rdtsc();
                back.fetch_max(
                    last.load(Ordering::SeqCst).saturating_sub(now),
                    Ordering::SeqCst,
                );
                last.store(now, Ordering::SeqCst);
            });
        }
    });
    assert_eq!(back.load(Ordering::SeqCst), 0, "ticks back");
}

#[guest_test]
fn smp_kvm_clock_is_each_cpus_own_and_the_same_time() {
    static RECORDS: Page = Page::zero();
    need_two();
    need(
        kvm().is_some_and(|features| features >> 3 & 1 != 0),
        "KVM clock",
    );
    smp::start_all();
    let record = || RECORDS.address() + 64 * smp::current() as u64;
    // SAFETY: the MSR is offered; each CPU gives its own part of the page.
    smp::everywhere(&|| unsafe { wrmsr(0x4b56_4d01, record() | 1) });
    let (lock, last, back) = (Tickets::new(), AtomicU64::new(0), AtomicU64::new(0));
    smp::everywhere(&|| {
        for _ in 0..100 {
            lock.with(|| {
                let now = pv_nanos_at(record());
                back.fetch_max(
                    last.load(Ordering::SeqCst).saturating_sub(now),
                    Ordering::SeqCst,
                );
                last.store(now, Ordering::SeqCst);
            });
        }
    });
    // SAFETY: off again.
    smp::everywhere(&|| unsafe { wrmsr(0x4b56_4d01, 0) });
    // Linux takes the greatest it has seen, unless the records promise that they agree.
    let back = back.load(Ordering::SeqCst);
    assert!(back < 1_000, "{back} ns back");
}

/// Each leaf that is the same on all CPUs, but for the bits given as not.
#[guest_test]
fn smp_cpuid_is_the_same_but_for_the_ids() {
    let count = need_two();
    let leaf = |leaf: u32| {
        let mut found = cpuid(leaf, 0);
        match leaf {
            1 => found[1] &= 0x00ff_ffff,
            0xb | 0x1f => found[3] = 0,
            // Ids of CPU, core and node; per-CPU state components in use.
            0x8000_001e => found = [0; 4],
            _ => {}
        }
        found
    };
    for base in [0u32, 0x4000_0000, 0x8000_0000] {
        let last = cpuid(base, 0)[0].min(base + 0x30);
        for number in base..=last {
            let own = leaf(number);
            for cpu in 1..count {
                assert_eq!(
                    smp::on(cpu, || leaf(number)),
                    own,
                    "leaf {number:x} on CPU {cpu}"
                );
            }
        }
    }
}

#[guest_test]
fn smp_cpuid_1_has_the_madts_ids() {
    let count = need_two();
    for cpu in 0..count {
        let [_, b, _, d] = smp::on(cpu, || cpuid(1, 0));
        assert_eq!(b >> 24, apic_id(cpu) & 0xff, "CPU {cpu}");
        assert!(d >> 28 & 1 != 0, "HTT: more than one id in the package");
        let logical = b >> 16 & 0xff;
        assert!(logical > 1, "{logical} ids in the package");
    }
}

/// Leaves 0BH and 1FH: every level's width splits the ids that the MADT has.
fn topology(leaf: u32) {
    need_two();
    need(
        cpuid(0, 0)[0] >= leaf && cpuid(leaf, 0)[1] & 0xffff != 0,
        "topology leaf",
    );
    let count = smp::count();
    for cpu in 0..count {
        let mut width = 0;
        let mut last = 0;
        for level in 0.. {
            let [a, b, c, d] = smp::on(cpu, || cpuid(leaf, level));
            assert_eq!(c & 0xff, level & 0xff, "level number");
            let kind = c >> 8 & 0xff;
            if kind == 0 {
                assert!(
                    level > 0 && (a, b & 0xffff) == (0, 0),
                    "the level after the last"
                );
                break;
            }
            assert_eq!(d, apic_id(cpu), "x2APIC id on CPU {cpu}");
            assert!(
                kind > last && a & 0x1f >= width,
                "level {level}: kind {kind}, width {a}"
            );
            (last, width) = (kind, a & 0x1f);
            // How many CPUs share what is above this level's bits.
            let own = apic_id(cpu) >> width;
            let there = (0..count)
                .filter(|other| apic_id(*other) >> width == own)
                .count();
            assert!(
                b & 0xffff >= there as u32,
                "{} CPUs in level {level}, {there} there",
                b & 0xffff
            );
            assert!(
                1 << width >= b & 0xffff,
                "{b} CPUs need more than {width} bits"
            );
        }
    }
}

#[guest_test]
fn smp_cpuid_b_is_the_topology_of_the_madt() {
    topology(0xb);
}

#[guest_test]
fn smp_cpuid_1f_is_the_topology_of_the_madt() {
    topology(0x1f);
}

#[guest_test]
fn smp_cpuid_4_shares_no_more_than_the_package() {
    let count = need_two();
    need(is_intel() && cpuid(0, 0)[0] >= 4, "leaf 4");
    let ids = (cpuid(4, 0)[0] >> 26) + 1;
    assert!(ids <= 64);
    for index in 0..8 {
        let [a, ..] = cpuid(4, index);
        if a & 0x1f == 0 {
            break;
        }
        let sharing = (a >> 14 & 0xfff) + 1;
        assert!(sharing.next_power_of_two() <= (count as u32).next_power_of_two().max(2));
        if a >> 5 & 7 == 3 {
            assert!(
                sharing.next_power_of_two() >= ids.min(count as u32),
                "the last level is shared"
            );
        }
    }
}

#[guest_test]
fn smp_cpuid_of_amd_counts_and_numbers_the_cpus() {
    let count = need_two();
    need(!is_intel(), "AMD CPU");
    let [_, _, c, _] = cpuid(0x8000_0008, 0);
    assert!((c & 0xff) + 1 >= count.min(256) as u32, "NC: {}", c & 0xff);
    let width = c >> 12 & 0xf;
    assert!(width == 0 || 1 << width > c & 0xff, "ApicIdSize {width}");
    // CmpLegacy says that leaf 1's count is of cores.
    if cpuid(0x8000_0001, 0)[2] >> 22 & 1 != 0 {
        for cpu in 0..count {
            let [a, b, ..] = smp::on(cpu, || cpuid(0x8000_001e, 0));
            assert_eq!(a, apic_id(cpu), "extended APIC id");
            let threads = (b >> 8 & 0xff) + 1;
            let core = |cpu: usize| apic_id(cpu) / threads.next_power_of_two();
            let there = (0..count).filter(|other| core(*other) == core(cpu)).count();
            assert!(there as u32 <= threads);
        }
    }
}

/// MSRs that belong to the CPU alone, with values that any CPU takes.
const OWN: [u32; 10] = [
    0x174,
    0x175,
    0x176,
    0x277,
    0xc000_0081,
    0xc000_0082,
    0xc000_0083,
    0xc000_0084,
    0xc000_0100,
    0xc000_0102,
];

fn value_for(index: u32, cpu: usize) -> u64 {
    match index {
        0x174 => 0x10 + 8 * cpu as u64,
        // Entry 0, which all memory in use has, stays write-back.
        0x277 => 0x0007_0406_0007_0006 | (cpu as u64 & 1) << 8,
        0xc000_0084 => 0x100 << (cpu & 7),
        _ => 0x1000 * (u64::from(index & 0xff) + 1) + 0x10 * cpu as u64,
    }
}

#[guest_test]
fn smp_msrs_are_each_cpus_own() {
    need_two();
    smp::start_all();
    let kept = OWN.map(|index| {
        // SAFETY: every CPU in long mode has them.
        unsafe { rdmsr(index) }
    });
    smp::everywhere(&|| {
        for index in OWN {
            // SAFETY: the runtime uses none of them, and the values are legal.
            unsafe { wrmsr(index, value_for(index, smp::current())) };
        }
        // SAFETY: no breakpoint is enabled.
        unsafe { cpu::set_dr0(smp::current() as u64) };
    });
    for _ in 0..3 {
        for cpu in 0..smp::count() {
            for index in OWN {
                // SAFETY: as above.
                let found = smp::on(cpu, || unsafe { rdmsr(index) });
                assert_eq!(found, value_for(index, cpu), "MSR {index:x} on CPU {cpu}");
            }
            assert_eq!(smp::on(cpu, cpu::dr0), cpu as u64, "DR0");
        }
    }
    for (index, value) in OWN.into_iter().zip(kept) {
        // SAFETY: what was there.
        unsafe { wrmsr(index, value) };
    }
}

#[guest_test]
fn smp_control_registers_are_each_cpus_own() {
    need_two();
    need(cpuid(1, 0)[2] >> 26 & 1 != 0, "XSAVE");
    smp::start_all();
    let set = |on: bool| {
        move || {
            let value = cpu::cr4() & !OSXSAVE;
            // SAFETY: XSAVE is there.
            unsafe { cpu::set_cr4(if on { value | OSXSAVE } else { value }) };
        }
    };
    for odd in [true, false] {
        for cpu in 0..smp::count() {
            smp::on(cpu, set((cpu & 1 != 0) == odd));
        }
        for cpu in 0..smp::count() {
            let (cr4, shown) = smp::on(cpu, || (cpu::cr4() & OSXSAVE, cpuid(1, 0)[2] >> 27 & 1));
            assert_eq!(cr4 != 0, (cpu & 1 != 0) == odd, "CR4 of CPU {cpu}");
            assert_eq!(cr4 != 0, shown != 0, "OSXSAVE of CPU {cpu}");
        }
    }
}

#[guest_test]
fn smp_fpu_state_is_each_cpus_own() {
    need_two();
    smp::start_all();
    let wrong = AtomicU64::new(0);
    smp::everywhere(&|| {
        let own = 0x1111_1111_1111_1111 * (1 + smp::current() as u64);
        // SAFETY: SSE is switched on for this CPU; XMM15 is nobody's here.
        unsafe {
            cpu::set_cr4(cpu::cr4() | 0x200);
            asm!("movq xmm15, {}", in(reg) own);
            for _ in 0..50 {
                let _ = cpuid(0, 0);
                let found: u64;
                asm!("movq {}, xmm15", out(reg) found);
                if found != own {
                    wrong.fetch_add(1, Ordering::SeqCst);
                }
            }
        }
    });
    assert_eq!(wrong.load(Ordering::SeqCst), 0);
}
