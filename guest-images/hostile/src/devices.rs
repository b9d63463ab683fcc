//! Ports, interrupt controllers, timers and memory-mapped devices: storms, floods, races.

use crate::state::RANGES;
use crate::{EFER, HOLE, Random};
use core::arch::asm;
use core::sync::atomic::{AtomicU64, Ordering};
use guest_runtime::cpu::{
    cpuid, inb, inl, inw, outb, outl, outw, read32, set_dr0, set_dr7, try_rdmsr, try_wrmsr, write32,
};
use guest_runtime::pc::{
    APIC_BASE, IOAPIC, LAPIC, MASKED, eoi, handle_eoi, has_x2apic, ioapic_pins, quiet, reg,
    set_lapic, set_redirection, set_x2apic, x2apic,
};
use guest_runtime::smp::{self, apic_id, send};
use guest_runtime::{
    Frame, PAGE, count, expect_fault, init_serial, on_interrupt, println, set_gate, set_window,
    with_interrupts,
};

pub fn port_storm() {
    for turn in 0..2_000u32 {
        for port in [0x20, 0x21, 0x40, 0x61, 0x70, 0x80, 0x3fd, 0xcf8, 0x1234] {
            // SAFETY: interrupts are off; none of these ends the machine.
            unsafe {
                let _ = inb(port);
                outb(if port == 0x3fd { 0x3ff } else { port }, turn as u8);
            }
        }
    }
    // SAFETY: the guest's own devices.
    quiet();
}

/// Every MSR in the ranges where any are: read, written with what it held, with zeros, with ones.
pub fn msr_storm() {
    let (mut there, mut faults) = (0u32, 0u32);
    for index in RANGES.into_iter().flatten() {
        let Ok(kept) = try_rdmsr(index) else {
            faults += 1;
            // SAFETY: as below.
            let _ = unsafe { try_wrmsr(index, 0) };
            continue;
        };
        there += 1;
        // EFER without long mode would end this guest on a lax CPU, and moving the local APIC
        // would take it from `quiet`.
        let values: &[u64] = match index {
            EFER => &[kept, u64::MAX],
            APIC_BASE => &[kept],
            _ => &[kept, 0, u64::MAX, 1 << 63, kept],
        };
        for &value in values {
            // SAFETY: interrupts are off, and neither segment bases nor system calls are in use.
            let _ = unsafe { try_wrmsr(index, value) };
        }
    }
    // The clock of a hypervisor must not go on writing to this guest's memory.
    // SAFETY: off, if there is one.
    let _ = unsafe { try_wrmsr(0x4b56_4d01, 0) };
    println!("hostile: {there} MSRs, {faults} absent");
}

pub fn cpuid_storm() {
    let mut random = Random(0x1234_5678_9abc_def1);
    for base in [
        0u32,
        0x2000_0000,
        0x4000_0000,
        0x4000_0100,
        0x8000_0000,
        0xc000_0000,
        0xffff_ff00,
    ] {
        for leaf in base..=base.saturating_add(0xff) {
            for subleaf in [0, 1, 2, 63, u32::MAX] {
                let _ = cpuid(leaf, subleaf);
            }
        }
    }
    for _ in 0..20_000 {
        let value = random.next();
        let _ = cpuid(value as u32, (value >> 32) as u32);
    }
}

/// Ports whose writing ends, resets or stops the machine, or speaks on the console, and so are
/// left out: debug exit, reset register, PM1 control, keyboard controller, port 92H, UART data,
/// debug console, and the SMI command of real chipsets.
const LEFT_OUT: [u16; 14] = [
    0xf4, 0xf5, 0xf6, 0xf7, 0xcf9, 0x604, 0x605, 0x64, 0x92, 0x3f8, 0x3fb, 0xe9, 0xb2, 0xb3,
];

pub fn io_all_ports() {
    for port in 0..=u16::MAX {
        for width in [1u16, 2, 4] {
            let end = port.saturating_add(width - 1);
            // Every port by bytes, every third by words and double words, aligned or not.
            if LEFT_OUT.iter().any(|out| (port..=end).contains(out)) || width > 1 && port % 3 != 0 {
                continue;
            }
            let value = u32::from(port).wrapping_mul(0x9e37_79b9);
            // SAFETY: interrupts are off; what ends the machine is left out.
            unsafe {
                match width {
                    1 => {
                        let _ = inb(port);
                        outb(port, value as u8);
                    }
                    2 => {
                        let _ = inw(port);
                        outw(port, value as u16);
                    }
                    _ => {
                        let _ = inl(port);
                        outl(port, value);
                    }
                }
            }
        }
    }
    init_serial();
}

