//! Many voices on one line: the log, the monitor and the consoles of all VMs.
//!
//! - A line of the log is `tessera| <text>`, on a line of its own whatever stood there before.
//! - The guest in focus writes to the terminal as if it were its own, as far as [`crate::contain`]
//!   lets it; before a log line, and when the focus goes, the modes it set are taken back.
//! - The other guests are heard line by line, as `<name>| <text>`, without any control sequence.
//! - No guest can write `tessera|`, in focus or not, so what follows that mark is the log's. (A
//!   guest in focus that moves the cursor about can still draw a picture of a log line; its bytes
//!   on the line differ, and it is not so in what [`Mux`] keeps for scrolling back.)
//!
//! Ctrl-T is the prefix key. Everything that grows has a limit: lines, scroll-back, typed input.

use crate::command::{self, Command, Names, SwitchNames, VERBS, Verb};
use crate::contain::{Contain, MARK, Piece};
use crate::keys::{Key, Keys};
use crate::line::{Edit, Editor};
use crate::scroll::Scroll;
use alloc::collections::VecDeque;
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;
use core::fmt::Write;

/// Ctrl-T.
pub const PREFIX: u8 = 0x14;
/// A line of a guest without the focus is shown when it is complete or this long.
pub const LINE_LIMIT: usize = 256;
/// Keys that wait for a guest which does not read them.
pub const INPUT_LIMIT: usize = 4096;
/// Lines of a guest that are shown again when it gets the focus.
const RECALL: usize = 10;
/// Lines of a page.
const PAGE: usize = 22;
/// The most lines that `log` shows at once.
const LOG_LINES: usize = 200;

const HELP: &str = "Ctrl-T then: 0 monitor, 1-9 that VM, n next, p previous, [ or Page Up \
                    scroll back, x end all VMs and power off, Ctrl-T sends Ctrl-T, ? this help";

/// Who has the keyboard, and whose output goes through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Focus {
    /// The monitor.
    Monitor,
    /// A guest.
    Guest(usize),
}

/// What a person asked for that is not the console's own business.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Request {
    /// End all VMs and power off.
    Leave,
    /// A command of the monitor; `help`, `console` and `log` are served here.
    Command(Command),
}

/// Where bytes for the line go.
pub type Out<'a> = &'a mut dyn FnMut(&[u8]);

#[derive(Debug)]
struct Console {
    name: String,
    /// Its console is somewhere else.
    away: bool,
    contain: Contain,
    /// The unfinished line, contained.
    line: Vec<u8>,
    scroll: Scroll,
    input: VecDeque<u8>,
}

/// How a guest is heard.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Voice {
    /// As on a terminal of its own.
    Raw,
    /// Line by line, with its name.
    Lines,
    /// Only kept: its past is being read.
    Silent,
}

/// Where somebody reads in the past.
#[derive(Clone, Copy, Debug)]
struct View {
    back: usize,
}

/// The consoles of one machine.
#[derive(Debug)]
pub struct Mux {
    log: Scroll,
    consoles: Vec<Console>,
    switches: Vec<SwitchNames>,
    focus: Focus,
    prefix: bool,
    keys: Keys,
    editor: Editor,
    view: Option<View>,
    /// The cursor stands on an empty line.
    fresh: bool,
    /// … but perhaps not at its start.
    bare: bool,
}

impl Mux {
    /// The log alone, of which this many bytes are kept.
    #[must_use]
    pub fn new(log_bytes: usize) -> Self {
        let mut log = Scroll::new(log_bytes);
        // A log line must not need the heap: it may be about the heap.
        log.fill_up();
        Self {
            log,
            consoles: Vec::new(),
            switches: Vec::new(),
            focus: Focus::Monitor,
            prefix: false,
            keys: Keys::default(),
            editor: Editor::default(),
            view: None,
            fresh: true,
            bare: false,
        }
    }

