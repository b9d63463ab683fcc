//! `tessera.toml`: which VMs run, from which images, with what.
//!
//! The document is walked by hand rather than through serde, so that every error has the place of
//! the very key or value, names the nearest valid key, and stays inside its `[[vm]]`: a mistake in
//! one VM leaves the others usable. Only what cannot be put down to one VM (a syntax error, an
//! unknown section, a bad `[host]`) fails the whole file. The hypervisor and `xtask` use this same
//! parser, so a configuration that packs is one that boots.

use alloc::{
    borrow::ToOwned,
    boxed::Box,
    format,
    string::{String, ToString},
    vec::Vec,
};
use core::{fmt, ops::RangeInclusive};

use arch::Nanos;
use log::LevelFilter;
mod document;
pub mod network;

use document::{Data, Node, Table};
use sched::{CoreId, CoreSet, MAX_CORES};
pub use sched::{DEFAULT_WEIGHT, MAX_WEIGHT, MIN_BUDGET};

/// Most VMs in a configuration.
pub const MAX_VMS: usize = 16;
/// Most virtual CPUs of a VM.
pub const MAX_VCPUS: u32 = machine::apic::MAX_VCPUS;
/// Most percent of one core that `cap` and `reservation` can name: all vCPUs, all the time.
pub const MAX_PERCENT: u32 = 100 * MAX_VCPUS;
/// Range of `period` of a real-time VM, in nanoseconds.
pub const PERIODS: RangeInclusive<u64> = 1_000_000..=1_000_000_000;
/// Least memory of a VM: the legacy megabyte.
pub const MIN_MEMORY: u64 = 1 << 20;
/// Most memory of a VM.
pub const MAX_MEMORY: u64 = 1 << 40;
/// Memory comes in pages.
pub const MEMORY_STEP: u64 = arch::PAGE_SIZE;
/// Longest kernel command line, as Linux on x86 has it (without the terminating zero).
pub const MAX_CMDLINE: usize = 2047;
/// Most entries in `modules`.
pub const MAX_MODULES: usize = 16;
/// Longest name of an image: what a ustar header holds.
pub const MAX_IMAGE_NAME: usize = 255;
/// Longest name of a VM.
pub const MAX_NAME: usize = 32;

const TOP_KEYS: &[&str] = &["host", "switch", "vm"];
const HOST_KEYS: &[&str] = &["focus", "when_done", "log", "cores"];
const VM_KEYS: &[&str] = &[
    "name",
    "kind",
    "kernel",
    "initrd",
    "modules",
    "cmdline",
    "memory",
    "vcpus",
    "class",
    "weight",
    "cap",
    "reservation",
    "realtime",
    "affinity",
    "pin",
    "large_pages",
    "autostart",
    "background",
    "on_poweroff",
    "on_reboot",
    "on_crash",
    "console_port",
    "nic",
    "devices",
];
const REALTIME_KEYS: &[&str] = &["budget", "period"];
const DEVICE_KEYS: &[&str] = &[
    "debug_exit",
    "debug_console",
    "success_code",
    "watchdog",
    "rng",
    "virtio_console",
];

/// A checked configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// The `[host]` section.
    pub host: HostConfig,
    /// The switches.
    pub switches: Vec<network::Switch>,
    /// One per `[[vm]]`, in order: at least one, at most [`MAX_VMS`] of them good.
    pub vms: Vec<Result<VmConfig, ConfigError>>,
}

/// The `[host]` section.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostConfig {
    /// The VM whose console is in front at the start; otherwise the first.
    pub focus: Option<String>,
    /// What happens when the last VM has ended.
    pub when_done: WhenDone,
    /// How much the hypervisor's log says.
    pub log: LevelFilter,
    /// At most this many of the machine's cores are used; otherwise all.
    pub cores: Option<u32>,
}

/// What the machine does when the last VM has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WhenDone {
    /// Power off (ACPI S5).
    PowerOff,
    /// Stop with interrupts off.
    Halt,
    /// Reset the machine.
    Reboot,
}

/// How a kernel image is loaded and entered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Linux bzImage.
    Linux,
    /// Multiboot (version 1).
    Multiboot,
    /// ELF with a PVH entry note.
    Pvh,
}

impl Kind {
    /// As it is written in the configuration.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Linux => "linux",
            Self::Multiboot => "multiboot",
            Self::Pvh => "pvh",
        }
    }
}

/// What follows when a VM came to an end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnEnd {
    /// It starts again from its images.
    Restart,
    /// It gives back all that it held.
    Stop,
    /// It keeps its memory and state, to be looked at, until a person stops or starts it.
    Hold,
}

/// How the scheduler treats a VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// It has its share by weight.
    Fair,
    /// Each vCPU runs `budget` in each `period` ahead of the fair ones, and no more.
    Realtime {
        /// At least [`MIN_BUDGET`], at most the period.
        budget: Nanos,
        /// In [`PERIODS`].
        period: Nanos,
    },
    /// Each vCPU owns its core.
    Dedicated,
}

/// How a VM's vCPUs come to run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Scheduling {
    /// In which way.
    pub class: Class,
    /// The VM's share: 1..=[`MAX_WEIGHT`].
    pub weight: u32,
    /// The VM runs no more than this many percent of one core: 1..=[`MAX_PERCENT`].
    pub cap: Option<u32>,
    /// The VM can have at least this many percent of one core: up to 100 for each vCPU, and to
    /// the cap.
    pub reservation: Option<u32>,
    /// Where its vCPUs may run.
    pub placement: Placement,
    /// Where the placement is written, or else the VM.
    pub position: Position,
}

/// The cores of a VM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Placement {
    /// All there are.
    Anywhere,
    /// Some.
    Among(CoreSet),
    /// One for each vCPU; of a dedicated VM, no two the same.
    Pinned(Vec<u16>),
}

/// An image of the bundle, and where the configuration names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageName {
    /// Its name in the bundle.
    pub name: String,
    /// Where it is named.
    pub position: Position,
}

/// One checked `[[vm]]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VmConfig {
    /// Unique; `[a-z0-9-]{1,32}`.
    pub name: String,
    /// How the kernel is loaded.
    pub kind: Kind,
    /// The kernel image.
    pub kernel: ImageName,
    /// Linux: the initial RAM disk. Otherwise: the first module.
    pub initrd: Option<ImageName>,
    /// Further modules (multiboot and PVH).
    pub modules: Vec<ImageName>,
    /// The kernel's command line.
    pub cmdline: String,
    /// Bytes of RAM: a multiple of [`MEMORY_STEP`] in [`MIN_MEMORY`]..=[`MAX_MEMORY`].
    pub memory: u64,
    /// 1..=[`MAX_VCPUS`].
    pub vcpus: u32,
    /// Back RAM with 2 MiB frames where possible.
    pub large_pages: bool,
    /// How its vCPUs come to run.
    pub scheduling: Scheduling,
    /// It starts with the machine, and else when it is told to.
    pub autostart: bool,
    /// It keeps no machine on: it is stopped once the others have ended.
    pub background: bool,
    /// What follows when the guest powers off.
    pub on_poweroff: OnEnd,
    /// What follows when the guest resets its machine.
    pub on_reboot: OnEnd,
    /// What follows a crash; a watchdog that ran out is one.
    pub on_crash: OnEnd,
    /// The machine's serial port (2 to 4) that is this VM's console and no other's.
    pub console_port: Option<u8>,
    /// Its network cards, in the order of their places on the bus.
    pub nics: Vec<network::Nic>,
    /// The `[vm.devices]` section.
    pub devices: Devices,
    /// Where the `[[vm]]` stands, for errors that arise later.
    pub position: Position,
}

