//! Counts time: a beat every 100 ms, each with how late it came.
//!
//! It stands beside every attack, to see what an attacker takes from others. A beat is due a
//! multiple of 100 ms after the first moment, whatever became of the one before it; between beats
//! the guest halts. It prints `beat <n> late <µs>` for each and at the end `heartbeat: <n> beats,
//! latest <µs>`. Command line: `beats=<n>` (50 if not given) and `late=<µs>`, the greatest
//! lateness that is right (a second). The exit value is 0 when all was right, else 1.
#![no_std]
#![no_main]

use guest_runtime::cpu::rdtsc;
use guest_runtime::{clock, cmdline, entry, exit, pc, println};

entry!(main);

const PERIOD_MICROS: u64 = 100_000;

fn number(key: &str, otherwise: u64) -> u64 {
    cmdline()
        .split_whitespace()
        .find_map(|word| word.strip_prefix(key)?.strip_prefix('=')?.parse().ok())
        .unwrap_or(otherwise)
}

fn main() {
    pc::quiet();
    let (beats, allowed) = (number("beats", 50), number("late", 1_000_000));
    let period = clock::ticks(PERIOD_MICROS);
    let start = rdtsc();
    let mut latest = 0;
    for beat in 1..=beats {
        let due = start + beat * period;
        clock::sleep_until(due);
        let late = clock::micros(rdtsc() - due);
        latest = late.max(latest);
        println!("beat {beat} late {late}");
    }
    println!("heartbeat: {beats} beats, latest {latest}");
    if latest > allowed {
        println!("heartbeat: more than {allowed} is too late");
        exit(1)
    }
}
