//! What can be typed at the monitor: one table of verbs, from which parsing, help and completion
//! are made, and the errors that tell a person what would have been right.
//!
//! The verbs are those that users of `xl` and `virsh` know. A verb may be cut short as long as it
//! is unique, except for those that end the machine. A VM is named as in the configuration, or by
//! its number in `list`, a port as `switch/port`, or by its name alone where no other switch has
//! one of that name; where there is one switch it goes without saying.

use crate::network::{At, Net};
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;
use core::fmt;
use sched::{CoreSet, MAX_WEIGHT};

/// A switch and its ports, by name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SwitchNames {
    name: String,
    /// Number and `switch/port`.
    ports: Vec<(u16, String)>,
}

impl SwitchNames {
    /// A switch without ports.
    #[must_use]
    pub fn new(name: &str) -> Self {
        Self {
            name: name.into(),
            ports: Vec::new(),
        }
    }

    /// Adds a port of this number.
    pub fn add(&mut self, number: u16, name: &str) {
        self.ports.push((number, format!("{}/{name}", self.name)));
    }

    /// Its ports' names, each without and with the switch's.
    fn ports(&self) -> impl Iterator<Item = (u16, &str, &str)> {
        let cut = self.name.len() + 1;
        let ports = self.ports.iter();
        ports.map(move |(number, full)| (*number, full.get(cut..).unwrap_or(full), full.as_str()))
    }
}

/// What can be named at the monitor, each in the order of its numbers.
#[derive(Clone, Copy, Debug)]
pub struct Names<'a> {
    /// The VMs.
    pub vms: &'a [&'a str],
    /// The switches.
    pub switches: &'a [SwitchNames],
}

impl<'a> Names<'a> {
    /// The ports that a word can mean.
    fn ports(self, word: &str) -> impl Iterator<Item = (At, &'a str)> {
        let all = self
            .switches
            .iter()
            .enumerate()
            .flat_map(|(switch, names)| {
                let at = move |port| At { switch, port };
                names
                    .ports()
                    .map(move |(port, short, full)| (at(port), short, full))
            });
        all.filter_map(move |(at, short, full)| {
            (word == short || word == full).then_some((at, full))
        })
    }

    fn switch(self, word: &str) -> Option<usize> {
        self.switches.iter().position(|switch| switch.name == word)
    }
}

/// A line at the monitor, understood. VMs are numbers, from 0 in the order of the configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Command {
    /// Explain all verbs, or one.
    Help(Option<&'static Verb>),
    /// The VMs and their states.
    List,
    /// All about one VM.
    Info(usize),
    /// Start a VM that is not running.
    Start(usize),
    /// Stop its vCPUs where they are.
    Pause(usize),
    /// Let them go on.
    Resume(usize),
    /// Press its ACPI power button.
    Shutdown(usize),
    /// Pull its reset line.
    Reset(usize),
    /// End it now.
    Stop(usize),
    /// Give it the keyboard.
    Console(usize),
    /// CPU time, exits by reason, share and stolen time.
    Top,
    /// The machine's memory and who has it.
    Mem,
    /// The last lines of the log; a page without a number.
    Log(Option<usize>),
    /// Inject a non-maskable interrupt.
    InjectNmi(usize),
    /// Registers and a backtrace.
    Dump(usize),
    /// Change how a VM is scheduled; nothing to change means: show.
    Sched(usize, Share),
    /// Something about the switches.
    Net(Net),
    /// End all VMs and restart the machine.
    Reboot,
    /// End all VMs and switch the machine off.
    PowerOff,
    /// End all VMs and leave as the configuration says.
    Quit,
}

/// What `sched` changes; `None` leaves it as it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Share {
    /// Weight against other VMs, [`WEIGHTS`].
    pub weight: Option<u32>,
    /// Per cent of one core, [`CAPS`]; 0 lifts the cap.
    pub cap: Option<u32>,
    /// The cores it may run on. Whether they are there is for the machine to say.
    pub pin: Option<CoreSet>,
}

/// Weights that `sched` takes.
pub const WEIGHTS: core::ops::RangeInclusive<u32> = 1..=MAX_WEIGHT;
/// Caps that `sched` takes, in per cent of one core.
pub const CAPS: core::ops::RangeInclusive<u32> = 0..=6400;
/// Reads `0-3,8` or `all`.
fn cores(text: &str) -> Option<CoreSet> {
    if text == "all" {
        return Some(CoreSet::ALL);
    }
    let mut set = CoreSet::EMPTY;
    set.add_list(text)?;
    Some(set)
}