impl VmConfig {
    /// Every image this VM needs from the bundle: kernel, initrd, modules.
    pub fn images(&self) -> impl Iterator<Item = &ImageName> {
        core::iter::once(&self.kernel)
            .chain(&self.initrd)
            .chain(&self.modules)
    }

    /// Checks that a machine with cores 0 to `cores` − 1 has the cores that the VM is bound to;
    /// `file` is its configuration's name.
    ///
    /// # Errors
    /// The first one that it does not have, or that a dedicated VM has more vCPUs than cores.
    pub fn check_cores(&self, file: &str, cores: u32) -> Result<(), ConfigError> {
        let missing = |core: &u16| u32::from(*core) >= cores;
        let absent = match &self.scheduling.placement {
            Placement::Anywhere => None,
            Placement::Among(set) => set.iter().map(|CoreId(core)| core).find(missing),
            Placement::Pinned(list) => list.iter().copied().find(missing),
        };
        let available = match &self.scheduling.placement {
            Placement::Among(set) => set.iter().count(),
            _ => cores as usize,
        };
        let problem = match absent {
            Some(core) => Problem::NoCore { core, cores },
            None if self.scheduling.class == Class::Dedicated
                && available < self.vcpus as usize =>
            {
                Problem::TooFewCores {
                    vcpus: self.vcpus,
                    available,
                }
            }
            None => return Ok(()),
        };
        Err(ConfigError {
            file: file.into(),
            position: self.scheduling.position,
            vm: Some(self.name.as_str().into()),
            problem,
        })
    }
}

/// Optional devices of a VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Devices {
    /// Port 0xf4 ends the VM with a code.
    pub debug_exit: bool,
    /// Port 0xe9 prints.
    pub debug_console: bool,
    /// The debug-exit code that means that all is well.
    pub success_code: u32,
    /// A watchdog timer that the guest may start.
    pub watchdog: bool,
    /// A source of random bytes (virtio-rng).
    pub rng: bool,
    /// A console besides the serial port (virtio-console).
    pub virtio_console: bool,
}

impl Default for Devices {
    fn default() -> Self {
        Self {
            debug_exit: false,
            debug_console: false,
            success_code: 1,
            watchdog: false,
            rng: false,
            virtio_console: false,
        }
    }
}

/// A place in the file; both count from 1, columns in characters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Position {
    /// Line.
    pub line: u32,
    /// Column.
    pub column: u32,
}

impl fmt::Display for Position {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.line, self.column)
    }
}

/// What is wrong with a configuration, and where.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{file}:{position}: {}{problem}", VmPrefix(.vm))]
pub struct ConfigError {
    /// The file's name as given to [`parse`].
    pub file: Box<str>,
    /// The key or value at fault.
    pub position: Position,
    /// The VM it is about, if its name could be read.
    pub vm: Option<Box<str>>,
    /// What is wrong.
    pub problem: Problem,
}

struct VmPrefix<'a>(&'a Option<Box<str>>);

impl fmt::Display for VmPrefix<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0
            .as_ref()
            .map_or(Ok(()), |name| write!(f, "VM `{name}`: "))
    }
}

/// The ways in which a configuration can be wrong.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Problem {
    /// Not TOML.
    #[error("{0}")]
    Syntax(String),
    /// A key that does not exist.
    #[error("unknown key `{key}` in {section}, {}", Hint(.nearest, .valid))]
    UnknownKey {
        /// As found.
        key: String,
        /// The section it stands in.
        section: &'static str,
        /// The valid key that is most like it.
        nearest: Option<&'static str>,
        /// All valid keys of the section.
        valid: &'static [&'static str],
    },
    /// A key that must be there.
    #[error("{section} lacks `{key}`, which must be {wanted}")]
    Missing {
        /// The key.
        key: &'static str,
        /// The section.
        section: &'static str,
        /// What it would hold.
        wanted: String,
    },
    /// A value of the wrong type or out of its range.
    #[error("`{key}` is {found}, but must be {wanted}")]
    Value {
        /// The key.
        key: &'static str,
        /// What was found.
        found: String,
        /// What would be right.
        wanted: String,
    },
    /// Ports, mirrors or meters that do not fit together.
    #[error("{0}")]
    Network(String),
    /// Two VMs with one name.
    #[error("the name `{name}` is taken by the VM at {first}; names must be unique")]
    DuplicateName {
        /// The name.
        name: String,
        /// Where it stands first.
        first: Position,
    },
    /// No `[[vm]]` at all.
    #[error("no VM is described: add a [[vm]] section")]
    NoVm,
    /// A VM is bound to a core that the machine does not have.
    #[error("it is bound to core {core}, but this machine has {cores}, counted from 0")]
    NoCore {
        /// The core.
        core: u16,
        /// How many there are.
        cores: u32,
    },
    /// Each vCPU of a dedicated VM needs a core.
    #[error("it has {vcpus} vCPUs of class \"dedicated\", but only {available} cores to own")]
    TooFewCores {
        /// Its vCPUs.
        vcpus: u32,
        /// The cores it may run on.
        available: usize,
    },
    /// More than [`MAX_VMS`].
    #[error("VM number {number} is one too many: at most {MAX_VMS} can run")]
    TooManyVms {
        /// Which one this is, from 1.
        number: usize,
    },
}

struct Hint<'a>(&'a Option<&'static str>, &'a [&'static str]);

impl fmt::Display for Hint<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(nearest) = self.0 {
            return write!(f, "did you mean `{nearest}`?");
        }
        f.write_str("valid keys: ")?;
        for (i, key) in self.1.iter().enumerate() {
            write!(f, "{}`{key}`", if i == 0 { "" } else { ", " })?;
        }
        Ok(())
    }
}

/// Parses and checks a configuration; `file` is its name in errors.
///
/// # Errors
/// What fails the whole file. The errors of one `[[vm]]` are in [`Config::vms`].
pub fn parse(text: &str, file: &str) -> Result<Config, ConfigError> {
    checked(text, file).map_err(|error| *error)
}

/// An error in a box is cheap to hand on, which is what most of the checks do.
type Checked<T> = Result<T, Box<ConfigError>>;