    /// Adds a guest's console, of which this many bytes are kept, and gives its number. A guest
    /// that is `away` has its console on a line of its own.
    pub fn add(&mut self, name: &str, bytes: usize, away: bool) -> usize {
        // All of it now: what a guest says then leaves no trace in the heap.
        let mut scroll = Scroll::new(bytes);
        scroll.fill_up();
        self.consoles.push(Console {
            name: if name.ends_with("tessera") {
                format!("{name}-vm")
            } else {
                name.into()
            },
            away,
            contain: Contain::default(),
            line: Vec::with_capacity(LINE_LIMIT),
            scroll,
            input: VecDeque::new(),
        });
        self.consoles.len() - 1
    }

    /// The switches that can be named at the monitor, in the order of their numbers.
    pub fn set_switches(&mut self, switches: Vec<SwitchNames>) {
        self.switches = switches;
    }

    /// Who has the keyboard.
    #[must_use]
    pub const fn focus(&self) -> Focus {
        self.focus
    }

    /// How a guest is heard now.
    fn voice(&self, guest: usize) -> Voice {
        match (self.focus == Focus::Guest(guest), self.view) {
            (false, _) => Voice::Lines,
            (true, None) => Voice::Raw,
            (true, Some(_)) => Voice::Silent,
        }
    }

    /// A guest writes.
    #[inline(never)]
    pub fn output(&mut self, guest: usize, bytes: &[u8], out: Out<'_>) {
        let voice = self.voice(guest);
        let Some(console) = self.consoles.get_mut(guest) else {
            return;
        };
        // The reader is taken out for the time, to use the rest as well.
        let mut contain = core::mem::take(&mut console.contain);
        let modes = contain.modes();
        for &byte in bytes {
            contain.push(byte, &mut |piece| {
                if voice == Voice::Raw {
                    self.pass(piece, out);
                }
                self.keep(guest, piece, voice, out);
            });
        }
        if voice != Voice::Raw {
            contain.unseen(modes);
        }
        if let Some(console) = self.consoles.get_mut(guest) {
            console.contain = contain;
        }
    }

    /// Passes a piece of the guest in focus on to the terminal.
    fn pass(&mut self, piece: Piece<'_>, out: Out<'_>) {
        match piece {
            Piece::Text(text) => {
                out(text);
                self.fresh = false;
            }
            Piece::Control(byte) => {
                out(&[byte]);
                match byte {
                    b'\n' if !self.fresh => (self.fresh, self.bare) = (true, true),
                    b'\r' => self.bare = false,
                    b'\n' | 0x0e | 0x0f => {}
                    _ => self.fresh = false,
                }
            }
            Piece::Sequence(sequence, stays) => {
                out(sequence);
                self.fresh &= stays;
            }
        }
    }

    /// Keeps a piece for later, and shows the line that it ends.
    fn keep(&mut self, guest: usize, piece: Piece<'_>, voice: Voice, out: Out<'_>) {
        let Some(console) = self.consoles.get_mut(guest) else {
            return;
        };
        match piece {
            Piece::Text(text) => {
                if console.line.len() + text.len() > LINE_LIMIT {
                    self.end_line(guest, voice, out);
                }
                if let Some(console) = self.consoles.get_mut(guest) {
                    console.line.extend_from_slice(text);
                    // What stood between the letters of the mark may have been taken back.
                    if console.line.ends_with(MARK) {
                        console.line.truncate(console.line.len() - 1);
                        console.line.extend_from_slice(b"\\|");
                    }
                }
            }
            Piece::Control(b'\n') => self.end_line(guest, voice, out),
            Piece::Control(b'\t') if console.line.len() < LINE_LIMIT => console.line.push(b'\t'),
            Piece::Control(0x08) => {
                while console.line.pop().is_some_and(|byte| byte & 0xc0 == 0x80) {}
            }
            _ => {}
        }
    }

    fn end_line(&mut self, guest: usize, voice: Voice, out: Out<'_>) {
        let Some(console) = self.consoles.get_mut(guest) else {
            return;
        };
        let mut line = core::mem::take(&mut console.line);
        console.scroll.push(&line);
        if voice == Voice::Lines {
            let name = core::mem::take(&mut console.name);
            self.line(&name, &line, out);
            if let Some(console) = self.consoles.get_mut(guest) {
                console.name = name;
            }
        }
        line.clear();
        if let Some(console) = self.consoles.get_mut(guest) {
            console.line = line;
        }
    }