/// CVE-2015-8104: the delivery of #DB writes where a data breakpoint is, on a stack that each
/// delivery begins anew, and so is followed by the next one before any instruction. Endless.
/// (QEMU's own emulation ends itself by this, with or without a hypervisor in it.)
pub fn db_loop() {
    fn again(_: &mut Frame) {}
    on_interrupt(1, again);
    set_gate(1, 1, 0);
    // SAFETY: the breakpoint is on the frame of the handler.
    unsafe {
        set_dr0(guest_runtime::segments::interrupt_stack() - 8);
        set_dr7(0x402 | 1 << 16 | 2 << 18);
        loop {
            asm!("int 1");
        }
    }
}

pub fn rep_outs_forever() {
    loop {
        // SAFETY: reads the first MiB, over and over.
        unsafe {
            asm!("rep outsb", inout("rsi") 0x20_0000u64 => _, inout("rcx") 0x10_0000u64 => _, in("dx") 0x80u16);
        }
    }
}

/// Accesses at the ends of the physical address space, and over them.
pub fn wrap() {
    let width = cpuid(0x8000_0008, 0)[0] & 0xff;
    let top = 1u64 << width.min(52);
    let mut frames = [0xffff_f000, 1 << 32, top / 2, top - 2 * PAGE, top - PAGE].into_iter();
    let all = frames.all(|frame| {
        let at = set_window(100, frame | 3);
        set_window(101, frame.wrapping_add(PAGE) & (top - 1) | 3);
        for offset in [0, 0x7f8, PAGE - 8, PAGE - 4, PAGE - 3, PAGE - 2, PAGE - 1] {
            let at = at + offset;
            // The second page may be RAM of this guest, so nothing is written over the end.
            let _ = expect_fault(|| {
                // SAFETY: reads only, or writes to the top page, where no RAM is.
                unsafe {
                    let _ = (at as *const u64).read_unaligned();
                    let _ = (at as *const u32).read_unaligned();
                    let _ = (at as *const u8).read_volatile();
                    if frame >= 0xffff_f000 && offset <= PAGE - 8 {
                        (at as *mut u64).write_volatile(u64::MAX);
                        asm!("lock add dword ptr [{}], 1", in(reg) at);
                        asm!("rep stosb", inout("rdi") at => _, inout("rcx") 8u64 => _, in("al") 0u8);
                    }
                }
            });
        }
        let mut sink = [0u8; 256];
        let _ = expect_fault(|| {
            // SAFETY: 256 bytes over the border of the two pages go to `sink`.
            unsafe {
                asm!("rep movsb", inout("rsi") at + PAGE - 128 => _, inout("rdi") sink.as_mut_ptr() => _,
                     inout("rcx") 256u64 => _);
            }
        });
        true
    });
    println!("hostile: all borders {all}");
}

/// Random values in random registers of both APICs, in both modes. SMI, INIT and SIPI are spared:
/// they do to a CPU what they are for.
pub fn apic_chaos() {
    fn nothing(_: &mut Frame) {}
    on_interrupt(2, nothing);
    let mut random = Random(0x0bad_5eed_0bad_5eed);
    let spared = |value: u32| matches!(value >> 8 & 7, 2 | 5 | 6);
    for turn in 0..20_000u64 {
        let (value, place) = (random.next() as u32, random.next());
        let offset = (place & 0xff) << 4;
        // SAFETY: interrupts are off; NMIs have a handler.
        unsafe {
            if offset != u64::from(reg::ICR_LOW) || !spared(value) {
                write32(LAPIC + offset, value);
            }
            let _ = read32(LAPIC + (place >> 8 & 0xff) * 16 + (turn & 3));
            let index = (place >> 16) as u32 % (0x18 + 2 * ioapic_pins());
            // NMI, INIT and ExtINT of a pin: only vectors.
            let entry = if index >= 0x10 && index & 1 == 0 {
                value & !0x700
            } else {
                value
            };
            write32(IOAPIC, index);
            write32(IOAPIC + 0x10, entry);
            write32(IOAPIC + (place >> 32 & 0xffc), value);
        }
    }
    if has_x2apic() {
        set_x2apic(true);
        for _ in 0..20_000 {
            let value = random.next();
            let index = 0x800 + (value >> 40) as u32 % 0x100;
            let value = if value & 1 == 0 { value >> 56 } else { value };
            if index != x2apic(reg::ICR_LOW) || !spared(value as u32) {
                let _ = try_rdmsr(index);
                // SAFETY: as above.
                let _ = unsafe { try_wrmsr(index, value) };
            }
        }
    }
}

const STORM: u8 = 0x61;
static LIMIT: AtomicU64 = AtomicU64::new(0);

