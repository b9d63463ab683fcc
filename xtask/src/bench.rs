//! `cargo xtask bench`: what Tessera costs, in instructions and bytes that repeat.
//!
//! In Bochs with one processor, and in QEMU with `-icount shift=0`, RDTSC counts retired
//! instructions, so a guest measures what an exit costs: in, handling, and back. Beside each
//! figure stand the mark (what KVM 6.1 takes on the same emulator with mitigations off) and the
//! ratio; no figure may be above a third of the mark, and a sixth is the goal.
//!
//! The guest prints `bench <case> <value> <unit>`, the hypervisor `tessera| bench <name> <value>
//! <unit>`.

mod guests;
mod sched;
mod switch;

use std::fmt::Write;

use anyhow::{Context, Result, bail};
use harness::Emulator;

use crate::factory::Factory;
use crate::progress::{note, step};
use crate::select::On;
use guests::Bench;

/// The benches, with what they measure.
pub const NAMES: [(&str, &str); 7] = [
    (
        "exits",
        "instructions per exit, by kind; bytes and instructions of the hypervisor itself",
    ),
    (
        "smp",
        "what two vCPUs cost each other: interrupts, wake-ups, switches",
    ),
    (
        "share",
        "how four guests share a core, against their weights",
    ),
    (
        "boot",
        "the hypervisor's start by cores, the memory of VMs by vCPUs",
    ),
    (
        "sched",
        "what a scheduler's decision costs, how well it shares, how soon who is woken runs",
    ),
    (
        "network",
        "exits and instructions per frame between two guests",
    ),
    (
        "switch",
        "frames a second and instructions per frame through the switch, beside Linux and Open vSwitch",
    ),
];

/// What an operation costs elsewhere, and the goal where it is not a sixth of that.
struct Mark {
    case: &'static str,
    /// KVM's VT-x on Bochs, then its AMD-V on QEMU.
    kvm: [Option<u64>; 2],
    /// The goal on VT-x.
    goal: Option<u64>,
}

const fn mark(case: &'static str, vtx: u64, svm: u64, goal: Option<u64>) -> Mark {
    Mark {
        case,
        kvm: [Some(vtx), Some(svm)],
        goal,
    }
}

/// The lower end of each range that was measured. `lapic-mmio` is KVM's for a write;
/// `device-…` are answered in user space there.
const MARKS: [Mark; 12] = [
    mark("cpuid", 980, 2_380, Some(120)),
    mark("hypercall", 970, 2_510, Some(120)),
    mark("rdmsr", 1_095, 2_450, Some(150)),
    mark("wrmsr", 1_045, 2_470, Some(150)),
    mark("port-in", 1_263, 1_455, Some(180)),
    mark("port-out", 1_273, 1_462, Some(180)),
    mark("lapic-mmio", 3_900, 3_260, Some(500)),
    mark("lapic-mmio-read", 6_470, 3_560, Some(500)),
    mark("device-port", 3_010, 2_940, None),
    mark("device-mmio", 5_750, 5_320, None),
    Mark {
        case: "hlt-wake",
        kvm: [None, None],
        goal: None,
    },
    mark("nested-fault", 6_660, 10_090, Some(1_500)),
];

/// One figure.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Figure {
    case: String,
    value: u64,
    unit: String,
    /// The guest whose line bore its name; else empty.
    by: String,
}

impl Figure {
    fn new(case: &str, value: u64, unit: &str) -> Self {
        Self {
            case: case.to_owned(),
            value,
            unit: unit.to_owned(),
            by: String::new(),
        }
    }
}

/// The figures among the lines of a console: the guest's and the hypervisor's.
fn figures(console: &str) -> Vec<Figure> {
    let mut found = Vec::new();
    for line in console.lines() {
        let (by, line) = line.split_once("| ").unwrap_or(("", line));
        let Some(rest) = line.strip_prefix("bench ") else {
            continue;
        };
        let mut words = rest.split_whitespace();
        let (Some(case), Some(value), unit) = (words.next(), words.next(), words.next()) else {
            continue;
        };
        let Ok(value) = value.parse() else { continue };
        found.push(Figure {
            by: by.to_owned(),
            ..Figure::new(case, value, unit.unwrap_or("instructions"))
        });
    }
    found
}

