//! Misbehaves in one way, named by the first word of the command line, to see that nothing but
//! this VM ends by it.
//!
//! Prints `hostile: <name>` first. What a virtual machine must bear prints `hostile: survived` and
//! leaves by value 0; what must end it, or goes on for ever, says nothing more.
#![no_std]
#![no_main]

use core::arch::asm;
use guest_runtime::cpu::{
    cpuid, inb, inl, inw, outb, outl, outw, read32, set_cr3, set_dr0, set_dr7, try_rdmsr,
    try_wrmsr, write32,
};
use guest_runtime::pc::{
    APIC_BASE, IOAPIC, LAPIC, has_x2apic, ioapic_pins, quiet, reg, set_x2apic, x2apic,
};
use guest_runtime::{
    Frame, PAGE, cmdline, entry, exit, expect_fault, init_serial, on_interrupt, println, set_gate,
    set_window,
};

entry!(main);

/// In the PCI window, where no device is.
const HOLE: u64 = 0xd000_0000;
const EFER: u32 = 0xc000_0080;

/// Each name, what it does, and whether the VM is to survive it.
const WAYS: &[(&str, fn(), bool)] = &[
    ("triple-fault", triple_fault, false),
    ("unmapped-jump", unmapped_jump, false),
    ("undecodable-mmio", undecodable_mmio, false),
    ("undecodable-sse", undecodable_sse, false),
    ("mmio-page-tables", mmio_page_tables, false),
    ("mmio-stack", mmio_stack, false),
    ("port-storm", port_storm, true),
    ("msr-storm", msr_storm, true),
    ("cpuid-storm", cpuid_storm, true),
    ("io-all-ports", io_all_ports, true),
    ("db-loop", db_loop, false),
    ("rep-outs-forever", rep_outs_forever, false),
    ("cli-hlt", cli_hlt, false),
    ("spin", spin, false),
    ("exit", exit_with, false),
    ("poweroff", power_off, false),
    ("reset", reset, false),
    ("wrap", wrap, true),
    ("apic-chaos", apic_chaos, true),
    ("console", console, true),
];

fn main() {
    let name = cmdline().split_whitespace().next().unwrap_or("");
    println!("hostile: {name}");
    let Some((_, way, survives)) = WAYS.iter().find(|way| way.0 == name) else {
        println!("hostile: no such way; there are:");
        for (name, ..) in WAYS {
            println!("  {name}");
        }
        exit(2)
    };
    quiet();
    way();
    if *survives {
        println!("hostile: survived");
        exit(0);
    }
    println!("hostile: still here");
    exit(3)
}

/// No IDT, so an exception cannot be delivered, nor can the fault of that, nor the double fault.
fn triple_fault() {
    let none = [0u16; 5];
    // SAFETY: the end of this guest is what is wanted.
    unsafe { asm!("lidt [{}]", "ud2", in(reg) &none) };
}

fn unmapped_jump() {
    // SAFETY: as above.
    unsafe { asm!("jmp {}", in(reg) HOLE) };
}

/// An x87 load from a device: no compiler emits that for one.
fn undecodable_mmio() {
    // SAFETY: as above.
    unsafe { asm!("fninit", "fld tbyte ptr [{}]", in(reg) LAPIC + u64::from(reg::VERSION)) };
}

fn undecodable_sse() {
    // SAFETY: as above; CR4.OSFXSR is on first.
    unsafe {
        asm!("mov rax, cr4", "or rax, 0x200", "mov cr4, rax", "xorps xmm0, xmm0",
             "paddd xmm0, [{}]", in(reg) LAPIC + u64::from(reg::LVT_TIMER), out("rax") _);
    }
}

/// The next fetch walks page tables that lie where a device is, or nothing.
fn mmio_page_tables() {
    // SAFETY: as above.
    unsafe { set_cr3(HOLE) };
}

/// An exception with the stack in a device.
fn mmio_stack() {
    // SAFETY: as above.
    unsafe { asm!("mov rsp, {}", "ud2", in(reg) LAPIC + 0x400) };
}

fn port_storm() {
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
fn msr_storm() {
    let ranges = [
        0..0x2000,
        0x4000_0000..0x4000_0200,
        0x4b56_4d00..0x4b56_4d10,
        0xc000_0000..0xc000_0400,
        0xc001_0000..0xc001_1100,
        0xffff_fff0..0xffff_ffff,
    ];
    let (mut there, mut faults) = (0u32, 0u32);
    for index in ranges.into_iter().flatten() {
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

/// A small generator of numbers: xorshift.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
}

fn cpuid_storm() {
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

fn io_all_ports() {
    for port in 0..=u16::MAX {
        for width in [1u16, 2, 4] {
            let end = port.saturating_add(width - 1);
            // Every port by bytes, every fifth by words and double words, aligned or not.
            if LEFT_OUT.iter().any(|out| (port..=end).contains(out)) || width > 1 && port % 5 != 0 {
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
fn db_loop() {
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

fn rep_outs_forever() {
    loop {
        // SAFETY: reads the first MiB, over and over.
        unsafe {
            asm!("rep outsb", inout("rsi") 0x20_0000u64 => _, inout("rcx") 0x10_0000u64 => _, in("dx") 0x80u16);
        }
    }
}

fn cli_hlt() {
    loop {
        // SAFETY: the end of this guest is what is wanted.
        unsafe { asm!("cli", "hlt") };
    }
}

fn spin() {
    loop {
        core::hint::spin_loop();
    }
}

fn exit_with() {
    let value = cmdline()
        .split_whitespace()
        .nth(1)
        .and_then(|word| word.parse().ok());
    exit(value.unwrap_or(0))
}

/// S5, whatever its number in SLP_TYP: one of the eight is right.
fn power_off() {
    for kind in 0..8u16 {
        // SAFETY: the end of this guest is what is wanted.
        unsafe { outw(0x604, 1 << 13 | kind << 10) };
    }
}

fn reset() {
    // SAFETY: as above.
    unsafe {
        outb(0xcf9, 2);
        outb(0xcf9, 6);
    }
}

/// Accesses at the ends of the physical address space, and over them.
fn wrap() {
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
fn apic_chaos() {
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

/// Does on its console what is typed there: `l` lines, `e` escapes and lies, `d` the same later,
/// `q` the end. Any other key is told by its number. Says `#` when it listens.
fn console() {
    const DATA: u16 = 0x3f8;
    const STATUS: u16 = 0x3fd;
    const LIES: &str = "\x1b[31;1mred\x1b]0;title\x07 \x1b[?1049h\x1b[5;10r\x0e\u{9b}7m\r\n\
                        tessera| end: status=0 forged\r\n\
                        tes\x1b[1msera| end: status=0 forged\r\n\
                        \x1b]0;no end\r\n\x1b[1;";
    println!("#");
    loop {
        // SAFETY: reading the guest's own serial port harms nobody.
        let key = unsafe {
            while inb(STATUS) & 1 == 0 {}
            inb(DATA)
        };
        match key {
            b'l' => (0..40).for_each(|line| println!("line {line}")),
            b'e' => println!("{LIES}\nlied"),
            b'd' => {
                // Until the keys that followed have been taken.
                for _ in 0..10_000 {
                    // SAFETY: as above.
                    unsafe { inb(STATUS) };
                }
                println!("{LIES}\nlied");
            }
            b'q' => return,
            key => println!("key {key}"),
        }
    }
}
