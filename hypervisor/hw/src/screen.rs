//! VGA text mode, for machines that boot by BIOS.

use crate::DirectMap;
use arch::{HostPhysAddr, PhysMemory};

const BUFFER: u64 = 0xb8000;
const COLUMNS: usize = 80;
const ROWS: usize = 25;
const GREY_ON_BLACK: u8 = 0x07;

/// A text screen of 80 by 25 that scrolls.
pub struct TextScreen {
    map: DirectMap,
    column: usize,
}

impl TextScreen {
    /// Takes the VGA text buffer.
    ///
    /// # Safety
    /// The machine is in VGA text mode and nothing else writes its buffer.
    #[must_use]
    pub const unsafe fn new(map: DirectMap) -> Self {
        Self { map, column: 0 }
    }

    fn cell(row: usize, column: usize) -> HostPhysAddr {
        HostPhysAddr::new(BUFFER + 2 * (row * COLUMNS + column) as u64)
    }

    fn scroll(&mut self) {
        let mut line = [0; 2 * COLUMNS];
        for row in 1..ROWS {
            self.map.read(Self::cell(row, 0), &mut line);
            self.map.write(Self::cell(row - 1, 0), &line);
        }
        let blank = [b' ', GREY_ON_BLACK];
        for column in 0..COLUMNS {
            self.map.write(Self::cell(ROWS - 1, column), &blank);
        }
        self.column = 0;
    }

    /// Writes text on the last line, scrolling as needed.
    pub fn write(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            match byte {
                b'\n' => self.scroll(),
                b'\r' => self.column = 0,
                _ => {
                    if self.column == COLUMNS {
                        self.scroll();
                    }
                    self.map
                        .write(Self::cell(ROWS - 1, self.column), &[byte, GREY_ON_BLACK]);
                    self.column += 1;
                }
            }
        }
    }
}
