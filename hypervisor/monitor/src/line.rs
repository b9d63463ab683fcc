//! The line that is typed at the monitor: editing as in a shell, a short history, completion.

use crate::command;
use crate::keys::Key;
use alloc::collections::VecDeque;
use alloc::string::String;
use alloc::vec::Vec;

/// The longest line.
pub const LIMIT: usize = 120;
/// Lines that are remembered.
const HISTORY: usize = 16;
/// What stands before the line once something is typed.
const PROMPT: &[u8] = b"> ";
const BELL: &[u8] = b"\x07";

/// What came of a key.
#[derive(Debug, PartialEq, Eq)]
pub enum Edit {
    /// The line goes on.
    More,
    /// It is complete.
    Done(String),
    /// It could be completed in these ways.
    Choices(String),
    /// The key was refused for this reason.
    Refused(&'static str),
}

/// The line and its history.
#[derive(Debug, Default)]
pub struct Editor {
    /// ASCII alone.
    text: String,
    cursor: usize,
    history: VecDeque<String>,
    /// Which line of the history is shown, counted from the newest; 0 is none.
    recalled: usize,
}

impl Editor {
    /// Shows the line again, on a line of its own, if there is anything on it. Says whether.
    pub fn show(&self, out: &mut dyn FnMut(&[u8])) -> bool {
        if self.text.is_empty() {
            return false;
        }
        self.redraw(out);
        true
    }

    /// Takes a key.
    pub fn key(&mut self, key: Key, names: &[&str], out: &mut dyn FnMut(&[u8])) -> Edit {
        let end = self.text.len();
        match key {
            Key::Byte(byte @ b' '..=b'~') => {
                if end >= LIMIT {
                    out(BELL);
                    return Edit::More;
                }
                if end == 0 {
                    out(PROMPT);
                }
                self.text.insert(self.cursor, char::from(byte));
                self.cursor += 1;
                if self.cursor > end {
                    out(&[byte]);
                } else {
                    self.redraw(out);
                }
                return Edit::More;
            }
            Key::Byte(b'\r' | b'\n') => {
                out(b"\r\n");
                let line = core::mem::take(&mut self.text);
                self.cursor = 0;
                self.recalled = 0;
                self.remember(&line);
                return Edit::Done(line);
            }
            Key::Byte(b'\t') => return self.complete(names, out),
            Key::Byte(3) => {
                self.text.clear();
                self.cursor = 0;
                self.recalled = 0;
                out(b"^C\r\n");
                return Edit::More;
            }
            Key::Byte(12) => out(b"\x1b[2J\x1b[H"),
            Key::Byte(1) | Key::Home => self.cursor = 0,
            Key::Byte(5) | Key::End => self.cursor = end,
            Key::Left if self.cursor > 0 => self.cursor -= 1,
            Key::Right if self.cursor < end => self.cursor += 1,
            Key::Byte(8 | 127) if self.cursor > 0 => {
                self.cut(self.cursor - 1, self.cursor);
                if self.cursor == self.text.len() {
                    out(b"\x08 \x08");
                    return Edit::More;
                }
            }
            Key::Delete | Key::Byte(4) if self.cursor < end => {
                self.cut(self.cursor, self.cursor + 1)
            }
            Key::Byte(11) => self.cut(self.cursor, end),
            Key::Byte(21) => self.cut(0, self.cursor),
            Key::Byte(23) => {
                let before = self.text.get(..self.cursor).unwrap_or_default();
                let word = before
                    .trim_end_matches(' ')
                    .rfind(' ')
                    .map_or(0, |at| at + 1);
                self.cut(word, self.cursor);
            }
            Key::Up | Key::Byte(16) if self.recalled < self.history.len() => {
                self.recall(self.recalled + 1);
            }
            Key::Down | Key::Byte(14) if self.recalled > 0 => self.recall(self.recalled - 1),
            Key::Byte(0xc0..) => return Edit::Refused("the monitor takes plain ASCII only"),
            // The rest of that character.
            Key::Byte(0x80..) => return Edit::More,
            _ => {
                out(BELL);
                return Edit::More;
            }
        }
        self.redraw(out);
        Edit::More
    }

    fn redraw(&self, out: &mut dyn FnMut(&[u8])) {
        out(b"\r");
        out(PROMPT);
        out(self.text.as_bytes());
        out(b"\x1b[K");
        for _ in self.cursor..self.text.len() {
            out(b"\x08");
        }
    }

    fn cut(&mut self, first: usize, end: usize) {
        self.text.drain(first..end);
        self.cursor = first;
    }

    fn remember(&mut self, line: &str) {
        let line = line.trim();
        if line.is_empty() || self.history.back().is_some_and(|last| last == line) {
            return;
        }
        if self.history.len() >= HISTORY {
            self.history.pop_front();
        }
        self.history.push_back(line.into());
    }

    /// Shows a line of the history for editing.
    fn recall(&mut self, back: usize) {
        self.recalled = back;
        self.text.clear();
        if let Some(line) = self.history.iter().rev().nth(back.wrapping_sub(1)) {
            self.text.push_str(line);
        }
        self.cursor = self.text.len();
    }

    fn complete(&mut self, names: &[&str], out: &mut dyn FnMut(&[u8])) -> Edit {
        let before = self.text.get(..self.cursor).unwrap_or_default();
        let mut found: Vec<&str> = Vec::new();
        let begun = command::complete(before, names, &mut |word| found.push(word));
        let Some((first, others)) = found.split_first() else {
            out(BELL);
            return Edit::More;
        };
        // What all have in common is sure.
        let common = others.iter().fold(first.len(), |length, other| {
            let same = first.bytes().zip(other.bytes()).take_while(|(a, b)| a == b);
            same.count().min(length)
        });
        let mut more = String::from(first.get(begun..common).unwrap_or_default());
        if others.is_empty() && !first.ends_with('=') {
            more.push(' ');
        }
        if more.is_empty() {
            return Edit::Choices(found.join(" "));
        }
        if self.text.len() + more.len() > LIMIT {
            out(BELL);
            return Edit::More;
        }
        self.text.insert_str(self.cursor, &more);
        self.cursor += more.len();
        if self.cursor == self.text.len() && self.text.len() > more.len() {
            out(more.as_bytes());
        } else {
            self.redraw(out);
        }
        Edit::More
    }
}
