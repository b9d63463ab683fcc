//! The benches that run guests: which machines, which guests, and what becomes of what they say.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use harness::emulator::Pace;
use harness::{Console, Emulator, Firmware, Machine, Received};

use super::{Figure, PER_FRAMES};
use crate::config::memory_for;
use crate::factory::{Factory, Kernel, bundle_of};
use crate::progress::step;
use crate::select::need_emulator;

/// What a run may take; Bochs needs most of it under load.
const LIMIT: Duration = Duration::from_secs(300);

/// Numbers of cores whose start is measured. Bochs, whose cores run in step, has
/// not 16 of them; QEMU's run freely where there are several, and its TSC counts nanoseconds of the machine under it: those
/// figures show an order of magnitude, and do not repeat.
const CORES: [u32; 5] = [1, 2, 4, 16, 64];
const MOST_IN_STEP: u32 = 4;

/// Numbers of vCPUs whose memory is measured.
const VCPUS: [u32; 3] = [1, 4, 64];

/// When guests that share a core begin and end to count, in milliseconds of their time.
const COUNTED: (u64, u64) = (500, 2500);

/// Frames of each length that are counted, and the entries of the guests' rings.
const FRAMES: u64 = 20_000;
const RING: u16 = 256;

/// The bench's guest in a VM of this name, with this command line and these keys besides.
fn vm(name: &str, cmdline: &str, keys: &str) -> String {
    format!(
        "[[vm]]\nname = \"{name}\"\nkind = \"pvh\"\nkernel = \"guest-bench\"\n\
         cmdline = \"{cmdline}\"\n{keys}\n[vm.devices]\ndebug_exit = true\ndebug_console = true\n"
    )
}

/// Where a bench runs.
pub struct Bench<'a> {
    /// Makes what is needed.
    pub factory: &'a Factory,
    /// The emulator.
    pub on: Emulator,
    /// The guest's program.
    pub guest: &'a [u8],
}

