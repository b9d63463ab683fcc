//! What a screen of character cells shows of the line: the cells that a terminal would show after
//! the same bytes (ECMA-48 §8.3; DEC VT510, chapter 5), and which of them the screen lacks.
//!
//! [`crate::mux`] writes, so sequences are whole and only those that [`crate::contain`] lets
//! through. The reader here does not rely on that: what it does not know it leaves out, and nothing
//! of it is shown. One byte costs at most one pass over a row or over the list of rows, however
//! large the numbers in a sequence are: rows are moved and cleared by their place in that list.
//!
//! A screen is slow to write. So it is not written as bytes come: [`Grid::draw`] compares what is
//! to be seen with what was drawn and gives the difference, as much as its caller has time for.

use alloc::vec;
use alloc::vec::Vec;

/// The widest screen; what is left of a wider one stays empty.
pub const MAX_COLUMNS: usize = 256;
/// The highest.
pub const MAX_ROWS: usize = 64;
/// Cells that are drawn at once.
pub const RUN: usize = 16;
/// Columns between tab stops.
const TAB: usize = 8;
/// Numbers in a control sequence; more are ignored.
const NUMBERS: usize = 16;

/// A cell, in VGA's layout: a character from 20H to 7EH and its colours, foreground in bits 3:0 and
/// background in bits 6:4, as blue, green, red and (foreground alone) bright.
pub type Cell = [u8; 2];

const PLAIN: u8 = 0x07;
const EMPTY: Cell = [b' ', PLAIN];
/// On the screen is something else, whatever is wanted.
const UNKNOWN: Cell = [0, 0];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Ground,
    /// After ESC.
    Escape,
    /// After ESC and this intermediate byte.
    Designation(u8),
    /// After `ESC [`.
    Sequence,
}

/// A cursor, and what DECSC keeps with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Cursor {
    row: usize,
    /// Equal to the number of columns after a character in the last one: the next one wraps.
    column: usize,
    colours: u8,
    reverse: bool,
    /// Which of G0 and G1 is used, and which of the two are line drawing.
    shifted: bool,
    drawing: [bool; 2],
}

const HOME: Cursor = Cursor {
    row: 0,
    column: 0,
    colours: PLAIN,
    reverse: false,
    shifted: false,
    drawing: [false; 2],
};

impl Cursor {
    /// Sets one of the sixteen colours as ANSI numbers them. Bright ones are for the foreground.
    const fn paint(&mut self, colour: u16, fore: bool) {
        // Red and blue change places.
        let vga = (colour & 2 | colour >> 2 & 1 | (colour & 1) << 2) as u8;
        self.colours = match fore {
            true => self.colours & 0x70 | (colour & 8) as u8 | vga,
            false => self.colours & 0x0f | vga << 4,
        };
    }
}

/// The cells of a screen.
#[derive(Debug)]
pub struct Grid {
    columns: usize,
    rows: usize,
    /// The rows' cells, in no order.
    cells: Vec<Cell>,
    /// Where the cells of each row are, from the top.
    order: Vec<u8>,
    /// By the same number as the cells: so many of the row are written, the rest is empty.
    written: Vec<u16>,
    /// What the screen shows.
    drawn: Vec<Cell>,
    /// Rows, by bit number, that may differ from it.
    changed: u64,
    /// Where the screen shows the cursor.
    shown: Option<(usize, usize)>,
    cursor: Cursor,
    saved: Cursor,
    /// First and last row of the region that scrolls.
    region: (usize, usize),
    hidden: bool,
    wraps: bool,
    inserts: bool,
    /// Rows count from the region's.
    origin: bool,
    /// The last character, for REP.
    last: u8,
    state: State,
    numbers: [u16; NUMBERS],
    /// Numbers begun in the sequence.
    count: usize,
    /// A private sequence, or one with an intermediate byte: of the second kind, none is known.
    private: bool,
    odd: bool,
}

