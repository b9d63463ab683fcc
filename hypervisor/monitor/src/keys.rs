//! Keys from the bytes that terminals send for them.

/// A key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Key {
    /// A byte: a character or a control character.
    Byte(u8),
    /// Cursor up.
    Up,
    /// Cursor down.
    Down,
    /// Cursor left.
    Left,
    /// Cursor right.
    Right,
    /// To the start of the line.
    Home,
    /// To the end of the line.
    End,
    /// Remove the character under the cursor.
    Delete,
    /// A page up.
    PageUp,
    /// A page down.
    PageDown,
    /// Any other.
    Other,
}

/// The reader of keys.
#[derive(Debug, Default)]
pub struct Keys {
    /// 0: no sequence; 1: after ESC; 2: after `ESC [` or `ESC O`.
    inside: u8,
    /// The first digit of a sequence's parameter.
    digit: u8,
}

impl Keys {
    /// Whether a sequence is under way.
    #[must_use]
    pub const fn inside(&self) -> bool {
        self.inside > 0
    }

    /// Reads a byte and gives the key that it completes.
    pub fn push(&mut self, byte: u8) -> Option<Key> {
        match (self.inside, byte) {
            (_, 0x1b) => {
                *self = Self {
                    inside: 1,
                    digit: 0,
                }
            }
            (0, _) => return Some(Key::Byte(byte)),
            (1, b'[' | b'O') => self.inside = 2,
            (2, b'0'..=b'9' | b';') => {
                if self.digit == 0 {
                    self.digit = byte;
                }
            }
            (_, last) => {
                let digit = self.digit;
                let begun = core::mem::take(&mut self.inside);
                self.digit = 0;
                return Some(match (begun, last, digit) {
                    (2, b'A', _) => Key::Up,
                    (2, b'B', _) => Key::Down,
                    (2, b'C', _) => Key::Right,
                    (2, b'D', _) => Key::Left,
                    (2, b'H', _) | (2, b'~', b'1' | b'7') => Key::Home,
                    (2, b'F', _) | (2, b'~', b'4' | b'8') => Key::End,
                    (2, b'~', b'3') => Key::Delete,
                    (2, b'~', b'5') => Key::PageUp,
                    (2, b'~', b'6') => Key::PageDown,
                    _ => Key::Other,
                });
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec::Vec;

    #[test]
    fn sequences_of_xterm_and_the_linux_console_are_read() {
        let mut keys = Keys::default();
        let bytes = b"a\x1b[A\x1bOB\x1b[1~\x1b[4~\x1b[5~\x1b[6~\x1b[3~\x1b[1;5C\x1b[15~\x1bxb";
        let read: Vec<Key> = bytes.iter().filter_map(|byte| keys.push(*byte)).collect();
        use Key::*;
        let expected = [
            Byte(b'a'),
            Up,
            Down,
            Home,
            End,
            PageUp,
            PageDown,
            Delete,
            Right,
            Home,
            Other,
            Byte(b'b'),
        ];
        // F5 and Home begin alike; nobody needs F5 here.
        assert_eq!(read, expected);
    }
}
