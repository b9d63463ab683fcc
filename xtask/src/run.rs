//! Attends to a running machine: its console on ours, our keys to it, until it ends.

use std::io::{Write, stdout};
use std::path::Path;
use std::time::{Duration, Instant};

use harness::{Console, End, Received, Session};
use regex_lite::Regex;

use crate::capture::Captures;
use crate::progress::{note, seconds};
use crate::terminal::{Raw, forward_input};

/// The prefix key, Ctrl-T, and the key after it that leaves.
const PREFIX: u8 = 0x14;
const LEAVE: u8 = b'x';
/// How long the hypervisor may take to leave when asked to.
const LEAVE_LIMIT: Duration = Duration::from_secs(5);
/// How long a machine may take to switch off after its last line.
const OFF_LIMIT: Duration = Duration::from_secs(3);
/// After this long without more the beginning of a line is shown.
const PAUSE: Duration = Duration::from_millis(50);
/// What begins each line of the hypervisor's log.
const LOG: &[u8] = b"tessera| ";

/// Exit statuses of our own, beside the hypervisor's.
pub mod status {
    /// The deadline of `--timeout` passed.
    pub const DEADLINE: u8 = 124;
    /// The machine ended without the hypervisor's closing line.
    pub const DIED: u8 = 125;
    /// Left by Ctrl-T x without an answer from the hypervisor.
    pub const LEFT: u8 = 130;
}

/// What ends a run, beside its own end.
#[derive(Debug, Default)]
pub struct Limits {
    /// Success as soon as the console's text matches.
    pub until: Option<Regex>,
    /// The most it may take.
    pub timeout: Option<Duration>,
}

/// How a run ended.
#[derive(Debug)]
pub enum Outcome {
    /// The hypervisor's closing line.
    Ended(End),
    /// The pattern came.
    Matched,
    /// The deadline passed.
    Deadline,
    /// The emulator went away.
    Died,
    /// The person at the terminal left, and the hypervisor did not answer.
    Left,
}

impl Outcome {
    /// Says how it ended and gives the exit status.
    pub fn report(&self, limits: &Limits, session: &Session) -> u8 {
        let log = session.log().display();
        match self {
            Self::Ended(end) if end.status == 0 => 0,
            Self::Ended(end) => {
                note(&format!("ended with status {}: {}", end.status, end.reason));
                end.status
            }
            Self::Matched => 0,
            Self::Deadline => {
                let limit = seconds(limits.timeout.unwrap_or_default());
                let what = match &limits.until {
                    Some(pattern) => format!("`{}` did not come within {limit}", pattern.as_str()),
                    None => format!("not ended within {limit}"),
                };
                note(&format!("{what} (the emulator's log: {log})"));
                status::DEADLINE
            }
            Self::Died => {
                note(&format!(
                    "the machine ended without a closing line of Tessera; see {log}"
                ));
                status::DIED
            }
            Self::Left => {
                note("left; Tessera did not answer Ctrl-T x");
                status::LEFT
            }
        }
    }
}

/// Attends until the run ends. With `guest_only` the hypervisor's log and what the firmware said
/// before it are left out. Frames that the hypervisor captured become files in `dir`.
pub fn attend(
    session: &mut Session,
    limits: &Limits,
    guest_only: bool,
    dir: &Path,
) -> (Outcome, Console) {
    let raw = Raw::enter();
    forward_input(session.sender());
    let mut console = Console::default();
    let mut filter = guest_only.then(Filter::default);
    let mut captures = Captures::new(dir);
    let mut keys = Keys::default();
    let deadline = limits.timeout.map(|limit| Instant::now() + limit);
    let outcome = loop {
        let far = Instant::now() + Duration::from_secs(3600);
        let soon = captures.waits().then(|| Instant::now() + PAUSE);
        let next = [deadline, keys.leave_by, soon]
            .into_iter()
            .flatten()
            .min()
            .unwrap_or(far);
        match session.receive(next) {
            Received::Bytes(bytes) => {
                let before = console.position();
                console.feed(&bytes);
                let rest = captures.pass(&bytes);
                match &mut filter {
                    Some(filter) => show(&filter.pass(&rest)),
                    None => show(&rest),
                }
                // A match may have begun in an earlier piece.
                let recent = console.since(before.saturating_sub(16 << 10));
                if limits.until.as_ref().is_some_and(|u| u.is_match(recent)) {
                    break Outcome::Matched;
                }
                if let Some(end) = console.end() {
                    break Outcome::Ended(end);
                }
            }
            Received::Input(bytes) => {
                keys.see(&bytes);
                session.send(&bytes);
            }
            Received::Closed => {
                // The end of the line ends its last line too.
                console.feed(b"\n");
                break console.end().map_or(Outcome::Died, Outcome::Ended);
            }
            Received::Nothing => {
                let waiting = captures.show();
                match &mut filter {
                    Some(filter) => show(&filter.pass(&waiting)),
                    None => show(&waiting),
                }
                let now = Instant::now();
                if keys.leave_by.is_some_and(|by| now >= by) {
                    break Outcome::Left;
                }
                if deadline.is_some_and(|by| now >= by) {
                    break Outcome::Deadline;
                }
            }
        }
    };
    if !console.text().ends_with('\n') && !guest_only {
        show(b"\n");
    }
    drop(raw);
    captures.report();
    (outcome, console)
}

