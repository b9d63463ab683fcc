//! What an exit costs, measured from inside: two RDTSC around a loop, less the same loop with
//! nothing in it.
//!
//! Where the TSC counts instructions (Bochs with one CPU, QEMU with `-icount shift=0`) the figure
//! is the exact number of instructions from the guest's instruction and back, and repeats. Each
//! case prints one line `bench <case> <value> instructions`. Interrupts are off throughout, except
//! in the halt of `hlt-wake`.
//!
//! Ports: `port-in` and `port-out` use 21H, the first 8259's mask, which every hypervisor answers
//! itself; `device-port` is the mean of a read and a write of the UART's scratch register.
//!
//! Command line: `smp` measures what two vCPUs on one core cost each other, `apart` the same with a
//! core for each; `share=<from>,<to>` counts what the guest gets of its core between two times of
//! its own, in milliseconds; `take=<frames>,<ring>` and `send=<ring>` measure, in a guest each, frames from one to the
//! other; `nothing` measures nothing.
#![no_std]
#![no_main]

mod frames;
mod share;
mod smp;

use core::arch::asm;
use core::sync::atomic::{AtomicU64, Ordering};
use guest_runtime::cpu::{self, cpuid, rdmsr, rdtsc, wrmsr};
use guest_runtime::pc::{
    self, IOAPIC, LAPIC, MASKED, TSC_DEADLINE, eoi, has_tsc_deadline, has_x2apic, in_x2apic,
    is_intel, quiet, reg, set_lapic, set_x2apic, x2apic,
};
use guest_runtime::{Frame, cmdline, entry, on_interrupt, println, start_info};

entry!(main);

const LOOPS: u64 = 2000;
const WARM_UP: u64 = 16;
const WAKES: u64 = 200;
/// Ticks in which what was printed has left, and the hypervisor has brought its screen up to date.
const SCREEN: u64 = 200_000_000;
/// How far ahead the timer of `hlt-wake` is set, in ticks.
const AHEAD: u64 = 200_000;
const PAGES: u64 = 2000;
const PAT: u32 = 0x277;
const UNKNOWN_HYPERCALL: u64 = 0xffff;
/// Tessera's hypercall for how often it accessed VMCS fields (`abi::hypercall::VMCS_ACCESSES`).
const VMCS_ACCESSES: u64 = 0x5465_0001;

/// VMREADs and VMWRITEs a turn, of the turns since the last row that had most.
static READS: AtomicU64 = AtomicU64::new(0);
static WRITES: AtomicU64 = AtomicU64::new(0);

fn row(case: &str, value: u64) {
    println!("bench {case} {value} instructions");
    let (reads, writes) = (
        READS.swap(0, Ordering::Relaxed),
        WRITES.swap(0, Ordering::Relaxed),
    );
    if reads != 0 {
        println!("bench {case}-vmreads {reads} vmreads");
        println!("bench {case}-vmwrites {writes} vmwrites");
    }
}

/// Whether a hypervisor is there that takes calls.
fn takes_calls() -> bool {
    cpuid(1, 0)[2] >> 31 != 0 && cpuid(0x4000_0000, 0)[1] != u32::from_le_bytes(*b"TCGT")
}

/// VMREADs and VMWRITEs so far, where the hypervisor counts them.
fn vmcs_accesses() -> Option<(u64, u64)> {
    if !is_intel() || !takes_calls() {
        return None;
    }
    let result: i64;
    // SAFETY: a hypervisor that takes calls changes no more than these.
    unsafe {
        asm!("vmcall", inout("rax") VMCS_ACCESSES as i64 => result,
             out("rcx") _, out("rdx") _, out("rsi") _, out("rdi") _,
             out("r8") _, out("r9") _, out("r10") _, out("r11") _);
    }
    let counted = u64::try_from(result).ok()?;
    Some((counted & 0xffff_ffff, counted >> 32))
}

