//! The guest's other CPUs: started, given work, and parked again.
//!
//! CPUs have indices: 0 is the one that booted, the others follow in the order of the MADT. A CPU
//! that is not at work waits for an INIT–SIPI–SIPI (Intel SDM Vol. 3A §8.4) and takes no time; one
//! that was started and has nothing to do spins a little and then halts, with interrupts on. Work
//! is a closure on the stack of the CPU that gives it, which waits for its end: nothing outlives
//! the case that started it, and when a case is left early all others are parked first.
//!
//! All CPUs share page tables, GDT and IDT; each has a TSS of its own, which is also how a CPU
//! knows its index.

use crate::pc::{LAPIC, in_x2apic, reg, set_lapic, set_x2apic, x2apic};
use crate::{Page, acpi, cpu, interrupts, segments};
use core::arch::asm;
use core::sync::atomic::{AtomicPtr, AtomicU32, AtomicUsize, Ordering};

pub use segments::current;

/// How many CPUs the runtime can use.
pub const MAX: usize = 64;
/// The interrupt that ends the halt of an idle CPU. Its handler cannot be replaced.
pub const WAKE: u8 = 0xef;

/// ICR: INIT, level asserted (SDM Vol. 3A §11.6.1).
pub const INIT: u32 = 0x4500;
/// ICR: start-up; the lowest byte is the number of the page to start at.
pub const STARTUP: u32 = 0x4600;
/// ICR: NMI.
pub const NMI: u32 = 0x4400;
/// ICR: the destination is logical.
pub const LOGICAL: u32 = 1 << 11;
/// ICR: lowest priority.
pub const LOWEST: u32 = 1 << 8;
/// ICR: shorthand for this CPU.
pub const SELF: u32 = 1 << 18;
/// ICR: shorthand for all CPUs.
pub const ALL: u32 = 2 << 18;
/// ICR: shorthand for all CPUs but this.
pub const OTHERS: u32 = 3 << 18;

/// Where the trampoline lies while a CPU starts.
const TRAMPOLINE: u64 = 0x8000;
const STACK: usize = 16 << 10;
/// How long to wait for a CPU, in TSC ticks: seconds, whatever the machine.
const PATIENCE: u64 = 20_000_000_000;
/// How often an idle CPU looks for work before it halts.
const LOOKS: u32 = 500;

const PARKED: u32 = 0;
const RUNNING: u32 = 1;
/// Left a case early: runs nothing any more until it is started anew.
const LEFT: u32 = 2;

static IDS: [AtomicU32; MAX] = [const { AtomicU32::new(0) }; MAX];
static COUNT: AtomicUsize = AtomicUsize::new(0);
static STATES: [AtomicU32; MAX] = [const { AtomicU32::new(PARKED) }; MAX];
static WORK: [AtomicPtr<Work>; MAX] = [const { AtomicPtr::new(core::ptr::null_mut()) }; MAX];
static FIRST: AtomicPtr<()> = AtomicPtr::new(core::ptr::null_mut());
static KEPT: Page = Page::zero();

type Work = &'static (dyn Fn() + Sync);

#[repr(C, align(16))]
struct Stacks(core::cell::UnsafeCell<[[u8; STACK]; MAX - 1]>);

// SAFETY: each CPU uses its own stack, and nobody looks at them as data.
unsafe impl Sync for Stacks {}

static STACKS: Stacks = Stacks(core::cell::UnsafeCell::new([[0; STACK]; MAX - 1]));

