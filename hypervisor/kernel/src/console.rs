//! The machine's console: the log and all guests' consoles on one serial line, with a prefix key to
//! choose whom the keyboard belongs to, and the same on the screen. [`monitor::mux`] says what
//! stands on the line; this says how it gets there without one core waiting for another.
//!
//! Whoever writes puts it into a bounded ring of its own, the log's or the guest's. Then, if
//! nobody else is at it, that core carries what is in all rings through the mux and into the
//! serial port, as much as that takes at once. The rest goes when the port has room: its
//! interrupt, or core 0's look at it, calls [`poll`].
//!
//! When a ring is full, its writer stays and carries until there is room. So a guest that floods
//! its console waits for the wire itself and loses nothing, just as on a real serial port; the
//! others' rings have room, and their cores never wait. To drop its output instead would
//! lose the last words before a crash, which are what a console is for.
//!
//! What goes to the line goes into a grid of the screen's cells as well. The screen itself is slow:
//! core 0 brings it up to date, [`FRAMES`] times a second at most and for [`DRAW`] microseconds at
//! most, and is called for it when there is something. So whoever writes pays for no screen, and a
//! flood of lines shows only where it is every now and then.
//!
//! Locks: a ring's is held for a copy. The line's is held while bytes are moved into the port's FIFO,
//! never while waiting for it; only core 0 and those whose ring is full wait for that lock. Order:
//! line → ring → heap. Nothing is called back under them.

use crate::bring_up::passed;
use crate::lock::Lock;
use alloc::collections::VecDeque;
use alloc::vec::Vec;
use core::fmt::{self, Write};
use core::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use hw::{ComPort, Screen, Serial};
use monitor::command::SwitchNames;
use monitor::grid::Grid;
pub use monitor::mux::Request;
use monitor::mux::{Focus, Mux};
use spin::Once;
use vm::config::MAX_VMS;

/// Bytes of a guest's output that wait for the line.
const GUEST_RING: usize = 4 << 10;
/// Bytes of the log that wait for it.
const LOG_RING: usize = 16 << 10;
/// A line of the log is cut here.
const LOG_LINE: usize = 1024;
/// Bytes kept of a guest's console, and of the log.
const GUEST_KEPT: usize = 16 << 10;
const LOG_KEPT: usize = 32 << 10;
/// Below this the next source's turn comes. It is short, so that keys are answered soon.
const QUEUE_LOW: usize = 256;
/// Room for what one turn makes of a log line at the worst.
const QUEUE: usize = 16 << 10;
/// A guest's share of a turn.
const TURN: usize = 64;
/// Turns after which a core has done enough for the others.
const TURNS: usize = 64;
/// Requests that core 0 has not taken yet.
const REQUESTS: usize = 16;
/// How often in a second the screen is brought up to date.
pub const FRAMES: u64 = 50;
/// Microseconds that this takes at most, for the time being.
const DRAW: u64 = 1000;

static LINE: Lock<Option<Line>> = Lock::new(None);
static LOG: Lock<VecDeque<u8>> = Lock::new(VecDeque::new());
static GUESTS: [Once<Source>; MAX_VMS] = [const { Once::new() }; MAX_VMS];
/// Something was put into a ring since the line's holder looked.
static WAITING: AtomicBool = AtomicBool::new(false);
/// The port interrupts when it has room; until it does, writers see their words out.
static INTERRUPTS: AtomicBool = AtomicBool::new(false);
/// Core 0 is at its work and looks after the screen; until then, writers do.
static KEPT_UP: AtomicBool = AtomicBool::new(false);
/// It has been called, and has not finished the screen yet.
static UNDRAWN: AtomicBool = AtomicBool::new(false);
/// The next line of the log tells of a panic: it is seen out as well.
static URGENT: AtomicBool = AtomicBool::new(false);

/// A guest's end of its console.
struct Source {
    ring: Lock<VecDeque<u8>>,
    /// Bytes of the ring that go before the next line of the log.
    before_log: AtomicUsize,
    /// Its own port and what was typed there.
    own: Option<Lock<(Serial, VecDeque<u8>)>>,
}

/// The shared line.
struct Line {
    serial: Serial,
    mux: Mux,
    wire: Wire,
    requests: VecDeque<Request>,
    /// Whose turn is next.
    next: usize,
}