/// Digits alone: Rust's own parser takes a sign as well.
fn number(text: &str) -> Option<u32> {
    text.bytes()
        .all(|byte| byte.is_ascii_digit())
        .then(|| text.parse().ok())?
}

/// What follows a verb, and what that makes of it.
#[derive(Clone, Copy)]
enum Takes {
    Nothing(fn() -> Command),
    Vm(fn(usize) -> Command),
    /// `nmi VM`
    Inject,
    /// `[VERB]`
    Verb,
    /// `[LINES]`
    Lines,
    /// `VM [weight=N] [cap=N] [pin=CORES]`
    Share,
    /// `[SWITCH]`
    Switch(fn(Option<usize>) -> Net),
    /// `show [SWITCH]`
    ShowSwitch,
    /// `show PORT`
    ShowPort,
    /// `[SWITCH]` and a text.
    Text(fn(usize, String) -> Net, &'static str),
    /// `[SWITCH] [add NAME … | del NAME]`
    Mirror,
    /// `PORT [off]`
    Capture,
    /// `PORT up|down`
    Link,
}

/// An entry of the table of verbs.
pub struct Verb {
    name: &'static str,
    takes: Takes,
    /// It ends the machine, so it must be typed whole.
    whole: bool,
    help: &'static str,
}

impl Verb {
    const fn new(name: &'static str, takes: Takes, help: &'static str) -> Self {
        Self {
            name,
            takes,
            whole: false,
            help,
        }
    }

    const fn whole(self) -> Self {
        Self {
            whole: true,
            ..self
        }
    }

    /// The verb and its arguments.
    #[must_use]
    pub const fn name(&self) -> &'static str {
        self.name
    }

    /// Its arguments, as help shows them.
    #[must_use]
    pub const fn arguments(&self) -> &'static str {
        match self.takes {
            Takes::Nothing(_) => "",
            Takes::Vm(_) => " VM",
            Takes::Inject => " nmi VM",
            Takes::Verb => " [VERB]",
            Takes::Lines => " [LINES]",
            Takes::Share => " VM [weight=1-10000] [cap=PERCENT] [pin=CORES]",
            Takes::Switch(_) => " [SWITCH]",
            Takes::ShowSwitch => " show [SWITCH]",
            Takes::ShowPort => " show [SWITCH/]PORT",
            Takes::Text(_, arguments) => arguments,
            Takes::Mirror => " [SWITCH] [add NAME SETTINGS | del NAME]",
            Takes::Capture => " [SWITCH/]PORT [off]",
            Takes::Link => " [SWITCH/]PORT up|down",
        }
    }

    /// What it does.
    #[must_use]
    pub const fn help(&self) -> &'static str {
        self.help
    }
}

impl fmt::Debug for Verb {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name)
    }
}

impl PartialEq for Verb {
    fn eq(&self, other: &Self) -> bool {
        self.name == other.name
    }
}
impl Eq for Verb {}