fn checked(text: &str, file: &str) -> Checked<Config> {
    let source = Source { text, file };
    let root = document::parse(text)
        .map_err(|error| source.error(error.at, Problem::Syntax(error.message)))?;
    let top = Section::check(&source, &root, 0, "the file", TOP_KEYS)?;

    let vms = top
        .get("vm")
        .ok_or_else(|| source.error(0, Problem::NoVm))?;
    let list = match &vms.value.data {
        Data::Array(list) | Data::Tables(list) => list,
        _ => return Err(vms.wrong("written [[vm]], one for each VM")),
    };
    if list.is_empty() {
        return Err(vms.error(Problem::NoVm));
    }
    let switches = network::switches(&top)?;
    let mut taken = Taken::default();
    let vms = list
        .iter()
        .enumerate()
        .map(|(index, value)| {
            let value = Value {
                source: &source,
                key: "vm",
                value,
            };
            let name = match &value.value.data {
                Data::Table(table) => table.get("name").and_then(Node::text),
                _ => None,
            };
            vm(&value, index, &switches, &mut taken).map_err(|mut error| {
                error.vm = name.map(Into::into);
                *error
            })
        })
        .collect();

    let host = top.sub("host", "[host]", HOST_KEYS)?;
    let focus = host
        .get("focus")
        .map(|value| value.vm_name().map(|name| (name, value)));
    let focus = focus.transpose()?.map(|(name, value)| {
        if taken.names.iter().any(|(known, _)| *known == name) {
            Ok(name.to_owned())
        } else {
            Err(value.wrong("the name of a VM in this file"))
        }
    });
    Ok(Config {
        host: HostConfig {
            focus: focus.transpose()?,
            when_done: host.one_of(
                "when_done",
                WhenDone::PowerOff,
                &[
                    ("poweroff", WhenDone::PowerOff),
                    ("halt", WhenDone::Halt),
                    ("reboot", WhenDone::Reboot),
                ],
            )?,
            log: host.one_of(
                "log",
                LevelFilter::Info,
                &[
                    ("error", LevelFilter::Error),
                    ("warn", LevelFilter::Warn),
                    ("info", LevelFilter::Info),
                    ("debug", LevelFilter::Debug),
                    ("trace", LevelFilter::Trace),
                ],
            )?,
            cores: host.number("cores", 1..=MAX_CORES.into())?,
        },
        switches,
        vms,
    })
}

/// What a VM has that no other may have.
#[derive(Default)]
struct Taken<'a> {
    names: Vec<(&'a str, Position)>,
    console_ports: Vec<u8>,
    /// How many ports of each switch.
    ports: Vec<u16>,
}

/// Checks one `[[vm]]`. Its name, if well formed, is taken even if something else is wrong.
fn vm<'a>(
    value: &Value<'a>,
    index: usize,
    switches: &[network::Switch],
    taken: &mut Taken<'a>,
) -> Checked<VmConfig> {
    if index >= MAX_VMS {
        return Err(value.error(Problem::TooManyVms { number: index + 1 }));
    }
    let Data::Table(table) = &value.value.data else {
        return Err(value.wrong("written [[vm]], one for each VM"));
    };
    let position = value.position();
    // The name comes first: even a VM that fails further down keeps it.
    let unchecked = Section {
        source: value.source,
        table: Some(table),
        at: value.value.at,
        name: "[[vm]]",
    };
    let name_value = unchecked.need("name", NAME_RULE)?;
    let name = name_value.vm_name()?;
    if let Some(&(_, first)) = taken.names.iter().find(|(other, _)| *other == name) {
        return Err(name_value.error(Problem::DuplicateName {
            name: name.to_owned(),
            first,
        }));
    }
    taken.names.push((name, name_value.position()));
    let vm = Section::check(value.source, table, unchecked.at, "[[vm]]", VM_KEYS)?;

    let kinds = [Kind::Linux, Kind::Multiboot, Kind::Pvh].map(|kind| (kind.name(), kind));
    let kind = vm
        .need("kind", "\"linux\", \"multiboot\" or \"pvh\"")?
        .one_of(&kinds)?;
    let modules = vm
        .get("modules")
        .map_or(Ok(Vec::new()), |value| value.images())?;
    if let (Kind::Linux, Some(value), false) = (kind, vm.get("modules"), modules.is_empty()) {
        return Err(value.wrong("left out for kind \"linux\", which takes one `initrd`"));
    }
    let vcpus = vm.number("vcpus", 1..=MAX_VCPUS)?.unwrap_or(1);
    let console_port = vm.choice("console_port", &[("com2", 2), ("com3", 3), ("com4", 4)])?;
    if let (Some(port), Some(value)) = (console_port, vm.get("console_port")) {
        if taken.console_ports.contains(&port) {
            return Err(value.wrong("a port that no other VM has"));
        }
        taken.console_ports.push(port);
    }
    let on_end = |key, default| vm.one_of(key, default, ON_END);
    let devices = vm.sub("devices", "[vm.devices]", DEVICE_KEYS)?;
    Ok(VmConfig {
        name: name.to_owned(),
        kind,
        kernel: vm
            .need("kernel", "the file name of the kernel image")?
            .image()?,
        initrd: vm.get("initrd").map(|value| value.image()).transpose()?,
        modules,
        cmdline: vm
            .get("cmdline")
            .map_or(Ok(String::new()), |value| value.cmdline())?,
        memory: vm.need("memory", MEMORY_RULE)?.memory()?,
        vcpus,
        large_pages: vm.boolean("large_pages", true)?,
        scheduling: scheduling(&vm, vcpus, position)?,
        autostart: vm.boolean("autostart", true)?,
        background: vm.boolean("background", false)?,
        on_poweroff: on_end("on_poweroff", OnEnd::Stop)?,
        on_reboot: on_end("on_reboot", OnEnd::Restart)?,
        on_crash: on_end("on_crash", OnEnd::Stop)?,
        console_port,
        nics: network::nics(&vm, name, switches, &mut taken.ports)?,
        devices: Devices {
            debug_exit: devices.boolean("debug_exit", false)?,
            debug_console: devices.boolean("debug_console", false)?,
            success_code: devices
                .get("success_code")
                .map_or(Ok(1), |value| value.success_code())?,
            watchdog: devices.boolean("watchdog", false)?,
            rng: devices.boolean("rng", false)?,
            virtio_console: devices.boolean("virtio_console", false)?,
        },
        position,
    })
}

const ON_END: &[(&str, OnEnd)] = &[
    ("restart", OnEnd::Restart),
    ("stop", OnEnd::Stop),
    ("hold", OnEnd::Hold),
];

