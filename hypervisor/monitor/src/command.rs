//! What can be typed at the monitor: one table of verbs, from which parsing, help and completion
//! are made, and the errors that tell a person what would have been right.
//!
//! The verbs are those that users of `xl` and `virsh` know. A verb may be cut short as long as it
//! is unique, except for those that end the machine. A VM is named as in the configuration, or by
//! its number in `list`.

use core::fmt;
use sched::{CoreSet, MAX_WEIGHT};

/// A line at the monitor, understood. VMs are numbers, from 0 in the order of the configuration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
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
pub static VERBS: [Verb; 22] = {
    use Command as C;
    use Takes::{Nothing, Vm};
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
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CommandError<'a> {
    /// No verb begins like this; perhaps another was meant.
    UnknownVerb(&'a str, Option<&'static str>),
    /// More than one verb begins like this.
    Ambiguous(&'a str),
    /// The verb ends the machine and is cut short.
    TypeWhole(&'a str, &'static str),
    /// No VM has this name or number.
    UnknownVm(&'a str, &'a [&'a str]),
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
                let done = names.iter().try_for_each(|name| write!(f, " {name}"));
                done.and(if names.is_empty() {
                    f.write_str(" none")
                } else {
                    Ok(())
                })
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

/// Reads a line; `None` when it is empty. `names` are the VMs in the order of their numbers.
///
/// # Errors
/// What is wrong, and what would be right.
#[inline(never)]
pub fn parse<'a>(line: &'a str, names: &'a [&'a str]) -> Result<Option<Command>, CommandError<'a>> {
    let mut words = line.split_ascii_whitespace();
    let Some(word) = words.next() else {
        return Ok(None);
    };
    let verb = find(word)?;
    let mut need = || words.next().ok_or(CommandError::Missing(verb));
    let vm = |word: &'a str| find_vm(word, names).ok_or(CommandError::UnknownVm(word, names));
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
    };
    match words.next() {
        Some(word) => Err(CommandError::TooMany(word, verb)),
        None => Ok(Some(command)),
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
pub fn complete<'a>(line: &str, names: &[&'a str], give: &mut dyn FnMut(&'a str)) -> usize {
    let (before, word) = line.rsplit_once(' ').unwrap_or(("", line));
    let mut words = before.split_ascii_whitespace();
    let verb = words.next();
    let place = usize::from(verb.is_some()) + words.count();
    let mut offer = |candidate: &'a str| {
        if candidate.starts_with(word) {
            give(candidate);
        }
    };
    let verbs = || VERBS.iter().map(|verb| verb.name);
    match verb.map(find_any) {
        None => verbs().for_each(offer),
        Some(Ok(verb)) => match (&verb.takes, place) {
            (Takes::Verb, 1) => verbs().for_each(offer),
            (Takes::Inject, 1) => offer("nmi"),
            (Takes::Vm(_) | Takes::Share, 1) | (Takes::Inject, 2) => {
                names.iter().for_each(|name| offer(name));
            }
            (Takes::Share, _) => ["weight=", "cap=", "pin="].into_iter().for_each(offer),
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

    const NAMES: [&str; 3] = ["linux", "hello", "2"];

    fn read(line: &str) -> Result<Option<Command>, String> {
        parse(line, &NAMES).map_err(|error| error.to_string())
    }

    #[test]
    fn verbs_names_and_numbers_are_understood() {
        let share = |weight, cap, pin| Command::Sched(0, Share { weight, cap, pin });
        let pin = cores("1-3,8").unwrap();
        assert!(pin.iter().eq([1, 2, 3, 8].map(CoreId)));
        for (line, command) in [
            ("list", Command::List),
            ("  list  ", Command::List),
            ("li", Command::List),
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
            ("s", "start shutdown stop sched"),
            ("info ", "linux hello 2"),
            ("info l", "linux"),
            ("info linux ", ""),
            ("inject ", "nmi"),
            ("inject nmi h", "hello"),
            ("sched linux w", "weight="),
            ("help po", "poweroff"),
            ("list ", ""),
            ("nonsense ", ""),
        ] {
            let mut found = Vec::new();
            complete(line, &NAMES, &mut |word| found.push(word));
            assert_eq!(found.join(" "), words, "{line}");
        }
    }

    proptest::proptest! {
        #[test]
        fn no_line_is_too_odd(line in "[a-z0-9=,\\- é]{0,60}") {
            let _ = read(&line);
            complete(&line, &NAMES, &mut |_| {});
        }
    }
}