/// What the mux made.
struct Wire {
    /// On its way to the port.
    queue: VecDeque<u8>,
    picture: Option<Picture>,
}

/// The screen.
struct Picture {
    grid: Grid,
    screen: Screen,
    /// TSC when it was drawn.
    drawn: u64,
}

/// Takes the serial port and, if there is one, the screen.
pub fn init(serial: Serial, screen: Option<Screen>) {
    // What a log line needs is there from the start: it may have to tell that memory is out.
    LOG.lock().reserve_exact(LOG_RING);
    *LINE.lock() = Some(Line {
        serial,
        mux: Mux::new(LOG_KEPT),
        wire: Wire {
            queue: VecDeque::with_capacity(QUEUE),
            picture: screen.map(|screen| {
                let (columns, rows) = screen.size();
                Picture {
                    grid: Grid::new(columns, rows),
                    screen,
                    drawn: 0,
                }
            }),
        },
        requests: VecDeque::with_capacity(REQUESTS),
        next: 0,
    });
    if log::set_logger(&Logger).is_ok() {
        log::set_max_level(log::LevelFilter::Info);
    }
}

/// The serial port's interrupt is routed: from now on nobody waits for the line.
pub fn use_interrupt() {
    INTERRUPTS.store(true, Ordering::Relaxed);
}

/// Adds a guest's console, on the shared line or on a serial port of its own, by its number on a
/// PC; guests are numbered in this order. Where the port does not work, the log says so and the
/// shared line serves.
pub fn add_guest(name: &str, port: Option<u8>) -> usize {
    let own = port.and_then(ComPort::new).and_then(|port| {
        // SAFETY: the hypervisor's own devices are fixed, and no other serial port is among them;
        // a port that another VM has is refused by the configuration.
        match unsafe { Serial::open(port) } {
            Ok(serial) => Some(Lock::new((serial, VecDeque::new()))),
            Err(error) => {
                log::error!("vm {name}: {error}; its console is on the shared line");
                None
            }
        }
    });
    if own.is_some() {
        crate::run::poll_serial();
    }
    let number = with(|line| line.mux.add(name, GUEST_KEPT, own.is_some())).unwrap_or(0);
    if let Some(place) = GUESTS.get(number) {
        place.call_once(|| Source {
            ring: Lock::new(VecDeque::with_capacity(GUEST_RING)),
            before_log: AtomicUsize::new(0),
            own,
        });
    }
    number
}

fn source(guest: usize) -> Option<&'static Source> {
    GUESTS.get(guest)?.get()
}

/// The switches that can be named at the monitor.
pub fn set_switches(switches: Vec<SwitchNames>) {
    with(|line| line.mux.set_switches(switches));
}

/// Gives a guest the keyboard, or else the monitor.
pub fn focus(guest: Option<usize>) {
    let focus = guest.map_or(Focus::Monitor, Focus::Guest);
    on_line(|mux, out| mux.set_focus(focus, out));
}

/// Passes on what a guest wrote.
pub fn guest_output(guest: usize, bytes: &[u8]) {
    let Some(source) = source(guest) else { return };
    let mut rest = bytes;
    loop {
        rest = rest
            .get(put(&source.ring, GUEST_RING, rest)..)
            .unwrap_or(&[]);
        if source.own.is_some() {
            source.serve_own();
        } else {
            carry();
        }
        if rest.is_empty() && (INTERRUPTS.load(Ordering::Relaxed) || source.ring.lock().is_empty())
        {
            break;
        }
        core::hint::spin_loop();
    }
}

/// Copies what was typed for a guest and waits, as far as it fits; gives how much.
pub fn peek_input(guest: usize, keys: &mut [u8]) -> usize {
    match source(guest).and_then(|source| source.own.as_ref()) {
        Some(own) => {
            let own = own.lock();
            let pairs = keys.iter_mut().zip(&own.1);
            pairs.map(|(to, from)| *to = *from).count()
        }
        None => with(|line| line.mux.typed_for(guest, keys)).unwrap_or(0),
    }
}

/// The guest took so much of it.
pub fn consume_input(guest: usize, count: usize) {
    match source(guest).and_then(|source| source.own.as_ref()) {
        Some(own) => {
            let typed = &mut own.lock().1;
            typed.drain(..count.min(typed.len()));
        }
        None => {
            with(|line| line.mux.taken(guest, count));
        }
    }
}