/// Ends the machine: by itself if it is about to, else by force.
pub fn switch_off(session: &mut Session, outcome: &Outcome) {
    let ending = matches!(outcome, Outcome::Ended(_) | Outcome::Died);
    session.finish(if ending { OFF_LIMIT } else { Duration::ZERO });
}

fn show(bytes: &[u8]) {
    let mut out = stdout().lock();
    // A closed pipe behind us (`| head`) is no reason to stop attending.
    let _ = out.write_all(bytes).and_then(|()| out.flush());
}

/// Watches what is typed for Ctrl-T x.
#[derive(Default)]
struct Keys {
    after_prefix: bool,
    leave_by: Option<Instant>,
}

impl Keys {
    fn see(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            if self.after_prefix && byte == LEAVE && self.leave_by.is_none() {
                self.leave_by = Some(Instant::now() + LEAVE_LIMIT);
            }
            self.after_prefix = byte == PREFIX && !self.after_prefix;
        }
    }
}

/// Lets only a guest's own output through.
#[derive(Debug, Default)]
struct Filter {
    /// The hypervisor has begun to speak; before that only firmware did.
    begun: bool,
    state: Line,
}

#[derive(Debug)]
enum Line {
    /// This many bytes of the line may be the beginning of a log line's mark.
    Perhaps(usize),
    /// In a log line.
    Log,
    /// In a guest's line.
    Guest,
}

impl Default for Line {
    fn default() -> Self {
        Self::Perhaps(0)
    }
}

impl Filter {
    fn pass(&mut self, bytes: &[u8]) -> Vec<u8> {
        let mut out = Vec::new();
        for &byte in bytes {
            self.state = match self.state {
                Line::Perhaps(n) if LOG.get(n) == Some(&byte) => {
                    if n + 1 == LOG.len() {
                        self.begun = true;
                        Line::Log
                    } else {
                        Line::Perhaps(n + 1)
                    }
                }
                Line::Perhaps(n) => {
                    if self.begun {
                        out.extend(LOG.get(..n).unwrap_or_default());
                        out.push(byte);
                    }
                    if byte == b'\n' {
                        Line::Perhaps(0)
                    } else {
                        Line::Guest
                    }
                }
                Line::Log | Line::Guest => {
                    if self.begun && matches!(self.state, Line::Guest) {
                        out.push(byte);
                    }
                    let again = byte == b'\n';
                    match self.state {
                        _ if again => Line::Perhaps(0),
                        Line::Log => Line::Log,
                        _ => Line::Guest,
                    }
                }
            };
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_guest_is_heard() {
        let mut filter = Filter::default();
        let mut heard = Vec::new();
        let said = b"BdsDxe: starting\r\ntessera| up\r\nte\ntest: \ntessera| vm k: ended\r\nbye";
        for piece in said.chunks(3) {
            heard.extend(filter.pass(piece));
        }
        assert_eq!(String::from_utf8_lossy(&heard), "te\ntest: \nbye");
    }

    #[test]
    fn only_the_leaving_keys_leave() {
        let mut keys = Keys::default();
        keys.see(b"x\x14\x14x\x14");
        assert!(keys.leave_by.is_none());
        keys.see(b"x");
        assert!(keys.leave_by.is_some());
    }
}
