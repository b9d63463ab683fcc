//! `cargo xtask test`: lint, host tests, and the emulator cases, in named groups.

use std::collections::VecDeque;
use std::fs;
use std::path::Path;
use std::process::Stdio;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use harness::cases;
use harness::dialogue::{Case, Facts, Load, Place, Player, QEMU_BIOS, Source, Step, play};
use harness::emulator::{Boot, Card, Wire};
use harness::{Emulator, Firmware, Machine};

use crate::config::memory_for;
use crate::factory::{Factory, Kernel, bundle_of};
use crate::fuzz::fuzz;
use crate::lint::lint;
use crate::packages::{CPP, OPEN_VSWITCH, need};
use crate::progress::{note, seconds, step};
use crate::select::{On, packages};
use crate::toolchain::{Toolchain, Workspace, cargo};

/// How many emulators run at once.
const WORKERS: usize = 2;
/// How much of a failed case's console is shown.
const TAIL: usize = 60;

/// The groups beside those of the emulator cases.
const GROUPS: [(&str, &str); 5] = [
    ("lint", "rustfmt, clippy, and the house rules about unsafe"),
    ("host", "the tests of every safe room, on this machine"),
    (
        "vswitch-oracle",
        "the switch beside Open vSwitch: random switches, flows and frames",
    ),
    (
        "fuzz",
        "libFuzzer at frames, flow text and the rings of each device",
    ),
    (
        "toolchain",
        "the distribution's Rust, from its sources, makes an image that boots",
    ),
];

/// One line of the closing table.
struct Outcome {
    name: String,
    place: String,
    passed: bool,
    took: Duration,
    remark: String,
}

/// A case at one of its places.
#[derive(Clone, Copy)]
struct Task {
    case: &'static Case,
    emulator: Emulator,
    firmware: Firmware,
}

/// Whether a filter, or no filter at all, picks `name` of `group`: by the group's name, or by a part
/// of `group/name` when it is no group's.
fn picked(filters: &[String], group: &str, name: &str) -> bool {
    let full = format!("{group}/{name}");
    let is_group = |f: &str| GROUPS.iter().chain(&cases::GROUPS).any(|(g, _)| *g == f);
    let picks = |f: &String| {
        if is_group(f) {
            f == group
        } else {
            full.contains(f.as_str())
        }
    };
    filters.is_empty() || filters.iter().any(picks)
}

/// Refuses a filter that picks nothing: what was meant is not known.
fn check(filters: &[String]) -> Result<()> {
    for filter in filters {
        let only = std::slice::from_ref(filter);
        let group = GROUPS.iter().any(|(group, _)| filter == group);
        if !group && !cases::all().iter().any(|c| picked(only, c.group, c.name)) {
            bail!("nothing is called {filter}; `cargo xtask test --list` says what there is");
        }
    }
    Ok(())
}

/// Prints the groups and what is in them, as far as the filters pick it.
pub fn list(filters: &[String]) -> Result<()> {
    check(filters)?;
    let other = |group: &str| filters.is_empty() || filters.iter().any(|f| f == group);
    for (group, what) in GROUPS.into_iter().filter(|(group, _)| other(group)) {
        println!("{group:12} {what}");
    }
    for (group, what) in cases::GROUPS {
        let cases = cases::all().into_iter();
        let cases = cases.filter(|c| c.group == group && picked(filters, group, c.name));
        let mut cases = cases.peekable();
        if cases.peek().is_some() {
            println!("{group:12} {what}");
        }
        for case in cases {
            let place = |(player, firmware): &Place| {
                let player = if *player == Player::Bochs {
                    "bochs"
                } else {
                    "qemu"
                };
                format!("{player}/{}", firmware.name())
            };
            let places: Vec<String> = case.on.iter().map(place).collect();
            println!("    {:32} {}", case.full_name(), places.join(", "));
        }
    }
    Ok(())
}

