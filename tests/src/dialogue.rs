//! What a case is, and how it is played: start the machine, hold the dialogue, judge the end.

use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result, bail};
use regex_lite::{Regex, RegexBuilder};

use crate::emulator::{Card, Emulator, Extension, Firmware, Machine, Pace, Received};
use crate::{Console, Session};

/// How long a machine may take to switch off after its last line.
const OFF_LIMIT: Duration = Duration::from_secs(10);

/// How long the screen may lag behind the serial line.
const SCREEN_LIMIT: Duration = Duration::from_secs(3);

/// Which emulator plays a case: QEMU stands for its own emulation or KVM, as the host allows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Player {
    /// QEMU.
    Qemu,
    /// Bochs.
    Bochs,
}

/// An emulator with a firmware.
pub type Place = (Player, Firmware);

/// QEMU by SeaBIOS.
pub const QEMU_BIOS: Place = (Player::Qemu, Firmware::Bios);
/// QEMU by OVMF.
pub const QEMU_UEFI: Place = (Player::Qemu, Firmware::Uefi);
/// Bochs by its BIOS.
pub const BOCHS_BIOS: Place = (Player::Bochs, Firmware::Bios);

/// One test in an emulator, as data.
#[derive(Clone, Copy, Debug)]
pub struct Case {
    /// The group it belongs to.
    pub group: &'static str,
    /// Its name within the group.
    pub name: &'static str,
    /// Where it is played, each a test of its own.
    pub on: &'static [Place],
    /// What the machine starts.
    pub load: Load,
    /// Tessera is a build that fails where a guest asks for it.
    pub fails: bool,
    /// The machine's memory in MiB, when not what the configuration needs.
    pub memory: Option<u32>,
    /// The machine's logical processors.
    pub cpus: u32,
    /// The last of them has APIC id 254.
    pub sparse: bool,
    /// How its time relates to ours.
    pub pace: Pace,
    /// The machine's virtualization extension.
    pub extension: Extension,
    /// Its network cards.
    pub cards: &'static [Card],
    /// What a second machine starts, a QEMU with one card, which a wire joins to this one's first.
    pub beside: Option<Load>,
    /// The dialogue.
    pub steps: &'static [Step],
    /// How it must end.
    pub end: Ending,
    /// Seconds for all of it; Bochs gets [`Case::SLOWER`] times as many.
    pub deadline: u64,
}

impl Case {
    /// What the others are given as a difference from.
    pub const BASE: Self = Self {
        group: "",
        name: "",
        on: &[QEMU_BIOS, BOCHS_BIOS],
        load: Load::Bundle {
            config: &[],
            files: &[],
            spoil: None,
        },
        fails: false,
        memory: None,
        cpus: 1,
        sparse: false,
        pace: Pace::Free,
        extension: Extension::On,
        cards: &[],
        beside: None,
        steps: &[],
        end: Ending::Closing(0),
        deadline: 60,
    };
    /// Bochs's time limits over QEMU's.
    pub const SLOWER: u64 = 3;

    /// `group/name`.
    pub fn full_name(&self) -> String {
        format!("{}/{}", self.group, self.name)
    }

    /// The time limit on an emulator.
    pub fn limit(&self, emulator: Emulator) -> Duration {
        let factor = if emulator == Emulator::Bochs {
            Self::SLOWER
        } else {
            1
        };
        Duration::from_secs(self.deadline * factor)
    }
}

/// What a case's machine starts.
#[derive(Clone, Copy, Debug)]
pub enum Load {
    /// Tessera with a configuration and its images.
    Bundle {
        /// `tessera.toml`, in parts.
        config: &'static [&'static str],
        /// The images by the names in the configuration.
        files: &'static [(&'static str, Source)],
        /// What is done to the finished bundle.
        spoil: Option<fn(&mut Vec<u8>)>,
    },
    /// The loaders' probe in place of the hypervisor, with a bundle that holds one file.
    Probe,
    /// A guest without Tessera, in plain QEMU: the reference.
    Reference {
        /// The guest's program.
        guest: &'static str,
        /// Its command line.
        append: &'static str,
    },
}