impl Bench<'_> {
    /// What guests and hypervisor say of themselves on a machine with this many cores.
    fn run(&self, what: &str, kernel: Kernel, config: &str, cores: u32) -> Result<Vec<Figure>> {
        need_emulator(self.on, Firmware::Bios)?;
        let bundle = bundle_of(config, &[("guest-bench".to_owned(), self.guest.to_vec())]);
        let dir = self.factory.workspace().dir("bench")?.join(self.on.name());
        fs::create_dir_all(&dir)?;
        let disk = dir.join("disk.img");
        self.factory.image_of(kernel, &bundle, &disk)?;
        let console = step(&format!("bench {what} on {}", self.on), |_| {
            console_of(self.on, config, cores, &disk, &dir)
        })?;
        let found = super::figures(&console);
        if found.is_empty() {
            bail!(
                "no figures on {}; the console's last lines:\n{}",
                self.on,
                {
                    let lines: Vec<&str> = console.lines().collect();
                    let from = lines.len().saturating_sub(20);
                    lines.get(from..).unwrap_or_default().join("\n")
                }
            );
        }
        Ok(found)
    }

    /// What exits cost.
    pub fn exits(&self) -> Result<Vec<Figure>> {
        let config = vm("bench", "", "memory = \"64MiB\"\nlarge_pages = false");
        let mut all = self.run("exits", Kernel::Tessera, &config, 1)?;
        if self.on == Emulator::Bochs {
            // Another kernel, since to count costs instructions of its own.
            let what = "exits, counting VMREADs and VMWRITEs,";
            let counted = self.run(what, Kernel::Counting, &config, 1)?;
            all.extend(counted.into_iter().filter(|f| f.unit.starts_with("vm")));
        }
        let size = u64::try_from(self.factory.tessera()?.len())?;
        all.push(Figure::new("image-size", size, "bytes"));
        Ok(all)
    }

    /// What two vCPUs cost each other: on one core, and where several run in step on two.
    pub fn smp(&self) -> Result<Vec<Figure>> {
        let two = |cmdline| vm("bench", cmdline, "memory = \"32MiB\"\nvcpus = 2");
        let mut all = self.run("smp", Kernel::Tessera, &two("smp"), 1)?;
        if self.on == Emulator::Bochs {
            all.extend(self.run("smp, two cores,", Kernel::Tessera, &two("apart"), 2)?);
        }
        all.retain(|f| f.unit == "instructions");
        Ok(all)
    }

    /// How well four guests share a core by their weights.
    pub fn share(&self) -> Result<Vec<Figure>> {
        let mut all = Vec::new();
        for weights in [[1, 1, 1, 1], [1, 2, 4, 8]] {
            let (from, to) = COUNTED;
            let guest = |w: u64| {
                let keys = format!("memory = \"16MiB\"\nweight = {}", 100 * w);
                (format!("share={from},{to}"), keys)
            };
            let config: String = (0..)
                .zip(weights)
                .map(|(i, w)| vm(&format!("vm{i}"), &guest(w).0, &guest(w).1))
                .collect();
            let name = weights.map(|w| w.to_string()).join(":");
            let found = self.run(&format!("share {name}"), Kernel::Tessera, &config, 1)?;
            // The first one's lines bear no name, since it has the console.
            let turns = |i: usize| {
                let by = if i == 0 {
                    String::new()
                } else {
                    format!("vm{i}")
                };
                let own = |f: &&Figure| f.case == "turns" && f.by == by;
                found.iter().find(own).map(|f| f.value)
            };
            let Some(counts) = (0..weights.len()).map(turns).collect::<Option<Vec<u64>>>() else {
                bail!("not all of the guests counted: {found:?}");
            };
            all.extend(shares(&name, &weights, &counts));
        }
        Ok(all)
    }

    /// What a frame costs that goes from one guest to another through a switch while the sender
    /// has always more.
    pub fn network(&self) -> Result<Vec<Figure>> {
        let card = "[[vm.nic]]\nswitch = \"lan\"\n";
        let guest = |name, cmdline: &str| vm(name, cmdline, "memory = \"16MiB\"") + card;
        let config = format!(
            "[[switch]]\nname = \"lan\"\n{}{}",
            guest("take", &format!("take={FRAMES},{RING}")),
            guest("send", &format!("send={RING}")),
        );
        per_frame(&self.run("network", Kernel::Tessera, &config, 1)?)
    }

    /// What the hypervisor's start and its VMs take.
    pub fn boot(&self) -> Result<Vec<Figure>> {
        let mut all = Vec::new();
        let one = vm("bench", "nothing", "memory = \"16MiB\"");
        for cores in CORES {
            if cores > MOST_IN_STEP && self.on == Emulator::Bochs {
                break;
            }
            let what = format!("boot, cores: {cores},");
            let found = self.run(&what, Kernel::Tessera, &one, cores)?;
            let of_boot = ["cores-up", "boot-to-guest", "hypervisor-heap"];
            for figure in found.iter().filter(|f| of_boot.contains(&&*f.case)) {
                let case = format!("{}-{cores}", figure.case);
                let free = cores > 1 && self.on != Emulator::Bochs && figure.unit == "tsc";
                let unit = if free { "ns-free" } else { &figure.unit };
                all.push(Figure::new(&case, figure.value, unit));
            }
        }
        let config: String = VCPUS
            .iter()
            .map(|n| {
                vm(
                    &format!("vm{n}"),
                    "nothing",
                    &format!("memory = \"16MiB\"\nvcpus = {n}"),
                )
            })
            .collect();
        let found = self.run("memory of VMs", Kernel::Tessera, &config, 1)?;
        // They are made in their order.
        let memory = found.iter().filter(|f| f.case == "vm-memory");
        for (vcpus, figure) in VCPUS.iter().zip(memory) {
            all.push(Figure::new(
                &format!("vm-memory-{vcpus}"),
                figure.value,
                "bytes",
            ));
        }
        Ok(all)
    }
}