    /// A guest is over, or starts anew: what it has half said is shown, and its modes go.
    #[inline(never)]
    pub fn flush(&mut self, guest: usize, out: Out<'_>) {
        let voice = self.voice(guest);
        if let Some(console) = self.consoles.get_mut(guest) {
            console.contain.cut();
            if !console.line.is_empty() {
                self.end_line(guest, voice, out);
            }
        }
        if voice != Voice::Lines {
            self.clean(guest, true, out);
        }
    }

    /// Takes a guest's modes back.
    fn clean(&mut self, guest: usize, all: bool, out: Out<'_>) {
        if let Some(console) = self.consoles.get_mut(guest)
            && console.contain.reset(all, out)
        {
            (self.fresh, self.bare) = (true, false);
        }
    }

    /// Goes to the start of an empty line.
    fn start_line(&mut self, out: Out<'_>) {
        if let Focus::Guest(guest) = self.focus {
            self.clean(guest, false, out);
        }
        if !self.fresh {
            out(b"\r\n");
        } else if self.bare {
            out(b"\r");
        }
        (self.fresh, self.bare) = (true, false);
    }

    /// A whole line of somebody, and what is being typed after it again.
    fn line(&mut self, tag: &str, text: &[u8], out: Out<'_>) {
        self.start_line(out);
        out(tag.as_bytes());
        out(b"| ");
        out(text);
        out(b"\r\n");
        self.show_typed(out);
    }

    fn show_typed(&mut self, out: Out<'_>) {
        if self.focus == Focus::Monitor && self.view.is_none() && self.editor.show(out) {
            self.fresh = false;
        }
    }

    /// A line of the log, or several. Control characters in it become `?`: it may quote a guest.
    #[inline(never)]
    pub fn log(&mut self, text: &str, out: Out<'_>) {
        self.told(text, true, out);
    }

    /// An answer of the monitor: looks like the log and is not kept.
    #[inline(never)]
    pub fn reply(&mut self, text: &str, out: Out<'_>) {
        self.told(text, false, out);
    }

    fn told(&mut self, text: &str, keep: bool, out: Out<'_>) {
        for line in text.lines() {
            let mut shown = [0; 1024];
            let mut used = 0;
            for character in line.chars() {
                let character = if character.is_control() {
                    '?'
                } else {
                    character
                };
                let Some(place) = shown.get_mut(used..used + character.len_utf8()) else {
                    break;
                };
                used += character.encode_utf8(place).len();
            }
            let line = shown.get(..used).unwrap_or_default();
            if keep {
                self.log.push(line);
            }
            self.line("tessera", line, out);
        }
    }

    /// Gives the keyboard to somebody. A guest that is not there changes nothing.
    #[inline(never)]
    pub fn set_focus(&mut self, focus: Focus, out: Out<'_>) {
        let text = match focus {
            Focus::Monitor => String::from("keyboard: monitor (`help` lists its commands)"),
            Focus::Guest(guest) => match self.consoles.get(guest) {
                None => return,
                Some(console) if console.away => {
                    let text = format!("vm {} has its console on a port of its own", console.name);
                    return self.reply(&text, out);
                }
                Some(console) => format!("keyboard: {} (Ctrl-T ? for help)", console.name),
            },
        };
        self.view = None;
        if let Focus::Guest(old) = self.focus
            && Focus::Guest(old) != focus
        {
            self.clean(old, true, out);
        }
        self.focus = focus;
        self.log(&text, out);
        self.recall(out);
    }

    /// Shows the last lines of the guest in focus again, and what it has begun to say.
    fn recall(&mut self, out: Out<'_>) {
        let Focus::Guest(guest) = self.focus else {
            return;
        };
        self.show_lines(Some(guest), 0, RECALL, out);
        self.start_line(out);
        if let Some(console) = self.consoles.get(guest)
            && !console.line.is_empty()
        {
            out(&console.line);
            self.fresh = false;
        }
    }