core::arch::global_asm!(
    ".text",
    ".code16",
    ".globl guest_trampoline",
    "guest_trampoline:",
    "cli",
    "cld",
    ".byte 0x2e, 0x66, 0x0f, 0x01, 0x16", // lgdt, 32-bit base, from CS
    ".word 3f - guest_trampoline",
    "mov eax, cr0",
    "or al, 1",
    "mov cr0, eax",
    ".byte 0x66, 0xea", // jmp 18:guest_ap32
    ".long guest_ap32",
    ".word 0x18",
    "3:",
    ".word {gdt_limit}",
    ".long guest_gdt",
    ".globl guest_trampoline_end",
    "guest_trampoline_end:",
    ".code32",
    "guest_ap32:",
    "mov eax, 16",
    "mov ds, eax",
    "mov es, eax",
    "mov ss, eax",
    "xor eax, eax",
    "mov fs, eax",
    "mov gs, eax",
    "mov eax, 0x20",
    "mov cr4, eax",
    "mov eax, offset guest_pml4",
    "mov cr3, eax",
    "mov ecx, 0xc0000080",
    "rdmsr",
    "or eax, 0x900",
    "wrmsr",
    "mov eax, cr0",
    "and eax, 0x9fffffff",
    "or eax, 0x80010021",
    "mov cr0, eax",
    ".byte 0xea", // jmp 8:guest_ap64
    ".long guest_ap64",
    ".word 8",
    ".code64",
    "guest_ap64:",
    "mov rsp, [guest_ap_stack]",
    "mov rdi, [guest_ap_index]",
    "xor ebp, ebp",
    "call {start}",
    "ud2",
    ".section .data.guest_ap, \"aw\"",
    ".balign 8",
    ".globl guest_ap_stack",
    "guest_ap_stack: .quad 0",
    ".globl guest_ap_index",
    "guest_ap_index: .quad 0",
    ".text",
    gdt_limit = const segments::GDT_BYTES - 1,
    start = sym ap_start,
);

unsafe extern "C" {
    static guest_trampoline: u8;
    static guest_trampoline_end: u8;
    static mut guest_ap_stack: u64;
    static mut guest_ap_index: u64;
}

/// How many CPUs there are, started or not.
pub fn count() -> usize {
    if COUNT.load(Ordering::Relaxed) == 0 {
        let own = cpu::cpuid(1, 0)[1] >> 24;
        let own = match in_x2apic() {
            true => crate::pc::lapic(reg::ID),
            false => own,
        };
        set_id(0, own);
        let mut count = 1;
        for id in acpi::cpus().filter(|id| *id != own).take(MAX - 1) {
            set_id(count, id);
            count += 1;
        }
        COUNT.store(count, Ordering::Relaxed);
    }
    COUNT.load(Ordering::Relaxed)
}

fn set_id(cpu: usize, id: u32) {
    if let Some(slot) = IDS.get(cpu) {
        slot.store(id, Ordering::Relaxed);
    }
}

/// The APIC id of a CPU, by the MADT.
pub fn apic_id(cpu: usize) -> u32 {
    assert!(cpu < count(), "CPU {cpu} of {}", count());
    IDS[cpu].load(Ordering::Relaxed)
}

/// Writes the ICR: `low` as in the manual, the destination an APIC id or a logical one.
pub fn send(destination: u32, low: u32) {
    if in_x2apic() {
        // SAFETY: the MSR exists in this mode; vectors have handlers, and INIT and SIPI go to CPUs
        // that run this program.
        unsafe {
            cpu::wrmsr(
                x2apic(reg::ICR_LOW),
                u64::from(destination) << 32 | u64::from(low),
            )
        };
        return;
    }
    // SAFETY: the page is mapped; the rest as above.
    unsafe {
        while cpu::read32(LAPIC + u64::from(reg::ICR_LOW)) & 0x1000 != 0 {
            core::hint::spin_loop();
        }
        cpu::write32(LAPIC + u64::from(reg::ICR_HIGH), destination << 24);
        cpu::write32(LAPIC + u64::from(reg::ICR_LOW), low);
    }
}

/// Waits for `condition`: whether it came true within some seconds.
fn patiently(mut condition: impl FnMut() -> bool) -> bool {
    let start = cpu::rdtsc();
    while !condition() {
        if cpu::rdtsc().wrapping_sub(start) > PATIENCE {
            return false;
        }
        core::hint::spin_loop();
    }
    true
}

/// The few microseconds between INIT and SIPI.
fn pause() {
    for _ in 0..20 {
        // SAFETY: port 80H takes a microsecond and has no other effect.
        let _ = unsafe { cpu::inb(0x80) };
    }
}

/// Starts a CPU at real-mode page `page`, by INIT, SIPI, SIPI. What it does there is the caller's.
pub fn start_at(cpu: usize, page: u8) {
    send(apic_id(cpu), INIT);
    pause();
    for _ in 0..2 {
        send(apic_id(cpu), STARTUP | u32::from(page));
        pause();
    }
}

