//! `cargo xtask bench sched`: what the scheduler's decisions cost and how well they share.
//!
//! It runs on the host, on a machine of virtual time, so all but the nanoseconds repeat. A step is
//! a node of a queue that is visited.

use std::time::Instant;

use sched::Policy;
use sched::simulate::{Load, World};

use super::Figure;

const MS: u64 = 1_000_000;
const SECOND: u64 = 1_000 * MS;

/// Decisions for each figure.
const DECISIONS: u64 = 100_000;
/// What is allowed: the error of a VM's share of a second, in millionths, ...
const SHARE_ERROR: u64 = 10_000;
/// ... and what 99 of 100 wake-ups keep below, in nanoseconds.
const LATENCY: u64 = 2 * sched::SLICE;

fn weight(weight: u32) -> Policy {
    Policy {
        weight,
        ..Policy::default()
    }
}

/// All figures, and whether they are within what is allowed.
pub fn measure() -> (Vec<Figure>, bool) {
    let mut figures = Vec::new();
    let mut say = |case: &str, value: u64, unit: &str| {
        figures.push(Figure::new(case, value, unit));
    };
    for vcpus in [10, 100, 1_000, 10_000] {
        let (steps, nanos) = decisions(vcpus);
        say(&format!("decision-{vcpus}"), steps, "millisteps");
        say(&format!("decision-{vcpus}"), nanos, "ns");
    }
    let error = share_error();
    say("share-error", error, "millionths");
    let mut world = many_guests();
    let p99 = world.latency(990);
    say("wake-p50", world.latency(500), "ns of virtual time");
    say("wake-p99", p99, "ns of virtual time");
    say("wake-max", world.latency(1000), "ns of virtual time");
    let per_mille = |part: u64| part * 1_000 / world.decisions;
    say(
        "migrations",
        per_mille(world.migrations()),
        "in 1000 decisions",
    );
    let busy = world.busy() * 1_000 / (64 * world.now);
    say("busy", busy, "in 1000 of the cores");
    (figures, error < SHARE_ERROR && p99 <= LATENCY)
}

/// What a decision costs while so many vCPUs want four cores: thousandths of steps, and
/// nanoseconds with the simulated machine's own.
fn decisions(vcpus: u16) -> (u64, u64) {
    let mut world = World::new(4);
    world.check_every = u64::MAX;
    for vm in 0..vcpus / 10 {
        world.add(vm, &weight(100 + u32::from(vm) % 300), &[Load::Busy; 10]);
    }
    world.run(10 * MS);
    let steps = world.scheduler.steps();
    let begun = Instant::now();
    world.decide(DECISIONS);
    let nanos = u64::try_from(begun.elapsed().as_nanos()).unwrap_or(u64::MAX);
    let steps = world.scheduler.steps() - steps;
    (steps * 1_000 / DECISIONS, nanos / DECISIONS)
}

/// The greatest error of 32 VMs of 64 vCPUs on 64 cores in ten seconds, each for itself, in
/// millionths of what is due.
fn share_error() -> u64 {
    let mut world = World::new(64);
    world.check_every = u64::MAX;
    let weight_of = |vm: u16| 100 * (1 + u32::from(vm) % 2);
    for vm in 0..32 {
        world.add(vm, &weight(weight_of(vm)), &[Load::Busy; 64]);
    }
    world.run(SECOND / 2);
    let mut greatest = 0;
    for _ in 0..10 {
        let before: Vec<u64> = (0..32).map(|vm| world.used(vm)).collect();
        world.run(SECOND);
        for (vm, before) in (0..32).zip(before) {
            let due = 64 * SECOND * u64::from(weight_of(vm)) / 4_800;
            let got = world.used(vm) - before;
            greatest = greatest.max(got.abs_diff(due) * 1_000_000 / due);
        }
    }
    greatest
}

/// A million decisions for 4096 vCPUs on 64 cores, of which a quarter never sleep.
fn many_guests() -> World {
    let loads = [
        Load::Busy,
        Load::Sleeps(200_000, 20 * MS),
        Load::Woken(50_000, 5 * MS),
        Load::Woken(MS, 50 * MS),
    ];
    let loads: Vec<Load> = loads.into_iter().cycle().take(16).collect();
    let mut world = World::new(64);
    world.check_every = u64::MAX;
    for vm in 0..256 {
        world.add(vm, &Policy::default(), &loads);
    }
    world.run(SECOND / 10);
    world.latencies.clear();
    world.decide(1_000_000);
    world
}
