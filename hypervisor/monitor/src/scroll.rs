//! A bounded memory of lines, the oldest of which make room for new ones.

use alloc::collections::VecDeque;
use alloc::vec::Vec;

/// The lines of a console.
#[derive(Debug)]
pub struct Scroll {
    /// Lines, each with its line end.
    bytes: VecDeque<u8>,
    limit: usize,
}

impl Scroll {
    /// Room for this many bytes, which are taken as lines come.
    #[must_use]
    pub const fn new(limit: usize) -> Self {
        Self {
            bytes: VecDeque::new(),
            limit,
        }
    }

    /// Takes all its memory now, so that no line needs the heap later.
    pub fn fill_up(&mut self) {
        self.bytes.reserve_exact(self.limit);
    }

    /// Adds a line.
    pub fn push(&mut self, line: &[u8]) {
        let line = line.get(..line.len().min(self.limit / 2)).unwrap_or(line);
        while self.bytes.len() + line.len() + 1 > self.limit {
            let end = self.bytes.iter().position(|byte| *byte == b'\n');
            match end {
                Some(end) => drop(self.bytes.drain(..=end)),
                None => return,
            }
        }
        let needed = self.bytes.len() + line.len() + 1;
        if needed > self.bytes.capacity() {
            // Doubling alone would overshoot the limit.
            let target = (needed * 2).min(self.limit);
            self.bytes.reserve_exact(target - self.bytes.len());
        }
        self.bytes.extend(line);
        self.bytes.push_back(b'\n');
    }

    /// How many lines there are.
    #[must_use]
    pub fn lines(&self) -> usize {
        self.bytes.iter().filter(|byte| **byte == b'\n').count()
    }

    /// Up to `count` lines, of which the last has `back` lines after it, each with its line end.
    #[must_use]
    pub fn page(&self, back: usize, count: usize) -> Vec<u8> {
        let (mut ends, mut first, mut last) = (0, 0, 0);
        for (index, byte) in self.bytes.iter().enumerate().rev() {
            if *byte != b'\n' {
                continue;
            }
            if ends == back {
                last = index + 1;
            }
            if ends == back + count {
                first = index + 1;
                break;
            }
            ends += 1;
        }
        self.bytes.range(first..last.max(first)).copied().collect()
    }

    /// Bytes of memory held.
    #[must_use]
    pub fn held(&self) -> usize {
        self.bytes.capacity()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::format;
    use alloc::string::String;

    #[test]
    fn the_oldest_lines_make_room_and_pages_count_from_the_end() {
        let mut scroll = Scroll::new(40);
        for number in 0..20 {
            scroll.push(format!("line {number}").as_bytes());
        }
        let page = |back, count| String::from_utf8(scroll.page(back, count)).unwrap();
        assert_eq!(scroll.lines(), 5);
        assert_eq!(page(0, 2), "line 18\nline 19\n");
        assert_eq!(page(3, 2), "line 15\nline 16\n");
        assert_eq!(page(4, 2), "line 15\n");
        assert_eq!(page(9, 2), "");
        assert_eq!(page(0, 0), "");
        assert!(scroll.held() <= 40);
    }

    #[test]
    fn a_line_longer_than_all_is_cut() {
        let mut scroll = Scroll::new(16);
        scroll.push(&[b'x'; 100]);
        scroll.push(b"y");
        assert_eq!(scroll.page(0, 9), b"xxxxxxxx\ny\n");
    }
}