/// Puts `code` at the page of [`TRAMPOLINE`] while `work` runs.
pub fn with_trampoline<T>(code: &[u8], work: impl FnOnce(u8) -> T) -> T {
    assert!(
        code.len() as u64 <= crate::PAGE,
        "a trampoline is a page at most"
    );
    let page = TRAMPOLINE as *mut u8;
    let kept = KEPT.address() as *mut u8;
    // SAFETY: the page is RAM, and what is there is put back; nothing else uses `KEPT`, as one CPU
    // alone starts others.
    unsafe {
        kept.copy_from_nonoverlapping(page, crate::PAGE as usize);
        page.copy_from_nonoverlapping(code.as_ptr(), code.len());
    }
    let result = work((TRAMPOLINE >> 12) as u8);
    // SAFETY: as above.
    unsafe { page.copy_from_nonoverlapping(kept, crate::PAGE as usize) };
    result
}

/// Prepares the start of `cpu` by the runtime's own trampoline, puts that where it belongs, and
/// leaves the start itself to `kick`, which gets the trampoline's page. Whether the CPU came.
pub fn start_by(cpu: usize, kick: impl FnOnce(u8)) -> bool {
    assert!(cpu != 0 && cpu < count(), "CPU {cpu} of {}", count());
    let start = &raw const guest_trampoline;
    let length = &raw const guest_trampoline_end as usize - start as usize;
    // SAFETY: the symbols enclose the trampoline's code.
    let code = unsafe { core::slice::from_raw_parts(start, length) };
    STATES[cpu].store(PARKED, Ordering::SeqCst);
    WORK[cpu].store(core::ptr::null_mut(), Ordering::SeqCst);
    let stack = STACKS.0.get() as u64 + (STACK * cpu) as u64;
    // SAFETY: no CPU is starting, as each start is waited for.
    unsafe {
        (&raw mut guest_ap_stack).write_volatile(stack);
        (&raw mut guest_ap_index).write_volatile(cpu as u64);
    }
    with_trampoline(code, |page| {
        kick(page);
        patiently(|| STATES[cpu].load(Ordering::SeqCst) == RUNNING)
    })
}

/// Starts a CPU if it does not run yet.
///
/// # Panics
/// It did not come.
#[track_caller]
pub fn start(cpu: usize) {
    if STATES
        .get(cpu)
        .is_some_and(|state| state.load(Ordering::SeqCst) == RUNNING)
    {
        return;
    }
    let came = start_by(cpu, |page| start_at(cpu, page));
    assert!(
        came,
        "CPU {cpu}, APIC id {:#x}, did not start",
        apic_id(cpu)
    );
}

/// Starts all CPUs and gives how many there are.
#[track_caller]
pub fn start_all() -> usize {
    (1..count()).for_each(start);
    count()
}

/// Calls `first` on each CPU that starts from now on, before it touches its local APIC.
pub fn on_start(first: Option<fn()>) {
    let first = first.map_or(core::ptr::null_mut(), |first| first as *mut ());
    FIRST.store(first, Ordering::SeqCst);
}

extern "C" fn ap_start(cpu: usize) -> ! {
    segments::init_cpu(cpu);
    interrupts::load_idt();
    let first = FIRST.load(Ordering::SeqCst);
    if !first.is_null() {
        // SAFETY: only `on_start` stores here.
        unsafe { core::mem::transmute::<*mut (), fn()>(first)() };
    }
    // INIT leaves an x2APIC in that mode (SDM Vol. 3A §11.12.5.1).
    if in_x2apic() {
        set_x2apic(false);
    }
    set_lapic(reg::SVR, 0x1ff);
    set_lapic(reg::TPR, 0);
    STATES[cpu].store(RUNNING, Ordering::SeqCst);
    loop {
        let mut work = core::ptr::null_mut();
        // SAFETY: every vector has a handler.
        unsafe { asm!("sti") };
        for _ in 0..LOOKS {
            work = WORK[cpu].load(Ordering::Acquire);
            if !work.is_null() {
                break;
            }
            core::hint::spin_loop();
        }
        // SAFETY: as above.
        unsafe { asm!("cli") };
        if work.is_null() && WORK[cpu].load(Ordering::Acquire).is_null() {
            // SAFETY: what gives work sends an interrupt after it.
            unsafe { asm!("sti", "hlt", "cli") };
        }
        if !work.is_null() {
            // SAFETY: who gave it waits for its end, or for this CPU's INIT.
            unsafe { (*work)() };
            WORK[cpu].store(core::ptr::null_mut(), Ordering::Release);
        }
    }
}