/// All verbs, as help lists them.
pub static VERBS: [Verb; 31] = {
    use Command as C;
    use Takes::{Nothing, Switch, Text, Vm};
    [
        Verb::new("help", Takes::Verb, "this list, or one verb"),
        Verb::new("list", Nothing(|| C::List), "the VMs and their states"),
        Verb::new("info", Vm(C::Info), "all about one VM"),
        Verb::new("start", Vm(C::Start), "start a VM that is not running"),
        Verb::new("pause", Vm(C::Pause), "stop its vCPUs where they are"),
        Verb::new("resume", Vm(C::Resume), "let a paused VM go on"),
        Verb::new("shutdown", Vm(C::Shutdown), "press its ACPI power button"),
        Verb::new("button", Vm(C::Shutdown), "the same as shutdown"),
        Verb::new("reset", Vm(C::Reset), "reset it as the button on a PC does"),
        Verb::new("stop", Vm(C::Stop), "end it now, without asking its system"),
        Verb::new("destroy", Vm(C::Stop), "the same as stop"),
        Verb::new("console", Vm(C::Console), "give it the keyboard"),
        Verb::new(
            "top",
            Nothing(|| C::Top),
            "CPU time, exits, share, stolen time",
        ),
        Verb::new(
            "mem",
            Nothing(|| C::Mem),
            "the machine's memory and who has it",
        ),
        Verb::new("log", Takes::Lines, "the last lines of the log"),
        Verb::new("inject", Takes::Inject, "inject a non-maskable interrupt"),
        Verb::new("dump", Vm(C::Dump), "its registers and a backtrace"),
        Verb::new(
            "sched",
            Takes::Share,
            "show or change its share of the cores",
        ),
        Verb::new(
            "switch",
            Takes::ShowSwitch,
            "switches, their ports and who is behind",
        ),
        Verb::new("port", Takes::ShowPort, "what a port counted and dropped"),
        Verb::new(
            "fdb",
            Switch(Net::Addresses),
            "the addresses that are known and learned",
        ),
        Verb::new("flows", Switch(Net::Flows), "flows with what they counted"),
        Verb::new(
            "add-flow",
            Text(Net::AddFlow, " [SWITCH] FLOW"),
            "add a flow, in the words of ovs-ofctl",
        ),
        Verb::new(
            "del-flow",
            Text(Net::DelFlow, " [SWITCH] [strict] MATCH"),
            "remove the flows that match",
        ),
        Verb::new("mirror", Takes::Mirror, "show or change mirrors"),
        Verb::new(
            "capture",
            Takes::Capture,
            "write a port's frames out as pcap",
        ),
        Verb::new("link", Takes::Link, "plug a port's cable in or pull it"),
        Verb::new(
            "reboot",
            Nothing(|| C::Reboot),
            "end all VMs and restart the machine",
        )
        .whole(),
        Verb::new(
            "poweroff",
            Nothing(|| C::PowerOff),
            "end all VMs, switch the machine off",
        )
        .whole(),
        Verb::new(
            "quit",
            Nothing(|| C::Quit),
            "end all VMs, leave as configured",
        )
        .whole(),
        Verb::new("exit", Nothing(|| C::Quit), "the same as quit").whole(),
    ]
};

/// What is wrong with a line, and what would be right.
#[derive(Clone, Copy, Debug)]
pub enum CommandError<'a> {
    /// No verb begins like this; perhaps another was meant.
    UnknownVerb(&'a str, Option<&'static str>),
    /// More than one verb begins like this.
    Ambiguous(&'a str),
    /// The verb ends the machine and is cut short.
    TypeWhole(&'a str, &'static str),
    /// No VM has this name or number.
    UnknownVm(&'a str, &'a [&'a str]),
    /// No switch has this name.
    UnknownSwitch(&'a str, &'a [SwitchNames]),
    /// There are several switches, or none.
    WhichSwitch(&'a [SwitchNames]),
    /// No port has this name.
    UnknownPort(&'a str, Names<'a>),
    /// Ports of several switches have this name.
    WhichPort(&'a str, Names<'a>),
    /// A word is missing.
    Missing(&'static Verb),
    /// This word is too much.
    TooMany(&'a str, &'static Verb),
    /// The word is not what the verb takes at this place.
    Wrong(&'a str, &'static Verb),
    /// A setting's value is out of range.
    OutOfRange {
        /// `name=value` as typed.
        word: &'a str,
        /// What it may be.
        right: &'static str,
    },
}

impl fmt::Display for CommandError<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let usage = |f: &mut fmt::Formatter<'_>, verb: &Verb| {
            write!(f, "; it is `{}{}`", verb.name, verb.arguments())
        };
        match self {
            Self::UnknownVerb(word, near) => {
                write!(f, "unknown verb `{}`", Shown(word))?;
                if let Some(near) = near {
                    write!(f, ": did you mean `{near}`?")?;
                }
                f.write_str(" (`help` lists all)")
            }
            Self::Ambiguous(word) => {
                write!(f, "`{}` is short for more than one verb:", Shown(word))?;
                let mut fit = VERBS.iter().filter(|verb| verb.name.starts_with(word));
                fit.try_for_each(|verb| write!(f, " {}", verb.name))
            }
            Self::TypeWhole(word, verb) => {
                write!(
                    f,
                    "`{}` ends the machine: type `{verb}` in full",
                    Shown(word)
                )
            }
            Self::UnknownVm(word, names) => {
                write!(f, "no VM is named `{}`; there are:", Shown(word))?;
                list(f, names.iter().copied())
            }
            Self::UnknownSwitch(word, switches) => {
                write!(f, "no switch is named `{}`; there are:", Shown(word))?;
                list(f, switches.iter().map(|switch| switch.name.as_str()))
            }
            Self::WhichSwitch(switches) => {
                f.write_str("say which switch, before all else; there are:")?;
                list(f, switches.iter().map(|switch| switch.name.as_str()))
            }
            Self::UnknownPort(word, names) => {
                write!(f, "no port is named `{}`; there are:", Shown(word))?;
                let ports = names.switches.iter().flat_map(SwitchNames::ports);
                list(f, ports.map(|(_, _, full)| full))
            }
            Self::WhichPort(word, names) => {
                write!(f, "more than one port is named `{}`:", Shown(word))?;
                list(f, names.ports(word).map(|(_, full)| full))
            }
            Self::Missing(verb) => {
                write!(f, "`{}` needs more", verb.name)?;
                usage(f, verb)
            }
            Self::TooMany(word, verb) => {
                write!(f, "`{}` is one word too many", Shown(word))?;
                usage(f, verb)
            }
            Self::Wrong(word, verb) => {
                write!(f, "`{}` does not belong there", Shown(word))?;
                usage(f, verb)
            }
            Self::OutOfRange { word, right } => {
                write!(f, "`{}` is out of range: {right}", Shown(word))
            }
        }
    }
}

/// Lists names.
fn list<'a>(f: &mut fmt::Formatter<'_>, names: impl Iterator<Item = &'a str>) -> fmt::Result {
    let mut any = false;
    for name in names {
        any = true;
        write!(f, " {name}")?;
    }
    if any { Ok(()) } else { f.write_str(" none") }
}

