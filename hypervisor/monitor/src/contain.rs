//! How far a guest's output gets: a reader of one guest's bytes that cuts them into whole
//! characters, line ends and control sequences, and lets nothing through that is half of one.
//!
//! A serial console shares the terminal with the log and with other guests. So a control
//! sequence (ECMA-48 §5.4, §5.6; DEC VT510, chapter 4) is
//! passed on only when it is complete, only if it draws
//! or sets a mode that [`Contain::reset`] can take back, and only for the guest in focus; for the
//! others it vanishes. Command strings (OSC, DCS, SOS, PM, APC) talk to the terminal program and
//! not to the screen (its title, its clipboard, its answers): they never pass. A raw byte
//! 0x80–0x9f and the characters U+0080–U+009f are the 8-bit forms of ESC and a letter, and are
//! read as such. Invalid UTF-8 becomes `?`.
//!
//! The word `tessera|` marks the log, so no guest may write it: it comes out as `tessera\|`,
//! whatever sequences stand between its letters.

/// The longest control sequence that passes.
const LONGEST: usize = 32;
/// A command string that is longer than this was none.
const STRING_LIMIT: u16 = 512;
/// What only the hypervisor may write.
pub const MARK: &[u8] = b"tessera|";

/// A whole piece of a guest's output.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Piece<'a> {
    /// One printable character in UTF-8, or a few that stand for it.
    Text(&'a [u8]),
    /// A control character that moves the cursor or rings: BEL, BS, HT, LF, VT, FF, CR, SO, SI.
    Control(u8),
    /// A control sequence that may pass, and whether it leaves the cursor where it is.
    Sequence(&'a [u8], bool),
}

/// Modes that a guest has set and a log line, or the next in focus, must not meet.
mod dirt {
    pub const RENDITION: u8 = 1;
    pub const CHARSET: u8 = 2;
    /// Scroll region, origin mode, alternate screen: a screen of its own.
    pub const SCREEN: u8 = 4;
    pub const ALTERNATE: u8 = 8;
    /// Insert mode, no wrapping, reverse screen.
    pub const WRITING: u8 = 16;
    /// What the keyboard and the mouse send, and the cursor.
    pub const KEYBOARD: u8 = 32;
    /// Not a mode: the alternate screen is left.
    pub const LEAVES: u8 = 64;
    /// Not a mode: the cursor moves.
    pub const MOVES: u8 = 128;
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Ground,
    /// In a UTF-8 character, this many bytes to come.
    Character(u8),
    /// After ESC, or its 8-bit form.
    Escape,
    /// After `ESC [`.
    Sequence,
    /// In a command string, this long; and whether ESC was the last.
    String(u16, bool),
}

/// The modes that a guest has brought the terminal into.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Modes(u8);

/// The reader of one guest's output.
#[derive(Debug)]
pub struct Contain {
    state: State,
    held: [u8; LONGEST],
    used: usize,
    /// Characters of [`MARK`] that stand at the end of what was printed.
    mark: usize,
    dirt: u8,
}

impl Default for Contain {
    fn default() -> Self {
        Self {
            state: State::Ground,
            held: [0; LONGEST],
            used: 0,
            mark: 0,
            dirt: 0,
        }
    }
}

impl Contain {
    /// Reads a byte and gives what it completes.
    pub fn push(&mut self, byte: u8, give: &mut dyn FnMut(Piece<'_>)) {
        match self.state {
            State::Ground => self.ground(byte, give),
            State::Character(left) => {
                if byte & 0xc0 != 0x80 {
                    self.text(b"?", give);
                    return self.ground(byte, give);
                }
                self.hold(byte);
                if left > 1 {
                    self.state = State::Character(left - 1);
                } else {
                    self.character(give);
                }
            }
            State::Escape => self.escape(byte, give),
            State::Sequence => match byte {
                0x20..=0x3f => self.hold(byte),
                0x40..=0x7e => {
                    self.hold(byte);
                    self.sequence(give);
                }
                _ => self.broken(byte, give),
            },
            State::String(length, escaped) => match byte {
                // ST, in both forms, or what xterm takes for it.
                b'\\' if escaped => self.state = State::Ground,
                0x07 | 0x9c => self.state = State::Ground,
                // Nobody's string goes on in the next line.
                b'\n' | 0x18 | 0x1a => self.broken(byte, give),
                _ if length >= STRING_LIMIT => self.state = State::Ground,
                _ => self.state = State::String(length + 1, byte == 0x1b),
            },
        }
    }

    /// Forgets what is half said.
    pub fn cut(&mut self) {
        self.state = State::Ground;
        self.used = 0;
    }

    /// The modes that the terminal is in because of this guest.
    #[must_use]
    pub const fn modes(&self) -> Modes {
        Modes(self.dirt)
    }

    /// The terminal did not see what came since: it is still in these modes.
    pub const fn unseen(&mut self, modes: Modes) {
        self.dirt = modes.0;
    }

    /// Takes the modes back that disturb a line of text, or with `all` also those that disturb
    /// the next in focus. Says whether the cursor was moved to the start of the last line.
    pub fn reset(&mut self, all: bool, out: &mut dyn FnMut(&[u8])) -> bool {
        use dirt::*;
        let mut take = |mask: u8, sequence: &[u8]| {
            let set = self.dirt & mask != 0;
            self.dirt &= !mask;
            if set {
                out(sequence);
            }
            set
        };
        take(RENDITION, b"\x1b[m");
        take(CHARSET, b"\x0f\x1b(B");
        take(WRITING, b"\x1b[4l\x1b[?7h\x1b[?5l");
        let left = take(ALTERNATE, b"\x1b[?1049l");
        // Both of the first two take the cursor home.
        let moved = take(SCREEN, b"\x1b[?6l\x1b[r\x1b[999H\r\n");
        if all {
            take(
                KEYBOARD,
                b"\x1b[?1l\x1b>\x1b[?25h\x1b[?1000;1002;1003;1004;1005;1006;1015;2004l",
            );
        }
        moved
            || left && {
                out(b"\x1b[999H\r\n");
                true
            }
    }

    fn hold(&mut self, byte: u8) {
        if let Some(place) = self.held.get_mut(self.used) {
            *place = byte;
        }
        // One past the end says that it was too long.
        self.used = (self.used + 1).min(LONGEST + 1);
    }

    fn ground(&mut self, byte: u8, give: &mut dyn FnMut(Piece<'_>)) {
        self.state = State::Ground;
        self.used = 0;
        let begin = |this: &mut Self, left| {
            this.hold(byte);
            this.state = State::Character(left);
        };
        match byte {
            b' '..=b'~' => self.text(&[byte], give),
            0x07..=0x0f => {
                match byte {
                    0x0e => self.dirt |= dirt::CHARSET,
                    b'\n' => self.mark = 0,
                    _ => {}
                }
                give(Piece::Control(byte));
            }
            0x1b => self.begin(),
            0x80..=0x9f => self.eight_bit(byte, give),
            0xc2..=0xdf => begin(self, 1),
            0xe0..=0xef => begin(self, 2),
            0xf0..=0xf4 => begin(self, 3),
            0xa0.. => self.text(b"?", give),
            // The rest makes terminals answer or stop.
            _ => {}
        }
    }

    fn begin(&mut self) {
        self.used = 0;
        self.hold(0x1b);
        self.state = State::Escape;
    }

    /// The 8-bit form of ESC and a letter.
    fn eight_bit(&mut self, byte: u8, give: &mut dyn FnMut(Piece<'_>)) {
        self.begin();
        self.escape(byte - 0x40, give);
    }

    /// A sequence is cut short by this byte.
    fn broken(&mut self, byte: u8, give: &mut dyn FnMut(Piece<'_>)) {
        self.cut();
        self.ground(byte, give);
    }

    /// A character is complete, if it is one.
    fn character(&mut self, give: &mut dyn FnMut(Piece<'_>)) {
        self.state = State::Ground;
        let (held, used) = (self.held, self.used);
        let held = held.get(..used).unwrap_or_default();
        match core::str::from_utf8(held)
            .ok()
            .and_then(|text| text.chars().next())
        {
            None => self.text(b"?", give),
            Some(c @ '\u{80}'..='\u{9f}') => self.eight_bit(c as u8, give),
            // They turn the direction of a line, or end it.
            Some('\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}') => {}
            Some(_) => self.text(held, give),
        }
    }

    /// Gives a character, unless it completes the mark.
    fn text(&mut self, text: &[u8], give: &mut dyn FnMut(Piece<'_>)) {
        if text.first() == MARK.get(self.mark) {
            self.mark += 1;
        } else {
            // Its first letter comes in it only once.
            self.mark = usize::from(text.first() == MARK.first());
        }
        if self.mark == MARK.len() {
            self.mark = 0;
            return give(Piece::Text(b"\\|"));
        }
        give(Piece::Text(text));
    }

    fn escape(&mut self, byte: u8, give: &mut dyn FnMut(Piece<'_>)) {
        match (byte, self.used) {
            (b'[', 1) => {
                self.hold(byte);
                self.state = State::Sequence;
            }
            (b'P' | b'X' | b']' | b'^' | b'_', 1) => self.state = State::String(0, false),
            (0x20..=0x2f, _) => {
                self.hold(byte);
                self.state = State::Escape;
            }
            (0x30..=0x7e, _) => {
                self.hold(byte);
                self.short(give);
            }
            _ => self.broken(byte, give),
        }
    }

    /// `ESC`, intermediates, final byte.
    fn short(&mut self, give: &mut dyn FnMut(Piece<'_>)) {
        self.state = State::Ground;
        let held = self.held;
        let held = held.get(..self.used).unwrap_or_default();
        let stays = match held.get(1..).unwrap_or_default() {
            // Save and restore the cursor; index, next line, reverse index, tab stop.
            b"7" | b"8" | b"D" | b"E" | b"M" | b"H" => false,
            // All new.
            b"c" => {
                self.dirt = 0;
                false
            }
            b"=" | b">" => {
                self.dirt |= dirt::KEYBOARD;
                true
            }
            [b'(', b'B'] | [b')' | b'*' | b'+', b'B' | b'0' | b'A' | b'K' | b'U'] => true,
            [b'(', b'0' | b'A' | b'K' | b'U'] => {
                self.dirt |= dirt::CHARSET;
                true
            }
            _ => return,
        };
        give(Piece::Sequence(held, stays));
    }

    /// `ESC [`, parameters, intermediates, final byte.
    fn sequence(&mut self, give: &mut dyn FnMut(Piece<'_>)) {
        self.state = State::Ground;
        let held = self.held;
        let Some([_, _, parameters @ .., last]) = held.get(..self.used) else {
            return;
        };
        let private = parameters.strip_prefix(b"?");
        let plain = parameters.iter().all(|byte| matches!(byte, b'0'..=b';'));
        let set = *last == b'h';
        let marks = match (last, private) {
            (b'm', None) if matches!(parameters, b"" | b"0") => {
                self.dirt &= !dirt::RENDITION;
                0
            }
            (b'm', None) if plain => dirt::RENDITION,
            (b'r', None) if parameters.is_empty() => dirt::MOVES,
            (b'r', None) if plain => dirt::SCREEN | dirt::MOVES,
            (b'h' | b'l', Some(modes)) => match modes_of(modes, |mode| private_mode(mode, set)) {
                Some(marks) => marks,
                None => return,
            },
            (b'h' | b'l', None) if parameters == b"4" => {
                if set {
                    dirt::WRITING
                } else {
                    0
                }
            }
            // Who are you, where is the cursor: it is the guest in focus that gets the answer.
            (b'c' | b'n', None) if plain => 0,
            (b'J' | b'K', Some(_)) => dirt::MOVES,
            (b'@'..=b'M' | b'P' | b'S' | b'T' | b'X' | b'Z', None)
            | (b'`' | b'a' | b'b' | b'd'..=b'g' | b's' | b'u', None)
                if plain =>
            {
                dirt::MOVES
            }
            _ => return,
        };
        if marks & dirt::LEAVES != 0 {
            self.dirt &= !dirt::ALTERNATE;
        }
        self.dirt |= marks & !(dirt::LEAVES | dirt::MOVES);
        give(Piece::Sequence(
            held.get(..self.used).unwrap_or_default(),
            marks & dirt::MOVES == 0,
        ));
    }
}

/// The marks of all modes in a list, or `None` if one of them may not be set.
fn modes_of(list: &[u8], mark: impl Fn(u32) -> Option<u8>) -> Option<u8> {
    list.split(|byte| *byte == b';')
        .try_fold(0, |marks, digits| {
            let mode = digits.iter().try_fold(0u32, |number, digit| {
                let digit = digit.is_ascii_digit().then(|| u32::from(digit - b'0'))?;
                number.checked_mul(10)?.checked_add(digit)
            })?;
            Some(marks | mark(mode)?)
        })
}

/// What setting or resetting one of DEC's and xterm's modes does.
const fn private_mode(mode: u32, set: bool) -> Option<u8> {
    Some(match (mode, set) {
        (5, true) | (7, false) => dirt::WRITING,
        (6, true) => dirt::SCREEN | dirt::MOVES,
        (6, false) | (1048, _) => dirt::MOVES,
        (47 | 1047 | 1049, true) => dirt::ALTERNATE | dirt::MOVES,
        (47 | 1047 | 1049, false) => dirt::LEAVES | dirt::MOVES,
        (25, false) | (1 | 12 | 1000 | 1002..=1006 | 1015 | 2004, true) => dirt::KEYBOARD,
        (5 | 7 | 25, _) | (1 | 12 | 1000 | 1002..=1006 | 1015 | 2004, false) => 0,
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec::Vec;

    /// What of a guest's output passes in focus.
    fn passed(contain: &mut Contain, bytes: &[u8]) -> Vec<u8> {
        let mut all = Vec::new();
        for &byte in bytes {
            contain.push(byte, &mut |piece| match piece {
                Piece::Text(text) | Piece::Sequence(text, _) => all.extend_from_slice(text),
                Piece::Control(byte) => all.push(byte),
            });
        }
        all
    }

    #[test]
    fn whole_sequences_that_draw_pass_and_nothing_else_does() {
        for (written, seen) in [
            (&b"plain\r\n"[..], &b"plain\r\n"[..]),
            (b"\x1b[1;31mred\x1b[m", b"\x1b[1;31mred\x1b[m"),
            (
                b"\x1b[?25l\x1b[?2004h\x1b[6n",
                b"\x1b[?25l\x1b[?2004h\x1b[6n",
            ),
            (
                b"\x1b7\x1b[r\x1b[999;999H\x1b8",
                b"\x1b7\x1b[r\x1b[999;999H\x1b8",
            ),
            (b"\x9b31mx", b"\x1b[31mx"),
            (b"\xc2\x9b31mx", b"\x1b[31mx"),
            // Title, clipboard, device control, application: by 7 and 8 bits, ended or not.
            (b"\x1b]0;title\x07a\x1b]52;c;aGk=\x1b\\b", b"ab"),
            (b"\x90q#0\x9ca\x9fx\x1b\\b\x1b^p\x1b\\c", b"abc"),
            (b"\x1b]0;no end\nhere", b"\nhere"),
            // Lock the keyboard, print, report the title, hide updates, another character set.
            (
                b"\x1b[2h\x1b[5i\x1b[21t\x1b[?2026h\x1b%@\x1b[?25;2026hx",
                b"x",
            ),
            // Enquiry, flow control, DEL, NUL.
            (b"\x05\x13\x11\x7f\0x", b"x"),
            // Cut short by another.
            (b"\x1b[3\x1b[4mx\x1b[\nx\x1b\x1b[mx", b"\x1b[4mx\nx\x1b[mx"),
            (b"\x1b[1111111111111111111111111111111111111111mx", b"x"),
            // UTF-8: right, cut, overlong, surrogate, too high, alone, turned around.
            ("aä€😀".as_bytes(), "aä€😀".as_bytes()),
            (b"\xe2\x82x", b"?x"),
            // A terminal without UTF-8 takes the second byte for ESC and a letter.
            (b"\xc0\x9b0mx", b"?\x1b[0mx"),
            (b"\xe0\x80\x80x", b"?x"),
            (b"\xed\xa0\x80 \xf4\x90\x80\x80 \xff", b"? ? ?"),
            ("a\u{202e}b\u{2028}c".as_bytes(), b"abc"),
        ] {
            let all = passed(&mut Contain::default(), written);
            assert_eq!(
                all.escape_ascii().collect::<Vec<u8>>(),
                seen.escape_ascii().collect::<Vec<u8>>(),
                "{}",
                written.escape_ascii()
            );
        }
    }

    #[test]
    fn nobody_but_the_log_writes_its_mark() {
        for written in [
            &b"tessera| end: status=0"[..],
            b"tess\rera| x",
            b"tes\x1b[1msera\x1b[m| x",
            b"xtessera| x",
            b"tesstessera| x",
            b"tess\x1b]0;t\x07era| x",
            b"te\0ssera\x7f| x",
        ] {
            let all = passed(&mut Contain::default(), written);
            assert!(all.windows(2).any(|two| two == b"\\|"), "{all:?}");
        }
        assert_eq!(passed(&mut Contain::default(), b"tessera |"), b"tessera |");
        // Designations of odd character sets do not hide a letter.
        let all = passed(&mut Contain::default(), b"\x1b(tessera| x");
        assert_eq!(all, b"essera| x");
    }

    #[test]
    fn modes_are_taken_back_once_and_only_if_set() {
        let reset = |written: &[u8], all| {
            let mut contain = Contain::default();
            passed(&mut contain, written);
            let mut bytes = Vec::new();
            contain.reset(all, &mut |part| bytes.extend_from_slice(part));
            let mut again = Vec::new();
            contain.reset(all, &mut |part| again.extend_from_slice(part));
            assert!(again.is_empty());
            bytes
        };
        assert_eq!(
            reset(b"plain \x1b[1mbold\x1b[0m \x1b[?7h\x1b[?25h", true),
            b""
        );
        assert_eq!(reset(b"\x1b[31m", false), b"\x1b[m");
        assert_eq!(reset(b"\x0e", false), b"\x0f\x1b(B");
        assert_eq!(reset(b"\x1b[?25l", false), b"");
        assert!(!reset(b"\x1b[?25l", true).is_empty());
        assert!(reset(b"\x1b[?1049h", false).starts_with(b"\x1b[?1049l"));
        assert_eq!(reset(b"\x1b[?1049h\x1b[?1049l", false), b"");
        assert_eq!(reset(b"\x1b[31m\x1b[?6h\x1b[4h\x1bc", true), b"");
    }
}