/// Whether a guest has typed input waiting.
pub fn has_input(guest: usize) -> bool {
    match source(guest).and_then(|source| source.own.as_ref()) {
        Some(own) => !own.lock().1.is_empty(),
        None => with(|line| line.mux.has_input(guest)).unwrap_or(false),
    }
}

/// A guest is over or starts anew: what it has written goes before the next line of the log, its
/// unfinished line with it.
pub fn flush(guest: usize) {
    if let Some(source) = source(guest) {
        let waiting = source.ring.lock().len();
        // One more stands for the unfinished line.
        source.before_log.store(waiting + 1, Ordering::Release);
        carry();
    }
}

/// Waits until all output has left the serial ports and is on the screen.
pub fn drain() {
    for source in GUESTS.iter().filter_map(Once::get) {
        while source.own.is_some() && !source.ring.lock().is_empty() {
            source.serve_own();
        }
    }
    while with(|line| line.serve()) == Some(true) {
        core::hint::spin_loop();
    }
    with(|line| {
        line.serial.drain();
        line.wire.draw(u64::MAX);
    });
}

/// Takes what has come in on the serial ports, sends what they have room for, and sees to the
/// screen. Gives back a request if one is complete: call it again until there is none. Core 0's
/// loop does.
pub fn poll() -> Option<Request> {
    KEPT_UP.store(true, Ordering::Relaxed);
    for source in GUESTS.iter().filter_map(Once::get) {
        source.serve_own();
    }
    with(|line| {
        line.move_bytes();
        line.wire.keep_up();
        line.requests.pop_front()
    })?
}

/// Whether the screen wants [`poll`] again, a frame from now at the latest.
pub fn is_undrawn() -> bool {
    UNDRAWN.load(Ordering::Relaxed)
}

/// Opens what this core holds of the console, after a panic that happened meanwhile.
///
/// # Safety
/// What this core did with it will not go on.
pub unsafe fn release() {
    // SAFETY: promised by the caller.
    unsafe { open(false) };
}

/// Opens the console whoever holds it.
///
/// # Safety
/// All other cores have stopped for good.
pub unsafe fn break_open() {
    // SAFETY: promised by the caller.
    unsafe { open(true) };
}

/// Opens all locks, or those of this core.
///
/// # Safety
/// Their holders will not go on.
unsafe fn open(all: bool) {
    unsafe fn one<T>(lock: &Lock<T>, all: bool) {
        // SAFETY: promised by the caller of `open`.
        unsafe {
            match all {
                true => lock.break_open(),
                false => lock.release(),
            }
        }
    }
    // SAFETY: promised by the caller.
    unsafe {
        one(&LINE, all);
        one(&LOG, all);
        for source in GUESTS.iter().filter_map(Once::get) {
            one(&source.ring, all);
            if let Some(own) = &source.own {
                one(own, all);
            }
        }
    }
    URGENT.store(true, Ordering::Relaxed);
}

fn with<T>(work: impl FnOnce(&mut Line) -> T) -> Option<T> {
    LINE.lock().as_mut().map(work)
}

/// Lets the mux write, and sends what there is room for.
fn on_line(work: impl FnOnce(&mut Mux, &mut dyn FnMut(&[u8]))) {
    with(|line| {
        // What was said before stands before it.
        line.take_all();
        work(&mut line.mux, &mut |bytes| line.wire.put(bytes));
        line.serve();
    });
}

/// One copy of the loop for all.
#[inline(never)]
fn add(ring: &mut VecDeque<u8>, bytes: &[u8]) {
    ring.extend(bytes);
}

/// Puts as much into a ring as there is room for, and says how much.
fn put(ring: &Lock<VecDeque<u8>>, limit: usize, bytes: &[u8]) -> usize {
    let mut ring = ring.lock();
    let count = bytes.len().min(limit.saturating_sub(ring.len()));
    add(&mut ring, bytes.get(..count).unwrap_or_default());
    drop(ring);
    WAITING.store(true, Ordering::SeqCst);
    count
}

/// Carries what is in the rings to the port, unless another core is at it: that one looks again
/// before it goes.
fn carry() {
    while WAITING.load(Ordering::SeqCst) {
        let Some(mut line) = LINE.try_lock() else {
            return;
        };
        WAITING.store(false, Ordering::SeqCst);
        match line.as_mut() {
            Some(line) => line.serve(),
            None => return,
        };
    }
}

