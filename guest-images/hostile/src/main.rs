//! Misbehaves in the ways named on the command line, to see that nothing but this VM ends by it.
//!
//! The words of the command line are attacks, made one after the other; `after=<ms>` lets the first
//! wait, and `at=<n>` is for [`fault`]. Prints `hostile: <name>` before each. What a virtual machine
//! must bear prints `hostile: survived <name>` after it, and when all did, the guest leaves by value
//! 0. What must end it, or goes on for ever, says nothing more.
#![no_std]
#![no_main]

/// Runs a block in which a fault may come, and gives the fault.
macro_rules! attempt {
    ($body:block) => {
        guest_runtime::expect_fault(|| {
            // SAFETY: a fault is caught. What goes through changes no memory but the attack's own
            // and no register that this guest stands on, or is put back behind the attempt.
            let _: () = unsafe { $body };
        })
    };
}

mod console;
mod devices;
mod fault;
mod memory;
mod modes;
mod rings;
mod state;

use core::arch::asm;
use guest_runtime::cpu::{outb, outw, rdtsc};
use guest_runtime::pc::quiet;
use guest_runtime::{clock, cmdline, entry, exit, println};

entry!(main);

/// In the PCI window, where no device is.
const HOLE: u64 = 0xd000_0000;
const EFER: u32 = 0xc000_0080;

/// What is to become of the virtual machine.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Fate {
    /// It goes on, and can do the next attack.
    Survives,
    /// It is over: crashed with a cause, or ended as it asked.
    Ends,
    /// It goes on with the attack until somebody stops it.
    Endless,
    /// Any of these, by the CPU or by luck.
    Any,
}

use Fate::{Any, Endless, Ends, Survives};