/// A typed word, cut where it would fill the screen.
struct Shown<'a>(&'a str);

impl fmt::Display for Shown<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0.char_indices().nth(32) {
            Some((end, _)) => write!(f, "{}...", self.0.get(..end).unwrap_or("")),
            None => f.write_str(self.0),
        }
    }
}

/// The words of a line that are left.
#[derive(Clone, Copy)]
struct Words<'a>(&'a str);

impl<'a> Iterator for Words<'a> {
    type Item = &'a str;

    fn next(&mut self) -> Option<&'a str> {
        let text = self.0.trim_ascii_start();
        let space = |c: char| c.is_ascii_whitespace();
        let (word, rest) = text.split_once(space).unwrap_or((text, ""));
        self.0 = rest;
        (!word.is_empty()).then_some(word)
    }
}

/// Reads a line; `None` when it is empty.
///
/// # Errors
/// What is wrong, and what would be right.
#[inline(never)]
pub fn parse<'a>(line: &'a str, names: Names<'a>) -> Result<Option<Command>, CommandError<'a>> {
    let mut words = Words(line);
    let Some(word) = words.next() else {
        return Ok(None);
    };
    let verb = find(word)?;
    let mut need = || words.next().ok_or(CommandError::Missing(verb));
    let vm =
        |word: &'a str| find_vm(word, names.vms).ok_or(CommandError::UnknownVm(word, names.vms));
    let wrong = |word| Err(CommandError::Wrong(word, verb));
    let command = match &verb.takes {
        Takes::Nothing(command) => command(),
        Takes::Vm(command) => command(vm(need()?)?),
        Takes::Inject => match need()? {
            "nmi" => Command::InjectNmi(vm(need()?)?),
            other => return Err(CommandError::Wrong(other, verb)),
        },
        Takes::Verb => Command::Help(match words.next() {
            Some(word) => Some(find_any(word)?),
            None => None,
        }),
        Takes::Lines => Command::Log(match words.next() {
            Some(word) => match number(word) {
                Some(lines) => Some(lines as usize),
                None => return Err(CommandError::Wrong(word, verb)),
            },
            None => None,
        }),
        Takes::Share => {
            let vm = vm(need()?)?;
            let mut share = Share::default();
            for word in words.by_ref() {
                set(&mut share, word, verb)?;
            }
            Command::Sched(vm, share)
        }
        Takes::Switch(ask) => Command::Net(ask(any_switch(words.next(), names)?)),
        Takes::ShowSwitch => match need()? {
            "show" => Command::Net(Net::Switches(any_switch(words.next(), names)?)),
            other => return wrong(other),
        },
        Takes::ShowPort => match need()? {
            "show" => Command::Net(Net::Port(find_port(need()?, names)?)),
            other => return wrong(other),
        },
        Takes::Text(ask, _) => {
            let switch = one_switch(&mut words, names)?;
            Command::Net(ask(switch, rest(&mut words, verb)?))
        }
        Takes::Mirror => Command::Net(mirror(&mut words, names, verb)?),
        Takes::Capture => {
            let port = find_port(need()?, names)?;
            match words.next() {
                None => Command::Net(Net::Capture(port, true)),
                Some("off") => Command::Net(Net::Capture(port, false)),
                Some(other) => return wrong(other),
            }
        }
        Takes::Link => {
            let port = find_port(need()?, names)?;
            match need()? {
                "up" => Command::Net(Net::Link(port, true)),
                "down" => Command::Net(Net::Link(port, false)),
                other => return wrong(other),
            }
        }
    };
    match words.next() {
        Some(word) => Err(CommandError::TooMany(word, verb)),
        None => Ok(Some(command)),
    }
}