impl Grid {
    /// An empty grid for a screen of so many cells, of whose content nothing is known.
    #[must_use]
    pub fn new(columns: usize, rows: usize) -> Self {
        let columns = columns.clamp(1, MAX_COLUMNS);
        let rows = rows.clamp(1, MAX_ROWS);
        Self {
            columns,
            rows,
            cells: vec![EMPTY; columns * rows],
            order: (0..MAX_ROWS as u8).take(rows).collect(),
            written: vec![0; rows],
            drawn: vec![UNKNOWN; columns * rows],
            changed: mask(0, rows - 1),
            shown: None,
            cursor: HOME,
            saved: HOME,
            region: (0, rows - 1),
            hidden: false,
            wraps: true,
            inserts: false,
            origin: false,
            last: b' ',
            state: State::Ground,
            numbers: [0; NUMBERS],
            count: 0,
            private: false,
            odd: false,
        }
    }

    /// Reads what goes out on the line.
    #[inline(never)]
    pub fn feed(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            self.push(byte);
        }
    }

    /// Whether the screen is to be drawn.
    #[must_use]
    pub fn is_changed(&self) -> bool {
        self.changed != 0 || self.shown != self.cursor_cell()
    }

    /// Gives what the screen lacks: row, column, and up to [`RUN`] cells from there on. It goes on
    /// for as long as `give` says so; the rest is for the next call.
    #[inline(never)]
    pub fn draw(&mut self, give: &mut dyn FnMut(usize, usize, &[Cell]) -> bool) {
        let cursor = self.cursor_cell();
        if cursor != self.shown {
            for (row, _) in [cursor, self.shown].into_iter().flatten() {
                self.changed |= mask(row, row);
            }
            self.shown = cursor;
        }
        while self.changed != 0 {
            let row = self.changed.trailing_zeros() as usize;
            let mut column = 0;
            while column < self.columns {
                let mut run = [EMPTY; RUN];
                let mut used = 0;
                let begin = row * self.columns + column;
                let left = self.columns - column;
                for (index, place) in run.iter_mut().enumerate().take(left) {
                    let wanted = self.seen(row, column + index);
                    let Some(drawn) = self.drawn.get_mut(begin + index) else {
                        break;
                    };
                    if *drawn == wanted {
                        break;
                    }
                    (*drawn, *place) = (wanted, wanted);
                    used += 1;
                }
                let cells = run.get(..used).unwrap_or_default();
                if used > 0 && !give(row, column, cells) {
                    return;
                }
                column += used.max(1);
            }
            self.changed &= !mask(row, row);
        }
    }

    /// The cell that the cursor stands on, if it is to be seen.
    fn cursor_cell(&self) -> Option<(usize, usize)> {
        let column = self.cursor.column.min(self.columns - 1);
        (!self.hidden).then_some((self.cursor.row, column))
    }

    /// What is to be seen at a place.
    fn seen(&self, row: usize, column: usize) -> Cell {
        let stored = self.stored(row);
        let written = self.written.get(stored).copied().unwrap_or(0);
        let cell = if column < usize::from(written) {
            self.cells.get(stored * self.columns + column)
        } else {
            None
        };
        let [character, colours] = cell.copied().unwrap_or(EMPTY);
        match self.shown == Some((row, column)) {
            true => [character, reversed(colours)],
            false => [character, colours],
        }
    }

    /// Where a row is kept.
    fn stored(&self, row: usize) -> usize {
        self.order.get(row).copied().map_or(0, usize::from)
    }

    /// A row's cells up to `until`, all of them written, and how many there were before.
    fn row(&mut self, row: usize, until: usize) -> &mut [Cell] {
        self.changed |= mask(row, row);
        let stored = self.stored(row);
        let begin = stored * self.columns;
        let until = until.min(self.columns);
        let Some(written) = self.written.get_mut(stored) else {
            return &mut [];
        };
        let old = usize::from(*written);
        let now = old.max(until);
        *written = now as u16;
        if let Some(gap) = self.cells.get_mut(begin + old..begin + now) {
            gap.fill(EMPTY);
        }
        self.cells.get_mut(begin..begin + now).unwrap_or_default()
    }

    /// Empties a row from a column on.
    fn cut(&mut self, row: usize, column: usize) {
        self.changed |= mask(row, row);
        let stored = self.stored(row);
        if let Some(written) = self.written.get_mut(stored) {
            *written = (*written).min(column.min(MAX_COLUMNS) as u16);
        }
    }

    /// Empties rows.
    fn clear(&mut self, rows: core::ops::Range<usize>) {
        rows.for_each(|row| self.cut(row, 0));
    }

    /// Moves the rows of a region up, or down; empty ones come in.
    fn scroll(&mut self, (top, bottom): (usize, usize), by: usize, up: bool) {
        let Some(region) = self.order.get_mut(top..=bottom) else {
            return;
        };
        let by = by.min(region.len());
        if up {
            region.rotate_left(by);
            self.clear(bottom + 1 - by..bottom + 1);
        } else {
            region.rotate_right(by);
            self.clear(top..top + by);
        }
        self.changed |= mask(top, bottom);
    }

    /// Down a row; at the region's last, the region moves up.
    fn index(&mut self) {
        if self.cursor.row == self.region.1 {
            self.scroll(self.region, 1, true);
        } else if self.cursor.row + 1 < self.rows {
            self.cursor.row += 1;
        }
    }

    /// Up a row; at the region's first, the region moves down.
    fn reverse_index(&mut self) {
        if self.cursor.row == self.region.0 {
            self.scroll(self.region, 1, false);
        } else {
            self.cursor.row = self.cursor.row.saturating_sub(1);
        }
    }

    fn put(&mut self, character: u8) {
        self.last = character;
        if self.cursor.column >= self.columns {
            if self.wraps {
                self.cursor.column = 0;
                self.index();
            } else {
                self.cursor.column = self.columns - 1;
            }
        }
        let Cursor {
            row,
            column,
            colours,
            reverse,
            shifted,
            drawing: [g0, g1],
        } = self.cursor;
        if self.inserts {
            self.insert(1);
        }
        let drawing = if shifted { g1 } else { g0 };
        let colours = if reverse { reversed(colours) } else { colours };
        let character = if drawing { ruled(character) } else { character };
        if let Some(cell) = self.row(row, column + 1).get_mut(column) {
            *cell = [character, colours];
        }
        self.cursor.column = column + 1;
    }

    /// Shifts the rest of the row to the right.
    fn insert(&mut self, count: usize) {
        let columns = self.columns;
        let Cursor { row, column, .. } = self.cursor;
        let cells = self.row(row, columns);
        let count = count.min(columns.saturating_sub(column));
        if let Some(rest) = cells.get_mut(column..) {
            rest.rotate_right(count);
            rest.iter_mut().take(count).for_each(|cell| *cell = EMPTY);
        }
    }

    /// Shifts the rest of the row to the left.
    fn delete(&mut self, count: usize) {
        let Cursor { row, column, .. } = self.cursor;
        let cells = self.row(row, 0);
        let written = cells.len();
        let count = count.min(written.saturating_sub(column));
        if let Some(rest) = cells.get_mut(column..) {
            rest.rotate_left(count);
            self.cut(row, written - count);
        }
    }

    /// Empties cells of the cursor's row.
    fn erase(&mut self, cells: core::ops::Range<usize>) {
        let row = self.cursor.row;
        if cells.end >= self.columns {
            return self.cut(row, cells.start);
        }
        let written = self.row(row, 0);
        let end = cells.end.min(written.len());
        if let Some(cells) = written.get_mut(cells.start.min(end)..end) {
            cells.fill(EMPTY);
        }
    }

    fn push(&mut self, byte: u8) {
        match (self.state, byte) {
            (_, 0x1b) => self.state = State::Escape,
            (_, 0..=0x1f) => self.control(byte),
            (State::Ground, b' '..=b'~') => self.put(byte),
            // A character in UTF-8 begins; what else it has is not counted.
            (State::Ground, 0xc0..) => self.put(b'?'),
            (State::Ground, _) => {}
            (State::Escape, b'[') => {
                self.state = State::Sequence;
                self.numbers = [0; NUMBERS];
                (self.count, self.private, self.odd) = (0, false, false);
            }
            (State::Escape, 0x20..=0x2f) => self.state = State::Designation(byte),
            (State::Escape, _) => {
                self.state = State::Ground;
                self.escape(byte);
            }
            (State::Designation(set), _) => {
                self.state = State::Ground;
                let [g0, g1] = &mut self.cursor.drawing;
                match set {
                    b'(' => *g0 = byte == b'0',
                    b')' => *g1 = byte == b'0',
                    _ => {}
                }
            }
            (State::Sequence, b'0'..=b'9') => {
                self.count = self.count.max(1);
                if let Some(number) = self.numbers.get_mut(self.count - 1) {
                    let digit = u16::from(byte - b'0');
                    *number = number.saturating_mul(10).saturating_add(digit);
                }
            }
            (State::Sequence, b';' | b':') => self.count = (self.count.max(1) + 1).min(NUMBERS + 1),
            (State::Sequence, b'?') => self.private = true,
            (State::Sequence, 0x20..=0x3f) => self.odd = true,
            (State::Sequence, _) => {
                self.state = State::Ground;
                match (self.odd, self.private) {
                    (true, _) => {}
                    (false, true) => self.private_sequence(byte),
                    (false, false) => self.sequence(byte),
                }
            }
        }
    }

    fn control(&mut self, byte: u8) {
        let cursor = &mut self.cursor;
        match byte {
            0x08 => cursor.column = cursor.column.min(self.columns - 1).saturating_sub(1),
            b'\t' => self.tab(1, true),
            b'\n' | 0x0b | 0x0c => self.index(),
            b'\r' => cursor.column = 0,
            0x0e => cursor.shifted = true,
            0x0f => cursor.shifted = false,
            0x18 | 0x1a => self.state = State::Ground,
            _ => {}
        }
    }

    /// Goes over tab stops.
    fn tab(&mut self, count: usize, forward: bool) {
        let column = self.cursor.column.min(self.columns - 1);
        let count = count.min(MAX_COLUMNS);
        self.cursor.column = if forward {
            ((column / TAB + count) * TAB).min(self.columns - 1)
        } else {
            (column.div_ceil(TAB)).saturating_sub(count) * TAB
        };
    }

    fn escape(&mut self, byte: u8) {
        match byte {
            b'7' => self.saved = self.cursor,
            b'8' => self.cursor = self.saved,
            b'D' => self.index(),
            b'E' => {
                self.cursor.column = 0;
                self.index();
            }
            b'M' => self.reverse_index(),
            b'c' => self.renew(),
            _ => {}
        }
    }

    /// RIS.
    fn renew(&mut self) {
        (self.cursor, self.saved) = (HOME, HOME);
        self.region = (0, self.rows - 1);
        (self.hidden, self.wraps, self.inserts, self.origin) = (false, true, false, false);
        self.clear(0..self.rows);
    }

    /// A number of the sequence; where there is none, or 0, the other.
    fn number(&self, index: usize, or: usize) -> usize {
        match self.numbers.get(index) {
            Some(0) | None => or,
            Some(number) => usize::from(*number),
        }
    }

    /// Places the cursor in a row and a column, from 0.
    fn place(&mut self, row: usize, column: usize) {
        let (top, bottom) = match self.origin {
            true => self.region,
            false => (0, self.rows - 1),
        };
        self.cursor.row = (top + row).min(bottom);
        self.cursor.column = column.min(self.columns - 1);
    }

    /// Moves the cursor by rows, not beyond the region that it is in.
    fn vertical(&mut self, by: usize, down: bool) {
        let (top, bottom) = self.region;
        let row = self.cursor.row;
        self.cursor.row = match (down, row <= bottom, row >= top) {
            (true, true, _) => (row + by).min(bottom),
            (true, false, _) => (row + by).min(self.rows - 1),
            (false, _, true) => row.saturating_sub(by).max(top),
            (false, _, false) => row.saturating_sub(by),
        };
        self.cursor.column = self.cursor.column.min(self.columns - 1);
    }

    fn sequence(&mut self, last: u8) {
        let n = self.number(0, 1);
        let row = self.cursor.row;
        let column = self.cursor.column.min(self.columns - 1);
        let top = if self.origin { self.region.0 } else { 0 };
        match last {
            b'A' => self.vertical(n, false),
            b'B' | b'e' => self.vertical(n, true),
            b'C' | b'a' => self.cursor.column = (column + n).min(self.columns - 1),
            b'D' => self.cursor.column = column.saturating_sub(n),
            b'E' | b'F' => {
                self.vertical(n, last == b'E');
                self.cursor.column = 0;
            }
            b'G' | b'`' => self.place(row.saturating_sub(top), n - 1),
            b'H' | b'f' => self.place(n - 1, self.number(1, 1) - 1),
            b'd' => self.place(n - 1, column),
            b'I' | b'Z' => self.tab(n, last == b'I'),
            b'J' => match self.number(0, 0) {
                0 => {
                    self.cut(row, column);
                    self.clear(row + 1..self.rows);
                }
                1 => {
                    self.erase(0..column + 1);
                    self.clear(0..row);
                }
                _ => self.clear(0..self.rows),
            },
            b'K' => match self.number(0, 0) {
                0 => self.cut(row, column),
                1 => self.erase(0..column + 1),
                _ => self.cut(row, 0),
            },
            b'L' | b'M' if (self.region.0..=self.region.1).contains(&row) => {
                self.scroll((row, self.region.1), n, last == b'M');
                self.cursor.column = 0;
            }
            b'S' | b'T' => self.scroll(self.region, n, last == b'S'),
            b'@' | b'P' => {
                self.cursor.column = column;
                match last {
                    b'@' => self.insert(n),
                    _ => self.delete(n),
                }
            }
            b'X' => self.erase(column..column.saturating_add(n)),
            b'b' => (0..n.min(self.columns)).for_each(|_| self.put(self.last)),
            b'm' => self.rendition(),
            b'r' => {
                let bottom = self.number(1, self.rows).min(self.rows);
                if n < bottom {
                    self.region = (n - 1, bottom - 1);
                    self.place(0, 0);
                }
            }
            b's' => self.saved = self.cursor,
            b'u' => self.cursor = self.saved,
            b'h' | b'l' if n == 4 => self.inserts = last == b'h',
            _ => {}
        }
    }

    fn private_sequence(&mut self, last: u8) {
        let set = match last {
            b'h' => true,
            b'l' => false,
            // DEC's erasures, of which none is protected here.
            b'J' | b'K' => return self.sequence(last),
            _ => return,
        };
        let numbers = self.numbers;
        for mode in numbers.into_iter().take(self.count) {
            match mode {
                6 => {
                    self.origin = set;
                    self.place(0, 0);
                }
                7 => self.wraps = set,
                25 => self.hidden = !set,
                // There is one page: a guest that turns to the other finds it empty, and so does
                // who comes after.
                47 | 1047 | 1049 => {
                    if mode == 1049 && set {
                        self.saved = self.cursor;
                    }
                    self.clear(0..self.rows);
                    if mode == 1049 && !set {
                        self.cursor = self.saved;
                    }
                }
                1048 if set => self.saved = self.cursor,
                1048 => self.cursor = self.saved,
                _ => {}
            }
        }
    }

    /// SGR: what of it VGA's colours can show.
    fn rendition(&mut self) {
        let numbers = self.numbers;
        let mut numbers = numbers.into_iter().take(self.count.max(1));
        let cursor = &mut self.cursor;
        while let Some(number) = numbers.next() {
            match number {
                30..=37 => cursor.paint(number - 30, true),
                40..=47 => cursor.paint(number - 40, false),
                90..=97 => cursor.paint(number - 90 + 8, true),
                100..=107 => cursor.paint(number - 100, false),
                39 => cursor.paint(7, true),
                49 => cursor.paint(0, false),
                // One of 256 colours, of which those above come first, or any.
                38 | 48 => match numbers.next() {
                    Some(5) => {
                        if let Some(colour @ 0..16) = numbers.next() {
                            cursor.paint(colour, number == 38);
                        }
                    }
                    Some(2) => drop(numbers.nth(2)),
                    _ => {}
                },
                0 => (cursor.colours, cursor.reverse) = (PLAIN, false),
                1 => cursor.colours |= 8,
                22 => cursor.colours &= !8,
                7 | 27 => cursor.reverse = number == 7,
                _ => {}
            }
        }
    }
}