/// What two guests counted, for a thousand frames: exits of both by reason, instructions, frames
/// that were lost because the taker had no room.
fn per_frame(found: &[Figure]) -> Result<Vec<Figure>> {
    let count = |case: String| found.iter().find(|f| f.case == case).map(|f| f.value);
    let mut all = Vec::new();
    for length in [64, 1500] {
        let (Some(frames), Some(took), Some(lost)) = (
            count(format!("take-{length}")),
            count(format!("took-{length}")),
            count(format!("lost-{length}")),
        ) else {
            bail!("the guests did not count frames of {length} bytes: {found:?}");
        };
        let each = |count: u64, of: u64| (count * of).div_ceil(frames.max(1));
        let mut put = |what: &str, value, unit| {
            all.push(Figure::new(&format!("{what}-{length}"), value, unit));
        };
        put("frame", each(took, 1), "instructions");
        let ends = [format!("send-{length}-"), format!("take-{length}-")];
        let exits = |f: &&Figure| f.unit == "exits" && ends.iter().any(|e| f.case.starts_with(e));
        let total = found.iter().filter(exits).map(|f| f.value).sum();
        put("lost", each(lost, 1000), "frames/1000 frames");
        put("exits", each(total, 1000), PER_FRAMES);
        for figure in found.iter().filter(exits) {
            let exits = each(figure.value, 1000);
            all.push(Figure::new(&figure.case, exits, "of these"));
        }
    }
    Ok(all)
}

/// Each guest's part of what all counted, and the greatest error against its part of the weights,
/// both in thousandths of the core.
fn shares(name: &str, weights: &[u64], counts: &[u64]) -> Vec<Figure> {
    let per_mille = |part: u64, all: &[u64]| 1000.0 * part as f64 / all.iter().sum::<u64>() as f64;
    let mut all = Vec::new();
    let mut worst = 0.0_f64;
    for (i, (&weight, &count)) in weights.iter().zip(counts).enumerate() {
        let (right, got) = (per_mille(weight, weights), per_mille(count, counts));
        worst = worst.max((got - right).abs());
        let case = format!("share-{name}-vm{i}");
        all.push(Figure::new(&case, got.round() as u64, "per-mille"));
    }
    let case = format!("share-{name}-error");
    all.push(Figure::new(&case, worst.ceil() as u64, "per-mille"));
    all
}

/// Runs the measuring guests to their end.
fn console_of(
    emulator: Emulator,
    config: &str,
    cores: u32,
    disk: &Path,
    dir: &Path,
) -> Result<String> {
    let mut machine = Machine::new(emulator, Firmware::Bios, disk, memory_for(config));
    machine.cpus = cores;
    machine.pace = match emulator {
        Emulator::Bochs => Pace::Counted,
        _ if cores == 1 => Pace::Counted,
        _ => Pace::Free,
    };
    let mut session = machine.start(dir, LIMIT + Duration::from_secs(30))?;
    let deadline = Instant::now() + LIMIT;
    let mut console = Console::default();
    let end = loop {
        match session.receive(deadline) {
            Received::Bytes(bytes) => console.feed(&bytes),
            Received::Input(_) => {}
            Received::Closed | Received::Nothing => break None,
        }
        if let Some(end) = console.end() {
            break Some(end);
        }
    };
    let _ = fs::write(dir.join("console"), console.text());
    match end {
        Some(end) if end.status == 0 => Ok(console.text().to_owned()),
        Some(end) => bail!(
            "ended with status {}: {}\n{}",
            end.status,
            end.reason,
            console.tail(20)
        ),
        None => bail!(
            "did not end within {} s:\n{}",
            LIMIT.as_secs(),
            console.tail(20)
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_are_parts_of_what_all_got() {
        let found: Vec<(String, u64)> = shares("1:3", &[1, 3], &[20, 80])
            .into_iter()
            .map(|f| (f.case, f.value))
            .collect();
        let right = [("vm0", 200), ("vm1", 800), ("error", 50)];
        assert_eq!(found, right.map(|(n, v)| (format!("share-1:3-{n}"), v)));
    }
}