/// All that is left, of which there must be some.
fn rest<'a>(words: &mut Words<'a>, verb: &'static Verb) -> Result<String, CommandError<'a>> {
    let text = core::mem::take(&mut words.0).trim_ascii();
    match text {
        "" => Err(CommandError::Missing(verb)),
        text => Ok(text.into()),
    }
}

/// Reads what follows `mirror`.
fn mirror<'a>(
    words: &mut Words<'a>,
    names: Names<'a>,
    verb: &'static Verb,
) -> Result<Net, CommandError<'a>> {
    let mut ahead = *words;
    match (ahead.next(), ahead.next()) {
        (Some("add" | "del"), _) => {}
        (Some(word), None) => {
            *words = ahead;
            return Ok(Net::Mirrors(any_switch(Some(word), names)?));
        }
        (Some(word), Some(_)) => {
            any_switch(Some(word), names)?;
        }
        (None, _) => return Ok(Net::Mirrors(None)),
    }
    let switch = one_switch(words, names)?;
    match words.next() {
        Some("add") => Ok(Net::AddMirror(switch, rest(words, verb)?)),
        Some("del") => {
            let name = words.next().ok_or(CommandError::Missing(verb))?;
            Ok(Net::DelMirror(switch, name.into()))
        }
        Some(other) => Err(CommandError::Wrong(other, verb)),
        None => Err(CommandError::Missing(verb)),
    }
}

/// Reads one `name=value` of `sched`.
fn set<'a>(share: &mut Share, word: &'a str, verb: &'static Verb) -> Result<(), CommandError<'a>> {
    let Some((key, value)) = word.split_once('=') else {
        return Err(CommandError::Wrong(word, verb));
    };
    let right = match key {
        "weight" => {
            share.weight = number(value).filter(|weight| WEIGHTS.contains(weight));
            share.weight.is_none().then_some("a weight is 1 to 10000")
        }
        "cap" => {
            share.cap = number(value).filter(|cap| CAPS.contains(cap));
            let right = "a cap is in per cent of one core, up to 6400, and 0 lifts it";
            share.cap.is_none().then_some(right)
        }
        "pin" => {
            share.pin = cores(value);
            let right = "cores are like `0-3,8`, each below 256, or `all`";
            share.pin.is_none().then_some(right)
        }
        _ => return Err(CommandError::Wrong(word, verb)),
    };
    right.map_or(Ok(()), |right| {
        Err(CommandError::OutOfRange { word, right })
    })
}

/// Gives all words that the last word of an unfinished line could become, and says how much of
/// it is typed.
#[inline(never)]
pub fn complete<'a>(line: &str, names: Names<'a>, give: &mut dyn FnMut(&'a str)) -> usize {
    let (before, word) = line.rsplit_once(' ').unwrap_or(("", line));
    let mut words = Words(before);
    let verb = words.next();
    let first = words.next();
    let place = usize::from(verb.is_some()) + usize::from(first.is_some()) + words.count();
    let mut offer = |candidate: &'a str| {
        if candidate.starts_with(word) {
            give(candidate);
        }
    };
    let verbs = || VERBS.iter().map(|verb| verb.name);
    let switches = || names.switches.iter().map(|switch| switch.name.as_str());
    match verb.map(find_any) {
        None => verbs().for_each(offer),
        Some(Ok(verb)) => match (&verb.takes, place) {
            (Takes::Verb, 1) => verbs().for_each(offer),
            (Takes::Inject, 1) => offer("nmi"),
            (Takes::Vm(_) | Takes::Share, 1) | (Takes::Inject, 2) => {
                names.vms.iter().for_each(|name| offer(name));
            }
            (Takes::Share, _) => ["weight=", "cap=", "pin="].into_iter().for_each(offer),
            (Takes::ShowSwitch | Takes::ShowPort, 1) => offer("show"),
            (Takes::Switch(_) | Takes::Text(..), 1) | (Takes::ShowSwitch, 2) => {
                switches().for_each(offer);
            }
            (Takes::Capture | Takes::Link, 1) | (Takes::ShowPort, 2) => {
                let ports = names.switches.iter().flat_map(SwitchNames::ports);
                ports.for_each(|(_, short, full)| {
                    let alone = names.ports(short).count() == 1;
                    offer(if alone && !word.contains('/') {
                        short
                    } else {
                        full
                    });
                });
            }
            (Takes::Capture, 2) => offer("off"),
            (Takes::Link, 2) => ["up", "down"].into_iter().for_each(offer),
            (Takes::Mirror, 1) => switches().chain(["add", "del"]).for_each(offer),
            (Takes::Mirror, 2) if first.is_some_and(|word| names.switch(word).is_some()) => {
                ["add", "del"].into_iter().for_each(offer);
            }
            (Takes::Mirror, 3..) => crate::network::MIRROR_WORDS.into_iter().for_each(offer),
            _ => {}
        },
        Some(Err(_)) => {}
    }
    word.len()
}