/// How much of what has no end of its own.
pub struct Amounts {
    /// Frames that are compared with Open vSwitch, ...
    pub frames: u64,
    /// ... and where their random numbers begin.
    pub seed: u64,
    /// For each fuzz target.
    pub fuzz_seconds: u64,
}

/// Runs what the filters pick. True when all of it passed.
pub fn test(
    workspace: Workspace,
    on: Option<On>,
    filters: &[String],
    amounts: &Amounts,
) -> Result<bool> {
    let begin = Instant::now();
    check(filters)?;
    let players = players(on)?;
    let tasks = tasks(filters, &players);
    let other = |group: &str| filters.is_empty() || filters.iter().any(|f| f == group);
    if tasks.is_empty() && !GROUPS.iter().any(|(g, _)| other(g)) {
        bail!(
            "{} does not run on that emulator; `cargo xtask test --list` says what runs where",
            filters.join(" or ")
        );
    }
    let mut needed: Vec<_> = tasks
        .iter()
        .flat_map(|t| packages(t.emulator, t.firmware))
        .collect();
    if tasks.iter().any(|t| t.case.beside.is_some()) {
        needed.extend(packages(Emulator::QemuTcg, Firmware::Bios));
    }
    if other("toolchain") {
        needed.extend(packages(Emulator::QemuTcg, Firmware::Bios));
    }
    if other("vswitch-oracle") {
        needed.push(OPEN_VSWITCH);
    }
    if other("fuzz") {
        needed.push(CPP);
    }
    needed.dedup_by_key(|p| p.name);
    need(&needed)?;

    let mut outcomes = Vec::new();
    if other("lint") {
        outcomes.push(single("lint", "host", || lint(&workspace)));
    }
    if other("host") {
        outcomes.push(single("host", "host", || host_tests(&workspace)));
    }
    if other("vswitch-oracle") {
        outcomes.push(single("vswitch-oracle", "host", || {
            let scratch = workspace.dir("test/oracle")?;
            step("comparing with Open vSwitch", |_| {
                harness::oracle::run(&scratch, amounts.frames, amounts.seed)
            })
        }));
    }
    if other("fuzz") {
        outcomes.push(single("fuzz", "host", || {
            fuzz(&workspace, amounts.fuzz_seconds)
        }));
    }
    let factory = Factory::new(workspace.clone());
    if !tasks.is_empty() {
        match prepare(&factory, &tasks) {
            Ok(facts) => outcomes.extend(play_all(&factory, &facts, tasks)),
            Err(error) => outcomes.push(single("images", "host", || Err(error))),
        }
    }
    if other("toolchain") {
        outcomes.push(single("toolchain", "qemu-tcg/bios", || {
            toolchain(&workspace)
        }));
    }
    Ok(table(&outcomes, begin.elapsed()))
}

/// The emulators that play: by default QEMU and Bochs.
fn players(on: Option<On>) -> Result<Vec<(Player, Emulator)>> {
    let qemu = |on: On| -> Result<_> {
        let (emulator, why) = on.pick()?;
        note(&format!("QEMU is {emulator} ({why})"));
        Ok((Player::Qemu, emulator))
    };
    let bochs = (Player::Bochs, Emulator::Bochs);
    match on {
        None => Ok(vec![qemu(On::Auto)?, bochs]),
        Some(On::Bochs) => Ok(vec![bochs]),
        Some(on) => Ok(vec![qemu(on)?]),
    }
}

fn tasks(filters: &[String], players: &[(Player, Emulator)]) -> Vec<Task> {
    let mut tasks = Vec::new();
    for case in cases::all()
        .into_iter()
        .filter(|c| picked(filters, c.group, c.name))
    {
        for &(player, firmware) in case.on {
            let emulators = players.iter().filter(|(p, _)| *p == player);
            tasks.extend(emulators.map(|&(_, emulator)| Task {
                case,
                emulator,
                firmware,
            }));
        }
    }
    // Bochs is slowest: what it has long to do begins first.
    tasks.sort_by_key(|t| std::cmp::Reverse(t.case.limit(t.emulator)));
    tasks
}