/// How and where the vCPUs of a VM run.
fn scheduling(vm: &Section<'_>, vcpus: u32, position: Position) -> Checked<Scheduling> {
    // By name first, as the real-time class has values of its own.
    let class = vm.one_of("class", "fair", CLASSES)?;
    // Keys that mean nothing beside others: key, why, and whether that holds here.
    let fair = class == "fair";
    for (key, wrong, beside) in [
        ("weight", !fair, "as only class \"fair\" shares by weight"),
        ("cap", !fair, "as only class \"fair\" can be capped"),
        ("reservation", !fair, "as only class \"fair\" needs one"),
        (
            "realtime",
            class != "realtime",
            "or `class` be \"realtime\"",
        ),
        ("affinity", vm.get("pin").is_some(), "beside `pin`"),
    ] {
        if let (true, Some(value)) = (wrong, vm.get(key)) {
            return Err(value.wrong(&format!("left out, {beside}")));
        }
    }
    let cap = vm.number("cap", 1..=MAX_PERCENT)?;
    let most = cap.unwrap_or(MAX_PERCENT).min(100 * vcpus);
    let reservation = vm.number("reservation", 1..=most)?;
    let placed = vm.get("pin").or(vm.get("affinity"));
    let position = placed.as_ref().map_or(position, Value::position);
    let placement = match placed {
        Some(value) if value.key == "pin" => {
            Placement::Pinned(value.pins(vcpus, class == "dedicated")?)
        }
        Some(value) => Placement::Among(value.cores()?),
        None => Placement::Anywhere,
    };
    let class = match class {
        "dedicated" => Class::Dedicated,
        "realtime" => {
            vm.need("realtime", "a table with `budget` and `period`")?;
            let section = vm.sub("realtime", "[vm.realtime]", REALTIME_KEYS)?;
            let span = |key, range| section.need(key, SPAN_RULE)?.span(range);
            let period = span("period", PERIODS)?;
            let budget = span("budget", MIN_BUDGET..=period)?;
            Class::Realtime {
                budget: Nanos(budget),
                period: Nanos(period),
            }
        }
        _ => Class::Fair,
    };
    Ok(Scheduling {
        class,
        weight: vm
            .number("weight", 1..=MAX_WEIGHT)?
            .unwrap_or(DEFAULT_WEIGHT),
        cap,
        reservation,
        placement,
        position,
    })
}

const CLASSES: &[(&str, &str)] = &[
    ("fair", "fair"),
    ("realtime", "realtime"),
    ("dedicated", "dedicated"),
];

const NAME_RULE: &str = "1 to 32 characters of a-z, 0-9 and -";
const MEMORY_RULE: &str = "a size such as \"512MiB\" or \"2GiB\"";
const SIZES: &[(&str, u64)] = &[
    ("KiB", 1 << 10),
    ("MiB", 1 << 20),
    ("GiB", 1 << 30),
    ("TiB", 1 << 40),
];
const SPAN_RULE: &str = "a time such as \"500us\" or \"10ms\"";
const SPANS: &[(&str, u64)] = &[
    ("ns", 1),
    ("us", 1_000),
    ("ms", 1_000_000),
    ("s", 1_000_000_000),
];

/// The text that positions refer to.
struct Source<'a> {
    text: &'a str,
    file: &'a str,
}

impl Source<'_> {
    fn position(&self, at: usize) -> Position {
        let before = self
            .text
            .as_bytes()
            .get(..at)
            .unwrap_or(self.text.as_bytes());
        let line = before.iter().filter(|byte| **byte == b'\n').count();
        let column = before
            .iter()
            .rev()
            .take_while(|byte| **byte != b'\n')
            .filter(|byte| **byte & 0xc0 != 0x80) // UTF-8 continuation bytes
            .count();
        let count = |n: usize| u32::try_from(n + 1).unwrap_or(u32::MAX);
        Position {
            line: count(line),
            column: count(column),
        }
    }

    #[cold]
    fn error(&self, at: usize, problem: Problem) -> Box<ConfigError> {
        Box::new(ConfigError {
            file: self.file.into(),
            position: self.position(at),
            vm: None,
            problem,
        })
    }
}

/// A table whose keys are known to be valid; an absent one has none.
struct Section<'a> {
    source: &'a Source<'a>,
    table: Option<&'a Table<'a>>,
    at: usize,
    name: &'static str,
}

impl<'a> Section<'a> {
    fn check(
        source: &'a Source<'a>,
        table: &'a Table<'a>,
        at: usize,
        name: &'static str,
        valid: &'static [&'static str],
    ) -> Checked<Self> {
        let unknown = table
            .keys()
            .filter(|key| !valid.contains(&key.name.as_ref()))
            .min_by_key(|key| key.at);
        if let Some(key) = unknown {
            let nearest = nearest(&key.name, valid);
            let key_name = clip(&key.name);
            let problem = Problem::UnknownKey {
                key: key_name,
                section: name,
                nearest,
                valid,
            };
            return Err(source.error(key.at, problem));
        }
        Ok(Self {
            source,
            table: Some(table),
            at,
            name,
        })
    }

    fn get(&self, key: &'static str) -> Option<Value<'a>> {
        let value = self.table?.get(key)?;
        Some(Value {
            source: self.source,
            key,
            value,
        })
    }

    fn need(&self, key: &'static str, wanted: &str) -> Checked<Value<'a>> {
        self.get(key).ok_or_else(|| {
            let wanted = wanted.to_owned();
            self.source.error(
                self.at,
                Problem::Missing {
                    key,
                    section: self.name,
                    wanted,
                },
            )
        })
    }

    fn sub(
        &self,
        key: &'static str,
        name: &'static str,
        valid: &'static [&'static str],
    ) -> Checked<Self> {
        let Some(value) = self.get(key) else {
            return Ok(Self {
                source: self.source,
                table: None,
                at: self.at,
                name,
            });
        };
        match &value.value.data {
            Data::Table(table) => Self::check(self.source, table, value.value.at, name, valid),
            _ => Err(value.wrong(&format!("a section {name}"))),
        }
    }

    fn boolean(&self, key: &'static str, default: bool) -> Checked<bool> {
        self.get(key)
            .map_or(Ok(default), |value| match value.value.data {
                Data::Boolean(flag) => Ok(flag),
                _ => Err(value.wrong("true or false")),
            })
    }

    fn number(&self, key: &'static str, range: RangeInclusive<u32>) -> Checked<Option<u32>> {
        self.get(key).map(|value| value.number(range)).transpose()
    }

    fn choice<T: Copy>(&self, key: &'static str, choices: &[(&str, T)]) -> Checked<Option<T>> {
        self.get(key).map(|value| value.one_of(choices)).transpose()
    }

    fn one_of<T: Copy>(&self, key: &'static str, default: T, choices: &[(&str, T)]) -> Checked<T> {
        Ok(self.choice(key, choices)?.unwrap_or(default))
    }
}

/// The value of a key.
struct Value<'a> {
    source: &'a Source<'a>,
    key: &'static str,
    value: &'a Node<'a>,
}

impl<'a> Value<'a> {
    fn position(&self) -> Position {
        self.source.position(self.value.at)
    }