    /// Shows kept lines of a guest or the log.
    fn show_lines(&mut self, whose: Option<usize>, back: usize, count: usize, out: Out<'_>) {
        let (name, page) = match whose.map(|guest| self.consoles.get(guest)) {
            None => (String::from("tessera"), self.log.page(back, count)),
            Some(Some(console)) => (console.name.clone(), console.scroll.page(back, count)),
            Some(None) => return,
        };
        for line in page.split_inclusive(|byte| *byte == b'\n') {
            let line = line.strip_suffix(b"\n").unwrap_or(line);
            self.line(&name, line, out);
        }
    }

    /// Takes a byte from the keyboard.
    #[inline(never)]
    pub fn key(&mut self, byte: u8, out: Out<'_>) -> Option<Request> {
        let plain = !self.prefix && self.view.is_none();
        match (plain, self.focus) {
            (true, _) if byte == PREFIX => {
                self.prefix = true;
                self.keys = Keys::default();
                None
            }
            (true, Focus::Guest(_)) => {
                self.input(byte);
                None
            }
            _ => {
                // In a sequence the prefix is just as much the prefix.
                let key = if byte == PREFIX {
                    self.keys = Keys::default();
                    Key::Byte(byte)
                } else {
                    self.keys.push(byte)?
                };
                if core::mem::take(&mut self.prefix) {
                    self.prefixed(key, out)
                } else if let Some(view) = self.view {
                    if key == Key::Byte(PREFIX) {
                        self.prefix = true;
                    } else {
                        self.read_on(view, key, out);
                    }
                    None
                } else {
                    self.typed(key, out)
                }
            }
        }
    }

    /// The key after the prefix.
    fn prefixed(&mut self, key: Key, out: Out<'_>) -> Option<Request> {
        let guest = |byte: u8| usize::from(byte - b'1');
        match key {
            Key::Byte(PREFIX) => self.input(PREFIX),
            Key::Byte(b'0') => self.set_focus(Focus::Monitor, out),
            Key::Byte(byte @ b'1'..=b'9') if guest(byte) < self.consoles.len() => {
                self.set_focus(Focus::Guest(guest(byte)), out);
            }
            Key::Byte(b'n') => self.step(true, out),
            Key::Byte(b'p') => self.step(false, out),
            Key::Byte(b'[') | Key::PageUp => {
                self.start_line(out);
                let back = self.view.map_or(0, |view| view.back + PAGE);
                self.show_page(back, out);
            }
            Key::Byte(b'x') => return Some(Request::Leave),
            _ => self.reply(HELP, out),
        }
        None
    }

    /// To the next console or the one before, of the monitor and all guests that are here.
    fn step(&mut self, forward: bool, out: Out<'_>) {
        let count = self.consoles.len() + 1;
        let place = |focus| match focus {
            Focus::Monitor => 0,
            Focus::Guest(guest) => guest + 1,
        };
        let mut at = place(self.focus);
        for _ in 0..count {
            at = (if forward { at + 1 } else { at + count - 1 }) % count;
            let focus = at.checked_sub(1).map_or(Focus::Monitor, Focus::Guest);
            let away = at > 0 && self.consoles.get(at - 1).is_none_or(|console| console.away);
            if !away {
                return self.set_focus(focus, out);
            }
        }
    }

    /// Shows a page of the past.
    fn show_page(&mut self, back: usize, out: Out<'_>) {
        let whose = match self.focus {
            Focus::Monitor => None,
            Focus::Guest(guest) => Some(guest),
        };
        let scroll = whose.and_then(|guest| self.consoles.get(guest));
        let lines = scroll.map_or(&self.log, |console| &console.scroll).lines();
        let back = back.min(lines.saturating_sub(PAGE));
        self.view = Some(View { back });
        self.show_lines(whose, back, PAGE, out);
        let last = lines - back;
        let text = format!(
            "lines {}-{last} of {lines}; Page Up or b: earlier, Page Down or space: later, q: back",
            (last + 1).saturating_sub(PAGE).max(last.min(1)),
        );
        self.reply(&text, out);
    }