fn single(name: &str, place: &str, work: impl FnOnce() -> Result<String>) -> Outcome {
    let begin = Instant::now();
    let result = work();
    let took = begin.elapsed();
    let passed = result.is_ok();
    let remark = result.unwrap_or_else(|error| {
        println!("{error:#}");
        error
            .to_string()
            .lines()
            .next()
            .unwrap_or_default()
            .to_owned()
    });
    say(passed, name, place, took);
    Outcome {
        name: name.to_owned(),
        place: place.to_owned(),
        passed,
        took,
        remark,
    }
}

/// The line of an error that says most: a compiler's first error, else the first line.
fn headline(error: &str) -> String {
    let told = error.lines().find(|l| l.starts_with("error"));
    told.or(error.lines().next()).unwrap_or_default().to_owned()
}

fn say(passed: bool, name: &str, place: &str, took: Duration) {
    let word = if passed { "ok    " } else { "FAILED" };
    println!("{word} {name:32} {place:14} {:>8}", seconds(took));
}

/// `cargo test` of everything that runs on the host.
fn host_tests(workspace: &Workspace) -> Result<String> {
    let mut tests = cargo();
    tests
        .current_dir(&workspace.root)
        .args(["test", "--no-fail-fast"])
        .stdin(Stdio::null());
    let output = step("host tests", |_| {
        tests.output().context("running cargo test")
    })?;
    let said = String::from_utf8_lossy(&output.stdout);
    let told = String::from_utf8_lossy(&output.stderr);
    // Which program ran goes to the one, how it ended to the other, in the same order.
    let running = told
        .lines()
        .map(str::trim)
        .filter(|l| l.starts_with("Running ") || l.starts_with("Doc-tests "));
    let results: Vec<&str> = said
        .lines()
        .filter(|l| l.starts_with("test result:"))
        .collect();
    for (program, result) in running.zip(&results) {
        println!("{program}\n    {result}");
    }
    if !output.status.success() {
        bail!("cargo test: {}\n{told}\n{said}", output.status);
    }
    // `test result: ok. 12 passed; 0 failed; …`
    let passed = |line: &&str| -> Option<u64> {
        line.split_once(" passed;")?
            .0
            .rsplit(' ')
            .next()?
            .parse()
            .ok()
    };
    let passed: u64 = results.iter().filter_map(passed).sum();
    Ok(format!("{passed} passed"))
}

/// The files of a load, made or cut as the case says.
fn files_of(factory: &Factory, files: &[(&str, Source)]) -> Result<Vec<(String, Vec<u8>)>> {
    let made = |name: &str| {
        factory
            .file(name)?
            .with_context(|| format!("nothing makes {name}"))
    };
    let contents = |source: &Source| match *source {
        Source::Made(name) => made(name),
        Source::Short(name, missing) => made(name).map(|mut file| {
            file.truncate(file.len().saturating_sub(missing));
            file
        }),
        Source::Bytes(bytes) => Ok(bytes.to_vec()),
        Source::Cut(name, length) => made(name).map(|mut file| {
            file.truncate(length);
            file
        }),
    };
    files
        .iter()
        .map(|(name, source)| Ok(((*name).to_owned(), contents(source)?)))
        .collect()
}

/// Builds what the tasks share, so that they only differ in their images. A guest that does not
/// build fails the cases that want it, not all.
fn prepare(factory: &Factory, tasks: &[Task]) -> Result<Facts> {
    if tasks
        .iter()
        .any(|t| matches!(t.case.load, Load::Bundle { .. }) && !t.case.fails)
    {
        factory.tessera()?;
    }
    let files = tasks.iter().flat_map(|t| match t.case.load {
        Load::Bundle { files, .. } => files,
        _ => &[],
    });
    let mut facts = Facts::default();
    if files
        .into_iter()
        .any(|(_, source)| matches!(source, Source::Made("vmlinuz")))
    {
        facts.release = factory.linux()?.release;
    }
    Ok(facts)
}

