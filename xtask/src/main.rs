//! What a person types: `cargo xtask run`, `test`, `image`, `kernel`, `bench`, `doctor`.
//!
//! `run` with nothing else builds everything, gets what is missing, and puts the terminal on an
//! unmodified Linux that runs on Tessera.
#![forbid(unsafe_code)]

mod bench;
mod bundle;
mod capture;
mod config;
mod doctor;
mod factory;
mod fuzz;
mod image;
mod kernel;
mod lint;
mod linux;
mod packages;
mod progress;
mod run;
mod select;
mod terminal;
mod test;
mod toolchain;
mod trace;

use std::path::PathBuf;
use std::process::{ExitCode, exit};
use std::str::FromStr;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::{Args, Parser, Subcommand, ValueEnum};
use harness::emulator::{Card, Pace, Wire};
use harness::{Emulator, Firmware, Machine};
use regex_lite::{Regex, RegexBuilder};

use config::Packed;
use factory::Factory;
use progress::note;
use run::{Limits, Outcome, attend, switch_off};
use select::{On, need_emulator};
use toolchain::Workspace;

/// What an emulator gets when nobody set a limit.
const DAY: Duration = Duration::from_secs(24 * 3600);

/// Build, run, test and measure Tessera, a bare-metal hypervisor for x86_64.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Boot Tessera with its guests, with this terminal on their consoles
    ///
    /// Without --config: two of Debian's Linux, each with a shell, and a small Rust guest that
    /// answers their pings, on one switch with an uplink to the emulator's network. Ctrl-T is the
    /// prefix key: then 0 for the monitor, 1-9 for that VM, n for the next, x to end all VMs and
    /// leave, ? for help.
    ///
    /// Exits with 0 when every VM ended well, when left by Ctrl-T x, and when --until's pattern came;
    /// with a VM's debug-exit code when that is not its success_code, 101 when a VM crashed, 102 when
    /// the configuration or the machine cannot be used; 124 at the deadline, 125 when the machine
    /// died, 130 when interrupted or when Tessera does not answer Ctrl-T x, 2 for a mistake in what
    /// was typed.
    Run(RunArgs),
    /// Write the bootable disk image (UEFI and BIOS, GPT): for an emulator or a USB stick
    Image(ImageArgs),
    /// Run one test kernel as the only VM, print its console, and exit with its code
    ///
    /// The file may be a bzImage, an image with a multiboot1 header, or an ELF with a PVH note. The
    /// test devices are on: port 0xf4 (value v ends the VM with code (v << 1) | 1) and the debug
    /// console at port 0xe9. A power-off is code 0, a crash 101; the other statuses are those of
    /// `run`.
    Kernel(KernelArgs),
    /// Lint, test on this machine, and play the emulator cases
    ///
    /// Without filters everything, on QEMU and on Bochs. The last line is `N passed, N failed`; exits
    /// with 1 when something failed.
    Test(TestArgs),
    /// Say what a configuration's switch does with a frame, stage by stage
    ///
    /// The frame is written as for `ovs-appctl ofproto/trace`: fields with commas between them, of
    /// which `in_port`, a port's name or number, must be one. The last line, `Datapath actions: …`,
    /// is in Open vSwitch's words, with the port numbers that are listed first.
    SwitchTrace(TraceArgs),
    /// Measure what Tessera costs, in counted instructions that repeat
    ///
    /// On Bochs and on QEMU, from inside a guest, beside what KVM takes on the same emulator; sched
    /// and switch on this machine. Exits with 1 when a figure misses its mark: for an exit, a third
    /// of KVM's.
    Bench(BenchArgs),
    /// Say what this machine offers, what is missing, and how to get it
    ///
    /// Exits with 1 when something is missing that a full test needs.
    Doctor,
}

