//! Frames through rings, the switch and rings again, on one core of the host.
//!
//! `tessera-switch-bench path` measures time, `count CASE FRAMES` does as much of a case as a
//! counter of instructions can follow, `rivals` measures what else moves frames on this machine.
//! What is found is printed as `bench <case> <value> <unit>`.
#![forbid(unsafe_code)]

mod rivals;
mod world;

use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;
use world::{Traffic, World, flows};

/// How long each figure is measured.
const TIME: Duration = Duration::from_millis(400);
/// Turns; the best counts: others use the machine as well.
const TURNS: usize = 5;
/// Frames of a batch, as the hypervisor takes them.
const BATCH: u64 = relay::BATCH as u64;

/// A case: its name, ports, bytes of a frame, flows, and what is sent.
struct Case {
    name: &'static str,
    ports: u16,
    length: usize,
    flows: u32,
    traffic: Kind,
}

/// What is sent.
#[derive(Clone, Copy)]
enum Kind {
    /// Each guest to the next.
    Round(Traffic),
    /// A victim beside such a neighbour: its own frames are measured.
    Beside(Traffic),
}

const fn case(
    name: &'static str,
    (ports, length): (u16, usize),
    flows: u32,
    traffic: Kind,
) -> Case {
    Case {
        name,
        ports,
        length,
        flows,
        traffic,
    }
}

const SAME: Kind = Kind::Round(Traffic::Same);
const SPRAY: Kind = Kind::Round(Traffic::Spray);

const CASES: [Case; 13] = [
    case("ports-2-64", (2, 64), 1, SAME),
    case("ports-16-64", (16, 64), 1, SAME),
    case("ports-1024-64", (1024, 64), 1, SAME),
    case("ports-2-1500", (2, 1500), 1, SAME),
    case("ports-16-1500", (16, 1500), 1, SAME),
    case("ports-1024-1500", (1024, 1500), 1, SAME),
    case(
        "flows-1000-hit",
        (2, 64),
        1_000,
        Kind::Round(Traffic::Flows(256)),
    ),
    case(
        "flows-100000-hit",
        (2, 64),
        100_000,
        Kind::Round(Traffic::Flows(256)),
    ),
    case("flows-1-miss", (2, 64), 1, SPRAY),
    case("flows-1000-miss", (2, 64), 1_000, SPRAY),
    case("flows-100000-miss", (2, 64), 100_000, SPRAY),
    case("beside-quiet", (4, 64), 1_000, Kind::Beside(Traffic::Same)),
    case("beside-spray", (4, 64), 1_000, Kind::Beside(Traffic::Spray)),
];

impl Case {
    fn world(&self) -> Result<World> {
        let flows = match self.flows {
            1 => Vec::new(),
            count => flows(count),
        };
        let mut world = World::new(self.ports, self.length, flows)?;
        world.check().context(self.name)?;
        Ok(world)
    }

    fn run(&self, world: &mut World, frames: u64) -> (u64, Duration) {
        let batches = frames.div_ceil(BATCH);
        match self.traffic {
            Kind::Round(traffic) => world.run(traffic, batches),
            Kind::Beside(other) => world.beside(other, batches),
        }
    }
}

/// Frames a second of the core, in the best turn.
fn path() -> Result<()> {
    for case in CASES {
        let mut world = case.world()?;
        let mut frames = 16 * 1024;
        // As many as fill the time.
        loop {
            let (_, took) = case.run(&mut world, frames);
            if took * 2 >= TIME {
                break;
            }
            frames *= 2;
        }
        let mut best = 0.0;
        for _ in 0..TURNS {
            let (arrived, took) = case.run(&mut world, frames);
            if arrived != frames {
                bail!("{}: of {frames} frames {arrived} arrived", case.name);
            }
            best = f64::max(best, arrived as f64 / took.as_secs_f64());
        }
        println!("bench {} {} frames/s", case.name, best as u64);
    }
    Ok(())
}

/// Does a part of a case, for a counter of instructions.
fn count(name: &str, frames: u64) -> Result<()> {
    let case = CASES.iter().find(|case| case.name == name);
    let case = case.with_context(|| format!("no case is called {name}"))?;
    let mut world = case.world()?;
    let (arrived, _) = case.run(&mut world, frames);
    println!("bench {name} {arrived} frames");
    Ok(())
}

fn main() -> Result<()> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    // One core, the same for all.
    let mut one = CpuSet::new();
    one.set(0)?;
    let _ = sched_setaffinity(Pid::from_raw(0), &one);
    match words[..] {
        ["path"] => path(),
        ["cases"] => {
            CASES.iter().for_each(|case| println!("{}", case.name));
            Ok(())
        }
        ["count", name, frames] => count(name, frames.parse()?),
        ["rivals", scratch] => {
            rivals::measure(scratch.as_ref());
            Ok(())
        }
        _ => bail!("path, cases, count CASE FRAMES, or rivals FOLDER"),
    }
}