impl Wire {
    /// Takes what the mux made.
    fn put(&mut self, bytes: &[u8]) {
        add(&mut self.queue, bytes);
        if let Some(picture) = &mut self.picture {
            picture.grid.feed(bytes);
        }
    }

    fn is_changed(&self) -> bool {
        let picture = self.picture.as_ref();
        picture.is_some_and(|picture| picture.grid.is_changed())
    }

    /// Calls core 0 when the screen is to be drawn, once until it is.
    fn call_for_drawing(&self) {
        if self.is_changed()
            && KEPT_UP.load(Ordering::Relaxed)
            && !UNDRAWN.swap(true, Ordering::Relaxed)
        {
            crate::bring_up::call_boot_core();
        }
    }

    /// Draws for a while if the time has come.
    fn keep_up(&mut self) {
        let mut left = self.is_changed();
        let drawn = self.picture.as_ref().map_or(0, |picture| picture.drawn);
        if left && passed(drawn, 1_000_000 / FRAMES) {
            self.draw(DRAW);
            left = self.is_changed();
        }
        UNDRAWN.store(left, Ordering::Relaxed);
    }

    /// Brings the screen up to date, as far as that is done in so many microseconds.
    fn draw(&mut self, most: u64) {
        let Some(picture) = &mut self.picture else {
            return;
        };
        let Picture {
            grid,
            screen,
            drawn,
        } = picture;
        *drawn = hw::rdtsc();
        grid.draw(&mut |row, column, cells| {
            screen.draw(row, column, cells);
            most == u64::MAX || !passed(*drawn, most)
        });
    }
}

impl Line {
    /// Moves bytes both ways until the port has no room or nothing is left. Says whether
    /// something is left.
    fn serve(&mut self) -> bool {
        let left = self.move_bytes();
        self.wire.call_for_drawing();
        left
    }

    fn move_bytes(&mut self) -> bool {
        for _ in 0..TURNS {
            while let Some(byte) = self.serial.receive() {
                let wire = &mut self.wire;
                let request = self.mux.key(byte, &mut |bytes| wire.put(bytes));
                if let Some(request) = request.filter(|_| self.requests.len() < REQUESTS) {
                    self.requests.push_back(request);
                }
            }
            while self.wire.queue.len() < QUEUE_LOW && self.take() {}
            let (front, _) = self.wire.queue.as_slices();
            let sent = self.serial.try_send(front);
            self.wire.queue.drain(..sent);
            let left = !self.wire.queue.is_empty();
            if sent > 0 && left {
                continue;
            }
            if !INTERRUPTS.load(Ordering::Relaxed) {
                return left;
            }
            self.serial.want_room(left);
            if !self.serial.interrupts() {
                return left;
            }
        }
        // Others write as fast as this core sends: core 0 goes on.
        self.serial.interrupt_again();
        true
    }

    /// Empties all rings as they are now into the queue.
    fn take_all(&mut self) {
        for _ in 0..(LOG_RING + MAX_VMS * GUEST_RING) / TURN {
            if !self.take() {
                break;
            }
        }
    }

    /// Takes the next source's turn. First what must stand before the log, then the log, then
    /// one guest after the other. Says whether there was anything.
    fn take(&mut self) -> bool {
        for (number, source) in GUESTS.iter().filter_map(Once::get).enumerate() {
            let before = source.before_log.load(Ordering::Acquire);
            if before == 0 {
                continue;
            }
            let taken = self.take_guest(number, source, before - 1);
            let left = if taken > 0 { before - taken } else { 0 };
            source.before_log.store(left, Ordering::Release);
            if taken == 0 {
                let wire = &mut self.wire;
                self.mux.flush(number, &mut |bytes| wire.put(bytes));
            }
            return true;
        }
        if self.take_log() {
            return true;
        }
        for _ in 0..MAX_VMS {
            let number = self.next;
            self.next = (self.next + 1) % MAX_VMS;
            if let Some(source) = source(number)
                && self.take_guest(number, source, TURN) > 0
            {
                return true;
            }
        }
        false
    }

    /// Takes a share of what a guest wrote.
    fn take_guest(&mut self, number: usize, source: &Source, most: usize) -> usize {
        if source.own.is_some() {
            return 0;
        }
        let mut bytes = [0; TURN];
        let count = get(&source.ring, bytes.iter_mut().take(most));
        let wire = &mut self.wire;
        let bytes = bytes.get(..count).unwrap_or_default();
        self.mux.output(number, bytes, &mut |bytes| wire.put(bytes));
        count
    }