/// Takes down what `loops` turns since `before` cost. Where they are many, the asking is lost in
/// the rounding.
fn note_accesses(before: Option<(u64, u64)>, loops: u64) {
    if loops <= WARM_UP {
        return;
    }
    if let (Some(before), Some(after)) = (before, vmcs_accesses()) {
        let each = |from: u64, to: u64| to.saturating_sub(from) / loops.max(1);
        READS.fetch_max(each(before.0, after.0), Ordering::Relaxed);
        WRITES.fetch_max(each(before.1, after.1), Ordering::Relaxed);
    }
}

/// Ticks of `LOOPS` turns of the instructions given, with the registers given set for each turn.
macro_rules! turns {
    ($loops:expr, [$($code:literal),*], $($operands:tt)*) => {{
        let (start, end);
        let before = vmcs_accesses();
        // SAFETY: the cases' instructions touch only the registers named as operands, and devices
        // that the guest owns.
        unsafe {
            start = rdtsc();
            asm!(
                "2:", $($code,)* "dec {turn_:r}", "jnz 2b",
                turn_ = inout(reg) $loops => _,
                $($operands)*
            );
            end = rdtsc();
        }
        note_accesses(before, $loops);
        end.wrapping_sub(start)
    }};
}

/// Rounded mean of a turn, less the empty loop's.
macro_rules! measure {
    ([$($code:literal),*], $($operands:tt)*) => {{
        let _ = turns!(WARM_UP, [$($code),*], $($operands)*);
        let full = turns!(LOOPS, [$($code),*], $($operands)*);
        let empty = turns!(LOOPS, [], $($operands)*);
        (full.saturating_sub(empty) + LOOPS / 2) / LOOPS
    }};
}

fn wrmsr_case(index: u32, value: u64) -> u64 {
    measure!(["wrmsr"], in("ecx") index, in("eax") value as u32, in("edx") (value >> 32) as u32,)
}

fn cpu_cases() {
    // CPUID overwrites its inputs, so a turn sets them; that is two instructions more.
    let full = {
        macro_rules! one {
            ($loops:expr, [$($code:literal),*]) => {
                turns!($loops, ["mov {b:r}, rbx", "xor eax, eax", "xor ecx, ecx", $($code,)* "mov rbx, {b:r}"],
                       b = out(reg) _, out("eax") _, out("ecx") _, out("edx") _,)
            };
        }
        let _ = one!(WARM_UP, ["cpuid"]);
        one!(LOOPS, ["cpuid"]).saturating_sub(one!(LOOPS, []))
    };
    row("cpuid", (full + LOOPS / 2) / LOOPS);

    if takes_calls() {
        macro_rules! hypercall {
            ($name:literal) => {{
                macro_rules! one {
                    ($loops:expr, [$code:literal]) => {
                        turns!($loops, ["mov eax, {n:e}", $code], n = in(reg) UNKNOWN_HYPERCALL,
                               out("rax") _, out("rcx") _, out("rdx") _, out("rsi") _, out("rdi") _,
                               out("r8") _, out("r9") _, out("r10") _, out("r11") _,)
                    };
                }
                let _ = one!(WARM_UP, [$name]);
                one!(LOOPS, [$name]).saturating_sub(one!(LOOPS, [""]))
            }};
        }
        let full = if is_intel() {
            hypercall!("vmcall")
        } else {
            hypercall!("vmmcall")
        };
        row("hypercall", (full + LOOPS / 2) / LOOPS);
    } else {
        println!("# hypercall: no hypervisor that takes calls");
    }
}

fn msr_cases() {
    row(
        "rdmsr",
        measure!(["rdmsr"], in("ecx") PAT, out("eax") _, out("edx") _,),
    );
    // SAFETY: every CPU in long mode has a PAT, and it gets the value it has.
    row("wrmsr", wrmsr_case(PAT, unsafe { rdmsr(PAT) }));
    if !has_x2apic() {
        println!("# wrmsr-eoi, wrmsr-tpr, wrmsr-timer: no x2APIC");
        return;
    }
    set_x2apic(true);
    row("wrmsr-eoi", wrmsr_case(x2apic(reg::EOI), 0));
    row("wrmsr-tpr", wrmsr_case(x2apic(reg::TPR), 0));
    arm_mode();
    let far = 1 << 40;
    let timer = if has_tsc_deadline() {
        wrmsr_case(TSC_DEADLINE, rdtsc() + far)
    } else {
        wrmsr_case(x2apic(reg::INITIAL), 0xffff_ffff)
    };
    disarm();
    row("wrmsr-timer", timer);
    quiet();
}