/// The VM of a name, or of a number as `list` has it.
fn find_vm(word: &str, names: &[&str]) -> Option<usize> {
    let named = names.iter().position(|name| *name == word);
    named.or_else(|| {
        let index = (number(word)? as usize).checked_sub(1)?;
        (index < names.len()).then_some(index)
    })
}

/// The port of a name.
fn find_port<'a>(word: &'a str, names: Names<'a>) -> Result<At, CommandError<'a>> {
    let mut found = names.ports(word);
    match (found.next(), found.next()) {
        (Some((at, _)), None) => Ok(at),
        (None, _) => Err(CommandError::UnknownPort(word, names)),
        (Some(_), Some(_)) => Err(CommandError::WhichPort(word, names)),
    }
}

/// The switch of a name; without a word all of them.
fn any_switch<'a>(
    word: Option<&'a str>,
    names: Names<'a>,
) -> Result<Option<usize>, CommandError<'a>> {
    let find = |word| {
        let found = names.switch(word);
        found.ok_or(CommandError::UnknownSwitch(word, names.switches))
    };
    word.map(find).transpose()
}

/// The switch that the next word names, or else the only one.
fn one_switch<'a>(words: &mut Words<'a>, names: Names<'a>) -> Result<usize, CommandError<'a>> {
    let mut ahead = *words;
    if let Some(switch) = ahead.next().and_then(|word| names.switch(word)) {
        *words = ahead;
        return Ok(switch);
    }
    match names.switches {
        [_] => Ok(0),
        switches => Err(CommandError::WhichSwitch(switches)),
    }
}

/// The verb of a word that is to be carried out.
fn find(word: &str) -> Result<&'static Verb, CommandError<'_>> {
    let verb = find_any(word)?;
    if verb.whole && verb.name != word {
        return Err(CommandError::TypeWhole(word, verb.name));
    }
    Ok(verb)
}

/// The verb of a word.
fn find_any(word: &str) -> Result<&'static Verb, CommandError<'_>> {
    if let Some(verb) = VERBS.iter().find(|verb| verb.name == word) {
        return Ok(verb);
    }
    let mut fit = VERBS.iter().filter(|verb| verb.name.starts_with(word));
    match (fit.next(), fit.next()) {
        (Some(verb), None) => Ok(verb),
        (Some(_), Some(_)) => Err(CommandError::Ambiguous(word)),
        (None, _) => Err(CommandError::UnknownVerb(word, nearest(word))),
    }
}

/// The longest verb there is, with room for a slip.
const LONGEST: usize = 12;

/// The verb that takes the fewest slips of the fingers to get from, if few.
fn nearest(word: &str) -> Option<&'static str> {
    let distances = VERBS
        .iter()
        .map(|verb| (distance(word, verb.name), verb.name));
    let (slips, name) = distances.min_by_key(|(slips, _)| *slips)?;
    (slips <= 2 && slips < word.len()).then_some(name)
}

