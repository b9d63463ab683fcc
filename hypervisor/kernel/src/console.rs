//! The machine's console: the log and all guests' consoles on one serial line (and the log on the
//! screen), with a prefix key to choose whom the keyboard belongs to.

use alloc::collections::VecDeque;
use alloc::string::String;
use alloc::vec::Vec;
use core::fmt::{self, Write};
use hw::{ComPort, Screen, Serial};
use monitor::command::Command;
use spin::Mutex;

/// Ctrl-T.
const PREFIX: u8 = 0x14;
/// A line of a guest without the focus is shown when it is complete or this long.
const LINE_LIMIT: usize = 256;
/// Keys that wait for a guest which does not read them.
const INPUT_LIMIT: usize = 4096;

static CONSOLE: Mutex<Option<Console>> = Mutex::new(None);

/// Who has the keyboard, and whose output goes through raw.
#[derive(Clone, Copy, PartialEq)]
enum Focus {
    Monitor,
    Guest(usize),
}

struct GuestConsole {
    name: String,
    line: Vec<u8>,
    input: VecDeque<u8>,
}

struct Console {
    serial: Serial,
    screen: Option<Screen>,
    focus: Focus,
    prefix: bool,
    /// The cursor stands at the start of a line.
    fresh_line: bool,
    command: String,
    guests: Vec<GuestConsole>,
}

/// What a person asked for.
pub enum Request {
    /// End all VMs and power off.
    Leave,
    /// What was typed at the monitor; `help`, `console` and `log` are served here.
    Command(Command),
}

/// Takes the serial port and, if there is one, the screen.
pub fn init(serial: Serial, screen: Option<Screen>) {
    *CONSOLE.lock() = Some(Console {
        serial,
        screen,
        focus: Focus::Monitor,
        prefix: false,
        fresh_line: true,
        command: String::new(),
        guests: Vec::new(),
    });
    if log::set_logger(&Logger).is_ok() {
        log::set_max_level(log::LevelFilter::Info);
    }
}

/// Adds a guest's console, on the shared line or on a port of its own; guests are numbered in
/// this order.
pub fn add_guest(name: &str, port: Option<ComPort>) -> usize {
    let _ = port;
    let mut console = CONSOLE.lock();
    let Some(console) = console.as_mut() else {
        return 0;
    };
    console.guests.push(GuestConsole {
        name: name.into(),
        line: Vec::new(),
        input: VecDeque::new(),
    });
    console.guests.len() - 1
}

/// Gives a guest the keyboard.
pub fn focus(guest: usize) {
    with(|console| {
        if guest < console.guests.len() {
            console.set_focus(Focus::Guest(guest));
        }
    });
}

/// Passes on what a guest wrote.
pub fn guest_output(guest: usize, bytes: &[u8]) {
    with(|console| console.guest_output(guest, bytes));
}

/// Takes what was typed for a guest. `take` gets a slice and says how much of it it used.
pub fn guest_input(guest: usize, take: &mut dyn FnMut(&[u8]) -> usize) {
    with(|console| {
        if let Some(guest) = console.guests.get_mut(guest) {
            while !guest.input.is_empty() {
                let used = take(guest.input.make_contiguous());
                if used == 0 {
                    break;
                }
                guest.input.drain(..used.min(guest.input.len()));
            }
        }
    });
}

/// Waits until all output has left the serial port.
pub fn drain() {
    with(|console| console.serial.drain());
}

/// Whether a guest has typed input waiting.
pub fn has_input(guest: usize) -> bool {
    with(|console| {
        console
            .guests
            .get(guest)
            .is_some_and(|guest| !guest.input.is_empty())
    })
    .unwrap_or(false)
}

/// Shows what is left of guests' unfinished lines.
pub fn flush(guest: usize) {
    with(|console| console.flush_line(guest));
}

/// Takes what has come in on the serial line, and gives back a request if one is complete.
pub fn poll() -> Option<Request> {
    let mut console = CONSOLE.lock();
    let console = console.as_mut()?;
    while let Some(byte) = console.serial.receive() {
        if let Some(request) = console.key(byte) {
            return Some(request);
        }
    }
    None
}

/// Opens the console again after a panic that happened while it was held.
///
/// # Safety
/// The holder is gone.
pub unsafe fn force_unlock() {
    if CONSOLE.is_locked() {
        // SAFETY: promised by the caller.
        unsafe { CONSOLE.force_unlock() };
    }
}

fn with<T>(work: impl FnOnce(&mut Console) -> T) -> Option<T> {
    CONSOLE.lock().as_mut().map(work)
}

impl Console {
    fn raw(&mut self, bytes: &[u8]) {
        self.serial.send(bytes);
        if let Some(last) = bytes.last() {
            self.fresh_line = *last == b'\n';
        }
    }

    fn line(&mut self, tag: &str, text: &[u8]) {
        if !self.fresh_line {
            self.raw(b"\r\n");
        }
        self.raw(tag.as_bytes());
        self.raw(b"| ");
        self.raw(text);
        self.raw(b"\r\n");
    }

    fn log(&mut self, text: &str) {
        for part in text.lines() {
            self.line("tessera", part.as_bytes());
            if let Some(screen) = &mut self.screen {
                screen.write_line(part);
            }
        }
    }