    /// A key while somebody reads in the past.
    fn read_on(&mut self, view: View, key: Key, out: Out<'_>) {
        match key {
            Key::PageUp | Key::Up | Key::Byte(b'b' | b'[') => self.show_page(view.back + PAGE, out),
            Key::PageDown | Key::Down | Key::Byte(b' ' | b'\r') if view.back > 0 => {
                self.show_page(view.back.saturating_sub(PAGE), out);
            }
            _ => {
                self.view = None;
                self.recall(out);
                self.show_typed(out);
            }
        }
    }

    /// A key for the monitor's line.
    #[inline(never)]
    fn typed(&mut self, key: Key, out: Out<'_>) -> Option<Request> {
        let vms: Vec<&str> = self.consoles.iter().map(|c| c.name.as_str()).collect();
        let fresh = &mut self.fresh;
        let names = Names {
            vms: &vms,
            switches: &self.switches,
        };
        let edit = self.editor.key(key, names, &mut |bytes| {
            *fresh = bytes.ends_with(b"\n");
            out(bytes);
        });
        match edit {
            Edit::More => None,
            Edit::Choices(text) => {
                self.reply(&text, out);
                None
            }
            Edit::Refused(text) => {
                self.reply(text, out);
                None
            }
            Edit::Done(line) => self.command(&line, out),
        }
    }

    /// Reads the typed line and serves what is the console's own.
    fn command(&mut self, line: &str, out: Out<'_>) -> Option<Request> {
        let vms: Vec<&str> = self.consoles.iter().map(|c| c.name.as_str()).collect();
        let names = Names {
            vms: &vms,
            switches: &self.switches,
        };
        match command::parse(line, names) {
            Ok(None) => {}
            Ok(Some(Command::Console(guest))) => self.set_focus(Focus::Guest(guest), out),
            Ok(Some(Command::Log(lines))) => {
                self.show_lines(None, 0, lines.unwrap_or(PAGE).min(LOG_LINES), out);
            }
            Ok(Some(Command::Help(Some(verb)))) => self.help(verb, out),
            Ok(Some(Command::Help(None))) => {
                VERBS.iter().for_each(|verb| self.help(verb, out));
                self.reply(HELP, out);
            }
            Ok(Some(command)) => return Some(Request::Command(command)),
            Err(error) => {
                let mut text = String::new();
                let _ = write!(text, "{error}");
                self.reply(&text, out);
            }
        }
        None
    }

    fn help(&mut self, verb: &Verb, out: Out<'_>) {
        let mut text = String::from(verb.name());
        text.push_str(verb.arguments());
        while text.len() < 14 {
            text.push(' ');
        }
        text.push_str("  ");
        text.push_str(verb.help());
        self.reply(&text, out);
    }

    /// Types a byte at the guest in focus.
    fn input(&mut self, byte: u8) {
        if let Focus::Guest(guest) = self.focus
            && let Some(guest) = self.consoles.get_mut(guest)
            && guest.input.len() < INPUT_LIMIT
        {
            guest.input.push_back(byte);
        }
    }

    /// Copies what was typed for a guest, as much as fits; it stays until [`Mux::taken`].
    pub fn typed_for(&self, guest: usize, buffer: &mut [u8]) -> usize {
        let Some(console) = self.consoles.get(guest) else {
            return 0;
        };
        let pairs = buffer.iter_mut().zip(&console.input);
        pairs.map(|(to, from)| *to = *from).count()
    }

    /// A guest has taken this much of what was typed for it.
    pub fn taken(&mut self, guest: usize, count: usize) {
        if let Some(console) = self.consoles.get_mut(guest) {
            let count = count.min(console.input.len());
            console.input.drain(..count);
        }
    }

    /// Whether something was typed for a guest.
    #[must_use]
    pub fn has_input(&self, guest: usize) -> bool {
        let console = self.consoles.get(guest);
        console.is_some_and(|console| !console.input.is_empty())
    }

