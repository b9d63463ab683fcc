//! Columns for `list`, `top` and `mem`, as wide as what stands in them.

use alloc::string::String;
use alloc::vec::Vec;

/// A table under construction: rows of cells, the first row being the heading.
#[derive(Debug, Default)]
pub struct Table {
    columns: usize,
    cells: Vec<String>,
}

impl Table {
    /// A table with this heading. A heading that begins with `>` makes its column stand right.
    #[must_use]
    pub fn new(heading: &[&str]) -> Self {
        Self {
            columns: heading.len().max(1),
            cells: heading.iter().map(|cell| String::from(*cell)).collect(),
        }
    }

    /// Adds the next cell; rows fill from the left.
    pub fn cell(&mut self, text: impl Into<String>) -> &mut Self {
        self.cells.push(text.into());
        self
    }

    /// Adds the next cell, a number.
    pub fn number(&mut self, number: u64) -> &mut Self {
        // A u64 has at most 20 digits; `format!` would bring the formatting machinery.
        let mut digits = String::new();
        let mut divisor = 1;
        while number / divisor >= 10 {
            divisor *= 10;
        }
        while divisor > 0 {
            digits.push(char::from(b'0' + (number / divisor % 10) as u8));
            divisor /= 10;
        }
        self.cell(digits)
    }

    /// Gives the lines one after the other.
    pub fn lines(&self, line: &mut dyn FnMut(&str)) {
        let right = |column: usize| self.cells.get(column).is_some_and(|c| c.starts_with('>'));
        let shown = |index: usize, cell: &'_ String| -> usize {
            cell.chars().count() - usize::from(index < self.columns && cell.starts_with('>'))
        };
        let mut widths = alloc::vec![0; self.columns];
        for (index, cell) in self.cells.iter().enumerate() {
            if let Some(width) = widths.get_mut(index % self.columns) {
                *width = shown(index, cell).max(*width);
            }
        }
        let mut text = String::new();
        for (row, cells) in self.cells.chunks(self.columns).enumerate() {
            text.clear();
            for (column, (cell, width)) in cells.iter().zip(&widths).enumerate() {
                let index = row * self.columns + column;
                let space = width - shown(index, cell);
                let pad = |text: &mut String, count| (0..count).for_each(|_| text.push(' '));
                let cell = if row == 0 {
                    cell.trim_start_matches('>')
                } else {
                    cell
                };
                if right(column) {
                    pad(&mut text, space);
                    text.push_str(cell);
                    pad(&mut text, 2);
                } else {
                    text.push_str(cell);
                    pad(&mut text, space + 2);
                }
            }
            line(text.trim_end());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec;

    #[test]
    fn columns_are_as_wide_as_their_widest_cell() {
        let mut table = Table::new(&["name", ">KiB", "state"]);
        table.cell("linux").number(262_144).cell("running");
        table.cell("a").number(0).cell("");
        let mut lines = vec![];
        table.lines(&mut |line| lines.push(String::from(line)));
        assert_eq!(
            lines,
            [
                "name      KiB  state",
                "linux  262144  running",
                "a           0",
            ]
        );
    }

    #[test]
    fn every_number_is_written_whole() {
        for number in [0, 7, 10, 99, 100, u64::MAX] {
            let mut table = Table::new(&["n"]);
            table.number(number);
            let mut last = String::new();
            table.lines(&mut |line| last = String::from(line));
            assert_eq!(last, alloc::format!("{number}"));
        }
    }
}