/// Insertions, deletions and replacements from one word to the other.
fn distance(a: &str, b: &str) -> usize {
    if a.len() > LONGEST || b.len() > LONGEST {
        return usize::MAX;
    }
    let mut row: [usize; LONGEST + 1] = core::array::from_fn(|index| index);
    for (i, x) in a.bytes().enumerate() {
        let (mut diagonal, mut left) = (i, i + 1);
        for (cell, y) in row.iter_mut().skip(1).zip(b.bytes()) {
            let replaced = diagonal + usize::from(x != y);
            diagonal = *cell;
            left = replaced.min(left + 1).min(*cell + 1);
            *cell = left;
        }
        if let Some(first) = row.first_mut() {
            *first = i + 1;
        }
    }
    row.get(b.len()).copied().unwrap_or(usize::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::string::{String, ToString};
    use alloc::vec::Vec;
    use sched::CoreId;

    const VMS: [&str; 3] = ["linux", "hello", "2"];

    /// Two switches; each has a port `up`.
    fn switches() -> [SwitchNames; 2] {
        let [mut lan, mut wan] = ["lan", "wan"].map(SwitchNames::new);
        lan.add(1, "up");
        lan.add(2, "linux");
        wan.add(1, "up");
        wan.add(7, "hello");
        [lan, wan]
    }

    fn read_with(line: &str, switches: &[SwitchNames]) -> Result<Option<Command>, String> {
        let vms = &VMS;
        parse(line, Names { vms, switches }).map_err(|error| error.to_string())
    }

    fn read(line: &str) -> Result<Option<Command>, String> {
        read_with(line, &switches())
    }

    #[test]
    fn verbs_names_and_numbers_are_understood() {
        let share = |weight, cap, pin| Command::Sched(0, Share { weight, cap, pin });
        let pin = cores("1-3,8").unwrap();
        assert!(pin.iter().eq([1, 2, 3, 8].map(CoreId)));
        for (line, command) in [
            ("list", Command::List),
            ("  list  ", Command::List),
            ("lis", Command::List),
            ("info linux", Command::Info(0)),
            ("info 1", Command::Info(0)),
            // A name goes before a number.
            ("info 2", Command::Info(2)),
            ("button hello", Command::Shutdown(1)),
            ("shutdown hello", Command::Shutdown(1)),
            ("destroy hello", Command::Stop(1)),
            ("inject nmi linux", Command::InjectNmi(0)),
            ("log", Command::Log(None)),
            ("log 5", Command::Log(Some(5))),
            ("sched linux", share(None, None, None)),
            (
                "sched linux weight=512 cap=50",
                share(Some(512), Some(50), None),
            ),
            ("sched linux pin=1-3,8", share(None, None, Some(pin))),
            ("sched linux pin=all", share(None, None, Some(CoreSet::ALL))),
            ("quit", Command::Quit),
            ("exit", Command::Quit),
        ] {
            assert_eq!(read(line), Ok(Some(command)), "{line}");
        }
        assert_eq!(read(""), Ok(None));
        assert_eq!(read(" \t "), Ok(None));
    }

    #[test]
    fn verbs_of_the_network_find_switches_and_ports() {
        let at = |switch, port| At { switch, port };
        for (line, net) in [
            ("switch show", Net::Switches(None)),
            ("switch show wan", Net::Switches(Some(1))),
            ("port show linux", Net::Port(at(0, 2))),
            ("port show wan/up", Net::Port(at(1, 1))),
            ("fdb", Net::Addresses(None)),
            ("flows lan", Net::Flows(Some(0))),
            (
                "add-flow wan  priority=5, arp actions=drop ",
                Net::AddFlow(1, "priority=5, arp actions=drop".into()),
            ),
            (
                "del-flow lan strict arp",
                Net::DelFlow(0, "strict arp".into()),
            ),
            ("mirror", Net::Mirrors(None)),
            ("mirror wan", Net::Mirrors(Some(1))),
            (
                "mirror lan add m select_all capture",
                Net::AddMirror(0, "m select_all capture".into()),
            ),
            ("mirror lan del m", Net::DelMirror(0, "m".into())),
            ("capture lan/up", Net::Capture(at(0, 1), true)),
            ("capture hello off", Net::Capture(at(1, 7), false)),
            ("link hello down", Net::Link(at(1, 7), false)),
            ("link hello up", Net::Link(at(1, 7), true)),
        ] {
            assert_eq!(read(line), Ok(Some(Command::Net(net))), "{line}");
        }
        // One switch need not be named.
        let [lan, _] = switches();
        let alone = core::slice::from_ref(&lan);
        for (line, net) in [
            (
                "add-flow arp,actions=drop",
                Net::AddFlow(0, "arp,actions=drop".into()),
            ),
            (
                "mirror add m capture",
                Net::AddMirror(0, "m capture".into()),
            ),
            ("mirror del m", Net::DelMirror(0, "m".into())),
            ("link up down", Net::Link(at(0, 1), false)),
        ] {
            assert_eq!(
                read_with(line, alone),
                Ok(Some(Command::Net(net))),
                "{line}"
            );
        }
    }

    #[test]
    fn errors_say_what_would_be_right() {
        for (line, error) in [
            (
                "lisst",
                "unknown verb `lisst`: did you mean `list`? (`help` lists all)",
            ),
            ("xyzzy", "unknown verb `xyzzy` (`help` lists all)"),
            (
                "re",
                "`re` is short for more than one verb: resume reset reboot",
            ),
            ("q", "`q` ends the machine: type `quit` in full"),
            ("pow", "`pow` ends the machine: type `poweroff` in full"),
            ("info", "`info` needs more; it is `info VM`"),
            (
                "info linus",
                "no VM is named `linus`; there are: linux hello 2",
            ),
            ("info 4", "no VM is named `4`; there are: linux hello 2"),
            (
                "info linux hello",
                "`hello` is one word too many; it is `info VM`",
            ),
            ("list all", "`all` is one word too many; it is `list`"),
            (
                "inject mce linux",
                "`mce` does not belong there; it is `inject nmi VM`",
            ),
            ("log -1", "`-1` does not belong there; it is `log [LINES]`"),
            (
                "switch",
                "`switch` needs more; it is `switch show [SWITCH]`",
            ),
            (
                "switch list",
                "`list` does not belong there; it is `switch show [SWITCH]`",
            ),
            (
                "switch show man",
                "no switch is named `man`; there are: lan wan",
            ),
            ("flows man", "no switch is named `man`; there are: lan wan"),
            (
                "add-flow actions=drop",
                "say which switch, before all else; there are: lan wan",
            ),
            (
                "add-flow lan",
                "`add-flow` needs more; it is `add-flow [SWITCH] FLOW`",
            ),
            (
                "port show tap",
                "no port is named `tap`; there are: lan/up lan/linux wan/up wan/hello",
            ),
            (
                "port show up",
                "more than one port is named `up`: lan/up wan/up",
            ),
            (
                "link hello sideways",
                "`sideways` does not belong there; it is `link [SWITCH/]PORT up|down`",
            ),
            (
                "mirror man del m",
                "no switch is named `man`; there are: lan wan",
            ),
            (
                "mirror lan del m n",
                "`n` is one word too many; it is `mirror [SWITCH] [add NAME SETTINGS | del NAME]`",
            ),
            (
                "sched linux weight=0",
                "`weight=0` is out of range: a weight is 1 to 10000",
            ),
            (
                "sched linux pin=256",
                "`pin=256` is out of range: cores are like `0-3,8`, each below 256, or `all`",
            ),
        ] {
            assert_eq!(read(line), Err(error.to_string()), "{line}");
        }
        for bad in [
            "pin=",
            "pin=3-1",
            "pin=1-",
            "pin=a",
            "pin=,",
            "cap=+5",
            "cap=6401",
            "weight=99999999999",
            "weight=",
        ] {
            let line = alloc::format!("sched linux {bad}");
            assert!(read(&line).unwrap_err().contains("out of range"), "{bad}");
        }
        let long = "x".repeat(200);
        assert!(read(&long).unwrap_err().len() < 100);
    }

    #[test]
    fn completion_offers_what_could_stand_there() {
        for (line, words) in [
            ("sh", "shutdown"),
            ("s", "start shutdown stop sched switch"),
            ("info ", "linux hello 2"),
            ("info l", "linux"),
            ("info linux ", ""),
            ("inject ", "nmi"),
            ("inject nmi h", "hello"),
            ("sched linux w", "weight="),
            ("help po", "port poweroff"),
            ("list ", ""),
            ("nonsense ", ""),
            ("switch ", "show"),
            ("switch show ", "lan wan"),
            ("port show ", "lan/up linux wan/up hello"),
            ("port show lan/", "lan/up lan/linux"),
            ("link hello ", "up down"),
            ("capture linux ", "off"),
            ("add-flow w", "wan"),
            ("mirror ", "lan wan add del"),
            ("mirror lan ", "add del"),
            ("mirror lan add m ou", "output_port= output_vlan="),
        ] {
            let (switches, mut found) = (switches(), Vec::new());
            let (vms, switches) = (&VMS, &switches[..]);
            complete(line, Names { vms, switches }, &mut |word| found.push(word));
            assert_eq!(found.join(" "), words, "{line}");
        }
    }

    proptest::proptest! {
        #[test]
        fn no_line_is_too_odd(line in "(switch|port|mirror|link)?[a-z0-9=/,\\- é]{0,60}") {
            let _ = read(&line);
            let (vms, switches) = (&VMS, &switches()[..]);
            complete(&line, Names { vms, switches }, &mut |_| {});
        }
    }
}
