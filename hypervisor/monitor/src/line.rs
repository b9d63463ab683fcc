//! The line that is typed at the monitor: editing as in a shell, a short history, completion.

use crate::command::{self, Names};
use crate::keys::Key;
use alloc::collections::VecDeque;
use alloc::string::String;
use alloc::vec::Vec;

/// The longest line: flows are long.
pub const LIMIT: usize = 250;
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
    #[inline(never)]
    pub fn key(&mut self, key: Key, names: Names<'_>, out: &mut dyn FnMut(&[u8])) -> Edit {
        let end = self.text.len();
        match key {
            Key::Byte(byte @ b' '..=b'~') => {
                if end >= LIMIT {
                    out(BELL);
                    return Edit::More;
                }
                if end == 0 {
                    // It stands there already where letters were taken back.
                    out(b"\r");
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

    #[inline(never)]
    fn complete(&mut self, names: Names<'_>, out: &mut dyn FnMut(&[u8])) -> Edit {
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::keys::Keys;

    /// Types bytes; gives the finished lines and refusals, and what the terminal got.
    fn type_in(editor: &mut Editor, bytes: &[u8]) -> (Vec<Edit>, Vec<u8>) {
        let (mut keys, mut edits, mut shown) = (Keys::default(), Vec::new(), Vec::new());
        for key in bytes.iter().filter_map(|byte| keys.push(*byte)) {
            let names = Names {
                vms: &["linux", "hello"],
                switches: &[],
            };
            let edit = editor.key(key, names, &mut |bytes| shown.extend_from_slice(bytes));
            if edit != Edit::More {
                edits.push(edit);
            }
        }
        (edits, shown)
    }

    #[test]
    fn a_line_is_edited_as_in_a_shell() {
        for (typed, line) in [
            (&b"list\r"[..], "list"),
            (b"lost\x7f\x7f\x08ist\r", "list"),
            (b"ist\x01l\r", "list"),
            (b"lst\x1b[D\x1b[Di\r", "list"),
            (b"listen\x1b[D\x1b[D\x0b\r", "list"),
            (b"nonsense\x15list\r", "list"),
            (b"info linux\x17hello\r", "info hello"),
            (b"rubbish\x03list\r", "list"),
            (b"xlist\x1b[H\x1b[3~\x05\r", "list"),
            (b"l\t\x0c\r", "l"),
            (b"inf\tli\t\r", "info linux "),
            (b"sched linux we\t9\r", "sched linux weight=9"),
            (b"li\xc3\xa4st\x7f\x7f\r", "li"),
        ] {
            let (edits, _) = type_in(&mut Editor::default(), typed);
            let done = edits.into_iter().find_map(|edit| match edit {
                Edit::Done(line) => Some(line),
                _ => None,
            });
            assert_eq!(done.as_deref(), Some(line), "{:?}", typed.escape_ascii());
        }
    }

    #[test]
    fn history_is_walked_and_bounded() {
        let mut editor = Editor::default();
        for number in 0..40 {
            type_in(&mut editor, alloc::format!("info {number}\r").as_bytes());
        }
        assert_eq!(editor.history.len(), HISTORY);
        let (edits, _) = type_in(&mut editor, b"\x1b[A\x1b[A\x1b[B\r");
        assert_eq!(edits, [Edit::Done("info 39".into())]);
        let (edits, _) = type_in(&mut editor, b"\x1b[A\x1b[A\r");
        assert_eq!(edits, [Edit::Done("info 38".into())]);
        let (edits, _) = type_in(&mut editor, b"\x10\x0e\r");
        assert_eq!(edits, [Edit::Done(String::new())]);
    }

    #[test]
    fn choices_are_told_and_other_scripts_refused() {
        let (edits, _) = type_in(&mut Editor::default(), b"st\t");
        assert_eq!(edits, [Edit::Choices("start stop".into())]);
        let (edits, _) = type_in(&mut Editor::default(), "ä€".as_bytes());
        let refusal = Edit::Refused("the monitor takes plain ASCII only");
        assert_eq!(edits.len(), 2);
        assert!(edits.iter().all(|edit| *edit == refusal));
    }

    proptest::proptest! {
        #[test]
        fn whatever_is_typed_the_line_stays_short_and_the_cursor_on_it(
            bytes in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..600),
        ) {
            let mut editor = Editor::default();
            type_in(&mut editor, &bytes);
            assert!(editor.text.len() <= LIMIT && editor.text.is_ascii());
            assert!(editor.cursor <= editor.text.len());
        }
    }
}