    /// Takes a line of the log, whose first byte says whether it is to be kept.
    fn take_log(&mut self) -> bool {
        let mut bytes = [0; LOG_LINE];
        let mut ring = LOG.lock();
        let Some(end) = ring.iter().position(|byte| *byte == b'\n') else {
            return false;
        };
        let pairs = bytes.iter_mut().zip(ring.drain(..=end));
        pairs.for_each(|(to, from)| *to = from);
        drop(ring);
        let text = bytes.get(1..end).unwrap_or_default();
        let text = core::str::from_utf8(text).unwrap_or("");
        let wire = &mut self.wire;
        let mut out = |bytes: &[u8]| wire.put(bytes);
        if bytes.first() == Some(&KEPT) {
            self.mux.log(text, &mut out);
        } else {
            self.mux.reply(text, &mut out);
        }
        true
    }
}

/// Moves bytes out of a ring.
fn get<'a>(ring: &Lock<VecDeque<u8>>, to: impl Iterator<Item = &'a mut u8>) -> usize {
    let mut ring = ring.lock();
    let mut count = 0;
    for place in to {
        let Some(byte) = ring.pop_front() else { break };
        *place = byte;
        count += 1;
    }
    count
}

impl Source {
    /// Moves bytes both ways at a guest's own port.
    fn serve_own(&self) {
        let Some(mut own) = self.own.as_ref().and_then(Lock::try_lock) else {
            return;
        };
        let (serial, typed) = &mut *own;
        while let Some(byte) = serial.receive() {
            if typed.len() < monitor::mux::INPUT_LIMIT {
                typed.push_back(byte);
            }
        }
        let mut ring = self.ring.lock();
        loop {
            let sent = serial.try_send(ring.as_slices().0);
            if sent == 0 {
                break;
            }
            ring.drain(..sent);
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

/// Before a line in the log's ring: it is a line of the log.
const KEPT: u8 = b'k';
/// It is an answer at the monitor.
const ANSWER: u8 = b'a';

/// Writes a line of the log whatever the log level.
pub fn say(text: fmt::Arguments<'_>) {
    write(KEPT, text);
}

/// Answers at the monitor: like a line of the log, but not kept in it.
pub fn reply(text: fmt::Arguments<'_>) {
    write(ANSWER, text);
}

fn write(kind: u8, text: fmt::Arguments<'_>) {
    /// Text without the heap, so that running out of it can still be told. There is room for
    /// the mark before a line and for its end.
    struct Text {
        bytes: [u8; LOG_LINE - 2],
        used: usize,
    }
    impl Write for Text {
        fn write_str(&mut self, text: &str) -> fmt::Result {
            let room = self.bytes.len() - self.used;
            let mut take = text.len().min(room);
            while !text.is_char_boundary(take) {
                take -= 1;
            }
            let place = self.bytes.get_mut(self.used..self.used + take);
            if let (Some(place), Some(text)) = (place, text.as_bytes().get(..take)) {
                place.copy_from_slice(text);
                self.used += take;
            }
            Ok(())
        }
    }
    let mut whole = Text {
        bytes: [0; LOG_LINE - 2],
        used: 0,
    };
    let _ = whole.write_fmt(text);
    let text = whole.bytes.get(..whole.used).unwrap_or_default();
    for line in core::str::from_utf8(text).unwrap_or("").lines() {
        loop {
            let mut ring = LOG.lock();
            if ring.capacity() == 0 {
                // Nothing is set up yet.
                return;
            }
            if ring.len() + line.len() + 2 <= LOG_RING {
                ring.push_back(kind);
                add(&mut ring, line.as_bytes());
                ring.push_back(b'\n');
                break;
            }
            drop(ring);
            // The log loses nothing either.
            with(Line::serve);
        }
        WAITING.store(true, Ordering::SeqCst);
    }
    carry();
    let urgent = URGENT.swap(false, Ordering::Relaxed);
    if urgent || !INTERRUPTS.load(Ordering::Relaxed) {
        while with(Line::serve) == Some(true) {
            core::hint::spin_loop();
        }
    }
    if urgent || !KEPT_UP.load(Ordering::Relaxed) {
        with(|line| line.wire.draw(u64::MAX));
    }
}