fn io_cases() {
    const PIC_MASK: u16 = 0x21;
    const UART_SCRATCH: u16 = 0x3ff;
    let port_in = |port: u16| measure!(["in al, dx"], in("dx") port, out("al") _,);
    let port_out = |port: u16| measure!(["out dx, al"], in("dx") port, in("al") 0xffu8,);
    row("port-in", port_in(PIC_MASK));
    row("port-out", port_out(PIC_MASK));
    row(
        "device-port",
        (port_in(UART_SCRATCH) + port_out(UART_SCRATCH)) / 2,
    );
    let read = |address: u64| measure!(["mov eax, [rdi]"], in("rdi") address, out("eax") _,);
    let write = |address: u64| measure!(["mov [rdi], eax"], in("rdi") address, in("eax") 0u32,);
    row("lapic-mmio", write(LAPIC + u64::from(reg::EOI)));
    row("lapic-mmio-read", read(LAPIC + u64::from(reg::CURRENT)));
    row("lapic-mmio-tpr", write(LAPIC + u64::from(reg::TPR)));
    // SAFETY: the page is mapped; index 1 is the version register.
    unsafe { cpu::write32(IOAPIC, 1) };
    row("device-mmio", read(IOAPIC + 0x10));
}

const TIMER: u8 = 0x40;
static WOKEN: AtomicU64 = AtomicU64::new(0);

fn woken(_: &mut Frame) {
    WOKEN.store(rdtsc(), Ordering::Relaxed);
    eoi();
}

/// The timer's interrupt is on `TIMER`: by TSC deadline where there is one, else one-shot.
fn arm_mode() {
    set_lapic(reg::DIVIDE, 0xb);
    set_lapic(
        reg::LVT_TIMER,
        u32::from(TIMER) | if has_tsc_deadline() { 2 << 17 } else { 0 },
    );
    // Writes to the LVT and to the deadline MSR are not ordered in xAPIC mode (SDM §11.5.4.1).
    // SAFETY: MFENCE orders, and does nothing else.
    unsafe { asm!("mfence") };
}

fn disarm() {
    set_lapic(reg::INITIAL, 0);
    if has_tsc_deadline() {
        // SAFETY: CPUID says that the MSR exists.
        unsafe { wrmsr(TSC_DEADLINE, 0) };
    }
    set_lapic(reg::LVT_TIMER, MASKED);
}

/// TSC ticks of 2^20 ticks of the APIC timer, as the divisor for a one-shot's deadline.
fn tsc_per_timer_tick() -> u64 {
    const SAMPLE: u64 = 1 << 22;
    set_lapic(reg::INITIAL, u32::MAX);
    let (start, from) = (rdtsc(), pc::lapic(reg::CURRENT));
    while rdtsc() - start < SAMPLE {}
    let (end, to) = (rdtsc(), pc::lapic(reg::CURRENT));
    set_lapic(reg::INITIAL, 0);
    ((end - start) << 20) / u64::from(from.wrapping_sub(to)).max(1)
}