#[derive(Args)]
struct Where {
    /// The emulator
    #[arg(long, value_enum, default_value_t)]
    on: On,
    /// The firmware that boots the disk
    #[arg(long, value_enum, default_value_t)]
    firmware: FirmwareArg,
    /// Logical processors of the machine: 1 to 64
    #[arg(long, visible_alias = "cores", default_value_t = 1, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=64))]
    cpus: u32,
    /// A network card of the machine: e1000, or on QEMU e1000e or virtio-net as well; or none. Again
    /// for another card, on QEMU [default: an e1000 for each uplink of the configuration, on Bochs
    /// one at most]
    #[arg(long, value_name = "CARD")]
    nic: Vec<NicArg>,
    /// Join the first card to another emulator's, which is told the ports the other way round, in
    /// place of the emulator's own network: frames go by UDP from this port of ours to that of a
    /// host (on Bochs, always to the port after ours). PORT:PORT is within this machine
    #[arg(long, value_name = "PORT:HOST:PORT")]
    wire: Option<Wire>,
    /// Kill the run after this many seconds, with status 124 [default: no limit]
    #[arg(long, value_name = "S", value_parser = clap::value_parser!(u64).range(1..))]
    timeout: Option<u64>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
enum FirmwareArg {
    #[default]
    Bios,
    Uefi,
}

/// `--nic`: a card, or none.
#[derive(Clone, Copy, Debug)]
struct NicArg(Option<Card>);

impl FromStr for NicArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "none" => Ok(Self(None)),
            card => card
                .parse()
                .map(|card| Self(Some(card)))
                .map_err(|e: String| e + ", none"),
        }
    }
}

#[derive(Args)]
struct RunArgs {
    #[command(flatten)]
    place: Where,
    /// A tessera.toml; files in it are looked for beside it [default: xtask/default.toml]
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Exit with 0 as soon as the consoles' text matches this regular expression
    #[arg(long, value_name = "PATTERN")]
    until: Option<String>,
    /// The machine's memory in MiB [default: enough for the guests, 1024 with --image]
    #[arg(long, value_name = "MIB")]
    memory: Option<u32>,
    /// Boot this image, as it is, in place of one made from a configuration
    #[arg(long, value_name = "FILE", conflicts_with = "config")]
    image: Option<PathBuf>,
}

#[derive(Args)]
struct ImageArgs {
    /// A tessera.toml; files in it are looked for beside it [default: xtask/default.toml]
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Where to write it [default: tessera/tessera.img in the target directory]
    #[arg(long, short, value_name = "FILE")]
    out: Option<PathBuf>,
}

#[derive(Args)]
struct KernelArgs {
    /// The kernel's image
    file: PathBuf,
    /// Its command line
    #[arg(
        long,
        default_value = "",
        value_name = "TEXT",
        allow_hyphen_values = true
    )]
    append: String,
    /// Its initrd (bzImage) or first module
    #[arg(long, value_name = "FILE")]
    initrd: Option<PathBuf>,
    /// The VM's vCPUs: 1 to 64
    #[arg(
        long,
        default_value_t = 1,
        value_name = "N",
        value_parser = clap::value_parser!(u32).range(1..=64)
    )]
    vcpus: u32,
    /// The VM's memory: 64MiB, 1GiB; a bare number is MiB
    #[arg(long, default_value = "128MiB", value_name = "M")]
    memory: String,
    /// Show the hypervisor's log as well
    #[arg(long, short)]
    verbose: bool,
    #[command(flatten)]
    place: Where,
}

#[derive(Args)]
struct TestArgs {
    /// Play the emulator cases on this one only [default: QEMU and Bochs]
    #[arg(long, value_enum)]
    on: Option<On>,
    /// Say what groups and cases there are, or which of them the filters pick
    #[arg(long)]
    list: bool,
    /// How many frames the group vswitch-oracle compares
    #[arg(long, value_name = "N", default_value_t = 100_000)]
    frames: u64,
    /// Where its random numbers begin
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,
    /// For how many seconds the group fuzz tries each of its targets, two at a time
    #[arg(long, value_name = "S", default_value_t = 60, value_parser = clap::value_parser!(u64).range(1..))]
    fuzz_seconds: u64,
    /// A group (lint, host, boot, linux, ...), group/case, or a part of a case's name
    filter: Vec<String>,
}