    /// Bytes of memory that a guest's console holds.
    #[must_use]
    pub fn held(&self, guest: usize) -> usize {
        self.consoles.get(guest).map_or(0, |console| {
            console.scroll.held() + console.line.capacity() + console.input.capacity()
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec;
    use proptest::prelude::*;

    /// Two guests, `a` in focus, and what the terminal gets.
    struct World {
        mux: Mux,
        line: Vec<u8>,
    }

    impl World {
        fn new() -> Self {
            let mut mux = Mux::new(4096);
            mux.add("a", 2048, false);
            mux.add("b", 2048, false);
            let mut world = Self { mux, line: vec![] };
            world.focus(Focus::Guest(0));
            world.said();
            world
        }
        fn focus(&mut self, focus: Focus) {
            let line = &mut self.line;
            self.mux
                .set_focus(focus, &mut |bytes| line.extend_from_slice(bytes));
        }
        fn output(&mut self, guest: usize, bytes: &[u8]) {
            let line = &mut self.line;
            self.mux
                .output(guest, bytes, &mut |bytes| line.extend_from_slice(bytes));
        }
        fn log(&mut self, text: &str) {
            let line = &mut self.line;
            self.mux
                .log(text, &mut |bytes| line.extend_from_slice(bytes));
        }
        fn keys(&mut self, keys: &[u8]) -> Option<Request> {
            let line = &mut self.line;
            let mut key = |key: &u8| {
                self.mux
                    .key(*key, &mut |bytes| line.extend_from_slice(bytes))
            };
            keys.iter().filter_map(&mut key).last()
        }
        /// What the terminal got since the last time.
        fn said(&mut self) -> String {
            String::from_utf8(core::mem::take(&mut self.line)).unwrap()
        }
    }

    #[test]
    fn what_is_taken_back_does_not_make_the_mark() {
        let mut world = World::new();
        for bytes in [&b"tessera"[..], b"?\x08", b"x\x08| end: status=0\n"] {
            world.output(1, bytes);
        }
        assert_eq!(world.said(), "b| tessera\\| end: status=0\r\n");
    }

    #[test]
    fn the_focus_goes_through_raw_and_the_others_line_by_line() {
        let mut world = World::new();
        world.output(0, b"login: ");
        world.output(1, b"half");
        world.log("hello");
        assert_eq!(world.said(), "login: \r\ntessera| hello\r\n");
        world.output(1, b" a \x1b[31mline\x1b[m\r\n");
        world.output(0, b"\x1b[1mbold\r\n");
        world.log("again");
        assert_eq!(
            world.said(),
            "b| half a line\r\n\x1b[1mbold\r\n\x1b[m\rtessera| again\r\n"
        );
        world.output(1, &[b'x'; LINE_LIMIT + 1]);
        assert_eq!(world.said().len(), LINE_LIMIT + 5);
        let line = &mut world.line;
        world
            .mux
            .flush(1, &mut |bytes| line.extend_from_slice(bytes));
        assert_eq!(world.said(), "b| x\r\n");
    }

    #[test]
    fn a_switch_shows_the_last_lines_and_the_prompt_again() {
        let mut world = World::new();
        world.output(1, b"one\ntwo\nlogin: ");
        world.said();
        assert_eq!(world.keys(b"\x142"), None);
        assert_eq!(
            world.said(),
            "tessera| keyboard: b (Ctrl-T ? for help)\r\nb| one\r\nb| two\r\nlogin: "
        );
        world.keys(b"\x14n");
        assert!(
            world
                .said()
                .ends_with("keyboard: monitor (`help` lists its commands)\r\n")
        );
        world.keys(b"\x14p");
        assert_eq!(world.mux.focus(), Focus::Guest(1));
        world.keys(b"root\x14\x14");
        let mut typed = [0; 8];
        assert_eq!(world.mux.typed_for(1, &mut typed), 5);
        assert_eq!(&typed[..5], b"root\x14");
        world.mux.taken(1, 4);
        assert!(world.mux.has_input(1) && !world.mux.has_input(0));
    }

    #[test]
    fn the_past_is_read_page_by_page_while_output_goes_on() {
        let mut world = World::new();
        for number in 0..50 {
            world.output(0, format!("line {number}\n").as_bytes());
        }
        world.said();
        world.keys(b"\x14[");
        let page = world.said();
        assert!(page.starts_with("\ra| line 28\r\n"), "{page}");
        assert!(page.contains("a| line 49\r\ntessera| lines 29-50 of 50;"));
        world.output(0, b"meanwhile\n");
        assert_eq!(world.said(), "");
        world.keys(b"\x1b[5~");
        assert!(world.said().starts_with("a| line 7\r\n"));
        world.keys(b"b");
        assert!(world.said().starts_with("a| line 0\r\n"));
        world.keys(b"q");
        assert!(world.said().ends_with("a| line 49\r\na| meanwhile\r\n"));
        world.output(0, b"raw again");
        assert_eq!(world.said(), "raw again");
        assert!(!world.mux.has_input(0));
        // By Page Up after the prefix as well, and away from there by it.
        world.keys(b"\x14\x1b[5~");
        assert!(world.said().contains("of 51;"));
        assert_eq!(world.keys(b"\x14x"), Some(Request::Leave));
    }

    #[test]
    fn the_monitor_answers_and_a_log_line_leaves_what_is_typed() {
        let mut world = World::new();
        world.keys(b"\x140");
        world.said();
        assert_eq!(world.keys(b"li"), None);
        assert_eq!(world.said(), "\r> li");
        world.log("tick");
        assert_eq!(world.said(), "\r\ntessera| tick\r\n\r> li\x1b[K");
        assert_eq!(world.keys(b"st\r"), Some(Request::Command(Command::List)));
        world.said();
        world.keys(b"stop nobody\r");
        assert!(
            world
                .said()
                .ends_with("\r\ntessera| no VM is named `nobody`; there are: a b\r\n")
        );
        world.keys(b"help stop\r");
        assert!(world.said().contains("tessera| stop VM         end it now"));
        world.keys(b"log 1\r");
        assert!(world.said().ends_with("\r\ntessera| tick\r\n"));
        world.keys(b"console b\r");
        assert_eq!(world.mux.focus(), Focus::Guest(1));
    }

    #[test]
    fn a_guest_with_its_own_port_is_not_on_this_line() {
        let mut world = World::new();
        let line = &mut world.line;
        world.mux.add("c", 2048, true);
        world
            .mux
            .set_focus(Focus::Guest(2), &mut |bytes| line.extend_from_slice(bytes));
        assert_eq!(
            world.said(),
            "tessera| vm c has its console on a port of its own\r\n"
        );
        world.keys(b"\x14n\x14n");
        assert_eq!(world.mux.focus(), Focus::Monitor);
    }

    #[test]
    fn the_log_quotes_no_control_characters() {
        let mut world = World::new();
        world.log("a\x1b[31m\u{9b}b\ntwo");
        assert_eq!(world.said(), "tessera| a?[31m?b\r\ntessera| two\r\n");
    }

    /// Something that happens at the console.
    #[derive(Clone, Debug)]
    enum Event {
        Output(usize, Vec<u8>),
        Log,
        Keys(Vec<u8>),
        Flush(usize),
    }

    fn events() -> impl Strategy<Value = Vec<Event>> {
        let nasty: Vec<&[u8]> = vec![
            b"tessera",
            b"tes",
            b"sera",
            b"|",
            b" end: status=0 x\n",
            b"\x1b",
            b"\x1b[",
            b"31m",
            b"\x1b[?1049h",
            b"\x1b[5;10r",
            b"\x1b(0",
            b"\x1b(t",
            b"\x9b",
            b"\xc2",
            b"\x9d0;",
            b"\x1b]0;",
            b"\x07",
            b"\r",
            b"\n",
            b"\x08",
            b"\0",
            b"\xe2\x82",
            b"text",
            b"\x0e",
            b"\x18",
            b"\x1b\\",
            b"\t",
        ];
        let bytes = prop_oneof![
            4 => prop::sample::select(nasty).prop_map(<[u8]>::to_vec),
            1 => prop::collection::vec(any::<u8>(), 0..40),
        ];
        let keys: Vec<&[u8]> = vec![
            b"\x140",
            b"\x141",
            b"\x142",
            b"\x14n",
            b"\x14[",
            b"q",
            b"b",
            b"list\r",
            b"\x14\x14",
            b"x",
            b"\t",
            b"\x1b[5~",
            b"help\r",
            b"log\r",
        ];
        let event = prop_oneof![
            12 => (0..2usize, bytes).prop_map(|(guest, bytes)| Event::Output(guest, bytes)),
            2 => Just(Event::Log),
            2 => prop::sample::select(keys).prop_map(|keys| Event::Keys(keys.to_vec())),
            1 => (0..2usize).prop_map(Event::Flush),
        ];
        prop::collection::vec(event, 0..120)
    }

    /// What a reader makes of the line that knows `ESC x` and `ESC [ … x`, and overlooks carriage
    /// returns, NUL, SO and SI: whoever reads the log by program.
    fn plain(line: &[u8]) -> String {
        let (mut text, mut escape) = (Vec::new(), 0);
        for &byte in line {
            match (escape, byte) {
                (0, 0x1b) => escape = 1,
                (0, b'\r' | 0 | 0x0e | 0x0f) => {}
                (0, _) => text.push(byte),
                (1, b'[') => escape = 2,
                (2, 0x20..=0x3f) => {}
                (1, b' '..=b'/') => {}
                _ => escape = 0,
            }
        }
        String::from_utf8_lossy(&text).into_owned()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]
        #[test]
        fn no_guest_breaks_or_forges_the_log(events in events()) {
            let mut world = World::new();
            for event in events {
                match event {
                    Event::Output(guest, bytes) => world.output(guest, &bytes),
                    Event::Log => {
                        let before = world.line.len();
                        world.log("truth");
                        let said = &world.line[before..];
                        // It stands on a line of its own, in the terminal's own modes.
                        let at = said.windows(16).position(|w| w == b"tessera| truth\r\n").unwrap();
                        let line = &world.line[..before + at];
                        let rest = line.rsplit(|byte| *byte == b'\n').next().unwrap();
                        prop_assert!(plain(rest).is_empty(), "{:?}", rest.escape_ascii());
                    }
                    Event::Keys(keys) => {
                        world.keys(&keys);
                    }
                    Event::Flush(guest) => {
                        let line = &mut world.line;
                        world.mux.flush(guest, &mut |bytes| line.extend_from_slice(bytes));
                    }
                }
                prop_assert!(world.mux.held(0) <= 2048 + LINE_LIMIT + INPUT_LIMIT);
            }
            let text = plain(&world.line);
            for line in text.lines() {
                prop_assert!(!line.contains("tessera| end"), "{line}");
                // The mark stands at the start of a line or nowhere.
                prop_assert!(!line.get(1..).is_some_and(|l| l.contains("tessera|")), "{line}");
                prop_assert!(!line.starts_with("tessera|") || line.starts_with("tessera| "));
            }
            let bound = |tag: &str| {
                let mut lines = text.lines().filter(|line| line.starts_with(tag));
                lines.all(|line| line.len() <= tag.len() + LINE_LIMIT)
            };
            prop_assert!(bound("b| ") || world.mux.focus() == Focus::Guest(0));
        }

        #[test]
        fn a_guest_without_the_focus_says_only_text(
            parts in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..50), 0..20),
        ) {
            let mut world = World::new();
            for part in &parts {
                world.output(1, part);
            }
            for line in world.said().split_terminator("\r\n") {
                prop_assert!(line.starts_with("b| ") && line.len() <= 3 + LINE_LIMIT);
                prop_assert!(line.chars().all(|c| c == '\t' || !c.is_control()), "{line:?}");
            }
        }
    }
}