    fn guest_output(&mut self, guest: usize, bytes: &[u8]) {
        if self.focus == Focus::Guest(guest) {
            self.raw(bytes);
            return;
        }
        for &byte in bytes {
            let Some(console) = self.guests.get_mut(guest) else {
                return;
            };
            match byte {
                b'\r' => {}
                b'\n' => self.show_line(guest),
                _ => {
                    console.line.push(byte);
                    if console.line.len() >= LINE_LIMIT {
                        self.show_line(guest);
                    }
                }
            }
        }
    }

    fn show_line(&mut self, guest: usize) {
        let Some(console) = self.guests.get_mut(guest) else {
            return;
        };
        let line = core::mem::take(&mut console.line);
        let name = console.name.clone();
        self.line(&name, &line);
    }

    fn flush_line(&mut self, guest: usize) {
        if self
            .guests
            .get(guest)
            .is_some_and(|guest| !guest.line.is_empty())
        {
            self.show_line(guest);
        }
    }

    fn set_focus(&mut self, focus: Focus) {
        if let Focus::Guest(guest) = focus {
            self.flush_line(guest);
        }
        self.focus = focus;
        let mut text = String::new();
        let _ = match focus {
            Focus::Monitor => write!(text, "keyboard: monitor (`help` lists its commands)"),
            Focus::Guest(guest) => {
                let name = self.guests.get(guest).map_or("", |guest| &guest.name);
                write!(text, "keyboard: {name} (Ctrl-T ? for help)")
            }
        };
        self.log(&text);
    }

    fn key(&mut self, byte: u8) -> Option<Request> {
        if core::mem::take(&mut self.prefix) {
            let guests = self.guests.len();
            match byte {
                PREFIX => self.input(PREFIX),
                b'0' => self.set_focus(Focus::Monitor),
                b'1'..=b'9' if usize::from(byte - b'1') < guests => {
                    self.set_focus(Focus::Guest(usize::from(byte - b'1')));
                }
                b'n' => self.set_focus(match self.focus {
                    Focus::Monitor if guests > 0 => Focus::Guest(0),
                    Focus::Guest(guest) if guest + 1 < guests => Focus::Guest(guest + 1),
                    _ => Focus::Monitor,
                }),
                b'x' => return Some(Request::Leave),
                _ => self.log(
                    "Ctrl-T then: 0 monitor, 1-9 that VM, n next, x end all VMs and power off, \
                     Ctrl-T sends Ctrl-T, ? this help",
                ),
            }
            return None;
        }
        match (byte, self.focus) {
            (PREFIX, _) => self.prefix = true,
            (_, Focus::Guest(_)) => self.input(byte),
            (b'\r' | b'\n', Focus::Monitor) => {
                self.raw(b"\r\n");
                return self.command();
            }
            (8 | 127, Focus::Monitor) if self.command.pop().is_some() => self.raw(b"\x08 \x08"),
            (b' '..=b'~', Focus::Monitor) if self.command.len() < LINE_LIMIT => {
                self.command.push(char::from(byte));
                self.raw(&[byte]);
            }
            _ => {}
        }
        None
    }

    /// Reads the typed line and serves what is the console's own.
    fn command(&mut self) -> Option<Request> {
        let line = core::mem::take(&mut self.command);
        let names: Vec<String> = self.guests.iter().map(|guest| guest.name.clone()).collect();
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        match monitor::command::parse(&line, &names) {
            Ok(None) => {}
            Ok(Some(Command::Console(guest))) => self.set_focus(Focus::Guest(guest)),
            Ok(Some(command)) => return Some(Request::Command(command)),
            Err(error) => {
                let mut text = String::new();
                let _ = write!(text, "{error}");
                self.log(&text);
            }
        }
        None
    }

    fn input(&mut self, byte: u8) {
        if let Focus::Guest(guest) = self.focus
            && let Some(guest) = self.guests.get_mut(guest)
            && guest.input.len() < INPUT_LIMIT
        {
            guest.input.push_back(byte);
        }
    }
}

struct Logger;

impl log::Log for Logger {
    fn enabled(&self, _: &log::Metadata<'_>) -> bool {
        true
    }
    fn log(&self, record: &log::Record<'_>) {
        let tag = match record.level() {
            log::Level::Error => "error: ",
            log::Level::Warn => "warning: ",
            _ => "",
        };
        say(format_args!("{tag}{}", record.args()));
    }
    fn flush(&self) {}
}

/// Answers at the monitor: like a line of the log, but not kept in it.
pub fn reply(text: fmt::Arguments<'_>) {
    say(text);
}

/// Writes a line of the log whatever the log level.
pub fn say(text: fmt::Arguments<'_>) {
    /// A log line without the heap, so that running out of it can still be told.
    struct Line {
        bytes: [u8; 1024],
        used: usize,
    }
    impl Write for Line {
        fn write_str(&mut self, text: &str) -> fmt::Result {
            let room = self.bytes.len() - self.used;
            let mut take = text.len().min(room);
            while !text.is_char_boundary(take) {
                take -= 1;
            }
            self.bytes[self.used..self.used + take].copy_from_slice(&text.as_bytes()[..take]);
            self.used += take;
            Ok(())
        }
    }
    let mut line = Line {
        bytes: [0; 1024],
        used: 0,
    };
    let _ = line.write_fmt(text);
    let text = core::str::from_utf8(&line.bytes[..line.used]).unwrap_or("");
    with(|console| console.log(text));
}