/// What is asked for.
pub struct Request<'a> {
    /// A bench of [`NAMES`]; all when `None`.
    pub name: Option<&'a str>,
    /// The emulators; by default those that count instructions.
    pub on: Option<On>,
    /// One JSON object a line in place of tables.
    pub json: bool,
}

/// Measures and prints. True when no figure is above a third of its mark.
pub fn bench(factory: &Factory, request: &Request) -> Result<bool> {
    if let Some(name) = request.name
        && !NAMES.iter().any(|(n, _)| *n == name)
    {
        let known: Vec<String> = NAMES
            .iter()
            .map(|(n, what)| format!("{n} ({what})"))
            .collect();
        bail!("no bench is called `{name}`; known: {}", known.join(", "));
    }
    let mut good = true;
    if request.name.is_none_or(|name| name == "sched") {
        let (figures, within) = step("bench sched on this host", |_| Ok(sched::measure()))?;
        good &= within;
        print!("{}", sched_text(&figures, request.json));
    }
    if request.name.is_none_or(|name| name == "switch") {
        let report = switch::measure(factory.workspace())?;
        good &= report.good;
        if request.json {
            print!("{}", json("switch", "host", &report.figures));
            report.notes.iter().for_each(|text| note(text));
        } else {
            print!("{}", report.text());
        }
    }
    if matches!(request.name, Some("sched" | "switch")) {
        return Ok(good);
    }
    let emulators = match request.on {
        None => vec![Emulator::Bochs, Emulator::QemuTcg],
        Some(On::Bochs) => vec![Emulator::Bochs],
        Some(On::QemuTcg | On::Auto) => vec![Emulator::QemuTcg],
        Some(On::QemuKvm) => {
            bail!("instructions are counted in Bochs and in QEMU's own emulation, not under KVM")
        }
    };
    let guest = factory
        .file("guest-bench")?
        .context("nothing makes guest-bench")?;
    for on in emulators {
        let bench = Bench {
            factory,
            on,
            guest: &guest,
        };
        for (name, _) in NAMES {
            if request.name.is_some_and(|asked| asked != name) {
                continue;
            }
            let all = match name {
                "exits" => bench.exits()?,
                "smp" => bench.smp()?,
                "share" => bench.share()?,
                "boot" => bench.boot()?,
                "network" => bench.network()?,
                _ => continue,
            };
            good &= all.iter().all(|f| within(on, f) != Some(false));
            let text = if request.json {
                json(name, on.name(), &all)
            } else {
                table(name, on, &all)
            };
            print!("{text}");
            let missing = MARKS
                .iter()
                .filter(|m| !all.iter().any(|f| f.case == m.case));
            for missing in missing.filter(|_| name == "exits") {
                note(&format!("the guest measured no {} on {on}", missing.case));
                good = false;
            }
        }
    }
    Ok(good)
}

/// Exits of both guests for a thousand frames: the unit, and how many they may be.
const PER_FRAMES: &str = "exits/1000 frames";
const FRAME_EXITS: u64 = 50;

/// The mark of a figure on an emulator, and the goal.
fn limits(emulator: Emulator, figure: &Figure) -> (Option<u64>, Option<u64>) {
    let mark = MARKS
        .iter()
        .find(|m| m.case == figure.case && figure.unit == "instructions");
    let Some(mark) = mark else {
        let of_frames = figure.unit == PER_FRAMES;
        return (None, of_frames.then_some(FRAME_EXITS));
    };
    let [vtx, svm] = mark.kvm;
    let kvm = if emulator == Emulator::Bochs {
        vtx
    } else {
        svm
    };
    let sixth = kvm.map(|k| k / 6);
    (
        kvm,
        if emulator == Emulator::Bochs {
            mark.goal.or(sixth)
        } else {
            sixth
        },
    )
}

/// Whether a figure is at most a third of its mark, or keeps the mark of its own.
fn within(emulator: Emulator, figure: &Figure) -> Option<bool> {
    if figure.unit == PER_FRAMES {
        return Some(figure.value <= FRAME_EXITS);
    }
    let (kvm, _) = limits(emulator, figure);
    kvm.map(|k| figure.value * 3 <= k)
}

