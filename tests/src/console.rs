//! What a machine has said on its serial line, as text that patterns can be matched on.
//!
//! Carriage returns and terminal escape sequences are left out, so that `^` and `$` mean what a
//! person sees. Positions count bytes of that text since power-on and stay valid when old text is
//! dropped from a long session.

/// Text kept of a long session; older text is dropped by halves.
const KEEP: usize = 4 << 20;

/// The last line of a Tessera session: `tessera| end: status=<n> <reason>`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct End {
    /// 0 when every VM ended well; else the failing VM's code, 101 for a crash, 102 for a
    /// configuration or boot error.
    pub status: u8,
    /// The rest of the line.
    pub reason: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Escape {
    None,
    /// After ESC.
    Started,
    /// Inside `ESC [ …`, until a final byte 0x40–0x7e.
    Control,
}

/// The console's text so far.
#[derive(Debug)]
pub struct Console {
    text: String,
    dropped: usize,
    escape: Escape,
    /// An unfinished UTF-8 sequence.
    partial: Vec<u8>,
}

impl Default for Console {
    fn default() -> Self {
        Self {
            text: String::new(),
            dropped: 0,
            escape: Escape::None,
            partial: Vec::new(),
        }
    }
}

impl Console {
    /// Adds bytes from the line.
    pub fn feed(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            match (self.escape, byte) {
                (Escape::None, 0x1b) => self.escape = Escape::Started,
                // Nor do the shifts between character sets print.
                (Escape::None, b'\r' | 0 | 0x0e | 0x0f) => {}
                (Escape::None, _) => self.partial.push(byte),
                (Escape::Started, b'[') => self.escape = Escape::Control,
                (Escape::Control, 0x20..=0x3f) => {}
                // `ESC ( B` and the like: one more byte belongs to it.
                (Escape::Started, 0x20..=0x2f) => {}
                _ => self.escape = Escape::None,
            }
        }
        loop {
            match std::str::from_utf8(&self.partial) {
                Ok(text) => {
                    self.text.push_str(text);
                    self.partial.clear();
                    break;
                }
                Err(error) => {
                    let good = self.partial.drain(..error.valid_up_to());
                    self.text
                        .push_str(&String::from_utf8_lossy(good.as_slice()));
                    drop(good);
                    // `None`: the sequence may still be completed by what comes next.
                    let Some(bad) = error.error_len() else { break };
                    self.partial.drain(..bad);
                    self.text.push(char::REPLACEMENT_CHARACTER);
                }
            }
        }
        if self.text.len() > KEEP {
            let mut cut = KEEP / 2;
            while !self.text.is_char_boundary(cut) {
                cut += 1;
            }
            self.text.drain(..cut);
            self.dropped += cut;
        }
    }

    /// The position after the last character.
    pub fn position(&self) -> usize {
        self.dropped + self.text.len()
    }

    /// The text from `position` on.
    pub fn since(&self, position: usize) -> &str {
        self.text
            .get(position.saturating_sub(self.dropped)..)
            .unwrap_or_default()
    }

    /// All text that is kept.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// Tessera's closing line, once it has come in whole.
    pub fn end(&self) -> Option<End> {
        let tail = self.since(self.position().saturating_sub(64 << 10));
        let line = match tail.rsplit_once("\ntessera| end: status=") {
            Some((_, line)) => line,
            None => tail.strip_prefix("tessera| end: status=")?,
        };
        let (line, _) = line.split_once('\n')?;
        let (status, reason) = line.split_once(' ').unwrap_or((line, ""));
        Some(End {
            status: status.parse().ok()?,
            reason: reason.trim().to_owned(),
        })
    }

    /// The last `lines` lines, for a report.
    pub fn tail(&self, lines: usize) -> String {
        let all: Vec<&str> = self.text.lines().collect();
        all.get(all.len().saturating_sub(lines)..)
            .unwrap_or_default()
            .join("\n")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn escapes_and_carriage_returns_are_left_out() {
        let mut console = Console::default();
        console.feed(b"\x1b[2J\x1b[01;01Hone\r\n\x1b[");
        console.feed(b"1;32mtwo\x1b[0m \xc3");
        console.feed(b"\xa4\xff!");
        assert_eq!(console.text(), "one\ntwo ä\u{fffd}!");
        assert_eq!(console.since(4), "two ä\u{fffd}!");
    }

    #[test]
    fn the_closing_line_counts_when_it_is_whole() {
        let mut console = Console::default();
        console
            .feed(b"~ # tessera| end: status=0\n\x1b(Btessera| end: status=101 vm linux crashed");
        assert_eq!(
            console.end(),
            None,
            "not at the start of a line, and not whole"
        );
        console.feed(b"\r\n");
        let end = console.end().expect("a whole line");
        assert_eq!((end.status, end.reason.as_str()), (101, "vm linux crashed"));
    }

    #[test]
    fn positions_survive_dropping_old_text() {
        let mut console = Console::default();
        for _ in 0..KEEP / 1024 + 1 {
            console.feed(&[b'x'; 1024]);
        }
        let here = console.position();
        console.feed(b"now");
        assert_eq!(console.since(here), "now");
        assert!(console.text().len() < KEEP);
    }
}