/// Plays the tasks, a few at a time.
fn play_all(factory: &Factory, facts: &Facts, tasks: Vec<Task>) -> Vec<Outcome> {
    let queue = Mutex::new(VecDeque::from(tasks));
    let outcomes = Mutex::new(Vec::new());
    let work = || {
        loop {
            let task = queue.lock().unwrap_or_else(|e| e.into_inner()).pop_front();
            let Some(task) = task else { return };
            let outcome = play_one(factory, facts, task);
            outcomes
                .lock()
                .unwrap_or_else(|e| e.into_inner())
                .push(outcome);
        }
    };
    std::thread::scope(|scope| {
        for _ in 0..WORKERS {
            scope.spawn(work);
        }
    });
    let mut outcomes = outcomes.into_inner().unwrap_or_else(|e| e.into_inner());
    outcomes.sort_by(|a, b| (&a.name, &a.place).cmp(&(&b.name, &b.place)));
    outcomes
}

fn play_one(factory: &Factory, facts: &Facts, task: Task) -> Outcome {
    let Task {
        case,
        emulator,
        firmware,
    } = task;
    let name = case.full_name();
    let place = format!("{emulator}/{}", firmware.name());
    let begin = Instant::now();
    let folder = format!(
        "test/{}-{}-{}",
        name.replace('/', "-"),
        emulator,
        firmware.name()
    );
    let result = factory.workspace().dir(&folder).and_then(|dir| {
        let mut machine = machine(factory, task, &dir)?;
        let beside = case
            .beside
            .map(|load| beside(factory, task, load, &mut machine, &dir));
        let beside = beside.transpose()?;
        let played = play(case, &machine, beside.as_ref(), facts, &dir);
        for machine in [Some(&machine), beside.as_ref()].into_iter().flatten() {
            if let Boot::Disk(disk) = &machine.boot {
                // Nothing but the configuration is in it, and there are many.
                let _ = fs::remove_file(disk);
            }
        }
        played.map_err(|failure| {
            let mut console = harness::Console::default();
            console.feed(failure.console.as_bytes());
            println!(
                "--- {name} on {place}: the console's last lines\n{}\n---",
                console.tail(TAIL)
            );
            if let Some(log) = failure.log {
                println!("--- the emulator's log: {}", log.display());
            }
            // A guest's own failed cases may lie far above the tail.
            for line in failure.console.lines().filter(|l| l.contains("FAILED")) {
                println!("--- {line}");
            }
            let whole = dir.join("console.txt");
            if fs::write(&whole, &failure.console).is_ok() {
                println!("--- the whole console: {}", whole.display());
            }
            failure.error
        })
    });
    let took = begin.elapsed();
    let passed = result.is_ok();
    let remark = result.err().map_or(String::new(), |error| {
        let error = format!("{error:#}");
        println!("--- {name} on {place}: {error}");
        headline(&error)
    });
    say(passed, &name, &place, took);
    Outcome {
        name,
        place,
        passed,
        took,
        remark,
    }
}

/// The machine of a task, with its disk written into `dir`.
fn machine(factory: &Factory, task: Task, dir: &Path) -> Result<Machine> {
    let Task {
        case,
        emulator,
        firmware,
    } = task;
    let disk = dir.join("disk.img");
    let mut machine = Machine::new(emulator, firmware, &disk, 512);
    machine.cpus = case.cpus;
    machine.cards = case.cards.to_vec();
    machine.sparse = case.sparse;
    machine.pace = case.pace;
    machine.extension = case.extension;
    let looks = |step: &Step| matches!(step, Step::Told(_) | Step::Shown(_));
    let second = |step: &Step| matches!(step, Step::SendSecond(_) | Step::ExpectSecond(_));
    machine.second_port = case.steps.iter().any(second);
    machine.watched = case.steps.iter().any(looks);
    load(factory, case, case.load, &mut machine, dir)?;
    Ok(machine)
}

