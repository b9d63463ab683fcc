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

use log::LevelFilter;
mod document;

use document::{Data, Node, Table};

/// Most VMs in a configuration.
pub const MAX_VMS: usize = 16;
/// Most virtual CPUs of a VM.
pub const MAX_VCPUS: u64 = 64;
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

const TOP_KEYS: &[&str] = &["host", "vm"];
const HOST_KEYS: &[&str] = &["focus", "when_done", "log"];
const VM_KEYS: &[&str] = &[
    "name",
    "kind",
    "kernel",
    "initrd",
    "modules",
    "cmdline",
    "memory",
    "vcpus",
    "large_pages",
    "on_reboot",
    "devices",
];
const DEVICE_KEYS: &[&str] = &["debug_exit", "debug_console", "success_code"];

/// A checked configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// The `[host]` section.
    pub host: HostConfig,
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

/// What happens when a guest resets its machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnReboot {
    /// The VM starts again from its images.
    Restart,
    /// The VM ends.
    Stop,
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
    /// What a reset by the guest does.
    pub on_reboot: OnReboot,
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
}

impl Default for Devices {
    fn default() -> Self {
        Self {
            debug_exit: false,
            debug_console: false,
            success_code: 1,
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
    let mut names: Vec<(&str, Position)> = Vec::new();
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
            vm(&value, index, &mut names).map_err(|error| ConfigError {
                vm: name.map(Into::into),
                ..error
            })
        })
        .collect();

    let host = top.sub("host", "[host]", HOST_KEYS)?;
    let focus = host
        .get("focus")
        .map(|value| value.vm_name().map(|name| (name, value)));
    let focus = focus.transpose()?.map(|(name, value)| {
        if names.iter().any(|(known, _)| *known == name) {
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
        },
        vms,
    })
}

/// Checks one `[[vm]]`. Its name, if well formed, is added to `names`.
fn vm<'a>(
    value: &Value<'a>,
    index: usize,
    names: &mut Vec<(&'a str, Position)>,
) -> Result<VmConfig, ConfigError> {
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
    if let Some(&(_, first)) = names.iter().find(|(taken, _)| *taken == name) {
        return Err(name_value.error(Problem::DuplicateName {
            name: name.to_owned(),
            first,
        }));
    }
    names.push((name, name_value.position()));
    let vm = Section::check(value.source, table, unchecked.at, "[[vm]]", VM_KEYS)?;

    let kinds = [Kind::Linux, Kind::Multiboot, Kind::Pvh].map(|kind| (kind.name(), kind));
    let kind = vm
        .need("kind", "\"linux\", \"multiboot\" or \"pvh\"")?
        .one_of(&kinds)?;
    let modules = vm
        .get("modules")
        .map_or(Ok(Vec::new()), |value| value.images("modules"))?;
    if let (Kind::Linux, Some(value), false) = (kind, vm.get("modules"), modules.is_empty()) {
        return Err(value.wrong("left out for kind \"linux\", which takes one `initrd`"));
    }
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
        vcpus: vm.get("vcpus").map_or(Ok(1), |value| value.vcpus())?,
        large_pages: vm.boolean("large_pages", true)?,
        on_reboot: vm.one_of(
            "on_reboot",
            OnReboot::Restart,
            &[("restart", OnReboot::Restart), ("stop", OnReboot::Stop)],
        )?,
        devices: Devices {
            debug_exit: devices.boolean("debug_exit", false)?,
            debug_console: devices.boolean("debug_console", false)?,
            success_code: devices
                .get("success_code")
                .map_or(Ok(1), |value| value.success_code())?,
        },
        position,
    })
}