#[derive(Args)]
struct TraceArgs {
    /// The tessera.toml
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
    /// The switch, where `in_port` does not say which
    #[arg(long, value_name = "NAME")]
    switch: Option<String>,
    /// A port whose link is down
    #[arg(long, value_name = "PORT")]
    down: Vec<String>,
    /// The frame: 'in_port=vm1,dl_vlan=9,dl_src=52:54:00:00:00:01,...'
    flow: String,
}

#[derive(Args)]
struct BenchArgs {
    /// The bench [default: all; known: exits, smp, share, boot, sched, network, switch]
    name: Option<String>,
    /// Measure on this one only [default: Bochs and QEMU's own emulation]
    #[arg(long, value_enum)]
    on: Option<On>,
    /// One JSON object a line: bench, case, on, value, unit
    #[arg(long)]
    json: bool,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let interrupted = || {
        harness::process::kill_all();
        terminal::restore();
        eprintln!("\nxtask: interrupted");
        exit(130);
    };
    let watched = ctrlc::set_handler(interrupted).context("watching for signals");
    let done = watched.and_then(|()| match cli.command {
        Command::Run(args) => run_command(&args),
        Command::Image(args) => image_command(&args),
        Command::Kernel(args) => kernel_command(&args),
        Command::Test(args) if args.list => {
            test::list(&args.filter)?;
            Ok(0)
        }
        Command::Test(args) => {
            let passed = test::test(
                Workspace::find()?,
                args.on,
                &args.filter,
                &test::Amounts {
                    frames: args.frames,
                    seed: args.seed,
                    fuzz_seconds: args.fuzz_seconds,
                },
            )?;
            Ok(u8::from(!passed))
        }
        Command::Bench(args) => {
            let factory = Factory::new(Workspace::find()?);
            let request = bench::Request {
                name: args.name.as_deref(),
                on: args.on,
                json: args.json,
            };
            let good = bench::bench(&factory, &request)?;
            Ok(u8::from(!good))
        }
        Command::SwitchTrace(args) => {
            let question = trace::Question {
                flow: &args.flow,
                switch: args.switch.as_deref(),
                down: &args.down,
            };
            print!("{}", trace::trace_file(&args.config, &question)?);
            Ok(0)
        }
        Command::Doctor => Ok(u8::from(!doctor::doctor())),
    });
    match done {
        Ok(status) => ExitCode::from(status),
        Err(error) => {
            eprintln!("xtask: error: {error:#}");
            ExitCode::from(2)
        }
    }
}

impl Where {
    fn firmware(&self) -> Firmware {
        match self.firmware {
            FirmwareArg::Bios => Firmware::Bios,
            FirmwareArg::Uefi => Firmware::Uefi,
        }
    }

    /// The machine's cards, for a configuration with so many uplinks.
    fn cards(&self, emulator: Emulator, uplinks: usize) -> Vec<Card> {
        let wanted = match emulator {
            Emulator::Bochs => uplinks.min(1),
            _ => uplinks,
        };
        match self.nic.is_empty() {
            true => vec![Card::E1000; wanted.max(usize::from(self.wire.is_some()))],
            false => self.nic.iter().filter_map(|nic| nic.0).collect(),
        }
    }
}

fn pattern(text: &str) -> Result<Regex> {
    let regex = RegexBuilder::new(text).multi_line(true).build();
    regex.with_context(|| format!("--until {text:?} is no regular expression"))
}

fn run_command(args: &RunArgs) -> Result<u8> {
    let until = args.until.as_deref().map(pattern).transpose()?;
    let workspace = Workspace::find()?;
    // Machines on one wire run at the same time.
    let wire = args.place.wire.as_ref();
    let name = wire.map_or("run".to_owned(), |wire| format!("run-{}", wire.local));
    let dir = workspace.dir(&name)?;
    let (disk, memory, uplinks) = match &args.image {
        Some(image) => {
            std::fs::File::open(image).with_context(|| format!("opening {}", image.display()))?;
            (image.clone(), 1024, 0)
        }
        None => {
            let factory = Factory::new(workspace);
            let packed = Packed::load(args.config.as_deref(), &factory)?;
            let disk = dir.join("disk.img");
            factory.image(&packed, &disk)?;
            (disk, packed.memory, packed.uplinks)
        }
    };
    let memory = args.memory.unwrap_or(memory);
    let job = Job {
        place: &args.place,
        disk,
        memory,
        uplinks,
        until,
        guest_only: false,
        dir,
    };
    job.run().map(|(status, _, _)| status)
}