/// Each name, what it does, and the outcome.
const WAYS: &[(&str, fn(), Fate)] = &[
    ("triple-fault", triple_fault, Ends),
    ("triple-real", modes::triple_real, Ends),
    ("triple-protected", modes::triple_protected, Ends),
    ("triple-paging", modes::triple_paging, Ends),
    ("triple-pae", modes::triple_pae, Ends),
    ("triple-compatibility", modes::triple_compatible, Ends),
    ("triple-v86", modes::triple_v86, Ends),
    ("bad-pdpte", modes::bad_pdpte, Ends),
    ("task-jmp", modes::task_jmp, Any),
    ("task-gate", modes::task_gate, Any),
    ("task-iret", modes::task_iret, Any),
    ("virt-modes", modes::virt_modes, Survives),
    ("ac-loop", modes::ac_loop, Endless),
    ("noncanonical-stack", state::noncanonical_stack, Ends),
    ("idt-in-device", state::idt_in_device, Ends),
    ("gdt-in-device", state::gdt_in_device, Any),
    ("without-pe", state::without_pe, Any),
    ("without-pg", state::without_pg, Any),
    ("without-pae", state::without_pae, Any),
    ("reserved-bits", state::reserved_bits, Any),
    ("cr-bits", state::cr_bits, Survives),
    ("msr-storm", devices::msr_storm, Survives),
    ("msr-random", state::msr_random, Survives),
    ("exotic", state::exotic, Survives),
    ("debug-shadow", state::debug_shadow, Survives),
    ("cache-control", state::cache_control, Survives),
    ("hypercall-flood", state::hypercall_flood, Survives),
    ("pause-flood", state::pause_flood, Survives),
    ("random-code", state::random_code, Any),
    ("unmapped-jump", memory::unmapped_jump, Ends),
    ("fetch-lapic", memory::fetch_lapic, Ends),
    ("fetch-ioapic", memory::fetch_ioapic, Ends),
    ("fetch-ecam", memory::fetch_ecam, Ends),
    ("cross-into-device", memory::cross_into_device, Ends),
    ("cross-into-nothing", memory::cross_into_nothing, Ends),
    ("cross-in-ram", memory::cross_in_ram, Survives),
    ("straddle-data", memory::straddle_data, Survives),
    ("code-swapped", memory::code_swapped, Any),
    ("code-to-device", memory::code_to_device, Ends),
    ("code-races", memory::code_races, Survives),
    ("undecodable-mmio", memory::undecodable_mmio, Ends),
    ("undecodable-sse", memory::undecodable_sse, Ends),
    ("mmio-page-tables", memory::mmio_page_tables, Ends),
    ("mmio-stack", memory::mmio_stack, Ends),
    ("tables-at-the-end", memory::tables_at_the_end, Survives),
    ("tables-beyond-the-end", memory::tables_beyond_the_end, Ends),
    ("port-storm", devices::port_storm, Survives),
    ("cpuid-storm", devices::cpuid_storm, Survives),
    ("io-all-ports", devices::io_all_ports, Survives),
    ("wrap", devices::wrap, Survives),
    ("holes", devices::holes, Survives),
    ("apic-chaos", devices::apic_chaos, Survives),
    ("timer-storm", devices::timer_storm, Survives),
    ("self-ipi-loop", devices::self_ipi_loop, Survives),
    ("eoi-storm", devices::eoi_storm, Survives),
    ("ipi-flood", devices::ipi_flood, Survives),
    ("nmi-flood", devices::nmi_flood, Survives),
    ("controller-race", devices::controller_race, Survives),
    ("db-loop", devices::db_loop, Endless),
    ("timer-forever", devices::timer_forever, Endless),
    ("self-ipi-forever", devices::self_ipi_forever, Endless),
    ("nmi-forever", devices::nmi_forever, Endless),
    ("rep-outs-forever", devices::rep_outs_forever, Endless),
    ("rep-ins-forever", devices::rep_ins_forever, Endless),
    ("rep-stos-device", devices::rep_stos_device, Endless),
    ("rep-movs-device", devices::rep_movs_device, Endless),
    ("cpuid-forever", devices::cpuid_forever, Endless),
    ("wbinvd-forever", devices::wbinvd_forever, Endless),
    ("print-forever", devices::print_forever, Endless),
    ("spin", spin, Endless),
    ("cli-hlt", cli_hlt, Ends),
    ("fault", fault::here, Ends),
    ("fault-beside", fault::beside, Ends),
    ("ring-loops", rings::ring_loops, Survives),
    ("ring-indirect", rings::ring_indirect, Survives),
    ("ring-buffers", rings::ring_buffers, Survives),
    ("ring-places", rings::ring_places, Survives),
    ("ring-ahead", rings::ring_ahead, Survives),
    ("ring-races", rings::ring_races, Survives),
    ("ring-registers", rings::ring_registers, Survives),
    ("ring-window", rings::ring_window, Survives),
    ("ring-storm", rings::ring_storm, Survives),
    ("ring-resets", rings::ring_resets, Survives),
    ("ring-master", rings::ring_master, Survives),
    ("ring-messages", rings::ring_messages, Survives),
    ("net-lengths", rings::net_lengths, Survives),
    ("net-headers", rings::net_headers, Survives),
    ("net-control", rings::net_control, Survives),
    ("net-flood", rings::net_flood, Endless),
    ("console", console::talk, Survives),
    ("exit", exit_with, Ends),
    ("poweroff", power_off, Ends),
    ("reset", reset, Ends),
];

fn main() {
    quiet();
    for word in cmdline().split_whitespace() {
        if let Some(millis) = word
            .strip_prefix("after=")
            .and_then(|text| text.parse().ok())
        {
            let millis: u64 = millis;
            clock::sleep_until(rdtsc() + clock::ticks(millis * 1000));
            quiet();
            continue;
        }
        if word.starts_with("at=") {
            continue;
        }
        println!("hostile: {word}");
        let Some((_, way, fate)) = WAYS.iter().find(|way| way.0 == word) else {
            println!("hostile: no such way; there are:");
            for (name, ..) in WAYS {
                println!("  {name}");
            }
            exit(2)
        };
        way();
        quiet();
        if !matches!(fate, Survives | Any) {
            println!("hostile: still here");
            exit(3)
        }
        println!("hostile: survived {word}");
    }
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

/// No IDT, so an exception cannot be delivered, nor can the fault of that, nor the double fault.
fn triple_fault() {
    let none = [0u16; 5];
    // SAFETY: the end of this guest is what is wanted.
    unsafe { asm!("lidt [{}]", "ud2", in(reg) &none) };
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