/// Foreground and background exchanged.
const fn reversed(colours: u8) -> u8 {
    colours >> 4 & 7 | (colours & 7) << 4
}

/// What stands for a character of DEC's line drawing.
const fn ruled(character: u8) -> u8 {
    match character {
        b'q' => b'-',
        b'x' => b'|',
        b'j'..=b'n' | b't'..=b'w' => b'+',
        _ => character,
    }
}

/// The rows from `first` to `last`.
const fn mask(first: usize, last: usize) -> u64 {
    (u64::MAX << (first & 63)) & (u64::MAX >> (63 - (last & 63)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::string::String;
    use proptest::prelude::*;

    /// A grid, and the screen it is drawn on.
    struct World {
        grid: Grid,
        screen: Vec<Cell>,
    }

    impl World {
        fn new(columns: usize, rows: usize) -> Self {
            Self {
                grid: Grid::new(columns, rows),
                screen: vec![UNKNOWN; columns * rows],
            }
        }
        fn feed(&mut self, bytes: &[u8]) -> &mut Self {
            self.grid.feed(bytes);
            self
        }
        /// Draws all and gives how many cells that took.
        fn draw(&mut self) -> usize {
            let (screen, columns) = (&mut self.screen, self.grid.columns);
            let mut drawn = 0;
            self.grid.draw(&mut |row, column, cells| {
                assert!(!cells.is_empty() && column + cells.len() <= columns);
                screen[row * columns + column..][..cells.len()].copy_from_slice(cells);
                drawn += cells.len();
                true
            });
            assert!(!self.grid.is_changed());
            drawn
        }
        /// The rows as text.
        fn text(&mut self) -> Vec<String> {
            self.draw();
            let rows = self.screen.chunks(self.grid.columns);
            let text =
                |row: &[Cell]| -> String { row.iter().map(|[c, _]| char::from(*c)).collect() };
            rows.map(|row| text(row).trim_end().into()).collect()
        }
    }

    #[test]
    fn the_screen_shows_what_a_terminal_would() {
        for (written, rows) in [
            (&b"one\r\ntwo\r\n"[..], ["one", "two", "", ""]),
            (b"1\r\n2\r\n3\r\n4\r\n5", ["2", "3", "4", "5"]),
            // Lines feed alone; the last column waits with wrapping.
            (b"a\nb\rc", ["a", "cb", "", ""]),
            (b"0123456789\r\nx", ["0123456789", "x", "", ""]),
            (b"0123456789x\x08y\tz", ["0123456789", "y       z", "", ""]),
            (b"\x1b[?7l0123456789xyz", ["012345678z", "", "", ""]),
            (b"> lst\x08\x08ist\x08\r\x1b[Kbye", ["bye", "", "", ""]),
            // Addressing, with numbers far too large, and erasing.
            (
                b"\x1b[99;99Hx\x1b[2;3Hy\x1b[Hz",
                ["z", "  y", "", "         x"],
            ),
            (b"abcdef\x1b[3D\x1b[Kx\x1b[2GB", ["aBcx", "", "", ""]),
            (b"abcdef\x1b[3G\x1b[1K\x1b[2X", ["    ef", "", "", ""]),
            (b"ab\r\ncd\r\nef\x1b[2;2H\x1b[J", ["ab", "c", "", ""]),
            (b"ab\r\ncd\r\nef\x1b[2;1H\x1b[1J", ["", " d", "ef", ""]),
            (b"ab\x1b[2Jc", ["  c", "", "", ""]),
            (b"abcd\x1b[2G\x1b[2@xy\x1b[P", ["axycd", "", "", ""]),
            (b"abc\r\x1b[4hx\x1b[4ly", ["xybc", "", "", ""]),
            // A region that scrolls, both ways, and lines in it.
            (
                b"1\r\n2\r\n3\r\n4\x1b[2;3r\x1b[3;1H\n5",
                ["1", "3", "5", "4"],
            ),
            (
                b"1\r\n2\r\n3\r\n4\x1b[2;3r\x1b[2;1H\x1bMx",
                ["1", "x", "2", "4"],
            ),
            (b"1\r\n2\r\n3\r\n4\x1b[2H\x1b[L\x1b[99M", ["1", "", "", ""]),
            (b"1\r\n2\r\n3\r\n4\x1b[2S\x1b[T", ["", "3", "4", ""]),
            (b"\x1b[2;3r\x1b[?6h\x1b[9;1Hx", ["", "", "x", ""]),
            // Colours and what is unknown leave no trace in the text.
            (
                b"\x1b[1;38;5;200;4mred\x1b[m\x1b[?2004h\x1b[>c\x1b[ qx",
                ["redx", "", "", ""],
            ),
            (
                b"\x07\x1b=\x1b[6n\x1b[c\x1b[12345678901234567890Gx",
                ["         x", "", "", ""],
            ),
            // Line drawing, and characters that the font has not.
            (
                b"\x1b(0lqk\x1b(Bq \x1b)0\x0ex\x0fx",
                ["+-+q |x", "", "", ""],
            ),
            ("\u{e4}\u{20ac}!".as_bytes(), ["??!", "", "", ""]),
            (b"a\x1b7\x1b[3;3Hb\x1b8c\x1b[3b", ["acccc", "", "  b", ""]),
            (b"\x1b[?1049hall\x1b[?1049lnew", ["new", "", "", ""]),
            (b"x\x1b[2;3r\x1bcnew", ["new", "", "", ""]),
        ] {
            let mut world = World::new(10, 4);
            let seen = world.feed(written).text();
            assert_eq!(seen, rows, "{}", written.escape_ascii());
            // Byte by byte, drawn in between, it is the same.
            let mut slow = World::new(10, 4);
            for &byte in written {
                slow.feed(&[byte]).draw();
            }
            assert_eq!(slow.screen, world.screen, "{}", written.escape_ascii());
        }
    }

    #[test]
    fn what_the_mux_writes_looks_as_meant() {
        use crate::mux::{Focus, Mux};
        let mut world = World::new(30, 6);
        let mut mux = Mux::new(4096);
        for name in ["a", "b"] {
            mux.add(name, 1024, false);
        }
        let out = &mut |bytes: &[u8]| world.grid.feed(bytes);
        mux.log("boots", out);
        mux.set_focus(Focus::Guest(0), out);
        mux.output(0, b"\x1b[31mbusy\x1b[?25l 50%\rdone", out);
        mux.output(1, b"\x1b[2Jhidden\x1b]0;title\x07\r\n", out);
        mux.output(0, b"\r\nmore\r\n", out);
        let rows = [" for help)", "done 50%", "b| hidden", "", "more", ""];
        assert_eq!(world.text(), rows);
        // A line is typed, taken back, typed, corrected and answered.
        let mut world = World::new(60, 4);
        let out = &mut |bytes: &[u8]| world.grid.feed(bytes);
        for key in b"\x140he\t\x7f\x7f\x7f\x7f\x7fhog\x1b[D\x1b[D\x08l\x05 1\r" {
            let _ = mux.key(*key, out);
        }
        let said = "tessera| keyboard: monitor (`help` lists its commands)";
        assert_eq!(world.text(), [said, "> log 1", said, ""]);
    }

    #[test]
    fn colours_are_vgas_and_the_cursor_is_reversed() {
        let mut world = World::new(10, 1);
        world.feed(b"\x1b[31ma\x1b[1;44mb\x1b[7mc\x1b[0md\x1b[96me\x1b[38;5;2;107mf");
        world.draw();
        let colours = [0x04, 0x1c, 0x41, 0x07, 0x0b, 0x72, 0x70, 0x07];
        let seen = world.screen.iter().map(|cell| cell[1]);
        assert!(seen.take(8).eq(colours), "{:x?}", world.screen);
        world.feed(b"\x1b[?25l").draw();
        assert_eq!(world.screen[6], EMPTY);
    }

    #[test]
    fn only_what_changed_is_drawn_and_no_more_than_there_is_time_for() {
        let mut world = World::new(80, 25);
        assert_eq!(world.draw(), 80 * 25, "of the screen nothing is known");
        assert_eq!(world.feed(b"hello").draw(), 6, "five cells and the cursor");
        assert_eq!(world.draw(), 0);
        world.feed(b"\r\nworld").draw();
        // Back and forth comes to nothing.
        assert_eq!(world.feed(b"\x1b[H\x1b[Jhello\r\nworld").draw(), 0);
        world.feed(&[b'x'; 800]);
        let mut calls = 0;
        while world.grid.is_changed() {
            let mut given = 0;
            world.grid.draw(&mut |_, _, cells| {
                given += cells.len();
                false
            });
            assert!(given <= RUN);
            calls += 1;
        }
        assert!(calls >= 50);
    }

    #[test]
    fn any_size_is_one_that_can_be_kept() {
        for (columns, rows) in [(0, 0), (1, 1), (MAX_COLUMNS + 1, MAX_ROWS + 1)] {
            let mut grid = Grid::new(columns, rows);
            grid.feed(b"some text\r\nand more\x1b[99S\x1b[2;1r\x1b[H\x1b[99@\x1b[99P");
            grid.draw(&mut |row, column, cells| {
                assert!(row < rows.max(1) && column + cells.len() <= columns.max(1));
                true
            });
        }
    }

    proptest! {
        /// Random output shows the same however often it is drawn in between, stays on the screen,
        /// and shows printable characters alone.
        #[test]
        fn random_output_is_drawn_completely(
            parts in prop::collection::vec(
                prop_oneof![
                    prop::collection::vec(any::<u8>(), 0..8),
                    "[ -~]{0,30}".prop_map(String::into_bytes),
                    "\r?\n".prop_map(String::into_bytes),
                    "\x1b[78DEMc]".prop_map(String::into_bytes),
                    r"\x1b\[\??[0-9]{0,3}(;[0-9]{0,3}){0,2}[@-~]".prop_map(String::into_bytes),
                ],
                0..60,
            ),
        ) {
            let mut often = World::new(21, 7);
            let mut once = World::new(21, 7);
            for part in &parts {
                once.feed(part);
                often.feed(part).draw();
            }
            once.draw();
            often.draw();
            prop_assert_eq!(&often.screen, &once.screen);
            prop_assert!(once.screen.iter().all(|[c, _]| (b' '..=b'~').contains(c)));
        }
    }
}