/// The machine beside that of a task, and the wire between them.
fn beside(
    factory: &Factory,
    task: Task,
    what: Load,
    machine: &mut Machine,
    dir: &Path,
) -> Result<Machine> {
    let dir = dir.join("beside");
    fs::create_dir_all(&dir).with_context(|| format!("creating {}", dir.display()))?;
    let emulator = match task.emulator {
        Emulator::Bochs => On::Auto.pick()?.0,
        qemu => qemu,
    };
    let mut other = Machine::new(emulator, Firmware::Bios, &dir.join("disk.img"), 512);
    other.pace = task.case.pace;
    other.cards = vec![Card::E1000];
    let (ours, theirs) = Wire::pair()?;
    (machine.wire, other.wire) = (Some(ours), Some(theirs));
    load(factory, task.case, what, &mut other, &dir)?;
    Ok(other)
}

/// Gives a machine what it starts.
fn load(
    factory: &Factory,
    case: &Case,
    what: Load,
    machine: &mut Machine,
    dir: &Path,
) -> Result<()> {
    let disk = dir.join("disk.img");
    match what {
        Load::Bundle {
            config,
            files,
            spoil,
        } => {
            let text = config.concat();
            let mut bundle = bundle_of(&text, &files_of(factory, files)?);
            if let Some(spoil) = spoil {
                spoil(&mut bundle);
            }
            machine.memory = case.memory.unwrap_or_else(|| memory_for(&text));
            let kernel = if case.fails {
                Kernel::Failing
            } else {
                Kernel::Tessera
            };
            factory.image_of(kernel, &bundle, &disk)?;
        }
        Load::Probe => {
            let bundle = bundle_of("# nothing", &[]);
            machine.memory = case.memory.unwrap_or(machine.memory);
            factory.image_of(Kernel::Probe, &bundle, &disk)?;
        }
        Load::Reference { guest, append } => {
            let file = dir.join(guest);
            let bytes = factory
                .file(guest)?
                .with_context(|| format!("nothing makes {guest}"))?;
            fs::write(&file, bytes).with_context(|| format!("writing {}", file.display()))?;
            machine.boot = Boot::Kernel {
                file,
                append: append.to_owned(),
            };
        }
    }
    Ok(())
}

/// The fall-back toolchain makes an image, and that image boots.
fn toolchain(workspace: &Workspace) -> Result<String> {
    let factory = Factory::with(
        workspace.clone(),
        Toolchain::distro("for the test of this")?,
    );
    let hello = cases::all()
        .into_iter()
        .find(|c| c.group == "hello")
        .context("no hello case")?;
    let (_, firmware) = QEMU_BIOS;
    let task = Task {
        case: hello,
        emulator: Emulator::QemuTcg,
        firmware,
    };
    let dir = workspace.dir("test/toolchain")?;
    let machine = machine(&factory, task, &dir)?;
    play(hello, &machine, None, &Facts::default(), &dir).map_err(|f| {
        f.error
            .context(format!("the image was made, but:\n{}", f.console))
    })?;
    Ok("built by the distribution's Rust, and booted".to_owned())
}

/// What ran where, and the closing line.
fn table(outcomes: &[Outcome], took: Duration) -> bool {
    println!("\n{:6} {:32} {:14} {:>8}  remark", "", "test", "on", "time");
    for o in outcomes {
        let word = if o.passed { "ok" } else { "FAILED" };
        let remark: String = o.remark.chars().take(100).collect();
        println!(
            "{word:6} {:32} {:14} {:>8}  {remark}",
            o.name,
            o.place,
            seconds(o.took)
        );
    }
    let passed = outcomes.iter().filter(|o| o.passed).count();
    println!("\nin {}", seconds(took));
    println!("{passed} passed, {} failed", outcomes.len() - passed);
    passed == outcomes.len()
}