    fn error(&self, problem: Problem) -> Box<ConfigError> {
        self.source.error(self.value.at, problem)
    }

    /// This value is not `wanted`.
    #[cold]
    fn wrong(&self, wanted: &str) -> Box<ConfigError> {
        let found = match &self.value.data {
            Data::Text(text) => format!("{:?}", clip(text)),
            Data::Integer(digits, _) => clip(digits),
            Data::Boolean(value) => value.to_string(),
            Data::Array(list) | Data::Tables(list) => format!("an array of {}", list.len()),
            Data::Table(_) => "a table".to_owned(),
            Data::Other(kind) => format!("a {kind}"),
        };
        self.error(Problem::Value {
            key: self.key,
            found,
            wanted: wanted.to_owned(),
        })
    }

    fn text(&self, wanted: &str) -> Checked<&'a str> {
        self.value.text().ok_or_else(|| self.wrong(wanted))
    }

    fn integer(&self, range: &RangeInclusive<u32>) -> Option<u32> {
        let Data::Integer(digits, radix) = &self.value.data else {
            return None;
        };
        let number = u32::from_str_radix(digits, *radix).ok()?;
        range.contains(&number).then_some(number)
    }

    fn number(&self, range: RangeInclusive<u32>) -> Checked<u32> {
        self.integer(&range).ok_or_else(|| {
            let (first, last) = range.into_inner();
            self.wrong(&format!("a number from {first} to {last}"))
        })
    }

    /// A whole number and a unit, multiplied; `None` if it is none or too large.
    fn quantity(&self, units: &[(&str, u64)], rule: &str) -> Checked<u64> {
        let text = self.text(rule)?;
        let digits = text.len() - text.trim_start_matches(|c: char| c.is_ascii_digit()).len();
        let (number, unit) = text.split_at(digits);
        let unit = units.iter().find(|(name, _)| *name == unit.trim_start());
        unit.zip(number.parse().ok())
            .and_then(|((_, unit), number): (_, u64)| number.checked_mul(*unit))
            .ok_or_else(|| self.wrong(rule))
    }

    /// A span of time in nanoseconds.
    fn span(&self, range: RangeInclusive<u64>) -> Checked<u64> {
        let nanos = self.quantity(SPANS, SPAN_RULE)?;
        if range.contains(&nanos) {
            return Ok(nanos);
        }
        let (least, most) = range.into_inner();
        let (least, most) = (least / 1_000, most / 1_000);
        Err(self.wrong(&format!("between {least}us and {most}us")))
    }

    fn entry(&self, value: &'a Node<'a>) -> Self {
        Self { value, ..*self }
    }

    /// Cores: a number, a text such as `"0-3,6"`, or an array of both.
    fn cores(&self) -> Checked<CoreSet> {
        let rule = "cores 0 to 255, as in [0, 2, \"4-7\"] or \"0-3,6\"";
        let mut set = CoreSet::default();
        let list = match &self.value.data {
            Data::Array(list) => list.as_slice(),
            _ => core::slice::from_ref(self.value),
        };
        for value in list {
            let added = match (&value.data, value.text()) {
                (Data::Integer(digits, 10), _) => set.add_list(digits),
                (_, Some(text)) => set.add_list(text),
                _ => None,
            };
            added.ok_or_else(|| self.entry(value).wrong(rule))?;
        }
        if list.is_empty() {
            return Err(self.wrong(rule));
        }
        Ok(set)
    }

    /// One core for each vCPU, with `apart` all of them different.
    fn pins(&self, vcpus: u32, apart: bool) -> Checked<Vec<u16>> {
        let list = match &self.value.data {
            Data::Array(list) if list.len() == vcpus as usize => list,
            _ => {
                let rule = format!("an array of {vcpus}, the core of each vCPU");
                return Err(self.wrong(&rule));
            }
        };
        let mut pins = Vec::new();
        for value in list {
            let value = self.entry(value);
            let core = value.number(0..=u32::from(MAX_CORES) - 1)? as u16;
            if apart && pins.contains(&core) {
                return Err(value.wrong("another core than those before it: each owns its own"));
            }
            pins.push(core);
        }
        Ok(pins)
    }

    fn one_of<T: Copy>(&self, choices: &[(&str, T)]) -> Checked<T> {
        let text = self.value.text();
        let found = choices.iter().find(|(name, _)| Some(*name) == text);
        found.map(|(_, choice)| *choice).ok_or_else(|| {
            let names: Vec<String> = choices
                .iter()
                .map(|(name, _)| format!("{name:?}"))
                .collect();
            self.wrong(&format!("one of {}", names.join(", ")))
        })
    }

    fn vm_name(&self) -> Checked<&'a str> {
        let name = self.text(NAME_RULE)?;
        let valid = |byte| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'-');
        if (1..=MAX_NAME).contains(&name.len()) && name.bytes().all(valid) {
            Ok(name)
        } else {
            Err(self.wrong(NAME_RULE))
        }
    }

    fn image(&self) -> Checked<ImageName> {
        let rule = "a file name of 1 to 255 bytes without control characters";
        let name = self.text(rule)?;
        if (1..=MAX_IMAGE_NAME).contains(&name.len()) && !name.contains(char::is_control) {
            Ok(ImageName {
                name: name.to_owned(),
                position: self.position(),
            })
        } else {
            Err(self.wrong(rule))
        }
    }

    fn images(&self) -> Checked<Vec<ImageName>> {
        match &self.value.data {
            Data::Array(list) if list.len() <= MAX_MODULES => {
                list.iter().map(|value| self.entry(value).image()).collect()
            }
            _ => Err(self.wrong(&format!("an array of at most {MAX_MODULES} file names"))),
        }
    }

    fn cmdline(&self) -> Checked<String> {
        let line = self.text("a string")?;
        if line.len() > MAX_CMDLINE {
            let rule = format!("at most {MAX_CMDLINE} bytes long (it has {})", line.len());
            return Err(self.wrong(&rule));
        }
        if line.contains(char::is_control) {
            return Err(self.wrong("one line without control characters"));
        }
        Ok(line.to_owned())
    }

    fn memory(&self) -> Checked<u64> {
        match self.quantity(SIZES, MEMORY_RULE)? {
            bytes if !(MIN_MEMORY..=MAX_MEMORY).contains(&bytes) => {
                Err(self.wrong("between 1MiB and 1TiB"))
            }
            bytes if bytes % MEMORY_STEP != 0 => Err(self.wrong("a multiple of 4KiB")),
            bytes => Ok(bytes),
        }
    }

    fn success_code(&self) -> Checked<u32> {
        self.integer(&(0..=u32::MAX))
            .filter(|code| code & 1 == 1)
            .ok_or_else(|| self.wrong("an odd number: writing v to port 0xf4 gives (v << 1) | 1"))
    }
}

/// At most the first 40 characters, for an error message.
fn clip(text: &str) -> String {
    match text.char_indices().nth(40) {
        Some((end, _)) => format!("{}…", text.get(..end).unwrap_or(text)),
        None => text.to_owned(),
    }
}