/// Whether this CPU is to leave because another one has left the case.
fn somebody_left() -> bool {
    STATES
        .iter()
        .any(|state| state.load(Ordering::SeqCst) == LEFT)
}

fn join(cpu: usize) {
    let ended = patiently(|| {
        if somebody_left() {
            crate::tests::leave();
        }
        WORK[cpu].load(Ordering::Acquire).is_null()
    });
    assert!(ended, "CPU {cpu} does not come to an end");
}

/// Runs `there` on the CPUs given, and `here` on this one in the meantime; ends when all ended.
/// CPUs that do not run yet are started. Work that is given by the CPU that booted may panic, which
/// ends the case.
#[track_caller]
pub fn beside<T>(
    cpus: impl IntoIterator<Item = usize, IntoIter: Clone>,
    there: &(dyn Fn() + Sync),
    here: impl FnOnce() -> T,
) -> T {
    let cpus = cpus.into_iter();
    // SAFETY: the lifetime is only forgotten: every CPU that gets the reference has ended with it
    // when this function is left, by the `join` below or, when a case is left, by INIT.
    let there: Work = unsafe { core::mem::transmute::<&(dyn Fn() + Sync), Work>(there) };
    for cpu in cpus.clone() {
        assert!(cpu != current(), "CPU {cpu} gives work to itself");
        start(cpu);
        assert!(
            WORK[cpu].load(Ordering::Acquire).is_null(),
            "CPU {cpu} is at work"
        );
        WORK[cpu].store((&raw const there).cast_mut(), Ordering::Release);
        send(apic_id(cpu), WAKE.into());
    }
    let result = here();
    cpus.for_each(join);
    result
}

/// Runs `work` on a CPU, which may be this one, and gives what it gives.
#[track_caller]
pub fn on<T: Send>(cpu: usize, work: impl FnOnce() -> T + Send) -> T {
    struct Slot<T>(core::cell::UnsafeCell<T>);
    // SAFETY: the CPUs use it one after the other.
    unsafe impl<T: Send> Sync for Slot<T> {}
    impl<T> Slot<T> {
        fn get(&self) -> *mut T {
            self.0.get()
        }
    }
    if cpu == current() {
        return work();
    }
    let slot = Slot(core::cell::UnsafeCell::new((Some(work), None)));
    let there = || {
        // SAFETY: the other CPU waits meanwhile.
        let slot = unsafe { &mut *slot.get() };
        slot.1 = slot.0.take().map(|work| work());
    };
    beside([cpu], &there, || ());
    // SAFETY: the other CPU has ended its work.
    match unsafe { (*slot.get()).1.take() } {
        Some(result) => result,
        None => panic!("CPU {cpu} did not do its work"),
    }
}

/// Runs `work` on all CPUs at once, this one included.
#[track_caller]
pub fn everywhere(work: &(dyn Fn() + Sync)) {
    let own = current();
    beside((0..count()).filter(|cpu| *cpu != own), work, work);
}

/// Whether a CPU runs, at work or idle.
pub fn is_running(cpu: usize) -> bool {
    STATES
        .get(cpu)
        .is_some_and(|state| state.load(Ordering::SeqCst) == RUNNING)
}

/// Forgets what a CPU did: something has taken it into wait-for-SIPI.
pub fn is_parked_now(cpu: usize) {
    STATES[cpu].store(PARKED, Ordering::SeqCst);
    WORK[cpu].store(core::ptr::null_mut(), Ordering::SeqCst);
}

/// Takes a CPU back into wait-for-SIPI by INIT.
pub fn park(cpu: usize) {
    send(apic_id(cpu), INIT);
    pause();
    is_parked_now(cpu);
}

/// Takes all CPUs but this, which is the one that booted, back into wait-for-SIPI.
pub fn park_others() {
    on_start(None);
    let states = || (1..MAX).filter(|cpu| STATES[*cpu].load(Ordering::SeqCst) != PARKED);
    if states().next().is_some() {
        send(0, INIT | OTHERS);
        pause();
        states().for_each(is_parked_now);
    }
}

/// Leaves the case on a CPU that did not boot: it does nothing more until it is parked.
pub(crate) fn leave() -> ! {
    if let Some(state) = STATES.get(current()) {
        state.store(LEFT, Ordering::SeqCst);
    }
    loop {
        // SAFETY: nothing is left to do.
        unsafe { asm!("cli", "hlt") };
    }
}