const NAME_RULE: &str = "1 to 32 characters of a-z, 0-9 and -";
const MEMORY_RULE: &str = "a size such as \"512MiB\" or \"2GiB\"";

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

    fn error(&self, at: usize, problem: Problem) -> ConfigError {
        ConfigError {
            file: self.file.into(),
            position: self.position(at),
            vm: None,
            problem,
        }
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
    ) -> Result<Self, ConfigError> {
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

    fn need(&self, key: &'static str, wanted: &str) -> Result<Value<'a>, ConfigError> {
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
    ) -> Result<Self, ConfigError> {
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

    fn boolean(&self, key: &'static str, default: bool) -> Result<bool, ConfigError> {
        self.get(key)
            .map_or(Ok(default), |value| match value.value.data {
                Data::Boolean(flag) => Ok(flag),
                _ => Err(value.wrong("true or false")),
            })
    }

    fn one_of<T: Copy>(
        &self,
        key: &'static str,
        default: T,
        choices: &[(&str, T)],
    ) -> Result<T, ConfigError> {
        self.get(key)
            .map_or(Ok(default), |value| value.one_of(choices))
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

    fn error(&self, problem: Problem) -> ConfigError {
        self.source.error(self.value.at, problem)
    }

    /// This value is not `wanted`.
    fn wrong(&self, wanted: &str) -> ConfigError {
        let found = match &self.value.data {
            Data::Text(text) => format!("{:?}", clip(text)),
            Data::Integer(digits, _) => clip(digits),
            Data::Boolean(value) => value.to_string(),
            Data::Array(_) | Data::Tables(_) => "an array".to_owned(),
            Data::Table(_) => "a table".to_owned(),
            Data::Other(kind) => format!("a {kind}"),
        };
        self.error(Problem::Value {
            key: self.key,
            found,
            wanted: wanted.to_owned(),
        })
    }

    fn text(&self, wanted: &str) -> Result<&'a str, ConfigError> {
        self.value.text().ok_or_else(|| self.wrong(wanted))
    }

    fn integer(&self, range: RangeInclusive<u64>) -> Option<u64> {
        let Data::Integer(digits, radix) = &self.value.data else {
            return None;
        };
        let number = u64::from_str_radix(digits, *radix).ok()?;
        range.contains(&number).then_some(number)
    }

    fn one_of<T: Copy>(&self, choices: &[(&str, T)]) -> Result<T, ConfigError> {
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

    fn vm_name(&self) -> Result<&'a str, ConfigError> {
        let name = self.text(NAME_RULE)?;
        let valid = |byte| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'-');
        if (1..=MAX_NAME).contains(&name.len()) && name.bytes().all(valid) {
            Ok(name)
        } else {
            Err(self.wrong(NAME_RULE))
        }
    }

    fn image(&self) -> Result<ImageName, ConfigError> {
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

    fn images(&self, key: &'static str) -> Result<Vec<ImageName>, ConfigError> {
        match &self.value.data {
            Data::Array(list) if list.len() <= MAX_MODULES => list
                .iter()
                .map(|value| {
                    Value {
                        source: self.source,
                        key,
                        value,
                    }
                    .image()
                })
                .collect(),
            _ => Err(self.wrong(&format!("an array of at most {MAX_MODULES} file names"))),
        }
    }

    fn cmdline(&self) -> Result<String, ConfigError> {
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

    fn memory(&self) -> Result<u64, ConfigError> {
        let text = self.text(MEMORY_RULE)?;
        let digits = text.len() - text.trim_start_matches(|c: char| c.is_ascii_digit()).len();
        let (number, unit) = text.split_at(digits);
        let unit = match unit.trim_start() {
            "KiB" => 1u64 << 10,
            "MiB" => 1 << 20,
            "GiB" => 1 << 30,
            "TiB" => 1 << 40,
            _ => return Err(self.wrong(MEMORY_RULE)),
        };
        let bytes = number
            .parse()
            .ok()
            .and_then(|number: u64| number.checked_mul(unit));
        match bytes {
            Some(bytes) if !(MIN_MEMORY..=MAX_MEMORY).contains(&bytes) => {
                Err(self.wrong("between 1MiB and 1TiB"))
            }
            Some(bytes) if bytes % MEMORY_STEP != 0 => Err(self.wrong("a multiple of 4KiB")),
            Some(bytes) => Ok(bytes),
            None => Err(self.wrong(MEMORY_RULE)),
        }
    }

    fn vcpus(&self) -> Result<u32, ConfigError> {
        match self.integer(0..=u64::from(u32::MAX)) {
            Some(0) => Err(self.wrong("at least 1: a VM without a CPU cannot run")),
            Some(count) if count <= MAX_VCPUS => Ok(u32::try_from(count).unwrap_or(1)),
            _ if MAX_VCPUS == 1 => Err(self.wrong("1: this version gives a VM one virtual CPU")),
            _ => Err(self.wrong(&format!("a number from 1 to {MAX_VCPUS}"))),
        }
    }

    fn success_code(&self) -> Result<u32, ConfigError> {
        self.integer(0..=u64::from(u32::MAX))
            .filter(|code| code & 1 == 1)
            .and_then(|code| u32::try_from(code).ok())
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
            }
        );
        let [Ok(linux), Ok(hello)] = &config.vms[..] else {
            panic!("{:?}", config.vms)
        };
        assert_eq!(
            (linux.kind, linux.memory, linux.vcpus),
            (Kind::Linux, 256 << 20, 1)
        );
        assert_eq!(
            (linux.large_pages, linux.on_reboot),
            (true, OnReboot::Restart)
        );
        assert_eq!(linux.devices, Devices::default());
        assert_eq!(linux.position, Position { line: 7, column: 1 });
        assert_eq!(
            linux.kernel.position,
            Position {
                line: 10,
                column: 10
            }
        );
        assert_eq!(
            (hello.large_pages, hello.on_reboot),
            (false, OnReboot::Stop)
        );
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
                "t.toml:5:1: unknown key `x` in [host], valid keys: `focus`, `when_done`, `log`",
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
                "t.toml:14:9: VM `linux`: `vcpus` is 0, but must be at least 1: a VM without a CPU cannot run",
            ),
            (
                "vcpus = 1",
                "vcpus = 4",
                "t.toml:14:9: VM `linux`: `vcpus` is 4, but must be 1: this version gives a VM one virtual CPU",
            ),
            (
                "vcpus = 1",
                "vcpus = -1",
                "t.toml:14:9: VM `linux`: `vcpus` is -1, but must be 1: this version gives a VM one virtual CPU",
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
                "t.toml:20:11: VM `hello-2`: `modules` is an array, but must be left out for kind \"linux\", which takes one `initrd`",
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
