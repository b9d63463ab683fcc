//! How much of a core a guest gets beside others: turns of a loop in a stretch of its time.

use core::arch::asm;
use guest_runtime::cpu::rdtsc;
use guest_runtime::{clock, println};

/// Turns between two looks at the time.
const TURNS: u64 = 2_000;

/// Works until the TSC reads `end`; how much.
fn work(end: u64) -> u64 {
    let mut done = 0;
    while rdtsc() < end {
        // SAFETY: counts down a register.
        unsafe { asm!("2: dec {turn}", "jnz 2b", turn = inout(reg) TURNS => _) };
        done += 1;
    }
    done
}

/// Counts from `from` to `to` milliseconds of the guest's time; works before and after that as
/// well, so that all guests of a bench want the core while any of them counts.
pub fn count(from: u64, to: u64) {
    let at = |ms: u64| clock::ticks(1_000 * ms);
    work(at(from));
    let done = work(at(to));
    work(at(to + from));
    println!("bench turns {done} turns");
}