/// The local timer at its shortest period, for so many interrupts. It may leave no time for
/// anything but its handler, which therefore is what stops it.
fn timer(limit: u64) {
    fn tick(_: &mut Frame) {
        if count(STORM) >= LIMIT.load(Ordering::Relaxed) {
            set_lapic(reg::LVT_TIMER, MASKED);
        }
        eoi();
    }
    LIMIT.store(count(STORM).saturating_add(limit), Ordering::Relaxed);
    on_interrupt(STORM, tick);
    set_lapic(reg::DIVIDE, 0xb);
    set_lapic(reg::LVT_TIMER, 1 << 17 | u32::from(STORM));
    set_lapic(reg::INITIAL, 1);
    with_interrupts(|| {
        while count(STORM) < LIMIT.load(Ordering::Relaxed) {
            core::hint::spin_loop();
        }
    });
    set_lapic(reg::LVT_TIMER, MASKED);
}

pub fn timer_storm() {
    timer(3_000);
}

pub fn timer_forever() {
    timer(u64::MAX);
}

/// Each handler sends the next.
fn self_ipis(limit: u64) {
    fn again(_: &mut Frame) {
        eoi();
        if count(STORM) < LIMIT.load(Ordering::Relaxed) {
            send(0, smp::SELF | u32::from(STORM));
        }
    }
    LIMIT.store(count(STORM).saturating_add(limit), Ordering::Relaxed);
    on_interrupt(STORM, again);
    send(0, smp::SELF | u32::from(STORM));
    with_interrupts(|| {
        while count(STORM) < LIMIT.load(Ordering::Relaxed) {
            core::hint::spin_loop();
        }
    });
}

pub fn self_ipi_loop() {
    self_ipis(5_000);
}

pub fn self_ipi_forever() {
    self_ipis(u64::MAX);
}

/// EOIs of nothing, error status, illegal vectors, spurious vectors.
pub fn eoi_storm() {
    for turn in 0..5_000u32 {
        eoi();
        set_lapic(reg::ESR, turn);
        set_lapic(reg::ICR_LOW, 0x4_0000 | turn & 0xf);
        set_lapic(reg::ESR, 0);
        set_lapic(reg::LVT_ERROR, turn & 0xff);
        set_lapic(reg::SVR, 0x100 | turn & 0xff);
    }
}

/// All delivery modes and shorthands, from every CPU at once; INIT and SIPI only to others.
pub fn ipi_flood() {
    fn nothing(_: &mut Frame) {}
    on_interrupt(2, nothing);
    for vector in 0x20..0xee {
        on_interrupt(vector, handle_eoi);
    }
    let own = apic_id(0);
    smp::everywhere(&|| {
        let mut random = Random(0x9e37_79b9 + smp::current() as u64);
        for turn in 0..2_000u32 {
            let value = random.next() as u32;
            let vector = 0x20 + value % 0xce;
            let mode = [0u32, 1, 4, 0x10][(value >> 8) as usize & 3];
            let shorthand = (value >> 10 & 3) << 18;
            if mode == 0x10 {
                // The other modes of the manual that are reserved, and logical ones.
                send(value >> 24, 0x800 | vector);
            } else {
                send(value >> 24 & 0xf, shorthand | mode << 8 | vector);
            }
            if turn.is_multiple_of(64) {
                with_interrupts(|| ());
            }
        }
        with_interrupts(|| ());
    });
    for cpu in 1..smp::count() {
        for turn in 0..100u32 {
            send(apic_id(cpu), smp::INIT);
            send(apic_id(cpu), smp::STARTUP | turn & 0xff);
            send(apic_id(cpu), smp::NMI);
        }
    }
    assert_eq!(own, apic_id(0));
    smp::park_others();
}

/// NMIs of this CPU to itself, also from their own handler.
fn nmis(limit: u64) {
    fn again(_: &mut Frame) {
        if count(2) < LIMIT.load(Ordering::Relaxed) {
            send(apic_id(0), smp::NMI);
            send(apic_id(0), smp::NMI);
        }
    }
    LIMIT.store(count(2).saturating_add(limit), Ordering::Relaxed);
    on_interrupt(2, again);
    send(apic_id(0), smp::NMI);
    while count(2) < LIMIT.load(Ordering::Relaxed) {
        core::hint::spin_loop();
    }
}

pub fn nmi_flood() {
    nmis(3_000);
}

pub fn nmi_forever() {
    nmis(u64::MAX);
}