/// Where an image comes from.
#[derive(Clone, Copy, Debug)]
pub enum Source {
    /// Made by xtask: `vmlinuz`, `guest-hello`, ….
    Made(&'static str),
    /// The first bytes of such a file.
    Cut(&'static str, usize),
    /// Such a file without its last bytes.
    Short(&'static str, usize),
    /// These bytes.
    Bytes(&'static [u8]),
}

/// A step of the dialogue. In patterns `{release}` is the Linux guest's release, and `^` and `$`
/// are the ends of a line.
#[derive(Clone, Copy, Debug)]
pub enum Step {
    /// Waits for a match in what came after the last match or sending.
    Expect(&'static str),
    /// The same, and the match must be on the screen as well, where that can be read: there a
    /// row's end is no line's end.
    Told(&'static str),
    /// Waits for a match on the screen, where that can be read. Its rows are lines, without the
    /// blanks at their ends.
    Shown(&'static str),
    /// Types this.
    Send(&'static str),
    /// Waits for a match in what came on the second serial port since the last such match. A case
    /// with this step or the next has a machine with that port.
    ExpectSecond(&'static str),
    /// Types this there.
    SendSecond(&'static str),
    /// None of these may match in what came since the last sending.
    Refuse(&'static [&'static str]),
    /// Steps with the machine beside this one, which has a dialogue of its own.
    Beside(&'static [Step]),
    /// A judgement in code of what came since the last sending.
    Check(fn(&Heard) -> Result<(), String>),
}

/// How a case must end.
#[derive(Clone, Copy, Debug)]
pub enum Ending {
    /// With Tessera's closing line and this status.
    Closing(u8),
    /// With Tessera's closing line and this status, and then this judgement of the whole.
    Judged(u8, fn(&Heard) -> Result<(), String>),
    /// The emulator ends by itself with this exit code.
    Exit(i32),
    /// With the last step; the machine is switched off.
    Dialogue,
}

/// What a judgement may look at.
#[derive(Debug)]
pub struct Heard<'a> {
    /// What the console said since the last sending.
    pub since: &'a str,
    /// When that sending was.
    pub sent_at: SystemTime,
    /// All of it.
    pub all: &'a str,
    /// What came on the second serial port.
    pub second: &'a str,
    /// The emulator.
    pub emulator: Emulator,
    /// The machine's folder, with its settings and log.
    pub dir: &'a Path,
}

/// What cases need to know about what was built.
#[derive(Clone, Debug, Default)]
pub struct Facts {
    /// What `uname -r` says in the Linux guest.
    pub release: String,
}

/// A failure, with what is needed to understand it.
#[derive(Debug)]
pub struct Failure {
    /// What went wrong.
    pub error: anyhow::Error,
    /// What the console said.
    pub console: String,
    /// The emulator's own log.
    pub log: Option<PathBuf>,
}

/// Compiles a pattern of a case.
pub(crate) fn compile(pattern: &str, facts: &Facts) -> Result<Regex> {
    let pattern = pattern.replace("{release}", &regex_lite::escape(&facts.release));
    let regex = RegexBuilder::new(&pattern).multi_line(true).build();
    regex.with_context(|| format!("the case's pattern {pattern:?}"))
}

/// What a machine said, on its line and on its second serial port.
type Consoles = (Console, Console);

/// Plays `case` on `machine`, and on the one `beside` it if there is one, which already have what
/// the case loads.
pub fn play(
    case: &Case,
    machine: &Machine,
    beside: Option<&Machine>,
    facts: &Facts,
    dir: &Path,
) -> Result<(), Box<Failure>> {
    let limit = case.limit(machine.emulator);
    let mut consoles = Consoles::default();
    let mut theirs = Consoles::default();
    let mut log = None;
    let their_dir = dir.join("beside");
    let result = (|| {
        let mut other = match beside {
            Some(beside) => Some(Talk::begin(beside, facts, &their_dir, limit, &mut theirs)?),
            None => None,
        };
        let mut talk = Talk::begin(machine, facts, dir, limit, &mut consoles)?;
        log = Some(talk.session.log().to_owned());
        for (number, step) in case.steps.iter().enumerate() {
            let played = match (step, &mut other) {
                (Step::Beside(steps), Some(other)) => {
                    let played = steps.iter().try_for_each(|step| other.step(step));
                    played.context("on the machine beside")
                }
                _ => talk.step(step),
            };
            played.with_context(|| format!("step {}", number + 1))?;
        }
        match case.end {
            Ending::Dialogue => Ok(()),
            Ending::Closing(status) => talk.closing(status),
            Ending::Judged(status, judge) => {
                talk.closing(status)?;
                // A watched machine stays, for its screen to be read.
                talk.session.finish(if machine.watched {
                    Duration::ZERO
                } else {
                    OFF_LIMIT
                });
                judge(&talk.heard()).map_err(anyhow::Error::msg)
            }
            Ending::Exit(code) => {
                while talk.more().is_ok() {}
                match talk.session.finish(OFF_LIMIT) {
                    Some(found) if found == code => Ok(()),
                    Some(found) => bail!("the emulator exited with {found}, not with {code}"),
                    None => bail!("the emulator did not end by itself"),
                }
            }
        }
    })();
    result.map_err(|error| {
        let mut console = consoles.0.text().to_owned();
        if beside.is_some() {
            console = format!(
                "{}\n--- above: the machine beside\n{console}",
                theirs.0.text()
            );
        }
        Box::new(Failure {
            error,
            console,
            log,
        })
    })
}

/// A dialogue under way.
struct Talk<'a> {
    session: Session,
    console: &'a mut Console,
    second: &'a mut Console,
    matched_second: usize,
    facts: &'a Facts,
    emulator: Emulator,
    dir: &'a Path,
    deadline: Instant,
    limit: Duration,
    matched: usize,
    sent: usize,
    sent_at: SystemTime,
    closed: bool,
}

impl<'a> Talk<'a> {
    /// Switches a machine on.
    fn begin(
        machine: &Machine,
        facts: &'a Facts,
        dir: &'a Path,
        limit: Duration,
        (console, second): &'a mut Consoles,
    ) -> Result<Self> {
        Ok(Self {
            session: machine.start(dir, limit + Duration::from_secs(60))?,
            console,
            second,
            matched_second: 0,
            facts,
            emulator: machine.emulator,
            dir,
            deadline: Instant::now() + limit,
            limit,
            matched: 0,
            sent: 0,
            sent_at: SystemTime::now(),
            closed: false,
        })
    }

    fn heard(&self) -> Heard<'_> {
        Heard {
            since: self.console.since(self.sent),
            sent_at: self.sent_at,
            all: self.console.text(),
            second: self.second.text(),
            emulator: self.emulator,
            dir: self.dir,
        }
    }

    fn step(&mut self, step: &Step) -> Result<()> {
        match step {
            Step::Send(text) => {
                self.sent = self.console.position();
                self.sent_at = SystemTime::now();
                self.matched = self.sent;
                self.session.send(text.as_bytes());
                Ok(())
            }
            Step::Expect(pattern) => {
                let regex = compile(pattern, self.facts)?;
                loop {
                    let text = self.console.since(self.matched);
                    // A `$` at the end of what has come so far is no end of a line yet.
                    let whole = |end: usize| !pattern.ends_with('$') || end < text.len();
                    if let Some(found) = regex.find(text).filter(|found| whole(found.end())) {
                        self.matched += found.end();
                        return Ok(());
                    }
                    // A machine that ended cannot say what is still missing.
                    let ended = self.console.end();
                    let more = match ended {
                        Some(end) => Err(anyhow::anyhow!(
                            "ended: status={} {}",
                            end.status,
                            end.reason
                        )),
                        None => self.more(),
                    };
                    more.with_context(|| format!("waiting for `{}`", regex.as_str()))?;
                }
            }
            Step::Told(pattern) => {
                self.step(&Step::Expect(pattern))?;
                let plain = pattern.trim_start_matches('^').trim_end_matches('$');
                self.on_screen(plain, |rows| rows.concat())
            }
            Step::Shown(pattern) => self.on_screen(pattern, |rows| {
                let rows: Vec<&str> = rows.iter().map(|row| row.trim_end()).collect();
                rows.join("\n")
            }),
            Step::SendSecond(text) => {
                let line = self.session.second().context("no second serial port")?;
                line.write_all(text.as_bytes()).context("typing there")
            }
            Step::ExpectSecond(pattern) => {
                let regex = compile(pattern, self.facts)?;
                loop {
                    let text = self.second.since(self.matched_second);
                    if let Some(found) = regex.find(text) {
                        self.matched_second += found.end();
                        return Ok(());
                    }
                    self.more_second()
                        .with_context(|| format!("waiting for `{}` there", regex.as_str()))?;
                }
            }
            Step::Refuse(patterns) => {
                for pattern in *patterns {
                    let regex = compile(pattern, self.facts)?;
                    let line = self
                        .console
                        .since(self.sent)
                        .lines()
                        .find(|l| regex.is_match(l));
                    if let Some(line) = line {
                        bail!("`{pattern}` must not be there, and is: {line}");
                    }
                }
                Ok(())
            }
            Step::Beside(_) => bail!("the case has no machine beside"),
            Step::Check(judge) => judge(&self.heard()).map_err(anyhow::Error::msg),
        }
    }

    /// Waits for a pattern on the screen, whose text is made of its rows.
    fn on_screen(&mut self, pattern: &str, text: fn(&[String]) -> String) -> Result<()> {
        let regex = compile(pattern, self.facts)?;
        // What the serial line has, the screen may be about to get.
        let until = Instant::now() + SCREEN_LIMIT;
        loop {
            let Some(screen) = self.session.screen() else {
                return Ok(());
            };
            let screen = text(&screen?);
            if regex.is_match(&screen) {
                return Ok(());
            }
            if Instant::now() > until {
                bail!(
                    "`{}` is not on the screen:\n{}",
                    regex.as_str(),
                    screen.trim_end()
                );
            }
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    /// Takes what the machine says next, or fails when there is no more.
    fn more(&mut self) -> Result<()> {
        let received = match self.closed {
            true => Received::Closed,
            false => self.session.receive(self.deadline),
        };
        match received {
            Received::Bytes(bytes) => {
                self.console.feed(&bytes);
                Ok(())
            }
            Received::Input(_) => Ok(()),
            Received::Closed if self.closed => bail!("the machine ended"),
            Received::Closed => {
                // The end of the line ends its last line too, which may be what is waited for.
                self.closed = true;
                self.console.feed(b"\n");
                Ok(())
            }
            Received::Nothing => bail!("nothing more within {} s", self.limit.as_secs()),
        }
    }

    /// Takes what comes next on the second serial port.
    fn more_second(&mut self) -> Result<()> {
        let left = self.deadline.saturating_duration_since(Instant::now());
        let line = self.session.second().context("no second serial port")?;
        line.set_read_timeout(Some(left.max(Duration::from_millis(1))))?;
        let mut buffer = [0; 4096];
        match line.read(&mut buffer).context("nothing more came")? {
            0 => bail!("the machine ended"),
            count => {
                self.second.feed(buffer.get(..count).unwrap_or_default());
                Ok(())
            }
        }
    }

    /// Waits for Tessera's closing line.
    fn closing(&mut self, status: u8) -> Result<()> {
        let end = loop {
            match self.console.end() {
                Some(end) => break end,
                None => self
                    .more()
                    .context("waiting for `tessera| end: status=…`")?,
            }
        };
        if end.status != status {
            bail!(
                "ended with status {} ({}), not with {status}",
                end.status,
                end.reason
            );
        }
        Ok(())
    }
}