fn image_command(args: &ImageArgs) -> Result<u8> {
    let factory = Factory::new(Workspace::find()?);
    let packed = Packed::load(args.config.as_deref(), &factory)?;
    let out = match &args.out {
        Some(out) => out.clone(),
        None => factory.workspace().dir("")?.join("tessera.img"),
    };
    factory.image(&packed, &out)?;
    let size = std::fs::metadata(&out).map(|m| m.len()).unwrap_or_default();
    println!("{} ({} MiB)", out.display(), size.div_ceil(1 << 20));
    note("write it to a stick with: dd if=IMAGE of=/dev/DEVICE bs=4M oflag=direct status=progress");
    Ok(0)
}

fn kernel_command(args: &KernelArgs) -> Result<u8> {
    let packed = kernel::configuration(&kernel::Options {
        file: &args.file,
        append: &args.append,
        initrd: args.initrd.as_deref(),
        vcpus: args.vcpus,
        memory: &args.memory,
        log: if args.verbose { "debug" } else { "info" },
    })?;
    let factory = Factory::new(Workspace::find()?);
    let dir = factory.workspace().dir("kernel")?;
    let disk = dir.join("disk.img");
    factory.image(&packed, &disk)?;
    let job = Job {
        place: &args.place,
        disk,
        memory: packed.memory,
        uplinks: packed.uplinks,
        until: None,
        guest_only: !args.verbose,
        dir,
    };
    let (status, outcome, said) = job.run()?;
    match outcome {
        Outcome::Ended(end) => Ok(kernel::code(&said).unwrap_or(end.status)),
        _ => Ok(status),
    }
}

/// One machine with this terminal on its console.
struct Job<'a> {
    place: &'a Where,
    disk: PathBuf,
    memory: u32,
    uplinks: usize,
    until: Option<Regex>,
    guest_only: bool,
    dir: PathBuf,
}

impl Job<'_> {
    fn run(self) -> Result<(u8, Outcome, String)> {
        let firmware = self.place.firmware();
        let (emulator, why) = self.place.on.pick()?;
        need_emulator(emulator, firmware)?;
        let extension = emulator.extension();
        note(&format!(
            "on {emulator} with {extension} ({why}), {} MiB, {}",
            self.memory,
            firmware.name()
        ));
        let mut machine = Machine::new(emulator, firmware, &self.disk, self.memory);
        machine.cpus = self.place.cpus;
        machine.cards = self.place.cards(emulator, self.uplinks);
        machine.wire = self.place.wire.clone();
        if machine.wire.is_some() && machine.cards.is_empty() {
            bail!("--wire joins a card, and --nic none leaves the machine without one");
        }
        machine.pace = Pace::WallClock;
        let limits = Limits {
            until: self.until,
            timeout: self.place.timeout.map(Duration::from_secs),
        };
        let hard = limits.timeout.map_or(DAY, |t| t + Duration::from_secs(30));
        let mut session = machine.start(&self.dir, hard)?;
        let (outcome, console) = attend(&mut session, &limits, self.guest_only, &self.dir);
        let quiet = self.guest_only && matches!(outcome, Outcome::Ended(_));
        let status = match &outcome {
            Outcome::Ended(end) if quiet => end.status,
            other => other.report(&limits, &session),
        };
        if self.guest_only && status != 0 && kernel::code(console.text()).is_none() {
            note(&format!(
                "the last lines of the console:\n{}",
                console.tail(12)
            ));
        }
        switch_off(&mut session, &outcome);
        Ok((status, outcome, console.text().to_owned()))
    }
}