/// From the deadline to the first instruction of the handler that counts: includes the exit on
/// the host's timer, the injection, and the guest's own 20-odd instructions of stub.
fn hlt_wake() {
    if has_x2apic() {
        set_x2apic(true);
        set_lapic(reg::SVR, 0x1ff);
    }
    on_interrupt(TIMER, woken);
    set_lapic(reg::LVT_TIMER, MASKED);
    set_lapic(reg::DIVIDE, 0xb);
    let scale = if has_tsc_deadline() {
        0
    } else {
        tsc_per_timer_tick()
    };
    arm_mode();
    // The machine has its screen to draw, after what was just printed.
    let printed = rdtsc();
    while rdtsc() - printed < SCREEN {
        core::hint::spin_loop();
    }
    let mut total = 0;
    for turn in 0..WAKES + WARM_UP {
        let deadline = rdtsc() + AHEAD;
        if has_tsc_deadline() {
            // SAFETY: CPUID says that the MSR exists; its vector has a handler.
            unsafe { wrmsr(TSC_DEADLINE, deadline) };
        } else {
            set_lapic(reg::INITIAL, ((AHEAD << 20) / scale.max(1)) as u32);
        }
        WOKEN.store(0, Ordering::Relaxed);
        while WOKEN.load(Ordering::Relaxed) == 0 {
            cpu::wait_for_interrupt();
        }
        if turn >= WARM_UP {
            total += WOKEN.load(Ordering::Relaxed).saturating_sub(deadline);
        }
    }
    let mode = if in_x2apic() { "x2APIC" } else { "xAPIC" };
    let timer = if has_tsc_deadline() {
        "TSC deadline"
    } else {
        "one-shot"
    };
    disarm();
    quiet();
    println!("# hlt-wake: {mode}, {timer}, {AHEAD} ticks ahead");
    row("hlt-wake", total / WAKES);
}

/// The end of the RAM that the memory map gives below 4 GiB, and from where it is surely fresh.
fn fresh() -> (u64, u64) {
    let info = start_info();
    let mut best = (0, 0);
    for index in 0..u64::from(info.memory_map_entries) {
        let entry = (info.memory_map + 24 * index) as *const u64;
        // SAFETY: the loader's table has that many entries.
        let (address, size, kind) = unsafe {
            (
                entry.read_unaligned(),
                entry.add(1).read_unaligned(),
                entry.add(2).read_unaligned(),
            )
        };
        let end = address + size;
        if kind as u32 == 1 && end <= 1 << 32 && size > best.1 - best.0 {
            best = (address, end);
        }
    }
    // The guest itself lies at 2 MiB and is small; modules lie at the top.
    (best.0.max(16 << 20), best.1.saturating_sub(16 << 20))
}

fn touch(from: u64, stride: u64, pages: u64) -> u64 {
    let once = || turns!(pages, ["mov [rdi], rsi", "add rdi, rsi"], inout("rdi") from => _, in("rsi") stride,);
    let touched = once();
    let again = once();
    (touched.saturating_sub(again) + pages / 2) / pages
}

/// The first touch of fresh memory, less a second one. With 4 KiB frames under it
/// (`large_pages = false`) this is the demand-zeroed nested fault.
fn nested_fault() {
    let (from, to) = fresh();
    // From an odd page on, and not from the last one touched by anybody.
    let pages = PAGES.min(to.saturating_sub(from) / 4096 / 2);
    if pages == 0 {
        println!("# nested-fault: no fresh memory");
        return;
    }
    row("nested-fault", touch(from, 4096, pages));
}

/// What the command line asks for; all kinds of exits if nothing else.
fn main() {
    quiet();
    let word = cmdline().split_whitespace().next().unwrap_or_default();
    let times = word
        .strip_prefix("share=")
        .and_then(|times| times.split_once(','));
    match (word, times) {
        ("nothing", _) => {}
        ("smp" | "apart", _) => smp::measure(word == "apart"),
        (_, Some((from, to))) => match (from.parse(), to.parse()) {
            (Ok(from), Ok(to)) => share::count(from, to),
            _ => println!("# share: `{from}` and `{to}` must be milliseconds"),
        },
        _ => match word.split_once('=') {
            Some((role @ ("send" | "take"), numbers)) => frames::measure(role == "send", numbers),
            _ => exits(),
        },
    }
}

fn exits() {
    let vendor = if is_intel() { "Intel" } else { "AMD" };
    println!(
        "# bench on {vendor}: {LOOPS} loops, {WAKES} wakes, {PAGES} pages; \
         ports 21H and 3FFH; interrupts off"
    );
    cpu_cases();
    msr_cases();
    io_cases();
    hlt_wake();
    nested_fault();
}