/// The candidate that takes the fewest edits to reach from `key`, unless most of `key` changes.
fn nearest(key: &str, candidates: &[&'static str]) -> Option<&'static str> {
    if key.len() > 64 {
        return None;
    }
    let best = candidates
        .iter()
        .map(|candidate| (edits(key, candidate), *candidate))
        .min()?;
    (best.0 * 2 <= key.len()).then_some(best.1)
}

/// Levenshtein's distance.
fn edits(a: &str, b: &str) -> usize {
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, from) in a.bytes().enumerate() {
        let mut diagonal = i;
        let mut left = i + 1;
        for (slot, to) in row.iter_mut().skip(1).zip(b.bytes()) {
            let above = *slot;
            let changed = diagonal + usize::from(from != to);
            left = changed.min(above + 1).min(left + 1);
            diagonal = above;
            *slot = left;
        }
        if let Some(first) = row.first_mut() {
            *first = i + 1;
        }
    }
    row.last().copied().unwrap_or(a.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = r#"
[host]
focus = "linux"
when_done = "halt"
log = "debug"

[[vm]]
name = "linux"
kind = "linux"
kernel = "vmlinuz"
initrd = "initrd.cpio"
cmdline = "console=ttyS0"
memory = "256MiB"
vcpus = 1

[[vm]]
name = "hello-2"
kind = "multiboot"
kernel = "hello"
modules = ["a", "b"]
memory = "1MiB"
large_pages = false
on_reboot = "stop"
[vm.devices]
debug_exit = true
success_code = 0x21
"#;

    #[test]
    fn a_full_configuration() {
        let config = parse(GOOD, "tessera.toml").unwrap();
        assert_eq!(
            config.host,
            HostConfig {
                focus: Some("linux".into()),
                when_done: WhenDone::Halt,
                log: LevelFilter::Debug,
                cores: None,
            }
        );
        let [Ok(linux), Ok(hello)] = &config.vms[..] else {
            panic!("{:?}", config.vms)
        };
        assert_eq!(
            (linux.kind, linux.memory, linux.vcpus),
            (Kind::Linux, 256 << 20, 1)
        );
        assert_eq!((linux.large_pages, linux.on_reboot), (true, OnEnd::Restart));
        assert_eq!(linux.devices, Devices::default());
        assert_eq!(linux.position, Position { line: 7, column: 1 });
        assert_eq!(
            linux.kernel.position,
            Position {
                line: 10,
                column: 10
            }
        );
        assert_eq!((hello.large_pages, hello.on_reboot), (false, OnEnd::Stop));
        assert_eq!(
            (hello.devices.debug_exit, hello.devices.success_code),
            (true, 0x21)
        );
        let images: Vec<_> = hello.images().map(|image| &image.name[..]).collect();
        assert_eq!(images, ["hello", "a", "b"]);
    }

    /// The error when `from` in the good configuration becomes `to`.
    fn refusal(from: &str, to: &str) -> String {
        assert!(GOOD.contains(from), "{from}");
        match parse(&GOOD.replacen(from, to, 1), "t.toml") {
            Err(error) => error.to_string(),
            Ok(config) => {
                let errors: Vec<_> = config
                    .vms
                    .iter()
                    .filter_map(|vm| vm.as_ref().err())
                    .collect();
                assert_eq!(
                    errors.len(),
                    1,
                    "one VM is refused, the other is not harmed"
                );
                errors[0].to_string()
            }
        }
    }

    #[test]
    fn mistakes_have_place_and_remedy() {
        for (from, to, error) in [
            (
                "memory = \"256MiB\"",
                "memroy = \"256MiB\"",
                "t.toml:13:1: VM `linux`: unknown key `memroy` in [[vm]], did you mean `memory`?",
            ),
            (
                "focus",
                "fucos",
                "t.toml:3:1: unknown key `fucos` in [host], did you mean `focus`?",
            ),
            (
                "log =",
                "x =",
                "t.toml:5:1: unknown key `x` in [host], valid keys: `focus`, `when_done`, `log`, `cores`",
            ),
            (
                "[host]",
                "[hosts]",
                "t.toml:2:2: unknown key `hosts` in the file, did you mean `host`?",
            ),
            (
                "debug_exit",
                "debug-exit",
                "t.toml:25:1: VM `hello-2`: unknown key `debug-exit` in [vm.devices], did you mean `debug_exit`?",
            ),
            (
                "vcpus = 1",
                "vcpus = 0",
                "t.toml:14:9: VM `linux`: `vcpus` is 0, but must be a number from 1 to 64",
            ),
            (
                "vcpus = 1",
                "vcpus = 65",
                "t.toml:14:9: VM `linux`: `vcpus` is 65, but must be a number from 1 to 64",
            ),
            (
                "vcpus = 1",
                "vcpus = -1",
                "t.toml:14:9: VM `linux`: `vcpus` is -1, but must be a number from 1 to 64",
            ),
            (
                "\"256MiB\"",
                "256",
                "t.toml:13:10: VM `linux`: `memory` is 256, but must be a size such as \"512MiB\" or \"2GiB\"",
            ),
            (
                "\"256MiB\"",
                "\"256MB\"",
                "t.toml:13:10: VM `linux`: `memory` is \"256MB\", but must be a size such as \"512MiB\" or \"2GiB\"",
            ),
            (
                "\"256MiB\"",
                "\"2TiB\"",
                "t.toml:13:10: VM `linux`: `memory` is \"2TiB\", but must be between 1MiB and 1TiB",
            ),
            (
                "\"256MiB\"",
                "\"1025KiB\"",
                "t.toml:13:10: VM `linux`: `memory` is \"1025KiB\", but must be a multiple of 4KiB",
            ),
            (
                "\"256MiB\"",
                "\"99999999999999999999GiB\"",
                "t.toml:13:10: VM `linux`: `memory` is \"99999999999999999999GiB\", but must be a size such as \"512MiB\" or \"2GiB\"",
            ),
            (
                "memory = \"256MiB\"\n",
                "",
                "t.toml:7:1: VM `linux`: [[vm]] lacks `memory`, which must be a size such as \"512MiB\" or \"2GiB\"",
            ),
            (
                "kind = \"linux\"",
                "kind = \"bsd\"",
                "t.toml:9:8: VM `linux`: `kind` is \"bsd\", but must be one of \"linux\", \"multiboot\", \"pvh\"",
            ),
            (
                "kind = \"multiboot\"",
                "kind = \"linux\"",
                "t.toml:20:11: VM `hello-2`: `modules` is an array of 2, but must be left out for kind \"linux\", which takes one `initrd`",
            ),
            (
                "\"hello-2\"",
                "\"linux\"",
                "t.toml:17:8: VM `linux`: the name `linux` is taken by the VM at 8:8; names must be unique",
            ),
            (
                "\"hello-2\"",
                "\"Hello\"",
                "t.toml:17:8: VM `Hello`: `name` is \"Hello\", but must be 1 to 32 characters of a-z, 0-9 and -",
            ),
            (
                "focus = \"linux\"",
                "focus = \"minix\"",
                "t.toml:3:9: `focus` is \"minix\", but must be the name of a VM in this file",
            ),
            (
                "0x21",
                "2",
                "t.toml:26:16: VM `hello-2`: `success_code` is 2, but must be an odd number: writing v to port 0xf4 gives (v << 1) | 1",
            ),
            (
                "ttyS0",
                "ttyS0\\n",
                "t.toml:12:11: VM `linux`: `cmdline` is \"console=ttyS0\\n\", but must be one line without control characters",
            ),
            (
                "[\"a\", \"b\"]",
                "[\"ä\", 3]",
                "t.toml:20:17: VM `hello-2`: `modules` is 3, but must be a file name of 1 to 255 bytes without control characters",
            ),
            (
                "debug_exit = true",
                "debug_exit = 1",
                "t.toml:25:14: VM `hello-2`: `debug_exit` is 1, but must be true or false",
            ),
        ] {
            assert_eq!(refusal(from, to), error);
        }
        let syntax = refusal("vcpus = 1", "vcpus = ");
        assert!(syntax.starts_with("t.toml:14:"), "{syntax}");
        let long = refusal("console=ttyS0", &"x".repeat(3000));
        assert!(
            long.ends_with("xxx…\", but must be at most 2047 bytes long (it has 3000)"),
            "{long}"
        );
    }

    /// What a VM of 4 vCPUs with these lines becomes, or its error after the file's name.
    fn scheduled(lines: &str) -> Result<VmConfig, String> {
        let text = format!(
            "[[vm]]\nname = 'a'\nkind = 'pvh'\nkernel = 'k'\nmemory = '1MiB'\nvcpus = 4\n{lines}"
        );
        match parse(&text, "t") {
            Ok(mut config) => config.vms.remove(0).map_err(|error| error.to_string()),
            Err(error) => Err(error.to_string()),
        }
    }

    #[test]
    fn a_vm_says_how_it_is_scheduled() {
        let plain = scheduled("").unwrap();
        assert_eq!(
            plain.scheduling,
            Scheduling {
                class: Class::Fair,
                weight: 256,
                cap: None,
                reservation: None,
                placement: Placement::Anywhere,
                position: Position { line: 1, column: 1 },
            }
        );
        assert_eq!(
            (plain.on_poweroff, plain.on_reboot, plain.on_crash),
            (OnEnd::Stop, OnEnd::Restart, OnEnd::Stop)
        );
        assert!(plain.autostart && !plain.background);
        assert!(!plain.devices.watchdog && plain.console_port.is_none());

        let fair = "weight = 10_000\ncap = 150\nreservation = 150\naffinity = [0, 2, '4-7', 65]";
        let fair = scheduled(fair).unwrap().scheduling;
        assert_eq!(
            (fair.weight, fair.cap, fair.reservation),
            (10_000, Some(150), Some(150))
        );
        let Placement::Among(cores) = fair.placement else {
            panic!("{fair:?}")
        };
        assert!(cores.iter().eq([0, 2, 4, 5, 6, 7, 65].map(CoreId)));
        for (one, same) in [("'0-3, 6'", "[0, 1, 2, 3, 6]"), ("5", "[5, '5-5']")] {
            let cores = [one, same].map(|c| scheduled(&format!("affinity = {c}")).unwrap());
            assert_eq!(cores[0].scheduling, cores[1].scheduling);
        }

        let realtime = "class = 'realtime'\npin = [3, 3, 0, 255]\n[vm.realtime]\nbudget = '2ms'\nperiod = '10 ms'";
        let realtime = scheduled(realtime).unwrap().scheduling;
        let (budget, period) = (Nanos(2_000_000), Nanos(10_000_000));
        assert_eq!(realtime.class, Class::Realtime { budget, period });
        assert_eq!(
            realtime.placement,
            Placement::Pinned(Vec::from([3, 3, 0, 255]))
        );
        assert_eq!(realtime.position, Position { line: 8, column: 7 });

        let rest = "class = 'dedicated'\nautostart = false\nbackground = true\non_poweroff = 'restart'\non_reboot = 'hold'\non_crash = 'hold'\nconsole_port = 'com3'\ndevices = { watchdog = true, rng = true, virtio_console = true }";
        let rest = scheduled(rest).unwrap();
        assert_eq!(rest.scheduling.class, Class::Dedicated);
        assert_eq!(
            (rest.on_poweroff, rest.on_reboot, rest.on_crash),
            (OnEnd::Restart, OnEnd::Hold, OnEnd::Hold)
        );
        assert!(!rest.autostart && rest.background && rest.devices.watchdog);
        assert!(rest.devices.rng && rest.devices.virtio_console);
        assert_eq!(rest.console_port, Some(3));
    }

    #[test]
    fn mistakes_in_scheduling_have_place_and_remedy() {
        let fair = "left out, as only class \"fair\"";
        let cores = "cores 0 to 255, as in [0, 2, \"4-7\"] or \"0-3,6\"";
        for (lines, error) in [
            ("weight = 0", "7:10: VM `a`: `weight` is 0, but must be a number from 1 to 10000".into()),
            ("weight = 10001", "7:10: VM `a`: `weight` is 10001, but must be a number from 1 to 10000".into()),
            ("weight = 1.5", "7:10: VM `a`: `weight` is a float, but must be a number from 1 to 10000".into()),
            ("cap = 0", "7:7: VM `a`: `cap` is 0, but must be a number from 1 to 6400".into()),
            ("cap = 6401", "7:7: VM `a`: `cap` is 6401, but must be a number from 1 to 6400".into()),
            ("cap = 99999999999999", "7:7: VM `a`: `cap` is 99999999999999, but must be a number from 1 to 6400".into()),
            ("reservation = 401", "7:15: VM `a`: `reservation` is 401, but must be a number from 1 to 400".into()),
            ("cap = 50\nreservation = 51", "8:15: VM `a`: `reservation` is 51, but must be a number from 1 to 50".into()),
            ("class = 'idle'", "7:9: VM `a`: `class` is \"idle\", but must be one of \"fair\", \"realtime\", \"dedicated\"".into()),
            ("class = 'dedicated'\ncap = 50", format!("8:7: VM `a`: `cap` is 50, but must be {fair} can be capped")),
            ("class = 'dedicated'\nweight = 50", format!("8:10: VM `a`: `weight` is 50, but must be {fair} shares by weight")),
            ("class = 'dedicated'\nreservation = 50", format!("8:15: VM `a`: `reservation` is 50, but must be {fair} needs one")),
            ("class = 'dedicated'\npin = [0, 1, 2, 1]", "8:17: VM `a`: `pin` is 1, but must be another core than those before it: each owns its own".into()),
            ("class = 'realtime'", "1:1: VM `a`: [[vm]] lacks `realtime`, which must be a table with `budget` and `period`".into()),
            ("class = 'realtime'\nrealtime = 5", "8:12: VM `a`: `realtime` is 5, but must be a section [vm.realtime]".into()),
            ("class = 'realtime'\nrealtime = { period = '1ms' }", "8:12: VM `a`: [vm.realtime] lacks `budget`, which must be a time such as \"500us\" or \"10ms\"".into()),
            ("class = 'realtime'\nrealtime = { budget = '11ms', period = '10ms' }", "8:23: VM `a`: `budget` is \"11ms\", but must be between 100us and 10000us".into()),
            ("class = 'realtime'\nrealtime = { budget = '99us', period = '10ms' }", "8:23: VM `a`: `budget` is \"99us\", but must be between 100us and 10000us".into()),
            ("class = 'realtime'\nrealtime = { budget = '1ms', period = '2s' }", "8:39: VM `a`: `period` is \"2s\", but must be between 1000us and 1000000us".into()),
            ("class = 'realtime'\nrealtime = { budget = '1ms', period = '99999999999999999999s' }", "8:39: VM `a`: `period` is \"99999999999999999999s\", but must be a time such as \"500us\" or \"10ms\"".into()),
            ("class = 'realtime'\nrealtime = { buget = '1ms', period = '2s' }", "8:14: VM `a`: unknown key `buget` in [vm.realtime], did you mean `budget`?".into()),
            ("[vm.realtime]\nbudget = '1ms'", "7:1: VM `a`: `realtime` is a table, but must be left out, or `class` be \"realtime\"".into()),
            ("pin = [0, 1]", "7:7: VM `a`: `pin` is an array of 2, but must be an array of 4, the core of each vCPU".into()),
            ("pin = 3", "7:7: VM `a`: `pin` is 3, but must be an array of 4, the core of each vCPU".into()),
            ("pin = [0, 1, 2, 256]", "7:17: VM `a`: `pin` is 256, but must be a number from 0 to 255".into()),
            ("pin = [0, 1, 2, '3']", "7:17: VM `a`: `pin` is \"3\", but must be a number from 0 to 255".into()),
            ("pin = [0, 1, 2, 3]\naffinity = '0-3'", "8:12: VM `a`: `affinity` is \"0-3\", but must be left out, beside `pin`".into()),
            ("affinity = []", format!("7:12: VM `a`: `affinity` is an array of 0, but must be {cores}")),
            ("affinity = [0, '3-2']", format!("7:16: VM `a`: `affinity` is \"3-2\", but must be {cores}")),
            ("affinity = '0-256'", format!("7:12: VM `a`: `affinity` is \"0-256\", but must be {cores}")),
            ("affinity = '0,'", format!("7:12: VM `a`: `affinity` is \"0,\", but must be {cores}")),
            ("affinity = [-1]", format!("7:13: VM `a`: `affinity` is -1, but must be {cores}")),
            ("affinity = [true]", format!("7:13: VM `a`: `affinity` is true, but must be {cores}")),
            ("on_crash = 'reboot'", "7:12: VM `a`: `on_crash` is \"reboot\", but must be one of \"restart\", \"stop\", \"hold\"".into()),
            ("autostart = 'no'", "7:13: VM `a`: `autostart` is \"no\", but must be true or false".into()),
            ("console_port = 'com1'", "7:16: VM `a`: `console_port` is \"com1\", but must be one of \"com2\", \"com3\", \"com4\"".into()),
            ("[host]\ncores = 0", "8:9: `cores` is 0, but must be a number from 1 to 256".into()),
        ] {
            assert_eq!(scheduled(lines).unwrap_err(), format!("t:{error}"), "{lines}");
        }
        let vm = |name: &str| {
            format!(
                "[[vm]]\nname='{name}'\nkind='pvh'\nkernel='k'\nmemory='1MiB'\nconsole_port='com2'\n"
            )
        };
        let both = parse(&(vm("a") + &vm("b")), "t").unwrap();
        assert_eq!(
            both.vms[1].as_ref().unwrap_err().to_string(),
            "t:12:14: VM `b`: `console_port` is \"com2\", but must be a port that no other VM has"
        );
    }

    #[test]
    fn the_machine_must_have_the_cores_a_vm_is_bound_to() {
        for (lines, cores, error) in [
            ("", 1, None),
            ("affinity = '0-3'", 4, None),
            (
                "affinity = '0-3'",
                3,
                Some("7:12: VM `a`: it is bound to core 3, but this machine has 3, counted from 0"),
            ),
            (
                "pin = [0, 1, 0, 9]",
                9,
                Some("7:7: VM `a`: it is bound to core 9, but this machine has 9, counted from 0"),
            ),
            ("class = 'dedicated'", 4, None),
            (
                "class = 'dedicated'",
                3,
                Some("1:1: VM `a`: it has 4 vCPUs of class \"dedicated\", but only 3 cores to own"),
            ),
            (
                "class = 'dedicated'\naffinity = '1-3'",
                8,
                Some(
                    "8:12: VM `a`: it has 4 vCPUs of class \"dedicated\", but only 3 cores to own",
                ),
            ),
        ] {
            let checked = scheduled(lines).unwrap().check_cores("t", cores);
            let found = checked.err().map(|error| error.to_string());
            assert_eq!(found, error.map(|error| format!("t:{error}")), "{lines}");
        }
    }

    #[test]
    fn there_are_one_to_sixteen_vms() {
        for text in ["", "[host]\n", "vm = []"] {
            assert_eq!(parse(text, "t").unwrap_err().problem, Problem::NoVm);
        }
        let one = parse("[vm]\nname = \"a\"", "t").unwrap_err().to_string();
        assert_eq!(
            one,
            "t:1:1: `vm` is a table, but must be written [[vm]], one for each VM"
        );
        let many: String = (0..17)
            .map(|i| format!("[[vm]]\nname='v{i}'\nkind='pvh'\nkernel='k'\nmemory='1MiB'\n"))
            .collect();
        let config = parse(&many, "t").unwrap();
        assert!(config.vms[..16].iter().all(Result::is_ok));
        let error = config.vms[16].as_ref().unwrap_err();
        assert_eq!(error.problem, Problem::TooManyVms { number: 17 });
        assert_eq!(error.position.line, 81);
    }

    #[test]
    fn damaged_text_never_panics() {
        let mut random = crate::testing::Random::new(2);
        for _ in 0..5_000 {
            let mut text = GOOD.as_bytes().to_vec();
            let length = text.len() as u64;
            random.damage(&mut text, 0, length);
            let text = String::from_utf8_lossy(&text);
            match parse(&text, "t") {
                Ok(config) => assert!(!config.vms.is_empty()),
                Err(error) => assert!(!error.to_string().is_empty()),
            }
        }
    }
}