fn settings(emulator: Emulator) -> &'static str {
    match emulator {
        Emulator::Bochs => "Bochs, corei7_skylake_x, sync=none",
        _ => "QEMU TCG, max, one processor, -icount shift=0,sleep=off",
    }
}

fn table(name: &str, emulator: Emulator, figures: &[Figure]) -> String {
    let mut out = format!(
        "\n{name} on {emulator} with {}: {}\n",
        emulator.extension(),
        settings(emulator)
    );
    let _ = writeln!(
        out,
        "{:24} {:>10} {:14} {:>8} {:>7} {:>8}",
        "case", "value", "unit", "KVM", "ratio", "goal"
    );
    for figure in figures {
        let (kvm, goal) = limits(emulator, figure);
        let dash = |n: Option<u64>| n.map_or("-".to_owned(), |n| n.to_string());
        let ratio = kvm.map_or("-".to_owned(), |k| {
            format!("1/{:.1}", k as f64 / figure.value.max(1) as f64)
        });
        let verdict = match (within(emulator, figure), goal) {
            (Some(false), _) if figure.unit == PER_FRAMES => "ABOVE",
            (Some(false), _) => "ABOVE A THIRD",
            (_, Some(goal)) if figure.value <= goal => "goal",
            _ => "",
        };
        let _ = writeln!(
            out,
            "{:24} {:>10} {:14} {:>8} {:>7} {:>8}  {verdict}",
            figure.case,
            figure.value,
            figure.unit,
            dash(kvm),
            ratio,
            dash(goal)
        );
    }
    out
}

fn sched_text(figures: &[Figure], as_json: bool) -> String {
    if as_json {
        return json("sched", "host", figures);
    }
    let mut out = "\nsched on this host: a machine of virtual time\n".to_owned();
    for Figure {
        case, value, unit, ..
    } in figures
    {
        let _ = writeln!(out, "{case:24} {value:>10} {unit}");
    }
    out
}

fn json(bench: &str, on: &str, figures: &[Figure]) -> String {
    let mut out = String::new();
    for Figure {
        case, value, unit, ..
    } in figures
    {
        // Names come from programs of ours, but a quote must not break the line.
        let plain = |s: &str| s.replace(['"', '\\'], "_");
        let _ = writeln!(
            out,
            r#"{{"bench":"{bench}","case":"{}","on":"{on}","value":{value},"unit":"{}"}}"#,
            plain(case),
            plain(unit)
        );
    }
    out
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    const SAID: &str = "tessera| bench memory 1048576 bytes\nbench cpuid 120 instructions\nbench x y\n\
                        bench device-mmio 2000 instructions\nbenchmark\nbench cpuid-vmreads 5 vmreads\n";

    #[test]
    fn figures_come_from_the_guest_and_the_hypervisor() {
        let found: Vec<(String, u64)> = figures(SAID)
            .into_iter()
            .map(|f| (f.case, f.value))
            .collect();
        let name = str::to_owned;
        let right = [
            ("memory", 1_048_576),
            ("cpuid", 120),
            ("device-mmio", 2000),
            ("cpuid-vmreads", 5),
        ];
        assert_eq!(found, right.map(|(n, v)| (name(n), v)));
    }

    #[test]
    fn a_figure_is_held_against_its_mark() {
        let all = figures(SAID);
        let verdicts: BTreeMap<&str, Option<bool>> = all
            .iter()
            .map(|f| (f.case.as_str(), within(Emulator::Bochs, f)))
            .collect();
        assert_eq!(verdicts.get("cpuid"), Some(&Some(true)));
        assert_eq!(verdicts.get("device-mmio"), Some(&Some(false)));
        assert_eq!(verdicts.get("memory"), Some(&None));
        let line =
            r#"{"bench":"exits","case":"cpuid","on":"bochs","value":120,"unit":"instructions"}"#;
        assert!(json("exits", "bochs", &all).lines().any(|l| l == line));
    }
}
