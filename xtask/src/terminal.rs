//! The terminal as a serial line: every key goes to the machine, none to the shell around us.

use std::io::{Read, stdin};
use std::sync::Mutex;
use std::sync::mpsc::Sender;

use harness::Received;
use nix::sys::termios::{self, OutputFlags, SetArg, Termios};

/// The settings to go back to.
static BEFORE: Mutex<Option<Termios>> = Mutex::new(None);

/// Raw mode, until dropped.
pub struct Raw;

impl Raw {
    /// Takes the terminal; `None` when standard input is none.
    pub fn enter() -> Option<Self> {
        let before = termios::tcgetattr(stdin()).ok()?;
        let mut raw = before.clone();
        termios::cfmakeraw(&mut raw);
        // A line feed still returns the carriage: our own messages and bare line feeds from
        // firmware stay readable, and a carriage return sent twice does no harm.
        raw.output_flags |= OutputFlags::OPOST | OutputFlags::ONLCR;
        termios::tcsetattr(stdin(), SetArg::TCSADRAIN, &raw).ok()?;
        *BEFORE.lock().unwrap_or_else(|e| e.into_inner()) = Some(before);
        Some(Self)
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        restore();
    }
}

/// Gives the terminal back as it was: also for the interrupt handler.
pub fn restore() {
    if let Some(before) = BEFORE.lock().unwrap_or_else(|e| e.into_inner()).take() {
        let _ = termios::tcsetattr(stdin(), SetArg::TCSADRAIN, &before);
    }
}

/// Sends what is typed, or piped in, to `events` until it ends.
pub fn forward_input(events: Sender<Received>) {
    std::thread::spawn(move || {
        let mut buffer = [0; 256];
        while let Ok(n @ 1..) = stdin().read(&mut buffer) {
            let typed = buffer.get(..n).unwrap_or_default().to_vec();
            if events.send(Received::Input(typed)).is_err() {
                return;
            }
        }
    });
}