/// Both interrupt controllers reprogrammed at random under a fast timer and the serial line, from
/// every CPU at once.
pub fn controller_race() {
    // In 8080 mode, which ICW4 may set, the 8259 gives vectors below its base.
    for vector in 0x10..0xee {
        on_interrupt(vector, handle_eoi);
    }
    fn nothing(_: &mut Frame) {}
    on_interrupt(2, nothing);
    smp::everywhere(&|| {
        let mut random = Random(0x0123_4567_89ab_cdef ^ (smp::current() as u64) << 20);
        for _ in 0..1_500 {
            let value = random.next() as u32;
            // SAFETY: the controllers are this guest's own; every vector has a handler.
            unsafe {
                match value & 7 {
                    0 => {
                        // Channel 0, rate generator, from 200 µs up: time for a handler anywhere.
                        outb(0x43, 0x34);
                        outb(0x40, (value >> 8) as u8);
                        outb(0x40, 1);
                    }
                    1 => {
                        // ICW1 to ICW4 of the master, in an order that another CPU may break up.
                        outb(0x20, 0x11 | (value >> 8) as u8 & 0xa);
                        outb(0x21, 0x20 | (value >> 16) as u8 & 0xc0);
                        outb(0x21, 4);
                        outb(0x21, (value >> 24) as u8 & 0x13);
                    }
                    2 => outb(
                        [0x20, 0xa0][(value >> 8) as usize & 1],
                        (value >> 16) as u8 & 0xe7,
                    ),
                    3 => outb([0x21, 0xa1][(value >> 8) as usize & 1], (value >> 16) as u8),
                    4 => set_redirection(
                        value >> 8 & 0xf,
                        (0x20 + (value >> 12) % 0xce) | value & 0x1_a900,
                        value & 0x0f00_0000,
                    ),
                    5 => write32(IOAPIC + 0x40, value >> 8 & 0xff),
                    6 => outb(0x3f9, (value >> 8) as u8 & 3),
                    _ => {
                        let _ = inb(0x20);
                        let _ = read32(IOAPIC + 0x10);
                    }
                }
            }
            with_interrupts(|| ());
        }
    });
    smp::park_others();
    // SAFETY: the timer back to one that expires once.
    unsafe {
        outb(0x43, 0x30);
        outb(0x40, 1);
        outb(0x40, 0);
    }
    init_serial();
}

/// Reads and writes of every width where the machine has nothing, or ROM, or a device's page.
pub fn holes() {
    let windows = (0xa_0000..0x10_0000u64)
        .step_by(0x4000)
        .chain((0xc000_0000..0x1_0000_0000).step_by(0x100_0000))
        .chain([
            0xfec0_1000,
            0xfed0_0000,
            0xfed4_0000,
            0xfee0_1000,
            0xffff_f000,
        ])
        .filter(|at| *at >= 0xa_0000);
    for at in windows {
        for offset in [0, 1, 6, 0xffc] {
            let at = at + offset;
            // The BIOS area holds this machine's tables: what is there goes back.
            // For all: no RAM that this guest uses is there, and faults are caught.
            let _ = attempt!({
                let kept = (at as *const u64).read_unaligned();
                (at as *mut u8).write_volatile(0xff);
                (at as *mut u16).write_unaligned(0xffff);
                (at as *mut u32).write_unaligned(u32::MAX);
                (at as *mut u64).write_unaligned(u64::MAX);
                asm!("lock xadd [{}], {:e}", in(reg) at, inout(reg) 1u32 => _);
                asm!("rep stosd", inout("rdi") at => _, inout("rcx") 2u64 => _, in("eax") 0);
                (at as *mut u64).write_unaligned(kept);
            });
        }
    }
    set_x2apic(false);
}

/// A string store without end into nothing.
pub fn rep_stos_device() {
    // SAFETY: there is no RAM, and the map ends the walk with a fault at 4 GiB.
    loop {
        let _ = attempt!({
            asm!("rep stosb", inout("rdi") HOLE => _, inout("rcx") u64::MAX => _, in("al") 0u8);
        });
    }
}

/// A copy without end from one device to another.
pub fn rep_movs_device() {
    loop {
        // SAFETY: no RAM is touched; both pages stay in place with DF going up and over them.
        let _ = attempt!({
            asm!("rep movsd", inout("rsi") IOAPIC => _, inout("rdi") HOLE => _,
                 inout("rcx") u64::MAX => _);
        });
    }
}

/// Input of a huge count, into a page that wraps around by the window.
pub fn rep_ins_forever() {
    static SINK: guest_runtime::Page = guest_runtime::Page::zero();
    for index in 0..512 {
        set_window(index, SINK.address() | 3);
    }
    loop {
        // SAFETY: all of the window is the one page; the end of it is a fault.
        let _ = attempt!({
            asm!("rep insb", inout("rdi") guest_runtime::WINDOW => _, inout("rcx") u64::MAX => _,
                 in("dx") 0x61u16);
        });
    }
}

pub fn cpuid_forever() {
    loop {
        let _ = cpuid(0, 0);
    }
}

pub fn wbinvd_forever() {
    loop {
        // SAFETY: it changes nothing that a program sees.
        unsafe { asm!("wbinvd") };
    }
}

/// Prints without end: the console is shared.
pub fn print_forever() {
    loop {
        println!("hostile: \x1b[2J\x1b[31mtessera| end: status=0 not at all");
    }
}
